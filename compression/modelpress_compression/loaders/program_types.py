"""Programs in bfloat16, which onnxruntime does not compute on a CPU: the same program in float32.

Every bfloat16 is a float32, so weights keep their values; casts to bfloat16 become casts to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

BFLOAT16_WARNING = (
    "The program computes in bfloat16, which onnxruntime does not on a CPU; the ONNX model computes in float32, on the "
    "same weights, and its inputs and outputs are float32."
)


def widen(program: torch.export.ExportedProgram) -> list[str]:
    """Makes float32 of all bfloat16, in place. Returns what to say of it."""
    changed = False
    for held in (program.state_dict, program.constants):
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
                held[name] = _as_before(value, value.float())
                changed = True
    for graph_module in _graph_modules(program):
        for node in graph_module.graph.nodes:
            values = (node.args, node.kwargs, node.meta.get("val"))
            if any(_is_narrow(leaf) for leaf in pytree.tree_leaves(values)):
                changed = True
                node.args, node.kwargs = pytree.tree_map(_wider, (node.args, node.kwargs))
                node.meta["val"] = pytree.tree_map(_wider, node.meta.get("val"))
        graph_module.recompile()
    return [BFLOAT16_WARNING] if changed else []


def _graph_modules(program: torch.export.ExportedProgram) -> Iterator[torch.fx.GraphModule]:
    yield from (module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule))


def _is_narrow(leaf: Any) -> bool:
    return leaf is torch.bfloat16 or (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bfloat16)


def _wider(leaf: Any) -> Any:
    if not _is_narrow(leaf):
        return leaf
    if leaf is torch.bfloat16:
        return torch.float32
    mode = getattr(leaf, "fake_mode", None)  # what the graph says of its values are tensors without numbers
    if mode is None:
        return leaf.float()
    with mode:
        return leaf.float()


def _as_before(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new
