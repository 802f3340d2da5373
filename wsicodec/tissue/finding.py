"""Finds the tissue of a slide."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from wsicodec.errors import SettingsError
from wsicodec.slide.protocol import Image, SlideReader
from wsicodec.tissue.classical import Bools, tissue_by_otsu, unscanned
from wsicodec.tissue.mask import TissueMask
from wsicodec.tissue.morphology import bands, dilated
from wsicodec.tissue.overview import cell_of, micrometres_per_pixel, read_overview

METHODS = ("network", "otsu")
# beyond these margins the measured loss falls no further (docs/tissue.md)
DILATION_MICROMETRES: Mapping[str, float] = {"network": 40.0, "otsu": 80.0}
MAX_DILATION_MICROMETRES = 2000.0
WHITE = (255, 255, 255)


def find_tissue(
    slide: SlideReader,
    method: str = "network",
    *,
    dilation_um: float | None = None,
) -> TissueMask:
    """Where a slide holds tissue, on cells of about 8 µm.

    method: ``network`` (needs onnxruntime) or ``otsu``. dilation_um: margin around what was found,
    in µm; None: 40 for the network, 80 for otsu. Raises SettingsError for another method or margin,
    RuntimeMissingError without onnxruntime, SlideError where the slide cannot be read.
    """
    if method not in METHODS:
        raise SettingsError(f"no tissue method {method!r}; there are {', '.join(METHODS)}")
    if dilation_um is None:
        dilation_um = DILATION_MICROMETRES[method]
    if not 0 <= dilation_um <= MAX_DILATION_MICROMETRES:
        raise SettingsError(
            f"a margin of {dilation_um} µm is not within 0 ... {MAX_DILATION_MICROMETRES:g}"
        )
    cell = cell_of(slide.info)
    overview = read_overview(slide, cell)
    found = tissue_in(overview, method)
    tissue = dilated(found, dilation_um / (cell * micrometres_per_pixel(slide.info)))
    return TissueMask(tissue, cell, method, background_of(overview, tissue))


def tissue_in(overview: Image, method: str) -> Bools:
    """bool (rows, columns) of an RGB overview of about 8 µm per pixel, without a margin."""
    if method == "otsu":
        return tissue_by_otsu(overview)
    from wsicodec.tissue.network import tissue_by_network

    return tissue_by_network(overview)


def background_of(overview: Image, tissue: Bools) -> tuple[int, int, int]:
    """The slide's own glass: the median colour of cells outside of the tissue; white without."""
    glass = ~(tissue | unscanned(overview))
    counts = np.zeros((3, 256), np.int64)
    for rows in bands(len(overview)):
        for channel in range(3):
            levels = overview[rows, :, channel][glass[rows]]
            counts[channel] += np.bincount(levels, minlength=256)
    if counts[0].sum() < 16:
        return WHITE
    r, g, b = (int(np.searchsorted(np.cumsum(c), (c.sum() + 1) // 2)) for c in counts)
    return r, g, b
