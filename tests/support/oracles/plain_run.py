"""A model run by onnxruntime as its graph is written, without optimization."""

from __future__ import annotations

from collections.abc import Sequence

from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of


def run_onnx(model: Model, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    """All outputs for every feed. Raises ModelNotRunnableError."""
    with session_of(model, optimize=False) as session:
        return [run(session, feed) for feed in feeds]
