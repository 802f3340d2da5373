"""The benchmarks: their measures, and small runs of their commands."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("skimage")

from benchmarks import metrics as measures
from benchmarks import rate_distortion, speed
from wsicodec.metrics import Image, ssim

ROOT = Path(__file__).parents[1]


def tissue_like(rows: int, columns: int, seed: int) -> Image:
    """Dark blobs on a pale ground with some noise: SSIM behaves as on tissue."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(rows, columns)), 4)
    fine = gaussian_filter(rng.normal(size=(rows, columns)), 1.2)
    density = 0.5 / (1 + np.exp(-60 * field)) + 0.12 * fine[..., None].repeat(1, 2)[..., 0] + 0.3
    colour = np.array([0.65, 1.0, 0.45])
    image = 240 * np.exp(-density[..., None] * colour) + rng.normal(0, 2, (rows, columns, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


# -- measures --


def curve(points: int = 9) -> list[tuple[float, float]]:
    return [(0.1 * 1.6**k, 28 + 2.5 * k - 0.08 * k * k) for k in range(points)]


def test_bd_rate_of_a_curve_against_itself_is_zero() -> None:
    rate = measures.bd_rate(curve(), list(reversed(curve())))
    assert rate.pchip == pytest.approx(0, abs=1e-9)
    assert rate.akima == pytest.approx(0, abs=1e-9)
    assert (rate.low, rate.high) == (28, pytest.approx(42.88))
    assert rate.coverage == pytest.approx(1)


@pytest.mark.parametrize("percent", [10, -25])
def test_bd_rate_of_a_shifted_curve_is_the_shift(percent: float) -> None:
    factor = 1 + percent / 100
    rate = measures.bd_rate(curve(), [(factor * r, q) for r, q in curve()])
    assert rate.pchip == pytest.approx(percent)
    assert rate.akima == pytest.approx(percent)


def test_bd_rate_between_other_points_of_one_function() -> None:
    """Straight in ln(rate): exact whatever the points; the overlap is what both cover."""
    first = [(math.exp(0.2 * q), q) for q in np.linspace(30, 40, 9)]
    second = [(1.1 * math.exp(0.2 * q), q) for q in np.linspace(33, 45, 11)]
    rate = measures.bd_rate(first, second)
    assert rate.pchip == pytest.approx(10)
    assert rate.akima == pytest.approx(10)
    assert (rate.low, rate.high) == (33, 40)
    assert rate.coverage == pytest.approx(0.7)


def test_bd_rate_without_overlap_is_nan() -> None:
    rate = measures.bd_rate(curve(), [(r, q + 100) for r, q in curve()])
    assert math.isnan(rate.pchip)
    assert rate.coverage == 0


def test_bd_rate_refuses_few_points() -> None:
    with pytest.raises(ValueError, match="needs 8"):
        measures.bd_rate(curve(7), curve())


def test_points_that_cost_more_than_a_better_one_are_dropped() -> None:
    qualities, rates = measures.rising(
        [(2, 31), (1, 30), (3, 30.5), (4, 33), (4, 32), (5, math.nan)]
    )
    assert rates.tolist() == [1, 2, 4]
    assert qualities.tolist() == [30, 31, 33]


def test_rate_at_is_linear_in_the_logarithm() -> None:
    points = [(1.0, 0.9), (4.0, 0.96), (9.0, 0.99)]
    assert measures.rate_at(points, 0.93) == pytest.approx(2)
    assert measures.rate_at(points, 0.9) == pytest.approx(1)
    assert math.isnan(measures.rate_at(points, 0.995))
    assert math.isnan(measures.rate_at(points, 0.5))


def test_ms_ssim_of_one_scale_is_ssim() -> None:
    """The finest scale of MS-SSIM is the SSIM of the package."""
    image = tissue_like(180, 200, 1)
    other = imagecodecs.jpeg8_decode(imagecodecs.jpeg8_encode(image, level=50))
    from wsicodec.metrics import luma

    whole, _ = measures._similarities(luma(image), luma(other))
    assert whole == pytest.approx(ssim(image, other), abs=1e-12)


def test_ms_ssim_against_its_formula() -> None:
    """Computed the long way: scikit-image's filters, every scale by itself."""
    from scipy.ndimage import uniform_filter
    from skimage.metrics import structural_similarity

    image = tissue_like(192, 256, 2)
    other = imagecodecs.jpeg8_decode(imagecodecs.jpeg8_encode(image, level=30))
    planes = [a @ np.array([0.299, 0.587, 0.114]) for a in (image, other)]
    settings: dict[str, Any] = {
        "win_size": 11,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
    }
    expected = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale < 4:
            # without means there is no luminance term: K1 enormous makes it one
            expected *= structural_similarity(*planes, K1=1e6, **settings) ** weight
        else:
            expected *= structural_similarity(*planes, **settings) ** weight
        planes = [uniform_filter(p, 2, origin=-1)[::2, ::2] for p in planes]
    assert measures.ms_ssim(image, other) == pytest.approx(expected, abs=1e-6)


def test_ms_ssim_limits() -> None:
    image = tissue_like(176, 176, 3)
    assert measures.ms_ssim(image, image) == 1
    assert math.isnan(measures.ms_ssim(image[:175], image[:175]))
    assert 0 <= measures.ms_ssim(image, 255 - image) < 0.2
    with pytest.raises(ValueError, match="cannot be compared"):
        measures.ms_ssim(image, image[:, :170])


def test_ciede2000() -> None:
    image = tissue_like(64, 64, 4)
    assert measures.ciede2000(image, image) == (0, 0)
    mean, p95 = measures.ciede2000(image, np.clip(image.astype(int) + 3, 0, 255).astype(np.uint8))
    assert 0.3 < mean < p95 < 5


# -- images --


def test_tiles_are_whole_unless_the_image_is_smaller() -> None:
    assert rate_distortion.grid(300, 520, 256) == [(0, 0, 256, 256), (0, 256, 256, 256)]
    assert rate_distortion.grid(100, 520, 256) == [(0, 0, 100, 256), (0, 256, 100, 256)]
    assert rate_distortion.grid(100, 90, 256) == [(0, 0, 100, 90)]


@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "striped"])
def test_slides_are_read_by_region(tmp_path: Path, tiled: bool) -> None:
    import tifffile

    image = np.full((1100, 1300, 3), 245, np.uint8)
    image[256:900, 512:1100] = tissue_like(644, 588, 5)
    layout: dict[str, Any] = {"tile": (112, 240)} if tiled else {"rowsperstrip": 64}
    file = tmp_path / "slide.tif"
    tifffile.imwrite(file, image, photometric="rgb", compression="zlib", **layout)
    tiles = rate_distortion.load_tiles(file, 256, 4)
    assert len(tiles) == 4
    places = rate_distortion.grid(1100, 1300, 256)
    cuts = [image[y : y + 256, x : x + 256] for y, x, _, _ in places]
    for tile in tiles:
        assert tile.std() > 10  # not glass
        assert any(np.array_equal(tile, cut) for cut in cuts)
    every = rate_distortion.load_tiles(file, 256, 1000)
    assert all(np.array_equal(a, b) for a, b in zip(every, cuts, strict=True))


# -- runs --


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of two kinds, one that is no image, one that is grey, and a manifest."""
    place = tmp_path_factory.mktemp("images")
    (place / "deep").mkdir()
    first, second = tissue_like(200, 420, 6), tissue_like(190, 180, 7)
    (place / "first.png").write_bytes(imagecodecs.png_encode(first))
    (place / "deep/second.jxl").write_bytes(imagecodecs.jpegxl_encode(second, lossless=True))
    (place / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    (place / "grey.png").write_bytes(imagecodecs.png_encode(first[..., 0].copy()))
    (place / "notes.txt").write_text("not an image")
    (place / "manifest.csv").write_text(
        "path,stain,jpeg_history_quality_or_none\n"
        "data/first.png,H&E,q95\n"
        "data/deep/second.jxl,PAS,none-detected\n"
    )
    return place


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command itself, run once, with a cache and a plot."""
    place = tmp_path_factory.mktemp("report")
    command = [sys.executable, str(ROOT / "benchmarks/rate_distortion.py"), "--tile", "200"]
    command += ["--images", str(folder), "--json", str(place / "rd.json"), "--jobs", "2"]
    command += ["--codecs", "jpeg420", "jpeg2000", "webp", "--cache", str(place / "cache")]
    command += ["--plot", str(place / "rd.png")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=place)
    assert "BD-rate of jpeg420" in done.stdout
    assert "broken.jpg skipped: FormatError" in done.stderr.replace("Jpeg8Error", "FormatError")
    assert (place / "rd.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((place / "cache").iterdir())) == 6
    result: dict[str, Any] = json.loads((place / "rd.json").read_text())
    result["place"] = place
    return result


def test_report_layout(report: dict[str, Any]) -> None:
    assert set(report["curves"]) == {"first.png", "deep/second.jxl"}
    assert set(report["skipped"]) == {"broken.jpg", "grey.png"}
    for codecs in report["curves"].values():
        assert set(codecs) == {"jpeg420", "jpeg2000", "webp"}
        for points in codecs.values():
            assert len(points) >= 9
            assert points == sorted(points)
            for bpp, psnr, ssim_, ms_ssim in points:
                assert 0 < bpp < 24
                assert 10 < psnr <= 100
                assert 0 < ssim_ <= 1
                assert 0 < ms_ssim <= 1
    against = report["bd_rate"]["webp"]["jpeg420"]
    for metric in ("psnr", "ssim", "ms_ssim"):
        figures = against[metric]
        assert figures["images"] == 2
        assert figures["overlap_low"] < figures["overlap_high"]
        assert figures["pchip"] == pytest.approx(figures["akima"], abs=3)
    inverse = report["bd_rate"]["jpeg420"]["webp"]["psnr"]["pchip"]
    assert (against["psnr"]["pchip"] < 0) != (inverse < 0)
    assert report["at_ssim"]["all"]["jpeg420"]["ratio_mean"] == 1
    assert set(report["at_ssim"]["stain"]) == {"H&E", "PAS"}
    assert set(report["at_ssim"]["history"]) == {"JPEG", "none"}
    assert report["images"]["first.png"]["tiles"] == 2
    assert report["images"]["deep/second.jxl"]["pixels"] == 190 * 180
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["imagecodecs"]
    assert report["metrics"]["ssim"]["win_size"] == 11
    for points in report["details"]["first.png"].values():
        for point in points:
            assert point["ssim_worst"] <= point["ssim_p01"] <= point["ssim"]
            assert point["ciede2000_mean"] <= point["ciede2000_p95"]


def test_rate_counts_every_byte_of_every_tile(report: dict[str, Any], folder: Path) -> None:
    import wsicodec

    tiles = rate_distortion.load_tiles(folder / "first.png", 200, 64)
    assert [t.shape for t in tiles] == [(200, 200, 3)] * 2
    for point in report["details"]["first.png"]["webp"]:
        level = point["value"]
        size = sum(len(wsicodec.encode(t, codec="webp", method=6, level=level)) for t in tiles)
        assert point["bytes"] == size
        assert point["bpp"] == pytest.approx(8 * size / (2 * 200 * 200))


def test_psnr_is_of_the_pooled_error(report: dict[str, Any], folder: Path) -> None:
    import wsicodec

    tiles = rate_distortion.load_tiles(folder / "first.png", 200, 64)
    point = report["details"]["first.png"]["webp"][3]
    pairs = [
        (t.astype(float), wsicodec.decode(wsicodec.encode(t, codec="webp", method=6, level=38)))
        for t in tiles
    ]
    assert point["value"] == 38
    mean = np.mean([np.square(a - b).mean() for a, b in pairs])
    assert point["psnr"] == pytest.approx(10 * math.log10(255**2 / mean))


def test_cached_curves_are_taken(
    report: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_distortion, "measure", None)
    again = rate_distortion.run(
        folder,
        rate_distortion.contenders(["jpeg420", "jpeg2000", "webp"], []),
        tile=200,
        cache=report["place"] / "cache",
    )
    assert again["curves"] == report["curves"]


def test_curves_change_with_the_tile(
    report: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache knows pixels by content: other tiles are other pixels."""
    called = []
    monkeypatch.setattr(
        rate_distortion, "measure", lambda *a: called.append(a) or {"bpp": 1.0, "psnr": 30.0}
    )
    rate_distortion.run_task(
        rate_distortion.Task(
            "first.png",
            folder / "first.png",
            rate_distortion.contenders(["webp"], []),
            tile=190,
            max_tiles=64,
            cache=None,
        )
    )
    assert len(called) == len(rate_distortion.REFERENCES["webp"].points)


def test_every_codec_has_points_enough_for_a_bd_rate() -> None:
    chosen = rate_distortion.contenders([*rate_distortion.REFERENCES, "learned"], ["a", "b"])
    assert set(chosen) == {*rate_distortion.REFERENCES, "learned:a", "learned:b"}
    for contender in chosen.values():
        assert len(contender.points) >= 9
        assert len(set(contender.points)) == len(contender.points)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable image"):
        rate_distortion.run(tmp_path, rate_distortion.contenders(["jpeg420"], []))


def test_unreached_targets_are_said() -> None:
    points: list[list[float | None]] = [
        [0.1 * k, 20.0 + k, 0.5 + 0.04 * k, None] for k in range(1, 10)
    ]
    curves = {"image": {"jpeg420": points, "webp": [[p[0], p[1], 0.999, None] for p in points]}}
    at = rate_distortion.at_ssim(curves, {})
    assert at["images"]["image"]["jpeg420"] == {"bpp": None, "ratio": None}
    assert at["not_reached"]["jpeg420"] == {"image": "best SSIM 0.8600"}
    assert at["not_reached"]["webp"] == {"image": "SSIM 0.9990 at the cheapest point"}


def test_speed_report(tmp_path: Path) -> None:
    file = tmp_path / "slide.png"
    file.write_bytes(imagecodecs.png_encode(tissue_like(128, 128, 8)))
    output = tmp_path / "speed.json"
    command = [sys.executable, str(ROOT / "benchmarks/speed.py"), "--slide", str(file)]
    command += ["--json", str(output), "--codecs", "jpeg420", "webp", "jpeg2000"]
    command += ["--tile", "64", "--tiles", "2", "--passes", "2", "--starts", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "times as fast" in done.stdout
    found = json.loads(output.read_text())
    assert set(found["speed"]) == {"jpeg420", "webp", "jpeg2000"}
    for label in found["speed"]:
        for cores in ("one_core", "all_cores"):
            for operation in ("encode", "decode"):
                assert found["speed"][label][cores][operation]["mpx_s"] > 0
                ratio = found["ratios"][label][cores][operation]
                assert set(ratio) == {"jpeg", "jpeg2000"}
        assert found["start"][label]["first_tile_ms"] > 0
    assert found["ratios"]["jpeg420"]["one_core"]["decode"]["jpeg"] == 1
    assert found["matched"]["jpeg2000"]["ssim"] == pytest.approx(0.95, abs=0.005)
    assert found["versions"]["python"]


def test_matching_finds_the_cheapest_quality_that_serves() -> None:
    tiles = [tissue_like(96, 96, 9)]
    contender = rate_distortion.REFERENCES["jpeg420"]
    found = speed.match(tiles, contender, 0.95)
    assert found["reached"]
    decode = speed.decoder(contender)

    def at(level: int) -> float:
        return ssim(tiles[0], decode(contender.encode(tiles[0], level)))

    assert at(found["value"]) >= 0.95
    assert at(found["value"] - 1) < 0.95
    distance = rate_distortion.REFERENCES["jpegxl"]
    matched = speed.match(tiles, distance, 0.95)
    assert matched["ssim"] == pytest.approx(0.95, abs=0.003)
    assert not speed.match(tiles, rate_distortion.REFERENCES["webp"], 0.99999)["reached"]
