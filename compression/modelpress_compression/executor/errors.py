"""What the executor refuses."""

from __future__ import annotations

from modelpress_compression.errors import UnsupportedOperatorError


class NotExecutableError(UnsupportedOperatorError):
    """The executor has no implementation of an operator, of its version, or of the form that a node has."""

    def __init__(self, op_type: str, domain: str, version: int, node: str, detail: str = "") -> None:
        name = f"{domain or 'ai.onnx'}.{op_type}"
        why = detail or "it has no implementation of this operator"
        super().__init__(
            f"Node {node!r}: the differentiable executor cannot run {name} of opset {version}: {why}. "
            f"Use a step that does not train, or export the model with another opset.",
            op_type=op_type,
            domain=domain or "ai.onnx",
            version=str(version),
            node=node,
        )
