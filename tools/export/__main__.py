"""Export a checkpoint: ``python -m tools.export CHECKPOINT --data DIR --out DIR --name he-fast``.

Writes NAME.wscm (decoder) and NAME.encoder.wscm. Proves the integer networks, fits the symbol
tables to the training images, and checks that the exported graphs give the trained network's
pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.export.fit import count_symbols, fitted_hyper_classes, typical_qualities
from tools.export.model import (
    decoder_file,
    encoder_file,
    hyper_classes,
    load_network,
    quality_gains,
)
from tools.train.images import Sampler, load_sources
from tools.train.tables import fitted_tables
from wsicodec.bitstream import MAX_TILT
from wsicodec.codec.network import decode_tile, encode_tile
from wsicodec.models.decoder import GAINS, load_decoder
from wsicodec.models.encoder import load_encoder
from wsicodec.models.factors import gain_of_level

TYPICAL_CROPS = 40
LAST_STAGE_GAIN = 66
"""Encoders try the last stage from this gain on, and keep it where it is worth its bits. What a
tilt adds to gains comes to it."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="training images, for the symbol tables")
    parser.add_argument("--out", required=True, help="folder for the model files")
    parser.add_argument("--name", default="he-fast")
    parser.add_argument("--crops", type=int, default=400, help="crops to fit the tables on")
    parser.add_argument(
        "--diagnostic-gain",
        type=int,
        default=60,
        help="gain of quality 70; a tilt adds to it what it makes steps coarser",
    )
    parser.add_argument("--strength", type=float, default=0.7, help="of the adaptive step, 0 ... 1")
    parser.add_argument("--lagrange", type=float, default=5.0, help="bits per squared step")
    parser.add_argument("--rgb", type=float, default=0.4, help="errors weighed as in RGB, 0 ... 1")
    parser.add_argument(
        "--tilt", type=int, default=8, choices=range(MAX_TILT + 1), metavar="T",
        help=f"of steps, 0 (for SSIM) ... {MAX_TILT} (for squared error)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    net, state = load_network(arguments.checkpoint)
    header = {
        "name": arguments.name,
        "licence": "BSD-3-Clause",
        "trained": {"steps": state["step"], "minutes": round(state["elapsed"], 1)},
    }
    tables, z_classes = net.search.tables, hyper_classes(net)
    first = decoder_file(net, header, tables, z_classes)
    decoder = load_decoder(first)
    beside, full = (gain_of_level(decoder.factors[t]) for t in (arguments.tilt, MAX_TILT))
    most = GAINS - 1 - max(full - beside, 0)  # so that no tilt asks for a finer gain than there is
    diagnostic, last_stage = arguments.diagnostic_gain + beside, LAST_STAGE_GAIN + beside
    qualities = quality_gains(arguments.diagnostic_gain, beside, most)
    sampler = Sampler(load_sources(Path(arguments.data)), 256, 7)

    def encoder_of(decoder_bytes: bytes, typical: Any = None) -> bytes:
        return encoder_file(
            net, header, decoder_bytes, qualities, last_stage, arguments.strength,
            arguments.lagrange, arguments.rgb, arguments.tilt, typical,
        )  # fmt: skip

    if arguments.crops:
        encoder = load_encoder(encoder_of(first))
        span = (int(qualities[0]), int(qualities[-1]))
        counts, squares = count_symbols(
            sampler, decoder, encoder, arguments.crops, span, diagnostic
        )
        tables = fitted_tables(counts)
        z_classes = fitted_hyper_classes(squares, z_classes)
    decoder_bytes = decoder_file(net, header, tables, z_classes)
    encoder_bytes = encoder_of(decoder_bytes)
    decoder, encoder = load_decoder(decoder_bytes), load_encoder(encoder_bytes)
    if arguments.crops:
        typical = typical_qualities(sampler, decoder, encoder, min(arguments.crops, TYPICAL_CROPS))
        encoder_bytes = encoder_of(decoder_bytes, typical)
        encoder = load_encoder(encoder_bytes)

    image = sampler.one()
    for gain in (40, 90, 180):
        tile = encode_tile(image, decoder, encoder, gain)
        ours = decode_tile(tile, decoder).astype(int)
        stages = len(net.settings.stages) - (gain < last_stage)
        with torch.no_grad():
            x = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32)) - 128
            aims = (gain, arguments.strength, arguments.tilt / MAX_TILT)
            gains, strengths, shares = (torch.tensor([float(v)]) for v in aims)
            x_hat, rate = net(x, gains, strengths, stages, shares)
        theirs = np.clip(np.rint(x_hat[0].numpy().transpose(1, 2, 0) + 128), 0, 255).astype(int)
        apart = np.abs(ours - theirs)
        bpp = 8 * len(tile.pack()) / image[..., 0].size
        print(
            f"gain {gain}: {bpp:.3f} bpp coded, {float(rate.total):.3f} by entropy of the trained "
            f"network; pixels apart by {apart.mean():.3f} on average, {apart.max()} at most"
        )
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{arguments.name}.wscm").write_bytes(decoder_bytes)
    (out / f"{arguments.name}.encoder.wscm").write_bytes(encoder_bytes)
    print(f"decoder {len(decoder_bytes)} bytes, {decoder.digest.hex()}")
    print(f"encoder {len(encoder_bytes)} bytes, {encoder.digest.hex()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
