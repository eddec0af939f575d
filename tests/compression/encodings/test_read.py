"""Every format: what was written is read, counted and answered as it was meant."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.encodings import folded, n_bits, products, qdq
from modelpress_compression.encodings.operands import arranged
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.encodings.weight import QuantizedWeight, StoredWeight
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import constant_array, graph_of, required
from modelpress_compression.measure.stats import model_stats
from modelpress_compression.model import Model
from onnx import helper

ModelOf = Callable[..., Model]
# (format, bits)
FORMATS = [
    *((name, bits) for name in ("per tensor", "per channel", "in blocks") for bits in (4, 8)),
    *(("MatMulNBits", bits) for bits in (2, 4, 8)),
    *(("MatMulNBits, no zero points", bits) for bits in (2, 4, 8)),
    *(("GatherBlockQuantized", bits) for bits in (4, 8)),
    *(("folded", bits) for bits in (4, 8, 16)),
    ("packed", 4),
    ("rows", 8),
    ("MatMulInteger", 8),
]


def random_weight(
    rng: np.random.Generator, name: str, bits: int, rows: int, columns: int, size: int
) -> QuantizedWeight:
    """Any levels, scales and zero points that the format can hold."""
    in_rows = name.startswith(("MatMulN", "Gather")) or (name, bits) == ("folded", 4)
    signed = name in ("rows", "folded", "MatMulInteger", "per channel", "packed") and not in_rows
    low = -(1 << (bits - 1)) if signed else 0
    kind = np.int16 if bits == 16 else np.int8 if signed else np.uint8
    levels = rng.integers(low, low + (1 << bits), (rows, columns)).astype(kind)
    blocks = -(-columns // size)
    by_column, by_row = (columns,), (rows, 1)
    shapes = {
        "per tensor": (),
        "per channel": by_column,
        "MatMulInteger": by_column,
        "packed": by_column,
        "rows": by_row,
        "folded": by_row,
    }
    shape = (rows, blocks) if in_rows else shapes.get(name, (rows, blocks))
    scale = rng.uniform(0.01, 0.02, shape).astype(np.float32)
    zero_point = rng.integers(low, low + (1 << bits), shape).astype(levels.dtype)
    if name in ("rows", "folded") and not in_rows:
        return QuantizedWeight(levels, scale, np.zeros((), kind), bits=bits)
    if name == "packed":
        zero_point[:] = 0
    if "no zero points" in name:
        zero_point[:] = 1 << (bits - 1)
    blocked = in_rows or name == "in blocks"
    return QuantizedWeight(levels, scale, zero_point, 1 if shape else None, size if blocked else 0, bits)


def written(model_of: ModelOf, name: str, weight: QuantizedWeight) -> Model:
    """y = x @ w, or the rows of w that x names."""
    rows, columns = weight.levels.shape
    looked_up = name in ("rows", "GatherBlockQuantized")
    transposed = name.startswith("MatMulN")
    shape = (columns, rows) if transposed else (rows, columns)
    nodes = [helper.make_node(*(("Gather", ["w", "x"]) if looked_up else ("MatMul", ["x", "w"])), ["y"], name="node")]
    model = model_of(
        nodes, {"w": np.zeros(shape, np.float32)}, {"x": ["n"] if looked_up else ["n", shape[0]]}, looked_up
    )
    editor, node = Editor(model), next(iter(model.nodes()))
    write(editor, node, name, weight)
    clean(model)
    return model


def write(editor: Editor, node, name: str, weight: QuantizedWeight) -> None:  # type: ignore[no-untyped-def]
    graph = graph_of(node)
    if name.startswith("MatMulNBits"):
        stored = n_bits.store_matrix(editor, graph, weight, "w")
        assert (stored.zero_point is None) is not (weight.zero_point != 1 << (weight.bits - 1)).any()
        result = n_bits.write_product(editor, node, stored)
    elif name == "GatherBlockQuantized":
        result = n_bits.write_lookup(editor, node, n_bits.store_table(editor, graph, weight, "w"))
    elif name == "rows":
        result = folded.write_rows(editor, node, folded.store_rows(editor, graph, weight, "w"))
    elif name == "MatMulInteger":
        x = products.write_input(editor, node, required(node, 0))
        result = products.write(editor, node, x, qdq.store(editor, graph, weight, "w"))
    else:
        if name == "folded" and weight.bits == 4:
            real = folded.write_4_bits(editor, graph, weight, weight.levels.shape, "w")
        elif name == "folded":
            real = folded.write_levels(editor, graph, weight, "w")
        else:
            store = qdq.store_packed if name == "packed" else qdq.store
            real = qdq.write(editor, node, store(editor, graph, weight, "w"), "w")
        node.replace_input_with(1, real)
        return
    editor.hand_over(node.outputs[0], result)
    graph.remove(node, safe=True)


def only_weight(model: Model) -> StoredWeight:
    """The one quantized weight of a model."""
    (stored,) = (stored for node in model.nodes() for stored in stored_weights(node))
    return stored


@pytest.mark.parametrize(("name", "bits"), FORMATS)
@settings(max_examples=20)
@given(rows=st.integers(1, 9), columns=st.integers(1, 90), size=st.sampled_from([16, 32]), seed=st.integers(0, 99))
def test_what_is_written_is_read(  # type: ignore[no-untyped-def]
    model_of: ModelOf, name: str, bits: int, rows: int, columns: int, size: int, seed: int
) -> None:
    """Levels, real numbers and stored bytes come back, whatever the shape; figures count the matrix, not its bytes."""
    if name == "GatherBlockQuantized":
        columns += columns % (8 // bits)
    if name == "packed":
        columns *= 2
    weight = random_weight(np.random.default_rng(seed), name, bits, rows, columns, size)
    model = written(model_of, name, weight)
    stored = only_weight(model)
    np.testing.assert_array_equal(stored.weight.levels, weight.levels)
    np.testing.assert_array_equal(stored.weight.dequantize(), weight.dequantize())
    bytes_ = constant_array(stored.values)
    np.testing.assert_array_equal(stored.pack(stored.weight.levels), bytes_)
    assert (stored.weight.bits, stored.weight.signed) == (weight.bits, weight.signed)
    stats = model_stats(model)
    assert stats.parameters == rows * columns
    assert stats.nonzero_parameters == np.count_nonzero(weight.dequantize())
    assert sum(layer.parameters for layer in stats.layers) == rows * columns


@pytest.mark.parametrize(("name", "bits"), [item for item in FORMATS if item[1] != 2 and item != ("MatMulInteger", 8)])
def test_onnxruntime_reads_it_alike(
    model_of: ModelOf, answer_of: Callable[..., np.ndarray], name: str, bits: int
) -> None:
    """The answers are those of the dequantized matrix: rtol 1e-4 for products over 70 inputs, 1e-6 for rows."""
    rng = np.random.default_rng(1)
    weight = random_weight(rng, name, bits, 70, 70, 32)
    real = weight.dequantize()
    model = written(model_of, name, weight)
    if name in ("rows", "GatherBlockQuantized"):
        index = np.asarray([0, 49, -1, 7])
        np.testing.assert_allclose(answer_of(model, index), real[index], rtol=1e-6, atol=1e-7)
        return
    for node in model.nodes():
        node.attributes.pop("accuracy_level", None)  # the arithmetic of floats
    x = rng.normal(0, 1, (5, 70)).astype(np.float32)
    expected = x @ (real.T if name.startswith("MatMulN") else real)
    np.testing.assert_allclose(answer_of(model, x), expected, rtol=1e-4, atol=1e-4)


def test_a_parameter_of_another_shape_makes_no_weight(model_of: ModelOf) -> None:
    """A file whose scales do not go with its levels is not read, and its figures are those of plain constants."""
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = {"q": np.ones((4, 6), np.int8), "s": np.ones(5, np.float32)}
    model = model_of(nodes, weights, {"x": ["n", 4]})
    assert not [stored for node in model.nodes() for stored in stored_weights(node)]
    assert model_stats(model).parameters == 24


def constants_of(arrays: dict[str, np.ndarray]) -> dict[str, onnx_ir.Value]:
    """Initializers of a graph."""
    tensors = {name: onnx_ir.tensor(array, name=name) for name, array in arrays.items()}
    values = {name: onnx_ir.val(name, const_value=tensor) for name, tensor in tensors.items()}
    onnx_ir.Graph([], [], nodes=[], initializers=list(values.values()))
    return values


@pytest.mark.parametrize(
    ("op_type", "shape", "axis", "attributes"),
    [
        ("QLinearConv", (6, 2, 3, 3), 0, {}),
        ("ConvInteger", (6, 2, 3, 3), 0, {}),
        ("QLinearMatMul", (4, 6), 1, {}),
        ("MatMulInteger", (4, 6), 1, {}),
        ("QGemm", (4, 6), 1, {}),
        ("QGemm", (6, 4), 0, {"transB": 1}),
        ("MatMulIntegerToFloat", (4, 6), 1, {}),
        ("DynamicQuantizeMatMul", (4, 6), 1, {}),
        ("QAttention", (4, 6), 1, {}),
    ],
)
def test_integer_products_are_read(op_type: str, shape: tuple[int, ...], axis: int, attributes: dict[str, int]) -> None:
    """Scales and zero points by channel lie along the outputs; without a scale of its own a product's is 1."""
    rng = np.random.default_rng(0)
    levels = rng.integers(-128, 128, shape).astype(np.int8)
    given = {"w": levels, "w_scale": rng.uniform(1, 2, 6).astype(np.float32), "w_zero": np.arange(6, dtype=np.int8)}
    node = onnx_ir.node(op_type, arranged(op_type, x=onnx_ir.val("x"), **constants_of(given)), attributes)
    (stored,) = stored_weights(node)
    along = [-1 if place == axis else 1 for place in range(len(shape))]
    scale = 1 if op_type.endswith("Integer") else given["w_scale"].reshape(along)
    real = (levels.astype(np.float32) - given["w_zero"].reshape(along)) * scale
    np.testing.assert_array_equal(stored.weight.dequantize(), real)


@pytest.mark.parametrize("by_column", [True, False])
def test_both_weights_of_an_lstm_are_read(by_column: bool) -> None:
    """[directions, inputs, columns] with a scale for each direction, or for each of its columns."""
    rng = np.random.default_rng(0)
    values = {}
    for name, extent in (("w", 3), ("r", 2)):
        shape = (2, 8) if by_column else (2,)
        values[name] = rng.integers(-128, 128, (2, extent, 8)).astype(np.int8)
        values[f"{name}_scale"] = rng.uniform(1, 2, shape).astype(np.float32)
        values[f"{name}_zero"] = np.zeros(shape, np.int8)
    constants = {
        name: onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name)) for name, array in values.items()
    }
    onnx_ir.Graph([], [], nodes=[], initializers=list(constants.values()))
    node = onnx_ir.node("DynamicQuantizeLSTM", arranged("DynamicQuantizeLSTM", x=onnx_ir.val("x"), **constants))
    for name, stored in zip(("w", "r"), stored_weights(node), strict=True):
        scale = values[f"{name}_scale"].reshape(2, 1, -1)
        np.testing.assert_array_equal(stored.weight.dequantize(), values[name].astype(np.float32) * scale)
