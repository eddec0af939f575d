"""Images and signals for training where no data is given: optimized by gradients to the inputs.

    normalization statistics   inputs are optimized until the mean and variance of each channel before every
                               BatchNormalization are those that it stores from its training, and each input is
                               assigned to its class (DeepInversion, Yin et al., arXiv:1912.08795)
    class scores alone         where the exporter has folded the statistics away, inputs are optimized to be smooth and
                               to be assigned to a class with confidence

    loss = sum over layers of mean((m - m_l)^2 / v_l) + mean((v / v_l - 1)^2)
           + a * cross-entropy with classes drawn at random + b * total variation

All of them are poor beside real inputs, and random ones are the poorest: on two small pruned classifiers (top-1 0.821
and 0.270), training on random inputs gave 0.719 and 0.216, training on inputs optimized for classes 0.936 and 0.601.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor import Executor
from modelpress_compression.graph.outputs import classification_outputs, score_form
from modelpress_compression.graph.read import constant_array, int_attribute, is_op
from modelpress_compression.graph.watch import observable
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.augmentation.kinds import IMAGE, SIGNAL, input_kinds
from modelpress_compression.passes.distill.losses import log_probabilities

STEPS = 100
_LEARNING_RATE = 0.1
# a and b, by whether there are statistics.
_WEIGHTS = {True: (0.1, 1e-3), False: (1.0, 1.0)}
_EPSILON = 1e-5


@dataclass(frozen=True)
class _Statistics:
    """Mean and variance [C] along axis 1 that a BatchNormalization saw in its training, of its input `value`."""

    value: str
    mean: Tensor
    variance: Tensor

    def on(self, device: torch.device) -> _Statistics:
        return replace(self, mean=self.mean.to(device), variance=self.variance.to(device))

    def distance(self, x: Tensor) -> Tensor:
        """A layer's term of the loss above."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        mean, variance = x.mean(dim=axes), x.var(dim=axes, correction=0)
        scale = self.variance + _EPSILON
        return ((mean - self.mean).square() / scale).mean() + (variance / scale - 1).square().mean()


def find_inverter(model: Model, data: InputData, device: torch.device, seed: int) -> Inverter | None:
    """None where nothing tells what the model's inputs were like, or they are neither images nor signals. Raises
    NotExecutableError."""
    free = tuple(kind.name for kind in input_kinds(model, data) if kind.kind in (IMAGE, SIGNAL))
    statistics, scores = find_statistics(model), _scores(model)
    if not free or data.whole_feeds or not (statistics or scores is not None):
        return None
    values = [item.value for item in statistics if item.value not in data.arrays]
    outputs = list(dict.fromkeys([*values, *([scores.name or ""] if scores else [])]))
    executor = Executor(model, outputs=outputs, device=device)
    generator = torch.Generator().manual_seed(seed)
    return Inverter(executor, tuple(item.on(device) for item in statistics), free, scores, generator)


def find_statistics(model: Model) -> list[_Statistics]:
    """Those of the main graph's BatchNormalizations in inference form."""
    found = []
    for node in model.graph:
        if not is_op(node, "BatchNormalization") or int_attribute(node, "training_mode", 0):
            continue
        mean, variance = (constant_array(node.inputs[position]) for position in (3, 4))
        value = node.inputs[0]
        if mean is not None and variance is not None and value is not None and observable(value, model):
            tensors = (torch.from_numpy(np.array(array, np.float32)) for array in (mean, variance))
            found.append(_Statistics(value.name or "", *tensors))
    return found


@dataclass(frozen=True)
class Inverter:
    """Optimizes batches of one model's inputs. `free`: names of those that are; `scores`: of classes, where there are
    any."""

    executor: Executor
    statistics: tuple[_Statistics, ...]
    free: tuple[str, ...]
    scores: onnx_ir.Value | None
    generator: torch.Generator

    @property
    def how(self) -> str:
        """In words."""
        met = f"meet the statistics of {len(self.statistics)} normalization layers"
        return f"optimized to {met if self.statistics else 'show each class'}"

    def optimized(self, inputs: dict[str, Tensor], until: float) -> dict[str, Tensor]:
        """The batch, whose free inputs are optimized in place until the loss is not finite or the time is up."""
        variables = [inputs[name].requires_grad_() for name in self.free]
        optimizer = torch.optim.Adam(variables, lr=_LEARNING_RATE)
        class_weight, variation_weight = _WEIGHTS[bool(self.statistics)]
        classes: Tensor | None = None
        for _ in range(STEPS):
            if time.monotonic() > until:
                break
            optimizer.zero_grad(set_to_none=True)
            values = {**inputs, **self.executor(inputs)}
            nothing = torch.zeros((), device=self.executor.device)
            loss = torch.stack([item.distance(values[item.value]) for item in self.statistics] or [nothing]).sum()
            if self.scores is not None:
                logs = log_probabilities(values[self.scores.name or ""], score_form(self.scores))
                if classes is None:
                    # Drawn once, so that each input keeps its class through all steps.
                    drawn = torch.randint(logs.shape[-1], (len(logs),), generator=self.generator)
                    classes = drawn.to(logs.device)
                loss = loss + class_weight * F.nll_loss(logs, classes)
            loss = loss + variation_weight * sum(_variation(variable) for variable in variables)
            if not bool(torch.isfinite(loss)):
                break
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotations there
            optimizer.step()
        return inputs


def _scores(model: Model) -> onnx_ir.Value | None:
    """The first output [N, C] of class scores."""
    names = classification_outputs(model.graph)
    for value in model.graph.outputs:
        if value.name in names and value.shape is not None and len(value.shape) == 2 and value.producer() is not None:
            return value
    return None


def _variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbours along the axes behind the channels."""
    axes = range(2, x.dim()) if x.dim() > 2 else range(1, x.dim())
    return torch.stack([x.diff(dim=axis).square().mean() for axis in axes if x.shape[axis] > 1] or [x.sum() * 0]).sum()
