"""Scaling laws of one's own: train tiny models with train.py at several budgets of compute, fit all three approaches.

  python tests/bench/sweep.py               21 runs, 4 budgets; the same command goes on where the last one ended
  python tests/bench/sweep.py --minutes 5 --jobs 2 --out out/sweep

Writes --out/runs.csv (N, D, loss, budget), isoflop.png (loss against size, a parabola per budget) and envelope.png
(loss against compute, a curve per size). tests/sweep_runs.csv is the runs.csv of one such sweep.
"""

import argparse
import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import scaling  # noqa: E402
from scaling import BadInput, Parser, number  # noqa: E402

# (n_layer, n_embd), and FLOPs per budget. One layer alone cannot look up what followed a token before, and lies above
# the curve of the others
SIZES = ((2, 16), (2, 20), (2, 24), (3, 24), (2, 32), (2, 48), (3, 48), (2, 64), (3, 64), (3, 80))
BUDGETS = (1e11, 3e11, 1e12, 3e12)
RATIOS = (4, 140)                                   # tokens per parameter: the sizes of a budget lie around its best
# head and embedding share one table of 512 rows: then N, all parameters, is what is multiplied (but for norms), and no
# choice between "total" and "non-embedding" is left to bend the curves
SWEEP = {"vocab_size": 512, "seq_len": 128, "tie_embeddings": True, "global_batch_size": 4, "eval_windows": 512}


def sweep_runs(sizes, budgets, data="stdlib") -> list[dict]:
    """What a sweep trains, cheapest first: fields of train.Config, and N, D, C."""
    plans = []
    for C, (n_layer, n_embd) in itertools.product(sorted(budgets), sizes):
        # the best learning rate falls with the width
        config = SWEEP | {"n_layer": n_layer, "n_embd": n_embd, "n_head": max(1, n_embd // 32), "lr": 0.16 / n_embd,
                          "data": data}
        shape = config | {"n_kv_head": config["n_head"], "head_dim": n_embd // config["n_head"],
                          "n_ff": 64 * math.ceil(8 * n_embd / 3 / 64)}
        N, a_step = scaling.shape_of(shape).num_params, config["global_batch_size"] * config["seq_len"]
        steps = round(C / (6 * N * a_step))
        if RATIOS[0] <= steps * a_step / N <= RATIOS[1]:
            plans.append({"N": N, "D": steps * a_step, "C": C, "name": f"C{C:.0e}-{n_layer}x{n_embd}".replace("+", ""),
                          "config": config | {"steps": steps, "warmup_steps": steps // 10}})
    return plans


def finished(folder: Path, config: dict) -> float | None:
    """Validation loss of a run that train.py has ended; None for one not begun or not ended."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return None                                                       # or being written: train.py will see to it
    for name, value in config.items():
        if saved.get(name) != value:
            raise BadInput(f"out must be a sweep of the same settings: {name} is {saved.get(name)} in {folder}, not "
                           f"{value}")
    ends = [line["val_loss"] for line in lines if "val_loss" in line and line["step"] == config["steps"]]
    return ends[-1] if ends else None


def sweep(plans, out: Path, minutes: float, jobs: int) -> dict:
    """Run train.py on each plan, `jobs` at a time; after `minutes` those that run are asked to save and stop -> {name:
    loss} of finished ones. The same call goes on where the last one ended."""
    begun, running, threads = time.monotonic(), {}, str(max(1, os.cpu_count() // jobs))
    losses = {p["name"]: loss for p in plans if (loss := finished(out / p["name"], p["config"])) is not None}
    waiting = [p for p in plans if p["name"] not in losses]
    if losses:
        print(f"{len(losses)} of {len(plans)} runs were finished before", flush=True)
    try:
        while waiting or running:
            late = time.monotonic() - begun > 60 * minutes
            waiting *= not late
            # the first run prepares the corpus for all
            while waiting and len(running) < (jobs if losses else 1):
                plan = waiting.pop(0)
                flags = [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in plan["config"].items()]
                flags += ["--eval-interval=0", "--checkpoint-interval=0", "--max-new-tokens=1",
                          f"--out={out / plan['name']}"]
                process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], text=True,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                           env={"OMP_NUM_THREADS": threads} | os.environ)
                running[plan["name"]] = plan, process, time.monotonic()
            for name, (plan, process, start) in list(running.items()):
                if process.poll() is None:
                    if late:
                        process.send_signal(signal.SIGTERM)
                    continue
                del running[name]
                said = process.communicate()[1].strip().splitlines()
                if process.returncode not in (0, -signal.SIGTERM):
                    raise BadInput(f"{name}: train.py ended with exit code {process.returncode}: {(said or ['-'])[-1]}")
                if (loss := finished(out / name, plan["config"])) is not None:
                    losses[name], now = loss, time.monotonic()
                    print(f"{len(losses):>3}/{len(plans)}  C {plan['C']:.0e}  N {plan['N']:>9,}  D {plan['D']:>9,}  "
                          f"{plan['D'] / plan['N']:>6.1f} tokens per parameter  loss {loss:.4f}  "
                          f"{now - start:>4.0f} s  {(now - begun) / 60:>5.1f} of {minutes:g} min", flush=True)
            time.sleep(0.5 if late else 0.05)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.communicate()
    return losses


def plot_envelope(figure, runs, results):
    """Loss against compute, a curve per size, and what the best of all sizes reaches; what the law leaves
    unexplained."""
    from matplotlib import colormaps

    law, (N, D, loss, C) = results["parametric"], runs.T
    size, wide = np.round(np.log(N), 6), np.geomspace(C.min(), C.max() * 10, 200)
    figure.suptitle("Loss against compute: no size stays the best", fontsize=13, x=0.01, ha="left")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colors = colormaps["viridis"](0.9 * (1 - (size - size.min()) / max(np.ptp(size), 1e-9)))
    for s in np.unique(size):
        own = np.flatnonzero(size == s)
        own = own[C[own].argsort()]
        left.plot(C[own], loss[own], "o-", color=colors[own[0]], markersize=3.5, linewidth=1)
    if results["envelope"]:
        left.plot(*([p[x] for p in results["envelope"]["points"]] for x in ("C", "loss")), linewidth=3, alpha=0.8,
                  color="#d1495b", label="lower envelope (approach 1)")
    left.plot(wide, scaling.chinchilla_loss(*scaling.compute_optimal(wide, law), law), "--", color="#222222",
              label="L_opt(C), parametric law")
    left.plot([], [], "o-", color="#777777", markersize=3.5,
              label=f"a size: {N.min():.2g} (light) to {N.max():.2g} parameters (dark)")
    left.set(xscale="log", xlabel="budget C, FLOPs", ylabel="loss, nats per token")
    left.legend(frameon=False, fontsize=9)
    right.axhline(0, color="#222222", linewidth=1)
    right.scatter(C, 100 * (loss / scaling.chinchilla_loss(N, D, law) - 1), s=18, c=colors)
    right.set(xscale="log", xlabel="budget C, FLOPs", ylabel="measured loss over the law's, %")


def run(argv):
    def budgets(text):
        return tuple(map(number(1e6, 1e30), text.split(",")))

    def sizes(text):
        try:
            found = tuple((int(layers), int(width)) for layers, width in (size.split("x") for size in text.split(",")))
        except ValueError:
            found = ((0, 0),)
        if min(map(min, found)) < 1:
            raise argparse.ArgumentTypeError(f"must be like 2x48,3x64, got {text!r}")
        return found

    parser = Parser("tests/bench/sweep.py", description="train tiny models, fit all three approaches, draw them")
    parser.add_argument("--out", default="out/sweep", help="folder of runs, runs.csv and figures [out/sweep]")
    parser.add_argument("--minutes", type=number(1e-3, 1e6), default=20, help="the same command goes on after it [20]")
    parser.add_argument("--jobs", type=number(1, 1e3, True), default=min(8, os.cpu_count()), help="runs at a time")
    parser.add_argument("--budgets", type=budgets, default=BUDGETS, metavar="C,C", help="FLOPs [1e11,3e11,1e12,3e12]")
    parser.add_argument("--sizes", type=sizes, default=SIZES, metavar="LxC,LxC", help="n_layer x n_embd of each size")
    parser.add_argument("--data", default="stdlib", help="as train.py's [this Python's library]")
    args = parser.parse_args(argv)
    plans = sweep_runs(args.sizes, args.budgets, args.data)
    if not plans:
        raise BadInput(f"budgets must leave one of --sizes {RATIOS[0]} to {RATIOS[1]} tokens per parameter, got "
                       f"{', '.join(f'{c:g}' for c in args.budgets)}")
    law = [(p["N"], p["D"], scaling.chinchilla_loss(p["N"], p["D"])) for p in plans]
    try:
        scaling.fit_parametric(law, times=0)                          # it raises for runs that no losses would suffice
    except BadInput as error:
        raise BadInput(f"budgets and --sizes must make runs that can be fitted: {error}") from None
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"out must be a folder that can be written, got {out}: {error.strerror}") from None
    print(f"{len(plans)} runs, {len(args.budgets)} budgets, {len(args.sizes)} sizes, {sum(p['C'] for p in plans):.1e} "
          f"FLOPs, {args.jobs} at a time", flush=True)
    losses = sweep(plans, out, args.minutes, args.jobs)
    done, path, sizes = [p for p in plans if p["name"] in losses], out / "runs.csv", sorted({p["N"] for p in plans})
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("N", "D", "loss", "budget"),
                                    *((p["N"], p["D"], losses[p["name"]], p["C"]) for p in done)])
    rows = [("C", *(f"{N:,} " for N in sizes))]
    for C, row in itertools.groupby(done, lambda p: p["C"]):
        row = {p["N"]: losses[p["name"]] for p in row}
        rows.append((f"{C:.0e}", *(f"{row[N]:.4f}" + " *"[row[N] == min(row.values())] if N in row else "- "
                                   for N in sizes)))
    print(f"\n{len(done)} runs in {path}; loss by budget and size N, the best of each *\n{scaling.columns(*rows)}")
    if len(done) < len(plans):
        print(f"{len(plans) - len(done)} runs are left; the same command goes on")
    runs = scaling.read_runs(path)
    results = scaling.fit_all(runs, str(path))
    print()
    scaling.report(runs, results)
    scaling.draw(out / "isoflop.png", scaling.plot_isoflop, runs)
    scaling.draw(out / "envelope.png", plot_envelope, runs, results)


def main(argv=None) -> int:
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except ImportError as error:                                                # all but the figures is done
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    except BadInput as error:
        first, _, rest = str(error).partition(" ")
        print(f"sweep.py: {'--' + first if first in ('out', 'budgets') else first} {rest}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sweep.py: interrupted; the same command goes on", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
