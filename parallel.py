"""One training run on many processors: data, tensor, sequence and pipeline parallelism, written out.

AdamW in float32 needs 16 bytes per parameter. A model of 7 billion parameters needs 112 GB, and memory for activations:
no 80 GB GPU can hold it. One GPU would also need years for 2 trillion tokens. So many processes share the run, mostly
one per GPU. Each is called a rank. There are three things to cut:

    the batch       data parallelism    every rank holds all weights and a part of the batch; gradients are summed
    the width       tensor parallelism  every rank holds a part of each matrix; partial products are summed
    the depth       pipeline            every rank holds some layers; hidden states travel from rank to rank

A rank has a place in a mesh pp x dp x tp. tp changes fastest, so that the ranks that talk most share a node. In every
mesh the run is the same: ranks add up sums, and divide by the count of all tokens (a mean of means is not the mean).
What differs is who sends what. all-gather: every rank gets the tensors of all n ranks, one after the other.
reduce-scatter: every rank gets its 1/n of their sum. all-reduce: every rank gets the sum. In a ring each of the first
two sends (n-1)/n of the whole tensor. An all-reduce is both: twice that. In the table a rank holds Psi parameters. A
micro-batch, the part of the batch that runs at once, has B x T tokens, C numbers per token. V is the vocabulary:

    axis    when                      what                                       numbers that a rank sends (in a ring)
    dp      backward                  all-reduce of the gradients                2 (n-1)/n Psi
    tp      a layer                   2 all-reduces in forward (g, below) and    2 (n-1)/n B T C each
                                      2 in backward (f)
    tp+sp   a layer                   an all-gather and a reduce-scatter for     (n-1)/n B T C each
                                      each of the 4; 2 all-gathers more in
                                      backward, since only shards are kept
    tp      loss                      max; sum of exponentials, target's logit   2 (n-1)/n 3 B T, and not B T V
    pp      boundary, micro-batch     a hidden state there, its gradient back    B T C each (B T C / tp with sp)

Tensor parallelism (Shoeybi 2019, arXiv:1909.08053). Split the first matrix by its columns and the second by its rows.
act works on each number alone, so rank r needs only its own Y_r, and a pair of linears needs one sum:

    Y_r = act(X A_r)        Z = sum_r Y_r B_r        A = [A_1 A_2 ...],  B = [B_1; B_2; ...]

    f   copy_to_tp_region       forward: identity      backward: all-reduce     stands before A, and before the head
    g   reduce_from_tp_region   forward: all-reduce    backward: identity       stands after B, and after the embedding

Sequence parallelism (Korthikanti 2022, 2205.05198): an all-reduce is a reduce-scatter and an all-gather. Between g and
the next f every rank needs only its T/n positions, so norms and residuals, and what they keep, are split too.

Pipeline. p ranks, m micro-batches. A rank waits while the pipe fills and drains: the bubble. A schedule is data: each
rank's list of operations. F is forward, B backward (here not the batch). Some schedules split backward: B then gives
the input's gradient, W the weights'. The last column is what a rank stores for backward, in micro-batches:

    gpipe         all F, then all B                      bubble (p-1)/m of the ideal time    m micro-batches stored
    1f1b          one F, one B                           the same                            p at most
    interleaved   v chunks of layers per rank            (p-1)/(v m)                         p (1 + (p-1)/(p v))
    zero_bubble   B sends the input's gradient at once,  (p-1)(F + B - W) / (m (F + B + W))  p at most (ZB-H1)
                  W fills the waits                      where F, B, W are their times
    (Huang 2018, 1811.06965; Narayanan 2021, 2104.04473; Qi 2023, 2401.10241)

A parameter says which piece of which tensor it is: full_name; box, a (start, stop, full size) per dimension. sum_over:
groups, besides dp, over which its gradient must be summed (norms under sequence parallelism, a tied embedding).

Map: groups and collectives - three short forms - Mesh - data parallel - tensor parallel - schedules, simulate -
run_schedule. Below the lecture: global quantities - World - CommLedger - demo. Not here: sharded optimizer states
(zero.py), context parallelism, experts.

run: python parallel.py        (starts its own ranks)
"""

import contextlib
import functools
import itertools
import math
import os
import resource
import time
import zlib
from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ---- groups and collectives: a group of None is this process alone, and nothing is sent ------------------------------


def size(group) -> int:
    return 1 if group is None else group.size()


def rank(group) -> int:
    return 0 if group is None else group.rank()


def all_reduce(x: Tensor, group, op=dist.ReduceOp.SUM) -> Tensor:
    """x becomes the sum (or op) of the ranks' x, in place. x must be contiguous."""
    if group is not None:
        dist.all_reduce(x, op, group=group)
    return x


def all_gather(x: Tensor, group, dim: int) -> Tensor:
    """The ranks' x, one after the other along dim."""
    if group is None:
        return x
    out = x.new_empty(size(group), *x.shape)
    dist.all_gather_single(out.flatten(0, 1), x.contiguous(), group=group)
    return torch.cat(out.unbind(0), dim)


def reduce_scatter(x: Tensor, group, dim: int) -> Tensor:
    """This rank's part along dim of the sum of the ranks' x."""
    if group is None:
        return x
    if x.shape[dim] % size(group):
        raise ValueError(f"a sequence that is split must have a multiple of {size(group)} places, got {x.shape[dim]}")
    parts = torch.stack(x.chunk(size(group), dim))                                       # (n, ..., size / n, ...)
    out = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_single(out, parts.flatten(0, 1), group=group)
    return out


def gather_objects(x, group) -> list:
    """Every rank's x, on every rank."""
    everyone = [x] * size(group)
    if group is not None:
        dist.all_gather_object(everyone, x, group=group)
    return everyone


def set_timeout(group, seconds: float):
    """How long a rank waits for the group's others before it raises."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)          # torch has no public name for it


# ---- data, tensor and pipeline parallelism, each in its shortest form ------------------------------------------------

def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def gradient(p: nn.Parameter) -> Tensor:
    """p.grad; zeros for a parameter that got none."""
    if p.grad is None:
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
    return p.grad


def all_reduce_gradients(module: nn.Module, group):
    """Data parallelism, after backward. DataParallel does the same during backward, in few messages."""
    for p in trainable(module):
        all_reduce(gradient(p), group)


class Exchange(torch.autograd.Function):
    """y = forward_op(x), dx = backward_op(dy). keep serves regather() alone, far below, which makes y from x again. An
    all-reduce writes in place, so f and g give it a clone: autograd's own tensors must not change."""

    @staticmethod
    def forward(ctx, x, forward_op, backward_op, keep=False):
        ctx.backward_op = backward_op
        if keep:
            ctx.save_for_backward(x)
            ctx.forward_op, ctx.readers, ctx.gathered = forward_op, 0, None
        return forward_op(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.backward_op(dy), None, None, None


def copy_to_tp_region(x: Tensor, group, sequence_parallel: bool = False) -> Tensor:
    """f: forward identity, backward all-reduce: x meets the columns of all ranks, and a rank's own give a part of dx.
    With sequence parallelism forward all-gather, (B, T/n, C) -> (B, T, C), and backward reduce-scatter."""
    if sequence_parallel:
        return Exchange.apply(x, lambda x: all_gather(x, group, 1), lambda dy: reduce_scatter(dy, group, 1), True)
    return Exchange.apply(x, lambda x: x, lambda dy: all_reduce(dy.clone(memory_format=torch.contiguous_format), group))


def reduce_from_tp_region(x: Tensor, group, sequence_parallel: bool = False) -> Tensor:
    """g: forward all-reduce, backward identity. With sequence parallelism (B, T, C) -> (B, T/n, C)."""
    if sequence_parallel:
        return Exchange.apply(x, lambda x: reduce_scatter(x, group, 1), lambda dy: all_gather(dy, group, 1))
    return Exchange.apply(x, lambda x: all_reduce(x.clone(memory_format=torch.contiguous_format), group), lambda dy: dy)


def two_linears(x: Tensor, A: Tensor, B: Tensor, group) -> Tensor:
    """Tensor parallelism: gelu(x A^T) B^T. x is whole. A (H/n, C), B (C, H/n) are this rank's parts of the width H,
    transposed, as F.linear wants them: columns became rows. tensor_parallel() builds this into a model."""
    h = F.gelu(F.linear(copy_to_tp_region(x, group), A))                                 # (..., H/n)
    return reduce_from_tp_region(F.linear(h, B), group)                                  # (..., C)


def two_stages(stage: nn.Module, inputs, targets, loss, group) -> list:
    """A pipeline of two ranks (gpipe): all micro-batches forward, then all backward. stage: this rank's half of the
    model; inputs, targets: a tensor per micro-batch, on both ranks. A hidden state has the shape and dtype of an input.
    -> the losses on the second rank, [] on the first. run_schedule() does this for any schedule."""
    if rank(group) == 0:
        outputs = []
        for x in inputs:
            outputs.append(stage(x))
            dist.send(outputs[-1].detach(), group=group, group_dst=1)                    # a hidden state
        for y in outputs:
            dy = torch.empty_like(y)
            dist.recv(dy, group=group, group_src=1)                                      # and its gradient back
            y.backward(dy)
        return []
    hidden_states, losses = [torch.empty_like(x) for x in inputs], []
    for x, target in zip(hidden_states, targets, strict=True):
        dist.recv(x, group=group, group_src=0)
        losses.append(loss(stage(x.requires_grad_()), target))
    for x, y in zip(hidden_states, losses, strict=True):
        y.backward()
        dist.send(x.grad, group=group, group_dst=0)
    return [y.detach() for y in losses]


# ---- which rank is where ---------------------------------------------------------------------------------------------

class Mesh:
    """The ranks as a grid pp x dp x tp, tp fastest, and this rank's place in it.

    - dp = 0 stands for the number of ranks / (tp pp).
    - dp_group, tp_group, pp_group: the ranks that differ from this one in that coordinate alone; None where the degree
      is 1. A degree that is the whole world has the world's own group.
    - pp_groups: two more groups of the pipeline's ranks: [0] for messages to lower ranks, [1] to higher ones. So a pair
      of ranks has a channel for each direction. ends_group: the pipeline's first and last rank, for a tied embedding
      and head. Both are None if pp is 1.
    - axes: the groups by name, for CommLedger.
    - timeout: seconds that a rank waits for the others of a group made here. The world's own was set when it was made.

    Without dist.init_process_group() the world is this rank. Raises ValueError for degrees that do not multiply to it.
    """

    def __init__(self, dp: int = 0, tp: int = 1, pp: int = 1, timeout: float = 600):
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        dp = dp or max(1, world_size // max(1, tp * pp))
        n = dp * tp * pp
        if min(dp, tp, pp) < 1 or n != world_size:
            there = f"is 1; start them with --nproc {n}, or torchrun" if world_size == 1 else f"are {world_size}"
            raise ValueError(f"dp x tp x pp must be the number of ranks: {dp} x {tp} x {pp} is {n}, there {there}")
        self.dp, self.tp, self.pp, world = dp, tp, pp, dist.group.WORLD

        def new_group(lines):
            """The group of this rank's line; None if it is in no line. Every rank makes all groups, in one order."""
            return dist.new_subgroups_by_enumeration(lines, timeout=timedelta(seconds=timeout))[0]

        grid = torch.arange(n, device="cpu").view(pp, dp, tp)      # a line of it: ranks that differ in one coordinate
        pp_lines, dp_lines, tp_lines = (grid.movedim(dim, -1).flatten(0, 1).tolist() for dim in range(3))
        self.pp_group, self.dp_group, self.tp_group = (
            None if degree == 1 else world if degree == n else new_group(lines)
            for degree, lines in ((pp, pp_lines), (dp, dp_lines), (tp, tp_lines)))
        self.pp_groups = self.ends_group = None
        if pp > 1:
            self.pp_groups = [new_group(pp_lines), new_group(pp_lines)]
            self.ends_group = new_group([[line[0], line[-1]] for line in pp_lines])
        self.axes = {"world": world, "dp": self.dp_group, "tp": self.tp_group, "pp": self.pp_groups,
                     "ends": self.ends_group}

    dp_rank = property(lambda self: rank(self.dp_group))
    tp_rank = property(lambda self: rank(self.tp_group))
    pp_rank = property(lambda self: rank(self.pp_group))

    def place(self, r: int) -> tuple[int, int, int]:
        """(pp, dp, tp) of a rank of the world."""
        return r // (self.tp * self.dp), r // self.tp % self.dp, r % self.tp


# ---- data parallelism ------------------------------------------------------------------------------------------------

class Bucket:
    """Parameters whose gradients lie in one flat tensor, for one all-reduce."""

    def __init__(self, params: list[nn.Parameter]):
        self.params, self.missing = params, set(params)                          # missing: whose gradient is not ready
        self.flat = self.work = None                               # work: the all-reduce of flat, while it is running


class DataParallel(nn.Module):
    """Any module on every rank of a group, each with its part of the batch: gradients become their sum.

        model = DataParallel(module, group)             unlike torch's DDP: a sum, no mean, and a line after backward
        loss = model(x); loss.backward()
        model.finish_gradient_synchronization()
        optimizer.step(); optimizer.zero_grad()

        1  at construction   parameters and buffers are broadcast from the group's rank 0
        2  backward          when all gradients of a bucket are ready, they are copied into it, and its all-reduce
                             starts, next to the rest of backward. All ranks start the buckets in one order: the one
                             with the last parameter first
        3  finish_gradient_synchronization()   starts the other buckets, waits for all; p.grad are views of the buckets

    - bucket_mb: MB (1e6 bytes) per bucket. Its memory stays. Gradients within no_sync() are added up, and not sent.
    - A parameter without a gradient on a rank counts as zero there. Its bucket, and all buckets after it, are sent only
      after backward. Freeze what is never used: an optimizer decays a weight whose gradient is zero.
    - Call zero_grad() after each step: gradients are sums over ranks already, and would be summed again.
    - If a batch is to be skipped, all ranks skip it: finish_gradient_synchronization(), then zero_grad().
    Raises ValueError for a bucket_mb not above 0, RuntimeError for what the backend cannot broadcast.
    """

    def __init__(self, module: nn.Module, group=None, bucket_mb: float = 25):
        super().__init__()
        if not bucket_mb > 0:
            raise ValueError(f"bucket_mb must be above 0, got {bucket_mb}")
        self.module, self.group, self.synchronize = module, group, True
        self.buckets, self.started = [], 0                                           # how many buckets are on their way
        if group is None:
            return
        for name, x in (*module.named_parameters(), *module.named_buffers()):
            try:
                dist.broadcast(x.detach(), group_src=0, group=group)
            except RuntimeError as error:
                raise RuntimeError(f"{name}, {x.dtype}, could not be broadcast: {error}") from error
        filling = defaultdict(list)                                                  # dtype -> the bucket being filled
        for p in reversed(trainable(module)):
            dtype = p.grad_dtype or p.dtype
            filling[dtype].append(p)
            if sum(x.numel() for x in filling[dtype]) * dtype.itemsize >= bucket_mb * 1e6:
                self.buckets.append(Bucket(filling.pop(dtype)))
        self.buckets += map(Bucket, filling.values())
        for bucket in self.buckets:
            for p in bucket.params:
                p.register_post_accumulate_grad_hook(functools.partial(self.ready, bucket))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self):
        before, self.synchronize = self.synchronize, False
        try:
            yield
        finally:
            self.synchronize = before

    def ready(self, bucket: Bucket, p):
        """Runs after each backward that added to p.grad. Outside no_sync() p.grad is now complete."""
        name = getattr(p, "full_name", "a parameter")
        if p.grad.is_sparse:
            raise RuntimeError(f"{name} must not have a sparse gradient, it has")
        if bucket.work is not None:
            raise RuntimeError(f"{name} got a second gradient after its bucket was sent: within a step, all backward "
                               "passes but the last belong in no_sync()")
        if self.synchronize:
            bucket.missing.discard(p)
            while self.started < len(self.buckets) and not self.buckets[self.started].missing:
                self.start_next()

    def start_next(self):
        """Copy the next bucket's gradients into it, start its all-reduce."""
        bucket = self.buckets[self.started]
        self.started += 1
        sizes = [p.numel() for p in bucket.params]
        if bucket.flat is None:
            bucket.flat = gradient(bucket.params[0]).new_empty(sum(sizes))
        for p, part in zip(bucket.params, bucket.flat.split(sizes), strict=True):
            p.grad = part.view_as(p).copy_(gradient(p))             # if p.grad is this view already, nothing is copied
        bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)

    def finish_gradient_synchronization(self):
        while self.started < len(self.buckets):
            self.start_next()
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.work, bucket.missing = None, set(bucket.params)
        self.started = 0


# ---- tensor and sequence parallelism ---------------------------------------------------------------------------------

# torch.compile leaves such a function alone. (The public torch.compiler.disable does so too, but imports for seconds.)
uncompiled = torch._disable_dynamo


def shard(p: nn.Parameter, dim: int, group, shards: dict) -> nn.Parameter:
    """This rank's part of p along dim, with p's attributes but the box of the part. shards: {parameter: its part}. So a
    parameter that two modules share (embedding and head) is split once, and they share the part."""
    if p not in shards:
        length = p.shape[dim] // size(group)
        start = rank(group) * length
        part = nn.Parameter(p.detach().narrow(dim, start, length).clone(), requires_grad=p.requires_grad)
        part.__dict__.update(p.__dict__)
        first, _, full = p.box[dim]
        part.box = (*p.box[:dim], (first + start, first + start + length, full), *p.box[dim + 1:])
        shards[p] = part
    return shards[p]


class ParallelModule(nn.Module):
    """A module's twin with this rank's part of its matrix."""

    dim, lacks = 0, ()               # the matrix is split along dim; lacks: options of a module that its twin cannot do

    def __init__(self, module: nn.Module, group, sequence_parallel: bool, shards: dict):
        super().__init__()
        self.group, self.sequence_parallel = group, sequence_parallel
        self.weight, self.bias = shard(module.weight, self.dim, group, shards), getattr(module, "bias", None)
        if self.bias is not None and self.dim == 0:
            self.bias = shard(self.bias, 0, group, shards)


def regather(x: Tensor):
    """A context in which autograd does not save x (B, T, C), if x is f's output under sequence parallelism. Then
    x.grad_fn is f's ctx (Exchange), which has the shard. Where a linear would save x, pack saves x's shape and counts a
    reader. Where backward wants x, unpack: the first reader runs f's forward again, the last one frees the result."""
    f, address = x.grad_fn, x.data_ptr()
    if not hasattr(f, "gathered"):
        return contextlib.nullcontext()

    def pack(saved: Tensor):
        if saved.data_ptr() != address:                                                                    # the weight
            return saved
        f.readers += 1
        return saved.shape

    def unpack(packed):
        if isinstance(packed, Tensor):
            return packed
        if f.gathered is None:
            f.gathered = f.forward_op(*f.saved_tensors)
        gathered = f.gathered.view(packed)
        f.readers -= 1
        if f.readers == 0:
            f.gathered = None
        return gathered

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class ColumnParallelLinear(ParallelModule):
    """y_r = x W_r^T + b_r: this rank's part of the outputs. x (B, T, C) comes from f -> (B, T, out/n). nn.Linear stores
    W as (out, in): W_r (out/n, C) and b_r (out/n) are rows. The column layers of a module (q, k, v; or gate, up) share
    its input: f stands once, before that module (put_f_before)."""

    @uncompiled
    def forward(self, x):
        with regather(x):
            return F.linear(x, self.weight, self.bias)


class RowParallelLinear(ParallelModule):
    """y = g(x_r W_r^T) + b: x_r (B, T, in/n) is this rank's part of the inputs -> (B, T, C), or its shard (B, T/n, C).
    W_r (C, in/n): columns of W; b is whole, and added once, after the sum."""

    dim = 1

    @uncompiled
    def forward(self, x):
        y = reduce_from_tp_region(F.linear(x, self.weight), self.group, self.sequence_parallel)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(ParallelModule):
    """A rank holds V/n rows. A token whose row another rank holds gives 0 here; g adds. tokens (B, T) -> (B, T, C), or
    the shard (B, T/n, C)."""

    lacks = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")

    def forward(self, tokens):
        local = tokens - self.weight.box[0][0]
        elsewhere = (local < 0) | (local >= len(self.weight))
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[..., None], 0)
        return reduce_from_tp_region(x, self.group, self.sequence_parallel)


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Linear layer and cross entropy with the vocabulary split: no rank ever holds a full row of logits.

        z_r = x W_r^T     m = max over ranks of max z_r     l = sum over ranks of sum exp(z_r - m)
        nll = log l + m - z_target                          dz_r = w (exp(z_r - m) / l - [target here])

    w is the token's weight; [target here] is 1 at the target's column, else 0. A rank sends m, l, z_target per token.
    x (N, C), weight (V/n, C), which is W_r, targets and weights (N,), which are the w -> sum of w nll, nll (N,). In the
    code z is z_r - m. forward takes `rows` tokens at a time, and computes their gradients too, so that the logits need
    not be kept. f's backward sums the ranks' dx_r = dz_r W_r.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, weights, group, rows, with_grad):
        W, lo, acc = weight.to(x.dtype), weight.box[0][0], weights.dtype
        nll, dx, dw = [], [], torch.zeros_like(W, dtype=acc) if with_grad else None
        for x_i, target, w in zip(*(t.split(rows) for t in (x, targets[:, None], weights[:, None])), strict=True):
            is_target, is_own = target >= 0, (target >= lo) & (target < lo + len(W))                    # (rows, 1)
            w, local = w * is_target, (target - lo).masked_fill(~is_own, 0)
            # z = x W^T - m
            z = (x_i @ W.T).to(acc)                                                                     # (rows, V/n)
            z -= all_reduce(z.amax(1, keepdim=True), group, dist.ReduceOp.MAX)
            # l = sum exp(z), and z_target from the rank that has it
            z_target = z.gather(1, local) * is_own
            p = z.exp_()
            l, z_target = all_reduce(torch.stack((p.sum(1, keepdim=True), z_target)), group)
            nll.append((l.log() - z_target) * is_target)
            if with_grad:
                # dz = w (p / l - [target here])
                dz = p.mul_(w / l).scatter_add_(1, local, -w * is_own).to(W.dtype)
                dx.append((dz @ W).to(acc))
                dw += dz.T @ x_i
        nll = torch.cat(nll)[:, 0]
        if with_grad:
            ctx.dtypes = x.dtype, weight.dtype
            ctx.save_for_backward(torch.cat(dx), dw)
        ctx.mark_non_differentiable(nll)
        return (weights * nll).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        return *(d.mul_(g).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), *[None] * 5


class VocabParallelHead(ParallelModule):
    """W_r (V/n, C). Without targets: logits (B, T, V), gathered. With targets, weights (B, T): (loss, nll), the same on
    every rank of the group: loss = sum of weights * nll, nll (B, T) detached."""

    lacks = ("bias",)

    def forward(self, x, targets=None, weights=None):
        acc = torch.promote_types(x.dtype, torch.float32)
        x = copy_to_tp_region(x.to(self.weight.dtype), self.group, self.sequence_parallel)            # (B, T, C)
        if targets is None:
            return Exchange.apply(F.linear(x, self.weight), lambda z: all_gather(z, self.group, -1),
                                  lambda dz: dz.chunk(size(self.group), -1)[rank(self.group)])
        full = self.weight.box[0][2]
        if targets.device.type == "cpu" and targets.numel() and int(targets.max()) >= full:     # on a GPU: a stall
            raise ValueError(f"targets must be below vocab_size {full}, got {int(targets.max())}")
        weights = torch.ones_like(targets, dtype=acc) if weights is None else weights.to(acc)
        rows = max(256, (2**21 if x.device.type == "cpu" else 2**26) // len(self.weight))   # so many logits at once
        loss, nll = VocabParallelCrossEntropy.apply(x.flatten(0, -2), self.weight, targets.flatten(), weights.flatten(),
                                                    self.group, rows, torch.is_grad_enabled())
        return loss, nll.view(targets.shape)


def put_f_before(module: nn.Module, columns: list, group, sequence_parallel: bool):
    """Apply f to the first argument of `module`. Only column layers in the module may read that argument."""
    @uncompiled
    def before_forward(_, args, kwargs):
        name = None if args else next(iter(kwargs))
        # cast here, so that what is sent, and what is kept, is what the layers multiply
        x = (args[0] if args else kwargs[name]).to(columns[0].weight.dtype)
        x = copy_to_tp_region(x, group, sequence_parallel)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {name: x})

    module.register_forward_pre_hook(before_forward, with_kwargs=True)


LINEARS = {"column": ColumnParallelLinear, "row": RowParallelLinear}
STYLES = LINEARS | {"vocab": VocabParallelEmbedding, "head": VocabParallelHead}
PLAN = {"*.[qkv]_proj": "column", "*.o_proj": "row", "*.gate_proj": "column", "*.up_proj": "column",
        "*.down_proj": "row", "*.[qk]_norm": "partial", "*embed_tokens": "vocab", "*embed_positions": "positions",
        "*lm_head": "head"}                           # Hugging Face's names of a Llama's, and of our GPT-2's, modules


def tensor_parallel(model: nn.Module, group, *, plan: dict = PLAN, sequence_parallel: bool = False) -> nn.Module:
    """Split a model over the ranks of a group from outside, in place: modules whose names match are swapped for their
    parallel twins. Weights may be real (each rank keeps its slice) or on the meta device.

    plan: {pattern of module names (fnmatch): style}, the first match counts. Styles:
        column, row, vocab, head   the classes above
        partial                    not split, but it meets only this rank's heads: sum_over, as its gradient is a part
        positions                  an embedding of positions: under sequence parallelism a rank keeps its T/n of them
    sequence_parallel: between a row layer and the next column layer hidden states are (B, T/n, C).
        - The model must take T from the tokens, not from hidden states: ours does, transformers' do not.
        - The vocab embedding splits the sequence; a model without one must be fed this rank's positions alone.
        - Parameters that are not split get sum_over too: call reduce_partial_gradients() (below the lecture).
    Raises ValueError, naming the module, for sizes and heads that the group's size does not divide, a module that is
    no linear or embedding, and a pattern of your plan that meets nothing.
    """
    for name, p in model.named_parameters():
        p.__dict__.setdefault("full_name", name)
        p.__dict__.setdefault("box", tuple((0, length, length) for length in p.shape))
    n, shards, modules = size(group), {}, dict(model.named_modules())
    met = {name: pattern for name in list(modules)[1:] for pattern in reversed(plan) if fnmatchcase(name, pattern)}
    unmet = sorted(set(plan) - set(met.values()))
    if not met or unmet and plan is not PLAN:
        raise ValueError(f"plan must meet a module with each pattern, {', '.join(unmet)} meets none")
    for name, pattern in met.items():
        module, style, (parent, _, child) = modules[name], plan[pattern], name.rpartition(".")
        parent = modules[parent]
        if style == "partial":
            for p in module.parameters():
                p.sum_over = (group,)
        elif style == "positions":
            if sequence_parallel:
                module.register_forward_hook(lambda _, args, x: x.chunk(n, -2)[rank(group)])
        elif style not in STYLES:
            raise ValueError(f"{name}: its style must be one of {', '.join(STYLES)}, partial, positions, got {style!r}")
        else:
            twin, what = STYLES[style], type(module).__name__
            if getattr(getattr(module, "weight", None), "ndim", 0) != 2:
                raise ValueError(f"{name}: style {style} needs a module with a matrix, got {what}")
            for option in twin.lacks:
                value = getattr(module, option, None)
                if value is not None and value is not False:
                    raise ValueError(f"{name}: style {style} cannot do {option}, {what} has it")
            length, unit = module.weight.shape[twin.dim], getattr(parent, "head_dim", 1) if style in LINEARS else 1
            if length % (unit * n):
                size_of = f"{length // unit} heads" if unit > 1 else f"size {length}"
                raise ValueError(f"{name}: tp must divide its {size_of}, got {n}")
            setattr(parent, child, twin(module, group, sequence_parallel, shards))
    for name, module in model.named_modules():
        columns, rows = ([x for x in module.children() if isinstance(x, twin)] for twin in LINEARS.values())
        if not columns:
            continue
        # between f and g a rank computes a part: any other parameter there would get a part of its gradient, not summed
        planned = {p for x in module.modules() if isinstance(x, ParallelModule) for p in x.parameters()}
        strange = [name for name, p in module.named_parameters()
                   if p not in planned and getattr(p, "sum_over", ()) != (group,)]
        if strange or not rows:
            raise ValueError(f"{name or type(module).__name__}: a module with column layers must have a row layer and "
                             f"no parameter outside the plan, got {strange[0] if strange else 'no row layer'}")
        put_f_before(module, columns, group, sequence_parallel)
    if sequence_parallel:
        for p in set(model.parameters()) - set(shards.values()):
            p.sum_over = (group,)
    return model


# ---- pipeline schedules are data -------------------------------------------------------------------------------------

class Op(NamedTuple):
    """F forward, B backward, W the weights' part of it. Chunk c of rank r is stage c p + r of all p v."""
    kind: str
    micro_batch: int
    chunk: int = 0

    def __str__(self):
        return f"{self.kind}{self.micro_batch}" + (f".{self.chunk}" if self.chunk else "")


def run_ahead(p: int, m: int, v: int, ahead) -> list[list[Op]]:
    """Rank r runs ahead(r) forwards, then one forward and one backward in turns, then the backwards that are left. With
    v chunks a rank, p micro-batches go through one chunk before the next. The next three choose ahead and v."""
    rounds = [range(i, min(i + p, m)) for i in range(0, m, p)]
    forward = [Op("F", i, c) for round_ in rounds for c in range(v) for i in round_]
    backward = [Op("B", i, c) for round_ in rounds for c in reversed(range(v)) for i in round_]
    schedule = []
    for r in range(p):
        n = min(ahead(r), m * v)
        turns = [op for pair in zip(forward[n:], backward, strict=False) for op in pair]
        schedule.append(forward[:n] + turns + backward[m * v - n:])
    return schedule


def gpipe(p: int, m: int) -> list[list[Op]]:
    """Ahead: all of the forwards."""
    return run_ahead(p, m, 1, lambda r: m)


def one_f_one_b(p: int, m: int) -> list[list[Op]]:
    """Ahead: as many forwards as there are ranks behind this one."""
    return run_ahead(p, m, 1, lambda r: p - 1 - r)


def interleaved(p: int, m: int, v: int = 2) -> list[list[Op]]:
    """Ahead, as in Megatron-LM: p forwards of each chunk but the last, and two for each rank after this one. Raises
    ValueError unless p divides m."""
    if m % p:
        raise ValueError(f"pp_schedule interleaved needs a multiple of pp = {p} micro-batches per step, got {m}")
    return run_ahead(p, m, v, lambda r: (p - 1 - r) * min(v, 2) + (v - 1) * p)            # v = 1: as 1f1b


def zero_bubble(p: int, m: int) -> list[list[Op]]:
    """ZB-H1: 1f1b whose B is the input's gradient alone. Rank r does W of micro-batch i after B of i + r: rank 0 at
    once, the last rank p - 1 micro-batches later. So each rank stores as many micro-batches as the first one of 1f1b,
    and the W that are left fill the waits at the end."""
    schedule = [[] for _ in range(p)]
    for r, ops in enumerate(one_f_one_b(p, m)):
        for op in ops:
            schedule[r].append(op)
            if op.kind == "B" and op.micro_batch >= r:
                schedule[r].append(Op("W", op.micro_batch - r))
        schedule[r] += [Op("W", i) for i in range(max(0, m - r), m)]
    return schedule


def forward_only(p: int, m: int, v: int = 1) -> list[list[Op]]:
    """Evaluation."""
    return [[Op("F", i, c) for c in range(v) for i in range(m)] for _ in range(p)]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zb": zero_bubble}


def stage_layers(n_layer: int, s: int, num_stages: int) -> range:
    """The layers of stage s, s n_layer // num_stages the first. Raises ValueError if a stage would have none."""
    if num_stages > n_layer:
        raise ValueError(f"pp must leave each stage a layer: pp x chunks is {num_stages}, n_layer {n_layer}")
    return range(s * n_layer // num_stages, (s + 1) * n_layer // num_stages)


class Message(NamedTuple):
    """What an operation of another stage waits for."""
    kind: str                        # F: a hidden state, B: its gradient
    micro_batch: int
    stage: int                       # that it goes to
    source: int                      # ranks of the pipeline
    target: int

    goes_up = property(lambda self: self.target > self.source)


def with_messages(schedule) -> list[list[tuple]]:
    """The timetable: for each rank and operation (op, the Message that op needs, the Message that op sends). A Message
    is None where there is none: the first stage's F needs none, and its B sends none."""
    p = len(schedule)
    stages = range(p * (1 + max(op.chunk for ops in schedule for op in ops)))

    def message(op, sender, receiver):
        if sender in stages and receiver in stages and op.kind != "W":
            return Message(op.kind, op.micro_batch, receiver, sender % p, receiver % p)

    timetable = [[] for _ in range(p)]
    for r, ops in enumerate(schedule):
        for op in ops:
            stage = op.chunk * p + r
            step = -1 if op.kind == "B" else 1                                        # backward goes down the stages
            timetable[r].append((op, message(op, stage - step, stage), message(op, stage, stage + step)))
    return timetable


@dataclass
class Timeline:
    events: list             # for each rank: [(op, start, end), ...]
    duration: float
    bubble: float            # idle share of the ranks' time. bubble / (1 - bubble) is idle / ideal time, as at the top
    stored: list             # for each rank: the most micro-batches x chunks stored at once


def simulate(schedule, forward: float = 1.0, backward: float = 1.0, weight: float = 1.0, p2p: float = 0.0) -> Timeline:
    """Run a schedule on paper. forward, backward, weight: the times of F, B and W (without W in the schedule, B takes
    backward + weight). p2p: the delay of a message. Raises ValueError, naming the operations, if the schedule is out of
    order, waits for itself, or does not have each operation once."""
    kinds = {op.kind for op in schedule[0]}
    m, chunks = (1 + max(op[i] for ops in schedule for op in ops) for i in (1, 2))
    expected = {Op(*each) for each in itertools.product(kinds, range(m), range(chunks))}
    for r, ops in enumerate(schedule):
        if set(ops) != expected or len(ops) != len(expected):
            wrong = [str(op) for op in expected.symmetric_difference(ops)] or ["one twice"]
            raise ValueError(f"schedule must hold each operation once, rank {r} differs in {', '.join(wrong[:4])}")
    cost = {"F": forward, "B": backward if "W" in kinds else backward + weight, "W": weight}
    timetable, events = with_messages(schedule), [[] for _ in schedule]
    ready, free, moved = {None: 0.0}, [0.0] * len(schedule), True    # when a message, a result is there; a rank is free
    while moved:                                          # each rank runs until it must wait, until no rank can go on
        moved = False
        for r, line in enumerate(timetable):
            for op, needs, result in line[len(events[r]):]:
                before = None if op.kind == "F" else (r, op._replace(kind={"B": "F", "W": "B"}[op.kind]))
                if needs not in ready or before not in ready:
                    break
                start = max(free[r], ready[needs])
                free[r] = ready[r, op] = start + cost[op.kind]
                events[r].append((op, start, free[r]))
                if result is not None:
                    ready[result] = free[r] + p2p
                moved = True
    stuck = [f"rank {r} at {ops[len(events[r])]}" for r, ops in enumerate(schedule) if len(events[r]) < len(ops)]
    if stuck:
        raise ValueError(f"schedule must not wait for itself: {', '.join(stuck)}")
    return executed_timeline(events)


def executed_timeline(clocks: list) -> Timeline:
    """Of each rank's (op, start, end), by a clock that the ranks share. The timeline begins at 0."""
    zero = min(start for line in clocks for _, start, _ in line)
    events = [[(op, start - zero, end - zero) for op, start, end in line] for line in clocks]
    duration = max(end for line in events for *_, end in line)
    busy = sum(end - start for line in events for _, start, end in line)
    last = "W" if any(op.kind == "W" for op, _, _ in events[0]) else "B"              # it frees the micro-batch
    stored = [max(itertools.accumulate((op.kind == "F") - (op.kind == last) for op, _, _ in line)) for line in events]
    return Timeline(events, duration, 1 - busy / (len(events) * duration), stored)


def draw(timeline: Timeline, width: int = 100) -> str:
    """As text, a line per rank: the letters of its operations (small in odd micro-batches), dots where it waits."""
    lines = []
    for r, events in enumerate(timeline.events):
        line = ["."] * width
        for op, start, end in events:
            a, b = (round(t / timeline.duration * width) for t in (start, end))
            line[a:b] = (op.kind.lower() if op.micro_batch % 2 else op.kind) * (b - a)
        lines.append(f"rank {r}  {''.join(line)}")
    return "\n".join(lines)


def chrome_trace(timeline: Timeline) -> dict:
    """For a JSON file that Perfetto (ui.perfetto.dev) or chrome://tracing opens. Seconds -> microseconds."""
    return {"traceEvents": [{"name": str(op), "cat": op.kind, "ph": "X", "pid": 0, "tid": r, "ts": start * 1e6,
                             "dur": (end - start) * 1e6, "args": op._asdict()}
                            for r, events in enumerate(timeline.events) for op, start, end in events]}


# ---- running a schedule ----------------------------------------------------------------------------------------------

class SplitLinear(torch.autograd.Function):
    """y = x W^T + b whose backward gives dx alone. The weights' part joins a queue: (parameter, () -> its gradient)."""

    @staticmethod
    def forward(ctx, x, parameters, queue):       # parameters is a tuple: autograd does not see them, nor their hooks
        ctx.save_for_backward(x)
        ctx.parameters, ctx.queue = parameters, queue
        return F.linear(x, *parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, (weight, bias) = ctx.saved_tensors[0].detach(), ctx.parameters                         # x without its graph
        ctx.queue.append((weight, lambda: (dy.flatten(0, -2).T @ x.flatten(0, -2).to(dy.dtype)).to(weight.dtype)))
        if bias is not None and bias.requires_grad:
            ctx.queue.append((bias, lambda: dy.flatten(0, -2).sum(0).to(bias.dtype)))
        return (dy @ weight.to(dy.dtype)).to(x.dtype), None, None


class SplitLinears(TorchFunctionMode):
    """Inside, every F.linear with a trainable weight and an input that needs a gradient is a SplitLinear."""

    def __init__(self, queue: list):
        super().__init__()
        self.queue = queue

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
            if isinstance(weight, nn.Parameter) and weight.requires_grad and x.requires_grad:
                return SplitLinear.apply(x, (weight, bias), self.queue)
        return function(*args, **(kwargs or {}))


class Channels:
    """Messages of a pipeline rank. A pair of ranks has one channel each way. Receives are posted in the sender's order,
    read off the timetable (with_messages): no tags, no handshakes. like(micro_batch) is an empty tensor for a message.

    coming     {source rank: its messages to us whose receive is not posted (started) yet, in its order}
    arriving   receives that are posted        sending   sends that may not be done: their tensors are kept
    receipts   {message: what its sender received after its previous message to us and before this one}. If the message
               is here, the sender has all of that. What we sent of it is done: those tensors are freed
    """

    def __init__(self, timetable, groups, like, timeout: float):
        self.groups, self.like, self.timeout = groups, like, timedelta(seconds=timeout)
        self.rank = 0 if groups is None else rank(groups[0])
        if any(needs and needs.source == needs.target for line in timetable for _, needs, _ in line):
            raise ValueError("a pipeline of one rank must have one chunk")
        self.coming, self.receipts, self.arriving, self.sending = defaultdict(deque), {}, {}, {}
        for source, line in enumerate(timetable):
            received = []                                                           # by it, since its message before
            for _, needs, result in line:
                received.append(needs)
                if result is not None and result.target == self.rank:
                    self.coming[source].append(result)
                    self.receipts[result], received = received, []

    def send(self, x: Tensor, message: Message):
        x = x.contiguous()
        self.sending[message] = x, self.start(dist.isend, x, message.target, message)

    def post(self, message: Message):
        """Start to receive all that this message's source sends us up to it."""
        while message not in self.arriving:
            first = self.coming[message.source].popleft()
            x = self.like(first.micro_batch)
            self.arriving[first] = x, self.start(dist.irecv, x, first.source, first)

    def receive(self, message: Message) -> Tensor:
        self.post(message)
        x = self.wait(*self.arriving.pop(message))
        for sent in self.receipts[message]:
            if sent in self.sending:                                             # gloo's are not done until waited for
                self.wait(*self.sending.pop(sent))
        return x

    def start(self, isend_or_irecv, x, peer: int, message):
        # always as a batch of one: for a single send NCCL warns, and may make a communicator for each pair
        return dist.batch_isend_irecv([dist.P2POp(isend_or_irecv, x, group=self.groups[message.goes_up],
                                                  group_peer=peer)])[0]

    def wait(self, x, work):
        # gloo's messages do not know their group's timeout. NCCL's do; and there the stream waits, not the host
        work.wait(self.timeout) if x.device.type == "cpu" else work.wait()
        return x

    def finish(self):
        for sent in self.sending.values():
            self.wait(*sent)


def run_schedule(schedule, chunks, batches, groups=None, *, loss_grad=1.0, hidden_like=None,
                 no_sync=contextlib.nullcontext, on_op=None, timeout: float = 600) -> list:
    """Run this rank's operations of a schedule -> nll of each micro-batch on the last stage's rank, None elsewhere.

    chunks       this rank's stages: callables, chunk(hidden=..., **batch) -> hidden, and of the last stage (loss, nll)
    batches      for each micro-batch a dict of tensors, the same on every rank of the pipeline
    groups       Mesh.pp_groups; None for p = 1 (then a schedule is plain gradient accumulation)
    loss_grad    where backward starts: the gradient of each loss. In train.py loss scale / N, or 1
    hidden_like  batch -> an empty tensor like the hidden state between stages
    no_sync      context around a backward whose parameters get more gradients later (DataParallel.no_sync). W computes
                 the gradients of linears' weights, B all others. No parameter may get gradients from both
    on_op        on_op(op, start, end): the clock before and after an operation ran
    timeout      seconds that a message may take

    A schedule without B evaluates. A hidden state that was sent is freed when a later message from its receiver shows
    that it has arrived; its graph is kept for backward.
    """
    timetable = with_messages(schedule)
    channels = Channels(timetable, groups, lambda i: hidden_like(batches[i]), timeout)
    mine = timetable[channels.rank]
    kinds = {op.kind for op, _, _ in mine}
    final = {(op.kind, op.chunk): op for op, _, _ in mine}                 # of each chunk: the last B, the last W
    graphs, queues, nlls = {}, defaultdict(list), [None] * len(batches)    # from F to B; from B to W

    def backward(tensor, gradient, more: bool):
        """more: parameters that get a gradient here will get another one in this step."""
        with no_sync() if more else contextlib.nullcontext():
            torch.autograd.backward([tensor], [gradient])

    def clock():
        if on_op is not None and torch.accelerator.is_available():             # a launch is not the work that it starts
            # of this stream alone: another may hold a message that cannot finish before our next operation
            torch.accelerator.current_stream().synchronize()
        return time.perf_counter()

    for (op, needs, result), (_, next_needs, _) in itertools.pairwise([*mine, (None, None, None)]):
        kind, i, c = op
        received = None if needs is None else channels.receive(needs)
        # the next operation's message travels while this one runs. But calls of a group run in order: a result sent in
        # the same group would wait for that message. Then the message is posted when it is needed
        if next_needs is not None and (result is None or result.goes_up != next_needs.goes_up):
            channels.post(next_needs)
        start = clock()
        if kind == "F":
            hidden = None if received is None else received.requires_grad_("B" in kinds)
            with SplitLinears(queues[i, c]) if "W" in kinds else torch.set_grad_enabled("B" in kinds):
                out = chunks[c](hidden=hidden, **batches[i])
            if result is None:                                                                     # the last stage
                out, nlls[i] = out
            else:
                channels.send(out.detach(), result)
            if "B" in kinds:
                # edge: where backward enters the graph. Unlike out it holds no numbers, so out is freed. None: frozen
                edge = torch.autograd.graph.get_gradient_edge(out) if out.requires_grad else None
                graphs[i, c] = hidden, edge, torch.ones_like(out).mul_(loss_grad) if result is None else None
            del out
        elif kind == "B":
            hidden, edge, gradient = graphs.pop((i, c))
            if edge is not None:
                backward(edge, received if gradient is None else gradient, op != final["B", c])
            if result is not None:
                channels.send(torch.zeros_like(hidden) if hidden.grad is None else hidden.grad, result)
            del hidden, edge                                               # W frees the inputs of linears, this one too
        else:
            parts = queues.pop((i, c), [])
            while parts:                                                  # one gradient at a time: each frees its input
                parameter, later = parts.pop()
                backward(parameter, later(), op != final["W", c] or any(x is parameter for x, _ in parts))
                del later                                                 # or the last input would stay
        if on_op is not None:
            on_op(op, start, clock())
    channels.finish()
    return nlls


# ---- the lecture ends here -------------------------------------------------------------------------------------------
#
# What follows is for looking things up.

# ---- global quantities -----------------------------------------------------------------------------------------------

def reduce_partial_gradients(params):
    """Add up what sum_over says is partial, one message per group, after the gradients' sum over dp. The groups' order
    is the same on all ranks: that of their ranks' numbers."""
    partial = defaultdict(list)
    for p in params:
        for group in getattr(p, "sum_over", ()):
            if p.requires_grad and group is not None:
                partial[group].append(gradient(p))
    for group, gradients in sorted(partial.items(), key=lambda x: dist.get_process_group_ranks(x[0])):
        flat = all_reduce(torch.cat([g.flatten() for g in gradients]), group)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))


def piece(p) -> tuple:
    """Which piece of which tensor this is: equal on replicas alone. flat: see zero.py."""
    return p.full_name, p.box, getattr(p, "flat", None)


def owned(params, group=None) -> list:
    """Those of this rank's parameters that no lower rank of the group holds: each piece once over all ranks. Raises
    ValueError, naming the tensor, if the different pieces do not have as many elements as the tensor."""
    params = list(params)
    everyone = gather_objects([piece(p) for p in params], group)
    covered, wanted = defaultdict(int), {}
    for name, box, flat in {x for pieces in everyone for x in pieces}:
        covered[name] += math.prod(b - a for a, b, _ in box) if flat is None else flat[1] - flat[0]
        wanted[name] = math.prod(n for _, _, n in box)
    for name, total in wanted.items():
        if covered[name] != total:
            raise ValueError(f"{name}: the ranks' pieces must make its {total} elements, they make {covered[name]}")
    lower = {x for pieces in everyone[:rank(group)] for x in pieces}
    return [p for p in params if piece(p) not in lower]


def squared_norm(tensors) -> Tensor | float:
    """Sum of squares, in float64. Summed over all ranks' owned gradients it is the square of the global norm."""
    tensors = list(tensors)
    if not tensors:
        return 0.0                                              # a tensor would be copied to the device, and waited for
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def check_replicas(params, group=None):
    """Raises RuntimeError, with the parameter and two ranks, if their copies of one piece differ in a bit."""
    mine = [(piece(p), zlib.crc32(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())) for p in params]
    seen = {}
    for r, pieces in enumerate(gather_objects(mine, group)):
        for key, crc in pieces:
            first, expected = seen.setdefault(key, (r, crc))
            if crc != expected:
                raise RuntimeError(f"{key[0]}: replicas must be equal, those of ranks {first} and {r} are not")


# ---- this process among its peers -----------------------------------------------------------------------------------

def find_device(name: str, local_rank: int) -> torch.device:
    """The device of a name, with this rank's index; "auto": the accelerator that is here, else the CPU. Raises
    ValueError for one that does not work."""
    if name == "auto":            # but not Apple's: it has no float64 for the sums of a step, and is untried
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator and accelerator.type != "mps" else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cpu":
            if not torch.accelerator.device_count():
                raise RuntimeError("there is none")
            if device.index is None:
                device = torch.device(name, local_rank % torch.accelerator.device_count())
            torch.accelerator.set_device_index(device.index)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be usable here, got {name!r}: {str(error).splitlines()[0]}") from None
    return device


def ranks_of_environment() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; 0, 1, 0 without them. Raises ValueError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 1, 0
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name) and (name in names or given.get("WORLD_SIZE") != "1"):
            raise ValueError(f"{name} must be set together with {', '.join(given)}, as torchrun does, got "
                             f"{os.environ.get(name)!r}")
    for name, value in given.items():
        if not value.isdecimal():
            raise ValueError(f"{name} must be a number, got {value!r}")
    rank, size, local_rank = (int(given.get(name, 0)) for name in names)
    if rank >= size:
        raise ValueError(f"RANK must be below WORLD_SIZE, got {rank} and {size}")
    return rank, size, local_rank


class World:
    """This process among all ranks of a run.

    rank, size   its number, and how many there are: torchrun's RANK and WORLD_SIZE; without them it is alone
    device       this rank's accelerator, or the CPU
    group        all ranks, over the device's backend (NCCL on GPUs, gloo on CPUs); None if alone
    host         all ranks over gloo, for objects and for waits of hours (rank 0 prepares data); None if alone or fake
    mesh         the ranks as a grid pp x dp x tp
    step         the step that the run is at, for an error message

    fake: --dry-run's ranks, which are not there: groups exist and nothing is sent.
    Raises ValueError, one line, for a device that does not work and degrees that are not the number of ranks.
    """

    def __init__(self, dp: int = 0, tp: int = 1, pp: int = 1, *, device: str = "auto", timeout: float = 600,
                 fake: bool = False):
        self.rank, self.size, local_rank = ranks_of_environment()
        self.step, self.device = 0, find_device(device, local_rank)
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        elif self.size > 1:
            self.join(timedelta(seconds=timeout))
        elif fake and (n := max(1, dp) * tp * pp) > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore
            self.size = n
            dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
        self.group = dist.group.WORLD if self.size > 1 else None
        self.host = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if self.group and not fake else None
        self.mesh = Mesh(dp, tp, pp, timeout)
        if self.host is not None:
            dist.barrier(group=self.host)      # all are connected: a rank that leaves at a fault breaks nothing

    def join(self, timeout: timedelta):
        """Meet the ranks that torchrun started."""
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        except (dist.DistStoreError, dist.DistNetworkError, OSError, ValueError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ValueError(f"MASTER_ADDR:MASTER_PORT must be where all ranks can meet, {place}: "
                             f"{str(error).splitlines()[0]:.120}") from None
        # torchrun's store outlives its ranks: ranks that start again must not read the addresses of those before them
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(dist.get_default_backend_for_device(self.device), timeout=timeout, store=store,
                                rank=self.rank, world_size=self.size,
                                device_id=None if self.device.type == "cpu" else self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce in place over all ranks."""
        return all_reduce(tensor, self.group)

    def say(self, line: str):
        """Rank 0 alone prints."""
        if self.rank == 0:
            print(line, flush=True)

    def peak_memory(self) -> int:
        """Most bytes this process has held: the allocator's on an accelerator, resident memory on a CPU."""
        if self.device.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return torch.accelerator.max_memory_allocated(self.device)

    def first(self, work):
        """Rank 0 alone does work(). Every rank gets its result, or raises its ValueError."""
        answer = [None, None]
        if self.rank == 0:
            try:
                answer = [work(), None]
            except ValueError as error:
                answer = [None, error]
            except OSError as error:
                answer = [None, ValueError(f"{error.filename}: {error.strerror}")]
        if self.host is not None:
            dist.broadcast_object_list(answer, src=0, group=self.host)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


def is_peer_failure(error: Exception) -> bool:
    """Whether another rank failed, and not this one: what gloo and NCCL raise if a connection breaks or a message does
    not come."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(
        words in str(error) for words in ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out")))


# ---- the ledger ------------------------------------------------------------------------------------------------------

COLLECTIVES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
               "alltoall_base_": "all_to_all", "broadcast_": "broadcast", "recv_": "recv"}             # torch's -> ours


class Call(NamedTuple):
    """One call. bytes is the payload: the whole tensor, all ranks' parts together."""
    axis: str
    phase: str
    collective: str
    bytes: int
    n: int                           # ranks of the group
    shape: tuple
    dtype: torch.dtype
    peer: int | None                 # of a send or receive: the other's rank in the group

    @property
    def wire(self) -> float:
        """Bytes that a rank sends, in a ring: an all-reduce is a reduce-scatter and an all-gather."""
        part = (self.n - 1) / self.n
        return self.bytes * {"all_reduce": 2 * part, "send": 1, "recv": 0}.get(self.collective, part)


class CommLedger(TorchDispatchMode):
    """Inside, every torch.distributed call of this thread is counted, in backward and hooks too. axes: {name: group or
    groups}. phase is yours to set: "forward", "backward", ... calls: the sequence of Calls."""

    def __init__(self, axes: dict):
        super().__init__()
        self.names = {g.group_name: name for name, groups in axes.items() if groups is not None
                      for g in (groups if isinstance(groups, list | tuple) else [groups])}
        self.phase, self.calls = "", []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.record(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def record(self, name, args):
        """args of every call: tensors (in lists, or not), the group, and of a send or receive the peer."""
        group_place = next(i for i, x in enumerate(args) if isinstance(x, torch.ScriptObject))
        tensors = [x for x in tree_leaves(args[:group_place]) if isinstance(x, Tensor)]
        if not tensors:                                                                                      # a barrier
            return
        group, name = dist.ProcessGroup.unbox(args[group_place]), COLLECTIVES.get(name, name)
        whole = max(tensors, key=Tensor.numel)                           # gathered, or to be scattered: all parts
        peer = args[group_place + 1] if name in ("send", "recv") else None
        self.calls.append(Call(self.names.get(group.group_name, group.group_name), self.phase, name, whole.nbytes,
                               group.size(), tuple(whole.shape), whole.dtype, peer))

    def total(self, field: str = "bytes", **where) -> float:
        """Sum of bytes or wire over the calls with these attributes: total("wire", axis="tp")."""
        return sum(getattr(x, field) for x in self.calls if all(getattr(x, k) == v for k, v in where.items()))


# ---- demo ------------------------------------------------------------------------------------------------------------

def start_ranks(run, n: int):
    """run(rank, init_method) on n processes of this machine."""
    import tempfile

    import torch._dynamo  # noqa: F401 (or each rank's first optimizer would)
    with tempfile.TemporaryDirectory() as folder:                             # nothing has run here yet: a fork is safe
        torch.multiprocessing.start_processes(run, (f"file://{folder}/store",), n, start_method="fork")


def demo():
    """The claims of this file, measured | predicted | error, asserted, on steps that train.py takes: four ranks on this
    CPU."""
    import scaling
    import train

    flags = """--n-layer 4 --n-head 4 --n-embd 16 --n-ff 32 --vocab-size 64 --seq-len 8 --global-batch-size 4
    --micro-batch-size 1 --warmup-steps 1 --lr 0.01 --optimizer adamw --device cpu""".split()

    def two_steps(*layout):
        """-> losses and gradient norms; of the last step the bytes that this rank sends by axis, and scaling.py's."""
        c = train.parse_config([*flags, *layout])
        world, results = train.join(c), []
        model, mesh = train.Model(c, world, dtype=torch.float64), world.mesh
        optimizer, m = train.make_optimizer(model, c), 4 // mesh.dp
        for step in range(2):
            tokens = torch.randint(64, (4, 1, 9), generator=torch.Generator().manual_seed(step))[mesh.dp_rank * m:]
            batches = iter([{"tokens": x[:, :-1], "targets": x[:, 1:]} for x in tokens])
            with CommLedger(mesh.axes) as ledger:
                results.append(train.train_step(model, optimizer, batches, step, c, world)[:2])
        check_replicas(model.parameters(), world.host)
        shape, layout = scaling.shape_of(c.model), train.layout_of(c, mesh.dp)
        program = scaling.Program(item=8, residual=8, gradient=8)
        predicted = scaling.bytes_sent(scaling.messages(shape, layout, program, mesh.pp_rank), layout)
        for axis in ("dp", "tp"):                                     # a group of all ranks goes by its axis' name
            if getattr(mesh, axis) == mesh.dp * mesh.tp * mesh.pp > 1:
                predicted[axis] += predicted.pop("world")
        sent = {axis: ledger.total("wire", axis=axis) for axis in predicted}
        assert sum(sent.values()) == ledger.total("wire")
        return torch.tensor(results, dtype=torch.float64), sent, predicted

    def run(r, store):
        torch.set_num_threads(1)
        say = print if r == 0 else (lambda *_: None)
        alone, _, _ = two_steps()                                                      # the run that all others must be
        dist.init_process_group("gloo", init_method=store, rank=r, world_size=4)
        mesh = Mesh(1, 2, 2)
        say("ranks of a mesh pp 2 x dp 1 x tp 2, as (pp, dp, tp):  ", *(f"{x}: {mesh.place(x)}" for x in range(4)))
        say("\n4 layers, a batch of 4 windows, float64, two steps; bytes that rank 0 sends in a step\n"
            f"{'':<44}largest error   measured | predicted | error")
        for layout in ("--dp 4", "--dp 2 --tp 2", "--tp 4 --no-sequence-parallel",
                       "--tp 2 --pp 2 --pp-schedule interleaved", "--dp 2 --pp 2 --pp-schedule zb"):
            results, sent, predicted = two_steps(*layout.split())
            error = (results - alone).abs().max().item()
            assert error < 1e-10 and sent == predicted, (layout, error, sent, predicted)
            shown = [f"{axis} {sent[axis]:,.0f} | {predicted[axis]:,.0f} | {sent[axis] - predicted[axis]:g}"
                     for axis in sent]
            say(f"{layout:<44}{error:<16.0e}{'   '.join(shown)}")

        say("\nbubble / ideal time, stored micro-batches; simulated | formula; 4 stages, 8 micro-batches, F = B = W")
        for name, schedule, predicted, v, expected in (
                ("gpipe", gpipe(4, 8), 3 / 8, 1, 8), ("1f1b", one_f_one_b(4, 8), 3 / 8, 1, 4),
                ("interleaved, v = 2", interleaved(4, 8, 2), 3 / 16, 2, 4 * (1 + 3 / 8)),
                ("zero bubble (ZB-H1)", zero_bubble(4, 8), 3 / 8 / 3, 1, 4)):
            timeline = simulate(schedule)
            waste, stored = timeline.bubble / (1 - timeline.bubble), max(timeline.stored) / v
            say(f"{name:<22} {waste:.4f} | {predicted:.4f}   stored {stored:g} | {expected:g}\n{draw(timeline)}\n")
            assert abs(waste - predicted) < 1e-12 and stored == expected
        # Qi et al. 2023, tables 5 and 9: profiled milliseconds of the 1.5 B model, 8 stages, 24 micro-batches
        for name, schedule, published in (("1f1b", one_f_one_b, 0.2431), ("zero bubble", zero_bubble, 0.1585)):
            bubble = simulate(schedule(8, 24), 18.522, 18.086, 9.337, 0.601).bubble
            say(f"{name:<12} with the paper's times: bubble {bubble:.4f} | {published}")
            assert round(bubble, 4) == published
        dist.destroy_process_group()

    start_ranks(run, 4)


if __name__ == "__main__":
    demo()
