"""Tile bytes <-> header. Follows docs/format.md, section "Tile", field by field.

Nothing here decodes pixels or allocates by sizes read from a tile.
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass

from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    TruncatedError,
    UnsupportedError,
)

MAGIC = b"WSC\x1a"
VERSION = 1
MAX_SIDE = 4096
MAX_PAYLOAD = 2**28
HEADER_BYTES = 18
LEARNED_BYTES = 6
MAX_LANES_LOG2 = 5
MAX_TILT = 16

_HEADER = struct.Struct("<4sBBHHII")
_LEARNED = struct.Struct("<4sBB")
_TILTED = 0x80


class Mode(enum.IntEnum):
    """How the payload of a tile is coded. Values are literals of the format."""

    CONSTANT = 0
    LEARNED = 1
    JPEGXL = 2
    JPEG = 3
    JPEG2000 = 4
    LOSSLESS = 5
    TRANSCODED = 6


@dataclass(frozen=True)
class LearnedHeader:
    """Parameters of a learned tile.

    model: first four bytes of the decoder model's SHA-256.
    gain: gain index G, 0 (coarsest) ... 255.
    stages: number of coded stages, 1 ... 15.
    lanes_log2: log2 of the number of rANS lanes, 0 ... 5.
    tilt: how far the model's tilt moves steps of channels against one another, 0 ... 16.
    """

    model: bytes
    gain: int
    stages: int
    lanes_log2: int = 2
    tilt: int = 0

    def pack(self) -> bytes:
        if len(self.model) != 4 or not 0 <= self.gain <= 255:
            raise FormatError("model prefix must be 4 bytes, gain 0 ... 255")
        if not 1 <= self.stages <= 15 or not 0 <= self.lanes_log2 <= MAX_LANES_LOG2:
            raise FormatError("stages must be 1 ... 15, lanes 1 ... 32")
        if not 0 <= self.tilt <= MAX_TILT:
            raise FormatError(f"tilt must be 0 ... {MAX_TILT}")
        packed = self.stages | self.lanes_log2 << 4 | (_TILTED if self.tilt else 0)
        more = bytes([self.tilt]) if self.tilt else b""
        return _LEARNED.pack(self.model, self.gain, packed) + more


@dataclass(frozen=True)
class Tile:
    """A parsed tile.

    height, width: pixels, 1 ... 4096. payload: coded bytes after all headers.
    learned: set when and only when mode is LEARNED.
    """

    mode: Mode
    height: int
    width: int
    payload: bytes
    learned: LearnedHeader | None = None

    def pack(self) -> bytes:
        """The tile's bytes."""
        if (self.mode is Mode.LEARNED) != (self.learned is not None):
            raise FormatError("a learned header belongs to learned tiles alone")
        if self.mode is Mode.CONSTANT and len(self.payload) != 3:
            raise FormatError(f"constant tile has {len(self.payload)} bytes of colour, not 3")
        for side in (self.height, self.width):
            if not 1 <= side <= MAX_SIDE:
                raise LimitError(f"tile side {side} is not within 1 ... {MAX_SIDE}")
        body = (self.learned.pack() if self.learned else b"") + self.payload
        if len(body) > MAX_PAYLOAD:
            raise LimitError(f"tile payload of {len(body)} bytes exceeds {MAX_PAYLOAD}")
        head = _HEADER.pack(MAGIC, VERSION, self.mode, self.height, self.width, len(body), 0)
        return head[:14] + struct.pack("<I", checksum(head, body)) + body


def checksum(head: bytes, body: bytes) -> int:
    """CRC-32 (zlib) of the first 14 header bytes and everything after the checksum."""
    return zlib.crc32(body, zlib.crc32(head[:14]))


def is_tile(data: bytes) -> bool:
    """True when ``data`` starts with the magic of a wsicodec tile of any version."""
    return data[:4] == MAGIC


def parse(data: bytes) -> Tile:
    """Parse and check a tile.

    Raises FormatError, TruncatedError, ChecksumError, LimitError or UnsupportedError (version).
    Bytes after the promised length are refused: a tile is exactly as long as it says.
    """
    if len(data) < 4:
        raise TruncatedError(f"tile of {len(data)} bytes is shorter than its magic")
    if not is_tile(data):
        raise FormatError(f"not a wsicodec tile: starts with {bytes(data[:4]).hex(' ')}")
    if len(data) < HEADER_BYTES:
        raise TruncatedError(f"tile of {len(data)} bytes is shorter than its header of 18")
    _, version, mode_value, height, width, length, crc = _HEADER.unpack_from(data)
    if version != VERSION:
        raise UnsupportedError(
            f"tile has format version {version}; this wsicodec reads version {VERSION}: upgrade it"
        )
    try:
        mode = Mode(mode_value)
    except ValueError:
        raise FormatError(f"tile mode {mode_value} is not defined in format version 1") from None
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise LimitError(f"tile of {width} x {height} pixels: sides must be 1 ... {MAX_SIDE}")
    if length > MAX_PAYLOAD:
        raise LimitError(f"tile payload of {length} bytes exceeds {MAX_PAYLOAD}")
    if len(data) < HEADER_BYTES + length:
        raise TruncatedError(
            f"tile has {len(data)} of {HEADER_BYTES + length} bytes: it was cut short"
        )
    if len(data) > HEADER_BYTES + length:
        raise FormatError(f"tile has {len(data) - HEADER_BYTES - length} bytes after its end")
    body = bytes(data[HEADER_BYTES:])
    if checksum(bytes(data[:14]), body) != crc:
        raise ChecksumError("tile checksum does not match: the bytes are damaged")
    if mode is Mode.CONSTANT and length != 3:
        raise FormatError(f"constant tile has {length} bytes of colour, not 3")
    if mode is not Mode.LEARNED:
        return Tile(mode, height, width, body)
    if length < LEARNED_BYTES:
        raise FormatError("learned tile has no room for its parameters")
    model, gain, packed = _LEARNED.unpack_from(body)
    stages, lanes_log2 = packed & 15, packed >> 4 & 7
    if stages < 1 or lanes_log2 > MAX_LANES_LOG2:
        raise FormatError(f"learned tile with {stages} stages and 2^{lanes_log2} lanes")
    tilt, end = 0, LEARNED_BYTES
    if packed & _TILTED:
        if length == LEARNED_BYTES:
            raise FormatError("learned tile has no room for its tilt")
        tilt, end = body[LEARNED_BYTES], LEARNED_BYTES + 1
        if not 1 <= tilt <= MAX_TILT:
            raise FormatError(f"learned tile with a tilt of {tilt}")
    learned = LearnedHeader(model, gain, stages, lanes_log2, tilt)
    return Tile(mode, height, width, body[end:], learned)
