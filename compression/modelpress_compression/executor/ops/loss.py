"""Losses that a graph itself may hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

# torch wants an index to ignore; without one in the graph, this never occurs.
_NEVER = -(2**31)


def _negative_log_likelihood(
    log_p: Tensor, target: Tensor, weight: Tensor | None, ignored: int, reduction: str
) -> Tensor:
    """log_p [batch, classes, ...], target [batch, ...]; the mean is weighted by the classes' weights."""
    flat = log_p.movedim(1, -1).reshape(-1, log_p.shape[1])
    labels = target.to(torch.int64)
    loss = F.nll_loss(flat, labels.reshape(-1), weight, ignore_index=ignored, reduction=reduction)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _options(site: Site) -> tuple[int, str]:
    return site.integer("ignore_index", _NEVER), site.string("reduction", "mean")


@operator("NegativeLogLikelihoodLoss", since=12)
def negative_log_likelihood_loss(site: Site) -> Function:
    ignored, reduction = _options(site)
    return lambda x, target, weight=None: _negative_log_likelihood(x, target, weight, ignored, reduction)


@operator("SoftmaxCrossEntropyLoss", since=12)
def softmax_cross_entropy_loss(site: Site) -> Function:
    """With the logarithms of the probabilities as second output, where wanted."""
    (ignored, reduction), outputs = _options(site), site.outputs

    def run(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Any:
        log_p = torch.log_softmax(x, 1)
        loss = _negative_log_likelihood(log_p, target, weight, ignored, reduction)
        return (loss, log_p) if outputs > 1 else loss

    return run
