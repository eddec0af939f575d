"""Static quantization without data, of models that read tokens: fitted to sequences made from the model, or to nothing.

Random tokens are no text: everything that a step fits to them (SmoothQuant, ranges by the outputs, corrected biases,
GPTQ) suits other inputs than the model will get, so that a step without data fits nothing. Sequences that the model
itself was asked for are worth fitting to: on a sentence encoder they were worth as much as as many real sentences
(docs/distillation.md). That is one model; of others it is judged: the step is done both ways, and the one that is
fitted is taken only where its outputs err less on sequences that nothing was fitted to, made ones and random ones.

It takes a second step and up to MAX_SECONDS, and is for recipes that ask for `static` by name.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from modelpress_compression.errors import CompressionError
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.recipe import Step
from modelpress_compression.search.steps import StepRecord, apply_step, scaled

SAMPLES, JUDGING_SAMPLES = 64, 32
MAX_WEIGHT_BYTES = 512 * 1024**2  # 512 MiB: of larger ones too few sequences are made in the time there is
# For making them: no more than this, and than this part of the job's time.
MAX_SECONDS = 60.0
_SHARE_OF_TIME = 0.1
_SEED = 1  # other tokens than those of the data that stands in for the user's
CONFIDENCE = (
    "Confidence is low: on the one model where real inputs could tell, these kept 5 dB less than made ones said, and "
    "1.3 dB more than with nothing fitted."
)


def is_open(step: Step, model: Model, context: Context) -> bool:
    """Whether the step asks for static quantization, without data to fit it to, of a model that is not too large."""
    config = step.config
    is_static = isinstance(config, QuantizeConfig) and config.scheme == "static"
    return is_static and not context.data.provided and model.weight_bytes() <= MAX_WEIGHT_BYTES


def apply_to_made_sequences(step: Step, model: Model, path: Path, context: Context, target: Path) -> StepRecord:
    """As `apply_step`; the better of a step without anything fitted and one fitted to made sequences."""
    first, second = (replace(context, progress=scaled(context.progress, *part)) for part in ((0.0, 0.5), (0.5, 1.0)))
    plain = apply_step(step, model, path, first, target)
    began = time.monotonic()
    made = _made(context)
    if made is None or not plain.changes:
        return plain
    fitting, judging = made.head(len(made) - JUDGING_SAMPLES), made.only(range(len(made) - JUDGING_SAMPLES, len(made)))
    fitted = apply_step(step, model, path, replace(second, data=fitting), target.parent / "fitted" / target.name)
    fitted = replace(fitted, duration_s=plain.duration_s + time.monotonic() - began)
    kinds = {"made": judging, "random": context.data.spread(JUDGING_SAMPLES)}
    before, after = (
        {kind: compare_outputs(path, record.path, data).sqnr_db for kind, data in kinds.items()}
        for record in (plain, fitted)
    )
    figures = ", ".join(f"{after[kind]:.1f} dB on {kind} ones ({before[kind]:.1f} without)" for kind in kinds)
    if not fitted.changes or any(after[kind] < before[kind] for kind in kinds):
        text = f"Fitting to {len(fitting)} token sequences ({made.made}) was tried and left: it kept {figures}."
        return replace(plain, notes=(*plain.notes, text), duration_s=fitted.duration_s)
    text = (
        f"No data was given: scales, ranges, roundings and biases were fitted to {len(fitting)} token sequences "
        f"({made.made}). On sequences held out that keeps {figures}. {CONFIDENCE} Give representative inputs with "
        f"--data."
    )
    return replace(fitted, warnings=(*fitted.warnings, text))


def _made(context: Context) -> InputData | None:
    """For fitting and, behind them, for judging; None where the original takes no tokens or cannot be asked."""
    # torch takes a second to import.
    from modelpress_compression.passes.distill.made_inputs import made_sequences

    original, left = context.original, context.time_left_s
    if original is None or not any(spec.dtype.startswith("int") and len(spec.shape) == 2 for spec in original.inputs):
        return None
    until = time.monotonic() + min(MAX_SECONDS, MAX_SECONDS if left is None else _SHARE_OF_TIME * left)
    try:
        random = synthetic_inputs(original, samples=SAMPLES + JUDGING_SAMPLES, seed=_SEED)
        found = made_sequences(original, random, context, _SEED, until)
    except CompressionError as error:
        context.log(f"no token sequences were made: {error.message}")
        return None
    if found is None or len(found[0]) <= 2 * JUDGING_SAMPLES:
        return None
    return replace(found[0], made=found[1])
