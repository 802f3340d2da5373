"""Every slide at hand, by every codec, glass mode and container: other readers find all of it.

The default run takes a small mosaic and the bundled slide; the slow one every slide of the data
folder that can be opened, and a larger mosaic. It can be done in parts, at once or on machines
apart: ``-m slow -k subifd``, ``-k flat``, ``-k zarr``, ``-k TestGuide``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from slides import CMU, ROOT, data_slide, nothing_left

from benchmarks.mosaic import SECRETS, build_mosaic
from wsicodec.cli import _parser, main
from wsicodec.cli.common import Exit
from wsicodec.convert import ConvertReport, ConvertSettings, convert, verify
from wsicodec.convert.plan import CONVERT_CODECS, GLASS_MODES
from wsicodec.errors import UnsupportedError
from wsicodec.plugins import zarr as plugin
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import SlideInfo, SlideReader

CODECS = tuple(codec for codec in CONVERT_CODECS if codec != "copy")
KEPT_STREAMS: tuple[dict[str, Any], ...] = (
    {"codec": "copy"},
    {"codec": "jpegxl", "lossless_transcode": True},
)
CONTAINERS = {"subifd": ".ome.tiff", "flat": ".tif", "zarr": ".ome.zarr"}
# how hard JPEG XL tries is another test's affair
EFFORT: dict[str, dict[str, Any]] = {"jpegxl": {"effort": 3}, "lossless": {"effort": 1}}
# of data/slides, those that can be opened, beside the bundled one
DATA_SLIDES = (
    "tcga-cr-7395-01a-01-ts1.svs",
    "hamamatsu-test3-tritc.ndpi",
    "highdicom-sm-image.dcm",
    "kidney-48-5.tif",
    "os-1-detail.ome.tif",
)
WINDOW = 300

Image = np.ndarray


@dataclass(frozen=True)
class Wanted:
    """What a converted file must show.

    beside: images beside the pyramid, by name.
    """

    info: SlideInfo
    beside: dict[str, Image]

    def named(self, container: str) -> bool:
        """True where other readers learn of the objective, and of the images which is which.

        Of flat files they know Aperio's.
        """
        aperio = (self.info.description or "").startswith("Aperio ") and "thumbnail" in self.beside
        return container == "subifd" or aperio

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of every level."""
        return [(level.height, level.width) for level in self.info.levels]

    @property
    def mpp(self) -> tuple[float | None, float | None]:
        """µm per pixel across and down."""
        return self.info.mpp_x, self.info.mpp_y


@functools.cache
def wanted(source: Path) -> Wanted:
    """Of a source. Whether its reader is right, ``test_sources_are_read_as_by_openslide`` says."""
    with open_slide(source) as slide:
        beside = {name: slide.read_associated(name).pixels for name in slide.info.associated}
        return Wanted(slide.info, beside)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    plugin.register()  # a source checkout has no entry points
    yield tmp_path_factory.mktemp("matrix")
    mosaic.cache_clear()
    wanted.cache_clear()


@functools.cache
def mosaic(folder: Path, megapixels: float, glass: float = 0.6) -> Path:
    """A mosaic with all that is planted; one section, so that whole tiles are glass.

    Its label is small: it is coded without loss in every conversion.
    """
    path = folder / f"S21-004711-A3 {megapixels:g}.svs"
    return build_mosaic(path, megapixels, glass=glass, sections=1, label_shape=(150, 126))


def small_mosaic(folder: Path) -> Path:
    """1 Mpx, large enough for three levels and several tiles of glass."""
    return mosaic(folder, 1, 0.75)


def convert_and_check(
    source: Path, target: Path, container: str, settings: dict[str, Any], thorough: bool
) -> ConvertReport:
    """Convert, look at the file with every reader that knows its kind, and verify it.

    thorough: else nothing is decoded whole, and images beside the pyramid are left out.
    """
    kept_streams = settings in KEPT_STREAMS
    options = {} if kept_streams else EFFORT.get(settings["codec"], {})
    layout = "flat" if container == "flat" else "subifd"
    chosen = ConvertSettings(
        **settings,
        tissue="otsu",
        options=options,
        layout=layout,
        in_process=True,
        measure="none",  # verify measures
        associated=thorough,
    )
    report = convert(source, target, chosen)
    nothing_left(target.parent, target.name)
    expected = wanted(source)
    if thorough:
        assert report.dropped == ()
    else:
        expected = dataclasses.replace(expected, beside={})
    assert set(report.associated) == expected.beside.keys()
    with open_slide(target) as slide:
        by_wsicodec(slide, expected, container)
        seen = windows(slide)
    if container == "zarr":
        by_zarr(target, seen, expected)
        by_ome_zarr(target, seen, expected)
    else:
        by_tifffile(target, seen, expected, container)
        by_tiffslide(target, seen, expected, container)
        if container == "subifd":
            by_bioio(target, seen, expected, thorough)
        elif openslide_reads(slide.info.compression, expected):
            by_openslide(target, seen, expected)
    if not thorough:
        return report
    found = verify(target, source)
    assert found.ok, found.failures
    assert found.not_compared == ()
    assert found.overall is not None
    worst = found.overall.psnr_worst.psnr
    # black in place of glass would be less than 1 dB; of transcoded JPEG, decoders differ a little
    exact = chosen.lossless and not chosen.lossless_transcode
    assert worst == float("inf") if exact else worst > 20
    return report


def openslide_reads(compression: str, expected: Wanted) -> bool:
    """Whether OpenSlide opens a flat file: it knows JPEG-2000 in Aperio's files alone."""
    return compression == "jpeg" or (compression == "jpeg2000" and expected.named("flat"))


Window = tuple[int, int, int, Image]
"""Level, y, x, pixels."""


def windows(slide: SlideReader) -> list[Window]:
    """The first and last corner and the middle of every level."""
    seen = []
    for level in slide.levels:
        height, width = min(WINDOW, level.height), min(WINDOW, level.width)
        down, right = level.height - height, level.width - width
        for y, x in dict.fromkeys(((0, 0), (down // 2, right // 2), (down, right))):
            pixels = slide.read_region(level.index, y, x, height, width)
            seen.append((level.index, y, x, pixels))
    return seen


def by_wsicodec(slide: SlideReader, expected: Wanted, container: str) -> None:
    info = slide.info
    assert [(level.height, level.width) for level in slide.levels] == expected.shapes
    close(expected.mpp, (info.mpp_x, info.mpp_y))
    assert info.icc_profile == expected.info.icc_profile
    assert set(info.associated) == expected.beside.keys()
    for name, pixels in expected.beside.items():
        np.testing.assert_array_equal(slide.read_associated(name).pixels, pixels)
    assert info.magnification == expected.info.magnification
    if container != "flat" or expected.named(container):
        assert info.description == expected.info.description


def by_tifffile(path: Path, seen: list[Window], expected: Wanted, container: str) -> None:
    import zarr

    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        assert [level.shape[:2] for level in series.levels] == expected.shapes
        first = series.levels[0].keyframe
        assert first.tags.valueof(34675) == expected.info.icc_profile
        for tag, mpp in zip((282, 283), expected.mpp, strict=True):
            if mpp is None:
                assert first.tags.valueof(296) != 3
            else:
                above, below = first.tags.valueof(tag)
                assert 1e4 * below / above == pytest.approx(mpp, rel=1e-6)
        if expected.named(container):
            beside = {one.name.lower(): one.asarray() for one in tiff.series[1:]}
            same_images(beside, expected.beside)
    for level, y, x, pixels in seen:
        with tifffile.imread(path, aszarr=True, level=level) as store:
            array = zarr.open(store, mode="r")
            found = array[y : y + pixels.shape[0], x : x + pixels.shape[1]]
        np.testing.assert_array_equal(found, pixels)


def by_tiffslide(path: Path, seen: list[Window], expected: Wanted, container: str) -> None:
    import tiffslide

    with tiffslide.TiffSlide(path) as other:
        assert other.level_dimensions == tuple(shape[::-1] for shape in expected.shapes)
        close(expected.mpp, [other.properties[f"tiffslide.mpp-{axis}"] for axis in "xy"])
        if container == "flat" and expected.named(container):  # where it looks for it
            power = other.properties["tiffslide.objective-power"]
            assert power == expected.info.magnification
        for level, y, x, pixels in seen:
            if level and (y or x):
                continue  # its positions are those of level 0, which round in its own way
            region = other.read_region((x, y), level, pixels.shape[1::-1])
            np.testing.assert_array_equal(np.asarray(region)[..., :3], pixels)
        if expected.named(container):
            found = {name: image.convert("RGB") for name, image in other.associated_images.items()}
            same_images(found, expected.beside)


def by_openslide(path: Path, seen: list[Window], expected: Wanted) -> None:
    import openslide

    with openslide.OpenSlide(path) as other:
        assert other.level_dimensions == tuple(shape[::-1] for shape in expected.shapes)
        values = [other.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        close(expected.mpp, [None if value is None else float(value) for value in values])
        for level, y, x, pixels in seen:
            if level and (y or x):
                continue
            image = other.read_region((x, y), level, pixels.shape[1::-1])
            assert image.info.get("icc_profile") == expected.info.icc_profile
            region = np.asarray(image)
            assert (region[..., 3] == 255).all()
            np.testing.assert_array_equal(region[..., :3], pixels)
        if expected.named("flat"):
            power = other.properties.get("openslide.objective-power")
            assert (None if power is None else float(power)) == expected.info.magnification
            found = {name: image.convert("RGB") for name, image in other.associated_images.items()}
            same_images(found, expected.beside)


def by_bioio(path: Path, seen: list[Window], expected: Wanted, pixels_too: bool) -> None:
    import bioio_ome_tiff

    reader = bioio_ome_tiff.Reader(path)
    sizes = reader.physical_pixel_sizes
    close(expected.mpp, (sizes.X, sizes.Y))
    ome = reader.ome_metadata
    power = [one.nominal_magnification for it in ome.instruments for one in it.objectives]
    assert power == [expected.info.magnification] * (expected.info.magnification is not None)
    names = [image.name for image in ome.images]
    assert set(names[1:]) == expected.beside.keys()
    assert len(reader.scenes) == len(names)
    found = reader.get_image_dask_data("YXS")
    assert found.shape[:2] == expected.shapes[0]
    found = found.compute() if pixels_too else found
    for level, y, x, pixels in seen:
        if level == 0 and pixels_too:
            part = found[y : y + pixels.shape[0], x : x + pixels.shape[1]]
            np.testing.assert_array_equal(part, pixels)
    for scene, name in enumerate(names[1:], 1):
        reader.set_scene(scene)
        np.testing.assert_array_equal(reader.get_image_data("YXS"), expected.beside[name])


def by_zarr(path: Path, seen: list[Window], expected: Wanted) -> None:
    import zarr

    group = zarr.open_group(path, mode="r")
    for level, y, x, pixels in seen:
        array = group[str(level)]
        found = array[:, y : y + pixels.shape[0], x : x + pixels.shape[1]]
        np.testing.assert_array_equal(np.moveaxis(found, 0, -1), pixels)
    attributes = group.attrs["wsicodec"]
    assert attributes["magnification"] == expected.info.magnification
    if expected.info.icc_profile is None:
        assert "icc_profile" not in attributes["blobs"]
    else:
        assert group["wsicodec/icc_profile"][...].tobytes() == expected.info.icc_profile


def by_ome_zarr(path: Path, seen: list[Window], expected: Wanted) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    (node,) = Reader(parse_url(path))()
    assert [array.shape[1:] for array in node.data] == expected.shapes
    for level, y, x, pixels in seen:
        part = node.data[level][:, y : y + pixels.shape[0], x : x + pixels.shape[1]]
        np.testing.assert_array_equal(np.moveaxis(np.asarray(part), 0, -1), pixels)
    if expected.mpp[0] is not None:
        _, down, across = node.metadata["coordinateTransformations"][0][0]["scale"]
        close(expected.mpp, (across, down))
    for name, pixels in expected.beside.items():
        (image,) = Reader(parse_url(path / "associated" / name))()
        np.testing.assert_array_equal(np.moveaxis(np.asarray(image.data[0]), 0, -1), pixels)


def close(expected: Any, found: Any) -> None:
    """Same numbers up to a millionth, None where there is none."""
    for one, other in zip(expected, found, strict=True):
        if one is None:
            assert other is None
        else:
            assert other == pytest.approx(one, rel=1e-6)


def same_images(found: dict[str, Any], expected: dict[str, Image]) -> None:
    assert found.keys() == expected.keys()
    for name, pixels in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), pixels)


def place(folder: Path, source: Path, settings: dict[str, Any], container: str) -> Path:
    """An empty folder for one conversion, and the name of its output."""
    glass = settings.get("glass", "")
    name = f"{source.stem} {settings['codec']} {glass} {container}"
    (folder / name).mkdir()
    return folder / name / f"out{CONTAINERS[container]}"


Record = Callable[[str, object], None]


def check(
    folder: Path,
    source: Path,
    settings: dict[str, Any],
    container: str,
    record_property: Record,
    thorough: bool = True,
) -> None:
    target = place(folder, source, settings, container)
    if settings["codec"] == "webp" and container == "zarr":
        # tiles of wsicodec have no mode for it
        with pytest.raises(UnsupportedError, match="'webp'"):
            convert(source, target, ConvertSettings(**settings, tissue="otsu"))
        nothing_left(target.parent)
        return
    report = convert_and_check(source, target, container, settings, thorough)
    record_property("percent", 100 * report.target_bytes / report.source_bytes)
    record_property("modes", report.modes)
    if settings.get("glass") == "drop":
        assert report.tissue_share is not None
    if settings["codec"] == "learned" and report.source_bytes > 10**6:  # else metadata weigh more
        assert report.target_bytes < report.source_bytes


GRID = [(codec, glass) for codec in CODECS for glass in GLASS_MODES]


class TestMosaic:
    """Three levels, all three images beside them, a profile."""

    @pytest.mark.parametrize(("codec", "glass"), GRID)
    def test_ome_tiff(self, folder: Path, codec: str, glass: str, record_property: Record) -> None:
        settings = {"codec": codec, "glass": glass}
        check(folder, small_mosaic(folder), settings, "subifd", record_property)

    @pytest.mark.parametrize("container", ["flat", "zarr"])
    @pytest.mark.parametrize("codec", CODECS)
    def test_other_containers(
        self, folder: Path, codec: str, container: str, record_property: Record
    ) -> None:
        settings = {"codec": codec, "glass": "drop"}
        check(folder, small_mosaic(folder), settings, container, record_property)

    @pytest.mark.parametrize("container", ["subifd", "flat"])
    @pytest.mark.parametrize("settings", KEPT_STREAMS, ids=str)
    def test_kept_streams(
        self, folder: Path, settings: dict[str, Any], container: str, record_property: Record
    ) -> None:
        check(folder, small_mosaic(folder), settings, container, record_property)

    def test_tiles_of_glass_are_shared(self, folder: Path) -> None:
        """Else the mosaic would not try what ``drop`` does."""
        source = small_mosaic(folder)
        target = place(folder, source, {"codec": "shared"}, "subifd")
        settings = ConvertSettings(codec="jpeg", glass="drop", tissue="otsu", measure="none")
        assert convert(source, target, settings).modes["shared glass"] > 1


@pytest.mark.parametrize(
    ("codec", "glass"), [("learned", "keep"), *((codec, "drop") for codec in CODECS)]
)
def test_bundled_slide(folder: Path, codec: str, glass: str, record_property: Record) -> None:
    """The rest of its grid is in ``test_every_slide``."""
    settings = {"codec": codec, "glass": glass}
    check(folder, CMU, settings, "subifd", record_property, thorough=False)


class TestNoLeak:
    """Of what is planted in a mosaic, whatever the codec and the container."""

    @pytest.mark.parametrize("container", CONTAINERS)
    @pytest.mark.parametrize(
        "settings", [*({"codec": codec} for codec in CODECS), *KEPT_STREAMS], ids=str
    )
    def test_file_holds_no_secret(
        self, folder: Path, tmp_path: Path, settings: dict[str, Any], container: str
    ) -> None:
        if container == "zarr" and (settings in KEPT_STREAMS or settings["codec"] == "webp"):
            return  # refused; see test_every_reader and test_passthrough
        source = mosaic(folder, 0.3, 0.3)
        assert held(source) == set(SECRETS)
        target = tmp_path / f"1{CONTAINERS[container]}"
        layout = "flat" if container == "flat" else "subifd"
        options = {} if settings in KEPT_STREAMS else EFFORT.get(settings["codec"], {})
        chosen = ConvertSettings(
            **settings, deidentify=True, tissue="otsu", layout=layout, options=options, jobs=1
        )
        convert(source, target, chosen)
        nothing_left(tmp_path, target.name)
        assert not held(target)
        content = content_of(target)
        assert b"S21-004711" not in content
        assert b"Mustermann" not in content
        with open_slide(target) as slide:
            assert slide.info.associated == ("thumbnail",)
            assert (slide.info.mpp_x, slide.info.magnification) == (0.499, 20)
        assert verify(target, source, jobs=1).ok


def content_of(path: Path) -> bytes:
    """Bytes of a file, or of all files of a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return b"\0".join(file.read_bytes() for file in files if file.is_file())


def held(path: Path) -> set[str]:
    """Places of SECRETS whose values a file holds, by the plainest search."""
    content = content_of(path)
    codings = ("utf-8", "utf-16-le", "utf-16-be")
    return {
        where
        for where, text in SECRETS.items()
        if any(text.encode(coding) in content for coding in codings)
    }


SOURCES: dict[str, Callable[[Path], Path]] = {
    "mosaic": lambda folder: mosaic(folder, 8, 0.4),
    CMU.name: lambda _: CMU,
    **{name: functools.partial(lambda name, _: data_slide(name), name) for name in DATA_SLIDES},
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_read_as_by_openslide(folder: Path, name: str) -> None:
    """What everything else here is compared with."""
    import openslide

    source = small_mosaic(folder) if name == "mosaic" else SOURCES[name](folder)
    expected = wanted(source)
    if openslide.OpenSlide.detect_format(source) in (None, "generic-tiff"):
        assert (expected.info.magnification, expected.beside) == (None, {})
        return
    with openslide.OpenSlide(source) as other:
        assert other.level_dimensions == tuple(shape[::-1] for shape in expected.shapes)
        values = [other.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        close(expected.mpp, [None if value is None else float(value) for value in values])
        power = other.properties.get("openslide.objective-power")
        assert (None if power is None else float(power)) == expected.info.magnification
        image = other.read_region((0, 0), 0, (8, 8))
        assert image.info.get("icc_profile") == expected.info.icc_profile
        assert other.associated_images.keys() == expected.beside.keys()
        for key, pixels in expected.beside.items():
            found = np.asarray(other.associated_images[key].convert("RGB")).astype(int)
            assert np.abs(found - pixels).mean() < 1  # of two decoders


@pytest.mark.slow
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("codec", "glass"), GRID)
@pytest.mark.parametrize("name", SOURCES)
def test_every_slide(
    folder: Path, name: str, codec: str, glass: str, container: str, record_property: Record
) -> None:
    source = SOURCES[name](folder)
    check(folder, source, {"codec": codec, "glass": glass}, container, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["subifd", "flat"])
@pytest.mark.parametrize("settings", KEPT_STREAMS, ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_every_slide_as_it_is(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    container: str,
    record_property: Record,
) -> None:
    source = SOURCES[name](folder)
    info = wanted(source).info
    tiff = info.format in ("svs", "ome-tiff", "tiff")
    if not tiff or (settings["codec"] != "copy" and info.compression != "jpeg"):
        target = place(folder, source, settings, container)
        words = "no level has JPEG tiles" if tiff else "cannot be copied as they are"
        with pytest.raises(UnsupportedError, match=words):
            convert(source, target, ConvertSettings(**settings))
        nothing_left(target.parent)
        return
    check(folder, source, settings, container, record_property)


GUIDE = ROOT / "docs" / "slides.md"


def guide_commands() -> list[list[str]]:
    """Arguments of the indented ``wsicodec ...`` lines of the guide, in their order."""
    lines = re.findall(r"^ {4}wsicodec (.+)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


class TestGuide:
    """docs/slides.md: its commands run as they stand."""

    @pytest.mark.parametrize("slide", ["mosaic", pytest.param("bundled", marks=pytest.mark.slow)])
    def test_commands(
        self,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        slide: str,
    ) -> None:
        source = CMU if slide == "bundled" else mosaic(folder, 0.1, 0.3)
        (tmp_path / "slides").mkdir()
        for name in ("slide.svs", "slides/a.svs"):
            (tmp_path / name).write_bytes(source.read_bytes())
        monkeypatch.chdir(tmp_path)
        commands = [command for command in guide_commands() if "--scheduler" not in command]
        assert {command[0] for command in commands} >= {
            "convert", "info", "verify", "export", "restore", "report", "convert-batch"
        }  # fmt: skip
        for command in commands:
            code = main(command)
            assert code == 0, (command, capsys.readouterr())
        assert sorted(path.name for path in (tmp_path / "converted").glob("*.tiff")) == [
            "a.ome.tiff"
        ]
        assert not list(tmp_path.glob(".*"))  # no work folder is left

    def test_tests_that_it_names_are_there(self) -> None:
        found = 0
        for cell in re.findall(
            r"^\| .+ \| (`test_.+`) \|$", GUIDE.read_text("utf-8"), re.MULTILINE
        ):
            for group in cell.split("; "):
                file, _, names = group.replace("`", "").partition("::")
                content = (ROOT / "tests" / file).read_text(encoding="utf-8")
                for name in re.findall(r"\w*[tT]est\w+", names):
                    assert re.search(rf"^ *(class|def) {name}\b", content, re.MULTILINE), group
                    found += 1
        assert found > 20

    def test_every_option_is_one(self) -> None:
        """Of those that need a cluster, too."""
        (command,) = (one for one in guide_commands() if "--scheduler" in one)
        arguments = _parser().parse_args(command)
        assert arguments.scheduler.startswith("tcp://")

    def test_exit_codes(self) -> None:
        codes = re.findall(r"^\| (\d+) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
        assert list(map(int, codes)) == list(map(int, Exit))
