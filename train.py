"""Training: the file that imports its siblings and wires them into a run.

    python train.py                                       train `tiny` on Python's standard library: minutes on 2 cores
    python train.py --data "my/*.txt" --out out/mine      your text
    python train.py --out out/tiny --sample "def main("   continue a text
    python train.py --config 7b --gpu h100 --dp 8 --tp 4 --dry-run       memory, time and cost on 32 GPUs, from anywhere
    python train.py --nproc 4 --tp 2 --pp 2               four ranks: this CPU's cores, or GPUs
    torchrun --nproc-per-node 8 train.py --config small --data FOLDER
    python train.py --objective sft --init-from out/tiny --data data/instructions.jsonl --seq-len 256 --out out/sft

Pre-training is one loop, and textbook_loop() below is all of it, for one rank. The rest of the file is the same loop on
many ranks, with runs that survive being killed. dp ranks share the batch, tp ranks each layer, pp ranks the depth
(parallel.py). --zero splits what dp ranks would all hold (zero.py). Training goes on in stages, each with the weights
of the one before:

    pretrain   predict the next token of text           a base model: it continues
    sft        ... of answers, after their prompts      it answers, in the form that it was shown
    dpo        prefer the chosen answer of a pair       it gives the answers that people, or a judge, preferred
    rl         sample answers, reward the good ones     it gets what the reward pays for

All four follow the gradient of sum_t w_t nll_t / N. Only the tokens' weights w_t and N differ (model.py, "the same
loss, other weights"). nll_t: minus the log-probability of target t. N: how many targets (dpo: pairs; rl: answers).
train_step() does one step. In update k, counted from 1, AdamW changes a parameter p by its gradient g:

      m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2           m' = m / (1 - b1^k)      v' = v / (1 - b2^k)
      p -= lr (m' / (sqrt(v') + eps) + wd p)               b1, b2: beta1, beta2; wd: weight decay, on matrices alone

With --optimizer muon, as in `tiny`, Muon updates the blocks' matrices (zero.py, muon_step), and AdamW the rest.

Given weights, the optimizer's states and fp16's loss scale, a step depends only on config, data, seed and its number
(dpo, rl: and the starting model). So the same command continues a run from its newest checkpoint: bit for bit on a CPU,
on a GPU as far as its kernels are deterministic. Ctrl-C and SIGTERM save one first.

    out/RUN/   config.json   metrics.jsonl   card.md   tokenizer.model   checkpoints/step-00000400/...

Exit codes: 0 done, or stopped and saved; 2 bad input; 3 diverged; 1 anything else.
Sources: AdamW (Loshchilov 2019, arXiv:1711.05101); SFT and RLHF (Ouyang 2022, 2203.02155); DPO (Rafailov 2023,
2305.18290); RLAIF (Bai 2022, 2212.08073).
In this order: the textbook loop - a step - evaluate - build - the run - the objectives. Then what is looked up.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import logging
import math
import operator
import os
import signal
import sys
import tempfile
import time
import timeit
import traceback
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import flash_attn
import model as net
import parallel
import precision
import scaling
import zero

# ---- the textbook loop -----------------------------------------------------------------------------------------------

def textbook_loop(c: Config, loader, dtype=torch.float32):
    """Pre-training on one rank, in its plainest form. Yields (loss, gradient norm, model) after each step. The tests
    compare every layout of the real loop with it. A comment names a file that goes further. documents: see data.py."""
    model = net.build(c.model, c.seed, dtype=dtype)                  # parallel.py: a rank builds only its part
    optimizer = update_rule(c)(decay_groups(model, c))               # AdamW, or Muon: zero.py
    for step in range(c.steps):
        batch = next(loader)                                         # data.py: the same batch on any number of ranks
        logits = model(batch["tokens"], documents=batch["documents"])        # flash_attn.py: no T x T matrix of scores
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(),
                               ignore_index=data.NO_TARGET)          # model.py: never all logits at once
        loss.backward()                                              # parallel.py: micro-batches, stages, ranks
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        if norm > c.grad_clip > 0:                                   # train.py: one norm over the pieces of all ranks
            for p in model.parameters():
                p.grad *= c.grad_clip / norm
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, c) * group["lr_ratio"]
        optimizer.step()                                             # precision.py: float32 masters; zero.py: shards
        optimizer.zero_grad()
        yield loss.item(), norm, model                               # scaling.py: how low it gets, what it costs


def update_rule(c: Config, group=None, fused: bool = False):
    """A function that makes the optimizer of decay_groups(): AdamW; or Muon on the blocks' matrices, and AdamW on the
    rest. group: the ranks that may hold a part, or a copy, of the same matrix."""
    adamw = functools.partial(torch.optim.AdamW, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=fused)
    return adamw if c.optimizer == "adamw" else functools.partial(zero.Muon, rest=adamw, group=group)


def decay_groups(model, c: Config) -> list[dict]:
    """Weight decay acts on matrices, not on biases and norms. len(p.box) (model.py) says how many dimensions the whole
    parameter has, also where p is a flat shard of it (zero.py). lr_ratio: a group's learning rate / lr_at."""
    ratio = {"lr_ratio": c.adamw_lr_ratio if c.optimizer == "muon" else 1.0}
    kinds = {"decay": ratio | {"weight_decay": c.weight_decay}, "vector": ratio | {"weight_decay": 0.0}}
    if c.optimizer == "muon":
        kinds["muon"] = dict(weight_decay=c.weight_decay, muon=True, momentum=c.momentum, lr_ratio=1.0)

    def kind(p):
        if "muon" in kinds and len(p.box) == 2 and ".layers." in p.full_name:
            return "muon"
        return "decay" if len(p.box) >= 2 else "vector"

    return [{"params": [p for p in model.parameters() if kind(p) == k]} | options for k, options in kinds.items()]


def lr_at(step: int, c: Config) -> float:
    """Learning rate of update number `step`, counted from 0: a linear rise, then a cosine, or constant with a linear
    fall at the end (wsd: warmup, stable, decay)."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    lowest = c.lr * c.min_lr_ratio
    if c.schedule == "cosine":
        done = (step - c.warmup_steps) / (c.steps - c.warmup_steps)
        return lowest + (c.lr - lowest) * 0.5 * (1 + math.cos(math.pi * done))
    to_come = (c.steps - step) / max(1.0, c.steps * c.decay_fraction)          # above 1: the fall has not begun
    return lowest + (c.lr - lowest) * min(1.0, to_come)


# ---- a step ----------------------------------------------------------------------------------------------------------

def to_device(batch, c: Config, device):
    """The batch on the device; without --document-mask it has no document ids, and attention sees the whole window."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()
            if c.document_mask or name != "documents"}


def train_step(model: Model, optimizer, loader, step: int, c: Config, world: parallel.World, stop_signals=(),
               on_phase=lambda step, phase: None, scaler: precision.LossScaler | None = None):
    """One update -> (loss, gradient norm before clipping, whether any rank was asked to stop, the objective's
    statistics). The loss is per target (dpo: per pair; rl: per answer). model.run(), below, does forward and backward
    and returns each micro-batch's nll (B, T). stop_signals: what this rank has received. on_phase: see train().
    If the loss or the norm is not finite, no weight changes, and the scaler's scale becomes smaller. Raises
    FloatingPointError if the scale cannot become smaller, DataError for a batch without any target."""
    on_phase(step, "data")
    batches = [to_device(next(loader), c, world.device) for _ in range(c.grad_accum_steps(world.mesh.dp))]
    # 1. N: how many targets the global batch has (dpo: pairs; rl: answers)
    N = parallel.all_reduce(sum(b.get("count", (b["targets"] >= 0).sum()) for b in batches), world.mesh.dp_group)
    on_phase(step, "forward_backward")
    # in dpo and rl the tokens' weights w_t depend on the model: a pass without gradient sets them (weigh_tokens)
    weigh, statistic_names = OBJECTIVES.get(c.objective, (None, ()))
    sums = weigh_tokens(weigh, model, batches, c) if weigh else []
    # 2. the gradient of scale x sum_t w_t nll_t / N, summed over the micro-batches. The loss of one is the sum without
    # the factor, so its backward starts from scale / N
    scale = scaler.scale if scaler else 1.0                                               # fp16's loss scale, or 1
    loss_grad = scale / N.double()
    if c.precision == "fp16":
        # the head computes the logits' gradient in forward (model.py, ChunkedCrossEntropy). fp16 rounds small values of
        # it to 0, before a factor of backward comes. So scale / N is put into the tokens' weights: backward starts at 1
        for batch in batches:
            batch["weights"] = loss_grad * batch.get("weights", torch.ones_like(batch["targets"], dtype=torch.float32))
        loss_grad = torch.ones_like(loss_grad)
    nlls = model.run(batches, loss_grad)
    # 3. sum gradients over dp, and those of parameters with sum_over (parallel.py: tied weights, norms) over its groups
    on_phase(step, "reduce")
    model.finish_gradient_synchronization()
    parallel.reduce_partial_gradients(parameters_of(optimizer))
    # 4. one all-reduce of: squared gradient norm (each piece counted once), ranks that were asked to stop, loss, the
    # objective's statistics
    total = torch.zeros(3 + len(statistic_names), dtype=torch.float64, device=world.device)
    total[0] = parallel.squared_norm(p.grad for p in optimizer.owned)
    total[1] = bool(stop_signals)
    if model.counts_loss:                                         # on one rank of each copy of the model
        # dpo, rl: sums has the loss and two statistics of each micro-batch; else it is empty, and nll alone is summed
        total[2:] = sum(sums or [nll.double().sum() for nll in nlls]) / N
    sumsq, stop, loss, *statistics = world.sum(total).tolist()
    grad_norm = math.sqrt(sumsq) / scale if math.isfinite(sumsq) else math.nan
    if math.isnan(loss) and not N.item():
        raise data.DataError(f"data must have a target in every batch, that of step {step + 1} has none; "
                             f"--seq-len is {c.seq_len}")
    found_inf = not (math.isfinite(loss) and math.isfinite(grad_norm))
    # 5. no update if the loss or the norm is not finite; 6. else clip, divide by the scale, update
    if not found_inf:
        on_phase(step, "update")
        factor = (c.grad_clip / grad_norm if grad_norm > c.grad_clip > 0 else 1.0) / scale
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in parameters_of(optimizer)], factor)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, c) * group["lr_ratio"]
        optimizer.step()
    optimizer.zero_grad()
    if scaler:
        scaler.update(found_inf)
    return loss, grad_norm, stop > 0, dict(zip(statistic_names, statistics, strict=True))


# ---- evaluate --------------------------------------------------------------------------------------------------------

def windows_per_unit(c: Config) -> int:
    """How many windows (sequences) one micro-batch must hold together: dpo's chosen and rejected, rl's group."""
    return {"dpo": 2, "rl": c.group_size}.get(c.objective, 1)


def windows_evaluated(loader, c: Config) -> int:
    """How many windows an evaluation reads: eval_windows, or all; with dpo, an even number."""
    unit = windows_per_unit(c)
    return min(loader.num_windows, math.ceil((c.eval_windows or loader.num_windows) / unit) * unit)


@torch.no_grad()
def forward_passes(model: Model, loader, windows: int, c: Config, world: parallel.World):
    """Run the first `windows` windows of a split, in its permuted order (data.py), in micro-batches, each rank its
    share. Yields (batch, nll) where model.counts_loss is true, elsewhere nothing."""
    num_batches = math.ceil(windows / (world.mesh.dp * c.micro_batch_size))                     # equal on all ranks
    window_starts = [(i * world.mesh.dp + world.mesh.dp_rank) * c.micro_batch_size for i in range(num_batches)]
    for i in range(0, num_batches, 2 * c.pp):            # several at a time, so that all stages of a pipeline have work
        batches = []
        for start in window_starts[i:i + 2 * c.pp]:
            # all ranks must run equally often: a rank with no windows left reads old ones, without their targets
            batch = loader.batch(range(start % windows, min(start % windows + c.micro_batch_size, windows)))
            if start >= windows:
                batch["targets"].fill_(data.NO_TARGET)
                batch["count"] = torch.tensor(0)
            batches.append(to_device(batch, c, world.device))
        nlls = model.run(batches)
        if model.counts_loss:
            yield from zip(batches, nlls, strict=True)


def evaluate(model: Model, loader, c: Config, world: parallel.World) -> dict:
    """Validation loss in nats per target, and bits per byte of text, over the whole split or eval_windows of it. dpo:
    the loss per pair, the share of pairs that the model ranks right, the mean margin (model.py, preference)."""
    token_bytes = torch.from_numpy(loader.tokenizer.token_bytes).to(world.device)
    # sums of: targets, loss, bytes of their text, 0 (dpo: pairs, loss, pairs that are ranked right, margins)
    total = torch.zeros(4, dtype=torch.float64, device=world.device)
    for batch, nll in forward_passes(model, loader, windows_evaluated(loader, c), c, world):
        if c.objective == "dpo":
            total += torch.cat([batch["count"][None], net.preference(batch, nll, c.beta)[1]])
        else:
            is_target = batch["targets"] >= 0
            text_bytes = token_bytes[batch["targets"].clamp(min=0)] * is_target
            total[:3] += torch.stack([is_target.sum(), nll.double().sum(), text_bytes.sum()])
    count, loss, *rest = world.sum(total).tolist()
    if c.objective == "dpo":
        return {"val_loss": loss / count, "val_accuracy": rest[0] / count, "val_margin": rest[1] / count}
    # bits = nats / ln 2; rest[0]: bytes
    return {"val_loss": loss / count, "val_bpb": loss / math.log(2) / rest[0], "val_targets": int(count)}


# ---- build -----------------------------------------------------------------------------------------------------------

class Model(torch.nn.Module):
    """This rank's part of the model: `chunks`, its pipeline stages (most often one), and `sync`, what sums their
    gradients over dp. Chunk i of pipeline rank r is stage i pp + r of the whole pipeline."""

    def __init__(self, c: Config, world: parallel.World, read=None, dtype=None):
        super().__init__()
        self.c, self.mesh, self.world = c, world.mesh, world
        self.hidden_dtype = torch.promote_types(dtype or c.dtype, torch.float32)     # what pipeline stages send
        # sync at --zero 0: a DataParallel (parallel.py); 1, 2: the optimizer (make_optimizer calls sum_with); 3: each
        # pipeline stage's FullyShard (make_stage appends it). no_sync: the context of each backward but the last
        # micro-batch's. In it gradients are added up, and not sent (--zero 2 and 3 send those of every micro-batch)
        self.sync, self.no_sync = [], contextlib.nullcontext
        self.chunks = torch.nn.ModuleList(make_stage(c, world.device, self.mesh, chunk * c.pp + self.mesh.pp_rank, read,
                                                     dtype, self.sync) for chunk in range(c.stages // c.pp))
        if c.zero == 0:
            self.sum_with(parallel.DataParallel(self.chunks, self.mesh.dp_group))
        self.counts_loss = self.mesh.pp_rank == c.pp - 1 and self.mesh.tp_rank == 0      # tp ranks have equal losses
        self.on_op = None                                   # --profile: called with each operation's start and end

    def sum_with(self, sync):
        """`sync` sums the gradients over dp: a DataParallel, or at --zero 1 and 2 the optimizer."""
        self.sync, self.no_sync = [sync], sync.no_sync

    def finish_gradient_synchronization(self):
        for sync in self.sync:
            sync.finish_gradient_synchronization()

    def run(self, batches, loss_grad=None) -> list:
        """Micro-batches through this rank's pipeline stages. loss_grad None: forward only. Else backward too, from
        loss_grad = d objective / d loss, the same for every micro-batch. Returns a list: nll (B, T) of each
        micro-batch on the last stage, None on the others."""
        c, m = self.c, len(batches)
        arguments = {"tokens", "targets", "weights", "documents"}                               # of GPT.forward
        batches = [{name: x for name, x in batch.items() if name in arguments} for batch in batches]
        order = parallel.forward_only(c.pp, m, len(self.chunks)) if loss_grad is None else pipeline_schedule(c, m)

        def hidden_like(batch):
            B, T = batch["tokens"].shape
            T_local = T // (c.tp if c.sequence_parallel else 1)
            return torch.empty(B, T_local, c.n_embd, dtype=self.hidden_dtype, device=self.world.device)

        return parallel.run_schedule(order, self.chunks, batches, self.mesh.pp_groups, loss_grad=loss_grad,
                                     hidden_like=hidden_like, no_sync=self.no_sync, on_op=self.on_op, timeout=c.timeout)


def pipeline_schedule(c: Config, micro_batches: int) -> list:
    """Each pipeline rank's operations of a step. One stage: forward, backward, micro-batch after micro-batch."""
    kind = c.pp_schedule if c.pp > 1 else "1f1b"
    sizes = (c.pp, micro_batches, c.pp_chunks) if kind == "interleaved" else (c.pp, micro_batches)
    return parallel.SCHEDULES[kind](*sizes)


def make_stage(c: Config, device, mesh=None, stage: int = 0, read=None, dtype=None, sync=None) -> net.GPT:
    """Build pipeline stage `stage` on the device; with one stage it is the model. tp splits each layer.

    Weights come from read(name, box: which slice): a checkpoint's, or keyed_init (model.py). dtype: default c.dtype.
    In 16 bits the modules get a ComputePolicy (precision.py). No rank ever holds more than its part; at --zero 3 it
    holds shards, and the FullyShard that gathers them is appended to `sync`.
    """
    dtype, policy = dtype or c.dtype, None
    if dtype.itemsize == 2:
        # a CPU emulates low precision: matrix products get float32 copies of their inputs. Not with tp, nor with zb
        # (zero bubble): these must recognise the tensors that F.linear gets (parallel.py: regather, SplitLinears)
        emulate = device.type == "cpu" and c.tp == 1 and not c.is_zero_bubble
        policy = precision.ComputePolicy(dtype, emulate=emulate)
    gpt = meta_stage(c, device, mesh, stage, policy)
    # rounded to dtype, then float32 again: float32 masters start from the same values in a sharded and a whole model
    read = read or (lambda name, box: net.keyed_init(name, box, c.seed, c.model).to(dtype).float())
    sharded = c.zero == 3 and sync is not None
    if not sharded:
        gpt = net.fill(gpt, read, device, dtype)
    if policy:
        if c.precision == "fp8":
            precision.fp8_products(gpt, group=mesh and mesh.tp_group)
        policy.applied(gpt)
        for p in gpt.parameters():
            p.grad_dtype = torch.float32                                            # gradients accumulate in float32
    if sharded:
        master_dtype = torch.float32 if policy and c.master_weights else dtype              # the shards are the masters
        sync.append(zero.FullyShard(gpt, mesh.dp_group, blocks=gpt.model.layers.values(), compute_dtype=dtype,
                                    reduce_dtype=torch.promote_types(dtype, torch.float32),
                                    init=lambda p: read(p.full_name, p.box).to(device, master_dtype)))
    if compiles(c, device):
        for block in gpt.model.layers.values():     # recomputation and zero.py's gathering stay outside, uncompiled
            block.run = torch.compile(block.run)
        if gpt.lm_head is not None and c.tp == 1:
            gpt.lm_head.softmax = torch.compile(gpt.lm_head.softmax)
    return gpt


def meta_stage(c: Config, device, mesh, stage: int, policy=None) -> net.GPT:
    """A stage without numbers: torch's meta device has shapes alone. Attention is chosen, the width is split over tp,
    the depth over pp. Raises ValueError for sizes that the mesh does not divide."""
    backend = c.attention if device.type == "meta" else flash_attn.resolve_backend(c.attention, device)
    if backend == "sdpa":                                 # prepare runs once per micro-batch, for all layers (model.py)
        attention = net.sdpa_attention
        prepare = lambda documents, dtype: net.document_mask(documents, policy.low_dtype if policy else dtype)
    else:
        attention = functools.partial(flash_attn.flash_attention, backend=backend)
        prepare = lambda documents, _: flash_attn.document_limits(documents)
    if policy:
        # RoPE may return q and k in float32. The cast is a part of `attention`, so --recompute selective repeats it too
        attention = policy.as_operation(attention)
    with torch.device("meta"):
        gpt = net.GPT(c.model, attention, recompute=c.recompute, prepare=prepare)
    if mesh is not None and mesh.tp > 1:
        parallel.tensor_parallel(gpt, mesh.tp_group, sequence_parallel=c.sequence_parallel)
    if mesh is not None and mesh.pp > 1:
        is_first, is_last = stage == 0, stage == c.stages - 1
        own_layers = parallel.stage_layers(c.n_layer, stage, c.stages)
        gpt.model.layers = torch.nn.ModuleDict({n: block for n, block in gpt.model.layers.items()
                                                if int(n) in own_layers})
        # tied, head and embedding are one Parameter. First and last stage have a copy: its gradient is the sum of two
        if c.tie_embeddings and (is_first or is_last):
            gpt.lm_head.weight.sum_over = (*getattr(gpt.lm_head.weight, "sum_over", ()), mesh.ends_group)
        if not is_first:
            gpt.model.embed_tokens = gpt.model.embed_positions = None
        if not is_last:
            gpt.model.norm = gpt.lm_head = None
    return gpt


def compiles(c: Config, device) -> bool:
    return c.compile == "on" or c.compile == "auto" and device.type != "cpu" and not c.is_zero_bubble


def make_optimizer(model: Model, c: Config):
    """The optimizer of all that this rank updates. optimizer.owned: of that, the pieces that this rank adds to the norm
    and saves. If several ranks have the same piece, the lowest of them owns it. world.group and world.host are both
    all the ranks: one over the device's backend, the other over gloo, for objects and long waits (parallel.World)."""
    groups, rule = decay_groups(model, c), update_rule(c, model.world.group, fused=True)
    if c.dtype.itemsize == 2:
        rule = functools.partial(precision.MasterWeights, optimizer_cls=rule, keep=c.master_weights)
    if c.zero in (1, 2):
        optimizer = zero.ShardedOptimizer(groups, rule, group=model.mesh.dp_group, stage=c.zero,
                                          order=model.parameters())
        model.sum_with(optimizer)
    else:
        optimizer = rule(groups)
    optimizer.owned = parallel.owned(parameters_of(optimizer), model.world.host)
    return optimizer


def parameters_of(optimizer) -> list:
    """All that this rank updates, copies too (optimizer.owned: without)."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- the run ---------------------------------------------------------------------------------------------------------

def train(c: Config, world: parallel.World, on_phase=lambda step, phase: None) -> int:
    """Train, or go on training, to c.steps -> exit code. c: complete, from resolve(). on_phase(step, phase) is called
    as a step proceeds: "data", "forward_backward", "reduce", "update", "evaluate", "checkpoint": tests kill
    a run there. world.first(work): rank 0 alone does work, and all get its result. world.say: rank 0 prints."""
    started, stopping = time.perf_counter(), False
    with contextlib.ExitStack() as stack:
        with bad_input():                                             # a ValueError in here ends with exit code 2
            loader, val = open_data(c, world)
            if world.host is not None:
                parallel.set_timeout(world.host, c.timeout)           # it was a day, while rank 0 prepared the data
            world.first(lambda: lock_folder(c, stack))
            run = Run(c, world, loader, val, catch_stop_signals(stack), on_phase, stack)
        world.say(announcement(run, time.perf_counter() - started))
        try:
            while True:
                at_start = run.step == 0 and c.objective != "pretrain"
                if (run.is_due(c.eval_interval) or at_start) and not stopping:     # else the next start evaluates
                    run.evaluate()
                if run.is_due(c.checkpoint_interval) or run.is_last_before_decay() or stopping:
                    run.save(stopping)
                if stopping:
                    world.say(f"\nstopped at step {run.step} of {c.steps} and saved; the same command goes on")
                    return 0
                if run.step == c.steps:
                    break
                stopping = run.take_step()
        except FloatingPointError as error:
            world.say(f"step {run.step}: diverged, {error}; {run.newest_saved()}; try a lower --lr than {c.lr}")
            return 3
        if world.rank == 0:
            finish(run)
    return 0


class Run:
    """A run in progress: its parts, the step it is at, and what happens there. It begins with the newest checkpoint in
    its folder, or with --init-from (its parent), or with the seed. Cards: make_card. `stack` closes its files."""

    def __init__(self, c: Config, world: parallel.World, loader, val, stop_signals: list, on_phase,
                 stack: contextlib.ExitStack):
        self.c, self.world, self.loader, self.val = c, world, loader, val
        self.stop_signals, self.on_phase, self.folder = stop_signals, on_phase, Path(c.out)
        self.checkpoints = data.Checkpoints(self.folder / "checkpoints", c.keep_checkpoints, group=world.host,
                                            first=world.first)
        reader, read_parent = find_checkpoint(c, self.checkpoints, loader), None
        meta = {"step": 0, "evaluation": None, "card": {"wall_seconds": 0.0}, "parent_card": {}}
        if reader:
            meta = reader.meta
            loader.load_state_dict(meta["loader"])
        self.step = self.first_step = world.step = meta["step"]               # updates so far; first_step stays so
        self.saved = meta["step"] if reader else None                         # the step of the newest checkpoint
        self.evaluation = meta["evaluation"]                                  # the newest: {"step", "val_loss", ...}
        self.parent_card = meta.get("parent_card", {})
        if c.init_from and (not reader or c.objective == "rl"):         # rl compares with the parent in every step
            read_parent, self.parent_card = open_parent(c, world)
            if reader and self.parent_card != meta.get("parent_card"):
                raise BadInput(f"init_from must be as it was when the run in {c.out} began, {c.init_from} has changed")
        self.model = Model(c, world, reader.read if reader else read_parent)
        self.optimizer = make_optimizer(self.model, c)
        self.scaler = precision.LossScaler(c.loss_scale) if c.precision == "fp16" and c.loss_scale else None
        self.skipped = 0                               # updates whose gradients were not finite: no weight changed
        if reader:
            self.checkpoints.load(self.optimizer, reader)
            if self.scaler:
                self.scaler.load_state_dict(meta["loss_scaler"])
                self.skipped = meta["loss_scaler"]["skipped"]
        # open_objective may set: rl's sampled batches, held-out prompts to answer, the text of pre-training
        self.batches, self.prompts, self.pretraining_val = loader, None, None
        if c.objective != "pretrain":
            open_objective(self, read_parent)
        self.metrics = stack.enter_context(open_files(self)) if world.rank == 0 else None
        self.bill = make_bill(c, world)
        self.peak, self.peak_source = peak_flops(c, world.device)
        self.began = time.perf_counter() - meta["card"]["wall_seconds"]
        self.step_seconds = []                                                # of each step since a line was printed

    def log(self, **entry):
        """A line of metrics.jsonl, which has one per step and one per evaluation. What is not finite becomes null."""
        if self.metrics:
            entry = {name: x if math.isfinite(x) else None for name, x in entry.items()}
            self.metrics.write(json.dumps(entry) + "\n")
            self.metrics.flush()

    def is_due(self, interval: int) -> bool:
        return self.step == self.c.steps or self.step > 0 and interval > 0 and self.step % interval == 0

    def is_last_before_decay(self) -> bool:             # wsd: kept, so that a run with more --steps can go on from it
        c, to_go = self.c, self.c.steps - self.step
        return (c.schedule == "wsd" and self.step > c.warmup_steps
                and to_go < max(1.0, c.steps * c.decay_fraction) <= to_go + 1)

    def say(self, line: str):
        self.world.say(f"step {self.step:>{len(str(self.c.steps))}}/{self.c.steps}  {line}")

    def newest_saved(self) -> str:
        return "there was no checkpoint yet" if self.saved is None else f"the checkpoint of step {self.saved} is intact"

    def evaluate(self):
        """Evaluate, unless there is no validation window, or the checkpoint that was read holds this evaluation."""
        c, world = self.c, self.world
        if not self.val.num_windows or self.evaluation and self.evaluation["step"] == self.step:
            return
        self.on_phase(self.step, "evaluate")
        found = evaluate(self.model, self.val, c, world) if c.objective != "rl" else {}
        if self.prompts:
            reward = reward_of_answers(self.model, self.prompts, c, world)
            if c.objective == "rl":                    # the best checkpoint, which is kept, has the smallest val_loss
                if math.isnan(reward):
                    raise BadInput(f"reward must apply to prompts in {c.data}, {c.reward} does not")
                found["val_loss"] = -reward
            if not math.isnan(reward):
                found["reward"] = reward
        if self.pretraining_val:
            as_text = dataclasses.replace(c, objective="pretrain", eval_windows=64)
            found["text_loss"] = evaluate(self.model, self.pretraining_val, as_text, world)["val_loss"]
        self.evaluation = {"step": self.step} | found
        if not math.isfinite(found["val_loss"]):
            raise FloatingPointError(f"validation loss {found['val_loss']}")
        self.log(**self.evaluation)
        self.say(evaluation_line(found, c))

    def save(self, stopping: bool):
        """Write a checkpoint, unless this step has one. Refused: weights that are not finite (a step's loss is computed
        before its update), and the end of a run whose replicas differ, or that skipped every step."""
        if self.step == self.saved:
            return
        if self.step == self.c.steps == self.skipped:
            raise FloatingPointError("every step was skipped, no weight has changed")
        not_finite = sum((~p.detach().isfinite()).any().double() for p in self.model.parameters())
        if self.world.sum(not_finite).item():
            raise FloatingPointError("a weight is not finite")
        if self.step == self.c.steps:
            parallel.check_replicas(self.model.parameters(), self.world.host)
        self.on_phase(self.step, "checkpoint")
        try:
            self.checkpoints.save(self.step, self.optimizer, {
                "step": self.step, "config": dataclasses.asdict(self.c), "loader": self.loader.state_dict(),
                "card": make_card(self), "evaluation": self.evaluation, "keep": self.is_last_before_decay(),
                "parent_card": self.parent_card, "tokenizer_sha256": self.loader.tokenizer.sha256,
                "loss_scaler": self.scaler and self.scaler.state_dict() | {"skipped": self.skipped}})
        except data.SaveError as error:
            if self.step == self.c.steps or stopping:
                raise
            self.say(f"{error}; {self.newest_saved()}; the run goes on and tries again")
            return
        self.saved = self.step

    def take_step(self) -> bool:
        """One update, logged -> whether any rank was asked to stop."""
        c, start, lr = self.c, time.perf_counter(), lr_at(self.step, self.c)
        scale = {"loss_scale": self.scaler.scale} if self.scaler else {}
        self.step += 1                                            # before the update: an error then names this step
        is_profiled = c.profile and self.step == self.first_step + 3
        with profiled(self) if is_profiled else contextlib.nullcontext():
            loss, norm, stopping, statistics = train_step(self.model, self.optimizer, self.batches, self.step - 1, c,
                                                          self.world, self.stop_signals, self.on_phase, self.scaler)
        self.world.step = self.step
        self.step_seconds.append(time.perf_counter() - start)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if not self.scaler:
                raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
            self.skipped += 1
        entry = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr,
                 "tokens_per_s": round(c.tokens_per_step / self.step_seconds[-1], 1)} | scale | statistics
        self.log(**entry)
        if self.step % c.log_interval == 0 or self.step == c.steps:
            self.say(step_line(self, entry, statistics))
            self.step_seconds.clear()
        return stopping


# ---- after pre-training: the objectives ------------------------------------------------------------------------------
#
# model.py computes the tokens' weights ("the same loss, other weights"). rl samples answers, so each of its ranks has
# the whole model. It weighs an answer by GRPO's advantage: the reward minus the mean reward of G answers to the same
# prompt (less noise in the gradient), divided by their standard deviation. The answer itself is among the G, so the
# expected gradient is smaller by the factor 1 - 1/G (before the division).

# objective -> the function of (batch, nll, config) that weighs tokens, and its statistics' names. Others have w = 1
OBJECTIVES = {
    "dpo": (lambda batch, nll, c: net.preference(batch, nll, c.beta), ("accuracy", "margin")),
    "rl": (lambda batch, nll, c: net.policy_gradient(batch, nll, c.kl_coef), ("reward", "kl"))}


@torch.no_grad()
def weigh_tokens(weigh, model: Model, batches, c: Config) -> list:
    """Set each batch["weights"], from a pass without gradient -> for each micro-batch a tensor of three sums, of the
    loss and the two statistics. Only the last pipeline stage has nll: on others nothing is set, and the result is [].
    weigh: a function in OBJECTIVES."""
    sums = []
    for batch, nll in zip(batches, model.run(batches), strict=True):
        if nll is not None:
            batch["weights"], sums_of_batch = weigh(batch, nll, c)
            sums.append(sums_of_batch)
    return sums


def rewarded_answers(gpt, tokenizer, questions, c: Config, numbers, max_tokens: int) -> tuple:
    """Sample an answer to each question. A question: (ids of the prompt, its row of the file). numbers: one per answer,
    its random seed. Returns the prompts and the answers, lists of ids, and the rewards (n,), float64: nan where the
    reward function does not apply to the prompt."""
    prompts, rows = zip(*questions, strict=True)
    answers = sample_answers(gpt, tokenizer, prompts, c, numbers, max_tokens)
    reward = data.find_reward(c.reward)
    rewards = [data.call_reward(reward, row, tokenizer.decode(ids)) for row, ids in zip(rows, answers, strict=True)]
    return prompts, answers, torch.tensor(rewards, dtype=torch.float64)


class Rollouts:
    """The loader of reinforcement learning: answers that the model samples as it is now, and what they are worth.

    A batch is dict(tokens, targets, advantage, reward, count, reference). An answer depends on its prompt, the seed,
    its number, the weights and answer_tokens alone. prompts: data.Examples. start: the starting model.
    """

    def __init__(self, prompts, gpt, start, c: Config):
        self.prompts, self.gpt, self.start = prompts, gpt, start
        self.c = dataclasses.replace(c, temperature=1.0, top_k=0, top_p=1.0)       # the model's own probabilities

    def __next__(self) -> dict:
        c, loader = self.c, self.prompts
        # the number of this rank's first answer: read before next(), which advances the position
        first = (loader.position + loader.dp_rank * loader.micro_batch_size) * c.group_size
        questions = [question for question in next(loader) for _ in range(c.group_size)]
        prompts, answers, rewards = rewarded_answers(self.gpt, loader.tokenizer, questions, c,
                                                     range(first, first + len(questions)), c.answer_tokens)
        if rewards.isnan().any():
            raise data.DataError(f"reward must apply to every prompt, {c.reward} does not")
        # advantage = (reward - mean of its group) / standard deviation; in float64: equal rewards give 0, up to 1e-9
        groups = rewards.view(-1, c.group_size)
        advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
        batch = data.rows_of(prompts, answers) | {"reward": rewards, "advantage": advantage.flatten(),
                                                  "count": torch.tensor(len(rewards))}
        batch["reference"] = net.nll_of(self.start, batch)
        return batch


def reward_of_answers(model: Model, prompts, c: Config, world: parallel.World) -> float:
    """Mean reward of one answer to each of 64 held-out prompts, without those to which the reward function does not
    apply; nan if none is left. Every rank must have the whole model."""
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    numbers = range(world.rank, min(64, prompts.num_windows), world.size)
    if numbers:
        rewards = rewarded_answers(model.chunks[0], prompts.tokenizer, prompts.batch(numbers), c, numbers,
                                   c.answer_tokens if c.objective == "rl" else c.max_new_tokens)[2]
        total += torch.stack([rewards.nansum(), (~rewards.isnan()).sum()]).to(world.device)
    value, count = world.sum(total).tolist()
    return value / count if count else math.nan


@torch.no_grad()
def answers_nll(model: Model, loader, c: Config, world: parallel.World) -> torch.Tensor:
    """DPO's reference, (windows, documents), equal on every rank: the sum of each answer's nll under the model as it
    is. A window packs several answers; `documents` numbers them from 1 (data.py)."""
    shape = loader.num_windows, loader.num_documents + 1
    nll_by_document = torch.zeros(shape, dtype=torch.float64, device=world.device)
    for batch, nll in forward_passes(model, loader, loader.num_windows, c, world):
        window = batch["window"]                        # one that a rank reads again, without its targets, adds 0
        nll_by_document[window] = nll_by_document[window].scatter_add(1, batch["documents"], nll.double())
    return world.sum(nll_by_document).cpu()


# ---- the lecture ends here -------------------------------------------------------------------------------------------
#
# What follows is for looking things up. Each section can be read alone.

# ---- configs ---------------------------------------------------------------------------------------------------------

def option(default, help, choices=None, *, affects_training=True, **bounds):
    """A field of Config. affects_training: the value changes what is learned, so a run cannot go on with another one.
    bounds: at_least (0 if none is given), at_most, above, below."""
    return field(default=default, metadata={"help": help, "choices": choices, "affects_training": affects_training,
                                            "bounds": {"at_least": 0} | bounds})


# a field that changes cost or what is printed. data, text_field, tokenizer count as such: refusal() compares the text
runtime = functools.partial(option, affects_training=False)


@dataclass(frozen=True)
class Config:
    """Every field is a flag (--seq-len for seq_len). CONFIGS, below, are named sets of values; `tiny` is the one that
    --help shows. In the class body, the names data, precision, zero and json mean fields from their lines on, not
    modules."""

    config: str = runtime("tiny", "named set of defaults")
    # the model, as in model.ModelConfig; 0 derives
    vocab_size: int = option(2048, "rows of embedding and head; also the tokenizer's pieces", at_most=2**24)
    seq_len: int = option(256, "tokens of context, T", at_least=2, at_most=2**24)
    n_layer: int = option(4, "blocks", at_least=1, at_most=2**16)
    n_head: int = option(4, "query heads", at_least=1, at_most=2**16)
    n_kv_head: int = option(0, "key/value heads (0: n_head)")
    head_dim: int = option(0, "dimensions of a head (0: n_embd / n_head)")
    n_embd: int = option(96, "width of the residual stream, C", at_least=1, at_most=2**20)
    n_ff: int = option(0, "width of the MLP (0: 8/3 C rounded up to 64 for swiglu, 4 C for gelu)")
    norm: str = option("rmsnorm", "normalisation", ("rmsnorm", "layernorm"))
    position: str = option("rope", "position encoding", ("rope", "learned"))
    mlp: str = option("swiglu", "feed-forward", ("swiglu", "gelu"))
    bias: bool = option(False, "biases in linear layers and LayerNorm")
    tie_embeddings: bool = option(False, "head and embedding share their weight")
    qk_norm: bool = option(False, "RMSNorm on queries and keys")
    rope_theta: float = option(10000.0, "base of the rotary frequencies", above=0)
    norm_eps: float = option(1e-5, "epsilon of the norms")
    # the stage
    objective: str = option("pretrain", "the stage of training", ("pretrain", "sft", "dpo", "rl"))
    init_from: str = option("", "begin with this model: the folder of a run, or of a Hugging Face model")
    beta: float = option(0.1, "dpo: a larger beta keeps the model closer to the starting model", above=0)
    reward: str = option("format", "rl: an answer's worth (sft, dpo: shown only): parses, format or FILE.py:FUNCTION")
    group_size: int = option(8, "rl: answers per prompt, whose mean reward is the baseline", at_least=2)
    answer_tokens: int = option(64, "rl: longest answer", at_least=1)
    kl_coef: float = option(0.0, "rl: penalty per nat of difference from the starting model, per answer token")
    # the data
    data: str = runtime("stdlib", "prepared folder, or files, folders, globs, hf:DATASET[:SUBSET][:SPLIT] (comma-"
                                  "separated), or stdlib; with shares of tokens, 0.7*A,0.3*B, a mixture; after pre-"
                                  "training: a .jsonl of conversations, pairs or prompts")
    text_field: str = runtime("text", "column, or JSON field, of the text")
    tokenizer: str = runtime("", "use this one: a file, a folder, or a model on huggingface.co (gpt2)")
    document_mask: bool = option(True, "attend within a document only")
    # the optimisation
    steps: int = option(2000, "optimizer steps", at_least=1)
    global_batch_size: int = option(8, "windows of seq_len tokens per step, over all ranks", at_least=1, at_most=2**24)
    lr: float = option(3e-3, "peak learning rate")
    min_lr_ratio: float = option(0.1, "learning rate that the schedule falls towards / peak", at_most=1)
    warmup_steps: int = option(100, "steps of linear rise")
    schedule: str = option("cosine", "after the rise", ("cosine", "wsd"))
    decay_fraction: float = option(0.2, "wsd: share of the steps in the final decay", at_most=1)
    optimizer: str = option("adamw", "update rule; muon: for blocks' matrices, AdamW for the rest", ("adamw", "muon"))
    adamw_lr_ratio: float = option(4.0, "muon: AdamW's learning rate, of all but the blocks' matrices, / lr", above=0)
    momentum: float = option(0.95, "muon: share of the momentum that a step keeps", below=1)
    weight_decay: float = option(0.1, "on matrices")
    beta1: float = option(0.9, "AdamW's first-moment decay", below=1)
    beta2: float = option(0.95, "AdamW's second-moment decay", below=1)
    adam_eps: float = option(1e-8, "AdamW's epsilon")
    grad_clip: float = option(1.0, "largest global gradient norm (0: no clipping)")
    seed: int = option(0, "of weights and data order", below=2**63)
    precision: str = option("auto", "number format; auto: bf16 where the GPU has it", ("auto", *precision.PRECISIONS))
    master_weights: bool = option(True, "in a low precision: float32 copies that the optimizer updates")
    loss_scale: float = option(2.0**16, "fp16: what losses are multiplied by at first (0: no scaling)", below=1e38)
    # how it runs: same result, other cost
    micro_batch_size: int = runtime(0, "windows per forward pass and rank (0: at most 8, rl: 64: largest_micro_batch)")
    recompute: str = runtime("none", "activations computed again in backward", ("none", "selective", "full"))
    attention: str = runtime("auto", "kernel; auto: triton on NVIDIA's GPUs, else sdpa", ("auto", *flash_attn.BACKENDS))
    dp: int = runtime(0, "data-parallel ranks (0: what tp and pp leave of the world)")
    tp: int = runtime(1, "tensor-parallel ranks: parts of every layer's width", at_least=1)
    pp: int = runtime(1, "pipeline stages: parts of the depth", at_least=1)
    sequence_parallel: bool = runtime(True, "with tp: norms and residuals split along the sequence")
    pp_schedule: str = runtime("1f1b", "order of the pipeline's operations", tuple(parallel.SCHEDULES))
    pp_chunks: int = runtime(2, "interleaved: stages per rank", at_least=1)
    zero: int = runtime(0, "split over dp: 1 optimizer states, 2 also gradients, 3 also parameters", (0, 1, 2, 3))
    compile: str = runtime("auto", "torch.compile each block; auto: on accelerators", ("auto", "on", "off"))
    device: str = runtime("auto", "auto: this rank's accelerator, else cpu")
    nproc: int = runtime(0, "start and watch this many ranks on this machine (0: torchrun does, or there is one)")
    max_restarts: int = runtime(0, "with --nproc: how often ranks are started again when one has failed")
    timeout: int = runtime(600, "seconds that a rank waits for the others before it gives up", at_least=1)
    out: str = runtime("", "folder of the run (default out/CONFIG, after pre-training out/OBJECTIVE)")
    resume: str = runtime("auto", "auto: go on where the folder's run stopped; never: refuse if it holds one",
                          ("auto", "never"))
    eval_interval: int = runtime(500, "steps between evaluations (0: only at the end; after pre-training also step 0)")
    eval_windows: int = runtime(0, "validation windows that an evaluation reads (0: all)")
    checkpoint_interval: int = runtime(500, "steps between checkpoints (0: only at the end; wsd: before its decay too)")
    keep_checkpoints: int = runtime(2, "newest checkpoints to keep; the best by validation loss stays too, and wsd's "
                                       "last before the decay", at_least=1)
    log_interval: int = runtime(1, "steps between printed lines (metrics.jsonl has all)", at_least=1)
    profile: bool = runtime(False, "write when each rank ran which pipeline operation of the third step: trace.json")
    # other things it can do
    dry_run: bool = runtime(False, "print what the run would take (memory, messages, time, cost), then exit")
    gpu: str | None = runtime(None, "with --dry-run: ask it of GPUs that are not here", tuple(scaling.GPUS))
    json: bool = runtime(False, "with --dry-run: one JSON object")
    sample: str | None = runtime(None, "continue this text with the model in --out (after pre-training: answer it)")
    chat: bool = runtime(False, "talk with the model in --out: a line is a message")
    pairs: str | None = runtime(None, "write preference pairs to this .jsonl: the model in --out answers the prompts "
                                      "of its own data")
    max_pairs: int = runtime(1200, "with --pairs: prompts of each split that are answered", at_least=1)
    judge: str | None = runtime(None, "with --pairs: rank two answers by their probability under the model of this run")
    export: str | None = runtime(None, "write the model in --out as this Hugging Face folder, then exit")
    quantize: str | None = runtime(None, "evaluate or sample the model in --out with integer weights", ("int8", "int4"))
    max_new_tokens: int = runtime(200, "sampling: most tokens to add")
    temperature: float = runtime(0.8, "sampling: 0 takes the likeliest token")
    top_k: int = runtime(0, "sampling: among the k likeliest (0: all)")
    top_p: float = runtime(0.95, "sampling: among the fewest that reach this probability", above=0, at_most=1)

    @property
    def model(self) -> net.ModelConfig:
        return net.ModelConfig(**{f.name: getattr(self, f.name) for f in fields(net.ModelConfig)})

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and matrix products; `auto` that no device has resolved is float32."""
        return precision.PRECISIONS.get(self.precision, torch.float32)

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline: pp, or pp x pp_chunks if interleaved."""
        return self.pp * (self.pp_chunks if self.pp_schedule == "interleaved" and self.pp > 1 else 1)

    @property
    def is_zero_bubble(self) -> bool:
        """Whether the schedule takes backward apart. Neither compiled blocks nor recomputation go with that."""
        return self.pp > 1 and self.pp_schedule == "zb"

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len

    def grad_accum_steps(self, dp: int) -> int:
        """Micro-batches per step on each of dp ranks."""
        return self.global_batch_size // (self.micro_batch_size * dp)


GPT2 = dict(norm="layernorm", position="learned", mlp="gelu", bias=True, tie_embeddings=True, vocab_size=50304,
            seq_len=1024)
LONG = dict(warmup_steps=700, global_batch_size=512, eval_windows=1024, checkpoint_interval=1000)
# tiny: found by search, for five minutes on two CPU cores (tests/bench/RESULTS.md).
# small: a recipe like tiny's. The rates are those of modded-nanogpt's record of 2024-10-10: Muon, a GPT-2 of 124 M, as
# many tokens per step (github.com/KellerJordan/modded-nanogpt). With this code they are untried.
# From small on about 20 tokens per parameter (Chinchilla, arXiv:2203.15556, Table 3). From medium on the learning rates
# of GPT-3's Medium, XL (1.3 B) and 6.7 B (arXiv:2005.14165, Table 2.1).
CONFIGS = {
    "tiny": Config(vocab_size=4096, seq_len=128, optimizer="muon", lr=7.5e-3, momentum=0.9, beta2=0.99, schedule="wsd",
                   decay_fraction=0.7, min_lr_ratio=0.0, weight_decay=0.01, steps=2000, log_interval=20),
    "small": Config(config="small", **GPT2, **LONG, n_layer=12, n_head=12, n_embd=768, optimizer="muon", lr=1e-2,
                    adamw_lr_ratio=0.36, schedule="wsd", decay_fraction=0.3, min_lr_ratio=0.0, weight_decay=0.0,
                    steps=4800),
    "medium": Config(config="medium", **GPT2, **LONG, n_layer=24, n_head=16, n_embd=1024, lr=3e-4, steps=13500),
    "large": Config(config="large", **LONG, vocab_size=32000, seq_len=2048, n_layer=24, n_head=16, n_embd=2048,
                    n_ff=5632, lr=2e-4, steps=26000, micro_batch_size=8),
    "7b": Config(config="7b", **LONG | {"global_batch_size": 1024}, vocab_size=32000, seq_len=4096, n_layer=32,
                 n_head=32, n_embd=4096, n_ff=11008, lr=1.2e-4, steps=32000, micro_batch_size=1, recompute="full"),
}
# What a later stage of training changes of a config. lr_share: of the config's learning rate.
OBJECTIVE_DEFAULTS = {
    "sft": dict(optimizer="adamw", lr_share=0.2, steps=400, warmup_steps=20, global_batch_size=16, eval_interval=200,
                log_interval=20, micro_batch_size=0),
    "dpo": dict(optimizer="adamw", lr_share=0.02, steps=80, warmup_steps=10, global_batch_size=32, eval_interval=50,
                log_interval=10, weight_decay=0.0, micro_batch_size=0),
    "rl": dict(optimizer="adamw", lr_share=0.06, steps=60, warmup_steps=5, global_batch_size=64, eval_interval=20,
               log_interval=5, weight_decay=0.0, micro_batch_size=0, reward="parses"),
}


# ---- where a run begins: folders, checkpoints, data ------------------------------------------------------------------

BadInput = scaling.BadInput                        # one line that names the flag, the rule and the value: exit code 2


@contextlib.contextmanager
def bad_input():
    """While a run is built: a ValueError of another file is bad input too."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error)) from error


def lock_folder(c: Config, stack: contextlib.ExitStack):
    """Only one process may use out/RUN, until `stack` is closed."""
    with data.name_in_errors(f"out {c.out}", "must be a folder that can be written, and not in use by another run"):
        Path(c.out, "checkpoints").mkdir(parents=True, exist_ok=True)
        stack.enter_context(data.locked(Path(c.out, ".lock"), wait=False))


def find_checkpoint(c: Config, checkpoints: data.Checkpoints, loader) -> data.Reader | None:
    """The newest checkpoint that this run can go on with; None if there is none at all. Raises BadInput."""
    steps_before = 0
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):                              # absent, or edited
        steps_before = int(json.loads(Path(c.out, "config.json").read_text())["steps"])
    # a wsd run may go back to an older checkpoint to become longer, but not to become shorter than it was
    reader = checkpoints.newest(lambda meta: c.steps >= steps_before and not refusal(c, meta, loader))
    if reader is not None and (line := refusal(c, reader.meta, loader)):
        raise BadInput(line)
    return reader


def refusal(c: Config, meta: dict, loader) -> str:
    """Why a run with config c cannot go on from the checkpoint of this meta; "" if it can. Each field that affects
    training must be as it was (a newer field: at its default), and the text the same. But a wsd run may become longer,
    from a checkpoint that was made before its decay: all updates so far are then those of the longer run."""
    if c.resume == "never":
        return f"resume must be auto to go on with the run in {c.out}, got never; name another --out"
    before, newest_update = saved_config(meta["config"]), max(0, meta["step"] - 1)
    longer = (c.schedule == "wsd" and c.steps > before.steps
              and lr_at(newest_update, c) == lr_at(newest_update, before))
    for f in fields(Config):
        ours, theirs = getattr(c, f.name), getattr(before, f.name)
        if f.metadata["affects_training"] and ours != theirs and not (f.name == "steps" and longer):
            hint = ", or make a --schedule wsd longer before its decay" if f.name == "steps" else ""
            return (f"{f.name} must be {theirs} to go on with the run in {c.out}, got {ours}; name another --out for a "
                    f"new run{hint}")
    if loader.state_dict()["fingerprint"] != meta["loader"]["fingerprint"]:
        return (f"data must be the text that the run in {c.out} began with, {c.data} is another or has changed; "
                "name another --out")
    return ""


def open_data(c: Config, world: parallel.World):
    """Loaders of both splits: of a prepared folder, of text that rank 0 prepares first, or, after pre-training, of
    conversations, pairs or prompts. A model that comes from elsewhere brings its tokenizer along."""
    tokenizer = (data.load_tokenizer(parent_folder(c.init_from, c.out)) if c.init_from else
                 data.find_tokenizer(c.tokenizer) if c.tokenizer else None)

    def prepare():
        if not Path(c.data, "manifest.json").exists():
            print(f"data       preparing {c.data}", flush=True)
        return data.prepare_all(c.data, tokenizer, vocab_size=c.vocab_size, text_field=c.text_field,
                                log=lambda line: print("           " + line, flush=True))

    shape = dict(micro_batch_size=c.micro_batch_size, seq_len=c.seq_len)
    ranks = dict(seed=c.seed, dp_rank=world.mesh.dp_rank, dp_size=world.mesh.dp)
    if c.objective == "pretrain":
        parts = world.first(prepare)
        loader = data.open_loader(parts, **shape, **ranks, prefetch=world.device.type == "cuda")
        val = data.open_loader(parts, **shape, split="val")
    else:
        data.find_reward(c.reward)                                       # raises now, not after hours, if there is none
        if c.objective == "rl":
            shape["micro_batch_size"] //= c.group_size                                                       # prompts
        examples = functools.partial(data.Examples, c.data, tokenizer, objective=c.objective, **shape)
        loader, val = examples(**ranks), examples(split="val")
    if loader.tokenizer.vocab_size > c.vocab_size:
        raise BadInput(f"vocab_size must be at least the {loader.tokenizer.vocab_size} of {loader.path}, got "
                       f"{c.vocab_size}")
    if tokenizer and loader.tokenizer.sha256 != tokenizer.sha256:
        raise BadInput(f"data must be prepared with the tokenizer of {c.init_from or c.tokenizer}, {c.data} is not")
    return loader, val


def open_files(run: Run):
    """Write the config and the tokenizer, without which no checkpoint can be used -> metrics.jsonl, open. Its lines up
    to the run's step stay; that step's evaluation only if the checkpoint holds it: else it is made again."""
    data.write_atomic(run.folder / "config.json", json.dumps(dataclasses.asdict(run.c), indent=1))
    run.loader.tokenizer.save(run.folder)
    is_evaluated = run.evaluation and run.evaluation["step"] == run.step
    return data.open_metrics(run.folder / "metrics.jsonl", lambda line: line["step"] < run.step or (
        line["step"] == run.step and (is_evaluated or "val_loss" not in line)))


def every_rank_has_all_weights(c: Config, world: parallel.World) -> bool:
    """Sampling needs that."""
    return c.tp == c.pp == 1 and (c.zero < 3 or world.mesh.dp == 1)


def open_objective(run: Run, read_parent):
    """What an objective also needs: held-out prompts to answer, and the text of pre-training, whose loss shows what is
    forgotten. Also dpo's reference and rl's answers."""
    c, world, tokenizer = run.c, run.world, run.loader.tokenizer
    if every_rank_has_all_weights(c, world):
        run.prompts = data.Examples(c.data, tokenizer, objective="rl", micro_batch_size=1, seq_len=c.seq_len,
                                    split="val")
    text = run.parent_card.get("text")
    if text and world.first(lambda: Path(text, "manifest.json").exists()):
        val = data.Loader(text, micro_batch_size=c.micro_batch_size, seq_len=c.seq_len, split="val")
        if val.num_windows and val.tokenizer.sha256 == tokenizer.sha256:
            run.pretraining_val = val
    if c.objective == "rl":
        start = make_stage(c, world.device, read=read_parent)
        run.batches = Rollouts(run.loader, run.model.chunks[0], start, c)
    if c.objective == "dpo":
        folder, loaders = run.folder / "reference", (run.loader, run.val)
        if run.step == 0:                                      # the weights are still those of the starting model
            tables = {loader.split: answers_nll(run.model, loader, c, world) for loader in loaders}
            world.first(lambda: data.write_tables(folder, tables))
        reader = data.Reader(folder)
        for loader in loaders:
            loader.reference = reader.read(loader.split)


@functools.cache
def print_once(line: str):
    print(line, file=sys.stderr)


def saved_config(saved: dict) -> Config:
    """A checkpoint's config. A field that Config has no longer is named and left out; a new one takes its default."""
    known = {f.name for f in fields(Config)}
    for name in saved.keys() - known:
        print_once(f"train.py: the checkpoint's {name} {saved[name]!r} is no field of Config now and is ignored")
    return Config(**{name: value for name, value in saved.items() if name in known})


def parent_folder(init_from: str, out: str | None) -> str:
    """The parent's folder; once that is gone, the run's own, which has a copy of what the parent decides."""
    return init_from if Path(init_from).exists() or not out else out


@bad_input()
def parent_fields(folder: str) -> dict:
    """The fields of Config that --init-from decides: the model's, and the name of the config."""
    with data.name_in_errors(f"init_from {folder}", "must be the folder of a run or of a Hugging Face model"):
        saved = json.loads(Path(folder, "config.json").read_text())
    if "model_type" not in saved:                                                                     # one of our runs
        run = saved_config(saved)
        return dataclasses.asdict(run.model) | {"config": run.config}
    parent = net.config_from_hf(saved)
    seq_len = min(parent.seq_len, 2048) if parent.position == "rope" else parent.seq_len
    size = lambda model: math.log(model.n_layer * model.n_embd**2)                        # about that of its blocks
    nearest = min(CONFIGS, key=lambda name: abs(size(CONFIGS[name]) - size(parent)))
    return dataclasses.asdict(parent) | {"config": nearest, "seq_len": seq_len}


def open_parent(c: Config, world: parallel.World) -> tuple:
    """--init-from: read(name, box) of its weights, rounded as initial weights are, and its card."""
    if Path(c.init_from, "checkpoints").is_dir():
        reader = newest_reader(c.init_from, "init_from", world.first)
        read, card = reader.read, reader.meta["card"]
    else:
        read, card = net.hf_reader(data.HFWeights(c.init_from).get, c.model), {"knowledge_cutoff": "unknown"}
    return (lambda name, box: read(name, box).to(c.dtype).float()), card


def newest_reader(folder: str, flag: str, first=lambda work: work()) -> data.Reader:
    """The newest intact checkpoint of a run. first: world.first, where all ranks ask, and rank 0 looks for it."""
    def find():
        reader, damaged = data.newest_checkpoint(Path(folder, "checkpoints"))
        for line in damaged.values():
            print(f"damaged checkpoint passed over: {line}", file=sys.stderr)
        if reader is None:
            raise BadInput(f"{flag} must be the folder of a run with an intact checkpoint to use, {folder} is not")
        return reader.folder

    return data.Reader(first(find))


def catch_stop_signals(stack: contextlib.ExitStack) -> list:
    """A list that Ctrl-C, SIGTERM and SIGHUP fill. The step in progress is finished and saved, then the run ends. A
    second Ctrl-C interrupts at once. (Ranks of --nproc get SIGINT for both. SIGTERM is how their agent ends them.)"""
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in [signal.SIGINT] if launcher_pid() else [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]:
        stack.callback(signal.signal, number, signal.signal(number, handler))
    return received


# ---- what a run says of itself ---------------------------------------------------------------------------------------

def make_card(run: Run) -> dict:
    """What the model is made of. Every checkpoint has this card. At the end it is written to card.md."""
    manifest, bill, parent = run.loader.manifest, run.bill, run.parent_card
    text = parent.get("text") if run.c.objective != "pretrain" else str(run.loader.path)
    epochs = run.loader.epochs(run.loader.position)
    card = {"config": run.c.config, "objective": run.c.objective, "parent": run.c.init_from, "text": text or "",
            "sources": parent.get("sources", []) + manifest["sources"],
            "knowledge_cutoff": max(filter(None, (manifest["knowledge_cutoff"], parent.get("knowledge_cutoff")))),
            "data_fingerprint": manifest["fingerprint"], "parameters": bill["parameters"], "step": run.step,
            "epochs": epochs if len(epochs) > 1 else run.loader.position / max(1, run.loader.num_windows),
            "wall_seconds": round(time.perf_counter() - run.began, 1), "torch": torch.__version__}
    if run.c.objective != "rl":                                                # rl trains on answers of any length
        tokens = run.step * run.c.tokens_per_step
        card |= {"tokens": tokens, "tokens_per_parameter": tokens / bill["parameters"],
                 "flops": tokens * bill["flops_per_token"]}
    return card


def announcement(run: Run, seconds: float) -> str:
    """The run in numbers, before its first step."""
    c, manifest, trained_on = run.c, run.loader.manifest, run.loader.manifest["splits"]["train"]["tokens"]
    epochs = run.loader.epochs(c.steps * c.global_batch_size // (c.group_size if c.objective == "rl" else 1))
    in_epochs = ", ".join(f"{n:.2f} epochs" + f" of {path}" * (len(epochs) > 1) for path, n in epochs.items())
    peak = f"peak {run.peak / 1e9:,.0f} GFLOP/s ({run.peak_source})" if run.peak else run.peak_source
    lines = [describe(c, run.bill),
             f"data       {run.loader.path if len(epochs) == 1 else c.data}: {trained_on:,} training tokens, so "
             f"{in_epochs}; knowledge cutoff {make_card(run)['knowledge_cutoff']}",
             f"machine    {run.world.size} x {run.world.device.type}, {torch.get_num_threads()} threads, "
             f"{c.precision}; {peak}"]
    if any(manifest["dropped"].values()):
        counts = ", ".join(f"{n:,} {why}" for why, n in manifest["dropped"].items() if n)
        lines.append(f"           left out, or cut: {counts}")
    if c.init_from:
        lines.append(f"           {c.objective}, begins with the weights of {c.init_from}")
    if max(epochs.values()) > 4 and c.objective == "pretrain":
        lines.append("           after 4 epochs repeated text teaches less and less (arXiv:2305.16264)")
        if c.data == Config.data and c.config != "tiny":
            lines.insert(0, real_corpus(c, run.world.size, max(epochs.values())))
    lines.append(f"finished   {c.out} is finished: step {run.step} of {c.steps}" if run.step == c.steps else
                 f"{'resuming' if run.step else 'starting'}   at step {run.step} of {c.steps}, "
                 f"{seconds:.1f} s after the start\n")
    return "\n".join(lines)


def step_line(run: Run, entry: dict, statistics: dict) -> str:
    """entry: of metrics.jsonl. The speed is that of the steps since the last printed line."""
    c, rate = run.c, run.c.tokens_per_step * len(run.step_seconds) / sum(run.step_seconds)
    mfu = f"{rate * run.bill['flops_per_token'] / run.peak / run.world.size:5.1%}" if run.peak else "    -"
    speed = f"{rate:9,.0f} tok/s  mfu {mfu}"
    if c.objective == "rl":                                                     # how long answers are, varies
        speed = f"{rate / c.seq_len:7,.1f} answers/s"
    return (f"loss {entry['loss']:7.4f}  lr {entry['lr']:.2e}  norm {entry['grad_norm']:7.3f}  {speed}  "
            f"{run.world.peak_memory() / 1e9:5.2f} GB  "
            f"eta {scaling.clock((c.steps - run.step) * c.tokens_per_step / rate)}"
            + (f"  scale {entry['loss_scale']:g}, {run.skipped} skipped" if run.scaler else "")
            + "".join(f"  {name} {value:.3f}" for name, value in statistics.items()))


def evaluation_line(found: dict, c: Config) -> str:
    formats = {"val_loss": "{:.4f} nats/token" if c.objective == "pretrain" else "loss {:.4f}",
               "val_bpb": "{:.4f} bits/byte", "val_margin": "margin {:.3f}", "val_accuracy": "{:.1%} of pairs right",
               "reward": "reward {:.3f}", "text_loss": "pre-training text {:.4f}"}
    shown = [name for name in formats if name in found and (name, c.objective) != ("val_loss", "rl")]
    return "validation " + ", ".join(formats[name].format(found[name]) for name in shown)


@contextlib.contextmanager
def profiled(run: Run):
    """--profile: of the step inside, when each rank ran which pipeline operation, as OUT/trace.json."""
    events = []
    run.model.on_op = lambda *event: events.append(event)
    yield
    run.model.on_op = None
    timeline = parallel.executed_timeline(parallel.gather_objects(events, run.world.host))
    if run.world.rank == 0:
        data.write_atomic(run.folder / "trace.json", json.dumps(parallel.chrome_trace(timeline)))


def real_corpus(c: Config, ranks: int, epochs: float) -> str:
    """What to type where this Python's library is too little text for the config."""
    tokens = c.steps * c.tokens_per_step
    subset = next((f":sample-{n}BT" for n in (10, 100, 350) if tokens < 0.9e9 * n), "")
    return (f"data       {epochs:,.0f} epochs of {c.data} are too many; a real corpus, prepared once:\n"
            f"           python data.py hf:HuggingFaceFW/fineweb-edu{subset} --out data/fineweb --tokens {tokens:.2g} "
            f"--vocab-size {c.vocab_size}\n"
            f"           torchrun --nproc-per-node {ranks} train.py --config {c.config} --data data/fineweb")


def finish(run: Run):
    """A run's end: its card, the loss next to general compressors, continuations, and where everything is."""
    c, val, evaluation = run.c, run.val, run.evaluation
    prompts, separator, flag = [], "|", '--sample "def main("'
    facts = make_card(run) | (evaluation or {})
    data.write_atomic(run.folder / "card.md", f"# {c.out}\n\n" + "".join(f"- {k}: {v}\n" for k, v in facts.items()))
    if not evaluation:
        print("\nno validation: its documents do not fill one window of seq_len + 1 tokens")
    elif c.objective == "pretrain":
        evaluated = windows_evaluated(val, c)
        compressed = min(evaluated, 2**22 // c.seq_len)                               # xz takes seconds for each 10 MB
        yardsticks = data.compressed_bpb(val.text(compressed))
        print(f"\nvalidation {evaluation['val_loss']:.4f} nats/token = {evaluation['val_bpb']:.4f} bits/byte   ("
              f"{', '.join(f'{name} {bpb:.3f}' for name, bpb in yardsticks.items())} on "
              f"{'the same text' if compressed == evaluated else f'{compressed:,} of its windows'})")
        if every_rank_has_all_weights(c, run.world):                  # continue the first lines of held-out documents
            ids = val.shards[0][:4_000_000]
            starts = (ids == data.first_id(val.tokenizer)).nonzero()[0][:3]
            prompts = [ids[start:start + 16].tolist() for start in starts]
    if run.prompts:
        separator, flag = "\n--- answer ---\n", "--chat"
        prompts = [ids for ids, _ in run.prompts.batch(range(min(3, run.prompts.num_windows)))]
    for n, prompt in enumerate(prompts):
        print(f"\n--- sample {n + 1} ---\n{val.tokenizer.decode(prompt)}{separator}"
              f"{continuation(run.model.chunks[0], val.tokenizer, prompt, c, n)}")
    print(f"\nwall time  {scaling.clock(facts['wall_seconds'])} of training\ncard       {run.folder / 'card.md'}\n"
          f"checkpoint {run.checkpoints.folder / f'step-{c.steps:08d}'}\n"
          f"try it     python train.py --out {c.out} {flag}")


# ---- the bill --------------------------------------------------------------------------------------------------------

def gpu_of(c: Config, device) -> str | None:
    """scaling.py's name of the GPU that is asked about, or is here; None for a CPU, and for a GPU it does not know."""
    return c.gpu or (scaling.DEVICES.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None)


def layout_of(c: Config, dp: int) -> scaling.Layout:
    return scaling.Layout(dp, c.tp, c.pp, c.pp_schedule if c.pp > 1 else "1f1b", c.stages // c.pp, c.micro_batch_size,
                          c.grad_accum_steps(dp), c.zero, c.recompute, c.sequence_parallel)


def make_bill(c: Config, world: parallel.World, rank_flops: float | None = None) -> dict:
    """scaling.py's prediction for this run: memory, messages, time, cost, and how its size compares with the scaling
    law. c: after resolve(). rank_flops: measured FLOP/s of a rank, where the GPU is not known."""
    program = scaling.Program(item=c.dtype.itemsize, fused_norm=c.gpu is not None or world.device.type != "cpu",
                              flash=c.attention != "reference", master_weights=c.master_weights,
                              document_mask=c.document_mask and c.attention == "sdpa", muon=c.optimizer == "muon")
    bill = scaling.bill(scaling.shape_of(c.model), layout_of(c, world.mesh.dp), program, gpu=gpu_of(c, world.device),
                        tokens=c.steps * c.tokens_per_step, precision=c.precision, rank_flops=rank_flops)
    return bill if c.objective == "pretrain" else bill | {"law": None}


def describe(c: Config, bill: dict) -> str:
    more = {"dpo": "\n           and a pass without gradient, a third more FLOPs",
            "rl": "\n           and two passes without gradient, two thirds more FLOPs, and the sampling"}
    return f"model      {c.config}, {c.steps:,} steps{more.get(c.objective, '')}\n{scaling.describe_bill(bill)}"


@bad_input()
def dry_run(c: Config, world: parallel.World):
    """--dry-run: the bill, printed. The shapes of all stages are built first: what tensor_parallel and the pipeline
    refuse is refused here too."""
    for stage in range(c.stages):
        meta_stage(c, torch.device("meta"), world.mesh, stage)
    bill = make_bill(c, world, None if gpu_of(c, world.device) else time_tokens(c, world.device))
    world.say(json.dumps({"config": dataclasses.asdict(c)} | bill) if c.json else describe(c, bill))


def best_rate(work, flops: float, seconds: float) -> float:
    """FLOP/s of the fastest call of work(), each of which does `flops`. It is called for about so many seconds."""
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(timeit.timeit(work, number=1))
    return flops / min(times)


def time_tokens(c: Config, device) -> float:
    """FLOP/s of forward and backward, from a few passes of the model cut to one layer; on a CPU, over few tokens."""
    one_layer = dataclasses.replace(c, n_layer=1, tie_embeddings=True, compile="off", zero=0)
    batch, length = c.micro_batch_size, c.seq_len
    if device.type == "cpu":
        batch, length = (batch if net.num_params(one_layer.model) < 2e7 else 1), min(length, 256)
    gpt = make_stage(one_layer, device, read=lambda name, box: torch.full([b - a for a, b, _ in box], 0.01))
    tokens = torch.randint(c.vocab_size, (batch, length), device=device)

    def forward_backward():
        loss, _ = gpt(tokens, tokens)
        loss.backward()
        loss.item()                                                      # waits for an accelerator

    return best_rate(forward_backward, batch * length * net.flops_per_token(one_layer.model, length), 2.0)


def peak_flops(c: Config, device) -> tuple[float | None, str]:
    """The FLOP/s that are 100 % MFU, and their source: scaling.py's table, at the run's own precision. A CPU is
    measured (it emulates low precisions in float32). A GPU that is not in the table gives no MFU."""
    if device.type == "cpu":
        a = torch.randn(1024, 1024)
        return best_rate(lambda: a @ a, 2 * 1024**3, 0.3), "measured matmul, fp32"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if (key := gpu_of(c, device)) is None:
        return None, f"{name} is not in scaling.py's table: no MFU"
    return scaling.find_gpu(key).peak_flops(c.precision), f"{name}, dense {c.precision}"


# ---- what a trained model is used for --------------------------------------------------------------------------------

def sample_answers(gpt, tokenizer, prompts, c: Config, numbers, max_tokens: int) -> list:
    """Continue prompts, lists of ids, all at once -> the new ids of each: at most max_tokens, up to and with the mark
    that ends an answer. An answer's random numbers depend on c.seed and its number."""
    device, lengths = next(gpt.parameters()).device, [len(prompt) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    stop = tokenizer.eos_id if c.objective == "pretrain" else data.end_of_turn(tokenizer)
    seeds = [data.text_hash(f"{c.seed}/{number}") % 2**63 for number in numbers]
    # a length that grows by one would be compiled again and again
    with torch.compiler.set_stance("force_eager") if compiles(c, device) else contextlib.nullcontext():
        rows = gpt.generate(tokens, max_tokens, c.temperature, c.top_k or None, c.top_p, seed=seeds, stop=stop,
                            vocab_size=tokenizer.vocab_size, lengths=lengths).tolist()
    answers = [row[length:length + max_tokens] for row, length in zip(rows, lengths, strict=True)]
    return [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in answers]


def continuation(gpt, tokenizer, prompt, c: Config, number: int = 0) -> str:
    """The continuation of one prompt, a list of ids, as text that can be printed."""
    (answer,) = sample_answers(gpt, tokenizer, [prompt], c, [number], c.max_new_tokens)
    return tokenizer.decode(answer).encode("utf-8", "replace").decode()


def open_run(folder: str, c: Config, flag: str = "out") -> tuple:
    """The newest checkpoint of a run -> (its reader, its tokenizer, its config for one process here)."""
    reader, tokenizer = newest_reader(folder, flag), data.load_tokenizer(folder)
    if tokenizer.sha256 != reader.meta["tokenizer_sha256"]:
        raise data.DataError(f"{folder}: its tokenizer is not the one the model was trained with")
    from_flags = {name: getattr(c, name) for name in ("attention", "eval_windows", "max_new_tokens", "temperature",
                                                      "top_k", "top_p", "seed")}
    saved = dataclasses.replace(saved_config(reader.meta["config"]), compile="off", dp=1, tp=1, pp=1, zero=0,
                                precision="fp32", out=folder, **from_flags)
    return reader, tokenizer, saved


USES = ("sample", "chat", "pairs", "export", "quantize")                  # flags of what the model in --out is used for


def use(c: Config, world: parallel.World) -> int:
    """Do what is asked of the newest checkpoint in --out, whose config says what model it is."""
    if c.quantize is not None and world.size > 1:
        raise BadInput(f"quantize must be left to one process, there are {world.size}")
    if world.rank != 0:
        return 0
    reader, tokenizer, saved = open_run(c.out, c)
    if c.export is not None:
        export(reader, tokenizer, saved, c.export)
        return 0
    gpt = quantized(reader, saved, c, world) if c.quantize else make_stage(saved, world.device, read=reader.read)
    if c.sample is not None or c.chat:
        print(f"knowledge cutoff {reader.meta['card']['knowledge_cutoff']}", file=sys.stderr)
    if c.sample is not None:
        is_base = saved.objective == "pretrain"
        ids = ([data.first_id(tokenizer)] + tokenizer.encode(c.sample) if is_base else
               data.encode_chat(tokenizer, [{"role": "user", "content": c.sample}], reply=True)[0])
        print((c.sample if is_base else "") + continuation(gpt, tokenizer, ids, saved))
    if c.chat:
        chat(gpt, tokenizer, saved)
    if c.pairs is not None:
        write_pairs(gpt, tokenizer, saved, c, world)
    return 0


def export(reader: data.Reader, tokenizer, c: Config, folder: str):
    """--export: a checkpoint as a folder that transformers loads."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    template = data.chat_template(tokenizer) if c.objective != "pretrain" else None
    try:
        data.export_folder(folder, net.config_to_hf(c.model, **ids), net.hf_tensors(c.model, reader.read), tokenizer,
                           chat_template=template)
    except (OSError, ValueError) as error:
        raise BadInput(f"export must be a model and a new folder that can be written, {c.out} to {folder}: "
                       f"{error}") from None
    print(f"{c.out}, step {reader.meta['step']}, written as a Hugging Face model: {folder}")


def chat(gpt, tokenizer, c: Config):
    """--chat: a conversation on the terminal, each line a message. When it is too long, its oldest messages are
    forgotten. The newest always stays."""
    messages = []
    while True:
        try:
            messages.append({"role": "user", "content": input("> " if sys.stdin.isatty() else "")})
        except EOFError:
            return
        while (len(ids := data.encode_chat(tokenizer, messages, reply=True)[0]) > c.seq_len - c.seq_len // 4
               and len(messages) > 1):
            del messages[:2]
        answer = continuation(gpt, tokenizer, ids, c, len(messages) - 1)
        print(answer, flush=True)
        messages.append({"role": "assistant", "content": answer})


def nll_per_token(gpt, prompts, answers) -> torch.Tensor:
    """(n,) nats per token of each answer to its prompt, lists of ids."""
    batch = data.rows_of(prompts, answers)
    nll = net.nll_of(gpt, batch).cpu()
    return nll.sum(1) / (batch["targets"] >= 0).sum(1).clamp(min=1)


def write_pairs(gpt, tokenizer, saved: Config, c: Config, world: parallel.World):
    """--pairs: a row of dpo for each prompt of the run's data, up to max_pairs per split. Pairs with equal answers, or
    with an empty one, are left out. The row's own answer is chosen over a sampled one. With --judge (RLAIF: feedback
    from another model) two answers are sampled. The judge, a model of the same tokenizer, chooses the answer that it
    finds more probable per token."""
    if saved.objective == "pretrain":
        raise BadInput(f"pairs must be asked of a run whose data has prompts, {saved.out} is pre-training")
    path, judge = Path(c.pairs), None
    if c.judge is not None:
        reader, judge_tokenizer, judge_c = open_run(c.judge, c, "judge")
        if judge_tokenizer.sha256 != tokenizer.sha256:
            raise BadInput(f"judge must have the tokenizer of {saved.out}, {c.judge} has another")
        judge = make_stage(judge_c, world.device, read=reader.read)
    with data.name_in_errors(f"pairs {path}", "must be a new file that can be written"):      # before the work
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        path.unlink()

    def pairs_of(ids, rows, numbers):
        """Texts (chosen, rejected) for each prompt."""
        sampled = [sample_answers(gpt, tokenizer, ids, saved, [f"{number}/{answer}" for number in numbers],
                                  saved.max_new_tokens) for answer in range(1 if judge is None else 2)]
        texts = [[tokenizer.decode(answer) for answer in answers] for answers in sampled]
        if judge is None:
            return zip([data.conversation(row, "sft")[1][0] for row in rows], *texts, strict=True)
        nll = [nll_per_token(judge, ids, answers) for answers in sampled]
        return [(a, b) if first_is_better else (b, a)
                for a, b, first_is_better in zip(*texts, nll[0] < nll[1], strict=True)]

    lines, num_answered = [], 0
    for split in ("train", "val"):
        prompts = data.Examples(saved.data, tokenizer, objective="rl", micro_batch_size=1, seq_len=saved.seq_len,
                                split=split)
        num_prompts = min(prompts.num_windows, c.max_pairs)
        for first in range(0, num_prompts, 64):
            batch = range(first, min(first + 64, num_prompts))
            if first % 640 == 0:
                print(f"{split}: {first:,} of {num_prompts:,} prompts answered", flush=True)
            ids, rows = zip(*prompts.batch(batch), strict=True)
            for row, (chosen, rejected) in zip(rows, pairs_of(ids, rows, [f"{split}/{n}" for n in batch]), strict=True):
                if chosen != rejected and chosen.strip() and rejected.strip():
                    lines.append(json.dumps({"prompt": data.conversation(row, "rl")[0], "chosen": chosen,
                                             "rejected": rejected, "split": split}) + "\n")
            num_answered += len(rows)
    data.write_atomic(path, "".join(lines))
    print(f"{path}: {len(lines):,} pairs; {num_answered - len(lines):,} left out whose answers were equal or empty")


def quantized(reader: data.Reader, saved: Config, c: Config, world: parallel.World):
    """--quantize: a checkpoint's model -> its weights as integers, by GPTQ on 64 windows of the training text. Prints
    what that saves and costs."""
    if c.data not in (Config.data, saved.data):
        raise BadInput(f"data must be left out with --quantize, which reads the run's own text, got {c.data}")
    if saved.objective == "rl":
        raise BadInput(f"quantize must be given a run with answers to calibrate on, {c.out} has prompts alone")
    model = Model(saved, world, reader.read)
    loader, val = open_data(saved, world)
    if loader.manifest["fingerprint"] != reader.meta["loader"]["fingerprint"]:
        raise BadInput(f"quantize must measure on the text that {c.out} was trained on, {loader.path} is another")
    batches = [to_device(next(loader), saved, world.device) for _ in range(math.ceil(64 / saved.micro_batch_size))]
    calibration = [{name: batch[name] for name in ("tokens", "documents") if name in batch} for batch in batches]

    @torch.no_grad()
    def measured():
        """Bytes of the weights, validation loss, logits of a batch."""
        return (precision.weight_bytes(model.chunks[0]), evaluate(model, val, saved, world)["val_loss"],
                model.chunks[0](**calibration[0]).double())

    size, loss, logits = measured()
    precision.quantize(model.chunks[0], c.quantize, calibration=calibration)
    new_size, new_loss, new_logits = measured()
    print(f"{c.quantize:<10} weights of linear layers and head {size:,} -> {new_size:,} bytes, {size / new_size:.2f} x "
          f"fewer\nvalidation {loss:.4f} -> {new_loss:.4f} nats/token, {new_loss / loss - 1:+.2%}\n"
          f"logits     off by {(new_logits - logits).norm() / logits.norm():.2%} of their norm")
    return model.chunks[0]


# ---- the command line ------------------------------------------------------------------------------------------------

def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message.removeprefix("argument "))


def parse_config(argv) -> Config:
    """Command line -> Config, checked, with the model's derived fields filled in. What no flag gives is the model's
    that --init-from names, else the stage's (OBJECTIVE_DEFAULTS), else the named config's. Raises BadInput."""
    types = typing.get_type_hints(Config)
    parser = Parser(prog="train.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="\n\n".join(__doc__.split("\n\n")[:2]), argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        choices = f.metadata["choices"]
        settings = {"help": f"{f.metadata['help']} [{getattr(CONFIGS['tiny'], f.name)}]".replace("%", "%%")}
        if types[f.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            parse = types[f.name] if isinstance(types[f.name], type) else str                              # str | None
            settings |= {"type": parse, "choices": choices, "metavar": None if choices else parse.__name__.upper()}
        parser.add_argument(flag_of(f.name), **settings)
    given, parent = vars(parser.parse_args(argv)), {}
    if given.get("init_from"):
        parent = parent_fields(parent_folder(given["init_from"], given.get("out")))
    for name, value in parent.items():
        may_differ = name == "config" or name == "seq_len" and parent["position"] == "rope"
        if given.get(name, value) != value and not may_differ:
            raise BadInput(f"{name} must be {value}, as in {given['init_from']}, got {given[name]}")
    config = given.get("config", parent.get("config", "tiny"))
    if config not in CONFIGS:
        raise BadInput(f"config must be one of {', '.join(CONFIGS)}, got {config!r}")
    defaults = dict(OBJECTIVE_DEFAULTS.get(given.get("objective"), {"lr_share": 1.0}))
    defaults["lr"] = defaults.pop("lr_share") * CONFIGS[config].lr
    return derive(dataclasses.replace(CONFIGS[config], **parent | defaults | given))


RULES = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}


@bad_input()
def derive(c: Config) -> Config:
    """Check each field alone and together with others, and fill in those that are derived. Whether a layout is possible
    is checked when the run is built: by parallel.py's Mesh, tensor_parallel and schedules."""
    for f in fields(Config):
        value = getattr(c, f.name)
        if isinstance(f.default, (int, float)):
            if not math.isfinite(value):
                raise BadInput(f"{f.name} must be a finite number, got {value}")
            for rule, bound in f.metadata["bounds"].items():
                if not RULES[rule](value, bound):
                    raise BadInput(f"{f.name} must be {rule.replace('_', ' ')} {bound}, got {value}")
    for wrong, line in (
            (c.max_restarts and not c.nproc, f"max_restarts goes with --nproc, got {c.max_restarts} without it"),
            (c.json and not c.dry_run, "json goes with --dry-run, got it without"),
            (c.gpu and not c.dry_run, f"gpu goes with --dry-run, got {c.gpu} without it"),
            (c.objective != "pretrain" and not c.init_from,
             f"init_from must name the model that {c.objective} begins with, got none"),
            (c.objective != "pretrain" and not c.data.endswith(".jsonl"),
             f"data must be a .jsonl file with --objective {c.objective}, got {c.data}"),
            (c.judge is not None and c.pairs is None, f"judge goes with --pairs, got {c.judge} without it"),
            (c.objective == "rl" and (c.tp > 1 or c.pp > 1 or c.zero == 3),
             f"objective rl samples from the whole model on each rank: tp and pp must be 1 and zero below 3, got tp "
             f"{c.tp}, pp {c.pp}, zero {c.zero}"),
            (c.objective == "rl" and 4 * c.answer_tokens > c.seq_len,
             f"answer_tokens must be at most seq_len / 4, got {c.answer_tokens} of {c.seq_len}"),
            (c.objective == "dpo" and not c.document_mask, "document_mask must be on with --objective dpo, got off"),
            (0 < c.temperature < 1e-4, f"temperature must be 0 or at least 1e-4, got {c.temperature}"),
            (0 < c.loss_scale < 2.0**-14, f"loss_scale must be 0 or at least 2**-14, got {c.loss_scale}"),
            (not c.head_dim and c.n_embd % c.n_head,
             f"n_embd must be a multiple of n_head, got {c.n_embd} and {c.n_head}"),
            (c.sequence_parallel and c.seq_len % c.tp,
             f"seq_len must be a multiple of tp with --sequence-parallel, got {c.seq_len} and {c.tp}"),
            (c.is_zero_bubble and c.recompute != "none",
             f"recompute must be none with --pp-schedule zb, config {c.config} or a flag says {c.recompute}"),
            (c.compile == "on" and c.is_zero_bubble, "compile must be off with --pp-schedule zb, got on")):
        if wrong:
            raise BadInput(line)
    default_n_ff = 64 * math.ceil(8 * c.n_embd / 3 / 64) if c.mlp == "swiglu" else 4 * c.n_embd
    default_out = f"out/{c.config if c.objective == 'pretrain' else c.objective}"
    c = dataclasses.replace(c, out=c.out or default_out, n_kv_head=c.n_kv_head or c.n_head,
                            head_dim=c.head_dim or c.n_embd // c.n_head, n_ff=c.n_ff or default_n_ff)
    _ = c.model                                              # building it checks ModelConfig's own rules
    return c


@bad_input()
def join(c: Config) -> parallel.World:
    """This process's world; for --dry-run, of ranks that need not be there."""
    dp = c.dp or (c.nproc // (c.tp * c.pp) if c.dry_run else 0)
    return parallel.World(dp, c.tp, c.pp, device=c.device, timeout=c.timeout, fake=c.dry_run)


def largest_micro_batch(c: Config, dp: int) -> int:
    """For --micro-batch-size 0: the largest, up to 8 windows (rl: 64), that divides a rank's share of the global batch
    and holds whole pairs or groups. With pp it leaves 2 x pp micro-batches per step, if one does, and whole rounds of
    pp where stages are interleaved."""
    unit, share = windows_per_unit(c), c.global_batch_size // dp
    most = min(64 if c.objective == "rl" else 8, share // (1 if c.pp == 1 else 2 * c.pp))
    multiple = c.pp if c.stages > c.pp else 1
    return max((n for n in range(unit, most + 1, unit) if share % (n * multiple) == 0), default=unit)


@bad_input()
def resolve(c: Config, world: parallel.World) -> Config:
    """Fill in what depends on the ranks and the device: micro_batch_size 0, precision auto, attention auto. Raises
    BadInput for a batch that does not divide, and for a precision or an attention that the device lacks."""
    dp, batch, unit = world.mesh.dp, c.global_batch_size, windows_per_unit(c)
    micro = c.micro_batch_size or largest_micro_batch(c, dp)
    if micro % unit:
        raise BadInput(f"micro_batch_size must be a multiple of {unit} with --objective {c.objective}, got {micro}")
    if batch % (micro * dp):
        raise BadInput(f"global_batch_size must be a multiple of micro_batch_size x dp = {micro} x {dp} = {micro * dp}"
                       f", got {batch}")
    c = dataclasses.replace(c, micro_batch_size=micro)
    pipeline_schedule(c, c.grad_accum_steps(dp))                           # raises if it cannot be
    if c.gpu:                                                              # a GPU that is not here
        kind = scaling.precision_of_gpu(c.precision, c.gpu)
        return dataclasses.replace(c, precision=kind, attention=c.attention.replace("auto", "triton"))
    kind = precision.resolve_precision(c.precision, world.device)
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        attention = flash_attn.resolve_backend(c.attention, world.device)
    except RuntimeError as error:
        raise BadInput(f"attention must be one that runs here: {error}") from None
    if attention != "sdpa" and c.head_dim > 256:
        raise BadInput(f"head_dim must be at most 256 with --attention {attention}, got {c.head_dim}; sdpa takes it")
    return dataclasses.replace(c, precision=kind, attention=attention)


# ---- starting ranks, main --------------------------------------------------------------------------------------------

LOST = "lost the other ranks"


def launch(c: Config, argv) -> int:
    """--nproc: torch's agent starts this program again as each of this machine's ranks, and ends all when one fails.
    One line says which, how and at which step. With --max-restarts all start again from the checkpoint. Ctrl-C and
    SIGTERM reach the ranks as SIGINT: they save and end. What a failed rank wrote to stderr stays in OUT/rank-R.err."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    stop_signals = []

    def pass_on(number, frame):
        stop_signals.append(number)
        ranks = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):                 # it has ended since
                os.kill(int(pid), signal.SIGINT)
        if not ranks:
            raise KeyboardInterrupt

    logging.disable(logging.ERROR)                                        # the agent's own lines
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // c.nproc)))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    for start in range(1, c.max_restarts + 2):
        with tempfile.TemporaryDirectory() as folder:
            config = LaunchConfig(
                min_nodes=1, max_nodes=1, nproc_per_node=c.nproc, run_id=f"train.py-{os.getpid()}", rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=0, monitor_interval=0.1,
                signals_to_handle="", logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.ERR))
            try:
                elastic_launch(config, sys.executable)(__file__, *argv, *["--resume", "auto"] * (start > 1))
                return 0
            except ChildFailedError as error:
                failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
            stderr = {int(path.parent.name): path.read_text().strip() for path in Path(folder).glob("*/*/*/stderr.log")}
        code, line = blame(c, dict.fromkeys(range(c.nproc), 0) | failed, stderr, bool(stop_signals))
        if line:
            print(line, file=sys.stderr, flush=True)
        if code != 1 or stop_signals or start > c.max_restarts:
            return code
        print(f"train.py: start {start + 1} of {c.max_restarts + 1}", file=sys.stderr, flush=True)


def blame(c: Config, codes: dict, stderr: dict, asked_to_stop: bool) -> tuple[int, str]:
    """Exit codes and stderr by rank -> the exit code and one line of the rank that failed first: the agent did not end
    it, and it did not lose the others. If ranks waited until their --timeout, those that the agent ended, and that had
    given no reason, hung: the line names them, and the step."""
    rank = min(codes, key=lambda r: (codes[r] in (0, -signal.SIGTERM), LOST in stderr.get(r, ""), r))
    code, text, where = codes[rank], stderr.get(rank, ""), ""
    own_lines = [line for line in text.splitlines() if line.startswith("train.py: ")]
    if code in (2, 3):
        return code, "\n".join(own_lines)
    if asked_to_stop and own_lines in ([], ["train.py: interrupted"]):
        return 1, "train.py: stopped before the run had begun"
    if text and Path(c.out).is_dir():
        Path(c.out, f"rank-{rank}.err").write_text(text + "\n")
        where = f"; see {c.out}/rank-{rank}.err"
    elif text and not own_lines:
        where = f": {text.splitlines()[-1]}"
    waited = [line for text in stderr.values() for line in text.splitlines() if LOST in line and "imed out" in line]
    hung = [f"rank {r}" for r in sorted(codes) if codes[r] in (-signal.SIGTERM, -signal.SIGKILL)
            and "train.py: " not in stderr.get(r, "")]
    if waited and hung:
        how = f"{', '.join(hung)} hung and had to be ended; {waited[0].removeprefix('train.py: ')}"
    elif code >= 0 and own_lines:
        how = own_lines[-1].removeprefix("train.py: ")
    else:
        how = f"rank {rank} " + (f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}")
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            how += f", at step {json.loads(Path(c.out, 'metrics.jsonl').read_text().splitlines()[-1])['step']}"
    return 1, f"train.py: {how}{where}"


def launcher_pid() -> int | None:
    """In a rank of --nproc: the process that started it."""
    name, _, pid = os.environ.get("TORCHELASTIC_RUN_ID", "").partition("-")
    return int(pid) if name == "train.py" else None


class Terminal(io.FileIO):
    """Standard output that may go away (a closed terminal, `| head`): the run goes on without it."""

    def write(self, text) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)


def main(argv=None) -> int:
    launcher = launcher_pid()
    if launcher:                                                         # a rank does not outlive its launcher
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                       # PR_SET_PDEATHSIG
        if os.getppid() != launcher:
            return 1
    if argv is not None:
        return run_command(argv)
    if not launcher:                                   # until catch_stop_signals(), SIGTERM acts as Ctrl-C does
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(Terminal(1, "w", closefd=False)), sys.stdout.encoding,
                                  "backslashreplace", line_buffering=True)
    return run_command(sys.argv[1:])


def run_command(argv) -> int:
    world = None
    try:
        c = parse_config(argv)
        uses = any(getattr(c, name) not in (None, False) for name in USES)
        if c.nproc and not uses and not c.dry_run and "RANK" not in os.environ and not dist.is_initialized():
            return launch(c, argv)
        world = join(c)
        c = resolve(c, world)
        if uses:
            return use(c, world)
        if c.dry_run:
            dry_run(c, world)
            return 0
        return train(c, world)
    except (BadInput, data.DataError) as error:
        first, _, rest = str(error).partition(" ")
        flag = flag_of(first) if first in Config.__dataclass_fields__ else first
        print(f"train.py: {flag} {rest}", file=sys.stderr)
        return 1 if isinstance(error, data.SaveError) else 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if world is None or world.size == 1:
            raise
        lost = parallel.is_peer_failure(error)
        if not lost:
            traceback.print_exc()
        what = LOST if lost else f"failed with {type(error).__name__}"
        line = (str(error).splitlines() or [""])[0][:200]
        print(f"train.py: rank {world.rank} {what} at step {world.step}: {line}", file=sys.stderr, flush=True)
        if lost and "imed out" in line:
            time.sleep(5)                                 # the others wait in vain too, and say so: blame() counts them
        os._exit(1)                                       # a broken group cannot be closed in order
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
