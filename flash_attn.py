"""Attention without the matrix: FlashAttention, forward and backward, in torch and in Triton.

    s = q k^T * sm_scale        p = softmax(s)        o = p v             q (T, D); k, v (S, D); s, p (T, S); o (T, D)

The products are cheap; the matrix between them is not. At T = S = 8192 one head's s is 134 MB in half precision, and
the textbook program below moves it ten times forward and thirteen times backward, over a memory bus (HBM) that moves
one number in the time the tensor cores take for hundreds of multiplications. So: never write it. Three ideas.

1. Tiling. A program takes BLOCK_M queries and walks over the keys BLOCK_N at a time. The tile of scores lives in
   registers and on-chip memory (SRAM) and is dropped; HBM sees q, k, v, o and one number a row.

2. Online softmax. A softmax needs its row's maximum and sum, and the row is never all there. Keep them as they come:

       m' = max(m, max_j s_j)     alpha = exp(m - m')     l' = alpha l + sum_j exp(s_j - m')
                                                          o' = alpha o + sum_j exp(s_j - m') v_j
   and at the end  o / l  and  lse = m + log l.  Nothing is approximated.

3. Recomputation. Backward needs p again. Keeping it would be the matrix again, so it is made again, tile by tile, from
   q, k and the one number a row that forward kept:  p_ij = exp(s_ij - lse_i).

       dv = p^T do      dp = do v^T      ds = p * (dp - delta)      dq = ds k * sm_scale      dk = ds^T q * sm_scale
       delta_i = sum_j p_ij dp_ij = sum_d do_id o_id                      (Dao 2022, section 3.1 and appendix B)

    symbol   in code      what                                 shape          dtype
    q k v o  q k v o      queries, keys, values, output        (B, H, T, D)   any float; k, v (B, H_kv, S, D)
    m_i l_i  m_i l_i      running maximum, running sum         rows           float32, or float64 for float64
    lse      lse          log sum exp of a row                 (B, H, T)      the same; -inf where no key is visible
    delta    delta        rowsum(do * o), minus dlse           (B, H, T)      the same
    alpha    alpha        what a new maximum does to the old   rows           the same
    B_r B_c  BLOCK_M BLOCK_N   queries, keys of a tile

Which keys a query sees. Query i sits at key position i + S - T: the last query at the last key. All the masks here
(causal, sliding window, packed documents, uneven ends) let a query see *an interval of keys*, and a key *an interval of
queries*. `limits` computes both, four integers a row, in a few lines of torch. A tile outside every row's interval is
skipped, a tile inside all of them needs no mask, and the rest is compared with its limits (and, where a document's id
may come back after another, with the ids). Another mask of this kind, a prefix or a chunk: change `interval`, and
`visible`, which says the same as a matrix for the two backends that want one.

Where it rounds. p = exp(s - lse) subtracts two numbers of the size of the scores: with |s| in the thousands and float32
its relative error is some |s| 2^-22, where a softmax that still has its row is exact.

What it costs, T = S, forward / backward:  FLOPs 4 T^2 D / 10 T^2 D a head (recomputing s is the fifth product; two
separate backward kernels make it seven: 14 T^2 D), halved by causality. Memory O(T). HBM bytes: `traffic`, below.

Map: limits - attention_reference - online softmax - the tiled version in torch - the Triton kernels - flash_attention,
the function to call - traffic - demo. Not here: dropout, ALiBi and other score changes, paged KV caches, FP8.

Sources: FlashAttention (Dao 2022, arXiv:2205.14135); FlashAttention-2 (Dao 2023, 2307.08691): loops swapped;
online softmax (Milakov and Gimelshein 2018, 1805.02867); GQA (2305.13245); Triton (Tillet 2019).

run: python flash_attn.py
"""

import ctypes
import functools
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # the demo then runs the kernels in triton's interpreter

try:
    import triton
    import triton.language as tl
except ImportError:                                      # no wheels outside Linux: the other backends work
    triton = None

LOG2E = math.log2(math.e)                                # exp(x) = exp2(x * LOG2E); hardware and vector units have exp2
INTERPRET = triton is not None and triton.knobs.runtime.interpret


def accumulator(dtype):
    """What sums are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def scale_of(q, sm_scale):
    return q.shape[-1] ** -0.5 if sm_scale is None else sm_scale


def heads(*tensors):
    """(B, n, D) is one head: (B, 1, n, D)."""
    return [x if x.ndim == 4 else x[:, None] for x in tensors]


# ---- which keys a query sees -----------------------------------------------------------------------------------------

def runs(x: Tensor):
    """x (B, L) -> the first and the last position of the unbroken run of equal values around each, (B, L) each."""
    position, new = torch.arange(x.shape[1], device=x.device), x[:, 1:] != x[:, :-1]
    starts, ends = F.pad(new, (1, 0), value=True), F.pad(new, (0, 1), value=True)
    return (torch.where(starts, position, 0).cummax(1).values,
            torch.where(ends, position, x.shape[1]).flip(1).cummin(1).values.flip(1))


def document_spans(documents: Tensor) -> Tensor:
    """documents (B, L) int -> (4, B, L): first and last position of the same id, first and last of the unbroken run.

        ids 7 7 3 7    first 0 0 2 0    last 3 3 2 3    of the run: first 0 0 2 3    last 1 1 2 3

    `first` is an id too, and fits 32 bits: equal ids have equal firsts.
    """
    ids, order = documents.sort(stable=True)
    first, last = (torch.empty_like(order).scatter(1, order, order.gather(1, edge)) for edge in runs(ids))
    return torch.stack((first, last, *runs(documents)))


def interval(n, other, num_before, num_after, spans, device):
    """What each of the n positions of one side sees of the other side, which has `other`: (4, B or 1, n) int32.

    [0], [1]: start and stop of what it may see.  [2], [3]: start and stop of where it sees everything: less only
    where a document's id comes back.  num_before, num_after: how far from its own place it sees.
    """
    place = torch.arange(n, device=device) + other - n
    start, stop = (place - num_before).clamp(0, other), (place + num_after + 1).clamp(0, other)
    bounds = torch.stack((start, stop, start, stop))[:, None]                                        # (4, 1, n)
    if spans is not None:
        L = spans.shape[-1]
        first, last, run_first, run_last = spans[:, :, L - n:] - (L - other)                         # (B, n) each
        bounds = torch.stack((torch.maximum(start, first), torch.minimum(stop, last + 1),
                              torch.maximum(start, run_first), torch.minimum(stop, run_last + 1)))
    return bounds.to(torch.int32).contiguous()


class Limits(NamedTuple):
    rows: Tensor               # (4, B or 1, T) int32: the keys of each query
    columns: Tensor            # (4, B or 1, S) int32: the queries of each key
    ids: Tensor | None         # (B, L) int32, L = max(T, S): queries are its last T, keys its last S; None without


def make_limits(T, S, causal, window, documents, device) -> Limits:
    """The mask, as intervals."""
    far, spans = T + S, None if documents is None else document_spans(documents)
    back = far if window is None else window - 1
    front = far if window is None and not causal else 0
    return Limits(interval(T, S, back, front, spans, device), interval(S, T, front, back, spans, device),
                  None if spans is None else spans[0].to(torch.int32).contiguous())


limits_of_shape = functools.lru_cache(maxsize=64)(make_limits)


def limits(T, S, causal, window, documents, device) -> Limits:
    """Made once for a shape; with documents, which may change in place, for each call."""
    return (limits_of_shape if documents is None else make_limits)(T, S, causal, window, documents, device)


def tiles(bounds: Tensor, block: int, step: int) -> Tensor:
    """What a program that holds `block` positions walks over in steps of `step`: (B or 1, blocks, 4) ints.

    (lo, full_lo, full_hi, hi): in [lo, hi) are all tiles that anyone sees, in [full_lo, full_hi) those that all see
    whole. lo, full_lo, full_hi are multiples of step, and the kernels compute the same.
    """
    n = bounds.shape[-1]
    last = torch.arange(-(-n // block) * block, device=bounds.device).clamp(max=n - 1)
    start, stop, full_start, full_stop = bounds[:, :, last].unflatten(-1, (-1, block))              # (B, blocks, block)
    lo, hi = start.amin(-1) // step * step, stop.amax(-1)
    full_lo, full_hi = (full_start.amax(-1) + step - 1) // step * step, full_stop.amin(-1) // step * step
    none = full_hi <= full_lo
    return torch.stack((lo, full_lo.where(~none, lo), full_hi.where(~none, lo), hi.maximum(lo)), -1)


# ---- the plain version -----------------------------------------------------------------------------------------------

def visible(q, k, causal, window, documents) -> Tensor:
    """The mask as the matrix that flash attention never writes: (T, S), or (B, 1, T, S) bool with documents."""
    T, S = q.shape[2], k.shape[2]
    i, j = torch.arange(T, device=q.device)[:, None] + S - T, torch.arange(S, device=q.device)
    mask = j <= i if causal or window is not None else torch.ones(T, S, dtype=torch.bool, device=q.device)
    if window is not None:
        mask = mask & (j > i - window)
    if documents is not None:
        L = documents.shape[1]
        mask = mask & (documents[:, None, L - T:, None] == documents[:, None, None, L - S:])
    return mask


def attention_reference(q, k, v, *, causal, sm_scale=None, window=None, documents=None, return_lse=False):
    """The textbook, in any dtype, differentiated by autograd. Arguments as flash_attention -> o, or (o, lse).

    HBM traffic beside q, k, v, o: 10 passes over a (B, H, T, S) matrix forward, 13 back: dp = do v^T 1, dv 1, the
    masks' gradients 2 and 2, softmax's 3, the scale's 2, dq 1, dk 1.
    """
    shape, (q, k, v) = q.shape, heads(q, k, v)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)       # each K/V head serves `group` query heads
    hidden = ~visible(q, k, causal, window, documents)
    s = q @ k.mT                                                                # write 1
    s = s * scale_of(q, sm_scale)                                               # read 1, write 1
    s = s.masked_fill(hidden, -math.inf)                                        # read 1, write 1
    p = s.softmax(-1)                                                           # read 1, write 1; NaN in an empty row
    p = p.masked_fill(hidden, 0)                                                # so: read 1, write 1
    o = (p @ v).view(shape)                                                     # read 1
    return (o, s.logsumexp(-1).view(shape[:-1]).to(accumulator(q.dtype))) if return_lse else o


# ---- online softmax, the idea in twenty lines ------------------------------------------------------------------------

def online_softmax_row(s, v):
    """One row: scores s (S), values v (S, D) -> softmax(s) @ v (D), reading each score once, keeping two numbers."""
    m, l, o = -math.inf, 0.0, torch.zeros_like(v[0])
    for s_j, v_j in zip(s.tolist(), v, strict=True):
        m_new = max(m, s_j)
        alpha = math.exp(m - m_new)                  # what was summed so far was relative to the old maximum
        p = math.exp(s_j - m_new)
        l = alpha * l + p
        o = alpha * o + p * v_j
        m = m_new
    return o / l


def online_softmax(s, v, block):
    """The same for rows, a block of columns at a time: s (T, S), v (S, D) -> (o (T, D), lse (T))."""
    m_i, l_i = s.new_full((len(s), 1), -math.inf), s.new_zeros(len(s), 1)
    o = s.new_zeros(len(s), v.shape[1])
    for s_ij, v_j in zip(s.split(block, 1), v.split(block), strict=True):
        m_new = torch.maximum(m_i, s_ij.amax(1, keepdim=True))
        alpha, p = torch.exp(m_i - m_new), torch.exp(s_ij - m_new)
        l_i = alpha * l_i + p.sum(1, keepdim=True)
        o = alpha * o + p @ v_j
        m_i = m_new
    return o / l_i, (m_i + l_i.log())[:, 0]


# ---- the tiled version in torch --------------------------------------------------------------------------------------
#
# The algorithm of the kernels, in any dtype: their oracle, and on a CPU a fast path, whose SRAM is the cache. A tile is
# 256 x 256 float32 scores, 256 KB, for each of the query heads that share a K/V head: they are rows of one tile.

TILE = 256


def tile_plan(q, k, causal, window, documents):
    """What forward and backward share: (batch, K/V head, queries, walk) to go through, a tile's mask, how to view x."""
    (B, T), (K, S) = q.shape[::2], k.shape[1:3]
    mask_limits = limits(T, S, causal, window, documents, q.device)
    walks = tiles(mask_limits.rows, TILE, TILE).tolist()
    work = [(b, h, slice(i * TILE, min((i + 1) * TILE, T)), walk)
            for b in range(B) for i, walk in enumerate(walks[b % len(walks)]) for h in range(K)]

    @functools.lru_cache(maxsize=16)                       # the heads come one after the other
    def hidden(b, i, j):
        """True where query i, i + 1, ... must not see key j, j + 1, ...: (rows, columns) bool."""
        rows = torch.arange(i, min(i + TILE, T), device=q.device)
        columns = torch.arange(j, min(j + TILE, S), device=q.device)
        start, stop = mask_limits.rows[:2, b % len(walks), rows, None]
        mask = (columns < start) | (columns >= stop)
        ids = mask_limits.ids
        return mask if ids is None else mask | (ids[b, -T:][rows, None] != ids[b, -S:][columns])

    def fold(x):                                                            # (B, H, n, D) -> (B, K, group, n, D)
        return x.to(accumulator(q.dtype)).unflatten(1, (K, -1)).contiguous()
    return work, hidden, fold


def flash_forward_torch(q, k, v, causal, sm_scale, window, documents):
    """-> o as q, lse (B, H, T) in the accumulator dtype."""
    work, hidden, fold = tile_plan(q, k, causal, window, documents)
    qs, kf, vf = fold(q) * (sm_scale * LOG2E), fold(k)[:, :, 0], fold(v)[:, :, 0]       # base 2 from here on
    of, lse = torch.empty_like(qs), qs.new_empty(qs.shape[:-1])
    for b, h, rows, (lo, full_lo, full_hi, hi) in work:
        q_i = qs[b, h, :, rows].flatten(0, 1)                                                        # (M, D)
        m_i, l_i, acc = q_i.new_full((len(q_i), 1), -math.inf), q_i.new_zeros(len(q_i), 1), torch.zeros_like(q_i)
        for j in range(lo, hi, TILE):
            k_j, v_j = kf[b, h, j:j + TILE], vf[b, h, j:j + TILE]                                    # (N, D)
            s = q_i @ k_j.T                                                                          # (M, N)
            full = full_lo <= j < full_hi
            if not full:
                s.unflatten(0, (qs.shape[2], -1)).masked_fill_(hidden(b, rows.start, j), -math.inf)
            # m' = max(m, max s)
            m_new = torch.maximum(m_i, s.amax(1, keepdim=True))
            safe = m_new if full else m_new.masked_fill(m_new == -math.inf, 0)      # no key yet: exp2(-inf - 0) = 0
            # p = exp(s - m'), alpha = exp(m - m')
            p, alpha = s.sub_(safe).exp2_(), (m_i - safe).exp2_()
            # l' = alpha l + sum p, o' = alpha o + p v
            l_i = l_i.mul_(alpha).add_(p.sum(1, keepdim=True))
            acc.mul_(alpha).addmm_(p, v_j)
            m_i = m_new
        # o = o / l, lse = m + log l; an empty row has l = 0 and m = -inf
        of[b, h, :, rows] = (acc / l_i.masked_fill(l_i == 0, 1)).view_as(of[b, h, :, rows])
        lse[b, h, :, rows] = ((m_i + l_i.log2()) / LOG2E).view_as(lse[b, h, :, rows])
    return torch.empty_like(q).copy_(of.flatten(1, 2)), lse.flatten(1, 2)


def flash_backward_torch(do, dlse, q, k, v, o, lse, causal, sm_scale, window, documents):
    """-> dq, dk, dv as q, k, v."""
    work, hidden, fold = tile_plan(q, k, causal, window, documents)
    qs, kf, vf, dof = fold(q) * (sm_scale * LOG2E), fold(k)[:, :, 0], fold(v)[:, :, 0], fold(do)
    # delta = rowsum(do * o); lse is an output too, and d lse / d s = p: its gradient joins as delta - dlse
    # (an empty row has neither: 0 times whatever came back for its -inf must stay 0)
    minus_delta = fold(dlse[..., None]).masked_fill(fold(lse[..., None]) == -math.inf, 0)
    minus_delta = minus_delta - (dof * fold(o)).sum(-1, keepdim=True)
    minus_lse = fold(lse[..., None]) * -LOG2E
    dqf, dkf, dvf = torch.empty_like(qs), torch.zeros_like(kf), torch.zeros_like(vf)
    for b, h, rows, (lo, full_lo, full_hi, hi) in work:
        q_i, do_i, minus_lse_i, minus_delta_i = (x[b, h, :, rows].flatten(0, 1)
                                                 for x in (qs, dof, minus_lse, minus_delta))
        dq_i = torch.zeros_like(q_i)
        for j in range(lo, hi, TILE):
            k_j, v_j, dk_j, dv_j = (x[b, h, j:j + TILE] for x in (kf, vf, dkf, dvf))                 # (N, D)
            # p = exp(s - lse), all of it transposed as in _bwd_dkdv: one product of the five reads a tile by columns
            p = torch.addmm(minus_lse_i.T, k_j, q_i.T).exp2_()                                       # (N, M)
            if not full_lo <= j < full_hi:
                p.unflatten(1, (qs.shape[2], -1)).masked_fill_(hidden(b, rows.start, j).T[:, None], 0)
            # dv = p^T do
            dv_j.addmm_(p, do_i)
            # ds = p * (dp - delta), dp = do v^T
            ds = torch.addmm(minus_delta_i.T, v_j, do_i.T).mul_(p)
            # dq = ds k, dk = ds^T q
            dq_i.addmm_(ds.T, k_j)
            dk_j.addmm_(ds, q_i)
        dqf[b, h, :, rows] = dq_i.mul_(sm_scale).view_as(dqf[b, h, :, rows])
    dkf /= LOG2E                                                                    # q_i carried sm_scale * LOG2E
    return tuple(torch.empty_like(x).copy_(dx) for x, dx in ((q, dqf.flatten(1, 2)), (k, dkf), (v, dvf)))


# ---- the Triton kernels ----------------------------------------------------------------------------------------------
#
# Four kernels, each of which writes what it owns and nothing else: no atomics, so one tiling gives the same bits every
# time (PINNED fixes it: autotune may choose another in the next process).
#
#     kernel            a program owns                walks over                               writes
#     _attn_fwd         BLOCK_M queries of a head     the keys                                 o, lse
#     _bwd_preprocess   BLOCK_M queries of a head     nothing                                  delta, lse in base 2
#     _bwd_dkdv         BLOCK_N keys of a K/V head    the queries of every head that shares it dk, dv
#     _bwd_dq           BLOCK_M queries of a head     the keys                                 dq
#
# Full tiles come first, in a loop that knows no mask and is pipelined (num_stages: the next tiles are under way while
# this one is multiplied). Then the tiles at the edges, left and right of the full ones in one loop that jumps over
# them, not pipelined: two pipelined loops would make ptxas run every Hopper matrix product (wgmma) alone. Offsets in
# a tile are 32-bit where the tensor's strides allow it, its base is a 64-bit pointer. Scores and sums are float32
# (float64 for float64); p and ds are cast to the inputs' dtype, for the tensor cores. A head dimension that is no
# power of two is padded with zeros.

if triton is not None:
    LN2 = tl.constexpr(math.log(2))                          # SCALE is sm_scale * log2(e): scores and lse are in base 2

    @triton.jit
    def _matrix(x, stride, b, h, start, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
                TMA: tl.constexpr):
        """The (n, D) matrix of head (b, h) from row `start` on: its address, or a descriptor for the copy engine."""
        base = x + b * stride[0] + h * stride[1] + start * stride[2]
        if TMA:
            matrix = tl.make_tensor_descriptor(base, shape=[n, D], strides=[tl.cast(stride[2], tl.int64), 1],
                                               block_shape=[BLOCK, BLOCK_D])
        else:
            matrix = base
        return matrix

    @triton.jit
    def _load(matrix, stride, start, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
              INDEX: tl.constexpr, CHECK: tl.constexpr, TMA: tl.constexpr):
        """BLOCK rows of it from `start` on, 0 outside of (n, D). CHECK: some of the rows may be outside."""
        if TMA:
            tile = matrix.load([start, 0])
        else:
            row, d = (start + tl.arange(0, BLOCK).to(INDEX))[:, None], tl.arange(0, BLOCK_D).to(INDEX)[None, :]
            address = matrix + row * stride[2] + d * stride[3]
            if CHECK:
                tile = tl.load(address, mask=(row < n) & (d < D), other=0.0)
            elif BLOCK_D != D:
                tile = tl.load(address, mask=d < D, other=0.0)
            else:
                tile = tl.load(address)
        return tile

    @triton.jit
    def _store(x, stride, b, h, start, n, tile, D: tl.constexpr, INDEX: tl.constexpr):
        base = x + b * stride[0] + h * stride[1] + start * stride[2]
        row, d = tl.arange(0, tile.shape[0]).to(INDEX)[:, None], tl.arange(0, tile.shape[1]).to(INDEX)[None, :]
        tl.store(base + row * stride[2] + d * stride[3], tile.to(x.dtype.element_ty), mask=(row < n) & (d < D))

    @triton.jit
    def _range(bounds, plane, offsets, STEP: tl.constexpr):
        """bounds (4, n) at positions `offsets` -> (lo, full_lo, full_hi, hi) as in tiles()."""
        lo, hi = tl.min(tl.load(bounds + offsets), 0) // STEP * STEP, tl.max(tl.load(bounds + plane + offsets), 0)
        full_lo = tl.cdiv(tl.max(tl.load(bounds + 2 * plane + offsets), 0), STEP) * STEP
        full_hi = tl.min(tl.load(bounds + 3 * plane + offsets), 0) // STEP * STEP
        if full_hi <= full_lo:
            full_lo = lo
            full_hi = lo
        return lo, full_lo, full_hi, hi

    @triton.jit
    def _edge(bounds, plane, offsets, ids, own, walked, EDGES: tl.constexpr):
        """What tells a hidden score at the edges. Loaded after the full tiles: registers are scarce there. own, walked:
        where in ids this program's positions start, and those it walks over."""
        own_id = offsets
        edge = None
        if EDGES:
            if ids is not None:
                own_id = tl.load(ids + own + offsets)
            edge = tl.load(bounds + offsets), tl.load(bounds + plane + offsets), own_id, walked
        return edge

    @triton.jit
    def _hidden(edge, ids, start, n, BLOCK: tl.constexpr):
        """Where the mask hides a score: the program's own positions are rows, the walked from `start` on columns."""
        first, last, own_id, walked = edge
        position = (start + tl.arange(0, BLOCK))[None, :]
        hidden = (position < first[:, None]) | (position >= last[:, None])
        if ids is not None:
            hidden |= own_id[:, None] != tl.load(ids + walked + position, mask=position < n)
        return hidden

    @triton.jit
    def _fwd_tile(q, k, v, m_i, l_i, acc, edge, ids, j, S, SCALE: tl.constexpr, PRECISION: tl.constexpr):
        # s = q k^T
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)                     # (M, N)
        if edge is not None:
            s = tl.where(_hidden(edge, ids, j, S, k.shape[0]), -float("inf"), s)
        # m' = max(m, max s)
        m_new = tl.maximum(m_i, tl.max(s, 1) * SCALE)
        safe = m_new
        if edge is not None:
            safe = tl.where(m_new == -float("inf"), 0.0, m_new)                  # no key yet: exp2(-inf - 0) = 0
        # p = exp(s - m'), alpha = exp(m - m')
        p = tl.exp2(s * SCALE - safe[:, None])
        alpha = tl.exp2(m_i - safe)
        # l' = alpha l + sum p, o' = alpha o + p v
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
        return m_new, l_i, acc

    @triton.jit
    def _dkdv_tile(q, do, lse, delta, k, v, dk, dv, edge, ids, i, T, SCALE: tl.constexpr, PRECISION: tl.constexpr):
        # p = exp(s - lse), all of it transposed: keys are rows
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype)                      # (N, M)
        p = tl.exp2(s * SCALE - lse[None, :])
        if edge is not None:
            p = tl.where(_hidden(edge, ids, i, T, q.shape[0]), 0.0, p)
        # dv = p^T do
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=dk.dtype)             # (N, D)
        # ds = p * (dp - delta), dp = do v^T
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=dk.dtype)                    # (N, M)
        ds = p * (dp - delta[None, :])
        # dk = ds^T q
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)              # (N, D)
        return dk, dv

    @triton.jit
    def _dq_tile(q, do, lse, delta, k, v, dq, edge, ids, j, S, SCALE: tl.constexpr, PRECISION: tl.constexpr):
        # p = exp(s - lse)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype)                      # (M, N)
        p = tl.exp2(s * SCALE - lse[:, None])
        if edge is not None:
            p = tl.where(_hidden(edge, ids, j, S, k.shape[0]), 0.0, p)
        # ds = p * (dp - delta), dp = do v^T
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)                    # (M, N)
        ds = p * (dp - delta[:, None])
        # dq = ds k
        return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)            # (M, D)

    @triton.jit
    def _program(bounds, bounds_stride, n, LONG_LAST: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
        """This program's batch, head, `rows` positions from `start` on (offsets: 0, 1, ... rows - 1, rows - 1), and
        what it walks over. LONG_LAST: a causal mask makes the last positions' walks the longest: first."""
        b, h, block = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
        if LONG_LAST:
            block = tl.num_programs(0) - 1 - block
        start = block.to(tl.int64) * BLOCK
        rows = (n - start).to(tl.int32)
        offsets = tl.minimum(tl.arange(0, BLOCK), rows - 1)
        bounds += b * bounds_stride[1] + start
        lo, full_lo, full_hi, hi = _range(bounds, bounds_stride[0], offsets, STEP)
        return b, h, start, rows, offsets, bounds, lo, full_lo, full_hi, hi

    @triton.jit
    def _attn_fwd(q, k, v, o, lse, bounds, ids, strides, bounds_stride, T, S, L,
                  SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                  INDEX: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        sq, sk, sv, so = strides
        ACC: tl.constexpr = lse.dtype.element_ty
        b, h, start, rows, i, bounds, lo, full_lo, full_hi, hi = _program(bounds, bounds_stride, T, True,
                                                                          BLOCK_M, BLOCK_N)
        q = _matrix(q, sq, b, h, start, rows, D, BLOCK_M, BLOCK_D, False)
        k = _matrix(k, sk, b, h // GROUP, 0, S, D, BLOCK_N, BLOCK_D, TMA)
        v = _matrix(v, sv, b, h // GROUP, 0, S, D, BLOCK_N, BLOCK_D, TMA)
        q_i = _load(q, sq, 0, rows, D, BLOCK_M, BLOCK_D, INDEX, True, False)                           # (M, D)
        m_i, l_i = tl.full([BLOCK_M], -float("inf"), ACC), tl.zeros([BLOCK_M], ACC)
        acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        for EDGES in tl.static_range(2):
            first, stop = (lo, hi - (full_hi - full_lo)) if EDGES else (full_lo, full_hi)
            edge = _edge(bounds, bounds_stride[0], i, ids, b * L + L - T + start, b * L + L - S, EDGES)
            for j in tl.range(first, stop, BLOCK_N, num_stages=1 if EDGES else None):
                j += tl.where(j < full_lo, 0, full_hi - full_lo) if EDGES else 0
                k_j = _load(k, sk, j, S, D, BLOCK_N, BLOCK_D, INDEX, EDGES, TMA)                       # (N, D)
                v_j = _load(v, sv, j, S, D, BLOCK_N, BLOCK_D, INDEX, EDGES, TMA)
                m_i, l_i, acc = _fwd_tile(q_i, k_j, v_j, m_i, l_i, acc, edge, ids, j, S, SCALE, PRECISION)
        # o = o / l, lse = m + log l; an empty row has l = 0 and m = -inf
        l_i = tl.where(l_i == 0, 1.0, l_i)
        _store(o, so, b, h, start, rows, acc / l_i[:, None], D, INDEX)
        m = tl.arange(0, BLOCK_M)
        tl.store(lse + (b * tl.num_programs(1) + h) * T + start + m, (m_i + tl.log2(l_i)) * LN2, mask=m < rows)

    @triton.jit
    def _bwd_preprocess(o, do, lse, dlse, delta, lse2, strides, T, D: tl.constexpr, BLOCK_D: tl.constexpr,
                        BLOCK_M: tl.constexpr):
        so, sdo, sdlse = strides
        h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        start, m = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        o = _matrix(o, so, b, h, 0, T, D, BLOCK_M, BLOCK_D, False)
        do = _matrix(do, sdo, b, h, 0, T, D, BLOCK_M, BLOCK_D, False)
        o_i = _load(o, so, start, T, D, BLOCK_M, BLOCK_D, tl.int64, True, False).to(lse.dtype.element_ty)
        do_i = _load(do, sdo, start, T, D, BLOCK_M, BLOCK_D, tl.int64, True, False).to(lse.dtype.element_ty)
        row, inside = (b * tl.num_programs(1) + h) * T + m, m < T
        # delta = rowsum(do * o); lse is an output too, and d lse / d s = p: its gradient joins as delta - dlse
        dlse_i = tl.load(dlse + b * sdlse[0] + h * sdlse[1] + m * sdlse[2], mask=inside, other=0.0)
        lse_i = tl.load(lse + row, mask=inside, other=0.0)
        dlse_i = tl.where(lse_i == -float("inf"), 0.0, dlse_i)                      # 0 times whatever it is must stay 0
        tl.store(delta + row, tl.sum(o_i * do_i, 1) - dlse_i, mask=inside)
        # in base 2, for exp2; an empty row's is -inf, and all its scores are hidden
        tl.store(lse2 + row, lse_i / LN2, mask=inside)

    @triton.jit
    def _bwd_dkdv(q, k, v, do, dk, dv, lse2, delta, bounds, ids, strides, bounds_stride, T, S, L,
                  SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                  INDEX: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        sq, sk, sv, sdo, sdk, sdv = strides
        ACC: tl.constexpr = lse2.dtype.element_ty
        b, h, start, rows, j, bounds, lo, full_lo, full_hi, hi = _program(bounds, bounds_stride, S, False,
                                                                          BLOCK_N, BLOCK_M)
        k = _matrix(k, sk, b, h, start, rows, D, BLOCK_N, BLOCK_D, False)
        v = _matrix(v, sv, b, h, start, rows, D, BLOCK_N, BLOCK_D, False)
        k_j = _load(k, sk, 0, rows, D, BLOCK_N, BLOCK_D, INDEX, True, False)                           # (N, D)
        v_j = _load(v, sv, 0, rows, D, BLOCK_N, BLOCK_D, INDEX, True, False)
        dk_j, dv_j = tl.zeros([BLOCK_N, BLOCK_D], ACC), tl.zeros([BLOCK_N, BLOCK_D], ACC)
        for g in range(GROUP):
            q_h = _matrix(q, sq, b, h * GROUP + g, 0, T, D, BLOCK_M, BLOCK_D, TMA)
            do_h = _matrix(do, sdo, b, h * GROUP + g, 0, T, D, BLOCK_M, BLOCK_D, TMA)
            row = ((b * tl.num_programs(1) + h) * GROUP + g) * T
            for EDGES in tl.static_range(2):
                first, stop = (lo, hi - (full_hi - full_lo)) if EDGES else (full_lo, full_hi)
                edge = _edge(bounds, bounds_stride[0], j, ids, b * L + L - S + start, b * L + L - T, EDGES)
                for i in tl.range(first, stop, BLOCK_M, num_stages=1 if EDGES else None):
                    i += tl.where(i < full_lo, 0, full_hi - full_lo) if EDGES else 0
                    q_i = _load(q_h, sq, i, T, D, BLOCK_M, BLOCK_D, INDEX, EDGES, TMA)                 # (M, D)
                    do_i = _load(do_h, sdo, i, T, D, BLOCK_M, BLOCK_D, INDEX, EDGES, TMA)
                    position = i + tl.arange(0, BLOCK_M)
                    there, other = (position < T, 0.0) if EDGES else (None, None)
                    lse_i = tl.load(lse2 + row + position, mask=there, other=other)                          # (M)
                    delta_i = tl.load(delta + row + position, mask=there, other=other)
                    dk_j, dv_j = _dkdv_tile(q_i, do_i, lse_i, delta_i, k_j, v_j, dk_j, dv_j,
                                            edge, ids, i, T, SCALE, PRECISION)
        _store(dk, sdk, b, h, start, rows, dk_j * (SCALE * LN2), D, INDEX)
        _store(dv, sdv, b, h, start, rows, dv_j, D, INDEX)

    @triton.jit
    def _bwd_dq(q, k, v, do, dq, lse2, delta, bounds, ids, strides, bounds_stride, T, S, L,
                SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                INDEX: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        sq, sk, sv, sdo, sdq = strides
        b, h, start, rows, i, bounds, lo, full_lo, full_hi, hi = _program(bounds, bounds_stride, T, True,
                                                                          BLOCK_M, BLOCK_N)
        q = _matrix(q, sq, b, h, start, rows, D, BLOCK_M, BLOCK_D, False)
        do = _matrix(do, sdo, b, h, start, rows, D, BLOCK_M, BLOCK_D, False)
        k = _matrix(k, sk, b, h // GROUP, 0, S, D, BLOCK_N, BLOCK_D, TMA)
        v = _matrix(v, sv, b, h // GROUP, 0, S, D, BLOCK_N, BLOCK_D, TMA)
        q_i = _load(q, sq, 0, rows, D, BLOCK_M, BLOCK_D, INDEX, True, False)                           # (M, D)
        do_i = _load(do, sdo, 0, rows, D, BLOCK_M, BLOCK_D, INDEX, True, False)
        row = (b * tl.num_programs(1) + h) * T + start
        lse_i, delta_i = tl.load(lse2 + row + i), tl.load(delta + row + i)                             # (M)
        dq_i = tl.zeros([BLOCK_M, BLOCK_D], lse2.dtype.element_ty)
        for EDGES in tl.static_range(2):
            first, stop = (lo, hi - (full_hi - full_lo)) if EDGES else (full_lo, full_hi)
            edge = _edge(bounds, bounds_stride[0], i, ids, b * L + L - T + start, b * L + L - S, EDGES)
            for j in tl.range(first, stop, BLOCK_N, num_stages=1 if EDGES else None):
                j += tl.where(j < full_lo, 0, full_hi - full_lo) if EDGES else 0
                k_j = _load(k, sk, j, S, D, BLOCK_N, BLOCK_D, INDEX, EDGES, TMA)                       # (N, D)
                v_j = _load(v, sv, j, S, D, BLOCK_N, BLOCK_D, INDEX, EDGES, TMA)
                dq_i = _dq_tile(q_i, do_i, lse_i, delta_i, k_j, v_j, dq_i, edge, ids, j, S, SCALE, PRECISION)
        _store(dq, sdq, b, h, start, rows, dq_i * (SCALE * LN2), D, INDEX)


# BLOCK_M, BLOCK_N, num_warps, num_stages: what autotune tries, by the bytes of a tile's row. For 16-bit numbers all fit
# and none spills registers in its hot loop: tests/bench/bench_flash_static.py compiles them and reads the code.
CONFIGS = {
    "tma": {           # NVIDIA compute capability 9 and 10, 227 KB of shared memory: tiles through the copy engine
        128: {"_attn_fwd": [(128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2)],
              "_bwd_dkdv": [(64, 64, 4, 2), (64, 64, 4, 3)], "_bwd_dq": [(64, 64, 4, 3), (128, 64, 8, 3)]},
        256: {"_attn_fwd": [(128, 128, 8, 3), (64, 64, 4, 3)], "_bwd_dkdv": [(64, 128, 8, 2), (64, 128, 8, 3)],
              "_bwd_dq": [(128, 128, 8, 2), (128, 64, 8, 3)]},
        512: {"_attn_fwd": [(128, 64, 8, 2), (64, 64, 4, 2)], "_bwd_dkdv": [(64, 32, 8, 2)],
              "_bwd_dq": [(32, 32, 4, 2)]}},
    "pointers": {      # other chips, and where strides are not multiples of 16 bytes
        128: {"_attn_fwd": [(128, 128, 8, 2), (128, 64, 4, 3)], "_bwd_dkdv": [(64, 128, 8, 2), (64, 64, 4, 2)],
              "_bwd_dq": [(128, 32, 4, 2), (128, 64, 8, 2)]},
        256: {"_attn_fwd": [(128, 64, 8, 2)], "_bwd_dkdv": [(32, 64, 4, 2), (64, 64, 8, 2)],
              "_bwd_dq": [(64, 64, 4, 2), (128, 32, 8, 2)]},
        512: {"_attn_fwd": [(64, 64, 8, 2), (64, 32, 4, 2)], "_bwd_dkdv": [(32, 32, 4, 2)],
              "_bwd_dq": [(64, 32, 4, 2), (32, 32, 4, 2)]}},
    "hip": {           # AMD: 64 KB of LDS, 512 registers
        256: {"_attn_fwd": [(128, 64, 4, 1), (64, 64, 4, 1)], "_bwd_dkdv": [(64, 64, 4, 1), (32, 64, 4, 1)],
              "_bwd_dq": [(64, 64, 4, 1), (64, 32, 4, 1)]},
        512: {"_attn_fwd": [(64, 64, 4, 1)], "_bwd_dkdv": [(32, 32, 4, 1)], "_bwd_dq": [(64, 32, 4, 1)]}},
    # float32 without tf32 has no tensor cores to run on: small tiles, and they spill above a head dimension of 64
    "ieee": {1024: dict.fromkeys(("_attn_fwd", "_bwd_dkdv", "_bwd_dq"), [(16, 16, 4, 2)])},
}
PINNED = {}            # kernel name -> (BLOCK_M, BLOCK_N, num_warps, num_stages): use these and try no others
TMA = None             # None: where the chip has it and strides allow; False, True: as said


def configs(name, row_bytes, chip):
    """The triton.Configs that autotune chooses from."""
    if name in PINNED:
        choices = [PINNED[name]]
    else:
        choices = next((table[name] for limit, table in CONFIGS[chip].items() if row_bytes <= limit), [(16, 16, 4, 1)])
    return [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
            for m, n, warps, stages in choices]


@functools.cache
def tuned(name, row_bytes, chip, size_class):
    """The kernel, timed with each of its configurations at the first call of this kind."""
    return triton.autotune(configs(name, row_bytes, chip), key=[])(globals()[name])


def arguments(name, matrices, vectors, mask_limits, sm_scale, capability):
    """What the three large kernels are called with: matrices q, k, v, ... (B, heads, n, D), vectors of numbers a row,
    the mask. capability: (major, minor) of an NVIDIA chip, (0, 0) elsewhere -> args, options."""
    q, k = matrices[:2]
    (H, T, D), (K, S) = q.shape[1:], k.shape[1:3]
    bounds = mask_limits.columns if name == "_bwd_dkdv" else mask_limits.rows
    args = (*matrices, *vectors, bounds, mask_limits.ids, tuple(x.stride() for x in matrices),
            (bounds.stride(0), bounds.stride(1) if bounds.shape[1] > 1 else 0), T, S, max(T, S))
    aligned = all(x.stride(3) == 1 and x.stride(2) > 0 and
                  not (x.data_ptr() | x.itemsize * (x.stride(0) | x.stride(1) | x.stride(2))) % 16
                  for x in matrices[:4])
    wide = max((x.shape[2] + 256) * x.stride(2) + D * x.stride(3) for x in matrices) >= 2**31
    return args, dict(SCALE=sm_scale * LOG2E, GROUP=H // K, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)),
                      INDEX=tl.int64 if wide else tl.int32,
                      TMA=aligned and ((9, 0) <= capability < (11, 0) if TMA is None else TMA),
                      PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32")


def launch(name, matrices, vectors, mask_limits, sm_scale):
    """Run _attn_fwd, _bwd_dkdv or _bwd_dq."""
    q, k = matrices[:2]
    shared, block = (k, "BLOCK_N") if name == "_bwd_dkdv" else (q, "BLOCK_M")       # whose positions the programs share
    cuda = not INTERPRET and not torch.version.hip
    capability = torch.cuda.get_device_capability(q.device) if cuda else (0, 0)
    args, options = arguments(name, matrices, vectors, mask_limits, sm_scale, capability)
    if options["TMA"] and not INTERPRET:                   # descriptors made by a kernel live in memory it is given
        device = q.device                                  # not q itself: the allocator would keep it
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    grid = lambda meta: (triton.cdiv(shared.shape[2], meta[block]), shared.shape[1], shared.shape[0])
    chip = ("ieee" if q.dtype == torch.float32 and options["PRECISION"] == "ieee" else
            "hip" if torch.version.hip else "tma" if options["TMA"] else "pointers")
    kind = name, options["BLOCK_D"] * q.itemsize, chip
    with torch.cuda.device_of(q):
        if INTERPRET or name in PINNED:
            globals()[name][grid](*args, **options, **configs(*kind)[0].all_kwargs())
        else:
            tuned(*kind, shared.shape[2].bit_length())[grid](*args, **options)


def flash_forward_triton(q, k, v, causal, sm_scale, window, documents):
    mask_limits = limits(q.shape[2], k.shape[2], causal, window, documents, q.device)
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=accumulator(q.dtype), device=q.device)
    launch("_attn_fwd", (q, k, v, o), (lse,), mask_limits, sm_scale)
    return o, lse


def flash_backward_triton(do, dlse, q, k, v, o, lse, causal, sm_scale, window, documents):
    (B, H, T, D), block_m, block_d = q.shape, 64, max(16, triton.next_power_of_2(q.shape[3]))
    mask_limits = limits(T, k.shape[2], causal, window, documents, q.device)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        _bwd_preprocess[(triton.cdiv(T, block_m), H, B)](
            o, do, lse, dlse, delta, lse2, (o.stride(), do.stride(), dlse.stride()), T, D, block_d, block_m)
    launch("_bwd_dkdv", (q, k, v, do, dk, dv), (lse2, delta), mask_limits, sm_scale)
    launch("_bwd_dq", (q, k, v, do, dq), (lse2, delta), mask_limits, sm_scale)
    return dq, dk, dv


# ---- the function to call --------------------------------------------------------------------------------------------

KERNELS = {"torch": (flash_forward_torch, flash_backward_torch),
           "triton": (flash_forward_triton, flash_backward_triton)}


# Forward and backward as torch.library operators: torch.compile sees one node and its outputs' shapes (the fake), and
# checkpointing and autograd go through them as through any operator. Autocast ends here: the tiles choose their dtypes;
# and function modes, which would look at each of the hundred questions that a launch asks of its tensors.

@torch.library.custom_op("flash_attn::forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, sm_scale: float | None, window: int | None,
             documents: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False), torch._C.DisableTorchFunction():
        o, lse = KERNELS[backend][0](*heads(q, k, v), causal, scale_of(q, sm_scale), window, documents)
    return o.view(q.shape), lse.view(q.shape[:-1])


@_forward.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=accumulator(q.dtype))


@torch.library.custom_op("flash_attn::backward", mutates_args=())
def _backward(do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool,
              sm_scale: float | None, window: int | None, documents: Tensor | None,
              backend: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = [x.view(len(q), -1, q.shape[-2]) for x in (dlse.contiguous(), lse)]
    do, *qkvo = heads(do, q, k, v, o)
    with torch.autocast(q.device.type, enabled=False), torch._C.DisableTorchFunction():
        grads = KERNELS[backend][1](do, rows[0], *qkvo, rows[1], causal, scale_of(q, sm_scale), window, documents)
    dq, dk, dv = (dx.view(x.shape) for dx, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


@_backward.register_fake
def _(do, dlse, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx, inputs, output):
    """Kept for backward: q, k, v, o and a number a row; never s or p."""
    *qkv, ctx.causal, ctx.sm_scale, ctx.window, documents, ctx.backend = inputs
    ctx.save_for_backward(*qkv, *output, documents)


def _differentiate(ctx, do, dlse):
    *tensors, documents = ctx.saved_tensors
    return *_backward(do, dlse, *tensors, ctx.causal, ctx.sm_scale, ctx.window, documents, ctx.backend), *[None] * 5


def _refuse(ctx, *grads):
    raise RuntimeError("flash_attention has no second derivative: use backend=\"reference\" for a double backward")


_forward.register_autograd(_differentiate, setup_context=_setup)
_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


class FlashAttentionTorch(torch.autograd.Function):
    """(o, lse) = FlashAttentionTorch.apply(q, k, v, causal, sm_scale, window, documents): tiles in torch, any dtype."""

    @staticmethod
    def forward(q, k, v, causal=True, sm_scale=None, window=None, documents=None):
        check(q, k, v, sm_scale, window, documents, "torch")
        return _forward(q, k, v, causal, sm_scale, window, documents, "torch")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.given = len(inputs)
        _setup(ctx, (*inputs, *(True, None, None, None)[len(inputs) - 3:], "torch"), output)

    @staticmethod
    def backward(ctx, do, dlse):
        return _differentiate(ctx, do, dlse)[:ctx.given]


class FlashAttentionTriton(FlashAttentionTorch):
    """(o, lse) = FlashAttentionTriton.apply(q, k, v, causal, sm_scale, window, documents): the Triton kernels."""

    @staticmethod
    def forward(q, k, v, causal=True, sm_scale=None, window=None, documents=None):
        check(q, k, v, sm_scale, window, documents, resolve_backend("triton", q.device))
        return _forward(q, k, v, causal, sm_scale, window, documents, "triton")

    @staticmethod
    def setup_context(ctx, inputs, output):
        FlashAttentionTorch.setup_context(ctx, inputs, output)
        ctx.backend = "triton"


def sdpa(q, k, v, causal, sm_scale, window, documents):
    """torch's own attention; what it has no argument for, it is given as a matrix."""
    shape, (q, k, v) = q.shape, heads(q, k, v)
    plain, T, S = window is None and documents is None, q.shape[2], k.shape[2]
    square = plain and causal and T == S
    all_seen = plain and (not causal or T == 1)
    return F.scaled_dot_product_attention(
        q, k, v, None if square or all_seen else visible(q, k, causal, window, documents), is_causal=square,
        scale=sm_scale, enable_gqa=q.shape[1] != k.shape[1]).view(shape)


def check(q, k, v, sm_scale, window, documents, backend):
    """Raises ValueError (an argument) or RuntimeError (a backend that cannot run it): one line, before anything."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim not in (3, 4) or x.ndim != q.ndim or min(x.shape) < 1:
            raise ValueError(f"{name} must be (B, H, T, D), or all (B, T, D), and not empty, got {tuple(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise ValueError("q, k, v must be of one floating-point dtype, float16, bfloat16, float32 or float64, got "
                             f"{q.dtype} and {name} {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k, v must be on one device, got {q.device} and {name} on {x.device}")
    B, (T, D), S = len(q), q.shape[-2:], k.shape[-2]
    if k.shape != v.shape or len(k) != B or k.shape[-1] != D:
        raise ValueError(f"k and v must be (B, H_kv, S, D) with the B and D of q {tuple(q.shape)}, "
                         f"got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.ndim == 4 and q.shape[1] % k.shape[1]:
        raise ValueError(f"q's heads must be a multiple of k's, got {q.shape[1]} and {k.shape[1]}")
    if D > 256:
        raise ValueError(f"head_dim must be at most 256, got {D}")
    if sm_scale is not None and not (isinstance(sm_scale, int | float) and 2**-126 <= sm_scale < math.inf):
        raise ValueError(f"sm_scale must be a number above 0 and finite in float32, got {sm_scale!r}")
    if window is not None and (not isinstance(window, int | torch.SymInt) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window must be at least 1 key, a whole number, or None, got {window!r}")
    if documents is not None and not isinstance(documents, Tensor):
        raise ValueError(f"documents must be a tensor ({B}, {max(T, S)}), got {type(documents).__name__}")
    if documents is not None and (documents.shape != (B, max(T, S)) or documents.is_floating_point()
                                  or documents.is_complex() or documents.device != q.device):
        raise ValueError(f"documents must be ({B}, {max(T, S)}) whole numbers on {q.device}, "
                         f"got {tuple(documents.shape)} {documents.dtype} on {documents.device}")
    for wrong, rule in ((not INTERPRET and q.dtype == torch.float64, "runs float64 only under TRITON_INTERPRET=1"),
                        (INTERPRET and q.dtype not in INTERPRETED, "the interpreter computes with the bits of "
                         f"{q.dtype}, not its values"),
                        (max(B, q.shape[-3]) > 65535, f"a grid takes B and H up to 65535, got {tuple(q.shape)}")):
        if backend == "triton" and wrong:
            raise RuntimeError(f"backend triton: {rule}; {OTHERS}")
    if backend in KERNELS and not torch.compiler.is_compiling() and any(
            torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise RuntimeError(f"backend {backend} has no forward-mode derivative: use backend=\"reference\"")


BACKENDS = ("triton", "torch", "sdpa", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTERPRETED = {torch.float16, torch.float32, torch.float64}       # and bfloat16, where tests/interpreter.py mends it
OTHERS = "the others are torch, sdpa, reference"


def resolve_backend(backend: str, device: torch.device, return_lse=False) -> str:
    """The backend that runs for tensors on this device. Raises ValueError for an unknown name, RuntimeError for triton
    where it cannot run."""
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "torch" if return_lse else "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "sdpa" and return_lse:
        raise ValueError("return_lse: backend sdpa gives no lse; triton, torch and reference do")
    if backend == "triton" and triton is None:
        raise RuntimeError(f"backend triton: no triton package is installed here; {OTHERS}")
    if backend == "triton" and not INTERPRET and device.type != "cuda":
        raise RuntimeError("backend triton needs tensors on a GPU, or TRITON_INTERPRET=1 before the start (for tests: "
                           f"a training step takes minutes), got {device}; {OTHERS}")
    return backend


def flash_attention(q, k, v, *, causal=True, sm_scale=None, window=None, documents=None, return_lse=False,
                    backend="auto"):
    """softmax(q k^T * sm_scale, over the visible keys) v.  Differentiable once, in q, k, v (and through lse).

    q            (B, H, T, D), any strides; float16, bfloat16, float32 or float64; D up to 256
    k, v         (B, H_kv, S, D), H a multiple of H_kv.  (B, T, D) for all three is one head
    causal       query i, which sits at key position i + S - T, sees keys up to there
    sm_scale     default 1 / sqrt(D)
    window       only the last `window` keys up to there: a window looks back alone, causal or not
    documents    (B, max(T, S)) int ids, of queries the last T, of keys the last S: attention within equal ids only
    return_lse   also lse (B, H, T), float32 (float64 for float64): log sum exp of a row's scaled scores
    backend      "triton" (a GPU, or TRITON_INTERPRET=1), "torch" (tiled), "sdpa" (torch's own; gives no lse),
                 "reference". "auto": triton on a GPU, elsewhere sdpa, or torch for return_lse. On a CPU sdpa is
                 given window and documents as a matrix: from T = 2048 on torch is several times faster there
    -> o (B, H, T, D) as q, or (o, lse). A query that sees no key gets o = 0, lse = -inf and no gradient.

    Raises ValueError for a wrong argument, RuntimeError for a backend that cannot run here. Under autocast the inputs
    are cast as for torch's own attention.
    """
    device = q.device.type
    backend = resolve_backend(backend, q.device, return_lse)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        low_dtype = torch.get_autocast_dtype(device)
        q, k, v = (x.to(low_dtype) if x.dtype in DTYPES[:3] else x for x in (q, k, v))
    check(q, k, v, sm_scale, window, documents, backend)
    if backend == "reference":
        return attention_reference(q, k, v, causal=causal, sm_scale=sm_scale, window=window, documents=documents,
                                   return_lse=return_lse)
    if backend == "sdpa":
        return sdpa(q, k, v, causal, sm_scale, window, documents)
    o, lse = _forward(q, k, v, causal, sm_scale, window, documents, backend)
    return (o, lse) if return_lse else o


# ---- HBM traffic: the formula and a counter --------------------------------------------------------------------------

def traffic(q, k, mask_limits: Limits, blocks) -> dict:
    """Bytes that each kernel asks of memory, {kernel: (requested, distinct)}.

    q, k: tensors of the shapes and dtype asked about (the meta device will do); blocks: {kernel: (BLOCK_M, BLOCK_N)}.
    requested: every tile counted each time it is loaded; a K/V tile that is still in the L2 cache costs HBM nothing.
    distinct: every byte that a launch touches counted once: what HBM moves if the caches hold all that is shared. The
    truth lies between. Scores appear in neither. (Dao 2022, theorem 2, has the order: T S D^2 / SRAM size.)
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    number, ids = accumulator(q.dtype).itemsize, 4 if mask_limits.ids is not None else 0
    row = D * q.itemsize                                                    # of q, k, v, o, do, dq, dk or dv
    queries, keys, passes = B * H * T, B * K * S, H // K
    result = {"_bwd_preprocess": 2 * (queries * (2 * row + 4 * number),)}
    for name, bounds, stop, own, own_passes, walked, distinct in (
            ("_attn_fwd", mask_limits.rows, S, queries * (2 * row + number + 16), 1, 2 * row,
             queries * (2 * row + number) + keys * 2 * row),
            ("_bwd_dq", mask_limits.rows, S, queries * (3 * row + 2 * number + 16), 1, 2 * row,
             queries * (3 * row + 2 * number) + keys * 2 * row),
            ("_bwd_dkdv", mask_limits.columns, T, keys * (4 * row + 16), passes, 2 * row + 2 * number,
             queries * (2 * row + 2 * number) + keys * 4 * row)):
        block, step = blocks[name] if bounds is mask_limits.rows else blocks[name][::-1]
        lo, full_lo, full_hi, hi = tiles(bounds, block, step).unbind(-1)
        end = ((hi + step - 1) // step * step).clamp(max=stop).where(hi > lo, lo)
        walks = H * B // bounds.shape[1]                                    # by how many programs each is walked
        seen, masked = (int(x.sum()) * walks for x in (end - lo, end - lo - full_hi + full_lo))
        own += (queries if bounds is mask_limits.rows else keys) * own_passes * (8 + ids)     # limits, ids at the edges
        result[name] = (own + seen * walked + masked * ids,
                        distinct + sum(x.nbytes for x in (bounds, mask_limits.ids) if x is not None))
    return result


def count_traffic(kernel, tensors):
    """Run kernel() in Triton's interpreter -> bytes (requested, distinct) that it loads and stores.

    Lanes that are masked off do not count, lanes of one load that name one address count once, distinct bytes are whole
    32-byte sectors, the unit in which HBM is read. An address outside all the tensors raises (in the
    interpreter's InterpreterError): on a GPU a kernel that leaves them reads garbage without a word.
    """
    from unittest.mock import patch

    from triton.runtime.interpreter import InterpreterBuilder
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in (x.untyped_storage() for x in tensors)]
    requested, sectors = [], []

    def watch(access, place_of_mask):
        def watched(builder, pointers, *args, **options):
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            there = args[place_of_mask].data.astype("bool")
            address = torch.from_numpy(pointers.data.astype("int64")[there]).unique()
            outside = len(address) - int(sum(((a <= address) & (address + itemsize <= b)).sum() for a, b in spans))
            if outside:
                raise IndexError(f"the kernel touches {outside} addresses outside its tensors")
            requested.append(len(address) * itemsize)
            sectors.append((address // 32).unique())
            return access(builder, pointers, *args, **options)
        return watched

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with patch.object(InterpreterBuilder, "create_masked_load", watch(load, 0)), \
            patch.object(InterpreterBuilder, "create_masked_store", watch(store, 1)):
        kernel()
    return sum(requested), 32 * len(torch.cat(sectors).unique())


# ---- demo ------------------------------------------------------------------------------------------------------------

def count_passes(function, q, k, v, do):
    """How often a (B, H, T, S) matrix crosses the memory bus in forward and in backward: every operator of autograd's
    reads its inputs and writes its outputs. On the meta device: nothing is computed."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]

    class Count(TorchDispatchMode):
        passes = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            read, written = ([x for x in tree_leaves(side) if isinstance(x, Tensor)] for side in (args, out))
            stored = [{x.untyped_storage()._cdata for x in side} for side in (read, written)]
            if not stored[0] & stored[1]:                                                                     # no view
                self.passes += sum(x.numel() == scores and x.dtype != torch.bool for x in read + written)
            return out

    with Count() as forward:
        o = function(q, k, v)
    with Count() as backward:
        o.backward(do)
    return forward.passes, backward.passes


def peak_growth(run):
    """Bytes by which this process's resident peak grows in run(); None where /proc does not tell."""
    def status(field):
        return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024
    try:
        ctypes.CDLL(None).malloc_trim(0)                                          # what was freed before is given back
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")                                                          # the peak starts from here
        before = status("VmRSS")
    except (OSError, AttributeError):
        run()
        return None
    run()
    return max(0, status("VmHWM") - before)


def demo():
    """The claims of this file, measured | predicted, asserted. CPU, under half a minute."""
    import time
    assert round(8192**2 * 2 / 1e6) == 134 and TILE * TILE * 4 == 256 * 2**10                # the prose above, in bytes
    device, generator = "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    print("online softmax, largest error against softmax(s) v:")
    s, v = draw(5, 37) * 10, draw(37, 8)
    rows = torch.stack([online_softmax_row(row, v) for row in s])
    for name, o in (("a score at a time", rows), ("8 at a time", online_softmax(s, v, 8)[0])):
        error = (o - s.softmax(1) @ v).abs().max().item()
        print(f"    {name:<20} {error:.1e}")
        assert error < 1e-12

    print("\nlargest error against float64 / that of plain torch in the same dtype          o      dq      dk      dv"
          "\n    (the error itself where plain torch makes none)")
    cases = [("torch", T, causal, dtype) for T in (1, 64, 203) for causal in (False, True)
             for dtype in (torch.float32, torch.bfloat16)]
    if INTERPRET or device == "cuda":
        cases += [("triton", T, causal, dtype) for T, causal in ((64, False), (113, True))
                  for dtype in (torch.float32, torch.float16)]
    for backend, T, causal, dtype in cases:
        exact = [draw(1, 2, T, 32).to(dtype).double() for _ in range(4)]
        results = {}
        for name, kind, how in (("exact", torch.float64, "reference"), ("plain", dtype, "reference"),
                                ("ours", dtype, backend)):
            q, k, v, do = (x.to(kind, copy=True).requires_grad_() for x in exact)
            o = flash_attention(q, k, v, causal=causal, backend=how)
            results[name] = [x.double() for x in (o, *torch.autograd.grad(o, (q, k, v), do))]
        cells = []
        for i, (truth, plain, ours) in enumerate(zip(*results.values(), strict=True)):
            error, bound = (ours - truth).abs().max().item(), (plain - truth).abs().max().item()
            cells.append(f"{error / bound:7.2f}" if bound else f"{error:7.0e}")
            assert error <= (3 if i else 2) * bound + 1e-6, (backend, T, causal, dtype)
        print(f"    {backend:<7} T {T:<4} {'causal' if causal else 'full':<7} {str(dtype)[6:]:<38}", *cells)

    print("\nHBM traffic, counted | predicted")
    meta = [torch.empty(2, 4, 64, 32, device="meta", requires_grad=True) for _ in range(3)]
    textbook = lambda q, k, v: attention_reference(q, k, v, causal=True)
    forward, backward = count_passes(textbook, *meta, torch.empty_like(meta[0]))
    print(f"    textbook, passes over the score matrix: forward {forward} | 10, backward {backward} | 13")
    assert (forward, backward) == (10, 13)
    blocks = {name: choices[0][:2] for name, choices in CONFIGS["pointers"][128].items()}
    if INTERPRET:
        q, k, v, do, o, dq, dk, dv = (torch.randn(1, 2, 128, 32, dtype=torch.float16) for _ in range(8))
        lse, delta = torch.zeros(1, 2, 128), torch.zeros(1, 2, 128)
        mask_limits = limits(128, 128, True, None, None, q.device)
        formula = traffic(q, k, mask_limits, blocks)
        for name, matrices, vectors in (("_attn_fwd", (q, k, v, o), (lse,)),
                                        ("_bwd_dkdv", (q, k, v, do, dk, dv), (lse, delta)),
                                        ("_bwd_dq", (q, k, v, do, dq), (lse, delta))):
            counted = count_traffic(lambda work=(name, matrices, vectors): launch(*work, mask_limits, 0.1),
                                    (*matrices, *vectors, mask_limits.rows, mask_limits.columns))
            print(f"    {name:<10} bytes requested {counted[0]:,} | {formula[name][0]:,}   distinct {counted[1]:,} | "
                  f"{formula[name][1]:,}")
            assert counted == formula[name]
    # Dao 2022, figure 2 (left): GPT-2 medium's attention, batch 64, forward + backward on an A100, against bounds. One
    # score matrix is 2.1 GB. Textbook: the paper's has one mask and dropout; ours without any mask (8 of the 23 passes
    # are the two fills') is below it, with both above. Flash: all tiles hit the L2 cache, or none does.
    q = torch.empty(64, 16, 1024, 64, dtype=torch.float16, device="meta")
    kernels = traffic(q, q, limits(1024, 1024, False, None, None, torch.device("cpu")), blocks).values()
    matrix, rows = q.numel() // 64 * 1024 * 2, 12 * q.nbytes                           # q k v o; do o q k v again; ...
    plain, fills = (passes * matrix / 1e9 for passes in (forward + backward - 8, 8))
    requested, distinct = (sum(side) / 1e9 for side in zip(*kernels, strict=True))
    plain += rows / 1e9
    print(f"\n1024 tokens, 16 heads of 64, batch 64, GB, lower bound < measured in the paper < upper bound:\n"
          f"    textbook {plain:.1f} without masks < 40.3 < {plain + fills:.1f} with two;   "
          f"flash {distinct:.1f} distinct < 4.4 < {requested:.1f} requested")
    assert plain < 40.3 < plain + fills and distinct < 4.4 < requested

    print("\ncausal, 4 heads of 64, float32, one thread: forward + backward" if device == "cpu" else
          "\ncausal, 16 heads of 64, bfloat16: forward + backward")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for T in (256, 512, 1024) if device == "cpu" else (1024, 4096, 16384):
        cells, peaks = [], {}
        for backend in ("reference", "torch", "sdpa") if device == "cpu" else ("triton", "sdpa"):
            heads, dtype = (4, torch.float32) if device == "cpu" else (16, torch.bfloat16)
            shape = dict(size=(1, heads, T, 64), device=device, dtype=dtype, requires_grad=True)
            q, k, v, do = (torch.randn(**shape) for _ in range(4))

            def run(q=q, k=k, v=v, do=do, backend=backend):
                torch.autograd.grad(flash_attention(q, k, v, backend=backend), (q, k, v), do)
                if device == "cuda":
                    torch.cuda.synchronize()

            peaks[backend] = peak_growth(run)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            seconds = sorted(times)[1]
            cells.append(f"{backend} {seconds:7.3f} s" + (f" {peaks[backend] / 1e6:6.0f} MB" if peaks[backend] else ""))
            if device == "cuda":                               # 4 T^2 D forward, 10 backward, half of it by causality
                cells[-1] += f" {7 * heads * T * T * 64 / seconds / 1e12:.0f} TFLOP/s"
        print(f"    T {T:<6} " + "    ".join(cells))
    if peaks.get("reference"):
        assert peaks["reference"] > 3 * peaks["torch"], "the textbook should need several times the memory"
    torch.set_num_threads(threads)


if __name__ == "__main__":
    demo()
