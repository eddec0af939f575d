"""Models of a few nodes, and the means to run them, for every part of the engine."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from modelpress_compression import EvaluationData, InputData, load
from modelpress_compression.measure import latency
from modelpress_compression.measure.latency import Timings
from modelpress_compression.model import Model, Provenance, file_size_bytes
from modelpress_compression.runtime import run, session_of
from modelpress_compression.search import judge, mixed_schemes
from onnx import TensorProto, helper, numpy_helper

EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist"


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
def residual(channel_model: Callable[..., Model]) -> Model:
    """Three blocks: the first says little, the second much, and the third has a projection beside its branch."""
    rng, width = np.random.default_rng(0), 16

    def layer(scale: float = 1.0) -> Any:
        return scale * rng.standard_normal((width, width)) / np.sqrt(width)

    weights: dict[str, Any] = {"w0": layer()}
    nodes = [
        helper.make_node("Gemm", ["x", "w0"], ["h0"], name="stem", transB=1),
        helper.make_node("Relu", ["h0"], ["r0"], name="relu0"),
    ]
    for number, scale in ((1, 0.1), (2, 1.0), (3, 0.7)):
        data = f"r{number - 1}"
        weights |= {f"a{number}": layer(), f"b{number}": layer(scale)}
        nodes += [
            helper.make_node("Gemm", [data, f"a{number}"], [f"i{number}"], name=f"in{number}", transB=1),
            helper.make_node("Relu", [f"i{number}"], [f"j{number}"], name=f"inner{number}"),
            helper.make_node("Gemm", [f"j{number}", f"b{number}"], [f"o{number}"], name=f"out{number}", transB=1),
        ]
        if number == 3:
            weights["p3"] = layer()
            nodes.append(helper.make_node("Gemm", [data, "p3"], ["q3"], name="projection", transB=1))
            data = "q3"
        nodes += [
            helper.make_node("Add", [f"o{number}", data], [f"s{number}"], name=f"sum{number}"),
            helper.make_node("Relu", [f"s{number}"], [f"r{number}"], name=f"relu{number}"),
        ]
    weights["w4"] = layer()[:4]
    nodes.append(helper.make_node("Gemm", ["r3", "w4"], ["h4"], name="head", transB=1))
    nodes.append(helper.make_node("Tanh", ["h4"], ["y"], name="last"))
    return channel_model(nodes, weights, ["n", width], ["n", 4])


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


@pytest.fixture
def model_from_text() -> Callable[..., Model]:
    """Builds a model from ONNX's text form; `weights` become initializers of the main graph."""

    def build(text: str, weights: dict[str, np.ndarray] | None = None) -> Model:
        proto = onnx.parser.parse_model(text)
        for name, array in (weights or {}).items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return Model(onnx_ir.from_proto(proto), Provenance("onnx", "", 0))

    return build


@pytest.fixture
def model_from_torch() -> Callable[[torch.nn.Module, tuple[int, ...]], Model]:
    """Exports a module with one float input x whose batch is dynamic."""

    def export(module: torch.nn.Module, shape: tuple[int, ...]) -> Model:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the exporter that needs no tracing of symbols
            torch.onnx.export(
                module.eval(),
                (torch.zeros(shape),),
                buffer,
                dynamo=False,
                input_names=["x"],
                dynamic_axes={"x": {0: "batch"}},
            )
        return Model(onnx_ir.from_proto(onnx.load_from_string(buffer.getvalue())), Provenance("onnx", "", 0))

    return export


@pytest.fixture(scope="session")
def digits() -> Model:
    """The digit classifier, x:float32[batch,1,28,28] -> ten log-probabilities."""
    return load(EXAMPLE / "model.onnx")


@pytest.fixture(scope="session")
def samples(digits: Model) -> InputData:
    """Real digits without labels."""
    with np.load(EXAMPLE / "samples.npz") as arrays:
        return InputData.from_arrays(dict(arrays), digits.inputs)


@pytest.fixture(scope="session")
def labelled(digits: Model) -> EvaluationData:
    """500 real digits with labels."""
    with np.load(EXAMPLE / "eval.npz") as arrays:
        return EvaluationData.from_arrays({name: array[:500] for name, array in arrays.items()}, digits.inputs)


@pytest.fixture
def timed_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take as long as their files are large, so that what is chosen depends on no machine; single layers have no
    times."""

    def timed(models: Sequence[Path], data: InputData, *, batch_size: int, rounds: int, **_: Any) -> Timings:
        times_s = [[file_size_bytes(path) * 1e-9] * rounds for path in models]
        return Timings(batch_size, (1,) * len(models), np.array(times_s))

    for module in (latency, judge):
        monkeypatch.setattr(module, "time_interleaved", timed)
    monkeypatch.setattr(mixed_schemes, "layer_times", lambda models, *_: [{}] * len(models))
