"""The machine code of flash_attn.py's kernels, read without a GPU: python tests/bench/bench_flash_static.py [--quick]

Every configuration that autotune may pick is compiled ahead of time, fp16, causal (a window is the same machine code:
its width is an argument; documents are one of the variants). It must launch, must not spill registers in its hot loop
(nor anywhere on sm_90 and sm_100 with the copy engine; 48 bytes outside it where tiles are loaded by pointers), must
multiply on tensor cores with float32 sums, up to head dimension 128 on the chip's own (wgmma, tcgen05), and, on sm_90,
must not serialise them. On sm_120, which has 99 KB of shared memory, it must launch.
--quick: sm_90 alone, with the copy engine, head dimension 128, one configuration.

Printed: warp instructions per 1024 scores in the hot loop, beside those of the kernels of Triton's own tutorial
(06-fused-attention, compiled alike with Triton 3.9.0). Not a time: it says how much there is to issue, not how long.
"""

import itertools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import machine_code as mc  # noqa: E402

import flash_attn  # noqa: E402

# (chip, head dim) -> forward, dkdv + dq of the tutorial; its backward at 128 spills: 1304 bytes (sm_90), 6 kB (sm_80)
TUTORIAL = {(90, 64): (265, 604), (90, 128): (264, 1298), (80, 64): (346, 978), (80, 128): (556, 6731)}
BOUND = {(90, 64): (265, 600), (90, 128): (264, 700), (80, 64): (346, 800), (80, 128): (600, 1350)}
VARIANTS = {"grouped heads": {"group": 4}, "documents": {"documents": True}, "bf16": {"dtype": torch.bfloat16},
            "odd strides": {"aligned": False}, "float32 as tf32": {"dtype": torch.float32}}
CHIPS = [(80, "pointers", (64, 128, 256)), (90, "tma", (64, 128, 256)), (100, "tma", (64, 128, 256)),
         (90, "pointers", (64,)), (100, "pointers", (64,)), (120, "pointers", (64, 128))]   # chip, loads, head dims
DOTS = {"_attn_fwd": 2, "_bwd_dkdv": 4, "_bwd_dq": 3}                     # matrix products a tile


def compiled(name, chip, D, config, dtype=torch.float16, group=1, documents=False, aligned=True, T=4096):
    strange = 0 if aligned else 1                             # a row of D + 1 numbers: no copy engine, no wide loads
    q, do, o = (torch.empty(2, T, 4, D + strange, dtype=dtype, device="meta")[..., :D].transpose(1, 2)
                for _ in range(3))
    k, v = (torch.empty(2, T, 4 // group, D + strange, dtype=dtype, device="meta")[..., :D].transpose(1, 2)
            for _ in range(2))
    lse, row_sums = torch.empty(2, 4, T, device="meta"), torch.empty(2, 2, 4, T, device="meta")
    limits = torch.empty(2, 2, 2 * T, dtype=torch.int32, device="meta") if documents else None
    matrices, vectors = {"_attn_fwd": ((q, k, v, o), (lse,)), "_bwd_dkdv": ((q, k, v, do, k, v), (row_sums,)),
                         "_bwd_dq": ((q, k, v, do, o, q), (lse, None, row_sums))}[name]
    args, options = flash_attn.arguments(name, matrices, True, D ** -0.5, None, divmod(chip, 10))
    return mc.compile_for(chip, getattr(flash_attn, name), *matrices, *vectors, limits, *args, **options,
                          **config.all_kwargs())


def check(report, chip, table, D, where):
    assert report.launchable, f"{where}: {report.limits}"
    if chip == 120:
        return
    assert not report.hot.spills, f"{where}: {report.hot.spills} spill instructions in the hot loop"
    assert report.stack <= (0 if table == "tma" else 48), f"{where}: {report.stack} bytes of spilled registers"
    assert not report.wgmma_serialized, f"{where}: wgmma serialised"
    for loop in report.loops:
        assert all(".F32" in op for op in loop.tensor), f"{where}: {dict(loop.tensor)}"
    kind = {90: "HGMMA", 100: "UTCHMMA"}.get(chip, "HMMA")
    assert report.hot.count(kind) or D > 128, f"{where}: no {kind} in the hot loop"


def variants():
    """Other inputs: of the configurations one must launch, and if tiles are 16-bit and aligned the first must not
    spill in its hot loop. (Grouped heads, sm_90, dkdv, D 128: 144 bytes outside of it.)"""
    print("\nregisters, spilled bytes, of these instructions in the hot loop, shared memory: of each configuration")
    cases = (80, 64), (90, 64), (90, 128), (100, 64), (100, 128)
    for (what, options), (chip, D), name in itertools.product(VARIANTS.items(), cases, DOTS):
        torch.set_float32_matmul_precision("high" if what == "float32 as tf32" else "highest")
        row, table = D * options.get("dtype", torch.float16).itemsize, "pointers" if chip == 80 else "tma"
        choices = flash_attn.configs(name, row, "pointers" if what == "odd strides" else table)
        reports = [mc.analyse(compiled(name, chip, D, config, **options)) for config in choices]
        figures = [(r.registers, r.stack, r.hot.spills, r.shared) for r in reports]
        print(f"{name:<10} {chip:<6} {D:>4} {what:<16}", *figures, flush=True)
        assert any(r.launchable for r in reports), f"{name} {chip} {D} {what}"
        assert not reports[0].hot.spills or what in ("odd strides", "float32 as tf32"), f"{name} {chip} {D} {what}"


def main(quick):
    sums = {}
    print(f"{'kernel':<10} {'chip':<6} {'loads':<8} {'D':>4}  {'M x N, warps, stages':<22} {'per 1024':>8} "
          f"{'registers':>9} {'spilled':>7} {'shared':>7} {'blocks/SM':>9}")
    cases = [(90, "tma", 128)] if quick else [(chip, table, D) for chip, table, sizes in CHIPS for D in sizes]
    for (chip, table, D), (name, dots) in itertools.product(cases, DOTS.items()):
        counts = []
        for config in flash_attn.configs(name, 2 * D, table)[:1 if quick else None]:
            report = mc.analyse(compiled(name, chip, D, config, T=4096 if table == "tma" else 1024))
            m, n, warps = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"], config.num_warps
            check(report, chip, table, D, f"{name} {chip} {table} D {D} {m} x {n}, {warps} warps")
            counts.append(mc.per_1024(report.hot, m * n, 2 * D * dots, warps))
            tile = f"{m} x {n}, {warps}, {config.num_stages}"
            print(f"{name:<10} {chip:<6} {table:<8} {D:>4}  {tile:<22} {counts[-1]:>8.0f} {report.registers:>9} "
                  f"{report.stack:>7} {report.shared:>7} {report.blocks:>9}", flush=True)
        sums.setdefault((chip, D, name), min(counts))                     # the chip's first row of CHIPS
    if not quick:
        variants()
    print("\nper 1024 scores: ours | bound | the tutorial's")
    for (chip, D), bound in BOUND.items():
        if (chip, D, "_bwd_dq") in sums:
            ours = sums[chip, D, "_attn_fwd"], sums[chip, D, "_bwd_dkdv"] + sums[chip, D, "_bwd_dq"]
            for what, a, b, c in zip(("forward", "backward"), ours, bound, TUTORIAL[chip, D], strict=True):
                print(f"sm_{chip} D {D:<4} {what:<9} {a:6.0f} | {b} | {c}")
                assert a <= b, (chip, D, what)


if __name__ == "__main__":
    main("--quick" in sys.argv)
