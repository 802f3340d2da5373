"""Draws findings as one page of HTML: no script, nothing loaded from elsewhere, everything escaped.

A content security policy in the page repeats the second for browsers: should a string of the file
ever slip through as markup, it still could not load or run a thing.
"""

from __future__ import annotations

import html

from wsicodec import __version__
from wsicodec.errors import LimitError
from wsicodec.report.closeups import closeup_section
from wsicodec.report.facts import fact_section, reading_section
from wsicodec.report.findings import LENGTHS, MEASURED, STORED, Findings
from wsicodec.report.markup import escaped, plural
from wsicodec.report.style import STYLE
from wsicodec.report.tables import distribution_section, level_section
from wsicodec.report.text import count_text, psnr_text, share_text, size_text, ssim_text
from wsicodec.report.where import map_section

MAX_PAGE_BYTES = 3 * 10**6
_PICTURE_BYTES = (48_000, 24_000, 12_000, 6_000)
"""Of one picture of a tile; the next is tried where the page would become too large."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def draw(findings: Findings) -> str:
    """The page, UTF-8 text below MAX_PAGE_BYTES. Raises LimitError where that cannot be."""
    for limit in _PICTURE_BYTES:
        page = _page(findings, limit)
        if len(page.encode()) < MAX_PAGE_BYTES:
            return page
    raise LimitError(f"{findings.info.path}: the report would exceed {MAX_PAGE_BYTES} bytes")


def _page(findings: Findings, picture_bytes: int) -> str:
    name = escaped(findings.info.path.name)
    body = "\n".join(
        part
        for part in (
            _header(findings),
            "<main>",
            _figures(findings),
            map_section(findings),
            distribution_section(findings),
            level_section(findings),
            closeup_section(findings, picture_bytes),
            fact_section(findings),
            reading_section(findings),
            "</main>",
            f"<footer>Made by wsicodec {escaped(__version__)} from the file itself"
            f"{' and its source' if findings.source else ''}. The page holds everything it shows."
            "</footer>",
        )
        if part
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>Quality of {name}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _header(findings: Findings) -> str:
    info = findings.info
    first = info.levels[0]
    parts = [
        f"{count_text(first.width)} × {count_text(first.height)} px",
        f"{len(info.levels)} level{'s' if len(info.levels) > 1 else ''}",
    ]
    if info.magnification is not None:
        parts.append(f"{info.magnification:g}×")
    if info.mpp_x is not None:
        parts.append(f"{info.mpp_x:.4g} µm per pixel")
    parts.append(escaped(info.format))
    return (
        f'<header><p class="kicker">Slide quality report</p><h1>{escaped(info.path.name)}</h1>'
        f'<p class="lead">{" · ".join(parts)}</p>{_verdict(findings)}{_problem(findings)}</header>'
    )


def _box(kind: str, title: str, text: str) -> str:
    return f'<p class="verdict {kind}"><b>{title}</b>{text}</p>'


def _verdict(findings: Findings) -> str:
    """Whether the file holds what was asked of it, in words."""
    floor = None if findings.info.record is None else findings.info.record.floor
    asked = []
    if floor is not None and floor.ssim is not None:
        asked.append(f"SSIM ≥ {floor.ssim:g}")
    if floor is not None and floor.psnr is not None:
        asked.append(f"PSNR ≥ {floor.psnr:g} dB")
    count, total = findings.measured_tiles, findings.tiles
    if not count:
        if not asked:
            return ""
        return _box(
            "note",
            f"Quality floor: {' and '.join(asked)}",
            "The file holds no figures that would show whether its tiles reach it.",
        )
    by = "Measured just now" if findings.basis == MEASURED else "Measured when the file was made"
    glass = findings.shared_glass
    every = (
        f"all {count_text(count)} tiles"
        if count == total
        else f"{count_text(count)} of {count_text(total)} tiles"
    )
    rest = (
        f" {count_text(glass)} tiles of glass alone are one shared tile and were not compared."
        if glass
        else ""
    )
    if not asked:
        return _box("note", "No quality floor was set", f"{by}, {every}.{rest}")
    wanted = " and ".join(asked)
    if findings.below_floor:
        return _box(
            "bad",
            f"✗ Quality floor missed by {count_text(findings.below_floor)} "
            f"{plural(findings.below_floor, 'tile')}",
            f"{wanted} was asked of every tile. {by}, {every}.{rest}",
        )
    held = count + glass >= total
    return _box(
        "good" if held else "note",
        "✓ Quality floor held by every tile" if held else "Quality floor held where measured",
        f"{wanted}. {by}, {every}.{rest}",
    )


def _problem(findings: Findings) -> str:
    if findings.basis == STORED:
        return ""
    if findings.problem is None and findings.basis != LENGTHS:
        return ""
    if findings.basis == MEASURED:
        text = "The figures below were measured just now against the source."
    else:
        text = "This page shows what the file itself tells."
        if findings.basis == LENGTHS:
            text += (
                " <code>wsicodec report FILE --html OUT --against SOURCE --measure</code> measures "
                "every tile against the source."
            )
    problem = findings.problem or "the file has no quality passport"
    return _box("note", escaped(problem[0].upper() + problem[1:]) + ".", text)


def _figures(findings: Findings) -> str:
    """The few numbers that people ask for first."""
    info, record = findings.info, findings.info.record
    cards = [("File", size_text(info.file_bytes), _against_source(findings))]
    first = findings.levels[0]
    if first.bpp is not None:
        cards.append(("Level 0", f"{first.bpp:.2f}", "bits per pixel; uncompressed has 24"))
    if (quality := findings.overall) is not None:
        cards.append(
            ("SSIM, mean", ssim_text(quality.ssim_mean), "level 0; 1 is identical"),
        )
        worst = min(q.ssim_worst for q in (level.quality for level in findings.levels) if q)
        cards.append(("SSIM, worst tile", ssim_text(worst), "of all levels"))
        cards.append(
            (
                "PSNR, mean",
                f"{psnr_text(quality.psnr_mean)}{'' if quality.psnr_mean >= 100 else ' dB'}",
                "level 0",
            )
        )
    if record is not None and record.glass is not None:
        cards.append(
            ("Tissue", share_text(record.glass.tissue_share), _glass_text(record.glass.mode))
        )
    elif findings.passport is not None and findings.passport.mask is not None:
        cards.append(("Tissue", share_text(findings.passport.mask.tissue_share), "of the area"))
    items = "".join(
        f"<li><span>{label}</span><b>{value}</b><small>{note}</small></li>"
        for label, value, note in cards
    )
    return f'<ul class="cards">{items}</ul>'


def _against_source(findings: Findings) -> str:
    record = findings.info.record
    if record is None or record.source is None or record.source.bytes <= 0:
        return "on disk"
    return f"{100 * findings.info.file_bytes / record.source.bytes:.1f} % of the source"


def _glass_text(mode: str) -> str:
    return {
        "keep": "of the area; glass kept as it is",
        "fill": "of the area; glass made one colour",
        "drop": "of the area; glass left out",
    }.get(mode, "of the area")
