"""Files that wsicodec writes, as tifffile, OME readers, zarr and OpenSlide see them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from slides import CMU, DESCRIPTION, ICC, halved, tissue

import wsicodec
from wsicodec.errors import (
    FormatError,
    LimitError,
    SettingsError,
    SlideError,
    UnsupportedError,
)
from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG
from wsicodec.slide import omexml
from wsicodec.slide.ometiff import (
    CodedLevel,
    SlideMetadata,
    compression_tag,
    jpeg_colours,
    write_slide,
)
from wsicodec.slide.opening import open_slide
from wsicodec.slide.passport import TAG_PASSPORT
from wsicodec.slide.protocol import AssociatedImage, StoredImage
from wsicodec.slide.record import (
    TAG_MODEL,
    TAG_RECORD,
    FileRecord,
    ModelId,
    parse_record,
)

DATE = "2009-12-29T09:59:15+01:00"
METADATA = SlideMetadata("slide <1>", 0.2527, 0.2531, 40, DESCRIPTION, ICC, DATE)
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
    associated: Sequence[AssociatedImage] = (),
    passport: bytes | None = None,
    **options: Any,
) -> Path:
    coded = [CodedLevel(*lv.shape[:2], size, _tiles(lv, size, codec, **options)) for lv in levels]
    with path.open("wb+") as file:
        write_slide(
            file,
            coded,
            codec,
            metadata,
            record,
            model=model,
            layout=layout,
            associated=associated,
            passport=passport,
        )
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
        path = _write(
            tmp_path / "a.ome.tiff", levels, "jpeg", model=b"model\0bytes", passport=b"pass\0port"
        )
        with tifffile.TiffFile(path) as file:
            assert file.pages[0].tags.valueof(TAG_PASSPORT) == b"pass\0port"
        with open_slide(path) as slide:
            info = slide.info
            assert slide.embedded_model() == b"model\0bytes"
        assert (info.mpp_x, info.mpp_y, info.magnification) == (0.2527, 0.2531, 40)
        assert info.icc_profile == ICC
        assert info.description == DESCRIPTION  # with its CR, LF, < and &
        assert info.record == RECORD
        assert info.history == ("jpeg q70",)
        assert info.acquisition_date == DATE
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
            assert tags.valueof(TAG_PASSPORT) is None

    def test_unknown_is_left_out(self, tmp_path: Path, levels: list[np.ndarray]) -> None:
        path = _write(tmp_path / "a.ome.tiff", levels, "jpeg", metadata=SlideMetadata("x"))
        with open_slide(path) as slide:
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
        date = ome.images[0].acquisition_date
        assert (date and date.isoformat()) == metadata.acquisition_date
        if metadata.magnification:
            assert ome.instruments[0].objectives[0].nominal_magnification == 40
            assert ome.images[0].objective_settings.id == ome.instruments[0].objectives[0].id
            assert pixels.physical_size_x_unit.value == "µm"


class TestOmeXml:
    def test_text_that_xml_cannot_hold(self) -> None:
        image = omexml.OmeImage("a", 1, 1, description="a\x00b\x1fc\ud800d\r\n<&>\"'\té🔬")
        (found,) = omexml.parse(omexml.build([image], creator="x"))
        assert found.description == "a\ufffdb\ufffdc\ufffdd\r\n<&>\"'\té🔬"

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.builds(
                omexml.OmeImage,
                name=st.text(st.characters(codec="utf-8")),
                size_x=st.integers(1, 2**31 - 1),
                size_y=st.integers(1, 2**31 - 1),
                mpp_x=st.none() | st.floats(1e-6, 1e6),
                mpp_y=st.none() | st.floats(1e-6, 1e6),
                magnification=st.none() | st.floats(0.01, 1000),
                description=st.none() | st.text(st.characters(codec="utf-8")),
                acquisition_date=st.none() | st.datetimes().map(lambda date: date.isoformat()),
            ),
            min_size=1,
            max_size=3,
        )
    )
    def test_every_value_comes_back(self, images: list[omexml.OmeImage]) -> None:
        text = omexml.build(images, creator="x")
        for image, found in zip(images, omexml.parse(text), strict=True):
            assert (found.size_x, found.size_y, found.channels) == (image.size_x, image.size_y, 3)
            assert (found.mpp_x, found.mpp_y) == (image.mpp_x, image.mpp_y)
            assert found.magnification == image.magnification
            assert found.name == _allowed(image.name)
            assert found.description == (image.description and _allowed(image.description))
            assert found.acquisition_date == image.acquisition_date

    @pytest.mark.parametrize("beside", [0, 3])
    def test_is_valid_with_further_images(self, beside: int) -> None:
        ome_types = pytest.importorskip("ome_types")
        pytest.importorskip("lxml")
        main = omexml.OmeImage("a", 7, 8, 3, 1, 0.25, 0.5, 20, " \r\n", "2009-12-29")
        names = ["label", "macro", "thumbnail"][:beside]
        text = omexml.build([main, *(omexml.OmeImage(n, 3, 2) for n in names)], creator="é")
        ome_types.validate_xml(text)
        ome = ome_types.from_xml(text)
        assert [image.name for image in ome.images] == ["a", *names]
        blocks = [image.pixels.tiff_data_blocks[0] for image in ome.images]
        assert [block.ifd for block in blocks] == list(range(1 + beside))
        assert ome.images[0].acquisition_date.isoformat() == "2009-12-29T00:00:00"

    @pytest.mark.parametrize("date", ["", "yesterday", "12/29/09", "2009-13-01"])
    def test_date_that_is_none(self, date: str) -> None:
        with pytest.raises(SettingsError, match="ISO 8601"):
            omexml.build([omexml.OmeImage("a", 1, 1, acquisition_date=date)], creator="x")
        text = f"<OME><Image><AcquisitionDate>{date}</AcquisitionDate><Pixels/></Image></OME>"
        (image,) = omexml.parse(text)
        assert image.acquisition_date is None

    @pytest.mark.parametrize(
        "changes", [{"mpp_x": 0.0}, {"mpp_y": -0.25}, {"mpp_x": float("nan")}, {"size_x": 0}]
    )
    def test_what_the_schema_does_not_take(self, changes: dict[str, Any]) -> None:
        image = omexml.OmeImage(**{"name": "a", "size_x": 1, "size_y": 1, **changes})
        with pytest.raises(SettingsError):
            omexml.build([image], creator="x")

    def test_reading_needs_no_ome_types(self) -> None:
        code = (
            "import sys; from wsicodec.slide import omexml, open_slide; "
            "assert omexml.parse('<OME><Image><Pixels/></Image></OME>'); "
            "assert 'ome_types' not in sys.modules and 'pydantic' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
    def test_entities_are_refused(self, encoding: str) -> None:
        # 10^11 times "ha" if they were expanded
        entities = '<!ENTITY a0 "ha">' + "".join(
            f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)
        )
        text = f"<!DOCTYPE OME [{entities}]><OME><Image Name='&a11;'><Pixels/></Image></OME>"
        with pytest.raises(FormatError, match="document type"):
            omexml.parse(text.encode(encoding))
        external = '<!DOCTYPE OME SYSTEM "file:///etc/hostname"><OME/>'
        with pytest.raises(FormatError, match="document type"):
            omexml.parse(external)

    def test_sizes_are_limited(self) -> None:
        with pytest.raises(LimitError, match="characters"):
            omexml.parse("<OME>" + " " * omexml.MAX_XML)
        with pytest.raises(LimitError, match="elements"):
            omexml.parse("<OME>" + "<a/>" * omexml.MAX_ELEMENTS + "</OME>")
        # nested as deep as may be
        depth = omexml.MAX_ELEMENTS - 1
        assert omexml.parse("<OME>" + "<a>" * depth + "</a>" * depth + "</OME>") == []

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "<OME",
            "<html></html>",
            "<OME>&other;</OME>",
            "<OME>\ud800</OME>",
            b'<?xml version="1.0" encoding="other"?><OME/>',
            '<OME><Image><Pixels SizeX="many"/></Image></OME>',
            f'<OME><Image><Pixels SizeX="{"9" * 10_000}"/></Image></OME>',
        ],
    )
    def test_broken(self, text: str | bytes) -> None:
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

    def test_sizes_of_pixels_that_are_none(self) -> None:
        sizes = 'PhysicalSizeX="1e308" PhysicalSizeXUnit="m" PhysicalSizeY="-1"'
        (image,) = omexml.parse(f"<OME><Image><Pixels {sizes}/></Image></OME>")
        assert (image.mpp_x, image.mpp_y) == (None, None)


def _allowed(text: str) -> str:
    return "".join(
        c if c in "\t\n\r" or ("\x1f" < c not in "\ufffe\uffff") else "\ufffd" for c in text
    )


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
        value = {**RECORD.as_dict(), "of later": "keep"}
        assert parse_record(json.dumps(value)) == RECORD


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 300), (129, 1)])
@pytest.mark.parametrize("codec", ["jpeg", "lossless"])
def test_tiny_images(tmp_path: Path, shape: tuple[int, int], codec: str) -> None:
    image = tissue(*shape)
    path = _write(tmp_path / "a.ome.tiff", [image], codec, size=16)
    with open_slide(path) as slide:
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
        with open_slide(path) as slide:
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


class TestGlass:
    """Tiles of glass are one stream, whatever the types of the tags that point to it."""

    @pytest.mark.parametrize("layout", ["subifd", "flat"])
    @pytest.mark.parametrize(
        ("size", "types", "glass"),
        [
            # types of TileByteCounts by level: the third has one tile, its values lie in the tags
            (16, (3, 3, 3), ({0, 1, 300}, {5, 6}, {1, 2})),
            (128, (4, 4, 16), ({3, 4, 5, 11}, {1, 2}, {0})),
            (128, (4, 4, 16), (set(range(12)), {0, 1, 2, 3}, set())),
            (112, (4, 4, 16), ({0, 11}, {0, 3}, set())),
        ],
    )
    def test_is_stored_once(
        self,
        tmp_path: Path,
        levels: list[np.ndarray],
        layout: str,
        size: int,
        types: tuple[int, ...],
        glass: tuple[set[int], ...],
    ) -> None:
        plain = np.full((size, size, 3), 243, np.uint8)
        stream = wsicodec.encode(plain, codec="lossless", effort=2)
        coded, expected = [], []
        for level, empty in zip(levels, glass, strict=True):
            tiles = list(_tiles(level, size, "lossless", effort=2))
            chosen = [None if i in empty else tile for i, tile in enumerate(tiles)]
            assert chosen.count(None) == len(empty)
            coded.append(CodedLevel(*level.shape[:2], size, chosen, stream))
            columns = -(-level.shape[1] // size)
            image = level.copy()
            for i in empty:
                y, x = (size * n for n in divmod(i, columns))
                image[y : y + size, x : x + size] = 243
            expected.append(image)
        path = tmp_path / "a.tif"
        with path.open("wb+") as file:
            write_slide(file, coded, "lossless", METADATA, RECORD, layout=layout)
            assert file.tell() == file.seek(0, io.SEEK_END)
        stored = sum(len(t) for level in coded for t in level.tiles if t)
        once = len(stream) * sum(bool(empty) for empty in glass)
        with tifffile.TiffFile(path) as file:
            pages = [level.keyframe for level in file.series[0].levels]
            assert tuple(int(page.tags[325].dtype) for page in pages) == types
            for page, image, empty in zip(pages, expected, glass, strict=True):
                assert all(page.dataoffsets) and all(page.databytecounts)
                places = set(zip(page.dataoffsets, page.databytecounts, strict=True))
                assert len(places) == len(page.dataoffsets) - max(0, len(empty) - 1)
                np.testing.assert_array_equal(page.asarray(), image)
            places = {
                place
                for page in pages
                for place in zip(page.dataoffsets, page.databytecounts, strict=True)
            }
            assert sum(count for _, count in places) == stored + once

    def test_a_missing_tile_is_refused(self) -> None:
        tile = wsicodec.encode(tissue(16, 16), codec="jpeg")
        for tiles, glass in (
            ([tile, b""], None),
            ([b"", tile], tile),
            ([tile, None], None),
            ([None, None], b""),
            ([None, b""], tile),
        ):
            level = CodedLevel(16, 32, 16, tiles, glass)
            with pytest.raises(SlideError, match=r"tile \d of 2 has no bytes"):
                write_slide(io.BytesIO(), [level], "jpeg", METADATA, RECORD)

    def test_jpeg_glass_has_the_colours_of_the_rest(self) -> None:
        tiles = [wsicodec.encode(tissue(16, 16), codec="jpeg", subsampling="420"), None]
        glass = wsicodec.encode(tissue(16, 16), codec="jpeg", subsampling="444")
        with pytest.raises(SlideError, match="other colours"):
            level = CodedLevel(16, 32, 16, tiles, glass)
            write_slide(io.BytesIO(), [level], "jpeg", METADATA, RECORD)


class TestImagesBeside:
    @pytest.mark.parametrize("layout", ["subifd", "flat"])
    @pytest.mark.parametrize("codec", ["jpeg", "learned"])
    def test_come_back_by_name(
        self, tmp_path: Path, levels: list[np.ndarray], codec: str, layout: str
    ) -> None:
        images = [
            AssociatedImage(name, tissue(rows, columns, 200 * i))
            for i, (name, rows, columns) in enumerate(
                [("label", 41, 30), ("overview 2", 1, 1), ("macro", 200, 500), ("é", 3, 900)]
            )
        ]
        path = _write(tmp_path / "a.tif", levels, codec, layout=layout, associated=images)
        with open_slide(path) as slide:
            assert len(slide.levels) == 3
            assert set(slide.info.associated) == {image.name for image in images}
            for image in images:
                found = slide.read_associated(image.name)
                np.testing.assert_array_equal(found.pixels, image.pixels)

    @pytest.mark.parametrize("layout", ["subifd", "flat"])
    def test_stored_bytes_are_copied(
        self, tmp_path: Path, levels: list[np.ndarray], layout: str
    ) -> None:
        """JPEG with tables in a tag, and LZW with a predictor: what Aperio writes."""
        with open_slide(CMU) as slide:
            images = [slide.read_associated(name) for name in slide.info.associated]
        assert {image.stored.compression for image in images if image.stored} == {5, 7}
        path = _write(tmp_path / "a.tif", levels, "jpeg", layout=layout, associated=images)
        with open_slide(path) as slide:
            for image in images:
                found = slide.read_associated(image.name)
                assert found.stored == image.stored
                np.testing.assert_array_equal(found.pixels, image.pixels)

    @pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
    def test_ycbcr_jpeg_is_copied(
        self, tmp_path: Path, levels: list[np.ndarray], subsampling: tuple[int, int]
    ) -> None:
        source = tmp_path / "label.tif"
        tifffile.imwrite(
            source,
            tissue(113, 161),
            photometric="rgb",
            compression="jpeg",
            subsampling=subsampling,
            rowsperstrip=48,
            metadata=None,
        )
        with tifffile.TiffFile(source) as file:
            page, pixels = file.pages[0], file.asarray()
            stored = StoredImage(
                height=113,
                width=161,
                compression=7,
                photometric=6,
                tile=None,
                rows_per_strip=48,
                subsampling=subsampling,
                segments=tuple(
                    file.filehandle.seek(offset) and file.filehandle.read(count)
                    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
                ),
            )
        image = AssociatedImage("label", pixels, stored)
        path = _write(tmp_path / "a.tif", levels, "jpeg", associated=[image])
        with open_slide(path) as slide:
            found = slide.read_associated("label")
        assert found.stored == stored
        np.testing.assert_array_equal(found.pixels, pixels)

    @pytest.mark.parametrize(
        "changes",
        [
            {"segments": (b"no such thing",)},
            {"segments": (b"",)},
            {"segments": ()},
            {"compression": 65000},
            {"predictor": 2},
            {"photometric": 6, "compression": 7},
            {"height": 39},
            {"planarconfig": 2},
            {"tile": (16, 16), "rows_per_strip": None},
        ],
    )
    def test_pixels_count_and_not_what_is_said_to_be_stored(
        self, tmp_path: Path, levels: list[np.ndarray], changes: dict[str, Any]
    ) -> None:
        pixels = tissue(40, 60)
        good: dict[str, Any] = {
            "height": 40,
            "width": 60,
            "compression": 50002,
            "photometric": 2,
            "segments": (wsicodec.encode(pixels, codec="lossless"),),
            "tile": None,
            "rows_per_strip": 40,
        }
        image = AssociatedImage("macro", pixels, StoredImage(**{**good, **changes}))
        path = _write(tmp_path / "a.tif", levels, "jpeg", associated=[image])
        with open_slide(path) as slide:
            found = slide.read_associated("macro")
        np.testing.assert_array_equal(found.pixels, pixels)
        assert found.stored is not None
        assert found.stored.compression == 8

    def test_tiled_images_are_not_taken_for_levels(
        self, tmp_path: Path, levels: list[np.ndarray]
    ) -> None:
        pixels = np.ascontiguousarray(tissue(300, 420)[::2, ::2])  # of the shape of level 1
        stored = StoredImage(
            height=150,
            width=210,
            compression=50002,
            photometric=2,
            segments=tuple(_tiles(pixels, 112, "lossless")),
            tile=(112, 112),
            rows_per_strip=None,
        )
        image = AssociatedImage("macro", pixels, stored)
        for layout, copied in (("subifd", True), ("flat", False)):
            path = tmp_path / f"{layout}.tif"
            _write(path, levels[:1], "jpeg", layout=layout, associated=[image])
            with open_slide(path) as slide:
                assert len(slide.levels) == 1
                found = slide.read_associated("macro")
                assert (found.stored == stored) == copied
                np.testing.assert_array_equal(found.pixels, pixels)

    def test_a_jpeg_xl_file_keeps_them_in_less(
        self, tmp_path: Path, levels: list[np.ndarray]
    ) -> None:
        images = [AssociatedImage("macro", tissue(200, 500))]
        sizes = []
        for codec in ("jpeg", "jpegxl"):
            path = _write(tmp_path / "a.tif", levels[2:], codec, associated=images)
            with open_slide(path) as slide:
                stored = slide.read_associated("macro").stored
            assert stored is not None
            sizes.append(sum(map(len, stored.segments)))
        assert sizes[1] < sizes[0]

    def test_settings(self) -> None:
        level = CodedLevel(16, 16, 16, [wsicodec.encode(tissue(16, 16), codec="jpeg")])
        for images, match in (
            ([AssociatedImage("a", tissue(4, 4))] * 2, "same name"),
            ([AssociatedImage(str(i), tissue(4, 4)) for i in range(65)], "65 images"),
            ([AssociatedImage("a", np.zeros((4, 4), np.uint8))], "not uint8"),
            ([AssociatedImage("a", np.zeros((0, 4, 3), np.uint8))], "not uint8"),
            ([AssociatedImage("a", np.zeros((4, 4, 3), np.float32))], "not uint8"),
        ):
            with pytest.raises(SettingsError, match=match):
                write_slide(io.BytesIO(), [level], "jpeg", METADATA, RECORD, associated=images)


class TestSvs:
    """A flat file of an Aperio slide with its thumbnail stays an SVS."""

    THUMBNAIL = (AssociatedImage("thumbnail", tissue(30, 42)),)

    def _is_svs(self, path: Path, levels: list[np.ndarray], **options: Any) -> bool:
        _write(path, levels, "jpeg", layout="flat", **options)
        with open_slide(path) as slide:
            assert len(slide.levels) == 3
            metadata = options["metadata"]
            assert slide.info.mpp_x == pytest.approx(metadata.mpp_x, rel=1e-6)
            assert slide.info.mpp_y == pytest.approx(metadata.mpp_y, rel=1e-6)
            assert slide.info.magnification == metadata.magnification
            assert slide.info.description == metadata.description
            assert slide.info.record == RECORD
        with tifffile.TiffFile(path) as file:
            assert len(file.series[0].levels) == 3
            return bool(file.is_svs)

    def test_only_where_the_description_is_true(
        self, tmp_path: Path, levels: list[np.ndarray]
    ) -> None:
        path = tmp_path / "a.svs"
        for metadata, images, svs in (
            (SlideMetadata("a", 0.2527, 0.2527, 40, DESCRIPTION), self.THUMBNAIL, True),
            (SlideMetadata("a", 0.2527, 0.2531, 40, DESCRIPTION), self.THUMBNAIL, False),
            (SlideMetadata("a", 0.25, 0.25, 40, DESCRIPTION), self.THUMBNAIL, False),
            (SlideMetadata("a", 0.2527, 0.2527, 20, DESCRIPTION), self.THUMBNAIL, False),
            (SlideMetadata("a", 0.2527, 0.2527, 40, "x" + DESCRIPTION), self.THUMBNAIL, False),
            # readers take the second directory for the thumbnail
            (SlideMetadata("a", 0.2527, 0.2527, 40, DESCRIPTION), (), False),
        ):
            found = self._is_svs(path, levels, metadata=metadata, associated=images)
            assert found == svs


@pytest.mark.parametrize("mpp", [0.0637, 0.25, 0.2527, 1 / 3, 0.4990000000001, 7.77, 65.0])
def test_resolution_tags_are_exact(tmp_path: Path, levels: list[np.ndarray], mpp: float) -> None:
    path = _write(tmp_path / "a.tif", levels, "jpeg", metadata=SlideMetadata("a", mpp, mpp))
    with tifffile.TiffFile(path) as file:
        for level in file.series[0].levels:
            above, below = level.keyframe.tags.valueof(282)
            downsample = 420 / level.shape[1]
            assert 1e4 * below / above == pytest.approx(mpp * downsample, rel=1e-6)


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
