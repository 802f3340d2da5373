"""``wsicodec verify``."""

from __future__ import annotations

import argparse
import sys

from wsicodec.cli.common import (
    Exit,
    Subparsers,
    add_command,
    add_jobs,
    print_json,
    progress_bar,
    quality_text,
)

_SHOWN = 10  # damaged tiles that people are shown; --json lists more


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "verify",
        run,
        summary="check every tile of a slide file, and compare it with its source",
        example="wsicodec verify slide.ome.tiff --against slide.svs",
    )
    parser.add_argument("file", help="file to check")
    parser.add_argument(
        "--against", metavar="SOURCE", help="slide to compare with: PSNR and SSIM of every tile"
    )
    add_jobs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.convert.verify import verify

    with progress_bar("checking", quiet=arguments.json) as bar:
        report = verify(
            arguments.file,
            arguments.against,
            jobs=arguments.jobs,
            progress=None if bar is None else lambda done, total: bar(done, total, ""),
        )
    if arguments.json:
        print_json(report.as_dict())
        return Exit.OK if report.ok else Exit.UNVERIFIED
    for fault in report.faults:
        print(f"wsicodec: {fault}", file=sys.stderr)
    for failure in report.failures[:_SHOWN]:
        print(f"wsicodec: {failure.error}: {failure.reason}", file=sys.stderr)
    if report.failed > _SHOWN:
        print(f"wsicodec: and {report.failed - _SHOWN} more", file=sys.stderr)
    verdict = "all good" if report.ok else f"{report.failed} of them damaged"
    if report.faults:
        verdict += f", {len(report.faults)} faults beside them"
    print(f"{report.path}: {report.tiles} tiles, {verdict}")
    for level, summary in report.quality.items():
        print(f"  level {level}: {quality_text(summary)}")
    if report.not_compared:
        missing = ", ".join(map(str, report.not_compared))
        print(f"  not compared, the source has no level of this size: {missing}")
    return Exit.OK if report.ok else Exit.UNVERIFIED
