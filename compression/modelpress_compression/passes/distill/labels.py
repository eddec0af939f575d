"""The loss against labels, where the data has some.

class indices [N] or [N, T]     cross-entropy with scores [N, C] or [N, T, C]; negative labels do not count
arrays of the output's shape    cross-entropy for class scores, else the squared error over the labels' variance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.graph.outputs import INDEPENDENT
from modelpress_compression.inputs import Array
from modelpress_compression.passes.distill.losses import Distance, ValueLoss, log_probabilities, relative_mse


@dataclass(frozen=True)
class LabelLoss:
    """The distance of one output to the labels; `output` is that output's own loss."""

    output: ValueLoss
    values: Distance | None  # None: class labels

    def __call__(self, student: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        scores = student[self.output.name].float()
        if self.values is not None:
            return self.values(scores, labels.reshape(scores.shape).float())
        logs = log_probabilities(scores, self.output.form)
        if labels.dtype.is_floating_point:
            return -(labels.reshape(scores.shape) * logs).sum(-1).mean()
        classes = labels.reshape(-1)
        if not bool((classes >= 0).any()):
            return logs.sum() * 0
        return F.nll_loss(logs.reshape(-1, logs.shape[-1]), classes.clamp_min(-1), ignore_index=-1)


def label_loss(losses: Sequence[ValueLoss], samples: Mapping[str, Array], labels: Array) -> LabelLoss | None:
    """For the first output that the labels fit; None where they fit none. `samples`: outputs for as many samples as
    their first axis says."""
    for loss in losses:
        array = samples[loss.name]
        classes = loss.kind == "kl" and array.ndim in (2, 3) and loss.form != INDEPENDENT
        if classes and _are_classes(array, labels):
            return LabelLoss(loss, None)
        if _squeezed(labels.shape[1:]) == _squeezed(array.shape[1:]) and labels.dtype.kind == "f":
            return LabelLoss(loss, None if classes else relative_mse(labels))
    return None


def _are_classes(array: Array, labels: Array) -> bool:
    fits = labels.dtype.kind in "iu" and _squeezed(labels.shape[1:]) == _squeezed(array.shape[1:-1])
    return fits and int(labels.max(initial=0)) < array.shape[-1]


def as_tensor(labels: Array, device: torch.device) -> Tensor:
    """Labels of a batch: integers as int64, numbers as float32."""
    kind = np.int64 if labels.dtype.kind in "biu" else np.float32
    return torch.from_numpy(np.ascontiguousarray(labels, dtype=kind)).to(device)


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(extent for extent in shape if extent != 1)
