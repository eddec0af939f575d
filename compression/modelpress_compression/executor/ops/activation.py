"""Activation functions of neural networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody names it

from modelpress_compression.executor.registry import Function, operator, stateless
from modelpress_compression.executor.site import Site

stateless(torch.relu, "Relu")
stateless(torch.sigmoid, "Sigmoid")
stateless(F.mish, "Mish")
stateless(F.softsign, "Softsign")


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without the threshold beyond which torch's is linear."""
    return torch.logaddexp(x, torch.zeros_like(x))


def parametric_relu(x: Tensor, slope: Tensor) -> Tensor:
    """The slope is broadcast to x."""
    return torch.where(x < 0, x * slope, x)


stateless(softplus, "Softplus")
stateless(parametric_relu, "PRelu")


@operator("LeakyRelu")
def leaky_relu(site: Site) -> Function:
    alpha = site.number("alpha", 0.01)
    return lambda x: F.leaky_relu(x, alpha)


@operator("Elu")
def elu(site: Site) -> Function:
    alpha = site.number("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


@operator("Celu")
def celu(site: Site) -> Function:
    alpha = site.number("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


@operator("Selu")
def selu(site: Site) -> Function:
    alpha, gamma = site.number("alpha", 1.67326319217681884765625), site.number("gamma", 1.05070102214813232421875)
    return lambda x: gamma * F.elu(x, alpha)


@operator("Gelu")
def gelu(site: Site) -> Function:
    approximate = site.string("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


@operator("HardSigmoid")
def hard_sigmoid(site: Site) -> Function:
    """max(0, min(1, alpha x + beta)); torch has the one with 1/6 and 1/2."""
    alpha, beta = site.number("alpha", 0.2), site.number("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return F.hardsigmoid
    return lambda x: torch.clamp(alpha * x + beta, 0, 1)


stateless(F.hardswish, "HardSwish")


@operator("Swish")
def swish(site: Site) -> Function:
    alpha = site.number("alpha", 1.0)
    if alpha == 1.0:
        return F.silu
    return lambda x: x * torch.sigmoid(alpha * x)


@operator("Shrink")
def shrink(site: Site) -> Function:
    bias, threshold = site.number("bias", 0.0), site.number("lambd", 0.5)

    def run(x: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        return torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, zero)).to(x.dtype)

    return run


@operator("ThresholdedRelu")
def thresholded_relu(site: Site) -> Function:
    alpha = site.number("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


def hardmax(x: Tensor, axis: int) -> Tensor:
    """1 at the first maximum along the axis, 0 elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def softmax(x: Tensor, axis: int) -> Tensor:
    """For 16-bit floats every step is rounded, as ONNX defines the operator by its function body."""
    if x.element_size() >= 4:
        return torch.softmax(x, axis)
    exponentials = torch.exp(x - x.amax(axis, keepdim=True))
    return exponentials / exponentials.sum(axis, keepdim=True)


_OVER_AXIS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Softmax": softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": hardmax,
}


@operator("Softmax", "LogSoftmax", "Hardmax", since=13)
def over_axis(site: Site) -> Function:
    function, axis = _OVER_AXIS[site.node.op_type], site.integer("axis", -1)
    return lambda x: function(x, axis)


@operator("Softmax", "LogSoftmax", "Hardmax", until=12)
def over_flattened(site: Site) -> Function:
    """Over all axes from `axis` on, taken together."""
    function, axis = _OVER_AXIS[site.node.op_type], site.integer("axis", 1)

    def run(x: Tensor) -> Tensor:
        if axis in (-1, x.dim() - 1):
            return function(x, -1)
        return function(x.flatten(axis if axis >= 0 else axis + x.dim()), -1).reshape(x.shape)

    return run
