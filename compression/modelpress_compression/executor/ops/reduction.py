"""Reductions over axes, and running sums; the axes are an attribute up to opset 12 (ReduceSum) or 17, then an input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype) if dims else x


def _mean(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return torch.mean(x, dims, keepdim=keep) if dims else x
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return torch.div(_sum(x, dims, keep), count, rounding_mode="trunc")


def _extreme(x: Tensor, dims: tuple[int, ...], keep: bool, function: Function, empty: float) -> Tensor:
    """The reduction of no elements: the neutral element."""
    if any(x.shape[dim] == 0 for dim in dims):
        shape = [1 if axis in dims else extent for axis, extent in enumerate(x.shape)]
        result = x.new_full(shape, empty)
        return result if keep else result.reshape([s for axis, s in enumerate(shape) if axis not in dims])
    result = function(x, dims, keepdim=keep) if dims else x
    return result


def _lowest(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return False
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return True
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max


def _maximum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return _extreme(x, dims, keep, torch.amax, _lowest(x.dtype))


def _minimum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return _extreme(x, dims, keep, torch.amin, _highest(x.dtype))


def _product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keepdim=keep, dtype=x.dtype)
    return x


def _log_sum_exp(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    if not dims:
        return x
    return torch.logsumexp(x, dims, keepdim=keep)


_REDUCTIONS: dict[str, Reduce] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _maximum,
    "ReduceMin": _minimum,
    "ReduceProd": _product,
    "ReduceL1": lambda x, dims, keep: _sum(torch.abs(x), dims, keep),
    "ReduceL2": lambda x, dims, keep: torch.sqrt(_sum(x * x, dims, keep)).to(x.dtype),
    "ReduceLogSum": lambda x, dims, keep: torch.log(_sum(x, dims, keep)),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceSumSquare": lambda x, dims, keep: _sum(x * x, dims, keep),
}


@operator(*_REDUCTIONS)
def reduction(site: Site) -> Function:
    """Without axes: over all of them, or over none where `noop_with_empty_axes` says so."""
    function, keep = _REDUCTIONS[site.node.op_type], site.flag("keepdims", True)
    none = site.flag("noop_with_empty_axes")
    read = site.reader(1, "axes")

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        axes = read(x, *rest)
        if not axes:
            return function(x, () if none else tuple(range(x.dim())), keep)
        return function(x, tuple(axis % max(x.dim(), 1) for axis in axes), keep) if x.dim() else function(x, (), keep)

    return run


@operator("ArgMax", "ArgMin")
def argument(site: Site) -> Function:
    axis, keep, last = site.integer("axis", 0), site.flag("keepdims", True), site.flag("select_last_index")
    function = torch.argmax if site.node.op_type == "ArgMax" else torch.argmin

    def run(x: Tensor) -> Tensor:
        if not last:
            return function(x, axis, keepdim=keep)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)

    return run


@operator("CumSum", "CumProd")
def cumulative(site: Site) -> Function:
    """Sums or products along an axis; `exclusive` leaves the element itself out, `reverse` goes from the end."""
    exclusive, reverse = site.flag("exclusive"), site.flag("reverse")
    read = site.reader(1)
    function = torch.cumsum if site.node.op_type == "CumSum" else torch.cumprod
    neutral = 0 if site.node.op_type == "CumSum" else 1

    def run(x: Tensor, axis: Tensor) -> Tensor:
        (dim,) = read(x, axis)
        x = x.flip(dim) if reverse else x
        if exclusive:
            first = torch.full_like(x.narrow(dim, 0, 1), neutral)
            x = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
        result = function(x, dim, dtype=x.dtype)
        return result.flip(dim) if reverse else result

    return run
