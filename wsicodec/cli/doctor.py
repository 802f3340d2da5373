"""``wsicodec doctor``: is this installation whole, and if not, which line repairs it."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsicodec.cli.common import Exit, Subparsers, add_command, print_json
from wsicodec.errors import WsicodecError

_LIBRARIES = ("numpy", "imagecodecs", "tifffile", "numba", "onnx", "rich", "ome-types")
_OPTIONAL = ("zarr", "numcodecs", "openslide-python", "openslide-bin", "distributed", "tiffslide")
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_INSTALL_CPU = 'pip install "wsicodec[cpu]"'
_REPAIR_MIX = (
    "pip uninstall -y onnxruntime onnxruntime-gpu, then "
    "pip install --force-reinstall onnxruntime (or onnxruntime-gpu on a machine with a CUDA GPU)"
)
_REINSTALL = "pip install --force-reinstall --no-deps wsicodec"
_INSTALL_AGAIN = "pip install --force-reinstall wsicodec"
_HOOK_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """One finding. fix: the line to type where it is not ok."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "fix": self.fix}


def add(commands: Subparsers) -> None:
    """Declare the command."""
    add_command(
        commands,
        "doctor",
        run,
        summary="check the installation and print the line that repairs it",
        example="wsicodec doctor",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    checks = [_made(check) for check in CHECKS]
    healthy = all(check.ok for check in checks)
    if arguments.json:
        print_json({"ok": healthy, "checks": [check.as_dict() for check in checks]})
        return Exit.OK if healthy else Exit.FAILED
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
        if not check.ok and check.fix:
            print(f"      fix: {check.fix}")
    return Exit.OK if healthy else Exit.FAILED


def _made(check: Callable[[], Check]) -> Check:
    """A check's finding. A library that is missing or broken is one, too, whatever it raises."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return Check(name, False, f"{type(error).__name__}: {error}", _INSTALL_AGAIN)


def check_versions() -> Check:
    """Python, wsicodec and the libraries it needs."""
    from wsicodec import __version__

    found = {name: _version(name) for name in (*_LIBRARIES, *_OPTIONAL)}
    missing = [name for name in _LIBRARIES if found[name] is None]
    python = ".".join(map(str, sys.version_info[:3]))
    detail = f"wsicodec {__version__}, Python {python}, " + ", ".join(
        f"{name} {version or 'not installed'}" for name, version in found.items()
    )
    return Check("versions", not missing, detail, f"pip install {' '.join(missing)}")


def check_tifffile() -> Check:
    """Does a fresh Python that imports tifffile alone read our tiles."""
    from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG

    code = f"import tifffile; tifffile.TIFF.DECOMPRESSORS[{TIFF_COMPRESSION_TAG}]"
    name = "tifffile hook"
    if os.environ.get("WSICODEC_AUTOLOAD") == "0":
        detail = "WSICODEC_AUTOLOAD=0 turns it off: call `wsicodec.register()` before reading"
        return Check(name, True, detail)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_HOOK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name, False, f"a fresh Python cannot be tried: {error}", "run doctor again")
    if done.returncode == 0:
        return Check(name, True, "a fresh Python reads wsicodec tiles with nothing imported")
    last = done.stderr.strip().rpartition("\n")[2]
    return Check(
        name,
        False,
        f"a fresh Python does not read wsicodec tiles ({last})",
        f"{_REINSTALL}; under `python -S` or `pip --target`, `import wsicodec` before reading",
    )


def check_onnxruntime(distributions: Mapping[str, Sequence[str]] | None = None) -> Check:
    """Exactly one of onnxruntime and onnxruntime-gpu, which overwrite each other's files.

    distributions: import name to distributions, as ``importlib.metadata`` gives them.
    """
    if distributions is None:
        import importlib.metadata

        distributions = importlib.metadata.packages_distributions()
    owners = sorted(set(distributions.get("onnxruntime", ())) & set(_ONNXRUNTIMES))
    name = "onnxruntime"
    if len(owners) > 1:
        detail = f"{' and '.join(owners)} are both installed and overwrite each other's files"
        return Check(name, False, detail, _REPAIR_MIX)
    from wsicodec.models.session import runtime

    try:
        library = runtime()
        providers = ", ".join(library.get_available_providers())
    except WsicodecError as error:
        return Check(name, False, str(error), _REPAIR_MIX if owners else _INSTALL_CPU)
    except Exception as error:
        return Check(name, False, f"does not work: {error}", _REPAIR_MIX)
    owner = owners[0] if owners else "onnxruntime"
    return Check(name, True, f"{owner} {library.__version__}, providers: {providers}")


def check_gpu() -> Check:
    """Can learned tiles be decoded on a GPU. None is needed."""
    from wsicodec.models.provider import INSTALL_CUDA, cuda_expected, cuda_problem

    try:
        problem, expected = cuda_problem(), cuda_expected()
    except WsicodecError as error:  # onnxruntime's own check says what to do
        return Check("gpu", True, f"not looked for: {error}")
    if problem is None:
        return Check("gpu", True, "CUDA works: onnxruntime's provider and numba's kernels")
    detail = f"not used: {problem}"
    return Check(
        "gpu", not expected, detail if expected else f"{detail}; none is needed", INSTALL_CUDA
    )


def check_numba_cache() -> Check:
    """Can compiled code be kept, so that no process waits for the compiler twice."""
    name = "numba cache"
    fix = "export NUMBA_CACHE_DIR=~/.cache/numba"
    from wsicodec.entropy import kernel

    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        detail = "NUMBA_DISABLE_JIT turns the compiler off, which learned tiles need"
        return Check(name, False, detail, "unset NUMBA_DISABLE_JIT")
    path = kernel.decode_symbols.stats.cache_path  # type: ignore[attr-defined]
    if path is None:
        return Check(name, False, "no folder to keep compiled code in: each start compiles", fix)
    try:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        detail = f"{path} is not writable ({error.strerror}): each start compiles"
        return Check(name, False, detail, fix)
    return Check(name, True, str(path))


def check_threads() -> Check:
    """The thread budget."""
    from wsicodec.settings import thread_budget

    try:
        budget = thread_budget()
    except WsicodecError as error:
        return Check("threads", False, str(error), "unset WSICODEC_NUM_THREADS")
    source = "WSICODEC_NUM_THREADS" if os.environ.get("WSICODEC_NUM_THREADS") else "cores"
    return Check("threads", True, f"{budget} (by {source}) of {os.cpu_count()} cores")


def check_codecs() -> Check:
    """Do the codecs of imagecodecs work that slides and tiles of other modes are coded with."""
    import numpy as np

    import wsicodec
    from wsicodec.codec.reference import REFERENCE_CODECS

    image = np.full((16, 16, 3), 200, np.uint8)
    broken = {}
    for codec in REFERENCE_CODECS:
        try:
            wsicodec.decode(wsicodec.encode(image, codec=codec))
        except WsicodecError as error:
            broken[codec] = str(error)
    if broken:
        detail = "; ".join(f"{codec} does not work: {why}" for codec, why in broken.items())
        return Check("codecs", False, detail, "pip install --force-reinstall imagecodecs")
    return Check("codecs", True, ", ".join(REFERENCE_CODECS))


def check_models() -> Check:
    """Are the model files what their digests say."""
    from wsicodec.models import models

    name = "models"
    try:
        found = models()
        wrong = [
            record.name
            for record in found
            if hashlib.sha256(record.path.read_bytes()).hexdigest() != record.digest
        ]
    except (WsicodecError, OSError) as error:
        return Check(name, False, str(error), _REINSTALL)
    if wrong:
        return Check(name, False, f"digest does not match: {', '.join(wrong)}", _REINSTALL)
    if not found:
        return Check(name, False, "none is installed", _REINSTALL)
    detail = ", ".join(f"{record.name} ({record.digest[:16]})" for record in found)
    return Check(name, True, f"{detail}; digests match")


def check_round_trip() -> Check:
    """Does one learned tile go through the codec and come back."""
    import numpy as np

    import wsicodec
    from wsicodec.metrics import psnr

    name = "round trip"
    # a smooth tile in the colours of a stain: any whole model codes it above 30 dB
    y, x = np.mgrid[0:64, 0:64] / 63
    image = np.stack([180 + 50 * x, 120 + 60 * y, 170 + 40 * x * y], axis=-1).astype(np.uint8)
    try:
        data = wsicodec.encode(image)
        level = psnr(image, wsicodec.decode(data))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}", _REINSTALL)
    detail = f"64 x 64 pixels in {len(data)} bytes at {level:.1f} dB"
    return Check(name, level > 25, detail, _REINSTALL)


CHECKS: tuple[Callable[[], Check], ...] = (
    check_versions,
    check_tifffile,
    check_onnxruntime,
    check_gpu,
    check_numba_cache,
    check_threads,
    check_codecs,
    check_models,
    check_round_trip,
)


def _version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
