"""Makes the conformance vectors of format version 1: ``python -m tools.make_conformance``.

Vectors say what every decoder must do for ever, so this refuses to overwrite any file: a vector
that changes is a broken format, never a reason to run this again. To add vectors, add them here and
run it; it writes those that are missing (``--check`` only lists them).

    tests/conformance/tiny.wscm, tiny.encoder.wscm   a small frozen model, of no use for pictures
    tests/conformance/smallest.wscm                  a model with the least of everything
    tests/conformance/lapped.wscm                    a small model of lapped blocks
    tests/conformance/tilted.wscm                    a small model with a tilt
    tests/conformance/decode/NAME.tile, NAME.png     must decode to these pixels, within tolerance
    tests/conformance/decode/{smallest,lapped,tilted}/...  the same, of those models
    tests/conformance/decode/symbols.json            ... and to exactly these symbols
    tests/conformance/encode/NAME.json, {lapped,tilted}/...  must encode to exactly these bytes
    tests/conformance/refuse/NAME.tile, errors.json  must be refused, by these errors
    tests/conformance/refuse/NAME.wscm               models that must be refused

Pictures of random symbols hold some far beyond any picture's: of the pixels of their blocks the
format asks nothing (docs/format.md, "Tolerance").

The tiles are written by a small encoder below, from docs/format.md like the second decoder in
tests/second_decoder.py whose walk through a cell it borrows; wsicodec itself writes none of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.export.builder import FLOAT, INT8, INT16, UINT8, GraphBuilder, grid
from wsicodec.entropy.tables import tables_from_weights
from wsicodec.models import container

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "conformance"

sys.path.insert(0, str(ROOT / "tests"))
import second_decoder as second  # noqa: E402  (tests/ is no package)

Array = np.ndarray[Any, Any]

# ------------------------------------------------------------------------------------ tiny model

STAGES = (  # first channel, channels, lattice; lattices within the context and beyond it
    (0, 4, 1), (0, 4, 2), (0, 4, 3), (4, 8, 0), (12, 6, 1), (12, 6, 2), (12, 6, 3), (18, 6, 0),
)  # fmt: skip
CHANNELS, MEAN_STAGES, CONTEXT, Z, HYPER, MIDDLE = 24, 4, 12, 3, 8, 8
TABLES = 24  # of either quantiser: few, so that many classes have raw bits: up to 13
SEED = 20261121


def cosine_order() -> tuple[Array, Array]:
    """(order (24,), deviation (24,)): low frequencies in the order and with the rough deviations
    of a transform of tissue, so that pictures are recognisable; the highest one of all instead of
    the last."""
    found = []
    for plane, loss in enumerate((1.0, 0.45, 0.25)):
        for u in range(6):
            for w in range(6):
                found.append((1100 * loss / (1 + u + w) ** 1.6, 256 * plane + 16 * u + w))
    found.sort(key=lambda entry: -entry[0])
    best = found[:CHANNELS]
    order = np.array([place for _, place in best[:-1]] + [767])
    return order, np.array([deviation for deviation, _ in best])


COLOURS = np.array([  # not orthogonal, and no two entries alike
    [0.55, 0.80, 0.30],
    [0.60, -0.70, 0.35],
    [0.65, 0.05, -1.10],
])  # fmt: skip


def laplace_weights(symbol_class: int, quantiser: int) -> Array:
    """Of indices -radius ... radius and the escape; the radii of the quantisers differ."""
    scale = 2 ** ((symbol_class - 1) / 8 - 2.75)
    radius = int(np.clip(np.ceil(4 * scale), 1, 64)) + quantiser
    size = np.abs(np.arange(-radius, radius + 1))
    weights = np.exp(-np.maximum(size - quantiser / 2, 0) * np.sqrt(2) / scale)
    return np.append(weights, 2e-3 * weights.sum())


def random_layer(
    rng: np.random.Generator, shape: tuple[int, int, int], peak: int, shift: Array, bias: float = 0
) -> tuple[Array, Array, Array]:
    """Integer weights within +-peak, a bias of ``bias`` output units and the rounding half."""
    outputs, inputs, side = shape
    weight = rng.integers(-peak, peak + 1, (outputs, inputs, side, side))
    half = np.where(shift > 0, 2 ** np.maximum(shift - 1, 0), 0)
    return weight, np.round(bias * 2.0**shift).astype(np.int64) + half, shift


def hyper_graph(rng: np.random.Generator) -> bytes:
    g = GraphBuilder("hyper", "Floor")
    shift = rng.integers(1, 4, 4 * HYPER)
    x = g.integer_conv("z", random_layer(rng, (4 * HYPER, Z, 1), 60, shift, 100), (0, 255))
    x = g.add("DepthToSpace", x, blocksize=2, mode="CRD")
    x = g.add("Concat", x, "plane", axis=1)
    shift = rng.integers(5, 9, HYPER)
    g.integer_conv(x, random_layer(rng, (HYPER, HYPER + 1, 3), 25, shift, 90), (0, 255), output="h")
    # another step at each of the four positions; shifts of 0 and more
    weight = np.zeros((4, Z, 1, 1), np.int64)
    weight[:, 0, 0, 0] = 5, 14, 25, -127
    weight[:, 1, 0, 0] = 0, 1, -2, 40
    shift = np.array([0, 0, 1, 5])
    bias = np.array([0, -3, 1, 16])
    step = g.integer_conv("z", (weight, bias, shift), (-48, 48))
    step = g.add("DepthToSpace", step, blocksize=2, mode="CRD")
    g.add("Cast", step, to=INT8, output="step")
    return g.finish(
        {"z": (FLOAT, grid(Z, "z_rows", "z_columns")), "plane": (FLOAT, grid(1))},
        {"h": (FLOAT, grid(HYPER)), "step": (INT8, grid(1))},
    )


def stage_graph(rng: np.random.Generator, stage: int, deviation: Array) -> bytes:
    """Classes follow deviation and gain, disturbed at random; means are random."""
    first, size, _ = STAGES[stage]
    seen = min(max((a + n for a, n, _ in STAGES[:stage]), default=0), CONTEXT)
    g = GraphBuilder(f"stage{stage}", "Floor")
    inputs = {"h": (FLOAT, grid(HYPER)), "plane": (FLOAT, grid(1))}
    parts = ["h"]
    channels = HYPER + 1
    if stage:
        inputs["context"] = (FLOAT, grid(seen))
        c = g.add("Abs", "context")
        if stage < MEAN_STAGES:  # signed and absolute, 3x3
            c = g.add("Concat", "context", c, axis=1)
            layer = random_layer(rng, (6, 2 * seen, 3), 30, rng.integers(4, 7, 6), 20)
            c = g.integer_conv(c, layer, (0, 255))
        else:  # absolute, 1x1 then 3x3
            layer = random_layer(rng, (6, seen, 1), 60, rng.integers(3, 6, 6), 20)
            c = g.integer_conv(c, layer, (0, 255))
            layer = random_layer(rng, (6, 6, 3), 40, rng.integers(6, 9, 6), 60)
            c = g.integer_conv(c, layer, (0, 255))
        parts.append(c)
        channels += 6
    x = g.add("Concat", *parts, "plane", axis=1)
    shift = rng.integers(6, 9, MIDDLE)
    middle = g.integer_conv(x, random_layer(rng, (MIDDLE, channels, 1), 50, shift, 80), (0, 255))

    # deviation in steps of gain 0, eight classes to the octave; 1/4 class to the gain index
    shift = rng.integers(4, 7, size)
    base = 1 + 8 * (np.log2(deviation[first : first + size] / 64) + 2.75)
    weight, bias, _ = random_layer(rng, (size, MIDDLE + 1, 1), 2, shift)
    weight[:, -1, 0, 0] = 2 ** (shift - 2)
    bias += np.round(base * 2.0**shift).astype(np.int64)
    x = g.add("Concat", middle, "plane", axis=1)
    g.integer_conv(x, (weight, bias, shift), (0, 127), cast=UINT8, output="class")
    outputs = {"class": (UINT8, grid(size))}
    if stage < MEAN_STAGES:
        shift = rng.integers(7, 9, size)
        shift[-1] = 3  # reaches the bounds
        layer = random_layer(rng, (size, MIDDLE, 1), 40, shift)
        layer[0][-1] = np.abs(layer[0][-1]) * (-1) ** stage
        g.integer_conv(middle, layer, (-1023, 1023), cast=INT16, output="mean")
        outputs["mean"] = (INT16, grid(size))
    return g.finish(inputs, outputs)


def chain_graph(rng: np.random.Generator) -> bytes:
    g = GraphBuilder("chain", "Floor")

    def layer(outputs: int, inputs: int, side: int, peak: int, row: Array) -> Any:
        weight = rng.integers(-peak, peak + 1, (outputs, inputs, side, side))
        return weight, rng.integers(-2000, 2001, outputs), row

    zero, centre = np.uint8(0), np.uint8(128)
    x = g.quantised_conv(
        "context", layer(8, CONTEXT + 1, 3, 63, rng.integers(-9, -6, 8)), (-3, centre), (-3, zero)
    )
    x = g.quantised_conv(x, layer(8, 8, 1, 63, rng.integers(-7, -5, 8)), (-3, zero), (-4, zero))
    last = layer(CONTEXT, 8, 1, 40, rng.integers(-5, -3, CONTEXT))
    last[0][5] = 63  # reaches the bounds
    x = g.quantised_conv(x, last, (-4, zero), (-2, centre))
    g.add("Transpose", x, perm=[0, 2, 3, 1], output="correction")
    return g.finish(
        {"context": (UINT8, grid(CONTEXT + 1))},
        {"correction": (UINT8, ["batch", "rows", "columns", CONTEXT])},
    )


def tiny_decoder() -> bytes:
    """A decoder model that exercises every rule of the format; nobody trained it."""
    rng = np.random.default_rng(SEED)
    order, deviation = cosine_order()
    gain = rng.uniform(0.7, 1.4, CHANNELS)
    means = max(first + count for first, count, _ in STAGES[:MEAN_STAGES])
    tables = tables_from_weights(
        [laplace_weights(c, u) for u in range(2) for c in range(1, TABLES + 1)]
    )
    z_classes = np.empty((256, Z), np.uint8)
    z_classes[:, 0] = 33
    z_classes[:, 1] = np.clip(14 + np.arange(256) // 32, 1, 127)
    z_classes[:, 2] = np.clip(np.arange(256) // 2, 1, 127)
    graphs = {"hyper": hyper_graph(rng), "chain": chain_graph(rng)}
    for stage in range(len(STAGES)):
        graphs[f"stage{stage}"] = stage_graph(rng, stage, deviation)
    return container.pack(
        {
            "kind": "decoder",
            "name": "tiny",
            "licence": "BSD-3-Clause",
            "kmac_per_pixel": 0.1,
            "architecture": {
                "block": 16,
                "stages": [list(stage) for stage in STAGES],
                "mean_stages": MEAN_STAGES,
                "context_channels": CONTEXT,
                "z_channels": Z,
                "hyper": HYPER,
            },
        },
        graphs,
        {
            "table_radii": tables.radii,
            "table_cdf": tables.cdf,
            "z_classes": z_classes,
            "mean_factor": np.round(deviation[:means] * gain[:means] * 2**8).astype(np.int32),
            "context_factor": np.round(2 ** (27 - 255 / 32) / (gain * deviation)[:CONTEXT]).astype(
                np.int32
            ),
            "inverse_gain": (1 / gain).astype(np.float32),
            "order": order.astype(np.uint16),
            "colours": COLOURS.astype(np.float32),
            "mean": np.array([80, 32, 68], np.float32),
            "lapping": np.eye(8, dtype=np.float32),
        },
    )


def tiny_encoder(decoder: bytes) -> bytes:
    """An encoder model for it: hyper-latents from two averages."""
    _, deviation = cosine_order()
    h = GraphBuilder("hyper_analysis", "Floor")
    scale = (1 / deviation[:CONTEXT]).reshape(1, -1, 1, 1).astype(np.float32)
    x = h.add("Concat", h.add("Mul", "y", h.constant(scale, "scale")), "plane", axis=1)
    weight = np.zeros((Z - 1, CONTEXT + 1, 2, 2), np.float32)
    weight[0, 0], weight[1, 1] = 1, 1
    bias = h.constant(np.zeros(Z - 1, np.float32), "b")
    w = h.constant(weight, "w")
    h.add("Conv", x, w, bias, kernel_shape=[2, 2], strides=[2, 2], output="z")
    hyper_analysis = h.finish(
        {"y": (FLOAT, grid(CONTEXT)), "plane": (FLOAT, grid(1))},
        {"z": (FLOAT, grid(Z - 1, "z_rows", "z_columns"))},
    )
    return container.pack(
        {
            "kind": "encoder",
            "decoder": hashlib.sha256(decoder).hexdigest(),
            "turned": True,
            "step_strength": 0.5,
            "lagrange": 6.0,
        },
        {"hyper_analysis": hyper_analysis},
        {
            "quality_gain": np.round(np.linspace(8, 236, 100)).astype(np.uint8),
            "stage_gain": np.array([0, 0, 0, 0, 0, 0, 0, 40], np.uint8),
        },
    )


# ------------------------------------------------------------------------------------ small model


Stages = tuple[tuple[int, int, int], ...]


def smallest_graphs(
    correction: int = UINT8,
    stages: Stages = ((0, 1, 0),),
    contexts: int = 1,
    corrected: int | None = None,
) -> dict[str, bytes]:
    """One channel of everything but of symbols. correction: the type that the chain gives.
    corrected: its channels, where they are not the context's."""
    h = GraphBuilder("hyper")
    layer = np.full((4, 1, 1, 1), 3), np.array([100, 90, 80, 70]), np.zeros(4, int)
    x = h.integer_conv("z", layer, (0, 255))
    h.add("DepthToSpace", x, blocksize=2, mode="CRD", output="h")
    layer = np.full((4, 1, 1, 1), 7), np.array([0, 1, 2, 3]), np.full(4, 2)
    x = h.add("DepthToSpace", h.integer_conv("z", layer, (-48, 48)), blocksize=2, mode="CRD")
    h.add("Cast", x, to=INT8, output="step")
    c = GraphBuilder("chain")
    corrected = contexts if corrected is None else corrected
    signs = (-1) ** np.arange(corrected)
    weight = (signs[:, None] * [*[50] * contexts, 1])[..., None, None]
    layer = weight, signs * 2000, np.full(corrected, -4)
    after: np.uint8 | np.int8 = np.uint8(128) if correction == UINT8 else np.int8(0)
    x = c.quantised_conv("context", layer, (-3, np.uint8(128)), (-2, after))
    c.add("Transpose", x, perm=[0, 2, 3, 1], output="correction")
    return {
        "hyper": h.finish(
            {"z": (FLOAT, grid(1, "z_rows", "z_columns")), "plane": (FLOAT, grid(1))},
            {"h": (FLOAT, grid(1)), "step": (INT8, grid(1))},
        ),
        **{f"stage{k}": smallest_stage(stages, contexts, k) for k in range(len(stages))},
        "chain": c.finish(
            {"context": (UINT8, grid(contexts + 1))},
            {"correction": (correction, ["batch", "rows", "columns", corrected])},
        ),
    }


def smallest_stage(stages: Stages, contexts: int, k: int) -> bytes:
    s = GraphBuilder(f"stage{k}")
    count, seen = stages[k][1], min(stages[k][0], contexts)
    layer = np.full((1, 1, 3, 3), 2), np.array([40]), np.array([4])
    x = s.integer_conv("h", layer, (0, 255))
    x = s.add("Concat", x, "plane", *([s.add("Abs", "context")] if k else []), axis=1)
    weight = np.array([[1, 3, *[1] * seen]] * count)[..., None, None]
    layer = weight, np.zeros(count, int), np.full(count, 3)
    s.integer_conv(x, layer, (0, 127), cast=UINT8, output="class")
    inputs = {"h": (FLOAT, grid(1)), "plane": (FLOAT, grid(1))}
    if k:
        inputs["context"] = (FLOAT, grid(seen))
    return s.finish(inputs, {"class": (UINT8, grid(count))})


def smallest_decoder(
    correction: int = UINT8, corrected: int | None = None, **changed: Array
) -> bytes:
    """The least that the format allows: 15 tables of radius 1 or 2 for either quantiser, one
    stage, one channel. What is given is changed, for models that are to be refused: the type and
    the channels that the chain gives, tensors."""
    weights = [np.array([1, 20 - t, 1, 1]) for t in range(15)]
    weights += [np.array([1, 1, 30 - t, 1, 1, 1]) for t in range(15)]
    tables = tables_from_weights([w.astype(np.float64) for w in weights])
    tensors = {
        "table_radii": tables.radii,
        "table_cdf": tables.cdf,
        "z_classes": np.full((256, 1), 16, np.uint8),
        "mean_factor": np.zeros(0, np.int32),
        "context_factor": np.array([2**20], np.int32),
        "inverse_gain": np.ones(1, np.float32),
        "order": np.zeros(1, np.uint16),
        "colours": np.eye(3, dtype=np.float32),
        "mean": np.full(3, 50, np.float32),
        "lapping": np.eye(8, dtype=np.float32),
    }
    return container.pack(
        {
            "kind": "decoder",
            "name": "smallest",
            "licence": "BSD-3-Clause",
            "kmac_per_pixel": 0.01,
            "architecture": {
                "block": 16,
                "stages": [[0, 1, 0]],
                "mean_stages": 0,
                "context_channels": 1,
                "z_channels": 1,
                "hyper": 1,
            },
        },
        smallest_graphs(correction, corrected=corrected),
        {**tensors, **changed},
    )


def broken_models() -> dict[str, bytes]:
    """Models with one fault each, in what symbols and pixels are read by."""
    file = container.parse(smallest_decoder())
    radii, cdf = file.tensors["table_radii"], file.tensors["table_cdf"]

    def tables(r: Array, f: Array) -> bytes:
        return smallest_decoder(table_radii=r.astype(np.int32), table_cdf=f.astype(np.uint16))

    def edges(row: int, values: list[int]) -> bytes:
        changed = cdf.copy()
        changed[row] = values
        return tables(radii, changed)

    def tilted(*tilt: int, kind: type = np.int8) -> bytes:
        return smallest_decoder(tilt=np.array(tilt, kind))

    def times(count: int) -> bytes:
        which = np.arange(count) % len(radii)
        return tables(radii[which], cdf[which])

    wide = np.full((len(cdf), 257), 16384)
    wide[:, : cdf.shape[1]] = cdf
    wide[29] = np.minimum(np.arange(257) * 60, 16384)
    wide[29, -1] = 16384
    none = radii.copy()
    none[4] = 0
    far = radii.copy()
    far[29] = 127
    return {
        "model-tables-odd": times(31),
        "model-tables-14-each": times(28),
        "model-tables-128-each": times(256),
        "model-tables-of-quantiser-0-alone": times(15),
        "model-tables-fewer-than-radii": tables(radii, cdf[:-2]),
        "model-table-not-increasing": edges(0, [0, 700, 700, 16000, 16384, 16384, 16384]),
        "model-table-not-increasing-quantiser-1": edges(29, [0, 9, 90, 16000, 15999, 16001, 16384]),
        "model-table-starts-late-quantiser-1": edges(15, [1, 9, 90, 16000, 16001, 16002, 16384]),
        "model-table-ends-early-quantiser-1": edges(16, [0, 9, 90, 16000, 16001, 16002, 16383]),
        "model-table-padding": edges(3, [0, 9, 16000, 16003, 16384, 0, 16384]),
        "model-table-width": tables(radii, np.pad(cdf, ((0, 0), (0, 1)), mode="edge")),
        "model-radius-0": tables(none, cdf),
        "model-radius-127": tables(far, wide),
        "model-hyper-latents-of-class-0": smallest_decoder(
            z_classes=np.where(np.arange(256) == 77, 0, 16)[:, None].astype(np.uint8)
        ),
        "model-hyper-latents-of-class-128": smallest_decoder(
            z_classes=np.where(np.arange(256) == 77, 128, 16)[:, None].astype(np.uint8)
        ),
        "model-correction-signed": smallest_decoder(INT8),
        "model-correction-of-two-channels": smallest_decoder(corrected=2),
        "model-tilt-33": tilted(33),
        "model-tilt-minus-33": tilted(-33),
        "model-tilt-minus-128": tilted(-128),  # its magnitude is no int8
        "model-tilt-of-no-channel": tilted(),
        "model-tilt-of-two-channels": tilted(8, 8),
        "model-tilt-flat": smallest_decoder(tilt=np.array(8, np.int8)),
        "model-tilt-uint8": tilted(8, kind=np.uint8),
        "model-tilt-int32": tilted(8, kind=np.int32),
    }


# ------------------------------------------------------------------------------------ lapped model


def random_lapping(seed: int = SEED + 3) -> Array:
    """(8, 8) float32, orthogonal: neither symmetric nor the same from the other end."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((8, 8)))
    return np.asarray(q, np.float32)


def changed(file: bytes, architecture: dict[str, Any], **tensors: Array | None) -> bytes:
    """The model file with these keys of the architecture and these tensors; None: without."""
    parsed = container.parse(file)
    header = {
        **parsed.header,
        "architecture": {**parsed.header["architecture"], **architecture},
    }
    kept = {n: t for n, t in {**parsed.tensors, **tensors}.items() if t is not None}
    return container.pack(header, parsed.graphs, kept)


def lapped_decoder() -> bytes:
    """Little more than the smallest model: twelve channels in two stages, and lapped."""
    order, deviation = cosine_order()
    stages, contexts, channels = ((0, 4, 0), (4, 8, 0)), 4, 12
    smallest = container.parse(smallest_decoder())
    architecture = {
        **smallest.header["architecture"],
        "stages": [list(stage) for stage in stages],
        "context_channels": contexts,
    }
    factor = np.round(2 ** (27 - 255 / 32) / deviation[:contexts])
    # planes change places, and all three show in a picture of the first stage
    first = np.array([256, 512, 0, 1])
    rest = [place for place in order.tolist() if place not in first]
    tensors = {
        "context_factor": factor.astype(np.int32),
        "inverse_gain": np.linspace(0.75, 1.25, channels).astype(np.float32),
        "order": np.array([*first, *rest])[:channels].astype(np.uint16),
        "colours": COLOURS[:, [1, 2, 0]].astype(np.float32),
        "mean": np.array([80, 32, 68], np.float32),
        "lapping": random_lapping(),
    }
    return container.pack(
        {**smallest.header, "name": "lapped", "architecture": architecture},
        smallest_graphs(stages=stages, contexts=contexts),
        {**smallest.tensors, **tensors},
    )


def broken_transforms(file: bytes) -> dict[str, bytes]:
    """The lapped model with one fault each, in what turns latents into pixels."""
    good = container.parse(file).tensors

    def model(name: str, *place: int, value: float) -> bytes:
        """One entry of a tensor changed."""
        array = good[name].copy()
        array[place] = value
        return changed(file, {}, **{name: array})

    def other(**tensors: Array | None) -> bytes:
        return changed(file, {}, **tensors)

    row_twice = good["lapping"].copy()
    row_twice[5] = row_twice[4]
    # products of rows that are infinite, or no numbers, in float32
    huge = np.full((8, 8), 3e38, np.float32)
    huge[4:, ::2] = -3e38
    rolled = np.roll(np.eye(8), 3, axis=1)  # exact in every type
    bound = np.nextafter(np.float32(2**16), np.float32(np.inf))
    return {
        "model-lapped-0": changed(file, {"lapped": 0}),
        "model-lapped-1": changed(file, {"lapped": 1}),
        "model-order-missing": other(order=None),
        "model-order-twice": model("order", 11, value=good["order"][2]),
        "model-order-768": model("order", 11, value=768),
        "model-order-65535": model("order", 0, value=65535),
        "model-order-too-short": other(order=good["order"][:-1]),
        "model-order-too-long": other(order=np.append(good["order"], np.uint16(700))),
        "model-order-int32": other(order=good["order"].astype(np.int32)),
        "model-colours-missing": other(colours=None),
        "model-colours-nan": model("colours", 1, 2, value=np.nan),
        "model-colours-infinite": model("colours", 2, 0, value=-np.inf),
        "model-colours-beyond-bound": model(
            "colours", 0, 1, value=np.nextafter(np.float32(-16), np.float32(-np.inf))
        ),
        "model-colours-that-depend": other(colours=good["colours"][:, [0, 1, 1]]),
        "model-colours-that-nearly-depend": other(
            colours=np.diag([1, 1, 9.99e-4]).astype(np.float32)
        ),
        "model-colours-flat": other(colours=good["colours"].reshape(9)),
        "model-colours-of-two-planes": other(colours=good["colours"][:, :2]),
        "model-mean-missing": other(mean=None),
        "model-mean-nan": model("mean", 1, value=np.nan),
        "model-mean-beyond-bound": model("mean", 2, value=1024.25),
        "model-mean-beyond-bound-negative": model("mean", 0, value=-1024.25),
        "model-mean-of-samples": other(mean=np.tile(good["mean"], 256)),
        "model-inverse-gain-infinite": model("inverse_gain", 3, value=np.inf),
        "model-inverse-gain-beyond-bound": model("inverse_gain", 11, value=bound),
        "model-lapping-missing": other(lapping=None),
        "model-lapping-scaled": other(lapping=good["lapping"] * np.float32(1.001)),
        "model-lapping-row-twice": other(lapping=row_twice),
        "model-lapping-nan": model("lapping", 7, 0, value=np.nan),
        "model-lapping-huge": other(lapping=huge),
        "model-lapping-flat": other(lapping=good["lapping"].reshape(64)),
        "model-lapping-float16": other(lapping=rolled.astype(np.float16)),
    }


# ------------------------------------------------------------------------------------ tilted model

TILTED_STAGES = ((0, 6, 1), (0, 6, 2), (0, 6, 3), (6, 6, 0), (12, 6, 0))
TILTED_MEAN_STAGES, TILTED_CONTEXT = 3, 12
# one row to the channel: tilt, mean and context factor, inverse gain; of the class its weights for
# the surroundings and for the gain, in 32nds, and what is added. The tilt takes some factors to
# either bound and leaves some so small that their rounding shows, and classes to 0 and to 127
TILTED_CHANNELS = (
    (32, 700001, 5, 0.08, 2, 7, 12),
    (-32, 3, 40000, 1.5, 1, 2, 22),
    (11, 41, 2**19 + 1, 2.0, 1, 0, 6),
    (-21, 25, 2**18 + 3, 1.1, 2, 2, 14),
    (27, 1001, 2**14 + 5, 0.9, -2, 8, 0),
    (0, 307, 2**17 + 7, 1.2, 1, 4, -8),
    (-32, 0, 300001, 3.0, 2, 1, 22),
    (32, 0, 3, 0.02, 1, 10, 14),
    (-8, 0, 9, 0.04, 2, 8, 10),
    (5, 0, 60, 0.5, -6, 8, -2),
    (-29, 0, 2**15 + 9, 0.8, 1, 5, 2),
    (19, 0, 13, 0.01, 2, 4, 70),
    (17, 0, 0, 0.03, 1, 12, 12),
    (-32, 0, 0, 1.3, 2, 3, 16),
    (32, 0, 0, 2.5, -5, 5, -6),
    (-1, 0, 0, 0.7, 2, 4, -4),
    (0, 0, 0, 1.1, -3, 5, 0),
    (-13, 0, 0, 0.6, 1, 4, 2),
)


def tilted_stage(rng: np.random.Generator, k: int) -> bytes:
    """Classes and means of random weights for what was decoded before."""
    first, count, _ = TILTED_STAGES[k]
    rows = np.array(TILTED_CHANNELS[first : first + count])
    seen = min(max((a + n for a, n, _ in TILTED_STAGES[:k]), default=0), TILTED_CONTEXT)
    s = GraphBuilder(f"stage{k}")
    inputs = {"h": (FLOAT, grid(1)), "plane": (FLOAT, grid(1))}
    layer = np.full((1, 1, 3, 3), 2), np.array([40]), np.array([4])
    parts = [s.integer_conv("h", layer, (0, 255)), "plane"]
    if k:
        inputs["context"] = (FLOAT, grid(seen))
        parts += ["context", s.add("Abs", "context")]
    x = s.add("Concat", *parts, axis=1)
    shift = np.full(count, 5)
    weight = np.zeros((count, 2 + (2 * seen if k else 0), 1, 1), np.int64)
    weight[:, :2, 0, 0] = rows[:, 4:6]
    weight[:, 2 : 2 + seen, 0, 0] = rng.integers(-1, 2, (count, seen))
    weight[:, 2 + seen :, 0, 0] = rng.integers(-2, 3, weight[:, 2 + seen :, 0, 0].shape)
    bias = np.round(rows[:, 6] * 32).astype(np.int64)
    s.integer_conv(x, (weight, bias, shift), (0, 127), cast=UINT8, output="class")
    outputs = {"class": (UINT8, grid(count))}
    if k < TILTED_MEAN_STAGES:
        weight, bias, shift = random_layer(rng, (count, weight.shape[1], 1), 40, np.full(count, 4))
        shift[0] = 8  # its factor is large
        layer = weight, bias + rng.integers(-2000, 2001, count), shift
        s.integer_conv(x, layer, (-1023, 1023), cast=INT16, output="mean")
        outputs["mean"] = (INT16, grid(count))
    return s.finish(inputs, outputs)


def tilted_decoder() -> bytes:
    """Eighteen channels, with means and without, inside the context and outside, and a tilt that
    takes them all over its range."""
    rng = np.random.default_rng(SEED + 4)
    order, _ = cosine_order()
    smallest = container.parse(smallest_decoder())
    architecture = {
        **smallest.header["architecture"],
        "stages": [list(stage) for stage in TILTED_STAGES],
        "mean_stages": TILTED_MEAN_STAGES,
        "context_channels": TILTED_CONTEXT,
    }
    tilt, mean, context, inverse_gain = np.array(TILTED_CHANNELS).T[:4]
    means = TILTED_STAGES[TILTED_MEAN_STAGES][0]
    graphs = smallest_graphs(stages=TILTED_STAGES, contexts=TILTED_CONTEXT)
    for k in range(len(TILTED_STAGES)):
        graphs[f"stage{k}"] = tilted_stage(rng, k)
    tensors = {
        "z_classes": np.full((256, 1), 40, np.uint8),
        "mean_factor": mean[:means].astype(np.int32),
        "context_factor": context[:TILTED_CONTEXT].astype(np.int32),
        "inverse_gain": inverse_gain.astype(np.float32),
        "tilt": tilt.astype(np.int8),
        "order": order[: len(tilt)].astype(np.uint16),
        "colours": COLOURS.astype(np.float32),
        "mean": np.array([80, 32, 68], np.float32),
    }
    return container.pack(
        {**smallest.header, "name": "tilted", "architecture": architecture},
        graphs,
        {**smallest.tensors, **tensors},
    )


# ------------------------------------------------------------------------------------ pictures


def tissue(height: int, width: int, seed: int = 0) -> Array:
    """(height, width, 3) uint8: something like tissue: pink fibres, purple nuclei, some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(float)
    angle = rng.uniform(0, np.pi)
    fibres = np.sin((x * np.cos(angle) + y * np.sin(angle)) / 5 + np.sin(y / 17) * 2)
    image = np.array([226.0, 170, 205]) + fibres[..., None] * [9, 16, 8]
    for _ in range(2 + height * width // 500):
        add_nucleus(image, rng)
    image += rng.normal(0, 3, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def glass(height: int, width: int, seed: int = 0) -> Array:
    """(height, width, 3) uint8: next to nothing, with a few nuclei: it takes a small PNG file."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), [208.0, 160, 196])
    for _ in range(4 + height * width // 16000):
        add_nucleus(image, rng)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def add_nucleus(image: Array, rng: np.random.Generator) -> None:
    """A purple ellipse somewhere in the image, (height, width, 3) of floats."""
    height, width = image.shape[:2]
    y, x = (axis.astype(float) for axis in np.ogrid[:height, :width])
    row, column = rng.uniform(0, height), rng.uniform(0, width)
    a, b, turn = rng.uniform(4, 9), rng.uniform(3, 6), rng.uniform(0, np.pi)
    u = (x - column) * np.cos(turn) + (y - row) * np.sin(turn)
    v = (y - row) * np.cos(turn) - (x - column) * np.sin(turn)
    inside = 1 / (1 + np.exp(np.clip(6 * ((u / a) ** 2 + (v / b) ** 2 - 1), -30, 30)))
    image += inside[..., None] * (np.array([95, 55, 135]) - image)


# ------------------------------------------------------------------------------------ an encoder

Step = tuple[int, int]
Symbol = list[Step]
"""The steps of one symbol of class > 0."""


def symbol_steps(k: int, symbol_class: int, quantiser: int, model: second.Model) -> Symbol:
    """docs/format.md, "Symbol tables": the steps of one index."""
    tables = len(model.table_radii) // 2
    b = 0 if symbol_class <= tables else -(-(symbol_class - tables) // 8)
    t = symbol_class - 8 * b - 1 + quantiser * tables
    r, cdf = model.table_radii[t], model.table_cdf[t]
    p = k + 2**b // 2
    top, low = p >> b, p - (p >> b) * 2**b
    index = top + r if abs(top) <= r else 2 * r + 1
    steps = [(cdf[index], cdf[index + 1] - cdf[index])]
    if abs(top) > r:
        e = abs(top) - r
        n = e.bit_length() - 1
        steps += raw_steps(n, 5) + raw_steps(e - 2**n, n) + raw_steps(int(top < 0), 1)
    return steps + raw_steps(low, b)


def raw_steps(value: int, bits: int) -> list[Step]:
    if bits > 14:
        return raw_steps(value >> 14, bits - 14) + raw_steps(value & 2**14 - 1, 14)
    return [(value << 14 - bits, 1 << 14 - bits)] if bits else []


def encode_symbols(symbols: list[Symbol], lanes: int) -> bytes:
    """docs/format.md, "rANS": backwards through the steps, those of a symbol in one lane."""
    states = [2**16] * lanes
    words = []
    for i in reversed(range(len(symbols))):
        x = states[i % lanes]
        for start, frequency in reversed(symbols[i]):
            if x >= frequency * 2**18:
                words.append(x % 2**16)
                x //= 2**16
            x = x // frequency * 2**14 + x % frequency + start
        states[i % lanes] = x
    words.reverse()
    return struct.pack(f"<{lanes}I{len(words)}H", *states, *words)


def nearest_index(wanted: float, quantiser: int) -> int:
    """Index of the level nearest to ``wanted`` steps; the lesser of two."""
    size = abs(wanted)
    k = int(np.rint(size + quantiser / 2))
    if quantiser and k == 1 and size <= 0.25:
        k = 0
    return -k if wanted < 0 else k


Choice = Callable[[Array, "second.Cell | None"], Array]
"""(classes, cell so far or None for hyper-latents) to what symbols are to mean, in steps."""


class Writer:
    """Stands in for second_decoder.Decoder in the walk through a cell: chooses, then records."""

    def __init__(self, choose: Choice, lanes: int) -> None:
        self.choose, self.lanes = choose, lanes
        self.steps: list[Symbol] = []

    def hyper_latents(self, model: second.Model, classes: Array) -> Array:
        z = np.clip(np.rint(self.choose(classes, None)), -127, 127).astype(np.int64)
        self.put_hyper_latents(model, z, classes)
        return z

    def put_hyper_latents(self, model: second.Model, z: Array, classes: Array) -> None:
        for k, symbol_class in zip(z.reshape(-1), classes.reshape(-1), strict=True):
            self.steps.append(symbol_steps(int(k), int(symbol_class), 0, model))

    def indices(
        self, model: second.Model, classes: Array, cell: second.Cell | None
    ) -> tuple[Array, Array]:
        wanted = self.choose(classes, cell)

        def nearest(place: tuple[int, ...], quantiser: int) -> int:
            return min(max(nearest_index(wanted[place], quantiser), -(2**20)), 2**20)

        return self.put_indices(model, nearest, classes)

    def put_indices(
        self, model: second.Model, index_of: Callable[[tuple[int, ...], int], int], classes: Array
    ) -> tuple[Array, Array]:
        """docs/format.md, "Levels". index_of: (place in the array, quantiser) to an index."""
        found = np.zeros(classes.shape, np.int64)
        quantisers = np.zeros(classes.shape, np.int64)
        states = [0] * self.lanes
        for place, symbol_class in np.ndenumerate(classes):
            if symbol_class:
                lane = len(self.steps) % self.lanes
                quantiser = states[lane] & 1
                k = index_of(place, quantiser)
                found[place], quantisers[place] = k, quantiser
                states[lane] = second.NEXT_STATE[k % 2][states[lane]]
                self.steps.append(symbol_steps(k, int(symbol_class), quantiser, model))
        return found, quantisers


def random_symbols(seed: int) -> Choice:
    """Symbols spread as their classes say, with some far out, to both bounds."""
    rng = np.random.default_rng(seed)

    def choose(classes: Array, cell: second.Cell | None) -> Array:
        limit = 127 if cell is None else 2**20
        scale = 2.0 ** ((classes - 1) / 8 - 2.75)
        wanted = rng.laplace(0, scale / np.sqrt(2))
        far = rng.random(classes.shape)
        wanted = np.where(far < 0.01, rng.normal(0, 30 * scale + 40), wanted)
        wanted = np.where(far > 0.998, limit * rng.choice([-1, 1], classes.shape), wanted)
        return np.asarray(np.clip(wanted, -limit, limit))

    return choose


def picture_symbols(image: Array, model: second.Model, turn: Turn, seed: int) -> Choice:
    """Nearest levels of one cell's picture, one after the other, under random hyper-latents."""
    rng = np.random.default_rng(seed)
    rows, columns = -(-image.shape[0] // 16), -(-image.shape[1] // 16)
    pad = ((0, 16 * rows - image.shape[0]), (0, 16 * columns - image.shape[1]), (0, 0))
    whole = np.pad(image, pad, mode="edge") - 128.0 - model.mean
    forward = second.turn_matrix(turn) @ np.linalg.inv(model.colours.astype(np.float64))
    planes = second.lap(whole @ forward.T, model.lapping.T.astype(np.float64))
    d = second.cosines()
    blocks = planes.reshape(rows, 16, columns, 16, 3)
    frequencies = np.einsum("ui,ricjp,wj->puwrc", d, blocks, d, optimize=True)
    y = frequencies.reshape(768, rows, columns)[model.order]

    def choose(classes: Array, cell: second.Cell | None) -> Array:
        if cell is None:
            return rng.integers(-3, 4, classes.shape)
        first, _, lattice = model.stages[len(cell.levels)]
        at = second.lattice_positions(lattice, rows, columns)
        here = cell.effective[at]
        wanted = np.empty(classes.shape)
        for i in range(len(wanted)):
            v = 16 * y[first + i][at] / model.inverse_gain[first + i] / 2.0 ** (6 - here / 32)
            if (mean := cell.means[-1]) is not None:
                v = v - second.mean_of_channel(model, first + i, mean[i], here)
            wanted[i] = v / 16
        return wanted

    return choose


Turn = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Learned:
    """A learned tile to write. picture: seed of ``tissue``, or of ``glass`` where that is set, or
    None for random symbols. turns: of its cells, the last one of all that follow, too. tilt: 0 is
    not written."""

    height: int
    width: int
    gain: int
    stages: int = len(STAGES)
    lanes: int = 4
    picture: int | None = None
    seed: int = 0
    glass: bool = False
    turns: tuple[Turn, ...] = ((0, 0, 0),)
    tilt: int = 0

    @property
    def overhead(self) -> int:
        """Bytes before the payload."""
        return 25 if self.tilt else 24

    def cells(self) -> list[tuple[int, int, Turn]]:
        """(top, left, turn) of every cell."""
        places = [(y, x) for y in range(0, self.height, 512) for x in range(0, self.width, 512)]
        last = len(self.turns) - 1
        return [(*place, self.turns[min(i, last)]) for i, place in enumerate(places)]

    def turn_bytes(self) -> bytes:
        return b"".join(struct.pack("<3b", *turn) for _, _, turn in self.cells())

    def steps(self, file: bytes) -> list[Symbol]:
        model = second.tilted(second.read_model(file), self.tilt)
        draw = glass if self.glass else tissue
        image = None if self.picture is None else draw(self.height, self.width, self.picture)
        steps: list[Symbol] = []
        for top, left, turn in self.cells():
            h, w = min(512, self.height - top), min(512, self.width - left)
            seed = 1000 * self.seed + top + left
            choose = random_symbols(seed)
            if image is not None:
                part = image[top : top + h, left : left + w]
                choose = picture_symbols(part, model, turn, seed)
            writer = Writer(choose, self.lanes)
            writer.steps = steps  # lanes go on from cell to cell
            second.decode_cell(writer, model, (h, w), self.gain, self.stages, turn)
        return steps

    def tile(self, file: bytes, stream: bytes | None = None, **header: Any) -> bytes:
        """The tile's bytes, with another entropy-coded stream, other bytes of tilt or turns or
        other header fields where given."""
        if stream is None:
            stream = encode_symbols(self.steps(file), self.lanes)
        digest = header.pop("digest", hashlib.sha256(file).digest()[:4])
        packed = self.stages | self.lanes.bit_length() - 1 << 4 | (0x80 if self.tilt else 0)
        packed = header.pop("packed", packed)
        tilt = header.pop("tilt", bytes([self.tilt] if self.tilt else []))
        turns = header.pop("turns", self.turn_bytes())
        body = digest + bytes([self.gain, packed]) + tilt + turns + stream
        return tile(1, self.height, self.width, body, **header)


def tile(mode: int, height: int, width: int, body: bytes, **fields: Any) -> bytes:
    """docs/format.md, "Tile"; ``fields``: magic, version, length, crc, tail."""
    head = struct.pack(
        "<4sBBHHI", fields.get("magic", b"WSC\x1a"), fields.get("version", 1), mode, height, width,
        fields.get("length", len(body)),
    )  # fmt: skip
    crc = fields.get("crc", zlib.crc32(body, zlib.crc32(head)))
    return head + struct.pack("<I", crc) + body + fields.get("tail", b"")


# ------------------------------------------------------------------------------------ vectors


def foreign(name: str, image: Array) -> bytes:
    """A stream of a codec that a tile may hold."""
    import imagecodecs

    image = np.ascontiguousarray(image)
    if name == "jpegxl":
        return bytes(imagecodecs.jpegxl_encode(image, distance=1.0, effort=5))
    if name == "jpegxl-container":
        return bytes(imagecodecs.jpegxl_encode(image, distance=1.0, effort=5, usecontainer=True))
    if name == "jpeg":
        subsampling = "444" if image.ndim == 3 else None
        return bytes(imagecodecs.jpeg8_encode(image, level=85, subsampling=subsampling))
    if name == "jpeg-420":
        return bytes(imagecodecs.jpeg8_encode(image, level=85, subsampling="420", optimize=True))
    if name.startswith("transcoded"):
        jpeg = foreign(name.replace("transcoded", "jpeg"), image)
        return bytes(imagecodecs.jpegxl_encode_jpeg(jpeg, numthreads=1))
    if name == "jpeg2000":
        return bytes(
            imagecodecs.jpeg2k_encode(
                image, level=40, reversible=False, mct=True, codecformat="j2k"
            )
        )
    return bytes(imagecodecs.jpegxl_encode(image, lossless=True, effort=5))


FOREIGN_MODES = {
    "jpegxl": 2, "jpegxl-container": 2, "jpeg": 3, "jpeg-420": 3, "jpeg2000": 4, "lossless": 5,
    "transcoded": 6, "transcoded-420": 6,
}  # fmt: skip

LEARNED = {
    "learned-1x1-gain90": Learned(1, 1, 90, picture=1),
    "learned-1x1-gain0-lanes32": Learned(1, 1, 0, lanes=32, seed=1),
    "learned-16x16-gain0-stages1-lanes1": Learned(16, 16, 0, 1, 1, seed=2),
    "learned-16x16-gain255-lanes32-turned": Learned(
        16, 16, 255, lanes=32, seed=3, turns=((77, -128, 3),)
    ),
    "learned-17x31-gain90-stages2-lanes2": Learned(17, 31, 90, 2, 2, picture=4),
    "learned-31x17-gain1-stages3-lanes8-turned": Learned(
        31, 17, 1, 3, 8, seed=5, turns=((-20, 50, 99),)
    ),
    "learned-64x48-gain90": Learned(64, 48, 90, picture=6),
    "learned-64x48-gain180-lanes16-turned": Learned(
        64, 48, 180, lanes=16, picture=6, turns=((-90, 37, 115),)
    ),
    "learned-64x48-gain0-turned": Learned(64, 48, 0, picture=7, turns=((127, -30, -66),)),
    "learned-64x48-gain255-lanes1": Learned(64, 48, 255, lanes=1, picture=8),
    "learned-64x48-gain128-stages4": Learned(64, 48, 128, 4, picture=9),
    "learned-48x64-gain100-stages6-lanes2-turned": Learned(
        48, 64, 100, 6, 2, picture=16, turns=((1, 2, -3),)
    ),
    "learned-33x49-gain70-stages7": Learned(33, 49, 70, 7, picture=17),
    "learned-80x48-gain40-stages1": Learned(80, 48, 40, 1, seed=18),
    "learned-513x16-gain90-turned": Learned(
        513, 16, 90, picture=10, turns=((-128, 127, -1), (5, -60, 127))
    ),
    "learned-16x513-gain120-stages5-lanes2-turned": Learned(
        16, 513, 120, 5, 2, picture=11, turns=((0, 0, 0), (40, -50, 60))
    ),
    "learned-48x48-gain128-random-turned": Learned(48, 48, 128, seed=12, turns=((-45, 120, -101),)),
    "learned-96x80-gain250-random": Learned(96, 80, 250, lanes=2, seed=13),
    "learned-80x96-gain6-random": Learned(80, 96, 6, lanes=32, seed=14),
    "learned-64x64-gain60-random": Learned(64, 64, 60, seed=15),
    # grids of odd and even extents for every lattice; all numbers of lanes
    "learned-112x144-gain128-lanes16-random-turned": Learned(
        112, 144, 128, lanes=16, seed=21, turns=((127, 127, 127),)
    ),
    "learned-16x80-gain200-lanes8-random": Learned(16, 80, 200, lanes=8, seed=22),
    "learned-80x16-gain30-lanes1-random": Learned(80, 16, 30, lanes=1, seed=23),
    "learned-32x32-gain160-stages2-lanes2": Learned(32, 32, 160, 2, 2, seed=24),
    "learned-48x32-gain220-stages3-lanes32": Learned(48, 32, 220, 3, 32, seed=25),
    "learned-32x48-gain10-lanes16": Learned(32, 48, 10, lanes=16, seed=26),
    "learned-144x112-gain150-lanes8-turned": Learned(
        144, 112, 150, lanes=8, picture=27, turns=((-128, -128, -128),)
    ),
    "learned-48x528-gain20-lanes32-random-turned": Learned(
        48, 528, 20, lanes=32, seed=28, turns=((-100, 3, 77), (127, -128, 0))
    ),
    "learned-528x16-gain240-lanes1-random": Learned(528, 16, 240, lanes=1, seed=29),
    # one angle alone
    "learned-32x32-gain140-turned-a": Learned(32, 32, 140, picture=33, turns=((90, 0, 0),)),
    "learned-32x32-gain140-turned-b": Learned(32, 32, 140, picture=33, turns=((0, -77, 0),)),
    "learned-32x32-gain140-turned-c": Learned(32, 32, 140, picture=33, turns=((0, 0, 45),)),
    # the model has no tilt, which is one of zeros
    "learned-31x33-gain130-tilt9-turned": Learned(
        31, 33, 130, picture=34, turns=((5, 1, 9),), tilt=9
    ),
}
SMALLEST = {  # of the smallest model
    "smallest/1x1-gain0": Learned(1, 1, 0, 1, 1, seed=30),
    "smallest/50x40-gain100-turned": Learned(50, 40, 100, 1, 4, seed=31, turns=((-9, 70, -128),)),
    "smallest/40x50-gain255-lanes32": Learned(40, 50, 255, 1, 32, seed=32),
}
LAPPED = {  # of the lapped model; no symbols far out: the filter would spread their errors
    "lapped/1x1-gain90": Learned(1, 1, 90, 2, picture=50),
    "lapped/16x16-gain128-turned": Learned(16, 16, 128, 2, picture=51, turns=((12, -34, 56),)),
    "lapped/17x33-gain140": Learned(17, 33, 140, 2, picture=52),
    "lapped/33x17-gain100-stages1-turned": Learned(
        33, 17, 100, 1, picture=53, turns=((-128, 64, 127),)
    ),
    "lapped/16x88-gain120-lanes1-turned": Learned(
        16, 88, 120, 2, 1, picture=54, turns=((100, 110, -120),)
    ),
    "lapped/88x16-gain120-lanes32": Learned(88, 16, 120, 2, 32, picture=55),
    "lapped/40x72-gain60-lanes2-turned": Learned(
        40, 72, 60, 2, 2, picture=56, turns=((-70, 20, 30),)
    ),
    "lapped/40x72-gain255": Learned(40, 72, 255, 2, picture=56),
    "lapped/256x256-gain150-lanes8-turned": Learned(
        256, 256, 150, 2, 8, picture=57, glass=True, turns=((-28, 127, 61),)
    ),
    "lapped/600x530-gain150-stages1-turned": Learned(
        600, 530, 150, 1, picture=66, glass=True,
        turns=((23, -45, 68), (0, 0, 0), (-128, 127, 64), (127, -128, -64)),
    ),
}  # fmt: skip

TILTED = {  # of the tilted model
    "tilted/1x1-gain90-tilt16": Learned(1, 1, 90, 5, picture=70, tilt=16),
    "tilted/17x33-gain140-tilt7": Learned(17, 33, 140, 5, picture=71, tilt=7),
    "tilted/33x17-gain100-stages4-lanes1-tilt8-turned": Learned(
        33, 17, 100, 4, 1, picture=72, turns=((-128, 64, 127),), tilt=8
    ),
    "tilted/40x72-gain60-lanes2-tilt15-turned": Learned(
        40, 72, 60, 5, 2, picture=73, turns=((-70, 20, 30),), tilt=15
    ),
    "tilted/40x72-gain200-tilt16": Learned(40, 72, 200, 5, picture=74, tilt=16),
    "tilted/40x72-gain200": Learned(40, 72, 200, 5, picture=74),
    "tilted/65x49-gain128-lanes8-tilt1-random": Learned(65, 49, 128, 5, 8, seed=75, tilt=1),
    "tilted/49x65-gain180-tilt7-random": Learned(49, 65, 180, 5, seed=76, tilt=7),
    "tilted/80x48-gain20-lanes32-tilt8-random-turned": Learned(
        80, 48, 20, 5, 32, seed=77, turns=((5, -6, 7),), tilt=8
    ),
    "tilted/49x81-gain230-lanes16-tilt15-random": Learned(49, 81, 230, 5, 16, seed=78, tilt=15),
    "tilted/72x40-gain255-lanes1-tilt16-random": Learned(72, 40, 255, 5, 1, seed=79, tilt=16),
    "tilted/529x23-gain160-tilt16-random-turned": Learned(
        529, 23, 160, 5, seed=80, turns=((1, 2, 3), (-90, 60, 30)), tilt=16
    ),
    "tilted/40x40-gain150-random": Learned(40, 40, 150, 5, seed=81),
}  # fmt: skip


def decode_vectors(file: bytes, smallest: bytes, lapped: bytes, tilted: bytes) -> dict[str, bytes]:
    tiles = {
        "constant-1x1": tile(0, 1, 1, bytes([1, 2, 3])),
        "constant-64x48": tile(0, 48, 64, bytes([243, 238, 245])),  # the document's example
    }
    for name, mode in FOREIGN_MODES.items():
        tiles[f"{name}-17x31"] = tile(mode, 17, 31, foreign(name, tissue(17, 31, 20 + mode)))
    tiles["lossless-1x1"] = tile(5, 1, 1, foreign("lossless", tissue(1, 1, 30)))
    for name, learned in LEARNED.items():
        tiles[name] = learned.tile(file)
    for name, learned in SMALLEST.items():
        tiles[name] = learned.tile(smallest)
    for name, learned in LAPPED.items():
        tiles[name] = learned.tile(lapped)
    for name, learned in TILTED.items():
        tiles[name] = learned.tile(tilted)
    return tiles


def under_quantiser_1(indices: list[int], classes: list[int]) -> list[tuple[int, int]]:
    """(index, class) of one lane: small ones between these lead each to quantiser 1."""
    state, found = 0, []
    for wanted in zip(indices, classes, strict=True):
        while state & 1 == 0:
            found.append((int(state == 0), 3 + len(found) % 40))
            state = second.NEXT_STATE[found[-1][0]][state]
        found.append(wanted)
        state = second.NEXT_STATE[wanted[0] % 2][state]
    return found


def encode_vectors(file: bytes) -> dict[str, Any]:
    """JSON documents. kind coder: arrays under classes of the tiny model's tables to a payload, one
    array after the other; dependent ones are a stage's and have indices and levels, the others
    hyper-latents. kind tile: header fields and a payload to a tile."""
    model = second.read_model(file)
    rng = np.random.default_rng(SEED + 2)
    vectors: dict[str, Any] = {}

    def coder(name: str, lanes: int, *arrays: tuple[list[int], list[int], bool]) -> None:
        """arrays: symbols, classes, dependent."""
        writer = Writer(random_symbols(0), lanes)
        entries: list[dict[str, Any]] = []
        for k, c, dependent in arrays:
            entry: dict[str, Any] = {"dependent": dependent, "classes": c}
            entries.append(entry)
            if not dependent:
                writer.put_hyper_latents(model, np.array(k), np.array(c))
                entry["symbols"] = k
                continue
            found, u = writer.put_indices(model, lambda at, _, k=k: k[at[0]], np.array(c, int))
            entry |= {"indices": k, "levels": second.levels_of(found, u).tolist()}
            assert found.tolist() == k
        payload = encode_symbols(writer.steps, lanes).hex()
        vectors[name] = {"kind": "coder", "lanes": lanes, "arrays": entries, "payload": payload}

    def drawn(count: int, least: int) -> tuple[list[int], list[int]]:
        classes = rng.integers(least, 128, count)
        scale = np.where(classes > 0, 2.0 ** ((classes - 1) / 8 - 2.75), 0)
        k = np.rint(rng.laplace(0, scale / np.sqrt(2) + 1e-12)).astype(int)
        return k.tolist(), classes.tolist()

    coder("coder-empty-lanes4", 4)
    coder("coder-class0-lanes1", 1, ([0] * 5, [0] * 5, True))
    for lanes in (1, 2, 4, 8, 16, 32):
        z = [int(np.clip(k, -127, 127)) for k in range(-7, 8)], rng.integers(1, 128, 15).tolist()
        parts = (*z, False), (*drawn(60, 0), True), (*drawn(37, 0), True), (*z, False)
        coder(f"coder-all-classes-lanes{lanes}", lanes, *parts, (*drawn(50, 0), True))
    far = [2**20, -(2**20), 2**20 - 1, 2**14, -(2**15) - 7, 4, -4, 3, -3, 2, -2]
    escaping = [1, 1, 5, 9, 2, 1, 1, 1, 1, 1, 1]
    raw = [30, 127, 90, 25, 40, 32, 33, 127, 120, 60, 61]
    coder("coder-escapes-lanes4", 4, (far, escaping, True))
    coder("coder-escapes-raw-bits-lanes2", 2, (far, raw, True))
    for name, classes in (("escapes", escaping), ("escapes-raw-bits", raw)):
        steered = under_quantiser_1(far, classes)
        for lanes in (1, 4):
            apart = ([k for k, _ in steered for _ in range(lanes)],
                     [c for _, c in steered for _ in range(lanes)])  # fmt: skip
            coder(f"coder-{name}-quantiser1-lanes{lanes}", lanes, (*apart, True))
    # every transition of the states: a lane walks them all
    coder("coder-walk-lanes1", 1, (rng.integers(-6, 7, 150).tolist(), [20] * 150, True))

    colour = bytes([243, 238, 245])
    vectors["tile-constant"] = tile_vector(tile(0, 48, 64, colour), colour)
    payload = bytes(range(40))
    turns = tuple((k - 128, 7 * k, 127 - k) for k in range(8))  # of eight cells
    learned = Learned(4096, 1, 255, 15, 32, turns=turns)
    data = learned.tile(file, payload)
    vectors["tile-learned"] = tile_vector(data, learned.turn_bytes() + payload, learned)
    vectors["tile-jpeg"] = tile_vector(tile(3, 1, 4096, payload), payload)
    return vectors


def tile_vector(data: bytes, payload: bytes, learned: Learned | None = None) -> dict[str, Any]:
    height, width = struct.unpack("<HH", data[6:10])
    fields: dict[str, Any] = {"mode": data[5], "height": height, "width": width}
    if learned is not None:
        fields["learned"] = {
            "model": data[18:22].hex(),
            "gain": learned.gain,
            "stages": learned.stages,
            "lanes_log2": learned.lanes.bit_length() - 1,
        }
        if learned.tilt:
            fields["learned"]["tilt"] = learned.tilt
    return {"kind": "tile", **fields, "payload": payload.hex(), "tile": data.hex()}


def whole_encode_vectors(folder: str, learned: Learned, file: bytes) -> dict[str, Any]:
    """All symbols of a tile to its stream, and turn and stream to the tile."""
    data = learned.tile(file)
    (cell,) = second.decode(data, [file]).cells
    classes = np.broadcast_to(second.read_model(file).z_classes[learned.gain], cell.z.shape[::-1])
    arrays = [{"dependent": False, "classes": classes.T, "symbols": cell.z}]
    for c, k, n in zip(cell.classes, cell.indices, cell.levels, strict=True):
        arrays.append({"dependent": True, "classes": c, "indices": k, "levels": n})
    entries = [
        {key: v.reshape(-1).tolist() if key != "dependent" else v for key, v in array.items()}
        for array in arrays
    ]
    payload = data[learned.overhead :]
    stream = payload[len(learned.turn_bytes()) :]
    coder = {"kind": "coder", "lanes": learned.lanes, "arrays": entries, "payload": stream.hex()}
    return {f"{folder}/coder": coder, f"{folder}/tile": tile_vector(data, payload, learned)}


def bare(model: second.Model, base: Learned, values: list[int], classes: list[int]) -> list[Symbol]:
    """Steps of a 1 x 1 tile's hyper-latents and of stage 0's indices, chosen freely."""
    z = model.z_channels
    writer = Writer(random_symbols(0), base.lanes)
    writer.put_hyper_latents(model, np.array(values[:z]), model.z_classes[base.gain])
    writer.put_indices(model, lambda at, _: values[z + at[0]], np.array(classes, int))
    return writer.steps


def stage_classes(model: second.Model, gain: int, z: list[int]) -> list[int]:
    """Classes of stage 0 in a 1 x 1 tile of these hyper-latents."""

    class Stop(Exception):
        pass

    def choose(classes: Array, cell: second.Cell | None) -> Array:
        if cell is None:
            return np.array(z).reshape(classes.shape)
        raise Stop(classes.reshape(-1).tolist())

    try:
        second.decode_cell(Writer(choose, 1), model, (1, 1), gain, 1, (0, 0, 0))
    except Stop as stop:
        found: list[int] = stop.args[0]
        return found
    raise AssertionError


def refuse_vectors(file: bytes) -> dict[str, tuple[str, bytes]]:
    """Name to (error class, bytes). Every checksum is right unless the checksum is the fault."""
    import imagecodecs

    model = second.read_model(file)
    colour = bytes([9, 8, 7])
    good = tile(0, 3, 5, colour)
    learned = Learned(16, 16, 90, picture=1, turns=((1, -2, 3),))
    tall = Learned(513, 1, 90, 1, 4)
    steps = learned.steps(file)
    payload = encode_symbols(steps, 4)
    image = tissue(17, 31, 40)
    jxl, jpeg, j2k = (foreign(n, image) for n in ("lossless", "jpeg", "jpeg2000"))
    transcoded = foreign("transcoded", image)
    comments = jpeg[:2] + 65 * b"\xff\xfe\x00\x03a" + jpeg[2:]
    commented = bytes(imagecodecs.jpegxl_encode_jpeg(comments, numthreads=1))
    one = Learned(1, 1, 90, 1, 4)  # three hyper-latents, four symbols
    deep = Learned(1, 1, 255, 1, 4)
    alone = Learned(1, 1, 255, 1, 1)  # one lane: 1, 0 lead to quantiser 1

    def crafted(base: Learned, values: list[int]) -> bytes:
        classes = stage_classes(model, base.gain, values[:3])
        steps = bare(model, base, values, classes)
        return base.tile(file, encode_symbols(steps, base.lanes))

    def escape(n: int, base: Learned) -> bytes:
        """The first symbol's escape says n bits."""
        t = int(model.z_classes[base.gain][0])
        b = 0 if t <= TABLES else -(-(t - TABLES) // 8)
        t -= 8 * b + 1  # of quantiser 0
        r = model.table_radii[t]
        start = model.table_cdf[t][2 * r + 1]
        first = [(start, model.table_cdf[t][2 * r + 2] - start), *raw_steps(n, 5)]
        rest = raw_steps(0, min(n, 20)) + raw_steps(0, 1) + raw_steps(0, b)
        return base.tile(file, encode_symbols([[*first, *rest], *[[(0, 2**13)]] * 40], base.lanes))

    states = struct.pack("<4I", 2**16 - 1, *[2**16] * 3)
    unused = Learned(1, 1, 90, 1, 32)  # seven symbols
    idle = bytearray(encode_symbols(unused.steps(file), 32))
    idle[4 * 31] ^= 1
    truncated, form, limit = "TruncatedError", "FormatError", "LimitError"
    unsupported, checksum, unknown = "UnsupportedError", "ChecksumError", "UnknownModelError"
    other = tile(0, 3, 5, colour, crc=zlib.crc32(colour, zlib.crc32(good[:14])) ^ 0x80000000)
    return {
        "empty": (truncated, b""),
        "magic-cut": (truncated, good[:3]),
        "magic-damaged-by-text-transfer": (form, tile(0, 3, 5, colour, magic=b"WSC\x1b")),
        "header-cut": (truncated, good[:17]),
        "version-0": (unsupported, tile(0, 3, 5, colour, version=0)),
        "version-2": (unsupported, tile(0, 3, 5, colour, version=2)),
        "mode-6": (form, tile(6, 3, 5, colour)),
        "mode-7": (form, tile(7, 3, 5, colour)),
        "mode-9": (form, tile(9, 3, 5, colour)),
        "height-0": (limit, tile(0, 0, 5, colour)),
        "width-0": (limit, tile(0, 3, 0, colour)),
        "height-4097": (limit, tile(0, 4097, 5, colour)),
        "width-65535": (limit, tile(0, 3, 65535, colour)),
        "length-beyond-2-28": (limit, tile(0, 3, 5, colour, length=2**28 + 1)),
        "length-promises-more": (truncated, tile(0, 3, 5, colour, length=4)),
        "truncated": (truncated, good[:-1]),
        "trailing-byte": (form, tile(0, 3, 5, colour, tail=b"\0")),
        "crc-damaged": (checksum, other),
        "crc-of-other-size": (checksum, good[:6] + b"\x04\0" + good[8:]),
        "constant-length-2": (form, tile(0, 3, 5, colour[:2])),
        "constant-length-4": (form, tile(0, 3, 5, colour + b"\0")),
        "learned-header-cut": (form, tile(1, 16, 16, hashlib.sha256(file).digest()[:4] + b"\x5a")),
        "tilt-0": (form, learned.tile(file, payload, packed=0xA8, tilt=b"\0")),
        "tilt-17": (form, learned.tile(file, payload, packed=0xA8, tilt=b"\x11")),
        "no-room-for-tilt": (form, learned.tile(file, b"", packed=0xA8, turns=b"")),
        "stages-0": (form, learned.tile(file, payload, packed=0x20)),
        "stages-beyond-model": (form, learned.tile(file, payload, packed=0x29)),
        "lanes-64": (form, learned.tile(file, payload, packed=0x68)),
        "unknown-model": (unknown, learned.tile(file, payload, digest=b"\0\1\2\3")),
        "states-cut": (truncated, learned.tile(file, payload[:14])),
        "no-payload": (truncated, learned.tile(file, b"", turns=b"")),
        "turns-cut": (truncated, learned.tile(file, b"", turns=b"\1\2")),
        "turns-of-the-second-cell-missing": (truncated, tall.tile(file, b"", turns=b"\1\2\3")),
        "turns-of-the-second-cell-cut": (truncated, tall.tile(file, b"", turns=b"\1\2\3\4\5")),
        "turns-alone": (truncated, learned.tile(file, b"")),
        "turns-of-one-cell-for-two": (form, tall.tile(file, turns=b"\1\2\3")),
        "turns-twice": (form, learned.tile(file, payload, turns=2 * learned.turn_bytes())),
        "odd-bytes": (form, learned.tile(file, payload + b"\0")),
        "state-below-range": (form, learned.tile(file, states + payload[16:])),
        "words-end-early": (truncated, learned.tile(file, payload[:-2])),
        "trailing-word": (form, learned.tile(file, payload + b"\0\0")),
        "symbols-end-early": (form, learned.tile(file, encode_symbols([*steps, [(0, 2**13)]], 4))),
        "state-of-an-idle-lane": (form, unused.tile(file, bytes(idle))),
        "states-of-32-lanes-cut": (truncated, unused.tile(file, bytes(idle[:126]))),
        "stages-fewer-than-coded": (form, learned.tile(file, payload, packed=0x27)),
        "lanes-other-than-coded": (form, learned.tile(file, payload, packed=0x18)),
        "escape-of-21-bits": (form, escape(21, one)),
        "escape-of-31-bits": (form, escape(31, one)),
        "hyper-latent-128": (form, crafted(one, [128, 0, 0, 0, 0, 0, 0])),
        "hyper-latent-minus-128": (form, crafted(one, [0, 0, -128, 0, 0, 0, 0])),
        "symbol-beyond-range": (form, crafted(one, [0, 0, 0, 2**20 + 1, 0, 0, 0])),
        "symbol-beyond-range-negative": (form, crafted(deep, [0, 0, 0, 0, -(2**20) - 1, 0, 0])),
        # 2^32 + 1: in 32-bit arithmetic it would pass for 1
        "symbol-wraps-32-bits": (form, crafted(deep, [0, 0, 0, 2**32 + 1, 0, 0, 0])),
        "symbol-beyond-range-quantiser-1": (form, crafted(alone, [0, 0, 0, 1, 0, 2**20 + 1, 0])),
        "symbol-beyond-range-quantiser-1-negative": (
            form,
            crafted(alone, [0, 0, 0, 1, 0, -(2**20) - 1, 0]),
        ),
        "symbol-wraps-32-bits-as-a-level": (form, crafted(alone, [0, 0, 0, 1, 0, 2**31 + 1, 0])),
        "lossless-other-size": (form, tile(5, 31, 17, jxl)),
        "jpegxl-other-size": (form, tile(2, 17, 32, jxl)),
        "jpeg-other-size": (form, tile(3, 16, 31, jpeg)),
        "jpeg2000-other-size": (form, tile(4, 17, 30, j2k)),
        "lossless-empty": (form, tile(5, 17, 31, b"")),
        "jpegxl-holds-jpeg": (form, tile(2, 17, 31, jpeg)),
        "jpeg-holds-jpegxl": (form, tile(3, 17, 31, jxl)),
        "jpeg2000-holds-jpeg": (form, tile(4, 17, 31, jpeg)),
        "lossless-cut": (truncated, tile(5, 17, 31, jxl[:-20])),
        "jpeg-cut": (truncated, tile(3, 17, 31, jpeg[:-20])),
        "jpeg2000-cut": (truncated, tile(4, 17, 31, j2k[:-20])),
        "lossless-grey": (unsupported, tile(5, 17, 31, foreign("lossless", image[..., 0]))),
        "lossless-16-bit": (
            unsupported,
            tile(5, 17, 31, foreign("lossless", image.astype(np.uint16) * 257)),
        ),
        "transcoded-other-size": (form, tile(6, 17, 30, transcoded)),
        "transcoded-cut": (truncated, tile(6, 17, 31, transcoded[:-20])),
        "transcoded-holds-jpeg": (form, tile(6, 17, 31, jpeg)),
        "transcoded-holds-pixels": (form, tile(6, 17, 31, foreign("jpegxl-container", image))),
        "transcoded-with-xmp": (
            form,
            tile(6, 17, 31, transcoded + struct.pack(">I4s", 12, b"xml ") + b"<a/>"),
        ),
        "transcoded-of-65-comments": (limit, tile(6, 17, 31, commented)),
        "transcoded-grey": (unsupported, tile(6, 17, 31, foreign("transcoded", image[..., 0]))),
        "jpeg-grey": (unsupported, tile(3, 17, 31, foreign("jpeg", image[..., 0]))),
    }


# ------------------------------------------------------------------------------------ files


INDICES = ("symbols.json", "errors.json")


def symbols_digest(cells: list[second.Cell]) -> str:
    """SHA-256 of all hyper-latents and levels of a tile in coding order, with those of class 0, as
    int32, little-endian."""
    digest = hashlib.sha256()
    for cell in cells:
        for array in (cell.z, *cell.levels):
            digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()


def index(path: Path, entries: dict[str, str]) -> bytes:
    """A JSON object with one entry to the line: those that the file has, and new ones."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    document = {**entries, **kept}
    rows = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(document.items())]
    return ("{\n" + ",\n".join(rows) + "\n}\n").encode()


def all_files() -> dict[Path, bytes]:
    """Every file by path. Existing models are read, never made anew: tiles depend on them."""
    import imagecodecs

    def model(name: str, make: Callable[[], bytes]) -> bytes:
        path = FOLDER / f"{name}.wscm"
        return path.read_bytes() if path.exists() else make()

    file = model("tiny", tiny_decoder)
    encoder = model("tiny.encoder", lambda: tiny_encoder(file))
    smallest = model("smallest", smallest_decoder)
    lapped = model("lapped", lapped_decoder)
    tilted = model("tilted", tilted_decoder)
    files = {
        FOLDER / "tiny.wscm": file,
        FOLDER / "tiny.encoder.wscm": encoder,
        FOLDER / "smallest.wscm": smallest,
        FOLDER / "lapped.wscm": lapped,
        FOLDER / "tilted.wscm": tilted,
    }
    symbols = {}
    for name, data in decode_vectors(file, smallest, lapped, tilted).items():
        decoded = second.decode(data, [file, smallest, lapped, tilted])
        files[FOLDER / "decode" / f"{name}.tile"] = data
        files[FOLDER / "decode" / f"{name}.png"] = imagecodecs.png_encode(decoded.pixels)
        if decoded.mode == "learned":
            symbols[name] = symbols_digest(decoded.cells)
    encoded = encode_vectors(file)
    for folder, whole, of in (
        ("lapped", LAPPED["lapped/40x72-gain60-lanes2-turned"], lapped),
        ("tilted", TILTED["tilted/40x72-gain60-lanes2-tilt15-turned"], tilted),
    ):
        encoded |= whole_encode_vectors(folder, whole, of)
    for name, vector in encoded.items():
        files[FOLDER / "encode" / f"{name}.json"] = (json.dumps(vector) + "\n").encode()
    refused = refuse_vectors(file)
    for name, (_, data) in refused.items():
        files[FOLDER / "refuse" / f"{name}.tile"] = data
    for name, data in (broken_models() | broken_transforms(lapped)).items():
        files[FOLDER / "refuse" / f"{name}.wscm"] = data
    for path, entries in (
        (FOLDER / "decode" / "symbols.json", symbols),
        (FOLDER / "refuse" / "errors.json", {n: error for n, (error, _) in refused.items()}),
    ):
        files[path] = index(path, entries)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="list missing files, write none")
    arguments = parser.parse_args()
    missing = {
        path: data
        for path, data in all_files().items()
        # an index only ever grows
        if not path.exists() or (path.name in INDICES and path.read_bytes() != data)
    }
    for path, data in missing.items():
        print(path.relative_to(ROOT), len(data))
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb" if path.name in INDICES else "xb") as target:
                target.write(data)
    return int(arguments.check and bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
