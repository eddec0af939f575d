"""TorchScript archives: run by torch's own interpreter, exported, and checked against the original by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modelpress_compression.agreement import ATOL, QUANTIZED_ATOL
from modelpress_compression.archive import Archive
from modelpress_compression.errors import InvalidInputsError, UnsupportedFormatError
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.loaders.checked_copy import checked_copy
from modelpress_compression.loaders.exporters import SCRIPT_EXPORTERS
from modelpress_compression.loaders.exporting import export_checked
from modelpress_compression.loaders.hints import suggest_inputs
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.script_check import check_script
from modelpress_compression.loaders.script_inputs import Binding, bind
from modelpress_compression.loaders.source import Source
from modelpress_compression.loaders.torch_run import REFUSALS, runner
from modelpress_compression.loaders.trials import Run, find_trials, first_line
from modelpress_compression.loaders.vision_ops import vision_operators
from modelpress_compression.model import Model, Provenance
from modelpress_compression.specs import TensorSpec

STATE_WARNING = (
    "The module keeps state between calls (it assigns to {names}); the ONNX model starts every call from the state "
    "that was saved. Export it with the state as input and output to keep it."
)
QUANTIZED_WARNING = (
    "The module is quantized already; its layers became QuantizeLinear and DequantizeLinear around float operators. "
    "Where a sum is rounded the other way, a result is a step of 8 bits away. Upload the float model for the best "
    "result."
)


def load_torchscript(source: Source, specs: Sequence[TensorSpec]) -> Model:
    """The module as a `Model`. `specs` are required: the file records no inputs. Raises as `loaders.load`."""
    with Archive.open(source.main, "The TorchScript archive") as archive:
        check_script(archive)
        with checked_copy(archive) as path, vision_operators():
            return _load(path, specs, source.provenance("torchscript"))


def _load(path: Path, specs: Sequence[TensorSpec], provenance: Provenance) -> Model:
    module = read_script(path)
    if not specs:
        raise InvalidInputsError(suggest_inputs(module, path))
    binding = bind(module, specs)
    state = _assigned(module)
    trials = find_trials(_Runner(path, binding, stateful=bool(state)), binding.specs, REFUSALS)
    quantized = _is_quantized(module)
    model = export_checked(
        SCRIPT_EXPORTERS,
        lambda: binding.wrap(read_script(path)),
        binding.specs,
        trials,
        provenance,
        atol=QUANTIZED_ATOL if quantized else ATOL,
    )
    model = model.with_warnings(QUANTIZED_WARNING) if quantized else model
    return model.with_warnings(STATE_WARNING.format(names=", ".join(state))) if state else model


def read_script(path: Path) -> torch.jit.ScriptModule:
    """The module in evaluation mode, on the CPU. Raises UnsupportedFormatError."""
    try:
        with quiet():
            module: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
                str(path), map_location="cpu"
            )
            module.eval()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedFormatError(
            f"torch {torch.__version__} cannot read the TorchScript archive ({first_line(error)}); "
            f"save it again with torch.jit.save."
        ) from error
    return module


class _Runner:
    """Runs the original; a stateful one is read anew for every run, so that each starts from the saved state."""

    def __init__(self, path: Path, binding: Binding, *, stateful: bool) -> None:
        self._path, self._binding, self._stateful = path, binding, stateful
        self._run = self._fresh()

    def _fresh(self) -> Run:
        return runner(self._binding.wrap(read_script(self._path)))

    def __call__(self, feeds: Feeds) -> list[Array]:
        if self._stateful:
            self._run = self._fresh()
        with quiet():
            return self._run(feeds)


def _is_quantized(module: torch.jit.ScriptModule) -> bool:
    graph: Any = module.inlined_graph
    return "quantized::" in str(graph) or "aten::quantize_per" in str(graph)


def _assigned(module: torch.jit.ScriptModule) -> list[str]:
    """Attributes that `forward` assigns to, methods that it calls included."""
    graph: Any = module.inlined_graph
    return sorted({node.s("name") for node in graph.findAllNodes("prim::SetAttr", recurse=True)})
