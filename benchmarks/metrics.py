"""Figures that only benchmarks need: MS-SSIM, CIEDE2000, Bjøntegaard rate differences.

PSNR and SSIM are those of ``wsicodec.metrics``: one definition for reports, files and benchmarks.
Needs scipy and scikit-image (``pip install "wsicodec[benchmark]"``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from wsicodec.metrics import DATA_RANGE, PSNR_OF_EQUAL, SIGMA, WINDOW, luma

Image = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float64]

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first: Wang, Simoncelli & Bovik, Asilomar 2003, table."""
MS_SSIM_MIN_SIDE = WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
"""The window must fit into the coarsest scale: 176 pixels."""
MIN_POINTS = 8
"""Curves of fewer points have no BD-rate here: interpolation would invent it."""
SSIM_CEILING_DB = 60.0
"""1 - SSIM below 1e-6 is rounding."""

METRIC_ARGUMENTS: dict[str, object] = {
    "ms_ssim": {
        "paper": "Wang, Simoncelli, Bovik 2003",
        "weights": list(MS_SSIM_WEIGHTS),
        "channel": "luma BT.601, float64",
        "win_size": WINDOW,
        "sigma": SIGMA,
        "use_sample_covariance": False,
        "downsampling": "mean of 2 x 2 pixels, an odd last row or column dropped",
        "smallest_side": MS_SSIM_MIN_SIDE,
        "unit": "per tile",
    },
    "ciede2000": "skimage.color.deltaE_ciede2000 of rgb2lab, D65, 2 degrees",
    "bd_rate": {
        "rate": "ln(bits per pixel)",
        "psnr": "dB",
        "ssim, ms_ssim": "-10 log10(1 - value)",
        "interpolation": "PCHIP and Akima, integrated exactly",
        "points": f"at least {MIN_POINTS}, those not better than a cheaper one dropped",
    },
}


# -- structural similarity on five scales --


def _smooth(plane: Plane) -> Plane:
    """Gaussian mean where the whole window fits."""
    from scipy.ndimage import correlate1d

    centre = WINDOW // 2
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - centre) / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        plane = correlate1d(plane, weights, axis)
    return plane[centre:-centre, centre:-centre]


def _similarities(x: Plane, y: Plane) -> tuple[float, float]:
    """(luminance x contrast x structure, contrast x structure), each the mean over the plane."""
    ux, uy = _smooth(x), _smooth(y)
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    vx, vy = _smooth(x * x) - ux * ux, _smooth(y * y) - uy * uy
    structure = (2 * (_smooth(x * y) - ux * uy) + c2) / (vx + vy + c2)
    luminance = (2 * ux * uy + c1) / (ux * ux + uy * uy + c1)
    return float((luminance * structure).mean()), float(structure.mean())


def _halve(plane: Plane) -> Plane:
    rows, columns = (side // 2 for side in plane.shape)
    blocks = plane[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2)
    halved: Plane = blocks.mean((1, 3))
    return halved


def ms_ssim(reference: Image, other: Image) -> float:
    """Multi-scale SSIM of the luma of two uint8 RGB images; at most 1.

    nan when a side is below 176 pixels. A negative mean, possible for unlike images, counts as 0.
    Raises ValueError for shapes that differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"images of {reference.shape} and {other.shape} cannot be compared")
    if min(reference.shape[:2]) < MS_SSIM_MIN_SIDE:
        return math.nan
    x, y = luma(reference), luma(other)
    product = 1.0
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        whole, structure = _similarities(x, y)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        product *= max(whole if last else structure, 0.0) ** weight
        x, y = _halve(x), _halve(y)
    return product


# -- colour --


def ciede2000(reference: Image, other: Image) -> tuple[float, float]:
    """(mean, 95th percentile) over the pixels of the CIEDE2000 colour difference."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    labs = rgb2lab(reference), rgb2lab(other)
    difference = deltaE_ciede2000(*labs)  # type: ignore[no-untyped-call]
    return float(difference.mean()), float(np.percentile(difference, 95))


# -- rate differences --


def ssim_db(value: float) -> float:
    """SSIM on a scale on which rate-distortion curves are nearly straight: -10 log10(1 - SSIM)."""
    return min(-10 * math.log10(max(1 - value, 1e-12)), SSIM_CEILING_DB)


QUALITY_SCALES = {
    "psnr": lambda value: min(value, PSNR_OF_EQUAL),
    "ssim": ssim_db,
    "ms_ssim": ssim_db,
}


@dataclass(frozen=True)
class BdRate:
    """Mean rate difference in per cent of one curve against another; negative is fewer bytes.

    pchip, akima: by the two interpolations; far apart, neither is to be trusted. nan without
    overlap. low, high: the qualities that both curves cover, over which the mean is taken.
    coverage: that interval as a share of the narrower curve's.
    """

    pchip: float
    akima: float
    low: float
    high: float
    coverage: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def rising(points: Sequence[tuple[float, float]]) -> tuple[Plane, Plane]:
    """(qualities, rates) of (rate, quality) points, both rising.

    Points that cost as much as a better one, or more, are dropped, and those with nan.
    """
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        better = not kept or (rate > kept[-1][0] and quality > kept[-1][1])
        if better and not math.isnan(quality):
            kept.append((rate, quality))
    rates, qualities = np.array(kept).reshape(-1, 2).T
    return qualities, rates


def bd_rate(
    reference: Sequence[tuple[float, float]], tested: Sequence[tuple[float, float]]
) -> BdRate:
    """Bjøntegaard rate difference of ``tested`` against ``reference``, in per cent.

    Curves of (rate, quality) points in any order, rate in any unit above 0, quality on a scale
    such as dB: see QUALITY_SCALES. Figures are nan where the curves share no quality.

    Raises ValueError for a curve of fewer than MIN_POINTS points, or fewer than four that rise.
    """
    from scipy.interpolate import Akima1DInterpolator, PchipInterpolator

    curves = []
    for name, points in (("reference", reference), ("tested", tested)):
        qualities, rates = rising(points)
        if len(points) < MIN_POINTS or len(qualities) < 4:
            raise ValueError(
                f"{name} curve has {len(points)} points, {len(qualities)} of them rising; "
                f"a BD-rate needs {MIN_POINTS} and 4"
            )
        curves.append((qualities, np.log(rates)))
    (q_ref, _), (q_new, _) = curves
    low, high = max(q_ref[0], q_new[0]), min(q_ref[-1], q_new[-1])
    width = high - low
    if width <= 1e-9:
        return BdRate(math.nan, math.nan, float(low), float(high), 0.0)
    means = []
    for interpolator in (PchipInterpolator, Akima1DInterpolator):
        before, after = (float(interpolator(q, r).integrate(low, high)) for q, r in curves)
        means.append(100 * math.expm1((after - before) / width))
    coverage = width / min(q[-1] - q[0] for q, _ in curves)
    return BdRate(means[0], means[1], float(low), float(high), float(coverage))


def rate_at(points: Sequence[tuple[float, float]], quality: float) -> float:
    """Rate at which a curve of (rate, quality) points reaches a quality.

    Linear in the logarithm of the rate: give SSIM on the scale of ``ssim_db``, on which curves are
    straighter. nan where the curve does not reach, or starts above it.
    """
    qualities, rates = rising(points)
    if not len(qualities) or not qualities[0] <= quality <= qualities[-1]:
        return math.nan
    return math.exp(float(np.interp(quality, qualities, np.log(rates))))


def value_at(points: Sequence[tuple[float, float]], rate: float) -> float:
    """Value of a curve of (rate, value) points at a rate within it, linear in ln(rate)."""
    rates, values = np.array(sorted(points)).T
    return float(np.interp(math.log(rate), np.log(rates), values))
