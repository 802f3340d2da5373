"""``wsicodec demo``: the bundled slide in every codec, what it costs, and how it looks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsicodec.cli.common import (
    Exit,
    Subparsers,
    add_command,
    add_jobs,
    print_json,
    print_table,
    progress_bar,
)
from wsicodec.errors import SettingsError, SlideError
from wsicodec.report.text import size_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from wsicodec.metrics import QualitySummary
    from wsicodec.slide.protocol import SlideReader

    Image = npt.NDArray[np.uint8]

DEMO_SLIDE = Path(__file__).parent.parent / "data" / "cmu-1-small-region.svs"
DEMO_CODECS = ("learned", "jpeg", "jpeg2000", "jpegxl", "avif")
_TILE = 256
_CROP = (1010, 820, 256, 256)  # y, x, height, width of level 0: glands, nuclei and stroma
_ZOOM = 2
_GAP = 16  # white columns between the pictures
_SAMPLE = 12  # tiles on which the other codecs' qualities are found


@dataclass(frozen=True)
class DemoRow:
    """One codec's result. coded_bytes: of all tiles. file: None where TIFF has no value for it."""

    codec: str
    quality_setting: int
    coded_bytes: int
    file_bytes: int | None
    file: Path | None
    quality: QualitySummary
    seconds: float

    def as_dict(self, raw: int) -> dict[str, Any]:
        """JSON-ready; files by their names within the folder. raw: bytes of the pixels."""
        return {
            "codec": self.codec,
            "quality_setting": self.quality_setting,
            "coded_bytes": self.coded_bytes,
            "bits_per_pixel": 24 * self.coded_bytes / raw,
            "file": None if self.file is None else self.file.name,
            "file_bytes": self.file_bytes,
            "quality": self.quality.as_dict(),
            "seconds": self.seconds,
        }


def add(commands: Subparsers) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "demo",
        run,
        summary="convert a bundled real slide with every codec and compare sizes and pictures",
        example="wsicodec demo --folder wsicodec-demo",
    )
    parser.add_argument(
        "--folder", default="wsicodec-demo", help="where to write (default: ./wsicodec-demo)"
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=70,
        metavar="N",
        help="1 ... 100, of the first codec; the others take the quality that gives its SSIM "
        "(default: 70)",
    )
    parser.add_argument(
        "--same-number", action="store_true", help="code all with --quality instead"
    )
    parser.add_argument(
        "--codecs",
        default=",".join(DEMO_CODECS),
        help=f"comma-separated (default: {','.join(DEMO_CODECS)})",
    )
    add_jobs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from wsicodec.codec import CODECS
    from wsicodec.metrics import METRIC_ARGUMENTS
    from wsicodec.slide.opening import open_slide

    names = arguments.codecs.split(",")
    for name in names:
        if name not in CODECS:
            raise SettingsError(f"codec {name!r} is none of {', '.join(CODECS)}")
    folder = Path(arguments.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SlideError(f"{folder}: cannot be made: {error.strerror}") from None
    with open_slide(DEMO_SLIDE) as slide:
        first = slide.levels[0]
        raw = first.height * first.width * 3
        with progress_bar("coding", quiet=arguments.json) as bar:
            rows: list[DemoRow] = []
            samples = _samples(slide)
            target = _sample_ssim(samples, names[0], arguments.quality)
            for index, name in enumerate(names):
                if bar is not None:
                    bar(index, len(names), name)
                quality = arguments.quality
                if rows and not arguments.same_number:
                    quality = _matched(samples, name, target)
                rows.append(_row(slide, name, folder, quality, arguments.jobs))
        picture = folder / "compare.png"
        qualities = {row.codec: row.quality_setting for row in rows}
        pictured = [name for name in ("learned", "jpeg") if name in names]
        _write(picture, _compare(slide, {name: qualities[name] for name in pictured}))
        result = {
            "slide": DEMO_SLIDE.name,
            "slide_bytes": slide.info.file_bytes,
            "history": list(slide.info.history),
            "width": first.width,
            "height": first.height,
            "matched": not arguments.same_number,
            "tile": _TILE,
            "metrics": METRIC_ARGUMENTS,
            "picture": {
                "file": picture.name,
                "panels": ["original", *pictured],
                "region": dict(zip(("y", "x", "height", "width"), _CROP, strict=True)),
                "zoom": _ZOOM,
            },
            "codecs": [row.as_dict(raw) for row in rows],
        }
        _write_json(folder / "demo.json", result)
        if arguments.json:
            print_json({"folder": str(folder), **result})
        else:
            _print(result, folder)
            print(f"the same for machines: {folder / 'demo.json'}")
    return Exit.OK


def _samples(slide: SlideReader) -> list[Image]:
    """Tiles spread over the slide, those with the most texture."""
    level = slide.levels[0]
    spots = [
        (y, x)
        for y in range(0, max(1, level.height - _TILE + 1), _TILE)
        for x in range(0, max(1, level.width - _TILE + 1), _TILE)
    ]
    height, width = min(_TILE, level.height), min(_TILE, level.width)
    tiles = [slide.read_region(0, y, x, height, width) for y, x in spots]
    tiles.sort(key=lambda tile: float(tile.std()), reverse=True)
    textured = tiles[: max(1, len(tiles) // 2)]
    return textured[:: max(1, len(textured) // _SAMPLE)]


def _sample_ssim(samples: list[Image], codec: str, quality: int) -> float:
    """Mean SSIM of the samples at a quality."""
    import wsicodec
    from wsicodec.metrics import ssim

    values = [
        ssim(tile, wsicodec.decode(wsicodec.encode(tile, codec=codec, quality=quality)))
        for tile in samples
    ]
    return sum(values) / len(values)


def _matched(samples: list[Image], codec: str, target: float) -> int:
    """Lowest quality at which a codec's samples reach the target SSIM, by bisection."""
    low, high = 1, 100
    while low < high:
        middle = (low + high) // 2
        if _sample_ssim(samples, codec, middle) >= target:
            high = middle
        else:
            low = middle + 1
    return low


def _row(slide: SlideReader, codec: str, folder: Path, quality: int, jobs: int | None) -> DemoRow:
    """Code the whole slide, as a file where TIFF knows the codec, else as tiles alone."""
    from wsicodec.convert import ConvertSettings, convert

    if codec == "avif":
        return _tiles_only(slide, codec, quality, jobs)
    target = folder / f"cmu-1-small-region.{codec}.ome.tiff"
    settings = ConvertSettings(
        codec=codec,
        quality=quality,
        tile_size=_TILE,
        measure="all",
        overwrite=True,
        jobs=jobs,
    )
    report = convert(DEMO_SLIDE, target, settings)
    assert report.quality is not None
    coded = sum(level.coded_bytes for level in report.levels)
    measured = report.quality
    return DemoRow(codec, quality, coded, report.target_bytes, target, measured, report.seconds)


def _tiles_only(slide: SlideReader, codec: str, quality: int, jobs: int | None) -> DemoRow:
    import functools
    import time

    import numpy as np

    import wsicodec
    from wsicodec.convert.ordered import in_order
    from wsicodec.metrics import TileQuality, psnr, ssim, summarise
    from wsicodec.settings import thread_budget

    level = slide.levels[0]

    def code(y: int, x: int) -> tuple[int, TileQuality]:
        height, width = min(_TILE, level.height - y), min(_TILE, level.width - x)
        pixels = slide.read_region(0, y, x, height, width)
        padded = np.pad(pixels, ((0, _TILE - height), (0, _TILE - width), (0, 0)), mode="edge")
        data = wsicodec.encode(padded, codec=codec, quality=quality)
        back = wsicodec.decode(data)[:height, :width]
        return len(data), TileQuality(0, y, x, psnr(pixels, back), ssim(pixels, back))

    tasks: list[Callable[[], tuple[int, TileQuality]]] = [
        functools.partial(code, y, x)
        for y in range(0, level.height, _TILE)
        for x in range(0, level.width, _TILE)
    ]
    started = time.perf_counter()
    workers = jobs or thread_budget()
    with ThreadPoolExecutor(workers) as pool:
        results = list(in_order(pool, tasks, 4 * workers))
    summary = summarise([quality for _, quality in results])
    assert summary is not None
    seconds = time.perf_counter() - started
    size = sum(size for size, _ in results)
    return DemoRow(codec, quality, size, None, None, summary, seconds)


def _compare(slide: SlideReader, qualities: dict[str, int]) -> Image:
    """Original and coded versions of one region side by side, each pixel shown ``_ZOOM`` wide."""
    import numpy as np

    import wsicodec

    original = slide.read_region(0, *_CROP)
    panels = [original]
    for codec, quality in qualities.items():
        panels.append(wsicodec.decode(wsicodec.encode(original, codec=codec, quality=quality)))
    gap = np.full((original.shape[0] * _ZOOM, _GAP, 3), 255, np.uint8)
    parts: list[Image] = []
    for panel in panels:
        parts += [panel.repeat(_ZOOM, axis=0).repeat(_ZOOM, axis=1), gap]
    return np.concatenate(parts[:-1], axis=1)


def _write(path: Path, image: Image) -> None:
    import imagecodecs

    try:
        path.write_bytes(bytes(imagecodecs.png_encode(image)))
    except OSError as error:
        raise SlideError(f"{path}: cannot be written: {error.strerror}") from None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    import json

    try:
        path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise SlideError(f"{path}: cannot be written: {error.strerror}") from None


def _print(result: dict[str, Any], folder: Path) -> None:
    """The result for people."""
    rows = result["codecs"]
    raw = result["width"] * result["height"] * 3
    print(
        f"{result['slide']}: {size_text(result['slide_bytes'])} as it came (with thumbnail, label "
        f"and macro), {size_text(raw)} of pixels"
    )
    jpeg = next((row["coded_bytes"] for row in rows if row["codec"] == "jpeg"), None)
    print_table(
        (
            "codec",
            "quality",
            "file",
            "tiles",
            "bits/px",
            "of JPEG",
            "PSNR",
            "worst",
            "SSIM",
            "worst",
            "s",
        ),
        [
            (
                row["codec"],
                str(row["quality_setting"]),
                "-" if row["file_bytes"] is None else size_text(row["file_bytes"]),
                size_text(row["coded_bytes"]),
                f"{row['bits_per_pixel']:.3f}",
                "-" if jpeg is None else f"{row['coded_bytes'] / jpeg:.0%}",
                f"{row['quality']['psnr_mean']:.2f}",
                f"{row['quality']['psnr_worst']['psnr']:.2f}",
                f"{row['quality']['ssim_mean']:.4f}",
                f"{row['quality']['ssim_worst']['ssim']:.4f}",
                f"{row['seconds']:.1f}",
            )
            for row in rows
        ],
    )
    if result["matched"]:
        print(
            f"quality: of {rows[0]['codec']} as asked, of the others the lowest with its mean SSIM "
            "on textured tiles"
        )
    print("PSNR and SSIM: mean over tiles, and the worst tile; s: coding, decoding and measuring")
    print(
        f"the slide was coded before ({', '.join(result['history'])}), which flatters JPEG: its "
        "blocks are there to be found again"
    )
    picture = result["picture"]
    print(f"picture ({' | '.join(picture['panels'])}): {folder / picture['file']}")
