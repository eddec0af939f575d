"""Which method and which ranks each layer gets.

    rank_ratio    every layer by itself: the least error among the methods, each at the highest ranks that cost no more
    energy        every layer by itself: the least cost among the methods whose error is small enough
    budget        all together: each layer has a few options of falling cost; of their lower convex hull the steps that
                  err least for what they save are taken, until the model costs no more than the budget

A layer's errors are shares of its own answers: what a layer's error does to the model's outputs is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from modelpress_compression.graph.linear import Matrix
from modelpress_compression.passes.factorize.config import FactorizeConfig
from modelpress_compression.passes.factorize.layers import Layer
from modelpress_compression.passes.factorize.methods import METHODS, Problem, Ranks, Stage

# Shares of a layer's cost that a budget chooses among.
SHARES = (0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
# The cheapest factors of enough energy are looked for in steps of a twentieth of the layer's cost.
_GRID = 20
_WORTHLESS = 1e-12  # a smaller error is rounding
# The share of the energy of an embedding table that may be lost where nobody says how much.
TABLE_ERROR = 0.02
_NO_MACS = "Looking up rows multiplies nothing: a budget of multiply-accumulates leaves it."


@dataclass(frozen=True)
class Option:
    """One way to factorize a layer: what it costs on one sample, and the share of the energy that it loses."""

    method: str
    ranks: Ranks
    macs: int
    parameters: int
    error: float
    stages: tuple[Stage, ...] = field(default=(), compare=False, repr=False)  # their shapes: no numbers are kept
    ms: float = 0.0  # where times are measured

    def cost(self, of: str) -> float:
        return {"macs": self.macs, "parameters": self.parameters, "latency": self.ms}[of]


class Chooser:
    """Finds options of a layer; `moments`: see `Problem`."""

    def __init__(self, config: FactorizeConfig, layer: Layer, moments: Matrix | None) -> None:
        self._config, self._layer, self._problem = config, layer, Problem(layer, moments)
        names = METHODS if config.method == "auto" else (config.method,)
        # Which of the methods is fast enough turns out when they are timed.
        self._most = len(names) if config.budget_of == "latency" else 1
        self._why_not = {name: METHODS[name].why_not(layer) for name in names}

    def options(self) -> list[Option] | str:
        """Those to choose among, the best first (one, unless there is a budget or times decide), or why the layer stays
        as it is."""
        if self._layer.is_table and (reason := self._why_no_table()):
            return reason
        fitting = [name for name, reason in self._why_not.items() if not reason]
        if not fitting:
            return f"It has no {self._config.method} factors: {next(iter(self._why_not.values()))}."
        found = list(self._found(fitting))
        if not found:
            return "No factors cost so little: it is too small, or its rank too low."
        limit = self._limit()
        good = [option for option in found if limit is None or option.error <= limit]
        return good or f"Its factors would lose {min(option.error for option in found):.3g} of the energy."

    def _why_no_table(self) -> str:
        """Why a table stays whatever its factors are; "" where it does not."""
        if self._config.embeddings == "none":
            return "Embeddings are left alone by the recipe."
        return _NO_MACS if self._config.budget is not None and self._config.budget_of == "macs" else ""

    def _limit(self) -> float | None:
        """The share of the energy that may be lost; None: any."""
        limit = self._config.max_error
        if not self._layer.is_table or self._config.embeddings == "always":
            return limit
        return TABLE_ERROR if limit is None else limit

    def _found(self, names: Sequence[str]) -> Iterator[Option]:
        config = self._config
        if config.budget is not None:
            for share in SHARES:
                yield from self._best(names, share)
        elif config.energy is not None:
            cheapest = [option for name in names if (option := self._of_energy(name, config.energy)) is not None]
            yield from sorted(cheapest, key=lambda option: (option.macs, option.error))[: self._most]
        else:
            yield from self._best(names, config.rank_ratio)

    def _best(self, names: Sequence[str], share: float) -> list[Option]:
        found = [option for name in names if (option := self._at(name, share)) is not None]
        return sorted(found, key=lambda option: (option.error, option.macs))[: self._most]

    def _at(self, name: str, share: float) -> Option | None:
        """The option of a method at a share of the cost."""
        method = METHODS[name]
        ranks = method.ranks(self._layer, share, self._config.round_to)
        if ranks is None:
            return None
        made = method.factors(self._problem, ranks)
        shapes = (replace(stage, weight=np.broadcast_to(np.float64(0), stage.weight.shape)) for stage in made.stages)
        return Option(name, made.ranks, *method.cost(self._layer, made.ranks), made.error, tuple(shapes))

    def _of_energy(self, name: str, energy: float) -> Option | None:
        """The cheapest that keeps so much, by bisection: the error falls with the cost."""
        low, high, found = 0, _GRID, None
        while high - low > 1:
            middle = (low + high) // 2
            option = self._at(name, middle / _GRID)
            if option is not None and 1 - option.error >= energy:
                high, found = middle, option
            else:
                low = middle
        return found


def within_budget(
    options: Mapping[int, Sequence[Option]], full: Mapping[int, float], to_save: float, of: str
) -> dict[int, Option]:
    """The options to take, by layer, so that `to_save` is saved or as much as can be; `full`: the layers' own cost."""
    steps = [
        (slope, number, place, option)
        for number, found in options.items()
        for place, (slope, option) in enumerate(_hull(found, full[number], of))
    ]
    taken: dict[int, Option] = {}
    saved = 0.0
    for _, number, _, option in sorted(steps, key=lambda step: step[:3]):
        if saved >= to_save:
            break
        before = taken[number].cost(of) if number in taken else full[number]
        saved += before - option.cost(of)
        taken[number] = option
    return taken


def _hull(options: Sequence[Option], full: float, of: str) -> Iterator[tuple[float, Option]]:
    """Of the lower convex hull of error over cost, from the layer as it is: the slope to each point, rising."""
    cost, error = float(full), 0.0
    rest = [option for option in options if option.cost(of) < full]
    while rest:
        slopes = [(max(0.0, one.error - error - _WORTHLESS) / (cost - one.cost(of)), one.cost(of), one) for one in rest]
        slope, _, best = min(slopes, key=lambda item: item[:2])
        yield slope, best
        cost, error = float(best.cost(of)), best.error
        rest = [option for option in rest if option.cost(of) < cost]
