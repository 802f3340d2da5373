"""Training and export, on a tiny network. Needs torch (the ``train`` extra), else left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")
PIL_Image = pytest.importorskip("PIL.Image", reason="the train extra is not installed")

from tools.export import __main__ as export
from tools.export.model import decoder_file, encoder_file, hyper_classes, quality_gains
from tools.train import __main__ as training
from tools.train.dependent import LANES, DependentSearch, dependent_bits
from tools.train.images import Sampler, Source, load_sources
from tools.train.integer import ACCUMULATOR_BOUND, IntegerConv
from tools.train.klt import block_klt, colour_matrix
from tools.train.losses import ssim_luma
from tools.train.network import TileNetwork, adaptive_steps
from tools.train.settings import NetworkSettings, TrainSettings
from tools.train.shipped import state_of_model
from tools.train.tables import MAX_RADIUS, TABLE_CLASSES, fitted_tables, normal_weights, scale_of
from wsicodec.codec.adaptive import adaptive_steps as runtime_steps
from wsicodec.entropy.trellis import split_levels
from wsicodec.metrics import ssim


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


def test_the_klt_orders_and_inverts(pixels: np.ndarray) -> None:
    sampler = Sampler([Source("a", [pixels])], 128, 0)
    basis, variance, _ = block_klt(sampler, 8, 0.6, crops=40)
    assert (np.diff(variance) <= 1e-6 * variance[0]).all()
    gram = np.kron(colour_matrix(0.6).T @ colour_matrix(0.6), np.eye(64))
    np.testing.assert_allclose(np.linalg.inv(basis).T @ gram, basis, atol=1e-6)


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


# -- networks that begin with another's weights --


TINY: dict[str, Any] = {
    "stages": ((0, 4, 1), (0, 4, 2), (0, 4, 3), (4, 12, 0), (16, 32, 0), (48, 8, 0)),
    "mean_stages": 3, "context_channels": 48, "z_channels": 4, "hyper": 8, "context": 8,
    "middle": 8, "chain": 8, "chain_kernels": (1, 3), "analysis": 8, "analysis_layers": 1,
    "analysis_channels": 24,
}  # fmt: skip


def network_of(pixels: np.ndarray, seed: int, **changes: Any) -> TileNetwork:
    """A network whose layers all have an effect, of a random transform."""
    run = training.Run(TrainSettings(seed=seed), NetworkSettings(**{**TINY, **changes}), "cpu")
    sampler = Sampler([Source("a", [pixels])], 128, 0)
    run.net.start_from_klt(*block_klt(sampler, run.net.settings.block, 0.6, crops=10))
    with torch.no_grad():
        for name, parameter in run.net.named_parameters():
            if not parameter.any() and name.endswith("weight"):
                parameter.normal_(0, 0.05)
    return run.net


def begun_from(net: TileNetwork, pixels: np.ndarray, **changes: Any) -> TileNetwork:
    """Another network that took over a checkpoint's weights."""
    other = network_of(pixels, 99, **changes)
    run = training.Run(TrainSettings(), other.settings, "cpu")
    run.net = other
    average = {k: v.clone() for k, v in net.state_dict().items()}
    run.start_from({"network": net.settings.to_dict(), "average": average})
    return run.net


@torch.no_grad()
def outputs(net: TileNetwork, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    net.eval()
    x = torch.from_numpy(pixels[:96, :128].transpose(2, 0, 1)[None].astype(np.float32)) - 128
    x_hat, rates = net(x, torch.tensor([110.0]), torch.tensor([0.7]))
    return x_hat.numpy(), rates.total.numpy()


def assert_same_outputs(a: TileNetwork, b: TileNetwork, pixels: np.ndarray) -> None:
    for x, y in zip(outputs(a, pixels), outputs(b, pixels), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-3)


def test_a_network_begins_where_another_ended(pixels: np.ndarray) -> None:
    old = network_of(pixels, 1)
    assert outputs(old, pixels)[1] != outputs(network_of(pixels, 99), pixels)[1]
    assert_same_outputs(old, begun_from(old, pixels), pixels)


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 20},
        {"middle": 24},
        {"context": 12, "middle": 16},
        {"chain": 24},
        {"context": 12, "middle": 16, "chain": 12},
        {"hyper": 12},
        {"analysis": 12},
        {"context_channels": 56},
        {"hyper": 12, "context": 12, "middle": 16, "chain": 12, "analysis": 12},
    ],
    ids=" ".join,
)
def test_wider_networks_begin_as_the_narrow_one(
    pixels: np.ndarray, changes: dict[str, Any]
) -> None:
    """New columns are zero: what new rows give changes nothing yet."""
    old = network_of(pixels, 1)
    assert_same_outputs(old, begun_from(old, pixels, **changes), pixels)


def test_stages_of_a_wider_network_agree(pixels: np.ndarray) -> None:
    old = network_of(pixels, 1)
    new = begun_from(old, pixels, context=20, middle=24)
    rng = np.random.default_rng(0)
    whole = lambda n: torch.from_numpy(rng.integers(0, 256, (1, n, 5, 6)) / 32).float()  # noqa: E731
    h, plane, context = whole(8), whole(1), (whole(48) - 4).clamp(-127 / 32, 127 / 32)
    for a, b in zip(old.stages, new.stages, strict=True):
        for x, y in zip(a(h, plane, context), b(h, plane, context), strict=True):
            np.testing.assert_array_equal(x.detach().numpy(), y.detach().numpy())


def test_a_1x1_kernel_begins_as_the_centre_of_a_3x3(pixels: np.ndarray) -> None:
    old = network_of(pixels, 1, chain_kernels=(3, 3))
    new = begun_from(old, pixels, chain_kernels=(1, 3))
    np.testing.assert_array_equal(
        new.chain[0].weight.detach()[:, :, 0, 0], old.chain[0].weight.detach()[:, :, 1, 1]
    )
    np.testing.assert_array_equal(new.chain[1].weight.detach(), old.chain[1].weight.detach())


def test_stages_begin_with_those_of_the_same_channels() -> None:
    new = NetworkSettings(**TINY)
    assert training.stage_sources(new.to_dict()["stages"], new) == {k: k for k in range(6)}
    old = [[0, 4, 0], [4, 12, 0], [16, 20, 0], [36, 12, 0], [48, 8, 0]]
    # one lattice becomes three; channels cut otherwise have no source
    assert training.stage_sources(old, new) == {0: 0, 1: 0, 2: 0, 3: 1, 5: 4}
    old = [[0, 4, 1], [0, 4, 2], [0, 4, 3], [4, 12, 1], [4, 12, 2], [4, 12, 3], [16, 32, 0]]
    assert training.stage_sources(old, new) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 6}


def test_weights_fill_the_first_rows_and_columns() -> None:
    def filled(shape: tuple[int, ...], source: Any, segments: Any = None) -> Any:
        target = torch.full(shape, -1.0)
        before = target.clone()
        taken = training.take_over(target, torch.as_tensor(source, dtype=torch.float32), segments)
        if not taken:
            assert torch.equal(target, before)
        return target if taken else None

    four = torch.arange(1.0, 7).view(2, 3, 1, 1)
    assert torch.equal(filled((2, 3, 1, 1), four), four)
    wide = filled((3, 5, 1, 1), four)
    assert torch.equal(wide[:2, :3], four) and not wide[:2, 3:].any()
    assert (wide[2] == -1).all()  # a new row keeps its random weights
    # inputs of two segments: each grows by itself
    wide = filled((2, 6, 1, 1), four, ((2, 1), (4, 2)))
    assert wide[0, :, 0, 0].tolist() == [1, 2, 0, 0, 3, 0]
    assert filled((5,), [1, 2]).tolist() == [1, 2, -1, -1, -1]
    assert filled((1,), [1, 2]) is None
    assert filled((2, 3, 1, 1), torch.arange(54.0).view(2, 3, 3, 3))[1, 2, 0, 0] == 49
    assert filled((2, 3, 3, 3), four) is None
    assert filled((2, 6, 1, 1), four, ((2, 2), (4, 2))) is None


def test_training_resumes_and_exports(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = NetworkSettings(
        stages=((0, 4, 1), (0, 4, 2), (0, 4, 3), (4, 12, 0), (16, 24, 0)), mean_stages=4,
        context_channels=16, z_channels=4, hyper=8, context=8, middle=8, chain=8,
        chain_kernels=(1, 3), analysis=8, analysis_layers=1, analysis_channels=24,
    )  # fmt: skip
    monkeypatch.setattr(training, "NetworkSettings", lambda: small)
    monkeypatch.setattr(
        training.NetworkSettings, "from_dict", NetworkSettings.from_dict, raising=False
    )
    out = tmp_path / "net.pt"
    arguments = ["--data", str(folder), "--out", str(out), "--batch", "2", "--device", "cpu"]
    training.main([*arguments, "--minutes", "0.05"])
    first = torch.load(out, weights_only=True)
    training.main([*arguments, "--minutes", "0.1"])
    second = torch.load(out, weights_only=True)
    assert second["step"] > first["step"] and second["elapsed"] >= 0.1
    assert NetworkSettings.from_dict(second["network"]) == small
    assert all(json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines())
    export.main(
        [
            str(out),
            "--data",
            str(folder),
            "--out",
            str(tmp_path / "m"),
            "--crops",
            "4",
            "--name",
            "tiny",
        ]
    )
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"tiny.wscm", "tiny.encoder.wscm"}
    begun = tmp_path / "begun.pt"
    training.main(
        [
            *arguments[:2],
            "--out",
            str(begun),
            *arguments[4:],
            "--minutes",
            "0.01",
            "--start-from",
            str(tmp_path / "m" / "tiny.wscm"),
        ]
    )
    assert torch.load(begun, weights_only=True)["step"] >= 1


def test_model_files_hold_the_network(pixels: np.ndarray) -> None:
    net = network_of(pixels, 1)
    header = {"name": "tiny", "trained": {"steps": 3, "minutes": 1.5}}
    classes = hyper_classes(net)
    decoder = decoder_file(net, header, net.search.tables, classes)
    encoder = encoder_file(net, header, decoder, quality_gains(50), 130, 0.7, 9.0)
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
    assert np.abs(x - x_again).mean() < 0.1  # of a step of 6: the transform travels in float16
    np.testing.assert_allclose(bits, bits_again, rtol=0.01)
    with pytest.raises(ValueError, match="not a decoder and its encoder"):
        state_of_model(decoder[:-1] + bytes([decoder[-1] ^ 1]), encoder)


def test_networks_are_averaged(pixels: np.ndarray, tmp_path: Path) -> None:
    paths, nets = [], [network_of(pixels, seed) for seed in (1, 2)]
    for i, net in enumerate(nets):
        paths.append(str(tmp_path / f"{i}.pt"))
        state = {"network": net.settings.to_dict(), "train": {}, "step": i, "elapsed": 1.0}
        torch.save({**state, "average": net.state_dict(), "weights": {}}, paths[-1])
    training.main(["--average", *paths, "--out", str(tmp_path / "mean.pt")])
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)["average"]
    for k, v in mean.items():
        torch.testing.assert_close(v, (nets[0].state_dict()[k] + nets[1].state_dict()[k]) / 2)


def test_packs_hold_the_same_pixels(folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    rows = [f"x/cmu_{i}.png,train,{i}" for i in range(2)]
    manifest.write_text("path,split,priority\n" + "\n".join(rows) + "\n")
    pack = tmp_path / "pack.zip"
    training.main(["--data", str(folder), "--out", str(pack), "--pack", str(manifest)])
    for a, b in zip(load_sources(folder), load_sources(pack), strict=True):
        for x, y in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(x, y)


def test_networks_keep_the_papers_settings() -> None:
    assert TrainSettings().to_dict()["seed"] == 0
    net = TileNetwork(NetworkSettings())
    assert sum(net.kmac_per_pixel().values()) < 10
