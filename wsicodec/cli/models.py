"""``wsicodec models``."""

from __future__ import annotations

import argparse

from wsicodec.cli.common import Exit, Subparsers, add_command, print_json, print_table


def add(commands: Subparsers) -> None:
    """Declare the command and its one action."""
    parser = commands.add_parser("models", help="show the models that are installed")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    add_command(
        actions,
        "list",
        run,
        summary="list the installed models with digest, cost and licence",
        example="wsicodec models list",
    )


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
