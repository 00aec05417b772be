"""The corpora that people have: compressed text, tables, token files, streams, mixtures of these; and what a large one
needs: bounded memory, all cores, going on after a kill."""

import gzip
import io
import itertools
import json
import math
import random
import re
import signal
import sys
import time
import tracemalloc
import zlib
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch
from conftest import POOL
from test_data import loader

import data
import train

WORDS = "the quick brown fox jumps over a lazy dog and runs home".split()


def documents(n: int = 60, seed: int = 2) -> list[str]:
    rng = random.Random(seed)
    return [f"{seed}/{i} {' '.join(rng.choices(WORDS, k=80))}\nend\n" for i in range(n)]


def write_lines(path: Path, texts, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A .jsonl, and prepared/ of it."""
    folder = tmp_path_factory.mktemp("plain")
    write_lines(folder / "a.jsonl", documents())
    data.prepare([folder / "a.jsonl"], folder / "prepared", 320)
    return folder / "a.jsonl"


def manifest(folder) -> dict:
    return data.read_sealed(Path(folder) / "manifest.json", "tokens")


def content(folder) -> dict:
    return {name: manifest(folder)[name] for name in ("splits", "fingerprint", "dropped")}


# ---- kinds of files


def parquet(path, texts, field="text", **options):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, **options)
    return path


def compressed(path, raw: bytes):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    else:
        codec, middle = pytest.importorskip("pyarrow").Codec("zstd"), len(raw) // 2                         # two frames
        path.write_bytes(b"".join(codec.compress(part, asbytes=True) for part in (raw[:middle], raw[middle:])))
    return path


@pytest.mark.parametrize("kind", ["txt", "x.jsonl.txt", "txt.gz", "md.zst", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_kind_of_file_gives_the_same_tokens(plain, tmp_path, kind):
    texts, source = documents(), tmp_path / "src"
    source.mkdir()
    if kind == "parquet":
        parquet(source / "a.parquet", texts[:40], row_group_size=7)
        parquet(source / "b.parquet", texts[40:])
    elif kind.startswith("jsonl"):
        compressed(source / f"a.{kind}", plain.read_bytes())
    else:
        for i, text in enumerate(texts):
            path = source / f"{i:03d}.{kind}"
            path.write_text(text) if kind.endswith("txt") else compressed(path, text.encode())
    assert content(data.prepare([source], tmp_path / "out", 320)) == content(plain.parent / "prepared")


def test_the_fields_name_is_a_flag(plain, tmp_path):
    write_lines(tmp_path / "b.jsonl", documents(), "body")
    out = data.prepare([tmp_path / "b.jsonl"], tmp_path / "out", 320, text_field="body")
    assert content(out) == content(plain.parent / "prepared")
    with pytest.raises(data.DataError, match="must hold text, dropped: {'no text field': 60}"):
        data.prepare([tmp_path / "b.jsonl"], tmp_path / "out2", 320)
    path = parquet(tmp_path / "c.parquet", documents(), "body")
    with pytest.raises(data.DataError, match=r"c.parquet: must have a column text .*it has \['id', 'body'\]"):
        data.prepare([path], tmp_path / "out2", 320)


def test_a_large_file_of_text_is_documents_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEXT_BYTES", 1000)
    text = "".join(f"line {i} \u00e9\n" for i in range(500))
    for name, content in (("a.txt", text), ("b.txt", "short\n"), ("c.txt", "")):
        (tmp_path / name).write_text(content)
    dropped = defaultdict(list)
    read = {name: [text for _, text in data.read_documents([tmp_path / name], "text", None, dropped)]
            for name in ("a.txt", "b.txt", "c.txt")}
    assert "".join(read["a.txt"]) == text and all(1000 <= len(t.encode()) < 1020 for t in read["a.txt"][:-1])
    assert read["b.txt"] == ["short\n"] and read["c.txt"] == [] and dropped == {"empty": [tmp_path / "c.txt"]}


def test_files_are_read_document_by_document(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", compresslevel=1) as f:
        for i in range(4000):
            f.write(json.dumps({"text": f"{i} " + "word " * 200}) + "\n")
    tracemalloc.start()
    files = [tmp_path / "a.jsonl.gz"]
    size = sum(len(text) for _, text in data.read_documents(files, "text", None, defaultdict(list)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 4e6 and peak < 4e5


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_a_damaged_file_is_one_line(plain, tmp_path, name):
    path = tmp_path / name
    whole = parquet(path, documents()) if name.endswith("parquet") else compressed(path, plain.read_bytes())
    raw = whole.read_bytes()
    for damaged in (raw[:-20], b"garbage" * 100):
        path.write_bytes(damaged)
        with pytest.raises(data.DataError, match=rf"{name}: cannot be read \(") as error:
            data.prepare([path], tmp_path / "out", 320)
        assert "\n" not in str(error.value) and not (tmp_path / ".out.tmp").exists()


@pytest.mark.parametrize("source, module, package", [
    ("a.jsonl.zst", "pyarrow", "pyarrow"), ("a.parquet", "pyarrow.parquet", "pyarrow"),
    ("hf:name/of:subset", "datasets", "datasets")])
def test_an_absent_package_is_one_line_with_the_command(tmp_path, monkeypatch, source, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"x")
    path = source if source.startswith("hf:") else str(tmp_path / source)
    with pytest.raises(data.DataError, match=f"^{path}: must be read by .*: pip install {package}$"):
        data.prepare([path], tmp_path / "out", 320)


# ---- streams


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_of_the_library_is_streamed(plain, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, texts in (("train", documents()), ("test", documents(20, seed=3))):
        write_lines(tmp_path / "set" / "data" / f"{split}-00000.jsonl", texts)
    out = data.prepare([f"hf:{tmp_path / 'set'}"], tmp_path / "out", 320)
    assert content(out) == content(plain.parent / "prepared")
    out = data.prepare([f"hf:{tmp_path / 'set'}::test"], tmp_path / "out2", 320)
    m = manifest(out)
    assert m["splits"]["train"]["documents"] + m["splits"]["val"]["documents"] == 20
    assert m["knowledge_cutoff"] == time.strftime("%Y-%m-%d", time.gmtime())                    # nothing says it better
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "tokenizer.model", "train-00000.bin",
                                                     "val-00000.bin"]
    for source, message in ((f"hf:{tmp_path / 'absent'}", r"cannot be read \(.*absent.*\): hf: takes a folder, or"),
                            (f"hf:{tmp_path / 'set'}::no", "Bad split")):
        with pytest.raises(data.DataError, match=message) as error:
            data.prepare([source], tmp_path / "out3", 320)
        assert "\n" not in str(error.value)
    with pytest.raises(data.DataError, match="must have a column body"):
        data.prepare([f"hf:{tmp_path / 'set'}"], tmp_path / "out3", 320, text_field="body")


class Rows:
    """A stream as of the package datasets, that breaks after some rows."""
    column_names = ["text"]

    def __init__(self, texts, most=math.inf, start=0):
        self.texts, self.most, self.start, self.given = texts, most, start, []

    def skip(self, n):
        return Rows(self.texts, self.most, n)

    def __iter__(self):
        for i, text in enumerate(self.texts[self.start:], self.start):
            if i >= self.most:                                                        # Ctrl-C, or the network is gone
                raise KeyboardInterrupt if i % 2 else ConnectionError("gone")
            READ.append(i)
            yield {"text": text}


READ = []


def test_a_stream_that_breaks_goes_on_after_its_last_part(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PART_BYTES", 4000)
    for most, whole, first in ((25, 2, 0), (26, 2, 22), (45, 4, 22), (math.inf, None, 44)):    # 11 documents in a part
        READ.clear()
        monkeypatch.setattr(data, "open_stream", lambda source, field, most=most: Rows(documents(), most))
        try:
            data.prepare(["hf:some/set"], tmp_path / "out", 320)
        except (KeyboardInterrupt, data.DataError) as error:
            assert isinstance(error, KeyboardInterrupt) or "cannot be read (ConnectionError: gone)" in str(error)
            assert len(list((tmp_path / ".out.tmp" / "progress").glob("*.jsonl.gz"))) == whole
        assert READ[0] == first
    assert content(tmp_path / "out") == content(plain.parent / "prepared")


def test_only_as_much_of_a_stream_is_read_as_the_tokens_need(tmp_path, monkeypatch):
    texts, said = documents(3000), []
    monkeypatch.setattr(data, "open_stream", lambda source, field: Rows(texts))
    READ.clear()                                                                 # a part may hold more than is needed
    out = data.prepare(["hf:some/set"], tmp_path / "out", 320, max_tokens=40_000, log=said.append)
    m = manifest(out)
    assert 40_000 <= m["splits"]["train"]["tokens"] < 44_000 and m["splits"]["val"]["tokens"] > 500
    assert len(READ) - 3000 < 900                                    # the estimate reads 2 MB, here all, from its start
    assert re.fullmatch(r"about 0 MB of text: 0.0 M tokens, 0 MB on disk, some 1 min on \d+ cores", said[0])


# ---- token files


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory):
    """A byte-level BPE whose one mark, <|endoftext|>, stands between documents."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(documents(), tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    model.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    return folder


def llm_c(path, ids, **changes):
    head = np.zeros(256, "<i4")
    head[:3] = [changes.get("magic", 20240520), changes.get("version", 1), changes.get("count", len(ids))]
    path.write_bytes(head.tobytes() + ids.astype("<u2").tobytes())
    return path


@pytest.mark.parametrize("mark_is", ["first", "last"])
def test_token_files_keep_their_ids(gpt2_like, tmp_path, mark_is):
    """nanoGPT ends a document with the mark, llm.c begins it: the same documents, and the same as from the text."""
    t = data.find_tokenizer(str(gpt2_like))
    texts = documents()
    assert t.encode_batch(texts) == [t.encode(text) for text in texts]
    ids = [[0] * (mark_is == "first") + t.encode(text) + [0] * (mark_is == "last") for text in texts]
    raw = np.array(list(itertools.chain(*ids)), "<u2")
    raw.tofile(tmp_path / "train.bin")
    llm_c(tmp_path / "fineweb_train_000001.bin", raw)
    of_text = data.prepare([write_lines(tmp_path / "a.jsonl", texts)], tmp_path / "of_text", tokenizer=t)
    expected = {tuple(t.encode(text)) for text in texts}
    for name in ("train.bin", "fineweb_train_000001.bin"):
        found = [tuple(x.tolist()) for _, x in data.read_documents([tmp_path / name], "text", t, {})]
        assert len(found) == 60 and set(found) == expected
        out = data.prepare([tmp_path / name], tmp_path / f"{name}.out", tokenizer=t)
        m, reference = manifest(out), manifest(of_text)
        for what in ("documents", "bytes", "tokens"):
            assert sum(m["splits"][s][what] for s in m["splits"]) == sum(
                reference["splits"][s][what] for s in m["splits"])
        one = loader(out, seq_len=16)
        (shard,) = one.shards
        assert shard[0] == 0
        assert {tuple(d[1:].tolist()) for d in np.split(shard, (shard == 0).nonzero()[0])[1:]} < expected
        batch = next(one)
        assert (batch["targets"] >= 0).all()
        assert torch.equal(batch["documents"], (batch["tokens"] == 0).cumsum(1))


def test_bad_token_files_are_one_line(gpt2_like, plain, tmp_path):
    t, ids, path = data.find_tokenizer(str(gpt2_like)), np.arange(300), tmp_path / "x.bin"

    def refused(message, tokenizer=t):
        with pytest.raises(data.DataError, match=f"^{tmp_path}/{message}"):                   # said once, as it is
            data.prepare([path], tmp_path / "out", tokenizer=tokenizer)

    llm_c(path, ids)
    refused("x.bin: a token file needs --tokenizer", None)
    llm_c(path, ids, count=299)
    refused("x.bin: must be uint16 ids, alone or after llm.c's header; it has 1624 bytes")
    llm_c(path, ids, magic=20240801)                                                            # its header is not ids
    refused(rf"x.bin: ids must be below the tokenizer's {t.vocab_size}, got \d+")
    (ids + 200).astype("<u2").tofile(path)
    refused(f"x.bin: ids must be below the tokenizer's {t.vocab_size}, got 499")
    path.write_bytes(b"abc")
    refused("x.bin: must be uint16 ids")
    path.write_bytes((plain.parent / "prepared" / "train-00000.bin").read_bytes())
    refused("x.bin: must be uint16 ids")
    with pytest.raises(data.DataError, match="matches none"):                         # a folder's .bin may be anything
        data.source_files([tmp_path])


def test_a_tokenizer_by_its_name_on_the_hub(gpt2_like, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: asked.append(name) or str(gpt2_like))
    t = data.find_tokenizer("gpt2")
    assert asked == ["gpt2"] and t.vocab_size > 300 and data.first_id(t) == t.eos_id == 0

    def no_network(name, **options):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    with pytest.raises(data.DataError, match=r"^tokenizer gpt2: cannot be read \(.*to host more\): it must be "):
        data.find_tokenizer("gpt2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(data.DataError, match="pip install tokenizers"):
        data.find_tokenizer("gpt2")


# ---- large corpora


def test_long_texts_are_encoded_in_parts_without_a_change(tokenizer):
    rng = random.Random(3)
    text = Path(data.__file__).read_text().replace("\u2581", "") * 2
    for _ in range(100):
        odd = [" ", "  ", "\n", "a", "word", "():", "\t", "\u00e9", "x" * 150, " " * 120]
        piece = "".join(rng.choices(odd, k=200))
        for t in (piece, text[(a := rng.randrange(len(text))):a + 3000]):
            assert tokenizer.encode(t) == tokenizer.sp.encode(t)
    texts = [*documents(), "", "a\u2581b", text[:5000]]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    model = io.BytesIO()                                                     # its pieces end with spaces: it is not cut
    data.sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents()), model_writer=model, model_type="bpe", vocab_size=300, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, treat_whitespace_as_suffix=True, minloglevel=2)
    suffix = data.Tokenizer(model.getvalue())
    assert not suffix.can_cut and tokenizer.can_cut
    assert [suffix.sp.encode(text) for text in documents()] == suffix.encode_batch(documents())


def test_a_large_text_is_estimated_before_it_is_prepared(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGE_BYTES", 0)
    said = []
    data.prepare([plain], tmp_path / "out", vocab_size=320, log=said.append)
    assert re.match(r"about 0 MB of text: 0.\d M tokens, ", said[0])


def prepare_slowly(source, out):
    """What a process that will be killed runs."""
    encode = data.encode_chunk
    data.encode_chunk = lambda *args: time.sleep(0.03) or encode(*args)
    data.prepare([source], out, 320, shard_tokens=2000)


def test_a_killed_preparation_goes_on_with_its_finished_shards(tmp_path, monkeypatch):
    source, out, work = write_lines(tmp_path / "a.jsonl", documents(400)), tmp_path / "out", tmp_path / ".out.tmp"
    whole = data.prepare([source], tmp_path / "whole", 320, shard_tokens=2000)
    process = POOL.process(prepare_slowly, source, out)
    while len(list(work.glob("train-*.bin"))) < 4 and process.is_alive():                      # three are whole
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    splits = data.read_sealed(work / "progress" / "shards.json", "shards")["splits"]
    finished = {s["file"]: (work / s["file"]).stat().st_mtime_ns for split in splits.values() for s in split["shards"]}
    trained, encoded = [], []
    train_tokenizer, encode = data.Tokenizer.train, data.encode_chunk
    monkeypatch.setattr(data.Tokenizer, "train", lambda *args: trained.append(1) or train_tokenizer(*args))
    monkeypatch.setattr(data, "encode_chunk", lambda t, chunk: encoded.extend(chunk) or encode(t, chunk))
    data.prepare([source], out, 320, shard_tokens=2000)
    shards = manifest(out)["splits"]["train"]["shards"]
    assert not trained and 3 <= len(splits["train"]["shards"]) < len(shards)                   # not trained again
    assert all((out / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert len(encoded) == 400 - sum(split["documents"] for split in splits.values())                  # nor encoded
    assert content(out) == content(whole) and not work.exists()


def test_what_was_begun_from_another_source_is_begun_again(tmp_path, monkeypatch):
    source, other = write_lines(tmp_path / "a.jsonl", documents()), write_lines(tmp_path / "b.jsonl", documents(50, 9))
    expected = data.prepare([other], tmp_path / "whole", 320)
    chunks, encode = itertools.count(), data.encode_chunk
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_chunk", lambda *args: encode(*args) if next(chunks) < 4 else signal.raise_signal(
            signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            data.prepare([source], tmp_path / "out", 320, shard_tokens=2000)
    assert (tmp_path / ".out.tmp" / "tokenizer.model").exists()
    assert content(data.prepare([other], tmp_path / "out", 320)) == content(expected)


def test_a_limited_preparation_that_is_killed_ends_where_it_would_have(tmp_path, monkeypatch):
    source, how = write_lines(tmp_path / "a.jsonl", documents(300)), dict(max_tokens=12_000, shard_tokens=2500)
    expected = data.prepare([source], tmp_path / "whole", 320, **how)
    plain = data.write_sealed

    def killed(path, content):
        if path.name == "manifest.json":                                            # all shards are whole
            raise KeyboardInterrupt
        plain(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_sealed", killed)
        with pytest.raises(KeyboardInterrupt):
            data.prepare([source], tmp_path / "out", 320, **how)
    assert content(data.prepare([source], tmp_path / "out", 320, **how)) == content(expected)


@pytest.mark.parametrize("limit", [2000, 8000, 10**9])
def test_tokens_are_limited(plain, tmp_path, limit):
    tokenizer = data.Tokenizer(plain.parent / "prepared" / "tokenizer.model")
    whole = manifest(plain.parent / "prepared")["splits"]["train"]["tokens"]
    m = manifest(data.prepare([plain], tmp_path / "out", max_tokens=limit, tokenizer=tokenizer))
    assert whole > 9500 and min(limit, whole) <= m["splits"]["train"]["tokens"] <= min(whole, limit + limit // 8)
    flags = ["--out", str(tmp_path / "out"), "--tokens", f"{limit:g}", "--tokenizer", str(plain.parent / "prepared")]
    assert data.main([str(plain), *flags]) == 0


def test_the_tokenizers_sample_grows_with_its_vocabulary(plain, tmp_path, monkeypatch):
    samples = []
    monkeypatch.setattr(data, "survey", lambda *args: samples.append(args[3]) or (_ for _ in ()).throw(
        data.DataError("enough")))
    for vocab_size, sample in ((320, 0), (2048, 0), (50304, 0), (50304, 5_000_000)):
        with pytest.raises(data.DataError, match="enough"):
            data.prepare([plain], tmp_path / "out", vocab_size, sample_bytes=sample)
    assert samples == [8_000_000, 8_000_000, 196_500_000, 5_000_000]


def test_the_sample_is_of_training_documents_and_no_larger_than_asked_for(plain):
    read = data.functools.partial(data.read_documents, [plain], "text", None)
    side, found = data.survey(read, None, 0.3, 5000, math.inf, print)
    sampled, sizes = side >= data.SAMPLE, np.array([len(text) for text in documents()])
    assert found["sample"] == sizes[sampled].sum() and 5000 <= found["sample"] < 5000 + sizes.max()
    assert (side[sampled] & data.TRAIN).all() and (side == data.VAL).sum() > 8


def test_every_block_of_a_shard_has_a_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64)
    ids = np.random.default_rng(0).integers(0, 2**16, 1001).astype(np.uint16)
    entry = data.write_shard(tmp_path / "a.bin", ids)
    raw = (tmp_path / "a.bin").read_bytes()[32:]
    assert raw == ids.tobytes() and entry["tokens"] == 1001 and entry["crc32"] == zlib.crc32(raw)
    assert entry["blocks"] == [zlib.crc32(raw[i:i + 64]) for i in range(0, len(raw), 64)]


# ---- mixtures


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for seed, (name, n) in enumerate((("a", 300), ("b", 120), ("c", 60))):
        write_lines(folder / f"{name}.jsonl", documents(n, seed))
    return folder


@pytest.fixture(scope="module")
def parts(sources):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sources)
        mixed = data.prepare_all("6*a.jsonl,.3*b.jsonl,0.25*c.jsonl", vocab_size=320)
    return [(share, sources / folder) for share, folder in mixed]


def mixed(parts, **kwargs):
    return data.Mixture(parts, **{"micro_batch_size": 4, "seq_len": 16, "seed": 5} | kwargs)


def test_shares_are_read_as_they_are_written():
    assert data.mixture("0.7*hf:some/set:sub,0.2*code/,0.1*wiki.parquet") == [
        (Fraction(7, 10), "hf:some/set:sub"), (Fraction(2, 10), "code/"), (Fraction(1, 10), "wiki.parquet")]
    assert data.mixture("3*a/*.txt,.5*b,1.*c")[0] == (Fraction(6, 9), "a/*.txt")
    assert data.mixture("a.txt,b.txt") == data.mixture("stdlib") == data.mixture("2*.txt") == []
    for text, message in (("0.5*a,b", "every source of a mixture must have a share"),
                          ("0*a,1*b", "must be at least 1/1000"), ("0.0009*a,1*b", "must be at least 1/1000"),
                          ("0*a,0*b", "must be at least 1/1000")):
        with pytest.raises(data.DataError, match=message):
            data.mixture(text)


@pytest.mark.parametrize("shares", [(6, 3, 1), (1, 1, 1), (997, 2, 1), (7, 11, 13)])
def test_shares_hold_exactly(parts, shares):
    mixture = mixed([(Fraction(share, sum(shares)), folder) for share, (_, folder) in zip(shares, parts, strict=True)])
    seen = np.array([mixture.counts(position) for position in range(1500)])
    assert (abs(seen - np.arange(1500)[:, None] * shares / sum(shares)) < 3).all()
    assert (np.diff(seen, axis=0).sum(axis=1) == 1).all() and (np.diff(seen, axis=0) >= 0).all()       # one source each
    for whole in (1000, 10**7):                                         # after whole rounds that shares divide: exactly
        assert mixture.counts(sum(shares) * whole) == [share * whole for share in shares]


def test_odd_shares_are_rounded(parts):
    shares = [Fraction(str(share)) for share in (0.0461538, 0.4767701, 0.4770761)]
    mixture = mixed([(share, folder) for share, (_, folder) in zip(shares, parts, strict=True)])
    assert mixture.round == 10**5 and sum(mixture.per_round) == 10**5
    assert all(abs(n / 10**9 - share) < 1e-5 for n, share in zip(mixture.counts(10**9), shares, strict=True))


def test_each_source_comes_in_the_order_of_its_own_epochs(parts):
    mixture = mixed([(Fraction(n, 10), folder) for n, (_, folder) in zip((1, 2, 7), parts, strict=True)])
    alone, seen = [loader(folder, seq_len=16) for _, folder in parts], [150, 300, 1050]
    batch = mixture.batch(range(1500))
    counts = np.array([mixture.counts(position) for position in range(1501)])
    for s, one in enumerate(alone):
        rows = np.flatnonzero(np.diff(counts[:, s]))                                         # positions of this source
        assert torch.equal(batch["tokens"][rows], one.batch(range(seen[s]))["tokens"])
    epochs = mixture.epochs(1500)
    assert list(epochs.values()) == [n / one.num_windows for n, one in zip(seen, alone, strict=True)]
    assert max(epochs.values()) > 1


def test_a_mixtures_batches_depend_on_their_number_alone(parts):
    reference = mixed(parts, micro_batch_size=8)
    start = json.loads(json.dumps(reference.state_dict() | {"windows": reference.round - 100}))
    reference.load_state_dict(start)
    expected = [next(reference) for _ in range(30)]                                              # into the second round
    for dp, micro in ((2, 2), (8, 1)):
        ranks = [mixed(parts, micro_batch_size=micro, dp_rank=r, dp_size=dp) for r in range(dp)]
        for rank in ranks:
            rank.load_state_dict(start)
        for batch in expected:
            got = [next(r) for _ in range(8 // (micro * dp)) for r in ranks]
            assert torch.equal(torch.cat([g["tokens"] for g in got]), batch["tokens"])
    resumed = mixed(parts, micro_batch_size=8)
    state = start | {"windows": start["windows"] + 8 * 20}
    resumed.load_state_dict(state)
    assert all(torch.equal(next(resumed)["targets"], batch["targets"]) for batch in expected[20:])
    other = [(share, folder) for (share, _), (_, folder) in zip(parts[::-1], parts, strict=True)]
    with pytest.raises(data.DataError, match="fingerprint must be"):
        mixed(other).load_state_dict(state)


def test_validation_is_mixed_by_share_and_repeats_nothing(parts):
    val = mixed(parts, split="val")
    counts, sizes = val.counts(val.num_windows), [loader.num_windows for loader in val.loaders]
    assert all(n <= size for n, size in zip(counts, sizes, strict=True)) and val.num_windows > 5
    assert any(n > size for n, size in zip(val.counts(val.num_windows + 1), sizes, strict=True))   # as long as can be
    seen = [bytes(row) for row in val.batch(range(val.num_windows))["tokens"].numpy()]
    assert len(set(seen)) == len(seen)
    text = val.text(val.num_windows)
    batch = val.batch(range(val.num_windows))["targets"]
    assert len(text) == val.tokenizer.token_bytes[batch[batch >= 0]].sum()
    # a source without held-out windows is left out
    short = mixed(parts, split="val", seq_len=min(map(len, val.shards)) + 1)
    assert len(short.loaders) < 3 and short.num_windows == short.loaders[0].num_windows


def test_one_tokenizer_and_one_folder_for_a_source_in_every_mixture(parts, sources, tmp_path, monkeypatch):
    assert len({manifest(folder)["tokenizer"]["sha256"] for _, folder in parts}) == 1
    alone = data.prepare([sources / "a.jsonl"], tmp_path / "alone", 320)                   # of the largest share
    assert manifest(alone)["tokenizer"] == manifest(parts[0][1])["tokenizer"]
    monkeypatch.chdir(sources)
    before = sorted(p.name for p in (sources / "data").iterdir())
    again = data.prepare_all("0.5*a.jsonl,0.2*c.jsonl", vocab_size=320)
    assert [sources / folder for _, folder in again] == [parts[0][1], parts[2][1]]
    assert sorted(p.name for p in (sources / "data").iterdir()) == before
    # a prepared folder brings its tokenizer, whatever its share
    small = data.prepare([sources / "c.jsonl"], tmp_path / "small", 330)
    mixed_folders = data.prepare_all(f"0.9*a.jsonl,0.1*{small}", vocab_size=320)
    assert {manifest(folder)["tokenizer"]["sha256"] for _, folder in mixed_folders} == {
        manifest(small)["tokenizer"]["sha256"]}
    with pytest.raises(data.DataError, match="must have one tokenizer"):
        mixed([(Fraction(1, 2), parts[0][1]), (Fraction(1, 2), small)])


def test_a_run_trains_on_a_mixture(parts, tmp_path):
    spec = ",".join(f"{float(share)}*{folder}" for share, folder in parts)
    how = ["--steps", "4", "--vocab-size", "320", "--seq-len", "16"]
    code, stdout, error = test_train.run(spec, tmp_path / "run", *how)
    assert code == 0, error
    assert re.search(r"data       .* training tokens, so 0\.\d+ epochs of \S+/a-.*, 0\.\d+ epochs of \S+/b-", stdout)
    card = (tmp_path / "run" / "card.md").read_text()
    reader, _ = data.newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert list(reader.meta["card"]["epochs"]) == [str(folder) for _, folder in parts] and "epochs: {" in card
    code, _, error = test_train.run(spec.replace("0.", "0.0", 1), tmp_path / "run", *how)             # other shares
    assert code == 2 and "data must be the text that the run" in error


# ---- loading


def test_prefetching_changes_no_batch(corpus, parts):
    for make in (lambda **kwargs: loader(corpus, **kwargs), lambda **kwargs: mixed(parts, **kwargs)):
        one, two = make(), make(prefetch=True)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(next(one).values(), next(two).values(), strict=True))
        assert one.state_dict() == two.state_dict()
        two.load_state_dict(one.state_dict() | {"windows": 40})                        # what was read ahead is not used
        assert torch.equal(next(two)["tokens"], one.batch(range(40, 44))["tokens"])
        assert two.ahead[0] == range(44, 48)


def test_batches_do_not_add_up_in_memory(corpus, parts):
    for read in (loader(corpus), mixed(parts), loader(corpus, prefetch=True)):
        for _ in range(20):
            next(read)
        tracemalloc.start()
        for _ in range(100):
            next(read)
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert grown < 50_000


@pytest.mark.parametrize("name", ["small", "medium", "large", "7b"])
def test_a_large_config_on_this_library_names_a_real_corpus(name, capsys):
    c = train.parse_config(["--config", name])
    lines = train.real_corpus(c, 8, 640).splitlines()
    assert lines[0].startswith("data       640 epochs of stdlib are too many")
    prepare, run = (line.split() for line in lines[1:])
    assert prepare[:2] == ["python", "data.py"] and run[0] == "torchrun"
    with pytest.raises(SystemExit):
        data.main(["--help"])
    shown = capsys.readouterr().out
    assert {word for word in prepare if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", shown))
    assert float(prepare[prepare.index("--tokens") + 1]) == pytest.approx(c.steps * c.tokens_per_step, rel=0.05)
    again = train.parse_config(run[run.index("train.py") + 1:])
    assert again.data == prepare[prepare.index("--out") + 1] and again.vocab_size == c.vocab_size
    assert int(prepare[prepare.index("--vocab-size") + 1]) == c.vocab_size


def test_the_first_line_says_so(corpus, tmp_path, monkeypatch):
    """small's announcement, on a tiny model."""
    monkeypatch.setattr(data, "prepare_all", lambda *args, **kwargs: [(Fraction(1), corpus)])
    argv = ["--config", "small", "--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--vocab-size", "512",
            "--seq-len", "32", "--global-batch-size", "8", "--steps", "90000", "--device", "cpu", "--out",
            str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        said = []
        patch.setattr(train.Run, "take_step", lambda self: True)
        patch.setattr(train.Run, "save", lambda self, stopping: None)
        patch.setattr(train.parallel.World, "say", lambda self, line: said.append(line))
        assert train.main(argv) == 0
    assert re.match(r"data       \d+ epochs of stdlib are too many", said[0]), said
