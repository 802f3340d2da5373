"""What the commands share: exit codes, arguments, JSON, tables and progress bars."""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from wsicodec.report.text import size_text

if TYPE_CHECKING:
    from wsicodec.convert import ConvertProgress, ConvertReport
    from wsicodec.metrics import QualitySummary

Subparsers = Any  # argparse keeps the type of add_subparsers' result private


class Exit(enum.IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNVERIFIED = 3
    INTERRUPTED = 130


EXIT_CODES = """\
exit codes:
  0    done
  1    failed; one line on standard error says what and why
  2    wrong arguments
  3    a file does not hold what it promises (verify)
  130  interrupted (143: terminated); no partial output is left
"""


def add_command(
    commands: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    """A subcommand with ``--json`` and a help that ends with an example and the exit codes."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{_indent(example)}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output"
    )
    parser.set_defaults(run=run)
    return parser


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """``--jobs``."""
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="threads that compute (default: WSICODEC_NUM_THREADS, else all cores)",
    )


def add_option(parser: argparse._ActionsContainer) -> None:
    """``--option NAME=VALUE`` of the codec, repeatable."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="setting of the codec, such as subsampling=444 (jpeg) or effort=5 (jpegxl)",
    )


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if name == "subsampling":  # "444" is a name there, not a number
        return name, value
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def levels(text: str) -> str | int:
    """``source`` or a number."""
    return int(text) if text.lstrip("-").isdecimal() else text


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table: the first column left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def quality_text(summary: QualitySummary) -> str:
    """Mean and worst PSNR and SSIM in one line."""
    worst = summary.ssim_worst
    return (
        f"PSNR {summary.psnr_mean:.2f} dB (worst {summary.psnr_worst.as_dict()['psnr']:.2f}), "
        f"SSIM {summary.ssim_mean:.4f} (1st percentile {summary.ssim_p01:.4f}, worst "
        f"{worst.ssim:.4f} at level {worst.level}, y {worst.y}, x {worst.x}), "
        f"{summary.tiles} tiles"
    )


def print_report(report: ConvertReport) -> None:
    """What a conversion did, for people."""
    ratio = report.target_bytes / report.source_bytes
    print(f"{report.target}: {size_text(report.target_bytes)}, {ratio:.1%} of the source")
    if ratio > 1 and report.codec != "copy":
        print("  larger than the source: --codec copy would keep its own tiles")
    for level in report.levels:
        line = f"  level {level.index}: {level.width} x {level.height}, {level.tiles} tiles, "
        line += size_text(level.coded_bytes)
        print(line if level.quality is None else f"{line}; {quality_text(level.quality)}")
    if report.tissue_share is not None:
        print(f"  tissue: {report.tissue_share:.1%} of the slide")
    if report.modes:
        print("  tiles: " + ", ".join(f"{count} {mode}" for mode, count in report.modes.items()))
    floors = [("SSIM", report.floor_ssim), ("PSNR", report.floor_psnr)]
    if asked := [f"{name} {value:g}" for name, value in floors if value is not None]:
        print(f"  below the floor of {' and '.join(asked)}: {report.below_floor} tiles")
    if report.removed:
        print(f"  removed: {', '.join(report.removed)}")
    print(f"  {report.seconds:.1f} s, {report.megapixels_per_second:.1f} Mpx/s")
    if report.associated:
        print(f"  kept beside the pyramid: {', '.join(report.associated)}")
    if report.dropped:
        print(f"  not kept: {', '.join(report.dropped)}")
    for warning in report.warnings:
        print(f"  warning: {warning}")


class Advance(Protocol):
    """Moves a bar. title: what is being done from now on; None for the same as before."""

    def __call__(self, done: int, total: int, note: str, title: str | None = None) -> None: ...


@contextlib.contextmanager
def progress_bar(title: str, *, quiet: bool) -> Iterator[Advance | None]:
    """A bar on standard error, and the function to call with (done, total, note).

    None where standard error is no terminal, or quiet: logs hold no bars.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tiles"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None, note="")

        begun = False

        def advance(done: int, total: int, note: str, title: str | None = None) -> None:
            nonlocal begun
            if not begun:
                # what an earlier run did must not count as this one's speed
                bar.reset(task, completed=done, total=total, note=note)
                begun = True
            # None leaves the description as it is
            bar.update(task, completed=done, total=total, note=note, description=title)

        yield advance


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line on standard error, without the place in the code that gave them."""
    import warnings

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"wsicodec: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def convert_bar(title: str, *, quiet: bool) -> Iterator[Callable[[ConvertProgress], None] | None]:
    """A bar for ``convert(progress=...)`` with the speed and the bytes so far."""
    import time

    started = time.perf_counter()
    with progress_bar(title, quiet=quiet) as advance:
        if advance is None:
            yield None
            return

        def update(progress: ConvertProgress) -> None:
            seconds = max(time.perf_counter() - started, 1e-6)
            speed = (progress.pixels_done - progress.pixels_resumed) / 1e6 / seconds
            note = f"{speed:.1f} Mpx/s, {size_text(progress.bytes_done)}"
            if progress.bytes_saved > 0:
                note += f", {size_text(progress.bytes_saved)} saved"
            title = "assembling" if progress.assembling else None
            advance(progress.tiles_done, progress.tiles, note, title)

        yield update
