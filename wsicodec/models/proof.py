"""Proofs about model graphs, run at export and on every load (docs/format.md, "Integer networks").

``prove_integer`` shows that a graph computes in bounded integers: every weight an int8 integer,
every sum below 2**22, every rounding explicit, so that float32 in any order, with any kernel whose
error stays below one half, gives the same result. ``prove_quantised`` shows the like for the int8
correction chain. Both follow an allow-list of operators and refuse everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.errors import ModelError

SUM_BOUND = 2**22
WEIGHT_PEAK = 127
CHAIN_WEIGHT_PEAK = 63  # 2 * 255 * 63 < 2**15: u8 x s8 kernels without VNNI do not saturate
INPUT_PEAK = 2**11 - 1
MAX_NODES = 256
MAX_CHANNELS = 4096

Array = npt.NDArray[Any]
Bounds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """Smallest and largest integer of each channel of a tensor. low, high: (channels,)"""

    low: Bounds
    high: Bounds
    whole: bool = True  # False between a power-of-two scaling and its Floor

    @staticmethod
    def of(channels: int, low: int, high: int) -> Range:
        return Range(np.full(channels, float(low)), np.full(channels, float(high)))

    @property
    def peak(self) -> Bounds:
        return np.maximum(np.abs(self.low), np.abs(self.high))


def _load(graph_bytes: bytes, what: str) -> Any:
    """The ONNX graph, structurally checked: one graph, no external data, no functions."""
    import onnx

    try:
        model = onnx.load_model_from_string(graph_bytes)
    except Exception as error:  # protobuf raises its own, undocumented types
        raise ModelError(f"{what}: not an ONNX model: {type(error).__name__}") from None
    graph = model.graph
    if len(graph.node) > MAX_NODES:
        raise ModelError(f"{what}: {len(graph.node)} nodes; at most {MAX_NODES} are allowed")
    if model.functions or graph.sparse_initializer or model.training_info:
        raise ModelError(f"{what}: functions, sparse and training parts are not allowed")
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            raise ModelError(f"{what}: operator domain {opset.domain!r} is not allowed")
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(f"{what}: operator domain {node.domain!r} is not allowed")
        for attribute in node.attribute:
            if attribute.type not in (1, 2, 3, 6, 7):  # float, int, string, floats, ints
                raise ModelError(f"{what}: {node.op_type} has an attribute that is not a number")
    for tensor in graph.initializer:
        if tensor.data_location == 1 or tensor.external_data:
            raise ModelError(f"{what}: external data is not allowed")
    return graph


def check_operators(graph_bytes: bytes, allowed: frozenset[str], what: str) -> Any:
    """The parsed graph when all its operators are allowed, or ModelError."""
    graph = _load(graph_bytes, what)
    for node in graph.node:
        if node.op_type not in allowed:
            raise ModelError(f"{what}: operator {node.op_type} is not allowed")
    return graph


def initializers(graph: Any) -> dict[str, Array]:
    """Constant tensors of a graph by name."""
    from onnx import numpy_helper

    return {t.name: np.asarray(numpy_helper.to_array(t)) for t in graph.initializer}


def attributes(node: Any) -> dict[str, Any]:
    """Attributes of a node as Python values."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


INTEGER_OPERATORS = frozenset(
    ("Conv", "Round", "Mul", "Floor", "Clip", "Concat", "Abs", "DepthToSpace", "Cast")
)


def prove_integer(
    graph_bytes: bytes,
    inputs: Mapping[str, Range],
    outputs: Mapping[str, Range],
    what: str,
) -> None:
    """Prove that ``outputs`` hold integers of the given ranges for all ``inputs`` of theirs.

    Raises ModelError naming the node that breaks the proof.
    """
    graph = check_operators(graph_bytes, INTEGER_OPERATORS, what)
    constants = initializers(graph)
    declared = {i.name for i in graph.input} - set(constants)
    if declared != set(inputs):
        raise ModelError(f"{what}: inputs are {sorted(declared)}, not {sorted(inputs)}")
    if {o.name for o in graph.output} != set(outputs):
        raise ModelError(f"{what}: outputs are not {sorted(outputs)}")
    ranges: dict[str, Range] = dict(inputs)
    for node in graph.node:
        if len(node.output) != 1 or node.output[0] in ranges or node.output[0] in constants:
            raise ModelError(f"{what}: {node.op_type} has improper outputs")
        if node.op_type == "Cast" and node.input[0] in constants:
            constants[node.output[0]] = _cast_constant(node, constants, what)
            continue
        ranges[node.output[0]] = _step(node, ranges, constants, what)
    for name, want in outputs.items():
        have = ranges.get(name)
        if have is None or len(have.low) != len(want.low) or not have.whole:
            raise ModelError(f"{what}: output {name!r} is not {len(want.low)} integer channels")
        if (have.low < want.low).any() or (have.high > want.high).any():
            raise ModelError(f"{what}: output {name!r} may leave its range")


def _value(ranges: Mapping[str, Range], name: str, what: str) -> Range:
    if name not in ranges:
        raise ModelError(f"{what}: tensor {name!r} is used before it is computed")
    return ranges[name]


def _constant(constants: Mapping[str, Array], name: str, what: str) -> Array:
    if name not in constants:
        raise ModelError(f"{what}: {name!r} must be a constant")
    array = constants[name]
    if array.size and not np.isfinite(array.astype(np.float64)).all():
        raise ModelError(f"{what}: {name!r} is not finite")
    return array


def _step(
    node: Any, ranges: Mapping[str, Range], constants: Mapping[str, Array], what: str
) -> Range:
    """Output range of one node."""
    kind = node.op_type
    if kind == "Concat":
        if attributes(node) != {"axis": 1}:
            raise ModelError(f"{what}: Concat must join channels")
        parts = [_value(ranges, n, what) for n in node.input]
        return Range(
            np.concatenate([p.low for p in parts]),
            np.concatenate([p.high for p in parts]),
            all(p.whole for p in parts),
        )
    x = _value(ranges, node.input[0], what)
    if kind == "Conv":
        return _convolution(node, x, constants, what)
    if kind == "Mul":
        scale = _constant(constants, node.input[1], what).astype(np.float64)
        scale = np.broadcast_to(scale.reshape(-1), x.low.shape) if scale.size in (1, len(x.low)) else None
        if scale is None or (scale <= 0).any() or (scale > 1).any():
            raise ModelError(f"{what}: Mul must scale by powers of two up to 1")
        if (np.frexp(scale)[0] != 0.5).any() or (scale < 2.0**-24).any():
            raise ModelError(f"{what}: Mul must scale by powers of two")
        return Range(x.low * scale, x.high * scale, whole=False)
    if kind == "Floor":
        return Range(np.floor(x.low), np.floor(x.high))
    if not x.whole:
        raise ModelError(f"{what}: {kind} on values that are not whole")
    if kind == "Round":
        return x
    if kind == "Clip":
        if len(node.input) != 3:
            raise ModelError(f"{what}: Clip needs both bounds")
        low = float(_constant(constants, node.input[1], what).reshape(()))
        high = float(_constant(constants, node.input[2], what).reshape(()))
        if not low.is_integer() or not high.is_integer() or low > high:
            raise ModelError(f"{what}: Clip bounds are not whole")
        return Range(np.clip(x.low, low, high), np.clip(x.high, low, high))
    if kind == "Abs":
        low = np.where((x.low <= 0) & (x.high >= 0), 0.0, np.minimum(np.abs(x.low), np.abs(x.high)))
        return Range(low, x.peak)
    if kind == "DepthToSpace":
        a = attributes(node)
        size = a.get("blocksize")
        if a.get("mode", b"DCR") != b"CRD" or not isinstance(size, int) or not 1 <= size <= 16:
            raise ModelError(f"{what}: DepthToSpace must be of mode CRD")
        if len(x.low) % (size * size):
            raise ModelError(f"{what}: DepthToSpace does not divide the channels")
        return Range(
            x.low.reshape(-1, size * size).min(1), x.high.reshape(-1, size * size).max(1)
        )
    # Cast: float to an integer type that holds the range
    limits = {2: (0, 255), 3: (-128, 127), 5: (-32768, 32767), 1: (-(2**24), 2**24)}
    to = attributes(node).get("to")
    if to not in limits or x.low.min() < limits[to][0] or x.high.max() > limits[to][1]:
        raise ModelError(f"{what}: Cast does not hold its range")
    return x


def _cast_constant(node: Any, constants: Mapping[str, Array], what: str) -> Array:
    """A constant stored as integers and used as float32, which holds it exactly."""
    value = _constant(constants, node.input[0], what)
    if attributes(node).get("to") != 1 or value.dtype.kind not in "iu":
        raise ModelError(f"{what}: Cast of a constant must be from integers to float32")
    if value.size and np.abs(value.astype(np.int64)).max() >= 2**24:
        raise ModelError(f"{what}: a constant is beyond what float32 holds exactly")
    return value.astype(np.float32)


def _convolution(node: Any, x: Range, constants: Mapping[str, Array], what: str) -> Range:
    if not x.whole or x.peak.max() > INPUT_PEAK:
        raise ModelError(f"{what}: Conv on values beyond 11 bits or not whole")
    if len(node.input) != 3:
        raise ModelError(f"{what}: Conv needs a bias")
    w = _constant(constants, node.input[1], what).astype(np.float64)
    b = _constant(constants, node.input[2], what).astype(np.float64)
    a = attributes(node)
    if w.ndim != 4 or w.shape[1] != len(x.low) or b.shape != (w.shape[0],):
        raise ModelError(f"{what}: Conv weights do not fit their input")
    if w.shape[0] > MAX_CHANNELS or w.shape[2] != w.shape[3] or w.shape[2] not in (1, 3):
        raise ModelError(f"{what}: Conv must be 1x1 or 3x3")
    pad = int(w.shape[2]) // 2
    if a.get("group", 1) != 1 or any(v != 1 for v in (*a.get("strides", [1, 1]), *a.get("dilations", [1, 1]))):
        raise ModelError(f"{what}: Conv must be dense, of stride 1")
    if a.get("auto_pad", b"NOTSET") != b"NOTSET" or list(a.get("pads", [0] * 4)) != [pad] * 4:
        raise ModelError(f"{what}: Conv must pad to the same size")
    if (w != np.round(w)).any() or (b != np.round(b)).any():
        raise ModelError(f"{what}: Conv weights are not integers")
    if np.abs(w).max() > WEIGHT_PEAK:
        raise ModelError(f"{what}: Conv weights exceed int8")
    total = np.abs(w).sum((2, 3)) @ x.peak + np.abs(b)
    if (total >= SUM_BOUND).any():
        raise ModelError(f"{what}: a Conv sum may reach {total.max():.0f}, beyond 2^22")
    # zero padding adds the value 0 to every input's range
    low, high = np.minimum(x.low, 0), np.maximum(x.high, 0)
    positive, negative = np.maximum(w, 0).sum((2, 3)), np.minimum(w, 0).sum((2, 3))
    if pad == 0:
        low, high = x.low, x.high
    return Range(positive @ low + negative @ high + b, positive @ high + negative @ low + b)


CHAIN_OPERATORS = frozenset(("Conv", "QuantizeLinear", "DequantizeLinear", "Concat", "Transpose"))


def prove_quantised(graph_bytes: bytes, what: str) -> None:
    """Prove an int8 graph free of saturation and of inexact scales.

    Every scale is a power of two, every weight at most 63, every sum below 2**24: integer kernels
    with or without VNNI, and float32 kernels, agree to the bit.
    """
    graph = check_operators(graph_bytes, CHAIN_OPERATORS, what)
    constants = initializers(graph)
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = _constant(constants, node.input[1], what).astype(np.float64)
            if (scale <= 0).any() or (np.frexp(scale)[0] != 0.5).any():
                raise ModelError(f"{what}: a scale is not a power of two")
    weights = {
        node.output[0]: constants[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        if len(node.input) != 3 or node.input[1] not in weights or node.input[2] not in weights:
            raise ModelError(f"{what}: Conv weights are not quantised constants")
        w = weights[node.input[1]].astype(np.int64)
        b = weights[node.input[2]].astype(np.int64)
        if w.ndim != 4 or np.abs(w).max() > CHAIN_WEIGHT_PEAK:
            raise ModelError(f"{what}: Conv weights exceed {CHAIN_WEIGHT_PEAK}")
        if (255 * np.abs(w).sum((1, 2, 3)) + np.abs(b)).max() >= 2**24:
            raise ModelError(f"{what}: a Conv sum may exceed 2^24")


FLOAT_OPERATORS = frozenset(("Conv", "Relu", "Add", "Mul", "Concat", "Cast", "Slice"))
"""Operators of encoder networks, whose results decide no probability."""
