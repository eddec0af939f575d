"""Normalizations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


@operator("BatchNormalization")
def batch_normalization(site: Site) -> Function:
    """Training mode (opset 14 on) normalizes by the batch and returns the running statistics as well."""
    epsilon, momentum = site.number("epsilon", 1e-5), site.number("momentum", 0.9)
    if site.flag("training_mode"):
        return lambda x, scale, bias, mean, var: _training(x, scale, bias, mean, var, epsilon, momentum)

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        # torch takes the statistics for buffers: where they carry gradients, the formula is spelled out.
        if mean.requires_grad or var.requires_grad:
            factor = scale / torch.sqrt(var + epsilon)
            return x * _column(factor, x) + _column(bias - mean * factor, x)
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)

    return run


def _training(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    batch_var, batch_mean = torch.var_mean(x.detach(), axes, correction=0)
    return y, mean * momentum + batch_mean * (1 - momentum), var * momentum + batch_var * (1 - momentum)


def _column(vector: Tensor, x: Tensor) -> Tensor:
    """A value for each channel, ready to be broadcast against [N, C, ...]."""
    return vector.reshape(-1, *([1] * (x.dim() - 2)))


@operator("InstanceNormalization")
def instance_normalization(site: Site) -> Function:
    epsilon = site.number("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # As groups of one channel: torch's own refuses planes of a single element.
        return F.group_norm(x, x.shape[1], scale, bias, epsilon)

    return run


@operator("GroupNormalization")
def group_normalization(site: Site) -> Function:
    """Scale and bias for each group in opset 18 to 20, for each channel from 21 on."""
    groups, epsilon = site.integer("num_groups", 1), site.number("epsilon", 1e-5)
    by_group = site.version < 21

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if by_group:
            repeats = x.shape[1] // groups
            scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
        return F.group_norm(x, groups, scale, bias, epsilon)

    return run


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None, axis: int, epsilon: float) -> Tensor:
    """Over all axes from `axis` on; scale and bias are broadcast against them."""
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    y = F.layer_norm(x, shape, None, None, epsilon) * scale
    return y if bias is None else y + bias


@operator("LayerNormalization")
def layer_normalization(site: Site) -> Function:
    axis, epsilon, outputs = site.integer("axis", -1), site.number("epsilon", 1e-5), site.outputs

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        y = layer_norm(x, scale, bias, axis, epsilon)
        if outputs == 1:
            return y
        axes = tuple(range(axis % x.dim(), x.dim()))
        var, mean = torch.var_mean(x.to(torch.float32) if x.element_size() < 4 else x, axes, correction=0, keepdim=True)
        return y, mean, torch.rsqrt(var + epsilon)

    return run


def rms_norm(x: Tensor, scale: Tensor, axis: int, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) over all axes from `axis` on (Zhang and Sennrich 2019)."""
    if scale.shape == x.shape[axis:]:
        return F.rms_norm(x, x.shape[axis:], scale, epsilon)
    return F.rms_norm(x, x.shape[axis:], None, epsilon) * scale


@operator("RMSNormalization")
@operator("SimplifiedLayerNormalization")
def rms_normalization(site: Site) -> Function:
    axis, epsilon = site.integer("axis", -1), site.number("epsilon", 1e-5)
    return lambda x, scale: rms_norm(x, scale, axis, epsilon)


@operator("LRN")
def local_response_normalization(site: Site) -> Function:
    """x / (bias + alpha / size * sum of squares of `size` channels around)^beta."""
    size, alpha = site.integer("size", 1), site.number("alpha", 1e-4)
    beta, bias = site.number("beta", 0.75), site.number("bias", 1.0)

    def run(x: Tensor) -> Tensor:
        squares = (x * x).reshape(x.shape[0], 1, x.shape[1], -1)
        padded = F.pad(squares, (0, 0, (size - 1) // 2, size // 2))
        sums = F.avg_pool2d(padded, (size, 1), 1).reshape(x.shape)
        return x / (bias + alpha * sums) ** beta

    return run


@operator("MeanVarianceNormalization")
def mean_variance_normalization(site: Site) -> Function:
    axes = site.ints("axes", (0, 2, 3)) or ()

    def run(x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (torch.sqrt(var) + 1e-9)

    return run


@operator("LpNormalization")
def lp_normalization(site: Site) -> Function:
    """Vectors of length 0 stay 0."""
    axis, p = site.integer("axis", -1), site.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))

    return run
