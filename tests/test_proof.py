"""Graphs from strangers: one named test for each way to break a proof, and what proofs promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import second_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tools.export.builder import FLOAT, INT8, UINT8, GraphBuilder, grid
from wsicodec.errors import ModelError
from wsicodec.models import container, proof
from wsicodec.models.decoder import load_decoder
from wsicodec.models.proof import Range, prove_integer, prove_quantised
from wsicodec.models.session import GraphRunner

WEIGHT = np.array([[3, -5], [100, 20], [-127, 127]])[:, :, None, None]
BIAS = np.array([4, -700, 8])
SHIFT = np.array([3, 7, 4])
INPUTS = {"x": Range.of(2, -127, 127)}
OUTPUTS = {"y": Range.of(3, 0, 127, kind=proof.UINT8)}
PORTS = {"x": (FLOAT, grid(2))}, {"y": (UINT8, grid(3))}


def good() -> Any:
    """A one-layer integer graph that passes: x (2 channels, -127 ... 127) to y (3, 0 ... 127)."""
    g = GraphBuilder("good", "Floor")
    g.integer_conv("x", (WEIGHT, BIAS, SHIFT), (0, 127), cast=UINT8, output="y")
    return g.model(*PORTS)


def prove(model: Any) -> None:
    prove_integer(model.SerializeToString(), INPUTS, OUTPUTS, "test")


def refused(model: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        prove(model)


def node(model: Any, kind: str) -> Any:
    """The last node of a kind; the first Casts are of constants."""
    return [n for n in model.graph.node if n.op_type == kind][-1]


def constant(model: Any, hint: str) -> Any:
    return next(t for t in model.graph.initializer if t.name.startswith(hint + "_"))


def replace(model: Any, hint: str, value: np.ndarray) -> None:
    tensor = constant(model, hint)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def bypass(model: Any, kind: str) -> Any:
    """Take the last node of a kind out of the graph."""
    gone = node(model, kind)
    for other in model.graph.node:
        for i, name in enumerate(other.input):
            if name == gone.output[0]:
                other.input[i] = gone.input[0]
    model.graph.node.remove(gone)
    return model


def attribute(target: Any, name: str, value: Any) -> None:
    for old in [a for a in target.attribute if a.name == name]:
        target.attribute.remove(old)
    target.attribute.append(helper.make_attribute(name, value))


def test_the_good_graph_passes() -> None:
    prove(good())


# -- weights and sums --


def test_weight_not_integer() -> None:
    model = good()
    replace(model, "w", (WEIGHT + 0.5).astype(np.float32))
    del model.graph.node[0]
    node(model, "Conv").input[1] = constant(model, "w").name
    refused(model, "not integers")


def test_weight_200() -> None:
    model = good()
    weight = WEIGHT.astype(np.int16)
    weight[0, 0] = 200
    replace(model, "w", weight)
    refused(model, "exceed int8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weight_not_finite(value: float) -> None:
    model = good()
    weight = WEIGHT.astype(np.float32)
    weight[1, 1] = value
    replace(model, "w", weight)
    del model.graph.node[0]
    node(model, "Conv").input[1] = constant(model, "w").name
    refused(model, "finite")


def test_bias_not_integer() -> None:
    model = good()
    replace(model, "b", (BIAS + 0.25).astype(np.float32))
    del model.graph.node[1]
    node(model, "Conv").input[2] = constant(model, "b").name
    refused(model, "not integers")


def test_sum_over_2_22() -> None:
    largest = 2**22 - 1 - 254 * 127
    model = good()
    replace(model, "b", np.array([0, 0, largest], np.int32))
    prove(model)
    replace(model, "b", np.array([0, 0, largest + 1], np.int32))
    refused(model, r"beyond 2\^22")


def test_constant_beyond_float32() -> None:
    model = good()
    replace(model, "b", np.array([0, 0, 2**24 + 1], np.int32))
    refused(model, "float32")


def test_input_of_more_than_11_bits() -> None:
    with pytest.raises(ModelError, match="11 bits"):
        prove_integer(good().SerializeToString(), {"x": Range.of(2, 0, 2048)}, OUTPUTS, "test")


def test_weights_cast_from_floats() -> None:
    model = good()
    replace(model, "w", WEIGHT.astype(np.float32))
    refused(model, "from integers")


def test_weights_in_another_float() -> None:
    model = good()
    attribute(model.graph.node[0], "to", TensorProto.FLOAT16)
    refused(model, "from integers to float32")


def test_weights_computed_at_run_time() -> None:
    model = good()
    node(model, "Conv").input[1] = "x"
    refused(model, "must be a constant")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("w", np.zeros((3, 1, 1, 1), np.int8), "do not fit"),
        ("w", np.zeros((3, 2), np.int8), "do not fit"),
        ("w", np.zeros((4, 2, 1, 1), np.int8), "do not fit"),
        ("w", np.zeros((3, 2, 5, 5), np.int8), "1x1 or 3x3"),
        ("w", np.zeros((3, 2, 1, 3), np.int8), "1x1 or 3x3"),
        ("w", np.zeros((3, 2, 3, 3), np.int8), "another kernel"),
        ("w", np.zeros((0, 2, 1, 1), np.int8), "shape"),
        ("b", np.zeros((3, 1), np.int32), "do not fit"),
        ("b", np.zeros((), np.int32), "do not fit"),
    ],
)
def test_weights_of_another_shape(name: str, value: np.ndarray, match: str) -> None:
    model = good()
    replace(model, name, value)
    refused(model, match)


# -- the form of a layer --


def test_missing_floor() -> None:
    refused(bypass(good(), "Floor"), "not whole")


def test_missing_round() -> None:
    refused(bypass(good(), "Round"), "no Round")


def test_missing_round_without_a_shift() -> None:
    """Integers to float32, but not to kernels that transform: no Round, no proof."""
    refused(bypass(bypass(bypass(good(), "Mul"), "Floor"), "Round"), "no Round")


def test_missing_shift_is_a_shift_of_zero() -> None:
    prove(bypass(bypass(good(), "Mul"), "Floor"))


def test_missing_clip_leaves_the_range() -> None:
    refused(bypass(good(), "Clip"), "does not hold")


def test_missing_cast() -> None:
    model = bypass(good(), "Cast")
    node(model, "Clip").output[0] = "y"
    refused(model, "type")


@pytest.mark.parametrize("value", [1 / 3, 0.75, 0.0, -0.5, 2.0, 2.0**-25, np.nan, np.inf])
def test_scale_not_a_power_of_two_up_to_one(value: float) -> None:
    model = good()
    scale = np.exp2(-SHIFT).astype(np.float32).reshape(1, 3, 1, 1)
    scale[0, 1] = value
    replace(model, "scale", scale)
    refused(model, "powers of two|finite")


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 1, 3, 1), (1, 1, 1, 3), (1, 1, 1, 1, 1)])
def test_scale_along_another_axis(shape: tuple[int, ...]) -> None:
    """(3,) would scale columns wherever a grid has three of them."""
    model = good()
    replace(model, "scale", np.full(shape, 0.25, np.float32))
    if np.prod(shape) == 1 and len(shape) > 4:
        refused(model, "not allowed")
    else:
        refused(model, "one to the channel")


@pytest.mark.parametrize("value", [[0.0, 1.0], 0.5, np.nan, np.inf])
def test_clip_bound_not_one_whole_number(value: Any) -> None:
    model = good()
    replace(model, "bound", np.array(value, np.float32))
    refused(model, "number|whole|finite")


def test_clip_bounds_the_wrong_way_round() -> None:
    model = good()
    clip = node(model, "Clip")
    clip.input[1], clip.input[2] = clip.input[2], clip.input[1]
    refused(model, "whole")


def test_clip_with_one_bound() -> None:
    model = good()
    del node(model, "Clip").input[2]
    refused(model, "2 inputs")


def test_clip_with_a_left_out_bound() -> None:
    model = good()
    node(model, "Clip").input[1] = ""
    refused(model, "improper inputs")


def test_layer_after_the_cast() -> None:
    model = good()
    node(model, "Cast").output[0] = "late"
    model.graph.node.append(helper.make_node("Abs", ["late"], ["y"]))
    refused(model, "was cast")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("strides", [2, 2], "stride 1"),
        ("dilations", [2, 2], "dense"),
        ("group", 2, "dense"),
        ("pads", [1, 1, 1, 1], "same size"),
        ("pads", [0, 0], "same size"),
        ("auto_pad", "SAME_UPPER", "same size"),
        ("kernel_shape", [3, 3], "another kernel"),
        ("pads", 0, "not allowed"),
        ("strides", 1, "not allowed"),
        ("group", 1.0, "not allowed"),
        ("kernel_shape", "1", "not allowed"),
        ("output_padding", [0, 0], "not allowed"),
    ],
)
def test_convolution_of_another_kind(name: str, value: Any, match: str) -> None:
    model = good()
    attribute(node(model, "Conv"), name, value)
    refused(model, match)


def test_convolution_without_a_bias() -> None:
    model = good()
    del node(model, "Conv").input[2]
    refused(model, "2 inputs")


def test_attribute_twice() -> None:
    model = good()
    conv = node(model, "Conv")
    conv.attribute.append(helper.make_attribute("kernel_shape", [1, 1]))
    refused(model, "twice")


# -- what a graph may not hold --


@pytest.mark.parametrize(
    "kind", ["Relu", "If", "Loop", "Scan", "Add", "Gemm", "Sigmoid", "Constant", "ReadFile", ""]
)
def test_operator_not_allowed(kind: str) -> None:
    model = good()
    node(model, "Clip").op_type = kind
    refused(model, "not allowed")


def test_unused_operator_not_allowed() -> None:
    model = good()
    model.graph.node.append(helper.make_node("Exp", ["x"], ["nowhere"]))
    refused(model, "not allowed")


def test_custom_domain() -> None:
    model = good()
    node(model, "Clip").domain = "evil.example"
    refused(model, "domain 'evil.example'")


def test_custom_domain_imported() -> None:
    model = good()
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    refused(model, "domain 'com.microsoft'")


@pytest.mark.parametrize("versions", [[], [6], [16], [18], [17, 17], [2**40]])
def test_other_operator_set(versions: list[int]) -> None:
    """Meanings of operators change with the version: the proof is of version 17."""
    model = good()
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid("", v) for v in versions)
    refused(model, "operator set")


@pytest.mark.parametrize("version", [0, 3, 7, 10, 2**40])
def test_other_ir_version(version: int) -> None:
    model = good()
    model.ir_version = version
    refused(model, "IR version")


def test_name_that_is_not_text() -> None:
    """Protobuf's parser lets it pass; sorting it among others raised a TypeError once."""
    data = good().SerializeToString().replace(b"x\x12", b"\xff\x12", 1)
    assert data != good().SerializeToString()
    with pytest.raises(ModelError):
        prove_integer(data, INPUTS, OUTPUTS, "test")


def test_functions() -> None:
    model = good()
    opsets = [helper.make_opsetid("", 17)]
    body = [helper.make_node("Exp", ["a"], ["b"])]
    model.functions.append(helper.make_function("", "Round", ["a"], ["b"], body, opsets))
    refused(model, "functions")


def test_external_data() -> None:
    model = good()
    tensor = constant(model, "w")
    onnx.external_data_helper.set_external_data(tensor, "/etc/passwd")
    tensor.ClearField("raw_data")
    refused(model, "external data")


def test_external_data_without_saying_so() -> None:
    model = good()
    entry = constant(model, "w").external_data.add()
    entry.key, entry.value = "location", "../../secret"
    refused(model, "external data")


def test_sparse_initializer() -> None:
    model = good()
    model.graph.sparse_initializer.add()
    refused(model, "sparse")


def test_training_parts() -> None:
    model = good()
    model.training_info.add()
    refused(model, "training")


def test_subgraph_attribute() -> None:
    model = good()
    attribute(node(model, "Clip"), "body", model.graph)
    refused(model, "'body' of Clip")


def test_tensor_attribute() -> None:
    model = good()
    attribute(node(model, "Cast"), "value", numpy_helper.from_array(np.zeros(3)))
    refused(model, "'value' of Cast")


def test_attribute_that_refers_to_a_functions() -> None:
    model = good()
    node(model, "Cast").attribute[0].ref_attr_name = "to"
    refused(model, "not allowed")


def test_two_outputs_of_a_node() -> None:
    model = good()
    node(model, "Clip").output.append("second")
    refused(model, "improper inputs or outputs")


def test_no_output_of_a_node() -> None:
    model = good()
    del node(model, "Clip").output[:]
    refused(model, "improper inputs or outputs")


@pytest.mark.parametrize("kind", ["Round", "Floor", "Cast", "Conv", "Mul", "Clip"])
def test_node_without_inputs(kind: str) -> None:
    model = good()
    del node(model, kind).input[:]
    refused(model, "improper inputs or outputs")


@pytest.mark.parametrize("kind", ["Round", "Floor", "Cast", "Conv", "Mul", "Clip"])
def test_node_with_too_many_inputs(kind: str) -> None:
    model = good()
    node(model, kind).input.append("x")
    refused(model, "inputs")


def test_tensor_written_twice() -> None:
    model = good()
    node(model, "Clip").output[0] = node(model, "Round").output[0]
    refused(model, "improper outputs")


def test_constant_written_over() -> None:
    model = good()
    node(model, "Round").output[0] = constant(model, "w").name
    refused(model, "improper outputs")


def test_input_written_over() -> None:
    model = good()
    node(model, "Round").output[0] = "x"
    refused(model, "improper outputs")


def test_input_with_a_constants_name() -> None:
    """onnxruntime would run with the constant, the proof with the input's range."""
    model = good()
    model.graph.initializer.append(
        numpy_helper.from_array(np.full((1, 2, 1, 1), 1e9, np.float32), "x")
    )
    refused(model, "constant's name")


def test_duplicate_constant() -> None:
    model = good()
    model.graph.initializer.append(
        numpy_helper.from_array(np.full((3, 2, 1, 1), 1, np.int8), constant(model, "w").name)
    )
    refused(model, "used twice")


def test_cycle() -> None:
    model = good()
    node(model, "Round").input[0] = node(model, "Clip").output[0]
    refused(model, "before it is computed")


def test_nodes_out_of_order() -> None:
    model = good()
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    refused(model, "before it is computed|must be a constant")


def test_too_many_nodes() -> None:
    model = good()
    for i in range(260):
        model.graph.node.append(helper.make_node("Abs", ["x"], [f"a{i}"]))
    refused(model, "at most 256")


def test_channels_doubled_for_ever() -> None:
    """100 Concats of a tensor with itself: 2^101 channels, refused before they are counted."""
    model = good()
    for i in range(100):
        name = "x" if i == 0 else f"c{i - 1}"
        model.graph.node.append(helper.make_node("Concat", [name, name], [f"c{i}"], axis=1))
    refused(model, "more than 4096")


# -- inputs and outputs --


def test_wrong_input_name() -> None:
    model = good()
    model.graph.input[0].name = "z"
    node(model, "Conv").input[0] = "z"
    refused(model, "inputs are")


def test_additional_input() -> None:
    model = good()
    model.graph.input.append(helper.make_tensor_value_info("more", FLOAT, grid(1)))
    refused(model, "inputs are")


def test_wrong_output_name() -> None:
    model = good()
    model.graph.output[0].name = node(model, "Clip").output[0]
    refused(model, "outputs are")


def test_two_outputs() -> None:
    model = good()
    name = node(model, "Clip").output[0]
    model.graph.output.append(helper.make_tensor_value_info(name, FLOAT, grid(3)))
    refused(model, "outputs are")


def test_outputs_in_another_order() -> None:
    """Outputs are read by position: means taken for classes would index past the tables."""
    g = GraphBuilder("two", "Floor")
    g.integer_conv("x", (WEIGHT, BIAS, SHIFT), (0, 127), cast=UINT8, output="y")
    g.integer_conv("x", (WEIGHT, BIAS, SHIFT), (-99, 99), output="m")
    ports = {"y": (UINT8, grid(3)), "m": (FLOAT, grid(3))}
    outputs = {**OUTPUTS, "m": Range.of(3, -1023, 1023)}
    model = g.model(PORTS[0], ports)
    prove_integer(model.SerializeToString(), INPUTS, outputs, "test")
    swapped = g.model(PORTS[0], {"m": ports["m"], "y": ports["y"]})
    with pytest.raises(ModelError, match="in this order"):
        prove_integer(swapped.SerializeToString(), INPUTS, outputs, "test")


def test_output_out_of_range() -> None:
    model = good()
    replace(model, "bound", np.array(-1, np.float32))  # the lower bound
    attribute(node(model, "Cast"), "to", TensorProto.INT8)
    model.graph.output[0].type.tensor_type.elem_type = INT8
    outputs = {"y": Range.of(3, 0, 127, kind=proof.INT8)}
    with pytest.raises(ModelError, match="may leave its range"):
        prove_integer(model.SerializeToString(), INPUTS, outputs, "test")


def test_output_of_another_type() -> None:
    model = good()
    attribute(node(model, "Cast"), "to", TensorProto.INT8)
    refused(model, "type")


def test_cast_to_a_type_that_does_not_hold_the_range() -> None:
    for kind in (TensorProto.INT4, TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.STRING, 999):
        model = good()
        attribute(node(model, "Cast"), "to", kind)
        refused(model, "does not hold")


def test_output_with_other_channels() -> None:
    with pytest.raises(ModelError, match="type and channels"):
        outputs = {"y": Range.of(4, 0, 127, kind=proof.UINT8)}
        prove_integer(good().SerializeToString(), INPUTS, outputs, "test")


def test_output_on_another_grid() -> None:
    """Fewer positions than promised would be read past their end."""
    outputs = {"y": Range.of(3, 0, 127, zoom=2, kind=proof.UINT8)}
    with pytest.raises(ModelError, match="another grid"):
        prove_integer(good().SerializeToString(), INPUTS, outputs, "test")


def test_concat_of_different_grids() -> None:
    g = GraphBuilder("grids", "Floor")
    wide = g.add("DepthToSpace", g.add("Concat", "x", "x", axis=1), blocksize=2, mode="CRD")
    g.add("Concat", wide, "x", axis=1, output="y")
    model = g.model(PORTS[0], {"y": (FLOAT, grid(3))})
    with pytest.raises(ModelError, match="different grids"):
        prove_integer(model.SerializeToString(), INPUTS, {"y": Range.of(3, -127, 127)}, "test")


@pytest.mark.parametrize(
    "extents",
    [
        [1, 2, "r", "c"],
        ["b", 2, 64, "c"],
        ["b", 2, "r", 64],
        ["b", 3, "r", "c"],
        ["b", "k", "r", "c"],
        ["b", 2, "r"],
        [],
        ["b", 2**62, "r", "c"],
    ],
)
def test_input_declared_with_other_extents(extents: list[Any]) -> None:
    model = good()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", FLOAT, extents))
    refused(model, "declared")


@pytest.mark.parametrize("kind", [UINT8, TensorProto.DOUBLE, TensorProto.FLOAT16, 0])
def test_input_declared_with_another_type(kind: int) -> None:
    model = good()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", kind, grid(2)))
    refused(model, "declared")


# -- damaged constants --


def test_huge_declared_size() -> None:
    model = good()
    tensor = constant(model, "w")
    del tensor.dims[:]
    tensor.dims.extend([2**20, 2**20, 3, 3])
    refused(model, "damaged|shape")


def test_huge_declared_size_without_data() -> None:
    model = good()
    tensor = constant(model, "w")
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend([2**40])
    refused(model, "damaged|shape")


def test_negative_extent() -> None:
    model = good()
    tensor = constant(model, "w")
    tensor.dims[0] = -1
    refused(model, "shape|damaged")


def test_constant_of_too_little_data() -> None:
    model = good()
    constant(model, "w").raw_data = b"123"
    refused(model, "damaged")


@pytest.mark.parametrize(
    "kind",
    [TensorProto.STRING, TensorProto.DOUBLE, TensorProto.COMPLEX64, TensorProto.BFLOAT16, 0, 999],
)
def test_constant_of_another_type(kind: int) -> None:
    model = good()
    constant(model, "w").data_type = kind
    refused(model, "type that is not allowed")


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff" * 40, b"not protobuf at all"])
def test_not_an_onnx_model(data: bytes) -> None:
    with pytest.raises(ModelError):
        prove_integer(data, INPUTS, OUTPUTS, "test")


def test_every_truncation_is_refused() -> None:
    data = good().SerializeToString()
    for size in range(len(data)):
        with pytest.raises(ModelError):
            prove_integer(data[:size], INPUTS, OUTPUTS, "test")


@pytest.mark.parametrize("name", ["hyper", "stage1", "chain"])
def test_any_damage_is_refused_by_name_or_proved(name: str, tiny_file: bytes) -> None:
    """Random bytes in a real graph: ModelError, or a graph whose proof still holds."""
    parsed = container.parse(tiny_file)
    rng = np.random.default_rng(len(name))
    graph = np.frombuffer(parsed.graphs[name], np.uint8)
    for _ in range(150):
        damaged = graph.copy()
        for _ in range(rng.integers(1, 4)):
            # the first and last kilobyte hold structure, the rest weights
            near = rng.integers(min(1000, len(graph)))
            at = rng.choice([near, len(graph) - 1 - near, rng.integers(len(graph))])
            damaged[at] = rng.integers(256)
        graphs = {**parsed.graphs, name: damaged.tobytes()}
        try:
            load_decoder(container.pack(parsed.header, graphs, parsed.tensors))
        except ModelError as error:
            assert str(error)


# -- the chain --


def good_chain() -> Any:
    """context (uint8, 3 channels) to uint8, 4 channels last."""
    g = GraphBuilder("chain")
    rng = np.random.default_rng(1)

    def layer(outputs: int, inputs: int, side: int) -> Any:
        weight = rng.integers(-63, 64, (outputs, inputs, side, side))
        return weight, rng.integers(-99, 99, outputs), rng.integers(-9, -6, outputs)

    x = g.quantised_conv("context", layer(5, 3, 3), (-2, np.uint8(128)), (-1, np.uint8(0)))
    x = g.quantised_conv(x, layer(4, 5, 1), (-1, np.uint8(0)), (-3, np.uint8(128)))
    g.add("Transpose", x, perm=[0, 2, 3, 1], output="correction")
    return g.model(
        {"context": (UINT8, grid(3))}, {"correction": (UINT8, ["batch", "rows", "columns", 4])}
    )


def refused_chain(model: Any, match: str, inputs: int = 3, outputs: int = 4) -> None:
    with pytest.raises(ModelError, match=match):
        prove_quantised(model.SerializeToString(), inputs, outputs, "test")


def test_the_good_chain_passes() -> None:
    prove_quantised(good_chain().SerializeToString(), 3, 4, "test")


def chain_constant(model: Any, hint: str, index: int = 0) -> Any:
    return [t for t in model.graph.initializer if t.name.startswith(hint + "_")][index]


def test_chain_weight_beyond_63() -> None:
    model = good_chain()
    tensor = chain_constant(model, "w")
    weight = numpy_helper.to_array(tensor).copy()
    weight[1, 1, 1, 1] = -64
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    refused_chain(model, "exceed 63")


def test_chain_sum_beyond_2_24() -> None:
    model = good_chain()
    tensor = chain_constant(model, "b")
    tensor.CopyFrom(numpy_helper.from_array(np.full(5, 2**24, np.int32), tensor.name))
    refused_chain(model, r"2\^24")


@pytest.mark.parametrize("value", [0.3, 0.0, -1.0, np.nan, np.inf, 2.0**-60])
@pytest.mark.parametrize("index", range(6))
def test_chain_scale_not_a_power_of_two(value: float, index: int) -> None:
    model = good_chain()
    tensor = chain_constant(model, "scale", index)
    scale = np.full(tensor.dims, value, np.float32)
    tensor.CopyFrom(numpy_helper.from_array(scale, tensor.name))
    refused_chain(model, "scale|finite|bias")


def test_chain_bias_in_other_steps() -> None:
    """Sums would need more bits than the proof counts."""
    model = good_chain()
    bias = next(n for n in model.graph.node if n.input[0].startswith("b_"))
    tensor = next(t for t in model.graph.initializer if t.name == bias.input[1])
    scale = numpy_helper.to_array(tensor) * np.float32(2.0**-12)
    tensor.CopyFrom(numpy_helper.from_array(scale, tensor.name))
    refused_chain(model, "bias is not in the steps")


def test_chain_scale_per_channel_of_a_tensor() -> None:
    model = good_chain()
    tensor = chain_constant(model, "scale")
    tensor.CopyFrom(numpy_helper.from_array(np.full(3, 0.25, np.float32), tensor.name))
    refused_chain(model, "one scale")


def test_chain_zero_point_of_weights() -> None:
    model = good_chain()
    weights = next(n for n in model.graph.node if n.input[0].startswith("w_"))
    weights.input.append(chain_constant(model, "zero").name)
    refused_chain(model, "without a zero point")


def test_chain_weights_not_quantised() -> None:
    model = good_chain()
    next(n for n in model.graph.node if n.op_type == "Conv").input[1] = "context"
    refused_chain(model, "not quantised constants")


@pytest.mark.parametrize("kind", ["Relu", "Add", "If", "QLinearConv", "DynamicQuantizeLinear"])
def test_chain_operator_not_allowed(kind: str) -> None:
    model = good_chain()
    model.graph.node[-1].op_type = kind
    refused_chain(model, "not allowed")


def test_chain_convolution_of_sums() -> None:
    """A Conv on the sums of another: nothing bounds them."""
    model = good_chain()
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    convs[1].input[0] = convs[0].output[0]
    refused_chain(model, "not levels")


def test_chain_without_its_transpose() -> None:
    refused_chain(bypass(good_chain(), "Transpose"), "output")


def test_chain_transposed_otherwise() -> None:
    model = good_chain()
    attribute(node(model, "Transpose"), "perm", [0, 3, 2, 1])
    refused_chain(model, "channels last")


def test_chain_layer_after_the_transpose() -> None:
    model = good_chain()
    node(model, "Transpose").output[0] = "early"
    model.graph.node.append(
        helper.make_node("Transpose", ["early"], ["correction"], perm=[0, 2, 3, 1])
    )
    refused_chain(model, "after the Transpose")


def test_chain_of_other_channels() -> None:
    """Fewer samples than a block has would be read past their end."""
    refused_chain(good_chain(), "4|output", outputs=768)
    refused_chain(good_chain(), "do not fit", inputs=13)


def test_chain_of_other_types() -> None:
    model = good_chain()
    model.graph.output[0].type.tensor_type.elem_type = INT8
    refused_chain(model, "uint8")
    model = good_chain()
    model.graph.input[0].type.tensor_type.elem_type = INT8
    refused_chain(model, "uint8")
    model = good_chain()
    model.graph.input[0].name = "other"
    refused_chain(model, "context")


def test_chain_of_signed_samples() -> None:
    """Levels of int8 that go out as they are: 128 less than the format's."""
    model = good_chain()
    quantise = [n for n in model.graph.node if n.op_type == "QuantizeLinear"][-1]
    tensor = next(t for t in model.graph.initializer if t.name == quantise.input[2])
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((), np.int8), tensor.name))
    refused_chain(model, "not uint8")
    model.graph.output[0].type.tensor_type.elem_type = INT8
    refused_chain(model, "uint8")


def test_chain_with_two_outputs() -> None:
    model = good_chain()
    model.graph.output.append(model.graph.output[0])
    refused_chain(model, "twice|one tensor")


def test_chain_channels_doubled_for_ever() -> None:
    model = good_chain()
    for i in range(100):
        name = "context" if i == 0 else f"c{i - 1}"
        model.graph.node.append(helper.make_node("Concat", [name, name], [f"c{i}"], axis=1))
    refused_chain(model, "at most 4096")


# -- what the proof promises --


def random_graph(seed: int) -> tuple[bytes, dict[str, Range], dict[str, Range]]:
    """Two random layers, 1x1 or 3x3, with every operator, that may or may not be provable."""
    rng = np.random.default_rng(seed)
    g = GraphBuilder("random", "Floor")
    peak = int(rng.choice([3, 30, 127]))

    def layer(outputs: int, inputs: int) -> Any:
        side = int(rng.choice([1, 3]))
        weight = rng.integers(-peak, peak + 1, (outputs, inputs, side, side))
        return weight, rng.integers(-(2**12), 2**12, outputs), rng.integers(0, 9, outputs)

    x = g.add("Concat", "x", g.add("Abs", "x"), axis=1)
    low = int(rng.integers(-300, 1))
    x = g.integer_conv(x, layer(8, 6), (low, low + int(rng.integers(1, 2000))))
    x = g.add("DepthToSpace", x, blocksize=2, mode="CRD")
    g.integer_conv(x, layer(3, 2), (-40, 90), cast=INT8, output="y")
    data = g.finish({"x": (FLOAT, grid(3))}, {"y": (INT8, grid(3))})
    outputs = {"y": Range.of(3, -40, 90, zoom=2, kind=proof.INT8)}
    return data, {"x": Range.of(3, -127, 127)}, outputs


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["random", "low", "high", "ends"]))
def test_a_proved_graph_computes_exactly(seed: int, kind: str) -> None:
    """Where the proof holds, onnxruntime's float32 and int64 arithmetic give the same integers."""
    data, inputs, outputs = random_graph(seed)
    try:
        prove_integer(data, inputs, outputs, "random")
    except ModelError:
        return
    rng = np.random.default_rng(seed)
    x = rng.integers(-127, 128, (3, 5, 4))
    if kind != "random":
        x = {"low": np.full_like(x, -127), "high": np.full_like(x, 127)}.get(
            kind, 127 * rng.choice([-1, 1], x.shape)
        )
    exact = second_decoder.run_graph(onnx.load_from_string(data), {"x": x})["y"]
    for optimise in (False, True):
        result = GraphRunner(data, optimise=optimise)({"x": x[None].astype(np.float32)})[0]
        assert result.dtype == np.int8
        np.testing.assert_array_equal(result[0], exact)
    assert exact.min() >= -40 and exact.max() <= 90


@pytest.mark.parametrize("peak", [1, 20, 63])
def test_a_proved_chain_computes_exactly(peak: int) -> None:
    """8-bit kernels, float32 kernels and int64 arithmetic give the same levels."""
    rng = np.random.default_rng(peak)
    g = GraphBuilder("chain")
    zero, middle = np.uint8(0), np.uint8(128)

    def layer(outputs: int, inputs: int, side: int) -> Any:
        weight = rng.integers(-peak, peak + 1, (outputs, inputs, side, side))
        return weight, rng.integers(-3000, 3000, outputs), rng.integers(-9, -5, outputs)

    x = g.quantised_conv("context", layer(16, 9, 3), (0, np.uint8(128)), (0, zero))
    x = g.quantised_conv(x, layer(16, 16, 3), (0, zero), (-1, zero))
    x = g.quantised_conv(x, layer(24, 16, 1), (-1, zero), (2, middle))
    g.add("Transpose", x, perm=[0, 2, 3, 1], output="correction")
    data = g.finish(
        {"context": (UINT8, grid(9))}, {"correction": (UINT8, ["batch", "rows", "columns", 24])}
    )
    prove_quantised(data, 9, 24, "test")
    x = rng.integers(0, 256, (9, 11, 13))
    exact = second_decoder.run_graph(onnx.load_from_string(data), {"context": x})["correction"]
    for optimise in (False, True):
        result = GraphRunner(data, optimise=optimise)({"context": x[None].astype(np.uint8)})[0]
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result[0], exact)


def test_round_in_place_of_floor() -> None:
    """rint(x / 2^s): the rounding of the shipped models; both bounds round half to even."""
    model = good()
    node(model, "Floor").op_type = "Round"
    prove(model)
