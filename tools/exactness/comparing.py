"""What every execution on this machine makes of the vectors and the walks, against the record.

The record is tests/conformance/decode/symbols.json for the vectors and docs/exactness.json for the
shipped models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.exactness.bounds import layer_bounds
from tools.exactness.executions import EXACT, EXECUTIONS, NotHereError, second_decoder
from tools.exactness.reading import CODERS, digest_of, read_symbols
from tools.exactness.walks import WALKS, Walk, Walked, walked, walked_by_the_document
from wsicodec import bitstream
from wsicodec.codec.cell import cells_of, synthesise
from wsicodec.codec.network import decode_tile
from wsicodec.errors import WsicodecError
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.store import models

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "conformance"
RECORD = ROOT / "docs" / "exactness.json"
DOCUMENT = "second decoder"


@dataclass
class Comparison:
    """executions: by name "ran", or by model why not. compared: digests that were. differences: one
    line each."""

    executions: dict[str, dict[str, str]] = field(default_factory=dict)
    vectors: dict[str, dict[str, str]] = field(default_factory=dict)
    walks: dict[str, dict[str, dict[str, dict[str, str]]]] = field(default_factory=dict)
    compared: int = 0
    differences: list[str] = field(default_factory=list)

    def compare(self, what: str, found: object, expected: object) -> None:
        self.compared += 1
        if found != expected:
            self.differences.append(f"{what}: {found}, not {expected}")


def shipped() -> dict[str, bytes]:
    """Files of the models that the package ships, by name."""
    return {r.name: r.path.read_bytes() for r in models() if r.shipped}


def recorded() -> dict[str, Any]:
    """docs/exactness.json: by model its SHA-256, bounds and walks."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def figures(file: bytes) -> dict[str, Any]:
    """What the record keeps of a model, from the second decoder and int64 networks alone."""
    exact = EXECUTIONS[EXACT](file)
    walks = {}
    for walk in WALKS:
        ours, theirs = walked(walk, exact), walked_by_the_document(walk, file)
        difference = first_difference(ours, theirs)
        if difference:
            raise RuntimeError(f"{walk.name}: wsicodec and the second decoder differ: {difference}")
        walks[walk.name] = ours.digests()
    return {
        "sha256": hashlib.sha256(file).hexdigest(),
        "layers": [asdict(layer) for layer in layer_bounds(file)],
        "walks": walks,
    }


def first_difference(found: Walked, expected: Walked) -> str | None:
    """Where two runs of a walk part, or None: of the numbers that both have."""
    for name, array in expected.numbers.items():
        if array.size and not np.array_equal(found.numbers[name], array):
            return name
    for n, (a, b) in enumerate(zip(found.symbols, expected.symbols, strict=True)):
        if not np.array_equal(a, b):
            return f"symbols, array {n}"
    return None if found.tile == expected.tile else "bytes of the tile"


def vector_names() -> list[str]:
    """Learned tiles that every decoder must decode."""
    return list(_expected_symbols())


def vector_models() -> list[bytes]:
    """Files of the models of all vectors."""
    return [p.read_bytes() for p in sorted(VECTORS.glob("*.wscm")) if ".encoder" not in p.name]


def built(name: str, files: dict[str, bytes], comparison: Comparison) -> dict[str, DecoderModel]:
    """The models that an execution has, by name; what it has not is noted."""
    found, notes = {}, {}
    for model, file in files.items():
        try:
            found[model] = EXECUTIONS[name](file)
            notes[model] = "ran"
        except NotHereError as reason:
            notes[model] = str(reason)
        except WsicodecError as error:  # a user of this machine would see it, too
            notes[model] = f"{type(error).__name__}: {error}"
            comparison.compare(f"{model}, {name}", notes[model], "ran")
    comparison.executions.setdefault(name, {}).update(notes)
    return found


def compare_vectors(
    comparison: Comparison,
    names: Iterable[str],
    executions: Iterable[str] = tuple(EXECUTIONS),
    coder: str = "compiled",
) -> None:
    """Symbols of conformance vectors by every execution, read by an entropy decoder of
    ``CODERS``."""
    expected = _expected_symbols()
    tiles = {name: _vector(name) for name in names}
    files = {hashlib.sha256(f).digest()[:4].hex(): f for f in vector_models()}
    for execution in executions:
        label = execution if coder == "compiled" else f"{execution}, {coder} entropy decoder"
        ready = built(execution, files, comparison)
        for name, data in tiles.items():
            tile = bitstream.parse(data)
            assert tile.learned is not None
            model = ready.get(tile.learned.model.hex())
            if model is None:
                continue
            try:
                found = digest_of(read_symbols(tile, model, coder))
            except WsicodecError as error:  # symbols that went astray seldom end well
                found = f"{type(error).__name__}: {error}"
            comparison.vectors.setdefault(name, {})[label] = found
            comparison.compare(f"{name}, {label}", found, expected[name])


def compare_document(comparison: Comparison, names: Iterable[str]) -> None:
    """Symbols of conformance vectors by the second decoder: int64 and plain Python."""
    expected, files = _expected_symbols(), vector_models()
    for name in names:
        cells = second_decoder.decode(_vector(name), files).cells
        found = digest_of([array for cell in cells for array in (cell.z, *cell.levels)])
        comparison.vectors.setdefault(name, {})[DOCUMENT] = found
        comparison.compare(f"{name}, {DOCUMENT}", found, expected[name])


def _vector(name: str) -> bytes:
    return (VECTORS / "decode" / f"{name}.tile").read_bytes()


def _expected_symbols() -> dict[str, str]:
    found: dict[str, str] = json.loads((VECTORS / "decode" / "symbols.json").read_text())
    return found


def compare_walks(
    comparison: Comparison,
    record: dict[str, Any],
    walks: Iterable[Walk] = WALKS,
    executions: Iterable[str] = tuple(EXECUTIONS),
) -> None:
    """Walks of the shipped models by every execution: encoded, then decoded again by both entropy
    decoders and, where the execution is a user's, by the whole decoder."""
    files = shipped()
    for name, file in files.items():
        known = record.get(name, {})
        comparison.compare(
            f"{name}, SHA-256 of the file", hashlib.sha256(file).hexdigest(), known.get("sha256")
        )
    for execution in executions:
        for name, model in built(execution, files, comparison).items():
            for walk in walks:
                label = f"{name}, walk {walk.name}, {execution}"
                run = walked(walk, model)
                found = run.digests()
                comparison.walks.setdefault(name, {}).setdefault(walk.name, {})[execution] = found
                expected = record.get(name, {}).get("walks", {}).get(walk.name)
                comparison.compare(label, found, expected)
                comparison.compared += 1
                comparison.differences += [f"{label}: {x}" for x in wrongly_decoded(run, model)]


def wrongly_decoded(run: Walked, model: DecoderModel) -> Iterator[str]:
    """What decoding a walk's tile gives that its encoding did not."""
    for coder in CODERS:
        try:
            symbols = read_symbols(run.tile, model, coder)
        except WsicodecError as error:
            yield f"{coder} entropy decoder: {type(error).__name__}: {error}"
            continue
        if digest_of(symbols) != digest_of(run.symbols):
            yield f"{coder} entropy decoder reads other symbols"
    pixels = np.empty((run.tile.height, run.tile.width, 3), np.uint8)
    for (top, left, shape), cell in zip(
        cells_of(run.tile.height, run.tile.width), run.latents, strict=True
    ):
        view = pixels[top : top + shape.height, left : left + shape.width]
        synthesise(model, [cell], [view])
    if not np.array_equal(decode_tile(run.tile, model), pixels):
        yield "the whole decoder paints other pixels"
