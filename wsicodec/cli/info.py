"""``wsicodec info``."""

from __future__ import annotations

import argparse

from wsicodec.cli.common import Exit, Subparsers, add_command, print_json, size_text


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "info",
        run,
        summary="show what a slide file says of itself; decodes no pixel",
        example="wsicodec info slide.ome.tiff",
    )
    parser.add_argument("file", help="SVS, OME-TIFF or TIFF")


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.codec import TARGETS
    from wsicodec.slide.reader import SlideReader

    with SlideReader(arguments.file) as slide:
        info = slide.info
        model = slide.embedded_model()
    if arguments.json:
        print_json(
            {**info.as_dict(), "embedded_model_bytes": None if model is None else len(model)}
        )
        return Exit.OK

    def known(value: float | None, unit: str) -> str:
        return "not stated" if value is None else f"{value:g}{unit}"

    print(f"{info.path}: {info.format}, {size_text(info.file_bytes)}, {info.compression} tiles")
    for level in info.levels:
        print(
            f"  level {level.index}: {level.width} x {level.height} px, downsample "
            f"{level.downsample:.4g}, tiles {level.tile_width} x {level.tile_height}"
        )
    print(f"  resolution: {known(info.mpp_x, '')} x {known(info.mpp_y, '')} µm per pixel")
    print(f"  magnification: {known(info.magnification, 'x')}")
    profile = "none" if info.icc_profile is None else f"{len(info.icc_profile)} bytes"
    print(f"  ICC profile: {profile}")
    print(f"  lossy history: {', '.join(info.history) or 'none known'}")
    print(f"  other images: {', '.join(info.associated) or 'none'}")
    if info.record is not None:
        record = info.record
        targets = [f"{n} {record.options[n]}" for n in TARGETS if n in record.options]
        quality = targets[0] if targets else "without loss"
        if record.quality is not None:
            quality = f"quality {record.quality}"
        print(f"  coded by wsicodec {record.wsicodec}: {record.codec}, {quality}")
        for identity in record.models:
            print(f"  model: {identity.name}, SHA-256 {identity.sha256}")
        carried = "no" if model is None else size_text(len(model))
        print(f"  model carried in the file: {carried}")
    return Exit.OK
