"""Colour profiles without names: ICC profiles can tell which scanner took a slide, and when.

A profile is a header, a table of tags and their values. Colours follow from some tags; others hold
text: a description, a copyright, makers, models, and whatever a scanner's maker put there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping

from wsicodec.convert.deidentify.search import holds

_ICC_HEADER = 128
_MAX_ICC_TAGS = 200
_ICC_NEUTRAL_DATE = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
_ICC_TEXT_TYPES = (b"text", b"desc", b"mluc", b"dict", b"pseq", b"psid")
# all that colour management computes with, and the signatures of the viewing conditions
_ICC_COLOURS = frozenset(
    b"rXYZ gXYZ bXYZ rTRC gTRC bTRC kTRC wtpt bkpt chad chrm lumi meas view tech gamt cicp "
    b"A2B0 A2B1 A2B2 B2A0 B2A1 B2A2 D2B0 D2B1 D2B2 D2B3 B2D0 B2D1 B2D2 B2D3 pre0 pre1 pre2 "
    b"rig0 rig2 ciis".split()
)
# names of standards, and years, look like serials and are none
_STANDARDS = re.compile(
    r"IEC\s?\d{5}(-\d{1,2}){0,2}(\.\d+)?(:\d{4})?|ISO\s?\d{4,5}(-\d+)?|D\d\d(?!\d)", re.IGNORECASE
)
_YEARS = re.compile(r"(?<!\d)(19|20)\d\d(?!\d)")
_TIMES = re.compile(
    r"\d{4}[./-]\d\d?[./-]\d\d?|\d\d?[./-]\d\d?[./-]\d{4}|\d\d?[/-]\d\d?[/-]\d\d|\d\d:\d\d",
    re.ASCII,
)
_SERIALS = re.compile(
    r"\b(s/?n|serial|ser\.?\s?n[or])\b"  # says so
    r"|\d[\w-]*\d[\w-]*\d[\w-]*\d[\w-]*\d"  # a word of five digits or more
    r"|[A-Za-z][\w-]*\d[\w-]*\d[\w-]*\d[\w-]*\d",  # letters, then four digits
    re.IGNORECASE | re.ASCII,
)


def neutral_profile(profile: bytes, secrets: Collection[str] = ()) -> bytes | None:
    """An ICC profile that names nobody and no device; None where it is no readable profile.

    Kept byte for byte, unless it holds one of ``secrets``, or a text of it looks like a serial
    number, date or time, or it says when a device was calibrated. Then it is built anew: all tags
    that decide colours with their bytes as they were, a neutral description and copyright (ICC asks
    for both), the date of its making 2000-01-01, no profile identifier, and nothing else: neither
    private tags nor what lies between tags. Colours are the same to the bit.

    What cannot be parsed says nothing of colours, but may hold anything.
    """
    tags = _profile_tags(profile)
    if tags is None:
        return None
    texts = [_profile_text(value) for value in tags.values() if value[:4] in _ICC_TEXT_TYPES]
    suspicious = (
        b"calt" in tags
        or any(_looks_telling(text) for text in texts)
        or any(holds(profile, secret) for secret in secrets)
        or any(secret.casefold() in text.casefold() for secret in secrets for text in texts)
        or _profile_date(profile) in secrets
    )
    if not suspicious:
        return profile
    kept = {name: value for name, value in tags.items() if name in _ICC_COLOURS}
    if any(value[:4] in _ICC_TEXT_TYPES for value in kept.values()):
        return None  # a text under the name of a colour
    version4 = profile[8] >= 4
    for name in (b"desc", b"cprt"):
        kept[name] = _neutral_text(name, version4)
    header = bytearray(profile[:_ICC_HEADER])
    header[24:36] = _ICC_NEUTRAL_DATE
    header[48:64] = bytes(16)  # maker, model and attributes of the device
    header[80:] = bytes(_ICC_HEADER - 80)  # creator, identifier, reserved
    return _packed_profile(bytes(header), kept)


def _looks_telling(text: str) -> bool:
    """True for what looks like a serial number, a date or a time."""
    rest = _STANDARDS.sub(" ", text)
    return bool(_TIMES.search(rest) or _SERIALS.search(_YEARS.sub(" ", rest)))


def _profile_tags(profile: bytes) -> dict[bytes, bytes] | None:
    """Tags of a profile, None for bytes that break the format."""
    if len(profile) < _ICC_HEADER + 4 or profile[36:40] != b"acsp":
        return None
    (count,) = struct.unpack_from(">I", profile, _ICC_HEADER)
    table = _ICC_HEADER + 4
    if not 1 <= count <= _MAX_ICC_TAGS or table + 12 * count > len(profile):
        return None
    tags: dict[bytes, bytes] = {}
    for index in range(count):
        name, offset, length = struct.unpack_from(">4sII", profile, table + 12 * index)
        if offset < table or length < 8 or offset + length > len(profile) or name in tags:
            return None
        tags[name] = profile[offset : offset + length]
    return tags


def _profile_text(value: bytes) -> str:
    """Whatever is readable in a text tag, as one byte a character and as UTF-16."""
    wide = (value[start:].decode("utf-16-be", "replace") for start in (8, 9))
    return " ".join((value[8:].decode("latin-1"), *wide))


def _profile_date(profile: bytes) -> str:
    year, month, day = struct.unpack_from(">3H", profile, 24)
    return f"{year:04}-{month:02}-{day:02}"


def _neutral_text(name: bytes, version4: bool) -> bytes:
    text = "RGB" if name == b"desc" else "no copyright"
    if version4:
        coded = text.encode("utf-16-be")
        record = struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(coded), 28)
        return b"mluc" + bytes(4) + record + coded
    if name == b"desc":
        plain = text.encode() + b"\0"
        return b"desc" + bytes(4) + struct.pack(">I", len(plain)) + plain + bytes(8 + 3 + 67)
    return b"text" + bytes(4) + text.encode() + b"\0"


def _packed_profile(header: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    start = _ICC_HEADER + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    places: dict[bytes, int] = {}
    for name, value in tags.items():
        if value not in places:  # the three curves are often one
            places[value] = start + len(data)
            data += value + bytes(-len(value) % 4)
        table += struct.pack(">4sII", name, places[value], len(value))
    size = len(header) + len(table) + len(data)
    return struct.pack(">I", size) + header[4:] + table + data
