"""Efforts: what each tries, and that more effort never buys worse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import wsicodec
from wsicodec.codec import fidelity
from wsicodec.codec.effort import Effort, effort_of, encode_best
from wsicodec.codec.network import Search, TileEncoder, decode_tile
from wsicodec.codec.options import MAX_EFFORT, TUNES
from wsicodec.codec.rate import ssim_decibels
from wsicodec.metrics import psnr, ssim
from wsicodec.models.store import encoder_of, find_model

EFFORTS = range(1, MAX_EFFORT + 1)


def crop(pixels: np.ndarray, top: int = 300, left: int = 500, side: int = 128) -> np.ndarray:
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


@pytest.fixture(scope="module")
def encoder() -> Any:
    return encoder_of(find_model("he-fast"))[1]


@pytest.fixture(scope="module")
def curves(pixels_of_slide: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """By tune and effort: (log bytes, PSNR, SSIM in decibels) at some gains, mean of two crops."""
    decoder, encoder = encoder_of(find_model("he-fast"))
    result = {}
    for tune in TUNES:
        for number in (1, 5, 6, 7):
            effort, rows = effort_of(number, tune, encoder), []
            for gain in (40, 50, 60, 70):
                row = []
                for top, left in ((300, 500), (500, 600)):
                    image = crop(pixels_of_slide, top, left)

                    def quality(coded: Any, image: np.ndarray = image, tune: str = tune) -> float:
                        if tune == "psnr":
                            return psnr(image, coded.pixels)
                        return ssim_decibels(ssim(image, coded.pixels))

                    tile = TileEncoder(image, decoder, encoder)
                    coded = encode_best(tile, gain, effort, quality)
                    decibels = ssim_decibels(ssim(image, coded.pixels))
                    row.append((math.log(len(coded.data)), psnr(image, coded.pixels), decibels))
                rows.append(np.mean(row, axis=0))
            result[tune, number] = np.array(rows)
    return result


@pytest.fixture(scope="module")
def pixels_of_slide() -> np.ndarray:
    import tifffile
    from slides import CMU

    image: np.ndarray = tifffile.imread(CMU)[900:1668, 700:1468]
    return image


def fewer(base: np.ndarray, other: np.ndarray, column: int) -> float:
    """Mean log bytes of ``other`` less ``base``'s at equal quality of a column."""
    low = max(base[0, column], other[0, column])
    high = min(base[-1, column], other[-1, column])
    at = np.linspace(low, high, 20)
    lines = [np.interp(at, c[:, column], c[:, 0]) for c in (other, base)]
    return float(np.mean(lines[0] - lines[1]))


@pytest.mark.parametrize("tune", TUNES)
def test_bytes_at_equal_quality_fall(curves: dict[Any, np.ndarray], tune: str) -> None:
    column = 1 if tune == "psnr" else 2
    base = curves[tune, 5]
    bytes_of = {n: fewer(base, curves[tune, n], column) for n in (1, 6, 7)}
    assert bytes_of[1] > 0.015
    assert bytes_of[6] < 0.005  # a second pass pays a little, more for PSNR
    assert bytes_of[7] < bytes_of[6] + 0.005


def test_tunes_win_what_they_are_for(curves: dict[tuple[str, int], np.ndarray]) -> None:
    balanced, by_ssim, by_psnr = (curves[tune, 5] for tune in TUNES)
    assert fewer(by_ssim, by_psnr, 1) < -0.02
    assert fewer(by_ssim, by_psnr, 2) > 0.02
    assert fewer(balanced, by_psnr, 1) < -0.005 and fewer(balanced, by_ssim, 1) > 0.005
    assert fewer(balanced, by_ssim, 2) < -0.005 and fewer(balanced, by_psnr, 2) > 0.005


@pytest.mark.parametrize("effort", EFFORTS)
def test_every_effort_decodes_to_what_the_encoder_saw(effort: int, pixels: np.ndarray) -> None:
    decoder, encoder = encoder_of(find_model("he-fast"))
    image = crop(pixels, side=80)
    tile = TileEncoder(image, decoder, encoder)
    for tune in TUNES:
        coded = tile.encode(58, effort_of(effort, tune, encoder).first)
        np.testing.assert_array_equal(coded.pixels, decode_tile(coded.tile, decoder))
    first, second = (wsicodec.encode(image, effort=effort) for _ in range(2))
    assert first == second


def test_effort_5_is_the_default(pixels: np.ndarray) -> None:
    image = crop(pixels, side=64)
    assert wsicodec.encode(image) == wsicodec.encode(image, effort=5)
    assert wsicodec.encode(image, effort=1) != wsicodec.encode(image, effort=5)


@pytest.mark.parametrize("tune", TUNES)
def test_some_efforts_are_the_same(encoder: Any, tune: str) -> None:
    efforts = [effort_of(n, tune, encoder) for n in EFFORTS]
    groups = [[n for n in EFFORTS if effort_of(n, tune, encoder) == e] for e in efforts]
    assert groups == [[1, 2]] * 2 + [[3, 4, 5]] * 3 + [[6], [7], [8], [9]]


@pytest.mark.parametrize("tune", TUNES)
def test_efforts_try_more_and_more(encoder: Any, tune: str) -> None:
    efforts = [effort_of(n, tune, encoder) for n in EFFORTS]
    assert [len(e.others) for e in efforts] == [0, 0, 0, 0, 0, 0, 2, 4, 8]
    assert [e.first.passes for e in efforts] == [1] * 5 + [2] * 4
    assert [e.first.hyper for e in efforts] == [False] * 2 + [True] * 7
    for effort in efforts:
        tried = [effort.first, *effort.others]
        assert len(set(tried)) == len(tried)
        assert all(0 <= s.strength <= 1 and s.lagrange > 0 for s in tried)


@pytest.mark.parametrize("effort", [0, 10, 5.0, "5", True, None])
def test_efforts_out_of_range_are_named(effort: object) -> None:
    with pytest.raises(wsicodec.SettingsError, match="effort"):
        wsicodec.encode(np.zeros((16, 16, 3), np.uint8), effort=effort)


@dataclass(frozen=True)
class Made:
    """A tile that never was."""

    size: int
    decibels: float

    @property
    def data(self) -> bytes:
        return bytes(self.size)


class Lines:
    """Encodes on lines: 2 % more bytes and 0.1 dB a gain index, shifted by the search."""

    def __init__(self, shifts: dict[float, tuple[float, float]]) -> None:
        self.shifts = shifts
        self.count = 0

    def encode(self, gain: int, search: Search) -> Made:
        self.count += 1
        byte_shift, shift = self.shifts[search.lagrange]
        return Made(round(10_000 * math.exp(0.02 * gain + byte_shift)), 0.1 * gain + shift)


def best_on_lines(shifts: dict[float, tuple[float, float]], gain: int = 50) -> tuple[Made, Lines]:
    searches = [Search(0.5, lagrange) for lagrange in shifts]
    lines = Lines(shifts)
    effort = Effort(searches[0], tuple(searches[1:]))
    best: Any = encode_best(lines, gain, effort, lambda c: c.decibels)  # type: ignore[arg-type,attr-defined]
    return best, lines


def test_the_cheapest_at_equal_quality_is_kept() -> None:
    # the second takes 5 % more bytes for 0.4 dB, worth 8 %; the third nothing for 0.1 dB less
    best, _ = best_on_lines({1.0: (0, 0), 2.0: (0.05, 0.4), 3.0: (0.0, -0.1)})
    first = Lines({1.0: (0, 0)}).encode(50, Search(0.5, 1.0))
    assert 0 <= best.decibels - first.decibels < 0.1 + 1e-9
    assert best.size < first.size


def test_the_first_is_kept_where_nothing_is_cheaper() -> None:
    best, lines = best_on_lines({1.0: (0, 0), 2.0: (0.03, 0.0), 3.0: (0.2, 0.3)})
    assert best == Lines({1.0: (0, 0)}).encode(50, Search(0.5, 1.0))
    assert lines.count <= 2 + 2 * 2


def test_one_search_is_one_encode() -> None:
    best, lines = best_on_lines({1.0: (0, 0)})
    assert lines.count == 1 and best.decibels == pytest.approx(5.0)


def test_flat_quality_ends_the_search() -> None:
    lines = Lines({1.0: (0, 0), 2.0: (-0.5, 9.0)})
    searches = [Search(0.5, lagrange) for lagrange in (1.0, 2.0)]
    effort = Effort(searches[0], (searches[1],))
    best: Any = encode_best(lines, 50, effort, lambda c: 100.0)  # type: ignore[arg-type]
    assert best.decibels == pytest.approx(5.0) and lines.count == 2


@pytest.mark.parametrize("shape", [(11, 11), (11, 40), (37, 12), (10, 50), (1, 1), (128, 64)])
def test_quick_ssim_is_the_ssim_of_reports(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    for spread in (0, 3, 80):
        noise = rng.integers(-spread, spread + 1, image.shape)
        other = np.clip(image + noise, 0, 255).astype(np.uint8)
        assert fidelity.ssim(image, other) == pytest.approx(ssim(image, other), abs=1e-12)


def test_quick_ssim_of_real_pixels(pixels: np.ndarray) -> None:
    image, other = crop(pixels), crop(pixels, 301, 502)
    assert fidelity.ssim(image, other) == pytest.approx(ssim(image, other), abs=1e-12)
    assert fidelity.ssim(image, image) == pytest.approx(1, abs=1e-12)
