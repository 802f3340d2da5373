"""Models by digest: shipped, installed by the user, carried in a slide, allowed for one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import wsicodec
from wsicodec.cli import main
from wsicodec.errors import ModelError, UnknownModelError
from wsicodec.models import find_model, install_model, models
from wsicodec.models import store as store_module


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user folder of our own and a store that has loaded nothing yet."""
    monkeypatch.setenv("WSICODEC_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(store_module, "_store", store_module._Store())
    return tmp_path / "models"


def test_shipped_models_have_cards_and_encoders(elsewhere: Path) -> None:
    (record,) = models()
    assert record.name == "he-fast" and record.shipped and len(record.digest) == 64
    assert record.encoder_path is not None
    assert record.card_path is not None and "Trained on" in record.card_path.read_text()
    assert find_model("he-fast") == find_model(record.digest[:12]) == record


def test_unknown_models_are_named(elsewhere: Path) -> None:
    with pytest.raises(UnknownModelError, match="he-none"):
        find_model("he-none")


def test_an_installed_model_decodes(elsewhere: Path, tiny_file: bytes, vector) -> None:
    tile = vector("decode/learned-64x48-gain0-turned.tile")
    with pytest.raises(UnknownModelError, match="not installed"):
        wsicodec.decode(tile)
    record = install_model(tiny_file)
    assert install_model(tiny_file) == record and record.path.parent == elsewhere
    assert wsicodec.decode(tile).dtype == np.uint8
    with pytest.raises(UnknownModelError, match="decoding only"):
        wsicodec.encode(np.zeros((2, 2, 3), np.uint8) + np.arange(2, dtype=np.uint8)[:, None, None],
                        model=record.name)  # fmt: skip


def test_broken_models_are_not_installed(elsewhere: Path, tiny_file: bytes) -> None:
    for data in (b"", tiny_file[:-1], tiny_file + b"\0"):
        with pytest.raises(ModelError):
            install_model(data)
    assert not elsewhere.exists() or not list(elsewhere.iterdir())


def test_a_broken_file_does_not_hide_the_models_beside_it(elsewhere: Path) -> None:
    elsewhere.mkdir()
    (elsewhere / "broken.wscm").write_bytes(b"no model")
    with pytest.warns(RuntimeWarning, match="broken.wscm is left out"):
        assert [r.name for r in models()] == ["he-fast"]


def test_a_slide_carries_its_model(
    elsewhere: Path, tmp_path: Path, pixels: np.ndarray, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import tifffile

    source, target = tmp_path / "in.tif", tmp_path / "out.ome.tiff"
    tifffile.imwrite(source, pixels[:128, :128], tile=(64, 64), photometric="rgb")
    assert main(["convert", str(source), str(target), "--embed-model", "--tile-size", "64"]) == 0
    shipped = find_model("he-fast").path.read_bytes()
    # a later release without this model
    monkeypatch.setattr(store_module, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(store_module, "_store", store_module._Store())
    with pytest.raises(UnknownModelError):
        tifffile.imread(target)
    assert main(["models", "install", str(target)]) == 0
    assert "he-fast" in capsys.readouterr().out
    assert tifffile.imread(target).shape == (128, 128, 3)
    (installed,) = elsewhere.iterdir()
    assert installed.read_bytes() == shipped
    assert main(["models", "install", str(source)]) == 1
    assert "carries no model" in capsys.readouterr().err
