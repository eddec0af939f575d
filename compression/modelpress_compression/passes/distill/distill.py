"""Distillation: the model as it stands is trained with the model as it was uploaded as its teacher.

The file alone is enough: the graph runs in torch (`executor`), the uploaded model in onnxruntime, and training reduces
the distance between their outputs (Hinton et al., arXiv:1503.02531). Labels take part if the data has any.

    samples       a share held out for validation; batches of the rest         samples, augmentation
                  synthetic ones where no data was given                       made_inputs
    teacher       the original's outputs                                       teacher
    loss          chosen by what the outputs are; labels, inner values         losses, objective, matching
    training      the whole model, or block after block                        end_to_end, layerwise, blocks, training
    integers      trained as floats behind fake quantization                   fake_quantization
    proof         the written model must be nearer to the original than        here
                  before, on the validation samples, in onnxruntime
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir
import torch
from torch import Tensor

from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.executor import Selector, device_warning, weights
from modelpress_compression.graph.watch import observable, taps
from modelpress_compression.inputs import Feeds
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip, is_excluded
from modelpress_compression.passes.distill import end_to_end, layerwise
from modelpress_compression.passes.distill.augmentation import make_augmenter
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.fake_quantization import Unfolded, unfold
from modelpress_compression.passes.distill.made_inputs import CONFIDENCE, made_inputs
from modelpress_compression.passes.distill.objective import make_objective, tensors
from modelpress_compression.passes.distill.samples import DataSplit, split
from modelpress_compression.passes.distill.task import DistillationResult, DistillationTask, stop_time
from modelpress_compression.passes.distill.teacher import Outputs, Teacher
from modelpress_compression.passes.distill.training import validation_loss
from modelpress_compression.passes.integers.certificate import certified, certify, keep_within_limits

_TRAINING_SHARE = 0.95  # of the pass's progress; the rest is the proof


@dataclass(frozen=True)
class _Notes:
    skipped: tuple[Skip, ...]
    warnings: tuple[str, ...]


class Distill:
    """The pass of `distill`."""

    def __init__(self, config: DistillConfig) -> None:
        self._config = config

    def __call__(self, model: Model, context: Context) -> PassResult:
        """Raises InvalidRecipeError where no output can be trained towards, NotExecutableError, ModelNotRunnableError.

        A model that training does not bring nearer to the original stays as it is, and a warning says so.
        """
        if context.original is None:
            raise ValueError("distill needs the original model in the context")
        by_layer = self._config.method == "layerwise"
        # A block sees no scales that are computed outside of it.
        unfolded = unfold(model, self._config.exclude, scales=self._config.scales and not by_layer)
        task, notes = self._prepare(unfolded, context.original, context)
        method = layerwise if by_layer else end_to_end
        return _proven(model, task, method.train(task), unfolded, notes)

    def _prepare(self, unfolded: Unfolded, original: Model, context: Context) -> tuple[DistillationTask, _Notes]:
        config, stop_at = self._config, stop_time(context)
        data, warnings = context.data, []
        if not data.provided:
            data, how = made_inputs(original, context, config.seed, stop_at)
            warnings.append(
                f"No data was given: training ran on {len(data)} synthetic inputs ({how}), and its gain was measured "
                f"on such inputs alone. {CONFIDENCE} Give representative inputs with --data."
            )
        samples = split(data, config.hold_out, config.batch_size, config.seed)
        if not samples.held_out:
            warnings.append(
                f"The samples ({len(data)}) are too few to hold some out: the best state was chosen on those that it "
                f"was trained on."
            )
        if reason := device_warning(context.target.device):
            warnings.append(reason)
        outputs = _first_outputs(original, samples)
        objective, untrained, unfit = make_objective(original.graph, outputs, data.labels, config)
        augment, refused = make_augmenter(original, data, config.augment, config.seed)
        warnings += [*unfit, *(f"The augmentation {name!r} was left out: {reason}." for name, reason in refused)]
        skipped = tuple(Skip(name, f"Not trained towards: {reason}.") for name, reason in untrained.items())
        task = DistillationTask(
            original,
            unfolded.model,
            _trainable(config, unfolded),
            samples,
            objective,
            config,
            replace(context, progress=lambda share, message: context.progress(_TRAINING_SHARE * share, message)),
            augment,
            stop_at,
        )
        return task, _Notes((*unfolded.skipped, *skipped), tuple(warnings))


def _proven(
    model: Model, task: DistillationTask, result: DistillationResult, unfolded: Unfolded, notes: _Notes
) -> PassResult:
    """The trained model as it is delivered, if it is nearer to the original than `model`; else `model`."""
    warnings = (*notes.warnings, *result.warnings)
    if not result.weights:
        reason = "The model has no float weights that could be trained; it stays as it is."
        return PassResult(model, {}, notes.skipped, (*warnings, reason))
    task.context.progress(1.0, "judging the trained model")
    if result.improved:
        written = unfolded.fold(result.student, model) if unfolded.latents else result.student
        target = task.context.target
        if unfolded.integers_multiplied and target.saturates:
            keep_within_limits(written)
        before, after = _losses(model, written, task)
        if lost := _no_longer_certified(model, written) if unfolded.integers_multiplied else 0:
            reason = f"With the trained weights {lost} layers could saturate without VNNI; the model stays as it was."
            return PassResult(model, {}, notes.skipped, (*warnings, reason))
        if after < before:
            changes = _changes(result, unfolded, before, after)
            return certified(PassResult(written, changes, notes.skipped, warnings, result.details), target)
    reason = "Training did not bring the model nearer to the original, so it stays as it was."
    return PassResult(model, {}, notes.skipped, (*warnings, reason))


def _no_longer_certified(model: Model, written: Model) -> int:
    """How many layers could not saturate before, and can now: sums may leave 32 bits where scales have shrunk."""
    sound = {item.node for item in certify(model) if item.certified}
    return sum(item.node in sound and not item.certified for item in certify(written))


def _first_outputs(original: Model, samples: DataSplit) -> Outputs:
    """The original's computed outputs for the first feed."""
    names = [value.name or "" for value in original.graph.outputs if observable(value, original) and value.producer()]
    with taps(original, names) as observe:
        return observe(next(iter(samples.validation_feeds())).inputs) if names else {}


def _trainable(config: DistillConfig, unfolded: Unfolded) -> Selector:
    learned = unfolded.scales.trained

    def trainable(value: onnx_ir.Value) -> bool:
        if value.name in learned or value.name in unfolded.fixed:
            return value.name in learned
        return value.name in unfolded.latents or (weights(value) and not _excluded(value, config.exclude))

    return trainable


def _excluded(value: onnx_ir.Value, patterns: tuple[str, ...]) -> bool:
    return is_excluded(value.name, patterns) or any(is_excluded(node.name, patterns) for node, _ in value.uses())


def _losses(model: Model, written: Model, task: DistillationTask) -> tuple[float, float]:
    """Validation losses of the model as it was and as it is written now; infinite where the new one does not run."""
    before = _written_loss(model, task)
    try:
        return before, _written_loss(written, task)
    except (ModelNotRunnableError, UnsupportedOperatorError):
        return before, math.inf


def _written_loss(model: Model, task: DistillationTask) -> float:
    """The validation loss in onnxruntime, since what counts in the end is the file that is delivered.

    Raises ModelNotRunnableError, UnsupportedOperatorError.
    """
    names = task.objective.output_names
    with taps(task.original, names) as theirs, taps(model, names) as mine:

        def run(inputs: Feeds) -> Mapping[str, Tensor]:
            return tensors(mine(inputs), torch.device("cpu"))

        return validation_loss(task.samples.validation_feeds(), Teacher(theirs), task.objective, run)


def _changes(result: DistillationResult, unfolded: Unfolded, before: float, after: float) -> dict[str, int | float]:
    quantized = {"quantized_weights_trained": len(unfolded.latents)} if unfolded.latents else {}
    if unfolded.scales.trained:
        quantized["scales_trained"] = len(unfolded.scales.trained)
    losses = {"loss_before": before, "loss_after": after}
    return {"weights_trained": result.weights, **quantized, **result.changes, **losses}
