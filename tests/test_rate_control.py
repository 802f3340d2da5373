"""Rate control: targets in at most three encodes, presets, quality and targets together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wsicodec
from wsicodec.codec import PRESETS, network
from wsicodec.codec.rate import ENOUGH, MOST_ENCODES, SSIM_CEILING, reach, ssim_decibels
from wsicodec.metrics import psnr, ssim

TYPICAL = np.linspace(24, 60, 256)
TEXTURED = ((300, 500), (500, 600), (120, 300))
"""Corners of crops of the bundled slide that are not glass, where the coarsest tile is good."""


@settings(max_examples=300)
@given(
    target=st.floats(22, 58),
    height=st.floats(-8, 8),
    slope=st.floats(0.6, 1.6),
    bend=st.floats(-4, 4),
    noise=st.floats(0, 0.05),
    seed=st.integers(0, 100),
)
def test_at_most_three_encodes_reach_what_can_be_reached(
    target: float, height: float, slope: float, bend: float, noise: float, seed: int
) -> None:
    """Content whose curve is higher, lower, steeper or bent otherwise than the usual."""
    x = np.linspace(0, 1, 256)
    curve = 24 + height + 36 * slope * x + bend * np.sin(3 * x)
    curve = np.maximum.accumulate(curve + np.random.default_rng(seed).normal(0, noise, 256))
    gains: list[int] = []

    def encode(gain: int) -> tuple[float, int]:
        gains.append(gain)
        return float(curve[gain]), gain

    found = reach(target, encode, TYPICAL, 236)
    assert 1 <= len(gains) <= MOST_ENCODES and len(set(gains)) == len(gains)
    assert found.coded == found.gain and found.reached == curve[found.gain]
    reached = [g for g in gains if curve[g] >= target]
    # nothing smaller was at hand
    assert found.gain == (min(reached) if reached else max(gains, key=lambda g: curve[g]))
    if 0.75 < slope < 1.35 and abs(bend) < 2 and curve[228] >= target:
        assert found.reached >= target


def test_the_usual_content_takes_one_encode_and_a_shift_two() -> None:
    for shift, most in ((0.0, 1), (3.0, 2), (-3.0, 2)):
        gains = []

        def encode(gain: int, shift: float = shift, gains: list[int] = gains) -> tuple[float, int]:
            gains.append(gain)
            return float(TYPICAL[gain] + shift), gain

        found = reach(38.0, encode, TYPICAL, 236)
        assert len(gains) <= most
        assert 38 <= found.reached <= 38 + 2 * ENOUGH + 0.15  # a gain index is 0.14 dB


def test_out_of_reach_is_the_finest() -> None:
    found = reach(80.0, lambda gain: (float(TYPICAL[gain]), gain), TYPICAL, 236)
    assert found.gain == 236


def test_ssim_in_decibels() -> None:
    assert ssim_decibels(0.9) == pytest.approx(10)
    assert ssim_decibels(0.99) == pytest.approx(20)
    assert ssim_decibels(1.0) == SSIM_CEILING


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gains of all encodes of the learned codec."""
    gains: list[int] = []
    encode = network.TileEncoder.encode

    def recorded(self: Any, gain: int, *arguments: Any, **more: Any) -> Any:
        gains.append(gain)
        return encode(self, gain, *arguments, **more)

    monkeypatch.setattr(network.TileEncoder, "encode", recorded)
    return gains


@pytest.mark.parametrize("target", [30.0, 36.0, 44.0])
def test_target_psnr_of_real_tiles(target: float, pixels: np.ndarray, counted: list[int]) -> None:
    for top, left in TEXTURED:
        image = np.ascontiguousarray(pixels[top : top + 128, left : left + 128])
        counted.clear()
        tile = wsicodec.encode(image, target_psnr=target)
        assert 1 <= len(counted) <= MOST_ENCODES
        reached = psnr(image, wsicodec.decode(tile))
        assert target <= reached <= target + 2.5


@pytest.mark.parametrize("target", [0.9, 0.95, 0.99])
def test_target_ssim_of_real_tiles(target: float, pixels: np.ndarray, counted: list[int]) -> None:
    for top, left in TEXTURED:
        image = np.ascontiguousarray(pixels[top : top + 128, left : left + 128])
        counted.clear()
        tile = wsicodec.encode(image, target_ssim=target)
        assert 1 <= len(counted) <= MOST_ENCODES
        reached = ssim(image, wsicodec.decode(tile))
        assert target <= reached
        assert ssim_decibels(reached) <= ssim_decibels(target) + 2.5


def test_quality_never_costs_less_nor_looks_worse(pixels: np.ndarray) -> None:
    """Every quality against the one before it, on four tiles of real tissue.

    Their sum never falls. A single tile may, by what the search of its symbols finds by luck.
    """
    corners = [(0, 0), (0, 256), (300, 500), (512, 300)]
    tiles = [np.ascontiguousarray(pixels[y : y + 256, x : x + 256]) for y, x in corners]
    sizes, errors = np.zeros((100, 4)), np.zeros((100, 4))
    for quality in range(1, 101):
        for n, image in enumerate(tiles):
            data = wsicodec.encode(image, quality=quality, modes="learned")
            decoded = wsicodec.decode(data).astype(float)
            sizes[quality - 1, n] = len(data)
            errors[quality - 1, n] = ((decoded - image) ** 2).mean()
    assert (np.diff(sizes.sum(1)) >= 0).all()
    assert (np.diff(errors.sum(1)) <= 0).all()
    assert (sizes[1:] >= 0.995 * sizes[:-1]).all()
    assert (errors[1:] <= 1.015 * errors[:-1]).all()  # 0.06 dB
    assert len(set(sizes.sum(1).tolist())) > 50


def test_presets_are_qualities(pixels: np.ndarray) -> None:
    image = np.ascontiguousarray(pixels[:64, :64])
    for name, quality in PRESETS.items():
        assert wsicodec.encode(image, preset=name) == wsicodec.encode(image, quality=quality)
    assert wsicodec.encode(image) == wsicodec.encode(image, preset="diagnostic")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": 50, "preset": "archive"}, "quality and preset"),
        ({"quality": 50, "target_ssim": 0.9}, "quality and target_ssim"),
        ({"preset": "archive", "target_psnr": 40}, "preset and target_psnr"),
        ({"target_psnr": 40, "target_ssim": 0.9}, "exclude each other"),
        ({"preset": "best"}, "preset"),
        ({"target_psnr": 9}, "target_psnr"),
        ({"target_psnr": float("nan")}, "target_psnr"),
        ({"target_ssim": 1.0}, "target_ssim"),
        ({"target_ssim": "high"}, "target_ssim"),
        ({"target_ssim": True}, "target_ssim"),
        ({"modes": "all"}, "modes"),
        ({"effort": 0}, "effort"),
        ({"speed": 3}, "speed"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(wsicodec.SettingsError, match=words):
        wsicodec.encode(np.zeros((16, 16, 3), np.uint8), **options)
