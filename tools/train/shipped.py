"""Weights back out of model files: training can go on from what a release ships.

Integer networks come back as the integers that they are, the encoder's as the float16 that it was
stored in. What model files do not hold (the spread of hyper-latents as a function of the gain,
deviations of latents that no network sees) is estimated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import load_model_from_string, numpy_helper

from tools.train.integer import IntegerConv
from tools.train.lapping import border_filter
from tools.train.network import SCALE_LOG2_OF_CLASS_1, TileNetwork
from tools.train.settings import NetworkSettings
from tools.train.tables import SCALE_STEPS_PER_OCTAVE
from wsicodec.models import container

Array = np.ndarray[Any, Any]


class _Graph:
    """Constants of a graph, and the layers that use them, in order."""

    def __init__(self, graph_bytes: bytes) -> None:
        self.graph = load_model_from_string(graph_bytes).graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.scales: dict[str, Array] = {}
        for node in self.graph.node:
            if node.input[0] not in self.constants:
                continue
            if node.op_type == "Cast":
                self.constants[node.output[0]] = self.constants[node.input[0]]
            elif node.op_type == "DequantizeLinear":
                self.constants[node.output[0]] = self.constants[node.input[0]]
                self.scales[node.output[0]] = self.constants[node.input[1]]

    def _reader(self, node: Any) -> Any:
        """The first node that reads what a node gives, or None."""
        name = node.output[0] if node is not None else None
        return next((n for n in self.graph.node if name in n.input), None)

    def layers(self) -> list[tuple[Array, Array, Array]]:
        """(weight, bias, log2 of what follows each row) of every Conv, as stored."""
        found = []
        for node in self.graph.node:
            if node.op_type != "Conv":
                continue
            weight, bias = (self.constants[name] for name in node.input[1:])
            scale = np.ones(len(weight))
            if node.input[1] in self.scales:
                scale = self.scales[node.input[1]].astype(float)
            else:
                after = self._reader(self._reader(node))  # Conv -> Round -> Mul
                if after is not None and after.op_type == "Mul":
                    factor = self.constants[after.input[1]].reshape(-1).astype(float)
                    scale = np.broadcast_to(factor, scale.shape)
            found.append((weight.astype(float), bias.astype(float), np.log2(scale)))
        return found

    def scale(self, channels: int) -> Array:
        """(channels,): the factor of the encoder network's first channels."""
        shape = (1, channels, 1, 1)
        return (
            next(c for c in self.constants.values() if c.shape == shape).reshape(-1).astype(float)
        )


def _restore(layer: IntegerConv, stored: tuple[Array, Array, Array], chain: bool) -> None:
    """Give a layer the stored integers: y = (W x + b) 2^-shift, shift = k + in - out."""
    weight, bias, log2 = stored
    k = -log2 if chain else -log2 - layer.in_exponent + layer.out_exponent
    layer.weight.data = torch.from_numpy(weight * 2.0 ** -k[:, None, None, None]).float()
    layer.bias.data = torch.from_numpy(bias * 2.0 ** -(k + layer.in_exponent)).float()


@torch.no_grad()
def state_of_model(decoder: bytes, encoder: bytes) -> dict[str, Any]:
    """What a checkpoint holds (``network``, ``average``, ``step``, ``elapsed``), from the files of
    a decoder and of its encoder.

    Raises ValueError where the two do not belong together, do not say their network's settings or
    are of another transform.
    """
    d, e = container.parse(decoder), container.parse(encoder)
    if e.header.get("decoder") != d.digest.hex() or "network" not in e.header:
        raise ValueError("not a decoder and its encoder, made by tools.export")
    if "order" not in d.tensors:
        raise ValueError("the model's transform is not one of cosines: no tensor 'order'")
    net = TileNetwork(NetworkSettings.from_dict(e.header["network"]))
    n = net.settings

    hyper = _Graph(d.graphs["hyper"]).layers()
    _restore(net.h_s_expand, hyper[0], False)
    _restore(net.h_s, hyper[1], False)
    for stage in net.stages:
        layers = [m for m in (stage.reduce, stage.context, stage.middle, stage.scale) if m]
        layers += [stage.mean] if stage.mean is not None else []
        stored = _Graph(d.graphs[f"stage{stage.index}"]).layers()
        for layer, values in zip(layers, stored, strict=True):
            _restore(layer, values, False)
    chain = _Graph(d.graphs["chain"]).layers()
    for layer, values in zip([*net.chain, net.chain_out], chain, strict=True):
        _restore(layer, values, True)

    def place(module: Any, weight: Array, bias: Array) -> None:
        module.weight.data = torch.from_numpy(weight).float()
        module.bias.data = torch.from_numpy(bias).float()

    hyper_analysis = _Graph(e.graphs["hyper_analysis"])
    for module, values in zip((net.h_a[0], net.h_a[2]), hyper_analysis.layers(), strict=True):
        factor = 0.25 if module is net.h_a[2] else 1.0
        place(module, factor * values[0], factor * values[1])

    net.log_gain.data = -torch.from_numpy(np.log(d.tensors["inverse_gain"])).float()
    if "tilt" in d.tensors:
        net.tilt.data = torch.from_numpy(d.tensors["tilt"] / np.float32(SCALE_STEPS_PER_OCTAVE))
    net.order.copy_(torch.from_numpy(d.tensors["order"].astype(np.int64)))
    net.colours.copy_(torch.from_numpy(np.linalg.inv(d.tensors["colours"].astype(float))))
    net.mean.copy_(torch.from_numpy(d.tensors["mean"].copy()))
    if n.lapped:
        net.border.copy_(border_filter(torch.from_numpy(d.tensors["lapping"].T.astype(float))))
    known = 1 / hyper_analysis.scale(n.context_channels)
    net.deviation.fill_(float(known.min()))
    net.deviation[: len(known)] = torch.from_numpy(known).float()

    classes = d.tensors["z_classes"].astype(float)
    log = np.log(2) * ((classes - 1) / SCALE_STEPS_PER_OCTAVE + SCALE_LOG2_OF_CLASS_1)
    slope, middle = np.polyfit((np.arange(256) - 128) / 64, log, 1)
    net.z_log_scale.data = torch.from_numpy(middle).float()
    net.z_log_slope.data = torch.from_numpy(slope).float()
    trained = e.header.get("trained", {})
    return {
        "network": n.to_dict(),
        "average": net.state_dict(),
        "step": int(trained.get("steps", 0)),
        "elapsed": float(trained.get("minutes", 0)),
    }


def read_start(path: Path) -> dict[str, Any]:
    """A checkpoint to start from, or a model: the decoder's file, its encoder's beside it."""
    if path.suffix != ".wscm":
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    return state_of_model(path.read_bytes(), path.with_suffix(".encoder.wscm").read_bytes())
