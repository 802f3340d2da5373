"""Which tiles of a call go to the GPU: ``device=`` of ``decode`` and ``decode_batch``.

"cpu" and "cuda" do what they say; a GPU is used with a model only after it has given the CPU's
symbols (``selfcheck``). "auto" takes the GPU where that is switched on (``AUTO_PIXELS``), one works
and the tiles are enough to be worth the way there; whatever fails on it is then decoded on the CPU,
with one warning.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Sequence

import numpy as np

from wsicodec import codec
from wsicodec.bitstream import Tile
from wsicodec.codec.protocol import Image
from wsicodec.errors import FormatError, UnknownModelError, WsicodecError
from wsicodec.models.provider import cuda_problem
from wsicodec.models.store import decoder_of_prefix
from wsicodec.pipelines.backend import Backend
from wsicodec.pipelines.batched import BatchDecoder, Kind
from wsicodec.pipelines.cuda import CudaBackend
from wsicodec.pipelines.selfcheck import check_backend


class _Decoders:
    """The GPU and its batch decoders, for each model one; of this process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.backend: Backend | None = None
        self.decoders: dict[bytes, BatchDecoder] = {}
        self.warned = False

    def of(self, prefix: bytes) -> BatchDecoder:
        model = decoder_of_prefix(prefix)
        with self.lock:
            if self.backend is None:
                self.backend = CudaBackend()
            if model.digest not in self.decoders:
                check_backend(model, self.backend)
                self.decoders[model.digest] = BatchDecoder(model, self.backend)
            return self.decoders[model.digest]

    def close(self) -> None:
        """At the end of the process, while CUDA is still there to take its memory back."""
        for decoder in self.decoders.values():
            decoder.close()
        self.decoders.clear()


_decoders = _Decoders()
atexit.register(_decoders.close)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_decoders.reset)


def on_gpu(tiles: Sequence[Tile | None], device: str) -> list[list[int]]:
    """Indices of the tiles that a GPU is to decode, by kind; None are tiles that are none of ours.

    Asks whether CUDA works only where it matters.
    """
    kinds: dict[object, list[int]] = {}
    for i, tile in enumerate(tiles):
        if tile is not None and tile.learned is not None:
            kinds.setdefault((tile.learned.model, Kind.of(tile)), []).append(i)
    groups = list(kinds.values())
    if device == "auto":
        least = codec.AUTO_PIXELS
        if least is None:
            return []
        groups = [g for g in groups if _pixels(tiles[g[0]]) * len(g) >= least]
        if groups and cuda_problem() is not None:
            return []
    return groups


def _pixels(tile: Tile | None) -> int:
    return 0 if tile is None else tile.height * tile.width


def decode_on_gpu(
    tiles: Sequence[Tile], outs: Sequence[Image] | None, device: str
) -> list[Image] | None:
    """Pixels of learned tiles of one kind and model; None where "auto" leaves them to the CPU.

    Raises the first tile's error.
    """
    assert tiles[0].learned is not None
    images: list[Image] = []
    try:
        decoder = _decoders.of(tiles[0].learned.model)
        for begin, batch in decoder.stream(tiles):
            pixels = batch.checked().to_host()
            if outs is None:
                images.extend(np.array(image) for image in pixels)
            else:
                for out, image in zip(outs[begin:], pixels, strict=False):
                    out[...] = image
                    images.append(out)
    except (FormatError, UnknownModelError):
        raise
    except Exception as error:  # the GPU's: memory, driver, runtime
        if device != "auto":
            if isinstance(error, WsicodecError):
                raise
            raise RuntimeError(f"decoding on the GPU failed: {error}") from error
        if not _decoders.warned:
            _decoders.warned = True
            warnings.warn(
                f"decoding on the GPU failed, tiles are decoded on the CPU: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    return images
