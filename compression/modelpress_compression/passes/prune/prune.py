"""Pruning: whole channels (`structure: channel`, in the package of that name), whole branches (`structure: block`, in
`blocks`), or zeroing of weights.

Zeroed are any weights (unstructured) or n of every m neighbours along the input axis (n:m):

    l1        the smallest magnitudes go (Han et al., arXiv:1506.02626); `auto` is the same
    random    a control: what does the choice of weights matter?
    layer     every layer loses the same share
    global    one threshold for all layers: the least important weights of the model go

The share is exact to within rounding: of W weights, round(sparsity * W) are zero afterwards, those that were zero
before included. So a second run changes nothing. Shapes stay as they are: the file gets smaller only once it is
compressed, and onnxruntime multiplies zeros as fast as anything else; the result says so in a warning.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip, unmatched_excludes
from modelpress_compression.passes.prune.blocks import prune_blocks
from modelpress_compression.passes.prune.channel.prune import prune_channels
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.masks import Mask, Scores, Selector, layout_of, smallest, smallest_of_groups
from modelpress_compression.passes.prune.prunable import PrunableWeight, find_prunable

_NO_SPEEDUP = (
    "Zeroed weights do not make onnxruntime faster: they pay in the size of the compressed download only. "
    "'structure: channel' removes whole channels, and 'block' whole branches, which do."
)


@dataclass
class _Counts:
    """Over the layers that were looked at: weights, zeros after pruning, weights set to zero, layers changed."""

    weights: int = 0
    zeros: int = 0
    pruned: int = 0
    layers: int = 0


class Prune:
    """The pass of `prune`."""

    def __init__(self, config: PruneConfig) -> None:
        self._config = config

    def __call__(self, model: Model, context: Context) -> PassResult:
        if self._config.structure == "channel":
            return prune_channels(model, self._config, context)
        if self._config.structure == "block":
            return prune_blocks(model, self._config, context)
        clone = model.clone()
        weights, skipped = find_prunable(clone, self._config.exclude)
        if self._config.structure == "n:m":
            weights, narrow = self._wide_enough(weights)
            skipped += narrow
        counts = _Counts()
        shared = self._global_selector(weights, context)
        for number, weight in enumerate(weights):
            context.check_time()
            context.progress(number / len(weights), f"pruning {weight.name}")
            array = weight.tensor.numpy()
            mask = self._mask(weight, array, shared)
            zero = array == 0
            changed = int(np.count_nonzero(mask & ~zero))
            counts.weights += array.size
            counts.zeros += int(np.count_nonzero(mask | zero))
            counts.pruned += changed
            if changed:
                counts.layers += 1
                replace_numbers(weight.value, np.where(mask, np.zeros((), array.dtype), array))
        context.progress(1.0, "pruned")
        return self._result(clone if counts.pruned else model, counts, skipped)

    def _result(self, model: Model, counts: _Counts, skipped: list[Skip]) -> PassResult:
        warnings = unmatched_excludes(model, self._config.exclude)
        if self._config.overrides:
            warnings.append(f"The overrides are for channels and blocks: {self._config.structure} pruning has none.")
        changes: dict[str, int | float] = {"weights_pruned": counts.pruned, "layers_pruned": counts.layers}
        if counts.pruned:
            changes["sparsity"] = counts.zeros / counts.weights
            warnings.append(_NO_SPEEDUP)
        return PassResult(model, changes, tuple(skipped), tuple(warnings))

    def _wide_enough(self, weights: list[PrunableWeight]) -> tuple[list[PrunableWeight], list[Skip]]:
        """Those with at least one group of m in a row, and why the others have none."""
        wide, skipped = [], []
        for weight in weights:
            columns = layout_of(weight).row_length
            if columns >= self._config.m:
                wide.append(weight)
            else:
                reason = f"The input axis has {columns} weights, fewer than a group of {self._config.m}."
                skipped.append(Skip(weight.name, reason))
        return wide, skipped

    def _global_selector(self, weights: list[PrunableWeight], context: Context) -> Selector | None:
        """One selector for all layers, or None where each layer has its own."""
        if self._config.structure != "unstructured" or self._config.scope != "global":
            return None

        def scores() -> Iterator[Scores]:
            for weight in weights:
                context.check_time()
                yield self._scores(weight, weight.tensor.numpy())

        total = sum(weight.tensor.size for weight in weights)
        return smallest(round(self._config.sparsity * total), scores)

    def _mask(self, weight: PrunableWeight, array: Array, shared: Selector | None) -> Mask:
        """What becomes zero, in the weight's shape."""
        scores = self._scores(weight, array)
        if self._config.structure == "n:m":
            layout = layout_of(weight)
            return layout.back(smallest_of_groups(layout.rows(scores), self._config.n, self._config.m), array.shape)
        selector = shared or smallest(round(self._config.sparsity * array.size), lambda: [scores])
        return selector.take(scores)

    def _scores(self, weight: PrunableWeight, array: Array) -> Scores:
        """Importance, at least 0; weights that are zero already have 0."""
        magnitudes: Scores = np.abs(array).astype(np.float32)
        if self._config.criterion != "random":
            return magnitudes
        # The seed belongs to the weight's name, so that other layers do not change what is drawn for this one.
        generator = np.random.default_rng([self._config.seed, zlib.crc32(weight.name.encode())])
        drawn = 1.0 - generator.random(array.shape, dtype=np.float32)
        scores: Scores = np.where(array == 0, np.float32(0), drawn)
        return scores
