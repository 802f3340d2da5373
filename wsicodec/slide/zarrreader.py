"""OME-Zarr 0.5 images as pyramids of RGB pixels: what wsicodec writes, and others' of uint8 RGB.

``ZarrReader`` decodes only the chunks that a region touches, keeps the latest ones in a bounded
cache, and may be used from many threads at once. Neither zarr nor an event loop is needed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wsicodec.errors import (
    FormatError,
    LimitError,
    SettingsError,
    SlideError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.slide.ometiff import MAX_ASSOCIATED, MAX_LEVELS
from wsicodec.slide.omezarr import (
    ATTRIBUTES_FORMAT,
    ATTRIBUTES_VERSION,
    MODES,
    as_stream,
)
from wsicodec.slide.protocol import DEFAULT_CACHE_BYTES, AssociatedImage, Image, Level, SlideInfo
from wsicodec.slide.record import FileRecord, parse_record
from wsicodec.slide.tiledreader import TiledReader
from wsicodec.slide.zarrarray import ZarrArray, folder_bytes, inside, read_metadata

MAX_BLOB_BYTES = 2**28
MAX_ASSOCIATED_PIXELS = 2**26

_MICROMETRES = {
    "angstrom": 1e-4,
    "picometer": 1e-6,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}
_LOSSY = ("wsicodec",)


class ZarrReader(TiledReader):
    """An open OME-Zarr image.

    path: its folder. cache_bytes: decoded tiles kept at most; with two rows of the file's tiles in
    it, reading in raster order decodes each of them once.

    Axes are (c, y, x) or (y, x, c), or more of them of length 1. A chunk that is not stored has the
    array's fill value, as Zarr defines; where wsicodec wrote the file, all of them are stored and
    a missing one is a SlideError.

    Raises SlideError where the folder is missing or no OME-Zarr image, UnsupportedError where its
    pixels are not 8-bit RGB or it uses what this version does not read, FormatError where its
    metadata is damaged, LimitError where it announces sizes beyond all slides.

    >>> with ZarrReader("slide.ome.zarr") as slide:
    ...     tile = slide.read_region(0, 1024, 2048, 256, 256)
    """

    def __init__(
        self, path: str | os.PathLike[str], cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        super().__init__(path, cache_bytes)
        if not self.path.is_dir():
            raise SlideError(f"{self.path}: is not a folder, as OME-Zarr images are")
        attributes = _attributes(self.path, str(self.path))
        self._own = _own_attributes(attributes, self.path)
        image = _Image(self.path, attributes, str(self.path))
        self._levels = image.levels
        self._complete = self._own.get("every_chunk_is_stored") is True
        record = self._read_record()
        self._codec = "learned" if record is None else record.codec
        self._associated = self._places("associated")
        first = self._levels[0]
        try:
            size = folder_bytes(self.path)
        except OSError as error:
            raise SlideError(f"{self.path}: {error.strerror or error}") from None
        compression = first.array.compression
        if record is not None and record.codec in MODES and compression == "wsicodec":
            compression = "jpegxl" if record.codec == "lossless" else record.codec
        lossy = (compression,) if compression in _LOSSY else ()
        profile = self._blob("icc_profile")
        self.info = SlideInfo(
            path=self.path,
            format="ome-zarr",
            file_bytes=size,
            levels=tuple(
                Level(
                    index,
                    level.height,
                    level.width,
                    first.width / level.width,
                    level.tile_height,
                    level.tile_width,
                )
                for index, level in enumerate(self._levels)
            ),
            mpp_x=image.mpp_x,
            mpp_y=image.mpp_y,
            magnification=_positive(self._own.get("magnification")),
            photometric="rgb",
            compression=compression,
            icc_profile=profile or None,
            description=_text(self._own.get("description")),
            history=lossy if record is None else record.history,
            associated=tuple(self._associated),
            record=record,
            acquisition_date=_text(self._own.get("acquisition_date")),
        )

    def read_associated(self, name: str) -> AssociatedImage:
        """The image of this name (one of ``info.associated``); SettingsError for another."""
        self._check_open()
        place = self._associated.get(name)
        if place is None:
            raise SettingsError(
                f"{self.path}: no image {name!r}; there are {', '.join(self._associated) or 'none'}"
            )
        where = f"{self.path}: image {name!r}"
        folder = inside(self.path, place, where)
        image = _Image(folder, _attributes(folder, where), where).levels[0]
        if image.height * image.width > MAX_ASSOCIATED_PIXELS:
            raise LimitError(
                f"{where}: {image.height} x {image.width} pixels exceed {MAX_ASSOCIATED_PIXELS}"
            )
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for row in range(-(-image.height // image.tile_height)):
            for column in range(-(-image.width // image.tile_width)):
                tile = image.decode(row, column, complete=self._complete)
                y, x = row * image.tile_height, column * image.tile_width
                pixels[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
        return AssociatedImage(name, pixels)

    def embedded_model(self) -> bytes | None:
        """Bytes of the model carried in the file, None without one. Nobody has checked them."""
        self._check_open()
        return self._blob("model")

    def embedded_passport(self) -> bytes | None:
        """Bytes of the quality passport, None without one; ``parse_passport`` checks them."""
        self._check_open()
        return self._blob("passport")

    def close(self) -> None:
        """Reading afterwards raises SlideError."""
        self._closed = True

    def _read_record(self) -> FileRecord | None:
        value = self._own.get("record")
        if value is None:
            return None
        try:
            return parse_record(json.dumps(value))
        except WsicodecError as error:
            raise type(error)(f"{self.path}: {error}") from None

    def _places(self, key: str) -> dict[str, str]:
        """Names and paths of the images beside the pyramid."""
        value = self._own.get(key, [])
        where = f"{self.path}: {key} images"
        if not isinstance(value, list) or len(value) > MAX_ASSOCIATED:
            raise FormatError(f"{where}: are not a list of at most {MAX_ASSOCIATED}")
        places: dict[str, str] = {}
        for item in value:
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str) or name in places:
                raise FormatError(f"{where}: have no name of their own: {item!r:.80}")
            inside(self.path, item.get("path"), where)
            places[name] = item["path"]
        return places

    def _blob(self, name: str) -> bytes | None:
        places = self._own.get("blobs", {})
        where = f"{self.path}: {name}"
        if not isinstance(places, dict):
            raise FormatError(f"{where}: blobs are {places!r:.80}")
        if places.get(name) is None:
            return None
        folder = inside(self.path, places[name], where)
        return ZarrArray(folder, where).read_all(MAX_BLOB_BYTES)

    def _stored(self, level: int, row: int, column: int) -> bytes:
        return as_stream(self._levels[level].stored(row, column), self._codec)

    def _decode(self, level: int, row: int, column: int) -> Image:
        return self._levels[level].decode(row, column, complete=self._complete)


def _attributes(folder: Path, where: str) -> Mapping[str, Any]:
    attributes = read_metadata(folder, "group", where).get("attributes")
    if not isinstance(attributes, dict) or not isinstance(attributes.get("ome"), dict):
        raise SlideError(f"{where}: is a Zarr group, but no OME-Zarr image")
    return attributes


def _own_attributes(attributes: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """What wsicodec says beside OME; nothing in files of others."""
    own = attributes.get("wsicodec")
    if own is None:
        return {}
    if not isinstance(own, dict) or own.get("format") != ATTRIBUTES_FORMAT:
        raise FormatError(f"{path}: attributes 'wsicodec' are not those of {ATTRIBUTES_FORMAT}")
    if own.get("version") != ATTRIBUTES_VERSION:
        raise UnsupportedError(
            f"{path}: attributes 'wsicodec' have version {own.get('version')!r:.40}; this wsicodec "
            f"reads version {ATTRIBUTES_VERSION}: upgrade it"
        )
    return own


class _Image:
    """The levels of an OME-Zarr image, and what it says of its scale."""

    def __init__(self, folder: Path, attributes: Mapping[str, Any], where: str) -> None:
        ome = attributes["ome"]
        version = ome.get("version")
        if version != "0.5":
            raise UnsupportedError(
                f"{where}: is of OME-Zarr {version!r:.40}; wsicodec reads OME-Zarr 0.5"
            )
        if "multiscales" not in ome:
            raise UnsupportedError(
                f"{where}: holds no image by itself, but perhaps several in folders below: open "
                "one of these"
            )
        try:
            self._parse(folder, ome["multiscales"][0], where)
        except WsicodecError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"{where}: OME-Zarr metadata is damaged: {error!r:.200}") from None

    def _parse(self, folder: Path, image: Mapping[str, Any], where: str) -> None:
        axes = image["axes"]
        names = [axis["name"] for axis in axes]
        datasets = image["datasets"]
        if not isinstance(datasets, list) or not 1 <= len(datasets) <= MAX_LEVELS:
            raise LimitError(f"{where}: levels are not a list of 1 ... {MAX_LEVELS}")
        paths = [dataset["path"] for dataset in datasets]
        self.levels = [
            _ImageArray(inside(folder, path, where), names, f"{where}: level {index}")
            for index, path in enumerate(paths)
        ]
        for before, level in zip(self.levels, self.levels[1:], strict=False):
            if level.height > before.height or level.width > before.width:
                raise SlideError(f"{where}: levels of the pyramid do not become smaller")
        scale = np.ones(len(names))
        for part in (datasets[0], image):
            for step in part.get("coordinateTransformations", []):
                if step["type"] == "scale":
                    scale = scale * np.asarray(step["scale"], float)
        self.mpp_x = _micrometres(axes[names.index("x")], scale[names.index("x")])
        self.mpp_y = _micrometres(axes[names.index("y")], scale[names.index("y")])


class _ImageArray:
    """An array of RGB pixels in tiles: its chunks, all channels of one place together."""

    def __init__(self, folder: Path, names: list[str], where: str) -> None:
        self.where = where
        self.array = array = ZarrArray(folder, where)
        if len(names) != len(array.shape) or len(set(names)) != len(names):
            raise FormatError(f"{where}: axes {names!r:.80} of an array {array.shape}")
        if array.names is not None and list(array.names) != names:
            raise FormatError(f"{where}: axes are {names!r:.80} and {array.names!r:.80}")
        if not {"y", "x"} <= set(names):
            raise UnsupportedError(f"{where}: axes {names!r:.80} are not those of an RGB image")
        lengths = dict(zip(names, array.shape, strict=True))
        if lengths.get("c") != 3:
            raise UnsupportedError(
                f"{where}: has {lengths.get('c', 1)} channels; wsicodec reads RGB (brightfield)"
            )
        others = {name: n for name, n in lengths.items() if name not in ("c", "y", "x") and n != 1}
        if others:
            raise UnsupportedError(f"{where}: is a series or volume, {others}; one plane is read")
        self._names = names
        chunk = dict(zip(names, array.chunk_shape, strict=True))
        self.height, self.width = lengths["y"], lengths["x"]
        self.tile_height, self.tile_width = chunk["y"], chunk["x"]
        self._chunk_channels = chunk["c"]

    def _indices(self, row: int, column: int) -> list[tuple[int, ...]]:
        """Chunks of a tile, by channels."""
        place = {"y": row, "x": column}
        return [
            tuple(group if name == "c" else place.get(name, 0) for name in self._names)
            for group in range(-(-3 // self._chunk_channels))
        ]

    def stored(self, row: int, column: int) -> bytes:
        """Bytes of a tile's chunks, one after the other; empty where none is stored."""
        return b"".join(self.array.stored(index) or b"" for index in self._indices(row, column))

    def decode(self, row: int, column: int, *, complete: bool) -> Image:
        """Pixels of a tile, uint8 (rows, columns, 3), cropped to the level.

        complete: a chunk that is not stored is an error. Raises SlideError or the error of our
        own codec, naming level, tile and reason.
        """
        where = f"{self.where}: tile at row {row}, column {column}"
        order = [i for i, name in enumerate(self._names) if name not in ("c", "y", "x")]
        order += [self._names.index(name) for name in "yxc"]
        planes = []
        for index in self._indices(row, column):
            data = self.array.stored(index)
            if data is None:
                if complete:
                    raise SlideError(f"{where}: is missing, and the file was written with it")
                shape = (self.tile_height, self.tile_width, self._chunk_channels)
                planes.append(np.full(shape, self.array.fill_value, np.uint8))
                continue
            chunk = self.array.decode(data, index).transpose(order)
            planes.append(chunk[(0,) * (chunk.ndim - 3)])
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        height = min(self.tile_height, self.height - row * self.tile_height)
        width = min(self.tile_width, self.width - column * self.tile_width)
        return np.ascontiguousarray(pixels[:height, :width, :3])


def _micrometres(axis: Mapping[str, Any], scale: float) -> float | None:
    """µm per pixel of an axis; None without a unit of length."""
    factor = _MICROMETRES.get(str(axis.get("unit")))
    return None if factor is None else _positive(float(scale) * factor)


def _positive(value: object) -> float | None:
    """A finite number above zero, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < math.inf else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
