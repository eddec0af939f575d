"""Operators that move values without changing them: shapes, axes, pieces, blocks, padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site


@operator("Reshape", carries_unsigned=True)
def reshape(site: Site) -> Function:
    """0 keeps an axis, unless `allowzero` says that it means none."""
    read, zero = site.reader(1), site.flag("allowzero")

    def run(x: Tensor, shape: Tensor) -> Tensor:
        dims = read(x, shape)
        if 0 in dims and not zero:
            dims = tuple(x.shape[axis] if dim == 0 else dim for axis, dim in enumerate(dims))
        return x.reshape(dims)

    return run


@operator("Flatten", carries_unsigned=True)
def flatten(site: Site) -> Function:
    """To two axes: those before `axis`, and the rest."""
    axis = site.integer("axis", 1)

    def run(x: Tensor) -> Tensor:
        position = axis if axis >= 0 else axis + x.dim()
        return x.reshape(x.shape[:position].numel(), x.shape[position:].numel())

    return run


@operator("Transpose", carries_unsigned=True)
def transpose(site: Site) -> Function:
    order = site.ints("perm")
    if order is None:
        return lambda x: x.permute(*reversed(range(x.dim())))
    return lambda x: x.permute(order)


@operator("Squeeze", carries_unsigned=True)
def squeeze(site: Site) -> Function:
    read = site.reader(1, "axes")

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        axes = read(x, *rest)
        return x.squeeze(axes) if axes else x.squeeze()

    return run


@operator("Unsqueeze", carries_unsigned=True)
def unsqueeze(site: Site) -> Function:
    read = site.reader(1, "axes")

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        axes = read(x, *rest)
        if len(axes) == 1:
            return x.unsqueeze(axes[0])
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return run


def broadcast(a: Sequence[int], b: Sequence[int]) -> torch.Size:
    """The shape that both are broadcast to."""
    return torch.Size(torch.broadcast_shapes(a, b))  # type: ignore[no-untyped-call]


@operator("Expand", carries_unsigned=True)
def expand(site: Site) -> Function:
    """Both sides are broadcast: an extent of 1 in the shape keeps that of the value."""
    read = site.reader(1)
    return lambda x, shape: x.expand(broadcast(x.shape, read(x, shape)))


@operator("Tile", carries_unsigned=True)
def tile(site: Site) -> Function:
    read = site.reader(1)
    return lambda x, repeats: x.repeat(read(x, repeats))


@operator("Concat", carries_unsigned=True)
def concat(site: Site) -> Function:
    axis = site.integer("axis", 0)
    return lambda *values: torch.cat(values, axis)


@operator("Split", carries_unsigned=True)
def split(site: Site) -> Function:
    """Into given sizes, or into equal ones, the last of which may be smaller."""
    axis, parts = site.integer("axis", 0), site.integer("num_outputs", len(site.node.outputs))
    read = site.reader(1, "split")

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        sizes = read(x, *rest)
        if not sizes:
            size = -(-x.shape[axis] // parts)
            sizes = tuple(min(size, x.shape[axis] - size * index) for index in range(parts))
        return torch.split(x, list(sizes), axis)

    return run


@operator("Slice", until=9)
def slice_attributes(site: Site) -> Function:
    starts, ends, axes = site.ints("starts", ()) or (), site.ints("ends", ()) or (), site.ints("axes")
    return lambda x: sliced(x, starts, ends, axes or tuple(range(len(starts))), (1,) * len(starts))


@operator("Slice", since=10, carries_unsigned=True)
def slice_(site: Site) -> Function:
    readers = [site.reader(index) for index in (1, 2, 3, 4)]

    def run(*inputs: Tensor) -> Tensor:
        starts, ends, axes, steps = (read(*inputs) for read in readers)
        return sliced(inputs[0], starts, ends, axes or tuple(range(len(starts))), steps or (1,) * len(starts))

    return run


def sliced(
    x: Tensor, starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...], steps: tuple[int, ...]
) -> Tensor:
    """As Python slices: clamped to the extents, with negative steps from the end."""
    index: list[slice] = [slice(None)] * x.dim()
    flipped = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step > 0:
            index[axis] = slice(start, end, step)
            continue
        # torch has no negative steps: the same elements forwards, then turned round.
        places = range(x.shape[axis])[_clamped(start, end, step, x.shape[axis])]
        index[axis] = slice(places[-1], places[0] + 1, -step) if places else slice(0, 0)
        flipped.append(axis)
    result = x[tuple(index)]
    return result.flip(flipped) if flipped else result


def _clamped(start: int, end: int, step: int, extent: int) -> slice:
    """ONNX's end before the first element (-extent - 1 or less) is None for Python."""
    return slice(start, None if end < -extent else end, step)


@operator("SpaceToDepth", carries_unsigned=True)
def space_to_depth(site: Site) -> Function:
    """[N, C, H, W] -> [N, block * block * C, H / block, W / block]; DCR has the block before the channels."""
    block = site.integer("blocksize", 1)
    order = (0, 1, 3, 5, 2, 4) if site.string("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)

    def run(x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        y = x.reshape(count, channels, height // block, block, width // block, block).permute(order)
        return y.reshape(count, channels * block * block, height // block, width // block)

    return run


@operator("DepthToSpace", carries_unsigned=True)
def depth_to_space(site: Site) -> Function:
    """CRD is torch's pixel_shuffle; DCR has the block before the channels."""
    block = site.integer("blocksize", 1)
    if site.string("mode", "DCR") == "CRD":
        return lambda x: F.pixel_shuffle(x, block)

    def run(x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        y = x.reshape(count, block, block, channels // (block * block), height, width).permute(0, 3, 4, 1, 5, 2)
        return y.reshape(count, channels // (block * block), height * block, width * block)

    return run


@operator("Trilu", carries_unsigned=False)
def trilu(site: Site) -> Function:
    """The upper or lower triangle of the last two axes, from diagonal k on."""
    function = torch.triu if site.flag("upper", True) else torch.tril
    read = site.reader(1)

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        offset = read(x, *rest)
        return function(x, offset[0] if offset else 0)

    return run


@operator("ReverseSequence")
def reverse_sequence(site: Site) -> Function:
    """The first `lengths[b]` elements of each sequence in reverse order."""
    batch_axis, time_axis = site.integer("batch_axis", 1), site.integer("time_axis", 0)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[time_axis], device=x.device)[None]
        ends = lengths[:, None]
        places = torch.where(steps < ends, ends - 1 - steps, steps)
        moved = x.movedim((batch_axis, time_axis), (0, 1))
        rows = torch.arange(moved.shape[0], device=x.device)[:, None]
        return moved[rows, places].movedim((0, 1), (batch_axis, time_axis))

    return run


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
