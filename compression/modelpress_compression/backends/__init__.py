"""The runtimes that models are measured in, a folder each; `target.DEVICES` names them.

A backend opens model files as runners. Whoever measures takes it from the recipe's target, and knows no runtime.
"""

from __future__ import annotations

from importlib import import_module

from modelpress_compression.backends.base import Backend
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.schema import Violation
from modelpress_compression.target import DEVICES, Target


def backend_of(target: Target) -> Backend:
    """What measures models for the target. Raises InvalidRecipeError where it is not there."""
    row = DEVICES[target.device]
    if row.fault:
        raise InvalidRecipeError([Violation("target.device", row.fault)])
    module, _, name = row.backend.partition(":")
    try:
        backend: Backend = getattr(import_module(module), name).of(target)
    except ImportError as error:
        raise InvalidRecipeError([Violation("target.device", f"{row.title} cannot be loaded here: {error}")]) from error
    return backend


def backends_of(target: Target) -> tuple[Backend, ...]:
    """The target's own, whose figures decide, and onnxruntime on the CPU beside it. Raises as `backend_of`."""
    own, common = backend_of(target), backend_of(Target())
    return (own,) if own.label == common.label else (own, common)
