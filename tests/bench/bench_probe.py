"""How a language model is wrong: python tests/bench/bench_probe.py out/tiny

For the run of a base model in that folder (other flags are train.py's):

  invented  share of the modules in sampled import statements that do not exist: for each checkpoint, at four
            temperatures
  unknown   nats per byte of names of functions. Some are in the library that the model read. Others are of newer
            Pythons, so the model cannot know them
  copied    longest part of 400 bytes, sampled, that stands word for word in the training text; the same of held-out
            text
"""

import argparse
import dataclasses
import importlib
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402

TEMPERATURES = (0.3, 0.6, 1.0, 1.5)
OPENINGS = ('"""A module."""\n\nimport', '"""A module."""\n\nfrom')
# functions and classes of newer Pythons: 3.12, 3.13, 3.14 ("What's New" of each, docs.python.org)
NEWER_NAMES = """itertools.batched calendar.Month calendar.Day math.sumprod inspect.markcoroutinefunction
    threading.setprofile_all_threads random.binomialvariate statistics.kde pathlib.UnsupportedOperation copy.replace
    queue.ShutDown warnings.deprecated os.process_cpu_count base64.z85encode glob.translate mimetypes.guess_file_type
    types.CapsuleType typing.ReadOnly typing.TypeIs statistics.kde_random heapq.heappush_max functools.Placeholder
    operator.is_none io.Reader os.reload_environ uuid.uuid7 asyncio.capture_call_graph pdb.set_default_backend
    inspect.ispackage""".split()


def names_before_and_after() -> dict:
    """{"known": [(module, name), ...], "new": ...}: functions and classes of this Python's library, and of a later one.
    A model that read this library has met the first; it cannot have met the second."""
    found = {"known": [], "new": []}
    for place, name in (each.split(".") for each in NEWER_NAMES):
        module = importlib.import_module(place)
        if not hasattr(module, name):
            found["new"].append((place, name))
            names = getattr(module, "__all__", dir(module))
            names = [n for n in names if n[0] != "_" and len(n) > 3 and callable(getattr(module, n))]
            found["known"] += [(place, n) for n in names[::max(1, len(names) // 3)][:3]]        # three of the module's
    return {kind: sorted(set(names)) for kind, names in found.items()}


def longest_copy(text: bytes, corpus: bytes) -> bytes:
    """The longest part of `text` that occurs in `corpus`."""
    best, start = b"", 0
    while start + len(best) < len(text):
        if text[start:start + len(best) + 1] in corpus:                       # one more byte, or else one place later
            best = text[start:start + len(best) + 1]
        else:
            start += 1
    return best


def continue_text(gpt, tokenizer, c, text: str, n: int, tokens: int, temperature: float) -> list[str]:
    """n continuations of a text, as the model itself has them: of at most so many tokens."""
    c = dataclasses.replace(c, temperature=temperature, top_k=0, top_p=1.0)
    prompt = [data.first_id(tokenizer)] + tokenizer.encode(text)
    return [tokenizer.decode(ids) for ids in train.sample_answers(gpt, tokenizer, [prompt] * n, c, range(n), tokens)]


def share_invented(gpt, tokenizer, c, temperature: float) -> float:
    texts = [text for opening in OPENINGS for text in continue_text(gpt, tokenizer, c, opening, 64, 8, temperature)]
    names = [match[1] for text in texts if (match := re.match(r" ([A-Za-z_]\w*)", text))]
    return sum(name not in sys.stdlib_module_names for name in names) / max(1, len(names))


def nats_per_byte(gpt, tokenizer, names) -> float:
    """Mean over names, (module, name), of what the name costs after `import MODULE`."""
    prompts = [[data.first_id(tokenizer)] + tokenizer.encode(f"import {module}\n\n{module}.") for module, _ in names]
    answers = [tokenizer.encode(name) for _, name in names]
    nats = train.nll_per_token(gpt, prompts, answers) * torch.tensor([len(ids) for ids in answers])
    return (nats / torch.tensor([len(name) for _, name in names])).mean().item()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of a run of train.py")
    args, flags = parser.parse_known_args(argv)
    c = train.parse_config(["--out", args.folder, *flags])
    device = train.join(c).device
    newest, tokenizer, c = train.open_run(args.folder, c)
    card = newest.meta["card"]

    print("share of imported modules that do not exist (128 samples)\n  temperature  "
          + "".join(f"{t:>8}" for t in TEMPERATURES))
    for folder in data.step_folders(newest.folder.parent):
        reader = data.Reader(folder)
        gpt = train.make_stage(c, device, read=reader.read)
        shares = [share_invented(gpt, tokenizer, c, t) for t in TEMPERATURES]
        print(f"  step {reader.meta['step']:>8}" + "".join(f"{share:8.1%}" for share in shares))

    print(f"\nknowledge cutoff {card['knowledge_cutoff']}: names after `import MODULE`, nats per byte")
    for kind, names in names_before_and_after().items():
        if names:                                                          # a Python that has all of them knows of none
            whose = "the library that it read" if kind == "known" else "newer Pythons"
            print(f"  functions of {whose:<24} {nats_per_byte(gpt, tokenizer, names):6.3f}")

    if card.get("text") and Path(card["text"], "manifest.json").exists():
        loaders = [data.Loader(card["text"], micro_batch_size=1, seq_len=c.seq_len, split=split)
                   for split in ("train", "val")]
        corpus = b"".join(tokenizer.bytes[i] for ids in loaders[0].shards for i in ids.tolist())
        unseen = [loaders[1].text(i + 1)[-400:] for i in range(min(8, loaders[1].num_windows))]
        samples = [text.encode("utf-8", "replace")[:400] for text in continue_text(gpt, tokenizer, c, "", 8, 160, 1.0)]
        print("\nlongest part that stands word for word in the training text, median and most, bytes of 400")
        for name, parts in (("samples", samples), ("held-out text", unseen)):
            copies = sorted((longest_copy(part, corpus) for part in parts), key=len)
            print(f"  {name:<14} {len(copies[len(copies) // 2]):>4} {len(copies[-1]):>4}   "
                  f"{copies[-1].decode('utf-8', 'replace')!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
