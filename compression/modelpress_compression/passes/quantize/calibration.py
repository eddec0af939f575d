"""Runs the float model on representative inputs and keeps a histogram of every tensor that will be quantized.

The tensors become outputs of a copy of the model; each run's are counted and let go, so that memory holds the model,
the activations of one sample, and the histograms (64 KiB a tensor), however many samples there are and whatever their
shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.observers import Histogram
from modelpress_compression.runtime import run, session_of

# Ranges settle within some tens of samples on the models tried; more only takes time.
MAX_SAMPLES = 256
_SHARE = 0.7  # of the pass's time


def observe(model: Model, values: Sequence[onnx_ir.Value], context: Context) -> dict[str, Histogram]:
    """A histogram for each of these values of the main graph, by name.

    Raises ModelNotRunnableError if the model does not run on the data, TimeLimitError if time is up.
    """
    histograms = {value.name: Histogram() for value in values if value.name}
    inputs = {value.name for value in model.graph.inputs}
    with session_of(with_outputs(model, [name for name in histograms if name not in inputs])) as session:
        samples = context.data.spread(MAX_SAMPLES)
        done = 0
        for feed in samples.feeds(batch_size=1):
            context.check_time()
            outputs = run(session, feed)
            for name, histogram in histograms.items():
                histogram.observe(outputs[name] if name in outputs else feed[name])
            done += samples.fixed_batch or 1
            context.progress(_SHARE * min(1.0, done / len(samples)), f"calibrating, sample {done} of {len(samples)}")
    return histograms


def with_outputs(model: Model, names: Sequence[str]) -> Model:
    """A copy of the model that gives these float32 tensors of its main graph too."""
    copy = model.clone()
    wanted = set(names) - {value.name for value in copy.graph.outputs}
    for node in copy.graph:
        for value in node.outputs:
            if value.name in wanted:
                value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
                # What the exporter recorded may hold for its example alone; a wrong shape would be a warning per run.
                value.shape = None
                copy.graph.outputs.append(value)
    return copy
