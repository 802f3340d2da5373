"""The Karhunen-Loeve transform of image blocks: eigenvectors of their covariance."""

from __future__ import annotations

import numpy as np

from tools.train.images import Sampler


def colour_matrix(chroma_weight: float) -> np.ndarray:
    """(3, 3): RGB to luma, Cb and Cr of BT.601, scaled so that errors count as in RGB when
    ``chroma_weight`` is 1, and chroma errors by its square when it is less."""
    luma = np.array([0.299, 0.587, 0.114])
    cb = (np.array([0.0, 0.0, 1.0]) - luma) / 1.772
    cr = (np.array([1.0, 0.0, 0.0]) - luma) / 1.402
    # lengths of the columns of the inverse: what a unit of each costs in RGB
    lengths = np.linalg.norm(np.linalg.inv(np.stack([luma, cb, cr])), axis=0)
    weights = lengths * np.array([1.0, chroma_weight, chroma_weight])
    return weights[:, None] * np.stack([luma, cb, cr])


def block_klt(
    sampler: Sampler, side: int, chroma_weight: float, crops: int = 500
) -> tuple[np.ndarray, ...]:
    """(basis, variance, mean) of ``side x side x 3`` blocks, channel first, RGB - 128.

    basis: rows are components, strongest first, that act on RGB; orthonormal in the space of
    ``colour_matrix``. Mirrored copies are added, so the basis has no handedness.
    """
    n = 3 * side * side
    total, outer, count = np.zeros(n), np.zeros((n, n)), 0
    for _ in range(crops):
        x = sampler.batch(1)[0].astype(np.float32) - 128
        k = x.shape[1] // side
        blocks = x.reshape(3, k, side, k, side).transpose(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
        p = np.concatenate([blocks, blocks[..., ::-1]]).reshape(-1, n)
        total += p.sum(0)
        outer += p.T @ p
        count += len(p)
    mean = total / count
    colours = np.kron(colour_matrix(chroma_weight), np.eye(side * side))
    covariance = colours @ (outer / count - np.outer(mean, mean)) @ colours.T
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(-values)
    return vectors[:, order].T @ colours, values[order], mean
