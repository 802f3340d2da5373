"""Files of every codec, with glass and images beside the pyramid, as other software sees them.

The pixels that must come back are those that wsicodec decodes from each tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from slides import DESCRIPTION, ICC, halved, tissue

import wsicodec
from wsicodec.codec.constant import encode_constant
from wsicodec.slide.ometiff import CodedLevel, SlideMetadata, write_slide
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import AssociatedImage
from wsicodec.slide.record import FileRecord

TILE = 64
GLASS_COLOUR = (243, 241, 244)
MPP = 0.2527
CODECS = ("jpeg", "jpeg2000", "jpegxl", "webp", "lossless", "learned")
DATE = "2009-12-29T09:59:15"

# "generic" is a flat file of a slide that is not Aperio's
KINDS = ("subifd", "flat", "generic")
FILES = [(codec, kind) for codec in CODECS for kind in KINDS]


@functools.cache
def _levels() -> list[np.ndarray]:
    """Three levels with a margin of glass: some tiles of each are nothing else."""
    first = np.full((300, 410, 3), GLASS_COLOUR, np.uint8)
    first[70:250, 130:330] = tissue(180, 200)
    return [first, halved(first), halved(halved(first))]


@functools.cache
def _beside() -> tuple[AssociatedImage, ...]:
    image = tissue(120, 160, 300, 200)
    return tuple(
        AssociatedImage(name, np.ascontiguousarray(pixels))
        for name, pixels in (
            ("macro", image[:57]),
            ("label", image[40:, 30:113]),
            ("thumbnail", image[::3, ::3]),
        )
    )


@functools.cache
def _encoded(codec: str, level: int) -> tuple[tuple[bytes | None, ...], bytes, np.ndarray]:
    """Tiles of a level, None for those of glass, the stream of glass, and the decoded level."""
    image = _levels()[level]
    height, width = image.shape[:2]
    # lossless learned tiles need no model
    options: dict[str, Any] = {"learned": {"lossless": True}, "lossless": {}}.get(
        codec, {"quality": 90}
    )
    plain = np.full((TILE, TILE, 3), GLASS_COLOUR, np.uint8)
    glass = (
        encode_constant(plain).pack()
        if codec == "learned"
        else wsicodec.encode(plain, codec=codec, **options)
    )
    padded = np.pad(image, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
    tiles: list[bytes | None] = []
    decoded = np.empty_like(padded)
    for y in range(0, padded.shape[0], TILE):
        for x in range(0, padded.shape[1], TILE):
            pixels = padded[y : y + TILE, x : x + TILE]
            empty = bool((pixels == GLASS_COLOUR).all())
            data = glass if empty else wsicodec.encode(pixels, codec=codec, **options)
            tiles.append(None if empty else data)
            decoded[y : y + TILE, x : x + TILE] = wsicodec.decode(data)
    decoded = decoded[:height, :width]
    decoded.flags.writeable = False
    return tuple(tiles), glass, decoded


def _expected(codec: str) -> list[np.ndarray]:
    return [_encoded(codec, level)[2] for level in range(3)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("other readers")
    yield folder
    _file.cache_clear()


@functools.cache
def _file(folder: Path, codec: str, kind: str) -> Path:
    path = folder / f"{codec} {kind}{'.ome.tiff' if kind == 'subifd' else '.tif'}"
    levels = []
    for index, image in enumerate(_levels()):
        tiles, glass, _ = _encoded(codec, index)
        assert 1 < tiles.count(None) < len(tiles) or index == 2
        levels.append(CodedLevel(*image.shape[:2], TILE, tiles, glass))
    description = "A slide of another make, 40x" if kind == "generic" else DESCRIPTION
    metadata = SlideMetadata("a slide", MPP, MPP, 40, description, ICC, DATE)
    with path.open("wb+") as file:
        write_slide(
            file,
            levels,
            codec,
            metadata,
            FileRecord("0.1.0", codec, 90),
            layout="subifd" if kind == "subifd" else "flat",
            associated=_beside(),
            passport=b"a passport",
        )
    return path


def _levels_of(tiff: tifffile.TiffFile) -> list[Any]:
    return [level.keyframe for level in tiff.series[0].levels]


@pytest.mark.parametrize(("codec", "kind"), FILES)
class TestTifffile:
    def test_levels_and_pixels(self, folder: Path, codec: str, kind: str) -> None:
        with tifffile.TiffFile(_file(folder, codec, kind)) as tiff:
            assert (tiff.is_ome, tiff.is_svs) == (kind == "subifd", kind == "flat")
            levels = tiff.series[0].levels
            assert [level.shape for level in levels] == [lv.shape for lv in _levels()]
            for level, expected in zip(levels, _expected(codec), strict=True):
                np.testing.assert_array_equal(level.asarray(), expected)

    def test_no_tile_is_missing_and_glass_is_stored_once(
        self, folder: Path, codec: str, kind: str
    ) -> None:
        with tifffile.TiffFile(_file(folder, codec, kind)) as tiff:
            for index, page in enumerate(_levels_of(tiff)):
                tiles, glass, _ = _encoded(codec, index)
                places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
                shared = {place for place, tile in zip(places, tiles, strict=True) if tile is None}
                own = [place for place, tile in zip(places, tiles, strict=True) if tile]
                assert len(shared) == 1
                assert len(set(own) | shared) == len(own) + 1
                tiff.filehandle.seek(next(iter(shared))[0])
                assert tiff.filehandle.read(next(iter(shared))[1]) == glass
                assert [count for _, count in own] == [len(tile) for tile in tiles if tile]

    def test_profile_and_size_of_pixels(self, folder: Path, codec: str, kind: str) -> None:
        with tifffile.TiffFile(_file(folder, codec, kind)) as tiff:
            pages = _levels_of(tiff)
            assert pages[0].tags.valueof(34675) == ICC
            for page in pages:
                assert page.tags.valueof(296) == 3
                above, below = page.tags.valueof(282)
                downsample = pages[0].imagewidth / page.imagewidth
                assert 1e4 * below / above == pytest.approx(MPP * downsample, rel=1e-6)

    def test_images_beside(self, folder: Path, codec: str, kind: str) -> None:
        if kind == "generic":
            return self._by_directories(folder, codec)
        with tifffile.TiffFile(_file(folder, codec, kind)) as tiff:
            found = {series.name.lower(): series.asarray() for series in tiff.series[1:]}
        assert found.keys() == {image.name for image in _beside()}
        for image in _beside():
            np.testing.assert_array_equal(found[image.name], image.pixels)

    def _by_directories(self, folder: Path, codec: str) -> None:
        # what they are is said by their descriptions alone, which tifffile does not look into
        with tifffile.TiffFile(_file(folder, codec, "generic")) as tiff:
            tiff.pages.useframes = False
            pages = [page for page in tiff.pages if not page.is_tiled]
            assert [page.subfiletype for page in pages] == [0, 1, 9]
            for page, name in zip(pages, ("thumbnail", "label", "macro"), strict=True):
                (pixels,) = (image.pixels for image in _beside() if image.name == name)
                np.testing.assert_array_equal(page.asarray(), pixels)


@pytest.mark.parametrize(("codec", "kind"), FILES)
def test_zarr(folder: Path, codec: str, kind: str) -> None:
    zarr = pytest.importorskip("zarr")
    for level, expected in enumerate(_expected(codec)):
        with tifffile.imread(_file(folder, codec, kind), aszarr=True, level=level) as store:
            array = zarr.open(store, mode="r")
            np.testing.assert_array_equal(array[...], expected)


@pytest.mark.parametrize(("codec", "kind"), FILES)
def test_tiffslide(folder: Path, codec: str, kind: str) -> None:
    tiffslide = pytest.importorskip("tiffslide")
    with tiffslide.TiffSlide(_file(folder, codec, kind)) as slide:
        assert slide.level_dimensions == tuple(lv.shape[1::-1] for lv in _levels())
        assert slide.properties["tiffslide.mpp-x"] == pytest.approx(MPP, rel=1e-6)
        assert slide.properties["tiffslide.mpp-y"] == pytest.approx(MPP, rel=1e-6)
        # it looks for the objective in SVS only
        power = slide.properties["tiffslide.objective-power"]
        assert power == (40 if kind == "flat" else None)
        for level, expected in enumerate(_expected(codec)):
            size = expected.shape[1::-1]
            region = np.asarray(slide.read_region((0, 0), level, size))
            np.testing.assert_array_equal(region[..., :3], expected)
        if kind == "generic":
            return  # it finds them, but has no names for them
        assert slide.associated_images.keys() == {image.name for image in _beside()}
        for image in _beside():
            found = np.asarray(slide.associated_images[image.name].convert("RGB"))
            np.testing.assert_array_equal(found, image.pixels)


@pytest.mark.parametrize(
    ("codec", "kind"), [("jpeg", kind) for kind in KINDS] + [("jpeg2000", "flat")]
)
def test_openslide(folder: Path, codec: str, kind: str) -> None:
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(_file(folder, codec, kind)) as slide:
        # it knows no SubIFDs, and of OME-XML nothing
        count = 1 if kind == "subifd" else 3
        assert slide.level_dimensions == tuple(lv.shape[1::-1] for lv in _levels()[:count])
        for axis in "xy":
            assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(MPP, rel=1e-6)
        power = slide.properties.get("openslide.objective-power")
        assert power == ("40" if kind == "flat" else None)
        for level, expected in enumerate(_expected(codec)[:count]):
            size = expected.shape[1::-1]
            image = slide.read_region((0, 0), level, size)
            assert image.info["icc_profile"] == ICC
            region = np.asarray(image)
            assert (region[..., 3] == 255).all()
            np.testing.assert_array_equal(region[..., :3], expected)
        beside = {image.name: image.pixels for image in _beside()} if kind == "flat" else {}
        assert slide.associated_images.keys() == beside.keys()
        for name, pixels in beside.items():
            found = np.asarray(slide.associated_images[name].convert("RGB"))
            np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("codec", CODECS)
def test_bioio(folder: Path, codec: str) -> None:
    bioio_ome_tiff = pytest.importorskip("bioio_ome_tiff")
    reader = bioio_ome_tiff.Reader(_file(folder, codec, "subifd"))
    ome = reader.ome_metadata
    assert [image.name for image in ome.images] == ["a slide", *(im.name for im in _beside())]
    assert ome.images[0].acquisition_date.isoformat() == DATE
    assert ome.instruments[0].objectives[0].nominal_magnification == 40
    assert ome.structured_annotations.comment_annotations[0].value == DESCRIPTION
    assert reader.physical_pixel_sizes.X == reader.physical_pixel_sizes.Y == MPP
    everything = [_expected(codec)[0], *(image.pixels for image in _beside())]
    assert len(reader.scenes) == len(everything)
    for scene, expected in enumerate(everything):
        reader.set_scene(scene)
        np.testing.assert_array_equal(reader.get_image_data("YXS"), expected)


def test_pillow_by_libtiff(folder: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    with pillow.open(_file(folder, "jpeg", "subifd")) as image:
        assert image.n_frames == 1 + len(_beside())
        np.testing.assert_array_equal(np.asarray(image), _expected("jpeg")[0])
        assert image.info["icc_profile"] == ICC
        for index, beside in enumerate(_beside(), 1):
            image.seek(index)
            np.testing.assert_array_equal(np.asarray(image), beside.pixels)


@pytest.mark.parametrize(("codec", "kind"), FILES)
def test_our_own_reader(folder: Path, codec: str, kind: str) -> None:
    with open_slide(_file(folder, codec, kind)) as slide:
        info = slide.info
        assert (info.mpp_x, info.mpp_y) == pytest.approx((MPP, MPP), rel=1e-6)
        assert info.magnification == 40
        assert info.icc_profile == ICC
        if kind != "generic":
            assert info.description == DESCRIPTION
        assert set(info.associated) == {image.name for image in _beside()}
        for image in _beside():
            np.testing.assert_array_equal(slide.read_associated(image.name).pixels, image.pixels)
        for level, expected in zip(slide.levels, _expected(codec), strict=True):
            pixels = slide.read_region(level.index, 0, 0, level.height, level.width)
            np.testing.assert_array_equal(pixels, expected)
