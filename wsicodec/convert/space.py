"""Room on the disk, asked for before hours are spent.

How large an output becomes is known when it is written. What it can hardly do without must be free;
where that may not be enough, a warning says so.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings

from wsicodec.convert.plan import ConvertPlan
from wsicodec.convert.work import BLOCKS, work_folder
from wsicodec.errors import SlideError


def check_space(plan: ConvertPlan) -> None:
    """Raise SlideError where the disk has too little room for a conversion, warn where it may have.

    Coded tiles are on it twice for a moment: as finished blocks, and in the output.
    """
    try:
        free = shutil.disk_usage(plan.target.parent).free
    except OSError:
        return  # a file system that does not tell
    with contextlib.suppress(OSError):
        # finished blocks of an earlier run have their place already
        if plan.settings.resume:
            free += (work_folder(plan.target) / BLOCKS).stat().st_size
    least, most = _needs(plan)
    if free < least:
        raise SlideError(
            f"{plan.target}: the disk is full, or nearly: {free:,} bytes are free, about "
            f"{least:,} are needed at least"
        )
    if free < most:
        warnings.warn(
            f"{plan.target}: the disk has {free:,} bytes free, up to {most:,} may be needed",
            stacklevel=3,
        )


def _needs(plan: ConvertPlan) -> tuple[int, int]:
    """(least, most) bytes that a conversion takes while it runs, as slides are."""
    source, settings = plan.source.file_bytes, plan.settings
    if settings.codec == "copy":
        # associated images, of which some are left out, are a small part
        return source * 9 // 10, source
    if settings.lossless_transcode:
        return source // 2, source
    if settings.lossless:
        # tissue without loss takes a third to a half of its 24 bits a pixel, glass next to nothing
        return 3 * plan.pixels // 8, 3 * plan.pixels
    # lossy codecs: about 1 bit a pixel, least where much is glass; the source's bytes twice at most
    return min(plan.pixels // 64, source // 8), 2 * min(source, 3 * plan.pixels)
