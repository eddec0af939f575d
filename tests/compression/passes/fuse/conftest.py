"""Small graphs to fuse, and a run of the pass that holds the result against the original."""

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
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from modelpress_compression.runtime import run, session_of
from onnx import TensorProto, helper, numpy_helper

Build = Callable[..., Model]
RunFuse = Callable[..., PassResult]


def _build(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Any],
    *,
    shape: Sequence[int | str] = ("n", 3, 8, 8),
    output: str | Sequence[str] = "y",
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    extra: Sequence[onnx.ValueInfoProto] = (),
) -> Model:
    """A model with the input x of `shape`; weights by name, float64 ones become float32."""
    initializers = []
    for name, value in weights.items():
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        initializers.append(numpy_helper.from_array(array, name))
    names = [output] if isinstance(output, str) else list(output)
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", dtype, list(shape)), *extra],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        initializers,
    )
    imports = [helper.make_opsetid("", opset)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return Model(onnx_ir.from_proto(proto), Provenance("onnx", "0" * 64, 0))


@pytest.fixture
def build() -> Build:
    """Makes a Model of onnx nodes and weights."""
    return _build


@pytest.fixture
def samples() -> Callable[[Model], InputData]:
    """Three random samples for each input; dynamic dimensions become 1, but for sequence lengths 's'."""

    def make(model: Model) -> InputData:
        generator = np.random.default_rng(7)
        arrays: dict[str, Any] = {}
        for spec in model.inputs:
            sizes = [5 if dim == "s" else dim if isinstance(dim, int) else 1 for dim in spec.shape[1:]]
            drawn = generator.standard_normal((3, *sizes))
            integers = spec.dtype.startswith("int")
            arrays[spec.name] = generator.integers(0, 2, (3, *sizes)) if integers else drawn.astype(spec.dtype)
        return InputData.from_arrays(arrays, model.inputs)

    return make


@pytest.fixture
def fuse(samples: Callable[[Model], InputData], tmp_path: Path) -> RunFuse:
    """Runs the pass; outputs must agree with the original to 1e-4 of their magnitude on all samples."""

    def run_pass(model: Model, config: FuseConfig | None = None) -> PassResult:
        before = [(node.op_type, node.name) for node in model.nodes()]
        data = samples(model)
        result = Fuse(config or FuseConfig())(model, Context(data, tmp_path))
        assert [(node.op_type, node.name) for node in model.nodes()] == before, "the input model was changed"
        with session_of(model) as original, session_of(result.model) as fused:
            for feeds in data.feeds(batch_size=3):
                wanted, got = run(original, feeds), run(fused, feeds)
                assert list(wanted) == list(got)
                for name, array in wanted.items():
                    scale = float(np.abs(array).max(initial=1e-6))
                    np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4 * scale)
        return result

    return run_pass


@pytest.fixture
def ops() -> Callable[[PassResult], list[str]]:
    """The operators of a result in order, with the domain where it is not ONNX."""

    def list_ops(result: PassResult) -> list[str]:
        return [f"{node.domain}.{node.op_type}".lstrip(".") for node in result.model.nodes()]

    return list_ops


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
