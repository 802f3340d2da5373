"""How close the sums of a model's graphs come to the bounds of the proof.

``wsicodec.models.proof`` says whether a graph may be used; here the same intervals are walked
through once more, by other code in int64, for the figures. Graphs are taken as proved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from wsicodec.models import container
from wsicodec.models.decoder import CONTEXT_PEAK, GAINS, Z_PEAK, Architecture
from wsicodec.models.proof import SUM_BOUND, attributes

CHAIN_BOUND = 2**24
FLOAT32_INTEGERS = 2**24
"""Below it, float32 holds every integer."""

Array = np.ndarray[Any, Any]
Interval = tuple[Array, Array]
"""Smallest and largest integer of each channel."""

# Winograd's F(2 x 2, 3 x 3), of kernels in halves: Lavin and Gray, arXiv:1509.09308
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])


@dataclass(frozen=True)
class LayerBound:
    """Of one convolution, over all its channels and all inputs that the format allows.

    kernel: its side. inputs, outputs: channels. peak: of the inputs. weight: of the weights. bound:
    of sums in any order, Σ|w| max|x| + |b|; of the chain, which sees 8 bits, Σ|w| 255 + |b|. limit:
    what ``bound`` must stay below. winograd: the like for the numbers that Winograd's F(2 × 2,
    3 × 3) forms, in quarters; None for kernels of 1 × 1.
    """

    graph: str
    layer: int
    kernel: int
    inputs: int
    outputs: int
    peak: int
    weight: int
    bound: int
    limit: int
    winograd: int | None

    @property
    def winograd_exact(self) -> bool:
        """Whether that algorithm, too, computes with integers that float32 holds."""
        return self.winograd is not None and self.winograd < FLOAT32_INTEGERS


def layer_bounds(file: bytes) -> list[LayerBound]:
    """Of all convolutions of a decoder model's file, graph by graph, in their order."""
    parsed = container.parse(file)
    a = Architecture.from_header(parsed.header)
    plane = _interval(1, 0, GAINS - 1)
    z = _interval(a.z_channels, -Z_PEAK, Z_PEAK)
    found = _integer_layers("hyper", parsed.graph("hyper"), {"z": z, "plane": plane})
    for k in range(len(a.stages)):
        inputs = {"h": _interval(a.hyper, 0, 255), "plane": plane}
        if k:
            inputs["context"] = _interval(a.seen(k), -CONTEXT_PEAK, CONTEXT_PEAK)
        found += _integer_layers(f"stage{k}", parsed.graph(f"stage{k}"), inputs)
    return found + _chain_layers(parsed.graph("chain"))


def _interval(channels: int, low: int, high: int) -> Interval:
    return np.full(channels, low, np.int64), np.full(channels, high, np.int64)


def _graph(data: bytes) -> tuple[Any, dict[str, Array]]:
    graph = onnx.load_model_from_string(data).graph
    constants = {t.name: np.asarray(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    return graph, constants


def _layer(graph: str, layer: int, w: Array, b: Array, inputs: Interval, limit: int) -> LayerBound:
    """w: (outputs, inputs, k, k) and b: (outputs,) int64."""
    peak = np.maximum(np.abs(inputs[0]), np.abs(inputs[1]))
    bound = np.abs(w).sum((2, 3)) @ peak + np.abs(b)
    outputs, channels, side, _ = w.shape
    return LayerBound(
        graph, layer, side, channels, outputs, int(peak.max()), int(np.abs(w).max()),
        int(bound.max()), limit, _winograd(w, b, inputs) if side == 3 else None,
    )  # fmt: skip


def _winograd(w: Array, b: Array, inputs: Interval) -> int:
    """Inputs are transformed to sums of four, kernels to quarters; an output is a sum of nine sums
    of their products: the largest that sums of them in any order may reach, in quarters."""
    low, high = (np.minimum(inputs[0], 0), np.maximum(inputs[1], 0))  # and the frame around them
    four = np.einsum("ai,bj->abij", _INPUT, _INPUT)
    plus, minus = np.maximum(four, 0).sum((2, 3)), np.minimum(four, 0).sum((2, 3))
    highest = np.multiply.outer(high, plus) + np.multiply.outer(low, minus)
    lowest = np.multiply.outer(low, plus) + np.multiply.outer(high, minus)
    kernels = np.einsum("ai,ocij,bj->ocab", _KERNEL, w, _KERNEL)
    products = kernels * highest, kernels * lowest
    above, below = np.maximum(*products).clip(0).sum(1), np.minimum(*products).clip(None, 0).sum(1)
    most = 0
    for signs in np.einsum("ia,jb->ijab", _OUTPUT, _OUTPUT).reshape(4, 4, 4):
        keep, turn = signs.clip(0), signs.clip(None, 0)
        up = (keep * above + turn * below).sum((1, 2)) + 4 * b.clip(0)
        down = (keep * below + turn * above).sum((1, 2)) + 4 * b.clip(None, 0)
        most = max(most, int(up.max()), int(-down.min()))
    return most


def _integer_layers(name: str, data: bytes, inputs: Mapping[str, Interval]) -> list[LayerBound]:
    graph, constants = _graph(data)
    values: dict[str, Any] = dict(inputs)
    layers = []
    for node in graph.node:
        if node.output[0] in constants:
            continue
        if node.op_type == "Concat":
            parts = [values[x] for x in node.input]
            low, high = (np.concatenate(p) for p in zip(*parts, strict=True))
        else:
            low, high = values[node.input[0]]
        if node.op_type == "Conv":
            w, b = (constants[x].astype(np.int64) for x in node.input[1:])
            layers.append(_layer(name, len(layers), w, b, (low, high), SUM_BOUND))
            if w.shape[-1] > 1:  # the frame around the grid is zero
                low, high = np.minimum(low, 0), np.maximum(high, 0)
            up, down = np.maximum(w, 0).sum((2, 3)), np.minimum(w, 0).sum((2, 3))
            low, high = up @ low + down @ high + b, up @ high + down @ low + b
        elif node.op_type == "Mul":
            scale = constants[node.input[1]].astype(np.float64).reshape(-1)
            low, high = low * scale, high * scale
        elif node.op_type in ("Round", "Floor"):
            low, high = (
                (np.rint if node.op_type == "Round" else np.floor)(x).astype(np.int64)
                for x in (low, high)
            )
        elif node.op_type == "Clip":
            bottom, top = (int(constants[x].reshape(())) for x in node.input[1:])
            low, high = np.clip(low, bottom, top), np.clip(high, bottom, top)
        elif node.op_type == "Abs":
            largest = np.maximum(np.abs(low), np.abs(high))
            low = np.where((low <= 0) & (high >= 0), 0, np.minimum(np.abs(low), np.abs(high)))
            high = largest
        elif node.op_type == "DepthToSpace":
            size = attributes(node)["blocksize"] ** 2
            low, high = low.reshape(-1, size).min(1), high.reshape(-1, size).max(1)
        values[node.output[0]] = low, high
    return layers


def _chain_layers(data: bytes) -> list[LayerBound]:
    """The chain's proof takes every input for 255."""
    graph, constants = _graph(data)
    sources = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    layers = []
    for node in graph.node:
        if node.op_type == "Conv":
            w, b = (constants[sources[x]].astype(np.int64) for x in node.input[1:])
            levels = _interval(w.shape[1], 0, 255)
            layers.append(_layer("chain", len(layers), w, b, levels, CHAIN_BOUND))
    return layers
