"""Random changes of images [N, C, H, W], signals [N, ..., T] and token indices [N, T], in plain torch.

Each sample changes by itself. Changes of images are named as in torchvision. How images are scaled is not known, so
that nothing here counts on [0, 1]: the area that a rotation uncovers repeats the border, colours move by shares of the
image's own standard deviation, and no value leaves the range of its batch.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F  # noqa: N812

# Aspect ratios of crops, as in torchvision.
_RATIOS = (3 / 4, 4 / 3)


def horizontal_flip(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """Mirrored left to right with this probability."""
    return _flipped(images, probability, generator, axis=3)


def vertical_flip(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """Mirrored top to bottom with this probability."""
    return _flipped(images, probability, generator, axis=2)


def _flipped(images: Tensor, probability: float, generator: Generator, axis: int) -> Tensor:
    chosen = torch.rand(len(images), generator=generator) < probability
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(axis), images)


def rotation(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Turned about the middle by an angle in [-degrees, degrees]."""
    angles = _uniform(len(images), -math.radians(degrees), math.radians(degrees), generator)
    height, width = images.shape[2:]
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # The grid runs from -1 to 1 along both axes, so that the matrix has to make up for different heights and widths.
    rows = [cosine, -sine * height / width, zero, sine * width / height, cosine, zero]
    return _sampled(images, torch.stack(rows, dim=1).view(-1, 2, 3))


def random_resized_crop(images: Tensor, smallest: float, generator: Generator) -> Tensor:
    """A crop with a share in [smallest, 1] of the area and an aspect ratio from 3/4 to 4/3, resized to the whole."""
    count = len(images)
    area = _uniform(count, smallest, 1, generator)
    ratio = _uniform(count, math.log(_RATIOS[0]), math.log(_RATIOS[1]), generator).exp()
    width, height = ((area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1))
    x, y = ((2 * torch.rand(count, generator=generator) - 1) * (1 - side) for side in (width, height))
    zero = torch.zeros_like(x)
    return _sampled(images, torch.stack([width, zero, x, zero, height, y], dim=1).view(-1, 2, 3))


def _sampled(images: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def color_jitter(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Brightness moved by up to `strength` standard deviations of the image; contrast, and saturation of 3 channels,
    scaled by a factor in [1 - strength, 1 + strength]."""
    shift, contrast, saturation = (
        _uniform(len(images), -strength, strength, generator).view(-1, 1, 1, 1) for _ in range(3)
    )
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    spread = images.std(dim=(1, 2, 3), keepdim=True, correction=0)
    changed = mean + (images - mean) * (1 + contrast) + shift * spread
    if images.shape[1] == 3:
        grey = changed.mean(dim=1, keepdim=True)
        changed = grey + (changed - grey) * (1 + saturation)
    return _within(changed, images)


def noise(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Gaussian noise of this share of the batch's standard deviation; for tensors of any shape."""
    drawn = torch.randn(images.shape, generator=generator)
    return _within(images + share * images.std(correction=0) * drawn, images)


def mixup(images: Tensor, alpha: float, generator: Generator) -> Tensor:
    """Each image blended with another of its batch, the larger share its own (Zhang et al., arXiv:1710.09412)."""
    # Beta(a, a) from two gamma variates; torch draws those only from its global generator.
    a, b = (_gamma(alpha, len(images), generator) for _ in range(2))
    share = (a / (a + b).clamp_min(1e-12)).view(-1, 1, 1, 1)
    share = torch.maximum(share, 1 - share)
    return share * images + (1 - share) * images[torch.randperm(len(images), generator=generator)]


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
    """Replaces this share of the tokens, except the first of each sample, by others of the batch.

    A file does not say which token stands for a mask; a random token hides the one that was there as well (BERT does
    this for one masked token in ten, Devlin et al., arXiv:1810.04805). `counted` [N, T]: positions that are no padding;
    only these change, and only their tokens are drawn.
    """
    counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
    chosen = (torch.rand(tokens.shape, generator=generator) < share) & counted
    chosen[:, 0] = False
    known = tokens[counted]
    drawn = known[torch.randint(len(known), tokens.shape, generator=generator)]
    return torch.where(chosen, drawn, tokens)


def _gamma(shape: float, count: int, generator: Generator) -> Tensor:
    """Gamma variates of this shape and scale 1 (Marsaglia and Tsang 2000, with the boost for shapes below 1)."""
    boosted = shape + 1
    d = boosted - 1 / 3
    c = 1 / math.sqrt(9 * d)
    result = torch.full((count,), d)
    pending = torch.ones(count, dtype=torch.bool)
    while bool(pending.any()):
        x = torch.randn(count, generator=generator)
        v = (1 + c * x) ** 3
        u = torch.rand(count, generator=generator).clamp_min(1e-12)
        accepted = pending & (v > 0) & (u.log() < 0.5 * x**2 + d - d * v + d * v.clamp_min(1e-12).log())
        result = torch.where(accepted, d * v, result)
        pending &= ~accepted
    return result * torch.rand(count, generator=generator).clamp_min(1e-12) ** (1 / shape)


def _within(changed: Tensor, images: Tensor) -> Tensor:
    return changed.clamp(images.min(), images.max())


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)
