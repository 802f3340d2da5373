"""``wsicodec restore``."""

from __future__ import annotations

import argparse

from wsicodec.choices import LAYOUTS
from wsicodec.cli.common import (
    Exit,
    Subparsers,
    add_command,
    add_jobs,
    convert_bar,
    print_json,
    print_report,
)


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "restore",
        run,
        summary="give back the JPEG tiles of a file made with --lossless-transcode, bit by bit",
        example="wsicodec restore slide.ome.tiff slide-jpeg.ome.tiff",
    )
    parser.add_argument("input", help="file made with convert --codec jpegxl --lossless-transcode")
    parser.add_argument("output", help="TIFF to write; it appears when every tile was checked")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="subifd: OME-TIFF (QuPath, Bio-Formats, tifffile); flat: plain TIFF whose pyramid "
        "OpenSlide and libvips see whole",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_jobs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.convert.restore import restore

    with convert_bar("restoring", quiet=arguments.json) as bar:
        report = restore(
            arguments.input,
            arguments.output,
            layout=arguments.layout,
            overwrite=arguments.overwrite,
            jobs=arguments.jobs,
            progress=bar,
        )
    if arguments.json:
        print_json(report.as_dict())
    else:
        print_report(report)
    return Exit.OK
