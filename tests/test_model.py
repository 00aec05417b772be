import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from ledgers import Largest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as net
from model import GPT, ModelConfig, build, chunked_cross_entropy, fill, keyed_init

SMALL = dict(vocab_size=91, seq_len=24, n_layer=2, n_head=4, n_kv_head=2, head_dim=6, n_embd=20, n_ff=28)
SETTINGS = {
    "llama": ModelConfig(**SMALL),
    "llama-tied": ModelConfig(**SMALL, tie_embeddings=True),
    "qk-norm": ModelConfig(**SMALL, qk_norm=True),
    "gpt2": ModelConfig(**SMALL | {"n_kv_head": 4, "n_ff": 40}, norm="layernorm", position="learned", mlp="gelu",
                        bias=True, tie_embeddings=True),
    "gpt2-no-bias": ModelConfig(**SMALL | {"n_kv_head": 1}, norm="layernorm", position="learned", mlp="gelu"),
}
every_setting = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS.keys())


def random_model(config, seed=0, **kwargs) -> GPT:
    """Float64, every parameter random (a norm of ones or a bias of zeros hides mistakes)."""
    model = build(config, seed, dtype=torch.float64, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data = noise / p.shape[-1] ** 0.5 if p.ndim > 1 else p.data + 0.3 * noise
    return model


def random_tokens(config, B=2, T=17, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(0, config.vocab_size, (2, B, T), generator=generator)
    targets[0, 3] = -1
    return tokens, targets


# ---- the loss


def test_the_loss_on_the_board_is_torchs_and_the_chunked_one():
    """Loss and gradients: by hand; by autograd of torch's cross entropy; by the chunks of the real one."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True) for n in (14, 11))
    targets = torch.randint(0, 11, (14,), generator=generator)
    weights = torch.rand(14, generator=generator, dtype=torch.float64)
    board = net.plain_cross_entropy(x, w, targets, weights)
    theirs = (F.cross_entropy(x @ w.T, targets, reduction="none") * weights).sum()
    ours, _ = chunked_cross_entropy(x, w, targets, weights, rows=4)
    for loss in (theirs, ours):
        for a, b in zip((loss, *torch.autograd.grad(loss, (x, w))), board, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunked_cross_entropy_is_cross_entropy(rows, weighted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(14, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (14,), generator=generator)
    targets[[2, 9]] = -1
    weights = torch.rand(14, generator=generator, dtype=torch.float64) if weighted else None
    loss, nll = chunked_cross_entropy(x, w, targets, weights, rows)
    expected = F.cross_entropy(x @ w.T, targets, ignore_index=-1, reduction="none")
    total = (expected * (weights if weighted else 1)).sum()
    torch.testing.assert_close(loss, total, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-13, atol=1e-13)
    assert not nll.requires_grad and nll[2] == 0
    got = torch.autograd.grad(loss * 0.37, (x, w))
    for a, b in zip(got, torch.autograd.grad(total * 0.37, (x, w)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(x, w, targets, weights, rows)[0], loss)


def test_a_second_backward_is_refused_not_wrong():
    x, w = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    loss, _ = chunked_cross_entropy(x, w, torch.tensor([0, 1, 2]))
    (0.5 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cross_entropy_stands_large_logits_and_names_bad_targets():
    x, w = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0], [0.5]])
    loss, nll = chunked_cross_entropy(x, w, torch.tensor([0, 1]))
    assert nll.tolist() == [0.0, 2e4]
    with pytest.raises(ValueError, match="targets must be below vocab_size 3, got 3"):
        chunked_cross_entropy(x, w, torch.tensor([0, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_in_low_precision_is_as_good_as_torchs(dtype):
    """Error against float64 at most twice that of F.linear + F.cross_entropy in the same dtype."""
    generator = torch.Generator().manual_seed(0)
    x64, w64 = (torch.randn(n, 32, generator=generator, dtype=torch.float64).to(dtype).double() for n in (64, 101))
    targets = torch.randint(0, 101, (64,), generator=generator)

    def run(f, dtype):
        x, w = (t.to(dtype).requires_grad_() for t in (x64, w64))
        loss = f(x, w)
        return [loss.detach().double()] + [g.double() for g in torch.autograd.grad(loss, (x, w))]

    def plain(x, w):
        return F.cross_entropy(F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="sum")

    exact, theirs = run(plain, torch.float64), run(plain, dtype)
    ours = run(lambda x, w: chunked_cross_entropy(x, w, targets, rows=10)[0], dtype)
    for name, e, t, o in zip(("loss", "dx", "dw"), exact, theirs, ours, strict=True):
        ulp = torch.finfo(dtype).eps * e.abs().max()             # a chunked sum may round dw once more than one product
        assert (o - e).abs().max() <= 2 * (t - e).abs().max() + ulp, name


def test_full_logits_never_exist():
    x, w = torch.randn(600, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with Largest(torch.float32) as largest:
        loss, _ = chunked_cross_entropy(x, w, torch.randint(0, 500, (600,)), rows=40)
        loss.backward()
    assert largest.numel == 40 * 500


# ---- weights by name


@every_setting
def test_any_slice_equals_that_slice_of_the_whole(config, monkeypatch):
    monkeypatch.setattr(net, "CHUNK", 100)
    for p in random_model(config).parameters():
        whole = keyed_init(p.full_name, p.box, 3, config)
        assert whole.shape == p.shape and whole.dtype == torch.float32
        for trial in range(6):
            g = torch.Generator().manual_seed(trial)
            edges = [sorted(torch.randint(0, n + 1, (2,), generator=g).tolist()) for n in p.shape]
            box = tuple((a, b, n) for (a, b), n in zip(edges, p.shape, strict=True))
            assert torch.equal(keyed_init(p.full_name, box, 3, config), whole[tuple(slice(a, b) for a, b in edges)])


def test_initial_weights_have_their_distribution_and_their_own_stream(monkeypatch):
    c = dataclasses.replace(SETTINGS["llama"], n_embd=300, n_layer=8)
    box = ((0, 400, 400), (0, 300, 300))
    q, k, o = (keyed_init(f"model.layers.0.self_attn.{n}_proj.weight", box, 0, c) for n in "qko")
    for t, std in ((q, 0.02), (o, 0.02 / 4)):
        standard_error = std / (2 * t.numel()) ** 0.5
        assert abs(t.std().item() - std) < 5 * standard_error and abs(t.mean().item()) < 5 * std / t.numel() ** 0.5
    assert abs(torch.corrcoef(torch.stack((q.flatten(), k.flatten())))[0, 1]) < 5 / q.numel() ** 0.5
    assert not torch.equal(q, keyed_init("model.layers.0.self_attn.q_proj.weight", box, 1, c))
    # across a chunk's edge, the stream of the next chunk begins: rows of a tall matrix differ
    monkeypatch.setattr(net, "CHUNK", 300)
    rows = keyed_init("model.embed_tokens.weight", box, 0, c)
    assert len(torch.unique(rows, dim=0)) == 400


def test_initial_weights_are_pinned():
    """A change here starts every run elsewhere: old seeds would no longer mean what they meant."""
    t = keyed_init("model.embed_tokens.weight", ((5, 6, 91), (0, 4, 20)), 0, SETTINGS["llama"])
    torch.testing.assert_close(t, PINNED, rtol=1e-6, atol=0)


PINNED = torch.tensor([[0.0403544642, -0.0064895772, -0.0129307974, -0.0101760039]])


@every_setting
def test_building_in_place_keeps_names_boxes_and_ties(config):
    model = build(config)
    assert {p.full_name for p in model.parameters()} == {n for n, _ in model.named_parameters()}
    assert all(p.box == tuple((0, n, n) for n in p.shape) for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_embeddings
    assert not any(p.is_meta for p in model.parameters()) and not list(model.buffers())
    assert all(hasattr(p, "full_name") for p in model.double().parameters())
    with pytest.raises(ValueError, match=r"embed_tokens.weight must have shape \(91, 20\), got \(1,\)"):
        fill(model, lambda name, box: torch.zeros(1))


def test_an_untrained_model_knows_nothing():
    c = SETTINGS["llama"]
    tokens, targets = random_tokens(c, 8, 24)
    loss, nll = build(c)(tokens, targets)
    assert loss.item() / (targets >= 0).sum().item() == pytest.approx(math.log(c.vocab_size), abs=0.02)


# ---- the function


@every_setting
def test_the_past_does_not_see_the_future(config):
    model = random_model(config)
    tokens, _ = random_tokens(config)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :9], b[:, :9])
    assert (a[:, 9:] - b[:, 9:]).abs().amax(dim=(0, 2)).min() > 1e-6          # every later position sees it


def test_packed_documents_do_not_see_each_other():
    config = SETTINGS["llama"]                             # rotary positions are relative: an offset changes nothing
    model = random_model(config)
    tokens, targets = random_tokens(config, 1, 20)
    documents = torch.tensor([[0] * 7 + [1] * 12 + [2]])
    _, packed = model(tokens, targets, documents=documents)
    alone = torch.cat([model(tokens[:, s], targets[:, s])[1] for s in (slice(0, 7), slice(7, 19), slice(19, 20))],
                      dim=1)
    # angles are computed in float32, so an offset moves them by their rounding
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert (model(tokens, targets)[1] - alone).abs().max() > 1e-2


def test_the_mask_is_made_once_per_forward_and_kept_by_nobody():
    """Ids that are refilled in place mean another mask; the batch's own tensor carries nothing."""
    config, masks = SETTINGS["llama"], []
    model = random_model(config, prepare=lambda *args: masks.append(net.document_mask(*args)) or masks[-1])
    tokens, targets = random_tokens(config, 1, 20)
    documents = torch.tensor([[0] * 7 + [1] * 13])
    first = model(tokens, targets, documents=documents)[0].item()
    assert len(masks) == 1 and config.n_layer > 1
    documents.zero_()
    assert model(tokens, targets, documents=documents)[0].item() == pytest.approx(model(tokens, targets)[0].item())
    documents[:, 7:] = 1
    assert model(tokens, targets, documents=documents)[0].item() == first and len(masks) == 3
    assert not vars(documents)


@pytest.mark.parametrize("T, S, K, documents", [(5, 5, 4, False), (5, 9, 2, False), (1, 9, 1, False), (7, 7, 2, True)])
def test_sdpa_attention_is_the_formula(T, S, K, documents):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, T, 6, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 2, K, S, 6, generator=g, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]]) if documents else None
    o = net.sdpa_attention(q, k, v, documents=None if ids is None else net.document_mask(ids, q.dtype))
    for b in range(2):
        for h in range(4):
            for i in range(T):
                keys = [j for j in range(S) if j <= i + S - T and (ids is None or ids[b, i] == ids[b, j])]
                kv = h // (4 // K)
                p = torch.softmax(torch.stack([q[b, h, i] @ k[b, kv, j] / 6**0.5 for j in keys]), 0)
                torch.testing.assert_close(o[b, h, i], sum(w * v[b, kv, j] for w, j in zip(p, keys, strict=True)))


@every_setting
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(config, recompute):
    tokens, targets = random_tokens(config)
    grads = []
    for mode in ("none", recompute):
        model = random_model(config, recompute=mode)
        model(tokens, targets)[0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every_setting
def test_a_stage_is_a_gpt_with_parts_missing(config):
    tokens, targets = random_tokens(config)
    whole = random_model(config)
    loss, nll = whole(tokens, targets)
    loss.backward()
    first, last = random_model(config), random_model(config)
    first.model.norm = first.lm_head = None
    last.model.embed_tokens = last.model.embed_positions = None
    del first.model.layers["1"], last.model.layers["0"]
    hidden = first(tokens)
    assert hidden.shape == (2, 17, config.n_embd)
    received = hidden.detach().requires_grad_()
    stage_loss, stage_nll = last(tokens, targets, hidden=received)
    assert torch.equal(stage_loss, loss) and torch.equal(stage_nll, nll)
    stage_loss.backward()
    hidden.backward(received.grad)
    expected = {n: p.grad for n, p in whole.named_parameters()}
    got = {}
    for stage in (first, last):
        for p in stage.parameters():
            assert p.full_name in expected
            got[p.full_name] = got.get(p.full_name, 0) + p.grad
    assert got.keys() == expected.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)


# ---- counting


@every_setting
def test_flops_are_what_torch_counts(config):
    """FlopCounterMode sees matrix products and the math version of attention."""
    model = build(config)
    tokens, targets = random_tokens(config, 2, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, targets)[0].backward()
    assert counter.get_total_flops() == 2 * 16 * net.flops_per_token(config, 16)


# ---- generation


@pytest.mark.parametrize("setting, how", [
    *((name, dict(top_k=5, top_p=0.5)) for name in SETTINGS),
    *(("llama", how) for how in (dict(temperature=0), dict(temperature=0.9, top_k=7), dict(top_p=0.8)))])
def test_cached_generation_equals_uncached(setting, how):
    model = random_model(SETTINGS[setting])
    tokens, _ = random_tokens(model.config, 3, 5)
    cached = model.generate(tokens, 35, seed=4, **how)                        # seq_len is 24: past it, twice
    state = torch.get_rng_state()
    assert cached.shape == (3, 40) and torch.equal(cached, model.generate(tokens, 35, seed=4, use_cache=False, **how))
    assert torch.equal(state, torch.get_rng_state())                               # the seed's generator, not torch's
    if how.get("temperature") != 0:
        assert not torch.equal(cached[:, :15], model.generate(tokens, 10, seed=5, **how))


def test_greedy_is_argmax_and_so_are_its_limits():
    model = random_model(SETTINGS["llama"])
    tokens, _ = random_tokens(model.config, 2, 4)
    out = model.generate(tokens, 6, temperature=0)
    assert torch.equal(out[:, 4:], model(out[:, :-1]).argmax(-1)[:, 3:])
    for how in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-6)):
        assert torch.equal(out, model.generate(tokens, 6, **how))


@pytest.mark.parametrize("how", [dict(temperature=0), dict(top_p=0.9), dict(stop=7)])
def test_prompts_of_different_lengths_are_continued_as_if_alone(how):
    model = random_model(SETTINGS["llama"]).double()
    tokens, lengths = random_tokens(model.config, 4, 6)[0], [6, 2, 5, 3]
    rows = model.generate(tokens, 10, seed=[11, 12, 13, 14], lengths=lengths, **how)
    for i, n in enumerate(lengths):
        alone = model.generate(tokens[i:i + 1, :n], 10, seed=[11 + i], **how)[0]
        assert torch.equal(rows[i, :len(alone)], alone)
    if "stop" not in how:
        assert rows.shape == (4, 16)
    equal = model.generate(tokens, 10, seed=4, lengths=[6] * 4, **how)
    assert torch.equal(model.generate(tokens, 10, seed=4, **how), equal)


def test_top_k_and_top_p_keep_the_set_they_say():
    p = torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]])
    generator = torch.Generator().manual_seed(0)

    def support(top_k=None, top_p=None):
        drawn = net.sample_token(p.log().expand(300, 5), 1.0, top_k, top_p, [generator])[:, 0].tolist()
        return {i: drawn.count(i) / 300 for i in set(drawn)}

    assert set(support()) == {0, 1, 2, 3, 4} and set(support(top_k=2)) == {1, 3}
    assert set(support(top_p=0.7)) == {1, 3}                                   # 0.4 + 0.3 reach 0.7
    assert set(support(top_p=0.71)) == {1, 2, 3} and set(support(top_k=3, top_p=0.5)) == {1, 3}
    assert abs(support(top_k=2)[1] - 4 / 7) < 4 * (4 / 7 * 3 / 7 / 300) ** 0.5


def test_ids_without_a_piece_are_never_generated():
    model = random_model(SETTINGS["llama"])
    tokens, _ = random_tokens(model.config, 4, 5)
    for how in (dict(temperature=0), dict(temperature=2.0)):
        assert model.generate(tokens % 20, 20, vocab_size=20, **how).max() < 20
        assert model.generate(tokens, 20, **how)[:, 5:].max() >= 20


def test_generation_stops_row_by_row():
    model = random_model(SETTINGS["llama"])
    tokens, _ = random_tokens(model.config, 2, 4)
    free = model.generate(tokens, 12, temperature=0)
    stop = free[0, 6].item()
    out = model.generate(tokens, 12, temperature=0, stop=stop)
    row = out[0, 4:].tolist()
    assert set(row[row.index(stop):]) == {stop}
    both = model.generate(tokens[:1], 12, temperature=0, stop=stop)
    assert both.shape[1] == 4 + free[0, 4:].tolist().index(stop) + 1


@pytest.mark.parametrize("how, message", [
    (dict(temperature=-1), "temperature must be at least 0, got -1"),
    (dict(top_k=0), "top_k must be at least 1, got 0"),
    (dict(top_p=0), r"top_p must be in \(0, 1\], got 0"), (dict(top_p=1.5), "top_p")])
def test_bad_sampling_values_are_named(how, message):
    model = build(SETTINGS["llama"])
    with pytest.raises(ValueError, match=message):
        model.generate(torch.zeros(1, 2, dtype=torch.long), 2, **how)
    with pytest.raises(ValueError, match="tokens must not be empty, got 0"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 2)


@pytest.mark.parametrize("change, message", [
    (dict(n_layer=0), "n_layer must be at least 1, got 0"), (dict(norm="batch"), "norm must be one of .*got 'batch'"),
    (dict(n_kv_head=3), "n_head must be a multiple of n_kv_head, got 4 and 3"),
    (dict(head_dim=7), "head_dim must be even")])
def test_bad_configs_name_the_field_and_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SMALL | change)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETTINGS["llama"].n_layer = 3


def test_learned_positions_end_and_bad_recompute():
    with pytest.raises(ValueError, match="tokens must fit seq_len 24 with learned positions, got 25"):
        build(SETTINGS["gpt2"])(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="recompute must be one of"):
        GPT(SETTINGS["llama"], recompute="some")
