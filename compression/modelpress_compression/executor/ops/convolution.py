"""Convolutions. Weights [out, in / group, *kernel]; transposed ones [in, out / group, *kernel]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.ops.spatial import Window, pad_spatial
from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

_FORWARD: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolution(site: Site) -> Function:
    """(x, weight, bias) -> y."""
    window, group = Window.of(site), site.integer("group", 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        kernel = weight.shape[2:]
        rank = len(kernel)
        begin, end = window.padding(x.shape[2:], kernel)
        if begin != end:
            x, begin = pad_spatial(x, begin, end), (0,) * rank
        return _FORWARD[rank](x, weight, bias, window.strides_of(rank), begin, window.dilations_of(rank), group)

    return run


@operator("Conv")
def conv(site: Site) -> Function:
    """All arguments are bound beforehand where the padding is the same on both sides, as it mostly is."""
    window, group = Window.of(site), site.integer("group", 1)
    kernel = site.ints("kernel_shape")
    if kernel is None or len(kernel) not in _FORWARD or window.auto_pad not in ("NOTSET", "", "VALID"):
        return convolution(site)
    rank = len(kernel)
    begin, end = window.padding((), kernel)
    if begin != end:
        return convolution(site)
    function, strides, dilations = _FORWARD[rank], window.strides_of(rank), window.dilations_of(rank)
    return lambda x, weight, bias=None: function(x, weight, bias, strides, begin, dilations, group)


@operator("ConvTranspose")
def conv_transpose(site: Site) -> Function:
    """Computed whole, then cut: `pads` may differ between the sides, and `output_shape` may decide them."""
    window, group = Window.of(site), site.integer("group", 1)
    extra, wanted = site.ints("output_padding"), site.ints("output_shape")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        kernel = tuple(weight.shape[2:])
        rank = len(kernel)
        strides, dilations = window.strides_of(rank), window.dilations_of(rank)
        added = extra or (0,) * rank
        whole = [
            (extent - 1) * stride + (size - 1) * dilation + 1 + more
            for extent, stride, size, dilation, more in zip(x.shape[2:], strides, kernel, dilations, added, strict=True)
        ]
        goals: Sequence[int] | None = None
        if wanted is not None:
            goals = wanted[-rank:]
        elif window.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            goals = [extent * stride for extent, stride in zip(x.shape[2:], strides, strict=True)]
        if goals is None:
            begin, end = window.padding(x.shape[2:], kernel)
        else:
            begin, end = _output_padding(window, [a - b for a, b in zip(whole, goals, strict=True)])
        function = _TRANSPOSED[rank]
        if begin == end and not any(added):
            return function(x, weight, bias, strides, begin, 0, group, dilations)
        y = function(x, weight, None, strides, 0, 0, group, dilations)
        cut = [more - amount for more, amount in zip(added, end, strict=True)]
        y = pad_spatial(y, [-amount for amount in begin], cut)
        return y if bias is None else y + bias.reshape(-1, *([1] * rank))

    return run


def _output_padding(window: Window, totals: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(begin, end) to cut for a given output: of an odd total, only SAME_UPPER cuts more at the end. Negative totals,
    rows that are missing, are added at the end."""
    cut = [max(total, 0) for total in totals]
    first = [total // 2 if window.auto_pad == "SAME_UPPER" else total - total // 2 for total in cut]
    return tuple(first), tuple(total - begin for total, begin in zip(totals, first, strict=True))


@operator("DeformConv")
def deform_conv(site: Site) -> Function:
    """Deformable convolution (Dai et al. 2017; with masks, Zhu et al. 2019): every tap samples at its own offset.

    offset [N, groups * taps * 2, oh, ow] with (y, x) in turn, mask [N, groups * taps, oh, ow].
    """
    window, group, offset_group = Window.of(site), site.integer("group", 1), site.integer("offset_group", 1)

    def run(
        x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        columns = _sampled(x, weight, offset, mask, window, offset_group)
        count, channels, taps, height, width = columns.shape
        columns = columns.reshape(count, group, channels // group * taps, height * width)
        weights = weight.reshape(group, weight.shape[0] // group, -1)
        y = torch.einsum("ngkp,gok->ngop", columns, weights).reshape(count, weight.shape[0], height, width)
        return y if bias is None else y + bias.reshape(1, -1, 1, 1)

    return run


def _sampled(
    x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, window: Window, offset_group: int
) -> Tensor:
    """The input sampled at each tap: [N, C, taps, oh, ow], bilinear, zero outside."""
    count, channels, *extents = x.shape
    kernel = weight.shape[2:]
    taps = kernel[0] * kernel[1]
    height, width = offset.shape[2:]
    begin, _ = window.padding(extents, kernel)
    base = []
    for axis, out in enumerate((height, width)):
        starts = torch.arange(out, dtype=x.dtype, device=x.device) * window.strides_of(2)[axis] - begin[axis]
        steps = torch.arange(kernel[axis], dtype=x.dtype, device=x.device) * window.dilations_of(2)[axis]
        base.append(starts[None] + steps[:, None])
    shift = offset.reshape(count, offset_group, *kernel, 2, height, width)
    rows = shift[:, :, :, :, 0] + base[0][:, None, :, None]
    cols = shift[:, :, :, :, 1] + base[1][None, :, None, :]
    groups = x.reshape(count, offset_group, channels // offset_group, -1)
    seen = _bilinear(groups, rows.flatten(2), cols.flatten(2), extents[0], extents[1])
    seen = seen.reshape(count, offset_group, channels // offset_group, taps, height, width)
    if mask is not None:
        seen = seen * mask.reshape(count, offset_group, 1, taps, height, width)
    return seen.reshape(count, channels, taps, height, width)


def _bilinear(planes: Tensor, rows: Tensor, cols: Tensor, height: int, width: int) -> Tensor:
    """planes [N, G, C, height * width] at places [N, G, P]: [N, G, C, P], zero outside. Unlike grid_sample it takes
    pixels as they are, so that whole numbers hit them exactly."""
    total = torch.zeros((*planes.shape[:3], rows.shape[-1]), dtype=planes.dtype, device=planes.device)
    for row in (rows.floor(), rows.floor() + 1):
        for col in (cols.floor(), cols.floor() + 1):
            weight = (1 - (rows - row).abs()) * (1 - (cols - col).abs())
            inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
            places = (row.clamp(0, height - 1) * width + col.clamp(0, width - 1)).to(torch.int64)
            corner = planes.gather(-1, places.unsqueeze(2).expand(total.shape))
            total = total + corner * torch.where(inside, weight, torch.zeros_like(weight)).unsqueeze(2)
    return total


@operator("Col2Im")
def col2im(site: Site) -> Function:
    """Sums blocks [N, C * taps, positions] into an image, the inverse of im2col: blocks that overlap are added up."""
    window = Window.of(site)
    read_image, read_block = site.reader(1), site.reader(2)

    def run(x: Tensor, image: Tensor, block: Tensor) -> Tensor:
        extents, kernel = read_image(x, image, block), read_block(x, image, block)
        rank = len(kernel)
        begin, end = window.padding(extents, kernel)
        taps = torch.Size(kernel).numel()
        channels = x.shape[1] // taps
        weight = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *kernel)
        strides, dilations = window.strides_of(rank), window.dilations_of(rank)
        padded = [extent + low + high for extent, low, high in zip(extents, begin, end, strict=True)]
        positions = [
            (extent - (size - 1) * dilation - 1) // stride + 1
            for extent, size, dilation, stride in zip(padded, kernel, dilations, strides, strict=True)
        ]
        blocks = x.reshape(x.shape[0] * channels, taps, *positions)
        y = _TRANSPOSED[rank](blocks, weight, None, strides, 0, 0, 1, dilations)
        short = [extent - have for extent, have in zip(padded, y.shape[2:], strict=True)]
        y = pad_spatial(y, [-low for low in begin], [more - high for more, high in zip(short, end, strict=True)])
        return y.reshape(x.shape[0], channels, *extents)

    return run
