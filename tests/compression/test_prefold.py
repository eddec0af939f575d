"""Weights in fewer bits of large models, written out before onnxruntime opens them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from modelpress_compression import load, mapped, prefold
from modelpress_compression import model as model_module
from modelpress_compression.model import Model, Provenance, read_ir
from modelpress_compression.pipeline.preflight import held_bytes
from modelpress_compression.runtime import _evaluated, open_session, run, session_of
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
WIDTH = 320


def _rows(count: int) -> dict[str, np.ndarray]:
    return {"x": RNG.normal(size=(count, WIDTH)).astype(np.float32)}


def _model(count: int = 2, width: int = WIDTH) -> Model:
    """x @ (Cast(q) * scale) + b, so many times; a half-precision weight with two readers, and a default to override."""
    nodes, weights, x = [], [], "x"
    for number in range(count):
        levels = RNG.integers(-127, 128, (width, width)).astype(np.int8)
        scale = (RNG.uniform(0.5, 1, (1, width)) / 73 / np.sqrt(width)).astype(np.float32)
        weights += [numpy_helper.from_array(levels, f"q{number}"), numpy_helper.from_array(scale, f"scale{number}")]
        nodes += [
            helper.make_node("Cast", [f"q{number}"], [f"real{number}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"real{number}", f"scale{number}"], [f"w{number}"]),
            helper.make_node("MatMul", [x, f"w{number}"], [f"y{number}"]),
        ]
        x = f"y{number}"
    for name in ("half", "default"):
        array = RNG.normal(size=(width, width)).astype(np.float16) / np.float16(np.sqrt(width))
        weights.append(numpy_helper.from_array(array, name))
        nodes.append(helper.make_node("Cast", [name], [f"{name}_real"], to=TensorProto.FLOAT))
    nodes += [
        helper.make_node("MatMul", [x, "half_real"], ["first"]),
        helper.make_node("MatMul", ["first", "half_real"], ["second"]),
        helper.make_node("MatMul", ["second", "default_real"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "stored",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width]),
            helper.make_tensor_value_info("default", TensorProto.FLOAT16, [width, width]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return Model(onnx_ir.from_proto(proto), Provenance("onnx", "", 0))


def test_chains_become_weights_in_a_file(tmp_path: Path) -> None:
    model = _model()
    light = prefold.prefolded(model.ir, tmp_path / "weights", _evaluated)
    assert light is not None
    assert Counter(node.op_type for node in light.graph) == {"MatMul": 5, "Cast": 1}  # what can be overridden stays
    assert set(light.graph.initializers) == {"w0", "w1", "half_real", "default"}
    levels, scale = (model.graph.initializers[name].const_value.numpy() for name in ("q0", "scale0"))  # type: ignore[union-attr]
    found = light.graph.initializers["w0"].const_value
    assert isinstance(found, onnx_ir.ExternalTensor)
    np.testing.assert_array_equal(found.numpy(), levels.astype(np.float32) * scale)
    assert "q0" in model.graph.initializers  # the model itself is as it was


def test_nothing_is_written_where_there_are_no_chains(tmp_path: Path) -> None:
    model = _model()
    light = prefold.prefolded(model.ir, tmp_path / "weights", _evaluated)
    assert light is not None
    assert prefold.prefolded(light, tmp_path / "again", _evaluated) is None
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("threshold_bytes", [10**9, 1000], ids=["one file", "data file"])
def test_sessions_answer_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold_bytes: int) -> None:
    model = _model()
    feed = _rows(3)
    with session_of(model) as session:
        expected = run(session, feed)["out"]
    other = {"default": np.zeros((WIDTH, WIDTH), np.float16)}
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    monkeypatch.setattr(model_module, "EXTERNAL_DATA_THRESHOLD_BYTES", threshold_bytes)
    model.save(tmp_path / "model.onnx")
    with session_of(model) as in_memory, session_of(load(tmp_path / "model.onnx")) as loaded:
        for session in (in_memory, loaded, open_session(tmp_path / "model.onnx")):
            np.testing.assert_allclose(run(session, feed)["out"], expected, rtol=1e-5, atol=1e-5)
            assert not run(session, feed | other)["out"].any()


def test_plain_sessions_run_the_graph_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)

    def refuse(*arguments: object) -> None:
        raise AssertionError("folded")

    monkeypatch.setattr(prefold, "prefolded", refuse)
    model = _model()
    model.save(tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", optimize=False)
    with session_of(model, optimize=False) as other:
        assert np.array_equal(run(session, feed := _rows(1))["out"], run(other, feed)["out"])


def test_a_session_holds_its_own_copy_of_the_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    count, width = 20, 1024
    _model(count, width).save(tmp_path / "model.onnx")
    assert any(node.op_type == "Cast" for node in read_ir(tmp_path / "model.onnx").graph)
    before, peak, done = held_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, held_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    session = open_session(tmp_path / "model.onnx")
    done.set()
    watcher.join()
    assert session.get_inputs()
    weights = (count + 2) * width * width * 4
    assert peak - before < 1.6 * weights  # onnxruntime's folding takes over 2
