"""Distances between the student's outputs and the teacher's, chosen by what an output is.

    class scores        KL(p_t || p_s) * T^2 of the scores over the temperature T (Hinton et al., arXiv:1503.02531);
                        probabilities are taken back to scores by their logarithm; scores that are none have 0.1
                        times the squared error beside it, since KL does not see a shift of all classes
    independent scores  (a sigmoid each) the same between Bernoulli distributions, without a temperature
    embeddings          1 - cosine, along the last axis, and the relative squared error
    everything else     the squared error, relative to the variance of the teacher's output on the first samples

Each is 0 where the two are equal, and a mean over positions, so that batches of any size weigh alike. Positions that an
attention mask leaves out do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.graph.outputs import (
    INDEPENDENT,
    LOG_PROBABILITIES,
    LOGITS,
    PROBABILITIES,
    classification_outputs,
    is_embedding,
    score_form,
)
from modelpress_compression.inputs import Array

Distance = Callable[[Tensor, Tensor], Tensor]

# Scores of minus infinity, as masks leave them, would make 0 * inf.
_LOWEST_SCORE = -1e4
_TINY = 1e-8
LEVEL_WEIGHT = 0.1


@dataclass(frozen=True)
class ValueLoss:
    """The distance at one value that both models compute. `kind`: its name for people; `form`: what its scores are."""

    name: str
    kind: str
    distance: Distance
    form: str = LOGITS

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
        # Judging must tell losses apart that lie below what float32 sums can tell.
        precision = torch.float32 if torch.is_grad_enabled() else torch.float64
        mine, theirs = student[self.name].to(precision), teacher[self.name].to(precision)
        if mask is not None and mine.dim() >= 3 and mine.shape[:2] == mask.shape:
            mine, theirs = mine[mask], theirs[mask]
        return self.distance(mine, theirs)


def output_losses(
    graph: onnx_ir.Graph, samples: Mapping[str, Array], loss: str, temperature: float
) -> tuple[list[ValueLoss], dict[str, str]]:
    """A loss for each output of the teacher's `graph` that has one, and why others have none.

    `samples`: outputs of the teacher for some samples. `loss`: auto, or the distance that all outputs shall have.
    """
    losses, reasons = [], {}
    classes = classification_outputs(graph)
    for value in graph.outputs:
        name = value.name or ""
        array = samples.get(name)
        if array is None or array.dtype.kind != "f" or not array.size:
            reasons[name] = f"values of type {array.dtype if array is not None else 'unknown'} have no gradient"
        else:
            losses.append(_loss_of(value, array, loss, temperature, name in classes))
    return losses, reasons


def _loss_of(value: onnx_ir.Value, array: Array, loss: str, temperature: float, scores: bool) -> ValueLoss:
    name, form = value.name or "", score_form(value)
    vectors = array.ndim >= 2 and array.shape[-1] >= 2
    kind = loss
    if loss == "auto":
        kind = (
            "kl"
            if (scores and array.ndim in (2, 3) and (vectors or form == INDEPENDENT)) or form == PROBABILITIES
            else "embedding"
            if vectors and is_embedding(value)
            else "mse"
        )
    if kind == "kl" and form == INDEPENDENT:
        return ValueLoss(name, "kl (sigmoid)", bernoulli_kl, form)
    if kind == "kl" and vectors:
        divergence = kl(form, temperature, axis=1 if array.ndim > 3 else -1)
        if loss != "auto" or form != LOGITS:
            return ValueLoss(name, "kl", divergence, form)
        level = relative_mse(array)
        return ValueLoss(name, "kl", lambda s, t: divergence(s, t) + LEVEL_WEIGHT * level(s, t), form)
    if kind == "cosine" and vectors:
        return ValueLoss(name, "cosine", cosine, form)
    if kind == "embedding":
        relative = relative_mse(array)
        return ValueLoss(name, "cosine and mse", lambda s, t: cosine(s, t) + relative(s, t), form)
    return ValueLoss(name, "mse", relative_mse(array), form)


def log_probabilities(scores: Tensor, form: str, axis: int = -1, temperature: float = 1.0) -> Tensor:
    """Of scores in any form, softened by the temperature."""
    if form == PROBABILITIES:
        scores = scores.clamp_min(_TINY).log()
    return F.log_softmax(scores.clamp_min(_LOWEST_SCORE) / temperature, dim=axis)


def kl(form: str, temperature: float, axis: int = -1) -> Distance:
    """KL divergence of the softened class probabilities, times T^2, a mean over positions."""

    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        mine, theirs = (log_probabilities(scores, form, axis, temperature) for scores in (student, teacher))
        divergence = (theirs.exp() * (theirs - mine)).sum(axis)
        return divergence.mean() * temperature**2

    return distance


def bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL divergence between independent probabilities."""
    p, q = teacher.clamp(_TINY, 1 - 1e-6), student.clamp(_TINY, 1 - 1e-6)
    return (p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())).mean()


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine along the last axis."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def relative_mse(sample: Array) -> Distance:
    """The mean squared error over the variance of `sample`."""
    finite = sample.astype(np.float64)[np.isfinite(sample)]
    variance = float(finite.var()) if finite.size else 0.0
    scale = variance if variance > 0 else float(np.square(finite).mean()) if finite.any() else 1.0
    return lambda student, teacher: torch.nan_to_num(student - teacher).square().mean() / scale


__all__ = [
    "LOG_PROBABILITIES",
    "Distance",
    "ValueLoss",
    "bernoulli_kl",
    "cosine",
    "kl",
    "log_probabilities",
    "output_losses",
    "relative_mse",
]
