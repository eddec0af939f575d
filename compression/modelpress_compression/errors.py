"""Errors that a user's model, recipe or data can cause.

    CompressionError
    ├── UnsupportedFormatError      the bytes are no format that is read here
    ├── RejectedModelError          readable, but refused: pickles, path tricks, bombs
    ├── InvalidInputsError          the inputs are not known, or do not fit the model
    ├── InvalidDataError            a data file is unreadable or does not fit the model's inputs
    ├── MetricError                 the user's own metric failed, or gave no number
    ├── InvalidRecipeError          the recipe breaks its rules; all violations at once
    ├── UnsupportedOperatorError    an operator that cannot be converted or run
    ├── ModelNotRunnableError       the model does not load or run in onnxruntime
    ├── MemoryLimitError            a job needs more memory than it may use
    ├── DiskSpaceError              a job needs more space than its work folder has
    └── TimeLimitError              the time given to a job ran out

Each message is one short paragraph for a person: what happened, where, what to do. `reason` is for machines and is the
`ErrorReason` of the API without its prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from modelpress_compression.schema import Violation


class CompressionError(Exception):
    """Base class; every message may be shown to the user."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = metadata


class UnsupportedFormatError(CompressionError):
    """The bytes are no format that is read here."""

    reason = "UNSUPPORTED_FORMAT"


class RejectedModelError(CompressionError):
    """The model is readable, but its content is not accepted. `metadata["finding"]` is a code such as PICKLE_GLOBAL."""

    reason = "MODEL_REJECTED"


class InvalidInputsError(CompressionError):
    """The model's inputs are not known, or those given do not fit it."""

    reason = "INVALID_INPUTS"


class InvalidDataError(CompressionError):
    """A data file is unreadable, or its arrays do not fit the model's inputs."""

    reason = "INVALID_DATA"


class MetricError(CompressionError):
    """The user's own metric failed, or gave no finite number."""

    reason = "METRIC_FAILED"


class InvalidRecipeError(CompressionError):
    """The recipe breaks its rules; `violations` lists all of them."""

    reason = "INVALID_FIELDS"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("The recipe is not valid: " + "; ".join(str(violation) for violation in violations))
        self.violations = tuple(violations)


class UnsupportedOperatorError(CompressionError):
    """An operator cannot be converted or run; metadata: `op_type`, and `node` where it is known."""

    reason = "UNSUPPORTED_OPERATOR"


class ModelNotRunnableError(CompressionError):
    """The model does not load or run in onnxruntime."""

    reason = "MODEL_NOT_RUNNABLE"


class MemoryLimitError(CompressionError):
    """A job needs more memory than it may use."""

    reason = "WORKER_OUT_OF_MEMORY"


class DiskSpaceError(CompressionError):
    """A job needs more space than its work folder has."""

    reason = "STORAGE_FULL"


class TimeLimitError(CompressionError):
    """The time given to the job ran out before there was a result."""

    reason = "WORKER_TIMEOUT"
