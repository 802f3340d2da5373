"""Installing the package is enough: tifffile, zarr and numcodecs read learned tiles by themselves.

The first half runs the package as it lies in the source tree, the second half from a wheel and as
an editable install in virtual environments of their own, which borrow the other packages of this
one. Every check runs in a fresh Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

import wsicodec
from wsicodec.plugins.numcodecs import Wsicodec
from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG
from wsicodec.plugins.zarr import WsicodecCodec

ROOT = Path(__file__).parent.parent
BOOT = ROOT / "wsicodec" / "boot"
TILE_KWARGS = {"lossless": True}


def run(
    code: str,
    *arguments: object,
    python: Path | str = sys.executable,
    flags: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python that sees nothing of the source tree unless it is told to."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "WSICODEC"))}
    return subprocess.run(
        [str(python), *flags, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        env=inherited | environment,
    )


def ok(result: subprocess.CompletedProcess[str]) -> str:
    """Standard output of a run that succeeded and had nothing to say on standard error."""
    assert (result.returncode, result.stderr) == (0, ""), result.stderr + result.stdout
    return result.stdout.strip()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one image as tiles of a TIFF, a Zarr 2 and a Zarr 3 array, and as plain npy."""
    folder = tmp_path_factory.mktemp("files")
    y, x = np.mgrid[:200, :300] / 16
    density = (np.sin(x) * np.cos(y) + 1)[..., None] * (45, 80, 30)
    image = np.rint(240 - density).astype(np.uint8)
    np.save(folder / "image.npy", image)
    tifffile.imwrite(
        folder / "slide.tif",
        image,
        tile=(128, 128),
        photometric="rgb",
        compression="wsicodec",
        compressionargs=TILE_KWARGS,
    )
    common = {"shape": image.shape, "chunks": (128, 128, 3), "dtype": "uint8", "fill_value": 255}
    v2 = Wsicodec(**TILE_KWARGS)
    zarr.create_array(folder / "v2", zarr_format=2, compressors=v2, **common)[:] = image
    v3 = WsicodecCodec(**TILE_KWARGS)
    zarr.create_array(folder / "v3", serializer=v3, compressors=None, **common)[:] = image
    return folder


IMAGE_READS = """
    import sys, warnings
    warnings.simplefilter("error")
    import numpy, tifffile
    folder = sys.argv[1]
    image = numpy.load(folder + "/image.npy")
    assert (tifffile.imread(folder + "/slide.tif") == image).all()
    print("reads")
"""


class TestSourceTree:
    def test_importing_loads_nothing_heavy(self) -> None:
        code = """
            import sys
            before = set(sys.modules)
            import wsicodec
            new = {name.partition(".")[0] for name in set(sys.modules) - before}
            third_party = new - set(sys.stdlib_module_names) - {"wsicodec", "_wsicodec_boot"}
            print(sorted(third_party), "_wsicodec_boot" in sys.modules)
        """
        assert ok(run(code, PYTHONPATH=str(ROOT))) == "[] True"

    def test_the_hook_imports_only_sys(self) -> None:
        code = """
            import sys, os
            before = set(sys.modules)
            import _wsicodec_boot
            _wsicodec_boot.arm()
            assert _wsicodec_boot.is_armed()
            print(sorted(set(sys.modules) - before))
        """
        # -S: an installed wsicodec would have armed its own copy at start
        assert ok(run(code, flags=("-S",), PYTHONPATH=str(BOOT))) == "['_wsicodec_boot']"

    @pytest.mark.parametrize("first", ["wsicodec", "tifffile"])
    def test_importing_activates_in_any_order(self, first: str, files: Path) -> None:
        second = "tifffile" if first == "wsicodec" else "wsicodec"
        code = f"import {first}, {second}\n" + textwrap.dedent(IMAGE_READS)
        assert ok(run(code, files, PYTHONPATH=str(ROOT))) == "reads"

    def test_switch_and_register(self, files: Path) -> None:
        code = """
            import sys
            import wsicodec
            import tifffile
            from wsicodec.plugins.tifffile import is_installed
            assert not is_installed()
            try:
                tifffile.imread(sys.argv[1] + "/slide.tif")
            except ValueError as error:
                print(error)
            wsicodec.register()
            assert is_installed()
            tifffile.imread(sys.argv[1] + "/slide.tif")
            wsicodec.register()
        """
        output = ok(run(code, files, PYTHONPATH=str(ROOT), WSICODEC_AUTOLOAD="0"))
        assert output == f"{TIFF_COMPRESSION_TAG} is not a known COMPRESSION"

    def test_register_before_tifffile_ignores_the_switch(self, files: Path) -> None:
        code = "import wsicodec; wsicodec.register()\n" + textwrap.dedent(IMAGE_READS)
        result = run(code, files, PYTHONPATH=str(ROOT), WSICODEC_AUTOLOAD="0")
        assert ok(result) == "reads"

    def test_switch_set_by_the_program(self) -> None:
        code = """
            import os, wsicodec
            os.environ["WSICODEC_AUTOLOAD"] = "0"
            import tifffile
            print(60642 in tifffile.TIFF.DECOMPRESSORS)
        """
        assert ok(run(code, PYTHONPATH=str(ROOT))) == "False"

    def test_arming_twice_and_reloading(self, files: Path) -> None:
        code = """
            import importlib, sys
            import wsicodec
            boot = sys.modules["_wsicodec_boot"]
            boot.arm(); boot.arm(force=True); importlib.reload(boot).arm()
            hooks = [f for f in sys.meta_path if getattr(f, "wsicodec_hook", False)]
            assert len(hooks) == 1, hooks
            import tifffile
            old = tifffile.TIFF
            importlib.reload(sys.modules["tifffile.tifffile"])
            importlib.reload(tifffile)
            assert tifffile.TIFF is not old
            assert tifffile.imread(sys.argv[1] + "/slide.tif").shape == (200, 300, 3)
            for name in [n for n in sys.modules if n.partition(".")[0] == "tifffile"]:
                del sys.modules[name]
            import tifffile as again
            assert again.TIFF is not tifffile.TIFF
            assert again.imread(sys.argv[1] + "/slide.tif").shape == (200, 300, 3)
            boot.disarm()
            assert not boot.is_armed()
        """
        ok(run(code, files, PYTHONPATH=str(ROOT)))

    def test_a_failing_plugin_warns_and_tifffile_works(self, tmp_path: Path) -> None:
        code = """
            import sys, wsicodec
            sys.modules["wsicodec.plugins.tifffile"] = None  # importing it now fails
            import tifffile
            print(tifffile.COMPRESSION.JPEG.value)
            try:
                wsicodec.register()
            except ImportError:
                print("register raises")
        """
        result = run(code, PYTHONPATH=str(ROOT))
        assert (result.returncode, result.stdout.split("\n")[:2]) == (0, ["7", "register raises"])
        assert "RuntimeWarning: tifffile does not read wsicodec tiles" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
    def test_a_tifffile_of_another_build_warns(self, zipped: bool, tmp_path: Path) -> None:
        """Also: a zip has one loader for all its modules, so watching must not spread."""
        sources = {
            "tifffile/__init__.py": "from .tifffile import imread\nfrom . import other\n",
            "tifffile/tifffile.py": "__version__ = '2099.1.1'\nimread = 'pixels'.upper\n",
            "tifffile/other.py": "",
        }
        if zipped:
            place = tmp_path / "stub.zip"
            with zipfile.ZipFile(place, "w") as archive:
                for name, text in sources.items():
                    archive.writestr(name, text)
        else:
            place = tmp_path
            (tmp_path / "tifffile").mkdir()
            for name, text in sources.items():
                (tmp_path / name).write_text(text)
        code = """
            import importlib, sys, warnings
            import wsicodec
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                import tifffile
                count = len(caught)
                importlib.reload(tifffile.other)
                importlib.reload(sys.modules["tifffile.tifffile"])
            print(tifffile.imread(), count, len(caught), caught[0].category.__name__)
            print(caught[0].message)
        """
        path = os.pathsep.join([str(place), str(ROOT)])
        lines = ok(run(code, PYTHONPATH=path)).split("\n")
        assert lines[0] == "PIXELS 1 2 RuntimeWarning"
        assert "UnsupportedError: tifffile 2099.1.1 cannot read wsicodec tiles" in lines[1]

    def test_a_thread_that_imports_tifffile_meanwhile(self, tmp_path: Path) -> None:
        """Arming while another thread is halfway through importing tifffile waits for it."""
        (tmp_path / "tifffile").mkdir()
        (tmp_path / "tifffile" / "__init__.py").write_text("from .tifffile import *\n")
        (tmp_path / "tifffile" / "tifffile.py").write_text(
            textwrap.dedent("""
                import enum, time, types, shared
                shared.started.set()
                time.sleep(0.3)
                class COMPRESSION(enum.IntEnum):
                    NONE = 1
                def codecs():
                    return types.SimpleNamespace(_codecs={})
                TIFF = types.SimpleNamespace(
                    DECOMPRESSORS=codecs(), COMPRESSORS=codecs(), IMAGE_COMPRESSIONS=set()
                )
            """)
        )
        (tmp_path / "shared.py").write_text("import threading\nstarted = threading.Event()\n")
        code = """
            import threading, warnings
            warnings.simplefilter("error")
            import shared
            thread = threading.Thread(target=__import__, args=("tifffile",))
            thread.start()
            shared.started.wait()
            import wsicodec
            thread.join()
            from wsicodec.plugins.tifffile import is_installed
            print(is_installed())
        """
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        assert ok(run(code, PYTHONPATH=path)) == "True"


class Environment:
    """A virtual environment that borrows the packages of this one, all but wsicodec."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = folder / scripts / ("python.exe" if os.name == "nt" else "python")
        self.site = Path(
            ok(run("import site; print(site.getsitepackages()[0])", python=self.python))
        )
        self.fresh = self.listing()

    def pip(self, *arguments: object, borrow: bool = False) -> None:
        """Run the outer pip on this environment, blind to the outer packages unless it builds."""
        if borrow:
            self.borrow()
        else:
            (self.site / "borrowed.pth").unlink(missing_ok=True)
        command = [sys.executable, "-m", "pip", "--python", str(self.python)]
        options = ["--disable-pip-version-check", "--no-input", "-q"]
        done = subprocess.run(
            [*command, *map(str, arguments), *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"},
        )
        assert done.returncode == 0, done.stderr + done.stdout

    def borrow(self) -> None:
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))

    def listing(self) -> set[str]:
        # pip removes the folder too when nothing is left in it
        names = {p.name for p in self.site.iterdir()} if self.site.is_dir() else set()
        return names - {"__pycache__", "borrowed.pth"}

    def run(self, code: str, *arguments: object, **environment: str) -> str:
        return ok(run(code, *arguments, python=self.python, **environment))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, so that nothing is written into the source tree."""
    for tool in ("hatchling", "pip"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed; it builds and installs the package here")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("its text does not matter here\n")
    shutil.copytree(
        ROOT / "wsicodec", copy / "wsicodec", ignore=shutil.ignore_patterns("__pycache__")
    )
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.pip("install", "--no-deps", wheel)
    environment.borrow()
    return environment


START = """
    import json, sys
    boot = sys.modules.get("_wsicodec_boot")
    print(json.dumps({
        "armed": boot is not None and boot.is_armed(),
        "loaded": sorted({"wsicodec", "numpy", "tifffile"} & set(sys.modules)),
    }))
"""


class TestInstalled:
    def test_wheel_holds_the_hook_at_its_top(self, wheel: Path) -> None:
        names = zipfile.ZipFile(wheel).namelist()
        hooks = {"_wsicodec_boot.py", "wsicodec_autoload.pth", "wsicodec_autoload.start"}
        assert hooks <= set(names)
        assert [n for n in names if n.endswith((".pth", ".start")) and "/" in n] == []
        assert {n.partition("/")[0] for n in names} == hooks | {
            "wsicodec",
            f"wsicodec-{wsicodec.__version__}.dist-info",
        }

    def test_pth_is_one_line_that_every_site_module_executes(self) -> None:
        text = (BOOT / "wsicodec_autoload.pth").read_bytes().decode("ascii")
        assert text.startswith("import ")
        assert text.count("\n") == 1
        module, _, function = (BOOT / "wsicodec_autoload.start").read_text().strip().partition(":")
        assert (module, function) == ("_wsicodec_boot", "arm")

    def test_start_arms_and_loads_nothing(self, installed: Environment) -> None:
        assert json.loads(installed.run(START)) == {"armed": True, "loaded": []}
        off = json.loads(installed.run(START, WSICODEC_AUTOLOAD="0"))
        assert off == {"armed": False, "loaded": []}

    def test_tifffile_reads_by_itself(self, installed: Environment, files: Path) -> None:
        assert installed.run(IMAGE_READS, files) == "reads"
        isolated = run(IMAGE_READS, files, python=installed.python, flags=("-I",))
        assert ok(isolated) == "reads"

    def test_switched_off(self, installed: Environment, files: Path) -> None:
        result = run(IMAGE_READS, files, python=installed.python, WSICODEC_AUTOLOAD="0")
        assert result.returncode == 1
        last = result.stderr.strip().split("\n")[-1]
        assert last == f"ValueError: {TIFF_COMPRESSION_TAG} is not a known COMPRESSION"

    def test_zarr_and_numcodecs_find_the_entry_points(
        self, installed: Environment, files: Path
    ) -> None:
        code = """
            import sys, numpy, zarr
            folder = sys.argv[1]
            image = numpy.load(folder + "/image.npy")
            assert "wsicodec" not in sys.modules
            for name in ("v2", "v3"):
                assert (zarr.open_array(folder + "/" + name, mode="r")[:] == image).all(), name
            print("reads")
        """
        assert installed.run(code, files) == "reads"

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_workers_that_import_tifffile_alone(
        self, method: str, installed: Environment, files: Path, tmp_path: Path
    ) -> None:
        if os.name == "nt" and method != "spawn":
            pytest.skip("Windows only spawns")
        script = tmp_path / "pool.py"
        script.write_text(
            textwrap.dedent("""
                import multiprocessing, sys
                import tifffile

                if __name__ == "__main__":
                    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
                        print(pool.apply_async(tifffile.imread, [sys.argv[2]]).get(45).shape)
            """)
        )
        done = subprocess.run(
            [installed.python, script, method, files / "slide.tif"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ok(done) == "(200, 300, 3)"

    def test_uninstalling_leaves_nothing(self, wheel: Path, files: Path, tmp_path: Path) -> None:
        """Before that: what is left of a half removed package disturbs nobody."""
        environment = Environment(tmp_path / "env")
        environment.pip("install", "--no-deps", wheel)
        environment.borrow()
        site = environment.site

        (site / "wsicodec").rename(site / "elsewhere")
        code = "import tifffile; print(tifffile.COMPRESSION.JPEG.value)"
        result = run(code, python=environment.python)
        assert (result.returncode, result.stdout) == (0, "7\n")
        assert "RuntimeWarning: tifffile does not read wsicodec tiles" in result.stderr
        assert "No module named 'wsicodec'" in result.stderr
        assert "Traceback" not in result.stderr
        (site / "_wsicodec_boot.py").rename(site / "boot")
        assert environment.run("print('quiet')") == "quiet"
        (site / "elsewhere").rename(site / "wsicodec")
        (site / "boot").rename(site / "_wsicodec_boot.py")

        environment.pip("uninstall", "-y", "wsicodec")
        assert environment.listing() == environment.fresh
        assert not list((site / "__pycache__").glob("_wsicodec_boot*"))
        assert json.loads(environment.run(START)) == {"armed": False, "loaded": []}

    def test_editable_install(self, source: Path, files: Path, tmp_path: Path) -> None:
        environment = Environment(tmp_path / "env")
        environment.pip("install", "--no-deps", "--no-build-isolation", "-e", source, borrow=True)
        assert json.loads(environment.run(START)) == {"armed": True, "loaded": []}
        assert environment.run(IMAGE_READS, files) == "reads"
        where = environment.run("import wsicodec; print(wsicodec.__file__)")
        assert Path(where).parent == source / "wsicodec"
        environment.pip("uninstall", "-y", "wsicodec")
        assert environment.listing() == environment.fresh
