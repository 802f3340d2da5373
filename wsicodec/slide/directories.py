"""BigTIFF files of compressed segments as another file has them, byte for byte.

tifffile writes what it can code itself: tiles in multiples of 16, its own choice of JPEG tags, no
segment that several tiles share. Here the directory says what the source's said, and the bytes are
not looked at. Data come first and the directories last, when all sizes are known.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

from wsicodec.errors import SlideError
from wsicodec.slide.protocol import StoredLayout
from wsicodec.slide.transcoding import segment_count

_SHORT, _RATIONAL, _ASCII, _UNDEFINED, _LONG8, _IFD8 = 3, 5, 2, 7, 16, 18
_SHARED_BYTES = 4096  # longer segments are not searched for equals
_SHARED_COUNT = 4096  # different segments that are remembered

Tag = tuple[int, int, int, bytes]
"""Code, type, number of values, and the values as little-endian bytes."""


def ascii_tag(code: int, text: str | bytes) -> Tag:
    """Text; UTF-8 where it is not ASCII, as OME-XML asks for."""
    data = (text if isinstance(text, bytes) else text.encode()) + b"\0"
    return code, _ASCII, len(data), data


def bytes_tag(code: int, data: bytes) -> Tag:
    """Bytes as they are."""
    return code, _UNDEFINED, len(data), data


def resolution_tags(mpp_x: float | None, mpp_y: float | None, downsample: float) -> tuple[Tag, ...]:
    """Pixels per centimetre of a level; mpp_x, mpp_y: µm per pixel of level 0."""
    tags = []
    for code, mpp in ((282, mpp_x or mpp_y), (283, mpp_y or mpp_x)):
        if mpp is None:
            return ()
        value = 1e4 / (mpp * downsample)
        limit = max(1, int((2**32 - 1) / max(value, 1)))
        ratio = Fraction(value).limit_denominator(limit).as_integer_ratio()
        tags.append((code, _RATIONAL, 1, struct.pack("<II", *ratio)))
    return (*tags, _short(296, 3))


@dataclass(frozen=True)
class Directory:
    """An image of the file. offsets, counts: of its segments. children: its smaller versions."""

    layout: StoredLayout
    offsets: array[int]
    counts: array[int]
    tags: tuple[Tag, ...] = ()
    children: tuple[Directory, ...] = ()

    def with_tags(self, tags: Iterable[Tag], children: Sequence[Directory] = ()) -> Directory:
        """The same image with further tags."""
        return Directory(
            self.layout, self.offsets, self.counts, (*self.tags, *tags), tuple(children)
        )


@dataclass
class BigTiff:
    """A BigTIFF file that is being written into an empty file that can seek.

    What the file raises passes through.
    """

    file: BinaryIO
    _shared: dict[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        self._position = 16

    def store(self, layout: StoredLayout, segments: Iterable[bytes]) -> Directory:
        """Write an image's segments, consumed one at a time; empty ones have no place in the file.

        Small segments that are alike are stored once. Raises SlideError where they are not as many
        as the layout has.
        """
        offsets, counts = array("Q"), array("Q")
        for segment in segments:
            offsets.append(self._put(segment) if segment else 0)
            counts.append(len(segment))
        if len(offsets) != segment_count(layout):
            raise SlideError(f"{len(offsets)} of {segment_count(layout)} tiles came to be written")
        return Directory(layout, offsets, counts)

    def finish(self, directories: Sequence[Directory]) -> None:
        """Write the directories, their children as SubIFDs, and close the chain."""
        links = [8]  # where the place of the next directory is written
        places = []
        for directory in directories:
            children = array("Q", [self._write(child)[0] for child in directory.children])
            tags = [(330, _IFD8, len(children), children.tobytes())] if children else []
            place, link = self._write(directory.with_tags(tags))
            places.append(place)
            links.append(link)
        for link, place in zip(links, places, strict=False):
            self.file.seek(link)
            self.file.write(_pack64(place))
        self.file.seek(self._position)

    def _put(self, data: bytes) -> int:
        key = None
        if len(data) <= _SHARED_BYTES:
            key = hashlib.blake2b(data, digest_size=24).digest()
            if (known := self._shared.get(key)) is not None:
                return known
        place = self._append(data)
        if key is not None and len(self._shared) < _SHARED_COUNT:
            self._shared[key] = place
        return place

    def _append(self, data: bytes) -> int:
        padding = -self._position % 2
        self.file.write(b"\0" * padding + data)
        place = self._position + padding
        self._position = place + len(data)
        return place

    def _write(self, directory: Directory) -> tuple[int, int]:
        """Places of a directory, and of the link to the next one behind it."""
        tags = sorted([*_layout_tags(directory), *directory.tags])
        entries = []
        for code, kind, count, data in tags:
            value = data.ljust(8, b"\0") if len(data) <= 8 else _pack64(self._append(data))
            entries.append(struct.pack("<HHQ", code, kind, count) + value)
        place = self._append(_pack64(len(entries)) + b"".join(entries) + bytes(8))
        return place, self._position - 8


def _layout_tags(directory: Directory) -> list[Tag]:
    layout = directory.layout
    tags = [
        _long(256, layout.width),
        _long(257, layout.height),
        _short(258, 8, 8, 8),
        _short(259, layout.compression),
        _short(262, layout.photometric),
        _short(277, 3),
        _short(284, layout.planarconfig),
    ]
    places, sizes = (273, 279) if layout.tile is None else (324, 325)
    if layout.tile is None:
        tags.append(_long(278, layout.rows_per_strip or layout.height))
    else:
        tags += [_long(322, layout.tile[1]), _long(323, layout.tile[0])]
    tags += [_long(places, *directory.offsets), _long(sizes, *directory.counts)]
    if layout.predictor != 1:
        tags.append(_short(317, layout.predictor))
    if layout.subsampling is not None:
        tags.append(_short(530, *layout.subsampling))
    if layout.jpegtables is not None:
        tags.append(bytes_tag(347, layout.jpegtables))
    return tags


def subfile_tag(kind: int) -> Tag:
    """NewSubfileType: 1 for a smaller version of another image."""
    return _long(254, kind)


def _short(code: int, *values: int) -> Tag:
    return code, _SHORT, len(values), struct.pack(f"<{len(values)}H", *values)


def _long(code: int, *values: int) -> Tag:
    return code, _LONG8, len(values), struct.pack(f"<{len(values)}Q", *values)


def _pack64(value: int) -> bytes:
    return struct.pack("<Q", value)
