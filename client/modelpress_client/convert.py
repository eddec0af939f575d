"""Conversion on the user's own machine of what no server reads: state dicts and pickled modules.

The engine does it in a process of its own, `python -m modelpress_compression.convert`, so that this package needs
neither torch nor onnx, and a crash of the user's code is no crash of the client.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelpress_protos.formats import FORMATS, TRUST_PICKLE, Format
from modelpress_protos.v1.common_pb2 import Digest, ModelFormat, TensorSpec
from modelpress_protos.v1.model_service_pb2 import SourceFile

from modelpress_client.engine import run_engine
from modelpress_client.errors import ServerError, UsageError
from modelpress_client.inputs import format_input

ENGINE_MODULE = "modelpress_compression.convert"
ENGINE_PACKAGES = ("modelpress_compression", "torch", "onnx", "onnx_ir", "onnxscript")


@dataclass(frozen=True)
class Conversion:
    """What the user said about a file that needs code to be read.

    state_dict_key: where in the file the weights lie. ignore_weights: patterns of names that are left out.
    """

    architecture: str | None = None
    trust_pickle: bool = False
    inputs: tuple[TensorSpec, ...] = ()
    state_dict_key: str | None = None
    ignore_weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converted:
    """What the source was, and what the user should know of how it was read."""

    source: SourceFile
    notes: tuple[str, ...]


def needs_conversion(path: Path, found: Format | None, wanted: Conversion) -> bool:
    """Whether the file is converted here before it is sent. Raises UsageError when the options do not fit the file."""
    way_out = found.way_out if found else None
    noun = found.noun if found else "of no known format"
    if (wanted.state_dict_key or wanted.ignore_weights) and not wanted.architecture:
        raise UsageError("--state-dict-key and --ignore-weights say how weights are read; give --architecture, too.")
    if way_out and wanted.architecture:
        return True
    if way_out is TRUST_PICKLE and wanted.trust_pickle:
        return True
    if wanted.architecture:
        weights = " or ".join(row.noun for row in FORMATS if row.way_out)
        raise UsageError(f"{path} is {noun}; --architecture is for weights alone ({weights}).")
    return False


async def convert(path: Path, target: Path, wanted: Conversion) -> Converted:
    """Writes `target` (ONNX) and says what the source was, and how it was read.

    Raises MissingExtraError without the engine, and UnusableInputError when the conversion does not succeed.
    """
    arguments = [str(path), "--output", str(target), "--json"]
    for spec in wanted.inputs:
        arguments += ["--input", format_input(spec)]
    if wanted.architecture:
        arguments += ["--architecture", wanted.architecture]
    if wanted.state_dict_key:
        arguments += ["--state-dict-key", wanted.state_dict_key]
    for pattern in wanted.ignore_weights:
        arguments += ["--ignore-weights", pattern]
    if wanted.trust_pickle:
        arguments.append("--trust-pickle")
    document = await run_engine(
        ENGINE_MODULE, arguments, doing=f"Converting {path}", packages=ENGINE_PACKAGES, broke="CONVERSION_BROKE"
    )
    return Converted(_source_file(path, document), tuple(map(str, document.get("warnings") or ())))


def _source_file(path: Path, document: dict[str, Any]) -> SourceFile:
    try:
        digest = Digest(sha256=bytes.fromhex(document["sha256"]), size_bytes=document["size_bytes"])
        return SourceFile(format=ModelFormat.Value(f"MODEL_FORMAT_{document['format'].upper()}"), digest=digest)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ServerError(f"Converting {path} gave an answer that this client does not understand.") from error
