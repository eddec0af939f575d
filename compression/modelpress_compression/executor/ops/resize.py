"""Resize and Upsample: an interpolation axis by axis, or torch's own where it computes the same.

An output element at y samples the input at x(y), as `coordinate_transformation_mode` says. Its value is a weighted sum
of the elements k around x, with weights kernel((k - x) * s), where s = min(scale, 1) for antialiasing and 1 without.
Kernels: the triangle (linear) and Keys' cubic convolution (1981).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

Floats = NDArray[np.float64]
_ROUND: dict[str, Callable[[Floats], Floats]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@dataclass(frozen=True)
class Interpolation:
    """How to interpolate: the attributes of the node."""

    mode: str
    coordinates: str
    nearest: str
    cubic_a: float
    exclude_outside: bool
    antialias: bool
    extrapolation: float


@dataclass(frozen=True)
class ResizedAxis:
    """One axis: both extents, the scale as given or implied, and the part of the input that a crop samples."""

    extent: int
    output: int
    scale: float
    roi: tuple[float, float]


def _coordinates(axis: ResizedAxis, mode: str) -> Floats:
    """x(y) of every output element. Some modes have a rule of their own for an output of one element."""
    y = np.arange(axis.output, dtype=np.float64)
    length, last = axis.scale * axis.extent, axis.extent - 1
    if mode in ("align_corners", "tf_crop_and_resize"):
        start, end = axis.roi if mode == "tf_crop_and_resize" else (0.0, 1.0)
        if length == 1:
            return np.full(axis.output, (start + end) * last / 2 if mode == "tf_crop_and_resize" else 0.0)
        return y * ((end - start) * last / (length - 1)) + start * last
    if mode == "pytorch_half_pixel" and length == 1:
        return np.full(axis.output, -0.5)
    centre = 0.0 if mode == "asymmetric" else 0.5
    shift = 0.0 if mode in ("asymmetric", "tf_half_pixel_for_nn") else -0.5
    if mode == "half_pixel_symmetric":
        shift += axis.extent / 2 * (1 - axis.output / length)
    result: Floats = (y + centre) / axis.scale + shift
    return result


def _kernel(distance: Floats, mode: str, a: float) -> Floats:
    d = np.abs(distance)
    if mode == "linear":
        return np.asarray(np.clip(1 - d, 0, 1))
    inner = ((a + 2) * d - (a + 3)) * d * d + 1
    outer = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, inner, np.where(d < 2, outer, 0.0))


@functools.lru_cache(maxsize=256)
def _matrix(axis: ResizedAxis, method: Interpolation) -> Tensor:
    """[output, extent]: the weight of each input element in each output element; outside, the edge is repeated."""
    x = _coordinates(axis, method.coordinates)
    squeeze = min(axis.scale, 1.0) if method.antialias else 1.0
    reach = math.ceil((1 if method.mode == "linear" else 2) / squeeze)
    places = np.floor(x)[:, None] + np.arange(-reach, reach + 2)
    weights = _kernel((places - x[:, None]) * squeeze, method.mode, method.cubic_a)
    if method.antialias:
        weights = weights / weights.sum(1, keepdims=True)
    if method.exclude_outside:
        weights = np.where((places < 0) | (places >= axis.extent), 0.0, weights)
        total = weights.sum(1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    result = np.zeros((axis.output, axis.extent))
    columns = np.clip(places, 0, axis.extent - 1).astype(np.int64)
    np.add.at(result, (np.arange(axis.output)[:, None], columns), weights)
    return torch.from_numpy(result)


@functools.lru_cache(maxsize=256)
def _nearest(axis: ResizedAxis, method: Interpolation) -> Tensor:
    places = _ROUND[method.nearest](_coordinates(axis, method.coordinates))
    return torch.from_numpy(np.clip(places, 0, axis.extent - 1).astype(np.int64))


def _along(x: Tensor, dim: int, axis: ResizedAxis, method: Interpolation) -> Tensor:
    if method.mode == "nearest":
        y = x.index_select(dim, _nearest(axis, method).to(x.device))
    else:
        matrix = _matrix(axis, method).to(x)
        y = (x.movedim(dim, -1) @ matrix.t()).movedim(-1, dim)
    if method.coordinates == "tf_crop_and_resize":
        where = _coordinates(axis, method.coordinates)
        outside = torch.from_numpy((where < 0) | (where > axis.extent - 1)).to(x.device)
        y = y.masked_fill(outside.reshape([-1 if d == dim else 1 for d in range(x.dim())]), method.extrapolation)
    return y


_TORCH_MODES = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}


def _torch_options(method: Interpolation, axes: Sequence[ResizedAxis]) -> dict[str, Any] | None:
    """Options of torch's interpolate where it does just this on spatial `axes`; None where it does not."""
    exact = all(axis.scale == axis.output / axis.extent for axis in axes)
    if not exact or method.antialias or method.exclude_outside or not axes:
        return None
    # pytorch_half_pixel puts a single output element elsewhere.
    several = all(axis.output > 1 for axis in axes)
    centred = method.coordinates == "half_pixel" or (method.coordinates == "pytorch_half_pixel" and several)
    if method.mode == "nearest":
        whole = all(axis.output % axis.extent == 0 for axis in axes)
        if method.coordinates == "asymmetric" and method.nearest == "floor":
            return {"mode": "nearest"}
        return {"mode": "nearest-exact"} if whole and centred and method.nearest.startswith("round") else None
    mode = _TORCH_MODES.get((method.mode, len(axes)))
    aligned = method.coordinates == "align_corners"
    if mode is None or not (centred or aligned) or (method.mode == "cubic" and method.cubic_a != -0.75):
        return None
    return {"mode": mode, "align_corners": aligned}


def resized(x: Tensor, axes: dict[int, ResizedAxis], method: Interpolation) -> Tensor:
    """`axes`: those that change, by position."""
    if not axes:
        return x
    if not x.dtype.is_floating_point:
        return resized(x.to(torch.float32), axes, method).to(x.dtype)
    spatial = [axes.get(dim, ResizedAxis(x.shape[dim], x.shape[dim], 1.0, (0.0, 1.0))) for dim in range(2, x.dim())]
    if min(axes) >= 2 and x.dim() <= 5 and (options := _torch_options(method, spatial)) is not None:
        return F.interpolate(x, size=[axis.output for axis in spatial], **options)
    for dim, axis in axes.items():
        x = _along(x, dim, axis, method)
    return x


@operator("Resize", since=11)
def resize(site: Site) -> Function:
    """Inputs x, roi, scales, sizes."""
    method = Interpolation(
        site.string("mode", "nearest"), site.string("coordinate_transformation_mode", "half_pixel"),
        site.string("nearest_mode", "round_prefer_floor"), site.number("cubic_coeff_a", -0.75),
        site.flag("exclude_outside"), site.flag("antialias"), site.number("extrapolation_value", 0.0),
    )  # fmt: skip
    if method.coordinates == "tf_half_pixel_for_nn":
        method = replace(method, nearest="floor")
    chosen, policy = site.ints("axes"), site.string("keep_aspect_ratio_policy", "stretch")
    read_sizes = site.reader(3)
    site.host_inputs.update((1, 2))

    def run(*inputs: Tensor) -> Tensor:
        x, roi, scales = inputs[0], _given(inputs, 1), _given(inputs, 2)
        dims = tuple(range(x.dim())) if chosen is None else tuple(axis % x.dim() for axis in chosen)
        sizes = read_sizes(*inputs)
        factors = [float(f) for f in scales.tolist()] if scales is not None and scales.numel() else None
        regions = roi.tolist() if roi is not None and roi.numel() else [0.0] * len(dims) + [1.0] * len(dims)
        axes = {}
        for number, (dim, output, scale) in enumerate(_targets(x.shape, dims, sizes, factors, policy)):
            region = (float(regions[number]), float(regions[len(dims) + number]))
            cropped = method.coordinates == "tf_crop_and_resize" and region != (0.0, 1.0)
            if output != x.shape[dim] or scale != 1.0 or cropped:
                axes[dim] = ResizedAxis(x.shape[dim], output, scale, region)
        return resized(x, axes, method)

    return run


def _given(inputs: Sequence[Tensor | None], index: int) -> Tensor | None:
    return inputs[index] if index < len(inputs) else None


def _targets(
    shape: Sequence[int], dims: Sequence[int], sizes: Sequence[int], factors: Sequence[float] | None, policy: str
) -> list[tuple[int, int, float]]:
    """(axis, output extent, scale) for every axis that may change."""
    if factors is not None:
        return [(dim, int(shape[dim] * f), f) for dim, f in zip(dims, factors, strict=True)]
    scales = [size / shape[dim] for dim, size in zip(dims, sizes, strict=True)]
    if policy == "stretch":
        return list(zip(dims, sizes, scales, strict=True))
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [(dim, int(scale * shape[dim] + 0.5), scale) for dim in dims]


@operator("Resize", since=10, until=10)
@operator("Upsample", until=9)
def upsample(site: Site) -> Function:
    """Older forms: scales as an attribute or as the second input."""
    method = Interpolation(site.string("mode", "nearest"), "asymmetric", "floor", -0.75, False, False, 0.0)
    fixed = site.floats("scales")

    def run(x: Tensor, scales: Tensor | None = None) -> Tensor:
        factors = list(fixed or ()) if scales is None else [float(f) for f in scales.tolist()]
        targets = _targets(x.shape, range(x.dim()), (), factors, "stretch")
        axes = {
            dim: ResizedAxis(x.shape[dim], output, scale, (0.0, 1.0))
            for dim, output, scale in targets
            if output != x.shape[dim] or scale != 1.0
        }
        return resized(x, axes, method)

    return run
