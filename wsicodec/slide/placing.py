"""Files and folders that appear under their name whole or not at all.

What is written has another name until all of its bytes are on the disk (fsync); then it is renamed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from wsicodec.errors import SlideError, WsicodecError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the folder is not writable",
    errno.EPERM: "the folder is not writable",
    errno.EFBIG: "the file system takes no file of this size",
}


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""``errno`` of what is refused for want of room, by the system or here."""


def refused(target: Path, error: OSError) -> SlideError:
    """What the file system's refusal to write ``target`` is called here; keeps its ``errno``."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    found = SlideError(f"{target}: cannot be written: {reason}")
    found.errno = error.errno
    return found


class _Written:
    """A file being written: what the system says against its methods names the target.

    Not a subclass of a file: any object that ``open`` gives is taken. Without ``fileno``, behind
    which others would write past it.
    """

    def __init__(self, file: BinaryIO, target: Path) -> None:
        self._file = file
        self._target = target

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if not callable(found):
            return found

        def method(*arguments: Any) -> Any:
            with _refusals(self._target):
                return found(*arguments)

        setattr(self, name, method)
        return method

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@contextlib.contextmanager
def atomic_file(target: Path, *, overwrite: bool, part: Path | None = None) -> Iterator[BinaryIO]:
    """Open ``.<name>.<pid>.part`` beside the target; rename it to the target on success.

    part: another name on the same file system, that nobody else writes to: what a process that was
    killed left there is replaced.

    Whatever goes wrong, even a KeyboardInterrupt, removes the part and leaves what was under the
    name before. Raises SlideError, naming the target, for what the file system refuses to do with
    the file; other errors of the body pass as they are.
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
        yield cast(BinaryIO, _Written(file, target))
        with _refusals(target):
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
    not to be replaced. An error of the body that names a file elsewhere passes as it is.
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
    with _refusals(target, part):
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
def _refusals(target: Path, folder: Path | None = None) -> Iterator[None]:
    """Names the target in what the system says; our own errors, some of them OSErrors, pass.

    folder: the one being written, where the target is a folder: an error that names a file other
    than the target and what is in this one passes too.
    """
    try:
        yield
    except (WsicodecError, io.UnsupportedOperation):
        raise
    except OSError as error:
        if folder is not None and isinstance(error.filename, str):
            named = Path(error.filename).absolute()
            if named != target.absolute() and folder.absolute() not in (named, *named.parents):
                raise
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
