"""Scaling: five questions to ask before a training run, and what answers them.

(1) How good will it be? A law gives the loss L, the mean -ln p of a token (nats), of N parameters after D tokens:

    L(N) = (N_c / N)^alpha_N,   L(D) = (D_c / D)^alpha_D            Kaplan 2020: straight lines in logs
    L(N, D) = E + A / N^alpha + B / D^beta                          Chinchilla (Hoffmann 2022)

E is the entropy of text: no model gets below it. A / N^alpha is what a finite model misses. B / D^beta is what finite
data did not teach.

(2) How large, for a budget? Training costs C = 6 N D FLOPs. Per token, a weight is multiplied and added once forward (2
FLOPs) and twice backward (4): for the gradient of its input and for its own. Minimise L where 6 N D = C: one percent
more N leaves one percent less D. So at the best pair, N_opt and D_opt, one percent of either changes L equally:

    alpha A / N^alpha = beta B / D^beta          N_opt = G (C/6)^a,  D_opt = (C/6)^b / G
                                                 G = (alpha A / (beta B))^(1 / (alpha + beta))
                                                 a = beta / (alpha + beta),  b = alpha / (alpha + beta)

With the constants of Besiroglu 2024 (the default here) that is 26 tokens per parameter at 1e18 FLOPs, 18 at 5.76e23
(Gopher's, as Hoffmann counts), 16 at 1e26: "20 tokens per parameter". Hoffmann's constants, from the same runs, give 59
at 5.76e23, because that fit had stopped too early. Here a = 0.51. Kaplan 2020 found 0.73, because the models were small
and N did not count embeddings (Pearce 2024).

The constants come from runs: small models, trained at several budgets C. tests/sweep_runs.csv holds 21 runs of this
repository. There are three approaches, numbered as in Hoffmann's paper, here the plainest first. 2 and 1 find only
N_opt = k C^a and D_opt (by the law, k = G / 6^a), 3 finds all five constants:

    2  fit_isoflop     runs of one budget C: a parabola through loss(ln N). Its vertex is the best size N_opt(C)
    1  fit_envelope    one curve loss(C) per model size. At each C the lowest curve names the best size N_opt(C)
    3  fit_parametric  all five constants at once. ln L is a log-sum-exp: LSE(x, y, z) = ln(e^x + e^y + e^z), so
                       min sum_i Huber_delta(LSE(ln_E, ln_A - alpha ln N_i, ln_B - beta ln D_i) - ln L_i)
                       Huber is a square up to delta = 1e-3 and a straight line beyond it: outliers count little.

`holdout` hides the largest budgets from a fit and then asks the fit for them. These four functions stand below the
lecture. The lecture has the core of approach 2, `isoflop_plain`, and of approach 3, `minimise`.

(3) What did known models leave on the table? GPT-3 spent 3.15e23 FLOPs on 1.7 tokens per parameter. The law says that
53 billion parameters and 990 billion tokens would have cost the same and been better, and that GPT-3's own loss can be
had for 61 % of its compute. Llama 3.1 8B is a tenth of N_opt, on purpose: a model is used after its training, for 2 N
FLOPs per token. The more it is used, the smaller is the model that reaches the same loss most cheaply (Sardana 2024).

(4) What does a layout take? A parameter takes 18 bytes: 2 for the weight, 4 for its gradient, 4 for its float32 copy, 8
for AdamW's two moments. 7 billion take 126 GB, and an H100 has 80 GB. So a step is split over dp x tp x pp ranks, one
GPU each. A `Program` says what the training program keeps and sends. A `Layout` says how a step is split:

    dp  data parallel     copies of the model, each with its own sequences; their gradients are summed
    tp  tensor parallel   each layer's matrices are cut into tp parts, whose results are summed
    sequence parallelism  of norms and hidden states, which tp does not cut, each rank keeps 1/tp of the tokens
    pp  pipeline          the layers are cut into pp stages. A step's batch passes through in parts: micro-batches.
                          Stages wait at the start and at the end of a step: the bubble
    schedule              order of a pipeline's work. gpipe: all forward passes first. 1f1b: a forward and a backward in
                          turn. interleaved: a rank has several stages (chunks). zb (zero bubble): gradients of weights
                          are computed later, in the gaps
    zero 1, 2, 3          each dp copy keeps 1/dp of the optimizer states (1), of gradients too (2), of weights too (3)
    recompute             activations are computed again in backward, not kept. selective: attention's; full: a layer's

`memory`: weights, gradients, states, activations, buffers. `messages`: to one other rank, or in a group's collective. A
reduce-scatter leaves each rank a part of the sum, an all-gather gives each all parts, an all-reduce is both in turn.
`step_time`: products, the bubble, messages. A message sent while products run is hidden: it adds no time.

(5) What does it cost? 7 billion parameters on 140 billion tokens are 6.5e21 FLOPs: 6 for each weight that is multiplied
(the embedding is not), and attention's products on top (Shape.flops_per_token). 64 H100s do at most 6.3e16 per second.
So it takes at least 28 hours. A good program needs nearly twice that. The share of the peak that it reaches is its MFU,
model FLOPs utilisation. FLOPs that recompute adds do not count. `bill` adds up one
layout: time, energy, CO2, dollars. `plan` estimates the time of every layout that fits, and bills the fastest of each
(tp, pp, zero). train.py prints the same bill before it starts.

    N, D, C, L      parameters, training tokens, FLOPs, loss in nats per token
    law             the constants: {"E", "A", "B", "alpha", "beta"}
    (S, n, 5)       shape of an array in the fits: S laws, n runs, 5 constants
    n               elsewhere: tokens of a micro-batch on a dp rank, micro_batch_size x seq_len
    psi             parameters of one rank
    h, H, T         n_embd, n_head, seq_len
    m               micro_batches: how many a dp rank computes per step
    p, v, t         pp, chunks (stages per rank), tp
    c               share of the peak that matrix products reach

Below the lecture: details of the planner - fits of real runs - names - text - command line - demo. Not in this file:
context and expert parallelism, failures, reading data. tests/published.py: published rows, and the planner's answers.

Sources: Hoffmann 2022 (arXiv:2203.15556), fitted again: Besiroglu 2024 (2404.10102); Kaplan 2020 (2001.08361); Pearce
2024 (2406.12907); Sardana 2024 (2401.00448); Narayanan 2021 (2104.04473); Korthikanti 2022 (2205.05198); Rajbhandari
2020, ZeRO (1910.02054); Qi 2023 (2401.10241); Llama 3 (2407.21783); FlashAttention-2 (2307.08691); GPUs, links,
products: stas00/ml-engineering (2026-08-22).

run: python scaling.py                 python scaling.py fit RUNS.csv --holdout 1
     python scaling.py plan --params 7e9 --tokens 1.4e11 --gpu h100 --n-gpus 64
"""

import argparse
import contextlib
import csv
import dataclasses
import itertools
import json
import math
import re
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np


class BadInput(ValueError):
    """One line: what (an argument, a column), the rule, the value. On the command line also exit code 2."""


# ---- (1) how good will it be? ----------------------------------------------------------------------------------------

# the first law: Kaplan 2020, table 2, where N and D are fitted together. N_c non-embedding parameters, D_c tokens
KAPLAN = {"alpha_N": 0.076, "N_c": 6.4e13, "alpha_D": 0.103, "D_c": 1.8e13}


def kaplan_loss(N=math.inf, D=math.inf, law=KAPLAN):
    """L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D, nats per token. (Kaplan 2020, 1.5) D = inf gives
    (N_c / N)^alpha_N, a straight line in logs; N = inf gives (D_c / D)^alpha_D."""
    return ((law["N_c"] / N) ** (law["alpha_N"] / law["alpha_D"]) + law["D_c"] / D) ** law["alpha_D"]


# L = E + A / N^alpha + B / D^beta.  Hoffmann 2022, approach 3, with the digits of the paper's TeX source (its PDF
# rounds them)
HOFFMANN = {"E": 1.693371, "A": 406.4003, "B": 410.7222, "alpha": 0.33917084, "beta": 0.2849083}
# Besiroglu 2024: the same runs read off the paper's figure, 240 of them, converged
BESIROGLU = {"E": 1.81686, "A": 482.00572, "B": 2085.4342, "alpha": 0.34781, "beta": 0.36585}


def chinchilla_loss(N, D, law=BESIROGLU):
    """L = E + A / N^alpha + B / D^beta, nats per token; N, D numbers or arrays."""
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


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


def optimal_tokens(N, law=BESIROGLU) -> float:
    """D of the budget for which N parameters are best: N = G (C/6)^a solved for C / (6 N)."""
    a, G = exponents(law)
    return (N / G) ** (1 / a) / N


# ---- (1) (2) where the constants come from ---------------------------------------------------------------------------

def isoflop_plain(groups) -> tuple:
    """Approach 2 in its plainest form -> (a, k) of N_opt = k C^a. groups: a list with one array of runs per budget; a
    run is a row (N, D, loss, C)."""
    ln_N_opt = []
    for group in groups:
        N, _, loss, _ = np.transpose(group)
        c2, c1, _ = np.polyfit(np.log(N), loss, 2)                     # loss = c2 x^2 + c1 x + c0,  x = ln N
        ln_N_opt.append(-c1 / (2 * c2))                                # the vertex
    a, ln_k = np.polyfit([np.log(group[0][3]) for group in groups], ln_N_opt, 1)
    return a, math.exp(ln_k)


# Approach 3. Outliers hardly move its objective. But it is nearly flat along two valleys: where A and alpha grow
# together, so that A / N^alpha stays, and where B and beta do. There L-BFGS, Hoffmann's optimizer, stops early. So:
#
# - ln N and ln D are counted from their means. Then alpha no longer changes A / N^alpha in the middle of the runs.
# - The optimizer is damped least squares: `minimise`.
# - It has many starts. Starts and means are in law_and_resamples(), below the lecture.

DELTA = 1e-3                                  # of Huber's loss, in ln L: deviations beyond 0.1 % count linearly


def residuals(theta, runs):
    """theta (S, 5) = ln_E, ln_A, ln_B, alpha, beta of S laws; runs = ln N, ln D, ln L, (n, 3) or for each law its own
    (S, n, 3) -> r (S, n), how far ln L_predicted is above ln L; J (S, n, 5) = dr / dtheta."""
    ln_E, ln_A, ln_B, alpha, beta = theta.T[:, :, None]
    ln_N, ln_D, ln_L = np.moveaxis(runs, -1, 0)
    terms = np.stack(np.broadcast_arrays(ln_E, ln_A - alpha * ln_N, ln_B - beta * ln_D))
    predicted = np.logaddexp.reduce(terms)
    # each term's share of the predicted loss; also the derivative of `predicted` by that term
    q_E, q_A, q_B = np.exp(terms - predicted)
    return predicted - ln_L, np.stack((q_E, q_A, q_B, -q_A * ln_N, -q_B * ln_D), -1)


def huber(r):
    """r (S, n) -> (S,), the sum of r^2 / 2 up to |r| = DELTA, and of the straight line that goes on from there."""
    return np.where(abs(r) <= DELTA, r * r / 2, DELTA * (abs(r) - DELTA / 2)).sum(1)


def minimise(theta, runs, iterations):
    """Improve S laws, in at most `iterations` steps -> theta (S, 5), sum of Huber(r) (S,). Shapes as in residuals().

    Least squares with weights that are chosen anew in each step: W = min(1, DELTA / |r|) at the present r. With this W
    held fixed, the parabola W r^2 / 2 + constant touches Huber's loss at the present r and is nowhere below it. So a
    step that lowers the parabola lowers Huber's loss.

        (hessian + mu tr(hessian) I) step = J^T W r,  hessian = J^T W J,  theta <- theta - step     r, J: of residuals()

    This hessian leaves out second derivatives of r (Gauss-Newton). mu is the damping (Levenberg). It falls after a step
    that helped and rises after one that did not. When mu is 1e4, steps are too short to help.
    """
    theta, mu, (r, J) = theta.copy(), np.full(len(theta), 1e-2), residuals(theta, runs)
    for _ in range(iterations):
        JtW = J.swapaxes(1, 2) * (DELTA / np.maximum(np.abs(r), DELTA))[:, None]
        hessian, gradient = JtW @ J, JtW @ r[..., None]
        damping = mu * hessian.trace(axis1=1, axis2=2)
        theta_new = theta - np.linalg.solve(hessian + damping[:, None, None] * np.eye(5), gradient)[..., 0]
        r_new, J_new = residuals(theta_new, runs)
        better = huber(r_new) < huber(r)
        theta[better], r[better], J[better] = theta_new[better], r_new[better], J_new[better]
        mu = np.where(better, np.maximum(mu / 5, 1e-12), np.minimum(5 * mu, 1e4))
        if (mu == 1e4).all():
            break
    return theta, huber(r)


# ---- (3) what did known models leave on the table? -------------------------------------------------------------------

# parameters, training tokens: Brown 2020 (arXiv:2005.14165); Rae 2021 (2112.11446); Hoffmann 2022; Touvron 2023
# (2302.13971, 2307.09288); Grattafiori 2024 (2407.21783) and the Llama 3.1 model card
MODELS = {"GPT-3 175B": (175e9, 300e9), "Gopher 280B": (280e9, 300e9), "Chinchilla 70B": (70e9, 1.4e12),
          "LLaMA 7B": (6.7e9, 1e12), "LLaMA 65B": (65.2e9, 1.4e12), "Llama 2 7B": (6.7384e9, 2e12),
          "Llama 2 70B": (68.977e9, 2e12), "Llama 3.1 8B": (8.0303e9, 15e12), "Llama 3.1 405B": (405.85e9, 15.6e12)}


def compute_for_loss(loss, law=BESIROGLU):
    """FLOPs that reach a loss if N and D are chosen best. Infinite at E and below.

        L_opt(C) = E + K (C/6)^(-alpha a),  K = A G^-alpha + B G^beta     (both terms fall alike: alpha a = beta b)
    """
    a, G = exponents(law)
    K = law["A"] * G ** -law["alpha"] + law["B"] * G ** law["beta"]
    return 6 * (K / (loss - law["E"])) ** (1 / (law["alpha"] * a)) if loss > law["E"] else math.inf


def assess(N, D, law=BESIROGLU) -> dict:
    """How far a run is from the best of its budget, by a law: tokens per parameter, N / N_opt, loss. "loss_gap": this
    loss minus the best one. "enough_compute": the share of its compute that would have been enough for its loss."""
    C, loss = 6 * N * D, chinchilla_loss(N, D, law)
    best = compute_optimal(C, law)
    return {"C": C, "N_opt": best.N, "D_opt": best.D, "D/N": D / N, "best D/N": best.D / best.N,
            "N/N_opt": N / best.N, "loss": loss, "loss_gap": max(0.0, loss - chinchilla_loss(*best, law)),
            "enough_compute": compute_for_loss(loss, law) / C}


# ---- (4) what a layout takes: shapes ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shape:
    """The fields of model.ModelConfig that cost something, and the parameters and FLOPs that follow."""

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

    q = cached_property(lambda self: self.n_head * self.head_dim)                           # width of all query heads
    kv = cached_property(lambda self: self.n_kv_head * self.head_dim)                                # of all key heads
    num_up = cached_property(lambda self: 2 if self.mlp == "swiglu" else 1)    # matrices n_embd -> n_ff: gate and up
    # parameters of all matrices of a layer: q, k, v, o; the MLP's ups and its down
    matrix_params = cached_property(lambda self: self.n_embd * (2 * (self.q + self.kv) + (self.num_up + 1) * self.n_ff))
    # vectors of one norm: its weight and perhaps a bias
    norm_vectors = cached_property(lambda self: 2 if self.norm == "layernorm" and self.bias else 1)
    # a layer's parameters that tp does not split: norms, biases of o and down. tp splits the other biases
    unsplit = cached_property(lambda self: 2 * ((self.norm_vectors + self.bias) * self.n_embd
                                                + self.qk_norm * self.head_dim))
    split_biases = cached_property(lambda self: self.bias * (self.q + 2 * self.kv + self.num_up * self.n_ff))
    # Layout() is one rank, which holds the whole model (rank_params: below)
    num_params = cached_property(lambda self: rank_params(self, Layout(), 0).count)

    def flops_per_token(self, recompute: str = "none") -> int:
        """Forward, backward, and what runs again. All T x T scores of attention count, also those that the causal mask
        hides, as in PaLM's MFU (arXiv:2204.02311, appendix B)."""
        # forward: scores, and probabilities x values: 2 products of 2 T FLOPs per element of q. Backward: twice as many
        attention = 4 * self.q * self.seq_len
        recomputed = {"none": 0, "selective": attention, "full": 2 * self.matrix_params + attention}[recompute]
        return self.n_layer * (6 * self.matrix_params + 3 * attention + recomputed) + 6 * self.vocab_size * self.n_embd

    def muon_flops(self) -> list[int]:
        """Of each of a layer's matrices in a step of Muon: five times 4 m^2 n + 2 m^3, for its five Newton-Schulz steps
        (zero.py). Here m <= n are the sides of the matrix."""
        widths = [self.q, self.q, self.kv, self.kv] + [self.n_ff] * (self.num_up + 1)           # the other side: n_embd
        return [5 * (4 * m * m * n + 2 * m**3) for m, n in (sorted((width, self.n_embd)) for width in widths)]


@dataclass(frozen=True)
class Layout:
    """How a step is split over ranks. Fields are train.py's flags, except micro_batches, which follows from the batch.
    schedule is --pp-schedule. chunks is --pp-chunks, stages per rank: 1 unless interleaved."""

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

    norm_split = property(lambda self: self.tp if self.sequence_parallel else 1)        # parts of norms and residuals
    ranks = property(lambda self: self.dp * self.tp * self.pp)
    batch = property(lambda self: self.dp * self.micro_batch_size * self.micro_batches)         # sequences per step


@dataclass(frozen=True)
class Program:
    """What differs between training programs. The defaults are train.py's on a GPU. Nothing here is fitted to speeds:
    only GPU.matmul is."""

    item: int = 2                   # bytes of a weight, and of a linear layer's input and result, as they are stored
    residual: int = 4               # ... in the residual stream and norms
    gradient: int = 4               # ... of a gradient
    master_weights: bool = True     # weights below 4 bytes have a float32 copy, which the optimizer updates
    flash: bool = True              # False: attention keeps two (T, T) matrices per head: softmax, and what mask or
                                    # dropout makes of it
    dropout: bool = False           # masks of dropout are kept, a byte per number
    document_mask: bool = False     # a token sees its own document only: a (T, T) mask per sequence, for all layers
    fused_norm: bool = True         # False: RMSNorm keeps x / rms as well as x
    muon: bool = False              # the layers' matrices are updated by zero.py's Muon, all else by Adam
    # True: of the tp messages that layer_collectives counts in backward, two per layer take time. The others are hidden
    # by gradients of weights
    overlap_tp: bool = False
    overlap_dp: bool = True         # gradients travel during backward
    train_py: bool = True           # False: what is kept (all logits, say) and sent is as in the papers' programs

    # bytes of a number that is kept in float32 or better: Adam's moments, log-sum-exps, the loss's gradients
    sum_bytes = property(lambda self: max(4, self.item))
    # Adam's two moments, and the master
    states = property(lambda self: 2 * self.sum_bytes + 4 * (self.master_weights and self.item < 4))


MEGATRON_2021 = Program(residual=2, gradient=2, flash=False, dropout=True, overlap_dp=False, train_py=False)
MEGATRON_2022 = replace(MEGATRON_2021, overlap_tp=True)
LLAMA_3 = Program(residual=2, overlap_tp=True, train_py=False)


def layers_of(shape: Shape, layout: Layout, pp_rank: int) -> int:
    """How many layers a pipeline rank has. Stage s of n_stages begins with layer s * n_layer // n_stages; rank r has
    the stages r, r + pp, ..."""
    n_stages = layout.pp * layout.chunks
    return sum((s + 1) * shape.n_layer // n_stages - s * shape.n_layer // n_stages
               for s in range(pp_rank, n_stages, layout.pp))


RankParams = namedtuple("RankParams", "count unsplit")


def rank_params(shape: Shape, layout: Layout, pp_rank: int) -> RankParams:
    """Of one rank at place `pp_rank` of its pipeline, before ZeRO: how many parameters, how many of them tp does not
    split."""
    layers = layers_of(shape, layout, pp_rank)
    is_first, is_last = pp_rank == 0, pp_rank == layout.pp - 1
    # the embedding on the first rank, the head on the last; tied on one rank, they are one
    tables = is_first + is_last - (shape.tie_embeddings and layout.pp == 1)
    # the first rank has the learned positions, the last rank the last norm
    learned = is_first and shape.position == "learned"
    unsplit = layers * shape.unsplit + (learned * shape.seq_len + is_last * shape.norm_vectors) * shape.n_embd
    split = layers * (shape.matrix_params + shape.split_biases) + tables * shape.vocab_size * shape.n_embd
    return RankParams(split // layout.tp + unsplit, unsplit)


def table_params(shape: Shape, layout: Layout) -> int:
    """Parameters of a rank's part of the embedding, or of the head."""
    return shape.vocab_size // layout.tp * shape.n_embd


# ---- (4) machines ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GPU:
    """A row of the table below in FLOP/s, bytes, bytes/s, watts, dollars per hour."""

    name: str
    peak: float                    # dense bf16 (V100, T4: fp16) products
    fp8: float                     # 0: has none
    memory: float
    bandwidth: float               # of HBM, its memory
    link: float                    # what a rank sends in an all-reduce inside a node (NCCL's bus bandwidth)
    network: float                 # per GPU between nodes
    watts: float
    matmul: float                  # c
    fp32_slowdown: float           # peak / FLOP/s of products in float32
    price: float | None
    source: str                    # of the price
    node: int = 8                  # GPUs per node

    bf16 = property(lambda self: not self.name.startswith(("v100", "t4")))

    def peak_flops(self, precision: str) -> float:
        """FLOP/s that MFU is a share of: the precision's own."""
        fp32 = self.peak / self.fp32_slowdown
        return {"fp32": fp32, "tf32": self.peak / 2, "fp8": self.fp8}.get(precision) or self.peak


# - Peaks and 1/fp32 (how many times slower float32 is): the makers' data sheets.
# - Links: measured 235 of NVLink 3's 300 GB/s and 368 of NVLink 4's 450; of others 0.8 of the line rate (PCIe 4: 31,
#   PCIe 5: 63).
# - Network, Gb/s per GPU: A100, L40S 200 (A100: Narayanan 2021, section 5); V100, T4, L4, RTX 100; rest 400 (Llama 3).
# - c: the share of the peak that large products reach in a long run: hot, at the power limit, between other kernels.
#   Two rows are fitted: a100 on six rows of Megatron's table 1, h100 on one row of Llama 3's table 4 (dp 64; the demo
#   shows dp 128). A benchmark of nothing but products reaches a larger share: a100's c is 0.88 of it and h100's 0.79,
#   on average 0.83. So other rows have c = 0.83 x the benchmark's share, 0.78 is assumed where nobody measured it;
#   h200 has h100's.
GPU_TABLE = """
name             TFLOP/s     fp8  GB   GB/s  link network watts    c  1/fp32    $  source of the price
v100                 125       0  32    900   120    12.5   300 0.65       8 0.79  Lambda, 16 GB, skypilot-catalog v8
a100                 312       0  80   2000   235    25     400 0.712     16 1.50  assumed by Sardana 2024
a100-pcie            312       0  80   1940    25    25     300 0.67      16    -  no price known: give --price
h100                 989    1979  80   3350   368    50     700 0.635   14.8 2.69  RunPod secure, 2026-05-22
h100-pcie            756    1513  80   2000    50    50     350 0.65    14.8 2.79  RunPod secure, 2026-05-22
h20                  148     296  96   4000   368    50     400 0.65     3.4    -  no price known: give --price
h200                 989    1979 141   4800   368    50     700 0.635   14.8 3.50  Nebius on demand, skypilot-catalog v8
b200                2250    4500 180   8000   720    50    1000 0.64      30 5.50  Nebius, skypilot-catalog v8
b300                2250    4500 288   8000   720    50    1000 0.65      30    -  no price known: give --price
gb200               2500    5000 186   8000   720    50    1200 0.61      31    -  no price known: give --price
mi300x            1307.4  2614.9 192   5300   358    50     750 0.50       8 1.71  TensorWave, undated
mi355x              2500    5000 288   8000   428    50    1400 0.50      16    -  no price known: give --price
l40s                 362     733  48    864    25    25     350 0.65       4 1.55  Nebius, skypilot-catalog v8
l4                   121   242.5  24    300    25    12.5    72 0.65       4    -  no price known: give --price
rtx4090            165.2   330.3  24   1008    25    12.5   450 0.65       2 0.25  Hyperbolic, skypilot-catalog v7
rtx3090               71       0  24    936    25    12.5   350 0.65       2    -  no price known: give --price
t4                    65       0  16    320    12.5  12.5    70 0.65       8    -  no price known: give --price
"""


def table_row(line: str) -> GPU:
    name, *figures, price, source = line.split(maxsplit=11)
    units = 1e12, 1e12, 1e9, 1e9, 1e9, 1e9, 1, 1, 1
    return GPU(name, *(float(x) * unit for x, unit in zip(figures, units, strict=True)),
               None if price == "-" else float(price), source)


GPUS = {gpu.name: gpu for gpu in map(table_row, GPU_TABLE.strip().splitlines()[1:])}
LINE_RATE_SHARE = 0.8                         # share of a network's line rate that messages reach, as in the links
NVLINK_HOP, NETWORK_HOP = 3.4e-6, 14e-6       # latency of a ring's hop, seconds: NCCL's own tables, src/graph/tuning.cc
FLASH_SHARE = 0.6                       # FlashAttention-2, figure 4: 187 of A100's 312 TFLOP/s, T 2048, head_dim 128
USABLE_MEMORY = 0.95                          # share of a GPU's memory. CUDA, NCCL and fragmentation take the rest
PRECISIONS = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2}                     # bytes of a stored weight


# ---- (4) memory ------------------------------------------------------------------------------------------------------

BUCKETS = 25e6, 10e6, 10e6                    # bytes of gradients per message, by ZeRO stage: parallel.py's, zero.py's


def layer_bytes(shape: Shape, layout: Layout, program: Program, recompute: str) -> float:
    """What a layer keeps from forward to backward, of one micro-batch on one rank. Of Megatron's GPT, in bytes
    (Korthikanti 2022, equations 1 to 6), with n tokens, width h, H heads:

        recompute none         n h (10 + 24/t + 5 H T/(h t))
        recompute selective    n h (10 + 24/t)
        recompute full         2 n h

    Sequence parallelism divides the 10 and the 2 by t. With flash attention 5 H T/(h t) becomes 4 H/(h t): one
    log-sum-exp per row and head. The code counts the same tensors one by one, so also for SwiGLU, grouped heads and
    RMSNorm.
    """
    h, n = shape.n_embd, layout.micro_batch_size * shape.seq_len
    if recompute == "full":                                                             # its input
        return n * h * program.residual / layout.norm_split
    # not split by tp: two norms; their outputs, which linear layers read; two masks of dropout
    unsplit = 2 * (norm_bytes(shape.norm, h, program) + h * (program.item + program.dropout))
    # split by tp: q, k, v, o's input; the ups and what the activation makes of them (SwiGLU: silu(gate), the product)
    split = (2 * shape.q + 2 * shape.kv + 2 * shape.num_up * shape.n_ff) * program.item
    if shape.qk_norm:
        split += (shape.n_head + shape.n_kv_head) * norm_bytes("rmsnorm", shape.head_dim, program)
    if recompute == "none":
        # flash attention: a row's log-sum-exp. Else, for each of T keys: softmax, dropout's mask, softmax x mask
        row = program.sum_bytes if program.flash else (2 * program.item + program.dropout) * shape.seq_len
        split += shape.n_head * row
    if program.train_py and program.item < program.residual:
        # each linear after a norm (q, k, v; the ups) keeps its own copy of the norm's output, in `item` bytes. One per
        # norm is counted above, so 3 + num_up - 2 are left. With tp the linears after a norm share one.
        # "selective" also keeps q and k after the rotation, before their cast
        unsplit += (layout.tp == 1) * (1 + shape.num_up) * h * program.item
        rotated = recompute == "selective" and shape.position == "rope"
        split += rotated * (shape.q + shape.kv) * (program.residual - program.item)
    return n * (unsplit / layout.norm_split + split / layout.tp)


def stored(layout: Layout, pp_rank: int) -> float:
    """Micro-batches whose activations rank r = pp_rank holds at once: GPipe m, 1F1B and zb p - r (never more than m).
    Interleaved, on the first rank: p (1 + (p-1)/(p v)). A micro-batch in one of a rank's v stages counts 1 / v."""
    p, m, v = layout.pp, layout.micro_batches, layout.chunks
    # interleaved: forward passes of a chunk that end before the first backward. 2 for each later rank, p for each chunk
    # but the last (Megatron-LM's order), and one in turn with that backward; each is 1/v of a rank
    if v > 1:
        return min(m * v, (p - 1 - pp_rank) * 2 + (v - 1) * p + 1) / v
    return m if layout.schedule == "gpipe" else min(m, p - pp_rank)


def memory(shape: Shape, layout: Layout, program: Program, pp_rank: int) -> dict:
    """Bytes of a rank at place `pp_rank` of its pipeline: {"parameters", "gradients", "states", "activations",
    "buffers"}. (Rajbhandari 2020, figure 1; Korthikanti 2022, section 4)"""
    psi, zero, dp = rank_params(shape, layout, pp_rank).count, layout.zero, layout.dp
    # weight, states: bytes per parameter. Below, what ZeRO splits is divided by dp
    weight, states = program.item, program.states
    if zero == 3 and program.train_py and program.master_weights:      # train.py keeps shards of the masters alone
        weight, states = program.sum_bytes, 2 * program.sum_bytes
    layers, alive = layers_of(shape, layout, pp_rank), stored(layout, pp_rank)
    one_moment = program.muon * layers * shape.matrix_params / layout.tp * program.sum_bytes   # Adam has two, Muon one
    # what the layers of a micro-batch share: train.py's cos and sin (of each chunk), or positions; a mask
    T, rope = shape.seq_len, shape.position == "rope"
    shared = program.train_py * T * (layout.chunks * shape.head_dim * program.residual if rope else 8 * (pp_rank == 0))
    shared += program.document_mask * layout.micro_batch_size * T * T * program.item
    activations = alive * (layers * layer_bytes(shape, layout, program, layout.recompute) + shared)
    if pp_rank == layout.pp - 1:                # the loss's backward follows its forward at once, but not with GPipe
        activations += end_bytes(shape, layout, program) * (alive if layout.schedule == "gpipe" else 1)
    # below the lecture: norm_bytes, end_bytes (last norm and loss), buffer_bytes (sums, gathered layers), and
    # waiting_bytes (what zero bubble keeps for the gradients of weights; 0 in other schedules)
    return {"parameters": psi * weight / (dp if zero >= 3 else 1),
            "gradients": psi * program.gradient / (dp if zero >= 2 else 1),
            "states": (psi * states - one_moment) / (dp if zero >= 1 else 1),
            "activations": activations + waiting_bytes(shape, layout, program, pp_rank),
            "buffers": buffer_bytes(shape, layout, program, pp_rank)}


def fullest(shape: Shape, layout: Layout, program: Program) -> dict:
    """memory() of the rank that needs most: the last, or the first of those that have equally many layers, since an
    earlier rank stores more micro-batches."""
    layers = [layers_of(shape, layout, r) for r in range(layout.pp)]
    ranks = {layout.pp - 1, *map(layers.index, layers)}                     # index: the first rank with so many layers
    return max((memory(shape, layout, program, r) for r in ranks), key=lambda parts: sum(parts.values()))


# ---- (4) messages ----------------------------------------------------------------------------------------------------

def layer_collectives(layout: Layout, program: Program) -> dict:
    """{pass: (all-gathers, reduce-scatters)} of one layer over tp. Forward: attention and MLP each gather their input
    and sum their result, by a reduce-scatter. Backward: a gather becomes a sum, a sum a gather. Without sequence
    parallelism a gather and a sum together are one all-reduce. With it, backward also gathers the two inputs again.
    (Korthikanti 2022, section 4.2)"""
    # a layer that runs again in backward ends with a sum that is not needed: Megatron-LM repeats it, train.py does not
    sp, scatters = layout.sequence_parallel, 1 if program.train_py else 2
    recomputed = (2 if sp else scatters, scatters) if layout.recompute == "full" else (0, 0)
    return {"forward": (2, 2), "backward": (2 + 2 * sp, 2), "recomputed": recomputed}


def messages(shape: Shape, layout: Layout, program: Program, pp_rank: int) -> dict:
    """What rank `pp_rank` of a pipeline sends and receives in a step: {(axis, collective): (calls, bytes)}.

    axis     dp, tp, pp; "world": all ranks; "ends": first and last stage, which share a tied weight
    calls    None where the number depends on the size of buckets or of the loss's chunks
    bytes    the payload, all ranks' parts together. With ZeRO ranks' shards differ in size: the mean, without padding
    """
    # the loss, the squared norm, whether a rank was asked to stop. Muon's messages: below the lecture
    sent = {("world", "all_reduce"): (1, 3 * 8)}
    for axis_messages in (dp_messages, tp_messages, muon_messages, pp_messages):
        sent |= axis_messages(shape, layout, program, pp_rank)
    return {key: (calls, size) for key, (calls, size) in sent.items() if size and layout.ranks > 1}


def dp_messages(shape: Shape, layout: Layout, program: Program, pp_rank: int) -> dict:
    """Gradients are summed: without ZeRO by an all-reduce, with ZeRO by a reduce-scatter, after which weights are
    gathered. ZeRO 1: once per step. 2: gradients of each micro-batch. 3: also weights, before each pass of each."""
    if layout.dp == 1:
        return {}
    psi, m = rank_params(shape, layout, pp_rank).count, layout.micro_batches
    count_bytes = 8                                                     # an all-reduce of the number of targets
    if layout.zero == 0:
        return {("dp", "all_reduce"): (None, count_bytes + psi * program.gradient)}
    scatters, gathers = {1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[layout.zero]
    # ZeRO 3: a weight that embedding and head share is gathered by each
    gathered = psi + table_params(shape, layout) * (layout.zero == 3 and shape.tie_embeddings and layout.pp == 1)
    return {("dp", "all_reduce"): (None, count_bytes),
            ("dp", "reduce_scatter"): (None, scatters * psi * program.gradient),
            ("dp", "all_gather"): (None, gathers * gathered * program.item)}


def tp_messages(shape: Shape, layout: Layout, program: Program, pp_rank: int) -> dict:
    """Each layer gathers and sums hidden states (`layer_collectives`), with `item` bytes per number. So does the head,
    once per micro-batch. The embedding too, with `residual` bytes per number. of_step: (calls, bytes) in a step."""
    if layout.tp == 1:
        return {}
    layers, m = layers_of(shape, layout, pp_rank), layout.micro_batches
    is_first, is_last = pp_rank == 0, pp_rank == layout.pp - 1
    n = layout.micro_batch_size * shape.seq_len

    def of_step(per_layer):
        calls = layers * per_layer + is_last
        size = n * shape.n_embd * (calls * program.item + is_first * program.residual)
        return m * (calls + is_first), m * size

    passes = layer_collectives(layout, program).values()
    gathers, sums = of_step(sum(gather for gather, _ in passes)), of_step(sum(scatter for _, scatter in passes))
    # the loss needs three numbers per token: max, sum of exponentials, the target's logit
    reduced = m * is_last * 3 * n * program.sum_bytes
    # gradients of parameters that tp does not split, but whose gradients it computes in parts. ZeRO: those of its shard
    unsplit = rank_params(shape, layout, pp_rank).unsplit
    partial = unsplit if layout.sequence_parallel else layers * 2 * shape.qk_norm * shape.head_dim
    reduced += partial * program.gradient / (layout.dp if layout.zero else 1)
    if layout.sequence_parallel:
        return {("tp", "all_gather"): gathers, ("tp", "reduce_scatter"): sums, ("tp", "all_reduce"): (None, reduced)}
    return {("tp", "all_reduce"): (None, reduced + sums[1])}


def pp_messages(shape: Shape, layout: Layout, program: Program, pp_rank: int) -> dict:
    """Hidden states to the next stage, their gradients to the one before; the gradient of a weight that the first and
    the last stage share."""
    if layout.pp == 1:
        return {}
    is_first, is_last = pp_rank == 0, pp_rank == layout.pp - 1
    calls = layout.micro_batches * (2 * layout.chunks - is_first - is_last)
    # Megatron sends 1/t of a hidden state even where each tp rank has all of it (Narayanan 2021, section 4.1)
    parts = layout.norm_split if program.train_py else layout.tp
    size = calls * layout.micro_batch_size * shape.seq_len * shape.n_embd * program.residual // parts
    shared = table_params(shape, layout) * (shape.tie_embeddings and (is_first or is_last))
    return {("pp", "send"): (calls, size), ("pp", "recv"): (calls, size),
            ("ends", "all_reduce"): (1, shared * program.gradient / (layout.dp if layout.zero else 1))}


def bytes_sent(messages: dict, layout: Layout) -> dict:
    """{axis: bytes that the rank sends in a step}, each collective as a ring."""
    ring_sizes, sent = {"world": layout.ranks, "dp": layout.dp, "tp": layout.tp, "ends": 2}, {}
    for (axis, collective), (_, payload) in messages.items():
        R = ring_sizes.get(axis, 1)
        # in a ring of R ranks, R - 1 times each sends 1/R of the payload to the next; an all-reduce does that twice
        factor = {"all_reduce": 2 * (R - 1) / R, "send": 1, "recv": 0}.get(collective, (R - 1) / R)
        sent[axis] = sent.get(axis, 0) + factor * payload
    return sent


def ring_seconds(gpu: GPU, ranks: int, size: float, stride: int = 1, message_count: float = 1) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes (all parts together) in `message_count` messages.
    tp's ranks are neighbours, dp's tp apart, pp's farthest apart: `stride` decides how many share a node. Between
    nodes, the networks of the ring's GPUs in a node add up."""
    inside = max(1, min(ranks, gpu.node // stride))
    nodes = math.ceil(ranks / inside)
    rate = gpu.link if nodes == 1 else min(gpu.link, inside * LINE_RATE_SHARE * gpu.network)
    # (R-1)/R bytes / bandwidth + hops x latency
    hops = (ranks - nodes) * NVLINK_HOP + (nodes - 1) * NETWORK_HOP
    return (ranks - 1) / ranks * size / rate + message_count * hops


# ---- (4) seconds -----------------------------------------------------------------------------------------------------

def bubble(layout: Layout, forward: float, backward: float, weight: float) -> float:
    """Seconds a pipeline rank waits in a step: a micro-batch's time in the p - 1 others; with v chunks, 1/v of it.
    zb: no `weight` in it; min(m, p) - 1 run meanwhile. forward, backward (gradients of inputs), weight (of weights):
    seconds of a micro-batch in a rank's layers. (Narayanan 2021, section 2.2; Qi 2023, table 2, appendix H)"""
    if layout.schedule == "zb":
        return (layout.pp - 1) * (forward + backward) - (min(layout.micro_batches, layout.pp) - 1) * weight
    return (layout.pp - 1) / layout.chunks * (forward + backward + weight)


def layer_seconds(shape: Shape, gpu: GPU, layout: Layout, program: Program, speed: float) -> tuple:
    """Seconds of a micro-batch on a tp rank, without messages -> (forward, backward, weights), head. The first three
    are of one layer: forward; gradients of inputs, with what runs again; gradients of weights. The head takes `head`
    seconds in each of the three.

        product    2 x rows x columns x inner / (c peak) + bytes of all three matrices / HBM's bandwidth
        the rest   5 x what a layer keeps / HBM: forward writes and reads it; backward reads it, reads a gradient and
                   writes one
    """
    b, T, h, n_ff, t = layout.micro_batch_size, shape.seq_len, shape.n_embd, shape.n_ff, layout.tp
    n, vocab_shard = b * T, shape.vocab_size / t
    attention_speed = min(speed, 1)                         # speed: relative to bf16. fp8 does not speed up attention

    def product_seconds(rows, columns, inner, speed=speed):
        size = program.item * (rows * columns + columns * inner + rows * inner)
        return 2 * rows * columns * inner / (gpu.matmul * gpu.peak * speed) + size / gpu.bandwidth

    linear = (product_seconds(n, (shape.q + 2 * shape.kv) / t, h) + product_seconds(n, h, shape.q / t)
              + product_seconds(n, shape.num_up * n_ff / t, h) + product_seconds(n, h, n_ff / t))
    if program.flash:
        # forward's two products are 4 n T q FLOPs, of which causality hides half; backward has five: q k^T runs again
        attention = 2 * n * T * shape.q / t / (FLASH_SHARE * gpu.peak * attention_speed)
        backward_ratio, scores = 2.5, 0.0
    else:
        heads, backward_ratio = b * shape.n_head / t, 2
        attention = heads * (product_seconds(T, T, shape.head_dim, attention_speed)
                             + product_seconds(T, shape.head_dim, T, attention_speed))
        # seconds to write, or to read, the (T, T) matrices once: for recompute, since layer_bytes counts them already
        scores = heads * (2 * program.item + program.dropout) * T * T / gpu.bandwidth
    # seconds to read, or to write, once what a layer keeps
    touch = layer_bytes(shape, layout, program, "none") / gpu.bandwidth
    recomputed = {"none": 0, "selective": attention + 2 * scores, "full": linear + attention + 2 * touch}[
        layout.recompute]
    # the head's product; softmax reads 4 bytes and writes 2 of each logit
    head = product_seconds(n, vocab_shard, h) + 6 * n * vocab_shard / gpu.bandwidth
    return (linear + attention + 2 * touch, linear + backward_ratio * attention + 3 * touch + recomputed, linear), head


def dp_seconds(gpu: GPU, layout: Layout, program: Program, psi: int, layers: int, forward, backward) -> float:
    """Seconds of dp's messages in a step that nothing hides. psi: parameters of a rank. forward, backward (here with
    the gradients of weights): seconds of a micro-batch, next to which messages travel. Gradients are summed during
    backward. ZeRO 1 and 2 gather parameters after the update, ZeRO 3 before each pass. Messages: one per layer with
    ZeRO 3; else one per bucket; in the papers' programs one."""
    message_count = layers if layout.zero == 3 else max(
        1, program.train_py * psi * program.gradient / BUCKETS[layout.zero])
    scatter, gather = (ring_seconds(gpu, layout.dp, psi * size, layout.tp, message_count)
                       for size in (program.gradient, program.item))

    def exposed(message, compute):
        return max(0.0, message - program.overlap_dp * compute)

    m = layout.micro_batches
    return {0: exposed(2 * scatter, backward),
            1: exposed(scatter, backward) + gather,
            2: m * exposed(scatter, backward) + gather,
            3: m * (exposed(scatter + gather, backward) + exposed(gather, forward))}[layout.zero]


def step_time(shape: Shape, gpu: GPU, layout: Layout, program: Program, speed: float = 1.0) -> dict:
    """Seconds of a step: {"compute", "tp" (of the layers), "pp", "dp", "bubble", "update"}. Hidden messages take none.

        step       (m + (p-1)/v) x a micro-batch on the slowest rank + the update + messages that nothing hides
                   (zb: see bubble)

    speed: of the linear layers' products, relative to bf16's."""
    of_layer, head = layer_seconds(shape, gpu, layout, program, speed)
    m, size = layout.micro_batches, layout.micro_batch_size * shape.seq_len * shape.n_embd   # numbers of a hidden state
    slowest = max(range(layout.pp), key=lambda r: (
        layers_of(shape, layout, r) * sum(of_layer) + 3 * head * (r == layout.pp - 1)))
    layers, is_last = layers_of(shape, layout, slowest), slowest == layout.pp - 1
    # seconds of a micro-batch on the slowest rank. compute, tp: (forward, backward, weights). pp: of one pass
    compute = [layers * seconds + head * is_last for seconds in of_layer]
    ring = ring_seconds(gpu, layout.tp, size * program.item)
    tp_forward, tp_backward, tp_recomputed = (sum(x) * ring for x in layer_collectives(layout, program).values())
    if program.overlap_tp:
        tp_backward = 2 * ring                                                     # two are left, the rest is hidden
    tp = layers * tp_forward, layers * (tp_backward + tp_recomputed), 0.0
    rate, delay = (LINE_RATE_SHARE * gpu.network, NETWORK_HOP) if layout.ranks > gpu.node else (gpu.link, NVLINK_HOP)
    parts = layout.norm_split if program.train_py else layout.tp
    pp = (layout.pp > 1) * layout.chunks * (size * program.residual / parts / rate + delay)
    forward, backward, weight = (sum(x) for x in zip(compute, tp, (pp, pp, 0.0), strict=True))

    psi = rank_params(shape, layout, slowest).count
    # reads the gradient and the states, writes the states and the weight
    update = psi * (2 * program.states + program.gradient + program.item) / gpu.bandwidth / (
        layout.dp if layout.zero else 1)
    if program.muon:                          # products in float32, shared out by whole matrices; and the exchange
        flops = shape.muon_flops()
        busiest = max(layers * sum(flops) / (layout.dp * layout.tp), max(flops))
        _, sent = muon_messages(shape, layout, program, slowest).get(("world", "send"), (0, 0))
        update += busiest / (gpu.matmul * gpu.peak / gpu.fp32_slowdown) + sent / rate
    return {"compute": m * sum(compute), "tp": m * sum(tp), "pp": m * 2 * pp,
            "dp": dp_seconds(gpu, layout, program, psi, layers, forward, backward + weight),
            "bubble": bubble(layout, forward, backward, weight), "update": update}


def estimate(shape: Shape, gpu: GPU, layout: Layout, program: Program = Program(), precision: str = "bf16") -> dict:
    """What a step costs: {"seconds": by part, "step": their sum, "tokens_per_s", "mfu" (of the precision's own peak),
    and per GPU "tflops", "hardware_tflops" (with what runs again)}."""
    peak = gpu.peak_flops(precision)
    seconds = step_time(shape, gpu, layout, program, peak / gpu.peak)
    step = sum(seconds.values())
    rate = layout.batch * shape.seq_len / step
    tflops, hardware = (rate / layout.ranks * shape.flops_per_token(x) / 1e12 for x in ("none", layout.recompute))
    return {"seconds": seconds, "step": step, "tokens_per_s": rate, "mfu": tflops * 1e12 / peak, "tflops": tflops,
            "hardware_tflops": hardware}


# ---- (5) what it costs -----------------------------------------------------------------------------------------------

PUE, KG_CO2_PER_KWH = 1.1, 0.385              # building / GPUs; kg CO2 per kWh (LLaMA, arXiv:2302.13971, section 6)


def cost(gpu: GPU, n_gpus: int, seconds: float) -> dict:
    """{"gpu_hours", "energy_mwh", "tco2", "dollars" (None without a price)}. Energy is hours x watts x PUE: all GPUs at
    full power, as in LLaMA's bill."""
    hours = n_gpus * seconds / 3600
    energy = hours * gpu.watts * PUE / 1e6
    return {"gpu_hours": hours, "energy_mwh": energy, "tco2": energy * KG_CO2_PER_KWH,
            "dollars": gpu.price and hours * gpu.price}


# the smallest of the runs that the law was fitted to: parameters (Hoffmann 2022, table A9); tokens (its least budget,
# 6e18 FLOPs, with 1 B parameters). For smaller ones the law is a guess
FITTED_FROM = {"N": 44e6, "D": 1e9}


def bill(shape: Shape, layout: Layout, program: Program, *, tokens: float, gpu: str | GPU | None = None,
         precision: str = "bf16", rank_flops: float | None = None) -> dict:
    """What a run of `tokens` tokens takes: a dict, ready for JSON. Most names explain themselves. The others:

    law             what assess() says; "best_tokens" for this size; "extrapolated": whether N or D is smaller than what
                    the law was fitted to. Then "loss" and "loss_gap" are None
    bubble          its share of a step, if forward and both parts of backward take equally long
    memory_bytes    of the fullest rank; bytes_sent: {axis: bytes per step of the rank that sends most}
    With a GPU, also seconds, energy and cost. With rank_flops, the FLOP/s that a rank was measured to reach, seconds
    without messages.
    """
    N, flops = shape.num_params, tokens * shape.flops_per_token()
    law = assess(N, tokens) | {"best_tokens": optimal_tokens(N),
                               "extrapolated": N < FITTED_FROM["N"] or tokens < FITTED_FROM["D"]}
    if law["extrapolated"]:
        law |= {"loss": None, "loss_gap": None}
    parts = {name: round(x) for name, x in fullest(shape, layout, program).items()}
    bubble_seconds, busy_seconds = bubble(layout, 1, 1, 1), 3 * layout.micro_batches
    sent = [bytes_sent(messages(shape, layout, program, pp_rank), layout) for pp_rank in range(layout.pp)]
    answer = {"parameters": N, "embedding_parameters": shape.vocab_size * shape.n_embd, "tokens": tokens,
              "tokens_per_parameter": tokens / N, "tokens_per_step": layout.batch * shape.seq_len,
              "flops_per_token": shape.flops_per_token(), "flops": flops, "law": law,
              "layout": dataclasses.asdict(layout), "bubble": bubble_seconds / (busy_seconds + bubble_seconds),
              "layers_per_rank": [layers_of(shape, layout, r) for r in range(layout.pp)],
              "memory_bytes": parts | {"total": sum(parts.values())},
              "bytes_sent": {axis: round(max(x.get(axis, 0) for x in sent)) for axis in sorted(set().union(*sent))}}
    if gpu is not None:
        gpu = find_gpu(gpu)
        estimated = estimate(shape, gpu, layout, program, precision)
        seconds = tokens / estimated["tokens_per_s"]
        answer |= {"gpu": gpu.name, "seconds_per_step": estimated["seconds"], "seconds": seconds,
                   "days": seconds / 86400,
                   **{name: estimated[name] for name in ("tokens_per_s", "mfu", "tflops", "hardware_tflops")},
                   **cost(gpu, layout.ranks, seconds), "dollars_per_gpu_hour": gpu.price, "price_source": gpu.source}
    elif rank_flops:
        seconds = flops / rank_flops / layout.ranks / (1 - answer["bubble"])
        answer |= {"rank_flops": rank_flops, "seconds": seconds, "days": seconds / 86400}
    return answer


# ---- (5) all layouts, ranked -----------------------------------------------------------------------------------------

def plan(config, gpu: str | GPU, n_gpus: int, *, global_batch_size: int | None = None, precision: str = "bf16",
         program: Program | None = None, tokens: float | None = None, top: int | None = None, **fixed) -> list[dict]:
    """The layouts of a training step that fit, fastest first, the best of each (tp, pp, zero): bills, each with
    "command", which train.py takes.

    config             a Shape, a dict or an object with ModelConfig's fields
    global_batch_size  sequences per step; default: of 4 M or half a million tokens
    program            default: train.py in this precision
    tokens             of the run; default: the best number by the law
    fixed              fields of Layout that are given: tp=8, recompute="full", ...
    Raises BadInput if an argument is wrong, if no layout is possible and if none fits.
    """
    shape, gpu = shape_of(config), find_gpu(gpu)
    precision = precision_of_gpu(precision, gpu)
    tokens = optimal_tokens(shape.num_params) if tokens is None else tokens
    # 4 M tokens (Llama 2), below 1 B parameters 0.5 M (GPT-3, table 2.1), in sequences, a multiple of the GPUs
    multiple = n_gpus * fixed.get("micro_batch_size", 1)
    default_batch = multiple * max(1, round((2**22 if shape.num_params >= 1e9 else 2**19) / shape.seq_len / multiple))
    batch, program = global_batch_size or default_batch, program or Program(item=PRECISIONS[precision])
    possible = list(layouts(shape, gpu, n_gpus, batch, **fixed))
    if not possible:
        raise BadInput(f"global_batch_size {batch} on {n_gpus} GPUs must be split evenly by some dp x tp x pp that "
                       f"train.py takes for {shape.n_head} heads ({shape.n_kv_head} of keys), {shape.n_layer} layers "
                       f"and {fixed}; none does")
    needs, usable = [fullest(shape, layout, program) for layout in possible], USABLE_MEMORY * gpu.memory
    fitting = [layout for layout, parts in zip(possible, needs, strict=True) if sum(parts.values()) <= usable]
    if not fitting:
        parts = min(needs, key=lambda parts: sum(parts.values()))
        raise BadInput(f"a layout must fit into {usable / 1e9:.1f} GB of {gpu.name}, the smallest on {n_gpus} GPUs "
                       f"needs {amounts(parts)} per GPU")
    steps, best = math.ceil(tokens / batch / shape.seq_len), {}
    for layout in sorted(fitting, key=lambda layout: estimate(shape, gpu, layout, program, precision)["step"]):
        best.setdefault((layout.tp, layout.pp, layout.zero), layout)        # keeps the first, which is the fastest
    return [bill(shape, layout, program, tokens=tokens, gpu=gpu, precision=precision)
            | {"command": command(shape, layout, precision, gpu, steps)} for layout in list(best.values())[:top]]


# ---- the lecture ends here -------------------------------------------------------------------------------------------

# ---- details of the planner ------------------------------------------------------------------------------------------

def norm_bytes(norm: str, width: int, program: Program) -> int:
    """What a norm keeps of one row: its input; x / rms, if it is an RMSNorm that is not fused; and, which the papers do
    not count, 1 / rms, or LayerNorm's mean and 1 / deviation."""
    rms = norm == "rmsnorm"
    statistics = program.train_py * max(4, program.residual) * (1 if rms else 2)
    return width * program.residual * (2 if rms and not program.fused_norm else 1) + statistics


def end_bytes(shape: Shape, layout: Layout, program: Program) -> float:
    """What the last norm and the loss keep of a micro-batch: their inputs, and the logits in float32. train.py's loss
    computes its gradients in forward, a chunk of logits at a time. It keeps two gradients (of its input, of the head's
    weight) instead of the logits. With sequence parallelism also this rank's part of the input, which nothing reads."""
    n, h, vocab_shard = layout.micro_batch_size * shape.seq_len, shape.n_embd, shape.vocab_size / layout.tp
    norm, x = n * norm_bytes(shape.norm, h, program) / layout.norm_split, n * h * program.item / layout.norm_split
    if program.train_py:
        return norm + x * (layout.norm_split > 1) + program.sum_bytes * (n * h + vocab_shard * h)
    return norm + x + 4 * n * vocab_shard


def buffer_bytes(shape: Shape, layout: Layout, program: Program, pp_rank: int) -> float:
    """Gradients that are being summed, gathered layers, the layer that runs again. psi: parameters of the rank."""
    psi, dp, zero = rank_params(shape, layout, pp_rank).count, layout.dp, layout.zero
    recomputed = layer_bytes(shape, layout, program, "none") * (layout.recompute == "full")
    if not zero:                      # several micro-batches: the running sum, next to one micro-batch's gradients
        return recomputed + (dp > 1 and layout.micro_batches > 1) * psi * program.gradient
    # ZeRO 3 gathers one layer, or the embedding, at a time; ZeRO 1 and 2 send one bucket at a time
    layer = (shape.matrix_params + shape.split_biases) / layout.tp + shape.unsplit
    table = table_params(shape, layout) * (pp_rank in (0, layout.pp - 1))
    bucket = max(layer, table) if zero == 3 else min(BUCKETS[zero] / program.gradient, psi)
    # gradients: a bucket that is being summed, and the rank's share of it; from ZeRO 2 on, also two buckets as
    # backward left them. ZeRO 3: the gathered weights of this layer and of the next
    gradients = bucket * (1 + 1 / dp) * program.gradient + (zero >= 2) * 2 * bucket * program.item
    return recomputed + (dp > 1) * gradients + (zero == 3) * 2 * bucket * program.item


def waiting_bytes(shape: Shape, layout: Layout, program: Program, pp_rank: int) -> float:
    """Zero bubble computes weight gradients later. Until then pairs wait: the input of a linear layer, the gradient of
    its result. min(m, p) micro-batches have activations (`stored` counts them) or such pairs."""
    if layout.schedule != "zb":
        return 0
    n, h, t = layout.micro_batch_size * shape.seq_len, shape.n_embd, layout.tp
    layers, m, p = layers_of(shape, layout, pp_rank), layout.micro_batches, layout.pp
    # inputs: h of q, k, v and of the ups, q/t of o, n_ff/t of down. Gradients: (q + 2 kv)/t, num_up n_ff/t, h and h
    per_layer = n * program.item * (4 * h + (2 * shape.q + 2 * shape.kv + (shape.num_up + 1) * shape.n_ff) / t)
    return (min(m, p) - stored(layout, pp_rank)) * layers * per_layer


def muon_messages(shape: Shape, layout: Layout, program: Program, pp_rank: int) -> dict:
    """Each matrix of a layer goes to its owner, one of R ranks of the stage, and from there to all that hold a part, or
    a copy (zero.py). The bytes are the mean over the stage's ranks. With ZeRO they are an upper bound: a matrix that
    lies in few shards has less to send."""
    R = layout.dp * layout.tp
    if not program.muon or R == 1:
        return {}
    matrices = layers_of(shape, layout, pp_rank) * shape.matrix_params
    share = 1 / (R if layout.zero else layout.tp)                            # of each matrix, which a rank holds
    size = matrices * ((1 - share) + share * (R - 1)) / R * program.sum_bytes       # to the owners, from the owners
    return {("world", "send"): (None, size), ("world", "recv"): (None, size)}


def layouts(shape: Shape, gpu: GPU, n_gpus: int, batch: int, **fixed):
    """The layouts of n_gpus ranks to compare, all of which train.py accepts: tp inside a node, 1 to 8 chunks, 1, 2, 4,
    ... 32 sequences per micro-batch. GPipe only if `fixed` asks for it: 1F1B takes equal time and less memory."""
    divisors = [n for n in range(1, n_gpus + 1) if n_gpus % n == 0]
    choices = {"tp": [n for n in divisors if n <= gpu.node], "pp": divisors, "micro_batch_size": (1, 2, 4, 8, 16, 32),
               "schedule": ("1f1b", "zb", "interleaved"), "chunks": range(1, 9), "zero": range(4),
               "recompute": ("none", "selective", "full"), "sequence_parallel": (True,)}
    if unknown := fixed.keys() - {"dp", *choices}:
        raise BadInput(f"fixed must name {', '.join(['dp', *choices])}, got {', '.join(sorted(unknown))}")
    choices |= {name: (x,) for name, x in fixed.items() if name != "dp"}
    for tp, pp, micro_batch, schedule, chunks, zero, recompute, sp in itertools.product(*choices.values()):
        dp, left_over = divmod(n_gpus, tp * pp)
        if left_over or dp != fixed.get("dp", dp) or batch % (dp * micro_batch):
            continue
        m = batch // (dp * micro_batch)
        widths = (shape.n_head, shape.n_kv_head, shape.n_ff, shape.vocab_size, shape.seq_len if sp else tp)
        if (all(x % tp == 0 for x in widths)                               # what tp splits, it splits evenly
                and pp * chunks <= shape.n_layer                           # a stage has a layer
                and (pp > 1 or schedule == "1f1b")                         # one stage needs no other schedule
                and (chunks > 1) == (schedule == "interleaved")
                and not (chunks > 1 and m % pp)                            # interleaving: pp micro-batches at a time
                and not (schedule == "zb" and recompute != "none")         # zb keeps the inputs of weight gradients
                and (dp > 1 or zero == 0 or "zero" in fixed)):             # ZeRO over one rank is no ZeRO
            yield Layout(dp, tp, pp, schedule, chunks, micro_batch, m, zero, recompute, sp)


# ---- fits of real runs -----------------------------------------------------------------------------------------------

def as_runs(runs, labels=None) -> np.ndarray:
    """Rows (N, D, loss) or (N, D, loss, C) -> (n, 4) float64. Without a stated budget, C is 6 N D. BadInput names the
    first value that is not finite and positive, and its row. labels: a name per row; default "row 1", ..."""
    x = np.array(runs, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] not in (3, 4):
        raise BadInput(f"runs must be rows of (N, D, loss) or (N, D, loss, C), got shape {x.shape}")
    if x.shape[1] == 3:
        x = np.column_stack((x, 6 * x[:, 0] * x[:, 1]))
    wrong = np.argwhere(~(np.isfinite(x) & (x > 0)))
    if len(wrong):
        row, column = wrong[0]
        raise BadInput(f"{labels[row] if labels else f'row {row + 1}'}: {('N', 'D', 'loss', 'C')[column]} must be "
                       f"finite and above 0, got {x[row, column]:g}")
    return x


def distinct(x) -> int:
    """How many different values, to a millionth."""
    return len(np.unique(np.round(np.log(x), 6)))


def budgets(runs) -> list[np.ndarray]:
    """The runs (n, 4) of each budget, in the order of C.

    - If each value of C occurs three times or more on average, the values of C are the budgets.
    - Else a budget ends where the next larger C is more than 1.3 times as large. But if any step inside a budget is
      above 1.15, the runs are scattered: they have no budgets.
    - A budget whose C differ by a factor of 1.5 or more, or that has fewer than three sizes, is left out.
    """
    runs = as_runs(runs)
    runs = runs[np.argsort(runs[:, 3], kind="stable")]
    steps, few_values = np.diff(np.log(runs[:, 3])), 3 * distinct(runs[:, 3]) <= len(runs)
    is_end = steps > (1e-6 if few_values else math.log(1.3))
    if not few_values and (steps[~is_end] > math.log(1.15)).any():
        return []
    groups = np.split(runs, np.flatnonzero(is_end) + 1)
    return [group for group in groups if np.ptp(np.log(group[:, 3])) < math.log(1.5) and distinct(group[:, 0]) > 2]


Vertex = namedtuple("Vertex", "C N D loss")


def parabola(group) -> Vertex | None:
    """The best N of one budget's runs, by a parabola through loss(ln N). None without three sizes, or where the vertex
    is not between the smallest and the largest: then the budget has no best size inside."""
    (ln_N, ln_D, _, ln_C), loss = np.log(group.T), group[:, 2]
    if distinct(group[:, 0]) < 3:
        return None
    c2, c1, c0 = np.polyfit(ln_N, loss, 2)                              # loss = c2 x^2 + c1 x + c0,  x = ln N
    x = -c1 / (2 * c2) if c2 > 0 else math.inf                          # the vertex
    if not ln_N.min() <= x <= ln_N.max():
        return None
    # D at the vertex, by a parabola too: 6 N D need not be the stated C
    ln_D = np.polyval(np.polyfit(ln_N, ln_D, 2), x)
    return Vertex(math.exp(ln_C.mean()), math.exp(x), math.exp(ln_D), c0 - c1 * c1 / (4 * c2))


def power_law(C, N, D, loss) -> dict:
    """What all three approaches look for: {"a", "b", "k_N", "k_D"} of N_opt = k_N C^a and D_opt = k_D C^b. Here by
    straight lines, ln N = ln k_N + a ln C and ln D = ln k_D + b ln C, through points (C, N, D): "points"."""
    a, ln_k_N = np.polyfit(np.log(C), np.log(N), 1)
    b, ln_k_D = np.polyfit(np.log(C), np.log(D), 1)
    points = [{"C": C, "N": N, "D": D, "loss": L} for C, N, D, L in np.stack((C, N, D, loss), 1).tolist()]
    return {"a": float(a), "b": float(b), "k_N": math.exp(ln_k_N), "k_D": math.exp(ln_k_D), "points": points}


def intervals(draws: dict) -> dict:
    """{name: values of many fits} -> {name: [2.5 %, 97.5 %]}; None where an end is infinite."""
    with np.errstate(all="ignore"):
        ends = {name: np.percentile(values, (2.5, 97.5)).tolist() for name, values in draws.items()}
    return {name: pair if np.isfinite(pair).all() else None for name, pair in ends.items()}


def bootstrap(fit_groups, groups, times) -> dict:
    """{"a", "b", "k_N", "k_D": arrays} of `times` fits. Each fit is to a resample: every group is drawn from itself,
    with replacement, at its own size. {} if most draws support no fit."""
    rng, fits = np.random.default_rng(0), []
    for _ in range(times):
        with contextlib.suppress(BadInput):
            fits.append(fit_groups([group[rng.integers(len(group), size=len(group))] for group in groups]))
    if len(fits) < max(2, times / 2):
        return {}
    return {name: np.array([fit[name] for fit in fits]) for name in ("a", "b", "k_N", "k_D")}


def isoflop(groups) -> dict:
    """power_law() through the vertices of the budgets' parabolas."""
    vertices = list(filter(None, map(parabola, groups)))
    if len(vertices) < 2:
        raise BadInput("isoflop: needs at least 2 budgets of 3 or more sizes with the best inside, got "
                       f"{len(vertices)} of {len(groups)} groups of equal budget")
    return power_law(*np.array(vertices).T)


def fit_isoflop(runs, *, times=200) -> dict:
    """Approach 2, the plainest: {"a", "b", "k_N", "k_D": N_opt = k_N C^a, D_opt = k_D C^b, "points": the vertices of
    the budgets' parabolas, "budgets": how many, "without_budget": runs in none of those, "intervals"}.

    Even without noise the vertex is off, because loss(ln N) is not symmetric: it is steeper on one side of N_opt, a
    parabola is not. For sizes spread evenly in ln N, from N_opt / w to N_opt w, ln N of the vertex is off by about
    (alpha - beta) ln(w)^2 / 10. That is the same at every budget, so k_N and k_D are wrong and a is not. If w, or the
    middle of the sizes, changes with C, a is wrong too.
    """
    groups = budgets(runs)
    return isoflop(groups) | {"budgets": len(groups), "without_budget": len(runs) - sum(map(len, groups)),
                              "intervals": intervals(bootstrap(isoflop, groups, times))}


def envelope(groups) -> dict:
    """power_law() through the lowest curve at each C of a grid. A C is left out if its lowest curve is that of the
    smallest or of the largest size tried there: a better size may lie beyond. groups: each size's runs, in order."""
    C = np.concatenate(groups)[:, 3]
    grid, curves = np.linspace(*np.log([C.min(), C.max()]), 400), []
    for group in groups:
        ln_C, run_to_C = np.unique(np.log(group[:, 3]), return_inverse=True)
        if len(ln_C) > 1:
            # runs of the same N and C count as one: their mean
            ln_D, ln_loss = (np.bincount(run_to_C, np.log(y)) / np.bincount(run_to_C) for y in group.T[1:3])
            curves.append((group[0, 0], np.interp(grid, ln_C, ln_D),
                           np.interp(grid, ln_C, ln_loss, left=np.inf, right=np.inf)))
    if len(curves) < 3:
        raise BadInput(f"envelope: needs at least 3 values of N with runs of 2 or more budgets, got {len(curves)}")
    N, ln_D, ln_loss = map(np.array, zip(*curves, strict=True))         # (sizes,); (sizes, 400) twice
    lowest, has_loss = ln_loss.argmin(0), np.isfinite(ln_loss)
    # at each C of the grid, the index of the smallest and of the largest size that has a loss there
    smallest, largest = has_loss.argmax(0), len(N) - 1 - has_loss[::-1].argmax(0)
    inside = np.flatnonzero((smallest < lowest) & (lowest < largest))
    best = lowest[inside]
    if distinct(N[best]) < 2:
        raise BadInput("envelope: needs at least 2 sizes that are best where smaller and larger ones were tried, got "
                       f"{distinct(N[best])}")
    return power_law(np.exp(grid[inside]), N[best], np.exp(ln_D[best, inside]), np.exp(ln_loss[best, inside]))


def fit_envelope(runs, *, times=200) -> dict:
    """Approach 1: {"a", "b", "k_N", "k_D", "points", "intervals"}. Each size N has a curve loss(C): a line in logs from
    run to run, or from point to point of one training curve. envelope() looks for the lowest. "points" shows one point
    per size, the one of the largest C."""
    runs = as_runs(runs)
    size = np.round(np.log(runs[:, 0]), 6)
    groups = [runs[size == s] for s in np.unique(size)]
    result = envelope(groups)
    last_point_by_size = {point["N"]: point for point in result["points"]}
    return result | {"points": list(last_point_by_size.values()),
                     "intervals": intervals(bootstrap(envelope, groups, times))}


def law_of(theta, center) -> dict:
    """theta (..., 5), in logs centred on `center` -> the law in units of N and D, and its N_opt = k_N C^a,
    D_opt = k_D C^b."""
    ln_E, ln_A, ln_B, alpha, beta = np.moveaxis(theta, -1, 0)
    E, A, B = np.exp(np.clip((ln_E, ln_A + alpha * center[0], ln_B + beta * center[1]), -700, 700))
    law = {"E": E, "A": A, "B": B, "alpha": alpha, "beta": beta}
    with np.errstate(all="ignore"):                  # a resample may give a law without an optimum (alpha <= 0)
        a, k_N = exponents(law)[0], compute_optimal(1.0, law).N
        return law | {"a": a, "b": 1 - a, "k_N": k_N, "k_D": 1 / (6 * k_N)}


def law_and_resamples(runs, times) -> tuple:
    """The law of all runs, {"E": float, ..., "objective"}; the laws of `times` resamples, {"E": array, ...} or {}.
    Raises BadInput for runs that cannot tell five constants from each other."""
    runs = as_runs(runs)
    (N, D, loss), logs = runs.T[:3], np.log(runs[:, :3])
    pairs = len(np.unique(np.round(logs[:, :2], 6), axis=0))
    if pairs < 6 or distinct(N) < 3 or distinct(D) < 3 or distinct(loss) < 2:
        raise BadInput("a law of 5 constants needs at least 6 pairs (N, D), 3 values of N, 3 of D and 2 losses, got "
                       f"{pairs}, {distinct(N)}, {distinct(D)} and {distinct(loss)}")
    if np.corrcoef(logs[:, 0], logs[:, 1])[0, 1] > 1 - 1e-9:
        raise BadInput("D must not be a positive power of N, or A / N^alpha and B / D^beta are one: vary D at the same "
                       "N")
    # with ln N and ln D counted from their means, ln_A and ln_B are logs of the terms in the middle of the runs
    center = np.array((*logs[:, :2].mean(0), 0.0))
    logs -= center
    # starts: E is a share of the lowest loss. The median loss minus E is split: s for A's term, 1 - s for B's
    lowest, median, rates = loss.min(), np.median(loss), (0.05, 0.2, 0.5, 1.0, 2.0)
    starts = np.array([(math.log(E), math.log(s * (median - E)), math.log((1 - s) * (median - E)), alpha, beta)
                       for E in (0.01 * lowest, 0.5 * lowest, 0.95 * lowest)
                       for s in (0.1, 0.5, 0.9) for alpha in rates for beta in rates])
    theta, f = minimise(starts, logs, 60)                                           # all starts, 60 steps
    theta, f = minimise(theta[f.argsort()[:24]], logs, 2000)                        # the best 24, to the end
    best = theta[f.argmin()]
    law = {name: float(x) for name, x in law_of(best, center).items()}
    if not (min(law["alpha"], law["beta"]) > 0 and 1e-99 < law["k_N"] < 1e99):
        raise BadInput("loss must fall with N and with D, or no N and D are best; the fitted law is "
                       + ", ".join(f"{name} {x:.3g}" for name, x in law.items()))
    draws = {}
    if times:
        drawn = np.random.default_rng(0).integers(len(runs), size=(times, len(runs)))
        draws = law_of(minimise(np.tile(best, (times, 1)), logs[drawn], 300)[0], center)
    return law | {"objective": float(f.min())}, draws


def fit_parametric(runs, *, times=200) -> dict:
    """Approach 3: {"E", "A", "B", "alpha", "beta", "a", "b", "k_N", "k_D", "objective": sum of Huber(ln L_predicted -
    ln L), "intervals": {"E": [2.5 %, 97.5 %] of `times` resamples, ...}}: a law for chinchilla_loss and
    compute_optimal. Raises BadInput."""
    law, draws = law_and_resamples(runs, times)
    return law | {"intervals": intervals(draws)}


def holdout(runs, k: int, *, times=200) -> dict:
    """Fit without the k largest budgets. Then predict the vertex of each: its loss by approach 3, its N by approach 2
    -> {"fitted_to": C of the largest budget that was fitted, "rows": [{"what": "loss" or "N_opt", "C",
    "times_larger": C / fitted_to, "predicted", "low" and "high": 95 % of resamples, "measured"}]}. A hidden budget
    whose best size is not inside has no row. Raises BadInput."""
    groups = budgets(runs)
    if not 1 <= k <= len(groups) - 2:
        raise BadInput(f"holdout must leave 2 budgets or more to fit, got {k} of {len(groups)}")
    fitted, hidden = groups[:-k], list(filter(None, map(parabola, groups[-k:])))
    if not hidden:
        raise BadInput("holdout must be of budgets with the best size inside, got none")
    fitted_to, rows = fitted[-1][:, 3].mean(), []
    # of approach 3 and of approach 2: the fit, then its resamples if there are any
    laws = [law for law in law_and_resamples(np.concatenate(fitted), times) if law]
    lines = [line for line in (isoflop(fitted), bootstrap(isoflop, fitted, times)) if line]
    for vertex in hidden:
        with np.errstate(all="ignore"):                                    # of resamples without an optimum
            losses = [chinchilla_loss(*compute_optimal(6 * vertex.N * vertex.D, law), law) for law in laws]
            sizes = [line["k_N"] * vertex.C ** line["a"] for line in lines]
        for what, measured, (predicted, *draws) in (("loss", vertex.loss, losses), ("N_opt", vertex.N, sizes)):
            lower, upper = draws and intervals({what: draws[0]})[what] or (None, None)
            rows.append({"what": what, "C": vertex.C, "times_larger": vertex.C / fitted_to,
                         "predicted": predicted, "low": lower, "high": upper, "measured": measured})
    return {"fitted_to": fitted_to, "rows": rows}


# ---- names -----------------------------------------------------------------------------------------------------------

def shape_of(config) -> Shape:
    """The Shape of a dict or an object with ModelConfig's fields."""
    values = config if isinstance(config, dict) else vars(config)
    return Shape(**{f.name: values[f.name] for f in dataclasses.fields(Shape) if f.name in values})


@cache
def shape_for(params: float, seq_len: int = 4096) -> Shape:
    """A Llama of about so many parameters: heads of 128 (below 8 heads: of 64), about width / 128 layers, an MLP of
    about 8/3 of the width, wider or narrower to meet the number of parameters."""
    vocab_size, shapes = 32000 if params >= 3e8 else 8192 if params >= 2e7 else 2048, {}
    for heads in (*range(1, 8), *range(8, 32, 4), *range(32, 513, 8)):
        h = heads * (128 if heads >= 8 else 64)
        in_layers = params - 2 * vocab_size * h
        layers = max(2, 2 * round(in_layers / (12 * h * h) / 2))
        n_ff = max(1, round((in_layers / layers - 4 * h * h) / (3 * h) / 128)) * 128
        shape = Shape(vocab_size, seq_len, layers, heads, heads, h // heads, h, n_ff)
        shapes[shape] = sum(weight * abs(math.log(x)) for weight, x in (
            (1, shape.num_params / params), (0.1, h / layers / 128), (0.5, n_ff / h * 3 / 8)))
    return min(shapes, key=shapes.get)


# GPUs as torch.cuda.get_device_name() prints them. Others are not in the table: an A100 with 40 GB, say, or an H100 NVL
DEVICES = {"Tesla V100-SXM2-32GB": "v100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100 80GB PCIe": "a100-pcie",
           "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H20": "h20", "NVIDIA H200": "h200",
           "NVIDIA B200": "b200", "NVIDIA B300": "b300", "NVIDIA GB200": "gb200", "AMD Instinct MI300X": "mi300x",
           "AMD Instinct MI355X": "mi355x", "NVIDIA L40S": "l40s", "NVIDIA L4": "l4", "Tesla T4": "t4",
           "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA GeForce RTX 3090": "rtx3090"}


def find_gpu(name: str | GPU) -> GPU:
    """A GPU by its key; a GPU is itself. Raises BadInput."""
    if not isinstance(name, GPU) and name not in GPUS:
        raise BadInput(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return name if isinstance(name, GPU) else GPUS[name]


def precision_of_gpu(name: str, gpu: str | GPU) -> str:
    """"auto" -> the GPU's 16 bits: bf16, before Ampere fp16. BadInput for a precision that the GPU lacks."""
    gpu = find_gpu(gpu)
    if name == "auto":
        return "bf16" if gpu.bf16 else "fp16"
    if name not in PRECISIONS or name == "fp8" and not gpu.fp8 or name in ("bf16", "tf32") and not gpu.bf16:
        raise BadInput(f"precision must be one that the GPU has, got {name} for {gpu.name}")
    return name


# ---- text ------------------------------------------------------------------------------------------------------------

def columns(*rows) -> str:
    """Rows of cells as text, the first column on the left. A float has four digits; None is "-"."""
    cells = [["-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)) for row in cells)


def short(x: float) -> str:
    """1,234,567 -> 1.23 M"""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= unit:
            return f"{x / unit:.3g} {letter}"
    return f"{x:.3g}"


def clock(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours / 24:,.1f} days"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def amounts(parts: dict) -> str:
    """{"a": 1e9, "b": 2e10} -> a 1.0, b 20.0 GB"""
    unit, scale = ("GB", 1e9) if max(parts.values()) > 1e9 else ("MB", 1e6)
    return ", ".join(f"{name} {x / scale:,.1f}" for name, x in parts.items()) + f" {unit}"


def describe_bill(bill: dict) -> str:
    """A bill as aligned lines: a label, padded to 11 characters, and a sentence. "law" is None in a stage after
    pre-training, where the laws do not hold."""
    law, layout = bill["law"], Layout(**bill["layout"])
    lines = [("run", f"{bill['parameters']:,} parameters ({bill['embedding_parameters']:,} in the embedding), "
                     f"{short(bill['tokens'])} tokens, {bill['flops']:.3g} FLOPs"),
             ("", f"{short(bill['tokens_per_step'])} tokens per step")]
    if law:
        best = law["best_tokens"]
        lines.append(("law", f"{bill['tokens_per_parameter']:.3g} tokens per parameter; best for this size: "
                             f"{best / bill['parameters']:.3g}, that is {short(best)} tokens"))
        lines.append(("", f"a guess for so small a model or so few tokens: the law was fitted to "
                          f"{short(FITTED_FROM['N'])} parameters, {short(FITTED_FROM['D'])} tokens and more"
                      if law["extrapolated"] else
                      f"loss {law['loss']:.3f} predicted, {law['loss_gap']:.3f} nats above the best of these 6 N D "
                      f"FLOPs: {short(law['N_opt'])} parameters, {short(law['D_opt'])} tokens"))
    lines.append(("memory", f"{amounts(bill['memory_bytes'])} per rank, predicted"))
    if layout.ranks > 1:
        lines.append(("mesh", f"pp {layout.pp} x dp {layout.dp} x tp {layout.tp}"))
        if layout.pp > 1:
            layers = ", ".join(map(str, bill["layers_per_rank"]))
            lines.append(("pipeline", f"{layout.schedule}, {layout.micro_batches} micro-batches, bubble "
                                      f"{bill['bubble']:.1%}; layers per rank {layers}"))
        lines.append(("messages", f"{amounts(bill['bytes_sent'])} per step, sent by a rank"))
    if "gpu" in bill:
        step = sum(bill["seconds_per_step"].values())
        price = (f", ${bill['dollars']:,.0f} at ${bill['dollars_per_gpu_hour']:.2f} per GPU-hour"
                 if bill["dollars"] else "")
        lines += [("time", f"about {clock(bill['seconds'])} on {layout.ranks:,} x {bill['gpu']}, {step:.4g} s per "
                           f"step, {short(bill['tokens_per_s'])} tokens/s, MFU {bill['mfu']:.1%}"),
                  ("", ", ".join(f"{name} {x / step:.1%}" for name, x in bill["seconds_per_step"].items() if x)),
                  ("cost", f"{bill['gpu_hours']:,.4g} GPU-hours, {bill['energy_mwh']:,.3g} MWh, "
                           f"{bill['tco2']:,.3g} t CO2{price} ({bill['price_source']})")]
    elif "seconds" in bill:
        lines.append(("time", f"about {clock(bill['seconds'])} on {layout.ranks:,} rank{'s' * (layout.ranks > 1)} at "
                              f"{bill['rank_flops'] / 1e9:,.0f} GFLOP/s each; messages are not counted"))
    return "\n".join(f"{label:<11}{text}" for label, text in lines)


# ---- the command line ------------------------------------------------------------------------------------------------

def flag_of(field: str) -> str:
    """The flag of a field: in train.py, and for fields of Layout in `plan` too."""
    return "--" + {"schedule": "pp_schedule", "chunks": "pp_chunks"}.get(field, field).replace("_", "-")


def command(shape: Shape, layout: Layout, precision: str, gpu: GPU, steps: int) -> str:
    """The torchrun line. Its flags state every field of the shape; --config only fills the rest."""
    nodes = math.ceil(layout.ranks / gpu.node)
    launch = f"torchrun --nproc-per-node {min(layout.ranks, gpu.node)}"
    launch += f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500" if nodes > 1 else ""
    flags = {"config": "large" if shape.num_params < 3e9 else "7b"} | dataclasses.asdict(shape) | {
        "steps": steps, "global_batch_size": layout.batch, "precision": precision} | dataclasses.asdict(layout)
    del flags["micro_batches"]                                                            # follows from the batch
    words = (f"--no-{flag_of(name)[2:]}" if x is False else flag_of(name) if x is True else f"{flag_of(name)} {x}"
             for name, x in flags.items())
    return f"{launch} train.py {' '.join(words)} --data data/mycorpus"                    # your prepared text


class Parser(argparse.ArgumentParser):
    """An argument that is wrong raises BadInput, which main prints as one line."""

    def error(self, message):
        raise BadInput(re.sub("^argument (.+?): ", r"\1 ", message))


def number(lowest: float, highest: float, integer: bool = False):
    """An argparse type: a number from lowest to highest, like 7e9."""
    def numeric(text: str):                                      # a word: argparse says "invalid numeric value: 'x'"
        x = float(text)
        if not lowest <= x <= highest or integer and x != int(x):
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * integer}number from {lowest:g} to {highest:g}, "
                                             f"got {text!r}")
        return int(x) if integer else x
    return numeric


COLUMNS = {"n": "N", "params": "N", "parameters": "N", "parameter_count": "N", "d": "D", "tokens": "D",
           "total_tokens": "D", "loss": "loss", "val_loss": "loss", "c": "C", "budget": "C", "flops": "C"}


def read_runs(path) -> np.ndarray:
    """A CSV file of runs -> (n, 4): N, D, loss, C. Its first line names the columns, as in COLUMNS; C may be missing.
    Other columns, empty lines and those that begin with # are passed over. BadInput counts lines as an editor does."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        rows = [(f"{path}: line {reader.line_num}", row) for row in reader if row and not row[0].startswith("#")]
    (line, head), *rows = rows or [(f"{path}: line 1", [])]
    names = [COLUMNS.get(name.strip().lower()) for name in head]
    if not {"N", "D", "loss"} <= set(names):
        raise BadInput(f"{line} must name N, D and loss, got {','.join(head)}")
    wanted, runs = [name for name in ("N", "D", "loss", "C") if name in names], []
    for line, row in rows:
        try:
            runs.append([float(row[names.index(name)]) for name in wanted])
        except (ValueError, IndexError):
            raise BadInput(f"{line} must have a number for {', '.join(wanted)}, got {','.join(row)}") from None
    return as_runs(runs, [line for line, _ in rows])


def warn_of_units(path, runs):
    """A line on stderr if N or D seem to be counted in thousands, millions or billions."""
    N, ratio = np.median(runs[:, 0]), np.median(runs[:, 1] / runs[:, 0])
    if N < 1000 or ratio < 1:
        print(f"scaling.py: {path}: the median run has {N:g} parameters and {ratio:.3g} tokens per parameter; are N "
              "and D in units of one?", file=sys.stderr)


def fit_all(runs, name) -> dict:
    """All three approaches -> {"parametric", "isoflop", "envelope"}. Raises BadInput if approach 3 is impossible. One
    of the others that the runs do not support is None, and a line on stderr, with the runs' name, says why."""
    results = {"parametric": fit_parametric(runs), "isoflop": None, "envelope": None}
    for key, fit in (("isoflop", fit_isoflop), ("envelope", fit_envelope)):
        try:
            results[key] = fit(runs)
        except BadInput as error:
            print(f"scaling.py: {name}: {error}", file=sys.stderr)
    return results


def report(runs, results):
    """The fits as text: their numbers with intervals, then their lists of points or rows as tables."""
    N, D, loss, C = runs.T
    print(f"{len(runs)} runs, C {C.min():.3g} to {C.max():.3g} FLOPs; 6 N D is {(6 * N * D / C).min():.3g} to "
          f"{(6 * N * D / C).max():.3g} of C")
    for name, result in results.items():
        if result is None:
            continue
        ends = result.get("intervals", {})
        numbers = [(key, x, *(ends.get(key) or (None, None)))
                   for key, x in result.items() if isinstance(x, (int, float))]
        print("\n" + columns(*(row if ends else row[:2] for row in [(name, "", "95 % from", "to"), *numbers])))
        for rows in (x for x in result.values() if isinstance(x, list)):
            print(columns(rows[0], *(row.values() for row in rows)))
    if results["isoflop"] and (count := len(results["isoflop"]["points"])) < 4:
        print(f"isoflop: an exponent from fewer than 4 vertices is hardly known, here are {count}")
    fits = {name: result for name, result in results.items() if result and "a" in result}
    for one, other in itertools.combinations([name for name, fit in fits.items() if fit["intervals"].get("a")], 2):
        (lower, upper), (other_lower, other_upper) = (fits[name]["intervals"]["a"] for name in (one, other))
        if upper < other_lower or other_upper < lower:
            print(f"{one} and {other} disagree: their intervals of a do not overlap")
    best = {name: (fit["k_N"] * C.max() ** fit["a"], fit["k_D"] * C.max() ** fit["b"]) for name, fit in fits.items()}
    print("\n" + columns((f"C = {C.max():.3g} FLOPs", "N_opt", "D_opt", "D/N"),
                         *((name, N, D, D / N) for name, (N, D) in best.items())))


def plot_isoflop(figure, runs):
    """Each budget's runs, its parabola and vertex."""
    axes = figure.subplots()
    for group in budgets(runs):
        points, = axes.plot(group[:, 0], group[:, 2], "o", label=f"C = {group[:, 3].mean():.1e} FLOPs")
        if vertex := parabola(group):
            ln_N, color = np.log(group[:, 0]), points.get_color()
            x = np.linspace(ln_N.min(), ln_N.max(), 100)
            axes.plot(np.exp(x), np.polyval(np.polyfit(ln_N, group[:, 2], 2), x), color=color)
            axes.plot(vertex.N, vertex.loss, "*", color=color, markersize=15)
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss, nats per token")
    axes.legend()


def draw(file: Path, plot, *data):
    """plot(figure, *data) as `file`, a PNG. The only place that needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    plot(figure, *data)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    print(f"drawn      {file}", file=sys.stderr)


def command_fit(args):
    runs = read_runs(args.runs)
    results = fit_all(runs, args.runs) | ({"holdout": holdout(runs, args.holdout)} if args.holdout else {})
    warn_of_units(args.runs, runs)
    print(json.dumps(results)) if args.json else report(runs, results)
    if args.plot:
        draw(Path(args.plot) / "isoflop.png", plot_isoflop, runs)


def command_plan(args):
    gpu, shape = GPUS[args.gpu], shape_for(args.params, args.seq_len)
    if args.price:
        gpu = replace(gpu, price=args.price, source="as given")
    given = {name: x for name, x in vars(args).items() if name in Layout.__dataclass_fields__ and x is not None}
    rows = plan(shape, gpu, args.n_gpus, top=5, tokens=args.tokens, precision=args.precision,
                global_batch_size=args.global_batch_size, **given)
    if args.json:
        print(json.dumps({"shape": dataclasses.asdict(shape), "layouts": rows}))
        return
    names = "dp", "tp", "pp", "zero", "recompute", "micro_batch_size", "schedule", "chunks"
    print(f"{describe_bill(rows[0])}\n\nthe best layouts; the first is the above\n\n" + columns(
        (*names, "GB", "s per step", "MFU", "days", "$"),
        *((*(row["layout"][name] for name in names), row["memory_bytes"]["total"] / 1e9,
           sum(row["seconds_per_step"].values()), row["mfu"], row["days"], row["dollars"]) for row in rows))
        + f"\n\nfirst      {rows[0]['command']}")


def main(argv=None) -> int:
    parser = Parser("scaling.py", description="without a command: the demo")
    commands = parser.add_subparsers(dest="command")
    fit_parser = commands.add_parser("fit", help="fit the three approaches to a file of runs")
    fit_parser.add_argument("runs", metavar="RUNS.csv", help="columns N, D, loss and, if known, the budget C")
    fit_parser.add_argument("--holdout", type=number(1, 1e6, True), metavar="K", help="predict the K largest budgets")
    fit_parser.add_argument("--plot", metavar="DIR", help="write isoflop.png")
    plan_parser = commands.add_parser("plan", help="the best layouts of a training run, their time and cost")
    plan_parser.add_argument("--params", type=number(5e5, 1e14), required=True, help="parameters of a Llama: 7e9")
    plan_parser.add_argument("--gpu", choices=GPUS, required=True)
    plan_parser.add_argument("--n-gpus", type=number(1, 1e6, True), required=True)
    plan_parser.add_argument("--tokens", type=number(1e3, 1e18), help="to train on [the best number by the law]")
    plan_parser.add_argument("--seq-len", type=number(1, 1e7, True), default=4096, help="tokens per sequence")
    plan_parser.add_argument("--global-batch-size", type=number(1, 1e7, True), help="sequences per step")
    plan_parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    plan_parser.add_argument("--price", type=number(1e-3, 1e4), help="dollars per GPU-hour")
    for name in ("dp", "tp", "pp", "chunks", "micro_batch_size"):
        plan_parser.add_argument(flag_of(name), dest=name, type=number(1, 1e6, True))
    plan_parser.add_argument("--zero", type=number(0, 3, True))
    plan_parser.add_argument("--pp-schedule", dest="schedule", choices=("gpipe", "1f1b", "interleaved", "zb"))
    plan_parser.add_argument("--recompute", choices=("none", "selective", "full"))
    plan_parser.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction)
    for command_parser in (fit_parser, plan_parser):
        command_parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        args = parser.parse_args(argv)
        {None: lambda args: demo(), "fit": command_fit, "plan": command_plan}[args.command](args)
        return 0
    except (BadInput, OSError, ImportError, UnicodeDecodeError, csv.Error) as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        return 2


# ---- demo ------------------------------------------------------------------------------------------------------------

def demo():
    """The five questions in a few rows each, asserted. CPU, seconds."""
    print("(1) how good will it be? (2) How large, for a budget?")
    file = Path(__file__).with_name("tests") / "sweep_runs.csv"
    if file.exists():
        runs = read_runs(file)
        results = fit_all(runs, file.name) | {"holdout": holdout(runs, 1)}
        report(runs, results)
        loss, size = results["holdout"]["rows"]
        assert 1.07 < loss["predicted"] / loss["measured"] < 1.09 and 0.8 < size["predicted"] / size["measured"] < 1.2
        assert (abs(chinchilla_loss(*runs.T[:2], results["parametric"]) / runs[:, 2] - 1) < 0.07).all()
    else:
        print(f"tests/{file.name}, our own runs, is not here; python scaling.py fit RUNS.csv fits yours")
    rows = [(law, C, *compute_optimal(C, constants)) for law, constants, C in (
        ("Besiroglu", BESIROGLU, 1e18), ("Besiroglu", BESIROGLU, 5.76e23), ("Besiroglu", BESIROGLU, 1e26),
        ("Hoffmann", HOFFMANN, 5.76e23))]
    print("\n" + columns(("law", "FLOPs", "N_opt", "D_opt", "D/N"), *((*row, row[3] / row[2]) for row in rows)))
    assert [round(D / N) for _, _, N, D in rows] == [26, 18, 16, 59]

    print("\n(3) what did known models leave on the table?")
    known = {name: assess(N, D) for name, (N, D) in MODELS.items()}
    print(columns(("", *known["GPT-3 175B"]), *((name, *r.values()) for name, r in known.items())))
    assert all(r["loss_gap"] > 0 for r in known.values())

    # (4) Korthikanti 2022, equation 4, table 5; ZeRO, table 1; Llama 3, table 4. (5) LLaMA, table 15
    a100, h100, llama = GPUS["a100"], GPUS["h100"], Shape(128256, 8192, 126, 128, 8, 128, 16384, 53248)
    gpt22 = Shape(51200, 2048, 48, 64, 64, 96, 6144, 24576, "layernorm", "learned", "gelu", True, True)
    tp8 = Layout(1, 8, micro_batch_size=4, recompute="selective")
    rows = [("22 B, tp 8, selective: bytes that a layer keeps", 2.139e8, 1e-3,
             layer_bytes(gpt22, tp8, MEGATRON_2022, "selective")),
            ("   seconds per iteration", 1.10, 0.15, estimate(gpt22, a100, tp8, MEGATRON_2022)["step"]),
            ("7.5 B, ZeRO stage 1, dp 64: GB of parameters, gradients, states", 31.4, 0.025,
             7.5 * sum(list(memory(gpt22, Layout(64, zero=1), MEGATRON_2021, 0).values())[:3]) / gpt22.num_params),
            ("405 B, 16,384 H100, tp 8, pp 16, dp 128: TFLOP/s per GPU", 400.0, 0.15, max(estimate(llama, h100, Layout(
                128, 8, 16, "interleaved", v, 1, 16, 1), LLAMA_3)["tflops"] for v in range(2, 8))),
            ("LLaMA 65B, 1,022,362 A100-hours: MWh", 449.0, 0.003, cost(a100, 1, 1_022_362 * 3600)["energy_mwh"])]
    print("\n" + columns(("(4) what does a layout take? (5) What does it cost?", "published", "predicted", "error"), *(
        (what, published, predicted, f"{predicted / published - 1:+.1%}") for what, published, _, predicted in rows)))
    assert all(abs(predicted / published - 1) < bound for _, published, bound, predicted in rows)

    print("\n7 B, 140 B tokens on 64 H100s, 1024 sequences of 4096 tokens: train.py's best layout")
    seven = Shape(32000, 4096, 32, 32, 32, 128, 4096, 11008)
    first, = plan(seven, h100, 64, global_batch_size=1024, tokens=1.4e11, top=1)
    print(describe_bill(first))
    assert 0.5 < first["mfu"] < 0.6


if __name__ == "__main__":
    sys.exit(main())
