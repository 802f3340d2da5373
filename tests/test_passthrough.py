"""Copied and transcoded slides: the same bits, the same pixels in everyone's readers, and back."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from slides import CMU, DESCRIPTION, ICC, ROOT, data_slide, nothing_left, tissue, write_svs, ycbcr

import wsicodec
from wsicodec.cli import restore as restore_command
from wsicodec.convert import ConvertSettings, convert, verify
from wsicodec.convert.deidentify.cleaning import cleaned
from wsicodec.convert.passthrough import copy_slide, copyable, transcodable, transcode_slide
from wsicodec.convert.restore import restore
from wsicodec.convert.results import ConvertProgress, ConvertReport
from wsicodec.convert.rewrap import PassOptions
from wsicodec.convert.work import work_folder
from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    SettingsError,
    SlideError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.slide.jpegstream import segments, with_tables, without_metadata, without_tables
from wsicodec.slide.ometiff import CodedLevel, SlideMetadata, write_slide
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import StoredLayout
from wsicodec.slide.record import FileRecord
from wsicodec.slide.tiff import TiffReader
from wsicodec.slide.transcoding import (
    MAX_LEVELS,
    TAG_TRANSCODE,
    LevelDigest,
    LevelOrigin,
    Way,
    pack_origins,
    parse_origins,
    segment_count,
)
from wsicodec.slide.white import white_segment

FLAT = PassOptions(layout="flat")
SECRET = b"MRN 4711-0815 Doe, Jane"
HOSTILE = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def _copy(source: Path, target: Path, options: PassOptions | None = None) -> ConvertReport:
    with TiffReader(source) as slide:
        return copy_slide(slide, target, options)


def _transcode(source: Path, target: Path, options: PassOptions | None = None) -> ConvertReport:
    with TiffReader(source) as slide:
        return transcode_slide(slide, target, options, jobs=2)


def _streams(path: Path) -> list[tuple[bytes | None, list[bytes]]]:
    """Tables and segments of every level, read by other code than wrote them."""
    with TiffReader(path) as slide:
        return [
            (
                slide.stored_layout(level.index).jpegtables,
                [
                    slide.tile_bytes(level.index, row, column)
                    for row in range(level.rows)
                    for column in range(level.columns)
                ],
            )
            for level in slide.levels
        ]


def _pixels(path: Path) -> list[np.ndarray]:
    with TiffReader(path) as slide:
        return [slide.read_region(v.index, 0, 0, v.height, v.width) for v in slide.levels]


def _patched(source: Path, target: Path, code: int, number: int, value: int) -> Path:
    """A copy of a TIFF with one value of an array tag of the first directory changed."""
    data = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        tag = tiff.pages.first.tags[code]
        size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        place = tag.valueoffset + number * size
        order = "little" if tiff.byteorder == "<" else "big"
    data[place : place + size] = value.to_bytes(size, order)
    target.write_bytes(data)
    return target


def _place(path: Path, number: int) -> tuple[int, int]:
    """Offset and size of a segment of level 0."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        return page.dataoffsets[number], page.databytecounts[number]


def _write_tiles(path: Path, image: np.ndarray, tiles: list[bytes], **options: Any) -> Path:
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=image.shape,
        dtype="uint8",
        **{"tile": (128, 128), "photometric": "rgb", "metadata": None, **options},
    )
    return path


def _tiles_of(image: np.ndarray, encode: Callable[[np.ndarray], bytes]) -> list[bytes]:
    padded = np.pad(
        image, ((0, -image.shape[0] % 128), (0, -image.shape[1] % 128), (0, 0)), mode="edge"
    )
    return [
        bytes(encode(np.ascontiguousarray(padded[y : y + 128, x : x + 128])))
        for y in range(0, image.shape[0], 128)
        for x in range(0, image.shape[1], 128)
    ]


# --- copy: bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["subifd", "flat"])
def test_copy_holds_every_bit_of_the_slide(tmp_path: Path, layout: str) -> None:
    target = tmp_path / "copy.ome.tiff"
    report = _copy(CMU, target, PassOptions(layout=layout))
    assert _streams(target) == _streams(CMU)
    assert report.modes == {"copied": 130}
    assert report.associated == ("thumbnail", "label", "macro")
    assert report.dropped == ()
    with TiffReader(CMU) as source, TiffReader(target) as copy:
        assert copy.stored_layout(0) == source.stored_layout(0)
        assert (copy.info.mpp_x, copy.info.mpp_y) == (source.info.mpp_x, source.info.mpp_y)
        assert copy.info.magnification == source.info.magnification
        assert copy.info.icc_profile == source.info.icc_profile
        assert copy.info.history == source.info.history
        assert copy.info.description == source.info.description
        assert copy.info.record is not None
        assert copy.info.record.codec == "copy"
        assert sorted(copy.info.associated) == sorted(source.info.associated)
        for name in source.info.associated:
            there, here = source.read_associated(name), copy.read_associated(name)
            assert here.stored == there.stored
            np.testing.assert_array_equal(here.pixels, there.pixels)
    assert target.stat().st_size < CMU.stat().st_size * 1.005
    nothing_left(tmp_path, target.name)


def _own_tiles(path: Path, image: np.ndarray) -> Path:
    tiles = _tiles_of(image, lambda tile: wsicodec.encode(tile, codec="learned", lossless=True))
    return _write_tiles(path, image, tiles, compression=60642)


def _j2k(image: np.ndarray, compression: int) -> list[bytes]:
    pixels = ycbcr(image) if compression == 33003 else image
    return _tiles_of(
        pixels, lambda t: imagecodecs.jpeg2k_encode(t, level=0, codecformat="j2k", mct=False)
    )


KINDS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "deflate": lambda path, image: write_svs(path, image, levels=3),
    "lzw, predictor": lambda path, image: write_svs(
        path, image, levels=2, compression="lzw", predictor=True
    ),
    "deflate, predictor": lambda path, image: write_svs(path, image, predictor=True),
    "zstd": lambda path, image: write_svs(path, image, compression="zstd"),
    "none": lambda path, image: write_svs(path, image, compression=None),
    "webp": lambda path, image: write_svs(path, image, compression="webp"),
    "jpegxl": lambda path, image: write_svs(path, image, compression="jpegxl"),
    "jpeg 4:2:0": lambda path, image: write_svs(
        path, image, compression="jpeg", subsampling=(2, 2)
    ),
    "jpeg 4:2:2, big-endian": lambda path, image: tifffile.imwrite(
        path, image, photometric="rgb", compression="jpeg", subsampling=(2, 1), byteorder=">",
        tile=(128, 128), metadata=None,
    ) or path,
    "jpeg strips": lambda path, image: tifffile.imwrite(
        path, image, photometric="rgb", compression="jpeg", subsampling=(1, 1), rowsperstrip=64,
        metadata=None,
    ) or path,
    "plain strips": lambda path, image: tifffile.imwrite(
        path, image, photometric="rgb", rowsperstrip=50, metadata=None
    ) or path,
    "one plain strip": lambda path, image: tifffile.imwrite(
        path, image, photometric="rgb", metadata=None
    ) or path,
    "33003": lambda path, image: _write_tiles(
        path, image, _j2k(image, 33003), compression=33003, description=DESCRIPTION
    ),
    "33005": lambda path, image: _write_tiles(path, image, _j2k(image, 33005), compression=33005),
    "34712": lambda path, image: _write_tiles(path, image, _j2k(image, 34712), compression=34712),
    "wsicodec": _own_tiles,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["subifd", "flat"])
def test_copy_of_every_kind_of_tile(tmp_path: Path, kind: str, layout: str) -> None:
    source = KINDS[kind](tmp_path / "source.tif", tissue(250, 260))
    target = tmp_path / "copy.tif"
    _copy(source, target, PassOptions(layout=layout))
    assert _streams(target) == _streams(source)
    for here, there in zip(_pixels(target), _pixels(source), strict=True):
        np.testing.assert_array_equal(here, there)
    with TiffReader(source) as before, TiffReader(target) as after:
        for level in before.levels:
            assert after.stored_layout(level.index) == before.stored_layout(level.index)
    # to tifffile alone as well, without our reader's idea of colours
    with tifffile.TiffFile(source) as before, tifffile.TiffFile(target) as after:
        np.testing.assert_array_equal(
            after.pages.first.asarray(), before.pages.first.asarray(), strict=True
        )


def test_copy_of_a_jpeg2000_slide(tmp_path: Path) -> None:
    source = data_slide("tcga-cr-7395-01a-01-ts1.svs")
    target = tmp_path / "copy.ome.tiff"
    _copy(source, target)
    assert _streams(target) == _streams(source)
    with tiffslide.TiffSlide(source) as there, tiffslide.TiffSlide(target) as here:
        assert here.level_dimensions == there.level_dimensions
        np.testing.assert_array_equal(
            np.asarray(here.read_region((800, 900), 1, (300, 200))),
            np.asarray(there.read_region((800, 900), 1, (300, 200))),
        )


# --- copy: pixels in other readers ---------------------------------------------------------------


def test_rgb_coded_jpeg_has_the_same_colours_everywhere(tmp_path: Path) -> None:
    # its components are named 0, 1, 2, no marker says RGB, and YCbCrSubSampling says 4:2:0
    flat, pyramid = tmp_path / "flat.tif", tmp_path / "pyramid.ome.tiff"
    _copy(CMU, flat, FLAT)
    _copy(CMU, pyramid)
    box = (900, 1100, 700, 500)  # x, y, width, height
    corners = (slice(box[1], box[1] + box[3]), slice(box[0], box[0] + box[2]))

    def by_openslide(path: Path) -> np.ndarray:
        with openslide.OpenSlide(path) as slide:
            return np.asarray(slide.read_region(box[:2], 0, box[2:]))

    def by_tiffslide(path: Path) -> np.ndarray:
        with tiffslide.TiffSlide(path) as slide:
            return np.asarray(slide.read_region(box[:2], 0, box[2:]))[..., :3]

    def by_libtiff(path: Path) -> np.ndarray:
        with Pillow.open(path) as image:
            return np.asarray(image.convert("RGB"))[corners]

    wanted = tifffile.imread(CMU)[corners]
    assert wanted.std() > 10
    for read in (by_openslide, by_tiffslide, by_libtiff):
        expected = read(CMU)
        assert np.abs(expected[..., :3].astype(int) - wanted).mean() < 1
        for path in (flat, pyramid):
            np.testing.assert_array_equal(read(path), expected)
    np.testing.assert_array_equal(tifffile.imread(pyramid)[corners], wanted)


def test_openslide_sees_all_levels_of_a_flat_copy(tmp_path: Path) -> None:
    source = write_svs(
        tmp_path / "s.svs", tissue(960, 900), levels=2, compression="jpeg", subsampling=(2, 2)
    )
    target = tmp_path / "copy.tif"
    _copy(source, target, FLAT)
    with openslide.OpenSlide(source) as there, openslide.OpenSlide(target) as here:
        assert here.level_dimensions == there.level_dimensions
        for level, size in enumerate(there.level_dimensions):
            np.testing.assert_array_equal(
                np.asarray(here.read_region((0, 0), level, size)),
                np.asarray(there.read_region((0, 0), level, size)),
            )
    with tiffslide.TiffSlide(target) as slide:
        assert slide.level_count == 2


def test_flat_copy_of_an_aperio_slide_stays_one(tmp_path: Path) -> None:
    """With OpenSlide: vendor, what Aperio says of the slide, images beside it, pixels."""
    packed, back = tmp_path / "packed.ome.tiff", tmp_path / "back.svs"
    flat = tmp_path / "flat.svs"
    _copy(CMU, flat, FLAT)
    _transcode(CMU, packed)
    restore(packed, back, layout="flat")
    for path in (flat, back):
        with openslide.OpenSlide(CMU) as there, openslide.OpenSlide(path) as here:
            assert here.properties["openslide.vendor"] == "aperio"
            for key, value in there.properties.items():
                if key.startswith(("aperio.", "openslide.")) and "quickhash" not in key:
                    assert here.properties[key] == value
            assert set(here.associated_images) == {"label", "macro", "thumbnail"}
            for name, image in there.associated_images.items():
                np.testing.assert_array_equal(here.associated_images[name], image)
            region = ((100, 200), 0, (700, 500))
            np.testing.assert_array_equal(
                np.asarray(here.read_region(*region)), np.asarray(there.read_region(*region))
            )
        with open_slide(path) as slide, open_slide(CMU) as source:
            assert slide.info.description == source.info.description
            assert (slide.info.mpp_x, slide.info.magnification) == (0.499, 20)
            assert slide.info.associated == source.info.associated
        assert verify(path, CMU).ok


def test_flat_copy_of_levels_and_without_a_thumbnail(tmp_path: Path) -> None:
    source = write_svs(
        tmp_path / "s.svs", tissue(960, 900), levels=3, compression="jpeg", subsampling=(2, 2)
    )
    target = tmp_path / "copy.tif"
    for associated, vendor in ((None, "aperio"), ((), "generic-tiff")):
        _copy(source, target, PassOptions("flat", overwrite=True, associated=associated))
        with openslide.OpenSlide(source) as there, openslide.OpenSlide(target) as here:
            assert here.properties["openslide.vendor"] == vendor
            assert here.level_dimensions == there.level_dimensions
            if vendor == "aperio":
                assert here.properties["openslide.mpp-x"] == there.properties["openslide.mpp-x"]
        with open_slide(source) as there, open_slide(target) as here:
            assert here.info.mpp_x == there.info.mpp_x
            assert [(level.height, level.width) for level in here.levels] == [
                (level.height, level.width) for level in there.levels
            ]


def test_what_a_killed_copy_left_is_gone_after_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "copy.ome.tiff"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(CMU), str(target)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.wait() == -signal.SIGKILL
    nothing_left(tmp_path, work_folder(target).name)
    _copy(CMU, target)
    nothing_left(tmp_path, "copy.ome.tiff")
    with open_slide(target) as slide:
        assert slide.levels[0].width == 2220


KILLED = """
import os, signal, sys
from wsicodec.convert import ConvertSettings, convert
convert(*sys.argv[1:], ConvertSettings("copy"), lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_two_copies_at_once_to_one_target(tmp_path: Path) -> None:
    target = tmp_path / "copy.ome.tiff"

    def again(_: ConvertProgress) -> None:
        with pytest.raises(SlideError, match="being written by another process"):
            _copy(CMU, target)

    with open_slide(CMU) as slide:
        copy_slide(slide, target, None, again)
    nothing_left(tmp_path, "copy.ome.tiff")


@pytest.mark.parametrize("work", [_copy, _transcode])
def test_no_tiff_is_called_zarr(tmp_path: Path, work: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedError, match="not in OME-Zarr"):
        work(CMU, tmp_path / "a.zarr")
    nothing_left(tmp_path)


def test_ome_readers_see_the_images_by_name(tmp_path: Path) -> None:
    target = tmp_path / "copy.ome.tiff"
    _copy(CMU, target)
    with tifffile.TiffFile(target) as tiff:
        assert [series.name for series in tiff.series] == ["copy", "thumbnail", "label", "macro"]
        assert tiff.series[2].shape == (463, 387, 3)
        with tifffile.TiffFile(CMU) as source:
            np.testing.assert_array_equal(tiff.series[2].asarray(), source.pages[2].asarray())


@pytest.mark.parametrize("ending", ["</OME>", "</scn>", "</DataObject>"])
def test_flat_copy_is_not_taken_for_what_its_description_quotes(
    tmp_path: Path, ending: str
) -> None:
    given_one = SlideMetadata("s", description=f"<?xml version='1.0'?>{ending}")
    target = tmp_path / "copy.tif"
    _copy(CMU, target, PassOptions(layout="flat", metadata=given_one))
    with tifffile.TiffFile(target) as tiff:
        assert not (tiff.is_ome or tiff.is_scn or tiff.is_philips)
    with TiffReader(target) as slide:
        assert slide.info.format == "tiff"
        assert (slide.info.description or "").rstrip("|") == given_one.description


def test_own_ome_xml_is_not_kept_as_the_scanners_words(tmp_path: Path) -> None:
    source = KINDS["jpeg strips"](tmp_path / "s.tif", tissue(250, 260))
    one, two = tmp_path / "one.ome.tiff", tmp_path / "two.ome.tiff"
    _copy(source, one)
    _copy(one, two)
    with tifffile.TiffFile(two) as tiff:
        assert "Annotation" not in (tiff.ome_metadata or "")


# --- copy: tiles that are left out, shared, broken, missing --------------------------------------


@pytest.mark.parametrize("kind", ["svs", "jpeg 4:2:0", "33003", "lzw, predictor", "wsicodec"])
def test_tiles_left_out_become_white(tmp_path: Path, kind: str) -> None:
    whole = CMU if kind == "svs" else KINDS[kind](tmp_path / "whole.tif", tissue(250, 260))
    # the first and an inner one
    source = _patched(whole, tmp_path / "one.tif", 325, 0, 0)
    source = _patched(source, tmp_path / "sparse.tif", 325, 2, 0)
    target = tmp_path / "copy.tif"
    report = _copy(source, target, FLAT)
    assert report.modes["left out"] == 2
    before, after = _streams(source)[0], _streams(target)[0]
    assert after[0] == before[0]
    for number, (there, here) in enumerate(zip(before[1], after[1], strict=True)):
        assert here == there if number not in (0, 2) else here and not there
    white = after[1][0]
    assert after[1][2] == white
    wanted, found = _pixels(whole)[0].copy(), _pixels(target)[0]
    with TiffReader(whole) as slide:
        first = slide.levels[0]
    for number in (0, 2):
        row, column = divmod(number, first.columns)
        y, x = row * first.tile_height, column * first.tile_width
        wanted[y : y + first.tile_height, x : x + first.tile_width] = 255
    np.testing.assert_array_equal(found, wanted)
    if kind in ("svs", "jpeg 4:2:0"):
        with openslide.OpenSlide(target) as slide:
            assert (np.asarray(slide.read_region((0, 0), 0, (100, 100))) == 255).all()
        # libtiff keeps JPEG tables from tile to tile: a white tile must not spoil its neighbours
        with Pillow.open(target) as here, Pillow.open(whole) as there:
            left, right = np.asarray(here.convert("RGB")), np.asarray(there.convert("RGB"))
            np.testing.assert_array_equal(left[240:, 240:], right[240:, 240:])
            assert (left[:100, :100] == 255).all()


def _without_end_of_tables(target: Path) -> Path:
    """The bundled slide, one of its tiles left out, and no end marker in its JPEG tables."""
    data = bytearray(_patched(CMU, target, 325, 2, 0).read_bytes())
    with tifffile.TiffFile(CMU) as tiff:
        tag, order = tiff.pages.first.tags[347], "little" if tiff.byteorder == "<" else "big"
    assert data[tag.valueoffset :][: tag.count].endswith(b"\xff\xd9")
    # type and count of the tag's entry come behind its code
    place = tag.offset + 4
    size = 8 if tiff.is_bigtiff else 4
    data[place : place + size] = (tag.count - 2).to_bytes(size, order)
    target.write_bytes(data)
    return target


def test_jpeg_tables_may_lack_their_end(tmp_path: Path) -> None:
    source = _without_end_of_tables(tmp_path / "source.svs")
    before = _streams(source)
    assert before[0][0] is not None
    assert not before[0][0].endswith(b"\xff\xd9")
    wanted = _pixels(CMU)[0].copy()
    wanted[:240, 480:720] = 255
    for options in (PassOptions(), PassOptions(strip_metadata=True)):
        copy = tmp_path / "copy.ome.tiff"
        assert _copy(source, copy, replace(options, overwrite=True)).modes["left out"] == 1
        assert _streams(copy)[0][0] == before[0][0]
        np.testing.assert_array_equal(_pixels(copy)[0], wanted)
        with Pillow.open(copy) as here:  # libtiff
            np.testing.assert_array_equal(np.asarray(here)[:480, :960], wanted[:480, :960])
    report = _transcode(source, tmp_path / "packed.tif")
    assert report.modes == {"left out": 1, "transcoded": 129}
    restore(tmp_path / "packed.tif", tmp_path / "again.tif")
    again = _streams(tmp_path / "again.tif")
    assert again == _streams(tmp_path / "copy.ome.tiff")


@pytest.mark.parametrize("quality", [5, 30, 75, 100])
@pytest.mark.parametrize("options", [{"subsampling": "420"}, {"subsampling": "444"}, {"rgb": True}])
def test_white_jpeg_is_white(quality: int, options: dict[str, Any]) -> None:
    rgb = options.pop("rgb", False) if (options := dict(options)) else False
    colours: dict[str, Any] = {"colorspace": "rgb", "outcolorspace": "rgb"} if rgb else options
    like = bytes(imagecodecs.jpeg8_encode(tissue(128, 128), quality, **colours))
    layout = StoredLayout(
        height=128, width=128, compression=7, photometric=2 if rgb else 6, tile=(128, 128),
        rows_per_strip=None,
    )  # fmt: skip
    white = white_segment(layout, 128, 128, like)
    assert (imagecodecs.jpeg8_decode(white, outcolorspace="rgb") == 255).all()
    with pytest.raises(UnsupportedError, match="another size"):
        white_segment(layout, 64, 128, like)
    with pytest.raises(UnsupportedError, match="none to make"):
        white_segment(layout, 128, 128, None)


@pytest.mark.parametrize("wrong", ["progressive", "restart", "cut", "noise"])
def test_white_jpeg_refuses_what_it_cannot_imitate(wrong: str) -> None:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"progressive": True} if wrong == "progressive" else {}
    if wrong == "restart":
        options["restart_marker_blocks"] = 4
    Pillow.fromarray(tissue(128, 128)).save(buffer, "JPEG", **options)
    like = buffer.getvalue()
    like = {"cut": like[:300], "noise": b"\xff\xd8" + bytes(range(200))}.get(wrong, like)
    layout = StoredLayout(
        height=128, width=128, compression=7, photometric=6, tile=(128, 128), rows_per_strip=None
    )
    with pytest.raises(UnsupportedError):
        white_segment(layout, 128, 128, like)


def test_tiles_that_share_their_bytes_still_do(tmp_path: Path) -> None:
    image = tissue(512, 512)
    source, target = tmp_path / "own.tif", tmp_path / "copy.tif"
    tiles = _tiles_of(image, lambda t: wsicodec.encode(t, codec="jpeg", quality=80))
    glass = wsicodec.encode(np.full((128, 128, 3), 240, np.uint8), codec="jpeg", quality=80)
    level = CodedLevel(512, 512, 128, [t if i % 4 else None for i, t in enumerate(tiles)], glass)
    with source.open("wb+") as file:
        write_slide(file, [level], "jpeg", SlideMetadata("s"), FileRecord("1", "jpeg", 80))
    _copy(source, target)
    assert _streams(target) == _streams(source)
    with tifffile.TiffFile(target) as tiff:
        offsets = tiff.pages.first.dataoffsets
    assert len({offsets[i] for i in (0, 4, 8, 12)}) == 1
    assert len(set(offsets)) == 13


def test_broken_tile_is_copied_with_its_faults(tmp_path: Path) -> None:
    source = tmp_path / "broken.svs"
    data = bytearray(CMU.read_bytes())
    offset, count = _place(CMU, 7)
    data[offset : offset + count] = bytes(count)
    source.write_bytes(data)
    target = tmp_path / "copy.tif"
    _copy(source, target)
    streams = _streams(target)
    assert streams == _streams(source)
    assert not any(streams[0][1][7])


@pytest.mark.parametrize("work", [_copy, _transcode])
def test_tile_beyond_the_end_of_the_file(tmp_path: Path, work: Callable[..., Any]) -> None:
    source = _patched(CMU, tmp_path / "cut.svs", 324, 12, CMU.stat().st_size - 10)
    with pytest.raises(SlideError, match=r"tile at row 1, column 2.*beyond the file's end"):
        work(source, tmp_path / "copy.tif")
    nothing_left(tmp_path, "cut.svs")


# --- copy: refusals and settings -----------------------------------------------------------------


def test_planes_apart_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "planar.tif"
    image = np.ascontiguousarray(np.moveaxis(tissue(256, 256), 2, 0))
    tifffile.imwrite(
        source, image, photometric="rgb", planarconfig="separate", tile=(128, 128),
        compression="deflate", metadata=None,
    )  # fmt: skip
    with TiffReader(source) as slide:
        assert "stored apart" in (copyable(slide) or "")
        with pytest.raises(UnsupportedError, match="level 0: red, green and blue"):
            copy_slide(slide, tmp_path / "copy.tif")
    nothing_left(tmp_path, "planar.tif")


def test_slides_of_other_formats_are_refused(tmp_path: Path) -> None:
    with open_slide(data_slide("highdicom-sm-image.dcm")) as slide:
        assert "cannot be copied" in (copyable(slide) or "")
        for work in (copy_slide, transcode_slide):
            with pytest.raises(UnsupportedError, match="cannot be copied"):
                work(slide, tmp_path / "copy.tif")
    nothing_left(tmp_path)


def test_nonsense_in_tags_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "s.tif"
    KINDS["jpeg 4:2:0"](source, tissue(240, 240))
    source = _patched(source, tmp_path / "odd.tif", 530, 0, 9000)
    with TiffReader(source) as slide:
        assert "means nothing" in (copyable(slide) or "")


def test_targets_are_checked_first(tmp_path: Path) -> None:
    target = tmp_path / "copy.tif"
    target.write_bytes(b"precious")
    with pytest.raises(SlideError, match="exists already"):
        _copy(CMU, target)
    assert target.read_bytes() == b"precious"
    _copy(CMU, target, PassOptions(overwrite=True))
    with TiffReader(target) as slide, pytest.raises(SlideError, match="source itself"):
        copy_slide(slide, target, PassOptions(overwrite=True))
    with pytest.raises(SettingsError, match="layout"):
        PassOptions(layout="round")
    with TiffReader(CMU) as slide, pytest.raises(SettingsError, match="jobs"):
        transcode_slide(slide, tmp_path / "other.tif", jobs=0)


def test_progress_counts_and_may_stop_the_work(tmp_path: Path) -> None:
    source = write_svs(
        tmp_path / "s.svs", tissue(700, 700), levels=2, compression="jpeg", subsampling=(1, 1)
    )
    seen: list[ConvertProgress] = []
    with TiffReader(source) as slide:
        transcode_slide(slide, tmp_path / "a.tif", progress=seen.append, jobs=2)
        assert [p.tiles_done for p in seen] == list(range(1, seen[-1].tiles + 1))
        assert seen[-1].pixels_done == seen[-1].pixels
        assert seen[-1].bytes_saved > 0
        assert {p.level for p in seen} == {0, 1}

        def stop(progress: ConvertProgress) -> None:
            if progress.tiles_done == 5:
                raise KeyboardInterrupt

        for work in (copy_slide, transcode_slide):
            with pytest.raises(KeyboardInterrupt):
                work(slide, tmp_path / "b.tif", progress=stop)
    nothing_left(tmp_path, "a.tif", "s.svs")


def test_given_metadata_takes_the_place_of_the_sources(tmp_path: Path) -> None:
    target = tmp_path / "copy.ome.tiff"
    given_one = SlideMetadata("slide", 0.5, 0.25, 20, None, ICC)
    _copy(CMU, target, PassOptions(metadata=given_one, associated=(), deidentified=True))
    with TiffReader(target) as slide:
        info = slide.info
        assert (info.mpp_x, info.mpp_y, info.magnification) == (0.5, 0.25, 20)
        assert info.icc_profile == ICC
        assert info.associated == ()
        assert info.record is not None
        assert info.record.deidentified
    assert b"ScanScope" not in target.read_bytes()
    secrets = frozenset({"SS1302" * 2})
    hidden = SlideMetadata("slide", description="SS1302" * 2)
    with pytest.raises(SlideError, match="would still hold 1 of the values"):
        _copy(CMU, tmp_path / "leak.tif", PassOptions(metadata=hidden, secrets=secrets))
    nothing_left(tmp_path, target.name)


# --- metadata in streams -------------------------------------------------------------------------


def _with_metadata(jpeg: bytes) -> bytes:
    """JPEG with secrets wherever JPEG can hold them."""
    extra = b""
    for marker, body in (
        (0xE1, b"Exif\0\0" + SECRET),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + SECRET),
        (0xE2, b"ICC_PROFILE\0" + SECRET),
        (0xED, SECRET),
        (0xFE, SECRET),
    ):
        extra += b"\xff" + bytes((marker,)) + (len(body) + 2).to_bytes(2) + body
    return b"\xff\xd8\xff" + extra + jpeg[2:] + SECRET


def test_metadata_is_taken_out_and_pixels_stay(tmp_path: Path) -> None:
    image = tissue(256, 256)
    tiles = _tiles_of(image, lambda t: _with_metadata(imagecodecs.jpeg8_encode(t, 80)))
    source = _write_tiles(tmp_path / "s.tif", image, tiles, compression="jpeg", subsampling=(2, 2))
    assert SECRET in source.read_bytes()
    for work in (_copy, _transcode):
        target = tmp_path / f"{work.__name__}.tif"
        work(source, target, PassOptions(strip_metadata=True))
        assert SECRET not in target.read_bytes()
    np.testing.assert_array_equal(_pixels(tmp_path / "_copy.tif")[0], _pixels(source)[0])
    restore(tmp_path / "_transcode.tif", tmp_path / "again.tif")
    assert _streams(tmp_path / "again.tif") == _streams(tmp_path / "_copy.tif")


@pytest.mark.parametrize("kind", ["scan", "scan, no end", "restart", "behind", "behind, ended"])
@pytest.mark.parametrize("work", [_copy, _transcode])
def test_nothing_hides_behind_the_last_block(
    tmp_path: Path, kind: str, work: Callable[..., Any]
) -> None:
    """Decoders skip what a scan holds beyond its blocks: room for a name in any tile."""
    with TiffReader(CMU) as slide:
        tables = slide.stored_layout(0).jpegtables
        tiles = [slide.tile_bytes(0, row, column) for row in range(2) for column in range(2)]
    hide: dict[str, Callable[[bytes], bytes]] = {
        "scan": lambda tile: tile[:-2] + SECRET + tile[-2:],
        "scan, no end": lambda tile: tile[:-2] + SECRET,
        "restart": lambda tile: tile[:-2] + b"\xff\xd0" + SECRET + tile[-2:],
        "behind": lambda tile: tile + SECRET,
        "behind, ended": lambda tile: tile + SECRET + tile[-2:],
    }
    streams = [tiles[0], hide[kind](tiles[1]), tiles[2], tiles[3]]
    options: dict[str, Any] = {
        "tile": (240, 240),
        "compression": "jpeg",
        "jpegtables": tables,
        "subsampling": (1, 1),
        "compressionargs": {"outcolorspace": "rgb"},
    }
    sound = _write_tiles(tmp_path / "sound.tif", np.empty((480, 480, 3)), tiles, **options)
    options["compressionargs"] = {"outcolorspace": "rgb"}
    source = _write_tiles(tmp_path / "s.tif", np.empty((480, 480, 3)), streams, **options)
    assert SECRET in source.read_bytes()
    target = tmp_path / "target.tif"
    if work is _transcode and kind == "scan, no end":
        with pytest.raises(SlideError, match="breaks off"):
            work(source, target, PassOptions(strip_metadata=True))
        return
    work(source, target, PassOptions(strip_metadata=True))
    assert SECRET not in target.read_bytes()
    if work is _transcode:
        restore(target, tmp_path / "again.tif")
        target = tmp_path / "again.tif"
    found = _streams(target)
    assert found[0][1][0::2] == tiles[0::2]
    if kind == "scan, no end":
        assert found[0][1][1] == tiles[1][:-2]
    else:
        assert found == _streams(sound)


def test_jfif_and_adobe_say_the_colours_still() -> None:
    jfif = bytes(imagecodecs.jpeg8_encode(tissue(64, 64), 80))
    thumbnail = bytes.fromhex("ffe0 0019") + jfif[6:18] + bytes((3, 1)) + SECRET[:9]
    for stream in (
        jfif,
        b"\xff\xd8" + thumbnail + jfif[20:],
        b"\xff\xd8" + bytes.fromhex("ffee0013") + b"Adobe\0\x64\0\0\0\0\1" + SECRET[:5] + jfif[20:],
    ):
        clean = without_metadata(stream)
        assert SECRET[:5] not in clean
        assert without_metadata(clean) == clean
        np.testing.assert_array_equal(
            imagecodecs.jpeg8_decode(clean), imagecodecs.jpeg8_decode(stream)
        )
    assert without_metadata(jfif) == jfif


def test_metadata_of_other_codings() -> None:
    image = tissue(64, 64)
    j2k = bytes(imagecodecs.jpeg2k_encode(image, level=0, codecformat="j2k"))
    siz = 4 + int.from_bytes(j2k[4:6])
    comment = b"\xff\x64" + (len(SECRET) + 4).to_bytes(2) + b"\0\1" + SECRET
    clean = cleaned(33005, j2k[:siz] + comment + j2k[siz:])
    assert SECRET not in clean
    np.testing.assert_array_equal(imagecodecs.jpeg2k_decode(clean), image)
    jxl = bytes(imagecodecs.jpegxl_encode(image))
    assert cleaned(50002, jxl) == jxl
    with pytest.raises(UnsupportedError, match="metadata cannot be removed"):
        cleaned(50002, bytes(imagecodecs.jpegxl_encode_jpeg(imagecodecs.jpeg8_encode(image))))
    webp = bytes(imagecodecs.webp_encode(image))
    assert cleaned(50001, webp) == webp
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, "WEBP", exif=b"Exif\0\0" + SECRET)
    with pytest.raises(UnsupportedError, match="metadata cannot be removed"):
        cleaned(50001, buffer.getvalue())
    jp2 = bytes(imagecodecs.jpeg2k_encode(image, level=0, codecformat="jp2"))
    with pytest.raises(UnsupportedError, match="metadata cannot be removed"):
        cleaned(34712, jp2)
    assert cleaned(8, b"anything") == b"anything"


@HOSTILE
@given(data=st.binary(max_size=300), code=st.sampled_from([7, 33005, 50001, 50002]))
def test_streams_of_strangers_are_cleaned_or_refused(data: bytes, code: int) -> None:
    for start in (b"", b"\xff\xd8", b"\xff\x4f", b"RIFF\0\0\0\0WEBPVP8X", b"\0\0\0\x0cJXL "):
        try:
            cleaned(code, start + data)
        except (FormatError, UnsupportedError):
            continue


@HOSTILE
@given(
    bodies=st.lists(st.tuples(st.integers(0xC0, 0xFE), st.binary(max_size=20)), max_size=6),
    scan=st.binary(max_size=40),
)
def test_segments_are_found_again(bodies: list[tuple[int, bytes]], scan: bytes) -> None:
    stream, wanted = b"\xff\xd8", []
    for marker, body in bodies:
        bare = 0xD0 <= marker <= 0xD7
        if marker in (0xD8, 0xD9, 0xDA):
            continue
        payload = b"" if bare else (len(body) + 2).to_bytes(2) + body
        wanted.append((marker, stream_end := len(stream), stream_end + 2 + len(payload)))
        stream += b"\xff" + bytes((marker,)) + payload
    data = scan.replace(b"\xff", b"\xff\x00")
    wanted.append((0xDA, len(stream), len(stream) + 4 + len(data)))
    stream += b"\xff\xda\x00\x02" + data
    wanted.append((0xD9, len(stream), len(stream) + 2))
    assert list(segments(stream + b"\xff\xd9" + scan)) == wanted


# --- transcode and restore -----------------------------------------------------------------------


def test_transcoded_slide_comes_back_bit_by_bit(tmp_path: Path) -> None:
    packed, copied = tmp_path / "packed.ome.tiff", tmp_path / "slide.ome.tiff"
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / "slide.ome.tiff"
    report = _transcode(CMU, packed)
    assert report.modes == {"transcoded": 130}
    tiles = sum(map(len, _streams(CMU)[0][1]))
    assert report.levels[0].coded_bytes < 0.72 * tiles
    restored = restore(packed, again, jobs=2)
    assert restored.modes == {"transcoded": 130}
    # against the original, and against the copy that was never transcoded
    assert _streams(again) == _streams(CMU)
    _copy(CMU, copied)
    assert again.read_bytes() == copied.read_bytes()
    for name in ("thumbnail", "label", "macro"):
        with TiffReader(CMU) as there, TiffReader(packed) as here:
            assert here.read_associated(name).stored == there.read_associated(name).stored


def test_transcoded_slide_reads_as_jpegxl(packed: Path) -> None:
    wanted, found = tifffile.imread(CMU), tifffile.imread(packed)
    difference = np.abs(wanted.astype(int) - found)
    # JPEG-XL rounds in its own way; wrong colours would be 50 levels off
    assert difference.mean() < 5
    with tifffile.TiffFile(packed) as tiff:
        page = tiff.pages.first
        assert (int(page.compression), int(page.photometric)) == (50002, 2)
        assert page.jpegtables is None
    with tiffslide.TiffSlide(packed) as slide:
        assert slide.dimensions == (2220, 2967)
    with TiffReader(packed) as slide:
        assert slide.info.record is not None
        assert slide.info.record.codec == "jpegxl"
        assert slide.info.record.options == {"lossless_transcode": True}
        with TiffReader(CMU) as source:
            assert slide.info.history == source.info.history


def test_transcode_of_a_slide_that_another_tool_wrote(tmp_path: Path) -> None:
    # its directory says RGB, its streams are YCbCr and say so by JFIF
    source = data_slide("os-1-detail.ome.tif")
    packed, again = tmp_path / "packed.ome.tiff", tmp_path / "again.ome.tiff"
    report = _transcode(source, packed)
    assert report.modes == {"transcoded": 9}
    assert report.target_bytes < 0.82 * report.source_bytes
    restore(packed, again)
    assert _streams(again) == _streams(source)
    difference = np.abs(_pixels(packed)[0].astype(int) - _pixels(source)[0])
    assert difference.mean() < 2


def _by_pillow(tile: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(tile).save(buffer, "JPEG", quality=85, **options)
    return buffer.getvalue()


def _rgb_jpeg(tile: np.ndarray) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(tile, 85, colorspace="rgb", outcolorspace="rgb"))


def _without_app0(jpeg: bytes) -> bytes:
    return jpeg[:2] + jpeg[20:] if jpeg[2:4] == b"\xff\xe0" else jpeg


JPEGS: dict[str, tuple[Callable[[np.ndarray], bytes], dict[str, Any]]] = {
    "jfif 4:2:0": (lambda t: imagecodecs.jpeg8_encode(t, 85), {"subsampling": (2, 2)}),
    "jfif 4:2:2": (lambda t: _by_pillow(t, subsampling="4:2:2"), {"subsampling": (2, 1)}),
    "jfif 4:4:4": (lambda t: _by_pillow(t, subsampling="4:4:4"), {"subsampling": (1, 1)}),
    "optimised": (lambda t: _by_pillow(t, optimize=True), {"subsampling": (2, 2)}),
    "progressive": (lambda t: _by_pillow(t, progressive=True), {"subsampling": (2, 2)}),
    "restarts": (lambda t: _by_pillow(t, restart_marker_blocks=5), {"subsampling": (2, 2)}),
    "no marker": (lambda t: _without_app0(_by_pillow(t)), {"subsampling": (2, 2)}),
    "tail": (lambda t: _by_pillow(t) + b"tail", {"subsampling": (2, 2)}),
    "rgb": (_rgb_jpeg, {"subsampling": (1, 1), "compressionargs": {"outcolorspace": "rgb"}}),
    "mislabelled": (
        _by_pillow,
        {"subsampling": (1, 1), "compressionargs": {"outcolorspace": "rgb"}},
    ),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_every_kind_of_jpeg_comes_back_and_keeps_its_colours(tmp_path: Path, kind: str) -> None:
    encode, options = JPEGS[kind]
    image = tissue(300, 260)
    source = _write_tiles(
        tmp_path / "s.tif", image, _tiles_of(image, encode), compression="jpeg", **options
    )
    packed, again = tmp_path / "packed.tif", tmp_path / "again.tif"
    report = _transcode(source, packed)
    assert report.modes == {"transcoded": 9}
    restore(packed, again)
    assert _streams(again) == _streams(source)
    np.testing.assert_array_equal(_pixels(again)[0], _pixels(source)[0])
    assert np.abs(_pixels(packed)[0].astype(int) - _pixels(source)[0]).mean() < 2


def test_levels_of_several_codings(tmp_path: Path) -> None:
    image = tissue(480, 480)
    source = tmp_path / "mixed.tif"
    with tifffile.TiffWriter(source) as writer:
        common: dict[str, Any] = {"photometric": "rgb", "tile": (128, 128), "metadata": None}
        writer.write(image, compression="deflate", predictor=True, **common)
        writer.write(image[::2, ::2], compression="jpeg", subsampling=(2, 2), **common)
        writer.write(image[::4, ::4], compression="jpeg", subsampling=(1, 1), **common)
    packed, again = tmp_path / "packed.tif", tmp_path / "again.tif"
    report = _transcode(source, packed)
    assert report.modes == {"copied": 16, "transcoded": 5}
    np.testing.assert_array_equal(_pixels(packed)[0], image)
    restore(packed, again)
    assert _streams(again) == _streams(source)


def test_strips_come_back(tmp_path: Path) -> None:
    source = KINDS["jpeg strips"](tmp_path / "s.tif", tissue(500, 470))
    packed, again = tmp_path / "packed.tif", tmp_path / "again.tif"
    _transcode(source, packed)
    with TiffReader(packed) as slide:
        assert slide.stored_layout(0).rows_per_strip == 64
    restore(packed, again, layout="flat")
    assert _streams(again) == _streams(source)
    assert np.abs(_pixels(packed)[0].astype(int) - _pixels(source)[0]).mean() < 2


def test_tiles_left_out_are_white_there_and_back(tmp_path: Path) -> None:
    whole = KINDS["jpeg 4:2:0"](tmp_path / "whole.svs", tissue(500, 470))
    source = _patched(whole, tmp_path / "sparse.svs", 325, 1, 0)
    packed, again, copied = (tmp_path / name for name in ("packed.tif", "again.tif", "copied.tif"))
    report = _transcode(source, packed)
    assert report.modes == {"left out": 1, "transcoded": 6}
    assert (_pixels(packed)[0][:240, 240:] == 255).all()
    restore(packed, again)
    _copy(source, copied)
    assert _streams(again) == _streams(copied)


def test_tile_that_jpegxl_cannot_take_is_kept_beside_its_pixels(tmp_path: Path) -> None:
    image = tissue(300, 260)
    tiles = _tiles_of(image, _rgb_jpeg)
    # JPEG-XL takes any APP0 for JFIF, and the tile for YCbCr
    tiles[4] = b"\xff\xd8\xff\xe0\x00\x08JFXX\0\x10" + tiles[4][2:]
    source = _write_tiles(tmp_path / "s.tif", image, tiles, compression="jpeg", **JPEGS["rgb"][1])
    packed, again = tmp_path / "packed.tif", tmp_path / "again.tif"
    report = _transcode(source, packed)
    assert report.modes == {"transcoded": 8, "kept": 1}
    np.testing.assert_array_equal(
        _pixels(packed)[0][128:256, 128:256], _pixels(source)[0][128:256, 128:256]
    )
    restore(packed, again)
    assert _streams(again) == _streams(source)


def test_tile_without_pixels_ends_a_transcode_by_name(tmp_path: Path) -> None:
    source = tmp_path / "broken.svs"
    data = bytearray(CMU.read_bytes())
    offset, count = _place(CMU, 23)
    data[offset : offset + count] = bytes(count)
    source.write_bytes(data)
    with pytest.raises(SlideError, match="level 0: tile at row 2, column 3"):
        _transcode(source, tmp_path / "packed.tif")
    nothing_left(tmp_path, "broken.svs")


def test_slides_without_jpeg_are_not_transcoded(tmp_path: Path) -> None:
    source = write_svs(tmp_path / "s.svs", tissue(300, 300))
    with TiffReader(source) as slide:
        assert "no level has JPEG tiles" in (transcodable(slide) or "")
        assert copyable(slide) is None
        with pytest.raises(UnsupportedError, match="no level has JPEG tiles"):
            transcode_slide(slide, tmp_path / "packed.tif")
    nothing_left(tmp_path, "s.svs")


def test_copy_of_a_transcoded_slide_can_still_be_restored(tmp_path: Path, packed: Path) -> None:
    copied, again = tmp_path / "copied.tif", tmp_path / "again.tif"
    _copy(packed, copied, FLAT)
    restore(copied, again)
    assert _streams(again) == _streams(CMU)


# --- restore: refusals ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "packed.tif"
    _transcode(CMU, path)
    return path


def _tampered(path: Path, packed: Path, offset: int, change: bytes) -> Path:
    data = bytearray(packed.read_bytes())
    assert data[offset : offset + len(change)] != change
    data[offset : offset + len(change)] = change
    path.write_bytes(data)
    return path


def test_files_that_were_not_transcoded_are_refused(tmp_path: Path) -> None:
    copied = tmp_path / "copied.tif"
    _copy(CMU, copied)
    for source in (CMU, copied):
        with pytest.raises(UnsupportedError, match="was not made with --lossless-transcode"):
            restore(source, tmp_path / "again.tif")
    nothing_left(tmp_path, "copied.tif")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_changed_tile_is_named(tmp_path: Path, packed: Path, share: float) -> None:
    offset, count = _place(packed, 42)
    place = offset + int(count * share)
    flipped = bytes((packed.read_bytes()[place] ^ 0x10,))
    source = _tampered(tmp_path / "s.tif", packed, place, flipped)
    with pytest.raises(FormatError, match="level 0: tile at row 4, column 2"):
        restore(source, tmp_path / "again.tif")
    nothing_left(tmp_path, "s.tif")


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_verify_turns_transcoded_tiles_back(tmp_path: Path, packed: Path, share: float) -> None:
    assert verify(packed).ok
    place, size = _place(packed, 77)
    changed = _tampered(tmp_path / "t.tif", packed, place + int(size * share), b"\x55\xaa")
    report = verify(changed)
    assert report.failed == 1
    assert (report.failures[0].row, report.failures[0].column) == divmod(77, 10)


def test_verify_looks_at_the_tag(tmp_path: Path, packed: Path) -> None:
    place = packed.read_bytes().index(b"WSTC")
    report = verify(_tampered(tmp_path / "t.tif", packed, place + 300, b"\0\xff\0"))
    assert (report.failed, len(report.faults)) == (0, 1)
    assert "t.tif" in report.faults[0]


def test_exchanged_tiles_are_noticed(tmp_path: Path, packed: Path) -> None:
    source = packed
    for code in (324, 325):
        with tifffile.TiffFile(packed) as tiff:
            values = tiff.pages.first.tags[code].value
        source = _patched(source, tmp_path / "a.tif", code, 1, values[2])
        source = _patched(source, tmp_path / "s.tif", code, 2, values[1])
    with pytest.raises(ChecksumError, match="tile at row 0, column 1: is not the tile"):
        restore(source, tmp_path / "again.tif")


def test_changed_tag_is_noticed(tmp_path: Path, packed: Path) -> None:
    with tifffile.TiffFile(packed) as tiff:
        tag = tiff.pages.first.tags[TAG_TRANSCODE]
        place, count = tag.valueoffset, tag.count
    for offset in (9, count // 2, count - 1):
        flipped = bytes((packed.read_bytes()[place + offset] ^ 1,))
        source = _tampered(tmp_path / "s.tif", packed, place + offset, flipped)
        with pytest.raises(ChecksumError, match=r"s\.tif: transcode tag was changed"):
            restore(source, tmp_path / "again.tif")
    nothing_left(tmp_path, "s.tif")


def test_tag_of_another_file_is_refused(tmp_path: Path, packed: Path) -> None:
    """Tables and digests that are sound in themselves, but not those of the tiles."""
    with tifffile.TiffFile(packed) as tiff:
        tag = tiff.pages.first.tags[TAG_TRANSCODE]
        place, (origin,) = tag.valueoffset, parse_origins(tag.value)
    tables = origin.layout.jpegtables
    assert tables is not None
    for changed, error, message in (
        (replace(origin, sha256=bytes(32)), ChecksumError, "not those that were transcoded"),
        (
            replace(origin, layout=replace(origin.layout, width=2221)),
            FormatError,
            "another size or other tiles",
        ),
        (
            replace(
                origin,
                layout=replace(origin.layout, jpegtables=tables[:20] + b"\x99" + tables[21:]),
            ),
            FormatError,
            "does not begin with the tables",
        ),
    ):
        source = _tampered(tmp_path / "s.tif", packed, place, pack_origins((changed,)))
        with pytest.raises(error, match=message):
            restore(source, tmp_path / "again.tif")
    nothing_left(tmp_path, "s.tif")


def test_command(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    restore_command.add(parser.add_subparsers())
    target = tmp_path / "again.tif"
    arguments = parser.parse_args(["restore", str(packed), str(target), "--json", "--jobs", "1"])
    assert arguments.run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["modes"] == {"transcoded": 130}
    assert _streams(target) == _streams(CMU)
    arguments = parser.parse_args(["restore", str(packed), str(target)])
    with pytest.raises(SlideError, match="exists already"):
        arguments.run(arguments)


# --- as convert does it --------------------------------------------------------------------------


@pytest.mark.parametrize("transcode", [False, True])
def test_convert_keeps_streams(tmp_path: Path, transcode: bool) -> None:
    target = tmp_path / "slide.ome.tiff"
    settings = ConvertSettings(
        codec="jpegxl" if transcode else "copy", lossless_transcode=transcode, jobs=2
    )
    report = convert(CMU, target, settings)
    assert report.modes == {"transcoded" if transcode else "copied": 130}
    assert report.associated == ("thumbnail", "label", "macro")
    with TiffReader(target) as slide:
        record = slide.info.record
        assert record is not None
        assert record.source is not None
        assert record.source.sha256 == hashlib.sha256(CMU.read_bytes()).hexdigest()
    if transcode:
        target = tmp_path / "again.tif"
        restore(tmp_path / "slide.ome.tiff", target)
        with TiffReader(target) as slide:
            assert slide.info.record is not None
            assert slide.info.record.source == record.source
    assert _streams(target) == _streams(CMU)


@pytest.mark.parametrize("transcode", [False, True])
def test_convert_keeps_streams_without_what_identifies(tmp_path: Path, transcode: bool) -> None:
    target = tmp_path / "slide.ome.tiff"
    settings = ConvertSettings(
        codec="jpegxl" if transcode else "copy",
        lossless_transcode=transcode,
        deidentify=True,
        jobs=2,
    )
    report = convert(CMU, target, settings)
    assert "label" in report.dropped
    data = target.read_bytes()
    for secret in (b"ScanScope", b"SS1302", b"12/29/09", b"b414003d", b"CMU-1"):
        assert secret not in data
    with TiffReader(target) as slide:
        assert slide.info.record is not None
        assert slide.info.record.deidentified
        assert slide.info.record.source is None
    if not transcode:
        assert _streams(target) == _streams(CMU)  # its tiles hold no metadata


# --- the tag -------------------------------------------------------------------------------------


@st.composite
def _origins(draw: st.DrawFn) -> LevelOrigin:
    tiled = draw(st.booleans())
    side = st.integers(1, 300)
    layout = StoredLayout(
        height=draw(side),
        width=draw(side),
        compression=draw(st.integers(1, 65535)),
        photometric=draw(st.sampled_from([2, 6])),
        tile=(draw(st.integers(64, 400)), draw(st.integers(64, 400))) if tiled else None,
        rows_per_strip=None if tiled else draw(st.integers(20, 300)),
        subsampling=draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4))),
        jpegtables=draw(st.none() | st.binary(max_size=40)),
        predictor=draw(st.integers(1, 3)),
    )
    count = segment_count(layout)
    ways = bytes(draw(st.lists(st.sampled_from(Way), min_size=count, max_size=count)))
    number = st.integers(0, 2**32 - 1)
    return LevelOrigin(
        layout,
        ways,
        array("I", draw(st.lists(number, min_size=count, max_size=count))),
        draw(st.binary(min_size=32, max_size=32)),
        tuple(draw(st.binary(min_size=1, max_size=30)) for _ in range(ways.count(Way.KEPT))),
    )


@HOSTILE
@given(levels=st.lists(_origins(), min_size=1, max_size=4).map(tuple))
def test_tag_round_trip(levels: tuple[LevelOrigin, ...]) -> None:
    assert parse_origins(pack_origins(levels)) == levels


@HOSTILE
@given(level=_origins(), data=st.data())
def test_damaged_tags_are_refused_by_name(level: LevelOrigin, data: st.DataObject) -> None:
    packed = bytearray(pack_origins((level,)))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WsicodecError):
        parse_origins(bytes(packed))
    with pytest.raises(FormatError):
        parse_origins(bytes(packed[:place]))


@HOSTILE
@given(
    header=st.dictionaries(
        st.sampled_from(["height", "width", "segments", "tables", "kept", "tile", "sha256"]),
        st.none()
        | st.integers(-(2**70), 2**70)
        | st.text(max_size=5)
        | st.lists(st.integers(-1, 2**40), max_size=3)
        | st.floats(),
    ),
    rest=st.binary(max_size=50),
)
def test_headers_of_strangers_are_refused_by_name(header: dict[str, Any], rest: bytes) -> None:
    """A sound checksum around a header that lies."""
    level = {
        "height": 64, "width": 64, "compression": 7, "photometric": 2, "tile": [64, 64],
        "rows_per_strip": None, "subsampling": None, "predictor": 1, "tables": None, "segments": 1,
        "kept": [], "sha256": "00" * 32, **header,
    }  # fmt: skip
    text = json.dumps({"levels": [level]}).encode()
    data = b"WSTC\x01" + len(text).to_bytes(4, "little") + text + rest
    data += zlib.crc32(data).to_bytes(4, "little")
    try:
        (parsed,) = parse_origins(data)
    except WsicodecError:
        return
    assert len(parsed.ways) == segment_count(parsed.layout)


def test_caps_of_the_tag() -> None:
    layout = StoredLayout(
        height=8, width=8, compression=7, photometric=2, tile=(8, 8), rows_per_strip=None
    )
    digest = LevelDigest(None)
    digest.add(b"tile")
    level = LevelOrigin(layout, bytes((Way.TRANSCODED,)), array("I", [1]), digest.digest())
    with pytest.raises(LimitError, match="too many"):
        pack_origins((level,) * (MAX_LEVELS + 1))
    data = bytearray(pack_origins((level,)))
    data[4] = 2
    with pytest.raises(UnsupportedError, match="version 2"):
        parse_origins(bytes(data))
    for value in (b"", b"WSTC", b"other bytes that are long enough"):
        with pytest.raises(FormatError, match="does not say"):
            parse_origins(value)


def _jpegs() -> Iterator[tuple[bytes | None, bytes]]:
    with TiffReader(CMU) as slide:
        yield slide.stored_layout(0).jpegtables, slide.tile_bytes(0, 3, 3)
    yield None, bytes(imagecodecs.jpeg8_encode(tissue(64, 64)))


def test_tables_go_in_and_out() -> None:
    for tables, tile in _jpegs():
        for head in (b"", b"\xff\xfe\x00\x03!"):
            whole = with_tables(tables, tile, head)
            assert imagecodecs.jpeg8_decode(whole).shape[2] == 3
            assert without_tables(tables, whole, head) == tile
    with pytest.raises(FormatError, match="not framed"):
        with_tables(b"\xff\xd8", tile)
    tables, tile = next(_jpegs())
    assert tables is not None
    whole = with_tables(tables, tile)
    # the end marker is where the last segment ends, or not there
    for odd in (tables[:-2], tables + b"\0\0", tables[:-2] + b"\xff" + tables[-2:] + b"\0"):
        assert with_tables(odd, tile) == whole
        assert without_tables(odd, whole) == tile
    for cut in (tables[:-1], tables[:-3], tables[:40], tables[:-2] + b"\0"):
        with pytest.raises(FormatError, match="JPEG"):
            with_tables(cut, tile)
    with pytest.raises(FormatError, match="does not start"):
        with_tables(None, b"\0" + tile)
