"""OpenSlideReader and open_slide: vendors' formats, told by their content, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from slides import CMU, data_slide, tissue, write_svs

from wsicodec.convert.source import Source
from wsicodec.errors import (
    LimitError,
    RuntimeMissingError,
    SettingsError,
    SlideError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.slide import openslide as module
from wsicodec.slide import parts
from wsicodec.slide.dates import aperio_date, iso_date, openslide_date, tiff_date
from wsicodec.slide.opening import open_slide
from wsicodec.slide.openslide import OpenSlideReader
from wsicodec.slide.parts import slide_bytes, slide_files
from wsicodec.slide.tiff import TiffReader

TILE = 128
MARGIN = 2, 4  # empty tiles left of and above the tissue of a made MIRAX slide


def _levels(image: np.ndarray, *steps: int) -> list[np.ndarray]:
    return [np.ascontiguousarray(image[::step, ::step]) for step in steps]


def write_mirax(path: Path, image: np.ndarray) -> Path:
    """Two levels of PNG tiles amid 12 x 16 places, most of them empty."""
    places = 12, 16
    folder = path.with_suffix("")
    folder.mkdir()
    path.write_bytes(b"the image of the slide")
    name = "0123456789abcdef0123456789abcdef"
    sections = [
        f"[GENERAL]\nSLIDE_ID={name}\nIMAGENUMBER_X={places[0]}\nIMAGENUMBER_Y={places[1]}",
        "OBJECTIVE_MAGNIFICATION=20\nSLIDE_CREATIONDATETIME=14/12/2009 14:10:20",
        "[HIERARCHICAL]\nINDEXFILE=Index.dat\nHIER_COUNT=1\nNONHIER_COUNT=0",
        "HIER_0_NAME=Slide zoom level\nHIER_0_COUNT=2",
        *(f"HIER_0_VAL_{n}=Zoom{n}\nHIER_0_VAL_{n}_SECTION=LEVEL_{n}" for n in range(2)),
        "[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat",
        *(
            f"[LEVEL_{n}]\nOVERLAP_X=0\nOVERLAP_Y=0\nMICROMETER_PER_PIXEL_X={0.25 * 2**n}\n"
            f"MICROMETER_PER_PIXEL_Y={0.25 * 2**n}\nIMAGE_FORMAT=PNG\nIMAGE_CONCAT_FACTOR={n}\n"
            f"IMAGE_FILL_COLOR_BGR=16777215\nDIGITIZER_WIDTH={TILE}\nDIGITIZER_HEIGHT={TILE}"
            for n in range(2)
        ),
    ]
    (folder / "Slidedat.ini").write_text("\n".join(sections) + "\n")
    data = bytearray(b"01.02" + name.encode())
    lists = []
    for n, level in enumerate(_levels(image, 1, 2)):
        entries = []
        for row in range(level.shape[0] // TILE):
            for column in range(level.shape[1] // TILE):
                part = level[row * TILE :, column * TILE :][:TILE, :TILE]
                coded = imagecodecs.png_encode(np.ascontiguousarray(part))
                place = (MARGIN[1] + row * 2**n) * places[0] + MARGIN[0] + column * 2**n
                entries.append(struct.pack("<4i", place, len(data), len(coded), 0))
                data += coded
        lists.append(entries)
    (folder / "Data0000.dat").write_bytes(data)
    index = b"01.02" + name.encode()
    at = len(index) + 8 + 8
    pointers, pages = b"", b""
    index += struct.pack("<2i", len(index) + 8, 0)
    for entries in lists:
        pointers += struct.pack("<i", at + len(pages))
        pages += struct.pack("<4i", 0, at + len(pages) + 8, len(entries), 0) + b"".join(entries)
    (folder / "Index.dat").write_bytes(index + pointers + pages)
    return path


def write_scn(path: Path, image: np.ndarray) -> Path:
    """A macro of 2048 x 1024 pixels, and a scan of two levels at (300, 200) in it; as Leica's."""
    nm = 250
    height, width = image.shape[:2]

    def described(levels: list[np.ndarray], ifd: int, view: tuple[int, ...], power: str) -> str:
        sizes = [f'sizeX="{level.shape[1]}" sizeY="{level.shape[0]}"' for level in levels]
        dimensions = "".join(
            f'<dimension {size} r="{n}" ifd="{ifd + n}"/>' for n, size in enumerate(sizes)
        )
        x, y, across, down = (value * nm for value in view)
        return (
            "<image><creationDate>2010-10-12T19:57:50.92Z</creationDate><device model='L'/>"
            f"<pixels {sizes[0]}>{dimensions}</pixels>"
            f'<view offsetX="{x}" offsetY="{y}" sizeX="{across}" sizeY="{down}"/>'
            f"<scanSettings><objectiveSettings><objective>{power}</objective></objectiveSettings>"
            "<illuminationSettings><numericalAperture>0.4</numericalAperture>"
            "<illuminationSource>brightfield</illuminationSource></illuminationSettings>"
            "</scanSettings></image>"
        )

    macro = tissue(128, 64)
    levels = _levels(image, 1, 4)
    text = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection sizeX="{1024 * nm}" sizeY="{2048 * nm}">'
        + described([macro], 0, (0, 0, 1024, 2048), "0.6")
        + described(levels, 1, (200, 300, width, height), "40")
        + "</collection></scn>"
    )
    _write_pages(path, [macro, *levels], [text, None, None])
    return path


def write_philips(path: Path, image: np.ndarray) -> Path:
    def attribute(name: str, group: int, element: int, kind: str, value: str) -> str:
        place = f'Group="0x{group:04X}" Element="0x{element:04X}"'
        return f'<Attribute Name="{name}" {place} PMSVR="{kind}">{value}</Attribute>'

    def spacing(level: int) -> str:
        return f"&quot;{0.00025 * 2**level}&quot;"

    levels = _levels(image, 1, 2)
    pixels = "".join(
        '<DataObject ObjectType="PixelDataRepresentation">'
        + attribute("DICOM_PIXEL_SPACING", 0x28, 0x30, "IDoubleArray", f"{spacing(n)} {spacing(n)}")
        + attribute("PIIM_PIXEL_DATA_REPRESENTATION_NUMBER", 0x1001, 0x8B02, "IUInt16", str(n))
        + "</DataObject>"
        for n in range(len(levels))
    )
    slide = (
        '<DataObject ObjectType="DPScannedImage">'
        + attribute("PIM_DP_IMAGE_TYPE", 0x301D, 0x1004, "IString", "WSI")
        + attribute(
            "PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE",
            0x1001,
            0x8B01,
            "IDataObjectArray",
            f"<Array>{pixels}</Array>",
        )
        + "</DataObject>"
    )
    text = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        + attribute("DICOM_ACQUISITION_DATETIME", 0x8, 0x2A, "IString", "20160718122300.000000")
        + attribute(
            "PIM_DP_SCANNED_IMAGES", 0x301D, 0x1003, "IDataObjectArray", f"<Array>{slide}</Array>"
        )
        + "</DataObject>"
    )
    _write_pages(path, levels, [text, None], software="Philips DP v1.0")
    return path


def write_trestle(path: Path, image: np.ndarray) -> Path:
    text = (
        "Background Color=ffffff;White Balance=ff8080;Objective Power=40;JPEG Quality=30;"
        "OverlapsXY= 0 0 0 0"
    )
    _write_pages(path, _levels(image, 1, 2), [text, text], software="MedScan 1.0")
    return path


def write_bif(path: Path, image: np.ndarray) -> Path:
    """Tiles are numbered from below, rows back and forth, and their neighbours named."""
    rows, columns = image.shape[0] // TILE, image.shape[1] // TILE

    def number(row: int, column: int) -> int:
        up = rows - 1 - row
        return up * columns + (column if up % 2 == 0 else columns - 1 - column) + 1

    joints = [
        (number(r, c), number(r, c + 1), "RIGHT") for r in range(rows) for c in range(columns - 1)
    ]
    joints += [
        (number(r + 1, c), number(r, c), "UP") for r in range(rows - 1) for c in range(columns)
    ]
    joined = "".join(
        f'<TileJointInfo FlagJoined="1" Confidence="100" Direction="{way}" Tile1="{one}" '
        f'Tile2="{two}" OverlapX="0" OverlapY="0"/>'
        for one, two, way in joints
    )
    scan = '<iScan Magnification="40" ScanRes="0.25"/>'
    text = (
        f'<EncodeInfo Ver="2"><SlideInfo>{scan}</SlideInfo><SlideStitchInfo><ImageInfo '
        f'AOIScanned="1" AOIIndex="0" Width="{TILE}" Height="{TILE}" NumRows="{rows}" '
        f'NumCols="{columns}" Pos-X="0" Pos-Y="0">{joined}</ImageInfo></SlideStitchInfo>'
        '<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    )

    def xmp(text: str) -> list[tuple[int, int, int, bytes, bool]]:
        return [(700, 1, len(text), text.encode(), True)]

    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        label = np.ascontiguousarray(image[::8, ::8])
        writer.write(
            label,
            photometric="rgb",
            description="Label_Image",
            extratags=xmp(f"<Metadata>{scan}</Metadata>"),
            metadata=None,
        )
        for n, level in enumerate(_levels(image, 1, 2)):
            writer.write(
                level,
                photometric="rgb",
                tile=(TILE, TILE),
                compression="jpeg",
                compressionargs={"level": 95},
                subsampling=(1, 1),
                description=f"level={n} mag={40 / 2**n:g} quality=90",
                extratags=xmp(text) if n == 0 else (),
                metadata=None,
            )
    return path


def write_vms(path: Path, image: np.ndarray) -> Path:
    for name, level in zip(("a.jpg", "map.jpg"), _levels(image, 1, 4), strict=True):
        Image.fromarray(level).save(
            path.parent / name, quality=95, subsampling=0, restart_marker_blocks=4
        )
    path.write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
        "ImageFile=a.jpg\nMapFile=map.jpg\nSourceLens=20\nPhysicalWidth=160000\n"
        "PhysicalHeight=128000\nCreated=2007/03/04\n"
    )
    return path


def _write_pages(
    path: Path, images: list[np.ndarray], texts: list[str | None], software: str | None = None
) -> None:
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, (image, text) in enumerate(zip(images, texts, strict=True)):
            writer.write(
                image,
                photometric="rgb",
                tile=(TILE, TILE),
                compression="jpeg",
                compressionargs={"level": 95},
                subsampling=(1, 1),
                description=text,
                subfiletype=min(number, 1),
                software=software,
                metadata=None,
            )


Writer = Callable[[Path, np.ndarray], Path]
# file name, writer, what info says: format, compression, history, date
MADE: list[tuple[str, Writer, str, str, tuple[str, ...], str | None]] = [
    ("a.mrxs", write_mirax, "mirax", "png", (), "2009-12-14T14:10:20"),
    ("a.scn", write_scn, "leica", "jpeg", ("jpeg",), "2010-10-12T19:57:50.920000+00:00"),
    ("a.tiff", write_philips, "philips", "jpeg", ("jpeg",), "2016-07-18T12:23:00"),
    ("b.tif", write_trestle, "trestle", "jpeg", ("jpeg q30",), None),
    ("a.bif", write_bif, "ventana", "jpeg", ("jpeg",), None),
    ("a.vms", write_vms, "hamamatsu", "jpeg", ("jpeg",), "2007-03-04"),
]


def _assert_as_openslide(path: Path, *, levels: int, first: int = 0) -> None:
    """Levels, and rectangles of them, are what OpenSlide gives, over the background colour.

    first: level to look at first.
    """
    rng = np.random.default_rng(2)
    with openslide.OpenSlide(path) as theirs, OpenSlideReader(path) as ours:
        assert len(ours.levels) == levels == theirs.level_count
        left = int(theirs.properties.get("openslide.bounds-x", 0))
        top = int(theirs.properties.get("openslide.bounds-y", 0))
        for level, scale in zip(ours.levels, theirs.level_downsamples, strict=True):
            assert scale == int(scale)
            if level.index < first:
                continue
            at = round(left / scale) * int(scale), round(top / scale) * int(scale)
            picture = theirs.read_region(at, level.index, (level.width, level.height))
            # Pillow's own blending, over white as all of these have it
            whole = Image.new("RGBA", picture.size, "white")
            whole.alpha_composite(picture)
            expected = np.asarray(whole)[..., :3]
            region = ours.read_region(level.index, 0, 0, level.height, level.width)
            np.testing.assert_array_equal(region, expected)
            for _ in range(5):
                y, x = int(rng.integers(level.height)), int(rng.integers(level.width))
                h = int(rng.integers(level.height - y)) + 1
                w = int(rng.integers(level.width - x)) + 1
                region = ours.read_region(level.index, y, x, h, w)
                np.testing.assert_array_equal(region, expected[y : y + h, x : x + w])
        for name, picture in theirs.associated_images.items():
            pixels = ours.read_associated(name).pixels
            np.testing.assert_array_equal(pixels, np.asarray(picture)[..., :3])
            assert pixels.flags.writeable


@pytest.mark.parametrize(
    ("name", "write", "kind", "compression", "history", "date"), MADE, ids=[m[2] for m in MADE]
)
def test_vendors(
    tmp_path: Path,
    name: str,
    write: Writer,
    kind: str,
    compression: str,
    history: tuple[str, ...],
    date: str | None,
) -> None:
    image = tissue(512, 640)
    if write is write_mirax:
        image = tissue(512, 768)
    path = write(tmp_path / name, image)
    with open_slide(path) as slide:
        assert isinstance(slide, OpenSlideReader)
        info = slide.info
        assert (info.format, info.vendor, info.photometric) == (kind, kind, "rgb")
        assert (info.compression, info.history) == (compression, history)
        assert info.acquisition_date == date
        assert info.as_dict()["vendor"] == kind
        # whatever margins the format has, the slide is what was scanned
        assert (slide.levels[0].height, slide.levels[0].width) == image.shape[:2]
        pixels = slide.read_region(0, 0, 0, *image.shape[:2])
        assert np.abs(pixels.astype(int) - image).mean() < (0.01 if kind == "mirax" else 4)
        assert slide.embedded_model() is None
    # OpenSlide makes levels of JPEG's own reductions
    _assert_as_openslide(path, levels=6 if kind == "hamamatsu" else 2)


class TestBounds:
    def test_empty_margins_are_cut_off_every_level(self, tmp_path: Path) -> None:
        image = tissue(512, 768)
        path = write_mirax(tmp_path / "a.mrxs", image)
        with openslide.OpenSlide(path) as theirs:
            assert theirs.dimensions == (12 * TILE, 16 * TILE)
        with open_slide(path) as slide:
            assert [(lv.height, lv.width, lv.downsample) for lv in slide.levels] == [
                (512, 768, 1),
                (256, 384, 2),
            ]
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 512, 768), image)
            np.testing.assert_array_equal(slide.read_region(1, 0, 0, 256, 384), image[::2, ::2])
            assert (slide.info.mpp_x, slide.info.mpp_y, slide.info.magnification) == (
                0.25,
                0.25,
                20,
            )
            with pytest.raises(SettingsError, match="not inside"):
                slide.read_region(0, 0, 0, 513, 768)

    def test_of_no_use(self) -> None:
        """Bounds are a stranger's numbers."""
        size = 100, 80
        for left, top, width, height in [
            ("x", 0, 5, 5),
            (200, 0, 5, 5),
            (0, 0, 0, 5),
            (5, 5, -3, 3),
        ]:
            told = {
                f"openslide.bounds-{name}": str(value)
                for name, value in [("x", left), ("y", top), ("width", width), ("height", height)]
            }
            assert module._bounds(told, size) == (0, 0, 100, 80)
        assert module._bounds({}, size) == (0, 0, 100, 80)
        told = {"x": "-10", "y": "70", "width": "50", "height": "50"}
        told = {f"openslide.bounds-{name}": value for name, value in told.items()}
        assert module._bounds(told, size) == (0, 70, 40, 10)

    def test_a_level_starts_at_the_pixel_nearest_to_the_bounds(self) -> None:
        grids = module._grids(((1000, 800), (250, 200)), (1.0, 4.0), (203, 101, 402, 303))
        assert [(g.left, g.top, g.width, g.height) for g in grids] == [
            (203, 101, 402, 303),
            (51, 25, 100, 76),
        ]


class TestTransparency:
    def test_background_colour(self) -> None:
        image = np.zeros((1, 3, 4), np.uint8)
        image[0, :, 3] = 0, 128, 255
        image[0, :, 0] = 200
        assert module._opaque(image, (10, 255, 0)).tolist() == [
            [[10, 255, 0], [105, 127, 0], [200, 0, 0]]
        ]
        every = np.arange(256, dtype=np.uint8)
        image = np.stack([*np.meshgrid(every, every), np.zeros((256, 256), np.uint8)], -1)
        image = image[..., [0, 2, 2, 1]]  # red by columns, alpha by rows
        red = module._opaque(image, (255, 255, 255))[..., 0]
        exact = every[None].astype(int) * every[:, None] + 255 * (255 - every[:, None].astype(int))
        np.testing.assert_array_equal(red, np.floor(exact / 255 + 0.5))

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("0a0B0c", (10, 11, 12)), ("", (255, 255, 255)), ("red", (255, 255, 255))],
    )
    def test_its_property(self, text: str, expected: tuple[int, ...]) -> None:
        assert module._background({"openslide.background-color": text}) == expected


class TestRealSlides:
    def test_ndpi(self) -> None:
        path = data_slide("hamamatsu-test3-tritc.ndpi")
        with open_slide(path) as slide:
            info = slide.info
            assert isinstance(slide, OpenSlideReader)
            assert (info.format, info.compression, info.history) == ("hamamatsu", "jpeg", ("jpeg",))
            assert [(lv.height, lv.width) for lv in slide.levels][:2] == [
                (4864, 3968),
                (2432, 1984),
            ]
            assert [lv.downsample for lv in slide.levels] == [2.0**n for n in range(7)]
            assert (slide.levels[0].tile_height, slide.levels[0].tile_width) == (8, 3968)
            assert info.mpp_x == info.mpp_y == pytest.approx(1e4 / 43826)
            assert (info.magnification, info.associated) == (40, ("macro",))
            assert info.acquisition_date == "2011-05-23"
            assert info.icc_profile is None
        _assert_as_openslide(path, levels=7, first=2)
        with openslide.OpenSlide(path) as theirs, open_slide(path) as slide:
            for level in (0, 1):
                picture = theirs.read_region((1000 * 2**level, 1200 * 2**level), level, (500, 400))
                region = slide.read_region(level, 1200, 1000, 400, 500)
                np.testing.assert_array_equal(region, np.asarray(picture)[..., :3])

    def test_dicom(self) -> None:
        path = data_slide("highdicom-sm-image.dcm")
        with open_slide(path) as slide:
            info = slide.info
            assert (info.format, info.vendor, info.compression) == ("dicom", "dicom", "none")
            assert info.history == ()
            assert (info.mpp_x, info.acquisition_date) == (0.499, "2009-12-29T09:59:15")
            assert info.icc_profile is not None
            # byte for byte as the file has it
            assert info.icc_profile in path.read_bytes()
            assert len(info.icc_profile) == 3144
        _assert_as_openslide(path, levels=1)

    @pytest.mark.parametrize(
        ("name", "kind", "word"),
        [
            (
                "highdicom-sm-image-jpegls.dcm",
                UnsupportedError,
                "dicom slide: Unsupported transfer",
            ),
            ("pathml-small.dcm", SlideError, "dicom slide: Couldn't get image flavor"),
            ("olympus-vsi/vsi-ets-test-jpg2k.vsi", UnsupportedError, "Olympus VSI"),
            ("olympus-vsi/_vsi-ets-test-jpg2k_/stack1/frame_t_0.ets", SlideError, "Olympus VSI"),
        ],
    )
    def test_refused(self, name: str, kind: type[WsicodecError], word: str) -> None:
        path = data_slide(name)
        with pytest.raises(kind, match=word) as caught:
            open_slide(path)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        "name",
        ["cmu-1-small-region.svs", "kidney-48-5.tif", "os-1-detail.ome.tif"],
    )
    def test_others_are_read_as_tiff(self, name: str) -> None:
        path = data_slide(name)
        with open_slide(path) as slide, tifffile.TiffFile(path) as file:
            assert isinstance(slide, TiffReader)
            level = slide.levels[0]
            pixels = slide.read_region(0, 0, 0, level.height, level.width)
            np.testing.assert_array_equal(pixels, file.pages[0].asarray())


class TestUnevenScales:
    """A level of 2221 pixels under one of 4443: OpenSlide's positions fall between pixels."""

    def test_every_pixel_is_the_stored_one(self) -> None:
        path = data_slide("tcga-cr-7395-01a-01-ts1.svs")
        rng = np.random.default_rng(3)
        with OpenSlideReader(path) as slide, TiffReader(path) as tiff:
            assert slide.info.history == tiff.info.history == ("jpeg2000 q70",)
            assert slide.info.icc_profile == tiff.info.icc_profile
            assert slide._grids[1].scale == pytest.approx(2.0005, abs=1e-4)
            assert len(slide._grids[1].columns) == 2
            whole = tiff.read_region(1, 0, 0, 1783, 2221)
            np.testing.assert_array_equal(slide.read_region(1, 0, 0, 1783, 2221), whole)
            for _ in range(10):
                y, x = int(rng.integers(1583)), int(rng.integers(2021))
                region = slide.read_region(1, y, x, 200, 200)
                np.testing.assert_array_equal(region, whole[y : y + 200, x : x + 200])

    def test_a_pixel_has_one_value_whatever_region_is_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where no block can start well. As OpenSlide reads, regions differ."""
        monkeypatch.setattr(module, "_SHORTEST", 100)
        monkeypatch.setattr(module, "_LONGEST", 150)
        image = tissue(1199, 1197)
        path = write_svs(tmp_path / "a.svs", image, levels=1)
        small = np.ascontiguousarray(image[::2, ::2][:-1, :-1])
        with tifffile.TiffWriter(path, append=True) as writer:
            writer.write(
                small,
                tile=(240, 240),
                photometric="rgb",
                compression="deflate",
                description="Aperio Image Library\r\nlevel",
                metadata=None,
            )
        with OpenSlideReader(path) as slide, openslide.OpenSlide(path) as theirs:
            scale = slide._grids[1].scale
            assert scale != int(scale)
            assert len(slide._grids[1].columns) > 3
            whole = slide.read_region(1, 0, 0, 599, 598)
            np.testing.assert_array_equal(whole[:100, :100], small[:100, :100])
            assert np.abs(whole.astype(int) - small).mean() < 5
            at = round(301 * scale), round(401 * scale)
            differs = np.asarray(theirs.read_region(at, 1, (90, 90)))[..., :3]
            assert (differs != whole[401:491, 301:391]).any()
            region = slide.read_region(1, 401, 301, 90, 90)
            np.testing.assert_array_equal(region, whole[401:491, 301:391])

    @pytest.mark.parametrize("scale", [2.0005, 4.0013, 16.37, 2.00001, 1.9999])
    @pytest.mark.parametrize("origin", [0, 777])
    def test_blocks_start_where_pixels_meet(self, scale: float, origin: int) -> None:
        starts = module._cuts(origin, 20000, scale)
        sizes = np.diff([*starts, 20000])
        assert starts[0] == 0
        assert sizes.min() > 0
        assert sizes.max() <= module._LONGEST
        positions = (np.array(starts) + origin) * scale
        off = np.abs(np.rint(positions) - positions) / scale
        assert off.max() <= 0.5 / scale
        if scale in (4.0013, 16.37):
            assert off[1:].max() < 1 / 256


class TestFileBytes:
    """A slide may be many files; all of them count."""

    @pytest.mark.parametrize(("name", "writer"), [("a.mrxs", write_mirax), ("a.vms", write_vms)])
    def test_of_vendors(self, tmp_path: Path, name: str, writer: Writer) -> None:
        path = writer(tmp_path / name, tissue(512, 768))
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        whole = sum(file.stat().st_size for file in files)
        (tmp_path / "another.jpg").write_bytes(b"of nobody")
        with open_slide(path) as slide:
            assert slide.info.file_bytes == whole
        assert len(files) > 2

    def test_names_elsewhere_do_not_count(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        path = write_vms(tmp_path / "in" / "a.vms", tissue(512, 768))
        (tmp_path / "secret").write_bytes(bytes(10**6))
        properties = {
            "hamamatsu.ImageFile": "a.jpg",
            "hamamatsu.ImageFile(0,1)": "../secret",
            "hamamatsu.MapFile": str(tmp_path / "secret"),
            "hamamatsu.MacroImage": "..",
        }
        expected = path.stat().st_size + (tmp_path / "in" / "a.jpg").stat().st_size
        assert slide_bytes(path, "hamamatsu", properties) == expected

    def test_of_a_dicom_series(self, tmp_path: Path) -> None:
        content = data_slide("highdicom-sm-image.dcm").read_bytes()
        path = tmp_path / "a.dcm"
        path.write_bytes(content)
        with open_slide(path) as slide:
            assert slide.info.file_bytes == len(content)
        (tmp_path / "b.dcm").write_bytes(content + b"\0" * 100)
        series = openslide.OpenSlide(path).properties["dicom.SeriesInstanceUID"].encode()
        other = content.replace(series, series[:-1] + b"0")
        assert other != content
        (tmp_path / "c.dcm").write_bytes(other)
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        properties = {"dicom.SeriesInstanceUID": series.decode()}
        # a neighbour that cannot be read, even by root
        (tmp_path / "d.dcm").symlink_to("/proc/self/mem")
        assert slide_bytes(path, "dicom", properties) == 2 * len(content) + 100

    def test_of_a_dicom_slide_among_many_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        series = b"1.2.3.4.5.6"
        head = b"\0" * 128 + b"DICM" + b"\x20\x00\x0e\x00UI\x0c\x00" + series + b"\0"
        for number in range(20):
            (tmp_path / f"{number}.dcm").write_bytes(head)
            (tmp_path / f"{number}.txt").write_bytes(head)
        path, properties = tmp_path / "0.dcm", {"dicom.SeriesInstanceUID": series.decode()}
        names = [file.name for file in slide_files(path, "dicom", properties)]
        assert names[0] == "0.dcm"
        assert sorted(names) == sorted(f"{number}.dcm" for number in range(20))
        monkeypatch.setattr("wsicodec.slide.parts._MAX_NEIGHBOURS", 5)
        assert 5 <= len(slide_files(path, "dicom", properties)) <= 6

    def test_files_that_vanish_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_mirax(tmp_path / "a.mrxs", tissue(512, 768))
        whole = slide_bytes(path, "mirax", {})
        below = parts.files_below
        monkeypatch.setattr(parts, "files_below", lambda folder: [*below(folder), folder / "gone"])
        assert slide_bytes(path, "mirax", {}) == whole

    @pytest.mark.parametrize(("name", "writer"), [("a.mrxs", write_mirax), ("a.vms", write_vms)])
    def test_a_change_of_any_is_seen(self, tmp_path: Path, name: str, writer: Writer) -> None:
        path = writer(tmp_path / name, tissue(512, 768))
        (tmp_path / "another.jpg").write_bytes(b"of nobody")
        with open_slide(path) as slide:
            source = Source(slide.info)
        (tmp_path / "another.jpg").write_bytes(b"of somebody")
        source.check_unchanged(None)
        others = [file for file in tmp_path.rglob("*") if file.is_file()]
        others.remove(tmp_path / "another.jpg")
        assert len(others) > 2
        for file in others:
            content, status = file.read_bytes(), file.stat()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(SlideError, match="changed while"):
                source.check_unchanged(None)
            file.write_bytes(content)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            source.check_unchanged(None)


class TestThreads:
    def test_many_threads_see_the_same_pixels(self) -> None:
        path = data_slide("hamamatsu-test3-tritc.ndpi")
        with openslide.OpenSlide(path) as theirs:
            image = np.asarray(theirs.read_region((0, 0), 1, (1984, 2432)))[..., :3]

        def read(seed: int) -> bool:
            rng = np.random.default_rng(seed)
            y, x = int(rng.integers(2000)), int(rng.integers(1500))
            region = slide.read_region(1, y, x, 300, 300)
            return bool((region == image[y : y + 300, x : x + 300]).all())

        with OpenSlideReader(path, 10**6) as slide, ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(40)))

    @pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
    def test_fork_while_others_read(self, tmp_path: Path) -> None:
        """The child opens the slide anew, and closes it without the parent's threads."""
        path = write_mirax(tmp_path / "a.mrxs", tissue(512, 768))
        with OpenSlideReader(path) as slide, ThreadPoolExecutor(1) as pool:
            level = slide.levels[0]
            expected = slide.read_region(0, 0, 0, level.height, level.width)
            reading, go_on = threading.Event(), threading.Event()

            def slow(raw: openslide.OpenSlide) -> bool:
                reading.set()
                return go_on.wait(30)

            running = pool.submit(slide._handle.run, slow, "asked")
            assert reading.wait(10)
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # ends a child that waits
                found = slide.read_region(0, 0, 0, level.height, level.width)
                slide.close()
                os._exit(0 if np.array_equal(found, expected) else 1)
            status = os.waitpid(child, 0)[1]
            go_on.set()
            assert running.result(10)
            np.testing.assert_array_equal(
                slide.read_region(0, 0, 0, level.height, level.width), expected
            )
        assert status == 0

    @pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
    def test_fork_makes_nothing_before_it_is_needed(self, tmp_path: Path) -> None:
        """Neither for slides that are closed nor for each generation of processes."""
        path = write_mirax(tmp_path / "a.mrxs", tissue(512, 768))
        closed = OpenSlideReader(path)
        closed.close()
        with OpenSlideReader(path) as slide:
            expected = slide.read_region(0, 0, 0, 300, 300)
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                grandchild = os.fork()
                if grandchild:
                    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
                fine = closed._handle._left_behind == [] and closed._handle._tiles is None
                fine &= slide._handle._tiles is None and len(slide._handle._left_behind) == 2
                found = slide.read_region(0, 0, 0, 300, 300)
                fine &= np.array_equal(found, expected) and slide._handle._tiles is not None
                os._exit(0 if fine else 1)
            assert os.waitpid(child, 0)[1] == 0

    @pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
    def test_fork_while_another_thread_closes(self, tmp_path: Path) -> None:
        slide = OpenSlideReader(write_mirax(tmp_path / "a.mrxs", tissue(512, 768)))
        slide.close()
        with slide._handle._changed:
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # ends a child that waits
                slide.close()
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    def test_closing_waits_for_reads(self, tmp_path: Path) -> None:
        """OpenSlide would read freed memory."""
        path = write_mirax(tmp_path / "a.mrxs", tissue(512, 768))
        slide = OpenSlideReader(path)
        reading, go_on = threading.Event(), threading.Event()

        def slow(raw: openslide.OpenSlide) -> tuple[int, int]:
            reading.set()
            assert go_on.wait(10)
            return raw.dimensions

        with ThreadPoolExecutor(2) as pool:
            size = pool.submit(slide._handle.run, slow, "asked")
            assert reading.wait(10)
            closing = pool.submit(slide.close)
            assert not closing.done()
            go_on.set()
            assert size.result(10) == (12 * TILE, 16 * TILE)
            closing.result(10)
        slide.close()
        for read in (
            lambda: slide.read_region(0, 0, 0, 5, 5),
            lambda: slide.read_associated("macro"),
            slide.embedded_model,
        ):
            with pytest.raises(SlideError, match="closed"):
                read()


class TestDamage:
    def _broken(self, tmp_path: Path) -> Path:
        """A MIRAX slide one of whose tiles is no PNG any more."""
        path = write_mirax(tmp_path / "a.mrxs", tissue(512, 768))
        data = tmp_path / "a" / "Data0000.dat"
        content = bytearray(data.read_bytes())
        second = content.index(b"\x89PNG", content.index(b"\x89PNG") + 1)
        content[second : second + 200] = bytes(200)
        data.write_bytes(content)
        return path

    def test_a_broken_tile_spoils_itself_alone(self, tmp_path: Path) -> None:
        """OpenSlide answers everything with its first error."""
        path = self._broken(tmp_path)
        good = tissue(512, 768)
        with OpenSlideReader(path) as slide:
            for _ in range(2):
                with pytest.raises(
                    SlideError, match=r"level 0: region of 50 x 50 at \(0, 130\)"
                ) as e:
                    slide.read_region(0, 0, 130, 50, 50)
                assert str(path) in str(e.value)
                np.testing.assert_array_equal(
                    slide.read_region(0, 0, 0, 128, 128), good[:128, :128]
                )
        fresh = OpenSlideReader(path)
        with pytest.raises(SlideError, match="level 0"):
            fresh.read_region(0, 0, 0, 512, 768)
        fresh.close()

    def test_among_threads(self, tmp_path: Path) -> None:
        good = tissue(512, 768)

        def read(number: int) -> bool:
            row, column = divmod(number % 24, 6)
            try:
                region = slide.read_region(0, row * TILE, column * TILE, TILE, TILE)
            except SlideError:
                return (row, column) == (0, 1)
            want = good[row * TILE :, column * TILE :][:TILE, :TILE]
            return (row, column) != (0, 1) and bool((region == want).all())

        with OpenSlideReader(self._broken(tmp_path), 0) as slide, ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(96)))
            assert not slide._handle._users

    def test_cut_file(self, tmp_path: Path) -> None:
        """Whatever is missing, the error is one of ours and names the file."""
        whole = write_bif(tmp_path / "a.bif", tissue(512, 640)).read_bytes()
        path = tmp_path / "cut.bif"
        failed = 0
        for length in np.linspace(1, len(whole) - 1, 25).astype(int):
            path.write_bytes(whole[:length])
            try:
                with open_slide(path) as slide:
                    for level in slide.levels:
                        slide.read_region(level.index, 0, 0, level.height, level.width)
            except WsicodecError as error:
                failed += 1
                assert str(path) in str(error)
        assert failed > 20

    def test_large_associated_image(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_scn(tmp_path / "a.scn", tissue(512, 640))
        monkeypatch.setattr(module, "MAX_ASSOCIATED_BYTES", 1000)
        with open_slide(path) as slide:
            with pytest.raises(LimitError, match="macro"):
                slide.read_associated("macro")
            with pytest.raises(SettingsError, match="no image 'label'"):
                slide.read_associated("label")


class TestOpening:
    @pytest.mark.parametrize("name", ["slide.jpg", "slide", "slide.dcm", "slide.ndpi", "slide.vms"])
    def test_tiff_of_any_name(self, tmp_path: Path, name: str) -> None:
        shutil.copy(CMU, tmp_path / name)
        with open_slide(tmp_path / name) as slide:
            assert isinstance(slide, TiffReader)
            assert slide.info.format == "svs"

    def test_vendors_of_any_name(self, tmp_path: Path) -> None:
        path = write_scn(tmp_path / "a.svs", tissue(512, 640))
        with open_slide(path) as slide:
            assert slide.info.format == "leica"
        other = tmp_path / "slide"
        shutil.copy(data_slide("highdicom-sm-image.dcm"), other)
        with open_slide(other) as slide:
            assert slide.info.format == "dicom"

    @pytest.mark.parametrize(
        ("name", "content", "word"),
        [
            ("a.svs", b"", "empty"),
            ("a.svs", b"not a slide at all", "neither a TIFF file nor"),
            ("a.svs", b"\xff\xd8\xff\xe0" + bytes(50), "is a JPEG image"),
            ("a.tif", b"\x89PNG\r\n\x1a\n" + bytes(50), "is a PNG image"),
            ("a.ndpi", b"PK\x03\x04" + bytes(50), "is a ZIP archive"),
            ("a.dcm", bytes(128) + b"DICM" + bytes(60), "a.dcm"),
            ("a.svs", b"SQLite format 3\0" + bytes(90), "Sakura"),
            ("a.czi", b"ZISRAWFILE" + bytes(90), "a.czi"),
            ("a.mrxs", b"anything", "MIRAX"),
            ("a.vms", b"[Virtual Microscope Specimen]\nNoLayers=1\n", "a.vms"),
        ],
    )
    def test_no_slides(self, tmp_path: Path, name: str, content: bytes, word: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises((SlideError, UnsupportedError), match=word) as caught:
            open_slide(path)
        assert str(path) in str(caught.value)

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(SlideError, match="No such file"):
            open_slide(tmp_path / "a.svs")
        (tmp_path / "a.mrxs").mkdir()
        with pytest.raises(SlideError, match="folder"):
            open_slide(tmp_path / "a.mrxs")

    def test_qptiff(self, tmp_path: Path) -> None:
        """OpenSlide would take its thumbnail for level 1."""
        path = tmp_path / "a.qptiff"
        root = "PerkinElmer-QPI-ImageDescription"
        text = f'<?xml version="1.0"?><{root}></{root}>'
        _write_pages(path, [tissue(256, 256)], [text], software="PerkinElmer-QPI")
        with pytest.raises(UnsupportedError, match="QPTIFF"):
            open_slide(path)

    def test_without_openslide(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openslide", None)
        scn = write_scn(tmp_path / "a.scn", tissue(512, 640))
        mirax = write_mirax(tmp_path / "a.mrxs", tissue(512, 768))
        for path, kind in ((scn, "Leica SCN"), (mirax, "MIRAX")):
            with pytest.raises(
                RuntimeMissingError, match=r'pip install "wsicodec\[openslide\]"'
            ) as e:
                open_slide(path)
            assert kind in str(e.value)
            assert str(path) in str(e.value)
        nothing = tmp_path / "a.txt"
        nothing.write_text("not a slide")
        with pytest.raises(SlideError, match="neither"):
            open_slide(nothing)
        with open_slide(CMU) as slide:
            assert slide.info.format == "svs"


class TestDates:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"Date": "12/29/09", "Time": "09:59:15"}, "2009-12-29T09:59:15"),
            (
                {"Date": "12/29/09", "Time": "09:59:15", "Time Zone": "GMT-05:00"},
                "2009-12-29T09:59:15-05:00",
            ),
            ({"Date": "01/02/2014", "Time": "23:00:00", "Time Zone": "?"}, "2014-01-02T23:00:00"),
            ({"Date": "01/02/99"}, "1999-01-02"),
            ({"Date": "29/12/09", "Time": "09:59:15"}, None),
            ({"Date": "02/30/09"}, None),
            ({"Date": "", "Time": "09:59:15"}, None),
            ({"Time": "09:59:15"}, None),
            ({}, None),
        ],
    )
    def test_aperio(self, values: dict[str, str], expected: str | None) -> None:
        assert aperio_date(values) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("2017:02:07 13:07:45", "2017-02-07T13:07:45"),
            ("2017:02:07 13:07:45\0", "2017-02-07T13:07:45"),
            ("1970:01:01 00:00:00", None),
            ("0000:00:00 00:00:00", None),
            ("9999:01:01 00:00:00", None),
            ("    :  :     :  :  ", None),
            (None, None),
            ((1, 2), None),
        ],
    )
    def test_tiff(self, text: object, expected: str | None) -> None:
        assert tiff_date(text) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("2012-03-04T05:06:07", "2012-03-04T05:06:07"),
            ("2012-03-04T05:06:07Z", "2012-03-04T05:06:07+00:00"),
            ("2012-03-04T05:06:07.1234567+02:00", "2012-03-04T05:06:07.123456+02:00"),
            ("2012-03-04", "2012-03-04"),
            ("yesterday", None),
            ("", None),
            (None, None),
        ],
    )
    def test_iso(self, text: str | None, expected: str | None) -> None:
        assert iso_date(text) == expected

    @pytest.mark.parametrize(
        ("properties", "expected"),
        [
            ({"aperio.Date": "12/29/09", "aperio.Time": "09:59:15"}, "2009-12-29T09:59:15"),
            ({"dicom.AcquisitionDateTime": "20091229"}, "2009-12-29"),
            (
                {"dicom.AcquisitionDateTime": "20091229095915.5+0100"},
                "2009-12-29T09:59:15+01:00",
            ),
            ({"dicom.AcquisitionDateTime": "20091329095915"}, None),
            # scanned before the file was written
            (
                {"hamamatsu.Created": "2011/05/23", "tiff.DateTime": "2017:02:07 13:07:45"},
                "2011-05-23",
            ),
            ({"tiff.DateTime": "2017:02:07 13:07:45"}, "2017-02-07T13:07:45"),
            (
                {"aperio.Date": "broken", "tiff.DateTime": "2017:02:07 13:07:45"},
                "2017-02-07T13:07:45",
            ),
            ({}, None),
        ],
    )
    def test_openslide(self, properties: dict[str, str], expected: str | None) -> None:
        assert openslide_date(properties) == expected
