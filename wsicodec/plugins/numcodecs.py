"""wsicodec for numcodecs: arrays of Zarr format 2, and reference files made by kerchunk.

Found by numcodecs through the entry point ``numcodecs.codecs``; ``register`` is for places that
have no package metadata.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numcodecs.abc import Codec
from numcodecs.compat import ensure_bytes, ensure_ndarray, ndarray_copy
from numcodecs.registry import register_codec

from wsicodec.bitstream import parse
from wsicodec.codec import DEFAULT_MODEL, DEFAULT_QUALITY, encode
from wsicodec.codec.protocol import check_quality
from wsicodec.errors import FormatError, SettingsError, UnsupportedError
from wsicodec.plugins.imagecodecs import wsicodec_decode

__all__ = ["Wsicodec", "register"]


class Wsicodec(Codec):  # type: ignore[misc]  # numcodecs has no types
    """Codec of uint8 chunks of shape (rows, columns, 3), RGB; leading axes must have length 1.

    quality: 1 ... 100. model: name or digest. lossless: exact pixels. They matter for encoding
    alone; a tile tells what decoding needs.

    Raises SettingsError (a ValueError) for settings out of their range or of unknown name.
    """

    codec_id = "wsicodec"

    def __init__(
        self,
        *,
        quality: int = DEFAULT_QUALITY,
        model: str = DEFAULT_MODEL,
        lossless: bool = False,
    ) -> None:
        self.quality = check_quality(quality)
        if not isinstance(model, str) or not model:
            raise SettingsError(f"model must be a name or digest, not {model!r}")
        self.model = model
        if not isinstance(lossless, (bool, np.bool_)):
            raise SettingsError(f"lossless must be true or false, not {lossless!r}")
        self.lossless = bool(lossless)

    def encode(self, buf: Any) -> bytes:
        """The tile of one chunk.

        buf: uint8 array (..., rows, columns, 3), sides 1 ... 4096.

        Raises UnsupportedError, LimitError, SettingsError, UnknownModelError.
        """
        array = ensure_ndarray(buf)
        return encode(_image(array), model=self.model, quality=self.quality, lossless=self.lossless)

    def decode(self, buf: Any, out: Any = None) -> npt.NDArray[np.uint8]:
        """Pixels of a chunk, uint8 (rows, columns, 3), or ``out`` filled with them.

        out: writable buffer of rows x columns x 3 bytes; if it has three axes or more, the last
        three must be those of the image.

        Raises FormatError (TruncatedError, ChecksumError), LimitError, UnknownModelError.
        """
        data = ensure_bytes(buf)
        if out is None:
            return wsicodec_decode(data)
        target = ensure_ndarray(out)
        tile = parse(data)  # a size that does not fit is refused before pixels are allocated
        shape = (tile.height, tile.width, 3)
        fits = target.ndim < 3 or target.shape[-3:] == shape
        if target.nbytes != tile.height * tile.width * 3 or not fits:
            raise FormatError(f"tile holds {shape}, out has shape {target.shape} {target.dtype}")
        ndarray_copy(wsicodec_decode(data), target)
        filled: npt.NDArray[np.uint8] = out
        return filled

    def get_config(self) -> dict[str, Any]:
        """What is stored with an array, and no more."""
        return {
            "id": self.codec_id,
            "quality": self.quality,
            "model": self.model,
            "lossless": self.lossless,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The codec of a stored configuration (without ``id``)."""
        if unknown := sorted(config.keys() - {"quality", "model", "lossless"}):
            raise SettingsError(
                f"configuration of codec wsicodec has unknown keys {', '.join(unknown)}: "
                "it was written by a later version"
            )
        return cls(**config)


def register() -> None:
    """Make numcodecs find the codec in this process, entry point or not. Idempotent."""
    register_codec(Wsicodec)


def _image(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(rows, columns, 3) of a chunk, or UnsupportedError."""
    if array.ndim < 3 or any(length != 1 for length in array.shape[:-3]):
        raise UnsupportedError(
            f"chunk has shape {array.shape}; wsicodec codes (rows, columns, 3), with any number "
            "of leading axes of length 1"
        )
    if array.flags.f_contiguous and not array.flags.c_contiguous:
        # decoded pixels are in C order; zarr would read their bytes in order F and mix them up
        raise UnsupportedError("chunk is in Fortran order: make the array with order='C'")
    return array.reshape(array.shape[-3:])
