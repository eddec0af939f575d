"""All weights in fewer bits, computing in float32 as before: what a model gets where nothing faster keeps its answers.

Each weight is stored in one of three forms, depthwise convolutions and stems included:

    channels   8 bits with a scale a channel             1 byte a weight
    blocks     8 bits with a scale for 32 weights        1.125 bytes
    16 bits    with a scale a channel, or float16        2 bytes

All begin in the first, but for weights with outliers among their rows, which the second serves far better: those begin
there. On a text recognizer, four convolutions of 37 made most of the error for the sake of few weights. With them in
blocks it loses 0.7 points instead of 0.9 by its own probabilities, for 4 % of the file. Large constants that nothing
multiplies by as a weight (tables of positions, of rotations, of filters) are stored in float16 from the start, and stay
in float32 where that errs too much. Where the outputs err by more than permitted, weights move on to another form:

    error of one weight   squared distance of the outputs with that weight alone in a form, over the outputs' power
    order                 the move first by which most error vanishes for a byte, until the errors of all add up to no
                          more than is permitted (roundings of different weights are independent, so that errors add)
    proof                 the model so made is compared with the original; while it errs too much, as many again as a
                          quarter of those that moved move on
    bisection             where it does not, fewer of these moves are tried, each time half: of a network that decides
                          within (a detector of lines, say), any change at all costs 30 dB, and errors of fifty weights
                          add up to far more than they do together
    descent               of those that moved, the largest ones go one form back where the outputs permit it: the order
                          above goes by errors, and a step too far can cost a tenth of the file
    confirmation          bisection and descent look at a few samples; of what these permit, the smallest is taken that
                          all of them permit

Errors of single weights are measured in one session, whose weights are inputs with defaults: a run is given one of them
rounded. Only models that need it pay for it: most keep 35 to 50 dB with all weights in 8 bits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.decibels import decibels, power_share
from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.read import constant_array, constant_tensor
from modelpress_compression.measure.fidelity import KnownOutputs
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.eligible import why_not_float16
from modelpress_compression.passes.quantize.ranges.output_error import (
    counted_outputs,
    output_distances,
    power,
    squared_distance,
    without_softmax,
)
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rounding.rounder import NearestRounder
from modelpress_compression.passes.quantize.views import hide_views, restore_views
from modelpress_compression.passes.quantize.weight_only.store import STORED, other_constants, storable_weights
from modelpress_compression.passes.quantize.weight_only.writer import (
    STORED_BLOCK,
    WeightWriter,
    rounded_in_blocks,
    rounded_to_8_bits,
)
from modelpress_compression.runtime import run, run_all, session_of
from modelpress_compression.target import DEVICES

# In the changes, besides STORED, which counts those of both forms in 8 bits.
IN_BLOCKS, IN_16_BITS, IN_FLOAT16 = "weights_in_blocks", "weights_in_16_bits", "float16_weights"
# Feeds on which the error of single weights is measured: it varies little from one to the next.
PROBE_SAMPLES = 4
_GROWTH = 0.25
_LEAST_GAIN = 0.05  # in size, of `store_rest`
# How many models are made to find out which weights moved too far, and the samples that these run on: what they find is
# then made once more, and runs on all.
_DESCENTS = 6
FEW_SAMPLES, _ON_FEW = 12, 0.9  # and the share of the permitted error that these may have
_CONFIRMED = 6  # forms at most, that few samples let through, are tried on all
_LEAST_SHARE = 0.01  # of all weights' bytes, that another model is worth making for
_CHANNELS, _BLOCKS, _WIDE, _PLAIN = range(4)
_BYTES = (1.0, 1.0 + 4 / STORED_BLOCK, 2.0, 4.0)  # of a weight, in each of them

# By its name, how far on a weight is; those that are not named are in the first form.
Forms = Mapping[str, int]
# By its name, the error of a weight in each form; NaN in those that it does not have.
Errors = dict[str, tuple[float, float, float, float]]


@dataclass
class Storing:
    """What calls for one model find out for those that follow, with other floors. `errors`: of its single weights, once
    they were asked for; `kept_db`: what the outputs of the last result keep."""

    errors: Errors = field(default_factory=dict)
    kept_db: float = -math.inf

    def keeps(self, error: float) -> None:
        """A result whose outputs err so much."""
        self.kept_db = decibels(error)


def store_all(
    model: Model, config: QuantizeConfig, context: Context, floor_db: float, storing: Storing | None = None
) -> PassResult:
    """A clone with all weights in 8 or 16 bits, whose outputs keep `floor_db` on the context's data.

    The model as it was where not even 16 bits keep that, with the reason. `storing`: of calls for other floors before.
    Raises ModelNotRunnableError, TimeLimitError.
    """
    storing = storing or Storing()
    permitted = power_share(floor_db)
    original, model = model, model.clone()
    hide_views(model, turned=False)
    result = _stored(model, config, context, {})
    known = KnownOutputs()
    error = _error(model, result, context, known)
    storing.keeps(error)
    if error <= permitted:
        return result
    tensors = ((value.name or "", value.const_value) for value in _initializers(model))
    sizes = {name: tensor.size for name, tensor in tensors if tensor is not None}
    storing.errors = storing.errors or _errors_of_weights(model, config, context)
    ladder = _Ladder(storing.errors, sizes)
    trial = _Trial(model, config, context, known, permitted)
    ladder.climb_until(permitted)
    while not (tried := trial(ladder.forms)).kept:
        if not ladder.climb(1 + math.ceil(_GROWTH * len(ladder.moved(ladder.forms)))):
            storing.keeps(tried.error)
            reason = f"stored in 16 bits its outputs keep {decibels(tried.error):.1f} dB alone"
            return PassResult(original, warnings=(f"Weights stay in float32: {reason}.",))
    # A few samples say little of all: more than one is tried of the forms that they let through.
    for forms in _ways_back(ladder, _on_few_samples(trial, tried))[:_CONFIRMED]:
        if (nearer := trial(forms)).kept:
            tried = nearer
            break
    storing.keeps(tried.error)
    return tried.result


def store_rest(
    result: PassResult, config: QuantizeConfig, context: Context, floor_db: float, storing: Storing | None = None
) -> PassResult | None:
    """The result with the weights that it left in float32 stored as by `store_all`, for size alone.

    None where that would make the file smaller by less than a twentieth, or would not keep `floor_db` of the result's
    own outputs. `storing`: as of `store_all`. Raises ModelNotRunnableError, TimeLimitError.
    """
    tensors = (constant_tensor(weight) for _, weight in storable_weights(result.model, config))
    left = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if left * 3 / 4 < _LEAST_GAIN * result.model.weight_bytes():
        return None
    stored = store_all(result.model, config, context, floor_db, storing)
    return replace(result, model=stored.model, changes={**result.changes, **stored.changes}) if stored.changed else None


@dataclass(frozen=True)
class _Tried:
    """A model with its weights in some forms. `error`: of its outputs, a share of their power; `kept`: whether it is
    permitted."""

    result: PassResult
    error: float
    kept: bool


@dataclass(frozen=True)
class _Trial:
    """Stores the weights in given forms and compares the outputs. `known`: those of the `model`."""

    model: Model
    config: QuantizeConfig
    context: Context
    known: KnownOutputs
    permitted: float

    def __call__(self, forms: Forms) -> _Tried:
        self.context.check_time()
        result = _stored(self.model, self.config, self.context, forms)
        error = _error(self.model, result, self.context, self.known)
        return _Tried(result, error, error <= self.permitted)


def _on_few_samples(trial: _Trial, tried: _Tried) -> _Trial:
    """The trial on few of its samples, of which one that is hard can make most of the error: what is permitted of them
    is to what they say of `tried` as it is on all."""
    few = replace(trial.context, data=trial.context.data.spread(FEW_SAMPLES))
    quick = replace(trial, context=few, known=KnownOutputs())
    seen = _error(trial.model, tried.result, few, quick.known)
    return replace(quick, permitted=_ON_FEW * trial.permitted * (seen / tried.error if tried.error else 1.0))


def _ways_back(ladder: _Ladder, trial: _Trial) -> list[Forms]:
    """Forms that take fewer bytes than where the ladder stands and that the trial keeps, the smallest first."""
    kept = _with_fewer_moves(ladder, trial)
    forms = kept[-1] if kept else ladder.forms
    # Each of the largest weights that moved, one form back where that is kept too.
    for name in ladder.moved(forms)[:_DESCENTS]:
        back = {**forms, name: forms[name] - 1}
        if trial(back).kept:
            kept.append(forms := back)
    return kept[::-1]


def _with_fewer_moves(ladder: _Ladder, trial: _Trial) -> list[Forms]:
    """Forms after fewer and fewer of the ladder's moves, all of which are kept.

    Ends where what is left to gain is little beside the weights. Begins with no move, even where more of them did not
    do: of a network that decides within, more moves may err more.
    """
    forms: list[Forms] = []
    failed, kept = 0, len(ladder.path)
    worth = _LEAST_SHARE * ladder.bytes_after(0)
    while kept - failed > 1 and ladder.bytes_after(kept) - ladder.bytes_after(failed) > worth:
        half = (kept + failed) // 2
        fewer = ladder.forms_after(half)
        if trial(fewer).kept:
            kept = half
            forms.append(fewer)
        else:
            failed = half
    return forms


def _initializers(model: Model) -> Iterator[onnx_ir.Value]:
    return (value for graph in model.graphs() for value in graph.initializers.values())


class _Ladder:
    """The form of each weight. `errors`: by its name, the error in each of the forms; NaN in those it does not have.
    `sizes`: the elements of each."""

    def __init__(self, errors: Mapping[str, Sequence[float]], sizes: Mapping[str, int]) -> None:
        self._errors, self._sizes = errors, sizes
        self._first = {name: _WIDE if math.isnan(own[_CHANNELS]) else _CHANNELS for name, own in errors.items()}
        self.forms = dict(self._first)
        self.path: list[tuple[str, int]] = []  # all moves: the weight, and the form that it took

    def forms_after(self, moves: int) -> dict[str, int]:
        """Of all weights, after so many of the moves."""
        return {**self._first, **dict(self.path[:moves])}

    def bytes_after(self, moves: int) -> float:
        """Of all weights."""
        return sum(self._sizes[name] * _BYTES[form] for name, form in self.forms_after(moves).items())

    def moved(self, forms: Forms) -> list[str]:
        """The weights that are not in their first form, the largest first."""
        moved = [name for name, form in forms.items() if form != self._first[name]]
        return sorted(moved, key=lambda name: -self._sizes[name])

    def _step(self, name: str) -> tuple[float, str, int]:
        """(minus the error that vanishes for a byte, the name, the form) of the most worthwhile move of a weight."""
        errors, now = self._errors[name], self.forms[name]

        def worth(form: int) -> float:
            return (errors[now] - errors[form]) / (self._sizes[name] * (_BYTES[form] - _BYTES[now]))

        last = _WIDE if self._first[name] == _CHANNELS else _PLAIN
        best = max(range(now + 1, last + 1), key=worth, default=now)
        return (0.0 if best == now else -worth(best), name, best)

    def climb(self, steps: int) -> bool:
        """So many moves, the most worthwhile first; False where all are at the end."""
        waiting = [step for step in map(self._step, self.forms) if step[2] != self.forms[step[1]]]
        heapq.heapify(waiting)
        climbed = bool(waiting)
        for _ in range(steps):
            if not waiting:
                break
            _, name, form = heapq.heappop(waiting)
            self.forms[name] = form
            self.path.append((name, form))
            following = self._step(name)
            if following[2] != self.forms[name]:
                heapq.heappush(waiting, following)
        return climbed

    def climb_until(self, permitted: float) -> None:
        """One move at least, and as many as it takes until the errors add up to what is permitted."""
        while self.climb(1) and sum(self._errors[name][form] for name, form in self.forms.items()) > permitted:
            pass


def _in_onnxruntime(context: Context) -> bool:
    """Whether onnxruntime itself loads the result: OpenVINO 2026 takes weights in blocks for products of another shape,
    and TensorRT has no integers of 16 bits."""
    return not DEVICES[context.target.device].pairs


def _stored(model: Model, config: QuantizeConfig, context: Context, forms: Forms) -> PassResult:
    """All weights that can be are stored, each in its form."""
    work, findings = model.clone(), Findings()
    eight, any_form = replace(config, weights="int8"), _in_onnxruntime(context)
    writer = WeightWriter(Editor(work), eight, NearestRounder(), folded=True, blocks=any_form)
    for graph, weight in list(storable_weights(work, config)):
        form = forms.get(weight.name or "", _CHANNELS)
        if form == _WIDE:
            if any_form and writer.store_16_bits(graph, weight):
                findings.changes[IN_16_BITS] += 1
            elif why_not_float16(np.asarray(constant_array(weight), np.float32)) is None:
                writer.store_half(graph, weight)
                findings.changes[IN_FLOAT16] += 1
            continue
        findings.changes[STORED] += 1
        if form == _BLOCKS:
            writer.store_blocks(graph, weight)
        else:
            writer.store(graph, weight)
    if writer.in_blocks:
        findings.changes[IN_BLOCKS] = writer.in_blocks
    for graph, constant in list(other_constants(work, config)):
        if forms.get(constant.name or "", _WIDE) == _WIDE:
            writer.store_half(graph, constant)
            findings.changes[IN_FLOAT16] += 1
    clean(work)
    restore_views(work)
    return findings.result(work)


def _error(model: Model, result: PassResult, context: Context, known: KnownOutputs) -> float:
    """As a share of the outputs' power. `known`: the model's outputs."""
    return output_distances(model, result.model, context, known).error if result.changed else 0.0


@contextmanager
def weight_probe(
    model: Model, names: Sequence[str], context: Context
) -> Iterator[Callable[[str, NDArray[np.float32]], float]]:
    """Gives the error at the outputs, as a share of their power, with one initializer of the main graph changed alone.

    `names`: those that will be asked about. Raises ModelNotRunnableError.
    """
    probe = without_softmax(model)
    # Inputs with default values, of which a run is given one.
    probe.graph.inputs.extend(probe.graph.initializers[name] for name in names)
    feeds = list(context.data.spread(PROBE_SAMPLES).feeds(batch_size=1))
    with session_of(probe) as session:
        exact = [counted_outputs(run(session, feed), feed) for feed in feeds]
        signal = sum(map(power, exact))

        def error(name: str, changed: NDArray[np.float32]) -> float:
            context.check_time()
            runs = run_all(session, (feed | {name: changed} for feed in feeds))
            answers = (counted_outputs(outputs, feed) for outputs, feed in zip(runs, feeds, strict=True))
            total = sum(squared_distance(*pair) for pair in zip(exact, answers, strict=True))
            return total / signal if signal else 0.0

        yield error


def own_weights(model: Model, config: QuantizeConfig) -> dict[str, onnx_ir.Value]:
    """By their names, the weights of the main graph that can be stored in fewer bits, and that a probe can change."""
    return {
        weight.name: weight
        for graph, weight in storable_weights(model, config)
        if graph is model.graph and weight.is_initializer() and weight.name
    }


def _errors_of_weights(
    model: Model, config: QuantizeConfig, context: Context
) -> dict[str, tuple[float, float, float, float]]:
    """By the name of each weight of the main graph: the error at the outputs with it alone in each form.

    That of 16 bits, a ten-thousandth of 8 bits' or less, counts as none. A weight whose rows have no blocks errs in
    them as it does by channels, and so moves on to 16 bits.
    """
    weights = own_weights(model, config)
    constants = {
        constant.name: constant
        for graph, constant in other_constants(model, config)
        if graph is model.graph and constant.is_initializer() and constant.name
    }
    errors: Errors = {}
    blocks = _in_onnxruntime(context)
    with weight_probe(model, (*weights, *constants), context) as error:
        # One weight after the other: all of them rounded are twice a model.
        for name, weight in weights.items():
            by_channel = error(name, rounded_to_8_bits(weight, config, blocks))
            by_block = error(name, rounded_in_blocks(weight, config)) if blocks else by_channel
            errors[name] = (by_channel, by_block, 0.0, 0.0)
        for name, constant in constants.items():
            half = np.asarray(constant_array(constant), np.float16).astype(np.float32)
            errors[name] = (math.nan, math.nan, error(name, half), 0.0)
    return errors
