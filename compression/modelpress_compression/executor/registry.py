"""Where operators register themselves: (domain, operator) to builders, each for a range of opset versions.

A builder reads a node once and returns the function that runs it, so that nothing is parsed while the graph runs. The
function takes the node's inputs in order (None for those left out, trailing ones not at all) and returns one value, or
a tuple for several outputs; a list is a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir

from modelpress_compression.graph.read import label
from modelpress_compression.model import Model

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
    for entry in _OPERATORS.get((_plain(domain), op_type), ()):
        if entry.since <= version and (entry.until is None or version <= entry.until):
            return entry
    return None


def supported_operators() -> tuple[tuple[str, str], ...]:
    """(domain, operator) of everything that has an implementation of at least one version, sorted."""
    return tuple(sorted(_OPERATORS))


def opset_version(node: onnx_ir.Node, opsets: Mapping[str, int]) -> int:
    """The version of the node's operator set; `opsets`: the model's imports."""
    return node.version if node.version is not None else opsets.get(_plain(node.domain), 1)


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


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

    A form that an implemented operator does not support (`site.NotExecutableError`) shows only when the model is
    compiled.
    """
    found = []
    for node in model.nodes():
        version = opset_version(node, model.ir.opset_imports)
        if find(node.domain, node.op_type, version) is None:
            found.append(UnsupportedNode(label(node), node.op_type, node.domain or "ai.onnx", version))
    return tuple(found)
