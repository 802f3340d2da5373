"""The zarr codec: plain and sharded arrays of Zarr format 3, channel first and last."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.dtype import UInt8

import wsicodec
from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    SettingsError,
    UnknownModelError,
    UnsupportedError,
)
from wsicodec.plugins import zarr as plugin
from wsicodec.plugins.zarr import WsicodecCodec

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def registered() -> None:
    plugin.register()  # a source checkout has no entry points


@pytest.fixture
def tile_kwargs() -> dict[str, Any]:
    return {"lossless": True}


def tissue(rows: int, columns: int) -> np.ndarray:
    """Smooth violet on off-white, uint8 (rows, columns, 3)."""
    y, x = np.mgrid[:rows, :columns] / 16
    density = (np.sin(x) * np.cos(y) + 1)[..., None] * (45, 80, 30)
    return np.rint(240 - density).astype(np.uint8)


def create(path: Path, image: np.ndarray, chunks: tuple[int, ...], **settings: Any) -> Any:
    settings = {"compressors": None, "fill_value": 255, **settings}
    return zarr.create_array(path, shape=image.shape, chunks=chunks, dtype=image.dtype, **settings)


def stored_codecs(path: Path) -> list[dict[str, Any]]:
    codecs: list[dict[str, Any]] = json.loads((path / "zarr.json").read_text())["codecs"]
    return codecs


class TestArrays:
    def test_plain(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> None:
        path, image = tmp_path / "a.zarr", tissue(200, 300)
        create(path, image, (128, 128, 3), serializer=WsicodecCodec(**tile_kwargs))[:] = image
        assert stored_codecs(path) == [
            {
                "name": "wsicodec",
                "configuration": {
                    "quality": 70,
                    "model": "he-fast",
                    "lossless": True,
                    "channel_axis": -1,
                },
            }
        ]
        array = zarr.open_array(path, mode="r")
        np.testing.assert_array_equal(array[:], image)
        np.testing.assert_array_equal(array[100:150, 120:290], image[100:150, 120:290])
        # chunks at the edge hold white, not black
        corner = wsicodec.decode((path / "c" / "1" / "2" / "0").read_bytes())
        assert (corner[200 - 128 :] == 255).all()

    def test_sharded(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> None:
        path, image = tmp_path / "s.zarr", tissue(300, 400)
        codec = WsicodecCodec(**tile_kwargs)
        create(path, image, (64, 64, 3), shards=(256, 256, 3), serializer=codec)[:] = image
        (sharding,) = stored_codecs(path)
        assert sharding["name"] == "sharding_indexed"
        assert [c["name"] for c in sharding["configuration"]["codecs"]] == ["wsicodec"]
        array = zarr.open_array(path, mode="r")
        np.testing.assert_array_equal(array[:], image)
        np.testing.assert_array_equal(array[70:75, 250:270], image[70:75, 250:270])

    def test_fused_pipeline(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> None:
        from zarr.core import codec_pipeline

        if not hasattr(codec_pipeline, "FusedCodecPipeline"):
            pytest.skip(f"zarr {zarr.__version__} has no FusedCodecPipeline (3.4 and later have)")
        fused = {"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}
        image, codec = tissue(300, 400), WsicodecCodec(**tile_kwargs)
        with zarr.config.set(fused):
            for name, shards in (("plain", None), ("sharded", (256, 256, 3))):
                path = tmp_path / name
                create(path, image, (64, 64, 3), shards=shards, serializer=codec)[:] = image
                np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], image)

    def test_default_settings_are_lossy_and_good(self, tmp_path: Path) -> None:
        path, image = tmp_path / "learned.zarr", tissue(256, 256)
        create(path, image, image.shape, serializer=WsicodecCodec())[:] = image
        (codec,) = stored_codecs(path)
        info = wsicodec.probe((path / "c" / "0" / "0" / "0").read_bytes())
        assert info.mode == "learned"
        # the tile holds a short digest, the array all of it
        assert info.model
        assert codec["configuration"]["model_sha256"].startswith(info.model)
        error = zarr.open_array(path, mode="r")[:].astype(float) - image
        assert 10 * np.log10(255**2 / np.mean(error**2)) > 25

    def test_by_name(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> None:
        path, image = tmp_path / "n.zarr", tissue(64, 64)
        serializer = {"name": "wsicodec", "configuration": tile_kwargs}
        create(path, image, image.shape, serializer=serializer)[:] = image
        np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], image)

    def test_writing_part_of_a_chunk(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> None:
        path, image = tmp_path / "p.zarr", tissue(128, 128)
        create(path, image, image.shape, serializer=WsicodecCodec(**tile_kwargs))[:] = image
        array = zarr.open_array(path, mode="r+")
        array[10:20, 30:40] = image[10:20, 30:40] = 7
        np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], image)

    def test_glass_is_not_stored(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> None:
        path, image = tmp_path / "g.zarr", tissue(64, 128)
        image[:, 64:] = 255
        create(path, image, (64, 64, 3), serializer=WsicodecCodec(**tile_kwargs))[:] = image
        assert [p.name for p in (path / "c" / "0").iterdir()] == ["0"]
        np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], image)


class TestLayouts:
    @pytest.mark.parametrize(
        ("axes", "channel_axis"),
        [
            ("yxc", -1),
            ("yxc", 2),
            ("tzyxc", -1),
            ("cyx", -3),
            ("cyx", 0),
            ("tczyx", 1),
            ("tczyx", -4),
            ("tcyx", -3),
            ("ycx", 1),
        ],
    )
    @pytest.mark.parametrize("sharded", [False, True], ids=["plain", "sharded"])
    def test_channel_axis(
        self,
        axes: str,
        channel_axis: int,
        sharded: bool,
        tmp_path: Path,
        tile_kwargs: dict[str, Any],
    ) -> None:
        path, codec = tmp_path / "l.zarr", WsicodecCodec(channel_axis=channel_axis, **tile_kwargs)
        source = tissue(100, 150)
        order = [axes.replace("t", "").replace("z", "").index(a) for a in "yxc"]
        image = np.moveaxis(source, [0, 1, 2], order)
        image = image.reshape([{"y": 100, "x": 150, "c": 3}.get(a, 1) for a in axes])
        chunks = tuple({"y": 64, "x": 48, "c": 3}.get(a, 1) for a in axes)
        shards = tuple({"y": 128, "x": 96, "c": 3}.get(a, 1) for a in axes)
        create(path, image, chunks, shards=shards if sharded else None, serializer=codec)[:] = image
        np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], image)
        if not sharded:
            # whatever the layout, the tile is an upright RGB image
            first = path.joinpath("c", *"0" * len(axes)).read_bytes()
            np.testing.assert_array_equal(wsicodec.decode(first), source[:64, :48])

    def test_three_by_three_pixels_are_not_guessed(self, tile_kwargs: dict[str, Any]) -> None:
        chunk = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
        prototype = default_buffer_prototype()
        for axis in (0, 1, 2):
            codec = WsicodecCodec(channel_axis=axis, **tile_kwargs)
            data = codec._encode_sync(
                prototype.nd_buffer.from_numpy_array(chunk), chunk_spec((3, 3, 3))
            )
            expected = np.moveaxis(chunk, axis, -1)
            np.testing.assert_array_equal(wsicodec.decode(data.to_bytes()), expected)


class TestRefusals:
    @pytest.mark.parametrize(
        ("array", "chunks", "channel_axis", "error", "match"),
        [
            (np.zeros((64, 64, 3), "u2"), (64, 64, 3), -1, UnsupportedError, "uint16"),
            (np.zeros((64, 64), "u1"), (64, 64), -1, UnsupportedError, "one RGB tile"),
            (np.zeros((64, 64, 4), "u1"), (64, 64, 4), -1, UnsupportedError, "one RGB tile"),
            (np.zeros((64, 64, 3), "u1"), (64, 64, 1), -1, UnsupportedError, "one RGB tile"),
            (np.zeros((4, 8, 8, 3), "u1"), (2, 8, 8, 3), -1, UnsupportedError, "one RGB tile"),
            (np.zeros((3, 64, 64), "u1"), (3, 64, 64), -1, UnsupportedError, "one RGB tile"),
            (np.zeros((64, 64, 3), "u1"), (64, 64, 3), -3, UnsupportedError, "one RGB tile"),
            (np.zeros((64, 64, 3), "u1"), (64, 64, 3), -4, UnsupportedError, "channel_axis -4"),
            (np.zeros((64, 64, 3), "u1"), (64, 64, 3), 3, UnsupportedError, "channel_axis 3"),
            (np.zeros((8, 5000, 3), "u1"), (8, 5000, 3), -1, LimitError, "4096"),
        ],
        ids=[
            "uint16",
            "grey",
            "rgba",
            "one channel",
            "two tiles",
            "channel first",
            "channel last",
            "axis too low",
            "axis too high",
            "too wide",
        ],
    )
    def test_when_the_array_is_made(
        self,
        array: np.ndarray,
        chunks: tuple[int, ...],
        channel_axis: int,
        error: type[Exception],
        match: str,
        tmp_path: Path,
    ) -> None:
        codec = WsicodecCodec(lossless=True, channel_axis=channel_axis)
        with pytest.raises(error, match=match) as caught:
            create(tmp_path / "r.zarr", array, chunks, serializer=codec)
        assert isinstance(caught.value, ValueError)

    def test_dtype_inside_shards(self, tmp_path: Path) -> None:
        image = np.zeros((64, 64, 3), np.uint16)
        codec = WsicodecCodec(lossless=True)
        with pytest.raises(UnsupportedError, match="uint16"):
            create(tmp_path / "r.zarr", image, (32, 32, 3), shards=(64, 64, 3), serializer=codec)

    def test_shape_inside_shards(self, tmp_path: Path) -> None:
        """zarr before 3.4 does not ask codecs inside shards, so there it is writing that fails."""
        image = np.ones((2, 64, 64, 3), np.uint8)
        codec = WsicodecCodec(lossless=True)
        with pytest.raises(UnsupportedError, match="not one RGB tile"):
            create(
                tmp_path / "r.zarr", image, (2, 32, 32, 3), shards=(2, 64, 64, 3), serializer=codec
            )[:] = image

    def test_unknown_model(self, tmp_path: Path) -> None:
        image = tissue(64, 64)
        codec = WsicodecCodec(model="no-such-model")
        assert codec.model_sha256 is None
        array = create(tmp_path / "m.zarr", image, image.shape, serializer=codec)
        with pytest.raises(UnknownModelError, match="no-such-model"):
            array[:] = image

    def test_damaged_and_foreign_chunks(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> None:
        path, image = tmp_path / "d.zarr", tissue(64, 64)
        create(path, image, image.shape, serializer=WsicodecCodec(**tile_kwargs))[:] = image
        chunk = path / "c" / "0" / "0" / "0"
        data = chunk.read_bytes()
        chunk.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ChecksumError):
            zarr.open_array(path, mode="r")[:]
        chunk.write_bytes(wsicodec.encode(tissue(32, 128), **tile_kwargs))
        with pytest.raises(FormatError, match=r"tile holds \(32, 128, 3\) where .* \(64, 64, 3\)"):
            zarr.open_array(path, mode="r")[:]
        chunk.write_bytes(wsicodec.encode(image, codec="jpeg"))
        with pytest.raises(FormatError, match="not a wsicodec tile"):
            zarr.open_array(path, mode="r")[:]


class TestConfig:
    def test_round_trip(self) -> None:
        codec = WsicodecCodec(quality=30, model="m", channel_axis=-3, model_sha256=DIGEST)
        stored = json.loads(json.dumps(codec.to_dict()))
        assert stored == {
            "name": "wsicodec",
            "configuration": {
                "quality": 30,
                "model": "m",
                "lossless": False,
                "channel_axis": -3,
                "model_sha256": DIGEST,
            },
        }
        assert WsicodecCodec.from_dict(stored) == codec
        assert pickle.loads(pickle.dumps(codec)) == codec
        assert hash(WsicodecCodec.from_dict(stored)) == hash(codec)

    def test_configuration_may_be_absent(self) -> None:
        codec = WsicodecCodec.from_dict({"name": "wsicodec"})
        assert codec == WsicodecCodec(model_sha256=None)
        # reading makes nothing up about the model
        assert codec.model_sha256 is None

    @pytest.mark.parametrize(
        "configuration",
        [
            {"quality": 0},
            {"quality": "70"},
            {"model": ""},
            {"model": None},
            {"lossless": 1},
            {"channel_axis": "first"},
            {"channel_axis": True},
            {"model_sha256": "abc"},
            {"model_sha256": DIGEST.upper()},
            {"effort": 3},
            [1],
        ],
        ids=str,
    )
    def test_what_it_refuses(self, configuration: Any) -> None:
        with pytest.raises(SettingsError):
            WsicodecCodec.from_dict({"name": "wsicodec", "configuration": configuration})

    def test_other_names_are_refused(self) -> None:
        with pytest.raises(SettingsError, match="'gzip'"):
            WsicodecCodec.from_dict({"name": "gzip", "configuration": {}})

    def test_an_unknown_key_speaks_of_a_later_version(self) -> None:
        with pytest.raises(SettingsError, match=r"unknown keys effort: .* later version"):
            WsicodecCodec.from_dict({"name": "wsicodec", "configuration": {"effort": 3}})


def chunk_spec(shape: tuple[int, ...]) -> ArraySpec:
    return ArraySpec(
        shape=shape,
        dtype=UInt8(),
        fill_value=np.uint8(255),
        config=ArrayConfig.from_dict({}),
        prototype=default_buffer_prototype(),
    )


def test_sync_and_async_agree(tile_kwargs: dict[str, Any]) -> None:
    image, codec = tissue(48, 64), WsicodecCodec(**tile_kwargs)
    spec = chunk_spec(image.shape)
    chunk = spec.prototype.nd_buffer.from_numpy_array(image)
    data = codec._encode_sync(chunk, spec)
    assert asyncio.run(codec._encode_single(chunk, spec)).to_bytes() == data.to_bytes()
    back = asyncio.run(codec._decode_single(data, spec))
    np.testing.assert_array_equal(
        back.as_numpy_array(), codec._decode_sync(data, spec).as_numpy_array()
    )
    np.testing.assert_array_equal(back.as_numpy_array(), image)
    with pytest.raises(NotImplementedError):
        codec.compute_encoded_size(image.nbytes, spec)
