"""The quality passport: what became of every single tile of a converted file.

``TAG_PASSPORT`` (UNDEFINED bytes) in the IFD of level 0 holds, per level, five maps of the grid of
tiles, and the tissue mask that the conversion went by. All figures are read without decoding a
tile. docs/format.md, "Quality passport", says it byte by byte; in short: magic, version, length
and CRC-32, a JSON header with the size of everything, and one zlib stream of little-endian arrays.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import Mode
from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    SlideError,
    TruncatedError,
    UnsupportedError,
)
from wsicodec.metrics import PSNR_OF_EQUAL
from wsicodec.slide.record import FloorRecord, LevelQuality

if TYPE_CHECKING:
    from wsicodec.tissue.mask import TissueMask

TAG_PASSPORT = 60645
"""Private TIFF tag, a literal of the file format like those of ``slide.record``."""

MAGIC = b"WSCP"
VERSION = 1
MAX_PACKED = 2**28
MAX_HEADER = 2**16
MAX_LEVELS = 32
MAX_TILES = 2**24
"""Tiles of all levels together; 16 million of 256 x 256 are a slide of a million pixels a side."""
MAX_MASK_BYTES = 2**25

PLAIN_STREAM = 255
"""Mode of a tile that is a stream of another codec, not a wsicodec tile."""

FIELDS: tuple[tuple[str, str], ...] = (
    ("bytes", "<u4"),
    ("psnr", "<f4"),
    ("ssim", "<f4"),
    ("quality", "<u1"),
    ("mode", "<u1"),
)
"""Arrays of a level, in the order of the format."""

_HEAD = struct.Struct("<4sB3xII")
_PIECE = 2**16
_MODES = np.array([*Mode, PLAIN_STREAM], np.uint8)


@dataclass(frozen=True, eq=False)
class LevelMap:
    """What is known of each tile of a level; arrays of (rows, columns).

    bytes: uint32, length of the tile's stream; 0 where the tile has none of its own: it shares the
    level's glass tile. psnr, ssim: float32, NaN where not measured, psnr inf for equal pixels.
    quality: uint8, 1 ... 100, 0 where there is none. mode: uint8, a ``bitstream.Mode``, or
    PLAIN_STREAM.

    Raises FormatError for arrays that are not so, LimitError for too many tiles.
    """

    rows: int
    columns: int
    bytes: npt.NDArray[np.uint32]
    psnr: npt.NDArray[np.float32]
    ssim: npt.NDArray[np.float32]
    quality: npt.NDArray[np.uint8]
    mode: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        _check_grid(self.rows, self.columns)
        for name, kind in FIELDS:
            array = getattr(self, name)
            if array.shape != (self.rows, self.columns) or array.dtype != np.dtype(kind):
                raise FormatError(
                    f"passport's {name} is {array.dtype} {array.shape}, not {kind[1:]} "
                    f"({self.rows}, {self.columns})"
                )
        # comparisons with NaN are false: what was not measured passes
        if bool((self.psnr < 0).any()) or bool((np.abs(self.ssim) > _SSIM_LIMIT).any()):
            raise FormatError("passport holds a PSNR below 0 or an SSIM beyond -1 ... 1")
        if int(self.quality.max()) > 100:
            raise FormatError(f"passport holds a quality of {self.quality.max()}, above 100")
        if not np.isin(self.mode, _MODES).all():
            raise FormatError("passport holds a tile mode that format version 1 does not define")

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns

    @property
    def measured(self) -> npt.NDArray[np.bool_]:
        """(rows, columns), True where the tile was compared with its source."""
        return ~np.isnan(self.ssim)

    def below(self, floor: FloorRecord | None) -> npt.NDArray[np.bool_]:
        """(rows, columns), True where a measured tile misses the floor."""
        miss = np.zeros((self.rows, self.columns), np.bool_)
        if floor is not None and floor.ssim is not None:
            miss |= self.ssim < np.float32(floor.ssim)
        if floor is not None and floor.psnr is not None:
            miss |= self.psnr < np.float32(floor.psnr)
        return miss


_SSIM_LIMIT = 1.0001  # sums of float64 may round beyond 1


@dataclass(frozen=True, eq=False)
class Passport:
    """Maps of all levels, finest first, and the tissue mask, None where none was used."""

    levels: tuple[LevelMap, ...]
    mask: TissueMask | None = None

    def pack(self) -> bytes:
        """Bytes for the tag. Raises LimitError for more than the format holds."""
        _check_total([(level.rows, level.columns) for level in self.levels])
        mask = None if self.mask is None else self.mask.pack()
        if mask is not None and len(mask) > MAX_MASK_BYTES:
            raise LimitError(f"tissue mask of {len(mask)} bytes exceeds {MAX_MASK_BYTES}")
        header = {
            "levels": [{"rows": level.rows, "columns": level.columns} for level in self.levels],
            "mask_bytes": None if mask is None else len(mask),
        }
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode("ascii")
        body = zlib.compressobj(9)
        parts = [text]
        for level in self.levels:
            for name, kind in FIELDS:
                parts.append(body.compress(_planes(getattr(level, name), kind)))
        parts.append(body.compress(mask or b""))
        parts.append(body.flush())
        packed = b"".join(parts)
        return _HEAD.pack(MAGIC, VERSION, len(text), zlib.crc32(packed)) + packed

    def check_grids(self, grids: Sequence[tuple[int, int]]) -> None:
        """Raise FormatError unless the maps have these (rows, columns), level by level."""
        own = [(level.rows, level.columns) for level in self.levels]
        if own != list(grids):
            raise FormatError(
                f"passport maps {_grids_text(own)} tiles, the file has {_grids_text(grids)}"
            )


def parse_passport(data: bytes) -> Passport:
    """The passport in a tag's value. Every size is checked before anything of it is allocated.

    Raises FormatError (TruncatedError and ChecksumError among them), LimitError for sizes beyond
    the format's, UnsupportedError for a later version.
    """
    if len(data) > MAX_PACKED:
        raise LimitError(f"passport of {len(data)} bytes exceeds {MAX_PACKED}")
    if data[:4] != MAGIC[: len(data)]:
        raise FormatError(f"not a wsicodec passport: starts with {bytes(data[:4]).hex(' ')}")
    if len(data) < _HEAD.size:
        raise TruncatedError(f"passport of {len(data)} bytes is shorter than its head")
    _, version, length, crc = _HEAD.unpack_from(data)
    if version != VERSION:
        raise UnsupportedError(
            f"passport has version {version}; this wsicodec reads version {VERSION}: upgrade it"
        )
    if data[5:8] != b"\0\0\0":
        raise FormatError("passport sets reserved bytes")
    if length > MAX_HEADER:
        raise LimitError(f"passport header of {length} bytes exceeds {MAX_HEADER}")
    if _HEAD.size + length > len(data):
        raise TruncatedError("passport ends within its header")
    packed = memoryview(data)[_HEAD.size :]
    if zlib.crc32(packed) != crc:
        raise ChecksumError("passport's checksum does not match: it is damaged or cut short")
    grids, mask_bytes = _parse_header(bytes(packed[:length]))
    body = _Inflater(packed[length:])
    levels = tuple(_read_level(body, rows, columns) for rows, columns in grids)
    mask = None if mask_bytes is None else body.read(mask_bytes)
    body.finish()
    return Passport(levels, None if mask is None else _parse_mask(mask))


def read_passport(path: str | os.PathLike[str]) -> Passport | None:
    """The passport of a TIFF file, None where it has none. Reads directories, no tile.

    Raises SlideError for a file that is no readable TIFF, else as ``parse_passport``, naming the
    file.
    """
    import tifffile

    path = Path(path)
    try:
        with tifffile.TiffFile(path) as file:
            value = file.pages.first.tags.valueof(TAG_PASSPORT)
    except Exception as error:
        raise SlideError(f"{path}: cannot be read as TIFF: {error or type(error)}") from error
    if value is None:
        return None
    if not isinstance(value, bytes):
        raise FormatError(f"{path}: tag {TAG_PASSPORT} does not hold bytes")
    try:
        return parse_passport(value)
    except (FormatError, LimitError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


def summarise_level(level: LevelMap, floor: FloorRecord | None = None) -> LevelQuality | None:
    """Mean, 1st percentile and worst over the measured tiles of a level; None where none was.

    As in ``metrics.summarise``, equal tiles count as PSNR_OF_EQUAL dB.
    """
    measured = level.measured & ~np.isnan(level.psnr)
    count = int(measured.sum())
    if not count:
        return None
    # float64: a mean of float32 drifts over many tiles
    psnr = np.minimum(level.psnr, PSNR_OF_EQUAL)[measured].astype(np.float64)
    ssim = level.ssim[measured].astype(np.float64)
    where = np.argwhere(measured)
    psnr_row, psnr_column = where[psnr.argmin()]
    ssim_row, ssim_column = where[ssim.argmin()]
    return LevelQuality(
        tiles=level.tiles,
        measured=count,
        below_floor=int(level.below(floor).sum()),
        psnr_mean=float(psnr.mean()),
        psnr_p01=float(np.percentile(psnr, 1)),
        psnr_worst=float(psnr.min()),
        psnr_worst_at=(int(psnr_row), int(psnr_column)),
        ssim_mean=float(ssim.mean()),
        ssim_p01=float(np.percentile(ssim, 1)),
        ssim_worst=float(ssim.min()),
        ssim_worst_at=(int(ssim_row), int(ssim_column)),
    )


def mode_counts(levels: Sequence[LevelMap]) -> dict[str, int]:
    """Tiles by mode name, ``shared glass`` for those without a stream of their own."""
    counts: dict[str, int] = {}
    for level in levels:
        glass = level.bytes == 0
        if shared := int(glass.sum()):
            counts["shared glass"] = counts.get("shared glass", 0) + shared
        values, numbers = np.unique(level.mode[~glass], return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            name = mode_name(value)
            counts[name] = counts.get(name, 0) + number
    return counts


def mode_name(value: int) -> str:
    """``learned``, ``jpegxl`` ... of a ``bitstream.Mode``; ``plain`` for PLAIN_STREAM."""
    return "plain" if value == PLAIN_STREAM else Mode(value).name.lower()


def _grids_text(grids: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{rows} x {columns}" for rows, columns in grids) or "no"


def _check_grid(rows: int, columns: int) -> None:
    if rows < 1 or columns < 1:
        raise FormatError(f"passport with a level of {rows} x {columns} tiles")
    if rows * columns > MAX_TILES:
        raise LimitError(f"passport with a level of {rows} x {columns} tiles: above {MAX_TILES}")


def _check_total(grids: Sequence[tuple[int, int]]) -> None:
    if not 1 <= len(grids) <= MAX_LEVELS:
        raise LimitError(f"passport of {len(grids)} levels: must be 1 ... {MAX_LEVELS}")
    total = sum(rows * columns for rows, columns in grids)
    if total > MAX_TILES:
        raise LimitError(f"passport of {total} tiles exceeds {MAX_TILES}")


def _parse_header(text: bytes) -> tuple[list[tuple[int, int]], int | None]:
    """((rows, columns) per level, bytes of the mask or None), all within the limits."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"passport header is not JSON: {error}") from None
    try:
        grids = [(_count(level["rows"]), _count(level["columns"])) for level in header["levels"]]
        mask_bytes = header["mask_bytes"]
        if mask_bytes is not None:
            mask_bytes = _count(mask_bytes)
    except (KeyError, TypeError) as error:
        raise FormatError(f"passport header is incomplete: {error!r}") from None
    for rows, columns in grids:
        _check_grid(rows, columns)
    _check_total(grids)
    if mask_bytes is not None and mask_bytes > MAX_MASK_BYTES:
        raise LimitError(f"tissue mask of {mask_bytes} bytes exceeds {MAX_MASK_BYTES}")
    return grids, mask_bytes


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _parse_mask(data: bytes) -> TissueMask:
    from wsicodec.tissue.mask import TissueMask

    return TissueMask.parse(data)


def _planes(array: npt.NDArray[Any], kind: str) -> bytes:
    """All lowest bytes, then all next ones ...: neighbours' exponents compress, mixed they do not.

    array: (rows, columns) of any byte order; kind: the type it is stored as.
    """
    plain = np.ascontiguousarray(array, np.dtype(kind))
    size = plain.dtype.itemsize
    return plain.reshape(-1).view(np.uint8).reshape(-1, size).T.tobytes()


def _read_level(body: _Inflater, rows: int, columns: int) -> LevelMap:
    arrays = {}
    for name, kind in FIELDS:
        dtype = np.dtype(kind)
        planes = np.frombuffer(body.read(rows * columns * dtype.itemsize), np.uint8)
        mixed = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T)
        array = mixed.view(dtype).reshape(rows, columns).astype(dtype.newbyteorder("="), copy=False)
        array.flags.writeable = False
        arrays[name] = array
    return LevelMap(rows, columns, **arrays)


class _Inflater:
    """Takes known numbers of bytes out of a zlib stream; never inflates more than is asked for."""

    def __init__(self, data: memoryview) -> None:
        self._stream = zlib.decompressobj()
        # in pieces: zlib copies what it did not consume
        self._pieces = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
        self._rest: bytes | memoryview = b""

    def read(self, count: int) -> bytes:
        parts: list[bytes] = []
        missing = count
        while missing:
            data = self._inflate(missing)
            if not data:
                raise TruncatedError(f"passport's maps end early: {missing} bytes are missing")
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def finish(self) -> None:
        """Check that the stream ends here, with its own checksum, and that nothing follows."""
        more = self._inflate(1)
        if more or not self._stream.eof or self._stream.unused_data or any(self._pieces):
            raise FormatError("passport holds more, or ends earlier, than its header says")

    def _inflate(self, limit: int) -> bytes:
        """1 ... limit bytes; none at the end of the stream or of the data."""
        while not self._stream.eof:
            try:
                data = self._stream.decompress(self._rest, limit)
            except zlib.error as error:
                raise FormatError(f"passport's maps cannot be inflated: {error}") from None
            self._rest = self._stream.unconsumed_tail
            if data:
                return data
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = piece
        return b""
