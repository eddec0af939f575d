"""onnxruntime's own kernels without VNNI, one after the other, against what the certificates say of them.

    python benchmarks/saturation_kernels.py --qemu QEMU

Needs qemu-x86_64 of version 7.2 or later (Debian: qemu-user), whose emulated Haswell makes onnxruntime take its AVX2
kernels. Every layer has weights that saturate; for both targets the table compares its answers there with those of this
machine, which must have VNNI, and with the written-out saturating arithmetic, in dB; 200 is bit for bit the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model, Provenance
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.target import Target
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from portable_int8 import against_qemu
from saturating_products import emulate

RNG = np.random.default_rng(0)
PIXELS = 9


@dataclass(frozen=True)
class Layer:
    """One node and its inputs; `scheme` is what quantizes it."""

    name: str
    scheme: str
    node: onnx.NodeProto
    weights: Mapping[str, NDArray[np.float64]]
    shape: Sequence[int | str]
    samples: NDArray[np.float32]


def extreme(*shape: int) -> NDArray[np.float64]:
    """Most pairs have the same sign and nearly the largest magnitude."""
    return RNG.choice([-1.0, 1.0, 1.0, 0.9], shape)


def loud(*shape: int) -> NDArray[np.float32]:
    """Activations of one sign."""
    return np.abs(RNG.normal(0, 1, shape)).astype(np.float32)


def conv(name: str, inputs: int, outputs: int, kernel: int, group: int = 1, rank: int = 2) -> Layer:
    """With padding, so that the zero point takes part."""
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", group=group, pads=[kernel // 2] * (2 * rank))
    weights = {"w": extreme(outputs, inputs // group, *[kernel] * rank), "b": RNG.normal(0, 1, outputs)}
    pixels = [PIXELS] * rank
    return Layer(name, "static", node, weights, ["n", inputs, *pixels], loud(4, inputs, *pixels))


def product(name: str, scheme: str, terms: int) -> Layer:
    """[3, terms] by [terms, 40]."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    return Layer(name, scheme, node, {"w": extreme(terms, 40)}, ["n", 3, terms], loud(4, 3, terms))


def layers() -> Iterator[Layer]:
    """Every kernel that adds up products of 8 bits."""
    yield conv("Conv 3x3, 8 channels (symmetric kernel)", 8, 32, 3)
    yield conv("Conv 1x1, 32 channels", 32, 32, 1)
    yield conv("Conv 3x3, 5 channels (matrix product, odd)", 5, 9, 3)
    yield conv("Conv 3x3, 64 channels in 4 groups", 64, 16, 3, group=4)
    yield conv("Conv of one dimension", 8, 24, 5, rank=1)
    yield conv("Conv of three dimensions", 3, 8, 3, rank=3)
    yield product("MatMul, static", "static", 64)
    yield product("MatMul, dynamic, 37 terms", "dynamic", 37)
    recurrent = {"w": extreme(1, 64, 33) * 0.02, "r": extreme(1, 64, 16) * 0.05, "b": np.zeros((1, 128))}
    node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], "lstm", hidden_size=16)
    yield Layer("LSTM", "dynamic", node, recurrent, [5, 2, 33], loud(4, 5, 2, 33))
    node = helper.make_node("Attention", ["x", "w", "b"], ["y"], "attention", domain="com.microsoft", num_heads=4)
    yield Layer(
        "Attention",
        "dynamic",
        node,
        {"w": extreme(32, 96) * 0.1, "b": np.zeros(96)},
        ["n", 6, 32],
        loud(4, 6, 32),
    )


def model_of(layer: Layer) -> Model:
    """The node alone."""
    graph = helper.make_graph(
        [layer.node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, layer.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in layer.weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto: Any = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    return Model(onnx_ir.serde.deserialize_model(proto), Provenance("onnx", "0" * 64, 0))


def measure(layer: Layer, cpu: str, work: Path, qemu: Path) -> list[str]:
    """One row of the table."""
    model = model_of(layer)
    samples = InputData(model.inputs, {"x": layer.samples})
    config = QuantizeConfig(scheme=layer.scheme)
    result = Quantize(config)(model, Context(samples, work, target=Target(cpu=cpu)))
    if not result.changed:
        raise SystemExit(f"{layer.name} was not quantized: {result.skipped}")
    path, written_out = work / "layer.onnx", work / "written_out.onnx"
    result.model.save(path)
    try:
        emulate(result.model, saturating=True).save(written_out)
        distance = f"{against_qemu(path, samples, work, qemu, here=written_out):.1f}"
    except NotImplementedError:
        distance = "not written out"
    reason = next(str(row["without_vnni"]) for row in result.details if "without_vnni" in row)
    return [layer.name, cpu, reason, f"{against_qemu(path, samples, work, qemu, here=path):.1f}", distance]


def main() -> None:
    parser = argparse.ArgumentParser(description="onnxruntime's kernels without VNNI.")
    parser.add_argument("--qemu", type=Path, required=True, help="qemu-x86_64")
    arguments = parser.parse_args()
    headings = ["layer", "target.cpu", "certificate", "Haswell against this machine", "against the written-out form"]
    print("|".join(["", *headings, ""]), "|".join(["", *["---"] * len(headings), ""]), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for layer in layers():
            for cpu in ("vnni", "generic"):
                print("|".join(["", *measure(layer, cpu, Path(work), arguments.qemu), ""]), flush=True)


if __name__ == "__main__":
    main()
