"""Cuts a trained network into a decoder and an encoder model file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tools.export import graphs
from tools.train.lapping import HALF, odd_part
from tools.train.network import TileNetwork
from tools.train.settings import NetworkSettings
from tools.train.tables import SCALE_LOG2_OF_CLASS_1, SCALE_STEPS_PER_OCTAVE
from wsicodec.codec.protocol import DEFAULT_QUALITY
from wsicodec.entropy.tables import SymbolTables
from wsicodec.models import container
from wsicodec.models.decoder import GAINS
from wsicodec.models.factors import TILT_PEAK

Array = np.ndarray[Any, Any]


def load_network(checkpoint: str) -> tuple[TileNetwork, dict[str, Any]]:
    """The averaged network of a checkpoint, and the checkpoint's other contents."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    net = TileNetwork(NetworkSettings.from_dict(state["network"]))
    net.load_state_dict(state["average"])
    return net.eval(), state


def hyper_classes(net: TileNetwork) -> Array:
    """(256, z channels) uint8: class of each hyper-latent at each gain."""
    scale = net.hyper_scale(torch.arange(256).float()).detach().numpy().reshape(256, -1)
    index = np.round(SCALE_STEPS_PER_OCTAVE * (np.log2(scale) - SCALE_LOG2_OF_CLASS_1)) + 1
    index = np.clip(index, 1, 127).astype(np.uint8)
    first = np.full((256, 1), 1 + round(SCALE_STEPS_PER_OCTAVE * 4.0), np.uint8)  # sigma 2.4
    return np.concatenate([first, index], 1) if index.shape[1] < net.settings.z_channels else index


def decoder_file(
    net: TileNetwork, header: dict[str, Any], tables: SymbolTables, z_classes: Array
) -> bytes:
    """The decoder model's bytes.

    Raises ValueError for a network that corrects pixels: model files have no place for it yet.
    """
    n = net.settings
    if n.refine:
        raise ValueError("a network that corrects pixels (refine) cannot be exported yet")
    gain = np.exp(net.log_gain.detach().double().numpy())
    deviation = net.deviation.double().numpy()
    means = n.channels_of(n.mean_stages)
    contexts = n.context_channels
    # docs/format.md: mean factor d k 2^8, context factor 2^(7 - 255/32 + 20) / (k d)
    mean_factor = np.round(deviation[:means] * gain[:means] * 2**8)
    context_factor = np.round(2 ** (27 - 255 / 32) / (gain[:contexts] * deviation[:contexts]))
    octaves = net.tilted(torch.ones(1))[0].detach().numpy()
    tilt = np.clip(np.rint(SCALE_STEPS_PER_OCTAVE * octaves), -TILT_PEAK, TILT_PEAK)
    kmac = net.kmac_per_pixel()
    lapping = odd_part(net.border).T if n.lapped else torch.eye(HALF)
    colours = torch.linalg.inv(net.colours.double())
    head = {
        "kind": "decoder",
        "architecture": {
            "block": n.block,
            "stages": [list(stage) for stage in n.stages],
            "mean_stages": n.mean_stages,
            "context_channels": contexts,
            "z_channels": n.z_channels,
            "hyper": n.hyper,
        },
        "kmac_per_pixel": round(sum(kmac.values()), 2),
        **header,
    }
    parts = {"hyper": graphs.hyper_graph(net), "chain": graphs.chain_graph(net)}
    for stage in net.stages:
        parts[f"stage{stage.index}"] = graphs.stage_graph(net, stage)
    return container.pack(
        head,
        parts,
        {
            "table_radii": tables.radii,
            "table_cdf": tables.cdf,
            "z_classes": z_classes,
            "mean_factor": mean_factor.astype(np.int32),
            "context_factor": context_factor.astype(np.int32),
            "inverse_gain": (1 / gain).astype(np.float32),
            "tilt": tilt.astype(np.int8),
            "order": net.order.numpy().astype(np.uint16),
            "colours": colours.float().numpy(),
            "mean": net.mean.numpy(),
            "lapping": lapping.float().numpy(),
        },
    )


def encoder_file(
    net: TileNetwork,
    header: dict[str, Any],
    decoder: bytes,
    quality_gain: Array,
    last_stage_gain: int,
    step_strength: float,
    lagrange: float,
    rgb: float,
    tilt: int,
    typical: Array | None = None,
) -> bytes:
    """The encoder model's bytes, bound to a decoder by its digest.

    tilt: of tiles, 0 ... 16. typical: (2, points) decibels (PSNR, SSIM) at evenly spaced gains,
    where known.
    """
    n = net.settings
    stage_gain = np.zeros(len(n.stages), np.uint8)
    stage_gain[-1] = last_stage_gain
    head = {
        "kind": "encoder",
        "decoder": container.digest_of(decoder).hex(),
        "turned": n.turned,
        "step_strength": step_strength,
        "lagrange": lagrange,
        "rgb": rgb,
        "tilt": tilt,
        "network": n.to_dict(),
        **header,
    }
    return container.pack(
        head,
        {"hyper_analysis": graphs.hyper_analysis_graph(net)},
        {
            "quality_gain": quality_gain.astype(np.uint8),
            "stage_gain": stage_gain,
            **({} if typical is None else {"typical": typical.astype(np.float32)}),
        },
    )


def quality_gains(
    diagnostic: int,
    beside: int = 0,
    most: int = GAINS - 1,
    low: int = 2,
    archive: int = 112,
    high: int = 236,
) -> Array:
    """(100,) gains that never decrease: ``diagnostic`` at the default quality, ``archive`` (an SSIM
    of 0.99) at 90. ``beside`` comes to all of them, for what a tilt makes steps coarser; none is
    above ``most``.

    Every second gain alone: a single step of a 32nd octave can be lost in what the search of
    symbols finds by luck, and size or PSNR fall by a trifle where quality rises.
    """
    quality = np.arange(1, 101)
    high = min(high, most - beside)
    gains = np.interp(quality, [1, DEFAULT_QUALITY, 90, 100], [low, diagnostic, archive, high])
    even = diagnostic + 2 * np.floor((gains - diagnostic) / 2).astype(int)
    return np.clip(even + beside, 0, most)
