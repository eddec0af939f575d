"""The sliding window of convolutions and pooling: its geometry and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from modelpress_compression.executor.site import Site


@dataclass(frozen=True)
class Window:
    """Attributes of a sliding window; () stands for 1 (pads: 0) on every axis."""

    auto_pad: str
    pads: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, site: Site) -> Window:
        return cls(
            site.string("auto_pad", "NOTSET"), site.ints("pads", ()) or (), site.ints("strides", ()) or (),
            site.ints("dilations", ()) or (),
        )  # fmt: skip

    def strides_of(self, rank: int) -> tuple[int, ...]:
        return self.strides or (1,) * rank

    def dilations_of(self, rank: int) -> tuple[int, ...]:
        return self.dilations or (1,) * rank

    def padding(self, extents: Sequence[int], kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(begin, end) of the spatial axes."""
        rank = len(kernel)
        if self.auto_pad in ("NOTSET", ""):
            pads = self.pads or (0,) * (2 * rank)
            return pads[:rank], pads[rank:]
        if self.auto_pad == "VALID":
            return (0,) * rank, (0,) * rank
        totals = [
            max((-(-extent // stride) - 1) * stride + (size - 1) * dilation + 1 - extent, 0)
            for extent, size, stride, dilation in zip(
                extents, kernel, self.strides_of(rank), self.dilations_of(rank), strict=True
            )
        ]
        return self.split(totals)

    def split(self, totals: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of an odd total, SAME_UPPER puts the larger half at the end, SAME_LOWER at the beginning."""
        small, large = tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
        return (large, small) if self.auto_pad == "SAME_LOWER" else (small, large)


def pad_spatial(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """Pads (or, with negative amounts, cuts) the last axes."""
    if not any(begin) and not any(end):
        return x
    flat = [amount for pair in zip(reversed(begin), reversed(end), strict=True) for amount in pair]
    return F.pad(x, flat, value=value)
