"""Made overviews at 8 µm per pixel, by other rules than those of training: for tests and figures.

All give light that passes, float (rows, columns, 3) of 0 ... 1, but for ``glass``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsicodec.slide.opening import open_slide
from wsicodec.tissue.overview import read_overview

Floats = npt.NDArray[np.float64]
Colour = tuple[int, int, int]

BUNDLED = Path(__file__).parents[2] / "wsicodec" / "data" / "cmu-1-small-region.svs"
GLASS: Colour = (243, 241, 244)
ROWS, COLUMNS = 110, 120


def glass(height: int, width: int, colour: Colour = GLASS, seed: int = 0) -> Floats:
    """Grey levels of uneven glass with noise and a few specks of dust."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    light = 1 + 0.012 * np.sin(x / 90) + 0.008 * np.cos(y / 70)
    image = np.array(colour) * light[..., None] + rng.normal(0, 1.2, (height, width, 3))
    for top, left in rng.integers(0, (height, width), (6, 2)):
        image[top : top + 1, left : left + 2] *= 0.6
    return image


def section() -> Floats:
    """The bundled slide's tissue (H&E), (110, 120, 3)."""
    with open_slide(BUNDLED) as slide:
        overview = read_overview(slide, 16)
    light = overview / np.array([246.0, 243, 243])
    return np.clip(light[-ROWS:, :COLUMNS], 0.01, 1)


def pale() -> Floats:
    """The same with a fifth of its absorbance."""
    return np.asarray(section() ** 0.22)


def fat() -> Floats:
    """A net of thin walls, meshes of 60 µm."""
    y, x = np.mgrid[0:ROWS, 0:COLUMNS]
    shifted = x + (y // 7 % 2) * 4
    walls = ((y % 7 == 0) | (shifted % 8 == 0)).astype(float)
    return 1 - ndimage.gaussian_filter(walls, 0.5)[..., None] * np.array([0.04, 0.22, 0.12])


def mucus() -> Floats:
    """Streaks of pale blue."""
    noise = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(ROWS, COLUMNS)), (1.2, 6))
    streaks = 0.5 + 0.5 * np.abs(noise) / np.abs(noise).max()
    return 1 - streaks[..., None] * np.array([0.10, 0.09, 0.03])


def on_glass(light: Floats, place: tuple[int, int] = (150, 200)) -> tuple[Floats, Any]:
    """Grey levels of an overview of 400 x 500 with this on it, and bool where tissue is seen."""
    image = glass(400, 500)
    tissue = np.zeros(image.shape[:2], np.bool_)
    part = tuple(slice(p, p + n) for p, n in zip(place, light.shape, strict=False))
    image[part] *= light
    tissue[part] = light.min(axis=2) < 0.96
    return image, tissue


def pictured(image: Floats) -> npt.NDArray[np.uint8]:
    """Rounded to grey levels of 0 ... 255."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
