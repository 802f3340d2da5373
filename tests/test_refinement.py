"""The correction of pixels, and the comparison of networks. Needs torch, else left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the train extra is not installed")
PIL_Image = pytest.importorskip("PIL.Image", reason="the train extra is not installed")
pytest.importorskip("scipy", reason="the train extra is not installed")

from tools.export.model import decoder_file
from tools.train import evaluate
from tools.train.images import Sampler, Source
from tools.train.network import REFINE, TileNetwork
from tools.train.refine import Refinement
from tools.train.run import Run
from tools.train.settings import NetworkSettings, TrainSettings
from tools.train.shipped import read_start
from tools.train.warmstart import warm_start

SHIPPED = Path(__file__).parents[1] / "wsicodec/models/shipped/he-fast.wscm"

SMALL = {
    "stages": ((0, 8, 1), (0, 8, 2), (0, 8, 3), (8, 24, 0)), "mean_stages": 3,
    "context_channels": 8, "z_channels": 2, "hyper": 8, "context": 8, "middle": 16, "chain": 8,
}  # fmt: skip


def network(**other: Any) -> TileNetwork:
    torch.manual_seed(0)
    net = TileNetwork(NetworkSettings(**{**SMALL, **other}))
    variance = 3000 / (1 + torch.arange(768.0)) ** 1.2
    net.start(variance, torch.zeros(3), torch.eye(3))
    return net


def coded(net: TileNetwork, x: Any) -> Any:
    with torch.no_grad():
        return net.eval()(x, torch.full((len(x),), 60.0), torch.full((len(x),), 0.3))


@pytest.fixture(scope="module")
def images(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(Sampler([Source("a", [pixels])], 64, 0).batch(2))


def as_input(images: np.ndarray) -> Any:
    return torch.from_numpy(images).float() - 128


def test_begins_as_no_correction(images: np.ndarray) -> None:
    x = as_input(images)
    plain, refined = network(), network(refine=8, refine_blocks=1)
    state, afresh = warm_start(
        plain.settings, plain.state_dict(), refined.settings, refined.state_dict()
    )
    refined.load_state_dict(state)
    assert afresh == ["refine"]
    for a, b in zip(coded(plain, x), coded(refined, x), strict=True):
        same = (a, b) if isinstance(a, torch.Tensor) else (a.total, b.total)
        torch.testing.assert_close(*same, rtol=0, atol=0)


def test_scales_with_the_step() -> None:
    net = Refinement(8, 1, 4)
    torch.nn.init.normal_(net.out.bias)
    x, contexts = torch.zeros(1, 3, 32, 48), torch.zeros(1, 4, 2, 3)
    torch.nn.init.zeros_(net.out.weight)
    coarse, fine = (
        net(x, contexts, torch.full((1, 1, 2, 3), v), torch.ones(1)) for v in (2.0, 4.0)
    )
    assert coarse.shape == x.shape and coarse.abs().max() > 0
    torch.testing.assert_close(coarse, 4 * fine)


def test_learns_alone(images: np.ndarray) -> None:
    net = network(refine=8, refine_blocks=1)
    run = Run(TrainSettings(only=REFINE, warmup=1, lr=3e-3, clip=1e9), net.settings)
    run.net.load_state_dict(net.state_dict())
    run.prepare()
    run.net.train()
    losses = [run.one_step([images], 0.0)["loss"] for _ in range(12)]
    assert all(np.isfinite(losses))
    changed = {
        name for name, p in run.net.named_parameters()
        if not torch.equal(p, dict(net.named_parameters())[name])
    }  # fmt: skip
    assert changed and all(name.startswith(REFINE) for name in changed)
    x = as_input(images)
    before, after = (
        float(((coded(n, x)[0] - x) ** 2).mean()) for n in (net, run.net)
    )  # fmt: skip
    assert after < 0.99 * before


def test_only_names_weights() -> None:
    run = Run(TrainSettings(only="nothing."), network().settings)
    with pytest.raises(ValueError, match=r"begins with 'nothing\.'"):
        run.prepare()


def test_goes_on_in_a_network_of_other_widths() -> None:
    old, new = network(refine=8, refine_blocks=1), network(refine=8, refine_blocks=1, middle=24)
    torch.nn.init.normal_(old.refine.out.weight)
    state, afresh = warm_start(old.settings, old.state_dict(), new.settings, new.state_dict())
    assert not afresh
    for name, weight in old.refine.state_dict().items():
        assert torch.equal(state[REFINE + name], weight)
    wider = network(refine=16, refine_blocks=1)
    assert warm_start(old.settings, old.state_dict(), wider.settings, wider.state_dict())[1] == [
        "refine"
    ]


def test_work_per_pixel_counts_it() -> None:
    net = network(refine=96, refine_blocks=3)
    layers = 96 * 9 * (48 + 24 + 2) + 6 * 96 * 96 * 9 + 96 * 9 * 48
    expected = layers / 16 + 9 * 24 * 16 / 256
    assert net.kmac_per_pixel()["refine"] == pytest.approx(expected / 1000)
    assert network().kmac_per_pixel()["refine"] == 0


def test_is_not_exported_yet() -> None:
    with pytest.raises(ValueError, match="correct"):
        decoder_file(network(refine=8), {"name": "a"}, None, None)  # type: ignore[arg-type]


# -- comparison --


def test_half_the_rate_is_minus_fifty_per_cent() -> None:
    curve = [(0.1 * 1.4**k, 28.0 + 1.5 * k, 1 - 0.2 * 0.7**k) for k in range(9)]
    half = [(rate / 2, psnr, ssim) for rate, psnr, ssim in curve]
    found = evaluate.compared([curve], [half])
    assert found == pytest.approx({"psnr": -50, "ssim": -50, "rate_at_target": 0.5})


def test_networks_are_compared(
    tmp_path: Path, pixels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped model with itself, and with one whose corrections are gone."""
    PIL_Image.fromarray(np.ascontiguousarray(pixels[:300, :300])).save(tmp_path / "a_0.png")
    state = read_start(SHIPPED)
    worse = {k: v * 0 if k.startswith("chain_out") else v for k, v in state["average"].items()}
    torch.save({**state, "average": worse, "step": 3, "elapsed": 1.5}, tmp_path / "worse.pt")
    out = tmp_path / "found.json"
    paths = [str(SHIPPED), str(tmp_path / "worse.pt")]
    assert evaluate.main([*paths, "--data", str(tmp_path), "--json", str(out)]) == 0
    first, second = json.loads(out.read_text())
    assert (first["psnr"], first["ssim"], first["rate_at_target"]) == (0, 0, 1)
    assert (second["steps"], second["minutes"], second["images"]) == (3, 1.5, 1)
    assert second["psnr"] > 0.5
    assert capsys.readouterr().out.count("BD-rate PSNR") == 2
