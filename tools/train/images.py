"""Training images: lossless files from a folder, crops that a decoder would see as tiles."""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MINIMUM_SIDE = 256


@dataclass(frozen=True)
class Source:
    """Images of one dataset; sources are sampled alike, however many images they have."""

    name: str
    images: list[np.ndarray]


def read_image(data: bytes, suffix: str) -> np.ndarray:
    """RGB uint8 (rows, columns, 3) of a JPEG, PNG, WebP or JPEG XL file's bytes."""
    if suffix == ".jxl":
        import imagecodecs

        image = imagecodecs.jpegxl_decode(data)
    else:
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    if image.ndim != 3 or image.shape[2] < 3 or image.dtype != np.uint8:
        raise ValueError(f"not an RGB uint8 image: {image.shape} {image.dtype}")
    return np.ascontiguousarray(image[..., :3])


def load_sources(path: Path) -> list[Source]:
    """All images of a folder, or of a ``pack`` (.zip), by source: the name up to the last '_'."""
    groups: dict[str, list[np.ndarray]] = {}

    def add(name: str, data: bytes) -> None:
        image = read_image(data, Path(name).suffix)
        if min(image.shape[:2]) >= MINIMUM_SIDE:
            groups.setdefault(Path(name).stem.rsplit("_", 1)[0], []).append(image)

    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as pack:
            for name in sorted(pack.namelist()):
                add(name, pack.read(name))
    else:
        for file in sorted(path.iterdir()):
            if file.suffix in (".jpg", ".png", ".webp", ".jxl"):
                add(file.name, file.read_bytes())
    if not groups:
        raise ValueError(f"no images of at least {MINIMUM_SIDE} pixels in {path}")
    return [Source(name, images) for name, images in sorted(groups.items())]


def write_pack(folder: Path, manifest: Path, out: Path, max_bytes: int) -> int:
    """Pack images as lossless WebP, by the manifest's priority, up to ``max_bytes``."""
    with manifest.open(newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["split"] == "train" and r["priority"]]
    rows.sort(key=lambda r: int(r["priority"]))
    total = count = 0
    with zipfile.ZipFile(out, "x", zipfile.ZIP_STORED) as pack:
        for row in rows:
            file = folder / Path(row["path"]).name
            buffer = io.BytesIO()
            image = Image.fromarray(read_image(file.read_bytes(), file.suffix))
            image.save(buffer, "WEBP", lossless=True, quality=80, method=4)
            data = buffer.getvalue()
            if total + len(data) > max_bytes:
                break
            pack.writestr(file.stem + ".webp", data)
            total, count = total + len(data), count + 1
    return count


class Sampler:
    """Random augmented crops. Deterministic in its seed and the order of calls.

    Flips, quarter turns, 2x area downsampling (removes a JPEG past), stain jitter (a gain and an
    offset per colour in optical density). Sources are weighed by the square root of their area.
    """

    def __init__(self, sources: list[Source], crop: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.crop = crop
        self.images = [image for s in sources for image in s.images]
        weights = []
        for s in sources:
            areas = np.array([i.shape[0] * i.shape[1] for i in s.images], float)
            weights.append(areas.sum() ** 0.5 * areas / areas.sum())
        w = np.concatenate(weights)
        self.weights = w / w.sum()

    def one(self) -> np.ndarray:
        rng, size = self.rng, self.crop
        image = self.images[rng.choice(len(self.images), p=self.weights)]
        half = min(image.shape[:2]) >= 2 * size and rng.random() < 0.4
        side = size * (2 if half else 1)
        y = rng.integers(image.shape[0] - side + 1)
        x = rng.integers(image.shape[1] - side + 1)
        crop = image[y : y + side, x : x + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        crop = np.rot90(crop, rng.integers(4))
        jitter = rng.random() < 0.3
        if not half and not jitter:
            return np.ascontiguousarray(crop)
        real = crop.astype(np.float32)
        if half:
            real = real.reshape(size, 2, size, 2, 3).mean((1, 3))
        if jitter:
            density = -np.log((real + 1) / 256)
            density *= np.exp(rng.normal(0, 0.12, 3)) * np.exp(rng.normal(0, 0.15))
            real = 256 * np.exp(-density - rng.normal(0, 0.02)) - 1
        return np.clip(np.round(real), 0, 255).astype(np.uint8)

    def batch(self, count: int) -> np.ndarray:
        """(count, 3, crop, crop) uint8."""
        return np.stack([self.one() for _ in range(count)]).transpose(0, 3, 1, 2)
