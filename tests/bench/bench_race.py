"""The race: CPU seconds of one core until a model reaches a loss on the last tenth of a text.

    python tests/bench/bench_race.py --text shakespeare.txt [--nanogpt FOLDER]

The text is one file, whose last tenth is held out. Ours is train.py's own step, and other flags are train.py's; seconds
of evaluations are left out. --nanogpt: a checkout of nanoGPT with the same text as data/shakespeare_char/input.txt,
prepared by its prepare.py. Its training line for a CPU (its README) is run once per seed, and the loss that it prints
last is shown: 2.7205 bits per byte of Shakespeare. Its seconds are those of its process, with two short evaluations.
(Nobody has run that half yet: it needs the checkout.)
"""

import argparse
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402


def ours(prepared, seed: int, flags: list, target: float, every: int) -> tuple[float, int, float]:
    """-> (CPU seconds of the steps, steps, bits per byte) when the target is reached, or the steps are done."""
    c = train.parse_config(["--data", str(prepared), "--seed", str(seed), "--device", "cpu", *flags])
    world = train.join(c)
    c = train.resolve(c, world)
    loader, val = train.open_data(c, world)
    model = train.Model(c, world)
    optimizer = train.make_optimizer(model, c)
    seconds = 0.0
    for step in range(c.steps):
        start = time.process_time()
        train.train_step(model, optimizer, loader, step, c, world)
        seconds += time.process_time() - start
        if (step + 1) % every == 0 or step + 1 == c.steps:
            bits = train.evaluate(model, val, c, world)["val_bpb"]
            if bits <= target:
                break
    return seconds, step + 1, bits


def nanogpt(folder: str, seed: int) -> tuple[float, float]:
    """-> (CPU seconds of its process, bits per character that it prints last)."""
    line = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 "
            "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
            "--lr_decay_iters=2000 --dropout=0.0 --eval_interval=2000").split()
    code = (f"import sys, torch; torch.set_num_threads(1); real = torch.manual_seed; "
            f"torch.manual_seed = lambda n: real(n + {seed}); sys.argv = ['train.py'] + {line!r}; "
            "exec(open('train.py').read())")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loss = float(re.findall(r"val loss ([\d.]+)", done.stdout)[-1])
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, loss / math.log(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="one file of text")
    parser.add_argument("--target", type=float, default=2.7205, help="bits per byte (default: 2.7205)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations (default: 10)")
    parser.add_argument("--nanogpt", help="folder of a checkout of nanoGPT")
    args, flags = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepared = data.prepare([args.text], Path(folder) / "text", args.vocab_size, val_fraction=0.1)
        flags = ["--vocab-size", str(args.vocab_size), *flags]
        seconds = []
        for seed in range(args.seeds):
            cpu, steps, bits = ours(prepared, seed, flags, args.target, args.every)
            print(f"seed {seed}: {bits:.4f} bits/byte after {steps} steps, {cpu:.1f} CPU-s"
                  + ("" if bits <= args.target else f", not {args.target}"), flush=True)
            seconds.append(cpu if bits <= args.target else math.inf)
        median = statistics.median(seconds)
        print(f"median {median:.1f} CPU-s")
        if args.nanogpt:
            runs = [nanogpt(args.nanogpt, seed) for seed in range(args.seeds)]
            for seed, (cpu, bits) in enumerate(runs):
                print(f"nanoGPT, seed {seed}: {bits:.4f} bits per character, {cpu:.1f} CPU-s", flush=True)
            print(f"ours / nanoGPT's: {median / statistics.median(cpu for cpu, _ in runs):.3f}")


if __name__ == "__main__":
    main()
