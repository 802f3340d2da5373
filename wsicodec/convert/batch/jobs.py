"""One slide as a job for another process: what it is told, what it tells, and how it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wsicodec.convert.batch.rows import Result
from wsicodec.convert.batch.trees import tree_bytes, tree_mtime_ms
from wsicodec.convert.pipeline import convert
from wsicodec.convert.plan import ConvertSettings, is_zarr
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
from wsicodec.slide.placing import NO_ROOM, left_behind, put_back

REPORT_SECONDS = 0.5
"""Between two messages on how far a conversion is."""
_FINAL = (SettingsError, UnsupportedError, UnknownModelError, RuntimeMissingError)
"""Errors that another attempt cannot change."""
_HASH_BLOCK = 2**22


@dataclass(frozen=True)
class Job:
    """A slide to convert, ready to be sent to another process.

    settings: fields of ConvertSettings. replace_ours: an existing target is an earlier output of
    the same batch, and may be replaced when it says that wsicodec wrote it. digest: compute the
    source's SHA-256. reserved: bytes that other conversions may still need on the same disk.
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
    """Why a job failed. final: another attempt would fail alike. lost: its process died.

    no_room: the disk was full; what is done is worth keeping.
    """

    id: int
    error: str
    message: str
    final: bool = False
    lost: bool = False
    no_room: bool = False


Event = Started | Advanced | Succeeded | Failed
Emit = Callable[[Event], None]


def run_job(job: Job, emit: Emit) -> Succeeded | Failed:
    """Convert one slide. Errors become Failed; only what ends the process is raised."""
    try:
        return Succeeded(job.id, _convert(job, emit))
    except Exception as error:
        kind = type(error).__name__
        message = str(error) or kind
        if not isinstance(error, WsicodecError):
            message = f"{job.source}: {message}"
        return Failed(
            job.id,
            kind,
            message,
            final=isinstance(error, _FINAL),
            no_room=isinstance(error, OSError) and error.errno in NO_ROOM,
        )


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
    if is_zarr(target):
        # an earlier output of ours that was set aside must be seen, to be replaced
        put_back(target)
    fields = dict(job.settings)
    if job.replace_ours and _written_by_us(target):
        fields["overwrite"] = True
    settings = ConvertSettings(**fields)
    # finished blocks outlive a process that is killed
    settings = dataclasses.replace(settings, resume=not settings.keeps_streams)
    report = convert(source, target, settings, _throttled(job.id, emit), reserved=job.reserved)
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
    """Remove partial files and folders that a killed conversion to ``target`` left behind.

    Only for whoever holds the slide in the journal: nobody else is writing this target then.
    """
    for part in left_behind(target, "part"):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove_traces(target: Path) -> None:
    """Remove all that conversions to ``target`` left, finished blocks among it.

    A folder that somebody works in at this moment, who knows nothing of the journal, stays.
    """
    remove_partial(target)
    folder = work_folder(target)
    try:
        # without creating one where there is none
        with (folder / "lock").open("rb+") as lock:
            if _lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return


def _lock(file: IO[bytes]) -> bool:
    """False where another process has the lock of a work folder."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # network file systems without locks
        return True
    return True


def _written_by_us(target: Path) -> bool:
    from wsicodec.slide.opening import open_slide

    try:
        with open_slide(target) as slide:
            return slide.info.record is not None
    except (WsicodecError, OSError):
        return False
