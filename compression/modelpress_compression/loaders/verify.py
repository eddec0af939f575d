"""Whether two forms of a model compute the same, shown on random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelpress_compression.agreement import ATOL, why_different
from modelpress_compression.errors import CompressionError
from modelpress_compression.inputs import Array
from modelpress_compression.loaders.trials import example_feeds, symbols_of
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of

# What dynamic dimensions are tried at; convolutional nets need some size, sequences any.
_SIZES = (32, 224, 8, 64, 128, 320, 1)


class Disagreement(Exception):  # noqa: N818  an outcome of a comparison, which the callers turn into errors
    """Two forms of a model give different outputs; the message says which and by how much."""


def check_outputs(expected: Sequence[Array], got: Sequence[Array], names: Sequence[str], *, atol: float = ATOL) -> None:
    """Raises Disagreement where outputs differ by more than rounding, in shape or in number; `atol` as `agreement`."""
    if len(expected) != len(got):
        raise Disagreement(f"{len(got)} outputs instead of {len(expected)}")
    for name, want, have in zip(names, expected, got, strict=True):
        if (reason := why_different(want, have, atol=atol)) is not None:
            raise Disagreement(f"output {name!r} {reason}")


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
