"""Whether two forms of a model compute the same, shown on random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from modelpress_compression.errors import CompressionError
from modelpress_compression.inputs import Array, Feeds
from modelpress_compression.loaders.examples import example_feeds, symbols_of
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of

RELATIVE_TOLERANCE = 1e-3
ABSOLUTE_TOLERANCE = 1e-4  # times the output's largest magnitude, where that is over 1
# What dynamic dimensions are tried at; convolutional nets need some size, sequences any.
_SIZES = (32, 224, 8, 64, 128, 320, 1)


class Disagreement(Exception):  # noqa: N818  an outcome of a comparison, which the callers turn into errors
    """Two forms of a model give different outputs; the message says which and by how much."""


def check_outputs(expected: Sequence[Array], got: Sequence[Array], names: Sequence[str]) -> None:
    """Raises Disagreement where outputs differ by more than rounding, in shape or in number."""
    if len(expected) != len(got):
        raise Disagreement(f"{len(got)} outputs instead of {len(expected)}")
    for name, want, have in zip(names, expected, got, strict=True):
        if want.shape != have.shape:
            raise Disagreement(f"output {name!r} has shape {have.shape} instead of {want.shape}")
        if want.dtype.kind not in "fc":
            share = float(np.mean(want == have)) if want.size else 1.0
            # Argmax-like outputs may flip where two scores tie.
            if share < 0.99:
                raise Disagreement(f"output {name!r} agrees in {share:.1%} of its elements only")
            continue
        want64, have64 = want.astype(np.float64), have.astype(np.float64)
        finite = np.isfinite(want64)
        if not np.array_equal(finite, np.isfinite(have64)):
            raise Disagreement(f"output {name!r} is not finite where the original is, or the other way round")
        scale = max(1.0, float(np.abs(want64[finite]).max(initial=0.0)))
        error = float(np.abs(want64[finite] - have64[finite]).max(initial=0.0))
        if error > ABSOLUTE_TOLERANCE * scale + RELATIVE_TOLERANCE * scale:
            raise Disagreement(f"output {name!r} differs by {error:.3g} where values reach {scale:.3g}")


def compare_models(before: Model, after: Model) -> None:
    """Runs both on random inputs. Raises Disagreement; CompressionError where `after` does not run.

    Where `before` runs on no random input, nothing can be shown, and that is a Disagreement as well.
    """
    with session_of(before, optimize=False) as first, session_of(after, optimize=False) as second:
        for size in _SIZES:
            feeds = example_feeds(before.inputs, dict.fromkeys(["", *symbols_of(before.inputs)], size), batch=2)
            try:
                expected = run(first, feeds)
            except CompressionError:
                continue
            _check_named(expected, run(second, feeds))
            return
    raise Disagreement("the original runs on no random input that was tried")


def _check_named(expected: Mapping[str, Array], got: Mapping[str, Array]) -> None:
    names = list(expected)
    check_outputs([expected[name] for name in names], [got[name] for name in names], names)


def run_onnx(model: Model, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    """All outputs for every feed, run as the graph is written. Raises ModelNotRunnableError."""
    with session_of(model, optimize=False) as session:
        return [run(session, feed) for feed in feeds]
