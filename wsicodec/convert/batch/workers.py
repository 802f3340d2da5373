"""Processes that take jobs, and those of this machine."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection as channels
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, NoReturn, Protocol

from wsicodec.convert.batch.jobs import Event, Failed, Job, Started, Succeeded, run_job
from wsicodec.convert.batch.process import process
from wsicodec.convert.batch.rows import LOST
from wsicodec.errors import SlideError
from wsicodec.models.store import allowed_models, take_over

END_SECONDS = 15.0
"""A process that was told to end may tidy up for so long."""
MAX_FALSE_STARTS = 3
"""Processes that may end, one after the other, before they are ready for their first slide."""


class Workers(Protocol):
    """Processes that convert."""

    def free(self) -> int:
        """How many jobs would be begun at once."""
        ...

    def submit(self, job: Job) -> None:
        """Begin a job. At most ``free()`` at a time."""
        ...

    def events(self, seconds: float) -> list[Event]:
        """What happened since the last call; waits so long for something to happen."""
        ...

    def abandon(self, identity: int) -> None:
        """Stop a job; no event follows."""
        ...

    def close(self) -> None:
        """End, without a trace of what is under way."""
        ...


class LocalWorkers:
    """Processes of this machine, each converting one slide at a time.

    Processes are started when first needed, and again when one has died. The program that uses this
    must guard its start with ``if __name__ == "__main__":`` as multiprocessing asks.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        self._threads = threads
        self._jobs = jobs
        self._workers: list[_Worker] = []
        self._false_starts = 0
        self._pending: list[Event] = []

    def free(self) -> int:
        return self._jobs - sum(worker.job is not None for worker in self._workers)

    def submit(self, job: Job) -> None:
        idle = [worker for worker in self._workers if worker.job is None]
        if not idle:
            idle = [_Worker(self._threads)]
            self._workers += idle
        idle[0].begin(job)
        self._pending.append(Started(job.id, str(process(idle[0].pid))))

    def events(self, seconds: float) -> list[Event]:
        found, self._pending = self._pending, []
        waiting: dict[Any, _Worker] = {}
        for worker in self._workers:
            waiting[worker.channel] = worker
            waiting[worker.sentinel] = worker
        if not waiting:
            if not found:
                time.sleep(seconds)
            return found
        ready = channels.wait(list(waiting), 0 if found else seconds)
        for worker in {id(waiting[item]): waiting[item] for item in ready}.values():
            found += self._hear(worker)
        return found

    def _hear(self, worker: _Worker) -> list[Event]:
        found, alive = worker.hear()
        if worker.ready:
            self._false_starts = 0
        if alive:
            return found
        self._workers.remove(worker)
        how = worker.end()
        if not worker.ready:
            self._false_starts += 1
            if self._false_starts >= MAX_FALSE_STARTS:
                raise SlideError(f"processes that convert do not start: {how}")
        if worker.job is not None:
            message = f"{worker.job.source}: the process that converted it ended: {how}"
            found.append(Failed(worker.job.id, LOST, message, lost=True))
        return found

    def abandon(self, identity: int) -> None:
        for worker in self._workers:
            if worker.job is not None and worker.job.id == identity:
                self._workers.remove(worker)
                worker.end()
                return

    def close(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.ask_to_end()
        for worker in workers:
            worker.end()


class _Worker:
    """A process, and the job that it has."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.job: Job | None = None
        self.ready = False
        self._process: SpawnProcess = context.Process(
            target=_work,
            args=(theirs, threads, allowed_models()),
            name="wsicodec-batch",
            daemon=True,
        )
        with _interrupts_held():
            self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.sentinel = self._process.sentinel

    def begin(self, job: Job) -> None:
        self.job = job
        # a process that is dead already is noticed by its sentinel
        with contextlib.suppress(OSError):
            self.channel.send(job)

    def hear(self) -> tuple[list[Event], bool]:
        """Events that have come in, and whether the process lives."""
        found: list[Event] = []
        try:
            while self.channel.poll():
                message = self.channel.recv()
                self.ready = True
                if message is None:
                    continue
                if isinstance(message, Succeeded | Failed):
                    self.job = None
                found.append(message)
        except (EOFError, OSError):
            return found, False
        return found, self._process.is_alive()

    def ask_to_end(self) -> None:
        """An idle process ends when its channel closes, a busy one tidies up on SIGTERM."""
        if self.job is not None:
            self._process.terminate()
        self.channel.close()

    def end(self) -> str:
        """Make sure that it has ended; says how it did."""
        if self._process.is_alive() and not self.channel.closed:
            self.ask_to_end()
        self.channel.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code = self._process.exitcode or 0
        self._process.close()
        if code < 0:
            with contextlib.suppress(ValueError):
                number = signal.Signals(-code)
                hint = "; is memory short?" if number.name == "SIGKILL" else ""
                return f"killed by {number.name}{hint}"
        return f"exit code {code}"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which a terminal sends to all of them; this
    one sees it afterwards."""
    resource_tracker.ensure_running()  # it would unblock the signal
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _work(channel: channels.Connection, threads: int, models: Sequence[tuple[str, bytes]]) -> None:
    """Body of a process: jobs in, events out, until the other side is closed."""
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # it speaks of odd files
    os.environ["WSICODEC_NUM_THREADS"] = str(threads)
    if not hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(event: Event | None) -> None:
        try:
            channel.send(event)
        except OSError:
            raise SystemExit(1) from None

    take_over(models)
    send(None)
    while True:
        try:
            job = channel.recv()
        except (EOFError, OSError):
            return
        send(run_job(job, send))


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _end_with_parent() -> None:
    """A batch that was killed must not go on writing: its slides are free for the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    # the main thread may be deep within a library
    time.sleep(END_SECONDS)
    os._exit(1)
