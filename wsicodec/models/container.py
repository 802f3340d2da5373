"""Model files: one header of JSON, then sections end to end (docs/format.md, "Model file").

A model file may come from a stranger: every size is checked before anything is allocated, the
header is plain data, and nothing in it names a path or code.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from wsicodec.errors import ModelError

MAGIC = b"WSCM"
VERSION = 1
MAX_BYTES = 64 * 2**20
MAX_HEADER = 64 * 2**10
MAX_SECTIONS = 64
DTYPES: Mapping[str, str] = {
    "int8": "<i1",
    "uint8": "<u1",
    "uint16": "<u2",
    "int32": "<i4",
    "float16": "<f2",
    "float32": "<f4",
}
GRAPH = "onnx"
_HEAD = struct.Struct("<4sB3xI")

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A parsed model file.

    header: the JSON header without its section list. graphs: ONNX models by name.
    tensors: arrays by name, read-only. digest: SHA-256 of the whole file, 32 bytes.
    """

    header: dict[str, Any]
    graphs: dict[str, bytes]
    tensors: dict[str, Array]
    digest: bytes

    def tensor(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> Array:
        """A tensor of this dtype and shape (None: any extent), or ModelError."""
        array = self.tensors.get(name)
        if array is None:
            raise ModelError(f"model has no tensor {name!r}")
        fits = array.ndim == len(shape) and all(
            want is None or want == have for want, have in zip(shape, array.shape, strict=True)
        )
        if array.dtype != np.dtype(DTYPES[dtype]) or not fits:
            raise ModelError(
                f"model tensor {name!r} is {array.dtype} {array.shape}, not {dtype} {shape}"
            )
        return array

    def graph(self, name: str) -> bytes:
        """An ONNX graph by name, or ModelError."""
        if name not in self.graphs:
            raise ModelError(f"model has no graph {name!r}")
        return self.graphs[name]


def digest_of(data: bytes) -> bytes:
    """A model's identity: SHA-256 of its file."""
    return hashlib.sha256(data).digest()


def pack(
    header: Mapping[str, Any], graphs: Mapping[str, bytes], tensors: Mapping[str, Array]
) -> bytes:
    """The bytes of a model file; ``parse`` gives the parts back."""
    sections: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, graph in graphs.items():
        sections.append({"name": name, "type": GRAPH, "bytes": len(graph)})
        blobs.append(graph)
    names = {np.dtype(code): name for name, code in DTYPES.items()}
    for name, array in tensors.items():
        kind = names[array.dtype]
        blob = np.ascontiguousarray(array).astype(DTYPES[kind]).tobytes()
        sections.append(
            {"name": name, "type": kind, "shape": list(array.shape), "bytes": len(blob)}
        )
        blobs.append(blob)
    text = json.dumps({**header, "sections": sections}, sort_keys=True, separators=(",", ":"))
    encoded = text.encode()
    return b"".join([_HEAD.pack(MAGIC, VERSION, len(encoded)), encoded, *blobs])


def parse(data: bytes) -> ModelFile:
    """Parse a model file; ModelError says what is wrong with it."""
    if len(data) > MAX_BYTES:
        raise ModelError(f"model file of {len(data)} bytes exceeds {MAX_BYTES}")
    if len(data) < _HEAD.size or data[:4] != MAGIC:
        raise ModelError("not a wsicodec model file")
    _, version, length = _HEAD.unpack_from(data)
    if version != VERSION:
        raise ModelError(f"model file has version {version}; this wsicodec reads {VERSION}")
    if data[5:8] != b"\0\0\0":
        raise ModelError("model file sets reserved bytes")
    if length > MAX_HEADER or _HEAD.size + length > len(data):
        raise ModelError(f"model header of {length} bytes does not fit")
    try:
        header = json.loads(data[_HEAD.size : _HEAD.size + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model header is not JSON: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("sections"), list):
        raise ModelError("model header has no list of sections")
    sections = header.pop("sections")
    if len(sections) > MAX_SECTIONS:
        raise ModelError(f"model has {len(sections)} sections; at most {MAX_SECTIONS} are allowed")
    graphs: dict[str, bytes] = {}
    tensors: dict[str, Array] = {}
    offset = _HEAD.size + length
    for section in sections:
        name, kind, size, shape = _section(section)
        if size > len(data) - offset:
            raise ModelError(f"model section {name!r} runs past the end of the file")
        if name in graphs or name in tensors:
            raise ModelError(f"model has two sections named {name!r}")
        blob = data[offset : offset + size]
        offset += size
        if kind == GRAPH:
            graphs[name] = blob
        else:
            dtype = np.dtype(DTYPES[kind])
            count = 1
            for extent in shape:
                count *= extent  # Python integers: no overflow
            if count * dtype.itemsize != size:
                raise ModelError(f"model tensor {name!r} of shape {shape} is not {size} bytes")
            tensors[name] = np.frombuffer(blob, dtype).reshape(shape)
    if offset != len(data):
        raise ModelError(f"model file has {len(data) - offset} bytes after its sections")
    return ModelFile(header, graphs, tensors, digest_of(data))


def _section(section: object) -> tuple[str, str, int, tuple[int, ...]]:
    if not isinstance(section, dict):
        raise ModelError("a model section is not an object")
    name, kind, size = section.get("name"), section.get("type"), section.get("bytes")
    shape = section.get("shape", [])
    if not isinstance(name, str) or not 1 <= len(name) <= 64:
        raise ModelError("a model section has no name")
    if not isinstance(kind, str) or (kind != GRAPH and kind not in DTYPES):
        raise ModelError(f"model section {name!r} has unknown type {kind!r}")
    if not _is_count(size) or not isinstance(shape, list) or len(shape) > 6:
        raise ModelError(f"model section {name!r} has no proper size")
    if not all(_is_count(extent) for extent in shape):
        raise ModelError(f"model section {name!r} has an improper shape")
    return name, kind, size, tuple(shape)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_BYTES
