"""Files and folders that appear under their name whole or not at all.

What is written has another name until all of its bytes are on the disk (fsync); then it is renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from wsicodec.errors import SlideError, WsicodecError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the folder is not writable",
    errno.EPERM: "the folder is not writable",
    errno.EFBIG: "the file system takes no file of this size",
}


def refused(target: Path, error: OSError) -> SlideError:
    """What the file system's refusal to write ``target`` is called here."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return SlideError(f"{target}: cannot be written: {reason}")


@contextlib.contextmanager
def atomic_file(target: Path, *, overwrite: bool, part: Path | None = None) -> Iterator[BinaryIO]:
    """Open ``.<name>.<pid>.part`` beside the target; rename it to the target on success.

    part: another name on the same file system, that nobody else writes to: what a process that was
    killed left there is replaced.

    Whatever goes wrong, even a KeyboardInterrupt, removes the part and leaves what was under the
    name before. Raises SlideError, naming the target, for what the file system refuses.
    """
    given, part = part, part or _part_of(target)
    file: BinaryIO | None = None
    try:
        with _refusals(target):
            if given is not None:
                part.unlink(missing_ok=True)
            try:
                file = part.open("xb+")
            except FileExistsError:
                raise _written_already(target, part) from None
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if not overwrite:
                _check_new(target)
            part.replace(target)
    except BaseException:
        if file is not None:
            # closing flushes, which fails again on a full disk
            with contextlib.suppress(OSError, ValueError):
                file.close()
            with contextlib.suppress(OSError):
                part.unlink()
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(
    target: Path,
    *,
    overwrite: bool,
    part: Path | None = None,
    check_replaced: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """A new folder ``.<name>.<pid>.part`` beside the target, renamed to it on success.

    part: as in ``atomic_file``. overwrite: replace what is there, in two renames: in between, it is
    ``.<name>.<pid>.old``. check_replaced: raises for what must not be.

    Whatever goes wrong, the part is removed and what was under the name before stays.
    Raises SlideError, naming the target, for what the file system refuses, and for a target that is
    not to be replaced.
    """

    def check() -> None:
        if not target.exists():
            return
        if not overwrite:
            raise SlideError(f"{target}: exists already; left as it is")
        if check_replaced is not None:
            check_replaced(target)

    given, part = part, part or _part_of(target)
    check()
    with _refusals(target):
        if given is not None:
            shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir()
        except FileExistsError:
            raise _written_already(target, part) from None
        try:
            yield part
            _sync_tree(part)
            check()
            _rename(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _check_new(target: Path) -> None:
    if target.exists():
        raise SlideError(f"{target}: was created by someone else meanwhile; left as it is")


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _written_already(target: Path, part: Path) -> SlideError:
    return SlideError(f"{target}: {part.name} exists: is it being written already?")


@contextlib.contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """Names the target in what the system says; our own errors, some of them OSErrors, pass."""
    try:
        yield
    except WsicodecError:
        raise
    except OSError as error:
        raise refused(target, error) from error


def _rename(part: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        if replaces:
            old.rename(target)
        raise
    _sync_folder(target.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Everything below the folder onto the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root) / name, os.O_RDWR)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    """The names in a folder onto the disk, where the system can do that: not all can."""
    with contextlib.suppress(OSError):
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
