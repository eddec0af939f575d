"""The fastest mix of layers in 8 bits and in float32: 8 bits are not faster everywhere, and err everywhere.

Prices: of every layer, the time that it takes on this machine in the float model and in the one that is all in 8 bits,
conversions included, as onnxruntime runs them side by side; and the error at the outputs with it alone in 8 bits.
Budgets of error come from `budgets`: the first has room for every layer that is faster in 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from modelpress_compression.measure.layer_times import layer_times
from modelpress_compression.measure.stats import layer_name
from modelpress_compression.search.budgets import by_budget, decibels
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.solver import Option

_FLOAT, _EIGHT_BITS = range(2)
_HALVINGS = 3
# In 8 bits a layer must save this part of its time: the clock does not see less.
_LEAST_GAIN = 0.05


class MixedSchemeSearch:
    """On the float model of a `SchemeSearch`, to which its candidates go."""

    def __init__(self, search: SchemeSearch) -> None:
        self._search = search

    def candidates(self) -> Iterator[Candidate]:
        """None where all layers, or no layers, are faster in 8 bits. Raises ModelNotRunnableError, TimeLimitError."""
        if self._prices and any(self._is_faster_in_float(row) for row in self._prices):
            yield from by_budget([_options(row) for row in self._prices], self._built, _HALVINGS)

    @staticmethod
    def _is_faster_in_float(row: Sequence[Any]) -> bool:
        _, float_ms, integer_ms, _ = row
        return bool(float_ms < integer_ms)

    @cached_property
    def _prices(self) -> list[Sequence[Any]]:
        """Rows of a layer's output, its milliseconds in float32 and in 8 bits, and its error in 8 bits."""
        return list(self._search.known("prices of layers", self._measured)["layers"])

    def _measured(self) -> dict[str, Any]:
        quantizer, context = self._search.quantizer, self._search.context
        if quantizer is None or not quantizer.ranges.weight_errors:
            return {"layers": []}
        plan = quantizer.plan
        models = [quantizer.setup.model, quantizer.result().model]
        with context.alone():
            before, after = layer_times(models, context.data, context.work_directory, self._search.threads)
        rows = []
        for node in plan.layers:
            name, output = layer_name(node), node.outputs[0].name or ""
            if name in before and name in after:
                row = [output, before[name].ms, after[name].ms, quantizer.ranges.error_saved(node, plan)]
                rows.append(row)
        return {"layers": rows}

    def _built(self, choice: Sequence[int]) -> Candidate | None:
        chosen = list(zip(self._prices, choice, strict=True))
        kept = [row[0] for row, place in chosen if place == _FLOAT]
        error = sum(row[3] for row, place in chosen if place == _EIGHT_BITS)
        if len(kept) == len(chosen):
            return None
        variant = f"{len(kept)} of {len(chosen)} layers in float32 by their times, priced at {decibels(error):.0f} dB"
        return self._search.add_static(variant, kept)


def _options(row: Sequence[Any]) -> tuple[Option, Option]:
    _, float_ms, integer_ms, error = row
    return Option(float_ms * (1 - _LEAST_GAIN), 0.0), Option(integer_ms, error)
