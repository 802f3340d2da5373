"""Walks the directories of a TIFF before they are trusted: nothing may be missing without a word.

TIFF libraries leave out what they cannot read, and log it at most: directories behind a broken
link, tags whose values lie beyond the end. From a slide that was cut short that would take levels,
the label, the colour profile or the resolution in silence.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsicodec.errors import LimitError, SlideError
from wsicodec.slide.pages import SlideFile
from wsicodec.slide.passport import TAG_PASSPORT
from wsicodec.slide.record import TAG_MODEL, TAG_RECORD

MAX_DIRECTORIES = 4096
"""Directories and sub-directories of a file; slides have a few dozen."""
_MAX_TAGS = 4096

_SUB_DIRECTORIES = 330
_PLACES = ((324, 325), (273, 279))  # offsets and byte counts of tiles, of strips
_SIDES = ((257, 323), (256, 322))  # height and width of the image, of its tiles
# the tags that a slide is read by; another's broken value is no loss that would show
_READ = frozenset(
    {
        254, *range(256, 260), 262, 266, 270, 273, *range(277, 280), 282, 283, 284, 285, 296, 305,
        306, 317, 320, *range(322, 326), _SUB_DIRECTORIES, 338, 339, 347, 530, 532, 34675,
        TAG_RECORD, TAG_MODEL, TAG_PASSPORT,
    }
)  # fmt: skip
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
               16: 8, 17: 8, 18: 8}  # fmt: skip
_INTEGERS = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}

Integers = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class _Kind:
    """How a TIFF counts. order: ``<`` or ``>``. count, link: bytes of the number of a directory's
    tags, and of an offset."""

    order: str
    count: int
    link: int

    def number(self, data: bytes, size: int, start: int = 0) -> int:
        """An unsigned integer of ``size`` bytes."""
        return int.from_bytes(data[start : start + size], "little" if self.order == "<" else "big")


def check_chain(file: SlideFile, where: str) -> None:
    """Check that all directories of a TIFF, their tags and their tiles lie within the file.

    where: names the file in messages. Reads the directories, and of values only the places of
    tiles and of sub-directories. Classic TIFF with offsets of 64 bits, as Hamamatsu writes it, is
    another format.

    Raises SlideError naming the first directory, tag or tile that is not there, LimitError for more
    than MAX_DIRECTORIES.
    """
    kind, first = _header(file, where)
    seen: set[int] = set()
    links = [(first, f"{where}: TIFF directory 0", True)]
    main = read = 0
    while links:
        place, name, in_chain = links.pop()
        if place in seen:
            raise SlideError(f"{name}: its place {place} is that of an earlier one: a circle")
        if len(seen) == MAX_DIRECTORIES:
            raise LimitError(f"{where}: more than {MAX_DIRECTORIES} TIFF directories")
        seen.add(place)
        tags, following = _directory(file, kind, place, name)
        values = dict(_values(file, kind, tags, name))
        read += sum(array.nbytes for array in values.values())
        if read > file.size:
            # or a few bytes, named again and again, would be read for hours
            raise SlideError(f"{name}: its values lie on those of others: the file is damaged")
        _check_places(file, values, name)
        # some writers have a zero for a level that they left out
        children = [int(child) for child in values.get(_SUB_DIRECTORIES, ()) if child >= 8]
        if in_chain:
            main += 1
            if following:
                links.append((following, f"{where}: TIFF directory {main}", True))
        if len(children) > MAX_DIRECTORIES:
            raise LimitError(f"{where}: more than {MAX_DIRECTORIES} TIFF directories")
        links += [
            (child, f"{name}: sub-directory {index}", False) for index, child in enumerate(children)
        ][::-1]


def _header(file: SlideFile, where: str) -> tuple[_Kind, int]:
    start = file.read(0, min(16, file.size), where)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    kinds = {42: (2, 4), 43: (8, 8)}
    version = struct.unpack(f"{order}H", start[2:4])[0] if order and len(start) >= 4 else 0
    if order is None or version not in kinds:
        raise SlideError(f"{where}: has no header of a TIFF file")
    kind = _Kind(order, *kinds[version])
    link = 4 if version == 42 else 8
    if len(start) < link + kind.link:
        raise SlideError(f"{where}: ends within the TIFF header")
    first = kind.number(start, kind.link, link)
    if not first:
        raise SlideError(f"{where}: TIFF file without images")
    return kind, first


def _directory(
    file: SlideFile, kind: _Kind, place: int, name: str
) -> tuple[list[tuple[int, int, int, int]], int]:
    """((code, type, count, place of the value) of each tag, place of the next directory)."""
    count = kind.number(file.read(place, kind.count, name), kind.count)
    if not 1 <= count <= _MAX_TAGS:
        raise SlideError(f"{name}: {count} tags: the TIFF structure is damaged")
    entry = 4 + 2 * kind.link
    start = place + kind.count
    data = file.read(start, count * entry + kind.link, name)
    tags = []
    for index in range(count):
        at = index * entry
        code, value_type = kind.number(data, 2, at), kind.number(data, 2, at + 2)
        values = kind.number(data, kind.link, at + 4)
        value_at = start + at + 4 + kind.link
        if values * _TYPE_BYTES.get(value_type, 0) > kind.link:
            value_at = kind.number(data, kind.link, at + 4 + kind.link)
        tags.append((code, value_type, values, value_at))
    return tags, kind.number(data, kind.link, count * entry)


def _values(
    file: SlideFile, kind: _Kind, tags: list[tuple[int, int, int, int]], name: str
) -> Iterator[tuple[int, Integers]]:
    """Values by tag, of those that are needed here; all tags that are read lie within the file."""
    seen: set[int] = set()
    wanted = {_SUB_DIRECTORIES, *(code for pair in (*_PLACES, *_SIDES) for code in pair)}
    for code, value_type, count, place in tags:
        if code not in _READ or code in seen:
            continue  # of a tag that is there twice, the first counts for tifffile
        seen.add(code)
        size = count * _TYPE_BYTES.get(value_type, 0)
        if place + size > file.size:
            raise SlideError(
                f"{name}: the value of tag {code} ({size} bytes) lies beyond the file's end at "
                f"{file.size}: the file was cut short or is damaged"
            )
        if code in wanted and value_type in _INTEGERS:
            data = file.read(place, size, name)
            yield code, np.frombuffer(data, kind.order + _INTEGERS[value_type])


def _check_places(file: SlideFile, values: dict[int, Integers], name: str) -> None:
    """Raise SlideError for the first tile or strip that is not within the file."""
    for places, sizes in _PLACES:
        if places not in values or sizes not in values:
            continue
        count = min(values[places].size, values[sizes].size)
        # as floats: 64-bit sums could overflow, and 2^53 bytes are more than any file has
        ends = values[places][:count].astype(np.float64) + values[sizes][:count]
        beyond = np.flatnonzero((ends > file.size) & (values[sizes][:count] > 0))
        if beyond.size:
            index = int(beyond[0])
            raise SlideError(
                f"{name}: {_place_of(index, values)} of {count} ends at {ends[index]:.0f}, beyond "
                f"the file's end at {file.size}: the file was cut short or is damaged"
            )


def _place_of(index: int, values: dict[int, Integers]) -> str:
    """A tile by row and column, as other messages have it; a strip by number."""
    known = {code: int(array[0]) for code, array in values.items() if array.size == 1}
    sides = [(known.get(whole, 0), known.get(tile, 0)) for whole, tile in _SIDES]
    if not all(tile for _, tile in sides):
        return f"strip {index}"
    rows, columns = (max(1, -(-whole // tile)) for whole, tile in sides)
    row, column = divmod(index % (rows * columns), columns)  # planes come one after the other
    return f"tile at row {row}, column {column}"
