"""Attention on a CPU, forward + backward, one thread, float32, 4 heads of 64: python tests/bench/bench_attention.py

textbook | tiled torch | torch's own (sdpa): seconds, taking turns in one run, medians; and the growth of the resident
peak, each in a process of its own. Then a window of 1024 and packed documents of 1024 at the longest T.
"""

import ctypes
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import flash_attn  # noqa: E402

LONGEST = 8192
MASKS = {"causal": {}, "window": {"window": 1024}, "documents": {"documents": True}}


def step(backend, T, mask):
    """-> a function that runs forward and backward once."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 4, T, 64, generator=generator, requires_grad=True) for _ in range(4))
    options = dict(MASKS[mask])
    if mask == "documents":
        options["documents"] = torch.arange(T).div(1024, rounding_mode="floor")[None]
    attention = flash_attn.flash_attention
    return lambda: torch.autograd.grad(attention(q, k, v, backend=backend, **options), (q, k, v), do)


def peak_growth(run) -> int:
    """Bytes by which this process's resident peak grows in run()."""
    def status(field):
        return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024
    ctypes.CDLL(None).malloc_trim(0)                                      # what was freed before is given back
    Path("/proc/self/clear_refs").write_text("5")                         # the peak starts from here
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before)


def peak(backend, T, mask) -> int:
    command = [sys.executable, __file__, backend, str(T), mask]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    print(f"{'mask':<10} {'T':>6}  {'textbook':>9} {'tiled':>8} {'sdpa':>8}   {'textbook':>9} {'tiled':>8} {'sdpa':>8} "
          "  tiled beside textbook, sdpa")
    for mask, T in [("causal", 2**n) for n in range(8, 14)] + [("window", LONGEST), ("documents", LONGEST)]:
        names = ("reference", "torch", "sdpa") if mask == "causal" else ("torch", "sdpa")
        runs, times = {name: step(name, T, mask) for name in names}, {name: [] for name in names}
        for turn in range(6 if T < 4096 else 4):
            for name, run in runs.items():
                if name == "reference" and T == LONGEST and turn > 1:
                    continue                                              # 14 seconds each
                start = time.perf_counter()
                run()
                if turn:
                    times[name].append(time.perf_counter() - start)
        seconds = {name: statistics.median(t) for name, t in times.items()}
        peaks = {name: peak(name, T, mask) / 1e6 for name in names}
        cells = [f"{side.get(name, float('nan')):{width}.{digits}f}" for side, digits in ((seconds, 4), (peaks, 0))
                 for name, width in (("reference", 9), ("torch", 8), ("sdpa", 8))]
        ratios = [f"{seconds[n] / seconds['torch']:.2f}x" for n in ("reference", "sdpa") if n in names]
        print(f"{mask:<10} {T:>6}  {' '.join(cells[:3])} s {' '.join(cells[3:])} MB {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        run = step(sys.argv[1], int(sys.argv[2]), sys.argv[3])
        step(sys.argv[1], 64, "causal")()                                 # what a first call loads is not the step's
        print(peak_growth(run))
    else:
        main()
