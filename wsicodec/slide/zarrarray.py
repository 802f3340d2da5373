"""Arrays of Zarr format 3 in a folder, read chunk by chunk and without zarr: bounded and by name.

Only uint8 arrays, and only the codecs that images are stored with. The files come from strangers:
every size is checked before anything of it is allocated, no path of theirs leaves the folder, and
what is not understood is refused by name. Nothing stays open and no event loop runs, so an array
may be read from many threads and after a fork.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import os
import re
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import parse
from wsicodec.errors import FormatError, LimitError, SlideError, UnsupportedError, WsicodecError
from wsicodec.forking import renewed_after_fork

Bytes = npt.NDArray[np.uint8]

METADATA_FILE = "zarr.json"
MAX_METADATA_BYTES = 2**24
MAX_AXES = 8
MAX_LENGTH = 2**31
"""Of one axis."""
MAX_CHUNK_BYTES = 2**26
"""Samples of a chunk: 4096 x 4096 pixels of three fit."""
MAX_SHARD_CHUNKS = 2**16
MAX_STORED_BYTES = 2**28
"""Bytes of a chunk as it is stored."""
MISSING = 2**64 - 1
"""Offset and length, in a shard's index, of a chunk that is not there."""

_INDEX_ENTRY = 16
_INDICES_KEPT = 64
_KNOWN_KEYS = frozenset(
    {
        "zarr_format",
        "node_type",
        "shape",
        "data_type",
        "chunk_grid",
        "chunk_key_encoding",
        "fill_value",
        "codecs",
        "attributes",
        "storage_transformers",
        "dimension_names",
        "consolidated_metadata",
    }
)
_SAFE_PART = re.compile(r"(?!\.{1,2}$)[^\x00-\x1f/\\:]{1,255}")


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli, RFC 3720), as the codec ``crc32c`` of Zarr has it."""
    table, value = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return tuple(table)


def inside(folder: Path, path: object, where: str) -> Path:
    """The node of a hierarchy at ``path``; FormatError for one that is not below ``folder``."""
    parts = path.split("/") if isinstance(path, str) else []
    if not parts or not all(_SAFE_PART.fullmatch(part) for part in parts):
        raise FormatError(f"{where}: path {path!r:.200} is not the name of something inside it")
    return folder.joinpath(*parts)


def read_metadata(folder: Path, node_type: str, where: str) -> dict[str, Any]:
    """What ``zarr.json`` of an array or group says.

    Raises SlideError where it is missing or cannot be read, FormatError where it is damaged,
    LimitError where it is too long, UnsupportedError for other versions of Zarr.
    """
    path = folder / METADATA_FILE
    size = _file_size(path, where)
    if size is None:
        old = any((folder / name).exists() for name in (".zgroup", ".zarray"))
        if old:
            raise UnsupportedError(
                f"{where}: is of Zarr format 2 (OME-Zarr 0.4 and earlier); wsicodec reads OME-Zarr "
                "0.5, of Zarr format 3"
            )
        raise SlideError(f"{where}: has no {METADATA_FILE}")
    if size > MAX_METADATA_BYTES:
        raise LimitError(f"{where}: {METADATA_FILE} has {size} bytes, above {MAX_METADATA_BYTES}")
    try:
        value = json.loads(_read(path, 0, size, where))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: {METADATA_FILE} is not JSON: {error}") from None
    if not isinstance(value, dict) or value.get("zarr_format") != 3:
        raise UnsupportedError(f"{where}: {METADATA_FILE} is not of Zarr format 3")
    if value.get("node_type") != node_type:
        raise FormatError(f"{where}: is no {node_type} ({value.get('node_type')!r:.40})")
    return value


class ZarrArray:
    """A uint8 array of Zarr format 3.

    folder: holds its zarr.json. where: names it in messages.
    shape: of the array. chunk_shape: of what is decoded at once, inside shards if it has any.
    fill_value: of chunks that are not stored. names: of its axes. compression: name of the codec.

    Raises UnsupportedError for what this cannot read (data type, codec, chunk grid), LimitError for
    sizes beyond the caps, FormatError for damaged metadata, SlideError for a missing array.
    """

    def __init__(self, folder: Path, where: str) -> None:
        self.folder, self.where = folder, where
        metadata = read_metadata(folder, "array", where)
        try:
            self._parse(metadata)
        except WsicodecError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"{where}: metadata is damaged: {error!r:.200}") from None
        self.renew()
        renewed_after_fork(self)

    def renew(self) -> None:
        """Forget the indices of shards."""
        self._indices: collections.OrderedDict[Path, npt.NDArray[np.uint64]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def _parse(self, metadata: Mapping[str, Any]) -> None:
        where = self.where
        for key in metadata.keys() - _KNOWN_KEYS:
            value = metadata[key]
            if not (isinstance(value, dict) and value.get("must_understand") is False):
                raise UnsupportedError(f"{where}: has the extension {key!r:.80}")
        if metadata.get("storage_transformers"):
            raise UnsupportedError(f"{where}: has storage transformers")
        if metadata["data_type"] != "uint8":
            raise UnsupportedError(
                f"{where}: samples are {metadata['data_type']!r:.40}; wsicodec reads uint8"
            )
        self.shape = _lengths(metadata["shape"], "shape", where)
        names = metadata.get("dimension_names")
        self.names = None if names is None else tuple(names)
        fill = metadata["fill_value"]
        if type(fill) is not int or not 0 <= fill <= 255:
            raise FormatError(f"{where}: fill value {fill!r:.40} is not within 0 ... 255")
        self.fill_value = fill
        grid_name, grid = _named(metadata["chunk_grid"])
        if grid_name != "regular":
            raise UnsupportedError(f"{where}: chunk grid {grid_name!r:.80} is not read")
        outer = _lengths(grid["chunk_shape"], "chunk shape", where)
        self._key = _chunk_key(metadata["chunk_key_encoding"], where)
        codecs = _codec_list(metadata["codecs"])
        self._sharded = bool(codecs) and codecs[0][0] == "sharding_indexed"
        if self._sharded:
            if len(codecs) != 1:
                raise UnsupportedError(f"{where}: codec {codecs[1][0]!r:.80} around shards")
            codecs = self._parse_shards(codecs[0][1], outer)
        else:
            self.chunk_shape = outer
        if len(self.chunk_shape) != len(self.shape):
            raise FormatError(f"{where}: chunks {self.chunk_shape} of an array {self.shape}")
        if math.prod(self.chunk_shape) > MAX_CHUNK_BYTES:
            raise LimitError(
                f"{where}: chunks of {self.chunk_shape} are above {MAX_CHUNK_BYTES} samples"
            )
        self._chain = _Chain(codecs, self.chunk_shape, where)
        self.compression = self._chain.name

    def _parse_shards(
        self, settings: Mapping[str, Any], outer: tuple[int, ...]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        where = self.where
        self.chunk_shape = _lengths(settings["chunk_shape"], "chunk shape", where)
        if len(outer) != len(self.chunk_shape) or any(
            n % m for n, m in zip(outer, self.chunk_shape, strict=True)
        ):
            raise FormatError(f"{where}: shards {outer} are not made of chunks {self.chunk_shape}")
        self._per_shard = tuple(n // m for n, m in zip(outer, self.chunk_shape, strict=True))
        if math.prod(self._per_shard) > MAX_SHARD_CHUNKS:
            raise LimitError(
                f"{where}: shards of {self._per_shard} chunks are above {MAX_SHARD_CHUNKS} chunks"
            )
        self._index_last = settings.get("index_location", "end") != "start"
        index = _codec_list(settings["index_codecs"])
        first_name, first = index[0]
        rest = [name for name, _ in index[1:]]
        endian = first.get("endian", "little")
        if first_name != "bytes" or endian != "little" or rest not in ([], ["crc32c"]):
            raise UnsupportedError(f"{where}: index codecs {[first_name, *rest]!r:.200} of shards")
        self._index_checked = bool(rest)
        return _codec_list(settings["codecs"])

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-n // m) for n, m in zip(self.shape, self.chunk_shape, strict=True))

    def stored(self, index: tuple[int, ...]) -> bytes | None:
        """A chunk's bytes, None where it is not stored. index: its place in ``grid``.

        Raises SlideError, LimitError naming the chunk.
        """
        if not self._sharded:
            path = self.folder / self._key(index)
            size = _file_size(path, self.where)
            return None if size is None else self._range(path, 0, size, size, index)
        shard = tuple(i // n for i, n in zip(index, self._per_shard, strict=True))
        path = self.folder / self._key(shard)
        size = _file_size(path, self.where)
        if size is None:
            return None
        within = tuple(i % n for i, n in zip(index, self._per_shard, strict=True))
        entries = self._shard_index(path, size)
        offset, count = map(int, entries[np.ravel_multi_index(within, self._per_shard)])
        if offset == count == MISSING:
            return None
        return self._range(path, offset, count, size, index)

    def decode(self, data: bytes, index: tuple[int, ...]) -> Bytes:
        """Samples of a stored chunk, shaped ``chunk_shape``; may be a view of other memory order.

        Raises SlideError, or the error of our own codec, naming the chunk.
        """
        where = f"{self.where}: chunk {index}"
        try:
            return self._chain.decode(data)
        except WsicodecError as error:
            raise type(error)(f"{where}: {error}") from error
        except Exception as error:
            raise SlideError(f"{where}: cannot be decoded: {error or type(error)}") from error

    def read_all(self, limit: int) -> bytes:
        """All samples of an array of one axis. LimitError above ``limit``; SlideError where some
        are missing."""
        if len(self.shape) != 1 or self.shape[0] > limit:
            raise LimitError(f"{self.where}: array of {self.shape} is above {limit} bytes")
        parts = []
        for number in range(self.grid[0]):
            data = self.stored((number,))
            if data is None:
                raise SlideError(f"{self.where}: chunk {number} is missing")
            parts.append(self.decode(data, (number,)).tobytes())
        return b"".join(parts)[: self.shape[0]]

    def _range(
        self, path: Path, offset: int, count: int, size: int, index: tuple[int, ...]
    ) -> bytes:
        where = f"{self.where}: chunk {index}"
        if count > MAX_STORED_BYTES:
            raise LimitError(f"{where}: {count} bytes exceed {MAX_STORED_BYTES}")
        if offset + count > size:
            raise SlideError(
                f"{where}: its bytes {offset} ... {offset + count} lie beyond the end of "
                f"{path.name} at {size}: it was cut short or is damaged"
            )
        return _read(path, offset, count, where)

    def _shard_index(self, path: Path, size: int) -> npt.NDArray[np.uint64]:
        """(offset, length) of the chunks of a shard, uint64 (chunks, 2)."""
        with self._lock:
            found = self._indices.get(path)
            if found is not None:
                self._indices.move_to_end(path)
                return found
        where = f"{self.where}: shard {path.relative_to(self.folder)}"
        length = _INDEX_ENTRY * math.prod(self._per_shard)
        whole = length + (4 if self._index_checked else 0)
        if whole > size:
            raise SlideError(f"{where}: {size} bytes are too few for its index: it was cut short")
        data = _read(path, size - whole if self._index_last else 0, whole, where)
        if self._index_checked and crc32c(data[:length]) != int.from_bytes(data[length:], "little"):
            raise SlideError(f"{where}: its index does not match its checksum: it is damaged")
        entries = np.frombuffer(data, "<u8", length // 8).reshape(-1, 2).astype(np.uint64)
        with self._lock:
            self._indices[path] = entries
            while len(self._indices) > _INDICES_KEPT:
                self._indices.popitem(last=False)
        return entries


_Inflate = Callable[[bytes, int], bytes]


class _Chain:
    """Decodes a chunk: the codecs of an array behind its shards.

    name: of what the samples are compressed with.
    """

    def __init__(
        self, codecs: list[tuple[str, Mapping[str, Any]]], shape: tuple[int, ...], where: str
    ) -> None:
        names = [name for name, _ in codecs]
        for name in names:
            if name not in (*_SERIALIZERS, *_BYTE_CODECS, "transpose"):
                raise UnsupportedError(
                    f"{where}: codec {name!r:.80} is not read; wsicodec reads "
                    f"{', '.join((*_SERIALIZERS, *_BYTE_CODECS, 'transpose'))}"
                )
        places = [i for i, name in enumerate(names) if name in _SERIALIZERS]
        if (
            len(places) != 1
            or any(name != "transpose" for name in names[: places[0]])
            or any(name not in _BYTE_CODECS for name in names[places[0] + 1 :])
        ):
            raise FormatError(f"{where}: codecs {names!r:.200} are in no possible order")
        self._orders = []
        for _, settings in codecs[: places[0]]:
            order = tuple(settings["order"])
            if sorted(order) != list(range(len(shape))):
                raise FormatError(f"{where}: transposition {order!r:.80} of {shape}")
            self._orders.append(order)
            shape = tuple(shape[axis] for axis in order)
        self._shape = shape
        serializer, settings = codecs[places[0]]
        self._axis = _channel_axis(settings, shape, where) if serializer == "wsicodec" else None
        self._unpack = [_BYTE_CODECS[name] for name in reversed(names[places[0] + 1 :])]
        packed = [name for name in names[places[0] + 1 :] if name != "crc32c"]
        last = packed[-1] if packed else "none" if serializer == "bytes" else serializer
        self.name = last.removeprefix("numcodecs.")

    def decode(self, data: bytes) -> Bytes:
        """Samples in the shape of a chunk."""
        expected = math.prod(self._shape)
        # a stream of our own has any length; what wraps it may not make it larger than allowed
        limit = expected if self._axis is None else MAX_STORED_BYTES
        for unpack in self._unpack:
            data = unpack(data, limit + limit // 64 + 1024)  # packing twice may have added a little
        if self._axis is None:
            if len(data) != expected:
                raise SlideError(f"holds {len(data)} samples, not {expected}")
            chunk: Bytes = np.frombuffer(data, np.uint8).reshape(self._shape)
        else:
            others = self._shape[: self._axis] + self._shape[self._axis + 1 :]
            tile = parse(data)  # the size is checked before pixels are allocated
            if (tile.height, tile.width) != others[-2:]:
                raise FormatError(
                    f"tile is {tile.width} x {tile.height}, the chunk {others[-1]} x {others[-2]}"
                )
            from wsicodec.codec import decode

            chunk = np.moveaxis(decode(data).reshape(*others, 3), -1, self._axis)
        for order in reversed(self._orders):
            chunk = chunk.transpose(np.argsort(order))
        return chunk


def _channel_axis(settings: Mapping[str, Any], shape: tuple[int, ...], where: str) -> int:
    """The axis of colours in chunks of codec ``wsicodec`` (wsicodec.plugins.zarr), from 0."""
    axis = settings.get("channel_axis", -1)
    if type(axis) is not int or not -len(shape) <= axis < len(shape):
        raise FormatError(f"{where}: channel axis {axis!r:.40} of {shape}")
    axis %= len(shape)
    others = shape[:axis] + shape[axis + 1 :]
    if len(others) < 2 or shape[axis] != 3 or math.prod(others[:-2]) != 1:
        raise FormatError(f"{where}: chunks of {shape} are not one RGB tile")
    return axis


def _gzip(data: bytes, limit: int) -> bytes:
    import zlib

    inflater = zlib.decompressobj(31)
    out = inflater.decompress(data, limit + 1)
    if len(out) > limit:
        raise LimitError(f"unpacks to more than {limit} bytes")
    if not inflater.eof:
        raise SlideError("gzip stream ends early")
    return out


def _zlib(data: bytes, limit: int) -> bytes:
    import zlib

    inflater = zlib.decompressobj()
    out = inflater.decompress(data, limit + 1)
    if len(out) > limit:
        raise LimitError(f"unpacks to more than {limit} bytes")
    if not inflater.eof:
        raise SlideError("zlib stream ends early")
    return out


def _zstd(data: bytes, limit: int) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.zstd_decode(data, out=limit))


def _blosc(data: bytes, limit: int) -> bytes:
    import imagecodecs

    if len(data) < 16 or int.from_bytes(data[4:8], "little") > limit:
        raise LimitError(f"unpacks to more than {limit} bytes")
    return bytes(imagecodecs.blosc_decode(data, out=int.from_bytes(data[4:8], "little")))


def _crc32c(data: bytes, limit: int) -> bytes:
    del limit
    if len(data) < 4 or crc32c(memoryview(data)[:-4]) != int.from_bytes(data[-4:], "little"):
        raise SlideError("checksum does not match: the bytes are damaged")
    return data[:-4]


_SERIALIZERS = ("bytes", "wsicodec")
_BYTE_CODECS: dict[str, _Inflate] = {
    "gzip": _gzip,
    "zstd": _zstd,
    "blosc": _blosc,
    "crc32c": _crc32c,
    "numcodecs.zlib": _zlib,
}


def _named(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and configuration of an extension point; a bare name is one without."""
    if isinstance(value, str):
        return value, {}
    settings = value.get("configuration") or {}
    if not isinstance(value["name"], str) or not isinstance(settings, dict):
        raise TypeError(f"{value!r:.80} has no name")
    return value["name"], settings


def _codec_list(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(value, list) or not 1 <= len(value) <= 16:
        raise TypeError(f"codecs are {value!r:.80}")
    return [_named(codec) for codec in value]


def _lengths(value: Any, what: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise FormatError(f"{where}: {what} {value!r:.80} is not a list of numbers")
    if not 1 <= len(value) <= MAX_AXES or not all(1 <= n <= MAX_LENGTH for n in value):
        raise LimitError(
            f"{where}: {what} {value!r:.80} is not 1 ... {MAX_AXES} numbers of 1 ... {MAX_LENGTH}"
        )
    return tuple(value)


def _chunk_key(value: Any, where: str) -> Callable[[tuple[int, ...]], str]:
    name, settings = _named(value)
    separators = {"default": "/", "v2": "."}
    if name not in separators:
        raise UnsupportedError(f"{where}: chunk keys {name!r:.80} are not read")
    separator = settings.get("separator", separators[name])
    if separator not in ("/", "."):
        raise FormatError(f"{where}: separator {separator!r:.40} of chunk keys")
    prefix = [] if name == "v2" else ["c"]
    return lambda index: separator.join([*prefix, *map(str, index)])


def _file_size(path: Path, where: str) -> int | None:
    """Bytes of a file, None where there is none; SlideError for what is no regular file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SlideError(f"{where}: {path.name} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise SlideError(f"{where}: {path.name} is not a regular file")
    return found.st_size


def _read(path: Path, offset: int, count: int, where: str) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(count)
            while len(data) < count and (more := file.read(count - len(data))):
                data += more
    except OSError as error:
        raise SlideError(
            f"{where}: {path.name} cannot be read: {error.strerror or error}"
        ) from error
    if len(data) != count:
        raise SlideError(f"{where}: {path.name} became shorter while it was read")
    return data


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; links are not followed.

    Files that vanish meanwhile count or do not. Raises OSError for what else the system refuses.
    """
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += (Path(root) / name).lstat().st_size
    return size
