"""Looks for texts in files, in every way in which a file of ours may hold a text."""

from __future__ import annotations

import bisect
import functools
import html
import json
import os
import urllib.parse
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np

from wsicodec.errors import SlideError
from wsicodec.slide.passport import TAG_PASSPORT
from wsicodec.slide.record import TAG_MODEL

MIN_SECRET = 4
"""Characters of the shortest text that is looked for; shorter ones occur by chance."""
_CERTAIN_BYTES = 7  # shorter patterns turn up in gigabytes of compressed pixels by chance
_CHUNK = 2**22
_SEPARATORS = (" ", "\n", "\r\n", "_", "+", "^")
"""Between the words of a value, elsewhere. DICOM writes names with ``^``."""


def leaks(path: str | Path, secrets: Collection[str]) -> list[str]:
    """Which of ``secrets`` a file holds, or a folder (OME-Zarr) with the names of all its files.

    secrets: of at least MIN_SECRET characters; shorter ones are passed over.
    Looked for in UTF-8 and in UTF-16 of either byte order, plain and as JSON, XML and addresses
    escape them; as they are, in upper and in lower case, and with other white space (a line break,
    an underscore) between their words.
    Reads in pieces: memory does not follow the size of the file. Patterns of fewer than seven bytes
    would be found by chance in compressed pixels: they are looked for outside of the coded tiles of
    a TIFF and of the chunks of a zarr, and only where no letter or digit continues them.

    Raises SlideError where a file cannot be read.
    """
    target = Path(path)
    search = _Search(secrets)
    found: set[str] = set()
    if target.is_dir():
        for inner in sorted(target.rglob("*")):
            name = inner.relative_to(target).as_posix()
            found.update(secret for secret in search.secrets if holds(os.fsencode(name), secret))
            if inner.is_file():
                pixels = [] if inner.suffix == ".json" else [(0, 2**63)]
                found.update(search.file(inner, pixels))
    else:
        pixels = tile_ranges(target) if search.shortest < _CERTAIN_BYTES else []
        found.update(search.file(target, pixels))
    return sorted(found)


class _Search:
    """Looks for many patterns at once, by their first four bytes.

    secrets: that are looked for. shortest: bytes of the shortest pattern.
    """

    def __init__(self, secrets: Collection[str]) -> None:
        self.secrets = sorted(secret for secret in secrets if len(secret) >= MIN_SECRET)
        self._by_start: dict[bytes, list[tuple[bytes, str]]] = {}
        # one table for bytes 0 and 1 of a pattern, one for bytes 2 and 3
        self._tables = np.zeros((2, 2**16), np.bool_)
        self.shortest = self._longest = _CERTAIN_BYTES
        for secret in self.secrets:
            for pattern in _patterns(secret):
                self._by_start.setdefault(pattern[:4], []).append((pattern, secret))
                for table, start in zip(self._tables, (0, 2), strict=True):
                    table[int.from_bytes(pattern[start : start + 2], "little")] = True
                self.shortest = min(self.shortest, len(pattern))
                self._longest = max(self._longest, len(pattern))

    def file(self, path: Path, pixels: list[tuple[int, int]]) -> set[str]:
        """Secrets in a file. pixels: sorted (start, end) of coded pixels."""
        found: set[str] = set()
        try:
            with path.open("rb") as file:
                tail, begin, block = b"", 0, file.read(_CHUNK)
                while block:
                    following = file.read(_CHUNK)
                    data = tail + block
                    for place, pattern, secret in self._matches(data):
                        end = place + len(pattern)
                        # what touches a border is seen with its neighbours in another turn
                        if (begin and not place) or (following and end == len(data)):
                            continue
                        if secret not in found and _counts(data, place, pattern, begin, pixels):
                            found.add(secret)
                    tail = data[-self._longest - 1 :]
                    begin += len(data) - len(tail)
                    block = following
        except OSError as error:
            raise SlideError(f"{path}: cannot be read: {error.strerror or error}") from error
        return found

    def _matches(self, data: bytes) -> Iterator[tuple[int, bytes, str]]:
        for odd in (0, 1):
            words = np.frombuffer(data, "<u2", (len(data) - odd) // 2, odd)
            first = np.flatnonzero(self._tables[0][words[:-1]])
            for index in first[self._tables[1][words[first + 1]]].tolist():
                place = 2 * index + odd
                for pattern, secret in self._by_start.get(data[place : place + 4], ()):
                    if data.startswith(pattern, place):
                        yield place, pattern, secret


def _counts(
    data: bytes, place: int, pattern: bytes, begin: int, ranges: list[tuple[int, int]]
) -> bool:
    """True unless a short pattern may be chance: among pixels, or as a part of a longer word."""
    if len(pattern) >= _CERTAIN_BYTES:
        return True
    end = place + len(pattern)
    if data[place - 1 : place].isalnum() or data[end : end + 1].isalnum():
        return False
    # the last range that starts at or before the place
    index = bisect.bisect_right(ranges, (begin + place, 2**63)) - 1
    return index < 0 or begin + place >= ranges[index][1]


def forms(secret: str) -> list[str]:
    """A secret in each case, with each of the usual separators between its words."""
    words = secret.split()
    spaced = [secret, *(between.join(words) for between in _SEPARATORS)]
    cased = [form for text in spaced for form in (text, text.upper(), text.lower())]
    return list(dict.fromkeys(cased if len(words) > 1 else cased[:3]))


@functools.lru_cache(2**13)
def _patterns(secret: str) -> tuple[bytes, ...]:
    """A secret as a file may hold it."""
    ways: list[Callable[[str], str]] = [
        lambda text: text,
        lambda text: json.dumps(text)[1:-1],
        lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
        lambda text: html.escape(text, quote=False),
        html.escape,
        lambda text: html.escape(text, quote=False).replace('"', "&quot;"),
        lambda text: html.escape(text, quote=False).encode("ascii", "xmlcharrefreplace").decode(),
    ]
    ways += [lambda text: urllib.parse.quote(text, "", errors="surrogatepass")]
    found: dict[bytes, None] = {}
    for text in (way(form) for form in forms(secret) for way in ways):
        found.setdefault(text.encode("utf-8", "surrogatepass"))
        # without its last byte, and in big-endian its first, both orders are the same bytes
        wide = text.encode("utf-16-be", "surrogatepass")
        found.setdefault(wide[1:] if text.isascii() else wide)
        if not text.isascii():
            found.setdefault(text.encode("utf-16-le", "surrogatepass"))
            found.setdefault(text.encode("latin-1", "replace"))
    return tuple(found)


def holds(data: bytes, secret: str) -> bool:
    """True if bytes hold a text, in any encoding that ``leaks`` knows."""
    return any(pattern in data for pattern in _patterns(secret))


def occurs(text: str, words: str) -> bool:
    """True if ``leaks`` would find a text in plain words; both in the same case."""
    place = words.find(text)
    while place >= 0:
        end = place + len(text)
        around = words[max(0, place - 1) : place] + words[end : end + 1]
        if len(text) >= _CERTAIN_BYTES or not any(map(str.isalnum, around)):
            return True
        place = words.find(text, place + 1)
    return False


def tile_ranges(path: Path) -> list[tuple[int, int]]:
    """(start, end) of what is binary in a TIFF: coded tiles, strips, model, tile maps; in order.

    Empty for another file.
    """
    import tifffile

    ranges: set[tuple[int, int]] = set()
    try:
        with tifffile.TiffFile(path) as tiff:
            for frame in tiff.pages:
                page = frame.aspage()
                for inner in (page, *(sub.aspage() for sub in page.pages or ())):
                    places = zip(inner.dataoffsets, inner.databytecounts, strict=False)
                    ranges.update((start, start + count) for start, count in places if count)
                for code in (TAG_MODEL, TAG_PASSPORT):
                    if (tag := page.tags.get(code)) is not None:
                        ranges.add((tag.valueoffset, tag.valueoffset + tag.valuebytecount))
    except Exception:  # any other file, or a broken one: no tiles to spare
        return []
    return sorted(ranges)
