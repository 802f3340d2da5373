"""The section of the worst tiles, beside their source where it is given."""

from __future__ import annotations

import math

from wsicodec.bitstream import Mode
from wsicodec.report import pictures
from wsicodec.report.figures import TileFigures
from wsicodec.report.findings import Findings, TilePicture
from wsicodec.report.markup import MODE_NAMES, escaped
from wsicodec.report.text import count_text, psnr_text, ssim_text


def closeup_section(findings: Findings, picture_bytes: int) -> str:
    worst = findings.worst
    if worst is None or not worst.tiles:
        return ""
    lead = f"By {worst.by}, of all levels."
    if worst.glass is not None:
        value = ssim_text(worst.glass.ssim) if worst.by == "SSIM" else psnr_text(worst.glass.psnr)
        lead += (
            " Tiles of glass alone are left out unless they miss the floor; the worst of them has "
            f"{worst.by} {value}."
        )
    lead += " " + _source_text(findings)
    glass = None if findings.info.record is None else findings.info.record.glass
    if findings.source is not None and glass is not None and glass.mode != "keep":
        lead += (
            " Glass was made one colour before coding: differences there are meant, and not part "
            "of the figures."
        )
    tiles = "".join(
        _tile(findings, rank, picture, picture_bytes)
        for rank, picture in enumerate(findings.pictures, 1)
    )
    count = len(worst.tiles)
    title = f"The {count} worst tiles" if count > 1 else "The worst tile"
    return (
        f'<section><h2>{title}</h2><p class="lead">{lead}</p>'
        f'<div class="{"worst alone" if findings.source is None else "worst"}">{tiles}</div>'
        "</section>"
    )


def _source_text(findings: Findings) -> str:
    source = findings.source
    if source is None:
        return (
            "With <code>--against SOURCE</code> the report shows them beside the pixels that they "
            "were coded from."
        )
    if source.same:
        return "The source shown is the one that the file names: its SHA-256 is the same."
    if source.same is None:
        return (
            "The file names no source, so nothing shows that the slide beside it is the one that "
            "it was made from, except that its size is the same."
        )
    return (
        "<b>The source shown is not the file that this one was made from: its SHA-256 is another."
        "</b>"
    )


def _tile(findings: Findings, rank: int, picture: TilePicture, limit: int) -> str:
    tile = picture.tile
    facts = [
        ("Level", str(tile.level)),
        ("Row, column", f"{tile.row}, {tile.column}"),
        ("y, x (px)", f"{count_text(tile.y)}, {count_text(tile.x)}"),
        ("Height, width", f"{tile.height}, {tile.width}"),
        ("SSIM", ssim_text(tile.ssim)),
        ("PSNR", psnr_text(tile.psnr) + ("" if math.isinf(tile.psnr) else " dB")),
        ("Coded as", _tile_mode(tile)),
        ("Quality", "–" if tile.quality is None else str(tile.quality)),
        ("Size", f"{count_text(tile.length)} B"),
        ("Bits per pixel", f"{tile.bpp:.2f}"),
    ]
    by_psnr = findings.worst is not None and findings.worst.by == "PSNR"
    headline = " ".join(facts.pop(5 if by_psnr else 4))
    rows = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in facts)
    tags = ""
    if tile.below_floor:
        tags += ' <span class="tag bad-tag">below the floor</span>'
    if tile.tissue is False:
        tags += ' <span class="tag">glass</span>'
    return (
        f'<article class="tile"><div><h3><span class="rank">{rank}</span>'
        f"{headline}</h3>{tags}<dl>{rows}</dl></div>"
        f'<div class="trio">{_trio(findings, picture, limit)}</div></article>'
    )


def _tile_mode(tile: TileFigures) -> str:
    if tile.mode == "plain":
        return "the file's codec"
    return MODE_NAMES[Mode[tile.mode.upper()]]


def _trio(findings: Findings, picture: TilePicture, limit: int) -> str:
    ours, source = picture.ours, picture.source
    figures = []
    if source is not None:
        figures.append(_photo(source, "Source", limit))
    if ours is not None:
        figures.append(_photo(ours, "This file", limit))
    if ours is not None and source is not None:
        figures.append(
            _photo(
                pictures.difference(ours, source),
                f"Difference × {pictures.AMPLIFIED}, grey is none",
                limit,
            )
        )
    if findings.source is not None and source is None:
        figures.append(
            '<p class="lead">The source has no level of this size that could be read.</p>'
        )
    if ours is not None and ours.shape[:2] != (picture.tile.height, picture.tile.width):
        figures.append(
            f'<p class="lead">A part of the tile, from y {picture.top}, x {picture.left} in it on.'
            "</p>"
        )
    if ours is None:
        why = escaped(findings.no_overview or "it cannot be decoded here")
        figures.append(f'<p class="lead">No picture: {why}</p>')
    return "".join(figures)


def _photo(image: pictures.Image, caption: str, limit: int) -> str:
    height, width = image.shape[:2]
    return (
        f'<figure><img src="{pictures.photograph(image, limit)}" width="{width}" '
        f'height="{height}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )
