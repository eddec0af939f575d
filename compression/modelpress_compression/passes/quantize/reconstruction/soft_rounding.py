"""AdaRound's relaxation (Nagel et al., arXiv:2004.10568): each weight somewhere between two levels.

    W~ = s * (q + d h(V))              h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    f(V) = mean(1 - |2 h(V) - 1|^beta)                     0 where all h are 0 or 1

q: the level that a weight has already, d: +1 or -1, towards W. Where q is the nearest level, q and q + d are the two
around W, as in the paper; where q is GPTQ's, which may lie further off to make up for other weights, GPTQ's rounding
stays among what can be learned. V begins half way from q to W, which errs less on samples not seen than beginning with
W: a small ResNet's four blocks in 4 bits by 2, 3, 1 and 27 %.

Training ends with h near 0 or 1 as beta falls from 20, which leaves h alone but near its ends, to 2, which pulls all of
it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modelpress_compression.passes.quantize.reconstruction.grids import Grid, Levels

_STRETCH, _SHIFT = 1.2, -0.1
# h at the start: this share of the distance that W lies on the way to the other level; what lies beyond it, or behind
# the level that there is, was moved there to make up for other weights.
_START, _START_FAR = 0.5, 0.05
_FIRST_BETA, _LAST_BETA = 20.0, 2.0
WARMUP = 0.2  # of the steps, before anything draws h to its ends
# Of Adam, whose steps are about as long as this: V can cross its range in as many as there are.
LEARNING_RATE, WAY = 0.1, 50.0
# lambda: less of it leaves weights between two levels, where rounding them in the end undoes what was learned.
DECIDING = 300.0


class SoftRounding:
    """The rounding of one weight in training; `offsets`: V."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        weight, scale, low, high, levels = (
            torch.from_numpy(np.array(part, np.float32)).to(device)
            for part in (grid.weight, grid.scale, grid.low, grid.high, grid.levels)
        )
        ratio = weight / scale
        step = torch.where(ratio >= levels, 1.0, -1.0)
        # Beyond the ends there is no level: the other one is the next within.
        step = torch.where((levels + step > high) | (levels + step < low), -step, step)
        self._scale, self._level, self._step = scale, levels, step
        distance = (ratio - levels) * step
        start = torch.where((distance > 0) & (distance < 1), _START * distance, _START_FAR)
        share = (start - _SHIFT) / _STRETCH
        self.offsets = nn.Parameter(torch.log(share / (1 - share)))

    @property
    def _moved(self) -> Tensor:
        return torch.clamp(_STRETCH * torch.sigmoid(self.offsets) + _SHIFT, 0, 1)

    def weight(self) -> Tensor:
        """W~, laid out as convolutions run fastest."""
        real = (self._level + self._moved * self._step) * self._scale
        return real.contiguous(memory_format=torch.channels_last) if real.dim() == 4 else real

    def undecided(self, beta: float) -> Tensor:
        """f(V)."""
        return (1 - (2 * self._moved - 1).abs().pow(beta)).mean()

    def levels(self) -> Levels:
        """Each weight on the level that it is nearest to."""
        with torch.no_grad():
            found = self._level + self._step * (self._moved >= 0.5)
        return np.asarray(found.cpu().numpy(), np.int16)


@dataclass(frozen=True)
class Annealing:
    """`steps` of gradient descent, fewer where `stop_at` by `time.monotonic` comes before; `check_time` raises
    TimeLimitError."""

    steps: int
    stop_at: float
    check_time: Callable[[], None]

    def run(self, weights: Sequence[SoftRounding], pull: Callable[[], None]) -> bool:
        """`pull`: adds the gradients of what is minimized, in units of the error before. Returns whether all is finite
        in the end."""
        optimizer = torch.optim.Adam([item.offsets for item in weights], lr=max(LEARNING_RATE, WAY / self.steps))
        began, step, share = time.monotonic(), 0, 0.0
        while share < 1:
            self.check_time()
            optimizer.zero_grad()
            pull()
            beta = beta_at(share)
            if beta is not None:
                sum((DECIDING * item.undecided(beta) for item in weights), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            # Where time is short the annealing is done in what there is, instead of being cut off.
            share = max(step / self.steps, (time.monotonic() - began) / max(self.stop_at - began, 1e-9))
        return all(bool(item.offsets.isfinite().all()) for item in weights)


def beta_at(share: float) -> float | None:
    """Beta when this share of the steps is done; None: in the warm-up."""
    if share < WARMUP:
        return None
    return _LAST_BETA + (_FIRST_BETA - _LAST_BETA) * (1 - (share - WARMUP) / (1 - WARMUP))
