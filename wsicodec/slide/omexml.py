"""OME-XML of a brightfield slide: what the writer puts in, and what the reader takes out.

Written here and not by tifffile, which has no place for an objective. Schema 2016-06.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from wsicodec.errors import FormatError

NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
SCHEMA = f"{NAMESPACE} {NAMESPACE}/ome.xsd"
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


def build(image: OmeImage, *, creator: str) -> bytes:
    """UTF-8 OME-XML of a file with one RGB image in IFD 0 and its pyramid in SubIFDs."""
    root = ElementTree.Element(
        "OME",
        {
            "xmlns": NAMESPACE,
            "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
            "xsi:schemaLocation": SCHEMA,
            "Creator": creator,
        },
    )
    if image.magnification is not None:
        instrument = ElementTree.SubElement(root, "Instrument", {"ID": "Instrument:0"})
        ElementTree.SubElement(
            instrument,
            "Objective",
            {"ID": "Objective:0:0", "NominalMagnification": repr(float(image.magnification))},
        )
    element = ElementTree.SubElement(root, "Image", {"ID": "Image:0", "Name": _clean(image.name)})
    if image.magnification is not None:
        ElementTree.SubElement(element, "InstrumentRef", {"ID": "Instrument:0"})
        ElementTree.SubElement(element, "ObjectiveSettings", {"ID": "Objective:0:0"})
    attributes = {
        "ID": "Pixels:0",
        "DimensionOrder": "XYCZT",
        "Type": "uint8",
        "SizeX": str(image.size_x),
        "SizeY": str(image.size_y),
        "SizeC": "3",
        "SizeZ": "1",
        "SizeT": "1",
        "Interleaved": "true",
    }
    for axis, mpp in (("X", image.mpp_x), ("Y", image.mpp_y)):
        if mpp is not None:
            attributes[f"PhysicalSize{axis}"] = repr(float(mpp))
            attributes[f"PhysicalSize{axis}Unit"] = "\u00b5m"
    pixels = ElementTree.SubElement(element, "Pixels", attributes)
    ElementTree.SubElement(pixels, "Channel", {"ID": "Channel:0:0", "SamplesPerPixel": "3"})
    ElementTree.SubElement(pixels, "TiffData", {"IFD": "0", "PlaneCount": "1"})
    if image.description is not None:
        ElementTree.SubElement(element, "AnnotationRef", {"ID": "Annotation:0"})
        annotations = ElementTree.SubElement(root, "StructuredAnnotations")
        comment = ElementTree.SubElement(
            annotations,
            "CommentAnnotation",
            {"ID": "Annotation:0", "Namespace": DESCRIPTION_NAMESPACE},
        )
        ElementTree.SubElement(comment, "Value").text = _clean(image.description)
    text: bytes = ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)
    # a parser turns a bare CR into LF; Aperio's descriptions hold CR LF
    return text.replace(b"\r", b"&#13;")


def parse(text: str | bytes) -> list[OmeImage]:
    """The Image elements of OME-XML, in order. Raises FormatError where it is not OME-XML."""
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise FormatError(f"OME-XML is broken: {error}") from None
    if _local(root) != "OME":
        raise FormatError(f"root element is {_local(root)!r}, not OME")
    objectives = {
        objective.get("ID", ""): objective
        for instrument in _children(root, "Instrument")
        for objective in _children(instrument, "Objective")
    }
    comments = {
        annotation.get("ID", ""): _text(annotation, "Value")
        for group in _children(root, "StructuredAnnotations")
        for annotation in _children(group, "CommentAnnotation")
        if annotation.get("Namespace") == DESCRIPTION_NAMESPACE
    }
    return [
        _image(element, objectives, comments)
        for element in _children(root, "Image")
        if _children(element, "Pixels")
    ]


def _image(
    element: ElementTree.Element,
    objectives: dict[str, ElementTree.Element],
    comments: dict[str, str | None],
) -> OmeImage:
    pixels = _children(element, "Pixels")[0]
    settings = _children(element, "ObjectiveSettings")
    objective = objectives.get(settings[0].get("ID", "")) if settings else None
    if objective is None and len(objectives) == 1:
        objective = next(iter(objectives.values()))
    description = None
    for reference in _children(element, "AnnotationRef"):
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
        )
    except ValueError as error:
        raise FormatError(f"OME-XML has a Pixels element with a broken size: {error}") from None


def _length(pixels: ElementTree.Element, name: str) -> float | None:
    value = _positive(pixels.get(name))
    unit = _MICROMETRES.get(pixels.get(f"{name}Unit", "\u00b5m"))
    return None if value is None or unit is None else value * unit


def _positive(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _children(element: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [child for child in element if _local(child) == name]


def _text(element: ElementTree.Element, name: str) -> str | None:
    found = _children(element, name)
    return (found[0].text or "") if found else None


def _local(element: ElementTree.Element) -> str:
    # the namespace carries the schema's year: any is fine
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
