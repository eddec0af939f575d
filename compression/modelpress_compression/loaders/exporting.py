"""From a torch module to a checked `Model`: exporters one after the other, until one repeats the original's outputs.

What an exporter wrote gets the user's names and dynamic dimensions, and is shown to be the same by numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import onnx_ir

from modelpress_compression.agreement import ATOL
from modelpress_compression.errors import CompressionError, ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.graph.shapes import infer_shapes
from modelpress_compression.inputs import Array
from modelpress_compression.loaders.exporters import ExportRequest
from modelpress_compression.loaders.onnx_file import from_exporter, may_need_float32, runnable
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.trials import TrialRun, TrialRuns, first_line
from modelpress_compression.loaders.verify import Disagreement, check_outputs
from modelpress_compression.model import Model, Provenance
from modelpress_compression.runtime import run, session_of
from modelpress_compression.specs import DTYPES, TensorSpec

Exporter = Callable[[ExportRequest], Path]

_OPERATOR = re.compile(r"(?P<op>(?:aten|prim|quantized|prims|torchvision|[a-z]\w*)::\w+)")
_SIZE = re.compile(r"\b[su]\d+\b")
_ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}
_NO_WARNINGS: Mapping[Exporter, str] = MappingProxyType({})
_DATA_TYPES = {name: onnx_ir.DataType[_ONNX_NAMES.get(name, name.upper())] for name in DTYPES}


def export_checked(
    exporters: Sequence[Exporter],
    module: Callable[[], Any],
    specs: Sequence[TensorSpec],
    trials: TrialRuns,
    provenance: Provenance,
    *,
    labels: Sequence[str | None] = (),
    atol: float = ATOL,
    warnings: Mapping[Exporter, str] = _NO_WARNINGS,
) -> Model:
    """The first exporter's result that repeats `trials`. `module()`: a fresh module that takes `specs` in order.

    `labels`: names for as many of the last outputs, None for one that has none of its own. `atol`: as `agreement`.
    `warnings`: what is said where these exporters made it.

    Raises UnsupportedOperatorError or ModelNotRunnableError with what the exporters said.
    """
    failures: list[tuple[str, str]] = []
    with TemporaryDirectory(prefix="modelpress-") as folder:
        names = output_names(len(trials.runs[0].expected), specs, labels)
        request = ExportRequest(module, trials.runs[0].feeds, tuple(specs), names, Path(folder))
        for exporter in exporters:
            name = exporter.__name__.removeprefix("export_")
            try:
                with quiet():
                    path = exporter(request)
                model = _finished(path, provenance, request.specs, trials, atol)
                return model.with_warnings(warnings[exporter]) if exporter in warnings else model
            except Disagreement as error:
                failures.append((name, f"the result differs from the original: {error}"))
            except CompressionError as error:
                failures.append((name, error.message))
            except Exception as error:  # noqa: BLE001  exporters raise whatever their own code runs into
                failures.append((name, first_line(error)))
    raise _failed(failures)


def _failed(failures: Sequence[tuple[str, str]]) -> CompressionError:
    said = "; ".join(f"{name}: {text}" for name, text in failures)
    message = f"The model could not be converted to ONNX ({said[:900]}). Export it with torch.onnx.export where its "
    message += "source is, and upload the ONNX file."
    for _, text in failures:
        if ("not supported" in text or "nsupported" in text or "has no ONNX for" in text) and (
            match := _OPERATOR.search(text)
        ):
            return UnsupportedOperatorError(
                f"The operator {match['op']} cannot be converted to ONNX. {message}", op_type=match["op"]
            )
    return ModelNotRunnableError(message)


def _finished(path: Path, provenance: Provenance, specs: Sequence[TensorSpec], trials: TrialRuns, atol: float) -> Model:
    """The exporter's graph with inputs named and shaped as `specs` say, in that order; it repeats all `trials`.

    Raises Disagreement where it gives other numbers, CompressionError where it does not load or run.
    """
    model = from_exporter(path, provenance)
    _shape_inputs(model, specs)
    if may_need_float32(model):
        model = runnable(model)
    observed: list[list[Array]] = []
    with session_of(model, optimize=False) as session:
        for trial in trials.runs:
            got = run(session, trial.feeds)
            check_outputs(trial.expected, list(got.values()), list(got), atol=atol)
            observed.append(list(got.values()))
    _shape_outputs(model, trials.runs, observed)
    infer_shapes(model.ir)
    return model.with_warnings(*trials.warnings)


def output_names(count: int, specs: Sequence[TensorSpec], labels: Sequence[str | None] = ()) -> list[str]:
    """`output`, or `output_0`, `output_1`, ..., where `labels` of the last outputs say no other; no input's name."""
    taken = {spec.name for spec in specs}
    own = [*[None] * (count - len(labels)), *labels][:count]
    unnamed = own.count(None)
    given = [label for label in own if label is not None]
    names: list[str] = []
    for index, label in enumerate(own):
        name = label or ("output" if unnamed == 1 else f"output_{index}")
        while name in taken or name in names or (label is None and name in given):
            name = f"{name}_out"
        names.append(name)
    return names


def _shape_inputs(model: Model, specs: Sequence[TensorSpec]) -> None:
    """Inputs by name, in the order of `specs`; one that the exporter dropped as unused comes back."""
    values = {value.name: value for value in model.graph.inputs}
    model.graph.inputs.clear()
    for spec in specs:
        value = values.get(spec.name) or onnx_ir.Value(name=spec.name)
        value.shape = onnx_ir.Shape(spec.shape)
        value.type = onnx_ir.TensorType(_DATA_TYPES[spec.dtype])
        model.graph.inputs.append(value)


def _shape_outputs(model: Model, trials: Sequence[TrialRun], observed: Sequence[Sequence[Array]]) -> None:
    """Output shapes as they were seen: a dimension that always had a dynamic dimension's extent is that dimension."""
    for position, value in enumerate(model.graph.outputs):
        shapes = [outputs[position].shape for outputs in observed]
        if len({len(shape) for shape in shapes}) > 1:
            continue
        dims = [_dim([shape[axis] for shape in shapes], trials) for axis in range(len(shapes[0]))]
        known = value.shape
        if known is not None and len(known) == len(dims):
            # What varies without being an input's dimension keeps the exporter's name for it; so does what torch.export
            # calls a size (s53//2), though it came out alike at all sizes that were tried.
            dims = [
                old.value if not isinstance(old, int) and (new is None or _varies(old.value, new)) else new
                for old, new in zip(known, dims, strict=True)
            ]
        value.shape = onnx_ir.Shape(dims)


def _varies(name: str | None, seen: int | str) -> bool:
    return isinstance(seen, int) and name is not None and _SIZE.search(name) is not None


def _dim(extents: Sequence[int], trials: Sequence[TrialRun]) -> int | str | None:
    for symbol in trials[0].sizes:
        sizes = [trial.sizes[symbol] for trial in trials]
        if sizes == list(extents) and len(set(sizes)) > 1:
            return symbol
    return extents[0] if len(set(extents)) == 1 else None
