import functools

import pytest
import torch

import data
import parallel
import train

# ---- any layout is the same run --------------------------------------------------------------------------------------

TINY = """--n-layer 4 --n-head 4 --n-embd 32 --n-ff 64 --seq-len 32 --vocab-size 512 --global-batch-size 8 --steps 12
--warmup-steps 2 --lr 0.02 --grad-clip 0.2 --adam-eps 1e-6 --micro-batch-size 1 --eval-windows 8 --device cpu""".split()
MODELS = {
    "llama": ["--n-kv-head", "2"],
    "llama tied": ["--tie-embeddings", "--qk-norm"],
    "gpt2": ["--norm", "layernorm", "--position", "learned", "--mlp", "gelu", "--bias", "--tie-embeddings"]}
LAYOUTS = [  # ranks, dp, tp, pp, other flags
    (1, 1, 1, 1, "--micro-batch-size 4"), (2, 2, 1, 1, ""), (4, 4, 1, 1, "--micro-batch-size 2"),
    (2, 1, 2, 1, ""), (2, 1, 2, 1, "--no-sequence-parallel"), (4, 2, 2, 1, ""), (4, 2, 2, 1, "--no-sequence-parallel"),
    (2, 1, 1, 2, "--pp-schedule gpipe"), (2, 1, 1, 2, "--pp-schedule 1f1b"), (2, 1, 1, 2, "--pp-schedule interleaved"),
    (2, 1, 1, 2, "--pp-schedule zb"), (4, 1, 1, 4, "--pp-schedule gpipe"), (4, 1, 1, 4, "--pp-schedule 1f1b"),
    (4, 1, 1, 4, "--pp-schedule zb"), (4, 2, 1, 2, "--pp-schedule gpipe"), (4, 2, 1, 2, "--pp-schedule 1f1b"),
    (4, 2, 1, 2, "--pp-schedule interleaved"), (4, 2, 1, 2, "--pp-schedule zb"),
    (4, 1, 2, 2, "--pp-schedule gpipe"), (4, 1, 2, 2, "--pp-schedule 1f1b"),
    (4, 1, 2, 2, "--pp-schedule interleaved"), (4, 1, 2, 2, "--pp-schedule zb"),
    (4, 1, 2, 2, "--pp-schedule zb --no-sequence-parallel"), (2, 1, 1, 2, "--recompute full"),
    (2, 1, 2, 1, "--recompute full"), (2, 1, 2, 1, "--recompute selective")]


def trained(rank, n, argv, steps, dtype=torch.float64):
    """`steps` steps as train.py takes them -> [(loss, norm), ...], this rank's pieces of the weights, an evaluation."""
    c = train.parse_config(argv)
    world = train.World(c)
    model = train.Model(c, world, dtype=dtype)
    optimizer = train.make_optimizer(model, c)
    loader = data.Loader(c.data, micro_batch_size=c.micro_batch_size, seq_len=c.seq_len, seed=c.seed,
                         dp_rank=world.mesh.dp_rank, dp_size=world.mesh.dp)
    losses = [train.train_step(model, optimizer, loader, step, c, world)[:2] for step in range(steps)]
    parallel.check_replicas(model.parameters(), world.host)
    val = data.Loader(c.data, micro_batch_size=c.micro_batch_size, seq_len=c.seq_len, split="val")
    pieces = [(p.full_name, p.box, p.detach()) for p in model.parameters()]
    return losses, pieces, train.evaluate(model, val, c, world)


@functools.cache
def one_process(corpus, model):
    losses, pieces, evaluation = trained(0, 1, [*TINY, *MODELS[model], "--data", str(corpus)], 5)
    assert losses[0][1] > 0.3 and losses[-1][0] < losses[0][0] - 0.2                              # it clips, and learns
    return losses, {name: p for name, _, p in pieces}, evaluation


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks, dp, tp, pp, flags", LAYOUTS)
def test_any_layout_is_the_same_run(corpus, run_ranks, model, ranks, dp, tp, pp, flags):
    losses, weights, evaluation = one_process(corpus, model)
    argv = [*TINY, *MODELS[model], "--data", str(corpus), *f"--dp {dp} --tp {tp} --pp {pp} {flags}".split()]
    seen = set()
    for ours, pieces, our_evaluation in run_ranks(trained, ranks, argv, 5):
        for (loss, norm), (our_loss, our_norm) in zip(losses, ours, strict=True):
            assert our_loss == pytest.approx(loss, abs=1e-10) and our_norm == pytest.approx(norm, abs=1e-10)
        for name, box, p in pieces:
            assert (p - weights[name][tuple(slice(a, b) for a, b, _ in box)]).abs().max() < 1e-10, name
            seen.add(name)
        assert our_evaluation == pytest.approx(evaluation, rel=1e-10)
    assert seen == set(weights)
