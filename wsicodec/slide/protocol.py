"""What every slide reader offers, whatever the format: levels of RGB pixels, and what is beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from wsicodec.slide.record import FileRecord

Image = npt.NDArray[np.uint8]

DEFAULT_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Level:
    """One resolution of a pyramid.

    height, width: pixels. downsample: width of level 0 over width of this level.
    tile_height, tile_width: of the file's own tiles, or of its strips; pixels.
    """

    index: int
    height: int
    width: int
    downsample: float
    tile_height: int
    tile_width: int

    @property
    def rows(self) -> int:
        """Rows of the file's own tiles."""
        return -(-self.height // self.tile_height)

    @property
    def columns(self) -> int:
        """Columns of the file's own tiles."""
        return -(-self.width // self.tile_width)


@dataclass(frozen=True)
class SlideInfo:
    """What a slide file says of itself.

    format: ``svs``, ``ome-tiff`` or ``tiff``; of what OpenSlide reads, its name of the format
    (``hamamatsu``, ``mirax``, ``dicom`` ...). file_bytes: of all files that the
    slide is made of, as far as its format tells which.
    mpp_x, mpp_y: µm per pixel of level 0; magnification: of the objective; None where not told.
    photometric: as stored, ``rgb`` or ``ycbcr``; pixels are always handed out as RGB.
    compression: of level 0's tiles.
    description: ImageDescription of the scanner's file, also where a converted file keeps it.
    history: lossy codings the pixels went through as far as the file tells, oldest first.
    associated: names of images beside the pyramid (thumbnail, label, macro ...).
    record: how wsicodec coded the file, None for all others.
    acquisition_date: ISO 8601, a date or a date with time as the scanner told it, with an offset
    where it told one. vendor: of the scanner's format, as OpenSlide names it (``aperio`` ...).
    """

    path: Path
    format: str
    file_bytes: int
    levels: tuple[Level, ...]
    mpp_x: float | None
    mpp_y: float | None
    magnification: float | None
    photometric: str
    compression: str
    icc_profile: bytes | None
    description: str | None
    history: tuple[str, ...]
    associated: tuple[str, ...]
    record: FileRecord | None
    acquisition_date: str | None = None
    vendor: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the ICC profile as its length."""
        return {
            "path": str(self.path),
            "format": self.format,
            "file_bytes": self.file_bytes,
            "levels": [
                {
                    "index": level.index,
                    "height": level.height,
                    "width": level.width,
                    "downsample": level.downsample,
                    "tile_height": level.tile_height,
                    "tile_width": level.tile_width,
                }
                for level in self.levels
            ],
            "mpp_x": self.mpp_x,
            "mpp_y": self.mpp_y,
            "magnification": self.magnification,
            "photometric": self.photometric,
            "compression": self.compression,
            "icc_profile_bytes": None if self.icc_profile is None else len(self.icc_profile),
            "description": self.description,
            "history": list(self.history),
            "associated": list(self.associated),
            "acquisition_date": self.acquisition_date,
            "vendor": self.vendor,
            "record": None if self.record is None else self.record.as_dict(),
        }


@dataclass(frozen=True)
class AssociatedImage:
    """An image beside the pyramid.

    name: ``label``, ``macro``, ``thumbnail``, or what the file calls it; unique within a slide.
    pixels: uint8 (rows, columns, 3) RGB. stored: the same pixels as the file keeps them, where they
    can be put into another TIFF as they are.
    """

    name: str
    pixels: Image
    stored: StoredImage | None = None


@dataclass(frozen=True, kw_only=True)
class StoredLayout:
    """How a TIFF directory keeps an image: what another TIFF must say to hold the same segments.

    height, width: pixels. compression, photometric, predictor, planarconfig: values of tags 259,
    262, 317 and 284. tile: (rows, columns) of tiles, None for strips of ``rows_per_strip``.
    subsampling: (horizontal, vertical) of YCbCr, tag 530, else None. jpegtables: tag 347.
    """

    height: int
    width: int
    compression: int
    photometric: int
    tile: tuple[int, int] | None
    rows_per_strip: int | None
    subsampling: tuple[int, int] | None = None
    jpegtables: bytes | None = None
    predictor: int = 1
    planarconfig: int = 1


@dataclass(frozen=True, kw_only=True)
class StoredImage(StoredLayout):
    """A whole stored image, to be copied bit by bit.

    segments: of all tiles or strips in the order of the directory; empty where one is left out.
    """

    segments: tuple[bytes, ...]


class SlideReader(Protocol):
    """An open slide. Thread-safe; opens with ``wsicodec.slide.open_slide``.

    A context manager that closes it.
    """

    info: SlideInfo

    @property
    def levels(self) -> tuple[Level, ...]:
        """Resolutions, finest first."""
        return self.info.levels

    def read_region(self, level: int, y: int, x: int, height: int, width: int) -> Image:
        """Pixels of a rectangle as a new uint8 (height, width, 3) RGB array.

        level: index; y, x: top left pixel in that level; the rectangle must lie inside the level.
        What the file leaves out is white, as glass is.

        Raises SettingsError for a rectangle outside, SlideError naming a tile that is damaged.
        """
        ...

    def read_associated(self, name: str) -> AssociatedImage:
        """The image of this name (one of ``info.associated``); SettingsError for another."""
        ...

    def embedded_model(self) -> bytes | None:
        """Bytes of the model carried in the file, None without one. Nobody has checked them."""
        ...

    def embedded_passport(self) -> bytes | None:
        """Bytes of the file's quality passport, None without one. Nobody has checked them."""
        ...

    def close(self) -> None:
        """Close the file. Reading afterwards raises SlideError."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
