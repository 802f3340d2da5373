"""Pictures inside the page, as data URIs."""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

AMPLIFIED = 4
_QUALITIES = (95, 88, 75, 60, 40, 20)


def photograph(image: Image, limit: int) -> str:
    """JPEG 4:4:4 of at most ``limit`` bytes, if its coarsest quality allows, as a data URI."""
    import imagecodecs

    data = b""
    for quality in _QUALITIES:
        plain = np.ascontiguousarray(image)
        data = bytes(
            imagecodecs.jpeg8_encode(plain, level=quality, subsampling="444", optimize=True)
        )
        if len(data) <= limit:
            break
    return _uri("jpeg", data)


def drawing(image: Image) -> str:
    """Lossless WebP, as a data URI."""
    import imagecodecs

    data = bytes(imagecodecs.webp_encode(np.ascontiguousarray(image), lossless=True, level=6))
    return _uri("webp", data)


def difference(ours: Image, source: Image) -> Image:
    """Grey where two images are equal; AMPLIFIED times their difference, channel by channel."""
    error = ours.astype(np.int32) - source
    return np.asarray(np.clip(128 + AMPLIFIED * error, 0, 255), np.uint8)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
