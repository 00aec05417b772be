"""Attention without the matrix: FlashAttention, forward and backward, in torch and in Triton.

    s = q k^T * sm_scale        p = softmax(s)        o = p v             q (T, D); k, v (S, D); s, p (T, S); o (T, D)

The products are cheap; the matrix between them is not. With 8192 queries (T) and 8192 keys (S) one head's s is 134 MB
in half precision. attention_reference, below, reads or writes such a matrix in the GPU's memory (HBM) ten times forward
and thirteen times backward. While HBM moves one number, tensor cores do hundreds of multiplications. So: never write s.

1. Tiling. A GPU runs many copies of a kernel side by side: its programs. A program takes BLOCK_M queries and walks over
   the keys, BLOCK_N at a time. The tile of scores lives in registers and on-chip memory (SRAM) and is dropped. q, o and
   one number per row cross HBM once; k and v are read again by every program.

2. Online softmax. A softmax needs its row's maximum m and the sum l of exp(s - m), but a program never holds a whole
   row. So start with m = -inf, l = 0, o = 0, and correct all three with every tile. j runs over the keys of the tile:

       m' = max(m, max_j s_j)     alpha = exp(m - m')     l' = alpha l + sum_j exp(s_j - m')
                                                          o' = alpha o + sum_j exp(s_j - m') v_j
   At the end the output is o / l, and lse = m + log l.  Nothing is approximated.

3. Recomputation. Backward needs p, and to keep p would be to keep a matrix. So backward computes p again, tile by tile,
   from q, k and lse, the one number per row that forward kept:  p_ij = exp(s_ij - lse_i).  With dx = d loss / d x:

       dv = p^T do      dp = do v^T      ds = p * (dp - delta)      dq = ds k * sm_scale      dk = ds^T q * sm_scale
       delta_i = sum_j p_ij dp_ij = sum_d do_id o_id                      (Dao 2022, section 3.1 and appendix B)
   ds is softmax's derivative. Put in dp_ij = sum_d do_id v_jd and o_id = sum_j p_ij v_jd: delta needs no matrix.

    symbol   in code      what                                 shape          dtype
    q k v o  q k v o      queries, keys, values, output        (B, H, T, D)   any float; k, v (B, H_kv, S, D)
    m l o    m_i l_i acc  maximum, sum, l * output, so far     M; acc (M, D)  float32, or float64 for float64
    lse      lse          log sum exp of a row                 (B, H, T)      the same; -inf where no key is visible
    delta    delta        rowsum(do * o), minus lse's gradient (B, H, T)      the same
    alpha    alpha        a new maximum's factor on l and o    M              the same
    B_r B_c  BLOCK_M BLOCK_N   queries, keys of a tile: the papers' names; M, N in comments
    Sizes: B sequences, H query heads, H_kv key/value heads (K in code), T queries, S keys, D numbers per head.

Which keys a query sees. Query i sits at key position i + S - T: the last query sits at the last key. (T < S when a text
is continued and older keys are kept.) With every mask here (causal, sliding window, packed documents) a query sees *an
interval of keys*, and a key is seen by *an interval of queries*. From one position to the next neither end of the
interval moves back. So the queries of a program see only keys from the first one's start to the last one's stop, and
each of them sees all keys from the last one's start to the first one's stop. A tile of keys that no query sees is
skipped. A tile that all see whole needs no mask. The others, at the edges, compare positions with the intervals.

Where it rounds. p = exp(s - lse) subtracts two numbers of the size of the scores, so in float32 p's relative error is
some |s| 2^-22. The textbook's backward does not have this error: it kept p.

What it costs, T = S, forward / backward:  FLOPs 4 T^2 D / 10 T^2 D per head: two products / five (s again, dv, dp, dq,
dk). Backward's two kernels both compute s and dp: seven, 14 T^2 D. Causality halves all. Memory O(T).

Map: attention_reference - online softmax - causal tiles - the Triton kernels - flash_attention, the function to call -
masks in general - the tiled version in torch. Below the lecture: launching and tuning - checks - demo. Not here:
dropout, ALiBi and other score changes, paged KV caches, FP8. Counted in tests/test_flash_attn.py: bytes that the
kernels ask of HBM.

Sources: FlashAttention (Dao 2022, arXiv:2205.14135); FlashAttention-2 (Dao 2023, 2307.08691): outer loop over queries;
online softmax (Milakov and Gimelshein 2018, 1805.02867); GQA (2305.13245); Triton (Tillet 2019).

run: python flash_attn.py
"""

import functools
import math
import numbers
import os

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
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the plain version -----------------------------------------------------------------------------------------------

def attention_reference(q, k, v, *, causal, sm_scale=None, window=None, documents=None, return_lse=False):
    """The textbook, in any dtype, differentiated by autograd. Arguments as flash_attention -> o, or (o, lse).

    HBM traffic besides q, k, v, o: forward reads or writes a (B, H, T, S) matrix 10 times, counted at the lines below.
    Backward does so 13 times: dp 1, dv 1, each masked_fill 2, softmax 3, the scale 2, dq 1, dk 1.
    """
    heads_per_kv = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads_per_kv, 1), v.repeat_interleave(heads_per_kv, 1)
    masked = ~visible(q, k, causal, window, documents)                       # causal: True where j > i + S - T
    s = q @ k.mT                                                                # write 1
    s = s * (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)             # read 1, write 1
    s = s.masked_fill(masked, -math.inf)                                        # read 1, write 1
    p = s.softmax(-1)                                                           # read 1, write 1; no key seen: NaN
    p = p.masked_fill(masked, 0)                                                # read 1, write 1: NaN becomes 0
    o = p @ v                                                                   # read 1
    return (o, s.logsumexp(-1).to(accumulator(q.dtype))) if return_lse else o


# ---- online softmax --------------------------------------------------------------------------------------------------

def online_softmax(s, v):
    """One row: scores s (S), values v (S, D) -> softmax(s) @ v (D). It reads each score once, and keeps m, l, o."""
    m, l, o = -math.inf, 0.0, torch.zeros_like(v[0])
    for s_j, v_j in zip(s.tolist(), v, strict=True):
        m_new = max(m, s_j)
        alpha = math.exp(m - m_new)                  # what was summed so far was relative to the old maximum
        p = math.exp(s_j - m_new)
        l = alpha * l + p
        o = alpha * o + p * v_j
        m = m_new
    return o / l


# ---- causal tiles: the algorithm without options ---------------------------------------------------------------------
#
# One head, T queries and T keys. Tiles right of the diagonal, half of the work, are skipped. Only the tile on the
# diagonal needs a mask. The rest of the file is this, for more heads, more masks and on a GPU.

def causal_forward(q, k, v, block):
    """q, k, v (T, D) -> o (T, D), lse (T)."""
    q = q * q.shape[1] ** -0.5
    o, lse = torch.empty_like(q), q.new_empty(len(q))
    for i in range(0, len(q), block):
        q_i = q[i:i + block]                                                                         # (M, D)
        m_i, l_i, o_i = q_i.new_full((len(q_i), 1), -math.inf), q_i.new_zeros(len(q_i), 1), torch.zeros_like(q_i)
        for j in range(0, i + 1, block):
            s = q_i @ k[j:j + block].T                                                               # (M, N)
            if j == i:
                s += torch.full_like(s, -math.inf).triu(1)
            # m' = max(m, max s), alpha = exp(m - m'), p = exp(s - m')
            m_new = torch.maximum(m_i, s.amax(1, keepdim=True))
            alpha, p = (m_i - m_new).exp(), (s - m_new).exp()
            # l' = alpha l + sum p, o' = alpha o + p v
            l_i = alpha * l_i + p.sum(1, keepdim=True)
            o_i = alpha * o_i + p @ v[j:j + block]
            m_i = m_new
        o[i:i + block] = o_i / l_i
        lse[i:i + block] = (m_i + l_i.log())[:, 0]
    return o, lse


def causal_backward(do, q, k, v, o, lse, block):
    """do (T, D), forward's inputs and results -> dq, dk, dv (T, D)."""
    scale = q.shape[1] ** -0.5
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (do * o).sum(1)
    for i in range(0, len(q), block):
        rows = slice(i, i + block)
        for j in range(0, i + 1, block):
            columns = slice(j, j + block)
            # p = exp(s - lse)
            p = (q[rows] @ k[columns].T * scale - lse[rows, None]).exp()                             # (M, N)
            p = p.tril() if j == i else p
            # ds = p * (dp - delta), dp = do v^T; times scale, for dq and for dk
            ds = p * (do[rows] @ v[columns].T - delta[rows, None]) * scale
            dv[columns] += p.T @ do[rows]
            dq[rows] += ds @ k[columns]
            dk[columns] += ds.T @ q[rows]
    return dq, dk, dv


# ---- the Triton kernels ----------------------------------------------------------------------------------------------
#
# Triton in short: a kernel is started as a grid of programs, here (blocks of positions, heads, batch). tl.program_id
# tells a program which one it is. x + tl.arange(0, n) are n addresses: tl.load reads those where `mask` is True.
# tl.dot multiplies two tiles. An `if` on a tl.constexpr or on None is decided when the kernel is compiled.
#
# Three kernels. causal_backward adds to dq and to dk in one loop. Programs side by side would add to the same dk, in an
# order that changes. So backward is two kernels, and a program writes only what it owns, without atomic additions. One
# tiling gives the same bits every time. (autotune times several and may choose another next time; PINNED fixes one.)
#
#     kernel       a program owns                walks over                               writes
#     _attn_fwd    BLOCK_M queries of a head     the keys                                 o, lse
#     _bwd_dq      BLOCK_M queries of a head     the keys                                 dq; lse in base 2, delta
#     _bwd_dkdv    BLOCK_N keys of a K/V head    the queries of every head that shares it dk, dv
#
# Every walk has two phases. 1. Whole tiles: no mask, pipelined (num_stages: the next tiles are loaded while this one is
# multiplied). 2. The tiles at the edges, left and right of the whole ones: some scores are hidden. One loop takes both
# sides and jumps over the whole tiles. It is not pipelined: with two pipelined loops ptxas, NVIDIA's assembler,
# would let no two matrix products of a Hopper GPU (wgmma) overlap.
#
# Offsets in a head's matrix are 32-bit numbers, its base is a 64-bit pointer. Scores and sums are float32 (float64 for
# float64). p and ds are cast to the dtype of the inputs, for the tensor cores. A head dimension that is no power of two
# is padded with zeros, to BLOCK_D. GROUP: query heads per K/V head. PRECISION: float32 products in "ieee" or "tf32".
# limits: the intervals, from limits() below; None without documents. Then before and after, from reach(), say the mask.

if triton is not None:
    LN2 = tl.constexpr(math.log(2))                # in base 2: SCALE = sm_scale * log2(e), SCALE * LN2 = sm_scale

    @triton.jit
    def _program(LONG_LAST: tl.constexpr, BLOCK: tl.constexpr):
        """Batch, head, first position and positions of this program; the last ones may lie beyond the end. LONG_LAST: a
        causal mask makes the last positions' walks the longest, so they come first."""
        b, h, block = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
        if LONG_LAST:
            block = tl.num_programs(0) - 1 - block
        start = block * BLOCK
        return b, h, start, start + tl.arange(0, BLOCK)

    @triton.jit
    def _sees(limits, position, n, other, before, after):
        """[start, stop) that positions of one side, of length n, see of the other side, of length `other`. It is read
        from limits. Without limits each sees `before` positions before its own place and `after` after it."""
        position = tl.minimum(position, n - 1)                                      # beyond the end: as the last one
        if limits is None:
            place = position + other - n
            start, stop = tl.maximum(place - before, 0), tl.minimum(place + after + 1, other)
        else:
            start, stop = tl.load(limits + position), tl.load(limits + tl.num_programs(2) * (n + other) + position)
        return start, stop

    @triton.jit
    def _walk(limits, first, n, other, before, after, BLOCK: tl.constexpr, STEP: tl.constexpr):
        """Of a program at positions first to first + BLOCK - 1 -> lo, full_lo, full_hi, hi. [lo, hi) holds all that any
        of the positions sees. Each position sees all of [full_lo, full_hi), the whole tiles."""
        first_start, first_stop = _sees(limits, first, n, other, before, after)
        last_start, last_stop = _sees(limits, first + BLOCK - 1, n, other, before, after)
        lo, hi = first_start // STEP * STEP, last_stop
        full_lo, full_hi = tl.cdiv(last_start, STEP) * STEP, first_stop // STEP * STEP
        if full_hi <= full_lo:                                                      # no whole tile: all are edges
            full_lo = lo
            full_hi = lo
        return lo, full_lo, full_hi, hi

    @triton.jit
    def _masked(edge, BLOCK: tl.constexpr):
        """Where the mask hides a score: own positions are rows, those walked over are columns."""
        start, stop, tile_start = edge
        position = (tile_start + tl.arange(0, BLOCK))[None, :]
        return (position < start[:, None]) | (position >= stop[:, None])

    @triton.jit
    def _matrix(x, stride, b, h, start, n, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
                TMA: tl.constexpr):
        """Rows `start` to n - 1 of head (b, h) -> address, row stride, row count. TMA (copy engine): a descriptor."""
        matrix = x + b * stride[0] + h * stride[1] + tl.cast(start, tl.int64) * stride[2]
        if TMA:
            matrix = tl.make_tensor_descriptor(matrix, shape=[n, D], strides=[tl.cast(stride[2], tl.int64), 1],
                                               block_shape=[BLOCK, BLOCK_D])
        return matrix, stride[2], n - start

    @triton.jit
    def _load(x, start, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr,
              TMA: tl.constexpr):
        """BLOCK rows of a _matrix from `start` on, 0 outside of (n, D). CHECK: some of the rows may be outside."""
        matrix, stride, n = x
        if TMA:
            tile = matrix.load([start, 0])
        else:
            row, d = (start + tl.arange(0, BLOCK))[:, None], tl.arange(0, BLOCK_D)[None, :]
            address = matrix + row * stride + d
            if CHECK:
                tile = tl.load(address, mask=(row < n) & (d < D), other=0.0)
            elif BLOCK_D != D:
                tile = tl.load(address, mask=d < D, other=0.0)
            else:
                tile = tl.load(address)
        return tile

    @triton.jit
    def _store(x, tile, D: tl.constexpr):
        """The rows of the tile that lie inside of (n, D)."""
        matrix, stride, n = x
        row, d = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
        tl.store(matrix + row * stride + d, tile.to(matrix.dtype.element_ty), mask=(row < n) & (d < D))

    @triton.jit
    def _fwd_tile(q, k, v, m_i, l_i, acc, edge, SCALE: tl.constexpr, PRECISION: tl.constexpr):
        # s = q k^T
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)                     # (M, N)
        if edge is not None:
            s = tl.where(_masked(edge, k.shape[0]), -float("inf"), s)
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
    def _attn_fwd(q, k, v, o, lse, limits, strides, T, S, before, after,
                  SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        sq, sk, sv, so = strides
        ACC: tl.constexpr = lse.dtype.element_ty
        b, h, start, i = _program(True, BLOCK_M)
        if limits is not None:
            limits += b * (T + S)
        q = _matrix(q, sq, b, h, start, T, D, BLOCK_M, BLOCK_D, False)
        k = _matrix(k, sk, b, h // GROUP, 0, S, D, BLOCK_N, BLOCK_D, TMA)
        v = _matrix(v, sv, b, h // GROUP, 0, S, D, BLOCK_N, BLOCK_D, TMA)
        q_i = _load(q, 0, D, BLOCK_M, BLOCK_D, True, False)                                        # (M, D)
        m_i, l_i = tl.full([BLOCK_M], -float("inf"), ACC), tl.zeros([BLOCK_M], ACC)
        acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        lo, full_lo, full_hi, hi = _walk(limits, start, T, S, before, after, BLOCK_M, BLOCK_N)
        # 1. whole tiles
        for j in tl.range(full_lo, full_hi, BLOCK_N):
            k_j = _load(k, j, D, BLOCK_N, BLOCK_D, False, TMA)                                         # (N, D)
            v_j = _load(v, j, D, BLOCK_N, BLOCK_D, False, TMA)
            m_i, l_i, acc = _fwd_tile(q_i, k_j, v_j, m_i, l_i, acc, None, SCALE, PRECISION)
        # 2. the tiles at the edges
        first, stop = _sees(limits, i, T, S, before, after)
        for j in tl.range(lo, hi - (full_hi - full_lo), BLOCK_N, num_stages=1):
            j += tl.where(j < full_lo, 0, full_hi - full_lo)                    # jumps over the whole tiles
            k_j = _load(k, j, D, BLOCK_N, BLOCK_D, True, TMA)
            v_j = _load(v, j, D, BLOCK_N, BLOCK_D, True, TMA)
            m_i, l_i, acc = _fwd_tile(q_i, k_j, v_j, m_i, l_i, acc, (first, stop, j), SCALE, PRECISION)
        # o = o / l, lse = m + log l, in base e again; an empty row has l = 0 and m = -inf
        l_i = tl.where(l_i == 0, 1.0, l_i)
        _store(_matrix(o, so, b, h, start, T, D, BLOCK_M, BLOCK_D, False), acc / l_i[:, None], D)
        tl.store(lse + (b * tl.num_programs(1) + h) * T + i, (m_i + tl.log2(l_i)) * LN2, mask=i < T)

    @triton.jit
    def _dq_tile(q, do, lse, delta, k, v, dq, edge, SCALE: tl.constexpr, PRECISION: tl.constexpr):
        # p = exp(s - lse)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype)                      # (M, N)
        p = tl.exp2(s * SCALE - lse[:, None])
        if edge is not None:
            p = tl.where(_masked(edge, k.shape[0]), 0.0, p)
        # ds = p * (dp - delta), dp = do v^T
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)                    # (M, N)
        ds = p * (dp - delta[:, None])
        # dq = ds k
        return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)            # (M, D)

    @triton.jit
    def _bwd_dq(q, k, v, do, o, dq, lse, dlse, row_stats, limits, strides, T, S, before, after,
                SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """row_stats (2, B, H, T): lse in base 2, and delta, are written for _bwd_dkdv, which comes after."""
        sq, sk, sv, sdo, so, sdq = strides
        ACC: tl.constexpr = lse.dtype.element_ty
        b, h, start, i = _program(True, BLOCK_M)
        if limits is not None:
            limits += b * (T + S)
        q = _matrix(q, sq, b, h, start, T, D, BLOCK_M, BLOCK_D, False)
        do = _matrix(do, sdo, b, h, start, T, D, BLOCK_M, BLOCK_D, False)
        o = _matrix(o, so, b, h, start, T, D, BLOCK_M, BLOCK_D, False)
        k = _matrix(k, sk, b, h // GROUP, 0, S, D, BLOCK_N, BLOCK_D, TMA)
        v = _matrix(v, sv, b, h // GROUP, 0, S, D, BLOCK_N, BLOCK_D, TMA)
        do_i = _load(do, 0, D, BLOCK_M, BLOCK_D, True, False)                                      # (M, D)
        # delta = rowsum(do * o). lse is an output too. d lse / d s = p: ds gains p * dlse, so delta loses dlse
        o_i = _load(o, 0, D, BLOCK_M, BLOCK_D, True, False)
        delta_i = tl.sum(o_i.to(ACC) * do_i.to(ACC), 1)                                                # (M)
        row = (b * tl.num_programs(1) + h) * T + i
        lse_i = tl.load(lse + row, mask=i < T, other=0.0)
        if dlse is not None:
            dlse_i = tl.load(dlse + row, mask=i < T, other=0.0)
            delta_i -= tl.where(lse_i == -float("inf"), 0.0, dlse_i)    # an empty row has no gradient, whatever dlse is
        lse_i /= LN2                                                    # in base 2, for exp2; -inf in an empty row
        tl.store(row_stats + row, lse_i, mask=i < T)
        tl.store(row_stats + tl.num_programs(2) * tl.num_programs(1) * T + row, delta_i, mask=i < T)
        q_i = _load(q, 0, D, BLOCK_M, BLOCK_D, True, False)
        dq_i = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        lo, full_lo, full_hi, hi = _walk(limits, start, T, S, before, after, BLOCK_M, BLOCK_N)
        # 1. whole tiles
        for j in tl.range(full_lo, full_hi, BLOCK_N):
            k_j = _load(k, j, D, BLOCK_N, BLOCK_D, False, TMA)                                         # (N, D)
            v_j = _load(v, j, D, BLOCK_N, BLOCK_D, False, TMA)
            dq_i = _dq_tile(q_i, do_i, lse_i, delta_i, k_j, v_j, dq_i, None, SCALE, PRECISION)
        # 2. the tiles at the edges
        first, stop = _sees(limits, i, T, S, before, after)
        for j in tl.range(lo, hi - (full_hi - full_lo), BLOCK_N, num_stages=1):
            j += tl.where(j < full_lo, 0, full_hi - full_lo)                    # jumps over the whole tiles
            k_j = _load(k, j, D, BLOCK_N, BLOCK_D, True, TMA)
            v_j = _load(v, j, D, BLOCK_N, BLOCK_D, True, TMA)
            dq_i = _dq_tile(q_i, do_i, lse_i, delta_i, k_j, v_j, dq_i, (first, stop, j), SCALE, PRECISION)
        _store(_matrix(dq, sdq, b, h, start, T, D, BLOCK_M, BLOCK_D, False), dq_i * (SCALE * LN2), D)

    @triton.jit
    def _dkdv_tile(q, do, lse, delta, k, v, dk, dv, edge, SCALE: tl.constexpr, PRECISION: tl.constexpr):
        # p = exp(s - lse), all of it transposed: keys are rows
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype)                      # (N, M)
        p = tl.exp2(s * SCALE - lse[None, :])
        if edge is not None:
            p = tl.where(_masked(edge, q.shape[0]), 0.0, p)
        # dv = p^T do
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=dk.dtype)             # (N, D)
        # ds = p * (dp - delta), dp = do v^T
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=dk.dtype)                    # (N, M)
        ds = p * (dp - delta[None, :])
        # dk = ds^T q
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)              # (N, D)
        return dk, dv

    @triton.jit
    def _bwd_dkdv(q, k, v, do, dk, dv, row_stats, limits, strides, T, S, before, after,
                  SCALE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        sq, sk, sv, sdo, sdk, sdv = strides
        ACC: tl.constexpr = row_stats.dtype.element_ty
        b, h, start, j = _program(False, BLOCK_N)
        if limits is not None:
            limits += b * (T + S) + T
        k_j = _load(_matrix(k, sk, b, h, start, S, D, BLOCK_N, BLOCK_D, False), 0, D, BLOCK_N, BLOCK_D, True, False)
        v_j = _load(_matrix(v, sv, b, h, start, S, D, BLOCK_N, BLOCK_D, False), 0, D, BLOCK_N, BLOCK_D, True, False)
        dk_j, dv_j = tl.zeros([BLOCK_N, BLOCK_D], ACC), tl.zeros([BLOCK_N, BLOCK_D], ACC)              # (N, D)
        lo, full_lo, full_hi, hi = _walk(limits, start, S, T, before, after, BLOCK_N, BLOCK_M)
        row_count = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * GROUP * T
        for g in range(GROUP):
            q_h = _matrix(q, sq, b, h * GROUP + g, 0, T, D, BLOCK_M, BLOCK_D, TMA)
            do_h = _matrix(do, sdo, b, h * GROUP + g, 0, T, D, BLOCK_M, BLOCK_D, TMA)
            lse = row_stats + ((b * tl.num_programs(1) + h) * GROUP + g) * T
            delta = lse + row_count
            # 1. whole tiles
            for i in tl.range(full_lo, full_hi, BLOCK_M):
                q_i = _load(q_h, i, D, BLOCK_M, BLOCK_D, False, TMA)                                   # (M, D)
                do_i = _load(do_h, i, D, BLOCK_M, BLOCK_D, False, TMA)
                row = i + tl.arange(0, BLOCK_M)
                lse_i, delta_i = tl.load(lse + row), tl.load(delta + row)                              # (M)
                dk_j, dv_j = _dkdv_tile(q_i, do_i, lse_i, delta_i, k_j, v_j, dk_j, dv_j, None, SCALE, PRECISION)
            # 2. the tiles at the edges
            first, stop = _sees(limits, j, S, T, before, after)
            for i in tl.range(lo, hi - (full_hi - full_lo), BLOCK_M, num_stages=1):
                i += tl.where(i < full_lo, 0, full_hi - full_lo)                # jumps over the whole tiles
                q_i = _load(q_h, i, D, BLOCK_M, BLOCK_D, True, TMA)
                do_i = _load(do_h, i, D, BLOCK_M, BLOCK_D, True, TMA)
                row = i + tl.arange(0, BLOCK_M)
                lse_i = tl.load(lse + row, mask=row < T, other=0.0)
                delta_i = tl.load(delta + row, mask=row < T, other=0.0)
                dk_j, dv_j = _dkdv_tile(q_i, do_i, lse_i, delta_i, k_j, v_j, dk_j, dv_j, (first, stop, i), SCALE,
                                        PRECISION)
        _store(_matrix(dk, sdk, b, h, start, S, D, BLOCK_N, BLOCK_D, False), dk_j * (SCALE * LN2), D)
        _store(_matrix(dv, sdv, b, h, start, S, D, BLOCK_N, BLOCK_D, False), dv_j, D)


# ---- the function to call --------------------------------------------------------------------------------------------

def flash_attention(q, k, v, *, causal=True, sm_scale=None, window=None, documents=None, return_lse=False,
                    backend="auto"):
    """softmax(q k^T * sm_scale, over the visible keys) v.  Differentiable once, in q, k, v (and through lse).

    q            (B, H, T, D), any strides; float16, bfloat16, float32 or float64; D up to 256
    k, v         (B, H_kv, S, D), H a multiple of H_kv.  (B, T, D) for all three is one head
    causal       query i sits at key position i + S - T and sees no key after its own position
    sm_scale     default 1 / sqrt(D)
    window       a query sees only the last `window` keys up to its own position, also with causal=False
    documents    (B, max(T, S)) int ids. The last T are the queries', the last S the keys'. Attention stays in a run of
                 equal ids: an id that comes back after another begins a new document. Or what limits() made of ids,
                 causal and window, once for all layers, (2, B, T + S) int32: then causal is unused, window must be None
    return_lse   also lse (B, H, T), float32 (float64 for float64): log sum exp of a row's scaled scores
    backend      "triton" (an NVIDIA GPU, or TRITON_INTERPRET=1), "torch" (tiled), "sdpa" (torch's own; gives no lse),
                 "reference". "auto": triton on an NVIDIA GPU, elsewhere sdpa, or torch for return_lse. On a CPU, with a
                 window or documents, torch is several times faster than sdpa from T = 2048 on
    -> o (B, H, T, D) as q, or (o, lse). A query that sees no key gets o = 0, lse = -inf and no gradient.

    Raises ValueError for a wrong argument, RuntimeError for a backend that cannot run here. Under autocast the inputs
    are cast as for torch's own attention. No tensor is kept from call to call, so any stream may call it. The first
    call of a shape compiles and times kernels: it must come before a CUDA graph captures that shape.
    """
    if q.ndim == k.ndim == v.ndim == 3:                                                                    # one head
        result = flash_attention(q[:, None], k[:, None], v[:, None], causal=causal, sm_scale=sm_scale, window=window,
                                 documents=documents, return_lse=return_lse, backend=backend)
        return tuple(x[:, 0] for x in result) if return_lse else result[:, 0]
    device = q.device.type
    backend = resolve_backend(backend, q.device, return_lse)
    if not isinstance(window, int) and isinstance(window, numbers.Integral):                     # NumPy's whole numbers
        window = int(window)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        low_dtype = torch.get_autocast_dtype(device)
        q, k, v = (x.to(low_dtype) if x.dtype in DTYPES[:3] else x for x in (q, k, v))
    check(q, k, v, sm_scale, window, documents, backend)
    if backend == "sdpa":
        return sdpa(q, k, v, causal, sm_scale, window, documents)
    if backend == "reference":
        return attention_reference(q, k, v, causal=causal, sm_scale=sm_scale, window=window, documents=documents,
                                   return_lse=return_lse)
    o, lse = FlashAttention.apply(q, k, v, causal, sm_scale, window, documents, backend)
    return (o, lse) if return_lse else o


class FlashAttention(torch.autograd.Function):
    """Backends torch and triton -> o, lse. Kept for backward: q, k, v, o, one number per row, limits; never s or p.

    While torch.compile traces, and for tensors with a shape but no numbers (meta, fake), the backend is called as one
    operator of torch.library, defined below: torch.compile does not look inside the operator.
    """

    @staticmethod
    def forward(ctx, q, k, v, causal, sm_scale, window, documents, backend):
        if documents is not None:
            documents = limits(q.shape[2], k.shape[2], causal, window, documents).contiguous()
        sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
        ctx.options, ctx.backend = (bool(causal), sm_scale, window), backend
        if computes_now(q):
            o, lse = BACKENDS[backend][0](q, k, v, *ctx.options, documents)
        else:
            o, lse = torch.ops.flash_attn.forward.default(q, k, v, *ctx.options, documents, backend)
        ctx.save_for_backward(q, k, v, o, lse, documents)
        ctx.set_materialize_grads(False)                      # an output that the loss does not use: None, not zeros
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, o, lse, limits = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        inputs = do, dlse, q, k, v, o, lse, *ctx.options, limits
        if computes_now(q):
            grads = BACKENDS[ctx.backend][1](*inputs)
        else:
            grads = torch.ops.flash_attn.backward.default(*inputs, ctx.backend)
        return *grads, *[None] * 5                            # none for causal, sm_scale, window, documents, backend


def computes_now(q) -> bool:
    return not torch.compiler.is_compiling() and type(q) is Tensor and not q.is_meta


def is_dense(shape, stride) -> bool:
    """Whether kernels can read it: a row's numbers side by side; a head, and 256 rows more, within 32-bit offsets."""
    return stride[-1] == 1 and (shape[-2] + 256) * stride[-2] < 2**31


def dense(x):
    return x if is_dense(x.shape, x.stride()) else x.contiguous()


# For torch.compile, each operator has a signature, what it runs, and a "fake" that makes results with shapes alone.
OPTIONS = "bool causal, float sm_scale, SymInt? window, Tensor? limits, str backend"
library = torch.library.Library("flash_attn", "DEF")
library.define(f"forward(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)")
library.define(f"backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS})"
               " -> (Tensor, Tensor, Tensor)")
library.impl("forward", lambda *args: BACKENDS[args[-1]][0](*args[:-1]), "CompositeExplicitAutograd")
library.impl("backward", lambda *args: BACKENDS[args[-1]][1](*args[:-1]), "CompositeExplicitAutograd")


@torch.library.register_fake("flash_attn::forward", lib=library)
def _(q, k, v, *_):
    return torch.empty_like(dense(q)), q.new_empty(q.shape[:-1], dtype=accumulator(q.dtype))


@torch.library.register_fake("flash_attn::backward", lib=library)
def _(do, dlse, q, k, v, *_):
    return tuple(torch.empty_like(dense(x)) for x in (q, k, v))


def sdpa(q, k, v, causal, sm_scale, window, documents):
    """torch's own attention. Its is_causal is right only for T = S. Any other mask must be passed as a matrix."""
    T, S = q.shape[2], k.shape[2]
    needs_matrix = window is not None or documents is not None or causal and 1 < T != S    # one query sees all keys
    mask = visible(q, k, causal, window, documents) if needs_matrix else None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and T == S and mask is None, scale=sm_scale,
                                          enable_gqa=q.shape[1] != k.shape[1])


# ---- masks in general ------------------------------------------------------------------------------------------------
#
# A mask is an interval per query and an interval per key, whose ends never move back. For another such mask, a prefix
# or a chunk, change `interval` and pass what limits() returns as `documents`: every backend reads it.

def reach(T, S, causal, window):
    """How many keys before and after its own place a query sees: (before, after). A key's queries: (after, before)."""
    far = T + S                                                                        # more than there are: no bound
    return far if window is None else window - 1, far if window is None and not causal else 0


def interval(n, other, before, after, runs, device):
    """[start, stop) of what each of the n positions of one side sees of the other side: (2, B or 1, n) int32.
    runs: start and stop of the document around each of L = max(T, S) positions, (2, B, L), or None."""
    place = torch.arange(n, device=device, dtype=torch.int32) + (other - n)
    start, stop = (place - before).clamp(0, other), (place + (after + 1)).clamp(0, other)
    if runs is not None:
        L = runs.shape[-1]
        run_start, run_stop = runs[:, :, L - n:] - (L - other)      # (B, n) each, counted from the other side's first
        return torch.stack((torch.maximum(start, run_start), torch.minimum(stop, run_stop)))
    return torch.stack((start, stop))[:, None]


def limits(T, S, causal=True, window=None, documents=None, device=None) -> Tensor:
    """The mask as starts and stops, (2, B or 1, T + S) int32. First the keys that each of T queries sees, then the
    queries that see each of S keys.  documents (B, max(T, S)) int, on any device; or limits: returned as they are.

        ids 7 7 3 7    number 0 0 1 2    runs: start 0 0 2 3, stop 2 2 3 4    causal keys [0, 1) [0, 2) [2, 3) [3, 4)
    """
    if documents is not None and documents.ndim == 3:
        return documents
    before, after, runs = *reach(T, S, causal, window), None
    if documents is not None:
        device, number = documents.device, F.pad((documents[:, 1:] != documents[:, :-1]).cumsum(1), (1, 0))    # 0 0 1 2
        runs = torch.stack([torch.searchsorted(number, number, out_int32=True, right=right) for right in (False, True)])
    return torch.cat((interval(T, S, before, after, runs, device), interval(S, T, after, before, runs, device)), 2)


def document_limits(documents: Tensor) -> Tensor:
    """ids (B, T) -> limits of causal attention to packed documents. train.py makes them once per micro-batch."""
    return limits(documents.shape[1], documents.shape[1], documents=documents)


def visible(q, k, causal, window, documents) -> Tensor:
    """The mask as the matrix that flash attention never writes: (B or 1, 1, T, S) bool."""
    T, S = q.shape[2], k.shape[2]
    start, stop = limits(T, S, causal, window, documents, q.device)[:, :, :T, None]                   # (B or 1, T, 1)
    j = torch.arange(S, device=q.device)
    return ((start <= j) & (j < stop))[:, None]


def tiles(start: Tensor, stop: Tensor, block: int, step: int) -> Tensor:
    """_walk for all programs, each of which owns `block` positions and walks in steps of `step`: lo, full_lo, full_hi,
    hi of each, (B or 1, programs, 4) ints. All but hi are multiples of step."""
    n = start.shape[-1]
    top = torch.arange(0, n, block, device=start.device)                                              # first of a block
    end = (top + block - 1).clamp(max=n - 1)                                                          # its last one
    lo, hi = start[:, top] // step * step, stop[:, end]                                               # (B, blocks) each
    full_lo, full_hi = (start[:, end] + step - 1) // step * step, stop[:, top] // step * step
    none = full_hi <= full_lo
    return torch.stack((lo, full_lo.where(~none, lo), full_hi.where(~none, lo), hi.maximum(lo)), -1)


# ---- the tiled version in torch --------------------------------------------------------------------------------------
#
# The algorithm of the kernels, in any dtype: the tests compare the kernels with it. On a CPU it is fast: the cache is
# its SRAM. A tile has 256 x 256 float32 scores, 256 KB, for each query head of a K/V head: these heads are its rows.

TILE = 256


def tile_plan(q, k, causal, window, documents):
    """What forward and backward share -> a list of (batch, K/V head, rows of queries, tiles()' walk), masked, fold"""
    (B, T), (K, S) = q.shape[::2], k.shape[1:3]
    start, stop = limits(T, S, causal, window, documents, q.device)[:, :, :T].expand(2, B, T)              # (B, T) each
    work = [(b, h, slice(i * TILE, min((i + 1) * TILE, T)), walk)
            for b, walks in enumerate(tiles(start, stop, TILE, TILE).tolist())
            for i, walk in enumerate(walks) for h in range(K)]

    @functools.lru_cache(maxsize=16)                       # the heads of a tile come one after the other
    def masked(b, i, j):
        """True where query i, i + 1, ... must not see key j, j + 1, ...: (rows, columns) bool."""
        rows, columns = slice(i, i + TILE), torch.arange(j, min(j + TILE, S), device=q.device)
        return (columns < start[b, rows, None]) | (columns >= stop[b, rows, None])

    def fold(x):                                                            # (B, H, n, D) -> (B, K, group, n, D)
        return x.to(accumulator(q.dtype)).unflatten(1, (K, -1)).contiguous()
    return work, masked, fold


def undisturbed(function):
    """Autocast and function modes end here: the tiles choose their dtypes."""
    def run(*args):
        with torch._C._DisableAutocast(), torch._C.DisableTorchFunction():
            return function(*args)
    return run


@undisturbed
def flash_forward_torch(q, k, v, causal, sm_scale, window, documents):
    """-> o as q, lse (B, H, T) in the accumulator dtype."""
    work, masked, fold = tile_plan(q, k, causal, window, documents)
    qs, kf, vf = fold(q) * (sm_scale * LOG2E), fold(k)[:, :, 0], fold(v)[:, :, 0]     # f: folded, s: scaled too, base 2
    of, lse = torch.empty_like(qs), qs.new_empty(qs.shape[:-1])
    for b, h, rows, (lo, full_lo, full_hi, hi) in work:
        q_i = qs[b, h, :, rows].flatten(0, 1)                                                        # (M, D)
        m_i, l_i, acc = q_i.new_full((len(q_i), 1), -math.inf), q_i.new_zeros(len(q_i), 1), torch.zeros_like(q_i)
        for j in range(lo, hi, TILE):
            k_j, v_j = kf[b, h, j:j + TILE], vf[b, h, j:j + TILE]                                    # (N, D)
            s = q_i @ k_j.T                                                                          # (M, N)
            full = full_lo <= j < full_hi
            if not full:
                s.unflatten(0, (qs.shape[2], -1)).masked_fill_(masked(b, rows.start, j), -math.inf)
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
    return torch.empty_like(dense(q)).copy_(of.flatten(1, 2)), lse.flatten(1, 2)


@undisturbed
def flash_backward_torch(do, dlse, q, k, v, o, lse, causal, sm_scale, window, documents):
    """-> dq, dk, dv as q, k, v."""
    work, masked, fold = tile_plan(q, k, causal, window, documents)
    qs, kf, vf, dof = fold(q) * (sm_scale * LOG2E), fold(k)[:, :, 0], fold(v)[:, :, 0], fold(do)
    # delta = rowsum(do * o). lse is an output too. d lse / d s = p: ds gains p * dlse, so delta loses dlse
    minus_delta = -(dof * fold(o)).sum(-1, keepdim=True)
    if dlse is not None:                                          # an empty row has no gradient, whatever came for it
        minus_delta += fold(dlse[..., None]).masked_fill(fold(lse[..., None]) == -math.inf, 0)
    minus_lse = fold(lse[..., None]) * -LOG2E                                                  # minus: addmm adds it
    dqf, dkf, dvf = torch.empty_like(qs), torch.zeros_like(kf), torch.zeros_like(vf)
    for b, h, rows, (lo, full_lo, full_hi, hi) in work:
        q_i, do_i, minus_lse_i, minus_delta_i = (x[b, h, :, rows].flatten(0, 1)
                                                 for x in (qs, dof, minus_lse, minus_delta))
        dq_i = torch.zeros_like(q_i)
        for j in range(lo, hi, TILE):
            k_j, v_j, dk_j, dv_j = (x[b, h, j:j + TILE] for x in (kf, vf, dkf, dvf))                 # (N, D)
            # p = exp(s - lse), transposed as in _bwd_dkdv: so only dq's product reads a tile by columns, not dv's, dk's
            p = torch.addmm(minus_lse_i.T, k_j, q_i.T).exp2_()                                       # (N, M)
            if not full_lo <= j < full_hi:
                p.unflatten(1, (qs.shape[2], -1)).masked_fill_(masked(b, rows.start, j).T[:, None], 0)
            # dv = p^T do
            dv_j.addmm_(p, do_i)
            # ds = p * (dp - delta), dp = do v^T
            ds = torch.addmm(minus_delta_i.T, v_j, do_i.T).mul_(p)
            # dq = ds k, dk = ds^T q
            dq_i.addmm_(ds.T, k_j)
            dk_j.addmm_(ds, q_i)
        dqf[b, h, :, rows] = dq_i.mul_(sm_scale).view_as(dqf[b, h, :, rows])
    dkf /= LOG2E                                                                    # q_i carried sm_scale * LOG2E
    return tuple(torch.empty_like(dense(x)).copy_(dx) for x, dx in ((q, dqf.flatten(1, 2)), (k, dkf), (v, dvf)))


# ---- the lecture ends here -------------------------------------------------------------------------------------------
#
# What follows is for looking things up.

# ---- launching and tuning the kernels --------------------------------------------------------------------------------
#
# On a short sequence a kernel takes a GPU no longer than Python takes to work out its arguments. So `launch` keeps, per
# kind of call, the compiled kernel on its grid and the arguments behind the tensors. `described` tells the kinds apart.

def flash_forward_triton(q, k, v, causal, sm_scale, window, limits):
    """-> o as q, lse (B, H, T)."""
    (q, k, v), call = described((q, k, v), (limits,), causal, sm_scale, window)
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=accumulator(q.dtype), device=q.device)
    with torch.cuda.device_of(q):
        launch("_attn_fwd", call, (q, k, v, o), (lse, limits))
    return o, lse


def flash_backward_triton(do, dlse, q, k, v, o, lse, causal, sm_scale, window, limits):
    """-> dq, dk, dv as q, k, v."""
    dlse = None if dlse is None else dlse.contiguous()
    (q, k, v, do, o), call = described((q, k, v, do, o), (lse, dlse, limits), causal, sm_scale, window)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    row_stats = torch.empty((2, *lse.shape), dtype=lse.dtype, device=q.device)
    with torch.cuda.device_of(q):
        launch("_bwd_dq", call, (q, k, v, do, o, dq), (lse, dlse, row_stats, limits))
        launch("_bwd_dkdv", call, (q, k, v, do, dk, dv), (row_stats, limits))
    return dq, dk, dv


def described(matrices, vectors, *options):
    """-> matrices as the kernels read them, and all that a compiled kernel and its arguments depend on. matrices: q
    first, (B, heads, n, D); vectors may be None."""
    facts = [x if x is None else (x.shape, x.stride(), x.data_ptr() % 16) for x in (*matrices, *vectors)]
    if not all(is_dense(shape, stride) for shape, stride, _ in facts[:len(matrices)]):
        return described([dense(x) for x in matrices], vectors, *options)
    q = matrices[0]
    return matrices, (*options, torch.get_float32_matmul_precision(), q.dtype, q.device, *facts)


LAUNCHES = {}          # (kernel, call) -> the compiled kernel on its grid, its arguments behind the tensors, TMA
MAX_LAUNCHES = 4096    # then all are forgotten: in generation every token is a new S, so a new call


def launch(name, call, matrices, vectors):
    """Run a kernel. call: what `described` says. At the first call of its kind Triton compiles, and autotune times."""
    compiled, rest, tma = LAUNCHES.get((name, call), (None, (), True))
    if tma:                                       # memory for the descriptors that a kernel makes; set per thread
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    if compiled:
        return compiled(*matrices, *vectors, *rest)
    if len(LAUNCHES) >= MAX_LAUNCHES:
        LAUNCHES.clear()
    (q, k), (causal, sm_scale, window, *_) = matrices[:2], call
    rest, options = arguments(name, matrices, causal, sm_scale, window, capability(q.device))
    owned, block = (k, "BLOCK_N") if name == "_bwd_dkdv" else (q, "BLOCK_M")          # whose positions the programs own
    grid = lambda blocks: (triton.cdiv(owned.shape[2], blocks[block]), owned.shape[1], owned.shape[0])
    table = ("ieee" if q.dtype == torch.float32 and options["PRECISION"] == "ieee" else
             "tma" if options["TMA"] else "pointers")
    kind = name, options["BLOCK_D"] * q.itemsize, table
    if INTERPRET:
        globals()[name][grid](*matrices, *vectors, *rest, **options, **configs(*kind)[0].all_kwargs())
        return
    kernel = tuned(*kind, owned.shape[2].bit_length())
    compiled = kernel[grid](*matrices, *vectors, *rest, **options)
    blocks = {size: kernel.best_config.kwargs[size] for size in ("BLOCK_M", "BLOCK_N")}
    LAUNCHES[name, call] = compiled[grid(blocks)], (*rest, *options.values(), *blocks.values()), options["TMA"]


def capability(device):
    """(major, minor) of an NVIDIA chip, (0, 0) under the interpreter."""
    return (0, 0) if INTERPRET else torch.cuda.get_device_capability(device)


def arguments(name, matrices, causal, sm_scale, window, capability):
    """What a kernel is called with behind its tensors -> arguments, options, both in the order of its signature.
    matrices: q, k, v, ... (B, heads, n, D)."""
    q, k = matrices[:2]
    (H, T, D), (K, S) = q.shape[1:], k.shape[1:3]
    before, after = reach(T, S, causal, window)
    if name == "_bwd_dkdv":
        before, after = after, before
    aligned = all(x.stride(2) > 0 and
                  not (x.data_ptr() | x.itemsize * (x.stride(0) | x.stride(1) | x.stride(2))) % 16
                  for x in matrices[:4])
    BLOCK_D, walked = max(16, triton.next_power_of_2(D)), T if name == "_bwd_dkdv" else S
    worth_it = (9, 0) <= capability < (11, 0) and (walked >= TMA_FROM or BLOCK_D * q.itemsize > 128)
    return ((tuple(x.stride()[:3] for x in matrices), T, S, before, after),
            dict(SCALE=sm_scale * LOG2E, GROUP=H // K, D=D, BLOCK_D=BLOCK_D,
                 TMA=aligned and (worth_it if TMA is None else TMA),
                 PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"))


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
    "pointers": {      # other chips, short walks, and where strides are not multiples of 16 bytes
        128: {"_attn_fwd": [(128, 128, 8, 2), (128, 64, 4, 3)], "_bwd_dkdv": [(64, 128, 8, 2), (64, 64, 4, 2)],
              "_bwd_dq": [(128, 32, 4, 2), (128, 64, 8, 2)]},
        256: {"_attn_fwd": [(128, 64, 8, 2)], "_bwd_dkdv": [(32, 64, 4, 2), (64, 64, 8, 2)],
              "_bwd_dq": [(64, 64, 4, 2), (128, 32, 8, 2)]},
        512: {"_attn_fwd": [(64, 64, 8, 2), (64, 32, 4, 2)], "_bwd_dkdv": [(32, 32, 4, 2)],
              "_bwd_dq": [(64, 32, 4, 2), (32, 32, 4, 2)]}},
    # float32 without tf32 has no tensor cores to run on: small tiles, and they spill above a head dimension of 64
    "ieee": {1024: dict.fromkeys(("_attn_fwd", "_bwd_dkdv", "_bwd_dq"), [(16, 16, 4, 2)])},
}
PINNED = {}            # kernel name -> (BLOCK_M, BLOCK_N, num_warps, num_stages): use these and try no others
TMA = None             # None: where the chip has it, strides allow, and it is worth it; False, True: as said
# Each program makes its TMA descriptors, and the host allocates the memory for them. Short walks over rows of up to 128
# bytes load by pointers: that code is nearly as short. (Chosen by instructions, not yet by time on a GPU.)
TMA_FROM = 2048        # positions of a walk


def configs(name, row_bytes, table):
    """The triton.Configs that autotune chooses from."""
    choices = next((sizes[name] for limit, sizes in CONFIGS[table].items() if row_bytes <= limit), [(16, 16, 4, 1)])
    return [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
            for m, n, warps, stages in ([PINNED[name]] if name in PINNED else choices)]


@functools.cache
def tuned(name, row_bytes, table, size_class):
    """The kernel, timed with each of its configurations at the first call of this kind."""
    return triton.autotune(configs(name, row_bytes, table), key=[])(globals()[name])


# ---- checks ----------------------------------------------------------------------------------------------------------

BACKENDS = {"triton": (flash_forward_triton, flash_backward_triton),
            "torch": (flash_forward_torch, flash_backward_torch), "sdpa": (), "reference": ()}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTERPRETED = {torch.float16, torch.float32, torch.float64}       # and bfloat16, where tests/interpreter.py mends it
OTHERS = "the others are torch, sdpa, reference"


def check(q, k, v, sm_scale, window, documents, backend):
    """Raises ValueError (an argument) or RuntimeError (a backend that cannot run it): one line, before anything."""
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.numel() == 0:
            raise ValueError(f"{name} must be (B, H, T, D), or all (B, T, D), and not empty, got {tuple(x.shape)}")
        if x.dtype != dtype or dtype not in DTYPES:
            raise ValueError("q, k, v must be of one floating-point dtype, float16, bfloat16, float32 or float64, got "
                             f"{dtype} and {name} {x.dtype}")
        if x.device != device:
            raise ValueError(f"q, k, v must be on one device, got {device} and {name} on {x.device}")
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    if not k.shape == v.shape == (B, K, S, D):
        raise ValueError(f"k and v must be (B, H_kv, S, D) with the B and D of q {tuple(q.shape)}, "
                         f"got {tuple(k.shape)} and {tuple(v.shape)}")
    if H % K:
        raise ValueError(f"q's heads must be a multiple of k's, got {H} and {K}")
    if D > 256:
        raise ValueError(f"head_dim must be at most 256, got {D}")
    if sm_scale is not None and not (isinstance(sm_scale, int | float) and 2**-126 <= sm_scale < math.inf):
        raise ValueError(f"sm_scale must be a number above 0 and finite in float32, got {sm_scale!r}")
    if window is not None and (not isinstance(window, int | torch.SymInt) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window must be at least 1 key, a whole number, or None, got {window!r}")
    if not isinstance(documents, Tensor | None):
        raise ValueError(f"documents must be a tensor, got {type(documents).__name__}")
    if documents is not None:
        shape, kind = documents.shape, documents.dtype
        is_ids = shape == (B, max(T, S)) and not (kind.is_floating_point or kind.is_complex)
        is_limits = shape == (2, B, T + S) and kind == torch.int32 and window is None
        if not (is_ids or is_limits) or documents.device != device:
            raise ValueError(f"documents must be ids ({B}, {max(T, S)}) of whole numbers, or limits (2, {B}, {T + S}) "
                             f"int32 with window None, on {device}, got {tuple(shape)} {kind} on {documents.device} "
                             f"with window {window}")
    if backend != "triton":
        return
    if dtype == torch.float64 and not INTERPRET:
        raise RuntimeError(f"backend triton: runs float64 only under TRITON_INTERPRET=1; {OTHERS}")
    if INTERPRET and dtype not in INTERPRETED:
        raise RuntimeError(f"backend triton: the interpreter computes with the bits of {dtype}, not its values; "
                           f"{OTHERS}")
    if max(B, H) > 65535:
        raise RuntimeError(f"backend triton: a grid takes B and H up to 65535, got {tuple(q.shape)}; {OTHERS}")


def resolve_backend(backend: str, device: torch.device, return_lse=False) -> str:
    """The backend that runs for tensors on this device. Raises ValueError for an unknown name, RuntimeError for triton
    where it cannot run."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    if backend == "auto":
        backend = "triton" if nvidia else "torch" if return_lse else "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "sdpa" and return_lse:
        raise ValueError("return_lse: backend sdpa gives no lse; triton, torch and reference do")
    if backend == "triton" and triton is None:
        raise RuntimeError(f"backend triton: no triton package is installed here; {OTHERS}")
    if backend == "triton" and not INTERPRET and not nvidia:
        raise RuntimeError("backend triton needs tensors on a GPU of NVIDIA's, or TRITON_INTERPRET=1 before the start "
                           f"(for tests: a training step takes minutes), got {device}; {OTHERS}")
    return backend


# ---- demo ------------------------------------------------------------------------------------------------------------

def demo():
    """The claims of this file, measured | predicted, asserted. CPU, some seconds. How fast it is: tests/bench."""
    assert round(8192**2 * 2 / 1e6) == 134 and TILE * TILE * 4 == 256 * 2**10                # the prose above, in bytes
    device, generator = "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    print("largest error in float64")
    s, v = draw(37) * 10, draw(37, 8)
    error = (online_softmax(s, v) - s.softmax(0) @ v).abs().max().item()
    print(f"    online softmax, against softmax(s) v                         {error:.1e}")
    assert error < 1e-12
    q, k, v, do = (draw(50, 8).requires_grad_() for _ in range(4))
    o = attention_reference(q[None, None], k[None, None], v[None, None], causal=True)[0, 0]
    tiled = causal_forward(q, k, v, 16)
    pairs = zip((tiled[0], *causal_backward(do, q, k, v, *tiled, 16)), (o, *torch.autograd.grad(o, (q, k, v), do)),
                strict=True)
    error = max((a - b).abs().max().item() for a, b in pairs)
    print(f"    causal tiles, against the textbook: o, dq, dk, dv            {error:.1e}")
    assert error < 1e-12

    print("\nlargest error against float64 / that of plain torch in the same dtype          o      dq      dk      dv")
    cases = [("torch", 203, causal, dtype) for causal in (False, True) for dtype in (torch.float32, torch.bfloat16)]
    if INTERPRET or device == "cuda":
        cases += [("triton", 49, causal, dtype) for causal in (False, True) for dtype in (torch.float32, torch.float16)]
    for backend, T, causal, dtype in cases:
        inputs, results = [draw(1, 2, T, 32).to(dtype) for _ in range(4)], []
        for kind, how in ((torch.float64, "reference"), (dtype, "reference"), (dtype, backend)):    # exact, plain, ours
            q, k, v, do = (x.to(kind, copy=True).requires_grad_() for x in inputs)
            o = flash_attention(q, k, v, causal=causal, backend=how)
            results.append([x.double() for x in (o, *torch.autograd.grad(o, (q, k, v), do))])
        cells = []
        for i, (exact, plain, ours) in enumerate(zip(*results, strict=True)):
            error, bound = ((x - exact).abs().max().item() for x in (ours, plain))
            cells.append(f"{error / bound:7.2f}")
            assert error <= (3 if i else 2) * bound + 1e-6, (backend, T, causal, dtype)
        print(f"    {backend:<7} T {T:<4} {'causal' if causal else 'full':<7} {str(dtype)[6:]:<38}", *cells)

    print("\nkept for backward, 4 heads of 64, float32, bytes: measured | predicted")
    for T in (256, 512):
        q, k, v = (torch.randn(1, 4, T, 64, device=device, requires_grad=True) for _ in range(3))
        saved = flash_attention(q, k, v, backend="torch").grad_fn.saved_tensors
        measured = sum(x.nbytes for x in saved if x is not None)
        predicted = 4 * T * (4 * 64 + 1) * 4                                        # q, k, v, o, and a number per row
        print(f"    T {T:<6} {measured:>10,} | {predicted:>10,}    the textbook's p alone {4 * T * T * 4:>10,}")
        assert measured == predicted


if __name__ == "__main__":
    demo()
