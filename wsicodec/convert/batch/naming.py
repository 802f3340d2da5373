"""What the outputs of slides are called."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from wsicodec.convert.batch.finding import SLIDE_SUFFIXES
from wsicodec.errors import SlideError

MAX_NAME_BYTES = 200
"""Longer output names are cut: file systems take 255 bytes, and a partial file has more to say."""


def name_targets(sources: Sequence[str], taken: Mapping[str, str], suffix: str) -> dict[str, str]:
    """Output path below the output folder, by source.

    taken: outputs that sources have already, which they keep. Others get the source's name with its
    suffix replaced, ``a/b.svs`` becoming ``a/b.ome.tiff``; where two sources would meet in one name
    (as file systems compare them that ignore case), all of them keep their own suffix before it,
    and get a digest of their path where even that is not enough. None is called as a folder that
    other outputs lie in. The order of the sources makes no difference.
    """
    targets = {source: taken[source] for source in sources if source in taken}
    used = {_folded(target) for target in taken.values()}
    # outputs lie in the folders of their sources
    used |= {
        _folded(str(folder))
        for source in (*sources, *taken)
        for folder in PurePosixPath(source).parents
    }
    left = [source for source in sources if source not in targets]
    for name in (_short_name, _long_name, _digest_name):
        proposed = {source: _cut(name(source), source, suffix) for source in left}
        count = Counter(_folded(target) for target in proposed.values())
        free = {
            source: target
            for source, target in proposed.items()
            if count[_folded(target)] == 1 and _folded(target) not in used
        }
        targets |= free
        used |= {_folded(target) for target in free.values()}
        left = [source for source in left if source not in free]
    if left:
        raise SlideError(f"{left[0]}: no output name is free")
    return targets


def _short_name(source: str) -> str:
    lower = source.lower()
    for suffix in SLIDE_SUFFIXES:
        if lower.endswith(suffix) and not lower.endswith("/" + suffix) and lower != suffix:
            return source[: -len(suffix)]
    return source


def _long_name(source: str) -> str:
    return source


def _digest_name(source: str) -> str:
    return f"{source}.{_digest(source)}"


def _digest(source: str) -> str:
    return hashlib.sha256(os.fsencode(source)).hexdigest()[:12]


def _cut(path: str, source: str, suffix: str) -> str:
    folder, slash, name = path.rpartition("/")
    if len(os.fsencode(name + suffix)) > MAX_NAME_BYTES:
        keep = MAX_NAME_BYTES - len(os.fsencode(suffix)) - 14
        while len(os.fsencode(name)) > keep:
            name = name[:-1]
        name = f"{name}.{_digest(source)}"
    return folder + slash + name + suffix


def _folded(target: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", target).casefold())
