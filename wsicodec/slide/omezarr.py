"""Writes pyramids of coded tiles as OME-Zarr 0.5: Zarr format 3, sharded, the tiles as they come.

Tiles arrive as bytes, already coded, in raster order, level after level; nothing here sees their
pixels. Each becomes one chunk (3, rows, columns) of an array (c, y, x), read by the zarr codec
``wsicodec``: a tile of wsicodec's own is the chunk byte for byte, a stream of another codec gets
the header of a tile (18 bytes, with a checksum) in front of it.

    slide.ome.zarr/zarr.json          attributes: ome (multiscales, omero), wsicodec (all the rest)
                   0/ 1/ ...          levels
                   associated/label   an image of one level; likewise macro, thumbnail
                   wsicodec/          icc_profile, model, passport: arrays of bytes

All glass tiles of a shard are entries of its index that point to one stream. A chunk left out
would be read as the fill value, of which an array has one for all channels: not the slide's own
background. So every chunk is stored, and the fill value is white only for what is lost later.

What is in a shard is written when its row of tiles comes: memory holds the tiles of one shard of
one row, and the index of one row of shards.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsicodec.bitstream import HEADER_BYTES, MAX_SIDE, Mode, Tile, is_tile, parse
from wsicodec.errors import LimitError, SettingsError, SlideError, UnsupportedError, WsicodecError
from wsicodec.slide.ometiff import MAX_ASSOCIATED, MAX_LEVELS, CodedLevel, SlideMetadata
from wsicodec.slide.placing import atomic_folder
from wsicodec.slide.protocol import AssociatedImage, Image, StoredImage
from wsicodec.slide.record import AREA_AVERAGE, FileRecord
from wsicodec.slide.repacking import repack, unpack
from wsicodec.slide.zarrarray import (
    MAX_METADATA_BYTES,
    MAX_SHARD_CHUNKS,
    METADATA_FILE,
    MISSING,
    crc32c,
)

OME_VERSION = "0.5"
ATTRIBUTES_FORMAT, ATTRIBUTES_VERSION = "wsicodec-omezarr", 1
WHITE = 255
DEFAULT_SHARD_TILES = 16
BLOBS = ("icc_profile", "model", "passport")
"""Arrays of bytes in the group ``wsicodec``."""

MODES = {
    "jpeg": Mode.JPEG,
    "jpeg2000": Mode.JPEG2000,
    "jpegxl": Mode.JPEGXL,
    "lossless": Mode.LOSSLESS,
}
"""Codecs other than the learned one, and the modes of the tiles that hold their streams."""

_BLOB_CHUNK = 2**24
_TIFF_JPEG, _TIFF_RGB = 7, 2
_SIDES = struct.Struct("<HH")
_SIDES_OFFSET = 6  # of height and width in a tile's header
_COLOURS = (("R", "FF0000"), ("G", "00FF00"), ("B", "0000FF"))
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def write_omezarr(
    folder: Path,
    levels: Sequence[CodedLevel],
    codec: str,
    metadata: SlideMetadata,
    record: FileRecord,
    *,
    model: bytes | None = None,
    associated: Sequence[AssociatedImage] = (),
    passport: bytes | None = None,
    shard_tiles: int = DEFAULT_SHARD_TILES,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    part: Path | None = None,
) -> None:
    """Write a pyramid as a folder that appears under its name whole or not at all.

    levels: finest first; their tiles are consumed in this order, one at a time.
    model, passport: bytes to carry along. associated: images beside the pyramid, without loss.
    shard_tiles: rows and columns of tiles in a shard, a file. overwrite: replace an earlier Zarr.
    check: called with the complete folder before it gets its name; what it raises ends the writing.
    part: as in ``atomic_folder``.

    Raises SettingsError, UnsupportedError (codec), SlideError when tiles are too few or too many,
    have no bytes or another size, and for what the file system refuses, LimitError for metadata
    that no reader would take.
    """
    check_codec(codec)
    check_slide(levels, associated, shard_tiles)
    tile_codec = _tile_codec(codec, record)
    blobs = dict(zip(BLOBS, (metadata.icc_profile, model, passport), strict=True))
    kept = {name: data for name, data in blobs.items() if data}
    places = _associated_places(associated)
    downsamples = [_downsample(levels[0], level) for level in levels]
    attributes = {
        "ome": _ome(metadata.name, downsamples, metadata.mpp_y, metadata.mpp_x, record),
        "wsicodec": {
            "format": ATTRIBUTES_FORMAT,
            "version": ATTRIBUTES_VERSION,
            "record": record.as_dict(),
            "description": metadata.description,
            "magnification": metadata.magnification,
            "acquisition_date": metadata.acquisition_date,
            "associated": [
                {"name": image.name, "path": place}
                for image, place in zip(associated, places, strict=True)
            ],
            "blobs": {name: f"wsicodec/{name}" for name in kept},
            "every_chunk_is_stored": True,
        },
    }
    with atomic_folder(
        folder, overwrite=overwrite, part=part, check_replaced=check_replaced
    ) as new:
        _write_group(new, attributes)
        for index, level in enumerate(levels):
            _write_image_array(
                new / str(index),
                _Grid(level.height, level.width, level.tile_size, level.tile_size),
                _wrapped(_counted(level, index), codec, level.tile_size, f"level {index}"),
                tile_codec,
                shard_tiles,
            )
        if kept:
            _write_group(new / "wsicodec", {})
        for name, data in kept.items():
            _write_blob(new / "wsicodec" / name, data)
        if places:
            _write_group(new / "associated", {})
        for image, place in zip(associated, places, strict=True):
            _write_associated(new / place, image, record)
        if check is not None:
            check(new)


def check_replaced(folder: Path) -> None:
    """Raise SlideError for what a new Zarr hierarchy must not replace: all but another one."""
    if not (folder / METADATA_FILE).is_file():
        raise SlideError(f"{folder}: is no Zarr hierarchy, and not replaced by one")


def check_codec(codec: str) -> None:
    """Raise UnsupportedError for a codec that an OME-Zarr cannot be written with."""
    if codec != "learned" and codec not in MODES:
        raise UnsupportedError(
            f"codec {codec!r} has no place in wsicodec tiles; OME-Zarr files can be written with "
            f"learned, {', '.join(MODES)}"
        )


def check_slide(
    levels: Sequence[CodedLevel],
    associated: Sequence[AssociatedImage],
    shard_tiles: int = DEFAULT_SHARD_TILES,
) -> None:
    """Raise what ``write_omezarr`` would raise of this, before any tile is coded."""
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise SettingsError(f"{len(levels)} levels are not within 1 ... {MAX_LEVELS}")
    if not 1 <= shard_tiles <= int(MAX_SHARD_CHUNKS**0.5):
        raise SettingsError(
            f"{shard_tiles} tiles a side of a shard are not within 1 ... "
            f"{int(MAX_SHARD_CHUNKS**0.5)}"
        )
    for index, level in enumerate(levels):
        if not 1 <= level.tile_size <= MAX_SIDE:
            raise SettingsError(
                f"level {index}: tiles of {level.tile_size} are not within 1 ... {MAX_SIDE}"
            )
    if len(associated) > MAX_ASSOCIATED:
        raise SettingsError(f"{len(associated)} images beside the pyramid exceed {MAX_ASSOCIATED}")
    if len({image.name for image in associated}) < len(associated):
        raise SettingsError("two images beside the pyramid have the same name")


# ---------------------------------------------------------------------------------------------
# tiles


def _counted(level: CodedLevel, index: int) -> Iterator[tuple[bytes, bool]]:
    """(stream, is the shared glass) of the level's tiles, as many as its grid has."""
    done = 0
    for tile in level.tiles:
        if done == level.count:
            raise SlideError(f"level {index}: more than {level.count} tiles came to be written")
        data = level.glass if tile is None else tile
        if not data:
            raise SlideError(f"level {index}: tile {done} of {level.count} has no bytes")
        done += 1
        yield data, tile is None
    if done < level.count:
        raise SlideError(f"level {index}: {done} of {level.count} tiles came to be written")


def _wrapped(
    streams: Iterable[tuple[bytes, bool]], codec: str, size: int, where: str
) -> Iterator[tuple[bytes, bool]]:
    """The streams as wsicodec tiles of ``size`` x ``size``."""
    glass: tuple[bytes, bytes] = (b"", b"")
    for stream, is_glass in streams:
        if is_glass and glass[0] is stream:
            yield glass[1], True
            continue
        tile = as_tile(stream, codec, size, size, where)
        if is_glass:
            glass = stream, tile
        yield tile, is_glass


def as_tile(stream: bytes, codec: str, height: int, width: int, where: str) -> bytes:
    """A codec's stream as a wsicodec tile; a tile is left as it is.

    Raises SlideError for a tile of another size, UnsupportedError for a plain stream of a codec
    that tiles do not know.
    """
    if is_tile(stream):
        if len(stream) < HEADER_BYTES or _SIDES.unpack_from(stream, _SIDES_OFFSET) != (
            height,
            width,
        ):
            raise SlideError(f"{where}: a tile that is not {width} x {height} came to be written")
        return stream
    if codec not in MODES:
        raise UnsupportedError(
            f"{where}: a stream that starts with {stream[:4].hex(' ')} is no tile of codec {codec}"
        )
    return Tile(MODES[codec], height, width, stream).pack()


def as_stream(tile: bytes, codec: str) -> bytes:
    """The inverse of ``as_tile``."""
    mode = MODES.get(codec)
    return tile[HEADER_BYTES:] if mode is not None and tile[5:6] == bytes([mode]) else tile


# ---------------------------------------------------------------------------------------------
# arrays


@dataclass(frozen=True)
class _Grid:
    """An image in tiles."""

    height: int
    width: int
    tile_height: int
    tile_width: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_height)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_width)


def _write_image_array(
    folder: Path,
    grid: _Grid,
    tiles: Iterable[tuple[bytes, bool]],
    codec: dict[str, Any],
    shard_tiles: int,
) -> None:
    """An array (c, y, x) of the tiles, which come in raster order."""
    tall, wide = min(shard_tiles, grid.rows), min(shard_tiles, grid.columns)
    waiting = iter(tiles)
    for shard_row, first in enumerate(range(0, grid.rows, tall)):
        names = folder / "c" / "0" / str(shard_row)
        names.mkdir(parents=True)
        shards = [
            _Shard(names / str(column), tall, wide) for column in range(-(-grid.columns // wide))
        ]
        for row in range(min(tall, grid.rows - first)):
            for number, shard in enumerate(shards):
                count = min(wide, grid.columns - number * wide)
                shard.append(row, list(itertools.islice(waiting, count)))
        for shard in shards:
            shard.finish()
    for _ in waiting:  # lets the count notice tiles that nobody asked for
        pass
    _write_json(
        folder,
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [3, grid.height, grid.width],
            "data_type": "uint8",
            "chunk_grid": {
                "name": "regular",
                "configuration": {
                    "chunk_shape": [3, tall * grid.tile_height, wide * grid.tile_width]
                },
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": WHITE,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [3, grid.tile_height, grid.tile_width],
                        "codecs": [codec],
                        "index_codecs": [
                            {"name": "bytes", "configuration": {"endian": "little"}},
                            {"name": "crc32c"},
                        ],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": {},
            "dimension_names": ["c", "y", "x"],
        },
    )


class _Shard:
    """A file of chunks that grows row by row; its index comes last. Open only while written to."""

    def __init__(self, path: Path, rows: int, columns: int) -> None:
        self._path = path
        self._index = np.full((rows, columns, 2), MISSING, "<u8")
        self._size = 0
        self._glass: dict[bytes, int] = {}

    def append(self, row: int, tiles: Sequence[tuple[bytes, bool]]) -> None:
        """The first tiles of a row."""
        data = []
        for column, (tile, is_glass) in enumerate(tiles):
            offset = self._glass.get(tile) if is_glass else None
            if offset is None:
                offset = self._size
                self._size += len(tile)
                data.append(tile)
                if is_glass:
                    self._glass[tile] = offset
            self._index[row, column] = offset, len(tile)
        self._write(data)

    def finish(self) -> None:
        index = self._index.tobytes()
        self._write([index, crc32c(index).to_bytes(4, "little")])

    def _write(self, data: list[bytes]) -> None:
        if data:
            with self._path.open("ab") as file:
                file.writelines(data)


def _tile_codec(codec: str, record: FileRecord) -> dict[str, Any]:
    """The codec ``wsicodec`` as the metadata of an array names it (wsicodec.plugins.zarr)."""
    settings: dict[str, Any] = {"channel_axis": -3}
    if codec == "lossless":
        settings["lossless"] = True
    elif record.quality is not None:
        settings["quality"] = record.quality
    if codec == "learned" and record.models:
        settings["model"] = record.models[0].name
        settings["model_sha256"] = record.models[0].sha256
    return {"name": "wsicodec", "configuration": settings}


def _write_blob(folder: Path, data: bytes) -> None:
    """An array of bytes, as they are."""
    parts = -(-len(data) // _BLOB_CHUNK)
    chunk = -(-len(data) // parts)
    (folder / "c").mkdir(parents=True)
    for number in range(parts):
        piece = data[number * chunk : (number + 1) * chunk]
        (folder / "c" / str(number)).write_bytes(piece.ljust(chunk, b"\0"))
    _write_json(
        folder,
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [len(data)],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes"}],
            "attributes": {},
        },
    )


def _write_group(folder: Path, attributes: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder, {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def _write_json(folder: Path, value: dict[str, Any]) -> None:
    text = json.dumps(_without_surrogates(value), indent=1, allow_nan=False)
    if len(text) > MAX_METADATA_BYTES:
        raise LimitError(f"metadata of {len(text)} bytes exceed {MAX_METADATA_BYTES}")
    (folder / METADATA_FILE).write_text(text, encoding="ascii")


def _without_surrogates(value: Any) -> Any:
    """Strings of halves of characters, which strict parsers refuse, lose these."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------
# metadata


def _downsample(first: CodedLevel, level: CodedLevel) -> tuple[float, float]:
    """Pixels of level 0 to one of the level, (y, x).

    A level that halves n times, or takes every n-th pixel, has the whole number; its size divided
    by the first one's, sizes being rounded, is near it only.
    """
    y, x = first.height / level.height, first.width / level.width
    powers = [2**k for k in range(32)]
    for step in powers:
        if (-(-first.height // step), -(-first.width // step)) == (level.height, level.width):
            return step, step
    found = []
    for whole, part, ratio in ((first.height, level.height, y), (first.width, level.width, x)):
        step = max(1, round(ratio))
        found.append(step if part in (whole // step, -(-whole // step)) else ratio)
    return found[0], found[1]


def _ome(
    name: str,
    downsamples: Sequence[tuple[float, float]],
    mpp_y: float | None,
    mpp_x: float | None,
    record: FileRecord,
) -> dict[str, Any]:
    """What OME-Zarr 0.5 says of an image (c, y, x) whose levels lie in folders 0, 1, ...

    A pixel's place is its centre, so that of a pixel which averages n x n others is shifted by
    (n - 1) / 2 of theirs.
    """
    y, x = mpp_y or mpp_x, mpp_x or mpp_y
    known = y is not None and x is not None
    unit = {"unit": "micrometer"} if known else {}
    steps = (y, x) if y is not None and x is not None else (1.0, 1.0)
    datasets = []
    for index, factors in enumerate(downsamples):
        scale = [factor * step for factor, step in zip(factors, steps, strict=True)]
        shift = [(factor - 1) / 2 * step for factor, step in zip(factors, steps, strict=True)]
        transformations: list[dict[str, Any]] = [{"type": "scale", "scale": [1.0, *scale]}]
        if any(shift):
            transformations.append({"type": "translation", "translation": [0.0, *shift]})
        datasets.append({"path": str(index), "coordinateTransformations": transformations})
    averaged = AREA_AVERAGE in record.levels
    return {
        "version": OME_VERSION,
        "multiscales": [
            {
                "name": name,
                "type": "mean" if averaged else "source",
                "metadata": {
                    "description": "levels are area averages of level 0"
                    if averaged
                    else "levels are those of the source",
                    "method": "wsicodec",
                    "version": record.wsicodec,
                },
                "axes": [
                    {"name": "c", "type": "channel"},
                    {"name": "y", "type": "space", **unit},
                    {"name": "x", "type": "space", **unit},
                ],
                "datasets": datasets,
            }
        ],
        "omero": {
            "name": name,
            "channels": [
                {
                    "label": label,
                    "color": colour,
                    "active": True,
                    "coefficient": 1,
                    "family": "linear",
                    "inverted": False,
                    "window": {"min": 0, "max": 255, "start": 0, "end": 255},
                }
                for label, colour in _COLOURS
            ],
            "rdefs": {"model": "color", "defaultT": 0, "defaultZ": 0},
        },
    }


# ---------------------------------------------------------------------------------------------
# images beside the pyramid


def _associated_places(images: Sequence[AssociatedImage]) -> list[str]:
    """Folders of images; a name that is no plain word, or differs by case alone, gets a number."""
    taken: set[str] = set()
    places = []
    for index, image in enumerate(images):
        name = image.name
        if not _PLAIN_NAME.fullmatch(name) or name.lower() in taken:
            name = f"image-{index}"
        taken.add(name.lower())
        places.append(f"associated/{name}")
    return places


def _write_associated(folder: Path, image: AssociatedImage, record: FileRecord) -> None:
    """An OME-Zarr image of one level and one shard."""
    pixels = image.pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise SettingsError(
            f"image {image.name!r} is {pixels.dtype} {pixels.shape}, not uint8 (rows, columns, 3)"
        )
    stored = None if image.stored is None else unpack(image.stored) or image.stored
    copied = None if stored is None else _repacked(stored, pixels) or _copied_tiles(stored, pixels)
    grid, tiles = _lossless_tiles(pixels) if copied is None else copied
    _write_group(folder, {"ome": _ome(image.name, [(1, 1)], None, None, record)})
    codec = {"name": "wsicodec", "configuration": {"channel_axis": -3, "lossless": True}}
    _write_image_array(
        folder / "0", grid, ((tile, False) for tile in tiles), codec, int(MAX_SHARD_CHUNKS**0.5)
    )


def _lossless_tiles(pixels: Image) -> tuple[_Grid, list[bytes]]:
    height, width = pixels.shape[:2]
    grid = _Grid(height, width, min(height, MAX_SIDE), min(width, MAX_SIDE))
    return grid, [_lossless(tile) for tile in _padded_tiles(pixels, grid)]


def _repacked(stored: StoredImage, pixels: Image) -> tuple[_Grid, list[bytes]] | None:
    """JPEG in fewer bytes; None where that is not possible, or chunks would differ in size."""
    found = repack(stored, pixels)
    if found is None:
        return None
    grid = _Grid(stored.height, stored.width, *found.tile)
    sizes = {(tile.height, tile.width) for tile in map(parse, found.tiles)}
    if sizes != {found.tile} or max(grid.rows, grid.columns) > MAX_SHARD_CHUNKS**0.5:
        return None
    return grid, list(found.tiles)


def _copied_tiles(stored: StoredImage, pixels: Image) -> tuple[_Grid, list[bytes]] | None:
    """JPEG segments of a TIFF as they are, where they decode to the pixels by themselves; the
    others, like a last strip of fewer rows, without loss. None where none can be taken over."""
    from wsicodec.slide.jpegstream import ADOBE_RGB, with_tables

    if stored.compression != _TIFF_JPEG or stored.planarconfig != 1:
        return None
    rows, columns = stored.tile or (
        min(stored.rows_per_strip or stored.height, stored.height),
        stored.width,
    )
    grid = _Grid(stored.height, stored.width, rows, columns)
    if (
        (stored.height, stored.width) != pixels.shape[:2]
        or not (1 <= rows <= MAX_SIDE and 1 <= columns <= MAX_SIDE)
        or len(stored.segments) != grid.rows * grid.columns
        or max(grid.rows, grid.columns) > MAX_SHARD_CHUNKS**0.5
    ):
        return None
    head = ADOBE_RGB if stored.photometric == _TIFF_RGB else b""
    tiles, copied = [], 0
    places = itertools.product(range(0, grid.height, rows), range(0, grid.width, columns))
    for segment, (y, x), tile in zip(
        stored.segments, places, _padded_tiles(pixels, grid), strict=True
    ):
        shown = pixels[y : y + rows, x : x + columns]
        found = None
        with contextlib.suppress(WsicodecError):
            found = _equal_jpeg(with_tables(stored.jpegtables, segment, head), tile, shown)
        copied += found is not None
        tiles.append(_lossless(tile) if found is None else found)
    return (grid, tiles) if copied else None


def _equal_jpeg(stream: bytes, tile: Image, shown: Image) -> bytes | None:
    """The stream as a tile if it has the tile's size and decodes to what is shown of it."""
    from wsicodec.codec import decode

    packed = Tile(Mode.JPEG, tile.shape[0], tile.shape[1], stream).pack()
    decoded = decode(packed)[: shown.shape[0], : shown.shape[1]]
    return packed if np.array_equal(decoded, shown) else None


def _padded_tiles(pixels: Image, grid: _Grid) -> Iterator[Image]:
    for y in range(0, grid.height, grid.tile_height):
        for x in range(0, grid.width, grid.tile_width):
            tile = pixels[y : y + grid.tile_height, x : x + grid.tile_width]
            rows, columns = grid.tile_height - tile.shape[0], grid.tile_width - tile.shape[1]
            yield np.ascontiguousarray(np.pad(tile, ((0, rows), (0, columns), (0, 0)), mode="edge"))


def _lossless(tile: Image) -> bytes:
    from wsicodec.codec import encode

    return Tile(Mode.LOSSLESS, tile.shape[0], tile.shape[1], encode(tile, codec="lossless")).pack()
