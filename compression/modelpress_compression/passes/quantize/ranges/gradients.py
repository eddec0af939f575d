"""The same errors at the outputs as in `output_error`, from gradients: all trials of a sample in a few backward passes.

What one activation or weight x in 8 bits changes at the outputs y is, to first order, J (Q(x) - x), J = dy / dx. Its
square is measured without J, by random signs v over the outputs (Hutchinson's estimator, as HAWQ-V2 uses it for
traces, arXiv:1911.03852):

    |J (Q(x) - x)|^2  =  E[ (v^T J (Q(x) - x))^2 ],    v^T J: one backward pass, for all x at once

So the work no longer grows with the number of trials. An estimate from n samples and p projections has a standard
deviation of sqrt(2 / (n p)): more samples need fewer projections each. Trials of the same activation meet the same v,
so that they can be told apart more closely than that. Where the model has no more than p outputs, unit vectors take the
place of signs, and nothing is random.

What the first order does not see (steps, as those of Round or ArgMax; clipping of most of an activation) is caught by
who compares the sum of all errors with what the whole model errs by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression.encodings.weight import QuantizedWeight
from modelpress_compression.graph.edit import Editor
from modelpress_compression.graph.outputs import tensor_outputs
from modelpress_compression.graph.padding import counted_among, counted_positions
from modelpress_compression.graph.read import label
from modelpress_compression.graph.watch import Listener
from modelpress_compression.graph.watch.portions import MAX_GRADIENT_BYTES, gradient_bytes
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.parallel import map_in_order, workers_within
from modelpress_compression.passes.quantize.plan import Activation, Plan
from modelpress_compression.passes.quantize.ranges.output_error import (
    Trial,
    counted_outputs,
    power,
    share,
    without_softmax,
)
from modelpress_compression.passes.quantize.rounding.affine import Range, activation_parameters
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.passes.quantize.weights import WeightStore

if TYPE_CHECKING:
    from torch import Tensor

    from modelpress_compression.executor import Executor

SAMPLES = 8
PROJECTIONS = 4
_SEED = 0


class GradientProbe:
    """Estimates trials on one model, that of `setup`; made by `gradient_probe`.

    `outputs`: names of the float outputs. `activations`: by the activation's name, that of a value which those alone
    read who would read it in 8 bits. `weights`: by the name of the layer's output, that of its weight and the weight in
    8 bits. `workers`: how many samples are looked at at a time.
    """

    def __init__(
        self,
        setup: QuantizationSetup,
        executor: Executor,
        outputs: Sequence[str],
        activations: Mapping[str, str],
        weights: Mapping[str, tuple[str, QuantizedWeight]],
        samples: InputData,
        workers: int,
    ) -> None:
        self.setup, self._executor, self._samples, self._workers = setup, executor, samples, workers
        self._outputs, self._activations, self._weights = outputs, activations, weights
        self._projections = min(PROJECTIONS, -(-SAMPLES * PROJECTIONS // max(1, len(samples))))

    def errors(self, trials: Sequence[Trial], done: Listener | None = None) -> list[float] | None:
        """The error of each trial; None: gradients are not finite. Raises ModelNotRunnableError, TimeLimitError."""
        squares, signal = np.zeros(len(trials)), 0.0
        count = self._samples.feed_count
        numbered = enumerate(self._samples.feeds(batch_size=1))
        with one_thread():
            found = map_in_order(lambda item: self._on(*item, trials), numbered, self._workers)
            for index, (changed, strength) in enumerate(found):
                self.setup.context.check_time()
                squares, signal = squares + changed, signal + strength
                if done is not None:
                    done((index + 1) / count)
        if not (np.isfinite(squares).all() and math.isfinite(signal)):
            return None
        return [share(float(square), signal) for square in squares]

    def _on(self, number: int, feed: Feeds, trials: Sequence[Trial]) -> tuple[NDArray[np.float64], float]:
        """Of one sample: the square of each trial's error, and the power of the outputs."""
        results = self._executor(feed)
        outputs = {name: results[name].detach().numpy() for name in self._outputs}
        directions = _directions(outputs, feed, np.random.default_rng((_SEED, number)), self._projections)
        return self._squares(trials, results, directions), power(counted_outputs(outputs, feed))

    def _squares(
        self, trials: Sequence[Trial], results: Mapping[str, Tensor], directions: Sequence[Sequence[Array]]
    ) -> NDArray[np.float64]:
        """Of one sample: the sum over the directions of the square of what each trial changes along them."""
        import torch

        sources = {_key(trial): self._source(trial, results) for trial in trials}
        ends = [results[name] for name in self._outputs]
        live = [place for place, end in enumerate(ends) if end.requires_grad]
        squares = np.zeros(len(trials))
        for direction in directions if live else ():
            found = torch.autograd.grad(
                [ends[place] for place in live],
                list(sources.values()),
                [torch.from_numpy(direction[place]) for place in live],
                retain_graph=True,
                allow_unused=True,
            )
            gradients = dict(zip(sources, found, strict=True))
            for number, trial in enumerate(trials):
                gradient = gradients.get(_key(trial))
                if gradient is not None:
                    # Made anew for each direction: kept, the changes of all trials would be many times the activations.
                    change = self._change(trial, sources[_key(trial)].detach())
                    squares[number] += float(torch.sum(gradient * change)) ** 2
        return squares

    def _source(self, trial: Trial, results: Mapping[str, Tensor]) -> Tensor:
        if trial.is_weight:
            return self._executor.parameters_by_name[self._weights[trial.name][0]]
        return results[self._activations[trial.name]]

    def _change(self, trial: Trial, value: Tensor) -> Tensor:
        """What 8 bits change of an activation's value, or of a weight."""
        import torch

        if trial.is_weight:
            # Made anew as well: the changes of all weights would be as large as the model.
            return torch.from_numpy(self._weights[trial.name][1].dequantize()) - value
        parameters = trial.parameters
        if parameters is None:
            extremes = Range(float(value.min()), float(value.max()))
            parameters = activation_parameters(extremes, self.setup.config.activations)
        levels = np.iinfo(parameters.dtype)  # type: ignore[type-var]
        rounded = torch.fake_quantize_per_tensor_affine(
            value, float(parameters.scale), int(parameters.zero_point), int(levels.min), int(levels.max)
        )
        return rounded - value


def gradient_probe(setup: QuantizationSetup, samples: InputData | None = None) -> GradientProbe | None:
    """A probe for the activations and weights of the setup's plan; `samples`: `SAMPLES` of the data where None.

    None: the model has operators, or outputs, without gradients here, or they would take too much memory. Raises
    ModelNotRunnableError.
    """
    held_bytes = gradient_bytes(setup.model, setup.context.data)
    if held_bytes > MAX_GRADIENT_BYTES:  # trials hold no activations
        setup.context.log("errors at the outputs are tried out: gradients would take too much memory")
        return None
    # torch takes a second to import, and only who quantizes statically needs it.
    from modelpress_compression.executor import Executor, NotExecutableError

    copy = without_softmax(setup.model)
    plan, editor = setup.plan.on(copy.graph), Editor(copy)
    weights = _own_weights(plan, setup.weight_store(editor))
    zero = editor.constant(copy.graph, np.zeros((), np.float32), "zero")
    named = {item.value.name or "": item for item in plan.activations.values() if item.has_own_range}
    activations = {name: _read_in_8_bits(item, plan, editor, zero) for name, item in named.items()}
    ends = tensor_outputs(copy.graph)
    outputs = [value.name for value in ends if value.name and value.dtype == onnx_ir.DataType.FLOAT]
    if not outputs:
        return None
    try:
        executor = Executor(
            copy,
            trainable=[zero.name or "", *(name for name, _ in weights.values())],
            outputs=list(dict.fromkeys([*activations.values(), *outputs])),
        )
    except NotExecutableError:
        return None
    samples = samples or setup.context.data.spread(SAMPLES)
    workers = workers_within(MAX_GRADIENT_BYTES, held_bytes)
    return GradientProbe(setup, executor, outputs, activations, weights, samples, workers)


def _own_weights(plan: Plan, store: WeightStore) -> dict[str, tuple[str, QuantizedWeight]]:
    """Gives each layer of a plan a weight that no other reads. By the name of the layer's output: that of the weight,
    and the weight in 8 bits."""
    # All are rounded before any gets another name, since rounders know weights by their names.
    rounded = {node: store.layer(node) for node in plan.layers}
    found = {}
    for node, quantized in rounded.items():
        mine = store.editor.constant(plan.graph, store.array(node.inputs[1]), f"{label(node)}_weight")
        node.replace_input_with(1, mine)
        found[node.outputs[0].name or ""] = (mine.name or "", quantized)
    return found


def _read_in_8_bits(activation: Activation, plan: Plan, editor: Editor, zero: onnx_ir.Value) -> str:
    """The name of a value that those uses of the activation alone read which would read it in 8 bits.

    It is the sum with a `zero` that is trained: so it has a gradient even where nothing before it has one.
    """
    value, name = activation.value, activation.value.name or ""
    producer = value.producer()
    same = editor.make("Add", [zero, zero], name)
    if activation.all_consumers:
        editor.hand_over(value, same.outputs[0])
        value.name = editor.name(f"{name}_float")
    else:
        for user, index in list(value.uses()):
            if plan.reads(activation, user, index):
                user.replace_input_with(index, same.outputs[0])
    same.replace_input_with(0, value)
    if producer is None:
        plan.graph.insert_before(plan.graph[0], [same])
    else:
        plan.graph.insert_after(producer, [same])
    return same.outputs[0].name or ""


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on the threads that call it, without helpers: other samples run beside each."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _key(trial: Trial) -> tuple[str, bool]:
    """Of what is tried: an activation and a weight may go by the same name."""
    return trial.name, trial.is_weight


def _directions(
    outputs: Mapping[str, Array], feed: Feeds, generator: np.random.Generator, count: int
) -> list[list[Array]]:
    """One array for each output, so that the squares along them add up to the squared distance of the outputs.

    `count` random signs over all elements that count, or one element after the other where these are no more.
    """
    mask = counted_positions(feed)
    counted = [_counted(array, mask) for array in outputs.values()]
    ends = np.cumsum([counts.size for counts in counted])
    places = np.flatnonzero(np.concatenate([counts.ravel() for counts in counted]))
    if len(places) <= PROJECTIONS:  # exact, and hardly more work
        flat = np.zeros((len(places), ends[-1]), np.float32)
        flat[np.arange(len(places)), places] = 1.0
    else:
        flat = np.zeros((count, ends[-1]), np.float32)
        flat[:, places] = generator.choice((-1.0, 1.0), (count, len(places))) / math.sqrt(count)
    return [
        [part.reshape(counts.shape) for part, counts in zip(np.split(row, ends[:-1]), counted, strict=True)]
        for row in flat
    ]


def _counted(array: Array, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Which elements of an output count: the finite ones, where they are no padding."""
    counts: NDArray[np.bool_] = np.isfinite(array)
    positions = counted_among(array.shape[:-1], mask)
    if positions is not None:
        counts = counts & positions.reshape(*positions.shape, *(1,) * (array.ndim - positions.ndim))
    return counts
