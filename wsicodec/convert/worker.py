"""A process that codes blocks of a slide for its parent: ``python -m wsicodec.convert.worker``.

Reads messages from standard input and answers on standard output until the input ends, as it does
when the parent dies, however that comes about.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import IO, Any

from wsicodec.convert.coders import answers, coder_of, receive, send
from wsicodec.errors import WsicodecError
from wsicodec.models.store import take_over
from wsicodec.slide.opening import open_slide


def main() -> int:
    """Serve until the parent has no more blocks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # what a library prints must not get between the messages
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    source = sys.stdin.buffer
    try:
        first = receive(source)
        while first is not None and "model" in first[0]:
            take_over([(first[0]["model"], first[1])])
            first = receive(source)
        if first is None:
            return 0
        message, mask = first
        settings = message["settings"]
        strict = not settings["accept_damage"]
        with open_slide(message["path"], settings["cache_bytes"], strict=strict) as slide:
            coder = coder_of(message, mask, slide)
            for answer, data in answers(coder, _messages(source)):
                send(output, answer, data)
    except WsicodecError as error:
        if receive(source) is not None:
            send(output, {"error": type(error).__name__, "reason": str(error)}, b"")
        return 1
    except BrokenPipeError:
        return 1
    return 0


def _messages(source: IO[bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    while (message := receive(source)) is not None:
        yield message


if __name__ == "__main__":
    sys.exit(main())
