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

from benchmarks import effort, rate_distortion, seams, speed
from benchmarks import metrics as measures
from benchmarks.contenders import CODECS, LEARNED, REFERENCES, contenders, titles
from benchmarks.curves import (
    MS_SSIM_TARGET,
    SSIM_TARGET,
    Curve,
    at_target,
    bd_means,
    bd_rates,
    colour_at_target,
)
from benchmarks.groups import group, history, read_manifest, set_name
from benchmarks.images import grid, load_block, load_tiles
from benchmarks.report import summary_text, table
from wsicodec.metrics import Image, luma, psnr, ssim

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
    assert grid(300, 520, 256) == [(0, 0, 256, 256), (0, 256, 256, 256)]
    assert grid(100, 520, 256) == [(0, 0, 100, 256), (0, 256, 100, 256)]
    assert grid(100, 90, 256) == [(0, 0, 100, 90)]


@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "striped"])
def test_slides_are_read_by_region(tmp_path: Path, tiled: bool) -> None:
    import tifffile

    image = np.full((1100, 1300, 3), 245, np.uint8)
    image[256:900, 512:1100] = tissue_like(644, 588, 5)
    layout: dict[str, Any] = {"tile": (112, 240)} if tiled else {"rowsperstrip": 64}
    file = tmp_path / "slide.tif"
    tifffile.imwrite(file, image, photometric="rgb", compression="zlib", **layout)
    tiles = load_tiles(file, 256, 4)
    assert len(tiles) == 4
    places = grid(1100, 1300, 256)
    cuts = [image[y : y + 256, x : x + 256] for y, x, _, _ in places]
    for tile in tiles:
        assert tile.std() > 10  # not glass
        assert any(np.array_equal(tile, cut) for cut in cuts)
    every = load_tiles(file, 256, 1000)
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
    assert "at MS-SSIM 0.99" in done.stdout
    assert "out of domain" in done.stdout
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
            for bpp, psnr_, ssim_, ms_ssim in points:
                assert 0 < bpp < 24
                assert 10 < psnr_ <= 100
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
    for key in ("at_ssim", "at_ms_ssim", "colour_at_ssim", "bd_rate_by_group"):
        assert set(report[key]["stain"]) == {"H&E", "PAS"}
        assert set(report[key]["history"]) == {"JPEG", "none"}
        assert set(report[key]["domain"]) == {"H&E", "out of domain"}
        assert set(report[key]["set"]) == {"first", "second"}
    assert report["at_ms_ssim"]["target"] == 0.99
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

    tiles = load_tiles(folder / "first.png", 200, 64)
    assert [t.shape for t in tiles] == [(200, 200, 3)] * 2
    for point in report["details"]["first.png"]["webp"]:
        level = point["value"]
        size = sum(len(wsicodec.encode(t, codec="webp", method=6, level=level)) for t in tiles)
        assert point["bytes"] == size
        assert point["bpp"] == pytest.approx(8 * size / (2 * 200 * 200))


def test_psnr_is_of_the_pooled_error(report: dict[str, Any], folder: Path) -> None:
    import wsicodec

    tiles = load_tiles(folder / "first.png", 200, 64)
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
        contenders(["jpeg420", "jpeg2000", "webp"], []),
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
            contenders(["webp"], []),
            tile=190,
            max_tiles=64,
            cache=None,
        )
    )
    assert len(called) == len(REFERENCES["webp"].points)


def test_every_codec_has_points_enough_for_a_bd_rate() -> None:
    chosen = contenders(CODECS, ["a", "b"])
    learned = {f"{codec}:{model}" for codec in LEARNED for model in ("a", "b")}
    assert set(chosen) == {*REFERENCES, *learned}
    for contender in chosen.values():
        assert len(contender.points) >= 9
        assert len(set(contender.points)) == len(contender.points)


def test_learned_curves_of_a_model_and_their_titles() -> None:
    chosen = contenders(["learned", "learned-ssim", "learned-psnr", "avif"], ["he-fast"])
    assert chosen["learned"].options == {"model": "he-fast"}
    assert chosen["learned-psnr"].options == {"model": "he-fast", "tune": "psnr"}
    assert titles({label: c.as_dict() for label, c in chosen.items()}) == {
        "learned": "he-fast",
        "learned-ssim": "he-fast, tune=ssim",
        "learned-psnr": "he-fast, tune=psnr",
        "avif": "avif",
    }


def test_all_learned_curves_are_drawn_by_default() -> None:
    options = rate_distortion.parse_arguments(["--images", str(ROOT), "--json", "x"])
    assert tuple(options.codecs) == CODECS
    assert {"learned", "learned-ssim", "learned-psnr", "jpeg420"} < set(CODECS)


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable image"):
        rate_distortion.run(tmp_path, contenders(["jpeg420"], []))


# -- figures at a target --


def straight(scale: float, points: int = 10) -> Curve:
    """1 - SSIM and 1 - MS-SSIM are powers of the rate: straight for the interpolation.

    0.1 / (rate / scale) and 0.04 / (rate / scale) ** 2: SSIM 0.95 at 2 * scale, MS-SSIM 0.99 too.
    """
    rates = [scale * 1.4**k for k in range(points)]
    return [
        [r, 25 + 2.0 * k, 1 - 0.1 * scale / r, 1 - 0.04 * (scale / r) ** 2]
        for k, r in enumerate(rates)
    ]


def test_rates_and_ratios_at_a_target() -> None:
    """Means of ratios, and the ratio of all bits, weighed by pixels, differ as they should."""
    curves = {
        "a_1.png": {"jpeg420": straight(0.5), "webp": straight(0.25)},
        "a_2.png": {"jpeg420": straight(1.0), "webp": straight(0.9)},
        "b_1.png": {"jpeg420": straight(0.3), "webp": straight(0.36)},
    }
    pixels = {"a_1.png": 100, "a_2.png": 300, "b_1.png": 1000}
    groups = group(list(curves), {})
    for target in (SSIM_TARGET, MS_SSIM_TARGET):
        at = at_target(curves, target, groups, pixels)
        assert at["images"]["a_1.png"]["webp"]["bpp"] == pytest.approx(0.5)
        assert at["images"]["a_1.png"]["webp"]["ratio"] == pytest.approx(0.5)
        every, first = at["all"]["webp"], at["set"]["a"]["webp"]
        assert every["bpp"] == pytest.approx((0.5 + 1.8 + 0.72) / 3)
        assert every["ratio_mean"] == pytest.approx((0.5 + 0.9 + 1.2) / 3)
        assert every["ratio_median"] == pytest.approx(0.9)
        assert every["ratio_total"] == pytest.approx((50 + 540 + 720) / (100 + 600 + 600))
        assert first["ratio_mean"] == pytest.approx(0.7)
        assert first["ratio_total"] == pytest.approx((50 + 540) / (100 + 600))
        assert at["set"]["b"]["webp"]["ratio_total"] == pytest.approx(1.2)
        assert (every["images"], every["compared"], every["missed"]) == (3, 3, [])
        assert at["all"]["jpeg420"]["ratio_total"] == pytest.approx(1)
        assert at["not_reached"] == {}


def test_unreached_targets_are_said() -> None:
    poor: Curve = [[0.1 * k, 20.0 + k, 0.5 + 0.04 * k, None] for k in range(1, 10)]
    dear: Curve = [[0.1 * k, 20.0 + k, 0.99 + 0.001 * k, 0.995 + 1e-4 * k] for k in range(1, 10)]
    curves = {
        "poor.png": {"jpeg420": poor, "webp": dear, "avif": straight(1.0)},
        "good.png": {"jpeg420": straight(1.0), "webp": dear, "avif": straight(0.5)},
    }
    groups, pixels = group(list(curves), {}), dict.fromkeys(curves, 1)
    at = at_target(curves, SSIM_TARGET, groups, pixels)
    assert at["images"]["poor.png"]["jpeg420"] == {"bpp": None, "ratio": None}
    assert at["images"]["poor.png"]["avif"] == {"bpp": pytest.approx(2), "ratio": None}
    assert at["not_reached"] == {
        "jpeg420": {"poor.png": "best SSIM 0.8600"},
        "webp": dict.fromkeys(curves, "SSIM 0.9910 at the cheapest point"),
    }
    assert at["all"]["jpeg420"]["missed"] == ["poor.png"]
    assert at["all"]["webp"]["ratio_total"] is None
    avif = at["all"]["avif"]
    # its rate is known on both images, its ratio where JPEG has a rate as well
    assert (avif["images"], avif["compared"], avif["missed"]) == (2, 1, [])
    assert avif["bpp"] == pytest.approx(1.5)
    assert avif["ratio_mean"] == avif["ratio_total"] == pytest.approx(0.5)
    assert at["set"]["poor"]["avif"]["ratio_mean"] is None
    multi = at_target(curves, MS_SSIM_TARGET, groups, pixels)
    assert multi["not_reached"] == {
        "jpeg420": {"poor.png": "MS-SSIM not measured"},
        "webp": dict.fromkeys(curves, "MS-SSIM 0.9951 at the cheapest point"),
    }


def test_colour_at_a_target_is_between_the_points() -> None:
    def points(scale: float, worse: float) -> list[dict[str, Any]]:
        named = ("bpp", "psnr", "ssim", "ms_ssim")
        return [
            dict(zip(named, point, strict=True))
            # colour falls straight in ln(rate): by worse for every factor of e
            | {
                f"ciede2000_{k}": n * (5 - worse * math.log((point[0] or 0) / scale))
                for k, n in (("mean", 1), ("p95", 2))
            }
            for point in straight(scale)
        ]

    details = {
        "a.png": {"webp": points(1.0, 1.0), "jpeg420": points(0.5, 2.0)},
        "b.png": {"webp": points(2.0, 0.5), "jpeg420": points(1.0, 1.0)[:2]},
    }
    colour = colour_at_target(details, SSIM_TARGET, group(list(details), {}))
    one, half = 5 - math.log(2), 5 - 0.5 * math.log(2)
    assert colour["set"]["a"]["webp"]["mean"] == pytest.approx(one)
    assert colour["all"]["webp"] == pytest.approx(
        {"mean": (one + half) / 2, "p95": one + half, "images": 2}
    )
    assert colour["all"]["jpeg420"]["images"] == 1
    assert colour["all"]["jpeg420"]["mean"] == pytest.approx(5 - 2 * math.log(2))
    assert colour["set"]["b"]["jpeg420"]["mean"] is None


def test_bd_rates_by_group_name_what_they_miss() -> None:
    curves = {
        "a_1.png": {"jpeg420": straight(1.0), "learned": straight(0.8)},
        "a_2.png": {"jpeg420": straight(1.0), "learned": straight(0.6)},
        "b_1.png": {"jpeg420": straight(1.0), "learned": straight(0.5)[:5]},
    }
    means = bd_means(curves, bd_rates(curves), group(list(curves), {}))
    figures = means["all"]["learned"]["jpeg420"]["ssim"]
    assert figures["pchip"] == pytest.approx(-30)
    assert figures["akima"] == pytest.approx(-30)
    assert (figures["images"], figures["missed"]) == (2, ["b_1.png"])
    assert set(means["all"]) == {"learned"}
    assert means["set"]["b"]["learned"]["jpeg420"]["psnr"]["pchip"] is None
    assert means["set"]["a"]["learned"]["jpeg420"]["ms_ssim"]["pchip"] == pytest.approx(-30)


@pytest.mark.parametrize(
    ("note", "kind"),
    [
        ("none-detected", "none"),
        ("none (camera), 2x area-downsampled", "none"),
        ("", "none"),
        ("q95", "JPEG"),
        ("jpeg-grid", "JPEG"),
        ("Aperio SVS, JPEG Q30", "JPEG"),
        ("Aperio SVS, JPEG 2000 (33005) Q70", "JPEG-2000"),
        ("DICOM SM tiny, JPEG-LS", "unknown"),
        ("window frame cropped", "unknown"),
    ],
)
def test_history(note: str, kind: str) -> None:
    assert history(note) == kind


def test_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.csv").write_text(
        "path,stain,jpeg_history_quality_or_none\n"
        "val/x_he_001.jxl,H&E,q95\nval/x_he_002.jxl,,jpeg-grid\nval/y_pas_1.jxl,PAS,none\n"
    )
    (tmp_path / "val").mkdir()
    monkeypatch.chdir(tmp_path / "val")
    manifest = read_manifest(Path())  # "above" is found from a relative path too
    images = ["x_he_001.jxl", "x_he_002.jxl", "deep/y_pas_1.jxl", "plain.png"]
    assert group(images, manifest) == {
        "history": {"JPEG": images[:2], "none": [images[2]]},
        "domain": {"H&E": [images[0]], "out of domain": [images[2]]},
        "set": {"plain": ["plain.png"], "x_he": images[:2], "y_pas": [images[2]]},
        "stain": {"H&E": [images[0]], "PAS": [images[2]], "unknown": [images[1]]},
    }
    assert set_name("strasmhh_kidney-he_001.jxl") == "strasmhh_kidney-he"


def test_tables_are_aligned() -> None:
    text = table(["", "one\nline", "b"], [["long name", "1.0", "-"], ["x", "10.25", "+3"]])
    assert text.split("\n") == [
        "             one",
        "            line   b",
        "long name    1.0   -",
        "x          10.25  +3",
    ]


def test_learned_curves(tmp_path: Path) -> None:
    """The command with the shipped model: both curves, which are not the same, and the tables."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/core_1.png").write_bytes(imagecodecs.png_encode(tissue_like(96, 96, 10)))
    output = tmp_path / "rd.json"
    command = [sys.executable, str(ROOT / "benchmarks/rate_distortion.py"), "--tile", "96"]
    command += ["--images", str(tmp_path / "in"), "--json", str(output)]
    command += ["--codecs", "jpeg420", "learned", "learned-psnr"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    found = json.loads(output.read_text())
    curves = found["curves"]["core_1.png"]
    assert set(curves) == set(found["contenders"]) == {"jpeg420", "learned", "learned-psnr"}
    assert curves["learned"] != curves["learned-psnr"]
    assert found["contenders"]["learned-psnr"]["tune"] == "psnr"
    assert set(found["bd_rate"]) == {"learned", "learned-psnr"}
    for label in found["bd_rate"]:
        assert set(found["bd_rate"][label]["jpeg420"]) == {"psnr", "ssim", "ms_ssim"}
    # 96 pixels are too few for MS-SSIM: counted and named for every codec
    for label in curves:
        assert found["at_ms_ssim"]["all"][label]["missed"] == ["core_1.png"]
        assert found["colour_at_ssim"]["all"][label]["p95"] > 0
        assert found["at_ssim"]["all"][label]["images"] == 1
    assert done.stdout.endswith(summary_text(found) + "\n")
    for words in (
        "he-fast, tune=psnr has no rate at MS-SSIM 0.99 on 1: core_1.png (MS-SSIM not measured)",
        "BD-rate of he-fast, tune=psnr in %",
        "no manifest.csv",
        "set core",
    ):
        assert words in done.stdout


# -- seams --


def test_border_difference_of_a_known_error() -> None:
    """An error of 8 levels on borders and 2 elsewhere: 12 dB, whatever the number of tiles."""
    original = tissue_like(96, 128, 11) // 2 + 40
    error = np.full((32, 64), 8)
    error[8:-8, 8:-8] = 2
    decoded = (original + np.tile(error, (3, 2))[..., None]).astype(np.uint8)
    difference = seams.border_difference(original, decoded, 32, 64)
    assert difference == pytest.approx(20 * math.log10(2 / 8))
    inverse = (original + np.tile(10 - error, (3, 2))[..., None]).astype(np.uint8)
    assert seams.border_difference(original, inverse, 32, 64) == pytest.approx(-difference)
    # of other tiles, the same error is not on the border
    assert abs(seams.border_difference(original, decoded, 96, 128)) < 6
    with pytest.raises(ValueError, match="no pixel off the border"):
        seams.border_difference(original[:16], original[:16], 16, 64)


def test_border_difference_pools_squared_errors_over_tiles() -> None:
    original = np.full((32, 64, 3), 100, np.uint8)
    decoded = original.copy()
    border = seams.is_border(32, 32)
    decoded[:, :32][border] = 106
    decoded[:, 32:][border] = 98
    decoded[:, 32:][~border] = 103
    expected = 10 * math.log10((0 + 3**2) / (6**2 + 2**2))
    assert seams.border_difference(original, decoded, 32, 32) == pytest.approx(expected)


def test_steps_at_seams() -> None:
    """A ramp of one level a pixel; every second tile is decoded four levels brighter."""
    ramp = np.arange(96)[:, None] + np.arange(96)[None, :]
    original = np.repeat(ramp[..., None], 3, 2).astype(np.uint8)
    decoded = original.copy()
    decoded[:48, 48:] += 4
    decoded[48:, :48] += 4
    figures = seams.step_figures(original, decoded, 48, 48)
    # up the ramp a step of 5, down from a brighter tile |1 - 4| = 3
    assert figures["seam"]["original"] == pytest.approx(1)
    assert figures["seam"]["decoded"] == pytest.approx((5 + 3) / 2)
    assert figures["seam"]["error"] == pytest.approx(4)
    assert figures["seam"]["excess"] == pytest.approx(300)
    for lines in ("block", "inside"):
        assert figures[lines]["ratio"] == pytest.approx(1)
        assert figures[lines]["error"] == pytest.approx(0, abs=1e-9)
    assert seams.step_figures(original, original, 48, 48)["seam"]["excess"] == pytest.approx(0)
    assert seams.step_figures(original, original, 96, 96)["seam"]["ratio"] is None


def test_steps_at_blocks_are_not_those_at_seams() -> None:
    original = np.repeat(np.add.outer(np.arange(96), np.arange(96))[..., None], 3, 2)
    original = original.astype(np.uint8)
    decoded = original.copy()
    decoded[16:32] += 2  # two lines between blocks within the first tile
    figures = seams.step_figures(original, decoded, 48, 48)
    # of eight lines between blocks one steps by 3 and one by |1 - 2|
    assert figures["block"]["decoded"] == pytest.approx((6 * 1 + 3 + 1) / 8)
    assert figures["seam"]["decoded"] == figures["inside"]["decoded"] == pytest.approx(1)


def test_seams_are_averaged_over_images_with_whole_tiles() -> None:
    def entry(down: int, across: int, border: float, excess: float | None) -> dict[str, Any]:
        figures = {"original": 1.0, "excess": excess}
        lines = {"seam": figures, "block": figures, "inside": figures}
        return {"down": down, "across": across, "qualities": {70: {"border": border, **lines}}}

    images = {"a": entry(2, 2, -1.0, 10.0), "b": entry(3, 2, -2.0, 4.0), "c": entry(1, 2, -9.0, 99)}
    found = seams.summarise(images, 70)
    assert (found["images"], found["whole"]) == (2, True)
    assert found["border"] == {"mean": -1.5, "worst": -2.0, "worst_image": "b"}
    assert found["seam"] == {"original": 1, "excess": 7, "worst": 10, "worst_image": "a"}
    few = seams.summarise({"c": images["c"], "d": entry(1, 1, -1.0, None)}, 70)
    assert (few["images"], few["whole"], few["border"]["mean"]) == (2, False, -5)
    assert few["seam"]["excess"] == 99


def test_blocks_of_neighbouring_tiles(tmp_path: Path) -> None:
    import tifffile

    image = np.full((1100, 1300, 3), 245, np.uint8)
    image[600:1000, 700:1250] = tissue_like(400, 550, 12)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(image))
    whole = load_block(tmp_path / "a.png", 256, 64)
    assert (whole.down, whole.across, whole.y, whole.x) == (4, 5, 0, 0)
    assert np.array_equal(whole.pixels, image[:1024, :1280])
    assert whole.places() == grid(1100, 1300, 256)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", tile=(256, 256))
    for name in ("a.png", "a.tif"):
        part = load_block(tmp_path / name, 256, 4)
        assert (part.down, part.across) == (2, 2)
        assert np.array_equal(part.pixels, image[part.y : part.y + 512, part.x : part.x + 512])
        # the middle of the image, but of the slide the middle of its tissue
        assert (part.y, part.x) == ((256, 512) if name == "a.png" else (512, 768))
    narrow = load_block(tmp_path / "a.png", 1024, 64)
    assert (narrow.down, narrow.across) == (1, 1)


def test_seams_report(tmp_path: Path) -> None:
    import wsicodec

    (tmp_path / "in").mkdir()
    first, second = tissue_like(140, 130, 13), tissue_like(64, 64, 14)
    (tmp_path / "in/core_1.png").write_bytes(imagecodecs.png_encode(first))
    (tmp_path / "in/core_2.png").write_bytes(imagecodecs.png_encode(second))
    (tmp_path / "in/broken.jpg").write_bytes(b"\xff\xd8 nothing")
    output, picture = tmp_path / "seams.json", tmp_path / "worst.png"
    command = [sys.executable, str(ROOT / "benchmarks/seams.py"), "--tile", "64"]
    command += ["--images", str(tmp_path / "in"), "--json", str(output)]
    command += ["--quality", "20", "60", "--picture", str(picture)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "broken.jpg skipped" in done.stderr
    found = json.loads(output.read_text())
    assert set(found["qualities"]) == {"20", "60"}
    assert list(found["skipped"]) == ["broken.jpg"]
    assert found["images"]["core_1.png"]["down"] == found["images"]["core_1.png"]["across"] == 2
    for quality, entry in found["qualities"].items():
        assert (entry["images"], entry["whole"]) == (1, True)
        pixels = np.ascontiguousarray(first[:128, :128])
        decoded = np.empty_like(pixels)
        similarities = {}
        for name, image in (("core_1.png", pixels), ("core_2.png", second)):
            for y, x, rows, columns in grid(image.shape[0], image.shape[1], 64):
                tile = np.ascontiguousarray(image[y : y + rows, x : x + columns])
                stream = wsicodec.encode(tile, quality=int(quality))
                after = wsicodec.decode(stream)
                if name == "core_1.png":
                    decoded[y : y + rows, x : x + columns] = after
                bpp = 8 * len(stream) / 64**2
                similarities[name, y, x] = ssim(tile, after), psnr(tile, after), bpp
        worst = min(similarities, key=lambda place: similarities[place][0])
        tile = entry["worst_tiles"]["core"]
        assert (tile["image"], tile["y"], tile["x"]) == worst
        assert (tile["ssim"], tile["psnr"], tile["bpp"]) == pytest.approx(similarities[worst])
        assert entry["border"]["mean"] == pytest.approx(
            seams.border_difference(pixels, decoded, 64, 64)
        )
        lines = np.abs(np.diff(luma(decoded), axis=0))[63], np.abs(np.diff(luma(decoded)))[:, 63]
        assert entry["seam"]["decoded"] == pytest.approx(np.mean(lines))
        assert entry["seam"]["worst_image"] == "core_1.png"
    assert "core at 60" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_keeps_its_size() -> None:
    """Of noise, which PNG cannot compress, smaller parts are shown; and the worst of the tile."""
    rng = np.random.default_rng(15)
    noise = rng.integers(0, 256, (256, 256, 3), np.uint8)
    decoded = noise.copy()
    decoded[160:200, 40:80] = 128
    worst = {
        f"set {i}": seams.CodedTile(f"set {i}_1.png", 0, 0, 0.9, 30.0, 1.0, noise, decoded)
        for i in range(8)
    }
    data = seams.picture(worst, "noise")
    assert len(data) <= seams.PICTURE_BYTES
    shown = imagecodecs.png_decode(data)
    assert shown.shape[0] * shown.shape[1] > 8 * 2 * 96**2
    y, x, rows, columns = seams.worst_place(worst["set 0"], 64)
    assert (rows, columns) == (64, 64)
    assert y <= 160 and y + rows >= 200 and x <= 40 and x + columns >= 80


# -- speed --


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
        for figures in found["speed"][label]["all_cores"].values():
            assert figures["against_one_thread"] > 0
        assert found["start"][label]["first_tile_ms"] > 0
    assert found["ratios"]["jpeg420"]["one_core"]["decode"]["jpeg"] == 1
    assert found["matched"]["jpeg2000"]["ssim"] == pytest.approx(0.95, abs=0.005)
    assert found["versions"]["python"]


def test_passes_are_compared_with_those_beside_them() -> None:
    # the machine halves its speed after the first pass: medians of each alone would not see 2
    one = speed.Passes([4.0, 8.0, 8.0], [4.0, 8.0, 8.0], 1)
    two = speed.Passes([2.0, 4.0, 16.0], [4.0, 8.0, 9.0], 1)
    assert speed.times_as_fast(one, two) == 2
    assert two.figures(8_000_000)["mpx_s_wall"] == 2
    assert two.figures(8_000_000)["mpx_s_cpu_best"] == 2


def test_matching_finds_the_cheapest_quality_that_serves() -> None:
    tiles = [tissue_like(96, 96, 9)]
    contender = REFERENCES["jpeg420"]
    found = speed.match(tiles, contender, 0.95)
    assert found["reached"]
    decode = speed.decoder(contender)

    def at(level: int) -> float:
        return ssim(tiles[0], decode(contender.encode(tiles[0], level)))

    assert at(found["value"]) >= 0.95
    assert at(found["value"] - 1) < 0.95
    distance = REFERENCES["jpegxl"]
    matched = speed.match(tiles, distance, 0.95)
    assert matched["ssim"] == pytest.approx(0.95, abs=0.003)
    assert not speed.match(tiles, REFERENCES["webp"], 0.99999)["reached"]


def test_efforts_against_the_default_one(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"a_{i}.png").write_bytes(imagecodecs.png_encode(tissue_like(150, 140, i)))
    out = tmp_path / "effort.json"
    words = ["--images", str(tmp_path), "--json", str(out), "--tile", "96", "--tunes", "ssim"]
    effort.main([*words, "--efforts", "1", "5"])
    report = json.loads(out.read_text())
    assert report["images"] == ["a_0.png", "a_1.png"]
    assert report["ssim"]["5"]["ssim"] == report["ssim"]["5"]["psnr"] == 0
    assert report["ssim"]["5"]["ssim_images"] == 2
    assert report["ssim"]["1"]["ms"] > 0
    assert report["ssim"]["1"]["ssim"] != 0
