"""The loss of training: the distance to the teacher, at outputs and inner values, and to the labels if there are any.

loss = (1 - label_weight) * (outputs + feature_weight * features) + label_weight * labels

outputs, features               means over the losses of the values (`losses`)
class indices [N] or [N, T]     cross-entropy with scores [N, C] or [N, T, C]; negative labels do not count
labels of the output's shape    cross-entropy for class scores, else the squared error over the labels' variance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.graph.outputs import INDEPENDENT
from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.measure.metrics.base import squeezed
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.losses import (
    Distance,
    ValueLoss,
    log_probabilities,
    output_losses,
    relative_mse,
)
from modelpress_compression.schema import Violation

DEFAULT_LABEL_WEIGHT = 0.5
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class LabelLoss:
    """The distance of one output to the labels. `output`: the loss that it has against the teacher.

    `distance`: for labels of the output's shape; None: class labels, and cross-entropy.
    """

    output: ValueLoss
    distance: Distance | None

    def __call__(self, student: Values, labels: Tensor) -> Tensor:
        scores = student[self.output.name].float()
        if self.distance is not None:
            return self.distance(scores, labels.reshape(scores.shape).float())
        logs = log_probabilities(scores, self.output.form)
        if labels.dtype.is_floating_point:
            return -(labels.reshape(scores.shape) * logs).sum(-1).mean()
        classes = labels.reshape(-1)
        if not bool((classes >= 0).any()):
            # The mean over no labels is NaN in torch; this is zero, and has a gradient.
            return logs.sum() * 0
        return F.nll_loss(logs.reshape(-1, logs.shape[-1]), classes.clamp_min(-1), ignore_index=-1)


@dataclass(frozen=True)
class Objective:
    """The weighted sum above. `labels` None: the data has none, or none that count."""

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
        """Values that both models must compute."""
        return (*self.output_names, *(loss.name for loss in self.features))

    def training_loss(self, student: Values, teacher: Values, mask: Tensor | None, labels: Array | None) -> Tensor:
        """With everything that helps training."""
        loss = _mean(self.outputs, student, teacher, mask)
        if self.features:
            loss = loss + self.feature_weight * _mean(self.features, student, teacher, mask)
        return self._with_labels(loss, student, labels)

    def validation_loss(self, student: Values, teacher: Values, mask: Tensor | None, labels: Array | None) -> Tensor:
        """Without features, since what counts in the end are the outputs."""
        return self._with_labels(_mean(self.outputs, student, teacher, mask), student, labels)

    def _with_labels(self, loss: Tensor, student: Values, labels: Array | None) -> Tensor:
        if self.labels is None or labels is None:
            return loss
        theirs = self.labels(student, label_tensor(labels, loss.device))
        return (1 - self.label_weight) * loss + self.label_weight * theirs


def make_objective(
    graph: onnx_ir.Graph, outputs: Mapping[str, Array], labels: Array | None, config: DistillConfig
) -> tuple[Objective, dict[str, str], list[str]]:
    """The objective without features; for each output that has no loss the reason; warnings.

    `graph`, `outputs`: the teacher's, and its outputs for some samples. Raises InvalidRecipeError where no output has a
    loss.
    """
    losses, reasons = output_losses(graph, outputs, config.loss, config.temperature)
    if not losses:
        listed = "; ".join(f"output {name!r}: {reason}" for name, reason in reasons.items())
        raise InvalidRecipeError(
            [
                Violation(
                    "distill",
                    f"the model has no output that could be trained towards ({listed}); leave this step out, or upload "
                    f"the model with its scores as an output",
                )
            ]
        )
    label_loss, weight, warnings = _weighted_label_loss(losses, outputs, labels, config.label_weight)
    return Objective(tuple(losses), labels=label_loss, label_weight=weight), reasons, warnings


def _weighted_label_loss(
    losses: Sequence[ValueLoss], outputs: Mapping[str, Array], labels: Array | None, wanted: float | None
) -> tuple[LabelLoss | None, float, list[str]]:
    """`wanted`: the weight that the recipe asks for, None: the default."""
    weight = DEFAULT_LABEL_WEIGHT if wanted is None else wanted
    if labels is None:
        return None, 0.0, ["label_weight has no effect: the data holds no labels."] if wanted else []
    if weight == 0:
        return None, 0.0, []
    found = find_label_loss(losses, outputs, labels)
    if found is None:
        return None, 0.0, [f"The labels of shape {labels.shape} fit no output, so the original alone taught."]
    return found, weight, []


def find_label_loss(losses: Sequence[ValueLoss], outputs: Mapping[str, Array], labels: Array) -> LabelLoss | None:
    """The loss of the first output that the labels fit; None where they fit none. `outputs`: the teacher's."""
    for loss in losses:
        array = outputs[loss.name]
        classes = loss.kind == "kl" and array.ndim in (2, 3) and loss.form != INDEPENDENT
        if classes and _are_classes(array, labels):
            return LabelLoss(loss, None)
        if squeezed(labels.shape[1:]) == squeezed(array.shape[1:]) and labels.dtype.kind == "f":
            return LabelLoss(loss, None if classes else relative_mse(labels))
    return None


def _are_classes(array: Array, labels: Array) -> bool:
    fits = labels.dtype.kind in "iu" and squeezed(labels.shape[1:]) == squeezed(array.shape[1:-1])
    return fits and int(labels.max(initial=0)) < array.shape[-1]


def _mean(losses: tuple[ValueLoss, ...], student: Values, teacher: Values, mask: Tensor | None) -> Tensor:
    return torch.stack([loss(student, teacher, mask) for loss in losses]).mean()


def tensors(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Arrays of numbers as tensors."""
    return {name: torch.from_numpy(_writable(array)).to(device) for name, array in arrays.items()}


def label_tensor(labels: Array, device: torch.device) -> Tensor:
    """Labels of a batch: integers as int64, numbers as float32."""
    kind = np.int64 if labels.dtype.kind in "biu" else np.float32
    return torch.from_numpy(np.ascontiguousarray(labels, dtype=kind)).to(device)


def mask_of(inputs: Feeds, device: torch.device) -> Tensor | None:
    """[N, T]: the positions that count; None where all do."""
    mask = counted_positions(inputs)
    return None if mask is None else torch.from_numpy(_writable(mask)).to(device)


def _writable(array: Array) -> Array:
    # torch warns of memory that it must not write to; arrays of onnxruntime may be such.
    return array if array.flags.writeable and array.flags.c_contiguous else array.copy()
