"""Pieces of markup that sections share. What comes from the file passes through ``escaped``."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wsicodec.bitstream import Mode
from wsicodec.printing import MAX_SHOWN, printable
from wsicodec.report import maps
from wsicodec.slide.passport import PLAIN_STREAM

MAX_LISTED = 24
"""Items of a list from the file that are shown."""

MODE_NAMES = {
    maps.SHARED_GLASS: "glass, stored once",
    Mode.LEARNED: "learned",
    Mode.CONSTANT: "one colour",
    Mode.JPEGXL: "JPEG XL",
    Mode.JPEG: "JPEG",
    Mode.JPEG2000: "JPEG 2000",
    Mode.LOSSLESS: "lossless",
    Mode.TRANSCODED: "JPEG packed as JPEG XL",
    PLAIN_STREAM: "stream of the file's codec",
}


def escaped(value: object, limit: int = MAX_SHOWN) -> str:
    """Any value as text that cannot become markup."""
    return html.escape(printable(str(value), limit), quote=True)


def listed(values: Sequence[str], between: str = ", ") -> str:
    """Strings of the file, the first MAX_LISTED of them."""
    shown = [escaped(value) for value in values[:MAX_LISTED]]
    if len(values) > MAX_LISTED:
        shown.append(f"and {len(values) - MAX_LISTED} more")
    return between.join(shown)


def mapping(values: Mapping[str, Any]) -> str:
    """Names and values of an object of the file, one a line."""
    return listed([f"{name} = {plain(value)}" for name, value in sorted(values.items())], "<br>")


def plain(value: object) -> str:
    """A JSON value for people; not yet escaped."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def legend(items: Iterable[tuple[str, str]]) -> str:
    """A legend of (CSS colour, text)."""
    inside = "".join(
        f'<li><i style="background:{colour}"></i>{text}</li>' for colour, text in items
    )
    return f'<ul class="keys">{inside}</ul>' if inside else ""


def rgb(colour: Sequence[int] | maps.Image) -> str:
    """#rrggbb for CSS."""
    return "#" + "".join(f"{int(sample):02x}" for sample in colour)


def plural(count: int, noun: str) -> str:
    """The noun for a count."""
    return noun if count == 1 else f"{noun}s"
