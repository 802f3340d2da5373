"""By what images are summarised: source history, domain, set and stain."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

Groups = dict[str, dict[str, list[str]]]
"""{kind: {name of the group: images}}; an image may be in no group of a kind."""

KINDS = ("history", "domain", "set", "stain")
HISTORIES = ("none", "JPEG", "JPEG-2000")
UNKNOWN = "unknown"
IN_DOMAIN, OUT_OF_DOMAIN = "H&E", "out of domain"
"""Models are trained on H&E; every other stain is out of their domain."""


def read_manifest(folder: Path) -> dict[str, dict[str, str]]:
    """{file name: {"history": ..., "stain": ...}} of manifest.csv in the folder or above it."""
    for place in (folder, folder.resolve().parent):
        file = place / "manifest.csv"
        if not file.is_file():
            continue
        with file.open(newline="", encoding="utf-8") as f:
            return {
                Path(row["path"]).name: {
                    "history": history(row.get("jpeg_history_quality_or_none") or ""),
                    "stain": row.get("stain") or UNKNOWN,
                }
                for row in csv.DictReader(f)
                if row.get("path")
            }
    return {}


def history(text: str) -> str:
    """One of HISTORIES for what a manifest notes of a source; "unknown" where it says neither."""
    lower = text.lower()
    if not lower or lower.startswith("none"):
        return "none"
    if "2000" in lower or "j2k" in lower or "jp2" in lower:
        return "JPEG-2000"
    lossy = "jpeg" in lower.replace("jpeg-ls", "") or re.match(r"q\d", lower)
    return "JPEG" if lossy else UNKNOWN


def set_name(image: str) -> str:
    """What a file's name says of its origin: all before the last underscore."""
    stem = Path(image).stem
    return stem.rpartition("_")[0] or stem


def group(images: Sequence[str], manifest: Mapping[str, Mapping[str, str]]) -> Groups:
    """Groups of each kind, named in order; history, stain and domain where the manifest tells."""
    found: Groups = {kind: {} for kind in KINDS}
    for image in images:
        names = {"set": set_name(image)}
        entry = manifest.get(Path(image).name)
        if entry is not None:
            names |= {"history": entry["history"], "stain": entry["stain"]}
            if entry["stain"] != UNKNOWN:
                names["domain"] = IN_DOMAIN if "H&E" in entry["stain"] else OUT_OF_DOMAIN
        for kind, name in names.items():
            found[kind].setdefault(name, []).append(image)
    return {kind: dict(sorted(members.items())) for kind, members in found.items()}
