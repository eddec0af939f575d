"""What all rewrites share: `match` one node, change the graph or say why not.

A rewrite is asked once for every node of the operators that it anchors on, in the graph's order. It answers FIRED, or
None (this is no candidate), or a sentence that says why a candidate was left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, cast

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.read import (
    MICROSOFT,
    constant_array,
    graph_of,
    is_op,
    label,
    only_consumer,
    value_names,
)
from modelpress_compression.inputs import Array
from modelpress_compression.passes.base import Skip, is_excluded

FIRED: Final = True
# A report with a line for each of thousands of nodes helps no one.
MAX_SKIPS_PER_REWRITE = 50

Outcome = bool | str | None
# Numbers that rewrites calculate with.
Floats = NDArray[np.floating[Any]]


@dataclass
class Tally:
    """How often each rewrite fired, and why candidates were left alone."""

    fired: Counter[str] = field(default_factory=Counter)
    skipped: list[Skip] = field(default_factory=list)


class Rewrite(Protocol):
    """One kind of change. `name`: its key in `PassResult.changes`; `op_types`: operators of ONNX that it anchors on."""

    name: ClassVar[str]
    op_types: ClassVar[frozenset[str]]

    def __call__(self, node: onnx_ir.Node, scope: Scope) -> Outcome:
        """Changes the graph around `node` and returns FIRED, or returns None or the reason why not."""
        ...


class Scope:
    """The model under change, with the nodes that the user wants left alone."""

    def __init__(self, model: onnx_ir.Model, exclude: tuple[str, ...] = ()) -> None:
        self.model = model
        self.opset: int = model.opset_imports.get("", 0)
        self._exclude = exclude
        self._names = set(value_names(model))

    def excluded(self, node: onnx_ir.Node) -> bool:
        return bool(self._exclude) and is_excluded(node.name, self._exclude)

    def producer(self, value: onnx_ir.Value | None, *op_types: str, domain: str = "") -> onnx_ir.Node | None:
        """The node that makes the value, if it is one of these operators and may be changed."""
        node = None if value is None else value.producer()
        return node if node is not None and is_op(node, *op_types, domain=domain) and not self.excluded(node) else None

    def inner(self, value: onnx_ir.Value | None, *op_types: str, domain: str = "") -> onnx_ir.Node | None:
        """As `producer`, and nobody but one node sees the value: after the rewrite it can be gone."""
        node = self.producer(value, *op_types, domain=domain)
        return node if node is not None and value is not None and only_consumer(value) is not None else None

    def new_constant(self, like: str, array: Array, graph: onnx_ir.Graph) -> onnx_ir.Value:
        """An initializer of `graph` with a new name that starts with `like`."""
        tensor = onnx_ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=self._unique(like))
        value = onnx_ir.Value(
            name=tensor.name,
            type=onnx_ir.TensorType(tensor.dtype),
            shape=onnx_ir.Shape(array.shape),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[onnx_ir.Value | None],
        attributes: Iterable[onnx_ir.Attr] | Mapping[str, object] = (),
        *,
        like: onnx_ir.Node,
        domain: str = "",
        num_outputs: int = 1,
    ) -> onnx_ir.Node:
        """A node in the place of `like`: it keeps that node's name, by which users exclude and find it."""
        if isinstance(attributes, Mapping):
            attributes = onnx_ir.convenience.convert_attributes(attributes)  # type: ignore[arg-type]
        made = onnx_ir.Node(domain, op_type, inputs, tuple(attributes), num_outputs=num_outputs, name=like.name)
        for output in made.outputs:
            output.name = self._unique(like.outputs[0].name or op_type)
            output.type = like.outputs[0].type
        if domain == MICROSOFT:
            self.model.graph.opset_imports.setdefault(MICROSOFT, 1)
        return made

    def replace(self, last: onnx_ir.Node, old: Sequence[onnx_ir.Node], new: Sequence[onnx_ir.Node]) -> None:
        """Puts `new` in the place of `last`, whose one output the last of them makes now, and removes `old`.

        `old` is given from the first to the last; those whose outputs are still used stay.
        """
        graph = graph_of(last)
        # onnxruntime refuses two nodes of one name; the first keeps that of the node it stands for.
        for number, node in enumerate(new):
            if number and node.name and any(node.name == other.name for other in new[:number]):
                node.name = f"{node.name}.{number}"
        onnx_ir.convenience.replace_nodes_and_values(
            graph, last, [last], list(new), [last.outputs[0]], [new[-1].outputs[0]]
        )
        self.remove_unused(node for node in reversed(list(old)) if node is not last)

    def bypass(self, node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
        """Removes a node that passes `value` on; False where that would cost the graph one of its outputs' names."""
        output = node.outputs[0]
        graph = graph_of(node)
        if output.is_graph_output():
            producer = value.producer()
            if producer is None or value.is_graph_output() or producer.graph is not graph:
                return False
            value.name, output.name = output.name, None
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        return True

    def remove_unused(self, nodes: Iterable[onnx_ir.Node]) -> None:
        for node in nodes:
            if node.graph is not None and not any(o.uses() or o.is_graph_output() for o in node.outputs):
                node.graph.remove(node, safe=True)

    def _unique(self, like: str) -> str:
        name, number = like, 0
        while name in self._names:
            number += 1
            name = f"{like}_{number}"
        self._names.add(name)
        return name


def float_array(value: onnx_ir.Value | None) -> Floats | None:
    """A constant of float16, float32 or float64 numbers; others are not ours to calculate with."""
    array = constant_array(value)
    if array is None or array.dtype not in (np.float16, np.float32, np.float64):
        return None
    return cast(Floats, array)


def apply(rewrites: Sequence[Rewrite], scope: Scope, tally: Tally) -> bool:
    """Asks each rewrite about each node once, graph by graph; whether anything fired."""
    before = tally.fired.total()
    for rewrite in rewrites:
        reasons = 0
        for node in list(scope.model.graph.all_nodes()):
            # A rewrite may have removed nodes that lie ahead of it.
            if node.graph is None or not is_op(node, *rewrite.op_types) or scope.excluded(node):
                continue
            name = label(node)
            outcome = rewrite(node, scope)
            if outcome is FIRED:
                tally.fired[rewrite.name] += 1
            elif isinstance(outcome, str):
                reasons += 1
                if reasons <= MAX_SKIPS_PER_REWRITE:
                    tally.skipped.append(Skip(name, outcome))
    return tally.fired.total() > before
