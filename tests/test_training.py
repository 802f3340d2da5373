"""Training and export, on a tiny network. Needs torch (the ``train`` extra), else left out."""

from __future__ import annotations

import functools
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")
PIL_Image = pytest.importorskip("PIL.Image", reason="the train extra is not installed")

from tools.export.fit import count_symbols
from tools.export.graphs import chain_graph, hyper_analysis_graph
from tools.export.model import decoder_file, encoder_file, hyper_classes, quality_gains
from tools.train import __main__ as training
from tools.train.colours import colour_matrix
from tools.train.dependent import LANES, DependentSearch, dependent_bits
from tools.train.images import (
    CropSettings,
    Sampler,
    Source,
    halved,
    load_sources,
    stained,
    write_pack,
)
from tools.train.integer import ACCUMULATOR_BOUND, IntegerConv
from tools.train.lapping import border_filter, lapped_transform_start, odd_part
from tools.train.loader import Loader
from tools.train.losses import ssim_luma
from tools.train.machine import Machine
from tools.train.network import TileNetwork, adaptive_steps, lattice_mask
from tools.train.run import Run, averaged, save
from tools.train.settings import NetworkSettings, TrainSettings
from tools.train.shipped import state_of_model
from tools.train.tables import MAX_RADIUS, TABLE_CLASSES, fitted_tables, normal_weights, scale_of
from tools.train.transform import band_statistics, bands_of, planes_of, turned, turns_of
from tools.train.warmstart import TRANSFORM, layers_of, stage_sources, warm_start
from wsicodec.codec.adaptive import adaptive_steps as runtime_steps
from wsicodec.codec.cell import CellShape
from wsicodec.codec.colours import TURN_STEP, best_turn, rotation
from wsicodec.codec.network import decode_tile, encode_tile, quantise_cell, usual_search
from wsicodec.entropy.trellis import split_levels
from wsicodec.metrics import ssim
from wsicodec.models import container
from wsicodec.models.decoder import load_decoder
from wsicodec.models.encoder import load_encoder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("images")
    for i in range(2):
        crop = np.ascontiguousarray(pixels[i * 200 : i * 200 + 300, 100:420])
        PIL_Image.fromarray(crop).save(path / f"cmu_{i}.png")
    return path


def integers(layer: IntegerConv, x: np.ndarray) -> np.ndarray:
    """The layer on whole numbers, in int64."""
    rows = layer.rows()
    w, b, s = (t.numpy().astype(np.int64) for t in (rows.weight, rows.bias, rows.shift))
    k = w.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, w) + b[None, :, None, None]
    rounded = np.rint(sums / 2.0 ** s[None, :, None, None])  # exact: sums are below 2^22
    return np.clip(rounded.astype(np.int64), rows.low, rows.high)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_integer_layers_train_as_they_run(kernel: int, spread: float) -> None:
    torch.manual_seed(0)
    layer = IntegerConv(24, 10, kernel)
    with torch.no_grad():
        layer.weight.mul_(spread)
        layer.bias.normal_()
    x = np.random.default_rng(0).integers(0, 256, (2, 24, 5, 6))
    got = layer(torch.from_numpy(x / 32.0).float()) * 32
    np.testing.assert_array_equal(got.detach().numpy(), integers(layer, x))
    rows = layer.rows()
    total = rows.weight.abs().sum((1, 2, 3)) * 255 + rows.bias.abs()
    assert int(total.max()) < ACCUMULATOR_BOUND and int(rows.weight.abs().max()) <= 127


def test_gradients_pass_the_roundings() -> None:
    layer = IntegerConv(4, 3, 1)
    x = torch.full((1, 4, 2, 2), 1.0, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and x.grad is not None


def test_losses_and_steps_are_those_of_the_package(pixels: np.ndarray) -> None:
    image = pixels[:96, :128]
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 12, image.shape), 0, 255)
    noisy = noisy.astype(np.uint8)
    batch = lambda a: torch.from_numpy(a.transpose(2, 0, 1)[None].astype(np.float32))  # noqa: E731
    assert float(ssim_luma(batch(image), batch(noisy))) == pytest.approx(
        ssim(image, noisy), abs=2e-4
    )
    trained = adaptive_steps(batch(image) - 128, torch.tensor([0.7]))[0, 0].numpy()
    mine = runtime_steps(image.astype(np.float32), 0.7)
    assert (np.abs(trained - mine) <= 1).all() and (trained != mine).mean() < 0.1


# -- dependent quantisation --


@pytest.mark.parametrize("quantiser", [0, 1])
@pytest.mark.parametrize("scale", [0.15, 0.4, 1.0, 5.0, 60.0])
def test_probabilities_of_all_levels_sum_to_one(quantiser: int, scale: float) -> None:
    k = torch.arange(-700, 701, dtype=torch.float64)
    level = 2 * k - quantiser * torch.sign(k)
    bits = dependent_bits(level, torch.full_like(k, quantiser), torch.full_like(k, scale))
    # masses below 1e-9 count as that
    assert float(torch.exp2(-bits).sum()) == pytest.approx(1, abs=3e-6)
    np.testing.assert_array_equal(bits, bits.flip(0))
    assert (bits[702:].diff() >= 0).all()  # the first intervals of quantiser 1 differ in width


@pytest.mark.parametrize("quantiser", [0, 1])
def test_bits_of_training_are_those_of_the_first_tables(quantiser: int) -> None:
    """Near the middle: tables cut at their radius and round to 2^-14."""
    for symbol_class in (12, 24, 40):
        scale = scale_of(symbol_class)
        weights = normal_weights(scale, quantiser)
        assert weights.sum() == pytest.approx(1, abs=1e-6) and len(weights) % 2 == 0
        radius = (len(weights) - 2) // 2
        assert radius <= MAX_RADIUS
        k = torch.arange(-radius, radius + 1, dtype=torch.float64)
        level = 2 * k - quantiser * torch.sign(k)
        bits = dependent_bits(level, torch.full_like(k, quantiser), torch.full_like(k, scale))
        near = np.abs(k.numpy()) <= 2 * scale
        np.testing.assert_allclose(-np.log2(weights[:-1])[near], bits.numpy()[near], atol=1e-6)
        tables = fitted_tables(np.zeros((2, TABLE_CLASSES + 1, 129)))
        row = symbol_class - 1 + quantiser * TABLE_CLASSES
        middle = int(tables.radii[row])
        coded = tables.bits[row, middle - radius : middle + radius + 1]
        np.testing.assert_allclose(coded[near], bits.numpy()[near], atol=0.05)


def test_bits_have_gradients_for_scales() -> None:
    scale = torch.full((6,), 0.8, requires_grad=True)
    level = torch.tensor([0.0, 0, 1, -3, 2, -8])
    quantiser = torch.tensor([0.0, 1, 1, 1, 0, 0])
    dependent_bits(level, quantiser, scale).sum().backward()
    assert scale.grad is not None and torch.isfinite(scale.grad).all()
    assert (scale.grad[:2] > 0).all() and scale.grad[-1] < 0


def test_the_search_of_training_gives_levels_that_can_be_coded() -> None:
    torch.manual_seed(1)
    r = 3 * torch.randn(2, 5, 6, 8)
    classes = torch.randint(0, 40, r.shape).float()
    near, few = DependentSearch(1e4), DependentSearch(0.5)
    errors = []
    for search in (near, few):
        levels, quantisers = search(r, classes)
        assert levels.shape == quantisers.shape == r.shape and levels.dtype == torch.float32
        assert not levels[classes == 0].any()
        for n in range(2):
            kinds = classes[n].numpy().astype(np.uint8).reshape(5, -1)
            found = levels[n].numpy().astype(np.int32).reshape(5, -1)
            _, expected = split_levels(found, kinds, LANES)
            np.testing.assert_array_equal(quantisers[n].numpy().reshape(5, -1), expected)
        errors.append(float((((levels / 2 - r) * (classes > 0)) ** 2).sum()))
    assert errors[0] < 0.5 * errors[1]


def test_tables_follow_the_levels() -> None:
    """After ``refresh`` searches: a class that holds less than it says costs less."""
    search = DependentSearch(8.0, refresh=3)
    r, classes = 0.2 * torch.randn(4, 1, 40, 40), torch.full((4, 1, 40, 40), 30.0)
    before = search.tables
    for _ in range(3):
        search(r, classes)
    zero = int(before.radii[29])
    assert search.tables is not before
    assert search.tables.bits[29, int(search.tables.radii[29])] < before.bits[29, zero] - 0.5
    np.testing.assert_array_equal(search.tables.bits[10], before.bits[10])


# -- the transform --


def cosine(u: int, i: int) -> float:
    """D of docs/format.md, "Pixels"."""
    return 0.25 if u == 0 else (1 / 8) ** 0.5 * np.cos(np.pi * (2 * i + 1) * u / 32)


def lap_as_written(plane: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``lap`` of docs/format.md along the columns and the rows of a plane."""
    for image in (plane, plane.T):
        for border in range(16, len(image), 16):
            a, b = image[border - 8 : border][::-1], image[border : border + 8]  # views
            change = 0.5 * matrix @ (a - b) - 0.5 * (a - b)
            a += change
            b -= change
    return plane


def pixels_as_written(tensors: dict[str, Any], y: np.ndarray, turn: Any) -> np.ndarray:
    """``rgb`` of docs/format.md, "Pixels", of latents y (channels, rows, columns)."""
    rows, columns = y.shape[1:]
    d = np.array([[cosine(u, i) for i in range(16)] for u in range(16)])
    bands = np.zeros((768, rows, columns))
    bands[tensors["order"]] = y
    blocks = np.einsum("ui,puwrc,wj->pricj", d, bands.reshape(3, 16, 16, rows, columns), d).reshape(
        3, 16 * rows, 16 * columns
    )
    planes = np.stack([lap_as_written(p, tensors["lapping"].astype(float)) for p in blocks])
    turning = np.eye(3)
    for (i, j), units in zip(((0, 1), (0, 2), (1, 2)), turn, strict=True):
        g = np.eye(3)
        g[i, i] = g[j, j] = np.cos(units * np.pi / 256)
        g[i, j], g[j, i] = np.sin(units * np.pi / 256), -np.sin(units * np.pi / 256)
        turning = g @ turning
    mixed = np.einsum("ij,jrc->irc", tensors["colours"].astype(float) @ turning.T, planes)
    return mixed + tensors["mean"].astype(float)[:, None, None]


@pytest.mark.parametrize("lapped", [False, True])
def test_bands_are_cosines_and_planes_their_inverse(lapped: bool) -> None:
    torch.manual_seed(0)
    border = border_filter(lapped_transform_start()).float() if lapped else None
    planes = 40 * torch.randn(2, 3, 48, 64)
    bands = bands_of(planes, border)
    assert bands.shape == (2, 3, 256, 3, 4)
    torch.testing.assert_close(planes_of(bands, border), planes, rtol=0, atol=1e-3)
    torch.testing.assert_close((bands**2).sum(), (planes**2).sum())
    # one coefficient alone is its cosine: plane 1, frequency (3, 5) of the block in the middle
    one = torch.zeros(1, 3, 256, 3, 3)
    one[0, 1, 16 * 3 + 5, 1, 1] = 1
    image = planes_of(one, border)[0]
    assert not image[0].any() and not image[2].any()
    expected = np.zeros((48, 48))
    expected[16:32, 16:32] = [[cosine(3, i) * cosine(5, j) for j in range(16)] for i in range(16)]
    if border is not None:
        lap_as_written(expected, odd_part(border).T.numpy())
    np.testing.assert_allclose(image[1], expected, atol=1e-6)


@pytest.mark.parametrize("lapped", [False, True])
@pytest.mark.parametrize("turn", [(0, 0, 0), (-77, 31, 120)])
def test_synthesis_is_the_formats(
    pixels: np.ndarray, lapped: bool, turn: tuple[int, int, int]
) -> None:
    """... of the tensors of an exported decoder; of the leading latents alone, too."""
    net = network_of(pixels, 1, lapped=lapped)
    header = {"name": "tiny"}
    file = container.parse(decoder_file(net, header, net.search.tables, hyper_classes(net)))
    assert set(file.header["architecture"]) == {
        "block", "stages", "mean_stages", "context_channels", "z_channels", "hyper"
    }  # fmt: skip
    kinds = {k: (v.dtype.name, v.shape) for k, v in file.tensors.items()}
    assert kinds["order"] == ("uint16", (56,)) and kinds["colours"] == ("float32", (3, 3))
    assert kinds["tilt"] == ("int8", (56,))
    assert kinds["mean"] == ("float32", (3,)) and kinds["lapping"] == ("float32", (8, 8))
    assert (file.tensors["lapping"] == np.eye(8)).all() != lapped
    y = 30 * torch.randn(1, 56, 2, 3)
    turns = torch.from_numpy(rotation(turn)).float()[None]
    for count in (56, 16):
        got = net.synthesise(y[:, :count], turns)[0].numpy()
        whole = np.where(np.arange(56)[:, None, None] < count, y[0].numpy(), 0).astype(float)
        np.testing.assert_allclose(got, pixels_as_written(file.tensors, whole, turn), atol=2e-3)


def test_turns_are_orthogonal_and_leave_independent_planes_alone(pixels: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    colours = torch.from_numpy(colour_matrix(0.75)).float()
    x = torch.einsum("ij,njhw->nihw", colours, batch_of(pixels[:128, :192]))
    bands = bands_of(x, None)
    turns = turns_of(bands)
    assert not torch.equal(turns[0], torch.eye(3))
    torch.testing.assert_close(turns @ turns.transpose(1, 2), torch.eye(3)[None])
    there = turned(bands, turns)
    torch.testing.assert_close(turned(there, turns.transpose(1, 2)), bands, rtol=0, atol=1e-2)
    torch.testing.assert_close((there**2).sum((1, 3, 4)), (bands**2).sum((1, 3, 4)))

    def bits(bands: Any) -> float:  # of normal frequencies, but for the mean colour
        spread = bands.flatten(3)[:, :, 1:].var(3, correction=0)
        return float(torch.log2(1 + spread / (0.2 * 18.0**2)).sum())

    assert bits(there) < 0.98 * bits(bands)
    # planes of which each is alone where it is not zero share nothing
    alone = torch.zeros(2, 3, 256, 2, 4)
    for plane, (a, b) in enumerate(((0, 1), (2, 3), (5, 6))):
        size = torch.from_numpy(rng.exponential(60, (2, 256))).float()
        alone[:, plane].flatten(2)[..., a] = size
        alone[:, plane].flatten(2)[..., b] = -size
    assert torch.equal(turns_of(alone), torch.eye(3).expand(2, 3, 3))
    # mixed, they are found again
    mixed = turned(alone, torch.from_numpy(rotation((20, -35, 50))).float().expand(2, 3, 3))

    def shared(bands: Any) -> float:
        flat = bands.flatten(3)[:, :, 1:].transpose(1, 2)
        covariance = flat @ flat.transpose(2, 3)
        return float((covariance * (1 - torch.eye(3))).abs().sum() / covariance.abs().sum())

    assert shared(mixed) > 0.3 and shared(turned(mixed, turns_of(mixed))) < 0.03


@pytest.mark.parametrize("lapped", [False, True])
@pytest.mark.parametrize("is_turned", [False, True])
def test_synthesis_undoes_the_linear_transform(
    pixels: np.ndarray, lapped: bool, is_turned: bool
) -> None:
    net = network_of(pixels, 1, **{**ALL, "lapped": lapped, "turned": is_turned})
    x = torch.cat([batch_of(pixels[:96, :128]), batch_of(pixels[300:396, 200:328])])
    y, turns = net.analyse(x)
    assert y.shape == (2, 768, 6, 8)
    assert is_turned != torch.equal(turns, torch.eye(3).expand(2, 3, 3))
    assert float((net.synthesise(y, turns) - x).abs().max()) < 0.01
    # the turn is the one that an encoder chooses, by all frequencies but the mean colour
    if is_turned:
        planes = np.einsum("ij,njhw->nihw", net.colours.numpy(), x - net.mean.view(3, 1, 1))
        bands = bands_of(torch.from_numpy(planes), net.border if lapped else None)
        flat = bands[1, :, 1:].flatten(2).double().numpy().transpose(1, 0, 2)
        flat = flat - flat.mean(2, keepdims=True)
        found = best_turn(flat @ flat.transpose(0, 2, 1) / 48, TURN_STEP)
        np.testing.assert_allclose(turns[1], rotation(found), atol=1e-6)


def test_the_spread_of_bands_is_measured_turned_or_not(pixels: np.ndarray) -> None:
    """The mean of crops' squared bands; turning keeps their sum over planes."""
    colours = torch.from_numpy(colour_matrix(0.75)).float()
    (plain, mean), (at_step, same) = (
        band_statistics(Sampler([Source("a", [pixels])], 128, 3), colours, None, turning, crops=5)
        for turning in (False, True)
    )
    assert torch.equal(mean, same) and plain.shape == at_step.shape == (768,)
    images = [Sampler([Source("a", [pixels])], 128, 3)]
    crops = [torch.from_numpy(images[0].batch(1)).float() - 128 for _ in range(5)]
    torch.testing.assert_close(mean, torch.cat(crops).mean((0, 2, 3)))
    bands = [
        bands_of(torch.einsum("ij,njhw->nihw", colours, x - mean.view(3, 1, 1)), None)
        for x in crops
    ]
    expected = (torch.cat(bands) ** 2).mean((0, 3, 4)).flatten()
    torch.testing.assert_close(plain.float(), expected, rtol=1e-4, atol=1e-3)
    sums = [v.view(3, 256).sum(0) for v in (plain, at_step)]
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(plain, at_step, rtol=0.01)


# -- networks that begin with another's weights --


TINY: dict[str, Any] = {
    "stages": ((0, 4, 1), (0, 4, 2), (0, 4, 3), (4, 12, 0), (16, 32, 0), (48, 8, 0)),
    "mean_stages": 3, "context_channels": 48, "z_channels": 4, "hyper": 8, "context": 8,
    "middle": 8, "chain": 8, "chain_kernels": (1, 3), "lapped": False,
}  # fmt: skip


ALL: dict[str, Any] = {
    **TINY, "stages": ((0, 4, 1), (0, 4, 2), (0, 4, 3), (4, 12, 0), (16, 752, 0)),
    "context_channels": 16,
}  # fmt: skip
"""Every band of frequencies is a latent."""


@functools.cache
def statistics(data: bytes, seed: int, lapped: bool, turning: bool) -> tuple[Any, Any, Any, Any]:
    """(variance, mean, colours, border) of a few crops of the bundled slide."""
    pixels = np.frombuffer(data, np.uint8).reshape(768, 768, 3)
    sampler = Sampler([Source("a", [pixels])], 128, seed)
    colours = torch.from_numpy(colour_matrix(0.6)).float()
    border = border_filter(lapped_transform_start()).float() if lapped else None
    return (*band_statistics(sampler, colours, border, turning, crops=10), colours, border)


def network_of(pixels: np.ndarray, seed: int, **changes: Any) -> TileNetwork:
    """A network whose layers all have an effect."""
    torch.manual_seed(seed)
    net = TileNetwork(NetworkSettings(**{**TINY, **changes}))
    turning = net.settings.turned
    net.start(*statistics(pixels.tobytes(), seed, net.settings.lapped, turning))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not parameter.any() and name.endswith("weight"):
                parameter.normal_(0, 0.05)
            if name.endswith("bias") and not parameter.any():
                parameter.uniform_(-0.2, 0.2)
        net.log_gain.uniform_(-0.6, -0.4)
        # even eighths: half of them are whole, and rounded alike in training and in decoders
        net.tilt.copy_(torch.randint(-5, 6, net.tilt.shape) / 4)
    return net


def begun_from(
    net: TileNetwork, pixels: np.ndarray, **changes: Any
) -> tuple[TileNetwork, list[str]]:
    """Another network that took over a network's weights, and its layers that began afresh."""
    other = network_of(pixels, 99, **{**net.settings.to_dict(), **changes})
    state, afresh = warm_start(net.settings, net.state_dict(), other.settings, other.state_dict())
    other.load_state_dict(state)
    return other, afresh


def batch_of(image: np.ndarray) -> Any:
    """RGB - 128 of one image, (1, 3, rows, columns)."""
    return torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32)) - 128


@torch.no_grad()
def outputs(
    net: TileNetwork, pixels: np.ndarray, stages: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    net.eval()
    x_hat, rates = net(
        batch_of(pixels[:96, :128]), torch.tensor([110.0]), torch.tensor([0.7]), stages
    )
    return x_hat.numpy(), rates.total.numpy()


def assert_same_outputs(a: TileNetwork, b: TileNetwork, pixels: np.ndarray) -> None:
    for x, y in zip(outputs(a, pixels), outputs(b, pixels), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("lapped", [False, True])
def test_a_network_begins_where_another_ended(pixels: np.ndarray, lapped: bool) -> None:
    old = network_of(pixels, 1, lapped=lapped)
    assert outputs(old, pixels)[1] != outputs(network_of(pixels, 99), pixels)[1]
    new, afresh = begun_from(old, pixels)
    assert not afresh
    assert_same_outputs(old, new, pixels)
    for k, v in old.state_dict().items():
        assert torch.equal(v, new.state_dict()[k]), k


WIDER = [
    {"context": 20},
    {"middle": 24},
    {"context": 12, "middle": 16},
    {"chain": 24},
    {"context": 12, "middle": 16, "chain": 12},
    {"hyper": 12},
    {"z_channels": 6},
    {"context_channels": 56},
    {"chain_kernels": (3, 3)},
    {"hyper": 12, "context": 12, "middle": 16, "chain": 12},
]


@pytest.mark.parametrize("changes", WIDER, ids=str)
def test_wider_networks_begin_as_the_narrow_one(
    pixels: np.ndarray, changes: dict[str, Any]
) -> None:
    """New columns are zero: what new rows give changes nothing yet."""
    old = network_of(pixels, 1)
    new, afresh = begun_from(old, pixels, **changes)
    assert not afresh
    if "z_channels" in changes:  # ... but a new hyper-latent costs bits
        a, b = outputs(old, pixels), outputs(new, pixels)
        np.testing.assert_allclose(a[0], b[0], atol=1e-3)
        assert a[1] < b[1] < a[1] + 0.02
    elif "context_channels" in changes:
        with torch.no_grad():  # rows of more latents are the new network's
            new.chain_out.weight[48:].zero_()
            new.chain_out.bias[48:].zero_()
        assert_same_outputs(old, new, pixels)
    else:
        assert_same_outputs(old, new, pixels)


def silent(net: TileNetwork, axis: str, kept: list[int]) -> None:
    """Let nothing read the units of an axis, except some."""
    layers = layers_of(net.settings, {k: k for k in range(len(net.settings.stages))})
    for name, layer in layers.items():
        at = 0
        for units in layer.columns:
            if units.axis.endswith(axis):
                others = [at + u for u in range(units.width) if u not in kept]
                net.get_parameter(f"{name}.weight").data[:, others] = 0
            at += units.width * units.each


@pytest.mark.parametrize(
    ("changes", "axis"),
    [
        ({"hyper": 5}, "hyper"),
        ({"context": 5}, "context"),
        ({"middle": 5}, "middle"),
        ({"chain": 5}, ""),
        ({"z_channels": 3}, "z"),
        ({"context_channels": 16}, ""),
        ({"hyper": 4, "context": 4, "middle": 4, "chain": 4, "z_channels": 2}, ""),
    ],
    ids=str,
)
def test_narrower_networks_keep_what_is_read_most(
    pixels: np.ndarray, changes: dict[str, Any], axis: str
) -> None:
    """Where only five units of eight are read, the rest can go; every layer is taken over."""
    old = network_of(pixels, 1)
    if axis and axis != "z":
        silent(old, axis, [0, 2, 3, 5, 7])
        if axis == "hyper":
            silent(old, "expanded", [0, 2, 3, 5, 7])
        if axis == "context":
            silent(old, "reduced", [0, 2, 3, 5, 7])
    new, afresh = begun_from(old, pixels, **changes)
    if changes.get("context_channels") == 16:  # what was reduced is read as it is
        assert afresh == ["stages.5.context"]
    else:
        assert not afresh
    ours, theirs = outputs(old, pixels), outputs(new, pixels)
    if axis and axis != "z":
        assert_same_outputs(old, new, pixels)
    assert np.isfinite(theirs[0]).all() and theirs[1] < 3 * ours[1]


def test_strong_units_are_kept_in_their_order() -> None:
    """... with the same weights in every layer that they belong to."""
    old, new = (TileNetwork(NetworkSettings(**{**TINY, "chain": width})) for width in (8, 3))
    strong = [6, 1, 4]
    with torch.no_grad():
        old.chain_out.weight[:, strong] = 9.0
        old.chain[1].bias.copy_(torch.arange(8))
    state, _ = warm_start(old.settings, old.state_dict(), new.settings, new.state_dict())
    kept = sorted(strong)
    assert torch.equal(state["chain.1.bias"], old.chain[1].bias[kept])
    inner = np.argsort(-(old.chain[1].weight ** 2).sum((0, 2, 3)).detach().numpy())[:3]
    expected = old.chain[1].weight[kept][:, np.sort(inner)]
    assert torch.equal(state["chain.1.weight"], expected)
    assert torch.equal(state["chain.0.weight"], old.chain[0].weight[np.sort(inner)])
    assert (state["chain_out.weight"] == 9).all()


def test_layers_without_a_counterpart_begin_afresh_with_what_reads_them_silent(
    pixels: np.ndarray,
) -> None:
    old = network_of(pixels, 1)
    new, afresh = begun_from(old, pixels, chain_kernels=(1, 3, 3))
    assert afresh == ["chain.2", "chain_out"]
    stages = (*TINY["stages"][:4], (16, 20, 0), (36, 12, 0), (48, 8, 0))
    new, afresh = begun_from(old, pixels, stages=stages)
    assert {name.split(".")[1] for name in afresh} == {"4", "5"}
    scale = new.stages[4].scale  # begins at the spread of the old network's latents
    assert (scale.weight[:, -1] == 1).all()
    octaves = torch.log2(old.deviation[16:36]) - scale.bias
    torch.testing.assert_close(octaves, octaves[:1].expand(20), rtol=0, atol=1e-5)
    # a stage that did not reduce its context begins to: no column of the old middle reads it
    few = {**TINY, "context_channels": 32}
    old = network_of(pixels, 1, **few)
    new, afresh = begun_from(old, pixels, context_channels=48)
    assert afresh == ["stages.5.context", "stages.5.reduce"]
    assert not new.stages[5].middle.weight[:, 8:16].any()


def test_every_weight_has_a_place_in_warm_starts() -> None:
    """A layer that the plan does not know would begin at random, unnamed."""
    for n in (NetworkSettings(**TINY), NetworkSettings()):
        known = set(TRANSFORM)
        for name, layer in layers_of(n, {k: k for k in range(len(n.stages))}).items():
            known |= {f"{name}.weight", f"{name}.bias"} if layer.columns else {name}
        assert known == set(TileNetwork(n).state_dict())


def test_a_transform_that_does_not_fit_is_refused(pixels: np.ndarray) -> None:
    old = network_of(pixels, 1)
    for changes in ({"lapped": True}, {"turned": False}):
        with pytest.raises(ValueError, match="transform is another"):
            begun_from(old, pixels, **changes)
    with pytest.raises(ValueError, match="has 56 latents, not 64"):
        begun_from(old, pixels, stages=(*TINY["stages"][:5], (48, 16, 0)))
    klt = {k: v for k, v in old.state_dict().items() if k not in ("order", "colours")}
    klt |= {"basis": torch.zeros(56, 768), "inverse": torch.zeros(768, 56)}
    with pytest.raises(ValueError, match="no 'order'"):
        warm_start(old.settings, klt, old.settings, old.state_dict())


def test_a_network_of_fewer_latents_keeps_the_strongest(pixels: np.ndarray) -> None:
    old = network_of(pixels, 1)
    new, afresh = begun_from(old, pixels, stages=TINY["stages"][:5])
    assert not afresh
    assert torch.equal(new.order, old.order[:48]) and torch.equal(new.deviation, old.deviation[:48])
    np.testing.assert_allclose(outputs(new, pixels, 5)[0], outputs(old, pixels, 5)[0], atol=1e-3)


def test_stages_of_a_wider_network_agree(pixels: np.ndarray) -> None:
    old = network_of(pixels, 1)
    new, _ = begun_from(old, pixels, context=20, middle=24)
    h, plane, context = stage_inputs()
    for a, b in zip(old.stages, new.stages, strict=True):
        for x, y in zip(a(h, plane, context), b(h, plane, context), strict=True):
            np.testing.assert_array_equal(x.detach().numpy(), y.detach().numpy())


def test_a_1x1_kernel_begins_as_the_centre_of_a_3x3(pixels: np.ndarray) -> None:
    old = network_of(pixels, 1, chain_kernels=(3, 3))
    new, _ = begun_from(old, pixels, chain_kernels=(1, 3))
    np.testing.assert_array_equal(
        new.chain[0].weight.detach()[:, :, 0, 0], old.chain[0].weight.detach()[:, :, 1, 1]
    )
    np.testing.assert_array_equal(new.chain[1].weight.detach(), old.chain[1].weight.detach())


def test_stages_begin_with_those_of_the_same_channels() -> None:
    new = NetworkSettings(**TINY)
    assert stage_sources(new.to_dict()["stages"], new) == {k: k for k in range(6)}
    old = [[0, 4, 0], [4, 12, 0], [16, 20, 0], [36, 12, 0], [48, 8, 0]]
    # one lattice becomes three; channels cut otherwise have no source
    assert stage_sources(old, new) == {0: 0, 1: 0, 2: 0, 3: 1, 5: 4}
    old = [[0, 4, 1], [0, 4, 2], [0, 4, 3], [4, 12, 1], [4, 12, 2], [4, 12, 3], [16, 32, 0]]
    assert stage_sources(old, new) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 6}


# -- the tilt --


def test_later_channels_are_never_finer(pixels: np.ndarray) -> None:
    """... and all are finer or coarser by whole classes."""
    net = network_of(pixels, 1)
    with torch.no_grad():
        net.tilt.copy_(torch.linspace(0.9, -0.9, 5).repeat(12)[:56])
        octaves = net.tilted(torch.tensor([0.0, 0.3, 1.0]))
        limited = torch.cat([net.tilt[:4], net.tilt[4:].clamp_max(0)])
    assert not octaves[0].any() and torch.equal(8 * octaves, (8 * octaves).round())
    assert float((octaves[1] - 0.3 * limited).abs().max()) < 0.063
    assert float((octaves[2] - limited).abs().max()) < 0.063
    assert (octaves[1:, :4] > 0).any() and (octaves[:, 4:] <= 0).all()
    assert (net.tilt[4:] > 0).any()


@torch.no_grad()
def quieten(net: TileNetwork) -> None:
    """Let every other latent be in class 0 at many positions."""
    for stage in net.stages:
        stage.scale.bias[::2] = -stage.scale.weight[::2, -1, 0, 0] * 3


def noted_searches(net: TileNetwork, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(levels, classes) of every search that a network is going to make."""
    found = []

    def search(*arguments: Any, original: Any = net.search) -> Any:
        answer = original(*arguments)
        found.append((answer[0], arguments[1]))
        return answer

    monkeypatch.setattr(net, "search", search)
    return found


@torch.no_grad()
def test_a_tilt_moves_classes_but_not_those_that_are_not_coded(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network_of(pixels, 1).eval()
    quieten(net)
    net.stages[0].scale.bias[1] = 20
    net.tilt[:4] = torch.tensor([1.25, 0.5, 0.75, -1])
    said: list[Any] = []
    for stage in net.stages:
        stage.register_forward_hook(lambda _, __, out: said.append(out[0]))
    asked = noted_searches(net, monkeypatch)
    shares, strengths = torch.tensor([0, 0.3, 0.5, 1]), torch.tensor([1, 0.7, 0.5, 0])
    x, gain = batch_of(pixels[:64, :96]).expand(4, -1, -1, -1), torch.full((4,), 70.0)
    x_hat, rates = net(x, gain, strengths, None, shares)
    by = (8 * net.tilted(shares))[:, :, None, None]
    still = set()
    for stage, index, (levels, classes) in zip(net.stages, said, asked, strict=True):
        shift = by[:, stage.first : stage.first + stage.size]
        moved = torch.where(index > 0, (index + shift).clamp(0, 127), 0)
        moved = moved * lattice_mask(stage.lattice, 4, 6)
        assert torch.equal(classes, moved) and not levels[classes == 0].any()
        still |= {float(s) for s in shift.expand_as(index)[index == 0]}
        assert torch.equal(classes[0], index[0] * lattice_mask(stage.lattice, 4, 6)[0])
    assert {10.0, 0.0, -4.0} < still and (asked[0][1] == 127).any()
    # shares are what strengths leave
    again, same = net(x, gain, strengths)
    assert torch.equal(again, x_hat) and torch.equal(same.total, rates.total)


def test_gradients_reach_the_tilt(pixels: np.ndarray) -> None:
    """Finer steps cost bits and save errors."""
    net = network_of(pixels, 1).train()
    with torch.no_grad():
        net.tilt.fill_(-0.25)
    x = torch.from_numpy(crops(pixels, 4)).float() - 128
    gain, strength = torch.full((4,), 150.0), torch.zeros(4)
    x_hat, rates = net(x, gain, strength)
    (bits,) = torch.autograd.grad(rates.total.sum(), net.tilt, retain_graph=True)
    (errors,) = torch.autograd.grad(((x_hat - x) ** 2).mean(), net.tilt)
    assert (bits > 0).float().mean() > 0.9 and (errors < 0).float().mean() > 0.9
    # tissue for SSIM has none of it, for squared error all
    for strength, reached in ((1.0, False), (0.0, True)):
        run = run_of(net, low_share=0.0, strength=(strength, strength))
        run.one_step([crops(pixels, 2)], 0.0)
        assert run.net.tilt.grad is not None and bool(run.net.tilt.grad.any()) == reached


def test_networks_without_a_tilt_are_started_from_not_resumed(pixels: np.ndarray) -> None:
    net = network_of(pixels, 1)
    older = {k: v for k, v in net.state_dict().items() if k != "tilt"}
    new = network_of(pixels, 99)
    state, afresh = warm_start(net.settings, older, new.settings, new.state_dict())
    assert not afresh and state["tilt"].shape == (56,) and not state["tilt"].any()
    for k, v in older.items():
        assert torch.equal(v, state[k]), k
    run = Run(TrainSettings(), net.settings)
    for weights in ({}, older):  # averaged, and not
        with pytest.raises(ValueError, match="without a tilt cannot go on"):
            run.resume({"network": net.settings.to_dict(), "weights": weights, "average": older})


def test_models_hold_the_tilt_in_eighths(pixels: np.ndarray) -> None:
    net = network_of(pixels, 1)
    with torch.no_grad():
        net.tilt[:6] = torch.tensor([9, -9, 0.3, -0.3, 0.5, -9])
    decoder = decoder_file(net, {"name": "tiny"}, net.search.tables, hyper_classes(net))
    stored = container.parse(decoder).tensors["tilt"]
    assert stored[:6].tolist() == [32, -32, 2, -2, 0, -32]
    np.testing.assert_array_equal(stored[6:], 8 * net.tilt.detach().clamp_max(0)[6:])


@torch.no_grad()
@pytest.mark.parametrize("tilt", [0, 8, 16])
def test_symbols_of_tilted_tiles_are_those_of_training(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, tilt: int
) -> None:
    """Without lattices, whose positions training searches in another order."""
    stages = ((0, 4, 0), (4, 12, 0), (16, 32, 0), (48, 8, 0))
    net = network_of(pixels, 1, stages=stages, mean_stages=2).eval()
    quieten(net)
    for parameter in net.h_a[2].parameters():  # the hyper-latents of float16 would differ
        parameter.zero_()
    header, search = {"name": "tiny"}, net.search
    first = decoder_file(net, header, search.tables, hyper_classes(net))
    second = encoder_file(net, header, first, quality_gains(50), 0, 0.0, search.lagrange, 0.0, tilt)
    decoder, encoder = load_decoder(first), load_encoder(second)
    assert encoder.tilt == tilt
    asked = noted_searches(net, monkeypatch)
    image, shape = np.ascontiguousarray(pixels[:96, :128]), CellShape(96, 128)
    share = torch.tensor([tilt / 16])
    for gain in (60, 110):
        asked.clear()
        index = torch.tensor([float(gain)])
        x_hat, _ = net(batch_of(image), index, torch.zeros(1), None, share)
        coded = quantise_cell(image, shape, decoder, encoder, gain, 4, usual_search(encoder))
        assert not coded[0][0].any()
        for theirs, ours in zip(asked, coded[1:], strict=True):
            # float32 may decide a tie otherwise, which contexts of later stages see
            for a, b, few in zip(theirs, ours, (0.1, 0.02), strict=True):
                apart = np.count_nonzero(a[0].numpy().reshape(b.shape) != b)
                assert apart <= few * np.count_nonzero(b)
            classes = ours[1]
            assert classes.any() and (not classes.all() or gain > 60)
        ours = decode_tile(encode_tile(image, decoder, encoder, gain), decoder).astype(float)
        theirs = np.clip(x_hat[0].numpy().transpose(1, 2, 0) + 128, 0, 255)
        assert (np.abs(ours - theirs) < 0.6).mean() > 0.99  # 0.5 is rounding


# -- precision --


def stage_inputs() -> tuple[Any, Any, Any]:
    """(h, plane, context) of 48 context channels, on their grids of 1/32."""
    rng = np.random.default_rng(0)
    whole = lambda n: torch.from_numpy(rng.integers(0, 256, (1, n, 5, 6)) / 32).float()  # noqa: E731
    return whole(8), whole(1), (whole(48) - 4).clamp(-127 / 32, 127 / 32)


def test_integer_networks_are_the_same_under_autocast(pixels: np.ndarray) -> None:
    """Also from inputs in bfloat16, whose eight bits hold them."""
    net = network_of(pixels, 1)
    with torch.no_grad():
        for stage in net.stages:  # rows with sums that bfloat16 cannot hold
            stage.middle.weight.mul_(3)
    inputs = stage_inputs()
    for stage in net.stages:
        index, mean = stage(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = torch.nn.functional.conv2d(
                torch.cat([inputs[0]] * 2, 1), torch.rand(4, 16, 1, 1)
            )
            again = stage(*inputs), stage(*(t.bfloat16() for t in inputs))
        assert rough.dtype == torch.bfloat16  # it was on
        for other_index, other_mean in again:
            assert other_index.dtype == other_mean.dtype == torch.float32
            assert torch.equal(index, other_index) and torch.equal(mean, other_mean)
        assert torch.equal(index, index.round()) and (index.std() > 0.5)


def test_bfloat16_is_for_the_float_network_alone(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hyper-analysis differs by rounding; latents do not, nor, given the same hyper-latents, do
    symbols, rates and pixels."""
    net = network_of(pixels, 1).eval()
    before = outputs(net, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(outputs(net, pixels)[0], before[0])
    seen: list[Any] = []
    kinds = []
    net.h_a.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    analyse, hyper = net.analyse, net.h_a.forward
    latents, _ = analyse(batch_of(pixels[:96, :128]))
    monkeypatch.setattr(net, "analyse", lambda *a: seen.append(analyse(*a)) or seen[-1])
    monkeypatch.setattr(net.h_a, "forward", lambda *a: seen.append(hyper(*a)) or seen[-1])
    net.float_type = torch.bfloat16
    rough = outputs(net, pixels)
    assert kinds == [torch.bfloat16] and torch.equal(seen[0][0], latents)
    np.testing.assert_allclose(rough[1], before[1], rtol=0.02)
    monkeypatch.setattr(net.h_a, "forward", lambda *a: seen[1])
    net.float_type = torch.float32
    for a, b in zip(outputs(net, pixels), rough, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_flow_in_bfloat16(pixels: np.ndarray) -> None:
    run = run_of(network_of(pixels, 1), Machine(float_type=torch.bfloat16), low_share=0.0)
    run.one_step([crops(pixels, 2)], 0.0)
    for name, parameter in run.net.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_machines_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine.of("cpu") == Machine("cpu", torch.float32, 0)
    assert Machine.of("cpu", "bfloat16", 2) == Machine("cpu", torch.bfloat16, 2)
    monkeypatch.setattr("tools.train.machine.cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Machine.of() == Machine("cuda", torch.bfloat16, 4)
    assert Machine.of("cuda", "float32").float_type == torch.float32
    monkeypatch.setattr("tools.train.machine.cores", lambda: 2)
    assert Machine.of().workers == 1


# -- runs --


def run_of(net: TileNetwork, machine: Machine | None = None, **settings: Any) -> Run:
    """A run that has begun with a network's weights."""
    run = Run(TrainSettings(**{"warmup": 1, **settings}), net.settings, machine)
    run.net.load_state_dict(net.state_dict())
    run.prepare()
    run.net.train()
    return run


def crops(pixels: np.ndarray, count: int, seed: int = 0, side: int = 64) -> np.ndarray:
    sampler = Sampler([Source("a", [pixels])], side, seed)
    return np.ascontiguousarray(sampler.batch(count))


def gradients(run: Run) -> dict[str, Any]:
    return {n: p.grad.clone() for n, p in run.net.named_parameters()}


def test_gradients_are_averaged_over_batches(pixels: np.ndarray) -> None:
    """Four images at once, two and two, one and three: the same step, and the same log."""
    net, images = network_of(pixels, 1), crops(pixels, 4)
    found = []
    for parts in ([4], [2, 2], [1, 3]):
        run = run_of(net, clip=1e9, low_share=0.0)
        run.net.eval()  # no noise, which would differ
        log = run.one_step(np.split(images, np.cumsum(parts)[:-1]), 0.0)
        found.append((gradients(run), log))
    for other, log in found[1:]:
        for name, gradient in found[0][0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=2e-5, msg=name)
        for name in ("loss", "bpp", "psnr", "ssim", "norm"):
            assert log[name] == pytest.approx(found[0][1][name], rel=1e-4)


def test_a_resumed_run_is_the_run_that_did_not_stop(pixels: np.ndarray, tmp_path: Path) -> None:
    """Weights, moments, average, tables, noise and rates, to the last bit."""
    net = network_of(pixels, 1)
    batches = [[crops(pixels, 2, seed)] for seed in range(6)]
    whole = run_of(net, seed=4)
    whole.net.search.refresh = 16  # searches; six a step with all stages
    for batch in batches:
        whole.one_step(batch, 0.1)
    first = run_of(net, seed=4)
    first.net.search.refresh = 16
    for batch in batches[:3]:
        first.one_step(batch, 0.1)
    first.elapsed = 7.25
    save(tmp_path / "net.pt", first.state())
    torch.manual_seed(0)
    second = Run(first.settings, net.settings)
    second.net.search.refresh = 16
    second.resume(torch.load(tmp_path / "net.pt", weights_only=True))
    second.net.train()
    assert (second.step, second.elapsed) == (3, 7.25)
    for batch in batches[3:]:
        second.one_step(batch, 0.1)
    a, b = whole.state(), second.state()
    for part in ("weights", "average"):
        for k, v in a[part].items():
            assert torch.equal(v, b[part][k]), k
    for k, v in a["optimiser"]["state"].items():
        assert torch.equal(v["exp_avg_sq"], b["optimiser"]["state"][k]["exp_avg_sq"])
    for k, v in a["search"].items():
        assert np.array_equal(v, b["search"][k]), k
    assert not np.array_equal(a["search"]["cdf"], run_of(net).state()["search"]["cdf"])
    assert a["norms"] == b["norms"] and sum(map(len, a["norms"].values())) == 6
    # with another seed it goes elsewhere from there
    third = Run(TrainSettings(seed=5), net.settings)
    third.resume(torch.load(tmp_path / "net.pt", weights_only=True))
    assert not np.array_equal(third.rates(4)[2], first.rates(4)[2])


def test_averages_of_checkpoints_go_on(pixels: np.ndarray) -> None:
    run = run_of(network_of(pixels, 1))
    run.one_step([crops(pixels, 2)], 0.0)
    mean = averaged([run.state()] * 2)
    other = Run(TrainSettings(), run.net.settings)
    other.resume(mean)
    assert other.step == 1
    for k, v in run.average.items():
        torch.testing.assert_close(other.net.state_dict()[k], v)
    other.one_step([crops(pixels, 2)], 0.0)


OLDER_SETTINGS = {"analysis": 8, "analysis_layers": 1, "analysis_channels": 24}
"""Of checkpoints and models with an analysis network."""


def test_checkpoints_with_an_analysis_network_are_started_from_not_resumed(
    pixels: np.ndarray,
) -> None:
    net = network_of(pixels, 1)
    settings = net.settings.to_dict() | OLDER_SETTINGS
    assert NetworkSettings.from_dict(settings) == net.settings
    with pytest.raises(ValueError, match=r"unknown network settings: \['analysed'\]"):
        NetworkSettings.from_dict(settings | {"analysed": 8})
    older = net.state_dict() | {
        "analysis.0.weight": torch.ones(8, 25, 1, 1),
        "analysis_out.weight": torch.ones(24, 8, 1, 1),
    }
    new = network_of(pixels, 99)
    state, afresh = warm_start(net.settings, older, new.settings, new.state_dict())
    assert not afresh and state.keys() == net.state_dict().keys()
    for k, v in net.state_dict().items():
        assert torch.equal(v, state[k]), k
    run = Run(TrainSettings(), net.settings)
    for weights in ({}, older):  # averaged, and not
        with pytest.raises(ValueError, match="with an analysis network cannot go on"):
            run.resume({"network": settings, "weights": weights, "average": older})


def test_batches_with_outlying_gradients_are_skipped(pixels: np.ndarray) -> None:
    run = run_of(network_of(pixels, 1), low_share=1.0)
    run.norms["low"] = [1e-6] * 9
    before = {k: v.clone() for k, v in run.net.state_dict().items()}
    assert run.one_step([crops(pixels, 2)], 0.0)["skipped"] == 1
    for k, v in run.net.state_dict().items():
        assert torch.equal(v, before[k]), k
    run.norms["low"] = [1e6] * 9
    assert "skipped" not in run.one_step([crops(pixels, 2)], 0.0)
    with torch.no_grad():
        run.net.z_log_scale.fill_(float("nan"))  # spoils the rate
    assert run.one_step([crops(pixels, 2)], 0.0)["skipped"] == 1
    assert np.isfinite(run.norms["low"]).all()


def test_some_low_rates_are_coded_with_the_last_stage(pixels: np.ndarray) -> None:
    """... from the gain on at which encoders may, the others up to one; what low rates leave out
    gets no gradient."""
    net = network_of(pixels, 1)
    run = run_of(net, low_share=0.7, finest_share=0.3)
    drawn = []
    for run.step in range(2000):
        drawn.append(run.rates(3))
    low = np.array([d[0] for d in drawn])
    finest = np.array([d[1] for d in drawn])
    gains = np.array([d[2] for d in drawn])
    assert low.mean() == pytest.approx(0.7, abs=0.04)
    assert finest[low].mean() == pytest.approx(0.3, abs=0.04) and finest[~low].all()
    lowest, highest = run.settings.low_gain
    at = gains[low & finest]
    assert (at.min(), at.max()) == (run.settings.finest_gain, highest)
    at = gains[low & ~finest]
    assert (at.min(), at.max()) == (lowest, run.settings.coarse_gain)
    assert (gains[~low].min(), gains[~low].max()) == run.settings.high_gain
    for share in (0.0, 1.0):
        run = run_of(net, low_share=1.0, finest_share=share)
        run.one_step([crops(pixels, 2)], 0.0)
        assert (run.net.stages[5].scale.weight.grad is not None) == bool(share)
        assert run.net.stages[4].scale.weight.grad is not None


def test_networks_train_without_turns(pixels: np.ndarray) -> None:
    run = run_of(network_of(pixels, 1, turned=False), low_share=0.0)
    _, turns = run.net.analyse(batch_of(pixels[:64, :64]))
    assert torch.equal(turns, torch.eye(3)[None])
    before = {k: v.clone() for k, v in run.net.named_parameters()}
    assert np.isfinite(run.one_step([crops(pixels, 2)], 0.0)["loss"])
    assert any(not torch.equal(v, before[k]) for k, v in run.net.named_parameters())


def test_moving_averages_keep_the_order_of_latents(pixels: np.ndarray) -> None:
    run = run_of(network_of(pixels, 1))
    for seed in range(3):
        run.one_step([crops(pixels, 2, seed)], 0.0)
    assert run.average["order"].dtype == torch.int64
    assert torch.equal(run.average["order"], run.net.order)
    mean = averaged([run.state()] * 3)["average"]
    assert mean["order"].dtype == torch.int64 and torch.equal(mean["order"], run.net.order)


@pytest.mark.parametrize("steps", [0, 40])
def test_schedules_are_of_minutes_or_of_steps(pixels: np.ndarray, steps: int) -> None:
    run = run_of(network_of(pixels, 1), minutes=8.0, steps=steps)
    run.step, run.elapsed = 10, 4.0
    assert run.progress == (0.25 if steps else 0.5)


def test_a_run_ends_after_its_steps(pixels: np.ndarray, folder: Path, tmp_path: Path) -> None:
    tiny, out = saved(network_of(pixels, 1), tmp_path / "tiny.pt"), tmp_path / "net.pt"
    shape = [f"{k}={json.dumps(v)}" for k, v in TINY.items()]
    common = ["--data", str(folder), "--out", str(out), "--batch", "1", "--device", "cpu"]
    more = ["--start-from", str(tiny), "--minutes", "0.001", "--set", *shape, "crop=64"]
    for steps in (3, 5):
        training.main([*common, *more, f"steps={steps}"])
        assert torch.load(out, weights_only=True)["step"] == steps


def saved(net: TileNetwork, path: Path) -> Path:
    state = {"network": net.settings.to_dict(), "average": net.state_dict(), "weights": {}}
    torch.save({**state, "train": {}, "step": 0, "elapsed": 0.0}, path)
    return path


def test_training_resumes_and_exports(
    pixels: np.ndarray, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = lambda s, d, e, crops, *more: count_symbols(s, d, e, 4, *more)  # noqa: E731
    monkeypatch.setattr("tools.export.__main__.count_symbols", few)
    monkeypatch.setattr("tools.export.__main__.TYPICAL_CROPS", 2)
    monkeypatch.setattr(training, "ROW_STEPS", 2)
    tiny = saved(network_of(pixels, 1), tmp_path / "tiny.pt")
    shape = [f"{k}={json.dumps(v)}" for k, v in TINY.items()]
    out, models = tmp_path / "net.pt", tmp_path / "m"
    common = ["--data", str(folder), "--batch", "2", "--device", "cpu", "--set", *shape]
    more = ["shape_share=0.5", "shapes=[[96, 224]]"]
    begin = ["--start-from", str(tiny)]
    training.main([*common, *more, "steps=2", *begin, "--out", str(out)])
    first = torch.load(out, weights_only=True)
    training.main([*common, "steps=4", "--out", str(out), "--export", str(models)])
    second = torch.load(out, weights_only=True)
    assert (first["step"], second["step"]) == (2, 4) and second["elapsed"] > first["elapsed"] > 0
    assert second["search"]["calls"] > first["search"]["calls"]
    assert NetworkSettings.from_dict(second["network"]) == NetworkSettings(**TINY)
    assert first["crops"]["shapes"] == ((96, 224),) and second["crops"] == CropSettings().to_dict()
    rows = [json.loads(s) for s in out.with_suffix(".jsonl").read_text().splitlines()]
    assert rows and all(r["images_per_second"] > 0 and 0 <= r["waiting"] < 1 for r in rows)
    assert {p.name for p in models.iterdir()} == {"net.wscm", "net.encoder.wscm"}
    assert load_encoder((models / "net.encoder.wscm").read_bytes()).tilt == 8
    begun = tmp_path / "begun.pt"
    model = ["--start-from", str(models / "net.wscm")]
    training.main([*common, *model, "--out", str(begun), "--minutes", "0.01"])
    assert torch.load(begun, weights_only=True)["step"] >= 1


def test_a_new_network_begins_with_what_the_images_look_like(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    pixels: np.ndarray, tmp_path: Path,
) -> None:  # fmt: skip
    sampler = Sampler(load_sources(folder), 256, 0)
    asked = []

    def few(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return band_statistics(*arguments, crops=6)

    monkeypatch.setattr(training, "band_statistics", few)
    monkeypatch.setattr(training, "fitted_border", lambda *_: pytest.fail("not of lapped blocks"))
    for is_turned in (False, True):
        net = TileNetwork(NetworkSettings(**{**TINY, "turned": is_turned}))
        training.begin(net, sampler, 0.75, None)
    assert asked == [False, True] and capsys.readouterr().out == ""
    assert (net.deviation.diff() <= 0).all() and int(net.order[0]) == 0
    assert net.order.unique().numel() == 56 and net.order.dtype == torch.int64
    luma = (net.order < 256) & (torch.arange(56) >= 4)  # of all stages but the first
    assert luma.any() and not luma[4:].all()
    assert torch.equal(net.tilt.detach(), torch.where(luma, -0.5, 0.0))
    tiny = saved(network_of(pixels, 1), tmp_path / "tiny.pt")
    training.begin(net, sampler, 0.75, str(tiny))
    assert "afresh: nothing" in capsys.readouterr().out
    for k, v in network_of(pixels, 1).state_dict().items():
        assert torch.equal(v, net.state_dict()[k]), k


def test_exports_need_neither_imagecodecs_nor_tifffile(
    pixels: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    """As on a CUDA machine: from a pack, in a process that cannot import them."""
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,split,priority\nx/cmu_0.png,train,1\n")
    write_pack(folder, manifest, tmp_path / "pack.zip", 2**20)
    tiny = saved(network_of(pixels, 1), tmp_path / "tiny.pt")
    code = (
        "import sys; sys.modules['imagecodecs'] = sys.modules['tifffile'] = None\n"
        "from pathlib import Path\n"
        "from tools.train.__main__ import export\n"
        "import tools.export.__main__ as e\n"
        "count = e.count_symbols\n"
        "e.count_symbols = lambda s, d, f, crops, *more: count(s, d, f, 4, *more)\n"
        "e.TYPICAL_CROPS = 2\n"
        "export(*map(Path, sys.argv[1:]))\n"
    )
    arguments = [str(tiny), str(tmp_path / "pack.zip"), str(tmp_path / "m")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m" / "tiny.encoder.wscm").stat().st_size > 1000


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_leaves_a_checkpoint(pixels: np.ndarray, folder: Path, tmp_path: Path) -> None:
    tiny, out = saved(network_of(pixels, 1), tmp_path / "tiny.pt"), tmp_path / "net.pt"
    shape = [f"{k}={json.dumps(v)}" for k, v in TINY.items()]
    with subprocess.Popen(
        [
            sys.executable, "-m", "tools.train", "--data", str(folder), "--out", str(out),
            "--start-from", str(tiny), "--minutes", "30", "--batch", "1", "--device", "cpu",
            "--workers", "2", "--set", *shape, "crop=64", "shape_share=0",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("["):  # fifty steps
                break
        os.killpg(process.pid, signal.SIGTERM)  # as `timeout` does: the whole group
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    state = torch.load(out, weights_only=True)
    assert f"SIGTERM: stopped at step {state['step']}" in rest and state["step"] >= 50
    assert state["elapsed"] > 0


@pytest.mark.parametrize("changes", [{}, {"lapped": True}, {"context_channels": 16}], ids=str)
def test_model_files_hold_the_network(pixels: np.ndarray, changes: dict[str, Any]) -> None:
    net = network_of(pixels, 1, **changes)
    n = net.settings
    header = {"name": "tiny", "trained": {"steps": 3, "minutes": 1.5}}
    classes = hyper_classes(net)
    decoder = decoder_file(net, header, net.search.tables, classes)
    encoder = encoder_file(net, header, decoder, quality_gains(50), 130, 0.7, 9.0, 0.4, 8)
    state = state_of_model(decoder, encoder)
    assert (state["step"], state["elapsed"]) == (3, 1.5)
    again = TileNetwork(NetworkSettings.from_dict(state["network"]))
    again.load_state_dict(state["average"])
    for old, new in zip(net.stages, again.stages, strict=True):
        for a, b in zip(old.modules(), new.modules(), strict=True):
            if isinstance(a, IntegerConv):  # what runs is the same integers
                for x, y in zip(a.quantised()[:2], b.quantised()[:2], strict=True):
                    torch.testing.assert_close(x, y, rtol=0, atol=0)
    (x, bits), (x_again, bits_again) = outputs(net, pixels), outputs(again, pixels)
    assert np.abs(x - x_again).mean() < 0.1  # of a step of 6: h_a travels in float16
    np.testing.assert_allclose(bits, bits_again, rtol=0.01)
    shares = torch.arange(17) / 16
    assert torch.equal(again.tilted(shares), net.tilted(shares))
    for name in ("order", "colours", "mean", "border"):
        torch.testing.assert_close(getattr(again, name), getattr(net, name), rtol=0, atol=1e-6)
    seen = n.context_channels
    torch.testing.assert_close(again.deviation[:seen], net.deviation[:seen], rtol=1e-5, atol=0)
    file = container.parse(encoder)
    older_header = {**file.header, "corrected": 24, "network": n.to_dict() | OLDER_SETTINGS}
    graphs = {"analysis": file.graphs["hyper_analysis"], **file.graphs}
    older_state = state_of_model(decoder, container.pack(older_header, graphs, file.tensors))
    assert older_state["network"] == state["network"]
    for k, v in older_state["average"].items():
        assert torch.equal(v, state["average"][k]), k
    with pytest.raises(ValueError, match="not a decoder and its encoder"):
        state_of_model(decoder[:-1] + bytes([decoder[-1] ^ 1]), encoder)
    file = container.parse(decoder)

    def without(name: str) -> tuple[bytes, bytes]:
        tensors = {k: v for k, v in file.tensors.items() if k != name}
        older = container.pack(file.header, file.graphs, tensors)
        gains = quality_gains(50)
        return older, encoder_file(net, header, older, gains, 130, 0.7, 9.0, 0.4, 8)

    assert not state_of_model(*without("tilt"))["average"]["tilt"].any()
    with pytest.raises(ValueError, match="no tensor 'order'"):
        state_of_model(*without("order"))


@torch.no_grad()
def test_graphs_of_the_encoder_and_of_the_chain_give_what_the_network_gives(
    pixels: np.ndarray,
) -> None:
    """Up to weights in float16; the chain to the bit."""
    ort = pytest.importorskip("onnxruntime")
    net = network_of(pixels, 1).eval()
    run = lambda graph, **x: ort.InferenceSession(graph).run(None, x)[0]  # noqa: E731
    y, _ = net.analyse(batch_of(pixels[:96, :128]))
    plane = np.full((1, 1, 6, 8), 90, np.float32)
    ours = run(hyper_analysis_graph(net), y=y[:, :48].numpy(), plane=plane)
    theirs = 4 * net.h_a(net.hyper_input(y, torch.from_numpy(plane / 32))).numpy()
    assert ours.shape == theirs.shape and theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    rng = np.random.default_rng(0)
    context = rng.integers(1, 256, (1, 49, 5, 6)).astype(np.uint8)
    ours = run(chain_graph(net), context=context)
    theirs = net.chain_out(net.chain((torch.from_numpy(context).float() - 128) / 32)) * 64 + 128
    assert ours.shape == (1, 5, 6, 48) and ours.std() > 5
    np.testing.assert_array_equal(ours, theirs.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("lapped", "is_turned", "tilt"), [(True, True, 8), (True, False, 16), (False, True, 0)], ids=str
)
def test_exported_networks_code_as_they_were_trained(
    pixels: np.ndarray, lapped: bool, is_turned: bool, tilt: int
) -> None:
    """About the same pixels at about the same size, and exactly the same turn."""
    net = network_of(pixels, 1, **{**ALL, "lapped": lapped, "turned": is_turned}).eval()
    header = {"name": "tiny"}
    first = decoder_file(net, header, net.search.tables, hyper_classes(net))
    second = encoder_file(
        net, header, first, quality_gains(50), 0, 0.7, net.search.lagrange, 0.0, tilt
    )
    decoder, encoder = load_decoder(first), load_encoder(second)
    image = np.ascontiguousarray(pixels[:96, :128])
    for gain in (150, 230):
        tile = encode_tile(image, decoder, encoder, gain)
        assert tile.learned is not None and tile.learned.stages == 5
        index, share = torch.tensor([float(gain)]), torch.tensor([tilt / 16])
        with torch.no_grad():
            _, turns = net.analyse(batch_of(image))
            x_hat, rates = net(batch_of(image), index, torch.tensor([0.7]), None, share)
        turn = struct.unpack("3b", tile.payload[:3])
        assert any(turn) == is_turned
        np.testing.assert_allclose(rotation(turn), turns[0], atol=1e-6)
        ours = decode_tile(tile, decoder).astype(float)
        theirs = np.clip(x_hat[0].numpy().transpose(1, 2, 0) + 128, 0, 255)
        assert np.abs(ours - theirs).mean() < 0.2 * 2 ** (6 - gain / 32) + 0.3
        bits = float(rates.total) * image[..., 0].size
        assert 8 * len(tile.payload) == pytest.approx(bits, rel=0.05)


def test_networks_are_averaged(pixels: np.ndarray, tmp_path: Path) -> None:
    paths, nets = [], [network_of(pixels, seed) for seed in (1, 2)]
    transform = {k: nets[0].state_dict()[k] for k in TRANSFORM}
    nets[1].load_state_dict(nets[1].state_dict() | transform)
    for i, net in enumerate(nets):
        paths.append(str(tmp_path / f"{i}.pt"))
        state = {"network": net.settings.to_dict(), "train": {}, "step": i, "elapsed": 1.0}
        torch.save({**state, "average": net.state_dict(), "weights": {}}, paths[-1])
    training.main(["--average", *paths, "--out", str(tmp_path / "mean.pt")])
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)["average"]
    for k, v in mean.items():
        expected = (nets[0].state_dict()[k] + nets[1].state_dict()[k]) / 2
        torch.testing.assert_close(v, expected.to(v.dtype))
    assert torch.equal(mean["order"], nets[0].order) and mean["order"].dtype == torch.int64


# -- images --


def test_packs_hold_the_same_pixels(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    rows = [f"x/cmu_{i}.png,train,{i}" for i in range(2)]
    manifest.write_text("path,split,priority\n" + "\n".join(rows) + "\n")
    pack = tmp_path / "pack.zip"
    training.main(["--data", str(folder), "--out", str(pack), "--pack", str(manifest)])
    for a, b in zip(load_sources(folder), load_sources(pack), strict=True):
        assert (a.name, a.jpeg) == (b.name, b.jpeg)
        for x, y in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(x, y)


def test_packs_are_in_order_of_priority_and_of_the_size_asked(
    pixels: np.ndarray, tmp_path: Path
) -> None:
    """JPEG files stay what they are; the manifest's rows say so behind, too."""
    data, manifest = tmp_path / "train", tmp_path / "manifest.csv"
    data.mkdir()
    rows = ["path,split,priority,jpeg_history_quality_or_none"]
    histories = ("none-detected", "q90", "jpeg-grid", "q95", '"q98, 2x area-downsampled"', "q95")
    for i, history in enumerate(histories):
        suffix = ".jpg" if i in (1, 3) else ".png"
        crop = PIL_Image.fromarray(np.ascontiguousarray(pixels[i * 80 : i * 80 + 260, 100:420]))
        crop.save(data / f"s_{i}{suffix}", **({"quality": 95} if suffix == ".jpg" else {}))
        split = "train" if i != 5 else "val"
        rows.append(f"shared/train/s_{i}{suffix},{split},{10 - i},{history}")
    manifest.write_text("\n".join(rows) + "\n")
    assert write_pack(data, manifest, tmp_path / "all.zip", 2**30) == 5
    with zipfile.ZipFile(tmp_path / "all.zip") as pack:
        names = pack.namelist()
        sizes = [i.file_size for i in pack.infolist()]
        assert pack.read("s_3.jpg") == (data / "s_3.jpg").read_bytes()
    assert names == ["s_4.webp", "s_3.jpg", "s_2.webp", "s_1.jpg", "s_0.webp", "manifest.csv"]
    limit = sum(sizes[:3]) + 400
    assert write_pack(data, manifest, tmp_path / "some.zip", limit) == 3
    with zipfile.ZipFile(tmp_path / "some.zip") as pack:
        assert pack.namelist() == [*names[:3], "manifest.csv"]
        assert sum(i.file_size for i in pack.infolist()) <= limit
    past = (False, True, True, True, False)
    assert load_sources(tmp_path / "all.zip")[0].jpeg == past
    assert load_sources(tmp_path / "some.zip")[0].jpeg == past[2:]
    assert load_sources(data)[0].jpeg == (*past, True)  # the manifest beside the folder


def test_a_manifest_of_something_else_is_left_alone(folder: Path) -> None:
    (folder.parent / "manifest.csv").write_text("name;age\nx;3\n")
    try:
        assert load_sources(folder)[0].jpeg == (False, False)
    finally:
        (folder.parent / "manifest.csv").unlink()


def grid_of(tile: np.ndarray) -> float:
    """How much more a crop's columns differ across some multiple of 8 than elsewhere."""
    steps = np.abs(np.diff(tile.astype(float), axis=1)).mean((0, 2))
    by_phase = np.array([steps[k::8].mean() for k in range(8)])
    return float(by_phase.max() / by_phase.mean())


def test_images_with_a_jpeg_past_are_halved_more_often(pixels: np.ndarray) -> None:
    image = pixels[:512, :512].copy()
    blocks = image.reshape(64, 8, 64, 8, 3).mean((1, 3), dtype=float)
    image[:] = np.repeat(np.repeat(blocks, 8, 0), 8, 1)
    settings = CropSettings(stain=0)
    shares = []
    for jpeg in (False, True):
        sampler = Sampler([Source("a", [image], (jpeg,))], 64, 0, settings)
        found = np.array([grid_of(sampler.one()) for _ in range(300)])
        shares.append((found < 6).mean())  # blocks of 4 pixels instead of 8
    assert shares == pytest.approx([0.4, 0.7], abs=0.08)


def test_stains_are_tables_of_what_samples_can_be(pixels: np.ndarray) -> None:
    rng, again = np.random.default_rng(0), np.random.default_rng(0)
    table = stained(rng)
    density = -np.log((pixels[:40, :40].astype(float) + 1) / 256)
    gains = np.exp(again.normal(0, 0.12, 3)) * np.exp(again.normal(0, 0.15))
    expected = 256 * np.exp(-density * gains - again.normal(0, 0.02)) - 1
    for c in range(3):
        np.testing.assert_allclose(
            table[c][4 * pixels[:40, :40, c].astype(int)], expected[..., c], atol=1e-9
        )
    mean = pixels[:40, :40].reshape(20, 2, 20, 2, 3).mean((1, 3))
    np.testing.assert_array_equal(halved(pixels[:40, :40]) / 4, mean)


def test_sources_are_weighed_by_a_power_of_their_area(pixels: np.ndarray) -> None:
    small, large = pixels[:256, :256], pixels[:512]
    for exponent, share in ((0.0, 0.5), (0.5, 6**0.5), (1.0, 6.0)):
        settings = CropSettings(area_exponent=exponent)
        sampler = Sampler([Source("a", [small]), Source("b", [large])], 256, 0, settings)
        weights = np.diff(sampler.cumulative[256, 256], prepend=0)
        ratio = 1.0 if exponent == 0 else share
        assert weights[1] / weights[0] == pytest.approx(ratio)


def test_some_batches_have_other_shapes_and_some_tiles_end(pixels: np.ndarray) -> None:
    settings = CropSettings(edge=0.3, shape_share=0.4, stain=0)
    sampler = Sampler([Source("a", [pixels])], 256, 0, settings)
    shapes, ends, tiles = [], 0, 0
    for step in range(60):
        batch = sampler.tiles(step, 0, 4)
        assert batch.dtype == np.uint8 and batch.shape[1] == 3
        assert sampler.tiles(step, 1, 4).shape == batch.shape
        shapes.append(batch.shape)
        assert 0.8 < batch[:, 0].size / (4 * 256**2) < 1.2
        for tile in batch:
            right = (tile[:, :, -1] == tile[:, :, -2]).all()
            below = (tile[:, -1] == tile[:, -2]).all()
            ends, tiles = ends + int(right or below), tiles + 1
    square = sum(s == (4, 3, 256, 256) for s in shapes)
    assert 24 < square < 48 and len(set(shapes)) == 6
    assert (12, 3, 96, 224) in shapes and (4, 3, 128, 512) in shapes
    assert 0.2 < ends / tiles < 0.5
    # shapes that no image holds are left out
    small = Sampler([Source("a", [pixels[:300, :300]])], 256, 0, CropSettings(shape_share=1.0))
    assert small.tiles(0, 0, 4).shape == (12, 3, 96, 224)
    with pytest.raises(ValueError, match="no image holds"):
        Sampler([Source("a", [pixels[:300, :300]])], 512, 0)
    with pytest.raises(ValueError, match="multiples of 32"):
        CropSettings(shapes=((100, 256),))


def test_crops_of_all_shapes_are_pieces_of_the_image() -> None:
    """Turned and mirrored, but neither moved nor stretched: a picture of its own coordinates."""
    y, x = np.mgrid[:200, :240]
    image = np.stack([y, x, 0 * x], 2).astype(np.uint8)
    settings = CropSettings(stain=0, halve=0, edge=0, shapes=((64, 160),), shape_share=1.0)
    sampler = Sampler([Source("a", [image])], 64, 0, settings)
    turns = set()
    for step in range(20):
        for tile in sampler.tiles(step, 0, 4).astype(int):
            down, right = (tile[:2, 1, 0] - tile[:2, 0, 0]), (tile[:2, 0, 1] - tile[:2, 0, 0])
            turns.add((*down, *right))
            rows, columns = np.mgrid[: tile.shape[1], : tile.shape[2]]
            for c in range(2):
                expected = tile[c, 0, 0] + rows * down[c] + columns * right[c]
                np.testing.assert_array_equal(tile[c], expected)
    assert len(turns) == 8


# -- batches drawn ahead --


def steps_of(loader: Loader, count: int) -> list[list[np.ndarray]]:
    with loader:
        return [loader.step() for _ in range(count)]


def test_batches_do_not_depend_on_who_draws_them(pixels: np.ndarray) -> None:
    """... nor on where a run began; two runs of other seeds, two steps and two parts differ."""
    sources = [Source("a", [pixels], (True,)), Source("b", [pixels[:300, :400]])]
    settings = CropSettings(shapes=((32, 128),), shape_share=0.5)
    common = (sources, 64, 3, settings, 2, 2)
    drawn = {w: steps_of(Loader(*common, workers=w), 8) for w in (0, 1, 3)}
    for steps in drawn.values():
        for a, b in zip(drawn[0], steps, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
    later = steps_of(Loader(*common, first=5, workers=2), 3)
    np.testing.assert_array_equal(later[0][1], drawn[0][5][1])
    np.testing.assert_array_equal(later[2][0], drawn[0][7][0])
    assert {a[0].shape for a in drawn[0]} == {(2, 3, 64, 64), (2, 3, 32, 128)}
    other = steps_of(Loader(sources, 64, 4, settings, 2, 2), 1)[0][0]
    images = [tuple(i.tobytes() for i in part) for step in drawn[0] for part in step]
    assert len({i for part in images for i in part}) == 32
    assert other.tobytes() not in {p.tobytes() for step in drawn[0] for p in step}


def test_workers_end_with_the_run_and_tell_why_they_failed(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, settings = [Source("a", [pixels])], CropSettings()
    loader = Loader(sources, 64, 0, settings, 1, workers=2)
    processes = [w.process for w in loader.workers]
    alive = [p.pid for p in processes]
    loader.step()
    with loader:
        pass
    assert not loader.workers
    for pid in alive:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with Loader(sources, 64, 0, settings, 1, workers=1) as loader:
        loader.workers[0].tasks.send(("no step", 0))
        with pytest.raises(RuntimeError, match=r"(?s)draws crops has failed.*Traceback"):
            for _ in range(9):
                loader.step()
    with Loader(sources, 64, 0, settings, 1, workers=1) as loader:
        loader.workers[0].process.kill()
        with pytest.raises(RuntimeError, match="has died"):
            for _ in range(9):
                loader.step()


def test_workers_import_no_torch() -> None:
    code = "import sys, tools.train.loader; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_networks_keep_the_papers_settings() -> None:
    assert TrainSettings().to_dict()["seed"] == 0
    net = TileNetwork(NetworkSettings())
    assert sum(net.kmac_per_pixel().values()) < 10
