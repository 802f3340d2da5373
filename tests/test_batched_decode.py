"""The batched decoder: the CPU decoder's symbols and, within the format's tolerance, its pixels.

On the host backend, which runs the graphs and the order of work that a GPU runs, and with the CUDA
kernels in numba's simulator. No GPU is needed; what only one can show, ``benchmarks/gpu.py`` does.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import wsicodec
from wsicodec import bitstream, codec
from wsicodec.bitstream import LearnedHeader, Mode, Tile
from wsicodec.codec import network
from wsicodec.codec.cell import CellShape, cells_of, read_cells
from wsicodec.codec.network import TURN_BYTES, TileEncoder, usual_search
from wsicodec.entropy.kernel import Decoder
from wsicodec.errors import (
    FormatError,
    RuntimeMissingError,
    SettingsError,
    UnknownModelError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.models import provider, session
from wsicodec.models.decoder import DecoderModel, load_decoder
from wsicodec.models.encoder import load_encoder
from wsicodec.models.session import GraphRunner
from wsicodec.models.store import allow_model, encoder_of, find_model
from wsicodec.pipelines import dispatch
from wsicodec.pipelines.backend import HostBackend
from wsicodec.pipelines.batched import (
    STEPS_OF_A_BATCH,
    BatchDecoder,
    BatchSettings,
    Decoded,
    Kind,
    bytes_of_tile,
)
from wsicodec.pipelines.graphs import chain_graph
from wsicodec.pipelines.images import Images, capsule
from wsicodec.pipelines.selfcheck import check_backend, noise_tiles, symbols_of
from wsicodec.pipelines.synthesis import Synthesis

FOLDER = Path(__file__).parent / "conformance"
SYMBOLS: dict[str, str] = json.loads((FOLDER / "decode/symbols.json").read_text())
ERRORS: dict[str, str] = json.loads((FOLDER / "refuse/errors.json").read_text())
MODELS = ("tiny", "smallest", "lapped", "tilted")

Picture = Callable[..., np.ndarray]


@cache
def model_of(prefix: bytes) -> DecoderModel:
    """The vectors' models, with onnxruntime alone, and he-fast."""
    for name in MODELS:
        data = (FOLDER / f"{name}.wscm").read_bytes()
        if hashlib.sha256(data).digest()[:4] == prefix:
            allow_model(data)
            return load_decoder(data, fused=False)
    return load_decoder(find_model(prefix.hex()).path.read_bytes(), fused=False)


@cache
def decoder_of(prefix: bytes, half: bool = False) -> BatchDecoder:
    return BatchDecoder(model_of(prefix), HostBackend(), BatchSettings(half=half))


def decoder_for(tile: Tile, half: bool = False) -> BatchDecoder:
    assert tile.learned is not None
    return decoder_of(tile.learned.model, half)


def vector(name: str) -> Tile:
    return bitstream.parse((FOLDER / f"{name}.tile").read_bytes())


def traced(decoder: BatchDecoder, tiles: Sequence[Tile]) -> tuple[Decoded, list[list[np.ndarray]]]:
    """A batch, and each tile's symbols in coding order."""
    arrays: list[np.ndarray] = []
    decoded = decoder.decode(tiles, trace=lambda _cell, _stage, x: arrays.append(x))
    return decoded, [[x[n] for x in arrays] for n in range(len(tiles))]


def digest(symbols: Sequence[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(x.astype("<i4").tobytes() for x in symbols)).hexdigest()


def close_enough(pixels: np.ndarray, expected: np.ndarray) -> None:
    """docs/format.md, "Pixels"."""
    error = np.abs(pixels.astype(int) - expected)
    assert pixels.shape == expected.shape
    assert error.max() <= 2 and (error > 1).mean() <= 0.001


def on_cpu(tile: Tile) -> np.ndarray:
    model_of(tile.learned.model)
    return wsicodec.decode(tile.pack())


# -- tiles that no encoder setting gives --


def coded(
    image: np.ndarray, name: str = "tiny", *, stages: int = 15, lanes_log2: int = 2, gain: int = 120
) -> Tile:
    """A tile with exactly so many stages, or all."""
    if name == "tiny":
        data = (FOLDER / "tiny.wscm").read_bytes()
        model = model_of(hashlib.sha256(data).digest()[:4])
        encoder = load_encoder((FOLDER / "tiny.encoder.wscm").read_bytes())
    else:
        model, encoder = encoder_of(find_model(name))
    stages = min(stages, len(model.architecture.stages))
    search = replace(usual_search(encoder), tilt=0)
    whole = TileEncoder(image, model, encoder)
    before = network.LANES_LOG2
    network.LANES_LOG2 = lanes_log2
    try:
        cells = [cell.encode(gain, stages, search) for cell in whole._cells]
        payload = whole._stream(cells, stages)
    finally:
        network.LANES_LOG2 = before
    turns = b"".join(np.array(cell.latents.turn, np.int8).tobytes() for cell in cells)
    header = LearnedHeader(model.digest[:4], gain, stages, lanes_log2)
    return Tile(Mode.LEARNED, *image.shape[:2], turns + payload, header)


# -- what comes out --


@pytest.mark.parametrize("name", sorted(SYMBOLS))
def test_vectors(name: str) -> None:
    tile = vector(f"decode/{name}")
    decoded, symbols = traced(decoder_for(tile), [tile, tile])
    pixels = decoded.checked().to_host()
    expected = on_cpu(tile)
    for found, image in zip(symbols, pixels, strict=True):
        assert digest(found) == SYMBOLS[name]
        close_enough(image, expected)


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (16, 33), (33, 16), (47, 65), (520, 30), (30, 530)],
)
def test_sizes_and_batches_of_different_tiles(height: int, width: int, tissue: Picture) -> None:
    tiles = [coded(tissue(height, width, seed=s), gain=100 + 40 * s) for s in range(3)]
    decoder = decoder_for(tiles[0])
    decoded, symbols = traced(decoder, tiles)
    assert decoded.errors == [None] * 3
    for tile, found, image in zip(tiles, symbols, decoded.images.to_host(), strict=True):
        assert digest(found) == digest(traced(decoder, [tile])[1][0])
        close_enough(image, on_cpu(tile))


@pytest.mark.parametrize("lanes_log2", [0, 5])
def test_all_numbers_of_stages(lanes_log2: int, tissue: Picture) -> None:
    image = tissue(40, 56)
    count = len(decoder_for(coded(image)).model.architecture.stages)
    for stages in range(1, count + 1):
        tile = coded(image, stages=stages, lanes_log2=lanes_log2)
        assert tile.learned.stages == stages
        close_enough(decoder_for(tile).decode([tile]).checked().to_host()[0], on_cpu(tile))


def test_tilts_of_one_batch() -> None:
    names = [n for n in SYMBOLS if n.startswith("tilted/40x72")]
    alike = [(n, vector(f"decode/{n}")) for n in names]
    kinds = {Kind.of(t) for _, t in alike}
    chosen = max(([p for p in alike if Kind.of(p[1]) == k] for k in kinds), key=len)
    assert len({t.learned.tilt for _, t in chosen}) >= 2
    _, symbols = traced(decoder_for(chosen[0][1]), [t for _, t in chosen])
    assert [digest(s) for s in symbols] == [SYMBOLS[n] for n, _ in chosen]


@pytest.mark.parametrize("name", ["tiny", "he-fast"])
def test_contexts_gains_latents_and_corrections(name: str, tissue: Picture) -> None:
    tiles = [coded(tissue(72, 88, seed=s), name, gain=150) for s in range(2)]
    decoder = decoder_for(tiles[0])
    decoder.decode(tiles)
    model, shape = decoder.model, CellShape(72, 88)
    streams = [Decoder(t.payload[TURN_BYTES:], model.tables, 4) for t in tiles]
    turns = [(0, 0, 0)] * 2
    stages = tiles[0].learned.stages
    cells = read_cells(model, streams, [150] * 2, [0] * 2, turns, stages, shape)
    flight = next(f for (kind, _), fs in decoder._plans.items() for f in fs[-1:]
                  if (kind.height, kind.width) == (72, 88))  # fmt: skip
    mine = flight.cells[0]
    corrections = cells[0].cells.corrections()
    for n, cell in enumerate(cells):
        np.testing.assert_array_equal(mine.gains[n].reshape(-1), cell.gains)
        np.testing.assert_array_equal(mine.y[n], cell.y)
        contexts = cell.cells.port(n).values
        np.testing.assert_array_equal(mine.chain[n].reshape(len(contexts), -1), contexts)
        np.testing.assert_array_equal(
            mine.real[n].reshape(len(contexts) - 1, -1), contexts[:-1].astype(int) - 128
        )
        correction = flight.view("correction", 2, *mine.real.shape[1:])[n]
        np.testing.assert_array_equal(correction.reshape(len(contexts) - 1, -1).T, corrections[n])


@pytest.mark.parametrize("name", ["tiny", "lapped", "tilted", "he-fast"])
@pytest.mark.parametrize("extreme", [False, True])
def test_the_chain_in_integers(name: str, extreme: bool) -> None:
    path = find_model(name).path if name == "he-fast" else FOLDER / f"{name}.wscm"
    graph = load_decoder(path.read_bytes(), fused=False).graph_bytes("chain")
    channels = onnx.load_from_string(graph).graph.input[0].type.tensor_type.shape.dim[1].dim_value
    levels = np.random.default_rng(0).integers(0, 256, (2, channels, 7, 5)).astype(np.uint8)
    if extreme:
        levels = np.where(levels > 127, 255, 0).astype(np.uint8)
    (theirs,) = GraphRunner(graph)({"context": levels})
    (mine,) = GraphRunner(chain_graph(graph))({"levels": levels})
    np.testing.assert_array_equal(mine, np.moveaxis(theirs, 3, 1))


# -- float16 --


def test_tissue_is_painted_in_half_precision(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By onnxruntime on the CPU, which computes in float32 between, and by onnx's reference
    evaluator, which rounds after every operator."""
    tiles = [coded(pixels[:96, at : at + 104], "he-fast", gain=130) for at in (200, 400)]
    decoder = decoder_for(tiles[0], half=True)
    decoded = decoder.decode(tiles)
    flight = next(iter(decoder._plans.values()))[-1]
    cell = flight.cells[0]
    assert 0.1 < cell.peak.min() <= cell.peak.max() < 0.75
    expected = [on_cpu(tile) for tile in tiles]
    for image, want in zip(decoded.checked().to_host(), expected, strict=True):
        close_enough(image, want)
    graph = Synthesis(CellShape(96, 104), cell.y.shape[1], half=True).graph(decoder.model)
    from onnx.reference import ReferenceEvaluator

    contexts = decoder.model.architecture.context_channels
    found = ReferenceEvaluator(onnx.load_from_string(graph)).run(
        ["pixels", "peak"],
        {
            "y": cell.y,
            "correction": flight.view("correction", 2, contexts, cell.y.shape[2]),
            "gains": cell.gains.reshape(2, -1),
            "colours": cell.colours,
            "offset": cell.offset,
        },
    )
    np.testing.assert_allclose(found[1], cell.peak, rtol=1e-2)
    for image, want in zip(found[0], expected, strict=True):
        close_enough(image, want)
    # not the same arithmetic by chance
    assert (found[0] != np.stack(expected)).any()
    assert any(
        t.data_type == onnx.TensorProto.FLOAT16
        for t in onnx.load_from_string(graph).graph.initializer
    )


def test_what_half_precision_cannot_hold_is_painted_again() -> None:
    name = "learned-80x96-gain6-random"
    tile = vector(f"decode/{name}")
    decoder = decoder_for(tile, half=True)
    image = decoder.decode([tile]).checked().to_host()[0]
    peak = next(iter(reversed(decoder._plans.values())))[-1].cells[0].peak
    assert peak.max() > 1
    close_enough(image, on_cpu(tile))


# -- faults --


def learned_refusals() -> list[str]:
    """Vectors whose header is fine and whose model is one of ours."""
    digests = {hashlib.sha256((FOLDER / f"{m}.wscm").read_bytes()).digest()[:4] for m in MODELS}
    found = []
    for name in sorted(ERRORS):
        try:
            tile = vector(f"refuse/{name}")
        except WsicodecError:
            continue
        if tile.learned is not None and tile.learned.model in digests:
            found.append(name)
    return found


REFUSED = learned_refusals()


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_tile_spoils_no_other(name: str, tissue: Picture) -> None:
    bad = vector(f"refuse/{name}")
    header = bad.learned
    decoder = decoder_for(bad)
    with pytest.raises(WsicodecError) as expected:
        on_cpu(bad)
    assert type(expected.value).__name__ == ERRORS[name]
    if header.stages > len(decoder.model.architecture.stages):
        with pytest.raises(FormatError):
            decoder.decode([bad])
        return
    good = coded(tissue(bad.height, bad.width), stages=header.stages, lanes_log2=header.lanes_log2)
    assert decoder_for(good) is decoder
    decoded, symbols = traced(decoder, [good, bad, good])
    assert decoded.errors[0] is None and decoded.errors[2] is None
    error = decoded.errors[1]
    assert type(error) is type(expected.value) and str(error) == str(expected.value)
    with pytest.raises(type(expected.value)):
        decoded.checked()
    alone = traced(decoder, [good])[1][0]
    for n in (0, 2):
        assert digest(symbols[n]) == digest(alone)
        close_enough(decoded.images.to_host()[n], on_cpu(good))


def test_there_are_broken_tiles_of_every_kind() -> None:
    codes = {"hyper-latent-128", "words-end-early", "trailing-word", "symbol-beyond-range"}
    heads = {"turns-cut", "states-cut", "state-below-range", "odd-bytes", "stages-beyond-model"}
    assert codes | heads | {"escape-of-21-bits"} <= set(REFUSED)


def test_damage_is_found_as_the_cpu_finds_it(tissue: Picture) -> None:
    good = coded(tissue(48, 48))
    rng = np.random.default_rng(1)
    tiles = []
    for _ in range(60):
        payload = bytearray(good.payload)
        for at in rng.integers(0, len(payload), rng.integers(1, 4)):
            payload[at] ^= 1 << int(rng.integers(8))
        tiles.append(replace(good, payload=bytes(payload[: rng.integers(1, len(payload) + 1)])))
    tiles.append(good)
    decoded = decoder_for(good).decode(tiles)
    assert decoded.errors[-1] is None
    kinds = set()
    for tile, error, image in zip(tiles, decoded.errors, decoded.images.to_host(), strict=True):
        try:
            expected = on_cpu(tile)
        except WsicodecError as theirs:
            assert (type(error), str(error)) == (type(theirs), str(theirs))
            kinds.add(type(error))
        else:
            assert error is None
            close_enough(image, expected)
    assert len(kinds) >= 2


def test_batches_of_unlike_tiles_are_refused(tissue: Picture) -> None:
    tile = coded(tissue(32, 32))
    decoder = decoder_for(tile)
    with pytest.raises(UnsupportedError):
        decoder.decode([tile, coded(tissue(32, 48))])
    with pytest.raises(UnsupportedError):
        decoder.decode([tile, coded(tissue(32, 32), lanes_log2=3)])
    other = vector("decode/lapped/1x1-gain90")
    with pytest.raises(UnknownModelError):
        decoder.decode([other])


# -- memory and flights --


class CountingBackend(HostBackend):
    """Knows the bytes of the arrays that live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Any] = []
        self.most = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = np.zeros(shape, dtype)
        import weakref

        self.live = [r for r in self.live if r() is not None] + [weakref.ref(array)]
        self.most = max(self.most, sum(r().nbytes for r in self.live if r() is not None))
        return array


def test_memory_is_bounded_by_the_settings(tissue: Picture) -> None:
    tiles = [coded(tissue(64, 64, seed=s), gain=80) for s in range(9)]
    others = [coded(tissue(h, 70, seed=1), gain=80) for h in (30, 48, 50, 62, 64)]
    needed = bytes_of_tile(decoder_for(tiles[0]).model, Kind.of(tiles[0]), flights=2)
    backend = CountingBackend()
    settings = BatchSettings(memory=4 * needed + 10)
    decoder = BatchDecoder(decoder_for(tiles[0]).model, backend, settings)
    assert decoder.most(Kind.of(tiles[0])) == 4
    with pytest.raises(SettingsError, match="do not fit"):
        decoder.decode(tiles)
    found = []
    for begin, batch in decoder.stream(tiles):
        assert begin == len(found)
        found += list(np.array(batch.checked().to_host()))
    assert len(found) == 9
    for tile in others:
        decoder.decode([tile])
        gc.collect()
    for tile, image in zip(tiles, found, strict=True):
        close_enough(image, on_cpu(tile))
    assert 0 < backend.most <= settings.memory
    small = BatchDecoder(decoder.model, backend, BatchSettings(memory=needed - 1))
    with pytest.raises(SettingsError, match="too little"):
        small.decode(tiles[:1])
    with pytest.raises(SettingsError):
        BatchSettings(tiles=0)


def test_flights_keep_apart(tissue: Picture) -> None:
    """Batches that are under way together, and results that are asked for late."""
    tiles = [coded(tissue(48, 40, seed=s), gain=90 + 20 * s) for s in range(5)]
    decoder = decoder_for(tiles[0])
    pending = [decoder.submit([tile]) for tile in tiles]
    for tile, one in zip(reversed(tiles), reversed(pending), strict=True):
        close_enough(one.result().checked().to_host()[0], on_cpu(tile))
        times = one.seconds()
        assert set(times) == set(STEPS_OF_A_BATCH) and min(times.values()) > 0


def test_a_batch_may_have_room_to_spare(tissue: Picture) -> None:
    tiles = [coded(tissue(32, 48, seed=s)) for s in range(2)]
    decoded = decoder_for(tiles[0]).submit(tiles, count=5).result()
    assert decoded.errors == [None, None] and len(decoded.images) == 2
    for tile, image in zip(tiles, decoded.images.to_host(), strict=True):
        close_enough(image, on_cpu(tile))


# -- pixels for others --


def test_images_speak_the_array_protocols() -> None:
    array = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    images = Images(array)
    np.testing.assert_array_equal(np.from_dlpack(images), array)
    np.testing.assert_array_equal(np.asarray(images), array)
    assert images.to_host() is not None and not hasattr(images, "__cuda_array_interface__")
    out = np.empty_like(array)
    assert images.to_host(out) is out and (out == array).all()

    class Device:
        def __init__(self) -> None:
            self.shape = array.shape
            self.__cuda_array_interface__ = {"data": (array.ctypes.data, False), "version": 3}

    there = Images(Device(), 1)
    assert there.__cuda_array_interface__["data"][0] == array.ctypes.data
    assert there.__dlpack_device__() == (2, 1) and not hasattr(there, "__array_interface__")


def test_capsules_keep_their_memory_until_given_back() -> None:
    class Owner:
        def __init__(self) -> None:
            self.array = np.arange(24, dtype=np.uint8)

    import weakref

    class Lent:
        def __init__(self, owner: Owner) -> None:
            self.owner = owner

        def __dlpack__(self, **_: Any) -> Any:
            return capsule(self.owner, self.owner.array.ctypes.data, (2, 3, 4), (1, 0))

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    owner = Owner()
    alive = weakref.ref(owner)
    view = np.from_dlpack(Lent(owner))
    unused = Lent(owner).__dlpack__()
    np.testing.assert_array_equal(view, owner.array.reshape(2, 3, 4))
    del owner, unused
    gc.collect()
    assert alive() is not None and view[1, 2, 3] == 23
    del view
    gc.collect()
    assert alive() is None


# -- device= --


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine whose GPU is the host backend; counts of the tiles that were sent there."""
    sent: list[int] = []
    stream = BatchDecoder.stream

    def counted(self: BatchDecoder, tiles: Sequence[Tile]) -> Any:
        sent.append(len(tiles))
        return stream(self, tiles)

    monkeypatch.setattr(provider, "_problem", lambda: None)
    monkeypatch.setattr(dispatch, "CudaBackend", HostBackend)
    monkeypatch.setattr(dispatch, "_decoders", dispatch._Decoders())
    monkeypatch.setattr(BatchDecoder, "stream", counted)
    return sent


def mixed(tissue: Picture) -> list[bytes]:
    """Learned tiles of two kinds among others."""
    learned = [coded(tissue(48, 32, seed=s)).pack() for s in range(3)]
    more = [coded(tissue(48, 32), stages=2).pack()]
    return [learned[0], wsicodec.encode(np.full((48, 32, 3), 200, np.uint8)), *learned[1:], *more,
            wsicodec.encode(tissue(48, 32), codec="jpeg"),
            wsicodec.encode(tissue(48, 32), lossless=True)]  # fmt: skip


def test_mixed_batches_on_a_gpu(gpu: list[int], tissue: Picture) -> None:
    data = mixed(tissue)
    model_of(bitstream.parse(data[0]).learned.model)
    expected = wsicodec.decode_batch(data, device="cpu")
    assert not gpu
    out = np.empty_like(expected)
    assert wsicodec.decode_batch(data, device="cuda", out=out) is out
    assert sorted(gpu) == [1, 3]
    for found, want in zip(out, expected, strict=True):
        close_enough(found, want)
    sizes = [data[0], coded(tissue(16, 16)).pack()]
    several = wsicodec.decode_batch(sizes, device="cuda")
    assert [x.shape for x in several] == [(48, 32, 3), (16, 16, 3)]
    close_enough(wsicodec.decode(data[0], device="cuda"), expected[0])
    np.testing.assert_array_equal(wsicodec.decode(data[1], device="cuda"), expected[1])


class _WrongNetwork(HostBackend):
    """The effective gain index of one position is off by half an octave."""

    kind = "wrong"

    def effective_gains(self, step: Any, indices: Any, gains: Any, *others: Any) -> None:
        super().effective_gains(step, indices, gains, *others)
        gains[-1, -1, -1] += 16


class _WrongOrder(HostBackend):
    """A level that comes out with the wrong sign."""

    kind = "wrong"

    def dequantise(self, levels: Any, *others: Any) -> None:
        levels[0, 0, 0] = -levels[0, 0, 0] or 1
        super().dequantise(levels, *others)


@pytest.mark.parametrize("backend", [_WrongNetwork, _WrongOrder])
def test_a_backend_that_differs_is_not_used(
    backend: type[HostBackend], gpu: list[int], tissue: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = coded(tissue(48, 32))
    model = model_of(tile.learned.model)
    check_backend(model, HostBackend())
    monkeypatch.setattr(dispatch, "CudaBackend", backend)
    with pytest.raises(UnsupportedError, match=r"the wrong backend gives other .* not used"):
        wsicodec.decode_batch([tile.pack()], device="cuda")
    assert not gpu
    monkeypatch.setattr(codec, "AUTO_PIXELS", 1)
    with pytest.warns(RuntimeWarning, match="other"):
        found = wsicodec.decode_batch([tile.pack()])
    np.testing.assert_array_equal(found[0], on_cpu(tile))


def test_the_self_check_reaches_every_stage_of_the_shipped_model() -> None:
    model = encoder_of(find_model("he-fast"))[0]
    found = symbols_of(BatchDecoder(model, HostBackend()), noise_tiles(model))
    assert len(found) == 1 + len(model.architecture.stages)
    for symbols in found:
        assert symbols.any(axis=(1, 2)).sum() >= 2, symbols.shape  # of three tiles


def test_auto_takes_the_gpu_for_many_tiles_only(
    gpu: list[int], tissue: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mixed(tissue)
    model_of(bitstream.parse(data[0]).learned.model)
    wsicodec.decode_batch(data)
    assert not gpu
    monkeypatch.setattr(codec, "AUTO_PIXELS", 3 * 48 * 32)
    found = wsicodec.decode_batch(data, device="auto")
    assert gpu == [3]
    for image, want in zip(found, wsicodec.decode_batch(data, device="cpu"), strict=True):
        close_enough(image, want)
    broken = replace(bitstream.parse(data[0]), payload=b"\0" * 9).pack()
    with pytest.raises(FormatError):
        wsicodec.decode_batch([*data, broken])


def test_a_gpu_that_fails_is_replaced_under_auto_alone(
    gpu: list[int], tissue: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mixed(tissue)
    model_of(bitstream.parse(data[0]).learned.model)

    def fail(*_: Any) -> None:
        raise MemoryError("no memory on the device")

    monkeypatch.setattr(HostBackend, "empty", fail)
    monkeypatch.setattr(codec, "AUTO_PIXELS", 1)
    with pytest.warns(RuntimeWarning, match="no memory on the device"):
        found = wsicodec.decode_batch(data)
    np.testing.assert_array_equal(found, wsicodec.decode_batch(data, device="cpu"))
    with pytest.raises(RuntimeError, match="no memory on the device"):
        wsicodec.decode_batch(data, device="cuda")


def test_cuda_that_cannot_be_used_is_one_named_error(
    tissue: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = coded(tissue(16, 16)).pack()
    monkeypatch.setattr(provider, "_problem", lambda: "no CUDA device or driver is found")
    for call in (lambda: wsicodec.decode(data, device="cuda"),
                 lambda: wsicodec.decode_batch([data], device="cuda")):  # fmt: skip
        with pytest.raises(RuntimeMissingError, match=r"no CUDA device.*pip install"):
            call()
    monkeypatch.setattr(codec, "AUTO_PIXELS", 1)
    found = wsicodec.decode_batch([data])
    np.testing.assert_array_equal(found[0], on_cpu(bitstream.parse(data)))
    with pytest.raises(SettingsError):
        wsicodec.decode(data, device="tpu")


def test_a_session_that_fell_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime falls back in silence: what the session says of itself counts."""
    ort, asked = provider.runtime(), []

    def silent(graph: bytes, options: Any, providers: list[Any]) -> Any:
        asked.append(providers[0])
        return ort.InferenceSession(graph, options, providers=[provider.CPU])

    fake = SimpleNamespace(SessionOptions=ort.SessionOptions, InferenceSession=silent)
    monkeypatch.setattr(session, "runtime", lambda: fake)
    with pytest.raises(UnsupportedError, match="fell back"):
        provider.session_of(provider._doubling(), provider.Provider(cuda=True, stream=77))
    name, options = asked[0]
    assert name == provider.CUDA and options["user_compute_stream"] == "77"
    assert options["use_tf32"] == options["enable_cuda_graph"] == "0"


def test_a_forked_process_leaves_the_gpu_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    works = cache(lambda: None)
    monkeypatch.setattr(provider, "_problem", works)
    monkeypatch.setattr(provider, "_state", {"forked": False})
    provider._after_fork()
    assert provider.cuda_problem() is None  # nobody had asked before
    provider._after_fork()
    with pytest.raises(RuntimeMissingError, match="forked"):
        provider.require_cuda()


# -- the CUDA backend, kernels in the simulator, networks on the CPU --

SIMULATED = """
import hashlib, json, sys
import numpy as np
from pathlib import Path
from wsicodec import bitstream
from wsicodec.models.decoder import load_decoder
from wsicodec.models.provider import Provider
from wsicodec.pipelines.backend import Network
from wsicodec.pipelines.batched import BatchDecoder, BatchSettings
from wsicodec.pipelines.cuda import CudaBackend

class Simulated(CudaBackend):
    def _choose_device(self): pass
    def _provided(self, tf32, graphs): return Provider()
    def _free_memory(self): return 2**28
    def network(self, graph): return Network(graph, Provider())
    def bind(self, network, inputs, outputs): return network.bind(inputs, outputs)
    def mark(self): return self._cuda.event()

folder, found = Path(sys.argv[1]), {}
models = {}
for name in ("tiny", "tilted"):
    data = (folder / f"{name}.wscm").read_bytes()
    models[hashlib.sha256(data).digest()[:4]] = load_decoder(data, fused=False)
for name in sys.argv[3:]:
    tile = bitstream.parse((folder / "decode" / f"{name}.tile").read_bytes())
    broken = bitstream.Tile(tile.mode, tile.height, tile.width, tile.payload[:-6], tile.learned)
    decoder = BatchDecoder(models[tile.learned.model], Simulated(), BatchSettings(tiles=4))
    arrays = []
    decoded = decoder.decode([broken, tile], trace=lambda c, s, x: arrays.append(x[1]))
    digest = hashlib.sha256(b"".join(x.astype("<i4").tobytes() for x in arrays)).hexdigest()
    errors = [type(e).__name__ for e in decoded.errors]
    pixels = decoded.images.to_host()[1]
    np.save(Path(sys.argv[2]) / (name.replace("/", "_") + ".npy"), pixels)
    found[name] = [digest, errors]
print(json.dumps(found))
"""


def test_the_cuda_backend_in_the_simulator(tmp_path: Path) -> None:
    names = ["learned-17x31-gain90-stages2-lanes2", "tilted/17x33-gain140-tilt7"]
    done = subprocess.run(
        [sys.executable, "-c", SIMULATED, str(FOLDER), str(tmp_path), *names],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in names:
        sha, errors = found[name]
        assert sha == SYMBOLS[name]
        assert errors[0] in ("TruncatedError", "FormatError") and errors[1] == "NoneType"
        pixels = np.load(tmp_path / (name.replace("/", "_") + ".npy"))
        close_enough(pixels, on_cpu(vector(f"decode/{name}")))


def test_cells_of_a_tile_cover_it() -> None:
    """What the mosaic relies on: rows of cells, the first the largest."""
    for size in ((512, 512), (513, 1), (1025, 530)):
        cells = cells_of(*size)
        lines = -(-size[0] // cells[0][2].height)
        assert len(cells) % lines == 0
        assert all(c[2].height <= cells[0][2].height for c in cells)
        assert all(c[2].width <= cells[0][2].width for c in cells)
