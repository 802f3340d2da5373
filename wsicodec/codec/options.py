"""Options of the learned codec, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from wsicodec.errors import SettingsError

DEFAULT_EFFORT = 5
MAX_EFFORT = 9
TUNES = ("balanced", "ssim", "psnr")
"""What an encoder aims at; the first is the default."""


@dataclass(frozen=True)
class LearnedSettings:
    """What ``LearnedCodec.encode`` takes beside an image and its quality."""

    model: str = "he-fast"
    effort: int = DEFAULT_EFFORT
    tune: str = TUNES[0]
    target_psnr: float | None = None
    target_ssim: float | None = None
    modes: str = "auto"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LearnedSettings:
        """Settings from keyword options, or SettingsError."""
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                raise SettingsError(
                    f"learned codec has no option {name!r}; known: {', '.join(sorted(names))}"
                )
        s = cls(**options)
        if isinstance(s.effort, bool) or not isinstance(s.effort, (int, np.integer)):
            raise SettingsError(f"effort must be an integer, not {s.effort!r}")
        if not 1 <= s.effort <= MAX_EFFORT:
            raise SettingsError(f"effort {s.effort} is not within 1 ... {MAX_EFFORT}")
        if s.tune not in TUNES:
            raise SettingsError(f"tune must be one of {', '.join(TUNES)}, not {s.tune!r}")
        if s.modes not in ("auto", "learned"):
            raise SettingsError(f"modes must be 'auto' or 'learned', not {s.modes!r}")
        if not isinstance(s.model, str):
            raise SettingsError(f"model must be a name or digest, not {s.model!r}")
        if s.target_psnr is not None and s.target_ssim is not None:
            raise SettingsError("target_psnr and target_ssim exclude each other")
        for name, value, low, high in (
            ("target_psnr", s.target_psnr, 10, 60),
            ("target_ssim", s.target_ssim, 0.1, 0.99999),
        ):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise SettingsError(f"{name} must be a number, not {value!r}")
            if not low <= value <= high:
                raise SettingsError(f"{name} must be within {low} ... {high}, not {value}")
        return s
