"""Scaling: how good a model will be, how large it should be, how long it should train, and what that takes.

GPT-3 spent 3.15e23 FLOPs on 175 billion parameters and 300 billion tokens, 1.7 tokens a parameter. The law below says
that 53 billion parameters and 990 billion tokens would have been as expensive and better; that GPT-3's own loss can be
had for 61 % of its compute. Loss falls so smoothly with size and data that runs on a laptop show the same curves.

    L(N, D) = E + A / N^alpha + B / D^beta                          Chinchilla (Hoffmann 2022)

The entropy of text, which nobody can predict; what a finite model misses; what finite data did not teach. Training
costs C = 6 N D: a weight is multiplied and added once forward (2 FLOPs), and twice backward, for the gradients of the
input and of the weight (4). That leaves attention out, and charges for the embedding, a look-up that is free; `Shape`
counts both. Minimise L where 6 N D = C: there ln N and ln D trade one for one, so at the best both are worth the same,

    alpha A / N^alpha = beta B / D^beta          N_opt = G (C/6)^a,  D_opt = (C/6)^b / G
                                                 G = (alpha A / (beta B))^(1 / (alpha + beta))
                                                 a = beta / (alpha + beta),  b = alpha / (alpha + beta)

With the constants of Besiroglu 2024 (the default here) that is 26 tokens a parameter at 1e18 FLOPs, 18 at Gopher's
5.76e23, 16 at 1e26: "20 tokens a parameter". Hoffmann's constants for the same runs say 59 at Gopher's budget: their
optimizer had stopped early. So fitting is a subject of its own. Three approaches, each from runs (N, D, loss):

    1  fit_envelope    of all curves loss(C), one a size, take the lower envelope; which size is on it at C?
    2  fit_isoflop     runs of equal C: a parabola through loss(ln N), its vertex is N_opt(C)
    3  fit_parametric  all five constants at once:
                       min sum_i Huber_delta(LSE(e, a - alpha ln N_i, b - beta ln D_i) - ln L_i),  delta = 1e-3
                       E = exp(e), A = exp(a), B = exp(b),  LSE = ln sum exp

The third is nearly an L1 norm, so outliers hardly count, and nearly flat along valleys (A with alpha, B with beta, E
with all), so first-order methods stop where it looks flat. Cures: logs are centred, which uncouples a from alpha; the
5 x 5 Hessian is exact, cheap and used; many starts; the sum, not the mean, or an absolute tolerance ends it early.

What will it take? 7 billion parameters on 140 billion tokens are 6.5e21 FLOPs, attention's included. 64 H100s multiply
at most 6.3e16 a second: no less than 28 hours; a good program needs nearly twice that, and a bad layout does not start:
weights, gradients and AdamW want 126 GB of each 80 GB device. `plan` adds up three bills a layout and ranks them all:

    FLOPs     a token, forward and backward       6 (L block + V C) + 12 L H D T     block: matrix weights of a layer
              and what is computed again          full: a layer's forward;  selective: attention's core
    memory    parameters, gradients, states       2, 4, 12 bytes a parameter of the rank; those that ZeRO splits / dp
              activations                         stored micro-batches x layers x what a layer keeps, in Megatron
                s b h (10 + 24/t + 5 a s / (h t))   none         s tokens, b micro-batch, h width, a heads, t tp;
                s b h (10 + 24/t)                   selective    with sequence parallelism 10/t in the place of 10;
                2 s b h                             full         flash attention: 4 bytes a row for 5 s
                stored: 1F1B p - r on rank r;  GPipe m;  interleaved p (1 + (p-1)/(p v)) on the first
              buffers                             gradients on their way, gathered layers, the block that runs again
    time      a step       (m + (p-1)/v) (F + B + W) of the slowest stage, the update, messages that nothing hides
              product      2 m n k / (c peak) + bytes (m n + n k + m k) / HBM        so small ones are slow ones
              the rest     5 x what a layer keeps / HBM: written, read; read, a gradient read, another written
              flash        its FLOPs, without those that causality hides, at 0.6 of the peak
              message      (n-1)/n bytes / bandwidth + hops x latency;  an all-reduce is a reduce-scatter, an all-gather
              bubble       (p-1)/v (F + B + W);  zero bubble: (p-1) (F + B) - (min(m, p) - 1) W

One number a GPU type is fitted: c, the share of its peak that large products reach in a long run: hot, at the power
limit, between other kernels. A100: on the six rows of Megatron's table 1; H100: on one row of Llama 3's table 4.

    symbol             in code               what
    N, D, C, L         params, tokens, ...   parameters that are multiplied (Kaplan: without embeddings), training
                                             tokens, FLOPs = 6 N D (Kaplan's are PF-days), loss in nats a token
    E A B alpha beta   law[...]              a law is a dict; every fit returns one
    L C H D V T        n_layer n_embd n_head head_dim vocab_size seq_len, where a shape is meant
    m, p, v            micro_batches, pp, chunks    micro-batches a step, pipeline ranks, stages a rank
    F, B, W            a micro-batch forward; backward, the inputs' and the weights' gradients

Map: shapes - laws - beyond the optimum - fitting - machines - memory - messages - time - plan - figures - commands -
published rows - demo. Not here: context and expert parallelism, failures, reading data.

Sources: Kaplan 2020 (arXiv:2001.08361); McCandlish 2018 (1812.06162); Hoffmann 2022 (2203.15556), fitted again:
Besiroglu 2024 (2404.10102); Pearce 2024 (2406.12907), Porian 2024 (2406.19146); Muennighoff 2023 (2305.16264); Sardana
2024 (2401.00448). Narayanan 2021 (2104.04473); Korthikanti 2022 (2205.05198); ZeRO (1910.02054); Qi 2023 (2401.10241);
Llama 3 (2407.21783); FlashAttention-2 (2307.08691); GPUs, links, products: stas00/ml-engineering (2026-08-22).

run: python scaling.py          python scaling.py fit RUNS.csv          python scaling.py sweep
     python scaling.py plan --params 7e9 --tokens 1.4e11 --gpu h100 --n-gpus 64
"""

import argparse
import csv
import dataclasses
import difflib
import functools
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np


class BadInput(ValueError):
    """One line: what (an argument, a column), the rule, the value. On the command line --what, and exit code 2."""


# ---- shapes and layouts ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shape:
    """The fields of model.ModelConfig that cost something, and how many parameters and FLOPs they are."""

    vocab_size: int
    seq_len: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    n_ff: int
    norm: str = "rmsnorm"
    position: str = "rope"
    mlp: str = "swiglu"
    bias: bool = False
    tie_embeddings: bool = False
    qk_norm: bool = False

    q = property(lambda self: self.n_head * self.head_dim)
    kv = property(lambda self: self.n_kv_head * self.head_dim)
    ups = property(lambda self: 2 if self.mlp == "swiglu" else 1)                          # gate and up, or up
    block = property(lambda self: 2 * self.n_embd * (self.q + self.kv) + (self.ups + 1) * self.n_embd * self.n_ff)
    norm_parts = property(lambda self: 2 if self.norm == "layernorm" and self.bias else 1)
    whole = property(lambda self: 2 * (self.norm_parts + self.bias) * self.n_embd + 2 * self.qk_norm * self.head_dim)
    column_biases = property(lambda self: self.bias * (self.q + 2 * self.kv + self.ups * self.n_ff))
    tensors = property(lambda self: 2 * self.norm_parts + (5 + self.ups) * (1 + self.bias) + 2 * self.qk_norm)
    num_params = property(lambda self: held(self, Layout(), 0)[0])

    def flops_per_token(self, recompute: str = "none") -> int:
        """Forward, backward, what is computed again. The full square of attention counts, as in PaLM's MFU
        (arXiv:2204.02311, appendix B)."""
        # q k^T and p v: 2 products of 2 T FLOPs an element of q, twice more in backward
        core = 4 * self.q * self.seq_len
        again = {"none": 0, "selective": core, "full": 2 * self.block + core}[recompute]
        return self.n_layer * (6 * self.block + 3 * core + again) + 6 * self.vocab_size * self.n_embd


def shape_of(config) -> Shape:
    """Of a mapping or an object with ModelConfig's fields."""
    known = config if isinstance(config, dict) else {name: getattr(config, name) for name in dir(config)
                                                     if not name.startswith("_")}
    fields = dataclasses.fields(Shape)
    if missing := [f.name for f in fields if f.name not in known and f.default is dataclasses.MISSING]:
        raise BadInput(f"config must have {missing[0]}, got none")
    return Shape(**{f.name: known[f.name] for f in fields if f.name in known})


@functools.cache
def shape_for(params: float, seq_len: int = 4096) -> Shape:
    """A Llama of about so many parameters: heads of 128 (small ones: 64), about C / 128 layers, an MLP of about 8/3 C
    that makes up what is missing."""
    V, shapes = 32000 if params >= 3e8 else 8192 if params >= 2e7 else 2048, []
    for heads in (*range(1, 8), *range(8, 32, 4), *range(32, 513, 8)):
        C = heads * (128 if heads >= 8 else 64)
        layers = max(2, 2 * round((params - 2 * V * C) / (12 * C * C) / 2))
        F = max(1, round(((params - 2 * V * C) / layers - 4 * C * C) / (3 * C) / 128)) * 128
        shape = Shape(V, seq_len, layers, heads, heads, C // heads, C, F)
        off = (shape.num_params / params, 1), (C / layers / 128, 0.1), (F / C * 3 / 8, 0.5)
        shapes.append((sum(weight * abs(math.log(x)) for x, weight in off), shape))
    return min(shapes, key=lambda x: x[0])[1]


@dataclass(frozen=True)
class Layout:
    """How a step is split; names as train.py's flags. chunks: stages a rank, above 1 if interleaved."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    micro_batch_size: int = 1
    micro_batches: int = 1
    zero: int = 0
    recompute: str = "none"
    sequence_parallel: bool = True

    split = property(lambda self: self.tp if self.sequence_parallel else 1)                # of norms and residuals
    gpus = property(lambda self: self.dp * self.tp * self.pp)
    batch = property(lambda self: self.dp * self.micro_batch_size * self.micro_batches)


@functools.cache
def depth(n_layer: int, pp: int, chunks: int) -> list[int]:
    """Layers of each pipeline rank: stage s of S begins with layer s L // S."""
    S = pp * chunks
    return [sum((s + 1) * n_layer // S - s * n_layer // S for s in range(r, S, pp)) for r in range(pp)]


def held(model: Shape, at: Layout, r: int) -> tuple[int, int, int]:
    """Parameters of a rank at place r of its pipeline; those of them that tp does not split; tensors."""
    layers, first, last = depth(model.n_layer, at.pp, at.chunks)[r], r == 0, r == at.pp - 1
    tables = first + last - (model.tie_embeddings and at.pp == 1)
    learned = first and model.position == "learned"
    whole = layers * model.whole + (learned * model.seq_len + last * model.norm_parts) * model.n_embd
    split = layers * (model.block + model.column_biases) + tables * model.vocab_size * model.n_embd
    return split // at.tp + whole, whole, layers * model.tensors + tables + learned + last * model.norm_parts


# ---- laws ------------------------------------------------------------------------------------------------------------

PF_DAY = 1e15 * 24 * 3600                                                                                   # FLOPs
# Kaplan 2020, Table 5: N_c non-embedding parameters, D_c and B_star tokens, C_c and C_c_min PF-days
KAPLAN = {"alpha_N": 0.076, "N_c": 8.8e13, "alpha_D": 0.095, "D_c": 5.4e13, "alpha_C": 0.057, "C_c": 1.6e7,
          "alpha_C_min": 0.050, "C_c_min": 3.1e8, "alpha_B": 0.21, "B_star": 2.1e8}
# Table 2: the joint fit of L(N, D), other than Table 5 on purpose
KAPLAN_JOINT = {"alpha_N": 0.076, "N_c": 6.4e13, "alpha_D": 0.103, "D_c": 1.8e13}
# Table 3: that of L(N, S_min)
KAPLAN_STEPS = {"alpha_N": 0.077, "N_c": 6.5e13, "alpha_S": 0.76, "S_c": 2.1e3}
# Table 6: (exponent p, value at one PF-day): parameters, tokens a batch, steps, tokens. x = value (C_min / PF-day)^p
KAPLAN_OPTIMUM = {"N": (0.73, 1.3e9), "B_crit": (0.24, 2.0e6), "S_min": (0.03, 5.4e3), "D": (0.27, 2e10)}

# L = E + A / N^alpha + B / D^beta.  Hoffmann 2022, approach 3, the digits of its TeX source; all others rounded there
HOFFMANN = {"E": 1.693371, "A": 406.4003, "B": 410.7222, "alpha": 0.33917084, "beta": 0.2849083}
# Besiroglu 2024: the same runs read off the paper's figure, 240 of them, converged
BESIROGLU = {"E": 1.81686, "A": 482.00572, "B": 2085.4342, "alpha": 0.34781, "beta": 0.36585}
# Muennighoff 2023, appendix A: alpha = beta, and how fast repeated tokens and excess parameters lose their value
MUENNIGHOFF = {"E": math.exp(0.6254804), "A": math.exp(6.255414), "B": math.exp(7.3049974), "alpha": 0.3526596,
               "beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743}
# Sardana 2024, appendix A: Hoffmann's, exponents to three digits
SARDANA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.336, "beta": 0.283}


def kaplan_loss(N=None, D=None, *, C_min=None, S_min=None):
    """Kaplan 2020's loss, nats a token, of N non-embedding parameters, D tokens, C_min FLOPs well spent, S_min steps.

    N | D | C_min alone     L(x) = (x_c / x)^alpha_x                                            (1.1, 1.2, 1.3)
    N, D                    ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D                   (1.5), Table 2
    N, S_min                (N_c / N)^alpha_N + (S_c / S_min)^alpha_S                           (1.6), Table 3
    """
    k, j, t = KAPLAN, KAPLAN_JOINT, KAPLAN_STEPS
    laws = {("N",): lambda: (k["N_c"] / N) ** k["alpha_N"], ("D",): lambda: (k["D_c"] / D) ** k["alpha_D"],
            ("C_min",): lambda: (k["C_c_min"] * PF_DAY / C_min) ** k["alpha_C_min"],
            ("N", "D"): lambda: ((j["N_c"] / N) ** (j["alpha_N"] / j["alpha_D"]) + j["D_c"] / D) ** j["alpha_D"],
            ("N", "S_min"): lambda: (t["N_c"] / N) ** t["alpha_N"] + (t["S_c"] / S_min) ** t["alpha_S"]}
    given = tuple(name for name, x in (("N", N), ("D", D), ("C_min", C_min), ("S_min", S_min)) if x is not None)
    if given not in laws:
        raise BadInput(f"kaplan_loss takes N, D, C_min, N and D, or N and S_min, got {given}")
    return laws[given]()


def kaplan_optimal(C) -> dict:
    """{"N", "B_crit", "S_min", "D"} for C FLOPs, by Kaplan's Table 6: N ~ C^0.73, hardly more steps."""
    return {name: x * (C / PF_DAY) ** p for name, (p, x) in KAPLAN_OPTIMUM.items()}


def critical_batch(loss):
    """Tokens a batch that take twice the fewest steps and twice the fewest tokens: B_crit = B_star / L^(1/alpha_B)."""
    return KAPLAN["B_star"] / loss ** (1 / KAPLAN["alpha_B"])


def batch_cost(batch, critical) -> tuple:
    """(S / S_min, E / E_min): steps and tokens beside the fewest. (S/S_min - 1) (E/E_min - 1) = 1. McCandlish 2018"""
    return 1 + critical / batch, 1 + batch / critical


def chinchilla_loss(N, D, law=BESIROGLU):
    """L = E + A / N^alpha + B / D^beta, nats a token; N, D numbers or arrays."""
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


class Optimum(NamedTuple):
    N: float
    D: float


def has_optimum(law, C) -> bool:
    """Whether a fitted law has a best N and D for C FLOPs that can be said: noise has none."""
    try:
        return min(law["alpha"], law["beta"]) > 0 and all(1e-99 < x < 1e99 for x in compute_optimal(C, law))
    except (OverflowError, ZeroDivisionError):
        return False


def exponents(law) -> tuple:
    """(a, G): N_opt = G (C/6)^a."""
    a = law["beta"] / (law["alpha"] + law["beta"])
    return a, (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (1 / (law["alpha"] + law["beta"]))


def compute_optimal(C, law=BESIROGLU) -> Optimum:
    """(N, D) of least loss among those with 6 N D = C FLOPs. (Hoffmann 2022, equation 4)"""
    a, G = exponents(law)
    N = G * (C / 6) ** a
    return Optimum(N, C / (6 * N))


def optimal_tokens(N, law=BESIROGLU) -> float:
    """D of the budget for which N parameters are best: N = G (C/6)^a solved for C / (6 N)."""
    a, G = exponents(law)
    return (N / G) ** (1 / a) / N


def compute_for_loss(loss, law=BESIROGLU):
    """FLOPs that reach a loss if N and D are chosen best. Infinite at E and below.

        L_opt(C) = E + (A G^-alpha + B G^beta) (C/6)^(-alpha a)
    """
    a, G = exponents(law)
    K = law["A"] * G ** -law["alpha"] + law["B"] * G ** law["beta"]
    return 6 * (K / (loss - law["E"])) ** (1 / (law["alpha"] * a)) if loss > law["E"] else math.inf


def tokens_for_loss(N, loss, law=BESIROGLU):
    """Tokens that bring N parameters to a loss: D = (B / (L - E - A/N^alpha))^(1/beta), infinite for too small N."""
    rest = loss - law["E"] - law["A"] / N ** law["alpha"]
    return (law["B"] / rest) ** (1 / law["beta"]) if rest > 0 else math.inf


def isoflop_runs(budgets, law=BESIROGLU, *, spread=8, sizes=15, embedding=lambda N: 0.0, off=lambda C: 1.0) -> list:
    """Noise-free runs (N, D, loss) of equal 6 N D, sizes from N_opt / spread to N_opt spread, times off(C).

    embedding: parameters that the loss knows of and the experimenter does not count: N is without them.
    """
    runs, grid = [], np.exp(np.linspace(math.log(10), math.log(1e16), 50_001))
    for C in budgets:
        best = grid[np.argmin(chinchilla_loss(grid + embedding(grid), C / (6 * grid), law))]
        N = best * off(C) * np.exp(np.linspace(-1, 1, sizes) * math.log(spread))
        runs.extend(zip(N, C / (6 * N), chinchilla_loss(N + embedding(N), C / (6 * N), law), strict=True))
    return runs


def embedding_of(N, vocab_size=32000, aspect=40):
    """Parameters of the embedding of a model with N others: N = 12 n_layer n_embd^2, n_embd = aspect n_layer.

    In small models it is most of them. Who leaves it out, as Kaplan did, sees N_opt grow from almost nothing, faster
    than in truth. (Pearce 2024)
    """
    return vocab_size * (aspect * N / 12) ** (1 / 3)


# ---- beyond the optimum ----------------------------------------------------------------------------------------------

# parameters, training tokens: Brown 2020 (arXiv:2005.14165); Rae 2021 (2112.11446); Hoffmann 2022; Touvron 2023
# (2302.13971, 2307.09288); Grattafiori 2024 (2407.21783) and the Llama 3.1 model card
MODELS = {"GPT-3 175B": (175e9, 300e9), "Gopher 280B": (280e9, 300e9), "Chinchilla 70B": (70e9, 1.4e12),
          "LLaMA 7B": (6.7e9, 1e12), "LLaMA 65B": (65.2e9, 1.4e12), "Llama 2 7B": (6.7384e9, 2e12),
          "Llama 2 70B": (68.977e9, 2e12), "Llama 3.1 8B": (8.0303e9, 15e12), "Llama 3.1 405B": (405.85e9, 15.6e12)}


def assess(N, D, law=BESIROGLU) -> dict:
    """How far a run is from the best of its budget, by a law: tokens a parameter, N / N_opt, loss, loss left on the
    table, and the share of its compute that would have been enough for its loss."""
    C, loss = 6 * N * D, chinchilla_loss(N, D, law)
    best = compute_optimal(C, law)
    return {"C": C, "ratio": D / N, "best_ratio": best.D / best.N, "N_over_N_opt": N / best.N, "loss": loss,
            "left": loss - chinchilla_loss(*best, law), "enough": compute_for_loss(loss, law) / C}


def overtraining(k, law=BESIROGLU) -> tuple:
    """(tokens, FLOPs) beside the best of a budget, for its loss with k N_opt parameters: the same at every budget.

        D / D_opt = (1 - beta / alpha (k^-alpha - 1))^(-1 / beta),  infinite if k <= (1 + alpha / beta)^(-1 / alpha)
    """
    rest = 1 - law["beta"] / law["alpha"] * (k ** -law["alpha"] - 1)
    tokens = rest ** (-1 / law["beta"]) if rest > 0 else math.inf
    return tokens, k * tokens


def effective(x, unique, decay):
    """What x tokens from `unique` different ones are worth: U + U R* (1 - exp(-R / R*)), R = x / U - 1 repetitions."""
    U = np.minimum(unique, x)
    return U + U * decay * -np.expm1(-(x / U - 1) / decay)


def data_constrained_loss(N, D, unique, law=MUENNIGHOFF):
    """Loss of N parameters on D tokens of which `unique` are different: repeated ones, and parameters beyond what
    the unique ones are best for, count ever less. (Muennighoff 2023, equations 5, 6, appendix A)"""
    U = np.minimum(unique, D)
    # of all budgets, the one whose best D is U has the best N for U: alpha A / N^alpha = beta B / U^beta
    fit = (law["alpha"] * law["A"] / (law["beta"] * law["B"]) * U ** law["beta"]) ** (1 / law["alpha"])
    return chinchilla_loss(effective(N, fit, law["R_N"]), effective(D, U, law["R_D"]), law)


def last(holds, low: float, high: float, ratio=1 + 1e-14) -> float:
    """The largest x from low to high, to a ratio, of which holds(x): true below it, false above."""
    while high / low > ratio:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def inference_optimal(loss, inference_tokens, law=BESIROGLU) -> Optimum:
    """(N, D) of a loss for which training and use, 6 N D + 2 N D_inf FLOPs, are cheapest. (Sardana 2024)

        d/dN (6 N D(N) + 2 N D_inf) = 0   <=>   (alpha A / N^alpha) / (beta B / D^beta) = 1 + D_inf / (3 D)
    """
    def larger(N):                                                       # left side over right falls as N grows
        D = tokens_for_loss(N, loss, law)
        wedge = law["alpha"] * law["A"] / N ** law["alpha"] * D ** law["beta"] / (law["beta"] * law["B"])
        return not wedge < 1 + inference_tokens / (3 * D)

    smallest = (law["A"] / (loss - law["E"])) ** (1 / law["alpha"])
    N = last(larger, smallest, compute_optimal(compute_for_loss(loss, law), law).N)
    return Optimum(N, tokens_for_loss(N, loss, law))


# ---- fitting ---------------------------------------------------------------------------------------------------------

def table(runs) -> np.ndarray:
    """Rows (N, D, loss), or dicts of N, D, loss, or one dict of columns -> (n, 3) float64. ValueError names what is
    wrong and where; rows count from 1."""
    names = "N", "D", "loss"
    if isinstance(runs, dict):
        runs = list(zip(*(runs[name] for name in names), strict=True))
    x = np.array([[r[name] for name in names] if isinstance(r, dict) else r for r in runs], dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != 3 or not len(x):
        raise BadInput(f"runs must be rows of (N, D, loss), got shape {x.shape}")
    for name, column in zip(names, x.T, strict=True):
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if len(bad):
            some = ", ".join(f"row {i + 1} has {column[i]:g}" for i in bad[:5])
            more = f", and {len(bad) - 5} more" * (len(bad) > 5)
            raise BadInput(f"{name} must be finite and above 0: {some}{more}")
    return x


def distinct(x) -> int:
    return len(np.unique(np.round(np.log(x), 6)))


def bootstrap(fit, groups, times, seed) -> dict | None:
    """{"a": [low, high], "b": ...}: 2.5 and 97.5 % of fits to runs drawn again, with replacement, group by group."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(times):
        try:
            found.append(fit(np.concatenate([g[rng.integers(len(g), size=len(g))] for g in groups]), times=0)["a"])
        except BadInput:                                                    # what was drawn does not support a fit
            continue
    if len(found) < max(2, times / 2):
        return None
    low, high = np.percentile(found, (2.5, 97.5)).tolist()
    return {"a": [low, high], "b": [1 - high, 1 - low]}


def power_law(C, N, D, loss) -> dict:
    """{"a", "b", "k_N", "k_D"}: N = k_N C^a, D = k_D C^b through points, in logs; "points"."""
    a, k = np.polyfit(np.log(C), np.log(N), 1)
    b, m = np.polyfit(np.log(C), np.log(D), 1)
    points = [dict(zip(("C", "N", "D", "loss"), map(float, p), strict=True)) for p in zip(C, N, D, loss, strict=True)]
    return {"a": float(a), "b": float(b), "k_N": math.exp(k), "k_D": math.exp(m), "points": points}


def fit_envelope(runs, *, times=200, seed=0) -> dict:
    """Approach 1: {"a", "b", "k_N", "k_D": N_opt = k_N C^a, D_opt = k_D C^b, "points": the envelope, "intervals"}.

    runs: several sizes N with runs (or points of one training curve) at several D each.
    """
    runs = table(runs)
    C, size = 6 * runs[:, 0] * runs[:, 1], np.round(np.log(runs[:, 0]), 6)
    grid, sizes, curves = np.linspace(math.log(C.min()), math.log(C.max()), 400), [], []
    groups = [runs[size == s] for s in np.unique(size)]
    for own in groups:
        x, at = np.unique(np.log(6 * own[:, 0] * own[:, 1]), return_index=True)
        if len(x) > 1:
            sizes.append(own[0, 0])
            # a run's loss at a budget it did not stop at, by its neighbours: linear in logs
            curves.append(np.interp(grid, x, np.log(own[at, 2]), left=np.inf, right=np.inf))
    if len(sizes) < 3:
        raise BadInput(f"envelope: needs at least 3 values of N with runs of 2 or more budgets, got {len(sizes)}")
    curves, sizes = np.array(curves), np.array(sizes)
    # where the best is the smallest or largest that was tried, a better one may be missing
    best, reach = curves.argmin(0), np.isfinite(curves)
    keep = (reach.argmax(0) < best) & (best < len(sizes) - 1 - reach[::-1].argmax(0))
    if len(np.unique(best[keep])) < 2:
        raise BadInput("envelope: needs at least 2 sizes that are best where smaller and larger ones were tried, got "
                       f"{len(np.unique(best[keep]))}")
    C, N = np.exp(grid[keep]), sizes[best[keep]]
    return power_law(C, N, C / (6 * N), np.exp(curves.min(0)[keep])) | {
        "intervals": bootstrap(fit_envelope, groups, times, seed)}


def budgets(runs, tolerance=0.1) -> list[np.ndarray]:
    """Runs of equal C = 6 N D, to a tolerance: one table a budget, by C."""
    C, groups = 6 * runs[:, 0] * runs[:, 1], []
    for i in np.argsort(C, kind="stable"):
        if not groups or C[i] > (1 + tolerance) * C[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return [runs[g] for g in groups]


def parabola(group) -> tuple | None:
    """(C, N_opt, D_opt, loss, curvature) of one budget's runs; None without three sizes or a minimum among them."""
    n, loss = np.log(group[:, 0]), group[:, 2]
    if distinct(group[:, 0]) < 3:
        return None
    # L = c2 (n - mean)^2 + c1 (n - mean) + c0, vertex at -c1 / (2 c2)
    c2, c1, c0 = np.polyfit(n - n.mean(), loss, 2)
    if c2 <= 0 or not n.min() <= n.mean() - c1 / (2 * c2) <= n.max():
        return None
    N, C = math.exp(n.mean() - c1 / (2 * c2)), math.exp(np.log(6 * group[:, 0] * group[:, 1]).mean())
    return C, N, C / (6 * N), c0 - c1 * c1 / (4 * c2), c2


def fit_isoflop(runs, *, times=200, seed=0) -> dict:
    """Approach 2: {"a", "b", "k_N", "k_D": N_opt = k_N C^a, D_opt = k_D C^b, "points": the vertices, "intervals"}.

    It is biased even without noise. With u = ln(N / N_opt), loss - E ~ exp(-alpha u) / alpha + exp(beta u) / beta: to
    third order, sizes spread evenly from N_opt / w to N_opt w put the vertex at u = (alpha - beta) ln(w)^2 / 10. The
    same at every budget, it spoils k_N and k_D alone; sizes that drift off the optimum as C grows spoil a too.
    """
    groups = budgets(table(runs))
    found = [p[:4] for p in map(parabola, groups) if p]
    if len(found) < 2:
        raise BadInput("isoflop: needs at least 2 budgets 6 N D of 3 or more sizes with the best inside, got "
                       f"{len(found)} of {len(groups)} groups of equal budget")
    return power_law(*np.array(found).T) | {"intervals": bootstrap(fit_isoflop, groups, times, seed)}


def residuals(theta, x, y, z, weights, delta):
    """theta (S, 5) = e, a, b, alpha, beta of S laws; x, y, z (n,) = ln N, ln D, ln L; weights (S, n) -> f (S,), the
    weighted sum of Huber(r); r (S, n); p (3, S, n), each term's share of the predicted loss."""
    e, a, b, alpha, beta = theta.T[:, :, None]
    terms = np.stack(np.broadcast_arrays(e, a - alpha * x, b - beta * y))
    top = terms.max(0)
    p = np.exp(terms - top)
    total = p.sum(0)
    r = top + np.log(total) - z                                                                   # LSE - ln L
    size = np.abs(r)
    f = (weights * np.where(size <= delta, r * r / 2, delta * (size - delta / 2))).sum(1)
    return f, r, p / total


def minimise(theta, x, y, z, weights, delta, iterations=1000):
    """S laws, each improved until nothing can be gained in float64 -> theta, f. All at once: starts, or resamples.

    Newton in a trust region: with H = V diag(lam) V^T, step = -V (V^T g / (|lam| + mu)); mu falls after a step that
    helped and rises after one that did not.
    """
    theta, (f, r, p) = theta.copy(), residuals(theta, x, y, z, weights, delta)
    mu, active = np.full(len(theta), 1e-2), np.arange(len(theta))
    for _ in range(iterations):
        w, q = weights[active], p[:, active]
        psi, inside = w * r[active].clip(-delta, delta), w * (np.abs(r[active]) <= delta)        # Huber', Huber''
        J = np.stack((q[0], q[1], q[2], -q[1] * x, -q[2] * y), -1)                               # dr / dtheta
        g = (psi[..., None] * J).sum(1)
        # H = sum Huber'' J J^T + Huber' (sum_k p_k v_k v_k^T - J J^T),  v_k = d term_k / dtheta
        H = (J * (inside - psi)[..., None]).swapaxes(1, 2) @ J
        H[:, 0, 0] += (psi * q[0]).sum(1)
        for k, v in ((1, x), (2, y)):
            s = psi * q[k]
            H[:, k, k] += s.sum(1)
            H[:, k + 2, k] -= s @ v                                            # the lower triangle: eigh reads no other
            H[:, k + 2, k + 2] += s @ (v * v)
        lam, V = np.linalg.eigh(H)
        lam, along = np.abs(lam), (V.swapaxes(1, 2) @ g[..., None])[..., 0]
        most = lam.max(1, keepdims=True) + 1e-300
        step = -(V @ (along / (lam + mu[active, None] * most))[..., None])[..., 0]
        promise = (along**2 / (lam + 1e-10 * most)).sum(1)                                # of an unconstrained step
        new = theta[active] + step
        f_new, r_new, p_new = residuals(new, x, y, z, w, delta)
        better = f_new < f[active]
        to = active[better]
        theta[to], f[to], r[to], p[:, to] = new[better], f_new[better], r_new[better], p_new[:, better]
        mu[active] *= np.where(better, 0.2, 4)
        # no more is promised, or no step is short enough to help, than rounding
        active = active[(promise > 1e-13 * f[active] + 1e-26) & (mu[active] < 1e12)]
        if not len(active):
            break
    return theta, f


def fit_parametric(runs, *, delta=1e-3, times=200, seed=0) -> dict:
    """Approach 3: {"E", "A", "B", "alpha", "beta", "objective": sum of Huber(ln L_predicted - ln L), "intervals"}, the
    last {"E": [low, high], ...}, of a and b too, 2.5 and 97.5 % of `times` resamples (None for 0). It is a law:
    chinchilla_loss and compute_optimal take it. Raises BadInput for what cannot support a fit.

    runs: rows (N, D, loss), dicts, or a dict of columns.
    """
    runs = table(runs)
    points = len(np.unique(np.round(np.log(runs[:, :2]), 6), axis=0))
    if points < 6:
        raise BadInput(f"needs at least 6 runs of different (N, D) for a law of 5 constants, got {points}")
    for name, term, column in (("N", "A / N^alpha", runs[:, 0]), ("D", "B / D^beta", runs[:, 1])):
        if distinct(column) < 3:
            raise BadInput(f"{name} must take at least 3 values to tell E from {term}, got {distinct(column)}")
    if np.ptp(runs[:, 2]) == 0:
        raise BadInput(f"loss must not be the same in all runs, got {runs[0, 2]:g}")
    x, y, z = np.log(runs).T
    if np.corrcoef(x, y)[0, 1] > 1 - 1e-9:
        raise BadInput("D must not be a power of N, or A / N^alpha and B / D^beta are one: vary D at the same N")
    center = x.mean(), y.mean()
    x, y = x - center[0], y - center[1]                    # a and b: logs of the terms in the middle of the runs

    def solve(theta, weights, iterations):
        parts = np.array_split(np.arange(len(theta)), -(-weights.size // 400_000))                         # memory
        found = [minimise(theta[i], x, y, z, weights[i], delta, iterations) for i in parts if len(i)]
        return np.concatenate([t for t, _ in found]), np.concatenate([f for _, f in found])

    # starts: E a share of the lowest loss; the rest split between the terms; exponents
    middle, rates = math.exp(np.median(z)), (0.05, 0.2, 0.5, 1.0, 2.0)
    starts = np.array([(math.log(E), math.log(s * (middle - E)), math.log((1 - s) * (middle - E)), alpha, beta)
                       for E in np.exp(z.min()) * np.array((0.01, 0.5, 0.95))
                       for s in (0.1, 0.5, 0.9) for alpha in rates for beta in rates])
    theta, f = solve(starts, np.ones((len(starts), len(z))), 60)
    theta, f = solve(theta[f.argsort()[:24]], np.ones((24, len(z))), 2000)
    best, intervals = f.argmin(), None
    names = "E", "A", "B", "alpha", "beta"

    def law_of(theta):
        """theta (..., 5) -> the five constants, in the units of N and D."""
        e, a, b, alpha, beta = np.moveaxis(theta, -1, 0)
        return *np.exp(np.clip((e, a + alpha * center[0], b + beta * center[1]), -700, 700)), alpha, beta

    if times:
        weights = np.random.default_rng(seed).multinomial(len(z), np.full(len(z), 1 / len(z)), times).astype(float)
        laws = law_of(solve(np.repeat(theta[best:best + 1], times, 0), weights, 300)[0])
        a = laws[4] / (laws[3] + laws[4])
        intervals = {name: np.percentile(v, (2.5, 97.5)).tolist()
                     for name, v in zip((*names, "a", "b"), (*laws, a, 1 - a), strict=True)}
    law = dict(zip(names, map(float, law_of(theta[best])), strict=True))
    return law | {"objective": float(f[best]), "intervals": intervals}


# ---- machines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """FLOP/s (dense), bytes, bytes/s, watts, dollars an hour. link: all-reduce bus bandwidth inside a node; network:
    line rate a GPU between nodes."""

    peak: float
    fp8: float
    memory: float
    bandwidth: float
    link: float
    network: float
    watts: float
    matmul: float                             # c
    price: float | None = None
    source: str = "no price known: give --price"
    node: int = 8
    fp32: float = 1 / 16                      # beside bf16, by the makers' data sheets

    def speed(self, precision: str) -> float:
        """Of its matrix products beside bf16."""
        return {"fp32": self.fp32, "tf32": 1 / 2, "fp8": self.fp8 / self.peak}.get(precision, 1.0)


def gpu(peak, fp8, memory, bandwidth, link, network, watts, matmul, *price, **more) -> GPU:
    """From TFLOP/s, GB, GB/s."""
    sizes = peak * 1e12, fp8 * 1e12, memory * 1e9, bandwidth * 1e9, link * 1e9, network * 1e9
    return GPU(*sizes, watts, matmul, *price, **more)


# Links: measured 235 of NVLink 3's 300 GB/s and 368 of NVLink 4's 450; of others 0.8 of the line
# rate (PCIe 4: 31, PCIe 5: 63).
# Network: 200 Gb/s a GPU beside A100 (Narayanan 2021, section 5), 400 beside H100 (Llama 3, section 3.3.1) and later.
# c: fitted for A100 and H100, where it is 0.88 and 0.79 of the largest product measured; 0.83 of that for the others,
# and of 0.78 of the peak where nobody measured
SKYPILOT, RUNPOD = "skypilot-catalog v8, undated", "RunPod secure, 2026-05-22"
GPUS = {
    "v100": gpu(125, 0, 32, 900, 120, 12.5, 300, 0.65, 0.79, f"Lambda, 16 GB, {SKYPILOT}", fp32=1 / 8),
    "a100": gpu(312, 0, 80, 2000, 235, 25, 400, 0.712, 1.50, "assumed by Sardana et al., arXiv:2401.00448, 2024"),
    "a100-pcie": gpu(312, 0, 80, 1940, 25, 25, 300, 0.67),
    "h100": gpu(989, 1979, 80, 3350, 368, 50, 700, 0.635, 2.69, RUNPOD),
    "h100-pcie": gpu(756, 1513, 80, 2000, 50, 50, 350, 0.65, 2.79, RUNPOD),
    "h200": gpu(989, 1979, 141, 4800, 368, 50, 700, 0.635, 3.50, f"Nebius on demand, {SKYPILOT}"),
    "b200": gpu(2250, 4500, 180, 8000, 720, 50, 1000, 0.64, 5.50, f"Nebius, {SKYPILOT}", fp32=1 / 30),
    "b300": gpu(2250, 4500, 288, 8000, 720, 50, 1000, 0.65, fp32=1 / 30),
    "gb200": gpu(2500, 5000, 186, 8000, 720, 50, 1200, 0.61, fp32=1 / 31),
    "mi300x": gpu(1307.4, 2614.9, 192, 5300, 358, 50, 750, 0.50, 1.71, "TensorWave, undated", fp32=1 / 8),
    "mi325x": gpu(1300, 2610, 256, 6000, 358, 50, 1000, 0.50, fp32=1 / 8),
    "mi355x": gpu(2500, 5000, 288, 8000, 428, 50, 1400, 0.50),
    "l40s": gpu(362, 733, 48, 864, 25, 25, 350, 0.65, 1.55, f"Nebius, {SKYPILOT}", fp32=1 / 4),
    "l4": gpu(121, 242.5, 24, 300, 25, 12.5, 72, 0.65, fp32=1 / 4),
    "rtx4090": gpu(165.2, 330.3, 24, 1008, 25, 12.5, 450, 0.65, 0.25, "Hyperbolic, skypilot-catalog v7, undated",
                   fp32=1 / 2),
    "t4": gpu(65, 0, 16, 320, 12.5, 12.5, 70, 0.65, fp32=1 / 8)}
LINE = 0.8                                    # share of a network's line rate that messages reach, as in the links
NVLINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6       # seconds, of rings: NCCL's own tables, src/graph/tuning.cc
FLASH = 0.6                                   # FlashAttention-2, figure 4: 187 of A100's 312 TFLOP/s at T 2048, D 128
USABLE = 0.95                                 # of memory: the rest is CUDA's, NCCL's, and gaps
PUE, GRID = 1.1, 0.385                        # building / GPUs; kg CO2 a kWh (LLaMA, arXiv:2302.13971, section 6)
PRECISIONS = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2}                     # bytes of what is multiplied
BUCKETS = 25e6, 10e6, 10e6                    # bytes of gradients a message, by ZeRO stage: parallel.py's, zero.py's


@dataclass(frozen=True)
class Software:
    """In what training programs differ. The defaults are train.py's on a GPU. Nothing here is fitted."""

    item: int = 2                 # bytes of a number in matrix products
    residual: int = 4             # ... in the residual stream and norms
    gradient: int = 4             # ... of a gradient
    flash: bool = True            # False: attention keeps its scores, dropped out and not
    dropout: bool = False
    fused_norm: bool = True       # RMSNorm keeps its input alone
    ours: bool = True             # what of this project differs from the papers' formulas, wherever it is asked for
    overlap_tp: bool = False      # half of backward's messages run beside the weights' gradients
    overlap_dp: bool = True       # gradients leave during backward

    states = property(lambda self: 12 if self.item < 4 else 8)


MEGATRON_2021 = Software(residual=2, gradient=2, flash=False, dropout=True, ours=False, overlap_dp=False)
MEGATRON_2022 = replace(MEGATRON_2021, overlap_tp=True)
LLAMA_3 = Software(residual=2, ours=False, overlap_tp=True)

# ---- memory ----------------------------------------------------------------------------------------------------------

def layer_bytes(model: Shape, at: Layout, by: Software, recompute: str) -> float:
    """What a layer keeps from forward to backward, of one micro-batch on one rank. (Korthikanti 2022, equations 1 to 6,
    and the same count of SwiGLU, grouped heads, RMSNorm, flash attention)"""
    C, n, rms = model.n_embd, at.micro_batch_size * model.seq_len, model.norm == "rmsnorm"
    if recompute == "full":                                                                        # its input
        return n * C * by.residual / at.split
    copies = 2 if rms and not by.fused_norm else 1
    # two norms' inputs and statistics; masks; what they hand on, of which train.py's linears each cast their own
    handed = 3 + model.ups if by.ours and by.item < by.residual and at.tp == 1 else 2
    whole = 2 * (copies * C * by.residual + by.ours * (4 if rms else 8) + C * by.dropout) + handed * C * by.item
    # q k v, o, the MLP
    split = (2 * model.q + 2 * model.kv + 2 * model.ups * model.n_ff) * by.item
    if model.qk_norm:
        split += copies * (model.q + model.kv) * by.residual + 4 * (model.n_head + model.n_kv_head)
    if recompute == "none":
        # log sum exp; or softmax, its mask and what that leaves, over T keys
        split += model.n_head * (4 if by.flash else (2 * by.item + by.dropout) * model.seq_len)
    elif by.ours and model.position == "rope":                                 # q and k before the core has cast them
        split += (model.q + model.kv) * (by.residual - by.item)
    return n * (whole / at.split + split / at.tp)


def stored(at: Layout, r: int) -> float:
    """Micro-batches whose activations a rank at place r holds at once; of interleaved stages, in parts."""
    p, m, v = at.pp, at.micro_batches, at.chunks
    if v > 1:
        return min(m * v, (p - 1 - r) * 2 + (v - 1) * p + 1) / v
    return m if at.schedule == "gpipe" and p > 1 else min(m, p - r)


def memory(model: Shape, at: Layout, by: Software, r: int) -> dict:
    """Bytes of a rank at place r: {"parameters", "gradients", "states", "activations", "buffers"}. (Rajbhandari 2020,
    figure 1; Korthikanti 2022, section 4)"""
    psi, n, C, V = held(model, at, r)[0], at.micro_batch_size * model.seq_len, model.n_embd, model.vocab_size / at.tp
    layers, last, rms = depth(model.n_layer, at.pp, at.chunks)[r], r == at.pp - 1, model.norm == "rmsnorm"
    alive, F = stored(at, r), model.n_ff
    # the last norm; the head: its input, and logits; ours: a shard of its input, gradients of it and of its weight
    norm = n * (C * by.residual * (2 if rms and not by.fused_norm else 1) + by.ours * (4 if rms else 8)) / at.split
    head = n * C * by.item / at.split * (at.split > 1 or not by.ours) + 4 * (n * C + V * C if by.ours else n * V)
    tables = by.ours * model.seq_len * (model.head_dim * 4 if model.position == "rope" else 8 * (r == 0))
    kept = alive * (layers * layer_bytes(model, at, by, at.recompute) + at.chunks * tables)
    kept += last * (norm + head) * (alive if at.schedule == "gpipe" else 1)
    if at.schedule == "zb" and at.pp > 1:
        # W waits with the linears' inputs and their results' gradients; those of one linear stay until the next W, and
        # only where an F comes between are they there when most is
        late = n * by.item * (4 * C + (2 * model.q + 2 * model.kv + (model.ups + 1) * F) / at.tp)
        kept += (min(at.micro_batches, at.pp) - alive) * layers * late
        kept += (at.micro_batches > at.pp) * n * by.item * (C + F / at.tp)
    # on their way: buckets of 10 MB, or layers: one and its share that add up, from stage 2 two more as products left
    # them; at stage 3 this layer and the next, gathered
    unit = max((model.block + model.column_biases) / at.tp + model.whole, V * C * (r == 0 or last))
    bucket = unit if at.zero == 3 else min(BUCKETS[at.zero] / by.gradient, psi)
    sums = bucket * (1 + 1 / at.dp) if at.zero else psi * (at.micro_batches > 1)
    moving = (at.dp > 1) * (sums * by.gradient + (at.zero >= 2) * 2 * bucket * by.item)
    moving += (at.zero == 3) * 2 * bucket * by.item
    again = layer_bytes(model, at, by, "none") * (at.recompute == "full")
    # at train.py's stage 3 the float32 shard is the master
    weight, states = (4, 8) if at.zero == 3 and by.ours else (by.item, by.states)
    shares = (at.dp if at.zero >= stage else 1 for stage in (3, 2, 1))
    parts = (psi * size / n for size, n in zip((weight, by.gradient, states), shares, strict=True))
    return dict(zip(("parameters", "gradients", "states", "activations", "buffers"), (*parts, kept, moving + again),
                    strict=True))


def fullest(model: Shape, at: Layout, by: Software) -> dict:
    """memory() of the rank that needs most: an end of the pipeline, or the first of those with so many layers."""
    layers = depth(model.n_layer, at.pp, at.chunks)
    ranks = {0, at.pp - 1, *(layers.index(x, min(1, at.pp - 1)) for x in set(layers[1:]))}
    return max((memory(model, at, by, r) for r in ranks), key=lambda parts: sum(parts.values()))


def by_stage(model: Shape, at: Layout, by: Software) -> dict:
    return {f"zero {z}": fullest(model, replace(at, zero=z), by) for z in range(4 if at.dp > 1 else 1)}


def fits(model: Shape, on: GPU, at: Layout, by: Software) -> bool:
    return sum(fullest(model, at, by).values()) <= USABLE * on.memory


# ---- messages --------------------------------------------------------------------------------------------------------

def halves(at: Layout, by: Software) -> tuple[int, int, int]:
    """All-gathers and reduce-scatters over tp of a layer (an all-reduce is both): forward, backward, when it runs
    again."""
    again = 4 if not by.ours else 3 if at.sequence_parallel else 2                  # the last sum's result is not used
    return 4, 4 + 2 * at.sequence_parallel, again * (at.recompute == "full")


def wire(model: Shape, at: Layout, by: Software, r: int) -> dict:
    """Bytes that a rank at place r sends in a step, as rings, by axis. Its mean over the dp group, where ZeRO's shards
    differ."""
    (psi, whole, tensors), m, last = held(model, at, r), at.micro_batches, r == at.pp - 1
    n, C, layers = at.micro_batch_size * model.seq_len, model.n_embd, depth(model.n_layer, at.pp, at.chunks)[r]
    inner, hidden, table = n * C * by.item, n * C * by.residual, model.vocab_size // at.tp * C
    sent = {"world": 2 * 24, "dp": 0, "tp": 0, "pp": 0, "ends": 0}                  # loss, squared norm, please stop
    if at.dp > 1:
        scatters, gathers = {0: (2, 0), 1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[at.zero]
        twice = table * (at.zero == 3 and model.tie_embeddings and at.pp == 1)      # both who use it gather it
        # which gradients there are; the number of targets
        flags = 8 + (4 * (tensors + (at.chunks if at.zero == 3 else 1)) if at.zero else tensors)
        sent["dp"] = psi * scatters * by.gradient + (psi + twice) * gathers * by.item + 2 * flags
    share = at.dp if at.zero else 1
    if at.tp > 1:
        partial = whole if at.sequence_parallel else layers * 2 * model.qk_norm * model.head_dim
        # max, sum of exponentials, target's logit
        once = partial * by.gradient / share + m * last * 3 * n * max(4, by.item)
        sent["tp"] = m * (inner * (layers * sum(halves(at, by)) + 2 * last) + 2 * hidden * (r == 0)) + 2 * once
    if at.pp > 1:
        sent["pp"] = m * (2 * at.chunks - (r == 0) - last) * hidden / at.split
        sent["ends"] = 2 * table * by.gradient / share * (model.tie_embeddings and (r == 0 or last))
    size = {"world": at.gpus, "dp": at.dp, "tp": at.tp, "pp": math.inf, "ends": 2}
    return {axis: x * (1 - 1 / size[axis]) for axis, x in sent.items() if x and size[axis] > 1}


def half(on: GPU, n: int, stride: int, size: float, messages: float = 1) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes, all parts together, over n ranks `stride` apart: a
    ring, between nodes as wide as there are ranks of it inside one."""
    inside = max(1, min(n, on.node // stride))
    nodes = math.ceil(n / inside)
    rate = on.link if nodes == 1 else min(on.link, inside * LINE * on.network)
    # (n-1)/n bytes / bandwidth + hops x latency
    return (n - 1) / n * size / rate + messages * ((n - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP)


# ---- time ------------------------------------------------------------------------------------------------------------

def bubble(at: Layout, forward: float, backward: float, weight: float) -> float:
    """Seconds of a step in which a pipeline rank waits; costs of F, B and W of a micro-batch in all of a rank's layers.
    (Narayanan 2021, section 2.2; Qi 2023, table 2 and appendix H)"""
    if at.schedule == "zb" and at.pp > 1:
        return (at.pp - 1) * (forward + backward) - (min(at.micro_batches, at.pp) - 1) * weight
    return (at.pp - 1) / at.chunks * (forward + backward + weight)


def step_time(model: Shape, on: GPU, at: Layout, by: Software, speed: float = 1.0) -> dict:
    """Seconds of a step: {"compute", "tp", "pp", "dp", "bubble", "update"}, messages as far as nothing hides them.
    speed: of linear layers, beside bf16."""
    b, T, C, F, t, m = at.micro_batch_size, model.seq_len, model.n_embd, model.n_ff, at.tp, at.micro_batches
    n, slow_core = b * T, min(speed, 1)

    def product(rows, columns, inner, speed=speed):
        # 2 m n k / (c peak) + bytes / HBM
        size = by.item * (rows * columns + columns * inner + rows * inner)
        return 2 * rows * columns * inner / (on.matmul * on.peak * speed) + size / on.bandwidth

    linear = (product(n, (model.q + 2 * model.kv) / t, C) + product(n, C, model.q / t)
              + product(n, model.ups * F / t, C) + product(n, C, F / t))
    if by.flash:
        # of 4 n T q causality hides half
        core, times, scores = 2 * n * T * model.q / t / (FLASH * on.peak * slow_core), 2.5, 0.0
    else:
        heads, D, times = b * model.n_head / t, model.head_dim, 2
        core = heads * (product(T, T, D, slow_core) + product(T, D, T, slow_core))
        scores = heads * (2 * by.item + by.dropout) * T * T / on.bandwidth
    kept = layer_bytes(model, at, by, "none") / on.bandwidth
    again = {"none": 0, "selective": core + 2 * scores, "full": linear + core + 2 * kept}[at.recompute]
    head = product(n, model.vocab_size / t, C) + 6 * n * model.vocab_size / t / on.bandwidth
    ahead, behind, repeated = (x * half(on, t, 1, n * C * by.item) for x in halves(at, by))
    behind = ahead / 2 if by.overlap_tp else behind

    # F, B, W of a micro-batch in the slowest stage: what is computed, what is said over tp, to the other stages
    layers = depth(model.n_layer, at.pp, at.chunks)
    work = [layers[r] * (3 * linear + (1 + times) * core + 5 * kept + again) + 3 * head * (r == at.pp - 1)
            for r in range(at.pp)]
    slow = work.index(max(work))
    L, ends = layers[slow], head * (slow == at.pp - 1)
    F, W = L * (linear + core + 2 * kept) + ends, L * linear + ends
    compute, tp = (F, work[slow] - F - W, W), (L * ahead, L * (behind + repeated), 0.0)
    far = at.gpus > on.node
    rate, delay = (LINE * on.network, NETWORK_HOP) if far else (on.link, NVLINK_HOP)
    pp = (at.pp > 1) * at.chunks * (n * C * by.residual / (at.split if by.ours else t) / rate + delay)
    forward, backward, weight = (sum(x) for x in zip(compute, tp, (pp, pp, 0.0), strict=True))

    # gradients are summed beside backward; parameters gathered before the pass that needs them, or after the update
    psi = held(model, at, slow)[0]
    # a message a layer at stage 3, a bucket before; Megatron's is one
    messages = L if at.zero == 3 else max(1, psi * by.gradient / BUCKETS[at.zero]) if by.ours else 1
    scatter, gather = (half(on, at.dp, t, psi * size, messages) for size in (by.gradient, by.item))

    def exposed(message, beside):
        return max(0.0, message - by.overlap_dp * beside)

    behind = backward + weight
    dp = {0: exposed(2 * scatter, behind), 1: exposed(scatter, behind) + gather,
          2: m * exposed(scatter, behind) + gather,
          3: m * (exposed(scatter + gather, behind) + exposed(gather, forward))}[at.zero]
    # reads the gradient and the states, writes the states and the weight
    update = psi * (2 * by.states + by.gradient + by.item) / on.bandwidth / (at.dp if at.zero else 1)
    return {"compute": m * sum(compute), "tp": m * sum(tp), "pp": m * 2 * pp, "dp": dp,
            "bubble": bubble(at, forward, backward, weight), "update": update}


def estimate(model: Shape, on: GPU, at: Layout, by: Software = Software(), speed: float = 1.0) -> dict:
    """What a layout costs: {"layout", "memory": bytes by part, "seconds": by part, "step": their sum, "tokens_per_s",
    "mfu" (of the precision's peak), and of a GPU "tflops", "hardware_tflops" (with what is computed again)}."""
    seconds = step_time(model, on, at, by, speed)
    rate = at.batch * model.seq_len / sum(seconds.values())
    tflops, hardware = (rate / at.gpus * model.flops_per_token(again) / 1e12 for again in ("none", at.recompute))
    return {"layout": at, "memory": fullest(model, at, by), "seconds": seconds, "step": sum(seconds.values()),
            "tokens_per_s": rate, "mfu": tflops * 1e12 / on.peak / speed, "tflops": tflops, "hardware_tflops": hardware}


# ---- plan ------------------------------------------------------------------------------------------------------------

FIELDS = tuple(f.name for f in dataclasses.fields(Layout) if f.name != "micro_batches")


def layouts(model: Shape, on: GPU, n_gpus: int, batch: int, **fixed):
    """Every layout of n_gpus ranks that train.py takes, with tp inside a node and, of equals, the faster schedule;
    `fixed` fields as they are given."""
    def choices(name, *default):
        return default if fixed.get(name) is None else (fixed[name],)

    divisors = [n for n in range(1, n_gpus + 1) if n_gpus % n == 0]
    for tp, pp in itertools.product(choices("tp", *(n for n in divisors if n <= on.node)), choices("pp", *divisors)):
        dp = n_gpus // (tp * pp)
        ways = [("1f1b", 1), *([("zb", 1), ("gpipe", 1)] * (pp > 1)),
                *(("interleaved", v) for v in choices("chunks", *range(2, 9)) if v > 1 < pp)]
        ways = [(way, v) for way, v in ways if way in choices("schedule", "1f1b", "zb", "interleaved")
                and v in choices("chunks", v)]
        if dp * tp * pp != n_gpus or dp not in choices("dp", dp):
            continue
        for b, (way, v), zero, again, sp in itertools.product(
                choices("micro_batch_size", 1, 2, 4, 8, 16, 32), ways, choices("zero", *range(4 if dp > 1 else 1)),
                choices("recompute", "none", "selective", "full"), choices("sequence_parallel", True)):
            m = batch // (dp * b)
            split = (model.n_head, model.n_kv_head, model.n_ff, model.vocab_size, *([model.seq_len] if sp else []))
            if (m * dp * b == batch and not any(x % tp for x in split) and pp * v <= model.n_layer
                    and not (v > 1 and m % pp) and not (way == "zb" and again != "none")):
                yield Layout(dp, tp, pp, way, v, b, m, zero, again, sp)


def plan(config, gpu: str | GPU, n_gpus: int, *, global_batch_size: int | None = None, precision: str = "bf16",
         by: Software | None = None, top: int | None = None, **fixed) -> list[dict]:
    """The layouts of a training step that fit, fastest first, the best of each (tp, pp, zero): as estimate() has them,
    and "command", which train.py takes.

    config             a Shape, a mapping or an object with ModelConfig's fields
    gpu                a name in GPUS, or a GPU
    global_batch_size  sequences a step; default: of 4 M or half a million tokens
    by                 another program than train.py; precision: train.py's flag
    fixed              fields of Layout that are given: tp=8, recompute="full", ...
    Raises BadInput for what cannot be; and if nothing fits: what is biggest, and the cheapest change.
    """
    model, on = shape_of(config), gpu if isinstance(gpu, GPU) else find_gpu(gpu)
    if precision not in PRECISIONS:
        raise BadInput(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp8" and not on.fp8 or precision in ("bf16", "tf32") and before_ampere(on):
        raise BadInput(f"precision must be one that the GPU has, got {precision}")
    if n_gpus < 1 or n_gpus != int(n_gpus):
        raise BadInput(f"n_gpus must be a whole number from 1, got {n_gpus}")
    for name in ("dp", "tp", "pp"):
        if n_gpus % (fixed.get(name) or 1):
            raise BadInput(f"{name} must divide the number of GPUs, {n_gpus}, got {fixed[name]}")
    if unknown := fixed.keys() - set(FIELDS):
        raise BadInput(f"{min(unknown)} must be a field of a layout: {', '.join(FIELDS)}")
    item, speed = PRECISIONS[precision], on.speed(precision)
    # 4 M tokens (Llama 2), below 1 B parameters 0.5 M (GPT-3, table 2.1), in sequences, a multiple of the GPUs
    each = n_gpus * (fixed.get("micro_batch_size") or 1)
    usual = max(1, round((2**22 if model.num_params >= 1e9 else 2**19) / model.seq_len / each)) * each
    by, batch = by or Software(item=item), global_batch_size or usual
    ways = list(layouts(model, on, n_gpus, batch, **fixed))
    if not ways:
        flags = {"schedule": "pp_schedule", "chunks": "pp_chunks"}
        given = "".join(f", --{flags.get(name, name).replace('_', '-')} {x}" for name, x in fixed.items()
                        if x is not None)
        raise BadInput(f"global_batch_size {batch} on {n_gpus} GPUs must be split evenly by some dp x tp x pp that "
                       f"train.py takes for {model.n_head} heads ({model.n_kv_head} of keys) and {model.n_layer} "
                       f"layers{given}; none does")
    fitting, best = [at for at in ways if fits(model, on, at, by)], {}
    if not fitting:
        raise BadInput(why_not(model, on, ways, by, speed))
    for e in sorted((estimate(model, on, at, by, speed) for at in fitting), key=lambda e: e["step"]):
        best.setdefault((e["layout"].tp, e["layout"].pp, e["layout"].zero), e)
    return [e | {"command": command(model, e["layout"], precision, on)} for e in list(best.values())[:top]]


def find_gpu(name: str) -> GPU:
    key = name.lower().replace(" ", "-").replace("-sxm", "").replace("nvidia-", "")
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, 3, 0.3)
        raise BadInput(f"gpu must be one of {', '.join(GPUS)}, got {name!r}"
                       + (f"; the nearest: {', '.join(near)}" if near else ""))
    return GPUS[key]


def before_ampere(on: GPU) -> bool:
    """V100, T4: neither bf16 nor FP8."""
    return not on.fp8 and on.peak < 2e14


def why_not(model: Shape, on: GPU, ways: list, by: Software, speed: float) -> str:
    """One line: the layout that needs least, what is biggest there, and what would do: of single changes the fastest.
    """
    least = min(ways, key=lambda at: sum(fullest(model, at, by).values()))
    parts, tried = fullest(model, least, by), []
    for name, x in (*(("zero", z) for z in (1, 2, 3)), ("recompute", "selective"), ("recompute", "full"),
                    *((name, 2**i) for name in ("tp", "pp") for i in range(1, 8)), ("micro_batch_size", 1)):
        given = {field: getattr(least, field) for field in FIELDS if field != "dp"} | {name: x}
        tried += [(sum(step_time(model, on, at, by, speed).values()), f"--{name.replace('_', '-')} {x}")
                  for at in layouts(model, on, least.gpus, least.batch, **given) if fits(model, on, at, by)]
    more = (2**i * least.gpus for i in range(1, 12)) if not tried else ()
    for n in more:
        few = dict(zero=3, recompute="full", micro_batch_size=1, schedule="1f1b")
        if any(fits(model, on, at, by) for at in layouts(model, on, n, n, **few)):
            tried = [(0.0, f"{n} GPUs with --zero 3 --recompute full")]
            break
    biggest = max(parts, key=parts.get)
    return (f"does not fit: the smallest layout (dp {least.dp}, tp {least.tp}, pp {least.pp}, zero {least.zero}, "
            f"recompute {least.recompute}, micro-batch {least.micro_batch_size}) needs {sum(parts.values()) / 1e9:.1f} "
            f"of {USABLE * on.memory / 1e9:.1f} GB a GPU; biggest: {biggest}, {parts[biggest] / 1e9:.1f} GB; the "
            f"cheapest change: {min(tried)[1] if tried else 'none found'}")


def largest(on: GPU, n_gpus: int, seq_len: int = 4096, by: Software = Software()) -> Shape:
    """The largest Llama whose training fits: full recomputation, micro-batches of one sequence, stage 3 or none."""
    few = dict(recompute="full", micro_batch_size=1, schedule="1f1b")

    def fitting(params):
        model = shape_for(params, seq_len)
        return any(fits(model, on, at, by) for at in layouts(model, on, n_gpus, n_gpus, **few) if at.zero in (0, 3))

    return shape_for(last(fitting, 1e6, 1e14, 1.01), seq_len)


def cost(on: GPU, n_gpus: int, seconds: float, pue: float = PUE, grid: float = GRID) -> dict:
    """{"gpu_hours", "energy_mwh", "tco2", "dollars"}; at full power, as LLaMA's bill: hours x watts x PUE."""
    hours = n_gpus * seconds / 3600
    energy = hours * on.watts * pue / 1e6
    return {"gpu_hours": hours, "energy_mwh": energy, "tco2": energy * grid, "dollars": on.price and hours * on.price}


def command(model: Shape, at: Layout, precision: str, on: GPU, steps=None, config=None) -> str:
    """The torchrun line. config: train.py's name of the model; without, the line holds all of its shape."""
    nodes = math.ceil(at.gpus / on.node)
    launch = f"torchrun --nproc-per-node {min(at.gpus, on.node)}"
    launch += f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500" if nodes > 1 else ""
    flags = {"config": config or ("large" if model.num_params < 3e9 else "7b")}
    flags |= {"seq_len": model.seq_len} if config else dataclasses.asdict(model)
    flags |= {"steps": steps, "global_batch_size": at.batch, "micro_batch_size": at.micro_batch_size, "dp": at.dp,
              "tp": at.tp, "pp": at.pp, "zero": at.zero, "recompute": at.recompute, "precision": precision}
    flags |= {"pp_schedule": at.schedule} if at.pp > 1 else {}
    flags |= {"pp_chunks": at.chunks} if at.chunks > 1 else {}
    flags |= {} if at.sequence_parallel else {"sequence_parallel": False}
    words = (f"--{'no-' if x is False else ''}{name.replace('_', '-')}" + ("" if isinstance(x, bool) else f" {x}")
             for name, x in flags.items() if x is not None)
    return f"{launch} train.py {' '.join(words)}"


# ---- figures ---------------------------------------------------------------------------------------------------------

def figure(title, *ratios, height=5.4):
    """A drawing of axes side by side, as wide as the ratios say."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, height), dpi=150, layout="constrained")
    drawing.suptitle(title, fontsize=13, x=0.01, ha="left", color="#222222")
    axes = drawing.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    for ax in axes:
        ax.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    return drawing, *axes


def plot_runs(folder: Path, runs, results) -> list[Path]:
    """isoflop.png and envelope.png of runs and their fits."""
    from matplotlib import colormaps

    law, budget = results["parametric"], dict(xscale="log", xlabel="budget C = 6 N D, FLOPs")
    N, D, loss = runs.T
    C, size = 6 * N * D, np.round(np.log(N), 6)
    wide = np.geomspace(C.min(), C.max() * 10, 200)
    best = np.array([compute_optimal(c, law) for c in wide]).T if has_optimum(law, wide[-1]) else None

    def shade(share):                                                                         # light to dark
        return colormaps["viridis"](0.9 * (1 - share))

    # loss against size, a curve a budget; where the best size goes as the budget grows
    drawing, left, right = figure(f"IsoFLOP curves: {len(runs)} runs, L = {law['E']:.3g} + {law['A']:.4g} / N^"
                                  f"{law['alpha']:.3g} + {law['B']:.4g} / D^{law['beta']:.3g}", 1.25, 1)
    groups = [g for g in budgets(runs) if distinct(g[:, 0]) > 2]
    for i, g in enumerate(groups):
        color, n = shade(i / max(1, len(groups) - 1)), np.geomspace(g[:, 0].min() / 1.1, g[:, 0].max() * 1.1, 100)
        c, at = math.exp(np.log(6 * g[:, 0] * g[:, 1]).mean()), g[g[:, 0].argmax()]
        left.scatter(g[:, 0], g[:, 2], s=22, color=color, zorder=3)
        left.plot(n, chinchilla_loss(n, c / (6 * n), law), "--", color=color, linewidth=0.9)
        if found := parabola(g):
            left.plot(n, found[3] + found[4] * np.log(n / found[1]) ** 2, color=color, linewidth=1.6)
            left.plot(*found[1:4:2], "*", color=color, markersize=15, markeredgecolor="white", zorder=4)
        left.annotate(f"{c:.1e}".replace("e+", "e"), (at[0], at[2]), (8, 0), textcoords="offset points", color=color,
                      fontsize=9, va="center")
    left.plot([], [], "*", color="#777777", markersize=11, label="vertex of the parabola: N_opt of the budget")
    left.plot([], [], "--", color="#777777", label="the parametric law")
    left.set(xscale="log", xlabel="parameters N", ylabel="loss, nats a token")
    left.margins(x=0.15, y=0.12)                                                    # room for the budgets, the legend
    if best is not None:
        right.plot(wide, best[0], "--", color="#222222", label=f"3 parametric: C^{exponents(law)[0]:.2f}")
    for key, marker, label in (("envelope", ".", "1 envelope"), ("isoflop", "*", "2 IsoFLOP")):
        if fit := results[key]:
            line, = right.plot(wide, fit["k_N"] * wide ** fit["a"], linewidth=1.2, label=f"{label}: C^{fit['a']:.2f}")
            right.plot(*([p[x] for p in fit["points"]] for x in "CN"), marker, color=line.get_color(),
                       markersize=4 if marker == "." else 13)
    right.set(**budget, yscale="log", ylabel="best size N_opt")
    left.legend(frameon=False, fontsize=9, loc="upper right")
    if right.lines:
        right.legend(frameon=False, fontsize=9)
    drawing.savefig(folder / "isoflop.png")

    # loss against compute, a curve a size, and what the best of all sizes reaches; what the law leaves unexplained
    drawing, left, right = figure("Loss against compute: no size stays the best", 1.25, 1)
    colors = shade((size - size.min()) / max(np.ptp(size), 1e-9))
    for s in np.unique(size):
        own = np.flatnonzero(size == s)
        own = own[C[own].argsort()]
        left.plot(C[own], loss[own], "o-", color=colors[own[0]], markersize=3.5, linewidth=1)
    if results["envelope"]:
        left.plot(*([p[x] for p in results["envelope"]["points"]] for x in ("C", "loss")), linewidth=3, alpha=0.8,
                  color="#d1495b", label="lower envelope (approach 1)")
    if best is not None:
        left.plot(wide, chinchilla_loss(*best, law), "--", color="#222222", label="L_opt(C), parametric law")
    left.plot([], [], "o-", color="#777777", markersize=3.5,
              label=f"a size: {N.min():.2g} (light) to {N.max():.2g} parameters (dark)")
    left.set(**budget, ylabel="loss, nats a token")
    left.legend(frameon=False, fontsize=9)
    right.axhline(0, color="#222222", linewidth=1)
    right.scatter(C, 100 * (loss / chinchilla_loss(N, D, law) - 1), s=18, c=colors)
    right.set(**budget, ylabel="measured loss beside the law, %")
    drawing.savefig(folder / "envelope.png")
    return [folder / "isoflop.png", folder / "envelope.png"]


def plot_memory(folder: Path, rows: dict, limit: float, title: str) -> list[Path]:
    """memory.png: {name: bytes by part} as bars."""
    drawing, axes = figure(title, 1, height=1.9 + 0.55 * len(rows))
    left = np.zeros(len(rows))
    for part, color in zip(next(iter(rows.values())), ("#4c72b0", "#55a868", "#c44e52", "#dd8452", "#937860"),
                           strict=True):
        sizes = np.array([row[part] / 1e9 for row in rows.values()])
        axes.barh(list(rows), sizes, 0.62, left, color=color, label=part)
        left += sizes
    for at, total in enumerate(left):
        axes.text(total, at, f" {total:,.1f}", va="center")
    axes.axvline(limit / 1e9, color="#222222", linestyle="--", linewidth=1, label=f"the GPU's {limit / 1e9:,.0f} GB")
    axes.set(xlabel="GB on the fullest rank")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    drawing.legend(ncols=6, frameon=False, loc="outside lower center")
    drawing.savefig(folder / "memory.png")
    return [folder / "memory.png"]


def plotted(plot, folder, *args, file=None):
    """plot(folder, *args), or one line that says what is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        print("scaling.py: figures need matplotlib: pip install matplotlib; text has the same", file=sys.stderr)
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        print("drawn      " + ", ".join(map(str, plot(Path(folder), *args))), file=file)
    except OSError as error:
        raise BadInput(f"plot must be a folder that can be written, got {folder}: {error.strerror}") from None


def bars(rows: dict, limit: float, width: int = 80) -> str:
    """{name: bytes by part} as lines of the parts' letters; | is the GPU's memory."""
    scale, lines = width / max(limit, *(sum(row.values()) for row in rows.values())), []
    for name, row in rows.items():
        edges = [round(x * scale) for x in itertools.accumulate(row.values(), initial=0)]
        line = "".join(part[0].upper() * (b - a) for part, (a, b) in zip(row, itertools.pairwise(edges), strict=True))
        at, line = round(limit * scale), line.ljust(width + 1)
        lines.append(f"{name:<10} {line[:at]}|{line[at:]}{sum(row.values()) / 1e9:>9,.1f} GB")
    return "\n".join([*lines, f"{'':<10} Parameters, Gradients, States, Activations, Buffers, | {limit / 1e9:,.0f} GB"])


# ---- the command line ------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def __init__(self, name, description):
        super().__init__(prog=f"scaling.py {name}", allow_abbrev=False, description=description)

    def error(self, message):
        what, _, rest = message.partition(": ")
        if what == "unrecognized arguments":
            name = rest.split()[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            raise BadInput(f"{name} is no argument" + (f"; the nearest is {near[0]}" if near else ""))
        raise BadInput(f"{what.removeprefix('argument ')} {rest}" if what.startswith("argument ") else message)


def number(low: float, high: float, whole: bool = False):
    """What reads 7e9 or 7b, from low to high."""
    def read(text: str):
        scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(text[-1:].lower())
        try:
            x = float(text[:-1]) * scale if scale else float(text)
        except ValueError:
            x = math.nan
        if not low <= x <= high or whole and x != int(x):
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * whole}number from {low:g} to {high:g}, "
                                             f"got {text!r}")
        return int(x) if whole else x
    return read


COLUMNS = {"N": "n params parameters nparams numparams numparameters modelsize modelparams modelparameters totalparams "
                "totalparameters size nonembeddingparams nonembeddingparameters",
           "D": "d tokens trainingtokens traintokens ntokens numtokens totaltokens tokensseen datasize datasetsize",
           "loss": "loss l valloss validationloss finalloss finalvalloss evalloss testloss trainloss trainingloss",
           "C": "c flops flop compute trainingflops trainingflop trainflops totalflops totalcompute"}


def read_runs(path) -> np.ndarray:
    """A CSV file of anyone's runs -> (n, 3) N, D, loss. Columns are known by many names; of N, D and C = 6 N D two will
    do. Comma, semicolon or tab; empty lines and those that begin with # are passed over."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in file if line.strip() and not line.startswith("#")]
        head, *rows = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count)) if lines[1:] else [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: must be a CSV file that can be read: {why}") from None
    if not rows:
        raise BadInput(f"{path}: must have a line of column names and a line a run, it has {len(lines)} lines")
    head = [name.strip() for name in head]
    plain = ["".join(filter(str.isalnum, name.lower())) for name in head]
    at = {name: plain.index(there[0]) for name, known in COLUMNS.items()
          if (there := [k for k in known.split() if k in plain])}
    missing = [name for name in ("N", "D") if name not in at]
    if "loss" not in at or len(missing) > ("C" in at):
        wanted = [*missing, *["loss"] * ("loss" not in at)]
        some = ", ".join(COLUMNS[wanted[0]].split()[:3])
        raise BadInput(f"{path}: no column for {' and '.join(wanted)} ({some}, ...); there are {', '.join(head)}")
    values = {}
    for name in at if missing else ("N", "D", "loss"):
        cells = [row[at[name]].strip() if at[name] < len(row) else "" for row in rows]
        for i, cell in enumerate(cells, 1):
            try:
                values.setdefault(name, []).append(float(cell))
            except ValueError:
                raise BadInput(f"{path}: {head[at[name]]} must be a number, row {i} has {cell!r}") from None
    if missing:
        with np.errstate(all="ignore"):
            values[missing[0]] = np.array(values["C"]) / (6 * np.array(values["D" if missing == ["N"] else "N"]))
    try:
        return table(values)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def fit_all(runs, name) -> dict:
    """All three approaches -> {"parametric", "isoflop", "envelope"}. What the runs cannot support is None, with the
    reason on stderr; without approach 3, BadInput."""
    results = {}
    for key, fit in (("parametric", fit_parametric), ("isoflop", fit_isoflop), ("envelope", fit_envelope)):
        try:
            results[key] = fit(runs)
        except BadInput as error:
            if key == "parametric":
                raise BadInput(f"{name}: {error}") from None
            print(f"scaling.py: {name}: {error}", file=sys.stderr)
            results[key] = None
    return results


def report(runs, results):
    """The fits as aligned text."""
    law, (N, D, loss) = results["parametric"], runs.T
    C, off = 6 * N * D, abs(loss / chinchilla_loss(N, D, law) - 1)
    rows, at = [], 10.0 ** math.ceil(math.log10(C.max()))
    print(f"runs       {len(runs)}; N {N.min():.3g} to {N.max():.3g}, D {D.min():.3g} to {D.max():.3g}, C {C.min():.3g}"
          f" to {C.max():.3g} FLOPs\n\n3 parametric   L = E + A / N^alpha + B / D^beta      95 % of resamples")
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = law["intervals"][name]
        print(f"    {name:<10} {law[name]:>12.5g}      {low:.5g} to {high:.5g}")
    print(f"    objective  {law['objective']:>12.6g}      half of the runs are within {np.median(off):.2%}, all within "
          f"{off.max():.2%}")
    if has_optimum(law, at):
        rows.append(("3 parametric", exponents(law)[0], law, compute_optimal(at, law)))
    else:
        print("    this law has no optimum: to such runs, N or D makes no difference, or the wrong one")
    for key, label in (("isoflop", "2 IsoFLOP"), ("envelope", "1 envelope")):
        if fit := results[key]:
            rows.append((label, fit["a"], fit, (fit["k_N"] * at ** fit["a"], fit["k_D"] * at ** fit["b"])))
            print(f"\n{label:<12} {'C':>10} {'N_opt':>10} {'D_opt':>10} {'D/N':>8} {'loss':>8}")
            for p in {p["N"]: p for p in fit["points"]}.values():           # where a size is best for the last time
                print(f"{'':<12} {p['C']:>10.3g} {p['N']:>10.3g} {p['D']:>10.3g} {p['D'] / p['N']:>8.3g} "
                      f"{p['loss']:>8.4f}")
    print(f"\nN_opt ~ C^a        a   95 % of resamples    and for C = {at:.0e} FLOPs")
    for label, a, fit, (N, D) in rows:
        interval = "{:.3f} to {:.3f}".format(*fit["intervals"]["a"]) if fit["intervals"] else "-"
        print(f"    {label:<12} {a:>5.3f}   {interval:<17}    N {N:.3g}, D {D:.3g}: {D / N:.3g} tokens a parameter")


def command_fit(argv):
    parser = Parser("fit", "fit the three approaches to a file of runs")
    parser.add_argument("runs", metavar="RUNS.csv", help="columns N, D, loss, or C instead of N or D")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="DIR", help="write isoflop.png and envelope.png")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs)
    results = fit_all(runs, args.runs)
    print(json.dumps(results)) if args.json else report(runs, results)
    if args.plot:
        plotted(plot_runs, args.plot, runs, results, file=sys.stderr if args.json else None)


# (n_layer, n_embd), and FLOPs a budget. One layer alone cannot look up what followed a token before, and lies above the
# curve of the others
SIZES = ((2, 16), (2, 20), (2, 24), (3, 24), (2, 32), (2, 48), (3, 48), (2, 64), (3, 64), (3, 80))
BUDGETS = (1e11, 3e11, 1e12, 3e12)
RATIOS = (4, 140)                                   # tokens a parameter: the sizes of a budget lie around its best
# head and embedding share one table of 512 rows: then N, all parameters, is what is multiplied (but for norms), and no
# choice between "total" and "non-embedding" is left to bend the curves
SWEEP = {"vocab_size": 512, "seq_len": 128, "tie_embeddings": True, "global_batch_size": 4, "eval_windows": 512}


def sweep_runs(sizes, budgets, data="stdlib") -> list[dict]:
    """What a sweep trains, cheapest first: fields of train.Config, and N, D, C."""
    plans = []
    for C, (n_layer, n_embd) in itertools.product(sorted(budgets), sizes):
        # the best learning rate falls with the width
        config = SWEEP | {"n_layer": n_layer, "n_embd": n_embd, "n_head": max(1, n_embd // 32), "lr": 0.16 / n_embd,
                          "data": data}
        shape = config | {"n_kv_head": config["n_head"], "head_dim": n_embd // config["n_head"],
                          "n_ff": 64 * math.ceil(8 * n_embd / 3 / 64)}
        N, a_step = shape_of(shape).num_params, config["global_batch_size"] * config["seq_len"]
        steps = round(C / (6 * N * a_step))
        if RATIOS[0] <= steps * a_step / N <= RATIOS[1]:
            plans.append({"N": N, "D": steps * a_step, "C": C, "name": f"C{C:.0e}-{n_layer}x{n_embd}".replace("+", ""),
                          "config": config | {"steps": steps, "warmup_steps": steps // 10}})
    return plans


def finished(folder: Path, config: dict) -> float | None:
    """Validation loss of a run that train.py has ended; None for one not begun or not ended."""
    try:
        there = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return None                                                       # or being written: train.py will see to it
    for name, value in config.items():
        if there.get(name) != value:
            raise BadInput(f"out must be a sweep of the same settings: {name} is {there.get(name)} in {folder}, not "
                           f"{value}")
    ends = [line["val_loss"] for line in lines if "val_loss" in line and line["step"] == config["steps"]]
    return ends[-1] if ends else None


def sweep(plans, out: Path, minutes: float, jobs: int) -> dict:
    """Run train.py on each plan, `jobs` at a time; after `minutes` those that run are asked to save and stop -> {name:
    loss} of finished ones. The same call goes on where the last one ended."""
    begun, running, threads = time.monotonic(), {}, str(max(1, os.cpu_count() // jobs))
    losses = {p["name"]: loss for p in plans if (loss := finished(out / p["name"], p["config"])) is not None}
    waiting = [p for p in plans if p["name"] not in losses]
    if losses:
        print(f"{len(losses)} of {len(plans)} runs were finished before", flush=True)
    try:
        while waiting or running:
            late = time.monotonic() - begun > 60 * minutes
            waiting *= not late
            # the first run prepares the corpus for all
            while waiting and len(running) < (jobs if losses else 1):
                plan = waiting.pop(0)
                flags = [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in plan["config"].items()]
                flags += ["--eval-interval=0", "--checkpoint-interval=0", "--max-new-tokens=1",
                          f"--out={out / plan['name']}"]
                process = subprocess.Popen([sys.executable, Path(__file__).with_name("train.py"), *flags], text=True,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                           env={"OMP_NUM_THREADS": threads} | os.environ)
                running[plan["name"]] = plan, process, time.monotonic()
            for name, (plan, process, start) in list(running.items()):
                if process.poll() is None:
                    if late:
                        process.send_signal(signal.SIGTERM)
                    continue
                del running[name]
                said = process.communicate()[1].strip().splitlines()
                if process.returncode not in (0, -signal.SIGTERM):
                    raise BadInput(f"{name}: train.py ended with exit code {process.returncode}: {(said or ['-'])[-1]}")
                if (loss := finished(out / name, plan["config"])) is not None:
                    losses[name], now = loss, time.monotonic()
                    print(f"{len(losses):>3}/{len(plans)}  C {plan['C']:.0e}  N {plan['N']:>9,}  D {plan['D']:>9,}  "
                          f"{plan['D'] / plan['N']:>6.1f} tokens a parameter  loss {loss:.4f}  {now - start:>4.0f} s  "
                          f"{(now - begun) / 60:>5.1f} of {minutes:g} min", flush=True)
            time.sleep(0.5 if late else 0.05)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.communicate()
    return losses


def command_sweep(argv):
    def budgets(text):
        return tuple(map(number(1e6, 1e30), text.split(",")))

    def sizes(text):
        try:
            found = tuple((int(L), int(C)) for L, C in (size.split("x") for size in text.split(",")))
        except ValueError:
            found = ((0, 0),)
        if min(map(min, found)) < 1:
            raise argparse.ArgumentTypeError(f"must be like 2x48,3x64, got {text!r}")
        return found

    parser = Parser("sweep", "train tiny models with train.py, fit all three approaches to them, draw them")
    parser.add_argument("--out", default="out/sweep", help="folder of runs, runs.csv and figures [out/sweep]")
    parser.add_argument("--minutes", type=number(1e-3, 1e6), default=20, help="the same command goes on after it [20]")
    parser.add_argument("--jobs", type=number(1, 1e3, True), default=min(8, os.cpu_count()), help="runs at a time")
    parser.add_argument("--budgets", type=budgets, default=BUDGETS, metavar="C,C", help="FLOPs [1e11,3e11,1e12,3e12]")
    parser.add_argument("--sizes", type=sizes, default=SIZES, metavar="LxC,LxC", help="n_layer x n_embd of each size")
    parser.add_argument("--data", default="stdlib", help="as train.py's [this Python's library]")
    args = parser.parse_args(argv)
    plans = sweep_runs(args.sizes, args.budgets, args.data)
    if not plans:
        raise BadInput(f"budgets must leave one of --sizes {RATIOS[0]} to {RATIOS[1]} tokens a parameter, got "
                       f"{', '.join(f'{c:g}' for c in args.budgets)}")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"out must be a folder that can be written, got {out}: {error.strerror}") from None
    print(f"{len(plans)} runs, {len(args.budgets)} budgets, {len(args.sizes)} sizes, {sum(p['C'] for p in plans):.1e} "
          f"FLOPs, {args.jobs} at a time", flush=True)
    losses = sweep(plans, out, args.minutes, args.jobs)
    done, path, sizes = [p for p in plans if p["name"] in losses], out / "runs.csv", sorted({p["N"] for p in plans})
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("N", "D", "loss", "budget"),
                                    *((p["N"], p["D"], losses[p["name"]], p["C"]) for p in done)])
    print(f"\n{len(done)} runs in {path}; loss by budget and size N, the best of each *\n{'':>10}"
          + "".join(f"{N:>10,}" for N in sizes))
    for C, row in itertools.groupby(done, lambda p: p["C"]):
        row = {p["N"]: losses[p["name"]] for p in row}
        print(f"{C:>10.0e}" + "".join(f"{f'{row[N]:.4f}' + ' *'[row[N] == min(row.values())] if N in row else '-':>10}"
                                      for N in sizes))
    if len(done) < len(plans):
        print(f"{len(plans) - len(done)} runs are left; the same command goes on")
    runs = read_runs(path)
    results = fit_all(runs, str(path))
    print()
    report(runs, results)
    plotted(plot_runs, out, runs, results)


# what may be asked: lowest, highest, meaning; first whole numbers
WHOLE = {"n_gpus": (1, 1e6, "GPUs"), "global_batch_size": (1, 1e7, "sequences a step"),
         "seq_len": (1, 1e7, "tokens a sequence"), "dp": (1, 1e6, "data-parallel ranks"),
         "tp": (1, 1e6, "tensor-parallel ranks"), "pp": (1, 1e6, "stages"), "pp_chunks": (1, 1e3, "stages a rank"),
         "micro_batch_size": (1, 1e6, "sequences a pass"), "top": (1, 1e3, "layouts shown [5]")}
ASKED = {"params": (5e5, 1e14, "parameters of a Llama: 7e9 or 7b"),
         "tokens": (1e3, 1e18, "tokens to train on: 2e12 or 2t"), "days": (1e-3, 1e4, "how long"),
         "dollars": (1e-2, 1e12, "what it may cost"),
         "budget_flops": (1e12, 1e30, "FLOPs of the run"), "price": (1e-3, 1e4, "dollars a GPU-hour"),
         "watts": (1, 1e5, "of a GPU"), "pue": (1, 5, f"power of the building / of its GPUs [{PUE}]"),
         "grid": (1e-3, 5, f"kg CO2 a kWh [{GRID}]"), "network": (1e-2, 1e4, "GB/s a GPU between nodes")}


def ask(argv):
    """The command line, checked."""
    parser = Parser("plan", "The best layouts of a training run. One of parameters, tokens, GPUs and time may be left "
                    "out, and is solved for; with GPUs alone: the largest model that fits.")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    for name, (low, high, text) in (ASKED | WHOLE).items():
        parser.add_argument("--" + name.replace("_", "-"), type=number(low, high, name in WHOLE), help=text)
    parser.add_argument("--config", help="a config of train.py, in the place of --params")
    parser.add_argument("--zero", type=int, choices=range(4))
    parser.add_argument("--recompute", choices=("none", "selective", "full"))
    parser.add_argument("--pp-schedule", choices=("gpipe", "1f1b", "interleaved", "zb"))
    parser.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction)
    parser.add_argument("--precision", choices=tuple(PRECISIONS))
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--plot", metavar="DIR", help="memory by part and ZeRO stage, as a PNG")
    got = parser.parse_args(argv)
    for *others, name in (("params", "config"), ("params", "tokens", "budget_flops"), ("days", "n_gpus", "dollars"),
                          ("config", "tokens", "budget_flops"), ("n_gpus", "days", "budget_flops"),
                          ("n_gpus", "dollars", "budget_flops")):
        if all(getattr(got, x) for x in (*others, name)):
            raise BadInput(f"{name} must be left out where {' and '.join(others)} say it")
    return got


def read_config(name: str) -> dict:
    """The named config as train.py parses it, in a process of its own (its --dry-run --json times matrices first)."""
    code = ("import dataclasses, json, sys, train\n"
            "try: print(json.dumps(dataclasses.asdict(train.parse_config(sys.argv[1:]))))\n"
            "except train.BadInput as error: sys.exit(str(error))")
    if not Path(__file__).with_name("train.py").exists():
        raise BadInput("config needs train.py beside scaling.py, there is none")
    done = subprocess.run([sys.executable, "-c", code, "--config", name], cwd=Path(__file__).parent, text=True,
                          capture_output=True)
    if done.returncode:
        raise BadInput((done.stderr.strip().splitlines() or ["config: train.py did not answer"])[-1])
    return json.loads(done.stdout)


def settle(got, on: GPU, options: dict):
    """Solve for what is left out -> (what that is, model, tokens, GPUs)."""
    T, tokens, n, model, config = got.seq_len or 4096, got.tokens, got.n_gpus, None, {}
    if got.config:
        config = read_config(got.config)
        options["global_batch_size"] = options["global_batch_size"] or config["global_batch_size"]
        model = shape_of(config | ({"seq_len": T} if got.seq_len else {}))
    elif got.params:
        model = shape_for(got.params, T)
    if got.dollars and not on.price:
        raise BadInput(f"dollars needs --price: none is known for {got.gpu}")
    gpu_seconds = got.dollars and got.dollars / on.price * 3600
    if got.days and gpu_seconds:
        n = max(1, int(gpu_seconds / got.days / 86400))
        n -= n % on.node if n > on.node else 0
    seconds = got.days * 86400 if got.days else gpu_seconds / n if gpu_seconds and n else None
    if not n and not seconds:
        raise BadInput("n_gpus must be given, or --days to find how many")
    if n and seconds and model and tokens:
        raise BadInput("tokens must be left out where the model, the GPUs and the time are given: they say how many")

    def rate(model, n):
        return plan(model, on, n, **options)[0]["tokens_per_s"]

    def of_flops(flops):
        """The model for which so many FLOPs are `tokens`, or the best number of them."""
        N = 1e9
        for _ in range(60):
            shape = shape_for(N, T)
            N *= math.sqrt(flops / (tokens or optimal_tokens(shape.num_params)) / shape.flops_per_token())
            N = min(max(N, 1e5), 1e15)
        if abs(math.log(shape.num_params / N)) > 0.2:
            name = next(x for x in ("budget_flops", "dollars", "days") if getattr(got, x))
            raise BadInput(f"{name} must be right for a model of 4e5 to 1e15 parameters, got {getattr(got, name):g}, "
                           f"for {N:.3g}")
        return shape_for(N, T)

    found = "time"
    if got.budget_flops:
        found = "tokens" if model else "parameters" if tokens else "parameters and tokens"
        model = model or of_flops(got.budget_flops)
        tokens = tokens or got.budget_flops / model.flops_per_token()
    elif model is None and n and seconds:
        found, flops, tried = "parameters" if tokens else "parameters and tokens", 0.4 * n * on.peak * seconds, []
        for _ in range(6):                                              # the MFU hardly depends on the size
            model = of_flops(flops)
            took = (tokens or optimal_tokens(model.num_params)) / rate(model, n)
            tried, flops = [*tried, (abs(math.log(took / seconds)), model)], flops * seconds / took
        model = min(tried, key=lambda x: x[0])[1]
        tokens = tokens or seconds * rate(model, n)
    elif model is None:
        if tokens or not n:
            raise BadInput("params must be given, or both --n-gpus and --days")
        found, model = "the largest model that fits", largest(on, n, T, Software(PRECISIONS[options["precision"]]))
    elif n and seconds:
        found, tokens = "tokens", seconds * rate(model, n)
    if not tokens and config:
        tokens = config["steps"] * config["global_batch_size"] * config["seq_len"]
    tokens = tokens or optimal_tokens(model.num_params)
    if not n:
        found, least = "GPUs", tokens * model.flops_per_token() / seconds / max(on.peak, on.fp8)
        sizes = (1, 2, 4, 8, *(on.node * k * 2**i for i in range(14) for k in (2, 3)))
        for n in (x for x in sorted(sizes) if x > least):
            try:
                if tokens / rate(model, n) <= seconds:
                    break
            except BadInput:                                            # it does not fit, or does not divide
                continue
        else:
            raise BadInput(f"days must be enough for some number of GPUs up to {max(sizes):,}, got {got.days:g}")
    return found, model, tokens, n


def command_plan(argv):
    got = ask(argv)
    on = find_gpu(got.gpu)
    given = {"watts": got.watts, "network": got.network and got.network * 1e9, "price": got.price,
             "source": got.price and "as given"}
    on = replace(on, **{name: x for name, x in given.items() if x})
    options = {name: getattr(got, name) for name in ("global_batch_size", "dp", "tp", "pp", "micro_batch_size", "zero",
                                                     "recompute", "sequence_parallel")}
    options |= {"precision": got.precision or ("fp16" if before_ampere(on) else "bf16"), "schedule": got.pp_schedule,
                "chunks": got.pp_chunks}
    by, rows = Software(PRECISIONS[options["precision"]]), []
    found, model, tokens, n = settle(got, on, options)
    for e in plan(model, on, n, top=got.top or 5, **options):
        at, seconds = e["layout"], tokens / e["tokens_per_s"]
        steps = math.ceil(tokens / at.batch / model.seq_len)
        rows.append({"layout": dataclasses.asdict(at), "memory_bytes": e["memory"], "seconds_a_step": e["seconds"],
                     "bytes_sent_a_step": wire(model, at, by, 0),
                     "mfu": e["mfu"], "tflops_per_gpu": e["tflops"], "tokens_per_s": e["tokens_per_s"],
                     "days": seconds / 86400, **cost(on, n, seconds, got.pue or PUE, got.grid or GRID),
                     "command": command(model, at, options["precision"], on, steps, got.config)})
    best = Layout(**rows[0]["layout"])
    stages = by_stage(model, best, by)
    result = {"solved_for": found, "parameters": model.num_params, "tokens": tokens,
              "flops": tokens * model.flops_per_token(), "gpu": got.gpu, "n_gpus": n,
              "shape": dataclasses.asdict(model), "dollars_per_gpu_hour": on.price, "price_source": on.source,
              "layouts": rows}
    print(json.dumps(result) if got.json else
          f"{describe(result)}\n\nthe first layout's fullest rank, by ZeRO stage\n{bars(stages, on.memory)}")
    if got.plot:
        plotted(plot_memory, got.plot, stages, on.memory,
                f"Memory: {model.num_params / 1e9:.3g} B parameters on {n} x {got.gpu}, dp {best.dp}, tp {best.tp}, pp "
                f"{best.pp}", file=sys.stderr if got.json else None)


def describe(result: dict) -> str:
    """The plan as text."""
    def short(x):
        return f"{x / 1e3:,.0f}k" if x >= 1e7 else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.01 else f"{x:.1g}"

    lines = [f"run        {result['parameters'] / 1e9:,.4g} B parameters, {short(result['tokens'] / 1e9)} B tokens, "
             f"{short(result['tokens'] / result['parameters'])} a parameter, {result['flops']:.3g} FLOPs, on "
             f"{result['n_gpus']:,} x {result['gpu']}", f"solved for {result['solved_for']}", "",
             f"{'#':>3} {'dp':>4}{'tp':>3}{'pp':>4}{'zero':>5} {'recompute':<9}{'micro':>6} {'schedule':<13}{'GB':>8}"
             f"{'s a step':>9}{'MFU':>7}{'tokens/s':>11}{'days':>7}{'MWh':>8}{'t CO2':>8}{'$':>12}"]
    parts = ["", "  #   GB: parameters gradients  states activations buffers    % of a step: compute    tp    pp    dp "
             "bubble update"]
    for i, row in enumerate(result["layouts"], 1):
        at, money, step = row["layout"], row["dollars"], sum(row["seconds_a_step"].values())
        way = "-" if at["pp"] == 1 else f"{at['schedule']} {at['chunks'] if at['chunks'] > 1 else ''}"
        gb, shares = ([x / unit for x in row[name].values()] for name, unit in (("memory_bytes", 1e9),
                                                                                ("seconds_a_step", step / 100)))
        lines.append(f"{i:>3} {at['dp']:>4}{at['tp']:>3}{at['pp']:>4}{at['zero']:>5} {at['recompute']:<9}"
                     f"{at['micro_batch_size']:>6} {way:<13}{sum(gb):>8.1f}{step:>9.4g}"
                     f"{row['mfu']:>7.1%}{short(row['tokens_per_s']):>11}{short(row['days']):>7}"
                     f"{short(row['energy_mwh']):>8}{short(row['tco2']):>8}{short(money) if money else '-':>12}")
        parts.append(f"{i:>3} " + "".join(f"{x:>{w}.1f}" for x, w in zip(gb, (14, 10, 8, 12, 8), strict=True))
                     + "".join(f"{x:>{w}.1f}" for x, w in zip(shares, (24, 6, 6, 6, 7, 7), strict=True)))
    price = result["dollars_per_gpu_hour"]
    return "\n".join([*lines, *parts, "", f"price      {f'${price:.2f} a GPU-hour, ' if price else ''}"
                      f"{result['price_source']}", f"first      {result['layouts'][0]['command']}"])


COMMANDS = {"fit": command_fit, "sweep": command_sweep, "plan": command_plan}
FLAGS = {*ASKED, *WHOLE, "gpu", "config", "precision", "plot", "out", "budgets"}


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv:
            demo()
        elif argv[0] in ("-h", "--help"):
            print(__doc__)
        elif argv[0] not in COMMANDS:
            raise BadInput(f"the command must be one of {', '.join(COMMANDS)}, got {argv[0]!r}")
        else:
            COMMANDS[argv[0]](argv[1:])
        sys.stdout.flush()
        return 0
    except BadInput as error:
        first, _, rest = str(error).partition(" ")
        print(f"scaling.py: {'--' + first.replace('_', '-') if first in FLAGS else first} {rest}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scaling.py: interrupted" + "; the same command goes on" * (argv[:1] == ["sweep"]), file=sys.stderr)
        return 1
    except BrokenPipeError:                                            # | head: whom it was for has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# ---- published rows --------------------------------------------------------------------------------------------------

# Narayanan 2021, table 1: layers, width, heads, tp, pp, dp, batch, TFLOP/s a GPU with what is computed again. A100; the
# micro-batch and the chunks are not printed: the planner's best
TABLE_1 = [(24, 2304, 24, 1, 1, 32, 512, 137), (30, 3072, 32, 2, 1, 32, 512, 138), (40, 6144, 48, 8, 1, 32, 1024, 135),
           (60, 10240, 80, 8, 4, 32, 1792, 140), (96, 16384, 128, 8, 16, 15, 2160, 155),
           (128, 25600, 160, 8, 64, 6, 3072, 163)]
# table 2, 174.6 B, batch 1536: GPUs, tp, pp, ZeRO stage, micro-batch, TFLOP/s, days for 300 B tokens
TABLE_2 = [(384, 8, 12, 0, 1, 153, 84), (768, 8, 12, 0, 1, 149, 43), (1536, 8, 12, 0, 1, 141, 23),
           (384, 1, 1, 3, 4, 144, 90), (768, 1, 1, 3, 2, 88, 74), (1536, 1, 1, 3, 1, 44, 74)]
# Korthikanti 2022, tables 3 and 5, A100, tp 8: layers, width, heads, pp, batch, micro-batch, chunks; seconds of an
# iteration with full recomputation; with selective and sequence parallelism; of that MFU and HFU in %. By its formulas:
# bytes of a layer with tp alone, and as in the second run; GB of the first stage's layers
KORTHIKANTI = [(48, 6144, 64, 1, 4, 4, 1, 1.42, 1.10, 41.5, 43.7, 1.325e9, 2.139e8, 10.27),
               (105, 20480, 128, 35, 280, 1, 3, 49.05, 37.83, 56.0, 57.0, 8.808e8, 1.783e8, 18.72)]
# Rajbhandari 2020, table 1: parameters, stage, {dp: GB of model states}, which it truncates
ZERO = [(7.5e9, 1, {4: 52.5, 64: 31.4, 256: 30.4, 1024: 30.1}), (7.5e9, 2, {1: 120, 16: 21.6, 64: 16.6, 1024: 15.1}),
        (7.5e9, 3, {4: 30, 16: 7.5, 64: 1.88, 1024: 0.12}), (1.28e11, 1, {1: 2048, 16: 608, 64: 536, 1024: 513}),
        (1.28e11, 2, {16: 368, 64: 284, 256: 263, 1024: 257}), (1.28e11, 3, {16: 128, 64: 32, 256: 8, 1024: 2}),
        (1e12, 1, {16: 4750, 64: 4187, 256: 4046, 1024: 4011}), (1e12, 2, {1: 16000, 4: 5500, 256: 2054, 1024: 2013}),
        (1e12, 3, {1: 16000, 64: 250, 256: 62.5, 1024: 15.6})]
# GPU-hours on A100, MWh and t CO2: LLaMA, table 15 (which truncates MWh); Llama 2, table 2
BILLS = [("OPT-175B", 809472, 356, 137), ("LLaMA 7B", 82432, 36, 14), ("LLaMA 65B", 1022362, 449, 173),
         ("Llama 2 7B", 184320, None, 31.22), ("Llama 2 70B", 1720320, None, 291.42)]
LLAMA_8B, LLAMA_405B = (Shape(128256, 8192, L, H, 8, 128, C, F) for L, H, C, F in ((32, 32, 4096, 14336),
                                                                                 (126, 128, 16384, 53248)))
# torchtitan, docs/performance.md (3faaa1a0d), FSDP2, where "selective layer" runs every second one again: model,
# micro-batch, what runs again, MFU in %. MegaScale (arXiv:2402.15627), tables 2, 3: GPUs, batch, Megatron-LM's MFU in %
TORCHTITAN = [("Llama 3 8B", LLAMA_8B, 1, ("full", "none"), 56.8),
              ("Llama 3 70B", Shape(128256, 8192, 80, 64, 8, 128, 8192, 28672), 1, ("full",), 51.7),
              ("Llama 2 13B", Shape(32000, 4096, 40, 40, 40, 128, 5120, 13824), 2, ("full", "none"), 54.1),
              ("Llama 2 70B", Shape(32000, 4096, 80, 64, 8, 128, 8192, 28672), 2, ("full",), 50.5)]
MEGASCALE = [(256, 256, 47.7), (1024, 768, 44.7), (3072, 6144, 48.7), (6144, 6144, 47.8), (8192, 6144, 43.3),
             (12288, 6144, 41.2)]


def gpt(layers: int, width: int, heads: int) -> Shape:
    """Megatron's: vocabulary 51200, 2048 tokens."""
    return Shape(51200, 2048, layers, heads, heads, width // heads, width, 4 * width, "layernorm", "learned", "gelu",
                 bias=True, tie_embeddings=True)


def table_1(row, on: GPU, **fixed) -> list[dict]:
    """The layouts of a row's cluster; `fixed` to its tp and pp, the planner's is the rest."""
    return plan(gpt(*row[:3]), on, math.prod(row[3:6]), zero=0, recompute="full", by=MEGATRON_2021,
                sequence_parallel=False, global_batch_size=row[6], **fixed)


def rank(every: list[dict], tp: int, pp: int) -> tuple[dict, float, str]:
    """Of a plan: the best with this tp and pp; how much longer its step takes than the first's; that in words."""
    places = [(e["layout"].tp, e["layout"].pp) for e in every]
    e, first = every[places.index((tp, pp))], every[0]["layout"]
    behind = e["step"] / every[0]["step"] - 1
    return e, behind, f"{behind:.1%} behind the best of {len(set(places))}, tp {first.tp}, pp {first.pp}"


def table_1_rates(on: GPU, rows=TABLE_1) -> list[float]:
    return [table_1(x, on, tp=x[3], pp=x[4])[0]["hardware_tflops"] for x in rows]


def korthikanti(row, on: GPU) -> list[dict]:
    """With full recomputation; with selective recomputation and sequence parallelism."""
    layers, width, heads, pp, batch, b, v, *_ = row
    way = "interleaved" if v > 1 else "1f1b"
    ways = (Layout(1, 8, pp, way, v, b, batch // b, 0, *how) for how in (("full", False), ("selective", True)))
    return [estimate(gpt(layers, width, heads), on, at, MEGATRON_2022) for at in ways]


def llama_3(dp: int, on: GPU) -> float:
    """TFLOP/s a GPU of table 4: tp 8, pp 16, 2048 sequences of 8192 tokens. Their gradients are sharded and weights not
    gathered twice: stage 1, as far as time goes. What they keep, and 128 stages of 126 layers, is not train.py's."""
    ways = (Layout(dp, 8, 16, "interleaved", v, 1, 2048 // dp, 1) for v in range(2, 8))
    return max(estimate(LLAMA_405B, on, at, LLAMA_3)["tflops"] for at in ways)


def calibrate(rates, on: GPU, published: list) -> float:
    """The c with which rates(GPU) are right on average: mean log error 0."""
    def low(c):
        return sum(math.log(x / y) for x, y in zip(rates(replace(on, matmul=c)), published, strict=True)) <= 0
    return last(low, 0.3, 1.0, 1.0002)


# ---- demo ------------------------------------------------------------------------------------------------------------

def demo():
    """The claims of this file, measured | predicted or published | error, asserted. CPU, seconds."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import model as net

    torch.set_num_threads(1)

    def row(what, measured, predicted, bound=0.0):
        """bound: of the relative error; None: shown, not scored."""
        error = measured / predicted - 1 if predicted else measured                  # of what should be 0: itself
        assert predicted or measured or "without" in what, what
        print(f"{what:<82} {measured:>11,.5g} | {predicted:>11,.5g} | {error:>+7.1%}" + "  shown" * (bound is None))
        assert bound is None or abs(error) <= bound, what
        return abs(error)

    def title(text, left="measured", right="predicted"):
        print(f"\n{text:<82} {left:>11} | {right:>11} |   error")

    def ratio(best):
        return best.D / best.N

    title("counting, forward and backward of 2 x 64 tokens")
    for name, setting in (("Llama", {}), ("GPT-2", dict(norm="layernorm", position="learned", mlp="gelu", bias=True,
                                                         tie_embeddings=True))):
        config = net.ModelConfig(vocab_size=512, seq_len=64, n_layer=2, n_head=4, n_kv_head=4, head_dim=16, n_embd=64,
                                 n_ff=192, **setting)
        tokens, network, shape = torch.zeros(2, 64, dtype=torch.long), net.build(config), shape_of(config)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(tokens, tokens)[0].backward()
        row(f"{name}: parameters | Shape's", sum(p.numel() for p in network.parameters()), shape.num_params)
        row(f"{name}: FLOPs that torch counts | Shape's", counter.get_total_flops(), 128 * shape.flops_per_token())
    # Brown 2020 (arXiv:2005.14165), Table D.1, and section 2.1
    gpt3 = replace(gpt(96, 12288, 96), vocab_size=50257)
    row("GPT-3: parameters, from its sizes | published", gpt3.num_params, 175e9, 0.003)
    row("GPT-3: FLOPs a token | 6 N: attention is what is missing", gpt3.flops_per_token(), 6 * gpt3.num_params, 0.03)
    row("GPT-3 Small: 6 N D, 300 B tokens | published", 6 * 125e6 * 300e9, 2.25e20, 0.002)

    title("closed form | the best of 100,000 sizes, C = 5.76e23")
    for name, law in (("Besiroglu", BESIROGLU), ("Hoffmann", HOFFMANN)):
        best = compute_optimal(5.76e23, law)
        N, loss = best.N * np.exp(np.linspace(-3, 3, 100_001)), chinchilla_loss(*best, law)
        row(f"{name}: N_opt", best.N, N[np.argmin(chinchilla_loss(N, 5.76e23 / (6 * N), law))], 1e-4)
        row(f"{name}: FLOPs of that loss, L_opt(C) solved | C", compute_for_loss(loss, law), 5.76e23, 1e-9)
        row(f"{name}: D for which N is best | D_opt", optimal_tokens(best.N, law), best.D, 1e-9)
    for C, law, x in ((1e18, BESIROGLU, 26), (5.76e23, BESIROGLU, 18), (1e26, BESIROGLU, 16), (5.76e23, HOFFMANN, 59)):
        row(f"tokens a parameter at {C:.2e} FLOPs | on the first page", ratio(compute_optimal(C, law)), x, 0.03)

    title("laws", "recomputed", "published")
    # Hoffmann 2022, Table 3 (approach 1), Table A3 (2, 3); in A3, 175 B of approach 3 is misprinted: 1.26e24 for e25
    for k, a, rows in ((1, 0.50, ((4e8, 1.92e19, 8e9), (67e9, 5.76e23, 1.5e12), (280e9, 9.9e24, 5.9e12))),
                       (2, 0.49, ((1e10, 1.32e22, 2.195e11), (280e9, 1.18e25, 7.1e12), (1e13, 1.75e28, 2.92e14)))):
        N, C, D = np.array(rows).T
        row(f"Hoffmann approach {k}: a, from its table of optimal models | its Table 2",
            np.polyfit(np.log(C), np.log(N), 1)[0], a, 0.015)
        row(f"   Besiroglu's D/N at {C[1]:.3g} FLOPs | its", ratio(compute_optimal(C[1])), D[1] / N[1], 0.35)
    row("Hoffmann approach 3: a = beta / (alpha + beta) | its Table 2", exponents(HOFFMANN)[0], 0.46, 0.01)
    for N, C in ((4e8, 2.21e19), (175e9, 1.26e25), (1e13, 8.55e28)):
        row(f"   FLOPs for which {N:.3g} parameters are best", 6 * N * optimal_tokens(N, SARDANA), C, 0.081)
    row("Besiroglu: a", exponents(BESIROGLU)[0], 0.513, 0.001)
    best, batch = kaplan_optimal(PF_DAY), critical_batch(kaplan_loss(C_min=PF_DAY))
    row("Kaplan, one PF-day: critical batch at L(C_min) | Table 6", batch, best["B_crit"], 0.03)
    row("Kaplan, one PF-day: 6 N B S | 8.64e19", 6 * best["N"] * best["B_crit"] * best["S_min"], PF_DAY, 0.03)
    row("Kaplan: 1.5e9 parameters on 22e9 tokens, (1.5) | without end, (1.1)", kaplan_loss(1.5e9, 22e9),
        kaplan_loss(1.5e9), 0.005)
    row("McCandlish: (S/S_min - 1) (E/E_min - 1)", math.prod(x - 1 for x in batch_cost(2e6, 1e6)), 1)

    title("a planted law found again, 0.5 % of noise, every 30th run ruined")
    rng = np.random.default_rng(1)
    exact = np.array([(N, C / (6 * N), chinchilla_loss(N, C / (6 * N))) for C in np.geomspace(1e18, 1e22, 9)
                      for N in np.geomspace(3e7, 3e10, 24) if 1 / 8 < N / compute_optimal(C).N < 8])
    runs = exact * np.exp([0, 0, 0.005] * rng.standard_normal((len(exact), 1)))
    runs[::30, 2] *= 1.1
    begun = time.perf_counter()
    fits = fit_parametric(runs), fit_isoflop(runs), fit_envelope(runs)
    took, true = time.perf_counter() - begun, BESIROGLU | {"a": exponents(BESIROGLU)[0]}
    for fit, label, names, bound in zip(fits, ("3 parametric", "2 IsoFLOP", "1 envelope"), (BESIROGLU, "a", "a"),
                                        (0.3, 0.1, 0.1), strict=True):
        for name in names:
            low, high = fit["intervals"][name]
            row(f"{label}: {name}, 95 % in {low:.4g} to {high:.4g}", fit[name], true[name], bound)
            assert low <= true[name] <= high
    print(f"{'seconds, with 600 fits to resamples':<82} {took:>11.1f} |")
    worst = max(abs(x / BESIROGLU[k] - 1) for k, x in fit_parametric(exact, times=0).items() if k in BESIROGLU)
    row("without noise: largest relative error of the five constants", worst, 0, 1e-6)
    # the usual way: from a point of Hoffmann's grid, the mean Huber loss, default tolerances
    x, y, z = torch.tensor(np.log(runs)).T
    theta = torch.tensor([0.5, 5.0, 5.0, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=1000, line_search_fn="strong_wolfe")

    def huber(reduction="mean"):
        e, a, b, alpha, beta = theta
        optimizer.zero_grad()
        terms = torch.stack((e.expand(len(x)), a - alpha * x, b - beta * y))
        loss = torch.nn.functional.huber_loss(terms.logsumexp(0), z, delta=1e-3, reduction=reduction)
        loss.backward()
        return loss

    optimizer.step(huber)
    law = dict(zip(BESIROGLU, [*theta[:3].exp().tolist(), *theta[3:].tolist()], strict=True))
    off = row("L-BFGS, mean, default tolerances, where it stops: objective | optimum", huber("sum").item(),
              fits[0]["objective"], None)
    row("   tokens a parameter at 5.76e23 by where it stopped | by the optimum", ratio(compute_optimal(5.76e23, law)),
        ratio(compute_optimal(5.76e23, fits[0])), None)
    assert off > 0.1

    title("approach 2 without noise: N_opt, times the truth | its bias by fit_isoflop")
    C, lopsided = np.geomspace(1e18, 1e22, 5), HOFFMANN | {"alpha": 0.5, "beta": 0.25}
    for name, law, w in (("Hoffmann", HOFFMANN, 8), ("lopsided", lopsided, 2), ("lopsided", lopsided, 8)):
        fit = fit_isoflop(isoflop_runs(C, law, spread=w, sizes=101), times=0)
        bias = math.exp((law["alpha"] - law["beta"]) * math.log(w) ** 2 / 10)
        row(f"{name}, sizes from 1/{w} to {w} times the best",
            fit["points"][0]["N"] / compute_optimal(C[0], law).N, bias, 0.002)
        row("   and a | beta / (alpha + beta)", fit["a"], exponents(law)[0], 1e-5)
    fit = fit_isoflop(isoflop_runs(C, law, off=lambda c: (c / 1e20) ** 0.35), times=0)
    off = row("lopsided, sizes that drift, as C grows, from 0.2 to 5 times: a, too", fit["a"], exponents(law)[0], 0.1)
    assert off > 0.05

    title("why Kaplan found N_opt ~ C^0.73: Besiroglu's law, two ways to count N")
    C = np.geomspace(2e12, 3e20, 9)                                     # budgets for which 768 to 1.5e9 are best
    for what, budget, view, a, bound in (
            ("N without embeddings, 1e3 to 1.5e9 parameters: a | Kaplan", C, {"embedding": embedding_of}, 0.73, 0.08),
            ("N of all parameters, the same budgets: a | Besiroglu", C, {}, 0.513, 0.001),
            ("N without embeddings, larger budgets: a | Besiroglu", C * 1e8, {"embedding": embedding_of}, 0.513, 0.02)):
        fit = fit_isoflop(isoflop_runs(budget, spread=1.5, **view), times=0)
        row(what, fit["a"], a, bound)
        assert a < 0.7 or fit["points"][0]["N"] < 2e3 and 1e9 < fit["points"][-1]["N"] < 2e9

    title("beyond the optimum", "measured", "published")
    best = compute_optimal(1e23)
    D = tokens_for_loss(best.N / 4, chinchilla_loss(*best)) / best.D
    for what, x, formula in zip(("tokens", "FLOPs"), (D, D / 4), overtraining(1 / 4), strict=True):
        row(f"a quarter of the best size, trained to the same loss: {what}, times | formula", x, formula, 1e-9)
    # Muennighoff 2023, equation 5; Sardana 2024, abstract, section 2, figure 1
    for epochs, worth in ((4, 3.726), (16, 10.582), (1e9, 16.39)):
        row(f"repeated data: {epochs:g} epochs are worth", effective(epochs, 1, MUENNIGHOFF["R_D"]), worth, 2e-4)
    repeated, fresh = (data_constrained_loss(8.7e9, 178e9, unique) for unique in (44e9, 178e9))
    row("   8.7 B, 178 B tokens, in 4 epochs | all different: loss (\"negligible\")", repeated, fresh, 0.01)
    best = Optimum(30e9, optimal_tokens(30e9, SARDANA))
    N, D = inference_optimal(chinchilla_loss(*best, SARDANA), 1e13, SARDANA)
    row("the quality of 30 B, for 1e13 tokens of use: N", N, 13.6e9, 0.002)
    row("   training tokens beside those of 30 B", D / best.D, 2.84, 0.003)
    row("   FLOPs of training and use saved", 1 - (6 * D + 2e13) * N / ((6 * best.D + 2e13) * best.N), 0.28, 0.01)

    print(f"\n{'by Besiroglu':<15} {'N':>9} {'D':>9} {'FLOPs':>9} {'D/N':>7} {'best D/N':>8} {'N/N_opt':>8} "
          f"{'loss':>7} {'left':>7}  compute that would do")
    for name, (N, D) in MODELS.items():
        r = assess(N, D)
        print(f"{name:<15} {N:>9.3g} {D:>9.3g} {r['C']:>9.3g} {r['ratio']:>7.1f} {r['best_ratio']:>8.1f} "
              f"{r['N_over_N_opt']:>8.2f} {r['loss']:>7.4f} {r['left']:>7.4f}  {r['enough']:>6.1%}")
        assert abs(tokens_for_loss(N, r["loss"]) / D - 1) < 1e-6 and r["left"] > 0
    r, best = assess(175e9, 300e9), compute_optimal(3.15e23)                                  # the first page's numbers
    assert round(r["C"] / 1e21) == 315 and round(r["ratio"], 1) == 1.7 and round(r["enough"], 2) == 0.61
    assert round(best.N / 1e9) == 53 and round(best.D / 1e10) == 99

    title("the planner's one constant a GPU type, c", "fitted", "in GPUS")
    a100, h100 = GPUS["a100"], GPUS["h100"]
    c = calibrate(table_1_rates, a100, [x[-1] for x in TABLE_1])
    row("A100: all of Megatron's table 1", c, a100.matmul, 0.005)
    row("H100: one row of Llama 3's table 4", calibrate(lambda on: [llama_3(64, on)], h100, [430]), h100.matmul, 0.005)
    assert (round(c / 0.811, 2), round(h100.matmul / 0.803, 2)) == (0.88, 0.79)         # of the largest measured
    title("TFLOP/s a GPU, with what is computed again: Megatron 2021, table 1, fitted", "predicted", "published")
    fitted, others, behind = [], [], []
    for x in TABLE_1:
        e, late, words = rank(table_1(x, a100), *x[3:5])
        behind.append(late)
        fitted.append(row(f"{gpt(*x[:3]).num_params / 1e9:,.1f} B, tp {x[3]}, pp {x[4]}, dp {x[5]}: {words}",
                          e["hardware_tflops"], x[-1], 0.15))
    fitted.append(row("405 B, tp 8, pp 16, dp 64: Llama 3, table 4", llama_3(64, h100), 430, 0.15))
    # ranked without ZeRO and with full recomputation, as the paper ran them. For the planner too its layouts are among
    # their cluster's best, but for one: 18.4 B would rather be in a pipeline than split over tp 8
    assert sorted(behind)[3] < 0.01 and [i for i, late in enumerate(behind) if late > 0.06] == [2]
    for what, every, tp, pp in (
            ("MegaScale: 175 B, 1024 A100", plan(gpt(96, 12288, 96), a100, 1024, zero=1, recompute="selective",
                                                 by=MEGATRON_2022, global_batch_size=768), 8, 8),
            ("Llama 3: 405 B, 8192 H100", plan(LLAMA_405B, h100, 8192, zero=1, by=LLAMA_3, global_batch_size=2048),
             8, 16)):
        _, late, words = rank(every, tp, pp)
        print(f"{what}, tp {tp}, pp {pp}: {words}")
        assert late < 0.06
    title("the same, not fitted: Korthikanti 2022, table 5, from its seconds", "predicted", "published")
    for x in KORTHIKANTI:
        for what, e, seconds in zip(("full", "selective, sp"), korthikanti(x, a100), x[7:9], strict=True):
            others.append(row(f"{gpt(*x[:3]).num_params / 1e9:,.0f} B, tp 8, pp {x[3]}, {what}", e["hardware_tflops"],
                              e["hardware_tflops"] * e["step"] / seconds, 0.15))
    by_a100 = replace(h100, matmul=0.803 * c / 0.811)                 # shares of the largest product that was measured
    others.append(row("405 B, tp 8, pp 16, dp 128: Llama 3, table 4", llama_3(128, h100), 400, 0.15))
    others.append(row("   dp 64, were H100's c A100's share of the largest product", llama_3(64, by_a100), 430, 0.15))
    for n, tp, pp, stage, b, tflops, days in TABLE_2:
        # DeepSpeed's ZeRO-3 of 2021 hid far less of its messages than the network allows
        e = plan(gpt(96, 12288, 96), a100, n, tp=tp, pp=pp, zero=stage, micro_batch_size=b, recompute="full",
                 by=replace(MEGATRON_2021, overlap_dp=stage > 0), sequence_parallel=False, global_batch_size=1536)[0]
        what = f"Megatron 2021, table 2: 174.6 B, {n} GPUs, {'ZeRO-3' if stage else 'tp 8, pp 12'}"
        error = row(what, e["hardware_tflops"], tflops, None if stage else 0.15)
        if not stage:
            others.append(error)
            row(f"{what}: days", 3e11 / e["tokens_per_s"] / 86400, days, 0.10)
    e = plan(gpt(*KORTHIKANTI[1][:3]), a100, 2240, tp=8, pp=35, zero=0, recompute="full", by=MEGATRON_2021,
             sequence_parallel=False, global_batch_size=1920)[0]
    row("MT-NLG (arXiv:2201.11990): 530 B, 2240 A100", e["hardware_tflops"], 126, None)
    for name, model, b, again, mfu in TORCHTITAN:
        ways = (Layout(64, micro_batch_size=b, zero=3, recompute=x) for x in again)
        slowness = [1 / estimate(model, a100, at, LLAMA_3)["mfu"] for at in ways]
        row(f"torchtitan: {name}, 64 A100, FSDP2: MFU %", 100 * len(again) / sum(slowness), mfu, None)
    for n, batch, mfu in MEGASCALE:
        e = plan(gpt(96, 12288, 96), a100, n, tp=8, pp=8, zero=1, schedule="interleaved", recompute="selective",
                 by=MEGATRON_2022, global_batch_size=batch)[0]
        row(f"MegaScale: Megatron-LM, 175 B, {n} A100: MFU %", e["mfu"] * 100, mfu, None)
    for few, what in ((fitted, "fitted"), (others, "not fitted")):
        print(f"{len(few)} rows {what}: error {sum(few) / len(few):.1%} on average, {max(few):.1%} at most")
        assert sum(few) / len(few) < 0.08

    title("formulas and bills", "formula", "published")
    for x in KORTHIKANTI:
        model, at = gpt(*x[:3]), Layout(1, 8, x[3], micro_batch_size=x[5], sequence_parallel=False)
        alone = layer_bytes(model, at, MEGATRON_2022, "none")
        layer = layer_bytes(model, replace(at, sequence_parallel=True), MEGATRON_2022, "selective")
        row("bytes a layer keeps, tp 8", float(f"{alone:.4g}"), x[11], 1e-9)
        row("the same, sequence parallel, selective", float(f"{layer:.4g}"), x[12], 1e-9)
        row("GB of the first stage: p micro-batches of L / p layers", round(layer * x[0] / 1e9, 2), x[13], 1e-9)
        # equation 8 counts all of attention's core twice, where its forward, a third, runs again
        flops = model.flops_per_token()
        for name, f, share in (("MFU", flops, x[9]), ("HFU", flops + 12 * model.n_layer * model.q * 2048, x[10])):
            found = x[4] * 2048 * f / x[8] / 8 / x[3] / a100.peak
            row(f"{name}, % of the published seconds", found * 100, share, 0.005)
    model, worst = gpt(36, 4096, 32), (1, 1)
    for params, stage, dp, gb in ((n, z, dp, gb) for n, z, entries in ZERO for dp, gb in entries.items()):
        parts = list(memory(model, Layout(dp, zero=stage), MEGATRON_2021, 0).values())[:3]
        worst = max(worst, (sum(parts) / model.num_params * params / 1e9 / gb, gb), key=lambda x: abs(x[0] - 1))
    row("ZeRO, table 1, which truncates: the worst of all GB", math.prod(worst), worst[1], 0.025)
    for name, hours, mwh, tonnes in BILLS:
        bill = cost(a100, 1, hours * 3600)
        if mwh:
            row(f"{name}, {hours:,} GPU-hours: MWh", math.floor(bill["energy_mwh"]), mwh, 1e-9)
        row(f"{name}, {hours:,} GPU-hours: t CO2", round(bill["tco2"], 0 if mwh else 2), tonnes, 1e-9)
    bill = cost(replace(h100, price=2.0), 1, 2_664_000 * 3600)
    row("DeepSeek-V3, table 1, 2,664,000 H800-hours at $2: dollars", bill["dollars"], 5_328_000, 1e-9)
    row("the same, 180,000 hours on 2048: days for 1 T tokens", round(180_000 / 2048 / 24, 1), 3.7, 1e-9)

    print("\n7 B on 64 H100s, 1024 sequences of 4096 tokens: the best three of train.py's layouts; the first's memory")
    seven = Shape(32000, 4096, 32, 32, 32, 128, 4096, 11008)
    found, flops = plan(seven, "h100", 64, global_batch_size=1024, top=3), 1.4e11 * seven.flops_per_token()
    for e in found:
        at, gb = e["layout"], sum(e["memory"].values()) / 1e9
        print(f"dp {at.dp:>2}, tp {at.tp}, pp {at.pp}, zero {at.zero}, recompute {at.recompute:<9} {gb:5.1f} GB   "
              f"{e['step']:.2f} s   MFU {e['mfu']:.1%}")
    print(bars(by_stage(seven, found[0]["layout"], Software()), h100.memory))
    bytes_a_parameter = sum(list(memory(seven, Layout(), Software(), 0).values())[:3]) / seven.num_params
    assert round(flops / 1e21, 1) == 6.5 and round(flops / 64 / h100.peak / 3600) == 28       # the first page's numbers
    assert 0.5 < found[0]["mfu"] < 0.6 and bytes_a_parameter * 7 == 126 and round(64 * h100.peak / 1e15) == 63


if __name__ == "__main__":
    sys.exit(main())
