"""Files that wsicodec writes, as tifffile, OME readers, zarr and OpenSlide see them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from slides import DESCRIPTION, ICC, halved, tissue

import wsicodec
from wsicodec.errors import FormatError, SettingsError, SlideError, UnsupportedError
from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG
from wsicodec.slide import omexml
from wsicodec.slide.ometiff import (
    CodedLevel,
    SlideMetadata,
    compression_tag,
    jpeg_colours,
    write_slide,
)
from wsicodec.slide.reader import SlideReader
from wsicodec.slide.record import (
    TAG_MODEL,
    TAG_RECORD,
    FileRecord,
    ModelId,
    parse_record,
)

METADATA = SlideMetadata("slide <1>", 0.2527, 0.2531, 40, DESCRIPTION, ICC)
RECORD = FileRecord("0.1.0", "jpeg", 70, (ModelId("he-fast", "ab" * 32),), ("jpeg q70",))
TAGS = {
    "learned": TIFF_COMPRESSION_TAG,
    "jpeg": 7,
    "jpeg2000": 33005,
    "jpegxl": 50002,
    "lossless": 50002,
    "webp": 50001,
}


def _tiles(image: np.ndarray, size: int, codec: str, **options: Any) -> Iterator[bytes]:
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % size), (0, -width % size), (0, 0)), mode="edge")
    if codec == "learned":
        options["lossless"] = True  # needs no model
    for y in range(0, padded.shape[0], size):
        for x in range(0, padded.shape[1], size):
            yield wsicodec.encode(padded[y : y + size, x : x + size], codec=codec, **options)


def _write(
    path: Path,
    levels: list[np.ndarray],
    codec: str,
    *,
    size: int = 128,
    metadata: SlideMetadata = METADATA,
    record: FileRecord = RECORD,
    model: bytes | None = None,
    layout: str = "subifd",
    **options: Any,
) -> Path:
    coded = [CodedLevel(*lv.shape[:2], size, _tiles(lv, size, codec, **options)) for lv in levels]
    with path.open("wb+") as file:
        write_slide(file, coded, codec, metadata, record, model=model, layout=layout)
    return path


@pytest.fixture(scope="module")
def levels() -> list[np.ndarray]:
    first = tissue(300, 420)
    return [first, halved(first), halved(halved(first))]


@pytest.mark.parametrize("codec", TAGS)
def test_tifffile_reads_every_level(tmp_path: Path, levels: list[np.ndarray], codec: str) -> None:
    path = _write(tmp_path / "a.ome.tiff", levels, codec, quality=95)
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        assert file.is_ome
        assert len(file.pages) == 1
        assert int(file.pages[0].compression) == TAGS[codec] == compression_tag(codec)
        (series,) = file.series
        assert [level.shape for level in series.levels] == [lv.shape for lv in levels]
        assert [level.keyframe.is_reduced for level in series.levels] == [0, 1, 1]
        assert [level.keyframe.tile for level in series.levels] == [(128, 128)] * 3
        for level, image in zip(series.levels, levels, strict=True):
            decoded = level.asarray().astype(int)
            # colours: the mean of each channel moves by a fraction of a level
            assert np.abs(decoded.mean((0, 1)) - image.mean((0, 1))).max() < 1
            if codec in ("learned", "lossless"):
                np.testing.assert_array_equal(decoded, image)


@pytest.mark.parametrize("codec", TAGS)
def test_photometric_tells_the_truth(tmp_path: Path, levels: list[np.ndarray], codec: str) -> None:
    path = _write(tmp_path / "a.ome.tiff", levels, codec)
    with tifffile.TiffFile(path) as file:
        for level in file.series[0].levels:
            tags = level.keyframe.tags
            assert tags.valueof(262) == (6 if codec == "jpeg" else 2)
            assert tags.valueof(530) == ((2, 2) if codec == "jpeg" else None)
            assert tags.valueof(284) == 1
            assert tags.valueof(258) == (8, 8, 8)


@pytest.mark.parametrize(("name", "factors"), [("420", (2, 2)), ("422", (2, 1)), ("444", (1, 1))])
def test_jpeg_subsampling_is_the_streams(
    tmp_path: Path, levels: list[np.ndarray], name: str, factors: tuple[int, int]
) -> None:
    path = _write(tmp_path / "a.ome.tiff", levels, "jpeg", subsampling=name, quality=95)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].tags.valueof(530) == factors
        decoded = file.asarray().astype(int)
    assert np.abs(decoded.mean((0, 1)) - levels[0].mean((0, 1))).max() < 1
    # what the stream itself decodes to, pixel by pixel
    tile = wsicodec.encode(levels[0][:128, :128], codec="jpeg", subsampling=name, quality=95)
    np.testing.assert_array_equal(decoded[:128, :128], wsicodec.decode(tile))


def test_rgb_coded_jpeg_streams(tmp_path: Path) -> None:
    """Tiles in RGB, as Aperio's, get the tags that make readers leave them alone."""
    image = tissue(128, 128)
    stream = imagecodecs.jpeg8_encode(
        image, level=98, colorspace="rgb", outcolorspace="rgb", subsampling="444"
    )
    assert jpeg_colours(stream) == (False, (1, 1))
    path = tmp_path / "a.ome.tiff"
    with path.open("wb+") as file:
        write_slide(file, [CodedLevel(128, 128, 128, [stream])], "jpeg", METADATA, RECORD)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].photometric == 2
        assert np.abs(file.asarray().astype(int) - image).mean() < 2


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xc0\x00\x0b\x08\x00\x10\x00\x10\x01\x01\x11\x00",
        b"\xff\xd8\x00\x00\x00\x00\x00\x00",
        b"\xff\xd8\xff\xe0\xff\xff",
    ],
)
def test_broken_jpeg_headers(stream: bytes) -> None:
    with pytest.raises(FormatError):
        jpeg_colours(stream)


class TestMetadata:
    def test_comes_back(self, tmp_path: Path, levels: list[np.ndarray]) -> None:
        path = _write(tmp_path / "a.ome.tiff", levels, "jpeg", model=b"model\0bytes")
        with SlideReader(path) as slide:
            info = slide.info
            assert slide.embedded_model() == b"model\0bytes"
        assert (info.mpp_x, info.mpp_y, info.magnification) == (0.2527, 0.2531, 40)
        assert info.icc_profile == ICC
        assert info.description == DESCRIPTION  # with its CR, LF, < and &
        assert info.record == RECORD
        assert info.history == ("jpeg q70",)
        assert [lv.downsample for lv in info.levels] == pytest.approx([1, 2, 4])

    def test_in_tags_of_every_level(self, tmp_path: Path, levels: list[np.ndarray]) -> None:
        path = _write(tmp_path / "a.ome.tiff", levels, "jpeg")
        with tifffile.TiffFile(path) as file:
            for level, image in zip(file.series[0].levels, levels, strict=True):
                tags = level.keyframe.tags
                scale = levels[0].shape[1] / image.shape[1]
                assert tags.valueof(296) == 3  # centimetre
                for code, mpp in ((282, 0.2527), (283, 0.2531)):
                    above, below = tags.valueof(code)
                    assert 1e4 * below / above == pytest.approx(mpp * scale, rel=1e-6)
            tags = file.pages[0].tags
            assert tags.valueof(34675) == ICC
            assert tags.valueof(305) == "wsicodec 0.1.0"
            record = json.loads(tags.valueof(TAG_RECORD))
            assert record["models"] == [{"name": "he-fast", "sha256": "ab" * 32}]
            assert tags.valueof(TAG_MODEL) is None

    def test_unknown_is_left_out(self, tmp_path: Path, levels: list[np.ndarray]) -> None:
        path = _write(tmp_path / "a.ome.tiff", levels, "jpeg", metadata=SlideMetadata("x"))
        with SlideReader(path) as slide:
            info = slide.info
        assert info.mpp_x is info.mpp_y is info.magnification is info.icc_profile is None
        with tifffile.TiffFile(path) as file:
            assert "PhysicalSize" not in file.ome_metadata
            assert "Objective" not in file.ome_metadata

    @pytest.mark.parametrize("metadata", [METADATA, SlideMetadata("x")], ids=["full", "bare"])
    def test_ome_xml_is_valid(
        self, tmp_path: Path, levels: list[np.ndarray], metadata: SlideMetadata
    ) -> None:
        ome_types = pytest.importorskip("ome_types")
        pytest.importorskip("lxml")
        path = _write(tmp_path / "a.ome.tiff", levels, "jpeg", metadata=metadata)
        with tifffile.TiffFile(path) as file:
            text = file.ome_metadata
        ome_types.validate_xml(text)
        ome = ome_types.from_xml(text)
        pixels = ome.images[0].pixels
        assert (pixels.size_x, pixels.size_y, pixels.size_c) == (420, 300, 3)
        assert pixels.channels[0].samples_per_pixel == 3
        assert pixels.physical_size_x == metadata.mpp_x
        if metadata.magnification:
            assert ome.instruments[0].objectives[0].nominal_magnification == 40
            assert ome.images[0].objective_settings.id == ome.instruments[0].objectives[0].id
            assert pixels.physical_size_x_unit.value == "µm"


class TestOmeXml:
    def test_text_that_xml_cannot_hold(self) -> None:
        image = omexml.OmeImage("a", 1, 1, description="a\x00b\x1fc\ud800d\r\n<&>\"'\té🔬")
        (found,) = omexml.parse(omexml.build(image, creator="x"))
        assert found.description == "a\ufffdb\ufffdc\ufffdd\r\n<&>\"'\té🔬"

    @pytest.mark.parametrize(
        "text",
        ["", "<OME", "<html></html>", '<OME><Image><Pixels SizeX="many"/></Image></OME>'],
    )
    def test_broken(self, text: str) -> None:
        with pytest.raises(FormatError):
            omexml.parse(text)

    def test_magnification_of_the_only_objective(self) -> None:
        text = (
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2013-06"><Instrument>'
            '<Objective ID="o" NominalMagnification="20"/></Instrument>'
            '<Image Name="i"><Pixels SizeX="2" SizeY="3" SizeC="3"/></Image></OME>'
        )
        (image,) = omexml.parse(text)
        assert (image.magnification, image.size_y, image.mpp_x) == (20, 3, None)


class TestRecord:
    def test_comes_back(self) -> None:
        record = FileRecord(
            "1.2", "learned", None, (), ("jpeg",), ("source",), {"effort": 3}, {"psnr": {}}
        )
        assert parse_record(record.to_json()) == record
        assert record.to_json().isascii()

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("", FormatError),
            ("[]", FormatError),
            ("[" * 100_000, FormatError),
            ('{"format": "wsicodec-file", "version": 1}', FormatError),
            ('{"format": "wsicodec-file", "version": 2}', UnsupportedError),
        ],
    )
    def test_broken(self, text: str, error: type[Exception]) -> None:
        with pytest.raises(error):
            parse_record(text)

    def test_keys_of_later_releases_are_ignored(self) -> None:
        value = {**RECORD.as_dict(), "glass": "keep"}
        assert parse_record(json.dumps(value)) == RECORD


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 300), (129, 1)])
@pytest.mark.parametrize("codec", ["jpeg", "lossless"])
def test_tiny_images(tmp_path: Path, shape: tuple[int, int], codec: str) -> None:
    image = tissue(*shape)
    path = _write(tmp_path / "a.ome.tiff", [image], codec, size=16)
    with SlideReader(path) as slide:
        decoded = slide.read_region(0, 0, 0, *shape)
    assert decoded.shape == image.shape
    if codec == "lossless":
        np.testing.assert_array_equal(decoded, image)


def test_zarr_reads_levels(tmp_path: Path, levels: list[np.ndarray]) -> None:
    zarr = pytest.importorskip("zarr")
    path = _write(tmp_path / "a.ome.tiff", levels, "learned")
    for level, image in enumerate(levels):
        store = tifffile.imread(path, aszarr=True, level=level)
        np.testing.assert_array_equal(zarr.open(store, mode="r")[10:60, 20:70], image[10:60, 20:70])
        store.close()


def test_tiffslide_reads_regions(tmp_path: Path, levels: list[np.ndarray]) -> None:
    tiffslide = pytest.importorskip("tiffslide")
    path = _write(tmp_path / "a.ome.tiff", levels, "learned")
    with tiffslide.TiffSlide(path) as slide:
        assert slide.level_dimensions == tuple(lv.shape[1::-1] for lv in levels)
        assert slide.properties["tiffslide.mpp-x"] == pytest.approx(0.2527)
        region = np.asarray(slide.read_region((40, 20), 0, (100, 50)))
    np.testing.assert_array_equal(region[..., :3], levels[0][20:70, 40:140])


class TestFlatLayout:
    def test_levels_and_metadata(self, tmp_path: Path, levels: list[np.ndarray]) -> None:
        path = _write(tmp_path / "a.tif", levels, "jpeg", layout="flat")
        with tifffile.TiffFile(path) as file:
            assert len(file.pages) == 3
            assert not file.is_ome
            assert not file.is_svs
            assert [lv.shape for lv in file.series[0].levels] == [lv.shape for lv in levels]
        with SlideReader(path) as slide:
            info = slide.info
        assert len(info.levels) == 3
        assert info.mpp_x == pytest.approx(0.2527, rel=1e-6)
        assert info.mpp_y == pytest.approx(0.2531, rel=1e-6)
        assert info.magnification == 40
        assert info.description == DESCRIPTION
        assert info.icc_profile == ICC

    @pytest.mark.parametrize("layout", ["flat", "subifd"])
    def test_openslide(self, tmp_path: Path, levels: list[np.ndarray], layout: str) -> None:
        openslide = pytest.importorskip("openslide")
        path = _write(tmp_path / "a.tif", levels, "jpeg", layout=layout, quality=95)
        with openslide.OpenSlide(path) as slide:
            assert slide.level_count == (3 if layout == "flat" else 1)
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.2527, rel=1e-6)
            pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
        assert np.abs(pixels.astype(int).mean((0, 1)) - levels[0].mean((0, 1))).max() < 1


class TestRefused:
    @pytest.mark.parametrize("count", [0, 1, 3, 5])
    def test_wrong_number_of_tiles(self, count: int) -> None:
        tile = wsicodec.encode(tissue(128, 128), codec="jpeg")
        level = CodedLevel(256, 256, 128, [tile] * count)
        with pytest.raises(SlideError, match="tiles"):
            write_slide(io.BytesIO(), [level], "jpeg", METADATA, RECORD)

    def test_codecs_without_a_tag(self) -> None:
        with pytest.raises(UnsupportedError, match="avif"):
            compression_tag("avif")

    def test_settings(self) -> None:
        level = CodedLevel(16, 16, 16, [b""])
        with pytest.raises(SettingsError, match="layout"):
            write_slide(io.BytesIO(), [level], "jpeg", METADATA, RECORD, layout="round")
        with pytest.raises(SettingsError, match="levels"):
            write_slide(io.BytesIO(), [], "jpeg", METADATA, RECORD)
