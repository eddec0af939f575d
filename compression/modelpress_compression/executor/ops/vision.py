"""Sampling at computed places (grids, regions of interest), and which boxes to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.registry import Function, operator
from modelpress_compression.executor.site import Site

_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


@operator("GridSample", since=16)
def grid_sample(site: Site) -> Function:
    mode, padding = site.string("mode", "linear"), site.string("padding_mode", "zeros")
    mode, aligned = _GRID_MODES.get(mode, mode), site.flag("align_corners")
    return lambda x, grid: F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=aligned)


@operator("AffineGrid", since=20)
def affine_grid(site: Site) -> Function:
    aligned, read = site.flag("align_corners"), site.reader(1)
    return lambda theta, size: F.affine_grid(theta, list(read(theta, size)), align_corners=aligned)


@operator("RoiAlign")
def roi_align(site: Site) -> Function:
    """He et al. 2017: bins of each region sampled bilinearly, then averaged (or their largest corner taken)."""
    height, width = site.integer("output_height", 1), site.integer("output_width", 1)
    ratio, scale, mode = (
        site.integer("sampling_ratio", 0),
        site.number("spatial_scale", 1.0),
        site.string("mode", "avg"),
    )
    default = "half_pixel" if site.version >= 16 else "output_half_pixel"
    half = site.string("coordinate_transformation_mode", default) == "half_pixel"

    def run(x: Tensor, rois: Tensor, batch: Tensor) -> Tensor:
        if not len(rois):
            return x.new_zeros((0, x.shape[1], height, width))
        regions = (rois.detach() * scale - (0.5 if half else 0.0)).tolist()
        pooled = [
            _region(x[int(index)], region, (height, width), ratio, half, mode)
            for region, index in zip(regions, batch, strict=True)
        ]
        return torch.stack(pooled)

    return run


def _region(x: Tensor, region: list[float], bins: tuple[int, int], ratio: int, half: bool, mode: str) -> Tensor:
    """[C, *bins] of one region (x1, y1, x2, y2) of a feature map [C, H, W]."""
    left, top, right, bottom = region
    samples = []
    for start, end, count, extent in ((top, bottom, bins[0], x.shape[1]), (left, right, bins[1], x.shape[2])):
        length = end - start if half else max(end - start, 1.0)
        grid = ratio if ratio > 0 else max(math.ceil(length / count), 0)
        steps = torch.arange(count * grid, dtype=torch.float64)
        samples.append((_linear(start + (steps + 0.5) * (length / count / max(grid, 1)), extent), grid))
    (rows, grid_y), (columns, grid_x) = samples
    corners = []
    for y_place, y_weight in rows:
        for x_place, x_weight in columns:
            seen = x.index_select(1, y_place.to(x.device)).index_select(2, x_place.to(x.device))
            corners.append(seen * (y_weight[:, None] * x_weight).to(x))
    shape = (x.shape[0], bins[0], grid_y, bins[1], grid_x)
    if mode == "max":
        return torch.stack(corners).amax(0).reshape(shape).amax((2, 4))
    return sum(corners[1:], corners[0]).reshape(shape).mean((2, 4))


def _linear(places: Tensor, extent: int) -> list[tuple[Tensor, Tensor]]:
    """[(lower index, weight), (upper index, weight)]; outside by more than one element the weights are 0."""
    inside = (places >= -1) & (places <= extent)
    clamped = places.clamp(0, extent - 1)
    lower = clamped.floor().clamp(max=max(extent - 1, 0))
    upper = (lower + 1).clamp(max=extent - 1)
    share = clamped - lower
    zero = torch.zeros_like(share)
    return [
        (lower.to(torch.int64), torch.where(inside, 1 - share, zero)),
        (upper.to(torch.int64), torch.where(inside, share, zero)),
    ]


@operator("NonMaxSuppression")
def non_max_suppression(site: Site) -> Function:
    """[selected, 3]: batch, class, box, by falling score; boxes that overlap a better one too much are left out."""
    center = site.flag("center_point_box")

    def run(
        boxes: Tensor, scores: Tensor, most: Tensor | None = None, overlap: Tensor | None = None,
        lowest: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        limit = 0 if most is None else int(most)
        threshold = 0.0 if overlap is None else float(overlap)
        floor = -math.inf if lowest is None else float(lowest)
        corners = _corners(boxes.detach(), center)
        found = [
            (batch, label, box)
            for batch in range(scores.shape[0])
            for label in range(scores.shape[1])
            for box in _kept(corners[batch], scores[batch, label].detach(), limit, threshold, floor)
        ]
        return torch.tensor(found, dtype=torch.int64, device=boxes.device).reshape(-1, 3)

    return run


def _corners(boxes: Tensor, center: bool) -> Tensor:
    """[..., 4] as lower and upper corner."""
    if center:
        middle, size = boxes[..., :2], boxes[..., 2:]
        return torch.cat([middle - size / 2, middle + size / 2], -1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _kept(boxes: Tensor, scores: Tensor, limit: int, threshold: float, floor: float) -> list[int]:
    order = [int(index) for index in torch.argsort(scores, descending=True, stable=True) if scores[index] > floor]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    kept: list[int] = []
    for index in order:
        if len(kept) >= limit:
            break
        others = boxes[kept]
        sides = torch.minimum(boxes[index, 2:], others[:, 2:]) - torch.maximum(boxes[index, :2], others[:, :2])
        common = sides.clamp(min=0).prod(-1)
        share = common / (areas[index] + areas[kept] - common)
        if not bool((share > threshold).any()):
            kept.append(index)
    return kept
