"""TorchScript archives: run by torch's own interpreter, exported, and checked against the original by numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelpress_compression.agreement import ATOL, FLOAT16_ATOL, QUANTIZED_ATOL
from modelpress_compression.archive import Archive
from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.loaders.checked_copy import checked_copy
from modelpress_compression.loaders.exporters import OF_ONE_RUN, SCRIPT_EXPORTERS
from modelpress_compression.loaders.exporting import Exporter, export_checked
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.hints import suggest_inputs
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.script_check import check_script
from modelpress_compression.loaders.script_graph import (
    holds_bfloat16,
    holds_quantized,
    in_plain_operators,
    kinds_of,
)
from modelpress_compression.loaders.script_inputs import arguments, bind, returns_list, spread
from modelpress_compression.loaders.source import Source
from modelpress_compression.loaders.torch_run import REFUSALS, runner, to_tensors
from modelpress_compression.loaders.trials import Run, find_trials, first_line
from modelpress_compression.loaders.vision_ops import vision_operators
from modelpress_compression.model import Model, Provenance
from modelpress_compression.specs import TensorSpec

STATE_WARNING = (
    "The module keeps state between calls (it assigns to {names}); the ONNX model starts every call from the state "
    "that was saved. Export it with the state as input and output to keep it."
)
QUANTIZED_WARNING = (
    "The module is quantized already; its layers became float operators on the values that their weights stand for, "
    "with QuantizeLinear and DequantizeLinear where results were rounded to a fixed grid. Where a sum is rounded the "
    "other way, a result is a step of 8 bits away. Upload the float model for the best result."
)
BFLOAT16_WARNING = (
    "The module computes in bfloat16, which onnxruntime does not on a CPU; the ONNX model computes in float32, on the "
    "same weights, and its inputs and outputs are float32."
)
BRANCH_WARNING = (
    "The module has branches or loops that torch's exporter cannot write; the ONNX model has those that were taken for "
    "the inputs it was converted with. It was compared with the module at several sizes; where your inputs may take "
    "another branch, compare them as well."
)
_BRANCHES = frozenset({"prim::If", "prim::Loop"})
# torch's default for x86 computes other numbers in transposed convolutions than its weights stand for.
_QUANTIZED_ENGINE = "fbgemm"


def load_torchscript(source: Source, specs: Sequence[TensorSpec]) -> Model:
    """The module as a `Model`. `specs` are required: the file records no inputs. Raises as `loaders.load`."""
    with Archive.open(source.main, "The TorchScript archive") as archive:
        check_script(archive)
        with checked_copy(archive) as path, vision_operators():
            return _load(path, specs, source.provenance("torchscript"))


def _load(path: Path, specs: Sequence[TensorSpec], provenance: Provenance) -> Model:
    module = read_script(path)
    arguments(module)  # refuses what has no `forward`, before its graph is looked at
    if not specs:
        raise InvalidInputsError(suggest_inputs(module, path))
    wide, quantized, state = holds_bfloat16(module), holds_quantized(module), _assigned(module)
    binding = bind(module, [_without_bfloat16(spec) for spec in specs])

    def original() -> torch.jit.ScriptModule:
        return binding.wrap(read_script(path))

    # Every bfloat16 is a float32, so that the module in float32 is the better of the two to repeat.
    run = _Runner((lambda: in_plain_operators(original())) if wide else original, stateful=bool(state))
    trials = find_trials(run, binding.specs, REFUSALS)

    def plain() -> torch.jit.ScriptModule:
        module, given = original(), list(to_tensors(trials.runs[0].feeds).values())
        module = spread(module, given) if len(trials.runs[0].expected) > 1 and returns_list(module) else module
        return in_plain_operators(module, given)

    atol = QUANTIZED_ATOL if quantized else FLOAT16_ATOL if _holds_float16(module) else ATOL
    lost: dict[Exporter, str] = (
        dict.fromkeys(OF_ONE_RUN, BRANCH_WARNING) if not _BRANCHES.isdisjoint(kinds_of(module)) else {}
    )
    model = export_checked(SCRIPT_EXPORTERS, plain, binding.specs, trials, provenance, atol=atol, warnings=lost)
    warnings = [BFLOAT16_WARNING] if wide or any(spec.dtype == "bfloat16" for spec in specs) else []
    warnings += [QUANTIZED_WARNING] if quantized else []
    warnings += [STATE_WARNING.format(names=", ".join(state))] if state else []
    return model.with_warnings(*warnings)


def _without_bfloat16(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec


def read_script(path: Path) -> torch.jit.ScriptModule:
    """The module in evaluation mode, on the CPU. Raises UnsupportedFormatError."""
    try:
        with quiet(), _quantized_engine():
            module: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
                str(path), map_location="cpu"
            )
            module.eval()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise refused("SCRIPT_VERSION", version=torch.__version__, reason=first_line(error)) from error
    return module


@contextlib.contextmanager
def _quantized_engine() -> Iterator[None]:
    """For reading, which is when quantized weights are packed for an engine."""
    backend: Any = torch.backends.quantized
    before = backend.engine
    if _QUANTIZED_ENGINE in backend.supported_engines:
        backend.engine = _QUANTIZED_ENGINE
    try:
        yield
    finally:
        backend.engine = before


class _Runner:
    """Runs the original; a stateful one is read anew for every run, so that each starts from the saved state."""

    def __init__(self, read: Callable[[], torch.jit.ScriptModule], *, stateful: bool) -> None:
        self._read, self._stateful = read, stateful
        self._run = self._fresh()

    def _fresh(self) -> Run:
        return runner(self._read())

    def __call__(self, feeds: Feeds) -> list[Array]:
        if self._stateful:
            self._run = self._fresh()
        with quiet():
            return self._run(feeds)


def _holds_float16(module: torch.jit.ScriptModule) -> bool:
    return any(tensor.dtype == torch.float16 for tensor in (*module.parameters(), *module.buffers()))


def _assigned(module: torch.jit.ScriptModule) -> list[str]:
    """Attributes that `forward` assigns to, methods that it calls included."""
    graph: Any = module.inlined_graph
    return sorted({node.s("name") for node in graph.findAllNodes("prim::SetAttr", recurse=True)})
