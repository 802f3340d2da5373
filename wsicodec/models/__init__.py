"""Model files, their proofs, and the store that finds them by digest."""

import sys
import types

from wsicodec.models.store import (
    ModelRecord,
    allow_model,
    find_model,
    install_model,
    models,
)

__all__ = ["ModelRecord", "allow_model", "find_model", "install_model", "models"]


class _CallableModule(types.ModuleType):
    """``wsicodec.models()`` lists the models, whether or not this package was imported before:
    an imported submodule takes the place of an attribute of the same name."""

    def __call__(self) -> tuple[ModelRecord, ...]:
        return models()


sys.modules[__name__].__class__ = _CallableModule
