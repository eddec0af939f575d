"""Sparsity as a share of the parameters or of the MACs: the share of channels that takes it away, found by cutting.

    cost(model cut by the selection of s)  ~  (1 - sparsity) cost(model)        s by bisection

A channel takes along products of the layer that makes it and of those that read it, so that half of the channels are up
to three quarters of a layer: no formula in the number of channels holds for all graphs. A cut copies the graph and the
weights that shrink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modelpress_compression.channels import cut
from modelpress_compression.graph.macs import count_macs
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.ranking import Selection
from modelpress_compression.passes.prune.config import PruneConfig

_HALVINGS = 9
_MOST = 0.99  # of the channels
_NEAR = 0.005  # of the cost: nearer need not be
_FAR = 0.05  # what is missed by more is told


@dataclass(frozen=True)
class Budget:
    """`sparsity`: the share of `full`, the `cost` of `model`, that goes. `unit`: parameters or macs; `note`: why it is
    not the one that was asked for."""

    model: Model
    sparsity: float
    unit: str
    cost: Callable[[Model], float]
    full: float
    check_time: Callable[[], None]
    note: str = ""

    def nearest(self, selected: Callable[[float], Selection]) -> Selection:
        """Of the selections for shares of the channels the one whose share of the cost is nearest to the sparsity.

        Raises TimeLimitError.
        """
        low, high = 0.0, _MOST
        best, distance = Selection({}, ()), self.sparsity
        for _ in range(_HALVINGS):
            self.check_time()
            share = (low + high) / 2
            found = selected(share)
            gone = self.gone(found)
            if abs(gone - self.sparsity) < distance:
                best, distance = found, abs(gone - self.sparsity)
            if distance < _NEAR:
                break
            low, high = (share, high) if gone < self.sparsity else (low, share)
        return best

    def gone(self, selection: Selection) -> float:
        """The share of the cost that goes with a selection."""
        return 1 - self.cost(cut(self.model, selection.kept)) / self.full if selection.kept else 0.0

    def warnings(self, gone: float) -> tuple[str, ...]:
        """Why other shares go than asked for."""
        missed = (
            f"Of the {self.unit} {gone:.0%} went, not {self.sparsity:.0%}: the channels that stay are a multiple of "
            f"round_to, and some cannot be cut."
        )
        return tuple(filter(None, (self.note, missed if abs(gone - self.sparsity) > _FAR else "")))


def budget_of(model: Model, config: PruneConfig, context: Context) -> Budget | None:
    """None where the sparsity is a share of the channels, or nothing shall go."""
    if config.sparsity_of == "channels" or not config.sparsity:
        return None
    if config.sparsity_of == "macs":
        shapes = sample_shapes(context.data)
        if full := count_macs(model, shapes).total:
            return Budget(
                model,
                config.sparsity,
                "macs",
                lambda cut: count_macs(cut, shapes).total or full,
                full,
                context.check_time,
            )
    unknown = "The MACs of the model are not known: the sparsity was taken as a share of its parameters."
    note = unknown if config.sparsity_of == "macs" else ""
    return Budget(model, config.sparsity, "parameters", _numbers, _numbers(model), context.check_time, note)


def _numbers(model: Model) -> float:
    """In its constants, as the pass counts them."""
    return float(sum(tensor.size for tensor in model.tensors()))
