"""How large and how old an output is, which is a file or a folder of files."""

from __future__ import annotations

from pathlib import Path


def tree_bytes(path: Path) -> int | None:
    """Bytes of a file, or of all files below a folder; None where nothing is."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return None


def tree_mtime_ms(path: Path) -> int | None:
    """When a file was last changed, or any file below a folder; ms since 1970, None for nothing."""
    try:
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        return max((file.stat().st_mtime_ns // 1_000_000 for file in files), default=None)
    except OSError:
        return None
