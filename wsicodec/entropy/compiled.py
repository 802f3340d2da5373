"""How kernels are compiled: once per machine and version of the sources."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])

_SOURCES = (
    "entropy/compiled.py",
    "entropy/kernel.py",
    "entropy/simd.py",
    "entropy/tables.py",
    "entropy/trellis.py",
    "codec/adaptive.py",
    "codec/analysis.py",
    "codec/cell.py",
    "codec/colours.py",
    "codec/cosine.py",
    "codec/fidelity.py",
    "codec/lapping.py",
    "codec/pixels.py",
    "models/fused.py",
    "models/networks.py",
    "models/vnni.py",
    "slide/jpegscan.py",
)


def _spare_scipy() -> None:
    """Let numba load its array functions without SciPy's linear algebra, which takes as long to
    import as all of numba and which no kernel here uses.

    numba imports it there only to learn whether there is a BLAS; wherever compiled code calls for
    one, it looks again. Where SciPy is not installed, or numba is built otherwise, nothing changes.
    """
    try:
        importlib.import_module("scipy")  # numba has done so where it can
    except ImportError:
        return
    from numba.np import linalg

    look = getattr(linalg, "ensure_blas", None)
    if look is None:
        return
    linalg.ensure_blas = lambda: None
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = look


_spare_scipy()


@functools.cache
def _fingerprint() -> str:
    """Hash of the sources that compiled code depends on.

    numba looks at one file's time and size. Wheels have constant times, and kernels use constants
    of other modules: code cached by one release could answer for the next.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for name in _SOURCES:
        with contextlib.suppress(OSError):  # in an archive: numba keeps no cache there either
            digest.update((package / name).read_bytes())
    return digest.hexdigest()[:12]


def compiled(function: F) -> F:
    """``numba.njit`` without the GIL, cached on disk where any cache directory can be written
    (beside the package, or in the user's where that is read-only)."""
    # names the cache's files
    function.__qualname__ = f"{function.__qualname__}_{_fingerprint()}"
    try:
        return cast(F, numba.njit(cache=True, nogil=True, boundscheck=False)(function))
    except RuntimeError:  # numba: no locator available, i.e. nowhere to keep a cache
        return cast(F, numba.njit(nogil=True, boundscheck=False)(function))
