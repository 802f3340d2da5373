"""Content that is not tissue: never larger than the best other mode of equal quality."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

import wsicodec
from wsicodec.bitstream import Mode, parse
from wsicodec.codec import fallback
from wsicodec.codec.fallback import Candidate, better_mode, coarsest, measured, suspicions
from wsicodec.codec.reference import REFERENCE_CODECS
from wsicodec.errors import RuntimeMissingError
from wsicodec.metrics import psnr, ssim

SIDE = 128


def text_label() -> np.ndarray:
    """Black strokes of one pixel's hardness on white, as on a slide's label."""
    rng = np.random.default_rng(1)
    image = np.full((SIDE, SIDE, 3), 255, np.uint8)
    for top in range(6, SIDE - 12, 16):
        for left in range(4, SIDE - 8, 9):
            glyph = rng.random((5, 3)) < 0.55
            stroke = np.kron(glyph, np.ones((2, 2), bool))
            image[top : top + 10, left : left + 6][stroke] = 0
    return image


def marker_pen() -> np.ndarray:
    """A broad stroke of saturated ink, soft at its edge, on glass."""
    y, x = np.mgrid[:SIDE, :SIDE]
    cover = 1 / (1 + np.exp((np.abs(y - 0.4 * x - 40) - 22) / 1.5))
    glass, ink = np.array([243.0, 240, 244]), np.array([20.0, 60, 210])
    image = glass + cover[..., None] * (ink - glass)
    return np.clip(image + np.random.default_rng(2).normal(0, 1, image.shape), 0, 255).astype("u1")


def fluorescence() -> np.ndarray:
    """Dim spots of two colours on black, with a camera's noise."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.zeros((SIDE, SIDE, 3))
    for _ in range(25):
        cy, cx, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(3, 9)
        spot = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * r * r))
        image += spot[..., None] * ((0, 40, 200) if rng.random() < 0.6 else (0, 150, 20))
    return np.clip(image + rng.normal(3, 1.5, image.shape), 0, 255).astype(np.uint8)


def noise() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def checkerboard() -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.repeat((((x // 4 + y // 4) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)


def fine_checkerboard() -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.repeat((((x + y) % 2) * 200 + 20).astype(np.uint8)[..., None], 3, axis=2)


def black_with_a_speck() -> np.ndarray:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[40:43, 70:73] = (90, 0, 10)
    return image


CONTENT: dict[str, Callable[[], np.ndarray]] = {
    f.__name__: f
    for f in (
        text_label, marker_pen, fluorescence, noise, checkerboard, fine_checkerboard,
        black_with_a_speck,
    )
}  # fmt: skip


@pytest.mark.parametrize("quality", [30, 70, 90])
@pytest.mark.parametrize("content", CONTENT)
def test_never_larger_than_another_mode_of_equal_quality(content: str, quality: int) -> None:
    """Against every quality of every mode: none has both figures as good in fewer bytes."""
    image = CONTENT[content]()
    tile = wsicodec.encode(image, quality=quality)
    pixels = wsicodec.decode(tile)
    height, structure = psnr(image, pixels), ssim(image, pixels)
    exact = REFERENCE_CODECS["lossless"].encode(image, quality=100, lossless=True)
    assert len(tile) <= len(exact) + 18
    for name, options in (("jpegxl", {}), ("jpeg2000", {}), ("jpeg", {"subsampling": "444"})):
        for level in range(5, 101, 5):
            other = REFERENCE_CODECS[name].encode(image, quality=level, **options)
            if len(other) + 18 >= len(tile):
                continue
            seen = REFERENCE_CODECS[name].decode(other)
            worse = psnr(image, seen) < height or ssim(image, seen) < structure
            assert worse, f"{name} at {level}: {len(other)} bytes, ours {len(tile)}"


@pytest.mark.parametrize("content", CONTENT)
def test_a_fallback_is_as_good_as_the_learned_tile(content: str) -> None:
    image = CONTENT[content]()
    learned = wsicodec.encode(image, modes="learned")
    chosen = wsicodec.encode(image)
    assert parse(learned).mode is Mode.LEARNED
    assert len(chosen) <= len(learned)
    ours, theirs = wsicodec.decode(chosen), wsicodec.decode(learned)
    assert psnr(image, ours) >= psnr(image, theirs)
    assert ssim(image, ours) >= ssim(image, theirs)


@pytest.mark.parametrize("content", CONTENT)
def test_it_looks_suspicious(content: str) -> None:
    assert suspicions(CONTENT[content]())


def test_tissue_and_glass_do_not(pixels: np.ndarray) -> None:
    for top in range(0, 768 - 127, 128):
        for left in range(0, 768 - 127, 128):
            tile = np.ascontiguousarray(pixels[top : top + 128, left : left + 128])
            assert suspicions(tile) in ([], ["drawing"])
    glass = np.random.default_rng(5).normal(240, 1.2, (128, 128, 3)).astype(np.uint8)
    assert suspicions(glass) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 2), (17, 3)])
def test_any_size_can_be_looked_at(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(6).integers(0, 256, (*shape, 3)).astype(np.uint8)
    suspicions(image)
    assert wsicodec.decode(wsicodec.encode(image)).shape == image.shape


def test_without_reference_codecs_tiles_stay_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> bytes:
        raise RuntimeMissingError("imagecodecs is not installed")

    image = text_label()
    for codec in REFERENCE_CODECS.values():
        monkeypatch.setattr(codec, "encode", missing)
    assert parse(wsicodec.encode(image)).mode is Mode.LEARNED


def test_ordinary_tiles_try_nothing(pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a fallback was tried")

    monkeypatch.setattr(fallback, "better_mode", never)
    wsicodec.encode(np.ascontiguousarray(pixels[300:428, 500:628]))


def test_the_search_finds_the_lowest_quality() -> None:
    tile = parse(wsicodec.encode(np.zeros((4, 4, 3), np.uint8)))

    def at(quality: int) -> Candidate:
        asked.append(quality)
        return Sized(tile, float(quality), 1.0, 10 * quality)

    class Sized(Candidate):
        def __init__(self, tile: object, psnr: float, ssim: float, size: int) -> None:
            super().__init__(tile, psnr, ssim)  # type: ignore[arg-type]
            object.__setattr__(self, "bytes", size)

        @property
        def size(self) -> int:
            return self.bytes  # type: ignore[attr-defined, no-any-return]

    for wanted in range(1, 101):
        asked: list[int] = []
        found = coarsest(at, lambda c, wanted=wanted: wanted - c.psnr, 10_000)  # type: ignore[misc]
        assert found is not None and found.psnr == wanted and len(asked) <= 6
        asked = []  # steps of very unlike worth
        found = coarsest(at, lambda c, w=wanted: (w - c.psnr) ** 3, 10_000)  # type: ignore[misc]
        assert found is not None and found.psnr == wanted and len(asked) <= 11
        asked = []  # only good or not
        found = coarsest(
            at,
            lambda c, w=wanted: math.inf if c.psnr < w else -math.inf,  # type: ignore[misc]
            10_000,
        )
        assert found is not None and found.psnr == wanted and len(asked) <= 11
    asked = []
    assert coarsest(at, lambda c: 60 - c.psnr, 500) is None and len(asked) <= 3
    assert coarsest(at, lambda c: 1.0, 10_000) is None
    assert coarsest(at, lambda c: math.nan, 10_000) is None


def test_a_smaller_lossless_tile_wins() -> None:
    image = checkerboard()
    learned = parse(wsicodec.encode(image, modes="learned", quality=100))
    best = better_mode(image, measured(learned, wsicodec.decode(learned.pack()), image))
    assert best.tile.mode is Mode.LOSSLESS and best.psnr == float("inf")
