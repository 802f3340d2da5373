"""Proofs about model graphs, run at export and on every load (docs/format.md, "Integer networks").

``prove_integer`` shows that a graph computes in bounded integers: every weight an int8 integer,
every sum below 2**22, every rounding explicit, so that float32 in any order, with any kernel whose
error stays below one half, gives the same result. ``prove_quantised`` shows the like for the int8
correction chain. Both follow an allow-list of operators and refuse everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
OPSET = 17
IR_VERSIONS = (8, 9)

Array = npt.NDArray[Any]
Bounds = npt.NDArray[np.float64]


# element types of ONNX tensors (onnx.TensorProto.DataType)
FLOAT, UINT8, INT8, UINT16, INT16, INT32, INT64, HALF = 1, 2, 3, 4, 5, 6, 7, 10
CONSTANT_TYPES = frozenset((FLOAT, UINT8, INT8, UINT16, INT16, INT32, INT64, HALF))

_INT, _STRING, _INTS = 2, 3, 7  # onnx.AttributeProto.AttributeType
_ATTRIBUTES: Mapping[str, Mapping[str, int]] = {
    "Conv": {
        "kernel_shape": _INTS,
        "pads": _INTS,
        "strides": _INTS,
        "dilations": _INTS,
        "group": _INT,
        "auto_pad": _STRING,
    },
    "Concat": {"axis": _INT},
    "Cast": {"to": _INT},
    "DepthToSpace": {"blocksize": _INT, "mode": _STRING},
    "QuantizeLinear": {"axis": _INT},
    "DequantizeLinear": {"axis": _INT},
    "Transpose": {"perm": _INTS},
}
"""Attributes that an operator may have, and their types."""


@dataclass(frozen=True)
class Range:
    """Smallest and largest integer of each channel of a tensor. low, high: (channels,)

    whole: False between a power-of-two scaling and its Floor or Round.
    rounded: False between a Conv and its Round.
    zoom: extent of its grid, in multiples of the coarsest input's. kind: element type.
    """

    low: Bounds
    high: Bounds
    whole: bool = True
    rounded: bool = True
    zoom: int = 1
    kind: int = FLOAT

    @staticmethod
    def of(channels: int, low: int, high: int, *, zoom: int = 1, kind: int = FLOAT) -> Range:
        return Range(
            np.full(channels, float(low)), np.full(channels, float(high)), zoom=zoom, kind=kind
        )

    @property
    def peak(self) -> Bounds:
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def now(self, low: Bounds, high: Bounds, **changes: Any) -> Range:
        """The same tensor after an operation: other bounds, other properties where given."""
        return replace(self, low=low, high=high, **changes)


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
    if model.ir_version not in IR_VERSIONS:
        raise ModelError(f"{what}: IR version {model.ir_version} is not allowed")
    if [opset.version for opset in model.opset_import] != [OPSET]:
        raise ModelError(f"{what}: the operator set is not version {OPSET} alone")
    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(f"{what}: operator domain {node.domain!r} is not allowed")
        known = _ATTRIBUTES.get(node.op_type, {})
        for attribute in node.attribute:
            if attribute.type != known.get(attribute.name) or attribute.ref_attr_name:
                raise ModelError(
                    f"{what}: attribute {attribute.name!r} of {node.op_type} is not allowed"
                )
        if len({attribute.name for attribute in node.attribute}) != len(node.attribute):
            raise ModelError(f"{what}: {node.op_type} has an attribute twice")
        if len(node.output) != 1 or not node.input or "" in (*node.input, *node.output):
            raise ModelError(f"{what}: {node.op_type} has improper inputs or outputs")
    for tensor in graph.initializer:
        if tensor.data_location == 1 or tensor.external_data:
            raise ModelError(f"{what}: external data is not allowed")
        if tensor.data_type not in CONSTANT_TYPES or len(tensor.dims) > 4:
            raise ModelError(f"{what}: constant {tensor.name!r} is of a type that is not allowed")
    for several in (graph.initializer, graph.input, graph.output):
        names = [entry.name for entry in several]
        # protobuf gives bytes for a name that is not UTF-8
        if not all(names) or bytes in map(type, names) or len(set(names)) != len(names):
            raise ModelError(f"{what}: a name is missing or used twice")
    return graph


def check_operators(graph_bytes: bytes, allowed: frozenset[str], what: str) -> Any:
    """The parsed graph when all its operators are allowed, or ModelError."""
    graph = _load(graph_bytes, what)
    for node in graph.node:
        if node.op_type not in allowed:
            raise ModelError(f"{what}: operator {node.op_type} is not allowed")
    return graph


def initializers(graph: Any, what: str) -> dict[str, Array]:
    """Constant tensors of a graph by name; none is empty."""
    from onnx import numpy_helper

    constants = {}
    for tensor in graph.initializer:
        try:
            array = np.asarray(numpy_helper.to_array(tensor))
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise ModelError(f"{what}: constant {tensor.name!r} is damaged: {error}") from None
        if list(array.shape) != list(tensor.dims) or array.size == 0:
            raise ModelError(f"{what}: constant {tensor.name!r} is not of the shape it says")
        constants[tensor.name] = array
    return constants


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
    constants = initializers(graph, what)
    _check_ports(graph, inputs, outputs, what)
    ranges: dict[str, Range] = dict(inputs)
    if not ranges.keys().isdisjoint(constants):
        raise ModelError(f"{what}: an input has a constant's name")
    for node in graph.node:
        if node.output[0] in ranges or node.output[0] in constants:
            raise ModelError(f"{what}: {node.op_type} has improper outputs")
        if node.op_type == "Cast" and node.input[0] in constants:
            constants[node.output[0]] = _cast_constant(node, constants, what)
            continue
        result = _step(node, ranges, constants, what)
        if len(result.low) > MAX_CHANNELS:
            raise ModelError(f"{what}: {node.op_type} makes more than {MAX_CHANNELS} channels")
        ranges[node.output[0]] = result
    for name, want in outputs.items():
        have = ranges.get(name)
        if have is None or len(have.low) != len(want.low) or not (have.whole and have.rounded):
            raise ModelError(f"{what}: output {name!r} is not {len(want.low)} integer channels")
        if have.zoom != want.zoom or have.kind != want.kind:
            raise ModelError(f"{what}: output {name!r} is of another grid or type")
        if (have.low < want.low).any() or (have.high > want.high).any():
            raise ModelError(f"{what}: output {name!r} may leave its range")


def _check_ports(
    graph: Any, inputs: Mapping[str, Range], outputs: Mapping[str, Range], what: str
) -> None:
    """Inputs and outputs are these: names, element types, rank and channels. Outputs are read by
    position, so their order counts."""
    declared = [i.name for i in graph.input]
    if set(declared) != set(inputs):
        raise ModelError(f"{what}: inputs are {sorted(declared)}, not {sorted(inputs)}")
    if [o.name for o in graph.output] != list(outputs):
        raise ModelError(f"{what}: outputs are not {list(outputs)}, in this order")
    for port in (*graph.input, *graph.output):
        want = inputs[port.name] if port.name in inputs else outputs[port.name]
        tensor = port.type.tensor_type
        extents = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        if tensor.elem_type != want.kind or len(extents) != 4 or extents[1] != len(want.low):
            raise ModelError(f"{what}: {port.name!r} is not declared with its type and channels")
        if extents[0] is not None or extents[2] is not None or extents[3] is not None:
            raise ModelError(f"{what}: {port.name!r} is declared with a fixed extent")


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
        return _concat(node, [_value(ranges, n, what) for n in node.input], what)
    if len(node.input) != {"Conv": 3, "Clip": 3, "Mul": 2}.get(kind, 1):
        raise ModelError(f"{what}: {kind} has {len(node.input)} inputs")
    x = _value(ranges, node.input[0], what)
    if x.kind != FLOAT:
        raise ModelError(f"{what}: {kind} on a tensor that was cast")
    if kind == "Round":
        # of sums: removes a kernel's error; of scaled values: half to even, in place of Floor
        return x.now(np.rint(x.low), np.rint(x.high), rounded=True, whole=True)
    if not x.rounded:
        raise ModelError(f"{what}: {kind} on sums of a Conv that no Round follows")
    if kind == "Conv":
        return _convolution(node, x, constants, what)
    if kind == "Mul":
        scale = _scale(node, len(x.low), constants, what)
        return x.now(x.low * scale, x.high * scale, whole=False)
    if kind == "Floor":
        return x.now(np.floor(x.low), np.floor(x.high), whole=True)
    if not x.whole:
        raise ModelError(f"{what}: {kind} on values that are not whole")
    if kind == "Clip":
        bottom, top = (_scalar(constants, name, what) for name in node.input[1:])
        if not bottom.is_integer() or not top.is_integer() or bottom > top:
            raise ModelError(f"{what}: Clip bounds are not whole")
        return x.now(np.clip(x.low, bottom, top), np.clip(x.high, bottom, top))
    if kind == "Abs":
        low = np.where((x.low <= 0) & (x.high >= 0), 0.0, np.minimum(np.abs(x.low), np.abs(x.high)))
        return x.now(low, x.peak)
    if kind == "DepthToSpace":
        a = attributes(node)
        size = a.get("blocksize", 0)
        if a.get("mode", b"DCR") != b"CRD" or not 1 <= size <= 16:
            raise ModelError(f"{what}: DepthToSpace must be of mode CRD")
        if len(x.low) % (size * size):
            raise ModelError(f"{what}: DepthToSpace does not divide the channels")
        return x.now(
            x.low.reshape(-1, size * size).min(1),
            x.high.reshape(-1, size * size).max(1),
            zoom=x.zoom * size,
        )
    # Cast: float to an integer type that holds the range
    limits = {
        UINT8: (0, 255),
        INT8: (-128, 127),
        INT16: (-(2**15), 2**15 - 1),
        FLOAT: (-(2**24), 2**24),
    }
    to = attributes(node).get("to")
    if to not in limits or x.low.min() < limits[to][0] or x.high.max() > limits[to][1]:
        raise ModelError(f"{what}: Cast does not hold its range")
    return x.now(x.low, x.high, kind=to)


def _concat(node: Any, parts: list[Range], what: str) -> Range:
    if attributes(node) != {"axis": 1}:
        raise ModelError(f"{what}: Concat must join channels")
    if sum(len(p.low) for p in parts) > MAX_CHANNELS:
        raise ModelError(f"{what}: Concat makes more than {MAX_CHANNELS} channels")
    if any(p.zoom != parts[0].zoom or p.kind != parts[0].kind for p in parts):
        raise ModelError(f"{what}: Concat of tensors of different grids or types")
    if not all(p.whole and p.rounded for p in parts):
        raise ModelError(f"{what}: Concat on values that are not whole")
    return parts[0].now(
        np.concatenate([p.low for p in parts]), np.concatenate([p.high for p in parts])
    )


def _scalar(constants: Mapping[str, Array], name: str, what: str) -> float:
    value = _constant(constants, name, what)
    if value.shape not in ((), (1,)) or value.dtype != np.float32:
        raise ModelError(f"{what}: {name!r} must be one float32 number")
    return float(value.reshape(()))


def _scale(node: Any, channels: int, constants: Mapping[str, Array], what: str) -> Bounds:
    """(channels,) powers of two by which a Mul scales."""
    scale = _constant(constants, node.input[1], what)
    if scale.dtype != np.float32 or (scale.size != 1 and scale.shape != (1, channels, 1, 1)):
        raise ModelError(f"{what}: Mul must scale by one number or one to the channel")
    powers = np.broadcast_to(scale.astype(np.float64).reshape(-1), (channels,))
    if (powers <= 0).any() or (powers > 1).any() or (powers < 2.0**-24).any():
        raise ModelError(f"{what}: Mul must scale by powers of two up to 1")
    if (np.frexp(powers)[0] != 0.5).any():
        raise ModelError(f"{what}: Mul must scale by powers of two")
    return powers


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
    w = _constant(constants, node.input[1], what)
    b = _constant(constants, node.input[2], what)
    if w.dtype != np.float32 or b.dtype != np.float32:
        raise ModelError(f"{what}: Conv must run in float32")
    _check_kernel(node, w, b, len(x.low), what)
    w, b = w.astype(np.float64), b.astype(np.float64)
    if (w != np.round(w)).any() or (b != np.round(b)).any():
        raise ModelError(f"{what}: Conv weights are not integers")
    if np.abs(w).max() > WEIGHT_PEAK:
        raise ModelError(f"{what}: Conv weights exceed int8")
    total = np.abs(w).sum((2, 3)) @ x.peak + np.abs(b)
    if (total >= SUM_BOUND).any():
        raise ModelError(f"{what}: a Conv sum may reach {total.max():.0f}, beyond 2^22")
    low, high = x.low, x.high
    if w.shape[2] > 1:  # zero padding adds the value 0 to every input's range
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    positive, negative = np.maximum(w, 0).sum((2, 3)), np.minimum(w, 0).sum((2, 3))
    return x.now(
        positive @ low + negative @ high + b, positive @ high + negative @ low + b, rounded=False
    )


def _check_kernel(node: Any, w: Array, b: Array, channels: int, what: str) -> None:
    """A dense convolution of stride 1, 1x1 or 3x3, that keeps the size."""
    a = attributes(node)
    if w.ndim != 4 or w.shape[1] != channels or b.shape != (w.shape[0],):
        raise ModelError(f"{what}: Conv weights do not fit their input")
    if w.shape[0] > MAX_CHANNELS or w.shape[2] != w.shape[3] or w.shape[2] not in (1, 3):
        raise ModelError(f"{what}: Conv must be 1x1 or 3x3")
    side = int(w.shape[2])
    if list(a.get("kernel_shape", [side] * 2)) != [side] * 2:
        raise ModelError(f"{what}: Conv says another kernel than its weights")
    for name in ("strides", "dilations"):
        if list(a.get(name, [1, 1])) != [1, 1]:
            raise ModelError(f"{what}: Conv must be dense, of stride 1")
    if a.get("group", 1) != 1:
        raise ModelError(f"{what}: Conv must be dense, of stride 1")
    if a.get("auto_pad", b"NOTSET") != b"NOTSET" or list(a.get("pads", [0] * 4)) != [side // 2] * 4:
        raise ModelError(f"{what}: Conv must pad to the same size")


CHAIN_OPERATORS = frozenset(("Conv", "QuantizeLinear", "DequantizeLinear", "Concat", "Transpose"))
MAX_SCALE_LOG2 = 30


@dataclass(frozen=True)
class _Levels:
    """A tensor of the chain: 8-bit levels, or (kind FLOAT) real numbers.

    exponent: log2 of the step, for real numbers that come from levels; None for sums of a Conv.
    """

    channels: int
    kind: int
    exponent: int | None = None
    colours_last: bool = False


@dataclass(frozen=True)
class _Weights:
    """Dequantised constants: integers, and log2 of their step per row."""

    integers: Array
    exponents: Array


def prove_quantised(graph_bytes: bytes, inputs: int, outputs: int, what: str) -> None:
    """Prove an int8 graph free of saturation and of inexact scales, and of the shape it must have.

    Every scale is a power of two, every weight at most 63, every sum below 2**24: integer kernels
    with or without VNNI, and float32 kernels, agree to the bit. It takes ``context``, uint8 of
    ``inputs`` channels, and gives one uint8 tensor with ``outputs`` channels as its last axis.
    """
    graph = check_operators(graph_bytes, CHAIN_OPERATORS, what)
    constants = initializers(graph, what)
    if [(i.name, i.type.tensor_type.elem_type) for i in graph.input] != [("context", UINT8)]:
        raise ModelError(f"{what}: the input must be context, uint8")
    if len(graph.output) != 1 or graph.output[0].type.tensor_type.elem_type != UINT8:
        raise ModelError(f"{what}: the output must be one tensor of uint8")
    tensors: dict[str, _Levels] = {"context": _Levels(inputs, UINT8)}
    weights: dict[str, _Weights] = {}
    if "context" in constants:
        raise ModelError(f"{what}: an input has a constant's name")
    for node in graph.node:
        name = node.output[0]
        if name in tensors or name in weights or name in constants:
            raise ModelError(f"{what}: {node.op_type} has improper outputs")
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            weights[name] = _dequantised_constant(node, constants, what)
            continue
        for source in node.input if node.op_type == "Concat" else node.input[:1]:
            if source not in tensors:
                raise ModelError(f"{what}: tensor {source!r} is used before it is computed")
            if tensors[source].colours_last:
                raise ModelError(f"{what}: {node.op_type} after the Transpose")
        tensors[name] = _chain_step(node, tensors, weights, constants, what)
    result = tensors.get(graph.output[0].name)
    if result is None or result != _Levels(outputs, UINT8, None, True):
        raise ModelError(f"{what}: the output is not uint8 of {outputs} channels, channels last")


def _chain_step(
    node: Any,
    tensors: Mapping[str, _Levels],
    weights: Mapping[str, _Weights],
    constants: Mapping[str, Array],
    what: str,
) -> _Levels:
    x = tensors[node.input[0]]
    if node.op_type == "Conv":
        return _chain_convolution(node, x, weights, what)
    if node.op_type == "QuantizeLinear":
        if x.kind != FLOAT:
            raise ModelError(f"{what}: QuantizeLinear on levels")
        _exponent(node, constants, what)
        return _Levels(x.channels, _zero_kind(node, constants, what))
    if x.kind == FLOAT:
        raise ModelError(f"{what}: {node.op_type} on real numbers")
    if node.op_type == "DequantizeLinear":
        if _zero_kind(node, constants, what) != x.kind:
            raise ModelError(f"{what}: DequantizeLinear with a zero point of another type")
        return _Levels(x.channels, FLOAT, _exponent(node, constants, what))
    if node.op_type == "Concat":
        parts = [tensors[n] for n in node.input]
        channels = sum(p.channels for p in parts)
        if attributes(node) != {"axis": 1} or channels > MAX_CHANNELS:
            raise ModelError(f"{what}: Concat must join channels, at most {MAX_CHANNELS}")
        if any(p.kind != x.kind for p in parts):
            raise ModelError(f"{what}: Concat of different types")
        return _Levels(channels, x.kind)
    if attributes(node) != {"perm": [0, 2, 3, 1]}:
        raise ModelError(f"{what}: Transpose must put the channels last")
    return _Levels(x.channels, x.kind, None, True)


def _powers(scale: Array, what: str) -> Array:
    """log2 of scales, which must be powers of two."""
    values = scale.astype(np.float64)
    mantissa, exponent = np.frexp(values)
    if scale.dtype != np.float32 or not (mantissa == 0.5).all():
        raise ModelError(f"{what}: a scale is not a power of two")
    exponent = exponent.astype(np.int64) - 1
    if np.abs(exponent).max() > MAX_SCALE_LOG2:
        raise ModelError(f"{what}: a scale is beyond 2^{MAX_SCALE_LOG2}")
    return exponent


def _exponent(node: Any, constants: Mapping[str, Array], what: str) -> int:
    """log2 of a tensor's one scale."""
    scale = _constant(constants, node.input[1], what)
    if scale.shape not in ((), (1,)):
        raise ModelError(f"{what}: {node.op_type} of a tensor must have one scale")
    return int(_powers(scale, what).reshape(()))


def _zero_kind(node: Any, constants: Mapping[str, Array], what: str) -> int:
    """Element type of a tensor's levels, which is its zero point's."""
    if len(node.input) != 3:
        raise ModelError(f"{what}: {node.op_type} needs a zero point")
    zero = _constant(constants, node.input[2], what)
    if zero.shape not in ((), (1,)) or zero.dtype not in (np.uint8, np.int8):
        raise ModelError(f"{what}: a zero point is not one 8-bit integer")
    return UINT8 if zero.dtype == np.uint8 else INT8


def _dequantised_constant(node: Any, constants: Mapping[str, Array], what: str) -> _Weights:
    """Weights (int8) or biases (int32) with a scale per row and no zero point."""
    value = constants[node.input[0]]
    if len(node.input) != 2 or value.dtype not in (np.int8, np.int32) or value.ndim not in (1, 4):
        raise ModelError(f"{what}: weights must be int8, biases int32, without a zero point")
    scale = _constant(constants, node.input[1], what)
    if scale.shape != value.shape[:1] or attributes(node).get("axis") != 0:
        raise ModelError(f"{what}: weights must have a scale per row")
    return _Weights(value.astype(np.int64), _powers(scale, what))


def _chain_convolution(
    node: Any, x: _Levels, weights: Mapping[str, _Weights], what: str
) -> _Levels:
    if len(node.input) != 3 or node.input[1] not in weights or node.input[2] not in weights:
        raise ModelError(f"{what}: Conv weights are not quantised constants")
    if x.exponent is None:
        raise ModelError(f"{what}: Conv on numbers that are not levels")
    w, b = weights[node.input[1]], weights[node.input[2]]
    _check_kernel(node, w.integers, b.integers, x.channels, what)
    if np.abs(w.integers).max() > CHAIN_WEIGHT_PEAK:
        raise ModelError(f"{what}: Conv weights exceed {CHAIN_WEIGHT_PEAK}")
    if (b.exponents != w.exponents + x.exponent).any():
        raise ModelError(f"{what}: a bias is not in the steps of its sum")
    if (255 * np.abs(w.integers).sum((1, 2, 3)) + np.abs(b.integers)).max() >= 2**24:
        raise ModelError(f"{what}: a Conv sum may exceed 2^24")
    return _Levels(len(w.integers), FLOAT)


FLOAT_OPERATORS = frozenset(("Conv", "Relu", "Mul", "Concat", "Cast"))
"""Operators of encoder networks, whose results decide no probability."""
