"""What a batch is to do, and which of it decides the bytes of an output."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsicodec.convert.plan import ConvertSettings
from wsicodec.errors import SettingsError
from wsicodec.settings import MAX_THREADS

JOURNAL_NAME = "wsicodec-batch.sqlite"
MAX_RETRIES = 100
MAX_SUFFIX = 40
_WITHOUT_EFFECT = ("overwrite", "resume", "jobs", "in_process", "cache_bytes", "block_size")
"""Settings that say how to work: they never show in an output."""


@dataclass(frozen=True)
class BatchSettings:
    """How to convert many slides. Checked when built; raises SettingsError.

    convert: for each slide; its ``overwrite`` also allows slides that are done with other settings
    to be done again, and its ``jobs`` is set by the batch. jobs: slides at once, each in a process
    of its own with its share of the thread budget; None for one, or with a scheduler for as many as
    the cluster has threads. retries: further attempts, within a run, for a slide that fails.
    patterns: as in ``find_slides``. suffix: of the outputs. sha256: tell changed sources by
    their content instead of their time, which reads every byte. journal: default
    ``wsicodec-batch.sqlite`` in the output folder; it holds the sources' names. scheduler: address
    of a Dask cluster to convert on.
    """

    convert: ConvertSettings = field(default_factory=ConvertSettings)
    jobs: int | None = None
    retries: int = 2
    patterns: tuple[str, ...] = ()
    suffix: str = ".ome.tiff"
    sha256: bool = False
    journal: Path | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and not 1 <= self.jobs <= MAX_THREADS:
            raise SettingsError(f"jobs {self.jobs} is not within 1 ... {MAX_THREADS}")
        if not 0 <= self.retries <= MAX_RETRIES:
            raise SettingsError(f"retries {self.retries} is not within 0 ... {MAX_RETRIES}")
        suffix = self.suffix
        if (
            not suffix.startswith(".")
            or not suffix.strip(".")
            or len(suffix.encode("utf-8", "surrogatepass")) > MAX_SUFFIX
            or any(character in "/\\" or not character.isprintable() for character in suffix)
        ):
            raise SettingsError(f"suffix {suffix[: 2 * MAX_SUFFIX]!r} must be like '.ome.tiff'")

    def journal_in(self, output: Path) -> Path:
        """Where the journal of this output folder is."""
        return output / JOURNAL_NAME if self.journal is None else self.journal

    def digest(self) -> str:
        """Hash of all that decides an output's bytes, the model's digest among it."""
        return hashlib.sha256(self.as_json().encode()).hexdigest()

    def as_json(self) -> str:
        """What ``digest`` is of."""
        return json.dumps(_deciding(self.pinned()), sort_keys=True, default=str)

    def pinned(self) -> ConvertSettings:
        """``convert`` with the model by its digest: no worker may know another one by that name.

        Raises UnknownModelError.
        """
        if self.convert.codec != "learned" or self.convert.lossless:
            return self.convert
        from wsicodec.models import find_model

        return dataclasses.replace(self.convert, model=find_model(self.convert.model).digest)


def packed(settings: ConvertSettings) -> dict[str, Any]:
    """The fields of the settings, in types that can be sent."""
    values = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    return {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()
    }


def _deciding(settings: ConvertSettings) -> dict[str, Any]:
    """The settings that show in an output.

    A field that nothing looks at, given the others, has the value that it has by default: outputs
    that are equal must not be made again because of it.
    """
    idle = set(_WITHOUT_EFFECT)
    if settings.codec != "learned" or settings.lossless:
        idle.update(("model", "embed_model"))
    if settings.fixed_quality is None:
        idle.add("quality")
    if settings.glass == "keep":
        idle.add("tissue")
    if not (settings.deidentify and settings.associated):
        idle.add("macro")
    if settings.codec == "copy" or settings.lossless_transcode:
        idle.add("measure")
    usual = ConvertSettings()
    fields = {name: getattr(usual, name) for name in idle - set(_WITHOUT_EFFECT)}
    values = packed(dataclasses.replace(settings, **fields))
    return {name: value for name, value in values.items() if name not in _WITHOUT_EFFECT}
