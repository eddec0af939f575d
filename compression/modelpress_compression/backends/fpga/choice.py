"""The network and its formats, judged by what neither was fitted to.

A search that tries hundreds of formats keeps the answers of the samples that it looks at, and not those of others: a
digit classifier that was allowed to lose 1 % on 1,000 samples had weights of two bits, and lost 2.4 % on others. So
the search gives a row of designs, each cheaper than the one before; the weights are trained for a design (training.py)
and judged; and bisection finds the cheapest design that is kept.

    labels        where there are some, they judge: the metric falls by at most `max_drop`. All samples are fitted to.
                  Here too the luckiest of several is taken, so that the noise has a bound: 18 dB for a `max_drop` of
                  1 %. (Without it a network for digits, at 16 dB, lost 0.4 points on the 1,000 labels that judged it,
                  and 1.8 on 1,000 others.)
    held out      else a third of the samples, which neither search nor training sees. At most `max_drop` of them fall
                  into other classes. Few samples show a small loss no better than chance does, and those that a network
                  was trained on show less of it, so that the noise has a bound as well: 23 dB for a `max_drop` of 1 %,
                  as goals have for what is cut, and in proportion for others. (With 20 dB in its place, 1.2 to 2 % of
                  the answers of three networks changed on 2,000 other samples, with 23 dB 0.5 to 1.3 %.)

Without either, as with few or made-up samples, nothing is trained, and the search's own samples judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from modelpress_compression.backends.fpga.emulator import Design, run
from modelpress_compression.backends.fpga.formats import Reals
from modelpress_compression.backends.fpga.network import Network
from modelpress_compression.backends.fpga.search import (
    DEFAULT_DROP,
    cheaper_and_cheaper,
    choose_formats,
    is_large,
    keeps,
    loss_of,
    samples_for,
    widest,
)
from modelpress_compression.backends.fpga.training import trained

HELD_OUT_EVERY, LEAST_TO_HOLD_OUT = 3, 90  # as goals hold out
# The bounds of noise: over the signal, for each part of the answers that may change.
_LABELLED_NOISE, _HELD_OUT_NOISE = 10**-1.8 / 0.01, 10**-2.3 / 0.01
_LEAST_DROP = 0.001  # that they are reckoned for, where nothing may change

DropOf = Callable[[Network, Design], float]  # by how much the metric falls


@dataclass(frozen=True)
class Chosen:
    """`network`: with the weights that the design rounds. `trained`: whether they are others than they were. `judge`:
    what the design was judged by, for people."""

    network: Network
    design: Design
    trained: bool
    judge: str


def choose(
    network: Network,
    samples: Reals,
    max_drop: float | None,
    drop_of: DropOf | None,
    *,
    vouch: bool,
    tick: Callable[[], None] = lambda: None,
) -> Chosen:
    """The cheapest that is kept; see above. `vouch`: whether the samples are real. `tick` is called now and then, and
    may raise."""
    allowed = DEFAULT_DROP if max_drop is None else max_drop
    samples = samples[: samples_for(network)]
    held_out = np.arange(len(samples)) % HELD_OUT_EVERY == 0
    if is_large(network) or not vouch or (drop_of is None and len(samples) < LEAST_TO_HOLD_OUT):
        design, _ = choose_formats(network, samples, max_drop, tick)
        return Chosen(network, design, False, "the samples that bits were chosen on")
    if drop_of is not None:
        return _bisect(network, samples, allowed, _by_labels(drop_of, network, samples, allowed), tick, "the labels")
    kept = _by_answers(network, samples[held_out], allowed, _HELD_OUT_NOISE * max(allowed, _LEAST_DROP))
    judge = f"{held_out.sum()} samples that were held out"
    return _bisect(network, samples[~held_out], allowed, kept, tick, judge)


_Kept = Callable[[Network, Design], bool]


def _by_labels(drop_of: DropOf, network: Network, samples: Reals, allowed: float) -> _Kept:
    """The metric decides, whatever classes change, as long as the noise keeps its bound."""
    resembles = _by_answers(network, samples, 1.0, _LABELLED_NOISE * max(allowed, _LEAST_DROP))
    return lambda tuned, design: resembles(tuned, design) and drop_of(tuned, design) <= allowed


def _by_answers(network: Network, samples: Reals, allowed: float, noise: float) -> _Kept:
    """`noise`: what the outputs may have, if they are classes; others are held to their own bound."""
    expected = run(network, samples)

    def kept(tuned: Network, design: Design) -> bool:
        loss = loss_of(run(tuned, samples, design), expected)
        return keeps(loss, allowed) and (loss.agreement is None or loss.noise <= noise)

    return kept


def _bisect(
    network: Network, fitted: Reals, allowed: float, kept: _Kept, tick: Callable[[], None], judge: str
) -> Chosen:
    """The last design that is kept, taken for granted that those before it are; the widest where none is."""
    designs = cheaper_and_cheaper(network, fitted, allowed, tick)
    best = Chosen(network, widest(network, fitted), False, judge)
    low, high = 0, len(designs)
    while low < high:
        middle = (low + high) // 2
        design = designs[middle]
        tuned = trained(network, design, fitted, tick)
        if kept(tuned, design):
            best, low = Chosen(tuned, design, True, judge), middle + 1
        elif kept(network, design):
            best, low = Chosen(network, design, False, judge), middle + 1
        else:
            high = middle
    return best
