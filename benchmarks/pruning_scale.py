"""How long the analysis of channels takes as graphs grow: generated chains, and one large export."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from architectures import LARGE, exported
from modelpress_compression.channels import find_groups
from modelpress_compression.loaders import load
from modelpress_compression.loaders.normalize import normalize
from modelpress_compression.model import Model, Provenance
from onnx import TensorProto, helper, numpy_helper

CHAINS = (1500, 3000, 6000, 12000)
CHANNELS = 16
REPEATS = 3


@dataclass(frozen=True)
class Scale:
    """One graph and the time of its analysis, the best of a few: other work on the machine only adds to it."""

    name: str
    nodes: int
    groups: int
    analysis_s: float


def measure_scale(cache: Path) -> list[Scale]:
    """Chains of growing length, then the large export."""
    scales = [_measure(f"chain of residual blocks and attention, {nodes}", chain(nodes)) for nodes in CHAINS]
    path, _ = exported(LARGE, "torchscript", cache)
    return [*scales, _measure(f"{LARGE.name} ({LARGE.source}, torchscript)", load(path))]


def _measure(name: str, model: Model) -> Scale:
    nodes = sum(1 for _ in model.nodes())
    times_s = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        analysis = find_groups(model)
        times_s.append(time.perf_counter() - began)
    return Scale(name, nodes, len(analysis.groups), min(times_s))


class _Builder:
    """Nodes and weights of a chain."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def weight(self, *shape: int) -> str:
        return self.constant(self._rng.normal(size=shape).astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(array, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def __call__(self, op_type: str, *inputs: str, **attributes: object) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], f"n{len(self.nodes)}", **attributes))
        return output

    def residual(self, x: str) -> str:
        """Conv, Relu, Conv, Add on [N, C, L]."""
        h = self("Relu", self("Conv", x, self.weight(2 * CHANNELS, CHANNELS, 3), pads=[1, 1]))
        return self("Add", x, self("Conv", h, self.weight(CHANNELS, 2 * CHANNELS, 1)))

    def attention(self, x: str) -> str:
        """Four heads over positions, with shapes that the graph computes."""
        t = self("Transpose", x, perm=[0, 2, 1])
        t = self("LayerNormalization", t, self.weight(CHANNELS), axis=-1)
        q, k, v = (self._heads(t, perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
        mixed = self("MatMul", self("Softmax", self("MatMul", q, k), axis=-1), v)
        shape = self.constant(np.asarray([0, 0, -1]))
        joined = self("Reshape", self("Transpose", mixed, perm=[0, 2, 1, 3]), shape)
        out = self("Transpose", self("MatMul", joined, self.weight(CHANNELS, CHANNELS)), perm=[0, 2, 1])
        return self("Add", x, out)

    def _heads(self, t: str, perm: list[int]) -> str:
        p = self("MatMul", t, self.weight(CHANNELS, CHANNELS))
        length = self("Gather", self("Shape", p), self.constant(np.asarray([1])))
        rest = self.constant(np.asarray([4, -1]))
        shape = self("Concat", self.constant(np.asarray([0])), length, rest, axis=0)
        return self("Transpose", self("Reshape", p, shape), perm=perm)


def chain(nodes: int) -> Model:
    """A model of about so many nodes, with input x [N, 16, 8]."""
    builder = _Builder()
    x = builder("Conv", "x", builder.weight(CHANNELS, CHANNELS, 1))
    while len(builder.nodes) < nodes - 1:
        x = builder.attention(builder.residual(x))
    builder.nodes.append(helper.make_node("Conv", [x, builder.weight(3, CHANNELS, 1)], ["y"], "head"))
    graph = helper.make_graph(
        builder.nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", CHANNELS, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 8])],
        builder.weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return normalize(Model(onnx_ir.from_proto(proto), Provenance("onnx", "", 0)))
