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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modelpress_compression.errors import CompressionError, InvalidInputsError, UnsupportedFormatError
from modelpress_compression.loaders import refusal
from modelpress_compression.loaders.formats import TRUST_PICKLE, detect
from modelpress_compression.loaders.formats.weight_files import weight_files
from modelpress_compression.loaders.source import Source
from modelpress_compression.specs import parse_specs

if TYPE_CHECKING:
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
    path: Path,
    inputs: Sequence[str] = (),
    *,
    architecture: str | None = None,
    trust_pickle: bool = False,
    state_dict_key: str | None = None,
    ignore_weights: Sequence[str] = (),
) -> Model:
    """A checked model from a state dict, safetensors or a pickled module; its provenance is the source's.

    `path`: a file, a folder with weights, or an index of shards. `architecture`: `package.module:factory`, imported and
    called here, or `transformers:auto`. `trust_pickle`: whether the file may execute whatever it contains.
    `state_dict_key`: where in the file the weights lie. `ignore_weights`: patterns of names that are left out. What was
    chosen or left out stands in the model's warnings. Raises CompressionError.
    """
    from modelpress_compression.loaders.live_module import convert_module
    from modelpress_compression.loaders.weight_loading import Wanted, pickled_module, with_weights

    specs = parse_specs(inputs)
    files = weight_files(path)
    source = Source.of(files.files)
    row = detect(source.main)
    if row.loader:
        raise UnsupportedFormatError(f"The file is {row.noun}, which needs no conversion; upload it as it is.")
    if architecture is None:
        if row.way_out is not TRUST_PICKLE or not trust_pickle:
            raise refusal(row)
        return convert_module(pickled_module(source.main), specs, source.provenance(row.name))
    wanted = Wanted(architecture, trust_pickle, state_dict_key, tuple(ignore_weights))
    loaded = with_weights(files, row, wanted)
    provenance = Source.of(loaded.files).provenance("safetensors" if row.name == "safetensors" else "state_dict")
    return convert_module(loaded.module, specs, provenance).with_warnings(*loaded.notes)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    current = str(Path.cwd())
    if current not in sys.path:
        sys.path.insert(0, current)
    model = convert(
        options.path,
        options.input,
        architecture=options.architecture,
        trust_pickle=options.trust_pickle,
        state_dict_key=options.state_dict_key,
        ignore_weights=options.ignore_weights,
    )
    for warning in model.warnings:
        print(warning, file=sys.stderr)
    model.save(options.output)
    source = model.provenance
    return {
        "format": source.format,
        "sha256": source.sha256,
        "size_bytes": source.size_bytes,
        "warnings": list(model.warnings),
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As an error document, like every other error."""
        raise InvalidInputsError(f"{message}; see python -m modelpress_compression.convert --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m modelpress_compression.convert",
        description="Converts a state dict, safetensors or a pickled module to ONNX, where its Python code lives.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="weights (a file, folder or index) or a module")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.onnx", help="where to write the ONNX model")
    parser.add_argument("--input", action="append", default=[], metavar="SPEC", help="NAME:DTYPE[DIM,...]; repeatable")
    parser.add_argument(
        "--architecture", metavar="MODULE:FACTORY", help="what builds the module: train:Net, transformers:auto"
    )
    parser.add_argument("--state-dict-key", metavar="KEY", help="where in the file the weights lie, e.g. params_ema")
    parser.add_argument(
        "--ignore-weights", action="append", default=[], metavar="PATTERN", help="names to leave out; repeatable"
    )
    parser.add_argument("--trust-pickle", action="store_true", help="let the file execute whatever it contains")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the output is always JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
