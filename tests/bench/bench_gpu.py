"""On one GPU: python tests/bench/bench_gpu.py [attention] [products] [step]

  attention   ours in Triton | torch's own (sdpa) | the textbook: TFLOP/s of forward and of forward + backward, and the
              growth of allocated memory; bfloat16, causal, 16 heads, 16,384 tokens in all; medians, taking turns
  products    bfloat16 | FP8 with scaling: TFLOP/s of a linear layer's three products
  step        `small` (124 M) as train.py runs it: tokens/s, MFU, memory in every precision; without compiling, with
              torch's attention, and with recomputation
"""

import itertools
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import flash_attn  # noqa: E402
import precision  # noqa: E402
import train  # noqa: E402


def alternate(runs: dict, turns: int = 10, calls: int = 10) -> dict:
    """{name: median milliseconds of a call}, taking turns of some calls between two events: the next one is launched
    while one runs, as in training."""
    times = {name: [] for name in runs}
    for turn in range(turns + 3):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(end) / calls)
    return {name: statistics.median(x) for name, x in times.items()}


def growth(run) -> float:
    """MB that a run allocates at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def attention():
    print(f"{'D':>4} {'T':>6}   forward: TFLOP/s{'':<14}forward + backward: TFLOP/s{'':<4}MB\n{'':<11}"
          + f"{'triton':>9} {'sdpa':>8} {'textbook':>9}  " * 3)
    for D, T in itertools.product((64, 128), (1024, 2048, 4096, 8192, 16384)):
        q, k, v, do = (torch.randn(16384 // T, 16, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                       for _ in range(4))
        names = [x for x in ("triton", "sdpa", "reference") if x != "reference" or T <= 4096]

        def forward(name, q=q, k=k, v=v):
            return flash_attn.flash_attention(q, k, v, backend=name)

        def both(name, q=q, k=k, v=v, do=do, forward=forward):
            torch.autograd.grad(forward(name), (q, k, v), do)

        flops = 4 * 16384 // T * 16 * T * T * D / 2                                  # half of the square is seen
        row = []
        for function, times in ((forward, 1), (both, 3.5)):
            ms = alternate({name: lambda name=name, f=function: f(name) for name in names})
            row.append([flops * times / ms[name] / 1e9 for name in names])
        row.append([growth(lambda name=name: both(name)) for name in names])
        print(f"{D:>4} {T:>6} " + "".join(f"{cells[0]:>9.0f} {cells[1]:>8.0f} "
                                          f"{cells[2] if len(cells) > 2 else float('nan'):>9.0f}  " for cells in row),
              flush=True)


def products():
    if not precision.has_fp8(torch.device("cuda")):
        return
    print(f"\n{'tokens x in x out':<24} {'bf16':>8} {'fp8':>8} TFLOP/s, forward and backward; fp8 off by")
    for n, k, m in ((16384, 4096, 4096), (16384, 4096, 11008), (16384, 768, 3072)):
        draw = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        x, w, dy = draw(n, k), draw(m, k), draw(n, m)
        scaled = torch.compile(precision.fp8_linear)
        runs = {name: lambda f=f, x=x, w=w, dy=dy: torch.autograd.grad(f(x, w), (x, w), dy)
                for name, f in (("bf16", F.linear), ("fp8", scaled))}
        ms, (a, b) = alternate(runs), (run() for run in runs.values())
        off = max(((p - q).norm() / p.norm()).item() for p, q in zip(a, b, strict=True))
        rates = [6 * n * k * m / ms[name] / 1e9 for name in runs]
        print(f"{f'{n} x {k} x {m}':<24} {rates[0]:>8.0f} {rates[1]:>8.0f} {'':<30} {off:.1%}", flush=True)


def step():
    print(f"\n{'small, 32 windows of 1024 per micro-batch':<52} {'tokens/s':>10} {'MFU':>6} {'GB':>6}")
    for flags in ("bf16", "bf16 --attention sdpa", "fp8", "fp16", "bf16 --recompute full", "bf16 --compile off", "tf32",
                  "bf16 --no-master-weights", "fp32"):
        rate, share, memory = measured(flags.split())
        print(f"{flags:<52} {rate:>10,.0f} {share:>6.1%} {memory:>6.1f}", flush=True)


def measured(flags):
    """-> tokens/s, MFU (of the precision's own peak), GB."""
    c = train.parse_config(["--config", "small", "--global-batch-size", "32", "--micro-batch-size", "32",
                            "--no-document-mask", "--precision", *flags])
    world = train.join(c)
    c = train.resolve(c, world)
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    model = train.Model(c, world)
    optimizer, scaler = train.make_optimizer(model, c), precision.LossScaler() if c.precision == "fp16" else None
    tokens = torch.randint(c.vocab_size, (32, c.seq_len + 1))
    batches = itertools.repeat({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    run = lambda: train.train_step(model, optimizer, batches, 0, c, world, scaler=scaler)
    rate = c.tokens_per_step / alternate({"step": run}, 10, calls=1)["step"] * 1e3
    memory = torch.cuda.max_memory_allocated() / 1e9
    peak = train.peak_flops(c, world.device)[0] or math.nan                                    # a GPU without a row
    return rate, rate * train.net.flops_per_token(c.model, c.seq_len) / peak, memory


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {flash_attn.triton.__version__}\n")
    for part in (attention, products, step):
        if not sys.argv[1:] or part.__name__ in sys.argv:
            part()
