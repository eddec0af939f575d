"""How long each layer takes as onnxruntime runs a model, and by which kernel: after its own fusions and layouts.

Nodes get short names of their own beforehand, and so do the values between them: onnxruntime names what it makes of a
node by the node or by its output, so that a kernel tells of which layer it is. What converts to and from integers
counts to the layer that works with it. A node that was merged into another one has no time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from modelpress_compression.encodings.operands import is_integer_operator
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.graph.read import constant_tensor, extent, input_of, int_attribute, is_op
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.node_times import Profile, profiles
from modelpress_compression.measure.stats import layer_name, layer_of
from modelpress_compression.model import Model
from modelpress_compression.runtime import open_session

_QUANTIZERS = frozenset(("QuantizeLinear", "DequantizeLinear"))
# Their time is that of the kernels within.
_CONTROL_FLOW = frozenset(("If", "Loop", "Scan"))
_MOST_MERGED = 12  # nodes that are looked at behind a kernel
# The operators that kernels begin with which are called otherwise.
_BEGINS = {
    "FusedConv": "Conv",
    "FusedGemm": "Gemm",
    "FusedMatMul": "MatMul",
    "QLinearConv": "Conv",
    "DynamicQuantizeMatMul": "MatMulInteger",
    "MatMulIntegerToFloat": "MatMulInteger",
}
_PREFIX = "mpn"
_NODE = re.compile(rf"{_PREFIX}(\d+)_")


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of one run, over all kernels of a layer. `kernel`: the operator of the longest one, as onnxruntime
    calls it; `types`: what it takes and gives, as `uint8, int8 → uint8`. `inserted`: by onnxruntime, for no node."""

    ms: float
    kernel: str
    types: str
    inserted: bool = False


@dataclass(frozen=True)
class LayerForm:
    """What a node is. `stored_bits`: of its weights in the file, where they are fewer than it computes with."""

    op_type: str
    depthwise: bool = False
    stored_bits: int | None = None


def layer_times(models: Sequence[Model], data: InputData, folder: Path, threads: int) -> list[Mapping[str, LayerTime]]:
    """By the layer's name, for each model; on the first sample, the models in turn. Files go into `folder`.

    Empty where a profile is too large to be read. Raises ModelNotRunnableError.
    """
    nodes: list[Mapping[str, onnx_ir.Node]] = []
    sessions = []
    for number, model in enumerate(models):
        place = folder / f"layer-times-{number}"
        place.mkdir(parents=True, exist_ok=True)
        nodes.append(_save_renamed(model, place / "model.onnx"))
        sessions.append(open_session(place / "model.onnx", threads=threads, profile=place / "times"))
    found = profiles(sessions, next(iter(data.feeds(1))))
    return [_by_layer(profile, known) for profile, known in zip(found, nodes, strict=True)]


def layer_forms(model: Model) -> dict[str, LayerForm]:
    """By the layer's name."""
    bits: dict[int, int] = {}
    for node in model.nodes():
        for width in _stored_bits(node):
            bits[id(layer_of(node))] = width
    return {
        layer_name(node): LayerForm(node.op_type, _is_depthwise(node), bits.get(id(node))) for node in model.nodes()
    }


def _stored_bits(node: onnx_ir.Node) -> list[int]:
    if is_integer_operator(node.op_type):
        return []
    found = [tensor.dtype.bitwidth for stored in stored_weights(node) if (tensor := constant_tensor(stored.values))]
    if node.op_type == "Cast" and (tensor := constant_tensor(input_of(node, 0))) is not None:
        found += [tensor.dtype.bitwidth] if tensor.dtype.is_floating_point() else []
    return [int(width) for width in found if width < 32]


def _is_depthwise(node: onnx_ir.Node) -> bool:
    group = int_attribute(node, "group", 1) if node.op_type == "Conv" else 1
    if group == 1:
        return False
    weight = input_of(node, 1)
    producer = weight.producer() if weight is not None else None
    if is_op(producer, "DequantizeLinear"):
        weight = input_of(producer, 0)
    return extent(weight, 1) == 1


def _save_renamed(model: Model, path: Path) -> Mapping[str, onnx_ir.Node]:
    """Writes the model with short names; returns its nodes by their numbers, and by the graph's outputs."""
    copy = model.clone()
    nodes: dict[str, onnx_ir.Node] = {}
    for number, (node, named) in enumerate(zip(model.nodes(), copy.nodes(), strict=True)):
        nodes[str(number)] = node
        named.name = f"{_PREFIX}{number}_"
        for place, output in enumerate(named.outputs):
            if output.is_graph_output() and output.name:
                nodes[output.name] = node  # it keeps its name
            elif output.name:
                output.name = f"{_PREFIX}{number}_{place}"
    copy.save(path)
    return nodes


def _by_layer(profile: Profile, nodes: Mapping[str, onnx_ir.Node]) -> dict[str, LayerTime]:
    kernels: defaultdict[str, list[LayerTime]] = defaultdict(list)
    for kernel, ms in profile.ms.items():
        arguments = profile.arguments[kernel]
        operator = str(arguments.get("op_name", ""))
        if operator in _CONTROL_FLOW:
            continue
        layer = _layer_of_kernel(kernel, operator, nodes)
        kernels[layer or operator].append(LayerTime(ms, operator, _types(operator, arguments), layer is None))
    return {name: together(times) for name, times in kernels.items()}


def _layer_of_kernel(kernel: str, operator: str, nodes: Mapping[str, onnx_ir.Node]) -> str | None:
    """None: onnxruntime has put it in."""
    if match := _NODE.search(kernel):
        node = nodes.get(match[1])
    else:
        node = next((node for name, node in nodes.items() if kernel.startswith(f"{name}_nchwc")), None)
    if node is None:
        return None
    if node.op_type in _QUANTIZERS:
        return layer_name(layer_of(node))
    return layer_name(_merged_into(node, operator) or node)


def _merged_into(node: onnx_ir.Node, operator: str) -> onnx_ir.Node | None:
    """The node that a kernel began with which has the name of its last one, as a convolution has of its activation."""
    waiting, seen = [node], 0
    while waiting and seen < _MOST_MERGED:
        node, seen = waiting.pop(0), seen + 1
        if node.op_type in (operator, _BEGINS.get(operator)):
            return node
        waiting += [producer for value in node.inputs if value is not None and (producer := value.producer())]
    return None


def together(times: Sequence[LayerTime]) -> LayerTime:
    """Several kernels as one; the longest gives its name."""
    longest = max(times, key=lambda each: each.ms)
    return LayerTime(sum(each.ms for each in times), longest.kernel, longest.types, longest.inserted)


def _types(operator: str, arguments: Mapping[str, object]) -> str:
    taken, given = (_distinct(arguments.get(f"{side}_type_shape")) for side in ("input", "output"))
    if is_integer_operator(operator):
        taken = [each for each in taken if each != "float"] or taken  # scales
    return f"{', '.join(taken)} → {', '.join(given)}"


def _distinct(shapes: object) -> list[str]:
    found = [str(name) for entry in (shapes if isinstance(shapes, list) else []) for name in entry]
    return list(dict.fromkeys(found))
