"""From latents to pixels as one graph: what ``wsicodec.codec.pixels.paint`` does, for a batch.

Corrections, the inverse cosine transform, lapping and colours are matrix products over arrays
(N, ...), so that any provider of onnxruntime runs them. docs/format.md, "Pixels", gives the
arithmetic. In half precision all that follows the corrections is float16: half the memory traffic,
which is what this costs on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wsicodec.codec.cell import STEPS, CellShape
from wsicodec.codec.cosine import BLOCK, PLANES, SAMPLES
from wsicodec.codec.pixels import brush_of
from wsicodec.models.proof import FLOAT, HALF, INT32, UINT8
from wsicodec.pipelines.graphs import Builder, Port

if TYPE_CHECKING:
    from wsicodec.models.decoder import DecoderModel

Array = npt.NDArray[Any]

HALF_SUM = 2.0**15
HALF_SAMPLE = 2.0**9
"""Where float16 keeps the format's tolerance: up to this sum of a block's latents, by magnitude, so
that nothing overflows, and up to this magnitude of planes' samples, which are then off by a quarter
level in the root mean square, at the very most. Tissue has half of either. Batches with a tile
beyond it are painted in float32."""

_HALF_OF_LAP = 8


@dataclass(frozen=True)
class Synthesis:
    """A synthesis graph: of cells of one shape with so many coded channels. half: in float16."""

    shape: CellShape
    channels: int
    half: bool = False

    def graph(self, model: DecoderModel) -> bytes:
        """The graph of a model.

        Inputs: ``y`` (N, channels, positions) float32; ``correction`` (N, contexts, positions)
        uint8; ``gains`` (N, positions) uint8, effective; ``colours`` (N, 3, 3) and ``offset`` (N,
        3, 1) float32, the columns of ``colours_of``. Outputs: ``pixels`` (N, height, width, 3)
        uint8 and, in half precision, ``peak`` (N,) float32: where it is 1 or less, pixels are good.
        """
        b = _Builder()
        rows, columns = self.shape.latents
        positions, contexts = rows * columns, model.architecture.context_channels
        real = np.float16 if self.half else np.float32
        brush = brush_of(model)

        blocks = self._blocks(b, model)
        if self.half:
            sums = b.add("ReduceL1", blocks, axes=[1], keepdims=0)
            largest = b.add("ReduceMax", sums, axes=[1], keepdims=0)
            parts = [b.add("Mul", largest, b.scalar(1 / HALF_SUM))]
            blocks = b.cast(blocks, HALF)
        # frequencies of rows, then those of columns, with the samples in their places between
        x = b.reshape(blocks, [-1, PLANES, BLOCK, BLOCK * positions])
        x = b.add("MatMul", b.constant(brush.samples, real), x)
        x = b.reshape(x, [-1, PLANES, BLOCK, BLOCK, rows, columns])
        x = b.add("Transpose", x, perm=[0, 1, 4, 2, 5, 3])
        x = b.add("MatMul", b.reshape(x, [-1, BLOCK]), b.constant(brush.frequencies, real))
        high, wide = BLOCK * rows, BLOCK * columns
        x = b.reshape(x, [-1, PLANES, high, wide])
        if brush.lapped:
            border = brush.border
            if columns > 1:

                def along_rows(part: str) -> str:
                    turned = b.add("MatMul", b.reshape(part, [-1, BLOCK]), b.constant(border, real))
                    return b.reshape(turned, [-1, PLANES, high, wide - BLOCK])

                x = b.within(x, 3, wide, along_rows)
            if rows > 1:

                def along_columns(part: str) -> str:
                    lines = b.reshape(part, [-1, BLOCK, wide])
                    turned = b.add("MatMul", b.constant(border.T, real), lines)
                    return b.reshape(turned, [-1, PLANES, high - BLOCK, wide])

                x = b.within(x, 2, high, along_columns)
        colours, offset = "colours", "offset"
        if self.half:
            colours, offset = b.cast(colours, HALF), b.cast(offset, HALF)
            for kind, sign in (("ReduceMax", 1), ("ReduceMin", -1)):
                most = b.cast(b.add(kind, x, axes=[1, 2, 3], keepdims=0), FLOAT)
                parts.append(b.add("Mul", most, b.scalar(sign / HALF_SAMPLE)))
            b.add("Max", *parts, name="peak")
        x = b.add("MatMul", colours, b.reshape(x, [-1, PLANES, high * wide]))
        x = b.add("Add", x, offset)
        x = b.add("Clip", x, b.constant(0, real), b.constant(255, real))
        x = b.cast(b.add("Round", x), UINT8)
        x = b.reshape(x, [-1, PLANES, high, wide])
        for axis, size, whole in ((2, self.shape.height, high), (3, self.shape.width, wide)):
            if size < whole:
                x = b.cut(x, axis, 0, size)
        b.add("Transpose", x, name="pixels", perm=[0, 2, 3, 1])

        outputs: list[Port] = [("pixels", UINT8, ["batch", self.shape.height, self.shape.width, 3])]
        if self.half:
            outputs.append(("peak", FLOAT, ["batch"]))
        return b.model(
            [
                ("y", FLOAT, ["batch", self.channels, positions]),
                ("correction", UINT8, ["batch", contexts, positions]),
                ("gains", UINT8, ["batch", positions]),
                ("colours", FLOAT, ["batch", 3, 3]),
                ("offset", FLOAT, ["batch", 3, 1]),
            ],
            outputs,
        )

    def _blocks(self, b: _Builder, model: DecoderModel) -> str:
        """Corrected latents in their places, (N, 768, positions) float32."""
        contexts = model.architecture.context_channels
        head = "y" if self.channels <= contexts else b.cut("y", 1, 0, contexts)
        if self.channels < contexts:
            head = b.padded(head, contexts - self.channels)
        scales = b.add("Gather", b.constant(STEPS / 64, np.float32), b.cast("gains", INT32))
        scales = b.add("Unsqueeze", scales, b.constant([1]))
        change = b.add("Add", b.cast("correction", FLOAT), b.scalar(-128))
        head = b.add("Add", head, b.add("Mul", change, scales))
        used = max(self.channels, contexts)
        places = np.full(SAMPLES, -1)
        channel = np.arange(used)
        # channels beyond the context come from y, which follows; a row of zeros for all others
        missing = used < SAMPLES
        beyond = channel >= contexts
        places[model.order[:used]] = np.where(beyond, channel + contexts + missing, channel)
        places[places < 0] = contexts
        rows = b.padded(head, 1) if missing else head
        if used > contexts:
            rows = b.add("Concat", rows, "y", axis=1)
        return b.add("Gather", rows, b.constant(places, np.int64), axis=1)


class _Builder(Builder):
    """With what several steps of a synthesis share."""

    def padded(self, x: str, more: int) -> str:
        """(N, channels, positions) with ``more`` channels of zeros."""
        return self.add("Pad", x, self.constant([0, 0, 0, 0, more, 0]))

    def within(self, x: str, axis: int, size: int, turn: Any) -> str:
        """``turn`` of all but the first and last eight samples of an axis, and those about it."""
        end = size - _HALF_OF_LAP
        middle = turn(self.cut(x, axis, _HALF_OF_LAP, end))
        first, last = self.cut(x, axis, 0, _HALF_OF_LAP), self.cut(x, axis, end, size)
        return self.add("Concat", first, middle, last, axis=axis)
