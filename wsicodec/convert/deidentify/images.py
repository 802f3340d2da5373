"""Images beside a slide: which may stay, and what of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from wsicodec.convert.deidentify.cleaning import bare_jpeg
from wsicodec.errors import FormatError, UnsupportedError
from wsicodec.slide.protocol import SlideInfo, StoredImage
from wsicodec.slide.repacking import unpack

Image = npt.NDArray[np.uint8]

LABEL_SHARE = 0.42
"""Part of a macro's long side that is made white at the label's end.

A glass is 75 or 76 mm long, its label or frosted end at most 25 mm, and macros show up to 15 % more
than the glass: 0.33 x 0.85 + 0.15 = 0.43 would need the worst of both at the same end."""
_MACRO_RATIO = (2.0, 4.0)  # long by short side: 75 x 25 mm, more or less of the surroundings
_MARKED = 24  # levels by which a pixel differs from glass
_FAINT = 8  # below it there is not even pencil
_THUMBNAIL_RATIO = 0.03
_THUMBNAIL_CELLS, _THUMBNAIL_MEAN, _THUMBNAIL_WORST = 16, 12.0, 96.0


def image_kind(name: str) -> str:
    """``label``, ``macro``, ``thumbnail`` or ``unknown``, by what a reader calls an image."""
    text = name.casefold()
    for kind, words in (
        ("label", ("label", "barcode")),
        ("macro", ("macro", "overview")),
        ("thumbnail", ("thumbnail",)),
    ):
        if any(word in text for word in words):
            return kind
    return "unknown"


def shows_tissue_only(pixels: Image, info: SlideInfo, overview: Image | None) -> bool:
    """True for a picture of the scanned area and nothing else."""
    height, width = pixels.shape[:2]
    first = info.levels[0]
    ratio = (width / height) / (first.width / first.height)
    # a pixel of rounding is much in small pictures
    slack = _THUMBNAIL_RATIO + 1.0 / min(height, width)
    if not 1 - slack <= ratio <= 1 + slack:
        return False
    if overview is None:
        return True
    differences = np.abs(_cells(pixels) - _cells(overview)).max(-1)
    return bool(differences.mean() < _THUMBNAIL_MEAN and differences.max() < _THUMBNAIL_WORST)


def _cells(image: Image) -> npt.NDArray[np.float64]:
    """Mean colours of a grid of 16 x 16 over an image."""
    grid = image.astype(np.float64)
    for axis in (0, 1):
        count = min(_THUMBNAIL_CELLS, image.shape[axis])
        starts = np.arange(count) * image.shape[axis] // count
        lengths = np.diff(np.append(starts, image.shape[axis]))
        total = np.add.reduceat(grid, starts, axis=axis)
        grid = total / (lengths[:, None, None] if axis == 0 else lengths[None, :, None])
        repeats = -(-_THUMBNAIL_CELLS // count)
        grid = np.repeat(grid, repeats, axis=axis).take(range(_THUMBNAIL_CELLS), axis=axis)
    return grid


def blanked_macro(pixels: Image) -> Image | None:
    """A macro whose label's end is white, as a new array; None where that cannot be told.

    Rule: the label covers one end of the long side, at most LABEL_SHARE of it. That share is made
    white at the end that carries marks (pixels unlike the glass of the middle) if the other end is
    clean, without even a faint mark on the inner four fifths of its height; else at both ends. A
    picture that is not between 2 and 4 times as long as high is not of a whole glass: None.
    """
    height, width = pixels.shape[:2]
    if height > width:
        turned = blanked_macro(pixels.swapaxes(0, 1))
        return None if turned is None else np.ascontiguousarray(turned.swapaxes(0, 1))
    if not _MACRO_RATIO[0] <= width / max(1, height) <= _MACRO_RATIO[1]:
        return None
    length = -int(-width * LABEL_SHARE // 1)
    inner = pixels[height // 10 : height - height // 10].astype(np.int16)
    middle = inner[:, length : width - length].reshape(-1, 3)
    # glass is the brighter part of what lies between the ends
    bright = middle[middle.sum(1) >= np.median(middle.sum(1))]
    marks = np.abs(inner - np.median(bright, axis=0)).max(-1)
    left, right = marks[:, :length].max(), marks[:, width - length :].max()
    out = pixels.copy()
    if left > _FAINT or right <= _MARKED:
        out[:, :length] = 255
    if right > _FAINT or left <= _MARKED:
        out[:, width - length :] = 255
    return out


def stripped(stored: StoredImage | None) -> StoredImage | None:
    """Stored JPEG segments without application data, comments or bytes behind their end.

    None where a segment is no JPEG, or holds anything but what decoding asks for: then the pixels
    are to be coded anew, for in LZW, JPEG-2000 and others there is room for more than pixels.
    """
    if stored is None:
        return None
    try:
        jpeg = unpack(stored) or stored
        if jpeg.compression != 7:
            return None
        return dataclasses.replace(
            jpeg,
            segments=tuple(bare_jpeg(segment, jpeg.jpegtables) for segment in jpeg.segments),
            jpegtables=None if jpeg.jpegtables is None else bare_jpeg(jpeg.jpegtables),
        )
    except (FormatError, UnsupportedError):
        return None
