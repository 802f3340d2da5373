"""What a converted file says of itself in private TIFF tags.

``TAG_RECORD`` (ASCII) holds JSON: codec, quality, the full SHA-256 of each model, package version,
metric arguments, lossy history of the pixels. ``TAG_MODEL`` (UNDEFINED) may hold the bytes of the
model itself, so that a file outlives the model collection of the package.
Both sit in the IFD of level 0. The numbers are private (32768 and above), used by no registry that
tifffile, libtiff or exiftool know; they are literals of the file format and never change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wsicodec.errors import FormatError, UnsupportedError

TAG_RECORD = 60643
TAG_MODEL = 60644
RECORD_FORMAT = "wsicodec-file"
RECORD_VERSION = 1
FROM_SOURCE, AREA_AVERAGE = "source", "area average"
MAX_RECORD_BYTES = 2**24


@dataclass(frozen=True)
class ModelId:
    """A model by name and full SHA-256 (hex)."""

    name: str
    sha256: str


@dataclass(frozen=True)
class FileRecord:
    """How the tiles of a file were coded.

    codec: as in ``convert --codec``. quality: 1 ... 100, None for lossless and where ``options``
    holds a target that tiles reach.
    history: lossy codings that the pixels went through, oldest first, this one last.
    levels: per level FROM_SOURCE or AREA_AVERAGE: where its pixels came from.
    metrics: arguments of the fidelity figures that belong to this file.
    """

    wsicodec: str
    codec: str
    quality: int | None
    models: tuple[ModelId, ...] = ()
    history: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, an explicit list of keys: what is stored once is read for ever."""
        return {
            "format": RECORD_FORMAT,
            "version": RECORD_VERSION,
            "wsicodec": self.wsicodec,
            "codec": self.codec,
            "quality": self.quality,
            "models": [{"name": m.name, "sha256": m.sha256} for m in self.models],
            "history": list(self.history),
            "levels": list(self.levels),
            "options": dict(self.options),
            "metrics": dict(self.metrics),
        }

    def to_json(self) -> str:
        """ASCII JSON for the tag."""
        return json.dumps(self.as_dict(), ensure_ascii=True, sort_keys=True)


def parse_record(text: str | bytes) -> FileRecord:
    """The record in a tag's value.

    Raises FormatError for anything that is not such a record, UnsupportedError for a later version.
    Unknown keys are ignored: later releases may add some without a new version.
    """
    if len(text) > MAX_RECORD_BYTES:
        raise FormatError(f"wsicodec record of {len(text)} bytes exceeds {MAX_RECORD_BYTES}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"wsicodec record is not JSON: {error}") from None
    if not isinstance(value, dict) or value.get("format") != RECORD_FORMAT:
        raise FormatError("tag does not hold a wsicodec record")
    if value.get("version") != RECORD_VERSION:
        raise UnsupportedError(
            f"wsicodec record has version {value.get('version')!r}; this wsicodec reads version "
            f"{RECORD_VERSION}: upgrade it"
        )
    try:
        return FileRecord(
            wsicodec=_string(value["wsicodec"]),
            codec=_string(value["codec"]),
            quality=None if value["quality"] is None else int(value["quality"]),
            models=tuple(
                ModelId(_string(model["name"]), _string(model["sha256"]))
                for model in _sequence(value["models"])
            ),
            history=tuple(_string(step) for step in _sequence(value["history"])),
            levels=tuple(_string(level) for level in _sequence(value["levels"])),
            options=dict(value["options"]),
            metrics=dict(value["metrics"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"wsicodec record is incomplete: {error!r}") from None


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _sequence(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value
