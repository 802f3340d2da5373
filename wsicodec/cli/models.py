"""``wsicodec models``."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from wsicodec.cli.common import Exit, Subparsers, add_command, print_json, print_table

_SHOWN = 4  # digests of a stranger's record in a message


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
    from wsicodec.errors import SlideError, WsicodecError
    from wsicodec.models import install_model

    path = Path(arguments.file)
    data = _model_of(path)
    try:
        record = install_model(data)
    except WsicodecError as error:
        raise type(error)(f"{path}: {error}") from None
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        raise SlideError(f"{path}: its model cannot be installed: {reason}") from None
    if arguments.json:
        print_json({"name": record.name, "digest": record.digest, "path": str(record.path)})
    else:
        print(f"{record.name} {record.digest} is installed: {record.path}")
    return Exit.OK


def _model_of(path: Path) -> bytes:
    """Bytes of a model file, or of the model that a slide carries."""
    from wsicodec.errors import ModelError
    from wsicodec.models.container import MAGIC, MAX_BYTES
    from wsicodec.slide.opening import open_slide
    from wsicodec.slide.pages import file_start, usable

    with usable(path):
        # a folder may be a slide in OME-Zarr
        if not path.is_dir() and file_start(path, len(MAGIC)) == MAGIC:
            with path.open("rb") as file:
                return file.read(MAX_BYTES + 1)
    with open_slide(path) as slide:
        data, record = slide.embedded_model(), slide.info.record
    if data is None:
        raise ModelError(f"{path}: carries no model")
    digest = hashlib.sha256(data).hexdigest()
    named = [] if record is None else [model.sha256 for model in record.models]
    if digest not in named:
        shown = ", ".join(f"{text!r:.70}" for text in named[:_SHOWN]) or "none"
        raise ModelError(
            f"{path}: carries the model {digest}, but its record names {shown}: it was changed "
            "after it was written"
        )
    return data


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
