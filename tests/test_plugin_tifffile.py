"""tifffile and tiffslide read and write wsicodec tiles, and say clearly what they cannot do."""

from __future__ import annotations

import enum
import importlib
import io
import json
import multiprocessing
import pickle
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import tiffslide
import zarr

import wsicodec
from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    SettingsError,
    UnsupportedError,
)
from wsicodec.plugins import tifffile as plugin

TAG = plugin.TIFF_COMPRESSION_TAG


@pytest.fixture
def tile_kwargs() -> dict[str, Any]:
    return {"lossless": True}


@pytest.fixture
def slide(tmp_path: Path, tile_kwargs: dict[str, Any]) -> tuple[Path, np.ndarray]:
    """An image of 3 x 4 tiles, the last row and column of them cut by the edge."""
    image = tissue(300, 450)
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path,
        image,
        tile=(128, 128),
        photometric="rgb",
        compression="wsicodec",
        compressionargs=tile_kwargs,
    )
    return path, image


def tissue(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Smooth violet and pink on off-white, uint8 (rows, columns, 3)."""
    phase = np.random.default_rng(seed).uniform(0, 6, 4)
    y, x = np.mgrid[:rows, :columns] / 48
    nuclei = 0.5 + 0.5 * np.sin(3 * x + phase[0]) * np.cos(2 * y + phase[1])
    stroma = 0.5 + 0.5 * np.sin(x - y + phase[2]) * np.cos(x / 2 + phase[3])
    density = nuclei[..., None] * (90, 110, 40) + stroma[..., None] * (10, 60, 30)
    return np.rint(240 - density).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def pad(tile: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Repeat the last row and column, as a converter would, in place of tifffile's black."""
    missing = ((0, rows - tile.shape[0]), (0, columns - tile.shape[1]), (0, 0))
    return np.pad(tile, missing, mode="edge")


class TestReadAndWrite:
    def test_array_comes_back(self, slide: tuple[Path, np.ndarray]) -> None:
        path, image = slide
        with tifffile.TiffFile(path) as tif:
            page = tif.pages.first
            assert page.compression is tifffile.COMPRESSION.WSICODEC
            assert page.tags["Compression"].value == TAG
            assert "WSICODEC" in str(page.tags["Compression"])
        np.testing.assert_array_equal(tifffile.imread(path), image)

    def test_default_settings_are_lossy_and_good(self, tmp_path: Path) -> None:
        image = tissue(256, 256)
        path = tmp_path / "learned.tif"
        tifffile.imwrite(
            path, image, tile=(256, 256), photometric="rgb", compression=plugin.TIFF_COMPRESSION_TAG
        )
        back = tifffile.imread(path)
        assert (back.shape, back.dtype) == (image.shape, image.dtype)
        assert psnr(back, image) > 25
        with tifffile.TiffFile(path) as tif:
            page = tif.pages.first
            data = tif.filehandle.read_segments(page.dataoffsets, page.databytecounts)
            info = wsicodec.probe(next(data)[0])
        assert info.mode == "learned"

    @pytest.mark.parametrize("name", ["wsicodec", "WSICODEC", TAG, "member"])
    def test_compression_by_name_value_and_member(
        self, name: object, tile_kwargs: dict[str, Any]
    ) -> None:
        compression = tifffile.COMPRESSION.WSICODEC if name == "member" else name
        image, file = tissue(64, 64), io.BytesIO()
        tifffile.imwrite(
            file, image, photometric="rgb", compression=compression, compressionargs=tile_kwargs
        )
        file.seek(0)
        np.testing.assert_array_equal(tifffile.imread(file), image)

    @pytest.mark.parametrize("workers", [1, 4])
    def test_threads_write_and_read(
        self, workers: int, tmp_path: Path, tile_kwargs: dict[str, Any]
    ) -> None:
        image, path = tissue(256, 512), tmp_path / "threads.tif"
        tifffile.imwrite(
            path,
            image,
            tile=(64, 64),
            photometric="rgb",
            compression="wsicodec",
            compressionargs=tile_kwargs,
            maxworkers=workers,
        )
        np.testing.assert_array_equal(tifffile.imread(path, maxworkers=workers), image)

    def test_decoder_runs_in_several_threads_at_once(
        self, slide: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, image = slide
        both = threading.Barrier(2, timeout=20)
        waiting = iter([True, True])  # the first two calls wait for each other

        def decode(data: bytes) -> np.ndarray:
            if next(waiting, False):
                both.wait()
            return plugin.tiff_decode(data)

        monkeypatch.setitem(tifffile.TIFF.DECOMPRESSORS._codecs, TAG, decode)
        np.testing.assert_array_equal(tifffile.imread(path, maxworkers=2), image)

    def test_strips(self, tile_kwargs: dict[str, Any]) -> None:
        image, file = tissue(100, 70), io.BytesIO()
        tifffile.imwrite(
            file,
            image,
            rowsperstrip=32,
            photometric="rgb",
            compression="wsicodec",
            compressionargs=tile_kwargs,
        )
        file.seek(0)
        np.testing.assert_array_equal(tifffile.imread(file), image)

    def test_ready_tiles_with_our_own_padding(
        self, tmp_path: Path, tile_kwargs: dict[str, Any]
    ) -> None:
        image, path = tissue(200, 300), tmp_path / "ready.tif"
        tiles = [
            wsicodec.encode(pad(image[y : y + 128, x : x + 128], 128, 128), **tile_kwargs)
            for y in range(0, 200, 128)
            for x in range(0, 300, 128)
        ]
        self._write_ready(path, tiles)
        np.testing.assert_array_equal(tifffile.imread(path), image)
        with tifffile.TiffFile(path) as tif:
            page = tif.pages.first
            data = tif.filehandle.read_segments(page.dataoffsets[-1:], page.databytecounts[-1:])
            corner = wsicodec.decode(next(data)[0])
        assert (corner[200 - 128 :, 300 - 256 :] == image[-1, -1]).all()  # not black

    def test_ready_tiles_cropped_at_the_edge(
        self, tmp_path: Path, tile_kwargs: dict[str, Any]
    ) -> None:
        image, path = tissue(200, 300), tmp_path / "cropped.tif"
        tiles = [
            wsicodec.encode(image[y : y + 128, x : x + 128], **tile_kwargs)
            for y in range(0, 200, 128)
            for x in range(0, 300, 128)
        ]
        self._write_ready(path, tiles)
        np.testing.assert_array_equal(tifffile.imread(path), image)
        with tifffile.imread(path, aszarr=True) as store:
            np.testing.assert_array_equal(zarr.open(store, mode="r")[:], image)

    def test_modes_and_empty_tiles_mix(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> None:
        image, path = tissue(128, 512), tmp_path / "mixed.tif"
        image[:, 128:256] = (250, 250, 251)
        image[:, 384:] = 0  # tifffile's value of a tile that is not there
        tiles = [wsicodec.encode(image[:, x : x + 128], **tile_kwargs) for x in (0, 128, 256)]
        assert wsicodec.probe(tiles[1]).mode == "constant"
        self._write_ready(path, [*tiles, b""], shape=image.shape)
        np.testing.assert_array_equal(tifffile.imread(path), image)

    @staticmethod
    def _write_ready(
        path: Path, tiles: list[bytes], shape: tuple[int, ...] = (200, 300, 3)
    ) -> None:
        with tifffile.TiffWriter(path, bigtiff=True) as writer:
            writer.write(
                iter(tiles),
                shape=shape,
                dtype=np.uint8,
                tile=(128, 128),
                photometric="rgb",
                compression="wsicodec",
            )


class TestZarrView:
    @pytest.mark.parametrize("workers", [None, 4])
    def test_aszarr(self, slide: tuple[Path, np.ndarray], workers: int | None) -> None:
        path, image = slide
        with tifffile.imread(path, aszarr=True, maxworkers=workers) as store:
            array = zarr.open(store, mode="r")
            assert (array.shape, array.dtype) == (image.shape, image.dtype)
            np.testing.assert_array_equal(array[100:290, 120:440], image[100:290, 120:440])
            np.testing.assert_array_equal(array[:], image)

    def test_reference_file_is_read_through_numcodecs(
        self, slide: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        from wsicodec.plugins import numcodecs as numcodecs_plugin

        numcodecs_plugin.register()
        path, _ = slide
        reference = io.StringIO()
        with tifffile.imread(path, aszarr=True) as store:
            store.write_fsspec(reference, "file://" + str(tmp_path), compressors={TAG: "wsicodec"})
        entry = json.loads(reference.getvalue())
        metadata = json.loads(entry.get("refs", entry)[".zarray"])
        assert metadata["compressor"] == {"id": "wsicodec"}
        codec = numcodecs_plugin.Wsicodec.from_config({})
        with tifffile.TiffFile(path) as tif:
            page = tif.pages.first
            first = next(
                tif.filehandle.read_segments(page.dataoffsets[:1], page.databytecounts[:1])
            )[0]
        np.testing.assert_array_equal(codec.decode(first), tifffile.imread(path)[:128, :128])


class TestPyramid:
    @pytest.fixture
    def pyramid(self, tmp_path: Path, tile_kwargs: dict[str, Any]) -> tuple[Path, list[np.ndarray]]:
        levels = [tissue(600, 800), tissue(300, 400, 1), tissue(150, 200, 2)]
        path = tmp_path / "pyramid.ome.tiff"
        options: dict[str, Any] = {
            "photometric": "rgb",
            "tile": (128, 128),
            "compression": "wsicodec",
            "compressionargs": tile_kwargs,
            "resolutionunit": "CENTIMETER",
        }
        metadata = {
            "axes": "YXS",
            "PhysicalSizeX": 0.25,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": 0.25,
            "PhysicalSizeYUnit": "µm",
        }
        with tifffile.TiffWriter(path, bigtiff=True, ome=True) as writer:
            writer.write(levels[0], subifds=2, resolution=(4e4, 4e4), metadata=metadata, **options)
            writer.write(levels[1], subfiletype=1, resolution=(2e4, 2e4), **options)
            writer.write(levels[2], subfiletype=1, resolution=(1e4, 1e4), **options)
        return path, levels

    def test_levels(self, pyramid: tuple[Path, list[np.ndarray]]) -> None:
        path, levels = pyramid
        with tifffile.TiffFile(path) as tif:
            assert tif.is_ome
            assert [level.shape for level in tif.series[0].levels] == [x.shape for x in levels]
        for index, level in enumerate(levels):
            np.testing.assert_array_equal(tifffile.imread(path, level=index), level)
            with tifffile.imread(path, aszarr=True, level=index) as store:
                np.testing.assert_array_equal(zarr.open(store, mode="r")[:], level)

    def test_tiffslide(self, pyramid: tuple[Path, list[np.ndarray]]) -> None:
        path, levels = pyramid
        with tiffslide.TiffSlide(path) as slide:
            assert slide.level_dimensions == ((800, 600), (400, 300), (200, 150))
            assert slide.properties["tiffslide.mpp-x"] == pytest.approx(0.25)
            region = np.asarray(slide.read_region((100, 50), 0, (300, 200)))
            np.testing.assert_array_equal(region[..., :3], levels[0][50:250, 100:400])
            region = np.asarray(slide.read_region((200, 100), 1, (100, 80)))
            np.testing.assert_array_equal(region[..., :3], levels[1][50:130, 100:200])


def read_sum(path: str) -> int:
    """Runs in a worker process, which imports this module and so wsicodec."""
    return int(tifffile.imread(path, maxworkers=2).sum())


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_worker_processes_read(method: str, slide: tuple[Path, np.ndarray]) -> None:
    path, image = slide
    assert read_sum(str(path)) == image.sum()  # threads and tables are in use before the fork
    with multiprocessing.get_context(method).Pool(2) as pool:
        sums = pool.map_async(read_sum, [str(path)] * 3).get(timeout=60)
    assert sums == [image.sum()] * 3


class TestErrors:
    def test_without_the_plugin_the_value_is_named(self, slide: tuple[Path, np.ndarray]) -> None:
        path, image = slide
        plugin.uninstall()
        try:
            assert not plugin.is_installed()
            plugin.uninstall()  # a second time does nothing
            assert TAG not in tifffile.COMPRESSION._value2member_map_
            assert not hasattr(tifffile.COMPRESSION, "WSICODEC")
            with tifffile.TiffFile(path) as tif:
                assert tif.pages.first.shape == image.shape  # the file still opens
            with pytest.raises(ValueError, match=f"{TAG} is not a known COMPRESSION"):
                tifffile.imread(path)
            with pytest.raises(ValueError, match="COMPRESSION"):
                tifffile.imwrite(io.BytesIO(), image, compression="wsicodec")
        finally:
            plugin.install()
        np.testing.assert_array_equal(tifffile.imread(path), image)

    def test_a_damaged_tile_stops_the_read(self, slide: tuple[Path, np.ndarray]) -> None:
        path, _ = slide
        with tifffile.TiffFile(path) as tif:
            offset = tif.pages.first.dataoffsets[5] + 40
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
        with pytest.raises(ChecksumError):
            tifffile.imread(path)
        with tifffile.imread(path, aszarr=True) as store:
            array = zarr.open(store, mode="r")
            with pytest.raises(ChecksumError):
                array[:]

    def test_a_stranger_under_our_value_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "stranger.tif"
        jpeg = wsicodec.encode(tissue(128, 128), codec="jpeg")
        with tifffile.TiffWriter(path) as writer:
            writer.write(
                iter([jpeg]),
                shape=(128, 128, 3),
                dtype=np.uint8,
                tile=(128, 128),
                photometric="rgb",
                compression="wsicodec",
            )
        with pytest.raises(FormatError, match="not a wsicodec tile: starts with ff d8"):
            tifffile.imread(path)

    @pytest.mark.parametrize(
        ("image", "options", "error", "match"),
        [
            (np.zeros((64, 64), np.uint8), {}, UnsupportedError, "grey"),
            (np.zeros((64, 64, 3), np.uint16), {"photometric": "rgb"}, UnsupportedError, "uint16"),
            (np.zeros((64, 64, 4), np.uint8), {"photometric": "rgb"}, UnsupportedError, "RGBA"),
            (
                np.zeros((16, 5000, 3), np.uint8),
                {"photometric": "rgb", "rowsperstrip": 16},
                LimitError,
                "4096",
            ),
            (
                np.zeros((64, 64, 3), np.uint8),
                {"photometric": "rgb", "compressionargs": {"level": 3, "lossless": True}},
                SettingsError,
                "level unknown; wsicodec has lossless, model, quality",
            ),
            (
                np.zeros((64, 64, 3), np.uint8),
                {"photometric": "rgb", "compressionargs": {"quality": 0}},
                SettingsError,
                "quality 0",
            ),
        ],
        ids=["grey", "uint16", "rgba", "wide strip", "unknown argument", "quality"],
    )
    def test_what_cannot_be_coded_is_named(
        self, image: np.ndarray, options: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            tifffile.imwrite(io.BytesIO(), image, compression="wsicodec", **options)


def host_like_tifffile() -> Any:
    """A module with just what ``install`` looks at, free to be spoiled."""
    members = {"NONE": 1, "ADOBE_DEFLATE": 8}
    tiff = types.SimpleNamespace(
        DECOMPRESSORS=types.SimpleNamespace(_codecs={}),
        COMPRESSORS=types.SimpleNamespace(_codecs={}),
        IMAGE_COMPRESSIONS={7},
    )
    return types.SimpleNamespace(
        TIFF=tiff, COMPRESSION=enum.IntEnum("COMPRESSION", members), __version__="2099.1.1"
    )


class TestInstall:
    def test_canary_sings(self) -> None:
        plugin.canary()

    def test_canary_says_what_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        true_decode = plugin.tiff_decode

        def decode(data: bytes) -> np.ndarray:
            return true_decode(data) ^ 1

        decode.__module__ = plugin.__name__
        monkeypatch.setattr(plugin, "tiff_decode", decode)
        with pytest.raises(UnsupportedError, match="pixels come back changed"):
            plugin.canary()
        monkeypatch.undo()
        plugin.install()
        plugin.canary()

    def test_value_is_private_and_free(self) -> None:
        plugin.uninstall()
        try:
            taken = set(tifffile.COMPRESSION._value2member_map_)
        finally:
            plugin.install()
        assert TAG not in taken | {34666, 65000, 65001, 65002}
        assert 32768 <= TAG < 65535

    def test_idempotent(self) -> None:
        before = list(tifffile.COMPRESSION)
        plugin.install()
        wsicodec.register()
        assert list(tifffile.COMPRESSION) == before
        assert plugin.is_installed()

    def test_enum_member_behaves(self) -> None:
        member = tifffile.COMPRESSION.WSICODEC
        assert member is tifffile.COMPRESSION(TAG) is tifffile.COMPRESSION["WSICODEC"]
        assert member in tifffile.COMPRESSION
        if sys.version_info >= (3, 12):  # a TypeError before
            assert TAG in tifffile.COMPRESSION
        assert member in list(tifffile.COMPRESSION)
        assert pickle.loads(pickle.dumps(member)) is member
        assert repr(member) == f"<COMPRESSION.WSICODEC: {TAG}>"

    def test_reload_of_the_plugin_replaces_its_functions(self) -> None:
        importlib.reload(plugin)
        plugin.install()
        assert tifffile.TIFF.DECOMPRESSORS._codecs[TAG] is plugin.tiff_decode
        plugin.canary()

    def test_install_and_uninstall_leave_no_trace(self) -> None:
        host = host_like_tifffile()
        plugin.install(host)
        assert plugin.is_installed(host)
        assert host.COMPRESSION.WSICODEC == TAG
        plugin.uninstall(host)
        assert not plugin.is_installed(host)
        assert host.TIFF.DECOMPRESSORS._codecs == host.TIFF.COMPRESSORS._codecs == {}
        assert sorted(host.TIFF.IMAGE_COMPRESSIONS) == [7]
        assert [m.name for m in host.COMPRESSION] == ["NONE", "ADOBE_DEFLATE"]

    def test_a_tifffile_without_the_tables_is_named(self) -> None:
        host = host_like_tifffile()
        host.TIFF.DECOMPRESSORS = types.MappingProxyType({})
        with pytest.raises(
            UnsupportedError, match=r"tifffile 2099.1.1 cannot read .*DECOMPRESSORS._codecs"
        ):
            plugin.install(host)
        assert not plugin.is_installed(host)
        plugin.uninstall(host)

    def test_a_tifffile_that_cannot_write_still_reads(self) -> None:
        host = host_like_tifffile()
        host.COMPRESSION = {"NONE": 1}
        with pytest.raises(UnsupportedError, match=r"2099.1.1 cannot write .*COMPRESSION"):
            plugin.install(host)
        assert host.TIFF.DECOMPRESSORS._codecs == {TAG: plugin.tiff_decode}
        assert TAG in host.TIFF.IMAGE_COMPRESSIONS
        assert not plugin.is_installed(host)

    def test_another_owner_keeps_the_value(self) -> None:
        host = host_like_tifffile()
        host.TIFF.DECOMPRESSORS._codecs[TAG] = json.loads
        with pytest.raises(UnsupportedError, match=f"{TAG} .* belongs to json.loads"):
            plugin.install(host)
        assert host.TIFF.DECOMPRESSORS._codecs[TAG] is json.loads
        plugin.uninstall(host)
        assert host.TIFF.DECOMPRESSORS._codecs[TAG] is json.loads

        host = host_like_tifffile()
        host.COMPRESSION = enum.IntEnum("COMPRESSION", {"NONE": 1, "OTHER": TAG})
        with pytest.raises(UnsupportedError, match=r"belongs to <COMPRESSION\.OTHER"):
            plugin.install(host)
