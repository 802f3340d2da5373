"""SlideReader: what it reads, what it says of it, and what it refuses by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from slides import (
    CMU,
    DESCRIPTION,
    ICC,
    data_slide,
    tissue,
    write_aperio_j2k,
    write_jpeg_tiff,
    write_svs,
)

from wsicodec.errors import (
    FormatError,
    LimitError,
    SettingsError,
    SlideError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.slide import pages
from wsicodec.slide.reader import SlideReader
from wsicodec.slide.record import TAG_RECORD


def _assert_regions(path: Path, image: np.ndarray, level: int = 0) -> None:
    """The whole level, and rectangles at its edges and across its tiles, are those of an array."""
    height, width = image.shape[:2]
    rng = np.random.default_rng(1)
    with SlideReader(path) as slide:
        assert (slide.levels[level].height, slide.levels[level].width) == (height, width)
        np.testing.assert_array_equal(slide.read_region(level, 0, 0, height, width), image)
        for _ in range(20):
            y, x = int(rng.integers(height)), int(rng.integers(width))
            h, w = int(rng.integers(height - y)) + 1, int(rng.integers(width - x)) + 1
            region = slide.read_region(level, y, x, h, w)
            np.testing.assert_array_equal(region, image[y : y + h, x : x + w])


class TestBundledSlide:
    def test_says_what_it_is(self) -> None:
        with SlideReader(CMU) as slide:
            info = slide.info
        assert info.format == "svs"
        assert info.compression == "jpeg"
        assert info.photometric == "rgb"
        assert (info.mpp_x, info.mpp_y, info.magnification) == (0.499, 0.499, 20)
        assert info.associated == ("thumbnail", "label", "macro")
        assert info.history == ("jpeg q30", "jpeg q30")
        assert info.icc_profile is None
        assert info.record is None
        assert info.description is not None
        assert info.description.startswith("Aperio Image Library v11.2.1")
        assert info.file_bytes == CMU.stat().st_size
        (level,) = info.levels
        assert (level.height, level.width, level.downsample) == (2967, 2220, 1)
        assert (level.tile_height, level.tile_width) == (240, 240)
        assert (level.rows, level.columns) == (13, 10)

    def test_pixels_are_those_of_tifffile(self) -> None:
        with tifffile.TiffFile(CMU) as file:
            image = file.pages[0].asarray()
        _assert_regions(CMU, image)

    def test_rgb_coded_jpeg_has_its_colours(self) -> None:
        """Taken for YCbCr, as the tags suggest, white glass would be green."""
        image = tissue(256, 256).reshape(-1, 3).astype(float)
        glass = image[image.min(1) > 235]
        assert len(glass) > 5000
        assert np.ptp(glass.mean(0)) < 5
        stained = image[image.min(1) < 150]
        assert stained[:, 0].mean() > stained[:, 2].mean() > stained[:, 1].mean()


def test_jpeg2000_svs_of_two_levels() -> None:
    path = data_slide("tcga-cr-7395-01a-01-ts1.svs")
    with SlideReader(path) as slide, tifffile.TiffFile(path) as file:
        info = slide.info
        assert info.compression == "jpeg2000"
        assert [(lv.height, lv.width) for lv in info.levels] == [(3567, 4443), (1783, 2221)]
        assert info.associated == ("thumbnail",)
        assert info.icc_profile == file.pages[0].tags[34675].value
        assert info.history == ("jpeg2000 q70",)
        assert (info.mpp_x, info.magnification) == (None, None)
        tile = next(file.pages[2].segments())[0][0]
        np.testing.assert_array_equal(slide.read_region(1, 0, 0, 256, 256), tile)


def test_ome_tiff_of_bio_formats() -> None:
    path = data_slide("os-1-detail.ome.tif")
    with SlideReader(path) as slide:
        assert slide.info.format == "ome-tiff"
        assert slide.info.mpp_x == pytest.approx(0.22709724)
        assert slide.info.mpp_y == pytest.approx(0.22710240)
    _assert_regions(path, tifffile.imread(path))


def test_levels_are_told_by_content(tmp_path: Path) -> None:
    """The thumbnail lies between the levels; label and macro have other shapes."""
    image = tissue(700, 900)
    path = write_svs(tmp_path / "a.svs", image, levels=3)
    with SlideReader(path) as slide:
        assert [lv.downsample for lv in slide.levels] == pytest.approx([1, 4, 16], rel=0.02)
        assert slide.info.associated == ("thumbnail", "label", "macro")
        assert (slide.info.mpp_x, slide.info.magnification) == (0.2527, 40)
        assert slide.info.description == DESCRIPTION
        assert slide.info.icc_profile == ICC
        assert slide.info.history == ("jpeg q70",)
    _assert_regions(path, image[::4, ::4], level=1)
    _assert_regions(path, image[::16, ::16], level=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"tile": (64, 112)},
        {"tile": (16, 16), "compression": "lzw", "predictor": True},
        {"tile": (512, 512), "compression": "zstd", "bigtiff": True},
        {"rowsperstrip": 7, "compression": "deflate"},
        {"compression": "lzw", "byteorder": ">"},
        {},
        {"rowsperstrip": 30},
        {"tile": (64, 64), "compression": "jpegxl"},
        {"tile": (64, 64), "compression": "webp", "compressionargs": {"lossless": True}},
        {"tile": (128, 128), "compression": "wsicodec", "compressionargs": {"lossless": True}},
    ],
    ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()) or "one strip",
)
def test_tiles_and_strips(tmp_path: Path, settings: dict[str, Any]) -> None:
    image = tissue(203, 301)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", **settings)
    _assert_regions(path, image)


def test_separate_planes(tmp_path: Path) -> None:
    image = tissue(150, 170)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        np.ascontiguousarray(image.transpose(2, 0, 1)),
        photometric="rgb",
        planarconfig="separate",
        tile=(64, 64),
        compression="deflate",
    )
    _assert_regions(path, image)


@pytest.mark.parametrize("rows_per_strip", [None, 100, 101])
def test_uncompressed_strips_are_read_in_parts(
    tmp_path: Path, rows_per_strip: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole slide in one strip must not need its whole self in memory."""
    monkeypatch.setattr(pages, "_ROWS_BYTES", 301 * 3 * 30)
    image = tissue(203, 301)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, photometric="rgb", rowsperstrip=rows_per_strip)
    with SlideReader(path) as slide:
        assert slide.levels[0].tile_height <= 30
    _assert_regions(path, image)


def test_ycbcr_jpeg(tmp_path: Path) -> None:
    image = tissue(256, 384)
    path = write_jpeg_tiff(tmp_path / "a.tif", image)
    with SlideReader(path) as slide:
        assert slide.info.photometric == "ycbcr"
        assert slide.info.history == ("jpeg",)
        decoded = slide.read_region(0, 0, 0, 256, 384)
    assert np.abs(decoded.astype(int).mean((0, 1)) - image.mean((0, 1))).max() < 1


@pytest.mark.parametrize("compression", [33003, 33005])
def test_aperio_jpeg2000_colours(tmp_path: Path, compression: int) -> None:
    image = tissue(128, 128)
    path = write_aperio_j2k(tmp_path / "a.svs", image, compression)
    with SlideReader(path) as slide:
        decoded = slide.read_region(0, 0, 0, 128, 128)
    # YCbCr in 8 bits cannot hold all of RGB
    assert np.abs(decoded.astype(int) - image).max() <= (3 if compression == 33003 else 0)


def test_missing_tiles_are_glass(tmp_path: Path) -> None:
    image = tissue(128, 128)
    tiles = [image[:64, :64], None, None, image[64:, 64:]]
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=image.shape,
        dtype="uint8",
        photometric="rgb",
        tile=(64, 64),
        compression=None,
    )
    with SlideReader(path) as slide:
        decoded = slide.read_region(0, 0, 0, 128, 128)
        assert slide.tile_bytes(0, 0, 1) == b""
    np.testing.assert_array_equal(decoded[:64, :64], image[:64, :64])
    assert (decoded[:64, 64:] == 255).all()


class TestResolution:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"resolution": (40000, 20000), "resolutionunit": "CENTIMETER"}, (0.25, 0.5)),
            ({"resolution": (101600, 101600), "resolutionunit": "INCH"}, (0.25, 0.25)),
            ({"resolution": (72, 72), "resolutionunit": "INCH"}, (None, None)),
            ({"resolution": (40000, 40000), "resolutionunit": "NONE"}, (None, None)),
            ({}, (None, None)),
        ],
        ids=["cm", "inch", "72 dpi of an editor", "no unit", "none"],
    )
    def test_of_tiff_tags(
        self, tmp_path: Path, settings: dict[str, Any], expected: tuple[float | None, ...]
    ) -> None:
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, tissue(32, 32), photometric="rgb", **settings)
        with SlideReader(path) as slide:
            assert (slide.info.mpp_x, slide.info.mpp_y) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("size", "unit", "expected"),
        [(250, "nm", 0.25), (0.00025, "mm", 0.25), (0.25, "µm", 0.25), (0.25, "pixel", None)],
    )
    def test_of_ome_xml(
        self, tmp_path: Path, size: float, unit: str, expected: float | None
    ) -> None:
        path = tmp_path / "a.ome.tif"
        tifffile.imwrite(
            path,
            tissue(32, 32),
            photometric="rgb",
            metadata={
                "axes": "YXS",
                "PhysicalSizeX": size,
                "PhysicalSizeXUnit": unit,
                "PhysicalSizeY": size * 2,
                "PhysicalSizeYUnit": unit,
            },
        )
        with SlideReader(path) as slide:
            assert slide.info.format == "ome-tiff"
            assert slide.info.mpp_x == pytest.approx(expected)
            assert slide.info.mpp_y == pytest.approx(expected and 2 * expected)


class TestRefused:
    @pytest.mark.parametrize(
        ("array", "settings", "word"),
        [
            (np.zeros((32, 32, 3), np.uint16), {"photometric": "rgb"}, "16"),
            (np.zeros((32, 32), np.uint8), {"photometric": "minisblack"}, "grey"),
            (np.zeros((32, 32, 4), np.uint8), {"photometric": "rgb"}, "RGBA"),
            (np.zeros((32, 32, 4), np.uint8), {"photometric": "separated"}, "CMYK"),
            (
                np.zeros((32, 32), np.uint8),
                {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
                "palette",
            ),
            (np.zeros((32, 32, 3), np.float32), {"photometric": "rgb"}, "float32"),
            (np.zeros((2, 32, 32, 3), np.uint8), {"photometric": "rgb"}, "stack"),
            (np.zeros((32, 32, 3), np.uint8), {"photometric": "ycbcr"}, "YCbCr"),
        ],
        ids=["16-bit", "grey", "rgba", "cmyk", "palette", "float", "stack", "raw ycbcr"],
    )
    def test_other_pixels(
        self, tmp_path: Path, array: np.ndarray, settings: dict[str, Any], word: str
    ) -> None:
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, array, **settings)
        with pytest.raises(UnsupportedError, match=word) as caught:
            SlideReader(path)
        assert str(path) in str(caught.value)

    def test_fluorescence(self, tmp_path: Path) -> None:
        path = tmp_path / "a.ome.tif"
        tifffile.imwrite(
            path,
            np.zeros((3, 32, 32), np.uint8),
            photometric="minisblack",
            metadata={"axes": "CYX"},
        )
        with pytest.raises(UnsupportedError, match="fluorescence"):
            SlideReader(path)

    def test_other_vendors(self) -> None:
        with pytest.raises(UnsupportedError, match="NDPI"):
            SlideReader(data_slide("hamamatsu-test3-tritc.ndpi"))

    def test_giant_strips(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.tif"
        tifffile.imwrite(
            path, tissue(200, 200), photometric="rgb", compression="lzw", rowsperstrip=200
        )
        monkeypatch.setattr(pages, "MAX_SEGMENT_BYTES", 1000)
        with pytest.raises(LimitError, match="smaller tiles"):
            SlideReader(path)

    @pytest.mark.parametrize(
        ("content", "word"),
        [
            (b"", "empty"),
            (b"not a slide at all", "not a TIFF"),
            (b"II*\x00", "TIFF"),
            (b"II*\x00\x08\x00\x00\x00", "TIFF"),
            (b"II+\x00\x08\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff", "TIFF"),
            (b"MM\x00*" + bytes(200), "TIFF"),
        ],
    )
    def test_no_slide(self, tmp_path: Path, content: bytes, word: str) -> None:
        path = tmp_path / "a.svs"
        path.write_bytes(content)
        with pytest.raises(SlideError, match=word) as caught:
            SlideReader(path)
        assert str(path) in str(caught.value)

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SlideError, match="No such file"):
            SlideReader(tmp_path / "missing.svs")
        with pytest.raises(SlideError, match="folder"):
            SlideReader(tmp_path)

    def test_record_that_is_none_of_ours(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        text = b'{"format": "something else"}\0'
        tifffile.imwrite(
            path,
            tissue(32, 32),
            photometric="rgb",
            extratags=[(TAG_RECORD, 2, len(text), text, True)],
        )
        with pytest.raises(FormatError, match="record"):
            SlideReader(path)


class TestDamage:
    def test_cut_file_names_the_tile(self, tmp_path: Path) -> None:
        content = CMU.read_bytes()
        with tifffile.TiffFile(CMU) as file:
            middle = file.pages[0].dataoffsets[61] + 10
        # the directories of this file lie at its end: keep them, lose the bytes of a tile
        path = tmp_path / "cut.svs"
        broken = bytearray(content)
        broken[middle : middle + 400] = bytes(400)
        path.write_bytes(broken)
        with SlideReader(path) as slide:
            slide.read_region(0, 0, 0, 240, 240)
            with pytest.raises(SlideError, match="level 0: tile at row 6, column 1") as caught:
                slide.read_region(0, 1440, 240, 240, 240)
        assert str(path) in str(caught.value)

    def test_file_cut_at_any_byte(self, tmp_path: Path) -> None:
        """Whatever is missing, the error is one of ours and no memory is asked for in vain."""
        whole = write_svs(tmp_path / "whole.svs", tissue(260, 250)).read_bytes()
        path = tmp_path / "cut.svs"
        for length in np.linspace(1, len(whole) - 1, 60).astype(int):
            path.write_bytes(whole[:length])
            try:
                with SlideReader(path) as slide:
                    for level in slide.levels:
                        slide.read_region(level.index, 0, 0, level.height, level.width)
            except WsicodecError as error:
                assert str(path) in str(error)

    def test_flipped_directory_bytes(self, tmp_path: Path) -> None:
        """Directories of a stranger: any value in any tag raises one of our errors or reads."""
        original = write_svs(tmp_path / "whole.svs", tissue(64, 64), levels=1).read_bytes()
        with tifffile.TiffFile(tmp_path / "whole.svs") as file:
            start = file.pages[0].offset
            count = len(file.pages[0].tags)
        path = tmp_path / "flipped.svs"
        rng = np.random.default_rng(4)
        for position in range(start, start + 2 + 12 * count):
            broken = bytearray(original)
            broken[position] = int(rng.integers(256))
            path.write_bytes(broken)
            try:
                with SlideReader(path) as slide:
                    level = slide.levels[0]
                    slide.read_region(0, 0, 0, min(64, level.height), min(64, level.width))
            except WsicodecError as error:
                assert str(path) in str(error)

    def test_failed_tile_can_be_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A tile that could not be read leaves no trace in the cache."""
        path = write_svs(tmp_path / "a.svs", tissue(240, 240), levels=1)
        with SlideReader(path) as slide:
            read = slide._pages[0]._file.read

            def fail(*_: object) -> bytes:
                raise SlideError("the network is away")

            monkeypatch.setattr(slide._pages[0]._file, "read", fail)
            with pytest.raises(SlideError, match="network"):
                slide.read_region(0, 0, 0, 10, 10)
            monkeypatch.setattr(slide._pages[0]._file, "read", read)
            assert slide.read_region(0, 0, 0, 10, 10).shape == (10, 10, 3)


@pytest.mark.parametrize(
    ("level", "y", "x", "height", "width"),
    [(0, -1, 0, 5, 5), (0, 0, 0, 2968, 5), (0, 2960, 0, 8, 5), (0, 0, 0, -1, 5), (1, 0, 0, 5, 5)],
)
def test_regions_outside(level: int, y: int, x: int, height: int, width: int) -> None:
    with SlideReader(CMU) as slide, pytest.raises(SettingsError):
        slide.read_region(level, y, x, height, width)


def test_empty_region_and_closed_slide() -> None:
    slide = SlideReader(CMU)
    assert slide.read_region(0, 5, 5, 0, 7).shape == (0, 7, 3)
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read_region(0, 0, 0, 5, 5)


class TestThreads:
    @pytest.mark.parametrize("cache_bytes", [0, 10**6, 10**9])
    def test_many_threads_see_the_same_pixels(self, cache_bytes: int) -> None:
        with tifffile.TiffFile(CMU) as file:
            image = file.pages[0].asarray()

        def read(seed: int) -> bool:
            rng = np.random.default_rng(seed)
            y, x = int(rng.integers(1000)), int(rng.integers(1500))
            region = slide.read_region(0, y, x, 300, 300)
            return bool((region == image[y : y + 300, x : x + 300]).all())

        with SlideReader(CMU, cache_bytes) as slide, ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(40)))

    @pytest.mark.parametrize("threads", [1, 4])
    def test_cache_is_bounded(self, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
        """With two rows of tiles in the cache, raster order decodes nothing twice.

        Among threads that is the rule and no promise: one that the system holds up comes late.
        """
        limit = 2 * 10 * 240 * 240 * 3
        with SlideReader(CMU, limit) as slide:
            decoded = _count_decodes(slide, monkeypatch)
            places = [(y, x) for y in range(0, 1024, 256) for x in range(0, 2220, 256)]

            def read(at: tuple[int, int]) -> None:
                slide.read_region(0, *at, 256, min(256, 2220 - at[1]))

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, places))
            assert len(set(decoded)) == 5 * 10
            if threads == 1:
                assert len(decoded) == 5 * 10
            held = sum(tile.nbytes for tile in slide._cache._ready.values())
            assert held == slide._cache._bytes <= limit

    def test_a_tile_that_many_threads_want_is_decoded_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with SlideReader(CMU) as slide, ThreadPoolExecutor(8) as pool:
            barrier = threading.Barrier(8)
            decoded = _count_decodes(slide, monkeypatch)

            def read(_: int) -> int:
                barrier.wait()
                return int(slide.read_region(0, 0, 0, 240, 240).sum())

            assert len(set(pool.map(read, range(8)))) == 1
            assert decoded == [(0, 0)]


def _count_decodes(slide: SlideReader, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The tiles of level 0 that are decoded from now on, one entry each time."""
    page = slide._pages[0]
    decode: Callable[[int, int], np.ndarray] = page.decode
    decoded: list[tuple[int, int]] = []

    def counted(row: int, column: int) -> np.ndarray:
        decoded.append((row, column))  # atomic in CPython
        return decode(row, column)

    monkeypatch.setattr(page, "decode", counted)
    return decoded
