"""Fewer channels where the answers would suffer: what a model bears of a selection.

    harm of a group    what the answers lose with this group alone cut and, where groups are few, fitted
    order              the group that harms least for the numbers that go with it first
    cut                as many groups in this order as are borne once they are cut and fitted, found by bisection, and
                       of the next group as large a part as is

So layers with little to spare stay whole, and the others lose what was asked for. Answers are compared on samples that
no fit has seen, by the cosine of the worst output and, on real inputs, by classes: cut as far as a cosine of 0.98
permits, EfficientNet-Lite0 changed one class in ten of them and lost 38 points of accuracy. Trials are few: one for
each group, and about log2 of the groups and four more.

A search with a goal measures groups alone as well (search/widths.py), but asks another question: what several shares of
each group err, as numbers that add up over groups. Here one figure decides how far to go, in the unit of `min_cosine`,
which does not add up; the order is measured by it too, since the uncut model's answers are kept for it anyway. For the
order either would do: of two classifiers of 28 x 28 pixels, fitted, both gave the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from modelpress_compression.channels import Group, Indices, cut
from modelpress_compression.graph.outputs import classification_outputs, tensor_outputs
from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.graph.selections import asked_alike, selections_of, told_names
from modelpress_compression.graph.watch import taps
from modelpress_compression.graph.watch.portions import sample_bytes
from modelpress_compression.holding_out import held_out
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.measure.fidelity import OutputSums
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.criteria import Scores
from modelpress_compression.passes.prune.channel.limits import Limits
from modelpress_compression.passes.prune.channel.ranking import Selection, largest
from modelpress_compression.passes.repair.least_squares import MAX_SAMPLES, Repair

# Samples on which outputs are compared.
COMPARED = 64
MIN_COMPARED = 8
KEPT_BYTES = 256 * 1024**2  # 256 MiB: of the uncut model's outputs; with very large ones, of the fewest that tell
_HALVINGS = 3
# Of more groups harm is measured without fits, which take a run over all samples each.
MOST_FITTED = 12

Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Bearable:
    """What the answers bear. `selection` keeps all units where not even one group does; `share`: of the answers, with
    what was asked for; see `Answers.kept`."""

    selection: Selection
    repaired: Repair
    share: float


class Answers:
    """The uncut model's outputs on samples that no fit sees, to compare others with."""

    def __init__(self, model: Model, context: Context) -> None:
        """Raises ModelNotRunnableError, TimeLimitError."""
        self._context = context
        self._names = [value.name for value in tensor_outputs(model.graph) if value.name]
        self._classes = classification_outputs(model.graph)
        feeds = list(_held_out(context))
        # What is kept of all of them must stay small beside a run: of large answers fewer are compared.
        kept_bytes = sum(sample_bytes(model, self._names, context.data).values())
        few = max(MIN_COMPARED, KEPT_BYTES // max(1, kept_bytes))
        self._feeds = feeds[:: -(-len(feeds) // few)]
        self._selections = selections_of(model, self._feeds)
        told = asked_alike(model, model, self._selections).first
        self._expected = list(self._of(told, self._feeds))

    def kept(self, model: Model) -> float:
        """The cosine of the worst float output, or, where that is less, the share of real inputs whose class is the
        same; 0 where an output cannot be compared.

        Raises ModelNotRunnableError, TimeLimitError.
        """
        alike = asked_alike(model, model, self._selections)
        feeds = [{**feed, **alike.given(expected)} for feed, expected in zip(self._feeds, self._expected, strict=True)]
        sums: dict[str, OutputSums] = {}
        for feed, told, got in zip(self._feeds, self._expected, self._of(alike.second, feeds), strict=True):
            mask = counted_positions(feed)
            expected, answers = alike.compared(told, got)
            sums = sums or {name: OutputSums() for name in expected}
            for name, total in sums.items():
                holds = name in self._classes or (None if name in self._names else False)
                total.add(expected[name], answers.get(name), holds, mask)
        floats = [total for total in sums.values() if total.floats or total.problem]
        return min((_kept(total, self._context.data.vouches) for total in floats), default=1.0)

    def _of(self, model: Model, feeds: Iterable[Feeds]) -> Iterator[Outputs]:
        with taps(model, [*self._names, *told_names(model)]) as look:
            for feed in feeds:
                self._context.check_time()
                yield look(feed)


def _kept(total: OutputSums, real: bool) -> float:
    if total.problem:
        return 0.0
    # The classes of synthetic inputs say nothing.
    same = total.top1_agreed / total.top1_positions if real and total.top1_positions else 1.0
    return min(total.cosine(), same)


def _held_out(context: Context) -> Iterator[Feeds]:
    samples = context.data.spread(MAX_SAMPLES)
    count = len(samples) // (samples.fixed_batch or 1)
    if not context.data.provided or count < 2:  # nothing is fitted
        yield from samples.spread(COMPARED * (samples.fixed_batch or 1)).feeds(1)
        return
    unseen = samples.only(sorted(held_out(samples)))
    yield from unseen.spread(COMPARED * (samples.fixed_batch or 1)).feeds(1)


def bearable(
    model: Model,
    groups: Sequence[Group],
    scores: Mapping[str, Scores],
    asked: Selection,
    limits: Limits,
    least: float,
    repaired: Callable[[Selection], Repair],
    context: Context,
) -> Bearable:
    """As much of the selection as keeps the share `least` of the answers. `repaired`: the model cut by a selection, and
    fitted.

    Raises ModelNotRunnableError, TimeLimitError.
    """
    answers = Answers(model, context)
    whole = repaired(asked)
    share = answers.kept(whole.model)
    if share >= least:
        return Bearable(asked, whole, share)
    best = Bearable(replace(asked, kept={}), Repair(model), share)

    def is_borne(kept: Mapping[str, Indices]) -> bool:
        nonlocal best
        selection = replace(asked, kept=kept)
        found = repaired(selection)
        if answers.kept(found.model) < least:
            return False
        best = Bearable(selection, found, share)
        return True

    order = _least_harmful_first(model, groups, asked, answers, repaired)
    low, high = 0, len(order)  # so many of the first groups are borne, and so many are not
    while high - low > 1:
        middle = (low + high) // 2
        borne = is_borne({group.id: asked.kept[group.id] for group in order[:middle]})
        low, high = (middle, high) if borne else (low, middle)
    group, kept = order[low], best.selection.kept
    few, many = len(asked.kept[group.id]), group.units  # units that are too few, and that are enough
    for _ in range(_HALVINGS):
        units = limits.nearest(group, 1 - (few + many) / 2 / group.units)
        if not few < units < many:
            break
        borne = is_borne({**kept, group.id: largest(scores[group.id], units)})
        few, many = (few, units) if borne else (units, many)
    return best


def _least_harmful_first(
    model: Model,
    groups: Sequence[Group],
    asked: Selection,
    answers: Answers,
    repaired: Callable[[Selection], Repair],
) -> list[Group]:
    """The groups of the selection by what each one alone does to the answers, for the numbers that go with it."""

    def harm(group: Group) -> float:
        alone = {group.id: asked.kept[group.id]}
        fits = len(asked.kept) <= MOST_FITTED
        found = repaired(replace(asked, kept=alone)).model if fits else cut(model, alone)
        gone = (group.units - len(alone[group.id])) * max(group.parameters_per_unit, 1)
        return (1 - answers.kept(found)) / gone

    return sorted((group for group in groups if group.id in asked.kept), key=harm)
