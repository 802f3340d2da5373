"""Slides for the tests: the bundled one, made ones, and those of the data folder."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile

from wsicodec.slide.opening import open_slide

ROOT = Path(__file__).parent.parent
CMU = ROOT / "wsicodec" / "data" / "cmu-1-small-region.svs"
DATA = Path(os.environ.get("WSICODEC_DATA", ROOT.parent / "shared" / "data"))

DESCRIPTION = (
    "Aperio Image Library v11.2.1 \r\n1000x1000 [0,0 450x333] (240x240) JPEG/RGB Q=70"
    "|AppMag = 40|MPP = 0.2527|User = <a & b>|Date = 12/29/09"
)
ICC = bytes(range(256)) * 9


def data_slide(name: str) -> Path:
    """A slide of the data folder; the test is skipped where the folder is not there."""
    path = DATA / "slides" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there; set WSICODEC_DATA")
    return path


@functools.cache
def tissue(height: int, width: int, y: int = 1000, x: int = 800) -> np.ndarray:
    """Real pixels of the bundled slide."""
    with open_slide(CMU) as slide:
        image = slide.read_region(0, y, x, height, width)
    image.flags.writeable = False
    return image


def halved(image: np.ndarray) -> np.ndarray:
    """Area average by the plainest code there is."""
    height, width = image.shape[:2]
    out = np.empty((-(-height // 2), -(-width // 2), 3), np.uint8)
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            block = image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(-1, 3)
            out[y, x] = np.floor(block.mean(0, dtype=np.float64) + 0.5)
    return out


def write_svs(path: Path, image: np.ndarray, *, levels: int = 2, **changes: Any) -> Path:
    """A file as Aperio writes it: levels between a thumbnail, a label and a macro.

    Tiles of 240 x 240 without loss, so that pixels can be compared exactly.
    """
    settings: dict[str, Any] = {
        "photometric": "rgb",
        "compression": "deflate",
        "metadata": None,
        "software": False,
        **changes,
    }
    small = image[:: max(1, image.shape[0] // 40), :: max(1, image.shape[1] // 40)]
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            image,
            tile=(240, 240),
            description=DESCRIPTION,
            extratags=[(34675, 7, len(ICC), ICC, True)],
            **settings,
        )
        writer.write(small, description="Aperio\n450x333 -> 40x40 - |AppMag = 40", **settings)
        for level in range(1, levels):
            writer.write(
                image[:: 4**level, :: 4**level],
                tile=(240, 240),
                description="Aperio Image Library v11.2.1 \r\nlevel",
                **settings,
            )
        writer.write(small[:, :20], description="Aperio\r\nlabel 20x40", subfiletype=1, **settings)
        writer.write(small[:20], description="Aperio\r\nmacro 40x20", subfiletype=9, **settings)
    return path


def write_jpeg_tiff(path: Path, image: np.ndarray, **changes: Any) -> Path:
    """A tiled TIFF of YCbCr JPEG, 4:2:0."""
    tifffile.imwrite(
        path,
        image,
        photometric="rgb",
        tile=(128, 128),
        compression="jpeg",
        compressionargs={"level": 95},
        subsampling=(2, 2),
        metadata=None,
        **changes,
    )
    return path


def ycbcr(image: np.ndarray) -> np.ndarray:
    """Full-range BT.601 YCbCr as uint8."""
    r, g, b = (image[..., c].astype(np.float64) for c in range(3))
    y = 0.299 * r + 0.587 * g + 0.114 * b
    planes = [y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402]
    return np.clip(np.rint(np.stack(planes, -1)), 0, 255).astype(np.uint8)


def write_aperio_j2k(path: Path, image: np.ndarray, compression: int) -> Path:
    """One tile of Aperio's JPEG-2000: 33003 holds YCbCr, 33005 RGB, neither says so."""
    pixels = ycbcr(image) if compression == 33003 else image
    tile = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", mct=False)
    tifffile.imwrite(
        path,
        iter([bytes(tile)]),
        shape=image.shape,
        dtype="uint8",
        tile=image.shape[:2],
        photometric="rgb",
        compression=compression,
        description=DESCRIPTION,
        metadata=None,
    )
    return path


def nothing_left(folder: Path, *kept: str) -> None:
    """Assert that a folder holds nothing but these names."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(kept)
