"""The step that rotates residual streams before anything is quantized (scaling/streams.py, scaling/rotation.py).

Weights and activations in few bits lose less where channels are alike, and may lose more where they were alike already.
Under `rotate: auto` both forms are therefore made in fewer bits, quickly, and the outputs decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.holding_out import parted
from modelpress_compression.mapped import WeightFile
from modelpress_compression.measure.fidelity import KnownOutputs
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, Skip
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.scaling.rotation import rotate
from modelpress_compression.passes.quantize.scaling.streams import find_streams

ROTATED = "rotated_streams"  # in the changes
MAX_SAMPLES = 64
MIN_SAMPLES = 8  # with fewer, all of them calibrate, and judge
# Share of the error at the outputs that must go.
LEAST_GAIN = 0.2  # 1 dB: less may be of these samples alone
MAX_BYTES = 1024**3  # 1 GiB: of the weights that take rotations in; to try more takes many minutes

# The model in fewer bits, made quickly: what is tried, rotated and not.
Trial = Callable[[Model, Context], Model]


def with_rotated_streams(
    model: Model, config: QuantizeConfig, context: Context, findings: Findings, quickly: Trial
) -> Model:
    """A clone whose streams are turned, or the model itself: where the recipe says so, where there is no stream, and
    under `rotate: auto` where the outputs would not err less by it.

    `quickly`: makes the model in fewer bits, as rotations are tried. Raises ModelNotRunnableError, TimeLimitError.
    """
    tries = config.rotate == "auto"
    # Ranges that come from made-up inputs tell nothing; weights err on them much as they do on others.
    if config.rotate == "none" or (tries and not context.data.can_be_fitted and config.scheme != "weight_only"):
        return model
    turned = model.clone()
    streams, blocked = find_streams(turned, sample_shapes(context.data))
    if not tries:
        findings.skipped += [Skip(name, f"its residual stream was not rotated: {why}") for name, why in blocked.items()]
        if not streams and not blocked:
            findings.skipped.append(Skip("model", "there is no residual stream to rotate: nothing is normalized"))
    size = sum(fold.slot.array.nbytes for stream in streams for fold in stream.folds)
    if size > MAX_BYTES:
        why = f"its residual streams were not rotated: their weights take {size} bytes, more than {MAX_BYTES}"
        findings.skipped.append(Skip("model", why))
    if not streams or size > MAX_BYTES:
        return model
    weights = WeightFile.for_large(model.weight_bytes(), context.work_directory)
    rotate(turned, streams, weights=weights)
    if tries:
        reason = why_not_rotated(*_errors((model, turned), context, quickly))
        if reason is not None:
            findings.skipped.append(reason)
            if weights is not None:
                weights.remove()
            return model
    findings.changes[ROTATED] = len(streams)
    return turned


def why_not_rotated(before: float, after: float) -> Skip | None:
    """None where the outputs err by enough less: by `after` of their power, and by `before` without rotations."""
    if after < (1 - LEAST_GAIN) * before:
        return None
    errors = f"the outputs err by {after:.3g} of their power with rotations, and by {before:.3g} without"
    return Skip("model", f"its residual streams were not rotated: {errors}")


def _errors(models: Sequence[Model], context: Context, quickly: Trial) -> list[float]:
    """Of two forms of one model in fewer bits at its outputs, on samples that they were not calibrated on."""
    context.progress(0.0, "trying rotations of residual streams")
    samples = context.data.spread(MAX_SAMPLES)
    count = samples.feed_count
    halves = parted(samples, every=2) if count >= MIN_SAMPLES else (samples, samples)
    calibrating, judging = (replace(context, data=half, progress=lambda share, message: None) for half in halves)
    known, errors = KnownOutputs(), []
    for model in models:
        # What is made on the way goes at once.
        with TemporaryDirectory(dir=context.work_directory, prefix="trial-") as folder:
            quick = quickly(model, replace(calibrating, work_directory=Path(folder)))
            errors.append(output_distances(models[0], quick, judging, known).error)
    return errors
