"""Builds the shipped ONNX graphs from a trained network, layer by layer.

Written out by hand rather than traced: each graph must hold just the operators that the integer
proof allows, in the form that docs/format.md gives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tools.train.integer import IntegerConv
from tools.train.network import STEP_PEAK, STEP_UNIT, ResidualBlock, Stage, TileNetwork

FLOAT, UINT8, INT8, INT16 = (
    TensorProto.FLOAT,
    TensorProto.UINT8,
    TensorProto.INT8,
    TensorProto.INT16,
)
OPSET = 17
IR_VERSION = 9
Array = np.ndarray[Any, Any]


class GraphBuilder:
    """Collects nodes and constants; tensors are names."""

    def __init__(self, name: str) -> None:
        self.name = name
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

    def integer_conv(
        self, x: str, layer: IntegerConv, cast: int | None = None, output: str | None = None
    ) -> str:
        """Conv -> Round -> x 2^-shift -> Floor -> Clip (-> Cast)."""
        rows = layer.rows()
        w = self.add("Cast", self.constant(rows.weight.numpy().astype(np.int8), "w"), to=FLOAT)
        b = self.add("Cast", self.constant(rows.bias.numpy().astype(np.int32), "b"), to=FLOAT)
        side = rows.weight.shape[-1]
        y = self.add("Conv", x, w, b, kernel_shape=[side, side], pads=[side // 2] * 4)
        y = self.add("Round", y)
        scale = np.exp2(-rows.shift.numpy().astype(np.float64)).astype(np.float32)
        y = self.add("Mul", y, self.constant(scale.reshape(1, -1, 1, 1), "scale"))
        y = self.add("Floor", y)
        low = self.constant(np.float32(rows.low).reshape(()), "low")
        high = self.constant(np.float32(rows.high).reshape(()), "high")
        y = self.add("Clip", y, low, high, output=None if cast else output)
        return self.add("Cast", y, to=cast, output=output) if cast else y

    def half(self, value: Array, hint: str) -> str:
        """A weight stored in float16, used in float32."""
        stored = self.constant(value.astype(np.float16), hint)
        return self.add("Cast", stored, to=FLOAT)

    def float_conv(
        self, x: str, weight: Array, bias: Array, stride: int = 1, pad: int | None = None
    ) -> str:
        side = weight.shape[-1]
        w = self.half(weight, "w")
        b = self.constant(bias.astype(np.float32), "b")
        p = side // 2 if pad is None else pad
        return self.add(
            "Conv", x, w, b, kernel_shape=[side, side], pads=[p] * 4, strides=[stride] * 2
        )

    def finish(
        self, inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, tuple[int, list[Any]]]
    ) -> bytes:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [info(n, t, s) for n, (t, s) in inputs.items()],
            [info(n, t, s) for n, (t, s) in outputs.items()],
            [
                numpy_helper.from_array(np.ascontiguousarray(v), n)
                for n, v in self.constants.items()
            ],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        model.producer_name = "wsicodec"
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString())


def grid(channels: int, rows: str = "rows", columns: str = "columns") -> list[Any]:
    return ["batch", channels, rows, columns]


def hyper_graph(net: TileNetwork) -> bytes:
    """z, plane -> h, step."""
    n = net.settings
    g = GraphBuilder("hyper")
    x = g.integer_conv("z", net.h_s_expand)
    x = g.add("DepthToSpace", x, blocksize=2, mode="CRD")
    g.integer_conv(g.add("Concat", x, "plane", axis=1), net.h_s, output="h")
    # the adaptive step is the first hyper-latent, times its unit, the same for 2 x 2 positions
    unit = np.zeros((4, n.z_channels, 1, 1), np.int8)
    unit[:, 0] = STEP_UNIT
    w = g.add("Cast", g.constant(unit, "w"), to=FLOAT)
    b = g.add("Cast", g.constant(np.zeros(4, np.int32), "b"), to=FLOAT)
    step = g.add("Conv", "z", w, b, kernel_shape=[1, 1], pads=[0] * 4)
    step = g.add("DepthToSpace", g.add("Round", step), blocksize=2, mode="CRD")
    low, high = (g.constant(np.float32(v).reshape(()), "bound") for v in (-STEP_PEAK, STEP_PEAK))
    g.add("Cast", g.add("Clip", step, low, high), to=INT8, output="step")
    return g.finish(
        {"z": (FLOAT, grid(n.z_channels, "z_rows", "z_columns")), "plane": (FLOAT, grid(1))},
        {"h": (FLOAT, grid(n.hyper)), "step": (INT8, grid(1))},
    )


def stage_graph(net: TileNetwork, stage: Stage) -> bytes:
    """h, plane (, context) -> class (, mean)."""
    n = net.settings
    g = GraphBuilder(f"stage{stage.index}")
    inputs = {"h": (FLOAT, grid(n.hyper)), "plane": (FLOAT, grid(1))}
    parts = ["h"]
    if stage.context is not None:
        inputs["context"] = (FLOAT, grid(stage.seen))
        c = g.add("Abs", "context")
        if stage.signed:
            c = g.add("Concat", "context", c, axis=1)
        if stage.reduce is not None:
            c = g.integer_conv(c, stage.reduce)
        parts.append(g.integer_conv(c, stage.context))
    m = g.integer_conv(g.add("Concat", *parts, "plane", axis=1), stage.middle)
    g.integer_conv(g.add("Concat", m, "plane", axis=1), stage.scale, cast=UINT8, output="class")
    outputs = {"class": (UINT8, grid(stage.size))}
    if stage.mean is not None:
        g.integer_conv(m, stage.mean, cast=INT16, output="mean")
        outputs["mean"] = (INT16, grid(stage.size))
    return g.finish(inputs, outputs)


def raster_order(block: int) -> Array:
    """Index of sample (row, column, colour) within (colour, row, column)."""
    index = np.arange(3 * block * block).reshape(3, block, block)
    return index.transpose(1, 2, 0).reshape(-1)


def chain_graph(net: TileNetwork) -> bytes:
    """context (uint8, 128 is zero; last channel the gain plane) -> correction (int8)."""
    n = net.settings
    g = GraphBuilder("chain")
    zero_point = np.uint8(128)
    x, exponent = "context", net.chain[0].in_exponent
    layers = [*net.chain, net.chain_out]
    for i, layer in enumerate(layers):
        rows = layer.rows()
        last = i == len(layers) - 1
        weight, bias, shift = (t.numpy() for t in (rows.weight, rows.bias, rows.shift))
        if last:
            order = raster_order(n.block)
            weight, bias, shift = weight[order], bias[order], shift[order]
        # shift = k + in - out, and a row's weights are in steps of 2**-k
        row_scale = np.exp2(-(shift - layer.in_exponent + layer.out_exponent).astype(np.float64))
        scale = g.constant(np.float32(2.0**-exponent).reshape(()), "scale")
        zero = g.constant(np.array(zero_point, np.uint8), "zero")
        x = g.add("DequantizeLinear", x, scale, zero)
        w_scale = g.constant(row_scale.astype(np.float32), "scale")
        w = g.add("DequantizeLinear", g.constant(weight.astype(np.int8), "w"), w_scale, axis=0)
        b_scale = g.constant((row_scale * 2.0**-exponent).astype(np.float32), "scale")
        b = g.add("DequantizeLinear", g.constant(bias.astype(np.int32), "b"), b_scale, axis=0)
        side = weight.shape[-1]
        x = g.add("Conv", x, w, b, kernel_shape=[side, side], pads=[side // 2] * 4)
        exponent = layer.out_exponent
        scale = g.constant(np.float32(2.0**-exponent).reshape(()), "scale")
        if last:
            x = g.add("QuantizeLinear", x, scale, g.constant(np.array(0, np.int8), "zero"))
            g.add("Transpose", x, perm=[0, 2, 3, 1], output="correction")
        else:
            zero_point = np.uint8(0)
            x = g.add("QuantizeLinear", x, scale, g.constant(np.array(0, np.uint8), "zero"))
    return g.finish(
        {"context": (UINT8, grid(n.context_channels + 1))},
        {"correction": (INT8, ["batch", "rows", "columns", 3 * n.block**2])},
    )


def analysis_graph(net: TileNetwork) -> bytes:
    """blocks, linear, plane -> correction of the leading latents, in steps."""
    n = net.settings
    k, order = n.analysis_channels, raster_order(n.block)
    g = GraphBuilder("analysis")
    array = lambda t: t.detach().numpy()  # noqa: E731
    weight = array(net.features.weight).reshape(n.analysis, -1)[:, order] / 64
    f = g.float_conv("blocks", weight[:, :, None, None], array(net.features.bias))
    d = 1 / (array(net.deviation)[:k] + 4)
    scaled = g.add("Mul", "linear", g.constant(d.reshape(1, -1, 1, 1).astype(np.float32), "scale"))
    unit = g.constant(np.full((1, 1, 1, 1), 1 / 32, np.float32), "scale")
    x = g.add("Concat", scaled, f, g.add("Mul", "plane", unit), axis=1)
    x = g.float_conv(x, array(net.analysis[0].weight), array(net.analysis[0].bias))
    for block in list(net.analysis)[1:]:
        assert isinstance(block, ResidualBlock)
        y = g.add("Relu", g.float_conv(x, array(block.a.weight), array(block.a.bias)))
        x = g.add("Add", x, g.float_conv(y, array(block.b.weight), array(block.b.bias)))
    x = g.float_conv(x, 0.5 * array(net.analysis_out.weight), 0.5 * array(net.analysis_out.bias))
    g.nodes[-1].output[0] = "correction"
    return g.finish(
        {
            "blocks": (FLOAT, grid(3 * n.block**2)),
            "linear": (FLOAT, grid(k)),
            "plane": (FLOAT, grid(1)),
        },
        {"correction": (FLOAT, grid(k))},
    )


def hyper_analysis_graph(net: TileNetwork) -> bytes:
    """y (leading latents), plane -> hyper-latents before rounding, all but the first."""
    n = net.settings
    g = GraphBuilder("hyper_analysis")
    d = 1 / net.deviation.numpy()[: n.context_channels]
    y = g.add("Mul", "y", g.constant(d.reshape(1, -1, 1, 1).astype(np.float32), "scale"))
    unit = g.constant(np.full((1, 1, 1, 1), 1 / 32, np.float32), "scale")
    x = g.add("Concat", y, g.add("Mul", "plane", unit), axis=1)
    a, b = net.h_a[0], net.h_a[2]
    x = g.add("Relu", g.float_conv(x, a.weight.detach().numpy(), a.bias.detach().numpy()))
    g.float_conv(x, 4 * b.weight.detach().numpy(), 4 * b.bias.detach().numpy(), stride=2, pad=0)
    g.nodes[-1].output[0] = "z"
    return g.finish(
        {"y": (FLOAT, grid(n.context_channels)), "plane": (FLOAT, grid(1))},
        {"z": (FLOAT, grid(n.z_channels - 1, "z_rows", "z_columns"))},
    )
