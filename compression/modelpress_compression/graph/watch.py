"""Activations one sample at a time: some values of the main graph become the outputs of a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of

Taps = Callable[[Feeds], dict[str, Array]]


def observable(value: onnx_ir.Value | None, model: Model) -> bool:
    """Whether the value can be looked at: it has a name and is computed in, or given to, the main graph."""
    if value is None or not value.name:
        return False
    producer = value.producer()
    return value.is_graph_input() if producer is None else producer.graph is model.graph


@contextmanager
def taps(model: Model, names: Sequence[str]) -> Iterator[Taps]:
    """A function from a feed to what these values of the main graph hold then; only what they need is computed.

    Raises ModelNotRunnableError, UnsupportedOperatorError.
    """
    inputs = {value.name for value in model.graph.inputs}
    wanted = sorted({name for name in names if name not in inputs})
    given = sorted({name for name in names if name in inputs})
    if not wanted:
        yield lambda feed: {name: feed[name] for name in given}
        return
    with session_of(_only(model, wanted)) as session:
        yield lambda feed: {**{name: feed[name] for name in given}, **run(session, feed)}


def _only(model: Model, names: Sequence[str]) -> Model:
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    for name in names:
        value = values[name]
        if value.type is None:
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        # What the exporter recorded may hold for its example alone; a wrong shape would be a warning per run.
        value.shape = None
        copy.graph.outputs.append(value)
    RemoveUnusedNodesPass()(copy.ir)
    return copy
