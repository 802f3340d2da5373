"""The command line: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from slides import CMU, ROOT, nothing_left, tissue, write_svs

from wsicodec.cli import demo, doctor, info, main
from wsicodec.cli.common import convert_bar
from wsicodec.convert import ConvertProgress
from wsicodec.models import find_model
from wsicodec.slide.opening import open_slide
from wsicodec.slide.record import FROM_SOURCE, FileRecord, SourceIdentity

COMMANDS = ["convert", "info", "verify", "export", "models list", "doctor", "demo"]


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", tissue(300, 420))


@pytest.fixture
def jpeg(svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    target = tmp_path / "a.ome.tiff"
    assert main(["convert", str(svs), str(target), "--codec", "jpeg"]) == 0
    capsys.readouterr()
    return target


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out = capsys.readouterr().out
    value: dict[str, Any] = json.loads(out)
    return value


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert f"wsicodec {command}" in text.split("example:")[1]
    assert "130  interrupted" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["convert"],
        ["convert", "a", "b", "--codec", "gif"],
        ["convert", "a", "b", "--quality", "much"],
        ["convert", "a", "b", "--quality", "0"],
        ["convert", "a", "b", "--quality", "70", "--preset", "archive"],
        ["convert", "a", "b", "--levels", "few"],
        ["convert", "a", "b", "--levels", "-1"],
        ["convert", "a", "b", "--tile-size", "100"],
        ["convert", "a", "b", "--option", "fast"],
        ["export", "a", "b", "--codec", "learned"],
        ["models"],
        ["demo", "--codecs", "gif", "--folder", "/nowhere"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code == 2
    assert capsys.readouterr().err


class TestConvert:
    def test_for_people(
        self, svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "a.ome.tiff"
        arguments = ["convert", str(svs), str(target), "--codec", "jpeg", "--measure"]
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert "level 0: 420 x 300" in captured.out
        assert "SSIM" in captured.out
        assert "kept beside the pyramid: thumbnail, label, macro" in captured.out
        assert captured.err == ""  # no bar without a terminal

    def test_for_machines(
        self, svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "a.ome.tiff"
        arguments = ["convert", str(svs), str(target), "--json", "--preset", "preview"]
        options = ["--codec", "jpeg", "--option", "subsampling=444", "--measure", "sample"]
        more = ["--tile-size", "128", "--levels", "3", "--jobs", "2"]
        assert main([*arguments, *options, *more]) == 0
        report = _json(capsys)
        assert report["quality_setting"] == 40
        assert [level["width"] for level in report["levels"]] == [420, 210, 105]
        assert report["quality"]["tiles"] == 12 + 4 + 1
        assert report["target_bytes"] == target.stat().st_size
        with open_slide(target) as slide:
            assert slide.info.record is not None
            assert slide.info.record.options == {"subsampling": "444"}
            assert slide.levels[0].tile_width == 128

    def test_learned(self, svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "a.ome.tiff"
        assert main(["convert", str(svs), str(target), "--embed-model", "--json"]) == 0
        report = _json(capsys)
        assert report["model"] == {"name": "he-fast", "sha256": find_model("he-fast").digest}
        assert main(["info", str(target)]) == 0
        text = capsys.readouterr().out
        assert find_model("he-fast").digest in text
        assert "model carried in the file: 1" in text

    @pytest.mark.parametrize(
        ("content", "options", "error"),
        [
            (None, [], "SlideError"),
            (b"", [], "SlideError"),
            (b"no slide", [], "SlideError"),
            (CMU.read_bytes()[:4000], [], "SlideError"),
            (..., ["--codec", "jpegxl", "--lossless-transcode"], "UnsupportedError"),
            (..., ["--model", "none-such"], "UnknownModelError"),
        ],
        ids=["missing", "empty", "no slide", "cut", "no JPEG", "unknown model"],
    )
    def test_failures(
        self,
        svs: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        content: Any,
        options: list[str],
        error: str,
    ) -> None:
        source = tmp_path / "in.svs"
        if content is ...:
            source.write_bytes(svs.read_bytes())
        elif content is not None:
            source.write_bytes(content)
        before = [p.name for p in tmp_path.iterdir()]
        arguments = ["convert", str(source), str(tmp_path / "a.ome.tiff"), *options]
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith(f"wsicodec: {error}: ")
        assert captured.err.count("\n") == 1
        assert captured.out == ""
        assert main([*arguments, "--json"]) == 1
        assert _json(capsys)["error"]["type"] == error
        nothing_left(tmp_path, *before)

    def test_overwrite(self, svs: Path, jpeg: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["convert", str(svs), str(jpeg), "--codec", "jpeg"]
        assert main(arguments) == 1
        assert "--overwrite" in capsys.readouterr().err
        assert main([*arguments, "--overwrite"]) == 0

    def test_interrupt(
        self,
        svs: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("wsicodec.convert.pipeline.write_slide", interrupted)
        assert main(["convert", str(svs), str(tmp_path / "a.tiff"), "--codec", "jpeg"]) == 130
        assert "interrupted" in capsys.readouterr().err
        nothing_left(tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_says_when_the_file_is_assembled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with convert_bar("converting", quiet=False) as bar:
        assert bar is not None
        bar(ConvertProgress(0, 7, 7, 100, 100, 10, 90))
        coding = len(terminal.getvalue())
        bar(ConvertProgress(0, 7, 7, 100, 100, 10, 90, assembling=True))
    text = terminal.getvalue()
    assert "assembling" not in text[:coding]
    assert "assembling" in text[coding:]


class TestInfo:
    def test_for_people(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", str(CMU)]) == 0
        text = capsys.readouterr().out
        for part in ("svs", "2220 x 2967", "0.499 x 0.499", "20x", "thumbnail, label, macro"):
            assert part in text

    def test_for_machines(self, jpeg: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", str(jpeg), "--json"]) == 0
        info = _json(capsys)
        assert info["format"] == "ome-tiff"
        assert info["record"]["codec"] == "jpeg"
        assert info["embedded_model_bytes"] is None
        assert len(info["levels"]) == 2

    @pytest.mark.parametrize(("asked", "shown"), [([], "-"), (["--floor-ssim", "0.5"], "0 of 4")])
    def test_tiles_below_a_floor_that_was_not_set(
        self, svs: Path, tmp_path: Path, asked: list[str], shown: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        target = tmp_path / "measured.ome.tiff"
        assert main(["convert", str(svs), str(target), "--codec", "jpeg", "--measure", *asked]) == 0
        capsys.readouterr()
        assert main(["info", str(target)]) == 0
        lines = capsys.readouterr().out.splitlines()
        header = next(i for i, line in enumerate(lines) if "below floor" in line)
        assert lines[header + 1].endswith(f" {shown}")


@pytest.mark.parametrize(("form", "said"), [("mirax", True), ("svs", False)])
def test_info_says_what_a_digest_is_of(
    form: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SourceIdentity("ab" * 32, 5, form, "jpeg")
    info._print_record(FileRecord("1", "jpeg", 70, (), (), (FROM_SOURCE,), source=source), None)
    assert ("of the file by which it is opened abab" in capsys.readouterr().out) is said


def test_a_copy_that_is_resumed_begins_anew_and_says_so(
    svs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script may give --resume with whatever codec it is told."""
    given = ["convert", str(svs), str(tmp_path / "a.ome.tiff"), "--codec", "copy"]
    assert main([*given, "--resume", "--tissue", "otsu"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert main([*given, "--overwrite"]) == 0
    assert "nothing to resume" not in capsys.readouterr().out


class TestVerify:
    def test_good(self, svs: Path, jpeg: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(jpeg), "--against", str(svs)]) == 0
        assert "all good" in capsys.readouterr().out
        assert main(["verify", str(jpeg), "--against", str(svs), "--json"]) == 0
        assert _json(capsys)["quality"]["1"]["tiles"] == 1

    def test_damaged(self, jpeg: Path, capsys: pytest.CaptureFixture[str]) -> None:
        content = bytearray(jpeg.read_bytes())
        with tifffile.TiffFile(jpeg) as file:
            start, count = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]
        content[start : start + count] = bytes(count)
        jpeg.write_bytes(content)
        assert main(["verify", str(jpeg)]) == 3
        captured = capsys.readouterr()
        assert "tile at row 0, column 1" in captured.err
        assert "1 of them damaged" in captured.out
        assert main(["verify", str(jpeg), "--json"]) == 3
        report = _json(capsys)
        assert (report["ok"], report["failed"]) == (False, 1)

    def test_of_another_slide(self, jpeg: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(jpeg), "--against", str(CMU)]) == 3
        assert "not its source" in capsys.readouterr().err


def test_export_flat(jpeg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "flat.tif"
    assert main(["export", str(jpeg), str(target), "--layout", "flat", "--json"]) == 0
    assert _json(capsys)["quality_setting"] == 90
    with open_slide(target) as slide:
        assert slide.info.format == "svs"  # as it came: its words and its thumbnail are still there
        assert len(slide.levels) == 2
        assert slide.info.associated == ("thumbnail", "label", "macro")


def test_models_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    assert "he-fast" in capsys.readouterr().out
    assert main(["models", "list", "--json"]) == 0
    (model,) = [m for m in _json(capsys)["models"] if m["name"] == "he-fast"]
    assert model["digest"] == find_model("he-fast").digest


class TestDoctor:
    def test_everything_but_the_hook(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The hook needs an installed wheel; test_autoload covers it."""
        main(["doctor", "--json"])
        checks = {check["name"]: check for check in _json(capsys)["checks"]}
        for name in (
            "versions",
            "onnxruntime",
            "numba cache",
            "threads",
            "codecs",
            "models",
            "round trip",
        ):
            assert checks[name]["ok"], checks[name]

    def test_exit_code_and_fix(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = doctor.Check("a", True, "fine", "never shown")
        bad = doctor.Check("b", False, "broken", "repair it")
        monkeypatch.setattr(doctor, "CHECKS", (lambda: good,))
        assert main(["doctor"]) == 0
        assert "never shown" not in capsys.readouterr().out
        monkeypatch.setattr(doctor, "CHECKS", (lambda: good, lambda: bad))
        assert main(["doctor"]) == 1
        assert "fix: repair it" in capsys.readouterr().out

    def test_both_onnxruntimes(self) -> None:
        found = doctor.check_onnxruntime({"onnxruntime": ["onnxruntime-gpu", "onnxruntime"]})
        assert not found.ok
        assert "overwrite each other" in found.detail
        assert found.fix is not None
        assert "pip uninstall" in found.fix

    def test_no_onnxruntime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        found = doctor.check_onnxruntime({})
        assert not found.ok
        assert found.fix == 'pip install "wsicodec[cpu]"'

    def test_threads_that_are_no_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WSICODEC_NUM_THREADS", "many")
        assert not doctor.check_threads().ok

    def test_hook_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WSICODEC_AUTOLOAD", "0")
        found = doctor.check_tifffile()
        assert found.ok
        assert "wsicodec.register()" in found.detail


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a crop of the bundled slide, for the sake of time."""
    crop = write_svs(tmp_path / "crop.svs", tissue(300, 420), levels=1)
    monkeypatch.setattr(demo, "DEMO_SLIDE", crop)
    monkeypatch.setattr(demo, "_CROP", (20, 40, 64, 96))
    folder = tmp_path / "out" / "demo"
    assert main(["demo", "--folder", str(folder)]) == 0
    text = capsys.readouterr().out
    for codec in demo.DEMO_CODECS:
        assert f"\n{codec} " in text
    result = json.loads((folder / "demo.json").read_text())
    assert [row["codec"] for row in result["codecs"]] == list(demo.DEMO_CODECS)
    assert result["codecs"][-1]["file"] is None  # AVIF has no TIFF tag
    for row in result["codecs"]:
        assert row["quality"]["tiles"] == 4
        assert row["quality"]["ssim_mean"] > 0.9
        if row["file"]:
            assert (folder / row["file"]).stat().st_size == row["file_bytes"]
    assert str(tmp_path) not in json.dumps(result)  # the folder may be moved
    picture = imagecodecs.png_decode((folder / result["picture"]["file"]).read_bytes())
    assert picture.shape == (128, 3 * 192 + 2 * 16, 3)
    np.testing.assert_array_equal(picture[::2, :192:2], tissue(300, 420)[20:84, 40:136])


def test_bundled_slide_is_the_original() -> None:
    import hashlib

    digest = hashlib.sha256(CMU.read_bytes()).hexdigest()
    assert digest in (CMU.parent / "README.md").read_text()


def test_starting_is_light() -> None:
    """``--help`` must not wait for numpy, tifffile or onnxruntime."""
    code = (
        "import sys, wsicodec.cli as cli; cli._parser();"
        "heavy = {'numpy', 'tifffile', 'onnxruntime', 'numba', 'imagecodecs', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_tool_is_the_same_command(svs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "svs2ometiff.py"),
            str(svs),
            "a.tiff",
            "--codec=jpeg",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
    )
    assert "a.tiff" in done.stdout
    assert tifffile.imread(tmp_path / "a.tiff").shape == (300, 420, 3)


@pytest.mark.parametrize(
    ("library", "failing"), [("numba", "numba cache"), ("imagecodecs", "codecs")]
)
def test_a_library_that_does_not_load_is_a_finding(library: str, failing: str) -> None:
    """Whichever check meets it first: no traceback, and the other checks are made all the same."""
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from wsicodec.cli import main; raise SystemExit(main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert not checks[failing]["ok"] and checks[failing]["fix"]
    assert checks["threads"]["ok"]
    assert len(checks) == len(doctor.CHECKS)


def test_compiler_turned_off() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wsicodec.cli", "doctor"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
    )
    assert done.returncode == 1
    assert "unset NUMBA_DISABLE_JIT" in done.stdout
