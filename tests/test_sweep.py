"""tests/bench/sweep.py: which runs it makes, that it goes on where it was, and what it says of bad input."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from bench import sweep

import model as net
import scaling
import train


def call(capsys, *argv):
    code = sweep.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_default_sweep_surrounds_the_optimum_of_each_budget():
    plans = sweep.sweep_runs(sweep.SIZES, sweep.BUDGETS)
    for C in sweep.BUDGETS:
        own = [p for p in plans if p["C"] == C]
        assert len(own) >= 5 and all(abs(6 * p["N"] * p["D"] / C - 1) < 0.01 for p in own)
        ratios = [p["D"] / p["N"] for p in own]
        assert min(ratios) < 8 and max(ratios) > 60
    assert [p["C"] for p in plans] == sorted(p["C"] for p in plans) and len({p["name"] for p in plans}) == len(plans)
    assert max(p["D"] for p in plans) < 6.4e6                                        # about an epoch of the corpus
    for p in plans:                                                                  # N is what train.py builds
        c = p["config"]
        flags = [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in c.items()]
        assert net.num_params(train.parse_config(flags).model) == p["N"]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("matplotlib"), reason="draws")
def test_a_sweep_goes_on_where_it_was(capsys, tmp_path, corpus):
    """All but one run are there; that one is trained for real; then nothing is left to do."""
    budgets, sizes = (3e8, 1e9, 3e9, 1e10), ((1, 4), (1, 8), (1, 16), (2, 16))
    plans = sweep.sweep_runs(sizes, budgets, str(corpus))
    out, left = tmp_path / "sweep", plans[0]
    rng = np.random.default_rng(0)
    for p in plans[1:]:
        (out / p["name"]).mkdir(parents=True)
        (out / p["name"] / "config.json").write_text(json.dumps(p["config"]))
        loss = 1 + 20 / p["N"] ** 0.3 + 30 / p["D"] ** 0.3 + 0.001 * rng.standard_normal()
        lines = {"step": 1, "loss": 9.0}, {"step": p["config"]["steps"], "val_loss": loss}
        (out / p["name"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ("--out", out, "--data", corpus, "--budgets", ",".join(map(str, budgets)), "--sizes",
            "1x4,1x8,1x16,2x16", "--jobs", 1)
    code, text, err = call(capsys, *argv)
    assert code == 0, err
    assert f"{len(plans) - 1} of {len(plans)} runs were finished before" in text
    assert f"{len(plans):>3}/{len(plans)}  C 3e+08" in text
    with open(out / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plans) and float(rows[0]["N"]) == left["N"] and 3 < float(rows[0]["loss"]) < 7
    config = json.loads((out / left["name"] / "config.json").read_text())
    assert {k: config[k] for k in left["config"]} == left["config"] and config["micro_batch_size"] > 0
    code, text, err = call(capsys, *argv)
    assert code == 0 and f"{len(plans)} of {len(plans)} runs were finished before" in text and "parametric" in text
    for name in ("isoflop.png", "envelope.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    # a run of other settings in its place is not taken for it
    (out / left["name"] / "config.json").write_text(json.dumps(config | {"lr": 9.0}))
    code, text, err = call(capsys, *argv)
    assert code == 2 and "--out must be a sweep of the same settings: lr is 9.0" in err


def test_a_sweep_that_cannot_train_says_why(capsys, tmp_path, monkeypatch):
    failing = tmp_path / "python"
    failing.write_text(f"#!/bin/sh\necho >> {tmp_path}/begun\necho 'train.py: --data must be there' >&2\nexit 2\n")
    failing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(failing))
    code, out, err = call(capsys, "--out", tmp_path / "sweep", "--jobs", 4)
    assert (tmp_path / "begun").read_text() == "\n"                                 # the first prepares for the others
    assert code == 2 and err.count("\n") == 1 and "ended with exit code 2: train.py: --data must be there" in err


def test_a_sweep_that_is_too_small_to_fit_trains_nothing(capsys, tmp_path):
    for flags, lacks in ((["--budgets", "1e9", "--sizes", "1x4,1x8"], "at least 6 pairs (N, D)"),
                         (["--budgets", "1e9,1.1e9,1.2e9", "--sizes", "1x8,1x12"], "3 values of N")):
        code, out, err = call(capsys, *flags, "--out", tmp_path / "sweep")
        assert (code, out, err.count("\n")) == (2, "", 1) and lacks in err and not (tmp_path / "sweep").exists()
        assert err.startswith("sweep.py: --budgets and --sizes must make runs that can be fitted: ")


def test_wrong_flags(capsys):
    for flags, message in ((["--minutes", "-1"], "must be a number from 0.001 to 1e+06, got '-1'"),
                           (["--budgets", "x"], "invalid budgets value: 'x'"),
                           (["--sizes", "2"], "must be like 2x48,3x64, got '2'"),
                           (["--sizes", "2x0"], "must be like 2x48,3x64, got '2x0'"),
                           (["--jobs", "1.5"], "must be a whole number from 1 to 1000, got '1.5'"),
                           (["--out", "/dev/null/x"], "must be a folder that can be written, got /dev/null/x: Not a "
                            "directory"),
                           (["--budgets", "1e30"],
                            "must leave one of --sizes 4 to 140 tokens per parameter, got 1e+30")):
        code, out, err = call(capsys, *flags)
        assert (code, out, err) == (2, "", f"sweep.py: {flags[0]} {message}\n")


def test_the_runs_in_the_repository_are_a_sweeps():
    """tests/sweep_runs.csv: each row is a run that the default sweep makes."""
    runs = scaling.read_runs(Path(__file__).with_name("sweep_runs.csv"))
    plans = {(p["N"], p["D"], p["C"]) for p in sweep.sweep_runs(sweep.SIZES, sweep.BUDGETS)}
    assert {tuple(row) for row in runs[:, [0, 1, 3]]} == plans
