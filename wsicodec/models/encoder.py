"""An encoder model: how symbols are chosen. It decides nothing a decoder must know.

Kept apart from the decoder model, so that a better encoder leaves the identity of decoders, and
all files written before, as they are.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import MAX_TILT
from wsicodec.errors import ModelError
from wsicodec.models import container
from wsicodec.models.decoder import GAINS, DecoderModel
from wsicodec.models.factors import gain_of_level
from wsicodec.models.proof import FLOAT_OPERATORS, check_operators
from wsicodec.models.session import GraphRunner

KIND = "encoder"
Decibels = npt.NDArray[np.float64]


class EncoderModel:
    """Hyper-analysis network and rate map of one decoder model.

    quality_gain: (100,) gain index of each quality 1 ... 100, never decreasing.
    stage_gain: (stages,) smallest gain index at which each stage is coded.
    turned: whether colour planes are turned, cell by cell.
    hyper_analysis: (y, plane) -> hyper-latents before rounding, all but the first channel; y holds
    the leading latents, plane the gain index.
    step_strength: of the adaptive step (the first channel), 0 ... 1.
    lagrange: bits that a squared error of one step is worth.
    tilt: of tiles, 0 ... 16.
    rgb: how errors are weighed, 0 (as steps do) ... 1 (as those of RGB).
    typical_psnr, typical_ssim: (256,) decibels that tissue usually has at each gain index, SSIM as
    ``-10 log10(1 - SSIM)``; never decreasing.
    """

    def __init__(self, file: container.ModelFile) -> None:
        if file.header.get("kind") != KIND:
            raise ModelError(f"model file is of kind {file.header.get('kind')!r}, not {KIND!r}")
        self.digest, self.header = file.digest, file.header
        decoder = file.header.get("decoder")
        if not isinstance(decoder, str) or not re.fullmatch("[0-9a-f]{64}", decoder):
            raise ModelError("encoder model does not name its decoder")
        self.decoder_digest = bytes.fromhex(decoder)
        self.quality_gain = file.tensor("quality_gain", "uint8", (100,)).astype(int)
        self.stage_gain = file.tensor("stage_gain", "uint8", (None,)).astype(int)
        if (self.quality_gain[1:] < self.quality_gain[:-1]).any():
            raise ModelError("the gains of an encoder's qualities decrease")
        if self.quality_gain.max() >= GAINS:
            raise ModelError("a gain is out of range")
        self.step_strength = _share(file.header, "step_strength")
        self.rgb = _share({"rgb": 0.0, **file.header}, "rgb")
        tilt = file.header.get("tilt", 0)
        if not isinstance(tilt, int) or isinstance(tilt, bool) or not 0 <= tilt <= MAX_TILT:
            raise ModelError(f"encoder model has no tilt within 0 ... {MAX_TILT}")
        self.tilt = tilt
        lagrange = file.header.get("lagrange")
        if isinstance(lagrange, bool) or not isinstance(lagrange, (int, float)) or lagrange <= 0:
            raise ModelError("encoder model has no positive lagrange multiplier")
        self.lagrange = float(lagrange)
        turned = file.header.get("turned", True)
        if not isinstance(turned, bool):
            raise ModelError("encoder model does not say whether planes are turned")
        self.turned = turned
        self.typical_psnr, self.typical_ssim = _typical(file)
        graph = file.graph("hyper_analysis")
        check_operators(graph, FLOAT_OPERATORS, "encoder/hyper_analysis")
        self.hyper_analysis = GraphRunner(graph)


def _share(header: dict[str, Any], name: str) -> float:
    """A number within 0 ... 1 of the header."""
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ModelError(f"encoder model has no {name} within 0 ... 1")
    return float(value)


def _typical(file: container.ModelFile) -> tuple[Decibels, Decibels]:
    """Curves from evenly spaced points (2, points), or straight lines where the file has none."""
    points = np.array([[24.0, 62.0], [5.0, 45.0]])
    if "typical" in file.tensors:
        points = file.tensor("typical", "float32", (2, None)).astype(float)
        if points.shape[1] < 2 or not np.isfinite(points).all():
            raise ModelError("an encoder's typical qualities are no curves")
    rows = np.maximum.accumulate(points, axis=1)
    at = np.linspace(0, GAINS - 1, rows.shape[1])
    psnr, ssim = (np.interp(np.arange(GAINS), at, row) for row in rows)
    return psnr, ssim


def gain_beside(decoder: DecoderModel, encoder: EncoderModel, tilt: int) -> int:
    """Gain indices that a tilt takes above the encoder's own one, for steps as large."""
    return gain_of_level(decoder.factors[tilt]) - gain_of_level(decoder.factors[encoder.tilt])


def load_encoder(data: bytes) -> EncoderModel:
    """An encoder model from its file's bytes; ModelError says what is wrong."""
    return EncoderModel(container.parse(data))
