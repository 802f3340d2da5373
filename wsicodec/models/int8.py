"""Runs proved integer graphs on 8-bit kernels, where this machine's are exact.

The graphs that travel in model files are float32 convolutions on integers. Each of their layers,
``Conv -> Round -> Mul 2^-shift -> Round -> Clip``, is also one ``QLinearConv`` on 8-bit levels with
a scale of 1, which takes a fraction of the time on CPUs with 8-bit dot products. The result is the
same integer: sums are exact in int32, scaling by a power of two is exact in float32, and both round
half to even. Without such instructions (VNNI) the kernels add pairs of products in 16 bits and may
saturate; such machines keep the float32 graphs, and so does any graph of another form.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.models.proof import attributes, initializers

Array = npt.NDArray[Any]


@functools.cache
def exact_kernels() -> bool:
    """True where 8-bit dot products are exact: x86 with VNNI, and 64-bit Arm."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return bool({"avx512_vnni", "avx_vnni"} & set(flags.split()))


def int8_graph(graph_bytes: bytes) -> bytes:
    """The same graph with 8-bit kernels where its layers have their form; inputs and outputs stay.

    graph_bytes: a graph that ``proof.prove_integer`` has proved.
    """
    import onnx

    model = onnx.load_model_from_string(graph_bytes)
    graph = model.graph
    constants = dict(initializers(graph, "int8"))
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    signed = _signed_tensors(graph)
    nodes: list[Any] = []
    added: dict[str, Any] = {
        "unit": np.float32(1),
        "zero": np.uint8(0),
        "middle": np.uint8(128),
        "offset": np.float32(128),
    }
    replaced: set[str] = set()
    for node in graph.node:
        if node.output[0] in replaced:
            continue
        layer = _layer(node, users, constants, graph) if node.op_type == "Conv" else None
        if layer is None:
            nodes.append(node)
            continue
        replaced |= {n.output[0] for n in layer}
        nodes += _eight_bit(layer, constants, node.input[0] in signed, added)
    kept = [t for t in graph.initializer if any(t.name in n.input for n in nodes)]
    new = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in added.items()]
    rewritten = onnx.helper.make_graph(
        nodes, graph.name, list(graph.input), list(graph.output), [*kept, *new]
    )
    result = onnx.helper.make_model(
        rewritten, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    return bytes(result.SerializeToString())


def _signed_tensors(graph: Any) -> set[str]:
    """Tensors that fit signed 8-bit levels because they come straight from bounded inputs."""
    signed = {i.name for i in graph.input} & {"context", "z"}
    for node in graph.node:
        if node.op_type in ("Abs", "Concat") and any(n in signed for n in node.input):
            signed.add(node.output[0])
    return signed


def _layer(
    conv: Any, users: dict[str, list[Any]], constants: dict[str, Array], graph: Any
) -> list[Any] | None:
    """[Conv, Round, Mul, Round, Clip] when nothing else reads what lies between, or None."""
    outputs = {o.name for o in graph.output}
    chain = [conv]
    for wanted in ("Round", "Mul", "Round", "Clip"):
        name = chain[-1].output[0]
        following = users.get(name, [])
        if len(following) != 1 or following[0].op_type != wanted or name in outputs:
            return None
        chain.append(following[0])
    low, high = (float(constants[name].reshape(())) for name in chain[-1].input[1:])
    return chain if low >= 0 and high <= 255 else None


def _eight_bit(
    layer: list[Any], constants: dict[str, Array], signed: bool, added: dict[str, Any]
) -> list[Any]:
    """Cast, QLinearConv, Cast and Clip in place of a layer."""
    from onnx import TensorProto, helper

    conv, _, scaling, _, clip = layer
    stem = conv.output[0]
    shift = constants[scaling.input[1]].reshape(-1).astype(np.float32)
    added[f"{stem}_w"] = constants[conv.input[1]].astype(np.int8)
    added[f"{stem}_b"] = constants[conv.input[2]].astype(np.int32)
    added[f"{stem}_s"] = np.broadcast_to(shift, (len(added[f"{stem}_b"]),)).copy()
    added[f"{stem}_z"] = np.zeros(len(added[f"{stem}_b"]), np.int8)
    zero = "middle" if signed else "zero"
    operands = [f"{stem}_x", "unit", zero, f"{stem}_w", f"{stem}_s", f"{stem}_z", "unit", "zero"]
    operands.append(f"{stem}_b")
    whole = conv.input[0]
    nodes = []
    if signed:
        whole = f"{stem}_o"
        nodes.append(helper.make_node("Add", [conv.input[0], "offset"], [whole]))
    return [
        *nodes,
        helper.make_node("Cast", [whole], [f"{stem}_x"], to=TensorProto.UINT8),
        helper.make_node("QLinearConv", operands, [f"{stem}_y"], **attributes(conv)),
        helper.make_node("Cast", [f"{stem}_y"], [f"{stem}_f"], to=TensorProto.FLOAT),
        helper.make_node("Clip", [f"{stem}_f", *clip.input[1:]], list(clip.output)),
    ]
