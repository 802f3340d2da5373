"""The ``wsicodec`` command: one module per subcommand, imported light, working when run."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from wsicodec import __version__
from wsicodec.cli import (
    convert,
    convert_batch,
    demo,
    doctor,
    export,
    info,
    models,
    report,
    restore,
    verify,
)
from wsicodec.cli.common import EXIT_CODES, Exit, print_json
from wsicodec.errors import SettingsError, VerifyError, WsicodecError

_COMMANDS = (
    convert,
    convert_batch,
    info,
    verify,
    report,
    export,
    restore,
    models,
    doctor,
    demo,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code (see ``cli.common.Exit``)."""
    arguments = _parser().parse_args(argv)
    # tifffile logs what it finds odd; what matters becomes the one line of an error of ours
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    try:
        with _clean_termination():
            code: int = arguments.run(arguments)
    except SettingsError as error:
        return _fail(arguments, error, Exit.USAGE)
    except VerifyError as error:
        return _fail(arguments, error, Exit.UNVERIFIED)
    except WsicodecError as error:
        return _fail(arguments, error, Exit.FAILED)
    except KeyboardInterrupt:
        left = "nothing half-written is left"
        if getattr(arguments, "resume", False):
            left = "finished blocks are kept: the same command goes on with them"
        print(f"wsicodec: interrupted; {left}", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # whoever read the output has gone; keep the interpreter from complaining at its end
        sys.stdout = None
        return Exit.FAILED
    return code


def _fail(arguments: argparse.Namespace, error: WsicodecError, code: Exit) -> int:
    kind = type(error).__name__
    print(f"wsicodec: {kind}: {error}", file=sys.stderr)
    if arguments.json:
        print_json({"error": {"type": kind, "message": str(error)}})
    return code


@contextlib.contextmanager
def _clean_termination() -> Iterator[None]:
    """A killed conversion cleans up after itself as an interrupted one does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsicodec",
        description="Learned image compression for pathology slides inside ordinary files.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"wsicodec {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add(commands)
    return parser
