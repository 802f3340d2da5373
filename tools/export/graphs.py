"""Cuts the trained network into the shipped ONNX graphs, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from tools.export.builder import FLOAT, INT8, INT16, UINT8, GraphBuilder, grid
from tools.train.integer import IntegerConv
from tools.train.network import STEP_PEAK, STEP_UNIT, Stage, TileNetwork

Array = np.ndarray[Any, Any]


class NetworkBuilder(GraphBuilder):
    """A graph builder that takes layers of the trained network."""

    def layer(
        self, x: str, layer: IntegerConv, *, cast: int | None = None, output: str | None = None
    ) -> str:
        """An integer layer."""
        rows = layer.rows()
        arrays = (rows.weight.numpy(), rows.bias.numpy(), rows.shift.numpy())
        return self.integer_conv(x, arrays, (rows.low, rows.high), cast=cast, output=output)

    def half(self, value: Array, hint: str) -> str:
        """A weight stored in float16, used in float32."""
        stored = self.constant(value.astype(np.float16), hint)
        return self.add("Cast", stored, to=FLOAT)

    def float_conv(
        self, x: str, weight: Array, bias: Array, stride: int = 1, pad: int | None = None
    ) -> str:
        """A layer of the encoder's network."""
        side = weight.shape[-1]
        w = self.half(weight, "w")
        b = self.constant(bias.astype(np.float32), "b")
        p = side // 2 if pad is None else pad
        return self.add(
            "Conv", x, w, b, kernel_shape=[side, side], pads=[p] * 4, strides=[stride] * 2
        )


def hyper_graph(net: TileNetwork) -> bytes:
    """z, plane -> h, step."""
    n = net.settings
    g = NetworkBuilder("hyper")
    x = g.layer("z", net.h_s_expand)
    x = g.add("DepthToSpace", x, blocksize=2, mode="CRD")
    g.layer(g.add("Concat", x, "plane", axis=1), net.h_s, output="h")
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
    g = NetworkBuilder(f"stage{stage.index}")
    inputs = {"h": (FLOAT, grid(n.hyper)), "plane": (FLOAT, grid(1))}
    parts = ["h"]
    if stage.context is not None:
        inputs["context"] = (FLOAT, grid(stage.seen))
        c = g.add("Abs", "context")
        if stage.signed:
            c = g.add("Concat", "context", c, axis=1)
        if stage.reduce is not None:
            c = g.layer(c, stage.reduce)
        parts.append(g.layer(c, stage.context))
    m = g.layer(g.add("Concat", *parts, "plane", axis=1), stage.middle)
    g.layer(g.add("Concat", m, "plane", axis=1), stage.scale, cast=UINT8, output="class")
    outputs = {"class": (UINT8, grid(stage.size))}
    if stage.mean is not None:
        g.layer(m, stage.mean, cast=INT16, output="mean")
        outputs["mean"] = (INT16, grid(stage.size))
    return g.finish(inputs, outputs)


def chain_graph(net: TileNetwork) -> bytes:
    """context (last channel the gain plane) -> correction of the context channels, channels last;
    both uint8 with 128 for zero."""
    n = net.settings
    g = NetworkBuilder("chain")
    x, exponent = "context", net.chain[0].in_exponent
    zero = np.uint8(128)
    for layer in [*net.chain, net.chain_out]:
        rows = layer.rows()
        weight, bias, shift = (t.numpy() for t in (rows.weight, rows.bias, rows.shift))
        # shift = k + in - out, and a row's weights are in steps of 2**-k
        row = -(shift - layer.in_exponent + layer.out_exponent)
        after = np.uint8(128 if layer is net.chain_out else 0)
        x = g.quantised_conv(
            x, (weight, bias, row), (-exponent, zero), (-layer.out_exponent, after)
        )
        exponent, zero = layer.out_exponent, after
    g.add("Transpose", x, perm=[0, 2, 3, 1], output="correction")
    return g.finish(
        {"context": (UINT8, grid(n.context_channels + 1))},
        {"correction": (UINT8, ["batch", "rows", "columns", n.context_channels])},
    )


def hyper_analysis_graph(net: TileNetwork) -> bytes:
    """y (leading latents), plane -> hyper-latents before rounding, all but the first."""
    n = net.settings
    g = NetworkBuilder("hyper_analysis")
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
