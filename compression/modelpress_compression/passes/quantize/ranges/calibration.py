"""Keeps a histogram of every tensor that will be quantized, over the representative inputs.

Each sample's tensors are counted and let go, so that memory holds the model, the activations of one sample, and the
histograms (64 KiB a tensor), however many samples there are and whatever their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from modelpress_compression.graph.watch import Listener, stream
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.ranges.observers import Histogram

# Ranges settle within some tens of samples on the models tried; more only takes time.
MAX_SAMPLES = 256


def observe(
    model: Model, values: Sequence[onnx_ir.Value], context: Context, done: Listener | None = None
) -> dict[str, Histogram]:
    """A histogram for each of these values of the main graph, by name.

    Raises ModelNotRunnableError if the model does not run on the data, TimeLimitError if time is up.
    """
    histograms = {value.name: Histogram() for value in values if value.name}
    samples = context.data.spread(MAX_SAMPLES)
    for tensors in stream(model, list(histograms), samples, context.check_time, done, padding=False):
        for name, histogram in histograms.items():
            histogram.observe(tensors[name])
    return histograms
