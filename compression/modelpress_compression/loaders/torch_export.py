"""torch.export archives (.pt2): checked, loaded, exported, and checked against the program by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelpress_compression.archive import Archive
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.loaders.checked_copy import checked_copy
from modelpress_compression.loaders.complex_numbers import as_pairs, holds_complex
from modelpress_compression.loaders.expert_ops import expert_operators, take_products
from modelpress_compression.loaders.exporters import ExportRequest, export_plain, export_program
from modelpress_compression.loaders.exporting import export_checked
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.map_operator import write_maps_as_scans
from modelpress_compression.loaders.plain_attention import attention_of, write_out
from modelpress_compression.loaders.program_check import check_archive
from modelpress_compression.loaders.program_inputs import match_specs, number_inputs, program_specs, tied_sizes
from modelpress_compression.loaders.program_state import output_name, without_state
from modelpress_compression.loaders.program_types import widen
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.source import Source
from modelpress_compression.loaders.torch_run import REFUSALS, flatten, to_tensors
from modelpress_compression.loaders.trials import Run, find_trials, first_line
from modelpress_compression.loaders.vmapped import on_batches
from modelpress_compression.model import Model, Provenance
from modelpress_compression.specs import TensorSpec

# Arguments of operators that say "as in training".
_TRAINING_ARGUMENTS = ("train", "training", "use_input_stats")
_STATISTICS = "running_mean"


def load_torch_export(source: Source, specs: Sequence[TensorSpec]) -> Model:
    """The program as a `Model`. Raises as `loaders.load`."""
    with Archive.open(source.main, "The torch.export archive") as archive:
        checked = check_archive(archive)
        with checked_copy(archive, checked.pickled, checked.replaced) as path, expert_operators():
            return convert_program(_read(path), specs, source.provenance("torch_export"), checked.outputs)


def _read(path: Path) -> torch.export.ExportedProgram:
    try:
        with quiet():
            program = torch.export.load(str(path))
            _forget_ranges_of_expressions(program)
            return on_batches(program)
    except Exception as error:
        raise refused("PROGRAM_VERSION", version=torch.__version__, reason=first_line(error)) from error


def _forget_ranges_of_expressions(program: torch.export.ExportedProgram) -> None:
    """torch 2.13 counts a dimension such as 2*b among its symbols when it reads a program, where its exporter stops.

    The range of an expression follows from those of its symbols.
    """
    for node in program.graph.nodes:
        environment = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if environment is None:
            continue
        for key in [key for key in environment.var_to_range if not key.is_symbol]:
            del environment.var_to_range[key]
        return  # all values of a program share one


def convert_program(
    program: torch.export.ExportedProgram,
    specs: Sequence[TensorSpec],
    provenance: Provenance,
    labels: Sequence[str | None] = (),
) -> Model:
    """A program with flat inputs and outputs as a `Model`. Raises as `loaders.load`.

    `specs`, where given, name the dynamic dimensions, and those buffers that shall be inputs and outputs. `labels`:
    names for its outputs, None for those without.
    """
    take_products(program)
    warnings = [*_to_evaluation(program), *widen(program)]
    specs = [replace(spec, dtype="float32") if spec.dtype == "bfloat16" else spec for spec in specs]
    stateless = without_state(program, [spec.name for spec in specs])
    program = stateless.program
    own = program_specs(program, stateless.state)
    specs = match_specs(own, specs) if specs else own
    with quiet():
        run = program_runner(program)
    refusals = (*REFUSALS, torch.fx.experimental.symbolic_shapes.ConstraintViolationError)
    trials = find_trials(run, specs, refusals, tied_sizes(program, specs))

    def export_dynamo(request: ExportRequest) -> Path:
        return export_program(program, request, "program.onnx")

    write_maps_as_scans(program)  # `run` has a copy of its own, as it was
    attention = attention_of(program)

    def export_products(request: ExportRequest) -> Path:
        write_out(program, attention)
        return export_program(program, request, "products.onnx")

    def export_pairs(request: ExportRequest) -> Path:
        return export_program(as_pairs(program), request, "pairs.onnx")

    exporters = (
        export_dynamo,
        *([export_products] if attention else []),
        *([export_pairs] if holds_complex(program) else []),
        export_plain,
    )
    outputs = [*labels, *(output_name(buffer) for buffer in stateless.state.values())]
    model = export_checked(exporters, lambda: _Flat(program), specs, trials, provenance, labels=outputs)
    return model.with_warnings(*warnings, *stateless.warnings)


def program_runner(program: torch.export.ExportedProgram) -> Run:
    """`feeds -> outputs` of the program; feeds in the order of its user inputs."""
    module = _Flat(program)

    def run(feeds: Feeds) -> list[Array]:
        with torch.no_grad(), quiet():
            return flatten(module(*to_tensors(feeds).values()))

    return run


class _Flat(torch.nn.Module):
    """Takes tensors of no dimensions where the program takes numbers, and has the modes that exporters switch."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self._numbers = number_inputs(program)
        self.inner = program.module()

    def forward(self, *tensors: torch.Tensor) -> Any:
        pairs = zip(tensors, self._numbers, strict=True)
        return self.inner(*(tensor.item() if number else tensor for tensor, number in pairs))

    def train(self, mode: bool = True) -> _Flat:
        """A program has no modes."""
        return self


def _to_evaluation(program: torch.export.ExportedProgram) -> list[str]:
    """Turns dropout and batch normalization to inference, in place; a program has no eval() for that."""
    changed: set[str] = set()
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
            arguments = [argument.name for argument in schema.arguments] if schema else []
            if _has_no_statistics(node, arguments):
                continue  # it normalizes by its input's own ones in inference as well, as standardized weights are
            for position, argument in enumerate(arguments):
                if argument in _TRAINING_ARGUMENTS and _switch_off(node, position, argument):
                    changed.add(str(node.target).removeprefix("aten.").removesuffix(".default"))
        module.recompile()
    if not changed:
        return []
    return [f"The program was exported in training mode; {', '.join(sorted(changed))} were switched to inference."]


def _has_no_statistics(node: torch.fx.Node, arguments: Sequence[str]) -> bool:
    """Whether a normalization is given no running ones."""
    if _STATISTICS not in arguments:
        return False
    position = arguments.index(_STATISTICS)
    given = node.args[position] if position < len(node.args) else node.kwargs.get(_STATISTICS)
    return given is None


def _switch_off(node: torch.fx.Node, position: int, name: str) -> bool:
    if position < len(node.args) and node.args[position] is True:
        node.update_arg(position, False)
        return True
    if node.kwargs.get(name) is True:
        node.update_kwarg(name, False)
        return True
    return False
