"""OME-XML of a brightfield slide: what the writer puts in, and what the reader takes out.

ome-types builds it, by the schema 2016-06, and is imported for that alone. Reading is done here: it
has to stand a stranger's file, and to be quick.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from wsicodec.errors import FormatError, LimitError, RuntimeMissingError, SettingsError

MAX_XML = 2**24
"""Characters of OME-XML that are read. A slide has some thousand, large plates some million."""
MAX_ELEMENTS = 200_000

DESCRIPTION_NAMESPACE = "urn:wsicodec:source-description"
"""Namespace of the annotation that keeps the ImageDescription of the source, word for word."""

# µm per unit; OME's "reference frame" and "pixel" are no lengths
_MICROMETRES = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "\u00b5m": 1.0,  # micro sign, which the schema asks for
    "\u03bcm": 1.0,  # Greek mu, which some writers use
    "um": 1.0,
    "nm": 1e-3,
    "pm": 1e-6,
    "\u00c5": 1e-4,
    "in": 25400.0,
}

# characters that XML 1.0 cannot hold in any form
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class OmeImage:
    """One Image element.

    size_x, size_y: pixels; channels: samples over all Channel elements (SizeC).
    mpp_x, mpp_y: µm per pixel; magnification: of the objective; None where not told.
    description: kept ImageDescription of the slide this file was converted from.
    acquisition_date: ISO 8601.
    """

    name: str
    size_x: int
    size_y: int
    channels: int = 3
    planes: int = 1
    mpp_x: float | None = None
    mpp_y: float | None = None
    magnification: float | None = None
    description: str | None = None
    acquisition_date: str | None = None


def build(images: Sequence[OmeImage], *, creator: str) -> bytes:
    """UTF-8 OME-XML of a file whose directories (SubIFDs not counted) hold one RGB image each.

    Raises SettingsError for what OME-XML does not take, like a date that is not ISO 8601,
    RuntimeMissingError without ome-types.
    """
    try:
        from ome_types import to_xml
    except ImportError as error:
        raise RuntimeMissingError(
            f"OME-XML is written with ome-types, which cannot be imported ({error}): "
            "pip install ome-types"
        ) from error

    try:
        text = to_xml(_document(images, creator), indent=0)
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"OME-XML does not take these metadata: {error}") from None
    # a parser turns a bare CR into LF; Aperio's descriptions hold CR LF
    text = text.replace("\r", "&#13;")
    return f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()


def _document(images: Sequence[OmeImage], creator: str) -> Any:
    from ome_types import model

    ome = model.OME(creator=_clean(creator))
    for index, image in enumerate(images):
        element = model.Image(
            id=f"Image:{index}",
            name=_clean(image.name),
            acquisition_date=_date(image.acquisition_date),
            pixels=_pixels(image, index),
        )
        if image.magnification is not None:
            instrument, objective = f"Instrument:{index}", f"Objective:{index}:0"
            ome.instruments.append(
                model.Instrument(
                    id=instrument,
                    objectives=[
                        model.Objective(
                            id=objective, nominal_magnification=float(image.magnification)
                        )
                    ],
                )
            )
            element.instrument_ref = model.InstrumentRef(id=instrument)
            element.objective_settings = model.ObjectiveSettings(id=objective)
        if image.description is not None:
            annotation = model.CommentAnnotation(
                id=f"Annotation:{index}",
                namespace=DESCRIPTION_NAMESPACE,
                value=_clean(image.description),
            )
            if ome.structured_annotations is None:
                ome.structured_annotations = model.StructuredAnnotations()
            ome.structured_annotations.comment_annotations.append(annotation)
            element.annotation_refs.append(model.AnnotationRef(id=annotation.id))
        ome.images.append(element)
    return ome


def _pixels(image: OmeImage, index: int) -> Any:
    from ome_types import model

    pixels = model.Pixels(
        id=f"Pixels:{index}",
        dimension_order=model.Pixels_DimensionOrder.XYCZT,
        type=model.PixelType.UINT8,
        interleaved=True,
        size_x=image.size_x,
        size_y=image.size_y,
        size_c=3,
        size_z=1,
        size_t=1,
        channels=[model.Channel(id=f"Channel:{index}:0", samples_per_pixel=3)],
        tiff_data_blocks=[model.TiffData(ifd=index, plane_count=1)],
    )
    if image.mpp_x is not None:
        pixels.physical_size_x = float(image.mpp_x)
        pixels.physical_size_x_unit = model.UnitsLength.MICROMETER
    if image.mpp_y is not None:
        pixels.physical_size_y = float(image.mpp_y)
        pixels.physical_size_y_unit = model.UnitsLength.MICROMETER
    return pixels


def _date(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"acquisition date {text!r} is not ISO 8601") from None


def parse(text: str | bytes) -> list[OmeImage]:
    """The Image elements of OME-XML that have pixels, in order.

    Raises FormatError where it is not OME-XML or declares a document type, LimitError beyond
    MAX_XML and MAX_ELEMENTS.
    """
    root = _tree(text)
    if root.tag != "OME":
        raise FormatError(f"root element is {root.tag!r}, not OME")
    objectives = {
        objective.get("ID", ""): objective
        for instrument in root.findall("Instrument")
        for objective in instrument.findall("Objective")
    }
    images = [image for image in root.findall("Image") if image.find("Pixels") is not None]
    if len(objectives) != 1 or any(i.find("ObjectiveSettings") is not None for i in images):
        only = None
    else:
        only = next(iter(objectives.values()))  # some writers refer to it from nowhere
    comments = {
        annotation.get("ID", ""): annotation.findtext("Value")
        for group in root.findall("StructuredAnnotations")
        for annotation in group.findall("CommentAnnotation")
        if annotation.get("Namespace") == DESCRIPTION_NAMESPACE
    }
    return [_image(image, objectives, only, comments) for image in images]


def _tree(text: str | bytes) -> ElementTree.Element:
    """The elements by their local names: the namespace carries the schema's year, any is fine."""
    if len(text) > MAX_XML:
        raise LimitError(f"OME-XML of {len(text)} characters exceeds {MAX_XML}")
    parser = expat.ParserCreate(namespace_separator="}")
    builder = ElementTree.TreeBuilder()
    count = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > MAX_ELEMENTS:
            raise LimitError(f"OME-XML of more than {MAX_ELEMENTS} elements")
        builder.start(name.rpartition("}")[2], attributes)

    def refuse(*_: object) -> None:
        # what entities are declared in; a few bytes of them can stand for gigabytes
        raise FormatError("OME-XML declares a document type, which OME-XML has none of")

    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: builder.end(name.rpartition("}")[2])
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text, True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError) as error:
        if isinstance(error, FormatError | LimitError):
            raise
        raise FormatError(f"OME-XML is broken: {error}") from None


def _image(
    element: ElementTree.Element,
    objectives: dict[str, ElementTree.Element],
    only: ElementTree.Element | None,
    comments: dict[str, str | None],
) -> OmeImage:
    pixels = element.find("Pixels")
    assert pixels is not None
    settings = element.find("ObjectiveSettings")
    objective = only if settings is None else objectives.get(settings.get("ID", ""))
    description = None
    for reference in element.findall("AnnotationRef"):
        description = comments.get(reference.get("ID", ""), description)
    try:
        return OmeImage(
            name=element.get("Name", ""),
            size_x=int(pixels.get("SizeX", "0")),
            size_y=int(pixels.get("SizeY", "0")),
            channels=int(pixels.get("SizeC", "1")),
            planes=int(pixels.get("SizeZ", "1")) * int(pixels.get("SizeT", "1")),
            mpp_x=_length(pixels, "PhysicalSizeX"),
            mpp_y=_length(pixels, "PhysicalSizeY"),
            magnification=None
            if objective is None
            else _positive(
                objective.get("NominalMagnification") or objective.get("CalibratedMagnification")
            ),
            description=description,
            acquisition_date=_iso(element.findtext("AcquisitionDate")),
        )
    except ValueError as error:
        raise FormatError(f"OME-XML has a Pixels element with a broken size: {error}") from None


def _length(pixels: ElementTree.Element, name: str) -> float | None:
    value = _positive(pixels.get(name))
    unit = _MICROMETRES.get(pixels.get(f"{name}Unit", "\u00b5m"))
    return None if value is None or unit is None else _finite(value * unit)


def _positive(text: str | None) -> float | None:
    try:
        return _finite(float(text or ""))
    except ValueError:
        return None


def _finite(value: float) -> float | None:
    return value if 0 < value < float("inf") else None


def _iso(text: str | None) -> str | None:
    """The date as it is written, None where it is not one."""
    try:
        datetime.fromisoformat((text or "").strip())
    except ValueError:
        return None
    return (text or "").strip()


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
