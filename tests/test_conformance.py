"""The conformance vectors of format version 1, run by wsicodec and by the second decoder.

Vectors are the format: when one fails, the code is wrong. No test writes one, a missing one is a
failure, and ``python -m tools.make_conformance`` refuses to overwrite any.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import second_decoder

import wsicodec
from tools import make_conformance
from wsicodec import bitstream
from wsicodec.entropy import kernel, reference
from wsicodec.models.decoder import load_decoder
from wsicodec.models.store import allow_model

FOLDER = Path(__file__).parent / "conformance"

DECODE_LEARNED = (
    "learned-112x144-gain128-lanes16-random-turned",
    "learned-144x112-gain150-lanes8-turned",
    "learned-16x16-gain0-stages1-lanes1",
    "learned-16x16-gain255-lanes32-turned",
    "learned-16x513-gain120-stages5-lanes2-turned",
    "learned-16x80-gain200-lanes8-random",
    "learned-17x31-gain90-stages2-lanes2",
    "learned-1x1-gain0-lanes32",
    "learned-1x1-gain90",
    "learned-31x17-gain1-stages3-lanes8-turned",
    "learned-31x33-gain130-tilt9-turned",
    "learned-32x32-gain160-stages2-lanes2",
    "learned-32x32-gain140-turned-a",
    "learned-32x32-gain140-turned-b",
    "learned-32x32-gain140-turned-c",
    "learned-32x48-gain10-lanes16",
    "learned-33x49-gain70-stages7",
    "learned-48x32-gain220-stages3-lanes32",
    "learned-48x48-gain128-random-turned",
    "learned-48x528-gain20-lanes32-random-turned",
    "learned-48x64-gain100-stages6-lanes2-turned",
    "learned-513x16-gain90-turned",
    "learned-528x16-gain240-lanes1-random",
    "learned-64x48-gain0-turned",
    "learned-64x48-gain128-stages4",
    "learned-64x48-gain180-lanes16-turned",
    "learned-64x48-gain255-lanes1",
    "learned-64x48-gain90",
    "learned-64x64-gain60-random",
    "learned-80x16-gain30-lanes1-random",
    "learned-80x48-gain40-stages1",
    "learned-80x96-gain6-random",
    "learned-96x80-gain250-random",
    "smallest/1x1-gain0",
    "smallest/40x50-gain255-lanes32",
    "smallest/50x40-gain100-turned",
)
DECODE_LAPPED = (
    "lapped/16x16-gain128-turned",
    "lapped/16x88-gain120-lanes1-turned",
    "lapped/17x33-gain140",
    "lapped/1x1-gain90",
    "lapped/256x256-gain150-lanes8-turned",
    "lapped/33x17-gain100-stages1-turned",
    "lapped/40x72-gain255",
    "lapped/40x72-gain60-lanes2-turned",
    "lapped/600x530-gain150-stages1-turned",
    "lapped/88x16-gain120-lanes32",
)
DECODE_TILTED = (
    "tilted/17x33-gain140-tilt7",
    "tilted/1x1-gain90-tilt16",
    "tilted/33x17-gain100-stages4-lanes1-tilt8-turned",
    "tilted/40x40-gain150-random",
    "tilted/40x72-gain200",
    "tilted/40x72-gain200-tilt16",
    "tilted/40x72-gain60-lanes2-tilt15-turned",
    "tilted/49x65-gain180-tilt7-random",
    "tilted/49x81-gain230-lanes16-tilt15-random",
    "tilted/529x23-gain160-tilt16-random-turned",
    "tilted/65x49-gain128-lanes8-tilt1-random",
    "tilted/72x40-gain255-lanes1-tilt16-random",
    "tilted/80x48-gain20-lanes32-tilt8-random-turned",
)
DECODE_MODELS = DECODE_LEARNED + DECODE_LAPPED + DECODE_TILTED
DECODE_OTHERS = (
    "constant-1x1",
    "constant-64x48",
    "jpeg-17x31",
    "jpeg-420-17x31",
    "jpeg2000-17x31",
    "jpegxl-17x31",
    "jpegxl-container-17x31",
    "lossless-17x31",
    "lossless-1x1",
    "transcoded-17x31",
    "transcoded-420-17x31",
)
CODER = (
    "coder-all-classes-lanes1",
    "coder-all-classes-lanes16",
    "coder-all-classes-lanes2",
    "coder-all-classes-lanes32",
    "coder-all-classes-lanes4",
    "coder-all-classes-lanes8",
    "coder-class0-lanes1",
    "coder-empty-lanes4",
    "coder-escapes-lanes4",
    "coder-escapes-quantiser1-lanes1",
    "coder-escapes-quantiser1-lanes4",
    "coder-escapes-raw-bits-lanes2",
    "coder-escapes-raw-bits-quantiser1-lanes1",
    "coder-escapes-raw-bits-quantiser1-lanes4",
    "coder-walk-lanes1",
)
WHOLE = {  # encoded from all symbols: folder to the tile
    "lapped": "lapped/40x72-gain60-lanes2-turned",
    "tilted": "tilted/40x72-gain60-lanes2-tilt15-turned",
}
CODER_WHOLE = tuple(f"{folder}/coder" for folder in WHOLE)
PACK = ("tile-constant", "tile-jpeg", "tile-learned", *(f"{folder}/tile" for folder in WHOLE))
REFUSE_COUNT = 77
REFUSE = tuple(sorted(path.stem for path in (FOLDER / "refuse").glob("*.tile")))
REFUSE_MODEL_COUNT = 56
REFUSE_MODEL = tuple(sorted(path.stem for path in (FOLDER / "refuse").glob("*.wscm")))

Read = Callable[[str], bytes]


def outside_tolerance(
    pixels: np.ndarray, expected: np.ndarray, free: np.ndarray | None = None
) -> bool:
    """docs/format.md, "Pixels": within 1 on 99.9 % of samples, within 2 on all, but for those of
    ``free`` pixels."""
    assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
    error = np.abs(pixels.astype(int) - expected)
    if free is not None:
        error[free] = 0
    return bool(error.max() > 2 or (error > 1).mean() > 0.001)


def within_tolerance(
    pixels: np.ndarray, expected: np.ndarray, free: np.ndarray | None = None
) -> None:
    assert not outside_tolerance(pixels, expected, free)


@pytest.fixture(scope="module")
def files(tiny_file: bytes) -> list[bytes]:
    """The models of all vectors; this process decodes their tiles from now on."""
    names = ("smallest", "lapped", "tilted")
    found = [tiny_file, *((FOLDER / f"{n}.wscm").read_bytes() for n in names)]
    for file in found:
        allow_model(file)
    return found


def test_no_vector_is_missing_and_none_is_unknown() -> None:
    decode = {f"decode/{n}{s}" for n in DECODE_MODELS + DECODE_OTHERS for s in (".tile", ".png")}
    encode = {f"encode/{n}.json" for n in CODER + CODER_WHOLE + PACK}
    refuse = {f"refuse/{n}.tile" for n in REFUSE} | {f"refuse/{n}.wscm" for n in REFUSE_MODEL}
    indices = {"decode/symbols.json", "refuse/errors.json"}
    models = {"tiny.wscm", "tiny.encoder.wscm", "smallest.wscm", "lapped.wscm", "tilted.wscm"}
    found = {str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*") if p.is_file()}
    assert found == decode | encode | refuse | indices | models
    assert len(REFUSE) == REFUSE_COUNT
    assert len(REFUSE_MODEL) == REFUSE_MODEL_COUNT
    assert set(json.loads((FOLDER / "refuse/errors.json").read_text())) == set(REFUSE)
    assert set(json.loads((FOLDER / "decode/symbols.json").read_text())) == set(DECODE_MODELS)


def test_the_tiny_model_is_small_and_unchanged(tiny_file: bytes) -> None:
    encoder = (FOLDER / "tiny.encoder.wscm").read_bytes()
    assert len(tiny_file) + len(encoder) < 120_000
    # every learned vector names this file; a changed model would be another model
    tile = bitstream.parse((FOLDER / "decode/learned-64x48-gain90.tile").read_bytes())
    assert tile.learned is not None
    assert hashlib.sha256(tiny_file).digest()[:4] == tile.learned.model


def test_the_lapped_model_is_small_and_unchanged(vector: Read) -> None:
    file = vector("lapped.wscm")
    assert len(file) < 60_000
    tile = bitstream.parse(vector("decode/lapped/40x72-gain255.tile"))
    assert tile.learned is not None
    assert hashlib.sha256(file).digest()[:4] == tile.learned.model
    # its matrices are no others by accident
    model = second_decoder.read_model(file)
    lapping, colours = model.lapping, model.colours
    for other in (lapping.T, lapping[::-1, ::-1], lapping[::-1, ::-1].T, -lapping, np.eye(8)):
        assert np.abs(lapping - other).max() > 0.5
    assert np.abs(colours - colours.T).max() > 0.5
    assert np.abs(colours @ colours.T - np.eye(3)).max() > 0.2


def test_the_tilted_model_is_small_and_unchanged(vector: Read) -> None:
    file = vector("tilted.wscm")
    assert len(file) < 15_000
    tile = bitstream.parse(vector("decode/tilted/40x72-gain200-tilt16.tile"))
    assert tile.learned is not None
    assert hashlib.sha256(file).digest()[:4] == tile.learned.model
    model = second_decoder.read_model(file)
    means, contexts = len(model.mean_factor), model.context_channels
    for part in (slice(means), slice(means, contexts), slice(contexts, None)):
        assert (model.tilt[part].min(), model.tilt[part].max()) == (-32, 32)
    assert (model.tilt == 0).any() and (model.tilt % 2 == 1).any()


@pytest.mark.parametrize("name", ["tiny", "lapped"])
def test_channels_are_in_no_plain_order(name: str, vector: Read) -> None:
    """Nor those of each plane, and every plane has some."""
    order = second_decoder.read_model(vector(f"{name}.wscm")).order.astype(int)
    assert (np.diff(order) < 0).any()
    assert set(order // 256) == {0, 1, 2}
    swapped = order // 256 * 256 + order % 16 * 16 + order // 16 % 16
    assert (np.argsort(order) != np.argsort(swapped)).any()


@pytest.mark.parametrize("name", DECODE_MODELS + DECODE_OTHERS)
def test_decode(name: str, vector: Read, files: list[bytes]) -> None:
    data = vector(f"decode/{name}.tile")
    expected = imagecodecs.png_decode(vector(f"decode/{name}.png"))
    second = second_decoder.decode(data, files)
    within_tolerance(wsicodec.decode(data), expected, second.free)
    within_tolerance(second.pixels, expected)


def test_tiles_of_several_tilts_decode_in_one_go(vector: Read, files: list[bytes]) -> None:
    names = [n for n in DECODE_TILTED if "/40x72" in n]
    tiles = [vector(f"decode/{n}.tile") for n in names]
    assert len({tile[24] if tile[23] >> 7 else 0 for tile in tiles}) == 3
    for name, pixels in zip(names, wsicodec.decode_batch(tiles), strict=True):
        within_tolerance(pixels, imagecodecs.png_decode(vector(f"decode/{name}.png")))


@pytest.mark.parametrize("name", DECODE_MODELS)
def test_symbols(
    name: str, vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hyper-latents and levels, of class 0 too, in coding order."""
    data = vector(f"decode/{name}.tile")
    expected = json.loads(vector("decode/symbols.json"))[name]
    second = second_decoder.decode(data, files)
    ours, read = [], kernel.Decoder.get

    def recorded(self: kernel.Decoder, classes: np.ndarray, **kind: bool) -> np.ndarray:
        ours.append(read(self, classes, **kind))
        return ours[-1]

    monkeypatch.setattr(kernel.Decoder, "get", recorded)
    wsicodec.decode(data)
    theirs = [array for cell in second.cells for array in (cell.z, *cell.levels)]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert make_conformance.symbols_digest(second.cells) == expected


@pytest.mark.parametrize("name", CODER + CODER_WHOLE)
def test_encode_symbols(name: str, vector: Read) -> None:
    """Indices, levels and bytes, by the compiled coder, the plain one and the second decoder's."""
    case = json.loads(vector(f"encode/{name}.json"))
    payload, lanes = bytes.fromhex(case["payload"]), case["lanes"]
    file = vector(f"{Path(name).parent}.wscm" if name in CODER_WHOLE else "tiny.wscm")
    tables, model = load_decoder(file).tables, second_decoder.read_model(file)
    encoder, plain_encoder = (k.Encoder(tables, lanes) for k in (kernel, reference))
    decoder, plain = (k.Decoder(payload, tables, lanes) for k in (kernel, reference))
    second = second_decoder.Decoder(payload, lanes)
    for array in case["arrays"]:
        dependent = array["dependent"]
        values, classes = array["levels" if dependent else "symbols"], array["classes"]
        if not dependent:
            assert second.hyper_latents(model, np.array(classes)).tolist() == values
        else:
            indices, quantisers = second.indices(model, np.array(classes, np.int64), None)
            assert indices.tolist() == array["indices"]
            assert second_decoder.levels_of(indices, quantisers).tolist() == values
        bytes_of_classes = np.array(classes, np.uint8)
        encoder.put(np.array(values, np.int32), bytes_of_classes, dependent=dependent)
        plain_encoder.put(values, classes, dependent)
        assert decoder.get(bytes_of_classes, dependent=dependent).tolist() == values
        assert plain.symbols(classes, dependent) == values
    assert encoder.finish() == plain_encoder.finish() == payload
    decoder.finish()
    plain.finish()
    second.end()


@pytest.mark.parametrize("folder", WHOLE)
def test_a_tile_is_encoded_from_its_symbols(folder: str, vector: Read) -> None:
    """From symbols to stream, to tile, to pixels: three vectors of one tile."""
    coder, packed = (json.loads(vector(f"encode/{folder}/{n}.json")) for n in ("coder", "tile"))
    turns, stream = second_decoder.read_turns(bytes.fromhex(packed["payload"]), 1)
    assert coder["payload"] == stream.hex() and turns != [(0, 0, 0)]
    assert packed["tile"] == vector(f"decode/{WHOLE[folder]}.tile").hex()


def test_coder_vectors_reach_every_rule(vector: Read) -> None:
    transitions, peaks = set(), set()
    for name in CODER:
        case = json.loads(vector(f"encode/{name}.json"))
        first = 0
        for array in case["arrays"]:
            coded = [i for i, c in enumerate(array["classes"]) if c]
            if array["dependent"]:
                states = [0] * case["lanes"]
                for n, i in enumerate(coded, first):
                    lane, k = n % case["lanes"], array["indices"][i]
                    transitions.add((states[lane], k % 2))
                    if abs(k) == 2**20:
                        raw = array["classes"][i] > 24
                        peaks.add((states[lane] % 2, k, raw))
                    states[lane] = second_decoder.NEXT_STATE[k % 2][states[lane]]
            first += len(coded)
    assert transitions == {(state, odd) for state in range(8) for odd in range(2)}
    assert peaks == {
        (u, k, raw) for u in (0, 1) for k in (2**20, -(2**20)) for raw in (False, True)
    }


@pytest.mark.parametrize("name", PACK)
def test_encode_tile(name: str, vector: Read) -> None:
    case = json.loads(vector(f"encode/{name}.json"))
    learned = None
    if fields := case.get("learned"):
        learned = bitstream.LearnedHeader(
            bytes.fromhex(fields["model"]), fields["gain"], fields["stages"], fields["lanes_log2"],
            fields.get("tilt", 0),
        )  # fmt: skip
    payload = bytes.fromhex(case["payload"])
    mode = bitstream.Mode(case["mode"])
    tile = bitstream.Tile(mode, case["height"], case["width"], payload, learned)
    assert tile.pack().hex() == case["tile"]
    assert bitstream.parse(tile.pack()) == tile


@pytest.mark.parametrize("name", REFUSE)
def test_refuse(name: str, vector: Read, files: list[bytes]) -> None:
    data = vector(f"refuse/{name}.tile")
    error = getattr(wsicodec, json.loads(vector("refuse/errors.json"))[name])
    with pytest.raises(wsicodec.WsicodecError) as caught:
        wsicodec.decode(data)
    assert type(caught.value) is error
    assert str(caught.value)
    with pytest.raises(second_decoder.RefusedError):
        second_decoder.decode(data, files)


@pytest.mark.parametrize("name", REFUSE_MODEL)
def test_refuse_model(name: str, vector: Read) -> None:
    data = vector(f"refuse/{name}.wscm")
    with pytest.raises(wsicodec.ModelError):
        load_decoder(data)
    with pytest.raises(second_decoder.RefusedError):
        second_decoder.read_model(data)


def test_refused_models_have_one_fault_each(vector: Read) -> None:
    """What they were made from is a valid model."""
    smallest = make_conformance.smallest_decoder()
    assert smallest == vector("smallest.wscm")
    lapped = vector("lapped.wscm")
    colours = np.array([[-16.0, 0, 0], [0, 16, 0], [0, 0, 1]], np.float32)
    for tensors in (
        {},
        {"order": np.array([767, *range(11)], np.uint16)},
        {"colours": colours},
        {"colours": np.diag([1, -1, 1.01e-3]).astype(np.float32)},
        {"mean": np.array([-1024, 1024, 0], np.float32)},
        {"inverse_gain": np.linspace(-(2**16), 2**16, 12, dtype=np.float32)},
        {"lapping": np.eye(8, dtype=np.float32)[::-1].copy()},
        {"basis": np.zeros(3, np.float16)},  # no rule names it
        {"tilt": np.array([-32, 32, *range(10)], np.int8)},
    ):
        file = make_conformance.changed(lapped, {}, **tensors)
        load_decoder(file)
        second_decoder.read_model(file)


@pytest.mark.parametrize("name", ["tilt-0", "tilt-17"])
def test_refused_tilts_have_one_fault_each(name: str, vector: Read, files: list[bytes]) -> None:
    """With a tilt within bounds they are valid tiles."""
    data = vector(f"refuse/{name}.tile")
    body = data[18:24] + b"\x10" + data[25:]
    tile = make_conformance.tile(1, *struct.unpack("<HH", data[6:10]), body)
    within_tolerance(wsicodec.decode(tile), second_decoder.decode(tile, files).pixels)


class Walked(second_decoder.Decoder):
    """Notes lanes with raw fields, and the states' transitions."""

    def __init__(self, payload: bytes, lanes: int) -> None:
        super().__init__(payload, lanes)
        SEEN["lanes"].add(lanes)

    def raw(self, bits: int) -> int:
        if bits:
            SEEN["raw"].add((len(self.states), self.lane()))
        return super().raw(bits)

    def indices(self, model, classes, cell):
        start, lanes = self.symbol, len(self.states)
        indices, quantisers = super().indices(model, classes, cell)
        coded = indices[classes > 0].tolist()
        for lane in range(lanes):
            state = 0
            for k in coded[(lane - start) % lanes :: lanes]:
                SEEN["transitions"].add((state, k % 2))
                state = second_decoder.NEXT_STATE[k % 2][state]
        return indices, quantisers


SEEN: dict[str, set] = {"lanes": set(), "raw": set(), "transitions": set()}


def test_vectors_reach_every_rule(
    vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learned vectors together hold what a decoder could get wrong."""
    monkeypatch.setattr(second_decoder, "Decoder", Walked)
    model = second_decoder.read_model(files[0])
    tables = len(model.table_radii) // 2
    classes: list[set[int]] = [set(), set()]
    peaks: list[set[int]] = [set(), set()]
    escapes: list[set[str]] = [set(), set()]
    means, empty, lattices, turns = [], set(), set(), []
    lowered = raised = False
    for name in DECODE_LEARNED:
        data = vector(f"decode/{name}.tile")
        for cell in second_decoder.decode(data, files).cells:
            turns.append(cell.turn)
            if name.startswith("smallest"):
                continue
            lowered |= data[22] > 0 and cell.effective.min() == 0
            raised |= data[22] < 255 and cell.effective.max() == 255
            means += [m.reshape(-1) for m in cell.means if m is not None]
            rows, columns = cell.effective.shape
            for k, c in enumerate(cell.classes):
                lattice = model.stages[k][2]
                (empty if c.shape[1] == 0 else lattices).add((lattice, rows % 2, columns % 2))
                for u in range(2):
                    mine = (c > 0) & (cell.quantisers[k] == u)
                    i = cell.indices[k][mine]
                    classes[u] |= set(c[mine].tolist())
                    peaks[u] |= {int(i.min(initial=0)), int(i.max(initial=0))}
                    raw = np.maximum(0, -(-(c[mine] - tables) // 8))
                    radius = np.array(model.table_radii)[c[mine] - 8 * raw - 1 + u * tables]
                    escaped = np.abs(i + 2**raw // 2 >> raw) > radius
                    if (escaped & (raw == 0)).any():
                        escapes[u].add("plain")
                    if (escaped & (raw > 0)).any():
                        escapes[u].add("raw")
    assert classes == [set(range(1, 128))] * 2
    assert all(max(p) == 2**20 and min(p) == -(2**20) for p in peaks)
    assert escapes == [{"plain", "raw"}] * 2
    assert (np.concatenate(means).min(), np.concatenate(means).max()) == (-1023, 1023)
    assert lowered and raised
    assert lattices == {(n, a, b) for n in range(4) for a in range(2) for b in range(2)}
    assert (np.min(turns, axis=0) == -128).all() and (np.max(turns, axis=0) == 127).all()
    assert {n for n, _, _ in empty} == {2, 3}  # 1 x 1 has neither, 1 x 5 has no lattice 2
    assert SEEN["lanes"] == {1, 2, 4, 8, 16, 32}
    assert SEEN["raw"] == {(n, lane) for n in SEEN["lanes"] for lane in range(n)}
    assert SEEN["transitions"] == {(state, odd) for state in range(8) for odd in range(2)}


def test_tilted_vectors_reach_every_rule(
    vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tilts, shifts = set(), set()
    classes: set[str] = set()
    plain = second_decoder.read_model(files[3])
    wanted = second_decoder.tilted_classes

    def noted(model: second_decoder.Model, first: int, given: np.ndarray) -> np.ndarray:
        finer = model.finer[first : first + len(given), None]
        found, sums = wanted(model, first, given), given + finer
        for name, where in {
            "not coded, finer": (given == 0) & (finer > 0),
            "no longer coded": (given > 0) & (sums == 0),
            "below 0": (given > 0) & (sums < 0),
            "above 127": sums > 127,
            "finer": (finer > 0) & (found == sums) & (given > 0),
            "coarser": (finer < 0) & (found == sums) & (found > 0),
        }.items():
            if where.any():
                classes.add(name)
        return found

    monkeypatch.setattr(second_decoder, "tilted_classes", noted)
    factors: dict[str, set[int]] = {"mean_factor": set(), "context_factor": set()}
    for name in DECODE_TILTED:
        data = vector(f"decode/{name}.tile")
        tilt = data[24] if data[23] >> 7 else 0
        assert (tilt > 0) == (f"tilt{tilt}" in name)
        tilts.add(tilt)
        model = second_decoder.tilted(plain, tilt)
        for key, found in factors.items():
            found |= set(getattr(model, key).tolist())
            e = (4 if key == "mean_factor" else -4) * model.finer[: len(getattr(model, key))]
            shifts |= {(key, 15 - int(n >> 5)) for n in e}
        second_decoder.decode(data, files)
    assert tilts == {0, 1, 7, 8, 15, 16}
    assert shifts == {(key, q) for key in factors for q in range(11, 20)}
    assert all({1, 2**21 - 1} <= found for found in factors.values())
    assert classes == {
        "not coded, finer", "no longer coded", "below 0", "above 127", "finer", "coarser"
    }  # fmt: skip


TILT, TILT_FACTORS = second_decoder.tilted, second_decoder.tilted_factors
TILT_CLASSES, LATENTS = second_decoder.tilted_classes, second_decoder.latents


def other_shifts(change: Callable[[np.ndarray], Any]) -> Callable[..., Any]:
    """``tilted`` with other shifts; change: of the tile's tilt times the channels'."""

    def wrong(model: second_decoder.Model, tilt: int) -> second_decoder.Model:
        finer = np.asarray(change(tilt * model.tilt), np.int64)
        return TILT(replace(model, tilt=16 * finer), 1)

    return wrong


def other_factor(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
    """``tilted`` with another kind of factors; change: of the model's ones and e."""

    def wrong(model: second_decoder.Model, tilt: int) -> second_decoder.Model:
        found, plain = TILT(model, tilt), getattr(model, name)
        e = {"mean_factor": 4, "context_factor": -4}.get(name, 1) * found.finer[: len(plain)]
        return replace(found, **{name: change(plain, e)})

    return wrong


def factors(
    *, half: bool = True, low: int = 1, high: int = 2**21 - 1, towards_zero: bool = False
) -> Callable[..., np.ndarray]:
    """``tilted_factors`` with a mistake."""

    def wrong(plain: np.ndarray, e: np.ndarray) -> np.ndarray:
        q, i = 15 - (e >> 5), e & 31
        if towards_zero:
            q, i = 15 - np.sign(e) * (np.abs(e) >> 5), np.abs(e) & 31
        product = plain.astype(np.int64) * second_decoder.OCTAVE[i]
        return np.clip((product + half * (1 << q - 1)) >> q, low, high)

    return wrong


def other_classes(change: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """``tilted_classes`` of another rule; change: of classes and shifts."""
    return lambda model, first, classes: change(
        classes, model.finer[first : first + len(classes), None]
    )


def tilted_correction(
    model: second_decoder.Model, v: np.ndarray, context: np.ndarray, effective: np.ndarray
) -> np.ndarray:
    bare = v * model.inverse_gain[:, None, None] * 2.0 ** (6 - effective / 32) / 16
    finer = model.finer[:, None, None]
    return bare + (LATENTS(model, v, context, effective) - bare) * 2.0 ** (-finer / 8)


WRONG_TILTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "none": ("tilted", lambda model, tilt: TILT(model, 0)),
    "one more": ("tilted", lambda model, tilt: TILT(model, tilt + (tilt > 0))),
    "the other way": ("tilted", lambda model, tilt: TILT(replace(model, tilt=-model.tilt), tilt)),
    "shifts rounded down": ("tilted", other_shifts(lambda x: x >> 4)),
    "shifts rounded towards zero": ("tilted", other_shifts(lambda x: np.trunc(x / 16))),
    "shifts plus half, towards zero": ("tilted", other_shifts(lambda x: np.trunc((x + 8) / 16))),
    "halves of shifts away from zero": (
        "tilted", other_shifts(lambda x: np.sign(x) * (np.abs(x) + 8 >> 4))
    ),
    "halves of shifts to even": ("tilted", other_shifts(lambda x: np.rint(x / 16))),
    "inverse gains as they were": ("tilted", other_factor("inverse_gain", lambda x, e: x)),
    "inverse gains the other way": (
        "tilted", other_factor("inverse_gain", lambda x, e: x * 2 ** (e / 8))
    ),
    "factors rounded down": ("tilted_factors", factors(half=False)),
    "octaves towards zero": ("tilted_factors", factors(towards_zero=True)),
    "factors in real arithmetic": (
        "tilted_factors", lambda x, e: np.clip(np.rint(x * 2 ** (e / 32)), 1, 2**21 - 1).astype(int)
    ),
    **{f"{name} {fault}": ("tilted", other_factor(name, change))
       for name in ("mean_factor", "context_factor")
       for fault, change in {
           "as it was": lambda x, e: x,
           "the other way": lambda x, e: TILT_FACTORS(x, -e),
           "with a quarter of e": lambda x, e: TILT_FACTORS(x, e >> 2),
           "rounded down": factors(half=False),
           "of 0": factors(low=0),
           "without an upper bound": factors(high=2**40),
       }.items()},
    "classes as they were": ("tilted_classes", lambda model, first, classes: classes),
    "class 0 too": ("tilted_classes", other_classes(lambda c, s: np.clip(c + s, 0, 127))),
    "classes of 1 at least": (
        "tilted_classes", other_classes(lambda c, s: np.where(c == 0, 0, np.clip(c + s, 1, 127)))
    ),
    "classes of 126 at most": (
        "tilted_classes",
        other_classes(lambda c, s: np.where(c == 0, 0, np.clip(c + s, 0, 127 - (s > 0)))),
    ),
    "classes wrap": (
        "tilted_classes", other_classes(lambda c, s: np.where(c == 0, 0, c + s & 127))
    ),
    "classes of a stage from channel 0": (
        "tilted_classes", lambda model, first, classes: TILT_CLASSES(model, 0, classes)
    ),
    "correction in the channel's steps": ("latents", tilted_correction),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TILTS)
def test_tilted_vectors_tell_wrong_tilts(
    name: str, vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, wrong = WRONG_TILTS[name]
    monkeypatch.setattr(second_decoder, function, wrong)
    symbols = json.loads(vector("decode/symbols.json"))
    told = set()
    for case in DECODE_TILTED:
        expected = imagecodecs.png_decode(vector(f"decode/{case}.png"))
        try:
            second = second_decoder.decode(vector(f"decode/{case}.tile"), files)
        except second_decoder.RefusedError:
            told.add(case)
            continue
        same = make_conformance.symbols_digest(second.cells) == symbols[case]
        if not same or outside_tolerance(second.pixels, expected, second.free):
            told.add(case)
    tilted = {case for case in DECODE_TILTED if "tilt" in case.split("/")[1]}
    assert told and told <= tilted
    if name in ("none", "the other way", "inverse gains as they were", "classes as they were"):
        assert told == tilted


def part_of_lap(*, rows: bool, columns: bool) -> Callable[..., np.ndarray]:
    def lap(image: np.ndarray, lapping: np.ndarray) -> np.ndarray:
        image = image.copy()
        if rows:
            second_decoder.lap_borders(image.transpose(1, 0, 2), lapping)
        if columns:
            second_decoder.lap_borders(image, lapping)
        return image

    return lap


LAP = second_decoder.lap
WRONG_LAPS: dict[str, Callable[..., np.ndarray]] = {
    "none": lambda image, lapping: image,
    "rows alone": part_of_lap(rows=True, columns=False),
    "columns alone": part_of_lap(rows=False, columns=True),
    "transposed": lambda image, lapping: LAP(image, lapping.T),
    "from the far end": lambda image, lapping: LAP(image, lapping[::-1, ::-1]),
    "rows of the matrix from the far end": lambda image, lapping: LAP(image, lapping[::-1]),
    "without the half": lambda image, lapping: LAP(image, 2 * lapping - np.eye(8)),
    "other sign": lambda image, lapping: LAP(image, -lapping),
    "twice": lambda image, lapping: LAP(LAP(image, lapping), lapping),
}


@pytest.mark.parametrize("name", WRONG_LAPS)
def test_lapped_vectors_tell_wrong_filters(
    name: str, vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every picture of more than a block shows each of these mistakes."""
    monkeypatch.setattr(second_decoder, "lap", WRONG_LAPS[name])
    for case in DECODE_LAPPED:
        size = case.split("/")[1].split("-")[0]
        if size == "600x530":  # slow, and tested below
            continue
        pixels = second_decoder.decode(vector(f"decode/{case}.tile"), files).pixels
        expected = imagecodecs.png_decode(vector(f"decode/{case}.png"))
        unseen = {
            "1x1": True, "16x16": True, "16x88": name == "rows alone",
            "88x16": name == "columns alone",
        }  # fmt: skip
        assert outside_tolerance(pixels, expected) != unseen.get(size, False), case


def test_lapped_vectors_tell_that_edges_come_after_the_filter(
    vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples past the edge of a cell count, and are not its last ones again."""
    decode_cell = second_decoder.decode_cell

    def cropped_first(coder, model, size, gain, stages, turn):
        bare = replace(model, lapping=np.eye(8))
        cell, samples = decode_cell(coder, bare, size, gain, stages, turn)
        h, w = size
        whole = np.pad(samples, ((0, -h % 16), (0, -w % 16), (0, 0)), mode="edge")
        return cell, LAP(whole, model.lapping)[:h, :w]

    monkeypatch.setattr(second_decoder, "decode_cell", cropped_first)
    for name in ("17x33-gain140", "33x17-gain100-stages1-turned"):
        expected = imagecodecs.png_decode(vector(f"decode/lapped/{name}.png"))
        pixels = second_decoder.decode(vector(f"decode/lapped/{name}.tile"), files).pixels
        assert outside_tolerance(pixels, expected)


TURN_MATRIX, GIVENS = second_decoder.turn_matrix, second_decoder.givens
WRONG_TURNS: dict[str, Callable[..., np.ndarray]] = {
    "none": lambda turn: np.eye(3),
    "transposed": lambda turn: TURN_MATRIX(turn).T,
    "unsigned": lambda turn: TURN_MATRIX([units % 256 for units in turn]),
    "half the angles": lambda turn: TURN_MATRIX([units / 2 for units in turn]),
    "angles in another order": lambda turn: TURN_MATRIX(turn[::-1]),
    "planes in another order": lambda turn: (
        GIVENS(0, 1, turn[0]) @ GIVENS(0, 2, turn[1]) @ GIVENS(1, 2, turn[2])
    ),
    "second angle the other way": lambda turn: TURN_MATRIX((turn[0], -turn[1], turn[2])),
}
LARGE = ("112x144", "144x112", "256x256", "513", "528", "600x530")
TURNED = tuple(
    name
    for name in DECODE_LEARNED + DECODE_LAPPED
    if "turned" in name and not any(size in name for size in LARGE)
)


@pytest.mark.parametrize("name", WRONG_TURNS)
def test_turned_vectors_tell_wrong_turns(
    name: str, vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    monkeypatch.setattr(second_decoder, "turn_matrix", WRONG_TURNS[name])
    for case in TURNED:
        second = second_decoder.decode(vector(f"decode/{case}.tile"), files)
        expected = imagecodecs.png_decode(vector(f"decode/{case}.png"))
        if outside_tolerance(second.pixels, expected, second.free):
            seen.add(case)
    # small angles and one alone hide some
    assert {"learned-64x48-gain180-lanes16-turned", "lapped/40x72-gain60-lanes2-turned"} <= seen
    if name in ("none", "transposed"):
        assert set(TURNED) - seen <= {"learned-48x64-gain100-stages6-lanes2-turned"}


@pytest.mark.parametrize(
    "name",
    [
        "learned-513x16-gain90-turned",
        "learned-16x513-gain120-stages5-lanes2-turned",
        "learned-48x528-gain20-lanes32-random-turned",
        "lapped/600x530-gain150-stages1-turned",
    ],
)
def test_every_cell_has_its_own_turn(
    name: str, vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = vector(f"decode/{name}.tile")
    expected = imagecodecs.png_decode(vector(f"decode/{name}.png"))
    read_turns = second_decoder.read_turns
    turns, _ = read_turns(data[24:], 4 if "600x530" in name else 2)
    for wrong in ([turns[0]] * len(turns), turns[::-1]):
        with monkeypatch.context() as patch:
            patch.setattr(
                second_decoder, "read_turns",
                lambda payload, cells, wrong=wrong: (wrong, read_turns(payload, cells)[1]),
            )  # fmt: skip
            second = second_decoder.decode(data, files)
        places = [(top, left) for top in range(0, len(expected), 512)
                  for left in range(0, expected.shape[1], 512)]  # fmt: skip
        for (top, left), used, own in zip(places, wrong, turns, strict=True):
            at = np.s_[top : top + 512, left : left + 512]
            assert second.free is not None
            differs = outside_tolerance(second.pixels[at], expected[at], second.free[at])
            assert differs == (used != own)


def other_places(change: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """``blocks`` with another meaning of ``order``; change: of plane, u and w to a place."""

    def wrong(model: second_decoder.Model, y: np.ndarray) -> np.ndarray:
        places = np.arange(768)
        moved = change(places // 256, places // 16 % 16, places % 16)
        return BLOCKS(replace(model, order=moved[model.order]), y)

    return wrong


def other_corrections(change: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """``latents`` with other corrections; change: of these, levels v and step."""

    def wrong(
        model: second_decoder.Model, v: np.ndarray, context: np.ndarray, effective: np.ndarray
    ) -> np.ndarray:
        step = 2.0 ** (6 - effective / 32)
        bare = v * model.inverse_gain.astype(float)[:, None, None] * step / 16
        return bare + change(LATENTS(model, v, context, effective) - bare, v, step)

    return wrong


def other_model(**change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """``synthesise`` with other tensors."""

    def wrong(model: second_decoder.Model, y: np.ndarray, turn: Any) -> np.ndarray:
        changed = {name: to(getattr(model, name)) for name, to in change.items()}
        return SYNTHESISE(replace(model, **changed), y, turn)

    return wrong


def turned_in_rgb(model: second_decoder.Model, y: np.ndarray, turn: Any) -> np.ndarray:
    plain = SYNTHESISE(model, y, (0, 0, 0)) - model.mean
    return model.mean + plain @ TURN_MATRIX(turn)


def scaled_flat(factor: float) -> Callable[[], np.ndarray]:
    return lambda: COSINES() * np.where(np.arange(16)[:, None] == 0, factor, 1)


BLOCKS = second_decoder.blocks
SYNTHESISE, COSINES = second_decoder.synthesise, second_decoder.cosines
WRONG_PIXELS: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "frequencies change places": ("blocks", other_places(lambda p, u, w: 256 * p + 16 * w + u)),
    "planes change places": ("blocks", other_places(lambda p, u, w: 256 * (2 - p) + 16 * u + w)),
    "planes interleaved": ("blocks", other_places(lambda p, u, w: 3 * (16 * u + w) + p)),
    "channels in no order": ("blocks", lambda model, y: BLOCKS(
        replace(model, order=np.sort(model.order)), y)),
    "forward transform": ("cosines", COSINES().T.copy),
    "constants too large": ("cosines", scaled_flat(2**0.5)),
    "constants too small": ("cosines", scaled_flat(0.5**0.5)),
    "no correction": ("latents", other_corrections(lambda c, v, step: 0)),
    "correction twice": ("latents", other_corrections(lambda c, v, step: 2 * c)),
    "correction in levels": ("latents", other_corrections(lambda c, v, step: c / step)),
    "correction of symbols alone": (
        "latents", other_corrections(lambda c, v, step: np.where(v, c, 0))
    ),
    "colours transposed": ("synthesise", other_model(colours=np.transpose)),
    "colours turned": ("synthesise", turned_in_rgb),
    "mean of planes": ("synthesise", lambda model, y, turn: (
        SYNTHESISE(model, y, turn) - model.mean + model.colours @ model.mean)),
    "gains the other way": ("latents", lambda model, v, context, effective: LATENTS(
        replace(model, inverse_gain=1 / model.inverse_gain), v, context, effective)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_PIXELS)
def test_vectors_tell_wrong_pixels(
    name: str, vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either model, tiles of few stages among them."""
    function, wrong = WRONG_PIXELS[name]
    monkeypatch.setattr(second_decoder, function, wrong)
    for case in (
        "learned-17x31-gain90-stages2-lanes2",
        "learned-31x17-gain1-stages3-lanes8-turned",
        "lapped/33x17-gain100-stages1-turned",
        "lapped/40x72-gain60-lanes2-turned",
    ):
        second = second_decoder.decode(vector(f"decode/{case}.tile"), files)
        expected = imagecodecs.png_decode(vector(f"decode/{case}.png"))
        unseen = name == "colours turned" and "turned" not in case
        assert outside_tolerance(second.pixels, expected, second.free) != unseen, case


def test_a_lapped_vector_tells_where_cells_end(
    vector: Read, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edges of a cell are not borders, though the next cell has a block there."""
    name = "lapped/600x530-gain150-stages1-turned"
    data = vector(f"decode/{name}.tile")
    expected = imagecodecs.png_decode(vector(f"decode/{name}.png"))
    monkeypatch.setattr(second_decoder, "lap", lambda image, lapping: image)
    real = second_decoder.decode(data, files).real
    assert real is not None
    lapping = second_decoder.read_model(files[2]).lapping
    wrong = LAP(np.pad(real, ((0, 8), (0, 14), (0, 0)), mode="edge"), lapping)
    pixels = np.clip(np.rint(wrong), 0, 255).astype(np.uint8)
    # cells of whole blocks but for the last row and column: only the border can differ here
    inner = pixels[:504, :504], expected[:504, :504]
    assert not outside_tolerance(*inner)
    for border in (np.s_[504:512, :504], np.s_[:504, 504:512]):
        assert outside_tolerance(pixels[border], expected[border])


def test_both_decoders_agree_on_two_by_two_cells(tiny, tiny_file: bytes) -> None:
    """Order of cells and their cut: too large a picture for a committed vector."""
    turns = ((1, 2, 3), (-100, 50, 0), (0, 0, 0), (127, -128, 64))
    case = make_conformance.Learned(520, 530, 40, stages=1, lanes=2, seed=3, turns=turns)
    data = case.tile(tiny_file)
    second = second_decoder.decode(data, [tiny_file])
    assert [cell.effective.shape for cell in second.cells] == [(32, 32), (32, 2), (1, 32), (1, 2)]
    assert [cell.turn for cell in second.cells] == list(turns)
    within_tolerance(wsicodec.decode(data), second.pixels, second.free)


def test_the_script_adds_vectors_and_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tests" / "conformance"
    shutil.copytree(FOLDER, folder)
    monkeypatch.setattr(make_conformance, "FOLDER", folder)
    monkeypatch.setattr(make_conformance, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_conformance"])
    damaged = folder / "refuse" / "mode-9.tile"
    damaged.write_bytes(b"kept as it is")
    removed = folder / "decode" / "constant-1x1.tile"
    removed.unlink()
    lapped = folder / "decode" / "lapped" / "1x1-gain90.tile"
    lapped.unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert make_conformance.main() == 0
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert after.pop(removed) == (FOLDER / "decode" / "constant-1x1.tile").read_bytes()
    assert bitstream.parse(after.pop(lapped)).learned  # its symbols were chosen in real arithmetic
    assert after == before
