"""Room on the disk, asked for before hours are spent.

How large an output becomes is known when it is written. Where hardly any could fit, it is refused;
where room may not be enough, a warning says so.
"""

from __future__ import annotations

import contextlib
import errno
import shutil

from wsicodec.convert.plan import ConvertPlan
from wsicodec.convert.work import BLOCKS, work_folder
from wsicodec.errors import SlideError


def check_space(plan: ConvertPlan, reserved: int = 0) -> tuple[str, ...]:
    """Warnings where the disk may have too little room for a conversion.

    reserved: bytes that other conversions on the same disk may still need, at most. Coded tiles
    are on the disk twice for a moment: as finished blocks, and in the output.

    Raises SlideError (its ``errno`` is ENOSPC) where there is next to no room.
    """
    try:
        usage = shutil.disk_usage(plan.target.parent)
    except OSError:
        return ()
    if usage.total == 0:
        return ()  # a file system that does not tell
    free = usage.free
    with contextlib.suppress(OSError):
        # finished blocks of an earlier run have their place already
        if plan.settings.resume:
            free += (work_folder(plan.target) / BLOCKS).stat().st_size
    least, most = _needs(plan)
    # others get by with as small a part of what they may need
    least += least * reserved // max(most, 1)
    beside = f" ({reserved:,} of them may be needed by others)" if reserved else ""
    if free < least:
        full = SlideError(
            f"{plan.target}: the disk is full, or nearly: {free:,} bytes free{beside}, about "
            f"{least:,} are needed at least"
        )
        full.errno = errno.ENOSPC
        raise full
    if free - reserved < most:
        return (
            f"{plan.target}: the disk has {free:,} bytes free{beside}, up to {most:,} may be "
            "needed",
        )
    return ()


def _needs(plan: ConvertPlan) -> tuple[int, int]:
    """(least, most) bytes that a conversion takes while it runs.

    least: a quarter of what slides take that compress well: what is refused must not have fitted.
    """
    source, settings = plan.source.file_bytes, plan.settings
    if settings.codec == "copy":
        # associated images, of which some are left out, are a small part as a rule
        return source * 9 // 40, source
    if settings.lossless_transcode:
        return source // 8, source
    if settings.lossless:
        # tissue without loss takes a third to a half of its 24 bits a pixel, glass next to nothing
        return 3 * plan.pixels // 32, 3 * plan.pixels
    # lossy codecs: about 1 bit a pixel, least where much is glass; the source's bytes twice at most
    return min(plan.pixels // 256, source // 32), 2 * min(source, 3 * plan.pixels)
