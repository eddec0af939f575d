"""What a scheme collects while it works, for the pass's result."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx_ir

from modelpress_compression.passes.base import Skip
from modelpress_compression.passes.quantize.edit import label


@dataclass
class Findings:
    """`changes`: quantized nodes by operator. `skipped`: nodes left as they were, and why."""

    changes: Counter[str] = field(default_factory=Counter)
    skipped: list[Skip] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def skip(self, node: onnx_ir.Node, reason: str) -> None:
        self.skipped.append(Skip(label(node), f"{node.op_type}: {reason}"))
