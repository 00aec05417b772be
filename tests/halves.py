"""Both cores: `python -m pytest` runs its tests in two processes.

The second is a fork of the first, made when the tests are collected and none has run: nothing is imported twice. There
is one list of tests, those that start ranks first. One process takes from its front, the other from its back, until
they meet; so neither waits for the other, whatever a test costs. What the second finds is reported by the first, as if
it had run all. Tests marked `alone` count what the whole machine does: the first runs them when the second is gone.

One file, one core, a GPU, --pdb and -x: everything runs in one process, in the order of the files.
"""

import ast
import multiprocessing.forkserver
import os
import tempfile
import time
import traceback

import torch


class Sender:
    """In the second process: what starts, and reports, become lines of a file."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def pytest_runtest_logstart(self, nodeid, location):
        print((nodeid, location), file=self.file, flush=True)

    def pytest_runtest_logreport(self, report):
        line = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(repr(line), file=self.file, flush=True)


class Queue:
    """The list's ends."""

    def __init__(self, items):
        self.items = items
        self.ends = multiprocessing.get_context("fork").Array("i", [0, len(items)])         # taken: below, and from

    def take(self, front: bool):
        with self.ends.get_lock():
            if self.ends[0] == self.ends[1]:
                return None
            at = self.ends[0] if front else self.ends[1] - 1
            self.ends[0 if front else 1] += 1 if front else -1
            return self.items[at]

    def close(self):
        with self.ends.get_lock():
            self.ends[0] = self.ends[1]


def run(session, take, after=lambda: None):
    """The tests that take() hands out, to the first that pytest wants to stop at."""
    item = take()
    while item is not None:
        following = take()                                      # or a fixture would be thrown away that it uses too
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after()
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following


def second(session, queue, path):
    """The fork: silent, ends here."""
    code = 1
    try:
        capture = session.config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()                         # its files are the other process's too
        capture.start_global_capturing()
        capture.suspend_global_capture()
        session.config.pluginmanager.unregister(name="terminalreporter")
        forkserver = multiprocessing.forkserver
        if forkserver._forkserver._forkserver_pid:                                        # the first's serves both
            forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
        with open(path, "w") as file:
            session.config.pluginmanager.register(Sender(session.config, file))
            run(session, lambda: queue.take(False))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Relay:
    """In the first process: what the second has written since."""

    def __init__(self, config, file):
        self.hook, self.config, self.file, self.rest, self.running = config.hook, config, file, "", "its first"

    def __call__(self):
        *lines, self.rest = (self.rest + self.file.read()).split("\n")
        for line in map(ast.literal_eval, lines):
            if isinstance(line, tuple):
                self.running, location = line
                self.hook.pytest_runtest_logstart(nodeid=self.running, location=location)
            else:
                report = self.hook.pytest_report_from_serializable(config=self.config, data=line)
                self.hook.pytest_runtest_logreport(report=report)


def pytest_runtestloop(session):
    option, items = session.config.option, session.items
    if (option.collectonly or option.usepdb or option.maxfail or session.testsfailed or torch.cuda.is_available()
            or len(os.sched_getaffinity(0)) < 2 or len({item.path for item in items}) < 2):
        return None                                             # pytest's own loop
    last = [item for item in items if item.get_closest_marker("alone")]
    ranks = [item for item in items if "run_ranks" in item.fixturenames and item not in last]
    others = [item for item in items if item not in {*ranks, *last}]
    queue = Queue(ranks + others[::-1])
    session.config._tmp_path_factory.getbasetemp()              # one for both
    with tempfile.NamedTemporaryFile("r") as file:
        child, relay = os.fork(), Relay(session.config, file)
        if child == 0:
            second(session, queue, file.name)
        status = None
        try:
            run(session, lambda: queue.take(True), relay)
        finally:
            queue.close()
            while status is None:
                ended, code = os.waitpid(child, os.WNOHANG)
                status = code if ended else None
                relay()
                time.sleep(0.02)
    if status:
        raise session.Interrupted(f"the second process ended with exit code {os.waitstatus_to_exitcode(status)} at "
                                  f"{relay.running}; its tests were not all run")
    alone = iter(last)
    run(session, lambda: next(alone, None))
    return True
