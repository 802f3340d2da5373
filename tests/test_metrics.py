"""PSNR and SSIM against scikit-image, whose figures they must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsicodec import metrics
from wsicodec.errors import UnsupportedError


def _pair(rows: int, columns: int, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = rng.normal(160, 40, (rows // 4 + 1, columns // 4 + 1, 3))
    image = np.kron(smooth, np.ones((4, 4, 1)))[:rows, :columns]
    other = image + rng.normal(0, noise, image.shape)
    as_bytes = [np.clip(np.rint(a), 0, 255).astype(np.uint8) for a in (image, other)]
    return as_bytes[0], as_bytes[1]


def _reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    weights = np.array([0.299, 0.587, 0.114])
    return float(
        structural_similarity(
            a.astype(np.float64) @ weights,
            b.astype(np.float64) @ weights,
            win_size=11,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
    )


@settings(max_examples=30)
@given(
    rows=st.integers(11, 70),
    columns=st.integers(11, 70),
    seed=st.integers(0, 1000),
    noise=st.floats(0, 60),
)
def test_ssim_is_that_of_scikit_image(rows: int, columns: int, seed: int, noise: float) -> None:
    a, b = _pair(rows, columns, seed, noise)
    assert metrics.ssim(a, b) == pytest.approx(_reference_ssim(a, b), abs=1e-9)


def test_ssim_of_whole_tiles_is_that_of_scikit_image() -> None:
    for noise in (1.0, 8.0, 40.0):
        a, b = _pair(256, 256, 5, noise)
        assert metrics.ssim(a, b) == pytest.approx(_reference_ssim(a, b), abs=1e-12)


def test_extremes_of_black_and_white() -> None:
    a, b = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    assert metrics.ssim(a, b) == pytest.approx(_reference_ssim(a, b), abs=1e-9)
    assert metrics.psnr(a, b) == 0


def test_psnr_is_that_of_scikit_image() -> None:
    peak = pytest.importorskip("skimage.metrics").peak_signal_noise_ratio
    a, b = _pair(100, 77, 1, 12)
    assert metrics.psnr(a, b) == pytest.approx(peak(a, b, data_range=255), abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (10, 10), (10, 64), (3, 11)])
def test_images_below_the_window_are_mirrored(shape: tuple[int, int]) -> None:
    a, b = _pair(*shape, seed=3, noise=20)
    assert metrics.ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert -1 <= metrics.ssim(a, b) < 1

    grown = [
        np.pad(
            image,
            [(max(0, 11 - n) // 2, max(0, 11 - n) - max(0, 11 - n) // 2) for n in shape] + [(0, 0)],
            mode="symmetric",
        )
        for image in (a, b)
    ]
    assert metrics.ssim(a, b) == pytest.approx(_reference_ssim(*grown), abs=1e-9)


def test_equal_images() -> None:
    a, _ = _pair(40, 40, 2, 0)
    assert metrics.psnr(a, a) == math.inf
    assert metrics.ssim(a, a) == 1


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((20, 21, 3), np.uint8),
        np.zeros((20, 20, 3), np.uint16),
        np.zeros((20, 20), np.uint8),
        np.zeros((20, 20, 4), np.uint8),
    ],
    ids=["shape", "16-bit", "grey", "rgba"],
)
def test_unlike_images_are_refused(other: np.ndarray) -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    for metric in (metrics.psnr, metrics.ssim):
        with pytest.raises(UnsupportedError):
            metric(image, other)


def test_summary_names_the_worst_tiles() -> None:
    tiles = [metrics.TileQuality(0, 0, 256 * i, 30 + i, 0.9 + i / 1000) for i in range(50)]
    tiles[7] = metrics.TileQuality(0, 0, 7, 20.0, 0.95)
    tiles[9] = metrics.TileQuality(0, 0, 9, math.inf, 0.5)
    summary = metrics.summarise(tiles)
    assert summary is not None
    assert summary.psnr_worst is tiles[7]
    assert summary.ssim_worst is tiles[9]
    assert math.isfinite(summary.psnr_mean)
    assert metrics.summarise([]) is None
