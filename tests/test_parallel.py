import contextlib
import copy
import functools
import gc
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections import deque
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import POOL, ROOT, as_program, begin, losses, newest_tensors, part_of, slices
from test_zero import Odd, batch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as launcher_api
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import data
import parallel
import scaling
import train
import zero
from parallel import CommLedger, DataParallel, Op, size

# ---- any layout is the same run --------------------------------------------------------------------------------------

TINY = """--n-layer 4 --n-head 4 --n-embd 32 --n-ff 64 --seq-len 32 --vocab-size 512 --global-batch-size 8 --steps 12
--warmup-steps 2 --lr 0.01 --grad-clip 0.2 --adam-eps 1e-6 --micro-batch-size 1 --eval-windows 7 --max-new-tokens 8
--optimizer adamw --schedule cosine --min-lr-ratio 0.1 --weight-decay 0.1 --device cpu""".split()
STEPS = 3
CALM = "--lr", "0.002"
SHALLOW = "--n-layer", "2"
MODELS = {
    "llama": ["--n-kv-head", "2"],
    "llama tied": ["--tie-embeddings", "--qk-norm"],
    "gpt2": ["--norm", "layernorm", "--position", "learned", "--mlp", "gelu", "--bias", "--tie-embeddings"]}
LAYOUTS = [  # ranks, dp, tp, pp, other flags
    (1, 1, 1, 1, "--micro-batch-size 4"), (2, 2, 1, 1, ""), (4, 4, 1, 1, "--micro-batch-size 2"),
    (2, 1, 2, 1, ""), (2, 1, 2, 1, "--no-sequence-parallel"), (4, 2, 2, 1, ""), (4, 2, 2, 1, "--no-sequence-parallel"),
    (2, 1, 1, 2, "--pp-schedule gpipe"), (2, 1, 1, 2, "--pp-schedule 1f1b"), (2, 1, 1, 2, "--pp-schedule interleaved"),
    (2, 1, 1, 2, "--pp-schedule zb"), (4, 1, 1, 4, "--pp-schedule gpipe"), (4, 1, 1, 4, "--pp-schedule 1f1b"),
    (4, 1, 1, 4, "--pp-schedule zb"), (4, 2, 1, 2, "--pp-schedule gpipe"), (4, 2, 1, 2, "--pp-schedule 1f1b"),
    (4, 2, 1, 2, "--pp-schedule interleaved"), (4, 2, 1, 2, "--pp-schedule zb"),
    (4, 1, 2, 2, "--pp-schedule gpipe"), (4, 1, 2, 2, "--pp-schedule 1f1b"),
    (4, 1, 2, 2, "--pp-schedule interleaved"), (4, 1, 2, 2, "--pp-schedule zb"),
    (4, 1, 2, 2, "--pp-schedule zb --no-sequence-parallel"), (2, 1, 1, 2, "--recompute full"),
    (2, 1, 2, 1, "--recompute full"), (2, 1, 2, 1, "--recompute selective"),
    (2, 2, 1, 1, "--zero 1"), (2, 2, 1, 1, "--zero 2"), (4, 4, 1, 1, "--zero 3"), (1, 1, 1, 1, "--zero 3"),
    (4, 2, 2, 1, "--zero 1"), (4, 2, 2, 1, "--zero 2 --no-sequence-parallel"), (4, 2, 2, 1, "--zero 3"),
    (4, 2, 1, 2, "--zero 1"), (4, 2, 1, 2, "--zero 2 --pp-schedule interleaved"),
    (4, 2, 1, 2, "--zero 2 --pp-schedule zb"), (4, 2, 1, 2, "--zero 3"),
    (4, 2, 1, 2, "--zero 3 --pp-schedule interleaved"), (4, 2, 1, 2, "--zero 3 --pp-schedule zb"),
    (4, 2, 1, 2, "--zero 1 --pp-schedule zb"), (2, 2, 1, 1, "--zero 3 --recompute full"),
    (4, 2, 1, 2, "--zero 2 --pp-schedule gpipe"), (4, 2, 1, 2, "--zero 3 --pp-schedule gpipe")]
SELDOM = [  # not every day: the others have each of their pairs of axes
    (1, 1, 1, 1, "--micro-batch-size 4"), (2, 2, 1, 1, ""), (2, 1, 2, 1, ""), (2, 1, 2, 1, "--no-sequence-parallel"),
    (4, 2, 2, 1, ""), (2, 1, 1, 2, "--pp-schedule gpipe"), (2, 1, 1, 2, "--pp-schedule 1f1b"),
    (2, 1, 1, 2, "--pp-schedule interleaved"), (2, 1, 1, 2, "--pp-schedule zb"), (4, 2, 1, 2, "--pp-schedule 1f1b"),
    (4, 1, 2, 2, "--pp-schedule 1f1b"), (2, 2, 1, 1, "--zero 1"), (2, 2, 1, 1, "--zero 2")]
BY_HAND = [(4, 2, 1, 2, "--zero 2 --pp-schedule 1f1b"), (8, 2, 2, 2, "--zero 3")]


PARITY = {}                                               # (dp, tp, pp, flags) -> differences, for the README's table


def sharded_gradients(syncs, stage, m, low) -> dict:
    """ZeRO's calls in a step: each bucket is scattered once (1) or every micro-batch, parameters are gathered once, or
    (3) twice a micro-batch wherever they are used."""
    def rows(buckets, itemsize):                                                                              # padded
        return len(buckets), sum(-(-sum(p.numel() for p in bucket.params) // n) * n for bucket in buckets) * itemsize

    buckets = [bucket for sync in syncs for bucket in sync.buckets]
    used = [unit for sync in syncs for units in sync.needs for unit in units] if stage == 3 else buckets
    n, scatters, gathers = size(buckets[0].group), 1 if stage == 1 else m, 2 * m if stage == 3 else 1
    return {"all_to_all": tuple(scatters * x for x in rows(buckets, max(4, low))),
            "all_gather": tuple(gathers * x for x in rows(used, low))}


def predicted_calls(c, model, mesh) -> dict:
    """scaling.messages of this rank: {(axis, collective): (calls, bytes)}, by the names that the ledger uses. A group
    of all ranks goes by its axis' name; ZeRO's shards are padded."""
    m, size_of = c.grad_accum_steps(mesh.dp), 2 if c.precision == "bf16" else model.hidden_dtype.itemsize
    wide = model.hidden_dtype.itemsize
    program = scaling.Program(item=size_of, residual=wide, gradient=wide)
    formula = scaling.messages(scaling.shape_of(c.model), train.layout_of(c, mesh.dp), program, mesh.pp_rank)
    if c.zero and mesh.dp > 1:
        formula |= {("dp", name): x for name, x in sharded_gradients(model.sync, c.zero, m, size_of).items()}
        del formula["dp", "reduce_scatter"]                                   # which on gloo is an exchange of slices
    for axis in ("dp", "tp"):
        if getattr(mesh, axis) == mesh.dp * mesh.tp * mesh.pp > 1:
            formula[axis, "all_reduce"] = None, formula[axis, "all_reduce"][1] + formula.pop(("world", "all_reduce"))[1]
    return formula


def in_ranks(corpus, model, flags: str, *more) -> list[str]:
    """Arguments of a run of four micro-batches a rank; of eight on four stages; of two where there is no pipeline."""
    c = train.parse_config([*TINY, *flags.split()])
    micro = 1 if c.pp == 4 else max(1, (2 if c.pp > 1 else 4) // max(1, c.dp))
    return [*TINY, *MODELS[model], "--data", str(corpus), "--micro-batch-size", str(micro), *flags.split(), *more]


def trained(rank, n, argv, steps, dtype: torch.dtype | None = torch.float64):
    """`steps` steps as train.py takes them -> [(loss, norm), ...], this rank's pieces of the weights, an evaluation,
    and of the last step the calls to other ranks, what they should be, and the executed operations."""
    c, world, model, optimizer, loader, val = begin(argv, dtype=dtype)
    mesh, ledger, losses, ops = world.mesh, CommLedger(world.mesh.axes), [], []
    for step in range(steps):
        if step == steps - 1:
            model.on_op = lambda op, *clocks: ops.append(op)
            ledger.__enter__()
        losses.append(train.train_step(model, optimizer, loader, step, c, world,
                                       on_phase=lambda step, phase: setattr(ledger, "phase", phase))[:2])
    ledger.__exit__(None, None, None)
    parallel.check_replicas(model.parameters(), world.host)
    formula = predicted_calls(c, model, mesh)
    pieces = [(p.full_name, p.box, getattr(p, "flat", None), p.detach()) for p in model.parameters()]
    return losses, pieces, train.evaluate(model, val, c, world), (ledger.calls, formula, mesh.place(rank), ops)


@functools.cache
def one_process(corpus, model, dtype=torch.float64, *flags):
    argv = [*TINY, *MODELS[model], "--data", str(corpus), *flags]
    losses, pieces, evaluation, _ = trained(0, 1, argv, STEPS, dtype)
    c = train.parse_config(argv)
    rate = c.lr * (c.adamw_lr_ratio if c.optimizer == "muon" else 1)
    assert losses[0][1] > 0.3 and losses[-1][0] < losses[0][0] - 5 * rate                                # clips, learns
    return losses, {name: p for name, *_, p in pieces}, evaluation


def differences(ours, pieces, losses, weights):
    """Largest difference of a loss, of a norm, of a weight."""
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(ours, losses, strict=True)) for i in (0, 1))
    worst = 0.0
    for name, box, flat, p in pieces:
        if p.numel():
            worst = max(worst, (p - part_of(weights[name], box, flat)).abs().max().item())
    return loss, norm, worst


def check_sequences(sequences, axis: str):
    """The calls of all members of one group, each in its order, must fit: the same collectives, and to every send a
    receive, in order, for each pair. sequences[r]: of the group's rank r."""
    lines = [[x for x in calls if x.axis == axis] for calls in sequences]
    collectives = [[(x.collective, x.shape, x.dtype) for x in line if x.peer is None] for line in lines]
    assert all(line == collectives[0] for line in collectives), f"{axis}: the ranks issue different calls"
    for a, b in itertools.permutations(range(len(lines)), 2):
        sent, received = ([(x.shape, x.dtype) for x in lines[r] if (x.collective, x.peer) == (kind, other)]
                          for r, kind, other in ((a, "send", b), (b, "recv", a)))
        assert sent == received, f"{axis}: rank {a} sends {b} something else than it receives"


def check_calls(books):
    """The ledger of each rank is the formula, and the ranks' books agree with one another."""
    means = []
    for calls, formula, _, _ in books:
        counted = {}
        for call in calls:
            n, payload = counted.get((call.axis, call.collective), (0, 0))
            counted[call.axis, call.collective] = n + 1, payload + call.bytes
        assert counted.keys() == formula.keys()
        for key, (n, payload) in formula.items():
            assert n is None or counted[key][0] == n, (key, counted[key])
            if ("dp", "all_to_all") in counted:      # ZeRO's shards of what is partial over tp differ: a mean is known
                means.append((key, counted[key][1], payload))
            else:
                assert counted[key][1] == payload, (key, counted[key])
    for key in {key for key, *_ in means}:
        ours, theirs = (sum(x[i] for x in means if x[0] == key) for i in (1, 2))
        assert ours == pytest.approx(theirs, rel=1e-12), key
    far = max(pp for *_, (pp, _, _), _ in books)
    for axis, varies in (("pp", [0]), ("dp", [1]), ("tp", [2]), ("ends", [0]), ("world", [0, 1, 2])):
        lines = {}                                                 # of each group, in the order of its ranks
        for calls, _, place, _ in books:                           # in the world's, which is that of any group
            if axis != "ends" or place[0] in (0, far):
                lines.setdefault(tuple(x for i, x in enumerate(place) if i not in varies), []).append(calls)
        for line in lines.values():
            check_sequences(line, axis)


def every_day(pp, flags) -> str:
    """The model that runs under a layout when there is no time for all three: grouped heads, tied weights, biases."""
    return "llama tied" if "zero" in flags else "gpt2" if pp > 1 else "llama"


@pytest.mark.parametrize("ranks, dp, tp, pp, flags, model", [
    pytest.param(*layout, model, marks=[pytest.mark.slow] * (layout in SELDOM + BY_HAND
                                                             or model != every_day(*layout[3:])))
    for model, layout in itertools.product(MODELS, LAYOUTS + BY_HAND)])
def test_any_layout_is_the_same_run(corpus, run_ranks, ranks, dp, tp, pp, flags, model):
    layers = SHALLOW if pp == 1 else ()                                          # four stages have a layer each
    losses, weights, evaluation = one_process(corpus, model, torch.float64, *layers)
    argv = in_ranks(corpus, model, f"--dp {dp} --tp {tp} --pp {pp} {flags}", *layers)
    answers = run_ranks(trained, ranks, argv, STEPS)
    for ours, pieces, our_evaluation, _ in answers:
        PARITY.setdefault((dp, tp, pp, flags), []).append(differences(ours, pieces, losses, weights))
        assert max(PARITY[dp, tp, pp, flags][-1]) < 1e-10
        assert our_evaluation == pytest.approx(evaluation, rel=1e-10)
    assert {name for _, pieces, _, _ in answers for name, *_ in pieces} == set(weights)
    check_calls([books for *_, books in answers])


def test_eight_ranks(corpus, run_ranks):
    losses, weights, _ = one_process(corpus, "llama", torch.float64, *SHALLOW)
    answers = run_ranks(trained, 8, in_ranks(corpus, "llama", "--dp 2 --tp 2 --pp 2", *SHALLOW), STEPS)
    PARITY[2, 2, 2, ""] = [differences(ours, pieces, losses, weights) for ours, pieces, _, _ in answers]
    assert max(map(max, PARITY[2, 2, 2, ""])) < 1e-10
    check_calls([books for *_, books in answers])


def test_every_pair_of_axes_runs_every_day():
    """Whatever two values of two axes some layout combines, one of the daily layouts combines them."""
    def pairs(ranks, dp, tp, pp, flags):
        c = train.parse_config(f"--dp {dp} --tp {tp} --pp {pp} {flags}".split())
        return set(itertools.combinations({
            "dp": dp, "pp": pp, "tp": (tp, tp > 1 and c.sequence_parallel), "schedule": pp > 1 and c.pp_schedule,
            "gradients": (dp > 1, c.zero), "recompute": c.recompute}.items(), 2))

    daily = set().union(*(pairs(*x) for x in LAYOUTS if x not in SELDOM), pairs(8, 2, 2, 2, ""))
    assert all(pairs(*layout) <= daily for layout in SELDOM) and len(daily) > 130


def test_the_table_of_layouts_is_written_and_in_the_readme(run_ranks):
    """out/parity.md: the largest difference to one process, over three models and all ranks. (It asks for ranks to run
    where the layouts ran.)"""
    lines = ["| dp x tp x pp | flags | loss | gradient norm | weights |", "|---|---|---|---|---|"]
    for (dp, tp, pp, flags), found in PARITY.items():
        off = " | ".join(f"{max(x):.0e}" for x in zip(*found, strict=True))
        lines.append(f"| {dp} x {tp} x {pp} | {flags} | {off} |")
    (ROOT / "out").mkdir(exist_ok=True)
    (ROOT / "out" / "parity.md").write_text("\n".join(lines) + "\n")
    results = (ROOT / "tests" / "bench" / "RESULTS.md").read_text()
    for line in lines:
        assert line.rsplit("|", 4)[0] in results                                    # the layouts; figures vary a little


def test_a_step_is_plain_autograd(short_documents, run_ranks):
    """Of six windows with different numbers of targets, also on two ranks together: a mean of means is not the mean."""
    argv = [*TINY, *MODELS["llama"], *SHALLOW, "--data", str(short_documents), "--global-batch-size", "6"]
    c = train.parse_config(argv)
    gpt = train.make_stage(c, torch.device("cpu"), dtype=torch.float64)
    batch = next(data.Loader(c.data, micro_batch_size=6, seq_len=c.seq_len, seed=c.seed))
    counts = (batch["targets"] >= 0).sum(1)
    assert counts[0::2].sum() != counts[1::2].sum() and counts[:3].sum() != counts[3:].sum()
    loss = gpt(**train.to_device(batch, c, torch.device("cpu")))[0] / counts.sum()
    norm = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(gpt.parameters()))]).norm()
    for ranks, flags in ((1, []), (2, ["--dp", "2"]), (2, ["--tp", "2"]), (2, ["--pp", "2"])):
        for ours, *_ in run_ranks(trained, ranks, [*argv, *flags], 1):
            assert ours[0] == pytest.approx((loss.item(), norm.item()), rel=1e-13)


@pytest.mark.parametrize("flags", [
    "--pp 4 --pp-schedule zb", "--pp 2 --pp-schedule interleaved --pp-chunks 3",
    pytest.param("--pp 2", marks=pytest.mark.slow), pytest.param("--pp 2 --tp 2", marks=pytest.mark.slow)])
def test_uneven_layers(corpus, run_ranks, flags):
    layers = "--n-layer", "5" if "--pp 4" in flags else "7"
    losses, weights, _ = one_process(corpus, "llama tied", torch.float64, *layers)
    argv = in_ranks(corpus, "llama tied", flags, *layers)
    for ours, pieces, _, _ in run_ranks(trained, 4 if "4" in flags or "tp" in flags else 2, argv, STEPS):
        assert max(differences(ours, pieces, losses, weights)) < 1e-10


@pytest.mark.parametrize("ranks, flags", [
    (2, "--dp 2"), (4, "--pp 2 --tp 2"), pytest.param(2, "--tp 2 --no-sequence-parallel", marks=pytest.mark.slow),
    pytest.param(2, "--pp 2 --pp-schedule zb", marks=pytest.mark.slow)])
def test_float32_is_as_near_as_one_process(corpus, run_ranks, ranks, flags):
    """One process in float32 is off the float64 run by its rounding, which depends on how it splits its sums: the worst
    of four splits into micro-batches is the measure, and a layout may be off by twice as much. (At a learning rate that
    does not make small differences large: then the measure would allow anything.)"""
    flags_of_all = *CALM, *SHALLOW
    losses, weights, _ = one_process(corpus, "llama", torch.float64, *flags_of_all)
    splits = [one_process(corpus, "llama", torch.float32, *flags_of_all, "--micro-batch-size", str(k))
              for k in (1, 2, 4, 8)]
    off = [differences(x, [(name, tuple((0, k, k) for k in w.shape), None, w) for name, w in ws.items()], losses,
                       weights) for x, ws, _ in splits]
    bounds = [2 * max(x) for x in zip(*off, strict=True)]
    argv = in_ranks(corpus, "llama", flags, *flags_of_all)
    for ours, pieces, _, _ in run_ranks(trained, ranks, argv, STEPS, torch.float32):
        for error, bound in zip(differences(ours, pieces, losses, weights), bounds, strict=True):
            assert error < bound < 2e-6                                      # 16 eps of losses, norms, weights up to 1


@pytest.mark.parametrize("flags", [
    "--tp 2 --pp 2 --pp-schedule zb", "--dp 4 --zero 3",
    pytest.param("--tp 2 --pp 2 --no-sequence-parallel", marks=pytest.mark.slow),
    pytest.param("--dp 2 --tp 2", marks=pytest.mark.slow), pytest.param("--dp 4 --zero 1", marks=pytest.mark.slow)])
def test_bf16_is_near_float32_and_its_calls_are_the_formula(corpus, run_ranks, flags):
    """As for one process: half an ulp of bfloat16, relative."""
    losses, _, _ = one_process(corpus, "llama", torch.float32, *SHALLOW)
    answers = run_ranks(trained, 4, in_ranks(corpus, "llama", flags, *SHALLOW, "--precision", "bf16"), STEPS, None)
    for ours, *_ in answers:
        for (loss, _), (plain, _) in zip(ours, losses, strict=True):
            assert loss != plain and abs(loss - plain) < 2**-8 * plain
    check_calls([books for *_, books in answers])


def rerun(rank, n, argv):
    c = train.parse_config(argv)
    world = train.join(c)
    return train.train(train.resolve(c, world), world)


def test_a_run_goes_on_in_another_layout(corpus, tmp_path, run_ranks):
    """Checkpoints are pieces by name: written by tp 2 x pp 2, read by four ranks that share all parameters, read by
    others, and by one process."""
    argv = [*TINY, *MODELS["llama tied"], "--data", str(corpus), "--steps", "4", "--checkpoint-interval", "2",
            "--keep-checkpoints", "9", "--eval-windows", "1", "--max-new-tokens", "1", "--global-batch-size", "4"]
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert train.main([*argv, "--out", str(plain)]) == 0
    newest = out / "checkpoints" / "step-00000004"
    for flags in ("--tp 2 --pp 2 --profile", "--dp 4 --zero 3", "--dp 2 --zero 1 --pp 2 --pp-schedule interleaved"):
        if newest.exists():
            shutil.rmtree(newest)
        assert run_ranks(rerun, 4, [*argv, "--out", str(out), *flags.split()]) == [0] * 4
        assert losses(out) == pytest.approx(losses(plain), abs=2e-5)
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {x["tid"] for x in events} == {0, 1, 2, 3} and len(events) == 4 * 2 * 4
    ours, theirs = newest_tensors(out), newest_tensors(plain)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)


def test_the_third_step_is_profiled(corpus, tmp_path):
    for steps in (2, 3):
        argv = [*TINY, "--data", str(corpus), "--out", str(tmp_path / str(steps)), "--steps", str(steps), "--profile"]
        assert train.main(argv) == 0 and (tmp_path / str(steps) / "trace.json").exists() == (steps == 3)


def test_buckets_of_zero_are_in_the_order_of_use(corpus):
    c = train.parse_config([*TINY, "--data", str(corpus), "--zero", "1"])
    model = train.Model(c, train.join(c))
    optimizer = train.make_optimizer(model, c)
    assert [p for bucket in optimizer.buckets for p in bucket.params] == list(model.parameters())[::-1]


def drifting(rank, n, argv):
    """A run in which one rank's weights go astray."""
    original = train.train_step

    def step(model, *rest, **options):
        answer = original(model, *rest, **options)
        next(model.parameters()).data += rank * 1e-3
        return answer

    train.train_step = step
    try:
        rerun(rank, n, argv)
    except RuntimeError as error:
        return str(error)
    finally:
        train.train_step = original


def test_a_run_whose_replicas_differ_does_not_end_well(corpus, tmp_path, run_ranks):
    argv = [*TINY, "--data", str(corpus), "--out", str(tmp_path / "out"), "--steps", "2", "--dp", "2"]
    assert set(run_ranks(drifting, 2, argv)) == {
        "model.embed_tokens.weight: replicas must be equal, those of ranks 0 and 1 are not"}


def test_dry_run_counts_what_a_layout_costs(monkeypatch, capsys):
    """Memory and messages as ZeRO's own formulas, buffers named; the bubble."""
    def bill(*flags):
        assert train.main([*TINY, "--dry-run", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(train, "time_tokens", lambda c, device: 1e9)
    psi, m = bill()["parameters"], 2                                                         # micro-batches on 4 ranks
    for stage in range(4):
        b, dp = bill("--dp", "4", "--zero", str(stage)), 4
        states = zero.memory_per_rank(psi, stage, dp, param_bytes=4, grad_bytes=4, state_bytes=8)
        unit = 4 * max(512 * 32, 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32)                             # embedding, or a block
        bucket = unit if stage == 3 else 4 * psi
        buffers = (4 * psi, bucket * (1 + 1 / dp), bucket * (3 + 1 / dp), bucket * (3 + 1 / dp) + 2 * unit)[stage]
        memory = {"parameters": states["parameters"], "gradients": states["gradients"], "states": states["states"],
                  "buffers": buffers}
        assert {name: b["memory_bytes"][name] for name in memory} == {name: round(x) for name, x in memory.items()}
        sent = 4 * sum(zero.comm_volume(psi, stage, dp, m).values())
        assert b["bytes_sent"]["dp"] == pytest.approx(sent, rel=0.01)
    b = bill("--pp", "4", "--tp", "2")
    assert b["bubble"] == pytest.approx(3 / (8 + 3)) and b["layers_per_rank"] == [1] * 4
    hidden = 4 * 32 * 32 // 2                                                        # B T C / tp with sequence parallel
    assert b["bytes_sent"]["pp"] == 8 * hidden * 2                                           # by a rank in the middle


# ---- on GPUs, as far as a CPU can tell -------------------------------------------------------------------------------

class HostWaits(TorchFunctionMode):
    """Inside: the lines of this tree at which a GPU's host would wait for its device, or copy to it and wait."""

    waits = {torch.tensor, torch.as_tensor, torch.equal, torch.nonzero, *(getattr(torch.Tensor, name) for name in (
        "item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"))}

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.waits:
            frames = [x for x in traceback.extract_stack() if x.name != "__torch_function__"]
            frame = next((x for x in reversed(frames) if Path(x.filename).parent == ROOT), frames[-1])
            if '"cpu"' not in frame.line:                                                 # what a CPU alone does
                self.lines.append(f"{Path(frame.filename).name}: {frame.line}")
        return function(*args, **(kwargs or {}))


def host_waits(rank, n, corpus, layouts):
    found = []
    for flags in layouts:
        c, world, model, optimizer, loader, _ = begin([*TINY, *MODELS["llama"], *SHALLOW, "--global-batch-size", "4",
                                                       "--data", str(corpus), *flags.split()])
        batches = itertools.cycle([next(loader) for _ in range(c.grad_accum_steps(world.mesh.dp))])
        for step in range(2):
            with HostWaits() as host:
                train.train_step(model, optimizer, batches, step, c, world)
        found.append(host.lines)
    return found


def test_a_host_waits_for_its_device_once_a_step(corpus, run_ranks):
    """For the loss and the norm. (Of the pipelines, a CPU waits for messages as a GPU's stream does.)"""
    layouts = ["--tp 2", "--pp 2 --pp-schedule zb", "--dp 2", "--dp 2 --zero 2", "--dp 2 --zero 3"]
    for answers in run_ranks(host_waits, 2, corpus, layouts):
        for flags, lines in zip(layouts, answers, strict=True):
            assert lines == ["train.py: sumsq, stop, loss, *statistics = world.sum(total).tolist()"], (flags, lines)


def compiled(rank, n, layouts, backend):
    """-> for each layout: losses and norms of two steps, plain and compiled; how many graphs."""
    answers, compile_ = [], torch.compile
    for flags in layouts:
        found = []
        for on in ("off", "on"):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend(backend)
            torch.compile = functools.partial(compile_, backend=counter)
            c = train.parse_config([*TINY, *MODELS["llama"], "--n-layer", "2", *flags.split(), "--compile", on])
            world = train.join(c)
            model = train.Model(c, world, dtype=None if "bf16" in flags else torch.float64)
            torch.compile, optimizer = compile_, train.make_optimizer(model, c)
            tokens = torch.randint(512, (8, 1, 33), generator=torch.Generator().manual_seed(0))
            batches = [{"tokens": x[:, :-1], "targets": x[:, 1:]} for x in tokens][:c.grad_accum_steps(world.mesh.dp)]
            found.append([train.train_step(model, optimizer, iter(batches), step, c, world)[:2] for step in range(2)])
        answers.append((*found, counter.frame_count))
    return answers


@pytest.mark.filterwarnings("default")               # torch.compile warns itself, inside, of what users do not see
@pytest.mark.parametrize("backend, layouts", [
    ("eager", ["--tp 2"]),
    pytest.param("aot_eager", ["--tp 2", "--dp 2 --zero 3", "--tp 2 --no-sequence-parallel", "--tp 2 --recompute full",
                               "--tp 2 --precision bf16", "--dp 2 --zero 3 --precision bf16"], marks=pytest.mark.slow),
    pytest.param("inductor", ["--tp 2"], marks=pytest.mark.slow),
    pytest.param("inductor", ["--dp 2 --zero 3"], marks=pytest.mark.slow)])
def test_compiled_and_plain_agree_in_every_layout(run_ranks, backend, layouts):
    """tp breaks the graphs at its linears and collectives; what ZeRO 3 gathers stands outside of the compiled part. All
    blocks share the same few graphs."""
    for answers in run_ranks(compiled, 2, layouts, backend):
        for flags, (plain, ours, graphs) in zip(layouts, answers, strict=True):
            near = dict(rel=2**-7) if "bf16" in flags else dict(abs=1e-12)
            assert [x for pair in ours for x in pair] == pytest.approx([x for pair in plain for x in pair], **near)
            assert 0 < graphs <= (2 if "zero" in flags else 8), (flags, graphs)


# ---- schedules, on paper ---------------------------------------------------------------------------------------------

def all_schedules(stages=(1, 2, 3, 4, 5, 8)):
    for p, m in itertools.chain(*(itertools.product([p], {1, 3, p, p + 1, 2 * p}) for p in stages)):
        yield p, m, 1, parallel.gpipe(p, m)
        yield p, m, 1, parallel.one_f_one_b(p, m)
        yield p, m, 1, parallel.zero_bubble(p, m)
        for v in (1, 2, 3) if p > 1 else (1,):
            yield p, m, v, parallel.forward_only(p, m, v)
            if m % p == 0:
                yield p, m, v, parallel.interleaved(p, m, v)


def test_every_schedule_is_complete_in_order_and_free_of_deadlock():
    for p, m, v, schedule in all_schedules():
        timeline = parallel.simulate(schedule)                                  # raises for what is not
        assert len(schedule) == p and len(schedule[0]) % (m * v) == 0
        timetable = parallel.with_messages(schedule)
        needed, results = ([steps[i] for line in timetable for steps in line if steps[i] is not None] for i in (1, 2))
        assert len(needed) == (p * v - 1) * m * len({op.kind for op in schedule[0]} & {"F", "B"})
        # what is sent is what is needed, each once
        assert len(set(needed)) == len(needed) and set(needed) == set(results)
        # a rank receives what the others send it, and nothing of a rank's is said to have arrived twice
        for r in range(p):
            channels = parallel.Channels(timetable, [SimpleNamespace(rank=lambda r=r: r)], None, 1)
            coming = [x for source in channels.coming.values() for x in source]
            assert sorted(coming) == sorted(x for _, x, _ in timetable[r] if x is not None)
            arrived = [x for received in channels.receipts.values() for x in received if x is not None]
            assert len(set(arrived)) == len(arrived)
        assert timeline.duration >= max(len(ops) for ops in schedule)


def launched(schedule, r, group_of, profile):
    """What rank r's host does in run_schedule, in order: ("message", group, message), ("run", None) and ("run", a
    message that the stream waits for), which its device is given; ("wait", whether for all streams)."""
    steps, p = [], len(schedule)
    last = p * (1 + max(op.chunk for op in schedule[0])) - 1

    def message(what, x, group, group_peer):
        new = SimpleNamespace(sends=what is dist.isend, peer=group_peer, done=False)
        new.wait = lambda *_: steps.append(("run", new))
        steps.append(("message", group.name, new))
        return new

    def chunk(number, hidden=None):
        steps.append(("run", None))
        x = torch.empty(0, requires_grad=True)
        return (x, x) if number * p + r == last else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "P2POp", message)
        patch.setattr(dist, "batch_isend_irecv", list)
        patch.setattr(torch.autograd, "backward", lambda *_: steps.append(("run", None)))
        stream = SimpleNamespace(synchronize=lambda: steps.append(("wait", False)))
        for name, instead in (("is_available", lambda: True), ("current_stream", lambda: stream),
                              ("synchronize", lambda: steps.append(("wait", True)))):
            patch.setattr(torch.accelerator, name, instead)
        chunks = [functools.partial(chunk, number) for number in range((last + 1) // p)]
        parallel.run_schedule(schedule, chunks, [{}] * (1 + max(op.micro_batch for op in schedule[0])),
                              [SimpleNamespace(rank=lambda: r, name=group_of(up)) for up in (False, True)],
                              hidden_like=lambda b: torch.empty(0), on_op=(lambda *_: None) if profile else None)
    return steps


class Device:
    """A rank of a model of NCCL's messages, which are rendezvous: those of a group go in the order of their launch,
    each when it is first in line at both ends and what was launched before it has run. The stream runs what it is given
    in order. The host launches without waiting, but where a step says so: until its stream (all: or all messages too)
    is through."""

    def __init__(self, steps, wait_for_all: bool):
        self.steps, self.all, self.stream, self.ran, self.lines = deque(steps), wait_for_all, [], 0, {}

    def host_and_stream(self) -> bool:
        before = len(self.steps), self.ran
        while self.ran < len(self.stream) and (self.stream[self.ran] is None or self.stream[self.ran].done):
            self.ran += 1
        while self.steps:
            kind, x, *message = self.steps[0]
            if kind == "wait" and (self.ran < len(self.stream) or (x or self.all) and any(self.lines.values())):
                break
            self.steps.popleft()
            if kind == "run":
                self.stream.append(x)
            if message:
                message[0].after = len(self.stream)
                self.lines.setdefault(x, deque()).append(message[0])
        return before != (len(self.steps), self.ran)

    def first(self, group):
        """The group's first message, if it may go."""
        line = self.lines.get(group)
        return line[0] if line and line[0].after <= self.ran else None


def drains(schedule, group_of, profile=False, wait_for_all=False) -> bool:
    """Whether all ranks get to their end."""
    ranks = [Device(launched(schedule, r, group_of, profile), wait_for_all) for r in range(len(schedule))]
    moved = True
    while moved:
        moved = any([x.host_and_stream() for x in ranks])
        for r, rank in enumerate(ranks):
            for group in rank.lines:
                while (message := rank.first(group)) and message.sends:
                    other = ranks[message.peer].first(group)
                    if not other or other.sends or other.peer != r:
                        break
                    rank.lines[group].popleft().done = ranks[message.peer].lines[group].popleft().done = moved = True
    return not any(x.steps or x.ran < len(x.stream) or any(x.lines.values()) for x in ranks)


def test_a_group_for_each_direction_never_deadlocks_and_one_for_both_would():
    for p, m, v, schedule in all_schedules():
        assert drains(schedule, lambda up: up), (p, m, v)
        if schedule in (parallel.one_f_one_b(p, m), parallel.zero_bubble(p, m)):
            assert drains(schedule, lambda up: "both") == (p == 1)


def test_a_profiled_step_does_not_hang_and_would_if_it_waited_for_all_streams():
    for p, m, v, schedule in all_schedules((2, 3, 5)):
        assert drains(schedule, lambda up: up, profile=True), (p, m, v)
        if schedule in (parallel.one_f_one_b(p, m), parallel.zero_bubble(p, m)):
            assert not drains(schedule, lambda up: up, profile=True, wait_for_all=True)


def test_receives_are_posted_before_the_operation_before():
    """All but a rank's first, and those of a group in which that operation's result leaves: 1f1b's forwards ahead."""
    for _, _, _, schedule in all_schedules(range(2, 5)):
        for r in range(len(schedule)):
            posted, sent, waits, late = {}, {}, 0, 0
            for kind, x, *message in launched(schedule, r, lambda up: up, True):
                waits, number = waits + (kind == "wait"), waits // 2                          # of the operation
                if message:
                    posted[id(message[0])] = number, sent.get(x)
                    sent |= {x: number} if message[0].sends else {}
                elif kind == "run" and x is not None and not x.sends:
                    before, own = posted[id(x)]
                    assert before == max(0, number - 1) or own == number - 1
                    late += before == number > 0
            assert not late or schedule != parallel.one_f_one_b(2, len(schedule[0]) // 2)


@pytest.mark.parametrize("schedule, message", [
    ([[Op("F", 0)], [Op("F", 0), Op("B", 0)]], "rank 1 differs in B0"),
    ([[Op("F", 0), Op("F", 0), Op("B", 0)]] * 2, "one twice"),
    ([[Op("B", 0), Op("F", 0)]], "rank 0 at B0"),
    ([[Op("F", 0), Op("B", 0), Op("F", 1), Op("B", 1)], [Op("F", 1), Op("B", 1), Op("F", 0), Op("B", 0)]],
     "rank 0 at B0, rank 1 at F1"),
    ([[Op("F", 0), Op("W", 0), Op("B", 0)]], "rank 0 at W0")])
def test_a_wrong_schedule_is_named(schedule, message):
    with pytest.raises(ValueError, match=message):
        parallel.simulate(schedule)
    with pytest.raises(ValueError, match="multiple of pp = 3 micro-batches per step, got 4"):
        parallel.interleaved(3, 4)


def test_bubbles_and_stored_micro_batches_are_the_formulas():
    """Narayanan 2021, section 2.2; Korthikanti 2022, section 4.2.3; Qi 2023, table 2."""
    for p, m, (f, b, w) in itertools.product((2, 4, 8), (8, 16), ((1, 1, 1), (3, 2, 1), (5, 4, 4))):
        ideal = m * (f + b + w)
        for schedule, duration, stored in (
                (parallel.gpipe(p, m), ideal + (p - 1) * (f + b + w), m),
                (parallel.one_f_one_b(p, m), ideal + (p - 1) * (f + b + w), p),
                (parallel.zero_bubble(p, m), ideal + (p - 1) * (f + b - w), p)):
            timeline = parallel.simulate(schedule, f, b, w)
            assert timeline.duration == duration and max(timeline.stored) == stored
            if schedule[0][-1].kind == "W":                                                            # zero bubble
                assert timeline.stored == [p] * p
            assert timeline.bubble == pytest.approx(1 - ideal / duration)
        for v in (2, 3):
            timeline = parallel.simulate(parallel.interleaved(p, m, v), f / v, b / v, w / v)
            assert timeline.duration == pytest.approx(ideal + (p - 1) * (f + b + w) / v)
            assert max(timeline.stored) / v == pytest.approx(min(m, p * (1 + (p - 1) / (p * v))))


@pytest.mark.parametrize("p, m, f, b, w, p2p, plain, zero", [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585), (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045), (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397), (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082, 0.1088),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421), (32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0594)])
def test_published_bubbles(p, m, f, b, w, p2p, plain, zero):
    """Qi et al. 2023 (arXiv:2401.10241), tables 4, 5 and 9: profiled times in ms and bubble rates of 1F1B and ZB-H1."""
    for schedule, published in ((parallel.one_f_one_b(p, m), plain), (parallel.zero_bubble(p, m), zero)):
        assert round(parallel.simulate(schedule, f, b, w, p2p).bubble, 4) == published


def test_the_trace_and_the_drawing_hold_every_operation():
    timeline = parallel.simulate(parallel.zero_bubble(3, 5))
    events = json.loads(json.dumps(parallel.chrome_trace(timeline)))["traceEvents"]
    assert len(events) == 3 * 5 * 3 and {x["ph"] for x in events} == {"X"}
    assert max(x["ts"] + x["dur"] for x in events) == pytest.approx(timeline.duration * 1e6)
    for line, ops in zip(parallel.draw(timeline, 210).splitlines(), timeline.events, strict=True):
        assert sum(map(line[8:].lower().count, "fbw")) == pytest.approx(210 * len(ops) / timeline.duration, abs=9)


# ---- each part alone, on modules that are not ours, beside torch's ---------------------------------------------------

def train_odd(rank, n, how, steps=4):
    """Two micro-batches a step; on one rank alone a layer is used. -> weights, calls made in backward."""
    module = Odd(seed=rank)                                        # different, and its buffer: the broadcast is tested
    module.shift += rank
    group = dist.group.WORLD if n > 1 else None
    if how == "ours":
        model = DataParallel(module, group, bucket_mb=0.0006)
    elif how == "torch":
        model = nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
    else:                                                                               # the plain version
        model = copy.deepcopy(module)
        for x in (*model.parameters(), model.shift):
            dist.broadcast(x.detach(), 0)
    optimizer = torch.optim.AdamW(module.parameters() if how != "plain" else model.parameters(), lr=0.05)
    ledger = CommLedger({"dp": group})
    for step in range(steps):
        some = rank == 0
        with ledger if how == "ours" else torch.enable_grad():
            with model.no_sync() if how != "plain" else torch.enable_grad():
                model(*batch(step, rank)[:2], some).backward()
            loss = model(*batch(step, rank + 2)[:2], some)
            ledger.phase = "backward"
            loss.backward()
            ledger.phase = "finish"
            if how == "ours":
                model.finish_gradient_synchronization()
            if how == "plain":
                parallel.all_reduce_gradients(model, group)
            for p in parallel.trainable(model) if how != "torch" else ():                       # DDP takes means itself
                if p.grad is not None:
                    p.grad /= n
        optimizer.step()
        optimizer.zero_grad()
    return dict((model if how == "plain" else module).named_parameters()), ledger.calls


def test_data_parallel_is_torchs_and_the_plain_one(run_ranks):
    answers = {how: run_ranks(train_odd, 2, how) for how in ("ours", "torch", "plain")}
    for how in ("torch", "plain"):
        for name, p in answers["ours"][0][0].items():
            assert torch.equal(p, answers["ours"][1][0][name])                                      # replicas
            if not (how == "torch" and name.startswith("unused")):        # torch's stays None, ours is zero and decays
                torch.testing.assert_close(p, answers[how][0][0][name], rtol=0, atol=1e-12, msg=name)
    calls = answers["ours"][0][1]
    module = Odd(0)
    assert sum(x.bytes for x in calls if x.collective == "all_reduce") == 4 * sum(
        p.nbytes for p in module.parameters() if p.requires_grad)
    check_sequences([x[1] for x in answers["ours"]], "dp")


def buckets_leave(rank, n):
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    model = DataParallel(layers, dist.group.WORLD, bucket_mb=16 * 17 * 4e-6)
    with CommLedger({"dp": dist.group.WORLD}) as ledger:
        loss = model(torch.ones(2, 16)).sum()
        ledger.phase = "backward"
        loss.backward()
        ledger.phase = "finish"
        model.finish_gradient_synchronization()
    return [(x.phase, x.bytes) for x in ledger.calls]


def test_buckets_leave_while_backward_goes_on(run_ranks):
    assert run_ranks(buckets_leave, 2) == [[("backward", 16 * 17 * 4)] * 6] * 2


def apart(rank, n):
    """Rank 1 begins its backward when rank 0 is through with its own."""
    layers, word = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), torch.zeros(1)
    model = DataParallel(layers, dist.new_group(timeout=timedelta(seconds=5)), bucket_mb=16 * 17 * 4e-6)
    loss = model(torch.ones(2, 16)).sum()
    if rank == 1:
        dist.recv(word, 0)
    loss.backward()
    if rank == 0:
        dist.send(word, 1)
    model.finish_gradient_synchronization()


def test_backward_waits_for_no_other_rank(run_ranks):
    run_ranks(apart, 2)


def twice(rank, n, second):
    model = DataParallel(nn.Linear(3, 3), dist.group.WORLD)
    for synchronize in (True, second):                                       # the last one, and one more, in a no_sync
        with contextlib.nullcontext() if synchronize else model.no_sync():
            model(torch.ones(2, 3)).sum().backward()


@pytest.mark.parametrize("second", (True, False))
def test_a_second_backward_without_synchronization_is_refused(run_ranks, second):
    with pytest.raises(AssertionError, match="got a second gradient after its bucket was sent"):
        run_ranks(twice, 2, second)
    with pytest.raises(ValueError, match="bucket_mb must"):
        DataParallel(nn.Linear(2, 2), None, bucket_mb=0)


def sparse(rank, n):
    model = DataParallel(nn.Embedding(4, 2, sparse=True), dist.group.WORLD)
    model(torch.tensor([1])).sum().backward()


def test_a_sparse_gradient_is_refused(run_ranks):
    with pytest.raises(AssertionError, match="RuntimeError: a parameter must not have a sparse gradient, it has"):
        run_ranks(sparse, 2)


def given_up(rank, n):
    """A batch that is given up, which on rank 1 did not reach all layers -> gradients of the next one, and without."""
    answers, x = [], torch.ones(2, 16, dtype=torch.float64) * (rank + 1)
    for abandon in (True, False):
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))).double()
        model = DataParallel(layers, dist.group.WORLD, bucket_mb=16 * 17 * 8e-6)
        if abandon:
            (layers[3:] if rank else model)(x).sum().backward()
            model.finish_gradient_synchronization()
            model.zero_grad()
        model(x).sum().backward()
        started = model.started
        model.finish_gradient_synchronization()
        answers.append([p.grad for p in model.parameters()])
    return all(map(torch.equal, *answers)), started


def test_a_batch_is_given_up(run_ranks):
    assert run_ranks(given_up, 2) == [(True, 4)] * 2


def small_integers(rank, n, make):
    layer = nn.Linear(2, 2)
    layer.register_buffer("codes", torch.zeros(2, dtype=torch.int16))
    make(layer, dist.group.WORLD)


@pytest.mark.parametrize("make", (DataParallel, zero.FullyShard))
def test_a_buffer_that_cannot_be_broadcast_is_named(run_ranks, make):
    with pytest.raises(AssertionError, match="RuntimeError: codes, torch.int16, could not be broadcast: "):
        run_ranks(small_integers, 2, make)


def on_the_board(rank, n):
    """Two linears, and two stages: the plain version's results and ours."""
    group, generator = dist.group.WORLD, torch.Generator().manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 8, bias=False), nn.GELU(), nn.Linear(8, 6, bias=False)).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64, generator=generator)
    A, B = (nn.Parameter(p.detach().chunk(n, dim)[rank].clone()) for dim, p in enumerate(mlp.parameters()))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    parallel.tensor_parallel(mlp, group, plan={"0": "column", "2": "row"}, sequence_parallel=False)
    with torch.no_grad():
        mlp[0].weight.copy_(A)
        mlp[2].weight.copy_(B)
    found = [parallel.two_linears(inputs[0], A, B, group), mlp(inputs[1])]
    for y in found:
        y.square().sum().backward()
    pairs = [[y.detach() for y in found], [x.grad for x in inputs], [A.grad, mlp[0].weight.grad],
             [B.grad, mlp[2].weight.grad]]

    stages, loss = [stage_modules()[rank] for _ in range(2)], nn.MSELoss(reduction="sum")
    x, y = (torch.randn(5, 3, 10, dtype=torch.float64, generator=generator) for _ in range(2))
    losses = parallel.two_stages(stages[0], list(x), list(y), loss, group)

    def chunk(x, y, hidden=None):
        out = stages[1](x if hidden is None else hidden)
        return out if rank == 0 else (loss(out, y), loss(out, y).detach())

    ours = parallel.run_schedule(parallel.gpipe(2, 5), [chunk], [{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
                                 [dist.new_group(), dist.new_group()], hidden_like=lambda b: torch.empty_like(b["x"]))
    pairs += [(losses, [x for x in ours if x is not None])]
    pairs += [[p.grad for p in ps] for ps in zip(*(stage.parameters() for stage in stages), strict=True)]
    return pairs


def test_the_real_versions_are_those_on_the_board(run_ranks):
    for pairs in run_ranks(on_the_board, 2):
        for plain, ours in pairs:
            assert plain is not None
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def tensor_parallel_mlp(rank, n, how):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if how == "torch":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        mesh = dist.device_mesh.init_device_mesh("cpu", (n,))
        mlp = parallelize_module(mlp, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif how != "alone":
        sp = how == "sequence"
        mlp = parallel.tensor_parallel(mlp, dist.group.WORLD, plan={"0": "column", "2": "row"}, sequence_parallel=sp)
        if sp:
            x, upstream = x.chunk(n, 1)[rank], upstream.chunk(n, 1)[rank]
    x = x.contiguous().requires_grad_()
    y = mlp(x)
    y.backward(upstream)
    parallel.reduce_partial_gradients(mlp.parameters())
    full = (lambda t: t.full_tensor()) if how == "torch" else (lambda t: t)
    return (y.detach(), x.grad, [full(p.grad).detach() for p in mlp.parameters()],
            [getattr(p, "box", None) for p in mlp.parameters()])


def test_tensor_parallel_linears_are_torchs(run_ranks):
    y, dx, grads, _ = tensor_parallel_mlp(0, 1, "alone")
    for ours in run_ranks(tensor_parallel_mlp, 2, "torch"):
        for a, b in zip((y, dx, *grads), (*ours[:2], *ours[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for how in ("plain", "sequence"):
        for rank, (our_y, our_dx, our_grads, boxes) in enumerate(run_ranks(tensor_parallel_mlp, 2, how)):
            part = (lambda t, r=rank: t.chunk(2, 1)[r]) if how == "sequence" else (lambda t: t)
            torch.testing.assert_close(our_y, part(y), rtol=0, atol=1e-12)
            torch.testing.assert_close(our_dx, part(dx), rtol=0, atol=1e-12)
            for g, full, box in zip(our_grads, grads, boxes, strict=True):
                torch.testing.assert_close(g, full[slices(box)], rtol=0, atol=1e-12)


def kept_and_cast(rank, n, sequence_parallel):
    """-> inputs that outlive a step, gathers (float32, bfloat16 weights), if a refilled input is not seen, if gradients
    are those of the input as it was."""
    mlp = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12))
    plan = {"0": "column", "2": "row"}
    parallel.tensor_parallel(mlp, dist.group.WORLD, plan=plan, sequence_parallel=sequence_parallel)
    alive, memory = [], []
    gc.collect()
    gc.disable()                                                   # nothing may wait for the collector of cycles
    for grad, leaf in ((True, True), (True, False), (False, False)):
        x = torch.randn(2, 4, 12, requires_grad=leaf)
        y = x if leaf else x * 2
        with torch.set_grad_enabled(grad):
            out = mlp(y)
        if grad:
            out.sum().backward()
        alive += [weakref.ref(x), weakref.ref(y)]
        memory.append(StorageWeakRef(y.untyped_storage()))
        del x, y, out
    def outlived():
        return sum(x() is not None for x in alive) + sum(not x.expired() for x in memory)

    end, sizes = time.monotonic() + 2, []
    while outlived() and time.monotonic() < end:           # gloo's thread lets go of a message in its own time
        time.sleep(0.01)
    alive = outlived()
    gc.enable()
    for dtype in (torch.float32, torch.bfloat16):
        with CommLedger({"tp": dist.group.WORLD}) as ledger:
            mlp.to(dtype)(torch.randn(2, 4, 12, requires_grad=True) * 1).float().sum().backward()
        sizes.append([(x.bytes, x.dtype) for x in ledger.calls if x.collective == "all_gather"])
    x = torch.zeros(2, 4, 12)
    mlp.zero_grad()
    mlp.float()
    answers = []
    for value in (1.0, 2.0):                                       # a buffer that is filled again and again
        x.fill_(value)
        answers.append(mlp(x).detach())
    grads, x = [], torch.randn(2, 4, 12)
    for changed in (sequence_parallel, False):                     # an input without a gradient: what f gave is kept
        y = x.clone()
        mlp.zero_grad()
        out = mlp(y)
        y = y.zero_() if changed else y
        out.sum().backward()
        grads.append(mlp[0].weight.grad)
    return alive, sizes, torch.equal(*answers), torch.equal(*grads)


def gathered_at_once(rank, n):
    """-> how many gathered sequences live at each gather of backward: three pairs, each with two readers of x."""
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

        def forward(self, x):
            return self.down(self.gate(x) * self.up(x))

    model = nn.Sequential(*(Pair() for _ in range(3)))
    parallel.tensor_parallel(model, dist.group.WORLD, sequence_parallel=True,
                             plan={"*.gate": "column", "*.up": "column", "*.down": "row"})
    original, alive, counts = parallel.all_gather, [], []

    def gather(x, group, dim):
        counts.append(sum(y() is not None for y in alive))
        y = original(x, group, dim)
        alive.append(weakref.ref(y))
        return y

    out = model(torch.randn(2, 4, 12, requires_grad=True))
    parallel.all_gather = gather
    try:
        out.square().sum().backward()
    finally:
        parallel.all_gather = original
    pair, x, grads = model[0], torch.randn(2, 4, 12, requires_grad=True), []
    for change in (lambda x: x.add_(1), lambda x: x + 1):                                   # between two readers
        pair.forward = lambda x, change=change: pair.down(pair.gate(x) * pair.up(change(x)))
        pair.zero_grad()
        pair(x * 1).square().sum().backward()
        grads.append([p.grad for p in pair.parameters()])
    return counts, sum(y() is not None for y in alive), all(map(torch.equal, *grads))


def test_what_is_gathered_again_goes_with_its_readers(run_ranks):
    """g's adjoint and f again, three times: each finds at most the gradient alive that it belongs to."""
    for counts, left, changed in run_ranks(gathered_at_once, 2):
        assert len(counts) == 6 and max(counts) <= 1 and left == 0 and changed


def recomputed_pair(rank, n):
    """-> inputs of f that outlive a forward that is computed again; its gradients' error."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)))
    parallel.tensor_parallel(mlp, dist.group.WORLD, plan={"1.0": "column", "1.2": "row"}, sequence_parallel=True)
    kept, grads = [], []
    mlp[1].register_forward_pre_hook(lambda _, args: kept.append(StorageWeakRef(args[0].untyped_storage())),
                                     prepend=True)                                             # a shard: before f
    for again in (True, False):
        x = torch.ones(2, 4, 12, requires_grad=True) * (rank + 1)
        out = checkpoint(mlp, x, use_reentrant=False) if again else mlp(x)
        alive = [not x.expired() for x in kept]
        out.square().sum().backward()
        grads.append([p.grad for p in mlp.parameters()])
        mlp.zero_grad()
    return alive[0], alive[-1], all(map(torch.equal, *grads))


def test_recomputation_keeps_no_input_of_a_column(run_ranks):
    assert run_ranks(recomputed_pair, 2) == [(False, True, True)] * 2


def test_inputs_are_let_go_and_cast_once(run_ranks):
    for sequence_parallel in (False, True):
        for alive, sizes, same, unchanged in run_ranks(kept_and_cast, 2, sequence_parallel):
            assert alive == 0 and not same and unchanged
            if sequence_parallel:                                   # x; x again in backward; the gradient of the output
                whole = 2 * 8 * 12
                assert sizes == [[(4 * whole, torch.float32)] * 3, [(2 * whole, torch.bfloat16)] * 3]


class PlainHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 8), nn.Linear(8, 24, bias=False)
        self.head.weight = self.embed.weight                                                              # tied
        nn.init.normal_(self.embed.weight, 0, 10, generator=torch.Generator().manual_seed(3))
        self.double()


def vocabulary(rank, n, dtype=torch.float64):
    module = PlainHead()
    generator = torch.Generator().manual_seed(4)
    tokens, targets = (torch.randint(24, (3, 100), generator=generator) for _ in range(2))
    targets[torch.rand(3, 100, generator=generator) < 0.3] = -1
    weights = torch.rand(3, 100, generator=generator, dtype=torch.float64)
    if n == 1:
        logits = module.head(module.embed(tokens))
        own, = torch.autograd.grad(logits.square().sum(), module.head.weight, retain_graph=True)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(3, 100)
        loss = (nll * weights).sum()
    else:
        parallel.tensor_parallel(module, dist.group.WORLD, plan={"embed": "vocab", "head": "head"},
                                 sequence_parallel=n == 2)
        assert module.head.weight is module.embed.weight
        loss, nll = module.head(module.embed(tokens), targets, weights)
        if n == 4:                                                                                  # in chunks of 70
            x = parallel.copy_to_tp_region(module.embed(tokens), dist.group.WORLD)
            loss, nll = parallel.VocabParallelCrossEntropy.apply(
                x.flatten(0, 1), module.head.weight, targets.flatten(), weights.flatten(), dist.group.WORLD, 70, True)
            nll = nll.view(3, 100)
        logits = module.head(module.embed(tokens))
        own, = torch.autograd.grad(logits.square().sum(), module.head.weight)
        with pytest.raises(ValueError, match="targets must be below vocab_size 24, got 24"):
            module.head(module.embed(tokens), torch.full_like(targets, 24))
    assert logits.max() > 1000
    (loss * 3).backward()
    return loss.detach(), nll.detach(), logits.detach(), module.embed.weight.grad, own


def test_vocabulary_parallel_embedding_and_loss(run_ranks):
    """In one chunk and in five; logits of thousands, whose exponentials nothing holds."""
    expected = vocabulary(0, 1)
    for n in (2, 4):                                                          # with sequence parallelism, and without
        for rank, ours in enumerate(run_ranks(vocabulary, n)):
            for a, b in zip(ours, (*expected[:3], *(x.chunk(n)[rank] for x in expected[3:])), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)


class Attn(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim, self.q_proj, self.k_proj = 4, nn.Linear(8, 16), nn.Linear(8, 8)


def refused(rank, n):
    lines = []
    eight, normed = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8))
    for module, plan in ((eight, {"0": "head"}), (nn.Sequential(nn.Embedding(8, 4, padding_idx=0)), {"0": "vocab"}),
                         (Attn(), {"k_proj": "column"}), (Attn(), {"q_proj": "column"}),
                         (normed, {"1": "column", "2": "row"}),
                         (nn.Sequential(nn.Linear(6, 6)), {"0": "row"}),
                         (eight, {"0": "row", "1": "row"}), (eight, {"*": "column", "": "row"}),
                         (eight, {"0": "col"}), (nn.Sequential(nn.ReLU()), {"0": "row"})):
        try:
            parallel.tensor_parallel(module, dist.group.WORLD, plan=plan)
        except ValueError as error:
            lines.append(str(error))
    for degrees in ((0, 3, 1), (2, 1, 1), (1, 1, 0)):
        try:
            parallel.Mesh(*degrees)
        except ValueError as error:
            lines.append(str(error))
    return lines


def test_what_does_not_divide_is_named(run_ranks):
    for lines in run_ranks(refused, 4):
        for line, expected in zip(lines, (
                "0: style head cannot do bias", "0: style vocab cannot do padding_idx, Embedding has it",
                "k_proj: tp must divide its 2 heads, got 4",
                "Attn: a module with column layers must have a row layer and no parameter outside the plan, got k_",
                "Sequential: a module with column layers must have a row layer and no parameter outside the plan, ",
                "0: tp must divide its size 6, got 4",
                "plan must meet a module with each pattern, 1 meets none",
                "plan must meet a module with each pattern,  meets none",
                "0: its style must be one of column, row, vocab, head, partial, positions, got 'col'",
                "0: style row needs a module with a matrix, got ReLU",
                "dp x tp x pp must be the number of ranks: 1 x 3 x 1 is 3, there are 4",
                "dp x tp x pp must be the number of ranks: 2 x 1 x 1 is 2, there are 4",
                "dp x tp x pp must be the number of ranks: 1 x 1 x 0 is 0, there are 4"), strict=True):
            assert expected in line


def stage_modules():
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10)).double() for _ in range(2)]


# yours, perhaps: the second rank begins with the last message, and is answered in another order than it speaks
BACK_TO_FRONT = [[Op("F", i) for i in range(6)] + [Op("B", i) for i in range(6)],
                 [op for i in range(5, -1, -1) for op in (Op("F", i), Op("B", i))]]


def pipeline(rank, n, how):
    """Two stages, six micro-batches, a squared-error loss -> losses on the last stage, this stage's gradients."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
    modules, generator = stage_modules(), torch.Generator().manual_seed(6)
    x, y = (torch.randn(6, 3, 10, dtype=torch.float64, generator=generator) for _ in range(2))
    if how.startswith("torch"):
        stage = PipelineStage(modules[rank], rank, n, torch.device("cpu"))
        cls = ScheduleGPipe if how == "torch gpipe" else Schedule1F1B
        losses = []
        schedule = cls(stage, 6, loss_fn=lambda out, target: (out - target).square().sum(), scale_grads=False)
        if rank == 0:
            schedule.step(x.flatten(0, 1))
        else:
            schedule.step(target=y.flatten(0, 1), losses=losses)
        losses = [x.item() for x in losses]
    else:
        group = dist.group.WORLD if n > 1 else None
        groups = None if group is None else [dist.new_group(), dist.new_group()]
        alive = []

        def chunk(x, y, hidden=None, module=None, last=False):
            out = module(x if hidden is None else hidden)
            if not last:
                alive.append(weakref.ref(out))
                return out
            nll = (out - y).square().sum(1)
            return nll.sum(), nll.detach()

        def on_op(op, *clocks):
            assert all(x() is None for x in alive), "a hidden state that was sent is kept"

        if n == 1:
            chunks = [lambda hidden=None, **b: chunk(**b, hidden=modules[0](b["x"]), module=modules[1], last=True)]
        else:
            chunks = [functools.partial(chunk, module=modules[rank], last=rank == 1)]
        schedule = BACK_TO_FRONT if how == "back to front" else parallel.SCHEDULES[how](n, 6)
        nll = parallel.run_schedule(schedule, chunks,
                                    [{"x": a, "y": b} for a, b in zip(x, y, strict=True)], groups,
                                    hidden_like=lambda b: torch.empty_like(b["x"]), on_op=on_op)
        losses = [x.sum().item() for x in nll if x is not None]
    return losses, [p.grad for p in modules[rank].parameters()], [p.grad for p in modules[-1].parameters()]


def test_pipelines_are_torchs(run_ranks):
    losses, first, last = pipeline(0, 1, "1f1b")
    for how in ("gpipe", "1f1b", "zb", "back to front", "torch gpipe", "torch 1f1b"):
        answers = run_ranks(pipeline, 2, how)
        assert answers[1][0] == pytest.approx(losses, abs=1e-12)
        for ours, expected in ((answers[0][1], first), (answers[1][1], last)):
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def sent(rank, n, how):
    """The most messages sent that are still held after an operation of ten micro-batches."""
    module, alive, most, plain = stage_modules()[rank], [], [], parallel.Channels.send

    def send(self, x, message):
        alive.append(weakref.ref(x))
        plain(self, x, message)

    def chunk(x, hidden=None):
        out = module(x if hidden is None else hidden)
        return out if rank == 0 else (out.square().sum(), out.detach())

    def on_op(op, *clocks):
        held = []
        for _ in range(10):                                             # gloo's threads let go of theirs a moment later
            held.append(sum(x() is not None for x in alive))
            time.sleep(0.003)
        most.append(min(held))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.Channels, "send", send)
        parallel.run_schedule(parallel.SCHEDULES[how](n, 10), [chunk], [{"x": torch.ones(3, 10).double()}] * 10,
                              [dist.new_group(), dist.new_group()], hidden_like=lambda b: torch.empty_like(b["x"]),
                              on_op=on_op)
    return len(alive), max(most)


@pytest.mark.parametrize("how", ["1f1b", "zb"])
def test_what_the_other_rank_has_is_kept_no_longer(run_ranks, how):
    # of hidden states: as many as are between F and B, of their gradients: until the F that was sent after they came
    assert run_ranks(sent, 2, how) == [(10, 2), (10, 2)]


def frozen(rank, n, schedule):
    """The first stage is frozen; and a module that is frozen as a whole."""
    modules, group = stage_modules(), dist.group.WORLD
    modules[0].requires_grad_(False)
    x = torch.ones(4, 3, 10, dtype=torch.float64)

    def chunk(x, hidden=None):
        out = modules[rank](x if hidden is None else hidden)
        return out if rank == 0 else (out.square().sum(), out.detach())

    parallel.run_schedule(parallel.SCHEDULES[schedule](2, 4), [chunk], [{"x": row} for row in x],
                          [dist.new_group(), dist.new_group()], hidden_like=lambda b: torch.empty_like(b["x"]))
    modules[0].requires_grad_(True)
    detached = (lambda x, hidden=None: chunk(x, hidden if hidden is None else hidden.detach()))
    parallel.run_schedule(parallel.SCHEDULES[schedule](2, 4), [detached], [{"x": row} for row in x],
                          [dist.new_group(), dist.new_group()], hidden_like=lambda b: torch.empty_like(b["x"]))
    assert rank == 1 or not any(p.grad.any() for p in modules[0].parameters())        # the second does not depend on it
    modules[0].requires_grad_(False).zero_grad()
    DataParallel(modules[0], group).finish_gradient_synchronization()
    norm = nn.LayerNorm(4).requires_grad_(False)
    norm.weight.sum_over = (group,)
    parallel.reduce_partial_gradients(norm.parameters())
    return [p.grad is not None for p in modules[rank].parameters()], norm.weight.grad


def test_frozen_parts(run_ranks):
    for schedule in ("1f1b", "zb"):
        assert run_ranks(frozen, 2, schedule) == [([False] * 4, None), ([True] * 4, None)]


def started_in_backward(rank, n, corpus, flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "DataParallel", functools.partial(DataParallel, bucket_mb=0.01))
        c, world, model, _, loader, _ = begin([*TINY, *MODELS["llama"], "--data", str(corpus), *flags.split()])
    model.run([train.to_device(next(loader), c, world.device) for _ in range(4)], 1.0)
    return model.sync[0].started, len(model.sync[0].buckets)


def test_buckets_leave_during_the_last_backward_of_a_pipeline(corpus, run_ranks):
    for schedule in ("1f1b", "zb"):
        for started, buckets in run_ranks(started_in_backward, 4, corpus, f"--dp 2 --pp 2 --pp-schedule {schedule}"):
            assert started == buckets > 5


def test_weights_parts_let_go_of_their_inputs_one_by_one():
    layers, inputs, alive = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), [], []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
        layer.weight.register_post_accumulate_grad_hook(lambda _: alive.append(sum(not x.expired() for x in inputs)))

    def chunk(x, hidden=None):
        out = layers(x.clone().requires_grad_())
        return out.square().sum(), out.detach()

    parallel.run_schedule(parallel.zero_bubble(1, 1), [chunk], [{"x": torch.ones(2, 4)}])
    assert alive == [3, 2, 1]


def used_twice(rank, n):
    """A pipeline of one whose matrix two linears of a chunk multiply by -> its gradient, and plain autograd's."""
    torch.manual_seed(0)
    x, layer = torch.randn(3, 2, 4, dtype=torch.float64), nn.Linear(4, 4).double()
    model = DataParallel(layer, dist.group.WORLD)

    def chunk(x, hidden=None):
        out = layer(layer(x.clone().requires_grad_()).relu())
        return out.square().sum(), out.detach()

    parallel.run_schedule(parallel.zero_bubble(1, 3), [chunk], [{"x": part} for part in x], no_sync=model.no_sync)
    model.finish_gradient_synchronization()
    expected = torch.autograd.grad(chunk(x)[0], layer.weight)[0]
    return layer.weight.grad / n, expected


def test_a_matrix_used_twice_is_sent_once(run_ranks):
    for ours, expected in run_ranks(used_twice, 2):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def waiting(rank, n, degrees, over):
    """Rank 0 waits in each group, and for a message, for others that do not come -> seconds until it gave up."""
    mesh, gone = parallel.Mesh(*degrees, timeout=0.2), []
    waits = [functools.partial(parallel.all_reduce, torch.ones(1), group)
             for group in (mesh.dp_group, mesh.tp_group, mesh.pp_group, mesh.ends_group) if group is not None]
    waits.append(lambda: parallel.run_schedule(
        parallel.one_f_one_b(2, 1), [lambda hidden, x: x * 1], [{"x": torch.ones(1)}], mesh.pp_groups,
        hidden_like=lambda b: b["x"], timeout=0.2))
    for wait in waits if rank == 0 else ():
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            wait()
        gone.append(time.monotonic() - start)
    if rank == 0:
        over.write_text("")
    wait_for(over.exists)
    return gone


@pytest.mark.parametrize("degrees", ((1, 2, 2), (2, 1, 2)))
def test_nobody_waits_longer_than_the_timeout(run_ranks, tmp_path, degrees):
    gone = run_ranks(waiting, 4, degrees, tmp_path / "over")[0]
    assert len(gone) == 4 and all(0.1 < seconds < 2 for seconds in gone)


# ---- global quantities, the ledger -----------------------------------------------------------------------------------

def pieces(rank, n, fault):
    p = nn.Parameter(torch.full((2, 3), 1.0 + (fault == "value") * rank))
    q = nn.Parameter(torch.ones(2, 3))
    p.full_name, p.box = "norm.weight", ((0, 2, 2), (0, 3, 3))
    q.full_name, q.box = "big.weight", ((2 * rank, 2 * rank + 2, 2 * n + (fault == "hole")), (0, 3, 3))
    mine = parallel.owned([p, q], dist.group.WORLD)
    parallel.check_replicas([p, q], dist.group.WORLD)
    return [x.full_name for x in mine], parallel.squared_norm(mine).item()


def partial_in_any_order(rank, n):
    """Three groups of two ranks each, and no rank's parameters come in the order of the groups."""
    pairs = [dist.new_group(ranks, timeout=timedelta(seconds=5)) for ranks in ([0, 1], [1, 2], [2, 0])]
    params = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for p, group in zip(params, (pairs[rank], pairs[rank - 1]), strict=True):
        p.grad, p.sum_over = torch.tensor([float(rank + 1)]), (group,)
    parallel.reduce_partial_gradients(params)
    return [p.grad.item() for p in params]


def test_partial_gradients_are_summed_in_one_order_of_groups(run_ranks):
    assert run_ranks(partial_in_any_order, 3) == [[3.0, 4.0], [5.0, 3.0], [4.0, 5.0]]


def test_replicas_are_owned_once_and_must_be_equal(run_ranks):
    answers = run_ranks(pieces, 2, None)
    assert [names for names, _ in answers] == [["norm.weight", "big.weight"], ["big.weight"]]
    assert [x for _, x in answers] == pytest.approx([12.0, 6.0], rel=1e-6)
    with pytest.raises(AssertionError, match="norm.weight: replicas must be equal, those of ranks 0 and 1 are not"):
        run_ranks(pieces, 2, "value")
    with pytest.raises(AssertionError, match="big.weight: the ranks' pieces must make its 15 elements, they make 12"):
        run_ranks(pieces, 2, "hole")
    assert parallel.squared_norm([]) == 0
    assert parallel.squared_norm([torch.tensor([1e25])]).item() == pytest.approx(1e50)


def test_books_that_do_not_agree_are_found():
    call = lambda kind, peer=None, shape=(3,): parallel.Call("tp", "", kind, 12, 2, shape, torch.float32, peer)
    check_sequences([[call("all_reduce"), call("send", 1)], [call("all_reduce"), call("recv", 0)]], "tp")
    for a, b in (([call("all_reduce")], []), ([call("all_reduce")], [call("all_reduce", shape=(4,))]),
                 ([call("send", 1)], []),
                 ([call("send", 1), call("send", 1, (2,))], [call("recv", 0, (2,)), call("recv", 0)])):
        with pytest.raises(AssertionError, match="tp: "):
            check_sequences([a, b], "tp")
    for axis in ("pp", "tp", "ends", "world"):                                          # of a mesh pp 2 x tp 2
        two = [call("all_reduce")._replace(axis=axis, shape=(n,)) for n in (3, 4)]
        for last in (two, two[::-1]):
            books = [(last if place == (1, 0, 1) else two, {(axis, "all_reduce"): (2, 24)}, place, [])
                     for place in itertools.product((0, 1), (0,), (0, 1))]
            with pytest.raises(AssertionError, match=f"{axis}: ") if last != two else contextlib.nullcontext():
                check_calls(books)


def loopback() -> int:
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])                                                            # bytes sent


def busy_wire(rank, n):
    x, rows, group = torch.ones(4_000_000), [], dist.group.WORLD
    parallel.all_reduce(x, group)                                                                         # connected
    for name, call in (("all_reduce", lambda: parallel.all_reduce(x, group)),
                       ("all_gather", lambda: parallel.all_gather(x, group, 0)),
                       ("reduce_scatter", lambda: parallel.reduce_scatter(x, group, 0)),
                       ("send", lambda: dist.send(x, group_dst=1) if rank == 0 else dist.recv(x, group_src=0))):
        dist.barrier()
        before = loopback()
        with CommLedger({"dp": group}) as ledger:
            call()
        dist.barrier()
        rows.append((name, ledger.total("wire"), loopback() - before))
    return rows


def test_a_ring_sends_what_the_others_lack():
    for n in (1, 2, 3, 4):
        calls = {name: parallel.Call("dp", "", name, 12, n, (3,), torch.float32, None).wire
                 for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "recv")}
        part = 12 - 12 / n
        assert calls == pytest.approx({"all_reduce": 2 * part, "all_gather": part, "reduce_scatter": part,
                                       "all_to_all": part, "send": 12, "recv": 0})


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="counts the bytes of the loopback device")
def test_what_is_counted_is_what_is_sent(run_ranks):
    """16 MB: all-reduce 2 (n-1)/n of it a rank, gather 1/2 of 32. Gloo scatters by reducing everything everywhere, so
    there the wire carries twice the ring's share; NCCL does not."""
    expected = {"all_reduce": 2 * 16e6, "all_gather": 2 * 16e6, "reduce_scatter": 2 * 8e6, "send": 16e6}
    answers = run_ranks(busy_wire, 2)
    for (name, counted, sent), (_, also_counted, also_sent) in zip(*answers, strict=True):
        assert counted + also_counted == expected[name]
        wire = expected[name] * (2 if name == "reduce_scatter" else 1)
        assert wire <= max(sent, also_sent) < 1.02 * wire + 100_000, name                         # headers, barriers


# ---- faults ----------------------------------------------------------------------------------------------------------

FAULTY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--seq-len", "32", "--vocab-size", "512", "--steps",
          "100000", "--global-batch-size", "4", "--device", "cpu", "--checkpoint-interval", "5", "--eval-interval", "0"]


def children(pid) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_done(out) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, seconds=180, pause=0.02):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(pause)


# train.py, but rank 1 raises in the eighth step of its first start, or as ENDS says; a DEAF rank 0 does not hear it
FAULT = """import os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
import train

def step(model, optimizer, loader, step, c, world, *rest):
    steps.append(step)
    if step == 7 and steps[0] == 0:
        if world.rank == 1:
            pathlib.Path(c.out, "fault").write_text(str(time.time()))
            if os.environ.get("ENDS") == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ.get("ENDS") == "early":
                os._exit(0)
            if os.environ.get("ENDS") == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise ValueError("the fan fell off")
        if "DEAF" in os.environ:
            time.sleep(60)
    return original(model, optimizer, loader, step, c, world, *rest)

original, train.train_step, train.__file__, steps = train.train_step, step, __file__, []
sys.exit(train.main())
"""


@pytest.fixture
def program(corpus, tmp_path):
    """-> the run's folder; start(*flags, fault=, ENVIRONMENT) -> a process that runs train.py; said(name) -> its
    output."""
    script, started = tmp_path / "faulty.py", []
    script.write_text(FAULT.format(root=str(ROOT)))

    def start(*flags, fault=False, **environment):
        args = [*FAULTY, "--data", str(corpus), "--out", str(tmp_path / "run"), *flags]
        started.append(POOL.process(as_program, script if fault else ROOT / "train.py", args, tmp_path, environment,
                                    daemon=False))
        return started[-1]

    yield tmp_path / "run", start, lambda name: (tmp_path / name).read_text()
    for process in started:
        process.kill()


def gone(processes):
    return not any(Path(f"/proc/{r}").exists() for r in processes)


def test_a_killed_rank_ends_the_others_and_all_start_again(program):
    """Rank 0 is deaf: the launcher ends it. The second start goes on from the checkpoint and ends as asked."""
    out, start, said = program
    launcher = start("--nproc", "2", "--max-restarts", "1", fault=True, ENDS="killed", DEAF="1")
    wait_for((out / "fault").exists)
    ranks = children(launcher.pid)
    wait_for(lambda: gone(ranks), 10)
    wait_for(lambda: steps_done(out) > 10)
    launcher.terminate()
    launcher.join(30)
    assert launcher.exitcode == 0, said("stderr")
    assert "rank 1 was killed by signal 9, at step" in said("stderr") and "start 2 of 2" in said("stderr")
    assert "resuming   at step 5" in said("stdout") and "stopped at step" in said("stdout")


def test_the_launcher_passes_signals_on_and_is_not_outlived(program):
    out, start, said = program
    early = start("--nproc", "2", "--max-restarts", "3")
    wait_for(lambda: children(early.pid), pause=0.001)                      # a rank that cannot know yet what it means
    ranks = children(early.pid)
    early.terminate()
    early.join(20)
    assert early.exitcode == 1 and said("stderr") == "train.py: stopped before the run had begun\n"
    launcher = start("--nproc", "1", "--max-restarts", "3")
    wait_for((out / "config.json").exists)
    ranks += children(launcher.pid)
    launcher.kill()
    wait_for(lambda: gone(ranks), 10)


@pytest.mark.slow
def test_a_save_that_fails_after_ctrl_c_is_said(program):
    out, start, said = program
    launcher = start("--nproc", "2", "--checkpoint-interval", "0")
    wait_for(lambda: steps_done(out) > 2)
    (out / "checkpoints").rmdir()
    (out / "checkpoints").write_text("")
    os.kill(launcher.pid, signal.SIGINT)
    launcher.join(60)
    assert launcher.exitcode == 1 and said("stderr").count("\n") == 1
    assert "cannot be written, rank 0: Not a directory" in said("stderr")


def test_the_rank_that_is_blamed_is_the_one_that_failed_first(tmp_path):
    """Not one that lost the others, nor one that the agent ended."""
    c = train.parse_config(["--out", str(tmp_path)])
    lost = "train.py: rank 0 lost the other ranks at step 3: Connection closed"
    waited = "train.py: rank 0 lost the other ranks at step 3: Timed out"
    own = "train.py: rank 1 failed with X at step 3: y"
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    for codes, said, asked, answer in (
            ({0: 1, 1: -9}, {0: lost, 1: ""}, False, (1, "train.py: rank 1 was killed by signal 9, at step 3")),
            ({0: -15, 1: 1}, {0: "", 1: f"Traceback\n{own}"}, False, (1, f"{own}; see {tmp_path}/rank-1.err")),
            ({0: 0, 1: 7}, {0: "", 1: ""}, False, (1, "train.py: rank 1 ended with exit code 7, at step 3")),
            ({0: 2, 1: 2}, {0: "a warning\ntrain.py: --tp is wrong", 1: ""}, False, (2, "train.py: --tp is wrong")),
            ({0: 3, 1: 3}, {0: "", 1: ""}, False, (3, "")),
            ({0: 1, 1: 1}, {0: "train.py: interrupted", 1: "Traceback"}, True,
             (1, "train.py: stopped before the run had begun")),
            ({0: 1, 1: 0}, {0: own}, True, (1, f"{own}; see {tmp_path}/rank-0.err")),
            # rank 2 is stopped: SIGKILL ended it; rank 1 sleeps: SIGTERM ended it; none waited until its timeout
            ({0: 1, 1: 1, 2: -9, 3: 1}, {0: waited, 1: waited, 2: "a warning", 3: waited}, False,
             (1, f"train.py: rank 2 hung and had to be ended; {waited[10:]}; see {tmp_path}/rank-2.err")),
            ({0: 1, 1: -15}, {0: waited, 1: ""}, False,
             (1, f"train.py: rank 1 hung and had to be ended; {waited[10:]}; see {tmp_path}/rank-0.err")),
            ({0: 1, 1: -15}, {0: lost, 1: ""}, False, (1, f"{lost}; see {tmp_path}/rank-0.err"))):
        assert train.blame(c, codes, said, asked) == answer
    assert (tmp_path / "rank-1.err").read_text() == f"Traceback\n{own}\n"


def test_a_rank_that_raises_ends_the_others(program):
    out, start, said = program
    ranks = [start(fault=True, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", RANK=r, LOCAL_RANK=r,
                   MASTER_PORT=str(20000 + os.getpid() % 9999)) for r in "01"]
    for process in ranks[::-1]:
        process.join(90)
    assert time.time() - float((out / "fault").read_text()) < 10
    assert [process.exitcode for process in ranks] == [1, 1]
    assert "ValueError: the fan fell off" in said("stderr1")
    assert said("stderr1").endswith("train.py: rank 1 failed with ValueError at step 7: the fan fell off\n")
    lost = said("stderr0")
    assert lost.startswith("train.py: rank 0 lost the other ranks at step 7: ") and lost.count("\n") == 1


@pytest.mark.slow
def test_a_rank_that_leaves_early_is_missed_by_the_others(program):
    out, start, said = program
    launcher = start("--nproc", "2", "--timeout", "8", fault=True, ENDS="early")
    launcher.join(90)
    assert time.time() - float((out / "fault").read_text()) < 15
    assert launcher.exitcode == 1 and said("stderr").startswith("train.py: rank 0 lost the other ranks at step 7: ")
    assert said("stderr").count("\n") == 1


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(program):
    """The others wait until their --timeout; the agent ends it by SIGKILL, half a minute after SIGTERM did not help."""
    out, start, said = program
    launcher = start("--nproc", "4", "--timeout", "8", fault=True, ENDS="stopped")
    launcher.join(120)
    assert time.time() - float((out / "fault").read_text()) < 70 and launcher.exitcode == 1
    assert said("stderr").startswith("train.py: rank 1 hung and had to be ended; rank ")
    assert " lost the other ranks at step 7: " in said("stderr") and said("stderr").count("\n") == 1


@pytest.mark.slow
def test_torchrun_starts_all_again_from_the_checkpoint(corpus, tmp_path):
    script, out = tmp_path / "faulty.py", tmp_path / "run"
    script.write_text(FAULT.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "--max-restarts", "1", str(script), *FAULTY, "--data", str(corpus), "--out", str(out),
                           "--steps", "12"], capture_output=True, text=True, timeout=400,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "train.py: rank 1 failed with ValueError at step 7: the fan fell off" in done.stderr
    assert "starting   at step 0 of 12" in done.stdout and "resuming   at step 5 of 12" in done.stdout
    assert steps_done(out) >= 12 and (out / "checkpoints" / "step-00000012").exists()


def test_only_a_fault_starts_all_again(monkeypatch, tmp_path):
    """Bad input and a run that diverged (exit codes 2 and 3) do not, nor does a fault after the last start."""
    def agent(code):
        def start_ranks(*argv):
            starts.append(argv[1:])
            error = ChildFailedError.__new__(ChildFailedError)
            error.failures = {0: SimpleNamespace(exitcode=code)}
            raise error
        return lambda config, entrypoint: start_ranks

    for module, name in ((logging, "disable"), (signal, "signal")):                      # of the process that launches
        monkeypatch.setattr(module, name, lambda *_: None)
    c, again = train.parse_config(["--out", str(tmp_path), "--nproc", "1", "--max-restarts", "2"]), ("--resume", "auto")
    for code, expected in ((2, [()]), (3, [()]), (1, [(), again, again])):
        starts = []
        monkeypatch.setattr(launcher_api, "elastic_launch", agent(code))
        assert train.launch(c, []) == code and starts == expected


@pytest.mark.parametrize("flags, message", [
    ("--tp 3 --dry-run", "--seq-len must be a multiple of tp with --sequence-parallel, got 32 and 3"),
    ("--tp 8 --dry-run", "model.layers.0.self_attn.q_proj: tp must divide its 4 heads, got 8"),
    ("--tp 4 --n-ff 66 --dry-run", "model.layers.0.mlp.gate_proj: tp must divide its size 66, got 4"),
    ("--pp 8 --dry-run", "--pp must leave each stage a layer: pp x chunks is 8, n_layer 4"),
    ("--pp 2 --pp-schedule interleaved --pp-chunks 3 --dry-run",
     "--pp must leave each stage a layer: pp x chunks is 6, n_layer 4"),
    ("--pp 2 --pp-schedule zb --recompute full", "--recompute must be none with --pp-schedule zb, config"),
    ("--pp 2 --pp-schedule zb --compile on", "--compile must be off with --pp-schedule zb, got on"),
    ("--dp 2", "2 x 1 x 1 is 2, there is 1; start"),
    ("--tp 2", "dp x tp x pp must be the number of ranks: 1 x 2 x 1 is 2, there is 1; start them with --nproc 2"),
    ("--pp 4 --pp-schedule interleaved --pp-chunks 1 --micro-batch-size 4 --dry-run",
     "--pp-schedule interleaved needs a multiple of pp = 4 micro-batches per step, got 2"),
    ("--max-restarts 1", "--max-restarts goes with --nproc, got 1 without it"),
    ("--timeout 0", "--timeout must be at least 1, got 0")])
def test_bad_layouts_are_one_line(flags, message, capsys):
    assert train.main([*TINY, *flags.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said


def test_all_ranks_find_it_one_line_says_it_and_nothing_starts_again(program):
    _, start, said = program
    launcher = start("--nproc", "2", "--global-batch-size", "7", "--max-restarts", "1")
    launcher.join(60)
    assert launcher.exitcode == 2, said("stderr")
    assert "--global-batch-size must be a multiple of micro_batch_size x dp = 3 x 2 = 6, got 7" in said("stderr")
    assert said("stderr").count("\n") == 1
