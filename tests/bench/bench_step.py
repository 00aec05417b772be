"""A step of ours next to a plain loop like nanoGPT's, on the same shapes: python tests/bench/bench_step.py

Both train a GPT-2 without biases, with tied embeddings and the exact GELU, in float32, on one thread, in one
micro-batch, and both read their batches from a prepared corpus. (Our GELU is GPT-2's tanh formula otherwise. On a CPU
torch takes more than twice as long for that one; --tanh-gelu shows it.) The plain loop is `plain_steps`: torch's
modules, all logits at once, fused AdamW. Ours is train.py's own step, with all that it counts and checks. They take
turns in one process, in a random order.

  CPU ms    of a step: the process's CPU time, the median        / ours    its time / ours, the median over the turns
  peak MB   growth of resident memory over the imports, each in a process of its own       ours /    our peak / its peak

--nanogpt FOLDER: nanoGPT's own model.py from a checkout, in the plain loop and with its own optimizer.
"""

import argparse
import importlib.util
import math
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402

#          layers, width, heads, positions, windows, vocabulary, turns
SHAPES = {"small": (4, 128, 4, 64, 12, 65, 100),
          "middle": (6, 384, 6, 256, 8, 8192, 5),
          "wide vocabulary": (6, 384, 6, 256, 8, 50304, 3)}


class PlainBlock(nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C, bias=False), nn.GELU(), nn.Linear(4 * C, C, bias=False))
        self.H = H

    def forward(self, x):                                                                      # (B, T, C)
        q, k, v = (y.unflatten(2, (self.H, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=2))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)                            # (B, H, T, D)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    def __init__(self, L, C, H, T, V):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.Sequential(*[PlainBlock(C, H) for _ in range(L)])
        self.norm, self.head = nn.LayerNorm(C, bias=False), nn.Linear(C, V, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))                                          # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_steps(model, optimizer, ids, B, T):
    """The loop of nanoGPT: random windows of ids, forward, backward, clip, update. Yields the loss after each step."""
    while True:
        starts = torch.randint(len(ids) - T, (B,))
        tokens, targets = (torch.stack([torch.from_numpy(ids[i + k:i + k + T].astype(np.int64)) for i in starts])
                           for k in (0, 1))
        _, loss = model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def our_steps(prepared, tanh_gelu, L, C, H, T, B, V):
    """train.py's step on its own loader. Token ids are taken modulo V. Yields the loss after each step."""
    c = train.parse_config([
        "--data", str(prepared), "--device", "cpu", "--vocab-size", str(V), "--seq-len", str(T), "--n-layer", str(L),
        "--n-embd", str(C), "--n-head", str(H), "--norm", "layernorm", "--position", "learned", "--mlp", "gelu",
        "--tie-embeddings", "--no-document-mask", "--optimizer", "adamw", "--lr", "1e-3", "--weight-decay", "0.1",
        "--global-batch-size", str(B), "--micro-batch-size", str(B), "--steps", "1000000"])
    world = train.join(c)
    c = train.resolve(c, world)
    loader = data.Loader(prepared, micro_batch_size=B, seq_len=T)
    batches = (batch | {name: batch[name] % V for name in ("tokens", "targets")} for batch in loader)
    model = train.Model(c, world)
    for block in model.chunks[0].model.layers.values():
        if not tanh_gelu:
            block.mlp.forward = lambda x, mlp=block.mlp: mlp.down_proj(F.gelu(mlp.up_proj(x)))
    optimizer = train.make_optimizer(model, c)
    for step in range(c.steps):
        yield train.train_step(model, optimizer, batches, step, c, world)[0]


def steps_of(name, prepared, shape, args):
    """An endless iterator of training steps."""
    L, C, H, T, B, V = shape
    if name == "ours":
        return our_steps(prepared, args.tanh_gelu, *shape)
    torch.manual_seed(0)
    ids = (np.asarray(data.Loader(prepared, micro_batch_size=B, seq_len=T).shards[0]) % V).astype(np.uint16)
    if name == "plain":
        model = PlainGPT(L, C, H, T, V)
        groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == decay], "weight_decay": 0.1 * decay}
                  for decay in (True, False)]
        return plain_steps(model, torch.optim.AdamW(groups, lr=1e-3, fused=True), ids, B, T)
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(args.nanogpt) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = nanogpt
    spec.loader.exec_module(nanogpt)
    model = nanogpt.GPT(nanogpt.GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C, bias=False))
    return plain_steps(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu"), ids, B, T)


def peak_bytes(name, prepared, shape, args) -> int:
    """Growth of this process's resident peak over building and two steps (ru_maxrss would start at the parent's)."""
    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    before, steps = peak(), steps_of(name, prepared, shape, args)
    for _ in range(2):
        next(steps)
    return peak() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", default="", help="folder of a checkout of nanoGPT")
    parser.add_argument("--tanh-gelu", action="store_true", help="ours as train.py has it")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        name, prepared, shape = args.peak
        print(peak_bytes(name, prepared, SHAPES[shape][:-1], args))
        return
    names = ["ours", "plain", *["nanoGPT"] * bool(args.nanogpt)]
    print(f"{'layers x width x vocabulary':<28} {'variant':<8} {'CPU ms':>8} {'/ ours':>7} {'peak MB':>8} "
          f"{'ours /':>7}")
    with tempfile.TemporaryDirectory() as temporary:
        prepared = data.prepare([str(ROOT / "*.py")], Path(temporary) / "text", 1024)
        for shape_name in args.shapes:
            *shape, turns = SHAPES[shape_name]
            steps = {name: steps_of(name, prepared, shape, args) for name in names}
            seconds = {name: [] for name in names}
            for turn in range(turns + 1):
                for name in random.sample(names, len(names)):
                    start = time.process_time()
                    assert math.isfinite(next(steps[name]))
                    if turn:                                                              # the first turn warms up
                        seconds[name].append(time.process_time() - start)
            del steps
            command = [sys.executable, __file__, "--nanogpt", args.nanogpt, *["--tanh-gelu"] * args.tanh_gelu, "--peak"]
            peaks = {name: int(subprocess.run([*command, name, str(prepared), shape_name], capture_output=True,
                                              text=True, check=True).stdout.split()[-1]) for name in names}
            L, C, _, _, _, V = shape
            for name in names:
                ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["ours"], strict=True))
                print(f"{f'{L} x {C} x {V}':<28} {name:<8} {statistics.median(seconds[name]) * 1e3:8.2f} {ratio:7.3f} "
                      f"{peaks[name] / 1e6:8.0f} {peaks['ours'] / peaks[name]:7.3f}", flush=True)


if __name__ == "__main__":
    main()
