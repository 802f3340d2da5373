"""How far a batch is, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsicodec.convert.batch.rows import DONE, FAILED, RUNNING, WAITING, Row


@dataclass(frozen=True)
class BatchProgress:
    """How far a batch is. row: a slide that was just settled, if any, or failed and waits again.

    done, failed, slides: numbers of slides. running: of each under way, its name and share done.
    bytes_in, bytes_out: of the slides that are done.
    """

    slides: int
    done: int
    failed: int
    running: Mapping[str, float]
    bytes_in: int
    bytes_out: int
    pixels_per_second: float
    row: Row | None


Progress = Callable[[BatchProgress], None]


@dataclass(frozen=True)
class BatchReport:
    """What a journal says of slides. converted: by this very run. unreadable: folders."""

    source: Path | None
    output: Path
    journal: Path
    rows: tuple[Row, ...]
    unreadable: tuple[str, ...]
    converted: int
    seconds: float

    def count(self, state: str) -> int:
        """Slides in this state."""
        return sum(row.state == state for row in self.rows)

    @property
    def ok(self) -> bool:
        """True when every slide is done, and every folder was read."""
        return not self.unreadable and all(row.state == DONE for row in self.rows)

    @property
    def bytes_in(self) -> int:
        """Of the slides that are done."""
        return sum(row.bytes_in or 0 for row in self.rows if row.state == DONE)

    @property
    def bytes_out(self) -> int:
        """Of the slides that are done."""
        return sum(row.bytes_out or 0 for row in self.rows if row.state == DONE)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "source": None if self.source is None else str(self.source),
            "output": str(self.output),
            "journal": str(self.journal),
            "slides": [row.as_dict() for row in self.rows],
            "counts": {state: self.count(state) for state in (DONE, FAILED, RUNNING, WAITING)},
            "converted": self.converted,
            "unreadable": list(self.unreadable),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "ratio": self.bytes_out / self.bytes_in if self.bytes_in else None,
            "seconds": self.seconds,
        }
