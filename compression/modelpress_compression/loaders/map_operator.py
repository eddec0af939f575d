"""torch's `map` of a torch.export program as a `scan` that carries nothing, for which torch's exporter has ONNX.

map_impl(body, [xs...], [others...])         ys[i] = body(xs[i]..., others...)
scan(body, [], [xs...], (others...))         the same: the carry comes first in what the body takes and gives
"""

from __future__ import annotations

import torch

_MAP = torch.ops.higher_order.map_impl
_SCAN = torch.ops.higher_order.scan


def write_maps_as_scans(program: torch.export.ExportedProgram) -> None:
    """Rewrites all of them in place, those within bodies and branches too."""
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        maps = list(module.graph.find_nodes(op="call_function", target=_MAP))
        for node in maps:
            body, rows, others = node.args
            node.target, node.args = _SCAN, (body, [], rows, tuple(others))
        if maps:
            module.recompile()
