"""Efforts 1 ... 9 of the learned codec: what an encoder tries, for one format and one decoder.

1 and 2 do without the encoder's network; 3, 4 and 5 let it choose hyper-latents; 6 codes a second
time with the decoder's correction in view; 7 ... 9 try other settings at equal quality and keep the
best. docs/models.md has what each costs and saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from wsicodec.bitstream import MAX_TILT
from wsicodec.codec.network import CodedTile, Search, TileEncoder, usual_search
from wsicodec.codec.options import DEFAULT_EFFORT, MAX_EFFORT
from wsicodec.models.decoder import GAINS
from wsicodec.models.encoder import EncoderModel

SHIFT, SCALE = 0.15, 1.25
"""How far other searches move the adaptive step's strength, and the lagrange multiplier."""
SSIM_TILT = 4
"""Less of a tilt gives SSIM next to nothing, and takes 5 % from squared error."""
PROBE = 4
"""Gain indices between the two tiles that tell how bytes and quality rise."""
MOST_GUESSES = 2
"""Gain indices at which a search is tried."""


@dataclass(frozen=True)
class Effort:
    """What an effort tries.

    first: the search that sets the quality. others: searches that are tried at that quality.
    """

    first: Search
    others: tuple[Search, ...] = ()


def effort_of(number: int, tune: str, encoder: EncoderModel) -> Effort:
    """Effort 1 ... 9 of a model; ``tune`` is one of ``TUNES``."""
    plain = _plain(tune, encoder)
    if number <= 2:
        return Effort(replace(plain, hyper=False))
    if number <= DEFAULT_EFFORT:
        return Effort(plain)
    twice = replace(plain, passes=2, aim=0.5)
    return Effort(twice, tuple(_variations(number, twice)) if number > 6 else ())


def _plain(tune: str, encoder: EncoderModel) -> Search:
    """One pass, hyper-latents by the network.

    The encoder's own search stands between the metrics. SSIM of luma alone wants steps that follow
    texture more, and colour coarser; squared error in RGB wants even steps and all of the tilt.
    """
    usual = usual_search(encoder)
    if tune == "ssim":
        strength = min(usual.strength + 0.3, 1.0)
        return replace(usual, strength=strength, rgb=0.0, tilt=min(usual.tilt, SSIM_TILT))
    if tune == "psnr":
        return Search(0.5 * usual.strength, usual.lagrange, rgb=1.0, tilt=MAX_TILT)
    return usual


def _variations(number: int, search: Search) -> Iterator[Search]:
    """Searches around one, more of them by the number: 2, 4 and 8."""
    for shift in (0.0, -SHIFT, SHIFT):
        for scale in (1.0, 1 / SCALE, SCALE):
            moved = (shift != 0.0) + (scale != 1.0)
            if moved == 0 or (shift and number < 8) or (moved == 2 and number < MAX_EFFORT):
                continue
            strength = min(max(search.strength + shift, 0.0), 1.0)
            yield replace(search, strength=strength, lagrange=scale * search.lagrange)


Quality = Callable[[CodedTile], float]
"""What a tile's pixels are worth, in decibels: close to a line over the gain index."""


def encode_best(
    tile: TileEncoder,
    gain: int,
    effort: Effort,
    quality: Quality,
    first: CodedTile | None = None,
    most: int = GAINS - 1,
) -> CodedTile:
    """The tile that costs least at the quality that the first search has at ``gain``.

    first: what the first search gives there, where it is known. most: the finest gain.

    Its quality is never below that one's, and less than a gain index above it. Bytes at equal
    quality come from how bytes and quality of the first search rise with the gain.
    """
    if first is None:
        first = tile.encode(gain, effort.first)
    if not effort.others:
        return first
    wanted = quality(first)
    step = PROBE if gain + PROBE <= most else -PROBE
    probe = tile.encode(gain + step, effort.first)
    rise = (quality(probe) - wanted) / step
    growth = math.log(len(probe.data) / len(first.data)) / step
    if not (math.isfinite(rise) and rise > 0 and growth > 0):
        return first  # exact already, or as good as it can be
    best, least = first, math.log(len(first.data))
    for search in effort.others:
        near, seen = gain, set[int]()
        # where the gain is beside the one that fits, that one too
        while near not in seen and len(seen) < MOST_GUESSES:
            seen.add(near)
            coded = tile.encode(near, search)
            apart = quality(coded) - wanted
            cost = math.log(len(coded.data)) - apart / rise * growth
            if 0 <= apart < rise and cost < least:
                best, least = coded, cost
            near = min(max(math.ceil(near - apart / rise), 0), most)
    return best
