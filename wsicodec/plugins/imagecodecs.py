"""wsicodec tiles as functions with the conventions of imagecodecs.

The quartet ``wsicodec_encode``, ``wsicodec_decode``, ``wsicodec_check``, ``wsicodec_version`` and
the class ``WSICODEC`` behave like those of a codec in imagecodecs, for code that takes such
functions. Other than ``wsicodec.decode``, they know wsicodec tiles alone. imagecodecs itself is not
needed.
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from wsicodec import __version__, bitstream
from wsicodec.codec import DEFAULT_MODEL, DEFAULT_QUALITY, decode, encode
from wsicodec.codec.protocol import Image
from wsicodec.errors import FormatError, LimitError, SettingsError, WsicodecError

__all__ = [
    "WSICODEC",
    "WsicodecError",
    "wsicodec_check",
    "wsicodec_decode",
    "wsicodec_encode",
    "wsicodec_version",
]

Bytes = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
Output = int | bytearray | memoryview | npt.NDArray[np.uint8]


class WSICODEC:
    """Facts about the codec.

    available: True when onnxruntime, which learned tiles need, is installed. Constant and lossless
    tiles are coded without it.
    """

    available: bool = importlib.util.find_spec("onnxruntime") is not None


def wsicodec_version() -> str:
    """Name and version of the library, ``wsicodec 0.1.0``."""
    return f"wsicodec {__version__}"


def wsicodec_check(data: Bytes, /) -> bool:
    """True when the bytes start like a wsicodec tile; nothing more is looked at."""
    return bitstream.is_tile(bytes(_view(data)[:4]))


def wsicodec_encode(
    data: npt.ArrayLike,
    /,
    level: float | None = None,
    *,
    model: str | None = None,
    lossless: bool | None = None,
    numthreads: int | None = None,
    out: Output | None = None,
) -> bytes | memoryview | npt.NDArray[np.uint8]:
    """Code an image as one tile.

    data: uint8 (rows, columns, 3) RGB, sides 1 ... 4096.
    level: quality 1 ... 100, None for the default.
    model: name or digest, None for the default. lossless: exact pixels.
    numthreads: accepted, of no effect: a tile is coded by one thread.
    out: None for new ``bytes``; an int to limit their number; or a buffer, of which the written
    part is returned (a memoryview, or an array where ``out`` is an array).

    Raises LimitError where the output is too small, else as ``wsicodec.encode``.
    """
    del numthreads
    if level is not None and level != int(level):
        raise SettingsError(f"level {level} is not an integer within 1 ... 100")
    stream = encode(
        data,
        model=DEFAULT_MODEL if model is None else model,
        quality=DEFAULT_QUALITY if level is None else int(level),
        lossless=bool(lossless),
    )
    return _deliver(stream, out)


def wsicodec_decode(
    data: Bytes,
    /,
    *,
    numthreads: int | None = None,
    out: Image | int | None = None,
) -> Image:
    """Pixels of a wsicodec tile, uint8 (rows, columns, 3), C-contiguous.

    numthreads: accepted, of no effect: a tile is decoded by one thread.
    out: a C-contiguous uint8 array of exactly that shape, filled and returned; an int is ignored.

    Raises FormatError for anything but a wsicodec tile, else as ``wsicodec.decode``.
    """
    del numthreads
    stream = data if isinstance(data, bytes) else _view(data).tobytes()
    if not bitstream.is_tile(stream):
        start = f"starts with {stream[:4].hex(' ')}" if stream else "no bytes at all"
        raise FormatError(f"not a wsicodec tile: {start}")
    if out is None or isinstance(out, int):
        return decode(stream)
    _check_array(out)
    return decode(stream, out=out)


def _deliver(stream: bytes, out: Output | None) -> bytes | memoryview | npt.NDArray[np.uint8]:
    """The stream as ``out`` asks for it."""
    count = len(stream)
    if out is None:
        return stream
    if isinstance(out, int):
        if count > out:
            raise LimitError(f"tile has {count} bytes, more than the {out} that out allows")
        return stream
    if isinstance(out, np.ndarray):
        _check_array(out)
    view = _view(out)
    if view.readonly:
        raise SettingsError("out is read-only")
    if not view.c_contiguous:
        raise SettingsError("out is not contiguous")
    flat = view.cast("B")
    if count > len(flat):
        raise LimitError(f"tile has {count} bytes, out has room for {len(flat)}")
    flat[:count] = stream
    if isinstance(out, np.ndarray):
        written: npt.NDArray[np.uint8] = out.reshape(-1)[:count]
        return written
    return flat[:count]


def _view(buffer: object) -> memoryview:
    """Memory of a buffer; TypeError names what is none."""
    return memoryview(cast("bytes", buffer))  # NumPy arrays are typed as buffers from 3.12 on


def _check_array(out: Any) -> None:
    if not isinstance(out, np.ndarray):
        raise SettingsError(f"out must be an array, not {type(out).__name__}")
    if out.dtype != np.uint8:
        raise SettingsError(f"out must be uint8, not {out.dtype}")
    if not out.flags.c_contiguous:
        raise SettingsError(f"out of shape {out.shape} is not contiguous: strides {out.strides}")
