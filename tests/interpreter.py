"""Triton's interpreter (TRITON_INTERPRET=1) made a true check of bfloat16 kernels, and faster.

The stock interpreter keeps bfloat16 as raw bits in uint16 arrays and forgets that they are bits: tl.dot multiplies the
patterns as integers, + * < and reductions do likewise, and a cast from float32 cuts off instead of rounding. Nothing
is raised. It also patches triton.language anew for every launch and for every call of a nested @triton.jit function.

install() repairs this. Casts to and from bfloat16 are exact or rounded once, tl.dot multiplies the exact values and
accumulates in float32; loads, stores, tl.where and whatever else only moves data stay as they are. Arithmetic,
comparisons, reductions and atomics directly on bfloat16 raise: a kernel should say where it widens and where it rounds.
Where Triton itself widens first, on a GPU too, nothing is raised: always in / % and tl.max, before 3.9 also in
tl.maximum, tl.cumsum and comparing with a number. triton.language is patched once and for good, so real compilation
needs another process, as it does anyway. Floating-point exceptions are silent, as on a GPU: inf - inf is no warning.

strict_int32() is for tests of 64-bit offsets: within it, integer arithmetic that overflows raises.
count_traffic() counts the bytes that a kernel loads and stores, and finds addresses outside its tensors.

Integers become bfloat16 by way of float32, as in torch and in code for sm_80; sm_90 rounds once, which can differ above
2**24. Left as they are: float8, tl.dot_scaled, tl.dot into a float16 accumulator, and float32 products, which are never
cut to tf32.
"""

import contextlib
import dataclasses
import functools
import types
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# where the builder computes. Its other methods move data, or take only integers
ARITHMETIC = ["binary_op", "unary_op", "create_clampf", "create_fma", "create_fabs", "create_erf", "create_rsqrt",
              "create_atomic_rmw"]


def is_bf16(value) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def widen(bits):
    """Raw bfloat16 (uint16) as float32: the same values."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values, toward_zero=False):
    """Numbers as raw bfloat16 (uint16): to nearest, ties to even, or toward zero. NaN stays NaN."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    if values.dtype == np.float64:
        # round to odd: toward zero, with the last bit set if anything was lost; then the second rounding sees no tie
        # that was none
        bits = bits - (np.abs(single) > np.abs(values))
        bits = bits | (bits.view(np.float32) != values)
    rounded = bits if toward_zero else bits + ((bits >> 16 & 1) + 0x7FFF)
    return np.where(np.isnan(single), bits >> 16 | 0x40, rounded >> 16).astype(np.uint16)


def as_float32(handle):
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def cast_impl(stock_method, self, src, dst_type, toward_zero=False):
    if dst_type.scalar == tl.bfloat16:
        return TensorHandle(narrow(as_float32(src).data, toward_zero), tl.bfloat16)
    return stock_method(self, as_float32(src), dst_type)


def create_fp_to_fp(stock_method, self, src, dst_type, rounding_mode):
    dtypes = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 in dtypes and not any(dtype.is_fp8() for dtype in dtypes):
        return self.cast_impl(src, dst_type, toward_zero=rounding_mode == stock._ir.ROUNDING_MODE.RTZ)
    return stock_method(self, src, dst_type, rounding_mode)


def create_dot(stock_method, self, a, b, d, *precision):
    return stock_method(self, as_float32(a), as_float32(b), d, *precision)


def create_descriptor_load(stock_method, self, desc, *args, **kwargs):
    if desc.padding == stock._ir.PADDING_OPTION.PAD_NAN and desc.base.get_element_ty() == tl.bfloat16:
        raise NotImplementedError("a bfloat16 descriptor padded with NaN")      # stock would pad with zeros
    return stock_method(self, desc, *args, **kwargs)


def refuse_bf16(stock_method, self, *args, **kwargs):
    if any(map(is_bf16, args)):
        name = (args[-1] if isinstance(args[-1], np.ufunc) else stock_method).__name__
        raise TypeError(f"{name} directly on bfloat16: widen to float32 first")
    return stock_method(self, *args, **kwargs)


def refuse_bf16_reduction(stock_method, self, input):
    if any(is_bf16(tensor.handle) for tensor in (input if isinstance(input, tuple) else (input,))):
        raise TypeError("a reduction or scan directly on bfloat16: widen to float32 first")
    return stock_method(self, input)


def replace(owner, name, method):
    """Let owner.name call method(stock method, self, ...)."""
    stock_method = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **kwargs: method(stock_method, self, *args, **kwargs))


@functools.cache
def install():
    """Patch the interpreter of this process, once however often it is called."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before the kernels are imported")
    for name in ARITHMETIC:
        replace(InterpreterBuilder, name, refuse_bf16)
    for method in cast_impl, create_fp_to_fp, create_dot, create_descriptor_load:
        replace(InterpreterBuilder, method.__name__, method)
    replace(stock.ReduceScanOpInterface, "apply", refuse_bf16_reduction)
    InterpreterBuilder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)     # 3.6: none

    stock._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    stock._patch_lang = lambda fn: stock._LangPatchScope()               # a scope with nothing to restore
    tl.tensor.__index__ = lambda self: self.handle.data.item()           # 3.6: fails with numpy 2
    stock.GridExecutor.__call__ = np.errstate(all="ignore")(stock.GridExecutor.__call__)
    # without debug the overflow checks compute everything twice and then say nothing
    set_options(sanitize_overflow=False)


def set_options(**options):
    builder = stock.interpreter_builder
    before, builder.options = builder.options, dataclasses.replace(builder.options, **options)
    return before


@contextlib.contextmanager
def strict_int32():
    """Integer + - * that overflow their type raise, in lanes that are masked later too."""
    before = set_options(debug=True, sanitize_overflow=True)
    try:
        yield
    finally:
        stock.interpreter_builder.options = before


def count_traffic(kernel, tensors):
    """Run kernel() in the interpreter -> bytes (requested, distinct) that it loads and stores.

    Lanes that are masked off do not count, lanes of one load that name one address count once, distinct bytes are whole
    32-byte sectors, the unit in which HBM is read. An address outside all the tensors raises (in the interpreter's
    InterpreterError): on a GPU a kernel that leaves them reads garbage without a word.
    """
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in (x.untyped_storage() for x in tensors)]
    requested, sectors = [], []

    def watch(access, place_of_mask):
        def watched(builder, pointers, *args, **options):
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            inside = args[place_of_mask].data.astype("bool")
            address = torch.from_numpy(pointers.data.astype("int64")[inside]).unique()
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
