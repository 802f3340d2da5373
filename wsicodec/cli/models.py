"""``wsicodec models``."""

from __future__ import annotations

import argparse

from wsicodec.cli.common import Exit, Subparsers, add_command, print_json, print_table


def add(commands: Subparsers) -> None:
    """Declare the command and its actions."""
    parser = commands.add_parser("models", help="show the models that are installed")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    add_command(
        actions,
        "list",
        run,
        summary="list the installed models with digest, cost and licence",
        example="wsicodec models list",
    )
    install = add_command(
        actions,
        "install",
        run_install,
        summary="trust a decoder model: a .wscm file, or the one that a slide carries",
        example="wsicodec models install slide.ome.tiff",
    )
    install.add_argument("file", help="model file, or a slide written with --embed-model")


def run_install(arguments: argparse.Namespace) -> int:
    """Run ``models install``."""
    from pathlib import Path

    from wsicodec.errors import ModelError, SlideError
    from wsicodec.models import install_model
    from wsicodec.models.container import MAGIC, MAX_BYTES

    path = Path(arguments.file)
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
            data = head + file.read(MAX_BYTES) if head == MAGIC else None
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}") from None
    if data is None:
        from wsicodec.slide.reader import SlideReader

        with SlideReader(path) as slide:
            data = slide.embedded_model()
        if data is None:
            raise ModelError(f"{path}: carries no model")
    record = install_model(data)
    if arguments.json:
        print_json({"name": record.name, "digest": record.digest, "path": str(record.path)})
    else:
        print(f"{record.name} {record.digest} is installed: {record.path}")
    return Exit.OK


def run(arguments: argparse.Namespace) -> int:
    """Run ``models list``."""
    from wsicodec.models import models

    found = models()
    if arguments.json:
        print_json(
            {
                "models": [
                    {
                        "name": record.name,
                        "digest": record.digest,
                        "kmac_per_pixel": record.kmac_per_pixel,
                        "licence": record.licence,
                        "path": str(record.path),
                        "card": None if record.card_path is None else str(record.card_path),
                    }
                    for record in found
                ]
            }
        )
        return Exit.OK
    if not found:
        print("no models are installed")
        return Exit.OK
    print_table(
        ("name", "kMAC/px", "licence", "SHA-256", "card"),
        [
            (
                record.name,
                f"{record.kmac_per_pixel:.2f}",
                record.licence,
                record.digest,
                "-" if record.card_path is None else str(record.card_path),
            )
            for record in found
        ],
    )
    return Exit.OK
