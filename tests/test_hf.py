"""Models and tokenizers go to Hugging Face folders and come from them: transformers and tokenizers are the oracles."""

import dataclasses
import io
import json
import os
import random
import resource
import sys

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from conftest import slices
from test_data import CORNERS
from test_model import random_model

import data
import model as net
import parallel
from model import GPT, ModelConfig, fill

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="optional oracle: pip install transformers")
tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install tokenizers")

SMALL = dict(vocab_size=512, seq_len=24, n_layer=2, n_head=4, n_kv_head=2, head_dim=6, n_embd=20, n_ff=28)
GPT2 = dict(norm="layernorm", position="learned", mlp="gelu", bias=True)
SETTINGS = {
    "llama": ModelConfig(**SMALL), "llama-tied": ModelConfig(**SMALL, tie_embeddings=True, rope_theta=5e5),
    "llama-bias": ModelConfig(**SMALL, bias=True, norm_eps=1e-6), "qwen3": ModelConfig(**SMALL, qk_norm=True),
    "qwen3-odd": ModelConfig(**SMALL | {"n_embd": 18}, qk_norm=True, tie_embeddings=True),
    "gpt2": ModelConfig(**SMALL | {"n_kv_head": 4, "head_dim": 5}, **GPT2, tie_embeddings=True),
    "gpt2-untied": ModelConfig(**SMALL | {"n_kv_head": 4, "head_dim": 5}, **GPT2)}
TOKENS = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(1))


def read_folder(folder, config, dtype=torch.float32):
    """Our model, filled from the folder by halves of each tensor along each dimension."""
    with torch.device("meta"):
        model = GPT(config)
    read = net.hf_reader(data.HFWeights(folder).get, config)

    def by_halves(name, box, d=0):
        if d == len(box):
            return read(name, box)
        start, stop, size = box[d]
        halves = ((start, stop // 2, size), (stop // 2, stop, size))
        return torch.cat([by_halves(name, box[:d] + (part,) + box[d + 1:], d + 1) for part in halves], dim=d)

    return fill(model, by_halves, dtype=dtype)


def export(config, out, tokenizer, **kwargs):
    weights = {p.full_name: p.detach() for p in random_model(config).float().parameters()}
    hf = net.config_to_hf(config, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    return data.export_folder(out, hf, net.hf_tensors(config, weights.__getitem__), tokenizer, **kwargs)


# ---- out


@pytest.mark.parametrize("name, max_shard_bytes", [*((name, 2**32) for name in SETTINGS), ("llama", 9000),
                                                   ("gpt2", 9000)])
def test_an_exported_folder_gives_our_logits_and_comes_back_bitwise(tmp_path, tokenizer, name, max_shard_bytes):
    config = SETTINGS[name]
    out = export(config, tmp_path / "hf", tokenizer, max_shard_bytes=max_shard_bytes)
    ours = random_model(config).float()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and next(theirs.parameters()).dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), rtol=1e-5, atol=1e-5)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (1, 2, 3)
    config_back = net.config_from_hf(data.read_json(out / "config.json"))
    assert config_back == config == net.config_from_hf(theirs.config.to_dict())
    for p, back in zip(ours.parameters(), read_folder(out, config).parameters(), strict=True):
        assert p.full_name == back.full_name and torch.equal(p, back) and back.is_contiguous()
    headers = [data.read_safetensors_header(path) for path in sorted(out.glob("model-*.safetensors"))]
    assert len(headers) > 3 if max_shard_bytes == 9000 else headers == []
    sizes = [sum(count for *_, count in header.values()) for header in headers]
    assert all(size <= 9000 or len(header) == 1 for size, header in zip(sizes, headers, strict=True))
    for path in out.glob("*.safetensors"):                              # older transformers refuse a file without it
        raw = path.read_bytes()
        assert json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"] == {"format": "pt"}
    if headers:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes) and len(index["weight_map"]) == sum(map(len, headers))


def test_no_more_than_a_shard_is_alive(tmp_path, tokenizer):
    alive = most = 0

    class Counted(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def tensors():
        nonlocal alive, most
        for n in range(20):
            alive += 1
            most = max(most, alive)
            yield f"t{n}", torch.zeros(10).as_subclass(Counted)

    data.export_folder(tmp_path / "hf", {"vocab_size": 512}, tensors(), tokenizer, max_shard_bytes=4 * 40)
    assert most == 5 and len(list((tmp_path / "hf").glob("model-*-of-00005.safetensors"))) == 5


def test_a_failed_export_leaves_nothing_and_an_old_one_is_safe(tmp_path, tokenizer):
    def tensors():
        yield "a", torch.zeros(3)
        raise KeyError("b")

    with pytest.raises(KeyError):
        data.export_folder(tmp_path / "hf", {"vocab_size": 512}, tensors(), tokenizer)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "hf").mkdir()
    with pytest.raises(data.DataError, match="hf: a model must be exported to a new folder, this one exists"):
        data.export_folder(tmp_path / "hf", {"vocab_size": 512}, tensors(), tokenizer)
    with pytest.raises(data.DataError, match="vocab_size must be at least the tokenizer's 512, got 511"):
        data.export_folder(tmp_path / "other", {"vocab_size": 511}, tensors(), tokenizer)


@pytest.mark.parametrize("change, message", [
    (dict(position="learned"), r"a Hugging Face llama with rmsnorm needs position 'rope' \(not 'learned'\)"),
    (dict(mlp="gelu", n_embd=18), r"llama .* needs mlp 'swiglu' \(not 'gelu'\), n_embd 16 \(not 18\)"),
    (dict(qk_norm=True, bias=True), r"qwen3 with rmsnorm and qk_norm needs bias False \(not True\)"),
    (dict(norm="layernorm"), r"gpt2 with layernorm needs position 'learned' .* mlp .* bias .* n_kv_head 4 \(not 2\), "
                             r"n_embd 24 \(not 20\)")])
def test_settings_of_no_family_are_not_exported(change, message):
    with pytest.raises(ValueError, match=message):
        net.config_to_hf(ModelConfig(**SMALL | change))


# ---- in


def theirs_of(config: ModelConfig):
    """A model that transformers itself made, with random weights. Their RMSNorm computes in float32 whatever it is
    given: here in what it is given."""
    hf = transformers.AutoConfig.for_model(**net.config_to_hf(config))
    theirs = transformers.AutoModelForCausalLM.from_config(hf)
    generator = torch.Generator().manual_seed(3)
    for p in theirs.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.3 if p.ndim > 1 else 0.5)
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: F.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
    return theirs.eval()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bias", "qwen3", "gpt2"])
def test_logits_and_gradients_equal_hugging_faces(name):
    config, theirs = SETTINGS[name], theirs_of(SETTINGS[name]).double()
    assert net.config_from_hf(theirs.config.to_dict()) == config
    with torch.device("meta"):
        ours = GPT(config)
    fill(ours, net.hf_reader(theirs.state_dict().__getitem__, config), dtype=torch.float64)
    targets = TOKENS.roll(1, 1).index_fill(1, torch.tensor([3]), -1)
    logits, expected = ours(TOKENS), theirs(TOKENS).logits
    assert (logits - expected).abs().max() < 1e-9 and expected.std() > 0.5
    # the gradient of a loss in every weight, read from theirs by the same map
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum").backward()
    ours(TOKENS, targets)[0].backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    read = net.hf_reader(gradients.__getitem__, config)
    for p in ours.parameters():
        g = read(p.full_name, p.box)
        assert (p.grad - g).abs().max() < 1e-9 * max(1.0, g.abs().max().item()), p.full_name
        if p.ndim > 1 and "embed" not in p.full_name:                           # a slice of a tensor is read as a slice
            box = ((1, 3, p.shape[0]), (2, 5, p.shape[1]))
            assert torch.equal(read(p.full_name, box), g[1:3, 2:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bias", "qwen3", "gpt2"])
def test_their_folders_give_their_logits(tmp_path, name, shard, dtype):
    config, theirs = SETTINGS[name], theirs_of(SETTINGS[name]).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    weights = data.HFWeights(tmp_path)
    assert net.config_from_hf(data.read_json(tmp_path / "config.json")) == config
    assert all(weights.get(name).dtype == dtype for name in weights.entries)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        ours = read_folder(tmp_path, config)(TOKENS)
        torch.testing.assert_close(ours, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def theirs_in_parts(rank, n):
    """Their Llama, split with tensor_parallel's defaults -> loss, logits, this rank's parts of the gradients, box."""
    theirs = theirs_of(SETTINGS["llama-tied"]).double()
    if n > 1:
        parallel.tensor_parallel(theirs, torch.distributed.group.WORLD)
    out = theirs(input_ids=TOKENS, labels=TOKENS)
    out.loss.backward()
    return out.loss.item(), out.logits.detach(), {
        name: (p.grad, getattr(p, "box", None)) for name, p in theirs.named_parameters()}


def test_their_models_are_split_as_they_are(run_ranks):
    loss, logits, grads = theirs_in_parts(0, 1)
    for our_loss, our_logits, ours in run_ranks(theirs_in_parts, 2):
        assert our_loss == pytest.approx(loss, rel=1e-12) and ours.keys() == grads.keys()
        torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-12)
        for name, (grad, box) in ours.items():
            torch.testing.assert_close(grad, grads[name][0][slices(box)], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_names_without_their_first_part_and_a_tied_head_that_is_there(tmp_path, name):
    config, theirs = SETTINGS[name], theirs_of(SETTINGS[name])
    (theirs.transformer if name == "gpt2" else theirs.model).save_pretrained(tmp_path)         # as GPT-2 was published
    assert {"wte.weight", "embed_tokens.weight"} & data.HFWeights(tmp_path).entries.keys()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        torch.testing.assert_close(read_folder(tmp_path, config)(TOKENS), expected, rtol=1e-5, atol=1e-5)
        tensors = theirs.state_dict()                                                  # lm_head.weight among them
        data.write_safetensors(tmp_path / "model.safetensors", tensors)
        assert "lm_head.weight" in data.HFWeights(tmp_path).entries
        torch.testing.assert_close(read_folder(tmp_path, config)(TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_a_slice_costs_a_slice_and_the_file_is_never_written(tmp_path):
    config = dataclasses.replace(SETTINGS["gpt2"], n_embd=20)
    rows, columns = 20, 3 * 2**24                                   # 4 GB, all holes
    head = json.dumps({"h.0.attn.c_attn.weight": {"dtype": "F32", "shape": [rows, columns],
                                                  "data_offsets": [0, 4 * rows * columns]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + 4 * rows * columns)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = net.hf_reader(data.HFWeights(tmp_path).get, config)
    t = read("model.layers.0.self_attn.v_proj.weight", ((5, 9, 2**24), (1, 3, 20)))
    assert t.shape == (4, 2) and t.untyped_storage().nbytes() == 32
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**17                                # KiB
    data.HFWeights(tmp_path).get("transformer.h.0.attn.c_attn.weight")[0, 0] = 1.0
    assert read("model.layers.0.self_attn.q_proj.weight", ((0, 1, 2**24), (0, 1, 20))).item() == 0


def test_folders_that_are_not_whole_are_one_line(tmp_path):
    config = SETTINGS["llama"]
    theirs_of(config).save_pretrained(tmp_path, max_shard_size="20KB")
    index, shard = tmp_path / "model.safetensors.index.json", sorted(tmp_path.glob("model-*.safetensors"))[1]

    def refused(match):
        with pytest.raises(data.DataError, match=match) as error:
            data.HFWeights(tmp_path).get("model.norm.weight")
        assert "\n" not in str(error.value)

    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(f"{shard.name}: .* must lie within its")
    shard.unlink()
    refused(f"{shard.name}: damaged or missing")
    shard.write_bytes(whole)
    with pytest.raises(data.DataError, match="must hold a tensor model.layers.2.mlp.up_proj.weight, it does not"):
        data.HFWeights(tmp_path).get("model.layers.2.mlp.up_proj.weight")
    index.write_text("{}")
    refused("must hold a tensor model.norm.weight, it does not")
    for content in ("{", "[]"):
        index.write_text(content)
        refused("index.json: not readable JSON")
    index.unlink()
    refused("model.safetensors: damaged or missing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pytorch_model.bin: must be model.safetensors: loading a pickle runs code that is in it")


LLAMA, GPT_2 = net.config_to_hf(SETTINGS["llama"]), net.config_to_hf(SETTINGS["gpt2"])
QWEN3 = net.config_to_hf(SETTINGS["qwen3"])


@pytest.mark.parametrize("hf, change, message", [
    (LLAMA, {"model_type": "qwen2"}, r"llama, qwen3, gpt2, got 'qwen2' \(its biases are on q, k and v alone\)"),
    (LLAMA, {"model_type": "mixtral"}, "model_type must be one of llama, qwen3, gpt2, got 'mixtral'"),
    (LLAMA, {"attention_bias": True}, "mlp_bias must be True, got False"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias must be False, got True"),
    (QWEN3, {"attention_bias": True}, "mlp_bias must be True, got False|attention_bias must be False, got True"),
    (QWEN3, {"attention_bias": True, "mlp_bias": True}, "attention_bias must be False, got True"),
    (QWEN3, {"use_sliding_window": True, "sliding_window": 8}, "sliding_window must be absent, got 8"),
    (LLAMA, {"sliding_window": 4096}, "sliding_window must be absent, got 4096"),
    (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]},
     "layer_types must be full_attention, got 'sliding_attention'"),
    *((LLAMA, {field: {"rope_type": kind, "factor": 8.0}}, f"rope_type must be default, got '{kind}'")
      for field in ("rope_scaling", "rope_parameters") for kind in ("llama3", "yarn", "linear", "dynamic", "longrope")),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type must be default, got 'linear'"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
     "rope_parameters must be rope_theta alone, got 'full_attention'"),
    (LLAMA, {"rope_scaling": {"factor": 2.0}}, "rope_parameters must be rope_theta alone, got 'factor'"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1, got 0.5"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts must be absent, got 8"),
    (QWEN3, {"num_experts": 8}, "num_experts must be absent, got 8"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping must be absent, got 30.0"),
    (LLAMA, {"attention_multiplier": 0.1}, "attention_multiplier must be absent, got 0.1"),
    (LLAMA, {"logits_scaling": 8}, "logits_scaling must be 1, got 8"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config must be absent, got {'bits': 4}"),
    (GPT_2, {"activation_function": "gelu"}, "activation_function must be gelu_new, got 'gelu'"),
    (GPT_2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be absent, got True"),
    (GPT_2, {"scale_attn_weights": False}, "scale_attn_weights must be 1, got False")])
def test_other_architectures_are_refused_by_field_and_value(hf, change, message):
    net.config_from_hf(hf)
    with pytest.raises(ValueError, match=message):
        net.config_from_hf(hf | change)


def test_published_configs_load_and_a_missing_field_is_named():
    smol = dict(  # SmolLM2-135M: huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json
        model_type="llama", attention_bias=False, hidden_act="silu", hidden_size=576, intermediate_size=1536,
        is_llama_config=True, max_position_embeddings=8192, num_attention_heads=9, num_hidden_layers=30,
        num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-5, rope_interleaved=False, rope_scaling=None,
        rope_theta=100000, tie_word_embeddings=True, torch_dtype="bfloat16", vocab_size=49152)
    assert net.num_params(net.config_from_hf(smol)) == 134_515_008
    qwen = dict(  # huggingface.co/Qwen/Qwen3-0.6B, config.json
        model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=1024,
        intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16,
        num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936)
    assert net.num_params(net.config_from_hf(qwen)) == 596_049_920
    assert net.config_from_hf(qwen | {"sliding_window": 4096}).rope_theta == 1e6                     # not in use
    gpt2 = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=768,
                n_head=12, n_layer=12, n_positions=1024, vocab_size=50257)
    assert net.num_params(net.config_from_hf(gpt2)) == 124_439_808
    for hf, field in ((smol, "rms_norm_eps"), (qwen, "head_dim"), (gpt2, "n_embd")):
        with pytest.raises(ValueError, match=f"config.json must hold {field}, it does not"):
            net.config_from_hf({name: value for name, value in hf.items() if name != field})


# ---- tokenizers


def ordinary_strings(corpus, count=2000, seed=0):
    """Words and lines of the corpus, code, white space, other scripts, emoji; no U+2581, no surrogates."""
    rng, path = random.Random(seed), next(corpus.glob("train-*.bin"))
    tokenizer = data.Tokenizer(corpus / "tokenizer.model")
    text = tokenizer.decode(data.open_shard(path)[:200_000].tolist())
    words = text.split()[:5000]
    strange = [" ", "  ", "    ", "\n", "\t", "\r\n", "\n\n        ", "é", "漢字", "日本語", "ﬁ", "e\u0301", "\u00a0",
               "\0", "\x7f", "<0x41>", "\U0001F600", "\U0001F469\u200d\U0001F467", "\ufeff", "Ж", "ا", "((", "----"]
    for n in range(count):
        if n % 3 == 0:
            start = rng.randrange(len(text))
            yield text[start:start + rng.randrange(120)]
        elif n % 3 == 1:
            yield "".join(rng.choice(words if rng.random() < 0.5 else strange) for _ in range(rng.randrange(20)))
        else:                                          # few letters: merges compete for the same neighbours
            yield "".join(rng.choices(rng.choice(["  a", "=- ", "-#", " \n", "ersti ", "esn "]), k=rng.randrange(40)))


def test_transformers_reads_our_tokenizer_and_gives_the_same_ids(tmp_path, corpus, tokenizer):
    out = export(SETTINGS["llama"], tmp_path / "hf", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 3, 512)
    again = data.HFTokenizer(out / "tokenizer.json")
    assert again.bytes == tokenizer.bytes and (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 3)
    for text in [*CORNERS[:20], *CORNERS[22:24], *CORNERS[29:], *ordinary_strings(corpus)]:
        if {"\u2581", "<s>", "</s><pad><unk>"} & {text, *text}:
            continue
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids == again.encode(text), repr(text)
        assert theirs.encode(text) == [1, *ids] and theirs.decode(ids) == text == again.decode(ids), repr(text)
    assert theirs.encode("a", "b") == [1, *tokenizer.encode("ab")]
    # a mark in a text: theirs finds it, unless told not to; ours does not
    assert theirs.encode("<s>", add_special_tokens=False) == [1]
    plain = transformers.AutoTokenizer.from_pretrained(out, split_special_tokens=True)
    assert plain.encode("</s>x<unk>", add_special_tokens=False) == tokenizer.encode("</s>x<unk>") == again.encode(
        "</s>x<unk>")


def test_a_folder_with_ours_gives_ours_and_marks_of_a_chat_survive(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, hello there"] * 9), model_writer=model, model_type="bpe", vocab_size=285,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        allow_whitespace_only_pieces=True, control_symbols=["<|user|>"], unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        minloglevel=2, hard_vocab_limit=False)
    ours = data.Tokenizer(model.getvalue())
    user = ours.special_id("<|user|>")
    assert user == 4 and [ours.special_id(text) for text in ("hello", "<unk>", "nothing", "<0x41>")] == [None] * 4
    template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    out = export(SETTINGS["llama"], tmp_path / "hf", ours, chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    expected = [1, user, *ours.encode("hello  you")]
    assert theirs.encode("<|user|>hello  you") == expected
    assert theirs.decode(expected, skip_special_tokens=True) == "hello  you"
    assert theirs.chat_template == template
    for path in (out, out / "tokenizer.model"):
        assert type(data.load_tokenizer(path)) is data.Tokenizer and data.load_tokenizer(path).sha256 == ours.sha256
    (out / "tokenizer.model").unlink()
    again = data.load_tokenizer(out)
    assert type(again) is data.HFTokenizer and again.special_id("<|user|>") == user
    assert again.config["chat_template"] == template
    with pytest.raises(data.DataError, match="must be, or hold, a tokenizer.json, or a tokenizer.model"):
        data.load_tokenizer(tmp_path)


def test_a_foreign_sentencepiece_model_is_left_for_the_tokenizer_json_beside_it(tmp_path, corpus, tokenizer):
    out, model = export(SETTINGS["llama"], tmp_path / "hf", tokenizer), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["hello world, hello there"] * 9), vocab_size=22,
                                             model_writer=model, model_type="bpe", minloglevel=2,
                                             hard_vocab_limit=False)                        # puts a space in front
    (out / "tokenizer.model").write_bytes(model.getvalue())
    assert type(data.load_tokenizer(out)) is data.HFTokenizer
    with pytest.raises(data.DataError, match="a tokenizer.model that keeps spaces as they are"):
        data.load_tokenizer(out / "tokenizer.model")
    (out / "tokenizer.model").write_text("IQ== 0\n")                                                # as tiktoken's is
    assert type(data.load_tokenizer(out)) is data.HFTokenizer
    (out / "tokenizer.json").unlink()
    with pytest.raises(data.DataError, match="not a readable SentencePiece model"):
        data.load_tokenizer(out)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A folder with a byte-level BPE tokenizer, as GPT-2, Qwen and Llama 3 have."""
    folder = tmp_path_factory.mktemp("byte-level")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.train_from_iterator(["def f(x):\n    return x  # é 漢字"] * 5, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    hf.add_tokens(["<think>"])                                               # added, and no special token
    hf.enable_truncation(4)
    hf.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": {"content": "<|im_end|>", "special": True}, "bos_token": None, "model_max_length": 99}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "pad_token_id": [0, 1]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_a_byte_level_tokenizer_goes_in_and_out(byte_level, corpus, tmp_path):
    t = data.load_tokenizer(byte_level)
    oracle = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    oracle.no_truncation()
    assert isinstance(t, data.HFTokenizer) and t.vocab_size == oracle.get_vocab_size() == len(t.bytes)
    assert (t.bos_id, t.eos_id, t.pad_id) == (None, 1, 0)
    assert t.special_id("<|im_end|>") == 1 and t.special_id("<think>") is t.special_id("def") is None
    assert t.bytes[0] == t.bytes[1] == b"" and t.bytes[t.vocab["<think>"]] == b"<think>" and t.piece(1) == "<|im_end|>"
    assert sorted(b for b in t.bytes if len(b) == 1) == [bytes([b]) for b in range(256)]
    for text in [*ordinary_strings(corpus, 500), "a<think>b", "\u2581 <0x41>"]:
        ids = t.encode(text)
        assert ids == oracle.encode(text, add_special_tokens=False).ids and t.decode(ids) == text == oracle.decode(ids)
        assert t.token_bytes[ids].sum() == len(text.encode())
    ids = t.encode("a<|endoftext|>b<|im_end|>")
    assert not {0, 1} & set(ids) and t.decode(ids) == "a<|endoftext|>b<|im_end|>"
    assert t.decode([0, *t.encode("x\ud800"), 1]) == "x?" and t.decode(t.encode("ж")[:1]) == "\ufffd"

    out = export(SETTINGS["llama"], tmp_path / "hf", t)
    assert not (out / "tokenizer.model").exists()
    again, theirs = data.load_tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
    assert again.sha256 == t.sha256 and (again.bos_id, again.eos_id, again.pad_id) == (None, 1, 0)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, 1, 0)
    assert theirs.chat_template == "{{ messages }}" and theirs.model_max_length == 99
    assert theirs.encode("def f") == t.encode("def f")


def test_ids_come_from_the_configs_where_no_tokenizer_config_is(byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    assert data.HFTokenizer(tmp_path / "tokenizer.json").eos_id is None
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 0], "pad_token_id": null}')
    t = data.HFTokenizer(tmp_path / "tokenizer.json")
    assert (t.bos_id, t.eos_id, t.pad_id) == (0, 1, None)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|im_end|>"}')
    t = data.HFTokenizer(tmp_path / "tokenizer.json")
    assert (t.bos_id, t.eos_id, t.pad_id) == (1, 1, None)


def test_tokenizers_that_cannot_be_read_are_one_line(byte_level, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(data.DataError, match="tokenizer.json: not readable JSON"):
        data.HFTokenizer(path)
    path.write_text('{"model": {"type": "Nothing"}}')
    with pytest.raises(data.DataError, match="tokenizer.json: not a readable tokenizer") as error:
        data.HFTokenizer(path)
    assert "\n" not in str(error.value)
    content = json.loads((byte_level / "tokenizer.json").read_text())
    path.write_text(json.dumps(content | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
                                          "pre_tokenizer": None}))
    with pytest.raises(data.DataError, match=r"tokenizer.json: its pieces must be bytes .* \['WordPiece'\]"):
        data.HFTokenizer(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(data.DataError, match="must be read by the package tokenizers: pip install tokenizers"):
        data.HFTokenizer(byte_level / "tokenizer.json")
