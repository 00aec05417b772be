"""Parallelism on gloo, beside torch's own and beside one rank: python tests/bench/bench_parallel.py [STEPS]

1. Ours | torch's, two ranks on two cores, taking turns step by step in one run: DistributedDataParallel (also with
   gradients as views of its buckets), DTensor's parallelize_module, torch.distributed.pipelining's 1F1B. Median of the
   ratios of neighbouring steps, and bytes a rank sends in a step.
2. One rank | 2 or 8 ranks, all on one core, so that only what parallelism costs shows: tokens/s beside the one rank's.
3. How long a rank waits in finish_gradient_synchronization, with overlap and without.
"""

import contextlib
import copy
import functools
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import model as net  # noqa: E402
import parallel  # noqa: E402
import train  # noqa: E402

MODEL = """--n-layer 8 --n-head 4 --n-embd 256 --seq-len 256 --vocab-size 2048 --global-batch-size 8
--micro-batch-size 1 --no-document-mask --device cpu""".split()
WIDER = "--n-layer 4 --n-embd 384 --global-batch-size 32".split()             # for ranks that share a core
TURNS = 15


def batches(n, seed=0):
    tokens = torch.randint(2048, (n, 257), generator=torch.Generator().manual_seed(seed))
    return [{"tokens": x[None, :-1], "targets": x[None, 1:]} for x in tokens]


def joined(parts):
    return {name: torch.cat([b[name] for b in parts]) for name in parts[0]}


def whole_model():
    return net.build(train.parse_config(MODEL).model)


def alternate(rank, candidates):
    """{name: step} -> {name: (median seconds, median ratio of the first's time to this one's)}, from steps that take
    turns, in changing order; all ranks start each together."""
    times, order = {name: [] for name in candidates}, list(candidates.items())
    for _ in range(TURNS + 1):
        order.append(order.pop(0))
        for name, step in order:
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    first = times[next(iter(times))][1:]
    return {name: (statistics.median(t[1:]), statistics.median(a / b for a, b in zip(first, t[1:], strict=True)))
            for name, t in times.items()}


def count(step, axis):
    with parallel.CommLedger({axis: dist.group.WORLD}) as ledger:
        step()
    return ledger.total("wire")


def beside_ddp(rank):
    mine = joined(batches(8)[rank * 4:][:4])

    def step(model, finish):
        model(**mine)[0].backward()
        finish()
        for p in model.parameters():
            p.grad = None

    ours = parallel.DataParallel(whole_model(), dist.group.WORLD)
    theirs = nn.parallel.DistributedDataParallel(whole_model())
    views = nn.parallel.DistributedDataParallel(whole_model(), gradient_as_bucket_view=True)
    run = functools.partial(step, ours, ours.finish_gradient_synchronization)
    rows = alternate(rank, {"DataParallel": run, "torch DDP": lambda: step(theirs, lambda: None),
                            "torch DDP, views": lambda: step(views, lambda: None)})
    psi = sum(p.numel() for p in ours.parameters())
    # waiting with overlap, and without: all-reduce only once backward is over
    waits = {}
    for name, context in (("overlapped", None), ("not", ours.no_sync)):
        shares = []
        for _ in range(TURNS):
            dist.barrier()
            start = time.perf_counter()
            loss = ours(**mine)[0]
            if context is None:
                loss.backward()
            else:
                with context():
                    loss.backward()
            waiting = time.perf_counter()
            ours.finish_gradient_synchronization()
            end = time.perf_counter()
            shares.append((waiting - start, end - waiting))
            for p in ours.parameters():
                p.grad = None
        waits[name] = tuple(statistics.median(x) for x in zip(*shares, strict=True))
    return rows, count(run, "dp"), 4 * psi, waits


def beside_dtensor(rank):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    mine, plan = joined(batches(8)), {"*.[qkv]_proj": "column", "*.gate_proj": "column", "*.up_proj": "column",
                                      "*.o_proj": "row", "*.down_proj": "row"}

    def step(model):
        model(**mine)[0].backward()
        for p in model.parameters():
            p.grad = None

    candidates = {"tensor_parallel": parallel.tensor_parallel(whole_model(), dist.group.WORLD, plan=plan,
                                                              sequence_parallel=False)}
    theirs = whole_model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in theirs.model.layers.values():
        rows = ("self_attn.o_proj", "mlp.down_proj")
        parallelize_module(block, mesh, {name: RowwiseParallel() if name in rows else ColwiseParallel()
                                         for name, x in block.named_modules() if isinstance(x, nn.Linear)})
    with_sequence = parallel.tensor_parallel(whole_model(), dist.group.WORLD,
                                             plan=plan | {"*embed_tokens": "vocab", "lm_head": "head"})
    candidates |= {"DTensor": theirs, "with sequence": with_sequence}
    rows = alternate(rank, {name: functools.partial(step, x) for name, x in candidates.items()})
    return rows, {name: count(functools.partial(step, x), "tp") for name, x in candidates.items() if name != "DTensor"}


class TorchStage(nn.Module):
    """A stage of ours as torch's pipelining wants it: one tensor in, one out."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, x):
        return self.gpt(x) if self.gpt.model.embed_tokens is not None else self.gpt(x[..., 0], hidden=x)


def beside_pipelining(rank):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    c = train.parse_config([*MODEL, "--pp", "2"])
    world = train.join(c)
    ours = train.Model(c, world)
    parts = batches(8)
    gpt = copy.deepcopy(ours.chunks[0])
    head, gpt.lm_head = gpt.lm_head, None
    if head is not None:
        gpt.register_module("head", head)                                        # its gradient comes through the loss
    stage = PipelineStage(TorchStage(gpt), rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 8, loss_fn=lambda x, target: head(x, target)[0], scale_grads=False)
    everything = joined(parts)

    def step():
        if rank == 0:
            schedule.step(everything["tokens"])
        else:
            schedule.step(target=everything["targets"])
        for p in gpt.parameters():
            p.grad = None

    def our_step():
        ours.run(parts, 1.0)
        for p in ours.parameters():
            p.grad = None

    return alternate(rank, {"run_schedule 1f1b": our_step, "torch Schedule1F1B": step})


def on_one_core(rank, words, steps):
    """Steps of train.py's, tokens/s."""
    os.sched_setaffinity(0, {0})
    c = train.parse_config([*MODEL, *WIDER, *(x for x in words if x != "ddp")])
    world = train.join(c)
    model, parts = train.Model(c, world), batches(c.global_batch_size)
    optimizer, dp, micro = train.make_optimizer(model, c), world.mesh.dp, c.micro_batch_size
    mine = [joined(parts[(i * dp + world.mesh.dp_rank) * micro:][:micro]) for i in range(len(parts) // (micro * dp))]
    if "ddp" in words:                                             # torch's, for what two processes on a core cost it
        theirs = nn.parallel.DistributedDataParallel(model.chunks[0])
        model.sync[0].synchronize = False

        def step():
            for i, batch in enumerate(mine):
                with contextlib.nullcontext() if i == len(mine) - 1 else theirs.no_sync():
                    theirs(**batch)[0].backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    else:
        def step():
            train.train_step(model, optimizer, iter(mine), 0, c, world)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return c.tokens_per_step / statistics.median(times[1:])


def main_rank(rank, n, work, args, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    answer = work(rank, *args)
    if rank == 0:
        torch.save(answer, f"{folder}/answer")
    dist.barrier()
    dist.destroy_process_group()


def ranks(n, work, *args):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main_rank, (n, work, args, folder), nprocs=n)
        return torch.load(f"{folder}/answer", weights_only=False)


def show(rows):
    for name, (seconds, ratio) in rows.items():
        print(f"    {name:<22} {seconds * 1e3:7.0f} ms a step   {1 / ratio:.2f} x the time of the first", flush=True)


def beside_torch():
    print("data parallel, 2 ranks, 4 windows of 256 each")
    rows, wire, psi, waits = ranks(2, beside_ddp)
    show(rows)
    print(f"    sent a rank {wire / 1e6:.2f} MB | 2 Psi (n-1)/n = {psi / 1e6:.2f} MB")
    for name, (work, waiting) in waits.items():
        print(f"    {name:<12} forward and backward {work * 1e3:5.0f} ms, then waiting {waiting * 1e3:4.0f} ms: "
              f"{waiting / (work + waiting):.1%} of the step")
    print("tensor parallel, 2 ranks, 8 windows")
    rows, wire = ranks(2, beside_dtensor)
    show(rows)
    print("    sent a rank " + ", ".join(f"{name} {x / 1e6:.1f} MB" for name, x in wire.items()))
    print("pipeline, 2 stages, 8 micro-batches of a window")
    show(ranks(2, beside_pipelining))


def beside_one_rank(steps):
    print("all ranks on one core: tokens/s beside one rank's")
    layouts = ["--micro-batch-size 4", "--dp 2 --micro-batch-size 4", "--dp 2 --micro-batch-size 4 ddp",
               "--dp 2 --zero 1 --micro-batch-size 4",
               "--pp 2 --micro-batch-size 4", "--tp 2 --micro-batch-size 4",
               "--tp 2 --micro-batch-size 4 --no-sequence-parallel", "--dp 2 --tp 2 --pp 2 --micro-batch-size 4"]
    rates = {flags: [] for flags in layouts}
    for _ in range(3):                                                                                       # in turns
        for flags in layouts:
            words = flags.split()
            n = math.prod(int(words[i + 1]) for i, word in enumerate(words) if word in ("--dp", "--tp", "--pp"))
            rates[flags].append(ranks(n, on_one_core, words, steps))
    for flags, rate in rates.items():
        beside = statistics.median(x / one for x, one in zip(rate, rates[layouts[0]], strict=True))
        print(f"    {flags:<52} {statistics.median(rate):7,.0f}   {beside:.2f} x", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    beside_torch()
    beside_one_rank(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
