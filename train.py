"""Training: the one file that imports its siblings and wires them into a run.

    python train.py                                       `tiny`, on this Python's own library: minutes on two CPU cores
    python train.py --data "my/*.txt" --out out/mine      your text
    python train.py --out out/tiny --sample "def main("   continue a text
    python train.py --out out/tiny --quantize int4        what do its weights lose as integers?
    python train.py --config 7b --dry-run                 what would it cost?
    python train.py --nproc 4 --tp 2 --pp 2               four ranks: this CPU's cores, or GPUs
    torchrun --nproc-per-node 8 train.py --config small --data FOLDER

Pre-training is one loop. A step, in order (G windows of T tokens, in micro-batches, over a mesh pp x dp x tp of ranks):

    1.  N     = number of targets in the global batch                           known from the data, one all-reduce
    2.  run the schedule: forward and backward of S sum(nll) / N, micro-batch by micro-batch, stage by stage
    3.  sum gradients over dp, and over whoever else holds a part               never a mean of means
    4.  loss, |grad|^2 (each weight counted once) and "please stop" in one all-reduce
    5.  non-finite loss or norm: stop, exit code 3, nothing is saved; with a loss scale S: skip the step, halve S
    6.  grad *= min(1, clip / |grad|) / S;   AdamW, of float32 masters;   lr from lr_at(step)

      m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2           m' = m / (1 - b1^t)      v' = v / (1 - b2^t)
      w -= lr (m' / (sqrt(v') + eps) + wd w)

Weight decay wd acts on matrices alone. The learning rate rises linearly, then falls by a cosine, or stays and falls
in the last fifth (warmup-stable-decay).

    FLOPs of a run = 6 N D + attention       MFU = those FLOPs / second / the device's peak       D = steps * G * T

Training is a pure function of (seed, step): evaluation and sampling have generators of their own, and a checkpoint
(weights, Adam's moments, the data position) continues bit for bit on a CPU, on a GPU as far as its kernels are
deterministic. The same command again goes on where the run stopped, after Ctrl-C, SIGTERM (both save first) or kill -9
(from the last checkpoint; metrics.jsonl is cut back to it).

    out/RUN/   config.json   metrics.jsonl   card.md   tokenizer.model   checkpoints/step-00000400/...

Exit codes: 0 done, 2 bad input, 3 diverged, 1 anything else.
Sources: AdamW (Loshchilov 2019, arXiv:1711.05101); WSD (arXiv:2404.06395); MFU (PaLM, arXiv:2204.02311).
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist

import data
import flash_attn
import model as net
import parallel
import precision
import zero

# ---- configs ---------------------------------------------------------------------------------------------------------


def option(default, help, *, choices=None, affects_training=True):
    return field(default=default, metadata={"help": help, "choices": choices, "affects_training": affects_training})


def runtime(default, help, choices=None):
    return option(default, help, choices=choices, affects_training=False)


@dataclass(frozen=True)
class Config:
    """Every field is a flag (--seq-len for seq_len). Defaults are the `tiny` config's."""

    config: str = runtime("tiny", "named set of defaults")
    # the model, as in model.ModelConfig; 0 derives
    vocab_size: int = option(2048, "rows of embedding and head; also the tokenizer's pieces")
    seq_len: int = option(256, "tokens of context, T")
    n_layer: int = option(4, "blocks")
    n_head: int = option(4, "query heads")
    n_kv_head: int = option(0, "key/value heads (0: n_head)")
    head_dim: int = option(0, "dimensions a head (0: n_embd / n_head)")
    n_embd: int = option(96, "width of the residual stream, C")
    n_ff: int = option(0, "width of the MLP (0: 8/3 C rounded up to 64 for swiglu, 4 C for gelu)")
    norm: str = option("rmsnorm", "normalisation", choices=("rmsnorm", "layernorm"))
    position: str = option("rope", "position encoding", choices=("rope", "learned"))
    mlp: str = option("swiglu", "feed-forward", choices=("swiglu", "gelu"))
    bias: bool = option(False, "biases in linear layers and LayerNorm")
    tie_embeddings: bool = option(False, "head and embedding share their weight")
    qk_norm: bool = option(False, "RMSNorm on queries and keys")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    norm_eps: float = option(1e-5, "epsilon of the norms")
    # the data
    data: str = runtime("stdlib", "prepared folder, or files, folders, globs (comma-separated), or stdlib")
    document_mask: bool = option(True, "attend within a document only")
    # the optimisation
    steps: int = option(2000, "optimizer steps")
    global_batch_size: int = option(8, "windows a step, over all ranks and micro-batches")
    lr: float = option(3e-3, "peak learning rate")
    min_lr_ratio: float = option(0.1, "final learning rate / peak")
    warmup_steps: int = option(100, "steps of linear rise")
    schedule: str = option("cosine", "after the rise", choices=("cosine", "wsd"))
    decay_fraction: float = option(0.2, "wsd: share of the steps in the final decay")
    weight_decay: float = option(0.1, "AdamW's, on matrices")
    beta1: float = option(0.9, "AdamW's first-moment decay")
    beta2: float = option(0.95, "AdamW's second-moment decay")
    adam_eps: float = option(1e-8, "AdamW's epsilon")
    grad_clip: float = option(1.0, "largest global gradient norm (0: no clipping)")
    seed: int = option(0, "of weights and data order")
    precision: str = option("auto", "of parameters and matrix products; auto: bf16 where the accelerator has it",
                            choices=("auto", *precision.PRECISIONS))
    master_weights: bool = option(True, "in a low precision: float32 copies that the optimizer updates")
    loss_scale: float = option(2.0**16, "fp16: what losses are multiplied by at first (0: no scaling)")
    # how it runs: same result, other cost
    micro_batch_size: int = runtime(0, "windows a forward pass, each rank (0: at most 8, and 2 pp passes a step)")
    recompute: str = runtime("none", "activations computed again in backward", choices=("none", "selective", "full"))
    attention: str = runtime("auto", "kernel; auto: triton on a GPU, sdpa elsewhere",
                             choices=("auto", *flash_attn.BACKENDS))
    dp: int = runtime(0, "data-parallel ranks (0: what tp and pp leave of the world)")
    tp: int = runtime(1, "tensor-parallel ranks: parts of every layer's width")
    pp: int = runtime(1, "pipeline stages: parts of the depth")
    sequence_parallel: bool = runtime(True, "with tp: norms and residuals split along the sequence")
    pp_schedule: str = runtime("1f1b", "order of the pipeline's operations", choices=tuple(parallel.SCHEDULES))
    pp_chunks: int = runtime(2, "interleaved: stages a rank")
    zero: int = runtime(0, "split over dp: 1 optimizer states, 2 and gradients, 3 and parameters", choices=(0, 1, 2, 3))
    compile: str = runtime("auto", "torch.compile each block; auto: on accelerators", choices=("auto", "on", "off"))
    device: str = runtime("auto", "auto: this rank's accelerator, else cpu")
    nproc: int = runtime(0, "start and watch this many ranks on this machine (0: torchrun does, or there is one)")
    max_restarts: int = runtime(0, "with --nproc: how often ranks are started again when one has failed")
    timeout: int = runtime(600, "seconds that a rank waits for the others before it gives up")
    out: str = runtime("", "folder of the run (default out/CONFIG)")
    resume: str = runtime("auto", "auto: go on where the folder's run stopped; never: refuse if it holds one",
                          choices=("auto", "never"))
    eval_interval: int = runtime(500, "steps between evaluations (0: only at the end)")
    eval_windows: int = runtime(0, "validation windows an evaluation reads (0: all)")
    checkpoint_interval: int = runtime(500, "steps between checkpoints (0: only at the end)")
    keep_checkpoints: int = runtime(2, "newest checkpoints to keep; the best by validation loss stays too")
    log_interval: int = runtime(1, "steps between printed lines (metrics.jsonl has all)")
    profile: bool = runtime(False, "write when each rank ran which pipeline operation of the third step: trace.json")
    # other things it can do
    dry_run: bool = runtime(False, "print parameters, FLOPs, memory and expected time, then exit")
    json: bool = runtime(False, "with --dry-run: one JSON object")
    sample: str | None = runtime(None, "continue this text with the model in --out, then exit")
    quantize: str | None = runtime(None, "evaluate or sample the model in --out with weights as integers, then exit",
                                   choices=("int8", "int4"))
    max_new_tokens: int = runtime(200, "sampling: tokens to add")
    temperature: float = runtime(0.8, "sampling: 0 takes the likeliest token")
    top_k: int = runtime(0, "sampling: among the k likeliest (0: all)")
    top_p: float = runtime(0.95, "sampling: among the fewest that reach this probability")

    @property
    def model(self) -> net.ModelConfig:
        return net.ModelConfig(**{f.name: getattr(self, f.name) for f in fields(net.ModelConfig)})

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len


GPT2 = dict(norm="layernorm", position="learned", mlp="gelu", bias=True, tie_embeddings=True, vocab_size=50304,
            seq_len=1024)
LONG = dict(min_lr_ratio=0.1, warmup_steps=700, global_batch_size=512, eval_windows=1024, checkpoint_interval=1000)
CONFIGS = {   # about 20 tokens a parameter (Chinchilla, arXiv:2203.15556, Table 3); learning rates of GPT-3's Table 2.1
    "tiny": Config(log_interval=20),
    "small": Config(config="small", **GPT2, **LONG, n_layer=12, n_head=12, n_embd=768, lr=6e-4, steps=4800),
    "medium": Config(config="medium", **GPT2, **LONG, n_layer=24, n_head=16, n_embd=1024, lr=3e-4, steps=13500),
    "large": Config(config="large", **LONG, vocab_size=32000, seq_len=2048, n_layer=24, n_head=16, n_embd=2048,
                    n_ff=5632, lr=2e-4, steps=26000, micro_batch_size=8),
    "7b": Config(config="7b", **LONG | {"global_batch_size": 1024}, vocab_size=32000, seq_len=4096, n_layer=32,
                 n_head=32, n_embd=4096, n_ff=11008, lr=3e-4, steps=32000, micro_batch_size=1, recompute="full"),
}


class BadInput(ValueError):
    """One line that names the flag, the rule and the value: exit code 2."""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message.removeprefix("argument "))


def parse_config(argv) -> Config:
    """Command line -> Config, with derived fields filled in. Raises BadInput."""
    def nearest(word, words):
        close = difflib.get_close_matches(word, words, 1)
        return f"; the nearest is {close[0]}" if close else ""

    pre = Parser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config", default="tiny")
    name = pre.parse_known_args(argv)[0].config
    if name not in CONFIGS:
        raise BadInput(f"--config must be one of {', '.join(CONFIGS)}, got {name!r}{nearest(name, CONFIGS)}")
    base = CONFIGS[name]
    parser = Parser(prog="train.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description=__doc__.split("\n\n")[0] + "\n\n" + __doc__.split("\n\n")[1])
    for f in fields(Config):
        flag, default, choices = flag_of(f.name), getattr(base, f.name), f.metadata["choices"]
        text = f"{f.metadata['help']} [{default}]".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            kind = f.type if isinstance(f.type, type) else str
            parser.add_argument(flag, type=kind, default=default, help=text, choices=choices,
                                metavar=None if choices else kind.__name__.upper())
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise BadInput(f"unknown argument {flag}{nearest(flag, [flag_of(f.name) for f in fields(Config)])}")
    return derive(Config(**vars(args)))


def derive(c: Config) -> Config:
    """Fill in what follows from other fields and check every value. Raises BadInput."""
    for f in fields(Config):
        value = getattr(c, f.name)
        low = {"int": 0, "float": 0.0}.get(getattr(f.type, "__name__", ""))
        if low is not None and not (math.isfinite(value) and value >= low):
            raise BadInput(f"{f.name} must be a finite number of at least 0, got {value}")
    for name in ("steps", "global_batch_size", "keep_checkpoints", "log_interval", "n_head", "tp", "pp", "pp_chunks"):
        if getattr(c, name) < 1:
            raise BadInput(f"{name} must be at least 1, got {getattr(c, name)}")
    if c.seed >= 2**63:
        raise BadInput(f"seed must be below 2**63, got {c.seed}")
    if not c.rope_theta:
        raise BadInput("rope_theta must be above 0, got 0.0")
    if c.nproc and "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) != c.nproc:
        raise BadInput(f"nproc must be left out where torchrun started {os.environ['WORLD_SIZE']} ranks, got {c.nproc}")
    if c.max_restarts and not c.nproc:
        raise BadInput("max_restarts goes with --nproc; torchrun has its own flag of that name")
    if c.timeout < 1:
        raise BadInput(f"timeout must be at least 1 second, got {c.timeout}")
    for name in ("min_lr_ratio", "decay_fraction", "beta1", "beta2"):
        if getattr(c, name) > 1 or name.startswith("beta") and getattr(c, name) == 1:
            raise BadInput(f"{name} must be at most 1{' and not 1' * name.startswith('beta')}, got {getattr(c, name)}")
    if c.loss_scale and c.loss_scale < 2.0**-14:
        raise BadInput(f"loss_scale must be 0 or at least 2**-14, got {c.loss_scale}")
    if c.json and not c.dry_run:
        raise BadInput("json goes with --dry-run, got it alone")
    if not 0 < c.top_p <= 1:
        raise BadInput(f"top_p must be in (0, 1], got {c.top_p}")
    if not c.head_dim and c.n_embd % c.n_head:
        raise BadInput(f"n_embd must be a multiple of n_head, got {c.n_embd} and {c.n_head}")
    if c.vocab_size < 320 and c.sample is c.quantize is None and not Path(c.data, "manifest.json").exists():
        raise BadInput(f"vocab_size must be at least 320 to train a tokenizer, got {c.vocab_size}")
    wide = 64 * math.ceil(8 * c.n_embd / 3 / 64) if c.mlp == "swiglu" else 4 * c.n_embd
    windows = c.global_batch_size // (c.dp or max(1, world_size(c) // (c.tp * c.pp))) or 1           # a step and rank
    most = min(8, windows if c.pp == 1 else max(1, windows // (2 * c.pp)))
    micro = c.micro_batch_size or max(n for n in range(1, most + 1) if windows % n == 0)
    c = dataclasses.replace(c, micro_batch_size=micro, out=c.out or f"out/{c.config}",
                            n_kv_head=c.n_kv_head or c.n_head, head_dim=c.head_dim or c.n_embd // c.n_head,
                            n_ff=c.n_ff or wide)
    try:
        assert c.model                                       # ModelConfig checks its own rules
    except ValueError as error:
        raise BadInput(str(error)) from None
    split = {name: getattr(c, name) for name in ("n_head", "n_kv_head", "n_ff", "vocab_size")}
    split |= {"seq_len": c.seq_len} if c.sequence_parallel else {}
    if any(value % c.tp for value in split.values()):
        raise BadInput(f"tp must divide {', '.join(f'{name} {value}' for name, value in split.items())}, got {c.tp}")
    if stages(c) > c.n_layer:
        times = f" x pp_chunks {c.pp_chunks}" if stages(c) > c.pp else ""
        raise BadInput(f"pp {c.pp}{times} makes {stages(c)} stages of at least a layer each, n_layer is {c.n_layer}")
    zb = c.pp_schedule == "zb" and c.pp > 1
    if c.compile == "on" and not compilable(c):
        raise BadInput(f"compile must be off with {'--tp' if c.tp > 1 else '--pp-schedule zb' if zb else '--zero 3'}, "
                       "got on")
    if c.recompute != "none" and zb:
        raise BadInput(f"recompute must be none with --pp-schedule zb, config {c.config} or a flag says {c.recompute}")
    return c


def world_size(c: Config) -> int:
    """Ranks there are, or for --dry-run those that are asked about."""
    if dist.is_initialized():
        return dist.get_world_size()
    there = int(os.environ.get("WORLD_SIZE", 1))
    return max(1, c.dp) * c.tp * c.pp if c.dry_run and there == 1 else there


def stages(c: Config) -> int:
    return c.pp * (c.pp_chunks if c.pp_schedule == "interleaved" and c.pp > 1 else 1)


def schedule(c: Config, micro_batches: int) -> list:
    """Each pipeline rank's operations of a step; of a pipeline of one, plain accumulation."""
    if c.pp == 1:
        return parallel.one_f_one_b(1, micro_batches)
    if c.pp_schedule == "interleaved":
        return parallel.interleaved(c.pp, micro_batches, c.pp_chunks)
    return parallel.SCHEDULES[c.pp_schedule](c.pp, micro_batches)


# ---- the machine -----------------------------------------------------------------------------------------------------

class World:
    """This process among its peers: rank, size, device, and the group to reduce over (None: alone)."""

    def __init__(self, c: Config):
        self.rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        self.size = world_size(c)
        if self.size > 1 and "RANK" not in os.environ and c.dry_run:
            # ranks that are not there: groups exist, nothing is sent
            from torch.testing._internal.distributed.fake_pg import FakeStore
            dist.init_process_group("fake", rank=0, world_size=self.size, store=FakeStore())
        if dist.is_initialized():
            self.rank = dist.get_rank()
        name = c.device
        if name == "auto":        # not Apple's: no float64 there for the sums below, and untried
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            name = accelerator.type if accelerator and accelerator.type != "mps" else "cpu"
        try:
            self.device = torch.device(name)
            if self.device.type != "cpu":
                if self.device.index is None:
                    self.device = torch.device(name, local % torch.accelerator.device_count())
                torch.accelerator.set_device_index(self.device.index)
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError, ZeroDivisionError, NotImplementedError) as error:
            why = "there is none" if isinstance(error, ZeroDivisionError) else str(error).splitlines()[0]
            raise BadInput(f"device must be usable here, got {name!r}: {why}") from None
        dp = c.dp or max(1, self.size // (c.tp * c.pp))
        if dp * c.tp * c.pp != self.size:
            wanted = dp * c.tp * c.pp
            raise BadInput(f"dp x tp x pp must be the number of ranks: {dp} x {c.tp} x {c.pp} is {wanted}, there "
                           + (f"is 1; start them with --nproc {wanted}, or torchrun" if self.size == 1 else
                              f"are {self.size}"))
        if c.global_batch_size % (c.micro_batch_size * dp):
            raise BadInput("global_batch_size must be a multiple of micro_batch_size x dp = "
                           f"{c.micro_batch_size} x {dp} = {c.micro_batch_size * dp}, got {c.global_batch_size}")
        accum = c.global_batch_size // (c.micro_batch_size * dp)
        if c.pp_schedule == "interleaved" and accum % c.pp:
            raise BadInput(f"pp_schedule interleaved needs a multiple of pp = {c.pp} micro-batches a step, got "
                           f"{c.global_batch_size} / ({c.micro_batch_size} x dp {dp}) = {accum}")
        self.group = self.host = None
        self.step = 0                                     # where the run is, for whoever has to say what went wrong
        if self.size > 1:
            if not dist.is_initialized():
                # torchrun's store outlives its ranks: a new start must not find the addresses of the one before
                timeout, attempt = datetime.timedelta(seconds=c.timeout), os.environ.get("TORCHELASTIC_RESTART_COUNT")
                store, *_ = next(dist.rendezvous("env://", timeout=timeout))
                dist.init_process_group(dist.get_default_backend_for_device(self.device), timeout=timeout,
                                        store=dist.PrefixStore(f"start {attempt}", store), rank=self.rank,
                                        world_size=self.size,
                                        device_id=None if self.device.type == "cpu" else self.device)
            self.group = dist.group.WORLD
            # objects, files and long waits go over the hosts: rank 0 may prepare data for hours
            if not c.dry_run:
                self.host = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        self.mesh = parallel.Mesh(dp, c.tp, c.pp, self.device.type, c.timeout)

    def sum(self, tensor):
        """All-reduce in place over all ranks."""
        return parallel.all_reduce(tensor, self.group)

    def first(self, work):
        """work() done by rank 0 alone: its result on every rank, or its BadInput or DataError raised on every rank."""
        answer = [None, None]
        if self.rank == 0:
            try:
                answer = [work(), None]
            except (BadInput, data.DataError) as error:
                answer = [None, error]
            except OSError as error:
                answer = [None, data.DataError(f"{error.filename}: {error.strerror}")]
        if self.host is not None:
            dist.broadcast_object_list(answer, src=0, group=self.host)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


# dense bf16 peak, FLOP/s: vendors' datasheets as collected in stas00/ml-engineering (2026-08-22)
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "B300": 2250e12,
         "MI300X": 1307.4e12, "MI325X": 1300e12, "MI355X": 2500e12, "L40S": 362e12, "L4": 121e12, "4090": 165.2e12,
         "V100": 125e12, "T4": 65e12}


def peak_flops(device) -> tuple[float, str]:
    """FLOP/s to hold MFU against, and where the number comes from: a table for GPUs, a short measurement elsewhere."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = set(re.split(r"[\s-]", name))
        for key, peak in PEAKS.items():
            if set(key.split()) <= words:
                return peak, f"{key} dense bf16"
    a, best = torch.randn(1024, 1024, device=device), 0.0
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best, "measured matmul, fp32"


def peak_memory(device) -> int:
    """Most bytes this process has held: the allocator's on an accelerator, resident memory on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.accelerator.max_memory_allocated(device)


# ---- the parts of a run ----------------------------------------------------------------------------------------------

def lr_at(step: int, c: Config) -> float:
    """Learning rate of update number `step`, counted from 0."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    low = c.lr * c.min_lr_ratio
    if c.schedule == "cosine":
        done = (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        return low + (c.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    left = (c.steps - step) / max(1.0, c.steps * c.decay_fraction)                      # wsd
    return low + (c.lr - low) * min(1.0, left)


def compilable(c: Config) -> bool:
    return c.tp == 1 and (c.pp == 1 or c.pp_schedule != "zb") and c.zero < 3


def compiles(c: Config, device) -> bool:
    wanted = c.compile == "on" or c.compile == "auto" and device.type != "cpu" and compilable(c)
    return wanted and device.type != "meta"


def make_stage(c: Config, device, mesh=None, at: int = 0, read=None, dtype=torch.float32, sync=None) -> net.GPT:
    """Stage `at` of the model on the device (of one: all of it), this rank's part of its width: weights by name from
    keyed_init, or from read(name, box), a checkpoint's Reader.read, in dtype; of a low one, with its compute policy.
    No rank ever holds more: at --zero 3 not even that, but shards, and who gathers them is appended to `sync`."""
    backend = c.attention if device.type == "meta" else flash_attn.resolve_backend(c.attention, device)
    attention = functools.partial(flash_attn.flash_attention, backend=backend)
    if backend == "sdpa":                                # the model's own, which shares one mask among its layers
        attention = net.sdpa_attention
    low = dtype if dtype.itemsize == 2 else None
    if low:
        # split layers, by width or by backward, must see the weight and the input themselves
        policy = precision.ComputePolicy(low, emulate=device.type == "cpu" and c.tp == 1 and c.pp_schedule != "zb")
        # low inputs whatever the rotation made of them, also where "selective" runs the core again, in backward
        attention = policy.as_operation(attention)
    with torch.device("meta"):
        gpt = net.GPT(c.model, attention, recompute=c.recompute)
    if mesh is not None and mesh.tp > 1:
        parallel.tensor_parallel(gpt, mesh.tp_group, sequence_parallel=c.sequence_parallel)
    if mesh is not None and mesh.pp > 1:
        first, last = at == 0, at == stages(c) - 1
        mine = range(at * c.n_layer // stages(c), (at + 1) * c.n_layer // stages(c))
        gpt.model.layers = torch.nn.ModuleDict({n: x for n, x in gpt.model.layers.items() if int(n) in mine})
        if c.tie_embeddings and (first or last):         # one weight, in two stages: its gradient is the sum of two
            gpt.lm_head.weight.sum_over = (*getattr(gpt.lm_head.weight, "sum_over", ()), mesh.ends_group)
        if not first:
            gpt.model.embed_tokens = gpt.model.embed_positions = None
        if not last:
            gpt.model.norm = gpt.lm_head = None
    # what a master begins with is rounded, wherever it lies
    read = read or (lambda name, box: net.keyed_init(name, box, c.seed, c.model).to(dtype).float())
    sharded = c.zero == 3 and sync is not None
    if not sharded:
        gpt = net.fill(gpt, read, device, dtype)
    if low:
        if c.precision == "fp8":
            precision.fp8_products(gpt, group=mesh and mesh.tp_group)
        policy.applied(gpt)
        for p in gpt.parameters():
            p.grad_dtype = torch.float32
    if sharded:
        # the shards are the masters
        kept = torch.float32 if low and c.master_weights else dtype
        sync.append(zero.FullyShard(gpt, mesh.dp_group, blocks=gpt.model.layers.values(), compute_dtype=low,
                                    reduce_dtype=low and torch.float32, init=lambda p: read(
                                        p.full_name, p.box).to(device, kept)))
        return gpt
    if compiles(c, device):
        for block in gpt.model.layers.values():            # inside what recomputation runs again
            block.run = torch.compile(block.run)
        if gpt.lm_head is not None:
            gpt.lm_head.softmax = torch.compile(gpt.lm_head.softmax)
    return gpt


class Model(torch.nn.Module):
    """This rank's part of the model: its stages (most often one), and `sync`, who sums their gradients over dp."""

    def __init__(self, c: Config, world: World, read=None, dtype=None):
        super().__init__()
        dtype = dtype or dtype_of(c)
        self.c, self.mesh, self.world = c, world.mesh, world
        self.dtype = torch.promote_types(dtype, torch.float32)                                  # of hidden states
        self.sync, self.no_sync = [], contextlib.nullcontext
        self.chunks = torch.nn.ModuleList(make_stage(c, world.device, self.mesh, chunk * c.pp + self.mesh.pp_rank, read,
                                                     dtype, self.sync) for chunk in range(stages(c) // c.pp))
        if c.zero == 0:
            self.sum_with(parallel.DataParallel(self.chunks, self.mesh.dp_group))
        self.last = self.mesh.pp_rank == c.pp - 1                           # where losses are
        self.counts = self.last and self.mesh.tp_rank == 0                  # and counted
        self.on_op = None                                                   # run_schedule's clock

    def sum_with(self, sync):
        """A DataParallel, or at --zero 1 and 2 the optimizer."""
        self.sync, self.no_sync = [sync], sync.no_sync

    def finish_gradient_synchronization(self):
        for sync in self.sync:
            sync.finish_gradient_synchronization()

    def run(self, batches, seed=None) -> list:
        """Forward, and with a seed (of the gradient) backward, of micro-batches -> nll of each, on the last stage."""
        c, chunks, m = self.c, self.chunks, len(batches)
        order = parallel.forward_only(c.pp, m, len(chunks)) if seed is None else schedule(c, m)
        split = c.tp if c.sequence_parallel else 1

        def hidden_like(batch):
            B, T = batch["tokens"].shape
            return torch.empty(B, T // split, c.n_embd, dtype=self.dtype, device=self.world.device)

        return parallel.run_schedule(order, chunks, batches,
                                     self.mesh.pp_groups, seed=seed, hidden_like=hidden_like, no_sync=self.no_sync,
                                     on_op=self.on_op, timeout=c.timeout)


def make_optimizer(model, c: Config):
    """AdamW of what this rank updates. optimizer.owned: those of its tensors that no lower rank updates too."""
    matrices = [p for p in model.parameters() if len(p.box) >= 2]
    vectors = [p for p in model.parameters() if len(p.box) < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    options = dict(lr=c.lr, betas=(c.beta1, c.beta2), eps=c.adam_eps, fused=True)
    adamw = torch.optim.AdamW
    if dtype_of(c).itemsize == 2:
        adamw = functools.partial(precision.MasterWeights, optimizer_cls=adamw, keep=c.master_weights)
    if c.zero in (1, 2):
        optimizer = zero.ShardedOptimizer(groups, adamw, group=model.mesh.dp_group, stage=c.zero,
                                          order=model.parameters(), **options)
        model.sum_with(optimizer)
    else:
        optimizer = adamw(groups, **options)
    optimizer.owned = parallel.owned(updated(optimizer), model.world.host)
    return optimizer


def dtype_of(c: Config) -> torch.dtype:
    """Of parameters and matrix products; `auto` that no device has resolved is float32."""
    return precision.PRECISIONS.get(c.precision, torch.float32)


def updated(optimizer) -> list:
    return [p for group in optimizer.param_groups for p in group["params"]]


def resolve(c: Config, device) -> Config:
    """auto -> what it means on this device. Raises BadInput for a precision or an attention that it lacks."""
    kind, attention, cuda = c.precision, c.attention, device.type == "cuda"
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "auto":
        kind = "bf16" if has_bf16 else "fp32"
    lacks = not has_bf16 or torch.version.hip is not None if kind == "tf32" else cuda and not has_bf16
    if lacks and kind in ("tf32", "bf16", "fp8"):
        raise BadInput(f"precision must be one that the device has, {kind} needs an NVIDIA GPU of Ampere or later, got "
                       f"{device}")
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        attention = flash_attn.resolve_backend(attention, device)
    except RuntimeError as error:
        raise BadInput(f"attention must be one that runs here: {error}") from None
    return dataclasses.replace(c, precision=kind, attention=attention)


def to_device(batch, c: Config, device):
    keep = ("tokens", "targets", "documents") if c.document_mask else ("tokens", "targets")
    return {name: batch[name].to(device, non_blocking=True) for name in keep}


def train_step(model, optimizer, loader, step: int, c: Config, world: World, asked=(), on_phase=lambda *at: None,
               scaler: precision.LossScaler | None = None):
    """One update. Returns (loss in nats a target, gradient norm before clipping, whether any rank was `asked` to stop).
    A non-finite loss or norm changes nothing but the scaler's scale. Raises FloatingPointError if that is at its
    floor."""
    on_phase(step, "data")
    accum = c.global_batch_size // (c.micro_batch_size * world.mesh.dp)
    batches = [to_device(next(loader), c, world.device) for _ in range(accum)]
    # 1. N = targets in the global batch
    N = parallel.all_reduce(sum((b["targets"] >= 0).sum() for b in batches), world.mesh.dp_group)
    # 2. d/dw scale sum(nll) / N, micro-batch by micro-batch
    on_phase(step, "forward_backward")
    scale = scaler.scale if scaler else 1.0
    seed = scale / N.double()
    if c.precision == "fp16":           # in the loss, ahead of the head's products: an unlikely word's p is below 2^-25
        for batch in batches:
            batch["weights"] = seed * torch.ones_like(batch["targets"], dtype=torch.float32)
        seed = torch.ones_like(seed)
    nlls = model.run(batches, seed=seed)
    # 3. the sum over dp, and over whatever else holds a part
    on_phase(step, "reduce")
    model.finish_gradient_synchronization()
    parallel.reduce_partial_gradients(updated(optimizer))
    # 4. loss, |grad|^2 (replicas: the lowest rank's alone counts) and the wish to stop
    total = torch.zeros(3, dtype=torch.float64, device=world.device)
    if model.counts:
        total[0] = torch.stack([nll.double().sum() for nll in nlls]).sum() / N
    total[1] = parallel.squared_norm(p.grad for p in optimizer.owned)
    total[2] = bool(asked)
    loss, sumsq, stop = world.sum(total).tolist()
    norm = math.sqrt(sumsq) / scale if math.isfinite(sumsq) else math.nan
    found_inf = not (math.isfinite(loss) and math.isfinite(norm))
    # 5. and 6.
    if not found_inf:
        on_phase(step, "update")
        factor = (c.grad_clip / norm if c.grad_clip and norm > c.grad_clip else 1.0) / scale
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in updated(optimizer)], factor)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, c)
        optimizer.step()
    optimizer.zero_grad()
    if scaler:
        scaler.update(found_inf)
    return loss, norm, stop > 0


@torch.no_grad()
def evaluate(model, loader, c: Config, world: World) -> dict:
    """Validation loss in nats a target, and bits per byte of text, over the whole split or its first eval_windows."""
    token_bytes = torch.from_numpy(loader.tokenizer.token_bytes).to(world.device)
    total = torch.zeros(3, dtype=torch.float64, device=world.device)
    windows = min(loader.num_windows, c.eval_windows or loader.num_windows)
    each = math.ceil(windows / (world.mesh.dp * c.micro_batch_size))               # batches: as many on every rank
    firsts = [(i * world.mesh.dp + world.mesh.dp_rank) * c.micro_batch_size for i in range(each)]
    for at in range(0, each, 2 * c.pp):                                            # enough for every stage to have work
        batches = []
        for first in firsts[at:at + 2 * c.pp]:
            batch = loader.batch(range(min(first, windows - 1), min(first + c.micro_batch_size, windows)))
            if first >= windows:
                batch["targets"].fill_(-1)                                                         # does not count
            batches.append(to_device(batch, c, world.device))
        for batch, nll in zip(batches, model.run(batches), strict=True):
            if model.counts:
                there = batch["targets"] >= 0
                text = token_bytes[batch["targets"].clamp(min=0)] * there
                total += torch.stack([nll.double().sum(), there.sum(), text.sum()])
    nats, targets, text_bytes = world.sum(total).tolist()
    # bpb = nats / ln 2 / bytes
    return {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / text_bytes, "val_targets": int(targets)}


def is_finite(model, world: World) -> bool:
    """Whether every weight is: the last update of a run has no later loss to tell."""
    bad = torch.stack([p.detach().isfinite().logical_not().any() for p in model.parameters()]).any().double()
    return world.sum(bad).item() == 0


def checkpoint_pieces(optimizer):
    """(name, box, tensor) of every weight this rank owns and of what the optimizer keeps for it: NAME.exp_avg, ...; a
    number that all pieces share (NAME.step) is written beside the first. A shard is written as boxes. The weight is its
    float32 master where there is one, and float32 in any case: a checkpoint knows no precision."""
    for p in optimizer.owned:
        lo, hi = getattr(p, "flat", (0, p.numel()))
        boxes = list(data.boxes(p.box, lo, hi))
        state = dict(optimizer.state[p])
        weight = state.pop("master", p.to(torch.promote_types(p.dtype, torch.float32)))
        for name, value in ((p.full_name, weight), *((f"{p.full_name}.{key}", x) for key, x in state.items())):
            if value.shape == p.shape:
                for box, a, b in boxes:
                    yield name, box, value.flatten()[a - lo:b - lo].view([stop - start for start, stop, _ in box])
            elif lo == 0 < hi and all(start == 0 for start, _, _ in p.box):
                yield name, (), value


def load_optimizer(optimizer, reader):
    """No more of a tensor is read than this rank updates."""
    for p in updated(optimizer):
        boxes = [box for box, *_ in data.boxes(p.box, *getattr(p, "flat", (0, p.numel())))]

        def read(name, boxes=boxes, p=p):
            parts = [reader.read(name, box).flatten() for box in boxes] or [torch.empty(0)]
            return torch.cat(parts).view(p.shape).to(p.device)

        if "master" in optimizer.state[p]:
            optimizer.state[p]["master"].copy_(read(p.full_name))
        for name in reader.names():
            if name.startswith(p.full_name + ".") and "." not in (key := name[len(p.full_name) + 1:]):
                if reader.tensors[name]["shape"]:
                    optimizer.state[p][key] = read(name)
                else:
                    optimizer.state[p][key] = reader.read(name, ()).to(p.device)


def generate_text(gpt, tokenizer, ids, c: Config, seed: int) -> str:
    """The continuation of token ids, decoded, printable."""
    device = next(gpt.parameters()).device
    # a length that grows by one would be compiled again and again
    eager = torch.compiler.set_stance("force_eager") if compiles(c, device) else contextlib.nullcontext()
    with eager:
        new = gpt.generate(torch.tensor([ids], device=device), c.max_new_tokens, c.temperature, c.top_k or None,
                           c.top_p, seed=seed, stop=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    return tokenizer.decode(new[0, len(ids):].tolist()).encode("utf-8", "replace").decode()


# ---- the run's folder ------------------------------------------------------------------------------------------------

class Folder:
    """out/RUN: one process at a time, lines appended to metrics.jsonl, checkpoints written whole and pruned."""

    def __init__(self, c: Config, world: World):
        self.path, self.world, self.keep = Path(c.out), world, c.keep_checkpoints
        self.checkpoints, self.held = self.path / "checkpoints", contextlib.ExitStack()
        self.metrics = None

    def __enter__(self):
        self.world.first(self.open)
        return self

    def __exit__(self, *error):
        self.held.close()

    def open(self):
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(data.locked(self.path / ".lock", wait=False))
        except BlockingIOError:
            raise BadInput(f"out must not be in use by another run, {self.path} is") from None
        except OSError as error:
            raise BadInput(f"out must be a folder that can be written, {self.path}: {error.strerror}") from None
        for stale in self.checkpoints.glob(".*.tmp"):                     # of a save that was killed
            shutil.rmtree(stale)

    def newest(self) -> data.Reader | None:
        """The newest intact checkpoint; all ranks agree which. Damaged newer ones are named and put aside."""
        def find():
            reader, damaged = data.newest_checkpoint(self.checkpoints)
            for path, line in damaged.items():
                if reader is not None:
                    path.rename(path.with_name(f"damaged-{path.name}-{int(time.time())}"))
                print(f"damaged checkpoint passed over: {line}")
            if damaged and reader is None:
                raise BadInput(f"out must hold an intact checkpoint to go on, {self.path} holds only damaged ones")
            return reader and reader.folder

        path = self.world.first(find)
        return path and data.Reader(path)

    def save(self, step: int, pieces, meta: dict):
        """Write a checkpoint, then drop what is neither among the newest nor the best of those evaluated."""
        data.write_checkpoint(self.checkpoints / f"step-{step:08d}", pieces, meta, group=self.world.host)
        if self.world.rank == 0:
            losses = {}
            for path in sorted(self.checkpoints.glob("step-*")):
                with contextlib.suppress(data.DataError):                 # damaged since: left alone
                    meta = data.Reader(path).meta
                    evaluated = meta["evaluation"] and meta["evaluation"]["step"] == meta["step"]
                    losses[path] = meta["evaluation"]["val_loss"] if evaluated else math.inf
            best = min(losses, key=losses.get)
            for path in list(losses)[:-self.keep]:
                if path != best or losses[path] == math.inf:
                    shutil.rmtree(path)

    def begin(self, step: int, c: Config, tokenizer):
        """What stands beside the checkpoints, and metrics.jsonl up to `step` (a run killed later wrote more lines,
        the last one perhaps torn), open for those to come."""
        if self.world.rank != 0:
            return
        data.write_atomic(self.path / "config.json", json.dumps(dataclasses.asdict(c), indent=1))
        data.write_atomic(self.path / "tokenizer.model", tokenizer.proto)
        path, kept = self.path / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        data.write_atomic(path, "".join(kept))
        self.metrics = self.held.enter_context(open(path, "a"))

    def trace(self, events: list):
        """(Op, start, end) of every rank, as a file for ui.perfetto.dev."""
        timeline = parallel.executed_timeline(parallel.gather_objects(events, self.world.host))
        if self.world.rank == 0:
            data.write_atomic(self.path / "trace.json", json.dumps(parallel.chrome_trace(timeline)))

    def log(self, **entry):
        if self.metrics:
            self.metrics.write(json.dumps(entry) + "\n")
            self.metrics.flush()


def refuse_other_run(c: Config, saved: dict):
    """Go on only with what was begun: every field that affects training must be as it was."""
    for f in fields(Config):
        if f.metadata["affects_training"] and f.name in saved and getattr(c, f.name) != saved[f.name]:
            raise BadInput(f"{f.name} must be {saved[f.name]} to go on with the run in {c.out}, got "
                           f"{getattr(c, f.name)}; name another --out for a new run")


# ---- what it costs ---------------------------------------------------------------------------------------------------

def budget(c: Config, world: World) -> dict:
    """The run in numbers, before it starts. Bytes are those of the fullest rank, activations' as in float32 (in a low
    precision they are fewer); FLOPs the whole run's."""
    N, tokens, at = net.num_params(c.model), c.steps * c.tokens_per_step, layout(c, world)
    most = max(x["parameters"] for x in at["ranks"])
    # a rank's part of the width as a model of its own; tp without sequence parallelism keeps norms and residuals whole
    part = dataclasses.replace(c.model, n_layer=max(x["layers"] for x in at["ranks"]), n_head=c.n_head // c.tp,
                               n_kv_head=c.n_kv_head // c.tp, n_ff=c.n_ff // c.tp, vocab_size=c.vocab_size // c.tp)
    split = c.tp if c.sequence_parallel else 1
    activations = net.activation_bytes(c.model if split > 1 else part, c.micro_batch_size, c.seq_len,
                                       recompute=c.recompute,
                                       document_mask=c.document_mask and c.attention in ("auto", "sdpa"),
                                       score_matrices=2 * (c.attention == "reference")) / split
    if split > 1:
        activations *= part.n_layer / c.n_layer
    low = dtype_of(c)
    whole = c.zero < 3 or not c.master_weights                              # otherwise the float32 shard is the master
    each = precision.bytes_per_parameter(low if whole else torch.float32, c.master_weights)
    dp, states = at["dp"], zero.memory_per_rank(most, c.zero, at["dp"], param_bytes=each["weights"],
                                                grad_bytes=each["gradients"], state_bytes=each["states"])
    bucket = min(10e6, 4 * most) if c.zero < 3 else 4 * max(x["unit"] for x in at["ranks"])
    buffers = {0: 4 * most * (at["micro_batches"] > 1),                           # beside those that are being added up
               1: bucket * (1 + 1 / dp), 2: bucket * (3 + 1 / dp), 3: bucket * (3 + 1 / dp)}[c.zero] * (dp > 1)
    gathered = 2 * bucket * low.itemsize / 4 * (c.zero == 3)                                 # this layer and the next
    memory = {"parameters": round(states["parameters"] + gathered), "gradients": round(states["gradients"] + buffers),
              "optimizer": round(states["states"]),
              "activations": round(activations * max(x["stored"] for x in at["ranks"]))}
    return {"config": dataclasses.asdict(c), "parameters": N, "embedding_parameters": c.vocab_size * c.n_embd,
            "tokens_per_step": c.tokens_per_step, "steps": c.steps, "tokens": tokens,
            "tokens_per_parameter": tokens / N, "grad_accum_steps": at["micro_batches"],
            "flops_per_token": net.flops_per_token(c.model, c.seq_len),
            "flops": tokens * net.flops_per_token(c.model, c.seq_len),
            "memory_bytes": memory | {"total": sum(memory.values())}, "layout": at}


def describe(b: dict, c: Config) -> str:
    unit, scale = ("GB", 1e9) if b["memory_bytes"]["total"] > 1e9 else ("MB", 1e6)
    memory = ", ".join(f"{name} {size / scale:.1f}" for name, size in b["memory_bytes"].items())
    at, grid = b["layout"], ""
    if at["dp"] * at["tp"] * at["pp"] > 1:
        places = itertools.product(range(at["pp"]), range(at["dp"]), range(at["tp"]))
        shown = [f"{r} ({p} {d} {t})" for r, (p, d, t) in enumerate(itertools.islice(places, 8))]
        axes = sorted({axis for x in at["ranks"] for axis in x["bytes_sent"]})
        sent = {axis: max(x["bytes_sent"].get(axis, 0) for x in at["ranks"]) for axis in axes}
        grid = (f"mesh       pp {at['pp']} x dp {at['dp']} x tp {at['tp']}: {', '.join(shown)}"
                f"{', ...' if at['dp'] * at['tp'] * at['pp'] > 8 else ''}\n")
        if at["pp"] > 1:
            grid += (f"pipeline   {at['schedule']}, {at['micro_batches']} micro-batches, bubble {at['bubble']:.1%}; "
                     f"layers {', '.join(str(x['layers']) for x in at['ranks'])}\n")
        sent = ", ".join(f"{axis} {size / 1e6:,.1f}" for axis, size in sent.items() if axis != "world")
        grid += f"messages   {sent} MB a step, sent by a rank\n"
        if c.zero > 1 and at["micro_batches"] > 1 and at["dp"] > 1:
            most = max(x["parameters"] for x in at["ranks"])
            low = dtype_of(c).itemsize
            each, once = (sum(sent * (low if what == "all_gather" else 4) for what, sent in zero.comm_volume(
                most, stage, at["dp"], at["micro_batches"]).items()) / 1e6 for stage in (c.zero, 1))
            grid += (f"zero {c.zero}     sends {each:,.1f} MB of them, with every one of {at['micro_batches']} "
                     f"micro-batches; stage 1 would send {once:,.1f} MB, once a step\n")
    return (f"model      {c.config}: {b['parameters']:,} parameters, {b['embedding_parameters']:,} in the embedding\n"
            f"run        {c.steps:,} steps x {b['tokens_per_step']:,} tokens = {b['tokens'] / 1e6:,.1f} M tokens, "
            f"{b['tokens_per_parameter']:.1f} a parameter; {b['flops']:.2e} FLOPs\n"
            f"memory     {memory} {unit} a rank, predicted{', activations in float32' * (dtype_of(c).itemsize == 2)}\n"
            f"{grid}")


def time_tokens(c: Config, device) -> float:
    """FLOP/s of forward and backward, from a few passes of the model cut to one layer; on a CPU, over few tokens."""
    small = dataclasses.replace(c, n_layer=1, tie_embeddings=True, compile="off")
    batch, length = c.micro_batch_size, c.seq_len
    if device.type == "cpu":
        batch, length = (batch if net.num_params(small.model) < 2e7 else 1), min(length, 256)
    gpt = make_stage(small, device, read=lambda name, box: torch.full([b - a for a, b, _ in box], 0.01),
                     dtype=dtype_of(c))
    tokens = torch.randint(c.vocab_size, (batch, length), device=device)
    best, end = 0.0, time.perf_counter() + 2
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        loss, _ = gpt(tokens, tokens)
        loss.backward()
        loss.detach().item()
        best = max(best, batch * length * net.flops_per_token(small.model, length) / (time.perf_counter() - start))
    return best


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def layout(c: Config, world: World) -> dict:
    """What the mesh does to memory and messages: figures of the fullest pipeline rank, from its stages built without
    memory. Bytes as sent in a ring, a step."""
    mesh, m = world.mesh, c.global_batch_size // (c.micro_batch_size * world.mesh.dp)
    timeline, low = parallel.simulate(schedule(c, m)), dtype_of(c).itemsize
    ranks = []
    for r in range(c.pp):
        mine = range(r, stages(c), c.pp)
        chunks = [make_stage(c, torch.device("meta"), mesh, at,
                             lambda name, box: torch.empty([b - a for a, b, _ in box], device="meta")) for at in mine]
        params, layers = [p for chunk in chunks for p in chunk.parameters()], sum(len(x.model.layers) for x in chunks)
        volume = zero.comm_volume(sum(p.numel() for p in params), c.zero, mesh.dp, m)
        share = mesh.dp / max(1, mesh.dp - 1)                                                # sent -> payload
        sharded = {what: (None, round(sent * share) * (low if what == "all_gather" else 4))
                   for what, sent in volume.items()}
        calls = parallel.step_calls(mesh, (mine, stages(c)), 2 * layers, params, micro_batches=m,
                                    gradients=sharded | {"all_reduce": (None, 4 * len(params) + 4)} if c.zero else None,
                                    shape=(c.micro_batch_size, c.seq_len, c.n_embd),
                                    sequence_parallel=c.sequence_parallel, low=low,
                                    recomputed=layers if c.recompute == "full" else 0)
        sent = {}
        for (axis, collective), (_, payload) in calls.items():
            n = {"dp": mesh.dp, "tp": mesh.tp, "ends": 2}.get(axis, world.size)
            call = parallel.Call(axis, "", collective, payload, n, (), torch.float32, None)
            sent[axis] = sent.get(axis, 0) + call.wire
        units = [x for chunk in chunks for x in (*chunk.model.layers.values(), chunk.model.embed_tokens, chunk.lm_head)]
        ranks.append({"parameters": sum(p.numel() for p in params), "layers": layers, "bytes_sent": sent,
                      "stored": timeline.stored[r] / len(mine),
                      "unit": max(sum(p.numel() for p in x.parameters()) for x in units if x is not None)})
    return {"dp": mesh.dp, "tp": mesh.tp, "pp": mesh.pp, "schedule": c.pp_schedule, "micro_batches": m, "ranks": ranks,
            "bubble": timeline.bubble}


def dry_run(c: Config, world: World):
    b = budget(c, world)
    if world.rank == 0 and not c.json:
        print(describe(b, c), end="", flush=True)
    rate = time_tokens(c, world.device)
    if world.rank != 0:
        return
    b |= {"flops_per_second": rate, "seconds": b["flops"] / rate / world.size / (1 - b["layout"]["bubble"])}
    if c.json:
        print(json.dumps(b))
        return
    took = f"{b['seconds'] / 86400:,.1f} days" if b["seconds"] > 86400 else clock(b["seconds"])
    print(f"time       about {took} on {world.size} x {world.device.type} at "
          f"{rate / 1e9:,.0f} GFLOP/s, timed on this machine's; messages not counted")


def card(c: Config, b: dict, manifest: dict, step: int, seconds: float) -> dict:
    """What the model is made of: stands in every checkpoint and, at the end, in card.md."""
    tokens = step * c.tokens_per_step
    return {"config": c.config, "sources": manifest["sources"], "knowledge_cutoff": manifest["knowledge_cutoff"],
            "data_fingerprint": manifest["fingerprint"], "parameters": b["parameters"], "step": step, "tokens": tokens,
            "tokens_per_parameter": tokens / b["parameters"], "epochs": tokens / manifest["splits"]["train"]["tokens"],
            "flops": tokens * b["flops_per_token"], "wall_seconds": round(seconds, 1), "torch": torch.__version__}


# ---- the loop --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def stop_signals():
    """A list that SIGTERM and Ctrl-C fill: the step in progress ends, is saved, and the run with it. A second Ctrl-C
    interrupts at once."""
    asked = []

    def handler(number, frame):
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def open_data(c: Config, world: World):
    """Loaders of both splits, from a prepared folder or from text that rank 0 prepares first."""
    def find():
        if Path(c.data, "manifest.json").exists() and Path(c.data, "tokenizer.model").exists():
            return Path(c.data)
        print(f"data       preparing {c.data}", flush=True)
        return data.prepare(c.data.split(","), vocab_size=c.vocab_size,
                            log=lambda line: print("           " + line, flush=True))

    path = world.first(find)
    shape = dict(micro_batch_size=c.micro_batch_size, seq_len=c.seq_len)
    loader = data.Loader(path, **shape, seed=c.seed, dp_rank=world.mesh.dp_rank, dp_size=world.mesh.dp)
    if loader.vocab_size > c.vocab_size:
        raise BadInput(f"vocab_size must be at least the {loader.vocab_size} of {path}, got {c.vocab_size}")
    return loader, data.Loader(path, **shape, split="val")


def train(c: Config, world: World, on_phase=lambda *at: None) -> int:
    """Train, or go on training, to c.steps. Returns the exit code. on_phase(step, phase) is called as a step proceeds:
    "data", "forward_backward", "reduce", "update", "evaluate", "checkpoint"."""
    start = time.perf_counter()
    loader, val = open_data(c, world)
    if world.host is not None:
        parallel.set_timeout(world.host, c.timeout)                       # from here on nobody works for hours alone
    with Folder(c, world) as folder, stop_signals() as asked:
        return run(c, world, folder, loader, val, asked, on_phase, start)


def run(c: Config, world: World, folder: "Folder", loader, val, asked: list, on_phase, start: float) -> int:
    device, chief, manifest, tokenizer = world.device, world.rank == 0, loader.manifest, loader.tokenizer
    say = functools.partial(print, flush=True) if chief else (lambda line: None)

    # the model and its optimizer: from the newest checkpoint, or from the seed
    reader = folder.newest()
    step, skipped, facts, evaluation, stopping = 0, 0, {"wall_seconds": 0.0}, None, False
    if reader is not None:
        if c.resume == "never":
            raise BadInput(f"resume must be auto to go on with the run in {c.out}, got never; name another --out")
        refuse_other_run(c, reader.meta["config"])
        if loader.state_dict()["fingerprint"] != reader.meta["loader"]["fingerprint"]:
            raise BadInput(f"data must be the text that the run in {c.out} began with, {c.data} is another or has "
                           "changed; name another --out")
        loader.load_state_dict(reader.meta["loader"])
        step, facts, evaluation = (reader.meta[name] for name in ("step", "card", "evaluation"))
    world.step = step
    model = Model(c, world, reader and reader.read)
    optimizer = make_optimizer(model, c)
    scaler = precision.LossScaler(c.loss_scale) if c.precision == "fp16" and c.loss_scale else None
    if reader is not None:
        load_optimizer(optimizer, reader)
        if scaler:
            scaler.load_state_dict(reader.meta["loss_scaler"])
            skipped = reader.meta["loss_scaler"].get("skipped", 0)
    folder.begin(step, c, tokenizer)

    b, (peak, peak_source) = budget(c, world), peak_flops(device)
    trained_on = manifest["splits"]["train"]["tokens"]
    say(describe(b, c) +
        f"data       {loader.path}: {trained_on:,} training tokens, so {b['tokens'] / trained_on:.2f} epochs; "
        f"knowledge cutoff {manifest['knowledge_cutoff']}\n"
        f"machine    {world.size} x {device.type}, {torch.get_num_threads()} threads, {c.precision}; "
        f"peak {peak / 1e9:,.0f} GFLOP/s ({peak_source})")
    if c.warmup_steps >= c.steps:
        say(f"           all {c.steps} steps are warm-up: --warmup-steps is {c.warmup_steps}")
    if b["tokens"] > 4 * trained_on:
        say("           beyond 4 epochs repeated text teaches less and less (Muennighoff 2023, arXiv:2305.16264)")
    if step == c.steps:
        say(f"finished   {c.out} is finished: step {step} of {c.steps}")
    else:
        say(f"{'resuming' if step else 'starting'}   at step {step} of {c.steps}, "
            f"{time.perf_counter() - start:.1f} s after the start\n")

    first, saved, width = step, step if reader is not None else None, len(str(c.steps))
    began = time.perf_counter() - facts["wall_seconds"]
    mark, marked = time.perf_counter(), step                               # of the rate that is printed

    def diverged(what: str) -> int:
        kept = "there was no checkpoint yet" if saved is None else f"the checkpoint of step {saved} is intact"
        say(f"step {step}: diverged, {what}; {kept}; try a lower --lr than {c.lr}")
        return 3

    while True:
        # evaluate, where it is due and the checkpoint that was read does not hold it; a stop waits for it
        due = step == c.steps or step and c.eval_interval and step % c.eval_interval == 0
        if due and val.num_windows and not (evaluation and evaluation["step"] == step):
            on_phase(step, "evaluate")
            evaluation = {"step": step} | evaluate(model, val, c, world)
            if not math.isfinite(evaluation["val_loss"]):
                return diverged(f"validation loss {evaluation['val_loss']}")
            folder.log(**evaluation)
            say(f"step {step:>{width}}/{c.steps}  validation {evaluation['val_loss']:.4f} nats/token, "
                f"{evaluation['val_bpb']:.4f} bits/byte")
            mark, marked = time.perf_counter(), step
        # save, where it is due
        due = step == c.steps or stopping or step and c.checkpoint_interval and step % c.checkpoint_interval == 0
        if due and step != saved:
            if not is_finite(model, world):
                return diverged("a weight is not finite")
            on_phase(step, "checkpoint")
            facts = card(c, b, manifest, step, time.perf_counter() - began)
            folder.save(step, checkpoint_pieces(optimizer), {
                "step": step, "config": dataclasses.asdict(c), "loader": loader.state_dict(), "card": facts,
                "evaluation": evaluation, "tokenizer_sha256": tokenizer.sha256,
                "loss_scaler": scaler and scaler.state_dict() | {"skipped": skipped}})
            saved, mark, marked = step, time.perf_counter(), step
        if step == c.steps:
            break
        if stopping:
            say(f"\nstopped at step {step} of {c.steps} and saved; the same command goes on from there")
            return 0
        # one step
        events, profiled = [], c.profile and step == first + 2
        model.on_op = (lambda op, asked, *clocks, to=events: to.append((op, *clocks))) if profiled else None
        scale = {"loss_scale": scaler.scale} if scaler else {}
        try:
            loss, norm, stopping = train_step(model, optimizer, loader, step, c, world, asked, on_phase, scaler)
        except FloatingPointError as error:
            return diverged(str(error))
        if profiled:
            folder.trace(events)
        world.step = step = step + 1
        found_inf = not (math.isfinite(loss) and math.isfinite(norm))
        if found_inf and not scaler:
            return diverged(f"loss {loss}, gradient norm {norm}")
        skipped += found_inf
        rate = c.tokens_per_step * (step - marked) / (time.perf_counter() - mark)
        numbers = {name: x if math.isfinite(x) else None for name, x in (("loss", loss), ("grad_norm", norm))}
        folder.log(step=step, **numbers, lr=lr_at(step - 1, c), tokens_per_s=round(rate, 1), **scale)
        if step % c.log_interval == 0 or step == c.steps:
            say(f"step {step:>{width}}/{c.steps}  loss {loss:7.4f}  lr {lr_at(step - 1, c):.2e}  norm {norm:7.3f}  "
                f"{rate:9,.0f} tok/s  mfu {rate * b['flops_per_token'] / peak / world.size:5.1%}  "
                f"{peak_memory(device) / 1e9:5.2f} GB  eta {clock((c.steps - step) * c.tokens_per_step / rate)}"
                + (f"  scale {scaler.scale:g}, {skipped} skipped" if scaler else ""))
            mark, marked = time.perf_counter(), step
    parallel.check_replicas(model.parameters(), world.host)
    if chief:
        finish(model, val, c, folder, facts, evaluation)
    return 0


def finish(model, val, c: Config, folder: Folder, facts: dict, evaluation: dict | None):
    """A run's end: its card, the loss beside general compressors, continuations, and where everything is."""
    facts = facts | {name: evaluation[name] for name in ("val_loss", "val_bpb") if evaluation}
    lines = "".join(f"- {name}: {value}\n" for name, value in facts.items())
    data.write_atomic(folder.path / "card.md", f"# {c.out}\n\n{lines}")
    if evaluation:
        text = b"".join(val.tokenizer.bytes[i] for shard in val.shards for i in shard[:4_000_000])
        yardstick = ", ".join(f"{name} {bpb:.3f}" for name, bpb in data.compressed_bpb(text).items())
        print(f"\nvalidation {evaluation['val_loss']:.4f} nats/token = {evaluation['val_bpb']:.4f} bits/byte"
              f"   ({yardstick} on the validation text)")
        # continue the first lines of three held-out documents, where this rank has the whole model
        ids = val.shards[0][:4_000_000]
        alone = model.mesh.tp == model.mesh.pp == 1 and (c.zero < 3 or model.mesh.dp == 1)
        for n, at in enumerate((ids == val.tokenizer.bos_id).nonzero()[0][:3 * alone]):
            prompt = ids[at:at + 16].tolist()
            print(f"\n--- sample {n + 1} ---\n{val.tokenizer.decode(prompt)}|"
                  f"{generate_text(model.chunks[0], val.tokenizer, prompt, c, seed=n)}")
    else:
        print("\nno validation: its documents do not fill one window of seq_len + 1 tokens")
    print(f"\nwall time  {clock(facts['wall_seconds'])} of training\ncard       {folder.path / 'card.md'}\n"
          f"checkpoint {folder.checkpoints / f'step-{c.steps:08d}'}\n"
          f'sample it  python train.py --out {c.out} --sample "def main("')


def use(c: Config, world: World) -> int:
    """--sample: continue a text with the newest checkpoint in --out; --quantize: its weights as integers. The
    checkpoint says what model it is."""
    if c.quantize is not None and world.size > 1:
        raise BadInput(f"quantize must be left to one process, there are {world.size}")
    if world.rank != 0:
        return 0
    reader, damaged = data.newest_checkpoint(Path(c.out, "checkpoints"))
    for line in damaged.values():
        print(f"damaged checkpoint passed over: {line}", file=sys.stderr)
    if reader is None:
        raise BadInput(f"out must be the folder of a run with an intact checkpoint to use, {c.out} is not")
    tokenizer = data.Tokenizer(Path(c.out, "tokenizer.model"))
    if tokenizer.sha256 != reader.meta["tokenizer_sha256"]:
        raise data.DataError(f"{c.out}/tokenizer.model: is not the one the model was trained with")
    saved = dataclasses.replace(Config(**reader.meta["config"]), compile="off", attention=c.attention, dp=1, tp=1, pp=1,
                                zero=0, precision="fp32", eval_windows=c.eval_windows, out=c.out)
    if c.quantize is None:
        gpt = make_stage(saved, world.device, read=reader.read)
    else:
        model = Model(saved, world, reader.read)
        quantize(model, c.quantize, saved, world)
        gpt = model.chunks[0]
    if c.sample is not None:
        ids = [tokenizer.bos_id] + tokenizer.encode(c.sample)
        print(c.sample + generate_text(gpt, tokenizer, ids, c, c.seed))
    return 0


def quantize(model, fmt: str, c: Config, world: World):
    """The weights become integers, by GPTQ on 64 windows of the training text; print what that saves and costs."""
    loader, val = open_data(c, world)
    gpt, inputs = model.chunks[0], ("tokens", "documents")
    calibration = [to_device(next(loader), c, world.device) for _ in range(math.ceil(64 / c.micro_batch_size))]
    calibration = [{name: x for name, x in batch.items() if name in inputs} for batch in calibration]

    @torch.no_grad()
    def measured():
        gpt.generate(calibration[0]["tokens"][:1, :1], 8)
        start = time.perf_counter()
        gpt.generate(calibration[0]["tokens"][:1, :1], 128)
        seconds = time.perf_counter() - start
        logits = gpt(**calibration[0]).double()
        return precision.weight_bytes(gpt), evaluate(model, val, c, world)["val_loss"], logits, 128 / seconds

    size, loss, logits, rate = measured()
    precision.quantize(gpt, fmt, calibration=calibration)
    new_size, new_loss, new_logits, new_rate = measured()
    print(f"{fmt:<10} weights of linear layers and head {size:,} -> {new_size:,} bytes, {size / new_size:.2f} x fewer\n"
          f"validation {loss:.4f} -> {new_loss:.4f} nats/token, {new_loss / loss - 1:+.2%}\n"
          f"logits     off by {(new_logits - logits).norm() / logits.norm():.2%} of their norm\n"
          f"generation {rate:,.0f} -> {new_rate:,.0f} tokens/s: codes become float32 whenever they are used")


# ---- ranks: starting, watching, and what one says when another is gone -----------------------------------------------

def launch(c: Config, argv) -> int:
    """--nproc: start this machine's ranks, each this program again, and watch them. When one fails, the others end
    within seconds, one line says which and where, and --max-restarts starts all of them again from the checkpoint.
    SIGTERM and Ctrl-C are passed on; after one nothing is restarted, and a second kills."""
    asked = []
    for attempt in range(c.max_restarts + 1):
        code, line = watch(c, argv, asked)
        if line:
            print(line, file=sys.stderr, flush=True)
        if code in (0, 2, 3) or attempt == c.max_restarts or asked:
            return code
        print(f"train.py: start {attempt + 2} of {c.max_restarts + 1}", file=sys.stderr, flush=True)


def watch(c: Config, argv, asked: list) -> tuple[int, str]:
    """Run the ranks once -> exit code, and a line if it is not 0. What a rank that failed wrote to stderr stays in
    OUT/rank-R.err."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // c.nproc))
    ranks, errors = [], tempfile.TemporaryDirectory()

    def pass_on(number, frame):
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
        asked.append(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for r in range(c.nproc):
            env = {"OMP_NUM_THREADS": threads} | os.environ | {
                "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(c.nproc), "LOCAL_WORLD_SIZE": str(c.nproc),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LAUNCHED": "1"}
            with open(Path(errors.name, str(r)), "w") as stderr:                    # a session: Ctrl-C comes from here
                ranks.append(subprocess.Popen([sys.executable, __file__, *argv], env=env, stderr=stderr,
                                              start_new_session=True))
            if asked:                                                                  # while the others were started
                ranks[-1].send_signal(signal.SIGTERM)
        early = None                                   # whoever ends first, with the run not done: a 0 may be too early
        while any(process.poll() is None for process in ranks):
            if early is None and any(process.poll() is not None for process in ranks):
                early = time.monotonic()
            failed = any(process.poll() for process in ranks)
            if early is not None and time.monotonic() - early > (5 if failed else c.timeout):
                break                                  # whoever hears of a failure in time says so and ends by himself
            time.sleep(0.05)
    finally:
        codes = [process.poll() for process in ranks]                              # None: had to be ended from here
        for process in ranks:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    said = [Path(errors.name, str(r)).read_text().strip() for r in range(c.nproc)]
    errors.cleanup()
    if not any(code != 0 for code in codes):
        return 0, ""
    # who failed first: nobody that had to be ended, nor one that lost the others
    guilty = min(range(c.nproc), key=lambda r: (codes[r] is None, LOST in said[r]))
    if codes[guilty] in (2, 3):
        return codes[guilty], said[guilty]
    if asked and codes[guilty] == -signal.SIGTERM:
        return 1, "train.py: stopped before the run had begun"
    steps = re.findall(r"at step (\d+)", "\n".join(said))
    kept = ""
    if said[guilty] and Path(c.out).is_dir():
        Path(c.out, f"rank-{guilty}.err").write_text(said[guilty] + "\n")
        kept = f"; see {c.out}/rank-{guilty}.err"
    ours = [line for line in said[guilty].splitlines() if line.startswith("train.py: ")]
    how = (f"was killed by signal {-codes[guilty]}" if codes[guilty] < 0 else
           f"failed: {ours[-1].split(': ', 1)[1]}" if ours else f"ended with exit code {codes[guilty]}")
    return 1, f"train.py: rank {guilty} {how}" + (f", at step {max(map(int, steps))}" if steps else "") + kept


LOST = "lost the other ranks"


def lost(error: Exception, world) -> bool:
    """Whether this is a peer's failure and not this rank's: what gloo and NCCL raise when a connection breaks or a
    message does not come."""
    said = re.search("gloo|NCCL|Connection (closed|reset)|Timed out", str(error))
    return world is not None and isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or bool(said))


def main(argv=None) -> int:
    argv, world = sys.argv[1:] if argv is None else argv, None
    if "LAUNCHED" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                       # PR_SET_PDEATHSIG: not to outlive the launcher
    try:
        c = parse_config(argv)
        if c.nproc and "RANK" not in os.environ and not dist.is_initialized():
            return launch(c, argv)
        world = World(c)
        c = resolve(c, world.device)
        if c.sample is not None or c.quantize is not None:
            return use(c, world)
        if c.dry_run:
            dry_run(c, world)
            return 0
        return train(c, world)
    except (BadInput, data.DataError) as error:
        first, _, rest = str(error).partition(" ")
        flag = flag_of(first) if first in {f.name for f in fields(Config)} else first
        print(f"train.py: {flag} {rest}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if world is None or world.size == 1:
            raise
        what = LOST if lost(error, world) else f"failed with {type(error).__name__}"
        if what != LOST:
            traceback.print_exc()
        first = (str(error).splitlines() or [""])[0][:200]
        print(f"train.py: rank {world.rank} {what} at step {world.step}: {first}", file=sys.stderr, flush=True)
        os._exit(1)                                       # a broken group cannot be closed in order
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
