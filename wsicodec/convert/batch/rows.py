"""What a journal keeps of a slide: what is listed, what a conversion gave, and the row of both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wsicodec.convert.batch.process import Process

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
LOST = "WorkerLost"
"""Error type of a slide whose process ended without a word."""


@dataclass(frozen=True)
class Listed:
    """A slide that a run found.

    source: path below the source folder with ``/`` between names. file_bytes, file_mtime_ms: of the
    file. sha256: of its bytes, where the run compares content.
    """

    source: str
    file_bytes: int
    file_mtime_ms: int
    sha256: str | None = None


@dataclass(frozen=True)
class Result:
    """A conversion that succeeded. target_mtime_ms: of the output. report: JSON-ready."""

    bytes_in: int
    bytes_out: int
    target_mtime_ms: int
    seconds: float
    mpp_x: float | None = None
    mpp_y: float | None = None
    sha256: str | None = None
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A slide as the journal has it; None where it has not come to that yet.

    bytes_in, bytes_out: of the whole slide and of its output. tiles_measured and the figures
    behind: quality of the tiles that the conversion compared. seconds: of the conversion. error,
    message: of the last attempt that failed. replace_ours: what is under the target's name is an
    earlier output of this journal, or of an attempt that was cut off.
    """

    id: int
    source: str
    target: str
    state: str
    attempts: int
    tries: int
    worker: str | None
    file_bytes: int
    file_mtime_ms: int
    file_sha256: str | None
    settings: str | None
    wsicodec: str | None
    bytes_in: int | None
    bytes_out: int | None
    target_mtime_ms: int | None
    mpp_x: float | None
    mpp_y: float | None
    tiles_measured: int | None
    psnr_mean: float | None
    psnr_worst: float | None
    ssim_mean: float | None
    ssim_worst: float | None
    seconds: float | None
    error: str | None
    message: str | None
    started: float | None
    finished: float | None
    replace_ours: bool = False

    @property
    def ratio(self) -> float | None:
        """Output's bytes over source's."""
        if self.bytes_in and self.bytes_out is not None and self.state == DONE:
            return self.bytes_out / self.bytes_in
        return None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; names that are no text keep their bytes as lone surrogates."""
        hidden = {"id", "replace_ours", "target_mtime_ms"}
        values = {name: value for name, value in vars(self).items() if name not in hidden}
        owner = None if self.worker is None else Process.parse(self.worker)
        if owner is not None:
            values["worker"] = f"{owner.host.partition(' ')[0]}:{owner.pid}"
        return {**values, "ratio": self.ratio}


@dataclass(frozen=True)
class Totals:
    """Numbers of slides; bytes of those that are done."""

    slides: int
    done: int
    failed: int
    bytes_in: int
    bytes_out: int


COLUMNS = ", ".join(name for name in Row.__dataclass_fields__ if name != "replace_ours")
"""Of the table of slides, as ``row_of`` takes them."""


def row_of(values: Iterable[Any], *, replace_ours: bool = False) -> Row:
    """A row from the values of COLUMNS."""
    named = dict(zip(COLUMNS.split(", "), values, strict=True))
    named["source"], named["target"] = name_of(named["source"]), name_of(named["target"])
    return Row(**named, replace_ours=replace_ours)


def name_of(stored: Any) -> str:
    """A path as the system has it, from its bytes in the journal."""
    return os.fsdecode(stored) if isinstance(stored, bytes) else str(stored)


def stored_name(name: str) -> bytes:
    """The inverse of ``name_of``: names need not be text."""
    return os.fsencode(name)
