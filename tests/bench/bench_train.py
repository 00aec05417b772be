"""Where the time of a step goes, and what the hand-written parts cost: python tests/bench/bench_train.py

  head       chunked linear + cross entropy | plain head | torch's F.linear_cross_entropy: time, alternating in one run,
             and peak memory, each in a process of its own
  optimizer  AdamW fused | foreach | one by one, on the parameters of the tiny config
  loader     batches a second
  start      seconds of `python train.py --help`, beside `import torch`
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model as net  # noqa: E402
import train  # noqa: E402


def alternate(variants: dict, repeats: int) -> dict:
    """Median seconds of each, taking turns."""
    times = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, f in variants.items():
            start = time.perf_counter()
            f()
            if turn:                                                      # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def head_variants(N, C, V):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator, requires_grad=True)
    w = torch.randn(V, C, generator=generator).mul_(0.02).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    losses = {"chunked": lambda: net.chunked_cross_entropy(x, w, targets)[0],
              "plain": lambda: F.cross_entropy(F.linear(x, w), targets, reduction="sum"),
              "torch fused": lambda: F.linear_cross_entropy(x, w, targets, reduction="sum")}

    def step(loss):
        x.grad = w.grad = None
        loss().backward()

    return {name: (lambda f=f: step(f)) for name, f in losses.items()}


def peak_bytes(variant, N, C, V) -> int:
    """Growth of this process's resident peak over forward and backward (ru_maxrss would start at the parent's)."""
    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    f, before = head_variants(N, C, V)[variant], peak()
    f()
    return peak() - before


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(f"{'head: tokens x width x vocabulary':<36} {'variant':<12} {'seconds':>8} {'ratio':>6} {'GFLOP/s':>8} "
          f"{'peak MB':>8}")
    for N, C, V in ((2048, 128, 2048), (4096, 768, 50304)):
        times = alternate(head_variants(N, C, V), 15 if V < 10000 else 5)
        for name, t in times.items():
            command = [sys.executable, __file__, "--peak", name, str(N), str(C), str(V)]
            peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"{f'{N} x {C} x {V}':<36} {name:<12} {t:8.4f} {t / times['plain']:6.2f} "
                  f"{6 * N * C * V / t / 1e9:8.1f} {peak / 1e6:8.1f}")

    c = train.parse_config([])
    gpt = net.build(c.model)
    for p in gpt.parameters():
        p.grad = torch.randn_like(p)
    steps = {name: torch.optim.AdamW(gpt.parameters(), **how).step for name, how in
             (("fused", dict(fused=True)), ("foreach", dict(foreach=True)), ("one by one", dict(foreach=False)))}
    print(f"\nAdamW on {net.num_params(c.model):,} parameters")
    times = alternate(steps, 15)
    for name, t in times.items():
        print(f"  {name:<12} {t * 1e3:7.2f} ms  {t / times['fused']:5.2f}")

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = data.prepare(["stdlib"], Path(folder) / "stdlib", c.vocab_size)
        prepared = time.perf_counter() - start
        loader = data.Loader(path, micro_batch_size=c.global_batch_size, seq_len=c.seq_len)
        t = alternate({"batch": lambda: next(loader)}, 200)["batch"]
        print(f"\nprepare the default corpus {prepared:.1f} s; "
              f"a batch of {c.global_batch_size} x {c.seq_len}: {t * 1e3:.2f} ms")

    commands = {"import torch": [sys.executable, "-c", "import torch"],
                "train.py --help": [sys.executable, str(ROOT / "train.py"), "--help"]}
    runs = {name: (lambda a=a: subprocess.run(a, capture_output=True, check=True)) for name, a in commands.items()}
    for name, t in alternate(runs, 5).items():
        print(f"{name:<18} {t:5.2f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak_bytes(sys.argv[2], *map(int, sys.argv[3:])))
    else:
        main()
