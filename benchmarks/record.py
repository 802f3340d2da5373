"""What every benchmark keeps beside its figures: machine, versions, command; and the file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    usable = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "usable_cores": len(usable(0)) if usable else os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that took part, and of the libraries in imagecodecs."""
    import imagecodecs

    import wsicodec

    found = {"python": platform.python_version(), "wsicodec": wsicodec.__version__}
    for package in ("numpy", "scipy", "scikit-image", "tifffile", "imagecodecs"):
        found[package] = importlib.metadata.version(package)
    for package in ("numba", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for codec in ("jpeg8", "jpeg2k", "jpegxl", "avif", "webp"):
        found[f"imagecodecs.{codec}"] = getattr(imagecodecs, f"{codec}_version")()
    return found


def write(report: dict[str, Any], file: Path, words: Sequence[str]) -> None:
    """The report as JSON, complete or not at all, with the words of the command that made it."""
    # reports are passed on: no absolute paths of the machine that made them
    report["command"] = [Path(w).name if Path(w).is_absolute() else str(w) for w in words]
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(report, indent=1, allow_nan=False))
    part.replace(file)
