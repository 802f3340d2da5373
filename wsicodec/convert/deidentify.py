"""Takes out of a slide's metadata whatever could tell whose it is, and checks that it is gone.

Everything is an allow-list: what is known to be technical is kept in a form that is rebuilt here
(numbers, sizes, codecs), and all else is dropped, whether it looks harmless or not. A file that is
written from what ``deidentified`` returns holds

- the pixels, µm per pixel, magnification and colour profile;
- of the scanner's description: maker and version of its software, sizes, tile sizes, codec and
  quality of every step, AppMag, MPP; never names, dates, times, barcodes, identifiers, free text;
- of the other images the thumbnail, without Exif, XMP or comments, and where asked for the macro
  with its label's end made white. A label is never kept, nor an image of unknown content.

What writes the file must leave out besides: the source's path and name, its SHA-256 (whoever has
the source, or a list of digests of an archive, finds the patient by it), and all dates. The
history of a source must pass through ``neutral_history``: a file may claim anything there.

``secrets_of`` lists the values that were dropped and ``leaks`` looks for them in what was written,
so that a mistake is caught before the file gets its name.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.convert.colourprofile import neutral_profile
from wsicodec.convert.leaks import MIN_SECRET, leaks
from wsicodec.errors import FormatError, SettingsError
from wsicodec.slide.jpegstream import segments, without_metadata
from wsicodec.slide.ometiff import SlideMetadata
from wsicodec.slide.protocol import AssociatedImage, SlideInfo, StoredImage

__all__ = [
    "MACRO_MODES",
    "NEUTRAL_NAME",
    "Findings",
    "blanked_macro",
    "deidentified",
    "leaks",
    "neutral_history",
    "secrets_of",
    "stripped",
    "technical_description",
]

Image = npt.NDArray[np.uint8]

MACRO_MODES = ("drop", "blank")
NEUTRAL_NAME = "slide"
"""Name of the slide in a file: the source's name is the accession number more often than not."""

MAX_SECRETS = 4096

LABEL_SHARE = 0.42
"""Part of a macro's long side that is made white at the label's end.

A glass is 75 or 76 mm long, its label or frosted end at most 25 mm, and macros show up to 15 % more
than the glass: 0.33 x 0.85 + 0.15 = 0.43 would need the worst of both at the same end."""
_MACRO_RATIO = (2.0, 4.0)  # long by short side: 75 x 25 mm, more or less of the surroundings
_MARKED = 24  # levels by which a pixel differs from glass
_THUMBNAIL_RATIO = 0.03
# SOF0-2, DHT, SOI and EOI, SOS, DQT, DRI, JFIF, Adobe: what decoding asks for
_JPEG_MARKERS = {0xC0, 0xC1, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xEE}
_THUMBNAIL_CELLS, _THUMBNAIL_MEAN, _THUMBNAIL_WORST = 16, 12.0, 96.0


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was removed: kind -> how many of it. Never the values, so it may be shown and logged."""

    removed: Mapping[str, int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was removed, in alphabetical order."""
        return tuple(sorted(self.removed))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"removed": dict(sorted(self.removed.items()))}


def deidentified(
    info: SlideInfo,
    metadata: SlideMetadata,
    associated: Sequence[AssociatedImage],
    *,
    macro: str = "drop",
    overview: Image | None = None,
) -> tuple[SlideMetadata, tuple[AssociatedImage, ...], Findings]:
    """Metadata and associated images of a slide without anything that identifies.

    metadata, associated: what would be written without it. macro: ``drop``, or ``blank`` to keep
    the macro with its label's end white (see ``blanked_macro``).
    overview: pixels of the whole coarsest level; given, a thumbnail that does not look like it is
    dropped. A thumbnail of other proportions than the slide, which may show the label, always is.

    Raises SettingsError for another ``macro``.
    """
    if macro not in MACRO_MODES:
        raise SettingsError(f"macro {macro!r} is none of {', '.join(MACRO_MODES)}")
    removed: Counter[str] = Counter()
    description, kinds = _rewritten(metadata.description)
    removed.update(kinds)
    if metadata.name != NEUTRAL_NAME:
        removed["name of the slide"] += 1
    if metadata.acquisition_date is not None:
        removed["date of acquisition"] += 1
    profile = metadata.icc_profile
    if profile is not None:
        profile = neutral_profile(profile, secrets_of(info))
        if profile is None:
            removed["colour profile that cannot be read"] += 1
        elif profile != metadata.icc_profile:
            removed["text of the colour profile"] += 1
    images: list[AssociatedImage] = []
    for image in associated:
        kind = _image_kind(image.name)
        kept = None
        if kind == "thumbnail" and _shows_tissue_only(image.pixels, info, overview):
            kept = AssociatedImage("thumbnail", image.pixels, stripped(image.stored))
        elif kind == "macro" and macro == "blank":
            pixels = blanked_macro(image.pixels)
            kept = None if pixels is None else AssociatedImage("macro", pixels)
            if kept is not None:
                removed["label on the macro image"] += 1
        if kept is None or any(other.name == kept.name for other in images):
            removed[f"{kind} image"] += 1
        else:
            images.append(kept)
    # built anew, field by field: what is added to SlideMetadata later stays out until allowed here
    clean = SlideMetadata(
        name=NEUTRAL_NAME,
        mpp_x=metadata.mpp_x,
        mpp_y=metadata.mpp_y,
        magnification=metadata.magnification,
        description=description,
        icc_profile=profile,
    )
    return clean, tuple(images), Findings(dict(removed))


# The scanner's description

_NUMBER = re.compile(r"\d{1,4}(\.\d{1,12})?")
_TECHNICAL = ("AppMag", "MPP")  # keys of Aperio's whose values are kept, if they are numbers

# keys whose values are dropped as all others, but say nothing of anyone: settings of the optics
_HARMLESS = frozenset(
    {
        "appmag", "mpp", "stripewidth", "parmset", "left", "top", "linecameraskew",
        "lineareaxoffset", "lineareayoffset", "focus offset", "originalwidth", "originalheight",
        "filtered", "gamma", "displaycolor", "exposure time", "exposure scale", "icc profile",
        "sessonmode", "sessionmode", "time zone", "calibrationaverageblue",
        "calibrationaveragegreen", "calibrationaveragered", "offset", "imagetype",
    }
)  # fmt: skip
_KINDS = {
    "date": "date of acquisition",
    "time": "time of acquisition",
    "user": "user",
    "filename": "file name",
    "title": "title",
    "barcode": "barcode",
    "scanscope id": "identity of the scanner",
    "dsr id": "identity of the scanner",
    "imageid": "identity of the image",
    "slide": "place in the scanner",
    "rack": "place in the scanner",
}

_MAKER = re.compile(
    r"Aperio (?:Image Library|Leica Biosystems GT450(?: DX)?)(?: v\d{1,3}(?:\.\d{1,4}){0,3})?"
)
_SIZE = r"\d{1,7}x\d{1,7}"
_GEOMETRY = re.compile(
    rf"{_SIZE}(?: \[-?\d{{1,7}},-?\d{{1,7}} {_SIZE}\])?(?: \({_SIZE}\))?(?: -> {_SIZE})?"
    r"(?: (?:JPEG|J2K|LZW|JPEG2000)/(?:RGB|YCC|YCbCr|YUV16|KDU)(?: Q=\d{1,3})?)?"
)


def technical_description(description: str | None) -> str | None:
    """The technical part of an Aperio ImageDescription, in Aperio's form; None if there is none.

    What is kept matches, as a whole, a pattern of makers, sizes, codecs and qualities, or is a
    number under AppMag or MPP. Descriptions of other makers have no such part.
    """
    return _rewritten(description)[0]


def _rewritten(description: str | None) -> tuple[str | None, Counter[str]]:
    """(technical part, kinds of what was dropped)."""
    removed: Counter[str] = Counter()
    if not description:
        return None, removed
    if not description.startswith("Aperio"):
        removed["description of an unknown form"] += 1
        return None, removed
    head, *items = description.split("|")
    steps = []
    for step in head.split(";"):
        lines = []
        for line in re.split(r"[\r\n]+", step):
            text = line.strip()
            if _MAKER.fullmatch(text) or _GEOMETRY.fullmatch(text):
                lines.append(text)
            elif text:
                removed["free text of the description"] += 1
        if lines:
            steps.append("\r\n".join(lines))
    pairs: dict[str, str] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in _TECHNICAL and _NUMBER.fullmatch(value):
            pairs.setdefault(key, value)
        elif not equals:
            removed["free text of the description"] += bool(key)
        elif key.casefold() in _HARMLESS:
            removed["settings of the scanner"] += 1
        else:
            removed[_KINDS.get(key.casefold(), "unknown field of the description")] += 1
    text = ";".join(steps) + "".join(f"|{key} = {value}" for key, value in pairs.items())
    # readers tell the format by this word
    return (text if text.startswith("Aperio") else None), removed


_STEP_WORDS = frozenset(
    {
        "jpeg", "jpeg2000", "jpegxl", "webp", "avif", "learned", "lossless", "wsicodec", "ojpeg",
        "quality", "target_ssim", "target_psnr", "floor_ssim", "floor_psnr", "floor", "ssim",
        "psnr", "glass", "fill", "drop", "keep", "transcode",
    }
)  # fmt: skip
_STEP_NUMBER = re.compile(r"[qQ]?\d{1,3}(\.\d{1,4})?")


def neutral_history(history: Iterable[str]) -> tuple[str, ...]:
    """A lossy history in known words and short numbers; a step with any other word is ``unknown``.

    A converted file carries the history of its source in words: those of a stranger's file may be
    anything.
    """
    return tuple(
        step
        if all(word in _STEP_WORDS or _STEP_NUMBER.fullmatch(word) for word in step.split(" "))
        else "unknown"
        for step in history
    )


# Images beside the slide


def _image_kind(name: str) -> str:
    text = name.casefold()
    for kind, words in (
        ("label", ("label", "barcode")),
        ("macro", ("macro", "overview")),
        ("thumbnail", ("thumbnail",)),
    ):
        if any(word in text for word in words):
            return kind
    return "unknown"


def _shows_tissue_only(pixels: Image, info: SlideInfo, overview: Image | None) -> bool:
    """True for a picture of the scanned area and nothing else."""
    height, width = pixels.shape[:2]
    first = info.levels[0]
    ratio = (width / height) / (first.width / first.height)
    # a pixel of rounding is much in small pictures
    slack = _THUMBNAIL_RATIO + 1.0 / min(height, width)
    if not 1 - slack <= ratio <= 1 + slack:
        return False
    if overview is None:
        return True
    differences = np.abs(_cells(pixels) - _cells(overview)).max(-1)
    return bool(differences.mean() < _THUMBNAIL_MEAN and differences.max() < _THUMBNAIL_WORST)


def _cells(image: Image) -> npt.NDArray[np.float64]:
    """Mean colours of a grid of 16 x 16 over an image."""
    grid = image.astype(np.float64)
    for axis in (0, 1):
        count = min(_THUMBNAIL_CELLS, image.shape[axis])
        starts = np.arange(count) * image.shape[axis] // count
        lengths = np.diff(np.append(starts, image.shape[axis]))
        total = np.add.reduceat(grid, starts, axis=axis)
        grid = total / (lengths[:, None, None] if axis == 0 else lengths[None, :, None])
        repeats = -(-_THUMBNAIL_CELLS // count)
        grid = np.repeat(grid, repeats, axis=axis).take(range(_THUMBNAIL_CELLS), axis=axis)
    return grid


def blanked_macro(pixels: Image) -> Image | None:
    """A macro whose label's end is white, as a new array; None where that cannot be told.

    Rule: the label covers one end of the long side, at most LABEL_SHARE of it. That share is made
    white at the end that carries marks (pixels unlike the glass of the middle) if the other end is
    clean, without a single mark on the inner four fifths of its height; else at both ends. A
    picture that is not between 2 and 4 times as long as high is not of a whole glass: None.
    """
    height, width = pixels.shape[:2]
    if height > width:
        turned = blanked_macro(pixels.swapaxes(0, 1))
        return None if turned is None else np.ascontiguousarray(turned.swapaxes(0, 1))
    if not _MACRO_RATIO[0] <= width / max(1, height) <= _MACRO_RATIO[1]:
        return None
    length = -int(-width * LABEL_SHARE // 1)
    inner = pixels[height // 10 : height - height // 10].astype(np.int16)
    middle = inner[:, length : width - length].reshape(-1, 3)
    # glass is the brighter part of what lies between the ends
    bright = middle[middle.sum(1) >= np.median(middle.sum(1))]
    marked = np.abs(inner - np.median(bright, axis=0)).max(-1) > _MARKED
    clean_left = not marked[:, :length].any()
    clean_right = not marked[:, width - length :].any()
    out = pixels.copy()
    if not (clean_left and not clean_right):
        out[:, :length] = 255
    if not (clean_right and not clean_left):
        out[:, width - length :] = 255
    return out


def stripped(stored: StoredImage | None) -> StoredImage | None:
    """Stored JPEG segments without application data, comments or bytes behind their end.

    None where a segment is no JPEG, or holds anything but what decoding asks for: then the pixels
    are to be coded anew, for in LZW, JPEG-2000 and others there is room for more than pixels.
    """
    if stored is None or stored.compression != 7:
        return None
    try:
        return dataclasses.replace(
            stored,
            segments=tuple(_bare_jpeg(segment) for segment in stored.segments),
            jpegtables=None if stored.jpegtables is None else _bare_jpeg(stored.jpegtables),
        )
    except FormatError:
        return None


def _bare_jpeg(stream: bytes) -> bytes:
    bare = without_metadata(stream)
    for marker, _, _ in segments(bare):
        if marker not in _JPEG_MARKERS:
            raise FormatError(f"JPEG marker ff {marker:02x} is not needed to decode")
    return bare


# What must not be there

# words that every file of ours, OME-XML, GeoJSON, ICC or JPEG may hold: no secret if a value
_COMMON = frozenset(
    {
        "slide", "image", "label", "macro", "thumbnail", "overview", "wsicodec", "aperio",
        "tiff", "ome-tiff", "pixels", "channel", "objective", "instrument", "annotation",
        "comment", "value", "source", "learned", "lossless", "jpeg", "jpeg2000", "jpegxl",
        "webp", "avif", "quality", "level", "levels", "none", "null", "true", "false",
        "unknown", "default", "input", "output", "test", "scan", "export", "data", "tissue",
        "glass", "area", "average", "description",
    }
)  # fmt: skip


# attributes of OME-XML whose values are free; all others are sizes, units and references
_OME_NAMES = frozenset(
    {
        "Name", "UserName", "FirstName", "MiddleName", "LastName", "Email", "Institution",
        "SerialNumber", "LotNumber", "FileName", "ExternalIdentifier", "Manufacturer", "Model",
        "UUID", "K", "Description",
    }
)  # fmt: skip
_MAX_VALUE = 256


def secrets_of(info: SlideInfo) -> frozenset[str]:
    """Values of a slide that no de-identified file may hold, for ``leaks``.

    Values of all description fields that are not known to be technical, its free text, dates also
    as written elsewhere (ISO 8601, Exif, compact), the path and the name of the file, with and
    without its ending, and names of unknown images. Left out: values of fewer than MIN_SECRET
    characters, numbers of fewer than six digits, common words, and whatever is part of what is kept
    on purpose, such as a size: it cannot be told from that.
    """
    found: dict[str, None] = {}
    for value in _candidates(info):
        text = value.strip(" \t\r\n\0")
        if text:
            found.setdefault(text)
        if len(found) >= MAX_SECRETS:
            break
    kept = _kept_text(info)
    return frozenset(text for text in found if _is_secret(text, kept))


def _is_secret(text: str, kept: str) -> bool:
    if len(text) < MIN_SECRET or text.casefold() in _COMMON or text in kept:
        return False
    digits = sum(character.isdigit() for character in text)
    number = all(character.isdigit() or character in "+-.," for character in text)
    return not (number and digits < 6)


def _kept_text(info: SlideInfo) -> str:
    parts = [technical_description(info.description) or "", *neutral_history(info.history)]
    parts += [info.format, info.compression, info.photometric, info.vendor or ""]
    for level in info.levels:
        parts += [str(level.width), str(level.height)]
    for number in (info.mpp_x, info.mpp_y, info.magnification):
        if number is not None:
            parts += [repr(number), f"{number:g}"]
    return "\n".join(parts)


def _candidates(info: SlideInfo) -> Iterator[str]:
    path = info.path
    yield path.name
    yield path.stem
    yield path.name.split(".")[0]
    yield str(path)
    yield str(path.absolute())
    for name in info.associated:
        if _image_kind(name) == "unknown" and not re.fullmatch(
            r"image \d+( of \d+ x \d+ pixels)?", name
        ):
            yield name
    if info.acquisition_date is not None:
        yield info.acquisition_date
        yield from _dates(info.acquisition_date)
    description = info.description
    if not description:
        return
    if description.startswith("Aperio"):
        yield from _aperio_candidates(description)
    else:
        yield from _text_candidates(description)


def _aperio_candidates(description: str) -> Iterator[str]:
    head, *items = description.split("|")
    for line in re.split(r"[\r\n;]+", head):
        text = line.strip()
        if not (_MAKER.fullmatch(text) or _GEOMETRY.fullmatch(text)):
            yield text
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            yield key
        elif key.casefold() not in _HARMLESS:
            yield value
            yield from _dates(value)


def _text_candidates(description: str) -> Iterator[str]:
    """Values of XML, of JSON, or of ``key = value`` and ``key: value`` lines."""
    text = description.lstrip()
    if text.startswith("<"):
        values = _xml_values(text)
    elif text.startswith(("{", "[")):
        values = _json_values(text)
    else:
        values = _line_values(text)
    for value in values:
        if len(value) <= _MAX_VALUE and not value.startswith(("http://", "https://", "urn:")):
            yield value
            yield from _dates(value)


def _xml_values(text: str) -> Iterator[str]:
    """Attributes and text between tags; of OME-XML only where a person or a device may stand."""
    # a pattern and no parser: entities of a stranger cannot blow up, broken XML gives what it has
    ome = re.search(r"<(?:\w+:)?OME\b", text[:4096]) is not None
    for match in re.finditer(r"""([\w:.-]+)\s*=\s*(?:"([^"<]*)"|'([^'<]*)')|>([^<>]+)<""", text):
        name, double, single, content = match.groups()
        if name is None:
            yield html.unescape(content).strip()
        elif not ome or name.rpartition(":")[2] in _OME_NAMES:
            yield html.unescape(double if double is not None else single)


def _json_values(text: str) -> Iterator[str]:
    try:
        values = [json.loads(text)]
    except (ValueError, RecursionError):
        yield from _line_values(text)
        return
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif value is not None and not isinstance(value, bool):
            yield str(value)


def _line_values(text: str) -> Iterator[str]:
    for line in re.split(r"[\r\n|]+", text):
        value = re.sub(r"^[^=:]{1,80}[=:]", "", line, count=1)
        yield value.strip(' \t",')


def _dates(value: str) -> Iterator[str]:
    """A date in the ways in which files write it: the value may come back in another."""
    for match in re.finditer(r"(?<!\d)(\d{1,4})[/.:-](\d{1,2})[/.:-](\d{1,4})(?!\d)", value):
        first, second, third = match.groups()
        if len(first) == 4:
            orders = [(first, second, third)]
        elif len(third) in (2, 4):
            century = "" if len(third) == 4 else "20"
            year = century + third
            # Aperio writes month/day/year; others day.month.year
            orders = [(year, first, second), (year, second, first)]
        else:
            continue
        for year, month, day in orders:
            if len(year) == 4 and 1 <= int(month) <= 12 and 1 <= int(day) <= 31:
                month, day = month.zfill(2), day.zfill(2)  # noqa: PLW2901
                yield match[0]
                for separator in ("-", ":", "/", ""):
                    yield separator.join((year, month, day))
