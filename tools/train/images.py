"""Training images: lossless files from a folder, crops that a decoder would see as tiles."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.train import manifest

MINIMUM_SIDE = 256
SUFFIXES = (".jpg", ".png", ".webp", ".jxl")

Array = np.ndarray[Any, Any]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """Images of one dataset, and which of them have a JPEG past; none do where nothing is said."""

    name: str
    images: list[Array]
    jpeg: tuple[bool, ...] = ()


def read_image(data: bytes, suffix: str) -> Array:
    """RGB uint8 (rows, columns, 3) of a JPEG, PNG, WebP or JPEG XL file's bytes."""
    if suffix == ".jxl":
        import imagecodecs

        image = imagecodecs.jpegxl_decode(data)
    else:
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    if image.ndim != 3 or image.shape[2] < 3 or image.dtype != np.uint8:
        raise ValueError(f"not an RGB uint8 image: {image.shape} {image.dtype}")
    return np.ascontiguousarray(image[..., :3])


def _read_files(path: Path) -> tuple[dict[str, bytes], str]:
    """(bytes by file name, text of the manifest) of a folder's images or of a pack's."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as pack:
            files = {name: pack.read(name) for name in pack.namelist()}
        return files, files.pop(manifest.NAME, b"").decode()
    files = {f.name: f.read_bytes() for f in path.iterdir() if f.suffix in SUFFIXES}
    beside = path.resolve().parent / manifest.NAME
    return files, beside.read_text("utf-8") if beside.is_file() else ""


def load_sources(path: Path) -> list[Source]:
    """All images of a folder, or of a ``pack`` (.zip), by source: the name up to the last '_'.

    The manifest beside the folder, or in the pack, says which have a JPEG past.
    """
    files, text = _read_files(path)
    jpeg = manifest.jpeg_stems(text)
    names = sorted(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders work without the GIL
        images = list(pool.map(lambda name: read_image(files[name], Path(name).suffix), names))
    groups: dict[str, list[tuple[Array, bool]]] = {}
    for name, image in zip(names, images, strict=True):
        if min(image.shape[:2]) >= MINIMUM_SIDE:
            stem = Path(name).stem
            groups.setdefault(stem.rsplit("_", 1)[0], []).append((image, stem in jpeg))
    if not groups:
        raise ValueError(f"no images of at least {MINIMUM_SIDE} pixels in {path}")
    return [
        Source(name, [i for i, _ in found], tuple(j for _, j in found))
        for name, found in sorted(groups.items())
    ]


def write_pack(folder: Path, listing: Path, out: Path, max_bytes: int) -> int:
    """Pack images by the manifest's priority, up to ``max_bytes`` with the manifest's rows of them;
    returns how many. JPEG files stay as they are, others become lossless WebP, so that the pack
    needs no imagecodecs."""
    rows = manifest.by_priority(manifest.parse(listing.read_text()))
    total = count = 0
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["path"])
    writer.writeheader()
    with zipfile.ZipFile(out, "x", zipfile.ZIP_STORED) as pack:
        for row in rows:
            file = folder / Path(row["path"]).name
            data, suffix = file.read_bytes(), file.suffix
            if suffix != ".jpg":
                buffer = io.BytesIO()
                image = Image.fromarray(read_image(data, suffix))
                image.save(buffer, "WEBP", lossless=True, quality=80, method=4)
                data, suffix = buffer.getvalue(), ".webp"
            before = text.tell()
            writer.writerow(row)
            total += len(data) + text.tell() - before
            if total > max_bytes:
                text.truncate(before)
                break
            pack.writestr(file.stem + suffix, data)
            count += 1
        pack.writestr(manifest.NAME, text.getvalue())
    return count


@dataclass(frozen=True)
class CropSettings:
    """How crops are drawn.

    area_exponent: a source's weight is its area to this power: 0 draws from all alike.
    halve, halve_jpeg: share of crops averaged from twice their sides, where the image is large
        enough; of images without and with a JPEG past, so that they do not teach its grid.
    stain: share of crops in other stains: a gain and an offset per colour in optical density.
    edge: share of tiles whose last columns or rows, or both, repeat the last real ones, as those
        at a slide's right and lower edge do.
    shapes: (rows, columns) of batches that are not square, multiples of 32, drawn alike.
    shape_share: of such batches; they have about as many pixels as the square ones.
    """

    area_exponent: float = 0.5
    halve: float = 0.4
    halve_jpeg: float = 0.7
    stain: float = 0.3
    edge: float = 0.05
    shapes: tuple[Shape, ...] = ((128, 512), (512, 128), (160, 384), (384, 160), (96, 224))
    shape_share: float = 0.1

    def __post_init__(self) -> None:
        if any(side % 32 or side < 32 for shape in self.shapes for side in shape):
            raise ValueError(f"sides of crops must be multiples of 32: {self.shapes}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


QUARTERS = np.arange(4 * 255 + 1) / 4
"""All means of four levels: what a crop's samples can be before they are rounded."""


def stained(rng: np.random.Generator) -> Array:
    """(3, 1021): what the means of four levels become in another stain, by colour."""
    density = -np.log((QUARTERS + 1) / 256)
    gains = np.exp(rng.normal(0, 0.12, (3, 1))) * np.exp(rng.normal(0, 0.15))
    table: Array = 256 * np.exp(-density * gains - rng.normal(0, 0.02)) - 1
    return table


def orientations(image: Array, shape: Shape) -> list[Shape]:
    """The shape and the shape turned by 90 degrees, where the image is large enough."""
    rows, columns = image.shape[:2]
    return [s for s in (shape, shape[::-1]) if rows >= s[0] and columns >= s[1]]


def halved(image: Array) -> Array:
    """Sums of 2 x 2 pixels, uint16."""
    rows = image[0::2].astype(np.uint16) + image[1::2]
    return rows[:, 0::2] + rows[:, 1::2]


class Sampler:
    """Random augmented crops: flips, quarter turns, 2x area downsampling, stains.

    ``one`` and ``batch`` are deterministic in the seed and the order of calls, ``tiles`` in the
    seed and its arguments alone.
    """

    def __init__(
        self, sources: list[Source], crop: int, seed: int, settings: CropSettings | None = None
    ) -> None:
        self.settings = settings or CropSettings()
        self.rng = np.random.default_rng(seed)
        self.crop, self.seed = crop, seed
        self.images = [image for s in sources for image in s.images]
        self.jpeg = [j for s in sources for j in s.jpeg or (False,) * len(s.images)]
        weights = []
        for s in sources:
            areas = np.array([i.shape[0] * i.shape[1] for i in s.images], float)
            weights.append(areas.sum() ** self.settings.area_exponent * areas / areas.sum())
        self.weights = np.concatenate(weights)
        self.cumulative = {s: self._cumulative(s) for s in ((crop, crop), *self.settings.shapes)}
        if not self.cumulative[crop, crop][-1]:
            raise ValueError(f"no image holds a crop of {crop} x {crop} pixels")

    def _cumulative(self, shape: Shape) -> Array:
        """Cumulative weights of the images; those too small for a crop have none."""
        able = [bool(orientations(image, shape)) for image in self.images]
        return np.cumsum(self.weights * able)

    def _crop(self, rng: np.random.Generator, shape: Shape) -> Array:
        s, weights = self.settings, self.cumulative[shape]
        k = int(np.searchsorted(weights, rng.random() * weights[-1], "right"))
        image = self.images[k]
        sides = orientations(image, shape)
        rows, columns = sides[rng.integers(len(sides))]
        half = rng.random() < (s.halve_jpeg if self.jpeg[k] else s.halve)
        half = half and image.shape[0] >= 2 * rows and image.shape[1] >= 2 * columns
        scale = 2 if half else 1
        y = rng.integers(image.shape[0] - scale * rows + 1)
        x = rng.integers(image.shape[1] - scale * columns + 1)
        crop = image[y : y + scale * rows, x : x + scale * columns]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        turned = int((rows, columns) != shape) if rows != columns else int(rng.integers(2))
        crop = np.rot90(crop, turned + 2 * int(rng.integers(2)))
        other = rng.random() < s.stain
        if not half and not other:
            return np.ascontiguousarray(crop)
        table = stained(rng) if other else np.broadcast_to(QUARTERS, (3, len(QUARTERS)))
        table = np.clip(np.round(table), 0, 255).astype(np.uint8)
        sums = halved(crop) if half else crop
        table = table if half else table[:, ::4]
        return np.stack([table[c][sums[..., c]] for c in range(3)], 2)

    def one(self) -> Array:
        """(crop, crop, 3) uint8."""
        return self._crop(self.rng, (self.crop, self.crop))

    def batch(self, count: int) -> Array:
        """(count, 3, crop, crop) uint8."""
        return np.stack([self.one() for _ in range(count)]).transpose(0, 3, 1, 2)

    def shapes(self, count: int) -> list[tuple[int, int, int]]:
        """(crops, rows, columns) of batches as large as ``count`` square crops, that one first."""
        area = count * self.crop**2
        possible = (shape for shape, weights in self.cumulative.items() if weights[-1])
        return [
            (max(1, round(area / (rows * columns))), rows, columns) for rows, columns in possible
        ]

    def tiles(self, step: int, part: int, count: int) -> Array:
        """(n, 3, rows, columns) uint8: the images of one part of a training step.

        All parts of a step have the same shape.
        """
        square, *others = self.shapes(count)
        rng = np.random.default_rng((self.seed, 1, step))
        other = rng.random() < self.settings.shape_share
        n, rows, columns = others[rng.integers(len(others))] if other and others else square
        rng = np.random.default_rng((self.seed, 2, step, part))
        tiles = np.empty((n, 3, rows, columns), np.uint8)
        for tile in tiles:
            crop = self._crop(rng, (rows, columns))
            if rng.random() < self.settings.edge:
                crop = at_edge(crop, rng)
            tile[:] = crop.transpose(2, 0, 1)
        return tiles


def at_edge(tile: Array, rng: np.random.Generator) -> Array:
    """A tile of which part lies beyond the slide's right edge, lower edge, or both."""
    rows, columns = tile.shape[:2]
    beyond = int(rng.integers(1, 4))
    real_rows = int(rng.integers(1, rows)) if beyond & 1 else rows
    real_columns = int(rng.integers(1, columns)) if beyond & 2 else columns
    pad = (0, rows - real_rows), (0, columns - real_columns), (0, 0)
    return np.pad(tile[:real_rows, :real_columns], pad, mode="edge")
