"""An encoder model: the networks that choose latents. It decides nothing a decoder must know.

Kept apart from the decoder model, so that a better encoder leaves the identity of decoders, and
all files written before, as they are.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from wsicodec.errors import ModelError
from wsicodec.models import container
from wsicodec.models.decoder import GAINS, DecoderModel
from wsicodec.models.fold import folded_analysis, transform_graph
from wsicodec.models.proof import FLOAT_OPERATORS, check_operators
from wsicodec.models.session import GraphRunner

KIND = "encoder"
LEADING = 64
"""Channels that set the level of ``EncoderModel.rgb_energy``."""

Decibels = npt.NDArray[np.float64]


class EncoderModel:
    """Analysis networks and rate map of one decoder model.

    quality_gain: (100,) gain index of each quality 1 ... 100, never decreasing.
    stage_gain: (stages,) smallest gain index at which each stage is coded.
    colour_gram: M'M of the colour space M in which the decoder's basis is orthonormal.
    corrected: leading latents that the analysis network corrects.
    hyper_analysis: (y, plane) -> hyper-latents before rounding, all but the first channel.
    step_strength: of the adaptive step (the first channel), 0 ... 1.
    lagrange: bits that a squared error of one step is worth.
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
        corrected = file.header.get("corrected")
        if (
            not isinstance(corrected, int)
            or isinstance(corrected, bool)
            or not 1 <= corrected <= 768
        ):
            raise ModelError("encoder model does not say how many latents it corrects")
        self.corrected = corrected
        strength = file.header.get("step_strength")
        if (
            isinstance(strength, bool)
            or not isinstance(strength, (int, float))
            or not 0 <= strength <= 1
        ):
            raise ModelError("encoder model has no adaptive step strength within 0 ... 1")
        self.step_strength = float(strength)
        lagrange = file.header.get("lagrange")
        if isinstance(lagrange, bool) or not isinstance(lagrange, (int, float)) or lagrange <= 0:
            raise ModelError("encoder model has no positive lagrange multiplier")
        self.lagrange = float(lagrange)
        self.colour_gram = file.tensor("colour_gram", "float32", (3, 3))
        self.typical_psnr, self.typical_ssim = _typical(file)
        self._runners: dict[tuple[int, bool], GraphRunner] = {}
        self._rgb_energy: npt.NDArray[np.float32] | None = None
        for name in ("analysis", "hyper_analysis"):
            check_operators(file.graph(name), FLOAT_OPERATORS, f"encoder/{name}")
        self._analysis = file.graph("analysis")
        self.hyper_analysis = GraphRunner(file.graph("hyper_analysis"))

    def transform(self, decoder: DecoderModel, channels: int) -> GraphRunner:
        """Runner of the decoder's basis turned around: ``blocks`` (N, 768, rows, columns), 128
        subtracted, to the first ``channels`` latents ``y``."""
        return self._runner(decoder, channels, network=False)

    def analysis(self, decoder: DecoderModel, channels: int) -> GraphRunner:
        """Runner of the transform with the analysis network's correction: ``blocks`` as above,
        ``plane`` and ``step`` (N, 1, 1, 1), gain index and its step, to ``y``."""
        return self._runner(decoder, channels, network=True)

    def _runner(self, decoder: DecoderModel, channels: int, *, network: bool) -> GraphRunner:
        # threads that race build one too many, which is harmless
        if (channels, network) not in self._runners:
            # the basis is orthonormal in colours M, so its inverse is the transpose times M'M
            rows = decoder.basis.reshape(len(decoder.basis), -1, 3) @ self.colour_gram
            forward = rows.reshape(len(decoder.basis), -1)
            bias = -(forward @ decoder.mean)
            graph = (
                folded_analysis(self._analysis, forward, bias, channels)
                if network
                else transform_graph(forward[:channels], bias[:channels])
            )
            self._runners[channels, network] = GraphRunner(graph)
        return self._runners[channels, network]

    def rgb_energy(self, decoder: DecoderModel) -> npt.NDArray[np.float32]:
        """(channels,): squared RGB error of a step's error in each channel, 1 in the middle of the
        leading ones."""
        if self._rgb_energy is None:
            energy = (decoder.basis.astype(np.float64) ** 2).sum(1) * decoder.inverse_gain**2
            middle = np.exp(np.log(energy[:LEADING]).mean())
            self._rgb_energy = (energy / middle).astype(np.float32)
        return self._rgb_energy


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


def load_encoder(data: bytes) -> EncoderModel:
    """An encoder model from its file's bytes; ModelError says what is wrong."""
    return EncoderModel(container.parse(data))
