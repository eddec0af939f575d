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


def flatten(outputs: Any) -> list[Array]:
    """All tensors in a nest of tuples, lists, dicts and dataclass-like outputs, in order; None is left out."""
    if isinstance(outputs, torch.Tensor):
        tensor = outputs.detach().cpu()
        return [tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy().copy()]
    if isinstance(outputs, Mapping):
        return [array for value in outputs.values() for array in flatten(value)]
    if isinstance(outputs, Sequence) and not isinstance(outputs, str):
        return [array for value in outputs for array in flatten(value)]
    if isinstance(outputs, bool | int | float):
        return [np.asarray(outputs)]
    return []


def runner(module: Callable[..., Any]) -> Callable[[Feeds], list[Array]]:
    """`feeds -> outputs` of a module that takes its inputs in the feeds' order."""

    def run(feeds: Feeds) -> list[Array]:
        with torch.no_grad():
            return flatten(module(*to_tensors(feeds).values()))

    return run
