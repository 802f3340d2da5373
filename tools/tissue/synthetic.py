"""Training crops: real tissue as transmittance, put on glass that never was.

A labelled overview is divided by the colour of its glass. What is left, the share of light that
passes, gets other stains and strengths, and is multiplied with made glass: a colour, uneven light,
stripes, the scanner's tiles. Then comes what lies on slides: pen, dust, fibres, bubbles, edges of
coverslips, shadows, printed marks, parts that were not scanned. Fat, mucus and pale islets are
made, too. Blur, noise and JPEG come last. All of it from one random generator.
"""

from __future__ import annotations

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image as Picture
from PIL import ImageDraw
from scipy import ndimage

from tools.tissue.labels import GLASS, TISSUE, UNSURE, Labelled
from wsicodec.tissue.network import OPAQUE

Floats = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]
Rng = np.random.Generator

PEN_COLOURS = (
    (0.15, 0.62, 0.52), (0.05, 0.35, 0.30), (0.15, 0.35, 0.80), (0.10, 0.12, 0.55),
    (0.80, 0.08, 0.12), (0.06, 0.06, 0.06), (0.30, 0.65, 0.25),
)  # fmt: skip


def crop(
    rng: Rng, sources: dict[str, list[Labelled]], side: int
) -> tuple[Image, Image, tuple[float, float, float]]:
    """An RGB crop (side, side, 3), its label, and what is taken for the colour of its glass.

    Sources are drawn alike, whatever their size.
    """
    passes = np.ones((side, side, 3), np.float32)
    label = np.full((side, side), GLASS, np.uint8)
    kind = rng.random()
    if kind < 0.72:
        passes, label = _cut(rng, _draw(rng, sources), side)
        passes = _restained(rng, passes)
    elif kind < 0.88:
        for _ in range(rng.integers(1, 4)):
            _add_made_tissue(rng, passes, label)
    if rng.random() < 0.3:
        for _ in range(rng.integers(1, 4)):
            _add_islet(rng, passes, label, _draw(rng, sources))
    _doubt_what_cannot_be_seen(passes, label)
    _add_dirt(rng, passes)
    if rng.random() < 0.35:
        for _ in range(rng.integers(1, 3)):
            _add_pen(rng, passes, label)
    # what lets no light through may be ink or silver: the package keeps it by a rule
    label[(passes.max(axis=2) < OPAQUE) & (label == GLASS)] = UNSURE
    field, colour = glass(rng, side)
    light = passes * field
    white = rng.random() < 0.15
    if rng.random() < (0.5 if white else 0.05):
        _unscanned(rng, light, label)
    image, seen_as = _seen(rng, light, colour)
    # the slide's glass is measured, and not without errors; unscanned white may be taken for it
    believed = np.full(3, 255.0) if white else 255 * seen_as * (1 + rng.normal(0, 0.008, 3))
    r, g, b = np.clip(believed, 100, 255)
    return image, label, (float(r), float(g), float(b))


def glass(rng: Rng, side: int) -> tuple[Floats, Floats]:
    """Light of an empty slide, (side, side, 3) of 0 ... 1, and its colour."""
    level = rng.uniform(0.62, 0.82) if rng.random() < 0.25 else rng.uniform(0.84, 1.0)
    tint = rng.normal(0, 0.012 if rng.random() < 0.7 else 0.035, 3)
    colour = np.clip(level * (1 + tint - tint.max() * (level > 0.95)), 0, 1)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    field = np.ones((side, side), np.float32)
    if rng.random() < 0.5:  # uneven light, smooth
        for _ in range(2):
            fx, fy = rng.uniform(-1.2, 1.2, 2)
            wave = np.cos(2 * np.pi * (fx * x + fy * y) + rng.uniform(0, 6.3))
            field += np.float32(rng.uniform(0, 0.035)) * wave
    if rng.random() < 0.3:  # fields of view that darken to their edges
        period = rng.uniform(0.15, 0.8)
        u = ((x + rng.random()) / period) % 1 - 0.5
        v = ((y + rng.random()) / rng.uniform(0.7, 1.4) / period) % 1 - 0.5
        field -= np.float32(rng.uniform(0, 0.12)) * (u**2 + v**2) ** rng.uniform(0.7, 2)
    if rng.random() < 0.3:  # stripes of a line sensor
        bands = np.repeat(rng.normal(0, rng.uniform(0, 0.015), side), rng.integers(1, 24))[:side]
        field *= 1 + (bands[:, None] if rng.random() < 0.5 else bands[None, :]).astype(np.float32)
    if rng.random() < 0.15:  # haze: soft clouds of mounting medium
        field *= 1 - rng.uniform(0.01, 0.06) * _clouds(rng, side, rng.uniform(10, 40))
    colour = colour.astype(np.float32)
    return field[..., None] * colour, colour


def _draw(rng: Rng, sources: dict[str, list[Labelled]]) -> Labelled:
    images = sources[sorted(sources)[rng.integers(len(sources))]]
    return images[rng.integers(len(images))]


def _cut(rng: Rng, item: Labelled, side: int) -> tuple[Floats, Image]:
    """Transmittance and label of a random place, turned and scaled at random."""
    factor = float(np.exp(rng.uniform(np.log(0.55), np.log(1.8))))
    want = max(8, round(side / factor))
    height, width = item.label.shape
    y = rng.integers(min(0, height - want), max(0, height - want) + 1)
    x = rng.integers(min(0, width - want), max(0, width - want) + 1)
    y0, x0 = max(0, y), max(0, x)
    part = item.image[y0 : y + want, x0 : x + want]
    size = (
        min(side, max(1, round(part.shape[1] * factor))),
        min(side, max(1, round(part.shape[0] * factor))),
    )
    method = Picture.Resampling.BOX if factor < 1 else Picture.Resampling.BICUBIC
    seen = np.asarray(Picture.fromarray(part).resize(size, method), np.float32)
    cut_label = item.label[y0 : y + want, x0 : x + want]
    cut_label = np.asarray(Picture.fromarray(cut_label).resize(size, Picture.Resampling.NEAREST))
    passes = np.ones((side, side, 3), np.float32)
    label = np.full((side, side), GLASS, np.uint8)
    top = rng.integers(0, side - size[1] + 1)
    left = rng.integers(0, side - size[0] + 1)
    light = seen / np.array(item.glass, np.float32)
    passes[top : top + size[1], left : left + size[0]] = np.clip(light, 0.004, 1.06)
    label[top : top + size[1], left : left + size[0]] = cut_label
    turns = rng.integers(4)
    passes, label = np.rot90(passes, turns), np.rot90(label, turns)
    if rng.random() < 0.5:
        passes, label = passes[:, ::-1], label[:, ::-1]
    return np.ascontiguousarray(passes), np.ascontiguousarray(label)


def _restained(rng: Rng, passes: Floats) -> Floats:
    """The same tissue in other stains: weaker, stronger, of another colour."""
    density = -np.log(np.maximum(passes, 0.004))
    kind = rng.random()
    if kind < 0.45:  # near what it was
        mix = np.eye(3) + rng.normal(0, 0.08, (3, 3))
    elif kind < 0.75:  # channels change places: brown, blue, green
        mix = np.eye(3)[rng.permutation(3)] * rng.uniform(0.5, 1.4, 3) + rng.normal(0, 0.05, (3, 3))
    else:  # one stain
        colour = rng.uniform(0.25, 1.3, 3)
        mix = np.ones((3, 1)) / 3 * colour[None, :]
    strength = rng.uniform(0.10, 0.45) if rng.random() < 0.35 else rng.uniform(0.5, 1.5)
    stained = density @ (mix * strength).astype(np.float32)
    return np.exp(-np.maximum(stained, -0.05)).astype(np.float32)


def _clouds(rng: Rng, side: int, scale: float) -> Floats:
    """Smooth noise of 0 ... 1."""
    step = max(1, int(scale / 3))  # smooth noise needs few points
    points = -(-side // step) + 1
    coarse = rng.normal(size=(points, points)).astype(np.float32)
    coarse = ndimage.gaussian_filter(coarse, scale / step, mode="wrap")
    picture = Picture.fromarray(coarse).resize((side, side), Picture.Resampling.BILINEAR)
    noise = np.asarray(picture)
    low, high = float(noise.min()), float(noise.max())
    return np.asarray((noise - low) / max(high - low, 1e-6), np.float32)


def _blob(rng: Rng, side: int, radius: float) -> Floats:
    """A soft-edged irregular patch, 0 ... 1, at a random place."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    cy, cx = rng.uniform(0, side, 2)
    stretch = rng.uniform(0.5, 2)
    angle = rng.uniform(0, np.pi)
    u = (np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)) * stretch
    v = (-np.sin(angle) * (x - cx) + np.cos(angle) * (y - cy)) / stretch
    distance = np.sqrt(u**2 + v**2) / radius
    distance += 0.8 * (_clouds(rng, side, max(1.5, radius / 4)) - 0.5)
    return np.clip((1 - distance) * rng.uniform(2, 8), 0, 1)


def _add_islet(rng: Rng, passes: Floats, label: Image, item: Labelled) -> None:
    """A small piece of another section."""
    side = label.shape[0]
    other, other_label = _cut(rng, item, side)
    if not (other_label == TISSUE).any():
        return
    other = _restained(rng, other)
    patch = _blob(rng, side, float(np.exp(rng.uniform(np.log(3), np.log(25)))))
    passes *= 1 - patch[..., None] * (1 - other)
    inside = patch > 0.5
    label[inside & (other_label != GLASS) & (label != TISSUE)] = UNSURE
    label[inside & (other_label == TISSUE)] = TISSUE


def _add_made_tissue(rng: Rng, passes: Floats, label: Image) -> None:
    """Fat (a net of thin walls), mucus (streaky clouds), or pale fine-grained tissue."""
    side = label.shape[0]
    patch = _blob(rng, side, rng.uniform(15, 90))
    inside = patch > 0.4
    colour = rng.dirichlet(np.ones(3) * 4).astype(np.float32) * 3
    kind = rng.integers(3)
    if kind == 0:
        texture = made_fat(rng, side, rng.uniform(4, 14))
        strength = rng.uniform(0.06, 0.4)
        grown = ndimage.uniform_filter((texture > 0.3).astype(np.float32), 5) > 0
        known = inside & grown
    elif kind == 1:
        texture = made_mucus(rng, side)
        strength = rng.uniform(0.05, 0.25)
        known = inside & (texture > 0.15)
    else:
        grain = rng.normal(0.6, rng.uniform(0.1, 0.35), (side, side)).astype(np.float32)
        texture = np.clip(ndimage.gaussian_filter(grain, rng.uniform(0.4, 1.2)), 0, 2)
        texture = texture * (0.6 + 0.8 * _clouds(rng, side, 12))
        strength = rng.uniform(0.04, 0.25)
        known = inside
    density = (patch * texture * strength)[..., None] * colour
    passes *= np.exp(-density)
    label[(density.max(axis=2) > 0.008) & (label == GLASS)] = UNSURE
    label[known & (density.max(axis=2) > 0.015)] = TISSUE


def made_fat(rng: Rng, side: int, cell: float) -> Floats:
    """Walls between cells about ``cell`` pixels wide, 0 ... 1."""
    count = max(3, round((side / cell) ** 2))
    seeds = np.zeros((side, side), np.bool_)
    seeds[rng.integers(0, side, count), rng.integers(0, side, count)] = True
    nearest = ndimage.distance_transform_edt(~seeds, return_distances=False, return_indices=True)
    owner = nearest[0] * side + nearest[1]
    walls = ndimage.maximum_filter(owner, 2) != ndimage.minimum_filter(owner, 2)
    return np.asarray(ndimage.gaussian_filter(walls.astype(np.float32), 0.6), np.float32)


def made_mucus(rng: Rng, side: int) -> Floats:
    """Streaks within clouds, 0 ... 1."""
    streaks = ndimage.gaussian_filter(rng.normal(size=(side, side)), (rng.uniform(0.7, 2), 8))
    streaks = ndimage.rotate(streaks, rng.uniform(0, 180), reshape=False, mode="wrap", order=1)
    streaks = np.abs(streaks) / max(1e-6, float(np.abs(streaks).max()))
    return np.asarray(np.clip(streaks + 0.5 * _clouds(rng, side, 15), 0, 1), np.float32)


def _doubt_what_cannot_be_seen(passes: Floats, label: Image) -> None:
    """Tissue so pale that it is gone is neither right nor wrong."""
    loss = ndimage.uniform_filter(np.abs(1 - passes).max(axis=2), 5)
    label[(label == TISSUE) & (loss < 0.012)] = UNSURE


def _drawn(side: int, points: npt.NDArray[np.float64], width: float, blur: float) -> Floats:
    """A line through points (x, y), 0 ... 1."""
    canvas = Picture.new("L", (side * 2, side * 2))
    pen = ImageDraw.Draw(canvas)
    line = [(float(x) * 2, float(y) * 2) for x, y in points]
    pen.line(line, fill=255, width=max(1, round(width * 2)), joint="curve")
    for x, y in (line[0], line[-1]):
        pen.ellipse([x - width, y - width, x + width, y + width], fill=255)
    small = np.asarray(canvas.resize((side, side), Picture.Resampling.BOX), np.float32) / 255
    return np.asarray(ndimage.gaussian_filter(small, blur), np.float32)


def _walk(rng: Rng, side: int, steps: int, step: float, bend: float) -> npt.NDArray[np.float64]:
    """A smooth random path."""
    turn = np.cumsum(rng.normal(0, bend, steps)) + rng.uniform(0, 6.3)
    turn += np.linspace(0, rng.uniform(-3, 3), steps)
    path = np.cumsum(np.stack([np.cos(turn), np.sin(turn)], 1) * step, axis=0)
    return path + rng.uniform(0, side, 2) - path[steps // 2]


def _add_pen(rng: Rng, passes: Floats, label: Image) -> None:
    """A stroke of a felt pen: glass where it lies on glass, unknown where it hides tissue."""
    side = label.shape[0]
    width = float(np.exp(rng.uniform(np.log(3), np.log(45))))
    path = _walk(rng, side, 40, rng.uniform(2, 9), 0.12)
    shape = _drawn(side, path, width, float(np.exp(rng.uniform(np.log(0.5), np.log(6)))))
    streaks = 1 - rng.uniform(0, 0.5) * _clouds(rng, side, rng.uniform(1.5, 8))
    ink = shape * streaks * rng.uniform(0.5, 1)
    colour = np.clip(
        np.array(PEN_COLOURS[rng.integers(len(PEN_COLOURS))]) + rng.normal(0, 0.06, 3), 0.02, 1
    )
    passes *= np.exp(ink[..., None] * np.log(colour).astype(np.float32))
    label[(ink > 0.35) & (label == TISSUE)] = UNSURE
    near = ndimage.binary_dilation(label != GLASS, iterations=3)
    label[(ink > 0.35) & near & (label == GLASS)] = UNSURE


def _add_dirt(rng: Rng, passes: Floats) -> None:
    """Dust, fibres, bubbles, edges, shadows, printed dots: all of them glass to the label."""
    side = passes.shape[0]
    grey = np.ones((side, side), np.float32)
    if rng.random() < 0.45:
        canvas = Picture.new("L", (side * 2, side * 2))
        pen = ImageDraw.Draw(canvas)
        for _ in range(rng.integers(1, 25)):
            x, y = rng.uniform(0, 2 * side, 2)
            r = rng.uniform(0.4, 2.2)
            pen.ellipse(
                [x - r, y - r * rng.uniform(0.5, 1), x + r, y + r], fill=int(rng.integers(60, 256))
            )
        spots = np.asarray(canvas.resize((side, side), Picture.Resampling.BOX), np.float32) / 255
        grey *= 1 - spots * rng.uniform(0.3, 0.95)
    if rng.random() < 0.25:
        for _ in range(rng.integers(1, 4)):
            path = _walk(rng, side, 25, rng.uniform(0.5, 2), 0.3)
            grey *= 1 - _drawn(side, path, 0.6, 0.4) * rng.uniform(0.2, 0.9)
    if rng.random() < 0.12:  # out of focus: dust on the coverslip
        for _ in range(rng.integers(1, 4)):
            grey *= 1 - _blob(rng, side, rng.uniform(4, 12)) * rng.uniform(0.02, 0.12)
    if rng.random() < 0.08:  # bubbles
        y, x = np.mgrid[0:side, 0:side].astype(np.float32)
        cy, cx, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(5, 60)
        ring = np.exp(-(((np.hypot(y - cy, x - cx) - r) / rng.uniform(0.7, 2)) ** 2))
        grey *= 1 - ring * rng.uniform(0.2, 0.95)
    if rng.random() < 0.12:  # the edge of a coverslip: a dark line, another brightness behind
        path = _walk(rng, side, 60, side / 20, 0.01)
        grey *= 1 - _drawn(side, path, rng.uniform(0.7, 6), rng.uniform(0.3, 2)) * rng.uniform(
            0.2, 0.97
        )
        normal = path[-1] - path[0]
        y, x = np.mgrid[0:side, 0:side]
        behind = (x - path[30, 0]) * normal[1] - (y - path[30, 1]) * normal[0] > 0
        grey *= 1 - behind * np.float32(rng.uniform(0, 0.09))
    if rng.random() < 0.10:  # shadow at a border
        y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
        ramp = np.rot90(x, rng.integers(4))
        grey *= 1 - np.clip(
            (ramp - rng.uniform(0.6, 0.95)) * rng.uniform(1, 8), 0, rng.uniform(0.1, 0.9)
        )
    tint = 1 + rng.normal(0, 0.02, 3).astype(np.float32)
    passes *= grey[..., None] ** tint
    if rng.random() < 0.06:  # printed dots
        pitch, r = rng.uniform(8, 16), rng.uniform(1.5, 3.5)
        y, x = np.mgrid[0:side, 0:side].astype(np.float32)
        band = (y > rng.uniform(0, side)) & (y < rng.uniform(0, side) + 40)
        dots = (
            np.hypot(y % pitch - pitch / 2, (x + (y // pitch) % 2 * pitch / 2) % pitch - pitch / 2)
            < r
        ) & band
        soft = ndimage.gaussian_filter(dots.astype(np.float32), 0.8)
        passes *= 1 - soft[..., None] * rng.uniform(0.1, 0.5, 3).astype(np.float32)


def _unscanned(rng: Rng, light: Floats, label: Image) -> None:
    """White rectangles that no camera saw. (Black ones are known by a rule, not by the network.)"""
    side = label.shape[0]
    cut = rng.integers(side // 8, side * 7 // 8)
    part = slice(0, cut) if rng.random() < 0.5 else slice(cut, None)
    if rng.random() < 0.5:
        light[part], label[part] = 1, GLASS
    else:
        light[:, part], label[:, part] = 1, GLASS


def _seen(rng: Rng, light: Floats, glass: Floats) -> tuple[Image, Floats]:
    """Blur, noise, levels and JPEG of a camera; what becomes of the colour of glass."""
    if rng.random() < 0.3:
        light = ndimage.gaussian_filter(light, (*[rng.uniform(0.3, 1.2)] * 2, 0))
    if rng.random() < 0.5:
        gamma = np.float32(rng.uniform(0.85, 1.2))
        light, glass = np.clip(light, 0, None) ** gamma, glass**gamma
    light = light + rng.normal(0, rng.uniform(0, 0.012), light.shape).astype(np.float32)
    image = np.clip(np.rint(light * 255), 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        coded = imagecodecs.jpeg_encode(image, level=int(rng.integers(30, 96)))
        image = imagecodecs.jpeg_decode(coded)
    return image, glass
