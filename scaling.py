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
import re
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


FITTED_FROM = 44e6          # parameters of the smallest model in Hoffmann 2022, table A9

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
    return {"C": C, "ratio": D / N, "best_ratio": best.D / best.N, "N_opt": best.N, "D_opt": best.D,
            "N_over_N_opt": N / best.N, "loss": loss,
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


def largest_that(holds, low: float, high: float, ratio=1 + 1e-14) -> float:
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
    N = largest_that(larger, smallest, compute_optimal(compute_for_loss(loss, law), law).N)
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


# ---- (4) machines ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GPU:
    """peak, fp8: dense FLOP/s of bf16 (fp16) and fp8 products. memory: bytes. bandwidth: bytes/s of HBM. link: bytes/s
    of an all-reduce inside a node; network: bytes/s per GPU between nodes. matmul: c, the share of the peak that large
    products reach. price: dollars per hour."""

    peak: float
    fp8: float
    memory: float
    bandwidth: float
    link: float
    network: float
    watts: float
    matmul: float
    price: float | None = None
    source: str = "no price known: give --price"
    node: int = 8
    fp32: float = 1 / 16                      # of the bf16 peak, by the makers' data sheets
    bf16: bool = True
    name: str = ""

    def peak_flops(self, precision: str) -> float:
        """FLOP/s that MFU is a share of: the precision's own."""
        return {"fp32": self.peak * self.fp32, "tf32": self.peak / 2, "fp8": self.fp8}.get(precision) or self.peak


def data_sheet(peak, fp8, memory, bandwidth, link, network, watts, matmul, *price, **more) -> GPU:
    """From TFLOP/s, GB, GB/s."""
    sizes = peak * 1e12, fp8 * 1e12, memory * 1e9, bandwidth * 1e9, link * 1e9, network * 1e9
    return GPU(*sizes, watts, matmul, *price, **more)


# Links: measured 235 of NVLink 3's 300 GB/s and 368 of NVLink 4's 450; of others 0.8 of the line rate (PCIe 4: 31,
# PCIe 5: 63). Network: 200 Gb/s per GPU for A100 (Narayanan 2021, section 5), 400 for H100 (Llama 3, section 3.3.1) and
# later. c: fitted for A100 and H100, where it is 0.88 and 0.79 of the largest product measured; 0.83 of that for the
# others, and of 0.78 of the peak where nobody measured
SKYPILOT, RUNPOD = "skypilot-catalog v8, undated", "RunPod secure, 2026-05-22"
GPUS = {
    "v100": data_sheet(125, 0, 32, 900, 120, 12.5, 300, 0.65, 0.79, f"Lambda, 16 GB, {SKYPILOT}", fp32=1 / 8,
                       bf16=False),
    "v100-16gb": data_sheet(125, 0, 16, 900, 120, 12.5, 300, 0.65, 0.79, f"Lambda, 16 GB, {SKYPILOT}", fp32=1 / 8,
                            bf16=False),
    "a100": data_sheet(312, 0, 80, 2000, 235, 25, 400, 0.712, 1.50, "assumed by Sardana 2024, arXiv:2401.00448"),
    "a100-40gb": data_sheet(312, 0, 40, 1555, 235, 25, 400, 0.712),
    "a100-pcie": data_sheet(312, 0, 80, 1940, 25, 25, 300, 0.67),
    "a100-pcie-40gb": data_sheet(312, 0, 40, 1555, 25, 25, 250, 0.67),
    "h100": data_sheet(989, 1979, 80, 3350, 368, 50, 700, 0.635, 2.69, RUNPOD),
    "h100-pcie": data_sheet(756, 1513, 80, 2000, 50, 50, 350, 0.65, 2.79, RUNPOD),
    "h100-nvl": data_sheet(835, 1671, 94, 3938, 50, 50, 400, 0.65),
    "h20": data_sheet(148, 296, 96, 4000, 368, 50, 400, 0.65, fp32=0.3),
    "h200": data_sheet(989, 1979, 141, 4800, 368, 50, 700, 0.635, 3.50, f"Nebius on demand, {SKYPILOT}"),
    "b200": data_sheet(2250, 4500, 180, 8000, 720, 50, 1000, 0.64, 5.50, f"Nebius, {SKYPILOT}", fp32=1 / 30),
    "b300": data_sheet(2250, 4500, 288, 8000, 720, 50, 1000, 0.65, fp32=1 / 30),
    "gb200": data_sheet(2500, 5000, 186, 8000, 720, 50, 1200, 0.61, fp32=1 / 31),
    "mi300x": data_sheet(1307.4, 2614.9, 192, 5300, 358, 50, 750, 0.50, 1.71, "TensorWave, undated", fp32=1 / 8),
    "mi325x": data_sheet(1300, 2610, 256, 6000, 358, 50, 1000, 0.50, fp32=1 / 8),
    "mi355x": data_sheet(2500, 5000, 288, 8000, 428, 50, 1400, 0.50),
    "l40s": data_sheet(362, 733, 48, 864, 25, 25, 350, 0.65, 1.55, f"Nebius, {SKYPILOT}", fp32=1 / 4),
    "l40": data_sheet(181, 362, 48, 864, 25, 25, 300, 0.65, fp32=1 / 2),
    "l4": data_sheet(121, 242.5, 24, 300, 25, 12.5, 72, 0.65, fp32=1 / 4),
    "rtx4090": data_sheet(165.2, 330.3, 24, 1008, 25, 12.5, 450, 0.65, 0.25, "Hyperbolic, skypilot-catalog v7, undated",
                   fp32=1 / 2),
    "rtx3090": data_sheet(71, 0, 24, 936, 25, 12.5, 350, 0.65, fp32=1 / 2),
    "rtx-a6000": data_sheet(154.8, 0, 48, 768, 25, 12.5, 300, 0.65, fp32=1 / 4),
    "t4": data_sheet(65, 0, 16, 320, 12.5, 12.5, 70, 0.65, fp32=1 / 8, bf16=False)}
GPUS = {name: replace(row, name=name) for name, row in GPUS.items()}
LINE = 0.8                                    # share of a network's line rate that messages reach, as in the links
NVLINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6       # seconds, of rings: NCCL's own tables, src/graph/tuning.cc
FLASH = 0.6                                   # FlashAttention-2, figure 4: 187 of A100's 312 TFLOP/s at T 2048, D 128
USABLE = 0.95                                 # of memory: the rest is CUDA's, NCCL's, and gaps
PUE, GRID = 1.1, 0.385                        # building / GPUs; kg CO2 a kWh (LLaMA, arXiv:2302.13971, section 6)
PRECISIONS = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2}                     # bytes of what is multiplied


def known_gpu(device_name: str) -> str | None:
    """The key of GPUS for a name as torch.cuda.get_device_name() and vendors print it, or None. Every word must be
    known: a maker's, a connector's, this row's memory, or of its key. A word that is left over names another card."""
    words = re.split(r"[\s-]+", device_name.strip().lower())
    words = [x for x in words if not re.fullmatch("nvidia|amd|instinct|tesla|geforce|sxm[0-9]?|oam|hbm3e?", x)]
    for key, row in GPUS.items():
        size = f"{row.memory / 1e9:.0f}gb"
        if "".join(x for x in words if x != size) == "".join(x for x in key.split("-") if x != size):
            return key
    return None


def find_gpu(name: str) -> GPU:
    """By key or by device name. Raises BadInput."""
    key = name.lower() if name.lower() in GPUS else known_gpu(name)
    if not key:
        near = difflib.get_close_matches(name.lower(), GPUS, 3, 0.3)
        raise BadInput(f"gpu must be one of {', '.join(GPUS)}, got {name!r}"
                       + (f"; the nearest: {', '.join(near)}" if near else ""))
    return GPUS[key]


# ---- (4) what a layout takes: shapes ---------------------------------------------------------------------------------

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
    ups = property(lambda self: 2 if self.mlp == "swiglu" else 1)                       # matrices C -> F: gate, up
    # a layer's matrices: q, k, v, o; the MLP's ups and its down
    block = property(lambda self: 2 * self.n_embd * (self.q + self.kv) + (self.ups + 1) * self.n_embd * self.n_ff)
    norm_vectors = property(lambda self: 2 if self.norm == "layernorm" and self.bias else 1)
    # a layer's numbers that tp does not split: norms, biases of o and down; and its biases that tp does split
    whole = property(lambda self: 2 * (self.norm_vectors + self.bias) * self.n_embd + 2 * self.qk_norm * self.head_dim)
    split_biases = property(lambda self: self.bias * (self.q + 2 * self.kv + self.ups * self.n_ff))
    tensors = property(lambda self: 2 * self.norm_vectors + (5 + self.ups) * (1 + self.bias) + 2 * self.qk_norm)
    num_params = property(lambda self: rank_params(self, Layout(), 0).count)

    def flops_per_token(self, recompute: str = "none") -> int:
        """Forward, backward, and what runs again. The full square of attention counts, as in PaLM's MFU
        (arXiv:2204.02311, appendix B)."""
        # q k^T and p v: 2 products of 2 T FLOPs per element of q, twice more in backward
        core = 4 * self.q * self.seq_len
        again = {"none": 0, "selective": core, "full": 2 * self.block + core}[recompute]
        return self.n_layer * (6 * self.block + 3 * core + again) + 6 * self.vocab_size * self.n_embd


def shape_of(config) -> Shape:
    """The Shape of a mapping or an object with ModelConfig's fields."""
    known = config if isinstance(config, dict) else {name: getattr(config, name) for name in dir(config)
                                                     if not name.startswith("_")}
    fields = dataclasses.fields(Shape)
    if missing := [f.name for f in fields if f.name not in known and f.default is dataclasses.MISSING]:
        raise BadInput(f"config must have {missing[0]}, got none")
    return Shape(**{f.name: known[f.name] for f in fields if f.name in known})


@dataclass(frozen=True)
class Layout:
    """How a step is split over ranks; names as train.py's flags. chunks: stages per rank, above 1 if interleaved."""

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

    split = property(lambda self: self.tp if self.sequence_parallel else 1)             # of norms and residuals
    ranks = property(lambda self: self.dp * self.tp * self.pp)
    batch = property(lambda self: self.dp * self.micro_batch_size * self.micro_batches)


@dataclass(frozen=True)
class Program:
    """In what training programs differ. The defaults are train.py's on a GPU. Nothing here is fitted."""

    item: int = 2                   # bytes of a number in matrix products and of a weight
    residual: int = 4               # ... in the residual stream and norms
    gradient: int = 4               # ... of a gradient
    master_weights: bool = True     # weights below 4 bytes have a float32 copy, which the optimizer updates
    flash: bool = True              # False: attention keeps two (T, T) matrices per head: softmax, and its masked copy
    dropout: bool = False           # masks of dropout are kept, a byte per number
    document_mask: bool = False     # packed documents: a (T, T) mask per sequence, shared by all layers
    fused_norm: bool = True         # False: RMSNorm keeps x / rms beside x
    chunked_loss: bool = True       # the loss keeps the gradients of its input and weight; False: the logits
    overlap_tp: bool = False        # half of backward's tp messages travel while the weights' gradients are computed
    overlap_dp: bool = True         # gradients travel during backward
    train_py: bool = True           # count the named terms below in which train.py differs from the papers' programs

    wide = property(lambda self: max(4, self.item))                                     # bytes of sums and moments
    statistic = property(lambda self: max(4, self.residual))                            # ... of a norm's 1 / rms
    # AdamW's two moments, and the master
    states = property(lambda self: 2 * self.wide + 4 * (self.master_weights and self.item < 4))
    # the sum that ends a block is not needed when the block runs again in backward; Megatron-LM makes it all the same
    skipped_sums = property(lambda self: 1 if self.train_py else 0)


MEGATRON_2021 = Program(residual=2, gradient=2, flash=False, dropout=True, chunked_loss=False, train_py=False,
                        overlap_dp=False)
MEGATRON_2022 = replace(MEGATRON_2021, overlap_tp=True)
LLAMA_3 = Program(residual=2, chunked_loss=False, train_py=False, overlap_tp=True)


@functools.cache
def depth(n_layer: int, pp: int, chunks: int) -> list[int]:
    """Layers of each pipeline rank: stage s of S begins with layer s L // S."""
    S = pp * chunks
    return [sum((s + 1) * n_layer // S - s * n_layer // S for s in range(r, S, pp)) for r in range(pp)]


class RankParams(NamedTuple):
    count: int                      # parameters of the rank
    whole: int                      # those of them that tp does not split
    tensors: int                    # in how many tensors they are


def rank_params(shape: Shape, layout: Layout, stage: int) -> RankParams:
    """Of one rank at place `stage` of its pipeline, before ZeRO."""
    layers, first, last = depth(shape.n_layer, layout.pp, layout.chunks)[stage], stage == 0, stage == layout.pp - 1
    tables = first + last - (shape.tie_embeddings and layout.pp == 1)
    learned = first and shape.position == "learned"
    whole = layers * shape.whole + (learned * shape.seq_len + last * shape.norm_vectors) * shape.n_embd
    split = layers * (shape.block + shape.split_biases) + tables * shape.vocab_size * shape.n_embd
    return RankParams(split // layout.tp + whole, whole, layers * shape.tensors + tables + learned
                      + last * shape.norm_vectors)


# ---- (4) memory ------------------------------------------------------------------------------------------------------

BUCKETS = 25e6, 10e6, 10e6                    # bytes of gradients per message, by ZeRO stage: parallel.py's, zero.py's


def layer_bytes(shape: Shape, layout: Layout, program: Program, recompute: str) -> float:
    """What a layer keeps from forward to backward, of one micro-batch on one rank: Korthikanti 2022, equations 1 to 6,
    and the same count for SwiGLU, grouped heads, RMSNorm, flash attention."""
    C, n, copies = shape.n_embd, layout.micro_batch_size * shape.seq_len, norm_copies(shape, program)
    if recompute == "full":                                                             # its input
        return n * C * program.residual / layout.split
    # two norms: input; dropout's mask; output
    whole = 2 * C * (copies * program.residual + program.dropout + program.item)
    # q, k, v, o; the MLP's ups, and for SwiGLU what silu and the product make of them
    split = (2 * shape.q + 2 * shape.kv + 2 * shape.ups * shape.n_ff) * program.item
    if shape.qk_norm:
        split += copies * (shape.q + shape.kv) * program.residual + (shape.n_head + shape.n_kv_head) * program.statistic
    if recompute == "none":
        # log sum exp per row; or softmax, dropout's mask and what that leaves, over T keys
        row = program.wide if program.flash else (2 * program.item + program.dropout) * shape.seq_len
        split += shape.n_head * row
    return n * (whole / layout.split + split / layout.tp) + uncounted_layer_bytes(shape, layout, program, recompute)


def norm_copies(shape: Shape, program: Program) -> int:
    return 2 if shape.norm == "rmsnorm" and not program.fused_norm else 1


def norm_statistics(shape: Shape, program: Program) -> int:
    """Bytes per token that train.py counts and the papers do not: 1 / rms; LayerNorm's mean and 1 / deviation."""
    return program.train_py * program.statistic * (1 if shape.norm == "rmsnorm" else 2)


def uncounted_layer_bytes(shape: Shape, layout: Layout, program: Program, recompute: str) -> float:
    """What train.py's layer keeps and the papers do not count. Each linear behind a norm casts the norm's output to low
    precision itself (tp's layers cast it once); "selective" keeps q and k as the rotation left them, before a cast."""
    if not program.train_py:
        return 0
    casts = (1 + shape.ups) * shape.n_embd * program.item * (program.item < program.residual and layout.tp == 1)
    rotated = (shape.q + shape.kv) * (program.residual - program.item)
    rotated *= recompute == "selective" and shape.position == "rope"
    return layout.micro_batch_size * shape.seq_len * ((2 * norm_statistics(shape, program) + casts) / layout.split
                                                      + rotated / layout.tp)


def end_bytes(shape: Shape, layout: Layout, program: Program) -> float:
    """What the last norm and the loss keep of a micro-batch: inputs of both and the logits in float32; a chunked loss
    has neither logits nor (but for a shard that is gathered again) its input, but the gradients of input and weight."""
    n, C, V = layout.micro_batch_size * shape.seq_len, shape.n_embd, shape.vocab_size / layout.tp
    norm = n * (C * program.residual * norm_copies(shape, program) + norm_statistics(shape, program)) / layout.split
    x = n * C * program.item / layout.split
    if program.chunked_loss:
        return norm + x * (layout.split > 1) + program.wide * (n * C + V * C)
    return norm + x + 4 * n * V


def micro_batch_bytes(shape: Shape, layout: Layout, program: Program, stage: int) -> float:
    """What the layers of a micro-batch share: train.py's cos and sin (of each chunk), or positions; a mask."""
    T = shape.seq_len
    tables = (layout.chunks * shape.head_dim * program.residual if shape.position == "rope" else 8 * (stage == 0)) * T
    return program.train_py * tables + program.document_mask * layout.micro_batch_size * T * T * program.item


def stored(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a rank holds at once; of interleaved stages, in parts."""
    p, m, v = layout.pp, layout.micro_batches, layout.chunks
    if v > 1:
        return min(m * v, (p - 1 - stage) * 2 + (v - 1) * p + 1) / v
    return m if layout.schedule == "gpipe" and p > 1 else min(m, p - stage)


def waiting_bytes(shape: Shape, layout: Layout, program: Program, stage: int) -> float:
    """Zero bubble: until a micro-batch's W, its linears' inputs and the gradients of their results wait. The last
    linear's stay until the W after, and only where an F comes between are they there when most is."""
    if layout.schedule != "zb" or layout.pp == 1:
        return 0
    n, C, F, t = layout.micro_batch_size * shape.seq_len, shape.n_embd, shape.n_ff, layout.tp
    layers, m, p = depth(shape.n_layer, layout.pp, 1)[stage], layout.micro_batches, layout.pp
    per_layer = n * program.item * (4 * C + (2 * shape.q + 2 * shape.kv + (shape.ups + 1) * F) / t)
    return (min(m, p) - stored(layout, stage)) * layers * per_layer + (m > p) * n * program.item * (C + F / t)


def buffer_bytes(shape: Shape, layout: Layout, program: Program, stage: int) -> float:
    """Gradients on their way, gathered layers, and the block that runs again."""
    psi, dp, zero = rank_params(shape, layout, stage).count, layout.dp, layout.zero
    again = layer_bytes(shape, layout, program, "none") * (layout.recompute == "full")
    if not zero:                                                    # beside the gradients those of one micro-batch
        return again + (dp > 1 and layout.micro_batches > 1) * psi * program.gradient
    # stage 3: a layer, or a table, at a time; before: a bucket
    layer = (shape.block + shape.split_biases) / layout.tp + shape.whole
    table = shape.vocab_size / layout.tp * shape.n_embd * (stage in (0, layout.pp - 1))
    bucket = max(layer, table) if zero == 3 else min(BUCKETS[zero] / program.gradient, psi)
    # one that is summed and its share; from stage 2 two more as products left them; stage 3: this layer and the next
    moving = bucket * (1 + 1 / dp) * program.gradient + (zero >= 2) * 2 * bucket * program.item
    return again + (dp > 1) * moving + (zero == 3) * 2 * bucket * program.item


def memory(shape: Shape, layout: Layout, program: Program, stage: int) -> dict:
    """Bytes of a rank at place `stage` of its pipeline: {"parameters", "gradients", "states", "activations",
    "buffers"}. (Rajbhandari 2020, figure 1; Korthikanti 2022, section 4)"""
    psi, zero, dp = rank_params(shape, layout, stage).count, layout.zero, layout.dp
    # parameters, gradients, states: those that ZeRO splits / dp
    weight, states = program.item, program.states
    if zero == 3 and program.train_py and program.master_weights:      # train.py's shards are the masters themselves
        weight, states = program.wide, 2 * program.wide
    layers, alive = depth(shape.n_layer, layout.pp, layout.chunks)[stage], stored(layout, stage)
    kept = alive * (layers * layer_bytes(shape, layout, program, layout.recompute)
                    + micro_batch_bytes(shape, layout, program, stage))
    if stage == layout.pp - 1:                                         # backward of the loss begins at once
        kept += end_bytes(shape, layout, program) * (alive if layout.schedule == "gpipe" else 1)
    return {"parameters": psi * weight / (dp if zero >= 3 else 1), "gradients": psi * program.gradient / (
        dp if zero >= 2 else 1), "states": psi * states / (dp if zero >= 1 else 1),
        "activations": kept + waiting_bytes(shape, layout, program, stage),
        "buffers": buffer_bytes(shape, layout, program, stage)}


def fullest(shape: Shape, layout: Layout, program: Program) -> dict:
    """memory() of the rank that needs most: an end of the pipeline, or the first of those with so many layers."""
    layers = depth(shape.n_layer, layout.pp, layout.chunks)
    stages = {0, layout.pp - 1, *(layers.index(x, min(1, layout.pp - 1)) for x in set(layers[1:]))}
    return max((memory(shape, layout, program, r) for r in stages), key=lambda parts: sum(parts.values()))


def fits(shape: Shape, gpu: "GPU", layout: Layout, program: Program) -> bool:
    return sum(fullest(shape, layout, program).values()) <= USABLE * gpu.memory


# ---- (4) messages ----------------------------------------------------------------------------------------------------

def layer_collectives(layout: Layout, program: Program) -> dict:
    """{pass: (all-gathers, reduce-scatters)} over tp of one layer; without sequence parallelism each two are an
    all-reduce. Forward: attention and MLP gather their input and sum their result. Backward: the adjoints, and the
    inputs are gathered again. (Korthikanti 2022, section 4.2)"""
    sp, sums = layout.sequence_parallel, 2 - program.skipped_sums
    again = (2 if sp else sums, sums) if layout.recompute == "full" else (0, 0)
    return {"forward": (2, 2), "backward": (2 + 2 * sp, 2), "again": again}


def hidden_share(layout: Layout, program: Program) -> int:
    """A rank sends 1 / this of a hidden state to the next stage: its part of the sequence. Megatron sends 1/t even
    where all tp ranks hold the whole, and gathers behind (Narayanan 2021, section 4.1)."""
    return layout.split if program.train_py else layout.tp


def messages(shape: Shape, layout: Layout, program: Program, stage: int) -> dict:
    """What a rank at place `stage` says in a step: {(axis, collective): (calls, bytes)}. bytes: the payload, all ranks'
    parts together. calls is None where buckets or chunks of the loss decide. With ZeRO, shards of ranks differ: bytes
    are their mean, without padding."""
    rank, layers = rank_params(shape, layout, stage), depth(shape.n_layer, layout.pp, layout.chunks)[stage]
    m, first, last, zero = layout.micro_batches, stage == 0, stage == layout.pp - 1, layout.zero
    n, C, table = layout.micro_batch_size * shape.seq_len, shape.n_embd, shape.vocab_size // layout.tp * shape.n_embd
    product, hidden = n * C * program.item, n * C * program.residual
    mean = program.gradient / (layout.dp if zero else 1)                  # of a gradient after ZeRO has sharded it
    found = {("world", "all_reduce"): (1, 3 * 8)}                         # loss, squared norm, please stop
    if layout.dp > 1:
        # the number of targets; which gradients there are
        counted = 8 + (4 * (rank.tensors + (layout.chunks if zero == 3 else 1)) if zero else rank.tensors)
        if zero:
            scatters, gathers = {1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[zero]
            twice = table * (zero == 3 and shape.tie_embeddings and layout.pp == 1)  # embedding and head each gather it
            found["dp", "reduce_scatter"] = None, rank.count * scatters * program.gradient
            found["dp", "all_gather"] = None, (rank.count + twice) * gathers * program.item
        found["dp", "all_reduce"] = None, counted + rank.count * program.gradient * (not zero)
    if layout.tp > 1:
        gathers, sums = (layers * sum(x) + last for x in zip(*layer_collectives(layout, program).values(), strict=True))
        gathers, sums = ((m * (x + first), m * (x * product + first * hidden)) for x in (gathers, sums))
        # of the loss: max, sum of exponentials, the target's logit; gradients of which each rank has a part
        partial = rank.whole if layout.sequence_parallel else layers * 2 * shape.qk_norm * shape.head_dim
        others = m * last * 3 * n * program.wide + partial * mean
        if layout.sequence_parallel:
            found["tp", "all_gather"], found["tp", "reduce_scatter"] = gathers, sums
        found["tp", "all_reduce"] = None, others + (0 if layout.sequence_parallel else sums[1])
    if layout.pp > 1:
        calls = m * (2 * layout.chunks - first - last)
        found["pp", "send"] = found["pp", "recv"] = calls, calls * hidden // hidden_share(layout, program)
        found["ends", "all_reduce"] = 1, table * mean * (shape.tie_embeddings and (first or last))  # a tied weight's
    return {key: counted for key, counted in found.items() if counted[1] and layout.ranks > 1}


def bytes_sent(messages: dict, layout: Layout) -> dict:
    """{axis: bytes that the rank sends in a step}, each collective as a ring of n ranks."""
    size, sent = {"world": layout.ranks, "dp": layout.dp, "tp": layout.tp, "ends": 2}, {}
    for (axis, collective), (_, payload) in messages.items():
        n = size.get(axis, 1)
        # an all-reduce is a reduce-scatter and an all-gather, each (n-1)/n
        factor = {"all_reduce": 2 * (n - 1) / n, "send": 1, "recv": 0}.get(collective, (n - 1) / n)
        sent[axis] = sent.get(axis, 0) + factor * payload
    return sent


def ring_seconds(gpu: "GPU", ranks: int, bytes: float, stride: int = 1, messages: float = 1) -> float:
    """Of an all-gather or a reduce-scatter of `bytes`, all parts together, over `ranks` ranks `stride` apart, in so
    many messages: a ring, between nodes as wide as there are ranks of it inside one."""
    inside = max(1, min(ranks, gpu.node // stride))
    nodes = math.ceil(ranks / inside)
    rate = gpu.link if nodes == 1 else min(gpu.link, inside * LINE * gpu.network)
    # (n-1)/n bytes / bandwidth + hops x latency
    hops = (ranks - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP
    return (ranks - 1) / ranks * bytes / rate + messages * hops


# ---- (4) seconds -----------------------------------------------------------------------------------------------------

def bubble(layout: Layout, forward: float, backward: float, weight: float) -> float:
    """Seconds of a step in which a pipeline rank waits; F, B, W of a micro-batch in all of a rank's layers. (Narayanan
    2021, section 2.2; zero bubble: Qi 2023, table 2 and appendix H)"""
    if layout.schedule == "zb" and layout.pp > 1:
        return (layout.pp - 1) * (forward + backward) - (min(layout.micro_batches, layout.pp) - 1) * weight
    return (layout.pp - 1) / layout.chunks * (forward + backward + weight)


def gradient_messages(layers: int, size: float, layout: Layout, program: Program) -> float:
    """In how many messages `size` bytes of gradients leave: one; train.py: one per bucket; at stage 3 one per layer."""
    if layout.zero == 3:
        return layers
    return max(1, size / BUCKETS[layout.zero]) if program.train_py else 1


def step_time(shape: Shape, gpu: "GPU", layout: Layout, program: Program, speed: float = 1.0) -> dict:
    """Seconds of a step: {"compute", "tp", "pp", "dp", "bubble", "update"}, messages as far as nothing hides them.
    speed: of the linear layers' products, relative to bf16's."""
    b, T, C, F, V, t = layout.micro_batch_size, shape.seq_len, shape.n_embd, shape.n_ff, shape.vocab_size, layout.tp
    n, m, core_speed = b * T, layout.micro_batches, min(speed, 1)

    def product(rows, columns, inner, speed=speed):
        # 2 m n k / (c peak) + bytes / HBM
        size = program.item * (rows * columns + columns * inner + rows * inner)
        return 2 * rows * columns * inner / (gpu.matmul * gpu.peak * speed) + size / gpu.bandwidth

    linear = (product(n, (shape.q + 2 * shape.kv) / t, C) + product(n, C, shape.q / t)
              + product(n, shape.ups * F / t, C) + product(n, C, F / t))
    if program.flash:
        # of 4 n T q causality hides half; backward computes q k^T again: 5 products for 2
        core, core_backward, scores = 2 * n * T * shape.q / t / (FLASH * gpu.peak * core_speed), 2.5, 0.0
    else:
        heads, D, core_backward = b * shape.n_head / t, shape.head_dim, 2
        core = heads * (product(T, T, D, core_speed) + product(T, D, T, core_speed))
        scores = heads * (2 * program.item + program.dropout) * T * T / gpu.bandwidth
    kept = layer_bytes(shape, layout, program, "none") / gpu.bandwidth
    again = {"none": 0, "selective": core + 2 * scores, "full": linear + core + 2 * kept}[layout.recompute]
    head = product(n, V / t, C) + 6 * n * V / t / gpu.bandwidth
    # tp's messages of a layer, by pass
    ring = ring_seconds(gpu, t, n * C * program.item)
    tp_forward, tp_backward, tp_again = (sum(x) * ring for x in layer_collectives(layout, program).values())
    if program.overlap_tp:
        tp_backward = tp_forward / 2

    # F, B, W of a micro-batch in the slowest stage: compute, tp's messages, messages to other stages
    layers = depth(shape.n_layer, layout.pp, layout.chunks)
    work = [layers[r] * (3 * linear + (1 + core_backward) * core + 5 * kept + again) + 3 * head * (r == layout.pp - 1)
            for r in range(layout.pp)]
    slowest = work.index(max(work))
    L, ends = layers[slowest], head * (slowest == layout.pp - 1)
    forward, weight = L * (linear + core + 2 * kept) + ends, L * linear + ends
    compute = forward, work[slowest] - forward - weight, weight
    tp = L * tp_forward, L * (tp_backward + tp_again), 0.0
    between = layout.ranks > gpu.node
    rate, delay = (LINE * gpu.network, NETWORK_HOP) if between else (gpu.link, NVLINK_HOP)
    pp = (layout.pp > 1) * layout.chunks * (n * C * program.residual / hidden_share(layout, program) / rate + delay)
    forward, backward, weight = (sum(x) for x in zip(compute, tp, (pp, pp, 0.0), strict=True))

    # gradients are summed during backward; parameters are gathered before the pass that needs them, or after the update
    psi = rank_params(shape, layout, slowest).count
    number = gradient_messages(L, psi * program.gradient, layout, program)
    scatter, gather = (ring_seconds(gpu, layout.dp, psi * size, t, number) for size in (program.gradient, program.item))

    def exposed(message, compute):
        return max(0.0, message - program.overlap_dp * compute)

    both = backward + weight
    dp = {0: exposed(2 * scatter, both), 1: exposed(scatter, both) + gather, 2: m * exposed(scatter, both) + gather,
          3: m * (exposed(scatter + gather, both) + exposed(gather, forward))}[layout.zero]
    # reads the gradient and the states, writes the states and the weight
    update = psi * (2 * program.states + program.gradient + program.item) / gpu.bandwidth / (
        layout.dp if layout.zero else 1)
    return {"compute": m * sum(compute), "tp": m * sum(tp), "pp": m * 2 * pp, "dp": dp,
            "bubble": bubble(layout, forward, backward, weight), "update": update}


def estimate(shape: Shape, gpu: "GPU", layout: Layout, program: Program = Program(), speed: float = 1.0) -> dict:
    """What a step costs: {"layout", "seconds": by part, "step": their sum, "tokens_per_s", "mfu" (of the precision's
    own peak), and per GPU "tflops", "hardware_tflops" (with what runs again)}."""
    seconds = step_time(shape, gpu, layout, program, speed)
    rate = layout.batch * shape.seq_len / sum(seconds.values())
    tflops, hardware = (rate / layout.ranks * shape.flops_per_token(x) / 1e12 for x in ("none", layout.recompute))
    return {"layout": layout, "seconds": seconds, "step": sum(seconds.values()), "tokens_per_s": rate,
            "mfu": tflops * 1e12 / (gpu.peak * speed), "tflops": tflops, "hardware_tflops": hardware}


# ---- (5) what it costs -----------------------------------------------------------------------------------------------

def cost(gpu: GPU, n_gpus: int, seconds: float, pue: float = PUE, grid: float = GRID) -> dict:
    """{"gpu_hours", "energy_mwh", "tco2", "dollars"}; at full power, as LLaMA's bill: hours x watts x PUE."""
    hours = n_gpus * seconds / 3600
    energy = hours * gpu.watts * pue / 1e6
    return {"gpu_hours": hours, "energy_mwh": energy, "tco2": energy * grid, "dollars": gpu.price and hours * gpu.price}


def bill(shape: Shape, layout: Layout, program: Program, *, tokens: float, gpu: str | GPU | None = None,
         precision: str = "bf16", rank_flops: float | None = None, pue: float = PUE, grid: float = GRID) -> dict:
    """What a run of `tokens` tokens takes, as numbers, strings, lists and dicts of them: JSON.

    parameters, embedding_parameters, tokens, tokens_per_parameter, tokens_per_step, flops_per_token, flops
    law             {"best_tokens": for this size; "N_opt", "D_opt": for these 6 N D; "loss", "left": nats that N_opt
                    and D_opt would save; "extrapolated": whether the law's own runs were larger}
    layout          the fields of Layout; layers_per_rank; bubble: share of a step, where F, B and W take equally long
    memory_bytes    of the fullest rank, by part, and "total"
    bytes_sent      {axis: bytes per step of the rank that sends most}; bytes_sent_at_zero_1: dp's, for stages 2 and 3
    gpu given       gpu (its name), seconds_per_step (by part), tokens_per_s, mfu, tflops, hardware_tflops (per GPU),
                    seconds, days, gpu_hours, energy_mwh, tco2, dollars, dollars_per_gpu_hour, price_source
    rank_flops      FLOP/s that a rank was measured to reach: seconds, days, without messages
    """
    N, flops, ranks = shape.num_params, tokens * shape.flops_per_token(), layout.ranks
    found, parts = assess(N, tokens), {name: round(x) for name, x in fullest(shape, layout, program).items()}

    def most_sent(layout):
        sent = [bytes_sent(messages(shape, layout, program, stage), layout) for stage in range(layout.pp)]
        return {axis: round(max(x.get(axis, 0) for x in sent)) for axis in sorted(set().union(*sent))}

    waits = bubble(layout, 1, 1, 1)
    answer = {"parameters": N, "embedding_parameters": shape.vocab_size * shape.n_embd, "tokens": tokens,
              "tokens_per_parameter": tokens / N, "tokens_per_step": layout.batch * shape.seq_len,
              "flops_per_token": shape.flops_per_token(), "flops": flops,
              "law": {"best_tokens": optimal_tokens(N), "N_opt": found["N_opt"], "D_opt": found["D_opt"],
                      "loss": found["loss"], "left": found["left"], "extrapolated": N < FITTED_FROM},
              "layout": dataclasses.asdict(layout), "bubble": waits / (3 * layout.micro_batches + waits),
              "layers_per_rank": depth(shape.n_layer, layout.pp, layout.chunks),
              "memory_bytes": parts | {"total": sum(parts.values())}, "bytes_sent": most_sent(layout)}
    if layout.zero > 1 and layout.micro_batches > 1 and layout.dp > 1:
        answer["bytes_sent_at_zero_1"] = most_sent(replace(layout, zero=1))["dp"]
    if gpu is not None:
        gpu = gpu if isinstance(gpu, GPU) else find_gpu(gpu)
        e = estimate(shape, gpu, layout, program, gpu.peak_flops(precision) / gpu.peak)
        seconds = tokens / e["tokens_per_s"]
        answer |= {"gpu": gpu.name, "seconds_per_step": e["seconds"], "seconds": seconds, "days": seconds / 86400}
        answer |= {name: e[name] for name in ("tokens_per_s", "mfu", "tflops", "hardware_tflops")}
        answer |= cost(gpu, ranks, seconds, pue, grid)
        answer |= {"dollars_per_gpu_hour": gpu.price, "price_source": gpu.source}
    elif rank_flops:
        seconds = flops / rank_flops / ranks / (1 - answer["bubble"])
        answer |= {"rank_flops": rank_flops, "seconds": seconds, "days": seconds / 86400}
    return answer


def short(x: float) -> str:
    """1,234,567 -> 1.23 M"""
    unit = next(((s, name) for s, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")) if x >= s), (1, ""))
    return f"{x / unit[0]:.3g}{unit[1]}" if x < 999.5e12 else f"{x:.3g}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours / 24:,.1f} days" if hours >= 24 else f"{hours}:{minutes:02d}:{seconds:02d}" if hours else
            f"{minutes}:{seconds:02d}")


def describe_bill(bill: dict) -> str:
    """A bill as aligned lines: a label, padded to 11 characters, and a sentence."""
    law, layout, ranks = bill["law"], bill["layout"], math.prod(bill["layout"][axis] for axis in ("dp", "tp", "pp"))
    unit, scale = ("GB", 1e9) if bill["memory_bytes"]["total"] > 1e9 else ("MB", 1e6)
    lines = [("run", f"{bill['parameters']:,} parameters ({bill['embedding_parameters']:,} in the embedding), "
                     f"{short(bill['tokens'])} tokens, {bill['flops']:.3g} FLOPs"),
             ("law", f"{bill['tokens_per_parameter']:.3g} tokens per parameter; best for this size: "
                     f"{law['best_tokens'] / bill['parameters']:.3g}, that is {short(law['best_tokens'])} tokens"),
             ("", f"loss {law['loss']:.3f} predicted, {law['left']:.3f} nats above the best of these 6 N D FLOPs: "
                  f"{short(law['N_opt'])} parameters, {short(law['D_opt'])} tokens")]
    if law["extrapolated"]:
        lines.append(("", f"a guess: the law was fitted to models of {short(FITTED_FROM)} parameters and more"))
    lines.append(("memory", ", ".join(f"{name} {x / scale:,.1f}" for name, x in bill["memory_bytes"].items())
                  + f" {unit} per rank, predicted"))
    if ranks > 1:
        places = itertools.product(*(range(layout[axis]) for axis in ("pp", "dp", "tp")))
        shown = ", ".join(f"{r} ({p} {d} {t})" for r, (p, d, t) in enumerate(itertools.islice(places, 6)))
        lines.append(("mesh", " x ".join(f"{axis} {layout[axis]}" for axis in ("pp", "dp", "tp")) + f": {shown}"
                      + ", ..." * (ranks > 6)))
    if layout["pp"] > 1:
        layers = ", ".join(map(str, bill["layers_per_rank"]))
        lines.append(("pipeline", f"{layout['schedule']}, {layout['micro_batches']} micro-batches, bubble "
                                  f"{bill['bubble']:.1%}; layers per rank {layers}"))
    if ranks > 1:
        sent = ", ".join(f"{axis} {x / 1e6:,.1f}" for axis, x in bill["bytes_sent"].items() if axis != "world")
        lines.append(("messages", f"{sent} MB per step, sent by a rank"))
    if "bytes_sent_at_zero_1" in bill:
        sent, once = (x / 1e6 for x in (bill["bytes_sent"]["dp"], bill["bytes_sent_at_zero_1"]))
        lines.append((f"zero {layout['zero']}", f"sends dp's {sent:,.1f} MB with every one of "
                      f"{layout['micro_batches']} micro-batches; stage 1 would send {once:,.1f} MB, once per step"))
    if "gpu" in bill:
        parts, step = bill["seconds_per_step"], sum(bill["seconds_per_step"].values())
        lines += [("time", f"about {clock(bill['seconds'])} on {ranks:,} x {bill['gpu']}, {step:.4g} s per step, "
                           f"{short(bill['tokens_per_s'])} tokens/s, MFU {bill['mfu']:.1%}"),
                  ("", ", ".join(f"{name} {x / step:.1%}" for name, x in parts.items() if x)),
                  ("cost", f"{bill['gpu_hours']:,.4g} GPU-hours, {bill['energy_mwh']:,.3g} MWh, "
                           f"{bill['tco2']:,.3g} t CO2"
                   + (f", ${bill['dollars']:,.0f} at ${bill['dollars_per_gpu_hour']:.2f} per GPU-hour"
                      if bill["dollars"] else "") + f" ({bill['price_source']})")]
    elif "seconds" in bill:
        lines.append(("time", f"about {clock(bill['seconds'])} on {ranks:,} rank{'s' * (ranks > 1)} at "
                              f"{bill['rank_flops'] / 1e9:,.0f} GFLOP/s each; messages are not counted"))
    return "\n".join(f"{label:<11}{text}" for label, text in lines)


# ---- (5) all layouts, ranked -----------------------------------------------------------------------------------------

FIELDS = tuple(f.name for f in dataclasses.fields(Layout) if f.name != "micro_batches")


def layouts(shape: Shape, gpu: GPU, n_gpus: int, batch: int, **fixed):
    """Every layout of n_gpus ranks that train.py takes, with tp inside a node and, of equals, the faster schedule;
    `fixed` fields as they are given."""
    def choices(name, *default):
        return default if fixed.get(name) is None else (fixed[name],)

    divisors = [n for n in range(1, n_gpus + 1) if n_gpus % n == 0]
    for tp, pp in itertools.product(choices("tp", *(n for n in divisors if n <= gpu.node)), choices("pp", *divisors)):
        dp = n_gpus // (tp * pp)
        schedules = [("1f1b", 1), *([("zb", 1), ("gpipe", 1)] * (pp > 1)),
                     *(("interleaved", v) for v in choices("chunks", *range(2, 9)) if v > 1 < pp)]
        schedules = [(name, v) for name, v in schedules if name in choices("schedule", "1f1b", "zb", "interleaved")
                     and v in choices("chunks", v)]
        if dp * tp * pp != n_gpus or dp not in choices("dp", dp):
            continue
        for b, (schedule, v), zero, recompute, sp in itertools.product(
                choices("micro_batch_size", 1, 2, 4, 8, 16, 32), schedules,
                choices("zero", *range(4 if dp > 1 else 1)), choices("recompute", "none", "selective", "full"),
                choices("sequence_parallel", True)):
            m = batch // (dp * b)
            split = (shape.n_head, shape.n_kv_head, shape.n_ff, shape.vocab_size, *([shape.seq_len] if sp else []))
            if (m * dp * b == batch and not any(x % tp for x in split) and pp * v <= shape.n_layer
                    and not (v > 1 and m % pp) and not (schedule == "zb" and recompute != "none")):
                yield Layout(dp, tp, pp, schedule, v, b, m, zero, recompute, sp)


def plan(config, gpu: str | GPU, n_gpus: int, *, global_batch_size: int | None = None, precision: str = "bf16",
         program: Program | None = None, tokens: float | None = None, top: int | None = None, config_name=None,
         pue: float = PUE, grid: float = GRID, **fixed) -> list[dict]:
    """The layouts of a training step that fit, fastest first, the best of each (tp, pp, zero): bills, each with
    "command", which train.py takes.

    config             a Shape, a mapping or an object with ModelConfig's fields; config_name: train.py's name of it
    gpu                a name in GPUS, or a GPU
    global_batch_size  sequences per step; default: of 4 M or half a million tokens
    precision          train.py's flag; program: another one than train.py
    tokens             of the run; default: the best number by the law
    fixed              fields of Layout that are given: tp=8, recompute="full", ...
    Raises BadInput for what cannot be; and if nothing fits: what is biggest, and the cheapest change.
    """
    shape, gpu = shape_of(config), gpu if isinstance(gpu, GPU) else find_gpu(gpu)
    if precision not in PRECISIONS:
        raise BadInput(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp8" and not gpu.fp8 or precision in ("bf16", "tf32") and not gpu.bf16:
        raise BadInput(f"precision must be one that the GPU has, got {precision}")
    if n_gpus < 1 or n_gpus != int(n_gpus):
        raise BadInput(f"n_gpus must be a whole number from 1, got {n_gpus}")
    for name in ("dp", "tp", "pp"):
        if n_gpus % (fixed.get(name) or 1):
            raise BadInput(f"{name} must divide the number of GPUs, {n_gpus}, got {fixed[name]}")
    if unknown := fixed.keys() - set(FIELDS):
        raise BadInput(f"{min(unknown)} must be a field of a layout: {', '.join(FIELDS)}")
    # 4 M tokens (Llama 2), below 1 B parameters 0.5 M (GPT-3, table 2.1), in sequences, a multiple of the GPUs
    each = n_gpus * (fixed.get("micro_batch_size") or 1)
    usual = max(1, round((2**22 if shape.num_params >= 1e9 else 2**19) / shape.seq_len / each)) * each
    batch, speed = global_batch_size or usual, gpu.peak_flops(precision) / gpu.peak
    program = program or Program(item=PRECISIONS[precision])
    possible = list(layouts(shape, gpu, n_gpus, batch, **fixed))
    if not possible:
        flags = {"schedule": "pp_schedule", "chunks": "pp_chunks"}
        given = "".join(f", --{flags.get(name, name).replace('_', '-')} {x}" for name, x in fixed.items()
                        if x is not None)
        raise BadInput(f"global_batch_size {batch} on {n_gpus} GPUs must be split evenly by some dp x tp x pp that "
                       f"train.py takes for {shape.n_head} heads ({shape.n_kv_head} of keys) and {shape.n_layer} "
                       f"layers{given}; none does")
    fitting, best = [layout for layout in possible if fits(shape, gpu, layout, program)], {}
    if not fitting:
        raise BadInput(why_not(shape, gpu, possible, program, speed))
    for e in sorted((estimate(shape, gpu, layout, program, speed) for layout in fitting), key=lambda e: e["step"]):
        best.setdefault((e["layout"].tp, e["layout"].pp, e["layout"].zero), e["layout"])
    tokens = tokens or optimal_tokens(shape.num_params)
    steps = math.ceil(tokens / batch / shape.seq_len)
    return [bill(shape, layout, program, tokens=tokens, gpu=gpu, precision=precision, pue=pue, grid=grid)
            | {"command": command(shape, layout, precision, gpu, steps, config_name)}
            for layout in list(best.values())[:top]]


def why_not(shape: Shape, gpu: GPU, possible: list, program: Program, speed: float) -> str:
    """One line: the layout that needs least, what is biggest there, and what would do: of single changes the fastest.
    """
    least = min(possible, key=lambda layout: sum(fullest(shape, layout, program).values()))
    parts, tried = fullest(shape, least, program), []
    for name, x in (*(("zero", z) for z in (1, 2, 3)), ("recompute", "selective"), ("recompute", "full"),
                    *((name, 2**i) for name in ("tp", "pp") for i in range(1, 8)), ("micro_batch_size", 1)):
        given = {field: getattr(least, field) for field in FIELDS if field != "dp"} | {name: x}
        tried += [(sum(step_time(shape, gpu, layout, program, speed).values()), f"--{name.replace('_', '-')} {x}")
                  for layout in layouts(shape, gpu, least.ranks, least.batch, **given)
                  if fits(shape, gpu, layout, program)]
    for n in () if tried else (2**i * least.ranks for i in range(1, 12)):
        if any(fits(shape, gpu, layout, program) for layout in layouts(shape, gpu, n, n, zero=3, **SMALLEST)):
            tried = [(0.0, f"{n} GPUs with --zero 3 --recompute full")]
            break
    biggest = max(parts, key=parts.get)
    return (f"does not fit: the smallest layout (dp {least.dp}, tp {least.tp}, pp {least.pp}, zero {least.zero}, "
            f"recompute {least.recompute}, micro-batch {least.micro_batch_size}) needs {sum(parts.values()) / 1e9:.1f} "
            f"of {USABLE * gpu.memory / 1e9:.1f} GB per GPU; biggest: {biggest}, {parts[biggest] / 1e9:.1f} GB; the "
            f"cheapest change: {min(tried)[1] if tried else 'none found'}")


SMALLEST = dict(recompute="full", micro_batch_size=1, schedule="1f1b")


def largest_shape(gpu: GPU, n_gpus: int, seq_len: int = 4096, program: Program = Program()) -> Shape:
    """The largest Llama whose training fits: full recomputation, micro-batches of one sequence, stage 3 or none."""
    def fitting(params):
        shape = shape_for(params, seq_len)
        return any(fits(shape, gpu, layout, program) for layout in layouts(shape, gpu, n_gpus, n_gpus, **SMALLEST)
                   if layout.zero in (0, 3))

    return shape_for(largest_that(fitting, 1e6, 1e14, 1.01), seq_len)


@functools.cache
def shape_for(params: float, seq_len: int = 4096) -> Shape:
    """A Llama of about so many parameters: heads of 128 (small ones: 64), about C / 128 layers, an MLP of about 8/3 C
    that makes up what is missing."""
    V, shapes = 32000 if params >= 3e8 else 8192 if params >= 2e7 else 2048, []
    for heads in (*range(1, 8), *range(8, 32, 4), *range(32, 513, 8)):
        C = heads * (128 if heads >= 8 else 64)
        layers = max(2, 2 * round((params - 2 * V * C) / (12 * C * C) / 2))
        n_ff = max(1, round(((params - 2 * V * C) / layers - 4 * C * C) / (3 * C) / 128)) * 128
        shape = Shape(V, seq_len, layers, heads, heads, C // heads, C, n_ff)
        off = (shape.num_params / params, 1), (C / layers / 128, 0.1), (n_ff / C * 3 / 8, 0.5)
        shapes.append((sum(weight * abs(math.log(x)) for x, weight in off), shape))
    return min(shapes, key=lambda x: x[0])[1]


def command(shape: Shape, layout: Layout, precision: str, gpu: GPU, steps=None, config=None) -> str:
    """The torchrun line. config: train.py's name of the model; without, the line holds all of its shape. --data is
    where the reader's prepared text belongs."""
    nodes = math.ceil(layout.ranks / gpu.node)
    launch = f"torchrun --nproc-per-node {min(layout.ranks, gpu.node)}"
    launch += f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500" if nodes > 1 else ""
    flags = {"config": config or ("large" if shape.num_params < 3e9 else "7b")}
    flags |= {"seq_len": shape.seq_len} if config else dataclasses.asdict(shape)
    flags |= {"steps": steps, "global_batch_size": layout.batch, "micro_batch_size": layout.micro_batch_size,
              "dp": layout.dp, "tp": layout.tp, "pp": layout.pp, "zero": layout.zero, "recompute": layout.recompute,
              "precision": precision}
    flags |= {"pp_schedule": layout.schedule} if layout.pp > 1 else {}
    flags |= {"pp_chunks": layout.chunks} if layout.chunks > 1 else {}
    flags |= {} if layout.sequence_parallel else {"sequence_parallel": False}
    flags["data"] = DATA
    words = (f"--{'no-' if x is False else ''}{name.replace('_', '-')}" + ("" if isinstance(x, bool) else f" {x}")
             for name, x in flags.items() if x is not None)
    return f"{launch} train.py {' '.join(words)}"


DATA = "data/mycorpus"                        # data.py prepares such a folder


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
WHOLE = {"n_gpus": (1, 1e6, "GPUs"), "global_batch_size": (1, 1e7, "sequences per step"),
         "seq_len": (1, 1e7, "tokens per sequence"), "dp": (1, 1e6, "data-parallel ranks"),
         "tp": (1, 1e6, "tensor-parallel ranks"), "pp": (1, 1e6, "stages"), "pp_chunks": (1, 1e3, "stages per rank"),
         "micro_batch_size": (1, 1e6, "sequences per pass"), "top": (1, 1e3, "layouts shown [5]")}
ASKED = {"params": (5e5, 1e14, "parameters of a Llama: 7e9 or 7b"),
         "tokens": (1e3, 1e18, "tokens to train on: 2e12 or 2t"), "days": (1e-3, 1e4, "how long"),
         "dollars": (1e-2, 1e12, "what it may cost"),
         "budget_flops": (1e12, 1e30, "FLOPs of the run"), "price": (1e-3, 1e4, "dollars per GPU-hour"),
         "watts": (1, 1e5, "of a GPU"), "pue": (1, 5, f"power of the building / of its GPUs [{PUE}]"),
         "grid": (1e-3, 5, f"kg CO2 per kWh [{GRID}]"), "network": (1e-2, 1e4, "GB/s per GPU between nodes")}


def ask(argv):
    """The command line, checked."""
    parser = Parser("plan", "The best layouts of a training run. One of parameters, tokens, GPUs and time may be left "
                    "out, and is solved for; with GPUs alone: the largest model that fits.")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    for name, (lowest, highest, text) in (ASKED | WHOLE).items():
        parser.add_argument("--" + name.replace("_", "-"), type=number(lowest, highest, name in WHOLE), help=text)
    parser.add_argument("--config", help="a config of train.py, in the place of --params")
    parser.add_argument("--zero", type=int, choices=range(4))
    parser.add_argument("--recompute", choices=("none", "selective", "full"))
    parser.add_argument("--pp-schedule", choices=("gpipe", "1f1b", "interleaved", "zb"))
    parser.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction)
    parser.add_argument("--precision", choices=tuple(PRECISIONS))
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked = parser.parse_args(argv)
    for *others, name in (("params", "config"), ("params", "tokens", "budget_flops"), ("days", "n_gpus", "dollars"),
                          ("config", "tokens", "budget_flops"), ("n_gpus", "days", "budget_flops"),
                          ("n_gpus", "dollars", "budget_flops")):
        if all(getattr(asked, x) for x in (*others, name)):
            raise BadInput(f"{name} must be left out where {' and '.join(others)} say it")
    return asked


def read_config(name: str) -> dict:
    """The named config as train.py parses it, in a process of its own."""
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


def settle(asked, gpu: GPU, options: dict):
    """Solve for what is left out -> (what that is, shape, tokens, GPUs)."""
    T, tokens, n, shape, config = asked.seq_len or 4096, asked.tokens, asked.n_gpus, None, {}
    if asked.config:
        config = read_config(asked.config)
        options["global_batch_size"] = options["global_batch_size"] or config["global_batch_size"]
        shape = shape_of(config | ({"seq_len": T} if asked.seq_len else {}))
    elif asked.params:
        shape = shape_for(asked.params, T)
    if asked.dollars and not gpu.price:
        raise BadInput(f"dollars needs --price: none is known for {asked.gpu}")
    gpu_seconds = asked.dollars and asked.dollars / gpu.price * 3600
    if asked.days and gpu_seconds:
        n = max(1, int(gpu_seconds / asked.days / 86400))
        n -= n % gpu.node if n > gpu.node else 0
    seconds = asked.days * 86400 if asked.days else gpu_seconds / n if gpu_seconds and n else None
    if not n and not seconds:
        raise BadInput("n_gpus must be given, or --days to find how many")
    if n and seconds and shape and tokens:
        raise BadInput("tokens must be left out where the model, the GPUs and the time are given: they say how many")

    def rate(shape, n):
        return plan(shape, gpu, n, top=1, **options)[0]["tokens_per_s"]

    def of_flops(flops):
        """The shape for which so many FLOPs are `tokens`, or the best number of them."""
        N = 1e9
        for _ in range(60):
            shape = shape_for(N, T)
            N *= math.sqrt(flops / (tokens or optimal_tokens(shape.num_params)) / shape.flops_per_token())
            N = min(max(N, 1e5), 1e15)
        if abs(math.log(shape.num_params / N)) > 0.2:
            name = next(x for x in ("budget_flops", "dollars", "days") if getattr(asked, x))
            raise BadInput(f"{name} must be right for a model of 4e5 to 1e15 parameters, got {getattr(asked, name):g}, "
                           f"for {N:.3g}")
        return shape_for(N, T)

    found = "time"
    if asked.budget_flops:
        found = "tokens" if shape else "parameters" if tokens else "parameters and tokens"
        shape = shape or of_flops(asked.budget_flops)
        tokens = tokens or asked.budget_flops / shape.flops_per_token()
    elif shape is None and n and seconds:
        found, flops, tried = "parameters" if tokens else "parameters and tokens", 0.4 * n * gpu.peak * seconds, []
        for _ in range(6):                                              # the MFU hardly depends on the size
            shape = of_flops(flops)
            took = (tokens or optimal_tokens(shape.num_params)) / rate(shape, n)
            tried, flops = [*tried, (abs(math.log(took / seconds)), shape)], flops * seconds / took
        shape = min(tried, key=lambda x: x[0])[1]
        tokens = tokens or seconds * rate(shape, n)
    elif shape is None:
        if tokens or not n:
            raise BadInput("params must be given, or both --n-gpus and --days")
        found = "the largest model that fits"
        shape = largest_shape(gpu, n, T, Program(PRECISIONS[options["precision"]]))
    elif n and seconds:
        found, tokens = "tokens", seconds * rate(shape, n)
    if not tokens and config:
        tokens = config["steps"] * config["global_batch_size"] * config["seq_len"]
    tokens = tokens or optimal_tokens(shape.num_params)
    if not n:
        found, least = "GPUs", tokens * shape.flops_per_token() / seconds / max(gpu.peak, gpu.fp8)
        sizes = (1, 2, 4, 8, *(gpu.node * k * 2**i for i in range(14) for k in (2, 3)))
        for n in (x for x in sorted(sizes) if x > least):
            try:
                if tokens / rate(shape, n) <= seconds:
                    break
            except BadInput:                                            # it does not fit, or does not divide
                continue
        else:
            raise BadInput(f"days must be enough for some number of GPUs up to {max(sizes):,}, got {asked.days:g}")
    return found, shape, tokens, n


def command_plan(argv):
    asked = ask(argv)
    gpu = find_gpu(asked.gpu)
    given = {"watts": asked.watts, "network": asked.network and asked.network * 1e9, "price": asked.price,
             "source": asked.price and "as given"}
    gpu = replace(gpu, **{name: x for name, x in given.items() if x})
    options = {name: getattr(asked, name) for name in ("global_batch_size", "dp", "tp", "pp", "micro_batch_size",
                                                       "zero", "recompute", "sequence_parallel")}
    options |= {"precision": asked.precision or ("bf16" if gpu.bf16 else "fp16"), "schedule": asked.pp_schedule,
                "chunks": asked.pp_chunks}
    found, shape, tokens, n = settle(asked, gpu, options)
    rows = plan(shape, gpu, n, top=asked.top or 5, tokens=tokens, config_name=asked.config, pue=asked.pue or PUE,
                grid=asked.grid or GRID, **options)
    result = {"solved_for": found, "parameters": shape.num_params, "tokens": tokens, "n_gpus": n,
              "flops": tokens * shape.flops_per_token(), "shape": dataclasses.asdict(shape), "layouts": rows}
    best, program = Layout(**rows[0]["layout"]), Program(item=PRECISIONS[options["precision"]])
    print(json.dumps(result) if asked.json else
          f"{describe(result)}\n\nthe first layout's fullest rank, by ZeRO stage\n"
          f"{bars(by_stage(shape, best, program), gpu.memory)}")


def by_stage(shape: Shape, layout: Layout, program: Program) -> dict:
    return {f"zero {z}": fullest(shape, replace(layout, zero=z), program) for z in range(4 if layout.dp > 1 else 1)}


def describe(result: dict) -> str:
    """The plan as text."""
    rows = result["layouts"]
    lines = [describe_bill(rows[0]), "", f"solved for {result['solved_for']}; the best layouts, the first is the above",
             "", f"{'#':>3} {'dp':>4}{'tp':>3}{'pp':>4}{'zero':>5} {'recompute':<9}{'micro':>6} {'schedule':<13}"
             f"{'GB':>7}{'s per step':>11}{'MFU':>6}{'tokens/s':>11}{'days':>8}{'MWh':>8}{'t CO2':>8}{'$':>12}"]
    parts = ["", "  #   GB: parameters gradients  states activations buffers    % of a step: compute    tp    pp    dp "
             "bubble update"]
    for i, row in enumerate(rows, 1):
        layout, money, step = row["layout"], row["dollars"], sum(row["seconds_per_step"].values())
        chunks = layout["chunks"] if layout["chunks"] > 1 else ""
        schedule = "-" if layout["pp"] == 1 else f"{layout['schedule']} {chunks}"
        *gb, total = (x / 1e9 for x in row["memory_bytes"].values())
        lines.append(f"{i:>3} {layout['dp']:>4}{layout['tp']:>3}{layout['pp']:>4}{layout['zero']:>5} "
                     f"{layout['recompute']:<9}{layout['micro_batch_size']:>6} {schedule:<13}{total:>7.1f}{step:>11.4g}"
                     f"{row['mfu']:>6.1%}{row['tokens_per_s']:>11,.0f}" + "".join(
                         f"{number:>8,.3g}" if number < 1e3 else f"{number:>8,.0f}"
                         for number in (row["days"], row["energy_mwh"], row["tco2"]))
                     + (f"{money:>12,.0f}" if money else f"{'-':>12}"))
        parts.append(f"{i:>3} " + "".join(f"{x:>{w}.1f}" for x, w in zip(gb, (14, 10, 8, 12, 8), strict=True))
                     + "".join(f"{100 * x / step:>{w}.1f}" for x, w in zip(row["seconds_per_step"].values(),
                                                                           (24, 6, 6, 6, 7, 7), strict=True)))
    return "\n".join([*lines, *parts, "", f"first      {rows[0]['command']}"])


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


# ---- demo ------------------------------------------------------------------------------------------------------------

def demo():
    """Interim."""
    print("predicted")


if __name__ == "__main__":
    sys.exit(main())
