"""On one GPU: python tests/bench/bench_gpu.py [attention] [products] [step]

  attention   ours in Triton | torch's own (sdpa) | the textbook, bfloat16, 16 heads, 16,384 tokens in all, causal and
              with packed documents; medians, taking turns. Three figures each, of forward and of both passes:
                device   TFLOP/s of the kernels alone: the call is captured once in a CUDA graph, and replayed
                called   TFLOP/s of calls from Python, one behind the other, as in training
                host     microseconds until the call returns: above the device's time, Python is the limit
              and the growth of allocated memory. With documents: ours with limits made once, sdpa with a matrix
  products    bfloat16 | FP8 with scaling: TFLOP/s of a linear layer's three products
  step        `small` (124 M) as train.py runs it: tokens/s, MFU, memory in every precision; without compiling, with
              torch's attention, with document masks, and with recomputation
"""

import functools
import itertools
import math
import statistics
import sys
import time
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


def host_microseconds(runs: dict, turns: int = 10, calls: int = 10) -> dict:
    """{name: median microseconds until a call returns}; the GPU, which works on, is waited for between turns."""
    times = {name: [] for name in runs}
    for turn in range(turns + 3):
        for name, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if turn >= 3:
                times[name].append((time.perf_counter() - start) / calls * 1e6)
            torch.cuda.synchronize()
    return {name: statistics.median(x) for name, x in times.items()}


def captured(run):
    """A function that replays what run() launches, without Python. The calls before compile and tune."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def attention():
    cases = [(D, T, None) for D in (64, 128) for T in (1024, 2048, 4096, 8192, 16384)]
    cases += [(D, T, T // 4) for D in (64, 128) for T in (1024, 2048, 4096)]                 # tokens of a document
    print(f"{'D':>4} {'T':>6} {'document':>8} {'passes':<17} {'device':>8} {'called':>8} {'host':>8} {'MB':>6}")
    for D, T, document in cases:
        B = 16384 // T
        q, k, v, do = (torch.randn(B, 16, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3)
                       for i in range(4))
        limits = mask = None
        if document:
            ids = torch.arange(T, device="cuda").div(document, rounding_mode="floor").expand(B, T)
            limits, mask = flash_attn.document_limits(ids), train.net.document_mask(ids, q.dtype)
        ours = functools.partial(flash_attn.flash_attention, q, k, v, documents=limits)
        forwards = {"triton": functools.partial(ours, backend="triton"),
                    "sdpa": functools.partial(F.scaled_dot_product_attention, q, k, v, mask, is_causal=mask is None),
                    "textbook": functools.partial(ours, backend="reference")}
        if T > 4096:
            del forwards["textbook"]
        flops = 4 * B * 16 * T * (document or T) * D / 2                      # half of the square, or of the squares
        both = {name: lambda f=f, x=(q, k, v), do=do: torch.autograd.grad(f(), x, do) for name, f in forwards.items()}
        for passes, runs, times in (("forward", forwards, 1), ("both", both, 3.5)):
            device = alternate({name: captured(run) for name, run in runs.items()})
            called, host = alternate(runs), host_microseconds(runs)
            for name, run in runs.items():
                rates = [flops * times / ms[name] / 1e9 for ms in (device, called)]
                print(f"{D:>4} {T:>6} {document or '-':>8} {passes:<7} {name:<9} {rates[0]:>8.0f} {rates[1]:>8.0f} "
                      f"{host[name]:>8.0f} {growth(run):>6.0f}", flush=True)


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
    for flags in ("bf16", "bf16 --attention sdpa", "fp8", "fp16", "bf16 --document-mask",
                  "bf16 --document-mask --attention sdpa", "bf16 --recompute full", "bf16 --compile off", "tf32",
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
    documents = torch.arange(c.seq_len).div(300, rounding_mode="floor").expand(32, -1)
    batches = itertools.repeat({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "documents": documents})
    run = lambda: train.train_step(model, optimizer, batches, 0, c, world, scaler=scaler)
    rate = c.tokens_per_step / alternate({"step": run}, 10, calls=1)["step"] * 1e3
    memory = torch.cuda.max_memory_allocated() / 1e9
    peak = train.peak_flops(c, world.device)[0] or math.nan                                    # a GPU without a row
    return rate, rate * train.net.flops_per_token(c.model, c.seq_len) / peak, memory


def main(parts):
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py measures a GPU, and torch finds none here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {flash_attn.triton.__version__}\n")
    for part in (attention, products, step):
        if not parts or part.__name__ in parts:
            part()


if __name__ == "__main__":
    main(sys.argv[1:])
