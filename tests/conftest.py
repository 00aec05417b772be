"""Ranks for tests, and a small prepared corpus.

run_ranks(fn, n, *args) runs fn(rank, n, *args) in n processes joined by gloo, where torch.distributed is already set
up, and returns the n results. One warm pool of processes serves the whole test run: a fresh interpreter costs seconds
a rank, a new process group in a warm one milliseconds. The first failing rank's traceback is raised here; a rank that
does not answer in time fails the test, and nobody is left behind.
"""

import argparse
import atexit
import contextlib
import io
import json
import math
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)                           # two threads on a core that others use are tens of times slower

if not torch.cuda.is_available():                  # read when a kernel is defined, so before flash_attn is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from halves import pytest_runtestloop  # noqa: E402, F401

import data  # noqa: E402
import train  # noqa: E402

best_rate = train.best_rate
train.best_rate = lambda work, flops, seconds: best_rate(work, flops, 0.0)             # one trial: no test needs more


def rank_main(pipe):
    """A pooled process: wait for (fn, rank, n, store file, args), answer (ok, result or traceback)."""
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    for number in (1, 2):                          # what a rank prints is no part of the tests' report
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        fn, rank, n, store, args = task
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n,
                                    timeout=timedelta(seconds=60))
            try:
                dist.barrier()                     # a rank that is through and leaves breaks the connecting of others
                answer = True, fn(rank, n, *args)
            finally:
                dist.destroy_process_group()
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


def begin(argv, **options):
    """What a rank of train.py has before its first step: config, world, model, optimizer, loaders of both splits."""
    c = train.parse_config(argv)
    world = train.join(c)
    model = train.Model(c, world, **options)
    return c, world, model, train.make_optimizer(model, c), *train.open_data(c, world)


@contextlib.contextmanager
def dry_run(argv):
    """-> config and world of a rank whose companions are not here."""
    try:
        c = train.parse_config([*argv, "--dry-run"])
        world = train.join(c)
        yield train.resolve(c, world), world
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def outcome(main, *argv) -> tuple[int, str, str]:
    """main(argv) in this process -> (exit code, stdout, stderr)."""
    with contextlib.redirect_stdout(io.StringIO()) as o, contextlib.redirect_stderr(io.StringIO()) as e:
        code = main([str(a) for a in argv])
    return code, o.getvalue(), e.getvalue()


def metrics(out) -> list[dict]:
    """Lines of metrics.jsonl without the one number that is a clock's."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def losses(out) -> list[float]:
    return [x["loss"] for x in metrics(out) if "loss" in x]


def newest_tensors(out) -> dict:
    reader, damaged = data.newest_checkpoint(Path(out, "checkpoints"))
    assert not damaged
    return {name: reader.read(name) for name in reader.tensors}


def slices(box) -> tuple:
    return tuple(slice(a, b) for a, b, _ in box)


def part_of(whole, box, flat=None):
    """A rank's piece of a whole tensor: a box of it, or a range of the flattened box."""
    return whole[slices(box)] if flat is None else whole[slices(box)].flatten()[slice(*flat)]


class RankPool:
    def __init__(self):
        self.context, self.ranks = mp.get_context("forkserver"), []
        atexit.register(self.close)

    def start_forkserver(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))                             # it finds what we find
            forkserver.ensure_running()

    def process(self, fn, *args, daemon=True):
        """fn(*args) in a new process: a fork of one that has imported what the tests import, and has done nothing."""
        self.start_forkserver()
        process = self.context.Process(target=fn, args=args, daemon=daemon)
        process.start()
        return process

    def close(self):
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
            process.join()
        self.ranks = []

    def run(self, fn, n, *args, timeout=120):
        while len(self.ranks) < n:
            ours, theirs = self.context.Pipe()
            self.ranks.append((self.process(rank_main, theirs), ours))
            theirs.close()
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self.ranks[:n]):
                pipe.send((fn, rank, n, os.path.join(folder, "store"), args))
            waiting, answers, failed = {pipe: rank for rank, (_, pipe) in enumerate(self.ranks[:n])}, {}, None
            while waiting and not failed:
                ready = mp.connection.wait(list(waiting), timeout)
                if not ready:
                    failed = f"ranks {sorted(waiting.values())} did not answer within {timeout} s"
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    try:
                        ok, answers[rank] = pipe.recv()
                    except EOFError:
                        ok, answers[rank] = False, "died without a word"
                    if not ok and not failed:
                        failed = f"rank {rank} of {n}:\n{answers[rank]}"
        if failed:
            self.close()                     # the others may wait for the failed one: start afresh
            raise AssertionError(failed)
        return [answers[rank] for rank in range(n)]


POOL = RankPool()


def pytest_collection_finish(session):
    """A rank finds its test's module imported, and torch._dynamo, which the first AdamW of a process needs."""
    modules = {item.module.__name__ for item in session.items if {"run_ranks", "reference"} & {*item.fixturenames}}
    POOL.context.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", *sorted(modules)])
    if modules and not session.config.option.collectonly:
        POOL.start_forkserver()                                  # it imports while the first tests run


class ForkedRank:
    """A rank of torch's agent, as its subprocess.Popen: a fork of the agent, which has imported all that a rank
    imports, in the place of a new interpreter."""

    def __init__(self, args, env, stdout, stderr, **_):
        caught = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}            # by the agent, whose handlers a fork has too
        signal.pthread_sigmask(signal.SIG_BLOCK, caught)
        self.pid, self.returncode = os.fork(), None
        if self.pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
            return
        os.setsid()
        for file, number in ((stdout, 1), (stderr, 2)):
            if file:
                os.dup2(file.fileno(), number)
        for number in caught:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        script, code = next(i for i, arg in enumerate(args) if arg.endswith(".py")), 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
            run_script(args[script], args[script + 1:], env)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, timeout=math.inf):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.01)
        return self.returncode

    def poll(self):
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode


def run_script(path, args, environment):
    os.environ.update(environment)
    sys.argv = [str(path), *args]
    runpy.run_path(str(path), run_name="__main__")


def as_program(path, args, folder, environment):
    """python PATH ARGS, in a fork that has imported torch and train's siblings; what it says goes to FOLDER."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    subprocess_handler.Popen = ForkedRank
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(folder / f"{name}{environment.get('RANK', '')}", os.O_WRONLY | os.O_CREAT), number)
    run_script(path, args, environment)


@pytest.fixture(scope="session")
def run_ranks():
    yield POOL.run
    POOL.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared folder: some 60 files of the standard library, vocabulary 512."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("[a-d]*.py"))
    return data.prepare(files, tmp_path_factory.mktemp("corpus") / "text", 512, val_fraction=0.1)


@pytest.fixture(scope="session")
def short_documents(corpus, tmp_path_factory) -> Path:
    """A prepared folder of single words and lines of code as documents, with corpus's tokenizer: windows differ in how
    many targets they have, as a document's end has none. A mean of means is then not the mean."""
    folder = tmp_path_factory.mktemp("short")
    text = Path(argparse.__file__).read_text()
    lines = sorted({*text.split(), *(line for line in text.splitlines() if line.strip())})
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    out = data.prepare([folder / "lines.jsonl"], folder / "text", val_fraction=0.1,
                       tokenizer=data.Tokenizer(corpus / "tokenizer.model"))
    batch = data.Loader(out, micro_batch_size=4, seq_len=32).batch(range(64))
    counts = (batch["targets"] >= 0).sum(1).view(-1, 4)
    assert len(counts.unique()) > 5 and (counts.sum(1).diff() != 0).float().mean() > 0.7
    return out


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return data.Tokenizer(corpus / "tokenizer.model")
