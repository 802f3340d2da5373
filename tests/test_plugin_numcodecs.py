"""The numcodecs codec: settings, buffers, and arrays of Zarr format 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

import wsicodec
from wsicodec.errors import ChecksumError, FormatError, LimitError, SettingsError, UnsupportedError
from wsicodec.plugins import numcodecs as plugin
from wsicodec.plugins.numcodecs import Wsicodec

DEFAULTS = {"id": "wsicodec", "quality": 70, "model": "he-fast", "lossless": False}


@pytest.fixture(autouse=True)
def registered() -> None:
    plugin.register()  # a source checkout has no entry points


@pytest.fixture
def tile_kwargs() -> dict[str, Any]:
    return {"lossless": True}


@pytest.fixture
def codec(tile_kwargs: dict[str, Any]) -> Wsicodec:
    return Wsicodec(**tile_kwargs)


def tissue(rows: int = 96, columns: int = 128) -> np.ndarray:
    """Smooth violet on off-white, uint8 (rows, columns, 3)."""
    y, x = np.mgrid[:rows, :columns] / 16
    density = (np.sin(x) * np.cos(y) + 1)[..., None] * (45, 80, 30)
    return np.rint(240 - density).astype(np.uint8)


class TestConfig:
    def test_is_explicit_and_minimal(self) -> None:
        assert Wsicodec().get_config() == DEFAULTS
        codec = Wsicodec(quality=30, model="other", lossless=True)
        codec.note = "an attribute is not a setting"  # type: ignore[attr-defined]
        assert codec.get_config() == {
            "id": "wsicodec",
            "quality": 30,
            "model": "other",
            "lossless": True,
        }

    def test_survives_json_and_the_registry(self) -> None:
        codec = Wsicodec(quality=np.int64(30), lossless=np.bool_(True))  # type: ignore[arg-type]
        stored = json.loads(json.dumps(codec.get_config()))
        assert numcodecs.get_codec(stored) == codec
        assert numcodecs.get_codec({"id": "wsicodec"}) == Wsicodec()

    def test_repr_makes_an_equal_codec(self) -> None:
        codec = Wsicodec(quality=30)
        assert eval(repr(codec)) == codec

    @pytest.mark.parametrize(
        "config",
        [
            {"quality": 0},
            {"quality": 101},
            {"quality": True},
            {"quality": 7.5},
            {"model": ""},
            {"model": 3},
            {"lossless": "yes"},
            {"lossless": None},
            {"effort": 3},
        ],
    )
    def test_what_it_refuses(self, config: dict[str, Any]) -> None:
        with pytest.raises(SettingsError):
            Wsicodec.from_config(config)

    def test_an_unknown_key_speaks_of_a_later_version(self) -> None:
        with pytest.raises(SettingsError, match=r"unknown keys effort: .* later version"):
            numcodecs.get_codec({"id": "wsicodec", "effort": 3})


class TestBuffers:
    def test_round_trip(self, codec: Wsicodec) -> None:
        image = tissue()
        data = codec.encode(image)
        assert isinstance(data, bytes)
        assert wsicodec.probe(data).mode == "lossless"
        for buffer in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
            back = codec.decode(buffer)
            assert (back.shape, back.dtype) == (image.shape, np.uint8)
            np.testing.assert_array_equal(back, image)

    def test_default_settings_are_lossy_and_good(self) -> None:
        image, codec = tissue(256, 256), Wsicodec()
        data = codec.encode(image)
        assert wsicodec.probe(data).mode == "learned"
        error = codec.decode(data).astype(float) - image
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 25

    @pytest.mark.parametrize("leading", [(1,), (1, 1), (1, 1, 1)])
    def test_leading_axes_of_length_one(self, codec: Wsicodec, leading: tuple[int, ...]) -> None:
        image = tissue()
        data = codec.encode(image.reshape(*leading, *image.shape))
        np.testing.assert_array_equal(codec.decode(data), image)

    def test_strided_input(self, codec: Wsicodec) -> None:
        image = tissue()
        np.testing.assert_array_equal(
            codec.decode(codec.encode(image[::2, ::-1])), image[::2, ::-1]
        )

    @pytest.mark.parametrize("shape", [(96, 128, 3), (1, 96, 128, 3), (96 * 128 * 3,)])
    def test_out_array(self, codec: Wsicodec, shape: tuple[int, ...]) -> None:
        image = tissue()
        out = np.zeros(shape, np.uint8)
        assert codec.decode(codec.encode(image), out=out) is out
        np.testing.assert_array_equal(out.reshape(image.shape), image)

    def test_out_bytearray(self, codec: Wsicodec) -> None:
        image = tissue()
        out = bytearray(image.nbytes)
        assert codec.decode(codec.encode(image), out=out) is out
        assert out == image.tobytes()

    @pytest.mark.parametrize(
        "out",
        [
            np.zeros((128, 96, 3), np.uint8),
            np.zeros((96, 128, 4), np.uint8),
            np.zeros((2, 96, 128, 3), np.uint8),
            bytearray(10),
        ],
        ids=["transposed", "four channels", "two images", "short"],
    )
    def test_out_of_another_shape(self, codec: Wsicodec, out: Any) -> None:
        data = codec.encode(tissue())
        with pytest.raises(FormatError, match=r"tile holds \(96, 128, 3\)"):
            codec.decode(data, out=out)

    @pytest.mark.parametrize(
        ("chunk", "error", "match"),
        [
            (np.zeros((2, 64, 64, 3), np.uint8), UnsupportedError, "leading axes"),
            (np.zeros((64, 64), np.uint8), UnsupportedError, "leading axes"),
            (bytes(64 * 64 * 3), UnsupportedError, "leading axes"),
            (np.zeros((64, 64, 4), np.uint8), UnsupportedError, "RGBA"),
            (np.zeros((3, 64, 64), np.uint8), UnsupportedError, "shape"),
            (np.zeros((64, 64, 3), np.float32), UnsupportedError, "float32"),
            (np.zeros((2, 5000, 3), np.uint8), LimitError, "4096"),
            (np.asfortranarray(tissue()), UnsupportedError, "order='C'"),
        ],
        ids=["two", "grey", "flat", "rgba", "channel first", "float", "wide", "order F"],
    )
    def test_what_it_does_not_take(
        self, codec: Wsicodec, chunk: Any, error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            codec.encode(chunk)

    def test_damage_is_named(self, codec: Wsicodec) -> None:
        data = bytearray(codec.encode(tissue()))
        data[-1] ^= 1
        with pytest.raises(ChecksumError):
            codec.decode(data)
        with pytest.raises(FormatError, match="not a wsicodec tile"):
            codec.decode(b"not one")


class TestZarrFormat2:
    @pytest.mark.parametrize("place", ["compressors", "filters"])
    @pytest.mark.parametrize("leading", [(), (1, 1)], ids=["yxs", "tzyxs"])
    def test_array(
        self, tmp_path: Path, codec: Wsicodec, place: str, leading: tuple[int, ...]
    ) -> None:
        image = tissue(200, 300).reshape(*leading, 200, 300, 3)
        settings: dict[str, Any] = {"compressors": None, "filters": None}
        settings[place] = codec if place == "compressors" else [codec]
        array = zarr.create_array(
            tmp_path / "a.zarr",
            shape=image.shape,
            chunks=(*leading, 128, 128, 3),
            dtype="uint8",
            fill_value=255,
            zarr_format=2,
            **settings,
        )
        array[:] = image
        metadata = json.loads((tmp_path / "a.zarr" / ".zarray").read_text())
        stored = metadata["compressor"] if place == "compressors" else metadata["filters"][0]
        assert stored == DEFAULTS | {"lossless": True}
        back = zarr.open_array(tmp_path / "a.zarr", mode="r")
        np.testing.assert_array_equal(back[:], image)
        np.testing.assert_array_equal(
            back[..., 100:150, 120:290, :], image[..., 100:150, 120:290, :]
        )

    def test_order_f_is_refused_not_scrambled(self, tmp_path: Path, codec: Wsicodec) -> None:
        array = zarr.create_array(
            tmp_path / "f.zarr",
            shape=(64, 64, 3),
            chunks=(64, 64, 3),
            dtype="uint8",
            zarr_format=2,
            order="F",
            compressors=codec,
        )
        with pytest.raises(UnsupportedError, match="order='C'"):
            array[:] = tissue(64, 64)
