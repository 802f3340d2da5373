"""What a converted file says and holds beside its pyramid, with or without what identifies."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from pathlib import Path

from wsicodec.convert.deidentify import deidentified, neutral_history, secrets_of
from wsicodec.convert.leaks import leaks
from wsicodec.convert.plan import ConvertPlan
from wsicodec.errors import SlideError
from wsicodec.slide.ometiff import SlideMetadata
from wsicodec.slide.protocol import AssociatedImage, SlideInfo, SlideReader
from wsicodec.slide.record import SourceIdentity

_HASHED = 2**22  # bytes read at once
_OVERVIEW = 2048  # side in pixels of the coarsest level that thumbnails are compared with, at most


@dataclasses.dataclass(frozen=True)
class Beside:
    """Metadata and images beside the pyramid.

    history: lossy codings of the pixels before this conversion. dropped: names of the source's
    images that are left out. removed: kinds of what de-identification took out; secrets: the
    values, which the output must not hold.
    """

    metadata: SlideMetadata
    associated: tuple[AssociatedImage, ...]
    history: tuple[str, ...]
    dropped: tuple[str, ...]
    removed: tuple[str, ...] = ()
    secrets: frozenset[str] = frozenset()

    @classmethod
    def of(cls, slide: SlideReader, plan: ConvertPlan) -> Beside:
        """Read all of it: what cannot be read must show before the work starts.

        Raises SlideError or UnsupportedError for an associated image that cannot be read.
        """
        info, settings = slide.info, plan.settings
        images: tuple[AssociatedImage, ...] = ()
        if settings.associated:
            images = tuple(slide.read_associated(name) for name in info.associated)
        metadata = SlideMetadata(
            name=name_of(plan.target),
            mpp_x=info.mpp_x,
            mpp_y=info.mpp_y,
            magnification=info.magnification,
            description=info.description,
            icc_profile=info.icc_profile,
            acquisition_date=info.acquisition_date,
        )
        if not settings.deidentify:
            dropped = _missing(info, images)
            return cls(metadata, images, info.history, dropped)
        last = slide.levels[-1]
        overview = None
        if max(last.height, last.width) <= _OVERVIEW:
            overview = slide.read_region(last.index, 0, 0, last.height, last.width)
        metadata, images, findings = deidentified(
            info, metadata, images, macro=settings.macro, overview=overview
        )
        return cls(
            metadata,
            images,
            neutral_history(info.history),
            _missing(info, images),
            findings.kinds,
            secrets_of(info),
        )

    def check(self, written: Path, target: Path) -> None:
        """Raise SlideError where ``written``, about to become ``target``, holds a secret."""
        if self.secrets and (found := leaks(written, self.secrets)):
            raise SlideError(
                f"{target}: would still hold {len(found)} of the values that de-identification "
                "removes; nothing was written"
            )


def _missing(info: SlideInfo, images: tuple[AssociatedImage, ...]) -> tuple[str, ...]:
    names = {image.name for image in images}
    return tuple(name for name in info.associated if name not in names)


def name_of(target: Path) -> str:
    """The slide's name, by its file's."""
    name = target.name
    for suffix in (".tiff", ".tif", ".zarr", ".ome"):
        name = name.removesuffix(suffix)
    return name


class SourceDigest:
    """SHA-256 of a slide's file, computed while other things happen."""

    def __init__(self, info: SlideInfo) -> None:
        self._info = info
        self._sha256: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wsicodec-digest", daemon=True)
        self._thread.start()

    def identity(self) -> SourceIdentity | None:
        """The source's identity; None where the file could not be read to its end."""
        self._thread.join()
        if self._sha256 is None:
            return None
        info = self._info
        return SourceIdentity(self._sha256, info.file_bytes, info.format, info.compression)

    def stop(self) -> None:
        """Nobody will ask."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        digest = hashlib.sha256()
        try:
            with self._info.path.open("rb") as file:
                while part := file.read(_HASHED):
                    if self._stopped.is_set():
                        return
                    digest.update(part)
        except OSError:
            return  # reading its tiles says why
        self._sha256 = digest.hexdigest()
