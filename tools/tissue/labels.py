"""Labels of the overviews: where four classical methods agree, corrected by ``labels.json``.

The methods: colour cast (Otsu), absorbance (Otsu), local texture, distance from the colour of the
glass. Three votes of four make tissue, one or none makes glass, two are left out of training and
figures. The table holds, per image, what was changed after looking at the contours:

- ``use``: ``train``, ``held`` (for the figures only) or ``no``; ``source`` says where it is from
- ``scale``: factor to about 8 µm per pixel, as far as known
- ``votes``: votes that make tissue, if not 3; ``floor``: factor on all thresholds, if not 1
- ``glass_colour``: RGB of the glass where it is not found by itself
- ``glass``, ``tissue``, ``unsure``: polygons [[x, y], ...] in pixels of the image, painted in the
  order unsure, tissue, glass
- ``dots``: rings [outer, inner] of two boxes [x0, y0, x1, y1] between which islets below 130
  pixels are printed marks, not tissue; ``speck``: islets below so many pixels are left out
- ``pen``: colours of pen (``green``, ``blue``, ``red``, ``black``) that are not tissue; where pen
  lies next to tissue it is left out

    python -m tools.tissue.labels --data ../shared/data --sheets /tmp/sheets   # contours to look at
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image as Picture
from PIL import ImageDraw
from scipy import ndimage

from wsicodec.tissue.classical import glass_colour, otsu_threshold

TABLE = Path(__file__).parent / "labels.json"
GLASS, TISSUE, UNSURE = 0, 1, 255

Image = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Labelled:
    """An overview at about 8 µm per pixel. image: uint8 RGB; label: GLASS, TISSUE or UNSURE."""

    name: str
    use: str
    source: str
    image: Image
    label: Image
    glass: tuple[int, int, int]


def table() -> dict[str, dict[str, Any]]:
    """Entries of ``labels.json`` by image name."""
    entries: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())["images"]
    return entries


def read_image(path: Path) -> Image:
    """RGB of a JPEG or JPEG XL file."""
    data = path.read_bytes()
    decode = imagecodecs.jpegxl_decode if path.suffix == ".jxl" else imagecodecs.jpeg_decode
    return np.ascontiguousarray(decode(data)[..., :3])


def load(folder: Path, *uses: str) -> list[Labelled]:
    """Labelled overviews of a data folder, in the order of their names."""
    chosen = [name for name, entry in sorted(table().items()) if entry["use"] in uses]
    return [load_one(folder, name) for name in chosen]


def load_one(folder: Path, name: str) -> Labelled:
    """One labelled overview by its name."""
    entry = table()[name]
    path = next(p for p in (folder / f"{name}.jxl", folder / f"{name}.jpg") if p.is_file())
    image = read_image(path)
    glass = _glass_of(image, entry)
    label = label_of(image, entry)
    factor = entry.get("scale", 1)
    if factor != 1:
        image, label = _rescaled(image, label, factor)
    return Labelled(name, entry["use"], entry["source"], image, label, glass)


def label_of(image: Image, entry: dict[str, Any]) -> Image:
    """uint8 (rows, columns) of GLASS, TISSUE, UNSURE; the same size as the image."""
    votes = sum(v.astype(np.uint8) for v in methods(image, _glass_of(image, entry), entry))
    least = entry.get("votes", 3)
    tissue = _tidy(votes >= least, fill=entry.get("fill", 60))
    maybe = ndimage.binary_dilation(votes >= max(1, least - 1)) | ndimage.binary_dilation(tissue)
    label = np.where(tissue, TISSUE, np.where(maybe, UNSURE, GLASS)).astype(np.uint8)
    for outer, inner in entry.get("dots", ()):
        ring = np.zeros(label.shape, np.bool_)
        ring[outer[1] : outer[3], outer[0] : outer[2]] = True
        ring[inner[1] : inner[3], inner[0] : inner[2]] = False
        large = (label == TISSUE) & ~_islets(label == TISSUE, 130)
        label[ring & ~ndimage.binary_dilation(large, iterations=3)] = GLASS
    if speck := entry.get("speck"):
        label[_islets(label == TISSUE, speck)] = UNSURE
    for value, key in ((UNSURE, "unsure"), (TISSUE, "tissue"), (GLASS, "glass")):
        for polygon in entry.get(key, ()):
            label[_inside(polygon, image.shape[:2])] = value
    if pens := entry.get("pen"):
        _clear_pen(label, image, pens)
    return label


def methods(image: Image, glass: tuple[int, int, int], entry: dict[str, Any]) -> list[Bools]:
    """What each classical method takes for tissue."""
    floor = entry.get("floor", 1.0)
    light = np.clip(image.astype(np.float64) / np.array(glass, np.float64), 1 / 255, 1.15)
    smooth = ndimage.gaussian_filter(light, (0.7, 0.7, 0))
    cast = 255 * (smooth.max(axis=2) - smooth.min(axis=2))
    absorbance = np.clip(-np.log(np.minimum(smooth, 1)).mean(axis=2), 0, 1.5)
    luma = 255 * smooth @ np.array([0.299, 0.587, 0.114])
    mean = ndimage.uniform_filter(luma, 5)
    texture = np.sqrt(np.maximum(ndimage.uniform_filter(luma**2, 5) - mean**2, 0))
    distance = 255 * np.sqrt(((smooth - 1) ** 2).sum(axis=2))
    return [
        cast >= floor * np.clip(0.5 * _otsu(cast, 255), 7, 20),
        absorbance >= floor * np.clip(0.4 * _otsu(absorbance, 1.5), 0.03, 0.08),
        ndimage.uniform_filter(texture, 3) >= floor * 4.0,
        distance >= floor * np.clip(0.4 * _otsu(distance, 400), 12, 30),
    ]


def _otsu(values: npt.NDArray[np.float64], top: float) -> float:
    histogram = np.histogram(values, 256, (0, top))[0].astype(np.float64)
    return otsu_threshold(histogram) * top / 256


def _glass_of(image: Image, entry: dict[str, Any]) -> tuple[int, int, int]:
    if given := entry.get("glass_colour"):
        return (given[0], given[1], given[2])
    return glass_colour(image, np.ones(image.shape[:2], np.bool_)) or (245, 245, 245)


def _tidy(tissue: Bools, fill: int) -> Bools:
    """Without specks below 10 pixels, holes below ``fill`` pixels closed."""
    for value, least in ((True, 10), (False, fill)):
        labels, count = ndimage.label(tissue == value)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        tissue = np.where((labels > 0) & (sizes[labels] < least), not value, tissue)
    return tissue


def _islets(where: Bools, below: int) -> Bools:
    """Connected parts with fewer pixels than that."""
    labels, count = ndimage.label(where)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return np.asarray((labels > 0) & (sizes[labels] < below))


def _inside(polygon: list[list[int]], shape: tuple[int, int]) -> Bools:
    canvas = Picture.new("1", (shape[1], shape[0]))
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in polygon], fill=1)
    return np.asarray(canvas)


def pen_pixels(image: Image, pens: list[str]) -> Bools:
    """Pixels of these colours of pen."""
    r, g, b = (image[..., c].astype(np.int16) for c in range(3))
    rules = {
        "green": (g > r + 12) & (g > b - 25) & (b > r),
        "blue": (b > r + 50) & (b > g + 25) & (g > r),
        "red": (r > 120) & (g < 70) & (b < 90) & (r > g + 80),
        "black": (np.maximum(np.maximum(r, g), b) < 90)
        & (np.abs(r - g) < 25)
        & (np.abs(g - b) < 25),
    }
    found = np.zeros(image.shape[:2], np.bool_)
    for pen in pens:
        found |= rules[pen]
    labels, count = ndimage.label(ndimage.binary_closing(found, iterations=2))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return np.asarray(ndimage.binary_dilation((labels > 0) & (sizes[labels] >= 25), iterations=3))


def _clear_pen(label: Image, image: Image, pens: list[str]) -> None:
    """Pen becomes glass, but for what lies next to tissue: there nobody knows."""
    pen = pen_pixels(image, pens)
    tissue = _tidy((label == TISSUE) & ~pen, fill=0)
    near = ndimage.binary_dilation(tissue, iterations=12)
    label[pen] = np.where(near[pen], UNSURE, GLASS)


def _rescaled(image: Image, label: Image, factor: float) -> tuple[Image, Image]:
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    kind = Picture.Resampling.BOX if factor < 1 else Picture.Resampling.BICUBIC
    small = np.asarray(Picture.fromarray(image).resize(size, kind))
    # shares of tissue and of glass: a pixel that holds some of either keeps what it surely is
    tissue = _share(label == TISSUE, size)
    unsure = _share(label == UNSURE, size)
    out = np.where(tissue >= 0.5, TISSUE, np.where(tissue + unsure > 0.02, UNSURE, GLASS))
    return small, out.astype(np.uint8)


def _share(where: Bools, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    picture = Picture.fromarray(where.astype(np.float32))
    return np.asarray(picture.resize(size, Picture.Resampling.BOX))


def contoured(image: Image, label: Image, side: int = 900) -> Image:
    """The image with tissue outlined in green and what is left out in yellow, enlarged."""
    factor = max(1, side // max(image.shape[:2]))
    image = image.repeat(factor, 0).repeat(factor, 1).copy()
    label = label.repeat(factor, 0).repeat(factor, 1)
    for value, colour in ((UNSURE, (230, 190, 0)), (TISSUE, (0, 150, 0))):
        inside = label == value
        image[inside & ~ndimage.binary_erosion(inside, border_value=1)] = colour
    return image


def main() -> None:
    """Write the contours of all images for looking at."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sheets", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.sheets.mkdir(parents=True, exist_ok=True)
    for item in load(arguments.data / "overviews", "train", "held"):
        picture = Picture.fromarray(contoured(item.image, item.label))
        picture.save(arguments.sheets / f"{item.name}.png")
        print(f"{item.name:28} {item.use:6} tissue {(item.label == TISSUE).mean():.3f} "
              f"unsure {(item.label == UNSURE).mean():.3f} glass colour {item.glass}")  # fmt: skip


if __name__ == "__main__":
    main()
