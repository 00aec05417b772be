"""Number formats: what 16, 8 and 4 bits can represent, what breaks in training with them, and what repairs it.

An H100 multiplies bfloat16 matrices at 989 TFLOP/s and FP8 matrices at 1979. A number of 16 bits also takes half of
float32's bytes in memory and on the wire. So training wants few bits. A floating-point number has a sign bit s, E
bits of exponent e, and M bits of mantissa m:

    x = (-1)^s 2^(e - bias) (1 + m / 2^M)        bias = 2^(E - 1) - 1. The largest e is infinity or NaN, but for e4m3
    x = (-1)^s 2^(1 - bias) (m / 2^M)            if e = 0: zero and the subnormal numbers

    E buys range, M buys precision: the neighbours of x lie ulp(x) = 2^(floor(log2 |x|) - M) apart; eps = ulp(1)

    format      E  M    largest   smallest normal    eps          format     E  M    largest   smallest normal    eps
    fp32        8  23   3.4e38    1.2e-38         1.2e-7          fp16       5  10   65504     6.1e-5          9.8e-4
    tf32        8  10   3.4e38    1.2e-38         9.8e-4          fp8 e4m3   4  3    448       1.6e-2           0.125
    bf16        8  7    3.4e38    1.2e-38         7.8e-3          fp8 e5m2   5  2    57344     6.1e-5            0.25

Three things fail in few bits. Each has its repair:

    1  an update vanishes     w + dw = w  if |dw| < ulp(w) / 2. In bf16, ulp(w) / 2 lies between w / 512 and w / 256.
                              Adam's late steps are smaller. Repair: float32 *master weights*. The optimizer updates
                              them, and the low-precision weights are their rounded copies. Or *stochastic rounding*,
                              which is right on average: E[cast(x)] = x
    2  a gradient underflows  cast(g) = 0  if |g| <= 2^-25 = 3e-8 in fp16: half its smallest subnormal number. Repair:
                              *loss scaling*. The backward pass of S x loss gives S x g, and the division by S is made
                              in float32. S doubles after 2000 good steps in a row. A gradient that overflows halves S,
                              and that step is skipped
    3  a number overflows     cast(x) = inf  if |x| >= 65520 = 65504 + ulp / 2 in fp16. Repair: bf16 has float32's range

Bytes per parameter, with Adam:    weight    gradient    master + moments    sum
    fp32                                4           4                   8     16
    a textbook's bf16 or fp16           2           2               4 + 8     16      (Micikevicius 2017; K of zero.py)
    this file's                         2           4               4 + 8     18      gradients are summed in float32
    without master weights              2           4                   8     14

Which operation runs in which format: `ComputePolicy` casts the inputs of matrix products and of attention to the low
format. Their kernels add up in float32. Norms, softmax, the loss, sums, the residual stream and the optimizer stay in
float32. FP8 has so little range that each tensor needs a scale of its own. Weights and inputs take e4m3, gradients take
e5m2. Only the products of linear layers run in FP8, not attention and not the head.

For inference, weights may become integers: w = (code - zero) x scale. Rounding to nearest takes each weight's closest
code. GPTQ (Frantar 2022) minimises the error of the layer's output, for inputs X (in, positions). It rounds W to Q,
column by column: w_i becomes q_i. Then the columns not yet rounded are changed, to make up for the error of w_i:

    min |W X - Q X|^2:    d_i = (w_i - q_i) / U_ii,   w_j -= d_i U_ij  for j > i,   U^T U = (X X^T)^-1, U upper triangle

    bytes per weight at rows of 512: int8 1.01, int4 0.59 (the code; a scale and a zero point per row or per 32 weights)

Map: formats, rounding - the mixed-precision step - MasterWeights - LossScaler - ComputePolicy - FP8 - integers - demo.
Not here: how hardware multiplies. That is torch's.

Sources: Mixed precision (Micikevicius 2017, arXiv:1710.03740); FP8 formats (Micikevicius 2022, arXiv:2209.05433);
stochastic rounding (Gupta 2015, arXiv:1502.02551); GPTQ (arXiv:2210.17323).

run: python precision.py
"""

import contextlib
import copy
import copyreg
import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

# ---- formats, and what rounding costs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A floating-point format, computed from its bits. infinities False (e4m3): the largest exponent holds ordinary
    numbers, and only its last code is NaN."""

    exponent_bits: int
    mantissa_bits: int
    dtype: torch.dtype | None = None                                                        # torch's name, if it has it
    infinities: bool = True

    bits = property(lambda self: 1 + self.exponent_bits + self.mantissa_bits)
    bias = property(lambda self: 2 ** (self.exponent_bits - 1) - 1)
    eps = property(lambda self: 2.0 ** -self.mantissa_bits)
    min_exponent = property(lambda self: 1 - self.bias)                                     # of normal numbers
    smallest_normal = property(lambda self: 2.0 ** self.min_exponent)
    smallest_subnormal = property(lambda self: 2.0 ** (self.min_exponent - self.mantissa_bits))

    @property
    def max(self) -> float:
        largest_exponent = 2 ** self.exponent_bits - 1 - self.infinities - self.bias        # True counts as 1
        largest_fraction = 2 - self.eps if self.infinities else 2 - 2 * self.eps            # else 2 - eps is NaN
        return 2.0 ** largest_exponent * largest_fraction


FORMATS = {"fp32": Format(8, 23, torch.float32), "tf32": Format(8, 10), "bf16": Format(8, 7, torch.bfloat16),
           "fp16": Format(5, 10, torch.float16), "e4m3": Format(4, 3, torch.float8_e4m3fn, infinities=False),
           "e5m2": Format(5, 2, torch.float8_e5m2)}
NAMES = {f.dtype: name for name, f in FORMATS.items() if f.dtype}                           # torch.bfloat16 -> "bf16"


def spacing(x: Tensor, fmt: str) -> Tensor:
    """Distance between the format's numbers around finite x, in float64: 2^(exponent - M). Subnormal numbers lie as far
    apart as the smallest normal ones."""
    f = FORMATS[fmt]
    exponent = torch.frexp(x.double()).exponent - 1                         # frexp's fraction is 0.5 ... 1, not 1 ... 2
    exponent = exponent.clamp(min=f.min_exponent).where(x != 0, f.min_exponent)
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - f.mantissa_bits)


def cast(x: Tensor, fmt: str, rounding: str = "nearest", *, generator=None) -> Tensor:
    """The numbers of format `fmt` that x becomes, in x's own shape and dtype. torch's casts give the same, except for
    some float64 numbers: torch rounds them to float32, and the result to `fmt`.

    rounding    "nearest": ties go to the even neighbour. "stochastic": rounds up with probability (x - floor) / spacing
    generator   of stochastic rounding's random numbers

    What is too large becomes infinity, or in e4m3, which has none, the largest number.
    Raises ValueError for an unknown format or rounding, and for x that is not floating point.
    """
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {', '.join(FORMATS)}, got {fmt!r}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    f, wide, step = FORMATS[fmt], x.double(), spacing(x, fmt)
    steps = wide / step                                                                     # exact: step is 2^n
    if rounding == "nearest":
        steps = steps.round()
    else:
        steps = (steps + torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device)).floor()
    y = (steps * step).where(wide.isfinite(), wide)
    if f.infinities:
        y = y.where(y.abs() <= f.max, math.inf * y.sign())
    else:
        y = y.clamp(-f.max, f.max)
    return y.to(x.dtype)


# ---- the mixed-precision step ----------------------------------------------------------------------------------------

def mixed_precision_step(weights, masters, optimizer, scale: float) -> bool:
    """One step, as a textbook has it. weights: in a low precision; their .grad is that of scale x loss. masters: the
    weights' float32 copies, which `optimizer` updates. Returns False if a gradient overflowed: no step was taken.

    MasterWeights and LossScaler, below, take the same steps bit for bit.
    """
    for w, m in zip(weights, masters, strict=True):
        m.grad = w.grad.float() / scale                                                     # unscale, in float32
    if finite := all(m.grad.isfinite().all() for m in masters):                             # nothing overflowed
        optimizer.step()                                                                    # update, in float32
    for w, m in zip(weights, masters, strict=True):
        w.data.copy_(m)                                                                     # round back
    return finite


def bytes_per_parameter(dtype: torch.dtype, master_weights: bool = True, moments: int = 2) -> dict:
    """{"weights", "gradients", "states"} in bytes. States: Adam's two float32 moments, and the master."""
    masters = 4 * (master_weights and dtype.itemsize < 4)
    return {"weights": dtype.itemsize, "gradients": 4, "states": 4 * moments + masters}


class MasterWeights(torch.optim.Optimizer):
    """An optimizer for low-precision parameters. It updates float32 copies of them, the masters, and rounds them back.

        optimizer = MasterWeights(model.to(torch.bfloat16).parameters(), torch.optim.AdamW, lr=1e-3)

    params         tensors or parameter groups. A parameter of less than 32 bits with requires_grad has a master. Any
                   other is updated as it is
    optimizer_cls  a callable (params, **kwargs) -> optimizer. During its step, a parameter's data *is* its master
    keep           False: the float32 copies exist during a step only, and what rounding cut off is lost
    rounding       of the parameters: "nearest" or "stochastic" (whose random numbers come from `generator`)

    p.grad is float32: torch casts every gradient to p.grad_dtype before it adds it to p.grad. Clip p.grad.
    state[p] holds the state of optimizer_cls and "master". Schedulers change param_groups, as with any optimizer.
    Pickle and deepcopy raise TypeError. state_dict() and load_state_dict() carry everything but `generator`.
    """

    def __init__(self, params, optimizer_cls, *, keep: bool = True, rounding: str = "nearest", generator=None,
                 **kwargs):
        self.keep, self.rounding, self.generator = keep, rounding, generator
        super().__init__(params, kwargs)
        self.inner = optimizer_cls(self.param_groups, **kwargs)
        self.defaults = self.inner.defaults

    def add_param_group(self, param_group: dict):
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype.itemsize < 4:
                p.grad_dtype = torch.float32
                if p.requires_grad and self.keep:
                    self.state[p]["master"] = p.detach().float()

    def low_parameters(self) -> list:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad and p.dtype.itemsize < 4]

    @contextlib.contextmanager
    def as_masters(self, params: list):
        """Inside, p.data is the master of p. At the end it is the low-precision tensor again: the master, rounded."""
        rounded = [p.data for p in params]
        for p in params:
            master = self.state[p].pop("master", None)      # out: Adam's first step makes moments if the state is empty
            p.data = p.float() if master is None else master
        try:
            yield
        finally:
            for p, data in zip(params, rounded, strict=True):
                master, p.data = p.data, data
                if self.keep:
                    self.state[p]["master"] = master
                if self.rounding == "stochastic":
                    master = cast(master, NAMES[p.dtype], "stochastic", generator=self.generator)
                p.copy_(master)

    @torch.no_grad()
    def step(self):
        # inner works on this optimizer's groups and states. At each step, since load_state_dict() makes new ones
        self.inner.param_groups, self.inner.state = self.param_groups, self.state
        with self.as_masters([p for p in self.low_parameters() if p.grad is not None]):
            self.inner.step()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict):
        """With keep, the parameters become the masters of state_dict, rounded. Without keep, they stay as they are.
        Raises ValueError if keep finds a master missing, and as torch does for groups that do not fit."""
        params, states = self.low_parameters(), state_dict["state"].values()
        if self.keep and sum("master" in state for state in states) < len(params):
            raise ValueError("state_dict must hold the master of every parameter, it does not")
        with self.as_masters(params):                       # torch casts a state to its parameter's dtype: float32 here
            super().load_state_dict(state_dict)
            for p in params if self.keep else ():
                p.copy_(self.state[p].pop("master"))

    def __getstate__(self):
        raise TypeError("MasterWeights is neither pickled nor copied, use state_dict() and load_state_dict()")


class LossScaler:
    """The loss scale S, and how it moves: as torch.amp.GradScaler's does. Its state has GradScaler's names. It holds no
    tensors. init_scale should be a power of two: then scaling loses no bit.

        scale = scaler.scale;  (loss * scale).backward()                     a copy: update() may change scaler.scale
        norm = |grad| / scale;  found_inf = norm is not finite;  scaler.update(found_inf)
        if not found_inf: grad *= min(1, clip / norm) / scale; optimizer.step()

    update() raises FloatingPointError where S would fall below min_scale: then a smaller scale is no help.
    """

    growth_factor, backoff_factor, min_scale = 2.0, 0.5, 2.0**-14
    saved = "scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"     # GradScaler's names

    def __init__(self, init_scale: float = 2.0**16, growth_interval: int = 2000):
        if not self.min_scale <= init_scale < math.inf:
            raise ValueError(f"init_scale must be finite, at least {self.min_scale}, got {init_scale}")
        self.scale, self.growth_interval, self._growth_tracker = init_scale, growth_interval, 0

    def update(self, found_inf: bool):
        if found_inf:                                                                       # S is too large
            self._growth_tracker = 0
            if self.scale * self.backoff_factor < self.min_scale:
                raise FloatingPointError(f"loss scale must not fall below {self.min_scale:g}, gradients overflow at "
                                         f"{self.scale:g}")
            self.scale *= self.backoff_factor
            return
        self._growth_tracker += 1
        if self._growth_tracker == self.growth_interval:                                    # S may be too small
            self._growth_tracker = 0
            if self.scale * self.growth_factor <= FORMATS["fp32"].max:
                self.scale *= self.growth_factor

    def state_dict(self) -> dict:
        return {key: getattr(self, key) for key in self.saved}

    def load_state_dict(self, state: dict):
        vars(self).update({key: state[key] for key in self.saved})


# ---- which operation runs in which format ----------------------------------------------------------------------------

# --precision (train.py) -> dtype of the parameters. Matrix products have it too, except in tf32 and in fp8
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
              "fp8": torch.bfloat16}


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` becomes "bf16" where the device has it, else "fp32". Another name is returned. Raises ValueError for one
    that the device lacks."""
    cuda = device.type == "cuda"
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if has_bf16 else "fp32"
    # a CPU computes bf16 and fp8, slowly. tf32: NVIDIA's GPUs that have bf16 (from Ampere on). version.hip: an AMD GPU
    has = {"tf32": has_bf16 and torch.version.hip is None, "bf16": has_bf16 or not cuda, "fp8": has_bf16 or not cuda}
    if not has.get(name, True):
        raise ValueError(f"precision must be one that the device has, {name} needs an NVIDIA GPU of Ampere or later, "
                         f"got {device}")
    return name


def functions(names: str) -> set:
    """torch's functions of these names. x.sum() and torch.sum(x) are two."""
    return {getattr(place, name) for name in names.split() for place in (torch, Tensor, F) if hasattr(place, name)}


# almost all FLOPs. The kernels add up in float32 and round the result once
LOW = functions("linear matmul __matmul__ __rmatmul__ mm bmm einsum scaled_dot_product_attention")
# few FLOPs, and errors that add up, or numbers that overflow. embedding: its gradient sums over a token's positions,
# and its float32 output begins the residual stream
FULL = functions("""layer_norm rms_norm softmax log_softmax logsumexp cross_entropy nll_loss embedding
                    sum mean var std cumsum exp log pow __pow__ rsqrt""")
# every other operation runs in the dtype that it is given; torch promotes a low and a float32 tensor to float32


def convert(x, dtype: torch.dtype):
    """x in dtype, if it is a floating-point tensor of at most 32 bits. Of a tuple, list or dict: each of its values."""
    if isinstance(x, tuple | list):
        return type(x)(convert(value, dtype) for value in x)
    if isinstance(x, dict):
        return {key: convert(value, dtype) for key, value in x.items()}
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not dtype and x.itemsize <= 4:
        return x.to(dtype)
    return x


class ComputePolicy(TorchFunctionMode):
    """Inside `with policy:`, the functions of LOW run in low_dtype and those of FULL in float32: their floating-point
    inputs are cast, as torch.autocast does. The sets may be changed (a vision model adds F.conv2d to LOW).

    low_dtype  torch.bfloat16 or torch.float16. Raises ValueError for another
    emulate    for a CPU, whose 16-bit kernels are slow: LOW runs float32 kernels on rounded inputs, and the result is
               rounded. Forward is the same up to the order of sums, ten times as fast. Backward runs float32 kernels

    - policy.applied(module) makes each call of the module, or of one of its parts, run inside the policy.
    - If a weight has an attribute `product` (see fp8_products), weight.product(...) is called instead of F.linear(...).
    - Only functions that Python code calls are looked up in LOW and FULL, not what a function of torch calls inside.
    - A policy holds in the thread that entered it.
    """

    def __init__(self, low_dtype: torch.dtype, emulate: bool = False):
        super().__init__()
        if low_dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"low_dtype must be torch.bfloat16 or torch.float16, got {low_dtype}")
        self.low_dtype, self.emulate = low_dtype, emulate

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if hasattr(weight, "product"):
                return weight.product(*convert(args, self.low_dtype), **convert(kwargs, self.low_dtype))
        if function in LOW:
            return self.run_low(function, *args, **kwargs)
        if function in FULL:
            args, kwargs = convert(args, torch.float32), convert(kwargs, torch.float32)
        return function(*args, **kwargs)

    def run_low(self, function, *args, **kwargs):
        args, kwargs = convert(args, self.low_dtype), convert(kwargs, self.low_dtype)
        if not self.emulate:
            return function(*args, **kwargs)
        return convert(function(*convert(args, torch.float32), **convert(kwargs, torch.float32)), self.low_dtype)

    def run_as_operation(self, function, *args, **kwargs):
        with torch._C.DisableTorchFunction():
            return self.run_low(function, *args, **kwargs)

    def as_operation(self, function):
        """function (attention) as one more operation of LOW. The operations that it calls are not looked up."""
        return functools.partial(self.run_as_operation, function)

    def active(self) -> bool:
        """Whether this thread is inside the policy. It is not while backward() runs: torch turns policies off there."""
        return any(mode is self for mode in _get_current_function_mode_stack())

    def applied(self, module: nn.Module) -> nn.Module:
        """Changes the module in place: each of its parts enters the policy when called. For the whole module alone
        this is not enough: recomputation calls parts again in backward. The module can be pickled and copied."""
        for part in module.modules():
            part.policy = self
            if not isinstance(part, Governed):
                part.__class__ = mixed(Governed, type(part))
        return module


class Mixed(type):
    """The type of the classes that mixed() makes."""


@functools.cache
def mixed(mixin: type, cls: type) -> type:
    """cls with the methods of mixin before its own. One class for all modules of cls: so torch.compile compiles a block
    once, and not once per layer."""
    return Mixed(mixin.__name__ + cls.__name__, (mixin, cls), {})


copyreg.pickle(Mixed, lambda cls: (mixed, cls.__bases__))      # pickle cannot find them by a name: it makes them again


class Governed:
    """What ComputePolicy.applied() mixes into each part of a module."""

    def forward(self, *args, **kwargs):
        with contextlib.nullcontext() if self.policy.active() else self.policy:
            return super().forward(*args, **kwargs)


# ---- FP8 -------------------------------------------------------------------------------------------------------------

def has_fp8(device) -> bool:
    """Whether the device multiplies FP8: NVIDIA's Ada, Hopper and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_scales(fmt: str, *tensors, group=None) -> list[Tensor]:
    """For each tensor its scale, 2^floor(log2(largest / amax)): times this, its largest magnitude amax still fits the
    format. To multiply by a power of two loses no bit. group: ranks that hold parts of the tensors and must agree on
    amax."""
    amax = torch.stack([t.detach().abs().amax().float() for t in tensors])
    if group is not None and group.size() > 1:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    # of zeros: 2^60. An infinity gets scale 0 and becomes NaN, which the gradient's norm finds
    return list((FORMATS[fmt].max / amax).log2().floor().clamp(max=60).exp2())


def encode(t: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """FP8 numbers of scale * t."""
    f = FORMATS[fmt]
    return (t.float() * scale).clamp(-f.max, f.max).to(f.dtype)


def fp8_matmul(a: Tensor, b: Tensor, scale: Tensor, dtype) -> Tensor:
    """a (M, K) b (K, N) / scale, summed in float32 -> (M, N) in dtype. a, b: FP8. The hardware wants K and N to be
    multiples of 16. Other sizes, and other devices, multiply the same numbers in float32."""
    if has_fp8(a.device) and a.shape[1] % 16 == b.shape[1] % 16 == 0:
        by_columns = b.T.contiguous().T                                                     # as the hardware reads b
        # _scaled_mm(a, b, s, t) is a b times s times t
        return torch._scaled_mm(a.contiguous(), by_columns, 1 / scale, torch.ones_like(scale), out_dtype=dtype)
    return (a.float() @ b.float() / scale).to(dtype)


class Fp8Product(torch.autograd.Function):
    """y = x W^T with x (N, in) and W (out, in) in e4m3. Backward: dy in e5m2,  dx = dy W,  dW = dy^T x.

    Backward keeps the FP8 numbers of x, one byte each. It rounds W again: a sharded weight is gathered again by then.
    """

    @staticmethod
    def forward(ctx, x, weight, group):
        scale_x, scale_w = fp8_scales("e4m3", x, weight, group=group)
        x8, w8 = encode(x, scale_x, "e4m3"), encode(weight, scale_w, "e4m3")
        ctx.save_for_backward(x8, scale_x, weight, scale_w)
        ctx.group = group
        return fp8_matmul(x8, w8.T, scale_x * scale_w, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x8, scale_x, weight, scale_w = ctx.saved_tensors
        scale_dy, = fp8_scales("e5m2", dy, group=ctx.group)
        dy8, dx, dw = encode(dy, scale_dy, "e5m2"), None, None
        if ctx.needs_input_grad[0]:
            w8 = encode(weight, scale_w, "e4m3")
            dx = fp8_matmul(dy8, w8, scale_dy * scale_w, dy.dtype)                          # dy W
        if ctx.needs_input_grad[1]:
            dw = fp8_matmul(dy8.T, x8, scale_dy * scale_x, weight.dtype)                    # dy^T x
        return dx, dw, None


def fp8_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, group=None) -> Tensor:
    """F.linear whose three products, one forward and two backward, are in FP8. input (..., in), weight (out, in).
    group: ranks that split the layer and agree on scales."""
    y = Fp8Product.apply(input.reshape(-1, weight.shape[1]), weight, group)
    y = y.view(*input.shape[:-1], len(weight))
    return y if bias is None else y + bias


def matrices(module: nn.Module, leave_out=()) -> dict:
    """{name: part} of the parts that multiply by a matrix of their own: linear layers and the head, not embeddings.
    Without those whose name contains a word of leave_out."""
    return {name: part for name, part in module.named_modules()
            if isinstance(weight := part._parameters.get("weight"), Tensor) and weight.ndim == 2
            and not isinstance(part, nn.Embedding) and not any(word in name for word in leave_out)}


def fp8_products(module: nn.Module, *, leave_out=("embed", "lm_head"), group=None) -> list:
    """Sets weight.product = fp8_linear in a module's linear layers. A ComputePolicy then calls it instead of F.linear,
    whatever the layer's class. Returns these weights. group: fp8_linear's.

    Layers whose name contains a word of leave_out are left as they are: the head, since the loss is most sensitive to
    logits. So are weights whose sizes are no multiples of 16. After a deepcopy call it again: torch's copies lose it.
    """
    weights = [part.weight for part in matrices(module, leave_out).values()]
    weights = [weight for weight in weights if not any(size % 16 for size in weight.shape)]
    for weight in weights:
        weight.product = functools.partial(fp8_linear, group=group)
    return weights


# ---- integers for inference ------------------------------------------------------------------------------------------

def grid(w: Tensor, max_code: int):
    """w (..., n) -> scale bf16, zero uint8, (...) each: in every row w = (code - zero) scale, codes 0 ... max_code go
    from its smallest number to its largest. 0 has a code."""
    lowest, highest = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    # bfloat16 may round the scale down by 2^-8 of it. The largest number would then be out of reach: so 2^-8 more
    scale = ((highest - lowest) / max_code * (1 + 2**-8)).clamp(min=2.0**-100).bfloat16()
    return scale, (-lowest / scale).round().to(torch.uint8)


def nearest_code(w, scale, zero, max_code: int) -> Tensor:
    """code = w / scale + zero, rounded, between 0 and max_code."""
    return (w / scale.to(w.dtype) + zero).round().clamp(0, max_code).to(torch.uint8)


def round_to_nearest(w: Tensor, max_code: int, group_size: int):
    """w (out, in) -> codes (out, groups x group_size) uint8, scale, zero (out, groups): every code by itself. A row has
    one grid per group_size columns."""
    w = F.pad(w, (0, -w.shape[1] % group_size)).unflatten(1, (-1, group_size))              # (out, groups, group_size)
    scale, zero = grid(w, max_code)
    return nearest_code(w, scale[..., None], zero[..., None], max_code).flatten(1), scale, zero


def gptq(w: Tensor, gram: Tensor, max_code: int, group_size: int):
    """As round_to_nearest, but codes (out, in), not padded. Column by column: what is right of it makes up for its
    error. gram (in, in) = X X^T of calibration inputs X (in, positions). (Frantar 2022, algorithm 1, without blocks)"""
    w, diagonal = w.double().clone(), gram.diagonal()
    # a gram that can be inverted, also where inputs repeat each other, or where one is always 0
    gram = gram.double() + torch.diag(0.01 * diagonal.mean() + (diagonal == 0).double())
    # U^T U = (X X^T)^-1
    U = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    codes, scales, zeros = [], [], []
    for i in range(w.shape[1]):
        if i % group_size == 0:                                                             # a group begins
            scale, zero = grid(w[:, i:i + group_size], max_code)
            scales.append(scale)
            zeros.append(zero)
        codes.append(nearest_code(w[:, i], scale, zero, max_code))
        q = (codes[-1].double() - zero) * scale.double()
        # d = (w_i - q_i) / U_ii;  w_j -= d U_ij
        w[:, i:] -= torch.outer((w[:, i] - q) / U[i, i], U[i, i:])
    return torch.stack(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1)


def pack(codes: Tensor) -> Tensor:
    """(out, n) codes below 16, n even -> (out, n / 2) bytes. Of two codes the first is in the byte's low 4 bits."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


class Quantized:
    """What quantize() mixes into a linear layer: `weight` is decoded from integers whenever it is asked for."""

    @property
    def weight(self) -> Tensor:
        codes = unpack(self.codes) if self.packed else self.codes
        codes = codes.view(*self.scale.shape, -1).float()                                   # (out, groups, size)
        w = (codes - self.zero[..., None]) * self.scale[..., None].float()
        return w.flatten(1)[:, :self.columns].to(self.dtype)

    def _apply(self, change, recurse=True):
        """.half(), .to(dtype): the dtype that weights are decoded to changes. The scales stay bfloat16."""
        scale, self.dtype = self.scale, change(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(change, recurse)
        self.scale = scale.to(self.codes.device)
        return self


@torch.no_grad()
def quantize(module: nn.Module, fmt: str, *, calibration=None, group_size: int = 32) -> nn.Module:
    """The weights of the module's linear layers and head become integers, in place. For inference.

    fmt          "int8": a scale and a zero point per row. "int4": per group_size columns of a row; two codes per byte
    calibration  batches: dicts of the module's arguments. With them GPTQ chooses the codes, from the inputs that each
                 layer sees while none is quantized. None: each weight is rounded to nearest

    Raises ValueError for another format, an odd group_size, a module without matrices, a calibration that does not
    reach every layer, NaN or infinities. Then nothing is changed.
    """
    if fmt not in ("int8", "int4"):
        raise ValueError(f"fmt must be int8 or int4, got {fmt!r}")
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be even and at least 2, got {group_size}")
    parts = matrices(module)
    if not parts:
        raise ValueError(f"module must have linear layers, {type(module).__name__} has none that are not integers yet")
    for name, part in parts.items():
        if not part.weight.isfinite().all():
            raise ValueError(f"weights must be finite, those of {name or type(part).__name__} are not")
    grams = None if calibration is None else gram_matrices(module, parts, calibration)
    max_code = 255 if fmt == "int8" else 15
    for name, part in parts.items():
        w = part.weight.detach()                                                            # (out, in)
        columns = w.shape[1]
        size = columns if fmt == "int8" else min(group_size, columns + columns % 2)
        codes, scale, zero = (round_to_nearest(w, max_code, size) if grams is None else
                              gptq(w, grams[name], max_code, size))
        if fmt == "int4":
            codes = pack(F.pad(codes, (0, -codes.shape[1] % size)))                         # to whole groups
        del part._parameters["weight"]
        part.columns, part.dtype, part.packed = columns, w.dtype, fmt == "int4"
        part.__class__ = mixed(Quantized, type(part))
        for key, value in (("codes", codes), ("scale", scale), ("zero", zero)):
            part.register_buffer(key, value)
    return module


def gram_matrices(module, parts: dict, calibration) -> dict:
    """{name: X X^T (in, in) of the inputs X (in, positions) that the part sees, summed over the batches, float64}."""
    grams = {}
    with contextlib.ExitStack() as hooks:                                                   # removed at its end
        for name, part in parts.items():
            def collect(_, args, kwargs, name=name):
                x = (*args, *kwargs.values())[0].double()
                x = x.reshape(-1, x.shape[-1])                                              # (positions, in)
                grams[name] = grams.get(name, 0) + x.T @ x
            hooks.enter_context(part.register_forward_pre_hook(collect, with_kwargs=True))
        for batch in calibration:
            module(**batch)
    for name, part in parts.items():
        if name not in grams:
            raise ValueError(f"calibration must reach every layer, {name or type(part).__name__} saw no input")
        if not grams[name].isfinite().all():
            raise ValueError(f"calibration must be finite, what {name or type(part).__name__} saw is not")
    return grams


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the matrices of linear layers and head, as they lie in memory."""
    total = sum(part.weight.nbytes for part in matrices(module).values())
    return total + sum(x.nbytes for part in module.modules() if isinstance(part, Quantized)
                       for x in (part.codes, part.scale, part.zero))


# ---- demo ------------------------------------------------------------------------------------------------------------

class Problem:
    """A student network learns a teacher's labels: 64 numbers -> 32 classes. The loss of a step's 64 rows is divided by
    2^22, as if they were a part of a batch of 4 million (GPT-3's has 3.2 million tokens). So gradients are small."""

    steps, batch_rows = 150, 2**22

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.teacher = torch.randn(64, 32, generator=generator)
        self.batches = torch.randn(self.steps, 64, 64, generator=generator)
        self.held_out = torch.randn(2048, 64, generator=generator)

    def loss(self, student, x):
        return F.cross_entropy(student(x).float(), (x @ self.teacher).argmax(-1), reduction="sum")

    def train(self, precision: str, init_scale: float | None = None, **options):
        """-> student, {"loss": held out, "zeros": share of gradients that are 0 in the last 50 steps, "skipped": steps,
        "bytes": per parameter}."""
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(64, 128, bias=False), nn.GELU(), nn.LayerNorm(128, bias=False),
                                nn.Linear(128, 128, bias=False), nn.GELU(), nn.Linear(128, 32, bias=False))
        student.to(PRECISIONS[precision])
        if precision == "fp8":
            fp8_products(student, leave_out=("5",))
        if precision != "fp32":
            ComputePolicy(PRECISIONS[precision], emulate=True).applied(student)
        params = list(student.parameters())
        optimizer = MasterWeights(params, torch.optim.AdamW, weight_decay=0.0, eps=1e-15, **options)
        scaler = LossScaler(init_scale, growth_interval=50) if init_scale else None
        skipped, zeros = 0, []
        for step, x in enumerate(self.batches):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / self.steps)
            scale = scaler.scale if scaler else 1.0
            (self.loss(student, x) * (scale / self.batch_rows)).backward()
            grads = [p.grad for p in params]
            torch._foreach_div_(grads, scale)                                               # unscale
            found_inf = not all(g.isfinite().all() for g in grads)
            if scaler:
                scaler.update(found_inf)
            if not found_inf:
                optimizer.step()
                zeros.append(share(g == 0 for g in grads))
            skipped += found_inf
        tensors = [*params, *grads, *(x for state in optimizer.state.values() for x in state.values())]
        size = sum(x.nbytes for x in tensors if x.numel() > 1) / sum(p.numel() for p in params)  # without Adam's counts
        with torch.no_grad():
            loss = self.loss(student, self.held_out).item() / len(self.held_out)
        return student, {"loss": loss, "zeros": sum(zeros[-50:]) / 50, "skipped": skipped, "bytes": size}


def share(masks) -> float:
    """The share of entries that are True."""
    return torch.cat([x.flatten() for x in masks]).double().mean().item()


def demo():
    """The claims of this file, measured | predicted, asserted. CPU, seconds."""
    torch.set_num_threads(1)

    def row(what, measured, predicted, tolerance=0.0):
        print(f"{what:<78} {measured:>12,.6g} | {predicted:>12,.6g}")
        assert abs(measured - predicted) <= tolerance, what

    print("format   E   M  bits      largest  smallest normal     subnormal        eps   torch.finfo")
    for name, f in FORMATS.items():
        info = f.dtype and torch.finfo(f.dtype)
        print(f"{name:<7} {f.exponent_bits:>2} {f.mantissa_bits:>3} {f.bits:>5} {f.max:>12.6g} "
              f"{f.smallest_normal:>16.6g} {f.smallest_subnormal:>13.4g} {f.eps:>10.4g}   {'same' if info else '-'}")
        assert not info or (f.bits, f.max, f.smallest_normal, f.eps) == (
            info.bits, info.max, info.smallest_normal, info.eps)

    print(f"\n{'three failures and their repairs':<78} {'measured':>12} | {'predicted':>12}")
    generator = torch.Generator().manual_seed(0)
    # 1. an update smaller than half the spacing
    w = (0.05 * torch.randn(20_000, generator=generator)).bfloat16().float()
    dw = 1e-4 * (0.5 + torch.rand(w.shape, generator=generator))
    # nextafter: the spacing just above w. At w = -2^n it is half of the spacing below w
    row("weights that a step of 1e-4 does not move, bf16 | |dw| < ulp(w) / 2", share([cast(w + dw, "bf16") == w]),
        share([dw < spacing(w.nextafter(w + 1), "bf16") / 2]))
    nearest, stochastic, master = w, w, w
    for _ in range(100):
        nearest = cast(nearest + dw, "bf16")
        stochastic = cast(stochastic + dw, "bf16", "stochastic", generator=generator)
        master = master + dw
    moved, predicted = [(x - w).mean().item() for x in (nearest, stochastic, cast(master, "bf16"))], 100 * dw.mean()
    row("mean way after 100 such steps: a master, rounded to bf16 at the end | 100 dw", moved[2], predicted, 5e-5)
    row("the same, no master, stochastic rounding | 100 dw", moved[1], predicted, 5e-5)
    print(f"{'the same, no master, rounded to nearest':<78} {moved[0]:>12,.6g} |")
    assert moved[0] < 0.7 * predicted
    # 2. a gradient below half of the smallest subnormal
    g = torch.exp(torch.randn(100_000, generator=generator) * 3 - 16)
    for scale in (1.0, 2.0**16):
        row(f"gradients that become 0, fp16, loss scale {scale:g} | |g| <= 2^-25 / scale",
            share([(g * scale).half() == 0]), share([g <= 2**-25 / scale]))
    # 3. a number above the largest
    big = torch.exp(torch.randn(100_000, generator=generator) * 2 + 8)
    row("numbers that become infinite, fp16 | |x| >= 65520", share([big.half().isinf()]), share([big >= 65520]))
    row("the same, bf16", share([big.bfloat16().isinf()]), 0)

    print("\none problem, several recipes: 150 steps of AdamW, learning rate falling to 0\n"
          f"{'':<34} {'held-out loss':>13}  {'zero gradients':>14}  {'skipped':>7}  bytes: measured | predicted")
    problem, students, results = Problem(), {}, {}
    stochastic = {"keep": False, "rounding": "stochastic", "generator": torch.Generator().manual_seed(0)}
    for name, precision, options in (
            ("fp32", "fp32", {}), ("bf16, masters", "bf16", {}), ("bf16, none, to nearest", "bf16", {"keep": False}),
            ("bf16, none, stochastic rounding", "bf16", stochastic), ("fp16, masters, no scale", "fp16", {}),
            ("fp16, masters, loss scale", "fp16", {"init_scale": 2.0**34}), ("fp8 products, bf16 masters", "fp8", {})):
        students[name], r = problem.train(precision, **options)
        results[name] = r
        predicted = sum(bytes_per_parameter(PRECISIONS[precision], options.get("keep", True)).values())
        print(f"{name:<34} {r['loss']:>13.4f}  {r['zeros']:>14.1%}  {r['skipped']:>7}  {r['bytes']:.0f} | {predicted}")
        assert r["bytes"] == predicted

    # what theory says of them
    worse = {name: r["loss"] - results["fp32"]["loss"] for name, r in results.items()}
    assert all(abs(worse[name]) < 0.05 for name in ("bf16, masters", "bf16, none, stochastic rounding",
                                                    "fp16, masters, loss scale", "fp8 products, bf16 masters"))
    assert worse["bf16, none, to nearest"] > 0.05 < worse["fp16, masters, no scale"]
    assert results["fp16, masters, loss scale"]["skipped"] > 0
    assert results["fp16, masters, no scale"]["zeros"] > 0.05 > results["fp16, masters, loss scale"]["zeros"]

    student = students["fp32"]
    with torch.no_grad():
        expected, before = student(problem.held_out), weight_bytes(student)
        print(f"\nthe fp32 student's matrices, {before:,} bytes, as integers: {'held-out loss':>18}  "
              "bytes: measured | predicted  error of logits")
        for fmt, bits, groups in (("int8", 8, 128 + 128 + 32), ("int4", 4, 128 * 2 + 128 * 4 + 32 * 4)):
            errors = []
            for how, calibration in (("to nearest", None), ("GPTQ", [{"input": x} for x in problem.batches[:32]])):
                small = quantize(copy.deepcopy(student), fmt, calibration=calibration)
                errors.append(((small(problem.held_out) - expected).norm() / expected.norm()).item())
                size, predicted = weight_bytes(small), before // 4 * bits // 8 + 3 * groups
                print(f"{f'{fmt}, {how}':<56} {problem.loss(small, problem.held_out).item() / 2048:>16.4f}  "
                      f"{size:>15,} | {predicted:,}  {errors[-1]:>18.2%}")
                assert size == predicted
            assert errors[1] < errors[0], fmt


if __name__ == "__main__":
    demo()
