"""``wsicodec convert-batch``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from wsicodec.cli.common import Exit, Subparsers, add_command, print_json, print_table
from wsicodec.cli.convert import add_convert_options, settings_of
from wsicodec.printing import printable
from wsicodec.report.text import size_text

if TYPE_CHECKING:
    from wsicodec.convert.batch import BatchProgress, BatchReport
    from wsicodec.convert.batch.rows import Row

_SHOWN_RUNNING = 3  # names beside the bar


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "convert-batch",
        run,
        summary="convert all slides below a folder, and keep a journal of them",
        example=(
            "wsicodec convert-batch slides/ converted/ --jobs 4\n"
            "wsicodec convert-batch slides/ converted/ --summary\n"
            "wsicodec convert-batch /data/slides /data/converted --scheduler tcp://head:8786\n"
            "wsicodec convert-batch slides/ shared/ --deidentify --journal private.sqlite"
        ),
    )
    parser.add_argument("folder", help="folder of slides; folders below it are searched too")
    parser.add_argument("output", help="folder to write to; it gets the same folders below it")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="slides at once, each in a process of its own with its share of the cores "
        "(default: 1; with --scheduler as many as the cluster has threads)",
    )
    parser.add_argument(
        "--pattern",
        action="append",
        default=[],
        metavar="GLOB",
        help="only files whose name or path below the folder is like this, such as '*.svs'; may be "
        "given again. Without one, every file that opens as a slide, and every file that is named "
        "like one: if it cannot be read, it counts as failed",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="further attempts for a slide that fails; a later run tries it again (default: 2)",
    )
    parser.add_argument(
        "--suffix",
        default=".ome.tiff",
        help="of the outputs, in place of the sources' (default: .ome.tiff; .ome.zarr is the "
        "other). Where two slides "
        "would meet in one name, they keep their own suffix before it",
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="SQLite file with a row for each slide (default: wsicodec-batch.sqlite in OUTPUT). It "
        "holds the names of the sources: with --deidentify, keep it elsewhere",
    )
    parser.add_argument(
        "--sha256",
        action="store_true",
        help="tell a changed source by its content, not by size and time; reads all of it",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="convert on a Dask cluster, tcp://host:port; its workers need wsicodec, and both "
        'folders under the same path (pip install "wsicodec[dask]")',
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace outputs that are there already, and convert again what is done with other "
        "options; without it, only outputs that the journal knows are replaced, where the source "
        "has changed",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--summary", action="store_true", help="print what the journal says; convert nothing"
    )
    what.add_argument(
        "--dry-run", action="store_true", help="list what would be done; write nothing"
    )
    add_convert_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.convert.batch import BatchSettings, convert_batch, preview, summary

    if arguments.summary:
        report = summary(arguments.output, arguments.journal)
        _print(report, json=arguments.json)
        return Exit.OK
    settings = BatchSettings(
        convert=settings_of(arguments, overwrite=arguments.overwrite),
        jobs=arguments.jobs,
        retries=arguments.retries,
        patterns=tuple(arguments.pattern),
        suffix=arguments.suffix,
        sha256=arguments.sha256,
        journal=arguments.journal,
        scheduler=arguments.scheduler,
    )
    if arguments.dry_run:
        report = preview(arguments.folder, arguments.output, settings)
        if arguments.json:
            print_json(report.as_dict())
        else:
            _print_plan(report)
        return Exit.OK
    with _watching(quiet=arguments.json) as progress:
        report = convert_batch(arguments.folder, arguments.output, settings, progress)
    _print(report, json=arguments.json)
    return Exit.OK if report.ok else Exit.FAILED


def _print_plan(report: BatchReport) -> None:
    for row in report.rows:
        print(f"{row.state:8}{_shown(row.source)} -> {_shown(row.target)}")
    for folder in report.unreadable:
        print(f"wsicodec: cannot be read: {_shown(folder)}", file=sys.stderr)
    print(f"{len(report.rows)} slides, {report.count('done')} of them done")


def _print(report: BatchReport, *, json: bool) -> None:
    if json:
        print_json(report.as_dict())
        return
    print_table(
        ("slide", "state", "tries", "in", "out", "ratio", "SSIM", "worst", "PSNR", "seconds"),
        [_cells(row) for row in report.rows],
    )
    counts = [
        f"{report.count(state)} {state}"
        for state in ("done", "failed", "running", "waiting")
        if report.count(state) or state == "done"
    ]
    total = f"{len(report.rows)} slides: {', '.join(counts)}"
    if report.bytes_in:
        total += f"; {size_text(report.bytes_in)} became {size_text(report.bytes_out)} "
        total += f"({report.bytes_out / report.bytes_in:.1%})"
    print(total)
    print(f"journal: {report.journal}")
    for row in report.rows:
        if row.state == "failed":
            print(f"wsicodec: {_failure(row)}", file=sys.stderr)
    for folder in report.unreadable:
        print(f"wsicodec: cannot be read: {_shown(folder)}", file=sys.stderr)


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        _shown(row.source),
        row.state,
        str(row.attempts),
        size_text(row.bytes_in or row.file_bytes),
        "-" if row.bytes_out is None else size_text(row.bytes_out),
        number(row.ratio, ".1%"),
        number(row.ssim_mean, ".4f"),
        number(row.ssim_worst, ".4f"),
        number(row.psnr_mean, ".2f"),
        number(row.seconds, ".1f"),
    )


def _shown(text: str) -> str:
    """As one line, whole, that tells apart whatever the file system does."""
    return printable(text, None, escape=True)


def _failure(row: Row) -> str:
    return f"{_shown(row.source)}: {row.error}: {_shown(row.message or '')}"


@contextlib.contextmanager
def _watching(*, quiet: bool) -> Iterator[Callable[[BatchProgress], None] | None]:
    """A bar on a terminal, a line for each slide in a log."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield lambda now: print(line, file=sys.stderr) if (line := _line(now)) else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("converting"),
        BarColumn(),
        TextColumn("{task.fields[settled]}/{task.fields[slides]} slides"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None, settled=0, slides="?", note="")

        def update(now: BatchProgress) -> None:
            if line := _line(now):
                bar.console.print(line, markup=False, highlight=False)
            settled = now.done + now.failed
            bar.update(
                task,
                total=now.slides,
                completed=settled + sum(now.running.values()),
                settled=settled,
                slides=now.slides,
                note=_note(now),
            )

        yield update


def _note(now: BatchProgress) -> str:
    parts = [f"{now.pixels_per_second / 1e6:.1f} Mpx/s"]
    if now.bytes_in:
        parts.append(f"{size_text(max(0, now.bytes_in - now.bytes_out))} saved")
    if now.failed:
        parts.append(f"{now.failed} failed")
    names = [
        f"{_shown(name.rpartition('/')[2])} {share:.0%}" for name, share in now.running.items()
    ]
    if len(names) > _SHOWN_RUNNING:
        names[_SHOWN_RUNNING:] = [f"and {len(names) - _SHOWN_RUNNING} more"]
    return ", ".join(parts + names)


def _line(now: BatchProgress) -> str | None:
    """What became of a slide, for a log; None where nothing did."""
    row = now.row
    if row is None:
        return None
    head = f"[{now.done + now.failed}/{now.slides}] "
    if row.state == "failed":
        return f"{head}failed: {_failure(row)}"
    if row.state == "waiting":
        return f"{head}will be tried again: {_failure(row)}"
    if row.bytes_in is None or row.bytes_out is None or row.seconds is None:
        return None
    sizes = f"{size_text(row.bytes_in)} -> {size_text(row.bytes_out)}"
    return f"{head}{_shown(row.source)}: {sizes}, {row.seconds:.1f} s"
