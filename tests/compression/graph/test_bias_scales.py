"""Scales of biases that a file writes as products of two others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import Recipe, compress
from modelpress_compression.graph import bias_scales
from modelpress_compression.graph.compact import compacted
from modelpress_compression.graph.edit import Editor
from modelpress_compression.loaders import load
from modelpress_compression.model import Model
from onnx import helper

RNG = np.random.default_rng(7)
CHANNELS = 96


def _quantized(channel_model) -> Model:  # type: ignore[no-untyped-def]
    """A convolution and a product in 8 bits, their biases in 32."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "v", "c"], ["y"], "gemm", transB=1),
    ]
    constants = {
        "w": RNG.standard_normal((CHANNELS, 8, 3, 3)).astype(np.float32),
        "b": RNG.standard_normal(CHANNELS).astype(np.float32),
        "v": RNG.standard_normal((CHANNELS, CHANNELS)).astype(np.float32),
        "c": RNG.standard_normal(CHANNELS).astype(np.float32),
    }
    model = channel_model(nodes, constants, ["n", 8, 6, 6], ["n", CHANNELS])
    data = {"x": RNG.standard_normal((16, 8, 6, 6)).astype(np.float32)}
    steps = [{"quantize": {"scheme": "static"}}]
    return compress(model, Recipe.from_dict({"version": 1, "steps": steps}), data=data).model


def _biases(model: Model) -> list[str]:
    """What makes the scale of each bias."""
    found = []
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0].dtype is not None and len(node.inputs) == 2:
            producer = node.inputs[1].producer()
            found.append("constant" if producer is None else producer.op_type)
    return found


def test_written_as_products_and_read_as_constants(
    channel_model,  # type: ignore[no-untyped-def]
    outputs_of,  # type: ignore[no-untyped-def]
    loaded_operators,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    """The answers are the same bit for bit, so are onnxruntime's kernels; what is read has the numbers again."""
    written = _quantized(channel_model)
    written.save(tmp_path / "written.onnx")
    read = load(tmp_path / "written.onnx")
    assert _biases(written) == ["Mul", "Mul"]
    assert _biases(read) == ["constant", "constant"]
    x = RNG.standard_normal((5, 8, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(outputs_of(written, x), outputs_of(read, x))
    assert loaded_operators(written) == loaded_operators(read)
    assert {"QLinearConv", "QGemm"} <= set(loaded_operators(written))
    read.save(tmp_path / "read.onnx")
    compacted(read).save(tmp_path / "again.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("written", "read", "again")]
    assert sizes[0] < sizes[1] - CHANNELS * 4  # two scales, less two nodes
    assert sizes[2] < sizes[1]


@pytest.mark.parametrize("change", ["numbers", "short"])
def test_others_stay(channel_model, change: str) -> None:  # type: ignore[no-untyped-def]
    """A scale that is not the product to the last bit, and one that takes fewer bytes than the node would."""
    model = _quantized(channel_model)
    bias_scales.write_out(model)
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) != 2:
            continue
        scale = node.inputs[1]
        if change == "numbers":
            tensor = scale.const_value.numpy().copy()
            tensor[3] = np.nextafter(tensor[3], np.float32(1))
            scale.const_value = type(scale.const_value)(tensor, name=scale.name)
        else:
            for factor in (required for reader, _ in node.outputs[0].uses() for required in reader.inputs[:2]):
                factor.producer().inputs[1].name += "long" * CHANNELS
    bias_scales.share(Editor(model), model.graph)
    assert _biases(model) == ["constant", "constant"]
