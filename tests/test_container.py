"""Model files from strangers: one named test for each way to break the container."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsicodec.errors import ModelError
from wsicodec.models import container, store
from wsicodec.models.decoder import load_decoder
from wsicodec.models.encoder import load_encoder

Header = dict[str, Any]


def split(file: bytes) -> tuple[Header, bytes]:
    """(JSON header, sections) of a model file."""
    (length,) = struct.unpack("<I", file[8:12])
    return json.loads(file[12 : 12 + length]), file[12 + length :]


def joined(header: Header | bytes, sections: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return b"WSCM\x01\0\0\0" + struct.pack("<I", size) + text + sections


def small(**changes: Any) -> bytes:
    """A file of one section of 4 bytes, its description changed."""
    section = {"name": "a", "type": "uint8", "shape": [4], "bytes": 4, **changes}
    return joined({"kind": "decoder", "sections": [section]}, b"1234")


def refused(file: bytes, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        container.parse(file)


# -- properties --

tensors = st.dictionaries(
    st.text("abcdef_", min_size=1, max_size=8),
    st.tuples(
        st.sampled_from(sorted(container.DTYPES)),
        st.lists(st.integers(0, 4), max_size=3),
        st.integers(0, 2**32 - 1),
    ),
    max_size=5,
)


@given(tensors, st.dictionaries(st.text("xyz", min_size=1, max_size=4), st.binary(max_size=20)))
def test_parse_gives_back_what_pack_took(
    drawn: dict[str, tuple[str, list[int], int]], graphs: dict[str, bytes]
) -> None:
    arrays = {
        name: np.random.default_rng(seed).integers(0, 100, shape).astype(container.DTYPES[kind])
        for name, (kind, shape, seed) in drawn.items()
    }
    header = {"kind": "decoder", "name": "nothing", "note": "ü"}
    file = container.pack(header, graphs, arrays)
    parsed = container.parse(file)
    assert parsed.header == header and parsed.graphs == graphs
    assert parsed.digest == hashlib.sha256(file).digest()
    assert parsed.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(parsed.tensors[name], array)
        assert parsed.tensors[name].dtype == array.dtype
        assert not parsed.tensors[name].flags.writeable


@given(st.binary(max_size=60))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    for file in (data, b"WSCM\1\0\0\0" + data, small()[:12] + data):
        try:
            container.parse(file)
        except ModelError as error:
            assert str(error)


def test_every_truncation_of_a_model_is_refused(tiny_file: bytes) -> None:
    sizes = [*range(400), *range(400, len(tiny_file), 997), len(tiny_file) - 1]
    for size in sizes:
        with pytest.raises(ModelError):
            container.parse(tiny_file[:size])


def test_every_flipped_header_bit_is_another_model_or_refused(tiny_file: bytes) -> None:
    digest = container.parse(tiny_file).digest
    for bit in range(8 * 12):
        damaged = bytearray(tiny_file)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ModelError):
            container.parse(bytes(damaged))
    damaged = bytearray(tiny_file)
    damaged[-1] ^= 1
    assert container.parse(bytes(damaged)).digest != digest


# -- fixed part --


def test_empty_file() -> None:
    refused(b"", "not a wsicodec model file")


def test_other_magic(tiny_file: bytes) -> None:
    refused(b"WSCT" + tiny_file[4:], "not a wsicodec model file")


def test_other_version(tiny_file: bytes) -> None:
    refused(tiny_file[:4] + b"\2" + tiny_file[5:], "version 2")


@pytest.mark.parametrize("byte", [5, 6, 7])
def test_reserved_bytes(tiny_file: bytes, byte: int) -> None:
    refused(tiny_file[:byte] + b"\1" + tiny_file[byte + 1 :], "reserved")


def test_file_beyond_the_cap(monkeypatch: pytest.MonkeyPatch, tiny_file: bytes) -> None:
    monkeypatch.setattr(container, "MAX_BYTES", len(tiny_file) - 1)
    refused(tiny_file, "exceeds")


def test_header_longer_than_the_file() -> None:
    refused(joined(b"{}", b"", length=3), "does not fit")


@pytest.mark.parametrize("length", [2**16 + 1, 2**31, 2**32 - 1])
def test_header_beyond_the_cap(length: int) -> None:
    refused(joined(b"{}" + b" " * 2**17, b"", length=length), "does not fit")


# -- JSON --


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b"\xff\xfe{}",
        b'{"a": 1}x',
        b'{"sections": [], "a": ' + b"9" * 5000 + b"}",
    ],
)
def test_header_is_not_json(text: bytes) -> None:
    refused(joined(text, b""), "not JSON")


def test_deep_json_nesting() -> None:
    refused(joined(b"[" * 65536, b""), "not JSON")
    refused(joined(b'{"a":' * 13000, b""), "not JSON")
    closed = b"[" * 32768 + b"]" * 32768
    with pytest.raises(ModelError):
        container.parse(joined(closed, b""))


@pytest.mark.parametrize("text", [b"[]", b"3", b"null", b'"sections"', b"{}", b'{"sections": {}}'])
def test_header_without_sections(text: bytes) -> None:
    refused(joined(text, b""), "no list of sections")


# -- sections --


def test_too_many_sections() -> None:
    sections = [{"name": f"s{i}", "type": "uint8", "shape": [0], "bytes": 0} for i in range(65)]
    assert len(container.parse(joined({"sections": sections[:64]}, b"")).tensors) == 64
    refused(joined({"sections": sections}, b""), "65 sections")


@pytest.mark.parametrize("section", [None, 3, "a", [], ["name", "a"]])
def test_section_is_not_an_object(section: object) -> None:
    refused(joined({"sections": [section]}, b""), "not an object")


@pytest.mark.parametrize("name", [None, 3, "", "n" * 65, ["a"], {}])
def test_section_without_a_name(name: object) -> None:
    refused(small(name=name), "no name")


@pytest.mark.parametrize("kind", [None, 3, "float64", "object", "<f4", ["uint8"], {}, ""])
def test_section_of_an_unknown_type(kind: object) -> None:
    refused(small(type=kind), "unknown type")


@pytest.mark.parametrize("size", [None, -1, 4.0, "4", True, 2**26 + 1, 2**63, 10**400, [4]])
def test_section_without_a_proper_size(size: object) -> None:
    refused(small(bytes=size), "no proper size")


@pytest.mark.parametrize("shape", [None, 4, "4", {"0": 4}, [1] * 7])
def test_section_shape_is_not_a_short_list(shape: object) -> None:
    refused(small(shape=shape), "size|shape")


@pytest.mark.parametrize("extent", [-1, -4, 4.0, "4", None, True, 2**26 + 1, 2**64])
def test_section_with_an_improper_extent(extent: object) -> None:
    refused(small(shape=[extent]), "improper shape")


@pytest.mark.parametrize("shape", [[3], [5], [], [2, 3], [0], [2**26, 2**26, 2**26]])
def test_shape_and_size_disagree(shape: list[int]) -> None:
    refused(small(shape=shape), "is not 4 bytes")


def test_size_that_overflows_64_bits() -> None:
    """2^26 four times over is 2^104, and 0 modulo 2^64."""
    refused(small(shape=[2**26] * 4, bytes=0), "is not 0 bytes")


def test_section_past_the_end() -> None:
    refused(small(bytes=5, shape=[5]), "past the end")


def test_huge_section_allocates_nothing() -> None:
    file = small(bytes=2**26, shape=[2**26])
    tracemalloc.start()
    try:
        refused(file, "past the end")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_bytes_after_the_sections() -> None:
    refused(small() + b"x", "1 bytes after")


def test_duplicate_section() -> None:
    section = {"name": "a", "type": "uint8", "shape": [2], "bytes": 2}
    refused(joined({"sections": [section, section]}, b"1234"), "two sections")


def test_duplicate_section_of_another_type() -> None:
    sections = [
        {"name": "a", "type": "uint8", "shape": [2], "bytes": 2},
        {"name": "a", "type": "onnx", "bytes": 2},
    ]
    refused(joined({"sections": sections}, b"1234"), "two sections")


def test_sections_cannot_overlap_or_leave_holes() -> None:
    """Sections lie end to end in the list's order: offsets are nowhere in the file."""
    section = {"name": "a", "type": "uint8", "shape": [4], "bytes": 4, "offset": 0}
    parsed = container.parse(joined({"sections": [section]}, b"1234"))
    assert parsed.tensors["a"].tobytes() == b"1234"


# -- decoder models: header and tensors --


def changed(file: bytes, change: Any) -> bytes:
    """The model file with its header changed by ``change(header)``, sections as they are."""
    header, sections = split(file)
    change(header)
    return joined(header, sections)


def with_tensor(file: bytes, name: str, array: np.ndarray) -> bytes:
    """The model file with another tensor of this name."""
    parsed = container.parse(file)
    tensors = {**parsed.tensors, name: array}
    return container.pack(parsed.header, parsed.graphs, tensors)


def refused_model(file: bytes, match: str | None = None) -> None:
    with pytest.raises(ModelError, match=match):
        load_decoder(file)


def test_the_unchanged_model_loads(tiny_file: bytes) -> None:
    assert load_decoder(changed(tiny_file, lambda header: None)).name == "tiny"


def test_keys_nobody_knows_are_ignored(tiny_file: bytes) -> None:
    load_decoder(changed(tiny_file, lambda header: header.update(later={"a": [1]})))


@pytest.mark.parametrize("kind", [None, "encoder", 3, ["decoder"]])
def test_other_kind(tiny_file: bytes, kind: object) -> None:
    refused_model(changed(tiny_file, lambda header: header.update(kind=kind)), "kind")


@pytest.mark.parametrize("name", [None, "", 3, "n" * 65])
def test_model_without_a_name(tiny_file: bytes, name: object) -> None:
    refused_model(changed(tiny_file, lambda header: header.update(name=name)), "name")


@pytest.mark.parametrize("value", [None, [], {}, {"block": 16}, "architecture"])
def test_no_architecture(tiny_file: bytes, value: object) -> None:
    refused_model(changed(tiny_file, lambda h: h.update(architecture=value)), "architecture")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block", 8),
        ("block", 16.0),
        ("block", "16"),
        ("stages", []),
        ("stages", {"0": [0, 24, 0]}),
        ("stages", 24),
        ("stages", [[0, 24]]),
        ("stages", [[0, 24, 0, 0]]),
        ("stages", [0, 24, 0]),
        ("stages", [[0, 24.0, 0]]),
        ("stages", [[0, "24", 0]]),
        ("stages", [[0, 24, True]]),
        ("stages", [[0, 24, 4]]),
        ("stages", [[0, 24, -1]]),
        ("stages", [[0, 0, 0], [0, 24, 0]]),
        ("stages", [[1, 24, 0]]),
        ("stages", [[0, 12, 0], [13, 11, 0]]),
        ("stages", [[0, 12, 0], [11, 13, 0]]),
        ("stages", [[0, 12, 0], [0, 12, 0], [12, 12, 0]]),
        ("stages", [[0, 12, 1], [12, 12, 0]]),
        ("stages", [[0, 12, 0], [12, 12, 1], [12, 12, 2]]),
        ("stages", [[0, 12, 1], [0, 12, 3], [0, 12, 2], [12, 12, 0]]),
        ("stages", [[0, 12, 1], [0, 12, 2], [0, 11, 3], [12, 12, 0]]),
        ("stages", [[0, 12, 2], [0, 12, 3], [12, 12, 0]]),
        ("stages", [[0, 12, 0], [12, 757, 0]]),
        ("stages", [[i, 1, 0] for i in range(16)]),
        ("mean_stages", -1),
        ("mean_stages", 1),
        ("mean_stages", 5),
        ("mean_stages", 7),
        ("mean_stages", 9),
        ("mean_stages", True),
        ("context_channels", 0),
        ("context_channels", 11),
        ("context_channels", 4),
        ("context_channels", 2**70),
        ("z_channels", 0),
        ("z_channels", 257),
        ("z_channels", None),
        ("hyper", 0),
        ("hyper", 513),
        ("hyper", [8]),
        ("lapped", 0),
        ("lapped", 1),
        ("depth", 3),
    ],
)
def test_improper_architecture(tiny_file: bytes, key: str, value: object) -> None:
    refused_model(changed(tiny_file, lambda h: h["architecture"].update({key: value})))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("z_channels", 2),
        ("hyper", 9),
        ("mean_stages", 3),
        ("stages", [[0, 4, 1], [0, 4, 2], [0, 4, 3], [4, 8, 0], [12, 12, 0]]),
    ],
)
def test_architecture_that_is_not_the_models(tiny_file: bytes, key: str, value: object) -> None:
    refused_model(changed(tiny_file, lambda h: h["architecture"].update({key: value})))


TENSORS = (
    "table_radii", "table_cdf", "z_classes", "mean_factor", "context_factor", "inverse_gain",
    "order", "colours", "mean", "lapping",
)  # fmt: skip
GRAPHS = ("hyper", "stage0", "stage1", "stage7", "chain")


@pytest.mark.parametrize("name", TENSORS + GRAPHS)
def test_missing_section(tiny_file: bytes, name: str) -> None:
    parsed = container.parse(tiny_file)
    graphs, tensors = copy.copy(parsed.graphs), copy.copy(parsed.tensors)
    (graphs if name in GRAPHS else tensors).pop(name)
    refused_model(container.pack(parsed.header, graphs, tensors), name)


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_of_another_type(tiny_file: bytes, name: str) -> None:
    old = container.parse(tiny_file).tensors[name]
    other = np.int32 if old.dtype == np.float32 else np.float32
    refused_model(with_tensor(tiny_file, name, old.astype(other)), name)


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_of_another_shape(tiny_file: bytes, name: str) -> None:
    old = container.parse(tiny_file).tensors[name]
    refused_model(with_tensor(tiny_file, name, old[None]), name)
    if name not in ("table_radii", "table_cdf"):
        refused_model(with_tensor(tiny_file, name, old[:-1]), name)


def with_entry(file: bytes, name: str, place: int, value: float) -> bytes:
    """The model file with one entry of a tensor changed."""
    array = container.parse(file).tensors[name].copy()
    array.reshape(-1)[place] = value
    return with_tensor(file, name, array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["colours", "mean", "inverse_gain"])
def test_float_that_is_not_finite(tiny_file: bytes, name: str, value: float) -> None:
    for place in (0, -1):
        refused_model(with_entry(tiny_file, name, place, value), "not finite")


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("name", "bound"), [("colours", 2**4), ("inverse_gain", 2**16), ("mean", 2**10)]
)
def test_float_beyond_its_bound(tiny_file: bytes, name: str, bound: int, sign: int) -> None:
    beyond = np.nextafter(np.float32(bound), np.float32(np.inf))
    for place in (0, -1):
        load_decoder(with_entry(tiny_file, name, place, sign * bound))
        refused_model(with_entry(tiny_file, name, place, sign * float(beyond)), "out of range")


def test_colours_that_depend_on_one_another(tiny_file: bytes) -> None:
    """The planes could not be told from the pixels."""
    good = container.parse(tiny_file).tensors["colours"]
    for matrix in (
        0 * good,
        good[:, [0, 1, 0]],
        good[[2, 1, 2]],
        np.diag([1, 1, 9.99e-4]),
        np.diag([2**-4, -(2**-4), 2**-4]),
        np.diag([2**4, 2**4, 0]),
    ):
        refused_model(with_tensor(tiny_file, "colours", matrix.astype(np.float32)), "colours")
    for matrix in (good[:, [1, 0, 2]], np.diag([1, 1, -1.01e-3]), 2**4 * np.eye(3)):
        load_decoder(with_tensor(tiny_file, "colours", matrix.astype(np.float32)))


@pytest.mark.parametrize("value", [768, 769, 2**15, 2**16 - 1])
def test_order_of_no_frequency(tiny_file: bytes, value: int) -> None:
    for place in (0, 11, -1):
        refused_model(with_entry(tiny_file, "order", place, value), "order")


def test_order_that_names_a_frequency_twice(tiny_file: bytes) -> None:
    order = container.parse(tiny_file).tensors["order"]
    for place, value in ((0, order[-1]), (7, order[8]), (-1, order[0])):
        refused_model(with_entry(tiny_file, "order", place, value), "order")


def test_order_that_is_any_other(tiny_file: bytes) -> None:
    order = container.parse(tiny_file).tensors["order"]
    for other in (np.sort(order), order[::-1], order + (order < 767), 744 + np.arange(24)):
        model = load_decoder(with_tensor(tiny_file, "order", other.astype(np.uint16)))
        np.testing.assert_array_equal(model.order, other)


@pytest.mark.parametrize("value", [0, -1, 2**21, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", ["mean_factor", "context_factor"])
def test_factor_out_of_range(tiny_file: bytes, name: str, value: int) -> None:
    array = container.parse(tiny_file).tensors[name].copy()
    array[3] = value
    refused_model(with_tensor(tiny_file, name, array), "factor")


@pytest.mark.parametrize("value", [0, 128, 255])
def test_class_of_hyper_latents_out_of_range(tiny_file: bytes, value: int) -> None:
    array = container.parse(tiny_file).tensors["z_classes"].copy()
    array[200, 1] = value
    refused_model(with_tensor(tiny_file, "z_classes", array), "class")


@pytest.mark.parametrize(
    "fault",
    [
        "start",
        "end",
        "order",
        "second set",
        "padding",
        "radius 0",
        "radius",
        "few",
        "odd",
        "one set",
    ],
)
def test_improper_symbol_tables(tiny_file: bytes, fault: str) -> None:
    tensors = container.parse(tiny_file).tensors
    cdf, radii = tensors["table_cdf"].copy(), tensors["table_radii"].copy()
    if fault == "start":
        cdf[2, 0] = 1
    elif fault == "end":
        cdf[-1, -1] = 16383
    elif fault == "order":
        cdf[2, 2] = cdf[2, 1]
    elif fault == "second set":
        cdf[len(cdf) // 2 + 2, 2] = cdf[len(cdf) // 2 + 2, 1]
    elif fault == "padding":
        cdf[0, -1] = 0
    elif fault == "radius 0":
        radii[0] = 0
    elif fault == "radius":
        radii[0] = 127
    elif fault == "few":  # 14 for either quantiser leave classes with 15 raw bits
        cdf, radii = cdf[-28:], radii[-28:]
    elif fault == "odd":
        cdf, radii = cdf[1:], radii[1:]
    else:  # quantiser 0's alone: half as many for either
        cdf, radii = cdf[len(cdf) // 2 :], radii[len(radii) // 2 :]
    file = with_tensor(with_tensor(tiny_file, "table_cdf", cdf), "table_radii", radii)
    refused_model(file, "table")


# -- decoder models: the matrix across borders --


@pytest.fixture
def lapped_file(vector: Any) -> bytes:
    return vector("lapped.wscm")


def with_lapping(file: bytes, change: Any) -> bytes:
    """The model file with its matrix changed by ``change(matrix)``."""
    return with_tensor(file, "lapping", change(container.parse(file).tensors["lapping"].copy()))


def test_the_matrix_is_read_as_it_stands(lapped_file: bytes) -> None:
    model = load_decoder(lapped_file)
    np.testing.assert_array_equal(model.lapping, container.parse(lapped_file).tensors["lapping"])


def test_a_section_that_nothing_needs_is_ignored(lapped_file: bytes) -> None:
    basis = np.full((12, 768), np.inf, np.float16)
    assert load_decoder(with_tensor(lapped_file, "basis", basis)).name == "lapped"


@pytest.mark.parametrize("kind", ["float16", "int8", "int32"])
def test_matrix_of_another_type(lapped_file: bytes, kind: str) -> None:
    matrix = np.eye(8).astype(container.DTYPES[kind])  # exact in all of them
    refused_model(with_tensor(lapped_file, "lapping", matrix), "'lapping' is")


@pytest.mark.parametrize("shape", [(64,), (1, 8, 8), (8, 8, 1), (7, 7), (16, 16), (4, 16), (0, 0)])
def test_matrix_of_another_shape(lapped_file: bytes, shape: tuple[int, ...]) -> None:
    matrix = np.resize(np.eye(8, dtype=np.float32), shape)
    if len(shape) == 2 and shape[0] == shape[1]:
        matrix = np.eye(shape[0], dtype=np.float32)
    refused_model(with_tensor(lapped_file, "lapping", matrix), "'lapping' is")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (7, 3)])
def test_matrix_that_is_not_finite(
    lapped_file: bytes, value: float, place: tuple[int, int]
) -> None:
    def change(matrix: np.ndarray) -> np.ndarray:
        matrix[place] = value
        return matrix

    refused_model(with_lapping(lapped_file, change), "lapping matrix")


def swapped_rows(matrix: np.ndarray) -> np.ndarray:
    matrix[[2, 5]] = matrix[[5, 2]]
    return matrix


def row_twice(matrix: np.ndarray) -> np.ndarray:
    matrix[5] = matrix[2]
    return matrix


def scaled_row(matrix: np.ndarray) -> np.ndarray:
    matrix[6] *= np.float32(1.0002)
    return matrix


ORTHOGONAL = {
    "transposed": lambda matrix: np.ascontiguousarray(matrix.T),
    "negative": lambda matrix: -matrix,
    "reflected": swapped_rows,  # determinants of 1 and -1 are both as good
    "identity": lambda matrix: np.eye(8, dtype=np.float32),
    "within the tolerance": lambda matrix: matrix * np.float32(1.00004),
}
NOT_ORTHOGONAL = {
    "beyond the tolerance": lambda matrix: matrix * np.float32(1.00006),
    "too short": lambda matrix: matrix * np.float32(0.99994),
    "row": scaled_row,
    "row twice": row_twice,
    "zero": np.zeros_like,
    "ones": np.ones_like,
    "double": lambda matrix: 2 * matrix,
}


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_matrix_that_is_orthogonal(lapped_file: bytes, name: str) -> None:
    load_decoder(with_lapping(lapped_file, ORTHOGONAL[name]))


@pytest.mark.parametrize("name", NOT_ORTHOGONAL)
def test_matrix_that_is_not_orthogonal(lapped_file: bytes, name: str) -> None:
    refused_model(with_lapping(lapped_file, NOT_ORTHOGONAL[name]), "lapping matrix")


@pytest.mark.parametrize("size", [1e19, 3e38])
def test_matrix_whose_products_overflow(lapped_file: bytes, size: float) -> None:
    """Infinities, and what is no number after them, are no orthogonal matrix, nor a warning."""
    signs = np.where(np.arange(8) % 2, -1, 1)
    for alternate in (np.full((8, 8), False), np.arange(8)[:, None] >= np.full(8, 4)):
        matrix = (size * np.where(alternate, signs, 1)).astype(np.float32)
        with np.errstate(all="raise"):
            refused_model(with_tensor(lapped_file, "lapping", matrix), "lapping matrix")


# -- encoder models --


def test_encoder_is_no_decoder_and_no_decoder_an_encoder(tiny_file: bytes, vector: Any) -> None:
    encoder = vector("tiny.encoder.wscm")
    refused_model(encoder, "kind")
    with pytest.raises(ModelError, match="kind"):
        load_encoder(tiny_file)
    assert load_encoder(encoder).decoder_digest == hashlib.sha256(tiny_file).digest()


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        "",
        "0" * 63,
        3,
        pytest.param("x" * 64, id="not hex"),
        pytest.param("é" * 64, id="not ASCII"),
    ],
)
def test_encoder_that_names_no_decoder(vector: Any, decoder: object) -> None:
    file = changed(vector("tiny.encoder.wscm"), lambda header: header.update(decoder=decoder))
    with pytest.raises(ModelError, match="decoder"):
        load_encoder(file)


def test_encoder_with_graphs_and_fields_that_nothing_reads(vector: Any) -> None:
    file = container.parse(vector("tiny.encoder.wscm"))
    header = {k: v for k, v in file.header.items() if k != "corrected"}
    graphs = {"hyper_analysis": file.graphs["hyper_analysis"]}
    for change in ({}, {"corrected": "all"}):
        for more in ({}, {"analysis": b"no graph"}):
            encoder = load_encoder(container.pack(header | change, graphs | more, file.tensors))
            assert encoder.step_strength == 0.5
    with pytest.raises(ModelError, match="no graph 'hyper_analysis'"):
        load_encoder(container.pack(header, {}, file.tensors))


# -- the store --


def test_models_are_listed_after_a_decode() -> None:
    script = "import wsicodec, wsicodec.models.store; assert wsicodec.models()"
    root = Path(__file__).parents[1]
    run = [sys.executable, "-c", script]
    child = subprocess.run(run, capture_output=True, check=False, cwd=root)
    assert child.returncode == 0, child.stderr.decode()


@pytest.mark.parametrize("value", [None, "many", [1], {}])
def test_a_card_value_of_another_type_hides_no_model(
    tiny_file: bytes, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = changed(tiny_file, lambda header: header.update(kmac_per_pixel=value))
    (tmp_path / "odd.wscm").write_bytes(file)
    monkeypatch.setenv("WSICODEC_MODELS", str(tmp_path))
    assert store.models()


def test_an_allowed_model_never_takes_the_place_of_another(tiny_file: bytes) -> None:
    """Four bytes of SHA-256 can be met by search: a stranger must not shadow a known model."""
    known = load_decoder(tiny_file)
    other = load_decoder(changed(tiny_file, lambda header: header.update(name="other")))
    other.digest = known.digest[:4] + other.digest[4:]
    own = store._Store()
    own.add(known, tiny_file)
    with contextlib.suppress(ModelError):
        own.add(other, tiny_file)
    assert own.decoder(known.digest[:4]) is known
