"""Closed-form repair: every layer that reads cut channels is fitted to the answers that it gave before the cut.

    E, b = argmin |X' (W + E) + b - Y|^2 + lambda |E|^2

X' is what the layer reads in the cut model, whose earlier layers are fitted already; Y is what it made in the uncut
model, of the channels that stay (He et al., arXiv:1707.06168, and the layer-wise reconstruction of ThiNet,
arXiv:1707.06342). So each layer mends what those before it could not, and its bias takes over the mean of what is gone.

A fit makes a layer's answers better on the samples that it saw than on others. A next layer that is fitted to such
answers trusts them too much, and so on from layer to layer, and no error that is measured on them tells. So the cut
model is copied once for each of four folds of the samples, and every sample goes through the copy that is fitted
without it: what a layer reads here is as good as it will be for new samples, and so are the errors that `folds` chooses
by. The model's own layers are fitted to all rows. In the end the copies' outputs, of samples that they were not fitted
to, say whether the model is better with the fits than without.

Samples are streamed, one at a time, through all models; kept are the sums of `normal_equations`, for as many layers of
one level at a time as fit into 1 GiB, and what `wavefront` needs to go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np

from modelpress_compression.analysis.channels import Analysis, Indices
from modelpress_compression.analysis.graph import label
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, Skip
from modelpress_compression.passes.prune.channel.folds import Fitted, cross_validate
from modelpress_compression.passes.prune.channel.layers import Layer, find_layers
from modelpress_compression.passes.prune.channel.linear import Places, Rows
from modelpress_compression.passes.prune.channel.normal_equations import Sums
from modelpress_compression.passes.prune.channel.wavefront import Values, Wavefront
from modelpress_compression.passes.prune.channel.weights import kept_indices

MAX_SAMPLES = 512
MAX_SUMS_BYTES = 1024**3  # 1 GiB
MAX_KEPT_BYTES = 1024**3  # 1 GiB, of activations, half of it for the uncut model
FOLDS = 4
# Rows for each input of a layer: fits settle at some eight; more only takes time.
ROWS_PER_INPUT = 8
ROWS = (4096, 65536)  # fewest and most rows of a layer, where the data has as many
_CHUNK_ROWS = 2048
# Below this share of the variance a layer is as good as unchanged.
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Fit:
    """One layer: the error of its answers before and after, on samples that the fit did not see, as a share of their
    variance."""

    node: str
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Repair:
    """`fits`: layers that were fitted anew, in their order; `skipped`: those that could not be, with the reason."""

    fits: tuple[Fit, ...]
    skipped: tuple[Skip, ...]


def repair(full: Model, pruned: Model, analysis: Analysis, kept: Mapping[str, Indices], context: Context) -> Repair:
    """Fits the layers of `pruned`, in place, to those of `full`.

    Raises TimeLimitError, ModelNotRunnableError.
    """
    groups = {group.id: group for group in analysis.groups}
    stay = kept_indices(groups, kept)
    readers = frozenset(member.node for name in kept for member in groups[name].members if member.role == "consumer")
    samples = context.data.spread(MAX_SAMPLES)
    count = len(samples) // (samples.fixed_batch or 1)
    folds = min(FOLDS, count)
    models = [pruned, *(pruned.clone() for _ in range(folds))]
    nodes = {label(node): node for node in full.graph}
    found = [find_layers(model, frozenset(tensor for tensor, _ in stay), readers, nodes) for model in models]
    skipped = found[0][1]
    layers = sorted(zip(*(one for one, _ in found), strict=True), key=lambda copies: copies[0].level)
    fits: list[Fit] = []
    done = 0
    context.progress(0.0, f"repairing {len(layers)} layers")
    outputs = [value.name for value in full.graph.outputs if value.name]
    read = [name for copies in layers for name in (copies[0].data, copies[0].other) if name]
    fronts = _Fronts(full, models[1:], samples, [n for copies in layers for n in (copies[0].output, copies[0].sum) if n], read, outputs, context)
    for _, level in groupby(layers, key=lambda copies: copies[0].level):
        for batch, refused in _batches(list(level), folds):
            skipped += [Skip(copies[0].name, "Not fitted anew: its sums would take over 1 GiB.") for copies in refused]
            fitters = [_Fitter(copies, stay, count) for copies in batch]
            fronts.gather(fitters)
            for fitter in fitters:
                fit = fitter.fit(models)
                if fit is not None:
                    fits.append(fit)
            done += len(batch) + len(refused)
            context.progress(done / len(layers), f"repaired {done} of {len(layers)} layers")
    return Repair(tuple(fits), tuple(skipped))


class _Fronts:
    def __init__(self, full, copies, samples, answers, read, outputs, context):
        budget = MAX_KEPT_BYTES // 2
        self.folds = len(copies)
        self.full = Wavefront(full, lambda: samples.feeds(1), [*answers, *outputs], budget, context.check_time)
        self.copies = [
            Wavefront(copy, _fold(samples, number, len(copies)), [*read, *outputs], budget // len(copies), context.check_time)
            for number, copy in enumerate(copies)
        ]

    def advance(self, answers, read):
        yield from zip(self.full.advance(answers), _interleaved([front.advance(read) for front in self.copies]), strict=True)

    def gather(self, fitters):
        if not fitters:
            return
        answers = [name for fitter in fitters for name in (fitter.layer.output, fitter.layer.sum) if name]
        read = [name for fitter in fitters for name in (fitter.layer.data, fitter.layer.other) if name]
        for index, (wanted, given) in enumerate(self.advance(answers, read)):
            for fitter in fitters:
                fitter.take(index, given, wanted)


def _fold(samples, number, folds):
    return lambda: islice(samples.feeds(1), number, None, folds)


def _interleaved(parts: Sequence[Iterator[Values]]) -> Iterator[Values]:
    while True:
        for part in parts:
            value = next(part, None)
            if value is None:
                for other in parts:
                    for _ in other: pass
                return
            yield value


def _batches(layers, folds: int):
    """Layers whose sums fit into memory together, and those whose sums alone do not."""
    batch, refused = [], []
    used = 0
    for copies in layers:
        size = _sums_bytes(copies[0], folds)
        if size > MAX_SUMS_BYTES:
            refused.append(copies)
            continue
        if used + size > MAX_SUMS_BYTES:
            yield batch, []
            batch, used = [], 0
        batch.append(copies)
        used += size
    yield batch, refused


def _sums_bytes(layer: Layer, folds: int) -> int:
    matrix = layer.linear.matrix(layer.numbers)
    # One set for each fold, and twice as much again while the equations are solved.
    return (folds + 2) * Sums.size_bytes(*matrix.shape)


class _Fitter:
    """Gathers one layer's sums and fits it."""

    def __init__(self, copies: Sequence[Layer], stay: Mapping[tuple[str, int], np.ndarray], count: int) -> None:
        self.layer, *self._copies = copies
        self._layers = copies
        weight = self.layer.linear.matrix(self.layer.numbers)
        self._start = [copy.linear.matrix(copy.numbers).astype(np.float32) for copy in copies[:2]][0]
        self._bias = self._old_bias(weight.shape)
        self._stay = stay.get((self.layer.weight.name or "", self.layer.output_axis))
        self._sums = [Sums.zeros(*weight.shape) for _ in self._copies]
        self._waiting: list[list[tuple[Rows, Rows]]] = [[] for _ in self._copies]
        low, high = ROWS
        self._rows = int(np.clip(ROWS_PER_INPUT * weight.shape[1], low, high))
        self._count = count
        self._spread = np.zeros((3, weight.shape[0] * weight.shape[2]))

    def _old_bias(self, shape):
        from modelpress_compression.analysis.graph import constant_array
        node, place = self.layer._bias_place()
        value = node.inputs[place] if self.layer.takes_bias and place < len(node.inputs) else None
        old = constant_array(value)
        n = shape[0] * shape[2]
        return (np.zeros(n) if old is None else np.broadcast_to(old.reshape(-1), n)).astype(np.float32).reshape(shape[0], 1, shape[2])

    def take(self, index: int, given: Values, wanted: Values) -> None:
        """One sample: the layer's input in the cut model, its output in the uncut one."""
        answers = self._kept(wanted[self.layer.output])
        if self.layer.sum and given[self.layer.other].shape == answers.shape:
            answers = self._kept(wanted[self.layer.sum]) - given[self.layer.other]
        total = self.layer.linear.positions(answers)
        places: Places = np.arange(total)
        m = self.mask(index, total)
        if m is not None: places = places[m]
        wanted_rows = -(-self._rows // self._count)
        if wanted_rows < len(places):
            places = np.random.default_rng(index).choice(places, wanted_rows, replace=False, shuffle=False)
        fold = index % len(self._copies)
        linear = self.layer.linear
        x, y = linear.inputs(given[self.layer.data], answers, places), linear.answers(answers, places)
        z = y.transpose(1, 0, 2).reshape(y.shape[1], -1).astype(np.float64)
        self._spread += [np.full(z.shape[1], len(z)), z.sum(0), np.square(z).sum(0)]
        waiting = self._waiting[fold]
        waiting.append((x, y))
        # A product of a few rows costs as much memory traffic as one of a thousand.
        if sum(rows.shape[1] for rows, _ in waiting) >= min(_CHUNK_ROWS, self._start.shape[1]):
            self._flush(fold)
    MASKS = None
    def mask(self, index, total):
        if _Fitter.MASKS is None: return None
        m = np.asarray(_Fitter.MASKS[index]).reshape(-1)
        return m != 0 if m.size == total else None

    def _flush(self, fold: int) -> None:
        waiting = self._waiting[fold]
        if waiting:
            inputs, answers = (np.concatenate(parts, axis=1) for parts in zip(*waiting, strict=True))
            self._sums[fold].add(inputs, answers - inputs @ self._start - self._bias)
            waiting.clear()

    def _kept(self, output: Array) -> Array:
        """The channels of the uncut model's output that the cut layer still makes."""
        if self._stay is None:
            return output
        axis = self.layer.linear.channel_axis
        rest = np.ones(output.shape[axis], np.bool_)
        rest[: len(self._stay)] = self._stay
        return np.compress(rest, output, axis=axis)

    def fit(self, models) -> Fit | None:
        """Puts the fitted weight and bias into the models; None where nothing is better than what is there."""
        for fold in range(len(self._copies)):
            self._flush(fold)
        n, s, q = self._spread
        scale = float((q - np.square(s) / np.maximum(n, 1)).sum())
        before = sum(float(x.answer_squares.sum()) for x in self._sums)
        if scale <= 0 or before <= _NEGLIGIBLE * scale:
            return None
        fitted = cross_validate(self._sums, intercept=self.layer.takes_bias)
        for layer, model, c in zip(self._layers, models, (fitted.whole, *fitted.folds), strict=True):
            layer.correct(c.weight, c.bias, model)
        return Fit(self.layer.name, fitted.error_before / scale, fitted.error_after / scale)
