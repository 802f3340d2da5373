"""``wsicodec convert``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wsicodec.choices import (
    CONVERT_CODECS,
    GLASS_MODES,
    LAYOUTS,
    MACROS,
    MEASURES,
    TISSUE_METHODS,
)
from wsicodec.cli.common import (
    Exit,
    Subparsers,
    add_command,
    add_jobs,
    add_option,
    convert_bar,
    levels,
    plain_warnings,
    print_json,
    print_report,
)
from wsicodec.errors import SettingsError

if TYPE_CHECKING:
    from wsicodec.convert import ConvertSettings

PRESET_NAMES = ("preview", "diagnostic", "archive")


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "convert",
        run,
        summary="convert a slide to a pyramidal OME-TIFF or OME-Zarr",
        example=(
            "wsicodec convert slide.svs slide.ome.tiff\n"
            "wsicodec convert slide.svs slide.ome.tiff --glass drop --floor-ssim 0.95\n"
            "wsicodec convert slide.ndpi slide.ome.zarr --preset archive --levels 6\n"
            "wsicodec convert slide.svs copy.ome.tiff --codec copy --deidentify"
        ),
    )
    parser.add_argument("input", help="slide of any format that wsicodec reads; 8-bit RGB")
    parser.add_argument(
        "output", help="OME-TIFF, or OME-Zarr when it ends in .zarr; it appears when it is complete"
    )
    add_convert_options(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where an earlier run with the same options was stopped or killed, and keep "
        "what is finished when this one is; --codec copy and --lossless-transcode begin anew",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_jobs(parser)


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what comes out of a conversion, one slide's or many slides'."""
    coding = parser.add_argument_group("coding")
    coding.add_argument(
        "--codec", choices=CONVERT_CODECS, default="learned", help="default: learned"
    )
    coding.add_argument("--model", help="for learned (default: he-fast)")
    quality = coding.add_mutually_exclusive_group()
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
    coding.add_argument(
        "--floor-ssim",
        type=float,
        metavar="X",
        help="code tiles whose SSIM is below X again, better, until they reach it",
    )
    coding.add_argument(
        "--floor-psnr", type=float, metavar="DB", help="the same by PSNR in dB; both may be given"
    )
    coding.add_argument(
        "--effort",
        type=int,
        metavar="N",
        help="1 (fast) ... 9 (fewest bytes at equal quality) for learned; jpegxl has 1 ... 10",
    )
    coding.add_argument(
        "--lossless-transcode",
        action="store_true",
        help="jpegxl: pack JPEG tiles so that `wsicodec restore` gives the same bytes back",
    )
    add_option(coding)
    coding.add_argument(
        "--measure",
        nargs="?",
        const="all",
        choices=MEASURES,
        help="decode tiles and record PSNR and SSIM: of all (default), 64 of each level, or none",
    )
    coding.add_argument(
        "--accept-damage",
        action="store_true",
        help="code JPEG tiles of the source as they decode even where their bytes are damaged; "
        "without it they end the conversion",
    )
    glass = parser.add_argument_group("glass")
    glass.add_argument(
        "--glass",
        choices=GLASS_MODES,
        default="keep",
        help="keep codes glass like all else (default); fill gives it the slide's own background "
        "colour; drop also stores tiles without tissue only once",
    )
    glass.add_argument(
        "--tissue",
        choices=TISSUE_METHODS,
        help="how tissue is told from glass (default: network)",
    )
    layout = parser.add_argument_group("file")
    layout.add_argument(
        "--tile-size", type=int, default=256, metavar="N", help="multiple of 16 (default: 256)"
    )
    layout.add_argument(
        "--levels",
        type=levels,
        default="source",
        metavar="source|N",
        help="code the source's own levels, or make N levels, each half the one before",
    )
    layout.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="subifd: OME-TIFF; flat: one directory a level, for readers that see only level 0 of "
        "an OME-TIFF",
    )
    layout.add_argument(
        "--embed-model",
        action=argparse.BooleanOptionalAction,
        help="carry the model inside the file (default: where it makes up a hundredth at most)",
    )
    layout.add_argument(
        "--associated",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep label, macro and thumbnail (default)",
    )
    layout.add_argument(
        "--deidentify",
        action="store_true",
        help="drop the label and all that names a person, place, time or device",
    )
    layout.add_argument(
        "--macro",
        choices=MACROS,
        help="what --deidentify does to the macro image: leave it out (default), or blank its "
        "label's end",
    )


def settings_of(arguments: argparse.Namespace, **more: object) -> ConvertSettings:
    """Settings by the options of ``add_convert_options``; more: others, by name."""
    from wsicodec.codec import DEFAULT_MODEL, DEFAULT_QUALITY, TARGETS
    from wsicodec.convert import PRESETS, ConvertSettings

    if arguments.model is not None and arguments.codec != "learned":
        raise SettingsError(f"--model goes with --codec learned, not {arguments.codec}")
    if arguments.codec == "lossless" and (arguments.quality or arguments.preset):
        raise SettingsError("--codec lossless keeps every pixel: it takes no quality and no preset")
    _check_kept_streams(arguments)
    if arguments.macro is not None and not arguments.deidentify:
        raise SettingsError("--macro says what --deidentify does: it needs --deidentify")
    quality = DEFAULT_QUALITY if arguments.quality is None else arguments.quality
    options = dict(arguments.option)
    for name in ("effort", *TARGETS):
        if (value := getattr(arguments, name)) is not None:
            options[name] = value
    return ConvertSettings(
        codec=arguments.codec,
        model=arguments.model or DEFAULT_MODEL,
        quality=PRESETS[arguments.preset] if arguments.preset else quality,
        options=options,
        tile_size=arguments.tile_size,
        levels=arguments.levels,
        glass=arguments.glass,
        tissue=arguments.tissue or TISSUE_METHODS[0],
        floor_ssim=arguments.floor_ssim,
        floor_psnr=arguments.floor_psnr,
        measure=arguments.measure or "all",
        lossless_transcode=arguments.lossless_transcode,
        associated=arguments.associated,
        deidentify=arguments.deidentify,
        macro=arguments.macro or MACROS[0],
        accept_damage=arguments.accept_damage,
        embed_model=arguments.embed_model,
        layout=arguments.layout,
        **more,  # type: ignore[arg-type]
    )


def _check_kept_streams(arguments: argparse.Namespace) -> None:
    """Raise SettingsError for options that say how to code where nothing is coded."""
    if arguments.codec == "copy":
        what = "--codec copy"
    elif arguments.lossless_transcode:
        what = "--lossless-transcode"
    else:
        return
    names = ("quality", "preset", "measure", "embed_model")
    given = [name for name in names if getattr(arguments, name, None) not in (None, False)]
    if given:
        idle = " and ".join("--" + name.replace("_", "-") for name in given)
        raise SettingsError(f"{what} keeps what is coded: {idle} would have no effect")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.convert import convert

    settings = settings_of(
        arguments,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        jobs=arguments.jobs,
    )
    with plain_warnings(), convert_bar("converting", quiet=arguments.json) as bar:
        report = convert(arguments.input, arguments.output, settings, bar)
    if arguments.json:
        print_json(report.as_dict())
    else:
        print_report(report)
    return Exit.OK
