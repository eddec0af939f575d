"""Models of one node, and models from ONNX's text form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from modelpress_compression.model import Model, Provenance
from onnx import helper, numpy_helper

NodeModel = Callable[..., Model]


def _of(proto: onnx.ModelProto) -> Model:
    return Model(onnx_ir.from_proto(proto), Provenance("onnx", "", 0))


def node_model(
    op_type: str,
    inputs: Mapping[str, np.ndarray],
    *,
    constants: Mapping[str, np.ndarray] | None = None,
    order: Sequence[str] | None = None,
    outputs: int = 1,
    opset: int = 21,
    domain: str = "",
    **attributes: Any,
) -> Model:
    """One node on inputs of these types and shapes and on constants; `order` of the operands, "" for left out.
    The outputs' types are left to be inferred."""
    constants = constants or {}
    names = list(order if order is not None else (*inputs, *constants))
    node = helper.make_node(op_type, names, [f"y{i}" for i in range(outputs)], name="node", domain=domain, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in inputs.items()
    ]
    graph = helper.make_graph(
        [node],
        "g",
        infos,
        [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return _of(helper.make_model(graph, opset_imports=imports, ir_version=10))


@pytest.fixture
def model_from_text() -> Callable[..., Model]:
    """Builds a model from ONNX's text form; `weights` become initializers of the main graph."""

    def build(text: str, weights: Mapping[str, np.ndarray] | None = None) -> Model:
        proto = onnx.parser.parse_model(text)
        for name, array in (weights or {}).items():
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
        return _of(proto)

    return build


@pytest.fixture
def make_node_model() -> NodeModel:
    """`node_model` for tests that cannot import it."""
    return node_model
