import ast
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
import torch.nn.functional as F
from conftest import POOL, ROOT, as_program, begin, dry_run, losses, metrics, newest_tensors, outcome

import data
import model as net
import scaling
import train

MINI = """--n-layer 2 --n-head 2 --n-kv-head 1 --n-embd 16 --seq-len 32 --vocab-size 512 --global-batch-size 8
--micro-batch-size 4 --steps 12 --warmup-steps 2 --lr 0.01 --eval-interval 6 --eval-windows 8 --checkpoint-interval 4
--max-new-tokens 8 --log-interval 5 --optimizer adamw --schedule cosine --min-lr-ratio 0.1 --weight-decay 0.1
--device cpu""".split()


def run(corpus, out, *flags) -> tuple[int, str, str]:
    """train.main in this process -> (exit code, stdout, stderr)."""
    return outcome(train.main, *MINI, "--data", corpus, "--out", out, *flags)


def refused(corpus, out, *flags) -> str:
    """The one line in which train.py says why it does not run."""
    code, _, stderr = run(corpus, out, *flags)
    assert code == 2 and stderr.count("\n") == 1, stderr
    return stderr


def steps_saved(out) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (Path(out) / "checkpoints").glob("step-*"))


@pytest.fixture(scope="session")
def reference(corpus, tmp_path_factory):
    """A run that nobody disturbed, in a process of its own like those it is compared with."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert child(corpus, out) == 0
    return out


def child_main(argv, interrupt):
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")

    def strike(number):
        os.kill(os.getpid(), number)

    def on_phase(step, phase):
        if interrupt and interrupt[0] == (step, phase):
            strike(interrupt[1])

    if interrupt and isinstance(interrupt[0], str):                  # at the n-th call of a function of data.py's
        name, n = interrupt[0].split("#")
        module, attribute = (os, "rename") if name == "rename" else (data, name)
        original, calls = getattr(module, attribute), []

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == int(n):
                strike(interrupt[1])
            return original(*args, **kwargs)

        setattr(module, attribute, counted)
    c = train.parse_config(argv)
    world = train.join(c)
    sys.exit(train.train(train.resolve(c, world), world, on_phase))


def child(corpus, out, *flags, interrupt=None) -> int:
    """train in a new process, struck by a signal at (step, phase) or at the n-th call of a function -> exit code."""
    process = POOL.process(child_main, [*MINI, "--data", str(corpus), "--out", str(out), *flags], interrupt)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


# ---- what a run leaves


def test_a_run_learns_and_leaves_what_it_should(reference, corpus):
    lines, (first, *_, last) = metrics(reference), losses(reference)
    assert len(losses(reference)) == 12 and first == pytest.approx(math.log(512), abs=0.05) and last < first - 0.1
    assert {"step", "loss", "lr", "grad_norm"} <= lines[0].keys()
    evaluations = [x for x in lines if "val_loss" in x]
    assert [x["step"] for x in evaluations] == [6, 12] and all("val_bpb" in x for x in evaluations)
    assert json.loads((reference / "config.json").read_text())["n_embd"] == 16
    manifest = data.read_sealed(corpus / "manifest.json", "tokens")
    card = (reference / "card.md").read_text()
    for fact in (f"knowledge_cutoff: {manifest['knowledge_cutoff']}", f"tokens: {12 * 8 * 32}", "parameters: ",
                 "flops: ", "sources: ", "tokens_per_parameter: ", "wall_seconds: ", "val_bpb: "):
        assert fact in card
    reader, damaged = data.newest_checkpoint(reference / "checkpoints")
    assert not damaged and reader.meta["card"]["knowledge_cutoff"] == manifest["knowledge_cutoff"]
    assert reader.meta["step"] == 12 and reader.meta["loader"]["windows"] == 12 * 8
    assert not [p for p in reference.rglob("*") if p.suffix in (".pt", ".pkl", ".tmp")]


def test_a_finished_run_says_so_and_changes_nothing(reference, corpus, tmp_path):
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    code, stdout, _ = run(corpus, out)
    assert code == 0 and f"{out} is finished: step 12 of 12" in stdout and "bits/byte" in stdout
    assert metrics(out) == metrics(reference) and steps_saved(out) == steps_saved(reference)


def test_the_last_and_the_best_checkpoints_are_kept(corpus, tmp_path):
    # the learning rate rises until it wrecks the model: an early evaluation is the best, and its checkpoint stays
    code, _, _ = run(corpus, tmp_path / "run", "--checkpoint-interval", "2", "--eval-interval", "2", "--lr", "400",
                     "--warmup-steps", "400", "--keep-checkpoints", "2")
    assert code == 0
    best = min((x for x in metrics(tmp_path / "run") if "val_loss" in x), key=lambda x: x["val_loss"])["step"]
    assert best not in (10, 12) and steps_saved(tmp_path / "run") == [best, 10, 12]
    code, _, _ = run(corpus, tmp_path / "other", "--checkpoint-interval", "2", "--eval-interval", "0")
    assert code == 0 and steps_saved(tmp_path / "other") == [10, 12]


# ---- killed, stopped, damaged, resumed: the same run


KILLS = [((0, "data"), 9), ((2, "update"), 9), ((4, "checkpoint"), 9), ((7, "forward_backward"), 9),
         ((12, "checkpoint"), 9), ("write_safetensors#2", 9), ("write_sealed#2", 9), ("rename#1", 9), ("rename#2", 9),
         ((6, "evaluate"), 9), ((5, "reduce"), signal.SIGTERM), ((8, "checkpoint"), signal.SIGINT)]


@pytest.mark.parametrize("interrupt", KILLS, ids=[f"{at}-{number}" for at, number in KILLS])
def test_an_interrupted_run_goes_on_bit_for_bit(reference, corpus, tmp_path, interrupt):
    out = tmp_path / "run"
    code = child(corpus, out, interrupt=interrupt)
    if interrupt[1] == 9:
        assert code == -9
    else:                                                             # asked to stop: the step is finished and saved
        assert code == 0 and steps_saved(out)[-1] < 12 and metrics(out)[-1]["step"] == steps_saved(out)[-1]
    assert not (out / "metrics.jsonl").exists() or len(losses(out)) <= 12
    assert child(corpus, out) == 0
    assert metrics(out) == metrics(reference)
    ours, theirs = newest_tensors(out), newest_tensors(reference)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not list((out / "checkpoints").glob(".*"))


def test_stopped_at_an_evaluation_then_killed(reference, corpus, tmp_path):
    out = tmp_path / "run"
    assert child(corpus, out, interrupt=((5, "data"), signal.SIGTERM)) == 0 and steps_saved(out)[-1] == 6
    assert not [line for line in metrics(out) if "val_loss" in line]                    # left, to be made afterwards
    assert child(corpus, out, interrupt=((7, "data"), 9)) == -9
    seconds = data.newest_checkpoint(out / "checkpoints")[0].meta["card"]["wall_seconds"]
    assert child(corpus, out) == 0 and metrics(out) == metrics(reference)
    assert data.newest_checkpoint(out / "checkpoints")[0].meta["card"]["wall_seconds"] > seconds > 0     # of all starts


def test_killed_again_and_again(reference, corpus, tmp_path):
    for at in (3, 5, 9, 11):
        assert child(corpus, tmp_path / "run", interrupt=((at, "update"), 9)) == -9
    assert child(corpus, tmp_path / "run") == 0 and metrics(tmp_path / "run") == metrics(reference)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(reference, corpus, tmp_path):
    out = tmp_path / "run"
    assert child(corpus, out, interrupt=((10, "data"), 9)) == -9 and steps_saved(out) == [4, 8]
    file = out / "checkpoints" / "step-00000008" / "rank-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    code, stdout, _ = run(corpus, out)
    assert code == 0 and "resuming   at step 4" in stdout
    assert "damaged checkpoint passed over" in stdout and str(file) in stdout
    assert [x["step"] for x in metrics(out)] == [x["step"] for x in metrics(reference)]
    for path in (out / "checkpoints").glob("*/manifest.json"):
        path.write_text("{}")
    assert "--out must hold an intact checkpoint" in refused(corpus, out)


def test_a_damaged_checkpoint_does_not_count_as_a_newer_one(corpus, tmp_path):
    out = tmp_path / "run"
    flags = ["--keep-checkpoints", "1", "--eval-interval", "0"]
    assert child(corpus, out, *flags, interrupt=((7, "data"), 9)) == -9 and steps_saved(out) == [4]
    shutil.copytree(out / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000011")
    (out / "checkpoints" / "step-00000011" / "rank-00000.safetensors").write_bytes(b"")
    assert child(corpus, out, *flags, interrupt=((5, "reduce"), signal.SIGTERM)) == 0
    assert steps_saved(out) == [6] and len(list((out / "checkpoints").glob("damaged-step-00000011-*"))) == 1


@pytest.mark.parametrize("flags, message", [
    (["--lr", "0.001"], "--lr must be 0.01 to go on with the run in"), (["--seed", "1"], "--seed must be 0"),
    (["--steps", "13"], "--steps must be 12"), (["--resume", "never"], "--resume must be auto to go on")])
def test_another_run_does_not_go_on_from_this_one(reference, corpus, flags, message):
    before = metrics(reference)
    stderr = refused(corpus, reference, *flags)
    assert message in stderr and "name another --out" in stderr
    assert metrics(reference) == before and steps_saved(reference)[-1] == 12


def test_every_field_that_affects_training_is_compared():
    c, loader = train.parse_config([]), SimpleNamespace(state_dict=lambda: {"fingerprint": "f"})
    refusal = lambda saved: train.refusal(c, {"config": saved, "loader": {"fingerprint": "f"}, "step": 1000}, loader)
    for f in dataclasses.fields(train.Config):
        saved = dataclasses.asdict(c) | {f.name: 1999 if f.name == "steps" else "another"}
        said = refusal(saved)
        if f.metadata["affects_training"]:
            assert said.startswith(f"{f.name} must be {saved[f.name]} to go on with the run in out/tiny, got ")
        else:
            assert said == ""
    assert refusal(json.loads(json.dumps(dataclasses.asdict(c)))) == ""


def test_what_does_not_affect_training_may_change(reference, corpus, tmp_path):
    out = tmp_path / "run"
    assert child(corpus, out, interrupt=((6, "data"), 9)) == -9
    code = child(corpus, out, "--eval-interval", "0", "--checkpoint-interval", "1", "--log-interval", "1",
                 "--recompute", "full")
    train_lines, ours = ([x for x in metrics(folder) if "loss" in x] for folder in (reference, out))
    assert code == 0 and ours == train_lines


@pytest.mark.parametrize("change, said", [
    (lambda config: config | {"flux": 3}, "the checkpoint's flux 3 is no field of Config now and is ignored"),
    (lambda config: {k: v for k, v in config.items() if k not in ("qk_norm", "profile")}, "")])
def test_people_who_edit_the_config_keep_their_runs(reference, corpus, tmp_path, change, said, monkeypatch, capsys):
    """A checkpoint with a field that Config no longer has, or without one that it has now, is sampled and resumed."""
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    for path in (out / "checkpoints").glob("*/manifest.json"):
        manifest = data.read_sealed(path, "checkpoint")
        manifest["meta"]["config"] = change(manifest["meta"]["config"])
        data.write_sealed(path, manifest)
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    assert train.main(["--sample", "def f(", "--out", str(out), "--max-new-tokens", "2"]) == 0
    answer = capsys.readouterr()
    assert answer.out.startswith("def f(") and "knowledge cutoff 20" in answer.err
    assert answer.err.startswith(f"train.py: {said}\n") if said else answer.err.count("\n") == 1
    code, stdout, stderr = run(corpus, out)
    assert code == 0 and "resuming   at step 8" in stdout and metrics(out) == metrics(reference)
    if not said:                                            # the run began with the new field's default, and no other
        assert "--qk-norm must be False to go on with the run in" in refused(corpus, out, "--qk-norm")


def test_other_data_is_refused(reference, tmp_path):
    (tmp_path / "other.txt").write_text("another text altogether\n" * 400)
    other = data.prepare([tmp_path / "other.txt"], tmp_path / "other", 512)
    assert "--data must be the text that the run in" in refused(other, reference)


def test_a_second_process_cannot_use_the_folder(corpus, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with data.locked(tmp_path / "run" / ".lock"):
        assert "not in use by another run" in refused(corpus, tmp_path / "run")
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", ".lock"}     # the other run's


@pytest.mark.parametrize("flags", [["--lr", "1e30", "--grad-clip", "0"], ["--lr", "3e38", "--steps", "1"],
                                   ["--lr", "1e30", "--steps", "1", "--norm", "layernorm", "--eval-interval", "0"],
                                   ["--lr", "1e30", "--checkpoint-interval", "1"],
                                   ["--lr", "1e30", "--weight-decay", "1e10", "--eval-interval", "0",
                                    "--checkpoint-interval", "1"]])
def test_a_diverged_model_stops_and_is_never_saved(corpus, tmp_path, flags):
    """Also when the last update is the one that breaks it, and no later loss tells."""
    out = tmp_path / "run"
    code, stdout, _ = run(corpus, out, "--warmup-steps", "0", *flags)
    assert code == 3 and "diverged" in stdout and "try a lower --lr than" in stdout
    assert all(math.isfinite(x.get("loss", 0)) and math.isfinite(x.get("val_loss", 0)) for x in metrics(out))
    reader, _ = data.newest_checkpoint(out / "checkpoints")
    if reader:
        assert all(reader.read(name).isfinite().all() for name in reader.tensors)
    else:
        assert "there was no checkpoint yet" in stdout


def test_a_non_finite_step_changes_nothing(corpus):
    c, world, gpt, optimizer, loader, _ = begin([*MINI, "--data", str(corpus)])
    gpt.chunks[0].lm_head.weight.data[3, 3] = math.inf
    before = [p.clone() for p in gpt.parameters()]
    loss, norm, *_ = train.train_step(gpt, optimizer, loader, 0, c, world)
    assert not (math.isfinite(loss) and math.isfinite(norm)) and not optimizer.state
    assert all(torch.equal(a, p) and p.grad is None for a, p in zip(before, gpt.parameters(), strict=True))


# ---- the step is plain AdamW on the mean loss, in any split


def plain_losses(argv, steps):
    """The textbook loop in float64: mean cross entropy of the global batch, clip, AdamW without tricks."""
    c = train.parse_config(argv)
    loader = data.Loader(c.data, micro_batch_size=c.global_batch_size, seq_len=c.seq_len, seed=c.seed)
    out = []
    for loss, norm, model in itertools.islice(train.textbook_loop(c, loader, torch.float64), steps):
        out.append((loss, norm))
        gpt = model
    return out, {p.full_name: p.detach() for p in gpt.parameters()}


def our_losses(rank, n, argv, steps):
    c, world, gpt, optimizer, loader, val = begin(argv, dtype=torch.float64)
    out = [train.train_step(gpt, optimizer, loader, step, c, world, False)[:2] for step in range(steps)]
    return out, {p.full_name: p.detach() for p in gpt.parameters()}, train.evaluate(gpt, val, c, world)


# Adam's step is g / (|g| + eps): an eps well above rounding keeps noise in the smallest gradients from being amplified
PARITY = ["--lr", "0.02", "--grad-clip", "0.2", "--adam-eps", "1e-6"]


@pytest.fixture(scope="session")
def plain(short_documents):
    argv = [*MINI, *PARITY, "--data", str(short_documents)]
    (losses, weights), (_, _, evaluation) = plain_losses(argv, 5), our_losses(0, 1, argv, 5)
    assert losses[0][1] > 0.3 and losses[-1][0] < losses[0][0] - 0.2                  # it clips, and it learns
    return losses, weights, evaluation


@pytest.mark.parametrize("ranks, micro", [(1, 8), (1, 4), (1, 1), (2, 4), (2, 1), (4, 2)])
def test_ranks_and_micro_batches_give_the_plain_run(short_documents, plain, run_ranks, ranks, micro):
    argv = [*MINI, *PARITY, "--data", str(short_documents), "--micro-batch-size", str(micro)]
    losses, weights, plain_evaluation = plain
    for ours, our_weights, evaluation in run_ranks(our_losses, ranks, argv, 5):
        for (loss, norm), (our_loss, our_norm) in zip(losses, ours, strict=True):
            assert our_loss == pytest.approx(loss, abs=1e-10) and our_norm == pytest.approx(norm, abs=1e-10)
        for name, w in weights.items():
            assert (our_weights[name] - w).abs().max() < 1e-10, name
        assert evaluation == pytest.approx(plain_evaluation, rel=1e-10) and evaluation["val_targets"] > 200


def stopped_run(rank, n, argv, stop_at):
    """Train; rank 1 alone is asked to stop at step stop_at."""
    def on_phase(step, phase):
        if rank == 1 and (step, phase) == (stop_at, "data"):
            os.kill(os.getpid(), signal.SIGTERM)

    c = train.parse_config(argv)
    world = train.join(c)
    return train.train(train.resolve(c, world), world, on_phase)


def test_two_ranks_stop_together_and_go_on(corpus, tmp_path, run_ranks):
    argv = [*MINI, "--data", str(corpus), "--micro-batch-size", "4"]
    assert run_ranks(stopped_run, 2, [*argv, "--out", str(tmp_path / "whole")], None) == [0, 0]
    assert run_ranks(stopped_run, 2, [*argv, "--out", str(tmp_path / "run")], 6) == [0, 0]
    assert steps_saved(tmp_path / "run") == [4, 7]
    assert run_ranks(stopped_run, 2, [*argv, "--out", str(tmp_path / "run")], None) == [0, 0]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    ours, theirs = newest_tensors(tmp_path / "run"), newest_tensors(tmp_path / "whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def refused_run(rank, n, argv):
    c = train.parse_config(argv)
    with pytest.raises((train.BadInput, data.DataError)) as error:
        train.train(c, train.join(c))
    return str(error.value)


def test_all_ranks_are_told_what_the_first_finds_wrong(corpus, tmp_path, run_ranks):
    with data.locked(tmp_path / ".lock"):
        for line in run_ranks(refused_run, 2, [*MINI, "--data", str(corpus), "--out", str(tmp_path)]):
            assert "not in use by another run" in line
    for line in run_ranks(refused_run, 2, [*MINI, "--data", str(tmp_path / "absent"), "--out", str(tmp_path)]):
        assert "absent' must match" in line


def test_evaluation_is_nats_per_token_and_bits_per_byte(short_documents):
    c, world, gpt, _, _, val = begin([*MINI, "--data", str(short_documents), "--eval-windows", "0"])
    got = train.evaluate(gpt, val, c, world)
    nats, targets, text = 0.0, 0, b""
    for i in range(0, val.num_windows, 16):
        b = val.batch(range(i, min(i + 16, val.num_windows)))
        with torch.no_grad():
            logits = gpt.chunks[0](b["tokens"], documents=b["documents"])
        nats += F.cross_entropy(logits.double().flatten(0, 1), b["targets"].flatten(), ignore_index=-1,
                                reduction="sum").item()
        targets += int((b["targets"] >= 0).sum())
        text += b"".join(val.tokenizer.bytes[t] for t in b["targets"].flatten().tolist() if t >= 0)
    assert got["val_targets"] == targets
    assert got["val_loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert got["val_bpb"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-6)


def test_the_yardsticks_read_the_text_that_is_evaluated(corpus):
    """Of all windows and of some: as many bytes as the loss was divided by, in the order of the text."""
    c, world, gpt, _, _, val = begin([*MINI, "--data", str(corpus)])
    seen = {}
    whole = b"".join(val.tokenizer.bytes[i] for shard in val.shards for i in shard)
    for windows in (0, 7):
        some = dataclasses.replace(c, eval_windows=windows)
        found, text = train.evaluate(gpt, val, some, world), val.text(train.windows_evaluated(val, some))
        scored = found["val_loss"] * found["val_targets"] / math.log(2) / found["val_bpb"]
        assert len(text) == round(scored)
        seen[windows] = text
    assert len(seen[7]) < len(seen[0]) and whole.startswith(seen[0]) and len(whole) - len(seen[0]) < 33 * 20
    # each window's text stands in the whole, and later windows come later
    at = [whole.find(part) for part in (seen[7][:20], seen[7][-20:])]
    assert 0 <= at[0] < at[1]


def test_every_attention_gives_the_same_losses(corpus, tmp_path):
    """torch's own, the tiled and the textbook: two steps of a model with document masks."""
    for attention in ("sdpa", "torch", "reference"):
        code, _, stderr = run(corpus, tmp_path / attention, "--steps", "2", "--attention", attention)
        assert code == 0, stderr
        assert losses(tmp_path / attention) == pytest.approx(losses(tmp_path / "sdpa"), rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_an_attention_that_cannot_run_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train.flash_attn, "INTERPRET", False)
    stderr = refused(corpus, tmp_path / "run", "--attention", "triton")
    assert "--attention must be one that runs here" in stderr and "torch, sdpa, reference" in stderr
    assert not (tmp_path / "run").exists()
    c = train.parse_config([*MINI, "--attention", "triton"])
    assert train.make_bill(c, train.join(c))["parameters"] > 0                          # what it costs needs no kernel


def test_the_document_mask_can_be_turned_off(corpus):
    loader = data.Loader(corpus, micro_batch_size=1, seq_len=64)
    batches = (loader.batch([i]) for i in range(loader.num_windows))
    batch = next(b for b in batches if (b["documents"][0, 20:40].diff() == 1).any())          # a boundary in the middle
    losses = {}
    for flag in ("--document-mask", "--no-document-mask"):
        c = train.parse_config([*MINI, flag])
        gpt = train.make_stage(c, torch.device("cpu"))
        for p in gpt.parameters():
            p.data.mul_(20)
        b = train.to_device(batch, c, torch.device("cpu"))
        losses[flag] = gpt(b["tokens"], b["targets"], documents=b.get("documents"))[0].item()
    assert abs(losses["--document-mask"] - losses["--no-document-mask"]) > 0.1


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_document_mask_lives_as_long_as_its_micro_batch(corpus, recompute, monkeypatch):
    """Of eight micro-batches in a step, one mask at a time: the bill counts one."""
    alive, counts, plain = weakref.WeakSet(), [], net.document_mask

    def watched(*args):
        counts.append(len(alive))
        mask = plain(*args)
        alive.add(mask)
        return mask

    monkeypatch.setattr(net, "document_mask", watched)
    c, world, model, optimizer, loader, _ = begin([*MINI, "--data", str(corpus), "--micro-batch-size", "1",
                                                   "--attention", "sdpa", "--recompute", recompute])
    train.train_step(model, optimizer, loader, 0, c, world)
    assert counts == [0] * 8


def test_layers_share_one_mask_in_low_precision_too(corpus, monkeypatch):
    """Made in bf16: a mask in float32 would be cast anew by every layer."""
    seen, plain = [], net.sdpa_attention

    def watched(q, k, v, *, documents):
        seen.append((documents.data_ptr(), documents.dtype, q.dtype))
        return plain(q, k, v, documents=documents)

    monkeypatch.setattr(net, "sdpa_attention", watched)
    c = train.parse_config([*MINI, "--data", str(corpus), "--precision", "bf16", "--attention", "sdpa",
                            "--pp", "2", "--pp-schedule", "zb"])                                        # not emulated
    gpt = train.make_stage(c, torch.device("cpu"))
    with torch.no_grad():
        gpt(**train.to_device(next(data.Loader(corpus, micro_batch_size=2, seq_len=32)), c, torch.device("cpu")))
    assert len(seen) == 2 and len(set(seen)) == 1 and seen[0][1:] == (torch.bfloat16, torch.bfloat16)


def test_learning_rate_schedules():
    c = train.parse_config(["--steps", "100", "--warmup-steps", "10", "--lr", "1.0", "--min-lr-ratio", "0.1",
                            "--schedule", "cosine"])
    assert [train.lr_at(s, c) for s in (0, 4, 9)] == [0.1, 0.5, 1.0] and train.lr_at(10, c) == 1.0
    assert train.lr_at(55, c) == pytest.approx(0.55) and train.lr_at(100, c) == pytest.approx(0.1)
    w = dataclasses.replace(c, schedule="wsd", decay_fraction=0.2)
    assert [train.lr_at(s, w) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert train.lr_at(90, w) == pytest.approx(0.55) and train.lr_at(100, w) == pytest.approx(0.1)
    for each in (c, w):
        rates = [train.lr_at(s, each) for s in range(10, 101)]
        assert rates == sorted(rates, reverse=True)


# ---- sampling


def test_sampling_from_a_run(reference):
    def sample(*flags):
        code, text, _ = outcome(train.main, "--sample", "def f(", "--out", reference, "--max-new-tokens", "20", *flags)
        assert code == 0
        return text

    text = sample()
    assert text.startswith("def f(") and len(text) > 10 and sample() == text != sample("--seed", "1")
    assert sample("--temperature", "0") == sample("--temperature", "0", "--seed", "2")
    reader, _ = data.newest_checkpoint(reference / "checkpoints")
    t = data.Tokenizer(reference / "tokenizer.model")
    gpt = train.make_stage(train.Config(**reader.meta["config"]), torch.device("cpu"), read=reader.read)
    ids = [t.bos_id] + t.encode("def f(")
    expected = gpt.generate(torch.tensor([ids]), 20, temperature=0, stop=t.eos_id)[0].tolist()
    assert sample("--temperature", "0") == t.decode(expected) + "\n"


def test_sampling_wants_the_models_own_tokenizer(reference, tmp_path, capsys):
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    (out / "tokenizer.model").write_bytes(data.Tokenizer.train(["other text\n" * 9], 400).proto)
    assert train.main(["--sample", "x", "--out", str(out)]) == 2
    assert "run: its tokenizer is not the one the model was trained with" in capsys.readouterr().err
    (out / "tokenizer.model").unlink()
    assert train.main(["--sample", "x", "--out", str(out)]) == 2


def test_a_text_too_short_for_the_vocabulary_trains_and_samples(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"a short text, line {i}\n" for i in range(300)))
    code, stdout, _ = run(tmp_path / "a.txt", tmp_path / "run", "--vocab-size", "4096", "--temperature", "2",
                          "--seq-len", "16")
    assert code == 0 and "sample 1" in stdout


# ---- the command line


BAD = [
    (["--leraning-rate", "1"], "unrecognized arguments: --leraning-rate"),
    (["--config", "smal"], "--config must be one of tiny, small, .*, got 'smal'"),
    (["--steps", "ten"], "--steps.*'ten'"),
    (["--steps", "0"], "--steps must be at least 1, got 0"),
    (["--lr", "nan"], "--lr must be a finite number, got nan"),
    (["--lr", "-1"], "--lr must be at least 0, got -1.0"), (["--norm", "batch"], "--norm.*batch"),
    (["--n-embd", "30"], "--n_embd must be a multiple of n_head|--n-embd must be a multiple of n_head, got 30 and 4"),
    (["--n-kv-head", "3"], "--n-head must be a multiple of n_kv_head, got 4 and 3"),
    (["--top-p", "0"], "--top-p must be above 0, got 0.0"), (["--top-p", "1.1"], "--top-p must be at most 1, got 1.1"),
    (["--beta2", "1"], "--beta2 must be below 1, got 1.0"), (["--json"], "--json goes with --dry-run, got it without"),
    (["--gpu", "h100"], "--gpu goes with --dry-run, got h100 without it"),
    (["--loss-scale", "1e39"], "--loss-scale must be below 1e.38, got 1e.39"),
    (["--pp-schedule", "interleaved", "--pp", "2", "--global-batch-size", "7", "--dry-run"],
     "--pp-schedule interleaved needs a multiple of pp = 2 micro-batches per step, got 7"),
    (["--gpu", "h1000", "--dry-run"], "--gpu: invalid choice: 'h1000'"),
    (["--gpu", "t4", "--dry-run", "--precision", "fp8"], "--precision must be one that the GPU has, got fp8"),
    (["--global-batch-size", "6", "--micro-batch-size", "4"],
     "--global-batch-size must be a multiple of .*4 x 1 = 4, got 6"),
    (["--vocab-size", "100", "--data", str(ROOT / "README.md")], "--vocab-size must be at least 320"),
    (["--device", "warp"], "--device must be usable here, got 'warp'"),
    (["--device", "meta"], "--device must be usable here, got 'meta'"),
    (["--seed", str(2**63)], "--seed must be below"),
    (["--rope-theta", "0"], "--rope-theta must be above 0"),
    (["--data", "/no/such"], "source '/no/such' must match"), (["--seed"], "--seed"),
    (["extra"], "unrecognized arguments: extra"),
    (["--sample", "x", "--out", "absent"], "--out must be the folder of a run"),
    (["--temperature", "1e-40"], "--temperature must be 0 or at least 1e-4, got 1e-40"),
    (["--global-batch-size", "4000000000000"], "--global-batch-size must be at most 16777216"),
    (["--n-embd", "1000000000000"], "--n-embd must be at most 1048576"),
    (["--n-embd", "0"], "--n-embd must be at least 1"), (["--n-layer", "0"], "--n-layer must be at least 1"),
    (["--head-dim", "300", "--attention", "torch"], "--head-dim must be at most 256 with --attention torch, got 300"),
    (["--seq-len", "1"], "--seq-len must be at least 2")]


@pytest.mark.parametrize("argv, message", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_leaves_no_run(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert {path.name for path in tmp_path.iterdir()} <= {"data"}


def test_an_out_that_is_a_file_is_one_line(corpus, tmp_path):
    (tmp_path / "run").write_text("")
    assert "run: must be a folder that can be written" in refused(corpus, tmp_path / "run")


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as done:
        train.parse_config(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for f in dataclasses.fields(train.Config):
        assert "--" + f.name.replace("_", "-") in text and f.metadata["help"].split()[0] in text
    c = train.parse_config(["--config", "small", "--no-bias", "--n-layer=3", "--tie-embeddings"])
    assert (c.bias, c.n_layer, c.tie_embeddings, c.n_embd, c.n_kv_head, c.head_dim, c.n_ff) == (False, 3, True, 768,
                                                                                                12, 64, 3072)
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.steps = 3


@pytest.mark.parametrize("name, parameters", [("small", 124e6), ("medium", 355e6), ("large", 1.36e9), ("7b", 6.74e9)])
def test_configs_have_the_size_they_are_named_for(name, parameters):
    c = train.parse_config(["--config", name])
    world = train.join(c)
    b = train.make_bill(train.resolve(c, world), world)
    assert b["parameters"] == pytest.approx(parameters, rel=0.01)
    assert 15 < b["tokens_per_parameter"] < 25
    with torch.device("meta"):
        assert sum(p.numel() for p in net.GPT(c.model).parameters()) == b["parameters"]


def test_tiny_divides_by_four():
    c = train.parse_config([])
    for value in (c.n_head, c.n_kv_head, c.n_layer, c.vocab_size, c.global_batch_size):
        assert value % 4 == 0


def test_dry_run_says_what_the_run_would_cost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run", "--json", *MINI]) == 0
    b = json.loads(capsys.readouterr().out)
    c = train.parse_config(MINI)
    assert b["tokens"] == 12 * 8 * 32 and b["seconds"] > 0
    assert b["flops"] == b["tokens"] * net.flops_per_token(c.model, 32)
    gpt = train.make_stage(c, torch.device("cpu"))
    held = sum(p.untyped_storage().nbytes() for p in gpt.parameters())
    assert b["memory_bytes"]["parameters"] == b["memory_bytes"]["gradients"] == held
    assert b["memory_bytes"]["states"] == 2 * held
    assert train.main(["--dry-run", *MINI]) == 0
    text = capsys.readouterr().out
    assert "parameters" in text and "MB per rank" in text and "about" in text and not list(tmp_path.iterdir())


def test_a_batch_of_interleaved_stages_is_cut_into_whole_rounds():
    """14 windows on 2 stages: 7 micro-batches of 2 would be refused, 14 of 1 are not."""
    for flags, micro in (("--pp 2 --pp-schedule interleaved --global-batch-size 14", 1), ("--pp 2", 2), ("", 8),
                         ("--pp 2 --pp-schedule interleaved", 2), ("--dp 2", 4), ("--nproc 4", 2)):
        with dry_run(flags.split()) as (c, _):
            assert c.micro_batch_size == micro, flags


def test_dry_run_of_gpus_that_are_not_here(monkeypatch, capsys):
    """Their own time and cost; the same bill as scaling.py's planner has of that layout."""
    monkeypatch.setattr(train, "time_tokens", None)                                              # nothing is timed here
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():   # also in torchrun's only process
        monkeypatch.setenv(name, value)
    assert train.main("--config 7b --gpu h100 --dp 8 --tp 4 --dry-run --json".split()) == 0
    b = json.loads(capsys.readouterr().out)
    assert b["gpu"] == "h100" and b["config"]["precision"] == "bf16" and b["layout"]["tp"] == 4
    fastest = b["flops"] / 32 / scaling.GPUS["h100"].peak_flops("bf16")
    assert 0.3 < b["mfu"] < 0.6 and b["seconds"] == pytest.approx(fastest / b["mfu"])
    c = train.parse_config(["--config", "7b"])
    row = scaling.plan(c.model, "h100", 32, global_batch_size=c.global_batch_size, dp=8, tp=4, pp=1, zero=0,
                       micro_batch_size=1, recompute="full", tokens=c.steps * c.tokens_per_step)[0]
    assert {name: row[name] for name in ("seconds", "memory_bytes", "dollars", "bytes_sent")} == {
        name: b[name] for name in ("seconds", "memory_bytes", "dollars", "bytes_sent")}


def test_the_bill_counts_the_mask_of_documents_and_of_precision():
    """One additive mask for all layers, (T, T) per window: where torch's own attention reads it, and nowhere else."""
    def activations(*flags):
        c = train.parse_config([*MINI, *flags])
        world = train.join(c)
        return train.make_bill(train.resolve(c, world), world)["memory_bytes"]["activations"]

    plain = activations("--no-document-mask", "--attention", "sdpa")
    assert activations("--attention", "sdpa") - plain == 4 * 32 * 32 * 4                           # micro-batch x T x T
    assert activations("--attention", "torch") == plain


def test_a_gpu_that_the_table_does_not_have_gets_its_name_and_no_mfu(monkeypatch):
    c, device = dataclasses.replace(train.parse_config([]), precision="bf16"), torch.device("cuda")
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA Unheard-Of 9000", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found, source = train.peak_flops(c, device)
        assert found == peak and name in source and ("no MFU" in source) == (peak is None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    c = dataclasses.replace(c, precision="fp8")                                      # of the precision's own peak
    assert train.peak_flops(c, device)[0] == scaling.GPUS["h100"].peak_flops("fp8") == 1979e12


# ---- launching


def test_torchrun_is_the_same_program(reference, corpus, tmp_path):
    args = ["--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), *MINI, "--data", str(corpus), "--out",
            str(tmp_path / "run")]
    process = POOL.process(as_program, torch.distributed.run.__file__, args, tmp_path, {}, daemon=False)
    process.join(120)
    process.kill()
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    assert (tmp_path / "stdout").read_text().count("bits/byte") == 3                                   # one rank speaks
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=1e-5)
    assert steps_saved(tmp_path / "run") == steps_saved(reference)
    # its checkpoint goes on under one process: the layout is forgotten
    code, stdout, _ = run(corpus, tmp_path / "run")
    assert code == 0 and "is finished" in stdout


# ---- the house


CONCEPTS = ["model", "flash_attn", "parallel", "zero", "precision", "scaling", "data"]


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_imports_no_sibling(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    assert ast.get_docstring(tree) and f"run: python {name}.py" in ast.get_docstring(tree)
    names = {getattr(node, "name", "") for node in tree.body}
    assert "demo" in names
    for top in tree.body:
        if getattr(top, "name", "") == "demo":
            continue
        for node in ast.walk(top):
            used = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {u.split(".")[0] for u in used} & {*CONCEPTS, "train"}, f"{name}.py imports {used}"


def test_no_other_top_level_file():
    allowed = {"README.md", "requirements.txt", "train.py", "tests", "out", "data", *(f"{c}.py" for c in CONCEPTS)}
    seen = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert seen <= allowed, seen - allowed


@pytest.mark.slow
@pytest.mark.filterwarnings("default")               # torch.compile warns itself, inside, of what users do not see
def test_compiled_blocks_train_and_sample_without_a_warning(corpus, tmp_path):
    for flag in ("off", "on"):
        code, stdout, stderr = run(corpus, tmp_path / flag, "--compile", flag, "--n-layer", "10")
        assert code == 0 and stderr == "" and "sample" in stdout
    assert losses(tmp_path / "off") == pytest.approx(losses(tmp_path / "on"), rel=1e-4)


@pytest.mark.parametrize("name", CONCEPTS)
def test_demos_run_and_assert(name, tmp_path):
    """One in an interpreter of its own, where its operators have no namesakes, the others where torch is there."""
    path = ROOT / f"{name}.py"
    if name == "flash_attn":
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=180,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        process = POOL.process(as_program, path, [], tmp_path, {}, daemon=False)             # it starts ranks, perhaps
        process.join(180)
        code, stdout, stderr = process.exitcode, *((tmp_path / x).read_text() for x in ("stdout", "stderr"))
        process.kill()
    assert code == 0, stdout + stderr
    assert stderr == "" and ("predicted" in stdout or "formula" in stdout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")               # torch.compile warns itself, inside, of what users do not see
@pytest.mark.parametrize("flags, near", [
    ("--precision fp32 --compile off", 1e-4), ("--precision fp32 --attention sdpa --compile off", 1e-4), ("", 0.03),
    ("--precision bf16 --recompute full", 0.03), ("--precision bf16 --zero 3", 0.03), ("--precision fp16", 0.03),
    ("--precision fp8", 0.05)])
def test_a_gpu_runs_what_a_cpu_runs(corpus, tmp_path, reference, flags, near):
    """Losses of a run on a GPU, interrupted after step 8, are the CPU's to its precision."""
    for _ in range(2):
        code, stdout, stderr = run(corpus, tmp_path / "run", "--device", "cuda", *flags.split())
        assert code == 0 and stderr == "" and "sample" in stdout
        assert losses(tmp_path / "run") == pytest.approx(losses(reference), abs=near)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")


def test_a_model_is_measured_on_its_own_text(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i * i} of a text\n" for i in range(3000)))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"

    def quantize(*flags):
        return outcome(train.main, "--out", out, "--quantize", "int8", "--device", "cpu", *flags)

    assert run(text, out, "--vocab-size", "512")[0] == 0
    code, stdout, _ = quantize()
    assert code == 0 and "validation" in stdout
    text.write_text(text.read_text() + "one more line\n" * 200)
    code, stdout, stderr = quantize()
    assert code == 2 and stderr.count("\n") == 1 and f"must measure on the text that {out} was trained on" in stderr
    code, stdout, stderr = quantize("--data", text.with_name("other.txt"))
    assert code == 2 and "--data must be left out with --quantize" in stderr


def test_a_config_that_a_person_edited_is_written_anew(reference, corpus, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    assert run(corpus, tmp_path / "run", "--eval-windows", "1")[0] == 0
    written = (tmp_path / "run" / "config.json").read_text()
    for edited in ("{", "[1]", '{"steps": "many"}', "{}"):
        (tmp_path / "run" / "config.json").write_text(edited)
        code, stdout, _ = run(corpus, tmp_path / "run", "--eval-windows", "1")
        assert code == 0 and "is finished" in stdout
        assert (tmp_path / "run" / "config.json").read_text() == written


def test_an_evaluation_is_finished_before_a_run_stops(reference, corpus, tmp_path):
    """SIGHUP as it begins: the evaluation and one more step are made, then the run saves."""
    out = tmp_path / "run"
    assert child(corpus, out, interrupt=((6, "evaluate"), signal.SIGHUP)) == 0
    assert steps_saved(out) == [4, 7] and [x["step"] for x in metrics(out)] == [1, 2, 3, 4, 5, 6, 6, 7]
    assert child(corpus, out) == 0 and metrics(out) == metrics(reference)


def test_a_full_disk_stops_no_run(reference, corpus, tmp_path, monkeypatch):
    """The save of step 8 fails: the run says so and goes on. That of the last step fails: exit code 1, one line, and
    the same command finishes the run."""
    out, write = tmp_path / "run", data.write_safetensors

    def full(path, *args):
        if any(f"step-{step:08d}" in str(path) for step in broken):
            raise OSError(28, "No space left on device")
        return write(path, *args)

    monkeypatch.setattr(data, "write_safetensors", full)
    broken = [8, 12]
    code, stdout, stderr = run(corpus, out)
    assert "step-00000008: cannot be written, rank 0: No space left on device; the checkpoint of step 4 is intact; " \
           "the run goes on and tries again" in stdout
    assert code == 1 and stderr.count("\n") == 1 and "step-00000012: cannot be written" in stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    broken = []
    assert run(corpus, out)[0] == 0 and metrics(out) == metrics(reference)


def test_a_run_whose_every_step_was_skipped_is_no_model(corpus, tmp_path):
    """fp16 gradients that overflow at any scale that a few steps reach."""
    code, stdout, _ = run(corpus, tmp_path / "run", "--precision", "fp16", "--steps", "3", "--loss-scale", "1e30",
                          "--device", "cpu")
    assert code == 3 and "every step was skipped" in stdout and steps_saved(tmp_path / "run") == []


def ascii_program(*args):
    sys.stdout.reconfigure(encoding="ascii")
    as_program(*args)


def test_a_terminal_may_go_away(corpus, tmp_path):
    """`train.py | head -1`, in a locale without UTF-8: the run goes on to its end."""
    os.mkfifo(tmp_path / "stdout")
    process = POOL.process(ascii_program, ROOT / "train.py", [*MINI, "--data", str(corpus), "--out",
                                                              str(tmp_path / "run")], tmp_path, {})
    with open(tmp_path / "stdout") as terminal:
        assert terminal.readline().startswith("model ")
    process.join(60)
    assert process.exitcode == 0 and (tmp_path / "stderr").read_text() == ""
    assert len(losses(tmp_path / "run")) == 12


def test_a_refused_run_leaves_no_folder(corpus, tmp_path):
    (tmp_path / "base").mkdir()
    for flags, message in ((["--vocab-size", "500"], f"--vocab-size must be at least the 512 of {corpus}, got 500"),
                           (["--init-from", tmp_path / "base"], "")):
        assert message in refused(corpus, tmp_path / "run", *flags) and not (tmp_path / "run").exists()


def program_in(folder, args):
    os.chdir(folder)
    as_program(ROOT / "train.py", args, folder, {})


def test_sigterm_while_text_is_prepared_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i * i} of a text\n" for i in range(100000)))
    args = [*MINI, "--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run")]
    process = POOL.process(program_in, tmp_path, args)
    while not list(tmp_path.glob("data/.*.tmp")):
        assert process.is_alive()
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 1 and (tmp_path / "stderr").read_text() == "train.py: interrupted\n"
    assert "preparing" in (tmp_path / "stdout").read_text()
    assert not list(tmp_path.glob("data/.*.tmp")) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment, message", [
    ("RANK=3 WORLD_SIZE=2", "RANK must be below WORLD_SIZE, got 3 and 2"),
    ("RANK=3", "WORLD_SIZE must be set together with RANK, as torchrun does, got None"),
    ("WORLD_SIZE=2", "RANK must be set together with WORLD_SIZE"),
    ("RANK= WORLD_SIZE=2", "RANK must be set together with RANK, WORLD_SIZE, as torchrun does, got ''"),
    ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE must be a number, got 'two'"),
    ("RANK=-1 WORLD_SIZE=2", "RANK must be a number, got '-1'"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=", "MASTER_ADDR must be set"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=x", "LOCAL_RANK must be a number, got 'x'"),
    ("RANK=0 WORLD_SIZE=2 MASTER_PORT=TAKEN", "MASTER_ADDR:MASTER_PORT must be where all ranks can meet, 127.0.0.1:")])
@pytest.mark.parametrize("flags", ["", "--sample hi"])
def test_an_environment_of_ranks_is_input(corpus, tmp_path, monkeypatch, environment, message, flags):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511"),
                            *(item.split("=") for item in environment.split())]:
            monkeypatch.setenv(name, value.replace("TAKEN", str(taken.getsockname()[1])))
        assert message in refused(corpus, tmp_path / "run", *flags.split())


def test_ranks_that_torchrun_started_are_not_started_again(corpus, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert run(corpus, tmp_path / "run", "--nproc", "2", "--steps", "1")[0] == 0
