"""One slide as a job for another process, and the processes of this machine that take such jobs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection as channels
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

from wsicodec.convert.journal import LOST, Result, process, tree_bytes, tree_mtime_ms
from wsicodec.convert.pipeline import convert
from wsicodec.convert.plan import ConvertSettings
from wsicodec.convert.results import ConvertProgress
from wsicodec.convert.work import work_folder
from wsicodec.errors import (
    RuntimeMissingError,
    SettingsError,
    SlideError,
    UnknownModelError,
    UnsupportedError,
    WsicodecError,
)

REPORT_SECONDS = 0.5
"""Between two messages on how far a conversion is."""
END_SECONDS = 15.0
"""A process that was told to end may tidy up for so long."""
MAX_FALSE_STARTS = 3
"""Processes that may end, one after the other, before they are ready for their first slide."""
_FINAL = (SettingsError, UnsupportedError, UnknownModelError, RuntimeMissingError)
"""Errors that another attempt cannot change."""
_HASH_BLOCK = 2**22


@dataclass(frozen=True)
class Job:
    """A slide to convert, ready to be sent to another process.

    settings: fields of ConvertSettings. replace_ours: an existing target is an earlier output of
    the same batch, and may be replaced when it says that wsicodec wrote it. digest: compute the
    source's SHA-256. reserved: bytes that other conversions may still write on the same disk.
    """

    id: int
    source: str
    target: str
    settings: Mapping[str, Any]
    replace_ours: bool = False
    digest: bool = False
    reserved: int = 0


@dataclass(frozen=True)
class Started:
    """A job has begun. worker: by whom."""

    id: int
    worker: str


@dataclass(frozen=True)
class Advanced:
    """How far a job is. pixels: coded so far, of all levels."""

    id: int
    pixels_done: int
    pixels: int
    bytes_done: int


@dataclass(frozen=True)
class Succeeded:
    """A job's result."""

    id: int
    result: Result


@dataclass(frozen=True)
class Failed:
    """Why a job failed. final: another attempt would fail alike. lost: its process died."""

    id: int
    error: str
    message: str
    final: bool = False
    lost: bool = False


Event = Started | Advanced | Succeeded | Failed
Emit = Callable[[Event], None]


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


# -- in the process that converts --


def packed(settings: ConvertSettings) -> dict[str, Any]:
    """The fields of the settings, in types that can be sent."""
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    return {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()
    }


def run_job(job: Job, emit: Emit) -> Succeeded | Failed:
    """Convert one slide. Errors become Failed; only what ends the process is raised."""
    try:
        return Succeeded(job.id, _convert(job, emit))
    except Exception as error:
        kind = type(error).__name__
        message = str(error) or kind
        if not isinstance(error, WsicodecError):
            message = f"{job.source}: {message}"
        return Failed(job.id, kind, message, final=isinstance(error, _FINAL))


def _convert(job: Job, emit: Emit) -> Result:
    from wsicodec.slide.opening import open_slide

    source, target = Path(job.source), Path(job.target)
    digest = sha256_of(source) if job.digest else None
    with open_slide(source) as slide:
        info = slide.info
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SlideError(f"{target}: folder cannot be made: {reason}") from error
    remove_partial(target)
    fields = dict(job.settings)
    if job.replace_ours and _written_by_us(target):
        fields["overwrite"] = True
    # finished blocks outlive a process that is killed
    settings = ConvertSettings(**{**fields, "resume": True})
    pixels = sum(level.width * level.height for level in info.levels)
    _check_space(target, info.file_bytes, pixels, settings, job.reserved)
    report = convert(source, target, settings, _throttled(job.id, emit))
    size, modified = tree_bytes(target), tree_mtime_ms(target)
    if size is None or modified is None:
        raise SlideError(f"{target}: is gone")
    return Result(
        bytes_in=report.source_bytes,
        bytes_out=size,
        target_mtime_ms=modified,
        seconds=report.seconds,
        mpp_x=info.mpp_x,
        mpp_y=info.mpp_y,
        sha256=digest,
        report=report.as_dict(),
    )


def _throttled(identity: int, emit: Emit) -> Callable[[ConvertProgress], None]:
    last = -REPORT_SECONDS

    def progress(now: ConvertProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            emit(Advanced(identity, now.pixels_done, now.pixels, now.bytes_done))

    return progress


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. Raises SlideError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
    except OSError as error:
        raise SlideError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def remove_partial(target: Path) -> None:
    """Remove partial files that a killed conversion to ``target`` left behind.

    Only for whoever holds the slide in the journal: nobody else is writing this target then.
    """
    head, tail = f".{target.name}.", ".part"
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):  # noqa: PTH208 - names are all that is needed
            if name.startswith(head) and name.endswith(tail):
                middle = name[len(head) : -len(tail)]
                if middle.isascii() and middle.isdecimal():
                    (target.parent / name).unlink(missing_ok=True)


def remove_traces(target: Path) -> None:
    """Remove all that conversions to ``target`` left, finished blocks among it; as above."""
    remove_partial(target)
    shutil.rmtree(work_folder(target), ignore_errors=True)


def _written_by_us(target: Path) -> bool:
    from wsicodec.slide.opening import open_slide

    try:
        with open_slide(target) as slide:
            return slide.info.record is not None
    except (WsicodecError, OSError):
        return False


def _check_space(
    target: Path, source_bytes: int, pixels: int, settings: ConvertSettings, reserved: int
) -> None:
    """Raise SlideError where the disk has no room for what the conversion may take at most.

    The output, and for a moment its finished blocks beside it: half of the source's bytes each, as
    a rule; without loss half of the raw bytes each.
    """
    need = source_bytes
    if settings.lossless and settings.codec != "copy" and not settings.lossless_transcode:
        need = max(need, 3 * pixels)
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError:
        return
    if free - reserved < need:
        beside = f", of which others under way may take {reserved:,}" if reserved else ""
        raise SlideError(
            f"{target}: the disk has {free:,} bytes free{beside}; up to {need:,} are needed"
        )


# -- processes of this machine --


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
            target=_work, args=(theirs, threads), name="wsicodec-batch", daemon=True
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


def _work(channel: channels.Connection, threads: int) -> None:
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
