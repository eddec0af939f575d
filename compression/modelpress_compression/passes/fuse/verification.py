"""Does the rewritten model still compute the same? Outputs on representative inputs, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelpress_compression.agreement import why_different
from modelpress_compression.errors import CompressionError
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of

_SAMPLES = 2

Outputs = Mapping[str, Array]


class Verification:
    """The original's outputs, to hold rewritten models against.

    Samples go through one by one, and once as a batch of two where the original can: a rewrite that mixes up the batch
    axis shows there only. Raises ModelNotRunnableError when the original does not run.
    """

    def __init__(self, original: Model, data: InputData) -> None:
        singles: list[Feeds] = list(data.feeds(limit=_SAMPLES)) or [{}]
        pairs = list(data.feeds(batch_size=_SAMPLES, limit=_SAMPLES))
        self._feeds: list[Feeds] = []
        self._outputs: list[Outputs] = []
        with session_of(original) as session:
            for feed in singles:
                self._feeds.append(feed)
                self._outputs.append(run(session, feed))
            for feed in pairs if len(singles) > 1 and len(pairs) < len(singles) else []:
                try:
                    outputs = run(session, feed)
                except CompressionError:
                    continue  # the model takes one sample at a time
                self._feeds.append(feed)
                self._outputs.append(outputs)

    def why_different(self, model: Model) -> str | None:
        """What is wrong with the rewritten model; None when it computes the same."""
        try:
            with session_of(model) as session:
                got = [run(session, feed) for feed in self._feeds]
        except CompressionError as error:
            return f"the result does not run ({error.message})"
        return _difference(self._outputs, got)


def _difference(expected: Sequence[Outputs], got: Sequence[Outputs]) -> str | None:
    for before, after in zip(expected, got, strict=True):
        if list(before) != list(after):
            return "the names of the outputs changed"
        for name, array in before.items():
            if (reason := why_different(array, after[name])) is not None:
                return f"output {name!r} {reason}"
    return None
