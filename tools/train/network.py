"""The tile codec's network: lapped cosines, turned colours, integer entropy model, int8 chain.

    turn(dct(lap(M (x - mean)))) -> y --gain(E) 2^o--> v -> search(v - mu) -> q
                                    y -> h_a -> z -> h_s -> h  E = clip(G + 4 z_0, 0, 255)
    stage k:   (h, E, earlier latents) -> (mu_k, sigma_k)      z_0: adaptive step, from x
               sigma in steps: sigma_k 2^o                     o: octaves of the tilt, by channel
    x_hat    = mean + M^-1 unlap(idct(unturn(y_hat + step(E) * chain(context(y_hat), E))))
    x_hat   += step(E) * refine(x_hat, context(y_hat), E)       where there is such a network

Names follow the literature (Balle 2018, Minnen 2018): h_a, h_s, y, z, y_hat.
Pixels are RGB minus 128. The gain index G sets the step ``2**(6 - G/32)``. The linear paths are
exact inverses and stay so: no quality is out of reach (tools.train.transform). Their colour space
counts chroma errors for less than luma errors. The learned correction scales with the step, so it
fades as it shrinks. The tilt moves the steps of channels against one another: what SSIM wants with
none of it, what squared error wants with all of it. The networks do not know of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.train.dependent import DependentSearch, dependent_bits
from tools.train.integer import IntegerConv, floor_at, straight_through
from tools.train.lapping import SIDE as LAPPED_SIDE
from tools.train.precision import arithmetic, exact
from tools.train.refine import Refinement
from tools.train.settings import NetworkSettings
from tools.train.tables import SCALE_CLASSES, SCALE_LOG2_OF_CLASS_1, SCALE_STEPS_PER_OCTAVE
from tools.train.transform import bands_of, planes_of, turned, turns_of

GAIN_STEPS_PER_OCTAVE = 32
GAIN_TOP_STEP = 6  # log2 of the quantisation step at gain index 0
UNIT = 5  # exponent of hidden activations, contexts and the gain plane: steps of 1/32
Z_EXPONENT = 2
STEP_UNIT = 4  # gain indices per unit of z_0
STEP_PEAK = 48
STEP_REFERENCE = 660.0  # 2 variance + C2 where the adaptive step is neutral: textured tissue
SSIM_C2 = 58.5225
MEAN_EXPONENT = 6  # means in 1/64 of a channel's standard deviation
MEAN_PEAK = 1023
LATENT_EXPONENT = 4  # means and decoded latents in 1/16 of a step
CHAIN_PEAK = 63
CHAIN_OUT_EXPONENT = 6  # corrections in 1/64 of a step
LATTICE_SHARE = (1.0, 0.25, 0.25, 0.5)  # of positions
REFINE = "refine."
"""Begin of the names of the refinement's weights."""

TILT_START = -0.5
"""Octaves of luma, whose steps the colour space makes finer, in RGB, than those of chroma."""


def gain_of(index: Tensor) -> Tensor:
    return torch.exp2(index / GAIN_STEPS_PER_OCTAVE - GAIN_TOP_STEP)


def scale_of(index: Tensor) -> Tensor:
    """Standard deviation in steps of a scale class (class 0 is the always-zero class)."""
    return torch.exp2((index - 1) / SCALE_STEPS_PER_OCTAVE + SCALE_LOG2_OF_CLASS_1)


def gaussian_bits(value: Tensor, scale: Tensor) -> Tensor:
    """Bits of a unit-width bin around ``value`` under a zero-mean normal distribution."""
    value = value.abs()
    upper = torch.special.ndtr((0.5 - value) / scale)
    lower = torch.special.ndtr((-0.5 - value) / scale)
    return -torch.log2((upper - lower).clamp_min(1e-9))


def adaptive_steps(x: Tensor, strength: Tensor) -> Tensor:
    """z_0, (N, 1, H/32, W/32) whole numbers: finer steps where SSIM asks for them.

    SSIM counts an error of variance e within texture of variance v like ``e / (2 v + C2)``; the
    best step grows with the root of that weight's inverse. x: RGB - 128. strength: (N,), 0 is
    uniform.
    """
    weights = torch.tensor((0.299, 0.587, 0.114), device=x.device).view(1, 3, 1, 1)
    luma = (x * weights).sum(1, keepdim=True)
    variance = F.avg_pool2d(luma**2, 8) - F.avg_pool2d(luma, 8) ** 2
    weight = F.avg_pool2d(1 / (2 * variance.clamp_min(0) + SSIM_C2), 4)
    octaves = 0.5 * torch.log2(STEP_REFERENCE * weight) * strength.view(-1, 1, 1, 1)
    units = GAIN_STEPS_PER_OCTAVE * octaves / STEP_UNIT
    return torch.round(units).clamp(-STEP_PEAK // STEP_UNIT, STEP_PEAK // STEP_UNIT)


def lattice_mask(lattice: int, rows: int, columns: int) -> Tensor:
    """(1, 1, rows, columns): 1 on the positions of a lattice."""
    row, column = torch.arange(rows).view(-1, 1) % 2, torch.arange(columns).view(1, -1) % 2
    kinds = (
        torch.ones(rows, columns, dtype=torch.bool),
        (row == 0) & (column == 0),
        (row == 1) & (column == 1),
        row != column,
    )
    return kinds[lattice].float()[None, None]


class Stage(nn.Module):
    """Parameters (scale class, and mean for the leading stages) of channels on a lattice."""

    def __init__(self, n: NetworkSettings, index: int) -> None:
        super().__init__()
        before = n.channels_of(index)
        self.index = index
        self.first, self.size, self.lattice = n.stages[index]
        self.has_mean = index < n.mean_stages
        signed = index < n.mean_stages
        self.signed = signed
        self.reduce: IntegerConv | None = None
        self.context: IntegerConv | None = None
        if before:
            seen = min(before, n.context_channels)
            self.seen = seen
            if seen > 32:
                self.reduce = IntegerConv(seen * (2 if signed else 1), n.context, 1, in_peak=127)
                self.context = IntegerConv(n.context, n.context, 3)
            else:
                self.context = IntegerConv(seen * (2 if signed else 1), n.context, 3, in_peak=127)
        self.middle = IntegerConv(n.hyper + (n.context if before else 0) + 1, n.middle, 1)
        self.scale = IntegerConv(n.middle + 1, self.size, 1, out_exponent=3, high=SCALE_CLASSES - 1)
        self.mean: IntegerConv | None = None
        if self.has_mean:
            self.mean = IntegerConv(
                n.middle, self.size, 1, out_exponent=MEAN_EXPONENT, low=-MEAN_PEAK, high=MEAN_PEAK
            )
            nn.init.zeros_(self.mean.weight)

    @exact
    def forward(self, h: Tensor, plane: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale class (float integers) and mean (in standard deviations; 0 where none)."""
        parts = [h]
        if self.context is not None:
            assert context is not None
            c = context[:, : self.seen]
            c = torch.cat([c, c.abs()], 1) if self.signed else c.abs()
            if self.reduce is not None:
                c = self.reduce(c)
            parts.append(self.context(c))
        m = self.middle(torch.cat([*parts, plane], 1))
        index = self.scale(torch.cat([m, plane], 1)) * 8.0
        mean = self.mean(m) if self.mean is not None else torch.zeros_like(index)
        return index, mean


@dataclass
class Rates:
    """Bits per pixel of each image: everything, and the hyper-latents alone."""

    total: Tensor
    hyper: Tensor


@dataclass
class Coded:
    """What decoders have before the refinement: pixels, contexts (N, context channels, H / 16,
    W / 16) and the effective gain index in octaves (N, 1, H / 16, W / 16); and rates."""

    x_hat: Tensor
    contexts: Tensor
    plane: Tensor
    rates: Rates


class TileNetwork(nn.Module):
    """The whole codec for training; ``tools.export`` cuts it into the shipped graphs."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        n = self.settings = settings
        self.float_type = torch.float32  # of h_a, which decides no probability
        channels = n.latent_channels
        self.h_a = nn.Sequential(
            nn.Conv2d(n.context_channels + 1, 96, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(96, n.z_channels - 1, 2, stride=2),
        )
        self.h_s_expand = IntegerConv(
            n.z_channels, 4 * n.hyper, 1, in_exponent=Z_EXPONENT, in_peak=127
        )
        self.h_s = IntegerConv(n.hyper + 1, n.hyper, 3)
        self.stages = nn.ModuleList(Stage(n, i) for i in range(len(n.stages)))

        layers = []
        for i, kernel in enumerate(n.chain_kernels):
            layers.append(
                IntegerConv(
                    n.context_channels + 1 if i == 0 else n.chain,
                    n.chain,
                    kernel,
                    in_peak=127 if i == 0 else 255,
                    weight_peak=CHAIN_PEAK,
                )
            )
        self.chain = nn.Sequential(*layers)
        self.chain_out = IntegerConv(
            n.chain, n.context_channels, 1, out_exponent=CHAIN_OUT_EXPONENT, low=-128, high=127,
            weight_peak=CHAIN_PEAK,
        )  # fmt: skip
        nn.init.zeros_(self.chain_out.weight)
        self.refine = (
            Refinement(n.refine, n.refine_blocks, n.context_channels) if n.refine else None
        )

        self.log_gain = nn.Parameter(torch.full((channels,), -0.5))
        self.tilt = nn.Parameter(torch.zeros(channels))
        self.z_log_scale = nn.Parameter(torch.full((n.z_channels,), 0.0))
        self.z_log_slope = nn.Parameter(torch.zeros(n.z_channels))
        self.search = DependentSearch()
        self.register_buffer("deviation", torch.ones(channels))
        self.register_buffer("order", torch.arange(channels))
        self.register_buffer("colours", torch.eye(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("border", torch.eye(LAPPED_SIDE))
        for module in self.modules():
            if isinstance(module, IntegerConv):
                module.exact = n.integer

    @torch.no_grad()
    def start(
        self, variance: Tensor, mean: Tensor, colours: Tensor, border: Tensor | None = None
    ) -> None:
        """Begin from what tissue looks like (tools.train.transform.band_statistics).

        variance: (768,) of the bands, plane by plane. mean: (3,) of RGB - 128. colours: (3, 3),
        RGB to planes. border: filter across block borders (tools.train.lapping); None: none.
        """
        if border is not None:
            self.border.copy_(border)
        self.mean.copy_(mean)
        self.colours.copy_(colours)
        self.order.copy_(torch.argsort(-variance, stable=True)[: len(self.order)])
        deviation = variance[self.order].clamp_min(0.25).sqrt().float()
        self.deviation.copy_(deviation)
        for stage in self.stages:
            d = deviation[stage.first : stage.first + stage.size]
            # class index / 8 = log2(sigma) + 2.875, sigma = 0.7 * deviation * exp(-0.5) * gain(E);
            # the plane carries E / 32, so its weight is exactly one octave per unit
            stage.scale.weight[:, -1].fill_(1.0)
            stage.scale.weight[:, :-1].mul_(0.3)
            stage.scale.bias.copy_(torch.log2(0.42 * d) - GAIN_TOP_STEP + 2.875)
        # squared errors of RGB want equal steps in all planes
        luma = self.order // LAPPED_SIDE**2 == 0
        luma[: self.settings.stages[0][1]] = False
        self.tilt.copy_(TILT_START * luma)

    def context_of(self, y_hat: Tensor, start: int) -> Tensor:
        """Decoded latents as bounded integers (in steps of 1/32 of a standard deviation)."""
        d = self.deviation[start : start + y_hat.shape[1]].view(1, -1, 1, 1)
        return floor_at(y_hat / d, UNIT).clamp(-127 / 32, 127 / 32)

    def analyse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(latents, (N, 3, 3) turns of their planes) of images."""
        n = self.settings
        centred = x - self.mean.view(1, 3, 1, 1)
        planes = torch.einsum("ij,njhw->nihw", self.colours, centred)
        bands = bands_of(planes, self.border if n.lapped else None)
        if n.turned:
            turns = turns_of(bands)
            bands = turned(bands, turns)
        else:
            turns = torch.eye(3).to(bands).expand(len(x), 3, 3)
        return bands.flatten(1, 2)[:, self.order], turns

    def synthesise(self, y_hat: Tensor, turns: Tensor) -> Tensor:
        """Pixels, RGB - 128, of the leading latents."""
        count, rows, columns = y_hat.shape[1:]
        flat = y_hat.new_zeros(len(y_hat), 3 * LAPPED_SIDE**2, rows, columns)
        flat = flat.index_copy(1, self.order[:count], y_hat)
        bands = turned(flat.view(len(y_hat), 3, -1, rows, columns), turns.transpose(1, 2))
        planes = planes_of(bands, self.border if self.settings.lapped else None)
        back = torch.linalg.inv(self.colours.double()).to(planes)
        return torch.einsum("ij,njhw->nihw", back, planes) + self.mean.view(1, 3, 1, 1)

    def tilted(self, share: Tensor) -> Tensor:
        """(N, channels): octaves by which steps are finer at shares (N,) of the tilt, in eighths:
        steps of a class.

        Only those of the first stage's channels may be finer, which are coded nearly everywhere:
        what the networks give class 0 is not coded, however fine its step.
        """
        first = self.settings.stages[0][1]
        octaves = torch.cat([self.tilt[:first], self.tilt[first:].clamp_max(0)])
        octaves = share.view(-1, 1) * octaves
        eighths = torch.round(octaves * SCALE_STEPS_PER_OCTAVE)
        return straight_through(eighths / SCALE_STEPS_PER_OCTAVE, octaves)

    def hyper_input(self, y: Tensor, plane: Tensor) -> Tensor:
        c = self.settings.context_channels
        return torch.cat([y[:, :c] / self.deviation[:c].view(1, -1, 1, 1), plane], 1)

    def hyper_scale(self, gain: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        g = (gain.view(-1, 1, 1, 1) - 128) / 64
        log = self.z_log_scale.view(shape) + g * self.z_log_slope.view(shape)
        return torch.exp(log.clamp(-1.9, 4.0))

    def forward(
        self,
        x: Tensor,
        gain: Tensor,
        strength: Tensor,
        stages: int | None = None,
        tilt: Tensor | None = None,
    ) -> tuple[Tensor, Rates]:
        """x: (N, 3, H, W) RGB - 128, H and W multiples of 32; gain: (N,) integer gain indices;
        strength: (N,) of the adaptive step. tilt: (N,) shares of the tilt, 0 ... 1; None: what the
        strengths leave to 1.

        Returns the reconstruction (not clipped) and rates. In training mode hyper-latents' rates
        see additive noise; levels are those of a search. Latents take their gradient from additive
        noise (rate) and straight through the rounding (distortion). Where no weight learns but
        those of the refinement, all before it is computed without gradients.
        """
        others = (p for name, p in self.named_parameters() if not name.startswith(REFINE))
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in others)
        share = 1 - strength if tilt is None else tilt
        with torch.set_grad_enabled(learning):
            coded = self.code(x, gain, strength, stages, share)
        x_hat = coded.x_hat
        if self.refine is not None:
            with arithmetic(x.device, self.float_type):
                x_hat = x_hat + self.refine(x_hat, coded.contexts, coded.plane, share)
        return x_hat, coded.rates

    @exact
    def code(
        self,
        x: Tensor,
        gain: Tensor,
        strength: Tensor,
        stages: int | None,
        share: Tensor,
    ) -> Coded:
        """Images coded and decoded, but for the refinement; arguments as ``forward`` has them.

        share: (N,) of the tilt.
        """
        n = self.settings
        stages = len(n.stages) if stages is None else stages
        y, turns = self.analyse(x)
        lh, lw = y.shape[-2:]
        constant = (gain / 32).view(-1, 1, 1, 1)
        with arithmetic(x.device, self.float_type):
            z = self.h_a(self.hyper_input(y, constant.expand(-1, 1, lh, lw))).float() * 4
        z_hat = straight_through(torch.round(z).clamp(-127, 127), z)
        z_noisy = z + torch.rand_like(z) - 0.5 if self.training else z_hat
        z_0 = adaptive_steps(x, strength)
        z_hat, z_noisy = torch.cat([z_0, z_hat], 1), torch.cat([z_0, z_noisy], 1)
        bits = gaussian_bits(z_noisy, self.hyper_scale(gain)).sum((1, 2, 3))
        hyper_bits = bits
        h = F.pixel_shuffle(self.h_s_expand(z_hat / 2**Z_EXPONENT), 2)
        h = self.h_s(torch.cat([h, constant.expand(-1, 1, *h.shape[-2:])], 1))
        steps = F.interpolate(z_0, scale_factor=2, mode="nearest") * STEP_UNIT
        effective = (gain.view(-1, 1, 1, 1) + steps).clamp(0, 255)
        plane = effective / 32
        g = gain_of(effective)
        octaves = self.tilted(share)
        # decoded so far, by first channel: latents and their contexts
        decoded: dict[int, Tensor] = {}
        contexts: dict[int, Tensor] = {}
        for stage in self.stages[:stages]:
            a, b = stage.first, stage.first + stage.size
            context = torch.cat(list(contexts.values()), 1) if contexts else None
            index, mean = stage(h, plane, context)
            finer = octaves[:, a:b, None, None]
            # class 0 stays
            moved = (index + SCALE_STEPS_PER_OCTAVE * finer).clamp(0, SCALE_CLASSES - 1)
            index = torch.where(torch.round(index) > 0, moved, index)
            scale = scale_of(index)
            gc = g * torch.exp(self.log_gain[a:b]).view(1, -1, 1, 1) * torch.exp2(finer)
            v = y[:, a:b] * gc
            if stage.has_mean:
                d = self.deviation[a:b].view(1, -1, 1, 1)
                mu = floor_at(mean * d * gc, LATENT_EXPONENT)
            else:
                mu = torch.zeros_like(v)
            r = v - mu
            mask = lattice_mask(stage.lattice, *y.shape[-2:]).to(y.device)
            classes = torch.round(index.detach()) * mask
            level, quantiser = self.search(r, classes)
            r_hat = straight_through(level / 2, r)
            b_q = dependent_bits(level, quantiser, scale)
            if self.training:
                # scales learn from the symbols that are coded, latents from a smooth surrogate
                noisy = r + torch.rand_like(r) - 0.5
                b_q = straight_through(b_q.detach(), gaussian_bits(noisy, scale.detach())) + (
                    b_q - b_q.detach()
                )
            else:
                b_q = b_q * (classes > 0)
            bits = bits + (b_q * mask).sum((1, 2, 3))
            y_hat = (r_hat + mu) / gc * mask
            decoded[a] = decoded[a] + y_hat if a in decoded else y_hat
            if a < n.context_channels:
                contexts[a] = self.context_of(decoded[a], a)
        y_hat = torch.cat(list(decoded.values()), 1)
        chain_plane = (plane - 4).clamp(-127 / 32, 127 / 32)
        correction = self.chain_out(self.chain(torch.cat([*contexts.values(), chain_plane], 1)))
        k = n.context_channels
        y_hat = torch.cat([y_hat[:, :k] + correction / g, y_hat[:, k:]], 1)
        area = x.shape[-1] * x.shape[-2]
        x_hat = self.synthesise(y_hat, turns)
        return Coded(
            x_hat, torch.cat([*contexts.values()], 1), plane, Rates(bits / area, hyper_bits / area)
        )

    def kmac_per_pixel(self, stages: int | None = None) -> dict[str, float]:
        """Multiply-accumulates per pixel in thousands, by part of the decoder."""
        n = self.settings
        stages = len(n.stages) if stages is None else stages
        per_position = lambda m: m.weight.numel() if m is not None else 0  # noqa: E731
        entropy = per_position(self.h_s_expand) / 4 + per_position(self.h_s)
        for s in self.stages[:stages]:
            coded = sum(per_position(m) for m in (s.context, s.middle, s.scale, s.mean))
            entropy += per_position(s.reduce) + LATTICE_SHARE[s.lattice] * coded
        chain = sum(per_position(m) for m in (*self.chain, self.chain_out))
        linear = (
            2 * 3 * n.block**3 + (3 * 3 * 2 + 2 * 3 * n.block) * n.block**2
        )  # with lap and colours
        area = n.block**2 * 1000
        refine = 0.0 if self.refine is None else self.refine.kmac_per_pixel()
        parts = {"entropy": entropy / area, "chain": chain / area, "linear": linear / area}
        return parts | {"refine": refine}
