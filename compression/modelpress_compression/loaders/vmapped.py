"""`torch.vmap` within a torch.export program, and what stands on it, as `associative_scan` does.

torch writes it as calls that open and close a level, and mark tensors as batches of it. Its decompositions run them:
what is left are operators on whole batches.
"""

from __future__ import annotations

import torch

_MODULE = "torch._functorch.predispatch"
VMAP_FUNCTIONS = frozenset(
    f"{_MODULE}.{name}"
    for name in (
        "lazy_load_decompositions",
        "_vmap_increment_nesting",
        "_vmap_decrement_nesting",
        "_add_batch_dim",
        "_remove_batch_dim",
    )
)


def on_batches(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without these calls, in operators of the core set; the same one where it has none."""
    modules = (module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule))
    targets = (node.target for module in modules for node in module.graph.nodes if node.op == "call_function")
    if not any(getattr(target, "__module__", "") == _MODULE for target in targets):
        return program
    decomposed: torch.export.ExportedProgram = program.run_decompositions()
    return decomposed
