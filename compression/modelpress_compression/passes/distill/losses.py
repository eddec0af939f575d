"""Distances between the student's outputs and the teacher's, chosen by what an output is.

    class scores        KL(p_t || p_s) * T^2 of the scores over the temperature T (Hinton et al., arXiv:1503.02531);
                        probabilities become scores again by their logarithm; to unnormalized scores 0.1 times
                        the squared error is added, since KL does not see a shift of all classes
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
        # Validation compares losses whose difference is below the rounding of float32 sums.
        precision = torch.float32 if torch.is_grad_enabled() else torch.float64
        mine, theirs = student[self.name].to(precision), teacher[self.name].to(precision)
        if mask is not None and mine.dim() >= 3 and mine.shape[:2] == mask.shape:
            mine, theirs = mine[mask], theirs[mask]
        return self.distance(mine, theirs)


def output_losses(
    graph: onnx_ir.Graph, samples: Mapping[str, Array], loss: str, temperature: float
) -> tuple[list[ValueLoss], dict[str, str]]:
    """A loss for each output of the teacher's `graph` that can have one, and the reason for each that cannot.

    `samples`: outputs of the teacher for some samples. `loss`: auto, or kl, cosine or mse for all outputs.
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


def _loss_of(value: onnx_ir.Value, array: Array, wanted: str, temperature: float, classes: bool) -> ValueLoss:
    """The loss of one output. `array`: the teacher's values; `classes`: the graph says that it may be class scores."""
    name, form = value.name or "", score_form(value)
    kind = _kind_of(value, array, classes) if wanted == "auto" else wanted
    if kind == "kl" and form == INDEPENDENT:
        # Each class has a probability of its own: there is no softmax that a temperature could soften.
        return ValueLoss(name, "kl (sigmoid)", bernoulli_kl, form)
    if not _holds_vectors(array):
        # A single number at each position is neither a distribution nor a direction, whatever was asked for.
        kind = "mse"
    squared_error = relative_mse(array)
    if kind == "kl":
        # Maps of scores [N, C, H, W] have their classes where convolutions put channels.
        divergence = kl(form, temperature, axis=1 if array.ndim > 3 else -1)
        if wanted == "auto" and form == LOGITS:
            # Nobody said that these are class scores. If they are compared with a threshold instead, a shift of all of
            # them matters, and KL alone would not see it.
            divergence = _sum(divergence, squared_error, LEVEL_WEIGHT)
        return ValueLoss(name, "kl", divergence, form)
    if kind == "embedding":
        # The cosine leaves the lengths of the vectors open, which a search by dot product reads.
        return ValueLoss(name, "cosine and mse", _sum(cosine, squared_error), form)
    return ValueLoss(name, kind, cosine if kind == "cosine" else squared_error, form)


def _kind_of(value: onnx_ir.Value, array: Array, classes: bool) -> str:
    """kl, embedding or mse, by what the graph says of the output."""
    form = score_form(value)
    # [N, C] or [N, T, C]. Sigmoids may be a single one: yes or no.
    scores = classes and array.ndim in (2, 3) and (_holds_vectors(array) or form == INDEPENDENT)
    if scores or form == PROBABILITIES:
        return "kl"
    return "embedding" if _holds_vectors(array) and is_embedding(value) else "mse"


def _holds_vectors(array: Array) -> bool:
    """Whether the last axis holds several numbers that belong together."""
    return array.ndim >= 2 and array.shape[-1] >= 2


def _sum(first: Distance, second: Distance, weight: float = 1.0) -> Distance:
    return lambda student, teacher: first(student, teacher) + weight * second(student, teacher)


def log_probabilities(scores: Tensor, form: str, axis: int = -1, temperature: float = 1.0) -> Tensor:
    """Logarithms of the class probabilities, from scores in any form, softened by the temperature."""
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
