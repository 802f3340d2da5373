"""The map of tissue and glass of one slide: square cells of level 0, and what levels ask of it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsicodec.errors import FormatError, LimitError, SettingsError, TruncatedError, UnsupportedError

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

MAX_CELLS = 2**25  # a glass slide of 25 x 75 mm in cells of 8 µm has 2**24.8
MAX_CELL = 2**16
MAX_SIDE_CELLS = 2**24

_MAGIC = b"WTM"
_VERSION = 1
_HEAD = struct.Struct("<3sBBIIBBBB")  # magic, version, log2 cell, rows, columns, R, G, B, method
_METHOD_BYTES = 64


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Cells of a slide that hold tissue, a margin around it included.

    tissue: bool (rows, columns), True for tissue; read-only. cell: side of a cell in pixels of
    level 0, a power of two; the last row and column may reach beyond the slide.
    method: what found it. background: RGB of the slide's own glass, 0 ... 255.
    Raises SettingsError for other values, LimitError beyond MAX_CELLS.
    """

    tissue: Bools
    cell: int
    method: str
    background: tuple[int, int, int]

    def __post_init__(self) -> None:
        tissue = np.asarray(self.tissue)
        if tissue.dtype != np.bool_ or tissue.ndim != 2 or not tissue.size:
            raise SettingsError(
                f"tissue must be a bool array of (rows, columns), not {tissue.dtype} {tissue.shape}"
            )
        _check_size(*tissue.shape)
        if not 1 <= self.cell <= MAX_CELL or self.cell & (self.cell - 1):
            raise SettingsError(f"a cell of {self.cell} pixels is no power of two up to {MAX_CELL}")
        if not 0 < len(self.method) <= _METHOD_BYTES or not _plain(self.method.encode()):
            raise SettingsError(f"{self.method!r} is no name of a method")
        if len(self.background) != 3 or not all(0 <= c <= 255 for c in self.background):
            raise SettingsError(f"background {self.background} is no RGB of 0 ... 255")
        tissue = np.ascontiguousarray(tissue).view()
        tissue.flags.writeable = False
        object.__setattr__(self, "tissue", tissue)
        object.__setattr__(self, "cell", int(self.cell))
        object.__setattr__(self, "background", tuple(int(c) for c in self.background))

    @property
    def tissue_share(self) -> float:
        """Share of cells that are tissue, 0 ... 1."""
        return float(np.count_nonzero(self.tissue) / self.tissue.size)

    def glass(self, downsample: float, y: int, x: int, height: int, width: int) -> Bools:
        """bool (height, width): True for the pixels of a level's rectangle that are all glass.

        downsample: pixels of level 0 per pixel of that level; y, x: top left pixel in that level.
        A pixel that touches a cell of tissue is tissue. Beyond the slide, its last cells go on.
        Raises SettingsError for a rectangle or a downsample that cannot be.
        """
        _check_rectangle(downsample, y, x, height, width)
        if not height or not width:
            return np.zeros((height, width), np.bool_)
        top, bottom = self._cells(downsample, y, height, self.tissue.shape[0])
        left, right = self._cells(downsample, x, width, self.tissue.shape[1])
        found = self.tissue[top[0] : bottom[-1], left[0] : right[-1]]
        if not found.any():
            return np.ones((height, width), np.bool_)
        if found.all():
            return np.zeros((height, width), np.bool_)
        found = _touched(found, top - top[0], bottom - top[0])
        found = _touched(found.T, left - left[0], right - left[0]).T
        return np.ascontiguousarray(~found)

    def all_glass(self, downsample: float, y: int, x: int, height: int, width: int) -> bool:
        """True where no pixel of a level's rectangle touches tissue; arguments as of ``glass``."""
        _check_rectangle(downsample, y, x, height, width)
        if not height or not width:
            return True
        top, bottom = self._cells(downsample, y, height, self.tissue.shape[0])
        left, right = self._cells(downsample, x, width, self.tissue.shape[1])
        return not self.tissue[top[0] : bottom[-1], left[0] : right[-1]].any()

    def _cells(
        self, downsample: float, start: int, length: int, cells: int
    ) -> tuple[Indices, Indices]:
        """First cell, and the one after the last, under each of a line's pixels."""
        scale = downsample / self.cell
        pixels = np.arange(start, start + length, dtype=np.float64)
        first = np.floor(pixels * scale).astype(np.int64)
        end = np.ceil((pixels + 1) * scale).astype(np.int64)
        first = np.clip(first, 0, cells - 1)
        return first, np.clip(end, first + 1, cells)

    def pack(self) -> bytes:
        """Bytes that ``parse`` reads: a head, then bits by rows, deflated (see docs/tissue.md)."""
        method = self.method.encode()
        rows, columns = self.tissue.shape
        head = _HEAD.pack(
            _MAGIC,
            _VERSION,
            self.cell.bit_length() - 1,
            rows,
            columns,
            *self.background,
            len(method),
        )
        return head + method + zlib.compress(np.packbits(self.tissue).tobytes(), 9)

    @staticmethod
    def parse(data: bytes) -> TissueMask:
        """The mask in bytes from a file. Nothing is allocated before its size is checked.

        Raises FormatError or TruncatedError for broken bytes, LimitError beyond MAX_CELLS,
        UnsupportedError for a later version.
        """
        if len(data) < _HEAD.size:
            raise TruncatedError(f"tissue mask of {len(data)} bytes is shorter than its head")
        magic, version, shift, rows, columns, r, g, b, name = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise FormatError("bytes do not start like a tissue mask")
        if version != _VERSION:
            raise UnsupportedError(
                f"tissue mask has version {version}; this wsicodec reads version {_VERSION}"
            )
        if 2**shift > MAX_CELL:
            raise FormatError(f"tissue mask with cells of 2^{shift} pixels")
        if not rows or not columns:
            raise FormatError(f"tissue mask of {rows} x {columns} cells")
        _check_size(rows, columns)
        method = bytes(data[_HEAD.size : _HEAD.size + name])
        if len(method) < name:
            raise TruncatedError("tissue mask ends within its method")
        if not 0 < name <= _METHOD_BYTES or not _plain(method):
            raise FormatError("tissue mask has no name of a method")
        bits = _inflate(bytes(data[_HEAD.size + name :]), -(-rows * columns // 8))
        tissue = np.unpackbits(bits, count=rows * columns).view(np.bool_)
        return TissueMask(tissue.reshape(rows, columns), 2**shift, method.decode(), (r, g, b))


def _check_size(rows: int, columns: int) -> None:
    if max(rows, columns) > MAX_SIDE_CELLS or rows * columns > MAX_CELLS:
        raise LimitError(f"tissue mask of {rows} x {columns} cells exceeds {MAX_CELLS}")


def _check_rectangle(downsample: float, y: int, x: int, height: int, width: int) -> None:
    if not 0 < downsample < 2**40:
        raise SettingsError(f"a level cannot be {downsample} times smaller than level 0")
    if min(y, x, height, width) < 0:
        raise SettingsError(f"no rectangle of {height} x {width} at ({y}, {x})")


def _plain(name: bytes) -> bool:
    return all(0x21 <= byte <= 0x7E for byte in name)


def _touched(tissue: Bools, first: Indices, end: Indices) -> Bools:
    """Rows of ``tissue`` joined by "or" from first[i] to end[i] - 1, for every i."""
    if (end == first + 1).all():
        return tissue[first]
    before = np.zeros((tissue.shape[0] + 1, tissue.shape[1]), np.int32)
    np.cumsum(tissue, axis=0, out=before[1:])
    return before[end] > before[first]


def _inflate(data: bytes, size: int) -> npt.NDArray[np.uint8]:
    """Exactly ``size`` bytes of one deflated stream that ends where the data does."""
    inflater = zlib.decompressobj()
    try:
        bits = inflater.decompress(data, size) if data else b""
        # the checksum at the end is read only when more output is asked for
        beyond = inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error as error:
        raise FormatError(f"tissue mask does not inflate: {error}") from None
    if len(bits) < size or (not inflater.eof and not beyond):
        raise TruncatedError(f"tissue mask holds {len(bits)} bytes of {size}")
    if beyond or inflater.unused_data:
        raise FormatError("tissue mask holds more than its cells")
    return np.frombuffer(bits, np.uint8)
