"""Whole conversions: pixels, metadata, levels; and that failures leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
    ROOT,
    data_slide,
    halved,
    nothing_left,
    tissue,
    write_svs,
)

import wsicodec
from wsicodec import metrics
from wsicodec.cli import main
from wsicodec.cli.common import print_report
from wsicodec.convert import (
    ConvertProgress,
    ConvertSettings,
    convert,
    export,
    make_plan,
    verify,
)
from wsicodec.convert.blocks import area_average
from wsicodec.convert.ordered import in_order
from wsicodec.convert.work import work_folder
from wsicodec.errors import (
    RuntimeMissingError,
    SettingsError,
    SlideError,
    UnknownModelError,
    UnsupportedError,
    VerifyError,
    WsicodecError,
)
from wsicodec.models import find_model
from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG
from wsicodec.slide import placing
from wsicodec.slide.opening import open_slide
from wsicodec.slide.passport import LevelMap

LOSSLESS = {"codec": "learned", "options": {"lossless": True}}  # our tiles, needs no model


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two levels, tiles of 240, edges that no tile size divides."""
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", tissue(333, 450))


class TestPixels:
    @pytest.mark.parametrize("tile_size", [16, 112, 256, 512])
    def test_every_level_and_tile_size(self, svs: Path, tmp_path: Path, tile_size: int) -> None:
        image = tissue(333, 450)
        target = tmp_path / "a.ome.tiff"
        report = convert(svs, target, ConvertSettings(**LOSSLESS, tile_size=tile_size))
        with tifffile.TiffFile(target) as file:
            levels = file.series[0].levels
            assert len(levels) == 2
            assert levels[0].keyframe.tile == (tile_size, tile_size)
            np.testing.assert_array_equal(levels[0].asarray(), image)
            np.testing.assert_array_equal(levels[1].asarray(), image[::4, ::4])
        rows, columns = -(-333 // tile_size), -(-450 // tile_size)
        assert report.levels[0].tiles == rows * columns
        nothing_left(tmp_path, "a.ome.tiff")

    def test_padding_repeats_the_edge(self, svs: Path, tmp_path: Path) -> None:
        """Black padding would cost bits and bleed into the last pixels."""
        target = tmp_path / "a.ome.tiff"
        convert(svs, target, ConvertSettings(**LOSSLESS, tile_size=256))
        with open_slide(target) as slide:
            tile = wsicodec.decode(slide.tile_bytes(0, 1, 1))
        assert tile.shape == (256, 256, 3)
        image = tissue(333, 450)
        np.testing.assert_array_equal(tile[77:, :194], np.tile(image[332, 256:], (179, 1, 1)))
        np.testing.assert_array_equal(tile[:77, 194:], np.tile(image[256:, 449:], (1, 62, 1)))

    @pytest.mark.parametrize(
        ("codec", "tag"),
        [
            ("learned", TIFF_COMPRESSION_TAG),
            ("jpeg", 7),
            ("jpeg2000", 33005),
            ("jpegxl", 50002),
            ("webp", 50001),
        ],
    )
    def test_lossy_codecs_are_close(self, svs: Path, tmp_path: Path, codec: str, tag: int) -> None:
        target = tmp_path / "a.ome.tiff"
        settings = ConvertSettings(codec=codec, quality=90, measure="all")
        report = convert(svs, target, settings)
        decoded = tifffile.imread(target).astype(int)
        with tifffile.TiffFile(target) as file:
            assert int(file.pages[0].compression) == tag
        image = tissue(333, 450)
        # a swapped or unconverted colour space moves channel means by tens of levels
        assert np.abs(decoded.mean((0, 1)) - image.mean((0, 1))).max() < 2
        assert report.quality is not None
        assert report.quality.psnr_mean > 25

    @pytest.mark.parametrize(
        ("tile_size", "block_size"),
        [(16, 16), (16, 32), (16, 64), (16, 2048), (48, 100), (256, 2048), (256, 256)],
    )
    def test_averaged_levels(
        self, svs: Path, tmp_path: Path, tile_size: int, block_size: int
    ) -> None:
        """From original pixels, each level the area average of the one before, in one pass or in
        several."""
        target = tmp_path / "a.ome.tiff"
        settings = ConvertSettings(**LOSSLESS, tile_size=tile_size, levels=4, block_size=block_size)
        convert(svs, target, settings)
        expected = tissue(333, 450)
        with tifffile.TiffFile(target) as file:
            shapes = [level.shape[:2] for level in file.series[0].levels]
            assert shapes == [(333, 450), (167, 225), (84, 113), (42, 57)]
            for level in file.series[0].levels:
                np.testing.assert_array_equal(level.asarray(), expected)
                expected = halved(expected)
        nothing_left(tmp_path, "a.ome.tiff")

    def test_averaged_levels_take_nothing_from_coded_pixels(
        self, svs: Path, tmp_path: Path
    ) -> None:
        report = convert(
            svs,
            tmp_path / "a.ome.tiff",
            ConvertSettings(codec="jpeg", quality=1, levels=2, measure="all"),
        )
        level = tifffile.imread(tmp_path / "a.ome.tiff", level=1)
        expected = halved(tissue(333, 450))
        assert report.levels[1].quality is not None
        tiles = [
            metrics.psnr(expected[y : y + 256, x : x + 256], level[y : y + 256, x : x + 256])
            for y in range(0, 167, 256)
            for x in range(0, 225, 256)
        ]
        assert report.levels[1].quality.psnr_mean == pytest.approx(np.mean(tiles))

    @pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 3), (5, 8), (8, 5)])
    def test_area_average(self, shape: tuple[int, int]) -> None:
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        np.testing.assert_array_equal(area_average(image), halved(image))

    def test_jobs_make_no_difference(self, svs: Path, tmp_path: Path) -> None:
        """One file, byte for byte, whatever the number of threads."""
        files = []
        for jobs in (1, 2, 7):
            # same name: it is in the OME-XML
            folder = tmp_path / str(jobs)
            folder.mkdir()
            convert(svs, folder / "a.ome.tiff", ConvertSettings("jpeg", levels=3, jobs=jobs))
            files.append((folder / "a.ome.tiff").read_bytes())
        assert files[0] == files[1] == files[2]


class TestMetadata:
    def test_is_kept(self, svs: Path, tmp_path: Path) -> None:
        convert(svs, tmp_path / "a.ome.tiff", ConvertSettings(codec="jpeg"))
        with open_slide(tmp_path / "a.ome.tiff") as slide:
            info = slide.info
        assert (info.mpp_x, info.mpp_y, info.magnification) == (0.2527, 0.2527, 40)
        assert info.icc_profile == ICC
        assert info.description == DESCRIPTION
        assert info.history == ("jpeg q70", "jpeg quality 70")
        assert info.record is not None
        assert info.record.metrics == json.loads(json.dumps(metrics.METRIC_ARGUMENTS))

    def test_survives_a_chain(self, svs: Path, tmp_path: Path) -> None:
        """Converted, exported and converted again: what the scanner said is still there."""
        first, second, third = (tmp_path / name for name in ("1.ome.tiff", "2.tif", "3.ome.tiff"))
        convert(svs, first, ConvertSettings(**LOSSLESS))
        export(first, second, ConvertSettings(codec="jpeg", quality=95, layout="flat"))
        convert(second, third, ConvertSettings(codec="jpegxl"))
        with open_slide(third) as slide:
            info = slide.info
        assert info.mpp_x == pytest.approx(0.2527, rel=1e-6)
        assert info.magnification == 40
        assert info.icc_profile == ICC
        assert info.description == DESCRIPTION
        assert info.history == ("jpeg q70", "jpeg quality 95", "jpegxl quality 70")
        assert len(info.levels) == 2

    def test_images_beside_the_pyramid_are_kept(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"
        report = convert(svs, target, ConvertSettings(codec="jpeg"))
        assert (report.associated, report.dropped) == (("thumbnail", "label", "macro"), ())
        with open_slide(svs) as slide, open_slide(target) as written:
            assert written.info.associated == slide.info.associated
            for name in slide.info.associated:
                np.testing.assert_array_equal(
                    written.read_associated(name).pixels, slide.read_associated(name).pixels
                )

    def test_dropped_images_are_reported(self, svs: Path, tmp_path: Path) -> None:
        settings = ConvertSettings(codec="jpeg", associated=False)
        report = convert(svs, tmp_path / "a.ome.tiff", settings)
        assert (report.associated, report.dropped) == ((), ("thumbnail", "label", "macro"))
        with open_slide(tmp_path / "a.ome.tiff") as slide:
            assert slide.info.associated == ()

    def test_learned_file_names_and_carries_its_model(self, svs: Path, tmp_path: Path) -> None:
        model = find_model("he-fast")
        target = tmp_path / "a.ome.tiff"
        report = convert(svs, target, ConvertSettings(embed_model=True, quality=30))
        assert report.model is not None
        with open_slide(target) as slide:
            assert slide.info.record is not None
            (identity,) = slide.info.record.models
            assert (identity.name, identity.sha256) == (model.name, model.digest)
            assert slide.embedded_model() == model.path.read_bytes()
            assert slide.info.compression == "wsicodec"
            probed = wsicodec.probe(slide.tile_bytes(0, 0, 0))
        assert probed.model is not None
        assert model.digest.startswith(probed.model)
        assert report.quality_setting == 30

    def test_lossless_files_need_no_model(self, svs: Path, tmp_path: Path) -> None:
        report = convert(svs, tmp_path / "a.ome.tiff", ConvertSettings(**LOSSLESS))
        assert report.model is None
        assert report.quality_setting is None
        with pytest.raises(UnsupportedError, match="embed"):
            convert(svs, tmp_path / "b.ome.tiff", ConvertSettings(codec="jpeg", embed_model=True))


class TestRealSlides:
    def test_jpeg2000_svs(self, tmp_path: Path) -> None:
        """A J2K slide's own levels, read and written without loss."""
        source = data_slide("tcga-cr-7395-01a-01-ts1.svs")
        with open_slide(source) as slide:
            level = slide.levels[1]
            cropped = tmp_path / "crop.tif"
            tifffile.imwrite(
                cropped,
                slide.read_region(1, 400, 600, 500, 600),
                photometric="rgb",
                tile=(240, 240),
            )
            assert (level.height, level.width) == (1783, 2221)
        target = tmp_path / "a.ome.tiff"
        report = convert(source, target, ConvertSettings(codec="jpeg", tile_size=512))
        assert [level.tiles for level in report.levels] == [7 * 9, 4 * 5]
        with open_slide(source) as slide, open_slide(target) as written:
            assert written.info.icc_profile == slide.info.icc_profile
            assert written.info.description == slide.info.description
            assert written.info.mpp_x is None
            assert [(lv.height, lv.width) for lv in written.levels] == [(3567, 4443), (1783, 2221)]
            for index in (0, 1):
                region = (index, 500, 700, 300, 400)
                difference = written.read_region(*region).astype(int) - slide.read_region(*region)
                assert np.abs(difference.mean((0, 1))).max() < 1

    def test_bundled_slide_at_default_quality(self, tmp_path: Path) -> None:
        report = convert(
            CMU, tmp_path / "a.ome.tiff", ConvertSettings(codec="jpeg", measure="sample")
        )
        assert report.pixels == 2967 * 2220
        assert report.source_bytes == CMU.stat().st_size
        assert report.target_bytes == (tmp_path / "a.ome.tiff").stat().st_size
        assert report.quality is not None
        assert 32 < report.quality.tiles <= 64
        assert report.quality.ssim_mean > 0.95
        assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["codec"] == "jpeg"


def test_report_measures_what_is_in_the_file(svs: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.ome.tiff"
    report = convert(svs, target, ConvertSettings(codec="jpeg", quality=40, measure="all"))
    image, decoded = tissue(333, 450), tifffile.imread(target)
    tiles = [
        metrics.ssim(image[y : y + 256, x : x + 256], decoded[y : y + 256, x : x + 256])
        for y in (0, 256)
        for x in (0, 256)
    ]
    quality = report.levels[0].quality
    assert quality is not None
    assert quality.ssim_mean == pytest.approx(np.mean(tiles), abs=1e-9)
    assert quality.ssim_worst.ssim == pytest.approx(min(tiles), abs=1e-9)
    worst = (quality.ssim_worst.y, quality.ssim_worst.x)
    assert worst == [(0, 0), (0, 256), (256, 0), (256, 256)][int(np.argmin(tiles))]


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "error"),
        [
            ({"codec": "gif"}, SettingsError),
            ({"codec": "avif"}, UnsupportedError),
            ({"quality": 0}, SettingsError),
            ({"quality": 101}, SettingsError),
            ({"quality": 70.0}, SettingsError),
            ({"tile_size": 100}, SettingsError),
            ({"tile_size": 0}, SettingsError),
            ({"tile_size": 8192}, SettingsError),
            ({"tile_size": "256"}, SettingsError),
            ({"levels": 0}, SettingsError),
            ({"levels": "all"}, SettingsError),
            ({"measure": "some"}, SettingsError),
            ({"layout": "cube"}, SettingsError),
            ({"jobs": 0}, SettingsError),
            ({"glass": "melt"}, SettingsError),
            ({"floor_ssim": 1.5}, SettingsError),
            ({"floor_psnr": "40"}, SettingsError),
            ({"codec": "copy", "quality": 50}, SettingsError),
            ({"codec": "copy", "glass": "drop"}, SettingsError),
            ({"codec": "copy", "tile_size": 512}, SettingsError),
            ({"codec": "copy", "embed_model": True}, SettingsError),
            ({"codec": "jpeg", "lossless_transcode": True}, SettingsError),
            ({"cache_bytes": -1}, SettingsError),
        ],
        ids=str,
    )
    def test_are_checked_when_built(
        self, settings: dict[str, Any], error: type[WsicodecError]
    ) -> None:
        with pytest.raises(error):
            ConvertSettings(**settings)

    def test_levels_that_cannot_be_halved(self, svs: Path, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="too many"):
            convert(svs, tmp_path / "a.ome.tiff", ConvertSettings(codec="jpeg", levels=12))
        convert(svs, tmp_path / "b.ome.tiff", ConvertSettings(codec="jpeg", levels=10))
        with tifffile.TiffFile(tmp_path / "b.ome.tiff") as file:
            assert file.series[0].levels[-1].shape == (1, 1, 3)
        nothing_left(tmp_path, "b.ome.tiff")

    def test_wrong_options_show_before_the_work(self, svs: Path, tmp_path: Path) -> None:
        calls: list[ConvertProgress] = []
        for settings, error in (
            (ConvertSettings(codec="jpeg", options={"effort": 3}), SettingsError),
            (ConvertSettings(model="no-such-model"), UnknownModelError),
        ):
            with pytest.raises(error):
                convert(svs, tmp_path / "a.ome.tiff", settings, calls.append)
        assert not calls
        nothing_left(tmp_path)

    @pytest.mark.parametrize("codec", ["jpeg", "copy"])
    def test_what_is_missing_to_describe_the_slide_shows_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "ome_types", None)
        calls: list[ConvertProgress] = []
        with pytest.raises(RuntimeMissingError, match="pip install ome-types"):
            convert(CMU, tmp_path / "a.ome.tiff", ConvertSettings(codec), calls.append)
        assert not calls
        nothing_left(tmp_path)

    @pytest.mark.parametrize(
        "options",
        [
            ["--codec", "jpeg", "--model", "he-fast"],
            ["--codec", "jpeg", "--macro", "blank"],
            ["--codec", "lossless", "--quality", "30"],
            ["--codec", "lossless", "--preset", "archive"],
            ["--codec", "copy", "--quality", "70"],
            ["--codec", "copy", "--preset", "diagnostic"],
            ["--codec", "copy", "--measure", "sample"],
            ["--codec", "copy", "--embed-model"],
            ["--codec", "jpegxl", "--lossless-transcode", "--quality", "70"],
        ],
        ids=" ".join,
    )
    def test_options_that_would_be_ignored_are_refused(
        self, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["convert", str(CMU), str(tmp_path / "a.tiff"), *options]) == 2
        assert "SettingsError: --" in capsys.readouterr().err
        nothing_left(tmp_path)

    def test_plan(self, svs: Path, tmp_path: Path) -> None:
        with open_slide(svs) as slide:
            plan = make_plan(slide.info, tmp_path / "a.tiff", ConvertSettings("jpeg", levels=3))
        assert [level.source for level in plan.levels] == [0, None, None]
        assert plan.tiles == 4 + 1 + 1
        assert plan.pixels == 333 * 450 + 167 * 225 + 84 * 113


class TestTarget:
    def test_is_not_overwritten_unless_asked(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"
        target.write_bytes(b"precious")
        with pytest.raises(SlideError, match="exists"):
            convert(svs, target, ConvertSettings(codec="jpeg"))
        assert target.read_bytes() == b"precious"
        convert(svs, target, ConvertSettings(codec="jpeg", overwrite=True))
        assert tifffile.imread(target).shape == (333, 450, 3)
        nothing_left(tmp_path, "a.ome.tiff")

    @pytest.mark.parametrize("way", ["same", "symlink", "hard link", "detour"])
    def test_is_not_the_source(self, svs: Path, tmp_path: Path, way: str) -> None:
        source = tmp_path / "a.svs"
        source.write_bytes(svs.read_bytes())
        target = {"same": source, "detour": tmp_path / ".." / tmp_path.name / "a.svs"}.get(
            way, tmp_path / "b.svs"
        )
        if way == "symlink":
            target.symlink_to(source)
        elif way == "hard link":
            target.hardlink_to(source)
        with pytest.raises(SlideError, match="source itself"):
            convert(source, target, ConvertSettings(codec="jpeg", overwrite=True))
        assert source.read_bytes() == svs.read_bytes()

    def test_folder_must_be_there(self, svs: Path, tmp_path: Path) -> None:
        with pytest.raises(SlideError, match="does not exist"):
            convert(svs, tmp_path / "no" / "a.tiff", ConvertSettings(codec="jpeg"))
        with pytest.raises(SlideError, match="is a folder"):
            convert(svs, tmp_path, ConvertSettings(codec="jpeg", overwrite=True))

    @pytest.mark.parametrize(
        ("name", "settings", "error", "words"),
        [
            ("a.jpg", {}, SlideError, "name of another format"),
            ("a.zarr", {"layout": "flat"}, SettingsError, "one of TIFF"),
            ("a.zarr", {"codec": "webp"}, UnsupportedError, "webp"),
            ("a.zarr", {"codec": "copy"}, UnsupportedError, "kept in a TIFF"),
            ("precious.zarr", {"overwrite": True}, SlideError, "no Zarr hierarchy"),
        ],
    )
    def test_is_refused_before_the_work(
        self,
        svs: Path,
        tmp_path: Path,
        name: str,
        settings: dict[str, Any],
        error: type[WsicodecError],
        words: str,
    ) -> None:
        (tmp_path / "precious.zarr").write_text("years of work")
        calls: list[ConvertProgress] = []
        with pytest.raises(error, match=words):
            convert(
                svs, tmp_path / name, ConvertSettings(**{"codec": "jpeg", **settings}), calls.append
            )
        assert not calls
        assert (tmp_path / "precious.zarr").read_text() == "years of work"
        nothing_left(tmp_path, "precious.zarr")

    def test_does_not_lie_in_the_source(self, svs: Path, tmp_path: Path) -> None:
        source = tmp_path / "a.zarr"
        convert(svs, source, ConvertSettings("jpeg"))
        before = sorted(source.rglob("*"))
        with pytest.raises(SlideError, match="lies in the source"):
            convert(source, source / "0" / "b.tiff", ConvertSettings("jpeg"))
        assert sorted(source.rglob("*")) == before

    def test_being_written_already(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"

        def again(_: ConvertProgress) -> None:
            with pytest.raises(SlideError, match="being written"):
                convert(svs, target, ConvertSettings(codec="jpeg"))

        convert(svs, target, ConvertSettings(codec="jpeg"), again)
        nothing_left(tmp_path, "a.ome.tiff")

    def test_created_meanwhile(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"

        def intrude(_: ConvertProgress) -> None:
            target.write_bytes(b"someone else's")

        with pytest.raises(SlideError, match="meanwhile"):
            convert(svs, target, ConvertSettings(codec="jpeg"), intrude)
        assert target.read_bytes() == b"someone else's"
        nothing_left(tmp_path, "a.ome.tiff")


def _mount(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    yield from _mount(tmp_path / "small", "size=64k")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that takes nothing, not even from root."""
    yield from _mount(tmp_path / "fixed", "size=64k", "ro")


class TestSpace:
    """Asked for before the work starts."""

    @staticmethod
    def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        usage = shutil._ntuple_diskusage(10**12, 10**12 - count, count)  # type: ignore[attr-defined]
        monkeypatch.setattr("wsicodec.convert.space.shutil.disk_usage", lambda _: usage)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"codec": "lossless"},
            {"codec": "copy"},
            {"codec": "jpegxl", "lossless_transcode": True},
        ],
        ids=str,
    )
    def test_too_little(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
    ) -> None:
        self.free(monkeypatch, 10_000)
        with pytest.raises(SlideError, match=r"a\.tiff: the disk is full.*10,000 bytes") as caught:
            convert(CMU, tmp_path / "a.tiff", ConvertSettings(**settings))
        assert caught.value.errno == errno.ENOSPC
        nothing_left(tmp_path)

    @pytest.mark.filterwarnings("error")
    def test_what_may_fit_is_tried(
        self, svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.free(monkeypatch, svs.stat().st_size // 16)
        assert convert(svs, tmp_path / "a.tiff", ConvertSettings("jpeg")).warnings

    def test_needed_by_others(
        self, svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.free(monkeypatch, 10**9)
        target, settings = tmp_path / "a.tiff", ConvertSettings("jpeg", overwrite=True)
        assert convert(svs, target, settings, reserved=10**8).warnings == ()
        (warning,) = convert(svs, target, settings, reserved=10**9).warnings
        assert "1,000,000,000 of them may be needed by others" in warning
        with pytest.raises(SlideError, match="disk is full"):
            convert(svs, target, settings, reserved=10**15)

    def test_file_systems_that_do_not_tell(
        self, svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        zeros = shutil._ntuple_diskusage(0, 0, 0)  # type: ignore[attr-defined]
        monkeypatch.setattr("wsicodec.convert.space.shutil.disk_usage", lambda _: zeros)
        assert convert(svs, tmp_path / "a.tiff", ConvertSettings("jpeg")).warnings == ()

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("codec", ["jpeg", "copy"])
    def test_maybe_too_little(
        self,
        svs: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        codec: str,
    ) -> None:
        self.free(monkeypatch, svs.stat().st_size - 1)
        report = convert(svs, tmp_path / "a.tiff", ConvertSettings(codec))
        (warning,) = report.warnings
        assert re.search(r"a\.tiff: the disk has .* may be needed", warning)
        assert report.as_dict()["warnings"] == [warning]
        print_report(report)
        assert f"  warning: {warning}\n" in capsys.readouterr().out

    @pytest.mark.filterwarnings("error")
    def test_finished_blocks_have_their_place(
        self, svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "a.tiff"
        self.free(monkeypatch, 0)
        settings = ConvertSettings("jpeg", resume=True)
        with pytest.raises(SlideError, match="disk is full"):
            convert(svs, target, settings)
        work_folder(target).mkdir()
        with (work_folder(target) / "blocks.bin").open("wb") as file:
            file.truncate(10**7)
        convert(svs, target, settings)

    def test_is_there(self, svs: Path, tmp_path: Path) -> None:
        assert convert(svs, tmp_path / "a.tiff", ConvertSettings("jpeg")).warnings == ()


class TestPlacing:
    """What the system refuses is said of the file that it was refused for."""

    def test_errors_of_the_body_are_not_the_target_s(self, tmp_path: Path) -> None:
        target = tmp_path / "a"
        with (
            pytest.raises(FileNotFoundError, match="missing"),
            placing.atomic_file(target, overwrite=False),
        ):
            (tmp_path / "missing").open()
        with (
            pytest.raises(FileNotFoundError, match="missing"),
            placing.atomic_folder(target, overwrite=False),
        ):
            (tmp_path / "missing").open()
        nothing_left(tmp_path)

    def test_writes_of_a_folder_are(self, tmp_path: Path) -> None:
        with (
            pytest.raises(SlideError, match=r"a: cannot be written: No such file"),
            placing.atomic_folder(tmp_path / "a", overwrite=False) as folder,
        ):
            (folder / "b" / "c").write_bytes(b"c")
        nothing_left(tmp_path)

    @pytest.mark.parametrize("array", [False, True])
    def test_writes_of_the_file_are(self, tmp_path: Path, array: bool) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            with (
                pytest.raises(SlideError, match=r"a: cannot be written: .*file of this size") as no,
                placing.atomic_file(tmp_path / "a", overwrite=False) as file,
            ):
                if array:
                    tifffile.imwrite(file, np.zeros((300, 300), np.uint8))
                else:
                    file.write(bytes(90_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert no.value.errno == errno.EFBIG
        nothing_left(tmp_path)


KILLED = """
import os, sys
from pathlib import Path
from wsicodec.slide import placing
_, target, moment, overwrite = sys.argv
rename = Path.rename

def kill(self, to):
    if moment == "between" and Path(to) == Path(target):
        os._exit(9)
    rename(self, to)
    if moment == "after" and Path(to) == Path(target):
        os._exit(9)

def kill_removing(folder, **_):
    if Path(folder).name.endswith(".gone"):
        next(Path(folder).iterdir()).unlink()
        os._exit(9)

Path.rename = kill
if moment == "removing":
    placing.shutil.rmtree = kill_removing
with placing.atomic_folder(Path(target), overwrite=overwrite == "1") as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
"""


class TestKilledWhileReplacing:
    """The folder that is replaced is set aside for a moment: it must not be lost there."""

    def killed(self, target: Path, moment: str, *, overwrite: bool = True) -> None:
        if not target.exists():
            target.mkdir()
            for name in ("a", "b"):
                (target / name).write_text("old")
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(target), moment, str(int(overwrite))],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 9

    def test_between_the_renames(self, tmp_path: Path) -> None:
        target = tmp_path / "a.zarr"
        self.killed(target, "between")
        assert not target.exists()
        assert placing.put_back(target)
        assert {path.read_text() for path in target.iterdir()} == {"old"}
        assert not placing.put_back(target)
        for part in tmp_path.glob(".a.zarr.*.part"):
            shutil.rmtree(part)
        nothing_left(tmp_path, "a.zarr")

    def test_between_the_renames_and_written_again(self, tmp_path: Path) -> None:
        target = tmp_path / "a.zarr"
        self.killed(target, "between")
        with (
            pytest.raises(SlideError, match=r"set aside .* is back"),
            placing.atomic_folder(target, overwrite=False),
        ):
            pass
        assert (target / "a").read_text() == "old"
        with placing.atomic_folder(target, overwrite=True) as folder:
            (folder / "a").write_text("newest")
        assert [path.name for path in target.iterdir()] == ["a"]
        assert not list(tmp_path.glob(".*.old"))

    @pytest.mark.parametrize("moment", ["after", "removing"])
    def test_after_the_renames(self, tmp_path: Path, moment: str) -> None:
        target = tmp_path / "a.zarr"
        self.killed(target, moment)
        assert not placing.put_back(target)
        assert {path.read_text() for path in target.iterdir()} == {"new"}
        # in a target that somebody else put there, something may be missing
        assert bool(list(tmp_path.glob(".*.old"))) is (moment == "after")
        with placing.atomic_folder(target, overwrite=True):
            pass
        nothing_left(tmp_path, "a.zarr")

    def test_by_a_process_of_the_same_number(self, tmp_path: Path) -> None:
        target = tmp_path / "a.zarr"
        for path in (target, tmp_path / f".a.zarr.{os.getpid()}.old"):
            path.mkdir()
            (path / "a").write_text("old")
        with placing.atomic_folder(target, overwrite=True) as folder:
            (folder / "b").write_text("new")
        assert [path.name for path in target.iterdir()] == ["b"]
        nothing_left(tmp_path, "a.zarr")

    def test_what_was_being_removed_is_never_put_back(self, tmp_path: Path) -> None:
        """It has lost files already."""
        target = tmp_path / "a.zarr"
        self.killed(target, "removing")
        shutil.rmtree(target)
        assert not placing.put_back(target)
        nothing_left(tmp_path)

    def test_the_latest_of_several(self, tmp_path: Path) -> None:
        target = tmp_path / "a.zarr"
        self.killed(target, "between")
        (tmp_path / ".a.zarr.1.old").mkdir()
        time.sleep(0.05)
        (kept,) = (path for path in tmp_path.glob(".*.old") if path.name != ".a.zarr.1.old")
        kept.rename(tmp_path / ".a.zarr.2.old")
        assert placing.put_back(target)
        assert (target / "a").read_text() == "old"
        assert (tmp_path / ".a.zarr.1.old").is_dir()

    def test_names_of_others(self, tmp_path: Path) -> None:
        others = [
            ".b.zarr.1.old",
            ".a.zarr.x.old",
            ".a.zarr.old",
            "a.zarr.1.old",
            ".a.zarr.1.older",
        ]
        for name in others:
            (tmp_path / name).mkdir()
        (tmp_path / ".a.zarr.7.old").write_text("no folder")
        assert not placing.put_back(tmp_path / "a.zarr")
        (tmp_path / "a.zarr").mkdir()
        assert not placing.put_back(tmp_path / "a.zarr")
        nothing_left(tmp_path, "a.zarr", ".a.zarr.7.old", *others)

    def test_converted_again(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.zarr"
        convert(svs, target, ConvertSettings("jpeg", levels=1))
        before = sorted(path.relative_to(target) for path in target.rglob("*"))
        target.rename(tmp_path / ".a.zarr.123.old")
        calls: list[ConvertProgress] = []
        with pytest.raises(SlideError, match=r"a\.zarr: .*set aside .* is back"):
            convert(svs, target, ConvertSettings("jpeg"), calls.append)
        assert not calls
        assert sorted(path.relative_to(target) for path in target.rglob("*")) == before
        target.rename(tmp_path / ".a.zarr.123.old")
        report = convert(svs, target, ConvertSettings("jpeg", levels=2, overwrite=True))
        assert any("is back" in text for text in report.warnings)
        with open_slide(target) as slide:
            assert len(slide.levels) == 2
        nothing_left(tmp_path, "a.zarr")


class TestFailuresLeaveNothing:
    def test_full_disk(self, svs: Path, small_disk: Path) -> None:
        with pytest.raises(SlideError, match=r"a\.ome\.tiff.*disk is full"):
            convert(svs, small_disk / "a.ome.tiff", ConvertSettings(**LOSSLESS))
        nothing_left(small_disk)

    def test_full_disk_while_averaged_levels_wait(
        self, svs: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(SlideError, match="disk is full"):
            convert(svs, small_disk / "a.tiff", ConvertSettings(**LOSSLESS, tile_size=16, levels=4))
        nothing_left(small_disk)

    @pytest.mark.parametrize("after", [0, 1000, 100_000, 250_000])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_writes_that_fail(
        self,
        svs: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        after: int,
        number: int,
    ) -> None:
        """A disk that fills up at any point, made without one."""

        class Disk:
            def __init__(self, file: Any) -> None:
                self._file = file

            def write(self, data: Any) -> int:
                if self._file.tell() + len(data) > after:
                    raise OSError(number, os.strerror(number))
                return int(self._file.write(data))

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

        class LimitedPath(type(tmp_path)):  # type: ignore[misc]
            def open(self, mode: str = "r", *rest: Any, **more: Any) -> Any:
                file = super().open(mode, *rest, **more)
                return Disk(file) if "x" in mode else file

        folder = tmp_path / "out"
        folder.mkdir()
        original = placing.atomic_file
        monkeypatch.setattr(
            "wsicodec.convert.pipeline.atomic_file",
            lambda target, overwrite, part: original(
                LimitedPath(target), overwrite=overwrite, part=LimitedPath(part)
            ),
        )
        with pytest.raises(SlideError, match="cannot be written") as caught:
            convert(svs, folder / "a.ome.tiff", ConvertSettings(**LOSSLESS))
        assert "a.ome.tiff" in str(caught.value)
        nothing_left(folder)

    def test_unwritable_folder(self, svs: Path, read_only_disk: Path) -> None:
        with pytest.raises(SlideError, match=r"not writable|read-only"):
            convert(svs, read_only_disk / "a.ome.tiff", ConvertSettings(codec="jpeg"))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_folder_without_permission(self, svs: Path, tmp_path: Path) -> None:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
        with pytest.raises(SlideError, match="not writable"):
            convert(svs, folder / "a.ome.tiff", ConvertSettings(codec="jpeg"))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
    @pytest.mark.parametrize("levels", ["source", 3])
    def test_interrupted_anywhere(
        self, svs: Path, tmp_path: Path, error: type[BaseException], levels: str | int
    ) -> None:
        target = tmp_path / "a.ome.tiff"
        target.write_bytes(b"the former file")

        def stop_at(tile: int) -> Callable[[ConvertProgress], None]:
            def stop(progress: ConvertProgress) -> None:
                assert work_folder(target).is_dir()
                if progress.tiles_done >= tile:
                    raise error

            return stop

        for tile in (1, 4, 9):
            settings = ConvertSettings(
                "jpeg", tile_size=128, levels=levels, overwrite=True, block_size=128
            )
            with pytest.raises(error):
                convert(svs, target, settings, stop_at(tile))
            assert target.read_bytes() == b"the former file"
            nothing_left(tmp_path, "a.ome.tiff")
        assert not [t for t in threading.enumerate() if t.name.startswith("wsicodec")]

    def test_damaged_source(self, tmp_path: Path) -> None:
        content = bytearray(CMU.read_bytes())
        with tifffile.TiffFile(CMU) as file:
            start = file.pages[0].dataoffsets[100]
        content[start : start + 300] = bytes(300)
        (tmp_path / "a.svs").write_bytes(content)
        with pytest.raises(SlideError, match="level 0: tile at row 10, column 0"):
            convert(tmp_path / "a.svs", tmp_path / "a.ome.tiff", ConvertSettings(codec="jpeg"))
        nothing_left(tmp_path, "a.svs")

    @pytest.mark.parametrize("content", [b"", b"text", b"II*\0", b"\x89PNG\r\n\x1a\n"])
    def test_no_slide(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.svs").write_bytes(content)
        with pytest.raises(SlideError, match=r"a\.svs"):
            convert(tmp_path / "a.svs", tmp_path / "a.ome.tiff", ConvertSettings(codec="jpeg"))
        nothing_left(tmp_path, "a.svs")

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
    )
    def test_signals(self, tmp_path: Path, number: int, code: int) -> None:
        """A real process, stopped in the middle of the slowest codec."""
        command = [sys.executable, "-m", "wsicodec.cli", "convert", str(CMU), "a.ome.tiff"]
        process = subprocess.Popen(
            [*command, "--codec", "lossless", "--option", "effort=9"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            # background jobs of a shell inherit an ignored SIGINT
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not any(tmp_path.iterdir()):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in errors
        nothing_left(tmp_path)


class TestVerify:
    @pytest.fixture
    def converted(self, svs: Path, tmp_path: Path) -> Path:
        convert(svs, tmp_path / "a.ome.tiff", ConvertSettings(**LOSSLESS, tile_size=128))
        return tmp_path / "a.ome.tiff"

    def test_whole_file(self, svs: Path, converted: Path) -> None:
        calls: list[tuple[int, int]] = []
        report = verify(converted, svs, progress=lambda *done: calls.append(done))
        assert report.ok
        assert report.tiles == 3 * 4 + 1
        assert calls[-1] == (13, 13)
        assert set(report.quality) == {0, 1}
        assert report.quality[0].psnr_mean == metrics.PSNR_OF_EQUAL
        assert report.overall is not None
        assert report.overall.ssim_worst.ssim == pytest.approx(1)
        report.raise_if_failed()
        json.dumps(report.as_dict(), allow_nan=False)

    def test_any_changed_byte_is_found(self, converted: Path) -> None:
        original = converted.read_bytes()
        with tifffile.TiffFile(converted) as file:
            page = file.series[0].levels[0].keyframe
            start, count = page.dataoffsets[5], page.databytecounts[5]
        for position in np.linspace(0, count - 1, 12).astype(int):
            broken = bytearray(original)
            broken[start + position] ^= 0x10
            converted.write_bytes(broken)
            report = verify(converted)
            assert (report.failed, report.ok) == (1, False)
            (failure,) = report.failures
            assert (failure.level, failure.row, failure.column) == (0, 1, 1)
            assert str(converted) in failure.reason
            with pytest.raises(VerifyError, match="1 of 13 tiles"):
                report.raise_if_failed()

    @pytest.mark.parametrize("codec", ["jpeg", "jpeg2000", "jpegxl"])
    def test_standard_codecs_that_end_early(self, svs: Path, tmp_path: Path, codec: str) -> None:
        target = tmp_path / "a.ome.tiff"
        convert(svs, target, ConvertSettings(codec=codec))
        with tifffile.TiffFile(target) as file:
            page = file.series[0].levels[0].keyframe
            start, count = page.dataoffsets[2], page.databytecounts[2]
        broken = bytearray(target.read_bytes())
        broken[start + count // 2 : start + count] = bytes(count - count // 2)
        target.write_bytes(broken)
        report = verify(target)
        assert report.failed == 1
        assert (report.failures[0].row, report.failures[0].column) == (1, 0)

    def test_against_a_lossy_copy(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"
        made = convert(svs, target, ConvertSettings(codec="jpeg", quality=30, measure="all"))
        report = verify(target, svs)
        assert report.overall is not None
        assert made.quality is not None
        assert report.overall.tiles == made.quality.tiles
        assert report.overall.psnr_mean == pytest.approx(made.quality.psnr_mean)
        assert report.overall.ssim_p01 == pytest.approx(made.quality.ssim_p01)
        worst, same = report.overall.ssim_worst, made.quality.ssim_worst
        assert (worst.level, worst.y, worst.x) == (same.level, same.y, same.x)

    def test_wrong_colours_through_the_tags(self, svs: Path, tmp_path: Path) -> None:
        """YCbCr tiles that the tags call RGB: tifffile believes them (tifffile#146)."""
        target = tmp_path / "a.ome.tiff"
        convert(svs, target, ConvertSettings(codec="jpeg", options={"subsampling": "444"}))
        with tifffile.TiffFile(target, mode="r+") as file:
            tag = file.pages[0].tags[262]
            tag.overwrite(2)
            start = file.pages[0].dataoffsets[0]
        content = bytearray(target.read_bytes())
        assert content[start + 6 : start + 10] == b"JFIF"
        for tile in range(4):
            # without its JFIF marker nothing but the tags says what the stream holds
            with tifffile.TiffFile(target) as file:
                start = file.pages[0].dataoffsets[tile]
            content[start + 6 : start + 10] = b"none"
        target.write_bytes(content)
        report = verify(target)
        assert report.failed == 4
        assert "other pixels" in report.failures[0].reason

    def test_against_another_slide(self, converted: Path) -> None:
        with pytest.raises(VerifyError, match="not its source"):
            verify(converted, CMU)

    def test_averaged_levels_are_averaged_anew(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"
        made = convert(svs, target, ConvertSettings(codec="jpeg", levels=3))
        report = verify(target, svs)
        assert report.not_compared == ()
        for index, level in enumerate(made.levels):
            assert level.quality is not None
            assert report.quality[index].psnr_mean == pytest.approx(level.quality.psnr_mean)

    def test_tile_of_a_model_that_the_file_does_not_name(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"
        convert(svs, target, ConvertSettings(quality=30))
        digest = find_model("he-fast").digest.encode()
        content = target.read_bytes()
        assert content.count(digest) == 1
        target.write_bytes(content.replace(digest, b"0" * 64))
        report = verify(target)
        assert report.failed
        assert "does not name" in report.failures[0].reason

    def test_model_that_is_not_installed(
        self, svs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """That is no fault of the tiles."""
        convert(svs, tmp_path / "a.ome.tiff", ConvertSettings(quality=30))

        def missing(_: bytes) -> None:
            raise UnknownModelError("not installed")

        monkeypatch.setattr("wsicodec.codec.learned.decoder_of_prefix", missing)
        with pytest.raises(UnknownModelError, match="level 0: tile at row 0"):
            verify(tmp_path / "a.ome.tiff")

    def test_without_what_decodes(self, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """That is no fault of the tiles."""
        monkeypatch.setitem(sys.modules, "imagecodecs", None)
        with pytest.raises(RuntimeMissingError, match="pip install imagecodecs"):
            verify(converted)

    def test_no_jobs(self, converted: Path) -> None:
        with pytest.raises(SettingsError, match="jobs 0"):
            verify(converted, jobs=0)

    @pytest.mark.parametrize("name", ["a.ome.tiff", "a.ome.zarr"])
    def test_length_that_the_passport_does_not_tell(
        self, svs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A tile of another file, whole and of the right size."""
        real = LevelMap.__post_init__

        def lie(found: LevelMap) -> None:
            told = found.bytes.copy()
            told[0, 0] += 1
            object.__setattr__(found, "bytes", told)
            real(found)

        monkeypatch.setattr(LevelMap, "__post_init__", lie)
        convert(svs, tmp_path / name, ConvertSettings("jpeg"))
        monkeypatch.undo()
        report = verify(tmp_path / name)
        assert report.failed == len(report.failures) == 2  # of either level
        assert (report.failures[0].row, report.failures[0].column) == (0, 0)
        assert "the passport says" in report.failures[0].reason

    def test_damaged_passport(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"
        convert(svs, target, ConvertSettings("jpeg", glass="fill", tissue="otsu"))
        content = bytearray(target.read_bytes())
        content[content.index(b"WSCP") + 60] ^= 1
        target.write_bytes(content)
        for against in (None, svs):
            report = verify(target, against)
            assert (report.failed, report.ok) == (0, False)
            (fault,) = report.faults
            assert "a.ome.tiff" in fault
            assert "checksum" in fault
            with pytest.raises(VerifyError, match="checksum"):
                report.raise_if_failed()
            assert report.as_dict()["faults"] == [fault]

    def test_damaged_model(self, svs: Path, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"
        convert(svs, target, ConvertSettings(embed_model=True))
        assert verify(target).ok
        model = find_model("he-fast").path.read_bytes()
        content = bytearray(target.read_bytes())
        content[content.index(model) + len(model) // 2] ^= 1
        target.write_bytes(content)
        report = verify(target)
        assert not report.failed
        assert "does not name" in report.faults[0]

    def test_damaged_label(self, tmp_path: Path) -> None:
        target = tmp_path / "a.ome.tiff"
        convert(CMU, target, ConvertSettings("jpeg", levels=1, measure="none"))
        with tifffile.TiffFile(target) as file:
            page = file.series[2].keyframe
            start, count = page.dataoffsets[0], page.databytecounts[0]
        content = bytearray(target.read_bytes())
        content[start : start + count] = bytes(count)
        target.write_bytes(content)
        report = verify(target)
        assert not report.failed
        assert "image 'label'" in report.faults[0]

    def test_a_scanners_own_file(self) -> None:
        report = verify(CMU)
        assert report.ok
        assert report.tiles == 130


class TestExport:
    def test_learned_back_to_jpeg(self, svs: Path, tmp_path: Path) -> None:
        convert(svs, tmp_path / "a.ome.tiff", ConvertSettings(quality=90))
        report = export(tmp_path / "a.ome.tiff", tmp_path / "b.ome.tiff")
        assert (report.codec, report.quality_setting) == ("jpeg", 90)
        code = (
            "import sys, tifffile; image = tifffile.imread(sys.argv[1]);"
            "assert 'wsicodec' not in sys.modules; print(image.shape)"
        )
        # a Python that knows nothing of wsicodec
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "b.ome.tiff")],
            capture_output=True,
            text=True,
            env={**os.environ, "WSICODEC_AUTOLOAD": "0", "PYTHONPATH": ""},
            cwd=tmp_path,
            check=True,
        )
        assert done.stdout.strip() == "(333, 450, 3)"
        decoded = tifffile.imread(tmp_path / "b.ome.tiff").astype(int)
        assert np.abs(decoded.mean((0, 1)) - tissue(333, 450).mean((0, 1))).max() < 2

    def test_refuses_learned(self, svs: Path, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="export"):
            export(svs, tmp_path / "a.ome.tiff", ConvertSettings())


class TestInOrder:
    def test_bounded_and_ordered(self) -> None:
        running, taken, most = 0, 0, 0
        lock = threading.Lock()

        def task(index: int) -> int:
            time.sleep(0.001 * (index % 3))
            return index

        def tasks() -> Iterator[Callable[[], int]]:
            nonlocal running, most
            for index in range(50):
                with lock:
                    running += 1
                    most = max(most, running - taken)
                yield lambda index=index: task(index)

        with ThreadPoolExecutor(4) as pool:
            for expected, result in enumerate(in_order(pool, tasks(), 6)):
                assert result == expected
                taken += 1
        assert most <= 7

    def test_failure_comes_in_its_place(self) -> None:
        def fail() -> int:
            raise ValueError("third")

        tasks: list[Callable[[], int]] = [lambda: 1, lambda: 2, fail, lambda: 4]
        with ThreadPoolExecutor(2) as pool:
            results = in_order(pool, tasks, 2)
            assert [next(results), next(results)] == [1, 2]
            with pytest.raises(ValueError, match="third"):
                next(results)
