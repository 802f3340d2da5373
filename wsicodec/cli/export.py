"""``wsicodec export``."""

from __future__ import annotations

import argparse

from wsicodec.cli.common import (
    Exit,
    Subparsers,
    add_command,
    add_jobs,
    add_option,
    convert_bar,
    levels,
    print_json,
    print_report,
)


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "export",
        run,
        summary="decode a slide back to what every reader knows, JPEG in a TIFF pyramid",
        example=(
            "wsicodec export slide.ome.tiff for-qupath.ome.tiff\n"
            "wsicodec export slide.ome.tiff for-openslide.tif --layout flat"
        ),
    )
    parser.add_argument("input", help="slide of any format that convert reads or writes")
    parser.add_argument("output", help="TIFF to write; it appears when it is complete")
    parser.add_argument(
        "--codec",
        choices=("jpeg", "jpeg2000", "jpegxl", "webp", "lossless"),
        default="jpeg",
        help="default: jpeg",
    )
    parser.add_argument(
        "--quality", type=int, default=90, metavar="N", help="1 ... 100 (default: 90)"
    )
    add_option(parser)
    parser.add_argument(
        "--layout",
        choices=("subifd", "flat"),
        default="subifd",
        help="subifd: OME-TIFF (QuPath, Bio-Formats, tifffile); flat: plain TIFF whose pyramid "
        "OpenSlide and libvips see whole",
    )
    parser.add_argument(
        "--tile-size", type=int, default=256, metavar="N", help="multiple of 16 (default: 256)"
    )
    parser.add_argument(
        "--levels",
        type=levels,
        default="source",
        metavar="source|N",
        help="the input's own levels, or N levels, each half the one before",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_jobs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.convert import ConvertSettings, export

    settings = ConvertSettings(
        codec=arguments.codec,
        quality=arguments.quality,
        options=dict(arguments.option),
        tile_size=arguments.tile_size,
        levels=arguments.levels,
        overwrite=arguments.overwrite,
        layout=arguments.layout,
        measure="none",
        jobs=arguments.jobs,
    )
    with convert_bar("exporting", quiet=arguments.json) as bar:
        report = export(arguments.input, arguments.output, settings, bar)
    if arguments.json:
        print_json(report.as_dict())
    else:
        print_report(report)
    return Exit.OK
