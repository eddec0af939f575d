"""Other forms of a model of ONNX's tests: its inputs as weights, and between layers that passes work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from modelpress_compression.inputs import Array
from onnx import helper, numpy_helper

from oracles import conformance

# Units between the two layers of a pair, above every threshold of the passes; and the widest axis that gets a pair.
_HIDDEN = 512
_MAX_WIDTH = 128
# What the units hold of one sample at the most, where fewer do: one test has a picture of 1000 x 1000.
_MAX_HIDDEN_BYTES = 256 * 1024**2  # 256 MiB
_LEAST_HIDDEN = 64
# Before 4, initializers had to be listed as inputs.
_MIN_IR_VERSION = 4


@dataclass(frozen=True)
class Subject:
    """A model with inputs, and the outputs that its author expects; both by name, `expected` only where it is known.

    `random`: only types and shapes of the outputs can be compared.
    """

    name: str
    operator: conformance.Key
    proto: onnx.ModelProto
    inputs: Mapping[str, Any]
    expected: Mapping[str, Any]
    random: bool = False

    def renamed(self, form: str, proto: onnx.ModelProto, inputs: Mapping[str, Any]) -> Subject:
        """The same in another form."""
        return replace(self, name=f"{self.name.partition(' (')[0]} ({form})", proto=proto, inputs=inputs)


def frozen(subject: Subject) -> Subject | None:
    """The subject with all inputs but the first as initializers; None where that makes no other model."""
    if len(subject.inputs) < 2:
        return None
    first, *others = subject.inputs
    arrays = {name: subject.inputs[name] for name in others}
    have = {tensor.name for tensor in subject.proto.graph.initializer}
    if have & arrays.keys() or not all(_is_plain(array) for array in arrays.values()):
        return None
    proto = _copy(subject.proto)
    kept = [value for value in proto.graph.input if value.name not in arrays]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return subject.renamed("frozen", proto, {first: subject.inputs[first]})


def between(subject: Subject, *, convolutions: bool) -> Subject | None:
    """The subject between two pairs of layers; None where its first input or output is of another kind than these take.

    What stands for the first output is called as it is.
    """
    if len(subject.inputs) != 1 or not subject.expected:
        return None
    (name, x), (output, y) = next(iter(subject.inputs.items())), next(iter(subject.expected.items()))
    if not (_is_wrappable(x, convolutions) and _is_wrappable(y, convolutions)):
        return None
    proto = _copy(subject.proto)
    if not any(item.domain in ("", "ai.onnx") for item in proto.opset_import):
        return None
    inner = f"{output}_inside"
    for node in proto.graph.node:
        node.output[:] = [inner if made == output else made for made in node.output]
        node.input[:] = [inner if taken == output else taken for taken in node.input]
    if not any(inner in node.output for node in proto.graph.node):
        return None
    before, after = _Pair(proto, "before", convolutions), _Pair(proto, "after", convolutions)
    nodes = [*before.nodes(f"{name}_given", name, x), *proto.graph.node, *after.nodes(inner, output, y)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.input[0].name = f"{name}_given"
    form = "between convolutions" if convolutions else "between products"
    return subject.renamed(form, proto, {f"{name}_given": x})


@dataclass(frozen=True)
class _Pair:
    """Two layers that together are the identity, over `_HIDDEN` units, or fewer where samples are huge; `name` begins
    those of their weights."""

    proto: onnx.ModelProto
    name: str
    convolutions: bool

    def nodes(self, given: str, made: str, like: Array) -> list[onnx.NodeProto]:
        """`like` is what flows through."""
        width = like.shape[1 if self.convolutions else -1]
        rng = np.random.default_rng(width)
        units = _units(like.size // width)
        out = (rng.standard_normal((width, units)) / np.sqrt(units)).astype(np.float32)
        back = np.linalg.pinv(out.astype(np.float64)).astype(np.float32)
        hidden = f"{self.name}_hidden"
        return [self._node(0, given, hidden, out, like.ndim), self._node(1, hidden, made, back, like.ndim)]

    def _node(self, step: int, given: str, made: str, weight: Array, rank: int) -> onnx.NodeProto:
        name = f"{self.name}_weight_{step}"
        op_type = "MatMul"
        if self.convolutions:
            op_type, weight = "Conv", weight.T.reshape(*weight.T.shape, *[1] * (rank - 2))
        self.proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), name))
        return helper.make_node(op_type, [given, name], [made], f"{self.name}_{step}")


def _units(positions: int) -> int:
    """How many there are at each of so many positions."""
    return max(_LEAST_HIDDEN, min(_HIDDEN, _MAX_HIDDEN_BYTES // (4 * positions)))


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    copied.ir_version = max(copied.ir_version, _MIN_IR_VERSION)
    return copied


def _is_plain(value: Any) -> bool:
    """Whether it can be an initializer."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiubc"


def _is_wrappable(value: Any, convolutions: bool) -> bool:
    ranks = range(3, 6) if convolutions else range(1, 7)
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.float32
        and value.size > 0
        and value.ndim in ranks
        and value.shape[1 if convolutions else -1] <= _MAX_WIDTH
    )
