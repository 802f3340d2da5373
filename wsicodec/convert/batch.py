"""Many slides: finds them, hands them to worker processes, and keeps a journal of what became of
each. Whatever happens to a slide, a worker, or the batch itself, a second run goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wsicodec
from wsicodec.convert.batch_workers import (
    Advanced,
    Failed,
    Job,
    LocalWorkers,
    Started,
    Succeeded,
    Workers,
    packed,
    remove_traces,
    sha256_of,
)
from wsicodec.convert.find import Findings, find_slides, name_targets
from wsicodec.convert.journal import (
    BEAT,
    DONE,
    FAILED,
    LOST,
    RUNNING,
    WAITING,
    Journal,
    Listed,
    Row,
)
from wsicodec.convert.plan import ConvertSettings
from wsicodec.errors import SettingsError, SlideError
from wsicodec.settings import MAX_THREADS, thread_budget

JOURNAL_NAME = "wsicodec-batch.sqlite"
TICK = 1.0
"""Seconds between two looks at the journal for what others have left over."""
MAX_RETRIES = 100
_WITHOUT_EFFECT = frozenset({"overwrite", "resume", "jobs", "in_process", "cache_bytes"})
"""Settings that do not show in the output's bytes."""


@dataclass(frozen=True)
class BatchSettings:
    """How to convert many slides. Checked when built; raises SettingsError.

    convert: for each slide; its ``overwrite`` also allows slides that are done with other settings
    to be done again, and its ``jobs`` is set by the batch. jobs: slides at once, each in a process
    of its own with its share of the thread budget; None for one, or with a scheduler for as many as
    the cluster has threads. retries: further attempts, within a run, for a slide that fails.
    patterns: as in ``find.find_slides``. suffix: of the outputs. sha256: tell changed sources by
    their content instead of their time, which reads every byte. journal: default
    ``wsicodec-batch.sqlite`` in the output folder; it holds the sources' names. scheduler: address
    of a Dask cluster to convert on.
    """

    convert: ConvertSettings = field(default_factory=ConvertSettings)
    jobs: int | None = None
    retries: int = 2
    patterns: tuple[str, ...] = ()
    suffix: str = ".ome.tiff"
    sha256: bool = False
    journal: Path | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and not 1 <= self.jobs <= MAX_THREADS:
            raise SettingsError(f"jobs {self.jobs} is not within 1 ... {MAX_THREADS}")
        if not 0 <= self.retries <= MAX_RETRIES:
            raise SettingsError(f"retries {self.retries} is not within 0 ... {MAX_RETRIES}")
        if not self.suffix.startswith(".") or not self.suffix.strip(".") or "/" in self.suffix:
            raise SettingsError(f"suffix {self.suffix!r} must be like '.ome.tiff'")

    def journal_in(self, output: Path) -> Path:
        """Where the journal of this output folder is."""
        return output / JOURNAL_NAME if self.journal is None else self.journal

    def digest(self) -> str:
        """Hash of all that decides an output's bytes, the model's digest among it."""
        return hashlib.sha256(self.as_json().encode()).hexdigest()

    def as_json(self) -> str:
        """What ``digest`` is of."""
        values = {k: v for k, v in packed(self.pinned()).items() if k not in _WITHOUT_EFFECT}
        return json.dumps(values, sort_keys=True, default=str)

    def pinned(self) -> ConvertSettings:
        """``convert`` with the model by its digest: no worker may know another one by that name.

        Raises UnknownModelError.
        """
        if self.convert.codec != "learned" or self.convert.lossless:
            return self.convert
        from wsicodec.models import find_model

        return dataclasses.replace(self.convert, model=find_model(self.convert.model).digest)


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


def convert_batch(
    folder: str | Path,
    output: str | Path,
    settings: BatchSettings | None = None,
    progress: Progress | None = None,
) -> BatchReport:
    """Convert the slides in and below a folder, keeping the folders between.

    progress: called in the calling thread. Slides that the journal has as done are left alone; a
    slide that fails does not stop the others. Several batches may work on one journal. Whoever is
    interrupted leaves no partial output, and the next run takes its slides up.

    Raises SlideError (folders or journal that cannot be used), FormatError and UnsupportedError (a
    file that is no journal, or a later one), SettingsError, RuntimeMissingError (no Dask).
    """
    started = time.perf_counter()
    chosen = settings or BatchSettings()
    source, target = Path(folder), Path(output)
    digest, as_json = chosen.digest(), chosen.as_json()
    path = chosen.journal_in(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SlideError(f"{target}: cannot be made: {error.strerror or error}") from error
    if not source.is_dir():
        raise SlideError(f"{source}: is no folder that can be read")
    with Journal.open(path) as journal:
        findings, listed = _list(source, target, chosen, journal)
        journal.begin(
            os.path.realpath(source),
            listed,
            digest,
            as_json,
            wsicodec.__version__,
            output=target,
            name_targets=_namer(chosen.suffix),
            overwrite=chosen.convert.overwrite,
        )
        run = _Run(journal, source, target, chosen, digest, progress)
        if journal.unsettled():
            workers = _workers(chosen)
            try:
                run.work(workers)
            finally:
                workers.close()
        return BatchReport(
            source,
            target,
            path,
            tuple(journal.rows(mine=True)),
            findings.unreadable,
            run.converted,
            time.perf_counter() - started,
        )


def preview(
    folder: str | Path, output: str | Path, settings: BatchSettings | None = None
) -> BatchReport:
    """What ``convert_batch`` would find and do; changes nothing. Raises as that does."""
    chosen = settings or BatchSettings()
    source, target = Path(folder), Path(output)
    path = chosen.journal_in(target)
    with Journal.read(path, copy=True) as journal:
        findings, listed = _list(source, target, chosen, journal)
        journal.begin(
            os.path.realpath(source),
            listed,
            chosen.digest(),
            chosen.as_json(),
            wsicodec.__version__,
            output=target,
            name_targets=_namer(chosen.suffix),
            overwrite=chosen.convert.overwrite,
        )
        rows = tuple(journal.rows(mine=True))
    return BatchReport(source, target, path, rows, findings.unreadable, 0, 0.0)


def summary(output: str | Path, journal: Path | None = None) -> BatchReport:
    """What the journal of an output folder says of all its slides; converts nothing.

    Raises SlideError without a journal, else as ``convert_batch``.
    """
    target = Path(output)
    path = BatchSettings(journal=journal).journal_in(target)
    with Journal.read(path) as opened:
        root = opened.root()
        rows = tuple(opened.rows())
    return BatchReport(None if root is None else Path(root), target, path, rows, (), 0, 0.0)


def _list(
    source: Path, target: Path, settings: BatchSettings, journal: Journal
) -> tuple[Findings, list[Listed]]:
    known = journal.known()
    # outputs may be among the sources
    inside = os.path.realpath(target) != os.path.realpath(source)
    findings = find_slides(
        source,
        settings.patterns,
        skip=(target,) if inside else (),
        outputs=[target / name for name, _, _ in known.values()],
        known={name: (size, modified) for name, (_, size, modified) in known.items()},
    )
    return findings, [
        Listed(
            found.source,
            found.file_bytes,
            found.file_mtime_ms,
            sha256_of(source / found.source) if settings.sha256 else None,
        )
        for found in findings.slides
    ]


def _namer(suffix: str) -> Callable[[Sequence[str], Mapping[str, str]], Mapping[str, str]]:
    return lambda sources, taken: name_targets(sources, taken, suffix)


def _workers(settings: BatchSettings) -> Workers:
    if settings.scheduler is not None:
        from wsicodec.convert.cluster import DaskWorkers

        return DaskWorkers(settings.scheduler, settings.jobs)
    jobs = settings.jobs or 1
    return LocalWorkers(jobs, max(1, thread_budget() // jobs))


@dataclass
class _Underway:
    """A slide that is being converted. pixels_done, pixels: coded and in all, 0 until known."""

    row: Row
    begun: bool = False
    pixels_done: int = 0
    pixels: int = 0


class _Run:
    """The loop of a batch: claims slides, hands them out, writes down what comes back."""

    def __init__(
        self,
        journal: Journal,
        source: Path,
        output: Path,
        settings: BatchSettings,
        digest: str,
        progress: Progress | None,
    ) -> None:
        self._journal = journal
        self._source = source
        self._output = output
        self._settings = settings
        self._digest = digest
        self._progress = progress
        self._underway: dict[int, _Underway] = {}
        self._beaten = self._looked = self._started = time.monotonic()
        self._pixels = 0
        self.converted = 0

    def work(self, workers: Workers) -> None:
        """Until every slide is done or failed, whoever did it."""
        idle = False
        while True:
            now = time.monotonic()
            if now - self._beaten >= BEAT:
                self._journal.beat()
                self._beaten = now
            if not idle or now - self._looked >= TICK:
                self._looked = now
                self._hand_out(workers)
                if not self._underway:
                    self._journal.recover(self._settings.retries)
                    if not self._journal.unsettled():
                        return
            events = workers.events(TICK)
            idle = not any(isinstance(event, Succeeded | Failed) for event in events)
            for event in events:
                self._take(workers, event)

    def _hand_out(self, workers: Workers) -> None:
        while workers.free() > 0:
            row = self._journal.claim(self._digest, wsicodec.__version__, self._output)
            if row is None:
                return
            reserved = sum(other.row.file_bytes for other in self._underway.values())
            self._underway[row.id] = _Underway(row)
            workers.submit(
                Job(
                    row.id,
                    os.path.abspath(self._source / row.source),  # noqa: PTH100 - keeps links
                    os.path.abspath(self._output / row.target),  # noqa: PTH100
                    packed(dataclasses.replace(self._settings.pinned(), jobs=None)),
                    replace_ours=row.replace_ours,
                    digest=self._settings.sha256,
                    reserved=reserved,
                )
            )

    def _take(self, workers: Workers, event: Started | Advanced | Succeeded | Failed) -> None:
        underway = self._underway.get(event.id)
        if underway is None:
            return
        if isinstance(event, Started):
            if self._restarted(underway, event.worker):
                message = f"{underway.row.source}: the workers that converted it died, every time"
                workers.abandon(event.id)
                self._settle(event.id, Failed(event.id, LOST, message, final=True, lost=True))
        elif isinstance(event, Advanced):
            self._pixels += max(0, event.pixels_done - underway.pixels_done)
            underway.pixels_done, underway.pixels = event.pixels_done, event.pixels
            self._tell(None)
        else:
            self._settle(event.id, event)

    def _restarted(self, underway: _Underway, worker: str) -> bool:
        """Write down who converts; True when the slide has begun too often."""
        if not underway.begun:
            underway.begun = True
            self._journal.assign(underway.row.id, worker)
            return False
        underway.pixels_done = 0
        return self._journal.restarted(underway.row.id, worker) > 1 + self._settings.retries

    def _settle(self, identity: int, outcome: Succeeded | Failed) -> None:
        del self._underway[identity]
        if isinstance(outcome, Succeeded):
            if self._journal.finish(identity, outcome.result):
                self.converted += 1
        else:
            row = self._journal.row(identity)
            again = not outcome.final and row.tries <= self._settings.retries
            ours = self._journal.fail(
                identity, outcome.error, outcome.message, again=again, lost=outcome.lost
            )
            if ours and not again:
                remove_traces(self._output / row.target)
        self._tell(self._journal.row(identity))

    def _tell(self, row: Row | None) -> None:
        if self._progress is None:
            return
        totals = self._journal.totals()
        self._progress(
            BatchProgress(
                totals.slides,
                totals.done,
                totals.failed,
                {
                    item.row.source: item.pixels_done / item.pixels if item.pixels else 0.0
                    for item in self._underway.values()
                },
                totals.bytes_in,
                totals.bytes_out,
                self._pixels / max(1e-6, time.monotonic() - self._started),
                row,
            )
        )
