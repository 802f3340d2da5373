"""Writes pyramids of coded tiles as BigTIFF: OME-TIFF with SubIFDs, or one directory a level.

Tiles arrive as bytes, already coded, in raster order, level after level; nothing here sees their
pixels. The glass tiles of a level are one stream in the file, which the offsets of all of them
point to: tiles without bytes come out black, or as an error, in most readers.
"""

from __future__ import annotations

import io
import itertools
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from wsicodec.choices import LAYOUTS
from wsicodec.errors import SettingsError, SlideError, UnsupportedError
from wsicodec.slide import omexml
from wsicodec.slide.jpegstream import jpeg_colours
from wsicodec.slide.layout import aperio_values, positive_number
from wsicodec.slide.passport import TAG_PASSPORT
from wsicodec.slide.protocol import AssociatedImage, Image, StoredImage, StoredLayout
from wsicodec.slide.record import TAG_MODEL, TAG_RECORD, FileRecord
from wsicodec.slide.repacking import repack, unpack

MAX_LEVELS = 32
MAX_ASSOCIATED = 64

_ASCII, _UNDEFINED = 2, 7  # TIFF data types
_UNSIGNED = {3: "u2", 4: "u4", 16: "u8"}
_TILE_OFFSETS, _TILE_BYTE_COUNTS = 324, 325
_RGB, _YCBCR, _JPEG = 2, 6, 7

# LZW, JPEG, deflate, WebP, JPEG-XL; Aperio's JPEG-2000 does not say which colours it holds
_COPIED = (5, _JPEG, 8, 32946, 50001, 50002)
_STRIP_BYTES = 256 * 1024
_JPEGXL_SIDE = 4096  # of one image that our own coder takes

# JPEG-2000 has five values in TIFF. 33005 (Aperio's: a bare codestream that decodes to RGB) is the
# one that most software decodes: tifffile, Bio-Formats, and libvips, which knows no 34712.
# OpenSlide takes either only in files that claim to be Aperio's: `export` writes JPEG for it.
_TAGS = {"jpeg": 7, "jpeg2000": 33005, "jpegxl": 50002, "lossless": 50002, "webp": 50001}


def compression_tag(codec: str) -> int:
    """Value of TIFF tag 259 for a codec. Raises UnsupportedError for one that TIFF has none for."""
    if codec == "learned":
        from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG

        return TIFF_COMPRESSION_TAG
    if codec not in _TAGS:
        raise UnsupportedError(
            f"codec {codec!r} has no TIFF compression value; files can be written with learned, "
            f"{', '.join(_TAGS)}"
        )
    return _TAGS[codec]


# compression values of images that were not lossy: none, LZW, deflate, PackBits, zstd
_SMALL_IMAGE = 2**20  # pixels; about ten seconds of lossless JPEG-XL at effort 9
_LOSSLESS = (1, 5, 8, 32946, 32773, 50000)


@dataclass(frozen=True)
class CodedLevel:
    """One level to write.

    height, width: pixels of the level, without padding. tile_size: side of its square tiles, a
    multiple of 16. tiles: one stream a tile, rows from the top, each from the left, None for a
    tile that is all glass; consumed once. glass: the stream of all those, stored once.
    """

    height: int
    width: int
    tile_size: int
    tiles: Iterable[bytes | None]
    glass: bytes | None = None

    @property
    def count(self) -> int:
        """Number of tiles that a grid over the level has."""
        return -(-self.height // self.tile_size) * -(-self.width // self.tile_size)


@dataclass(frozen=True)
class SlideMetadata:
    """What a file says of its slide.

    mpp_x, mpp_y: µm per pixel of level 0; magnification: of the objective. None is left out.
    description: ImageDescription of the source. icc_profile: bytes as they were.
    acquisition_date: ISO 8601.
    """

    name: str
    mpp_x: float | None = None
    mpp_y: float | None = None
    magnification: float | None = None
    description: str | None = None
    icc_profile: bytes | None = None
    acquisition_date: str | None = None


def check_slide(
    levels: Sequence[CodedLevel],
    metadata: SlideMetadata,
    *,
    layout: str = "subifd",
    associated: Sequence[AssociatedImage] = (),
) -> None:
    """Raise what ``write_slide`` would raise of this, before any tile is coded."""
    _check(levels, layout, associated)
    if layout == "subifd":
        ome_description(levels[0], metadata, "wsicodec", associated)


def write_slide(
    file: BinaryIO,
    levels: Sequence[CodedLevel],
    codec: str,
    metadata: SlideMetadata,
    record: FileRecord,
    *,
    model: bytes | None = None,
    layout: str = "subifd",
    associated: Sequence[AssociatedImage] = (),
    passport: bytes | None = None,
) -> None:
    """Write a pyramid into an empty file that can be read and can seek.

    levels: finest first; their tiles are consumed in this order, one at a time.
    model: bytes of a model to carry along. passport: what tag 60645 holds.
    layout: ``subifd``, an OME-TIFF whose smaller levels are SubIFDs of the first; ``flat``, a TIFF
    with one directory a level after the other, the pyramid that OpenSlide and libvips see whole
    (they see only level 0 of a SubIFD pyramid). Where the slide is Aperio's and has a thumbnail,
    ``flat`` stays an SVS: OpenSlide then reads JPEG-2000 too, and the images beside the pyramid.
    associated: images beside the pyramid, without loss: bit by bit where they are stored in a way
    that can be taken over. In ``subifd`` further OME images of their names, in ``flat`` directories
    in Aperio's manner. Afterwards the file stands at its end.

    Raises SettingsError, UnsupportedError (codec), SlideError when tiles are too few or too many or
    have no bytes, RuntimeMissingError; what ``file`` raises passes through.
    """
    import tifffile

    from wsicodec.plugins import tifffile as plugin

    plugin.install()
    _check(levels, layout, associated)
    software = f"wsicodec {record.wsicodec}"
    common: dict[str, Any] = {"metadata": None, "software": software}
    tiled: dict[str, Any] = {
        **common,
        "dtype": "uint8",
        "photometric": "rgb",
        "planarconfig": "contig",
        "compression": compression_tag(codec),
    }
    beside = [_beside(image, layout, codec) for image in associated]
    early: list[_Beside] = []
    late = beside
    if layout == "flat":
        # Aperio's order: the thumbnail follows level 0, label and macro the last level
        early = [image for image in beside if image.name == "thumbnail"]
        late = [image for image in beside if image.name != "thumbnail"]
        late.sort(key=lambda image: {"label": 0, "macro": 1}.get(image.name, 2))
    svs = layout == "flat" and bool(early) and is_aperio(metadata)
    if layout == "subifd":
        description = ome_description(levels[0], metadata, software, associated)
    elif svs:
        description = (metadata.description or "").encode()
    else:
        description = flat_description(metadata, software).encode()
    glass = [array("Q") for _ in levels]
    with tifffile.TiffWriter(file, bigtiff=True, ome=False) as writer:
        for index, level in enumerate(levels):
            counted = _counted(level, index, glass[index])
            first = next(counted)
            # a chain has no close(): tifffile would close the generator at its last tile, before
            # the code behind its last yield has run
            tiles = itertools.chain([first], counted)
            settings = {**tiled, "tile": (level.tile_size, level.tile_size)}
            if codec == "jpeg":
                settings.update(_jpeg_tags(first, level, index))
            settings.update(_resolution(metadata, levels[0].width / level.width))
            if index == 0:
                settings["description"] = description
                settings["iccprofile"] = metadata.icc_profile
                settings["extratags"] = _private_tags(record, model, passport)
                settings["subifds"] = len(levels) - 1 if layout == "subifd" else 0
            elif not svs:  # readers of SVS take reduced images for label and macro
                settings["subfiletype"] = 1  # reduced-resolution version of another image
            writer.write(tiles, shape=(level.height, level.width, 3), **settings)
            for _ in tiles:  # lets the count notice tiles that nobody asked for
                pass
            if index == 0:
                for image in early:
                    image.write(writer, **common, **image.flat_tags(levels[0], software))
        for image in late:
            tags = image.flat_tags(levels[0], software) if layout == "flat" else {}
            image.write(writer, **common, **tags)
    _share_glass(file, glass, layout, len(early))


def _check(
    levels: Sequence[CodedLevel], layout: str, associated: Sequence[AssociatedImage]
) -> None:
    if layout not in LAYOUTS:
        raise SettingsError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise SettingsError(f"{len(levels)} levels are not within 1 ... {MAX_LEVELS}")
    if len(associated) > MAX_ASSOCIATED:
        raise SettingsError(f"{len(associated)} images beside the pyramid exceed {MAX_ASSOCIATED}")
    if len({image.name for image in associated}) < len(associated):
        raise SettingsError("two images beside the pyramid have the same name")


def _private_tags(
    record: FileRecord, model: bytes | None, passport: bytes | None
) -> list[tuple[int, int, int, object, bool]]:
    text = record.to_json().encode("ascii")
    tags: list[tuple[int, int, int, object, bool]] = [
        (TAG_RECORD, _ASCII, len(text) + 1, text + b"\0", True)
    ]
    if model is not None:
        tags.append((TAG_MODEL, _UNDEFINED, len(model), model, True))
    if passport is not None:
        tags.append((TAG_PASSPORT, _UNDEFINED, len(passport), passport, True))
    return tags


def ome_description(
    level: CodedLevel | StoredLayout,
    metadata: SlideMetadata,
    software: str,
    associated: Sequence[AssociatedImage],
) -> bytes:
    """OME-XML of level 0 and of the images that follow its directory.

    Raises as ``omexml.build`` does.
    """
    main = omexml.OmeImage(
        name=metadata.name,
        size_x=level.width,
        size_y=level.height,
        mpp_x=metadata.mpp_x,
        mpp_y=metadata.mpp_y,
        magnification=metadata.magnification,
        description=metadata.description,
        acquisition_date=metadata.acquisition_date,
    )
    beside = [
        omexml.OmeImage(image.name, image.pixels.shape[1], image.pixels.shape[0])
        for image in associated
    ]
    return omexml.build([main, *beside], creator=software)


def is_aperio(metadata: SlideMetadata) -> bool:
    """True when the description is Aperio's and says of the slide what the metadata do."""
    description = metadata.description or ""
    if not description.startswith("Aperio ") or "\0" in description:
        return False
    values = aperio_values(description)
    told = positive_number(values.get("MPP")), positive_number(values.get("AppMag"))
    mpp_y = metadata.mpp_y if metadata.mpp_y is not None else metadata.mpp_x
    return told == (metadata.mpp_x, metadata.magnification) and mpp_y == metadata.mpp_x


def flat_description(metadata: SlideMetadata, software: str) -> str:
    """ImageDescription of a flat file: a line in Aperio's manner, then the source's own words.

    The date is ISO 8601, Aperio's own has no century.
    """
    line = [f"{software} pyramid"]
    if metadata.magnification is not None:
        line.append(f"AppMag = {metadata.magnification:g}")
    if metadata.mpp_x is not None:
        line.append(f"MPP = {metadata.mpp_x!r}")
    if metadata.acquisition_date is not None:
        line.append(f"Date = {metadata.acquisition_date}")
    text = "|".join(line)
    if metadata.description is not None:
        text += f"\n{metadata.description}"
    # a description that ends as XML does would pass for OME's or Leica's
    return f"{text}|" if text.rstrip().endswith(">") else text


def _resolution(metadata: SlideMetadata, downsample: float) -> dict[str, Any]:
    """Pixels per centimetre of a level, for readers that know TIFF but no OME-XML."""
    mpp_x = metadata.mpp_x or metadata.mpp_y
    mpp_y = metadata.mpp_y or metadata.mpp_x
    if mpp_x is None or mpp_y is None:
        return {}
    per_centimetre = (1e4 / (mpp_x * downsample), 1e4 / (mpp_y * downsample))
    return {
        "resolution": tuple(_rational(value) for value in per_centimetre),
        "resolutionunit": "CENTIMETER",
    }


def _rational(value: float) -> tuple[int, int]:
    """The nearest fraction of two 32-bit integers; older tifffile rounds to 1e-6."""
    limit = max(1, int((2**32 - 1) / max(value, 1)))
    return Fraction(value).limit_denominator(limit).as_integer_ratio()


def _counted(level: CodedLevel, index: int, glass: array[int]) -> Iterator[bytes]:
    """The level's tiles, as many as its grid has; SlideError otherwise.

    Of the glass tiles only the first has bytes; the numbers of all of them are put into ``glass``.
    """
    done = 0
    for tile in level.tiles:
        if done == level.count:
            raise SlideError(f"level {index}: more than {level.count} tiles came to be written")
        shared = tile is None and len(glass) > 0
        data = level.glass if tile is None else tile
        if not data:
            raise SlideError(f"level {index}: tile {done} of {level.count} has no bytes")
        if tile is None:
            glass.append(done)
        done += 1
        yield b"" if shared else data
    if done < level.count:
        raise SlideError(f"level {index}: {done} of {level.count} tiles came to be written")


def _share_glass(file: BinaryIO, glass: Sequence[array[int]], layout: str, skipped: int) -> None:
    """Point all glass tiles of a level to the bytes of the first of them.

    glass: numbers of the glass tiles of each level. skipped: directories between levels 0 and 1 of
    a flat file. The values of TileOffsets and TileByteCounts change where they lie.
    """
    import tifffile

    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        for index, tiles in enumerate(glass):
            if len(tiles) < 2:
                continue
            numbers = np.array(tiles, np.int64)
            tags = _level_page(tiff, index, layout, skipped).tags
            for code in (_TILE_OFFSETS, _TILE_BYTE_COUNTS):
                tag = tags[code]
                kind = np.dtype(tiff.byteorder + _UNSIGNED[int(tag.dtype)])
                file.seek(tag.valueoffset)
                values = np.frombuffer(file.read(tag.count * kind.itemsize), kind).copy()
                values[numbers] = values[numbers[0]]
                file.seek(tag.valueoffset)
                file.write(values.tobytes())
    file.seek(0, io.SEEK_END)


def _level_page(tiff: Any, index: int, layout: str, skipped: int) -> Any:
    import tifffile

    if index == 0 or layout == "flat":
        tiff.pages.useframes = False
        return tiff.pages[index + (skipped if index else 0)].aspage()
    tiff.filehandle.seek(tiff.pages[0].subifds[index - 1])
    return tifffile.TiffPage(tiff, (0, index - 1))


@dataclass(frozen=True)
class _Beside:
    """An image beside the pyramid as the file will hold it.

    segments: of its strips or tiles, compressed. settings: tifffile's, which say how.
    """

    name: str
    height: int
    width: int
    segments: tuple[bytes, ...]
    settings: dict[str, Any]

    @property
    def size(self) -> int:
        return sum(map(len, self.segments))

    def write(self, writer: Any, **settings: Any) -> None:
        writer.write(
            iter(self.segments),
            shape=(self.height, self.width, 3),
            dtype="uint8",
            planarconfig="contig",
            **self.settings,
            **settings,
        )

    def flat_tags(self, level: CodedLevel, software: str) -> dict[str, Any]:
        """Description and subfile type in Aperio's manner, by which readers of SVS know it."""
        name = " ".join(self.name.replace("\0", " ").split())
        line = f"{name} {self.width}x{self.height}"
        if name == "thumbnail":
            line = f"{level.width}x{level.height} -> {self.width}x{self.height} - {name}"
        return {
            "description": f"{software}\r\n{line}".encode(),
            "subfiletype": {"thumbnail": 0, "macro": 9}.get(name, 1),
        }


def _beside(image: AssociatedImage, layout: str, codec: str) -> _Beside:
    """The stored bytes of an image where they can be taken over, or its pixels without loss, where
    that is smaller."""
    pixels = image.pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise SettingsError(
            f"image {image.name!r} is {pixels.dtype} {pixels.shape}, not uint8 (rows, columns, 3)"
        )
    stored = None if image.stored is None else unpack(image.stored) or image.stored
    if stored is not None:
        repacked = _repacked(image.name, stored, pixels, layout) if codec == "learned" else None
        if repacked is not None:
            return repacked
        copied = _copied(image.name, stored, layout)
        if copied is not None and _holds(copied, pixels):
            if stored.compression not in _LOSSLESS:
                return copied  # no lossless code of decoded pixels is as small
            return _smaller(copied, image, codec)
    return _smaller(_deflated(image.name, pixels), image, codec)


def _repacked(name: str, stored: StoredImage, pixels: Image, layout: str) -> _Beside | None:
    """A JPEG image in fewer bytes, in files whose readers need wsicodec anyhow."""
    found = repack(stored, pixels)
    if found is None:
        return None
    (rows, columns), (height, width) = found.tile, pixels.shape[:2]
    settings: dict[str, Any] = {"compression": compression_tag("learned"), "photometric": "rgb"}
    if stored.tile is None:
        settings["rowsperstrip"] = rows
    elif layout == "flat":
        return None  # readers of flat files take a tiled directory for a level
    else:
        settings["tile"] = (rows, columns)
    return _Beside(name, height, width, found.tiles, settings)


def _smaller(found: _Beside, image: AssociatedImage, codec: str) -> _Beside:
    """The image as lossless JPEG-XL where that is smaller, in files whose readers know that."""
    pixels = image.pixels
    if codec not in ("learned", "jpegxl", "lossless") or max(pixels.shape) > _JPEGXL_SIDE:
        return found
    smaller = _jpegxl(image.name, pixels)
    # libjxl 0.11 has settings where "lossless" changes a pixel in a million
    return smaller if smaller.size < found.size and _holds(smaller, pixels) else found


def _copied(name: str, stored: StoredImage, layout: str) -> _Beside | None:
    """None where another TIFF cannot hold the segments, or where they would be misunderstood."""
    if stored.photometric not in (_RGB, _YCBCR) or stored.compression not in _COPIED:
        return None
    if stored.planarconfig != 1 or not all(stored.segments):
        return None
    settings: dict[str, Any] = {"compression": stored.compression}
    if stored.tile is not None:
        if layout == "flat":
            return None  # OpenSlide and others take a tiled directory for a level
        settings["tile"] = stored.tile
    else:
        settings["rowsperstrip"] = min(stored.rows_per_strip or stored.height, stored.height)
    if stored.predictor != 1:
        settings["predictor"] = stored.predictor
    if stored.compression == _JPEG:
        settings["photometric"] = "rgb"
        settings["jpegtables"] = stored.jpegtables
        if stored.photometric == _YCBCR:
            settings["subsampling"] = stored.subsampling or (2, 2)  # TIFF's default
        else:
            settings.update(_rgb_jpeg())
    else:
        settings["photometric"] = stored.photometric
    return _Beside(name, stored.height, stored.width, stored.segments, settings)


def _holds(image: _Beside, pixels: Image) -> bool:
    """True when a file with this image reads back as these pixels."""
    import tifffile

    file = io.BytesIO()
    try:
        with tifffile.TiffWriter(file) as writer:
            image.write(writer, metadata=None)
        file.seek(0)
        with tifffile.TiffFile(file) as tiff:
            return np.array_equal(tiff.pages[0].asarray(), pixels)
    except Exception:
        return False  # whatever the reason: the pixels will be coded anew


def _deflated(name: str, pixels: Image) -> _Beside:
    """Deflate with horizontal differences, in strips."""
    rows = max(1, _STRIP_BYTES // (pixels.shape[1] * 3))
    strips = []
    for top in range(0, pixels.shape[0], rows):
        strip = pixels[top : top + rows]
        differences = strip.copy()
        differences[:, 1:] -= strip[:, :-1]
        strips.append(zlib.compress(differences.tobytes(), 6))
    settings = {"compression": 8, "predictor": 2, "rowsperstrip": rows, "photometric": "rgb"}
    return _Beside(name, pixels.shape[0], pixels.shape[1], tuple(strips), settings)


def _jpegxl(name: str, pixels: Image) -> _Beside:
    import wsicodec

    height, width = pixels.shape[:2]
    effort = 9 if height * width <= _SMALL_IMAGE else 7
    stream = wsicodec.encode(pixels, codec="lossless", effort=effort)
    settings = {
        "compression": _TAGS["lossless"],
        "rowsperstrip": height,
        "photometric": "rgb",
    }
    return _Beside(name, height, width, (stream,), settings)


def _jpeg_tags(stream: bytes, level: CodedLevel, index: int) -> dict[str, Any]:
    """Photometric and subsampling as the streams have them: libtiff believes the tags."""
    colours = jpeg_colours(stream)
    if level.glass is not None and jpeg_colours(level.glass) != colours:
        raise SlideError(f"level {index}: glass is coded with other colours than the other tiles")
    ycbcr, subsampling = colours
    return {"subsampling": subsampling} if ycbcr else _rgb_jpeg()


def _rgb_jpeg() -> dict[str, Any]:
    # anew each time: tifffile writes into compressionargs
    return {"subsampling": (1, 1), "compressionargs": {"outcolorspace": "rgb"}}
