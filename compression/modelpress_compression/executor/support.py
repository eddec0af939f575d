"""What a model has that the executor does not."""

from __future__ import annotations

from dataclasses import dataclass

from modelpress_compression.executor.ops import find, registered
from modelpress_compression.graph.read import label
from modelpress_compression.model import Model


@dataclass(frozen=True)
class UnsupportedNode:
    """A node without an implementation; `domain` "ai.onnx" is ONNX itself."""

    node: str
    op_type: str
    domain: str
    version: int

    def __str__(self) -> str:
        return f"{self.node} ({self.domain}.{self.op_type}, opset {self.version})"


def unsupported_nodes(model: Model) -> tuple[UnsupportedNode, ...]:
    """Nodes, subgraphs included, whose operator has no implementation in the version that the model imports.

    A form that an implemented operator does not support (see NotExecutableError) shows only when the model is compiled.
    """
    found = []
    for node in model.nodes():
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = node.version if node.version is not None else model.ir.opset_imports.get(domain, 1)
        if find(domain, node.op_type, version) is None:
            found.append(UnsupportedNode(label(node), node.op_type, domain or "ai.onnx", version))
    return tuple(found)


def supported_operators() -> tuple[tuple[str, str], ...]:
    """(domain, operator) of everything that has an implementation, sorted."""
    return tuple(sorted(registered()))
