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
    ``.<name>.<pid>.old``, from where ``put_back`` fetches it if the process is killed right then,
    as this does at its start. check_replaced: raises for what must not be.

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
    if put_back(target) and not overwrite:
        raise SlideError(f"{target}: {IS_BACK}; left as it is")
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


IS_BACK = "was set aside by a process that was killed while it replaced it, and is back"
"""What is to be said of a target when ``put_back`` returns True."""


def put_back(target: Path) -> bool:
    """Settle what a process left that was killed while it replaced a folder.

    For whoever alone writes the target. Where nothing is under the name, the folder that was there
    gets it again: it may be the only copy. True then. Where something is, the folder stays aside,
    until the target is replaced once more. Raises SlideError for what the file system refuses.
    """
    for left in left_behind(target, "gone"):
        shutil.rmtree(left, ignore_errors=True)
    aside = _set_aside(target)
    if not aside or os.path.lexists(target):
        return False
    with _refusals(target):
        # a rename changes this time: the one that was set aside last
        max(aside, key=lambda path: path.lstat().st_ctime_ns).rename(target)
    _sync_folder(target.parent)
    return True


def left_behind(target: Path, ending: str) -> list[Path]:
    """What lies beside the target as ``.<name>.<pid>.<ending>``; nothing in a missing folder."""
    head, tail = f".{target.name}.", f".{ending}"
    try:
        names = os.listdir(target.parent)  # noqa: PTH208 - names are all that is needed
    except OSError:
        return []
    found = []
    for name in names:
        middle = name[len(head) : -len(tail)]
        if name == head + middle + tail and middle.isascii() and middle.isdecimal():
            found.append(target.parent / name)
    return found


def _set_aside(target: Path) -> list[Path]:
    return [path for path in left_behind(target, "old") if path.is_dir()]


def _discard(old: Path) -> None:
    """Remove a folder that was set aside, as far as the system lets us.

    Under another name, by which ``put_back`` tells it from a whole one.
    """
    if old.is_symlink():
        with contextlib.suppress(OSError):
            old.unlink()
        return
    gone = old.with_suffix(".gone")
    with contextlib.suppress(OSError):
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


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
    number = os.getpid()
    while os.path.lexists(old := target.with_name(f".{target.name}.{number}.old")):
        number += 1  # left by a process of the same number that was killed
    replaces = target.exists()
    try:
        if replaces:
            target.rename(old)
        part.rename(target)
    except BaseException:
        if replaces and not os.path.lexists(target):
            old.rename(target)
        raise
    _sync_folder(target.parent)
    if replaces:
        for path in _set_aside(target):
            _discard(path)


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
