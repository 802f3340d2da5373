"""When a slide was scanned, out of the many ways in which scanners write it, as ISO 8601.

A date that does not exist, or that no scanner can have seen, is left out rather than guessed.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping

FIRST_YEAR = 1985
"""No digital slide is older: earlier dates are clocks that were never set."""

_ISO_ZONE = re.compile(r"(?:GMT|UTC)?\s*([+-])(\d{1,2}):?(\d{2})$")

# property of OpenSlide -> how it is written; the first that holds a date counts
_PROPERTIES = (
    ("dicom.AcquisitionDateTime", "digits"),
    ("philips.DICOM_ACQUISITION_DATETIME", "digits"),
    ("leica.creation-date", "iso"),
    ("zeiss.Information.Image.AcquisitionDateAndTime", "iso"),
    ("mirax.GENERAL.SLIDE_CREATIONDATETIME", "day first"),
    ("hamamatsu.Created", "slashes"),
    ("tiff.DateTime", "tiff"),
)
_FORMATS = {
    "day first": ("%d/%m/%Y %H:%M:%S", "%d/%m/%Y"),
    "slashes": ("%Y/%m/%d %H:%M:%S", "%Y/%m/%d"),
    "tiff": ("%Y:%m:%d %H:%M:%S",),
}


def aperio_date(values: Mapping[str, str]) -> str | None:
    """Of an Aperio description: ``Date = 12/29/09`` (month first), ``Time``, ``Time Zone``."""
    date = None
    for pattern in ("%m/%d/%y", "%m/%d/%Y"):
        date = date or _parsed(values.get("Date", ""), pattern)
    if date is None:
        return None
    time = _parsed(values.get("Time", ""), "%H:%M:%S")
    if time is None:
        return _shown(date, None, dated=True)
    moment = datetime.datetime.combine(date, time.time())
    return _shown(moment, _zone(values.get("Time Zone", "")))


def tiff_date(text: object) -> str | None:
    """Of TIFF's DateTime, ``2009:12:29 09:59:15``."""
    return _by_formats(str(text or ""), "tiff")


def iso_date(text: str | None) -> str | None:
    """Of a date, or date and time, that is meant to be ISO 8601 already."""
    # a scanner's clock counts in 100 ns, Python's in microseconds
    text = re.sub(r"(\.\d{6})\d+", r"\1", (text or "").strip())
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            return _shown(datetime.datetime.fromisoformat(text), None, dated=True)
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return _shown(moment, moment.tzinfo)


def openslide_date(properties: Mapping[str, str]) -> str | None:
    """Of the properties that OpenSlide gives, whatever the vendor."""
    if "aperio.Date" in properties:
        values = {key: properties.get(f"aperio.{key}", "") for key in ("Date", "Time", "Time Zone")}
        found = aperio_date(values)
        if found:
            return found
    for name, kind in _PROPERTIES:
        text = properties.get(name, "")
        if kind == "iso":
            found = iso_date(text)
        elif kind == "digits":
            found = _dicom_date(text)
        else:
            found = _by_formats(text, kind)
        if found:
            return found
    return None


def _dicom_date(text: str) -> str | None:
    """DICOM's DT: ``20091229095915.123456+0100``, cut short anywhere after the day."""
    match = re.fullmatch(r"(\d{8})(\d{6})?(?:\.\d{1,6})?([+-]\d{4})?", text.strip())
    if match is None:
        return None
    date, time, zone = match.groups()
    moment = _parsed(date + (time or ""), "%Y%m%d%H%M%S" if time else "%Y%m%d")
    if moment is None:
        return None
    return _shown(moment, _zone(zone or ""), dated=time is None)


def _by_formats(text: str, kind: str) -> str | None:
    for pattern in _FORMATS[kind]:
        moment = _parsed(text, pattern)
        if moment is not None:
            return _shown(moment, None, dated="%H" not in pattern)
    return None


def _parsed(text: str, pattern: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(text.strip().strip("\0"), pattern)
    except ValueError:
        return None


def _zone(text: str) -> datetime.tzinfo | None:
    match = _ISO_ZONE.search(text.strip())
    if match is None:
        return None
    sign, hours, minutes = match.groups()
    offset = datetime.timedelta(hours=int(hours), minutes=int(minutes))
    if offset >= datetime.timedelta(days=1):
        return None
    return datetime.timezone(-offset if sign == "-" else offset)


def _shown(
    moment: datetime.datetime, zone: datetime.tzinfo | None, *, dated: bool = False
) -> str | None:
    """ISO 8601, or None for a year that cannot be; dated: the day is all that is known."""
    latest = datetime.datetime.now().year + 1
    if not FIRST_YEAR <= moment.year <= latest:
        return None
    return moment.date().isoformat() if dated else moment.replace(tzinfo=zone).isoformat()
