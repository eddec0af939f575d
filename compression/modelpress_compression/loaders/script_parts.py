"""Writes into parts of tensors, `x[:, 1:3] = y`, in a frozen TorchScript graph, as tensors put together from pieces.

torch's exporter writes each of them as a scatter to computed places: dozens of nodes, which take more of a file than
the weights of a small network. Where the place is a constant of the graph, a few are enough:

    x[a:b] = y      ->   x = cat(x[:a], y, x[b:])
    x[a:-b] = y     ->   x = cat(x[:a], y, x[a:][-b:])      x may be shorter than a + b
    x[i] = y        ->   x = cat(x[:i], unsqueeze(y), x[i + 1:])

and for a part of a part the same, from the innermost out. What reads x behind the write reads the new tensor, and so
does what reads a view of x that was taken before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from modelpress_compression.loaders.script_graph import TO_THE_END

_PARTS = frozenset({"aten::slice", "aten::select"})
_VIEWS = _PARTS | {f"aten::{name}" for name in ("permute", "squeeze", "t", "transpose", "unsqueeze", "view")}


def write_anew(graph: Any) -> None:
    """Rewrites, in place, what stands in the graph itself; writes within branches and loops stay as they are."""
    for node in [node for node in graph.nodes() if node.kind() in _WRITES]:
        views = _views(node.inputsAt(0))
        if not views or not all(map(_is_known, views)):
            continue
        with graph.insert_point_guard(node):
            value = _WRITES[node.kind()](graph, node)
            for view in reversed(views):
                value = _around(graph, view, value)
            node.output().replaceAllUsesWith(node.inputsAt(0))
            _replace_behind(graph, node, views[0].inputsAt(0), value)
        node.destroy()


def _replace_behind(graph: Any, node: Any, old: Any, new: Any) -> None:
    """What reads a tensor behind a node, or a view that was taken of it before, reads the new one."""
    for view in [use.user for use in old.uses() if use.user.kind() in _VIEWS and use.user.isBefore(node)]:
        if _is_read_behind(view.output(), node):
            again = _made(graph, view.kind(), new, *list(view.inputs())[1:])
            _replace_behind(graph, node, view.output(), again)
    old.replaceAllUsesAfterNodeWith(node, new)


def _is_read_behind(value: Any, node: Any) -> bool:
    users = [use.user for use in value.uses()]
    return any(user.isAfter(node) or (user.kind() in _VIEWS and _is_read_behind(user.output(), node)) for user in users)


def _views(value: Any) -> list[Any]:
    """The nodes that take a part of a tensor, a part of that, and so on up to `value`."""
    found: list[Any] = []
    while value.node().kind() in _PARTS:
        found.insert(0, value.node())
        value = value.node().inputsAt(0)
    return found


def _is_known(view: Any) -> bool:
    """Whether the part is at a place that the graph says, and without gaps."""
    if any(value.node().kind() != "prim::Constant" for value in list(view.inputs())[1:]):
        return False
    if view.kind() == "aten::select":
        return True
    first, last = _bounds(view)
    return view.inputsAt(4).toIValue() == 1 and (0 <= first < last or first < last < 0 or last < 0 <= first)


def _bounds(view: Any) -> tuple[int, int]:
    """Where a part begins and ends along its axis; negative from the end."""
    if view.kind() == "aten::select":
        index: int = view.inputsAt(2).toIValue()
        return index, index + 1 or TO_THE_END
    first, last = view.inputsAt(2).toIValue(), view.inputsAt(3).toIValue()
    return first or 0, TO_THE_END if last is None else last


def _around(graph: Any, view: Any, value: Any) -> Any:
    """What the part is of, with `value` in the part's place."""
    whole, axis = view.inputsAt(0), view.inputsAt(1)
    first, last = _bounds(view)
    if view.kind() == "aten::select":
        value = _made(graph, "aten::unsqueeze", value, axis)
    pieces = [value]
    if first:
        pieces.insert(0, _made(graph, "aten::slice", whole, axis, 0, first, 1))
    if last != TO_THE_END:
        behind = _made(graph, "aten::slice", whole, axis, first, TO_THE_END, 1) if first > 0 > last else whole
        pieces.append(_made(graph, "aten::slice", behind, axis, last, TO_THE_END, 1))
    if len(pieces) == 1:
        return value
    listed = _made(graph, "prim::ListConstruct", *pieces)
    listed.setType(torch._C.ListType.ofTensors())
    return _made(graph, "aten::cat", listed, axis)


def _made(graph: Any, kind: str, *inputs: Any) -> Any:
    """The output of a new node; what is no value of the graph among its inputs becomes a constant."""
    values = [item if isinstance(item, torch._C.Value) else graph.insertConstant(item) for item in inputs]
    node = graph.create(kind, values, 1)
    graph.insertNode(node)
    return node.output()


def _copied(graph: Any, node: Any) -> Any:
    """The value of a write, in the type and the shape of the part."""
    part, value = list(node.inputs())[:2]
    if not isinstance(value.type(), torch._C.TensorType):
        return _made(graph, "aten::full_like", part, value, *[None] * 5)
    return _made(graph, "aten::expand_as", _made(graph, "aten::type_as", value, part), part)


def _zeros(graph: Any, node: Any) -> Any:
    return _made(graph, "aten::zeros_like", node.inputsAt(0), *[None] * 5)


def _computed(graph: Any, node: Any) -> Any:
    """What an operator such as `add_` would write; the part's shape is the larger one, its type the one that stays."""
    result = _made(graph, node.kind().removesuffix("_"), *node.inputs())
    return _made(graph, "aten::type_as", result, node.inputsAt(0))


_COMPUTED = ("add", "sub", "mul", "div", "relu", "sigmoid", "tanh", "exp", "neg", "clamp", "masked_fill")
_WRITES: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "aten::copy_": _copied,
        "aten::fill_": _copied,
        "aten::zero_": _zeros,
        **{f"aten::{name}_": _computed for name in _COMPUTED},
    }
)
