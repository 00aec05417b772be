"""ZeRO: what data parallelism copies to every rank, split over the ranks instead.

Data parallelism keeps a whole copy of the model states on every rank. With mixed precision and Adam a parameter takes

    2 (fp16 weight)  +  2 (fp16 gradient)  +  K = 12 (fp32 weight, two fp32 moments)   =  16 bytes

so 7.5 billion parameters need 120 GB on each of 64 GPUs, 64 times the same. Yet a rank that updates one 64th of the
weights needs one 64th of the moments. A gradient is needed until it is summed, a weight while its layer runs. ZeRO
(Rajbhandari 2020, arXiv:1910.02054, Figure 1) keeps a shard of each on a rank, and sends the rest when it is needed.
Psi parameters, n ranks, m micro-batches per step (the paper has m = 1):

    stage  splits               bytes per rank                 7.5 B on 64   a rank sends, x Psi (n-1)/n
    0      nothing              (2 + 2 + K) Psi                  120 GB      2        all-reduce
    1      optimizer states     (2 + 2) Psi + K Psi / n         31.4 GB      2        reduce-scatter, all-gather
    2      and gradients        2 Psi + (2 + K) Psi / n         16.6 GB      m + 1    m reduce-scatters, all-gather
    3      and parameters       (2 + 2 + K) Psi / n              1.9 GB      3 m      m reduce-scatters, 2 m all-gathers

The lesson is when each buffer is freed. Here are two micro-batches of three layers. Time runs to the right. w: weights,
g: gradients. 1, 2, 3: the layer. = is a whole layer in memory, - this rank's shard of it, > a message:

                   forward    backward            forward    backward            step
    stage 1   w    =====================================================================>   gathered at the end
              g               3===================================3==>----------------      whole from the first
                                 2===================================2==>-------------      gradient to the last
                                    1===================================1==>----------      (if m = 1: as stage 2)
    stage 2   w    =====================================================================>   gathered at the end
              g               3==>--------------------------------3==>----------------      whole until it is sent
                                 2==>--------------------------------2==>-------------
                                    1==>--------------------------------1==>----------
    stage 3   w    >1>2>3=    >3>2>1==            >1>2>3=    >3>2>1==                       whole while it runs, and
              g    as at stage 2                                                            the next one ahead of it

A bucket is a flat row: parameters side by side, padded so that n divides it. The r-th of n equal slices is rank r's.
The optimizer sees only the part of a parameter that lies in the rank's slice. For an elementwise optimizer this changes
no number. Muon needs the whole matrix: one rank, its owner, gets all parts, and sends each rank its part of the result.

    symbol   in code                     shape, dtype
    Psi      num_params                  parameters of the model
    n, r     size(group), rank(group)    ranks that share the model states, and which of them this is
    -        Bucket.row                  (n * slice,) the parameters; at stage 3 only while their block runs
    -        Bucket.weights              (slice,) this rank's part of them; at stages 1 and 2 a view of row
    -        Bucket.grads, sending       (n * slice,) gradients that still arrive, and that are being sent; else None
    -        Bucket.total                (slice,) their sum over ranks and micro-batches
    -        shard.box, flat = (lo, hi)  elements lo ... hi - 1, row by row, of the matrix's rectangle `box` (model.py)

Map: formulas - the stages on the board - Bucket - GradientShards (what the stages share) - ShardedOptimizer (1, 2) -
FullyShard (3) - Muon - the global norm - demo. Not here: offloading, sharded activations.

run: python zero.py        (starts its own ranks)
"""

import contextlib
import functools
import itertools
import math
from collections import Counter, defaultdict
from dataclasses import is_dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

# ---- the formulas ----------------------------------------------------------------------------------------------------

def memory_per_rank(num_params: float, stage: int, dp: int, *, param_bytes: float = 2, grad_bytes: float = 2,
                    state_bytes: float = 12) -> dict:
    """Bytes of model states on each of dp ranks: {"parameters", "gradients", "states", "total"}. The defaults are those
    of mixed-precision Adam, K = 12; plain float32 Adam is 4, 4, 8. (Rajbhandari 2020, Figure 1, Table 1)"""
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage must be one of 0, 1, 2, 3, got {stage}")
    parts = {"parameters": param_bytes * num_params / (dp if stage >= 3 else 1),
            "gradients": grad_bytes * num_params / (dp if stage >= 2 else 1),
            "states": state_bytes * num_params / (dp if stage >= 1 else 1)}
    return parts | {"total": sum(parts.values())}


def comm_volume(num_params: float, stage: int, dp: int, micro_batches: int = 1) -> dict:
    """Numbers that a rank sends in a step: {"all_reduce", "reduce_scatter", "all_gather"}. An all-reduce is a
    reduce-scatter and an all-gather. (Rajbhandari 2020, Section 7, is micro_batches = 1)"""
    memory_per_rank(num_params, stage, dp)                                                 # raises if stage is not one
    m, part = micro_batches, num_params * (dp - 1) / dp
    return {"all_reduce": (2, 0, 0, 0)[stage] * part, "reduce_scatter": (0, 1, m, m)[stage] * part,
            "all_gather": (0, 1, 1, 2 * m)[stage] * part}


# ---- the three stages on the board: a parameter at a time, nothing overlaps ------------------------------------------
# A group of None is this process alone, and nothing is sent.

def size(group) -> int:
    return 1 if group is None else group.size()


def rank(group) -> int:
    return 0 if group is None else group.rank()


def row_of(x: Tensor, group) -> Tensor:
    """x as one row, with zeros at its end so that it has n equal slices."""
    return F.pad(x.detach().flatten(), (0, -x.numel() % size(group)))


def reduce_scatter(row: Tensor, group) -> Tensor:
    """This rank's slice of the sum of the ranks' rows."""
    if size(group) == 1:
        return row
    out = row.new_empty(len(row) // size(group))
    dist.reduce_scatter_single(out, row, group=group)
    return out


def all_gather(part: Tensor, group) -> Tensor:
    """The row whose slices are the ranks' parts."""
    if size(group) == 1:
        return part
    row = part.new_empty(len(part) * size(group))
    dist.all_gather_single(row, part, group=group)
    return row


class PlainSharded:
    """Stage 1: a rank updates 1/n of each parameter, and has optimizer states for this part alone. Stage 2: a gradient
    is scattered, and freed, as soon as backward has made it. ShardedOptimizer does the same with fewer messages."""

    def __init__(self, params, optimizer_cls, group, stage: int, **kwargs):
        self.params, self.group = list(params), group
        self.shards = {p: nn.Parameter(row_of(p, group).chunk(size(group))[rank(group)].clone()) for p in self.params}
        self.optimizer = optimizer_cls(self.shards.values(), **kwargs)
        for p in self.params if stage == 2 else ():
            p.register_post_accumulate_grad_hook(self.scatter)             # stage 2: backward calls scatter, not step

    def scatter(self, p):
        part, shard = reduce_scatter(row_of(p.grad, self.group), self.group), self.shards[p]
        shard.grad, p.grad = part if shard.grad is None else shard.grad + part, None

    @torch.no_grad()
    def step(self):
        for p in self.params:
            if p.grad is not None:
                self.scatter(p)                                               # shard.grad = reduce_scatter(grads)
        self.optimizer.step()                                                 # optimizer.step()
        for p, shard in self.shards.items():                                  # weights = all_gather(shard)
            p.copy_(all_gather(shard, self.group)[:p.numel()].view_as(p))
            shard.grad = None


class PlainShardedLinear(torch.autograd.Function):
    """Stage 3: y = x W^T, and a rank has 1/n of W (out, in). W is gathered before forward and backward, and freed
    after each. FullyShard does the same with any block."""

    @staticmethod
    def forward(ctx, x, shard, shape, group):
        ctx.save_for_backward(x, shard)                                       # not W
        ctx.shape, ctx.group = shape, group
        return F.linear(x, all_gather(shard, group)[:shape.numel()].view(shape))

    @staticmethod
    def backward(ctx, dy):
        x, shard = ctx.saved_tensors
        W = all_gather(shard, ctx.group)[:ctx.shape.numel()].view(ctx.shape)
        dW = dy.flatten(0, -2).T @ x.flatten(0, -2)
        return dy @ W, reduce_scatter(row_of(dW, ctx.group), ctx.group), None, None


# ---- parameters side by side -----------------------------------------------------------------------------------------

storage = lambda x: x.untyped_storage()._cdata                   # which memory x lies in: equal for all views of it


class Bucket:
    """Parameters in one flat row of n equal slices; slice r is rank r's. Their gradients go into a second row of the
    same layout. One reduce-scatter sums the second row over the ranks, and its memory is freed."""

    exchange_on = ("cpu",)        # device types where slices are exchanged and then summed, instead of a reduce-scatter

    def __init__(self, params: list[Tensor], group):
        self.params, self.group = params, group
        *starts, numel = itertools.accumulate((p.numel() for p in params), initial=0)
        self.start = dict(zip(params, starts, strict=True))
        self.slice = -(-numel // size(group))                                   # rounded up: the last slices are padded
        self.length = self.slice * size(group)
        self.row = self.weights = None
        self.grads = self.sending = self.received = self.out = self.work = self.total = None

    grad_dtype = property(lambda self: self.params[0].grad_dtype or self.params[0].dtype)      # torch's: p.grad's dtype
    total_dtype = property(lambda self: torch.promote_types(self.weights.dtype, self.grad_dtype))

    def view(self, row: Tensor, p: Tensor) -> Tensor:
        """p's place in a whole row."""
        return row[self.start[p]:self.start[p] + p.numel()].view(p.shape)

    def own(self, row: Tensor) -> Tensor:
        """This rank's slice of a whole row."""
        return row[rank(self.group) * self.slice:][:self.slice]

    def flat(self, p: Tensor) -> tuple[int, int]:
        """(lo, hi): the elements of p that lie in this rank's slice; lo = hi if none do."""
        first = rank(self.group) * self.slice - self.start[p]
        return min(max(first, 0), p.numel()), min(max(first + self.slice, 0), p.numel())

    def part(self, row: Tensor, p: Tensor) -> Tensor:
        """p's elements in this rank's slice."""
        lo, hi = self.flat(p)
        offset = self.start[p] - rank(self.group) * self.slice
        return row[offset + lo:offset + hi]

    def shard(self, p: Tensor) -> nn.Parameter:
        """What this rank updates of p: a view of weights, with p's attributes and flat."""
        new = nn.Parameter(self.part(self.weights, p), requires_grad=p.requires_grad)
        new.__dict__.update({"box": tuple((0, n, n) for n in p.shape)} | p.__dict__)
        new.flat, new.sharded, new.grad_dtype = self.flat(p), True, self.total_dtype
        return new

    # -- gradients

    def take(self, p):
        """Copy p's new gradient into the row. p.grad becomes a view of the row: there autograd adds the next one."""
        if p.grad.is_sparse:
            raise RuntimeError(f"{getattr(p, 'full_name', 'a parameter')} must not have sparse gradients, it has")
        if self.grads is None:
            self.grads = self.row.new_empty(self.length, dtype=self.grad_dtype)
        view = self.view(self.grads, p)
        if p.grad.data_ptr() != view.data_ptr():
            view.copy_(p.grad)
            p.grad = view

    def send(self):
        """Start the reduce-scatter of what has arrived."""
        if self.grads is None:                           # no gradient on this rank: send zeros, as others may have some
            self.grads = self.row.new_empty(self.length, dtype=self.grad_dtype)
        for p in self.params:
            if p.grad is None:
                self.view(self.grads, p).zero_()
            p.grad = None
        self.sending, self.grads = self.grads, None
        if size(self.group) == 1:
            self.out = self.sending
            return
        self.out = self.sending.new_empty(self.slice)
        if self.row.device.type in self.exchange_on:             # gloo's reduce-scatter takes twice the time of this
            self.received = torch.empty_like(self.sending)
            self.work = dist.all_to_all_single(self.received, self.sending, group=self.group, async_op=True)
        else:
            self.work = dist.reduce_scatter_single(self.out, self.sending, group=self.group, async_op=True)

    def receive(self, mean: bool):
        """Wait for the reduce-scatter, and add its result to the total of earlier micro-batches."""
        if self.work is not None:
            self.work.wait()
        self.sending = self.work = None
        if self.received is not None:
            # g[r] = sum over ranks i of g_i[r]
            torch.sum(self.received.view(size(self.group), self.slice), 0, out=self.out)
            self.received = None
        if mean:
            self.out /= size(self.group)
        out, self.out = self.out.to(self.total_dtype), None
        self.total = out if self.total is None else self.total.add_(out)


def make_buckets(params, group, bucket_mb: float) -> list[Bucket]:
    """Buckets in the order in which gradients come: the last parameter's first. Parameters share a bucket only if
    dtypes, device and sum_over (parallel.py) are equal: a weight tied across pipeline stages has its own bucket."""
    filling, buckets = defaultdict(list), []
    for p in reversed(params):
        dtype = p.grad_dtype or p.dtype
        params_of_bucket = filling[key := (p.dtype, dtype, p.device, getattr(p, "sum_over", ()))]
        params_of_bucket.append(p)
        if sum(x.numel() for x in params_of_bucket) * dtype.itemsize >= bucket_mb * 1e6:
            buckets.append(Bucket(filling.pop(key), group))
    return buckets + [Bucket(params_of_bucket, group) for params_of_bucket in filling.values()]


def check(group, reduce: str, params):
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError(f"group must hold this rank, rank {dist.get_rank()} is not in it")
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce must be sum or mean, got {reduce!r}")
    for p in params:
        if getattr(p, "sharded", False):
            raise ValueError(f"{getattr(p, 'full_name', 'a parameter')} must not be sharded already, it is")


class GradientShards:
    """What the stages share: gradients are summed into shards, bucket by bucket, while backward goes on.

        1  a gradient that is ready is copied into its bucket's row
        2  a bucket that is full is sent, but never before those ahead of it: all ranks issue the same calls in the same
           order. One bucket is under way at a time: it is received, and its row freed, before the next one is sent
        3  finish_gradient_synchronization() sends the buckets that are left, and gives each shard its gradient

    Backward may be called several times per step, equally often on every rank. A call outside no_sync() (stage 1) sends
    every bucket once, with what calls within no_sync() left there. A parameter without a gradient counts as zero.
    Freeze what is never used: else its bucket, and those after it, wait for finish_gradient_synchronization(). To skip
    a step, all ranks together call zero_grad().
    """

    def watch(self, buckets: list[Bucket], shards: dict, group, reduce: str):
        """shards: {parameter: its shard here}."""
        self.buckets, self.shards, self.group, self.mean = buckets, shards, group, reduce == "mean"
        self.bucket_of = {p: bucket for bucket in buckets for p in bucket.params}
        self.synchronize = True
        self.arrivals, self.sent = Counter(), 0               # in this step: {p: gradients that came}, buckets sent
        self.flying = None                                    # the bucket that is under way
        for p in self.bucket_of:
            p.register_post_accumulate_grad_hook(self.ready)

    next_bucket = property(lambda self: self.buckets[self.sent % len(self.buckets)])

    def ready(self, p):
        """p.grad is complete."""
        self.bucket_of[p].take(p)
        self.arrivals[p] += self.synchronize                                                    # + 0 inside no_sync()
        # sent // len(buckets): how often next_bucket was sent. It is full if each parameter has had more gradients
        while all(self.arrivals[x] > self.sent // len(self.buckets) for x in self.next_bucket.params):
            self.send()

    def send(self):
        """Send the next bucket."""
        self.receive()
        self.flying, self.sent = self.next_bucket, self.sent + 1
        self.flying.send()

    def send_all(self):
        """Send every bucket, once per backward pass."""
        while self.sent < max([1, *self.arrivals.values()]) * len(self.buckets):
            self.send()
        self.receive()

    def receive(self):
        if self.flying is not None:
            self.flying.receive(self.mean)
            self.flying = None

    def finish_gradient_synchronization(self):
        for p, bucket in self.bucket_of.items():                         # are they still views of the bucket's rows?
            if not {storage(p), storage(self.shards[p])} <= {storage(bucket.row), storage(bucket.weights)}:
                raise RuntimeError(f"{getattr(p, 'full_name', 'a parameter')} must not be moved or cast once it is "
                                   "sharded: to(), half(), ... come before")
        self.send_all()
        for p, bucket in self.bucket_of.items():
            shard, part = self.shards[p], bucket.part(bucket.total, p)
            shard.grad = part if shard.grad is None else shard.grad.add_(part)
        self.forget()

    def forget(self):
        """Drop the gradients of this step that are in no shard yet."""
        self.receive()
        self.arrivals, self.sent = Counter(), 0
        for bucket in self.buckets:
            bucket.grads = bucket.total = None
        for p in self.bucket_of:
            p.grad = None

    def zero_grad(self, set_to_none: bool = True):
        """Clear the gradients, also those under way. All ranks must have made the same number of backward passes."""
        super().zero_grad(set_to_none)
        if self.arrivals:                                         # other ranks may have sent more buckets than this one
            self.send_all()
        self.forget()


# ---- stages 1 and 2 --------------------------------------------------------------------------------------------------

NOT_ELEMENTWISE = tuple(getattr(torch.optim, name) for name in ("Adafactor", "LBFGS", "Muon", "SparseAdam"))


class ShardedOptimizer(GradientShards, torch.optim.Optimizer):
    """Stages 1 and 2: an optimizer whose states are split over the ranks of a group.

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, group=group, stage=2, lr=1e-3)
        loss.backward()                                      stage 1: micro-batches but the last in optimizer.no_sync()
        optimizer.finish_gradient_synchronization()
        norm = clip_grad_norm_(optimizer.shards.values(), 1.0, group)
        optimizer.step(); optimizer.zero_grad()

    params          parameters or parameter groups, as for any optimizer. All take the values of the group's rank 0.
                    Trained ones become views of flat rows. One that is frozen now must stay frozen
    optimizer_cls   a callable (params, **kwargs) -> an elementwise optimizer, or this file's Muon; kwargs are its own
    stage           1: gradients are added up within no_sync(), and sent during the last micro-batch's backward
                    2: every micro-batch's are sent during its backward, and freed. no_sync() does nothing
    reduce          "sum" | "mean" over the group
    bucket_mb       MB (1e6 bytes) of gradients per bucket
    order           the parameters in the order in which forward uses them, if params are in another order

    - param_groups and state are the inner optimizer's: they hold this rank's shards. A shard has its parameter's
      attributes, and flat. So data.py's checkpoints know where it belongs, on any number of ranks.
    - The module's own p.grad is None after finish_gradient_synchronization(): clear and clip the shards' gradients.
      Do not use torch.amp.GradScaler: a rank would not see the inf of another rank's shard.
    - Four of torch's optimizers are known to need whole tensors, and refused. Others are not recognised, nor is one
      that clips by its own norm.
    Raises ValueError for these four, a group without this rank, parameters that are sharded; RuntimeError for step()
    before finish_gradient_synchronization(), sparse gradients, a parameter that was frozen, or not there, before.
    """

    def __init__(self, params, optimizer_cls, *, group=None, stage: int = 1, reduce: str = "sum", bucket_mb: float = 10,
                 order=None, **kwargs):
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {stage}; 3 is FullyShard, 0 is data parallelism")
        if not bucket_mb > 0:
            raise ValueError(f"bucket_mb must be above 0, got {bucket_mb}")
        super().__init__(params, kwargs)
        whole = [p for options in self.param_groups for p in options["params"]]
        if (cls := getattr(optimizer_cls, "func", optimizer_cls)) in NOT_ELEMENTWISE:
            raise ValueError(f"optimizer_cls must update each element by itself to be sharded, {cls.__name__} does not")
        order = whole if order is None else list(order)
        if len(order) != len(whole) or set(order) != set(whole):
            raise ValueError(f"order must hold each of the {len(whole)} parameters once, got another {len(order)}")
        check(group, reduce, order)
        for p in order if size(group) > 1 else ():
            dist.broadcast(p.detach(), group_src=0, group=group)
        buckets, shards, self.stage = make_buckets([p for p in order if p.requires_grad], group, bucket_mb), {}, stage
        for bucket in buckets:
            bucket.row = bucket.params[0].new_zeros(bucket.length, requires_grad=False)
            bucket.weights = bucket.own(bucket.row)
            for p in bucket.params:
                p.data = bucket.view(bucket.row, p).copy_(p.data)
                p.sharded, shards[p] = True, bucket.shard(p)
        self.watch(buckets, shards, group, reduce)
        self.inner = optimizer_cls([options | {"params": [shards.get(p, p) for p in options["params"]]}
                                    for options in self.param_groups], **kwargs)
        self.show_inner()

    def show_inner(self):
        self.defaults, self.param_groups, self.state = self.inner.defaults, self.inner.param_groups, self.inner.state

    @contextlib.contextmanager
    def no_sync(self):
        """Stage 1: gradients are added up here, not sent."""
        before, self.synchronize = self.synchronize, self.stage > 1
        try:
            yield
        finally:
            self.synchronize = before

    def step(self):
        """Each rank updates its shard, then all gather the parameters."""
        if self.arrivals:
            raise RuntimeError("gradients must be summed before the update: call finish_gradient_synchronization() "
                               "between backward and step()")
        for p in (p for options in self.param_groups for p in options["params"]):
            if p.requires_grad and not getattr(p, "sharded", False):
                raise RuntimeError(f"{getattr(p, 'full_name', 'a parameter')} must be given at construction, and not "
                                   "frozen then, to be updated")
        self.inner.step()
        for bucket in self.buckets if size(self.group) > 1 else ():
            dist.all_gather_single(bucket.row, bucket.weights, group=self.group)

    def state_dict(self) -> dict:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict):
        self.inner.load_state_dict(state_dict)
        self.show_inner()


# ---- stage 3 ---------------------------------------------------------------------------------------------------------

class Unit(Bucket):
    """The parameters of a block: whole while its forward or backward runs, else a shard of each. A whole parameter is a
    view of row. Autograd saves such views for backward: row's memory is freed under them, and filled again in time.

    A visit is one forward of a block, and later its backward. holders: the visits that need the row now. There can be
    several: a block may be called twice, and two blocks may share a parameter."""

    def __init__(self, params, places, group, compute_dtype, reduce_dtype, init):
        super().__init__(params, group)
        self.places, self.holders, self.arriving = places, set(), None
        for p in params:
            if p.is_meta:
                attributes = p.__dict__
                torch.utils.swap_tensors(p, nn.Parameter(init(p), p.requires_grad))          # p stays the same object
                p.__dict__.update(attributes)
            elif size(group) > 1:
                dist.broadcast(p.detach(), group_src=0, group=group)
            if self.weights is None:
                self.weights = p.new_zeros(self.slice, requires_grad=False)
                self.row = p.new_empty(self.length, dtype=compute_dtype, requires_grad=False)
            self.part(self.weights, p).copy_(p.detach().flatten()[slice(*self.flat(p))])
            # set by .data, p keeps its own version counter: autograd does not take a refilled row for a change in place
            p.data, p.grad_dtype = self.view(self.row, p), reduce_dtype or self.weights.dtype
        self.shards = {p: self.shard(p) for p in params}
        self.free()

    whole = property(lambda self: self.row.untyped_storage().nbytes() > 0 or self.length == 0)

    def show(self, tensors):
        """Put tensors (the whole parameters, or their shards) where the modules look for their parameters."""
        for x, places in zip(tensors, self.places, strict=True):
            for module, name in places:
                module._parameters[name] = x

    def gather(self):
        """Start to gather the row."""
        if not self.whole:
            self.row.untyped_storage().resize_(self.length * self.row.itemsize)
            self.own(self.row).copy_(self.weights)                                            # in the compute dtype
            if size(self.group) > 1:
                self.arriving = dist.all_gather_single(self.row, self.own(self.row), group=self.group, async_op=True)

    def arrive(self):
        if self.arriving is not None:
            self.arriving.wait()
            self.arriving = None

    def hold(self, visit):
        self.gather()
        self.arrive()
        self.holders.add(visit)
        self.show(self.params)

    def free(self, visit=None):
        """visit needs the row no longer. When no visit does, the memory is freed."""
        self.holders.discard(visit)
        if self.whole and not self.holders:
            self.arrive()
            self.row.untyped_storage().resize_(0)
            self.show(self.shards.values())


class Leave(torch.autograd.Function):
    """The identity on a block's inputs. Its backward comes when the block's is over."""

    @staticmethod
    def forward(ctx, done, *inputs):
        ctx.done = done
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.done()
        return None, *gradients


class FullyShard(GradientShards, nn.Module):
    """Stage 3: parameters, gradients and optimizer states are split over the ranks of a group.

        model = FullyShard(module, group, blocks=module.layers)
        optimizer = torch.optim.AdamW(model.parameters())                 of the shards
        model(x).sum().backward()                                         any number of micro-batches
        model.finish_gradient_synchronization()
        norm = clip_grad_norm_(model.parameters(), 1.0, group)
        optimizer.step(); optimizer.zero_grad()

        moment            waits for           begins to gather     frees                  sends
        before_forward    this block          the next block
        after_forward                                              this block
        before_backward   this block, again   the block before
        after_backward                                             this block             its gradients, by ready()

    blocks          modules to gather as one (default: the members of each ModuleList and ModuleDict). A parameter
                    belongs to the innermost block around it. If there is none, its module is a block by itself: an
                    embedding, a head. A parameter that two blocks share is gathered for each of them
    compute_dtype   of the gathered parameters, and of the float inputs of forward() (default: the parameters' own)
    reduce_dtype    of gradients on the wire (default: the parameters' own). They are added up in shards
    reduce          "sum" | "mean" over the group
    init            called for each parameter on the meta device, gives its values, the same on every rank: no rank ever
                    holds the whole model. Real parameters, and buffers, become those of the group's rank 0

    - At rest modules hold the shards (1-d, with the parameters' attributes and flat). An optimizer of parameters()
      updates these: there is nothing to gather until the next forward.
    - With recomputation inside a block there is one gather in forward and one in backward.
    What it asks of a module:
    - Parameters are used in the forward of their block. requires_grad stays what it was.
    - All ranks run the same blocks in the same order. If the modules are defined in another order, results are the
      same, but one block more may be in memory.
    - A tensor that needs a gradient leaves a block only in its return value (in tuples, lists, dicts, dataclasses), and
      no code outside the block changes it in place. No second derivatives.
    Raises ValueError for a block that is not in the module, a group without this rank, sharded parameters, meta ones
    without init; RuntimeError for a requires_grad that has changed; TypeError for a deepcopy.
    """

    def __init__(self, module: nn.Module, group=None, *, blocks=None, compute_dtype=None, reduce_dtype=None,
                 reduce: str = "sum", init=None):
        super().__init__()
        check(group, reduce, module.parameters())
        if blocks is None:
            lists = [x for x in module.modules() if isinstance(x, nn.ModuleList | nn.ModuleDict)]
            blocks = [block for x in lists for block in x.children()]
        blocks = set(blocks)
        for strange in blocks - set(module.modules()):
            raise ValueError(f"blocks must be in the module, {type(strange).__name__} is not")
        if init is None and any(p.is_meta for p in module.parameters()):
            raise ValueError("init must give the values of parameters on the meta device, got None")
        for name, p in module.named_parameters():
            p.__dict__.setdefault("full_name", name)
        places, owners = defaultdict(dict), defaultdict(dict)      # p -> where modules have it; the blocks that use it
        block_at = {}                                              # path -> the innermost block around it
        for path, submodule in module.named_modules(remove_duplicate=False):
            block = block_at[path] = submodule if submodule in blocks else block_at.get(path.rpartition(".")[0])
            for name, p in submodule._parameters.items():
                if p is not None:
                    places[p][submodule, name] = owners[p][submodule if block is None else block] = True
        alike = defaultdict(list)                                  # what makes a unit -> its parameters
        for p, modules in owners.items():
            alike[tuple(modules), p.dtype, p.device, p.requires_grad, getattr(p, "sum_over", ())].append(p)
        for name, x in module.named_buffers():
            if x.is_meta:
                raise ValueError(f"{name} must not be on the meta device, init gives parameters alone")
            try:
                if size(group) > 1:
                    dist.broadcast(x, group_src=0, group=group)
            except RuntimeError as error:
                raise RuntimeError(f"{name}, {x.dtype}, could not be broadcast: {error}") from error
        self.module, self.compute_dtype, self.units = module, compute_dtype, []
        units_of = defaultdict(list)                               # block -> its units
        for (modules, *_), params in alike.items():
            unit = Unit(params, [list(places[p]) for p in params], group, compute_dtype, reduce_dtype, init)
            self.units.append(unit)
            for block in modules:
                units_of[block].append(unit)
        used = [block for block in module.modules() if block in units_of]
        self.needs = [units_of[block] for block in used]           # the units of each block, in the order of definition
        for place, block in enumerate(used):
            block._call_impl = functools.partial(self.run_block, place, block, block._call_impl)  # what block(x) calls
        self.watch([unit for unit in reversed(self.units) if unit.params[0].requires_grad],
                   {p: shard for unit in self.units for p, shard in unit.shards.items()}, group, reduce)

    def forward(self, *args, **kwargs):
        if self.compute_dtype is not None:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(self.compute_dtype) if x.is_floating_point() else x,
                                         (args, kwargs))
        self.free_unused()
        try:
            return self.module(*args, **kwargs)
        finally:
            self.free_unused()

    def __deepcopy__(self, memo):
        raise TypeError("FullyShard cannot be copied, dict(model.full_parameters()) has its parameters")

    def free_unused(self):
        """What was gathered ahead, and not used after all."""
        for unit in self.units:
            unit.free()

    def prefetch(self, place: int):
        for unit in self.needs[place] if 0 <= place < len(self.needs) else ():
            unit.gather()

    def run_block(self, place, block, forward, /, *args, **kwargs):
        """What a call of a block becomes: forward(), with the hooks that others put on it, between the four moments."""
        units, visit = self.needs[place], object()
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        has_leave = bool(inputs)                               # so that before_backward does not keep inputs alive

        def hold(next_place):
            again = any(unit.holders for unit in units)                    # held already: by recomputation, for example
            for unit in units:
                unit.hold(visit)
            if not again:
                self.prefetch(next_place)

        def release():
            for unit in units:
                unit.free(visit)

        def before_backward(_):                                # a gradient has come to an output
            hold(place - 1)
            if not has_leave:                                  # no input has a gradient (embedding): freed at the end
                torch.autograd.Variable._execution_engine.queue_callback(release)

        hold(place + 1)                                        # before_forward
        try:
            if inputs and torch.is_grad_enabled():
                leaves = iter(Leave.apply(release, *inputs))   # after_backward: gradients have left the inputs
                args, kwargs = tree_map_only(Tensor, lambda x: next(leaves) if x.requires_grad else x, (args, kwargs))
            out = forward(*args, **kwargs)
        finally:
            release()                                          # after_forward
        for x in tree_leaves(vars(out) if is_dataclass(out) else out):
            if isinstance(x, Tensor) and any(storage(x) == storage(unit.row) for unit in units):
                raise RuntimeError(f"{type(block).__name__} must not return its parameter, which is freed now: name "
                                   "the module that uses it in blocks")
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(before_backward)
        return out

    def finish_gradient_synchronization(self):
        super().finish_gradient_synchronization()
        for p, shard in self.shards.items():
            if p.requires_grad != shard.requires_grad:
                raise RuntimeError(f"{p.full_name}: requires_grad must stay {p.requires_grad}, as at construction")

    def forget(self):
        super().forget()
        for unit in self.units:
            unit.holders.clear()
            unit.free()

    @torch.no_grad()
    def full_parameters(self):
        """(full_name, whole parameter) of each, in the shards' dtype, one after the other: every rank must ask. No more
        than a block is gathered at a time; dict(model.full_parameters()) has all."""
        for unit in self.units:
            row = all_gather(unit.weights, unit.group)
            for p in unit.params:
                yield p.full_name, unit.view(row, p).clone()


# ---- an optimizer that needs whole matrices: Muon --------------------------------------------------------------------

def muon_step(p: Tensor, g: Tensor, M: Tensor, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
    """Muon as on the board: one step of one whole matrix p (rows, columns) with gradient g. M: its momentum, from 0 on.
    (Jordan 2024; weight decay as in Liu 2025, arXiv:2502.16982, eq. 3)"""
    M.mul_(momentum).add_(g)                                                  # M = mu M + g
    U = g + momentum * M                                                      # U = g + mu M             (Nesterov)
    O = orthogonalize(U)                                                      # W S V^T -> about W V^T
    p.sub_(lr * (scale_of(*p.shape) * O + weight_decay * p))                  # p -= lr (scale O + wd p)


POLYNOMIAL = 3.4445, -4.7750, 2.0315                                          # a, b, c  (Jordan 2024)


def orthogonalize(U: Tensor, steps: int = 5) -> Tensor:
    """U = W S V^T (rows, columns) with its singular values S moved near 1: about W V^T, the nearest matrix with
    orthogonal rows or columns. All directions of a gradient count alike, also one that is rarely seen.

    phi(s) = a s + b s^3 + c s^5 acts on every singular value at once, by products alone: phi(W S V^T) = W phi(S) V^T =
    (a + b U U^T + c (U U^T)^2) U. It is steep at 0, and does not settle at 1: values above a 500th of U's norm end
    between 0.68 and 1.21. In U's dtype, float32 at least. (Newton-Schulz; https://kellerjordan.github.io/posts/muon/)
    """
    a, b, c = POLYNOMIAL
    X = U.to(torch.promote_types(U.dtype, torch.float32))
    X = X.mT if U.shape[0] > U.shape[1] else X                                # (m, n), m <= n
    X = X / X.norm().clamp(min=1e-7)                                          # no singular value is above 1
    for _ in range(steps):
        A = X @ X.mT                                                          # (m, m)
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)  # X = a X + (b A + c A^2) X
    return X.mT if U.shape[0] > U.shape[1] else X


def orthogonalize_flops(rows: int, columns: int, steps: int = 5) -> int:
    """2 m^2 n for A, 2 m^3 for A^2, 2 m^2 n for the product with X, in each step."""
    m, n = sorted((rows, columns))
    return steps * (4 * m * m * n + 2 * m**3)


def scale_of(rows: int, columns: int) -> float:
    """Jordan's: an update then changes a linear layer's output by about lr, for any shape (RMS; an input of RMS 1).
    (Liu 2025 takes 0.2 sqrt(max(rows, columns)): the update is then as large as AdamW's.)"""
    return max(1, rows / columns) ** 0.5


class Piece(NamedTuple):
    """Elements lo ... hi - 1, row by row, of a box of a matrix. Equal pieces are replicas."""

    name: str
    box: tuple                                                                # ((start, stop, size of the whole), ...)
    lo: int
    hi: int

    whole = property(lambda self: [size for _, _, size in self.box])          # (rows, columns) of the matrix

    def view(self, matrix: Tensor) -> Tensor:
        """The box in the whole matrix."""
        (top, bottom, _), (left, right, _) = self.box
        return matrix[top:bottom, left:right]


def piece_of(p: Tensor, number: int) -> Piece:
    """What p's attributes say. A tensor without them is a whole matrix, and its name is `number`."""
    name, box = getattr(p, "full_name", str(number)), getattr(p, "box", tuple((0, n, n) for n in p.shape))
    if len(box) != 2:
        raise ValueError(f"{name} must be a matrix for Muon, it has {len(box)} dimensions")
    return Piece(name, box, *getattr(p, "flat", (0, p.numel())))


def assemble(parts: dict[Piece, Tensor]) -> Tensor:
    """All pieces of a matrix -> the matrix."""
    first, x = next(iter(parts.items()))
    matrix = x.new_empty(first.whole)
    for _, group in itertools.groupby(sorted(parts), key=lambda piece: piece.box):
        pieces = list(group)                                                  # of one box, from its first element on
        box = pieces[0].view(matrix)
        box.copy_(torch.cat([parts[piece] for piece in pieces]).view(box.shape))
    return matrix


def cut(matrix: Tensor, piece: Piece) -> Tensor:
    return piece.view(matrix).flatten()[piece.lo:piece.hi]


def plan_exchange(everyone: list[list[Piece]]) -> tuple[dict, list, list]:
    """everyone[r]: what rank r holds. Every rank makes the same plan: {matrix: its owner}, and two lists of (piece,
    source rank, target rank): each piece to its matrix's owner once, and from the owner to all that hold it.

    The most expensive matrix is given away first, to the one of its holders with the fewest FLOPs so far. Raises
    ValueError for pieces that do not make the matrix."""
    holders = defaultdict(lambda: defaultdict(list))                          # name -> piece -> ranks
    for r, pieces in enumerate(everyone):
        for piece in pieces:
            if piece.lo < piece.hi:
                holders[piece.name][piece].append(r)
    flops = {name: orthogonalize_flops(*next(iter(pieces)).whole) for name, pieces in holders.items()}
    owners, load, to_owner, to_holders = {}, [0] * len(everyone), [], []
    for name in sorted(holders, key=lambda name: (-flops[name], name)):
        pieces = holders[name]
        elements, needed = sum(piece.hi - piece.lo for piece in pieces), math.prod(next(iter(pieces)).whole)
        if elements != needed:
            raise ValueError(f"{name}: the pieces of the group's ranks must make its {needed} elements, they make "
                             f"{elements}")
        owner = owners[name] = min(sorted(set().union(*pieces.values())), key=load.__getitem__)
        load[owner] += flops[name]
        for piece, ranks in sorted(pieces.items()):
            to_owner.append((piece, owner if owner in ranks else ranks[0], owner))
            to_holders += [(piece, owner, r) for r in ranks]
    return owners, to_owner, to_holders


def exchange(routes: list, pieces: dict[Piece, Tensor], like: Tensor, group) -> dict[Piece, Tensor]:
    """routes: (piece, source rank, target rank), the same list on all ranks. pieces: what this rank has, of the dtype
    and device of `like`. -> what comes to this rank, each a row. One message from a rank to another, if any."""
    me, arrived, outgoing, incoming = rank(group), {}, defaultdict(list), defaultdict(list)
    for piece, source, target in routes:
        if source == target == me:
            arrived[piece] = pieces[piece].flatten()
        elif source == me:
            outgoing[target].append(pieces[piece].flatten())
        elif target == me:
            incoming[source].append(piece)
    rows = {source: like.new_empty(sum(x.hi - x.lo for x in expected)) for source, expected in incoming.items()}
    calls = [dist.P2POp(dist.isend, torch.cat(parts), group=group, group_peer=r) for r, parts in outgoing.items()]
    calls += [dist.P2POp(dist.irecv, row, group=group, group_peer=r) for r, row in rows.items()]
    for work in dist.batch_isend_irecv(calls) if calls else ():
        work.wait()
    for source, expected in incoming.items():
        arrived |= zip(expected, rows[source].split([x.hi - x.lo for x in expected]), strict=True)
    return arrived


class Muon(torch.optim.Optimizer):
    """Muon for matrices, another optimizer for the rest, wherever the pieces of a matrix lie.

        groups = [{"params": matrices, "muon": True}, {"params": others}]
        optimizer = Muon(groups, functools.partial(torch.optim.AdamW, lr=3e-3), group=group, lr=0.02)

    Ranks hold parts of a matrix, or copies of it; one of them is its owner. A step:
        1  each, on its piece:     M = mu M + g, U = g + mu M
        2  each                    sends its piece of U to the owner
        3  the owner alone         orthogonalizes U
        4  the owner               sends each its piece of O
        5  each, on its piece:     p -= lr (scale O + wd p)

    params   parameter groups. Those with "muon": True hold matrices, or pieces of them, as the attributes full_name,
             box and flat say (one without them is a whole matrix). The others go to `rest`: groups -> optimizer
    group    all ranks that may hold a part of these matrices, or a copy. None: this process alone
    lr, momentum, weight_decay   of the groups with "muon", unless a group has its own

    Elements sent for an m x n matrix: 2 m n (R - 1)/R if R ranks share it, m n (R - 1) if R ranks have a copy each.
    Copies need no message if each rank orthogonalizes its own: 20 m FLOPs or more per element (m <= n). An owner is
    cheaper where 20 m / (FLOP/s) > 4 bytes / (bytes/s): on H100s (67 TFLOP/s float32, 50 GB/s network) above m = 270.
    state[p] has one moment, "momentum"; AdamW has two. A matrix whose gradient is None, on all ranks, stays as it is.
    Raises ValueError for what is not a matrix, and for pieces that do not make one: a group that is too small.
    """

    def __init__(self, params, rest, *, group=None, lr: float = 0.02, momentum: float = 0.95,
                 weight_decay: float = 0.1):
        groups = list(params)
        self.group, self.rest = group, rest([x for x in groups if not x.get("muon")] or [{"params": []}])
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        matrices = [p for x in self.param_groups if x.get("muon") for p in x["params"]]
        self.pieces = {p: piece_of(p, number) for number, p in enumerate(matrices)}
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in matrices), torch.float32)
        self.like = torch.empty(0, dtype=dtype, device=matrices[0].device if matrices else None)
        everyone = [list(self.pieces.values())] * size(group)
        if size(group) > 1:
            dist.all_gather_object(everyone, everyone[0], group=group)
        owners, *routes = plan_exchange(everyone)
        # several ranks exchange all matrices at once; one alone takes a matrix at a time, and holds no more than its U
        rounds = [set(owners)] if size(group) > 1 else [{name} for name in owners]
        self.rounds = [[[x for x in r if x[0].name in names] for r in routes] for names in rounds]

    @torch.no_grad()
    def step(self):
        self.rest.param_groups = [x for x in self.param_groups if not x.get("muon")]
        self.rest.state = self.state
        self.rest.step()
        options = {self.pieces[p]: (p, x) for x in self.param_groups if x.get("muon") for p in x["params"]}
        without = {piece.name for piece, (p, _) in options.items() if p.grad is None}
        for routes in self.rounds:
            to_owner, to_holders = ([x for x in r if x[0].name not in without] for r in routes)
            # 1  each
            updates = {piece: self.momentum(*options[piece]) for piece, _, r in to_holders if r == rank(self.group)}
            # 2  to the owners
            parts = defaultdict(dict)
            for piece, x in exchange(to_owner, updates, self.like, self.group).items():
                parts[piece.name][piece] = x
            # 3  the owner
            O = {name: orthogonalize(assemble(pieces)) for name, pieces in parts.items()}
            # 4  from the owners
            cuts = {piece: cut(O[piece.name], piece) for piece, _, _ in to_holders if piece.name in O}
            for piece, x in exchange(to_holders, cuts, self.like, self.group).items():
                # 5  p -= lr (scale O + wd p)
                p, of_p = options[piece]
                p.mul_(1 - of_p["lr"] * of_p["weight_decay"])
                p.sub_(x.view(p.shape), alpha=of_p["lr"] * scale_of(*piece.whole))

    def momentum(self, p: Tensor, options: dict) -> Tensor:
        """U of this rank's piece."""
        M = self.state[p].setdefault("momentum", torch.zeros_like(p))
        M.mul_(options["momentum"]).add_(p.grad)                              # M = mu M + g
        return torch.add(p.grad, M, alpha=options["momentum"]).to(self.like)  # U = g + mu M


# ---- the global norm -------------------------------------------------------------------------------------------------

def clip_grad_norm_(shards, max_norm: float, group=None) -> float:
    """Scale gradients so that the norm of all ranks' shards together is at most max_norm -> the norm before. If one
    rank has an infinite or NaN gradient, every rank's norm is infinite or NaN, and nothing is scaled (found-inf)."""
    shards = list(shards)
    grads = [p.grad for p in shards if p.grad is not None]
    device = torch.accelerator.current_accelerator() if group is not None and "nccl" in group.name() else "cpu"
    square = torch.zeros((), dtype=torch.float64, device=shards[0].device if shards else device)
    for g in grads:                                                                      # no copy of a shard in float64
        square += torch.linalg.vector_norm(g, dtype=torch.float64).square()
    if size(group) > 1:
        dist.all_reduce(square, group=group)
    norm = square.sqrt().item()
    if max_norm < norm < float("inf"):
        torch._foreach_mul_(grads, max_norm / norm)
    return norm


# ---- demo ------------------------------------------------------------------------------------------------------------

def demo():
    """The claims of this file, measured | formula, asserted: four ranks on this CPU, in seconds."""
    import parallel

    def train(stage, group, muon=False):
        """Two steps of two micro-batches -> weights, most bytes kept, bytes sent in the last step, those of Muon."""
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(10))).double()     # 10 x 1,024 parameters
        sync = parallel.DataParallel(model, group) if stage == 0 else FullyShard(model, group) if stage == 3 else None
        rule, params = functools.partial(torch.optim.AdamW, lr=0.01), list((sync or model).parameters())
        if muon:
            params = [{"params": params[1:-1], "muon": True}, {"params": [params[0], params[-1]]}]
            rule = functools.partial(Muon, rest=rule, group=group)
        if sync is None:
            sync = optimizer = ShardedOptimizer(params, rule, group=group, stage=stage, bucket_mb=8 * 1024 / 1e6)
        else:
            optimizer = rule(params)
        most = {"parameters": 0, "gradients": 0, "states": 0}

        def weigh():
            """What is kept between two micro-batches, and after the last. (At its peak a rank also has buffers.)"""
            updated = [p for options in optimizer.param_groups for p in options["params"]]
            kinds = {"parameters": model.parameters(),
                     "gradients": [p.grad for p in (*updated, *model.parameters())]
                     + [getattr(bucket, "total", None) for bucket in sync.buckets],
                     "states": [x for state in optimizer.state.values() for x in state.values() if x.ndim]}
            for kind, tensors in kinds.items():
                sizes = {storage(x): x.untyped_storage().nbytes() for x in tensors if x is not None}
                most[kind] = max(most[kind], sum(sizes.values()))

        for step in range(2):
            with parallel.CommLedger({"dp": group}) as wire:
                for i in range(rank(group), 8, size(group)):
                    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(8 * step + i))
                    with sync.no_sync() if stage < 2 and i + size(group) < 8 else contextlib.nullcontext():
                        model(x).square().sum().backward()
                    weigh()
                sync.finish_gradient_synchronization()
                weigh()
                optimizer.step()
            optimizer.zero_grad()
        weights = dict(sync.full_parameters() if stage == 3 else model.named_parameters())
        return weights, most, wire.total("wire"), wire.total("wire", collective="send")

    def run(r, store):
        torch.set_num_threads(1)
        say = print if r == 0 else (lambda *_: None)
        alone = [train(0, None, muon)[0] for muon in (False, True)]                 # the runs that all others must be
        dist.init_process_group("gloo", init_method=store, rank=r, world_size=4)
        psi, n, m = 10 * 1024, 4, 2
        say(f"{psi:,} parameters, 4 ranks, {m} micro-batches, float64 (8 + 8 + 16 bytes per parameter)\n"
            "bytes of a rank: measured | formula\nstage  " + "".join(f"{x:<20}" for x in (
                "parameters", "gradients", "states", "sent", "sent by Muon")) + "off one process by")
        for stage in range(4):
            adamw, most, sent, _ = train(stage, dist.group.WORLD)
            muon, *_, sent_by_muon = train(stage, dist.group.WORLD, muon=True)
            formula = memory_per_rank(psi, stage, n, param_bytes=8, grad_bytes=8, state_bytes=16)
            # Muon's eight matrices: at stage 0 the owner sends n - 1 copies; else n - 1 parts come to it, and go back
            copies = n - 1 if stage == 0 else 2 * (n - 1) / n
            row = [(most[kind], formula[kind]) for kind in most]
            row += [(sent, 8 * sum(comm_volume(psi, stage, n, m).values())), (sent_by_muon, 8 * 8 * 1024 / n * copies)]
            error = max((ours[name] - p).abs().max().item()
                        for ours, expected in zip((adamw, muon), alone, strict=True) for name, p in expected.items())
            say(f"{stage:<7}" + "".join(f"{f'{a:,.0f} | {b:,.0f}':<20}" for a, b in row) + f"{error:.0e}")
            assert error < 1e-12 and all(a == b for a, b in row), (stage, row, error)
        dist.destroy_process_group()

    parallel.start_ranks(run, 4)


if __name__ == "__main__":
    demo()
