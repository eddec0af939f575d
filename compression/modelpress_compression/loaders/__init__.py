"""Loading: every format becomes one normalized ONNX graph.

`formats` is the table of formats; a file's content alone decides which it is. `normalize` says what the graph of a
loaded model is like, so that everything after this may rely on it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from modelpress_compression.errors import CompressionError, RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders.formats import Format, detect
from modelpress_compression.loaders.source import Source
from modelpress_compression.specs import TensorSpec, parse_specs

if TYPE_CHECKING:
    from modelpress_compression.model import Model, Provenance

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def load(path: Paths, inputs: Sequence[str | TensorSpec] = (), *, provenance: Provenance | None = None) -> Model:
    """Loads a model of any format, detected by content, never by the file's name.

    `path`: one file, or an ONNX file followed by its external data files.
    `inputs`: `NAME:DTYPE[DIM,...]`; needed where the format records no inputs, elsewhere checked against the model.
    `provenance`: where the model came from when it is not this file, for what was converted on another machine.

    Raises UnsupportedFormatError, RejectedModelError, InvalidInputsError, UnsupportedOperatorError,
    ModelNotRunnableError.
    """
    source = Source.of(path)
    specs = parse_specs(inputs)
    row = detect(source.main)
    if row.loader is None:
        raise refusal(row)
    module, _, function = row.loader.partition(":")
    # Imported when it is needed: torch takes seconds.
    model: Model = getattr(import_module(f"{__name__}.{module}"), function)(source, specs)
    return model if provenance is None else replace(model, provenance=provenance)


def refusal(row: Format) -> CompressionError:
    """The error for a format that is recognized, but is no model by itself; it names the way out."""
    message = row.refusal("The file")
    if row.carries_code:
        return RejectedModelError(message, finding=row.name.upper())
    return UnsupportedFormatError(message, format=row.name)
