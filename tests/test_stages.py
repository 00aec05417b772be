"""SFT, DPO and reinforcement learning as train.py runs them: equal to their textbook formulas, in any layout the same
run, resumed bit for bit; where models come from and what they are used for."""

import io
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench import bench_probe
from conftest import metrics, newest_tensors, outcome
from test_parallel import differences

import data
import model as net
import train

SHAPE = "--n-layer 4 --n-head 4 --n-kv-head 2 --n-embd 32 --n-ff 64 --seq-len 64 --vocab-size 512".split()
QUICK = """--global-batch-size 8 --steps 8 --warmup-steps 2 --eval-interval 4 --checkpoint-interval 4 --eval-windows 8
--max-new-tokens 8 --log-interval 4 --optimizer adamw --schedule cosine --min-lr-ratio 0.1 --device cpu""".split()


def run(*argv) -> tuple[int, str, str]:
    """train.main in this process -> (exit code, stdout, stderr)."""
    return outcome(train.main, *argv)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """One file of conversations, of pairs, of prompts: 48 rows, every sixth held out."""
    folder, rows = tmp_path_factory.mktemp("rows"), range(48)
    contents = {
        "sft": [{"messages": [{"role": "user", "content": f"print {i}"},
                              {"role": "assistant", "content": f"def f(self):\n    return {i}" * (1 + i % 2)}]}
                for i in rows],
        "dpo": [{"prompt": f"print {i}", "chosen": f"return {i}" * (1 + i % 3), "rejected": "self." * (1 + i % 4)}
                for i in rows],
        "rl": [{"prompt": f"print {i}"} for i in rows]}
    for name, content in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row | {"split": "train" if i % 6 else "val"}) + "\n"
                                                      for i, row in enumerate(content)))
    (folder / "reward.py").write_text("def spaces(row, answer):\n    return answer.count(' ') - 1\n")
    return {name: folder / f"{name}.jsonl" for name in contents} | {"reward": f"{folder}/reward.py:spaces"}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """A model that a few steps of pre-training made."""
    out = tmp_path_factory.mktemp("base") / "run"
    code, _, error = run(*SHAPE, *QUICK, "--data", corpus, "--out", out, "--lr", "0.01")
    assert code == 0, error
    return out


def stage(files, base, objective, *flags) -> list:
    sampled = ["--group-size", "4", "--kl-coef", "0.3", "--answer-tokens", "6"]
    return ["--objective", objective, "--init-from", str(base), "--data", str(files[objective]), *QUICK,
            "--lr", "0.003", "--adam-eps", "1e-6", "--grad-clip", "0.5", "--reward", files["reward"],
            *(sampled if objective == "rl" else []), *flags]


# ---- textbook formulas -----------------------------------------------------------------------------------------------

def staged(rank, n, argv, steps, dtype=torch.float64):
    """Steps of a stage -> [(loss, norm, statistics ...), ...], this rank's pieces, an evaluation."""
    c = train.parse_config(argv)
    world = train.join(c)
    c = train.resolve(c, world)
    (loader, val), (read, _) = train.open_data(c, world), train.open_parent(c, world)
    model = train.Model(c, world, read, dtype=dtype)
    optimizer, batches = train.make_optimizer(model, c), loader
    if c.objective == "dpo":
        for each in (loader, val):
            each.reference = train.answers_nll(model, each, c, world)
    if c.objective == "rl":
        start = train.make_stage(c, world.device, read=read, dtype=dtype)
        batches = train.Rollouts(loader, model.chunks[0], start, c)
    losses, scaler = [], train.precision.LossScaler(c.loss_scale) if c.precision == "fp16" else None
    for step in range(steps):
        loss, norm, _, statistics = train.train_step(model, optimizer, batches, step, c, world, scaler=scaler)
        losses.append((loss, norm, *statistics.values()))
    pieces = [(p.full_name, p.box, getattr(p, "flat", None), p.detach()) for p in model.parameters()]
    evaluation = {} if c.objective == "rl" else train.evaluate(model, val, c, world)
    return losses, pieces, evaluation


def log_p(gpt, batch):
    """log p of each target (B, T), 0 where there is none, with its gradient."""
    logits = gpt(batch["tokens"], documents=batch.get("documents"))
    targets = batch["targets"]
    picked = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(targets < 0, 0.0)


def sft_loss(gpt, start, batch, c):
    logits = gpt(batch["tokens"], documents=batch["documents"])
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=data.NO_TARGET), []


def dpo_loss(gpt, start, batch, c):
    """Pair by pair, eq. 7 of Rafailov 2023."""
    policy, reference = log_p(gpt, batch), log_p(start, batch).detach()
    margins = []
    for chosen in range(0, len(policy), 2):
        for document in range(1, int(batch["documents"][chosen].max()) + 1):
            sums = [x[row][batch["documents"][row] == document].sum() for row in (chosen, chosen + 1)
                    for x in (policy, reference)]
            if (batch["targets"][chosen][batch["documents"][chosen] == document] >= 0).any():
                margins.append(c.beta * ((sums[0] - sums[1]) - (sums[2] - sums[3])))
    margins = torch.stack(margins)
    assert len(margins) == batch["count"]
    return -F.logsigmoid(margins).mean(), [(margins > 0).double().mean().item(), margins.mean().item()]


def rl_loss(gpt, start, batch, c):
    """The advantage of an answer, less what it costs, times its log p: the score-function gradient of the reward and of
    KL(p, p_start). A token cannot be made to pay for what came before it."""
    policy = log_p(gpt, batch)
    log_ratio = (policy - log_p(start, batch)).detach()
    rewards = batch["reward"].view(-1, c.group_size)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
    loss = 0
    for row in range(len(policy)):
        for t in range(policy.shape[1]):
            loss -= (advantage[row] - c.kl_coef * log_ratio[row, t:].sum()) * policy[row, t]
    return loss / len(advantage), [rewards.mean().item(), log_ratio.sum().item() / len(advantage)]


def test_weighted_cross_entropy_has_the_gradients_of_the_losses_on_the_board():
    torch.manual_seed(0)
    B, T, V, c = 6, 12, 17, SimpleNamespace(beta=0.3, kl_coef=0.0)
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    start = torch.randn(B, T, V, dtype=torch.float64)
    targets = torch.randint(V, (B, T)).masked_fill(torch.rand(B, T) < 0.3, data.NO_TARGET)
    nll, nll_start = (F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=data.NO_TARGET)
                      .view(B, T) for x in (logits, start))
    log_ratio, advantage = (nll_start - nll).sum(1), torch.randn(B, dtype=torch.float64)
    pairs = {"targets": targets, "documents": torch.zeros(B, T, dtype=torch.int64),
             "reference": nll_start.sum(1, keepdim=True)}
    answers = {"targets": targets, "reference": nll_start, "advantage": advantage, "reward": advantage}
    dpo = net.dpo_loss(log_ratio[0::2], log_ratio[1::2], c.beta)
    reinforce = net.reinforce_loss(-nll.sum(1), advantage)
    for board, (weights, sums), count in ((dpo, net.preference(pairs, nll.detach(), c.beta), B // 2),
                                          (reinforce, net.policy_gradient(answers, nll.detach(), c.kl_coef), B)):
        expected, ours = (torch.autograd.grad(loss, logits, retain_graph=True)[0]
                          for loss in (board, (weights * nll).sum() / count))
        assert (ours - expected).abs().max() < 1e-14 and expected.abs().max() > 0.01
        assert sums[0] / count == pytest.approx(board.item(), rel=1e-12)


@pytest.mark.parametrize("objective, loss_of", [("sft", sft_loss), ("dpo", dpo_loss), ("rl", rl_loss)])
def test_a_stage_is_its_textbook_formula(files, base, objective, loss_of):
    """Three steps of AdamW on the loss as the papers write it, by autograd, in float64."""
    argv = stage(files, base, objective, "--micro-batch-size", "8")
    ours, pieces, _ = staged(0, 1, argv, 3)
    c = train.parse_config(argv)
    world = train.join(c)
    c = train.resolve(c, world)
    read, (loader, _) = train.open_parent(c, world)[0], train.open_data(c, world)
    gpt, start = (train.make_stage(c, world.device, read=read, dtype=torch.float64) for _ in range(2))
    batches = train.Rollouts(loader, gpt, start, c) if objective == "rl" else loader
    optimizer = torch.optim.AdamW(train.decay_groups(gpt, c), betas=(c.beta1, c.beta2), eps=c.adam_eps)
    for step in range(3):
        loss, statistics = loss_of(gpt, start, next(batches), c)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in gpt.parameters()]).norm().item()
        for p in gpt.parameters():
            p.grad *= min(1.0, c.grad_clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = train.lr_at(step, c)
        optimizer.step()
        optimizer.zero_grad()
        if objective == "rl":                       # ours reports the surrogate sum w nll, whose gradient is the same
            assert ours[step][1:] == pytest.approx([norm, *statistics], rel=1e-9, abs=1e-10)
        else:
            assert ours[step] == pytest.approx([loss.item(), norm, *statistics], rel=1e-9, abs=1e-10)
    for (name, _, _, mine), theirs in zip(pieces, gpt.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-10, name
    assert objective != "dpo" or ours[0][0] == math.log(2) and ours[0][3] == 0 and ours[2][3] > 0.001


@pytest.mark.parametrize("objective", ["sft", "dpo", "rl"])
def test_low_precision_weighs_tokens_as_float32_does(files, base, objective):
    """Losses within the format's rounding; with the loss scale in the weights (fp16) as without (bf16)."""
    argv = stage(files, base, objective, "--micro-batch-size", "8", "--kl-coef", "0")
    steps = 1 if objective == "rl" else 2                                  # later, other answers are sampled
    plain = staged(0, 1, argv, steps, None)[0]
    for kind, eps in (("bf16", 2**-7), ("fp16", 2**-10)):
        losses = staged(0, 1, [*argv, "--precision", kind], steps, None)[0]
        for step in range(steps):
            assert losses[step][1] == pytest.approx(plain[step][1], rel=30 * eps)                     # gradient norms
            assert objective == "rl" or losses[step][0] == pytest.approx(plain[step][0], rel=2 * eps)


# ---- any layout ------------------------------------------------------------------------------------------------------

LAYOUTS = [(2, "--dp 2"), (4, "--tp 2 --pp 2"), (4, "--dp 2 --pp 2 --pp-schedule zb"), (2, "--zero 1"),
           (4, "--tp 2 --zero 2"), (2, "--zero 3"), (1, "--micro-batch-size 4"), (4, "--pp 2 --zero 3"),
           (4, "--pp 2 --pp-schedule interleaved"), (2, "--tp 2 --no-sequence-parallel --recompute full")]
DAILY = {"sft": LAYOUTS[1:6:2], "dpo": [LAYOUTS[i] for i in (1, 2, 4, 5)]}


@pytest.mark.parametrize("objective, ranks, flags", [
    *(pytest.param(objective, *layout, marks=[] if layout in DAILY[objective] else [pytest.mark.slow])
      for objective in ("sft", "dpo") for layout in LAYOUTS),
    ("rl", 2, "--dp 2"), pytest.param("rl", 2, "--zero 2", marks=pytest.mark.slow)])
def test_any_layout_is_the_same_stage(files, base, run_ranks, objective, ranks, flags):
    micro = "4" if objective == "rl" else "2"
    argv = stage(files, base, objective, "--micro-batch-size", micro)
    losses, weights, evaluation = staged(0, 1, argv, 3)
    weights = {name: p for name, *_, p in weights}
    for ours, pieces, our_evaluation in run_ranks(staged, ranks, [*argv, *flags.split()], 3):
        assert torch.tensor(ours).sub(torch.tensor(losses)).abs().max() < 1e-10
        assert our_evaluation == pytest.approx(evaluation, rel=1e-9)
        assert max(differences(ours, pieces, losses, weights)) < 1e-10


# ---- runs ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("objective", ["sft", "dpo", "rl"])
def test_a_stage_trains_and_goes_on_bit_for_bit(files, base, tmp_path, objective):
    out, argv = tmp_path / "run", stage(files, base, objective)
    code, printed, error = run(*argv, "--out", out)
    assert code == 0, error
    lines, whole = metrics(out), newest_tensors(out)
    names = {"sft": {"val_bpb", "reward"}, "dpo": {"val_accuracy", "val_margin", "reward"}, "rl": {"reward"}}[objective]
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8]                      # also before the first step
    assert all(names | {"text_loss"} <= line.keys() for line in evaluations)
    steps = [line for line in lines if "loss" in line]
    assert {"sft": set(), "dpo": {"accuracy", "margin"}, "rl": {"reward", "kl"}}[objective] <= steps[0].keys()
    if objective == "sft":
        assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.1
    if objective == "dpo":
        assert evaluations[0]["val_loss"] == math.log(2) and evaluations[-1]["val_margin"] > 0
    card = data.newest_checkpoint(out / "checkpoints")[0].meta["card"]
    assert card["parent"] == str(base) and card["objective"] == objective and card["knowledge_cutoff"]
    assert str(files[objective]) in card["sources"] and len(card["sources"]) > 1 and "--- answer ---" in printed
    shutil.rmtree(out / "checkpoints" / "step-00000008")                                              # killed before it
    assert run(*argv, "--out", out)[0] == 0
    again = newest_tensors(out)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    assert metrics(out) == lines


def test_a_stage_goes_on_when_its_parent_is_gone(files, base, tmp_path):
    """But for rl, whose KL is measured from the parent: that must be there, and be the same."""
    for objective, code in (("dpo", 0), ("rl", 2)):
        parent, out = Path(shutil.copytree(base, tmp_path / "parent")), tmp_path / objective
        argv = stage(files, parent, objective, "--out", str(out))
        assert run(*argv)[0] == 0
        shutil.rmtree(out / "checkpoints" / "step-00000008")
        shutil.rmtree(parent / "checkpoints" / "step-00000008")                                  # as if trained further
        again, _, error = run(*argv)
        assert again == code and (code == 0 or f"--init-from must be as it was when the run in {out} began" in error)
        shutil.rmtree(parent)
        again, _, error = run(*argv)
        assert again == code and error.count("\n") == (code == 2)


def test_rollouts_are_a_function_of_seed_and_weights(files, base, monkeypatch):
    c = train.parse_config(stage(files, base, "rl", "--micro-batch-size", "8"))
    world = train.join(c)
    c, gpt = train.resolve(c, world), train.make_stage(c, world.device, read=train.open_parent(c, world)[0])
    first, second = (next(train.Rollouts(train.open_data(c, world)[0], gpt, gpt, c)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["targets"] >= 0).sum(1).max() <= c.answer_tokens and first["tokens"].shape[0] == 8
    advantage = first["advantage"].view(-1, c.group_size)
    assert advantage.sum(1).abs().max() < 1e-5 and advantage.abs().max() > 0.5
    other = train.dataclasses.replace(c, seed=1)
    assert not torch.equal(next(train.Rollouts(train.open_data(c, world)[0], gpt, gpt, other))["targets"],
                           first["targets"])
    greedy = train.dataclasses.replace(c, temperature=0.0, top_k=1, top_p=0.1)              # of its use, not training
    assert torch.equal(next(train.Rollouts(train.open_data(c, world)[0], gpt, gpt, greedy))["targets"],
                       first["targets"])
    for row, value in zip(first["targets"], first["reward"], strict=True):
        answer = data.load_tokenizer(base).decode([i for i in row.tolist() if i >= 0])
        assert value == answer.count(" ") - 1
    monkeypatch.setattr(data, "call_reward", lambda *_: 1000.1)
    assert not next(train.Rollouts(train.open_data(c, world)[0], gpt, gpt, c))["advantage"].any()


# ---- longer, further, in and out -------------------------------------------------------------------------------------

def test_a_wsd_run_is_made_longer_as_if_it_had_been_so_from_the_start(corpus, tmp_path):
    """Training is a function of (seed, step) and wsd's rate is constant before its decay: bit for bit so."""
    argv = [*SHAPE, *QUICK, "--data", corpus, "--schedule", "wsd", "--decay-fraction", "0.5"]
    for folder, steps in (("short", 8), ("long", 12), ("short", 12)):
        code, printed, error = run(*argv, "--out", tmp_path / folder, "--steps", steps)
        assert code == 0, error
    assert "goes on from an earlier one" in printed and "resuming   at step 5 of 12" in printed
    short, long = newest_tensors(tmp_path / "short"), newest_tensors(tmp_path / "long")
    assert all(torch.equal(short[name], long[name]) for name in long)
    assert metrics(tmp_path / "short")[-3:] == metrics(tmp_path / "long")[-3:]
    assert list((tmp_path / "short" / "checkpoints").glob("unused-step-00000008-*"))            # nothing is thrown away
    for wrong in (["--steps", "10"], ["--steps", "16", "--lr", "0.1"]):              # shorter; longer, but another run
        names = sorted((tmp_path / "short" / "checkpoints").iterdir())
        assert run(*argv, "--out", tmp_path / "short", *wrong)[0] == 2
        assert sorted((tmp_path / "short" / "checkpoints").iterdir()) == names


def test_a_wsd_run_that_was_stopped_is_not_made_shorter_than_it_is(corpus, tmp_path):
    """Its newest checkpoint is in the warm-up, whose rates are those of any length: it would never end."""
    argv = [*SHAPE, *QUICK, "--data", corpus, "--schedule", "wsd", "--decay-fraction", "0.25", "--out", tmp_path,
            "--keep-checkpoints", "9", "--warmup-steps", "5"]
    assert run(*argv)[0] == 0
    for path in (tmp_path / "checkpoints").glob("step-*"):
        if path.name > "step-00000004":
            shutil.rmtree(path)
    code, _, error = run(*argv, "--steps", "3")
    assert code == 2 and "--steps must be 8 to go on" in error


def test_a_cosine_run_is_not_made_longer(base, corpus):
    code, _, error = run(*SHAPE, *QUICK, "--data", corpus, "--out", base, "--lr", "0.01", "--steps", "20")
    assert code == 2 and error.count("\n") == 1 and "--steps must be 8 to go on" in error and "--schedule wsd" in error


def test_a_model_goes_to_hugging_face_and_back(files, base, tmp_path):
    """Bitwise: the first evaluation of a run that begins with the exported folder is that of one that begins with the
    run itself."""
    code, printed, error = run("--out", base, "--export", tmp_path / "hf", "--device", "cpu")
    assert code == 0 and str(tmp_path / "hf") in printed, error
    for parent in (base, tmp_path / "hf"):
        argv = stage(files, parent, "sft", "--steps", "1", "--out", tmp_path / f"from-{parent.name}")
        code, _, error = run(*argv, "--seq-len", "64")
        assert code == 0, error
    ours, theirs = (newest_tensors(tmp_path / f"from-{name}") for name in ("run", "hf"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (metrics(tmp_path / f"from-{name}")[0]["val_loss"] for name in ("run", "hf"))
    assert first == second and metrics(tmp_path / "from-hf")[0]["step"] == 0
    code, _, error = run("--out", base, "--export", tmp_path / "hf", "--device", "cpu")
    assert code == 2 and "exists" in error and error.count("\n") == 1


def test_pre_training_goes_on_with_another_text(base, corpus, tmp_path):
    (tmp_path / "more.txt").write_text("import os\n\n\ndef main():\n    return os.getcwd()\n" * 300)
    argv = ["--init-from", base, "--data", tmp_path / "more.txt", "--out", tmp_path / "run", *QUICK]
    code, _, error = run(*argv)
    assert code == 0, error
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2 and lines[0]["loss"] < math.log(512) - 0.2
    assert data.load_tokenizer(tmp_path / "run").sha256 == data.load_tokenizer(base).sha256
    code, _, error = run(*argv[:2], "--data", "stdlib", "--n-layer", "3", "--out", tmp_path / "other")
    assert code == 2 and error == f"train.py: --n-layer must be 4, as in {base}, got 3\n"


# ---- what a model is used for ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tuned(files, base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert run(*stage(files, base, "sft"), "--out", out)[0] == 0
    return out


def test_chat_and_sample_use_the_template(tuned, monkeypatch):
    flags = ("--out", tuned, "--device", "cpu", "--max-new-tokens", "12", "--temperature", "0")
    code, sampled, error = run(*flags, "--sample", "print 6")
    assert code == 0 and "knowledge cutoff" in error
    monkeypatch.setattr("sys.stdin", io.StringIO("print 6\n"))
    code, chatted, _ = run(*flags, "--chat")
    assert code == 0 and chatted == sampled and len(sampled) > 1
    tokenizer = data.load_tokenizer(tuned)
    c = train.parse_config(["--init-from", str(tuned), "--device", "cpu"])
    gpt = train.make_stage(c, torch.device("cpu"), read=train.open_parent(c, train.join(c))[0])
    ids, _ = data.encode_chat(tokenizer, [{"role": "user", "content": "print 6"}], reply=True)
    expected = gpt.generate(torch.tensor([ids]), 12, temperature=0, stop=data.end_of_turn(tokenizer))[0, len(ids):]
    assert sampled == tokenizer.decode(expected.tolist()) + "\n"


@pytest.mark.parametrize("judge", [False, True])
def test_pairs_are_real_and_sampled_answers_or_two_that_a_judge_ranks(files, base, tuned, tmp_path, judge):
    out = tmp_path / "pairs.jsonl"
    code, printed, error = run("--out", tuned, "--pairs", out, "--max-new-tokens", "6", "--device", "cpu",
                               *(["--judge", base] if judge else []))
    assert code == 0 and "pairs" in printed, error
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    real = {row["messages"][0]["content"]: (row["messages"][1]["content"], row["split"])
            for row in map(json.loads, files["sft"].read_text().splitlines())}
    assert len(rows) > 40 and {row["split"] for row in rows} == {"train", "val"}
    for row in rows:
        answer, split = real[row["prompt"][0]["content"]]
        assert row["split"] == split and row["rejected"] != row["chosen"] and (judge or row["chosen"] == answer)
    if judge:                                # but for answers that are encoded in another way than they were sampled
        c = train.parse_config(["--init-from", str(base), "--device", "cpu"])
        gpt = train.make_stage(c, torch.device("cpu"), read=train.open_parent(c, train.join(c))[0])
        t = data.load_tokenizer(base)
        prompts = [data.encode_chat(t, row["prompt"], reply=True)[0] for row in rows]
        chosen, rejected = (train.nll_per_token(gpt, prompts, [t.encode(row[side]) for row in rows])
                            for side in ("chosen", "rejected"))
        assert (chosen < rejected).double().mean() > 0.8
    argv = ["--objective", "dpo", "--init-from", tuned, "--data", out, "--out", tmp_path / "dpo", *QUICK]
    assert run(*argv)[0] == 0


def test_the_probe_says_what_is_invented_unknown_and_copied(base, monkeypatch, capsys):
    """With answers that are known: one module of four is invented, and a sample repeats ten bytes of the text."""
    real = next(data.Loader(json.loads((base / "config.json").read_text())["data"], micro_batch_size=1, seq_len=64))
    t = data.load_tokenizer(base)
    copied = t.decode(real["tokens"][0, :6].tolist())
    texts = itertools.cycle([" os.path\n", " re\n", " nosuchmodule\n", " ast\n"])

    def sample(gpt, tokenizer, prompts, c, numbers, tokens):
        return [t.encode(next(texts) if tokens == 8 else "@\u00e9@" + copied + "@\u00e9@") for _ in prompts]

    monkeypatch.setattr(train, "sample_answers", sample)
    monkeypatch.setattr(train, "nll_per_token", lambda gpt, prompts, answers: torch.tensor(
        [0.5 * len(t.decode(answer)) / len(answer) for answer in answers]))
    assert bench_probe.main([str(base), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    steps = [line for line in printed.splitlines() if line.startswith("  step")]
    assert len(steps) == 2 and all(line.split()[2:] == ["25.0%"] * 4 for line in steps)
    assert "functions of the library that it read  0.500" in printed
    assert f"samples        {len(copied.encode()):>4}" in printed and "held-out text" in printed


def test_longest_copy():
    longest_copy = bench_probe.longest_copy
    assert longest_copy(b"xxhello worldyy", b"say hello world") == b"hello world"
    assert longest_copy(b"abc", b"xyz") == b"" and longest_copy(b"abcabd", b"zabd abc") == b"abc"


# ---- bad input -------------------------------------------------------------------------------------------------------

OF_RL, OF_DPO = (["--objective", name, "--init-from", "BASE", "--data", "RL"] for name in ("rl", "dpo"))


@pytest.mark.parametrize("flags, message", [
    (["--objective", "sft"], "--init-from must name the model that sft begins with, got none"),
    (["--objective", "sft", "--init-from", "BASE", "--data", "NONE.jsonl"], "NONE.jsonl: cannot be read"),
    (["--objective", "sft", "--init-from", "BASE"], "--data must be a .jsonl file with --objective sft, got stdlib"),
    (["--init-from", "/nowhere"], ": must be the folder of a run or of a Hugging Face model (No such file"),
    ([*OF_RL, "--tp", "2"], "--objective rl samples from the whole model"),
    ([*OF_RL, "--reward", "length"], "--reward must be parses, format or FILE"),
    ([*OF_RL, "--micro-batch-size", "3"], "size must be a multiple of 8"),
    ([*OF_DPO, "--micro-batch-size", "3"], "--micro-batch-size must be a multiple"),
    ([*OF_DPO, "--no-document-mask"], "--document-mask must be on"),
    ([*OF_RL, "--answer-tokens", "65"], "--answer-tokens must be at most seq_len / 4, got 65 of 64"),
    ([*OF_RL, "--reward", "format"], "--reward must apply to prompts in"),
    (["--pairs", "BROKEN", "--out", "SFT"], "broken.jsonl: must be a new file that can be written (File exists)"),
    (["--pairs", "new.jsonl", "--out", "BASE"], "--pairs must be asked of a run whose data has prompts"),
    (["--judge", "x"], "--judge goes with --pairs"),
    (["--export", "x", "--out", "/nowhere"], "--out must be the folder of a run with an intact checkpoint"),
    ([*OF_RL, "--reward", "RAISES"], "--reward wrong: must give"),
    (["--objective", "sft", "--init-from", "BASE", "--data", "BROKEN"], "broken.jsonl:2: a row must be JSON"),
])
def test_bad_input_is_one_line(files, base, tuned, tmp_path, flags, message):
    (tmp_path / "raises.py").write_text("def wrong(row, answer):\n    return 1 / 0\n")
    (tmp_path / "broken.jsonl").write_text(files["sft"].read_text().splitlines()[0] + "\nnot JSON\n")
    places = {"BASE": base, "SFT": tuned, "RAISES": f"{tmp_path}/raises.py:wrong", "RL": files["rl"],
              "BROKEN": tmp_path / "broken.jsonl"}
    flags = [places.get(flag, flag) for flag in flags]
    extra = [] if "--out" in flags else ["--out", tmp_path / "run"]
    small = ["--answer-tokens", "16", "--eval-windows", "2"] if "RL" in str(message) or "rl" in flags else []
    code, _, error = run(*small, *flags, *extra, "--device", "cpu")
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_judge_must_have_the_same_tokenizer(files, tuned, tmp_path):
    (tmp_path / "text.txt").write_text("some other text, and more of it\n" * 200)
    other = tmp_path / "other"
    assert run(*SHAPE, *QUICK, "--steps", "1", "--data", tmp_path / "text.txt", "--out", other)[0] == 0
    code, _, error = run("--out", tuned, "--pairs", tmp_path / "p.jsonl", "--judge", other, "--device", "cpu")
    assert code == 2 and "--judge must have the tokenizer" in error and not (tmp_path / "p.jsonl").exists()
