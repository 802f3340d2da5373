"""What a conversion says of itself: progress while it runs, a report at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsicodec.metrics import METRIC_ARGUMENTS, QualitySummary
from wsicodec.slide.record import ModelId


@dataclass(frozen=True)
class ConvertProgress:
    """How far a conversion is.

    level: of the latest block. tiles_done, tiles: of all levels. pixels_done: coded. bytes_done: of
    coded tiles. bytes_saved: against the source's bytes for as many pixels. pixels_resumed: of
    those done, the ones that an earlier run did. assembling: all tiles are coded, and being put
    together into the target, which takes a while for a large slide.
    """

    level: int
    tiles_done: int
    tiles: int
    pixels_done: int
    pixels: int
    bytes_done: int
    bytes_saved: int
    pixels_resumed: int = 0
    assembling: bool = False


Progress = Callable[[ConvertProgress], None]


@dataclass(frozen=True)
class LevelReport:
    """One level that was written. coded_bytes: of its tiles. quality: of the measured tiles."""

    index: int
    height: int
    width: int
    tiles: int
    coded_bytes: int
    quality: QualitySummary | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "index": self.index,
            "height": self.height,
            "width": self.width,
            "tiles": self.tiles,
            "coded_bytes": self.coded_bytes,
            "quality": None if self.quality is None else self.quality.as_dict(),
        }


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    seconds: wall time. pixels: of all levels. quality: over the measured tiles of all levels.
    associated, dropped: images of the source that the output holds and does not hold.
    modes: tiles of all levels by the way they are coded. tissue_share: of the area, None where
    glass was not looked for. below_floor: measured tiles that miss the floor (always 0 where one
    was asked for). resumed: tiles taken over from an earlier run. removed: by de-identification,
    kinds of what went. warnings: what may have gone wrong.
    """

    source: Path
    target: Path
    codec: str
    model: ModelId | None
    quality_setting: int | None
    source_bytes: int
    target_bytes: int
    levels: tuple[LevelReport, ...]
    quality: QualitySummary | None
    seconds: float
    pixels: int
    associated: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    modes: Mapping[str, int] = field(default_factory=dict)
    tissue_share: float | None = None
    floor_ssim: float | None = None
    floor_psnr: float | None = None
    below_floor: int = 0
    resumed: int = 0
    removed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def megapixels_per_second(self) -> float:
        """Pixels of all levels by wall time."""
        return self.pixels / 1e6 / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "source": str(self.source),
            "target": str(self.target),
            "codec": self.codec,
            "model": None
            if self.model is None
            else {"name": self.model.name, "sha256": self.model.sha256},
            "quality_setting": self.quality_setting,
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
            "levels": [level.as_dict() for level in self.levels],
            "quality": None if self.quality is None else self.quality.as_dict(),
            "metrics": METRIC_ARGUMENTS,
            "seconds": self.seconds,
            "pixels": self.pixels,
            "megapixels_per_second": self.megapixels_per_second,
            "associated": list(self.associated),
            "dropped": list(self.dropped),
            "modes": dict(self.modes),
            "tissue_share": self.tissue_share,
            "floor": {"ssim": self.floor_ssim, "psnr": self.floor_psnr},
            "below_floor": self.below_floor,
            "resumed": self.resumed,
            "removed": list(self.removed),
            "warnings": list(self.warnings),
        }
