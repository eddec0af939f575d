"""How much the model's outputs depend on each channel of what a block answers.

    importance_c = E[ (v^T dy / dx_c)^2 ]      over samples, positions and random signs v; 1 on average

BRECQ weighs a block's squared errors by such squared gradients (Li et al., arXiv:2102.05426, section 3.3). Without them
transformers learn nothing: a few channels of their residual stream are hundreds of times as large as the others, make
up a block's error, and are normalized away before anything reads them. Gradients are those of the outputs themselves,
by random directions as in `ranges.gradients`, so that no labels and no loss are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir
import torch
from numpy.typing import NDArray

from modelpress_compression.executor import Executor, NotExecutableError
from modelpress_compression.graph.outputs import tensor_outputs
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.ranges.gradients import directions_of, one_thread
from modelpress_compression.passes.quantize.ranges.output_error import without_softmax

SAMPLES, PROJECTIONS = 8, 2
# Even a channel that nothing seems to depend on is held to its values a little; those that are normalized away may be
# hundreds of times as large as the others, so that a little is very little.
_LEAST = 1e-6
_SEED = 0

Importance = Mapping[str, NDArray[np.float32]]  # [channels], by the name of the value


def importance_of(
    original: Model, names: Sequence[str], weights: Collection[str], data: InputData, check_time: Callable[[], None]
) -> Importance:
    """Of the values with these names; `weights`: constants, one of which each depends on. Those for which there are no
    finite gradients are left out. Raises ModelNotRunnableError, TimeLimitError."""
    model = without_softmax(original)
    outputs = [v.name for v in tensor_outputs(model.graph) if v.name and v.dtype == onnx_ir.DataType.FLOAT]
    try:
        executor = Executor(model, trainable=set(weights), outputs=list(dict.fromkeys([*names, *outputs])))
    except NotExecutableError:
        return {}
    sums: dict[str, NDArray[np.float64]] = {}
    with one_thread():
        for number, feed in enumerate(data.spread(SAMPLES).feeds(1)):
            check_time()
            results = executor(feed)
            ends = {name: results[name] for name in outputs if results[name].requires_grad}
            known = {name: results[name] for name in names if results[name].requires_grad}
            if not ends or not known:
                return {}
            arrays: dict[str, Array] = {name: end.detach().numpy() for name, end in ends.items()}
            for direction in directions_of(arrays, feed, np.random.default_rng((_SEED, number)), PROJECTIONS):
                found = torch.autograd.grad(
                    list(ends.values()),
                    list(known.values()),
                    [torch.from_numpy(part) for part in direction],
                    retain_graph=True,
                    allow_unused=True,
                )
                for name, gradient in zip(known, found, strict=True):
                    if gradient is not None:
                        sums[name] = sums.get(name, 0.0) + _by_channel(gradient.detach().numpy())
    return {name: _normalized(total) for name, total in sums.items() if np.isfinite(total).all() and total.any()}


def channel_axis(rank: int) -> int:
    """Of values of this rank: [N, C, H, W], or the channels last."""
    return 1 if rank >= 4 else rank - 1


def _by_channel(gradient: Array) -> NDArray[np.float64]:
    """Mean squares."""
    axis = channel_axis(gradient.ndim)
    others = tuple(other for other in range(gradient.ndim) if other != axis)
    return np.asarray(np.square(gradient, dtype=np.float64).mean(axis=others))


def _normalized(total: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.asarray(np.maximum(total / total.mean(), _LEAST), np.float32)
