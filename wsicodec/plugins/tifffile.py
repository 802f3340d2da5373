"""wsicodec as a compression scheme of tifffile.

tifffile has no interface for foreign codecs. Its tables are private, and this is the one module
that touches them: ``TIFF.DECOMPRESSORS._codecs`` and ``TIFF.COMPRESSORS._codecs``, dicts that
tifffile asks before its own chain; ``TIFF.IMAGE_COMPRESSIONS``, the schemes whose functions take
bytes alone and return pixels; the members of ``COMPRESSION``, which writing looks names up in.
Everything is checked before it is changed, and ``canary`` writes and reads a file in memory.

Importing wsicodec, or starting Python where it is installed, calls ``install``.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import io
import sys
import threading
from collections.abc import Callable, MutableMapping
from typing import Any, cast

import numpy as np

from wsicodec.codec import DEFAULT_MODEL, DEFAULT_QUALITY, encode
from wsicodec.codec.constant import encode_constant
from wsicodec.codec.protocol import Image
from wsicodec.errors import RuntimeMissingError, SettingsError, UnsupportedError, WsicodecError
from wsicodec.forking import renewed_after_fork
from wsicodec.plugins.imagecodecs import wsicodec_decode

__all__ = [
    "TIFF_COMPRESSION_NAME",
    "TIFF_COMPRESSION_TAG",
    "canary",
    "install",
    "is_installed",
    "tiff_decode",
    "tiff_encode",
    "uninstall",
]

TIFF_COMPRESSION_TAG = 60642
"""Value of the TIFF tag Compression (259). A literal of the format, private range (>= 32768).

Free in the tables of tifffile 2026.11.8, imagecodecs 2026.10.10, libtiff 4.7, GDAL, Bio-Formats
and ExifTool.
"""
TIFF_COMPRESSION_NAME = "WSICODEC"

_HOST = "tifffile.tifffile"
_ENCODER_SETTINGS = frozenset({"quality", "model", "lossless"})


class _Guard:
    """lock: of whoever changes tifffile's tables."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Wait for no thread that a forked process has not."""
        self.lock = threading.RLock()


_guard = _Guard()
renewed_after_fork(_guard)


def tiff_decode(data: bytes, /) -> Image:
    """Pixels of one tile or strip, uint8 (rows, columns, 3).

    tifffile hands over the bytes alone, from several threads at once. Raises as
    ``wsicodec.decode``, and FormatError for a stream that is not a wsicodec tile.
    """
    return wsicodec_decode(data)


def tiff_encode(tile: Image, /, **compressionargs: Any) -> bytes:
    """Code one tile or strip.

    tile: uint8 (rows, columns, 3) RGB; tifffile pads tiles at the edges with zeros, that is black:
    who wants other padding hands ``TiffWriter.write`` an iterator of coded tiles.
    compressionargs: quality, model, lossless as in ``wsicodec.encode``.

    Raises SettingsError for other arguments, else as ``wsicodec.encode``.
    """
    if unknown := sorted(compressionargs.keys() - _ENCODER_SETTINGS):
        known = ", ".join(sorted(_ENCODER_SETTINGS))
        raise SettingsError(f"compressionargs {', '.join(unknown)} unknown; wsicodec has {known}")
    settings = {"model": DEFAULT_MODEL, "quality": DEFAULT_QUALITY, **compressionargs}
    return encode(tile, **settings)


def install(module: Any = None) -> None:
    """Make tifffile read and write compression 60642. Does nothing a second time.

    module: the module ``tifffile.tifffile``, imported when None.

    Reading is set up before writing is looked at, so that a tifffile changed in what only writing
    needs still reads. Raises RuntimeMissingError without tifffile, UnsupportedError when its
    tables are not as expected or the value is taken.
    """
    host = _import_host() if module is None else module
    with _guard.lock:
        tiff, decoders = _table(host, "DECOMPRESSORS", "read")
        if not isinstance(images := getattr(tiff, "IMAGE_COMPRESSIONS", None), set):
            raise _changed(host, "TIFF.IMAGE_COMPRESSIONS is not a set", "read")
        _claim(host, decoders, tiff_decode)
        images.add(TIFF_COMPRESSION_TAG)

        _, encoders = _table(host, "COMPRESSORS", "write")
        _add_member(host)
        _claim(host, encoders, tiff_encode)


def uninstall(module: Any = None) -> None:
    """Undo ``install``: tifffile is as if wsicodec were not there. Does nothing a second time.

    Files that are open keep the functions they looked up. The hook stays, so that reloading
    tifffile installs again; ``WSICODEC_AUTOLOAD=0`` keeps it from that.
    """
    host = sys.modules.get(_HOST) if module is None else module
    tiff = getattr(host, "TIFF", None)
    if tiff is None:
        return
    with _guard.lock:
        for name in ("DECOMPRESSORS", "COMPRESSORS"):
            table = getattr(getattr(tiff, name, None), "_codecs", {})
            if _is_ours(table.get(TIFF_COMPRESSION_TAG)):
                del table[TIFF_COMPRESSION_TAG]
        with contextlib.suppress(AttributeError):
            tiff.IMAGE_COMPRESSIONS.discard(TIFF_COMPRESSION_TAG)
        _remove_member(getattr(host, "COMPRESSION", None))


def is_installed(module: Any = None) -> bool:
    """True when tifffile is loaded and both reads and writes wsicodec tiles."""
    host = sys.modules.get(_HOST) if module is None else module
    tiff = getattr(host, "TIFF", None)
    if tiff is None or TIFF_COMPRESSION_TAG not in getattr(tiff, "IMAGE_COMPRESSIONS", ()):
        return False
    for name in ("DECOMPRESSORS", "COMPRESSORS"):
        table = getattr(getattr(tiff, name, None), "_codecs", {})
        if not _is_ours(table.get(TIFF_COMPRESSION_TAG)):
            return False
    members = getattr(getattr(host, "COMPRESSION", None), "_member_map_", {})
    return members.get(TIFF_COMPRESSION_NAME) == TIFF_COMPRESSION_TAG


def canary() -> None:
    """Write a file in memory through tifffile and read it back, or say what does not work.

    Needs no model: the tiles have one colour each. Raises UnsupportedError where tifffile does not
    play along, else what ``install`` and ``wsicodec.decode`` raise.
    """
    host = _import_host()
    install(host)
    image = np.full((16, 32, 3), (200, 30, 90), np.uint8)
    image[:, 16:] = (90, 200, 30)
    tiles = [encode_constant(image[:, column : column + 16]).pack() for column in (0, 16)]
    file = io.BytesIO()
    try:
        with host.TiffWriter(file) as writer:
            writer.write(
                iter(tiles),
                shape=image.shape,
                dtype=image.dtype,
                tile=(16, 16),
                photometric="rgb",
                compression=TIFF_COMPRESSION_NAME.lower(),
            )
        file.seek(0)
        with host.TiffFile(file) as tif:
            page = tif.pages[0]
            value, pixels = int(page.compression), page.asarray()
    except WsicodecError:
        raise  # not tifffile's doing
    except Exception as error:
        reason = f"writing and reading a file fails with {type(error).__name__}: {error}"
        raise _changed(host, reason, "read or write") from error
    if value != TIFF_COMPRESSION_TAG:
        raise _changed(host, f"a file was written with compression {value}", "write")
    if pixels.shape != image.shape or pixels.dtype != image.dtype or (pixels != image).any():
        raise _changed(host, "pixels come back changed", "read")


def _import_host() -> Any:
    try:
        return importlib.import_module(_HOST)
    except ModuleNotFoundError as error:
        raise RuntimeMissingError("tifffile is not installed: pip install tifffile") from error


def _table(host: Any, name: str, purpose: str) -> tuple[Any, MutableMapping[int, Any]]:
    """The singleton TIFF and the dict in one of its codec mappings, or UnsupportedError."""
    tiff = getattr(host, "TIFF", None)
    table = getattr(getattr(tiff, name, None), "_codecs", None)
    if not isinstance(table, dict):
        raise _changed(host, f"TIFF.{name}._codecs is not a dict", purpose)
    return tiff, cast("dict[int, Any]", table)


def _claim(host: Any, table: MutableMapping[int, Any], function: Callable[..., Any]) -> None:
    present = table.get(TIFF_COMPRESSION_TAG)
    if present is not None and not _is_ours(present):
        owner = f"{getattr(present, '__module__', '?')}.{getattr(present, '__qualname__', present)}"
        raise _taken(host, owner)
    table[TIFF_COMPRESSION_TAG] = function


def _is_ours(function: object) -> bool:
    # by module name: after a reload of this module the function in the table is another object
    return getattr(function, "__module__", None) == __name__


def _add_member(host: Any) -> None:
    """Add WSICODEC to the enum COMPRESSION in place; members exist from class creation only."""
    cls = getattr(host, "COMPRESSION", None)
    if not (
        isinstance(cls, enum.EnumMeta)
        and issubclass(cls, enum.IntEnum)
        and isinstance(getattr(cls, "_member_map_", None), dict)
        and isinstance(getattr(cls, "_value2member_map_", None), dict)
        and isinstance(getattr(cls, "_member_names_", None), list)
    ):
        raise _changed(host, "COMPRESSION is not an IntEnum that can be extended", "write")
    by_name: Any = cls._member_map_.get(TIFF_COMPRESSION_NAME)
    by_value: Any = cls._value2member_map_.get(TIFF_COMPRESSION_TAG)
    if by_name is not None and by_name is by_value:
        return
    if by_name is not None or by_value is not None:
        raise _taken(host, repr(by_name if by_value is None else by_value))
    member: Any = int.__new__(cls, TIFF_COMPRESSION_TAG)
    member._name_, member._value_ = TIFF_COMPRESSION_NAME, TIFF_COMPRESSION_TAG
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    cls._member_map_[TIFF_COMPRESSION_NAME] = member
    cls._value2member_map_[TIFF_COMPRESSION_TAG] = member
    cls._member_names_.append(TIFF_COMPRESSION_NAME)
    # EnumMeta.__setattr__ refuses names of members
    type.__setattr__(cls, TIFF_COMPRESSION_NAME, member)


def _remove_member(cls: Any) -> None:
    members = getattr(cls, "_member_map_", {})
    if members.get(TIFF_COMPRESSION_NAME) != TIFF_COMPRESSION_TAG:
        return
    del members[TIFF_COMPRESSION_NAME]
    cls._value2member_map_.pop(TIFF_COMPRESSION_TAG, None)
    cls._member_names_.remove(TIFF_COMPRESSION_NAME)
    type.__delattr__(cls, TIFF_COMPRESSION_NAME)


def _changed(host: Any, what: str, purpose: str) -> UnsupportedError:
    return UnsupportedError(
        f"tifffile {_version(host)} cannot {purpose} wsicodec tiles: {what}; "
        "upgrade wsicodec, or install another version of tifffile"
    )


def _taken(host: Any, owner: str) -> UnsupportedError:
    return UnsupportedError(
        f"TIFF compression {TIFF_COMPRESSION_TAG} ({TIFF_COMPRESSION_NAME}) belongs to {owner} "
        f"in tifffile {_version(host)}; wsicodec leaves it alone"
    )


def _version(host: Any) -> str:
    return str(getattr(host, "__version__", "of unknown version"))
