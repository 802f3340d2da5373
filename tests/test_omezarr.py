"""OME-Zarr files as zarr, OME-Zarr readers and our own reader see them; broken, hostile ones."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import itertools
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slides import CMU, DESCRIPTION, ICC, ROOT, halved, nothing_left, tissue

import wsicodec
from wsicodec.bitstream import Mode, Tile
from wsicodec.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    SettingsError,
    SlideError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.plugins import zarr as plugin
from wsicodec.slide.ometiff import CodedLevel, SlideMetadata
from wsicodec.slide.omezarr import write_omezarr
from wsicodec.slide.opening import open_slide
from wsicodec.slide.protocol import AssociatedImage, SlideReader, StoredImage
from wsicodec.slide.record import AREA_AVERAGE, FROM_SOURCE, FileRecord, ModelId
from wsicodec.slide.zarrarray import MISSING, crc32c, folder_bytes
from wsicodec.slide.zarrreader import ZarrReader

CODECS = ("learned", "jpeg", "jpeg2000", "jpegxl", "lossless")
METADATA = SlideMetadata("slide <1>", 0.2527, 0.2531, 40, DESCRIPTION, ICC, "2009-12-29T09:59:15")
SIZE = 128


def record_of(codec: str, **changes: Any) -> FileRecord:
    levels = (FROM_SOURCE, AREA_AVERAGE, AREA_AVERAGE)
    return FileRecord("0.1.0", codec, 70, (), (f"{codec} q70",), levels, **changes)


def coded(image: np.ndarray, codec: str, size: int = SIZE, **options: Any) -> list[bytes]:
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % size), (0, -width % size), (0, 0)), mode="edge")
    return [
        wsicodec.encode(padded[y : y + size, x : x + size], codec=codec, **options)
        for y in range(0, padded.shape[0], size)
        for x in range(0, padded.shape[1], size)
    ]


def put_together(streams: Sequence[bytes], height: int, width: int, size: int = SIZE) -> np.ndarray:
    """Pixels of a level by decoding its tiles, the plainest way."""
    columns = -(-width // size)
    image = np.zeros((-(-height // size) * size, columns * size, 3), np.uint8)
    for number, stream in enumerate(streams):
        y, x = divmod(number, columns)
        image[y * size : (y + 1) * size, x * size : (x + 1) * size] = wsicodec.decode(stream)
    return image[:height, :width]


def small(codec: str = "lossless", image: np.ndarray | None = None) -> CodedLevel:
    pixels = tissue(200, 300) if image is None else image
    return CodedLevel(*pixels.shape[:2], SIZE, coded(pixels, codec))


def write(path: Path, levels: Sequence[CodedLevel], codec: str, **options: Any) -> Path:
    metadata = options.pop("metadata", METADATA)
    record = options.pop("record", record_of(codec))
    write_omezarr(path, levels, codec, metadata, record, **options)
    return path


def metadata_of(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((path / "zarr.json").read_text())
    return value


def shard_index(path: Path) -> np.ndarray:
    """(offset, length) of a shard's chunks, by its own words."""
    data = path.read_bytes()
    rows, columns = (int(n) // SIZE for n in _shard_shape(path)[1:])
    index = data[-(rows * columns * 16 + 4) : -4]
    assert int.from_bytes(data[-4:], "little") == google_crc32c.value(index)
    return np.frombuffer(index, "<u8").reshape(rows, columns, 2)


def _shard_shape(path: Path) -> list[int]:
    array = next(p for p in path.parents if (p / "zarr.json").is_file())
    shape: list[int] = metadata_of(array)["chunk_grid"]["configuration"]["chunk_shape"]
    return shape


@pytest.fixture(autouse=True)
def registered() -> None:
    plugin.register()  # a source checkout has no entry points


@pytest.fixture(scope="module")
def levels() -> list[np.ndarray]:
    first = tissue(300, 420)
    return [first, halved(first), halved(halved(first))]


@pytest.fixture(scope="module")
def streams(levels: list[np.ndarray]) -> dict[str, list[list[bytes]]]:
    return {codec: [coded(level, codec) for level in levels] for codec in CODECS}


def pyramid(levels: list[np.ndarray], streams: list[list[bytes]]) -> list[CodedLevel]:
    return [
        CodedLevel(*level.shape[:2], SIZE, iter(tiles))
        for level, tiles in zip(levels, streams, strict=True)
    ]


class TestPixels:
    @pytest.mark.parametrize("shard_tiles", [1, 2, 16])
    @pytest.mark.parametrize("codec", CODECS)
    def test_are_those_of_the_tiles(
        self,
        tmp_path: Path,
        levels: list[np.ndarray],
        streams: dict[str, list[list[bytes]]],
        codec: str,
        shard_tiles: int,
    ) -> None:
        tiles = streams[codec]
        path = write(
            tmp_path / "a.ome.zarr", pyramid(levels, tiles), codec, shard_tiles=shard_tiles
        )
        group = zarr.open_group(path, mode="r")
        with ZarrReader(path) as slide:
            assert [(lv.height, lv.width) for lv in slide.levels] == [lv.shape[:2] for lv in levels]
            for index, level in enumerate(levels):
                height, width = level.shape[:2]
                expected = put_together(tiles[index], height, width)
                array = group[str(index)]
                assert array.chunks == (3, SIZE, SIZE)
                np.testing.assert_array_equal(array[:], np.moveaxis(expected, -1, 0))
                np.testing.assert_array_equal(
                    array[:, 7 : height - 3, 30 : width - 1],
                    np.moveaxis(expected[7 : height - 3, 30 : width - 1], -1, 0),
                )
                np.testing.assert_array_equal(
                    slide.read_region(index, 0, 0, height, width), expected
                )
                columns = slide.levels[index].columns
                for number, stream in enumerate(tiles[index]):
                    row, column = divmod(number, columns)
                    assert slide.tile_bytes(index, row, column) == stream
                    y, x = row * SIZE, column * SIZE
                    np.testing.assert_array_equal(
                        slide.decode_tile(index, row, column), expected[y : y + SIZE, x : x + SIZE]
                    )

    def test_modes_of_tiles_may_differ(self, tmp_path: Path) -> None:
        image = tissue(2 * SIZE, 2 * SIZE)
        tiles = coded(image, "learned", lossless=True)
        stream = wsicodec.encode(image[:SIZE, :SIZE], codec="jpegxl", quality=90)
        tiles[1] = Tile(Mode.JPEGXL, SIZE, SIZE, stream).pack()
        tiles[2] = Tile(Mode.CONSTANT, SIZE, SIZE, bytes((1, 2, 3))).pack()
        path = write(tmp_path / "a.zarr", [CodedLevel(2 * SIZE, 2 * SIZE, SIZE, tiles)], "learned")
        expected = put_together(tiles, 2 * SIZE, 2 * SIZE)
        found = zarr.open_group(path, mode="r")["0"][:]
        np.testing.assert_array_equal(np.moveaxis(found, 0, -1), expected)
        with ZarrReader(path) as slide:
            assert slide.tile_bytes(0, 1, 0) == tiles[2]
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 2 * SIZE, 2 * SIZE), expected)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 500), (129, 2), (256, 256), (257, 129)])
    def test_odd_sizes(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        image = tissue(*shape)
        path = write(tmp_path / "a.zarr", [small(image=image)], "lossless", shard_tiles=2)
        np.testing.assert_array_equal(
            zarr.open_group(path, mode="r")["0"][:], np.moveaxis(image, -1, 0)
        )
        with ZarrReader(path) as slide:
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, *shape), image)

    def test_from_many_threads_and_after_a_fork(self, tmp_path: Path) -> None:
        image = tissue(300, 420)
        path = write(tmp_path / "a.zarr", [small(image=image)], "lossless", shard_tiles=2)
        places = list(itertools.product(range(0, 200, 40), range(0, 300, 60)))
        with ZarrReader(path, cache_bytes=2 * SIZE * SIZE * 3) as slide:

            def same(place: tuple[int, int]) -> bool:
                y, x = place
                found = slide.read_region(0, y, x, 100, 120)
                return np.array_equal(found, image[y : y + 100, x : x + 120])

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                assert all(pool.map(same, places))
            child = os.fork()
            if child == 0:
                os._exit(0 if same((150, 250)) else 1)
            assert os.waitpid(child, 0)[1] == 0

    def test_array_can_be_written_to_afterwards(self, tmp_path: Path) -> None:
        """The settings in the metadata are those that zarr codes further chunks with."""
        image = tissue(200, 300)
        path = write(tmp_path / "a.zarr", [small(image=image)], "lossless", shard_tiles=1)
        array = zarr.open_group(path, mode="r+")["0"]
        array[:, 10:20, 30:40] = 7
        changed = image.copy()
        changed[10:20, 30:40] = 7
        with ZarrReader(path) as slide:
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 200, 300), changed)


class TestShards:
    def test_are_as_the_specification_says(self, tmp_path: Path) -> None:
        tiles = coded(tissue(300, 420), "learned", lossless=True)
        path = write(tmp_path / "a.zarr", [CodedLevel(300, 420, SIZE, tiles)], "learned",
                     shard_tiles=2)  # fmt: skip
        shards = {p.relative_to(path / "0" / "c").as_posix() for p in (path / "0").rglob("c/*/*/*")}
        assert shards == {"0/0/0", "0/0/1", "0/1/0", "0/1/1"}
        for name in shards:
            shard = path / "0" / "c" / name
            data, index = shard.read_bytes(), shard_index(shard)
            top, left = (2 * int(n) for n in name.split("/")[1:])
            for (row, column), (offset, count) in zip(
                np.ndindex(2, 2), index.reshape(-1, 2).tolist(), strict=True
            ):
                y, x = top + row, left + column
                if y < 3 and x < 4:
                    assert data[offset : offset + count] == tiles[4 * y + x]
                else:
                    assert offset == count == MISSING

    def test_checksum(self) -> None:
        assert crc32c(b"123456789") == 0xE3069283
        data = os.urandom(1000)
        assert crc32c(data) == google_crc32c.value(data)

    @pytest.mark.parametrize("codec", ["learned", "jpeg"])
    def test_glass_is_stored_once_a_shard(self, tmp_path: Path, codec: str) -> None:
        colour = (241, 236, 243)
        if codec == "learned":
            glass = Tile(Mode.CONSTANT, SIZE, SIZE, bytes(colour)).pack()
        else:
            glass = wsicodec.encode(np.full((SIZE, SIZE, 3), colour, np.uint8), codec="jpeg")
        tile = wsicodec.encode(tissue(SIZE, SIZE), codec=codec, quality=80)
        streams: list[bytes | None] = [None] * 48
        streams[5] = streams[6] = tile
        level = CodedLevel(6 * SIZE, 8 * SIZE, SIZE, streams, glass)
        path = write(tmp_path / "a.zarr", [level], codec, shard_tiles=4)
        empty, busy = (path / "0" / "c" / "0" / name for name in ("0/0", "0/1"))
        wrapped = len(glass) + (0 if codec == "learned" else 18)
        assert empty.stat().st_size == wrapped + 16 * 16 + 4
        assert len({tuple(entry) for entry in shard_index(empty).reshape(-1, 2).tolist()}) == 1
        assert len({tuple(entry) for entry in shard_index(busy).reshape(-1, 2).tolist()}) == 3
        expected = put_together([glass if s is None else s for s in streams], 6 * SIZE, 8 * SIZE)
        found = np.moveaxis(zarr.open_group(path, mode="r")["0"][:], 0, -1)
        np.testing.assert_array_equal(found, expected)
        assert np.abs(found[-1, -1].astype(int) - colour).max() <= 1  # neither black nor white
        one = zarr.open_group(path, mode="r")["0"][:, 300:310, 5:9]
        np.testing.assert_array_equal(np.moveaxis(one, 0, -1), expected[300:310, 5:9])
        with ZarrReader(path) as slide:
            assert slide.tile_bytes(0, 0, 0) == glass
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 6 * SIZE, 8 * SIZE), expected)

    def test_memory_does_not_grow_with_the_slide(self, tmp_path: Path) -> None:
        body = os.urandom(20_000)
        rows, columns = 32, 64

        def tiles() -> Iterator[bytes]:
            for number in range(rows * columns):
                yield Tile(Mode.LOSSLESS, SIZE, SIZE, number.to_bytes(4, "big") + body).pack()

        level = CodedLevel(rows * SIZE, columns * SIZE, SIZE, tiles())
        tracemalloc.start()
        write(tmp_path / "a.zarr", [level], "learned")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3e6  # of 41 MB
        with ZarrReader(tmp_path / "a.zarr") as slide:
            last = slide.tile_bytes(0, rows - 1, columns - 1)
        assert last[18:] == (rows * columns - 1).to_bytes(4, "big") + body


class TestMetadata:
    def test_comes_back(
        self, tmp_path: Path, levels: list[np.ndarray], streams: dict[str, list[list[bytes]]]
    ) -> None:
        record = record_of("jpeg", settings={"tile_size": SIZE})
        path = write(
            tmp_path / "a.ome.zarr",
            pyramid(levels, streams["jpeg"]),
            "jpeg",
            record=record,
            model=b"model\0bytes",
            passport=bytes(range(256)),
        )
        with ZarrReader(path) as slide:
            info = slide.info
            assert slide.embedded_model() == b"model\0bytes"
            assert slide.embedded_passport() == bytes(range(256))
        assert (info.mpp_x, info.mpp_y, info.magnification) == (0.2527, 0.2531, 40)
        assert info.icc_profile == ICC
        assert info.description == DESCRIPTION
        assert info.acquisition_date == "2009-12-29T09:59:15"
        assert info.record == record
        assert info.history == ("jpeg q70",)
        assert (info.format, info.compression) == ("ome-zarr", "jpeg")
        assert [lv.downsample for lv in info.levels] == pytest.approx([1, 2, 4])
        assert info.file_bytes == sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        json.dumps(info.as_dict())

    def test_unknown_is_left_out(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.zarr", [small()], "lossless", metadata=SlideMetadata("x"))
        with ZarrReader(path) as slide:
            info = slide.info
            assert slide.embedded_model() is slide.embedded_passport() is None
        assert info.mpp_x is info.mpp_y is info.magnification is info.icc_profile is None
        assert info.description is info.acquisition_date is None
        nothing_left(path, "zarr.json", "0")
        assert "unit" not in json.dumps(metadata_of(path))

    def test_scales_and_shifts(self, tmp_path: Path) -> None:
        """Levels that halve odd sizes: what a pixel averages, not what sizes divide to."""
        sizes = [(301, 423), (151, 212), (76, 106), (19, 26)]
        glass = Tile(Mode.CONSTANT, SIZE, SIZE, b"\xff\xf0\xee").pack()
        coded_levels = [
            CodedLevel(h, w, SIZE, [None] * (-(-h // SIZE) * -(-w // SIZE)), glass)
            for h, w in sizes
        ]
        path = write(tmp_path / "a.zarr", coded_levels, "learned")
        (image,) = metadata_of(path)["attributes"]["ome"]["multiscales"]
        assert [axis["name"] for axis in image["axes"]] == ["c", "y", "x"]
        assert [axis.get("unit") for axis in image["axes"]] == [None, "micrometer", "micrometer"]
        found = [dataset["coordinateTransformations"] for dataset in image["datasets"]]
        assert found[0] == [{"type": "scale", "scale": [1.0, 0.2531, 0.2527]}]
        for (scale, shift), factors in zip(found[1:], [(2, 2), (4, 4), (16, 16)], strict=True):
            expected = [1.0, 0.2531 * factors[0], 0.2527 * factors[1]]
            assert scale == {"type": "scale", "scale": pytest.approx(expected)}
            moved = [0.0, 0.2531 * (factors[0] - 1) / 2, 0.2527 * (factors[1] - 1) / 2]
            assert shift == {"type": "translation", "translation": pytest.approx(moved)}
        assert metadata_of(path / "0")["dimension_names"] == ["c", "y", "x"]
        assert metadata_of(path / "0")["fill_value"] == 255

    def test_scanner_levels_of_rounded_sizes(self, tmp_path: Path) -> None:
        glass = Tile(Mode.CONSTANT, SIZE, SIZE, b"\xff\xf0\xee").pack()
        coded_levels = [
            CodedLevel(h, w, SIZE, [None] * (-(-h // SIZE) * -(-w // SIZE)), glass)
            for h, w in [(1003, 1201), (334, 401), (200, 310)]
        ]
        path = write(tmp_path / "a.zarr", coded_levels, "learned", metadata=SlideMetadata("x"))
        (image,) = metadata_of(path)["attributes"]["ome"]["multiscales"]
        scales = [d["coordinateTransformations"][0]["scale"] for d in image["datasets"]]
        assert scales[1] == [1, 3, 3]
        assert scales[2] == pytest.approx([1, 5, 1201 / 310])  # no whole number fits the width

    def test_model_of_learned_tiles(self, tmp_path: Path) -> None:
        record = FileRecord("0.1.0", "learned", 33, (ModelId("he-fast", "ab" * 32),))
        tile = Tile(Mode.CONSTANT, SIZE, SIZE, b"abc").pack()
        path = write(
            tmp_path / "a.zarr", [CodedLevel(9, 9, SIZE, [tile])], "learned", record=record
        )
        (sharding,) = metadata_of(path / "0")["codecs"]
        assert sharding["configuration"]["codecs"] == [
            {
                "name": "wsicodec",
                "configuration": {
                    "channel_axis": -3,
                    "quality": 33,
                    "model": "he-fast",
                    "model_sha256": "ab" * 32,
                },
            }
        ]

    def test_strings_that_unicode_does_not_know(self, tmp_path: Path) -> None:
        metadata = SlideMetadata("a\ud800b", description="é🔬\x00\ud83dx")
        path = write(tmp_path / "a.zarr", [small()], "lossless", metadata=metadata)
        with ZarrReader(path) as slide:
            assert slide.info.description == "é🔬\x00?x"


class TestAssociated:
    def test_come_back(self, tmp_path: Path) -> None:
        images = [
            AssociatedImage("label", np.ascontiguousarray(tissue(50, 70)[:, ::-1])),
            AssociatedImage("macro", np.tile(tissue(20, 1050), (1, 4, 1))),
            AssociatedImage("../Label 2", tissue(31, 17)),
        ]
        path = write(tmp_path / "a.zarr", [small()], "lossless", associated=images)
        folders = sorted(p.name for p in (path / "associated").iterdir())
        assert folders == ["image-2", "label", "macro", "zarr.json"]
        with ZarrReader(path) as slide:
            assert slide.info.associated == ("label", "macro", "../Label 2")
            for image in images:
                found = slide.read_associated(image.name)
                assert (found.name, found.stored) == (image.name, None)
                np.testing.assert_array_equal(found.pixels, image.pixels)
            with pytest.raises(SettingsError, match="label, macro"):
                slide.read_associated("thumbnail")
        array = zarr.open_group(path, mode="r")["associated/label/0"]
        np.testing.assert_array_equal(np.moveaxis(array[:], 0, -1), images[0].pixels)

    def test_of_a_scanner_keep_their_jpeg_streams(self, tmp_path: Path) -> None:
        with open_slide(CMU) as source:
            images = [source.read_associated(name) for name in source.info.associated]
        path = write(tmp_path / "a.zarr", [small()], "lossless", associated=images)
        assert {image.name for image in images} == {"thumbnail", "label", "macro"}
        with ZarrReader(path) as slide:
            for image in images:
                np.testing.assert_array_equal(
                    slide.read_associated(image.name).pixels, image.pixels
                )
        for image in images:
            folder = path / "associated" / image.name
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            assert isinstance(image.stored, StoredImage)
            # each strip brings the JPEG tables along
            assert size < 1.4 * sum(map(len, image.stored.segments))
            assert size < image.pixels.nbytes / 2

    def test_refused(self, tmp_path: Path) -> None:
        grey = AssociatedImage("label", np.zeros((4, 4), np.uint8))
        with pytest.raises(SettingsError, match="label"):
            write(tmp_path / "a.zarr", [small()], "lossless", associated=[grey])
        image = AssociatedImage("label", tissue(4, 4))
        with pytest.raises(SettingsError, match="same name"):
            write(tmp_path / "a.zarr", [small()], "lossless", associated=[image, image])
        nothing_left(tmp_path)


@pytest.fixture(scope="module")
def path(
    tmp_path_factory: pytest.TempPathFactory,
    levels: list[np.ndarray],
    streams: dict[str, list[list[bytes]]],
) -> Path:
    return write(
        tmp_path_factory.mktemp("z") / "a.ome.zarr",
        pyramid(levels, streams["learned"]),
        "learned",
        model=b"m" * 100,
        passport=b"p" * 100,
        associated=[AssociatedImage("label", tissue(50, 70))],
    )


class TestOtherReaders:
    def test_ome_zarr(
        self, path: Path, levels: list[np.ndarray], streams: dict[str, list[list[bytes]]]
    ) -> None:
        pytest.importorskip("ome_zarr")
        from ome_zarr.io import parse_url
        from ome_zarr.reader import Reader

        (node,) = Reader(parse_url(path))()
        assert [array.shape[1:] for array in node.data] == [lv.shape[:2] for lv in levels]
        for array, tiles in zip(node.data, streams["learned"], strict=True):
            expected = put_together(tiles, *array.shape[1:])
            np.testing.assert_array_equal(np.asarray(array), np.moveaxis(expected, -1, 0))
        scale, shift = node.metadata["coordinateTransformations"][1]
        assert scale["scale"] == pytest.approx([1, 0.5062, 0.5054])
        assert shift["translation"] == pytest.approx([0, 0.2531 / 2, 0.2527 / 2])
        assert node.metadata["channel_names"] == ["R", "G", "B"]
        (label,) = Reader(parse_url(path / "associated" / "label"))()
        np.testing.assert_array_equal(np.asarray(label.data[0]), np.moveaxis(tissue(50, 70), -1, 0))

    def test_ome_zarr_models(self, path: Path) -> None:
        models = pytest.importorskip("ome_zarr_models")
        group = zarr.open_group(path, mode="r")
        for node in (group, group["associated/label"]):
            image = models.open_ome_zarr(node)
            assert type(image).__module__.startswith("ome_zarr_models.v05")
            assert [a.name for a in image.ome_attributes.multiscales[0].axes] == ["c", "y", "x"]

    def test_schema_of_ome_zarr(self, path: Path) -> None:
        ngff_zarr = pytest.importorskip("ngff_zarr")
        pytest.importorskip("jsonschema")
        for folder in (path, path / "associated" / "label"):
            attributes = metadata_of(folder)["attributes"]
            ngff_zarr.validate(attributes, version="0.5", strict=True)
            del attributes["ome"]["multiscales"][0]["axes"]
            with pytest.raises(Exception, match="axes"):
                ngff_zarr.validate(attributes, version="0.5")


def foreign(
    path: Path, image: np.ndarray, axes: str, *, version: str = "0.5", **options: Any
) -> Path:
    """An OME-Zarr image of one level as zarr writes it."""
    group = zarr.create_group(path)
    lengths = {"y": image.shape[0], "x": image.shape[1], "c": 3}
    order = ["yxc".index(axis) for axis in axes if axis in "yxc"]
    array = image.transpose(order).reshape([lengths.get(axis, 1) for axis in axes])
    sides = {"y": 100, "x": 120, "c": options.pop("channels", 3)}
    options.setdefault("chunks", tuple(sides.get(axis, 1) for axis in axes))
    created = group.create_array(
        "s0", shape=array.shape, dtype="uint8", dimension_names=list(axes), **options
    )
    created[...] = array
    kinds = {"t": "time", "c": "channel"}
    group.attrs["ome"] = {
        "version": version,
        "multiscales": [
            {
                "axes": [
                    {"name": a, "type": kinds.get(a, "space"), "unit": "nanometer"}
                    if a in "zyx"
                    else {"name": a, "type": kinds[a]}
                    for a in axes
                ],
                "datasets": [
                    {
                        "path": "s0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [250.0 if a in "yx" else 1 for a in axes]}
                        ],
                    }
                ],
            }
        ],
    }
    return path


class TestFilesOfOthers:
    @pytest.mark.parametrize("axes", ["yxc", "cyx", "tczyx", "tzyxc", "xyc"])
    @pytest.mark.parametrize("channels", [1, 2, 3])
    def test_axes(self, tmp_path: Path, axes: str, channels: int) -> None:
        image = tissue(250, 310)
        path = foreign(tmp_path / "a.zarr", image, axes, channels=channels)
        with ZarrReader(path) as slide:
            info = slide.info
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 250, 310), image)
            np.testing.assert_array_equal(slide.read_region(0, 90, 100, 50, 60),
                                          image[90:140, 100:160])  # fmt: skip
        assert (info.levels[0].tile_height, info.levels[0].tile_width) == (100, 120)
        assert (info.mpp_x, info.mpp_y) == (0.25, 0.25)
        assert info.record is info.description is info.icc_profile is None
        assert (info.associated, info.history) == ((), ())

    @pytest.mark.parametrize(
        ("compressors", "name"),
        [
            (None, "none"),
            ({"name": "gzip", "configuration": {"level": 5}}, "gzip"),
            ({"name": "zstd", "configuration": {"level": 1, "checksum": True}}, "zstd"),
            ({"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5,
              "shuffle": "bitshuffle", "typesize": 1, "blocksize": 0}}, "blosc"),
            ({"name": "crc32c"}, "none"),
            ([{"name": "zstd", "configuration": {"level": 1}}, {"name": "gzip",
              "configuration": {"level": 1}}, {"name": "crc32c"}], "gzip"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("shards", [None, (3, 200, 240)])
    def test_codecs(
        self, tmp_path: Path, compressors: Any, name: str, shards: tuple[int, ...] | None
    ) -> None:
        image = tissue(250, 310)
        path = foreign(
            tmp_path / "a.zarr", image, "cyx", compressors=compressors, shards=shards, fill_value=9
        )
        with ZarrReader(path) as slide:
            assert slide.info.compression == name
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 250, 310), image)

    def test_transposed_chunks_and_other_keys(self, tmp_path: Path) -> None:
        image = tissue(250, 310)
        path = foreign(
            tmp_path / "a.zarr",
            image,
            "cyx",
            filters=[{"name": "transpose", "configuration": {"order": [1, 2, 0]}}],
            compressors={"name": "zstd", "configuration": {"level": 1}},
            chunk_key_encoding={"name": "v2", "separator": "."},
        )
        assert (path / "s0" / "0.0.0").is_file()
        with ZarrReader(path) as slide:
            assert slide.info.compression == "zstd"
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 250, 310), image)

    def test_tiles_behind_a_transposition(self, copied: Path) -> None:
        """Another way to say what ``channel_axis`` says."""
        codec = {"name": "wsicodec", "configuration": {"lossless": True}}
        transpose = {"name": "transpose", "configuration": {"order": [1, 2, 0]}}
        changed(copied / "0", (*SHARDING, "codecs"), [transpose, codec])
        with ZarrReader(copied) as slide:
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 200, 300), tissue(200, 300))

    @pytest.mark.parametrize("fill", [0, 200])
    def test_what_is_left_out_has_the_fill_value(self, tmp_path: Path, fill: int) -> None:
        image = tissue(250, 310).copy()
        image[:100, 120:240] = fill
        path = foreign(tmp_path / "a.zarr", image, "cyx", fill_value=fill)
        assert not (path / "s0" / "c" / "0" / "0" / "1").exists()
        with ZarrReader(path) as slide:
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 250, 310), image)
            assert slide.tile_bytes(0, 0, 1) == b""

    def test_index_at_the_start(self, tmp_path: Path) -> None:
        image = tissue(250, 310)
        path = foreign(tmp_path / "a.zarr", image, "cyx", compressors=None)
        array = zarr.create_array(
            path / "s0",
            shape=(3, 250, 310),
            chunks=(3, 200, 240),
            dtype="uint8",
            serializer=zarr.codecs.ShardingCodec(chunk_shape=(3, 100, 120), index_location="start"),
            compressors=None,
            overwrite=True,
        )
        array[:] = np.moveaxis(image, -1, 0)
        with ZarrReader(path) as slide:
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 250, 310), image)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"dtype": "uint16"}, "uint16"),
            ({"shape": (4, 100, 100)}, "4 channels"),
            ({"shape": (1, 100, 100)}, "1 channels"),
            ({"axes": "zyx"}, "1 channels"),
            ({"axes": "tcyx", "shape": (2, 3, 100, 100)}, "'t': 2"),
            ({"version": "0.4"}, "0.4"),
            ({"version": "0.6"}, "0.6"),
        ],
    )
    def test_pixels_that_are_not_read(
        self, tmp_path: Path, change: dict[str, Any], words: str
    ) -> None:
        axes = change.get("axes", "cyx")
        path = foreign(tmp_path / "a.zarr", tissue(100, 100), "yxc",
                       version=change.get("version", "0.5"))  # fmt: skip
        zarr.create_array(path / "s0", shape=change.get("shape", (3, 100, 100)),
                          chunks=change.get("shape", (3, 100, 100)), overwrite=True,
                          dtype=change.get("dtype", "uint8"))  # fmt: skip
        value = metadata_of(path)
        value["attributes"]["ome"]["multiscales"][0]["axes"] = [{"name": a} for a in axes]
        (path / "zarr.json").write_text(json.dumps(value))
        with pytest.raises(UnsupportedError, match=words):
            ZarrReader(path)


class TestWriting:
    @pytest.mark.parametrize("count", [0, 1, 5, 7, 12])
    def test_wrong_number_of_tiles(self, tmp_path: Path, count: int) -> None:
        tile = Tile(Mode.CONSTANT, SIZE, SIZE, b"abc").pack()
        level = CodedLevel(200, 300, SIZE, [tile] * count)
        with pytest.raises(SlideError, match=r"level 0: .*tiles came to be written"):
            write(tmp_path / "a.zarr", [level], "learned", shard_tiles=2)
        nothing_left(tmp_path)

    @pytest.mark.parametrize(
        ("tile", "error", "words"),
        [
            (b"", SlideError, "tile 0 of 1 has no bytes"),
            (None, SlideError, "no bytes"),
            (Tile(Mode.CONSTANT, SIZE, 64, b"abc").pack(), SlideError, "not 128 x 128"),
            (b"WSC\x1a", SlideError, "not 128 x 128"),
            (b"\xff\xd8 is no tile", UnsupportedError, "no tile of codec learned"),
        ],
    )
    def test_wrong_tiles(
        self, tmp_path: Path, tile: bytes | None, error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            write(tmp_path / "a.zarr", [CodedLevel(9, 9, SIZE, [tile])], "learned")
        nothing_left(tmp_path)

    @pytest.mark.parametrize("codec", ["webp", "avif", "copy"])
    def test_codecs_that_tiles_do_not_know(self, tmp_path: Path, codec: str) -> None:
        with pytest.raises(UnsupportedError, match=codec):
            write(tmp_path / "a.zarr", [small()], codec)
        nothing_left(tmp_path)

    def test_settings(self, tmp_path: Path) -> None:
        for levels, options in (
            ([], {}),
            ([CodedLevel(9, 9, 8192, [b"x"])], {}),
            ([small()], {"shard_tiles": 0}),
            ([small()], {"shard_tiles": 257}),
        ):
            with pytest.raises(SettingsError):
                write(tmp_path / "a.zarr", levels, "lossless", **options)
        nothing_left(tmp_path)

    def test_metadata_that_no_reader_would_take(self, tmp_path: Path) -> None:
        with pytest.raises(LimitError, match="metadata"):
            write(
                tmp_path / "a.zarr",
                [small()],
                "lossless",
                metadata=SlideMetadata("x", description="y" * 2**24),
            )
        nothing_left(tmp_path)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_interrupted(self, tmp_path: Path, error: type[BaseException]) -> None:
        def tiles() -> Iterator[bytes]:
            yield Tile(Mode.CONSTANT, SIZE, SIZE, b"abc").pack()
            assert [p.name for p in tmp_path.iterdir()] == [f".a.zarr.{os.getpid()}.part"]
            raise error

        with pytest.raises(error):
            write(tmp_path / "a.zarr", [CodedLevel(900, 900, SIZE, tiles())], "learned")
        nothing_left(tmp_path)

    def test_existing_is_kept_or_replaced(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.zarr", [small()], "lossless")
        before = (path / "0" / "zarr.json").stat().st_ino
        with pytest.raises(SlideError, match="exists already"):
            write(path, [small()], "lossless")
        broken = CodedLevel(900, 900, SIZE, [])
        with pytest.raises(SlideError, match="0 of 64 tiles"):
            write(path, [broken], "lossless", overwrite=True)
        assert (path / "0" / "zarr.json").stat().st_ino == before
        write(path, [small(image=tissue(90, 80))], "lossless", overwrite=True)
        with ZarrReader(path) as slide:
            np.testing.assert_array_equal(slide.read_region(0, 0, 0, 90, 80), tissue(90, 80))
        nothing_left(tmp_path, "a.zarr")

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_only_zarr_is_replaced(self, tmp_path: Path, kind: str) -> None:
        target = tmp_path / "precious"
        kept = target / "data" if kind == "folder" else target
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("years of work")
        with pytest.raises(SlideError, match="no Zarr"):
            write(target, [small()], "lossless", overwrite=True)
        assert kept.read_text() == "years of work"

    def test_what_appears_meanwhile_is_kept(self, tmp_path: Path) -> None:
        def tiles() -> Iterator[bytes]:
            (tmp_path / "a.zarr").mkdir()
            yield Tile(Mode.CONSTANT, SIZE, SIZE, b"abc").pack()

        with pytest.raises(SlideError, match="exists already"):
            write(tmp_path / "a.zarr", [CodedLevel(9, 9, SIZE, tiles())], "learned")
        nothing_left(tmp_path, "a.zarr")

    def test_file_system_that_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(SlideError, match="No such file"):
            write(tmp_path / "none" / "a.zarr", [small()], "lossless")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(SlideError, match=r"a\.zarr: .* no file of this size"):
                write(tmp_path / "a.zarr", [small()], "lossless")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        nothing_left(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file of the smallest kind."""
    return write(
        tmp_path_factory.mktemp("sound") / "a.zarr",
        [small(), small(image=tissue(100, 150))],
        "lossless",
        model=b"m" * 99,
        associated=[AssociatedImage("label", tissue(20, 30))],
    )


@pytest.fixture
def copied(sound: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(sound, tmp_path / "a.zarr"))


def read_everything(path: Path) -> None:
    with ZarrReader(path) as slide:
        for level in slide.levels:
            slide.read_region(level.index, 0, 0, min(300, level.height), min(400, level.width))
        for name in slide.info.associated:
            slide.read_associated(name)
        slide.embedded_model()
        slide.embedded_passport()
        json.dumps(slide.info.as_dict())


def changed(path: Path, keys: Sequence[str | int], value: Any) -> None:
    """Write another value into a zarr.json; DELETED takes the key away."""
    whole = metadata_of(path)
    node: Any = whole
    for key in keys[:-1]:
        node = node[key]
    if value is DELETED:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    (path / "zarr.json").write_text(json.dumps(whole))


DELETED = object()
SHARDING = ("codecs", 0, "configuration")


class TestHostile:
    @pytest.mark.parametrize(
        "path",
        ["../a.zarr/0", "/etc", "..", ".", "", "0/../../a.zarr/0", "0//", "a\\..\\b", "C:/x", 0,
         None, ["0"], "0\0", "x" * 300],
    )  # fmt: skip
    @pytest.mark.parametrize("place", ["dataset", "associated", "blob"])
    def test_paths_that_leave_the_folder(self, copied: Path, path: Any, place: str) -> None:
        keys = {
            "dataset": ("attributes", "ome", "multiscales", 0, "datasets", 1, "path"),
            "associated": ("attributes", "wsicodec", "associated", 0, "path"),
            "blob": ("attributes", "wsicodec", "blobs", "model"),
        }[place]
        changed(copied, keys, path)
        if place == "blob" and path is None:
            with ZarrReader(copied) as slide:
                assert slide.embedded_model() is None
            return
        with pytest.raises(FormatError, match=r"a\.zarr.*path .* is not the name of something"):
            read_everything(copied)

    @pytest.mark.parametrize(
        ("keys", "value", "error", "words"),
        [
            (("shape",), [3, 2**40, 300], LimitError, "shape"),
            (("shape",), [3, 0, 300], LimitError, "shape"),
            (("shape",), [3, "200", 300], FormatError, "shape"),
            (("shape",), [3, 200.0, 300], FormatError, "shape"),
            (("shape",), [3, True, 300], FormatError, "shape"),
            (("shape",), [1] * 40, LimitError, "shape"),
            (("shape",), [3, 300], FormatError, "chunks"),
            (("data_type",), "uint16", UnsupportedError, "uint16"),
            (("data_type",), {"name": "pickle"}, UnsupportedError, "pickle"),
            (("fill_value",), 256, FormatError, "fill value"),
            (("fill_value",), None, FormatError, "fill value"),
            (("chunk_grid", "name"), "rectangular", UnsupportedError, "rectangular"),
            (("chunk_grid", "configuration", "chunk_shape"), [3, 200, 256], FormatError, "shards"),
            (
                ("chunk_grid", "configuration", "chunk_shape"),
                [3, 2**30, 2**30],
                LimitError,
                "above 65536",
            ),
            (("chunk_grid",), DELETED, FormatError, "chunk_grid"),
            (("chunk_key_encoding", "name"), "mine", UnsupportedError, "mine"),
            (("chunk_key_encoding", "configuration", "separator"), "/../", FormatError, "separat"),
            (("storage_transformers",), [{"name": "x"}], UnsupportedError, "transformers"),
            (("new_key",), {"name": "x"}, UnsupportedError, "new_key"),
            (("codecs",), [], FormatError, "codecs"),
            (("codecs",), [{"name": "pickle"}], UnsupportedError, "pickle"),
            (("codecs",), [{"name": "bytes"}] * 2, FormatError, "order"),
            (("codecs",), [{"name": "gzip"}], FormatError, "order"),
            (("codecs",), [{"name": "gzip"}, {"name": "bytes"}], FormatError, "order"),
            (("codecs", 1), {"name": "gzip"}, None, ""),
            ((*SHARDING, "chunk_shape"), [3, 2**14, 2**14], FormatError, "shards"),
            ((*SHARDING, "index_codecs"), [{"name": "zstd"}], UnsupportedError, "zstd"),
            ((*SHARDING, "codecs", 0, "name"), "mystery", UnsupportedError, "mystery"),
            ((*SHARDING, "codecs", 0, "name"), "sharding_indexed", UnsupportedError, "sharding"),
            ((*SHARDING, "codecs", 0, "configuration", "channel_axis"), 5, FormatError, "axis"),
            ((*SHARDING, "codecs", 0, "configuration", "channel_axis"), 1, FormatError, "RGB"),
            (("dimension_names",), ["c", "x", "y"], FormatError, "axes"),
            (("dimension_names",), 7, FormatError, "damaged"),
            (("node_type",), "group", FormatError, "no array"),
            (("zarr_format",), 2, UnsupportedError, "format 3"),
        ],
    )
    def test_arrays(
        self,
        copied: Path,
        keys: tuple[str | int, ...],
        value: Any,
        error: type[Exception] | None,
        words: str,
    ) -> None:
        if error is None:
            whole = metadata_of(copied / "0")
            whole["codecs"].append(value)
            (copied / "0" / "zarr.json").write_text(json.dumps(whole))
            error, words = UnsupportedError, "around shards"
        else:
            changed(copied / "0", keys, value)
        with pytest.raises(error, match=words) as caught:
            read_everything(copied)
        assert "a.zarr: level 0" in str(caught.value)

    @pytest.mark.parametrize(
        ("keys", "value", "error", "words"),
        [
            (("attributes", "ome"), DELETED, SlideError, "no OME-Zarr image"),
            (("attributes",), [], SlideError, "no OME-Zarr image"),
            (("attributes", "ome"), {"version": "0.5", "bioformats2raw.layout": 3},
             UnsupportedError, "folders below"),
            (("attributes", "ome", "multiscales"), [], FormatError, "damaged"),
            (("attributes", "ome", "multiscales", 0, "datasets"), [], LimitError, "levels"),
            (("attributes", "ome", "multiscales", 0, "datasets"), [{"path": "0"}] * 33, LimitError,
             "levels"),
            (("attributes", "ome", "multiscales", 0, "datasets", 0, "path"), "7", SlideError,
             "level 0: has no zarr.json"),
            (("attributes", "ome", "multiscales", 0, "datasets", 0, "path"), "associated",
             FormatError, "no array"),
            (("attributes", "ome", "multiscales", 0, "axes"), [{"name": "c"}], FormatError, "axes"),
            (("attributes", "ome", "multiscales", 0, "axes", 0), {}, FormatError, "damaged"),
            (("attributes", "ome", "multiscales", 0, "axes", 0, "name"), [], FormatError,
             "damaged"),
            (("attributes", "wsicodec", "format"), "other", FormatError, "wsicodec"),
            (("attributes", "wsicodec", "version"), 2, UnsupportedError, "upgrade"),
            (("attributes", "wsicodec", "record"), {}, FormatError, "record"),
            (("attributes", "wsicodec", "associated"), {}, FormatError, "list"),
            (("attributes", "wsicodec", "associated"), [{"name": 3, "path": "0"}], FormatError,
             "name"),
            (("attributes", "wsicodec", "associated"), [{"name": "a", "path": "9"}], SlideError,
             "image 'a'"),
            (("attributes", "wsicodec", "blobs"), [], FormatError, "blobs"),
            (("attributes", "wsicodec", "blobs", "model"), "0", LimitError, "model"),
            (("node_type",), "array", FormatError, "no group"),
        ],
    )  # fmt: skip
    def test_groups(
        self,
        copied: Path,
        keys: tuple[str | int, ...],
        value: Any,
        error: type[Exception],
        words: str,
    ) -> None:
        changed(copied, keys, value)
        with pytest.raises(error, match=words):
            read_everything(copied)

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("", FormatError),
            ("[" * 100_000, FormatError),
            ("[]", UnsupportedError),
            ('{"zarr_format": 3}', FormatError),
            (b"\xff\xfe\x00", FormatError),
        ],
    )
    @pytest.mark.parametrize("place", [".", "0"])
    def test_json(
        self, copied: Path, text: str | bytes, error: type[Exception], place: str
    ) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        (copied / place / "zarr.json").write_bytes(data)
        with pytest.raises(error, match=r"a\.zarr"):
            read_everything(copied)

    def test_folders_of_other_kinds(self, tmp_path: Path, copied: Path) -> None:
        with pytest.raises(SlideError, match=r"has no zarr\.json"):
            ZarrReader(tmp_path)
        with pytest.raises(SlideError, match="not a folder"):
            ZarrReader(tmp_path / "none")
        with pytest.raises(SlideError, match="not a folder"):
            ZarrReader(copied / "zarr.json")
        zarr.create_group(tmp_path / "v2", zarr_format=2)
        with pytest.raises(UnsupportedError, match="format 2"):
            ZarrReader(tmp_path / "v2")
        (copied / "0" / "zarr.json").unlink()
        os.mkfifo(copied / "0" / "zarr.json")
        with pytest.raises(SlideError, match="not a regular file"):
            ZarrReader(copied)

    def test_announced_sizes_cost_nothing(self, copied: Path) -> None:
        with (copied / "zarr.json").open("ab") as file:
            file.truncate(2**40)  # sparse
        with pytest.raises(LimitError, match=r"zarr\.json"):
            ZarrReader(copied)

    def test_gzip_bomb(self, tmp_path: Path) -> None:
        import gzip

        path = foreign(
            tmp_path / "a.zarr",
            tissue(250, 310),
            "cyx",
            compressors={"name": "gzip", "configuration": {"level": 1}},
        )
        (path / "s0" / "c" / "0" / "0" / "0").write_bytes(gzip.compress(bytes(2**27), 9))
        tracemalloc.start()
        with ZarrReader(path) as slide, pytest.raises(LimitError, match=r"level 0: chunk \(0, 0"):
            slide.read_region(0, 0, 0, 10, 10)
        assert tracemalloc.get_traced_memory()[1] < 3e6
        tracemalloc.stop()

    def test_damaged_chunks_are_named(self, copied: Path) -> None:
        shard = copied / "0" / "c" / "0" / "0" / "0"
        data = shard.read_bytes()
        (offset, count), *_ = shard_index(shard)[1, 2:].tolist()

        def reading(damaged: bytes, error: type[Exception], words: str) -> None:
            shard.write_bytes(damaged)
            with ZarrReader(copied) as slide, pytest.raises(error, match=words) as caught:
                slide.read_region(0, 150, 270, 20, 20)
            assert f"{copied}: level 0" in str(caught.value)

        middle = offset + count // 2
        flipped = bytes([data[middle] ^ 1])
        damaged = data[:middle] + flipped + data[middle + 1 :]
        reading(damaged, ChecksumError, r"chunk \(0, 1, 2\)")
        with ZarrReader(copied) as slide:  # the others are none the worse
            slide.read_region(0, 0, 0, 100, 100)
        reading(data[:50], SlideError, "cut short")
        reading(data[:-1], SlideError, "checksum")
        reading(data[1:], FormatError, "not a wsicodec tile")
        reading(b"", SlideError, "cut short")

        def with_index(entry: tuple[int, int]) -> bytes:
            index = shard_index(shard).copy()
            index[1, 2] = entry
            words = index.tobytes()
            return data[: -len(words) - 4] + words + crc32c(words).to_bytes(4, "little")

        shard.write_bytes(data)
        reading(with_index((2**63, 10)), SlideError, "beyond the end")
        shard.write_bytes(data)
        reading(with_index((0, 2**62)), LimitError, "exceed")
        shard.write_bytes(data)
        reading(with_index((MISSING, MISSING)), SlideError, "row 1, column 2: is missing")
        shard.unlink()
        with ZarrReader(copied) as slide, pytest.raises(SlideError, match="is missing"):
            slide.read_region(0, 0, 0, 10, 10)

    def test_tile_of_another_size(self, copied: Path) -> None:
        changed(copied / "0", (*SHARDING, "chunk_shape"), [3, 64, 128])
        changed(copied / "0", ("chunk_grid", "configuration", "chunk_shape"), [3, 128, 384])
        with ZarrReader(copied) as slide, pytest.raises(FormatError, match="tile is 128 x 128"):
            slide.read_region(0, 0, 0, 10, 10)

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def test_any_value_anywhere(self, copied: Path, sound: Path, data: st.DataObject) -> None:
        """Whatever stands in the metadata, it is read or refused by name."""
        place = data.draw(st.sampled_from([".", "0", "1", "associated/label", "wsicodec/model"]))
        whole = copy.deepcopy(metadata_of(sound / place))
        node: Any = whole
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
                node = node[key]
                continue
            break
        node[key] = data.draw(
            st.recursive(
                st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
                lambda inner: (
                    st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(max_size=8), inner, max_size=3)
                ),
                max_leaves=6,
            )
            | st.sampled_from([[3, 2**31, 2**31], [1, 1, 1], "bytes", "transpose", {"name": "x"}])
        )
        (copied / place / "zarr.json").write_text(json.dumps(whole))
        with contextlib.suppress(WsicodecError):
            read_everything(copied)
        (copied / place / "zarr.json").write_bytes((sound / place / "zarr.json").read_bytes())


def test_zarr_itself_is_not_needed(sound: Path) -> None:
    code = (
        "import sys; from wsicodec.slide.omezarr import write_omezarr;"
        "from wsicodec.slide.zarrreader import ZarrReader;"
        f"ZarrReader({str(sound)!r}).read_region(0, 0, 0, 200, 300);"
        "assert not {'zarr', 'numcodecs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_that_vanish_while_a_folder_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"1234")
    walk = os.walk

    def walked(top: Path) -> Iterator[Any]:
        for root, folders, names in walk(top):
            Path(root, "b").unlink()
            yield root, folders, names

    monkeypatch.setattr(os, "walk", walked)
    assert folder_bytes(tmp_path) == 8


class TestReader:
    def test_is_a_slide_reader(self, sound: Path) -> None:
        slide: SlideReader = ZarrReader(sound)
        with slide:
            assert len(slide.levels) == 2
            assert slide.read_region(0, 5, 5, 0, 9).shape == (0, 9, 3)
            for region in ((0, 0, 0, 201, 1), (0, -1, 0, 1, 1), (0, 0, 299, 1, 2), (2, 0, 0, 1, 1)):
                with pytest.raises(SettingsError):
                    slide.read_region(*region)
        for use in (
            lambda: slide.read_region(0, 0, 0, 1, 1),
            lambda: slide.read_associated("label"),
            slide.embedded_model,
        ):
            with pytest.raises(SlideError, match="closed"):
                use()

    def test_tiles_outside(self, sound: Path) -> None:
        with ZarrReader(sound) as slide:
            for place in ((0, 2, 0), (0, 0, 3), (0, -1, 0), (5, 0, 0)):
                with pytest.raises(SettingsError, match=r"no tile|no level"):
                    slide.tile_bytes(*place)
                with pytest.raises(SettingsError, match=r"no tile|no level"):
                    slide.decode_tile(*place)
