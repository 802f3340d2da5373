"""The conversion benchmark: a small run of its command, and its measures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tifffile
from slides import CMU, ROOT, tissue, write_svs

pytest.importorskip("scipy")
pytest.importorskip("skimage")

from benchmarks import convert


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", tissue(600, 700))


def test_report(svs: Path, tmp_path: Path) -> None:
    output = tmp_path / "convert.json"
    command = [sys.executable, str(ROOT / "benchmarks/convert.py"), "--slide", str(svs)]
    command += ["--json", str(output), "--runs", "1", "--jobs", "1"]
    command += ["--contenders", "wsicodec-jpeg", "tifffile", "openslide"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "Mpx/s" in done.stdout
    found = json.loads(output.read_text())
    assert not found["failed"] or set(found["failed"]) == {"openslide"}  # deflate is not for it
    for name in ("wsicodec-jpeg", "tifffile"):
        at = found["convert"][name]
        assert 0 < at["wall_s"] < at["process_s"]
        assert 0 < at["busy"] <= 1.05
        assert at["mpx_s"] == pytest.approx(0.42 / at["wall_s"])
        assert 0 < at["of_source"] < 1
        assert at["levels"] == [[600, 700], [150, 175]]
        assert 0.9 < at["quality"]["ssim_worst"] <= at["quality"]["ssim_mean"] < 1
        if Path("/proc").exists():
            assert 20 < at["peak_mb"] < 4000
    # the same tiles by the same library: nothing but the container differs
    jpeg, plain = (found["convert"][name]["quality"] for name in ("wsicodec-jpeg", "tifffile"))
    assert jpeg["ssim_mean"] == pytest.approx(plain["ssim_mean"], abs=0.005)
    ratio = found["times_as_fast"]["wsicodec-jpeg"]
    assert ratio["tifffile"] > 0
    assert found["times_as_fast"]["tifffile"]["tifffile"] == 1
    assert found["versions"]["tifffile"]
    assert str(tmp_path) not in output.read_text()


@pytest.mark.parametrize("name", ["tifffile", "pyvips", "openslide"])
def test_baselines_write_what_they_read(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    target = tmp_path / "a.tiff"
    convert.WAYS[name](CMU, target, 1, 70)
    fair = convert.fidelity(CMU, target)
    assert fair["levels"][0] == [2967, 2220]
    assert fair["ssim_mean"] > 0.9
    with tifffile.TiffFile(target) as file:
        page = file.pages[0]
        assert page.compression == 7
        assert page.tile == (256, 256)


def test_failures_are_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"SlideError.*missing\.svs"):
        convert.one_run("wsicodec-copy", tmp_path / "missing.svs", tmp_path, 1, 70)


def test_memory_of_all_descendants_counts() -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system has no /proc")
    inner = "import sys; x = b'x' * 60_000_000; print('there', flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = convert._tree(process.pid)
        sizes = [convert._proportional(pid) or 0 for pid in tree]
        process.communicate(b"")
    assert len(tree) == 2
    assert tree[0] == process.pid != os.getpid()
    assert sizes[1] > 60_000_000 > sizes[0]
