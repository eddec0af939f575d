"""What training lessens: the distance to the teacher at the outputs and between, and to the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.passes.distill.labels import LabelLoss, as_tensor
from modelpress_compression.passes.distill.losses import ValueLoss

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """(1 - label_weight) * (outputs + feature_weight * features) + label_weight * labels; outputs and features are
    means over theirs."""

    outputs: tuple[ValueLoss, ...]
    features: tuple[ValueLoss, ...] = ()
    feature_weight: float = 0.0
    labels: LabelLoss | None = None
    label_weight: float = 0.0

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(loss.name for loss in self.outputs)

    @property
    def names(self) -> tuple[str, ...]:
        """Values that both models must tell."""
        return (*self.output_names, *(loss.name for loss in self.features))

    def training(self, student: Values, teacher: Values, mask: Tensor | None, labels: Array | None) -> Tensor:
        """With everything that helps training."""
        loss = _mean(self.outputs, student, teacher, mask)
        if self.features:
            loss = loss + self.feature_weight * _mean(self.features, student, teacher, mask)
        return self._with_labels(loss, student, labels)

    def judging(self, student: Values, teacher: Values, mask: Tensor | None, labels: Array | None) -> Tensor:
        """Without features: what counts in the end are the answers."""
        return self._with_labels(_mean(self.outputs, student, teacher, mask), student, labels)

    def _with_labels(self, loss: Tensor, student: Values, labels: Array | None) -> Tensor:
        if self.labels is None or labels is None:
            return loss
        theirs = self.labels(student, as_tensor(labels, loss.device))
        return (1 - self.label_weight) * loss + self.label_weight * theirs


def _mean(losses: tuple[ValueLoss, ...], student: Values, teacher: Values, mask: Tensor | None) -> Tensor:
    return torch.stack([loss(student, teacher, mask) for loss in losses]).mean()


def tensors(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Arrays of numbers as tensors."""
    return {name: torch.from_numpy(_writable(array)).to(device) for name, array in arrays.items()}


def mask_of(inputs: Feeds, device: torch.device) -> Tensor | None:
    """[N, T]: the positions that count; None where all do."""
    mask = counted_positions(inputs)
    return None if mask is None else torch.from_numpy(_writable(mask)).to(device)


def _writable(array: Array) -> Array:
    # torch warns of memory that it must not write to; arrays of onnxruntime may be such.
    return array if array.flags.writeable and array.flags.c_contiguous else array.copy()
