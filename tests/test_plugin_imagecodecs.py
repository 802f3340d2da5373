"""The imagecodecs-style functions keep the conventions of imagecodecs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import wsicodec
from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    SettingsError,
    TruncatedError,
    WsicodecError,
)
from wsicodec.plugins import imagecodecs as plugin
from wsicodec.plugins.imagecodecs import (
    WSICODEC,
    wsicodec_check,
    wsicodec_decode,
    wsicodec_encode,
    wsicodec_version,
)


@pytest.fixture
def tile_kwargs() -> dict[str, Any]:
    return {"lossless": True}


@pytest.fixture
def image() -> np.ndarray:
    """Smooth violet on off-white, uint8 (96, 128, 3)."""
    y, x = np.mgrid[:96, :128] / 16
    density = (np.sin(x) * np.cos(y) + 1)[..., None] * (45, 80, 30)
    return np.rint(240 - density).astype(np.uint8)


@pytest.fixture
def stream(image: np.ndarray, tile_kwargs: dict[str, Any]) -> bytes:
    encoded = wsicodec_encode(image, **tile_kwargs)
    assert isinstance(encoded, bytes)
    return encoded


def test_round_trip(image: np.ndarray, stream: bytes) -> None:
    back = wsicodec_decode(stream)
    np.testing.assert_array_equal(back, image)
    assert back.flags.c_contiguous
    assert back.flags.writeable
    np.testing.assert_array_equal(wsicodec.decode(stream), image)


def test_default_level_is_the_default_quality(image: np.ndarray) -> None:
    encoded = wsicodec_encode(image)
    assert encoded == wsicodec.encode(image)
    error = wsicodec_decode(encoded).astype(float) - image
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 25
    assert wsicodec_encode(image, 30) == wsicodec.encode(image, quality=30)
    assert wsicodec_encode(image, level=30.0) == wsicodec.encode(image, quality=30)


def test_version_and_availability() -> None:
    assert wsicodec_version() == f"wsicodec {wsicodec.__version__}"
    assert WSICODEC.available is True  # the test environment has onnxruntime
    assert plugin.WsicodecError is WsicodecError


@pytest.mark.parametrize("data", [b"", b"WSC", b"\xff\xd8\xff\xe0", b"WSC\x1b" + bytes(20)])
def test_check_refuses(data: bytes) -> None:
    assert wsicodec_check(data) is False


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "array", "strided"])
def test_buffers_in(kind: Any, image: np.ndarray, stream: bytes) -> None:
    if kind == "array":
        data = np.frombuffer(stream, np.uint8)
    elif kind == "strided":
        data = np.repeat(np.frombuffer(stream, np.uint8), 2)[::2]
    else:
        data = kind(stream)
    assert wsicodec_check(data) is True
    np.testing.assert_array_equal(wsicodec_decode(data), image)


def test_what_is_no_buffer_is_a_type_error() -> None:
    for data in ("text", 12, None):
        with pytest.raises(TypeError, match="bytes-like"):
            wsicodec_decode(data)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="bytes-like"):
            wsicodec_check(data)  # type: ignore[arg-type]


class TestEncodeOut:
    def test_int_limits_the_size(
        self, image: np.ndarray, stream: bytes, tile_kwargs: dict[str, Any]
    ) -> None:
        assert wsicodec_encode(image, out=len(stream), **tile_kwargs) == stream
        with pytest.raises(LimitError, match="more than the 10"):
            wsicodec_encode(image, out=10, **tile_kwargs)

    @pytest.mark.parametrize("kind", [bytearray, lambda n: memoryview(bytearray(n))])
    def test_buffer_returns_the_written_part(
        self, kind: Any, image: np.ndarray, stream: bytes, tile_kwargs: dict[str, Any]
    ) -> None:
        out = kind(len(stream) + 7)
        written = wsicodec_encode(image, out=out, **tile_kwargs)
        assert isinstance(written, memoryview)
        assert written == stream
        assert bytes(out) == stream + bytes(7)

    def test_array_returns_the_written_part(
        self, image: np.ndarray, stream: bytes, tile_kwargs: dict[str, Any]
    ) -> None:
        out = np.zeros(len(stream) + 7, np.uint8)
        written = wsicodec_encode(image, out=out, **tile_kwargs)
        assert isinstance(written, np.ndarray)
        assert np.shares_memory(written, out)
        assert written.tobytes() == stream

    @pytest.mark.parametrize(
        ("out", "error"),
        [
            (bytearray(10), LimitError),
            (np.zeros(10, np.uint8), LimitError),
            (bytes(100_000), SettingsError),
            (np.zeros(100_000, np.uint16), SettingsError),
            (np.zeros(200_000, np.uint8)[::2], SettingsError),
            (memoryview(bytearray(200_000))[::2], SettingsError),
            ("text", TypeError),
        ],
        ids=["short", "short array", "bytes", "uint16", "strided", "strided view", "text"],
    )
    def test_what_cannot_be_written(
        self, out: Any, error: type[Exception], image: np.ndarray, tile_kwargs: dict[str, Any]
    ) -> None:
        with pytest.raises(error):
            wsicodec_encode(image, out=out, **tile_kwargs)


class TestDecodeOut:
    def test_array_is_filled_and_returned(self, image: np.ndarray, stream: bytes) -> None:
        out = np.zeros_like(image)
        assert wsicodec_decode(stream, out=out) is out
        np.testing.assert_array_equal(out, image)

    def test_int_is_ignored(self, image: np.ndarray, stream: bytes) -> None:
        np.testing.assert_array_equal(wsicodec_decode(stream, out=5), image)

    @pytest.mark.parametrize(
        "out",
        [
            np.zeros((96, 128), np.uint8),
            np.zeros((1, 96, 128, 3), np.uint8),
            np.zeros((128, 96, 3), np.uint8),
            np.zeros((96, 128, 3), np.uint16),
            np.zeros((96, 256, 3), np.uint8)[:, ::2],
            bytearray(96 * 128 * 3),
        ],
        ids=["grey", "four axes", "transposed", "uint16", "strided", "bytearray"],
    )
    def test_what_does_not_fit_is_a_value_error(self, out: Any, stream: bytes) -> None:
        with pytest.raises(ValueError, match=r"out\b") as caught:
            wsicodec_decode(stream, out=out)
        assert isinstance(caught.value, WsicodecError)

    def test_read_only(self, image: np.ndarray, stream: bytes) -> None:
        out = np.zeros_like(image)
        out.setflags(write=False)
        with pytest.raises(SettingsError, match="read-only"):
            wsicodec_decode(stream, out=out)


class TestErrors:
    @pytest.mark.parametrize("data", [b"", b"ab", b"\x89PNG\r\n\x1a\n", bytes(100)])
    def test_garbage_is_a_value_error(self, data: bytes) -> None:
        with pytest.raises(FormatError, match="not a wsicodec tile"):
            wsicodec_decode(data)

    def test_streams_of_other_codecs_are_not_ours(self, image: np.ndarray) -> None:
        jpeg = wsicodec.encode(image, codec="jpeg")
        assert wsicodec.decode(jpeg).shape == image.shape
        assert not wsicodec_check(jpeg)
        with pytest.raises(FormatError, match="not a wsicodec tile"):
            wsicodec_decode(jpeg)

    def test_cut_and_damaged(self, stream: bytes) -> None:
        with pytest.raises(TruncatedError):
            wsicodec_decode(stream[:-1])
        damaged = bytearray(stream)
        damaged[-1] ^= 1
        with pytest.raises(ChecksumError):
            wsicodec_decode(damaged)

    @pytest.mark.parametrize("level", [0, 101, 70.5, -3])
    def test_level_out_of_range(self, level: float, image: np.ndarray) -> None:
        with pytest.raises(SettingsError, match=r"1 \.\.\. 100"):
            wsicodec_encode(image, level)

    def test_numthreads_is_accepted(
        self, image: np.ndarray, stream: bytes, tile_kwargs: dict[str, Any]
    ) -> None:
        assert wsicodec_encode(image, numthreads=4, **tile_kwargs) == stream
        np.testing.assert_array_equal(wsicodec_decode(stream, numthreads=4), image)
