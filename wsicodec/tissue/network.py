"""Tissue by a small network (docs/tissue.md), run by onnxruntime on parts of bounded size.

The network sees RGB at about 8 µm per pixel and answers for every two by two cells.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsicodec.errors import ModelError, RuntimeMissingError
from wsicodec.models.session import GraphRunner
from wsicodec.slide.protocol import Image
from wsicodec.tissue.classical import coloured, glass_colour, unlike_glass, unscanned
from wsicodec.tissue.morphology import bands, dilated, spread, without_specks

Bools = npt.NDArray[np.bool_]

SHIPPED = Path(__file__).parent / "shipped" / "tissue.onnx"
SHA256 = "0634f2d5823baa3f52c6a33d9ea1acdfa9c390a8eff3d0a7742edb63f7097d06"
OPERATORS = frozenset({"Cast", "Concat", "Conv", "DepthToSpace", "Relu"})
STRIDE = 32  # cells per step of the coarsest layer
CORE, MARGIN = 512, 64  # cells answered for at a time; cells seen around them
THRESHOLD = -2.0  # logit: one chance in eight is tissue, for what is lost is lost for good
SPREAD_CELLS = 16  # from what was found on into what thresholds take for tissue: thin walls of fat
SPECK_CELLS = 6
ISLET_RADIUS = 6  # cells
OPAQUE = 0.28  # share of the glass's light: where less passes in all colours, nobody knows ink
# from silver stain, and both are kept


def tissue_by_network(overview: Image) -> Bools:
    """bool (rows, columns): True where a cell of about 8 µm holds tissue.

    Raises RuntimeMissingError without onnxruntime, ModelError when the network's file is not the
    one that was shipped.
    """
    scanned = ~unscanned(overview)
    glass = glass_colour(overview, scanned)
    if glass is None:  # fluorescence, or tissue from border to border
        return scanned
    runner = _runner()
    rows, columns = scanned.shape
    tissue = np.empty((rows, columns), np.bool_)
    for y in range(0, rows, CORE):
        for x in range(0, columns, CORE):
            height, width = min(CORE, rows - y), min(CORE, columns - x)
            seen = _tile(overview, y, x, _rounded_up(height), _rounded_up(width))
            try:
                (logits,) = runner({"features": features(seen, glass)[None]})
            except RuntimeMissingError as error:
                raise RuntimeMissingError(
                    f"{error}; or find tissue with the method 'otsu', which needs no network"
                ) from None
            inside = logits[0, 0, MARGIN // 2 :, MARGIN // 2 :]
            found = (inside >= THRESHOLD).repeat(2, axis=0).repeat(2, axis=1)
            tissue[y : y + height, x : x + width] = found[:height, :width]
    darkest = np.array([OPAQUE * level for level in glass], np.uint8)
    for band in bands(rows):
        tissue[band] |= (overview[band] < darkest).all(axis=2)
    tissue &= scanned
    unlike = unlike_glass(overview, glass, scanned)
    tissue |= _islets(unlike & coloured(overview, glass) & ~tissue)
    return spread(without_specks(tissue, SPECK_CELLS), unlike, SPREAD_CELLS)


def _islets(stained: Bools) -> Bools:
    """Without areas that a disc fits into: those are ink, as the network says; islets may not be.

    A few cells say too little for the network to tell a cluster of cells from dust.
    """
    inside = ~dilated(~stained, ISLET_RADIUS)
    return stained & ~dilated(inside, 2.5 * ISLET_RADIUS)


def features(image: Image, glass: tuple[float, float, float]) -> npt.NDArray[np.float32]:
    """What the network sees of RGB (rows, columns, 3): float32 (6, rows, columns).

    Loss of light against the glass, per channel; and the same eight times as strong, cut off, in
    which pale tissue is as plain as dark one.
    """
    light = image.transpose(2, 0, 1).astype(np.float32)
    lost = np.float32(1) - light / np.array(glass, np.float32)[:, None, None]
    np.clip(lost, -0.25, 1, out=lost)
    return np.concatenate([lost, np.clip(8 * lost, -1, 1)])


@functools.cache
def _runner() -> GraphRunner:
    graph = SHIPPED.read_bytes()
    if hashlib.sha256(graph).hexdigest() != SHA256:
        raise ModelError(f"{SHIPPED}: not the tissue network of this release; install it again")
    return GraphRunner(graph)


def _rounded_up(cells: int) -> int:
    return -(-cells // STRIDE) * STRIDE


def _tile(overview: Image, y: int, x: int, height: int, width: int) -> Image:
    """A part with MARGIN around; beyond the borders of the overview their cells go on."""
    rows = np.clip(np.arange(y - MARGIN, y + height + MARGIN), 0, overview.shape[0] - 1)
    columns = np.clip(np.arange(x - MARGIN, x + width + MARGIN), 0, overview.shape[1] - 1)
    return overview[rows[:, None], columns]
