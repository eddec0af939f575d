"""Quantized layers of a frozen TorchScript graph, as floating-point operators around quantize-dequantize pairs.

A quantized tensor stands for floats on a grid, and every operator of `quantized::` rounds its result to one:

    quantized::conv2d_relu(x, packed, scale, zero)   ->   q(relu(conv2d(x, w, b)))
    q(y) = (clamp(round(y / scale) + zero, 0, 255) - zero) * scale

with w, b what the packed weights stand for. Layers that quantize dynamically round their inputs by each batch's range;
they become plain layers on the same w and b.

The replacements are TorchScript sources (`quantized_sources`), inlined in the operators' places.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from modelpress_compression.loaders.quantized_sources import SOURCES

_QINT8 = 12  # of c10::ScalarType

QUANTIZED = frozenset(kind.partition("/")[0] for kind in SOURCES)


def dequantize(graph: Any) -> None:
    """Rewrites what it knows of in a frozen graph, in place; other operators stay as they are."""
    for node in graph.findAllNodes("prim::Constant", recurse=True):
        if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").is_quantized:
            node.t_("value", node.t("value").dequantize())
    found = [node for node in nodes_of(graph) if node.kind() in QUANTIZED]
    signed = any(node.kind() == "aten::quantize_per_tensor" and node.inputsAt(3).toIValue() == _QINT8 for node in found)
    # Last of all: behind it, a mean is not rounded.
    ends = [node for node in found if node.kind() == _END]
    for node in (node for node in found if node.kind() != _END):
        _replace(graph, node, signed=signed)
    _round_means(graph)
    for node in ends:
        _replace(graph, node, signed=signed)


def nodes_of(block: Any) -> Iterator[Any]:
    """All nodes of a graph or block, those of inner blocks too; safe against removal of the one that was given."""
    for node in list(block.nodes()):
        yield node
        for inner in node.blocks():
            yield from nodes_of(inner)


def _round_means(graph: Any) -> None:
    """Operators of `aten::` that compute on a quantized tensor round to its grid, or to one of their own."""
    for node in [node for node in nodes_of(graph) if node.kind() in _ROUNDS]:
        source = _rounded(node.inputsAt(0))
        if source is None:
            continue
        _, _, _, low, high = source.inputs()
        with graph.insert_point_guard(node):
            own = [graph.insertConstant(value) for value in _OWN_GRIDS.get(node.kind(), ())]
            made = graph.create(_ROUND, [node.output(), *(own or list(source.inputs())[1:3]), low, high], 1)
        made.insertAfter(node)
        node.output().replaceAllUsesAfterNodeWith(made, made.output())


def _rounded(value: Any) -> Any:
    """The rounding whose grid the value is on; None where it is on none."""
    while (kind := value.node().kind()) != _ROUND:
        if kind not in _KEEPS | _ROUNDS:
            return None
        value = value.node().inputsAt(0)
    return value.node()


_END = "aten::dequantize"
_ROUND = "aten::fake_quantize_per_tensor_affine"
_OWN_GRIDS: dict[str, tuple[float, int]] = {
    "aten::sigmoid": (1 / 256, 0), "aten::hardsigmoid": (1 / 256, 0), "aten::tanh": (1 / 128, 128),
}  # fmt: skip
_ROUNDS = frozenset(_OWN_GRIDS) | {
    "aten::mean", "aten::avg_pool2d", "aten::avg_pool3d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d",
    "aten::leaky_relu", "aten::upsample_bilinear2d", "aten::hardtanh",
}  # fmt: skip
# What leaves values on their grid.
_KEEPS = frozenset(
    f"aten::{name}"
    for name in (
        "relu", "relu_", "max_pool2d", "flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze",
        "unsqueeze", "select", "slice", "upsample_nearest2d", "dropout", "clamp", "clone", "detach",
    )
)  # fmt: skip


@functools.cache
def _compiled(kind: str, *, signed: bool) -> Any:
    low, high = (-128, 127) if signed else (0, 255)
    source = SOURCES[kind].replace("LOW", str(low)).replace("HIGH", str(high))
    return torch.jit.CompilationUnit(source).f.graph


def _replace(graph: Any, node: Any, *, signed: bool) -> None:
    kind, inputs = node.kind(), list(node.inputs())
    if f"{kind}/{len(inputs)}" in SOURCES:
        kind = f"{kind}/{len(inputs)}"
    with graph.insert_point_guard(node):
        values = [value for item in inputs for value in _unpacked(graph, kind, item)]
        results = graph.insertGraph(_compiled(kind, signed=signed), values)
    if len(list(node.outputs())) > 1:
        results = list(results[0].node().inputs()) if len(results) == 1 else results
    for old, new in zip(node.outputs(), results, strict=True):
        old.replaceAllUsesWith(new)
    node.destroy()


def _unpacked(graph: Any, kind: str, value: Any) -> list[Any]:
    """What takes the place of an argument: packed weights become the tensors and options that they hold."""
    text = str(value.type())
    if "PackedParams" in text:
        held = _weights(kind, value.toIValue())
        return [_constant(graph, item) for item in held]
    if "CellParams" in text:
        tensors = [tensor for cell in _cells(value) for tensor in _cell(cell)]
        made = graph.create("prim::ListConstruct", [_constant(graph, tensor) for tensor in tensors], 1)
        made.output().setType(torch._C.ListType.ofTensors())
        graph.insertNode(made)
        return [made.output()]
    return [value]


def _constant(graph: Any, value: Any) -> Any:
    return graph.insertConstant(value.detach() if isinstance(value, torch.Tensor) else value)


def _weights(kind: str, packed: Any) -> list[Any]:
    ops = torch.ops.quantized
    if "embedding" in kind:
        return [ops.embedding_bag_unpack(packed).dequantize()]
    if "cell" in kind:
        return [_linear(packed)[0]]
    if "conv" not in kind:
        return list(_linear(packed))
    rank = next(rank for rank in (1, 2, 3) if f"{rank}d" in kind)
    transposed = "transpose" in kind
    name = f"conv_transpose{rank}d" if transposed else f"conv{rank}d"
    weight, bias = getattr(ops, f"{name}_unpack")(packed)
    about = f"conv_transpose{max(rank, 2)}d" if transposed else f"conv{max(rank, 2)}d"

    def option(what: str) -> Any:
        found = getattr(ops, f"{about}_{what}")(packed)
        # Of one dimension, packed weights say two: the last one counts.
        return found if what == "groups" else list(found)[-rank:]

    names = (
        ("stride", "padding", "output_padding", "groups", "dilation")
        if transposed
        else ("stride", "padding", "dilation", "groups")
    )
    return [weight.dequantize(), bias, *map(option, names)]


def _linear(packed: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    try:
        weight, bias = torch.ops.quantized.linear_unpack(packed)
    except RuntimeError:  # of 16 bits
        weight, bias = torch.ops.quantized.linear_unpack_fp16(packed)
    return (weight.dequantize() if weight.is_quantized else weight.float()), bias


def _cells(value: Any) -> list[Any]:
    """The layers of an LSTM or GRU: a constant, or a list, which may be filled one by one."""
    if value.node().kind() != "prim::ListConstruct":
        found: list[Any] = value.toIValue()
        return found
    appended = [use.user.inputsAt(1) for use in value.uses() if use.user.kind() == "aten::append"]
    return [item.toIValue() for item in (*value.node().inputs(), *appended)]


def _cell(cell: Any) -> list[torch.Tensor]:
    """w_ih, w_hh, b_ih, b_hh of one layer in one direction."""
    (_, tensors, _, _, packed), _ = cell.__getstate__()
    held = [_linear(item) for item in packed]
    biases = tensors or [bias for _, bias in held]
    return [*(weight for weight, _ in held), *biases[:2]]
