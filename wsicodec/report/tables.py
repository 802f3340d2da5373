"""The sections of numbers: histograms of level 0, and the table of levels."""

from __future__ import annotations

import numpy as np

from wsicodec.report import charts
from wsicodec.report.figures import LevelFigures, tissue_grid
from wsicodec.report.findings import Findings
from wsicodec.report.text import count_text, psnr_text, size_text, ssim_text
from wsicodec.report.where import bpp_grid


def distribution_section(findings: Findings) -> str:
    if findings.passport is None:
        return ""
    level, found = findings.info.levels[0], findings.passport.levels[0]
    record = findings.info.record
    floor = None if record is None else record.floor
    mask = findings.passport.mask
    tissue = None if mask is None else tissue_grid(mask, level)
    quality = findings.overall
    bits = bpp_grid(level, found)
    drawn = []
    for title, unit, values, limit, mean in (
        (
            "SSIM",
            "",
            found.ssim,
            None if floor is None else floor.ssim,
            None if quality is None else quality.ssim_mean,
        ),
        (
            "PSNR",
            "dB",
            found.psnr,
            None if floor is None else floor.psnr,
            None if quality is None or quality.psnr_mean >= 100 else quality.psnr_mean,
        ),
        ("Bits per pixel", "", bits, None, None),
    ):
        marks = []
        if limit is not None:
            marks.append(charts.Mark(limit, f"floor {limit:g}", "floor"))
        if mean is not None:
            marks.append(charts.Mark(mean, f"mean {mean:.4g}", "mean"))
        if tissue is None:
            series = [charts.Series("all tiles", "all", values)]
        else:
            series = [
                charts.Series("with tissue", "tissue", values[tissue]),
                charts.Series("glass alone", "glass", values[~tissue]),
            ]
        drawn.append(charts.histogram(title, unit, series, marks))
    if not any(drawn):
        return ""
    keys = ""
    if tissue is not None:
        count = int(tissue.sum())
        drawn_glass = any(np.isfinite(values[~tissue]).any() for values in (found.ssim, bits))
        undrawn = "" if drawn_glass or tissue.all() else ", not measured"
        keys = (
            '<ul class="keys"><li><i class="key-tissue"></i>'
            f"tiles with tissue: {count_text(count)}</li>"
            f'<li><i class="key-glass"></i>glass alone: {count_text(tissue.size - count)}'
            f"{undrawn}</li></ul>"
        )
    note = ""
    exact = int(np.isinf(found.psnr).sum())
    if exact:
        note = (
            f'<p class="lead">Tiles identical to the source: {count_text(exact)}. Without a '
            "finite PSNR, they are left out of its chart and count as 100 dB in means.</p>"
        )
    return (
        '<section><h2>How the tiles are spread</h2><p class="lead">Tiles of level 0; how many have '
        f'which value.</p><div class="charts">{"".join(drawn)}</div>{keys}{note}</section>'
    )


def level_section(findings: Findings) -> str:
    measured = any(level.quality for level in findings.levels)
    record = findings.info.record
    asked = record is not None and record.floor is not None
    plain = ["Level", "Pixels", "Downsample", "Tiles", "Stored", "Bits/px"]
    heads = "".join(f'<th scope="col" rowspan="2">{cell}</th>' for cell in plain)
    below = ""
    if measured:
        heads += (
            '<th scope="colgroup" colspan="3" class="group">PSNR (dB)</th>'
            '<th scope="colgroup" colspan="3" class="group">SSIM</th>'
            '<th scope="col" rowspan="2">Tiles below<br>floor</th>'
        )
        names = ["mean", "1st %ile", "worst"] * 2
        below = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = "".join(
        f"<tr>{''.join(_cells(level, measured, asked))}</tr>" for level in findings.levels
    )
    return (
        '<section><h2>Levels</h2><div class="scroll"><table><thead>'
        f"<tr>{heads}</tr><tr>{below}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _cells(row: LevelFigures, measured: bool, asked: bool) -> list[str]:
    """Cells of a row. measured: the table has figures of tiles; asked: a floor was set."""
    level, quality = row.level, row.quality
    texts = [
        str(level.index),
        f"{count_text(level.width)} × {count_text(level.height)}",
        f"{level.downsample:.4g}",
        count_text(level.rows * level.columns),
        "–" if row.stored is None else size_text(row.stored),
        "–" if row.bpp is None else f"{row.bpp:.3f}",
    ]
    if measured:
        if quality is None:
            texts += ["–"] * 7
        else:
            texts += [
                psnr_text(quality.psnr_mean),
                psnr_text(quality.psnr_p01),
                psnr_text(quality.psnr_worst),
                ssim_text(quality.ssim_mean),
                ssim_text(quality.ssim_p01),
                ssim_text(quality.ssim_worst),
                count_text(quality.below_floor) if asked else "–",
            ]
    cells = [f"<td>{text}</td>" for text in texts]
    if quality is not None and quality.below_floor and measured:
        cells[-1] = f'<td class="bad-cell">{texts[-1]}</td>'
    return cells
