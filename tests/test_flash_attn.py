"""flash_attn.py against plain torch. Without a GPU the Triton kernels run in Triton's interpreter, made exact for
bfloat16 by tests/interpreter.py."""

import contextlib
import functools
import importlib.util
import inspect
import itertools
import os
import random
import subprocess
import sys

import interpreter
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench import bench_gpu
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flash_attn
import model as net
import train
from flash_attn import attention_reference, flash_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float32 if DEVICE == "cuda" else torch.float64                     # what all backends run
KERNELS = ("_attn_fwd", "_bwd_dkdv", "_bwd_dq")
if flash_attn.INTERPRET:
    interpreter.install()
    flash_attn.INTERPRETED.add(torch.bfloat16)


def attend(backend, q, k, v, causal=True, sm_scale=None, window=None, documents=None, module=flash_attn):
    """flash_attention with all arguments by place -> o, lse."""
    return module.flash_attention(q, k, v, causal=causal, sm_scale=sm_scale, window=window, documents=documents,
                                  return_lse=True, backend=backend)


tiled, kernels = functools.partial(attend, "torch"), functools.partial(attend, "triton")


def oracle(q, k, v, causal, sm_scale, window, documents):
    """Softmax attention written again, in another way: -> o, lse. An empty row gives 0 and -inf."""
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    mask = torch.zeros(B, 1, T, S, dtype=torch.bool)
    ids = None if documents is None else documents.tolist()
    for b, i, j in itertools.product(range(B if documents is not None else 1), range(T), range(S)):
        place = i + S - T
        sees = j <= place if causal or window else True
        sees &= place - j < window if window else True
        if documents is not None:                                     # all ids from the one to the other are the same
            first, last = sorted((len(ids[b]) - T + i, len(ids[b]) - S + j))
            sees &= len(set(ids[b][first:last + 1])) == 1
        mask[b if documents is not None else slice(None), 0, i, j] = sees
    mask = mask.to(q.device)
    k, v = (x[:, :, None].expand(B, K, H // K, S, D).reshape(B, H, S, D) for x in (k, v))
    s = torch.einsum("bhtd,bhsd->bhts", q, k) * sm_scale
    s = s.masked_fill(~mask, -torch.inf)
    e = (s - s.amax(-1, keepdim=True).detach().clamp(min=-1e30)).exp()
    l = e.sum(-1, keepdim=True)
    return torch.einsum("bhts,bhsd->bhtd", e / l.where(l > 0, 1), v), s.logsumexp(-1)


def make(B, H, K, T, S, D, dtype=torch.float64, documents=None, seed=0, scale=1.0):
    """q, k, v, do, dlse, ids: non-contiguous, as a model makes them; do partly expanded."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads, n: (torch.randn(B, n, heads, D, generator=generator, dtype=torch.float64) * scale).to(
        DEVICE, dtype).transpose(1, 2)
    q, k, v, do = draw(H, T), draw(K, S), draw(K, S), draw(H, T)
    dlse = torch.randn(B, H, T, generator=generator, dtype=torch.float64)
    dlse = dlse.to(DEVICE, torch.promote_types(dtype, torch.float32))
    ids = None
    if documents:
        ids = torch.randint(0, 4, (B, max(T, S)), generator=generator).to(DEVICE)
        ids = ids.sort(1, descending=True).values if documents == "packed" else ids
    return q, k, v, do, dlse, ids


def gradients(function, q, k, v, do, dlse, *options):
    """o, lse, dq, dk, dv of function(q, k, v, *options) -> (o, lse); lse of empty rows takes no gradient."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = function(q, k, v, *options)
    there = lse.isfinite()
    loss = (o * do).sum() + (lse[there] * dlse[there]).sum()
    return o.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))


def tile(monkeypatch, m, n, tma=False):
    monkeypatch.setattr(flash_attn, "PINNED", dict.fromkeys(KERNELS, (m, n, 4, 1)))
    monkeypatch.setattr(flash_attn, "TMA", tma)


OPTIONS = [(causal, window, documents) for causal in (False, True) for window in (None, 1, 20)
           for documents in (None, "packed", "mixed")]
SHAPES = [(33, 33), (1, 40), (50, 20), (20, 50)]                          # T, S


# ---- the lecturer's versions -----------------------------------------------------------------------------------------

def test_online_softmax():
    s, v = torch.randn(37, dtype=torch.float64) * 20, torch.randn(37, 8, dtype=torch.float64)
    torch.testing.assert_close(flash_attn.online_softmax(s, v), s.softmax(0) @ v)


@pytest.mark.parametrize("T", [1, 16, 37])
def test_causal_tiles_are_flash_attention(T):
    q, k, v, do = (x[0, 0].contiguous() for x in make(1, 1, 1, T, T, 8)[:4])
    o, lse = flash_attn.causal_forward(q, k, v, 16)
    ours = o, lse, *flash_attn.causal_backward(do, q, k, v, o, lse, 16)
    expected = gradients(lambda *qkv: (x[0] for x in tiled(*(x[None] for x in qkv))), q, k, v, do,
                         torch.zeros(T, dtype=q.dtype))
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda msg, name=name: f"{name}: {msg}")


# ---- the tiled version in torch --------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, S", SHAPES)
@pytest.mark.parametrize("causal, window, documents", OPTIONS)
def test_tiled_and_reference_equal_the_oracle(causal, window, documents, T, S, monkeypatch):
    monkeypatch.setattr(flash_attn, "TILE", 16)
    *tensors, ids = make(2, 6, 2, T, S, 8, documents=documents)
    options = causal, 0.3, window, ids
    expected = gradients(oracle, *tensors, *options)
    for backend in ("torch", "reference"):
        ours = gradients(functools.partial(attend, backend), *tensors, *options)
        for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), ours, expected, strict=True):
            assert (a - b).abs().nan_to_num(0 if name == "lse" else torch.inf).max() < 1e-12, (backend, name)


def test_sdpa_is_the_outside_oracle():
    q, k, v, do, _, _ = make(2, 4, 2, 37, 37, 16, EXACT)
    for backend in flash_attn.BACKENDS:
        o = flash_attention(q, k, v, backend=backend)
        torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    for window, documents in ((9, None), (None, "packed"), (5, "mixed")):
        ids = make(2, 4, 2, 37, 37, 16, documents=documents)[-1]
        a, b = (flash_attention(q, k, v, window=window, documents=ids, backend=x) for x in ("sdpa", "torch"))
        torch.testing.assert_close(a, b)
    for T, S in ((20, 50), (50, 20), (1, 9)):                          # the last query sees the last key
        for causal in (True, False):
            q, k, v, _, _, _ = make(2, 4, 2, T, S, 16, EXACT)
            hidden = torch.ones(T, S, dtype=torch.bool).triu(1 + S - T) & causal
            s = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(hidden, -torch.inf)
            expected = s.softmax(-1).nan_to_num(0) @ v.repeat_interleave(2, 1)
            for backend in flash_attn.BACKENDS:
                torch.testing.assert_close(flash_attention(q, k, v, causal=causal, backend=backend), expected)


# ---- the Triton kernels ----------------------------------------------------------------------------------------------

def case_list(n, seed):
    """n random cases: every option, odd lengths and head dimensions, several tiles, pointers and descriptors."""
    rng, cases = random.Random(seed), []
    for i in range(n):
        T, S = rng.choice([(33, 33), (1, 40), (50, 20), (20, 50), (17, 64), (64, 64), (1, 1), (48, 48)])
        K, group = rng.choice([(1, 1), (2, 1), (1, 2), (2, 3)])
        B = rng.choice([1, 2])
        B = 1 if K * group * T * S > 2**13 else B                                      # the interpreter takes its time
        K = 1 if K * group * T * S > 2**13 else K
        cases.append((B, K * group, K, T, S, rng.choice([8, 16, 5, 24, 32]),
                      rng.random() < 0.6, rng.choice([None, None, 1, 7, 20]), rng.choice([None, "packed", "mixed"]),
                      *rng.choice([(16, 16), (32, 16), (16, 32)]), rng.random() < 0.4, i))
    return cases


needs_interpreter = pytest.mark.skipif(not flash_attn.INTERPRET, reason="float64 kernels run in the interpreter alone")


@needs_interpreter
@pytest.mark.parametrize("B, H, K, T, S, D, causal, window, documents, m, n, tma, seed", [
    (1, 2, 1, 20, 50, 16, True, None, None, 16, 16, False, 0), *case_list(32, 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in case_list(260, 2))])
def test_kernels_equal_tiled(monkeypatch, B, H, K, T, S, D, causal, window, documents, m, n, tma, seed):
    tile(monkeypatch, m, n, tma)
    *tensors, ids = make(B, H, K, T, S, D, documents=documents, seed=seed)
    options = causal, 0.3, window, ids
    ours, expected = (gradients(f, *tensors, *options) for f in (kernels, tiled))
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda msg, name=name: f"{name}: {msg}")


BIG = [(113, 203), (128, 217), (108, 256), (1, 147), (64, 800), (255, 256)]                                     # T, S
HEADS = [(32, True), (59, False), (80, True), (96, False), (111, True), (128, False), (256, True)]           # D, causal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T, S, D, causal", [
    (113, 203, 40, True), (64, 70, 64, False),
    *(pytest.param(*size, *head, marks=pytest.mark.slow) for size, head in itertools.product(BIG, HEADS))])
def test_rounding(dtype, T, S, D, causal, monkeypatch):
    """Our error against float64 is at most 2x (gradients 3x) that of plain torch in the same dtype, plus a tiny
    constant: plain torch may hit a result exactly."""
    tile(monkeypatch, 64, 64)
    *tensors, _ = make(1, 2, 1, T, S, D, dtype)
    options = causal, D ** -0.5, None, None
    plain = lambda q, k, v, c, *_: flash_attention(q, k, v, causal=c, backend="reference", return_lse=True)
    exact = gradients(plain, *(x.double() for x in tensors), *options)
    theirs, ours = (gradients(f, *tensors, *options) for f in (plain, kernels))
    for i, name in enumerate(("o", "lse", "dq", "dk", "dv")):
        there = exact[i].isfinite()
        error, bound = ((x[i].double() - exact[i])[there].abs().max().item() for x in (ours, theirs))
        assert error <= (3 if i > 1 else 2) * bound + 2e-6, (name, error, bound)


def test_a_very_negative_lse_shows_missing_tail_masks(monkeypatch):
    """Padded keys score 0; with lse = -300 an unmasked one would have p = exp(300)."""
    tile(monkeypatch, 16, 16)
    q, k, v, do, dlse, _ = make(1, 1, 1, 20, 20, 16, torch.float32)
    q, k = q.abs() * 10, -k.abs() * 10
    ours, expected = (gradients(f, q, k, v, do, dlse, False, 1.0, None, None) for f in (kernels, tiled))
    assert expected[1].max() < -300
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_expanded_gradient_and_repeatable_bits(monkeypatch):
    tile(monkeypatch, 16, 16)
    q, k, v, *_ = make(1, 2, 1, 20, 20, 16, torch.float32)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    runs = [torch.autograd.grad(flash_attention(q, k, v, backend="triton").sum(), (q, k, v)) for _ in range(2)]
    plain = torch.autograd.grad(flash_attention(q, k, v, backend="reference").sum(), (q, k, v))
    for a, b, c in zip(*runs, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


@needs_interpreter
def test_offsets_beyond_2_to_the_31(monkeypatch):
    """The third head lies 2**31 elements behind the first, rows 2**22 apart. Nothing is allocated but the pages
    touched. A matrix that is longer than 2**31 is copied: within it, offsets have 32 bits."""
    tile(monkeypatch, 64, 64)
    q, k, v, *_ = make(1, 3, 3, 7, 255, 16, torch.float16)
    far = torch.empty(2**30 * 3, dtype=torch.float16).as_strided(k.shape, (0, 2**30, 2**22, 1)).copy_(k)
    with interpreter.strict_int32():
        o = flash_attn.flash_forward_triton(q, far, v, False, 0.3, None, None)[0]
    assert torch.equal(o, flash_attn.flash_forward_triton(q, k, v, False, 0.3, None, None)[0])
    assert flash_attn.dense(far) is far
    longer = torch.empty(2**22 * 300, device="meta").as_strided((1, 1, 300, 16), (0, 0, 2**22, 1))
    assert flash_attn.dense(longer).is_contiguous()


def traffic(q, k, documents, limits, blocks, dlse=False) -> dict:
    """Bytes that each kernel asks of memory, {kernel: (requested, distinct)}.

    q, k: tensors of the shapes and dtype asked about (the meta device will do); limits: the mask; documents: whether
    the kernels read it; blocks: {kernel: (BLOCK_M, BLOCK_N)}.
    requested: every tile counted each time it is loaded; a K/V tile that is still in the L2 cache costs HBM nothing.
    distinct: every byte that a launch touches counted once: what HBM moves if the caches hold all that is shared. The
    truth lies between. Scores appear in neither. (Dao 2022, theorem 2, has the order: T S D^2 / SRAM size.)
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    number, row = flash_attn.accumulator(q.dtype).itemsize, D * q.itemsize        # row: of q, k, v, o, do, dq, dk or dv
    queries, keys, group, result = B * H * T, B * K * S, H // K, {}
    for name, own, walked, other in (
            ("_attn_fwd", queries * (2 * row + number), 2 * row, keys * 2 * row),
            ("_bwd_dq", queries * (4 * row + (3 + dlse) * number), 2 * row, keys * 2 * row),
            ("_bwd_dkdv", keys * 4 * row, 2 * row + 2 * number, queries * (2 * row + 2 * number))):
        by_keys = name == "_bwd_dkdv"
        n, stop, bounds = (S, T, limits[:, :, T:]) if by_keys else (T, S, limits[:, :, :T])
        block, step = blocks[name][::-1] if by_keys else blocks[name]
        lo, _, _, hi = flash_attn.tiles(*bounds, block, step).unbind(-1)
        end = ((hi + step - 1) // step * step).clamp(max=stop).where(hi > lo, lo)
        seen = int((end - lo).sum()) * (B // limits.shape[1]) * H               # positions walked over, by all programs
        # limits, 8 bytes per position: of the first and the last one for the walk, of all at the edges, which _bwd_dkdv
        # visits once per query head
        programs = lo.shape[1] * B * (K if by_keys else H)
        read = documents * 8 * (2 * programs + (keys * group if by_keys else queries))
        result[name] = own + read + seen * walked, own + documents * 8 * B * n + other
    return result


@needs_interpreter
@pytest.mark.parametrize("T, S, K, group, D, m, n, causal, window, documents, tma", [
    (64, 64, 1, 1, 16, 16, 16, True, None, None, False), (40, 40, 1, 2, 24, 16, 32, True, None, None, False),
    (40, 56, 1, 2, 16, 32, 16, True, 20, "packed", False), (64, 64, 2, 1, 16, 32, 16, False, None, "mixed", False),
    (48, 48, 2, 1, 16, 16, 16, True, None, "packed", True)])
def test_traffic_is_the_formula(T, S, K, group, D, m, n, causal, window, documents, tma, monkeypatch):
    tile(monkeypatch, m, n, tma)
    q, k, v, do, dlse, ids = make(2, K * group, K, T, S, D, torch.float32, documents)
    q, k, v, do = (x.contiguous() for x in (q, k, v, do))
    o, lse, row_sums = torch.empty_like(q), torch.zeros_like(dlse), torch.zeros(2, *dlse.shape)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    limits = flash_attn.limits(T, S, causal, window, ids, q.device)
    named = [q, k, v, do, dlse, o, lse, row_sums, dq, dk, dv, limits]
    run = lambda name, matrices, *vectors: lambda: flash_attn.launch(
        name, (causal, 0.3, window), matrices, (*vectors, limits if documents else None))
    kernels = {"_attn_fwd": run("_attn_fwd", (q, k, v, o), lse),
               "_bwd_dq": run("_bwd_dq", (q, k, v, do, o, dq), lse, dlse, row_sums),
               "_bwd_dkdv": run("_bwd_dkdv", (q, k, v, do, dk, dv), row_sums)}
    counted = {name: interpreter.count_traffic(kernel, named) for name, kernel in kernels.items()}
    assert counted == traffic(q, k, bool(documents), limits, dict.fromkeys(KERNELS, (m, n)), dlse=True)
    with pytest.raises(Exception, match="outside its tensors"):
        interpreter.count_traffic(kernels["_attn_fwd"], named[1:])


def count_passes(function, q, k, v, do):
    """How often a (B, H, T, S) matrix crosses the memory bus in forward and in backward: every operator of autograd's
    reads its inputs and writes its outputs. On the meta device: nothing is computed."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]

    class Count(TorchDispatchMode):
        passes = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            read, written = ([x for x in tree_leaves(side) if isinstance(x, torch.Tensor)] for side in (args, out))
            stored = [{x.untyped_storage()._cdata for x in side} for side in (read, written)]
            if not stored[0] & stored[1]:                                                                     # no view
                self.passes += sum(x.numel() == scores and x.dtype != torch.bool for x in read + written)
            return out

    with Count() as forward:
        o = function(q, k, v)
    with Count() as backward:
        o.backward(do)
    return forward.passes, backward.passes


def test_traffic_of_the_textbook_and_of_the_paper():
    """The textbook's passes over the matrix. Then Dao 2022, figure 2 (left): GPT-2 medium's attention, batch 64,
    forward + backward on an A100: 40.3 GB and 4.4 GB were measured, between our bounds. Textbook: the paper's has one
    mask and dropout; ours without any mask (8 of the 23 passes are the two fills') is below it, with both above. Flash:
    all tiles hit the L2 cache, or none does."""
    meta = [torch.empty(2, 4, 64, 32, device="meta", requires_grad=True) for _ in range(3)]
    passes = count_passes(lambda q, k, v: attention_reference(q, k, v, causal=True), *meta, torch.empty_like(meta[0]))
    assert passes == (10, 13)
    q = torch.empty(64, 16, 1024, 64, dtype=torch.float16, device="meta")
    blocks = {name: choices[0][:2] for name, choices in flash_attn.CONFIGS["pointers"][128].items()}
    kernels = traffic(q, q, False, flash_attn.limits(1024, 1024, False), blocks)
    requested, distinct = (sum(side) / 1e9 for side in zip(*kernels.values(), strict=True))
    matrix, rows = q.numel() // 64 * 1024 * 2, 12 * q.nbytes                           # q k v o; do o q k v again; ...
    plain, fills = (rows + 15 * matrix) / 1e9, 8 * matrix / 1e9
    assert plain < 40.3 < plain + fills and distinct < 4.4 < requested


# ---- launching -------------------------------------------------------------------------------------------------------

class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


class FakeKernel:
    """In the place of a Triton kernel, its autotuner and what it compiles to: keeps the arguments of each launch by
    their names, and computes nothing."""

    def __init__(self, name, launched):
        self.names = list(inspect.signature(getattr(flash_attn, name).fn).parameters)
        self.name, self.launched, self.best_config = name, launched, flash_attn.configs(name, 32, "pointers")[0]

    def __getitem__(self, grid):
        def first(*args, **options):
            blocks = self.best_config.kwargs
            self.keep("first", grid(blocks), [{**dict(zip(self.names, args, strict=False)), **options, **blocks}[name]
                                              for name in self.names])
            return Compiled()

        class Compiled:
            def __getitem__(_, grid):
                return lambda *args: self.keep("again", grid, list(args))
        return first

    def keep(self, when, grid, args):
        tensors = [x if not isinstance(x, torch.Tensor) else (x.shape, x.stride(), x.dtype) for x in args]
        self.launched.append((self.name, when, grid, dict(zip(self.names, tensors, strict=True))))


@pytest.fixture
def launched(monkeypatch):
    """What is launched, where the kernels are stubs and a GPU is said to be there."""
    launched = []
    monkeypatch.setattr(flash_attn, "INTERPRET", False)
    monkeypatch.setattr(flash_attn, "LAUNCHES", {})
    monkeypatch.setattr(flash_attn, "resolve_backend", lambda backend, *_: backend)
    monkeypatch.setattr(flash_attn, "capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_attn, "tuned", lambda name, *_: FakeKernel(name, launched))
    return launched


@needs_interpreter
@pytest.mark.parametrize("documents", [False, True])
def test_a_call_is_six_operations(documents, launched):
    """Forward makes o and lse; backward dq, dk, dv and the row sums. autograd detaches what it saved of the outputs, as
    for torch's own attention. Limits are made once per batch, not per call."""
    q, k, v, do, _, _ = make(2, 4, 2, 40, 40, 16, torch.float16)
    x = [x.requires_grad_() for x in (q, k, v)]
    limits = flash_attn.document_limits(torch.arange(40).div(9, rounding_mode="floor").expand(2, -1))
    for _ in range(2):                                                    # the first call, and those after it
        with CountOperations() as forward:
            o = flash_attention(*x, documents=limits if documents else None, backend="triton")
        with CountOperations() as backward:
            torch.autograd.grad(o, x, do)
        ours = [name for name in forward.names + backward.names if "detach" not in name]
        assert len(ours) == 6 and all("empty" in name for name in ours), ours
        assert len(forward.names) == 4 and len(backward.names) == 6


@needs_interpreter
def test_a_second_launch_is_told_what_the_first_was(launched, monkeypatch):
    """The arguments kept for a shape are those of a new launch. Another shape, stride, alignment, scale, mask, dtype or
    precision is launched anew."""
    def run(*shape, scale=0.3, documents=None, dtype=torch.float16, shift=0, window=None, causal=True,
            k_stride=None, precision="highest"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
        q, k, v, do, _, ids = make(*shape, dtype, documents)
        k = k.contiguous() if k_stride else k
        q = torch.empty(q.numel() + shift, dtype=dtype)[shift:].view(q.shape).copy_(q)
        x = [t.requires_grad_() for t in (q, k, v)]
        o, lse = kernels(*x, causal, scale, window, ids)
        torch.autograd.grad((o, lse)[:1 + (scale > 0.3)], x, (do, torch.ones_like(lse))[:1 + (scale > 0.3)])
        done = list(launched)
        launched.clear()
        assert [name for name, *_ in done] == ["_attn_fwd", "_bwd_dq", "_bwd_dkdv"]
        return done

    calls = [((2, 4, 2, 40, 40, 16), {}), ((2, 4, 2, 40, 56, 16), {}), ((2, 4, 4, 40, 40, 16), {}),
             ((2, 4, 2, 40, 40, 16), {"shift": 1}), ((2, 4, 2, 40, 40, 16), {"scale": 0.4}),
             ((2, 4, 2, 40, 40, 16), {"documents": "packed"}), ((2, 4, 2, 40, 40, 16), {"window": 7}),
             ((2, 4, 2, 40, 40, 16), {"causal": False}), ((2, 4, 2, 40, 40, 16), {"dtype": torch.bfloat16}),
             ((2, 4, 2, 40, 40, 16), {"k_stride": True}), ((2, 4, 2, 40, 40, 16), {"precision": "high"})]
    seen = []
    for shape, options in calls:
        first, again = run(*shape, **options), run(*shape, **options)
        assert {when for _, when, *_ in first} == {"first"} and {when for _, when, *_ in again} == {"again"}
        assert [(name, *what) for name, _, *what in first] == [(name, *what) for name, _, *what in again]
        assert first not in seen or options == {"shift": 1}
        seen.append(first)


@needs_interpreter
def test_launches_of_ever_new_shapes_are_forgotten(launched, monkeypatch):
    monkeypatch.setattr(flash_attn, "MAX_LAUNCHES", 3)
    q, k, v, *_ = make(1, 1, 1, 1, 20, 16, torch.float16)
    for S in range(1, 20):
        flash_attention(q, k[:, :, :S], v[:, :, :S], backend="triton")
    assert 0 < len(flash_attn.LAUNCHES) <= 3


def test_tiles_skip_what_no_one_sees():
    """Three packed documents of 32, in tiles of 16: each query tile visits its own document's two key tiles, whole."""
    walk = lambda T, *mask: flash_attn.tiles(*flash_attn.limits(T, T, *mask)[:, :, :T], 16, 16)[0].tolist()
    ids = torch.arange(96).div(32, rounding_mode="floor")[None] * -7
    ranges = walk(96, False, None, ids)
    assert ranges == [[d * 32, d * 32, d * 32 + 32, d * 32 + 32] for d in range(3) for _ in range(2)]
    ranges = walk(64, True, 16, None)
    assert [(lo, hi) for lo, _, _, hi in ranges] == [(0, 16), (0, 32), (16, 48), (32, 64)]


@pytest.mark.parametrize("T, S", [(20, 50), (50, 20)])
@pytest.mark.parametrize("causal, window", [(True, None), (False, 7)])
def test_limits_made_once_are_the_ids(causal, window, T, S, monkeypatch):
    """All backends take what limits() made of ids, causal and window."""
    tile(monkeypatch, 16, 16)
    q, k, v, do, dlse, ids = make(2, 2, 1, T, S, 8, EXACT, "mixed")
    limits = flash_attn.limits(T, S, causal, window, ids)
    assert limits.shape == (2, 2, T + S) and limits.dtype == torch.int32
    expected = gradients(oracle, q, k, v, do, dlse, causal, 8**-0.5, window, ids)
    for backend in ("torch", "reference", *["triton"] * flash_attn.INTERPRET):
        ours = gradients(lambda *qkv, b=backend: flash_attention(*qkv, documents=limits, return_lse=True, backend=b),
                         q, k, v, do, dlse)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(flash_attention(q, k, v, documents=limits, backend="sdpa"), expected[0])


def test_an_id_that_comes_back_is_a_new_document():
    """For flash attention and for the model's own mask."""
    ids, numbered = torch.tensor([[7, 7, 3, 7, 7, 7]]), torch.tensor([[0, 0, 1, 2, 2, 2]])
    assert torch.equal(*(flash_attn.document_limits(x) for x in (ids, numbered)))
    assert flash_attn.document_limits(ids)[:, 0, :6].tolist() == [[0, 0, 2, 3, 3, 3], [1, 2, 3, 4, 5, 6]]
    q = torch.empty(1, 1, 6, 8)
    hidden = ~flash_attn.visible(q, q, True, None, ids)
    assert torch.equal(net.document_mask(ids, torch.float32), torch.zeros(1, 1, 6, 6).masked_fill(hidden, -torch.inf))


@pytest.mark.parametrize("backend", ["torch", *["triton"] * flash_attn.INTERPRET])
def test_the_model_makes_limits_once_per_batch(backend, monkeypatch):
    """train.py's prepare: every layer is handed the same limits."""
    seen, plain = [], flash_attn.flash_attention
    monkeypatch.setattr(flash_attn, "flash_attention",
                        lambda *qkv, documents, **options: seen.append(documents) or plain(
                            *qkv, documents=documents, **options))
    tokens = torch.arange(20)[None] % 7
    ids = torch.arange(20).div(6, rounding_mode="floor")[None]
    losses = []
    for attention in (backend, "sdpa"):
        c = train.parse_config(["--attention", attention, "--n-layer", "2", "--precision", "fp32"])
        gpt = train.make_stage(c, torch.device("cpu"))
        losses.append(gpt(tokens, tokens, documents=ids)[0].item())
    assert len(seen) == 2 and seen[0] is seen[1] and torch.equal(seen[0], flash_attn.document_limits(ids))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_ids_changed_in_place_are_another_mask():
    q, k, v, _, _, ids = (x.cpu() for x in make(1, 1, 1, 20, 20, 8, documents="packed"))
    for context in (contextlib.nullcontext, torch.inference_mode):        # inference tensors count no versions
        with context():
            ids = ids.clone()
            for value in (ids, 0, torch.arange(20)):
                ids.numpy()[:] = value                                    # nor does torch see this
                torch.testing.assert_close(flash_attention(q, k, v, documents=ids, backend="torch"),
                                           attention_reference(q, k, v, causal=True, documents=ids))


def test_rows_that_see_nothing_take_no_gradient(monkeypatch):
    """The sequence split over ranks: parts are weighed by exp(lse - total), and d total / d lse of an empty row is NaN.
    Nothing of it may reach the keys."""
    tile(monkeypatch, 16, 16)
    q, k, v, do, dlse, _ = make(1, 2, 1, 20, 12, 8)
    for function in (tiled, kernels)[:2 if flash_attn.INTERPRET else 1]:
        x = [t.detach().requires_grad_() for t in (q, k, v)]
        o, lse = function(*x, True, 0.3)
        empty = lse.isinf()
        assert empty.any() and (o[empty] == 0).all()
        dlse = dlse.masked_fill(empty, torch.nan)
        got = torch.autograd.grad((o, lse), x, (do, dlse))
        y = [t.detach().requires_grad_() for t in (q[:, :, 8:], k, v)]
        expected = torch.autograd.grad(function(*y, True, 0.3), y, (do[:, :, 8:], dlse[:, :, 8:]))
        assert (got[0][:, :, :8] == 0).all()
        for a, b in zip((got[0][:, :, 8:], *got[1:]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_large_scores_round_as_said():
    """p = exp(s - lse): with scores near 1000 the relative error of p, and of dv, is some |s| 2^-22."""
    q, k, v, do, dlse, _ = make(1, 1, 1, 64, 64, 16, torch.float32, scale=16)
    options = True, 1.0, None, None
    plain = functools.partial(flash_attention, causal=True, sm_scale=1.0, backend="reference", return_lse=True)
    exact = gradients(lambda q, k, v, *_: plain(q, k, v), *(x.double() for x in (q, k, v, do, dlse)), *options)
    ours = gradients(tiled, q, k, v, do, dlse, *options)
    largest = (q @ k.mT).abs().max().item()
    assert largest > 1000
    assert (ours[4] - exact[4]).abs().max() < largest * 2**-22 * do.abs().sum()


# ---- flash_attention, the function -----------------------------------------------------------------------------------

def test_one_head_lse_and_decode():
    q, k, v, *_ = make(2, 1, 1, 9, 9, 8, EXACT)
    o, lse = flash_attention(q[:, 0], k[:, 0], v[:, 0], return_lse=True)
    assert o.shape == (2, 9, 8) and lse.shape == (2, 9)
    torch.testing.assert_close(o, attention_reference(q, k, v, causal=True)[:, 0])
    torch.testing.assert_close(tiled(q[:, 0], k[:, 0], v[:, 0])[0], o)
    for backend in flash_attn.BACKENDS:                                   # the last query alone: a decode step
        torch.testing.assert_close(flash_attention(q[:, :, -1:], k, v, backend=backend)[:, 0, 0], o[:, -1])


@pytest.mark.filterwarnings("default")                                    # torch.compile's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_operator_compile_checkpoint_autocast(backend):
    q, k, v, do, _, ids = make(1, 2, 1, 20, 20, 8, torch.float32, "packed")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask, qkv = flash_attn.document_limits(ids), [x.detach() for x in (q, k, v)]
    o, lse = (x.detach() for x in tiled(q, k, v, True, 0.3, None, ids))
    for inputs, dlse in ((qkv, lse * 0), (qkv, None), ([x.mT.contiguous().mT for x in qkv], None)):
        torch.library.opcheck(torch.ops.flash_attn.forward.default, (*inputs, True, 0.3, None, mask, "torch"))
        torch.library.opcheck(torch.ops.flash_attn.backward.default,
                              (do, dlse, *inputs, o, lse, True, 0.3, None, mask, "torch"))
    compiled = functools.partial(torch.compile, backend=backend)
    apply = lambda q, k, v: tiled(q, k, v, True, None, None, ids)[0]
    torch.testing.assert_close(compiled(apply)(q, k, v), apply(q, k, v))
    f = lambda q, k, v: flash_attention(q.sin(), k, v, documents=ids, backend="torch") * 2
    plain = f(q, k, v), *torch.autograd.grad(f(q, k, v), (q, k, v), do)
    for other in (compiled(f, fullgraph=True),
                  functools.partial(torch.utils.checkpoint.checkpoint, f, use_reentrant=False)):
        o = other(q, k, v)
        for a, b in zip((o, *torch.autograd.grad(o, (q, k, v), do)), plain, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast(DEVICE, torch.bfloat16):
        o = flash_attention(q, k, v, documents=ids, backend="torch")
    assert o.dtype == torch.bfloat16 and torch.autograd.grad(o, q, do.bfloat16())[0].dtype == torch.float32


def test_under_autocast_wrong_dtypes_stay_wrong():
    q, k, v, *_ = make(1, 1, 1, 5, 5, 4, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        for bad in ((q.long(), k.long(), v.long()), (q, k.double(), v), (q.to(torch.complex64), k, v)):
            with pytest.raises(ValueError, match="one floating-point dtype"):
                flash_attention(*bad, backend="torch")


@pytest.mark.filterwarnings("default")                                    # torch's own
def test_forward_mode_is_refused():
    q, k, v, *_ = make(1, 1, 1, 5, 5, 4)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="implement the jvp function"):
        flash_attention(torch.autograd.forward_ad.make_dual(q, q), k, v, backend="torch")


@needs_interpreter
def test_the_stock_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.setattr(flash_attn, "INTERPRETED", {torch.float32})
    q, k, v, *_ = make(1, 1, 1, 5, 5, 4, torch.bfloat16)
    with pytest.raises(RuntimeError, match="bits of torch.bfloat16"):
        flash_attention(q, k, v, backend="triton")


def test_what_the_kernels_are_told(monkeypatch):
    """Precision, and the copy engine: where strides, alignment, the chip and the length of a walk allow it."""
    told = lambda x, chip, name="_attn_fwd": flash_attn.arguments(name, [x] * 4, True, 1.0, None, chip)[1]
    x = torch.empty(1, 1, flash_attn.TMA_FROM, 16, dtype=torch.float16)
    monkeypatch.setattr(flash_attn, "TMA", None)
    assert [told(x, chip)["TMA"] for chip in ((8, 0), (9, 0), (10, 0), (12, 0), (0, 0))] == [0, 1, 1, 0, 0]
    n = x.shape[2]
    short, wide = x[:, :, 1:], torch.empty(1, 1, n - 1, 128, dtype=torch.float16)
    assert not told(short, (9, 0))["TMA"] and told(wide, (9, 0))["TMA"]
    for other in (torch.empty(1, 1, n, 17, dtype=torch.float16)[..., :16], x[:, :, :1].expand(x.shape),
                  torch.empty(16 * n + 1)[1:].view(1, 1, n, 16)):
        assert not told(other, (9, 0))["TMA"]
    for precision, expected in (("highest", "ieee"), ("high", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda p=precision: p)
        assert told(x, (9, 0))["PRECISION"] == expected


def test_second_derivatives_are_refused():
    q, k, v, *_ = (x.requires_grad_() for x in make(1, 1, 1, 5, 5, 4)[:3])
    first, = torch.autograd.grad(flash_attention(q, k, v, backend="torch").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


X = torch.zeros(2, 4, 8, 16)


@pytest.mark.parametrize("q, k, v, options, message", [
    (X[0, 0], X, X, {}, r"q must be \(B, H, T, D\)"), (X, X[0], X, {}, "k must be"),
    (X, X[:, :3], X[:, :3], {}, "multiple of k's"), (X, X, X[:, :, :4], {}, "k and v must be"),
    (X, X[:1], X[:1], {}, "k and v must be"), (X, X.half(), X, {}, "one floating-point dtype"),
    (X, X, X.half(), {}, "one floating-point dtype"), (X, X, X.to("meta"), {}, "one device"),
    (X.long(), X.long(), X.long(), {}, "floating-point dtype"), (X, X.to("meta"), X, {}, "one device"),
    (X[:, :, :0], X, X, {}, "not empty"), (torch.zeros(1, 1, 2, 257),) * 3 + ({}, "at most 256"),
    (X, X, X, {"window": -1}, "window must be at least 1"), (X, X, X, {"window": 0}, "window must be at least 1"),
    (X, X, X, {"window": 2.5}, "window must be"), (X, X, X, {"window": True}, "window must be"),
    (X, X, X, {"sm_scale": -1.0}, "sm_scale"), (X, X, X, {"sm_scale": 1e-46}, "sm_scale"),
    (X, X, X, {"sm_scale": torch.ones(())}, "sm_scale"), (X, X, X, {"backend": "cuda"}, "backend must be one"),
    (X, X, X, {"documents": [[0] * 8] * 2}, "documents must be a tensor"),
    (X.to(torch.float8_e4m3fn),) * 3 + ({}, "floating-point dtype"),
    (X, X, X, {"documents": torch.zeros(2, 7, dtype=torch.long)}, "documents must be"),
    (X, X, X, {"documents": torch.zeros(2, 8)}, "documents must be"),
    (X, X, X, {"documents": torch.zeros(2, 2, 16)}, "documents must be ids"),
    (X, X, X, {"documents": torch.zeros(2, 2, 15, dtype=torch.int32)}, "documents must be ids"),
    (X, X, X, {"documents": torch.zeros(2, 2, 16, dtype=torch.int32), "window": 3}, "with window None"),
    (X, X, X, {"backend": "sdpa", "return_lse": True}, "gives no lse")])
def test_bad_input_is_one_line(q, k, v, options, message):
    right = torch.zeros(2, 8, dtype=torch.long)
    for good in ({}, {"window": 1}, {"window": np.int64(1)}, {"documents": right},
                 {"documents": flash_attn.document_limits(right)}):
        flash_attention(X, X, X, **good)
    with pytest.raises(ValueError, match=message) as error:
        flash_attention(q, k, v, **options)
    assert "\n" not in str(error.value)


def module_from(source, folder, name):
    """flash_attn.py with another text, as a module; the operators' names are taken by the right one."""
    file = folder / "flash_attn.py"
    file.write_text(source.replace('Library("flash_attn"', f'Library("{name}"').replace('"flash_attn::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = (ROOT / "flash_attn.py").read_text()


def test_triton_where_it_cannot_run(monkeypatch, tmp_path):
    """Without the triton package, and without a GPU and the interpreter: the others run, and triton says why not."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        without = module_from(SOURCE, tmp_path, "without_triton")
    monkeypatch.setattr(flash_attn, "INTERPRET", False)
    x = torch.ones(1, 1, 4, 8)
    for module, message in ((without, "no triton package is installed"),
                            (flash_attn, "needs tensors on a GPU of NVIDIA's, or TRITON_INTERPRET=1")):
        assert module.flash_attention(x, x, x, backend="torch").shape == x.shape
        with pytest.raises(RuntimeError, match=message) as error:
            module.flash_attention(x, x, x, backend="triton")
        assert "the others are torch, sdpa, reference" in str(error.value)


@pytest.mark.skipif(flash_attn.triton is None, reason="no triton package here")
@pytest.mark.parametrize("command", ["bench_flash_static.py --quick", *(pytest.param(command, marks=pytest.mark.slow)
                                     for command in ("bench_flash_static.py", "bench_launch.py --quick"))])
def test_machine_code_and_launches(command):
    """In processes of their own: here kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    answer = subprocess.run([sys.executable, *command.split()], cwd=ROOT / "tests" / "bench", env=environment,
                            capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without one")
def test_bench_gpu_needs_one():
    with pytest.raises(SystemExit, match="bench_gpu.py measures a GPU, and torch finds none here"):
        bench_gpu.main([])


# ---- break it: planted errors turn these tests red -------------------------------------------------------------------

PLANTED = {  # what is wrong -> (the line, what it becomes)
    "torch: alpha not applied to o": ("acc.mul_(alpha).addmm_(p, v_j)", "acc.addmm_(p, v_j)"),
    "torch: alpha not applied to l": ("l_i.mul_(alpha).add_(", "l_i.add_("),
    "torch: no delta": ("minus_delta = -(dof", "minus_delta = -0 * (dof"),
    "torch: no scale in dq": ("dq_i.mul_(sm_scale)", "dq_i"),
    "torch: a masked tile taken as full": ("stop[:, top] // step", "stop[:, end] // step"),
    "masks: < for <=": ("(place + (after + 1)).clamp", "(place + after).clamp"),
    "masks: the next document is seen": ("torch.minimum(stop, run_stop)", "stop.expand(run_stop.shape)"),
    "triton: the wrong group's keys": ("k = _matrix(k, sk, b, h // GROUP,", "k = _matrix(k, sk, b, h % GROUP,"),
    "triton: alpha not applied to o": ("v, acc * alpha[:, None], input", "v, acc, input"),
    "triton: no delta in dk": ("ds = p * (dp - delta[None, :])", "ds = p * dp"),
    "triton: dlse forgotten": ("delta_i -= tl.where(", "delta_i -= 0 * tl.where("),
    "triton: the last edge tile dropped": ("tl.range(lo, hi - (full_hi", "tl.range(lo, hi - 16 - (full_hi"),
    "triton: dk not scaled": ("dk_j * (SCALE * LN2)", "dk_j"),
    "triton: < for <= without documents": ("tl.minimum(place + after + 1, other)", "tl.minimum(place + after, other)"),
    "triton: the limits of the queries for the keys": ("limits += b * (T + S) + T", "limits += b * (T + S)"),
    "triton: the limits of the first row for all": ("limits += b * (T + S)\n", "limits += 0\n")}


@functools.cache
def planted_case(causal, documents):
    """What a planted error is run on, and what the oracle says of it."""
    *tensors, ids = make(2, 2, 1, 28, 28, 8, documents=documents)
    inputs = *tensors, causal, 0.3, None, ids
    return inputs, gradients(oracle, *inputs)


@needs_interpreter
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_error_turns_red(what, monkeypatch, tmp_path):
    right, wrong = PLANTED[what]
    assert right in SOURCE, "the line is no more: plant another error"
    module = module_from(SOURCE.replace(right, wrong), tmp_path, f"planted{list(PLANTED).index(what)}")
    monkeypatch.setattr(module, "TILE", 16)
    tile(monkeypatch, 16, 16)
    monkeypatch.setattr(module, "PINNED", flash_attn.PINNED)
    function = functools.partial(attend, "triton" if what.startswith("triton") else "torch", module=module)
    worst = 0.0
    for causal, documents in ((True, None), (True, "mixed"), (False, "mixed")):
        inputs, expected = planted_case(causal, documents)
        ours = gradients(function, *inputs)
        worst = max(worst, *((a - b).abs().nan_to_num(0).max().item() for a, b in zip(ours, expected, strict=True)))
        if worst > 1e-3:
            break
    assert worst > 1e-3, f"{what}: no test would have noticed"
