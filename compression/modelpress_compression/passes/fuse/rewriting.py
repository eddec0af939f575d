"""What all rewrites share: `match` one node, change the graph or say why not.

A rewrite is asked once for every node of the operators that it anchors on, in the graph's order. It answers FIRED, or
None (this is no candidate), or a sentence that says why a candidate was left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, cast

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.read import (
    constant_array,
    constant_scalar,
    constant_tensor,
    is_op,
    label,
    only_consumer,
    rank,
)
from modelpress_compression.model import Model
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


class Scope(Editor):
    """The model under change, with the nodes that the user wants left alone."""

    def __init__(self, model: Model, exclude: tuple[str, ...] = ()) -> None:
        super().__init__(model)
        self.opset = model.opset
        self._exclude = exclude

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

    def follower(self, node: onnx_ir.Node, *op_types: str) -> onnx_ir.Node | None:
        """The node that alone uses the first output, if it is one of these operators, in the same graph, and may be
        changed."""
        user = only_consumer(node.outputs[0])
        if not is_op(user, *op_types) or user.graph is not node.graph or self.excluded(user):
            return None
        return user


def scalar_beside(constant: onnx_ir.Value | None, varying: onnx_ir.Value | None) -> float | None:
    """The number of a constant of one element that adds no axes to the operand beside it."""
    tensor = constant_tensor(constant)
    return None if tensor is None or len(tensor.shape) > (rank(varying) or 0) else constant_scalar(constant)


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
        for node in list(scope.ir.graph.all_nodes()):
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
