"""Tells tifffile of wsicodec once tifffile is imported, and costs next to nothing before that.

Installed at the top of site-packages beside ``wsicodec_autoload.pth`` and, for Python 3.15 and
later, ``wsicodec_autoload.start`` (PEP 829), whose one line calls ``arm`` at every start of Python.
Therefore this file imports only ``sys``, and nothing of wsicodec until tifffile is there.
``WSICODEC_AUTOLOAD=0`` in the environment turns it off.
"""

import sys

# not typing.TYPE_CHECKING: importing typing would cost more than everything else here
TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

HOST = "tifffile.tifffile"  # the module that owns the codec tables; ``import tifffile`` loads it
SWITCH = "WSICODEC_AUTOLOAD"

_forced = False
_searching: set[int] = set()  # idents of threads that ask the other finders right now


def arm(force: bool = False) -> None:
    """Register with tifffile now if it is loaded, else as soon as it is. Idempotent.

    force: ignore the environment switch from now on, and raise what goes wrong in this call
    instead of warning (a later import of tifffile never fails because of wsicodec).
    """
    global _forced  # noqa: PLW0603 - the hook has no instance, and there is one per process
    if force:
        _forced = True
    elif _switched_off():
        return
    armed = is_armed()
    if not armed:
        sys.meta_path.insert(0, _Hook)
    module = sys.modules.get(HOST)
    if module is None:
        return
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        if armed:
            return  # that import runs through the hook
        __import__(HOST)  # it began before the hook was there: wait for the thread that runs it
        module = sys.modules[HOST]
    if force:
        _install(module)
    else:
        _install_or_warn(module)


def disarm() -> None:
    """Take the hook out. What is registered already stays."""
    global _forced  # noqa: PLW0603
    _forced = False
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "wsicodec_hook", False)]


def is_armed() -> bool:
    """True when an import of tifffile will be followed by registration."""
    # by mark, not by identity: a second copy of this file must not add a second hook
    return any(getattr(finder, "wsicodec_hook", False) for finder in sys.meta_path)


class _Hook:
    """Meta-path finder that lets the others find tifffile and registers after it has loaded.

    It stays in place, so that a reload or a second import registers again.
    """

    wsicodec_hook = True

    @classmethod
    def find_spec(
        cls, name: str, path: object = None, target: object = None
    ) -> "ModuleSpec | None":
        if name != HOST or (_switched_off() and not _forced):
            return None
        from _thread import get_ident

        thread = get_ident()
        if thread in _searching:
            return None  # a hook of the same kind asks every finder, us included
        _searching.add(thread)
        try:
            spec = _find_elsewhere(name, path, target)
        finally:
            _searching.discard(thread)
        if spec is not None:
            _watch(spec)
        return spec


def _find_elsewhere(name: str, path: object, target: object) -> "ModuleSpec | None":
    for finder in list(sys.meta_path):
        if getattr(finder, "wsicodec_hook", False):
            continue
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, path, target) if find else None
        if spec is not None:
            return spec
    return None


def _watch(spec: "ModuleSpec") -> None:
    """Let the loader of this spec register after it has executed tifffile.

    The loader's method is replaced, not the loader: tools look at the loader's class.
    """
    loader = spec.loader
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        _warn(f"loader {type(loader).__name__} of tifffile has no exec_module")
        return
    if getattr(execute, "wsicodec_hook", False):
        return  # zipimporter: one loader for all modules of a zip

    def exec_module(module: "ModuleType") -> None:
        execute(module)
        if module.__name__ == HOST:
            _install_or_warn(module)

    exec_module.wsicodec_hook = True  # type: ignore[attr-defined]
    try:
        loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
    except (AttributeError, TypeError) as error:
        _warn(f"loader {type(loader).__name__} of tifffile cannot be watched ({error})")


def _install(module: "ModuleType") -> None:
    from wsicodec.plugins.tifffile import install

    install(module)


def _install_or_warn(module: "ModuleType") -> None:
    try:
        _install(module)
    except Exception as error:  # whatever is wrong with wsicodec, tifffile stays usable
        _warn(f"{type(error).__name__}: {error}")


def _warn(reason: str) -> None:
    import warnings

    warnings.warn(
        f"tifffile does not read wsicodec tiles, registration failed: {reason}"
        f" ({SWITCH}=0 turns it off)",
        RuntimeWarning,
        stacklevel=2,
    )


def _switched_off() -> bool:
    import os  # loaded long before, by site

    return os.environ.get(SWITCH, "").strip().lower() in {"0", "false", "no", "off"}
