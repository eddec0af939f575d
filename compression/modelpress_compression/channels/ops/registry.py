"""Where rules for operators register themselves."""

from __future__ import annotations

from collections.abc import Callable

from modelpress_compression.channels.tracer import Rule

RULES: dict[tuple[str, str], Rule] = {}


def rule(*op_types: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers a rule for operators of a domain ("" is ONNX itself)."""

    def register(function: Rule) -> Rule:
        for op_type in op_types:
            RULES[domain, op_type] = function
        return function

    return register
