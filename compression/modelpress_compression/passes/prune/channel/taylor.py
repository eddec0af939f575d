"""Importance by gradients: what the answers lose, to second order, when a channel goes.

Molchanov et al. (arXiv:1906.10771) judge a unit by (g . w)^2, the square of the first-order change of a loss when its
weights w become zero, a mean over the data. There are no labels here, and the obvious loss, the distance to the model's
own answers, has no gradient where it stands. What is left of it is its second order, and that has the same form:

    KL(p || p without the unit)  ~  1/2 w' F w  =  1/2 E (g . w)^2

F is the Fisher information; g is the gradient of <r, scores> for a random r of the covariance diag(p) - p p', such as
r = sqrt(p) e - p (sqrt(p) . e) with e of independent standard normal numbers. (Labels drawn from p have it too, but
where the model is sure they nearly all say nothing.) Outputs that hold no classes have the squared error instead, with
r = e, relative to the power of the output. The r of different samples do not correlate, so that a batch needs one
gradient alone: the square of the sum estimates the sum of the squares.

A unit's weights are those of the layers that read it: without these it is gone already, and the layers that make it say
the same once more. Scores are absolute, in the loss's own unit, so that channels of different layers compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir
import torch
from torch import Generator, Tensor

from modelpress_compression.channels import Group, Member
from modelpress_compression.executor import Executor, device_for
from modelpress_compression.graph.outputs import (
    INDEPENDENT,
    PROBABILITIES,
    classification_outputs,
    score_form,
    tensor_outputs,
)
from modelpress_compression.graph.padding import counted_among, counted_positions
from modelpress_compression.graph.watch.portions import MAX_GRADIENT_BYTES, gradient_bytes
from modelpress_compression.inputs import Feeds
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.criteria import Magnitude, Scores
from modelpress_compression.passes.prune.channel.weights import Weights, per_unit

MAX_SAMPLES = 256
BATCH_SIZE = 8  # fewer where samples are so large that their gradients would not fit
DRAWS = 4  # gradients for each batch
_TINY = 1e-8


class Taylor:
    """Judges by gradients of the executor."""

    needs_data = True

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, model: Model, groups: Sequence[Group], context: Context) -> Mapping[str, Scores]:
        """At most 256 samples; see `Criterion`. Groups without a float weight are judged by magnitude.

        Raises NotExecutableError for operators that have no gradient here, ModelNotRunnableError.
        """
        weights = Weights(model)
        members = {group.id: found for group in groups if (found := _judged(group, weights))}
        rest = [group for group in groups if group.id not in members]
        scores = dict(Magnitude(2)(model, rest, context))
        judged = [group for group in groups if group.id in members]
        if judged:
            scores.update(self._by_gradients(model, judged, members, context))
        return scores

    def _by_gradients(
        self, model: Model, groups: Sequence[Group], members: Mapping[str, list[Member]], context: Context
    ) -> dict[str, Scores]:
        names = {member.tensor for found in members.values() for member in found}
        values = tensor_outputs(model.graph)
        executor = Executor(
            model,
            trainable=names,
            outputs=[value.name or "" for value in values],
            device=device_for(context.target.device),
        )
        parameters = executor.parameters_by_name
        generator = Generator().manual_seed(self._seed)
        scores = {group.id: np.zeros(group.units) for group in groups}
        classes = classification_outputs(model.graph)
        fit = int(MAX_GRADIENT_BYTES // max(1, gradient_bytes(model, context.data)))
        for feed in context.data.spread(MAX_SAMPLES).feeds(max(1, min(BATCH_SIZE, fit))):
            context.check_time()
            outputs = executor(feed)
            for draw in range(DRAWS):
                loss = _drawn_loss(values, outputs, classes, feed, generator)
                if loss is None or not loss.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    loss, list(parameters.values()), allow_unused=True, retain_graph=draw + 1 < DRAWS
                )
                changes = {
                    name: parameter.detach() * gradient
                    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
                    if gradient is not None
                }
                for group in groups:
                    scores[group.id] += np.square(_effect(group, members[group.id], changes))
        return {name: np.nan_to_num(score) for name, score in scores.items()}


def _judged(group: Group, weights: Weights) -> list[Member]:
    """The weights that read the group's units; those that make them where none reads them."""
    floats = [
        member
        for member in group.members
        if weights.array(member.tensor).ndim > 1 and weights.array(member.tensor).dtype.kind == "f"
    ]
    return [member for member in floats if member.role == "consumer"] or floats


def _effect(group: Group, members: Sequence[Member], changes: Mapping[str, Tensor]) -> Scores:
    """The first-order change of the loss when each unit's weights become zero, without its sign."""
    total = np.zeros(group.units)
    for member in members:
        change = changes.get(member.tensor)
        if change is not None:
            others = [axis for axis in range(change.dim()) if axis != member.axis % change.dim()]
            total += per_unit(change.to(torch.float64).sum(dim=others).cpu().numpy(), member)
    return total


def _drawn_loss(
    values: Sequence[onnx_ir.Value],
    outputs: Mapping[str, Tensor],
    classes: frozenset[str],
    feed: Feeds,
    generator: Generator,
) -> Tensor | None:
    """A loss whose squared gradients have the mean that counts; None where no output has a gradient."""
    mask = counted_positions(feed)
    losses = []
    for value in values:
        output = outputs[value.name or ""]
        if not isinstance(output, Tensor) or not output.requires_grad:
            continue
        if (counted := counted_among(output.shape[:-1], mask)) is not None:
            output = output[torch.from_numpy(counted).to(output.device)]  # padding is nobody's answer
        form = score_form(value)
        if value.name in classes and form != INDEPENDENT and output.dim() in (2, 3) and output.shape[-1] > 1:
            losses.append(_fisher_projection(output, form, generator))
        else:
            losses.append(_projection(output, generator))
    return torch.stack(losses).sum() if losses else None


def _fisher_projection(scores: Tensor, form: str, generator: Generator) -> Tensor:
    """<r, scores>, r of the covariance diag(p) - p p' at each position."""
    logs = scores.clamp_min(_TINY).log() if form == PROBABILITIES else scores.log_softmax(-1)
    p = logs.detach().exp()
    root = p.sqrt()
    e = torch.randn(p.shape, generator=generator).to(p.device)
    r = root * e - p * (root * e).sum(-1, keepdim=True)
    return (r * torch.nan_to_num(logs, neginf=0.0)).sum()


def _projection(output: Tensor, generator: Generator) -> Tensor:
    """<r, output> over the square root of the output's power."""
    random = torch.randn(output.shape, generator=generator).to(output.device)
    power = output.detach().square().mean().clamp_min(_TINY)
    return (random * output).sum() / (power * output[0].numel()).sqrt()
