"""What the user said about the inputs, applied to a graph that has inputs of its own."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.loaders.normalize import infer_shapes
from modelpress_compression.model import Model
from modelpress_compression.specs import TensorSpec

Dim = int | str | None


def apply_specs(model: Model, specs: Sequence[TensorSpec]) -> Model:
    """The model with its dynamic dimensions named, or fixed, as the specs say. Raises InvalidInputsError."""
    if not specs:
        return model
    have = {spec.name: spec for spec in model.inputs}
    if len(specs) == 1 and len(have) == 1 and specs[0].name not in have:
        # One input is meant, whatever it is called: exporters rename inputs.
        only = next(iter(have.values()))
        specs = [TensorSpec(only.name, specs[0].dtype, specs[0].shape)]
    renamed: dict[str, Dim] = {}
    for spec in specs:
        if spec.name not in have:
            raise InvalidInputsError(f"The model has no input {spec.name!r}; it has {_listed(model)}.")
        _match(have[spec.name], spec, renamed, _listed(model))
    model = model.clone()
    _rename(model, renamed)
    for value in model.graph.inputs:
        for spec in specs:
            if value.name == spec.name:
                value.shape = onnx_ir.Shape(
                    new if new is not None else old for old, new in zip(have[spec.name].shape, spec.shape, strict=True)
                )
    infer_shapes(model.ir)
    return model


def _listed(model: Model) -> str:
    return ", ".join(map(str, model.inputs)) or "none"


def _match(have: TensorSpec, want: TensorSpec, renamed: dict[str, Dim], listed: str) -> None:
    problem = ""
    if have.dtype != want.dtype:
        problem = f"its type is {have.dtype}"
    elif have.shape and len(have.shape) != len(want.shape):
        problem = f"it has {len(have.shape)} dimensions"
    for old, new in zip(have.shape, want.shape, strict=False):
        if isinstance(old, int) and new not in (old, None):
            problem = problem or f"its dimension {old} is fixed"
        if isinstance(old, str) and new is not None and renamed.setdefault(old, new) != new:
            problem = problem or f"the dimensions called {old!r} are one and the same"
    if problem:
        raise InvalidInputsError(f"Input {want} does not fit the model: {problem}; the model takes {listed}.")


def _rename(model: Model, renamed: dict[str, Dim]) -> None:
    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is not None and any(_symbol(dim) in renamed for dim in value.shape):
                value.shape = onnx_ir.Shape(renamed.get(str(_symbol(dim)), dim) for dim in value.shape)


def _symbol(dim: int | onnx_ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value
