"""wsicodec for zarr-python 3: the codec ``wsicodec`` of Zarr format 3, plain or inside shards.

Found by zarr through the entry point ``zarr.codecs``; ``register`` is for places that have no
package metadata. Arrays of Zarr format 2 use ``wsicodec.plugins.numcodecs``.

    zarr.create_array(path, shape=(100_000, 80_000, 3), chunks=(512, 512, 3), dtype="uint8",
                      serializer=WsicodecCodec(), compressors=None, fill_value=255)

``compressors=None`` keeps zarr from compressing the tiles again. Chunks at the edges are padded
with the fill value, and chunks that hold nothing else are not stored: 255 is white glass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import register_codec

from wsicodec.bitstream import MAX_SIDE, parse
from wsicodec.codec import DEFAULT_MODEL, DEFAULT_QUALITY, encode
from wsicodec.codec.protocol import check_quality
from wsicodec.errors import FormatError, LimitError, SettingsError, UnsupportedError, WsicodecError
from wsicodec.plugins.imagecodecs import wsicodec_decode

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer
    from zarr.core.common import JSON

__all__ = ["INSTALLED", "WsicodecCodec", "register"]

CODEC_NAME = "wsicodec"
INSTALLED = "installed"
"""Value of ``model_sha256`` that looks the digest up among the installed models."""


@dataclass(frozen=True, kw_only=True)
class WsicodecCodec(ArrayBytesCodec):
    """Codec of uint8 chunks that hold one RGB tile.

    quality: 1 ... 100. model: name or digest. lossless: exact pixels. They matter for encoding
    alone; a tile tells what decoding needs.
    channel_axis: the axis of a chunk that has length 3; negative counts from the end. -1 is
    (..., rows, columns, 3), -3 is (..., 3, rows, columns). Rows and columns are the last two of the
    other axes, all before them must have length 1.
    model_sha256: full SHA-256 of the model's file in hex, stored so that an array says what reads
    it; by default that of the installed model, None to leave it out.

    Raises SettingsError (a ValueError) for settings out of their range or of unknown name.
    """

    is_fixed_size = False

    quality: int = DEFAULT_QUALITY
    model: str = DEFAULT_MODEL
    lossless: bool = False
    channel_axis: int = -1
    model_sha256: str | None = INSTALLED

    def __post_init__(self) -> None:
        object.__setattr__(self, "quality", check_quality(self.quality))
        if not isinstance(self.model, str) or not self.model:
            raise SettingsError(f"model must be a name or digest, not {self.model!r}")
        if not isinstance(self.lossless, (bool, np.bool_)):
            raise SettingsError(f"lossless must be true or false, not {self.lossless!r}")
        object.__setattr__(self, "lossless", bool(self.lossless))
        axis = self.channel_axis
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise SettingsError(f"channel_axis must be an integer, not {axis!r}")
        object.__setattr__(self, "channel_axis", int(axis))
        digest = self.model_sha256
        if digest == INSTALLED:
            digest = None if self.lossless else _installed_digest(self.model)
        if digest is not None and not _is_sha256(digest):
            raise SettingsError(f"model_sha256 must be 64 hex digits, not {digest!r}")
        object.__setattr__(self, "model_sha256", digest)

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """The codec of its stored form, ``{"name": "wsicodec", "configuration": {...}}``."""
        if data.get("name") != CODEC_NAME:
            raise SettingsError(f"codec is named {data.get('name')!r}, not {CODEC_NAME!r}")
        stored = data.get("configuration", {})
        if not isinstance(stored, Mapping):
            raise SettingsError(f"configuration of codec {CODEC_NAME} is not an object: {stored!r}")
        # what an array does not say of its model is not made up when it is read
        configuration: dict[str, Any] = {"model_sha256": None, **stored}
        if unknown := sorted(configuration.keys() - cls.__dataclass_fields__.keys()):
            raise SettingsError(
                f"configuration of codec {CODEC_NAME} has unknown keys {', '.join(unknown)}: "
                "it was written by a later version"
            )
        return cls(**configuration)

    def to_dict(self) -> dict[str, JSON]:
        """The form that is stored in the array's metadata."""
        configuration: dict[str, JSON] = {
            "quality": self.quality,
            "model": self.model,
            "lossless": self.lossless,
            "channel_axis": self.channel_axis,
        }
        if self.model_sha256 is not None:
            configuration["model_sha256"] = self.model_sha256
        return {"name": CODEC_NAME, "configuration": configuration}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Refuse arrays that this codec cannot hold, when they are made.

        Raises UnsupportedError for a dtype other than uint8 or a chunk that is not one RGB tile,
        LimitError for sides beyond 4096 (both are ValueErrors).
        """
        del shape
        _check_dtype(dtype)
        chunk_shape = getattr(chunk_grid, "chunk_shape", None)
        if chunk_shape is None:
            raise UnsupportedError(
                f"codec {CODEC_NAME} needs a regular chunk grid, not {type(chunk_grid).__name__}"
            )
        self._image_shape(tuple(chunk_shape))

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        """This codec; refuses what ``validate`` does not see inside shards of older zarrs."""
        _check_dtype(array_spec.dtype)
        return self

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("the size of a wsicodec tile depends on its pixels")

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        chunk = np.asarray(chunk_array.as_numpy_array())
        axis = self._axis(chunk.ndim)
        image = np.moveaxis(chunk, axis, -1).reshape(self._image_shape(chunk.shape))
        stream = encode(image, model=self.model, quality=self.quality, lossless=self.lossless)
        return chunk_spec.prototype.buffer.from_bytes(stream)

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        chunk_shape = tuple(chunk_spec.shape)
        expected = self._image_shape(chunk_shape)
        data = chunk_bytes.to_bytes()
        tile = parse(data)  # a size that does not fit is refused before pixels are allocated
        if (tile.height, tile.width, 3) != expected:
            raise FormatError(
                f"tile holds {(tile.height, tile.width, 3)} where the chunk needs {expected}"
            )
        axis = self._axis(len(chunk_shape))
        chunk = wsicodec_decode(data)
        if axis != len(chunk_shape) - 1:
            moved = (*chunk_shape[:axis], *chunk_shape[axis + 1 :], 3)
            chunk = np.ascontiguousarray(np.moveaxis(chunk.reshape(moved), -1, axis))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(chunk.reshape(chunk_shape))

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._encode_sync, chunk_data, chunk_spec)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    def _axis(self, ndim: int) -> int:
        """channel_axis as a position 0 ... ndim - 1, or UnsupportedError."""
        if not -ndim <= self.channel_axis < ndim:
            raise UnsupportedError(f"channel_axis {self.channel_axis} of a chunk of {ndim} axes")
        return self.channel_axis % ndim

    def _image_shape(self, chunk_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(rows, columns, 3) of a chunk, or UnsupportedError, LimitError."""
        axis = self._axis(len(chunk_shape))
        others = chunk_shape[:axis] + chunk_shape[axis + 1 :]
        if len(others) < 2 or chunk_shape[axis] != 3 or any(n != 1 for n in others[:-2]):
            raise UnsupportedError(
                f"chunk of shape {chunk_shape} with channel_axis {self.channel_axis} is not one "
                f"RGB tile: codec {CODEC_NAME} needs three channels on that axis, rows and columns "
                "on the last two others, and length 1 on all before them"
            )
        rows, columns = (int(n) for n in others[-2:])
        if not (1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE):
            raise LimitError(f"chunk of {columns} x {rows} pixels: sides must be 1 ... {MAX_SIDE}")
        return rows, columns, 3


def register() -> None:
    """Make zarr find the codec in this process, entry point or not. Idempotent."""
    register_codec(CODEC_NAME, WsicodecCodec)


def _check_dtype(dtype: Any) -> None:
    # zarr 3.1 and later hand over a ZDType, earlier ones a NumPy dtype
    native = np.dtype(dtype.to_native_dtype() if hasattr(dtype, "to_native_dtype") else dtype)
    if native != np.uint8:
        raise UnsupportedError(f"array is {native}; codec {CODEC_NAME} codes uint8 RGB")


def _installed_digest(model: str) -> str | None:
    """SHA-256 of an installed model; None where it is not, which encoding will say by name."""
    from wsicodec.models import find_model

    try:
        return find_model(model).digest
    except (WsicodecError, OSError):
        return None


def _is_sha256(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")
