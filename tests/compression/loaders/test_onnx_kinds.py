"""Kinds of ONNX files that people have: what is accepted comes back the same model, through load, fuse and save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from modelpress_compression import Recipe, compress, load
from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError, UnsupportedOperatorError
from modelpress_compression.inspection import inspect_model
from modelpress_compression.loaders.onnx_sparse import MAX_DENSE_BYTES
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(3)
W0, W1 = (RNG.standard_normal(shape).astype(np.float32) / 4 for shape in ((16, 32), (32, 4)))
LOSSY = Recipe.from_dict(
    {
        "version": 1,
        "steps": [{"prune": {"structure": "channel", "sparsity": 0.3}}, {"quantize": {"scheme": "static"}}],
        "benchmark": {"rounds": 5},
    }
)
LOSSLESS = Recipe.from_dict({"version": 1, "steps": [{"fuse": {}}], "benchmark": {"rounds": 5}})
FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
ML, MICROSOFT = "ai.onnx.ml", "com.microsoft"

Feeds = Sequence[dict[str, Any]]
Kind = tuple[onnx.ModelProto, Feeds]


def node(op: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node; `-` is an input that is left out."""
    names = [name.strip("-") for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), domain=domain, **attributes)


def tensor(name: str, shape: Sequence[Any] | None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def sequence(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_sequence_value_info(name, FLOAT, None)


def maps(name: str, keys: int = INT64) -> onnx.ValueInfoProto:
    value = onnx.ValueInfoProto(name=name)
    inner = value.type.sequence_type.elem_type.map_type
    inner.key_type = keys
    inner.value_type.tensor_type.elem_type = FLOAT
    return value


def proto_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    opset: int = 18,
    ir_version: int = 8,
    **arrays: Any,
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), initializers)
    domains = {item.domain for item in nodes if item.domain}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 3 if name == ML else 1) for name in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def feeds_of_x() -> Feeds:
    return [{"x": RNG.standard_normal((n, 16)).astype(np.float32)} for n in (1, 3)]


X, Y = tensor("x", ["n", 16]), tensor("y", ["n", 4])
BODY = [node("MatMul", "x w0", "h"), node("Relu", "h", "r"), node("MatMul", "r w1", "y")]


def sequences() -> Kind:
    """Made, split, changed and joined; the lengths differ."""
    nodes = [
        node("MatMul", "x w0", "h"),
        node("SplitToSequence", "h parts", "s", axis=1),
        node("SequenceAt", "s two", "last"),
        node("SequenceAt", "s zero", "first"),
        node("SequenceInsert", "s first", "s2"),
        node("SequenceLength", "s2", "length"),
        node("ConcatFromSequence", "s2", "joined", axis=1),
        node("MatMul", "joined w", "y"),
        node("MatMul", "last v", "z"),
    ]
    constants = {"w0": W0, "parts": np.int64([8, 20, 4]), "two": np.int64(2), "zero": np.int64(0)}
    constants |= {"w": np.ones((40, 4), np.float32), "v": np.ones((4, 4), np.float32)}
    outputs = [Y, tensor("z", ["n", 4]), tensor("length", [], INT64)]
    return proto_of(nodes, [X], outputs, **constants), feeds_of_x()


def loop_over_a_sequence() -> Kind:
    """A sequence that a Loop carries from turn to turn."""
    inside = [
        node("MatMul", "a lw", "b"),
        node("SequenceInsert", "s_in b", "s_out"),
        node("Identity", "go_in", "go_out"),
    ]
    body = helper.make_graph(
        inside,
        "body",
        [tensor("i", [], INT64), tensor("go_in", [], TensorProto.BOOL), tensor("a", None), sequence("s_in")],
        [tensor("go_out", [], TensorProto.BOOL), tensor("b", None), sequence("s_out")],
    )
    nodes = [
        node("SequenceEmpty", "", "s0"),
        node("Loop", "turns go x s0", "a_end s", body=body),
        node("ConcatFromSequence", "s", "joined", axis=1),
        node("MatMul", "joined w", "y"),
    ]
    del nodes[0].input[:]
    weights = {"lw": np.eye(16, dtype=np.float32) / 2, "w": np.ones((48, 4), np.float32)}
    return proto_of(nodes, [X], [Y], turns=np.int64(3), go=np.asarray(True), **weights), feeds_of_x()


def map_over_a_sequence() -> Kind:
    """A function of ONNX with a body, whose input comes without a shape."""
    body = helper.make_graph([node("MatMul", "a lw", "b")], "body", [tensor("a", None)], [tensor("b", None)])
    nodes = [
        node("SplitToSequence", "x eight", "s", axis=1),
        node("SequenceMap", "s", "mapped", body=body),
        node("ConcatFromSequence", "mapped", "joined", axis=1),
        node("MatMul", "joined w", "y"),
    ]
    weights = {"lw": np.eye(8, dtype=np.float32) / 2, "w": np.ones((16, 4), np.float32)}
    return proto_of(nodes, [X], [Y], eight=np.int64(8), **weights), feeds_of_x()


def outputs_without_a_name() -> Kind:
    """The states of an LSTM are listed, and not given out."""
    recurrent = helper.make_node("LSTM", ["steps", "lw", "lr"], ["l", "", ""], hidden_size=8)
    nodes = [
        node("Unsqueeze", "x zero", "steps"),
        recurrent,
        node("Squeeze", "l axes", "h"),
        node("MatMul", "h w", "y"),
    ]
    weights = {"lw": RNG.standard_normal((1, 32, 16)), "lr": RNG.standard_normal((1, 32, 8)), "w": np.ones((8, 4))}
    floats = {name: array.astype(np.float32) for name, array in weights.items()}
    return proto_of(nodes, [X], [Y], zero=np.int64([0]), axes=np.int64([0, 1]), **floats), feeds_of_x()


def optional_values() -> Kind:
    nodes = [node("Optional", "x", "o"), node("OptionalHasElement", "o", "has"), node("OptionalGetElement", "o", "g")]
    nodes += [node("MatMul", "g w0", "h"), node("MatMul", "h w1", "y")]
    return proto_of(nodes, [X], [Y, tensor("has", [], TensorProto.BOOL)], w0=W0, w1=W1), feeds_of_x()


def sequence_output() -> Kind:
    return proto_of(
        [*BODY, node("SplitToSequence", "h", "s", axis=1)], [X], [sequence("s"), Y], w0=W0, w1=W1
    ), feeds_of_x()


def classifier() -> Kind:
    """What skl2onnx writes: a label, and a map from classes to probabilities."""
    nodes = [*BODY, node("Softmax", "y", "p"), node("ArgMax", "p", "label", axis=1, keepdims=0)]
    nodes.append(node("ZipMap", "p", "probabilities", ML, classlabels_int64s=[0, 1, 2, 3]))
    return proto_of(nodes, [X], [tensor("label", ["n"], INT64), maps("probabilities")], w0=W0, w1=W1), feeds_of_x()


def forest() -> Kind:
    """A tree whose label no inference gives a shape, behind a Cast that does nothing."""
    tree = {
        "nodes_treeids": [0] * 3,
        "nodes_nodeids": [0, 1, 2],
        "nodes_featureids": [3, 0, 0],
        "nodes_values": [0.1, 0.0, 0.0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
        "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 0, 0],
        "class_treeids": [0, 0],
        "class_nodeids": [1, 2],
        "class_ids": [0, 1],
        "class_weights": [1.0, 1.0],
        "classlabels_int64s": [0, 1],
    }
    nodes = [node("TreeEnsembleClassifier", "x", "best p", ML, **tree), node("Cast", "best", "label", to=INT64)]
    nodes.append(node("ZipMap", "p", "probabilities", ML, classlabels_int64s=[0, 1]))
    return proto_of(nodes, [X], [tensor("label", [None], INT64), maps("probabilities")]), feeds_of_x()


def classifier_of_words() -> Kind:
    nodes = [node("MatMul", "x w0", "h"), node("MatMul", "h w1", "p"), node("ArgMax", "p", "best", axis=1, keepdims=0)]
    nodes.append(node("LabelEncoder", "best", "label", ML, keys_int64s=[0, 1, 2, 3], values_strings=list("abcd")))
    nodes.append(node("ZipMap", "p", "probabilities", ML, classlabels_strings=list("abcd")))
    outputs = [tensor("label", ["n"], STRING), maps("probabilities", STRING)]
    return proto_of(nodes, [X], outputs, w0=W0, w1=W1), feeds_of_x()


def words() -> Kind:
    """Strings go in and come out; the vocabulary stands in the graph."""
    encoder = {"keys_strings": [f"w{i}" for i in range(16)], "values_int64s": list(range(16)), "default_int64": 0}
    nodes = [node("LabelEncoder", "s", "i", ML, **encoder), node("Gather", "w0 i", "r"), node("MatMul", "r w1", "y")]
    nodes += [node("ArgMax", "y", "best", axis=1, keepdims=0)]
    nodes += [node("LabelEncoder", "best", "label", ML, keys_int64s=[0, 1, 2, 3], values_strings=list("abcd"))]
    text, outputs = tensor("s", ["n"], STRING), [Y, tensor("label", ["n"], STRING)]
    return proto_of(nodes, [text], outputs, w0=W0, w1=W1), [{"s": np.array(["w3", "w15"])}, {"s": np.array(["none"])}]


def scalars() -> Kind:
    """A speed and a flag without axes, as text-to-speech models take them."""
    nodes = [*BODY[:2], node("Mul", "r speed", "q"), node("Where", "flag q r", "z"), node("MatMul", "z w1", "y")]
    inputs = [X, tensor("speed", []), tensor("flag", [], TensorProto.BOOL)]
    extra = {"speed": np.array(0.5, np.float32), "flag": np.array(True)}
    return proto_of(nodes, inputs, [Y], w0=W0, w1=W1), [feed | extra for feed in feeds_of_x()]


def contrib_in_the_default_domain() -> Kind:
    """As onnxruntime's optimizer writes them."""
    nodes = [
        node("SimplifiedLayerNormalization", "x g", "n", axis=-1, epsilon=1e-6),
        node("MatMul", "n w0", "h"),
        node("FastGelu", "h", "r", MICROSOFT),
        node("MatMul", "r back", "b"),
        node("SkipSimplifiedLayerNormalization", "x b g", "s", MICROSOFT, epsilon=1e-6),
        node("MatMul", "s w", "y"),
    ]
    weights = {"g": np.linspace(0.5, 2, 16, dtype=np.float32), "back": W0.T.copy(), "w": W0[:, :4].copy()}
    return proto_of(nodes, [X], [Y], w0=W0, **weights), feeds_of_x()


def default_of_an_input() -> Kind:
    """An initializer that is an input too; a caller may leave it out, or give another, of another shape."""
    nodes = [*BODY[:2], node("Mul", "r gain", "q"), node("MatMul", "q w1", "y")]
    proto = proto_of(nodes, [X, tensor("gain", ["k", 1])], [Y], gain=np.ones((1, 1), np.float32), w0=W0, w1=W1)
    first, second = feeds_of_x()
    return proto, [first, second | {"gain": np.float32([[-2], [3], [0.5]])}]


def sparse_constants() -> Kind:
    """An initializer with flat indices, and a Constant with one index an axis."""
    thin0, thin1 = (np.where(np.abs(weight) > 0.3, weight, np.float32(0)) for weight in (W0, W1))
    flat, axes = np.flatnonzero(thin0), np.argwhere(thin1)
    places = (numpy_helper.from_array(flat), numpy_helper.from_array(axes))
    values = (numpy_helper.from_array(thin0.ravel()[flat], "w0"), numpy_helper.from_array(thin1[tuple(axes.T)], "w1"))
    sparse = [helper.make_sparse_tensor(v, i, list(w.shape)) for v, i, w in zip(values, places, (W0, W1), strict=True)]
    constant = helper.make_node("Constant", [], ["w1"], sparse_value=sparse[1])
    proto = proto_of([constant, *BODY], [X], [Y])
    proto.graph.sparse_initializer.append(sparse[0])
    return proto, feeds_of_x()


def outputs_that_are_given() -> Kind:
    """An input and a weight among the outputs."""
    return proto_of(BODY, [X], [Y, X, tensor("w1", [32, 4])], w0=W0, w1=W1), feeds_of_x()


KINDS: list[Callable[[], Kind]] = [
    sequences,
    loop_over_a_sequence,
    map_over_a_sequence,
    outputs_without_a_name,
    optional_values,
    sequence_output,
    classifier,
    forest,
    classifier_of_words,
    words,
    scalars,
    contrib_in_the_default_domain,
    default_of_an_input,
    sparse_constants,
    outputs_that_are_given,
]


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def described(values: Sequence[Any]) -> list[tuple[str, str, list[int | None]]]:
    """Names, types, and which dimensions are fixed."""
    return [(item.name, item.type, [d if isinstance(d, int) else None for d in item.shape]) for item in values]


def assert_same(expected: Any, got: Any) -> None:
    """rtol 1e-5, atol 1e-6 on numbers; everything else equal, sequences and maps included."""
    if isinstance(expected, dict):
        assert list(expected) == list(got)
        np.testing.assert_allclose(list(expected.values()), list(got.values()), rtol=1e-5, atol=1e-6)
    elif isinstance(expected, list):
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            assert_same(one, other)
    elif expected.dtype.kind == "f":
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_accepted_comes_back_the_same(tmp_path: Path, kind: Callable[[], Kind]) -> None:
    """Without data: names, types, dynamic dimensions and numbers, on fresh inputs at several sizes."""
    proto, feeds = kind()
    onnx.save(proto, tmp_path / "m.onnx")
    result = compress(load(tmp_path / "m.onnx"), LOSSLESS)
    result.model.save(tmp_path / "result.onnx")
    before, after = session(tmp_path / "m.onnx"), session(tmp_path / "result.onnx")
    for what in ("get_inputs", "get_outputs", "get_overridable_initializers"):
        assert described(getattr(before, what)()) == described(getattr(after, what)())
    for feed in feeds:
        assert_same(before.run(None, feed), after.run(None, feed))
    typed = onnx.load(tmp_path / "result.onnx").graph.output
    assert all(value.type.WhichOneof("value") for value in typed)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_accepted_is_compressed(tmp_path: Path, kind: Callable[[], Kind]) -> None:
    """Pruned and in 8 bits: names, types and dynamic dimensions stay, it runs, and the report's sizes are those of the
    two files. What cannot be made smaller is no larger but for the types of maps and labels; of sparse
    constants there is no such form."""
    proto, feeds = kind()
    onnx.save(proto, tmp_path / "m.onnx")
    result = compress(load(tmp_path / "m.onnx"), LOSSY)
    result.write(tmp_path / "result")
    path = tmp_path / "result" / "model.onnx"
    before, after = session(tmp_path / "m.onnx"), session(path)
    for what in ("get_inputs", "get_outputs", "get_overridable_initializers"):
        assert described(getattr(before, what)()) == described(getattr(after, what)())
    for feed in feeds:
        after.run(None, feed)
    given, back = (tmp_path / "m.onnx").stat().st_size, path.stat().st_size
    report = result.report
    assert (report["original"]["onnx_size_bytes"], report["optimized"]["size_bytes"]) == (given, back)
    assert report["size_ratio"] == pytest.approx(given / back)
    assert back <= given + (8 if kind is forest else 2) or kind is sparse_constants


def test_of_two_larger_files_the_smaller_is_given(tmp_path: Path) -> None:
    """Sparse constants are written out in whatever is given back: in 8 bits they take less than in float32."""
    proto, _ = sparse_constants()
    onnx.save(proto, tmp_path / "m.onnx")
    in_8_bits = Recipe.from_dict(
        {"version": 1, "steps": [{"quantize": {"scheme": "weight_only"}}], "benchmark": {"rounds": 5}}
    )
    report = compress(load(tmp_path / "m.onnx"), in_8_bits).report
    assert not [warning for warning in report["warnings"] if "returned as it was" in warning]
    assert report["optimized"]["size_bytes"] < 4 * W0.size


def test_inspection_lists_defaults(tmp_path: Path) -> None:
    """An input that callers may leave out is found by name; the rest are weights."""
    onnx.save(default_of_an_input()[0], tmp_path / "m.onnx")
    findings = {item.code: item.detail for item in inspect_model(load(tmp_path / "m.onnx")).findings}
    assert "gain" in findings["DEFAULT_INPUTS"]
    assert "w0" not in findings["DEFAULT_INPUTS"]


def test_listed_weights_are_no_defaults(tmp_path: Path) -> None:
    """Where every constant is listed, or where the file is so old that it had to list them, weights are weights."""
    listed = [X, tensor("w0", [16, 32]), tensor("w1", [32, 4])]
    for ir_version, warned in ((8, 1), (3, 0)):
        opset = 18 if ir_version == 8 else 9
        onnx.save(proto_of(BODY, listed, [Y], opset, ir_version, w0=W0, w1=W1), tmp_path / "m.onnx")
        model = load(tmp_path / "m.onnx")
        assert [value.name for value in model.graph.inputs] == ["x"]
        assert len(model.warnings) == warned


@pytest.mark.parametrize("opset", [1, 5, 6])
def test_operator_sets_before_7(tmp_path: Path, opset: int) -> None:
    """`broadcast` and `axis`, `consumed_inputs`, words as types, shapes as attributes: the numbers of NumPy."""
    bias, scale = np.float32([1, 2, 3]), np.float32([[2.0], [0.5], [1.0]])
    consumed = {"consumed_inputs": [0, 0]} if opset < 6 else {}
    nodes = [
        node("Add", "x bias", "a", broadcast=1, axis=1, **consumed),
        node("Mul", "a scale", "m", broadcast=1, axis=1, **consumed),
        node("Relu", "m", "r", **({"consumed_inputs": [0]} if opset < 6 else {})),
        node("Dropout", "r", "d", is_test=1, **({"consumed_inputs": [0]} if opset < 6 else {})),
    ]
    arrays: dict[str, Any] = {"bias": bias, "scale": scale}
    if opset < 5:
        nodes.append(node("Reshape", "d", "f", shape=[0, -1], **({"consumed_inputs": [0]})))
    else:
        nodes.append(node("Reshape", "d shape", "f"))
        arrays["shape"] = np.int64([0, -1])
    nodes.append(node("Cast", "f", "y", to="DOUBLE" if opset < 6 else TensorProto.DOUBLE))
    proto = proto_of(
        nodes, [tensor("x", ["n", 3, 4, 5])], [tensor("y", ["n", 60], TensorProto.DOUBLE)], opset, 3, **arrays
    )
    onnx.save(proto, tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    model.save(tmp_path / "result.onnx")
    x = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    expected = np.maximum((x + bias[:, None, None]) * scale[:, :, None], 0).reshape(2, -1)
    (got,) = session(tmp_path / "result.onnx").run(None, {"x": x})
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_what_no_newer_operator_set_can_say(tmp_path: Path) -> None:
    """The node, and why."""
    norm = node("BatchNormalization", "x s b m v", "y", is_test=1, spatial=0)
    arrays = {name: np.ones((4, 5), np.float32) for name in "sbmv"}
    shape = ["n", 4, 5]
    onnx.save(proto_of([norm], [tensor("x", shape)], [tensor("y", shape)], 6, 3, **arrays), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedOperatorError, match="spatial=0"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("dims", "places", "said"),
    [
        ((1 << 40,), [3], "1 GiB"),
        ((16, 32), [512], "outside"),
        ((16, 32), [-1], "outside"),
        ((16, 32), [1, 2], "1 values and 2 places"),
        ((-16, 32), [3], "negative extent"),
    ],
)
def test_sparse_constants_that_lie(tmp_path: Path, dims: tuple[int, ...], places: list[int], said: str) -> None:
    """A few bytes claim a size that no memory holds, or places that are not there."""
    proto = proto_of(BODY, [X], [Y], w1=W1)
    sparse = proto.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(np.float32([1]), "w0"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.int64(places), "places"))
    sparse.dims.extend(dims)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(RejectedModelError, match=said) as caught:
        load(tmp_path / "m.onnx")
    assert caught.value.metadata["finding"] == "SPARSE_TENSOR"
    assert MAX_DENSE_BYTES == 1 << 30


@pytest.mark.parametrize("what", ["sequence", "optional", "map"])
def test_inputs_are_tensors(tmp_path: Path, what: str) -> None:
    """The message says which input is what."""
    value = onnx.ValueInfoProto(name="x")
    if what == "map":
        value.type.CopyFrom(maps("x").type.sequence_type.elem_type)
    else:
        kind = value.type.sequence_type if what == "sequence" else value.type.optional_type
        kind.elem_type.CopyFrom(X.type)
    onnx.save(proto_of([node("Identity", "x", "y")], [value], [Y]), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedFormatError, match=f"'x' is an? {what}"):
        load(tmp_path / "m.onnx")
