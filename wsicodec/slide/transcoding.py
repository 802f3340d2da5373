"""What a file of transcoded JPEG tiles needs to give the JPEG tiles back, bit by bit.

``TAG_TRANSCODE`` (UNDEFINED, in the directory of level 0; a literal of the format) holds, little
endian: ``WSTC``, version (1 byte), length of a JSON header (4 bytes), the header, the parts whose
lengths it tells, CRC-32 of all before. Per level these parts are the JPEG tables, one byte of
``Way`` and four of CRC-32 for each tile or strip, and the bytes of those kept as they were.
"""

from __future__ import annotations

import enum
import hashlib
import json
import struct
import sys
import zlib
from array import array
from dataclasses import dataclass
from typing import Any

from wsicodec.errors import ChecksumError, FormatError, LimitError, UnsupportedError
from wsicodec.slide.protocol import StoredLayout

TAG_TRANSCODE = 60646
MAGIC = b"WSTC"
VERSION = 1
MAX_BYTES = 2**28
MAX_HEADER_BYTES = 2**22
MAX_LEVELS = 32
MAX_SEGMENTS = 2**25
MAX_TABLES_BYTES = 2**20
MAX_KEPT_BYTES = 2**26
"""Tiles kept beside their transcoded pixels, over all levels: more, and `copy` is the better way"""

_HEAD = struct.Struct("<4sBI")
_CRC = struct.Struct("<I")


class Way(enum.IntEnum):
    """How the tile or strip of the file comes from the one of the source.

    LEFT_OUT: the source has none, the file a white one. COPIED: the same bytes.
    TRANSCODED: JPEG-XL of the JPEG stream with its tables; AS_RGB: and with an Adobe segment that
    says it is RGB. KEPT: JPEG-XL of the pixels, and the source's bytes in the tag.
    """

    LEFT_OUT = 0
    COPIED = 1
    TRANSCODED = 2
    AS_RGB = 3
    KEPT = 4


@dataclass(frozen=True)
class LevelOrigin:
    """One level as the source had it.

    layout: of the source's directory. ways: a ``Way`` for each segment; checks: CRC-32 of each,
    zero where left out. sha256: of tables and segments, see ``LevelDigest``. kept: bytes of the
    segments of way KEPT, in their order.
    """

    layout: StoredLayout
    ways: bytes
    checks: array[int]
    sha256: bytes
    kept: tuple[bytes, ...] = ()


class LevelDigest:
    """SHA-256 over the tables and segments of a level, each behind its length in eight bytes."""

    def __init__(self, tables: bytes | None) -> None:
        self._hash = hashlib.sha256()
        self.add(tables or b"")

    def add(self, data: bytes) -> None:
        """The next segment; empty for one that is left out."""
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def digest(self) -> bytes:
        """32 bytes."""
        return self._hash.digest()


def segment_count(layout: StoredLayout) -> int:
    """Tiles or strips of one plane of an image."""
    if layout.tile is None:
        rows = layout.rows_per_strip or layout.height
        return -(-layout.height // rows)
    tall, wide = layout.tile
    return -(-layout.height // tall) * -(-layout.width // wide)


def pack_origins(levels: tuple[LevelOrigin, ...]) -> bytes:
    """Value of the tag. Raises LimitError for what no reader would accept."""
    header: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for level in levels:
        layout = level.layout
        tables = layout.jpegtables
        header.append(
            {
                "height": layout.height,
                "width": layout.width,
                "compression": layout.compression,
                "photometric": layout.photometric,
                "tile": None if layout.tile is None else list(layout.tile),
                "rows_per_strip": layout.rows_per_strip,
                "subsampling": None if layout.subsampling is None else list(layout.subsampling),
                "predictor": layout.predictor,
                "tables": None if tables is None else len(tables),
                "segments": len(level.ways),
                "kept": [len(segment) for segment in level.kept],
                "sha256": level.sha256.hex(),
            }
        )
        parts += [tables or b"", level.ways, _little(level.checks).tobytes()]
        parts += level.kept
    text = json.dumps({"levels": header}, sort_keys=True).encode("ascii")
    data = b"".join([_HEAD.pack(MAGIC, VERSION, len(text)), text, *parts])
    if len(levels) > MAX_LEVELS or len(text) > MAX_HEADER_BYTES or len(data) > MAX_BYTES - 4:
        raise LimitError(f"{len(data)} bytes to restore {len(levels)} levels are too many")
    return data + _CRC.pack(zlib.crc32(data))


def parse_origins(data: bytes) -> tuple[LevelOrigin, ...]:
    """What ``pack_origins`` packed.

    Raises FormatError (ChecksumError for changed bytes), LimitError for sizes beyond the caps,
    UnsupportedError for a later version.
    """
    if len(data) > MAX_BYTES:
        raise LimitError(f"transcode tag of {len(data)} bytes exceeds {MAX_BYTES}")
    if len(data) < _HEAD.size + _CRC.size or data[: len(MAGIC)] != MAGIC:
        raise FormatError("tag does not say how tiles were transcoded")
    _, version, length = _HEAD.unpack_from(data)
    if version != VERSION:
        raise UnsupportedError(
            f"transcode tag has version {version}; this wsicodec reads version {VERSION}: upgrade"
        )
    if _CRC.unpack(data[-_CRC.size :])[0] != zlib.crc32(memoryview(data)[: -_CRC.size]):
        raise ChecksumError("transcode tag was changed after it was written")
    if length > MAX_HEADER_BYTES:
        raise LimitError(f"transcode tag has a header of {length} bytes, over {MAX_HEADER_BYTES}")
    parts = _Parts(data[: -_CRC.size], _HEAD.size)
    try:
        header = json.loads(parts.take(length).decode("ascii"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"transcode tag has a broken header: {error}") from None
    try:
        entries = header["levels"]
        if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_LEVELS:
            raise FormatError("transcode tag has no list of levels, or too long a one")
        levels = tuple(_level(entry, parts) for entry in entries)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, FormatError | LimitError):
            raise
        raise FormatError(f"transcode tag has a broken header: {error!r}") from None
    parts.finish()
    if sum(len(segment) for level in levels for segment in level.kept) > MAX_KEPT_BYTES:
        raise LimitError(f"transcode tag keeps tiles of more than {MAX_KEPT_BYTES} bytes")
    return levels


def _level(entry: dict[str, Any], parts: _Parts) -> LevelOrigin:
    tables_length = entry["tables"]
    if tables_length is not None:
        _whole(tables_length, 0, MAX_TABLES_BYTES)
    tables = parts.take(tables_length or 0)
    count = _whole(entry["segments"], 1, MAX_SEGMENTS)
    layout = StoredLayout(
        height=_whole(entry["height"], 1, 2**31),
        width=_whole(entry["width"], 1, 2**31),
        compression=_whole(entry["compression"], 1, 2**16 - 1),
        photometric=_whole(entry["photometric"], 0, 2**16 - 1),
        tile=None if entry["tile"] is None else _pair(entry["tile"], 2**31),
        rows_per_strip=None
        if entry["rows_per_strip"] is None
        else _whole(entry["rows_per_strip"], 1, 2**31),
        subsampling=None if entry["subsampling"] is None else _pair(entry["subsampling"], 16),
        jpegtables=None if tables_length is None else tables,
        predictor=_whole(entry["predictor"], 1, 2**16 - 1),
    )
    if (layout.tile is None) is (layout.rows_per_strip is None):
        raise FormatError("a level must have either tiles or strips")
    if segment_count(layout) != count:
        raise FormatError(f"a level of {segment_count(layout)} tiles lists {count}")
    ways = parts.take(count)
    if max(ways) > max(Way):
        raise FormatError(f"transcode tag names way {max(ways)}, which this version does not know")
    checks = _little(array("I", parts.take(4 * count)))
    lengths = entry["kept"]
    if not isinstance(lengths, list) or len(lengths) != ways.count(Way.KEPT):
        raise FormatError("transcode tag does not hold the tiles that it says it keeps")
    kept = tuple(parts.take(_whole(length, 1, MAX_KEPT_BYTES)) for length in lengths)
    digest = bytes.fromhex(entry["sha256"])
    if len(digest) != 32:
        raise FormatError(f"transcode tag has a digest of {len(digest)} bytes")
    return LevelOrigin(layout, ways, checks, digest, kept)


def _little(values: array[int]) -> array[int]:
    """Values of four bytes from this machine's byte order to little-endian, or back."""
    if sys.byteorder == "little":
        return values
    swapped = values[:]
    swapped.byteswap()
    return swapped


class _Parts:
    """Takes parts off the front of bytes; FormatError where fewer are left."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data = data
        self._position = start

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._position:
            raise FormatError("transcode tag ends early")
        self._position += count
        return self._data[self._position - count : self._position]

    def finish(self) -> None:
        if self._position != len(self._data):
            raise FormatError("transcode tag holds more than its header tells")


def _whole(value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no integer")
    if not low <= value <= high:
        raise LimitError(f"transcode tag: {value} is not within {low} ... {high}")
    return value


def _pair(value: object, high: int) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise TypeError(f"{value!r} is no pair")
    return _whole(value[0], 1, high), _whole(value[1], 1, high)
