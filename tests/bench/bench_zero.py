"""ZeRO on gloo, beside torch's own: python tests/bench/bench_zero.py

Two ranks on two cores, float32, AdamW, one micro-batch of 2 windows of 256 a rank, taking turns step by step in one
run: stage 1 | DistributedDataParallel and ZeroRedundancyOptimizer; stage 2 | FSDP2 that keeps its parameters between
forward and backward; stage 3 | FSDP2. Median of the ratios of neighbouring steps; the largest resident memory of a rank
whose process runs nothing else (glibc told to give freed blocks back: what is held counts, not what malloc keeps); and
where a step's time goes. First of all, gloo's own reduce-scatter beside the exchange of slices that stands for it.
"""

import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import model as net  # noqa: E402
import zero  # noqa: E402

CONFIG = net.ModelConfig(vocab_size=2048, seq_len=256, n_layer=8, n_head=6, n_kv_head=6, head_dim=64, n_embd=384,
                         n_ff=1024)
TURNS = 11


def build(name):
    """-> model, optimizer, what sums the gradients or None."""
    gpt, world = net.build(CONFIG), dist.group.WORLD
    if name == "plain":
        return gpt, torch.optim.AdamW(gpt.parameters(), lr=1e-4, fused=True), None
    if name in ("stage 1", "stage 2"):
        optimizer = zero.ShardedOptimizer(gpt.parameters(), torch.optim.AdamW, group=world, stage=int(name[-1]),
                                          reduce="mean", lr=1e-4, fused=True)
        return gpt, optimizer, optimizer
    if name == "stage 3":
        sync = zero.FullyShard(gpt, world, blocks=gpt.model.layers.values(), reduce="mean")
        return sync, torch.optim.AdamW(sync.parameters(), lr=1e-4, fused=True), sync
    if name == "ZeroRedundancyOptimizer":
        ddp = nn.parallel.DistributedDataParallel(gpt)
        return ddp, ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, lr=1e-4, fused=True), None
    for block in (*gpt.model.layers.values(), gpt):
        fully_shard(block, reshard_after_forward=name == "FSDP2")
    return gpt, torch.optim.AdamW(gpt.parameters(), lr=1e-4, fused=True), None


def stepper(name):
    model, optimizer, sync = build(name)
    tokens = torch.randint(2048, (2, 257), generator=torch.Generator().manual_seed(dist.get_rank()))
    spent = {"forward": [], "backward": [], "finish": [], "update": []}

    def step():
        clocks = [time.perf_counter()]
        loss, _ = model(tokens[:, :-1], tokens[:, 1:])
        clocks.append(time.perf_counter())
        (loss / 512).backward()
        clocks.append(time.perf_counter())
        if sync is not None:
            sync.finish_gradient_synchronization()
        clocks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        clocks.append(time.perf_counter())
        for phase, a, b in zip(spent, clocks, clocks[1:], strict=False):
            spent[phase].append(b - a)
    return step, spent


def in_turns(rank, names):
    made = {name: stepper(name) for name in names}
    times = {name: [] for name in names}
    for _ in range(TURNS + 2):
        for name, (step, _) in made.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    return {name: (t[2:], {phase: statistics.median(x[2:]) for phase, x in made[name][1].items()})
            for name, t in times.items()}


def scatters(rank, n):
    """Milliseconds to sum 25 MB over the ranks and keep a slice: gloo's reduce-scatter, and an exchange and a sum."""
    x = torch.randn(25_000_000 // 4 // n * n)
    y, out = torch.empty_like(x), torch.empty(len(x) // n)

    def exchange():
        dist.all_to_all_single(y, x)
        torch.sum(y.view(n, -1), 0, out=out)

    times = {}
    for _ in range(TURNS):
        for name, work in (("reduce-scatter", lambda: dist.reduce_scatter_single(out, x)), ("exchange", exchange)):
            dist.barrier()
            start = time.perf_counter()
            work()
            times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def resident(rank, name):
    """MB that a rank holds at most in three steps, beyond what it held before the model."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, _ = stepper(name)
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def entry(rank, n, store, fn, args, answers):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    answer = fn(rank, *args)
    if rank == 0:
        answers.put(answer)
    dist.barrier()
    dist.destroy_process_group()


def ranks(n, fn, *args):
    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
    if fn is resident:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(entry, (n, f"{folder}/store", fn, args, answers), nprocs=n)
    return answers.get()


def main():
    for n in (2, 4):
        print(f"25 MB, {n} ranks: " + ", ".join(f"{name} {t:.0f} ms" for name, t in ranks(n, scatters, n).items()))
    print(f"{net.num_params(CONFIG) / 1e6:.1f} M parameters")
    for ours, theirs in (("stage 1", "ZeroRedundancyOptimizer"), ("stage 2", "FSDP2, not resharded"),
                         ("stage 3", "FSDP2")):
        rows = ranks(2, in_turns, ["plain", ours, theirs])
        ratio = statistics.median(b / a for a, b in zip(rows[ours][0], rows[theirs][0], strict=True))
        print(f"{ours} beside {theirs}: {ratio:.2f} x its speed")
        for name, (times, spent) in rows.items():
            held = ranks(2, resident, name)
            where = ", ".join(f"{phase} {seconds * 1e3:.0f}" for phase, seconds in spent.items())
            print(f"    {name:<26}{2 * 512 / statistics.median(times):7,.0f} tokens/s   "
                  f"{statistics.median(times) * 1e3:5.0f} ms: {where:<58} {held:6.0f} MB", flush=True)


if __name__ == "__main__":
    main()
