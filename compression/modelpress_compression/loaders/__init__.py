"""Loading: every format becomes one normalized ONNX graph.

    onnx            with its external data                      parsed here, no code in it
    torchscript     torch.jit.save                              interpreted by torch's own interpreter, then exported
    torch_export    torch.export.save (.pt2)                    checked, for its loader executes pickles; exported
    state_dict, safetensors, pickled_module                     refused: `modelpress_compression.convert` makes ONNX of
                                                                them where their Python code lives

What the graph of a loaded model is like, so that everything after this may rely on it: see `loaders.normalize`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from modelpress_compression.loaders.detect import detect
from modelpress_compression.loaders.source import Source
from modelpress_compression.specs import TensorSpec, parse_specs

if TYPE_CHECKING:
    from modelpress_compression.model import Model, Provenance

__all__ = ["detect", "load"]

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
    model_format = detect(source.main)
    model = _load(model_format, source, specs)
    return model if provenance is None else replace(model, provenance=provenance)


def _load(model_format: str, source: Source, specs: tuple[TensorSpec, ...]) -> Model:
    if model_format == "onnx":
        from modelpress_compression.loaders.onnx_file import load_onnx

        return load_onnx(source, specs)
    if model_format == "torchscript":
        from modelpress_compression.loaders.torchscript import load_torchscript

        with TemporaryDirectory(prefix="modelpress-") as folder:
            return load_torchscript(source, specs, folder)
    if model_format == "torch_export":
        from modelpress_compression.loaders.torch_export import load_torch_export

        with TemporaryDirectory(prefix="modelpress-") as folder:
            return load_torch_export(source, specs, folder)
    from modelpress_compression.loaders.refused import refuse

    raise refuse(model_format)
