"""A model to write weights into, and what onnxruntime makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.graph.read import MICROSOFT
from modelpress_compression.model import Model, Provenance
from modelpress_compression.runtime import run, session_of
from onnx import TensorProto, helper, numpy_helper

Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="session")
def model_of() -> Callable[..., Model]:
    """`model_of(nodes, {"w": array}, {"x": shape})`: one output y, of float32 as the inputs are; opset 21."""

    def make(
        nodes: Sequence[object], weights: Arrays, inputs: Mapping[str, Sequence[int | str]], integers: bool = False
    ) -> Model:
        kind = TensorProto.INT64 if integers else TensorProto.FLOAT
        graph = helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return Model(onnx_ir.from_proto(proto), Provenance("onnx", "0" * 64, 0))

    return make


@pytest.fixture(scope="session")
def answer_of() -> Callable[..., np.ndarray]:
    """What a model makes of x, each node as it is written: onnxruntime's own rewriting would quantize activations."""

    def answer(model: Model, x: np.ndarray) -> np.ndarray:
        with session_of(model, optimize=False) as session:
            return np.asarray(run(session, {"x": x})["y"])

    return answer
