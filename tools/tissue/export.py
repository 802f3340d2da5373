"""Writes a trained tissue network as the ONNX file that the package ships.

    python -m tools.tissue.export /tmp/tissue.pt --out wsicodec/tissue/shipped/tissue.onnx

Batch normalisation is folded into the convolutions, weights are kept as float16, which onnxruntime
widens once on loading. Prints size and SHA-256 for docs/tissue.md and wsicodec/tissue/network.py.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.export.builder import FLOAT, GraphBuilder, grid
from tools.tissue.network import TissueNet, Unit


def graph_of(network: TissueNet) -> bytes:
    """The ONNX file: ``features`` (N, 6, rows, columns) to ``tissue`` at half the resolution."""
    builder = GraphBuilder("tissue")

    def conv(x: str, weight: torch.Tensor, bias: torch.Tensor, **attributes: Any) -> str:
        w, b = (
            builder.add(
                "Cast", builder.constant(t.detach().numpy().astype(np.float16), hint), to=FLOAT
            )
            for t, hint in ((weight, "w"), (bias, "b"))
        )
        side = weight.shape[-1]
        return builder.add(
            "Conv", x, w, b, kernel_shape=[side, side], pads=[side // 2] * 4, **attributes
        )

    def unit(x: str, module: Unit) -> str:
        weight, bias = module.folded()
        stride = module.conv.stride[0]
        x = conv(x, weight, bias, strides=[stride, stride], group=module.conv.groups)
        return builder.add("Relu", x)

    x, skips = "features", []
    for units in network.down:
        for module in units:
            x = unit(x, module)
        skips.append(x)
    skips.pop()
    for units in network.up:
        # every value four times, then spread: each cell becomes two by two
        x = builder.add("Concat", x, x, x, x, axis=1)
        x = builder.add("DepthToSpace", x, blocksize=2, mode="DCR")
        x = builder.add("Concat", x, skips.pop(), axis=1)
        for module in units:
            x = unit(x, module)
    head = network.head
    conv(x, head.weight, head.bias, output="tissue")
    inputs, outputs = grid(6), grid(1, "half_rows", "half_columns")
    return builder.finish({"features": (FLOAT, inputs)}, {"tissue": (FLOAT, outputs)})


def main() -> None:
    """Convert one file of weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    saved = torch.load(arguments.weights, weights_only=True)
    network = TissueNet().eval()
    network.load_state_dict(saved["weights"])
    data = graph_of(network)
    arguments.out.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    minutes = saved.get("minutes", float("nan"))
    print(f"{len(data)} bytes, SHA-256 {digest}, {saved['steps']} steps in {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
