"""Models whose weights stay on the disk: the same numbers, files and answers as with weights in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest
import yaml
from modelpress_compression import Recipe, compress, load, mapped
from modelpress_compression import model as model_module
from modelpress_compression.errors import CompressionError
from modelpress_compression.graph.edit import Editor
from modelpress_compression.model import Model, Provenance, file_size_bytes, read_ir
from modelpress_compression.pipeline.preflight import held_bytes
from modelpress_compression.runtime import _malloc_trim, open_session, run, session_of
from onnx import TensorProto, helper

RNG = np.random.default_rng(0)
WIDTH = 160  # a square of it has 100 KB: more than mapped.MAPPED_BYTES


@pytest.fixture(params=["one file", "data file"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every model counts as large, and its weights lie in the file or beside it."""
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    if request.param == "data file":
        monkeypatch.setattr(model_module, "EXTERNAL_DATA_THRESHOLD_BYTES", 1000)
    return str(request.param)


def layers(path: Path, count: int = 3, width: int = WIDTH) -> Path:
    """x @ w0 + b0, ReLU, and so on; written by onnx."""
    nodes, weights, x = [], [], "x"
    for number in range(count):
        weight = (RNG.normal(size=(width, width)) / np.sqrt(width)).astype(np.float32)
        weights += [
            onnx.numpy_helper.from_array(weight, f"w{number}"),
            onnx.numpy_helper.from_array(RNG.normal(size=width).astype(np.float32), f"b{number}"),
        ]
        nodes += [
            helper.make_node("MatMul", [x, f"w{number}"], [f"p{number}"], name=f"product{number}"),
            helper.make_node("Add", [f"p{number}", f"b{number}"], [f"s{number}"]),
            helper.make_node("Relu", [f"s{number}"], [f"r{number}"]),
        ]
        x = f"r{number}"
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def of_all_types() -> Model:
    """Each element type that a weight has, in memory; the output depends on the first."""
    kinds = (
        np.float32, np.float16, np.float64, np.int8, np.uint8, np.int64, np.bool_, ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.uint4,
    )  # fmt: skip
    arrays = {f"w_{np.dtype(kind).name}": RNG.integers(0, 2, size=(5, 601)).astype(kind) for kind in kinds}
    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape([1, 5]))
    values = []
    for name, array in arrays.items():
        tensor = onnx_ir.tensor(array, name=name)
        values.append(onnx_ir.Value(name=name, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape))
        values[-1].const_value = tensor
    words = onnx_ir.Value(name="words", const_value=onnx_ir.tensor(["a" * 3000, "b"], name="words"))
    node = onnx_ir.node("MatMul", [x, values[0]], name="product")
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", x.type, onnx_ir.Shape([1, 601])
    graph = onnx_ir.Graph(
        [x], node.outputs, nodes=[node], initializers=[*values, words], opset_imports={"": 21}, name="types"
    )
    return Model(onnx_ir.Model(graph, ir_version=10), Provenance("onnx", "0" * 64, 1))


def numbers(model: Model) -> dict[str, np.ndarray]:
    """All initializers by name."""
    return {
        name: np.array(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def test_every_type_is_written_as_onnx_reads_it(form: str, tmp_path: Path) -> None:
    """Float, packed and string weights, in both forms of a file; the size is that of the files."""
    model = of_all_types()
    files = model.save(tmp_path / "m.onnx")
    assert len(files) == (1 if form == "one file" else 2)
    assert file_size_bytes(files[0]) == sum(file.stat().st_size for file in files)
    proto = onnx.load(files[0])
    onnx.checker.check_model(proto)
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for name, array in numbers(model).items():
        np.testing.assert_array_equal(found[name].astype(array.dtype), array)


def test_a_saved_model_reads_its_weights_from_there(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is free of them; they outlive the file once they are mapped, and can be saved again."""
    monkeypatch.setattr(mapped, "MAPPED_BYTES", 1024)
    model = of_all_types()
    saved = model.saved(tmp_path / "m.onnx")
    in_files = [isinstance(tensor, onnx_ir.ExternalTensor) for tensor in saved.tensors()]
    assert sum(in_files) == len(in_files) - 1  # all but the strings
    assert not any(isinstance(tensor, onnx_ir.ExternalTensor) for tensor in model.tensors())
    mapped.keep_mapped(saved.ir)
    for file in tmp_path.iterdir():
        file.unlink()
    for name, array in numbers(model).items():
        np.testing.assert_array_equal(numbers(saved)[name], array)
    first = model.save(tmp_path / "first.onnx")[0].read_bytes()
    assert saved.save(tmp_path / "again.onnx")[0].read_bytes() == first.replace(b"first.onnx", b"again.onnx")


def test_weights_come_into_memory_from_wherever_they_are(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Initializers and attributes of nodes alike: the file may go."""
    monkeypatch.setattr(mapped, "MAPPED_BYTES", 1024)
    value = np.arange(WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH)
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(value)),
        onnx.helper.make_node("Add", ["c", "w"], ["y"]),
    ]
    weights = [onnx.numpy_helper.from_array(value, "w")]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [WIDTH, WIDTH])
    graph = onnx.helper.make_graph(nodes, "g", [], [output], weights)
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    ir = onnx_ir.from_proto(mapped.read(path))
    mapped.resolve_own_file(ir, path)
    mapped.load_all(ir)
    path.unlink()
    constant = ir.graph.node(0).attributes["value"].as_tensor()
    for tensor in (constant, ir.graph.initializers["w"].const_value):
        assert isinstance(tensor, onnx_ir.Tensor)
        np.testing.assert_array_equal(tensor.numpy(), value)


def test_a_saved_graph_is_read_again_without_its_weights(form: str, tmp_path: Path) -> None:
    """They stay in the file, and have the same numbers."""
    model = load(layers(tmp_path / "m.onnx"))
    path = tmp_path / "saved.onnx"
    model.save(path)
    read = replace(model, ir=read_ir(path))
    weights = [read.graph.initializers[f"w{number}"].const_value for number in range(3)]
    assert all(isinstance(weight, onnx_ir.ExternalTensor) for weight in weights)
    for name, array in numbers(model).items():
        np.testing.assert_array_equal(numbers(read)[name], array)


def test_one_weight_of_two_names_lies_once_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """External data can be shared, as a protobuf's own cannot."""
    monkeypatch.setattr(model_module, "EXTERNAL_DATA_THRESHOLD_BYTES", 1000)
    model = load(layers(tmp_path / "m.onnx"))
    first = model.graph.initializers["w0"].const_value
    for name in ("w1", "w2"):
        model.graph.initializers[name].const_value = first
    _, data = model.save(tmp_path / "shared.onnx")
    assert data.stat().st_size < 1.1 * 4 * WIDTH**2
    found = numbers(load(tmp_path / "shared.onnx"))
    np.testing.assert_array_equal(found["w2"], found["w0"])


def test_sessions_read_weights_where_they_are(form: str, tmp_path: Path) -> None:
    """In the uploaded file, in a file of ours in another folder, and in memory, all in one model."""
    path = layers(tmp_path / "m.onnx")
    x = RNG.normal(size=(2, WIDTH)).astype(np.float32)
    expected = run(open_session(path), {"x": x})["r2"]
    (tmp_path / "work").mkdir()
    model = load(path)
    assert isinstance(model.graph.initializers["w0"].const_value, onnx_ir.ExternalTensor)
    elsewhere = model.saved(tmp_path / "work" / "m.onnx").graph.initializers["w1"].const_value
    mixed = model.clone()
    mixed.graph.initializers["w1"].const_value = elsewhere
    mixed.graph.initializers["w2"].const_value = onnx_ir.tensor(numbers(model)["w2"], name="w2")
    light = mapped.for_session(mixed.ir, 10**9, finish=mixed.write_map_types)
    assert light is not None
    assert len(light.proto) < 4 * WIDTH**2
    assert (light.folder, set(light.arrays)) == (tmp_path, {"w2"})
    assert mapped.for_session(mixed.ir, -1, finish=mixed.write_map_types) is None
    for optimize in (True, False):
        with session_of(mixed, optimize=optimize) as session:
            np.testing.assert_allclose(run(session, {"x": x})["r2"], expected, rtol=1e-5, atol=1e-5)


def test_weights_in_branches_are_found_too(form: str, tmp_path: Path) -> None:
    """A branch's initializers and Constants of a file, in memory and on the disk."""
    branch = "{ c = Constant <value = float[2] {1.0, 2.0}> ()  out = Add(c, c) }"
    branches = ", ".join(f"{name}_branch = {name} () => (float[2] out) {branch}" for name in ("then", "else"))
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (bool k) => (float[2] y) {{ y = If (k) <{branches}> }}'
    proto = onnx.parser.parse_model(text)
    weight = RNG.normal(size=(300, 300)).astype(np.float32)
    for attribute in proto.graph.node[0].attribute:
        attribute.g.node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(weight))
        attribute.g.output[0].type.tensor_type.shape.dim[0].dim_value = 300
        attribute.g.output[0].type.tensor_type.shape.dim.add(dim_value=300)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [300, 300]))
    onnx.save(proto, tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    saved = model.saved(tmp_path / "saved.onnx")
    for one in (model, saved):
        with session_of(one) as session:
            np.testing.assert_array_equal(run(session, {"k": np.asarray(True)})["y"], 2 * weight)
    np.testing.assert_array_equal(run(open_session(tmp_path / "saved.onnx"), {"k": np.asarray(True)})["y"], 2 * weight)


def test_weights_in_functions_are_found_too(form: str, tmp_path: Path) -> None:
    """Newer exporters write modules as functions; they are inlined when a file is loaded."""
    weight = RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    body = [
        helper.make_node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(weight)),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Layer", ["a"], ["b"], body, opsets[:1])
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Layer", ["x"], ["y"], domain="own")], "g", sides[:1], sides[1:])
    proto = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.save(proto, tmp_path / "m.onnx")
    x = RNG.normal(size=(2, WIDTH)).astype(np.float32)
    saved = load(tmp_path / "m.onnx").saved(tmp_path / "saved.onnx")
    with session_of(saved) as session:
        np.testing.assert_allclose(run(session, {"x": x})["y"], x @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", ["fuse: {}", "quantize: {scheme: weight_only, weights: int4}"])
def test_a_large_model_comes_back_as_a_small_one_does(
    form: str, steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same changes and the same outputs, with sessions one at a time; the result can be written when all that it
    was read from is gone, and the report's size and digest are those of the file."""
    monkeypatch.setattr("modelpress_compression.runtime.SPARE_BYTES", 0)
    path = layers(tmp_path / "m.onnx", width=288)
    work = tmp_path / "work"
    work.mkdir()
    recipe = Recipe.from_dict({"version": 1, "steps": [yaml.safe_load(steps)], "benchmark": {"rounds": 6}})
    result = compress(load(path), recipe, work_directory=work)
    assert list(work.iterdir()) == []
    monkeypatch.setattr(mapped, "LARGE_BYTES", 10**12)
    usual = compress(load(path), recipe)
    assert result.report["steps"][0]["changes"] == usual.report["steps"][0]["changes"]
    assert result.report["fidelity"] == usual.report["fidelity"]
    result.write(tmp_path / "result")
    written = tmp_path / "result" / "model.onnx"
    assert file_size_bytes(written) == result.report["optimized"]["size_bytes"]


def test_a_damaged_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short anywhere, as a small one is."""
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    whole = layers(tmp_path / "m.onnx").read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, len(whole) - 4 * WIDTH**2, 100):
        path = tmp_path / f"cut{length}.onnx"
        path.write_bytes(whole[:length])
        with pytest.raises(CompressionError):
            load(path)


def test_links_to_a_large_file_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of models hold links; the file is the caller's own choice, unlike the paths within it."""
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    (tmp_path / "blobs").mkdir()
    target = layers(tmp_path / "blobs" / "0123")
    (tmp_path / "soft.onnx").symlink_to(target)
    os.link(target, tmp_path / "hard.onnx")
    for name in ("soft.onnx", "hard.onnx"):
        assert set(numbers(load(tmp_path / name))) >= {"w0", "w1", "w2"}


MEASURED = """
import json, sys, threading, time
from pathlib import Path
from modelpress_compression import load
from modelpress_compression.pipeline.preflight import held_bytes
from modelpress_compression.runtime import open_session

before, peak, ended = held_bytes(), 0, threading.Event()

def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, held_bytes() - before)

thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1])
model = model.saved(Path(sys.argv[2]))
stored = peak
session = open_session(Path(sys.argv[2]))
ended.set()
thread.join()
print(json.dumps([stored, peak]))
"""


def test_memory_holds_no_copy_of_a_large_file(tmp_path: Path) -> None:
    """Read, checked by onnxruntime and written again: less than a quarter of its size. A session holds it once."""
    path = layers(tmp_path / "m.onnx", count=6, width=2048)
    size = path.stat().st_size
    assert size > 1.4 * mapped.LARGE_BYTES
    said = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "saved.onnx")], capture_output=True, check=True
    )
    stored, peak = json.loads(said.stdout.splitlines()[-1])
    assert stored < size / 4 + 20e6  # what is imported on the way counts as well
    assert peak < 1.25 * size + 20e6


@pytest.mark.skipif(_malloc_trim() is None, reason="the C library keeps what was freed")
def test_what_was_freed_goes_back_before_a_session_on_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks with others between them stay with the C library otherwise."""
    path = layers(tmp_path / "m.onnx")
    blocks = [bytes([number % 256]) * 20_000 for number in range(5000)]
    del blocks[::2]
    before = held_bytes()
    open_session(path)
    assert held_bytes() > before - 10e6
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    open_session(path)
    assert held_bytes() < before - 25e6
    assert blocks[0][0] == 1


def test_made_weights_lie_in_a_file(tmp_path: Path) -> None:
    """Each as it was put, one behind the other; a small tensor stays where it is, and a small model has no file."""
    assert mapped.WeightFile.for_large(mapped.LARGE_BYTES - 1, tmp_path) is None
    weights = mapped.WeightFile.for_large(mapped.LARGE_BYTES, tmp_path)
    assert weights is not None
    arrays = [RNG.normal(size=(size, 200)).astype(dtype) for size, dtype in ((200, np.float32), (301, np.float64))]
    put = [weights.put(onnx_ir.Tensor(array, name=f"w{number}")) for number, array in enumerate(arrays)]
    for tensor, array in zip(put, arrays, strict=True):
        assert isinstance(tensor, onnx_ir.ExternalTensor)
        assert tensor.offset is not None
        assert tensor.offset % mapped.ALIGNMENT_BYTES == 0
        np.testing.assert_array_equal(tensor.numpy(), array)
    small = onnx_ir.Tensor(np.zeros(3, np.float32))
    assert weights.put(small) is small
    weights.remove()
    assert not list(tmp_path.iterdir())


def test_an_editor_s_large_constants_lie_in_its_file(tmp_path: Path) -> None:
    """New ones, and those that get other numbers; the model runs on them, and without a file they are in memory."""
    square = (WIDTH, WIDTH)
    for weights in (mapped.WeightFile(tmp_path), None):
        model = load(layers(tmp_path / "model.onnx", 1)).clone()
        editor = Editor(model, weights)
        value = next(value for value in model.graph.initializers.values() if value.shape == square)
        editor.replace_numbers(value, np.eye(WIDTH))
        new = editor.constant(model.graph, np.ones(square, np.float32), "new")
        kinds = {isinstance(one.const_value, onnx_ir.ExternalTensor) for one in (value, new)}
        assert kinds == {weights is not None}
        with session_of(model) as session:
            assert run(session, {"x": np.zeros((1, WIDTH), np.float32)})
