"""Random changes of signals [N, ..., T] and of token indices [N, T], each sample by itself."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def time_masking(signals: Tensor, share: float, generator: Generator, axis: int = -1) -> Tensor:
    """A stretch of up to `share` of the time becomes the sample's mean (SpecAugment, Park et al., arXiv:1904.08779)."""
    count, extent = len(signals), signals.shape[axis]
    length = torch.rand(count, generator=generator) * share * extent
    start = torch.rand(count, generator=generator) * (extent - length)
    places = torch.arange(extent) + 0.5
    hidden = (places >= start[:, None]) & (places < (start + length)[:, None])
    shape = [count] + [1] * (signals.dim() - 1)
    shape[axis] = extent
    mean = signals.mean(dim=tuple(range(1, signals.dim())), keepdim=True)
    return torch.where(hidden.view(shape), mean, signals)


def token_masking(tokens: Tensor, share: float, generator: Generator, counted: Tensor | None = None) -> Tensor:
    """This share of the tokens, the first of each sample left out, becomes others of the batch.

    A file does not say which token stands for a mask; other tokens hide what was there as well (as one in ten of
    BERT's, Devlin et al., arXiv:1810.04805). `counted` [N, T]: positions that are no padding; only these change, and
    only their tokens are taken.
    """
    counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
    chosen = (torch.rand(tokens.shape, generator=generator) < share) & counted
    chosen[:, 0] = False
    known = tokens[counted]
    drawn = known[torch.randint(len(known), tokens.shape, generator=generator)]
    return torch.where(chosen, drawn, tokens)
