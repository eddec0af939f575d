"""ONNX graphs of operator sets 1 to 6 in the words of set 7, from where converters and onnxruntime go on.

What changed until then, by the standard's own table of changes:

- Add, Sub, Mul, Div, Pow, And, Or, Xor, Equal, Less, Greater: `broadcast` and `axis` say where the second operand's
  axes lie; since 7 they are the last, as in NumPy. B [C] beside A [N, C, H, W] at axis 1 is B [C, 1, 1].
- Gemm: `broadcast` goes. BatchNormalization: `is_test` and `consumed_inputs` go, and outputs of training.
- Dropout: `is_test` goes; it never drops anything at inference.
- `consumed_inputs` goes everywhere. Cast: `to` was a word. Concat: `axis` was 1 where left out. Pad: `paddings`.
- Reshape and Tile: `shape`, `tiles` and `axis` become inputs. Upsample: two scales become `scales`.

onnxruntime has few kernels as old as these, so that the original cannot be run to compare; every rule here is tested
against `onnx.reference` in place of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import onnx
from onnx import helper, numpy_helper

from modelpress_compression.errors import UnsupportedOperatorError
from modelpress_compression.loaders.onnx_check import graphs_within

TARGET = 7
_FIRST_IR_WITH_OPSETS = 3
_KNOWS_INITIALIZERS = 8  # before 4, inference overlooks an initializer that is no input
_DEFAULT_DOMAINS = ("", "ai.onnx")
_BROADCASTING = frozenset((
    "Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Less", "Greater",
))  # fmt: skip


def raise_from_before_7(proto: onnx.ModelProto) -> None:
    """Operator set 7 in place, where the model has an older one; else nothing.

    Raises UnsupportedOperatorError for what set 7 cannot say.
    """
    default = next((item for item in proto.opset_import if item.domain in _DEFAULT_DOMAINS), None)
    # A file without operator sets is from before they were written: version 1 is meant.
    version = default.version if default is not None else 1
    if version >= TARGET or (default is None and proto.ir_version >= _FIRST_IR_WITH_OPSETS):
        return
    graphs = list(graphs_within([proto.graph]))
    for graph in graphs:
        _Raising(graph).rename()
    if default is None:
        default = proto.opset_import.add()
    default.version = TARGET
    ranks = _ranks(proto)
    for graph in graphs:
        _Raising(graph).align(ranks)


def _ranks(proto: onnx.ModelProto) -> dict[str, int]:
    """How many axes each value has, where that is known.

    The result of an operator that broadcasts its second operand has the shape of its first, so that it stands for it.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for graph in graphs_within([copy.graph]):
        for node in graph.node:
            if _broadcasts(node):
                del node.input[1:], node.attribute[:]
                node.op_type = "Identity"
    copy.ir_version = _KNOWS_INITIALIZERS
    with suppress(onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        copy = onnx.shape_inference.infer_shapes(copy)
    found: dict[str, int] = {}
    for graph in graphs_within([copy.graph]):
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.HasField("shape"):
                found[value.name] = len(value.type.tensor_type.shape.dim)
        found |= {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    return found


def _broadcasts(node: onnx.NodeProto) -> bool:
    return node.domain in _DEFAULT_DOMAINS and node.op_type in _BROADCASTING and len(node.input) == 2


class _Raising:
    """Rewrites the nodes of one graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._taken = {name for node in graph.node for name in (*node.input, *node.output)}

    def rename(self) -> None:
        """What was called differently, or stood in an attribute."""
        for node in self._graph.node:
            if node.domain in _DEFAULT_DOMAINS:
                _drop(node, "consumed_inputs")
                if (rule := _RULES.get(node.op_type)) is not None:
                    rule(self, node)

    def align(self, ranks: dict[str, int]) -> None:
        """Operands that are broadcast, in NumPy's way."""
        nodes: list[onnx.NodeProto] = []
        for node in self._graph.node:
            if _broadcasts(node):
                nodes += self._aligned(node, ranks)
            nodes.append(node)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self._graph.node[:]
        self._graph.node.extend(copies)

    def _aligned(self, node: onnx.NodeProto, ranks: dict[str, int]) -> Iterator[onnx.NodeProto]:
        """The second operand with axes of one behind its own, so that NumPy's rule puts it where `axis` said."""
        axis, broadcast = _taken_int(node, "axis"), _taken_int(node, "broadcast")
        if not broadcast or axis is None:
            return
        first, second = (ranks.get(name) for name in node.input[:2])
        if first is None or second is None:
            raise _not_raised(node, "the number of its operands' axes is not known")
        behind = first - (axis % first if first else 0) - second
        if behind <= 0:
            return
        aligned = self._name(f"{node.input[1]}_aligned")
        yield helper.make_node("Unsqueeze", [node.input[1]], [aligned], axes=list(range(second, second + behind)))
        node.input[1] = aligned

    def batch_normalization(self, node: onnx.NodeProto) -> None:
        _drop(node, "is_test")
        if _taken_int(node, "spatial") == 0:
            raise _not_raised(node, "it normalizes every position by itself (spatial=0)")
        del node.output[1:]

    def dropout(self, node: onnx.NodeProto) -> None:
        _drop(node, "is_test")

    def gemm(self, node: onnx.NodeProto) -> None:
        _drop(node, "broadcast")

    def cast(self, node: onnx.NodeProto) -> None:
        for item in node.attribute:
            if item.name == "to" and item.type == onnx.AttributeProto.STRING:
                word = item.s.decode("ascii", "replace").upper()
                if word not in onnx.TensorProto.DataType.keys():  # noqa: SIM118  an enum, no dictionary
                    raise _not_raised(node, f"there is no element type {word[:40]!r}")
                item.CopyFrom(helper.make_attribute("to", onnx.TensorProto.DataType.Value(word)))

    def concat(self, node: onnx.NodeProto) -> None:
        if not any(item.name == "axis" for item in node.attribute):
            node.attribute.append(helper.make_attribute("axis", 1))

    def pad(self, node: onnx.NodeProto) -> None:
        for item in node.attribute:
            if item.name == "paddings":
                item.name = "pads"

    def reshape(self, node: onnx.NodeProto) -> None:
        if (shape := _taken_ints(node, "shape")) is not None:
            node.input.append(self._constant(f"{node.output[0]}_shape", np.asarray(shape, np.int64)))

    def tile(self, node: onnx.NodeProto) -> None:
        """Until 6: inputs `tiles` and `axis`, scalars."""
        if len(node.input) == 3:
            raise _not_raised(node, "its repeats are given by an axis")

    def upsample(self, node: onnx.NodeProto) -> None:
        height, width = (_taken_float(node, name) for name in ("height_scale", "width_scale"))
        if height is not None and width is not None:
            node.attribute.append(helper.make_attribute("scales", [1.0, 1.0, height, width]))

    def recurrent(self, node: onnx.NodeProto) -> None:
        _drop(node, "output_sequence")

    def split(self, node: onnx.NodeProto) -> None:
        if len(node.input) == 2:
            parts = next((item for item in self._graph.initializer if item.name == node.input[1]), None)
            if parts is None:
                raise _not_raised(node, "the sizes of its parts are computed")
            node.attribute.append(helper.make_attribute("split", numpy_helper.to_array(parts).tolist()))
            del node.input[1]
        if not any(item.name == "axis" for item in node.attribute):
            node.attribute.append(helper.make_attribute("axis", 0))

    def _constant(self, wanted: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> str:
        name = self._name(wanted)
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _name(self, wanted: str) -> str:
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


_RULES: dict[str, Callable[[_Raising, onnx.NodeProto], None]] = {
    "BatchNormalization": _Raising.batch_normalization,
    "Dropout": _Raising.dropout,
    "Gemm": _Raising.gemm,
    "Cast": _Raising.cast,
    "Concat": _Raising.concat,
    "Pad": _Raising.pad,
    "Reshape": _Raising.reshape,
    "Tile": _Raising.tile,
    "Upsample": _Raising.upsample,
    "Split": _Raising.split,
    "RNN": _Raising.recurrent,
    "LSTM": _Raising.recurrent,
    "GRU": _Raising.recurrent,
}


def _drop(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    """Takes the attribute out of the node, and returns it."""
    for index, item in enumerate(node.attribute):
        if item.name == name:
            found = onnx.AttributeProto()
            found.CopyFrom(item)
            del node.attribute[index]
            return found
    return None


def _taken_int(node: onnx.NodeProto, name: str) -> int | None:
    found = _drop(node, name)
    return None if found is None else found.i


def _taken_ints(node: onnx.NodeProto, name: str) -> list[int] | None:
    found = _drop(node, name)
    return None if found is None else list(found.ints)


def _taken_float(node: onnx.NodeProto, name: str) -> float | None:
    found = _drop(node, name)
    return None if found is None else found.f


def _not_raised(node: onnx.NodeProto, why: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"Node {(node.name or node.output[0])[:120]!r} ({node.op_type}) is of an operator set before {TARGET}, and "
        f"cannot be said in a newer one: {why}. Export the model with opset 7 or later.",
        op_type=node.op_type,
        node=node.name[:120],
    )
