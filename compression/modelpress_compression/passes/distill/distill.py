"""Distillation: the model as it stands is trained with the model as it was uploaded as its teacher.

Nothing but the file is needed: the graph runs in torch (`executor`), the uploaded model answers in onnxruntime, and the
distance between the answers is what training lessens (Hinton et al., arXiv:1503.02531). Labels help where there are
some.

    samples       a share held out that judges; batches of the rest            samples, augmentation
                  made up where no data was given                              inversion
    teacher       the original's answers                                       teacher
    loss          by what the outputs are                                      losses, labels, matching, objective
    training      the whole model, or block after block                        end_to_end, layerwise, blocks, training
    integers      trained as floats behind fake quantization                   fake_quantization
    proof         the written model must be nearer to the original than
                  before, on the samples held out, in onnxruntime              judge
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir

from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.executor import Selector, weights
from modelpress_compression.executor.devices import why_not
from modelpress_compression.graph.watch import observable, taps
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip, is_excluded
from modelpress_compression.passes.distill import end_to_end, layerwise
from modelpress_compression.passes.distill.augmentation import make_augmenter
from modelpress_compression.passes.distill.config import DistillConfig
from modelpress_compression.passes.distill.end_to_end import Taught
from modelpress_compression.passes.distill.fake_quantization import Unfolded, unfold
from modelpress_compression.passes.distill.inversion import training_inputs
from modelpress_compression.passes.distill.judge import written_loss
from modelpress_compression.passes.distill.lesson import Lesson, make_objective, stop_time
from modelpress_compression.passes.distill.samples import Samples, split
from modelpress_compression.passes.distill.teacher import Answers
from modelpress_compression.passes.integers.certificate import certified, keep_within_limits

_WRITTEN = 0.95  # share of the pass's time until the result is judged


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
        unfolded = unfold(model, self._config.exclude)
        lesson, notes = self._prepare(unfolded, context.original, context)
        method = layerwise if self._config.method == "layerwise" else end_to_end
        return self._result(model, lesson, method.teach(lesson), unfolded, notes)

    def _prepare(self, unfolded: Unfolded, original: Model, context: Context) -> tuple[Lesson, _Notes]:
        config = self._config
        stop_at = stop_time(context)
        data, made = context.data, []
        if not data.provided:
            data, warning = training_inputs(original, context, config.seed, stop_at)
            made = [warning]
        samples = split(data, config.hold_out, config.batch_size, config.seed)
        objective, reasons, warnings = make_objective(original, _answers(original, samples), samples, config)
        warnings += made
        if reason := why_not(context.target.device):
            warnings.append(reason)
        if not samples.held_out:
            warnings.append(
                f"{len(data)} samples are too few to hold some out: the best state was chosen on those that it "
                f"was trained on."
            )
        skipped = unfolded.skipped + tuple(
            Skip(name, f"Not trained towards: {reason}.") for name, reason in reasons.items()
        )
        augment, refused = make_augmenter(original, samples.data, config.augment, config.seed)
        warnings += [f"The augmentation {name!r} was left out: {reason}." for name, reason in refused]
        lesson = Lesson(
            original,
            unfolded.model,
            _selector(config, unfolded),
            samples,
            objective,
            config,
            replace(context, progress=lambda share, message: context.progress(_WRITTEN * share, message)),
            augment,
            stop_at,
        )
        return lesson, _Notes(skipped, tuple(warnings))

    def _result(self, model: Model, lesson: Lesson, taught: Taught, unfolded: Unfolded, notes: _Notes) -> PassResult:
        skipped = notes.skipped
        warnings = [*notes.warnings, *taught.warnings]
        if not taught.weights:
            reason = "The model has no float weights that could be trained; it stays as it is."
            return PassResult(model, {}, skipped, (*warnings, reason))
        lesson.context.progress(1.0, "judging the trained model")
        if taught.improved:
            written = unfolded.fold(taught.student, model) if unfolded.latents else taught.student
            target = lesson.context.target
            if unfolded.integers_multiplied and target.cpu == "generic":
                keep_within_limits(written)
            before, after = _losses(model, written, lesson)
            if after < before:
                changes = _changes(taught, unfolded, before, after)
                return certified(PassResult(written, changes, skipped, tuple(warnings), taught.details), target)
        reason = "Training did not bring the model nearer to the original, so it stays as it was."
        return PassResult(model, {}, skipped, (*warnings, reason))


def _answers(original: Model, samples: Samples) -> Answers:
    """The original's computed outputs for the first feed."""
    names = [value.name or "" for value in original.graph.outputs if observable(value, original) and value.producer()]
    with taps(original, names) as observe:
        return observe(next(iter(samples.judging())).inputs) if names else {}


def _selector(config: DistillConfig, unfolded: Unfolded) -> Selector:
    def trained(value: onnx_ir.Value) -> bool:
        return value.name in unfolded.latents or (weights(value) and not _excluded(value, config.exclude))

    return trained


def _excluded(value: onnx_ir.Value, patterns: tuple[str, ...]) -> bool:
    return is_excluded(value.name, patterns) or any(is_excluded(node.name, patterns) for node, _ in value.uses())


def _losses(model: Model, student: Model, lesson: Lesson) -> tuple[float, float]:
    """Of the model as it was and as it is written now, in onnxruntime; infinite where the new one does not run."""
    before = written_loss(model, lesson.original, lesson.objective, lesson.samples)
    try:
        after = written_loss(student, lesson.original, lesson.objective, lesson.samples)
    except (ModelNotRunnableError, UnsupportedOperatorError):
        return before, math.inf
    return before, after


def _changes(taught: Taught, unfolded: Unfolded, before: float, after: float) -> dict[str, int | float]:
    quantized = {"quantized_weights_trained": len(unfolded.latents)} if unfolded.latents else {}
    losses = {"loss_before": before, "loss_after": after}
    return {"weights_trained": taught.weights, **quantized, **taught.changes, **losses}
