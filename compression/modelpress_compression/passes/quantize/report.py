"""What a scheme collects while it works, for the pass's result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir

from modelpress_compression.graph.read import label
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult, Skip


@dataclass
class Findings:
    """`changes`: quantized nodes by operator. `skipped`: nodes left as they were, and why.

    `details`: figures of single layers. `notes`: sentences about the result, which nobody needs to act on.
    """

    changes: Counter[str] = field(default_factory=Counter)
    skipped: list[Skip] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: list[Mapping[str, str | int | float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, node: onnx_ir.Node, reason: str) -> None:
        self.skipped.append(Skip(label(node), f"{node.op_type}: {reason}"))

    def plus(self, other: Findings) -> Findings:
        """Both together."""
        return Findings(
            self.changes + other.changes,
            [*self.skipped, *other.skipped],
            [*self.warnings, *other.warnings],
            [*self.details, *other.details],
            [*self.notes, *other.notes],
        )

    def result(self, model: Model) -> PassResult:
        """What the pass returns."""
        return PassResult(
            model,
            dict(self.changes),
            tuple(self.skipped),
            tuple(self.warnings),
            tuple(self.details),
            tuple(self.notes),
        )
