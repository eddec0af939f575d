"""onnxruntime's providers for CUDA and TensorRT, without a GPU: what they are asked for, what is said where they are
missing, and the forms that are written for them, which onnxruntime on the CPU runs as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime as ort
import pytest
from modelpress_compression import InputData, Model, runtime
from modelpress_compression.backends import backend_of, backends_of, cuda
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.backends.cuda import CUDA, Cuda
from modelpress_compression.backends.cuda.tensorrt import ENGINES, TENSORRT, Profile, TensorRt
from modelpress_compression.errors import InvalidRecipeError, ModelNotRunnableError
from modelpress_compression.graph.read import constant_array, is_op
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.target import DEVICES, Device, Target, measured_devices

Asked = list[list[Any]]
HEAD = '<ir_version: 8, opset_import: ["" : 17]> '


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The providers that sessions are asked for; they run on the CPU, and say otherwise."""
    asked: Asked = []
    real = ort.InferenceSession

    class Session:
        def __init__(self, model: Any, options: Any, providers: list[Any]) -> None:
            asked.append(providers)
            self._session = real(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [one if isinstance(one, str) else one[0] for one in asked[-1]]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

    monkeypatch.setattr(runtime.ort, "InferenceSession", Session)
    return asked


@pytest.fixture
def dynamic(model_from_text: Callable[..., Model], tmp_path: Path) -> Path:
    """Two inputs, one of them with dynamic dimensions."""
    text = HEAD + "g (float[n,m] x, float[2] k) => (float[n,m] y) { s = ReduceSum<keepdims=0>(k)  y = Add(x, s) }"
    path = tmp_path / "model.onnx"
    model_from_text(text).save(path)
    return path


def test_cuda_is_asked_for_first(asked: Asked, dynamic: Path) -> None:
    """With products in TF32 unless the target wants float32, and the CPU for what CUDA does not run."""
    feed = {"x": np.ones((2, 3), np.float32), "k": np.ones(2, np.float32)}
    answer = Cuda().open(dynamic).run(feed)
    np.testing.assert_array_equal(answer["y"], np.full((2, 3), 3, np.float32))
    Cuda(precise=True).open(dynamic, comparable=True)
    assert asked == [[(CUDA, {"use_tf32": tf32}), "CPUExecutionProvider"] for tf32 in ("1", "0")]
    assert Cuda().elsewhere


def test_the_cpu_is_not_taken_without_a_word(dynamic: Path) -> None:
    """A provider whose libraries are missing is dropped by onnxruntime, which then runs on the CPU."""
    with pytest.raises(ModelNotRunnableError, match="could not start CUDAExecutionProvider"):
        cuda.on_device(runtime.open_session(dynamic), CUDA)


def test_profiles_hold_the_shapes_of_the_feeds(asked: Asked, dynamic: Path) -> None:
    """An engine for the first feeds; another one, for both, where a later one is beyond them; none for smaller."""
    runner = TensorRt().open(dynamic)
    assert asked == []
    k = np.ones(2, np.float32)
    for shape in ((2, 3), (2, 3), (1, 5), (2, 4)):
        runner.run({"x": np.ones(shape, np.float32), "k": k})
    profiles = [{name: value for name, value in providers[0][1].items() if "profile" in name} for providers in asked]
    assert profiles == [
        {"trt_profile_min_shapes": "x:2x3", "trt_profile_opt_shapes": "x:2x3", "trt_profile_max_shapes": "x:2x3"},
        {"trt_profile_min_shapes": "x:1x3", "trt_profile_opt_shapes": "x:2x3", "trt_profile_max_shapes": "x:2x5"},
    ]
    assert [one if isinstance(one, str) else one[0] for one in asked[0]] == [TENSORRT, CUDA, "CPUExecutionProvider"]
    assert asked[0][0][1]["trt_engine_cache_path"] == str(dynamic.parent / ENGINES)
    runner.prepared({"x": np.ones((2, 3), np.float32), "k": k})()
    assert len(asked) == 2


def test_a_model_of_fixed_shapes_needs_no_profile() -> None:
    """onnxruntime takes all three options or none."""
    assert Profile.of({}).options() == {}
    assert Profile.of({}).holds({})


def test_without_a_gpu_models_are_measured_on_the_cpu() -> None:
    """With a remark that says why; TensorRT is refused with what installs it."""
    backend = backend_of(Target(device="cuda"))
    assert backend.label == CPU.label
    assert "measured on the CPU" in backend.remark
    assert "pip install 'modelpress[cuda]'" in backend.remark
    assert [one.label for one in backends_of(Target(device="cuda"))] == [CPU.label]
    assert not {"cuda", "tensorrt"} & set(measured_devices())
    with pytest.raises(InvalidRecipeError, match=r"TensorRT is not installed.*pip install 'modelpress\[tensorrt\]'"):
        backend_of(Target(device="tensorrt"))


def test_what_is_missing_is_told() -> None:
    """The package, the file in it, or the hardware."""
    row = Device("gpu", "The GPU", "nowhere:Nothing", package="onnxruntime", extra="cuda", file="capi/__init__.py")
    assert row.missing == ""
    assert "onnxruntime has no The GPU" in Device(**{**vars(row), "file": "capi/no_such_provider.so"}).missing
    assert "is not installed" in Device(**{**vars(row), "package": "no_such_package"}).missing
    assert "needs a GPU" in Device(**{**vars(row), "nodes": ("/dev/no-such-device",)}).missing
    spare = Device(**{**vars(row), "nodes": ("/dev/no-such-device",), "spare": True})
    assert (spare.fault, bool(spare.missing)) == ("", True)


def test_two_onnxruntimes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files overwrite each other: what runs then is chance."""
    monkeypatch.setattr(cuda, "version", lambda package: "1.31.1")
    assert "onnxruntime and onnxruntime-gpu are both installed" in cuda.why_without(CUDA)
    monkeypatch.undo()
    assert "was built without CUDAExecutionProvider" in cuda.why_without(CUDA)


def test_tensorrt_gets_layers_in_the_form_that_it_fuses(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """int8 without zero points on both sides, weights by channel, biases in float, nothing but the standard's
    operators; the answers stay."""
    config, target = QuantizeConfig(scheme="static"), Target(device="tensorrt")
    result = Quantize(config)(digits, Context(samples, tmp_path, target=target))
    nodes = list(result.model.graph)
    pairs = [node for node in nodes if is_op(node, "QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero_point = constant_array(node.inputs[2])
        assert zero_point is not None
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
    layers = [
        node
        for node in nodes
        if is_op(node, "Conv", "Gemm", "MatMul") and is_op(node.inputs[1].producer(), "DequantizeLinear")
    ]
    assert layers
    for layer in layers:
        assert is_op(layer.inputs[0].producer(), "DequantizeLinear")
        scale = constant_array(layer.inputs[1].producer().inputs[1])
        assert scale is not None
        assert scale.ndim == 1
        if len(layer.inputs) > 2:
            bias = constant_array(layer.inputs[2])
            assert bias is not None
            assert bias.dtype == np.float32
    assert {node.domain for node in nodes} == {""}
    digits.save(tmp_path / "before.onnx")
    result.model.save(tmp_path / "after.onnx")
    found = compare_outputs(tmp_path / "before.onnx", tmp_path / "after.onnx", samples)
    assert found.top1_agreement is not None
    assert found.top1_agreement > 0.97
    assert found.sqnr_db > 20


def test_half_precision_computes_in_it_on_a_gpu(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """Weights and layers in float16, inputs and outputs as they were; on a CPU the arithmetic stays in float32."""
    config = QuantizeConfig(scheme="float16")
    result = Quantize(config)(digits, Context(samples, tmp_path, target=Target(device="cuda")))
    layers = [node for node in result.model.graph if is_op(node, "Conv", "Gemm", "MatMul")]
    kinds = {value.dtype for layer in layers for value in layer.inputs[1:2] if value is not None}
    assert kinds == {onnx_ir.DataType.FLOAT16}
    assert [spec.dtype for spec in (*result.model.inputs, *result.model.outputs)] == ["float32", "float32"]
    assert result.changes["Conv"] > 0
    digits.save(tmp_path / "before.onnx")
    result.model.save(tmp_path / "after.onnx")
    assert compare_outputs(tmp_path / "before.onnx", tmp_path / "after.onnx", samples).sqnr_db > 45
    stored = Quantize(config)(digits, Context(samples, tmp_path)).model
    assert any(is_op(layer.inputs[1].producer(), "Cast") for layer in stored.graph if is_op(layer, "Conv"))


def test_rows_of_gpus() -> None:
    """torch trains on both; neither has kernels for ranges of each run."""
    assert {name for name, row in DEVICES.items() if row.trains} == {"cuda", "tensorrt"}
    assert not any(DEVICES[name].finds_ranges for name in ("cuda", "tensorrt"))
    assert Target(device="cuda").saturates
    assert not Target(device="tensorrt").saturates
