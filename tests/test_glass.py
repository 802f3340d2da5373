"""Glass: kept, filled or dropped, in every codec; never black, and tissue as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from slides import tissue

from wsicodec.convert import ConvertSettings, convert, verify
from wsicodec.slide.opening import open_slide
from wsicodec.slide.passport import read_passport

CODECS = ("learned", "jpeg", "jpeg2000", "jpegxl", "webp", "lossless")
GLASS = (243, 241, 244)


def slide_with_glass(height: int = 448, width: int = 600) -> np.ndarray:
    """A section in the middle of slightly noisy glass."""
    rng = np.random.default_rng(0)
    image = np.clip(np.array(GLASS) + rng.normal(0, 1.2, (height, width, 1)), 0, 255)
    image = image.astype(np.uint8).repeat(1, 2)
    image[150:300, 200:400] = tissue(150, 200, 1100, 800)
    return image


def write_coarse(path: Path, image: np.ndarray) -> Path:
    """Two levels at 4 µm a pixel: glass needs room for the margin around tissue."""
    settings = {
        "photometric": "rgb",
        "compression": "deflate",
        "metadata": None,
        "tile": (240, 240),
    }
    with tifffile.TiffWriter(path) as writer:
        words = "Aperio Image Library v11.2.1 \r\n|AppMag = 2|MPP = 4.0"
        writer.write(image, description=words, **settings)
        writer.write(image[::2, ::2], **settings)
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coarse(tmp_path_factory.mktemp("svs") / "glass.svs", slide_with_glass())


@pytest.mark.parametrize(
    ("codec", "levels"),
    [*((codec, "source") for codec in CODECS), ("learned", 3), ("lossless", 3)],
)
@pytest.mark.parametrize("glass", ["fill", "drop"])
def test_modes(slide: Path, tmp_path: Path, codec: str, glass: str, levels: str | int) -> None:
    target = tmp_path / "a.ome.tiff"
    settings = ConvertSettings(codec, glass=glass, tissue="otsu", tile_size=64, levels=levels)
    report = convert(slide, target, settings)
    assert report.tissue_share is not None
    assert 0.1 < report.tissue_share < 0.6
    passport = read_passport(target)
    assert passport is not None
    assert passport.mask is not None
    background = np.array(passport.mask.background)
    assert np.abs(background - GLASS).max() <= 2
    original = slide_with_glass()
    with tifffile.TiffFile(target) as file:
        for index, level in enumerate(file.series[0].levels):
            pixels = level.asarray().astype(int)
            # corners are far from tissue: one colour, the slide's own, exactly or nearly
            for corner in (pixels[:20, :20], pixels[-20:, -20:]):
                assert np.abs(corner - background).max() <= (0 if codec == "lossless" else 3)
            if index == 0 and codec == "lossless":
                tissue_there = ~passport.mask.glass(1.0, 0, 0, *pixels.shape[:2])
                assert tissue_there[150:300, 200:400].mean() > 0.5
                np.testing.assert_array_equal(pixels[tissue_there], original[tissue_there])
    shared = report.modes.get("shared glass", 0)
    assert (shared > 0) == (glass == "drop")
    assert verify(target, slide).ok


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_saved(slide: Path, tmp_path: Path, codec: str) -> None:
    sizes = {}
    for glass in ("keep", "fill", "drop"):
        settings = ConvertSettings(codec, glass=glass, tissue="otsu", tile_size=64)
        report = convert(slide, tmp_path / f"{glass}.ome.tiff", settings)
        sizes[glass] = sum(level.coded_bytes for level in report.levels)
    assert sizes["drop"] < sizes["fill"]
    if codec != "jpeg2000":  # which aims at a PSNR and spends next to nothing on glass anyway
        assert sizes["fill"] < sizes["keep"]


def test_averages_are_of_the_original_pixels(slide: Path, tmp_path: Path) -> None:
    """Filling comes after averaging: at tissue's edge no filled pixel leaks into the next level."""
    target = tmp_path / "a.ome.tiff"
    settings = ConvertSettings("lossless", glass="fill", tissue="otsu", levels=3)
    convert(slide, target, settings)
    expected = slide_with_glass().astype(np.float64)
    passport = read_passport(target)
    assert passport is not None
    assert passport.mask is not None
    with tifffile.TiffFile(target) as file:
        for index, level in enumerate(file.series[0].levels):
            pixels = level.asarray()
            glass = passport.mask.glass(2.0**index, 0, 0, *pixels.shape[:2])
            difference = np.abs(pixels - expected).max(-1)[~glass]
            assert difference.max() <= 1.5  # averages of averages round twice
            assert (pixels[glass] == passport.mask.background).all()
            h, w = (side // 2 * 2 for side in expected.shape[:2])
            expected = expected[:h, :w].reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3))


@pytest.mark.parametrize("method", ["otsu", "network"])
def test_a_slide_of_glass_alone(tmp_path: Path, method: str) -> None:
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(240, 1, (400, 500, 3)), 0, 255).astype(np.uint8)
    source = write_coarse(tmp_path / "a.svs", image)
    target = tmp_path / "a.ome.tiff"
    report = convert(source, target, ConvertSettings(glass="drop", tissue=method))
    assert report.tissue_share == 0
    assert set(report.modes) == {"shared glass"}
    with open_slide(target) as slide:
        pixels = slide.read_region(0, 0, 0, 400, 500).astype(int)
    assert np.abs(pixels - 240).max() <= 2


def test_floor_holds_with_glass_filled(slide: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.ome.tiff"
    settings = ConvertSettings(
        glass="drop", tissue="otsu", quality=20, floor_ssim=0.96, tile_size=64
    )
    report = convert(slide, target, settings)
    assert report.below_floor == 0
    checked = verify(target, slide)
    assert checked.ok
    assert checked.overall is not None
    assert checked.overall.ssim_worst.ssim >= 0.96 - 1e-9
