"""The section of maps: the slide, and each figure tile by tile."""

from __future__ import annotations

import math

import numpy as np

from wsicodec.report import maps, pictures
from wsicodec.report.findings import Findings
from wsicodec.report.markup import MODE_NAMES, escaped, legend, rgb
from wsicodec.report.text import count_text, share_text
from wsicodec.slide.passport import LevelMap
from wsicodec.slide.protocol import Level

OVERVIEW_BYTES = 200_000
MAX_MAPPED = 6
"""Levels with maps; those beyond have a handful of tiles."""


def map_section(findings: Findings) -> str:
    """The slide, and a map of each figure, level by level."""
    if findings.passport is None:
        return _slide_alone(findings)
    passport, info = findings.passport, findings.info
    contour = ""
    if passport.mask is not None:
        found = maps.outline(passport.mask)
        first = info.levels[0]
        width, height = first.width / found.cell, first.height / found.cell
        contour = (
            '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
            f'<symbol id="tissue" viewBox="0 0 {width:.3f} {height:.3f}" '
            'preserveAspectRatio="none">'
            f'<path class="halo" d="{found.path}"/><path class="contour" d="{found.path}"/>'
            "</symbol></defs></svg>"
        )
    drawn = [
        _level_maps(findings, level, maps_of)
        for level, maps_of in zip(info.levels[:MAX_MAPPED], passport.levels, strict=False)
    ]
    lead = "Every square is one tile. The brightest colours are the tiles to look at first."
    if contour:
        lead += " The line is the border between tissue and glass, as the conversion saw it."
    rest = "".join(
        f"<details><summary>Maps of level {level.index}, {count_text(level.width)} × "
        f'{count_text(level.height)} px</summary><div class="maps">{figures}</div></details>'
        for level, figures in zip(info.levels[1:MAX_MAPPED], drawn[1:], strict=True)
        if figures
    )
    return (
        f'<section><h2>Where on the slide</h2><p class="lead">{lead}</p>{contour}'
        f'<div class="maps">{_slide(findings)}{drawn[0]}</div>{rest}</section>'
    )


def _slide_alone(findings: Findings) -> str:
    figure = _slide(findings)
    return f'<section><h2>The slide</h2><div class="maps">{figure}</div></section>'


def _frame(level: Level, inside: str, findings: Findings) -> str:
    """A box of the slide's shape; maps reach beyond it as the last tiles do."""
    contour = ""
    if findings.passport is not None and findings.passport.mask is not None:
        contour = '<svg aria-hidden="true"><use href="#tissue" width="100%" height="100%"/></svg>'
    return (
        f'<div class="slide" style="aspect-ratio:{level.width}/{level.height}">'
        f"{inside}{contour}</div>"
    )


def _slide(findings: Findings) -> str:
    first = findings.info.levels[0]
    if findings.overview is None:
        why = escaped(findings.no_overview or "")
        inside = f'<p style="padding:12px;color:#333">No picture: {why}</p>'
        return f"<figure>{_frame(first, inside, findings)}<figcaption>{why}</figcaption></figure>"
    image = pictures.photograph(findings.overview, OVERVIEW_BYTES)
    inside = f'<img src="{image}" alt="The whole slide" style="width:100%;height:100%">'
    spots, caption = "", "<b>The slide</b>"
    if findings.worst is not None and findings.worst.tiles:
        spots = _spots(findings)
        caption += "<br>Numbers: the worst tiles, shown below"
    return (
        f"<figure>{_frame(first, inside + spots, findings)}<figcaption>{caption}</figcaption>"
        "</figure>"
    )


def _spots(findings: Findings) -> str:
    """The worst tiles, numbered, as an SVG over the slide."""
    first = findings.info.levels[0]
    assert findings.worst is not None
    # 1000 units across, so that discs and digits keep their size
    unit = 1000 / max(first.width, first.height)
    parts = []
    for rank, tile in reversed(list(enumerate(findings.worst.tiles, 1))):
        scale = findings.info.levels[tile.level].downsample * unit
        x, y = tile.x * scale, tile.y * scale
        width, height = tile.width * scale, tile.height * scale
        cx, cy = x + width / 2, y + height / 2
        parts.append(
            f'<rect class="spot" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"/><circle class="spotdisc" cx="{cx:.1f}" cy="{cy:.1f}" r="24"/>'
            f'<text class="spotted" style="font-size:30px" x="{cx:.1f}" y="{cy + 11:.1f}">{rank}'
            "</text>"
        )
    box = f"0 0 {first.width * unit:.1f} {first.height * unit:.1f}"
    return (
        f'<svg viewBox="{box}" role="img" aria-label="Places of the worst tiles">'
        f"{''.join(parts)}</svg>"
    )


def _level_maps(findings: Findings, level: Level, found: LevelMap) -> str:
    """Figures with the maps of one level."""
    floor = None if findings.info.record is None else findings.info.record.floor
    below = found.below(floor)
    figures = []
    for title, unit, values, bright_high, limit in (
        ("SSIM", "", found.ssim, False, 1.0),
        ("PSNR", " dB", found.psnr, False, math.inf),
        ("Bits per pixel", "", bpp_grid(level, found), True, math.inf),
    ):
        scale = maps.scale_of(values, bright_high=bright_high, limit=limit)
        if scale is None:
            if bool(np.isinf(values).any()):
                figures.append(
                    f"<figure><figcaption><b>{title}</b><br>Every measured tile is identical to "
                    "its source.</figcaption></figure>"
                )
            continue
        factor = maps.pooling(*values.shape)
        missed = below if title != "Bits per pixel" and below.any() else None
        image = maps.heat_map(values, scale, missed, factor)
        keys = _heat_keys(values, missed, title == "Bits per pixel")
        figures.append(
            _map_figure(
                findings,
                level,
                image,
                factor,
                f"{title} by tile",
                f"<b>{title}</b>{_pooled_text(factor, 'the brightest')}",
                _ramp(scale, values, unit) + keys,
            )
        )
    figures.append(_mode_figure(findings, level, found))
    return "".join(figures)


def _mode_figure(findings: Findings, level: Level, found: LevelMap) -> str:
    """The map of modes, or words alone where all tiles are of one kind."""
    title, keys = "<b>How each tile is coded</b>", _mode_keys(found)
    shared = found.bytes == 0
    if not shared.any() and (found.mode == found.mode[0, 0]).all():
        return f"<figure><figcaption>{title}</figcaption>{keys}</figure>"
    factor = maps.pooling(found.rows, found.columns)
    return _map_figure(
        findings,
        level,
        maps.mode_map(found.mode, found.bytes, factor),
        factor,
        "Mode by tile",
        f"{title}{_pooled_text(factor, 'the rarest')}",
        keys,
    )


def bpp_grid(level: Level, found: LevelMap) -> maps.Values:
    """(rows, columns) bits per pixel, padding not counted; NaN for tiles without own stream."""
    heights = np.full(found.rows, level.tile_height, np.float64)
    heights[-1] = level.height - (found.rows - 1) * level.tile_height
    widths = np.full(found.columns, level.tile_width, np.float64)
    widths[-1] = level.width - (found.columns - 1) * level.tile_width
    bpp = 8 * found.bytes / (heights[:, None] * widths)
    return np.where(found.bytes == 0, np.nan, bpp)


def _pooled_text(factor: int, which: str) -> str:
    return f"<br>{which.capitalize()} of {factor} × {factor} tiles" if factor > 1 else ""


def _map_figure(
    findings: Findings,
    level: Level,
    image: maps.Image,
    factor: int,
    alt: str,
    caption: str,
    legend: str,
) -> str:
    # the last tiles reach beyond the slide, and so does their map
    width = 100 * image.shape[1] * factor * level.tile_width / level.width
    height = 100 * image.shape[0] * factor * level.tile_height / level.height
    inside = (
        f'<img class="grid-map" src="{pictures.drawing(image)}" alt="{alt}" '
        f'style="width:{width:.3f}%;height:{height:.3f}%">'
    )
    return (
        f"<figure>{_frame(level, inside, findings)}<figcaption>{caption}</figcaption>{legend}"
        "</figure>"
    )


def _ramp(scale: maps.Scale, values: maps.Values, unit: str) -> str:
    """The scale's colours between its ends; marked where values go beyond an end."""
    under = "≤ " if (values < scale.low).any() else ""
    over = "≥ " if (values > scale.high).any() else ""
    stops = ",".join(rgb(colour) for colour in scale.palette()[:: maps.COLOURS // 16])
    low, high = (_short(value) for value in (scale.low, scale.high))
    return (
        f'<div class="ramp"><span>{under}{low}{unit}</span>'
        f'<i style="background:linear-gradient(90deg,{stops})"></i>'
        f"<span>{over}{high}{unit}</span></div>"
    )


def _heat_keys(values: maps.Values, below: maps.Grid | None, by_length: bool) -> str:
    keys = []
    if below is not None:
        keys.append((maps.BELOW, "below the floor"))
    if np.isnan(values).any():
        keys.append((maps.UNKNOWN, "glass, stored once" if by_length else "not measured"))
    return legend((rgb(colour), text) for colour, text in keys)


def _mode_keys(found: LevelMap) -> str:
    kinds = found.mode.astype(np.int16)
    kinds[found.bytes == 0] = maps.SHARED_GLASS
    values, counts = np.unique(kinds, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return legend(
        (
            rgb(maps.MODE_COLOURS[int(values[at])]),
            f"{MODE_NAMES[int(values[at])]} {share_text(counts[at] / found.tiles)}",
        )
        for at in order
    )


def _short(value: float) -> str:
    return f"{value:.4g}"
