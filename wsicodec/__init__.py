"""wsicodec: learned image compression for pathology slides inside ordinary files.

``encode``, ``decode``, ``decode_batch``, ``probe`` and ``models`` work on tiles in memory; reading
files needs none of them: importing this package, or starting Python where it is installed, makes
tifffile, zarr and numcodecs read learned tiles. Importing is cheap; libraries load when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsicodec.codec import decode, decode_batch, encode, probe
    from wsicodec.codec.protocol import TileInfo
    from wsicodec.errors import (
        ChecksumError,
        FormatError,
        LimitError,
        ModelError,
        RuntimeMissingError,
        SettingsError,
        SlideError,
        TruncatedError,
        UnknownModelError,
        UnsupportedError,
        VerifyError,
        WsicodecError,
    )
    from wsicodec.models import models

__version__ = "0.1.0"

_HOMES = {
    "encode": "wsicodec.codec",
    "decode": "wsicodec.codec",
    "decode_batch": "wsicodec.codec",
    "probe": "wsicodec.codec",
    "TileInfo": "wsicodec.codec.protocol",
    "models": "wsicodec.models",
    "WsicodecError": "wsicodec.errors",
    "FormatError": "wsicodec.errors",
    "TruncatedError": "wsicodec.errors",
    "ChecksumError": "wsicodec.errors",
    "LimitError": "wsicodec.errors",
    "UnknownModelError": "wsicodec.errors",
    "UnsupportedError": "wsicodec.errors",
    "ModelError": "wsicodec.errors",
    "RuntimeMissingError": "wsicodec.errors",
    "SettingsError": "wsicodec.errors",
    "SlideError": "wsicodec.errors",
    "VerifyError": "wsicodec.errors",
}

__all__ = [
    "ChecksumError",
    "FormatError",
    "LimitError",
    "ModelError",
    "RuntimeMissingError",
    "SettingsError",
    "SlideError",
    "TileInfo",
    "TruncatedError",
    "UnknownModelError",
    "UnsupportedError",
    "VerifyError",
    "WsicodecError",
    "__version__",
    "decode",
    "decode_batch",
    "encode",
    "models",
    "probe",
    "register",
]


def register() -> None:
    """Make tifffile read and write wsicodec tiles in this process. Does nothing a second time.

    Needed only where ``WSICODEC_AUTOLOAD=0`` turned that off: the hooks in site-packages do it when
    Python starts, and importing this package does it where they do not run (``python -S``,
    ``pip install --target``).

    Raises UnsupportedError when the loaded tifffile is not built as expected; where tifffile is
    imported later, that is a RuntimeWarning then.
    """
    _boot().arm(force=True)


def _boot() -> Any:
    """The module of the hook: beside the package when installed, inside it in a checkout."""
    import importlib
    import sys

    try:
        return importlib.import_module("_wsicodec_boot")
    except ImportError:
        boot = importlib.import_module("wsicodec.boot._wsicodec_boot")
        sys.modules["_wsicodec_boot"] = boot  # one copy, whoever asks next
        return boot


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'wsicodec' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(home)
    # the package ``wsicodec.models`` is itself callable
    value = module if name == "models" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


# the package's one action on import; it loads nothing unless tifffile is loaded
_boot().arm()
