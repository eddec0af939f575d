"""Inputs for training where no data is given: made from the original model itself, by gradients to its inputs.

    normalization statistics   inputs are optimized until the mean and variance of each channel before every
                               BatchNormalization are those that it stores from its training, and each input is
                               assigned to its class (DeepInversion, Yin et al., arXiv:1912.08795)
    class scores alone         where the exporter has folded the statistics away, inputs are optimized to be smooth and
                               to be assigned to a class with confidence
    neither                    plausible random inputs (`graph.synthetic`)

    loss = sum over layers of mean((m - m_l)^2 / v_l) + mean((v / v_l - 1)^2)
           + a * cross-entropy with classes drawn at random + b * total variation

All of them are poor beside real inputs, and random ones are the poorest: on two small pruned classifiers (top-1 0.821
and 0.270), training on random inputs gave 0.719 and 0.216, training on inputs optimized for classes 0.936 and 0.601.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor import Executor, device_for
from modelpress_compression.graph.outputs import classification_outputs, score_form
from modelpress_compression.graph.read import constant_array, int_attribute, is_op
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.graph.watch import observable
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill.augmentation.kinds import IMAGE, SIGNAL, input_kinds
from modelpress_compression.passes.distill.losses import log_probabilities

SAMPLES = 512
STEPS = 100
BATCH_SIZE = 32
_LEARNING_RATE = 0.1
# a and b, by whether there are statistics.
_WEIGHTS = {True: (0.1, 1e-3), False: (1.0, 1.0)}
_SHARE_OF_TIME = 0.3  # at most, of the time that training has
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


def training_inputs(original: Model, context: Context, seed: int, stop_at: float) -> tuple[InputData, str]:
    """Synthetic inputs, and a warning that says what they are. Raises ModelNotRunnableError."""
    data = synthetic_inputs(original, samples=SAMPLES, seed=seed)
    statistics = find_statistics(original)
    free = [kind.name for kind in input_kinds(original, data) if kind.kind in (IMAGE, SIGNAL)]
    if not free or data.whole_feeds or not (statistics or _scores(original) is not None):
        how = "plausible random ones, since the graph holds neither normalization statistics nor class scores"
    else:
        until = time.monotonic() + _SHARE_OF_TIME * (stop_at - time.monotonic())
        data = _optimized(original, data, statistics, free, context, seed, until)
        met = f"meet the statistics of {len(statistics)} normalization layers" if statistics else "show each class"
        how = f"optimized to {met}"
    return data, (
        f"No data was given: training ran on {len(data)} synthetic inputs ({how}), and its gain was measured on such "
        f"inputs alone. Give representative inputs with --data."
    )


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


def _optimized(
    model: Model,
    data: InputData,
    statistics: Sequence[_Statistics],
    free: Sequence[str],
    context: Context,
    seed: int,
    until: float,
) -> InputData:
    scores = _scores(model)
    values = [item.value for item in statistics if item.value not in data.arrays]
    outputs = list(dict.fromkeys([*values, *([scores.name or ""] if scores else [])]))
    executor = Executor(model, outputs=outputs, device=device_for(context.target.device))
    statistics = [item.on(executor.device) for item in statistics]
    generator = torch.Generator().manual_seed(seed)
    size = data.fixed_batch or BATCH_SIZE
    batches: list[Mapping[str, Array]] = []
    for number, feed in enumerate(data.feeds(size)):
        context.progress(0.0, f"making inputs: batch {number + 1} of {-(-len(data) // size)}")
        inputs = {name: torch.from_numpy(np.array(array)).to(executor.device) for name, array in feed.items()}
        _optimize(executor, inputs, statistics, free, scores, generator, until)
        batches.append({name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()})
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return replace(data, arrays=arrays)


def _optimize(
    executor: Executor,
    inputs: dict[str, Tensor],
    statistics: Sequence[_Statistics],
    free: Sequence[str],
    scores: onnx_ir.Value | None,
    generator: torch.Generator,
    until: float,
) -> None:
    """Optimizes the free inputs of one batch in place, until the loss is not finite or the time is up."""
    variables = [inputs[name].requires_grad_() for name in free]
    optimizer = torch.optim.Adam(variables, lr=_LEARNING_RATE)
    class_weight, variation_weight = _WEIGHTS[bool(statistics)]
    classes: Tensor | None = None
    for _ in range(STEPS):
        if time.monotonic() > until:
            return
        optimizer.zero_grad(set_to_none=True)
        values = {**inputs, **executor(inputs)}
        nothing = torch.zeros((), device=executor.device)
        loss = torch.stack([item.distance(values[item.value]) for item in statistics] or [nothing]).sum()
        if scores is not None:
            logs = log_probabilities(values[scores.name or ""], score_form(scores))
            if classes is None:
                # Drawn once, so that each input keeps its class through all steps.
                classes = torch.randint(logs.shape[-1], (len(logs),), generator=generator).to(logs.device)
            loss = loss + class_weight * F.nll_loss(logs, classes)
        loss = loss + variation_weight * sum(_variation(variable) for variable in variables)
        if not bool(torch.isfinite(loss)):
            return
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotations there
        optimizer.step()


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
