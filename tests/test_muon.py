import functools
import math
import shutil

import pytest
import test_precision
import torch
from test_parallel import MODELS, STEPS, TINY, differences, in_ranks, one_process, rerun, trained
from test_train import MINI, PARITY, our_losses, plain_losses
from torch import nn

import data
import scaling
import train
import zero
from zero import Muon, Piece, cut, orthogonalize, plan_exchange

MUON = "--optimizer", "muon", "--lr", "0.02", "--adamw-lr-ratio", "0.5"
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01)

# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (7, 7), (1, 5), (5, 1)])
def test_singular_values_end_near_one_and_directions_stay(shape):
    """Also where the singular values are given, and unequal."""
    W, _, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    S = torch.linspace(1, 10, len(V), dtype=torch.float64)
    O = orthogonalize(W @ S.diag() @ V)
    s = W.mT @ O @ V.mT
    torch.testing.assert_close(s, s.diagonal().diag(), rtol=0, atol=1e-12)
    assert 0.68 < s.diagonal().min() and s.diagonal().max() < 1.21
    torch.testing.assert_close(orthogonalize(1e3 * W @ S.diag() @ V), O, rtol=0, atol=1e-12)
    assert orthogonalize(torch.zeros(shape)).abs().max() == 0                                     # not 0 / 0


def test_the_polynomial_is_what_is_said_of_it():
    a, b, c = zero.POLYNOMIAL
    s = torch.logspace(math.log10(1 / 500), 0, 10_000, dtype=torch.float64)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert 0.68 < s.min() and s.max() < 1.21 and round(a**5) == 485


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_outputs_change_by_the_rate_and_moonlights_scale_is_of_the_longer_side(shape):
    """Roots of mean squares, as far as singular values end at 1. Input and gradient are random."""
    torch.manual_seed(0)
    O, x = orthogonalize(torch.randn(shape)), torch.randn(shape[1], 1000)
    rms = lambda x: x.square().mean().sqrt().item()
    assert 0.68 < rms(zero.scale_of(*shape) * O @ x) < 1.21
    assert 0.68 < rms(math.sqrt(max(shape)) * O) < 1.21


@pytest.mark.parametrize("exact", [True, False])
def test_a_step_is_torchs_and_the_one_on_the_board(monkeypatch, exact):
    """torch computes the products in bfloat16: here in float64, or as it is and then near. Its momentum is ours times
    1 - mu, which the norm divides out."""
    shapes = (5, 7), (9, 4), (6, 6)
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    ours, theirs, board = ([nn.Parameter(x.clone()) for x in start] for _ in range(3))
    options = dict(lr=0.03, momentum=0.9, weight_decay=0.2)
    optimizer, other = Muon([{"params": ours, "muon": True}], ADAMW, **options), torch.optim.Muon(theirs, **options)
    M = [torch.zeros_like(x) for x in start]
    if exact:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for _ in range(4):
        for p, q, w, m in zip(ours, theirs, board, M, strict=True):
            p.grad = torch.randn(p.shape, dtype=torch.float64)
            q.grad = p.grad.clone()
            with torch.no_grad():
                zero.muon_step(w, p.grad, m, **options)
        optimizer.step()
        other.step()
    for p, q, w, m in zip(ours, theirs, board, M, strict=True):
        torch.testing.assert_close(p, w, rtol=0, atol=1e-14)
        torch.testing.assert_close(optimizer.state[p]["momentum"], m, rtol=0, atol=0)
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14 if exact else 4 * 0.03 * 0.05)
        assert exact or (p - q).abs().max() > 1e-5


def test_the_rest_has_its_own_optimizer_and_schedulers_reach_both():
    def build():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]

    (A, B, C), (a, b, c) = build(), build()
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    optimizer = Muon([{"params": [B, C], "weight_decay": 0.3}, {"params": [A, frozen], "muon": True}], ADAMW)
    apart = torch.optim.AdamW([b, c], lr=0.01, weight_decay=0.3), Muon([{"params": [a], "muon": True}], ADAMW)
    for step in range(4):
        for p, q in zip((A, B, C), (a, b, c), strict=True):
            p.grad = torch.full_like(p, 0.1) + step * p.detach()
            q.grad = p.grad.clone()
        for group in (*optimizer.param_groups, *apart[0].param_groups, *apart[1].param_groups):
            group["lr"] = 0.1 / (1 + step)
        optimizer.step()
        for x in apart:
            x.step()
        if step == 1:                                                          # a state that is saved and read
            saved = optimizer.state_dict()
            optimizer = Muon([{"params": [B, C]}, {"params": [A, frozen], "muon": True}], ADAMW)
            optimizer.load_state_dict(saved)
    for p, q in zip((A, B, C), (a, b, c), strict=True):
        assert torch.equal(p, q)
    assert optimizer.state[A].keys() == {"momentum"} and frozen not in optimizer.state and frozen.sum() == 4


def test_a_matrix_without_a_gradient_is_left_as_it_is():
    a, b = (nn.Parameter(torch.eye(3)) for _ in range(2))
    optimizer = Muon([{"params": [a, b], "muon": True}], ADAMW)
    a.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(b, torch.eye(3)) and b not in optimizer.state and not torch.equal(a, b)


def test_what_is_no_matrix_is_named():
    with pytest.raises(ValueError, match="0 must be a matrix for Muon, it has 1 dimensions"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "muon": True}], ADAMW)
    p = nn.Parameter(torch.ones(4))
    p.full_name, p.box, p.flat = "w", ((0, 2, 4), (0, 3, 3)), (1, 5)
    with pytest.raises(ValueError, match="w: the pieces of the group's ranks must make its 12 elements, they make 4"):
        Muon([{"params": [p], "muon": True}], ADAMW)                           # sharded, and no group was given


# ---- the plan --------------------------------------------------------------------------------------------------------

def test_owners_hold_a_part_and_share_the_work():
    box = lambda *sides: tuple((0, n, n) for n in sides)
    whole = [Piece(f"{i}", box(8, 8), 0, 64) for i in range(6)] + [Piece("big", box(8, 16), 0, 128)]
    owners, to_owner, to_holders = plan_exchange([whole, whole])                # copies: nothing has to be brought
    assert all(source == target for _, source, target in to_owner) and len(to_owner) == 7 and len(to_holders) == 14
    load = [sum(zero.orthogonalize_flops(*x.whole) for x in whole if owners[x.name] == r) for r in (0, 1)]
    assert max(load) - min(load) <= zero.orthogonalize_flops(8, 8)
    # rank 0 alone has "a"; "b" lies on ranks 1 and 2; rank 3 has nothing
    a, b = Piece("a", box(4, 4), 0, 16), Piece("b", box(4, 4), 0, 10)
    rest = b._replace(lo=10, hi=16)
    owners, to_owner, to_holders = plan_exchange([[a], [b], [rest], [a._replace(hi=0)]])
    assert owners == {"a": 0, "b": 1}
    assert to_owner == [(a, 0, 0), (b, 1, 1), (rest, 2, 1)] and to_holders == [(a, 0, 0), (b, 1, 1), (rest, 1, 2)]


@pytest.mark.parametrize("rows, columns", [(4, 6), (5, 3)])
def test_pieces_are_cut_out_and_put_together(rows, columns):
    """Halves of columns, ragged ranges of them, and one without an element."""
    matrix = torch.arange(rows * columns).view(rows, columns)
    left = ((0, rows, rows), (0, columns - 2, columns))
    right = ((0, rows, rows), (columns - 2, columns, columns))
    size = rows * (columns - 2)
    pieces = [Piece("w", left, 0, 3), Piece("w", left, 3, 3), Piece("w", left, 3, size), Piece("w", right, 0, rows * 2)]
    parts = {piece: cut(matrix, piece) for piece in pieces}
    assert torch.equal(zero.assemble(parts), matrix)
    assert parts[pieces[0]].tolist() == matrix[:, :-2].flatten()[:3].tolist()


# ---- any layout is the same run --------------------------------------------------------------------------------------

def exchanged(rank, n, argv, steps, dtype=torch.float64):
    """As test_parallel's trained(), and this rank's pieces of matrices."""
    made, make = [], train.make_optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", lambda *args: made.append(make(*args)) or made[-1])
        answer = trained(rank, n, argv, steps, dtype)
    muon = [p for group in made[0].param_groups if group.get("muon") for p in group["params"]]
    return *answer, [zero.piece_of(p, 0) for p in muon], [tuple(made[0].state[p].keys()) for p in muon if p.numel()]


def elements_sent(everyone) -> list[int]:
    """Elements that each rank sends in a step of Muon, counted from what each holds."""
    owners, _, _ = plan_exchange(everyone)
    held, sent = [{piece for piece in pieces if piece.lo < piece.hi} for pieces in everyone], [0] * len(everyone)
    for piece in set().union(*held):
        holders, size = [r for r, pieces in enumerate(held) if piece in pieces], piece.hi - piece.lo
        owner = owners[piece.name]
        if owner not in holders:
            sent[holders[0]] += size
        sent[owner] += size * len(set(holders) - {owner})
    return sent


LAYOUTS = [  # ranks, flags
    (2, "--dp 2"), (2, "--tp 2"), (4, "--dp 2 --tp 2 --no-sequence-parallel"), (2, "--pp 2 --pp-schedule zb"),
    (4, "--dp 4 --zero 1"), (2, "--dp 2 --zero 2"), (4, "--dp 4 --zero 3"), (4, "--dp 2 --tp 2 --zero 3"),
    (4, "--dp 2 --tp 2 --zero 1"), (4, "--tp 2 --pp 2 --pp-schedule interleaved"), (4, "--dp 2 --pp 2 --zero 2")]
SELDOM = [(2, "--tp 2"), (2, "--pp 2 --pp-schedule zb"), (2, "--dp 2 --zero 2"), (4, "--dp 4 --zero 3"),
          (4, "--dp 2 --tp 2 --zero 1")]


@pytest.mark.parametrize("ranks, flags", [
    pytest.param(*layout, marks=[pytest.mark.slow] * (layout in SELDOM)) for layout in LAYOUTS])
def test_any_layout_is_the_same_run(corpus, run_ranks, ranks, flags):
    """Weights and losses are those of one process; bytes sent are counted from the pieces, and the bill's."""
    model = "llama tied" if "zero" in flags else "gpt2" if "pp" in flags else "llama"
    layers = "--n-layer", "3" if "zero" in flags else "4" if "interleaved" in flags else "2"
    losses, weights, _ = one_process(corpus, model, torch.float64, *MUON, *layers)
    argv = in_ranks(corpus, model, flags, *MUON, *layers)
    answers = run_ranks(exchanged, ranks, argv, STEPS)
    for ours, pieces, *_, states in answers:
        assert max(differences(ours, pieces, losses, weights)) < 1e-10
        assert set(states) <= {("momentum",)}
    sent, predicted = [], []
    c = train.parse_config(argv)
    layout, program = train.layout_of(c, ranks // (c.tp * c.pp)), scaling.Program(8, 8, 8, muon=True)
    for calls, _, (stage, _, _), _ in (answer[3] for answer in answers):
        sent.append(sum(x.bytes for x in calls if x.phase == "update" and x.collective == "send"))
        formula = scaling.messages(scaling.shape_of(c.model), layout, program, stage)
        predicted.append(formula.get(("world", "send"), (0, 0))[1])
    everyone = [answer[4] for answer in answers]
    assert sent == [8 * n for n in elements_sent(everyone)]
    assert not c.zero or any(0 < piece.lo < piece.hi for pieces in everyone for piece in pieces)     # it cuts a matrix
    assert sum(sent) == sum(predicted) or c.zero and sum(sent) < sum(predicted)
    assert (sum(sent) > 0) == (ranks > c.pp)


def test_one_process_takes_the_textbook_loops_steps(short_documents):
    argv = [*MINI, *PARITY, *MUON, "--data", str(short_documents), "--micro-batch-size", "2"]
    (losses, weights), (ours, our_weights, _) = plain_losses(argv, 4), our_losses(0, 1, argv, 4)
    for a, b in zip(losses, ours, strict=True):
        assert a == pytest.approx(b, abs=1e-10)
    for name, w in weights.items():
        assert (our_weights[name] - w).abs().max() < 1e-10, name


@pytest.mark.parametrize("kind, ranks, flags", [
    ("bf16", 4, "--dp 2 --tp 2 --zero 3"), pytest.param("bf16", 2, "--dp 2 --zero 1", marks=pytest.mark.slow),
    ("fp16", 2, "--dp 2 --zero 2"), pytest.param("fp16", 2, "--tp 2", marks=pytest.mark.slow)])
def test_low_precision_in_any_layout_is_the_same_run(corpus, run_ranks, monkeypatch, kind, ranks, flags):
    """As test_precision.py's, with Muon on the float32 masters."""
    monkeypatch.setattr(test_precision, "SMALL", [*test_precision.SMALL, *MUON])
    monkeypatch.setattr(test_precision, "reordered", test_precision.reordered.__wrapped__)
    test_precision.test_low_precision_in_any_layout_is_the_same_run(corpus, run_ranks, kind, ranks, flags)


def test_a_run_goes_on_bit_for_bit_and_in_another_layout(corpus, tmp_path, run_ranks):
    """From its second step: in the same layout, the same bits; in others, written and read by all, nearly."""
    argv = [*TINY, *MODELS["llama tied"], *MUON, "--n-layer", "2", "--data", str(corpus), "--steps", "4",
            "--checkpoint-interval", "2", "--keep-checkpoints", "9", "--eval-windows", "1", "--max-new-tokens", "1",
            "--global-batch-size", "4", "--out", str(tmp_path / "out")]
    newest = tmp_path / "out" / "checkpoints" / "step-00000004"

    def end(ranks, flags) -> dict:
        assert run_ranks(rerun, ranks, [*argv, *flags.split()]) == [0] * ranks
        reader = data.Reader(newest)
        tensors = {name: reader.read(name) for name in reader.tensors}
        shutil.rmtree(newest)
        return tensors

    first = end(4, "--dp 2 --tp 2 --zero 1")
    for name in first:
        weight, _, state = name.rpartition(".")
        in_block = ".layers." in name and "_proj." in name
        assert state == "weight" or (state == "momentum") == in_block
        assert state == "weight" or in_block or state in ("exp_avg", "exp_avg_sq", "step")
    again = end(4, "--dp 2 --tp 2 --zero 1")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    for ranks, flags in ((4, "--dp 2 --pp 2 --zero 2"), (1, "")):
        other = end(ranks, flags)
        assert other.keys() == first.keys()
        for name in first:
            torch.testing.assert_close(other[name], first[name], rtol=0, atol=1e-4)


# ---- the bill --------------------------------------------------------------------------------------------------------

def test_the_bill_counts_one_moment_the_products_and_the_exchange():
    bills = {}
    for optimizer in ("adamw", "muon"):
        c = train.parse_config(["--config", "small", "--optimizer", optimizer, "--gpu", "h100", "--dry-run"])
        world, layout = train.join(c), scaling.Layout(dp=8, tp=2, micro_batches=4)
        bills[optimizer] = train.make_bill(train.resolve(c, world), world), scaling.messages(
            scaling.shape_of(c.model), layout, scaling.Program(muon=optimizer == "muon"), 0)
    (adamw, calls), (muon, more_calls) = bills["adamw"], bills["muon"]
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]                                           # of a layer
    assert scaling.shape_of(c.model).muon_flops() == [zero.orthogonalize_flops(*shape) for shape in shapes]
    elements = 12 * sum(math.prod(shape) for shape in shapes)
    assert adamw["memory_bytes"]["states"] - muon["memory_bytes"]["states"] == 4 * elements
    seconds = 12 * sum(zero.orthogonalize_flops(*shape) for shape in shapes) / (0.635 * 989e12 / 14.8)
    assert muon["seconds_per_step"]["update"] - adamw["seconds_per_step"]["update"] == pytest.approx(seconds)
    assert more_calls.keys() - calls.keys() == {("world", "send"), ("world", "recv")}
    # eight copies of two halves: one half to the owner, a half to each of the fifteen others
    assert more_calls["world", "send"] == (None, 4 * elements * (1 / 2 + 15 / 2) / 16)


def test_sharing_pays_from_matrices_of_some_hundred_rows_on():
    """zero.Muon's docstring: m where 20 m / (FLOP/s) = 4 bytes / (bytes/s)."""
    h100 = scaling.GPUS["h100"]
    assert round(h100.peak / h100.fp32_slowdown / 1e12) == 67 and h100.network == 50e9
    assert round(4 / h100.network * h100.peak / h100.fp32_slowdown / 20, -1) == 270
    m, n = 300, 10**6                                                             # n far above m: the fewest FLOPs
    assert zero.orthogonalize_flops(m, n) / (m * n) == pytest.approx(20 * m, rel=1e-3)
