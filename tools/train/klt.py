"""The Karhunen-Loeve transform of image blocks: eigenvectors of their covariance."""

from __future__ import annotations

import numpy as np

from tools.train.images import Sampler


def block_klt(sampler: Sampler, side: int, crops: int = 500) -> tuple[np.ndarray, ...]:
    """(basis, variance, mean) of ``side x side x 3`` blocks, channel first, RGB - 128.

    basis: rows are orthonormal components, strongest first. Mirrored copies are added, so the
    basis has no handedness.
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
    values, vectors = np.linalg.eigh(outer / count - np.outer(mean, mean))
    order = np.argsort(-values)
    return vectors[:, order].T.copy(), values[order], mean
