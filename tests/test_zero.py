import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

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
        self.frozen, self.unused = nn.Linear(5, 5), nn.Linear(3, 3)
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


def batch(step, i):
    """The i-th of a step's eight micro-batches; `some` is used in one of them, in step 2 in none."""
    generator = torch.Generator().manual_seed(100 * step + i)
    tokens, targets = torch.randint(7, (2, 3, 4), generator=generator)
    return tokens, targets, i == 5 and step != 2


ADAMW = dict(lr=0.03, weight_decay=0.1, eps=1e-6)


@functools.cache
def one_process(steps=5, clip=2.0):
    """torch's AdamW on a plain module -> losses, norms, weights, the optimizer's state_dict."""
    module, history = Odd(0), []
    optimizer = torch.optim.AdamW(module.parameters(), **ADAMW)
    for step in range(steps):
        losses = [module(*batch(step, i)) for i in range(8)]
        sum(losses).backward()
        norm = torch.stack([p.grad.square().sum() for p in module.parameters() if p.grad is not None]).sum().sqrt()
        for p in module.parameters():
            if p.grad is not None:
                p.grad *= min(1.0, clip / norm.item())
        optimizer.step()
        optimizer.zero_grad()
        history.append((sum(losses).item(), norm.item()))
    assert sum(norm > clip for _, norm in history) >= 3 and history[-1][0] < history[0][0]
    return history, {name: p.detach() for name, p in module.named_parameters()}, optimizer.state_dict()


def sharded(module, stage, group, **options):
    """-> model to call, its optimizer, what synchronizes, the weights as they are in one process."""
    if stage == 3:
        model = FullyShard(module, group, **options)
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        return model, optimizer, model, lambda: dict(model.full_parameters())
    optimizer = ShardedOptimizer(module.parameters(), torch.optim.AdamW, group=group, stage=stage, bucket_mb=0.0006,
                                 **ADAMW)
    return module, optimizer, optimizer, lambda: {name: p.detach() for name, p in module.named_parameters()}


def train(rank, n, stage, steps=5, clip=2.0, alone=False):
    group = None if alone else dist.group.WORLD
    rank, n = (0, 1) if alone else (rank, n)
    model, optimizer, sync, weights = sharded(Odd(seed=rank), stage, group)
    history = []
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(rank, 8, n):
            last = i + n >= 8
            with sync.no_sync() if stage == 1 and not last else torch.enable_grad():
                loss = model(*batch(step, i))
                loss.backward()
            total += loss.detach()
        sync.finish_gradient_synchronization()
        norm = zero.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip, group)
        optimizer.step()
        optimizer.zero_grad()
        if group is not None:
            dist.all_reduce(total)
        history.append((total.item(), norm))
    return history, {name: p.clone() for name, p in weights().items()}, stage < 3 and optimizer.state_dict()


@pytest.mark.parametrize("stage", (1, 2, 3))
@pytest.mark.parametrize("n", (1, 2, 4))
def test_every_stage_is_plain_adamw(run_ranks, n, stage):
    expected, weights, state = one_process()
    answers = [train(0, 1, stage, alone=True)] if n == 1 else run_ranks(train, n, stage)
    for history, ours, saved in answers:
        assert [x for pair in history for x in pair] == pytest.approx([x for pair in expected for x in pair], abs=1e-10)
        assert ours.keys() == weights.keys()
        for name, p in weights.items():
            torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-10, msg=name)
