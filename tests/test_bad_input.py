"""Input from strangers, through the command: one line that names file and reason, and nothing left.

What one reader, container or proof refuses is tested beside it; here is what a user meets.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import onnx
import pytest
import tifffile
from onnx import helper
from slides import CMU, DATA, ROOT, nothing_left, tissue, write_svs

from benchmarks.mosaic import build_mosaic
from wsicodec.cli import main
from wsicodec.convert import ConvertProgress, ConvertSettings, convert
from wsicodec.errors import SlideError, WsicodecError
from wsicodec.models import container
from wsicodec.models import store as store_module
from wsicodec.slide.ometiff import CodedLevel, SlideMetadata, write_slide
from wsicodec.slide.omezarr import write_omezarr
from wsicodec.slide.opening import open_slide
from wsicodec.slide.record import FileRecord, ModelId

FAST = ("--codec", "jpeg", "--tissue", "otsu")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Refusal:
    """Runs the command on a bad input and checks all that a failure promises.

    folder: holds the input; stays as it is.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder = folder
        self._capsys = capsys

    def __call__(
        self,
        source: Path | str,
        *words: str,
        error: str = "SlideError",
        target: Path | str | None = None,
        options: tuple[str, ...] = FAST,
        command: str = "convert",
    ) -> str:
        before = _names(self._folder)
        given = [str(source)]
        if command == "convert":
            given.append(str(self._folder / "out.ome.tiff" if target is None else target))
        code = main([*command.split(), *given, *options])
        captured = self._capsys.readouterr()
        assert captured.err.startswith(f"wsicodec: {error}: "), captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert captured.out == ""
        for word in (str(source), *words):
            assert word in captured.err
        assert code == 1
        assert _names(self._folder) == before
        return captured.err


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directories lie before the pixels, those of the bundled slide behind them."""
    return build_mosaic(tmp_path_factory.mktemp("mosaic") / "a.svs", 0.6)


def _never(progress: ConvertProgress) -> None:
    raise AssertionError(f"tiles were coded before the source was checked: {progress}")


class TestTruncated:
    def test_mosaic_at_many_lengths(self, mosaic: Path, tmp_path: Path) -> None:
        """Seen before the first tile is coded: hours may lie between it and the missing one."""
        whole = mosaic.read_bytes()
        path = tmp_path / "cut.svs"
        with tifffile.TiffFile(mosaic) as file:
            places = [int(page.offset) for page in file.pages]
            tiles = [int(o) for page in file.pages for o in page.aspage().dataoffsets[::7]]
        lengths = {*np.linspace(1, len(whole) - 1, 20).astype(int).tolist(), len(whole) - 1}
        lengths |= {place + more for place in places for more in (-1, 0, 1, 3, 200)}
        lengths |= {tiles[index] + 1 for index in range(0, len(tiles), max(1, len(tiles) // 12))}
        for length in sorted(length for length in lengths if 0 < length < len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(WsicodecError, match=r"cut\.svs") as caught:
                convert(path, tmp_path / "out.ome.tiff", ConvertSettings(codec="jpeg"), _never)
            assert len(str(caught.value)) < 600
            nothing_left(tmp_path, "cut.svs")

    def test_bundled_slide_at_many_lengths(self, tmp_path: Path) -> None:
        whole = CMU.read_bytes()
        path = tmp_path / "cut.svs"
        for length in (*np.linspace(1, len(whole), 25).astype(int)[:-1].tolist(), len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(WsicodecError, match=r"cut\.svs"):
                convert(path, tmp_path / "out.ome.tiff", ConvertSettings(codec="jpeg"), _never)
            nothing_left(tmp_path, "cut.svs")

    @pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
    @pytest.mark.parametrize("options", [FAST, ("--codec", "copy")], ids=" ".join)
    def test_message(
        self,
        mosaic: Path,
        tmp_path: Path,
        refused: Refusal,
        share: float,
        options: tuple[str, ...],
    ) -> None:
        whole = mosaic.read_bytes()
        path = tmp_path / "cut.svs"
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path, options=options)


class TestBrokenTiles:
    """JPEG decoders go on where a stream breaks off, and fill the rest with grey."""

    @pytest.fixture
    def broken(self, mosaic: Path, tmp_path: Path) -> Callable[..., Path]:
        """broken(change) changes the bytes of tile (2, 1) of level 0; byte count stays."""

        def make(change: Callable[[bytes], bytes]) -> Path:
            content = bytearray(mosaic.read_bytes())
            with tifffile.TiffFile(mosaic) as file:
                page = file.pages[0]
                index = 2 * -(-page.imagewidth // page.tilewidth) + 1
                start, count = page.dataoffsets[index], page.databytecounts[index]
            new = change(bytes(content[start : start + count]))
            content[start : start + count] = new.ljust(count, b"\0")[:count]
            path = tmp_path / "broken.svs"
            path.write_bytes(content)
            return path

        return make

    @pytest.mark.parametrize(
        "change",
        [
            lambda tile: b"",
            lambda tile: b"\xff\xd8\xff\xd9",
            lambda tile: np.random.default_rng(1).bytes(len(tile)),
            lambda tile: tile[:2] + b"\xff" * (len(tile) - 2),
            lambda tile: tile[: len(tile) // 2],
            lambda tile: tile[:200],
        ],
        ids=["zeros", "no image", "noise", "ff", "half and zeros", "head"],
    )
    def test_is_named(
        self, broken: Callable[..., Path], refused: Refusal, change: Callable[[bytes], bytes]
    ) -> None:
        refused(broken(change), "level 0: tile at row 2, column 1")

    @pytest.mark.parametrize("jobs", ["in_process", "workers"])
    def test_lost_in_the_middle(
        self, broken: Callable[..., Path], tmp_path: Path, jobs: str
    ) -> None:
        """Decoders go on behind a lost sector, and would pass its noise off as tissue."""
        lost = np.random.default_rng(2).bytes(512).replace(b"\xff", b"\xfe")
        path = broken(lambda tile: tile[:-900] + lost + tile[-900 + 512 :])
        target = tmp_path / "out.ome.tiff"
        settings = ConvertSettings(codec="jpeg", jobs=1, in_process=jobs == "in_process")
        with pytest.raises(SlideError, match="level 0: tile at row 2, column 1"):
            convert(path, target, settings)
        nothing_left(tmp_path, path.name)
        settings = dataclasses.replace(settings, accept_damage=True)
        assert convert(path, target, settings).quality is not None

    @pytest.mark.parametrize(
        ("side", "error"), [(64, "SlideError"), (128, "SlideError"), (65000, "LimitError")]
    )
    def test_of_another_shape(
        self, broken: Callable[..., Path], refused: Refusal, side: int, error: str
    ) -> None:
        """Few bytes that declare another image, or 12 GB of pixels."""
        stream = bytearray(imagecodecs.jpeg8_encode(np.full((16, 16, 3), 90, np.uint8), level=20))
        frame = stream.find(b"\xff\xc0")
        stream[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
        path = broken(lambda _: bytes(stream))
        refused(path, "level 0: tile at row 2, column 1", error=error)


def _directory(path: Path, **changes: Any) -> Path:
    """A one-tile TIFF whose tags are as given: name -> (type, count, value bytes) or None."""
    tags: dict[int, tuple[int, int, bytes]] = {
        254: (4, 1, struct.pack("<I", 0)),
        256: (4, 1, struct.pack("<I", 64)),
        257: (4, 1, struct.pack("<I", 64)),
        258: (3, 3, struct.pack("<3H", 8, 8, 8)),
        259: (3, 1, struct.pack("<H", 8)),
        262: (3, 1, struct.pack("<H", 2)),
        277: (3, 1, struct.pack("<H", 3)),
        284: (3, 1, struct.pack("<H", 1)),
        322: (4, 1, struct.pack("<I", 64)),
        323: (4, 1, struct.pack("<I", 64)),
    }
    tile = zlib.compress(tissue(64, 64).tobytes())
    tags[324] = (16, 1, struct.pack("<Q", 16))
    tags[325] = (16, 1, struct.pack("<Q", len(tile)))
    for name, value in changes.items():
        code = int(name.removeprefix("t"))
        if value is None:
            tags.pop(code)
        else:
            tags[code] = value
    where = 16 + len(tile)
    content = struct.pack("<2sHHHQ", b"II", 43, 8, 0, where) + tile
    extra_start = where + 8 + 20 * len(tags) + 8
    entries, extra = b"", b""
    for code, (kind, count, value) in sorted(tags.items()):
        entries += struct.pack("<HHQ", code, kind, count)
        if len(value) <= 8:
            entries += value.ljust(8, b"\0")
        else:
            entries += struct.pack("<Q", extra_start + len(extra))
            extra += value
    content += struct.pack("<Q", len(tags)) + entries
    path.write_bytes(content + struct.pack("<Q", 0) + extra)
    return path


def _long(value: int) -> tuple[int, int, bytes]:
    return 4, 1, struct.pack("<I", value)


def _long8(value: int, count: int = 1) -> tuple[int, int, bytes]:
    return 16, count, struct.pack("<Q", value)


ABSURD: Mapping[str, Mapping[str, Any]] = {
    "10^9 x 10^9 pixels": {"t256": _long(10**9), "t257": _long(10**9)},
    "4 x 10^9 rows in strips of one tile": {"t257": _long(2**32 - 1)},
    "one tile of 2^31 x 2^31": {
        "t256": _long(2**31),
        "t257": _long(2**31),
        "t322": _long(2**31),
        "t323": _long(2**31),
    },
    "tile of 10^5 x 10^5": {"t322": _long(10**5), "t323": _long(10**5)},
    "tile without height": {"t323": _long(0)},
    "tile without width": {"t322": _long(0)},
    "image without rows": {"t257": _long(0)},
    "no width": {"t256": None},
    "tile far behind the end": {"t324": _long8(2**60)},
    "tile of 2^50 bytes": {"t325": _long8(2**50)},
    "tile in the header": {"t324": _long8(0), "t325": _long8(16)},
    "no offsets": {"t324": None},
    "no byte counts": {"t325": None},
    "2^60 offsets": {"t324": _long8(16, 2**60)},
    "2^33 offsets": {"t324": _long8(16, 2**33), "t325": _long8(16, 2**33)},
    "65535 samples": {"t277": (3, 1, struct.pack("<H", 65535))},
    "no samples": {"t277": (3, 1, struct.pack("<H", 0))},
    "compression of nobody": {"t259": (3, 1, struct.pack("<H", 60001))},
    "description of 2^40 bytes": {"t270": (2, 2**40, struct.pack("<Q", 16))},
    "profile of 2^40 bytes": {"t34675": (7, 2**40, struct.pack("<Q", 16))},
    "model of 2^40 bytes": {"t60644": (7, 2**40, struct.pack("<Q", 16))},
    "record of 2^40 bytes": {"t60643": (2, 2**40, struct.pack("<Q", 16))},
    "passport of 2^40 bytes": {"t60645": (7, 2**40, struct.pack("<Q", 16))},
    "type of nobody": {"t256": (99, 1, bytes(8))},
    "profile that is a number": {"t34675": _long(2**31 - 1)},
    "width as text": {"t256": (2, 4, b"wide")},
    "sub-directories in a circle": {"t330": (18, 2, struct.pack("<QQ", 16, 16))},
    "2^40 sub-directories": {"t330": (18, 2**40, struct.pack("<Q", 16))},
}
_CHILD = """
import json, resource, sys, time
from wsicodec.cli import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

main(["convert", sys.argv[1], sys.argv[1] + ".warm.tiff", "--codec", "jpeg", "--tissue", "otsu"])
for path in sys.argv[2:]:
    before, started = peak(), time.perf_counter()
    try:
        code = main(["convert", path, path + ".ome.tiff", "--codec", "jpeg", "--tissue", "otsu"])
    except BaseException as error:
        code = repr(error)
    seconds = time.perf_counter() - started
    print(json.dumps([path, code, peak() - before, seconds]), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of them in one process of its own, whose memory can be watched.

    Name -> (exit code, line on standard error, MiB that it took, seconds, folder is clean).
    """
    folder = tmp_path_factory.mktemp("absurd")
    good = _directory(folder / "good.tif")
    paths = {}
    for number, (name, changes) in enumerate(ABSURD.items()):
        (folder / str(number)).mkdir()
        paths[name] = _directory(folder / str(number) / "a.tif", **changes)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(good), *map(str, paths.values())],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (folder / "good.tif.warm.tiff").is_file(), done.stderr
    outcomes: dict[str, Any] = {}
    lines: list[str] = []
    by_path = {str(path): name for name, path in paths.items()}
    for line in done.stderr.splitlines():
        if not line.startswith("["):
            lines.append(line)
            continue
        path, code, grown, seconds = json.loads(line)
        left = sorted(p.name for p in Path(path).parent.iterdir())
        outcomes[by_path[path]] = (code, lines, grown, seconds, left)
        lines = []
    assert set(outcomes) == set(ABSURD), done.stderr[-2000:]
    return outcomes


class TestAbsurdShapes:
    @pytest.mark.parametrize("name", ABSURD)
    def test_is_refused(self, outcomes: dict[str, Any], name: str) -> None:
        code, lines, grown, seconds, left = outcomes[name]
        assert code == 1, (code, lines)
        assert left == ["a.tif"]
        (line,) = lines
        assert line.startswith("wsicodec: ")
        assert "a.tif" in line
        assert len(line) < 600
        assert grown < 200, "MiB"
        assert seconds < 10


class TestStructure:
    def test_chain_that_leads_nowhere(self, mosaic: Path, tmp_path: Path, refused: Refusal) -> None:
        """Directories behind a broken link would be lost in silence: levels, label, macro."""
        content = bytearray(mosaic.read_bytes())
        with tifffile.TiffFile(mosaic) as file:
            links = [page.offset + 2 + 12 * len(page.tags) for page in file.pages]
        for link in links[:-1]:
            for place in (2**31, len(content) + 10, 3):
                broken = bytearray(content)
                broken[link : link + 4] = struct.pack("<I", place)
                (tmp_path / "chain.svs").write_bytes(broken)
                refused(tmp_path / "chain.svs")

    def test_chain_that_is_a_circle(self, mosaic: Path, tmp_path: Path, refused: Refusal) -> None:
        content = bytearray(mosaic.read_bytes())
        with tifffile.TiffFile(mosaic) as file:
            first, last = file.pages[0].offset, file.pages[-1]
            link = last.offset + 2 + 12 * len(last.tags)
        content[link : link + 4] = struct.pack("<I", first)
        (tmp_path / "circle.svs").write_bytes(content)
        refused(tmp_path / "circle.svs")

    def test_level_without_tiles(self, mosaic: Path, tmp_path: Path, refused: Refusal) -> None:
        """Level 1 whose tile offsets are gone from the directory."""
        content = bytearray(mosaic.read_bytes())
        with tifffile.TiffFile(mosaic) as file:
            tag = file.pages[2].tags["TileOffsets"]
            content[tag.offset : tag.offset + 2] = struct.pack("<H", 61111)
        (tmp_path / "a.svs").write_bytes(content)
        refused(tmp_path / "a.svs", "level 1")

    def test_slide_of_one_level(self, tmp_path: Path) -> None:
        """A slide whose smaller levels were never written is a slide."""
        source = write_svs(tmp_path / "a.svs", tissue(300, 400), levels=1)
        assert main(["convert", str(source), str(tmp_path / "b.ome.tiff"), *FAST]) == 0
        with open_slide(tmp_path / "b.ome.tiff") as slide:
            assert len(slide.levels) == 1

    def test_too_many_directories(self, tmp_path: Path, refused: Refusal) -> None:
        """A chain of 30,000 tiny images is refused before all of them are read."""
        entry = struct.pack("<HHHI4s", 1, 256, 4, 1, bytes(4))
        content = b"II*\0\x08\0\0\0"
        for number in range(30_000):
            content += entry + struct.pack("<I", 8 + 18 * (number + 1))
        (tmp_path / "a.svs").write_bytes(content[:-4] + bytes(4))
        started = time.process_time()
        refused(tmp_path / "a.svs", error="LimitError")
        assert time.process_time() - started < 10


class TestPixels:
    @pytest.mark.parametrize(
        ("array", "settings", "words"),
        [
            (np.zeros((64, 64, 3), np.uint16), {"photometric": "rgb"}, ["uint16", "8-bit"]),
            (np.zeros((64, 64), np.uint8), {"photometric": "minisblack"}, ["grey", "one channel"]),
            (np.zeros((64, 64, 4), np.uint8), {"photometric": "rgb"}, ["four channels"]),
            (
                np.zeros((64, 64, 2), np.uint8),
                {"photometric": "minisblack", "planarconfig": "contig"},
                ["two channels"],
            ),
            (np.zeros((64, 64, 3), np.float32), {"photometric": "rgb"}, ["float32"]),
            (np.zeros((64, 64), np.uint16), {"photometric": "minisblack"}, ["grey"]),
        ],
        ids=["16 bits", "one channel", "four channels", "two channels", "floats", "16-bit grey"],
    )
    @pytest.mark.parametrize("name", ["a.svs", "a.tif", "a.ome.tif"])
    def test_other_than_rgb(
        self,
        tmp_path: Path,
        refused: Refusal,
        array: np.ndarray,
        settings: dict[str, Any],
        words: list[str],
        name: str,
    ) -> None:
        path = tmp_path / name
        tifffile.imwrite(path, array, tile=(32, 32), **settings)
        refused(path, *(words if name != "a.ome.tif" else []), error="UnsupportedError")

    def test_level_of_other_pixels(self, tmp_path: Path, refused: Refusal) -> None:
        """Level 0 is fine, level 1 has 16 bits."""
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            settings: dict[str, Any] = {"tile": (32, 32), "photometric": "rgb", "metadata": None}
            writer.write(tissue(128, 128), **settings)
            writer.write(np.zeros((64, 64, 3), np.uint16), **settings, subfiletype=1)
        refused(tmp_path / "a.tif", "level 1", "uint16", error="UnsupportedError")


class TestNames:
    """The content decides what a file is, not its name."""

    @pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.txt", "a", "a.ndpi", "a.mrxs", "a.dcm"])
    def test_slide_under_a_wrong_name(self, tmp_path: Path, name: str) -> None:
        path = write_svs(tmp_path / name, tissue(100, 120), levels=1)
        assert main(["convert", str(path), str(tmp_path / "out.ome.tiff"), *FAST]) == 0
        nothing_left(tmp_path, name, "out.ome.tiff")

    @pytest.mark.parametrize(
        ("content", "word"),
        [
            (bytes(imagecodecs.jpeg8_encode(np.zeros((64, 64, 3), np.uint8))), "JPEG"),
            (imagecodecs.png_encode(np.zeros((64, 64, 3), np.uint8)), "PNG"),
            (bytes(imagecodecs.jpeg2k_encode(np.zeros((64, 64, 3), np.uint8))), "JPEG-2000"),
            (b"PK\x03\x04" + bytes(200), "ZIP"),
            (b"\x1f\x8b" + bytes(200), "gzip"),
            (b"%PDF-1.7\n" + bytes(200), "PDF"),
            (b"<html>not found</html>", "TIFF"),
            (b"\0" * 4096, "TIFF"),
            (bytes(128) + b"DICM" + bytes(300), "DICOM"),
            (b"SQLite format 3\0" + bytes(4096), "Sakura"),
            (b"WSCM\x01" + bytes(100), "TIFF"),
        ],
        ids=[
            "jpeg", "png", "jpeg2000", "zip", "gzip", "pdf", "html", "zeros", "dicom", "sqlite",
            "model",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["a.svs", "a.tiff", "a.dcm"])
    def test_other_files_named_slides(
        self, tmp_path: Path, refused: Refusal, content: bytes, word: str, name: str
    ) -> None:
        path = tmp_path / name
        path.write_bytes(bytes(content))
        kind = "UnsupportedError" if word in ("DICOM", "Sakura") else "SlideError"
        refused(path, word, error=kind)

    @pytest.mark.parametrize("name", ["a.mrxs", "a.vms", "a.vmu", "a.czi", "a.ndpi", "a.bif"])
    def test_names_of_vendors_without_content(
        self, tmp_path: Path, refused: Refusal, name: str
    ) -> None:
        path = tmp_path / name
        path.write_bytes(b"\xff\xd8\xff\xe0 not a slide at all")
        error = "UnsupportedError" if name == "a.mrxs" else "SlideError"
        refused(path, error=error)


class TestPaths:
    def test_folder(self, tmp_path: Path, refused: Refusal) -> None:
        (tmp_path / "slides.svs").mkdir()
        refused(tmp_path / "slides.svs", "folder")

    def test_missing(self, tmp_path: Path, refused: Refusal) -> None:
        refused(tmp_path / "none.svs", "No such file")

    def test_empty(self, tmp_path: Path, refused: Refusal) -> None:
        (tmp_path / "a.svs").touch()
        refused(tmp_path / "a.svs", "empty")

    def test_without_permission(self, tmp_path: Path, refused: Refusal) -> None:
        if os.geteuid() == 0:
            pytest.skip("root reads every file; the tests below make files unreadable for root")
        path = write_svs(tmp_path / "a.svs", tissue(64, 64), levels=1)
        path.chmod(0)
        refused(path, "ermission")

    def test_through_a_file(self, tmp_path: Path, refused: Refusal) -> None:
        (tmp_path / "a.svs").write_bytes(b"II")
        refused(tmp_path / "a.svs" / "b.svs", "Not a directory")

    def test_links_in_a_circle(self, tmp_path: Path, refused: Refusal) -> None:
        (tmp_path / "a.svs").symlink_to(tmp_path / "b.svs")
        (tmp_path / "b.svs").symlink_to(tmp_path / "a.svs")
        refused(tmp_path / "a.svs")

    def test_link_to_nothing(self, tmp_path: Path, refused: Refusal) -> None:
        (tmp_path / "a.svs").symlink_to(tmp_path / "gone.svs")
        refused(tmp_path / "a.svs", "No such file")

    def test_names_that_no_system_takes(self, tmp_path: Path, refused: Refusal) -> None:
        refused(tmp_path / ("a" * 5000 + ".svs"), "too long")
        refused(str(tmp_path / "a\0b.svs"))

    def test_that_cannot_be_read(self, refused: Refusal) -> None:
        """Opens, then fails on the first byte, even for root."""
        if not Path("/proc/self/mem").exists():
            pytest.skip("needs /proc/self/mem")
        refused("/proc/self/mem")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
    def test_pipe_and_device(self, tmp_path: Path) -> None:
        """Opening a pipe that nobody writes to waits for ever; a device has no end."""
        os.mkfifo(tmp_path / "a.svs")
        convert, install = ("convert", "{}", "out.ome.tiff", *FAST), ("models", "install", "{}")
        for source, command in (
            (str(tmp_path / "a.svs"), convert),
            ("/dev/zero", convert),
            ("/dev/null", convert),
            (str(tmp_path / "a.svs"), install),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "wsicodec.cli", *(word.format(source) for word in command)],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            assert done.returncode == 1, done.stderr
            assert source in done.stderr
            assert done.stderr.count("\n") == 1
        nothing_left(tmp_path, "a.svs")

    @pytest.mark.parametrize("options", [(), ("--overwrite",), ("--codec", "copy", "--overwrite")])
    def test_same_for_input_and_output(
        self, tmp_path: Path, refused: Refusal, options: tuple[str, ...]
    ) -> None:
        path = write_svs(tmp_path / "a.svs", tissue(64, 64), levels=1)
        content = path.read_bytes()
        for target in (path, tmp_path / "." / "a.svs", os.path.relpath(path)):
            refused(path, "source itself", target=target, options=(*FAST, *options))
        assert path.read_bytes() == content

    @pytest.mark.parametrize(
        "name",
        [
            "no/out.ome.tiff",
            "in.svs/out.ome.tiff",
            "d.ome.tiff",
            "a" * 5000 + ".ome.tiff",
            "a" * 300 + ".zarr",
            "a" * 300 + "/out.ome.tiff",
            "a\0b.ome.tiff",
        ],
        ids=["no folder", "file", "folder", "long", "long zarr", "long folder", "zero byte"],
    )
    def test_targets(self, tmp_path: Path, refused: Refusal, name: str) -> None:
        path = write_svs(tmp_path / "in.svs", tissue(64, 64), levels=1)
        (tmp_path / "d.ome.tiff").mkdir()
        before = _names(tmp_path)
        assert main(["convert", str(path), str(tmp_path / name), *FAST, "--overwrite"]) == 1
        error = refused._capsys.readouterr().err
        assert error.startswith("wsicodec: SlideError: ")
        assert str(tmp_path / name) in error
        assert error.count("\n") == 1
        assert _names(tmp_path) == before


def _slide_with_model(path: Path, model: bytes, digest: str, tile: bytes, side: int) -> Path:
    record = FileRecord("1.0", "learned", 50, models=(ModelId("tiny", digest),))
    levels = [CodedLevel(side, side, side, iter([tile]))]
    if path.suffix == ".zarr":
        write_omezarr(path, levels, "learned", SlideMetadata("a"), record, model=model)
        return path
    with path.open("wb+") as file:
        write_slide(file, levels, "learned", SlideMetadata("a"), record, model=model)
    return path


class TestModels:
    """A model in a slide is data from a stranger."""

    @pytest.fixture
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """A user's folder of models, and a store that knows none but the shipped ones."""
        monkeypatch.setenv("WSICODEC_MODELS", str(tmp_path / "models"))
        monkeypatch.setattr(store_module, "_store", store_module._Store())
        return tmp_path / "models"

    @pytest.fixture
    def tile(self, elsewhere: Path, tiny_file: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
        """A square tile coded with the tiny model, by a store that is gone afterwards."""
        import wsicodec

        conformance = Path(__file__).parent / "conformance"
        elsewhere.mkdir()
        for name in ("tiny.wscm", "tiny.encoder.wscm"):
            shutil.copy(conformance / name, elsewhere / name)
        coded = wsicodec.encode(tissue(64, 64), model="tiny", quality=50)
        shutil.rmtree(elsewhere)
        monkeypatch.setattr(store_module, "_store", store_module._Store())
        return coded

    def _digest(self, model: bytes) -> str:
        import hashlib

        return hashlib.sha256(model).hexdigest()

    def _with_operator(self, model: bytes, graph: str, kind: str) -> bytes:
        parsed = container.parse(model)
        changed = onnx.load_from_string(parsed.graphs[graph])
        changed.graph.node.append(
            helper.make_node(kind, [changed.graph.input[0].name], ["nowhere"])
        )
        graphs = {**parsed.graphs, graph: changed.SerializeToString()}
        return container.pack(parsed.header, graphs, parsed.tensors)

    @pytest.mark.parametrize("kind", ["ReadFile", "Loop", "Exp", "PyOp"])
    @pytest.mark.parametrize("graph", ["hyper", "chain"])
    def test_forbidden_operator(
        self,
        tmp_path: Path,
        elsewhere: Path,
        refused: Refusal,
        tile: bytes,
        tiny_file: bytes,
        kind: str,
        graph: str,
    ) -> None:
        model = self._with_operator(tiny_file, graph, kind)
        path = _slide_with_model(tmp_path / "a.ome.tiff", model, self._digest(model), tile, 64)
        refused(path, error="UnknownModelError")
        refused(path, kind, error="ModelError", command="models install", options=())
        (tmp_path / "a.wscm").write_bytes(model)
        refused(tmp_path / "a.wscm", kind, error="ModelError", command="models install", options=())
        assert not elsewhere.exists() or not list(elsewhere.iterdir())

    @pytest.mark.parametrize("name", ["a.ome.tiff", "a.ome.zarr"])
    def test_slide_of_an_unknown_model(
        self,
        tmp_path: Path,
        elsewhere: Path,
        refused: Refusal,
        tile: bytes,
        tiny_file: bytes,
        name: str,
    ) -> None:
        """It is carried along, but used only when the user says so."""
        digest = self._digest(tiny_file)
        path = _slide_with_model(tmp_path / name, tiny_file, digest, tile, 64)
        refused(path, digest[:8], "wsicodec models install", error="UnknownModelError")
        assert main(["models", "install", str(path)]) == 0
        assert main(["convert", str(path), str(tmp_path / "b.ome.tiff"), *FAST]) == 0

    def test_false_digest_in_the_record(
        self, tmp_path: Path, elsewhere: Path, refused: Refusal, tile: bytes, tiny_file: bytes
    ) -> None:
        """The file carries another model than the one that it names."""
        path = _slide_with_model(tmp_path / "a.ome.tiff", tiny_file, "ab" * 32, tile, 64)
        refused(path, "abab", error="ModelError", command="models install", options=())
        assert not elsewhere.exists() or not list(elsewhere.iterdir())

    def test_false_digest_in_the_tile(
        self, tmp_path: Path, elsewhere: Path, refused: Refusal, tile: bytes, tiny_file: bytes
    ) -> None:
        """The tile names a model that nobody has; the file carries a good one of another digest."""
        import wsicodec

        prefix = bytes.fromhex(str(wsicodec.probe(tile).model))
        assert tile.count(prefix) == 1
        other = tile.replace(prefix, bytes(byte ^ 0xFF for byte in prefix))
        digest = self._digest(tiny_file)
        path = _slide_with_model(tmp_path / "a.ome.tiff", tiny_file, digest, other, 64)
        assert main(["models", "install", str(path)]) == 0
        refused._capsys.readouterr()
        before = _names(tmp_path)
        assert main(["convert", str(path), str(tmp_path / "b.ome.tiff"), *FAST]) == 1
        error = refused._capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1
        assert _names(tmp_path) == before

    def test_no_model(self, tmp_path: Path, elsewhere: Path, refused: Refusal) -> None:
        path = write_svs(tmp_path / "a.svs", tissue(64, 64), levels=1)
        refused(path, "no model", error="ModelError", command="models install", options=())
        (tmp_path / "folder").mkdir()
        refused(tmp_path / "folder", "folder", command="models install", options=())
        refused(tmp_path / "none", "No such file", command="models install", options=())
        refused(tmp_path / ("a" * 5000), "too long", command="models install", options=())

    def test_larger_than_any_model(
        self, tmp_path: Path, elsewhere: Path, refused: Refusal, tiny_file: bytes
    ) -> None:
        with (tmp_path / "a.wscm").open("wb") as file:
            file.write(tiny_file)
            file.truncate(2**40)
        path = tmp_path / "a.wscm"
        refused(path, "exceeds", error="ModelError", command="models install", options=())

    def test_folder_that_takes_no_models(
        self, tmp_path: Path, elsewhere: Path, refused: Refusal, tiny_file: bytes
    ) -> None:
        (tmp_path / "a.wscm").write_bytes(tiny_file)
        elsewhere.touch()
        refused(
            tmp_path / "a.wscm", "cannot be installed", str(elsewhere), command="models install",
            options=(),
        )  # fmt: skip

    @pytest.mark.parametrize("length", [0, 1, 100, -1])
    def test_model_cut_short(
        self, tmp_path: Path, elsewhere: Path, refused: Refusal, tiny_file: bytes, length: int
    ) -> None:
        path = tmp_path / "a.wscm"
        path.write_bytes(tiny_file[:length])
        error = "SlideError" if length in (0, 1) else "ModelError"
        refused(path, error=error, command="models install", options=())


@pytest.mark.parametrize("name", ["kidney-48-5.tif", "os-1-detail.ome.tif", "pathml-small.dcm"])
def test_damaged_files_of_other_kinds(name: str, tmp_path: Path, refused: Refusal) -> None:
    """Real files, cut in the middle and with a hole."""
    source = DATA / "slides" / name
    if not source.is_file():
        pytest.skip(f"{source} is not there; set WSICODEC_DATA")
    whole = source.read_bytes()
    path = tmp_path / name
    for length in (len(whole) // 2, len(whole) - 1000, 500):
        path.write_bytes(whole[:length])
        code = main(["convert", str(path), str(tmp_path / "out.ome.tiff"), *FAST])
        captured = refused._capsys.readouterr()
        assert code == 1, (length, captured)
        assert captured.err.startswith("wsicodec: ")
        assert captured.err.count("\n") == 1
        assert str(path) in captured.err
        nothing_left(tmp_path, name)
