"""Padding and cropping at the edges."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


@operator("Pad", until=10)
def pad_attributes(site: Site) -> Function:
    pads, mode, value = site.ints("pads", ()) or (), site.string("mode", "constant"), site.number("value", 0.0)
    return lambda x: padded(x, pads, tuple(range(x.dim())), mode, value)


@operator("Pad", since=11)
def pad(site: Site) -> Function:
    """Negative amounts cut."""
    mode = site.string("mode", "constant")
    read_pads, read_axes = site.reader(1), site.reader(3)

    def run(*inputs: Tensor) -> Tensor:
        x = inputs[0]
        value = inputs[2].item() if len(inputs) > 2 and inputs[2] is not None else 0
        axes = read_axes(*inputs) or tuple(range(x.dim()))
        return padded(x, read_pads(*inputs), axes, mode, value)

    return run


def padded(x: Tensor, pads: tuple[int, ...], axes: tuple[int, ...], mode: str, value: float) -> Tensor:
    """`pads`: what to add at the beginning of each axis, then at the end of each."""
    count = len(axes)
    if mode == "constant":
        amounts = [0] * (2 * x.dim())
        for position, axis in enumerate(axes):
            back = x.dim() - 1 - axis % x.dim()
            amounts[2 * back], amounts[2 * back + 1] = pads[position], pads[count + position]
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), amounts, value=int(value)).to(torch.bool)
        return F.pad(x, amounts, value=value)
    for position, axis in enumerate(axes):
        begin, end = pads[position], pads[count + position]
        if begin or end:
            x = _repeated(x, axis % x.dim(), begin, end, mode)
    return x


def _repeated(x: Tensor, axis: int, begin: int, end: int, mode: str) -> Tensor:
    """Padding by elements of the axis itself: which ones is a list of indices."""
    extent = x.shape[axis]
    places = torch.arange(-begin, extent + end, device=x.device)
    if mode == "edge":
        places = places.clamp(0, extent - 1)
    elif mode == "wrap":
        places = places % extent
    else:
        period = max(2 * (extent - 1), 1)
        places = places % period
        places = torch.where(places >= extent, period - places, places)
    return x.index_select(axis, places)


@operator("CenterCropPad")
def center_crop_pad(site: Site) -> Function:
    """Cut or padded with zeros to a shape, about the middle."""
    read, chosen = site.reader(1), site.ints("axes")

    def run(x: Tensor, shape: Tensor) -> Tensor:
        axes = tuple(range(x.dim())) if chosen is None else tuple(axis % x.dim() for axis in chosen)
        amounts = [0] * (2 * x.dim())
        for axis, wanted in zip(axes, read(x, shape), strict=True):
            difference = wanted - x.shape[axis]
            first = difference // 2 if difference > 0 else -(-difference // 2)
            back = x.dim() - 1 - axis
            amounts[2 * back], amounts[2 * back + 1] = first, difference - first
        return F.pad(x, amounts)

    return run
