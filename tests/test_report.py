"""Reports: what they say is so, nothing of a file acts in them, and a browser shows them."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from slides import CMU, data_slide, halved, nothing_left, tissue, write_svs

import wsicodec
from wsicodec.bitstream import Mode
from wsicodec.cli import info as info_command
from wsicodec.cli import report as report_command
from wsicodec.convert import ConvertSettings, convert
from wsicodec.convert.against import source_region
from wsicodec.errors import SettingsError, SlideError, UnsupportedError, VerifyError
from wsicodec.metrics import METRIC_ARGUMENTS, psnr, ssim
from wsicodec.models import find_model
from wsicodec.printing import printable
from wsicodec.report import charts, maps, pictures, where
from wsicodec.report.figures import TileFigures, tissue_grid, worst_tiles
from wsicodec.report.findings import LENGTHS, MEASURED, STORED, Findings, collect
from wsicodec.report.measure import TileReader, measure
from wsicodec.report.page import MAX_PAGE_BYTES, draw
from wsicodec.report.stored import find_passport, stored_bytes, stored_lengths
from wsicodec.report.text import psnr_text, share_text, size_text, ssim_text
from wsicodec.slide.ometiff import CodedLevel, SlideMetadata, write_slide
from wsicodec.slide.opening import open_slide
from wsicodec.slide.passport import (
    PLAIN_STREAM,
    LevelMap,
    Passport,
    read_passport,
    summarise_level,
)
from wsicodec.slide.protocol import Level
from wsicodec.slide.record import (
    AREA_AVERAGE,
    FROM_SOURCE,
    FileRecord,
    FloorRecord,
    GlassRecord,
    ModelId,
    SourceIdentity,
)
from wsicodec.slide.tiff import TiffReader
from wsicodec.slide.zarrreader import ZarrReader
from wsicodec.tissue.mask import TissueMask

TILE = 128
FLOOR = FloorRecord(ssim=0.97)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def coded_slide(
    original: Path,
    target: Path,
    *,
    codec: str = "learned",
    averaged: int = 1,
    mask: TissueMask | None = None,
    with_passport: bool = True,
    **changes: Any,
) -> Path:
    """A real conversion: coded by the codec, measured by the metrics, written by the writer.

    averaged: levels made by halving after those of the source. mask: its glass tiles are one
    stream. changes: of the record.
    """
    with open_slide(original) as slide:
        info = slide.info
        images = [slide.read_region(v.index, 0, 0, v.height, v.width) for v in slide.levels]
    origins = [FROM_SOURCE] * len(images) + [AREA_AVERAGE] * averaged
    for _ in range(averaged):
        images.append(area_averaged(images[-1]))
    levels, level_maps = [], []
    for image in images:
        tiles, found = _code(image, codec, mask, images[0].shape[1] / image.shape[1])
        colour = (240, 240, 240) if mask is None else mask.background
        glass = np.full((TILE, TILE, 3), colour, np.uint8)
        stream = wsicodec.encode(glass, codec=codec)
        levels.append(CodedLevel(image.shape[0], image.shape[1], TILE, tiles, stream))
        level_maps.append(found)
    model = find_model("he-fast")
    record = FileRecord(
        wsicodec=wsicodec.__version__,
        codec=codec,
        quality=70,
        models=(ModelId(model.name, model.digest),) if codec == "learned" else (),
        history=(*info.history, f"{codec} quality 70"),
        levels=tuple(origins),
        metrics=METRIC_ARGUMENTS,
        settings={"tile_size": TILE, "preset": "diagnostic"},
        source=SourceIdentity(
            hashlib.sha256(original.read_bytes()).hexdigest(),
            original.stat().st_size,
            info.format,
            info.compression,
        ),
        glass=None
        if mask is None
        else GlassRecord("drop", mask.method, mask.background, mask.tissue_share),
        floor=FLOOR,
        level_quality=tuple(summarise_level(found, FLOOR) for found in level_maps),
    )
    passport = Passport(tuple(level_maps), mask).pack() if with_passport else None
    metadata = SlideMetadata(target.name, info.mpp_x, info.mpp_y, info.magnification)
    with target.open("wb+") as file:
        write_slide(
            file,
            levels,
            codec,
            metadata,
            dataclasses.replace(record, **changes),
            passport=passport,
        )
    return target


def area_averaged(image: np.ndarray) -> np.ndarray:
    """What ``slides.halved`` gives, faster."""
    image = np.pad(image, [(0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)], mode="edge")
    blocks = image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2, 3)
    return np.floor(blocks.mean((1, 3)) + 0.5).astype(np.uint8)


def _code(
    image: np.ndarray, codec: str, mask: TissueMask | None, downsample: float
) -> tuple[list[bytes | None], LevelMap]:
    rows, columns = -(-image.shape[0] // TILE), -(-image.shape[1] // TILE)
    shape = (rows, columns)
    found = LevelMap(
        rows,
        columns,
        np.zeros(shape, np.uint32),
        np.full(shape, np.nan, np.float32),
        np.full(shape, np.nan, np.float32),
        np.zeros(shape, np.uint8),
        np.full(shape, Mode.CONSTANT if codec == "learned" else PLAIN_STREAM, np.uint8),
    )
    tiles: list[bytes | None] = []
    for row in range(rows):
        for column in range(columns):
            y, x = row * TILE, column * TILE
            part = image[y : y + TILE, x : x + TILE]
            if mask is not None:
                if mask.all_glass(downsample, y, x, *part.shape[:2]):
                    tiles.append(None)
                    continue
                part = part.copy()
                part[mask.glass(downsample, y, x, *part.shape[:2])] = mask.background
            padding = [(0, TILE - part.shape[0]), (0, TILE - part.shape[1]), (0, 0)]
            data = (
                wsicodec.encode(np.pad(part, padding, mode="edge"), codec=codec, effort=1)
                if (codec == "learned")
                else wsicodec.encode(np.pad(part, padding, mode="edge"), codec=codec)
            )
            decoded = wsicodec.decode(data)[: part.shape[0], : part.shape[1]]
            tile = wsicodec.probe(data)
            found.bytes[row, column] = len(data)
            found.psnr[row, column] = psnr(part, decoded)
            found.ssim[row, column] = ssim(part, decoded)
            if codec == "learned":
                found.quality[row, column] = tile.quality or 0
                found.mode[row, column] = Mode[tile.mode.upper()]
            tiles.append(data)
    return tiles, found


def corner_mask() -> TissueMask:
    """Glass in the top right of a slide of 700 x 900 px."""
    cells = np.ones((44, 57), np.bool_)
    cells[:20, 28:] = False
    return TissueMask(cells, 16, "otsu", (241, 238, 240))


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", tissue(700, 900), levels=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 2 x 3 tiles."""
    return write_svs(tmp_path_factory.mktemp("small") / "s.svs", tissue(200, 300), levels=1)


@pytest.fixture(scope="module")
def slide(svs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two levels, the second averaged, with a passport and a mask."""
    folder = tmp_path_factory.mktemp("slide")
    return coded_slide(svs, folder / "a.ome.tiff", mask=corner_mask())


@pytest.fixture(scope="module")
def bare(svs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a passport or mask."""
    folder = tmp_path_factory.mktemp("bare")
    return coded_slide(svs, folder / "b.ome.tiff", with_passport=False)


@pytest.fixture(scope="module")
def findings(slide: Path, svs: Path) -> Findings:
    return collect(slide, svs)


@pytest.fixture(scope="module")
def page(findings: Findings) -> str:
    return draw(findings)


VOID = {"meta", "img", "br", "link", "hr", "input"}


class Reader(html.parser.HTMLParser):
    """Elements, texts and faults of a page, by the standard library."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if len({name for name, _ in attrs}) != len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def check_page(page: str) -> Reader:
    """Well formed, self-contained, small."""
    reader = Reader(page)
    assert reader.faults == []
    assert len(page.encode()) < MAX_PAGE_BYTES
    assert not {tag for tag, _ in reader.elements} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    for tag, attributes in reader.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "data", "action", "poster", "srcset"):
                assert value is not None
                assert value.startswith(("data:image/", "#")), f"{tag} {name} {value[:50]}"
        if tag == "img":
            assert attributes.get("alt")
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    styles += [
        attributes["style"] or "" for _, attributes in reader.elements if "style" in attributes
    ]
    assert not re.search(r"url\(|@import|expression", "".join(styles))
    assert "://" not in re.sub(r"data:image/[^\"]*", "", page)
    return reader


def data_images(page: str) -> Iterator[np.ndarray]:
    for kind, data in re.findall(r"data:image/(\w+);base64,([^\"]*)", page):
        decode = {"jpeg": imagecodecs.jpeg8_decode, "webp": imagecodecs.webp_decode}[kind]
        yield decode(base64.b64decode(data, validate=True))


PATCHY_SETTINGS = ConvertSettings(
    codec="jpeg", glass="drop", tissue="otsu", floor_ssim=0.9, tile_size=TILE, levels=2, jobs=1
)


@pytest.fixture(scope="module")
def patchy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch of tissue on glass."""
    image = np.full((600, 900, 3), (243, 241, 244), np.uint8)
    image[100:400, 100:400] = tissue(300, 300)
    return write_svs(tmp_path_factory.mktemp("patchy") / "a.svs", image, levels=1)


def same_figures(one: Passport, other: Passport) -> None:
    """Assert that two passports agree where both measured."""
    for old, new in zip(one.levels, other.levels, strict=True):
        known = old.measured & new.measured
        assert known.sum() > 3
        assert np.allclose(old.ssim[known], new.ssim[known], atol=1e-6)
        assert np.allclose(old.psnr[known], new.psnr[known], atol=1e-3)


def filled(part: np.ndarray, findings: Findings, tile: TileFigures) -> np.ndarray:
    """A part of the source as it was coded."""
    assert findings.passport is not None
    mask = findings.passport.mask
    assert mask is not None
    downsample = findings.info.levels[tile.level].downsample
    part = part.copy()
    part[mask.glass(downsample, tile.y, tile.x, *part.shape[:2])] = mask.background
    return part


class TestCollect:
    def test_stored_figures(self, findings: Findings, slide: Path) -> None:
        assert findings.basis == STORED
        assert findings.problem is None
        assert [level.level.width for level in findings.levels] == [900, 450]
        assert findings.tiles == 6 * 8 + 3 * 4
        assert findings.passport is not None
        unmeasured = sum(int((~v.measured).sum()) for v in findings.passport.levels)
        assert findings.measured_tiles == findings.tiles - unmeasured
        assert findings.shared_glass == unmeasured > 5
        assert findings.source is not None
        assert findings.source.same is True
        counts = stored_bytes(findings.info)
        assert counts is not None
        assert sum(counts) < slide.stat().st_size
        for row, count in zip(findings.levels, counts, strict=True):
            assert row.stored == count
            assert row.bpp == 8 * count / (row.level.height * row.level.width)

    def test_worst_tiles_are_the_worst(self, findings: Findings) -> None:
        assert findings.passport is not None
        assert findings.worst is not None
        every = np.concatenate([v.ssim[v.measured] for v in findings.passport.levels])
        assert [t.ssim for t in findings.worst.tiles] == pytest.approx(np.sort(every)[:10].tolist())
        assert findings.below_floor == int((every < np.float32(0.97)).sum()) > 0
        first = findings.worst.tiles[0]
        assert first.below_floor
        assert first.tissue
        with open_slide(findings.info.path) as slide:
            ours = slide.read_region(first.level, first.y, first.x, first.height, first.width)
        assert np.array_equal(findings.pictures[0].ours, ours)

    def test_pictures_of_both(self, findings: Findings, svs: Path) -> None:
        """Source pixels of level 0 as they are, of an averaged level averaged anew."""
        whole = tissue(700, 900)
        small = area_averaged(whole)
        for picture in findings.pictures:
            tile = picture.tile
            image = (whole, small)[tile.level]
            part = image[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
            assert np.array_equal(picture.source, part)
            assert picture.ours is not None
            assert ssim(filled(part, findings, tile), picture.ours) == pytest.approx(
                tile.ssim, abs=1e-6
            )
        with open_slide(findings.info.path) as ours, open_slide(svs) as source:
            part = source_region(ours, source, 0, 640, 768, 60, 132)
        assert np.array_equal(part, whole[640:, 768:])

    def test_measuring_gives_what_was_stored(self, slide: Path, svs: Path) -> None:
        stored = read_passport(slide)
        assert stored is not None
        seen: list[tuple[int, int]] = []
        with TiffReader(slide) as ours, open_slide(svs) as source:
            fresh = measure(ours, source, stored.mask, jobs=2, progress=lambda *at: seen.append(at))
        assert fresh is not None
        assert seen[-1] == (60, 60)
        for old, new in zip(stored.levels, fresh.levels, strict=True):
            known = old.measured
            assert np.array_equal(old.bytes, new.bytes)
            assert np.array_equal(old.mode, new.mode)
            assert np.array_equal(old.quality[known], new.quality[known])
            assert np.allclose(old.ssim[known], new.ssim[known], atol=1e-6)
            assert np.allclose(old.psnr[known], new.psnr[known], atol=1e-3)
            assert np.array_equal(new.measured, known)

    @pytest.mark.parametrize("glass", ["drop", "fill"])
    def test_of_a_conversion(self, glass: str, patchy: Path, tmp_path: Path) -> None:
        """What ``convert`` writes is what measuring the file finds, glass and all."""
        target = tmp_path / "a.ome.tiff"
        convert(patchy, target, dataclasses.replace(PATCHY_SETTINGS, glass=glass))
        found = collect(target, patchy)
        assert found.problem is None
        assert found.basis == STORED
        assert found.passport is not None
        assert found.passport.mask is not None
        assert found.source is not None
        assert found.source.same is True
        assert found.below_floor == 0
        assert (found.shared_glass > 0) == (glass == "drop")
        fresh = collect(target, patchy, measure_anew=True)
        assert fresh.passport is not None
        same_figures(found.passport, fresh.passport)
        text = check_page(draw(found)).text
        assert "Quality floor held by every tile" in text
        assert "Glass was made one colour" in text
        assert "quality passport: " in info_text(target)

    def test_of_a_zarr(self, patchy: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.zarr"
        convert(patchy, target, PATCHY_SETTINGS)
        with ZarrReader(target) as ours, open_slide(patchy) as source:
            passport, problem = find_passport(ours)
            assert problem is None
            assert passport is not None
            assert isinstance(ours, TileReader)
            fresh = measure(ours, source, passport.mask)
            assert fresh is not None
            same_figures(passport, fresh)
            known = passport.levels[0].bytes > 0
            assert np.array_equal(passport.levels[0].bytes[known], fresh.levels[0].bytes[known])

    def test_without_a_passport(self, bare: Path, svs: Path) -> None:
        """Lengths and modes are in the file; fidelity is in its record, or measured on request."""
        found = collect(bare)
        assert found.basis == LENGTHS
        assert found.problem == "the file has no quality passport"
        assert found.passport is not None
        assert not found.passport.levels[0].measured.any()
        assert int(found.passport.levels[0].bytes.sum()) == found.levels[0].stored
        assert (found.passport.levels[0].mode == Mode.LEARNED).mean() > 0.8
        assert found.worst is not None
        assert found.worst.tiles == ()
        fresh = collect(bare, svs, measure_anew=True, jobs=1)
        assert fresh.basis == MEASURED
        assert fresh.worst is not None
        assert len(fresh.worst.tiles) == 10

    def test_of_a_scanners_file(self) -> None:
        found = collect(CMU)
        assert found.info.record is None
        assert found.levels[0].stored is not None
        reader = check_page(draw(found))
        assert "not by wsicodec" in reader.text
        assert "has no quality passport" in reader.text

    def test_measuring_what_has_no_tiles_is_refused(self) -> None:
        """Not reported as if it had been measured."""
        dicom = data_slide("highdicom-sm-image.dcm")
        with pytest.raises(UnsupportedError, match="cannot be measured"):
            collect(dicom, dicom, measure_anew=True)

    def test_damaged_passport(self, small: Path, tmp_path: Path) -> None:
        path = coded_slide(small, tmp_path / "c.ome.tiff", codec="jpeg", averaged=0)
        content = bytearray(path.read_bytes())
        at = content.index(b"WSCP")
        content[at + 40] ^= 1
        path.write_bytes(content)
        found = collect(path)
        assert found.problem is not None
        assert "checksum does not match" in found.problem
        assert "checksum does not match" in check_page(draw(found)).text

    def test_passport_of_another_file(self, slide: Path, svs: Path, tmp_path: Path) -> None:
        path = coded_slide(svs, tmp_path / "d.ome.tiff", codec="jpeg", averaged=0)
        with tifffile.TiffFile(path) as file, tifffile.TiffFile(slide) as other:
            tag = file.pages.first.tags[60645]
            value = other.pages.first.tags.valueof(60645)
        content = bytearray(path.read_bytes())
        content += value
        place = tag.offset + 4
        content[place : place + 16] = len(value).to_bytes(8, "little") + (
            len(content) - len(value)
        ).to_bytes(8, "little")
        path.write_bytes(content)
        problem = collect(path).problem
        assert problem is not None
        assert "maps 6 x 8, 3 x 4 tiles, the file has 6 x 8" in problem

    def test_wrong_sources(self, slide: Path, svs: Path, tmp_path: Path) -> None:
        with pytest.raises(VerifyError, match="not its source"):
            collect(slide, CMU)
        with pytest.raises(SettingsError, match="--against"):
            collect(slide, measure_anew=True)
        other = write_svs(tmp_path / "other.svs", tissue(700, 900)[:, ::-1], levels=1)
        found = collect(slide, other)
        assert found.source is not None
        assert found.source.same is False
        assert "SHA-256 is another" in check_page(draw(found)).text

    def test_unknown_model(
        self, tmp_path: Path, svs: Path, slide: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file of a model that is not installed: all figures, no pictures, and it says so."""
        content = slide.read_bytes()
        prefix = bytes.fromhex(find_model("he-fast").digest[:8])
        damaged = bytearray(content)
        # tiles name another model; their checksums fit
        with tifffile.TiffFile(slide) as file:
            for page in (file.pages.first, *file.pages.first.pages):
                for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                    data = bytearray(content[offset : offset + count])
                    if data[5] == Mode.LEARNED:
                        assert data[18:22] == prefix
                        data[18:22] = b"\1\2\3\4"
                        crc = zlib.crc32(data[18:], zlib.crc32(data[:14]))
                        data[14:18] = crc.to_bytes(4, "little")
                        damaged[offset : offset + count] = data
        path = tmp_path / "e.ome.tiff"
        path.write_bytes(damaged)
        found = collect(path, svs)
        assert found.overview is None
        assert found.no_overview is not None
        reader = check_page(draw(found))
        assert "No picture" in reader.text
        assert "01020304" in reader.text


class TestStored:
    def test_shared_tiles_count_once(self, slide: Path) -> None:
        with open_slide(slide) as opened:
            info = opened.info
        (first, second) = stored_lengths(info)
        assert first is not None
        assert second is not None
        stored = read_passport(slide)
        assert stored is not None
        assert np.array_equal(first, stored.levels[0].bytes)
        totals = stored_bytes(info)
        assert totals is not None
        assert 0 < totals[0] - int(first.sum()) < 100  # the one constant tile

    def test_of_no_tiff(self, slide: Path) -> None:
        with open_slide(slide) as opened:
            info = dataclasses.replace(opened.info, format="mrxs")
        assert stored_bytes(info) is None
        assert stored_lengths(info) == (None, None)


class TestMaps:
    @given(
        hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)),
        st.sampled_from([8, 16, 32]),
        st.integers(1, 300),
        st.integers(1, 300),
        st.sampled_from([1.0, 2.0, 4.000123, 3.9]),
        st.sampled_from([16, 48]),
    )
    def test_tissue_grid_as_the_mask_says(
        self, cells: np.ndarray, cell: int, height: int, width: int, downsample: float, tile: int
    ) -> None:
        mask = TissueMask(cells, cell, "otsu", (0, 0, 0))
        level = Level(0, height, width, downsample, tile, tile)
        grid = tissue_grid(mask, level)
        for row in range(level.rows):
            for column in range(level.columns):
                y, x = row * tile, column * tile
                size = (min(tile, height - y), min(tile, width - x))
                assert grid[row, column] != mask.all_glass(downsample, y, x, *size)

    def test_outline_encloses(self) -> None:
        cells = np.zeros((6, 8), np.bool_)
        cells[2:4, 3:7] = True
        found = maps.outline(TissueMask(cells, 32, "otsu", (0, 0, 0)))
        assert found.cell == 32
        pieces = re.findall(r"M(\d+) (\d+)([hv])(\d+)", found.path)
        assert sorted(pieces) == [
            ("3", "2", "h", "4"),
            ("3", "2", "v", "2"),
            ("3", "4", "h", "4"),
            ("7", "2", "v", "2"),
        ]

    def test_outline_of_noise_is_bounded(self) -> None:
        cells = np.random.default_rng(0).random((3000, 4000)) < 0.5
        found = maps.outline(TissueMask(cells, 32, "otsu", (0, 0, 0)))
        assert len(found.path) < 100_000

    def test_worst_of_several_is_shown(self) -> None:
        """One bad tile among a million is one bright point."""
        values = np.full((1000, 1000), 0.99, np.float32)
        values[777, 123] = 0.5
        values[0, 0] = np.nan
        scale = maps.Scale(0.9, 1.0, bright_high=False)
        factor = maps.pooling(1000, 1000)
        below = values < 0.6
        image = maps.heat_map(values, scale, None, factor)
        assert max(image.shape) <= maps.MAX_SIDE
        assert tuple(image[777 // factor, 123 // factor]) == (253, 231, 37)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) == 2
        marked = maps.heat_map(values, scale, below, factor)
        assert tuple(marked[777 // factor, 123 // factor]) == maps.BELOW

    def test_unknown_and_infinite(self) -> None:
        values = np.array([[np.nan, np.inf, 30, 20]], np.float32)
        scale = maps.scale_of(values, bright_high=False, limit=math.inf)
        assert scale is not None
        image = maps.heat_map(values, scale, None, 1)
        assert tuple(image[0, 0]) == maps.UNKNOWN
        assert tuple(image[0, 1]) == (68, 1, 84)  # the best there is
        assert tuple(image[0, 3]) == (253, 231, 37)
        assert maps.scale_of(values[:, :2], bright_high=False, limit=1) is None

    def test_unknown_and_infinite_of_several(self) -> None:
        """Tiles equal to their source are known, whatever the map is drawn coarser by."""
        values = np.full((4, 6), np.inf, np.float32)
        values[:2, :2] = np.nan
        values[2, 2] = 30
        scale = maps.Scale(30, 50, bright_high=False)
        image = maps.heat_map(values, scale, None, 2)
        assert tuple(image[0, 0]) == maps.UNKNOWN
        assert tuple(image[0, 1]) == tuple(image[1, 2]) == (68, 1, 84)
        assert tuple(image[1, 1]) == (253, 231, 37)

    def test_ends_of_a_scale_tell_what_lies_beyond(self) -> None:
        scale = maps.Scale(0, 2, bright_high=True)
        within = where._ramp(scale, np.array([0, 1, 2, np.nan]), " dB")
        assert "<span>0 dB</span>" in within
        assert "<span>2 dB</span>" in within
        beyond = where._ramp(scale, np.array([-1, np.inf]), " dB")
        assert "<span>≤ 0 dB</span>" in beyond
        assert "<span>≥ 2 dB</span>" in beyond

    def test_scale_of_absurd_values(self) -> None:
        values = np.array([[0, 3.4e38, 3.3e38]], np.float32)
        scale = maps.scale_of(values, bright_high=False, limit=math.inf)
        assert scale is not None
        assert math.isfinite(scale.low + scale.high)
        assert maps.heat_map(values, scale, None, 1).shape == (1, 3, 3)

    @pytest.mark.parametrize("value", [0.0, 0.97, 1.0, 45.0])
    def test_scale_of_equal_values(self, value: float) -> None:
        scale = maps.scale_of(np.full((2, 2), value, np.float32), bright_high=False, limit=1e9)
        assert scale is not None
        assert scale.low <= value + 1e-9
        assert value <= scale.high + 1e-9
        assert scale.low < scale.high

    def test_rarest_mode_is_shown(self) -> None:
        mode = np.full((900, 900), Mode.LEARNED, np.uint8)
        mode[500, 600] = Mode.LOSSLESS
        lengths = np.ones((900, 900), np.uint32)
        lengths[0, 0] = 0
        image = maps.mode_map(mode, lengths, 3)
        assert tuple(image[166, 200]) == maps.MODE_COLOURS[Mode.LOSSLESS]
        assert tuple(image[0, 0]) == maps.MODE_COLOURS[maps.SHARED_GLASS]
        assert tuple(image[50, 50]) == maps.MODE_COLOURS[Mode.LEARNED]

    def test_every_mode_has_a_colour_and_a_name(self) -> None:
        from wsicodec.report.markup import MODE_NAMES

        assert set(maps.MODE_COLOURS) == set(MODE_NAMES) == {*Mode, PLAIN_STREAM, -1}
        assert len(set(maps.MODE_COLOURS.values())) == len(maps.MODE_COLOURS)


class TestPieces:
    def test_histogram_counts_every_tile(self) -> None:
        rng = np.random.default_rng(0)
        values = rng.normal(30, 2, 5000).astype(np.float32)
        values[:3] = (np.nan, np.inf, 31)
        drawn = charts.histogram(
            "PSNR",
            "dB",
            [charts.Series("all", "all", values)],
            [charts.Mark(28, "floor 28", "floor")],
        )
        assert "of 4998 tiles" in drawn
        assert "floor 28" in drawn
        assert charts.histogram("PSNR", "dB", [charts.Series("a", "a", values[:1])], []) == ""

    @given(hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)))
    def test_histogram_takes_anything(self, values: np.ndarray) -> None:
        drawn = charts.histogram("x", "", [charts.Series("a", "all", values)], [])
        assert bool(drawn) == bool(np.isfinite(values).any())
        assert Reader(drawn).faults == []
        assert not re.search(r"[ \"]-?(nan|inf)", drawn)

    def test_photograph_keeps_its_limit(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
        assert len(pictures.photograph(noise, 48_000)) < 65_000
        fine = base64.b64decode(pictures.photograph(tissue(256, 256), 48_000).split(",")[1])
        assert psnr(tissue(256, 256), imagecodecs.jpeg8_decode(fine)) > 36

    def test_difference(self) -> None:
        ours = np.array([[[10, 20, 30], [0, 0, 0]]], np.uint8)
        source = np.array([[[10, 22, 25], [255, 0, 0]]], np.uint8)
        assert pictures.difference(ours, source).tolist() == [[[128, 120, 148], [0, 128, 128]]]

    def test_texts(self) -> None:
        assert printable("a\x1b[31m\u202eb\ud800\n") == "a\ufffd[31m\ufffdb\ufffd\ufffd"
        assert printable("µm °C 組織") == "µm °C 組織"
        assert printable("x" * 400).endswith("…")
        assert len(printable("x" * 10**7)) == 300
        assert [psnr_text(v) for v in (math.nan, math.inf, 31.456)] == ["–", "exact", "31.46"]
        assert [ssim_text(v) for v in (math.nan, 1.0, 0.99999, 0.95)] == [
            "–",
            "1.0000",
            "0.9999",
            "0.9500",
        ]
        assert share_text(0.0001) == "< 0.1 %"
        assert size_text(1_500_000) == "1.50 MB"

    def test_source_region_of_an_odd_pyramid(self, svs: Path, bare: Path) -> None:
        """The last, odd rows average what is there, as averaged levels do."""
        with open_slide(bare) as ours, open_slide(svs) as source:
            part = source_region(ours, source, 1, 300, 400, 50, 50)
        assert np.array_equal(part, halved(tissue(700, 900)[600:, 800:]))

    def test_part_with_the_largest_error(self, tmp_path: Path) -> None:
        """Of tiles beyond 256 pixels, the page shows the part that differs most."""
        image = np.array(tissue(512, 512))
        source = write_svs(tmp_path / "a.svs", image, levels=1)
        changed = image.copy()
        changed[300:330, 400:430] ^= 255
        stream = wsicodec.encode(changed, codec="lossless")
        found = LevelMap(
            1,
            1,
            np.full((1, 1), len(stream), np.uint32),
            np.full((1, 1), psnr(image, changed), np.float32),
            np.full((1, 1), ssim(image, changed), np.float32),
            np.zeros((1, 1), np.uint8),
            np.full((1, 1), PLAIN_STREAM, np.uint8),
        )
        target = tmp_path / "b.ome.tiff"
        with target.open("wb+") as file:
            write_slide(
                file,
                [CodedLevel(512, 512, 512, [stream])],
                "lossless",
                SlideMetadata("b"),
                FileRecord("0.1.0", "lossless", None),
                passport=Passport((found,)).pack(),
            )
        (picture,) = collect(target, source).pictures
        assert picture.ours is not None
        assert picture.source is not None
        assert picture.ours.shape == (256, 256, 3)
        assert picture.top <= 300
        assert picture.left <= 400
        whole = (changed != image).sum()
        assert (picture.ours != picture.source).sum() == whole > 0


class TestPage:
    def test_says_what_is_so(self, page: str, findings: Findings) -> None:
        reader = check_page(page)
        for part in (
            "a.ome.tiff",
            f"Quality floor missed by {findings.below_floor} tiles",
            "SSIM ≥ 0.97",
            "The 10 worst tiles",
            "its SHA-256 is the same",
            find_model("he-fast").digest,
            findings.source.sha256 if findings.source else "",
            "skimage.metrics.structural_similarity",
            "learned quality 70",
            "tissue found by otsu, background #F1EEF0",
            "preset = diagnostic",
            "Difference × 4",
        ):
            assert part in reader.text, part
        quality = findings.overall
        assert quality is not None
        for value in (quality.ssim_mean, quality.ssim_p01, quality.ssim_worst):
            assert f"{value:.4f}" in reader.text
        for tile in findings.worst.tiles if findings.worst else ():
            assert f"SSIM {tile.ssim:.4f}" in reader.text

    def test_pictures_are_whole(self, page: str) -> None:
        shapes = [image.shape for image in data_images(page)]
        # the overview; four maps of two levels; ten tiles, three pictures each
        assert len(shapes) == 1 + 2 * 4 + 30
        assert (6, 8, 3) in shapes
        assert (3, 4, 3) in shapes

    def test_policy_and_title(self, page: str) -> None:
        reader = Reader(page)
        policies = [
            attributes["content"]
            for tag, attributes in reader.elements
            if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        assert "Quality of a.ome.tiff" in reader.text

    def test_no_name_of_the_source(self, page: str, svs: Path) -> None:
        """A report goes from hand to hand; names of slides tell of patients."""
        assert "a.svs" not in page
        assert str(svs.parent) not in page
        assert "User = " not in page

    def test_floor_held(self, small: Path, tmp_path: Path) -> None:
        path = coded_slide(
            small, tmp_path / "f.ome.tiff", floor=FloorRecord(ssim=0.5, psnr=10.0), averaged=0
        )
        text = check_page(draw(collect(path))).text
        assert "Quality floor held by every tile" in text
        assert "SSIM ≥ 0.5 and PSNR ≥ 10 dB" in text
        assert "all 6 tiles" in text
        assert "--against SOURCE" in text

    @pytest.mark.parametrize("floor", [None, FloorRecord(ssim=0.5)])
    def test_tiles_below_a_floor_are_counted_where_one_is_set(
        self, floor: FloorRecord | None, small: Path, tmp_path: Path
    ) -> None:
        """No tile misses a floor that nobody set, and none holds it either."""
        path = coded_slide(small, tmp_path / "n.ome.tiff", averaged=0, floor=floor)
        page = draw(collect(path))
        text = check_page(page).text
        assert ("No quality floor was set" in text) == (floor is None)
        table = page[page.index("<table>") : page.index("</table>")]
        assert re.findall("<td>([^<]*)</td></tr>", table) == ["–" if floor is None else "0"]

    def test_tiles_that_are_coded_alike_need_no_map(self, small: Path, tmp_path: Path) -> None:
        found = collect(coded_slide(small, tmp_path / "u.ome.tiff", averaged=0))
        assert found.passport is not None
        assert len(np.unique(found.passport.levels[0].mode)) == 1
        page = draw(found)
        assert 'alt="Mode by tile"' not in page
        assert "learned 100.0 %" in check_page(page).text

    def test_by_psnr_and_deidentified(self, small: Path, tmp_path: Path) -> None:
        path = coded_slide(
            small,
            tmp_path / "g.ome.tiff",
            averaged=0,
            floor=FloorRecord(psnr=31.0),
            source=None,
            deidentified=True,
        )
        found = collect(path, small)
        assert found.worst is not None
        assert found.worst.by == "PSNR"
        values = [tile.psnr for tile in found.worst.tiles]
        assert values == sorted(values)
        text = check_page(draw(found)).text
        assert "not named: the file was de-identified" in text
        assert "The file names no source" in text

    def test_lossless(self, small: Path, tmp_path: Path) -> None:
        path = coded_slide(small, tmp_path / "h.ome.tiff", codec="lossless", averaged=0)
        text = check_page(draw(collect(path, small))).text
        assert "exact" in text
        assert "Every measured tile is identical to its source" in text

    @pytest.mark.parametrize("codec", ["jpeg", "jpegxl", "webp"])
    def test_other_codecs(self, codec: str, small: Path, tmp_path: Path) -> None:
        path = coded_slide(small, tmp_path / f"{codec}.ome.tiff", codec=codec, averaged=0)
        text = check_page(draw(collect(path))).text
        assert "stream of the file's codec 100.0 %" in text

    def test_page_without_a_passport(self, bare: Path) -> None:
        text = check_page(draw(collect(bare))).text
        assert "The file has no quality passport" in text
        assert "--against SOURCE --measure" in text
        assert "Bits per pixel" in text

    HOSTILE = (
        '"><script>alert(1)</script>',
        "</title><img src=x onerror=alert(1)>",
        "</style><svg onload=alert(1)>",
        "'; background:url(https://evil.example/x)",
        "<!-- --> <!DOCTYPE x> &lt;b&gt; &#60;script&#62; ]]>",
        "javascript:alert(1)",
        "\u202e\x00\x1b[2J\ud800 <b>",
    )

    def test_hostile_strings_do_nothing(self, small: Path, tmp_path: Path) -> None:
        """Whatever a file says of itself becomes text, in the page and in the terminal."""
        evil = " ".join(self.HOSTILE)
        name = "<img src=x onerror=alert(1)>&amp;.ome.tiff"
        path = coded_slide(
            small,
            tmp_path / name,
            codec="jpeg",
            averaged=0,
            wsicodec=evil.encode("ascii", "ignore").decode(),
            models=tuple(ModelId(bad, bad) for bad in self.HOSTILE),
            history=(*self.HOSTILE, "x" * 10**6),
            levels=(evil,),
            options={bad: bad for bad in self.HOSTILE},
            settings={bad: {bad: [bad]} for bad in self.HOSTILE} | {str(n): n for n in range(5000)},
            metrics={bad: {bad: bad} for bad in self.HOSTILE} | {"x": evil},
            source=SourceIdentity(evil, 1, evil, evil),
            glass=GlassRecord(evil, evil, (1, 2, 3), 1e300),
            fallbacks=dict.fromkeys(self.HOSTILE, 2**62),
        )
        found = collect(path)
        page = draw(found)
        reader = Reader(page)
        assert reader.faults == []
        plain = coded_slide(small, tmp_path / "plain.ome.tiff", codec="jpeg", averaged=0)
        expected = Reader(draw(collect(plain)))
        # hostile strings bring text, and list items for themselves; no new kind of anything
        assert {tag for tag, _ in reader.elements} == {tag for tag, _ in expected.elements}
        assert {key for _, a in reader.elements for key in a} == {
            key for _, a in expected.elements for key in a
        }
        images = [a for tag, a in reader.elements if tag == "img"]
        assert all((a["src"] or "").startswith("data:image/") for a in images)
        assert "alert(1)" in reader.text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff\u202e]", page)
        assert len(page.encode()) < MAX_PAGE_BYTES
        lines = info_text(path)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff\u202e]", lines)
        assert lines.count("\n") < 80

    def test_large_slide(self, findings: Findings) -> None:
        """100,000 x 100,000 pixels: 153,000 tiles of noise, the hardest maps there are."""
        large = enlarged(findings, 100_000)
        tracemalloc.start()
        started = time.perf_counter()
        page = draw(large)
        seconds = time.perf_counter() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        check_page(page)
        shapes = [image.shape for image in data_images(page)]
        assert (391, 391, 3) in shapes
        assert peak < 100 * 2**20
        assert seconds < 60

    def test_larger_than_the_maps(self, findings: Findings) -> None:
        """A slide of 250,000 pixels a side, and pictures that do not compress."""
        noise = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
        large = enlarged(findings, 250_000)
        large = dataclasses.replace(
            large,
            pictures=tuple(
                dataclasses.replace(p, ours=noise, source=noise) for p in large.pictures
            ),
        )
        page = draw(large)
        check_page(page)
        assert max(max(image.shape) for image in data_images(page)) <= 1000
        assert "The brightest of 3 × 3 tiles" in Reader(page).text


def enlarged(findings: Findings, side: int) -> Findings:
    """The same report with a slide of ``side`` pixels and maps of noise."""
    rng = np.random.default_rng(0)
    levels, level_maps = [], []
    for index, factor in enumerate((1, 4, 16)):
        size = side // factor
        level = Level(index, size, size, float(factor), 256, 256)
        shape = (level.rows, level.columns)
        level_maps.append(
            LevelMap(
                *shape,
                bytes=rng.integers(0, 40_000, shape, np.uint32),
                psnr=rng.uniform(25, 50, shape).astype(np.float32),
                ssim=rng.uniform(0.9, 1, shape).astype(np.float32),
                quality=rng.integers(1, 100, shape).astype(np.uint8),
                mode=rng.choice(np.array([*Mode], np.uint8), shape),
            )
        )
        levels.append(level)
    cells = np.kron(rng.random((60, 60)) < 0.5, np.ones((50, 50), np.bool_)).astype(np.bool_)
    passport = Passport(tuple(level_maps), TissueMask(cells, 64, "network", (240, 240, 240)))
    info = dataclasses.replace(findings.info, levels=tuple(levels))
    rows = [
        dataclasses.replace(findings.levels[0], level=level, quality=summarise_level(found, FLOOR))
        for level, found in zip(levels, level_maps, strict=True)
    ]
    return dataclasses.replace(
        findings,
        info=info,
        levels=tuple(rows),
        passport=passport,
        worst=worst_tiles(info, passport),
    )


def command(module: Any, *arguments: str) -> int:
    """Run one command as the command line does."""
    parser = argparse.ArgumentParser()
    module.add(parser.add_subparsers())
    parsed = parser.parse_args(arguments)
    return int(parsed.run(parsed))


def info_text(path: Path) -> str:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command(info_command, "info", str(path)) == 0
    return out.getvalue()


class TestCommands:
    def test_report(
        self, slide: Path, svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "report.html"
        arguments = ["report", str(slide), "--html", str(target)]
        assert command(report_command, *arguments) == 0
        assert capsys.readouterr().out.startswith(str(target))
        check_page(target.read_text("utf-8"))
        with pytest.raises(SlideError, match="--overwrite"):
            command(report_command, *arguments)
        more = ["--against", str(svs), "--measure", "--overwrite", "--json", "--jobs", "2"]
        assert command(report_command, *arguments, *more) == 0
        value = json.loads(capsys.readouterr().out)
        assert value["basis"] == "measured"
        assert value["html_bytes"] == target.stat().st_size
        assert value["source"]["is_the_recorded_one"] is True
        assert len(value["worst"]) == 10
        nothing_left(tmp_path, "report.html")

    def test_wrong_targets(self, slide: Path, svs: Path, tmp_path: Path) -> None:
        before = slide.read_bytes()
        for target, error in (
            (tmp_path, SettingsError),
            (tmp_path / "none" / "a.html", SlideError),
            (slide, SettingsError),
            (svs, SettingsError),
        ):
            arguments = ["--html", str(target), "--against", str(svs), "--overwrite"]
            with pytest.raises(error):
                command(report_command, "report", str(slide), *arguments)
        assert slide.read_bytes() == before

    def test_nothing_is_left_of_a_failure(self, tmp_path: Path) -> None:
        with pytest.raises(SlideError):
            command(
                report_command, "report", str(tmp_path / "no.tiff"), "--html", str(tmp_path / "a")
            )
        nothing_left(tmp_path)

    def test_info_for_people(self, slide: Path, findings: Findings) -> None:
        text = info_text(slide)
        source = findings.info.record.source if findings.info.record else None
        assert source is not None
        for part in (
            "900 x 700",
            "coded by wsicodec",
            find_model("he-fast").digest,
            source.sha256,
            "glass: drop; tissue 76.9 % of the area by otsu; background #F1EEF0",
            f"floor: SSIM 0.97; {findings.below_floor} of {findings.measured_tiles} measured",
            "preset=diagnostic",
            "quality passport: 60 tiles; ",
            "shared glass",
            "worst tiles by SSIM",
            "below the floor",
        ):
            assert part in text, part
        quality = findings.overall
        assert quality is not None
        assert f"{quality.ssim_mean:.4f}" in text

    def test_info_for_machines(self, slide: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command(info_command, "info", str(slide), "--json") == 0
        value = json.loads(capsys.readouterr().out)
        assert value["passport"]["present"]
        assert value["passport"]["mask"]["cell"] == 16
        assert sum(value["passport"]["modes"].values()) == 60
        assert value["level_figures"][0]["quality"]["measured"] > 0
        assert value["record"]["source"]["format"] == "svs"
        assert len(value["passport"]["worst"]) == 10

    def test_info_decodes_nothing(self, slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(*_: object, **__: object) -> None:
            raise AssertionError("a tile was decoded")

        monkeypatch.setattr("wsicodec.slide.pages.Page.decode", refused)
        monkeypatch.setattr("wsicodec.slide.pages.Page.read", refused)
        assert "quality passport: 60 tiles" in info_text(slide)

    def test_info_stays_light(self) -> None:
        """Nothing that decodes is loaded to say what a file is."""
        code = (
            "import sys; from wsicodec.cli import main; main(['info', sys.argv[1]]);"
            "heavy = {'numba', 'onnxruntime', 'scipy', 'zarr', 'rich'} & set(sys.modules);"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code, str(CMU)], check=True, stdout=subprocess.PIPE)

    def test_info_without_record_or_passport(self, bare: Path) -> None:
        assert "quality passport: the file has no quality passport" in info_text(bare)
        text = info_text(CMU)
        assert "quality passport" not in text
        assert "1.550" in text  # bits per pixel

    def test_info_of_real_slides(self) -> None:
        assert "33005" not in info_text(data_slide("tcga-cr-7395-01a-01-ts1.svs"))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
class TestBrowser:
    """The page in a real browser: it loads nothing, complains of nothing, shows everything."""

    def run(self, tmp_path: Path, page: str, *flags: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "page.html"
        file.write_text(page, "utf-8")
        assert CHROMIUM is not None
        return subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--window-size=1280,1600",
                *flags,
                file.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    def test_loads_all_of_it(self, page: str, tmp_path: Path) -> None:
        """A script, added and allowed here alone, asks the browser what it made of the page."""
        probe = """<script>addEventListener('load', () => {
          const images = [...document.images];
          document.documentElement.setAttribute('data-probe', JSON.stringify({
            images: images.length,
            broken: images.filter(i => !i.complete || !i.naturalWidth).length,
            loaded: performance.getEntriesByType('resource').filter(
              r => !r.name.startsWith('data:')).length,
            wide: document.documentElement.scrollWidth > innerWidth,
            maps: [...document.querySelectorAll('.slide')].map(
              e => e.getBoundingClientRect().height).filter(h => h > 50).length,
            outlines: [...document.querySelectorAll('.slide use')].map(
              e => e.getBoundingClientRect().width).filter(w => w > 50).length,
          }));
        });</script></body>"""
        changed = page.replace("style-src", "script-src 'unsafe-inline'; style-src")
        changed = changed.replace("</body>", probe)
        result = self.run(tmp_path, changed, "--dump-dom")
        found = re.search(r'data-probe="([^"]*)"', result.stdout)
        assert found, result.stderr
        probed = json.loads(found[1].replace("&quot;", '"'))
        assert probed["images"] == 1 + 8 + 30
        assert probed["broken"] == 0
        assert probed["loaded"] == 0
        assert not probed["wide"]
        assert probed["maps"] == probed["outlines"] == 1 + 4 + 4
        assert "Content Security Policy" not in result.stderr
        assert "CONSOLE" not in result.stderr

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_follows_the_theme(self, dark: bool, page: str, tmp_path: Path) -> None:
        shot = tmp_path / "shot.png"
        scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
        self.run(tmp_path, page, f"--screenshot={shot}", "--hide-scrollbars", scheme)
        image = imagecodecs.png_decode(shot.read_bytes())[..., :3]
        assert image.shape[:2] == (1600, 1280)
        corner = image[2, 2].astype(int)
        assert (corner.max() < 40) if dark else (corner.min() > 240)
        # ink on paper, and a picture: many colours
        packed = image.astype(np.uint32) @ np.array([1, 256, 65536], np.uint32)
        assert len(np.unique(packed)) > 2000

    def test_prints(self, page: str, tmp_path: Path) -> None:
        paper = tmp_path / "page.pdf"
        self.run(tmp_path, page, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
        data = paper.read_bytes()
        assert data.startswith(b"%PDF")
        pages = len(re.findall(rb"/Type\s*/Page\b", data))
        assert 3 <= pages <= 12

    def test_hostile_names_run_nothing(self, small: Path, tmp_path: Path) -> None:
        """Even with scripts allowed, no string of the file becomes one."""
        bad = "</dd><script>document.title='broken'</script><img src=x onerror=document.title='b'>"
        path = coded_slide(
            small,
            tmp_path / "e.ome.tiff",
            codec="jpeg",
            averaged=0,
            history=(bad,),
            settings={bad: bad},
            models=(ModelId(bad, bad),),
        )
        page = draw(collect(path)).replace("default-src 'none'", "default-src * 'unsafe-inline'")
        result = self.run(tmp_path, page, "--dump-dom")
        assert "<title>Quality of e.ome.tiff</title>" in result.stdout
        assert "<script" not in result.stdout
