"""Shared fixtures: the frozen tiny model and pictures that look a little like tissue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# how busy the machine is must not decide a test
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

CONFORMANCE = Path(__file__).parent / "conformance"


@pytest.fixture(scope="session")
def tiny_file() -> bytes:
    """The file of the tiny decoder model that the conformance vectors use."""
    return (CONFORMANCE / "tiny.wscm").read_bytes()


@pytest.fixture(scope="module")
def tiny(tiny_file: bytes):
    """The tiny decoder model; this process decodes its tiles from now on."""
    from wsicodec.models.store import allow_model

    return allow_model(tiny_file)


@pytest.fixture
def tiny_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Name of the tiny model, installed in a user's folder with its encoder."""
    for name in ("tiny.wscm", "tiny.encoder.wscm"):
        (tmp_path / name).write_bytes((CONFORMANCE / name).read_bytes())
    monkeypatch.setenv("WSICODEC_MODELS", str(tmp_path))
    return "tiny"


@pytest.fixture(scope="session")
def tissue() -> Callable[..., np.ndarray]:
    """tissue(height, width, seed=0): a picture, (height, width, 3) uint8."""
    from tools.make_conformance import tissue

    return tissue


@pytest.fixture(scope="session")
def vector() -> Callable[[str], bytes]:
    """vector("decode/NAME.tile"): bytes of a conformance vector; a missing one is a failure."""

    def read(name: str) -> bytes:
        path = CONFORMANCE / name
        assert path.is_file(), f"{path} is missing; vectors never recreate themselves"
        return path.read_bytes()

    return read


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """(768, 768, 3) uint8 of the bundled slide: glands, stroma and glass. Read-only."""
    import tifffile

    path = Path(__file__).parents[1] / "wsicodec" / "data" / "cmu-1-small-region.svs"
    image = tifffile.imread(path)[900:1668, 700:1468]
    image.flags.writeable = False
    return image
