"""The sections of words: how the file was made, and how its figures are read."""

from __future__ import annotations

from collections.abc import Mapping

from wsicodec.codec import TARGETS
from wsicodec.metrics import METRIC_ARGUMENTS
from wsicodec.report.findings import Findings
from wsicodec.report.markup import MAX_LISTED, escaped, listed, mapping, plain
from wsicodec.report.text import colour_text, count_text, size_text
from wsicodec.slide.record import FileRecord


def fact_section(findings: Findings) -> str:
    """How the file was made, for the archive."""
    info, record = findings.info, findings.info.record
    rows: list[tuple[str, str]] = []
    if record is None:
        rows.append(("Made by", "not by wsicodec, as far as the file tells"))
    else:
        rows += _record_facts(record, findings)
    rows.append(("Lossy history", listed(info.history, " → ") or "none known"))
    if info.mpp_x is not None or info.mpp_y is not None:
        rows.append(("Pixel size", f"{_known(info.mpp_x)} × {_known(info.mpp_y)} µm"))
    rows.append(
        (
            "ICC profile",
            "none" if info.icc_profile is None else f"{count_text(len(info.icc_profile))} bytes",
        )
    )
    rows.append(("Other images", listed(info.associated) or "none"))
    rows.append(("Compression", escaped(info.compression)))
    if findings.source is not None and findings.source.sha256 is not None:
        rows.append(("Compared with", f"<code>SHA-256 {findings.source.sha256}</code>"))
    inside = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in rows)
    return f'<section><h2>How it was made</h2><dl class="facts">{inside}</dl></section>'


def _record_facts(record: FileRecord, findings: Findings) -> list[tuple[str, str]]:
    rows = [
        ("Made by", f"wsicodec {escaped(record.wsicodec)}"),
        ("Codec", f"{escaped(record.codec)}, {escaped(_quality(record))}"),
    ]
    for model in record.models[:MAX_LISTED]:
        rows.append(
            ("Model", f"{escaped(model.name)}<br><code>SHA-256 {escaped(model.sha256)}</code>")
        )
    if record.models:
        carried = findings.model_bytes
        rows.append(
            ("Model in the file", "no" if carried is None else f"yes, {size_text(carried)}")
        )
    if record.source is not None:
        source = record.source
        made = f"{escaped(source.format)}, {escaped(source.compression)}"
        digest = f"<code>SHA-256 {escaped(source.sha256)}</code>"
        rows.append(("Source", f"{made}, {size_text(source.bytes)}<br>{digest}"))
    elif record.deidentified:
        rows.append(("Source", "not named: the file was de-identified"))
    rows.append(("De-identified", "yes" if record.deidentified else "no"))
    if record.glass is not None:
        glass = record.glass
        rows.append(
            (
                "Glass",
                f"{escaped(glass.mode)}, tissue found by {escaped(glass.method)}, background "
                f"{colour_text(glass.background)}",
            )
        )
    if record.fallbacks:
        rows.append(
            (
                "Fallbacks",
                listed([f"{mode}: {count}" for mode, count in record.fallbacks.items()]),
            )
        )
    for label, values in (("Options", record.options), ("Settings", record.settings)):
        if values:
            rows.append((label, mapping(values)))
    return rows


def _quality(record: FileRecord) -> str:
    if record.quality is not None:
        return f"quality {record.quality}"
    targets = [f"{name} {record.options[name]}" for name in TARGETS if name in record.options]
    return targets[0] if targets else "without loss"


def _known(value: float | None) -> str:
    return "not stated" if value is None else f"{value:.6g}"


def reading_section(findings: Findings) -> str:
    """What the figures mean, and exactly how they were computed."""
    record = findings.info.record
    stated = METRIC_ARGUMENTS if record is None or not record.metrics else record.metrics
    glass = None if record is None else record.glass
    filled = ""
    if glass is not None and glass.mode != "keep":
        filled = " Where glass was made one colour, tiles were compared with the pixels after that."
    rows = "".join(
        f"<dt>{escaped(name)}</dt><dd>{_metric(arguments)}</dd>"
        for name, arguments in sorted(stated.items())[:MAX_LISTED]
    )
    return (
        "<section><h2>How to read this</h2>"
        "<p><b>SSIM</b> compares the structure of a tile's luma with its source: 1 is identical, "
        "0.95 is hard to tell apart side by side. It falls fastest where there is only noise, as "
        "in glass. <b>PSNR</b> is the size of the error over red, green and blue in decibels: 6 dB "
        "more is half the error. Both were computed tile by tile on decoded pixels, without the "
        f"padding of tiles at the edge.{filled}</p>"
        f'<details><summary>Arguments of the metrics</summary><dl class="facts">{rows}</dl>'
        "</details></section>"
    )


def _metric(arguments: object) -> str:
    if not isinstance(arguments, Mapping):
        return escaped(arguments)
    return listed([f"{name} = {plain(value)}" for name, value in sorted(arguments.items())])
