"""What of a slide's metadata and images may stay: the rules of de-identification."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from wsicodec.choices import MACROS
from wsicodec.convert.deidentify.colourprofile import neutral_profile
from wsicodec.convert.deidentify.description import rewritten
from wsicodec.convert.deidentify.images import (
    Image,
    blanked_macro,
    image_kind,
    shows_tissue_only,
    stripped,
)
from wsicodec.convert.deidentify.secrets import secrets_of
from wsicodec.errors import SettingsError
from wsicodec.slide.ometiff import SlideMetadata
from wsicodec.slide.protocol import AssociatedImage, SlideInfo

NEUTRAL_NAME = "slide"
"""Name of the slide in a file: the source's name is the accession number more often than not."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was removed: kind -> how many of it. Never the values, so it may be shown and logged."""

    removed: Mapping[str, int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What was removed, in alphabetical order."""
        return tuple(sorted(self.removed))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"removed": dict(sorted(self.removed.items()))}


def deidentified(
    info: SlideInfo,
    metadata: SlideMetadata,
    associated: Sequence[AssociatedImage],
    *,
    macro: str = "drop",
    overview: Image | None = None,
) -> tuple[SlideMetadata, tuple[AssociatedImage, ...], Findings]:
    """Metadata and associated images of a slide without anything that identifies.

    metadata, associated: what would be written without it. macro: ``drop``, or ``blank`` to keep
    the macro with its label's end white (see ``blanked_macro``).
    overview: pixels of the whole coarsest level; given, a thumbnail that does not look like it is
    dropped. A thumbnail of other proportions than the slide, which may show the label, always is.

    Raises SettingsError for another ``macro``.
    """
    if macro not in MACROS:
        raise SettingsError(f"macro {macro!r} is none of {', '.join(MACROS)}")
    removed: Counter[str] = Counter()
    description, kinds = rewritten(metadata.description)
    removed.update(kinds)
    if metadata.name != NEUTRAL_NAME:
        removed["name of the slide"] += 1
    if metadata.acquisition_date is not None:
        removed["date of acquisition"] += 1
    profile = metadata.icc_profile
    if profile is not None:
        profile = neutral_profile(profile, secrets_of(info))
        if profile is None:
            removed["colour profile that cannot be read"] += 1
        elif profile != metadata.icc_profile:
            removed["text of the colour profile"] += 1
    images: list[AssociatedImage] = []
    for image in associated:
        kind = image_kind(image.name)
        kept = None
        if kind == "thumbnail" and shows_tissue_only(image.pixels, info, overview):
            kept = AssociatedImage("thumbnail", image.pixels, stripped(image.stored))
        elif kind == "macro" and macro == "blank":
            pixels = blanked_macro(image.pixels)
            kept = None if pixels is None else AssociatedImage("macro", pixels)
            if kept is not None:
                removed["label on the macro image"] += 1
        if kept is None or any(other.name == kept.name for other in images):
            removed[f"{kind} image"] += 1
        else:
            images.append(kept)
    # built anew, field by field: what is added to SlideMetadata later stays out until allowed here
    clean = SlideMetadata(
        name=NEUTRAL_NAME,
        mpp_x=metadata.mpp_x,
        mpp_y=metadata.mpp_y,
        magnification=metadata.magnification,
        description=description,
        icc_profile=profile,
    )
    return clean, tuple(images), Findings(dict(removed))
