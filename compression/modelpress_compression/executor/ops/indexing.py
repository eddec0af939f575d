"""Elements picked by index, and put back by index."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


def _wrapped(indices: Tensor, extent: int) -> Tensor:
    """Negative indices count from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + extent, indices)


@operator("Gather", carries_unsigned=True)
def gather(site: Site) -> Function:
    axis = site.integer("axis", 0)
    known = site.constant(1)
    if known is not None and known.dim() == 0:
        place = int(known)
        return lambda x, _: x.select(axis, place) if isinstance(x, Tensor) else np.take(x, place, axis)
    positive = known is not None and bool((known >= 0).all())

    def run(x: Tensor, indices: Tensor) -> Tensor:
        if isinstance(x, np.ndarray):
            return np.take(x, indices.numpy(), axis)
        places = indices.to(torch.int64) if positive else _wrapped(indices, x.shape[axis])
        if axis == 0 and x.dim() == 2 and x.dtype.is_floating_point:
            return F.embedding(places, x)
        if places.dim() == 1:
            return x.index_select(axis, places)
        position = axis % x.dim()
        taken = x.index_select(position, places.reshape(-1))
        return taken.reshape(x.shape[:position] + places.shape + x.shape[position + 1 :])

    return run


@operator("GatherElements")
def gather_elements(site: Site) -> Function:
    axis = site.integer("axis", 0)
    return lambda x, indices: torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


@operator("GatherND")
def gather_nd(site: Site) -> Function:
    """The last axis of the indices points into the axes after the batch axes."""
    batch = site.integer("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        lead = x.shape[:batch]
        data = x.reshape(lead.numel(), *x.shape[batch:])
        places = indices.to(torch.int64).reshape(lead.numel(), -1, indices.shape[-1])
        rows = torch.arange(data.shape[0], device=x.device)[:, None]
        taken = data[(rows, *places.unbind(-1))]
        return taken.reshape(indices.shape[:-1] + x.shape[batch + indices.shape[-1] :])

    return run


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def scatter_elements(site: Site) -> Function:
    axis, reduction = site.integer("axis", 0), site.string("reduction", "none")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = _wrapped(indices, x.shape[axis])
        if reduction == "none":
            return x.scatter(axis, places, updates)
        if reduction == "add":
            return x.scatter_add(axis, places, updates)
        return x.scatter_reduce(axis, places, updates, _REDUCE[reduction])

    return run


@operator("ScatterND")
def scatter_nd(site: Site) -> Function:
    reduction = site.string("reduction", "none")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        depth = indices.shape[-1]
        places = tuple(
            _wrapped(index, extent) for index, extent in zip(indices.unbind(-1), x.shape[:depth], strict=True)
        )
        if reduction in ("none", "add"):
            return x.index_put(places, updates, accumulate=reduction == "add")
        flat = torch.zeros_like(places[0])
        for place, extent in zip(places, x.shape[:depth], strict=True):
            flat = flat * extent + place
        inner = x.shape[depth:].numel()
        columns = flat.reshape(-1, 1) * inner + torch.arange(inner, device=x.device)
        result = x.reshape(-1).scatter_reduce(0, columns.reshape(-1), updates.reshape(-1), _REDUCE[reduction])
        return result.reshape(x.shape)

    return run


@operator("TensorScatter")
def tensor_scatter(site: Site) -> Function:
    """Writes a piece into a cache at one position for each sample; circular mode wraps round the end."""
    axis, circular = site.integer("axis", -2), site.string("mode", "linear") == "circular"

    def run(past: Tensor, update: Tensor, starts: Tensor | None = None) -> Tensor:
        position = axis % past.dim()
        length = update.shape[position]
        first = torch.zeros(past.shape[0], dtype=torch.int64, device=past.device) if starts is None else starts
        places = first[:, None] + torch.arange(length, device=past.device)
        places = places % past.shape[position] if circular else places
        shape = [1] * past.dim()
        shape[0], shape[position] = past.shape[0], length
        return past.scatter(position, places.reshape(shape).expand(update.shape), update)

    return run


@operator("Compress")
def compress(site: Site) -> Function:
    """Where the condition holds; it may be shorter than the axis."""
    axis = site.integer("axis", 0) if "axis" in site.node.attributes else None

    def run(x: Tensor, condition: Tensor) -> Tensor:
        places = condition.nonzero().reshape(-1)
        return x.reshape(-1).index_select(0, places) if axis is None else x.index_select(axis, places)

    return run


@operator("NonZero")
def non_zero(site: Site) -> Function:
    """[rank, count]; of a scalar [0, count]."""
    return lambda x: x.nonzero().t() if x.dim() else torch.zeros((0, int(x != 0)), dtype=torch.int64, device=x.device)


@operator("TopK", since=11)
def top_k(site: Site) -> Function:
    """Equal values in the order of their indices, as a stable sort gives them."""
    axis, largest = site.integer("axis", -1), site.flag("largest", True)
    read = site.reader(1)

    def run(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (count,) = read(x, k)
        values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, count), places.narrow(axis, 0, count)

    return run


@operator("Unique")
def unique(site: Site) -> Function:
    """(values, first places, inverse, counts), sorted or in the order of their first places."""
    axis = site.integer("axis", 0) if "axis" in site.node.attributes else None
    in_order = site.flag("sorted", True)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        if axis is None:
            values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
            inverse = inverse.reshape(-1)
        else:
            values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=axis)
        total = inverse.numel()
        positions = torch.arange(total, device=x.device)
        first = torch.full((counts.numel(),), total, device=x.device).scatter_reduce(0, inverse, positions, "amin")
        if not in_order:
            order = torch.argsort(first)
            values = values.index_select(axis or 0, order)
            rank = torch.argsort(order)
            first, inverse, counts = first[order], rank[inverse], counts[order]
        return values, first, inverse, counts

    return run
