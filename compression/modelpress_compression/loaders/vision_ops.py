"""torchvision's `nms` and `roi_align` for TorchScript archives that call them, where torchvision is not installed.

torch reads no archive that calls an operator it does not know. These are defined while one is read, run and exported;
they are written for checking a conversion, not for speed.

Source of both: torchvision/csrc/ops/cpu/{nms,roi_align}_kernel.cpp.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from modelpress_compression.loaders.foreign_operators import defined

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
# What scripted detectors name in branches that they do not take; without a kernel, so that taking one is refused.
_UNUSED_SCHEMAS = (
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
)


def vision_operators() -> AbstractContextManager[None]:
    """Defines the operators until the block ends, unless torchvision has."""
    return defined("torchvision", "nms", define)


def define(library: Any) -> None:
    """The operators in `library`, a fragment of the namespace `torchvision`, for CPU."""
    for schema in (*_SCHEMAS, *_UNUSED_SCHEMAS):
        library.define(schema)
    library.impl("nms", nms, "CPU")
    library.impl("roi_align", roi_align, "CPU")


def nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Boxes [n, 4] (x1, y1, x2, y2) that overlap no better one by more than `threshold`: their indices, best first."""
    order = scores.argsort(descending=True, stable=True)
    left = order
    kept: list[torch.Tensor] = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while left.numel():
        best, left = left[0], left[1:]
        kept.append(best)
        corner = torch.maximum(boxes[best, :2], boxes[left, :2])
        sides = (torch.minimum(boxes[best, 2:], boxes[left, 2:]) - corner).clamp(min=0)
        common = sides[:, 0] * sides[:, 1]
        # Boxes without area overlap by 0 / 0, which is not more than anything: they stay.
        left = left[~(common / (areas[best] + areas[left] - common) > threshold)]
    return torch.stack(kept) if kept else order


def roi_align(
    features: torch.Tensor, rois: torch.Tensor, scale: float, height: int, width: int, sampling: int, aligned: bool
) -> torch.Tensor:
    """Means of bilinear samples in `height` x `width` parts of each region [k, 5] (image, x1, y1, x2, y2)."""
    results = [_region(features, roi, scale, height, width, sampling, aligned=bool(aligned)) for roi in rois]
    return torch.stack(results) if results else features.new_zeros(0, features.shape[1], height, width)


def _region(
    features: torch.Tensor, roi: torch.Tensor, scale: float, height: int, width: int, sampling: int, *, aligned: bool
) -> torch.Tensor:
    image = features[int(roi[0])]
    x1, y1, x2, y2 = (float(value) * scale - (0.5 if aligned else 0.0) for value in roi[1:])
    tall, wide = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
    rows = _samples(y1, tall, height, sampling, image.shape[1])
    columns = _samples(x1, wide, width, sampling, image.shape[2])
    # Along each axis a matrix [parts, pixels] takes the mean of the samples.
    return torch.einsum("chw,ph,qw->cpq", image, rows.to(image.dtype), columns.to(image.dtype))


def _samples(start: float, extent: float, parts: int, sampling: int, size: int) -> torch.Tensor:
    """[parts, size]: what each pixel counts in each part; samples out of the image count nothing."""
    count = sampling if sampling > 0 else max(-int(-extent // parts), 0)
    weights = torch.zeros(parts, size, dtype=torch.float64)
    for part in range(parts):
        for index in range(count):
            at = start + extent / parts * (part + (index + 0.5) / count)
            if not -1.0 <= at <= size:
                continue
            low = min(int(max(at, 0.0)), size - 1)
            share = 0.0 if low == size - 1 else max(at, 0.0) - low
            weights[part, low] += (1 - share) / count
            weights[part, min(low + 1, size - 1)] += share / count
    return weights
