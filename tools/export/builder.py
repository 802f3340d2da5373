"""Writes the ONNX graphs of a model node by node, from arrays: no torch here.

Written out by hand rather than traced: each graph must hold just the operators that the proof
allows, in the form that docs/format.md, "Integer networks", gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, UINT8, INT8, INT16 = (
    TensorProto.FLOAT,
    TensorProto.UINT8,
    TensorProto.INT8,
    TensorProto.INT16,
)
OPSET = 17
IR_VERSION = 9

Array = np.ndarray[Any, Any]
Ports = dict[str, tuple[int, list[Any]]]
"""Inputs or outputs by name: element type and extents (names are free extents)."""


def grid(channels: int, rows: str = "rows", columns: str = "columns") -> list[Any]:
    """Extents of a tensor of ``channels`` on a grid of free size."""
    return ["batch", channels, rows, columns]


class GraphBuilder:
    """Collects nodes and constants; tensors are names.

    rounding: of integer layers, "Round" (half to even) or "Floor" (a rounding half then belongs
    into the bias).
    """

    def __init__(self, name: str, rounding: str = "Round") -> None:
        self.name, self.rounding = name, rounding
        self.nodes: list[Any] = []
        self.constants: dict[str, Array] = {}

    def constant(self, value: Array, hint: str) -> str:
        name = f"{hint}_{len(self.constants)}"
        self.constants[name] = value
        return name

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def integer_sums(self, x: str, weight: Array, bias: Array) -> str:
        """Conv -> Round. weight: (out, in, k, k) within int8, bias: (out,)."""
        w = self.add("Cast", self.constant(weight.astype(np.int8), "w"), to=FLOAT)
        b = self.add("Cast", self.constant(bias.astype(np.int32), "b"), to=FLOAT)
        side = weight.shape[-1]
        y = self.add("Conv", x, w, b, kernel_shape=[side, side], pads=[side // 2] * 4)
        return self.add("Round", y)

    def shifted(self, x: str, shift: Array) -> str:
        """x 2^-shift, not yet rounded. shift: (channels,)"""
        scale = np.exp2(-shift.astype(np.float64)).astype(np.float32)
        return self.add("Mul", x, self.constant(scale.reshape(1, -1, 1, 1), "scale"))

    def clip(self, x: str, low: int, high: int, output: str | None = None) -> str:
        bounds = (self.constant(np.full((), v, np.float32), "bound") for v in (low, high))
        return self.add("Clip", x, *bounds, output=output)

    def integer_conv(
        self,
        x: str,
        layer: tuple[Array, Array, Array],
        bounds: tuple[int, int],
        *,
        cast: int | None = None,
        output: str | None = None,
    ) -> str:
        """clip(rint(2^-shift (W * x + b)), low, high), cast where asked.

        layer: weight (out, in, k, k) within int8, bias (out,), shift (out,).
        """
        weight, bias, shift = layer
        y = self.add(self.rounding, self.shifted(self.integer_sums(x, weight, bias), shift))
        y = self.clip(y, *bounds, output=None if cast else output)
        return self.add("Cast", y, to=cast, output=output) if cast else y

    def scale(self, exponent: int) -> str:
        return self.constant(np.full((), 2.0**exponent, np.float32), "scale")

    def quantised_conv(
        self,
        x: str,
        layer: tuple[Array, Array, Array],
        levels: tuple[int, np.uint8 | np.int8],
        out: tuple[int, np.uint8 | np.int8],
    ) -> str:
        """A Conv of the 8-bit chain between DequantizeLinear and QuantizeLinear.

        layer: integer weight (out, in, k, k), integer bias (out,), log2 of each row's step.
        levels, out: log2 of the step, and zero point, of the input's and the output's levels.
        """
        weight, bias, row = layer
        x = self.add("DequantizeLinear", x, self.scale(levels[0]), self._zero(levels[1]))
        row_scale = np.exp2(row.astype(np.float64))
        w_scale = self.constant(row_scale.astype(np.float32), "scale")
        w = self.constant(weight.astype(np.int8), "w")
        w = self.add("DequantizeLinear", w, w_scale, axis=0)
        b_scale = self.constant((row_scale * 2.0 ** levels[0]).astype(np.float32), "scale")
        b = self.constant(bias.astype(np.int32), "b")
        b = self.add("DequantizeLinear", b, b_scale, axis=0)
        side = weight.shape[-1]
        y = self.add("Conv", x, w, b, kernel_shape=[side, side], pads=[side // 2] * 4)
        return self.add("QuantizeLinear", y, self.scale(out[0]), self._zero(out[1]))

    def _zero(self, zero_point: np.uint8 | np.int8) -> str:
        return self.constant(np.asarray(zero_point), "zero")

    def model(self, inputs: Ports, outputs: Ports) -> Any:
        """The ONNX model, unchecked: tests break models on purpose."""
        info = helper.make_tensor_value_info
        constants = {n: np.asarray(v, order="C") for n, v in self.constants.items()}
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [info(n, t, s) for n, (t, s) in inputs.items()],
            [info(n, t, s) for n, (t, s) in outputs.items()],
            [numpy_helper.from_array(v, n) for n, v in constants.items()],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        model.producer_name = "wsicodec"
        return model

    def finish(self, inputs: Ports, outputs: Ports) -> bytes:
        """The ONNX model's bytes, checked."""
        model = self.model(inputs, outputs)
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString())
