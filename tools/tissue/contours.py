"""Draws what a method finds, to be looked at: overviews and slides, a PNG each.

    python -m tools.tissue.contours --data ../shared/data --method network --out contours/
    python -m tools.tissue.contours --data ../shared/data --picture docs/tissue.webp

Green: what was found; orange: the mask with its margin.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from scipy import ndimage

from tools.tissue.labels import Image, read_image, table
from wsicodec.errors import WsicodecError
from wsicodec.slide.opening import open_slide
from wsicodec.tissue.finding import DILATION_MICROMETRES, METHODS, tissue_in
from wsicodec.tissue.morphology import dilated
from wsicodec.tissue.overview import MICROMETRES, cell_of, micrometres_per_pixel, read_overview

GREEN, ORANGE = (0, 140, 0), (235, 150, 0)
SHOWN = (  # sources whose licences let a picture be passed on
    ("valis_ihc_002", (0, 0, 504, 512)),
    ("histoqc_pen_002", (0, 0, 1000, 853)),
    ("tupac_pen_004", (0, 18, 527, 396)),
    ("valis_ihc_001", (0, 0, 504, 512)),
    ("histoqc_coverslip_001", (0, 0, 1000, 633)),
    ("tupac_breast_002", (0, 0, 600, 570)),
)


def drawn(image: Image, method: str, side: int, *, cell_um: float = MICROMETRES) -> Image:
    """The overview with contours, enlarged by a whole factor to about ``side`` pixels."""
    found = tissue_in(image, method)
    mask = dilated(found, DILATION_MICROMETRES[method] / cell_um)
    factor = max(1, round(side / max(image.shape[:2])))
    large = image.repeat(factor, 0).repeat(factor, 1)
    for cells, colour in ((mask, ORANGE), (found, GREEN)):
        area = cells.repeat(factor, 0).repeat(factor, 1)
        large[area & ~ndimage.binary_erosion(area, border_value=1)] = colour
    return large


def overviews(folder: Path) -> list[tuple[str, Image]]:
    """All overviews at the scale that their labels have."""
    found = []
    for path in sorted(folder.iterdir()):
        image = read_image(path)
        factor = table()[path.stem].get("scale", 1)
        if factor != 1:
            size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
            image = np.asarray(Picture.fromarray(image).resize(size, Picture.Resampling.BOX))
        found.append((path.stem, image))
    return found


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--method", choices=METHODS, default="network")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.picture:
        _picture(arguments.data / "overviews", arguments.method, arguments.picture)
    if arguments.out is None:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, image in overviews(arguments.data / "overviews"):
        large = drawn(image, arguments.method, 900)
        Picture.fromarray(large).save(arguments.out / f"{name}.png")
    for path in sorted((arguments.data / "slides").iterdir()):
        try:
            with open_slide(path) as slide:
                cell = cell_of(slide.info)
                image = read_overview(slide, cell)
                cell_um = cell * micrometres_per_pixel(slide.info)
        except WsicodecError as error:
            print(f"{path.name}: {error}")
            continue
        large = drawn(image, arguments.method, 900, cell_um=cell_um)
        Picture.fromarray(large).save(arguments.out / f"slide_{path.stem}.png")


def _picture(folder: Path, method: str, target: Path) -> None:
    """Six sections beside each other."""
    sheet = Picture.new("RGB", (3 * 400, 2 * 330), (255, 255, 255))
    for index, (name, box) in enumerate(SHOWN):
        path = next(folder.glob(f"{name}.*"))
        left, top, right, bottom = box
        image = np.ascontiguousarray(read_image(path)[top:bottom, left:right])
        tile = Picture.fromarray(drawn(image, method, 1000))
        tile.thumbnail((396, 326), Picture.Resampling.LANCZOS)
        corner = (index % 3 * 400, index // 3 * 330)
        sheet.paste(tile, corner)
    sheet.save(target, quality=72, method=6)
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
