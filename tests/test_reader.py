"""TiffReader: what it reads, what it says of it, and what it refuses by name."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from slides import (
    CMU,
    DESCRIPTION,
    ICC,
    ROOT,
    data_slide,
    tissue,
    write_aperio_j2k,
    write_jpeg_tiff,
    write_svs,
    ycbcr,
)

from wsicodec.errors import (
    FormatError,
    LimitError,
    SettingsError,
    SlideError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.slide import associated, layout, pages
from wsicodec.slide.passport import TAG_PASSPORT
from wsicodec.slide.protocol import StoredImage, StoredLayout
from wsicodec.slide.record import TAG_RECORD
from wsicodec.slide.tiff import TiffReader


def _assert_regions(path: Path, image: np.ndarray, level: int = 0) -> None:
    """The whole level, and rectangles at its edges and across its tiles, are those of an array."""
    height, width = image.shape[:2]
    rng = np.random.default_rng(1)
    with TiffReader(path) as slide:
        assert (slide.levels[level].height, slide.levels[level].width) == (height, width)
        np.testing.assert_array_equal(slide.read_region(level, 0, 0, height, width), image)
        for _ in range(20):
            y, x = int(rng.integers(height)), int(rng.integers(width))
            h, w = int(rng.integers(height - y)) + 1, int(rng.integers(width - x)) + 1
            region = slide.read_region(level, y, x, h, w)
            np.testing.assert_array_equal(region, image[y : y + h, x : x + w])


class TestBundledSlide:
    def test_says_what_it_is(self) -> None:
        with TiffReader(CMU) as slide:
            info = slide.info
        assert info.format == "svs"
        assert info.compression == "jpeg"
        assert info.photometric == "rgb"
        assert (info.mpp_x, info.mpp_y, info.magnification) == (0.499, 0.499, 20)
        assert info.associated == ("thumbnail", "label", "macro")
        assert info.history == ("jpeg q30", "jpeg q30")
        assert (info.vendor, info.acquisition_date) == ("aperio", "2009-12-29T09:59:15")
        assert info.as_dict()["acquisition_date"] == "2009-12-29T09:59:15"
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
    with TiffReader(path) as slide, tifffile.TiffFile(path) as file:
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
    with TiffReader(path) as slide:
        assert slide.info.format == "ome-tiff"
        assert slide.info.mpp_x == pytest.approx(0.22709724)
        assert slide.info.mpp_y == pytest.approx(0.22710240)
    _assert_regions(path, tifffile.imread(path))


def test_levels_are_told_by_content(tmp_path: Path) -> None:
    """The thumbnail lies between the levels; label and macro have other shapes."""
    image = tissue(700, 900)
    path = write_svs(tmp_path / "a.svs", image, levels=3)
    with TiffReader(path) as slide:
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
    with TiffReader(path) as slide:
        assert slide.levels[0].tile_height <= 30
    _assert_regions(path, image)


def test_ycbcr_jpeg(tmp_path: Path) -> None:
    image = tissue(256, 384)
    path = write_jpeg_tiff(tmp_path / "a.tif", image)
    with TiffReader(path) as slide:
        assert slide.info.photometric == "ycbcr"
        assert slide.info.history == ("jpeg",)
        decoded = slide.read_region(0, 0, 0, 256, 384)
    assert np.abs(decoded.astype(int).mean((0, 1)) - image.mean((0, 1))).max() < 1


@pytest.mark.parametrize("compression", [33003, 33005])
def test_aperio_jpeg2000_colours(tmp_path: Path, compression: int) -> None:
    image = tissue(128, 128)
    path = write_aperio_j2k(tmp_path / "a.svs", image, compression)
    with TiffReader(path) as slide:
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
    with TiffReader(path) as slide:
        decoded = slide.read_region(0, 0, 0, 128, 128)
        assert slide.tile_bytes(0, 0, 1) == b""
    np.testing.assert_array_equal(decoded[:64, :64], image[:64, :64])
    assert (decoded[:64, 64:] == 255).all()


@pytest.mark.parametrize("compression", [7, 33003, 33005])
def test_missing_tiles_of_scanners_are_white(tmp_path: Path, compression: int) -> None:
    """Not what YCbCr of (255, 255, 255) is in RGB, which is pink."""
    image = tissue(64, 128)
    if compression == 7:
        tile = imagecodecs.jpeg8_encode(image[:, :64], level=90)
    else:
        pixels = ycbcr(image[:, :64]) if compression == 33003 else image[:, :64]
        tile = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", mct=False)
    path = tmp_path / "a.svs"
    tifffile.imwrite(
        path,
        iter([bytes(tile), b""]),
        shape=image.shape,
        dtype="uint8",
        tile=(64, 64),
        photometric="rgb",
        compression=compression,
        description=DESCRIPTION,
        metadata=None,
    )
    with TiffReader(path) as slide:
        decoded = slide.read_region(0, 0, 0, 64, 128)
    assert (decoded[:, 64:] == 255).all()
    assert decoded[:, :64].std() > 5


# (name, settings of tifffile, greatest difference of a sample)
_LOSSLESS_JXL = {"compressionargs": {"lossless": True}}
COMPRESSIONS: list[tuple[str, dict[str, Any], int]] = [
    ("none", {"compression": None}, 0),
    ("lzw", {"compression": "lzw", "predictor": True}, 0),
    ("deflate", {"compression": "deflate"}, 0),
    ("deflate", {"compression": 32946, "predictor": True}, 0),
    ("packbits", {"compression": "packbits"}, 0),
    ("lzma", {"compression": "lzma"}, 0),
    ("zstd", {"compression": "zstd"}, 0),
    ("png", {"compression": "png"}, 0),
    ("webp", {"compression": "webp", **_LOSSLESS_JXL}, 0),
    ("jpegxl", {"compression": "jpegxl", **_LOSSLESS_JXL}, 0),
    ("jpegxl", {"compression": 52546, **_LOSSLESS_JXL}, 0),
    ("jpeg", {"compression": "jpeg", "compressionargs": {"level": 100}, "subsampling": (1, 1)}, 4),
    ("jpeg2000", {"compression": "jpeg2000"}, 0),
    ("jpeg2000", {"compression": 33004}, 0),
    ("jpeg2000", {"compression": 33005}, 0),
    ("wsicodec", {"compression": "wsicodec", "compressionargs": {"lossless": True}}, 0),
]


@pytest.mark.parametrize(
    ("name", "settings", "far"),
    COMPRESSIONS,
    ids=lambda v: str(v["compression"]) if isinstance(v, dict) else "",
)
def test_pyramids_of_every_compression(
    tmp_path: Path, name: str, settings: dict[str, Any], far: int
) -> None:
    image = tissue(200, 260)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for number, level in enumerate((image, image[::2, ::2])):
            writer.write(
                np.ascontiguousarray(level),
                photometric="rgb",
                tile=(112, 96),
                subfiletype=min(number, 1),
                metadata=None,
                **settings,
            )
    with TiffReader(path) as slide:
        assert slide.info.compression == name
        assert bool(slide.info.history) == (name in LOSSY)
        for number, level in enumerate((image, image[::2, ::2])):
            shape = level.shape[:2]
            assert (slide.levels[number].height, slide.levels[number].width) == shape
            pixels = slide.read_region(number, 0, 0, *shape).astype(int)
            assert np.abs(pixels - level).max() <= far
            part = slide.read_region(number, 31, 17, 60, 100).astype(int)
            assert np.abs(part - level[31:91, 17:117]).max() <= far


LOSSY = ("jpeg", "jpeg2000", "jpegxl", "webp", "wsicodec")


@pytest.mark.parametrize("tile", [(100, 60), (1, 77), (301, 1), (1000, 999)])
def test_tiles_of_sizes_that_tiff_forbids(tmp_path: Path, tile: tuple[int, int]) -> None:
    """TIFF asks for multiples of 16, and not everyone obeys."""
    image = tissue(203, 301)
    path = write_odd_tiles(tmp_path / "a.tif", image, tile)
    with TiffReader(path) as slide:
        assert (slide.levels[0].tile_height, slide.levels[0].tile_width) == tile
    _assert_regions(path, image)


def write_odd_tiles(path: Path, image: np.ndarray, tile: tuple[int, int]) -> Path:
    """The plainest classic TIFF: deflated tiles of any size behind one directory."""
    tall, wide = tile
    rows, columns = -(-image.shape[0] // tall), -(-image.shape[1] // wide)
    padded = np.zeros((rows * tall, columns * wide, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    tiles = [
        zlib.compress(padded[r * tall :, c * wide :][:tall, :wide].tobytes())
        for r in range(rows)
        for c in range(columns)
    ]
    tags = {256: image.shape[1], 257: image.shape[0], 258: 8, 259: 8, 262: 2, 277: 3}
    tags |= {322: wide, 323: tall}
    lists = 8 + 2 + 12 * (len(tags) + 2) + 4
    start = lists + 8 * len(tiles)
    starts = [start + sum(map(len, tiles[:n])) for n in range(len(tiles))]
    entries = [struct.pack("<HHII", code, 4, 1, value) for code, value in tags.items()]
    for number, code in enumerate((324, 325)):
        where = lists + 4 * len(tiles) * number
        value = (starts, [len(t) for t in tiles])[number][0] if len(tiles) == 1 else where
        entries.append(struct.pack("<HHII", code, 4, len(tiles), value))
    path.write_bytes(
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(entries)
        + bytes(4)
        + struct.pack(f"<{2 * len(tiles)}I", *starts, *map(len, tiles))
        + b"".join(tiles)
    )
    return path


class TestLevelsByContent:
    def _write(self, path: Path, *images: np.ndarray, tiled: bool = True) -> Path:
        with tifffile.TiffWriter(path) as writer:
            for image in images:
                writer.write(
                    np.ascontiguousarray(image),
                    photometric="rgb",
                    compression="deflate",
                    tile=(64, 64) if tiled else None,
                    metadata=None,
                )
        return path

    @pytest.mark.parametrize("tiled", [True, False])
    def test_in_any_order(self, tmp_path: Path, tiled: bool) -> None:
        image = tissue(400, 600)
        images = image[::4, ::4], image, image[::8, ::8], image[::2, ::2]
        path = self._write(tmp_path / "a.tif", *images, tiled=tiled)
        with TiffReader(path) as slide:
            assert [lv.width for lv in slide.levels] == [600, 300, 150, 75]
            assert slide.info.associated == ()
        _assert_regions(path, image)
        _assert_regions(path, image[::8, ::8], level=3)

    def test_thumbnail_first(self, tmp_path: Path) -> None:
        image = tissue(400, 600)
        path = tmp_path / "a.tif"
        settings: dict[str, Any] = {"photometric": "rgb", "metadata": None}
        with tifffile.TiffWriter(path) as writer:
            writer.write(image[::10, ::10], **settings)
            writer.write(image[:, :250], **settings)  # larger than nothing, and no pyramid
            writer.write(image, tile=(64, 64), **settings)
            writer.write(np.ascontiguousarray(image[::4, ::4]), tile=(64, 64), **settings)
        with TiffReader(path) as slide:
            assert [lv.width for lv in slide.levels] == [600, 150]
            assert slide.info.associated == ("thumbnail", "image 2 of 250 x 400 pixels")
            thumbnail = slide.read_associated("thumbnail").pixels
            np.testing.assert_array_equal(thumbnail, image[::10, ::10])
        _assert_regions(path, image)

    @pytest.mark.parametrize("shift", [(0, 0), (2, 0), (0, -2), (-2, 2)])
    def test_sizes_a_few_pixels_off(self, tmp_path: Path, shift: tuple[int, int]) -> None:
        """Scanners round, cut off what is no whole tile, or leave out a border."""
        image = tissue(800, 900)
        level = image[::4, ::4]
        off = np.pad(level, ((2, 2), (2, 2), (0, 0)), mode="edge")
        off = off[2 : 202 + shift[0], 2 : 227 + shift[1]]
        path = self._write(tmp_path / "a.tif", image, off)
        with TiffReader(path) as slide:
            assert len(slide.levels) == 2
            assert slide.levels[1].downsample == 900 / off.shape[1]
        _assert_regions(path, off, level=1)

    def test_other_shapes_are_no_levels(self, tmp_path: Path) -> None:
        image = tissue(400, 600)
        path = self._write(tmp_path / "a.tif", image, image[:200, :270], image[::2, ::2])
        with TiffReader(path) as slide:
            assert [lv.width for lv in slide.levels] == [600, 300]
            assert slide.info.associated == ("image 1 of 270 x 200 pixels",)

    def test_two_images_of_one_smaller_size(self, tmp_path: Path) -> None:
        image = tissue(400, 600)
        path = self._write(tmp_path / "a.tif", image, image[::2, ::2], image[1::2, 1::2])
        with TiffReader(path) as slide:
            assert [lv.width for lv in slide.levels] == [600, 300]
            (name,) = slide.info.associated
            pixels = slide.read_associated(name).pixels
            np.testing.assert_array_equal(pixels, image[1::2, 1::2])

    def test_missing_levels(self, tmp_path: Path) -> None:
        image = tissue(640, 1280)
        path = self._write(tmp_path / "a.tif", image, image[::16, ::16])
        with TiffReader(path) as slide:
            assert [lv.downsample for lv in slide.levels] == [1, 16]
        _assert_regions(path, image[::16, ::16], level=1)

    def test_small_slide_with_a_larger_macro(self, tmp_path: Path) -> None:
        image = tissue(64, 64)
        path = tmp_path / "a.svs"
        with tifffile.TiffWriter(path) as writer:
            writer.write(
                image, tile=(64, 64), description=DESCRIPTION, photometric="rgb", metadata=None
            )
            writer.write(
                tissue(300, 500),
                description="Aperio\r\nmacro 500x300",
                photometric="rgb",
                metadata=None,
            )
        with TiffReader(path) as slide:
            assert [(lv.height, lv.width) for lv in slide.levels] == [(64, 64)]
            assert slide.info.associated == ("macro",)

    def test_too_many_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        image = tissue(64, 64)
        path = self._write(tmp_path / "a.tif", *(image[: n + 20, :30] for n in range(9)))
        TiffReader(path).close()
        monkeypatch.setattr(layout, "MAX_DIRECTORIES", 8)
        with pytest.raises(LimitError, match="9 images"):
            TiffReader(path)

    def test_imagej_stack(self, tmp_path: Path) -> None:
        """One directory for many images."""
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, np.zeros((3, 32, 32, 3), np.uint8), imagej=True)
        with pytest.raises(UnsupportedError, match="stack"):
            TiffReader(path)


def _label_kinds() -> list[tuple[str, np.ndarray, dict[str, Any], np.ndarray, bool]]:
    """Name, array, settings, RGB expected, and whether the segments can be copied."""
    rgb = np.random.default_rng(5).integers(0, 256, (50, 70, 3), np.uint8)
    grey = np.ascontiguousarray(rgb[..., 0])
    three = np.repeat(grey[..., None], 3, axis=2)
    alpha = np.ascontiguousarray(np.dstack([rgb, rgb[..., 1]]))
    over = (rgb * (alpha[..., 3:] / 255) + 255 - alpha[..., 3:]).round()
    colours = np.random.default_rng(6).integers(0, 2**16, (3, 256)).astype(np.uint16)
    white = {"photometric": "miniswhite"}
    black: dict[str, Any] = {"photometric": "minisblack"}
    return [
        ("grey", grey, black, three, False),
        ("grey lzw", grey, {**black, "compression": "lzw", "predictor": True}, three, False),
        (
            "grey jpeg",
            three[:48, :64, 0] * 0 + 77,
            {**black, "compression": "jpeg"},
            np.full((48, 64, 3), 77),
            False,
        ),
        ("white is zero", grey, white, 255 - three, False),
        ("16-bit grey", grey.astype(np.uint16) << 8 | 99, black, three, False),
        ("1-bit", grey > 127, black, np.where(three > 127, 255, 0), False),
        (
            "palette",
            grey,
            {"photometric": "palette", "colormap": colours},
            (colours >> 8).T[grey],
            False,
        ),
        (
            "8-bit palette",
            grey,
            {"photometric": "palette", "colormap": colours >> 8},
            (colours >> 8).T[grey],
            False,
        ),
        ("rgb", rgb, {"photometric": "rgb"}, rgb, True),
        ("rgb strips", rgb, {"photometric": "rgb", "rowsperstrip": 7}, rgb, True),
        (
            "rgb tiles",
            rgb,
            {"photometric": "rgb", "tile": (16, 32), "compression": "deflate", "predictor": True},
            rgb,
            True,
        ),
        (
            "rgb planes",
            np.ascontiguousarray(rgb.transpose(2, 0, 1)),
            {"photometric": "rgb", "planarconfig": "separate"},
            rgb,
            False,
        ),
        ("16-bit rgb", rgb.astype(np.uint16) * 257, {"photometric": "rgb"}, rgb, False),
        ("rgba", alpha, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, over, False),
        (
            "rgb and more",
            alpha,
            {"photometric": "rgb", "extrasamples": ["unspecified"]},
            rgb,
            False,
        ),
        ("jpeg2000", rgb, {"photometric": "rgb", "compression": "jpeg2000"}, rgb, True),
    ]


class TestAssociated:
    def _write(self, path: Path, array: np.ndarray, **settings: Any) -> Path:
        with tifffile.TiffWriter(path) as writer:
            writer.write(
                tissue(128, 128),
                tile=(64, 64),
                photometric="rgb",
                description=DESCRIPTION,
                metadata=None,
            )
            writer.write(
                array, description="Aperio\r\nlabel 70x50", subfiletype=1, metadata=None, **settings
            )
        return path

    def test_of_the_bundled_slide(self) -> None:
        with TiffReader(CMU) as slide, tifffile.TiffFile(CMU) as file:
            for name, number in (("thumbnail", 1), ("label", 2), ("macro", 3)):
                image = slide.read_associated(name)
                page = file.pages[number]
                assert image.name == name
                np.testing.assert_array_equal(image.pixels, page.asarray())
                assert image.stored is not None
                assert image.stored.segments == tuple(
                    CMU.read_bytes()[start : start + count]
                    for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)
                )
            assert image.stored.jpegtables == page.jpegtables
            with pytest.raises(SettingsError, match=r"'slide'.*thumbnail, label, macro"):
                slide.read_associated("slide")
        with pytest.raises(SlideError, match="closed"):
            slide.read_associated("label")

    @pytest.mark.parametrize(
        ("array", "settings", "expected", "copied"),
        [kind[1:] for kind in _label_kinds()],
        ids=[kind[0] for kind in _label_kinds()],
    )
    def test_whatever_it_is_becomes_rgb(
        self,
        tmp_path: Path,
        array: np.ndarray,
        settings: dict[str, Any],
        expected: np.ndarray,
        copied: bool,
    ) -> None:
        path = self._write(tmp_path / "a.svs", array, **settings)
        with TiffReader(path) as slide:
            assert slide.info.associated == ("label",)
            image = slide.read_associated("label")
            assert image.pixels.dtype == np.uint8
            assert image.pixels.flags.writeable
            assert image.pixels.shape == expected.shape
            assert np.abs(image.pixels.astype(int) - expected).max() <= (
                1 if "jpeg" in str(settings) and not copied else 0
            )
            assert (image.stored is not None) == copied
        if image.stored is not None:
            pixels = _rewrapped(tmp_path / "b.tif", image.stored)
            np.testing.assert_array_equal(pixels, expected)

    def test_bilevel_missing_strips_are_white(self, tmp_path: Path) -> None:
        image = tissue(64, 64)
        path = self._write(
            tmp_path / "a.svs",
            iter([zlib.compress(image[:32].tobytes()), b""]),
            shape=(64, 64, 3),
            dtype="uint8",
            photometric="rgb",
            rowsperstrip=32,
            compression="deflate",
        )
        with TiffReader(path) as slide:
            label = slide.read_associated("label")
        np.testing.assert_array_equal(label.pixels[:32], image[:32])
        assert (label.pixels[32:] == 255).all()
        assert label.stored is not None
        assert label.stored.segments[1] == b""

    @pytest.mark.parametrize(
        ("array", "settings", "word"),
        [
            (np.zeros((50, 70), np.float32), {"photometric": "minisblack"}, "float32"),
            (np.zeros((50, 70, 4), np.uint8), {"photometric": "separated"}, "4 channels"),
            (np.zeros((48, 64, 3), np.uint8), {"photometric": "rgb", "compression": "jpegxr"},
             "jpegxr"),
        ],
        ids=["float", "cmyk", "jpegxr"],
    )  # fmt: skip
    def test_what_cannot_be_shown_spoils_itself_alone(
        self, tmp_path: Path, array: np.ndarray, settings: dict[str, Any], word: str
    ) -> None:
        path = self._write(tmp_path / "a.svs", array, **settings)
        with TiffReader(path) as slide:
            slide.read_region(0, 0, 0, 128, 128)
            assert slide.info.associated == ("label",)
            with pytest.raises(UnsupportedError, match=f"image 'label'.*{word}") as caught:
                slide.read_associated("label")
        assert str(path) in str(caught.value)

    def test_damage_is_named_when_it_is_read(self, tmp_path: Path) -> None:
        content = bytearray(CMU.read_bytes())
        with tifffile.TiffFile(CMU) as file:
            start = file.pages[3].dataoffsets[5]
        content[start : start + 300] = bytes(300)
        path = tmp_path / "a.svs"
        path.write_bytes(content)
        with TiffReader(path) as slide:
            slide.read_associated("label")
            with pytest.raises(SlideError, match="image 'macro'") as caught:
                slide.read_associated("macro")
        assert str(path) in str(caught.value)

    def test_cap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self._write(tmp_path / "a.svs", tissue(50, 70), photometric="rgb")
        monkeypatch.setattr(associated, "MAX_ASSOCIATED_BYTES", 50 * 70 * 3 - 1)
        with TiffReader(path) as slide, pytest.raises(LimitError, match="70 x 50"):
            slide.read_associated("label")

    def test_names_are_unique(self, tmp_path: Path) -> None:
        path = tmp_path / "a.svs"
        with tifffile.TiffWriter(path) as writer:
            settings: dict[str, Any] = {"photometric": "rgb", "metadata": None}
            writer.write(tissue(128, 128), tile=(64, 64), description=DESCRIPTION, **settings)
            for number in range(3):
                writer.write(tissue(40, 20 + number), description="Aperio\r\nlabel 1x1", **settings)
        with TiffReader(path) as slide:
            assert slide.info.associated == ("label", "label 2", "label 3")
            assert slide.read_associated("label 3").pixels.shape == (40, 22, 3)

    def test_names_by_other_words(self, tmp_path: Path) -> None:
        """A description of one word, TIFF's PageName, and Aperio's subfile type without words."""
        path = tmp_path / "a.svs"
        settings: dict[str, Any] = {"photometric": "rgb", "metadata": None}
        with tifffile.TiffWriter(path) as writer:
            writer.write(tissue(128, 128), tile=(64, 64), description=DESCRIPTION, **settings)
            writer.write(tissue(10, 60), description="Aperio", subfiletype=9, **settings)
            writer.write(tissue(60, 10), description="Label", **settings)
            writer.write(tissue(20, 20), extratags=[(285, 2, 10, "thumbnail\0", True)], **settings)
            writer.write(tissue(10, 90), description="wsicodec 1.2\r\nbarcode 90x10", **settings)
        with TiffReader(path) as slide:
            assert slide.info.associated == ("macro", "label", "thumbnail", "barcode")

    def test_of_ome_tiff(self, tmp_path: Path) -> None:
        """Further images: as we name them, and as Bio-Formats does."""
        image = tissue(256, 320)
        path = tmp_path / "a.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as writer:
            settings: dict[str, Any] = {"photometric": "rgb", "compression": "deflate"}
            # the macro comes first, and is larger
            writer.write(
                tissue(300, 400), metadata={"axes": "YXS", "Name": "macro image"}, **settings
            )
            writer.write(
                image, tile=(64, 64), subifds=1, metadata={"axes": "YXS", "Name": "a"}, **settings
            )
            writer.write(
                np.ascontiguousarray(image[::2, ::2]), tile=(64, 64), subfiletype=1, **settings
            )
            writer.write(tissue(40, 30), metadata={"axes": "YXS", "Name": "label"}, **settings)
            writer.write(
                np.zeros((3, 30, 30), np.uint8),
                photometric="minisblack",
                metadata={"axes": "CYX", "Name": "stack"},
            )
        with TiffReader(path) as slide:
            assert [(lv.height, lv.width) for lv in slide.levels] == [(256, 320), (128, 160)]
            assert slide.info.associated == ("macro", "label", "stack")
            for name, expected in (("macro", tissue(300, 400)), ("label", tissue(40, 30))):
                found = slide.read_associated(name)
                np.testing.assert_array_equal(found.pixels, expected)
                assert found.stored is not None
            with pytest.raises(UnsupportedError, match=r"image 'stack'.*more than one plane"):
                slide.read_associated("stack")
        _assert_regions(path, image)


def _rewrapped(path: Path, stored: StoredImage) -> np.ndarray:
    """Pixels of another TIFF with the same segments, as tifffile reads them."""
    settings: dict[str, Any] = {"tile": stored.tile} if stored.tile else {}
    if stored.rows_per_strip:
        settings["rowsperstrip"] = stored.rows_per_strip
    tifffile.imwrite(
        path,
        iter(stored.segments),
        shape=(stored.height, stored.width, 3),
        dtype="uint8",
        photometric="rgb" if stored.compression == 7 else stored.photometric,
        compression=stored.compression,
        predictor=stored.predictor,
        jpegtables=stored.jpegtables,
        subsampling=stored.subsampling,
        metadata=None,
        **settings,
    )
    return tifffile.imread(path)


class TestStoredLayout:
    def test_of_the_bundled_slide(self) -> None:
        with TiffReader(CMU) as slide, tifffile.TiffFile(CMU) as file:
            stored = slide.stored_layout(0)
            tables = file.pages[0].jpegtables
            assert stored == StoredLayout(
                height=2967,
                width=2220,
                compression=7,
                photometric=2,
                tile=(240, 240),
                rows_per_strip=None,
                jpegtables=tables,
            )
            with pytest.raises(SettingsError, match="no level 1"):
                slide.stored_layout(1)

    @pytest.mark.parametrize(
        "settings",
        [
            {"tile": (64, 112), "compression": "lzw", "predictor": True},
            {"rowsperstrip": 40, "compression": "deflate"},
            {"rowsperstrip": 50},
            {},
            {"tile": (64, 64), "compression": "jpegxl"},
            {"tile": (64, 64), "compression": "jpeg", "subsampling": (2, 1)},
            {"tile": (64, 64), "compression": "jpeg2000", "bigtiff": True, "byteorder": ">"},
        ],
        ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()) or "one strip",
    )
    def test_tile_bytes_fill_the_layout(
        self, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where one large strip is handed out in parts."""
        monkeypatch.setattr(pages, "_ROWS_BYTES", 301 * 3 * 30)
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, tissue(203, 301), photometric="rgb", metadata=None, **settings)
        with TiffReader(path) as slide:
            level = slide.levels[0]
            stored = slide.stored_layout(0)
            assert (stored.tile is None) == ("tile" not in settings)
            assert stored.tile == settings.get("tile")
            assert stored.subsampling == settings.get("subsampling")
            segments = tuple(
                slide.tile_bytes(0, row, column)
                for row in range(level.rows)
                for column in range(level.columns)
            )
            expected = slide.read_region(0, 0, 0, 203, 301)
        image = StoredImage(**vars(stored), segments=segments)
        np.testing.assert_array_equal(_rewrapped(tmp_path / "b.tif", image), expected)

    def test_subsampling_of_the_stream_where_the_tag_is_missing(self, tmp_path: Path) -> None:
        path = write_jpeg_tiff(tmp_path / "a.tif", tissue(256, 384))
        with tifffile.TiffFile(path) as file:
            entry = file.pages[0].tags[530].offset
        content = bytearray(path.read_bytes())
        content[entry : entry + 2] = struct.pack("<H", 65000)  # a tag that nobody knows
        path.write_bytes(content)
        with TiffReader(path) as slide:
            assert slide.stored_layout(0).subsampling == (2, 2)

    def test_planes_are_told(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        planes = np.ascontiguousarray(tissue(64, 64).transpose(2, 0, 1))
        tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
        with TiffReader(path) as slide:
            assert slide.stored_layout(0).planarconfig == 2


class TestBombs:
    """Streams that say they are larger than their tile would be decoded as they say."""

    def _bomb(self, compression: int) -> bytes:
        pixels = np.full((600, 600, 3), 240, np.uint8)
        if compression == 7:
            return bytes(imagecodecs.jpeg_encode(pixels, level=50))
        if compression == 50001:
            return bytes(imagecodecs.webp_encode(pixels, level=10, lossless=False))
        if compression == 50002:
            return bytes(imagecodecs.jpegxl_encode(pixels, effort=1))
        if compression == 34933:
            return bytes(imagecodecs.png_encode(pixels, level=1))
        return bytes(imagecodecs.jpeg2k_encode(pixels, level=30, codecformat="j2k"))

    @pytest.mark.parametrize("compression", [7, 33003, 33005, 34712, 34933, 50001, 50002])
    def test_a_tile(self, tmp_path: Path, compression: int) -> None:
        path = tmp_path / "a.tif"
        bomb = self._bomb(compression)
        tifffile.imwrite(
            path,
            iter([bomb]),
            shape=(64, 64, 3),
            dtype="uint8",
            photometric="rgb",
            tile=(64, 64),
            compression=compression,
            metadata=None,
        )
        with (
            TiffReader(path) as slide,
            pytest.raises(LimitError, match="tile at row 0, column 0") as caught,
        ):
            slide.read_region(0, 0, 0, 64, 64)
        assert str(path) in str(caught.value)
        assert "in the place of 64 x 64" in str(caught.value)

    def test_a_label(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        settings: dict[str, Any] = {"photometric": "rgb", "metadata": None}
        with tifffile.TiffWriter(path) as writer:
            writer.write(tissue(128, 128), tile=(64, 64), **settings)
            writer.write(
                iter([self._bomb(7)]),
                shape=(30, 60, 3),
                dtype="uint8",
                compression="jpeg",
                description="label",
                rowsperstrip=30 // 16 * 16 + 16,
                **settings,
            )
        with TiffReader(path) as slide, pytest.raises(LimitError, match="image 'label'"):
            slide.read_associated("label")

    @pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xc0\0\x11\x08"])
    @pytest.mark.parametrize("compression", [1, 7, 33005, 34712, 34933, 50001, 50002])
    def test_streams_without_a_header(self, data: bytes, compression: int) -> None:
        from wsicodec.slide.streams import declared_size

        assert declared_size(data, compression) is None

    @pytest.mark.parametrize("height", [1, 7, 8, 256, 300])
    @pytest.mark.parametrize("width", [1, 8, 300, 9000])
    def test_headers(self, height: int, width: int) -> None:
        from wsicodec.slide.streams import declared_size

        image = np.zeros((height, width, 3), np.uint8)
        streams = {
            50002: imagecodecs.jpegxl_encode(image, effort=1),
            34712: imagecodecs.jpeg2k_encode(image, level=0, codecformat="jp2", numthreads=1),
            34933: imagecodecs.png_encode(image, level=1),
            7: imagecodecs.jpeg_encode(image),
            50001: imagecodecs.webp_encode(image, lossless=height == 7),
        }
        for compression, stream in streams.items():
            found = declared_size(bytes(stream), compression)
            assert found is not None
            assert found[:2] == (height, width), compression

    @staticmethod
    def _hidden() -> dict[str, tuple[int, bytes]]:
        """Streams of 600 x 600 pixels that libraries decode, by what used to hide their size."""
        pixels = np.full((600, 600, 3), 240, np.uint8)
        jpeg = bytes(imagecodecs.jpeg_encode(pixels, level=50))
        jp2 = bytes(imagecodecs.jpeg2k_encode(pixels, level=30, codecformat="jp2"))
        jxl = bytes(imagecodecs.jpegxl_encode(pixels, effort=1, usecontainer=True))
        webp = bytes(imagecodecs.webp_encode(pixels, level=10, lossless=False))

        def box(content: bytes) -> bytes:
            return struct.pack(">I4s", 8 + len(content), b"free") + content

        first, codestream = jxl.index(b"jxlc") - 4, jp2.index(b"\xff\x4f\xff\x51")
        return {
            "TEM behind SOI": (7, jpeg[:2] + b"\xff\x01" + jpeg[2:]),
            "RST behind SOI": (7, jpeg[:2] + b"\xff\xd3" + jpeg[2:]),
            "stray bytes in JPEG": (7, jpeg[:2] + b"\0\1\xff\0" + jpeg[2:]),
            "size in a box": (34712, jp2[:32] + box(b"\xff\x4f\xff\x51" + bytes(60)) + jp2[32:]),
            "many boxes": (34712, jp2[:32] + box(bytes(5000)) + jp2[32:]),
            "marker before SIZ": (
                34712, jp2[: codestream + 2] + b"\xff\x30" + jp2[codestream + 2 :],
            ),
            "jxlc in a box": (50002, jxl[:first] + box(b"jxlc\xff\x0a" + bytes(60)) + jxl[first:]),
            "jxlp in parts": (
                50002,
                jxl[:first]
                + struct.pack(">I4sI", 15, b"jxlp", 0)
                + jxl[first + 8 : first + 11]
                + struct.pack(">I4sI", 12 + len(jxl) - first - 11, b"jxlp", 2**31 + 1)
                + jxl[first + 11 :],
            ),
            "WebP without RIFF": (50001, webp[20:]),
        }  # fmt: skip

    @pytest.mark.parametrize("name", _hidden())
    def test_hidden_sizes(self, tmp_path: Path, name: str) -> None:
        compression, bomb = self._hidden()[name]
        path = tmp_path / "a.tif"
        settings: dict[str, Any] = {
            "shape": (64, 64, 3),
            "dtype": "uint8",
            "photometric": "rgb",
            "tile": (64, 64),
            "compression": compression,
            "metadata": None,
        }
        tifffile.imwrite(path, iter([bomb]), **settings)
        # libraries take it for what it is
        decode = {7: imagecodecs.jpeg_decode, 34712: imagecodecs.jpeg2k_decode,
                  50002: imagecodecs.jpegxl_decode, 50001: imagecodecs.webp_decode}  # fmt: skip
        assert decode[compression](bomb).shape == (600, 600, 3)
        with TiffReader(path) as slide, pytest.raises((LimitError, SlideError)) as caught:
            slide.read_region(0, 0, 0, 64, 64)
        assert "in the place of 64 x 64" in str(caught.value) or "how large" in str(caught.value)
        assert "tile at row 0, column 0" in str(caught.value)

    def test_of_any_depth(self) -> None:
        """Slides hold what the codec of tiles refuses."""
        from wsicodec.slide.streams import declared_size

        for image in (np.zeros((70, 90), np.uint8), np.zeros((70, 90, 3), np.uint16)):
            for codecformat in ("jp2", "j2k"):
                stream = imagecodecs.jpeg2k_encode(image, level=0, codecformat=codecformat)
                assert declared_size(bytes(stream), 34712) == (70, 90, image[0, 0].size)
            for boxed in (False, True):
                stream = imagecodecs.jpegxl_encode(image, effort=1, usecontainer=boxed)
                assert declared_size(bytes(stream), 50002) == (70, 90, 0)

    def test_long_rows_of_nothing(self) -> None:
        from wsicodec.slide.streams import declared_size

        started = time.perf_counter()
        boxes = b"\0\0\0\x08free" * 10**6
        assert declared_size(boxes, 34712) is None
        assert declared_size(boxes, 50002) is None
        for filling in (b"\xff\xe0\0\2", b"\xff\1", b"\xff\0", b"\xff", b"\0"):
            assert declared_size(b"\xff\xd8" + filling * 10**6, 7) is None
        assert time.perf_counter() - started < 3


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
        with TiffReader(path) as slide:
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
        with TiffReader(path) as slide:
            assert slide.info.format == "ome-tiff"
            assert slide.info.mpp_x == pytest.approx(expected)
            assert slide.info.mpp_y == pytest.approx(expected and 2 * expected)


class TestAcquisitionDate:
    @pytest.mark.parametrize(
        ("told", "expected"),
        [
            ("2012-03-04T05:06:07", "2012-03-04T05:06:07"),
            ("2012-03-04T05:06:07Z", "2012-03-04T05:06:07+00:00"),
            ("not a date", None),
        ],
    )
    def test_of_ome_xml(self, tmp_path: Path, told: str, expected: str | None) -> None:
        path = tmp_path / "a.ome.tif"
        tifffile.imwrite(
            path,
            tissue(32, 32),
            photometric="rgb",
            metadata={"axes": "YXS", "AcquisitionDate": told},
        )
        assert told in (tifffile.TiffFile(path).ome_metadata or "")
        with TiffReader(path) as slide:
            assert slide.info.acquisition_date == expected

    @pytest.mark.parametrize(
        ("told", "expected"),
        [("2017:02:07 13:07:45", "2017-02-07T13:07:45"), ("1970:01:01 00:00:00", None)],
    )
    def test_of_tiff(self, tmp_path: Path, told: str, expected: str | None) -> None:
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, tissue(32, 32), photometric="rgb", datetime=told)
        with TiffReader(path) as slide:
            assert slide.info.acquisition_date == expected
            assert slide.info.vendor is None

    def test_of_aperio_before_that_of_the_file(self, tmp_path: Path) -> None:
        """A copy of a slide is younger than the slide."""
        path = tmp_path / "a.svs"
        tifffile.imwrite(
            path,
            tissue(32, 32),
            photometric="rgb",
            description=DESCRIPTION,
            datetime="2017:02:07 13:07:45",
            metadata=None,
        )
        with TiffReader(path) as slide:
            assert slide.info.acquisition_date == "2009-12-29"


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
            TiffReader(path)
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
            TiffReader(path)

    @pytest.mark.parametrize("compression", ["jpegxr", "lerc"])
    def test_other_compressions(self, tmp_path: Path, compression: str) -> None:
        """Before the first tile is read, not hours later."""
        path = tmp_path / "a.tif"
        tifffile.imwrite(
            path, tissue(64, 64), photometric="rgb", tile=(64, 64), compression=compression
        )
        with pytest.raises(UnsupportedError, match=f"compression {compression}.* is not read"):
            TiffReader(path)

    def test_other_vendors(self) -> None:
        with pytest.raises(UnsupportedError, match="NDPI"):
            TiffReader(data_slide("hamamatsu-test3-tritc.ndpi"))

    def test_giant_strips(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.tif"
        tifffile.imwrite(
            path, tissue(200, 200), photometric="rgb", compression="lzw", rowsperstrip=200
        )
        monkeypatch.setattr(pages, "MAX_SEGMENT_BYTES", 1000)
        with pytest.raises(LimitError, match="smaller tiles"):
            TiffReader(path)

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
            TiffReader(path)
        assert str(path) in str(caught.value)

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SlideError, match="No such file"):
            TiffReader(tmp_path / "missing.svs")
        with pytest.raises(SlideError, match="folder"):
            TiffReader(tmp_path)

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
            TiffReader(path)


def _write_tile(path: Path, stream: bytes, compression: int) -> Path:
    """A slide of one tile, 64 x 64."""
    tifffile.imwrite(
        path,
        iter([stream]),
        shape=(64, 64, 3),
        dtype="uint8",
        photometric="rgb",
        tile=(64, 64),
        compression=compression,
        metadata=None,
    )
    return path


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
        with TiffReader(path) as slide:
            slide.read_region(0, 0, 0, 240, 240)
            with pytest.raises(SlideError, match="level 0: tile at row 6, column 1") as caught:
                slide.read_region(0, 1440, 240, 240, 240)
        assert str(path) in str(caught.value)

    def test_a_strip_of_too_few_bytes(self, tmp_path: Path) -> None:
        """What lies behind it belongs to others."""
        path = tmp_path / "a.tif"
        tifffile.imwrite(
            path, tissue(64, 64), photometric="rgb", rowsperstrip=16, metadata=None, byteorder="<"
        )
        with tifffile.TiffFile(path) as file:
            place = file.pages[0].tags[279].valueoffset
        content = bytearray(path.read_bytes())
        assert struct.unpack_from("<4H", content, place) == (16 * 64 * 3,) * 4
        struct.pack_into("<H", content, place + 2, 16 * 64 * 3 - 1)
        path.write_bytes(content)
        with TiffReader(path) as slide:
            slide.read_region(0, 0, 0, 16, 64)
            with pytest.raises(SlideError, match="row 1, column 0: its strip has 3071 bytes"):
                slide.read_region(0, 0, 0, 17, 64)

    @pytest.mark.parametrize(("kind", "count"), [(4, 1), (3, 5), (12, 3)])
    def test_blobs_that_are_no_bytes(self, tmp_path: Path, kind: int, count: int) -> None:
        """``bytes`` of a number would be as many zeros."""
        value = {3: 700, 4: 2**31 - 1, 12: 0.5}[kind]
        path = tmp_path / "a.tif"
        tifffile.imwrite(
            path, tissue(64, 64), photometric="rgb", metadata=None,
            extratags=[(TAG_PASSPORT, kind, count, value if count == 1 else [value] * count, 0)],
        )  # fmt: skip
        with (
            TiffReader(path) as slide,
            pytest.raises(SlideError, match=f"tag {TAG_PASSPORT} does not hold bytes"),
        ):
            slide.embedded_passport()

    def test_of_tags_that_are_there_twice_the_first_is_checked(self, tmp_path: Path) -> None:
        """It is the one that tifffile reads."""
        path = tmp_path / "a.tif"
        place = struct.pack("<H", 9)
        tifffile.imwrite(
            path, tissue(64, 64), photometric="rgb", tile=(64, 64), compression="deflate",
            extratags=[(65000, 4, 1, 2**31, True)], metadata=None,
        )  # fmt: skip
        content = path.read_bytes()
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            entry = next(t.offset for t in page.tags if t.code == 324)
            other = next(t.offset for t in page.tags if t.code == 65000)
        assert struct.unpack_from("<H", content, entry + 2)[0] in (4, 16), place
        changed = bytearray(content)
        changed[other : other + 12] = content[entry : entry + 12]
        struct.pack_into("<I", changed, entry + 8, 2**31)  # the first points nowhere
        path.write_bytes(changed)
        with pytest.raises(SlideError, match="beyond the file's end"):
            TiffReader(path)

    def test_stored_bytes_have_a_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_svs(tmp_path / "a.svs", tissue(240, 240), compression="zlib", levels=1)
        with TiffReader(path) as slide:
            count = len(slide.tile_bytes(0, 0, 0))
            monkeypatch.setattr(pages, "MAX_SEGMENT_BYTES", count - 1)
            with pytest.raises(LimitError, match="row 0, column 0"):
                slide.tile_bytes(0, 0, 0)

    def test_file_cut_at_any_byte(self, tmp_path: Path) -> None:
        """Whatever is missing, it is refused when opened: level, label, tag or tile."""
        whole = write_svs(tmp_path / "whole.svs", tissue(260, 250)).read_bytes()
        path = tmp_path / "cut.svs"
        for length in (*np.linspace(1, len(whole) - 1, 60).astype(int), len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(SlideError, match=re.escape(str(path))):
                TiffReader(path)

    def test_directories_may_be_named_like_others(self, tmp_path: Path) -> None:
        """The path is part of messages, and of nothing else."""
        path = write_svs(tmp_path / "a sub-directory 1.svs", tissue(260, 250))
        with TiffReader(path) as slide:
            levels, images = len(slide.levels), slide.info.associated
        assert (levels, images) == (2, ("thumbnail", "label", "macro"))
        with tifffile.TiffFile(path) as file:
            link = file.pages[0].offset + 2 + 12 * len(file.pages[0].tags)
        content = bytearray(path.read_bytes())
        content[link : link + 4] = struct.pack("<I", 2**31)
        path.write_bytes(content)
        with pytest.raises(SlideError, match="TIFF directory 1: "):
            TiffReader(path)

    def test_values_on_one_another(self, tmp_path: Path) -> None:
        """A chain of directories that all name one long list of tiles is not read for ever."""
        count = 50_000
        entries = b"".join(
            struct.pack("<HHII", code, kind, number, value)
            for code, kind, number, value in [
                (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (277, 3, 1, 3), (322, 4, 1, 16),
                (323, 4, 1, 16), (324, 4, count, 8), (325, 4, count, 8),
            ]
        )  # fmt: skip
        content = b"II*\0" + struct.pack("<I", 8 + 4 * count) + bytes(4 * count)
        for number in range(1000):
            after = len(content) + 2 + len(entries) + 4
            link = after if number < 999 else 0
            content += struct.pack("<H", 8) + entries + struct.pack("<I", link)
        path = tmp_path / "a.tif"
        path.write_bytes(content)
        with pytest.raises(SlideError, match="values lie on those of others"):
            TiffReader(path)

    @pytest.mark.parametrize("behind", [b"", bytes(1), bytes(300), b"\xff\xff", b"\r\n" + bytes(9)])
    def test_bytes_behind_a_stream(self, tmp_path: Path, behind: bytes) -> None:
        """Scanners pad tiles, which is no damage."""
        image = tissue(64, 64)
        stream = bytes(imagecodecs.jpeg8_encode(image, level=95))
        path = _write_tile(tmp_path / "a.tif", stream + behind, 7)
        with TiffReader(path) as slide:
            np.testing.assert_array_equal(
                slide.read_region(0, 0, 0, 64, 64), imagecodecs.jpeg8_decode(stream)
            )

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
    @pytest.mark.parametrize("compression", [7, 33003, 33005, 34712])
    def test_stream_that_breaks_off(
        self, tmp_path: Path, compression: int, share: float, padded: bool
    ) -> None:
        """Libraries would make up the rest: grey, or a coarser image."""
        image = tissue(64, 64)
        whole = (
            imagecodecs.jpeg8_encode(image, level=95)
            if compression == 7
            else imagecodecs.jpeg2k_encode(image, level=0, codecformat="j2k")
        )
        part = bytes(whole)[: int(share * len(whole))]
        stream = part.ljust(len(whole), b"\0") if padded else part
        path = _write_tile(tmp_path / "a.tif", stream, compression)
        with (
            TiffReader(path) as slide,
            pytest.raises(SlideError, match=r"level 0: tile at row 0, column 0: .*breaks off"),
        ):
            slide.read_region(0, 0, 0, 64, 64)

    def test_label_that_breaks_off(self, tmp_path: Path) -> None:
        content = bytearray(CMU.read_bytes())
        with tifffile.TiffFile(CMU) as file:
            page = file.pages[3]
            start, count = page.dataoffsets[5], page.databytecounts[5]
        content[start + count // 2 : start + count] = bytes(count - count // 2)
        path = tmp_path / "a.svs"
        path.write_bytes(content)
        with (
            TiffReader(path) as slide,
            pytest.raises(SlideError, match=r"image 'macro': .*breaks off"),
        ):
            slide.read_associated("macro")

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
                with TiffReader(path) as slide:
                    level = slide.levels[0]
                    slide.stored_layout(0)
                    slide.read_region(0, 0, 0, min(64, level.height), min(64, level.width))
            except WsicodecError as error:
                assert str(path) in str(error)

    @pytest.mark.parametrize("code", [324, 325, 273, 279])
    def test_places_of_another_type(self, tmp_path: Path, code: int) -> None:
        """Any tag may claim to be text."""
        path = write_svs(tmp_path / "a.svs", tissue(500, 500), levels=1)
        with tifffile.TiffFile(path) as file:
            page = file.pages[0] if code in file.pages[0].tags else file.pages[2]
            entry = page.tags[code].offset
        content = bytearray(path.read_bytes())
        content[entry + 2 : entry + 4] = struct.pack("<H", 2)
        path.write_bytes(content)
        with pytest.raises(SlideError) as caught, TiffReader(path) as slide:
            slide.read_associated("label")
        assert str(path) in str(caught.value)

    def test_failed_tile_can_be_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A tile that could not be read leaves no trace in the cache."""
        path = write_svs(tmp_path / "a.svs", tissue(240, 240), levels=1)
        with TiffReader(path) as slide:
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
    with TiffReader(CMU) as slide, pytest.raises(SettingsError):
        slide.read_region(level, y, x, height, width)


def test_empty_region_and_closed_slide() -> None:
    slide = TiffReader(CMU)
    assert slide.read_region(0, 5, 5, 0, 7).shape == (0, 7, 3)
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read_region(0, 0, 0, 5, 5)


_OPENED = """
import sys
from pathlib import Path

opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
sys.path.insert(0, sys.argv[3])
from wsicodec.errors import WsicodecError
from wsicodec.slide.tiff import TiffReader

try:
    TiffReader(sys.argv[1]).close()
    print("read")
except WsicodecError as error:
    print(f"{type(error).__name__}: {error}")
other = Path(sys.argv[2]).resolve()
print(any(isinstance(name, (str, Path)) and Path(name).resolve() == other for name in opened))
"""


class TestOtherFiles:
    """A slide's metadata open no file but the slide."""

    def _open(self, path: Path, other: Path) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", _OPENED, path, other, ROOT],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        outcome, opened = done.stdout.splitlines()
        return outcome, opened

    def _ome(self, path: Path, tiff_data: str, **settings: Any) -> Path:
        xml = (
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
            'SizeX="64" SizeY="64" SizeC="3" SizeZ="1" SizeT="1" Interleaved="true">'
            f'<Channel ID="Channel:0:0" SamplesPerPixel="3"/>{tiff_data}</Pixels></Image></OME>'
        )
        tifffile.imwrite(
            path, tissue(64, 64), photometric="rgb", description=xml, metadata=None, **settings
        )
        return path

    def test_of_this_file(self, tmp_path: Path) -> None:
        data = '<TiffData IFD="0"><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>'
        path = self._ome(tmp_path / "a.ome.tif", data)
        assert self._open(path, path) == ("read", "True")

    @pytest.mark.parametrize("folder", ["", "../", "absolute"])
    def test_named_by_ome_xml(self, tmp_path: Path, folder: str) -> None:
        (tmp_path / "in").mkdir()
        other = tmp_path / "in" / folder.replace("absolute", "") / "other.tif"
        tifffile.imwrite(other, tissue(64, 64), photometric="rgb")
        name = str(other) if folder == "absolute" else f"{folder}other.tif"
        data = f'<TiffData IFD="0"><UUID FileName="{name}">urn:uuid:2</UUID></TiffData>'
        path = self._ome(tmp_path / "in" / "a.ome.tif", data)
        outcome, opened = self._open(path, other)
        assert outcome.startswith(f"UnsupportedError: {path}: ")
        assert "several files" in outcome
        assert opened == "False"

    def test_beside_a_micro_manager_stack(self, tmp_path: Path) -> None:
        """A header between TIFF's and the first directory, which says that there are more files."""
        path = tmp_path / "a_MMStack_0.ome.tif"
        self._ome(path, '<TiffData IFD="0"/>', extratags=[(51123, 2, 9, '{"a": 1}', True)])
        other = tmp_path / "a_MMStack_1.ome.tif"
        other.write_bytes(path.read_bytes())
        content = bytearray(path.read_bytes())
        (tags,) = struct.unpack_from("<H", content, 8)
        directory = bytes(content[8 : 8 + 2 + 12 * tags + 4])
        summary = b'{"MicroManagerVersion": "1", "Frames": 2}'
        index = len(content)
        content += struct.pack("<7I", 3453623, 1, 0, 0, 0, 0, 8)
        content[4:8] = struct.pack("<I", len(content))
        content += directory
        header = struct.pack("<7I", 54773648, index, 483765892, 0, 99384722, 0, 2355492)
        header += struct.pack("<I", len(summary))
        content[8 : 40 + len(summary)] = header + summary
        path.write_bytes(content)
        with tifffile.TiffFile(path) as file:
            assert file.is_mmstack
        assert self._open(path, other) == ("read", "False")


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

        with TiffReader(CMU, cache_bytes) as slide, ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(40)))

    @pytest.mark.parametrize("threads", [1, 4])
    def test_cache_is_bounded(self, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
        """With two rows of tiles in the cache, raster order decodes nothing twice.

        Among threads that is the rule and no promise: one that the system holds up comes late.
        """
        limit = 2 * 10 * 240 * 240 * 3
        with TiffReader(CMU, limit) as slide:
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
        with TiffReader(CMU) as slide, ThreadPoolExecutor(8) as pool:
            barrier = threading.Barrier(8)
            decoded = _count_decodes(slide, monkeypatch)

            def read(_: int) -> int:
                barrier.wait()
                return int(slide.read_region(0, 0, 0, 240, 240).sum())

            assert len(set(pool.map(read, range(8)))) == 1
            assert decoded == [(0, 0)]


class TestFork:
    @pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
    def test_while_another_thread_decodes(self) -> None:
        """The child does not wait for a thread that it has not got."""
        with TiffReader(CMU) as slide, ThreadPoolExecutor(1) as pool:
            expected = slide.decode_tile(0, 0, 0)
            decoding, go_on = threading.Event(), threading.Event()

            def slow() -> np.ndarray:
                decoding.set()
                assert go_on.wait(30)
                return expected

            running = pool.submit(slide._cache.get, (0, 0, 0), slow)
            assert decoding.wait(10)
            with slide._cache._lock:
                child = os.fork()
                if child == 0:
                    signal.alarm(20)  # ends a child that waits
                    same = (slide.read_region(0, 0, 0, 240, 240) == expected).all()
                    os._exit(0 if same else 1)
            status = os.waitpid(child, 0)[1]
            go_on.set()
            assert (running.result(10) == expected).all()
        assert status == 0


def _count_decodes(slide: TiffReader, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The tiles of level 0 that are decoded from now on, one entry each time."""
    page = slide._pages[0]
    decode: Callable[[int, int], np.ndarray] = page.decode
    decoded: list[tuple[int, int]] = []

    def counted(row: int, column: int) -> np.ndarray:
        decoded.append((row, column))  # atomic in CPython
        return decode(row, column)

    monkeypatch.setattr(page, "decode", counted)
    return decoded
