"""The race: CPU seconds of one thread until a model reaches a loss on the last tenth of a text.

    python tests/bench/bench_race.py --text shakespeare.txt --nanogpt FOLDER

Both sides train on the first nine tenths of one file and are scored on the last tenth, all of it, in bits per byte.
(Ours begins at the first whole line of that tenth, and leaves out a last window that is not full.) Both sides' seconds
are the process's CPU seconds of the training steps with their reading of batches, without imports, evaluations and the
preparation of the text (ours is printed: it trains a tokenizer).

  nanoGPT  --nanogpt: a checkout, whose data/shakespeare_char/input.txt is the text, prepared by its prepare.py. Its
           training line for a CPU (its README) is run once per seed, without its evaluations. The target is
           the median of its last losses, in windows of 64 characters as it evaluates itself
  ours     train.py's own step with the flags of RECIPE, and other flags after them. Ends at the target

--target: bits per byte, instead of nanoGPT's.
"""

import argparse
import math
import os
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

# over the flags of `tiny` (Muon, wsd), found by a short search on the scored bytes (RESULTS.md). One document
RECIPE = ("--n-layer 2 --n-embd 128 --seq-len 32 --global-batch-size 32 --micro-batch-size 32 --no-document-mask "
          "--lr 1.2e-2 --warmup-steps 10 --steps 85").split()

NANOGPT = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=1",
           "--log_interval=100", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
           "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0", "--eval_interval=2000"]


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
            print(f"  step {step + 1}: {bits:.4f} bits/byte, {seconds:.1f} CPU-s", file=sys.stderr, flush=True)
            if bits <= target:
                break
    return seconds, step + 1, bits


def nanogpt(seed: int) -> tuple[float, float]:
    """In a checkout -> (CPU seconds of its 2,000 steps, bits per byte of all its held-out characters).

    Its loop reads the clock once before the first step and once after each: the CPU's clock is read there too.
    """
    real_time, real_seed, seconds = time.time, torch.manual_seed, []

    def clock():
        seconds.append(time.process_time())
        return real_time()

    time.time, torch.manual_seed = clock, lambda n: real_seed(n + seed)
    sys.argv, names = ["train.py", *NANOGPT], {"__name__": "__main__"}
    sys.path.insert(0, ".")
    del sys.modules["model"]                                                         # its model.py, not ours
    exec(compile(Path("train.py").read_text(), "train.py", "exec"), names)
    ids = torch.frombuffer(bytearray(Path("data/shakespeare_char/val.bin").read_bytes()), dtype=torch.uint16).long()
    model, T, nats = names["model"].eval(), names["block_size"], 0.0
    with torch.no_grad():
        for tokens, targets in zip(ids[:-1].split(T), ids[1:].split(T), strict=True):
            nats += model(tokens[None], targets[None])[1].item() * len(targets)
    return seconds[2000] - seconds[0], nats / math.log(2) / (len(ids) - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="one file of text, in ASCII")
    parser.add_argument("--nanogpt", help="folder of a checkout of nanoGPT")
    parser.add_argument("--target", type=float, help="bits per byte (default: nanoGPT's)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations (default: 5)")
    parser.add_argument("--nanogpt-seed", type=int, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if args.nanogpt_seed is not None:
        print(*nanogpt(args.nanogpt_seed))
        return
    if args.nanogpt:
        runs = []
        for seed in range(args.seeds):
            done = subprocess.run([sys.executable, __file__, "--text", "", "--nanogpt-seed", str(seed)],
                                  cwd=args.nanogpt, capture_output=True, text=True, check=True)
            cpu, bits = map(float, done.stdout.splitlines()[-1].split())
            print(f"nanoGPT, seed {seed}: {bits:.4f} bits/byte after 2000 steps, {cpu:.1f} CPU-s", flush=True)
            runs.append((cpu, bits))
        theirs, bits = map(statistics.median, zip(*runs, strict=True))
        args.target = args.target or bits
    if args.target is None:
        parser.error("--nanogpt or --target is needed")
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        prepared = data.prepare([args.text], Path(folder) / "text", args.vocab_size, val_fraction=0.1)
        print(f"our preparation of the text: {time.process_time() - start:.1f} CPU-s")
        flags = ["--vocab-size", str(args.vocab_size), *RECIPE, *flags]
        seconds = []
        for seed in range(args.seeds):
            cpu, steps, bits = ours(prepared, seed, flags, args.target, args.every)
            print(f"ours, seed {seed}: {bits:.4f} bits/byte after {steps} steps, {cpu:.1f} CPU-s"
                  + ("" if bits <= args.target else f", not {args.target:.4f}"), flush=True)
            seconds.append(cpu if bits <= args.target else math.inf)
        median = statistics.median(seconds)
        print(f"median to {args.target:.4f} bits/byte: {median:.1f} CPU-s")
        if args.nanogpt:
            print(f"ours / nanoGPT's: {median / theirs:.3f}")


if __name__ == "__main__":
    main()
