"""Preparing and loading text: how fast, in how much memory.

    python tests/bench/bench_data.py [MB]           256; the figures of RESULTS.md: 2000, in the background, with nohup

1. A .jsonl of so many MB, Python source in documents of 4 KB, prepared by a process whose address space may not exceed
   1 GB. It is killed once and called again. Each call says first how many minutes it will take; the file and its tokens
   lie under TMPDIR. MALLOC_ARENA_MAX=1: SentencePiece trains with 16 threads, and glibc would reserve 64 MB for each.
2. Encoding on one core, in CPU seconds: Tokenizer.encode next to SentencePiece on parts of 1 MB, alternating.
3. Batches of `tiny`'s shape (8 x 256), and of a mixture, per CPU second; memory before and after 10,000 of them.
"""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

PREPARE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
sys.path.insert(0, sys.argv[1])
import data

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmPeak")).split()[1]) / 1024

if __name__ == "__main__":
    imports = peak()
    data.prepare([sys.argv[2]], sys.argv[3], shard_tokens=2**24, log=lambda line: print("  " + line, flush=True))
    print(f"  address space: {imports:.0f} MB when imported, {peak():.0f} MB at most; resident at most: "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
"""


def write_corpus(path: Path, megabytes: int):
    """Documents of about 4 KB of this machine's Python files, over and over, each with a number of its own."""
    folders = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
    files, size, number = sorted(p for folder in folders for p in Path(folder).rglob("*.py")), 0, 0
    with open(path, "w") as f:
        while size < megabytes * 1e6:
            for file in files:
                text = file.read_text(errors="ignore")
                for part in data.split_text(text, 4096):
                    size += f.write(json.dumps({"text": f"# {number}\n{part}"}) + "\n")
                    number += 1
                if size >= megabytes * 1e6:
                    break
    print(f"{path.name}: {size / 1e6:,.0f} MB, {number:,} documents")


def rss() -> float:
    """Resident memory of this process that is no file's, MB."""
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def bench_prepare(folder: Path):
    script = folder / "prepare.py"
    script.write_text(PREPARE)
    command = [sys.executable, str(script), str(ROOT), str(folder / "corpus.jsonl"), str(folder / "out")]
    print("prepare, at most 1 GB of address space; killed after its second shard, and called again")
    start = time.perf_counter()
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    with subprocess.Popen(command, env=environment) as process:
        while len(list(folder.glob(".out.tmp/train-*.bin"))) < 3 and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    print(f"  killed after {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    done = data.read_sealed(folder / "out" / "manifest.json", "tokens")["splits"]
    print(f"  {time.perf_counter() - start:.1f} s for the rest; {sum(s['bytes'] for s in done.values()) / 1e6:,.0f} MB "
          f"of text, {sum(s['tokens'] for s in done.values()):,} tokens in {len(done['train']['shards'])} shards")


def bench_encode(tokenizer, text: str):
    def parts():
        return [i for part in data.split_text(text, 2**20) for i in tokenizer.sp.encode(part)]

    def short():
        return [i for part in data.split_text(text, 2**20) for i in tokenizer.encode(part)]

    assert parts() == short()
    rates = {"SentencePiece on parts of 1 MB": [], "Tokenizer.encode": []}
    for _ in range(5):
        for name, work in zip(rates, (parts, short), strict=True):
            start = time.process_time()
            work()
            rates[name].append(len(text.encode()) / 1e6 / (time.process_time() - start))
    for name, rate in rates.items():
        print(f"encode, one core, {name}: {statistics.median(rate):.2f} MB/s of CPU time, {min(rate):.2f} to "
              f"{max(rate):.2f}")


def bench_load(folders):
    shape = dict(micro_batch_size=8, seq_len=256)
    mixed = [(Fraction(1, len(folders)), folder) for folder in folders]
    for name, loader in (("one folder", data.Loader(folders[0], **shape)), ("a mixture", data.Mixture(mixed, **shape)),
                         ("one folder, read ahead", data.Loader(folders[0], **shape, prefetch=True))):
        for _ in range(200):
            next(loader)
        before, start = rss(), time.process_time()
        for _ in range(10_000):
            next(loader)
        rate = 10_000 * 8 * 256 / (time.process_time() - start)
        print(f"10,000 batches of 8 x 256, {name}: {rate:,.0f} tokens per CPU second, memory {rss() - before:+.1f} MB")


def main():
    megabytes = int(sys.argv[1]) if sys.argv[1:] else 256
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", megabytes)
        bench_prepare(folder)
        loader = data.Loader(folder / "out", micro_batch_size=1, seq_len=256)
        bench_encode(loader.tokenizer, loader.text(20_000).decode("utf-8", "replace").replace("\u2581", " "))
        small = data.prepare(["stdlib"], folder / "stdlib", tokenizer=loader.tokenizer)
        bench_load([folder / "out", small])
        print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
