"""``wsicodec report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from wsicodec.cli.common import (
    Exit,
    Subparsers,
    add_command,
    add_jobs,
    print_json,
    progress_bar,
)
from wsicodec.errors import SettingsError, SlideError
from wsicodec.report.text import size_text


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "report",
        run,
        summary="draw a slide file's quality as one self-contained HTML page",
        example="wsicodec report slide.ome.tiff --html report.html --against slide.svs",
    )
    parser.add_argument("file", help="slide file, best one with a quality passport")
    parser.add_argument("--html", required=True, metavar="OUT", help="page to write")
    parser.add_argument(
        "--against", metavar="SOURCE", help="show the worst tiles beside this slide's pixels"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="decode every tile and compare it with SOURCE, instead of believing the file",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    add_jobs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.report.findings import collect
    from wsicodec.report.page import draw
    from wsicodec.slide.placing import atomic_file

    target = Path(arguments.html)
    _check_target(target, [arguments.file, arguments.against], arguments.overwrite)
    with progress_bar("measuring", quiet=arguments.json) as bar:
        findings = collect(
            arguments.file,
            arguments.against,
            measure_anew=arguments.measure,
            jobs=arguments.jobs,
            progress=None if bar is None else lambda done, total: bar(done, total, ""),
        )
    page = draw(findings).encode()
    with atomic_file(target, overwrite=arguments.overwrite) as file:
        file.write(page)
    if arguments.json:
        print_json({"html": str(target), "html_bytes": len(page), **findings.as_dict()})
        return Exit.OK
    print(f"{target}: {size_text(len(page))}")
    if findings.problem is not None:
        print(f"  {findings.problem}")
    return Exit.OK


def _check_target(target: Path, inputs: list[str | None], overwrite: bool) -> None:
    """Refuse before the work what could not be written after it."""
    if target.is_dir():
        raise SettingsError(f"{target}: is a folder; name the file to write")
    if not target.parent.is_dir():
        raise SlideError(f"{target}: there is no folder {target.parent}")
    for name in inputs:
        if name is None or not (target.exists() and Path(name).exists()):
            continue
        if target.samefile(name):
            raise SettingsError(f"{target}: would replace the slide itself")
    if target.exists() and not overwrite:
        raise SlideError(f"{target}: exists; --overwrite replaces it")
