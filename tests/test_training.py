"""Training and export, on a tiny network. Needs torch (the ``train`` extra), else left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")
PIL_Image = pytest.importorskip("PIL.Image", reason="the train extra is not installed")

from tools.export import __main__ as export
from tools.train import __main__ as training
from tools.train.images import Sampler, Source, load_sources
from tools.train.integer import ACCUMULATOR_BOUND, IntegerConv
from tools.train.klt import block_klt, colour_matrix
from tools.train.losses import ssim_luma
from tools.train.network import TileNetwork, adaptive_steps, search_symbols
from tools.train.settings import NetworkSettings, TrainSettings
from wsicodec.codec.adaptive import adaptive_steps as runtime_steps
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
    return np.clip(sums >> s[None, :, None, None], rows.low, rows.high)


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


def test_search_saves_bits_only_towards_zero() -> None:
    r = torch.linspace(-4, 4, 801).view(1, 1, 1, -1)
    q = search_symbols(r, torch.full_like(r, 0.4))
    near = torch.round(r)
    assert (q.abs() <= near.abs()).all() and (q * near >= 0).all() and (q != near).any()


def test_training_resumes_and_exports(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = NetworkSettings(
        stages=((0, 4, 1), (0, 4, 2), (0, 4, 3), (4, 12, 0), (16, 24, 0)), mean_stages=4,
        context_channels=16, z_channels=4, hyper=8, context=8, middle=8, chain=8, analysis=8,
        analysis_layers=1, analysis_channels=24,
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
