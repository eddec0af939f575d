"""Models of a few nodes, and the means to run them, for every part of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
from modelpress_compression.model import Model, Provenance
from modelpress_compression.runtime import run, session_of
from onnx import TensorProto, helper, numpy_helper


def _channel_model(
    nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Any], shape: Sequence[Any], outputs: Sequence[Any]
) -> Model:
    """A model x -> y of these nodes and weights."""
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    initializers = [
        numpy_helper.from_array(array if array.dtype.kind == "i" else array.astype(np.float32), name)
        for name, array in arrays.items()
    ]
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)],
        initializers,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Model(onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto)), Provenance("onnx", "0" * 64, 0))


@pytest.fixture(scope="session")
def channel_model() -> Callable[..., Model]:
    """Makes a model x -> y of nodes and weights."""
    return _channel_model


@pytest.fixture(scope="session")
def outputs_of() -> Callable[[Model, Any], Any]:
    """The first output of a model of one input."""

    def outputs(model: Model, x: Any) -> Any:
        with session_of(model) as session:
            return next(iter(run(session, {session.get_inputs()[0].name: x}).values()))

    return outputs


@pytest.fixture
def loaded_operators(tmp_path: Path) -> Callable[[Model], list[str]]:
    """The operators of the main graph that are left once onnxruntime has loaded a model: those that it really runs."""

    def operators(model: Model) -> list[str]:
        source, target = tmp_path / "source.onnx", tmp_path / "loaded.onnx"
        model.save(source)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(target).graph.node]

    return operators
