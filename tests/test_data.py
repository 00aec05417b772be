import io
import itertools
import json
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import POOL, slices

import data

# ---- tokenizer


CORNERS = ["", " ", "  ", "\n", "\r\n", "\t", "\0", "a\0b", " lead", "trail ", "a  b   c", "\r", "\x0b\x0c",
           "\u2028\u2029", "\u2581", "a\u2581 \u2581\u2581b", "\u2585", "\u2047", "<s>", "</s><pad><unk>", "<0x41>",
           "\ufeffx", "\ufffd", "e\u0301", "\u00e9", "\U0001F469\u200d\U0001F469\u200d\U0001F467", "\ud800",
           "\ud83d\ude00", "\udc00\ud800", "ﬁ①Å", "def f(x):\n\treturn {x!r}\n", "x" * 10000, " " * 5000,
           "\x7f\x80\x9f\xa0\xad"]


@pytest.mark.parametrize("text", CORNERS, ids=range(len(CORNERS)))
def test_corner_strings_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("count", [1500, pytest.param(20000, marks=pytest.mark.slow)])
def test_random_strings_survive(tokenizer, count):
    rng = random.Random(1)
    common = list(" \t\n\r\0\u2581\u2585abcdefg()<>0x_\u0301\u200d") + CORNERS
    for _ in range(count):
        anything = [chr(rng.randrange(0x110000)) for _ in range(8)]
        text = "".join(rng.choices(rng.choice([common, anything, common + anything]), k=rng.randrange(30)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, repr(text)
        assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8", "surrogatepass")), repr(text)
        assert not {0, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids), repr(text)


def test_decoding_what_no_text_encodes_to(tokenizer):
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.byte_ids[0xFF], tokenizer.eos_id]) == "\ufffd"
    assert tokenizer.decode([]) == ""


def test_a_wide_alphabet_and_a_short_text_both_train():
    wide = data.Tokenizer.train(["".join(chr(0x4E00 + i) for i in range(3000)) * 3], 512)
    assert wide.vocab_size <= 512 and wide.decode(wide.encode("\u4e00\u5000\u9fa5")) == "\u4e00\u5000\u9fa5"
    short = data.Tokenizer.train(["hello world\n"], 4096)
    assert 260 < short.vocab_size < 400 and short.decode(short.encode("hello")) == "hello"
    with pytest.raises(data.DataError, match="vocab_size must be at least 320"):
        data.Tokenizer.train(["text"], 100)
    with pytest.raises(data.DataError, match="some text"):
        data.Tokenizer.train([], 512)


def test_a_foreign_tokenizer_file_is_named(tmp_path):
    (tmp_path / "x.model").write_bytes(b"\x00garbage" * 10)
    with pytest.raises(data.DataError, match="x.model: not a readable SentencePiece model"):
        data.Tokenizer(tmp_path / "x.model")


def test_the_tokenizer_is_byte_pair_encoding_as_on_the_board(tokenizer, corpus):
    assert data.bpe_train("aaabdaaabac", 3) == ["aa", "aaa", "aaab"]
    assert data.bpe_encode("aaabdaaabac", ["aa", "aaa", "aaab"]) == ["aaab", "d", "aaab", "a", "c"]
    learned = [tokenizer.piece(i) for i in range(263, tokenizer.vocab_size)]
    merged, alphabet = [piece for piece in learned if len(piece) > 1], {piece for piece in learned if len(piece) == 1}
    text = "".join(data.Loader(corpus, micro_batch_size=1, seq_len=64).text(60).decode("utf-8", "replace"))
    lines = [line for line in text.splitlines() if set(line.replace(" ", "\u2581")) <= alphabet]
    assert len(lines) > 100 and len(merged) > 100
    for line in lines:
        pieces = [tokenizer.piece(i) for i in tokenizer.encode(line)]
        assert data.bpe_encode(line.replace(" ", "\u2581"), merged) == pieces
    # and learning: the same pieces as SentencePiece's, but for ties
    text = "".join(text.split())[:8000]
    model = io.BytesIO()
    data.sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text[:4000], text[4000:]]), model_writer=model, model_type="bpe",
        vocab_size=len(set(text)) + 31, normalization_rule_name="identity", add_dummy_prefix=False,
        character_coverage=1.0, split_by_unicode_script=False, split_by_number=False, split_by_whitespace=False,
        bos_id=-1, eos_id=-1, minloglevel=2)
    sp = data.sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert len({sp.id_to_piece(i) for i in range(1, 31)} & set(data.bpe_train(text, 30))) >= 27


# ---- prepare


def write_corpus(folder: Path, n=60) -> Path:
    folder.mkdir()
    rng = random.Random(2)
    for i in range(n):
        words = rng.choices("the quick brown fox jumps over a lazy dog and runs home".split(), k=80)
        (folder / f"{i:03d}.txt").write_text(f"{i} " + " ".join(words) + "\r\nend\n", newline="")
    return folder


def texts(folder: Path, split: str) -> list[str]:
    manifest = data.read_sealed(folder / "manifest.json", "tokens")
    t = data.Tokenizer(folder / "tokenizer.model")
    ids = np.concatenate([data.open_shard(folder / s["file"]) for s in manifest["splits"][split]["shards"]]
                         or [np.array([], int)])
    assert len(ids) == manifest["splits"][split]["tokens"]
    return [t.decode(d) for d in np.split(ids, (ids == t.bos_id).nonzero()[0][1:])] if len(ids) else []


def test_where_no_mark_begins_a_document_the_one_that_ends_the_last_does(tmp_path, monkeypatch):
    """GPT-2's tokenizer has one mark for both: it stands between documents once, and what follows it is predicted."""
    assert data.first_id(SimpleNamespace(bos_id=None, eos_id=7)) == 7
    assert data.first_id(SimpleNamespace(bos_id=0, eos_id=7)) == 0
    monkeypatch.setattr(data, "first_id", lambda tokenizer: tokenizer.eos_id)
    for i in range(6):                                      # each is larger than a tenth, so its end is held out
        (tmp_path / f"{i}.txt").write_text(f"document {i} and some of its words\n" * 20)
    loader = data.Loader(data.prepare([tmp_path], tmp_path / "out", 320), micro_batch_size=1, seq_len=64)
    (ids,), t = loader.shards, loader.tokenizer
    assert ids[0] == t.eos_id and (ids == t.eos_id).sum() == 6 and not (ids == t.bos_id).any() and ids[-1] != t.eos_id
    for place in range(loader.num_windows):
        batch = loader.batch([place])
        assert (batch["targets"] >= 0).all()
        assert torch.equal(batch["documents"], (batch["tokens"] == t.eos_id).cumsum(1))


def test_every_document_comes_out_whole_once_and_on_its_side(tmp_path):
    source = write_corpus(tmp_path / "src")
    out = data.prepare([source], tmp_path / "out", 320, val_fraction=0.2, shard_tokens=500)
    train, val = texts(out, "train"), texts(out, "val")
    originals = [f.read_bytes().decode() for f in sorted(source.iterdir())]
    assert Counter(train + val) == Counter(originals) and train and val
    assert len(list(out.glob("train-*.bin"))) > 1
    # the side depends on the document alone: half of the files, other order, other names
    (tmp_path / "half").mkdir()
    for i, text in enumerate(reversed(originals[::2])):
        (tmp_path / "half" / f"{i}.md").write_text(text, newline="")
    other = data.prepare([tmp_path / "half"], tmp_path / "out2", 320, val_fraction=0.2)
    assert set(texts(other, "val")) <= set(val) and set(texts(other, "train")) <= set(train)


def test_what_is_dropped_is_counted_and_the_manifest_says_all(tmp_path):
    source = write_corpus(tmp_path / "src", 30)
    (source / "bad.txt").write_bytes(b"abc \xff\xfe")
    (source / "copy.txt").write_bytes((source / "003.txt").read_bytes())
    (source / "empty.py").write_text(" \n")
    (source / "ignored.bin").write_bytes(b"\0\1")
    lines = [json.dumps({"text": "a line of its own"}), "{broken", json.dumps({"body": 1}), json.dumps({"text": 7}),
             json.dumps({"text": "\ud800"}), json.dumps([1])]
    (source / "lines.jsonl").write_text("\n".join(lines) + "\n")
    os.utime(source / "003.txt", (1e9, 1e9))
    for f in source.iterdir():
        os.utime(f, (1.6e9, 1.6e9))
    out = data.prepare([source], tmp_path / "out", 320)
    m = data.read_sealed(out / "manifest.json", "tokens")
    assert m["dropped"] == {"invalid UTF-8": 2, "duplicate": 1, "empty": 1, "no text field": 4}
    assert m["splits"]["train"]["documents"] + m["splits"]["val"]["documents"] == 31
    assert m["knowledge_cutoff"] == "2020-09-13" and m["files"] == 34 and m["sources"] == [str(source)]
    assert m["tokenizer"]["sha256"] == data.Tokenizer(out / "tokenizer.model").sha256
    bytes_in = sum(len(t.encode()) for s in ("train", "val") for t in texts(out, s))
    assert bytes_in == m["splits"]["train"]["bytes"] + m["splits"]["val"]["bytes"]


def test_the_end_of_a_large_document_is_held_out(tmp_path):
    text = "".join(f"line {i} of the only file, which is rather long\n" for i in range(400))
    (tmp_path / "one.txt").write_text(text)
    out = data.prepare([tmp_path / "one.txt"], tmp_path / "out", 320)
    (train,), (val,) = texts(out, "train"), texts(out, "val")
    assert train + val == text and 0.03 < len(val) / len(text) < 0.05 and train.endswith("\n")
    # without a line end anywhere, it is cut there; a note beside a book changes nothing
    endless = "something else entirely " * 400
    (tmp_path / "two.txt").write_text(endless)
    (tmp_path / "note.txt").write_text("a short note\n")
    out = data.prepare([str(tmp_path / "*.txt")], tmp_path / "out2", 320)
    train, val = texts(out, "train"), texts(out, "val")
    assert set(train + val) - {"a short note\n"} == {text[:text.index(val[0])], val[0], endless[:9120], endless[9120:]}


@pytest.mark.parametrize("count", [2, 3, 5, 10, 15, 25, 60])
def test_about_the_fraction_asked_for_is_held_out_by_bytes(count):
    """Documents whose sizes are as uneven as those of files are: the largest is a third, the next a ninth of all."""
    for seed in range(200):
        rng = random.Random(seed)
        sizes = {rng.getrandbits(64): 1 + int(1e6 / 3 ** min(i, 12) * rng.uniform(0.5, 2)) for i in range(count)}
        size = np.array([*sizes.values()])
        side = data.split_documents(np.array([*sizes], np.uint64), size, 0.05)
        assert set(side) <= {data.TRAIN, data.VAL, data.TRAIN | data.VAL} and side[size.argmax()] == 3
        share = (size[side == data.VAL].sum() + 0.05 * size[side == 3].sum()) / size.sum()
        assert 0.03 < share < 0.22, (seed, share)


def test_a_given_tokenizer_is_kept(tmp_path, tokenizer):
    source = write_corpus(tmp_path / "src", 30)
    out = data.prepare([source], tmp_path / "out", tokenizer=tokenizer)
    one = data.Loader(out, micro_batch_size=1, seq_len=16)
    assert one.tokenizer.proto == tokenizer.proto and one.vocab_size == 512
    assert sorted(texts(out, "train") + texts(out, "val")) == sorted(p.read_bytes().decode() for p in source.iterdir())
    assert data.prepare([source], out, 4096, tokenizer=tokenizer) == out           # vocab_size is the tokenizer's
    for other in (dict(), dict(tokenizer=data.Tokenizer.train(["other text\n" * 9], 400))):
        with pytest.raises(data.DataError, match="exists and was not prepared from these"):
            data.prepare([source], out, 512, **other)


def visible(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_failed_preparation_does_not_stand_in_the_way(tmp_path):
    source = write_corpus(tmp_path / "src", 8)
    for wrong in (dict(vocab_size=100), dict(val_fraction=1.0), dict(val_fraction=-0.1),
                  dict(val_fraction=float("nan"))):
        with pytest.raises(data.DataError, match=f"{next(iter(wrong))} must be"):
            data.prepare([source], tmp_path / "out", **{"vocab_size": 320} | wrong)
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "train-00000.bin").write_bytes(b"left by a killed one")
    data.prepare([source], tmp_path / "out", 320)
    assert visible(tmp_path) == ["out", "src"] and not list(tmp_path.glob(".*.tmp"))


def test_both_sides_have_text(tmp_path):
    for n in (2, 3, 7, 12):
        source = write_corpus(tmp_path / f"src{n}", n)
        for fraction in (0.001, 0.999):
            out = data.prepare([source], tmp_path / f"out{n}-{fraction}", 320, val_fraction=fraction)
            train, val = texts(out, "train"), texts(out, "val")
            assert train and val and Counter("".join(train + val)) == Counter(
                "".join(path.read_bytes().decode() for path in source.iterdir()))


def test_text_without_line_ends_trains_and_survives(tmp_path):
    (tmp_path / "line.txt").write_text("one endless line of words and more words " * 3000)
    cjk = ["".join(chr(0x4E00 + (i * j) % 97) for i in range(4000)) for j in range(2, 9)]
    (tmp_path / "cjk.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in cjk))
    out = data.prepare([str(tmp_path / "*.*")], tmp_path / "out", 400, val_fraction=0.3)
    t = data.Tokenizer(out / "tokenizer.model")
    line = (tmp_path / "line.txt").read_text()
    assert line == "".join(part for split in ("train", "val") for part in texts(out, split) if part[0] < "\x80")
    assert len(t.encode(line)) < len(line) / 2                     # it was learned from
    for size in (1, 7, 1000):
        for text in ("", "a", "ab\n\ncd\n" * 50, line[:5000]):
            parts = list(data.split_text(text, size))
            assert "".join(parts) == text and all(0 < len(p) <= size for p in parts)


def test_prepared_once_and_another_corpus_is_refused(tmp_path):
    source = write_corpus(tmp_path / "src", 8)
    out = data.prepare([source], tmp_path / "out", 320)
    before = (out / "manifest.json").stat().st_mtime_ns
    assert data.prepare([source], out, 320) == out and (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(data.DataError, match=f"{out}: exists and was not prepared from these"):
        data.prepare([source], out, 330)
    (tmp_path / "mine").mkdir()
    with pytest.raises(data.DataError, match="exists"):
        data.prepare([source], tmp_path / "mine", 320)
    assert (out / "manifest.json").stat().st_mtime_ns == before


def test_only_what_was_named_is_read(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a,b.txt").write_text("a file with a comma in its name\n" * 20)
    for hidden in (".git/config.txt", "texts/.cache.md", ".venv/lib/module.py"):
        path = tmp_path / hidden
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("hidden\n")
    for path in ("out/tiny/metrics.jsonl", "out/tiny/card.md", "out/tiny/config.json", "out/tiny/checkpoints/x.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("of a run\n")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.md").write_text("through a link\n")
    (tmp_path / "texts" / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path)                                                           # a loop ends
    monkeypatch.chdir(tmp_path)
    expected = ["texts/a,b.txt", "texts/link/c.md"]
    assert [str(p) for p in data.source_files(["."])] == expected
    assert [str(p) for p in data.source_files(["*"])] == expected
    assert {p.name for p in data.source_files(["**/*.md"])} == {"c.md"}
    assert [p.name for p in data.source_files(["texts/a,b.txt"])] == ["a,b.txt"]
    for empty in ("", " "):
        with pytest.raises(data.DataError, match="source must be a name of files, got"):
            data.source_files(["texts", empty])


def test_text_is_read_as_it_comes_and_what_is_left_out_is_named(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(
        [json.dumps({"text": "the first line\n" * 40}).encode(), b"[" * 5000 + b"]" * 5000]))
    (tmp_path / "utf16.txt").write_text("text\n" * 9, encoding="utf-16")
    (tmp_path / "latin1.txt").write_text("caf\u00e9\n" * 9, encoding="latin-1")
    said = []
    out = data.prepare([tmp_path], tmp_path / "out", 320, log=said.append)
    assert "".join(texts(out, "train") + texts(out, "val")) == "the first line\n" * 40
    assert f"left out: 2 invalid UTF-8: {tmp_path.name}/latin1.txt, {tmp_path.name}/utf16.txt" in said
    assert f"left out: 1 no text field: {tmp_path.name}/bom.jsonl" in said


@pytest.mark.parametrize("sources, message", [
    (["/no/such/place"], "/no/such/place.*matches none"), (["*.nothing"], "matches none")])
def test_bad_sources_are_one_line(tmp_path, sources, message):
    with pytest.raises(data.DataError, match=message):
        data.prepare(sources, tmp_path / "out", 320)
    assert list(tmp_path.iterdir()) == []


def test_sources_without_text_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(data.DataError, match="a.txt: sources must hold text, dropped: {'invalid UTF-8': 1}"):
        data.prepare([tmp_path / "a.txt"], tmp_path / "out", 320)
    assert visible(tmp_path) == ["a.txt"] and not list(tmp_path.glob(".*.tmp"))


def test_a_killed_preparation_leaves_nothing_that_is_trusted(tmp_path):
    source, out = write_corpus(tmp_path / "src", 400), tmp_path / "out"
    for delay in (0.0, 0.1):                         # after the temporary folder appears: somewhere in the three passes
        process = POOL.process(data.prepare, [source], out, 320)
        while not (tmp_path / ".out.tmp").exists() and process.is_alive():
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.join()
        assert not out.exists() or data.Loader(out, micro_batch_size=1, seq_len=16)
    data.prepare([source], out, 320)
    assert visible(tmp_path) == ["out", "src"] and not list(tmp_path.glob(".*.tmp"))


def test_the_default_corpus_is_this_pythons_library():
    files = data.source_files(["stdlib"])
    names = {f.name for f in files}
    assert {"os.py", "argparse.py", "typing.py"} <= names and not any("test" in f.parts for f in files)
    release, installed = (data.newest_date(sources, files) for sources in (["stdlib"], ["a copy of it"]))
    year, month, day = map(int, release.split("-"))
    assert 2022 <= year and 1 <= month <= 12 and 1 <= day <= 31 and release <= installed


def test_command_line(tmp_path, capsys):
    source = write_corpus(tmp_path / "src", 8)
    flags = ["--out", str(tmp_path / "out"), "--vocab-size", "320", "--knowledge-cutoff"]
    assert data.main([str(source), *flags, "2020-02-29"]) == 0
    assert data.read_sealed(tmp_path / "out" / "manifest.json", "tokens")["knowledge_cutoff"] == "2020-02-29"
    for argv, message in (([str(tmp_path / "absent")], "absent"),
                          ([str(source), *flags, "soon"], "knowledge_cutoff: must be YYYY-MM-DD"),
                          ([str(source), *flags, "2020-02-28"], "was not prepared from these sources and settings")):
        assert data.main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


# ---- shards


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shards_hold_what_was_written(tmp_path, dtype):
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 1001, dtype)
    data.write_shard(tmp_path / "s.bin", ids)
    back = data.open_shard(tmp_path / "s.bin")
    assert isinstance(back, np.memmap) and back.dtype == dtype and (back == ids).all()
    assert (tmp_path / "s.bin").stat().st_size == 32 + ids.nbytes


def test_every_damage_to_a_shard_is_one_line_with_its_name(tmp_path):
    path, ids = tmp_path / "s.bin", np.arange(500, dtype=np.uint16)
    data.write_shard(path, ids)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 5, 31, 32, 100, len(whole) - 1)] + [whole + b"x", b"PK\3\4" + whole]
    for i in list(range(32)) + [32, 500, len(whole) - 1]:       # one flipped bit anywhere in the header, and in the ids
        damaged.append(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1:])
    for raw in damaged:
        path.write_bytes(raw)
        with pytest.raises(data.DataError, match=r"s\.bin: ") as error:
            data.open_shard(path)
        assert "\n" not in str(error.value)
    data.write_shard(path, ids[:0])
    with pytest.raises(data.DataError, match="holds no tokens"):
        data.open_shard(path)
    with pytest.raises(data.DataError, match="absent.bin: cannot be read"):
        data.open_shard(tmp_path / "absent.bin")


# ---- loader


def test_permute_is_a_bijection_that_depends_on_the_key():
    for n in list(range(1, 70)) + [255, 256, 257, 1000, 4097]:
        assert sorted(data.permute(np.arange(n), n, key=n)) == list(range(n))
    a, b = (data.permute(np.arange(5000), 5000, key=k) for k in (1, 2))
    assert (a == b).mean() < 0.01 and (a == np.arange(5000)).mean() < 0.01
    # places look uniform: correlation of order and image, and of neighbours, within 4 standard errors
    for x, y in ((np.arange(5000), a), (a[:-1], a[1:]), (a, b)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / 5000**0.5
    big = data.permute(np.arange(1000) + 10**11, 10**12, key=3)
    assert len(set(big)) == 1000 and big.min() >= 0 and big.max() < 10**12


def loader(corpus, **kwargs):
    return data.Loader(corpus, **{"micro_batch_size": 4, "seq_len": 32, "seed": 5} | kwargs)


def test_an_epoch_has_every_window_once(corpus):
    one = loader(corpus)
    windows = np.concatenate([np.lib.stride_tricks.sliding_window_view(s, 33)[::32] for s in one.shards])
    for epoch in (0, 1):
        seen = one.batch(range(epoch * one.num_windows, (epoch + 1) * one.num_windows))["tokens"].numpy()
        assert Counter(map(bytes, seen.astype(np.uint16))) == Counter(map(bytes, np.ascontiguousarray(windows[:, :32])))
    first, second = one.batch(range(8))["tokens"], one.batch(range(one.num_windows, one.num_windows + 8))["tokens"]
    assert not torch.equal(first, second)


def test_the_global_batch_does_not_depend_on_the_layout(corpus):
    reference = loader(corpus, micro_batch_size=8)
    expected = [next(reference) for _ in range(5)]
    for dp, micro in ((1, 4), (2, 2), (4, 1), (2, 4), (8, 1)):
        ranks = [loader(corpus, micro_batch_size=micro, dp_rank=r, dp_size=dp) for r in range(dp)]
        for batch in expected:
            got = [next(r) for _ in range(8 // (micro * dp)) for r in ranks]
            for key in batch:
                assert torch.equal(torch.cat([g[key] for g in got]), batch[key])
    other = next(loader(corpus, micro_batch_size=8, seed=6))["tokens"]
    assert other.shape == expected[0]["tokens"].shape and not torch.equal(other, expected[0]["tokens"])


def test_targets_are_the_next_tokens_and_never_cross_a_document(corpus):
    t = data.Tokenizer(corpus / "tokenizer.model")
    one = loader(corpus, seq_len=300)
    batch = one.batch(range(one.num_windows))
    tokens, targets, documents = (batch[name] for name in ("tokens", "targets", "documents"))
    is_end = tokens == t.eos_id
    assert is_end.sum() > 20 and (targets[is_end] == data.NO_TARGET).all()
    assert torch.equal(targets[:, :-1][~is_end[:, :-1]], tokens[:, 1:][~is_end[:, :-1]])
    assert torch.equal(documents.diff() == 1, tokens[:, 1:] == t.bos_id) and not (targets == t.bos_id).any()
    assert tokens.dtype == torch.int64


def test_documents_are_counted_window_by_window(short_documents):
    batch = next(loader(short_documents, micro_batch_size=64))
    for tokens, documents in zip(batch["tokens"].tolist(), batch["documents"].tolist(), strict=True):
        assert documents == list(itertools.accumulate(int(token == 1) for token in tokens))            # <s> is 1
    assert batch["documents"].max() > 3


def test_state_is_exact_to_the_next_batch(corpus):
    one = loader(corpus, micro_batch_size=3, seq_len=512)
    for _ in range(one.num_windows // 3 + 5):                                # into the second epoch
        next(one)
    state = json.loads(json.dumps(one.state_dict()))
    two = loader(corpus, micro_batch_size=3, seq_len=512)
    two.load_state_dict(state)
    for _ in range(3):
        assert torch.equal(next(one)["tokens"], next(two)["tokens"])
    for change in ({"seed": 6}, {"seq_len": 16}):
        with pytest.raises(data.DataError, match=f"{next(iter(change))} must be"):
            loader(corpus, **{"seq_len": 512} | change).load_state_dict(state)
    with pytest.raises(data.DataError, match="fingerprint must be"):
        two.load_state_dict(state | {"fingerprint": "0"})


def test_damage_to_a_prepared_folder_is_named(corpus, tmp_path):
    with pytest.raises(data.DataError, match="nowhere/manifest.json: not a readable manifest"):
        loader("nowhere")
    folder = shutil.copytree(corpus, tmp_path / "c")
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(re.sub(r'"tokens": \d', '"tokens": 9', manifest, count=1))
    with pytest.raises(data.DataError, match="manifest.json: its checksum"):
        loader(folder)
    (folder / "manifest.json").write_text(manifest[:100])
    with pytest.raises(data.DataError, match="manifest.json: not a readable manifest"):
        loader(folder)
    (folder / "manifest.json").write_text(manifest)
    shard = folder / "train-00000.bin"
    ids = data.open_shard(shard).copy()
    for other in (ids[:-1], ids[::-1]):                                     # a whole shard, but another one
        data.write_shard(shard, other)
        with pytest.raises(data.DataError, match=r"train-00000.bin: must be the manifest's shard of \d+ tokens"):
            loader(folder)
    shard.unlink()
    with pytest.raises(data.DataError, match="train-00000.bin: cannot be read"):
        loader(folder)


def replace_val(folder, ids, times=1):
    """Make `ids` the validation shard of a prepared folder, listed `times` times."""
    manifest = data.read_sealed(folder / "manifest.json", "tokens")
    manifest["splits"]["val"]["shards"] = [data.write_shard(folder / "val-00000.bin", ids)] * times
    data.write_sealed(folder / "manifest.json", manifest)


def test_an_id_beyond_the_vocabulary_names_the_file(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "c")
    ids = data.open_shard(folder / "val-00000.bin").copy()
    ids[40] = 512
    replace_val(folder, ids)
    bad = loader(folder, split="val")
    with pytest.raises(data.DataError,
                       match=r"val-00000.bin: token ids must be below vocab_size 512, got 512 near token 32"):
        for i in range(bad.num_windows):
            bad.batch([i])


@pytest.mark.parametrize("tokens, windows", [(33, 1), (64, 1), (65, 2), (32, 0)])
def test_every_token_that_fits_is_in_a_window(corpus, tmp_path, tokens, windows):
    folder = shutil.copytree(corpus, tmp_path / "c")
    replace_val(folder, data.open_shard(folder / "val-00000.bin")[:tokens].copy(), times=2)
    assert loader(folder, split="val").num_windows == 2 * windows


def test_too_few_tokens_for_a_window(corpus):
    with pytest.raises(data.DataError, match="must fill a window of seq_len"):
        next(loader(corpus, seq_len=10**6))


# ---- checkpoints


def random_tiling(rng, box):
    """Cut a box into boxes, recursively."""
    wide = [d for d, (a, b, _) in enumerate(box) if b - a > 1]
    if not wide or rng.random() < 0.3:
        return [box]
    d = rng.choice(wide)
    a, b, size = box[d]
    cut = rng.randrange(a + 1, b)
    return [part for piece in ((a, cut, size), (cut, b, size))
            for part in random_tiling(rng, box[:d] + (piece,) + box[d + 1:])]


@pytest.mark.parametrize("seed", range(20))
def test_any_tiling_is_read_back_as_any_slice(tmp_path, seed):
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
    shape = [rng.randrange(1, 9) for _ in range(rng.randrange(0, 5))]
    full = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)
    whole = tuple((0, n, n) for n in shape)
    write = [("t", box, full[slices(box)]) for box in random_tiling(rng, whole)]
    rng.shuffle(write)
    data.write_checkpoint(tmp_path / "c", write, {"note": seed})
    reader = data.Reader(tmp_path / "c")
    reader.verify()
    assert reader.meta == {"note": seed} and torch.equal(reader.read("t"), full) and reader.read("t").dtype == dtype
    for box in random_tiling(rng, whole):
        assert torch.equal(reader.read("t", box), full[slices(box)])


def test_safetensors_is_the_oracle(tmp_path):
    torch_io = pytest.importorskip("safetensors.torch", reason="optional: pip install safetensors")
    tensors = {"a": torch.randn(3, 5), "b.c": torch.randn(7).bfloat16(), "d": torch.tensor(3.0), "e": torch.zeros(0, 4),
               "f": torch.tensor([True, False]), "g": torch.randn(4, 6).T, "h": torch.randn(5).to(torch.float8_e4m3fn)}
    data.write_safetensors(tmp_path / "ours.safetensors", tensors)
    theirs = torch_io.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, t in tensors.items():
        assert theirs[name].dtype == t.dtype and torch.equal(theirs[name].float(), t.float())
    torch_io.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs.safetensors")
    raw = (tmp_path / "theirs.safetensors").read_bytes()
    for name, (dtype, shape, start, count) in data.read_safetensors_header(tmp_path / "theirs.safetensors").items():
        back = torch.frombuffer(bytearray(raw[start:start + count]) or bytearray(1),
                                dtype=torch.uint8)[:count].view(dtype)
        assert torch.equal(back.reshape(shape).float(), tensors[name].float())


def simple_checkpoint(folder, value=1.0):
    data.write_checkpoint(folder, [("w", ((0, 4, 4), (0, 3, 3)), torch.full((4, 3), value)),
                                   ("s", (), torch.tensor(value))],
                          {"value": value} | ({"step": int(folder.name[5:])} if folder.name[:5] == "step-" else {}))
    return folder


def test_every_damage_to_a_checkpoint_is_found_and_named(tmp_path):
    folder = simple_checkpoint(tmp_path / "c")
    for file in ("rank-00000.safetensors", "manifest.json"):
        path = folder / file
        whole = path.read_bytes()
        variants = [whole[:n] for n in (0, 4, 20, len(whole) - 1)]
        variants += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:] for i in range(0, len(whole), 2)]
        for raw in variants:
            path.write_bytes(raw)
            try:
                reader = data.Reader(folder)
                reader.verify()
                # what is still accepted is what was saved: a flip in white space, say
                assert torch.equal(reader.read("w"), torch.ones(4, 3)) and reader.read("s") == 1
                assert reader.meta == {"value": 1.0}
            except data.DataError as error:
                assert file in str(error) and "\n" not in str(error)
            else:
                assert len(raw) == len(whole)
        path.write_bytes(whole)
    (folder / "rank-00000.safetensors").unlink()
    with pytest.raises(data.DataError, match="rank-00000.safetensors: damaged or missing"):
        data.Reader(folder).verify()


def test_the_newest_intact_checkpoint_is_found(tmp_path):
    for step in (1, 2, 10):
        simple_checkpoint(tmp_path / f"step-{step:08d}", step)
    assert data.newest_checkpoint(tmp_path)[0].meta["value"] == 10
    path = tmp_path / "step-00000010" / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / ".step-00000011.tmp").mkdir()                       # a save that was killed
    (tmp_path / "step-00000012").mkdir()                            # not one of ours
    reader, damaged = data.newest_checkpoint(tmp_path)
    assert reader.meta["value"] == 2 and [p.name for p in damaged] == ["step-00000012", "step-00000010"]
    assert "step-00000010" in damaged[path.parent]
    with pytest.raises(data.DataError, match="step-00000010: a checkpoint must be written to a new folder"):
        simple_checkpoint(path.parent)
    assert data.newest_checkpoint(tmp_path / "none") == (None, {})


def test_a_disk_that_fails_to_read_is_damage(tmp_path, monkeypatch):
    folder = simple_checkpoint(tmp_path / "step-00000001")
    reader, real = data.Reader(folder), open
    reader.verify()

    def failing(path, *args):
        if str(path).endswith(".safetensors"):
            raise OSError(5, "Input/output error")
        return real(path, *args)

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(data.DataError, match="rank-00000.safetensors: .* cannot be read .Input/output error"):
        reader.verify()
    assert data.newest_checkpoint(tmp_path)[0] is None


def reseal(folder, change):
    """A manifest with other content and a checksum that fits it."""
    sealed = json.loads((folder / "manifest.json").read_text())
    change(sealed["content"])
    data.write_sealed(folder / "manifest.json", sealed["content"])


@pytest.mark.parametrize("change, message", [
    (lambda m: m.pop("meta"), "KeyError: 'meta'"), (lambda m: m.update(meta=3), "TypeError"),
    (lambda m: m.update(tensors=[]), "AttributeError"), (lambda m: m["tensors"].update(w=None), "TypeError"),
    (lambda m: m["tensors"]["w"].pop("pieces"), "KeyError: 'pieces'"),
    (lambda m: m["tensors"]["w"].update(shape="4 x 3"), "box must be .start, stop, size. within shape"),
    (lambda m: m["tensors"]["w"].update(shape=[4, 4]), "box must be .start, stop, size. within shape"),
    (lambda m: m["tensors"]["w"].update(pieces=[]), r"w: its pieces must tile \[4, 3\] once, got \[\]"),
    (lambda m: m["tensors"]["w"]["pieces"].extend(m["tensors"]["w"]["pieces"]), r"once, got \[\[\[0, 4, 4\], "),
    (lambda m: m["tensors"]["w"]["pieces"][0].update(box=[[0, 2]]), "ValueError"),
    (lambda m: m["tensors"]["w"]["pieces"][0].update(box=[[0, "4", 4], [0, 3, 3]]), "TypeError")], ids=range(11))
def test_a_manifest_that_a_person_changed_is_named(tmp_path, change, message):
    folder = simple_checkpoint(tmp_path / "step-00000001")
    reseal(folder, change)
    with pytest.raises(data.DataError, match=f"step-00000001/manifest.json: .*{message}") as error:
        data.Reader(folder)
    assert "\n" not in str(error.value)
    reader, damaged = data.newest_checkpoint(tmp_path)
    assert reader is None and list(damaged) == [folder]


@pytest.mark.parametrize("change", [
    lambda m: m.pop("tokenizer"), lambda m: m.update(splits=[]), lambda m: m["splits"]["train"].update(shards=7),
    lambda m: m["tokenizer"].update(file=None), lambda m: m["splits"]["train"]["shards"][0].pop("file")], ids=range(5))
def test_a_prepared_folder_that_a_person_changed_is_named(corpus, tmp_path, change):
    folder = shutil.copytree(corpus, tmp_path / "text")
    reseal(folder, change)
    with pytest.raises(data.DataError, match="text/manifest.json: a field is missing or of another type") as error:
        loader(folder)
    assert "\n" not in str(error.value)
    (folder / "manifest.json").unlink()
    with pytest.raises(data.DataError, match="its manifest.json is missing: prepare it again"):
        data.source_files([folder])


def test_a_checkpoint_holds_the_step_of_its_name_and_copies_are_not_touched(tmp_path):
    for step in (2, 4):
        simple_checkpoint(tmp_path / f"step-{step:08d}", step)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000006")
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000004.mybackup")
    (tmp_path / ".notes.tmp").mkdir()
    (tmp_path / ".step-00000001.tmp").mkdir()                                   # a rotation that was killed
    reader, damaged = data.newest_checkpoint(tmp_path)
    assert reader.meta["value"] == 4
    assert "must hold the step of its name, got 4" in damaged[tmp_path / "step-00000006"]
    checkpoints = data.Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest().folder.name == "step-00000004"
    for folder in data.step_folders(tmp_path):
        reseal(folder, lambda m: m["meta"].update(evaluation=None))
    checkpoints.prune()
    names = {path.name.split("-00000006-")[0] for path in tmp_path.iterdir()}
    assert names == {"step-00000004", "step-00000004.mybackup", ".notes.tmp", "damaged-step"}


def test_of_old_checkpoints_the_best_and_the_marked_stay(tmp_path):
    losses = {2: 4.0, 4: 1.0, 6: 3.0, 8: 3.0, 10: 3.0}                                     # 2 is marked, 4 is the best
    for step, loss in losses.items():
        folder = simple_checkpoint(tmp_path / f"step-{step:08d}", step)
        reseal(folder, lambda m, step=step, loss=loss: m["meta"].update(
            evaluation={"step": step, "val_loss": loss}, keep=step == 2))
    data.Checkpoints(tmp_path, keep=2).prune()
    assert [int(path.name[5:]) for path in data.step_folders(tmp_path)] == [2, 4, 8, 10]


def test_a_log_that_a_person_edited_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"loss": 2}\n[1]\n7\n{"step": "x"}\n{"step": 2, "loss": 3.0}\n'
                     b'{"step": 3}\n{"st')
    data.open_metrics(path, lambda line: line["step"] <= 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": 3.0}\n'


@pytest.mark.parametrize("what", ["checkpoint", "corpus"])
def test_everything_is_on_disk_before_its_name_is(tmp_path, monkeypatch, what):
    """Each file is flushed (fsync) before the rename that makes it visible, and the folder after."""
    source = write_corpus(tmp_path / "src", 8)
    events, fsync, rename = [], os.fsync, os.rename

    def logged_fsync(descriptor):
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(old, new):
        events.append(("rename", str(old), sorted(p.name for p in Path(old).iterdir())))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    if what == "checkpoint":
        simple_checkpoint(tmp_path / "out")
    else:
        data.prepare([source], tmp_path / "out", 320)
    renamed = next(i for i, e in enumerate(events) if e[0] == "rename")
    _, temporary, files = events[renamed]
    flushed = {Path(path).name.removeprefix(".").removesuffix(".tmp") for _, path in events[:renamed]}
    assert len(files) >= 2 and set(files) <= flushed
    assert ("fsync", temporary) in events[:renamed] and ("fsync", str(tmp_path)) in events[renamed:]


@pytest.mark.parametrize("pieces, message", [
    ([("w", ((0, 2, 4),), torch.zeros(2))], r"w: its pieces must tile \[4\] once, got \[\(\(0, 2, 4\),\)\]"),
    ([("w", ((0, 3, 4),), torch.zeros(3)), ("w", ((2, 3, 4),), torch.zeros(1))], "must tile"),
    ([("w", ((0, 2, 4),), torch.zeros(2)), ("w", ((2, 4, 4),), torch.zeros(2).double())], "must all be F32"),
    ([("w", ((0, 2, 4),), torch.zeros(2)), ("w", ((2, 5, 5),), torch.zeros(3))], "w: box must be .* within shape"),
    ([("w", ((0, 2, 4),), torch.zeros(2)), ("w", ((4, 6, 4),), torch.zeros(2))], "w: box must be .* within shape"),
    ([("w", ((0, 4, 4), (0, 3, 3)), torch.zeros(3, 4))], r"w: its piece must have the shape of .*, got \[3, 4\]")])
def test_pieces_that_do_not_tile_are_refused(tmp_path, pieces, message):
    with pytest.raises(data.DataError, match=message):
        data.write_checkpoint(tmp_path / "c", pieces, {})
    assert list(tmp_path.iterdir()) == []                                              # no temporary folder either


def test_reading_what_is_not_there(tmp_path):
    reader = data.Reader(simple_checkpoint(tmp_path / "c"))
    with pytest.raises(data.DataError, match="no tensor named v"):
        reader.read("v")
    for box in (((0, 4, 5), (0, 3, 3)), ((0, 6, 4), (0, 3, 3)), ((-1, 2, 4), (0, 3, 3)), ((0, 4, 4),)):
        with pytest.raises(data.DataError, match=r"w: box must be \(start, stop, size\) within shape \[4, 3\]"):
            reader.read("w", box)


def save_quarter(rank, n, folder):
    import torch.distributed as dist
    full = torch.arange(8 * 6, dtype=torch.float32).reshape(8, 6)
    a, b = rank // 2 * 4, rank % 2 * 3
    data.write_checkpoint(folder, [("w", ((a, a + 4, 8), (b, b + 3, 6)), full[a:a + 4, b:b + 3])], {"n": n},
                          group=dist.group.WORLD)
    return data.Reader(folder).read("w", ((1, 7, 8), (rank, rank + 2, 6)))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("no number"), OSError()])
def test_a_fault_of_writing_is_never_a_success(error):
    def work():
        raise error

    with pytest.raises(data.SaveError, match=f"rank 0: {error.strerror or error or 'OSError'}"):
        data.on_all_ranks(work, None)


def test_four_ranks_write_one_checkpoint(tmp_path, run_ranks):
    full = torch.arange(48.0).reshape(8, 6)
    for rank, got in enumerate(run_ranks(save_quarter, 4, tmp_path / "c")):
        assert torch.equal(got, full[1:7, rank:rank + 2])
    assert len(list((tmp_path / "c").glob("rank-*"))) == 4 and torch.equal(data.Reader(tmp_path / "c").read("w"), full)


def tiles(shape, boxes) -> bool:
    try:
        data.check_tiling({"w": {"shape": shape, "pieces": [{"box": box} for box in boxes]}})
    except data.DataError as error:
        assert "w: its pieces must tile" in str(error)
        return False
    return True


def test_what_is_covered_twice_or_not_at_all_is_found():
    rng, outcomes = random.Random(0), set()
    for _ in range(300):
        shape = [rng.randrange(1, 6) for _ in range(rng.randrange(0, 4))]
        pieces = list(random_tiling(rng, tuple((0, n, n) for n in shape)))
        if rng.random() < 0.4:
            pieces.append(tuple((a := rng.randrange(n), rng.randrange(a + 1, n + 1), n) for n in shape))
        if rng.random() < 0.4:
            pieces.pop(rng.randrange(len(pieces)))
        count = torch.zeros(shape)
        for box in pieces:
            count[slices(box)] += 1
        assert tiles(shape, pieces) == bool((count == 1).all())
        outcomes.add(bool((count == 1).all()))
    assert outcomes == {True, False}
    # 2,000 flat shards of a matrix, as ZeRO writes them, at most 3 boxes each: not every two are compared
    box, start = ((0, 3000, 3000), (0, 7, 7)), time.process_time()
    pieces = [piece for i in range(2000) for piece, *_ in data.boxes(box, i * 21000 // 2000, (i + 1) * 21000 // 2000)]
    assert tiles([3000, 7], pieces) and not tiles([3000, 7], pieces[:-1]) and time.process_time() - start < 2


def test_a_start_reads_no_tokens_and_a_window_is_verified_when_it_is_read(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "src", 40)
    monkeypatch.setattr(data, "BLOCK", 256)
    folder = data.prepare([source], tmp_path / "out", 320)
    shard = folder / "train-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1                                                                          # in the last block
    shard.write_bytes(raw)
    read = loader(folder, seq_len=16)                                                     # says nothing yet
    blocks = len(read.unverified[0])
    bad = [w for w in range(read.num_windows) if (w * 16 + 17) * 2 > (blocks - 1) * 256]
    assert 1 <= len(bad) <= 8 and blocks > 10
    places = {int(w): i for i, w in enumerate(read.windows(range(read.num_windows)))}
    first = read.batch([places[0]])["tokens"]
    assert len(read.unverified[0]) == blocks - 1 and torch.equal(first, read.batch([places[0]])["tokens"])
    with pytest.raises(data.DataError, match=r"train-00000\.bin: its tokens do not match their checksum"):
        read.batch([places[bad[0]]])
    read.batch([i for w, i in places.items() if w not in bad])
    assert list(read.unverified[0]) == [blocks - 1]


@pytest.mark.parametrize("box", [(), ((0, 5, 5),), ((2, 5, 9), (1, 4, 6)), ((0, 3, 3), (2, 4, 4), (1, 4, 8))])
def test_a_range_of_a_box_is_few_boxes(box):
    """All ranges of a slice, in order, by at most 2 ndim - 1 boxes."""
    full = torch.arange(math.prod(n for *_, n in box)).view([n for *_, n in box])
    local = full[slices(box)].flatten()
    for lo, hi in itertools.combinations_with_replacement(range(len(local) + 1), 2):
        parts = list(data.boxes(box, lo, hi))
        assert len(parts) <= max(1, 2 * len(box) - 1)
        assert [i for _, a, b in parts for i in range(a, b)] == list(range(lo, hi))
        for part, a, b in parts:
            assert torch.equal(full[slices(part)].flatten(), local[a:b])


def test_a_folder_that_could_not_be_begun_is_removed(tmp_path, monkeypatch):
    """Interrupted before anything is in it, say."""
    def interrupted(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt), data.new_folder(tmp_path / "out", "key"):
        pass
    assert not list(tmp_path.iterdir())
