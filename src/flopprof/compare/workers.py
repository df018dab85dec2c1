"""Jobs in worker processes: each counts one model after the other, and one that dies takes one model with it.

Workers are forked where that is safe: torch is imported once, and a worker is there at once. It is not where the
process has started an accelerator (torch cannot differentiate in such a fork) or off Linux; there a worker is a new
Python, which imports torch for seconds. Jobs and rows are JSON; what models print is dropped.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from multiprocessing.connection import Connection, wait

import msgspec
import torch

from flopprof.compare.comparison import Row
from flopprof.compare.models import Job
from flopprof.counting.count import count
from flopprof.errors import FlopprofError
from flopprof.models import catalogue, timm, vision
from flopprof.models.hf_config import load_transformers

_READY = b"ready"
_LEAST_FORKED, _LEAST_STARTED = 3, 12  # jobs from which workers pay
_PATIENCE_S = 10.0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worth(jobs: int) -> int:
    """How many workers so many jobs deserve here; 0: they are done in this process."""
    if os.name != "posix" or cores() < 2:
        return 0
    return min(cores(), jobs) if jobs >= (_LEAST_FORKED if _can_fork() else _LEAST_STARTED) else 0


def rows(jobs: Sequence[Job], workers: int) -> Generator[tuple[Job, Row], None, None]:
    """(job, its row) as they are finished; 0 workers: in this process, one after the other.

    A worker that dies leaves a row that says so, and another takes its place. Closing the iterator ends all workers.
    """
    if workers < 1 or os.name != "posix":
        for job in jobs:
            yield job, job.row()
        return
    with _Pool() as pool:
        yield from pool.work(deque(jobs), min(workers, len(jobs)))


class _Worker:
    """One process and the line to it; `job`: what it is at, None while it starts."""

    def __init__(self, pid: int, line: Connection, process: subprocess.Popen[bytes] | None = None) -> None:
        self.pid, self.line, self.process = pid, line, process
        self.job: Job | None = None

    def end(self) -> str:
        """Ends it, if it has not ended; how it ended: `killed by signal 9 (SIGKILL)`."""
        self.line.close()
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                self.process.kill()
                code = self.process.wait()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return _ending(code)

    def died(self) -> str:
        """How it ended by itself, its line being closed."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return _ending(self.process.wait(_PATIENCE_S))
            return self.end()
        self.line.close()
        return _ending(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]))


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"was killed by signal {-code}"


class _Pool:
    """Workers at work; leaving it ends them."""

    def __init__(self) -> None:
        self.workers: dict[Connection, _Worker] = {}

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        while self.workers:
            self.workers.popitem()[1].end()

    def work(self, jobs: deque[Job], count: int) -> Generator[tuple[Job, Row], None, None]:
        """(job, row) of every job, as they come."""
        fork = _can_fork()
        if fork:
            _prepare(jobs)
        for _ in range(count):
            self._start(fork=fork)
        barren = 0
        while self.workers:
            for line in wait(list(self.workers)):
                worker = self.workers[line]  # type: ignore[index]  # what is waited for are the lines
                try:
                    answer = worker.line.recv_bytes()
                except (EOFError, OSError):
                    del self.workers[worker.line]
                    how = worker.died()
                    if worker.job is not None:
                        barren = 0
                        yield worker.job, Row(name=worker.job.name, failed=f"its worker process {how}.")
                    else:
                        barren += 1
                    if jobs and barren <= count:  # one that cannot even start is not tried for ever
                        self._start(fork=fork)
                    continue
                finished, worker.job = worker.job, jobs.popleft() if jobs else None
                if worker.job is None:
                    del self.workers[worker.line]
                    worker.end()
                else:
                    with contextlib.suppress(OSError):  # it died: the next wait tells
                        worker.line.send_bytes(msgspec.json.encode(worker.job))
                if finished is not None:
                    yield finished, msgspec.json.decode(answer, type=Row)
        for job in jobs:  # no worker could start
            yield job, job.row()

    def _start(self, *, fork: bool) -> None:
        worker = self._forked() if fork else self._started()
        self.workers[worker.line] = worker

    def _forked(self) -> _Worker:
        here, there = _line()
        with warnings.catch_warnings():  # 3.12 warns of forks beside threads; the worker takes no lock of theirs
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for line in (here, *self.workers):  # else a brother would not see that this process has gone
                    line.close()
                serve(there)
                code = 0
            finally:
                os._exit(code)
        there.close()
        return _Worker(pid, here)

    def _started(self) -> _Worker:
        here, there = _line()
        descriptor = there.fileno()
        served = f"from flopprof.compare.workers import serve_on; serve_on({descriptor})"
        code = f"import sys; sys.path[:] = {sys.path!r}; {served}"
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[descriptor], stdin=subprocess.DEVNULL, start_new_session=True
        )
        there.close()
        return _Worker(process.pid, here, process)


def _line() -> tuple[Connection, Connection]:
    here, there = socket.socketpair()
    return Connection(here.detach()), Connection(there.detach())


def _can_fork() -> bool:
    """Whether a fork of this process can count: Linux, and no accelerator whose state a fork would share."""
    if not sys.platform.startswith("linux"):
        return False
    return not torch.accelerator.is_available()


def _prepare(jobs: Iterable[Job]) -> None:
    """Imports here, once, what every fork would import: the models' packages, and what torch loads when first used."""
    known = any(catalogue.knows(job.target) for job in jobs)
    kinds = {job.target.partition(":")[0] for job in jobs if not catalogue.knows(job.target)}
    with contextlib.suppress(FlopprofError):  # a package that is missing fails the models that need it
        if "timm" in kinds:
            timm.names()
        if known or kinds & {"hf", "huggingface"}:
            load_transformers()
        if any("/" not in kind and "." not in kind for kind in kinds - {"timm", "hf", "huggingface"}):
            vision.names()
    with torch.device("meta"):
        tiny = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1), torch.nn.Flatten()).eval()
        count(tiny, torch.zeros(1, 1, 1, 1), backward=True)


def serve_on(descriptor: int) -> None:
    """What a new Python does: the jobs that come over this descriptor."""
    serve(Connection(descriptor))
    os._exit(0)


def serve(line: Connection) -> None:
    """Answers each job with its row, until the line closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    nothing = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    sys.stdout = sys.stderr = nothing
    for stream in (1, 2):
        os.dup2(nothing.fileno(), stream)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # each worker has a core; and a forked pool of threads would never answer
    gc.disable()  # a count makes much garbage, and looking through all of torch for it takes a fifth of the time:
    with contextlib.suppress(EOFError, OSError):
        line.send_bytes(_READY)
        while True:
            gc.freeze()  # so it is collected between models, among what is new since the last one
            job = msgspec.json.decode(line.recv_bytes(), type=Job)
            line.send_bytes(msgspec.json.encode(job.row()))
            gc.collect()
