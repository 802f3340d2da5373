"""Writes a pyramid of compressed segments that another file had, as BigTIFF, and reads it back.

The levels say what their segments are (``PassingLevel``); here they come into one file with images
and metadata beside them, like those of ``slide.ometiff``.
"""

from __future__ import annotations

import io
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import wsicodec
from wsicodec.choices import LAYOUTS
from wsicodec.convert.beside import name_of
from wsicodec.convert.deidentify.cleaning import cleaned
from wsicodec.convert.plan import check_target, is_zarr
from wsicodec.convert.results import ConvertProgress, ConvertReport, LevelReport, Progress
from wsicodec.convert.work import TARGET_PART, locked_folder
from wsicodec.errors import (
    FormatError,
    LimitError,
    SettingsError,
    SlideError,
    UnsupportedError,
    VerifyError,
)
from wsicodec.slide.directories import (
    BigTiff,
    Directory,
    Tag,
    ascii_tag,
    bytes_tag,
    resolution_tags,
    subfile_tag,
)
from wsicodec.slide.jpegstream import app0_names, jpeg_colours, with_tables
from wsicodec.slide.ometiff import (
    MAX_LEVELS,
    SlideMetadata,
    flat_description,
    is_aperio,
    ome_description,
)
from wsicodec.slide.pages import named
from wsicodec.slide.placing import atomic_file
from wsicodec.slide.protocol import AssociatedImage, SlideInfo, StoredLayout
from wsicodec.slide.record import (
    FROM_SOURCE,
    TAG_MODEL,
    TAG_RECORD,
    FileRecord,
    SourceIdentity,
)
from wsicodec.slide.tiff import TiffReader
from wsicodec.slide.transcoding import (
    TAG_TRANSCODE,
    LevelDigest,
    LevelOrigin,
    Way,
    pack_origins,
)

COPY, TRANSCODE = "copy", "jpegxl"
TRANSCODE_OPTION = "lossless_transcode"
"""Set in the options of a file whose JPEG-XL tiles are JPEG tiles re-packed."""

_JPEG = 7
_PHOTOMETRICS = (2, 6)  # RGB, YCbCr
_DEFLATE = 8
_ICC_PROFILE, _SOFTWARE, _DESCRIPTION = 34675, 305, 270


@dataclass(frozen=True)
class PassOptions:
    """How to put a slide's own streams into a new file, and what to say there.

    layout: as in ``slide.ometiff.write_slide``. strip_metadata: take comments, EXIF and XMP out of
    the streams; their pixels stay. metadata, associated, history: in place of the source's own.
    source: the source's identity, asked for when everything else is written, so that it may be
    computed meanwhile. deidentified: for the record. secrets: values that the file must not hold.
    """

    layout: str = "subifd"
    overwrite: bool = False
    strip_metadata: bool = False
    metadata: SlideMetadata | None = None
    associated: Sequence[AssociatedImage] | None = None
    history: tuple[str, ...] | None = None
    source: Callable[[], SourceIdentity | None] | None = None
    deidentified: bool = False
    secrets: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise SettingsError(f"layout {self.layout!r} is none of {', '.join(LAYOUTS)}")


class PassingLevel:
    """A level on its way from one file into another, and what is known of it afterwards.

    before, after: layouts. source_bytes, coded_bytes, ways: so far.
    """

    def __init__(self, before: StoredLayout, after: StoredLayout, tiles: int) -> None:
        self.before = before
        self.after = after
        self.tiles = tiles
        self.source_bytes = 0
        self.coded_bytes = 0
        self.ways = bytearray()
        self.checks = array("I")
        self.kept: list[bytes] = []
        self._before = LevelDigest(before.jpegtables)
        self._after = LevelDigest(after.jpegtables)

    def segments(self) -> Iterator[bytes]:
        """Segments of the new file, in order."""
        raise NotImplementedError

    def note(self, way: Way, original: bytes, stored: bytes) -> bytes:
        """Count and hash a segment. original: empty where the source leaves it out."""
        self.ways.append(way)
        self.checks.append(zlib.crc32(original) if original else 0)
        if way is Way.KEPT:
            self.kept.append(original)
        self.source_bytes += len(original)
        self.coded_bytes += len(stored)
        self._before.add(original)
        self._after.add(stored)
        return stored

    def origin(self) -> LevelOrigin:
        """What is needed to go back."""
        return LevelOrigin(
            self.before,
            bytes(self.ways),
            self.checks,
            self._before.digest(),
            tuple(self.kept),
        )

    def digest(self) -> bytes:
        """Of the tables and segments that the new file must hold."""
        return self._after.digest()


@dataclass(frozen=True)
class Job:
    """What is to be written, besides the levels. carried: a transcode tag that goes along."""

    reader: TiffReader
    target: Path
    codec: str
    options: PassOptions
    metadata: SlideMetadata
    associated: tuple[AssociatedImage, ...]
    carried: bytes | None = None

    @classmethod
    def of(
        cls,
        reader: TiffReader,
        target: str | Path,
        codec: str,
        options: PassOptions,
        carried: bytes | None = None,
    ) -> Job:
        """Read what goes beside the levels. Raises as ``read_associated``, ``check_target``."""
        path = Path(target)
        if is_zarr(path):
            raise UnsupportedError(f"{path}: streams of a TIFF are kept in a TIFF, not in OME-Zarr")
        check_target(reader.info.path, path, overwrite=options.overwrite)
        images = options.associated
        if images is None:
            images = [reader.read_associated(name) for name in reader.info.associated]
        metadata = options.metadata or _metadata(reader.info, path)
        return cls(reader, path, codec, options, metadata, tuple(images), carried)


def write_passing(
    job: Job, levels: Sequence[PassingLevel], progress: Progress | None
) -> ConvertReport:
    """Write the levels, images beside them and what is known of them; read the file back.

    progress: called in the calling thread after each tile. The target appears when it is complete.
    Raises what the levels raise, VerifyError where the file does not read back as it was written,
    SlideError where it cannot be written.
    """
    started = time.perf_counter()
    info, options = job.reader.info, job.options
    if len(levels) > MAX_LEVELS:
        raise LimitError(f"{info.path}: {len(levels)} levels exceed {MAX_LEVELS}")
    # what is missing to describe the slide must show before its tiles are copied
    svs = _stays_svs(job, levels)
    description = _description(job, levels[0], svs)
    with (
        locked_folder(job.target) as folder,
        atomic_file(job.target, overwrite=options.overwrite, part=folder / TARGET_PART) as file,
    ):
        tiff = BigTiff(file)
        stored = [tiff.store(level.after, _counted(levels, level, progress)) for level in levels]
        beside = [_beside(tiff, image, job) for image in job.associated]
        pyramid = [_with_resolution(job, directory, stored[0], svs) for directory in stored]
        pyramid[0] = pyramid[0].with_tags(_first_tags(job, levels, description))
        places = None
        if options.layout == "subifd":
            tiff.finish([pyramid[0].with_tags((), pyramid[1:]), *beside])
        else:
            # Aperio's order: the thumbnail follows level 0, label and macro the last level
            both = list(zip(job.associated, beside, strict=True))
            early = [directory for image, directory in both if image.name == "thumbnail"]
            both.sort(key=lambda each: {"label": 0, "macro": 1}.get(each[0].name, 2))
            late = [directory for image, directory in both if image.name != "thumbnail"]
            places = [0, *range(1 + len(early), len(early) + len(pyramid))]
            tiff.finish([pyramid[0], *early, *pyramid[1:], *late])
        _check_written(file, job, levels, places)
    names = {image.name for image in job.associated}
    return ConvertReport(
        source=info.path,
        target=job.target,
        codec=job.codec,
        model=None,
        quality_setting=None,
        source_bytes=info.file_bytes,
        target_bytes=job.target.stat().st_size,
        levels=tuple(_level_report(index, level) for index, level in enumerate(levels)),
        quality=None,
        seconds=time.perf_counter() - started,
        pixels=sum(level.after.height * level.after.width for level in levels),
        associated=tuple(image.name for image in job.associated),
        dropped=tuple(name for name in info.associated if name not in names),
        modes=_modes(levels),
    )


def _modes(levels: Sequence[PassingLevel]) -> dict[str, int]:
    """Segments by what became of them, in words."""
    counts: dict[str, int] = {}
    for way in Way:
        # an Adobe segment more is the affair of the format
        name = "transcoded" if way is Way.AS_RGB else way.name.lower().replace("_", " ")
        if count := sum(level.ways.count(way) for level in levels):
            counts[name] = counts.get(name, 0) + count
    return counts


def _metadata(info: SlideInfo, target: Path) -> SlideMetadata:
    """What the source says of the slide; its name is that of the new file."""
    return SlideMetadata(
        name=name_of(target),
        mpp_x=info.mpp_x,
        mpp_y=info.mpp_y,
        magnification=info.magnification,
        description=info.description,
        icc_profile=info.icc_profile,
        acquisition_date=info.acquisition_date,
    )


def as_stream_says(layout: StoredLayout, stream: bytes | None) -> StoredLayout:
    """The layout with the colours that a JPEG segment of it has, where its tags tell others.

    JFIF streams are YCbCr. Under tags that say RGB, tifffile believes the stream, libtiff the tags.
    """
    if layout.compression != _JPEG or layout.photometric != _PHOTOMETRICS[0] or not stream:
        return layout
    try:
        whole = with_tables(layout.jpegtables, stream)
        if b"JFIF\0" not in app0_names(whole):
            return layout
        _, subsampling = jpeg_colours(whole)
    except FormatError:
        return layout  # broken, and copied as it is
    return replace(layout, photometric=_PHOTOMETRICS[1], subsampling=subsampling)


def segment_shape(layout: StoredLayout, row: int) -> tuple[int, int]:
    """Rows and columns of pixels that a segment holds; the last strip is shorter, no tile is."""
    if layout.tile is not None:
        return layout.tile
    rows = layout.rows_per_strip or layout.height
    return min(rows, layout.height - row * rows), layout.width


def _counted(
    levels: Sequence[PassingLevel], level: PassingLevel, progress: Progress | None
) -> Iterator[bytes]:
    """The level's segments; each is reported once it was taken and written."""
    index = next(i for i, other in enumerate(levels) if other is level)
    tiles = sum(other.tiles for other in levels)
    areas = [other.after.height * other.after.width for other in levels]
    tiles_before = sum(other.tiles for other in levels[:index])
    for number, segment in enumerate(level.segments(), 1):
        yield segment
        if progress is not None:
            coded = sum(other.coded_bytes for other in levels)
            progress(
                ConvertProgress(
                    index,
                    tiles_before + number,
                    tiles,
                    sum(areas[:index]) + areas[index] * number // level.tiles,
                    sum(areas),
                    coded,
                    sum(other.source_bytes for other in levels) - coded,
                )
            )


def _stays_svs(job: Job, levels: Sequence[PassingLevel]) -> bool:
    """True for a flat file that OpenSlide and others can take for Aperio's, as its source is."""
    return (
        job.options.layout == "flat"
        and is_aperio(job.metadata)
        # they take the second directory for the thumbnail, and tiled directories for levels
        and any(image.name == "thumbnail" for image in job.associated)
        and all(level.after.tile is not None for level in levels)
    )


def _with_resolution(job: Job, directory: Directory, main: Directory, svs: bool) -> Directory:
    downsample = main.layout.width / directory.layout.width
    tags = resolution_tags(job.metadata.mpp_x, job.metadata.mpp_y, downsample)
    # readers of SVS take reduced images for label and macro
    plain = svs or directory is main
    return directory.with_tags(tags if plain else (*tags, subfile_tag(1)))


def _description(job: Job, main: PassingLevel, svs: bool) -> bytes:
    """ImageDescription of level 0."""
    metadata = job.metadata
    if svs:
        return (metadata.description or "").encode()
    if job.options.layout == "flat":
        return flat_description(metadata, _software()).encode()
    return ome_description(main.after, metadata, _software(), job.associated)


def _software() -> str:
    return f"wsicodec {wsicodec.__version__}"


def _first_tags(job: Job, levels: Sequence[PassingLevel], description: bytes) -> list[Tag]:
    metadata = job.metadata
    tags = [
        ascii_tag(_DESCRIPTION, description),
        ascii_tag(_SOFTWARE, _software()),
        ascii_tag(TAG_RECORD, _record(job, levels).to_json()),
    ]
    if metadata.icc_profile:
        tags.append(bytes_tag(_ICC_PROFILE, metadata.icc_profile))
    if (model := job.reader.embedded_model()) is not None:
        tags.append(bytes_tag(TAG_MODEL, model))
    if job.codec == TRANSCODE:
        tags.append(
            bytes_tag(TAG_TRANSCODE, pack_origins(tuple(level.origin() for level in levels)))
        )
    elif job.carried is not None:
        tags.append(bytes_tag(TAG_TRANSCODE, job.carried))
    return tags


def _record(job: Job, levels: Sequence[PassingLevel]) -> FileRecord:
    """The record of the new file: these pixels went through no further lossy coding."""
    before, options = job.reader.info.record, job.options
    settings: dict[str, Any] = {"layout": options.layout}
    if options.strip_metadata:
        settings["strip_metadata"] = True
    transcoded = job.codec == TRANSCODE or job.carried is not None
    return FileRecord(
        wsicodec=wsicodec.__version__,
        codec=job.codec,
        quality=None,
        models=() if before is None else before.models,
        history=job.reader.info.history if options.history is None else options.history,
        levels=(FROM_SOURCE,) * len(levels),
        options={TRANSCODE_OPTION: True} if transcoded else {},
        settings=settings,
        source=None if options.source is None else options.source(),
        deidentified=options.deidentified,
        level_bytes=tuple(level.coded_bytes for level in levels),
    )


def _beside(tiff: BigTiff, image: AssociatedImage, job: Job) -> Directory:
    """An image beside the pyramid: its stored bytes where they can be taken over, else deflated."""
    layout, segments = _stored_beside(image, job) or _deflated(image)
    directory = tiff.store(layout, segments)
    if job.options.layout == "subifd":
        return directory
    # description and subfile type in Aperio's manner, by which readers of SVS know it
    name = " ".join(image.name.replace("\0", " ").split())
    line = f"{name} {layout.width}x{layout.height}"
    if name == "thumbnail":
        main = job.reader.levels[0]
        line = f"{main.width}x{main.height} -> {layout.width}x{layout.height} - {name}"
    kind = {"thumbnail": 0, "macro": 9}.get(name, 1)
    text = f"{_software()}\r\n{line}"
    return directory.with_tags((ascii_tag(_DESCRIPTION, text), subfile_tag(kind)))


def _stored_beside(image: AssociatedImage, job: Job) -> tuple[StoredLayout, Sequence[bytes]] | None:
    stored = image.stored
    if (
        stored is None
        or stored.planarconfig != 1
        or stored.photometric not in _PHOTOMETRICS
        or not all(stored.segments)
        # OpenSlide and others take a tiled directory of a flat file for a level
        or (stored.tile is not None and job.options.layout == "flat")
    ):
        return None
    if not job.options.strip_metadata:
        return stored, stored.segments
    try:
        segments = [
            cleaned(stored.compression, segment, stored.jpegtables) for segment in stored.segments
        ]
        tables = stored.jpegtables and cleaned(_JPEG, stored.jpegtables)
    except (FormatError, UnsupportedError):
        return None
    return replace(stored, jpegtables=tables), segments


def _deflated(image: AssociatedImage) -> tuple[StoredLayout, Sequence[bytes]]:
    """Horizontal differences in strips of about 256 KiB."""
    height, width = image.pixels.shape[:2]
    rows = max(1, 2**18 // (width * 3))
    differences = image.pixels.copy()
    differences[:, 1:] -= image.pixels[:, :-1]
    layout = StoredLayout(
        height=height,
        width=width,
        compression=_DEFLATE,
        photometric=_PHOTOMETRICS[0],
        tile=None,
        rows_per_strip=rows,
        predictor=2,
    )
    return layout, [
        zlib.compress(differences[top : top + rows].tobytes(), 9) for top in range(0, height, rows)
    ]


def _check_written(
    file: BinaryIO, job: Job, levels: Sequence[PassingLevel], places: Sequence[int] | None
) -> None:
    """Read the file with other code than wrote it, and compare every byte of its tiles.

    places: of the levels among the directories of a flat file; None for SubIFDs. Raises
    VerifyError, and SlideError for a file that holds what it must not.
    """
    import tifffile

    file.flush()
    file.seek(0)
    with named(f"{job.target}: what was written cannot be read"), tifffile.TiffFile(file) as tiff:
        tiff.pages.useframes = False
        if places is None:
            pages = [tiff.pages.first]
            for offset in tiff.pages.first.subifds or ():
                file.seek(offset)
                pages.append(tifffile.TiffPage(tiff, (0, len(pages) - 1)))
        else:
            pages = [tiff.pages[place].aspage() for place in places]
    for index, (level, page) in enumerate(zip(levels, pages, strict=True)):
        digest = LevelDigest(bytes(page.jpegtables) if page.jpegtables else None)
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.seek(offset)
            digest.add(file.read(count))
        if digest.digest() != level.digest() or int(page.compression) != level.after.compression:
            raise VerifyError(f"{job.target}: level {index} does not read back as it was written")
    file.seek(0, io.SEEK_END)
    if job.options.secrets:
        from wsicodec.convert.deidentify import leaks

        if found := leaks(file.name, job.options.secrets):
            raise SlideError(
                f"{job.target}: would still hold {len(found)} of the values that de-identification "
                "removes; nothing was written"
            )


def _level_report(index: int, level: PassingLevel) -> LevelReport:
    return LevelReport(
        index, level.after.height, level.after.width, level.tiles, level.coded_bytes, None
    )
