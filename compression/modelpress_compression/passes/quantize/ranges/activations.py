"""Runs the float model on the calibration data and hands out tensors of its main graph, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir

from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.runtime import run, session_of

Listener = Callable[[float], None]  # share of the samples that is done


def stream(
    model: Model, names: Sequence[str], context: Context, limit: int, done: Listener | None = None
) -> Iterator[dict[str, Array]]:
    """The named tensors for one sample after the other, of at most `limit` samples spread over the data.

    Positions that an attention mask leaves out are taken away, and with them the axis of samples.
    Memory holds the model and the activations of one sample. Raises ModelNotRunnableError if the model does not run on
    the data, TimeLimitError if time is up.
    """
    inputs = {value.name for value in model.graph.inputs}
    with session_of(with_outputs(model, [name for name in names if name not in inputs])) as session:
        samples = context.data.spread(limit)
        count = 0
        for feed in samples.feeds(batch_size=1):
            context.check_time()
            outputs = run(session, feed)
            mask = counted_positions(feed)
            found = {name: outputs[name] if name in outputs else feed[name] for name in names}
            yield {name: without_padding(array, mask) for name, array in found.items()}
            count += samples.fixed_batch or 1
            if done is not None:
                done(min(1.0, count / len(samples)))


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
