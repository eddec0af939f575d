"""Pooling over windows and over whole planes, and its inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.ops.spatial import Window, pad_spatial
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

_MAX: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Pool:
    """The geometry of a pooling node."""

    def __init__(self, site: Site) -> None:
        self.window, self.ceil = Window.of(site), site.flag("ceil_mode")
        self.kernel = site.ints("kernel_shape") or ()
        self.rank = len(self.kernel)
        self.strides, self.dilations = self.window.strides_of(self.rank), self.window.dilations_of(self.rank)

    def padding(self, extents: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(begin, end, further at the end so that the last window fits, where sizes are rounded up)."""
        begin, end = self.window.padding(extents, self.kernel)
        further = []
        for axis, extent in enumerate(extents):
            span = (self.kernel[axis] - 1) * self.dilations[axis] + 1
            room, stride = extent + begin[axis] + end[axis] - span, self.strides[axis]
            steps = -(-room // stride) if self.ceil else room // stride
            if self.ceil and steps * stride >= extent + begin[axis]:
                steps -= 1  # a window must not begin in the padding at the end
            further.append(max(steps * stride - room, 0))
        return begin, end, tuple(further)

    def symmetric(self, extents: Sequence[int]) -> tuple[int, ...] | None:
        """The padding, where torch can do it itself."""
        begin, end, further = self.padding(extents)
        fits = begin == end and not any(further)
        return begin if fits and all(2 * pad <= size for pad, size in zip(begin, self.kernel, strict=True)) else None


@operator("MaxPool")
def max_pool(site: Site) -> Function:
    """With indices: into the flattened input; `storage_order` 1 counts its last two axes the other way round."""
    pool, column_major = Pool(site), site.flag("storage_order")
    with_indices = site.outputs > 1
    function = _MAX.get(pool.rank)
    if function is None:
        site.refuse(f"windows of {pool.rank} axes")

    def run(x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values = x if x.dtype.is_floating_point else x.to(torch.float32)
        begin: Sequence[int] = (0,) * pool.rank
        padding = pool.symmetric(x.shape[2:])
        if padding is None:
            begin, end, further = pool.padding(x.shape[2:])
            ends = [a + b for a, b in zip(end, further, strict=True)]
            values, padding = pad_spatial(values, begin, ends, float("-inf")), (0,) * pool.rank
        options = (pool.kernel, pool.strides, padding, pool.dilations)
        if not with_indices:
            return function(values, *options).to(x.dtype)
        y, found = function(values, *options, return_indices=True)
        return y.to(x.dtype), _flat_indices(found, values.shape, x.shape, begin, column_major)

    return run


def _flat_indices(
    found: Tensor, padded: Sequence[int], shape: Sequence[int], begin: Sequence[int], column_major: bool
) -> Tensor:
    """From indices into a padded plane to indices into the whole tensor."""
    extents, coordinates = list(shape[2:]), []
    for extent in reversed(padded[2:]):
        coordinates.append(found % extent)
        found = found // extent
    places = [place - start for place, start in zip(reversed(coordinates), begin, strict=True)]
    if column_major:
        places, extents = places[::-1], extents[::-1]
    flat = torch.zeros_like(found)
    for place, extent in zip(places, extents, strict=True):
        flat = flat * extent + place
    planes = torch.arange(shape[0] * shape[1], device=found.device).reshape(shape[0], shape[1], *([1] * len(extents)))
    return planes * math.prod(extents) + flat


def _window_sums(x: Tensor, pool: Pool) -> Tensor:
    """Sums of the windows of a padded tensor [N, C, ...], as a convolution with ones on every channel."""
    planes = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones((1, 1, *pool.kernel), dtype=x.dtype, device=x.device)
    sums = _CONV[pool.rank](planes, ones, None, pool.strides, 0, pool.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


@operator("AveragePool")
def average_pool(site: Site) -> Function:
    """Padding counts only with `count_include_pad`; the rows that rounding up adds at the end never count."""
    pool, include = Pool(site), site.flag("count_include_pad")
    function = _AVERAGE.get(pool.rank)
    if function is None:
        site.refuse(f"windows of {pool.rank} axes")
    dilated = any(dilation != 1 for dilation in pool.dilations)

    def run(x: Tensor) -> Tensor:
        padding = pool.symmetric(x.shape[2:])
        if padding is not None and not dilated:
            return function(x, pool.kernel, pool.strides, padding, False, include)
        begin, end, further = pool.padding(x.shape[2:])
        ends = [a + b for a, b in zip(end, further, strict=True)]
        ones = x.new_ones((1, 1, *x.shape[2:]))
        if include:
            counted = pad_spatial(pad_spatial(ones, begin, end, 1.0), (0,) * pool.rank, further)
        else:
            counted = pad_spatial(ones, begin, ends)
        return _window_sums(pad_spatial(x, begin, ends), pool) / _window_sums(counted, pool)

    return run


@operator("LpPool")
def lp_pool(site: Site) -> Function:
    pool, p = Pool(site), site.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        begin, end, further = pool.padding(x.shape[2:])
        ends = [a + b for a, b in zip(end, further, strict=True)]
        return _window_sums(pad_spatial(x.abs() ** p, begin, ends), pool) ** (1 / p)

    return run


@operator("GlobalAveragePool")
def global_average_pool(site: Site) -> Function:
    return lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(site: Site) -> Function:
    return lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(site: Site) -> Function:
    p = site.integer("p", 2)
    return lambda x: (x.abs() ** p).sum(tuple(range(2, x.dim())), keepdim=True) ** (1 / p)


@operator("MaxUnpool")
def max_unpool(site: Site) -> Function:
    """Puts values where MaxPool found them. The indices count in the tensor that the attributes imply; a larger
    `output_shape` leaves the rest zero at the end."""
    window, kernel = Window.of(site), site.ints("kernel_shape") or ()
    read = site.reader(2)

    def run(x: Tensor, indices: Tensor, shape: Tensor | None = None) -> Tensor:
        rank = len(kernel)
        pads = window.pads or (0,) * (2 * rank)
        natural = [
            (extent - 1) * stride + size - low - high
            for extent, stride, size, low, high in zip(
                x.shape[2:], window.strides_of(rank), kernel, pads[:rank], pads[rank:], strict=True
            )
        ]
        full = (*x.shape[:2], *natural)
        flat = x.new_zeros(math.prod(full)).scatter(0, indices.reshape(-1), x.reshape(-1))
        y = flat.reshape(full)
        wanted = read(x, indices, shape) if shape is not None else ()
        if not wanted:
            return y
        return pad_spatial(y, (0,) * rank, [a - b for a, b in zip(wanted[2:], natural, strict=True)])

    return run
