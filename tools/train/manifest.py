"""What ``manifest.csv`` says of training images: which to pack first, and which were JPEG."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

NAME = "manifest.csv"
HISTORY = "jpeg_history_quality_or_none"

Row = dict[str, str]


def parse(text: str) -> list[Row]:
    """The rows; none of a file that does not name images by ``path``."""
    reader = csv.DictReader(io.StringIO(text))
    return [r for r in reader if r["path"]] if "path" in (reader.fieldnames or ()) else []


def stem(row: Row) -> str:
    return Path(row["path"]).stem


def by_priority(rows: list[Row]) -> list[Row]:
    """Training images with a rank, best first: any prefix is the most diverse of its size."""
    ranked = [r for r in rows if r["split"] == "train" and r["priority"]]
    return sorted(ranked, key=lambda r: int(r["priority"]))


def has_jpeg_past(row: Row) -> bool:
    """Whether pixels show the grid of JPEG blocks: files of a JPEG quality, or with a grid that
    was found, unless they were averaged since."""
    history = row.get(HISTORY) or ""
    return bool(re.match(r"q\d|jpeg-grid", history)) and "downsampled" not in history


def jpeg_stems(text: str) -> frozenset[str]:
    """File names without suffix, as a pack changes those, of images with a JPEG past."""
    return frozenset(stem(r) for r in parse(text) if has_jpeg_past(r))
