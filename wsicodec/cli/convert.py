"""``wsicodec convert``."""

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

CODEC_NAMES = ("learned", "jpeg", "jpeg2000", "jpegxl", "webp", "lossless", "copy")
PRESET_NAMES = ("preview", "diagnostic", "archive")


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "convert",
        run,
        summary="convert a slide to a pyramidal OME-TIFF",
        example=(
            "wsicodec convert slide.svs slide.ome.tiff\n"
            "wsicodec convert slide.svs slide.ome.tiff --preset archive --levels 6 --measure"
        ),
    )
    parser.add_argument("input", help="SVS, OME-TIFF, or tiled or stripped TIFF; 8-bit RGB")
    parser.add_argument("output", help="OME-TIFF to write; it appears when it is complete")
    parser.add_argument("--codec", choices=CODEC_NAMES, default="learned", help="default: learned")
    parser.add_argument("--model", default="he-fast", help="for learned (default: he-fast)")
    quality = parser.add_mutually_exclusive_group()
    quality.add_argument(
        "--quality", type=int, metavar="N", help="1 ... 100, the same scale for all (default: 70)"
    )
    quality.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        help="a quality by its use: mean SSIM about 0.90, 0.95 and above 0.99 on tissue",
    )
    quality.add_argument(
        "--target-ssim",
        type=float,
        metavar="X",
        help="learned: the coarsest of few trials whose SSIM is at least X, for every tile",
    )
    quality.add_argument(
        "--target-psnr", type=float, metavar="DB", help="learned: the same by PSNR in dB"
    )
    parser.add_argument(
        "--effort",
        type=int,
        metavar="N",
        help="1 (fast) ... 9 (fewest bytes at equal quality) for learned; jpegxl has 1 ... 10",
    )
    add_option(parser)
    parser.add_argument(
        "--tile-size", type=int, default=256, metavar="N", help="multiple of 16 (default: 256)"
    )
    parser.add_argument(
        "--levels",
        type=levels,
        default="source",
        metavar="source|N",
        help="code the source's own levels, or make N levels, each half the one before",
    )
    parser.add_argument(
        "--measure",
        nargs="?",
        choices=("none", "sample", "all"),
        const="all",
        default="none",
        help="decode tiles and report PSNR and SSIM: all of them, or a sample of 64 per level",
    )
    parser.add_argument(
        "--embed-model", action="store_true", help="carry the model inside the file (a few MB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_jobs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.codec import DEFAULT_QUALITY, TARGETS
    from wsicodec.convert import PRESETS, ConvertSettings, convert

    quality = DEFAULT_QUALITY if arguments.quality is None else arguments.quality
    options = dict(arguments.option)
    for name in ("effort", *TARGETS):
        if (value := getattr(arguments, name)) is not None:
            options[name] = value
    settings = ConvertSettings(
        codec=arguments.codec,
        model=arguments.model,
        quality=PRESETS[arguments.preset] if arguments.preset else quality,
        options=options,
        tile_size=arguments.tile_size,
        levels=arguments.levels,
        measure=arguments.measure,
        embed_model=arguments.embed_model,
        overwrite=arguments.overwrite,
        jobs=arguments.jobs,
    )
    with convert_bar("converting", quiet=arguments.json) as bar:
        report = convert(arguments.input, arguments.output, settings, bar)
    if arguments.json:
        print_json(report.as_dict())
    else:
        print_report(report)
    return Exit.OK
