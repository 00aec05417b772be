import contextlib
import copy
import functools
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ledgers import Largest, MemoryLedger, holdings
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import model as net
import parallel
import precision
import zero
from zero import FullyShard, ShardedOptimizer

# ---- a module that has everything ------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, width), nn.Linear(width, 5)
        self.gain, self.some = nn.Parameter(torch.ones(1)), nn.Linear(5, 5)

    def forward(self, x, some):
        x = x + self.gain * self.down(torch.tanh(self.up(self.norm(x))))
        return x + self.some(x) if some else x


class Odd(nn.Module):
    """Tied, frozen, unused and seldom used parameters, of sizes that nothing divides, of one element, of no dimension;
    a block used twice; a buffer."""

    def __init__(self, seed, dtype=torch.float64):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.blocks = nn.ModuleList(Block(width) for width in (11, 6, 9))
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.zeros(5))
        self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        self.frozen.requires_grad_(False)

    def forward(self, tokens, targets, some=False):
        x = self.embed(tokens) + self.shift.to(self.embed.weight.dtype)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, some)
        x = x + self.frozen(x)
        return F.cross_entropy(self.head(x * self.scale).flatten(0, 1), targets.flatten(), reduction="sum")


def batch(step, i, seldom=(5,)):
    """The i-th of a step's eight micro-batches; `some` is used in one of them, in step 2 in none."""
    generator = torch.Generator().manual_seed(100 * step + i)
    tokens, targets = torch.randint(7, (2, 3, 4), generator=generator)
    return tokens, targets, i in seldom and step != 2


ADAMW = dict(lr=0.03, weight_decay=0.1, eps=1e-6)


@functools.cache
def one_process(seldom, steps=4, clip=2.0):
    """torch's AdamW on a plain module -> losses, norms, weights. Without a gradient counts as zero."""
    module, history = Odd(0), []
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    for step in range(steps):
        losses = [module(*batch(step, i, seldom)) for i in range(8)]
        sum(losses).backward()
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
        for p in trained:
            p.grad *= min(1.0, clip / norm.item())
        optimizer.step()
        optimizer.zero_grad()
        history.append((sum(losses).item(), norm.item()))
    assert sum(norm > clip for _, norm in history) >= 3 and history[-1][0] < history[0][0]
    return history, {name: p.detach() for name, p in module.named_parameters()}


def sharded(module, stage, group, **options):
    """-> model to call, its optimizer, what synchronizes, the weights as they are in one process."""
    if stage == 3:
        model = FullyShard(module, group, **options)
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        return model, optimizer, model, lambda: dict(model.full_parameters())
    optimizer = ShardedOptimizer(module.parameters(), torch.optim.AdamW, group=group, stage=stage, bucket_mb=9e-5,
                                 **ADAMW)
    return module, optimizer, optimizer, lambda: {name: p.detach() for name, p in module.named_parameters()}


LAST = {1: (5,), 2: (5,), 3: (4, 5, 6, 7)}                        # stage 3: a pass uses it on all ranks or none


def train(rank, n, stage, steps=4, clip=2.0, alone=False, exchange=True):
    """exchange False: gradients go as they do on a GPU."""
    zero.Bucket.exchange_on = ("cpu",) if exchange else ()
    group = None if alone else dist.group.WORLD
    rank, n = (0, 1) if alone else (rank, n)
    model, optimizer, sync, weights = sharded(Odd(seed=rank), stage, group)
    history = []
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(rank, 8, n):
            last = i + n >= 8
            with sync.no_sync() if stage == 1 and not last else torch.enable_grad():
                loss = model(*batch(step, i, LAST[stage]))
                loss.backward()
            total += loss.detach()
        sync.finish_gradient_synchronization()
        norm = zero.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip, group)
        optimizer.step()
        optimizer.zero_grad()
        if group is not None:
            dist.all_reduce(total)
        history.append((total.item(), norm))
    zero.Bucket.exchange_on = ("cpu",)
    return history, {name: p.clone() for name, p in weights().items()}


@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("n, exchange", (
    (1, True), (2, True), (4, False), pytest.param(2, False, marks=pytest.mark.slow),
    pytest.param(4, True, marks=pytest.mark.slow)))
def test_every_stage_is_plain_adamw(run_ranks, n, exchange, stage):
    expected, weights = one_process(LAST[stage])
    answers = [train(0, 1, stage, alone=True)] if n == 1 else run_ranks(train, n, stage, 4, 2.0, False, exchange)
    for history, ours in answers:
        assert [x for pair in history for x in pair] == pytest.approx([x for pair in expected for x in pair], abs=1e-10)
        assert ours.keys() == weights.keys()
        for name, p in weights.items():
            torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-10, msg=name)


def in_a_group_of_one(rank, n, stage):
    """-> training in a group that holds this rank alone, and the calls that it made."""
    with parallel.CommLedger({"dp": dist.group.WORLD}) as ledger:
        return train(rank, n, stage), ledger.calls


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_group_of_one_is_no_group(run_ranks, stage):
    """The same bits, and nothing is sent but the sum of each step's losses, by the test itself."""
    ((history, ours), calls), = run_ranks(in_a_group_of_one, 1, stage)
    expected, weights = train(0, 1, stage, alone=True)
    assert history == expected and all(torch.equal(p, weights[name]) for name, p in ours.items())
    assert [x.collective for x in calls] == ["all_reduce"] * len(history) and {x.shape for x in calls} == {()}


def beside_data_parallel(rank, n, stage, micro_batches):
    """-> whether three steps leave the same bits as our DataParallel does."""
    group, modules = dist.group.WORLD, [Odd(seed=rank, dtype=torch.float32) for _ in range(2)]
    plain = parallel.DataParallel(modules[0], group, bucket_mb=0.0003)
    optimizers = [torch.optim.AdamW(modules[0].parameters(), foreach=False, **ADAMW),
                  ShardedOptimizer(modules[1].parameters(), torch.optim.AdamW, group=group, stage=stage,
                                   bucket_mb=0.0003, foreach=False, **ADAMW)]
    for step in range(3):
        for sync, module, optimizer in zip((plain, optimizers[1]), modules, optimizers, strict=True):
            for i in range(rank, micro_batches, n):
                last = i + n >= micro_batches
                with sync.no_sync() if not last and (stage == 1 or sync is plain) else torch.enable_grad():
                    module(*batch(step, i)).backward()
            sync.finish_gradient_synchronization()
            optimizer.step()
            optimizer.zero_grad()
    return [(name, torch.equal(p, q)) for (name, p), q in zip(modules[0].named_parameters(), modules[1].parameters(),
                                                              strict=True)]


def test_stages_1_and_2_are_data_parallel_bit_for_bit(run_ranks):
    """Two ranks: a + b in either order. Stage 2 adds micro-batches after ranks, not before: with several, equal but for
    rounding."""
    for stage, micro_batches in ((1, 8), (2, 2)):
        for same in run_ranks(beside_data_parallel, 2, stage, micro_batches):
            assert all(x for _, x in same), same


# ---- as on the board -------------------------------------------------------------------------------------------------

def plain_stages(rank, n):
    """Three steps of two micro-batches: the plain stages' weights and ours, and for each its largest difference."""
    def layers():
        return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3))).double()

    group, errors = dist.group.WORLD, []
    x = torch.randn(3, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    for stage in (1, 2, 3):
        torch.manual_seed(0)
        ours, plain = layers(), layers()
        plain.load_state_dict(ours.state_dict())
        if stage == 3:
            shards = [nn.Parameter(zero.row_of(p, group).chunk(n)[rank].clone()) for p in plain.parameters()]
            shape, theirs = plain[0].weight.shape, torch.optim.AdamW(shards, **ADAMW)

            def forward(x, shards=shards, shape=shape):
                for shard in shards:
                    x = zero.PlainShardedLinear.apply(x, shard, shape, group)
                return x
        else:
            theirs, forward = zero.PlainSharded(plain.parameters(), torch.optim.AdamW, group, stage, **ADAMW), plain
        model, optimizer, sync, weights = sharded(ours, stage, group)
        for batches in x:
            for batch in batches:
                forward(batch).square().sum().backward()
                if stage == 2:
                    assert all(p.grad is None for p in plain.parameters())
            theirs.step()
            (plain if stage < 3 else theirs).zero_grad()
            for i, batch in enumerate(batches):
                with sync.no_sync() if stage == 1 and i == 0 else contextlib.nullcontext():
                    model(batch).square().sum().backward()
            sync.finish_gradient_synchronization()
            optimizer.step()
            optimizer.zero_grad()
        found = (list(plain.parameters()) if stage < 3 else
                 [zero.all_gather(shard.detach(), group)[:9].view(3, 3) for shard in shards])
        errors += [(a - b).abs().max().item() for a, b in zip(weights().values(), found, strict=True)]
        errors.append(float(torch.equal(found[0], layers()[0].weight)))                                   # it learns
    return max(errors)


def test_the_real_stages_are_those_on_the_board(run_ranks):
    assert max(run_ranks(plain_stages, 2)) < 1e-12


# ---- beside torch's own ----------------------------------------------------------------------------------------------

class Plain(nn.Module):
    """What FSDP2 and ZeroRedundancyOptimizer can do: tied, frozen, a size that needs padding."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 5)) for _ in range(3))
        self.blocks[1][0].requires_grad_(False)
        self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


def take_steps(model, optimizer, sync, steps, rank, scheduler=None):
    for step in range(steps):
        model(*batch(step, rank)[:2]).backward()
        if sync is not None:
            sync.finish_gradient_synchronization()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def beside_fsdp(rank, n, low):
    """-> largest difference of weights, ours and FSDP2's, and of FSDP2's in the low and in full precision."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    answers, mesh = [], dist.device_mesh.init_device_mesh("cpu", (n,))
    for how, dtype in (("ours", low), ("theirs", low), ("theirs", None)):
        module = Plain()
        if how == "ours":
            model = FullyShard(module, dist.group.WORLD, compute_dtype=dtype, reduce="mean")
        else:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
            for block in module.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            model = fully_shard(module, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
        take_steps(model, optimizer, model if how == "ours" else None, 3, rank)
        answers.append(dict(model.full_parameters()) if how == "ours" else
                       {name: p.full_tensor().detach() for name, p in model.named_parameters()})
    ours, theirs, full = answers
    assert ours.keys() == theirs.keys()
    worst = [max((a[name] - b[name]).abs().max().item() for name in a) for a, b in ((ours, theirs), (full, theirs))]
    return worst


@pytest.mark.parametrize("low", (None, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)))
def test_stage_3_is_fsdp2(run_ranks, low):
    """In low precision both round in each product: ours may be off theirs by what theirs is off the full run."""
    for ours, rounding in run_ranks(beside_fsdp, 2, low):
        assert ours <= (1e-6 if low is None else 2 * rounding)


def beside_zero_redundancy(rank, n):
    import warnings

    from torch.distributed.optim import ZeroRedundancyOptimizer
    answers = []
    for how in ("ours", "theirs"):
        module = Plain()
        model = module if how == "ours" else nn.parallel.DistributedDataParallel(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = (ShardedOptimizer(trained, torch.optim.AdamW, group=dist.group.WORLD, reduce="mean", lr=0.01)
                         if how == "ours" else ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=0.01))
        take_steps(model, optimizer, optimizer if how == "ours" else None, 4, rank,
                   torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))
        answers.append(list(module.parameters()))
    return max((a - b).abs().max().item() for a, b in zip(*answers, strict=True))


def test_stage_1_is_zero_redundancy_optimizer_under_a_scheduler(run_ranks):
    assert max(run_ranks(beside_zero_redundancy, 2)) < 1e-6


# ---- memory, to the byte ---------------------------------------------------------------------------------------------

def test_the_formulas_are_the_papers():
    """Rajbhandari 2020, Table 1 and Figure 1: GB (1e9 bytes) of model states per rank, as printed (some cut, not
    rounded); Section 7: what a rank sends."""
    published = {(7.5e9, 0, 64): 120, (7.5e9, 1, 64): 31.4, (7.5e9, 2, 64): 16.6, (7.5e9, 3, 64): 1.88,
                 (7.5e9, 3, 1024): 0.12, (128e9, 1, 1024): 513, (128e9, 2, 256): 263, (128e9, 3, 64): 32,
                 (1e12, 1, 64): 4187, (1e12, 2, 1024): 2013, (1e12, 3, 1024): 15.6}
    for (params, stage, dp), gb in published.items():
        assert zero.memory_per_rank(params, stage, dp)["total"] / 1e9 == pytest.approx(gb, abs=1 if gb > 200 else 0.06)
    for stage, factor in enumerate((2, 2, 2, 3)):
        assert sum(zero.comm_volume(1024, stage, 4).values()) == factor * 1024 * 3 / 4


class Even(nn.Module):
    """Ten layers of one size."""

    def __init__(self, width=12, depth=10):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.sum()


def memory(rank, n, stage, m=2, fault=None):
    """-> peak bytes of two steps, the last one's calls, gathered layers after each backward, rows of gradients that
    live, whoever has them, when one is sent."""
    group, module = dist.group.WORLD if n > 1 else None, Even()
    size = 12 * 12
    if stage == 3:
        sync = FullyShard(module, group)
        optimizer = torch.optim.AdamW(sync.parameters(), **ADAMW)
    else:
        sync = optimizer = ShardedOptimizer(module.parameters(), torch.optim.AdamW, group=group, stage=stage,
                                            bucket_mb=4 * size / 1e6, **ADAMW)
    kept, rows, alive = [], [], []

    def send(bucket):
        rows.append(StorageWeakRef(bucket.grads.untyped_storage()))
        end = time.monotonic() + (n > 1 and not fault)       # the backend lets go of one a moment after it is there
        while (there := sum(not x.expired() for x in rows)) > 2 and time.monotonic() < end:
            time.sleep(0.001)
        alive.append(there)
        kept.append(bucket.grads if fault == "gradients kept" else None)
        type(bucket).send(bucket)

    for bucket in sync.buckets:
        bucket.send = functools.partial(send, bucket)
    if fault == "two ahead":
        sync.prefetch = lambda at: [FullyShard.prefetch(sync, x) for x in (at, at + 1)]
    gathered, ledger = [], MemoryLedger(lambda: holdings(sync, optimizer))
    for _ in range(2):
        with ledger, parallel.CommLedger({"dp": group}) as calls:
            for i in range(m):
                last = i == m - 1
                with sync.no_sync() if stage < 3 and not last else torch.enable_grad():         # at stage 2 for nothing
                    module(torch.full((2, 12), 0.1 * (rank + i))).backward()
                gathered.append(sum(unit.whole for unit in getattr(sync, "units", ())))
            sync.finish_gradient_synchronization()
            optimizer.step()
        optimizer.zero_grad()
    return dict(ledger.peak), calls.calls, gathered, alive


@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("n", (1, pytest.param(2, marks=pytest.mark.slow), 4))
def test_peaks_are_the_formula_to_the_byte(run_ranks, n, stage):
    answers = [memory(0, 1, stage)] if n == 1 else run_ranks(memory, n, stage)
    layer, psi = 4 * 144, 10 * 144
    formula = zero.memory_per_rank(psi, stage, n, param_bytes=4, grad_bytes=4, state_bytes=8)
    for peak, calls, gathered, alive in answers:
        assert peak["parameters"] == formula["parameters"]
        assert peak["gradients"] == formula["gradients"]
        assert peak["states"] == formula["states"] + 4 * 10                      # and AdamW's count of steps, a layer
        # the gathered: this layer and the next
        assert peak["gathered"] == (2 * layer if stage == 3 else 0)
        if n > 1:
            # one bucket that is received, and a slice of the sum; 2, 3: one that fills, one that is sent
            assert peak["buckets"] == (1 if stage == 1 else 3) * layer + layer // n
        assert sum(gathered) == 0
        if n > 1:
            assert max(alive) <= 2
        m, part = 2, 4 * psi * (n - 1) / n
        sent = sum(x.wire for x in calls if x.dtype == torch.float32)
        assert sent == (0 if n == 1 else part * {1: 2, 2: m + 1, 3: 3 * m}[stage])
        assert sent == 4 * sum(zero.comm_volume(psi, stage, n, m).values())


def test_kept_gradients_and_a_layer_too_many_are_seen(run_ranks):
    assert all(max(alive) == 40 for *_, alive in run_ranks(memory, 2, 2, 2, "gradients kept"))
    assert all(peak["gathered"] == 3 * 4 * 144 for peak, *_ in run_ranks(memory, 2, 3, 2, "two ahead"))


def under_way(rank, n, stage):
    """-> for each bucket that has left, and each layer gathered ahead: whether its message is yet to be waited for."""
    model, _, sync, _ = sharded(Even(), stage, dist.group.WORLD)
    pending = []

    def send():
        type(sync).send(sync)
        pending.append(sync.flying is not None and sync.flying.work is not None)

    def prefetch(at):
        type(sync).prefetch(sync, at)
        ahead = sync.needs[at] if 0 <= at < len(sync.needs) else ()
        pending.extend(unit.arriving is not None for unit in ahead if not unit.holders)

    sync.send, sync.prefetch = send, prefetch
    model(torch.ones(2, 12)).backward()
    sync.finish_gradient_synchronization()
    return pending


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_nothing_is_waited_for_where_it_starts(run_ranks, stage):
    for pending in run_ranks(under_way, 2, stage):
        assert all(pending) and len(pending) == (10 + 9 + 9 if stage == 3 else 10)


# ---- what else must work ---------------------------------------------------------------------------------------------

class Recomputed(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside, self.up, self.down = inside, nn.Linear(6, 9), nn.Linear(9, 6)

    def run(self, x):
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False) if self.inside else self.run(x)


def recomputed(rank, n, where):
    """-> gathers of a step, gradients: checkpoint inside the blocks, around them, nowhere."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Recomputed(where == "inside") for _ in range(3))
    model = FullyShard(nn.ModuleDict({"blocks": blocks}), dist.group.WORLD, blocks=blocks)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    with parallel.CommLedger({"dp": dist.group.WORLD}) as ledger:
        y = x
        for block in blocks:
            y = y + (checkpoint(block, y, use_reentrant=False) if where == "around" else block(y))
        y.square().sum().backward()
        model.finish_gradient_synchronization()
    gathers = sum(call.collective == "all_gather" for call in ledger.calls)
    return gathers, [p.grad for p in model.parameters()], x.grad


def test_recomputation_gathers_once_in_forward_and_once_in_backward(run_ranks):
    plain = run_ranks(recomputed, 2, "nowhere")
    for where in ("inside", "around"):
        for (gathers, gradients, dx), (_, expected, expected_dx) in zip(run_ranks(recomputed, 2, where), plain,
                                                                        strict=True):
            assert gathers == 6
            for a, b in zip((dx, *gradients), (expected_dx, *expected), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def made_of_nothing(rank, n):
    """A model on the meta device, block in block, given values one parameter at a time -> as the real one?"""
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.inner = nn.Linear(5, 5), nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

        def forward(self, x, *, flip=False):
            for layer in self.inner:
                x = torch.tanh(layer(x)) + self.own(x)
            return {"out": (x, -x if flip else None)}

    def values(p):
        asked.append(p.full_name)
        return real[p.full_name].detach()

    torch.manual_seed(0)
    outer, asked = Outer().double(), []
    real = dict(outer.named_parameters())
    with torch.device("meta"):
        module = Outer()
    model = FullyShard(module, dist.group.WORLD, blocks=[module, *module.inner], init=values)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        quiet = model(x)["out"][0]
        whole = [unit.whole for unit in model.units]
    out = model(x, flip=True)["out"]
    (out[0].square().sum() + out[1].sum()).backward()
    model.finish_gradient_synchronization()
    expected = outer(x, flip=True)["out"]
    (expected[0].square().sum() + expected[1].sum()).backward()
    for p in outer.parameters():
        dist.all_reduce(p.grad)
    for unit in model.units:
        for p, shard in unit.shards.items():
            torch.testing.assert_close(shard.grad, real[p.full_name].grad.flatten()[slice(*shard.flat)])
    full = dict(model.full_parameters())
    return (sorted(asked) == sorted(real), torch.equal(quiet, expected[0]), not any(whole),
            all(torch.equal(full[name], p) for name, p in real.items()))


def test_meta_models_nested_blocks_keywords_and_no_grad(run_ranks):
    assert run_ranks(made_of_nothing, 2) == [(True,) * 4] * 2


Masters = functools.partial(precision.MasterWeights, optimizer_cls=torch.optim.AdamW)


def mastered(rank, n, stage):
    """Parameters in bfloat16, their gradients and masters in float32 -> weights after three steps."""
    module = Plain(0, torch.bfloat16)
    for p in module.parameters():
        p.grad_dtype = torch.float32
    group = dist.group.WORLD if n > 1 else None
    optimizer = (ShardedOptimizer(module.parameters(), Masters, group=group, stage=stage, lr=0.01) if stage else
                 Masters([p for p in module.parameters() if p.requires_grad], lr=0.01))
    for step in range(3):
        for i in range(rank, 4, n):
            with optimizer.no_sync() if stage == 1 and i + n < 4 else torch.enable_grad():
                module(*batch(step, i)[:2]).backward()
        if stage:
            optimizer.finish_gradient_synchronization()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in module.parameters()]


@pytest.mark.parametrize("stage", (1, 2))
def test_master_weights_are_sharded_too(run_ranks, stage):
    """The sums differ in their last float32 bit, so a bfloat16 may fall to the other side: one place in 256."""
    expected = mastered(0, 1, 0)
    for ours in run_ranks(mastered, 2, stage):
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == torch.bfloat16 and a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


def one_bucket(rank, n, stage):
    """Everything in one bucket, gradients in any order -> summed gradients."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    optimizer = ShardedOptimizer(module.parameters(), torch.optim.SGD, group=dist.group.WORLD, stage=stage, lr=1.0,
                                 order=list(module.parameters())[::-1])
    before = torch.cat([p.detach().flatten() for p in module.parameters()])
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = torch.autograd.grad(module(x.flatten(0, 1)).square().sum(), list(module.parameters()))
    for i in range(rank, 4, n):
        with optimizer.no_sync() if i + n < 4 else torch.enable_grad():
            module(x[i]).square().sum().backward()
    optimizer.finish_gradient_synchronization()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    return (before - after - torch.cat([g.flatten() for g in expected])).abs().max().item()


@pytest.mark.parametrize("stage", (1, 2))
def test_one_bucket_any_order(run_ranks, stage):
    assert max(run_ranks(one_bucket, 2, stage)) < 1e-12


def norms(rank, n, value):
    """-> the norm that clip_grad_norm_ finds, and the gradients after it."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, value if rank == 1 else 4.0])
    return zero.clip_grad_norm_([p], 1.0, dist.group.WORLD), p.grad


def test_the_norm_is_over_all_shards_and_found_inf_is_everywhere(run_ranks):
    (a, g), (b, _) = run_ranks(norms, 2, 12.0)
    assert a == b == pytest.approx((9 + 16 + 9 + 144) ** 0.5) and torch.allclose(g, torch.tensor([3.0, 4.0]) / a)
    for bad in (float("inf"), float("nan")):
        (a, g), (b, _) = run_ranks(norms, 2, bad)
        assert not (a < float("inf")) and not (b < float("inf")) and g.tolist() == [3.0, 4.0]


def test_the_norm_makes_no_copy_of_a_shard():
    p = nn.Parameter(torch.empty(3 * 2**20 + 5))
    p.grad = torch.full_like(p, 3e-30)                                                      # squares are no float32
    with Largest(torch.float64) as largest:
        assert zero.clip_grad_norm_([p], 1.0) == pytest.approx(3e-30 * p.numel()**0.5, rel=1e-6, abs=0)
    assert 0 < largest.numel <= 2**20


def generated(rank, n):
    config = net.ModelConfig(vocab_size=32, seq_len=16, n_layer=2, n_head=2, n_kv_head=2, head_dim=8, n_embd=16,
                             n_ff=32, tie_embeddings=True)
    gpts = [net.build(config) for _ in range(2)]
    FullyShard(gpts[1], dist.group.WORLD)
    return [gpt.generate(torch.tensor([[1, 2, 3]]), 6, temperature=0.0).tolist() for gpt in gpts]


def test_a_sharded_model_generates(run_ranks):
    for plain, ours in run_ranks(generated, 2):
        assert plain == ours and len(plain[0]) == 9


def given_up(rank, n, stage):
    """A batch whose gradients are not used -> weights after another one, with it and without."""
    answers = []
    for abandon in (True, False):
        model, optimizer, sync, weights = sharded(Odd(0), stage, dist.group.WORLD)
        if abandon:
            model(*batch(9, rank)).backward()
            sync.zero_grad()
        model(*batch(0, rank)).backward()
        sync.finish_gradient_synchronization()
        optimizer.step()
        answers.append({name: p.clone() for name, p in weights().items()})
    return all(torch.equal(p, answers[1][name]) for name, p in answers[0].items())


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_batch_can_be_given_up(run_ranks, stage):
    assert run_ranks(given_up, 2, stage) == [True, True]


def added_up(rank, n, stage):
    """Two finished backward passes with no zero_grad between -> gradients, and those of both at once."""
    answers = []
    for times in (2, 1):
        model, optimizer, sync, _ = sharded(Odd(0), stage, dist.group.WORLD)
        for _ in range(times):
            (model(*batch(0, rank)) * 2 / times).backward()
            sync.finish_gradient_synchronization()
        answers.append([p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None])
    return answers


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_gradients_are_added_up_until_zero_grad(run_ranks, stage):
    for twice, once in run_ranks(added_up, 2, stage):
        assert len(once) > 10
        for a, b in zip(twice, once, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class HeadFirst(nn.Module):
    """Defined in another order than used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.layers = nn.Linear(5, 5), nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def halved(rank, n):
    """Weights changed between two forwards -> the second's error; what stays gathered; a buffer."""
    plain, x, module = HeadFirst(), torch.ones(2, 5), HeadFirst()
    module.register_buffer("shift", torch.full((3,), float(rank)))
    model = FullyShard(module, dist.group.WORLD)
    with torch.no_grad():
        model(x)
        for p in (*model.parameters(), *plain.parameters()):
            p.mul_(0.5)
        error, gathered = (model(x) - plain(x)).abs().max().item(), [sum(unit.whole for unit in model.units)]
    model.module(x).sum().backward()                                                     # not by the wrapper's forward
    model.finish_gradient_synchronization()
    return error, gathered + [sum(unit.whole for unit in model.units)], module.shift.tolist()


def test_weights_gathered_ahead_do_not_grow_stale(run_ranks):
    assert all(error < 1e-6 and gathered == [0, 0] and shift == [0.0] * 3
               for error, gathered, shift in run_ranks(halved, 2))


def late(rank, n):
    """A model with tied ends -> the parameters that were not on their way when a pass began to need them."""
    config = net.ModelConfig(vocab_size=32, seq_len=16, n_layer=2, n_head=2, n_kv_head=2, head_dim=8, n_embd=16,
                             n_ff=32, tie_embeddings=True)
    gpt, names = net.build(config), [[], []]
    model = FullyShard(gpt, dist.group.WORLD, blocks=gpt.model.layers.values())
    tokens = torch.arange(16)[None]

    def hold(unit, visit):
        names[at] += [] if unit.whole else [unit.params[0].full_name]
        type(unit).hold(unit, visit)

    for unit in model.units:
        unit.hold = functools.partial(hold, unit)
    at = 0
    loss = model(tokens, tokens)[0]
    at = 1
    loss.backward()
    return names


def test_only_the_first_of_a_pass_is_waited_for(run_ranks):
    assert run_ranks(late, 2) == [[["model.embed_tokens.weight"]] * 2] * 2


class Position(nn.Module):
    """Hands out its parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self):
        return self.weight[:2]


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.position, self.layer = Position(), nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x + self.position())


@dataclass
class Answer:
    hidden: torch.Tensor


class Wrapped(nn.Linear):
    def forward(self, x):
        return Answer(super().forward(x))


def test_outputs_at_stage_3():
    with pytest.raises(RuntimeError, match="Position must not return its parameter, which is freed now: name"):
        FullyShard(Positioned())(torch.ones(2, 5))
    module = Positioned()
    FullyShard(module, blocks=[module])(torch.ones(2, 5)).sum().backward()
    model = FullyShard(Wrapped(3, 3))
    model(torch.ones(2, 3)).hidden.sum().backward()
    model.finish_gradient_synchronization()
    assert [p.grad.abs().sum().item() for p in model.parameters()] == [18.0, 6.0]
    assert FullyShard(nn.Linear(3, 3), compute_dtype=torch.bfloat16)(torch.ones(2, 3)).dtype == torch.bfloat16
    model = FullyShard(Plain())                                                                            # tied ends
    assert set(model.parameters()) == set(model.shards.values())


# ---- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cls", zero.NOT_ELEMENTWISE)
def test_optimizers_that_need_whole_tensors_are_refused(cls):
    for optimizer_cls in (cls, functools.partial(cls, lr=0.1)):
        with pytest.raises(ValueError, match=f"each element by itself to be sharded, {cls.__name__} does not"):
            ShardedOptimizer([nn.Parameter(torch.ones(3, 3))], optimizer_cls)


@pytest.mark.parametrize("optimizer", ("SGD", "Adam", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Rprop",
                                       "Adadelta", "ASGD"))
def test_elementwise_optimizers_are_taken(optimizer):
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    sharded = ShardedOptimizer([a], getattr(torch.optim, optimizer), stage=2, lr=0.1)
    plain = getattr(torch.optim, optimizer)([b], lr=0.1)
    for x in (a, b):
        (x * torch.arange(6.0).view(2, 3)).square().sum().backward()
    sharded.finish_gradient_synchronization()
    sharded.step()
    plain.step()
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def strangers(rank, n):
    group = dist.new_group([0])
    if rank == 1:
        for make in (lambda: ShardedOptimizer(nn.Linear(2, 2).parameters(), torch.optim.SGD, group=group, lr=0.1),
                     lambda: FullyShard(nn.Linear(2, 2), group)):
            with pytest.raises(ValueError, match="group must hold this rank, rank 1 is not in it"):
                make()


def test_bad_input_is_one_line(run_ranks):
    run_ranks(strangers, 2)
    sgd = functools.partial(ShardedOptimizer, optimizer_cls=torch.optim.SGD, lr=0.1)
    layer = nn.Linear(2, 2)
    for make, message in (
            (lambda: sgd(layer.parameters(), stage=3), "stage must be 1 or 2, got 3; 3 is FullyShard"),
            (lambda: sgd(layer.parameters(), bucket_mb=0), "bucket_mb must be above 0, got 0"),
            (lambda: sgd(layer.parameters(), reduce="avg"), "reduce must be sum or mean, got 'avg'"),
            (lambda: sgd(layer.parameters(), order=[layer.bias]), "order must hold each of the 2 parameters once"),
            (lambda: FullyShard(layer, blocks=[nn.Linear(2, 2)]), "blocks must be in the module, Linear is not"),
            (lambda: FullyShard(nn.Linear(2, 2, device="meta")), "init must give the values of parameters on the meta"),
            (lambda: zero.memory_per_rank(1, 4, 1), "stage must be one of 0, 1, 2, 3, got 4"),
            (lambda: zero.comm_volume(1, 4, 2), "stage must be one of 0, 1, 2, 3, got 4")):
        with pytest.raises(ValueError, match=message):
            make()
    optimizer = sgd(layer.parameters(), stage=2)
    for again in (lambda: sgd(layer.parameters()), lambda: FullyShard(layer)):
        with pytest.raises(ValueError, match="must not be sharded already, it is"):
            again()
    norm = nn.BatchNorm1d(2, device="meta")
    with pytest.raises(ValueError, match="running_mean must not be on the meta device"):
        FullyShard(norm, init=lambda p: torch.ones(p.shape))
    assert zero.clip_grad_norm_([], 1.0) == 0
    layer(torch.ones(2)).sum().backward()
    with pytest.raises(RuntimeError, match="call finish_gradient_synchronization.. between backward and step"):
        optimizer.step()


# ---- what its users ran into -----------------------------------------------------------------------------------------

class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        raise ArithmeticError


class Fragile(nn.Linear):
    """A block whose backward fails halfway when it is told to."""

    fails = False

    def forward(self, x):
        return super().forward(Fails.apply(x) if self.fails else x)


def chain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(Fragile(4, 4) for _ in range(3))).double()


def given_up_halfway(rank, n):
    """Batches that are given up halfway, in backward, unlike on the two ranks -> largest errors afterwards."""
    x, errors = torch.ones(2, 4, dtype=torch.float64), []
    for stage in (1, 2, 3):
        plain, module = chain(), chain()
        theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
        if stage == 3:
            model = sync = FullyShard(module, dist.group.WORLD, blocks=list(module))
            ours = torch.optim.SGD(model.parameters(), lr=0.1)
        else:
            model, ours = module, ShardedOptimizer(module.parameters(), torch.optim.SGD, group=dist.group.WORLD,
                                                   stage=stage, bucket_mb=1e-5, lr=0.1)
            sync = ours
        for step in range(3):
            if step == 1 and stage < 3:                                  # one rank leaves a layer out: fewer are sent
                (module[2](x) if rank else module(x)).sum().backward()
                ours.zero_grad()
            if step == 1 and stage == 3:
                module[1].fails = True
                with pytest.raises(ArithmeticError):
                    model(x).sum().backward()
                module[1].fails = False
                model.zero_grad()
                assert not any(unit.whole for unit in model.units)
            if step == 2 and stage == 3:
                with torch.no_grad():                                    # a block alone: the next one is gathered ahead
                    module[0](x)
            model(x).sum().backward()
            sync.finish_gradient_synchronization()
            if step == 1 and stage == 3:
                with torch.no_grad():
                    module[0](x)
            ours.step()
            ours.zero_grad()
            theirs.zero_grad()
            (n * plain(x)).sum().backward()
            theirs.step()
            with torch.no_grad():
                errors.append((model(x) - plain(x)).abs().max().item())
    return max(errors)


def test_a_batch_may_be_given_up_anywhere(run_ranks):
    assert max(run_ranks(given_up_halfway, 2)) < 1e-12


def test_what_is_refused_and_says_so():
    module = nn.Sequential(nn.Embedding(4, 4, sparse=True))
    ShardedOptimizer(module.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="a parameter must not have sparse gradients, it has"):
        module(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="FullyShard cannot be copied"):
        copy.deepcopy(FullyShard(chain()))
    module = chain()
    module[1].requires_grad_(False)
    optimizer = ShardedOptimizer(module.parameters(), torch.optim.SGD, lr=0.1)
    module[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match="a parameter must be given at construction, and not frozen then"):
        optimizer.step()
    module[1].requires_grad_(False)
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RuntimeError, match="a parameter must be given at construction, and not frozen then"):
        optimizer.step()
    model = FullyShard(chain())
    model.module[1].requires_grad_(False)
    model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"1.weight: requires_grad must stay True, as at construction"):
        model.finish_gradient_synchronization()


class Differentiates(nn.Linear):
    """An energy's gradient by its input, also where nobody asks for gradients."""

    def forward(self, x):
        with torch.enable_grad():
            energy = super().forward(x).square().sum()
            return torch.autograd.grad(energy, x)[0]


def test_what_a_block_does_between_the_four_moments():
    """Hooks see whole parameters; a block may differentiate inside; one that raises is freed; sums are of the shards'
    dtype."""
    seen = []
    module = nn.Sequential(Differentiates(4, 4), nn.Linear(4, 4))
    module[1].register_forward_pre_hook(lambda block, _: seen.append(block.weight.shape))
    model = FullyShard(module, blocks=list(module), reduce_dtype=torch.bfloat16)
    with torch.no_grad():
        model(torch.ones(2, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.ones(2, 3))
    assert seen == [(4, 4)] and not any(unit.whole for unit in model.units)
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    model.finish_gradient_synchronization()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_module_that_was_cast_after_sharding_is_refused():
    """Its weights would be others than those that are updated: nothing would be learnt, and nobody would say so."""
    for stage in (1, 2, 3):
        module = chain()
        model, _, sync, _ = sharded(module, stage, None)
        model.to(torch.float64)                                                                  # changes nothing
        module(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        sync.finish_gradient_synchronization()
        model.float()
        with pytest.raises(RuntimeError, match="must not be moved or cast once it is sharded"):
            sync.finish_gradient_synchronization()


def test_a_scheduler_reaches_the_optimizer_inside():
    """Also a rate that rises from zero, and one that is set after a state was read."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, plain = ShardedOptimizer([p], torch.optim.SGD, lr=0.0), torch.optim.SGD([q], lr=0.0)
    for rate in (0.1, 0.0):
        for x, optimizer in ((p, ours), (q, plain)):
            optimizer.param_groups[0]["lr"] = rate
            x.square().sum().backward()
            if optimizer is ours:
                ours.finish_gradient_synchronization()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(p, q) and p[0] != 1
        ours.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("cls", (torch.optim.NAdam, torch.optim.ASGD, torch.optim.AdamW))
def test_states_of_parameters_of_no_dimension(run_ranks, cls):
    assert all(run_ranks(of_no_dimension, 2, cls))


def of_no_dimension(rank, n, cls):
    p, q, r = (nn.Parameter(torch.tensor(1.0)) for _ in range(3))
    ours, theirs = (ShardedOptimizer([x], cls, group=dist.group.WORLD, lr=0.1) for x in (p, q))
    plain = cls([r], lr=0.1)
    for _ in range(4):
        (p * p).backward()
        (q * q).backward()
        ours.finish_gradient_synchronization()
        theirs.finish_gradient_synchronization()
        r.grad = 2 * n * r.detach()
        for optimizer in (ours, theirs, plain):
            optimizer.step()
            optimizer.zero_grad()
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return torch.allclose(p, r, rtol=0, atol=1e-6)
