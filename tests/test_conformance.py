"""The conformance vectors of format version 1, run by wsicodec and by the second decoder.

Vectors are the format: when one fails, the code is wrong. No test writes one, a missing one is a
failure, and ``python -m tools.make_conformance`` refuses to overwrite any.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import second_decoder

import wsicodec
from tools import make_conformance
from wsicodec import bitstream
from wsicodec.entropy import kernel, reference

FOLDER = Path(__file__).parent / "conformance"

DECODE_LEARNED = (
    "learned-16x16-gain0-stages1-lanes1",
    "learned-16x16-gain255-lanes32",
    "learned-16x513-gain120-stages5-lanes2",
    "learned-17x31-gain90-stages2-lanes2",
    "learned-1x1-gain0-lanes32",
    "learned-1x1-gain90",
    "learned-31x17-gain1-stages3-lanes8",
    "learned-33x49-gain70-stages7",
    "learned-48x48-gain128-random",
    "learned-48x64-gain100-stages6-lanes2",
    "learned-513x16-gain90",
    "learned-64x48-gain0",
    "learned-64x48-gain128-stages4",
    "learned-64x48-gain180-lanes16",
    "learned-64x48-gain255-lanes1",
    "learned-64x48-gain90",
    "learned-64x64-gain60-random",
    "learned-80x48-gain40-stages1",
    "learned-80x96-gain6-random",
    "learned-96x80-gain250-random",
)
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
)
CODER = (
    "coder-all-classes-lanes1",
    "coder-all-classes-lanes2",
    "coder-all-classes-lanes32",
    "coder-all-classes-lanes4",
    "coder-class0-lanes1",
    "coder-empty-lanes4",
    "coder-escapes-lanes4",
    "coder-escapes-raw-bits-lanes2",
)
PACK = ("tile-constant", "tile-jpeg", "tile-learned")
REFUSE_COUNT = 56
REFUSE = tuple(sorted(path.stem for path in (FOLDER / "refuse").glob("*.tile")))

Read = Callable[[str], bytes]


def within_tolerance(pixels: np.ndarray, expected: np.ndarray) -> None:
    """docs/format.md, "Pixels": within 1 on 99.9 % of samples, within 2 on all."""
    assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
    error = np.abs(pixels.astype(int) - expected)
    assert error.max() <= 2
    assert (error > 1).mean() <= 0.001


def test_no_vector_is_missing_and_none_is_unknown() -> None:
    decode = {f"decode/{n}{s}" for n in DECODE_LEARNED + DECODE_OTHERS for s in (".tile", ".png")}
    encode = {f"encode/{n}.json" for n in CODER + PACK}
    refuse = {f"refuse/{n}.tile" for n in REFUSE}
    indices = {"decode/symbols.json", "refuse/errors.json", "tiny.wscm", "tiny.encoder.wscm"}
    found = {str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*") if p.is_file()}
    assert found == decode | encode | refuse | indices
    assert len(REFUSE) == REFUSE_COUNT
    assert set(json.loads((FOLDER / "refuse/errors.json").read_text())) == set(REFUSE)
    assert set(json.loads((FOLDER / "decode/symbols.json").read_text())) == set(DECODE_LEARNED)


def test_the_tiny_model_is_small_and_unchanged(tiny_file: bytes) -> None:
    encoder = (FOLDER / "tiny.encoder.wscm").read_bytes()
    assert len(tiny_file) + len(encoder) < 120_000
    # every learned vector names this file; a changed model would be another model
    tile = bitstream.parse((FOLDER / "decode/learned-64x48-gain90.tile").read_bytes())
    assert tile.learned is not None
    assert hashlib.sha256(tiny_file).digest()[:4] == tile.learned.model


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", DECODE_LEARNED + DECODE_OTHERS)
def test_decode(name: str, vector: Read, tiny_file: bytes) -> None:
    data = vector(f"decode/{name}.tile")
    expected = imagecodecs.png_decode(vector(f"decode/{name}.png"))
    within_tolerance(wsicodec.decode(data), expected)
    within_tolerance(second_decoder.decode(data, [tiny_file]).pixels, expected)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", DECODE_LEARNED)
def test_symbols(
    name: str, vector: Read, tiny_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = vector(f"decode/{name}.tile")
    expected = json.loads(vector("decode/symbols.json"))[name]
    second = second_decoder.decode(data, [tiny_file])
    ours, read = [], kernel.Decoder.get

    def recorded(self: kernel.Decoder, classes: np.ndarray) -> np.ndarray:
        ours.append(read(self, classes))
        return ours[-1]

    monkeypatch.setattr(kernel.Decoder, "get", recorded)
    wsicodec.decode(data)
    theirs = [array for cell in second.cells for array in (cell.z, *cell.q)]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.reshape(-1), b.reshape(-1))
    assert make_conformance.symbols_digest(second.cells) == expected


@pytest.mark.parametrize("name", CODER)
def test_encode_symbols(name: str, vector: Read, tiny, tiny_file: bytes) -> None:
    case = json.loads(vector(f"encode/{name}.json"))
    payload = bytes.fromhex(case["payload"])
    lanes, q, classes = case["lanes"], case["symbols"], case["classes"]
    assert reference.encode(q, classes, tiny.tables, lanes) == payload
    encoder = kernel.Encoder(tiny.tables, lanes)
    encoder.put(np.array(q, np.int32), np.array(classes, np.uint8))
    assert encoder.finish() == payload

    plain = reference.Decoder(payload, tiny.tables, lanes)
    assert plain.symbols(classes) == q
    plain.finish()
    fast = kernel.Decoder(payload, tiny.tables, lanes)
    assert fast.get(np.array(classes, np.uint8)).tolist() == q
    fast.finish()
    second = second_decoder.Decoder(payload, lanes)
    model = second_decoder.read_model(tiny_file)
    assert second.symbols(model, np.array(classes, np.int64), 2**20, None).tolist() == q
    second.end()


@pytest.mark.parametrize("name", PACK)
def test_encode_tile(name: str, vector: Read) -> None:
    case = json.loads(vector(f"encode/{name}.json"))
    learned = None
    if fields := case.get("learned"):
        learned = bitstream.LearnedHeader(
            bytes.fromhex(fields["model"]), fields["gain"], fields["stages"], fields["lanes_log2"]
        )
    payload = bytes.fromhex(case["payload"])
    mode = bitstream.Mode(case["mode"])
    tile = bitstream.Tile(mode, case["height"], case["width"], payload, learned)
    assert tile.pack().hex() == case["tile"]
    assert bitstream.parse(tile.pack()) == tile


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", REFUSE)
def test_refuse(name: str, vector: Read, tiny_file: bytes) -> None:
    data = vector(f"refuse/{name}.tile")
    error = getattr(wsicodec, json.loads(vector("refuse/errors.json"))[name])
    with pytest.raises(wsicodec.WsicodecError) as caught:
        wsicodec.decode(data)
    assert type(caught.value) is error
    assert str(caught.value)
    with pytest.raises(second_decoder.RefusedError):
        second_decoder.decode(data, [tiny_file])


def test_vectors_reach_every_rule(vector: Read, tiny_file: bytes) -> None:
    """The learned vectors together hold what a decoder could get wrong."""
    model = second_decoder.read_model(tiny_file)
    classes, means, peaks = [], [], []
    lowered = raised = escapes = False
    for name in DECODE_LEARNED:
        data = vector(f"decode/{name}.tile")
        for cell in second_decoder.decode(data, [tiny_file]).cells:
            lowered |= data[22] > 0 and cell.effective.min() == 0
            raised |= data[22] < 255 and cell.effective.max() == 255
            means += [m.reshape(-1) for m in cell.means if m is not None]
            peaks.append(max(int(np.abs(q).max()) for q in cell.q))
            for c, q in zip(cell.classes, cell.q, strict=True):
                classes.append(c.reshape(-1))
                plain = (c > 0) & (c <= len(model.table_radii))
                radius = np.array([0, *model.table_radii])[np.where(plain, c, 0)]
                escapes |= bool((plain & (np.abs(q) > radius)).any())
    assert set(np.concatenate(classes)) == set(range(128))
    assert (np.concatenate(means).min(), np.concatenate(means).max()) == (-1023, 1023)
    assert max(peaks) == 2**20
    assert lowered and raised and escapes


def test_both_decoders_agree_on_two_by_two_cells(tiny, tiny_file: bytes) -> None:
    """Order of cells and their cut: too large a picture for a committed vector."""
    case = make_conformance.Learned(520, 530, 40, stages=1, lanes=2, seed=3)
    data = case.tile(tiny_file)
    second = second_decoder.decode(data, [tiny_file])
    assert [cell.effective.shape for cell in second.cells] == [(32, 32), (32, 2), (1, 32), (1, 2)]
    within_tolerance(wsicodec.decode(data), second.pixels)


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
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert make_conformance.main() == 0
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert after.pop(removed) == (FOLDER / "decode" / "constant-1x1.tile").read_bytes()
    assert after == before
