"""What a converted file says of itself in private TIFF tags.

``TAG_RECORD`` (ASCII) holds JSON: codec, quality, the full SHA-256 of each model, package version,
settings, metric arguments, source, lossy history of the pixels, and a summary of their fidelity
level by level (``slide.passport`` keeps it tile by tile). ``TAG_MODEL`` (UNDEFINED) may hold the
bytes of the model itself, so that a file outlives the model collection of the package.
Both sit in the IFD of level 0. The numbers are private (32768 and above), used by no registry that
tifffile, libtiff or exiftool know; they are literals of the file format and never change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

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
class SourceIdentity:
    """The file that was converted. sha256: of all its bytes, hex. bytes: its size.

    Of a slide that is several files, ``sha256`` is of the one by which it is opened, which may hold
    none of the pixels; ``bytes`` are those of all.

    format, compression: as in ``SlideInfo``. No name and no path: these tell of patients.
    """

    sha256: str
    bytes: int
    format: str
    compression: str


@dataclass(frozen=True)
class GlassRecord:
    """What became of glass. mode: ``keep``, ``fill`` or ``drop``; method: that found the tissue.

    background: RGB that glass was filled with. tissue_share: of the area of level 0, 0 ... 1.
    """

    mode: str
    method: str
    background: tuple[int, int, int]
    tissue_share: float


@dataclass(frozen=True)
class FloorRecord:
    """What every tile has to reach; None where nothing was asked. psnr: dB."""

    ssim: float | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class LevelQuality:
    """Fidelity of the measured tiles of a level to the pixels they were coded from.

    tiles: of the level; measured: of them; below_floor: measured ones that miss the floor.
    *_worst_at: (row, column) in the grid of tiles.
    """

    tiles: int
    measured: int
    below_floor: int
    psnr_mean: float
    psnr_p01: float
    psnr_worst: float
    psnr_worst_at: tuple[int, int]
    ssim_mean: float
    ssim_p01: float
    ssim_worst: float
    ssim_worst_at: tuple[int, int]


@dataclass(frozen=True)
class FileRecord:
    """How the tiles of a file were coded.

    codec: as in ``convert --codec``. quality: 1 ... 100, None for lossless and where ``options``
    holds a target that tiles reach.
    history: lossy codings that the pixels went through, oldest first, this one last.
    levels: per level FROM_SOURCE or AREA_AVERAGE: where its pixels came from.
    metrics: arguments of the fidelity figures that belong to this file.
    settings: of the conversion, as JSON knows them (tile_size, layout, preset ...).
    source: None where it is not known or was removed with all that identifies.
    level_bytes: per level, bytes of its tiles as stored. level_quality: per level, None where no
    tile was measured. fallbacks: tiles, of all levels, that a mode other than the codec's holds.
    Files written before these existed have the defaults.
    """

    wsicodec: str
    codec: str
    quality: int | None
    models: tuple[ModelId, ...] = ()
    history: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: SourceIdentity | None = None
    deidentified: bool = False
    glass: GlassRecord | None = None
    floor: FloorRecord | None = None
    level_bytes: tuple[int, ...] = ()
    level_quality: tuple[LevelQuality | None, ...] = ()
    fallbacks: Mapping[str, int] = field(default_factory=dict)

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
            "settings": dict(self.settings),
            "source": None if self.source is None else _source_dict(self.source),
            "deidentified": self.deidentified,
            "glass": None if self.glass is None else _glass_dict(self.glass),
            "floor": None
            if self.floor is None
            else {"ssim": self.floor.ssim, "psnr": self.floor.psnr},
            "level_bytes": list(self.level_bytes),
            "level_quality": [
                None if level is None else _quality_dict(level) for level in self.level_quality
            ],
            "fallbacks": dict(self.fallbacks),
        }

    def to_json(self) -> str:
        """ASCII JSON for the tag. ValueError for NaN or infinities, which JSON does not have."""
        return json.dumps(self.as_dict(), ensure_ascii=True, sort_keys=True, allow_nan=False)


def parse_record(text: str | bytes) -> FileRecord:
    """The record in a tag's value.

    Raises FormatError for anything that is not such a record, UnsupportedError for a later version.
    Unknown keys are ignored: later releases may add some without a new version; what earlier ones
    did not write may be missing.
    """
    if len(text) > MAX_RECORD_BYTES:
        raise FormatError(f"wsicodec record of {len(text)} bytes exceeds {MAX_RECORD_BYTES}")
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_no_constant)
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
            quality=_optional(_integer, value["quality"]),
            models=tuple(
                ModelId(_string(model["name"]), _string(model["sha256"]))
                for model in _sequence(value["models"])
            ),
            history=tuple(_string(step) for step in _sequence(value["history"])),
            levels=tuple(_string(level) for level in _sequence(value["levels"])),
            options=_mapping(value["options"]),
            metrics=_mapping(value["metrics"]),
            settings=_mapping(value.get("settings", {})),
            source=_optional(_parse_source, value.get("source")),
            deidentified=value.get("deidentified", False) is True,
            glass=_optional(_parse_glass, value.get("glass")),
            floor=_optional(_parse_floor, value.get("floor")),
            level_bytes=tuple(_integer(n) for n in _sequence(value.get("level_bytes", []))),
            level_quality=tuple(
                _optional(_parse_quality, level)
                for level in _sequence(value.get("level_quality", []))
            ),
            fallbacks={
                mode: _integer(count)
                for mode, count in _mapping(value.get("fallbacks", {})).items()
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"wsicodec record is incomplete: {error!r}") from None


def _source_dict(source: SourceIdentity) -> dict[str, Any]:
    return {
        "sha256": source.sha256,
        "bytes": source.bytes,
        "format": source.format,
        "compression": source.compression,
    }


def _parse_source(value: Any) -> SourceIdentity:
    return SourceIdentity(
        sha256=_string(value["sha256"]),
        bytes=_integer(value["bytes"]),
        format=_string(value["format"]),
        compression=_string(value["compression"]),
    )


def _glass_dict(glass: GlassRecord) -> dict[str, Any]:
    return {
        "mode": glass.mode,
        "method": glass.method,
        "background": list(glass.background),
        "tissue_share": glass.tissue_share,
    }


def _parse_glass(value: Any) -> GlassRecord:
    red, green, blue = (_integer(sample) for sample in _sequence(value["background"]))
    if not 0 <= min(red, green, blue) <= max(red, green, blue) <= 255:
        raise ValueError(f"background {value['background']!r} is no colour")
    return GlassRecord(
        mode=_string(value["mode"]),
        method=_string(value["method"]),
        background=(red, green, blue),
        tissue_share=_number(value["tissue_share"]),
    )


def _parse_floor(value: Any) -> FloorRecord:
    return FloorRecord(_optional(_number, value["ssim"]), _optional(_number, value["psnr"]))


def _quality_dict(level: LevelQuality) -> dict[str, Any]:
    return {
        "tiles": level.tiles,
        "measured": level.measured,
        "below_floor": level.below_floor,
        "psnr_mean": level.psnr_mean,
        "psnr_p01": level.psnr_p01,
        "psnr_worst": level.psnr_worst,
        "psnr_worst_at": list(level.psnr_worst_at),
        "ssim_mean": level.ssim_mean,
        "ssim_p01": level.ssim_p01,
        "ssim_worst": level.ssim_worst,
        "ssim_worst_at": list(level.ssim_worst_at),
    }


def _parse_quality(value: Any) -> LevelQuality:
    return LevelQuality(
        tiles=_integer(value["tiles"]),
        measured=_integer(value["measured"]),
        below_floor=_integer(value["below_floor"]),
        psnr_mean=_number(value["psnr_mean"]),
        psnr_p01=_number(value["psnr_p01"]),
        psnr_worst=_number(value["psnr_worst"]),
        psnr_worst_at=_place(value["psnr_worst_at"]),
        ssim_mean=_number(value["ssim_mean"]),
        ssim_p01=_number(value["ssim_p01"]),
        ssim_worst=_number(value["ssim_worst"]),
        ssim_worst_at=_place(value["ssim_worst_at"]),
    )


def _place(value: object) -> tuple[int, int]:
    row, column = (_integer(number) for number in _sequence(value))
    return row, column


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond any number")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_T = TypeVar("_T")


def _optional(parse: Callable[[Any], _T], value: object) -> _T | None:
    return None if value is None else parse(value)


def _integer(value: object) -> int:
    """A JSON integer; records of other writers may hold whole numbers as 70.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise TypeError(f"{value!r:.40} is not a whole number of 64 bits")
    return value


def _number(value: object) -> float:
    if isinstance(value, float):
        return value
    return float(_integer(value))


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _sequence(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value
