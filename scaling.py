"""Scaling: five questions to ask before a training run, and what answers them.

(1) How good will it be? Train small models at several budgets of compute, and fit a law to their losses:

    L(N) = (N_c / N)^alpha_N,   L(D) = (D_c / D)^alpha_D            Kaplan 2020: straight lines in logs
    L(N, D) = E + A / N^alpha + B / D^beta                          Chinchilla (Hoffmann 2022)

E is the entropy of text, which nobody can predict; A / N^alpha is what a finite model misses; B / D^beta is what finite
data did not teach. Training costs C = 6 N D FLOPs: a weight is multiplied and added once forward (2), and twice
backward, for the gradients of its input and of itself (4). tests/sweep_runs.csv holds 21 runs of this repository. Three
approaches fit a law to such runs. They are numbered as in the paper; the plainest comes first:

    2  fit_isoflop     runs of one budget C: a parabola through loss(ln N); its vertex is the best size N_opt(C)
    1  fit_envelope    of all curves loss(C), one per size, the lower envelope: which size is on it at C?
    3  fit_parametric  all five constants at once, with LSE = ln sum exp and delta = 1e-3:
                       min sum_i Huber_delta(LSE(ln_E, ln_A - alpha ln N_i, ln_B - beta ln D_i) - ln L_i)

The third objective is nearly an L1 norm: outliers hardly count. It is nearly flat along valleys (A with alpha, B with
beta), where first-order methods stop early: hence centred logs, least-squares steps (`minimise`), many starts.
`holdout` hides the largest budgets from a fit and then asks the fit for them.

(2) How large, for a budget? Minimise L where 6 N D = C. At the best N and D, one percent more of either lowers L
equally:

    alpha A / N^alpha = beta B / D^beta          N_opt = G (C/6)^a,  D_opt = (C/6)^b / G
                                                 G = (alpha A / (beta B))^(1 / (alpha + beta))
                                                 a = beta / (alpha + beta),  b = alpha / (alpha + beta)

With the constants of Besiroglu 2024 (the default here) that is 26 tokens per parameter at 1e18 FLOPs, 18 at Gopher's
5.76e23, 16 at 1e26: "20 tokens per parameter". Hoffmann's constants for the same runs say 59 at Gopher's budget: their
optimizer had stopped early. Kaplan 2020 found N_opt ~ C^0.73, from small models without their embeddings (Pearce 2024).

(3) What did known models leave on the table? GPT-3 spent 3.15e23 FLOPs on 1.7 tokens per parameter. The law says that
53 billion parameters and 990 billion tokens would have cost the same and been better, and that GPT-3's own loss can be
had for 61 % of its compute. Llama 3.1 8B is a tenth of N_opt, on purpose: a model is used after its training, for 2 N
FLOPs per token. The more it is used, the smaller is the model that reaches the same loss most cheaply (Sardana 2024).

(4) What does a layout take? 7 billion parameters want 126 GB for weights, gradients and AdamW's states, and an H100 has
80. So a step is split: dp copies of tp parts of pp stages. Per rank of a `Layout`, for a `Program` (symbols: below):

    memory    parameters, gradients, states     2, 4, 12 bytes per parameter of the rank; what ZeRO splits, / dp
              activations                       stored micro-batches x layers x what a layer keeps, in Megatron:
                recompute none                  n h (10 + 24/t + 5 H T/(h t)) bytes; flash attention: ... + 4 H/(h t)
                recompute selective             n h (10 + 24/t); sequence parallelism divides the 10 by t
                recompute full                  2 n h; sequence parallelism divides it by t
              stored micro-batches, on rank r   1F1B p - r;  GPipe m;  interleaved, on the first, p (1 + (p-1)/(p v))
              buffers                           gradients on their way, gathered layers, the block that runs again
    messages  {(axis, collective): (calls, payload)}. In a ring of R ranks, an all-reduce sends 2 (R-1)/R of its
              payload; an all-gather or a reduce-scatter sends half as much
    seconds   a step       (m + (p-1)/v) x a micro-batch in the slowest stage + the update + messages that nothing hides
              product      2 x rows x columns x inner / (c peak) + bytes of all three matrices / HBM's bandwidth
              the rest     5 x what a layer keeps / HBM: forward writes and reads it; backward reads it, reads a
                           gradient and writes one
              flash        its FLOPs, without those that causality hides, at 0.6 of the peak
              message      (R-1)/R bytes / bandwidth + hops x latency

(5) What does it cost? 7 billion parameters on 140 billion tokens are 6.5e21 FLOPs; 64 H100s multiply at most 6.3e16 per
second, so 28 hours are the least, and a good program needs nearly twice that. `bill` adds up one layout: time, energy,
CO2, dollars. `plan` writes the bill of every layout and ranks them. train.py prints the same bill before it starts.

    N, D, C, L, law            parameters, training tokens, FLOPs, loss in nats per token, {"E", "A", "B", ...}
    n, h, H, T                 tokens of a micro-batch on a dp rank, n_embd, n_head, seq_len
    m, p, v, t; c              micro_batches, pp, chunks (stages per rank), tp; share of the peak that products reach

Map: the questions in their order. Then a line says that the lecture ends: what follows are names, text, the command
line, and the demo, for looking things up. Not here: context and expert parallelism, failures, reading data. Published
rows, and the planner's answer to each, are tests.

Sources: Hoffmann 2022 (arXiv:2203.15556), fitted again: Besiroglu 2024 (2404.10102); Kaplan 2020 (2001.08361); Pearce
2024 (2406.12907); Sardana 2024 (2401.00448); Narayanan 2021 (2104.04473); Korthikanti 2022 (2205.05198); ZeRO
(1910.02054); Qi 2023 (2401.10241); Llama 3 (2407.21783); FlashAttention-2 (2307.08691); GPUs, links, products:
stas00/ml-engineering (2026-08-22).

run: python scaling.py                 python scaling.py fit RUNS.csv --holdout 1
     python scaling.py plan --params 7e9 --tokens 1.4e11 --gpu h100 --n-gpus 64
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


class BadInput(ValueError):
    """One line: what (an argument, a column), the rule, the value. On the command line --what, and exit code 2."""


# ---- (1) how good will it be? ----------------------------------------------------------------------------------------

# the first law: Kaplan 2020, table 2, where N and D are fitted together. N_c non-embedding parameters, D_c tokens
KAPLAN = {"alpha_N": 0.076, "N_c": 6.4e13, "alpha_D": 0.103, "D_c": 1.8e13}


def kaplan_loss(N=math.inf, D=math.inf, law=KAPLAN):
    """L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D, nats per token (Kaplan 2020, 1.5). Without D the data are
    endless, and L = (N_c / N)^alpha_N is a straight line in logs; without N the model is: L = (D_c / D)^alpha_D."""
    return ((law["N_c"] / N) ** (law["alpha_N"] / law["alpha_D"]) + law["D_c"] / D) ** law["alpha_D"]


# L = E + A / N^alpha + B / D^beta.  Hoffmann 2022, approach 3, with the digits of the paper's TeX source (its PDF
# rounds them)
HOFFMANN = {"E": 1.693371, "A": 406.4003, "B": 410.7222, "alpha": 0.33917084, "beta": 0.2849083}
# Besiroglu 2024: the same runs read off the paper's figure, 240 of them, converged
BESIROGLU = {"E": 1.81686, "A": 482.00572, "B": 2085.4342, "alpha": 0.34781, "beta": 0.36585}
# the smallest of those runs: parameters (Hoffmann 2022, table A9); tokens (its least budget, 6e18 FLOPs, at 1 B of N)
FITTED_FROM = {"N": 44e6, "D": 1e9}


def chinchilla_loss(N, D, law=BESIROGLU):
    """L = E + A / N^alpha + B / D^beta, nats per token; N, D numbers or arrays."""
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


def distinct(x) -> int:
    """How many different values, to a millionth."""
    return len(np.unique(np.round(np.log(x), 6)))


def flops_of(runs) -> np.ndarray:
    """C of each run: the stated budget where there is one, else 6 N D."""
    return runs[:, 3] if runs.shape[1] == 4 else 6 * runs[:, 0] * runs[:, 1]


def budgets(runs) -> list[np.ndarray]:
    """The runs of each budget, by C. Where each value of C occurs three times or more, on average, the values are the
    budgets. Else the runs are sorted by C and cut where the next C is more than 1.3 times the last. If any step that is
    not cut is above 1.15, the runs are scattered: no budgets at all. A group that spans a factor of 1.5 or more is left
    out."""
    runs = runs[np.argsort(flops_of(runs), kind="stable")]
    steps, stated = np.diff(np.log(flops_of(runs))), 3 * distinct(flops_of(runs)) <= len(runs)
    cuts = steps > (1e-6 if stated else math.log(1.3))
    if not stated and (steps[~cuts] > math.log(1.15)).any():
        return []
    groups = np.split(runs, np.flatnonzero(cuts) + 1)
    return [group for group in groups if np.ptp(np.log(flops_of(group))) < math.log(1.5)]


Vertex = namedtuple("Vertex", "C N D loss curvature")


def parabola(group) -> Vertex | None:
    """The best N of one budget's runs, by a parabola through loss(ln N). None without three sizes, or where the best is
    not among them."""
    n, loss = np.log(group[:, 0]), group[:, 2]
    if distinct(group[:, 0]) < 3:
        return None
    # L = c2 x^2 + c1 x + c0 of x = n - mean; the vertex is at x = -c1 / (2 c2)
    c2, c1, c0 = np.polyfit(n - n.mean(), loss, 2)
    x = -c1 / (2 * c2) if c2 > 0 else math.inf
    if not n.min() <= n.mean() + x <= n.max():
        return None
    # D at the vertex, by a parabola too: where C is stated, 6 N D need not be C
    N, D = math.exp(n.mean() + x), math.exp(np.polyval(np.polyfit(n - n.mean(), np.log(group[:, 1]), 2), x))
    C = math.exp(np.log(flops_of(group)).mean()) if group.shape[1] == 4 else 6 * N * D
    return Vertex(C, N, D, c0 - c1 * c1 / (4 * c2), c2)


def power_law(C, N, D, loss) -> dict:
    """{"a", "b", "k_N", "k_D"}: N = k_N C^a, D = k_D C^b through points, in logs; "points"."""
    a, ln_k_N = np.polyfit(np.log(C), np.log(N), 1)
    b, ln_k_D = np.polyfit(np.log(C), np.log(D), 1)
    points = [dict(zip(("C", "N", "D", "loss"), map(float, p), strict=True)) for p in zip(C, N, D, loss, strict=True)]
    return {"a": float(a), "b": float(b), "k_N": math.exp(ln_k_N), "k_D": math.exp(ln_k_D), "points": points}


def intervals(fits: dict) -> dict:
    """{name: values of many fits} -> {name: [2.5 %, 97.5 %]}, None where an end is infinite."""
    with np.errstate(all="ignore"):
        ends = {name: np.percentile(x, (2.5, 97.5)).tolist() for name, x in fits.items()}
    return {name: x if np.isfinite(x).all() else None for name, x in ends.items()}


def bootstrap(fit, groups, times, predict=lambda fit: {}) -> dict | None:
    """Intervals of "a", "b" and of what `predict(fit)` adds, from fits to runs drawn again, with replacement, group by
    group. None if most draws support no fit."""
    rng, fits = np.random.default_rng(0), []
    for _ in range(times):
        try:
            fits.append(fit([g[rng.integers(len(g), size=len(g))] for g in groups]))
        except BadInput:
            continue
    if len(fits) < max(2, times / 2):
        return None
    rows = [{"a": x["a"], "b": x["b"]} | predict(x) for x in fits]
    return intervals({name: [row[name] for row in rows] for name in rows[0]})


def fit_isoflop(runs, *, times=200, predict=lambda fit: {}) -> dict:
    """Approach 2, the plainest: {"a", "b", "k_N", "k_D": N_opt = k_N C^a, D_opt = k_D C^b, "points": the vertices of
    the budgets' parabolas, "budgets": how many there are, "without_budget": runs that belong to none, "intervals"}.

    It is biased even without noise: the true curve is steeper on one side of N_opt, a parabola is not. For sizes spread
    evenly in ln N, from N_opt / w to N_opt w, ln N of the vertex is off by about (alpha - beta) ln(w)^2 / 10. That is
    the same at every budget, so k_N and k_D are wrong and a is not. But where w or the middle of the sizes drifts with
    C, a is wrong too.
    """
    def fit(groups):
        found = [vertex[:4] for vertex in map(parabola, groups) if vertex]
        if len(found) < 2:
            raise BadInput("isoflop: needs at least 2 budgets of 3 or more sizes with the best inside, got "
                           f"{len(found)} of {len(groups)} groups of equal budget")
        return power_law(*np.array(found).T)

    runs = table(runs)
    groups = [group for group in budgets(runs) if distinct(group[:, 0]) > 2]
    return fit(groups) | {"budgets": len(groups), "without_budget": len(runs) - sum(map(len, groups)),
                          "intervals": bootstrap(fit, groups, times, predict)}


def fit_envelope(runs, *, times=200) -> dict:
    """Approach 1: {"a", "b", "k_N", "k_D", "points": the envelope, "intervals"}. Each size N has a curve loss(C),
    through its runs or the points of one training curve. At each C of a grid, which size has the lowest curve?"""
    runs = table(runs)
    size, C = np.round(np.log(runs[:, 0]), 6), np.log(flops_of(runs))
    grid = np.linspace(C.min(), C.max(), 400)

    def fit(groups):
        sizes, curves, tokens = [], [], []
        for curve in groups:
            x, place = np.unique(np.log(flops_of(curve)), return_inverse=True)
            if len(x) > 1:
                sizes.append(curve[0, 0])
                # runs of the same N and C count as one, their mean; between budgets a curve is a line in logs
                D, loss = (np.bincount(place, np.log(y)) / np.bincount(place) for y in (curve[:, 1], curve[:, 2]))
                curves.append(np.interp(grid, x, loss, left=np.inf, right=np.inf))
                tokens.append(np.interp(grid, x, D))
        if len(sizes) < 3:
            raise BadInput(f"envelope: needs at least 3 values of N with runs of 2 or more budgets, got {len(sizes)}")
        curves, sizes, tokens = np.array(curves), np.array(sizes), np.array(tokens)
        # where the best is the smallest or the largest size that was tried at this C, a better one may lie beyond
        best, tried = curves.argmin(0), np.isfinite(curves)
        smallest, largest = tried.argmax(0), len(sizes) - 1 - tried[::-1].argmax(0)
        keep = (smallest < best) & (best < largest)
        if len(np.unique(best[keep])) < 2:
            raise BadInput("envelope: needs at least 2 sizes that are best where smaller and larger ones were tried, "
                           f"got {len(np.unique(best[keep]))}")
        chosen = best[keep], np.flatnonzero(keep)
        return power_law(np.exp(grid[keep]), sizes[best[keep]], np.exp(tokens[chosen]), np.exp(curves[chosen]))

    groups = [runs[size == s] for s in np.unique(size)]
    return fit(groups) | {"intervals": bootstrap(fit, groups, times)}


DELTA = 1e-3                                  # of Huber's loss, in ln L: deviations beyond 0.1 % count linearly


def residuals(theta, runs):
    """theta (S, 5) = ln_E, ln_A, ln_B, alpha, beta of S laws; runs (S, n, 3) = ln N, ln D, ln L -> r (S, n), how far
    ln L_predicted is above ln L; J (S, n, 5) = dr / dtheta."""
    ln_E, ln_A, ln_B, alpha, beta = theta.T[:, :, None]
    ln_N, ln_D, ln_L = np.moveaxis(runs, -1, 0)
    terms = np.stack(np.broadcast_arrays(ln_E, ln_A - alpha * ln_N, ln_B - beta * ln_D))
    predicted = np.logaddexp.reduce(terms)
    q_E, q_A, q_B = np.exp(terms - predicted)                           # the share of each term in the predicted loss
    return predicted - ln_L, np.stack((q_E, q_A, q_B, -q_A * ln_N, -q_B * ln_D), -1)


def huber(r):
    """r (S, n) -> (S,), the sum of r^2 / 2 up to |r| = DELTA, and of the straight line that goes on from there."""
    size = np.abs(r)
    return np.where(size <= DELTA, r * r / 2, DELTA * (size - DELTA / 2)).sum(1)


def minimise(theta, runs, iterations):
    """S laws (S, 5) of runs (S, n, 3), each improved until no step helps, or as often as `iterations` -> theta, sum of
    Huber(r).

    A parabola of curvature min(1, DELTA / |r|) touches Huber's loss at the present r and lies above it elsewhere. So
    each step solves a least-squares problem with these weights, W, damped by mu (Levenberg):

        (H + mu tr(H) I) step = J^T W r,  H = J^T W J        mu falls after a step that helped, else it rises
    """
    theta, (r, J) = theta.copy(), residuals(theta, runs)
    f, mu, active = huber(r), np.full(len(theta), 1e-2), np.arange(len(theta))
    for _ in range(iterations):
        JtW = J[active].swapaxes(1, 2) * (DELTA / np.maximum(np.abs(r[active]), DELTA))[:, None]
        H, g = JtW @ J[active], JtW @ r[active][..., None]
        damping = mu[active] * H.trace(axis1=1, axis2=2)
        theta_new = theta[active] - np.linalg.solve(H + damping[:, None, None] * np.eye(5), g)[..., 0]
        r_new, J_new = residuals(theta_new, runs[active])
        f_new = huber(r_new)
        better = f_new < f[active]
        for old, new in ((theta, theta_new), (r, r_new), (J, J_new), (f, f_new)):
            old[active[better]] = new[better]
        mu[active] = np.where(better, np.maximum(mu[active] / 5, 1e-12), 5 * mu[active])
        active = active[mu[active] < 1e4]
        if not len(active):
            break
    return theta, f


def fit_parametric(runs, *, times=200, predict=lambda law: {}) -> dict:
    """Approach 3: {"E", "A", "B", "alpha", "beta", "objective": sum of Huber(ln L_predicted - ln L), "intervals"}: a
    law for chinchilla_loss and compute_optimal. Raises BadInput.

    intervals   {"E": [2.5 %, 97.5 %] of `times` resamples, ..., "a", "b", and what predict({"E": array, ...}) adds};
                None without resamples
    """
    runs = table(runs)[:, :3]
    points = len(np.unique(np.round(np.log(runs[:, :2]), 6), axis=0))
    if points < 6:
        raise BadInput(f"needs at least 6 runs of different (N, D) for a law of 5 constants, got {points}")
    for name, term, column in (("N", "A / N^alpha", runs[:, 0]), ("D", "B / D^beta", runs[:, 1])):
        if distinct(column) < 3:
            raise BadInput(f"{name} must take at least 3 values to tell E from {term}, got {distinct(column)}")
    if np.ptp(runs[:, 2]) == 0:
        raise BadInput(f"loss must not be the same in all runs, got {runs[0, 2]:g}")
    logs = np.log(runs)
    if np.corrcoef(logs[:, 0], logs[:, 1])[0, 1] > 1 - 1e-9:
        raise BadInput("D must not be a power of N, or A / N^alpha and B / D^beta are one: vary D at the same N")
    # with ln N and ln D counted from their means, ln_A and ln_B are logs of the terms in the middle of the runs
    center = np.array((*logs[:, :2].mean(0), 0.0))

    def law_of(theta):
        """theta (..., 5), of centred logs -> the five constants, in the units of N and D."""
        ln_E, ln_A, ln_B, alpha, beta = np.moveaxis(theta, -1, 0)
        terms = np.clip((ln_E, ln_A + alpha * center[0], ln_B + beta * center[1]), -700, 700)
        return dict(zip(BESIROGLU, (*np.exp(terms), alpha, beta), strict=True))

    # starts: E a share of the lowest loss; the rest split between the terms; exponents
    lowest, middle, rates = runs[:, 2].min(), np.median(runs[:, 2]), (0.05, 0.2, 0.5, 1.0, 2.0)
    starts = np.array([(math.log(E), math.log(s * (middle - E)), math.log((1 - s) * (middle - E)), alpha, beta)
                       for E in (0.01 * lowest, 0.5 * lowest, 0.95 * lowest)
                       for s in (0.1, 0.5, 0.9) for alpha in rates for beta in rates])
    for count, iterations in ((len(starts), 60), (24, 2000)):                    # all a little, the best to the end
        starts, f = minimise(starts[:count], np.broadcast_to(logs - center, (count, *runs.shape)), iterations)
        starts, f = starts[f.argsort()], np.sort(f)
    best, ends = starts[0], None
    if times:
        drawn = np.random.default_rng(0).integers(len(runs), size=(times, len(runs)))
        laws = law_of(minimise(np.tile(best, (times, 1)), (logs - center)[drawn], 300)[0])
        a = laws["beta"] / (laws["alpha"] + laws["beta"])
        with np.errstate(all="ignore"):
            ends = intervals(laws | {"a": a, "b": 1 - a} | predict(laws))
    return {name: float(x) for name, x in law_of(best).items()} | {"objective": float(f[0]), "intervals": ends}


def holdout(runs, k: int, *, times=200) -> dict:
    """Fit without the k largest budgets, then look at them: {"fitted_to": C of the largest that was fitted, "rows":
    [{"C", "ahead": C / fitted_to, "loss", "N_opt": {"measured", "predicted", "interval"}}]}. Measured is the vertex of
    the budget's parabola; the loss is predicted by approach 3, N_opt by approach 2."""
    groups = budgets(table(runs))
    if not 1 <= k <= len(groups) - 2:
        raise BadInput(f"holdout must leave 2 budgets or more to fit, got {k} of {len(groups)}")
    goals, known = [vertex for vertex in map(parabola, groups[-k:]) if vertex], np.concatenate(groups[:-k])
    if not goals:
        raise BadInput("holdout must be of budgets with 3 or more sizes and the best inside, got none")

    def losses(law):
        return {v.C: chinchilla_loss(*compute_optimal(6 * v.N * v.D, law), law) for v in goals}

    def sizes(fit):
        return {v.C: fit["k_N"] * v.C ** fit["a"] for v in goals}

    law = fit_parametric(known, times=times, predict=losses)
    if not has_optimum(law, goals[-1].C):
        raise BadInput("holdout must leave runs to which N and D make a difference: the fitted law has no optimum")
    isoflop, largest = fit_isoflop(known, times=times, predict=sizes), flops_of(groups[-k - 1]).mean()

    rows = [{"C": v.C, "ahead": v.C / largest} for v in goals]
    for row, v in zip(rows, goals, strict=True):
        for name, measured, fit, predict in (("loss", v.loss, law, losses), ("N_opt", v.N, isoflop, sizes)):
            row[name] = {"measured": measured, "predicted": predict(fit)[v.C],
                         "interval": (fit["intervals"] or {}).get(v.C)}
    return {"fitted_to": largest, "rows": rows}


# ---- (2) how large, for a budget? ------------------------------------------------------------------------------------

Optimum = namedtuple("Optimum", "N D")


def exponents(law) -> tuple:
    """(a, G): N_opt = G (C/6)^a."""
    a = law["beta"] / (law["alpha"] + law["beta"])
    return a, (law["alpha"] * law["A"] / (law["beta"] * law["B"])) ** (1 / (law["alpha"] + law["beta"]))


def compute_optimal(C, law=BESIROGLU) -> Optimum:
    """(N, D) of least loss among those with 6 N D = C FLOPs. (Hoffmann 2022, equation 4)"""
    a, G = exponents(law)
    N = G * (C / 6) ** a
    return Optimum(N, C / (6 * N))


def has_optimum(law, C) -> bool:
    """Whether a fitted law has a best N and D for C FLOPs. A law of noise may have none, or none that is a number."""
    try:
        return min(law["alpha"], law["beta"]) > 0 and all(1e-99 < x < 1e99 for x in compute_optimal(C, law))
    except (OverflowError, ZeroDivisionError):
        return False


def optimal_tokens(N, law=BESIROGLU) -> float:
    """D of the budget for which N parameters are best: N = G (C/6)^a solved for C / (6 N)."""
    a, G = exponents(law)
    return (N / G) ** (1 / a) / N


# ---- (3) what did known models leave on the table? -------------------------------------------------------------------

# parameters, training tokens: Brown 2020 (arXiv:2005.14165); Rae 2021 (2112.11446); Hoffmann 2022; Touvron 2023
# (2302.13971, 2307.09288); Grattafiori 2024 (2407.21783) and the Llama 3.1 model card
MODELS = {"GPT-3 175B": (175e9, 300e9), "Gopher 280B": (280e9, 300e9), "Chinchilla 70B": (70e9, 1.4e12),
          "LLaMA 7B": (6.7e9, 1e12), "LLaMA 65B": (65.2e9, 1.4e12), "Llama 2 7B": (6.7384e9, 2e12),
          "Llama 2 70B": (68.977e9, 2e12), "Llama 3.1 8B": (8.0303e9, 15e12), "Llama 3.1 405B": (405.85e9, 15.6e12)}


def compute_for_loss(loss, law=BESIROGLU):
    """FLOPs that reach a loss if N and D are chosen best. Infinite at E and below.

        L_opt(C) = E + (A G^-alpha + B G^beta) (C/6)^(-alpha a)
    """
    a, G = exponents(law)
    K = law["A"] * G ** -law["alpha"] + law["B"] * G ** law["beta"]
    return 6 * (K / (loss - law["E"])) ** (1 / (law["alpha"] * a)) if loss > law["E"] else math.inf


def assess(N, D, law=BESIROGLU) -> dict:
    """How far a run is from the best of its budget, by a law: tokens per parameter, N / N_opt, loss, loss left on the
    table, and the share of its compute that would have been enough for its loss."""
    C, loss = 6 * N * D, chinchilla_loss(N, D, law)
    best = compute_optimal(C, law)
    return {"C": C, "ratio": D / N, "best_ratio": best.D / best.N, "N_opt": best.N, "D_opt": best.D,
            "N_over_N_opt": N / best.N, "loss": loss, "left": max(0.0, loss - chinchilla_loss(*best, law)),
            "enough": compute_for_loss(loss, law) / C}


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
    ups = property(lambda self: 2 if self.mlp == "swiglu" else 1)                       # n_embd -> n_ff: gate, up
    # a layer's matrices: q, k, v, o; the MLP's ups and its down
    block = property(lambda self: 2 * self.n_embd * (self.q + self.kv) + (self.ups + 1) * self.n_embd * self.n_ff)
    norm_vectors = property(lambda self: 2 if self.norm == "layernorm" and self.bias else 1)
    # a layer's parameters that every tp rank has whole: norms, biases of o and down. tp splits the other biases
    whole = property(lambda self: 2 * (self.norm_vectors + self.bias) * self.n_embd + 2 * self.qk_norm * self.head_dim)
    split_biases = property(lambda self: self.bias * (self.q + 2 * self.kv + self.ups * self.n_ff))
    num_params = property(lambda self: rank_params(self, Layout(), 0).count)

    def flops_per_token(self, recompute: str = "none") -> int:
        """Forward, backward, and what runs again. The full square of attention counts, as in PaLM's MFU
        (arXiv:2204.02311, appendix B)."""
        # q k^T and p v: 2 products of 2 T FLOPs per element of q, twice more in backward
        core = 4 * self.q * self.seq_len
        again = {"none": 0, "selective": core, "full": 2 * self.block + core}[recompute]
        return self.n_layer * (6 * self.block + 3 * core + again) + 6 * self.vocab_size * self.n_embd


@dataclass(frozen=True)
class Layout:
    """How a step is split over ranks, by train.py's flags. schedule and chunks: --pp-schedule, --pp-chunks, the stages
    per rank, which are above 1 if interleaved."""

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
    fused_norm: bool = True         # False: RMSNorm keeps x / rms as well as x
    chunked_loss: bool = True       # the loss keeps the gradients of its input and weight; False: the logits
    # two of backward's four tp messages per layer, with sequence parallelism four of its six, travel while the
    # gradients of weights are computed
    overlap_tp: bool = False
    overlap_dp: bool = True         # gradients travel during backward
    train_py: bool = True           # also count what train.py keeps or sends and the papers' programs do not

    wide = property(lambda self: max(4, self.item))            # bytes of a number that is summed up, as Adam's moments
    # Adam's two moments, and the master
    states = property(lambda self: 2 * self.wide + 4 * (self.master_weights and self.item < 4))


MEGATRON_2021 = Program(residual=2, gradient=2, flash=False, dropout=True, chunked_loss=False, train_py=False,
                        overlap_dp=False)
MEGATRON_2022 = replace(MEGATRON_2021, overlap_tp=True)
LLAMA_3 = Program(residual=2, chunked_loss=False, train_py=False, overlap_tp=True)


@functools.cache
def depth(n_layer: int, pp: int, chunks: int) -> list[int]:
    """Layers of each pipeline rank: stage s of S begins with layer s L // S."""
    S = pp * chunks
    return [sum((s + 1) * n_layer // S - s * n_layer // S for s in range(r, S, pp)) for r in range(pp)]


RankParams = namedtuple("RankParams", "count whole")


def rank_params(shape: Shape, layout: Layout, stage: int) -> RankParams:
    """Of one rank at place `stage` of its pipeline, before ZeRO: how many parameters, how many of them tp does not
    split."""
    layers = depth(shape.n_layer, layout.pp, layout.chunks)[stage]
    is_first, is_last = stage == 0, stage == layout.pp - 1
    tables = is_first + is_last - (shape.tie_embeddings and layout.pp == 1)
    learned = is_first and shape.position == "learned"
    whole = layers * shape.whole + (learned * shape.seq_len + is_last * shape.norm_vectors) * shape.n_embd
    split = layers * (shape.block + shape.split_biases) + tables * shape.vocab_size * shape.n_embd
    return RankParams(split // layout.tp + whole, whole)


# ---- (4) machines ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GPU:
    """A row of the table below in FLOP/s, bytes, bytes/s, watts, dollars per hour."""

    peak: float                    # dense bf16 (V100, T4: fp16) products
    fp8: float                     # 0: has none
    memory: float
    bandwidth: float               # of HBM
    link: float                    # bus bandwidth of an all-reduce inside a node
    network: float                 # per GPU between nodes
    watts: float
    matmul: float                  # c
    fp32: float                    # share of peak
    price: float | None
    source: str                    # of the price
    name: str = ""
    node: int = 8                  # GPUs per node

    bf16 = property(lambda self: not self.name.startswith(("v100", "t4")))

    def peak_flops(self, precision: str) -> float:
        """FLOP/s that MFU is a share of: the precision's own."""
        return {"fp32": self.peak * self.fp32, "tf32": self.peak / 2, "fp8": self.fp8}.get(precision) or self.peak


# Links: measured 235 of NVLink 3's 300 GB/s and 368 of NVLink 4's 450; of others 0.8 of the line rate (PCIe 4: 31,
# PCIe 5: 63). Network: 200 Gb/s per GPU for A100 (Narayanan 2021, section 5), 400 for H100 (Llama 3, section 3.3.1) and
# later. c is the share of the peak that large products reach in a long run: hot, at the power limit, between other
# kernels. Two rows of it are fitted: a100 on six rows of Megatron's table 1, h100 on one row of Llama 3's table 4. A
# benchmark of nothing but products reaches a larger share: a100's c is 0.88 of it and h100's 0.79, on average 0.83. So
# the other rows have c = 0.83 x the benchmark's share, or 0.83 x 0.78 where nobody measured; h200 has h100's. Peaks and
# 1/fp32 by the makers' data sheets
GPU_TABLE = """
name             TFLOP/s     fp8  GB   GB/s  link network watts    c  1/fp32    $  source of the price
v100                 125       0  32    900   120    12.5   300 0.65       8 0.79  Lambda, 16 GB, skypilot-catalog v8
a100                 312       0  80   2000   235    25     400 0.712     16 1.50  assumed by Sardana 2024
a100-pcie            312       0  80   1940    25    25     300 0.67      16    -
h100                 989    1979  80   3350   368    50     700 0.635     16 2.69  RunPod secure, 2026-05-22
h100-pcie            756    1513  80   2000    50    50     350 0.65      16 2.79  RunPod secure, 2026-05-22
h20                  148     296  96   4000   368    50     400 0.65     3.4    -
h200                 989    1979 141   4800   368    50     700 0.635     16 3.50  Nebius on demand, skypilot-catalog v8
b200                2250    4500 180   8000   720    50    1000 0.64      30 5.50  Nebius, skypilot-catalog v8
b300                2250    4500 288   8000   720    50    1000 0.65      30    -
gb200               2500    5000 186   8000   720    50    1200 0.61      31    -
mi300x            1307.4  2614.9 192   5300   358    50     750 0.50       8 1.71  TensorWave, undated
mi355x              2500    5000 288   8000   428    50    1400 0.50      16    -
l40s                 362     733  48    864    25    25     350 0.65       4 1.55  Nebius, skypilot-catalog v8
l4                   121   242.5  24    300    25    12.5    72 0.65       4    -
rtx4090            165.2   330.3  24   1008    25    12.5   450 0.65       2 0.25  Hyperbolic, skypilot-catalog v7
rtx3090               71       0  24    936    25    12.5   350 0.65       2    -
t4                    65       0  16    320    12.5  12.5    70 0.65       8    -
"""


def table_row(line: str) -> GPU:
    name, *figures, price = line.split(maxsplit=11)[:11]
    peak, fp8, memory, bandwidth, link, network, watts, c, slower = map(float, figures)
    source = line.split(maxsplit=11)[11:] or ["no price known: give --price"]
    return GPU(peak * 1e12, fp8 * 1e12, memory * 1e9, bandwidth * 1e9, link * 1e9, network * 1e9, watts, c, 1 / slower,
               None if price == "-" else float(price), *source, name)


GPUS = {gpu.name: gpu for gpu in map(table_row, GPU_TABLE.strip().splitlines()[1:])}
LINE = 0.8                                    # share of a network's line rate that messages reach, as in the links
NVLINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6       # seconds, of rings: NCCL's own tables, src/graph/tuning.cc
FLASH = 0.6                                   # FlashAttention-2, figure 4: 187 of A100's 312 TFLOP/s at T 2048, D 128
USABLE = 0.95                                 # of memory: the rest holds CUDA's and NCCL's own, and stays in gaps
PUE, GRID = 1.1, 0.385                        # building / GPUs; kg CO2 per kWh (LLaMA, arXiv:2302.13971, section 6)
PRECISIONS = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2}                     # bytes of what is multiplied


# ---- (4) memory ------------------------------------------------------------------------------------------------------

BUCKETS = 25e6, 10e6, 10e6                    # bytes of gradients per message, by ZeRO stage: parallel.py's, zero.py's


def layer_bytes(shape: Shape, layout: Layout, program: Program, recompute: str) -> float:
    """What a layer keeps from forward to backward, of one micro-batch on one rank: Korthikanti 2022, equations 1 to 6,
    and the same count for SwiGLU, grouped heads, RMSNorm, flash attention."""
    h, n = shape.n_embd, layout.micro_batch_size * shape.seq_len
    if recompute == "full":                                                             # its input
        return n * h * program.residual / layout.split
    # whole: two norms, their outputs, which the linears behind them read, and two masks of dropout
    whole = 2 * (norm_bytes(shape.norm, h, program) + h * (program.item + program.dropout))
    # split by tp: q, k, v, o; the MLP's ups and what its activation makes of them (SwiGLU: silu(gate), and the product)
    split = (2 * shape.q + 2 * shape.kv + 2 * shape.ups * shape.n_ff) * program.item
    if shape.qk_norm:
        split += (shape.n_head + shape.n_kv_head) * norm_bytes("rmsnorm", shape.head_dim, program)
    if recompute == "none":
        # flash attention: a row's log sum exp. Else, for each of T keys: softmax, dropout's mask, softmax x mask
        row = program.wide if program.flash else (2 * program.item + program.dropout) * shape.seq_len
        split += shape.n_head * row
    if program.train_py and program.item < program.residual:
        # each linear behind a norm casts the norm's output to `item` bytes for itself, and keeps its copy (with tp they
        # share one); "selective" keeps q and k after the rotation and before their cast
        whole += (layout.tp == 1) * (1 + shape.ups) * h * program.item
        rotated = recompute == "selective" and shape.position == "rope"
        split += rotated * (shape.q + shape.kv) * (program.residual - program.item)
    return n * (whole / layout.split + split / layout.tp)


def norm_bytes(norm: str, width: int, program: Program) -> int:
    """What a norm keeps of one row: its input; x / rms, if it is an RMSNorm that is not fused; and, which the papers do
    not count, 1 / rms, or LayerNorm's mean and 1 / deviation."""
    rms = norm == "rmsnorm"
    statistics = program.train_py * max(4, program.residual) * (1 if rms else 2)
    return width * program.residual * (2 if rms and not program.fused_norm else 1) + statistics


def end_bytes(shape: Shape, layout: Layout, program: Program) -> float:
    """What the last norm and the loss keep of a micro-batch: their inputs, and the logits in float32. A chunked loss
    computes its gradients in forward, a chunk of logits at a time: it keeps those of its input and of the head's weight
    instead of the logits. Its input it keeps only with sequence parallelism, as the shard that is gathered again."""
    n, h, V = layout.micro_batch_size * shape.seq_len, shape.n_embd, shape.vocab_size / layout.tp
    norm, x = n * norm_bytes(shape.norm, h, program) / layout.split, n * h * program.item / layout.split
    if program.chunked_loss:
        return norm + x * (layout.split > 1) + program.wide * (n * h + V * h)
    return norm + x + 4 * n * V


def stored(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a rank holds at once. In one of a rank's v stages it counts 1 / v."""
    p, m, v = layout.pp, layout.micro_batches, layout.chunks
    if v > 1:
        return min(m * v, (p - 1 - stage) * 2 + (v - 1) * p + 1) / v
    return m if layout.schedule == "gpipe" and p > 1 else min(m, p - stage)


def waiting_bytes(shape: Shape, layout: Layout, program: Program, stage: int) -> float:
    """Zero bubble computes weight gradients later. Until then each linear's input and the gradient of its result wait.
    One linear more is waiting while a forward pass runs after a backward, which is so only if m > p."""
    if layout.schedule != "zb" or layout.pp == 1:
        return 0
    n, h, t = layout.micro_batch_size * shape.seq_len, shape.n_embd, layout.tp
    layers, m, p = depth(shape.n_layer, layout.pp, 1)[stage], layout.micro_batches, layout.pp
    per_layer = n * program.item * (4 * h + (2 * shape.q + 2 * shape.kv + (shape.ups + 1) * shape.n_ff) / t)
    return (min(m, p) - stored(layout, stage)) * layers * per_layer + (m > p) * n * program.item * (h + shape.n_ff / t)


def buffer_bytes(shape: Shape, layout: Layout, program: Program, stage: int) -> float:
    """Gradients on their way, gathered layers, and the block that runs again."""
    psi, dp, zero = rank_params(shape, layout, stage).count, layout.dp, layout.zero
    again = layer_bytes(shape, layout, program, "none") * (layout.recompute == "full")
    if not zero:                                                    # the sums, and one micro-batch's gradients
        return again + (dp > 1 and layout.micro_batches > 1) * psi * program.gradient
    # stage 3: a layer, or a table, at a time; before: a bucket
    layer = (shape.block + shape.split_biases) / layout.tp + shape.whole
    table = shape.vocab_size / layout.tp * shape.n_embd * (stage in (0, layout.pp - 1))
    bucket = max(layer, table) if zero == 3 else min(BUCKETS[zero] / program.gradient, psi)
    # gradients: a bucket that is being summed, and the rank's share of it; from stage 2 on, also two buckets as
    # backward left them. Stage 3: the gathered weights of this layer and of the next
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
    # what the layers of a micro-batch share: train.py's cos and sin (of each chunk), or positions; a mask
    T, rope = shape.seq_len, shape.position == "rope"
    shared = program.train_py * T * (layout.chunks * shape.head_dim * program.residual if rope else 8 * (stage == 0))
    shared += program.document_mask * layout.micro_batch_size * T * T * program.item
    kept = alive * (layers * layer_bytes(shape, layout, program, layout.recompute) + shared)
    if stage == layout.pp - 1:                # the loss's backward follows its forward at once, but not with GPipe
        kept += end_bytes(shape, layout, program) * (alive if layout.schedule == "gpipe" else 1)
    return {"parameters": psi * weight / (dp if zero >= 3 else 1),
            "gradients": psi * program.gradient / (dp if zero >= 2 else 1),
            "states": psi * states / (dp if zero >= 1 else 1),
            "activations": kept + waiting_bytes(shape, layout, program, stage),
            "buffers": buffer_bytes(shape, layout, program, stage)}


def fullest(shape: Shape, layout: Layout, program: Program) -> dict:
    """memory() of the rank that needs most. Candidates: the first rank, the last, and for each number of layers the
    first rank between them that has so many, since an earlier rank stores more micro-batches."""
    layers = depth(shape.n_layer, layout.pp, layout.chunks)
    stages = {0, layout.pp - 1, *(layers.index(x, min(1, layout.pp - 1)) for x in set(layers[1:]))}
    return max((memory(shape, layout, program, r) for r in stages), key=lambda parts: sum(parts.values()))


def fits(shape: Shape, gpu: GPU, layout: Layout, program: Program) -> bool:
    return sum(fullest(shape, layout, program).values()) <= USABLE * gpu.memory


# ---- (4) messages ----------------------------------------------------------------------------------------------------

def layer_collectives(layout: Layout, program: Program) -> dict:
    """{pass: (all-gathers, reduce-scatters)} over tp of one layer; without sequence parallelism each two are an
    all-reduce. Forward: attention and MLP gather their input and sum their result. Backward: the adjoints, and the
    inputs are gathered again. (Korthikanti 2022, section 4.2)"""
    # a block that runs again in backward ends with a sum. Nobody needs it: Megatron-LM repeats it, train.py does not
    sp, sums = layout.sequence_parallel, 1 if program.train_py else 2
    again = (2 if sp else sums, sums) if layout.recompute == "full" else (0, 0)
    return {"forward": (2, 2), "backward": (2 + 2 * sp, 2), "again": again}


def messages(shape: Shape, layout: Layout, program: Program, stage: int) -> dict:
    """What a rank at place `stage` of its pipeline sends in a step: {(axis, collective): (calls, bytes)}.

    axis     dp, tp, pp; "world": all ranks; "ends": first and last stage, which share a tied weight
    calls    None where the number depends on the size of buckets or of the loss's chunks
    bytes    the payload, all ranks' parts together. With ZeRO ranks' shards differ in size: the mean, without padding
    """
    rank, layers = rank_params(shape, layout, stage), depth(shape.n_layer, layout.pp, layout.chunks)[stage]
    m, is_first, is_last, zero = layout.micro_batches, stage == 0, stage == layout.pp - 1, layout.zero
    n, h, table = layout.micro_batch_size * shape.seq_len, shape.n_embd, shape.vocab_size // layout.tp * shape.n_embd
    product, hidden = n * h * program.item, n * h * program.residual
    mean = program.gradient / (layout.dp if zero else 1)                  # of a gradient after ZeRO has sharded it
    found = {("world", "all_reduce"): (1, 3 * 8)}           # loss, squared norm, whether a rank was asked to stop
    if layout.dp > 1:
        if zero:
            scatters, gathers = {1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[zero]
            twice = table * (zero == 3 and shape.tie_embeddings and layout.pp == 1)  # embedding and head each gather it
            found["dp", "reduce_scatter"] = None, rank.count * scatters * program.gradient
            found["dp", "all_gather"] = None, (rank.count + twice) * gathers * program.item
        found["dp", "all_reduce"] = None, 8 + rank.count * program.gradient * (not zero)    # 8: the number of targets
    if layout.tp > 1:
        def over_tp(per_layer):                    # (calls, bytes): with the head's, and the embedding's of residuals
            inside = layers * per_layer + is_last
            return m * (inside + is_first), m * (inside * product + is_first * hidden)

        passes = layer_collectives(layout, program).values()
        gathers, sums = over_tp(sum(g for g, _ in passes)), over_tp(sum(r for _, r in passes))
        # the loss needs three numbers per token: max, sum of exponentials, the target's logit. `partial`: parameters
        # that tp does not split, but whose gradients it computes in parts
        partial = rank.whole if layout.sequence_parallel else layers * 2 * shape.qk_norm * shape.head_dim
        others = m * is_last * 3 * n * program.wide + partial * mean
        if layout.sequence_parallel:
            found["tp", "all_gather"], found["tp", "reduce_scatter"] = gathers, sums
        found["tp", "all_reduce"] = None, others + (0 if layout.sequence_parallel else sums[1])
    if layout.pp > 1:
        calls = m * (2 * layout.chunks - is_first - is_last)
        # Megatron sends 1/t of a hidden state even where each tp rank has all of it (Narayanan 2021, section 4.1)
        parts = layout.split if program.train_py else layout.tp
        found["pp", "send"] = found["pp", "recv"] = calls, calls * hidden // parts
        found["ends", "all_reduce"] = 1, table * mean * (shape.tie_embeddings and (is_first or is_last))
    return {key: counted for key, counted in found.items() if counted[1] and layout.ranks > 1}


def bytes_sent(messages: dict, layout: Layout) -> dict:
    """{axis: bytes that the rank sends in a step}, each collective as a ring of R ranks."""
    size, sent = {"world": layout.ranks, "dp": layout.dp, "tp": layout.tp, "ends": 2}, {}
    for (axis, collective), (_, payload) in messages.items():
        R = size.get(axis, 1)
        # an all-reduce is a reduce-scatter and an all-gather, each (R-1)/R
        factor = {"all_reduce": 2 * (R - 1) / R, "send": 1, "recv": 0}.get(collective, (R - 1) / R)
        sent[axis] = sent.get(axis, 0) + factor * payload
    return sent


def ring_seconds(gpu: GPU, ranks: int, bytes: float, stride: int = 1, messages: float = 1) -> float:
    """Of an all-gather or a reduce-scatter of `bytes`, all parts together, in so many messages, over `ranks` ranks
    whose numbers are `stride` apart: a ring. Between nodes it has the network bandwidth of all its GPUs in one node."""
    inside = max(1, min(ranks, gpu.node // stride))
    nodes = math.ceil(ranks / inside)
    rate = gpu.link if nodes == 1 else min(gpu.link, inside * LINE * gpu.network)
    # (R-1)/R bytes / bandwidth + hops x latency
    hops = (ranks - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP
    return (ranks - 1) / ranks * bytes / rate + messages * hops


# ---- (4) seconds -----------------------------------------------------------------------------------------------------

def bubble(layout: Layout, forward: float, backward: float, weight: float) -> float:
    """Seconds of a step in which a pipeline rank waits. forward, backward (gradients of inputs), weight (of weights):
    seconds of a micro-batch in all of a rank's layers. (Narayanan 2021, section 2.2; zero bubble: Qi 2023, table 2 and
    appendix H)"""
    if layout.schedule == "zb" and layout.pp > 1:
        return (layout.pp - 1) * (forward + backward) - (min(layout.micro_batches, layout.pp) - 1) * weight
    return (layout.pp - 1) / layout.chunks * (forward + backward + weight)


def step_time(shape: Shape, gpu: GPU, layout: Layout, program: Program, speed: float = 1.0) -> dict:
    """Seconds of a step: {"compute", "tp", "pp", "dp", "bubble", "update"}; of messages, what nothing hides.
    speed: of the linear layers' products, relative to bf16's."""
    b, T, h, n_ff, t = layout.micro_batch_size, shape.seq_len, shape.n_embd, shape.n_ff, layout.tp
    n, m, V, core_speed = b * T, layout.micro_batches, shape.vocab_size / t, min(speed, 1)

    def product(rows, columns, inner, speed=speed):
        # 2 rows columns inner / (c peak) + bytes / HBM
        size = program.item * (rows * columns + columns * inner + rows * inner)
        return 2 * rows * columns * inner / (gpu.matmul * gpu.peak * speed) + size / gpu.bandwidth

    linear = (product(n, (shape.q + 2 * shape.kv) / t, h) + product(n, h, shape.q / t)
              + product(n, shape.ups * n_ff / t, h) + product(n, h, n_ff / t))
    if program.flash:
        # forward's two products are 4 n T q FLOPs, of which causality hides half; backward has five: q k^T runs again
        core, core_backward, scores = 2 * n * T * shape.q / t / (FLASH * gpu.peak * core_speed), 2.5, 0.0
    else:
        heads, core_backward = b * shape.n_head / t, 2
        core = heads * (product(T, T, shape.head_dim, core_speed) + product(T, shape.head_dim, T, core_speed))
        scores = heads * (2 * program.item + program.dropout) * T * T / gpu.bandwidth
    kept = layer_bytes(shape, layout, program, "none") / gpu.bandwidth
    again = {"none": 0, "selective": core + 2 * scores, "full": linear + core + 2 * kept}[layout.recompute]
    head = product(n, V, h) + 6 * n * V / gpu.bandwidth
    # tp's messages of a layer, by pass
    ring = ring_seconds(gpu, t, n * h * program.item)
    tp_forward, tp_backward, tp_again = (sum(x) * ring for x in layer_collectives(layout, program).values())
    if program.overlap_tp:
        tp_backward = 2 * ring                                                     # two are left, the rest is hidden

    # a layer's forward, its backward (gradients of inputs, and what runs again), and its gradients of weights
    layer = linear + core + 2 * kept, linear + core_backward * core + 3 * kept + again, linear
    # the same of a micro-batch in the slowest stage: computing, tp's messages, messages to other stages
    every = depth(shape.n_layer, layout.pp, layout.chunks)
    slowest = max(range(layout.pp), key=lambda r: every[r] * sum(layer) + 3 * head * (r == layout.pp - 1))
    layers, is_last = every[slowest], slowest == layout.pp - 1
    compute = [layers * seconds + head * is_last for seconds in layer]
    tp = layers * tp_forward, layers * (tp_backward + tp_again), 0.0
    between = layout.ranks > gpu.node
    rate, delay = (LINE * gpu.network, NETWORK_HOP) if between else (gpu.link, NVLINK_HOP)
    parts = layout.split if program.train_py else t
    pp = (layout.pp > 1) * layout.chunks * (n * h * program.residual / parts / rate + delay)
    forward, backward, weight = (sum(x) for x in zip(compute, tp, (pp, pp, 0.0), strict=True))

    # dp: gradients are summed during backward. Parameters are gathered after the update, at stage 3 before each pass.
    # `number` of messages: one per layer at stage 3; else one per bucket, or a single one in the papers' programs
    psi = rank_params(shape, layout, slowest).count
    number = layers if layout.zero == 3 else max(1, program.train_py * psi * program.gradient / BUCKETS[layout.zero])
    scatter, gather = (ring_seconds(gpu, layout.dp, psi * size, t, number) for size in (program.gradient, program.item))

    def exposed(message, compute):
        return max(0.0, message - program.overlap_dp * compute)

    both = backward + weight
    dp = {0: exposed(2 * scatter, both),
          1: exposed(scatter, both) + gather,
          2: m * exposed(scatter, both) + gather,
          3: m * (exposed(scatter + gather, both) + exposed(gather, forward))}[layout.zero]
    # reads the gradient and the states, writes the states and the weight
    update = psi * (2 * program.states + program.gradient + program.item) / gpu.bandwidth / (
        layout.dp if layout.zero else 1)
    return {"compute": m * sum(compute), "tp": m * sum(tp), "pp": m * 2 * pp, "dp": dp,
            "bubble": bubble(layout, forward, backward, weight), "update": update}


def estimate(shape: Shape, gpu: GPU, layout: Layout, program: Program = Program(), speed: float = 1.0) -> dict:
    """What a step costs: {"layout", "seconds": by part, "step": their sum, "tokens_per_s", "mfu" (of the precision's
    own peak), and per GPU "tflops", "hardware_tflops" (with what runs again)}."""
    seconds = step_time(shape, gpu, layout, program, speed)
    rate = layout.batch * shape.seq_len / sum(seconds.values())
    tflops, hardware = (rate / layout.ranks * shape.flops_per_token(x) / 1e12 for x in ("none", layout.recompute))
    return {"layout": layout, "seconds": seconds, "step": sum(seconds.values()), "tokens_per_s": rate,
            "mfu": tflops * 1e12 / (gpu.peak * speed), "tflops": tflops, "hardware_tflops": hardware}


# ---- (5) what it costs -----------------------------------------------------------------------------------------------

def cost(gpu: GPU, n_gpus: int, seconds: float) -> dict:
    """{"gpu_hours", "energy_mwh", "tco2", "dollars"}; at full power, as LLaMA's bill: hours x watts x PUE."""
    hours = n_gpus * seconds / 3600
    energy = hours * gpu.watts * PUE / 1e6
    return {"gpu_hours": hours, "energy_mwh": energy, "tco2": energy * GRID, "dollars": gpu.price and hours * gpu.price}


def bill(shape: Shape, layout: Layout, program: Program, *, tokens: float, gpu: str | GPU | None = None,
         precision: str = "bf16", rank_flops: float | None = None) -> dict:
    """What a run of `tokens` tokens takes, as JSON has it:

    parameters, embedding_parameters, tokens, tokens_per_parameter, tokens_per_step, flops_per_token, flops
    law             {"best_tokens": for this size; "N_opt", "D_opt": for these 6 N D; "loss", "left": nats that N_opt
                    and D_opt would save; "extrapolated": fewer parameters or tokens than the law was fitted to, where
                    "loss" and "left" are None}
    layout          the fields of Layout; layers_per_rank; bubble: its share of a step, if forward and both parts of
                    backward take equally long
    memory_bytes    of the fullest rank, by part, and "total"
    bytes_sent      {axis: bytes per step of the rank that sends most}; bytes_sent_at_zero_1: dp's, where stage 2 or 3
                    with several micro-batches sends more
    gpu given       gpu (its name), seconds_per_step (by part), tokens_per_s, mfu, tflops, hardware_tflops (per GPU),
                    seconds, days, gpu_hours, energy_mwh, tco2, dollars, dollars_per_gpu_hour, price_source
    rank_flops      FLOP/s that a rank was measured to reach: seconds, days, without messages
    """
    N, flops = shape.num_params, tokens * shape.flops_per_token()
    law = {name: x for name, x in assess(N, tokens).items() if name in ("N_opt", "D_opt", "loss", "left")}
    law |= {"best_tokens": optimal_tokens(N), "extrapolated": N < FITTED_FROM["N"] or tokens < FITTED_FROM["D"]}
    if law["extrapolated"]:
        law |= {"loss": None, "left": None}
    parts = {name: round(x) for name, x in fullest(shape, layout, program).items()}
    waits = bubble(layout, 1, 1, 1)

    def most_sent(layout):
        sent = [bytes_sent(messages(shape, layout, program, stage), layout) for stage in range(layout.pp)]
        return {axis: round(max(x.get(axis, 0) for x in sent)) for axis in sorted(set().union(*sent))}

    answer = {"parameters": N, "embedding_parameters": shape.vocab_size * shape.n_embd, "tokens": tokens,
              "tokens_per_parameter": tokens / N, "tokens_per_step": layout.batch * shape.seq_len,
              "flops_per_token": shape.flops_per_token(), "flops": flops, "law": law,
              "layout": dataclasses.asdict(layout), "bubble": waits / (3 * layout.micro_batches + waits),
              "layers_per_rank": depth(shape.n_layer, layout.pp, layout.chunks),
              "memory_bytes": parts | {"total": sum(parts.values())}, "bytes_sent": most_sent(layout)}
    if layout.zero > 1 and layout.micro_batches > 1 and layout.dp > 1:
        answer["bytes_sent_at_zero_1"] = most_sent(replace(layout, zero=1))["dp"]
    if gpu is not None:
        gpu = find_gpu(gpu)
        e = estimate(shape, gpu, layout, program, gpu.peak_flops(precision) / gpu.peak)
        seconds = tokens / e["tokens_per_s"]
        answer |= {"gpu": gpu.name, "seconds_per_step": e["seconds"], "seconds": seconds, "days": seconds / 86400,
                   **{name: e[name] for name in ("tokens_per_s", "mfu", "tflops", "hardware_tflops")},
                   **cost(gpu, layout.ranks, seconds), "dollars_per_gpu_hour": gpu.price,
                   "price_source": gpu.source}
    elif rank_flops:
        seconds = flops / rank_flops / layout.ranks / (1 - answer["bubble"])
        answer |= {"rank_flops": rank_flops, "seconds": seconds, "days": seconds / 86400}
    return answer


# ---- (5) all layouts, ranked -----------------------------------------------------------------------------------------

FIELDS = tuple(f.name for f in dataclasses.fields(Layout) if f.name != "micro_batches")


def layouts(shape: Shape, gpu: GPU, n_gpus: int, batch: int, **fixed):
    """Layouts of n_gpus ranks that train.py takes: tp inside a node, up to 8 chunks and 32 windows a micro-batch, no
    GPipe (1F1B equals it in time and beats it in memory); `fixed` fields as they are given."""
    divisors = [n for n in range(1, n_gpus + 1) if n_gpus % n == 0]
    choices = {"tp": [n for n in divisors if n <= gpu.node], "pp": divisors,
               "micro_batch_size": (1, 2, 4, 8, 16, 32), "schedule": ("1f1b", "zb", "interleaved"),
               "chunks": range(1, 9), "zero": range(4), "recompute": ("none", "selective", "full"),
               "sequence_parallel": (True,)}
    choices |= {name: (x,) for name, x in fixed.items() if name != "dp"}
    for tp, pp, b, schedule, v, zero, recompute, sp in itertools.product(*choices.values()):
        dp, left_over = divmod(n_gpus, tp * pp)
        if left_over or dp != fixed.get("dp", dp) or batch % (dp * b):
            continue
        m = batch // (dp * b)
        widths = (shape.n_head, shape.n_kv_head, shape.n_ff, shape.vocab_size, shape.seq_len if sp else tp)
        if (all(x % tp == 0 for x in widths)                               # what tp splits, it splits evenly
                and pp * v <= shape.n_layer                                # a stage has a layer
                and (pp > 1 or schedule == "1f1b")                         # one stage needs no other schedule
                and (v > 1) == (schedule == "interleaved")
                and not (v > 1 and m % pp)                                 # interleaving: pp micro-batches at a time
                and not (schedule == "zb" and recompute != "none")         # zb keeps the inputs of weight gradients
                and (dp > 1 or zero == 0 or "zero" in fixed)):             # ZeRO over one rank is no ZeRO
            yield Layout(dp, tp, pp, schedule, v, b, m, zero, recompute, sp)


def plan(config, gpu: str | GPU, n_gpus: int, *, global_batch_size: int | None = None, precision: str = "bf16",
         program: Program | None = None, tokens: float | None = None, top: int | None = None, config_name=None,
         **fixed) -> list[dict]:
    """The layouts of a training step that fit, fastest first, the best of each (tp, pp, zero): bills, each with
    "command", which train.py takes.

    config             a Shape, a mapping or an object with ModelConfig's fields; config_name: train.py's name of it
    gpu                a name in GPUS, or a GPU
    global_batch_size  sequences per step; default: of 4 M or half a million tokens
    precision          train.py's flag; program: another one than train.py
    tokens             of the run; default: the best number by the law
    fixed              fields of Layout that are given: tp=8, recompute="full", ...
    Raises BadInput for what cannot be; and if nothing fits: what is biggest, and how many GPUs would do.
    """
    shape, gpu = shape_of(config), find_gpu(gpu)
    precision, fixed = resolve_precision(precision, gpu), {name: x for name, x in fixed.items() if x is not None}
    if n_gpus < 1 or n_gpus != int(n_gpus):
        raise BadInput(f"n_gpus must be a whole number from 1, got {n_gpus}")
    if tokens is not None and not tokens > 0:
        raise BadInput(f"tokens must be above 0, got {tokens}")
    for name in ("dp", "tp", "pp"):
        if n_gpus % fixed.get(name, 1):
            raise BadInput(f"{name} must divide the number of GPUs, {n_gpus}, got {fixed[name]}")
    if unknown := fixed.keys() - set(FIELDS):
        raise BadInput(f"{min(unknown)} must be a field of a layout: {', '.join(FIELDS)}")
    # 4 M tokens (Llama 2), below 1 B parameters 0.5 M (GPT-3, table 2.1), in sequences, a multiple of the GPUs
    each = n_gpus * fixed.get("micro_batch_size", 1)
    usual = max(1, round((2**22 if shape.num_params >= 1e9 else 2**19) / shape.seq_len / each)) * each
    batch, speed = global_batch_size or usual, gpu.peak_flops(precision) / gpu.peak
    program, tokens = program or Program(item=PRECISIONS[precision]), tokens or optimal_tokens(shape.num_params)
    possible, best = list(layouts(shape, gpu, n_gpus, batch, **fixed)), {}
    if not possible:
        given = "".join(f", {flag_of(name)} {x}" for name, x in fixed.items())
        raise BadInput(f"global_batch_size {batch} on {n_gpus} GPUs must be split evenly by some dp x tp x pp that "
                       f"train.py takes for {shape.n_head} heads ({shape.n_kv_head} of keys) and {shape.n_layer} "
                       f"layers{given}; none does")
    fitting = [layout for layout in possible if fits(shape, gpu, layout, program)]
    if not fitting:
        raise BadInput(why_not(shape, gpu, possible, program, global_batch_size, fixed))
    for e in sorted((estimate(shape, gpu, layout, program, speed) for layout in fitting), key=lambda e: e["step"]):
        best.setdefault((e["layout"].tp, e["layout"].pp, e["layout"].zero), e["layout"])
    steps = math.ceil(tokens / batch / shape.seq_len)
    return [bill(shape, layout, program, tokens=tokens, gpu=gpu, precision=precision)
            | {"command": command(shape, layout, precision, gpu, steps, config_name)}
            for layout in list(best.values())[:top]]


# ---- the lecture ends here. Names: of shapes, GPUs, precisions and runs, and what is refused -------------------------

def shape_of(config) -> Shape:
    """The Shape of a mapping or an object with ModelConfig's fields."""
    known = config if isinstance(config, dict) else {name: getattr(config, name) for name in dir(config)}
    return Shape(**{f.name: known[f.name] for f in dataclasses.fields(Shape) if f.name in known})


@functools.cache
def shape_for(params: float, seq_len: int = 4096) -> Shape:
    """A Llama of about so many parameters: heads of 128 (below 8 heads: of 64), about width / 128 layers, an MLP of
    about 8/3 of the width, wider or narrower to meet the number of parameters."""
    V, shapes = 32000 if params >= 3e8 else 8192 if params >= 2e7 else 2048, []
    for heads in (*range(1, 8), *range(8, 32, 4), *range(32, 513, 8)):
        h = heads * (128 if heads >= 8 else 64)
        layers = max(2, 2 * round((params - 2 * V * h) / (12 * h * h) / 2))
        n_ff = max(1, round(((params - 2 * V * h) / layers - 4 * h * h) / (3 * h) / 128)) * 128
        shape = Shape(V, seq_len, layers, heads, heads, h // heads, h, n_ff)
        off = (shape.num_params / params, 1), (h / layers / 128, 0.1), (n_ff / h * 3 / 8, 0.5)
        shapes.append((sum(weight * abs(math.log(x)) for x, weight in off), shape))
    return min(shapes, key=lambda x: x[0])[1]


def known_gpu(device_name: str) -> str | None:
    """The key of GPUS for a name as torch.cuda.get_device_name() and vendors print it, or None. Words for the maker,
    the connector and the row's memory are dropped; what is left must be the key. "A100-SXM4-40GB" is no a100: 40 GB are
    not the row's."""
    words = re.split(r"[\s-]+", device_name.strip().lower())
    words = [x for x in words if not re.fullmatch("nvidia|amd|instinct|tesla|geforce|sxm[0-9]?|oam|hbm3e?", x)]
    for key, row in GPUS.items():
        size = f"{row.memory / 1e9:.0f}gb"
        if "".join(x for x in words if x != size) == "".join(x for x in key.split("-") if x != size):
            return key
    return None


def find_gpu(name: str | GPU) -> GPU:
    """By key or by device name; a GPU is itself. Raises BadInput."""
    if isinstance(name, GPU):
        return name
    key = name.lower() if name.lower() in GPUS else known_gpu(name)
    if not key:
        near = difflib.get_close_matches(name.lower(), GPUS, 3, 0.3)
        raise BadInput(f"gpu must be one of {', '.join(GPUS)}, got {name!r}"
                       + (f"; the nearest: {', '.join(near)}" if near else ""))
    return GPUS[key]


def resolve_precision(name: str, gpu: str | GPU) -> str:
    """"auto" -> the GPU's 16 bits: bf16, before Ampere fp16; another precision -> itself. Raises BadInput for one that
    the GPU lacks."""
    gpu = find_gpu(gpu)
    if name not in ("auto", *PRECISIONS):
        raise BadInput(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name == "fp8" and not gpu.fp8 or name in ("bf16", "tf32") and not gpu.bf16:
        raise BadInput(f"precision must be one that the GPU has, got {name} for {gpu.name}")
    return name if name != "auto" else "bf16" if gpu.bf16 else "fp16"


def table(runs, labels=None) -> np.ndarray:
    """Rows (N, D, loss) or (N, D, loss, C) -> (n, 3 or 4) float64. BadInput names what is wrong and where, by label:
    "row 1" is the first."""
    x = np.array(runs, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] not in (3, 4) or not len(x):
        raise BadInput(f"runs must be rows of (N, D, loss), got shape {x.shape}")
    for name, column in zip(("N", "D", "loss", "C"), x.T, strict=False):
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if len(bad):
            some = ", ".join(f"{labels[i] if labels else f'row {i + 1}'} has {column[i]:g}" for i in bad[:5])
            more = f", and {len(bad) - 5} more" * (len(bad) > 5)
            raise BadInput(f"{name} must be finite and above 0: {some}{more}")
    return x


# ---- text ------------------------------------------------------------------------------------------------------------

def columns(*rows) -> str:
    """Rows of cells, the first of names, as text: two spaces between columns, the first column on the left."""
    widths = [max(map(len, map(str, column))) for column in zip(*rows, strict=True)]
    return "\n".join(f"{row[0]:<{widths[0]}}" + "".join(
        f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)) for row in rows)


def short(x: float) -> str:
    """1,234,567 -> 1.23 M"""
    size, letter = next(((s, f" {name}") for s, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if x >= s),
                        (1, ""))
    return f"{x / size:.3g}{letter}"


def clock(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours / 24:,.1f} days" if hours >= 24 else f"{hours}:{minutes:02d}:{seconds:02d}" if hours else (
        f"{minutes}:{seconds:02d}")


def amounts(parts: dict) -> str:
    """{"a": 1e9, "b": 2e10} -> a 1.0, b 20.0 GB"""
    unit, scale = ("GB", 1e9) if max(parts.values()) > 1e9 else ("MB", 1e6)
    return ", ".join(f"{name} {x / scale:,.1f}" for name, x in parts.items()) + f" {unit}"


def describe_bill(bill: dict) -> str:
    """A bill as aligned lines: a label, padded to 11 characters, and a sentence. "law" may be None: the laws speak of
    pre-training."""
    law, layout = bill["law"], Layout(**bill["layout"])
    lines = [("run", f"{bill['parameters']:,} parameters ({bill['embedding_parameters']:,} in the embedding), "
                     f"{short(bill['tokens'])} tokens, {bill['flops']:.3g} FLOPs"),
             ("", f"{short(bill['tokens_per_step'])} tokens per step")]
    if law:
        lines += [("law", f"{bill['tokens_per_parameter']:.3g} tokens per parameter; best for this size: "
                          f"{law['best_tokens'] / bill['parameters']:.3g}, that is {short(law['best_tokens'])} tokens"),
                  ("", f"a guess for so small a model or so few tokens: the law was fitted to "
                       f"{short(FITTED_FROM['N'])} parameters, {short(FITTED_FROM['D'])} tokens and more"
                       if law["extrapolated"] else
                       f"loss {law['loss']:.3f} predicted, {law['left']:.3f} nats above the best of these 6 N D FLOPs: "
                       f"{short(law['N_opt'])} parameters, {short(law['D_opt'])} tokens")]
    lines.append(("memory", f"{amounts(bill['memory_bytes'])} per rank, predicted"))
    if layout.ranks > 1:
        places = itertools.product(range(layout.pp), range(layout.dp), range(layout.tp))
        shown = ", ".join(f"{r} ({p} {d} {t})" for r, (p, d, t) in enumerate(itertools.islice(places, 6)))
        more = ", ..." * (layout.ranks > 6)
        lines.append(("mesh", f"pp {layout.pp} x dp {layout.dp} x tp {layout.tp}: {shown}{more}"))
        if layout.pp > 1:
            layers = ", ".join(map(str, bill["layers_per_rank"]))
            lines.append(("pipeline", f"{layout.schedule}, {layout.micro_batches} micro-batches, bubble "
                                      f"{bill['bubble']:.1%}; layers per rank {layers}"))
        sent = {axis: x for axis, x in bill["bytes_sent"].items() if axis != "world"}
        lines.append(("messages", f"{amounts(sent)} per step, sent by a rank"))
    if "bytes_sent_at_zero_1" in bill:
        lines.append((f"zero {layout.zero}", f"sends {amounts({'dp': bill['bytes_sent']['dp']})} with every one of "
                      f"{layout.micro_batches} micro-batches; stage 1 would send "
                      f"{amounts({'dp': bill['bytes_sent_at_zero_1']})}, once per step"))
    if "gpu" in bill:
        parts, step = bill["seconds_per_step"], sum(bill["seconds_per_step"].values())
        dollars = f", ${bill['dollars']:,.0f} at ${bill['dollars_per_gpu_hour']:.2f} per GPU-hour" if (
            bill["dollars"]) else ""
        lines += [("time", f"about {clock(bill['seconds'])} on {layout.ranks:,} x {bill['gpu']}, {step:.4g} s per "
                           f"step, {short(bill['tokens_per_s'])} tokens/s, MFU {bill['mfu']:.1%}"),
                  ("", ", ".join(f"{name} {x / step:.1%}" for name, x in parts.items() if x)),
                  ("cost", f"{bill['gpu_hours']:,.4g} GPU-hours, {bill['energy_mwh']:,.3g} MWh, "
                           f"{bill['tco2']:,.3g} t CO2{dollars} ({bill['price_source']})")]
    elif "seconds" in bill:
        lines.append(("time", f"about {clock(bill['seconds'])} on {layout.ranks:,} rank{'s' * (layout.ranks > 1)} at "
                              f"{bill['rank_flops'] / 1e9:,.0f} GFLOP/s each; messages are not counted"))
    return "\n".join(f"{label:<11}{text}" for label, text in lines)


def flag_of(field: str) -> str:
    """train.py's flag, and plan's, for a field of Layout."""
    return "--" + {"schedule": "pp_schedule", "chunks": "pp_chunks"}.get(field, field).replace("_", "-")


def why_not(shape: Shape, gpu: GPU, possible: list, program: Program, batch: int | None, fixed: dict) -> str:
    """One line: the layout that needs least, what is biggest there, how many GPUs would do with the same `fixed`."""
    least = min(possible, key=lambda layout: sum(fullest(shape, layout, program).values()))
    parts = fullest(shape, least, program)
    biggest = max(parts, key=parts.get)
    saving = {"zero": 3, "recompute": "full", "micro_batch_size": 1} | fixed
    enough = next((n for n in (least.ranks * 2**i for i in range(1, 12)) if any(
        fits(shape, gpu, layout, program)
        for layout in layouts(shape, gpu, n, batch or n * saving["micro_batch_size"], **saving))), None)
    flags = "".join(f" {flag_of(name)} {saving[name]}" for name in ("zero", "recompute") if name not in fixed)
    return (f"does not fit: the smallest layout (dp {least.dp}, tp {least.tp}, pp {least.pp}, zero {least.zero}, "
            f"recompute {least.recompute}, micro-batch {least.micro_batch_size}) needs {sum(parts.values()) / 1e9:.1f} "
            f"of {USABLE * gpu.memory / 1e9:.1f} GB per GPU; biggest: {biggest}, {parts[biggest] / 1e9:.1f} GB; "
            + (f"{enough:,} GPUs{' with' * bool(flags)}{flags} would do" if enough else
               "with what is given, more GPUs do not help"))


def command(shape: Shape, layout: Layout, precision: str, gpu: GPU, steps=None, config=None) -> str:
    """The torchrun line. config: train.py's name of the model; without, the line holds all of its shape."""
    nodes = math.ceil(layout.ranks / gpu.node)
    launch = f"torchrun --nproc-per-node {min(layout.ranks, gpu.node)}"
    launch += f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500" if nodes > 1 else ""
    flags = {"config": config or ("large" if shape.num_params < 3e9 else "7b")}
    flags |= {"seq_len": shape.seq_len} if config else dataclasses.asdict(shape)
    flags |= {"steps": steps, "global_batch_size": layout.batch, "precision": precision}
    flags |= {name: getattr(layout, name) for name in FIELDS} | {"data": "data/mycorpus"}          # yours, prepared
    words = (f"--no-{flag_of(name)[2:]}" if x is False else flag_of(name) if x is True else f"{flag_of(name)} {x}"
             for name, x in flags.items() if x is not None)
    return f"{launch} train.py {' '.join(words)}"


# ---- the command line ------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argument that is wrong raises BadInput, which main prints as one line."""

    def __init__(self, name, description):
        super().__init__(prog=f"scaling.py {name}", allow_abbrev=False, description=description)

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            name = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            raise BadInput(f"{name} is no argument" + (f"; the nearest is {near[0]}" if near else ""))
        raise BadInput(re.sub("^argument (.+?): ", r"\1 ", message))


def number(lowest: float, highest: float, whole: bool = False):
    """An argparse type: a number from lowest to highest, written like 7e9 or 7b."""
    def read(text: str):
        scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(text[-1:].lower())
        try:
            x = float(text[:-1]) * scale if scale else float(text)
        except ValueError:
            x = math.nan
        if not lowest <= x <= highest or whole and x != int(x):
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * whole}number from {lowest:g} to {highest:g}, "
                                             f"got {text!r}")
        return int(x) if whole else x
    return read


# names of columns, the best first
COLUMNS = {"N": "n params parameters nparams numparams numparameters modelsize modelparams modelparameters totalparams "
                "totalparameters size nonembeddingparams nonembeddingparameters",
           "D": "d tokens trainingtokens traintokens ntokens numtokens totaltokens tokensseen datasize datasetsize",
           "loss": "loss l valloss validationloss finalloss finalvalloss evalloss testloss trainloss trainingloss",
           "C": "c budget flopsbudget flopbudget computebudget trainingbudget flops flop compute trainingflops "
                "trainingflop trainflops totalflops totalcompute"}


def read_runs(path) -> np.ndarray:
    """A CSV file of anyone's runs -> N, D, loss and, where there is a column of it, the budget C. Columns are known by
    many names; of N, D and C two will do. Comma, semicolon or tab; empty lines and those that begin with # are passed
    over. BadInput counts lines as an editor does."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip() and not line.startswith("#")), "")
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count))
            rows = [(f"line {reader.line_num}", [cell.strip() for cell in row]) for row in reader
                    if any(map(str.strip, row)) and not row[0].startswith("#")]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: must be a CSV file that can be read: {why}") from None
    if len(rows) < 2:
        raise BadInput(f"{path}: must have a line of column names and a line per run, it has {len(rows)} lines")
    (_, head), *rows = rows
    plain = ["".join(filter(str.isalnum, name.lower())) for name in head]
    place = {name: plain.index(there[0]) for name, known in COLUMNS.items()
             if (there := [k for k in known.split() if k in plain])}
    missing = [name for name in ("N", "D") if name not in place]
    if "loss" not in place or len(missing) > ("C" in place):
        wanted = [*missing, *["loss"] * ("loss" not in place)]
        some = ", ".join(COLUMNS[wanted[0]].split()[:3])
        raise BadInput(f"{path}: no column for {' and '.join(wanted)} ({some}, ...); there are {', '.join(head)}")

    def read(i, label, row):
        cell = "".join(row[i:i + 1])                                                        # "" where the row is short
        try:
            return float(cell)
        except ValueError:
            raise BadInput(f"{path}: {head[i]} must be a number, {label} has {cell!r}") from None

    values = {name: np.array([read(i, *row) for row in rows]) for name, i in place.items()}
    if missing:
        with np.errstate(all="ignore"):
            values[missing[0]] = values.pop("C") / (6 * values["D" if missing == ["N"] else "N"])
    try:
        return table(np.stack([values[name] for name in COLUMNS if name in values], 1), [label for label, _ in rows])
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def fit_all(runs, name) -> dict:
    """All three approaches -> {"parametric", "isoflop", "envelope"}. Without approach 3, BadInput. One of the others
    that the runs cannot support is None, and stderr says why. name: of the runs."""
    results = {"parametric": fit_parametric(runs)}
    for key, fit in (("isoflop", fit_isoflop), ("envelope", fit_envelope)):
        try:
            results[key] = fit(runs)
        except BadInput as error:
            print(f"scaling.py: {name}: {error}", file=sys.stderr)
            results[key] = None
    return results


LABELS = {"parametric": "3 parametric", "isoflop": "2 IsoFLOP", "envelope": "1 envelope"}


def between(ends, form=".5g") -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}" if ends else "-"


def report(runs, results):
    """The fits as text."""
    law, (N, D, loss), C = results["parametric"], runs.T[:3], flops_of(runs)
    off, target = abs(loss / chinchilla_loss(N, D, law) - 1), 10.0 ** math.ceil(math.log10(C.max()))
    spans = ", ".join(f"{name} {x.min():.3g} to {x.max():.3g}" for name, x in (("N", N), ("D", D), ("C", C)))
    stated = f"; C by its column, 6 N D is {(6 * N * D / C).min():.3g} to {(6 * N * D / C).max():.3g} of it"
    print(f"runs       {len(runs)}; {spans}{stated * (runs.shape[1] == 4)}\n")
    print(columns(("3 parametric: L = E + A / N^alpha + B / D^beta", "fitted", "95 % of resamples"), *(
        (name, f"{law[name]:.5g}", between(law["intervals"][name])) for name in BESIROGLU)))
    print(f"objective {law['objective']:.6g}; half of the runs are within {np.median(off):.2%} of the law, all within "
          f"{off.max():.2%}\n")
    fits = {key: results[key] for key in ("isoflop", "envelope") if results[key]}
    rows = [("approach", "C", "N_opt", "fitted", "D_opt", "D/N", "loss")]
    for key, fit in fits.items():
        for C, N, D, loss in map(dict.values, {p["N"]: p for p in fit["points"]}.values()):      # a size's last point
            rows.append((LABELS[key], f"{C:.3g}", f"{N:.3g}", f"{fit['k_N'] * C ** fit['a']:.3g}", f"{D:.3g}",
                         f"{D / N:.3g}", f"{loss:.4f}"))
    print(columns(*rows))
    if fit := fits.get("isoflop"):
        print(f"{len(fit['points'])} vertices of {fit['budgets']} budgets; {fit['without_budget']} of {len(runs)} runs "
              f"belong to no budget" + "; an exponent from fewer than 4 is hardly known" * (len(fit["points"]) < 4))
    best = {key: (fit["a"], fit["k_N"] * target ** fit["a"], fit["k_D"] * target ** fit["b"])
            for key, fit in fits.items()}
    if has_optimum(law, target):
        best["parametric"] = exponents(law)[0], *compute_optimal(target, law)
    else:
        print("the law of approach 3 has no optimum: to such runs, N or D makes no difference, or the wrong one")
    ends = {key: (results[key]["intervals"] or {}).get("a") for key in best}
    rows = [("N_opt ~ C^a", "a", "95 % of resamples", f"for C = {target:.0e} FLOPs: N", "D", "tokens per parameter")]
    for key, (a, N, D) in best.items():
        rows.append((LABELS[key], f"{a:.3f}", between(ends[key], ".3f"), f"{N:.3g}", f"{D:.3g}", f"{D / N:.3g}"))
    print("\n" + columns(*rows))
    for one, other in itertools.combinations([key for key in best if ends[key]], 2):
        if ends[one][1] < ends[other][0] or ends[other][1] < ends[one][0]:
            print(f"approaches {LABELS[one]} and {LABELS[other]} disagree: their intervals do not overlap")
    if found := results.get("holdout"):
        print(f"\nholdout    fitted up to C = {found['fitted_to']:.3g} FLOPs; it looks ahead "
              f"{found['rows'][-1]['ahead']:.3g} times the compute")
        rows = [("", "C", "ahead", "predicted", "measured", "error", "95 % of resamples")]
        for row, (name, form) in itertools.product(found["rows"], (("loss", ".4f"), ("N_opt", ".3g"))):
            x = row[name]
            rows.append((name, f"{row['C']:.3g}", f"{row['ahead']:.3g}", f"{x['predicted']:{form}}",
                         f"{x['measured']:{form}}", f"{x['predicted'] / x['measured'] - 1:+.1%}",
                         between(x["interval"], form)))
        print(columns(*rows))


def plot_isoflop(figure, runs, results):
    """Each budget's runs, its parabola and vertex."""
    axes, fit = figure.subplots(), results["isoflop"]
    for group in budgets(runs):
        points, = axes.plot(group[:, 0], group[:, 2], "o", label=f"C = {flops_of(group).mean():.1e} FLOPs")
        if vertex := parabola(group):
            n, color = np.geomspace(group[:, 0].min(), group[:, 0].max(), 100), points.get_color()
            axes.plot(n, vertex.loss + vertex.curvature * np.log(n / vertex.N) ** 2, color=color)
            axes.plot(vertex.N, vertex.loss, "*", color=color, markersize=15)
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss, nats per token",
             title=f"N_opt ~ C^{fit['a']:.3f}" if fit else "fewer than 2 vertices: no N_opt ~ C^a")
    axes.legend()


def draw(file: Path, plot, *data, out=None):
    """plot(figure, *data) as `file`, a PNG. Without matplotlib, one line that says so."""
    try:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
        plot(figure, *data)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        print(f"drawn      {file}", file=out)
    except ImportError:
        print("scaling.py: a figure needs matplotlib: pip install matplotlib; text has the same", file=sys.stderr)
    except OSError as error:
        raise BadInput(f"plot must be a folder that can be written, got {file.parent}: {error.strerror}") from None


def command_fit(argv):
    parser = Parser("fit", "fit the three approaches to a file of runs")
    parser.add_argument("runs", metavar="RUNS.csv", help="columns N, D, loss and, if known, the budget C")
    parser.add_argument("--holdout", type=number(1, 1e6, True), metavar="K", help="predict the K largest budgets from "
                                                                                  "the others")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="DIR", help="write isoflop.png")
    asked = parser.parse_args(argv)
    runs = read_runs(asked.runs)
    ahead = {"holdout": holdout(runs, asked.holdout)} if asked.holdout else {}
    results = fit_all(runs, asked.runs) | ahead
    print(json.dumps(results)) if asked.json else report(runs, results)
    if asked.plot:
        draw(Path(asked.plot) / "isoflop.png", plot_isoflop, runs, results, out=sys.stderr if asked.json else None)


# numbers that plan may be asked for: lowest, highest, whole or not, meaning
NUMBERS = {"params": (5e5, 1e14, False, "parameters of a Llama: 7e9 or 7b"),
           "tokens": (1e3, 1e18, False, "tokens to train on: 2e12 or 2t [the best number by the law]"),
           "n_gpus": (1, 1e6, True, "GPUs"), "days": (1e-3, 1e4, False, "how long; then something else is solved for"),
           "price": (1e-3, 1e4, False, "dollars per GPU-hour"), "seq_len": (1, 1e7, True, "tokens per sequence"),
           "global_batch_size": (1, 1e7, True, "sequences per step"), "dp": (1, 1e6, True, "data-parallel ranks"),
           "tp": (1, 1e6, True, "tensor-parallel ranks"), "pp": (1, 1e6, True, "stages"),
           "chunks": (1, 1e3, True, "stages per rank"), "micro_batch_size": (1, 1e6, True, "sequences per pass")}


@functools.cache
def read_config(name: str) -> dict:
    """The named config as train.py parses it, in a process of its own."""
    code = ("import dataclasses, json, sys, train\n"
            "try: print(json.dumps(dataclasses.asdict(train.parse_config(sys.argv[1:]))))\n"
            "except train.BadInput as error: sys.exit(str(error))")
    done = subprocess.run([sys.executable, "-c", code, "--config", name], cwd=Path(__file__).parent, text=True,
                          capture_output=True)
    if done.returncode:
        raise BadInput((done.stderr.strip().splitlines() or ["config: train.py did not answer"])[-1])
    return json.loads(done.stdout)


def solve_for(asked, gpu: GPU, options: dict) -> tuple:
    """Of the model, its tokens, the GPUs and the days, what the command line leaves out follows from the rest -> (its
    name, shape, tokens, GPUs)."""
    tokens, n, days, length = asked.tokens, asked.n_gpus, asked.days, asked.seq_len or 4096
    if not n and not days:
        raise BadInput("n_gpus must be given, or --days to find how many")
    if n and days and tokens:
        raise BadInput("tokens must be left out where --n-gpus and --days are given: they say how many")
    if asked.config:
        if asked.params:
            raise BadInput("config must be left out where --params is given")
        config = read_config(asked.config)
        shape = shape_of(config | {"seq_len": asked.seq_len or config["seq_len"]})
        options["global_batch_size"] = options["global_batch_size"] or config["global_batch_size"]
        tokens = tokens or config["steps"] * config["global_batch_size"] * config["seq_len"]
    elif asked.params:
        shape = shape_for(asked.params, length)
        tokens = tokens or optimal_tokens(shape.num_params)
    elif n and days:
        # C = seconds x GPUs x peak x an MFU of 0.4; the plan of the best model for C says what it really takes
        N, tokens = compute_optimal(days * 86400 * n * gpu.peak_flops(options["precision"]) * 0.4)
        return "parameters and tokens", shape_for(N, length), tokens, n
    else:
        raise BadInput("params must be given, or both --n-gpus and --days")

    def tokens_in(days, n):
        return days * 86400 * plan(shape, gpu, n, top=1, **options)[0]["tokens_per_s"]

    if n:
        return ("tokens", shape, tokens_in(days, n), n) if days else ("time", shape, tokens, n)
    least = tokens * shape.flops_per_token() / days / 86400 / max(gpu.peak, gpu.fp8)
    sizes = sorted((1, 2, 4, 8, *(gpu.node * k * 2**i for i in range(14) for k in (2, 3))))
    for n in (n for n in sizes if n > least):
        with contextlib.suppress(BadInput):                             # it does not fit, or does not divide
            if tokens <= tokens_in(days, n):
                return "GPUs", shape, tokens, n
    raise BadInput(f"days must be enough for some number of GPUs up to {sizes[-1]:,}, got {days:g}")


def command_plan(argv):
    parser = Parser("plan", "The best layouts of a training run, and its time. With --days: its tokens; without "
                    "--n-gpus, its GPUs; without a model, its parameters and tokens.")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--config", help="a config of train.py, in the place of --params")
    for name, (lowest, highest, whole, text) in NUMBERS.items():
        parser.add_argument(flag_of(name), dest=name, type=number(lowest, highest, whole), help=text)
    parser.add_argument("--zero", type=int, choices=range(4))
    parser.add_argument("--recompute", choices=("none", "selective", "full"))
    parser.add_argument("--pp-schedule", dest="schedule", choices=("gpipe", "1f1b", "interleaved", "zb"))
    parser.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction)
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked = parser.parse_args(argv)
    gpu = find_gpu(asked.gpu)
    if asked.price:
        gpu = replace(gpu, price=asked.price, source="as given")
    options = {name: getattr(asked, name) for name in (*FIELDS, "global_batch_size")}
    options["precision"] = resolve_precision(asked.precision, gpu)
    found, shape, tokens, n = solve_for(asked, gpu, options)
    rows = plan(shape, gpu, n, top=5, tokens=tokens, config_name=asked.config, **options)
    result = {"solved_for": found, "parameters": shape.num_params, "tokens": tokens, "n_gpus": n,
              "flops": tokens * shape.flops_per_token(), "shape": dataclasses.asdict(shape), "layouts": rows}
    print(json.dumps(result) if asked.json else describe(result))


def describe(result: dict) -> str:
    """The plan as text: the bill of the best layout, then the layouts as a table."""
    rows = [("#", "dp", "tp", "pp", "zero", "recompute", "micro", "schedule", "GB", "s per step", "MFU", "tokens/s",
             "days", "MWh", "t CO2", "$")]
    for i, row in enumerate(result["layouts"], 1):
        layout = Layout(**row["layout"])
        sums = (row[name] for name in ("tokens_per_s", "days", "energy_mwh", "tco2", "dollars"))
        rows.append((f" {i}", layout.dp, layout.tp, layout.pp, layout.zero, layout.recompute, layout.micro_batch_size,
                     "-" if layout.pp == 1 else layout.schedule + f" {layout.chunks}" * (layout.chunks > 1),
                     f"{row['memory_bytes']['total'] / 1e9:.1f}", f"{sum(row['seconds_per_step'].values()):.4g}",
                     f"{row['mfu']:.1%}",
                     *("-" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in sums)))
    first = result["layouts"][0]
    return (f"{describe_bill(first)}\n\nsolved for {result['solved_for']}; the best layouts, the first is the above\n\n"
            f"{columns(*rows)}\n\nfirst      {first['command']}")


COMMANDS = {"fit": command_fit, "plan": command_plan}
FLAGS = {*NUMBERS, "gpu", "config", "precision", "plot", "holdout"}


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
        print(f"scaling.py: {flag_of(first) if first in FLAGS else first} {rest}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("scaling.py: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:                                            # | head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# ---- demo ------------------------------------------------------------------------------------------------------------

def demo():
    """The five questions in a few rows each, asserted. CPU, seconds."""
    def title(text):
        print(f"\n{text:<82} {'published':>11} | {'predicted':>11} |   error")

    def row(what, published, predicted, bound):
        """bound: of the relative error."""
        print(f"{what:<82} {published:>11,.5g} | {predicted:>11,.5g} | {predicted / published - 1:>+7.1%}")
        assert abs(predicted / published - 1) <= bound, what

    file = Path(__file__).with_name("tests") / "sweep_runs.csv"
    if file.exists():
        print(f"(1) how good will it be? (2) How large, for a budget? The runs of {file.name}")
        runs = read_runs(file)
        results = fit_all(runs, file.name) | {"holdout": holdout(runs, 1)}
        report(runs, results)
        loss, size = (results["holdout"]["rows"][0][name] for name in ("loss", "N_opt"))
        assert 1.07 < loss["predicted"] / loss["measured"] < 1.09 and 0.8 < size["predicted"] / size["measured"] < 1.2
        assert (abs(chinchilla_loss(*runs.T[:2], results["parametric"]) / runs[:, 2] - 1) < 0.07).all()
    else:
        print(f"(1), (2) need {file.parent.name}/{file.name}, our own runs; python scaling.py fit RUNS.csv fits yours")
    print("\n(2) tokens per parameter that are best, by a law")
    for C, name, law, x in ((1e18, "Besiroglu", BESIROGLU, 26), (5.76e23, "Besiroglu", BESIROGLU, 18),
                            (1e26, "Besiroglu", BESIROGLU, 16), (5.76e23, "Hoffmann", HOFFMANN, 59)):
        best = compute_optimal(C, law)
        print(f"C = {C:.3g} FLOPs, {name}'s constants: {best.D / best.N:.1f}")
        assert round(best.D / best.N) == x

    print("\n(3) what did known models leave on the table?")
    rows = [("", "N", "D", "FLOPs", "D/N", "best D/N", "N/N_opt", "loss by the law", "left", "compute that would do")]
    for name, (N, D) in MODELS.items():
        r = assess(N, D)
        rows.append((name, f"{N:.3g}", f"{D:.3g}", f"{r['C']:.3g}", f"{r['ratio']:.1f}", f"{r['best_ratio']:.1f}",
                     f"{r['N_over_N_opt']:.2f}", f"{r['loss']:.4f}", f"{r['left']:.4f}", f"{r['enough']:.1%}"))
        assert r["left"] > 0
    print(columns(*rows))
    r = assess(*MODELS["GPT-3 175B"])                                                         # the first page's numbers
    assert (round(r["C"] / 1e21), round(r["ratio"], 1), round(r["enough"], 2)) == (315, 1.7, 0.61)
    assert (round(r["N_opt"] / 1e9), round(r["D_opt"] / 1e10)) == (53, 99)
    assert round(assess(*MODELS["Llama 3.1 8B"])["N_over_N_opt"], 1) == 0.1

    title("(4) what does a layout take?")
    # Korthikanti 2022, equation 4, table 5; ZeRO, table 1; Megatron, table 1; Llama 3, table 4
    a100, h100 = GPUS["a100"], GPUS["h100"]
    gpt22, gpt1000 = (Shape(51200, 2048, layers, heads, heads, width // heads, width, 4 * width, "layernorm", "learned",
                            "gelu", True, True) for layers, width, heads in ((48, 6144, 64), (128, 25600, 160)))
    layout = Layout(1, 8, micro_batch_size=4, recompute="selective")
    row("22 B, tp 8, selective: bytes that a layer keeps", 2.139e8,
        layer_bytes(gpt22, layout, MEGATRON_2022, "selective"), 1e-3)
    row("   seconds per iteration", 1.10, estimate(gpt22, a100, layout, MEGATRON_2022)["step"], 0.15)
    states = list(memory(gpt22, Layout(64, zero=1), MEGATRON_2021, 0).values())[:3]
    row("7.5 B, ZeRO stage 1, dp 64: GB of parameters, gradients, states", 31.4,
        sum(states) / gpt22.num_params * 7.5, 0.025)
    best, = plan(gpt1000, a100, 3072, tp=8, pp=64, zero=0, recompute="full", program=MEGATRON_2021, top=1,
                 sequence_parallel=False, global_batch_size=3072)
    row("1,008 B, 3,072 A100, tp 8, pp 64: TFLOP/s per GPU, with what runs again", 163, best["hardware_tflops"], 0.15)
    llama = Shape(128256, 8192, 126, 128, 8, 128, 16384, 53248)
    row("405 B, 16,384 H100, tp 8, pp 16, dp 128: TFLOP/s per GPU", 400, max(estimate(
        llama, h100, Layout(128, 8, 16, "interleaved", v, 1, 16, 1), LLAMA_3)["tflops"] for v in range(2, 8)), 0.15)

    title("(5) what does it cost?")                                                                  # LLaMA, table 15
    row("LLaMA 65B, 1,022,362 A100-hours: MWh", 449, cost(a100, 1, 1_022_362 * 3600)["energy_mwh"], 0.003)
    print("\n7 B, 140 B tokens on 64 H100s, 1024 sequences of 4096 tokens: train.py's best layout")
    seven = Shape(32000, 4096, 32, 32, 32, 128, 4096, 11008)
    first, = plan(seven, "h100", 64, global_batch_size=1024, tokens=1.4e11, top=1)
    print(describe_bill(first))
    bytes_per_parameter = sum(list(memory(seven, Layout(), Program(), 0).values())[:3]) / seven.num_params
    assert round(first["flops"] / 1e21, 1) == 6.5 and round(first["flops"] / 64 / h100.peak / 3600) == 28
    assert 0.5 < first["mfu"] < 0.6 and bytes_per_parameter * 7 == 126 and round(64 * h100.peak / 1e15) == 63


if __name__ == "__main__":
    sys.exit(main())
