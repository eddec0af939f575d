"""A live `torch.nn.Module`, with its Python code at hand, into a checked `Model`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.loaders.exporters import ExportRequest, export_plain, export_program
from modelpress_compression.loaders.exporting import export_checked
from modelpress_compression.loaders.pretrained import without_grouped_products
from modelpress_compression.loaders.torch_run import REFUSALS, runner, tensors_of
from modelpress_compression.loaders.trials import find_trials, symbols_of
from modelpress_compression.model import Model, Provenance
from modelpress_compression.specs import TensorSpec


class _Positional(torch.nn.Module):
    """Takes tensors in the order of the user's inputs; `names` are the arguments that they are, None: by position."""

    def __init__(self, inner: torch.nn.Module, names: Sequence[str] | None) -> None:
        super().__init__()
        self.inner, self._names = inner, names

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = (
            self.inner(*tensors) if self._names is None else self.inner(**dict(zip(self._names, tensors, strict=True)))
        )
        # Exporters know tuples of tensors; of the types that a library returns they know some.
        return tuple(tensors_of(outputs))


def convert_module(module: torch.nn.Module, specs: Sequence[TensorSpec], provenance: Provenance) -> Model:
    """Exported by torch.export, or by tracing where that fails; checked by numbers. Raises as `loaders.load`."""
    module = module.cpu().eval().requires_grad_(False)
    if not specs:
        raise InvalidInputsError(suggest_for_module(module))
    without_grouped_products(module)
    wrapped = _Positional(module, _argument_names(module, specs)).eval()
    trials = find_trials(runner(wrapped), specs, REFUSALS)
    exporters = (export_named, export_automatic, export_plain)
    return export_checked(exporters, lambda: wrapped, specs, trials, provenance)


def _argument_names(module: torch.nn.Module, specs: Sequence[TensorSpec]) -> list[str] | None:
    names = [spec.name for spec in specs]
    parameters = inspect.signature(module.forward).parameters
    return names if all(name in parameters for name in names) else None


def export_named(request: ExportRequest) -> Path:
    """torch.export with the user's dynamic dimensions; fails where the module fixes one of them."""
    dims = {dim: torch.export.Dim(f"d{index}") for index, dim in enumerate(symbols_of(request.specs))}
    return _export(request, dims, "named.onnx")


def export_automatic(request: ExportRequest) -> Path:
    """torch.export that finds out itself how dimensions depend on each other."""
    return _export(request, dict.fromkeys(symbols_of(request.specs), torch.export.Dim.AUTO), "automatic.onnx")


def _export(request: ExportRequest, dims: dict[str, Any], name: str) -> Path:
    shapes = tuple(
        {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in request.specs
    )
    with torch.no_grad():
        program = torch.export.export(request.module(), request.args(), dynamic_shapes=(shapes,))
    return export_program(program, request, name)


def suggest_for_module(module: torch.nn.Module) -> str:
    """The error's text for a user who named no inputs: the arguments of `forward` and the first layer's width."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    names = [item.name for item in parameters if item.default is item.empty and item.kind != item.VAR_KEYWORD]
    described, shape = _first_layer(module)
    told = getattr(module, "main_input_name", None)  # transformers' models, whose arguments are all optional
    first = names[0] if names else told if isinstance(told, str) else "x"
    others = "".join(f" --input '{name}:float32[batch,...]'" for name in names[1:])
    return (
        f"The file does not record the model's inputs (forward({', '.join(names)})); say what they are.{described} "
        f"Try --input '{first}:{shape}'{others}, with your own numbers or words for dimensions that vary."
    )


def _first_layer(module: torch.nn.Module) -> tuple[str, str]:
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
            rank = layer.weight.ndim - 2
            space = {1: "length", 2: "H,W", 3: "D,H,W"}[rank]
            plural = "channel" if layer.in_channels == 1 else "channels"
            text = f" First layer: conv{rank}d, {layer.in_channels} input {plural}."
            return text, f"float32[batch,{layer.in_channels},{space}]"
        if isinstance(layer, torch.nn.Linear):
            return f" First layer: linear, {layer.in_features} input features.", f"float32[batch,{layer.in_features}]"
        if isinstance(layer, torch.nn.Embedding):
            return f" First layer: embedding, ids below {layer.num_embeddings}.", "int64[batch,seq]"
        if isinstance(layer, torch.nn.LSTM | torch.nn.GRU | torch.nn.RNN):
            axes = "batch,seq" if layer.batch_first else "seq,batch"
            kind = type(layer).__name__.lower()
            return f" First layer: {kind}, {layer.input_size} input features.", f"float32[{axes},{layer.input_size}]"
    return "", "float32[batch,...]"
