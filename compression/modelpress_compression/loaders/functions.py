"""ONNX functions: how many nodes they are when written out.

Functions call functions. Twenty-six of them, each calling the one before twice, are 1.6 KB in a file and 67 million
nodes in any tool that inlines them; a function that calls itself never ends.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from modelpress_compression.errors import RejectedModelError

MAX_EXPANDED_NODES = 500_000

_Key = tuple[str, str, str]
_Functions = dict[_Key, onnx.FunctionProto]


def check_functions(proto: onnx.ModelProto) -> int:
    """Number of nodes after inlining. Raises RejectedModelError (finding=FUNCTION_BOMB or RECURSIVE_FUNCTION)."""
    functions: _Functions = {(item.domain, item.name, item.overload): item for item in proto.functions}
    sizes: dict[_Key, int] = {}
    for key in functions:
        _size(key, functions, sizes)
    total = sum(sizes.get(call, 1) for call in _calls(proto.graph.node))
    if total > MAX_EXPANDED_NODES:
        raise _too_many(total)
    return total


def _too_many(total: int) -> RejectedModelError:
    return RejectedModelError(
        f"The model has {total} nodes when its functions are written out; at most {MAX_EXPANDED_NODES} are read.",
        finding="FUNCTION_BOMB",
    )


def _size(start: _Key, functions: _Functions, sizes: dict[_Key, int]) -> None:
    """Fills in sizes[start], depth first without recursion: the nesting is as deep as the file's author likes."""
    stack, open_calls = [start], set[_Key]()
    while stack:
        key = stack[-1]
        if key in sizes:
            open_calls.discard(stack.pop())
            continue
        open_calls.add(key)
        calls = list(_calls(functions[key].node))
        pending = {call for call in calls if call in functions and call not in sizes}
        if pending & open_calls:
            raise RejectedModelError(
                f"The model's function {key[1][:80]!r} calls itself; ONNX does not allow that.",
                finding="RECURSIVE_FUNCTION",
            )
        if pending:
            stack.extend(pending)
            continue
        sizes[key] = sum(sizes.get(call, 1) for call in calls)
        if sizes[key] > MAX_EXPANDED_NODES:
            raise _too_many(sizes[key])


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterable[_Key]:
    for node in nodes:
        yield node.domain, node.op_type, node.overload
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _calls(graph.node)
