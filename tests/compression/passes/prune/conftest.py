"""Small graphs to prune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune
from onnx import TensorProto, helper, numpy_helper


def _network(nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Any], *, domain: str | None = None) -> Model:
    """A model of these nodes; shapes of inputs and outputs do not matter to the pass."""
    initializers = []
    for name, value in weights.items():
        array = np.asarray(value)
        initializers.append(
            numpy_helper.from_array(array.astype(np.float32) if array.dtype == np.float64 else array, name)
        )
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    imports = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return Model(onnx_ir.from_proto(helper.make_model(graph, opset_imports=imports)), Provenance("onnx", "0" * 64, 0))


@pytest.fixture
def network() -> Callable[..., Model]:
    """Makes a Model of onnx nodes and weights."""
    return _network


def _prune(model: Model, config: PruneConfig) -> PassResult:
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    result = Prune(config)(model, Context(InputData((), {}), Path("unused")))
    for name, array in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)
    return result


@pytest.fixture(scope="session")
def prune() -> Callable[[Model, PruneConfig], PassResult]:
    """Runs the pass and checks that the input model stayed as it was."""
    return _prune


@pytest.fixture(scope="session")
def weight_of() -> Callable[..., Any]:
    """The numbers of an initializer of a result."""

    def get(result: PassResult, name: str) -> Any:
        return result.model.graph.initializers[name].const_value.numpy()

    return get
