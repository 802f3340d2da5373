"""Numbers for people."""

from __future__ import annotations

import math


def count_text(count: int) -> str:
    """12,345."""
    return f"{count:,}"


def size_text(count: int) -> str:
    """Bytes in powers of 1000, as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


EXACT_DECIBELS = 100.0  # metrics.PSNR_OF_EQUAL, without loading NumPy


def psnr_text(psnr: float) -> str:
    """dB; ``exact`` for equal pixels, a dash where not measured."""
    if math.isnan(psnr):
        return "–"
    return "exact" if psnr >= EXACT_DECIBELS else f"{psnr:.2f}"


def ssim_text(ssim: float) -> str:
    """Four digits, never rounded up to 1; a dash where not measured."""
    if math.isnan(ssim):
        return "–"
    return f"{ssim:.4f}" if ssim >= 1 or ssim < 0.99995 else "0.9999"


def share_text(share: float) -> str:
    """Per cent; what exists is not shown as nothing."""
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def colour_text(background: tuple[int, int, int]) -> str:
    """#RRGGBB."""
    return "#" + "".join(f"{sample:02X}" for sample in background)
