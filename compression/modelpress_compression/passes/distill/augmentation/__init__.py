"""Augmentation: a batch's inputs changed at random before both models see them.

What can be changed depends on what an input is (`kinds`); a change that fits none of the inputs is left out, with a
reason. All randomness comes from one generator with the recipe's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Generator, Tensor

from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.augmentation import transforms
from modelpress_compression.passes.distill.augmentation.kinds import IMAGE, SIGNAL, TOKENS, InputKind, input_kinds
from modelpress_compression.passes.distill.config import Augmentation

__all__ = ["Augmenter", "fitting", "make_augmenter"]

Transform = Callable[[Tensor, float, Generator], Tensor]

_IMAGES: Mapping[str, Transform] = MappingProxyType(
    {
        "horizontal_flip": transforms.horizontal_flip,
        "vertical_flip": transforms.vertical_flip,
        "rotation": transforms.rotation,
        "random_resized_crop": transforms.random_resized_crop,
        "color_jitter": transforms.color_jitter,
        "noise": transforms.noise,
        "mixup": transforms.mixup,
    }
)
_SIGNALS = ("noise", "time_masking")
_FITTING: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {IMAGE: tuple(_IMAGES), SIGNAL: _SIGNALS, TOKENS: ("token_masking",)}
)
_PEOPLE = MappingProxyType({IMAGE: "images", SIGNAL: "signals", TOKENS: "token indices"})
# After these, labels of positions would be in the wrong places.
_MOVING = frozenset(("horizontal_flip", "vertical_flip", "rotation", "random_resized_crop"))


@dataclass(frozen=True)
class _Change:
    kind: InputKind
    augmentation: Augmentation


def fitting(model: Model, data: InputData) -> frozenset[str]:
    """The names of the augmentations that change one of the model's inputs at least."""
    return frozenset(name for kind in input_kinds(model, data) for name in _FITTING.get(kind.kind, ()))


class Augmenter:
    """Changes the inputs of one batch after the other. `dense_labels`: labels belong to positions, not to samples."""

    def __init__(self, changes: Sequence[_Change], seed: int, dense_labels: bool) -> None:
        self._changes = changes
        self._generator = Generator().manual_seed(seed)
        names = {change.augmentation.name for change in changes}
        self._keeps_labels = "mixup" not in names and not (dense_labels and names & _MOVING)

    def __call__(self, inputs: Feeds) -> tuple[Feeds, bool]:
        """New inputs of the same types and shapes, and whether the batch's labels still hold."""
        changed = dict(inputs)
        for change in self._changes:
            name = change.kind.name
            changed[name] = self._apply(change, changed[name], inputs)
        return changed, self._keeps_labels

    def _apply(self, change: _Change, array: Array, inputs: Feeds) -> Array:
        kind, (name, amount) = change.kind, (change.augmentation.name, change.augmentation.amount)
        if kind.kind == TOKENS:
            mask = counted_positions(inputs)
            counted = None if mask is None else torch.from_numpy(mask)
            tokens = torch.from_numpy(np.array(array))
            return transforms.token_masking(tokens, amount, self._generator, counted).numpy()
        values = torch.from_numpy(np.array(array, np.float32))
        if kind.kind == SIGNAL:
            if name == "time_masking":
                return _as(transforms.time_masking(values, amount, self._generator, kind.axis), array)
            return _as(transforms.noise(values, amount, self._generator), array)
        if kind.axis == 3:
            changed = _IMAGES[name](values.permute(0, 3, 1, 2), amount, self._generator).permute(0, 2, 3, 1)
        else:
            changed = _IMAGES[name](values, amount, self._generator)
        return _as(changed, array)


def make_augmenter(
    model: Model, data: InputData, wanted: Sequence[Augmentation], seed: int
) -> tuple[Augmenter | None, list[tuple[str, str]]]:
    """The augmenter, None if no augmentation fits; and (name, reason) of those that fit no input."""
    kinds = input_kinds(model, data)
    changes, refused = [], []
    for item in wanted:
        fitting = [kind for kind in kinds if item.name in _FITTING.get(kind.kind, ())]
        changes += [_Change(kind, item) for kind in fitting]
        if not fitting:
            suited = " or ".join(_PEOPLE[kind] for kind, names in _FITTING.items() if item.name in names)
            got = ", ".join(f"{kind.name!r} ({_PEOPLE.get(kind.kind, 'neither')})" for kind in kinds)
            refused.append((item.name, f"it changes {suited}; the model's inputs are {got}"))
    if not changes:
        return None, refused
    dense = data.labels is not None and data.labels.ndim > 1
    return Augmenter(changes, seed, dense), refused


def _as(values: Tensor, like: Array) -> Array:
    """Back in the input's type; integers rounded."""
    result = values.contiguous().numpy()
    return np.asarray(np.rint(result) if like.dtype.kind in "iu" else result, like.dtype)
