"""What papers publish about training runs, as data and formulas, and the planner's answer to each row of theirs.

test_scaling.py asserts them row by row. Each table names its source; nothing here is measured by this project.
"""

import math
from dataclasses import replace

import numpy as np

from scaling import (
    BESIROGLU,
    LLAMA_3,
    MEGATRON_2021,
    MEGATRON_2022,
    BadInput,
    Layout,
    Optimum,
    Shape,
    chinchilla_loss,
    compute_for_loss,
    compute_optimal,
    estimate,
    plan,
)

# ---- laws

# Sardana 2024, appendix A: Hoffmann's, exponents to three digits
SARDANA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.336, "beta": 0.283}


# Muennighoff 2023, appendix A: alpha = beta, and how fast repeated tokens and excess parameters lose their value
MUENNIGHOFF = {"E": math.exp(0.6254804), "A": math.exp(6.255414), "B": math.exp(7.3049974), "alpha": 0.3526596,
               "beta": 0.3526596, "R_D": 15.387756, "R_N": 5.309743}


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


PF_DAY = 1e15 * 24 * 3600                                                                                   # FLOPs
# Kaplan 2020, table 5: each law fitted alone. N_c non-embedding parameters, D_c and B_star tokens, C_c_min PF-days
KAPLAN_ALONE = {"alpha_N": 0.076, "N_c": 8.8e13, "alpha_D": 0.095, "D_c": 5.4e13, "alpha_C_min": 0.050,
                "C_c_min": 3.1e8, "alpha_B": 0.21, "B_star": 2.1e8}
# table 6: (exponent p, value at one PF-day) of parameters, tokens per batch,
# steps, tokens: value (C / PF-day)^p
KAPLAN_OPTIMUM = {"N": (0.73, 1.3e9), "B_crit": (0.24, 2.0e6), "S_min": (0.03, 5.4e3), "D": (0.27, 2e10)}


def kaplan_loss_of_compute(C_min):
    """L = (C_c_min / C_min)^alpha_C_min of C_min FLOPs that are spent well. (Kaplan 2020, 1.3)"""
    return (KAPLAN_ALONE["C_c_min"] * PF_DAY / C_min) ** KAPLAN_ALONE["alpha_C_min"]


def kaplan_optimal(C) -> dict:
    """{"N", "B_crit", "S_min", "D"} for C FLOPs: N ~ C^0.73, hardly more steps. (Small models counted without their
    embeddings, and one learning-rate schedule for all D, led there: Pearce 2024, Porian 2024.)"""
    return {name: x * (C / PF_DAY) ** p for name, (p, x) in KAPLAN_OPTIMUM.items()}


# Kaplan 2020, table 3: the joint fit of L(N, S_min)
KAPLAN_STEPS = {"alpha_N": 0.077, "N_c": 6.5e13, "alpha_S": 0.76, "S_c": 2.1e3}


def kaplan_loss_of_steps(N, S_min):
    """L(N, S_min) = (N_c / N)^alpha_N + (S_c / S_min)^alpha_S, of S_min steps with a large batch. (Kaplan 2020, 1.6)"""
    k = KAPLAN_STEPS
    return (k["N_c"] / N) ** k["alpha_N"] + (k["S_c"] / S_min) ** k["alpha_S"]


def critical_batch(loss):
    """Tokens per batch that take twice the fewest steps, and twice the fewest tokens: B_star / L^(1/alpha_B)."""
    return KAPLAN_ALONE["B_star"] / loss ** (1 / KAPLAN_ALONE["alpha_B"])


def batch_cost(batch, critical) -> tuple:
    """(S / S_min, E / E_min): steps and tokens over the fewest. (S/S_min - 1) (E/E_min - 1) = 1. McCandlish 2018"""
    return 1 + critical / batch, 1 + batch / critical


def overtraining(k, law=BESIROGLU) -> tuple:
    """(tokens, FLOPs) over the best of a budget, for its loss with k N_opt parameters: the same at every budget.

        D / D_opt = (1 - beta / alpha (k^-alpha - 1))^(-1 / beta),  infinite if k <= (1 + alpha / beta)^(-1 / alpha)
    """
    rest = 1 - law["beta"] / law["alpha"] * (k ** -law["alpha"] - 1)
    tokens = rest ** (-1 / law["beta"]) if rest > 0 else math.inf
    return tokens, k * tokens


def tokens_for_loss(N, loss, law=BESIROGLU):
    """Tokens that bring N parameters to a loss: D = (B / (L - E - A/N^alpha))^(1/beta), infinite for too small N."""
    rest = loss - law["E"] - law["A"] / N ** law["alpha"]
    return (law["B"] / rest) ** (1 / law["beta"]) if rest > 0 else math.inf


def inference_optimal(loss, inference_tokens, law=BESIROGLU) -> Optimum:
    """(N, D) of a loss for which training and use, 6 N D + 2 N D_inf FLOPs, are cheapest. (Sardana 2024) Found by
    trying a million sizes, from the smallest that reaches the loss to the one that is best without use."""
    if not loss > law["E"]:
        raise BadInput(f"loss must be above the law's E, {law['E']:g}, got {loss:g}")
    smallest = (law["A"] / (loss - law["E"])) ** (1 / law["alpha"])                       # with infinitely many tokens
    largest = compute_optimal(compute_for_loss(loss, law), law).N
    N = np.geomspace(1.001 * smallest, largest, 1_000_000)
    D = (law["B"] / (loss - law["E"] - law["A"] / N ** law["alpha"])) ** (1 / law["beta"])
    cheapest = np.argmin(6 * N * D + 2 * N * inference_tokens)
    return Optimum(N[cheapest], D[cheapest])


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


# ---- runs and machines

# Narayanan 2021 (arXiv:2104.04473), table 1: layers, width, heads, tp, pp, dp, batch, TFLOP/s per GPU with what is
# computed again. A100; the micro-batch and the chunks are not printed: the planner's best
TABLE_1 = [(24, 2304, 24, 1, 1, 32, 512, 137), (30, 3072, 32, 2, 1, 32, 512, 138), (40, 6144, 48, 8, 1, 32, 1024, 135),
           (60, 10240, 80, 8, 4, 32, 1792, 140), (96, 16384, 128, 8, 16, 15, 2160, 155),
           (128, 25600, 160, 8, 64, 6, 3072, 163)]
# table 2, 174.6 B, batch 1536: GPUs, tp, pp, ZeRO stage, micro-batch, TFLOP/s, days for 300 B tokens. DeepSpeed's
# ZeRO-3 of 2021 hid far less of its messages than the network allows: those three rows are shown, not bounded
TABLE_2 = [(384, 8, 12, 0, 1, 153, 84), (768, 8, 12, 0, 1, 149, 43), (1536, 8, 12, 0, 1, 141, 23),
           (384, 1, 1, 3, 4, 144, 90), (768, 1, 1, 3, 2, 88, 74), (1536, 1, 1, 3, 1, 44, 74)]
# Korthikanti 2022 (arXiv:2205.05198), tables 3 and 5, A100, tp 8: layers, width, heads, pp, batch, micro-batch, chunks;
# seconds of an iteration with full recomputation; with selective and sequence parallelism; of that MFU and HFU in %. By
# its formulas: bytes of a layer with tp alone, and as in the second run; GB of the first stage's layers
KORTHIKANTI = [(48, 6144, 64, 1, 4, 4, 1, 1.42, 1.10, 41.5, 43.7, 1.325e9, 2.139e8, 10.27),
               (105, 20480, 128, 35, 280, 1, 3, 49.05, 37.83, 56.0, 57.0, 8.808e8, 1.783e8, 18.72)]
# Rajbhandari 2020 (arXiv:1910.02054), table 1: parameters, stage, {dp: GB of model states}, which it truncates
ZERO = [(7.5e9, 1, {4: 52.5, 64: 31.4, 256: 30.4, 1024: 30.1}), (7.5e9, 2, {1: 120, 16: 21.6, 64: 16.6, 1024: 15.1}),
        (7.5e9, 3, {4: 30, 16: 7.5, 64: 1.88, 1024: 0.12}), (1.28e11, 1, {1: 2048, 16: 608, 64: 536, 1024: 513}),
        (1.28e11, 2, {16: 368, 64: 284, 256: 263, 1024: 257}), (1.28e11, 3, {16: 128, 64: 32, 256: 8, 1024: 2}),
        (1e12, 1, {16: 4750, 64: 4187, 256: 4046, 1024: 4011}), (1e12, 2, {1: 16000, 4: 5500, 256: 2054, 1024: 2013}),
        (1e12, 3, {1: 16000, 64: 250, 256: 62.5, 1024: 15.6})]
# GPU-hours on A100, MWh and t CO2: LLaMA (arXiv:2302.13971), table 15, which truncates MWh; Llama 2
# (2307.09288), table 2
BILLS = [("OPT-175B", 809472, 356, 137), ("LLaMA 7B", 82432, 36, 14), ("LLaMA 65B", 1022362, 449, 173),
         ("Llama 2 7B", 184320, None, 31.22), ("Llama 2 70B", 1720320, None, 291.42)]
# Llama 3 (arXiv:2407.21783), table 4, 405 B on H100, tp 8, pp 16, 2048 sequences of 8192 tokens: dp, TFLOP/s per GPU
LLAMA_3_TABLE_4 = [(64, 430), (128, 400)]
LLAMA_8B = Shape(128256, 8192, 32, 32, 8, 128, 4096, 14336)
LLAMA_405B = Shape(128256, 8192, 126, 128, 8, 128, 16384, 53248)
# torchtitan, docs/performance.md (3faaa1a0d), 64 A100, FSDP2, where "selective layer" runs every second one again:
# model, micro-batch, what runs again, MFU in %
TORCHTITAN = [("Llama 3 8B", LLAMA_8B, 1, ("full", "none"), 56.8),
              ("Llama 3 70B", Shape(128256, 8192, 80, 64, 8, 128, 8192, 28672), 1, ("full",), 51.7),
              ("Llama 2 13B", Shape(32000, 4096, 40, 40, 40, 128, 5120, 13824), 2, ("full", "none"), 54.1),
              ("Llama 2 70B", Shape(32000, 4096, 80, 64, 8, 128, 8192, 28672), 2, ("full",), 50.5)]
# MegaScale (arXiv:2402.15627), tables 2, 3: 175 B, A100: GPUs, batch, Megatron-LM's MFU in %
MEGASCALE = [(256, 256, 47.7), (1024, 768, 44.7), (3072, 6144, 48.7), (6144, 6144, 47.8), (8192, 6144, 43.3),
             (12288, 6144, 41.2)]
# MT-NLG (arXiv:2201.11990): 530 B, 2240 A100, TFLOP/s per GPU
MT_NLG = 2240, 126


def gpt(layers: int, width: int, heads: int) -> Shape:
    """Megatron's: vocabulary 51200, 2048 tokens."""
    return Shape(51200, 2048, layers, heads, heads, width // heads, width, 4 * width, "layernorm", "learned", "gelu",
                 bias=True, tie_embeddings=True)


def table_1(row, gpu, **fixed) -> list[dict]:
    """The layouts of a row's cluster; `fixed` to its tp and pp, the planner's is the rest."""
    return plan(gpt(*row[:3]), gpu, math.prod(row[3:6]), zero=0, recompute="full", program=MEGATRON_2021,
                sequence_parallel=False, global_batch_size=row[6], **fixed)


def table_1_rates(gpu, rows=TABLE_1) -> list[float]:
    return [table_1(row, gpu, tp=row[3], pp=row[4])[0]["hardware_tflops"] for row in rows]


def table_2(row, gpu) -> dict:
    n_gpus, tp, pp, zero, micro_batch_size, *_ = row
    return plan(gpt(96, 12288, 96), gpu, n_gpus, tp=tp, pp=pp, zero=zero, micro_batch_size=micro_batch_size,
                recompute="full", program=replace(MEGATRON_2021, overlap_dp=zero > 0), sequence_parallel=False,
                global_batch_size=1536)[0]


def korthikanti(row, gpu) -> list[dict]:
    """With full recomputation; with selective recomputation and sequence parallelism."""
    layers, width, heads, pp, batch, b, v, *_ = row
    schedule = "interleaved" if v > 1 else "1f1b"
    return [estimate(gpt(layers, width, heads), gpu, Layout(1, 8, pp, schedule, v, b, batch // b, 0, *options),
                     MEGATRON_2022) for options in (("full", False), ("selective", True))]


def llama_3(dp: int, gpu) -> float:
    """TFLOP/s per GPU of table 4. Their gradients are sharded and weights not gathered twice: stage 1, as far as time
    goes. What they keep, and 128 stages of 126 layers, is not train.py's."""
    return max(estimate(LLAMA_405B, gpu, Layout(dp, 8, 16, "interleaved", v, 1, 2048 // dp, 1), LLAMA_3)["tflops"]
               for v in range(2, 8))


def mt_nlg(gpu) -> float:
    return plan(gpt(*KORTHIKANTI[1][:3]), gpu, MT_NLG[0], tp=8, pp=35, zero=0, recompute="full", program=MEGATRON_2021,
                sequence_parallel=False, global_batch_size=1920)[0]["hardware_tflops"]


def torchtitan(row, gpu) -> float:
    """MFU, %."""
    _, model, micro_batch_size, recompute, _ = row
    slowness = [1 / estimate(model, gpu, Layout(64, micro_batch_size=micro_batch_size, zero=3, recompute=x),
                             LLAMA_3)["mfu"] for x in recompute]
    return 100 * len(recompute) / sum(slowness)


def megascale(row, gpu) -> float:
    """MFU, %."""
    return 100 * plan(gpt(96, 12288, 96), gpu, row[0], tp=8, pp=8, zero=1, schedule="interleaved",
                      recompute="selective", program=MEGATRON_2022, global_batch_size=row[1])[0]["mfu"]


def rank(every: list[dict], tp: int, pp: int) -> tuple[dict, float]:
    """Of a plan: the best with this tp and pp; how much longer its step takes than the first's."""
    row = next(x for x in every if (x["layout"]["tp"], x["layout"]["pp"]) == (tp, pp))
    return row, every[0]["tokens_per_s"] / row["tokens_per_s"] - 1


def calibrate(rates, gpu, published: list) -> float:
    """The c with which rates(GPU) are right on average: mean log error 0."""
    low, high = 0.3, 1.0
    while high / low > 1.0002:
        c = math.sqrt(low * high)
        error = sum(math.log(x / y) for x, y in zip(rates(replace(gpu, matmul=c)), published, strict=True))
        low, high = (c, high) if error <= 0 else (low, c)
    return low


def predictions(a100, h100) -> dict:
    """{row: (the planner's figure, the published one)} of every row of time."""
    found = {}
    for row in TABLE_1:
        size = gpt(*row[:3]).num_params / 1e9
        found[f"Megatron 2021, table 1: {size:,.1f} B, tp {row[3]}, pp {row[4]}, dp {row[5]}"] = (
            table_1_rates(a100, [row])[0], row[-1])
    for dp, tflops in LLAMA_3_TABLE_4:
        found[f"Llama 3, table 4: 405 B, dp {dp}"] = llama_3(dp, h100), tflops
    for row in KORTHIKANTI:
        for what, e, seconds in zip(("full", "selective"), korthikanti(row, a100), row[7:9], strict=True):
            found[f"Korthikanti 2022, table 5: {gpt(*row[:3]).num_params / 1e9:,.0f} B, pp {row[3]}, {what}"] = (
                e["hardware_tflops"], e["hardware_tflops"] * e["step"] / seconds)
    for row in TABLE_2:
        e, what = table_2(row, a100), f"Megatron 2021, table 2: {row[0]} GPUs, {'ZeRO-3' if row[3] else 'tp 8, pp 12'}"
        found[what] = e["hardware_tflops"], row[5]
        found[what + ", days"] = 3e11 / e["tokens_per_s"] / 86400, row[6]
    found["MT-NLG: 530 B, 2240 GPUs"] = mt_nlg(a100), MT_NLG[1]
    for row in TORCHTITAN:
        found[f"torchtitan: {row[0]}, MFU %"] = torchtitan(row, a100), row[-1]
    for row in MEGASCALE:
        found[f"MegaScale: Megatron-LM, 175 B, {row[0]} GPUs, MFU %"] = megascale(row, a100), row[-1]
    return found


# The planner's figure for each row when this table was written. Better is welcome; worse is a mistake
RECORDED = {
    "Megatron 2021, table 1: 1.7 B, tp 1, pp 1, dp 32": 133.8,
    "Megatron 2021, table 1: 3.6 B, tp 2, pp 1, dp 32": 134.97,
    "Megatron 2021, table 1: 18.4 B, tp 8, pp 1, dp 32": 131.87,
    "Megatron 2021, table 1: 76.1 B, tp 8, pp 4, dp 32": 146.84,
    "Megatron 2021, table 1: 310.1 B, tp 8, pp 16, dp 15": 158.85,
    "Megatron 2021, table 1: 1,008.0 B, tp 8, pp 64, dp 6": 162.37,
    "Llama 3, table 4: 405 B, dp 64": 430.06,
    "Llama 3, table 4: 405 B, dp 128": 388.18,
    "Korthikanti 2022, table 5: 22 B, pp 1, full": 132.91,
    "Korthikanti 2022, table 5: 22 B, pp 1, selective": 138.24,
    "Korthikanti 2022, table 5: 530 B, pp 35, full": 164.2,
    "Korthikanti 2022, table 5: 530 B, pp 35, selective": 164.85,
    "Megatron 2021, table 2: 384 GPUs, tp 8, pp 12": 153.89,
    "Megatron 2021, table 2: 384 GPUs, tp 8, pp 12, days": 84.261,
    "Megatron 2021, table 2: 768 GPUs, tp 8, pp 12": 152,
    "Megatron 2021, table 2: 768 GPUs, tp 8, pp 12, days": 42.652,
    "Megatron 2021, table 2: 1536 GPUs, tp 8, pp 12": 148.7,
    "Megatron 2021, table 2: 1536 GPUs, tp 8, pp 12, days": 21.8,
    "Megatron 2021, table 2: 384 GPUs, ZeRO-3": 197.58,
    "Megatron 2021, table 2: 384 GPUs, ZeRO-3, days": 65.628,
    "Megatron 2021, table 2: 768 GPUs, ZeRO-3": 195.29,
    "Megatron 2021, table 2: 768 GPUs, ZeRO-3, days": 33.199,
    "Megatron 2021, table 2: 1536 GPUs, ZeRO-3": 190.86,
    "Megatron 2021, table 2: 1536 GPUs, ZeRO-3, days": 16.985,
    "MT-NLG: 530 B, 2240 GPUs": 148.71,
    "torchtitan: Llama 3 8B, MFU %": 60.092,
    "torchtitan: Llama 3 70B, MFU %": 52.739,
    "torchtitan: Llama 2 13B, MFU %": 58.09,
    "torchtitan: Llama 2 70B, MFU %": 51.357,
    "MegaScale: Megatron-LM, 175 B, 256 GPUs, MFU %": 49.97,
    "MegaScale: Megatron-LM, 175 B, 1024 GPUs, MFU %": 48.555,
    "MegaScale: Megatron-LM, 175 B, 3072 GPUs, MFU %": 51.311,
    "MegaScale: Megatron-LM, 175 B, 6144 GPUs, MFU %": 49.525,
    "MegaScale: Megatron-LM, 175 B, 8192 GPUs, MFU %": 48.415,
    "MegaScale: Megatron-LM, 175 B, 12288 GPUs, MFU %": 46.563,
}
