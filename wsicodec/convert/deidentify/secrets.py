"""What a de-identified file must not hold: the values that are dropped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator

from wsicodec.convert.deidentify.description import (
    GEOMETRY,
    HARMLESS,
    MAKER,
    neutral_history,
    technical_description,
)
from wsicodec.convert.deidentify.images import image_kind
from wsicodec.convert.deidentify.search import MIN_SECRET, forms, occurs
from wsicodec.slide.protocol import SlideInfo

MAX_SECRETS = 4096

# words that a slide may have for values although they say nothing of anyone
_COMMON = frozenset(
    {
        "aperio", "area", "average", "avif", "barcode", "comment", "data", "default", "export",
        "false", "input", "label", "learned", "lossless", "macro", "none", "null", "output",
        "overview", "scan", "source", "test", "thumbnail", "tissue", "true", "unknown",
    }
)  # fmt: skip
# what files of ours hold anyway, whatever the slide: it cannot be told from a value. Words of the
# record, of OME-XML and of OME-Zarr
_OURS = """
Annotation AnnotationRef Channel CommentAnnotation Creator Description DimensionOrder Image
Instrument InstrumentRef Interleaved Library Name Namespace NominalMagnification Objective
ObjectiveSettings PhysicalSizeX PhysicalSizeXUnit PhysicalSizeY PhysicalSizeYUnit Pixels PlaneCount
SamplesPerPixel Schemas SizeC SizeT SizeX SizeY SizeZ StructuredAnnotations TiffData Type UTF-8
Value XMLSchema-instance XYCZT AppMag OME-TIFF acquisition_date active array associated attributes
axes background below_floor blobs bytes channel_axis channels chunk_grid chunk_key_encoding
chunk_shape codec codecs coefficient color compression configuration constant
coordinateTransformations copy crc32c data_range data_type datasets default defaultT defaultZ
deidentified dimension_names drop effort embed_model encoding endian equal_tiles_count_as
every_chunk_is_stored fallbacks false family fill fill_value flat float64 floor floor_psnr
floor_ssim format gaussian_weights glass group he-fast height history http https identity
implementation index_codecs index_location inverted jpeg jpeg2000 jpegxl json keep kept label
labels layout learned level level_bytes level_quality levels lightness linear little lossless
lossless_transcode luma macro magnification measure measured metadata method metrics micrometer
mirrored mode model model_sha256 models mucs multiscales name namespace network node_type null
omero openmicroscopy options otsu overview padding passport path photometric predictor psnr
psnr_mean psnr_p01 psnr_worst psnr_worst_at pyramid quality rdefs record regular rows_per_strip
sample scale schemas segments separator series settings sha256 shape sharding_indexed sigma skimage
smaller_than_window source source-description space ssim ssim_mean ssim_p01 ssim_worst
ssim_worst_at start strip_metadata structural_similarity subifd subsampling tables target_psnr
target_ssim those thumbnail tile tile_size tiles tissue tissue_share translation true type uint8
unit urn use_sample_covariance version webp width win_size window without wsicodec wsicodec-file
wsicodec-omezarr xmlns xsi schemaLocation zarr zarr_format slide
""".casefold()

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
    folded = text.casefold()
    if len(text) < MIN_SECRET or folded in _COMMON or folded in kept:
        return False
    if any(occurs(form, _OURS) for form in forms(folded)):
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
    return "\n".join(parts).casefold()


def _candidates(info: SlideInfo) -> Iterator[str]:
    path = info.path
    yield path.name
    yield path.stem
    yield path.name.split(".")[0]
    yield str(path)
    yield str(path.absolute())
    for name in info.associated:
        if image_kind(name) == "unknown" and not re.fullmatch(
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
        if not (MAKER.fullmatch(text) or GEOMETRY.fullmatch(text)):
            yield text
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            yield key
        elif key.casefold() not in HARMLESS:
            yield value
            yield from re.split(r"[\r\n]+", value)
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
    # it begins at the start of a word: else a long one takes the square of its length
    for match in re.finditer(
        r"""(?<![\w:.-])([\w:.-]+)\s*=\s*(?:"([^"<]*)"|'([^'<]*)')|>([^<>]+)<""", text
    ):
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


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = r"(?P<name>jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
_WRITTEN_DATES = tuple(
    re.compile(rf"(?<![a-z\d]){pattern}(?!\d)", re.ASCII)
    for pattern in (
        r"(?P<a>\d{1,4})[/.:_-](?P<b>\d{1,2})[/.:_-](?P<c>\d{1,4})",
        r"(?P<a>(?:19|20)\d\d)(?P<b>\d\d)(?P<c>\d\d)",
        rf"(?P<b>\d{{1,2}})\.?[ _-]{{0,2}}{_MONTH}[ ,_-]{{0,2}}(?P<a>\d{{4}}|\d\d)",
        rf"{_MONTH}[ _-]{{0,2}}(?P<b>\d{{1,2}})[ ,_-]{{1,2}}(?P<a>\d{{4}})",
    )
)


def _dates(value: str) -> Iterator[str]:
    """A date in the ways in which files write it: the value may come back in another."""
    folded = value.lower()
    for pattern in _WRITTEN_DATES:
        for match in pattern.finditer(folded):
            for year, month, day in _orders(**match.groupdict()):
                if len(year) == 4 and 1 <= month <= 12 and 1 <= day <= 31:
                    yield value[match.start() : match.end()]
                    yield from _ways_to_write(year, month, day)


def _orders(a: str, b: str, c: str = "", name: str | None = None) -> Iterator[tuple[str, int, int]]:
    """(year, month, day) that the numbers of a date may mean."""
    if name is not None:
        yield _year(a), _MONTHS.index(name) + 1, int(b)
    elif len(a) == 4:
        yield a, int(b), int(c)
    elif len(c) in (2, 4):
        # Aperio writes month/day/year; others day.month.year
        yield _year(c), int(a), int(b)
        yield _year(c), int(b), int(a)


def _year(text: str) -> str:
    if len(text) != 2:
        return text
    return ("19" if text >= "70" else "20") + text


def _ways_to_write(year: str, month: int, day: int) -> Iterator[str]:
    mm, dd, name = f"{month:02}", f"{day:02}", _MONTHS[month - 1].capitalize()
    for separator in ("-", ":", "/", ".", "_", ""):
        yield separator.join((year, mm, dd))
    for separator in ("-", "/", "."):
        yield separator.join((dd, mm, year))
        yield separator.join((mm, dd, year))
    yield f"{dd} {name} {year}"
    yield f"{dd}-{name}-{year}"
    yield f"{name} {dd}, {year}"
