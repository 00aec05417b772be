"""Text to tokens to batches, and bytes on disk that can be trusted.

Pre-training reads text once or a few times, in random order: GPT-3 saw 300 billion tokens, Llama 2 two trillion
(arXiv:2005.14165, 2307.09288). Three facts shape this file.
- Text is bytes, models read integers. A tokenizer turns one into the other, without loss.
- A run is killed sooner or later. What is on disk must be whole or absent, and every batch a function of its number.
- What a model knows ends with its text. The newest date among the sources, the *knowledge cutoff*, travels with the
  tokens into every checkpoint.

    sources: files and folders of .txt .md .py .jsonl, plain or .gz .zst; .parquet; .bin of nanoGPT or llm.c; hf:DATASET
          -> documents -> (drop: not UTF-8, no text, exact duplicates) -> train | validation, by hash of the text
          -> tokens:  <s> document </s> <s> document </s> ...  -> shards on disk -> windows of T + 1 -> batches

    tokens     x_0 x_1 x_2 ... x_{T-1}
    targets    x_1 x_2 x_3 ... x_T                 the same window, one step later; none where x_t is </s>
    documents  of each position: how many <s> the window had so far; attention stays within equal numbers

Bits per byte: loss per token depends on the tokenizer (longer tokens are harder), so runs are compared by

    bpb = sum of nll / (ln 2 * bytes of the targets)   nll = -ln p(target); gzip and xz are measured in the same unit

Order: place i of epoch e has window permute(i, number of windows, hash of seed and e). This bijection is computed, not
stored. So step n's global batch depends on the seed and n alone, on any number of ranks. The only state is a counter.

After pre-training come files of rows: conversations (SFT), two answers to a prompt (DPO), prompts (RL). Marks tell who
speaks. A mark is an id that no text can produce, if the tokenizer has such ids. Only an answer's tokens and the </s>
after them are targets. A conversation of n ids makes n - 1 inputs and n - 1 targets: its last id is a target only.

    tokens     <s>  <|user|>  q_1  q_2  <|assistant|>  a_1  a_2   <s> ...  <pad>
    targets     -      -       -    -        a_1       a_2  </s>   -  ...    -
    documents   1      1       1    1         1         1    1     2  ...    3

On disk: tokens and checkpoints are folders, written and flushed under a temporary name. The last file, a manifest,
carries its own checksum; then the folder is renamed. A shard of tokens is a 32-byte header and raw integers:

    magic "LLMTOKEN" | version u32 | bytes per id u32 | ids u64 | CRC32 of the ids u32 | CRC32 of the header so far u32

A checkpoint is a folder: one file per writing rank in safetensors layout (8-byte length, JSON header, raw bytes) and
manifest.json: what step, what config, and for each *full* tensor its shape, dtype and pieces (file, box, CRC32). A
box is one (start, stop, size) per dimension. A reader asks for a box, not for the rank that wrote it. So any
layout can read any other's. Not torch.save: it is a pickle, and it loads a flipped bit without a word. Hugging Face
folders hold whole tensors in the same layout, and a tokenizer: models come from there and go there.

    symbol        in code             what
    V             vocab_size          ids 0 .. V-1: <unk>, <s>, </s>, <pad>, 3 roles' marks, 256 bytes, learned pieces
    T             seq_len             positions per window
    G             global_batch_size   windows per step: step n takes places n G ... n G + G - 1 of the permuted epochs

Map, in the order of the file
    the lecture          whole files - tokenizer - sides - shards - prepare - loader; chat - examples; checkpoints
                         (owned_pieces and Checkpoints are easier after zero.py)
    to be looked up      sources - mixture - rows of fine-tuning files - instructions - rewards - metrics -
                         safetensors - Hugging Face folders - demo, main

Sources: BPE (Sennrich 2016, arXiv:1508.07909), SentencePiece (Kudo 2018, arXiv:1808.06226); Feistel with cycle walking
(Black and Rogaway 2002); packing without attention across documents as in Llama 3 (arXiv:2407.21783).
Not here: filtering by quality, near-duplicates at scale, preparing on many machines: datatrove, NeMo Curator and dolma
do these. Nor which shares a mixture should have (DoReMi, arXiv:2305.10429).

run: python data.py                                            the demo
     python data.py FILES... --out FOLDER --vocab-size 4096    prepare your own text
     python data.py hf:HuggingFaceFW/fineweb-edu:sample-10BT --out data/fineweb --tokens 2.5e9 --vocab-size 50304
     python data.py instructions stdlib                        prepare data/instructions.jsonl for fine-tuning
"""

import argparse
import array
import ast
import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import numbers
import os
import re
import runpy
import shutil
import struct
import sys
import sysconfig
import time
import warnings
import zlib
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import sentencepiece
import torch

FORMAT_VERSION = 1
SUFFIXES = (".parquet", *(kind + packed for kind in (".txt", ".md", ".py", ".jsonl") for packed in ("", ".gz", ".zst")))
JSONL = tuple(suffix for suffix in SUFFIXES if ".jsonl" in suffix)
TEXT_BYTES = 2**24                   # a larger file of text is cut into documents of this size
PART_BYTES = 2**25                   # a stream from the network is written to disk in parts of this size
LARGE_BYTES = 2**25                  # from so much text on, preparing says first how long it takes
NO_TARGET = -1                       # in targets: nothing to predict here
ROLES = ("system", "user", "assistant")


class DataError(ValueError):
    """Bad sources, shards or checkpoints: one line that names the file, the rule and the value."""


class SaveError(DataError):
    """The disk did not take a checkpoint; those that were there are intact."""


def need(fact, rule: str, *value):
    """DataError unless fact: the rule and, where it helps, the value that breaks it."""
    if not fact:
        raise DataError(rule + "".join(f", got {x!r:.80}" for x in value))


@contextlib.contextmanager
def name_in_errors(path, rule: str, hint: str = ""):
    """What is raised inside becomes the DataError "PATH: RULE (why)HINT", one line. A DataError passes as it is."""
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        why = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path}: {rule} ({why:.200}){hint}") from None


# ---- files that are whole or absent ----------------------------------------------------------------------------------

def fsync_folder(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path, wait: bool = True):
    """Hold a lock file; however the process ends, the system lets go of it. BlockingIOError if held and not wait."""
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def write_atomic(path, content: str | bytes):
    """A file with this content, or the file that was there before: a temporary name, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


@contextlib.contextmanager
def new_folder(out: Path, key: str = ""):
    """Yields a temporary folder. When the caller has filled the folder, it becomes `out`. Its progress/ says what is
    whole so far: the parts of a stream, and shards.json, the list of whole shards. After an error the folder is removed
    if progress/ has neither. Else, and after a kill, the next call with the same key goes on; "" always starts anew."""
    temporary = out.with_name(f".{out.name}.tmp")
    progress = temporary / "progress"
    try:
        if not key or not (progress / "key").exists() or (progress / "key").read_text() != key:
            shutil.rmtree(temporary, ignore_errors=True)
            progress.mkdir(parents=True)
            write_atomic(progress / "key", key)
        yield temporary
    except BaseException:
        if not [*progress.glob("*.gz"), *progress.glob("shards.json")]:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(progress)
    os.rename(temporary, out)
    fsync_folder(out.parent)


def write_sealed(path, content: dict):
    """Write a JSON object with its own checksum, atomically."""
    body = json.dumps(content, indent=1, sort_keys=True)
    write_atomic(path, json.dumps({"crc32": zlib.crc32(body.encode()), "content": content}, indent=1, sort_keys=True))


def read_sealed(path, kind: str) -> dict:
    """The content that write_sealed wrote, or DataError naming the file."""
    with name_in_errors(path, "not a readable manifest"):
        sealed = json.loads(Path(path).read_text())
        content = sealed["content"]
        intact = zlib.crc32(json.dumps(content, indent=1, sort_keys=True).encode()) == sealed["crc32"]
    need(intact and isinstance(content, dict), f"{path}: its checksum does not match its content")
    found = content.get("kind"), content.get("version")
    need(found == (kind, FORMAT_VERSION), f"{path}: must be a {kind} manifest of version {FORMAT_VERSION}", found)
    return content


# ---- tokenizer -------------------------------------------------------------------------------------------------------
#
# Byte-pair encoding in its shortest form (Sennrich 2016): a piece is learned by joining the two parts that stand side
# by side most often, again and again. Tokenizer below does the same with SentencePiece, for gigabytes.

def join(parts: list[str], piece: str) -> list[str]:
    """Every two neighbours that make up the piece become one, from left to right."""
    joined = []
    for part in parts:
        if joined and joined[-1] + part == piece:
            joined[-1] = piece
        else:
            joined.append(part)
    return joined


def bpe_train(text: str, num_pieces: int) -> list[str]:
    """The first pieces that BPE learns from a text, in their order; fewer if the text has no more. (A pair counts by
    its joined text: a + aa and aa + a both count for aaa, as in SentencePiece.)

    >>> bpe_train("aaabdaaabac", 3)
    ['aa', 'aaa', 'aaab']
    """
    parts, pieces = list(text), []
    while len(parts) > 1 and len(pieces) < num_pieces:
        pairs = Counter(a + b for a, b in itertools.pairwise(parts))
        pieces.append(max(pairs, key=pairs.get))
        parts = join(parts, pieces[-1])
    return pieces


def bpe_encode(text: str, pieces: list[str]) -> list[str]:
    """A text as pieces: what was learned first is joined first.

    >>> bpe_encode("aaabdaaabac", ['aa', 'aaa', 'aaab'])
    ['aaab', 'd', 'aaab', 'a', 'c']
    """
    rank, parts = {piece: i for i, piece in enumerate(pieces)}, list(text)
    while known := [a + b for a, b in itertools.pairwise(parts) if a + b in rank]:
        parts = join(parts, min(known, key=rank.get))
    return parts


class Tokenizer:
    """SentencePiece BPE with byte fallback: decode(encode(s)) == s for every str, lone surrogates included.

    Tokenizer(path or bytes) loads. Attributes: vocab_size; bos_id, eos_id, pad_id (None: no such mark); sha256; bytes,
    the text behind each id, b"" for a mark; token_bytes (V,) int64: its length.

    >>> [t.piece(i) for i in t.encode("def f(x):")]
    ['def', '▁f', '(', 'x', '):']
    """

    # both go as single bytes: U+2581, SentencePiece's own mark for a space, and surrogates (half characters of UTF-16)
    AS_BYTES = re.compile("([\u2581\ud800-\udfff])")
    # SentencePiece encodes short texts twice as fast as a long one. So SHORT cuts, every 100 characters or more, before
    # a space that follows a character other than a space. No piece of ours holds such a place: no id changes
    SHORT = re.compile(r"(?s).{100,}?(?=(?<! ) |\Z)|.+\Z")

    def __init__(self, model):
        with name_in_errors("tokenizer" if isinstance(model, bytes) else model, "not a readable SentencePiece model"):
            self.proto = model if isinstance(model, bytes) else Path(model).read_bytes()
            self.sp = sp = sentencepiece.SentencePieceProcessor()
            sp.LoadFromSerializedProto(self.proto)
        self.sha256, self.vocab_size = hashlib.sha256(self.proto).hexdigest(), sp.get_piece_size()
        self.bos_id, self.eos_id, self.pad_id = (None if i < 0 else i for i in (sp.bos_id(), sp.eos_id(), sp.pad_id()))
        self.piece = sp.id_to_piece
        pieces = [self.piece(i) for i in range(self.vocab_size)]
        self.bytes = [b"" if sp.is_control(i) or sp.is_unknown(i) else
                      bytes.fromhex(piece[3:5]) if sp.is_byte(i) else piece.replace("\u2581", " ").encode()
                      for i, piece in enumerate(pieces)]
        self.byte_ids = [sp.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        self.token_bytes = np.array([len(b) for b in self.bytes])
        self.can_cut = not any("\u2581" in piece.lstrip("\u2581") for piece in pieces)

    def special_id(self, text: str) -> int | None:
        """The id of a mark, <|user|> say, by its text; None if there is none. No text encodes to a mark's id."""
        i = self.sp.piece_to_id(text)
        return i if self.sp.is_control(i) else None

    def save(self, folder) -> str:
        """Write the tokenizer into a folder; returns the file's name."""
        write_atomic(Path(folder) / "tokenizer.model", self.proto)
        return "tokenizer.model"

    @classmethod
    def train(cls, documents, vocab_size: int) -> "Tokenizer":
        """Learn merges from an iterable of str. Fewer pieces than asked for come back when the text has no more."""
        need(vocab_size >= 320, "vocab_size must be at least 320 (7 marks, 256 bytes, some pieces)", vocab_size)
        documents = list(documents)
        characters = Counter(itertools.chain.from_iterable(documents))
        # rare characters stay bytes: the alphabet takes at most half of what is left after the marks and the bytes
        alphabet = {c for c, _ in characters.most_common((vocab_size - 263) // 2)} - {"\u2581"}
        rare = dict.fromkeys(map(ord, characters.keys() - alphabet))
        sentences = [s for d in documents for s in split_text(d.translate(rare), 1000)]
        need(sentences, "tokenizer: the documents must hold some text, they hold none")
        model = io.BytesIO()
        with name_in_errors("tokenizer", "SentencePiece refused"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
                character_coverage=1.0, max_sentence_length=8192, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
                control_symbols=[f"<|{role}|>" for role in ROLES], minloglevel=2)
        return cls(model.getvalue())

    def encode(self, text: str) -> list[int]:
        ids = []
        for i, part in enumerate(self.AS_BYTES.split(text)):
            if i % 2:                                             # re.split: each second part is what AS_BYTES matched
                ids += (self.byte_ids[b] for b in part.encode("utf-8", "surrogatepass"))
            elif len(part) <= 200 or not self.can_cut:
                ids += self.sp.encode(part)
            else:
                ids += itertools.chain.from_iterable(self.sp.encode(self.SHORT.findall(part)))
        return ids

    def encode_batch(self, texts) -> list[list[int]]:
        """encode() of each text, on all cores: SentencePiece encodes a list in threads."""
        cut = [[] if self.AS_BYTES.search(text) or not self.can_cut else self.SHORT.findall(text) for text in texts]
        ids = iter(self.sp.encode([part for parts in cut for part in parts]))
        return [[i for part in itertools.islice(ids, len(parts)) for i in part] if parts else self.encode(text)
                for text, parts in zip(texts, cut, strict=True)]

    def decode(self, ids) -> str:
        """The text behind ids; marks give nothing; bytes that are no UTF-8 (a model may write them) give U+FFFD."""
        raw = b"".join(self.bytes[i] for i in ids)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")


def split_text(text: str, size: int):
    """Cut a text into parts of at most `size` characters, at line ends where there are any: joined, the same text."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def first_id(tokenizer) -> int:
    """The id that begins a document: <s>; in families without one, GPT-2's say, the mark that ends the one before."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


# ---- sides: which text is trained on, which is held out --------------------------------------------------------------

TRAIN, VAL, SAMPLE = 1, 2, 4         # bits: the side of a document, both if it is cut; whether the tokenizer reads it


def text_hash(text) -> int:
    """A str's, or ids', 8-byte hash."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text.tobytes()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def held_out(hashes: np.ndarray, val_fraction: float, neither_empty: bool = True) -> np.ndarray:
    """Hashes of texts, (n,) uint64 -> which texts are held out, (n,) bool. Each hash decides for itself, whatever other
    texts there are. neither_empty: if training or validation would get no text, one text is moved there. (A single text
    is for training. With val_fraction 0 validation stays empty.)"""
    need(0 <= val_fraction < 1, "val_fraction must be in [0, 1)", val_fraction)
    val = hashes % np.uint64(10**6) < val_fraction * 10**6
    if neither_empty and len(val):
        if not val.any() and val_fraction > 0:
            val[hashes.argmin()] = True
        if val.all():
            val[hashes.argmax()] = False
    return val


def split_documents(hashes: np.ndarray, sizes: np.ndarray, val_fraction: float) -> np.ndarray:
    """Hashes and bytes of documents that differ, (n,) -> the side of each, (n,) uint8. About val_fraction of the bytes
    is held out. A document that is twice as large as that is cut: its end is held out. Each of the others is on the
    side that its own hash says."""
    cut = (sizes > 2 * val_fraction * sizes.sum()) & (val_fraction > 0)
    val = held_out(hashes, val_fraction, neither_empty=not cut.any())       # of a document that is cut both have a part
    return (TRAIN * (~val | cut) + VAL * (val | cut)).astype(np.uint8)


# ---- shards ----------------------------------------------------------------------------------------------------------

MAGIC, HEADER = b"LLMTOKEN", struct.Struct("<8sIIQII")        # 32 bytes
BLOCK = 2**20                                                 # bytes that have a checksum of their own in the manifest


def write_shard(path: Path, ids: np.ndarray) -> dict:
    """Write ids (n,) uint16 or uint32 as a shard -> what the manifest says of it."""
    ids, size = np.ascontiguousarray(ids, ids.dtype.newbyteorder("<")), BLOCK // ids.itemsize
    head = HEADER.pack(MAGIC, FORMAT_VERSION, ids.itemsize, len(ids), crc := zlib.crc32(ids), 0)[:28]
    write_atomic(path, b"".join([head, struct.pack("<I", zlib.crc32(head)), ids]))
    blocks = [zlib.crc32(ids[start:start + size]) for start in range(0, len(ids), size)]
    return {"file": path.name, "tokens": len(ids), "crc32": crc, "blocks": blocks}


def open_shard(path, verify: bool = True, entry: dict | None = None) -> np.ndarray:
    """Memory-mapped ids (n,) of a shard. Raises DataError naming the file if it is not exactly what was written, or not
    the one of the manifest's entry. verify reads it all once (a second per GB); else header and length are checked."""
    with name_in_errors(path, "cannot be read"):
        raw = np.memmap(path, np.uint8, mode="r")
        magic, version, itemsize, count, crc, head_crc = HEADER.unpack(raw[:HEADER.size])
    need(magic == MAGIC and version == FORMAT_VERSION and itemsize in (2, 4) and zlib.crc32(raw[:28]) == head_crc,
         f"{path}: must begin with the header of a token shard of version {FORMAT_VERSION}", bytes(raw[:12]))
    need(count, f"{path}: holds no tokens")
    if entry is not None:
        need((count, crc) == (entry["tokens"], entry["crc32"]), f"{path}: must be the manifest's shard of "
             f"{entry['tokens']} tokens and CRC32 {entry['crc32']}", (count, crc))
    size = HEADER.size + count * itemsize
    need(len(raw) == size, f"{path}: must have {size} bytes for {count} tokens", len(raw))
    need(not verify or zlib.crc32(raw[HEADER.size:]) == crc, f"{path}: its tokens do not match their checksum")
    return raw[HEADER.size:].view(f"<u{itemsize}")


# ---- prepare ---------------------------------------------------------------------------------------------------------
#
# A large corpus is read document by document. In memory are some 60 bytes per document, the tokenizer's sample, and a
# shard, three times while it is written:
#     1. estimate      how large it is, how long it will take                     from the first 2 MB
#     2. write_down    a stream, hf:, comes once, so it becomes files
#     3. survey        hash and size of each document; duplicates, sides and the tokenizer's sample follow
#     4. Tokenizer.train on the sample
#     5. write_shards  text to tokens on all cores, shard by shard

def prepare(sources=("stdlib",), out=None, vocab_size: int = 2048, *, val_fraction: float = 0.05,
            sample_bytes: int = 0, shard_tokens: int = 2**25, tokenizer=None, text_field: str = "text",
            max_tokens: int = 0, knowledge_cutoff: str = "", log=lambda line: None) -> Path:
    """Text to a folder of tokenizer, train-*.bin, val-*.bin and manifest.json -> the folder. Raises DataError.

    sources: ["stdlib"], or names of files, folders, globs (SUFFIXES, and token files), or hf:DATASET[:SUBSET][:SPLIT].
    out: default data/NAME-KEY, KEY a hash of the settings and of the files' names, sizes and times. A folder prepared
    with the same KEY is used as it is; any other is refused. After a kill, the same call goes on with what is whole.
    sample_bytes: of text, to train a tokenizer on (0: 8 MB per 2048 pieces, 8 MB at least).
    tokenizer: used, and saved, instead of training one of vocab_size (a model that goes on training keeps its own).
    max_tokens: stop after so many for training (0: all). knowledge_cutoff: YYYY-MM-DD ("": see newest_date).
    """
    if knowledge_cutoff:
        with name_in_errors("knowledge_cutoff", "must be YYYY-MM-DD"):
            datetime.date.fromisoformat(knowledge_cutoff)
    streams = [s for s in map(str, sources) if s.startswith("hf:")]
    files = source_files([s for s in sources if str(s) not in streams])
    sample_bytes = sample_bytes or 8_000_000 * max(2048, 0 if tokenizer else vocab_size) // 2048
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files] + streams
    vocabulary = tokenizer.sha256 if tokenizer else (vocab_size, ROLES)
    settings = (FORMAT_VERSION, vocabulary, val_fraction, sample_bytes, shard_tokens, text_field, max_tokens,
                knowledge_cutoff)
    key = hashlib.sha256(repr((stamps, settings)).encode()).hexdigest()[:16]
    name = re.sub(r"\W+", "-", Path(sources[0]).stem).strip("-") or "text"
    out = Path(out) if out else Path("data") / f"{name}-{key}"

    def ready():
        if not out.exists():
            return False
        if (out / "manifest.json").exists() and read_sealed(out / "manifest.json", "tokens")["key"] == key:
            return True
        raise DataError(f"{out}: exists and was not prepared from these sources and settings; name another --out")

    if ready():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent / f".{out.name}.lock"):
        if ready():                                             # another process was faster
            return out
        with new_folder(out, key) as folder:
            most_bytes = estimate(files, streams, tokenizer, vocab_size, text_field, max_tokens, log)
            for source in streams:
                files += write_down(source, folder / "progress", text_field, most_bytes, log)
            read = functools.partial(read_documents, files, text_field, tokenizer)
            side, found = survey(read, tokenizer, val_fraction, sample_bytes, most_bytes, log)
            need(len(side), f"{sources[0]}{' ...' * (len(sources) > 1)}: sources must hold text, "
                 f"dropped: {found['dropped']}")
            if tokenizer is None and (folder / "tokenizer.model").exists():
                tokenizer = Tokenizer(folder / "tokenizer.model")
            elif tokenizer is None:
                sample = with_split(read, np.where(side & SAMPLE, side, 0), val_fraction)
                tokenizer = Tokenizer.train((text for split, text in sample if split == "train"), vocab_size)
                log(f"tokenizer: {tokenizer.vocab_size} pieces from {found['sample'] / 1e6:.1f} MB")
            tokenizer_file = tokenizer.save(folder)
            splits = write_shards(folder, tokenizer, with_split(read, side, val_fraction), found["bytes"],
                                  shard_tokens, max_tokens, log)
            content = [(split, s["file"], s["tokens"], s["crc32"]) for split in splits for s in splits[split]["shards"]]
            write_sealed(folder / "manifest.json", {
                "kind": "tokens", "version": FORMAT_VERSION, "key": key, "sources": [str(s) for s in sources],
                "files": len(files), "knowledge_cutoff": knowledge_cutoff or newest_date(sources, files),
                "dropped": found["dropped"], "splits": splits, "tokenizer": {
                    "file": tokenizer_file, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
                "fingerprint": hashlib.sha256(repr((tokenizer.sha256, content)).encode()).hexdigest()})
    return out


def size_of(document, tokenizer) -> int:
    """Bytes of text of a document: a str, or ids."""
    return len(document.encode()) if isinstance(document, str) else int(tokenizer.token_bytes[document].sum())


def survey(read, tokenizer, val_fraction: float, sample_bytes: int, most_bytes: float, log):
    """Read documents until they have most_bytes of text -> what becomes of each, (n,) uint8 of the bits TRAIN, VAL and
    SAMPLE, 0 for a duplicate; {"dropped": counts, "bytes": of text that is kept, "sample": bytes of the sample}.
    read(dropped) yields (path, document) and lists in `dropped` the files of what it leaves out: read_documents."""
    dropped, paths, hashes, sizes, total = defaultdict(list), [], array.array("Q"), array.array("Q"), 0
    for path, document in read(dropped):
        paths.append(path)
        hashes.append(text_hash(document))
        sizes.append(size_of(document, tokenizer))
        total += sizes[-1]
        if total >= most_bytes:
            break
    hashes, sizes = np.array(hashes, np.uint64), np.array(sizes, np.int64)
    _, first = np.unique(hashes, return_index=True)            # the first document of each hash, smallest hash first
    dropped["duplicate"] = [paths[i] for i in np.setdiff1d(np.arange(len(paths)), first, assume_unique=True)]
    dropped = {reason: where for reason, where in dropped.items() if where}
    for reason, where in dropped.items():
        names = ", ".join("/".join(path.parts[-2:]) for path in sorted(set(where))[:3])
        log(f"left out: {len(where):,} {reason}: {names}{', ...' * (len(set(where)) > 3)}")
    side = np.zeros(len(hashes), np.uint8)
    side[first] = split_documents(hashes[first], sizes[first], val_fraction)
    # the tokenizer reads training documents alone: those of smallest hash, which is a random sample
    order = first[(side[first] & TRAIN) > 0]
    chosen = order[:np.searchsorted(np.cumsum(sizes[order]), sample_bytes) + 1]
    side[chosen] |= SAMPLE
    return side, {"dropped": {reason: len(where) for reason, where in dropped.items()},
                  "bytes": int(sizes[first].sum()), "sample": int(sizes[chosen].sum())}


def with_split(read, side, val_fraction: float):
    """Read again -> ("train" or "val", document), in order. side: survey's bits. A document with both sides is cut."""
    for (_, document), bits in zip(read(defaultdict(list)), side, strict=False):
        if bits & TRAIN and bits & VAL:
            cut = int(len(document) * (1 - val_fraction))
            if isinstance(document, str):              # at a line end, if there is one in what would be held out
                cut = document.find("\n", cut, len(document) - 1) + 1 or cut
            yield from (part for part in (("train", document[:cut]), ("val", document[cut:])) if len(part[1]))
        elif bits:
            yield "train" if bits & TRAIN else "val", document


def encode_chunk(tokenizer, chunk) -> dict:
    """-> {split: (ids (n,), Counter of documents, bytes, tokens)}"""
    begin, arrays, counts = first_id(tokenizer), defaultdict(list), defaultdict(Counter)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    encoded = iter(tokenizer.encode_batch([document for _, document in chunk if isinstance(document, str)]))
    for split, document in chunk:
        ids = next(encoded) if isinstance(document, str) else document
        end = [tokenizer.eos_id] * (tokenizer.eos_id != begin)
        arrays[split].append(np.concatenate([np.array(part, dtype) for part in ([begin], ids, end)]))
        counts[split].update(documents=1, bytes=size_of(document, tokenizer), tokens=len(arrays[split][-1]))
    return {split: (np.concatenate(arrays[split]), counts[split]) for split in arrays}


def chunks_of(items, size: int, length=len):
    """Lists of items, each list of at least `size` in length together, but for the last."""
    chunk, total = [], 0
    for item in items:
        chunk.append(item)
        total += length(item)
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def write_shards(folder: Path, tokenizer, documents, total_bytes: int, shard_tokens: int, max_tokens: int, log) -> dict:
    """(split, document), ... -> shards, and {split: {"documents", "bytes", "tokens", "shards"}}. A shard is in memory
    until it is full. Then the shards of both splits are written, so every chunk of documents so far is on disk, and
    progress/shards.json says how many chunks that is. Called again, write_shards goes on after these chunks."""
    file, unwritten = folder / "progress" / "shards.json", {"train": [], "val": []}         # ids of the shards to come
    state = read_sealed(file, "shards") if file.exists() else {
        "kind": "shards", "version": FORMAT_VERSION, "chunks": 0,
        "splits": {split: {"documents": 0, "bytes": 0, "tokens": 0, "shards": []} for split in ("train", "val")}}
    splits, train = state["splits"], state["splits"]["train"]

    def end_shards():
        for split, arrays in unwritten.items():
            if arrays:
                path = folder / f"{split}-{len(splits[split]['shards']):05d}.bin"
                splits[split]["shards"].append(write_shard(path, np.concatenate(arrays)))
                arrays.clear()
        write_sealed(file, state)

    size = min(2**20, shard_tokens, max_tokens // 16 or 2**20)            # characters, or ids, of a chunk of documents
    started = said = time.monotonic()
    bytes_before = sum(split["bytes"] for split in splits.values())
    for chunk in itertools.islice(chunks_of(documents, size, lambda pair: len(pair[1])), state["chunks"], None):
        if max_tokens and train["tokens"] >= max_tokens:
            break
        state["chunks"] += 1
        for split, (ids, counts) in encode_chunk(tokenizer, chunk).items():
            unwritten[split].append(ids)
            for what, count in counts.items():
                splits[split][what] += count
        if any(sum(map(len, arrays)) >= shard_tokens for arrays in unwritten.values()):
            end_shards()
        if time.monotonic() > said + 10:
            said, done = time.monotonic(), sum(split["bytes"] for split in splits.values())
            part = max(done / total_bytes, train["tokens"] / (max_tokens or math.inf))
            rate = (done - bytes_before) / (said - started)
            log(f"{done / 1e6:,.0f} MB of text are tokens, {part:.1%}, {rate / 1e6:.1f} MB/s, eta "
                f"{datetime.timedelta(seconds=int((done / part - done) / max(1, rate)))}")
    end_shards()
    for name, split in splits.items():
        log(f"{name}: {split['documents']:,} documents, {split['bytes'] / 1e6:.2f} MB, {split['tokens']:,} tokens")
    return splits


# ---- loader ----------------------------------------------------------------------------------------------------------

def permute(i: np.ndarray, n: int, key: int) -> np.ndarray:
    """A keyed bijection of 0 .. n-1, evaluated at i (any shape, int64): a shuffle that is computed, in O(1) memory.
    Feistel network on 2b bits, 4^b >= n:  (upper, lower) -> (lower, upper xor f(lower, round key)), invertible whatever
    f is: lower is kept, so the same f(lower, round key) can be undone. Cycle walking: an image outside 0 .. n-1 is put
    through again until it falls inside. Since 4^b < 4 n, four tries are enough on average."""
    b = math.ceil(math.log2(max(n, 2)) / 2)
    mask = np.uint64(2**b - 1)

    def mix(x):                                                            # splitmix64's finalizer (Steele 2014)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):
        rounds = mix(np.uint64(key) + np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        x = np.array(i, np.uint64)
        walking = np.ones(x.shape, bool)
        while walking.any():
            upper, lower = x[walking] >> np.uint64(b), x[walking] & mask
            for k in rounds:
                upper, lower = lower, upper ^ (mix(lower + k) & mask)
            x[walking] = upper << np.uint64(b) | lower
            walking = x >= n
    return x.astype(np.int64)


class Batches:
    """What Loader, Examples and Mixture share: permuted order, position, state. next() gives batches without end.
    dp_rank: which of the dp_size ranks that divide each batch (data parallel: parallel.py) this one is.

    - The position counts windows of the *global* batch. Each call takes the next micro_batch_size * dp_size windows of
      the permuted epochs and gives this rank its micro_batch_size of them. So what the ranks read together does not
      depend on their number. Within an epoch each window comes once.
    - A subclass has num_windows, manifest and read(numbers of windows) -> a batch (Mixture: a batch() of its own).
    - prefetch: a thread reads the next batch meanwhile, into pinned memory where there is a GPU.
    """

    rows_together = 1                # windows that the permutation moves as one

    def __init__(self, path, *, micro_batch_size: int, seq_len: int, dp_rank: int = 0, dp_size: int = 1, seed: int = 0,
                 split: str = "train", prefetch: bool = False):
        self.path, self.split, self.seq_len, self.seed, self.position = Path(path), split, seq_len, seed, 0
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        # the thread pins for this rank's GPU, else it would open GPU 0 on every rank
        gpu = (torch.cuda.set_device, (torch.cuda.current_device(),)) if prefetch and torch.cuda.is_available() else ()
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "reader", *gpu) if prefetch else None
        self.ahead = None, None                                                # places of windows, their batch to come

    def windows(self, order) -> np.ndarray:
        """Places `order` (B,) in the endless sequence of permuted epochs -> the numbers of the windows there (B,)."""
        need(self.num_windows, f"{self.path}: its {self.split} tokens must fill a window of seq_len + 1 = "
             f"{self.seq_len + 1}", self.manifest["splits"][self.split]["tokens"])
        unit, row = np.divmod(np.asarray(order, dtype=np.int64), self.rows_together)
        num_units = self.num_windows // self.rows_together
        epoch, place = np.divmod(unit, num_units)
        window = np.empty_like(place)
        for e in np.unique(epoch):
            window[epoch == e] = permute(place[epoch == e], num_units, text_hash(f"{self.seed}/{e}"))
        return window * self.rows_together + row

    def batch(self, order):
        return self.read(self.windows(order))

    def __next__(self) -> dict:
        order = self.next_order()
        expected, batch = self.ahead
        batch = batch.result() if order == expected else self.batch(order)
        self.position += self.micro_batch_size * self.dp_size
        if self.thread:
            self.ahead = self.next_order(), self.thread.submit(self.pinned, self.next_order())
        return batch

    def next_order(self) -> range:
        first = self.position + self.dp_rank * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def pinned(self, order):
        return {name: x.pin_memory() if torch.cuda.is_available() else x for name, x in self.batch(order).items()}

    def epochs(self, position: int) -> dict:
        """{source: how many times it has been read (0.59, say)} after `position` windows."""
        return {str(self.path): position / max(1, self.num_windows)}

    def state_dict(self) -> dict:
        return {"windows": self.position, "seed": self.seed, "seq_len": self.seq_len,
                "fingerprint": self.manifest["fingerprint"]}

    def load_state_dict(self, state: dict):
        for name, mine in self.state_dict().items():
            if name != "windows" and state[name] != mine:
                raise DataError(f"{self.path}: {name} must be as when the state was saved, {state[name]}, got {mine}")
        self.position = state["windows"]


class Loader(Batches):
    """Batches from a prepared folder: dict(tokens, targets, documents), each (B, T) int64.

    Windows are numbered in the order of the text. targets are NO_TARGET after a document's end (where one mark both
    ends and begins documents, it predicts the next); documents counts the documents begun in a window.
    A start reads headers alone, however large the corpus is. A block of tokens is compared with its checksum when a
    window of it is first read. Raises DataError, naming the file, for anything that is not as it was written.
    """

    def __init__(self, path, **layout):
        super().__init__(path, **layout)
        manifest = self.path / "manifest.json"
        self.manifest = read_sealed(manifest, "tokens")
        with name_in_errors(manifest, "a field is missing or of another type"):
            about, entries = self.manifest["tokenizer"], self.manifest["splits"][self.split]["shards"]
            self.vocab_size, self.tokenizer = about["vocab_size"], load_tokenizer(self.path / about["file"])
            if self.tokenizer.sha256 != about["sha256"]:
                raise DataError(f"{self.path / about['file']}: does not match the manifest's hash")
            self.files = [self.path / entry["file"] for entry in entries]
            self.shards = [open_shard(file, False, entry) for file, entry in zip(self.files, entries, strict=True)]
            self.unverified = [dict(enumerate(entry["blocks"])) for entry in entries]
        # a window is T inputs and, one later, T targets: it shares one token with the next
        self.first = np.cumsum([0] + [(len(s) - 1) // self.seq_len for s in self.shards])  # first window of each shard
        self.num_windows = int(self.first[-1])

    def read(self, window: np.ndarray) -> dict:
        shard = np.searchsorted(self.first, window, side="right") - 1
        start = (window - self.first[shard]) * self.seq_len
        ids = np.empty((len(window), self.seq_len + 1), np.int64)
        for row, place in enumerate(zip(shard, start, strict=True)):
            ids[row] = self.read_ids(*place)
        if ids.size and ids.max() >= self.vocab_size:
            row = int(ids.max(axis=1).argmax())
            raise DataError(f"{self.files[shard[row]]}: token ids must be below vocab_size {self.vocab_size}, "
                            f"got {ids.max()} near token {start[row]}")
        tokens, targets = ids[:, :-1], ids[:, 1:].copy()
        begin = first_id(self.tokenizer)
        if begin != self.tokenizer.eos_id:
            targets[tokens == self.tokenizer.eos_id] = NO_TARGET
        documents = np.cumsum(tokens == begin, axis=1)
        return {k: torch.from_numpy(v) for k, v in (("tokens", tokens), ("targets", targets), ("documents", documents))}

    def read_ids(self, shard: int, start: int) -> np.ndarray:
        """Ids number start ... start + T of a shard: a window (T + 1,). Blocks not read before are verified."""
        ids, unverified, end = self.shards[shard], self.unverified[shard], start + self.seq_len + 1
        size = BLOCK // ids.itemsize
        for block in range(start // size, (end - 1) // size + 1):
            if (checksum := unverified.get(block)) is not None:
                if zlib.crc32(ids[block * size:(block + 1) * size].data.cast("B")) != checksum:
                    raise DataError(f"{self.files[shard]}: its tokens do not match their checksum")
                unverified.pop(block, None)                       # the thread that reads ahead may have been faster
        return ids[start:end]

    def text(self, num_windows: int) -> bytes:
        """Bytes of the targets that an evaluation of `num_windows` windows scores. It reads them in a permuted order;
        here they are in the text's order, so that gzip sees a normal text."""
        targets = self.read(np.sort(self.windows(range(num_windows))))["targets"]
        return b"".join(self.tokenizer.bytes[i] for i in targets.flatten().tolist() if i >= 0)


# ---- chat ------------------------------------------------------------------------------------------------------------

# Who speaks is told by marks. Each family of models has its own; a model that goes on training keeps those it knows.
# name: (before a turn's content, the mark that ends an answer, what follows that mark, what ends any other turn).
# <|...|> and {eos} are one special token each, the rest is text. The last needs no marks of roles: for GPT-2, say.
CHAT_FORMATS = {
    "ours":   ("<|{role}|>", "{eos}", "", ""),
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>", "\n", "<|im_end|>\n"),
    "llama3": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "", "<|eot_id|>"),
    "plain":  ("### {role}:\n", "{eos}", "\n\n", "\n\n")}
MARK = re.compile(r"(<\|\w+\|>|{eos})")


def mark_id(tokenizer, mark: str) -> int | None:
    """The id of a mark of CHAT_FORMATS; None if the tokenizer has none."""
    return tokenizer.eos_id if mark == "{eos}" else tokenizer.special_id(mark)


def chat_format(tokenizer) -> tuple[str, str, str, str]:
    """The first of CHAT_FORMATS whose marks the tokenizer has."""
    for chat in CHAT_FORMATS.values():
        marks = MARK.findall("".join(text.replace("{role}", role) for text in chat for role in ROLES))
        if all(mark_id(tokenizer, mark) is not None for mark in marks):
            return chat
    raise DataError("tokenizer: must have an end-of-text token to end an answer with, it has none")


def encode_chat(tokenizer, messages, reply: bool = False) -> tuple[list[int], list[bool]]:
    """[{"role", "content"}, ...] -> two lists of one length, (ids, is_answer). is_answer is true for what the assistant
    must produce: its content, and the mark that ends its turn. reply: add the opening of an answer that is to come."""
    opening, end, after_answer, after_other = chat_format(tokenizer)
    tokens = [] if tokenizer.bos_id is None else [(tokenizer.bos_id, False)]

    def add(text, answer=False):
        for part in filter(None, MARK.split(text)):
            ids = [mark_id(tokenizer, part)] if MARK.fullmatch(part) else tokenizer.encode(part)
            tokens.extend((i, answer) for i in ids)

    for message in messages:
        answer = message["role"] == "assistant"
        add(opening.replace("{role}", message["role"]))
        tokens += ((i, answer) for i in tokenizer.encode(message["content"]))     # by itself: no piece crosses a mark
        if answer:
            add(end, answer)
        add(after_answer if answer else after_other)
    if reply:
        add(opening.replace("{role}", "assistant"))
    return [i for i, _ in tokens], [answer for _, answer in tokens]


def end_of_turn(tokenizer) -> int:
    """The id that ends an assistant's answer."""
    return mark_id(tokenizer, chat_format(tokenizer)[1])


# ---- examples --------------------------------------------------------------------------------------------------------

def pack(lengths, size: int) -> list[list[int]]:
    """Packs items into rows of `size` places (not the file's rows) -> the items of each row. An item goes into the
    first of the newest 16 rows where it fits, or into a new row. lengths[i]: how long item i is, at most size. For dpo
    it has two lengths, and a row two sides of `size` places: chosen and rejected. Both must fit.

    >>> pack([[6], [5], [4], [3]], 10)
    [[0, 2], [1, 3]]
    """
    rows, free = [], []                                                      # free[row]: places left, on each side
    for item, length in enumerate(map(np.array, lengths)):
        newest = range(max(0, len(rows) - 16), len(rows))
        row = next((row for row in newest if (free[row] >= length).all()), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(np.full_like(length, size))
        rows[row].append(item)
        free[row] -= length
    return rows


class Examples(Batches):
    """A fine-tuning file, a .jsonl, as windows of seq_len tokens. Every line is checked first: DataError, FILE:LINE.

    sft   {"messages": [{"role", "content"}, ...]} or {"prompt", "answer"}. A window holds whole conversations, packed;
          targets are the answers' tokens, else NO_TARGET; count: how many targets a batch has.
    dpo   {"prompt", "chosen", "rejected"}. Window 2 u holds chosen answers, window 2 u + 1 the rejected ones of the
          same prompts, document by document; they come together. count: pairs; window (B,): numbers of the windows.
    rl    {"prompt"}, or a row of sft, whose last answer is not used. A batch is a list of (ids of the prompt, row).

    A prompt is a str or a list of messages. "split" says train or val; else the hash of the prompt's text decides. What
    does not fit into a window is cut at its end; a row of which no answer is left is dropped, and a prompt of rl that
    leaves less than seq_len / 4. documents: 1, 2, ... in a window, the padding last; num_documents: the largest.
    """

    def __init__(self, path, tokenizer, *, objective: str, **layout):
        super().__init__(path, **layout)
        need(objective in ("sft", "dpo", "rl"), "objective must be sft, dpo or rl", objective)
        self.objective, self.tokenizer = objective, tokenizer
        self.rows_together = 2 if objective == "dpo" else 1             # windows that keep together in any order
        with name_in_errors(path, "cannot be read"):
            content = self.path.read_bytes()
        examples, dropped = [], Counter()
        for number, line in enumerate(content.splitlines(), 1):
            try:
                if line.strip():
                    row = json.loads(line)
                    prompt, answers = conversation(row, objective)
                    if sides := self.encode(prompt, answers, dropped):
                        examples.append((row, text_hash("".join(turn["content"] for turn in prompt)), sides))
            except (ValueError, RecursionError) as error:
                rule = error if isinstance(error, DataError) else f"a row must be JSON, got {line!r:.80}"
                raise DataError(f"{path}:{number}: {rule}") from None
        hashes = np.array([*{prompt_hash for row, prompt_hash, _ in examples if "split" not in row}], np.uint64)
        val = set(hashes[held_out(hashes, 0.05)].tolist())
        self.examples = [(row, sides) for row, prompt_hash, sides in examples
                         if row.get("split", "val" if prompt_hash in val else "train") == self.split]
        need(self.examples or self.split == "val", f"{path}: must hold rows of the train split for {objective}, "
             f"it has {len(examples)} rows in all, dropped: {dict(dropped)}")
        key = hashlib.sha256(content).hexdigest(), tokenizer.sha256, objective, self.seq_len
        self.manifest = {
            "sources": [str(path)], "knowledge_cutoff": None, "dropped": dict(dropped),
            "fingerprint": hashlib.sha256(repr(key).encode()).hexdigest(),
            "splits": {self.split: {"tokens": sum(len(ids) for _, sides in self.examples for ids, _ in sides)}}}
        self.rows = pack([[len(ids) - 1 for ids, _ in sides] for _, sides in self.examples], self.seq_len)
        self.num_windows = len(self.examples) if objective == "rl" else len(self.rows) * self.rows_together
        self.num_documents = max(map(len, self.rows), default=0) + 1
        self.reference = None        # dpo: (num_windows, num_documents + 1) nll of each answer under the starting model

    def encode(self, prompt: list[dict], answers: list[str], dropped: Counter):
        """-> for every answer the ids of prompt and answer (rl: one, of the prompt) and their targets, (2, n) int32,
        n <= T + 1. A target is the id at the same place or NO_TARGET; read() shifts them. None: the row is dropped."""
        opening = [] if self.objective == "sft" else encode_chat(self.tokenizer, prompt, reply=True)[0]
        if self.objective == "rl":
            if self.seq_len - len(opening) < self.seq_len / 4:
                dropped["prompt leaves less than seq_len / 4"] += 1
                return None
            return [np.array([opening, [NO_TARGET] * len(opening)], np.int32)]
        sides, size = [], self.seq_len + 1
        for answer in answers:
            ids, is_answer = encode_chat(self.tokenizer, [*prompt, {"role": "assistant", "content": answer}])
            is_answer[:len(opening)] = [False] * len(opening)      # dpo: earlier answers are part of the prompt
            sides.append(np.array([ids, np.where(is_answer, ids, NO_TARGET)], np.int32))
        if any((targets[:size] == NO_TARGET).all() for _, targets in sides):
            dropped["answer cut to nothing"] += 1
            return None
        if any(targets.size > size for _, targets in sides):
            dropped["tail cut"] += 1                                     # counted only: the row itself stays
        return [side[:, :size] for side in sides]

    def read(self, window: np.ndarray):
        """The windows of these numbers (B,): a dict of (B, T) int64 tensors and count; for rl a list."""
        if self.objective == "rl":
            return [(sides[0][0].tolist(), row) for row, sides in (self.examples[w] for w in window)]
        pad = end_of_turn(self.tokenizer) if self.tokenizer.pad_id is None else self.tokenizer.pad_id
        tokens = np.full((len(window), self.seq_len), pad)
        targets, documents = np.full_like(tokens, NO_TARGET), np.zeros_like(tokens)
        for b, (row, side) in enumerate(zip(*np.divmod(window, self.rows_together), strict=True)):
            start = 0
            for number, item in enumerate(self.rows[row], 1):
                ids, answer = self.examples[item][1][side]
                end = start + len(ids) - 1
                tokens[b, start:end], targets[b, start:end], documents[b, start:end] = ids[:-1], answer[1:], number
                start = end
            documents[b, start:] = len(self.rows[row]) + 1
        batch = {"tokens": tokens, "targets": targets, "documents": documents}
        if self.objective == "dpo":
            batch |= {"window": window, "count": sum(len(self.rows[w // 2]) for w in window if w % 2 == 0)}
            if self.reference is not None:
                batch["reference"] = self.reference[window]
        else:
            batch["count"] = (targets != NO_TARGET).sum()
        return {name: torch.as_tensor(value) for name, value in batch.items()}


def rows_of(prompts, answers) -> dict:
    """Prompts and their answers, lists of ids -> dict(tokens, targets), (B, T) int64, one row each, as long as the
    longest needs. Targets are the answers' ids, NO_TARGET elsewhere. Padding comes last: causal attention needs no mask
    for it."""
    rows = [torch.tensor([prompt + answer, [NO_TARGET] * len(prompt) + answer])
            for prompt, answer in zip(prompts, answers, strict=True)]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {"tokens": pad([ids[:-1] for ids, _ in rows]),
            "targets": pad([targets[1:] for _, targets in rows], padding_value=NO_TARGET)}


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def piece_key(name: str, box) -> str:
    whole = all(start == 0 and stop == size for start, stop, size in box)
    return name if whole else f"{name}[{','.join(f'{start}:{stop}' for start, stop, _ in box)}]"


def on_all_ranks(work, group) -> list:
    """work() on each rank -> the results of all. An OSError on one rank is raised on all, as a SaveError."""
    try:
        everyone = [(work(), None)]
    except OSError as error:
        everyone = [(None, error.strerror or str(error) or "OSError")]
    if group is not None:
        mine, everyone = everyone[0], [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(everyone, mine, group=group)
    for rank, (_, error) in enumerate(everyone):
        if error:
            raise SaveError(f"rank {rank}: {error}")
    return [result for result, _ in everyone]


def write_checkpoint(folder, pieces, meta: dict, *, group=None):
    """Write pieces, an iterable of (name, box, tensor), and meta (JSON) as a checkpoint folder, whole or absent. Every
    rank of `group` calls it with the pieces it owns; together they must tile every tensor, which is checked. Raises
    DataError, and SaveError on all ranks where the disk failed on one."""
    folder, pieces = Path(folder), list(pieces)
    temporary = folder.with_name(f".{folder.name}.tmp")
    rank = torch.distributed.get_rank(group) if group is not None else 0
    need(not folder.exists(), f"{folder}: a checkpoint must be written to a new folder, this one exists")

    def make_folder():
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write_pieces():
        file = f"rank-{rank:05d}.safetensors"
        crcs = write_safetensors(temporary / file, {piece_key(name, box): t for name, box, t in pieces})
        return [(name, DTYPE_NAMES[t.dtype], list(t.shape),
                 {"file": file, "box": box, "crc32": crcs[piece_key(name, box)]}) for name, box, t in pieces]

    def write_manifest():
        if rank == 0:
            write_sealed(temporary / "manifest.json",
                         {"kind": "checkpoint", "version": FORMAT_VERSION, "meta": meta, "tensors": tensors})
            os.rename(temporary, folder)
            fsync_folder(folder.parent)

    try:
        tensors = {}
        on_all_ranks(make_folder, group)
        for name, dtype, shape, piece in itertools.chain(*on_all_ranks(write_pieces, group)):
            box = piece["box"]
            need(shape == [stop - start for start, stop, _ in box], f"{name}: its piece must have the shape of {box}",
                 shape)
            entry = tensors.setdefault(name, {"shape": [size for *_, size in box], "dtype": dtype, "pieces": []})
            need(dtype == entry["dtype"], f"{name}: its pieces must all be {entry['dtype']}", dtype)
            entry["pieces"].append(piece)
        check_tiling(tensors)
        on_all_ranks(write_manifest, group)
    except DataError as error:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise type(error)(f"{folder}: cannot be written, {error}") from None


def boxes(box, lo: int, hi: int):
    """Elements lo ... hi - 1 of a box, counted row by row, as at most 2 ndim - 1 boxes in their order: the rest of a
    row, whole rows, the beginning of a row. Yields (box, first element, end). Elements 3 ... 13 of a 4 x 4 box are
    element 3, rows 1 and 2 (4 ... 11), and elements 12 and 13. (ZeRO cuts a weight at any element: zero.py.)"""
    strides = [math.prod(stop - start for start, stop, _ in box[d + 1:]) for d in range(len(box))]
    if lo < hi and not box:                                                                    # a number
        yield (), lo, hi
    while lo < hi and box:
        # d: the first dimension along which a step, strides[d] elements, begins at lo and ends by hi. Take all that fit
        d = next(d for d, stride in enumerate(strides) if lo % stride == 0 and lo + stride <= hi)
        place = [start + lo // stride % (stop - start) for (start, stop, _), stride in zip(box, strides, strict=True)]
        steps = min(box[d][1] - place[d], (hi - lo) // strides[d])
        outer = [(i, i + 1, size) for i, (_, _, size) in zip(place[:d], box[:d], strict=True)]
        yield (*outer, (place[d], place[d] + steps, box[d][2]), *box[d + 1:]), lo, lo + steps * strides[d]
        lo += steps * strides[d]


def check_box(name: str, box, shape):
    if [size for _, _, size in box] != list(shape) or not all(0 <= start <= stop <= size for start, stop, size in box):
        raise DataError(f"{name}: box must be (start, stop, size) within shape {list(shape)}, got {box}")


def check_tiling(tensors: dict, where: str = ""):
    """Every tensor of a manifest is covered once by its pieces: their edges cut it into cells, each in one piece."""
    for name, entry in tensors.items():
        pieces, shape = [piece["box"] for piece in entry["pieces"]], entry["shape"]
        for box in pieces:
            check_box(where + name, box, shape)
        edges = [np.unique([0, size, *(x for box in pieces for x in box[d][:2])]) for d, size in enumerate(shape)]
        pieces_of_cell = np.zeros([len(e) - 1 for e in edges], np.int32)
        for box in pieces:
            pieces_of_cell[tuple(slice(*np.searchsorted(e, x[:2])) for e, x in zip(edges, box, strict=True))] += 1
        need((pieces_of_cell == 1).all(), f"{where}{name}: its pieces must tile {shape} once", pieces)


class Reader:
    """A checkpoint folder: meta, tensors, read(name, box). A piece's checksum is verified before anything is used."""

    def __init__(self, folder):
        self.folder, path = Path(folder), Path(folder, "manifest.json")
        manifest = read_sealed(path, "checkpoint")
        with name_in_errors(path, "a field is missing or of another type"):
            self.meta, self.tensors, self.headers = dict(manifest["meta"]), manifest["tensors"], {}
            check_tiling(self.tensors, f"{path}: ")

    def load_piece(self, name: str, piece: dict) -> torch.Tensor:
        path = self.folder / Path(piece["file"]).name
        if path not in self.headers:
            self.headers[path] = read_safetensors_header(path)
        key = piece_key(name, piece["box"])
        need(key in self.headers[path], f"{path}: must hold {key}, it does not")
        _, _, start, count = self.headers[path][key]
        raw = torch.empty(count, dtype=torch.uint8)                      # torch's allocator: aligned as before the save
        with name_in_errors(path, f"{key} cannot be read"), open(path, "rb") as f:
            f.seek(start)
            read = f.readinto(raw.numpy())
        need(read == count and zlib.crc32(raw.numpy()) == piece["crc32"], f"{path}: {key} does not match its checksum")
        return raw.view(DTYPES[self.tensors[name]["dtype"]]).reshape([stop - start for start, stop, _ in piece["box"]])

    def read(self, name: str, box=None) -> torch.Tensor:
        """The slice `box` = ((start, stop, size), ...) of a full tensor, or all of it, from whatever pieces hold it."""
        need(name in self.tensors, f"{self.folder}: holds no tensor named {name}")
        entry = self.tensors[name]
        box = tuple((0, size, size) for size in entry["shape"]) if box is None else box
        check_box(name, box, entry["shape"])
        out = torch.empty([stop - start for start, stop, _ in box], dtype=DTYPES[entry["dtype"]])

        def slices(common, whole):                              # `common` as slices of the tensor whose box is `whole`
            return tuple(slice(a - start, b - start) for (a, b), (start, _, _) in zip(common, whole, strict=True))

        for piece in entry["pieces"]:
            common = [(max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(box, piece["box"], strict=True)]
            if all(start < stop for start, stop in common):
                out[slices(common, box)] = self.load_piece(name, piece)[slices(common, piece["box"])]
        return out

    def verify(self):
        """Read every piece once. Raises DataError naming the first that is damaged."""
        for name, entry in self.tensors.items():
            for piece in entry["pieces"]:
                self.load_piece(name, piece)


def owned_pieces(optimizer):
    """(name, box, tensor) of every weight this rank owns, optimizer.owned, and of what the optimizer keeps for it:
    NAME.exp_avg, ... p is the part p.box of the weight p.full_name (model.py). Under ZeRO p holds only elements p.flat,
    (lo, hi), of that box (zero.py); they are written as boxes. A number that is equal on all ranks (NAME.step) is
    written by the rank that has the weight's first element. The weight is its float32 master (precision.py), or p
    itself in float32 (float64 stays)."""
    for p in optimizer.owned:
        lo, hi = getattr(p, "flat", (0, p.numel()))
        parts = list(boxes(p.box, lo, hi))
        state = dict(optimizer.state[p])
        weight = state.pop("master", p.to(torch.promote_types(p.dtype, torch.float32)))
        for name, value in ((p.full_name, weight), *((f"{p.full_name}.{key}", x) for key, x in state.items())):
            if value.shape == p.shape:
                for box, first, end in parts:
                    yield name, box, value.flatten()[first - lo:end - lo].view([b - a for a, b, _ in box])
            elif lo == 0 < hi and all(start == 0 for start, _, _ in p.box):
                yield name, (), value


def step_folders(folder) -> list[Path]:
    """The checkpoints' folders, step-00000400, oldest first; a copy under another name is not ours."""
    return sorted(path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def newest_checkpoint(folder, usable=lambda meta: True) -> tuple[Reader | None, dict]:
    """The newest intact checkpoint step-* under `folder` that is usable(meta), verified; and {path: what is wrong} of
    damaged newer ones."""
    damaged = {}
    for path in reversed(step_folders(folder)):
        try:
            reader = Reader(path)
            step = reader.meta.get("step")
            need(step == int(path.name[5:]), f"{path}: must hold the step of its name", step)
            if usable(reader.meta):
                reader.verify()
                return reader, damaged
        except DataError as error:
            damaged[path] = str(error)
    return None, damaged


class Checkpoints:
    """The checkpoints of a run, folders step-00000400: the newest `keep`, the best of those that were evaluated, and
    those whose meta["keep"] is true.

    group   all ranks, for what they tell each other of files; None: this process alone
    first   first(work) -> the result of work() on rank 0, on every rank (parallel.World.first)
    """

    def __init__(self, folder, keep: int = 2, *, group=None, first=lambda work: work()):
        self.folder, self.keep, self.group, self.first = Path(folder), keep, group, first

    def newest(self, usable=lambda meta: True) -> Reader | None:
        """The newest intact checkpoint that is usable(meta); all ranks agree which. Newer ones are printed and renamed.
        If none is usable: the newest intact one, which the caller must refuse. Raises DataError if all are damaged.
        Saves that were killed are removed."""
        def find():
            for stale in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(stale)
            reader, damaged = newest_checkpoint(self.folder, usable)
            if reader is None:
                reader, damaged = newest_checkpoint(self.folder)
            for line in damaged.values():
                print(f"damaged checkpoint passed over: {line}")
            if damaged and reader is None:
                raise DataError(f"out must hold an intact checkpoint to go on, {self.folder} holds only damaged ones")
            for path in (p for p in step_folders(self.folder) if p > reader.folder):
                if path not in damaged:
                    print(f"checkpoint put aside, the run goes on from an earlier one: {path}")
                kind = "damaged" if path in damaged else "unused"
                path.rename(path.with_name(f"{kind}-{path.name}-{int(time.time())}"))
            return reader and reader.folder

        path = self.first(find)
        return path and Reader(path)

    def save(self, step: int, optimizer, meta: dict):
        """Write a checkpoint, then remove older ones. meta["evaluation"]: None, or the newest {"step", "val_loss"}."""
        write_checkpoint(self.folder / f"step-{step:08d}", owned_pieces(optimizer), meta, group=self.group)
        self.first(self.prune)

    def prune(self):
        metas = {}
        for path in step_folders(self.folder):
            with contextlib.suppress(DataError):                                     # damaged since: left alone
                metas[path] = Reader(path).meta
        marked = [path for path, meta in metas.items() if meta.get("keep")]
        losses = {path: meta["evaluation"]["val_loss"] for path, meta in metas.items()
                  if meta["evaluation"] and meta["evaluation"]["step"] == meta["step"]}
        best = sorted(losses, key=losses.get)[:1]
        for path in metas.keys() - {*list(metas)[-self.keep:], *best, *marked}:
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))         # whole or, after a kill, stale

    def load(self, optimizer, reader: Reader):
        """Masters and states of what this rank updates, from the pieces that overlap it. (Weights: train.py, Model.)"""
        def read(name, p):
            parts = boxes(p.box, *getattr(p, "flat", (0, p.numel())))
            flat = [reader.read(name, box).flatten() for box, *_ in parts] or [torch.empty(0)]
            return torch.cat(flat).view(p.shape).to(p.device)

        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if "master" in optimizer.state[p]:
                optimizer.state[p]["master"].copy_(read(p.full_name, p))
            for name in reader.tensors:
                weight, _, key = name.rpartition(".")
                if weight == p.full_name:
                    is_number = reader.tensors[name]["shape"] == []                  # a number that all pieces share
                    optimizer.state[p][key] = reader.read(name).to(p.device) if is_number else read(name, p)


# ---- the lecture ends here -------------------------------------------------------------------------------------------
#
# What follows is for looking things up. Each section can be read alone.

# ---- sources: kinds of files, streams --------------------------------------------------------------------------------

def is_run(folder: Path) -> bool:
    """A folder that training wrote; its metrics and cards are no text to train on."""
    return (folder / "checkpoints").is_dir() and (folder / "config.json").exists()


def files_under(folder: Path):
    """Every file below a folder, through symbolic links too, without hidden ones and without runs."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen or is_run(Path(root)):
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in names if not name.startswith("."))


def source_files(sources) -> list[Path]:
    """Sorted files behind names of files, folders and globs. ["stdlib"]: this Python's own library, without its tests.
    Raises DataError for a name that matches no file of SUFFIXES. Token files, .bin, are read where a name or a glob
    says so, not where a folder holds some."""
    if list(sources) == ["stdlib"]:
        root = Path(sysconfig.get_path("stdlib"))
        others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        return sorted(p for p in root.rglob("*.py") if not others & set(p.relative_to(root).parts))
    files = set()
    for source in map(str, sources):
        need(source.strip(), "source must be a name of files", source)
        paths = [Path(source)] if Path(source).exists() else [
            path for path in map(Path, glob.glob(source, recursive=True)) if not is_run(path.parent)]
        found = {file for path in paths for file in (files_under(path) if path.is_dir() else [path])
                 if (file.name.endswith(SUFFIXES) or file == path and file.suffix == ".bin") and file.is_file()}
        if not found:
            prepared = (" (it holds tokens already)" if Path(source, "manifest.json").exists() else
                        " (its manifest.json is missing: prepare it again)" if list(Path(source).glob("*.bin")) else "")
            raise DataError(f"source {source!r} must match a .txt, .md, .py, .jsonl (or one of these with .gz or "
                            f".zst), .parquet or .bin file, it matches none{prepared}")
        files |= found
    return sorted(files)


def optional(module: str, package: str, what):
    """An optional package's module, or DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{what}: must be read by the package {package}: pip install {package}") from None


def raw_documents(path: Path, field: str):
    """Yield a file's documents undecoded. A .jsonl gives its lines, as bytes; a .parquet its rows, as str. Any other
    file is one document, as bytes. A file larger than TEXT_BYTES is cut into several, at line ends."""
    if path.suffix == ".parquet":
        file = optional("pyarrow.parquet", "pyarrow", path).ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise DataError(f"{path}: must have a column {field} (--text-field), it has {file.schema_arrow.names}")
        for rows in file.iter_batches(256, columns=[field]):
            yield from rows.column(0).to_pylist()
        return
    if path.suffix == ".zst":
        file = io.BufferedReader(optional("pyarrow", "pyarrow", path).input_stream(str(path), compression="zstd"))
    else:
        file = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    with file:
        if path.name.endswith(JSONL):
            yield from file
        else:
            yield file.read(TEXT_BYTES) + file.readline()
            while part := file.read(TEXT_BYTES):
                yield part + file.readline()


def token_documents(path: Path, tokenizer):
    """The documents of a token file, ids (n,) uint16 without marks. nanoGPT's is ids alone; llm.c's and
    modded-nanogpt's has 256 int32 first: 20240520, 1, how many ids. In both a document lies between two of the
    tokenizer's marks, <|endoftext|> = 50256 for GPT-2: it may begin or end with it."""
    if tokenizer is None:
        raise DataError(f"{path}: a token file needs --tokenizer, the one that its ids are of (gpt2, say)")
    head, size = np.fromfile(path, "<i4", 256), path.stat().st_size
    has_header = len(head) == 256 and (head[:2] == (20240520, 1)).all()
    if has_header and size != 1024 + 2 * int(head[2]) or size % 2 or size == 0 or head[:2].tobytes() == MAGIC:
        raise DataError(f"{path}: must be uint16 ids, alone or after llm.c's header; it has {size} bytes, {head[:3]}")
    ids = np.memmap(path, "<u2", "r", offset=1024 if has_header else 0)
    marks, start = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None], 0
    for first in range(0, len(ids), 2**24):
        part = ids[first:first + 2**24]
        if part.max() >= tokenizer.vocab_size:
            raise DataError(f"{path}: ids must be below the tokenizer's {tokenizer.vocab_size}, got {part.max()}")
        for end in (np.isin(part, marks).nonzero()[0] + first).tolist() + [len(ids)] * (first + 2**24 >= len(ids)):
            if end > start:
                yield ids[start:end]
            start = end + 1


def read_documents(files, field: str, tokenizer, dropped):
    """Yield (path, document) of all files, in order: a str, or the ids (n,) of a token file. raw_documents and
    token_documents say what a document is. dropped: a defaultdict(list) of files, by why a document was left out. Holds
    no more than a document (of .parquet 256 rows). Raises DataError for a file that cannot be read."""
    for path in files:
        with name_in_errors(path, "cannot be read"):
            if path.suffix == ".bin":
                yield from ((path, ids) for ids in token_documents(path, tokenizer))
                continue
            for raw in raw_documents(path, field):
                try:
                    text = raw if path.suffix == ".parquet" else raw.decode("utf-8-sig")    # less a byte order mark
                    if path.name.endswith(JSONL):
                        text = json.loads(text)[field] if text.strip() else ""
                    text.encode()                          # an escaped lone surrogate is no text, and no str is no text
                    reason = "" if text.strip() else "empty"
                except UnicodeError:
                    reason = "invalid UTF-8"
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    reason = f"no {field} field"
                if reason:
                    dropped[reason].append(path)
                else:
                    yield path, text


def open_stream(source: str, field: str):
    """The rows of hf:DATASET[:SUBSET][:SPLIT], an iterable of the package datasets. DATASET is a name on
    huggingface.co, or a folder. Without SPLIT it is train."""
    name, subset, split = (source.removeprefix("hf:").split(":") + ["", ""])[:3]
    datasets = optional("datasets", "datasets", source)
    rows = datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    if rows.column_names and field not in rows.column_names:
        raise DataError(f"{source}: must have a column {field} (--text-field), it has {rows.column_names}")
    return rows


def write_down(source: str, folder: Path, field: str, most_bytes: float, log) -> list[Path]:
    """A stream comes once, and preparing reads it again: so it is written down, in parts of PART_BYTES, each whole or
    absent, until there are most_bytes. Called again, it goes on after the last part. -> the parts, .jsonl.gz."""
    name = re.sub(r"\W+", "-", source)
    parts = sorted(folder.glob(f"{name}.*.jsonl.gz"))                 # NAME.DOCUMENTS.BYTES, as many as up to its end
    count, size = map(int, parts[-1].name.split(".")[1:3]) if parts else (0, 0)
    if (folder / f"{name}.end").exists() or size >= most_bytes:
        return parts
    first, started = size, time.monotonic()
    with name_in_errors(source, "cannot be read",
                        ": hf: takes a folder, or a data set on huggingface.co, which needs the network"):
        lines = (json.dumps({field: row[field]}) + "\n" for row in open_stream(source, field).skip(count))
        for part in chunks_of(lines, min(PART_BYTES, most_bytes - size)):
            count, size = count + len(part), size + sum(map(len, part))
            parts.append(folder / f"{name}.{count:012d}.{size:015d}.jsonl.gz")
            write_atomic(parts[-1], gzip.compress("".join(part).encode(), 1, mtime=0))
            log(f"{source}: {count:,} documents, {size / 1e6:,.0f} MB read, "
                f"{(size - first) / 1e6 / (time.monotonic() - started):.1f} MB/s")
            if size >= most_bytes:
                return parts
    write_atomic(folder / f"{name}.end", "")
    return parts


def newest_date(sources, files) -> str:
    """The newest date among the files, ISO format. The files of an installed Python are dated by the installation, so
    the standard library has the date of its release, which Python stamps into pydoc_data/topics.py."""
    topics = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if list(sources) == ["stdlib"] and topics in files:
        if stamp := re.search(r"Sphinx on \w+ (\w+ +\d+) [\d:]+ (\d{4})", topics.read_text()[:200]):
            return datetime.datetime.strptime(" ".join(stamp.groups()), "%b %d %Y").date().isoformat()
    newest = max(path.stat().st_mtime for path in files)
    return datetime.datetime.fromtimestamp(newest, datetime.UTC).date().isoformat()


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def estimate(files, streams, tokenizer, vocab_size: int, field: str, max_tokens: int, log) -> float:
    """Say how large and how long it will be, from the first 2 MB -> bytes of text that must do for max_tokens."""
    size = sum(p.stat().st_size * (3 if p.suffix in (".gz", ".zst", ".parquet") else 1) for p in files)    # 3: a guess
    if not max_tokens and (streams or size < LARGE_BYTES):
        return math.inf
    first, start = "", time.monotonic()
    with contextlib.suppress(Exception, SystemExit):             # what is wrong with a source is said when it is read
        texts = (t for _, t in read_documents(files, field, tokenizer, defaultdict(list)))
        rows = (row[field] for source in streams for row in open_stream(source, field))
        for text in itertools.chain(texts, rows):
            first += text[:2**21] if isinstance(text, str) else ""
            if len(first) >= 2**21:
                break
    if len(first) < 2**10:                                                                   # token files alone, say
        return math.inf
    reading, middle = time.monotonic() - start, len(first) // 2
    tokenizer = tokenizer or Tokenizer.train([first[:middle]], vocab_size)
    start = time.monotonic()
    per_token = len(first[middle:].encode()) / len(tokenizer.encode(first[middle:]))
    encoding = 2 * (time.monotonic() - start)
    size = min([size] * (not streams) + [max_tokens * per_token] * (max_tokens > 0))
    seconds = size / len(first) * (3 * reading + encoding / num_cores())        # 3: survey, sample, shards read it
    log(f"about {size / 1e6:,.0f} MB of text: {size / per_token / 1e6:,.1f} M tokens, "
        f"{size / per_token * (2 if tokenizer.vocab_size <= 2**16 else 4) / 1e6:,.0f} MB on disk, "
        f"some {math.ceil(seconds / 60)} min on {num_cores()} cores")
    # more than it takes: a tokenizer of more text has more bytes per token, and some of the text is held out
    return 1.3 * max_tokens * per_token if max_tokens else math.inf


# ---- mixture ---------------------------------------------------------------------------------------------------------

def mixture(text: str) -> list:
    """"0.7*web/,0.3*code/*.py" -> [(0.7, "web/"), (0.3, "code/*.py")], shares as Fractions whose sum is 1; [] for a
    text without shares. Raises DataError."""
    parts = [re.fullmatch(r"(\d+\.?\d*|\.\d+)\*(.+)", part) for part in text.split(",")]
    if len(parts) < 2 or not any(parts):
        return []
    need(all(parts), "every source of a mixture must have a share, SHARE*SOURCE,SHARE*SOURCE", text)
    total = sum(Fraction(part[1]) for part in parts) or Fraction(1)
    shares = [Fraction(part[1]) / total for part in parts]
    need(min(shares) >= Fraction(1, 1000), "a source's share of a mixture must be at least 1/1000", text)
    return [(share, part[2]) for share, part in zip(shares, parts, strict=True)]


def prepare_all(text: str, tokenizer=None, **settings) -> list:
    """What --data names -> [(share, prepared folder), ...]: a prepared folder, sources between commas, or a mixture of
    these. Each source of a mixture has a folder of its own, which serves other mixtures too. All have one tokenizer:
    the given one; else that of the prepared folder with the largest share; else the largest source's new one."""
    is_prepared = lambda source: Path(source, "manifest.json").exists()
    parts, folders = mixture(text) or [(Fraction(1), text)], {}
    for _, source in sorted(parts, key=lambda part: (not is_prepared(part[1]), -part[0])):
        folders[source] = Path(source) if is_prepared(source) else prepare(
            [source] if Path(source).exists() else source.split(","), tokenizer=tokenizer, **settings)
        tokenizer = tokenizer or load_tokenizer(folders[source])
    return [(share, folders[source]) for share, source in parts]


def open_loader(parts, **layout):
    """The Loader of prepare_all's only folder, or a Mixture of several."""
    return Loader(parts[0][1], **layout) if len(parts) == 1 else Mixture(parts, **layout)


class Mixture(Batches):
    """Batches of several prepared folders with one tokenizer, each its share of the windows, which all have as many
    tokens. parts: [(share, folder), ...], shares as Fractions whose sum is 1.

    - The windows come in rounds, so long (1,000 windows and more) that each share of a round is a whole number n. (At
      most 100,000: odder shares are rounded.) Window k of a source's n stands at (k + 1/2) / n of the round. So there
      is no state but the position.
    - Each source's windows come in the order of its own epochs.
    - A held-out split ends where its first source ends; sources without a window of it are left out of it.
    """

    def __init__(self, parts, **layout):
        super().__init__(max(parts, key=lambda part: part[0])[1], **layout)
        parts = [(share, Loader(folder, **layout)) for share, folder in parts]
        self.tokenizer = parts[0][1].tokenizer
        need(len({loader.tokenizer.sha256 for _, loader in parts}) == 1, "a mixture's folders must have one tokenizer "
             "(--tokenizer), these differ: " + ", ".join(str(loader.path) for _, loader in parts))
        read = [part for part in parts if part[1].num_windows or self.split == "train"] or parts
        self.loaders, total = [loader for _, loader in read], sum(share for share, _ in read)
        self.shards = [shard for loader in self.loaders for shard in loader.shards]
        ends = list(itertools.accumulate(share / total for share, _ in read))
        multiple = min(math.lcm(*(end.denominator for end in ends)), 10**5)
        self.round = math.ceil(1000 / multiple) * multiple
        self.per_round = np.diff([0, *(round(end * self.round) for end in ends)])                   # n of each source
        # of each window of a round: its source s, and its number k among the source's n
        s, k = np.array([(s, k) for s, n in enumerate(self.per_round) for k in range(n)]).T
        order = np.argsort((k + 0.5) / self.per_round[s], kind="stable")
        self.source, self.number = s[order], k[order]
        # it ends at the first position whose source has no window left
        whole = [divmod(loader.num_windows, n) for loader, n in zip(self.loaders, self.per_round, strict=True)]
        self.num_windows = int(min(rounds * self.round + np.flatnonzero(self.source == s)[rest]
                                   for s, (rounds, rest) in enumerate(whole)))
        manifests = [loader.manifest for _, loader in parts]
        self.manifest = {
            "sources": [source for m in manifests for source in m["sources"]],
            "knowledge_cutoff": max(m["knowledge_cutoff"] for m in manifests),
            "dropped": dict(sum((Counter(m["dropped"]) for m in manifests), Counter())),
            "splits": {"train": {"tokens": sum(m["splits"]["train"]["tokens"] for m in manifests)}},
            "fingerprint": hashlib.sha256(repr([(str(share), loader.manifest["fingerprint"])
                                                for share, loader in parts]).encode()).hexdigest()}

    def counts(self, position: int) -> list[int]:
        """How many windows of each source come before a position."""
        rounds, place = divmod(position, self.round)
        return (rounds * self.per_round + np.bincount(self.source[:place], minlength=len(self.loaders))).tolist()

    def batch(self, order) -> dict:
        rounds, place = np.divmod(np.asarray(order, dtype=np.int64), self.round)
        source, batch = self.source[place], {}
        number = rounds * self.per_round[source] + self.number[place]
        for s in np.unique(source):
            rows = torch.from_numpy(source == s)
            for name, x in self.loaders[s].batch(number[source == s]).items():
                batch.setdefault(name, x.new_empty(len(rows), *x.shape[1:]))[rows] = x
        return batch

    def epochs(self, position: int) -> dict:
        return {str(loader.path): n / max(1, loader.num_windows)
                for loader, n in zip(self.loaders, self.counts(position), strict=True)}

    def text(self, num_windows: int) -> bytes:
        return b"".join(loader.text(n) for loader, n in zip(self.loaders, self.counts(num_windows), strict=True))


# ---- rows of fine-tuning files ---------------------------------------------------------------------------------------

def conversation(row, objective: str) -> tuple[list[dict], list[str]]:
    """A row of a fine-tuning file -> (the messages before the answer, the answers: one for sft; chosen, rejected for
    dpo; none for rl). Raises DataError with the rule."""
    need(isinstance(row, dict), "a row must be a JSON object", row)
    need(row.get("split", "train") in ("train", "val"), 'split must be "train" or "val"', row.get("split"))
    fields = {"sft": ["answer"], "dpo": ["chosen", "rejected"], "rl": []}[objective]
    whole = "messages" in row and objective != "dpo"
    if whole:                                                 # a conversation; its last message is the answer
        turns = row["messages"]
        need(isinstance(turns, list) and turns, "messages must be a list of messages", turns)
        prompt, answers = turns[:-1], turns[-1:]
    else:
        need({"prompt", *fields} <= row.keys(), f"a row of {objective} must have "
             f"{'' if objective == 'dpo' else 'messages, or '}{', '.join(['prompt', *fields])}", list(row))
        prompt = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
        need(isinstance(prompt, list) and prompt, "prompt must be a string or a list of messages", prompt)
        answers = [{"role": "assistant", "content": row[field]} for field in fields]
    for turn in prompt + answers:
        need(isinstance(turn, dict) and {"role", "content"} <= turn.keys(), "a message must have role, content", turn)
        need(turn["role"] in ROLES, f"role must be one of {', '.join(ROLES)}", turn["role"])
        need(isinstance(turn["content"], str), "content must be a string", turn["content"])
        need(turn["role"] != "assistant" or turn["content"].strip(), "an answer must not be empty", turn["content"])
    need(all(turn["role"] == "assistant" for turn in answers), "the last message must be the assistant's", answers)
    need(whole or prompt[-1]["role"] != "assistant", "a prompt must not end with the assistant's message", prompt[-1:])
    texts = [turn["content"] for turn in answers]
    need(len(set(texts)) == len(texts), "chosen and rejected must differ", texts)
    return prompt, [] if objective == "rl" else texts


# ---- instructions ----------------------------------------------------------------------------------------------------

WRITE_DOCSTRING = "Write the docstring of this function.\n\n"
WRITE_FUNCTION = "Write a function with this docstring.\n\n"
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)


def parse_python(text: str) -> ast.Module:
    """The syntax tree of a text; raises one of NOT_PYTHON, prints no warnings."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(text)


def functions(body):
    """The functions among statements, and the methods of their classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body)


def function_rows(text: str):
    """(prompt, answer) twice for every function that has a docstring and a body: write either from the other."""
    for node in functions(parse_python(text).body):
        docstring = ast.get_docstring(node)                                    # cleaned by inspect.cleandoc
        if docstring and len(node.body) > 1:
            node.body = node.body[1:]
            function = ast.unparse(node)
            yield WRITE_DOCSTRING + function, f'"""{docstring}"""'
            yield WRITE_FUNCTION + docstring, function


def instructions(sources, out, *, val_fraction: float = 0.05, max_chars: int = 600) -> dict:
    """Instructions for fine-tuning, made from the functions of Python files -> counts of what was written and dropped.
    out: a .jsonl of rows of sft, for Examples; prompts.jsonl in the same folder has the prompts that ask for a
    function, for rewards. A row is on its document's side: documents that prepare() holds out make rows of split "val".
    A prompt is on one side alone. Rows of more than max_chars characters are dropped, so are repeated ones."""
    out, rows, prompts = Path(out), {}, {}
    need(out.name != "prompts.jsonl", f"{out}: out must have another name, prompts.jsonl is written in the same folder")
    read = functools.partial(read_documents, source_files(sources), "text", None)
    side, found = survey(read, None, val_fraction, 0, math.inf, lambda line: None)
    dropped = Counter(found["dropped"])
    documents = [(bits & TRAIN, text) for (_, text), bits in zip(read(defaultdict(list)), side, strict=True) if bits]
    for is_train, text in sorted(documents, key=lambda pair: pair[0]):                          # held-out ones first
        split = "train" if is_train else "val"
        try:
            pairs = list(function_rows(text))
        except NOT_PYTHON:
            dropped["not Python"] += 1
            continue
        for prompt, answer in pairs:
            if len(prompt) + len(answer) > max_chars:
                dropped["too long"] += 1
            elif (prompt, answer) in rows:
                dropped["duplicate row"] += 1
            elif prompts.setdefault(prompt, split) != split:                             # where it was seen first
                dropped["prompt is held out"] += 1
            else:
                rows[prompt, answer] = split
    need(rows, f"{out}: sources must hold functions with docstrings, dropped: {dict(dropped)}")
    chats = [{"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
              "split": split} for (prompt, answer), split in rows.items()]
    functions_asked = [{"prompt": p, "split": split} for p, split in prompts.items() if p.startswith(WRITE_FUNCTION)]
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((out, chats), (out.with_name("prompts.jsonl"), functions_asked)):
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in content))
    return {**Counter(rows.values()), "prompts": len(functions_asked), "dropped": dict(dropped)}


# ---- rewards ---------------------------------------------------------------------------------------------------------

def parses(row: dict, answer: str) -> float:
    """1.0 if the answer is Python and holds exactly one function at its top level, else 0.0."""
    try:
        body = parse_python(answer).body
    except NOT_PYTHON:
        return 0.0
    return float(sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in body) == 1)


def follows_format(row: dict, answer: str) -> float:
    """1.0 if the answer to a prompt of instructions() looks like what was asked for, else 0.0; nan: another prompt."""
    prompt, _ = conversation(row, "rl")
    text = prompt[-1]["content"] if prompt else ""
    if text.startswith(WRITE_DOCSTRING):
        return float(answer.startswith('"""') and answer.endswith('"""') and bool(answer.strip('"').strip()))
    return float(answer.startswith(("def ", "async def ", "@"))) if text.startswith(WRITE_FUNCTION) else math.nan


REWARDS = {"parses": parses, "format": follows_format}       # f(row of the file, answer) -> a number


@functools.cache                                             # a file of rewards is run once
def find_reward(name: str):
    """A function of REWARDS by its name, or FILE:FUNCTION from a Python file. Raises DataError."""
    if name in REWARDS:
        return REWARDS[name]
    file, _, function = name.rpartition(":")
    need(Path(file).is_file(), f"reward must be {', '.join(REWARDS)} or FILE:FUNCTION with a file that exists", name)
    with name_in_errors(file, "raised while it was loaded"):
        found = runpy.run_path(file).get(function)
    need(callable(found), f"{file}: must hold a function named {function}, it does not")
    return found


def call_reward(reward, row: dict, answer: str) -> float:
    """reward(row, answer), checked: a finite number; nan from follows_format alone. Raises DataError."""
    name = getattr(reward, "__name__", reward)
    with name_in_errors(f"reward {name}", "must give a finite number"):
        value = reward(row, answer)
    if not isinstance(value, numbers.Real) or not (math.isfinite(value) or reward is follows_format):
        raise DataError(f"reward {name}: must give a finite number, got {value!r:.80}")
    return float(value)


# ---- what a run writes and measures besides --------------------------------------------------------------------------

def open_metrics(path, keep):
    """A .jsonl of one object per line, open for the lines to come. Lines stay where keep(object) is true. (A killed run
    has lines of steps after its last checkpoint, which will be done again. The last line may be torn.)"""
    path, lines = Path(path), []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):        # torn, or edited by a person
            if keep(json.loads(line)):
                lines.append(line.decode() + "\n")
    write_atomic(path, "".join(lines))
    return open(path, "a")


def write_tables(folder, tables: dict):
    """{name: tensor} as a checkpoint folder, in the place of one that was there."""
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, [(name, [(0, size, size) for size in x.shape], x) for name, x in tables.items()], {})


def compressed_bpb(text: bytes) -> dict:
    """Bits per byte that general compressors reach on the same text: a yardstick for a language model."""
    import lzma
    return {"gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
            "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text)}


# ---- files of tensors: safetensors -----------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path, tensors: dict) -> dict:
    """{name: tensor} -> a safetensors file, flushed; returns {name: CRC32 of its bytes}."""
    header, offset, crcs = {"__metadata__": {"format": "pt"}}, 0, {}             # older transformers want the format
    for name, t in tensors.items():
        start, offset = offset, offset + t.nbytes
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, offset]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for name, t in tensors.items():
            raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            crcs[name] = zlib.crc32(raw)
            f.write(raw)
        f.flush()
        os.fsync(f.fileno())
    return crcs


def read_safetensors_header(path) -> dict:
    """{name: (dtype, shape, first byte in the file, byte count)}; DataError naming the file if it is not whole."""
    entries = {}
    with name_in_errors(path, "damaged or missing"), open(path, "rb") as f:
        size, length = os.path.getsize(path), struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(min(length, size)))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if start < 0 or 8 + length + stop > size or stop - start != math.prod(shape) * dtype.itemsize:
                raise DataError(f"{path}: {name} must lie within its {size} bytes, it says {start} to {stop}")
            entries[name] = dtype, shape, 8 + length + start, stop - start
    return entries


# ---- Hugging Face folders --------------------------------------------------------------------------------------------
#
#     config.json                    what the model is (model.py: config_from_hf, config_to_hf)
#     model.safetensors              weights under their names (model.py: hf_reader, hf_tensors); large models: shards,
#                                    and model.safetensors.index.json, in which shard each tensor is
#     tokenizer.json                 pieces, merges, what is done to a text before and after
#     tokenizer_config.json          which pieces are <s>, </s>, <pad>; the chat template

def read_json(path) -> dict:
    """The object in a JSON file; DataError naming the file."""
    with name_in_errors(path, "not readable JSON"):
        return {} | json.loads(Path(path).read_text())                                # {} |: only an object passes


class HFWeights:
    """The weights of a Hugging Face folder. get(name) -> tensor, memory-mapped: a page is read when it is used, and
    writing to the tensor does not change the file."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        index, pickled = folder / "model.safetensors.index.json", sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])
        files = ["model.safetensors"]
        if index.exists():
            files = sorted({Path(file).name for file in read_json(index).get("weight_map", {}).values()})
        elif pickled and not (folder / files[0]).exists():
            raise DataError(f"{pickled[0]}: must be model.safetensors: loading a pickle runs code that is in it; where "
                            f"you trust it, transformers' from_pretrained and save_pretrained convert it")
        self.entries = {name: (folder / file, *entry) for file in files
                        for name, entry in read_safetensors_header(folder / file).items()}

    def get(self, name: str) -> torch.Tensor:
        # saved without the head, as GPT-2 was published, a model's names lack their first part
        found = name if name in self.entries else name.partition(".")[2]
        need(found in self.entries, f"{self.folder}: must hold a tensor {name}, it does not")
        path, dtype, shape, start, count = self.entries[found]
        return torch.from_numpy(np.memmap(path, np.uint8, "c", start, (count,))).view(dtype).reshape(shape)


# byte-level BPE (GPT-2) writes each byte as one character: itself where it can be printed, else the next from U+0100 up
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


class HFTokenizer(Tokenizer):
    """A tokenizer.json, through the optional package tokenizers: the surface of Tokenizer. encode adds no special
    tokens, and text that looks like one does not become one; a lone surrogate, which is no text, is read as "?". decode
    joins the pieces' bytes: a space that Llama 2's puts before a text stays."""

    def __init__(self, path):
        tokenizers = optional("tokenizers", "tokenizers", path)
        path, content = Path(path), read_json(path)
        self.raw = path.read_bytes()
        with name_in_errors(path, "not a readable tokenizer"):
            self.hf = tokenizers.Tokenizer.from_str(self.raw.decode())
        self.hf.no_padding()
        self.hf.no_truncation()
        self.hf.encode_special_tokens = True
        self.sha256, self.vocab = hashlib.sha256(self.raw).hexdigest(), self.hf.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(self.vocab.values())
        added = content.get("added_tokens") or []
        self.piece = self.hf.id_to_token
        self.special_id = {token["content"]: token["id"] for token in added if token["special"]}.get
        kinds = set(re.findall(r'"type": "(\w+)"', json.dumps([content.get("decoder"), content.get("pre_tokenizer")])))
        need(kinds & {"ByteLevel", "ByteFallback", "Metaspace"}, f"{path}: its pieces must be bytes (byte-level BPE) "
             f"or text with U+2581 for a space, its decoder has {sorted(kinds)}")
        self.bytes = [b""] * self.vocab_size
        for piece, i in self.vocab.items():
            if "ByteLevel" in kinds and BYTE_OF.keys() >= set(piece):
                self.bytes[i] = bytes(BYTE_OF[c] for c in piece)
            elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", piece):
                self.bytes[i] = bytes.fromhex(piece[3:5])
            else:
                self.bytes[i] = piece.replace("\u2581", " ").encode()
        for token in added:
            self.bytes[token["id"]] = b"" if token["special"] else token["content"].encode()
        self.token_bytes = np.array([len(b) for b in self.bytes])
        files = [read_json(f) if (f := path.with_name(name)).exists() else {} for name in
                 ("tokenizer_config.json", "generation_config.json", "config.json")]
        self.config, template = files[0], path.with_name("chat_template.jinja")
        if template.exists():
            self.config["chat_template"] = template.read_text()
        self.bos_id, self.eos_id, self.pad_id = (self.id_of_mark(mark, files) for mark in ("bos", "eos", "pad"))

    def id_of_mark(self, mark: str, files) -> int | None:
        """The id of <s>, </s> or <pad> as the first file says that speaks of it: text, an id, or a list; else None."""
        names = (f"{mark}_token", f"{mark}_token_id")
        value = next((content[name] for content in files for name in names if name in content), None)
        value = value[0] if isinstance(value, list) and value else value
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, int) else self.vocab.get(value)

    def encode(self, text: str) -> list[int]:
        return self.hf.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def encode_batch(self, texts) -> list[list[int]]:
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        return [encoding.ids for encoding in self.hf.encode_batch(texts, add_special_tokens=False)]

    def save(self, folder) -> str:
        write_atomic(Path(folder) / "tokenizer.json", self.raw)
        write_atomic(Path(folder) / "tokenizer_config.json", json.dumps(tokenizer_config(self), indent=1))
        return "tokenizer.json"


def tokenizer_config(tokenizer) -> dict:
    marks = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | getattr(
        tokenizer, "config", {}) | {mark: None if i is None else tokenizer.piece(i) for mark, i in marks.items()}


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer in a tokenizer.model, a tokenizer.json or a folder with either. In a folder with both, the first is
    taken if it is like ours: SentencePiece's, and it keeps spaces."""
    path = Path(path)
    names = ("tokenizer.model", "tokenizer.json")
    files = [path / name for name in names if (path / name).exists()] if path.is_dir() else [path]
    for file in (file for file in files if file.exists()):
        if file.suffix == ".json":
            return HFTokenizer(file)
        with contextlib.suppress(*[DataError] * (len(files) - 1)):      # some families' is not SentencePiece's
            tokenizer = Tokenizer(file)
            if tokenizer.decode(tokenizer.encode("a  b")) == "a  b":
                return tokenizer
    raise DataError(f"{path}: must be, or hold, a tokenizer.json, or a tokenizer.model that keeps spaces as they are")


def find_tokenizer(name: str) -> Tokenizer:
    """load_tokenizer of a path, or of a model's name on huggingface.co (gpt2), through the package huggingface_hub."""
    if Path(name).exists():
        return load_tokenizer(name)
    hub = optional("huggingface_hub", "tokenizers", f"tokenizer {name}")
    with name_in_errors(f"tokenizer {name}", "cannot be read",
                        ": it must be a path, or a model on huggingface.co, which needs the network"):
        return load_tokenizer(hub.snapshot_download(name, allow_patterns=["tokenizer*", "*config.json"]))


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Our SentencePiece BPE as the content of a tokenizer.json: the same ids for every text without U+2581.
    SentencePiece joins the two neighbours whose joint piece has the best score, whichever two they are; Hugging Face
    joins the pair that stands first in a list. So the list has, for each piece from the best score down, every way to
    cut it into two pieces. (Marks such as <s> in a text are theirs to find: AutoTokenizer(split_special_tokens=True)
    leaves them text, as encode does.)"""
    sp, pieces = tokenizer.sp, {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    marks = {piece: i for piece, i in pieces.items() if sp.is_control(i) or sp.is_unknown(i)}
    text = {piece for piece, i in pieces.items() if piece not in marks and not sp.is_byte(i)}
    merges = [[piece[:cut], piece[cut:]] for piece in sorted(text, key=lambda piece: -sp.get_score(pieces[piece]))
              for cut in range(1, len(piece)) if piece[:cut] in text and piece[cut:] in text]
    bos = tokenizer.piece(tokenizer.bos_id)
    first, sequence = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "added_tokens": [{"id": i, "content": piece} | flags for piece, i in marks.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "model": {"type": "BPE", "unk_token": tokenizer.piece(0), "byte_fallback": True, "vocab": pieces,
                  "merges": merges},
        "post_processor": {"type": "TemplateProcessing", "single": [first, sequence],
                           "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]}}


def chat_template(tokenizer) -> str:
    """The convention of encode_chat as a Jinja template, what Hugging Face calls chat_template. It reads messages,
    add_generation_prompt, bos_token and eos_token."""
    def expression(text):
        names = {"{role}": "message['role']", "{eos}": "eos_token"}
        return " + ".join(names.get(part, repr(part)) for part in re.split("({role}|{eos})", text) if part) or "''"

    opening, end, after_answer, after_other = chat_format(tokenizer)
    after = f"({expression(end + after_answer)} if message['role'] == 'assistant' else {expression(after_other)})"
    return ("{{ bos_token }}{% for message in messages %}{{ " + f"{expression(opening)} + message['content'] + {after}"
            + " }}{% endfor %}{% if add_generation_prompt %}{{ "
            + expression(opening.replace("{role}", "assistant")) + " }}{% endif %}")


def export_folder(out, config: dict, tensors, tokenizer: Tokenizer, *, chat_template: str | None = None,
                  max_shard_bytes: int = 4 * 2**30) -> Path:
    """Write a folder that transformers, and what builds on it, loads. config: of config_to_hf; tensors: an iterable of
    (name, tensor), of hf_tensors, consumed a shard at a time. Whole or absent; raises DataError where `out` exists."""
    out = Path(out)
    need(not out.exists(), f"{out}: a model must be exported to a new folder, this one exists")
    need(tokenizer.vocab_size <= config["vocab_size"],
         f"{out}: vocab_size must be at least the tokenizer's {tokenizer.vocab_size}", config["vocab_size"])
    with new_folder(out) as temporary:
        shard, size, total, shards = {}, 0, 0, []
        for name, t in itertools.chain(tensors, [(None, torch.empty(0))]):                  # None: the end
            if shard and (name is None or size + t.nbytes > max_shard_bytes):
                write_safetensors(temporary / f"{len(shards)}", shard)
                shards.append(list(shard))
                shard, size = {}, 0
            shard[name], size, total = t, size + t.nbytes, total + t.nbytes
        files = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
        if len(shards) == 1:
            files = ["model.safetensors"]
        else:
            where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            write_atomic(temporary / "model.safetensors.index.json",
                         json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
        for n, file in enumerate(files):
            os.rename(temporary / f"{n}", temporary / file)
        if tokenizer.save(temporary) != "tokenizer.json":
            write_atomic(temporary / "tokenizer.json", json.dumps(tokenizer_json(tokenizer), ensure_ascii=False))
        settings = tokenizer_config(tokenizer) | ({"chat_template": chat_template} if chat_template else {})
        write_atomic(temporary / "tokenizer_config.json", json.dumps(settings, indent=1))
        write_atomic(temporary / "config.json", json.dumps(config, indent=1))
    return out


# ---- demo and command line -------------------------------------------------------------------------------------------

def demo():
    """The claims of this file, measured | predicted, asserted. Needs nothing; about 10 s."""
    import tempfile

    def row(what, measured, predicted):
        print(f"{what:<66} {measured:>12} | {predicted:>12} | {'ok' if measured == predicted else 'WRONG'}")
        assert measured == predicted, what

    with tempfile.TemporaryDirectory() as folder:
        print("prepare: a million tokens of this Python's standard library")
        start = time.time()
        path = prepare(["stdlib"], Path(folder) / "stdlib", 2048, max_tokens=10**6, log=lambda line: print("  " + line))
        seconds = time.time() - start
        loader = Loader(path, micro_batch_size=8, seq_len=256)
        manifest, t = loader.manifest, loader.tokenizer
        print(f"  {seconds:.1f} s; dropped: {manifest['dropped']}; knowledge cutoff {manifest['knowledge_cutoff']}\n")

        line = "def main(argv):\n    return 0  # caf\u00e9"
        print(f"{line!r}\n  -> {[t.piece(i) for i in t.encode(line)]}\n")
        print(f"{'':66} {'measured':>12} | {'predicted':>12} |")
        strings = [f"a {chr(i)}  b" for i in range(0, 0x110000, 97)]                     # lone surrogates among them
        same = sum(t.decode(t.encode(s)) == s for s in strings)
        row("characters, each 97th of Unicode, that survive encode, decode", same, len(strings))

        n = loader.num_windows
        image = np.sort(permute(np.arange(n), n, key=7))
        row("windows of an epoch lost or repeated by the permutation", int((image != np.arange(n)).sum()), 0)
        ranks = [Loader(path, micro_batch_size=2, seq_len=256, dp_rank=r, dp_size=4) for r in range(4)]
        together = torch.cat([next(r)["tokens"] for r in ranks])
        row("tokens of step 0 that differ between 1 rank and 4", int((together != next(loader)["tokens"]).sum()), 0)

        val = Loader(path, micro_batch_size=1, seq_len=256, split="val")
        text = b"".join(t.bytes[i] for s in val.shards for i in s)
        row("bytes of validation text decoded from its shards", len(text), manifest["splits"]["val"]["bytes"])
        for name, bpb in compressed_bpb(text).items():
            print(f"{'bits per byte of validation text, ' + name:<66} {bpb:>12.3f} |")

        full, run = torch.randn(64, 48), Path(folder) / "run"
        quarters = [("w", ((a, a + 32, 64), (b, b + 24, 48)), full[a:a + 32, b:b + 24])
                    for a in (0, 32) for b in (0, 24)]
        write_checkpoint(run / "step-1", quarters, {"step": 1})
        part = Reader(run / "step-1").read("w", ((10, 50, 64), (20, 44, 48)))
        row("elements of a slice that differ, saved in 4 pieces, read in 1", int((part != full[10:50, 20:44]).sum()), 0)
        file = run / "step-1" / "rank-00000.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 1
        file.write_bytes(raw)
        reader, damaged = newest_checkpoint(run)
        row("intact checkpoints after one bit was flipped", int(reader is not None), 0)
        print("  " + damaged[file.parent].replace(folder, ""))


def main(argv):
    parser = argparse.ArgumentParser(description="Prepare text for training: tokenizer, token shards, manifest. "
                                     "With the word instructions first: a fine-tuning file from Python functions.")
    parser.add_argument("sources", nargs="+", help="the word stdlib; files, folders, globs of .txt, .md, .py, .jsonl, "
                        "the same .gz or .zst, .parquet; .bin of nanoGPT or llm.c; or hf:DATASET[:SUBSET][:SPLIT]")
    parser.add_argument("--out", help="folder to make (default: under data/); the .jsonl of instructions "
                                      "(default data/instructions.jsonl)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="pieces of the tokenizer (default 2048)")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="share of the text held out (default 0.05)")
    parser.add_argument("--text-field", default="text", help="column, or JSON field, of the text (default text)")
    parser.add_argument("--tokenizer", help="use this one: a file, a folder, or a model on huggingface.co (gpt2)")
    parser.add_argument("--knowledge-cutoff", default="", metavar="YYYY-MM-DD",
                        help="newest date of the text (default: the newest date of the files, or of Python's release)")
    parser.add_argument("--tokens", type=float, default=0, help="stop after so many for training (default: all)")
    args = parser.parse_args(argv)
    try:
        if args.sources[0] == "instructions" and args.sources[1:]:
            out = args.out or "data/instructions.jsonl"
            print(f"{out}: {instructions(args.sources[1:], out, val_fraction=args.val_fraction)}")
        else:
            print(prepare(args.sources, args.out, args.vocab_size, val_fraction=args.val_fraction, log=print,
                          text_field=args.text_field, max_tokens=int(args.tokens),
                          knowledge_cutoff=args.knowledge_cutoff,
                          tokenizer=find_tokenizer(args.tokenizer) if args.tokenizer else None))
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else demo())
