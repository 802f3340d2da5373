"""Slides in TIFF as pyramids of RGB pixels: Aperio SVS, OME-TIFF, and tiled or stripped TIFF.

``TiffReader`` decodes only the tiles that a region touches, keeps the latest ones in a bounded
cache, and may be used from many threads at once. tifffile parses the files and decodes the tiles.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from wsicodec.errors import (
    SettingsError,
    SlideError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.slide.associated import read_page
from wsicodec.slide.chain import check_chain
from wsicodec.slide.layout import find_layout, lossy_history, resolution_mpp
from wsicodec.slide.pages import Page, SlideFile, file_start, is_tiff, named
from wsicodec.slide.passport import TAG_PASSPORT
from wsicodec.slide.protocol import (
    DEFAULT_CACHE_BYTES,
    AssociatedImage,
    Image,
    Level,
    SlideInfo,
    StoredLayout,
)
from wsicodec.slide.record import TAG_MODEL, TAG_RECORD, FileRecord, parse_record
from wsicodec.slide.tiledreader import TiledReader

_ICC_PROFILE = 34675
_NDPI_FLAG = 65420


class TiffReader(TiledReader):
    """An open slide.

    path: the file. cache_bytes: decoded tiles kept at most; with two rows of the file's tiles in
    it, reading in raster order decodes each of them once. strict: look for damage within JPEG
    streams before they are decoded (see ``jpegscan``), which adds almost half to the time.

    Raises SlideError where the file is missing, empty, damaged or no TIFF, and UnsupportedError
    where its pixels are not 8-bit RGB or its format is one that this version does not read.

    >>> with TiffReader("slide.svs") as slide:
    ...     tile = slide.read_region(0, 1024, 2048, 256, 256)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        strict: bool = False,
    ) -> None:
        super().__init__(path, cache_bytes)
        self._strict = strict
        start = file_start(self.path, 4)
        if not is_tiff(start):
            raise SlideError(f"{self.path}: not a TIFF file (starts with {start.hex(' ')})")
        from wsicodec.plugins import tifffile as plugin

        plugin.install()
        with named(f"{self.path}: cannot be opened"):
            self._file = SlideFile(self.path)
        try:
            with named(f"{self.path}: cannot be read as TIFF"):
                self._tiff = _parsed(self.path)
            try:
                with named(f"{self.path}: TIFF structure is damaged"):
                    self._open()
            except BaseException:
                self._tiff.close()
                raise
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        if not self._tiff.is_ndpi:
            # its classic TIFF has links of 64 bits; it is not read here
            check_chain(self._file, str(self.path))
        layout = find_layout(self._tiff, self.path)
        self._pages = [
            Page(page, self._file, f"{self.path}: level {index}", strict=self._strict)
            for index, page in enumerate(layout.pages)
        ]
        self._associated = dict(layout.associated)
        first = self._pages[0]
        record = self._read_record()
        tag_x, tag_y = resolution_mpp(first.tags)
        profile = self._bytes_of(_ICC_PROFILE)
        self.info = SlideInfo(
            path=self.path,
            format=layout.format,
            file_bytes=self._file.size,
            levels=tuple(
                Level(
                    index,
                    page.height,
                    page.width,
                    first.width / page.width,
                    page.segment_height,
                    page.segment_width,
                )
                for index, page in enumerate(self._pages)
            ),
            mpp_x=layout.mpp_x or tag_x,
            mpp_y=layout.mpp_y or layout.mpp_x or tag_y,
            magnification=layout.magnification,
            photometric=first.photometric,
            compression=first.compression,
            icc_profile=profile,
            description=layout.description or None,
            history=record.history
            if record
            else lossy_history(layout.description, first.compression),
            associated=tuple(self._associated),
            record=record,
            acquisition_date=layout.acquisition_date,
            vendor=layout.vendor,
        )

    def _bytes_of(self, code: int) -> bytes | None:
        """Bytes in a tag of level 0, None without any. SlideError for anything but bytes."""
        value = self._pages[0].tags.valueof(code)
        if value is None or isinstance(value, bytes):
            return value or None
        # a single one of them comes as a number, which may as well be a number of another type
        try:
            return bytes([value] if isinstance(value, int) else value)
        except (TypeError, ValueError):
            raise SlideError(f"{self.path}: TIFF tag {code} does not hold bytes") from None

    def _read_record(self) -> FileRecord | None:
        value = self._pages[0].tags.valueof(TAG_RECORD)
        if value is None:
            return None
        try:
            return parse_record(value)
        except WsicodecError as error:
            raise type(error)(f"{self.path}: {error}") from None

    def stored_layout(self, level: int) -> StoredLayout:
        """How the file keeps a level; ``tile_bytes`` gives the segments of this layout.

        With planarconfig 2 the segments of three planes come as one, which no other file can hold.
        Raises SettingsError for no such level, UnsupportedError for segments that mean nothing
        outside this file, SlideError where the directory or its first segment is damaged.
        """
        return self._page(level).layout()

    def read_associated(self, name: str) -> AssociatedImage:
        """The image of this name (one of ``info.associated``), as RGB whatever it is kept as.

        ``stored`` is given for interleaved 8-bit RGB and YCbCr that another TIFF can hold.
        Raises SettingsError for another name, and for an image that cannot be read LimitError,
        UnsupportedError or SlideError.
        """
        self._check_open()
        if name not in self._associated:
            raise SettingsError(
                f"{self.path}: no image {name!r} beside the slide; there are "
                f"{', '.join(self._associated) or 'none'}"
            )
        page = self._associated[name]
        where = f"{self.path}: image {name!r}"
        if page is None:
            raise UnsupportedError(f"{where}: is more than one plane of pixels")
        return read_page(page, self._file, name, where, strict=self._strict)

    def embedded_model(self) -> bytes | None:
        """Bytes of the model carried in the file, None without one. Nobody has checked them."""
        self._check_open()
        return self._bytes_of(TAG_MODEL)

    def embedded_passport(self) -> bytes | None:
        """Bytes of the quality passport in the file, None without one. Nobody has checked them."""
        self._check_open()
        return self._bytes_of(TAG_PASSPORT)

    def close(self) -> None:
        """Close the file. Reading afterwards raises SlideError."""
        if not self._closed:
            self._closed = True
            self._tiff.close()
            self._file.close()

    def _page(self, level: int) -> Page:
        self._check_level(level)
        return self._pages[level]

    def _stored(self, level: int, row: int, column: int) -> bytes:
        return self._pages[level].read(row, column)

    def _decode(self, level: int, row: int, column: int) -> Image:
        return self._pages[level].decode(row, column)


def _parsed(path: Path) -> Any:
    """An open tifffile.TiffFile, which takes whatever is called .ndpi for NDPI."""
    import tifffile

    # or it opens other files by names that the metadata give, and by patterns
    alone: dict[str, Any] = {"_multifile": False, "is_mmstack": False}
    if path.suffix.lower() != ".ndpi":
        return tifffile.TiffFile(path, **alone)
    with contextlib.suppress(Exception):
        tiff = tifffile.TiffFile(path, **alone)
        with contextlib.suppress(Exception):
            first: Any = tiff.pages[0]
            if _NDPI_FLAG in first.tags:
                return tiff
        tiff.close()
    return tifffile.TiffFile(path, is_ndpi=False, **alone)
