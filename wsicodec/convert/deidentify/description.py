"""The technical part of a scanner's description, and of a lossy history; all else is dropped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_NUMBER = re.compile(r"\d{1,4}(\.\d{1,12})?")
_TECHNICAL = ("AppMag", "MPP")  # keys of Aperio's whose values are kept, if they are numbers

# keys in lower case, of settings of the optics: their values are dropped as all others, but say
# nothing of anyone
HARMLESS = frozenset(
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

MAKER = re.compile(
    r"Aperio (?:Image Library|Leica Biosystems GT450(?: DX)?)(?: v\d{1,3}(?:\.\d{1,4}){0,3})?"
)
_SIZE = r"\d{1,7}x\d{1,7}"
GEOMETRY = re.compile(
    rf"{_SIZE}(?: \[-?\d{{1,7}},-?\d{{1,7}} {_SIZE}\])?(?: \({_SIZE}\))?(?: -> {_SIZE})?"
    r"(?: (?:JPEG|J2K|LZW|JPEG2000)/(?:RGB|YCC|YCbCr|YUV16|KDU)(?: Q=\d{1,3})?)?"
)


def technical_description(description: str | None) -> str | None:
    """The technical part of an Aperio ImageDescription, in Aperio's form; None if there is none.

    What is kept matches, as a whole, a pattern of makers, sizes, codecs and qualities, or is a
    number under AppMag or MPP. Descriptions of other makers have no such part.
    """
    return rewritten(description)[0]


def rewritten(description: str | None) -> tuple[str | None, Counter[str]]:
    """The technical part, and how many of which kind were dropped."""
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
            if MAKER.fullmatch(text) or GEOMETRY.fullmatch(text):
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
        elif key.casefold() in HARMLESS:
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
