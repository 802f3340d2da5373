"""The quality floor: no tile of any file below it, whatever the slide shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from slides import nothing_left, tissue, write_svs

import wsicodec
from wsicodec import metrics
from wsicodec.bitstream import Mode
from wsicodec.convert import ConvertSettings, convert, verify
from wsicodec.convert.plan import LevelPlan
from wsicodec.convert.tiles import TileCoder
from wsicodec.errors import SlideError
from wsicodec.slide.opening import open_slide
from wsicodec.slide.passport import read_passport
from wsicodec.tissue.mask import TissueMask

SIZE = 64


def hard_tiles() -> dict[str, np.ndarray]:
    """(64, 64, 3) tiles of what is not tissue."""
    rng = np.random.default_rng(1)
    text = np.full((SIZE, SIZE, 3), 250, np.uint8)
    for y in range(4, 60, 9):
        for x in range(3, 60, 6):
            glyph = rng.integers(0, 2, (7, 5), np.uint8)[..., None] * np.uint8(240)
            text[y : y + 7, x : x + 5] -= glyph[: SIZE - y, : SIZE - x]
    spots = np.zeros((SIZE, SIZE, 3), np.uint8)
    for _ in range(40):
        y, x = rng.integers(0, SIZE, 2)
        spots[y, x] = rng.integers(60, 256, 3)
    y, x = np.mgrid[:SIZE, :SIZE]
    checks = np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, 2)
    return {
        "text": text,
        "noise": rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
        "fluorescence": spots,
        "checkerboard": checks,
        "black": np.zeros((SIZE, SIZE, 3), np.uint8),
        "ink": np.full((SIZE, SIZE, 3), (20, 30, 200), np.uint8)
        + rng.integers(0, 9, (SIZE, SIZE, 1), np.uint8),
    }


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tissue with hard tiles planted in it."""
    image = tissue(333, 450).copy()
    for number, tile in enumerate(hard_tiles().values()):
        y, x = divmod(number, 3)
        image[y * 128 : y * 128 + SIZE, x * 128 : x * 128 + SIZE] = tile
    return write_svs(tmp_path_factory.mktemp("svs") / "hard.svs", image)


@pytest.mark.parametrize("codec", ["learned", "jpegxl", "jpeg2000", "webp", "lossless"])
@pytest.mark.parametrize("floor", [{"floor_ssim": 0.97}, {"floor_ssim": 0.95, "floor_psnr": 38.0}])
def test_no_tile_is_below(slide: Path, tmp_path: Path, codec: str, floor: dict[str, float]) -> None:
    target = tmp_path / "a.ome.tiff"
    settings = ConvertSettings(codec, quality=30, tile_size=SIZE, **floor)
    if codec == "lossless":
        settings = ConvertSettings(codec, tile_size=SIZE, **floor)
    report = convert(slide, target, settings)
    assert report.below_floor == 0
    passport = read_passport(target)
    assert passport is not None
    # by other code than the conversion's: decoded from the file, measured by the slower metrics
    with open_slide(slide) as source, tifffile.TiffFile(target) as file:
        for index, level in enumerate(file.series[0].levels):
            decoded = level.asarray()
            original = source.read_region(index, 0, 0, *decoded.shape[:2])
            for y in range(0, decoded.shape[0], SIZE):
                for x in range(0, decoded.shape[1], SIZE):
                    area = np.s_[y : y + SIZE, x : x + SIZE]
                    ssim = metrics.ssim(original[area], decoded[area])
                    psnr = metrics.psnr(original[area], decoded[area])
                    assert ssim >= floor["floor_ssim"] - 1e-9
                    assert psnr >= floor.get("floor_psnr", 0) - 1e-9
                    told = passport.levels[index]
                    assert told.ssim[y // SIZE, x // SIZE] == pytest.approx(ssim, abs=1e-6)
    assert verify(target, slide).ok


def test_jpeg_says_what_it_cannot(slide: Path, tmp_path: Path) -> None:
    """4:2:0 loses the colours of ink and text at any quality."""
    with pytest.raises(SlideError, match=r"hard\.svs: level 0, tile at row .*does not reach"):
        convert(slide, tmp_path / "a.tiff", ConvertSettings("jpeg", floor_psnr=60))
    nothing_left(tmp_path)


class TestTile:
    LEVEL = LevelPlan(0, SIZE, SIZE, SIZE, 0, 1)

    @pytest.mark.parametrize("name", list(hard_tiles()))
    @pytest.mark.parametrize("floor", [0.9, 0.99, 0.99999, 1.0])
    def test_any_floor_is_reached(self, name: str, floor: float) -> None:
        """By the learned codec, or by JPEG XL and lossless where it cannot."""
        image = hard_tiles()[name]
        coded = TileCoder(ConvertSettings(floor_ssim=floor)).code(self.LEVEL, 0, 0, image)
        assert coded.data is not None
        assert metrics.ssim(image, wsicodec.decode(coded.data)) >= floor - 1e-12
        if floor == 1.0 and name != "black":
            assert coded.mode == Mode.LOSSLESS

    def test_a_tile_that_is_good_is_left_as_it_is(self) -> None:
        image = tissue(256, 256)
        level = LevelPlan(0, 256, 256, 256, 0, 1)
        unmeasured = LevelPlan(0, 256, 256, 256, 0, 0)
        plain = TileCoder(ConvertSettings(measure="none")).code(unmeasured, 0, 0, image)
        coded = TileCoder(ConvertSettings(floor_ssim=0.5)).code(level, 0, 0, image)
        assert coded.data == plain.data
        assert np.isnan(plain.ssim)

    def test_the_floor_takes_no_more_than_it_needs(self) -> None:
        """The tile just above the floor, not the finest one."""
        image = tissue(256, 256)
        level = LevelPlan(0, 256, 256, 256, 0, 1)
        settings = ConvertSettings(quality=10, floor_ssim=0.97)
        coded = TileCoder(settings).code(level, 0, 0, image)
        assert 0.97 <= coded.ssim < 0.98

    @pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (10, 12)])
    @pytest.mark.parametrize("codec", ["learned", "jpegxl"])
    def test_tiles_smaller_than_the_window_of_ssim(
        self, codec: str, shape: tuple[int, int]
    ) -> None:
        image = np.random.default_rng(3).integers(0, 256, (*shape, 3), np.uint8)
        settings = ConvertSettings(
            codec, quality=10, tile_size=SIZE, floor_ssim=0.97, floor_psnr=35
        )
        coded = TileCoder(settings).code(LevelPlan(0, *shape, SIZE, 0, 1), 0, 0, image)
        assert coded.data is not None
        decoded = wsicodec.decode(coded.data)[: shape[0], : shape[1]]
        assert metrics.psnr(image, decoded) >= 35
        assert coded.ssim >= 0.97

    @pytest.mark.parametrize("glass", ["fill", "drop"])
    @pytest.mark.parametrize("codec", ["jpeg", "webp", "jpegxl", "learned"])
    def test_glass_tiles_hold_it_too(self, codec: str, glass: str) -> None:
        """JPEG has colours that no quality holds exactly; they are refused as any tile would be."""
        background = (201, 17, 93)
        mask = TissueMask(np.zeros((2, 2), np.bool_), 256, "otsu", background)
        settings = ConvertSettings(codec, tile_size=SIZE, glass=glass, floor_psnr=60)
        coder = TileCoder(settings, mask, {0: 1.0})
        image = np.full((SIZE, SIZE, 3), 240, np.uint8)
        level = LevelPlan(0, SIZE, SIZE, SIZE, 0, 1)
        if codec == "jpeg":
            with pytest.raises(SlideError, match="jpeg does not reach the floor of PSNR 60"):
                coder.code(level, 0, 0, image)
            return
        coder.code(level, 0, 0, image)
        np.testing.assert_array_equal(wsicodec.decode(coder.glass_tile)[0, 0], background)

    def test_padding_is_not_measured(self) -> None:
        """A sliver of tissue at the slide's edge must be good by itself."""
        image = tissue(256, 256)[:, :20]
        level = LevelPlan(0, 256, 20, 256, 0, 1)
        settings = ConvertSettings(quality=10, floor_ssim=0.97, floor_psnr=36)
        coded = TileCoder(settings).code(level, 0, 0, np.ascontiguousarray(image))
        assert coded.data is not None
        decoded = wsicodec.decode(coded.data)[:, :20]
        assert metrics.ssim(image, decoded) >= 0.97
        assert metrics.psnr(image, decoded) >= 36
        assert coded.ssim == pytest.approx(metrics.ssim(image, decoded), abs=1e-9)
