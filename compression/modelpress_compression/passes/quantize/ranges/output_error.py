"""Sensitivity: the error at the model's outputs when one activation, or one weight, alone is in 8 bits.

    error = sum |y' - y|^2 / sum |y|^2        y: all float outputs, y': with that one in 8 bits

Such errors are small and nearly uncorrelated, so that those of a whole plan add up: on a sentence encoder the sum was
within 0.4 dB of what was measured. Trials are linear in the layers: each is a run of the model a sample, and no session
(see `switches`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.outputs import score_node
from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.graph.selections import Alike, asked_alike, is_told, obeying, selections_of, telling
from modelpress_compression.graph.watch import Listener
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.measure.fidelity import KnownOutputs, WaitingOutputs
from modelpress_compression.model import Model
from modelpress_compression.parallel import map_in_order
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.ranges.switches import NOTHING, Switches, add_switches
from modelpress_compression.passes.quantize.rounding.affine import ActivationParameters, Range, activation_parameters
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.runtime import fit_together, run, session_of

MAX_SAMPLES = 8
DISTANCE_SAMPLES = 32
MAX_RUNS = 600
# Trials that would take more of the processors than this on one sample are not made.
LIMIT_S = 60.0

Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Trial:
    """One thing in 8 bits: an activation by its name, or the weight of a layer by the name of its output.

    `parameters`: of an activation; None: those of its range in each run, as dynamic quantization has them.
    """

    name: str
    is_weight: bool = False
    parameters: ActivationParameters | None = None


@dataclass(frozen=True)
class Distances:
    """Of two models' outputs: [feeds], sums of squares over all float outputs."""

    errors: NDArray[np.float64]
    signals: NDArray[np.float64]

    @property
    def error(self) -> float:
        """As above, over all feeds."""
        return share(float(self.errors.sum()), float(self.signals.sum()))


def output_distances(
    original: Model,
    changed: Model,
    context: Context,
    known: KnownOutputs | None = None,
    *,
    behind_softmax: bool = False,
) -> Distances:
    """How far a changed model's outputs are, feed by feed, on `DISTANCE_SAMPLES` samples.

    `known`: what was kept of the original's outputs when it was compared before; those that are found are kept there.
    `behind_softmax`: the outputs as they are, where they come from a softmax; else what went into it.
    """
    form = Model.clone if behind_softmax else without_softmax
    known = known if known is not None else KnownOutputs(0)
    errors, signals = [], []
    feeds = list(context.data.spread(DISTANCE_SAMPLES).feeds(batch_size=1))
    kept = [found for number in range(len(feeds)) if (found := known.get(number)) is not None]
    first, second = form(original), form(changed)
    together = fit_together((first.weight_bytes(), second.weight_bytes()))
    selections = known.selected(lambda: selections_of(first, feeds)) if together else None
    alike = asked_alike(first, second, selections)
    with ExitStack() as sessions:
        if len(kept) == len(feeds):
            session = sessions.enter_context(session_of(alike.second))
            asked = [{**feed, **alike.given(before)} for feed, before in zip(feeds, kept, strict=True)]
            answers: Iterator[tuple[Outputs, Outputs]] = zip(kept, _outputs(session, asked), strict=True)
        else:
            answers = _answers(alike, feeds, context.work_directory)
        for number, (before, after) in enumerate(answers):
            context.check_time()
            known.keep(number, before)
            before, after = alike.compared(before, after)  # noqa: PLW2901
            errors.append(squared_distance(before, after))
            signals.append(power(before))
    return Distances(np.asarray(errors), np.asarray(signals))


def _answers(alike: Alike, feeds: Sequence[Feeds], folder: Path) -> Iterator[tuple[Outputs, Outputs]]:
    """Both models' outputs, feed by feed. Of large models one has a session at a time, and the first's outputs wait
    in the `folder`."""
    first, second = alike.first, alike.second
    if not fit_together((first.weight_bytes(), second.weight_bytes())):
        with WaitingOutputs(folder) as waiting:
            _put_outputs(first, feeds, waiting)
            with session_of(second) as session:
                for number, outputs in enumerate(_outputs(session, feeds)):
                    yield waiting.get(number), outputs
        return
    # Weights in fewer bits are unpacked, which takes twice their room: before the other session is there.
    with session_of(second) as other, session_of(first) as one:

        def both(feed: Feeds) -> tuple[Outputs, Outputs]:
            before = counted_outputs(run(one, feed), feed)
            return before, counted_outputs(run(other, {**feed, **alike.given(before)}), feed)

        yield from map_in_order(both, feeds)


def _put_outputs(model: Model, feeds: Sequence[Feeds], waiting: WaitingOutputs) -> None:
    """In a function of its own, whose end is the session's: a name for it would keep it beside the next one."""
    with session_of(model) as session:
        for number, outputs in enumerate(_outputs(session, feeds)):
            waiting.put(number, outputs)


def _outputs(session: ort.InferenceSession, feeds: Sequence[Feeds]) -> Iterator[Outputs]:
    return map_in_order(lambda feed: counted_outputs(run(session, feed), feed), feeds)


def without_softmax(model: Model) -> Model:
    """A copy whose outputs are what went into the softmax that they came from."""
    copy = model.clone()
    for node in {id(node): node for value in copy.graph.outputs if (node := score_node(value)) is not None}.values():
        if node.op_type == "Softmax" and node.domain == "":
            node.op_type = "Identity"
            node.attributes.clear()
    return copy


class ErrorProbe:
    """Tries things out on one model, that of `setup`; made by `open_probe`."""

    def __init__(
        self,
        setup: QuantizationSetup,
        session: ort.InferenceSession,
        switches: Switches,
        samples: InputData,
        selected: Callable[[Feeds], Outputs],
    ) -> None:
        """`selected`: what the model is fed beside a feed, where its outputs are a selection."""
        self.setup, self._session, self._switches, self._samples = setup, session, switches, samples
        self._selected = selected

    def errors(self, trials: Sequence[Trial], done: Listener | None = None) -> list[float] | None:
        """The error of each trial, infinite where outputs are not finite; None: that would take too long.

        Takes as many of the samples as `MAX_RUNS` allows, one at least. Raises TimeLimitError.
        """
        sums, signal = np.zeros(len(trials)), 0.0
        samples = max(1, MAX_RUNS // max(len(trials), 1))
        for index, given in enumerate(self._samples.feeds(batch_size=1, limit=samples)):
            feed = {**given, **self._selected(given)}
            began = time.process_time()  # which other work on the machine does not stretch
            plain = self._answers(feed)
            if not index and (time.process_time() - began) * len(trials) > LIMIT_S:
                return None
            signal += power(plain.outputs)
            tried = map_in_order(partial(self._distance, feed=feed, plain=plain), trials)
            for number, distance in enumerate(tried):
                self.setup.context.check_time()
                sums[number] += distance
                if done is not None and not index:
                    done((number + 1) / len(trials))
        return [share(float(total), signal) for total in sums]

    def _distance(self, trial: Trial, *, feed: Feeds, plain: _Answers) -> float:
        return squared_distance(plain.outputs, self._try(trial, feed, plain))

    def _try(self, trial: Trial, feed: Feeds, plain: _Answers) -> Outputs:
        """The outputs with one thing in 8 bits; `plain`: what the same sample gives without."""
        if trial.is_weight:
            return self._answers(feed, self._switches.weights[trial.name]).outputs
        parameters = trial.parameters
        if parameters is None:
            parameters = activation_parameters(plain.ranges[trial.name], self._switches.dtype)
        return self._answers(feed, self._switches.activations[trial.name], parameters).outputs

    def _answers(
        self, feed: Feeds, selected: int = NOTHING, parameters: ActivationParameters | None = None
    ) -> _Answers:
        found = run(self._session, {**feed, **self._switches.feed(selected, parameters)})
        ranges = {
            name: Range(float(found.pop(low)), float(found.pop(high)))
            for name, (low, high) in self._switches.extremes.items()
        }
        return _Answers(counted_outputs(found, feed), ranges)


@dataclass(frozen=True)
class _Answers:
    """Float outputs, of the positions that count, and this run's ranges of the activations in `Switches.extremes`."""

    outputs: Outputs
    ranges: Mapping[str, Range]


@contextmanager
def open_probe(setup: QuantizationSetup, samples: InputData | None = None) -> Iterator[ErrorProbe]:
    """A probe for the activations and weights of the setup's plan; `samples`: `MAX_SAMPLES` of the data where None.

    Raises ModelNotRunnableError.
    """
    samples = samples or setup.context.data.spread(MAX_SAMPLES)
    copy = without_softmax(setup.model)
    selections = setup.known.selected(lambda: selections_of(setup.model, samples.feeds(batch_size=1)))
    asked = obeying(copy, selections) if selections is not None else None
    copy = asked or copy
    switches = add_switches(setup.plan.on(copy.graph), setup.weight_store(Editor(copy)))
    with ExitStack() as sessions:
        session = sessions.enter_context(session_of(copy))
        if selections is None or asked is None:
            yield ErrorProbe(setup, session, switches, samples, lambda feed: {})
            return
        told = sessions.enter_context(session_of(telling(setup.model, selections)))
        yield ErrorProbe(setup, session, switches, samples, lambda feed: selections.given(run(told, feed)))


def counted_outputs(outputs: Outputs, feed: Feeds) -> Outputs:
    """Float outputs without the positions that are padding, and what is told of selections."""
    mask = counted_positions(feed)
    return {
        name: without_padding(array, mask)
        for name, array in outputs.items()
        if array.dtype.kind == "f" or is_told(name)
    }


def power(outputs: Outputs) -> float:
    """The sum of squares of all floats that are finite."""
    return sum(float(np.square(_finite(array)).sum()) for array in outputs.values() if array.dtype.kind == "f")


def share(error: float, signal: float) -> float:
    """An error over the signal's power. Outputs that are 0 throughout, and stay so, err by nothing."""
    if signal:
        return error / signal
    return math.inf if error else 0.0


def squared_distance(before: Outputs, after: Outputs) -> float:
    """Over the floats that are finite in `before`; infinite where one of them is not in `after`."""
    total = 0.0
    for name, array in before.items():
        if array.dtype.kind != "f":
            continue
        if array.shape != after[name].shape:
            return math.inf
        total += float(np.square(after[name][np.isfinite(array)].astype(np.float64) - _finite(array)).sum())
    return total if math.isfinite(total) else math.inf


def _finite(array: Array) -> NDArray[np.float64]:
    return array[np.isfinite(array)].astype(np.float64)
