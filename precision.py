"""Number formats: what 16, 8 and 4 bits hold, what that breaks in training, and what mends it.

An H100 multiplies bfloat16 matrices at 989 TFLOP/s and FP8 ones at 1979, and memory moves half or a quarter of the
bytes of float32. So training wants few bits. A floating-point number has a sign, E bits of exponent and M of mantissa:

    x = (-1)^s 2^(e - bias) (1 + m / 2^M)        bias = 2^(E - 1) - 1;     e = 0: 2^(1 - bias) (m / 2^M), subnormal

    E buys range, M buys precision: neighbours of x lie ulp(x) = 2^(floor log2 |x| - M) apart, eps = ulp(1)

    format      E  M    largest   smallest normal    eps          format     E  M    largest   smallest normal    eps
    fp32        8  23   3.4e38    1.2e-38         1.2e-7          fp8 e4m3   4  3    448       1.6e-2           0.125
    tf32        8  10   3.4e38    1.2e-38         9.8e-4          fp8 e5m2   5  2    57344     6.1e-5            0.25
    bf16        8  7    3.4e38    1.2e-38         7.8e-3          int8       -  7    127       1                    1
    fp16        5  10   65504     6.1e-5          9.8e-4          int4       -  3    7         1                    1

Three failures, each with its cure:

    1  an update vanishes     w + dw = w  if |dw| < ulp(w) / 2: in bf16, if dw is below a 256th to a 512th of w. Adam's
                              late, small steps are. Cure: float32 *master weights*, of which the low ones are rounded
                              copies; or *stochastic rounding*, which is right on average: E[cast(x)] = x
    2  a gradient underflows  cast(g) = 0  if |g| <= 2^-25 = 3e-8 in fp16. Cure: *loss scaling*: backward of S L gives
                              S g; divide by S in float32. S doubles after 2000 good steps, halves when a gradient
                              overflows, and that step is skipped
    3  a number overflows     cast(x) = inf  if |x| >= 65520 in fp16. Cure: range; bf16 has float32's

Bytes a parameter, with Adam:    weight    gradient    master and moments    sum
    fp32                           4          4               8               16
    the lecture's bf16 or fp16     2          2            4 + 8              16       (Micikevicius 2017; ZeRO: K = 12)
    this file's                    2          4            4 + 8              18       gradients add up in float32
    without master weights         2          4               8               14
    int8, int4 for inference     1.01, 0.59 at a row of 512: codes, a scale and a zero point a row, or a group of 32

What runs in which format is a table (`OPERATIONS`), applied from outside by `ComputePolicy`: matrix products and
attention in the low one, whose kernels sum in float32; norms, softmax, the loss, sums, the residual stream and the
optimizer in float32. FP8 has so little range that each tensor gets a scale of its own: weights and inputs in e4m3,
gradients in e5m2, in matrix products alone (`Fp8Linear`).

For inference weights may be integers, w = (code - zero) scale. Rounding to nearest takes the closest code to each; GPTQ
(Frantar 2022) asks what the layer's output loses, and lets the columns not yet rounded make up for those that are:

    min |W X - Q X|^2:    d_i = (w_i - q_i) / U_ii,   w_j -= d_i U_ij  for j > i,   U^T U = (X X^T)^-1, U upper triangle

Map: formats and cast - bytes - MasterWeights - LossScaler - ComputePolicy - FP8 - quantization - demo. Not here: what
hardware multiplies; that is torch's.

Sources: Mixed precision (Micikevicius 2017, arXiv:1710.03740); FP8 formats (Micikevicius 2022, arXiv:2209.05433);
stochastic rounding (Gupta 2015, arXiv:1502.02551); GPTQ (arXiv:2210.17323); delayed scaling (Transformer Engine).

run: python precision.py
"""

import copy
import ctypes
import functools
import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

# ---- formats ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A number format from its bits. exponent_bits 0: two's-complement integers, of mantissa_bits beside the sign.
    infinities False: the largest exponent holds numbers, its last code NaN (e4m3)."""

    exponent_bits: int
    mantissa_bits: int
    dtype: torch.dtype | None = None
    infinities: bool = True

    integer = property(lambda self: not self.exponent_bits)
    bits = property(lambda self: 1 + self.exponent_bits + self.mantissa_bits)
    bias = property(lambda self: 2 ** (self.exponent_bits - 1) - 1)
    # exponent of the smallest normal number; all spacings below are as there
    min_exponent = property(lambda self: self.mantissa_bits if self.integer else 1 - self.bias)
    smallest_normal = property(lambda self: 1.0 if self.integer else 2.0 ** self.min_exponent)
    smallest_subnormal = property(lambda self: 2.0 ** (self.min_exponent - self.mantissa_bits))
    eps = property(lambda self: 1.0 if self.integer else 2.0 ** -self.mantissa_bits)
    # decimal digits that survive
    digits = property(lambda self: math.floor(self.mantissa_bits * math.log10(2)))

    @property
    def max(self) -> float:
        if self.integer:
            return 2.0 ** self.mantissa_bits - 1
        top = 2 ** self.exponent_bits - 1 - self.infinities - self.bias
        return 2.0 ** top * (2 - (1 if self.infinities else 2) * self.eps)

    @property
    def min(self) -> float:
        return -self.max - self.integer


FORMATS = {"fp32": Format(8, 23, torch.float32), "tf32": Format(8, 10), "bf16": Format(8, 7, torch.bfloat16),
           "fp16": Format(5, 10, torch.float16), "e4m3": Format(4, 3, torch.float8_e4m3fn, infinities=False),
           "e5m2": Format(5, 2, torch.float8_e5m2), "int8": Format(0, 7, infinities=False),
           "int4": Format(0, 3, infinities=False)}


def spacing(x: Tensor, fmt: str) -> Tensor:
    """Distance between the format's numbers around finite x, float64: ulp(x) = 2^(max(floor log2 |x|, low) - M)."""
    f = FORMATS[fmt]
    exponent = torch.frexp(x.double()).exponent - 1                                        # x = 1.f 2^exponent
    if f.integer:
        return torch.ones_like(x, dtype=torch.float64)
    exponent = exponent.clamp(min=f.min_exponent).where(x != 0, f.min_exponent)
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - f.mantissa_bits)


def cast(x: Tensor, fmt: str, rounding: str = "nearest", *, saturate: bool = False, generator=None) -> Tensor:
    """The numbers of format `fmt` that x becomes, in x's own dtype. Any shape.

    rounding    "nearest", ties to even, or "stochastic": up with the probability of being that far up, E[cast(x)] = x
    saturate    too large becomes the largest number, not infinity; in e4m3, which has none, and in integers always.
                torch's own casts (2.13) do the same, but round float64 twice, to float32 first; here once
    generator   of the random numbers
    Raises ValueError for an unknown format or rounding, x that is not floating point, NaN where the format has none.
    """
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {', '.join(FORMATS)}, got {fmt!r}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding must be nearest or stochastic, got {rounding!r}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    f = FORMATS[fmt]
    if f.integer and x.isnan().any():
        raise ValueError(f"x must not hold NaN, which {fmt} cannot say, got {int(x.isnan().sum())}")
    wide, step = x.double(), spacing(x, fmt)
    steps = wide / step
    if rounding == "nearest":
        steps = steps.round()
    else:
        # floor(x + u), u uniform in [0, 1)
        steps = (steps + torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device)).floor()
    y = torch.where(wide.isfinite(), steps * step, wide)
    if saturate or not f.infinities:
        y = y.clamp(f.min, f.max)
    else:
        y = torch.where(y.abs() > f.max, math.inf * y.sign(), y)
    return y.to(x.dtype)


# ---- what training keeps ---------------------------------------------------------------------------------------------

# --precision -> dtype of parameters and matrix products
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
              "fp8": torch.bfloat16}


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` -> "bf16" where the device has it, else "fp32"; another name -> itself. Raises ValueError for one that the
    device lacks."""
    cuda = device.type == "cuda"
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if has_bf16 else "fp32"
    # a CPU emulates what it lacks, but not tf32: that is how an NVIDIA GPU multiplies float32
    lacks = not has_bf16 or torch.version.hip is not None if name == "tf32" else cuda and not has_bf16
    if lacks and name in ("tf32", "bf16", "fp8"):
        raise ValueError(f"precision must be one that the device has, {name} needs an NVIDIA GPU of Ampere or later, "
                         f"got {device}")
    return name


def bytes_per_parameter(dtype: torch.dtype, master_weights: bool = True, moments: int = 2) -> dict:
    """{"weights", "gradients", "states"} of parameters of a dtype, with Adam's two float32 moments."""
    masters = 4 * (master_weights and dtype.itemsize < 4)
    return {"weights": dtype.itemsize, "gradients": 4, "states": 4 * moments + masters}


class MasterWeights(torch.optim.Optimizer):
    """Low-precision parameters for forward and backward; float32 copies and states for the update.

        optimizer = MasterWeights(model.to(torch.bfloat16).parameters(), torch.optim.AdamW, lr=1e-3)
        loss.backward(); optimizer.step(); optimizer.zero_grad()

        m.grad = p.grad           gradients arrive in p's dtype and add up in float32 (p.grad_dtype)
        update(m)                 optimizer_cls, on float32 tensors
        p = cast(m)

    params: tensors, or groups, of any floating dtypes; those of float32 or wider are their own masters. optimizer_cls:
    any callable (params, **kwargs) -> optimizer. Parameters may be whole, slices or views: attributes travel to the
    masters. A torch.optim.Optimizer: groups, schedulers, closures, state_dict; gradients are clipped where they are,
    in float32.

    keep: False makes the float32 copies for the update alone and drops them, and with them what p cannot say.
    rounding: "nearest" | "stochastic", of p = cast(m); generator: of the latter, whose state is the caller's to save.
    state[p] is the inner optimizer's, and "master". load_state_dict() takes its own state_dict() or that of
    optimizer_cls on float32 parameters: then the masters are what p says.
    """

    def __init__(self, params, optimizer_cls, *, keep: bool = True, rounding: str = "nearest", generator=None,
                 **kwargs):
        self.masters, self.keep, self.rounding, self.generator, self.inner = {}, keep, rounding, generator, None
        super().__init__(params, kwargs)
        self.inner = optimizer_cls([self.inside(group) for group in self.param_groups], **kwargs)
        if any(x.default is x.empty for x in inspect.signature(self.inner.step).parameters.values()):
            raise ValueError(f"optimizer_cls must step without a closure, {type(self.inner).__name__} does not")
        self.defaults = self.inner.defaults
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update({key: x for key, x in theirs.items() if key != "params"})
        self.drop()

    def drop(self):
        for p, m in self.masters.items():
            if m is not p and not self.keep:
                m.data = m.new_empty(0)

    def __getstate__(self):
        return self.__dict__                                                            # torch's forgets what is ours

    def __setstate__(self, state):
        super().__setstate__(state)
        for p, m in self.masters.items():
            if m is not p:                                               # a deep copy of p has lost it, and m moved
                p.grad_dtype = torch.float32
                if self.keep:
                    self.state[p]["master"] = m.detach()

    def inside(self, group) -> dict:
        """The group as the inner optimizer has it: of masters."""
        for p in group["params"]:
            if p.dtype.itemsize < 2:
                raise ValueError(f"params must be of at least 16 bits, got {p.dtype}")
            self.masters[p] = p
            if p.requires_grad and torch.promote_types(p.dtype, torch.float32) != p.dtype:
                m = self.masters[p] = nn.Parameter(p.detach().float())
                m.__dict__.update(p.__dict__)
                p.grad_dtype = torch.float32
                if self.keep:
                    master = self.state[p]["master"] = m.detach()
                    master.copied = master._version
        return group | {"params": [self.masters[p] for p in group["params"]]}

    def add_param_group(self, param_group: dict):
        super().add_param_group(param_group)
        if self.inner is not None:
            self.inner.add_param_group(self.inside(self.param_groups[-1]))
            self.drop()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update({key: x for key, x in ours.items() if key != "params"})          # a schedule's learning rate
        master_of = {p: m for p, m in self.masters.items() if m is not p and p.grad is not None}
        for p, m in self.masters.items():
            if m is p and p.grad is not None and torch.promote_types(p.dtype, torch.float32) != p.dtype:
                raise RuntimeError("params must stay frozen if they were at construction, one without a master got a "
                                   "gradient")
        for p, m in self.masters.items():
            self.inner.state[m] = {key: x for key, x in self.state[p].items() if key != "master"}
        for p, m in master_of.items():
            if not self.keep:
                m.data = p.float()
            m.grad = p.grad
        self.inner.step()
        for p, m in self.masters.items():
            self.state[p].update(self.inner.state[m])
        # p = cast(m)
        if master_of and self.rounding == "nearest":
            torch._foreach_copy_(list(master_of), list(master_of.values()))
        for p, m in master_of.items():
            if self.rounding == "stochastic":
                p.copy_(cast(m, NAMES[p.dtype], "stochastic", generator=self.generator))
            m.grad = None
        self.drop()
        return loss

    def state_dict(self) -> dict:
        """As optimizer_cls's, which can load it, and masters; without those that are still the copy of p they began as.
        """
        saved = super().state_dict()
        return saved | {"state": {i: x for i, x in saved["state"].items() if x.keys() != {"master"}
                                  or x["master"]._version != getattr(x["master"], "copied", None)}}

    def load_state_dict(self, state_dict: dict):
        """Raises ValueError, as torch's, for groups that do not fit."""
        # torch would cast the moments to p's dtype; the inner optimizer's parameters are float32
        state = {i: {key: x for key, x in x.items() if key != "master"} for i, x in state_dict["state"].items()}
        self.inner.load_state_dict(state_dict | {"state": state})
        params = [p for group in self.param_groups for p in group["params"]]
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update({key: x for key, x in theirs.items() if key != "params"})
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(numbers, params, strict=True):
            m = self.masters[p]
            self.state[p].update(self.inner.state[m])
            if m is not p and self.keep:
                known = state_dict["state"].get(i, {}).get("master")
                with torch.no_grad():
                    m.copy_(p if known is None else known)
                    p.copy_(m)
                if known is None:
                    self.state[p]["master"].copied = m._version


NAMES = {f.dtype: name for name, f in FORMATS.items() if f.dtype}


def float32(x: float) -> float:
    """GradScaler's scale is a float32 tensor."""
    return ctypes.c_float(x).value


class LossScaler:
    """The loss scale S as a state machine: no tensors, no groups. Names and behaviour are torch.amp.GradScaler's.

        loss' = S loss;  norm = |grad| / S;  found_inf = norm is not finite;  grad *= min(1, clip / norm) / S

        found_inf         S *= backoff_factor, and the step is skipped
        growth_interval   good steps in a row: S *= growth_factor

    update() raises FloatingPointError where S would fall below min_scale: it is no overflow that a smaller one mends.
    """

    def __init__(self, init_scale: float = 2.0**16, growth_factor: float = 2.0, backoff_factor: float = 0.5,
                 growth_interval: int = 2000, min_scale: float = 2.0**-14):
        for name, ok, rule in (("init_scale", min_scale <= init_scale < math.inf, f"be finite, at least {min_scale}"),
                               ("growth_factor", growth_factor > 1, "be above 1"),
                               ("backoff_factor", 0 < backoff_factor < 1, "lie between 0 and 1"),
                               ("growth_interval", growth_interval >= 1, "be at least 1")):
            if not ok:
                raise ValueError(f"{name} must {rule}, got {locals()[name]}")
        self.scale, self.growth_factor, self.backoff_factor = float32(init_scale), growth_factor, backoff_factor
        self.growth_interval, self.min_scale, self.growth_tracker = growth_interval, min_scale, 0

    def update(self, found_inf: bool):
        if found_inf:
            smaller = float32(self.scale * self.backoff_factor)
            if smaller < self.min_scale:
                raise FloatingPointError(f"loss scale must not fall below {self.min_scale:g}, gradients overflow at "
                                         f"{self.scale:g}")
            self.scale, self.growth_tracker = smaller, 0
            return
        self.growth_tracker += 1
        if self.growth_tracker == self.growth_interval:
            # a scale that float32 cannot say is not taken
            grown = float32(self.scale * self.growth_factor)
            self.scale, self.growth_tracker = grown if math.isfinite(grown) else self.scale, 0

    def state_dict(self) -> dict:
        return {"scale": self.scale, "growth_factor": self.growth_factor, "backoff_factor": self.backoff_factor,
                "growth_interval": self.growth_interval, "_growth_tracker": self.growth_tracker}

    def load_state_dict(self, state: dict):
        self.scale, self.growth_factor, self.backoff_factor = (state[key] for key in (
            "scale", "growth_factor", "backoff_factor"))
        self.growth_interval, self.growth_tracker = state["growth_interval"], state["_growth_tracker"]


# ---- what runs in which format ---------------------------------------------------------------------------------------

LOW, FULL = "the policy's dtype", torch.float32


def spelled(names: str) -> list:
    """Functions of these names, wherever torch has them."""
    places = torch, Tensor, F, torch.linalg, torch.special
    return [getattr(place, name) for name in names.split() for place in places if hasattr(place, name)]


OPERATIONS = {
    # matrix products and attention: almost all FLOPs. The kernels add up in float32, what comes out is rounded once
    **dict.fromkeys(spelled("""
        linear bilinear matmul __matmul__ __rmatmul__ mm bmm mv addmm addbmm baddbmm addmv addr inner tensordot einsum
        chain_matmul multi_dot conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d prelu
        scaled_dot_product_attention multi_head_attention_forward lstm gru rnn_tanh rnn_relu
        lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"""), LOW),
    # norms, softmax, losses, sums, products and powers: few FLOPs, and errors that add up, or overflow; and where the
    # residual stream begins: the gradients of a word that is met a thousand times add up in float32
    **dict.fromkeys(spelled("""
        layer_norm rms_norm group_norm batch_norm instance_norm local_response_norm normalize renorm
        norm vector_norm matrix_norm dist cdist pdist cosine_similarity
        softmax softmin log_softmax gumbel_softmax logsumexp softplus cross_entropy nll_loss mse_loss l1_loss
        smooth_l1_loss huber_loss kl_div poisson_nll_loss gaussian_nll_loss binary_cross_entropy
        binary_cross_entropy_with_logits cosine_embedding_loss hinge_embedding_loss margin_ranking_loss soft_margin_loss
        multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss triplet_margin_loss ctc_loss
        sum nansum mean nanmean var std var_mean std_mean dot vdot prod cumsum cumprod logcumsumexp
        exp exp2 expm1 log log2 log10 log1p pow __pow__ __rpow__ float_power rsqrt reciprocal
        sinh cosh tan acos asin erfinv embedding embedding_bag"""), FULL)}
# all others run in what they are given; torch promotes a low and a float32 tensor to float32


def convert(x, dtype):
    """x, in dtype if it is a floating-point tensor of at most 32 bits; a list of such too."""
    if isinstance(x, list | tuple):
        return type(x)(convert(each, dtype) for each in x)
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not dtype and x.itemsize <= 4:
        return x.to(dtype)
    return x


def lowered(function, dtype: torch.dtype):
    """function with its floating-point tensors in dtype."""
    def run(*args, **kwargs):
        return function(*(convert(x, dtype) for x in args), **{name: convert(x, dtype) for name, x in kwargs.items()})
    return run


class ComputePolicy(TorchFunctionMode):
    """Inside, operations run as the table says: floating-point arguments (but float64's) are cast, as torch.autocast
    does, with a table that can be read, changed, and applied to a module from outside.

    low: torch.bfloat16 or torch.float16. table: {function: LOW | torch.float32}. A weight that has a `product` (see
    fp8_products) is multiplied by that in F.linear's place. emulate: float32 kernels on rounded numbers, their result
    rounded: what a low kernel does, and ten times as fast where a CPU has none, but backward keeps float32. A call is
    looked up as it is made, not what torch makes of it inside; one in place, or with out=, runs as it is given. A
    policy holds in the thread that entered it. Raises ValueError for another low_dtype.
    """

    def __init__(self, low_dtype: torch.dtype, table: dict = OPERATIONS, emulate: bool = False):
        super().__init__()
        if low_dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"low_dtype must be torch.bfloat16 or torch.float16, got {low_dtype}")
        self.low_dtype, self.table, self.emulate = low_dtype, table, emulate

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = self.table.get(function)
        if to is not None and kwargs.get("out") is None:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if function is F.linear and hasattr(weight, "product"):
                function = lowered(weight.product, self.low_dtype if to is LOW else to)
            else:
                function = self.in_low(function) if to is LOW else lowered(function, to)
        return function(*args, **kwargs)

    def in_low(self, function):
        if self.emulate:
            return lowered(lambda *x, **k: convert(lowered(function, FULL)(*x, **k), self.low_dtype), self.low_dtype)
        return lowered(function, self.low_dtype)

    def as_operation(self, function):
        """function, made of any others, as the table's LOW has one of torch's: what it calls is not looked up."""
        def run(*args, **kwargs):
            with torch._C.DisableTorchFunction():
                return self.in_low(function)(*args, **kwargs)
        return run

    def active(self) -> bool:
        """Whether this thread's operations are looked up now. Not so in backward(), which is an operation itself."""
        return any(mode is self for mode in _get_current_function_mode_stack())

    def around(self, function, *args, **kwargs):
        """function's result under the policy."""
        with nullcontext() if self.active() else self:
            return function(*args, **kwargs)

    def applied(self, module: nn.Module) -> nn.Module:
        """To a module from outside, in place: whichever of its parts is called first enters the policy, also where a
        block that was not kept is run once more in backward. Running statistics become float32: they are sums."""
        for part in module.modules():
            part.policy, part.__class__ = self, governed_class(type(part))
            for name, buffer in part.named_buffers(recurse=False):
                if name.startswith("running_"):
                    buffer.data = convert(buffer, FULL)
        return module


class Governed:
    """Mixed into a module's class by ComputePolicy.applied(). (One function for all modules of a class, not one for
    each: torch.compile would compile every block anew.)"""

    def forward(self, *args, **kwargs):
        return self.policy.around(super().forward, *args, **kwargs)


@functools.cache
def governed_class(cls: type) -> type:
    return type(cls.__name__, (Governed, cls), {})


# ---- FP8 -------------------------------------------------------------------------------------------------------------

def has_fp8(device) -> bool:
    """Whether the device multiplies FP8: Ada, Hopper and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Product(nn.Module):
    """y = x W^T + b with x and W in e4m3; in backward dy in e5m2:  dx = dy W,  dW = dy^T x.

        scale = 2^floor(log2(largest / amax)),  code = cast(scale * t),  y = sum(code code) / (scale scale)

    One scale a tensor, a power of two: multiplying by it loses nothing. scaling: "current", from the tensor's own amax
    (its largest magnitude); "delayed", from the largest of the last `history` amaxes, known before the tensor is
    there. group: ranks that hold parts of the layer and must agree on amax. hardware: torch._scaled_mm, or the same
    products of codes in float32 (None: whichever the device has), and these too where a size, in, out or the number of
    rows in backward, is no multiple of 16. input (..., in), weight (out, in). Only codes of x are kept for backward,
    one byte each; W is rounded again. The amaxes of "delayed" are a buffer of this module; where it hangs on a weight
    (fp8_products), no state_dict has them, and who trains with them saves them.
    """

    def __init__(self, scaling: str = "current", *, history: int = 16, group=None, hardware: bool | None = None):
        super().__init__()
        if scaling not in ("current", "delayed"):
            raise ValueError(f"scaling must be current or delayed, got {scaling!r}")
        self.scaling, self.group, self.hardware = scaling, group, hardware
        self.register_buffer("amax_history", torch.zeros(3, history if scaling == "delayed" else 0))   # x, W, dy

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.scaling == "delayed" and torch._C._current_graph_task_id() >= 0:
            raise RuntimeError("scaling must be current where forward runs again in backward, delayed would change its "
                               "scales")
        self.learning = torch.is_grad_enabled()
        y = Fp8MatMul.apply(input.reshape(-1, weight.shape[1]), weight, self).view(*input.shape[:-1], len(weight))
        return y if bias is None else y + bias

    def scales(self, which: int, *tensors) -> list[Tensor]:
        """Scale of each tensor; which: the row of the history where the first one's amaxes are."""
        amax = torch.stack([t.detach().abs().amax().float() if t.numel() else t.new_zeros((), dtype=torch.float32)
                            for t in tensors])
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
        if self.scaling == "delayed":
            self.amax_history = self.amax_history.to(amax.device)
            history = self.amax_history[which:which + len(tensors)]
            known = history.amax(1)
            if self.learning:                                                       # an evaluation leaves no trace
                seen = amax.where(amax.isfinite(), 0)                        # an overflow is not what comes next
                history.copy_(torch.cat((seen[:, None], history[:, :-1]), 1))
            # at first, and where the tensor has no finite one, its own
            amax = torch.where((known > 0) & amax.isfinite(), known, amax)
        largest = amax.new_full((1,), FORMATS["e5m2" if which == 2 else "e4m3"].max)
        # an infinity gets scale 0 and becomes NaN, which the gradient's norm finds
        return list((largest / amax).log2().floor().clamp(max=60).exp2())

    def multiply(self, a: Tensor, b: Tensor, scale: Tensor, dtype) -> Tensor:
        """a (M, K) b (K, N) / scale, summed in float32 -> (M, N). Codes."""
        there = has_fp8(a.device) if self.hardware is None else self.hardware
        if there and a.shape[1] % 16 == b.shape[1] % 16 == 0:
            columns = b.T.contiguous().T                                                        # as the hardware reads
            return torch._scaled_mm(a.contiguous(), columns, 1 / scale, torch.ones_like(scale), out_dtype=dtype)
        return (a.float() @ b.float() / scale).to(dtype)


def encode(t: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """Codes of scale * t, saturated."""
    f = FORMATS[fmt]
    return (t.float() * scale).clamp(f.min, f.max).to(f.dtype)


class Fp8MatMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, product):
        sx, sw = product.scales(0, x, weight)
        ctx.product, ctx.dtypes, codes = product, (x.dtype, weight.dtype), encode(x, sx, "e4m3")
        ctx.save_for_backward(codes, sx, weight, sw)        # the weight itself: a sharded one is back by then
        return product.multiply(codes, encode(weight, sw, "e4m3").T, sx * sw, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, sx, weight, sw = ctx.saved_tensors
        sg, = ctx.product.scales(2, dy)
        dy, dx, dw = encode(dy, sg, "e5m2"), None, None
        if ctx.needs_input_grad[0]:
            dx = ctx.product.multiply(dy, encode(weight, sw, "e4m3"), sg * sw, ctx.dtypes[0])          # dy W
        if ctx.needs_input_grad[1]:
            dw = ctx.product.multiply(dy.T, x, sg * sx, ctx.dtypes[1])                                 # dy^T x
        return dx, dw, None


class Fp8Linear(nn.Linear):
    """nn.Linear whose three products are in FP8; weights stay what they are. options: Fp8Product's."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, device=None, dtype=None, **options):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.product = Fp8Product(**options)

    def forward(self, x):
        return self.product(x, self.weight, self.bias)


LEFT_OUT = ("*embed*", "*lm_head*")        # few FLOPs, or logits: what the loss is most sensitive to


def matrices(module: nn.Module, leave_out) -> dict:
    """{name: module} of those that multiply by a matrix: of their own, not an embedding's, of no name left out."""
    return {name: part for name, part in module.named_modules()
            if isinstance(weight := part._parameters.get("weight"), Tensor) and weight.ndim == 2
            and not isinstance(part, nn.Embedding) and not any(fnmatchcase(name, pattern) for pattern in leave_out)}


def fp8_products(module: nn.Module, *, leave_out=LEFT_OUT, **options) -> dict:
    """Give the weights of a module's linear layers an Fp8Product, as their `product`: a ComputePolicy multiplies by it,
    in any class that calls F.linear -> {weight: product}. leave_out: patterns of names. Sizes that are no multiples of
    16 are left out too. options: Fp8Product's; one without a history serves all weights."""
    make = functools.partial(Fp8Product, **options)
    if options.get("scaling", "current") == "current":
        make = functools.cache(make)
    weights = [part.weight for part in matrices(module, leave_out).values()]
    weights = [weight for weight in weights if not any(size % 16 for size in weight.shape)]
    for weight in weights:
        weight.product = make()
    return {weight: weight.product for weight in weights}


# ---- integers for inference ------------------------------------------------------------------------------------------

class Quantized:
    """Mixed into a module's class by quantize(): its `weight` is decoded from codes whenever it is asked for."""

    @property
    def weight(self) -> Tensor:
        codes = unpack(self.codes) if self.packed else self.codes
        return decode(codes, self.scale, self.zero, self.shape).to(self.dtype)


def pack(codes: Tensor) -> Tensor:
    """(out, in) codes below 16, in even -> (out, in / 2) bytes, the first in the low half."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def decode(codes, scale, zero, shape) -> Tensor:
    """w = (code - zero) scale. codes (out, in, padded to whole groups) uint8; scale bf16, zero uint8 (out, groups) ->
    (out, in) float32."""
    codes = codes.view(*scale.shape, -1)                                                    # (out, groups, group_size)
    w = (codes.float() - zero[..., None].float()) * scale[..., None].float()
    return w.flatten(1)[:, :shape[1]]


def grid(w: Tensor, levels: int):
    """scale, zero of the rows of w (out, n): levels + 1 steps from the smallest (or 0) to the largest (or 0). (out,)"""
    lowest, highest = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    # bfloat16 may round it down by 2^-9: rather a wider step than a number that is out of reach
    scale = ((highest - lowest) / levels * (1 + 2**-8)).clamp(min=2.0**-100).bfloat16()
    return scale, (-lowest / scale).round().to(torch.uint8)


def nearest_code(w, scale, zero, levels: int) -> Tensor:
    return (w / scale.to(w.dtype) + zero).round().clamp(0, levels).to(torch.uint8)


def round_to_nearest(w: Tensor, levels: int, group_size: int):
    """w (out, in) -> codes, scale, zero, each column's code by itself."""
    parts = [(part, *grid(part, levels)) for part in w.split(group_size, 1)]
    codes = [nearest_code(part, scale[:, None], zero[:, None], levels) for part, scale, zero in parts]
    return torch.cat(codes, 1), *(torch.stack(x, 1) for x in list(zip(*parts, strict=True))[1:])


def gptq(w: Tensor, gram: Tensor, levels: int, group_size: int, damping: float = 0.01):
    """Column by column; what rounding one loses, those to its right make up for. w (out, in), gram (in, in) = X X^T of
    calibration inputs -> codes (out, in) uint8, scale, zero (out, groups). (Frantar 2022, algorithm 1, without blocks)
    """
    w, diagonal = w.double().clone(), gram.diagonal()
    never = diagonal == 0                                                                    # an input that is always 0
    gram = gram.double() + torch.diag(damping * diagonal.mean() + never.double())
    # U^T U = (X X^T)^-1
    U = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    codes, scales, zeros = [], [], []
    for i in range(w.shape[1]):
        if i % group_size == 0:                                                           # a group's grid, as it is now
            scale, zero = grid(w[:, i:i + group_size], levels)
            scales.append(scale)
            zeros.append(zero)
        codes.append(nearest_code(w[:, i], scale, zero, levels))
        q = (codes[-1].double() - zero) * scale.double()
        # d = (w_i - q_i) / U_ii;  w_j -= d U_ij
        w[:, i:] -= torch.outer((w[:, i] - q) / U[i, i], U[i, i:])
    return torch.stack(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1)


@torch.no_grad()
def quantize(module: nn.Module, fmt: str, *, calibration=None, group_size: int = 32,
             leave_out=("*embed*",)) -> nn.Module:
    """Weights of the module's linear layers, and of its head, become integers, in place; they are decoded when they are
    used. For inference.

    fmt          "int8": a scale and zero point a row. "int4": one a group of group_size columns; two codes a byte
    calibration  batches: dicts of the module's arguments. Given, codes are chosen by GPTQ, from the inputs that the
                 module's layers then see (before any is quantized); without, each weight is rounded to nearest
    Raises ValueError for another format, calibration without a batch, a module without matrices, NaN or infinities;
    nothing is changed then.
    """
    if fmt not in ("int8", "int4"):
        raise ValueError(f"fmt must be int8 or int4, got {fmt!r}")
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be even and at least 2, got {group_size}")
    parts = matrices(module, leave_out)
    if not parts:
        raise ValueError(f"module must have linear layers, {type(module).__name__} has none")
    for name, part in parts.items():
        if not part.weight.isfinite().all():
            raise ValueError(f"weights must be finite, those of {name or type(part).__name__} are not")
    grams = None if calibration is None else gram_matrices(module, parts, calibration)
    levels = 255 if fmt == "int8" else 15
    for name, part in parts.items():
        w = part.weight.detach()
        size = w.shape[1] if fmt == "int8" else min(group_size, w.shape[1] + w.shape[1] % 2)
        codes, scale, zero = (round_to_nearest(w, levels, size) if grams is None else
                              gptq(w, grams[name], levels, size))
        if fmt == "int4":
            codes = pack(F.pad(codes, (0, -codes.shape[1] % size)))
        del part._parameters["weight"]
        part.shape, part.dtype, part.packed = tuple(w.shape), w.dtype, fmt == "int4"
        part.__class__ = quantized_class(type(part))
        for key, value in (("codes", codes), ("scale", scale), ("zero", zero)):
            part.register_buffer(key, value)
    return module


@functools.cache
def quantized_class(cls: type) -> type:
    return type("Quantized" + cls.__name__, (Quantized, cls), {})


def gram_matrices(module, parts: dict, calibration) -> dict:
    """{name: X X^T of the layer's inputs over all batches, float64}."""
    grams, hooks, batches = {}, [], 0
    for name, part in parts.items():
        def collect(_, args, kwargs, name=name):
            x = (*args, *kwargs.values())[0].double()
            x = x.reshape(-1, x.shape[-1])
            grams[name] = grams.get(name, 0) + x.T @ x
        hooks.append(part.register_forward_pre_hook(collect, with_kwargs=True))
    try:
        for batch in calibration:
            module(**batch)
            batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not batches:
        raise ValueError("calibration must hold at least one batch, got none")
    for name, part in parts.items():
        if name not in grams:
            raise ValueError(f"calibration must reach every layer, {name} saw no input")
        if not grams[name].isfinite().all():
            raise ValueError(f"calibration must be finite, what {name or type(part).__name__} saw is not")
    return grams


def weight_bytes(module: nn.Module, leave_out=("*embed*",)) -> int:
    """Bytes of the matrices of linear layers and head, as they lie in memory."""
    total = sum(part.weight.nbytes for part in matrices(module, leave_out).values())
    return total + sum(x.nbytes for part in module.modules() if isinstance(part, Quantized) for x in
                       (part.codes, part.scale, part.zero))


# ---- demo ------------------------------------------------------------------------------------------------------------

class Problem:
    """A student learns a teacher's labels: 64 numbers -> 32 classes. A step is 64 rows of what the loss takes for a
    batch of 4 million (GPT-3's has 3.2 million tokens): gradients are small."""

    batch = 2**22

    def __init__(self, steps: int = 250):
        generator = torch.Generator().manual_seed(0)
        self.steps, self.teacher = steps, torch.randn(64, 32, generator=generator)
        self.batches = torch.randn(steps, 64, 64, generator=generator)
        self.held_out = torch.randn(2048, 64, generator=generator)

    def loss(self, student, x):
        return F.cross_entropy(student(x).float(), (x @ self.teacher).argmax(-1), reduction="sum")

    def train(self, precision: str, *, init_scale: float = 0.0, **options) -> dict:
        """A loop with all that low precision needs -> {"loss": held out, "zeros": gradients that are 0, "still":
        weights that an update does not move, "skipped": steps, "bytes": a parameter}; shares of the last 50 steps."""
        dtype = PRECISIONS[precision]
        student = nn.Sequential(nn.Linear(64, 128, bias=False), nn.GELU(), nn.LayerNorm(128, bias=False),
                                nn.Linear(128, 128, bias=False), nn.GELU(), nn.Linear(128, 32, bias=False))
        for p, like in zip(student.parameters(), (64, 0, 128, 128), strict=True):
            generator = torch.Generator().manual_seed(p.numel())
            p.data = (torch.randn(p.shape, generator=generator) / like**0.5 if like else torch.ones(p.shape)).to(dtype)
        if dtype.itemsize == 2:
            if precision == "fp8":
                fp8_products(student, leave_out=("5",))
            ComputePolicy(dtype, emulate=True).applied(student)
        params = list(student.parameters())
        optimizer = MasterWeights(params, torch.optim.AdamW, weight_decay=0.0, eps=1e-15, **options)
        scaler = LossScaler(init_scale, growth_interval=50) if init_scale else None
        scale, skipped, zeros, still = 1.0, 0, [], []
        for step, x in enumerate(self.batches):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / self.steps)
            if scaler:
                scale = scaler.scale
            (self.loss(student, x) * (scale / self.batch)).backward()
            grads = [p.grad for p in params]
            norm = torch.stack([g.norm() for g in grads]).norm().item() / scale
            found_inf = not math.isfinite(norm)
            if scaler:
                scaler.update(found_inf)
            if not found_inf:
                # unscaling and clipping are one factor
                torch._foreach_mul_(grads, min(1.0, 1e-3 / norm) / scale)
                kept = [optimizer.state[p].get("master", p) for p in params]
                before = [w.detach().clone() for w in kept]
                optimizer.step()
                zeros.append(share(g == 0 for g in grads))
                still.append(share(a == b for a, b in zip(before, kept, strict=True)))
            skipped += found_inf
            tensors = [*params, *grads, *(x for s in optimizer.state.values() for x in s.values())]
            optimizer.zero_grad()
        with torch.no_grad():
            loss = self.loss(student, self.held_out).item() / len(self.held_out)
        n = sum(p.numel() for p in params)
        return {"loss": loss, "zeros": sum(zeros[-50:]) / 50, "still": sum(still[-50:]) / 50, "skipped": skipped,
                "bytes": sum(x.nbytes for x in tensors if x.numel() > 1) / n, "student": student}


def share(masks) -> float:
    return torch.cat([x.flatten() for x in masks]).double().mean().item()


def demo():
    """The claims of this file, measured | predicted, asserted. CPU, seconds."""
    torch.set_num_threads(1)

    def row(what, measured, predicted, tolerance=0.0):
        print(f"{what:<78} {measured:>12,.6g} | {predicted:>12,.6g}")
        assert abs(measured - predicted) <= tolerance, what

    print("format   E   M  bits      largest  smallest normal     subnormal        eps  digits   torch.finfo")
    for name, f in FORMATS.items():
        info = f.dtype and torch.finfo(f.dtype)
        print(f"{name:<7} {f.exponent_bits:>2} {f.mantissa_bits:>3} {f.bits:>5} {f.max:>12.6g} "
              f"{f.smallest_normal:>16.6g} {f.smallest_subnormal:>13.4g} {f.eps:>10.4g} {f.digits:>7}   "
              f"{'the same' if info else '-'}")
        ours = f.max, f.min, f.smallest_normal, f.smallest_subnormal, f.eps, f.bits, 10.0**-f.digits
        assert not info or ours == (info.max, info.min, info.smallest_normal, info.smallest_normal * info.eps, info.eps,
                                    info.bits, info.resolution)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator) * torch.exp2(torch.randint(-30, 30, (100_000,), generator=generator))
    for name in ("bf16", "fp16", "e4m3", "e5m2"):
        theirs = x.to(FORMATS[name].dtype).float()
        row(f"cast to {name}: of 100,000 numbers, those that torch casts otherwise",
            int((cast(x, name).nan_to_num(-1) != theirs.nan_to_num(-1)).sum()), 0)

    print(f"\n{'three failures and their cures':<78} {'measured':>12} | {'predicted':>12}")
    # 1. an update smaller than half the spacing
    w = (0.05 * torch.randn(20_000, generator=generator)).bfloat16().float()
    dw = 1e-4 * (0.5 + torch.rand(w.shape, generator=generator))
    row("weights that a step of 1e-4 does not move, bf16 | |dw| < ulp(w) / 2", share([cast(w + dw, "bf16") == w]),
        share([dw < spacing(w.nextafter(w + 1), "bf16") / 2]))
    ways = {"nearest": w.clone(), "stochastic": w.clone(), "master": w.clone()}
    for _ in range(100):
        ways["nearest"] = cast(ways["nearest"] + dw, "bf16")
        ways["stochastic"] = cast(ways["stochastic"] + dw, "bf16", "stochastic", generator=generator)
        ways["master"] += dw
    row("mean way after 100 such steps: bf16 master, cast at the end | 100 dw",
        (cast(ways["master"], "bf16") - w).mean().item(), 100 * dw.mean().item(), 5e-5)
    row("the same, no master, stochastic rounding | 100 dw", (ways["stochastic"] - w).mean().item(),
        100 * dw.mean().item(), 5e-5)
    lost = (ways["nearest"] - w).mean().item()
    print(f"{'the same, no master, rounded to nearest':<78} {lost:>12,.6g} |")
    assert lost < 0.7 * 100 * dw.mean().item()
    # 2. a gradient below half of the smallest subnormal
    g = torch.exp(torch.randn(100_000, generator=generator) * 3 - 16)
    for scale in (1.0, 2.0**16):
        row(f"gradients that become 0, fp16, loss scale {scale:g} | |g| <= 2^-25 / scale",
            share([(g * scale).half() == 0]), share([g <= 2**-25 / scale]))
    # 3. a number above the largest
    big = torch.exp(torch.randn(100_000, generator=generator) * 2 + 8)
    row("numbers that become infinite, fp16 | |x| >= 65520", share([big.half().isinf()]), share([big >= 65520]))
    row("the same, bf16", share([big.bfloat16().isinf()]), 0)

    print("\none problem, several recipes: 250 steps of AdamW, learning rate falling to 0\n"
          f"{'':<34} {'held-out loss':>13}  {'still weights':>13}  {'zero gradients':>14}  {'skipped':>7}  "
          "bytes: measured | predicted")
    problem = Problem()
    recipes = {"fp32": ("fp32", {}), "bf16, master weights": ("bf16", {}),
               "bf16, none, to nearest": ("bf16", {"keep": False}),
               "bf16, none, stochastic rounding": ("bf16", {"keep": False, "rounding": "stochastic",
                                                            "generator": torch.Generator().manual_seed(0)}),
               "fp16, master weights, no scale": ("fp16", {}),
               "fp16, master weights, loss scale": ("fp16", {"init_scale": 2.0**34}),
               "fp8 products, bf16 master weights": ("fp8", {})}
    got = {}
    for name, (precision, options) in recipes.items():
        got[name] = r = problem.train(precision, **options)
        bytes_there = sum(bytes_per_parameter(PRECISIONS[precision], options.get("keep", True)).values())
        print(f"{name:<34} {r['loss']:>13.4f}  {r['still']:>13.1%}  {r['zeros']:>14.1%}  {r['skipped']:>7}  "
              f"{r['bytes']:.0f} | {bytes_there}")
        assert r["bytes"] == bytes_there

    # what theory says of them
    loss = {name: r["loss"] for name, r in got.items()}
    assert abs(loss["bf16, master weights"] - loss["fp32"]) < 0.05 < loss["bf16, none, to nearest"] - loss["fp32"]
    assert abs(loss["bf16, none, stochastic rounding"] - loss["fp32"]) < 0.05
    assert got["fp16, master weights, no scale"]["zeros"] > 0.05 > got["fp16, master weights, loss scale"]["zeros"]
    assert got["fp16, master weights, loss scale"]["skipped"] > 0 and abs(loss["fp8 products, bf16 master weights"]
                                                                          - loss["fp32"]) < 0.05

    student = got["fp32"]["student"]
    with torch.no_grad():
        expected, before = student(problem.held_out), weight_bytes(student)
        print(f"\nthe fp32 student's matrices, {before:,} bytes, as integers: {'held-out loss':>18}  bytes: measured | "
              "predicted  error of logits")
        for fmt, bits, groups in (("int8", 8, 3 * (128 + 128 + 32)), ("int4", 4, 3 * (128 * 2 + 128 * 4 + 32 * 4))):
            errors = []
            for how, calibration in (("to nearest", None), ("GPTQ", [{"input": x} for x in problem.batches[:32]])):
                small = quantize(copy.deepcopy(student), fmt, calibration=calibration)
                errors.append(((small(problem.held_out) - expected).norm() / expected.norm()).item())
                size, formula = weight_bytes(small), before // 4 * bits // 8 + groups
                print(f"{f'{fmt}, {how}':<56} {problem.loss(small, problem.held_out).item() / 2048:>16.4f}  "
                      f"{size:>15,} | {formula:,}  {errors[-1]:>18.2%}")
                assert size == formula
            assert errors[1] < errors[0], fmt


if __name__ == "__main__":
    demo()
