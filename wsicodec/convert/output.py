"""A file that appears under its name whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
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


@contextlib.contextmanager
def atomic_file(target: Path, *, overwrite: bool, part: Path | None = None) -> Iterator[BinaryIO]:
    """Open ``.<name>.<pid>.part`` beside the target; rename it to the target on success.

    part: another name on the same file system, that nobody else writes to: what a process that was
    killed left there is replaced.

    The bytes are on the disk (fsync) before the name changes. Whatever goes wrong, even a
    KeyboardInterrupt, removes the part and leaves what was under the name before.

    Raises SlideError, naming the target, for what the file system refuses.
    """
    given, part = part, part or target.with_name(f".{target.name}.{os.getpid()}.part")
    file: BinaryIO | None = None
    ours = True
    try:
        try:
            if given is not None:
                part.unlink(missing_ok=True)
            file = part.open("xb+")
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if target.exists() and not overwrite:
                raise SlideError(f"{target}: was created by someone else meanwhile; left as it is")
            part.replace(target)
        except OSError as error:
            if isinstance(error, WsicodecError):
                raise
            if file is None and isinstance(error, FileExistsError):
                ours = False
                raise SlideError(
                    f"{target}: {part.name} exists: is it being written already?"
                ) from None
            raise refused(target, error) from error
    except BaseException:
        # closing flushes, which fails again on a full disk
        with contextlib.suppress(OSError, ValueError):
            if file is not None:
                file.close()
        if ours:
            with contextlib.suppress(OSError):
                part.unlink()
        raise
    _sync_folder(target.parent)


def refused(target: Path, error: OSError) -> SlideError:
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return SlideError(f"{target}: cannot be written: {reason}")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
