"""JPEG images beside a pyramid, coded anew in fewer bytes and decoded to the very same pixels.

Scanners store label, macro and thumbnail in strips of some rows, each a JPEG stream of its own.
Strips joined to one stream and coded as JPEG XL (tiles of mode ``transcoded``) are a third smaller.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from wsicodec import bitstream
from wsicodec.bitstream import MAX_SIDE, Mode, Tile
from wsicodec.codec import decode
from wsicodec.codec.transcoded import jpeg_of, transcode
from wsicodec.errors import FormatError, WsicodecError
from wsicodec.slide.jpegstream import ADOBE_RGB, END, START, jpeg_colours, segments, with_tables
from wsicodec.slide.protocol import Image, StoredImage

_JPEG, _LEARNED = 7, 60642  # of Compression
_RGB, _YCBCR = 2, 6  # of PhotometricInterpretation
_BASELINE, _EXTENDED, _EOI, _SOS, _DRI = 0xC0, 0xC1, 0xD9, 0xDA, 0xDD
_FRAMES = range(0xC0, 0xD0)
_NO_FRAMES = (0xC4, 0xC8, 0xCC)
_RESTART = 0xD0
MAX_INTERVAL = 65535
"""Minimum coded units between two restart markers: two bytes hold their number."""


@dataclass(frozen=True)
class Repacked:
    """Tiles of mode ``transcoded`` that hold an image.

    tile: (rows, columns) of each, of the image's whole width for strips. tiles: packed, row by row.
    """

    tile: tuple[int, int]
    tiles: tuple[bytes, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.tiles))


def repack(stored: StoredImage, pixels: Image) -> Repacked | None:
    """The smallest way found; None where no way keeps the pixels or is smaller.

    pixels: (rows, columns, 3) uint8, what ``stored`` decodes to.
    """
    if stored.compression != _JPEG or stored.planarconfig != 1 or not all(stored.segments):
        return None
    if pixels.shape != (stored.height, stored.width, 3):
        return None
    try:
        streams = [_whole(stored, segment) for segment in stored.segments]
    except FormatError:
        return None
    for tile, candidates in _ways(stored, streams):
        found = _transcoded(candidates)
        if found is None:
            continue
        repacked = Repacked(tile, tuple(part.pack() for part in found))
        if repacked.size < sum(map(len, stored.segments)) and _shows(repacked, pixels):
            return repacked
    return None


def unpack(stored: StoredImage) -> StoredImage | None:
    """A repacked image as the JPEG strips or tiles that it holds; None for any other.

    Raises FormatError, LimitError, RuntimeMissingError for damage.
    """
    if stored.compression != _LEARNED or not stored.segments:
        return None
    tiles = [bitstream.parse(segment) for segment in stored.segments]
    if any(tile.mode is not Mode.TRANSCODED for tile in tiles):
        return None
    streams = tuple(jpeg_of(tile) for tile in tiles)
    colours = {jpeg_colours(stream) for stream in streams}
    if len(colours) > 1:
        return None  # no directory says so of its strips
    ((ycbcr, subsampling),) = colours
    return dataclasses.replace(
        stored,
        compression=_JPEG,
        photometric=_YCBCR if ycbcr else _RGB,
        subsampling=subsampling if ycbcr else None,
        predictor=1,
        jpegtables=None,
        segments=streams,
    )


def _ways(
    stored: StoredImage, streams: list[bytes]
) -> Iterator[tuple[tuple[int, int], list[bytes]]]:
    """(rows, columns) of tiles and their JPEG streams: all strips as one, then one by one."""
    if stored.tile is not None:
        yield stored.tile, streams
        return
    rows = min(stored.rows_per_strip or stored.height, stored.height)
    if len(streams) > 1:
        joined = None
        with contextlib.suppress(FormatError):  # then the strips stay what they are
            joined = join_strips(streams, rows, stored.height)
        if joined is not None:
            yield (stored.height, stored.width), [joined]
    yield (rows, stored.width), streams


def _transcoded(streams: list[bytes]) -> list[Tile] | None:
    tiles = []
    for stream in streams:
        tile = transcode(stream)
        if tile is None:
            return None
        tiles.append(tile)
    return tiles


def _shows(repacked: Repacked, pixels: Image) -> bool:
    """True when the tiles, cut to the image, are its pixels."""
    (rows, columns), (height, width) = repacked.tile, pixels.shape[:2]
    places = [(y, x) for y in range(0, height, rows) for x in range(0, width, columns)]
    if len(places) != len(repacked.tiles):
        return False
    try:
        for (y, x), tile in zip(places, repacked.tiles, strict=True):
            wanted = pixels[y : y + rows, x : x + columns]
            found = decode(tile)
            # only a last strip may be lower than the others
            if found.shape[1] != columns or found.shape[0] not in (rows, wanted.shape[0]):
                return False
            if not np.array_equal(found[: wanted.shape[0], : wanted.shape[1]], wanted):
                return False
    except WsicodecError:
        return False
    return True


def _whole(stored: StoredImage, segment: bytes) -> bytes:
    """A strip or tile as a stream that says by itself whether it is RGB or YCbCr."""
    whole = with_tables(stored.jpegtables, segment)
    ycbcr, _ = jpeg_colours(whole)
    if stored.photometric == _RGB and ycbcr:
        return with_tables(stored.jpegtables, segment, ADOBE_RGB)
    return whole


@dataclass(frozen=True)
class _Strip:
    """A JPEG stream of one frame and one scan, taken apart.

    head: the segments before the frame and between frame and scan, without DRI. frame, scan: the
    segments SOF and SOS. data: entropy-coded.
    """

    head: bytes
    frame: bytes
    scan: bytes
    data: bytes

    @property
    def rows(self) -> int:
        return int.from_bytes(self.frame[5:7], "big")

    @property
    def columns(self) -> int:
        return int.from_bytes(self.frame[7:9], "big")

    @property
    def unit(self) -> tuple[int, int]:
        """(rows, columns) of pixels of a minimum coded unit."""
        factors = [self.frame[11 + 3 * k] for k in range(self.frame[9])]
        return 8 * max(f & 15 for f in factors), 8 * max(f >> 4 for f in factors)


def join_strips(streams: list[bytes], rows: int, height: int) -> bytes:
    """One stream of baseline JPEG streams, each of ``rows`` rows of an image of ``height`` rows.

    The entropy-coded bytes stay as they are: a restart marker between strips begins prediction
    anew, as each strip did. Raises FormatError for strips that differ in more than their pixels, do
    not end on minimum coded units, are progressive, or have restart markers of their own.
    """
    strips = [_taken_apart(stream) for stream in streams]
    first = strips[0]
    unit_rows, unit_columns = first.unit
    interval = -(-first.columns // unit_columns) * -(-rows // unit_rows)
    if rows % unit_rows or interval > MAX_INTERVAL or not 1 <= height <= MAX_SIDE:
        raise FormatError(f"strips of {rows} rows cannot be joined")
    if len(strips) != -(-height // rows):
        raise FormatError(f"{len(strips)} strips of {rows} rows are not {height} rows")
    for number, strip in enumerate(strips):
        left = height - number * rows
        if (strip.head, strip.scan) != (first.head, first.scan) or (
            strip.frame[:5] + strip.frame[7:] != first.frame[:5] + first.frame[7:]
        ):
            raise FormatError("strips have tables or frames of their own")
        if -(-strip.rows // unit_rows) != -(-min(rows, left) // unit_rows):
            raise FormatError(f"strip {number} has {strip.rows} of {min(rows, left)} rows")
    frame = first.frame[:5] + height.to_bytes(2, "big") + first.frame[7:]
    every = bytes((0xFF, _DRI, 0, 4)) + interval.to_bytes(2, "big")
    parts = [START, first.head, frame, every, first.scan]
    for number, strip in enumerate(strips):
        if number:
            parts.append(bytes((0xFF, _RESTART + (number - 1) % 8)))
        parts.append(strip.data)
    return b"".join([*parts, END])


def _taken_apart(stream: bytes) -> _Strip:
    head, frames, scans, data, ended = [], [], [], b"", False
    for marker, start, end in segments(stream):
        segment = stream[start:end]
        if marker in _FRAMES and marker not in _NO_FRAMES:
            frames.append(segment)
            if marker not in (_BASELINE, _EXTENDED) or len(segment) < 10:
                raise FormatError("JPEG frame is not baseline")
        elif marker == _SOS:
            length = 2 + int.from_bytes(segment[2:4], "big")
            scans.append(segment[:length])
            data = segment[length:]
        elif marker == _DRI:
            raise FormatError("JPEG has restart markers of its own")
        elif marker == _EOI:
            ended = True
        else:
            head.append(segment)
    if len(frames) != 1 or len(scans) != 1 or not ended or not data:
        raise FormatError(f"JPEG has {len(frames)} frames and {len(scans)} scans")
    (frame,), (scan,) = frames, scans
    if len(frame) != 10 + 3 * frame[9] or not frame[9] or 0 in frame[11::3]:
        raise FormatError("JPEG frame is cut short")
    if scan[4] != frame[9]:
        raise FormatError("JPEG scan does not hold all components")
    return _Strip(b"".join(head), frame, scan, data)
