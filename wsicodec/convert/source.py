"""Which slide is being converted: its digest for the record, and whether it stays what it was."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from wsicodec.errors import SlideError
from wsicodec.slide.protocol import SlideInfo
from wsicodec.slide.record import SourceIdentity

_HASHED = 2**22  # bytes read at once
_START = 2**16  # bytes of a file's start that tell it from others of its size and time


def fingerprint(path: Path) -> str:
    """Tells a slide from another one, and from itself after a change, without reading all of it.

    By size, time and first bytes of its file, or sizes and times of all files in a folder: an
    OME-Zarr is one, and MIRAX keeps its pixels in one beside the file. Raises SlideError where they
    cannot be looked at.
    """
    found = hashlib.sha256()
    try:
        folder = path.with_suffix("") if path.suffix.lower() == ".mrxs" else path
        if folder.is_dir():
            for root, folders, names in os.walk(folder):
                folders.sort()
                for name in sorted(names):
                    status = (Path(root) / name).stat()
                    place = os.path.relpath(root, folder), name
                    found.update(repr((*place, status.st_size, status.st_mtime_ns)).encode())
        if not path.is_dir():
            status = path.stat()
            found.update(repr((status.st_size, status.st_mtime_ns)).encode())
            with path.open("rb") as file:
                found.update(file.read(_START))
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}") from error
    return found.hexdigest()


def check_unchanged(path: Path, before: str) -> None:
    """Raise SlideError where a slide is not what ``fingerprint`` saw: tiles of two are no slide."""
    if fingerprint(path) != before:
        raise SlideError(f"{path}: changed while it was converted; nothing was written")


class SourceDigest:
    """SHA-256 of a slide's file, computed while other things happen."""

    def __init__(self, info: SlideInfo) -> None:
        self._info = info
        self._sha256: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wsicodec-digest", daemon=True)
        self._thread.start()

    def identity(self) -> SourceIdentity | None:
        """The source's identity; None where the file could not be read to its end."""
        self._thread.join()
        if self._sha256 is None:
            return None
        info = self._info
        return SourceIdentity(self._sha256, info.file_bytes, info.format, info.compression)

    def stop(self) -> None:
        """Nobody will ask."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        digest = hashlib.sha256()
        try:
            with self._info.path.open("rb") as file:
                while part := file.read(_HASHED):
                    if self._stopped.is_set():
                        return
                    digest.update(part)
        except OSError:
            return  # reading its tiles says why
        self._sha256 = digest.hexdigest()
