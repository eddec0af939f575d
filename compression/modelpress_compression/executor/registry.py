"""Where operators register themselves: (domain, operator) to builders, each for a range of opset versions.

A builder reads a node once and returns the function that runs it, so that nothing is parsed while the graph runs. The
function takes the node's inputs in order (None for those left out, trailing ones not at all) and returns one value, or
a tuple for several outputs; a list is a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelpress_compression.executor.site import Site

# Broadcasting as it is today began with opset 7.
FIRST_OPSET = 7
Function = Callable[..., Any]
Builder = Callable[["Site"], Function]


@dataclass(frozen=True)
class Operator:
    """One implementation, for opset versions `since` to `until` (both included; None: every later one).

    `deterministic`: equal inputs give equal outputs, so that constants may be folded through it.
    `carries_unsigned`: works on torch's uint16, uint32 and uint64 as they are, without arithmetic.
    """

    build: Builder
    since: int
    until: int | None
    deterministic: bool
    carries_unsigned: bool


_OPERATORS: dict[tuple[str, str], list[Operator]] = {}


def operator(
    *op_types: str,
    domain: str = "",
    since: int | None = None,
    until: int | None = None,
    deterministic: bool = True,
    carries_unsigned: bool = False,
) -> Callable[[Builder], Builder]:
    """Registers the builder of operators of a domain ("" is ONNX itself)."""
    first = since if since is not None else (1 if domain else FIRST_OPSET)

    def register(build: Builder) -> Builder:
        for op_type in op_types:
            entry = Operator(build, first, until, deterministic, carries_unsigned)
            _OPERATORS.setdefault((domain, op_type), []).append(entry)
        return build

    return register


def stateless(function: Function, *op_types: str, domain: str = "", since: int | None = None) -> None:
    """Registers operators without attributes: one function runs every node."""
    operator(*op_types, domain=domain, since=since)(lambda _: function)


def find(domain: str, op_type: str, version: int) -> Operator | None:
    """The implementation for a version of the domain's operator set."""
    for entry in _OPERATORS.get(("" if domain == "ai.onnx" else domain, op_type), ()):
        if entry.since <= version and (entry.until is None or version <= entry.until):
            return entry
    return None


def registered() -> frozenset[tuple[str, str]]:
    """Every (domain, operator) with an implementation of at least one version."""
    return frozenset(_OPERATORS)
