"""What every codec offers, and the checks on images that all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import MAX_SIDE
from wsicodec.errors import LimitError, SettingsError, UnsupportedError

Image = npt.NDArray[np.uint8]
DEFAULT_QUALITY = 70


@dataclass(frozen=True)
class TileInfo:
    """What a tile says of itself, read without decoding a pixel.

    codec: name as in ``encode(codec=...)``. mode: how the payload is coded (``learned``,
    ``constant``, ``lossless`` ... for wsicodec tiles; equal to codec for others).
    height, width: pixels. bytes: length of the stream.
    model: hex of the digest prefix in the tile; model_name: its name where installed.
    quality: 1 ... 100 as near as the tile tells; gain: gain index; tilt: 0 ... 16, gains of one
    tilt can be compared; None where not learned.
    """

    codec: str
    mode: str
    height: int
    width: int
    bytes: int
    model: str | None = None
    model_name: str | None = None
    quality: int | None = None
    gain: int | None = None
    tilt: int | None = None


class Codec(Protocol):
    """One way to code an image. Stateless or thread-safe."""

    name: str

    def encode(self, image: Image, *, quality: int, lossless: bool, **options: Any) -> bytes:
        """Code a checked image; raise SettingsError for options that the codec does not have."""
        ...

    def decode(self, data: bytes) -> Image:
        """(rows, columns, 3) uint8 of a stream that ``check`` accepts."""
        ...

    def check(self, data: bytes) -> bool:
        """True when the stream starts like this codec's."""
        ...

    def probe(self, data: bytes) -> TileInfo:
        """Size and settings of a stream, no pixel decoded."""
        ...


def check_image(image: object) -> Image:
    """A C-contiguous uint8 (rows, columns, 3) array, or a named error that says why not."""
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UnsupportedError(f"pixels are {array.dtype}; wsicodec codes uint8 RGB")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        raise UnsupportedError("image is grey; wsicodec codes RGB: repeat the channel three times")
    if array.ndim == 3 and array.shape[2] == 4:
        raise UnsupportedError("image is RGBA; wsicodec codes RGB: drop or blend the alpha channel")
    if array.ndim != 3 or array.shape[2] != 3:
        raise UnsupportedError(f"image has shape {array.shape}, not (rows, columns, 3)")
    rows, columns = array.shape[:2]
    if not (1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE):
        raise LimitError(f"image of {columns} x {rows} pixels: sides must be 1 ... {MAX_SIDE}")
    return np.ascontiguousarray(array)


def check_quality(quality: object) -> int:
    """Quality as an int within 1 ... 100, or SettingsError."""
    if isinstance(quality, bool) or not isinstance(quality, (int, np.integer)):
        raise SettingsError(f"quality must be an integer, not {quality!r}")
    if not 1 <= quality <= 100:
        raise SettingsError(f"quality {quality} is not within 1 ... 100")
    return int(quality)
