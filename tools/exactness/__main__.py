"""What is exact on this machine: ``python -m tools.exactness [--json OUT] [--check] [--write]``.

Prints the bound of every layer of the shipped models, then runs the conformance vectors and the
walks by every execution that this machine has and compares SHA-256 with those on record. Another
machine, runtime or backend agrees when ``--check`` exits with 0. docs/exactness.md explains it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

from tools.exactness.bounds import LayerBound, layer_bounds
from tools.exactness.comparing import (
    RECORD,
    Comparison,
    compare_document,
    compare_vectors,
    compare_walks,
    figures,
    recorded,
    shipped,
    vector_names,
)
from wsicodec.entropy.simd import cpu_flags

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "numba", "llvmlite", "onnx")
TELLING_FLAGS = ("sse4_2", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni")


def machine() -> dict[str, Any]:
    """What the comparison ran on."""
    from numba.core import config

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        found = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
        name = next(found, name)
    return {
        "cpu": name,
        "architecture": platform.machine(),
        "flags": [f for f in TELLING_FLAGS if f in cpu_flags()],
        "numba": [config.CPU_NAME, config.CPU_FEATURES],
        "versions": versions,
    }


def rows_of(layers: list[LayerBound]) -> list[str]:
    """A table in Markdown, the layers of a graph in one row."""
    rows = [
        "| graph | layers: largest sum | share of the limit | 3 × 3 by Winograd |",
        "|---|---|---|---|",
    ]
    for graph in dict.fromkeys(layer.graph for layer in layers):
        mine = [layer for layer in layers if layer.graph == graph]
        sums = " · ".join(
            f"**{layer.bound:,}**" if layer.kernel > 1 else f"{layer.bound:,}" for layer in mine
        )
        share = max(layer.bound / layer.limit for layer in mine)
        wide = [layer for layer in mine if layer.winograd is not None]
        quarters = " · ".join(
            f"{layer.winograd:,}{'' if layer.winograd_exact else ', beyond'}" for layer in wide
        )
        rows.append(f"| `{graph}` | {sums} | {100 * share:.1f} % | {quarters or 'none'} |")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.exactness", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures and hashes")
    parser.add_argument("--check", action="store_true", help="exit with 1 where anything differs")
    parser.add_argument(
        "--write", action="store_true",
        help=f"make {RECORD.name} anew for the shipped models, by int64 and the second decoder, "
        "and compare nothing: for a new model, never to make a check pass",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    files = shipped()
    for name, file in files.items():
        print(f"{name}: largest sums over all inputs (limit 2^22, chain 2^24)\n")
        print("\n".join(rows_of(layer_bounds(file))) + "\n")
    if arguments.write:
        made = {name: figures(file) for name, file in files.items()}
        RECORD.write_text(json.dumps(made, indent=1) + "\n")
        return 0
    comparison = Comparison()
    names = vector_names()
    compare_vectors(comparison, names)
    compare_vectors(comparison, names, ["float32"], "plain Python")
    compare_document(comparison, names)
    compare_walks(comparison, recorded())
    here = machine()
    print(json.dumps(here))
    for execution, notes in comparison.executions.items():
        ran = sum(note == "ran" for note in notes.values())
        why = sorted({note for note in notes.values() if note != "ran"})
        print(
            f"{execution}: {ran} of {len(notes)} models" + (f" ({'; '.join(why)})" if why else "")
        )
    print(f"{comparison.compared} comparisons, {len(comparison.differences)} differences")
    print("\n".join(comparison.differences))
    if arguments.json:
        report = {"machine": here, **vars(comparison)}
        report["layers"] = {n: [vars(x) for x in layer_bounds(f)] for n, f in files.items()}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(arguments.check and bool(comparison.differences))


if __name__ == "__main__":
    sys.exit(main())
