"""Which slide is being converted: its digest for the record, and whether it stays what it was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

from wsicodec.errors import SlideError
from wsicodec.slide.parts import files_below, slide_files
from wsicodec.slide.protocol import SlideInfo
from wsicodec.slide.record import SourceIdentity

_HASHED = 2**22  # bytes read at once
_PIECE = 2**20  # bytes looked at, at the start, at the end, and here and there between
_PIECES = 16  # between start and end, of all files together
_SMALL_PIECE = 2**16  # where a slide is many files
_MANY = 16
_LOOKED_INTO = 64  # files, of those in a folder that has more
_OF_SEVERAL_FILES = ("hamamatsu", "dicom")  # by what OpenSlide reads in them


class Source:
    """The files of a slide, as they are when a conversion begins.

    content: tells the slide from another one, and from itself after a change, without reading all
    of it: by names and sizes of all its files, and bytes from start, end and between of each; in a
    folder of many, of some. When they were changed is no part of it: a copy is the same slide.

    Raises SlideError where they cannot be looked at.
    """

    def __init__(self, info: SlideInfo) -> None:
        self._info = info
        several = info.format in _OF_SEVERAL_FILES and not info.path.is_dir()
        self._properties = _properties(info.path) if several else {}
        self.content, self._times, self._times_beside = self._look()

    def check_unchanged(self, identity: SourceIdentity | None) -> None:
        """Raise SlideError where the slide is not what it was: tiles of two are no slide.

        identity: by the digest of the whole file, where there is one: what has another time now,
        and seems to have the same content, must have this one. It says nothing of the other files
        of a slide of several: those must have their times, too.
        """
        content, times, beside = self._look()
        same = content == self.content and beside == self._times_beside
        if same and times != self._times and identity is not None:
            again = SourceDigest(self._info)
            try:
                same = again.identity() == identity
            finally:
                again.stop()
        if not same:
            raise SlideError(
                f"{self._info.path}: changed while it was converted; nothing was written"
            )

    def _look(self) -> tuple[str, str, str]:
        """Digests of content, of the time of the file that has a digest, and of the others'."""
        path = self._info.path
        content, times, beside = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        try:
            files = self._files()
            step = -(-len(files) // _LOOKED_INTO)
            for number, file in enumerate(files):
                status = _status(file)
                name = "" if file == path else os.path.relpath(file, path)
                kind = stat.S_IFMT(status.st_mode)
                content.update(repr((name, kind, status.st_size)).encode())
                (times if file == path else beside).update(repr(status.st_mtime_ns).encode())
                if number % step == 0 and stat.S_ISREG(status.st_mode):
                    content.update(_sampled(file, status.st_size, len(files)))
        except OSError as error:
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"{path}: {error.strerror or error}") from error
        return content.hexdigest(), times.hexdigest(), beside.hexdigest()

    def _files(self) -> list[Path]:
        path = self._info.path
        if path.is_dir():
            return sorted(file for file in files_below(path) if not _hidden(file, path))
        return slide_files(path, self._info.format, self._properties)


def _hidden(file: Path, folder: Path) -> bool:
    """Left by file managers and network file systems; metadata of Zarr 2 is not."""
    names = file.relative_to(folder).parts
    return any(name.startswith(".") and not name.startswith(".z") for name in names)


def _status(file: Path) -> os.stat_result:
    """Of a link that leads nowhere, its own."""
    try:
        return file.stat()
    except FileNotFoundError:
        return file.lstat()


def _sampled(path: Path, size: int, files: int) -> bytes:
    """SHA-256 of bytes of a file of a slide that has so many files."""
    piece = _PIECE if files <= _MANY else _SMALL_PIECE
    between = _PIECES // files
    last = max(0, size - piece)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(between + 2):
            file.seek(last * number // (between + 1))
            digest.update(file.read(piece))
    return digest.digest()


def _properties(path: Path) -> Mapping[str, str]:
    """What OpenSlide says of a slide; nothing of a file that it does not read."""
    with contextlib.suppress(ImportError):
        import openslide

        with (
            contextlib.suppress(openslide.OpenSlideError, OSError),
            openslide.OpenSlide(path) as slide,
        ):
            return dict(slide.properties)
    return {}


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
