"""Many slides: finds them, hands them to worker processes, and keeps a journal of what became of
each. Whatever happens to a slide, a worker, or the batch itself, a second run goes on from there.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import wsicodec
from wsicodec.convert.batch.finding import Findings, find_slides
from wsicodec.convert.batch.jobs import (
    Advanced,
    Event,
    Failed,
    Job,
    Started,
    Succeeded,
    remove_traces,
    sha256_of,
)
from wsicodec.convert.batch.journal import Journal
from wsicodec.convert.batch.naming import name_targets
from wsicodec.convert.batch.process import BEAT
from wsicodec.convert.batch.results import BatchProgress, BatchReport, Progress
from wsicodec.convert.batch.rows import LOST, Listed, Row
from wsicodec.convert.batch.settings import BatchSettings, packed
from wsicodec.convert.batch.workers import LocalWorkers, Workers
from wsicodec.errors import SlideError
from wsicodec.settings import thread_budget

TICK = 1.0
"""Seconds between two looks at the journal for what others have left over."""


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
    apart = os.path.realpath(target) != os.path.realpath(source)
    findings = find_slides(
        source,
        settings.patterns,
        skip=(target,) if apart else (),
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
        from wsicodec.convert.batch.cluster import DaskWorkers

        return DaskWorkers(settings.scheduler, settings.jobs)
    jobs = settings.jobs or 1
    return LocalWorkers(jobs, max(1, thread_budget() // jobs))


@dataclass
class _Underway:
    """A slide that is being converted. pixels_done, pixels: coded and in all, 0 until known.

    begun: how often, in this attempt: a cluster begins again where a worker was lost.
    """

    row: Row
    begun: int = 0
    pixels_done: int = 0
    pixels: int = 0

    @property
    def bytes_ahead(self) -> int:
        """Of the source, those whose tiles are still to be written."""
        done = self.pixels_done / self.pixels if self.pixels else 0.0
        return round(self.row.file_bytes * (1 - min(1.0, done)))


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
        self._convert = packed(dataclasses.replace(settings.pinned(), jobs=None))
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
                if workers.free() > 0:
                    self._journal.recover(self._settings.retries)
                if not self._underway and not self._journal.unsettled():
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
            reserved = sum(other.bytes_ahead for other in self._underway.values())
            self._underway[row.id] = _Underway(row)
            workers.submit(
                Job(
                    row.id,
                    os.path.abspath(self._source / row.source),  # noqa: PTH100 - keeps links
                    os.path.abspath(self._output / row.target),  # noqa: PTH100
                    self._convert,
                    replace_ours=row.replace_ours,
                    digest=self._settings.sha256,
                    reserved=reserved,
                )
            )

    def _take(self, workers: Workers, event: Event) -> None:
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
        underway.begun += 1
        if underway.begun == 1:
            self._journal.assign(underway.row.id, worker)
            return False
        underway.pixels_done = 0
        return self._journal.restarted(underway.row.id, worker) > 1 + self._settings.retries

    def _settle(self, identity: int, outcome: Succeeded | Failed) -> None:
        underway = self._underway.pop(identity)
        if isinstance(outcome, Succeeded):
            if self._journal.finish(identity, outcome.result):
                self.converted += 1
        else:
            row = self._journal.row(identity)
            again = not outcome.final and row.tries <= self._settings.retries
            # the output of a worker that was lost may be what stands in the way of its successor
            lost = outcome.lost or underway.begun > 1
            ours = self._journal.fail(
                identity, outcome.error, outcome.message, again=again, lost=lost
            )
            # hours of finished blocks are not given up for a disk that is full now
            if ours and not again and not outcome.no_room:
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
