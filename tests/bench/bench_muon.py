"""Muon's cost: python tests/bench/bench_muon.py

dp 2 on two cores, taking turns step by step: every matrix orthogonalized by one rank (train.py's) | by both, each its
own copy (a group of one). Then one process on one core: AdamW | Muon. At two widths: `tiny`'s, and one where
matrices are large for their batch. Medians of a step, and of the ratios of neighbouring steps; the bytes of
the exchange, counted and by the formula.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import parallel  # noqa: E402
import scaling  # noqa: E402
import train  # noqa: E402

TURNS = 15
WIDE = ["--n-embd", "384", "--n-head", "6", "--global-batch-size", "2"]


def stepper(flags, share=True):
    """-> a function that takes a step, and the ledger of its calls."""
    c = train.parse_config(["--device", "cpu", *flags])
    world = train.join(c)
    c = train.resolve(c, world)
    rule = train.update_rule
    if not share:
        train.update_rule = lambda c, group, fused: rule(c, None, fused)
    model = train.Model(c, world)
    optimizer, ledger = train.make_optimizer(model, c), parallel.CommLedger(world.mesh.axes)
    train.update_rule = rule
    tokens = torch.randint(c.vocab_size, (c.micro_batch_size, c.seq_len))
    documents = torch.zeros_like(tokens)

    def batches():
        while True:
            yield {"tokens": tokens, "targets": tokens, "documents": documents}

    loader = batches()

    def step(number):
        if number == 0:
            ledger.__enter__()
        train.train_step(model, optimizer, loader, number, c, world)
        if number == 0:
            ledger.__exit__(None, None, None)
    return step, ledger, c


def in_turns(steppers: dict) -> dict:
    times = {name: [] for name in steppers}
    for number in range(TURNS + 2):
        for name, (step, *_) in steppers.items():
            if dist.is_initialized():
                dist.barrier()
            start = time.perf_counter()
            step(number)
            times[name].append(time.perf_counter() - start)
    return {name: x[2:] for name, x in times.items()}


def show(title, times):
    (first, a), (second, b) = times.items()
    ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
    print(f"{title:<16}{first} {statistics.median(a) * 1e3:.0f} ms, {second} {statistics.median(b) * 1e3:.0f} ms: "
          f"{ratio:.3f} x", flush=True)


def two_ranks(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for title, flags in (("tiny", []), ("384 wide", WIDE)):
        flags = [*flags, "--optimizer", "muon", "--dp", "2"]
        steppers = {"shared": stepper(flags), "each its own": stepper(flags, share=False)}
        times = in_turns(steppers)
        _, ledger, c = steppers["shared"]
        formula = scaling.messages(scaling.shape_of(c.model), train.layout_of(c, 2), scaling.Program(4, muon=True), 0)
        if rank == 0:
            show(title, times)
            print(f"{'':<16}bytes per step of a rank: {ledger.total(collective='send'):,.0f}, by the formula "
                  f"{formula['world', 'send'][1]:,.0f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parallel.start_ranks(two_ranks, 2)
    torch.set_num_threads(1)
    for title, flags in (("tiny", []), ("384 wide", WIDE)):
        show(title, in_turns({"AdamW": stepper(flags), "Muon": stepper([*flags, "--optimizer", "muon"])}))
