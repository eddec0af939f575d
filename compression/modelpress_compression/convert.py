"""Converts what needs its own Python code to ONNX, on the machine where that code lives.

    python -m modelpress_compression.convert weights.pth --output model.onnx --input 'x:float32[batch,1,28,28]' \\
        --architecture train:Net
    python -m modelpress_compression.convert module.pt --output model.onnx --input 'x:float32[batch,3,224,224]' \\
        --trust-pickle

Modules are looked for in the current folder first. One JSON document is printed on stdout: the source file's
`{"format", "sha256", "size_bytes"}`, or `{"error": {"reason", "message"}}` with exit code 2. Whatever the user's code
prints goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modelpress_compression.errors import (
    CompressionError,
    InvalidInputsError,
    RejectedModelError,
    UnsupportedFormatError,
)
from modelpress_compression.loaders import refusal
from modelpress_compression.loaders.checked_copy import checked_file
from modelpress_compression.loaders.formats import TRUST_PICKLE, Format, detect
from modelpress_compression.loaders.source import Source
from modelpress_compression.specs import parse_specs

if TYPE_CHECKING:
    import torch

    from modelpress_compression.model import Model

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    try:
        # The one document on stdout is ours; the user's code may print as it likes.
        with contextlib.redirect_stdout(sys.stderr):
            document = _run(_parser().parse_args(arguments))
    except CompressionError as error:
        print(json.dumps({"error": {"reason": error.reason, "message": error.message}}))
        return EXIT_USAGE
    except OSError as error:
        message = f"{error.strerror or error}: {Path(str(error.filename)).name if error.filename else ''}"
        print(json.dumps({"error": {"reason": "INVALID_INPUTS", "message": message}}))
        return EXIT_USAGE
    print(json.dumps(document))
    return 0


def convert(
    path: Path, inputs: Sequence[str] = (), *, architecture: str | None = None, trust_pickle: bool = False
) -> Model:
    """A checked model from a state dict, safetensors or a pickled module; its provenance is the source file's.

    `architecture`: `package.module:factory`, imported and called here. `trust_pickle`: whether the file may execute
    whatever it contains. Raises CompressionError.
    """
    from modelpress_compression.loaders.live_module import convert_module

    source = Source.of(path)
    specs = parse_specs(inputs)
    row = detect(path)
    if row.loader:
        raise UnsupportedFormatError(f"The file is {row.noun}, which needs no conversion; upload it as it is.")
    module, model_format = _module(path, row, architecture, trust_pickle=trust_pickle)
    return convert_module(module, specs, source.provenance(model_format))


def _run(options: argparse.Namespace) -> dict[str, Any]:
    current = str(Path.cwd())
    if current not in sys.path:
        sys.path.insert(0, current)
    model = convert(options.path, options.input, architecture=options.architecture, trust_pickle=options.trust_pickle)
    for warning in model.warnings:
        print(warning, file=sys.stderr)
    model.save(options.output)
    source = model.provenance
    return {"format": source.format, "sha256": source.sha256, "size_bytes": source.size_bytes}


def _module(path: Path, row: Format, architecture: str | None, *, trust_pickle: bool) -> tuple[torch.nn.Module, str]:
    """The live module, and the format that the file turned out to have."""
    import torch

    from modelpress_compression.loaders.architecture import Architecture, find_weights, load_weights

    factory = Architecture.parse(architecture) if architecture else None
    if factory is None and not (row.way_out is TRUST_PICKLE and trust_pickle):
        raise refusal(row)
    content = _read(path, row, trust_pickle=trust_pickle)
    pickled = _pickled_module(content)
    if factory is None:
        if pickled is None:
            raise InvalidInputsError(
                f"The file holds a {type(content).__name__}, not a module; give --architecture package.module:factory."
            )
        return pickled, "pickled_module"
    module = factory.build()
    load_weights(module, pickled.state_dict() if isinstance(pickled, torch.nn.Module) else find_weights(content))
    return module, "safetensors" if row.name == "safetensors" else "state_dict"


def _read(path: Path, row: Format, *, trust_pickle: bool) -> Any:
    import torch

    if row.name == "safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UnsupportedFormatError(f"The safetensors file is damaged: {error}") from error
    try:
        if trust_pickle or row.name != "state_dict":
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
        with checked_file(path, "The PyTorch archive") as checked:
            return torch.load(checked, map_location="cpu", weights_only=True)
    except CompressionError:
        raise
    except pickle.UnpicklingError as error:
        raise RejectedModelError(
            "The file holds more than tensors, so that loading it would execute code. If you trust whoever wrote it, "
            "add --trust-pickle.",
            finding="PICKLE_GLOBAL",
        ) from error
    except Exception as error:  # unpickling runs the file's own code and imports
        raise InvalidInputsError(
            f"Loading the file failed ({type(error).__name__}: {str(error)[:300]}). The packages that it was saved "
            f"with must be importable here; the current folder is searched."
        ) from error


def _pickled_module(content: Any) -> torch.nn.Module | None:
    """The module itself, or the one that a training script put into its checkpoint; averaged weights go first."""
    import torch

    candidates = [content]
    if isinstance(content, dict):
        candidates += [content.get("ema"), content.get("model")]
    found = next((item for item in candidates if isinstance(item, torch.nn.Module)), None)
    return found.float() if found is not None else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As an error document, like every other error."""
        raise InvalidInputsError(f"{message}; see python -m modelpress_compression.convert --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m modelpress_compression.convert",
        description="Converts a state dict, safetensors or a pickled module to ONNX, where its Python code lives.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the weights or the pickled module")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.onnx", help="where to write the ONNX model")
    parser.add_argument("--input", action="append", default=[], metavar="SPEC", help="NAME:DTYPE[DIM,...]; repeatable")
    parser.add_argument("--architecture", metavar="MODULE:FACTORY", help="what builds the module, e.g. train:Net")
    parser.add_argument("--trust-pickle", action="store_true", help="let the file execute whatever it contains")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is always JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
