"""Running a torch module on NumPy arrays, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from modelpress_compression.inputs import Array, Feeds

# What a module raises when it is given an input that does not suit it.
REFUSALS: tuple[type[Exception], ...] = (
    torch.jit.Error,
    RuntimeError,
    ValueError,
    IndexError,
    TypeError,
    AssertionError,
    KeyError,
    NotImplementedError,
)


def to_tensors(feeds: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Tensors of the same types, bfloat16 included."""
    return {name: _to_tensor(array) for name, array in feeds.items()}


def _to_tensor(array: Array) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, copy=True))


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """All tensors in a nest of tuples, lists, dicts and dataclass-like outputs, in order; None is left out.

    A cache of keys and values (transformers' `DynamicCache`) is read by its structure: layer by layer, both of them.
    """
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return [tensor for value in outputs.values() for tensor in tensors_of(value)]
    if isinstance(outputs, Sequence) and not isinstance(outputs, str):
        return [tensor for value in outputs for tensor in tensors_of(value)]
    if isinstance(outputs, bool | int | float):
        return [torch.tensor(outputs)]
    return [tensor for part in _cache_parts(outputs) for tensor in tensors_of(part)]


def _cache_parts(outputs: Any) -> list[Any]:
    if hasattr(outputs, "self_attention_cache"):
        return [outputs.self_attention_cache, outputs.cross_attention_cache]
    layers = getattr(outputs, "layers", None)
    if not isinstance(layers, list):
        return []
    return [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]


def flatten(outputs: Any) -> list[Array]:
    """`tensors_of`, as arrays; bfloat16 comes as float32."""
    tensors = (tensor.detach().cpu() for tensor in tensors_of(outputs))
    return [tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy().copy() for tensor in tensors]


def runner(module: Callable[..., Any]) -> Callable[[Feeds], list[Array]]:
    """`feeds -> outputs` of a module that takes its inputs in the feeds' order."""

    def run(feeds: Feeds) -> list[Array]:
        with torch.no_grad():
            return flatten(module(*to_tensors(feeds).values()))

    return run
