"""What a converted file says and holds beside its pyramid, with or without what identifies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from wsicodec.convert.deidentify import deidentified, leaks, neutral_history, secrets_of
from wsicodec.convert.plan import ConvertPlan
from wsicodec.errors import SlideError
from wsicodec.slide.ometiff import SlideMetadata
from wsicodec.slide.protocol import AssociatedImage, SlideInfo, SlideReader

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
