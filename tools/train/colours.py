"""The colour space of the transform."""

from __future__ import annotations

from typing import Any

import numpy as np


def colour_matrix(chroma_weight: float) -> np.ndarray[Any, Any]:
    """(3, 3): RGB to luma, Cb and Cr of BT.601, scaled so that errors count as in RGB when
    ``chroma_weight`` is 1, and chroma errors by its square when it is less."""
    luma = np.array([0.299, 0.587, 0.114])
    cb = (np.array([0.0, 0.0, 1.0]) - luma) / 1.772
    cr = (np.array([1.0, 0.0, 0.0]) - luma) / 1.402
    # lengths of the columns of the inverse: what a unit of each costs in RGB
    lengths = np.linalg.norm(np.linalg.inv(np.stack([luma, cb, cr])), axis=0)
    weights = lengths * np.array([1.0, chroma_weight, chroma_weight])
    return np.asarray(weights[:, None] * np.stack([luma, cb, cr]))
