"""Batched decoding of learned tiles, from a file to the memory of a GPU.

    python benchmarks/gpu.py --slide FILE --json OUT [--tiles N] [--batch N] [--half] ...

FILE is a TIFF of learned tiles (``wsicodec convert``), or any slide or image, of which ``--coded``
tiles are coded first and repeated to ``--tiles``. Measured is the whole way: the tiles' bytes are
read from the file, parsed, checked, uploaded and decoded to uint8 (N, rows, columns, 3) in device
memory, ``--batch`` at a time, one batch read and enqueued while another is computed. Passes are
repeated; the figure is the median's, the first pass, which builds sessions and kernels, left out.

Compared with the CPU decoder: the symbols of every learned conformance vector, by their digest, and
those of all coded tiles, one by one; pixels by the tolerance of docs/format.md. Any difference is
an exit code of 1.

Without a GPU that works it runs on the host backend, the same order of work on the CPU, and says
so: its figures are no GPU's, nor the CPU decoder's, whose speed stands beside them (``cpu``).

The JSON file: ``backend``, ``why_not_cuda``, ``decode`` {mpx_s, seconds, read_s, ...}, ``steps``
{step: share and ns per pixel}, ``identical`` {vectors, tiles}, ``pixels`` {within, largest},
``cpu`` {mpx_s}, ``machine``, ``versions``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import wsicodec
from benchmarks import record
from benchmarks.images import load_tiles
from wsicodec import bitstream
from wsicodec.bitstream import Tile
from wsicodec.codec.cell import CellJob, cells_of, code_cells
from wsicodec.codec.network import TURN_BYTES
from wsicodec.entropy.kernel import Decoder
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.provider import cuda_problem
from wsicodec.models.store import allow_model, decoder_of_prefix
from wsicodec.pipelines.backend import Backend, HostBackend
from wsicodec.pipelines.batched import STEPS_OF_A_BATCH, BatchDecoder, BatchSettings, Kind, Pending

CONFORMANCE = Path(__file__).resolve().parents[1] / "tests" / "conformance"
MODELS = ("tiny", "smallest", "lapped", "tilted")


@dataclass(frozen=True)
class Place:
    """Bytes of a tile in a file."""

    offset: int
    size: int


def learned_places(path: Path) -> list[Place]:
    """Learned tiles of the commonest kind in a TIFF's largest level; none in other files."""
    import tifffile

    from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG

    try:
        with tifffile.TiffFile(path) as tif:
            page = tif.series[0].levels[0].keyframe
            if int(page.compression) != TIFF_COMPRESSION_TAG:
                return []
            found = [
                Place(offset, size)
                for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True)
                if size
            ]
    except tifffile.TiffFileError:
        return []
    alike: dict[object, list[Place]] = {}
    with path.open("rb") as file:
        for place in found:
            tile = bitstream.parse(read(file, place))
            if tile.learned is not None:
                alike.setdefault((tile.learned.model, Kind.of(tile)), []).append(place)
    return max(alike.values(), key=len, default=[])


def read(file: Any, place: Place) -> bytes:
    file.seek(place.offset)
    data: bytes = file.read(place.size)
    return data


def coded_file(source: Path, target: Path, tile: int, count: int, model: str) -> list[Place]:
    """Tiles of a slide or image, coded into a file one after the other; those of one kind."""
    places: list[tuple[object, Place]] = []
    with target.open("wb") as out:
        for image in load_tiles(source, tile, count):
            data = wsicodec.encode(image, model=model, modes="learned")
            parsed = bitstream.parse(data)
            if parsed.learned is not None:
                places.append((Kind.of(parsed), Place(out.tell(), len(data))))
                out.write(data)
    if not places:
        raise SystemExit(f"{source}: no tile of {tile} pixels with more than one colour")
    kinds = [kind for kind, _ in places]
    commonest = max(set(kinds), key=kinds.count)
    return [place for kind, place in places if kind == commonest]


def tiles_of(path: Path, places: Sequence[Place]) -> list[Tile]:
    with path.open("rb") as file:
        return [bitstream.parse(read(file, place)) for place in places]


# -- the same symbols --


def cpu_symbols(model: DecoderModel, tile: Tile) -> list[np.ndarray]:
    """All symbols in coding order, read by the CPU decoder."""
    assert tile.learned is not None
    header, found = tile.learned, []
    cells = cells_of(tile.height, tile.width)
    stream = Decoder(tile.payload[TURN_BYTES * len(cells) :], model.tables, 1 << header.lanes_log2)

    def read_symbols(classes: np.ndarray, dependent: bool) -> np.ndarray:
        found.append(stream.get(classes, dependent=dependent))
        return found[-1]

    for _, _, shape in cells:
        job = CellJob(
            header.gain, header.tilt, (0, 0, 0),
            lambda classes: read_symbols(classes, False),
            lambda _k, classes, _means, _gains: read_symbols(classes, True),
        )  # fmt: skip
        code_cells(model, [job], header.stages, shape)
    stream.finish()
    return found


def digest(symbols: Sequence[np.ndarray]) -> str:
    """As tests/conformance/decode/symbols.json has it."""
    return hashlib.sha256(b"".join(x.astype("<i4").tobytes() for x in symbols)).hexdigest()


def batch_digests(decoder: BatchDecoder, tiles: Sequence[Tile]) -> tuple[list[str], Any]:
    """Digests of each tile's symbols, and the decoded batch."""
    hashes = [hashlib.sha256() for _ in tiles]

    def told(_cell: int, _stage: int, symbols: np.ndarray) -> None:
        for one, values in zip(hashes, symbols, strict=True):
            one.update(values.astype("<i4").tobytes())

    decoded = decoder.decode(tiles, trace=told)
    decoded.checked()
    return [one.hexdigest() for one in hashes], decoded


def check_vectors(backend: Backend) -> dict[str, Any]:
    """Symbols of all learned conformance vectors, against their index."""
    expected = json.loads((CONFORMANCE / "decode/symbols.json").read_text())
    models = {}
    for name in MODELS:
        model = allow_model((CONFORMANCE / f"{name}.wscm").read_bytes())
        models[model.digest[:4]] = BatchDecoder(model, backend)
    wrong = []
    for name, sha in expected.items():
        tile = bitstream.parse((CONFORMANCE / "decode" / f"{name}.tile").read_bytes())
        assert tile.learned is not None
        digests, _ = batch_digests(models[tile.learned.model], [tile, tile])
        if digests != [sha, sha]:
            wrong.append(name)
    return {"compared": len(expected), "different": wrong}


def check_tiles(decoder: BatchDecoder, tiles: Sequence[Tile]) -> tuple[dict[str, Any], Any]:
    """Symbols and pixels of tiles against the CPU decoder's."""
    different, beyond, largest, samples = [], 0, 0, 0
    most = decoder.most(Kind.of(tiles[0]))
    for begin in range(0, len(tiles), most):
        batch = tiles[begin : begin + most]
        digests, decoded = batch_digests(decoder, batch)
        for n, (tile, sha, image) in enumerate(
            zip(batch, digests, decoded.images.to_host(), strict=True)
        ):
            if digest(cpu_symbols(decoder.model, tile)) != sha:
                different.append(begin + n)
            error = np.abs(image.astype(int) - wsicodec.decode(tile.pack(), device="cpu"))
            beyond += int((error > 1).sum())
            largest, samples = max(largest, int(error.max())), samples + error.size
    pixels = {
        "within_1": 1 - beyond / samples,
        "largest": largest,
        "tolerated": beyond <= 0.001 * samples and largest <= 2,
    }
    return {"compared": len(tiles), "different": different}, pixels


# -- speed --


def batches(path: Path, places: Sequence[Place], size: int) -> Iterator[list[Tile]]:
    """Tiles of a file as they are read."""
    with path.open("rb") as file:
        for begin in range(0, len(places), size):
            yield [bitstream.parse(read(file, p)) for p in places[begin : begin + size]]


def one_pass(
    decoder: BatchDecoder, path: Path, places: Sequence[Place], size: int
) -> tuple[float, float, dict[str, float]]:
    """(seconds, of them reading and parsing, seconds per step) of all tiles, each from the file."""
    steps = dict.fromkeys(STEPS_OF_A_BATCH, 0.0)
    waiting: list[Pending] = []
    reading = 0.0

    def settle(pending: Pending) -> None:
        pending.result().checked()
        for step, seconds in pending.seconds().items():
            steps[step] += seconds

    begin = time.perf_counter()
    source = batches(path, places, size)
    while True:
        before = time.perf_counter()
        tiles = next(source, None)
        reading += time.perf_counter() - before
        if tiles is None:
            break
        waiting.append(decoder.submit(tiles, count=size))
        if len(waiting) >= decoder.settings.flights:
            settle(waiting.pop(0))
    for pending in waiting:
        settle(pending)
    return time.perf_counter() - begin, reading, steps


def measure(
    decoder: BatchDecoder, path: Path, places: Sequence[Place], size: int, passes: int
) -> dict[str, Any]:
    """Speed and the time of each step."""
    kind = Kind.of(tiles_of(path, places[:1])[0])
    pixels = len(places) * kind.height * kind.width
    one_pass(decoder, path, places[: 2 * size], size)
    runs = [one_pass(decoder, path, places, size) for _ in range(passes)]
    seconds = statistics.median(run[0] for run in runs)
    steps = {step: statistics.median(run[2][step] for run in runs) for step in STEPS_OF_A_BATCH}
    return {
        "decode": {
            "mpx_s": pixels / seconds / 1e6,
            "seconds": [run[0] for run in runs],
            "read_and_parse_s": statistics.median(run[1] for run in runs),
            "tiles": len(places),
            "tile": [kind.height, kind.width],
            "stages": kind.stages,
            "batch": size,
            "bits_per_pixel": 8 * sum(p.size for p in places) / pixels,
        },
        "steps": {
            step: {"share": time_ / sum(steps.values()), "ns_per_pixel": 1e9 * time_ / pixels}
            for step, time_ in steps.items()
        },
    }


def cpu_speed(path: Path, places: Sequence[Place], passes: int) -> dict[str, Any]:
    """The CPU decoder on the same tiles, all cores."""
    with path.open("rb") as file:
        data = [read(file, place) for place in places]
    tile = bitstream.parse(data[0])
    wsicodec.decode_batch(data[:2], device="cpu")
    times = []
    for _ in range(passes):
        begin = time.perf_counter()
        wsicodec.decode_batch(data, device="cpu")
        times.append(time.perf_counter() - begin)
    pixels = len(data) * tile.height * tile.width
    return {"mpx_s": pixels / statistics.median(times) / 1e6, "tiles": len(data)}


def chosen_backend(arguments: argparse.Namespace) -> tuple[Backend, str | None]:
    """The GPU, or the host and why."""
    problem = "the host was asked for" if arguments.device == "host" else cuda_problem()
    if problem is not None:
        if arguments.device == "cuda":
            raise SystemExit(f"no GPU can be used: {problem}")
        return HostBackend(), problem
    from wsicodec.pipelines.cuda import CudaBackend

    return CudaBackend(tf32=arguments.tf32, graphs=arguments.graphs), None


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--slide", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--device", choices=("auto", "cuda", "host"), default="auto")
    parser.add_argument("--model", default="he-fast", help="that tiles are coded with")
    parser.add_argument("--tile", type=int, default=256, help="side of tiles that are coded")
    parser.add_argument("--coded", type=int, help="different tiles at most (32; with a GPU 1000)")
    parser.add_argument("--tiles", type=int, help="tiles of a pass (32; with a GPU 8192)")
    parser.add_argument("--batch", type=int, help="tiles of a batch (16; with a GPU what fits)")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--half", action="store_true", help="synthesis in float16")
    parser.add_argument("--tf32", action="store_true", help="convolutions in TF32")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs")
    arguments = parser.parse_args(words)
    backend, problem = chosen_backend(arguments)
    on_gpu = problem is None
    if not on_gpu:
        print(f"no GPU ({problem}): host backend, whose figures say nothing of a GPU's speed")
    coded = arguments.coded or (1000 if on_gpu else 32)
    wanted = arguments.tiles or (8192 if on_gpu else 32)
    with tempfile.TemporaryDirectory() as folder:
        path, places = arguments.slide, learned_places(arguments.slide)
        made = not places
        if made:
            path = Path(folder) / "tiles"
            places = coded_file(arguments.slide, path, arguments.tile, coded, arguments.model)
        places = places[:coded]
        tiles = tiles_of(path, places)
        assert tiles[0].learned is not None
        model = decoder_of_prefix(tiles[0].learned.model)
        decoder = BatchDecoder(model, backend, BatchSettings(half=arguments.half))
        fits = decoder.most(Kind.of(tiles[0]))
        size = min(arguments.batch or (fits if on_gpu else 16), fits, wanted)
        repeated = [places[n % len(places)] for n in range(wanted)]
        report = {
            "backend": backend.kind,
            "why_not_cuda": problem,
            "device": _device_name() if on_gpu else None,
            "settings": {
                "half": arguments.half, "tf32": arguments.tf32, "graphs": arguments.graphs
            },
            "source": {"file": arguments.slide.name, "coded_here": made, "tiles": len(places)},
            "model": model.name,
            **measure(decoder, path, repeated, size, arguments.passes),
            "cpu": cpu_speed(path, places, arguments.passes),
        }  # fmt: skip
        compared, pixels = check_tiles(decoder, tiles)
        report["identical"] = {"vectors": check_vectors(backend), "tiles": compared}
        report["pixels"] = pixels
    report["machine"], report["versions"] = record.machine(), record.versions()
    record.write(report, arguments.json, sys.argv if words is None else ["gpu.py", *words])
    print(_told(report))
    vectors = report["identical"]["vectors"]
    good = not compared["different"] and not vectors["different"] and pixels["tolerated"]
    return 0 if good else 1


def _device_name() -> str:
    from numba import cuda

    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def _told(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    decode, identical = report["decode"], report["identical"]
    lines = [
        f"{report['backend']} backend: {decode['mpx_s']:.1f} Mpx/s, file to memory "
        f"(CPU decoder, all cores: {report['cpu']['mpx_s']:.1f})",
        *(
            f"  {step:10} {100 * s['share']:5.1f} %  {s['ns_per_pixel']:8.3f} ns/px"
            for step, s in report["steps"].items()
        ),
        *(
            f"symbols of {found['compared']} {what}: "
            + (f"{len(found['different'])} DIFFERENT" if found["different"] else "identical")
            for what, found in identical.items()
        ),
        f"pixels: largest difference {report['pixels']['largest']}, "
        f"{100 * report['pixels']['within_1']:.4f} % within 1",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
