"""Image fidelity, defined once: PSNR over RGB and SSIM on luma, per tile.

These are the figures that reports, files and benchmarks quote. ``METRIC_ARGUMENTS`` names them in
every quality record, so that a figure found in a file can be computed again elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsicodec.errors import UnsupportedError

Image = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float64]

WINDOW = 11
SIGMA = 1.5
DATA_RANGE = 255.0
LUMA = (0.299, 0.587, 0.114)

PSNR_OF_EQUAL = 100.0
"""dB counted for a tile without any error, where a mean or a JSON file needs a finite number."""

METRIC_ARGUMENTS: dict[str, dict[str, object]] = {
    "psnr": {"channels": "RGB", "data_range": 255, "equal_tiles_count_as": PSNR_OF_EQUAL},
    "ssim": {
        "implementation": "skimage.metrics.structural_similarity",
        "channel": "luma BT.601 = 0.299 R + 0.587 G + 0.114 B, float64",
        "win_size": WINDOW,
        "gaussian_weights": True,
        "sigma": SIGMA,
        "use_sample_covariance": False,
        "data_range": 255,
        "smaller_than_window": "mirrored to 11 pixels",
        "unit": "per tile, without its padding",
    },
}


def luma(image: Image) -> Plane:
    """BT.601 luma of a uint8 (rows, columns, 3) RGB image as float64 (rows, columns), 0 ... 255."""
    plane: Plane = image @ np.array(LUMA)
    return plane


def psnr(reference: Image, other: Image) -> float:
    """Peak signal-to-noise ratio in dB over all samples of two uint8 RGB images.

    ``math.inf`` for equal images. Raises UnsupportedError for shapes or types that differ.
    """
    _check_pair(reference, other)
    difference = reference.astype(np.int32) - other
    squares = int(np.square(difference).sum(dtype=np.int64))
    if squares == 0:
        return math.inf
    return 10 * math.log10(DATA_RANGE**2 * reference.size / squares)


def ssim(reference: Image, other: Image) -> float:
    """Mean structural similarity of the luma of two uint8 RGB images.

    The figure of scikit-image's ``structural_similarity(luma(a), luma(b), win_size=11,
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)``.
    Images with a side below 11 pixels, which scikit-image refuses, are first mirrored to 11.

    Raises UnsupportedError for shapes or types that differ.
    """
    _check_pair(reference, other)
    return float(_ssim_map(_at_least_window(luma(reference)), _at_least_window(luma(other))).mean())


def _check_pair(reference: Image, other: Image) -> None:
    for image in (reference, other):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UnsupportedError(
                f"metrics take uint8 (rows, columns, 3) images, not {image.dtype} {image.shape}"
            )
    if reference.shape != other.shape:
        raise UnsupportedError(f"images of {reference.shape} and {other.shape} cannot be compared")


def _gaussian() -> Plane:
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 / SIGMA**2 * offsets**2)
    normal: Plane = weights / weights.sum()
    return normal


_WEIGHTS = _gaussian()


def _smooth(plane: Plane) -> Plane:
    """Gaussian mean of a plane, where the whole window fits: each side loses 10 pixels.

    scikit-image filters the whole image and then crops the border that saw the mirrored edge;
    computing only what remains gives the same numbers.
    """
    centre = WINDOW // 2
    for axis in (0, 1):
        count = plane.shape[axis] - WINDOW + 1
        parts = [
            plane[i : i + count] if axis == 0 else plane[:, i : i + count] for i in range(WINDOW)
        ]
        total = _WEIGHTS[centre] * parts[centre]
        pair = np.empty_like(total)
        # the kernel is symmetric: add the two pixels first, then multiply once
        for offset in range(centre):
            np.add(parts[offset], parts[WINDOW - 1 - offset], out=pair)
            pair *= _WEIGHTS[offset]
            total += pair
        plane = total
    return plane


def _ssim_map(x: Plane, y: Plane) -> Plane:
    # one field at a time: a tile's field stays in the cache of a core
    ux, uy, uxx, uyy, uxy = (_smooth(field) for field in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    vx, vy, vxy = uxx - ux * ux, uyy - uy * uy, uxy - ux * uy
    similarity: Plane = ((2 * ux * uy + c1) * (2 * vxy + c2)) / (
        (ux * ux + uy * uy + c1) * (vx + vy + c2)
    )
    return similarity


def _at_least_window(plane: Plane) -> Plane:
    missing = [max(0, WINDOW - side) for side in plane.shape]
    if not any(missing):
        return plane
    return np.pad(plane, [(m // 2, m - m // 2) for m in missing], mode="symmetric")


@dataclass(frozen=True)
class TileQuality:
    """Fidelity of one tile. psnr: dB, inf when equal; ssim: at most 1.

    level: pyramid level; y, x: top left pixel of the tile in that level.
    """

    level: int
    y: int
    x: int
    psnr: float
    ssim: float

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; PSNR of equal tiles as PSNR_OF_EQUAL."""
        return {
            "level": self.level,
            "y": self.y,
            "x": self.x,
            "psnr": min(self.psnr, PSNR_OF_EQUAL),
            "ssim": self.ssim,
        }


@dataclass(frozen=True)
class QualitySummary:
    """Fidelity over tiles: mean, 1st percentile, and the worst tile with its position."""

    tiles: int
    psnr_mean: float
    psnr_p01: float
    psnr_worst: TileQuality
    ssim_mean: float
    ssim_p01: float
    ssim_worst: TileQuality

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "tiles": self.tiles,
            "psnr_mean": self.psnr_mean,
            "psnr_p01": self.psnr_p01,
            "psnr_worst": self.psnr_worst.as_dict(),
            "ssim_mean": self.ssim_mean,
            "ssim_p01": self.ssim_p01,
            "ssim_worst": self.ssim_worst.as_dict(),
        }


def summarise(tiles: Sequence[TileQuality]) -> QualitySummary | None:
    """Mean, 1st percentile and worst over tiles; None for no tiles.

    Equal tiles count as PSNR_OF_EQUAL dB: a mean with infinities would say nothing.
    """
    if not tiles:
        return None
    levels = np.array([min(tile.psnr, PSNR_OF_EQUAL) for tile in tiles])
    similarities = np.array([tile.ssim for tile in tiles])
    return QualitySummary(
        tiles=len(tiles),
        psnr_mean=float(levels.mean()),
        psnr_p01=float(np.percentile(levels, 1)),
        psnr_worst=tiles[int(levels.argmin())],
        ssim_mean=float(similarities.mean()),
        ssim_p01=float(np.percentile(similarities, 1)),
        ssim_worst=tiles[int(similarities.argmin())],
    )
