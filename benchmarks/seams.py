"""What the borders of learned tiles look like, and the worst tile of every set.

    python benchmarks/seams.py --images DIR --json OUT [--quality 30 50 70 90] [--picture PNG]

DIR holds images or slides as for ``rate_distortion.py``. Each image is cut into its whole tiles
(of a large one ``--max-tiles`` neighbours, around the middle of the tissue), every tile is coded by
itself, and the decoded tiles are put together again.

Per image and quality:

- border: PSNR of the pixels within 8 pixels of an edge of their tile, less that of all others; the
  squared errors are pooled over the tiles of the image. Negative: borders are worse.
- seam: mean absolute step of luma from one pixel to the next across the edges between tiles, in
  the original and decoded, and as a ratio; ``block`` is the same across the edges of the codec's
  16 x 16 blocks within tiles, ``inside`` across all other lines farther than 8 pixels from a tile's
  edge. ``excess``: how much larger the ratio is at the edges than inside, in per cent. Decoding
  smooths, so that ratios inside are below one: an edge that can be seen is an excess. ``error`` is
  the step of the error alone, which is more sensitive: texture does not cover it.

Means are over the images with at least 2 x 2 whole tiles; if there is none, over all that have the
figure. The worst tile of a set (a file's name up to its last underscore) is that of the lowest SSIM
among all images. ``--picture`` shows these at the quality nearest to 70, original and decoded side
by side: of each tile the square of the lowest SSIM, as large as lets the file be 600 kB.

The JSON file: ``qualities`` {quality: {"border", "seam", "block", "inside": means, "worst_tiles":
{set: tile}}}, ``images`` (every image's figures), ``skipped``, ``contender``, ``machine``,
``versions``, ``command``.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.contenders import Contender, contenders
from benchmarks.curves import mean
from benchmarks.groups import set_name
from benchmarks.images import Block, find_images, load_block
from benchmarks.report import number, table
from wsicodec import metrics
from wsicodec.metrics import Image, Plane

BORDER = 8
"""Pixels no farther than this from an edge of their tile are its border."""
BLOCK = 16
"""Side of the blocks that the codec transforms."""
PICTURE_QUALITY = 70
PICTURE_BYTES = 600_000
PICTURE_SIDES = (256, 224, 192, 160, 144, 128, 112, 96, 80, 64, 48, 32)
PICTURE_COLUMNS = 3


# -- figures -----------------------------------------------------------------------------------


def is_border(rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Which pixels of a tile are its border."""
    inside = np.zeros((rows, columns), bool)
    inside[BORDER : rows - BORDER, BORDER : columns - BORDER] = True
    return ~inside


def border_difference(original: Image, decoded: Image, rows: int, columns: int) -> float:
    """PSNR in dB of the border pixels of all tiles less that of the other pixels.

    Images of whole tiles of ``rows`` x ``columns``. Raises ValueError when these are all border.
    """
    border = is_border(rows, columns)
    if border.all():
        raise ValueError(f"tiles of {rows} x {columns} have no pixel off the border")
    height, width, _ = original.shape
    squares = np.square(original.astype(np.int64) - decoded).sum(2)
    of_place = squares.reshape(height // rows, rows, width // columns, columns).mean((0, 2)) / 3
    return _psnr(of_place[border].mean()) - _psnr(of_place[~border].mean())


def _psnr(square: float) -> float:
    if not square:
        return metrics.PSNR_OF_EQUAL
    return min(10 * math.log10(metrics.DATA_RANGE**2 / square), metrics.PSNR_OF_EQUAL)


Lines = Literal["seam", "block", "inside"]


def step(plane: Plane, rows: int, columns: int, lines: Lines) -> float:
    """Mean absolute step of a plane of whole tiles across the edges between tiles ("seam"), between
    blocks within tiles ("block"), or across the lines away from both ("inside").

    nan where there is no such line.
    """
    total, count = 0.0, 0
    for axis, side in ((0, rows), (1, columns)):
        steps = np.abs(np.diff(plane, axis=axis))
        # step i goes from line i to i + 1: across an edge when that is the first of a tile
        offset = np.arange(1, plane.shape[axis]) % side
        block = (offset % BLOCK == 0) & (offset > 0)
        inside = (offset >= BORDER) & (offset <= side - BORDER) & ~block
        chosen = {"seam": offset == 0, "block": block, "inside": inside}[lines]
        picked = np.compress(chosen, steps, axis)
        total += float(picked.sum())
        count += picked.size
    return total / count if count else math.nan


def step_figures(original: Image, decoded: Image, rows: int, columns: int) -> dict[str, Any]:
    """Steps across tile edges, block edges and inside: by these an edge would be seen.

    {"seam", "block", "inside": {"original", "decoded", "ratio" of the two, "error": the step of
    the error, "excess": per cent by which the ratio is above that inside, "error_excess": the same
    of the step of the error}}. Figures are None where there is no such line or their divisor is 0.
    """
    before, after = metrics.luma(original), metrics.luma(decoded)
    planes = {"original": before, "decoded": after, "error": after - before}
    found: dict[str, dict[str, float | None]] = {}
    for lines in get_args(Lines):
        steps = {name: step(plane, rows, columns, lines) for name, plane in planes.items()}
        figures = {name: None if math.isnan(s) else s for name, s in steps.items()}
        found[lines] = {**figures, "ratio": _ratio(figures["decoded"], figures["original"])}
    for figures in found.values():
        figures["excess"] = _excess(figures["ratio"], found["inside"]["ratio"])
        figures["error_excess"] = _excess(figures["error"], found["inside"]["error"])
    return found


def _ratio(figure: float | None, to: float | None) -> float | None:
    return None if figure is None or not to else figure / to


def _excess(figure: float | None, over: float | None) -> float | None:
    ratio = _ratio(figure, over)
    return None if ratio is None else 100 * (ratio - 1)


# -- coding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodedTile:
    """A tile before and after. y, x: its place in the image; bpp: bits per pixel, all of them."""

    image: str
    y: int
    x: int
    ssim: float
    psnr: float
    bpp: float
    original: Image
    decoded: Image

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without pixels."""
        return {
            "image": self.image,
            "y": self.y,
            "x": self.x,
            "ssim": self.ssim,
            "psnr": self.psnr,
            "bpp": self.bpp,
        }


def code(name: str, block: Block, contender: Contender, quality: int) -> list[CodedTile]:
    """All tiles of a block, coded one by one, row by row."""
    import wsicodec

    coded = []
    for y, x, rows, columns in block.places():
        original = np.ascontiguousarray(block.pixels[y : y + rows, x : x + columns])
        stream = contender.encode(original, quality)
        decoded = wsicodec.decode(stream)
        coded.append(
            CodedTile(
                name,
                block.y + y,
                block.x + x,
                metrics.ssim(original, decoded),
                min(metrics.psnr(original, decoded), metrics.PSNR_OF_EQUAL),
                8 * len(stream) / (rows * columns),
                original,
                decoded,
            )
        )
    return coded


def together(tiles: Sequence[CodedTile], block: Block) -> Image:
    """The decoded tiles as one picture."""
    picture = np.empty_like(block.pixels)
    for tile in tiles:
        y, x = tile.y - block.y, tile.x - block.x
        picture[y : y + block.rows, x : x + block.columns] = tile.decoded
    return picture


# -- report ------------------------------------------------------------------------------------


def run(
    images: Path,
    contender: Contender,
    qualities: Sequence[int],
    *,
    tile: int = 256,
    max_tiles: int = 64,
) -> tuple[dict[str, Any], dict[int, dict[str, CodedTile]]]:
    """The report, and the worst tile of every set by quality.

    Raises ValueError when the folder has no usable image.
    """
    from wsicodec.errors import RuntimeMissingError, SettingsError, UnknownModelError

    root = images if images.is_dir() else images.parent
    found: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    worst: dict[int, dict[str, CodedTile]] = {quality: {} for quality in qualities}
    for file in find_images(images):
        name = file.relative_to(root).as_posix()
        try:
            block = load_block(file, tile, max_tiles)
            found[name] = {"down": block.down, "across": block.across, "qualities": {}}
            for quality in qualities:
                tiles = code(name, block, contender, quality)
                pair = block.pixels, together(tiles, block)
                found[name]["qualities"][quality] = {
                    "border": border_difference(*pair, block.rows, block.columns),
                    **step_figures(*pair, block.rows, block.columns),
                    "ssim": mean(t.ssim for t in tiles),
                    "bpp": mean(t.bpp for t in tiles),
                }
                _keep_worst(worst[quality], tiles)
        except (RuntimeMissingError, SettingsError, UnknownModelError):
            raise  # would be the same for every image
        except Exception as error:
            found.pop(name, None)
            skipped[name] = f"{type(error).__name__}: {error}"
            print(f"{name} skipped: {skipped[name]}", file=sys.stderr)
            continue
        print(f"{name}: {block.down} x {block.across} tiles", file=sys.stderr, flush=True)
    if not found:
        raise ValueError(f"no usable image in {images}: {skipped or 'it holds none'}")
    report = {
        "qualities": {
            quality: {
                **summarise(found, quality),
                "worst_tiles": {
                    name: coded.as_dict() for name, coded in sorted(worst[quality].items())
                },
            }
            for quality in qualities
        },
        "images": found,
        "skipped": skipped,
        "tile": tile,
        "border": BORDER,
        "contender": contender.as_dict(),
        "metrics": metrics.METRIC_ARGUMENTS,
        "machine": record.machine(),
        "versions": record.versions(),
    }
    return report, worst


def _keep_worst(worst: dict[str, CodedTile], tiles: Iterable[CodedTile]) -> None:
    for tile in tiles:
        name = set_name(tile.image)
        if name not in worst or tile.ssim < worst[name].ssim:
            worst[name] = tile


def summarise(images: Mapping[str, Mapping[str, Any]], quality: int) -> dict[str, Any]:
    """Means over images of the figures at one quality, and the images that have the worst.

    Over the images of at least 2 x 2 tiles; if there is none, over all. {"images": how many,
    "whole": whether they have 2 x 2 tiles, "border": {"mean", "worst", "worst_image"}, "seam",
    "block", "inside": means of the figures of ``step_figures``, seam with {"worst", "worst_image"}
    by excess}.
    """
    whole = [name for name, entry in images.items() if min(entry["down"], entry["across"]) >= 2]
    chosen = {name: images[name]["qualities"][quality] for name in whole or images}
    borders = {name: entry["border"] for name, entry in chosen.items()}
    lowest = min(borders, key=lambda name: borders[name])
    result: dict[str, Any] = {
        "images": len(chosen),
        "whole": bool(whole),
        "border": {
            "mean": mean(borders.values()),
            "worst": borders[lowest],
            "worst_image": lowest,
        },
    }
    for lines in get_args(Lines):
        every = [entry[lines] for entry in chosen.values()]
        result[lines] = {key: mean(f[key] for f in every if f[key] is not None) for key in every[0]}
    excesses = {n: e for n, entry in chosen.items() if (e := entry["seam"]["excess"]) is not None}
    highest = max(excesses, key=lambda name: excesses[name], default=None)
    result["seam"]["worst"] = None if highest is None else excesses[highest]
    result["seam"]["worst_image"] = highest
    return result


def summary_text(report: Mapping[str, Any]) -> str:
    """The tables: borders and steps by quality, worst tiles by set."""
    borders, steps, worst = [], [], []
    for quality, entry in report["qualities"].items():
        border, seam = entry["border"], entry["seam"]
        worst_border = f"{number(border['worst'], '+.2f')} {border['worst_image']}"
        worst_seam = f"{number(seam['worst'], '+.1f')} {seam['worst_image'] or ''}"
        borders.append([str(quality), number(border["mean"], "+.2f"), worst_border, worst_seam])
        for lines in get_args(Lines):
            figures = entry[lines]
            steps.append(
                [
                    f"{lines} at {quality}",
                    *(number(figures[key], ".2f") for key in ("original", "decoded")),
                    number(figures["ratio"]),
                    number(figures["excess"], "+.1f"),
                    number(figures["error"], ".2f"),
                    number(figures["error_excess"], "+.1f"),
                ]
            )
        for name, tile in entry["worst_tiles"].items():
            place = f"{tile['y']}, {tile['x']}"
            figures = [number(tile[key], f) for key, f in (("ssim", ".4f"), ("psnr", ".2f"))]
            worst.append(
                [f"{name} at {quality}", tile["image"], place, *figures, number(tile["bpp"])]
            )
    first = next(iter(report["qualities"].values()))
    over = "at least 2 x 2 whole tiles" if first["whole"] else "any number of tiles, none has 2 x 2"
    parts = [
        f"{first['images']} of {len(report['images'])} images, those of {over} of "
        f"{report['tile']} pixels",
        "PSNR of borders less that of the rest in dB; worst excess of steps at seams in %\n"
        + table(["quality", "mean", "worst image", "worst seams"], borders),
        "mean absolute step of luma across lines\n"
        + table(
            ["", "original", "decoded", "ratio", "excess, %", "error", "error's excess, %"], steps
        ),
        "worst tile of every set\n"
        + table(["set at quality", "image", "y, x", "SSIM", "PSNR", "bits/px"], worst),
    ]
    return "\n\n".join(parts)


# -- picture -----------------------------------------------------------------------------------


def worst_place(tile: CodedTile, side: int) -> tuple[int, int, int, int]:
    """(y, x, rows, columns) of the square of the lowest SSIM, ``side`` wide or as the tile is."""
    height, width, _ = tile.original.shape
    rows, columns = min(side, height), min(side, width)
    places = [
        (y, x, rows, columns)
        for y in range(0, height - rows + 1, 16)
        for x in range(0, width - columns + 1, 16)
    ]

    def similarity(place: tuple[int, int, int, int]) -> float:
        y, x, rows, columns = place
        here = np.s_[y : y + rows, x : x + columns]
        return metrics.ssim(tile.original[here], tile.decoded[here])

    return min(places, key=similarity) if len(places) > 1 else places[0]


def picture(worst: Mapping[str, CodedTile], title: str) -> bytes:
    """A PNG with original and decoded part of every set's worst tile, captioned."""
    for side in PICTURE_SIDES:
        data = _sheet(worst, title, side)
        if len(data) <= PICTURE_BYTES:
            break
    return data


def _sheet(worst: Mapping[str, CodedTile], title: str, side: int) -> bytes:
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    gap, line = 4, 14
    pair = max(2 * side + gap, 230)  # captions need the width
    high = side + 3 * line + 2 * gap
    columns = min(PICTURE_COLUMNS, len(worst))
    down = -(-len(worst) // columns)
    sheet = Pillow.new("RGB", (columns * (pair + 2 * gap), down * high + 2 * line), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title, "black", font)
    for i, (_, tile) in enumerate(sorted(worst.items())):
        top, left = 2 * line + i // columns * high, gap + i % columns * (pair + 2 * gap)
        y, x, rows, wide = worst_place(tile, side)
        captions = (
            tile.image,
            f"y {tile.y + y}, x {tile.x + x}: original | decoded",
            f"tile: SSIM {tile.ssim:.3f}, {tile.psnr:.1f} dB, {tile.bpp:.2f} bits/px",
        )
        for j, caption in enumerate(captions):
            draw.text((left, top + j * line), caption, "black", font)
        for j, pixels in enumerate((tile.original, tile.decoded)):
            part = Pillow.fromarray(np.ascontiguousarray(pixels[y : y + rows, x : x + wide]))
            sheet.paste(part, (left + j * (side + gap), top + 3 * line))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


# -- command -----------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Borders of learned tiles, seams between them, and the worst tiles.",
        epilog="example: python benchmarks/seams.py --images ../shared/data/val "
        "--json seams.json --picture worst.png",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of images or slides")
    parser.add_argument("--json", type=Path, required=True, help="where to write the report")
    parser.add_argument(
        "--quality", type=int, nargs="+", default=[30, 50, 70, 90], help="30 50 70 90"
    )
    parser.add_argument("--model", help="learned model; default: the default one")
    parser.add_argument("--tile", type=int, default=256, help="tile side in pixels (256)")
    parser.add_argument(
        "--max-tiles", type=int, default=64, help="tiles taken of one image or slide (64)"
    )
    parser.add_argument("--picture", type=Path, help="PNG of the worst tiles, at most 600 kB")
    options = parser.parse_args(arguments)
    if not 32 <= options.tile <= 4096:
        parser.error("--tile must be 32 ... 4096")
    if not all(1 <= quality <= 100 for quality in options.quality):
        parser.error("--quality must be 1 ... 100")
    if options.max_tiles < 1:
        parser.error("--max-tiles must be positive")
    if not options.images.exists():
        parser.error(f"--images {options.images} does not exist")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    model = options.model
    if model is None:
        from wsicodec.codec import DEFAULT_MODEL

        model = DEFAULT_MODEL
    contender = contenders(["learned"], [model])["learned"]
    qualities = sorted(set(options.quality))
    report, worst = run(
        options.images, contender, qualities, tile=options.tile, max_tiles=options.max_tiles
    )
    record.write(report, options.json, sys.argv if arguments is None else arguments)
    print(f"\n{summary_text(report)}")
    if options.picture:
        nearest = min(qualities, key=lambda quality: abs(quality - PICTURE_QUALITY))
        title = f"{model}, quality {nearest}: worst tile of every set"
        options.picture.write_bytes(picture(worst[nearest], title))


if __name__ == "__main__":
    main()
