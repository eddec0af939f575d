"""Attention of a torch.export program in plain operators, where torch's exporter stops at what it makes of it.

The exporter decomposes a program twice. In the first step, attention is an operator of one backend, whose result lies
in memory as that backend leaves it, and a reshape of it, permuted, becomes a view; in the second, attention becomes
products, whose result lies otherwise, and there is no such view (torch 2.13, relative positions of SAM). As products
from the start, both steps see the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_PRODUCTS = torch.ops.aten._scaled_dot_product_attention_math.default


def attention_of(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """Its nodes that are attention."""
    return list(program.graph.find_nodes(op="call_function", target=_ATTENTION))


def write_out(program: torch.export.ExportedProgram, attention: Sequence[torch.fx.Node]) -> None:
    """Rewrites these nodes of the program in place."""
    graph = program.graph
    for node in attention:
        with graph.inserting_before(node):
            both = graph.call_function(_PRODUCTS, node.args, dict(node.kwargs))
            first = graph.call_function(operator.getitem, (both, 0))
        first.meta = dict(node.meta)
        node.replace_all_uses_with(first)
        graph.erase_node(node)
    program.graph_module.recompile()
