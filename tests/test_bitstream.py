"""Tile bytes and header: properties of packing, and what damage does."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wsicodec
from wsicodec import bitstream
from wsicodec.bitstream import MAX_TILT, LearnedHeader, Mode, Tile
from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    TruncatedError,
    UnsupportedError,
    WsicodecError,
)

Read = Callable[[str], bytes]

LEARNED = ("learned-17x31-gain90-stages2-lanes2", "learned-31x33-gain130-tilt9-turned")

sides = st.one_of(st.integers(1, 4096), st.sampled_from([1, 2, 4095, 4096]))
learned_headers = st.builds(
    LearnedHeader,
    model=st.binary(min_size=4, max_size=4),
    gain=st.integers(0, 255),
    stages=st.integers(1, 15),
    lanes_log2=st.integers(0, 5),
    tilt=st.integers(0, MAX_TILT),
)
other_modes = st.sampled_from([Mode.JPEGXL, Mode.JPEG, Mode.JPEG2000, Mode.LOSSLESS])
payloads = st.binary(max_size=200)
tiles = st.one_of(
    st.builds(Tile, st.just(Mode.CONSTANT), sides, sides, st.binary(min_size=3, max_size=3)),
    st.builds(Tile, other_modes, sides, sides, payloads),
    st.builds(Tile, st.just(Mode.LEARNED), sides, sides, payloads, learned_headers),
)


def with_right_checksum(data: bytes) -> bytes:
    """The same bytes, the checksum made to fit: the fault lies deeper than transport."""
    crc = zlib.crc32(data[18:], zlib.crc32(data[:14]))
    return data[:14] + struct.pack("<I", crc) + data[18:]


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@given(tiles)
def test_parse_gives_back_what_pack_took(tile: Tile) -> None:
    data = tile.pack()
    assert bitstream.parse(data) == tile
    overhead = 18
    if tile.learned is not None:
        overhead = 25 if tile.learned.tilt else 24
    assert len(data) == overhead + len(tile.payload)
    assert bitstream.is_tile(data)
    assert with_right_checksum(data) == data


@settings(max_examples=40)
@given(tiles, st.data())
def test_any_single_damaged_bit_is_noticed(tile: Tile, data: st.DataObject) -> None:
    packed = tile.pack()
    bit = data.draw(st.integers(0, 8 * len(packed) - 1))
    with pytest.raises(WsicodecError):
        bitstream.parse(flipped(packed, bit))


@settings(max_examples=40)
@given(tiles, st.data())
def test_any_truncation_is_noticed(tile: Tile, data: st.DataObject) -> None:
    packed = tile.pack()
    size = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(TruncatedError):
        bitstream.parse(packed[:size])


@given(st.binary(max_size=80))
def test_any_bytes_parse_or_are_refused_by_name(data: bytes) -> None:
    for candidate in (data, bitstream.MAGIC + data, bitstream.MAGIC + b"\1\1" + data):
        try:
            assert bitstream.parse(candidate).pack() == candidate
        except WsicodecError as error:
            assert str(error)


def test_a_tilt_is_a_byte_after_the_learned_header() -> None:
    plain = Tile(Mode.LEARNED, 3, 5, b"payload", LearnedHeader(b"abcd", 7, 9, 5))
    assert MAX_TILT == 16
    for tilt in range(1, 17):
        assert plain.learned is not None
        data = replace(plain, learned=replace(plain.learned, tilt=tilt)).pack()
        same = plain.pack()
        assert data[18:] == same[18:23] + bytes([same[23] | 0x80, tilt]) + same[24:]


@given(learned_headers, st.binary(max_size=20))
def test_every_refused_tilt_is_named(learned: LearnedHeader, payload: bytes) -> None:
    learned = replace(learned, tilt=1)
    data = Tile(Mode.LEARNED, 1, 1, payload, learned).pack()
    for tilt in range(256):
        tilted = with_right_checksum(data[:24] + bytes([tilt]) + data[25:])
        if 1 <= tilt <= 16:
            found = bitstream.parse(tilted)
            assert found == Tile(Mode.LEARNED, 1, 1, payload, replace(learned, tilt=tilt))
        else:
            with pytest.raises(FormatError, match=f"tilt of {tilt}"):
                bitstream.parse(tilted)


@given(learned_headers)
def test_a_tile_without_room_for_its_tilt_is_named(learned: LearnedHeader) -> None:
    data = Tile(Mode.LEARNED, 1, 1, b"", replace(learned, tilt=1)).pack()
    for size in range(18, 25):
        cut = data[:10] + struct.pack("<I", size - 18) + data[14:size]
        with pytest.raises(FormatError, match="no room"):
            bitstream.parse(with_right_checksum(cut))


def test_the_example_of_the_document() -> None:
    data = bytes.fromhex("57 53 43 1A 01 00 30 00 40 00 03 00 00 00 61 64 D6 8D F3 EE F5")
    image = np.full((48, 64, 3), (243, 238, 245), np.uint8)
    assert wsicodec.encode(image) == data
    np.testing.assert_array_equal(wsicodec.decode(data), image)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_decode_takes_any_bytes(kind: Callable[[bytes], bytes], vector: Read) -> None:
    data = vector("decode/constant-64x48.tile")
    assert wsicodec.decode(kind(data)).shape == (48, 64, 3)
    assert wsicodec.probe(kind(data)).mode == "constant"


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", [*LEARNED, "constant-1x1"])
def test_truncation_at_every_byte_is_named(name: str, vector: Read) -> None:
    data = vector(f"decode/{name}.tile")
    for size in range(len(data)):
        with pytest.raises(TruncatedError):
            wsicodec.decode(data[:size])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", LEARNED)
def test_truncation_with_a_fitting_header_is_named(name: str, vector: Read) -> None:
    """Cut, then length and checksum repaired: only the entropy coder can notice."""
    data = vector(f"decode/{name}.tile")
    for size in range(24, len(data)):
        cut = data[:10] + struct.pack("<I", size - 18) + data[14:size]
        with pytest.raises((TruncatedError, FormatError)):
            wsicodec.decode(with_right_checksum(cut))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", [*LEARNED, "lossless-1x1"])
def test_every_flipped_bit_of_a_tile_is_named(name: str, vector: Read) -> None:
    """Header and payload: a damaged tile is refused, never shown as another image."""
    data = vector(f"decode/{name}.tile")
    for bit in range(8 * len(data)):
        with pytest.raises(WsicodecError):
            wsicodec.decode(flipped(data, bit))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", LEARNED)
def test_every_flipped_header_bit_under_a_right_checksum(name: str, vector: Read) -> None:
    """Such a tile is another tile: refused by name, or an image of the size that it now says."""
    data = vector(f"decode/{name}.tile")
    named = {0: FormatError, 1: FormatError, 2: FormatError, 3: FormatError, 4: UnsupportedError}
    for bit in [b for b in range(8 * (25 if data[23] >> 7 else 24)) if not 14 <= b // 8 < 18]:
        damaged = with_right_checksum(flipped(data, bit))
        height, width = struct.unpack("<HH", damaged[6:10])
        try:
            image = wsicodec.decode(damaged)
        except named.get(bit // 8, WsicodecError) as error:
            assert str(error)
        else:
            assert bit // 8 not in named
            assert image.shape == (height, width, 3)


@pytest.mark.usefixtures("tiny")
def test_any_turn_under_a_right_checksum_is_another_picture(vector: Read) -> None:
    """All values of each angle are of the format, and angles apart show."""
    data = vector("decode/learned-32x32-gain140-turned-a.tile")
    image = wsicodec.decode(data)
    for at, own in zip(range(24, 27), (90, 0, 0), strict=True):
        for angle in (*range(-128, 127, 15), 127):
            turned = data[:at] + struct.pack("b", angle) + data[at + 1 :]
            other = wsicodec.decode(with_right_checksum(turned))
            assert (other != image).any() == (angle != own)


def test_checks_come_in_the_documents_order() -> None:
    """Each fault alone has its own error; of two faults, the one named first in the document."""
    tile = bytearray(Tile(Mode.CONSTANT, 1, 1, b"abc").pack())
    faults: list[tuple[int, bytes, type[WsicodecError], str]] = [
        (18, b"x", ChecksumError, "checksum"),
        (10, struct.pack("<I", 9), TruncatedError, "cut short"),
        (10, struct.pack("<I", 2**31), LimitError, "payload"),
        (8, struct.pack("<H", 0), LimitError, "pixels"),
        (6, struct.pack("<H", 5000), LimitError, "pixels"),
        (5, b"\x07", FormatError, "mode"),
        (4, b"\x02", UnsupportedError, "version"),
        (0, b"X", FormatError, "not a wsicodec tile"),
    ]
    for offset, change, error, text in faults:
        tile[offset : offset + len(change)] = change
        with pytest.raises(error, match=text):
            bitstream.parse(bytes(tile))


@pytest.mark.parametrize(
    ("tile", "error"),
    [
        (Tile(Mode.CONSTANT, 0, 1, b"abc"), LimitError),
        (Tile(Mode.CONSTANT, 1, 4097, b"abc"), LimitError),
        (Tile(Mode.LEARNED, 1, 1, b""), FormatError),
        (Tile(Mode.JPEG, 1, 1, b"", LearnedHeader(b"abcd", 0, 1)), FormatError),
        (Tile(Mode.LEARNED, 1, 1, b"", LearnedHeader(b"abc", 0, 1)), FormatError),
        (Tile(Mode.LEARNED, 1, 1, b"", LearnedHeader(b"abcd", 256, 1)), FormatError),
        (Tile(Mode.LEARNED, 1, 1, b"", LearnedHeader(b"abcd", 0, 0)), FormatError),
        (Tile(Mode.LEARNED, 1, 1, b"", LearnedHeader(b"abcd", 0, 16)), FormatError),
        (Tile(Mode.LEARNED, 1, 1, b"", LearnedHeader(b"abcd", 0, 1, 6)), FormatError),
        (Tile(Mode.LEARNED, 1, 1, b"", LearnedHeader(b"abcd", 0, 1, 5, 17)), FormatError),
        (Tile(Mode.LEARNED, 1, 1, b"", LearnedHeader(b"abcd", 0, 1, 5, -1)), FormatError),
    ],
)
def test_what_no_tile_may_say_is_not_written(tile: Tile, error: type[WsicodecError]) -> None:
    with pytest.raises(error):
        tile.pack()


def test_a_payload_beyond_the_limit_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitstream, "MAX_PAYLOAD", 10)
    with pytest.raises(LimitError):
        Tile(Mode.JPEG, 1, 1, b"12345678901").pack()


def test_a_constant_tile_of_another_length_is_not_written() -> None:
    with pytest.raises(FormatError):
        Tile(Mode.CONSTANT, 1, 1, b"abcd").pack()
