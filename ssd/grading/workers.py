"""Processes that compare answers, each killed at its deadline and held to its memory."""

import collections
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ssd.grading import algebra, answers

Verdict = Literal["right", "wrong", "timed_out"]

# Gold and answer, and where the problem says so how far apart their numbers may be, and in what notation.
Pair = tuple[str, str | None] | tuple[str, str | None, float] | tuple[str, str | None, float, str]

DEADLINE_S = 10.0
START_S = 120.0  # the first worker waits for the import of sympy, which a busy machine does slowly
MEMORY_BYTES = 1 << 30
PAIRS_PER_WORKER = 2_000  # then it is replaced: its caches take some 3 MB for each 100 expressions


class Forker:
    """A process that imports math-verify once and forks a worker in milliseconds, as often as one is killed.

    It leads a process group of its own, which ends with it. Where this process dies, the forker reads the end of its
    socket and ends the group; a worker ends at its deadline in any case, by its own timer.
    """

    def __init__(self, deadline_s: float):
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from ssd.grading.workers import _fork; _fork({theirs.fileno()}, {deadline_s!r})"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
        theirs.close()
        self.socket = ours

    def worker(self) -> "_Worker":
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self.socket, [b"w"], [theirs.fileno()])
        except OSError as error:
            raise RuntimeError("the grading process ended before it began; is math-verify installed?") from error
        theirs.close()
        return _Worker(ours)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.socket.close()


class _Worker:
    """This side of a process that decides one pair at a time and may end at any time."""

    def __init__(self, connection: socket.socket):
        self.socket, self.lines = connection, connection.makefile("rb")
        self.pair: Pair | None = None
        self.num_pairs = 0

    def give(self, pair: Pair) -> None:
        self.pair, self.num_pairs = pair, self.num_pairs + 1
        self.socket.sendall(json.dumps(pair).encode() + b"\n")

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


def in_workers(pairs: Sequence[Pair], forker: Forker, workers: int | None) -> Iterator[tuple[Pair, Verdict]]:
    """Verdict of each pair, as they come; beside the answer None, 'right' is an expression that can be parsed."""
    waiting, pool = collections.deque(pairs), set()
    begin = time.monotonic()
    with selectors.DefaultSelector() as selector:

        def start() -> None:
            worker = forker.worker()
            selector.register(worker.socket, selectors.EVENT_READ, worker)
            pool.add(worker)

        def end(worker: _Worker) -> None:
            selector.unregister(worker.socket)
            pool.discard(worker)
            worker.close()

        try:
            for _ in range(min(workers or os.cpu_count() or 1, len(pairs))):
                start()
            while pool:
                ready = selector.select(timeout=1)
                if all(worker.pair is None for worker in pool) and not ready and time.monotonic() - begin > START_S:
                    raise RuntimeError(f"no grading worker started within {START_S:g} s")
                for key, _ in ready:
                    worker, line = key.data, key.data.lines.readline()
                    if worker.pair is None and not line:
                        raise RuntimeError("a grading worker ended before it began; is math-verify installed?")
                    if worker.pair is not None:
                        # No line: the worker ended on this pair, at its deadline or at its memory limit.
                        verdict = line.decode(errors="replace").strip()
                        yield worker.pair, (verdict if verdict in ("right", "wrong") else "timed_out")
                        worker.pair = None
                    if not line or not waiting or worker.num_pairs >= PAIRS_PER_WORKER:
                        end(worker)
                        if waiting:
                            start()
                    else:
                        worker.give(waiting.popleft())
        finally:
            for worker in list(pool):
                end(worker)


def _fork(control: int, deadline_s: float) -> None:
    """Fork a worker for each socket that arrives, until there is nobody left to send one."""
    import gc
    import logging

    logging.disable()  # math-verify warns of each answer that it cannot parse
    algebra.same_expression("x^2 - 1", "(x + 1)(x - 1)")  # what parser and sympy load on first use, every worker shares
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=control) as orders:
        while True:
            message, sockets, _, _ = socket.recv_fds(orders, 1, 1)
            if not message:
                os.killpg(0, signal.SIGKILL)
            if os.fork() == 0:
                orders.close()
                _work(socket.socket(fileno=sockets[0]), deadline_s)
                os._exit(0)
            os.close(sockets[0])


def _work(connection: socket.socket, deadline_s: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is computing
    connection.sendall(b"ready\n")
    for line in connection.makefile("rb"):
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        gold, answer, *allowed = json.loads(line)
        try:
            if answer is None:
                right = algebra.parsed(gold, False) is not None
            else:
                right = answers.equal(gold, answer, algebra.same_expression, *allowed)
        except MemoryError:
            os._exit(1)
        except Exception:  # whatever sympy raised, it is not right
            right = False
        # math-verify takes a MemoryError for a difference.
        if not right and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY_BYTES / 2:
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(b"right\n" if right else b"wrong\n")
