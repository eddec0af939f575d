"""Chooses the formats: as few bits as keep the answers.

    ranges     integer bits of each value by the largest magnitude that the samples give it, of weights by their own
    start      so many bits behind the point that nothing changes
    greedy     again and again one bit goes, where it saves the most adder bits for what it adds to the error, as long
               as the answers are kept. Networks of so many products that this would take hours get one width for all
               values, and two bits less for all weights: the narrowest that keeps the answers. Of few samples their
               classes say little, so that the error must be as small as that of outputs that are no classes

Kept answers: of classes, the largest is the same in all but `max_drop` of the samples, and the error stays below
`FLOOR_DB`; of other outputs, the error alone counts. `cost` stands for what da4ml builds: every nonzero digit of a
weight in canonical signed form is an adder (arXiv 2507.04535).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from modelpress_compression.backends.fpga.emulator import Design, run, sum_bits
from modelpress_compression.backends.fpga.formats import Fixed, Reals, integer_bits
from modelpress_compression.backends.fpga.network import Network
from modelpress_compression.decibels import decibels

START_BITS = 12  # of values, with the sign; weights have two less
MAX_START_BITS = 18
# Signal over noise at the outputs, in dB, below which bits may not go: for classes, and for other outputs.
CLASS_FLOOR_DB, FLOOR_DB = 10.0, 30.0
MOST_SAMPLES, LEAST_SAMPLES = 1024, 16
MOST_PRODUCTS = 500_000_000  # of all samples, each time that answers are looked at
LEAST_BITS = 6
DEFAULT_DROP = 0.01
# Times what is permitted: what the search may lose of answers that training, which comes after it, gets back.
TRAINING_SLACK = 3.0


@dataclass(frozen=True)
class Loss:
    """`noise`: of the outputs, over the signal's power. `agreement`: share of samples with the same class; None: the
    outputs are no classes."""

    noise: float
    agreement: float | None

    @property
    def sqnr_db(self) -> float:
        return decibels(self.noise)


def loss_of(answers: Reals, expected: Reals) -> Loss:
    """Of [samples, *shape] outputs. What is the same for all samples is no signal."""
    signal = float(np.square(expected - expected.mean(axis=0)).sum())
    noise = float(np.square(answers - expected).sum()) / max(signal, 1e-30)
    classes = expected.ndim == 2 and expected.shape[1] > 1
    same = float((answers.argmax(axis=1) == expected.argmax(axis=1)).mean()) if classes else None
    return Loss(noise, same)


def choose_formats(
    network: Network, samples: Reals, max_drop: float | None = None, tick: Callable[[], None] = lambda: None
) -> tuple[Design, Loss]:
    """The cheapest formats that keep the answers of `samples`, at most `MOST_SAMPLES` of them.

    `tick` is called now and then, and may raise.
    """
    search = _Search(network, samples[: samples_for(network)], DEFAULT_DROP if max_drop is None else max_drop, tick)
    return search.alike() if is_large(network) else search.cheaper()[-1]


def cheaper_and_cheaper(
    network: Network, samples: Reals, max_drop: float, tick: Callable[[], None] = lambda: None
) -> list[Design]:
    """Each costs less than the one before; the last keep the answers of `samples` so far as training may mend them."""
    search = _Search(network, samples, max_drop, tick, slack=TRAINING_SLACK)
    return [design for design, _ in search.cheaper()]


def widest(network: Network, samples: Reals) -> Design:
    """All values of `MAX_START_BITS`."""
    return _Search(network, samples, 0.0, lambda: None).of_width(MAX_START_BITS)


def samples_for(network: Network) -> int:
    """How many samples are looked at."""
    products = sum(network.products(layer) for layer in network.layers)
    return min(max(MOST_PRODUCTS // max(products, 1), LEAST_SAMPLES), MOST_SAMPLES)


def keeps(loss: Loss, max_drop: float, slack: float = 1.0) -> bool:
    """Whether the answers are kept. `slack`: how many times as many other classes, and how many times the noise."""
    more_db = 10 * math.log10(slack)
    if loss.agreement is None:
        return loss.sqnr_db >= FLOOR_DB - more_db
    return loss.agreement >= 1 - slack * max_drop and loss.sqnr_db >= CLASS_FLOOR_DB - more_db


def is_large(network: Network) -> bool:
    """Whether all layers get one width."""
    return sum(network.products(layer) for layer in network.layers) * LEAST_SAMPLES > MOST_PRODUCTS


def cost(network: Network, design: Design) -> float:
    """Adder bits of the network, everything in parallel."""
    bits, total = sum_bits(network, design), 0.0
    for layer, operation in network.linear():
        form = design.weights[layer.name]
        digits = signed_digits(form.integers(design.rounded_weight(layer, operation)))
        total += digits * network.positions(layer) * bits[layer.name]
    # Registers: each value is stored once or twice on its way.
    return total + sum(form.width * math.prod(network.shape_of(name)) for name, form in design.values.items())


def signed_digits(integers: np.typing.NDArray[np.int64]) -> int:
    """Nonzero digits of all numbers in canonical signed form: those of x and 3x in binary that differ."""
    magnitudes = np.abs(integers)
    return int(np.bitwise_count(magnitudes ^ (3 * magnitudes)).sum())


class _Search:
    def __init__(
        self, network: Network, samples: Reals, max_drop: float, tick: Callable[[], None], slack: float = 1.0
    ) -> None:
        self._network, self._samples, self._max_drop, self._tick = network, samples, max_drop, tick
        self._slack = slack
        self._largest: dict[str, float] = {}
        self._signed: dict[str, bool] = {}
        self._expected = run(network, samples, watch=self._see)

    def cheaper(self) -> list[tuple[Design, Loss]]:
        """From the widest design, bit by bit, to the cheapest."""
        design = self._start()
        now, spent = self._loss(design), cost(self._network, design)
        found = [(design, now)]
        moves = list(self._moves())
        queue = [(-math.inf, place) for place in range(len(moves))]
        # The gain of a move changes with the others: the best by its last known gain is looked at anew, and taken where
        # it still is the best.
        while queue:
            self._tick()
            _, place = heapq.heappop(queue)
            tried = moves[place](found[-1][0])
            if tried is None:
                continue
            loss, price = self._loss(tried), cost(self._network, tried)
            if not self._kept(loss) or price >= spent:
                continue
            gain = (spent - price) / (max(loss.noise - now.noise, 0.0) + 1e-6)
            if queue and -queue[0][0] > gain:
                heapq.heappush(queue, (-gain, place))
                continue
            now, spent = loss, price
            found.append((tried, loss))
            heapq.heappush(queue, (-gain, place))
        return found

    def alike(self) -> tuple[Design, Loss]:
        """One width for all values; the widest that there is where none keeps the answers."""
        for bits in range(LEAST_BITS, MAX_START_BITS + 1):
            self._tick()
            design = self.of_width(bits)
            loss = self._loss(design)
            if self._kept(loss) and loss.sqnr_db >= FLOOR_DB:
                break
        return design, loss

    def _see(self, name: str, values: Reals) -> None:
        self._largest[name] = max(self._largest.get(name, 0.0), float(np.abs(values).max(initial=0.0)))
        self._signed[name] = self._signed.get(name, False) or bool((values < 0).any())

    def _start(self) -> Design:
        """Wide enough to keep the answers. The narrowest such width is the same for all."""
        for bits in range(START_BITS, MAX_START_BITS + 1, 2):
            design = self.of_width(bits)
            if self._kept(self._loss(design)):
                return design
        return design

    def of_width(self, bits: int) -> Design:
        """Of all values; weights have two bits less."""
        relus = {layer.output for layer in self._network.layers if layer.relu}
        values = {}
        for name, largest in self._largest.items():
            signed = self._signed[name] and name not in relus
            integer = integer_bits(largest)
            values[name] = Fixed(signed, integer, bits - signed - integer)
        weights = {}
        for layer, operation in self._network.linear():
            integer = integer_bits(float(np.abs(operation.weight).max(initial=0.0)))
            weights[layer.name] = Fixed(True, integer, bits - 3 - integer)
        return Design(values, weights)

    def _loss(self, design: Design) -> Loss:
        return loss_of(run(self._network, self._samples, design), self._expected)

    def _kept(self, loss: Loss) -> bool:
        return keeps(loss, self._max_drop, self._slack)

    def _moves(self) -> Iterator[Callable[[Design], Design | None]]:
        """Each takes one bit from one format; None where none is left."""
        places = [("values", name) for name in self._largest]
        places += [("weights", layer.name) for layer, _ in self._network.linear()]
        for kind, name in places:
            yield partial(_less, kind=kind, name=name, fraction=1)
            yield partial(_less, kind=kind, name=name, integer=1)


def _less(design: Design, kind: str, name: str, integer: int = 0, fraction: int = 0) -> Design | None:
    forms: dict[str, Fixed] = dict(getattr(design, kind))
    old = forms[name]
    if old.width - integer - fraction < 1 + old.signed:
        return None
    forms[name] = replace(old, integer=old.integer - integer, fraction=old.fraction - fraction)
    return Design(forms, design.weights) if kind == "values" else Design(design.values, forms)
