"""One tile of a slide: glass taken out, coded, decoded again, compared, and coded better where it
falls short of the floor.

What is measured is what a reader will get: the stream is decoded as any reader decodes it and
compared with the pixels that were to be coded, without the padding. Where glass was filled, these
are the filled pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

import wsicodec
from wsicodec.bitstream import Mode, Tile
from wsicodec.codec.fidelity import ssim
from wsicodec.convert.plan import ConvertSettings, LevelPlan
from wsicodec.errors import SettingsError, SlideError
from wsicodec.metrics import psnr
from wsicodec.slide.passport import PLAIN_STREAM
from wsicodec.tissue.mask import TissueMask

Image = npt.NDArray[np.uint8]

GLASS = 254
"""Mode of a tile that is glass from edge to edge and shares its level's stream."""
HIGHEST_SSIM, HIGHEST_PSNR = 0.99999, 60.0
"""The highest targets that the learned codec takes."""
MOST_TRIALS = 7
"""Qualities that are tried when a tile falls short: enough to halve 1 ... 100 down to one."""


@dataclass(frozen=True)
class CodedTile:
    """A coded tile. data: None where it is all glass and shares its level's stream.

    mode: value of ``wsicodec.bitstream.Mode``, PLAIN_STREAM or GLASS. quality: 1 ... 100 as it
    was coded, 0 where there is none. psnr, ssim: NaN where not measured; exact pixels have a
    PSNR of infinity.
    """

    level: int
    row: int
    column: int
    data: bytes | None
    mode: int
    quality: int
    psnr: float
    ssim: float


@dataclass(frozen=True)
class _Trial:
    data: bytes
    quality: int
    psnr: float
    ssim: float


@dataclass(frozen=True)
class TileCoder:
    """Codes tiles by the settings. Thread-safe.

    mask: where the tissue is; None keeps every pixel. downsamples: of the levels, by index.
    """

    settings: ConvertSettings
    mask: TissueMask | None = None
    downsamples: Mapping[int, float] = field(default_factory=dict)

    def code(self, level: LevelPlan, row: int, column: int, pixels: Image) -> CodedTile:
        """Code the tile at (row, column). pixels: its own, uint8, cropped to the level.

        Raises SlideError where no quality of the codec reaches the floor.
        """
        size = level.tile_size
        if self.mask is not None:
            y, x = row * size, column * size
            height, width = pixels.shape[:2]
            scale = self.downsamples[level.index]
            if self.mask.all_glass(scale, y, x, height, width):
                data = self.glass_tile
                if self.settings.glass == "drop":
                    nan = math.nan
                    return CodedTile(level.index, row, column, None, GLASS, 0, nan, nan)
                trial = _measured(data, 0, np.full_like(pixels, self.mask.background))
                mode, _ = _mode_of(data)
                return CodedTile(level.index, row, column, data, mode, 0, trial.psnr, trial.ssim)
            else:
                glass = self.mask.glass(scale, y, x, height, width)
                if glass.any():
                    pixels = pixels.copy()
                    pixels[glass] = self.mask.background
        number = row * level.columns + column
        measure = level.measure_every > 0 and number % level.measure_every == 0
        trial = self._coded(padded(pixels, size), pixels, measure)
        mode, coded_quality = _mode_of(trial.data)
        quality = trial.quality if coded_quality is None else coded_quality
        if mode == Mode.CONSTANT:
            quality = 0
        return CodedTile(
            level.index, row, column, trial.data, mode, quality, trial.psnr, trial.ssim
        )

    def try_out(self) -> None:
        """Code a small tile: a missing library or a wrong option shows. Raises what coding does."""
        ramp = np.arange(16 * 16 * 3, dtype=np.uint32).reshape(16, 16, 3)
        quality = None if self.settings.target is not None else self.settings.quality
        self._encode((ramp * 85 // 256).astype(np.uint8), quality)

    @functools.cached_property
    def glass_tile(self) -> bytes:
        """The stream of tiles that are glass from edge to edge: the same for all.

        Without loss where the codec has that: codecs that aim at a PSNR would be far off. Raises
        SlideError where it misses the floor.
        """
        assert self.mask is not None
        size = self.settings.tile_size
        flat = np.empty((size, size, 3), np.uint8)
        flat[:] = self.mask.background
        found = self._exact(flat, flat)
        if found is None:
            found = _measured(self._encode(flat, 100), 100, flat)
        if not self._good(found):
            raise self._out_of_reach()
        return found.data

    def _coded(self, image: Image, original: Image, measure: bool) -> _Trial:
        settings = self.settings
        quality = None if settings.target is not None else settings.quality
        data = self._encode(image, quality)
        known = 0 if settings.fixed_quality is None else settings.quality
        if not (measure or settings.has_floor):
            return _Trial(data, known, math.nan, math.nan)
        trial = _measured(data, known, original)
        return trial if self._good(trial) else self._better(image, original, trial)

    def _good(self, trial: _Trial) -> bool:
        floor_ssim, floor_psnr = self.settings.floor_ssim, self.settings.floor_psnr
        return (floor_ssim is None or trial.ssim >= floor_ssim) and (
            floor_psnr is None or trial.psnr >= floor_psnr
        )

    def _better(self, image: Image, original: Image, first: _Trial) -> _Trial:
        """The smallest tile that reaches the floor among the codec's own higher qualities and, for
        the learned codec, the tile modes that reach any floor: JPEG XL and lossless."""
        lowest = first.quality + 1 if self.settings.target is None else 1
        found = None
        if self.settings.codec == "learned" and not self.settings.lossless:
            found = self._aimed(image, original, first)
        if found is None:
            found = self._lowest(lambda q: self._encode(image, q), original, lowest)
        if self.settings.codec == "learned" and found is None:
            height, width = image.shape[:2]

            def jpegxl(quality: int) -> bytes:
                data = wsicodec.encode(image, codec="jpegxl", quality=quality)
                return Tile(Mode.JPEGXL, height, width, data).pack()

            exact = _measured(wsicodec.encode(image, lossless=True), 0, original)
            found = self._lowest(jpegxl, original, 1)
            if found is None or len(exact.data) <= len(found.data):
                found = exact
        if found is None:
            found = self._exact(image, original)
        if found is None or not self._good(found):
            raise self._out_of_reach()
        return found

    def _out_of_reach(self) -> SlideError:
        settings = self.settings
        floors = (("SSIM", settings.floor_ssim), ("PSNR", settings.floor_psnr))
        wanted = [f"{name} {value:g}" for name, value in floors if value is not None]
        return SlideError(
            f"{settings.codec} does not reach the floor of {' and '.join(wanted)} at any quality; "
            "use learned, jpegxl or lossless"
        )

    def _aimed(self, image: Image, original: Image, first: _Trial) -> _Trial | None:
        """The learned codec's own search for what is missing, three encodes at most; None where the
        tile that it finds is not good: a tile with padding, or of two floors."""
        floor = self.settings.floor_ssim
        if floor is not None and first.ssim < floor:
            target: dict[str, Any] = {"target_ssim": min(floor, HIGHEST_SSIM)}
        elif self.settings.floor_psnr is not None:
            target = {"target_psnr": min(self.settings.floor_psnr, HIGHEST_PSNR)}
        else:
            return None
        data = wsicodec.encode(image, codec="learned", **self._options(), **target)
        found = _measured(data, 0, original)
        return found if self._good(found) else None

    def _lowest(
        self, encode: Callable[[int], bytes], original: Image, lowest: int
    ) -> _Trial | None:
        """The tile of the lowest quality from ``lowest`` on that is good; None without one."""
        low, high, found = lowest, 100, None
        for _ in range(MOST_TRIALS):
            if low > high:
                break
            middle = (low + high) // 2
            trial = _measured(encode(middle), middle, original)
            if self._good(trial):
                found, high = trial, middle - 1
            else:
                low = middle + 1
        return found

    def _exact(self, image: Image, original: Image) -> _Trial | None:
        """The tile without loss, where the codec has that within the same TIFF compression."""
        options = self._options()
        try:
            data = wsicodec.encode(image, codec=self.settings.codec, lossless=True, **options)
        except (SettingsError, TypeError):
            return None
        return _measured(data, 0, original)

    def _encode(self, image: Image, quality: int | None) -> bytes:
        options = self._options()
        if quality is None and self.settings.target is not None:
            options[self.settings.target] = self.settings.options[self.settings.target]
        return wsicodec.encode(image, codec=self.settings.codec, quality=quality, **options)

    def _options(self) -> dict[str, Any]:
        """The codec's options but for a target, which takes the place of quality."""
        options = {k: v for k, v in self.settings.options.items() if k != self.settings.target}
        if self.settings.codec == "learned":
            options["model"] = self.settings.model
        return options


def padded(pixels: Image, size: int) -> Image:
    """Pixels made size x size by repeating the last ones: black would cost bits and bleed."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    return np.pad(pixels, ((0, size - height), (0, size - width), (0, 0)), mode="edge")


def _measured(data: bytes, quality: int, original: Image) -> _Trial:
    height, width = original.shape[:2]
    decoded = np.ascontiguousarray(wsicodec.decode(data)[:height, :width])
    original = np.ascontiguousarray(original)
    return _Trial(data, quality, psnr(original, decoded), ssim(original, decoded))


def _mode_of(data: bytes) -> tuple[int, int | None]:
    """(mode, quality where the tile tells it) of a stream."""
    from wsicodec import bitstream

    if not bitstream.is_tile(data):
        return PLAIN_STREAM, None
    info = wsicodec.probe(data)
    mode = Mode[info.mode.upper()]
    return int(mode), info.quality if mode is Mode.LEARNED else None
