"""Writes pyramids of coded tiles as BigTIFF: OME-TIFF with SubIFDs, or one directory a level.

Tiles arrive as bytes, already coded, in raster order, level after level; nothing here sees pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO

from wsicodec.errors import FormatError, SettingsError, SlideError, UnsupportedError
from wsicodec.slide import omexml
from wsicodec.slide.record import TAG_MODEL, TAG_RECORD, FileRecord

LAYOUTS = ("subifd", "flat")

MAX_LEVELS = 32
_ASCII, _UNDEFINED = 2, 7  # TIFF data types

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


@dataclass(frozen=True)
class CodedLevel:
    """One level to write.

    height, width: pixels of the level, without padding. tile_size: side of its square tiles, a
    multiple of 16. tiles: one stream a tile, rows from the top, each from the left; consumed once.
    """

    height: int
    width: int
    tile_size: int
    tiles: Iterable[bytes]

    @property
    def count(self) -> int:
        """Number of tiles that a grid over the level has."""
        return -(-self.height // self.tile_size) * -(-self.width // self.tile_size)


@dataclass(frozen=True)
class SlideMetadata:
    """What a file says of its slide.

    mpp_x, mpp_y: µm per pixel of level 0; magnification: of the objective. None is left out.
    description: ImageDescription of the source. icc_profile: bytes as they were.
    """

    name: str
    mpp_x: float | None = None
    mpp_y: float | None = None
    magnification: float | None = None
    description: str | None = None
    icc_profile: bytes | None = None


def write_slide(
    file: BinaryIO,
    levels: Sequence[CodedLevel],
    codec: str,
    metadata: SlideMetadata,
    record: FileRecord,
    *,
    model: bytes | None = None,
    layout: str = "subifd",
) -> None:
    """Write a pyramid into an empty file that can seek.

    levels: finest first; their tiles are consumed in this order, one at a time.
    model: bytes of a model to carry along. layout: ``subifd``, an OME-TIFF whose smaller levels
    are SubIFDs of the first; ``flat``, a plain TIFF with one directory a level after the other, the
    pyramid that OpenSlide and libvips see whole (they see only level 0 of a SubIFD pyramid).

    Raises SettingsError, UnsupportedError (codec), SlideError when tiles are too few or too many;
    what ``file`` raises passes through.
    """
    import tifffile

    from wsicodec.plugins import tifffile as plugin

    plugin.install()
    if layout not in LAYOUTS:
        raise SettingsError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise SettingsError(f"{len(levels)} levels are not within 1 ... {MAX_LEVELS}")
    common: dict[str, Any] = {
        "dtype": "uint8",
        "photometric": "rgb",
        "planarconfig": "contig",
        "compression": compression_tag(codec),
        "metadata": None,
        "software": f"wsicodec {record.wsicodec}",
    }
    with tifffile.TiffWriter(file, bigtiff=True, ome=False) as writer:
        for index, level in enumerate(levels):
            counted = _counted(level, index)
            first = next(counted)
            # a chain has no close(): tifffile would close the generator at its last tile, before
            # the code behind its last yield has run
            tiles = itertools.chain([first], counted)
            settings = {**common, "tile": (level.tile_size, level.tile_size)}
            if codec == "jpeg":
                settings.update(_jpeg_tags(first))
            settings.update(_resolution(metadata, levels[0].width / level.width))
            if index == 0:
                settings.update(_first_tags(level, metadata, record, model, layout))
                settings["subifds"] = len(levels) - 1 if layout == "subifd" else 0
            else:
                settings["subfiletype"] = 1  # reduced-resolution version of another image
            writer.write(tiles, shape=(level.height, level.width, 3), **settings)
            for _ in tiles:  # lets the count notice tiles that nobody asked for
                pass


def _first_tags(
    level: CodedLevel,
    metadata: SlideMetadata,
    record: FileRecord,
    model: bytes | None,
    layout: str,
) -> dict[str, Any]:
    text = record.to_json().encode("ascii")
    tags: list[tuple[int, int, int, object, bool]] = [
        (TAG_RECORD, _ASCII, len(text) + 1, text + b"\0", True)
    ]
    if model is not None:
        tags.append((TAG_MODEL, _UNDEFINED, len(model), model, True))
    software = f"wsicodec {record.wsicodec}"
    image = omexml.OmeImage(
        name=metadata.name,
        size_x=level.width,
        size_y=level.height,
        mpp_x=metadata.mpp_x,
        mpp_y=metadata.mpp_y,
        magnification=metadata.magnification,
        description=metadata.description,
    )
    return {
        # OME readers would take the other directories of a flat file for further planes
        "description": omexml.build(image, creator=software)
        if layout == "subifd"
        else flat_description(metadata, software).encode(),
        "iccprofile": metadata.icc_profile,
        "extratags": tags,
    }


def flat_description(metadata: SlideMetadata, software: str) -> str:
    """ImageDescription of a flat file: a line in Aperio's manner, then the source's own words."""
    line = [f"{software} pyramid"]
    if metadata.magnification is not None:
        line.append(f"AppMag = {metadata.magnification:g}")
    if metadata.mpp_x is not None:
        line.append(f"MPP = {metadata.mpp_x!r}")
    return "|".join(line) + ("" if metadata.description is None else f"\n{metadata.description}")


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


def _counted(level: CodedLevel, index: int) -> Iterator[bytes]:
    """The level's tiles, as many as its grid has; SlideError otherwise."""
    done = 0
    for tile in level.tiles:
        done += 1
        if done > level.count:
            raise SlideError(f"level {index}: more than {level.count} tiles came to be written")
        yield tile
    if done < level.count:
        raise SlideError(f"level {index}: {done} of {level.count} tiles came to be written")


def _jpeg_tags(stream: bytes) -> dict[str, Any]:
    """Photometric and subsampling as the stream has them: libtiff believes the tags."""
    ycbcr, subsampling = jpeg_colours(stream)
    if ycbcr:
        return {"subsampling": subsampling}
    return {"subsampling": (1, 1), "compressionargs": {"outcolorspace": "rgb"}}


def jpeg_colours(stream: bytes) -> tuple[bool, tuple[int, int]]:
    """(is YCbCr, (horizontal, vertical) chroma subsampling) of a three-channel JPEG stream.

    Raises FormatError where the headers end early or hold no frame of three components.
    """
    position, adobe, jfif = 2, None, False
    while position + 4 <= len(stream):
        marker, length = stream[position + 1], int.from_bytes(stream[position + 2 : position + 4])
        body = stream[position + 4 : position + 2 + length]
        if stream[position] != 0xFF:
            break
        if marker == 0xE0 and body[:4] == b"JFIF":
            jfif = True
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker in (0xC0, 0xC1, 0xC2):
            if len(body) < 15 or body[5] != 3:
                break
            factors = [body[7 + 3 * component] for component in range(3)]
            identifiers = [body[6 + 3 * component] for component in range(3)]
            luma = factors[0] >> 4, factors[0] & 15
            # T.871 and Adobe's technical note 5116: JFIF is YCbCr; else Adobe's flag; else names
            if not jfif and (adobe == 0 or (adobe is None and identifiers == [82, 71, 66])):
                return False, (1, 1)
            return True, (luma[0] // max(1, factors[1] >> 4), luma[1] // max(1, factors[1] & 15))
        elif marker == 0xDA:
            break
        position += 2 + length
    raise FormatError("JPEG tile has no frame of three components")
