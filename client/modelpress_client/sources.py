"""From the path that a person names to the files that are sent."""

from __future__ import annotations

import asyncio
import tempfile
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from modelpress_protos.errors import CompressionError
from modelpress_protos.formats import Format, detect
from modelpress_protos.formats.weight_files import weight_files

from modelpress_client.convert import Conversion, Converted, convert, needs_conversion
from modelpress_client.errors import UnusableInputError, UsageError
from modelpress_client.onnx_files import model_files


@dataclass(frozen=True)
class Source:
    """A model on this machine, looked at. `format`: None where it is none that the client knows.

    `path`: a file; of weights that are converted also their folder, or the index of their shards.
    """

    path: Path
    format: Format | None
    convert: bool


def check_source(path: Path, wanted: Conversion) -> Source:
    """Looks at the file; reads little of it, and sends nothing.

    Raises UsageError when it cannot be read or the options do not fit it, and UnusableInputError for a file that no
    server takes.
    """
    path = _model_path(path)
    looked_at = _looked_at(path)
    try:
        found = format_of(looked_at)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    converts = needs_conversion(path, found, wanted)
    if converts and not wanted.inputs:
        raise UsageError(
            f"{path} does not record its inputs. Name each with --input NAME:DTYPE[DIM,...], for example "
            "--input 'x:float32[batch,3,224,224]' (in Python: inputs=[...])."
        )
    if not converts and found is not None and found.way_out is not None:
        raise UnusableInputError(found.refusal(str(looked_at)), details={"path": str(path)})
    return Source(path, found, converts)


def check_data(path: Path) -> None:
    """Looks whether a file of arrays may be one. Raises UnusableInputError."""
    if not zipfile.is_zipfile(path):
        raise UnusableInputError(
            f"{path} is not an .npz file; write it with numpy.savez(FILE, INPUT_NAME=array, ...).",
            reason="INVALID_DATA",
        )


def format_of(path: Path) -> Format | None:
    """The file's format by its content; None: damaged or unknown, which the server says, for it may know more formats.

    Raises OSError.
    """
    try:
        return detect(path)
    except CompressionError:
        return None


@asynccontextmanager
async def prepared(source: Source, wanted: Conversion) -> AsyncIterator[tuple[dict[str, Path], Converted | None]]:
    """The files to send by their path in the manifest, and where they came from when they were converted."""
    path = source.path
    if source.convert:
        with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
            target = Path(folder) / f"{stem_of(path)}.onnx"
            converted = await convert(path, target, wanted)
            yield await asyncio.to_thread(model_files, target), converted
    elif source.format is not None and source.format.name == "onnx":
        yield await asyncio.to_thread(model_files, path), None
    else:
        yield {path.name: path}, None


def _model_path(path: Path) -> Path:
    """The file of a model; a folder stands for the one .onnx file in it, or for the weights in it."""
    if not path.is_dir():
        if not path.exists():
            raise UsageError(f"There is no file {path}.", details={"path": str(path)})
        return path
    candidates = sorted(path.glob("*.onnx"))
    if len(candidates) > 1:
        raise UsageError(f"{path} is a folder with {len(candidates)} .onnx files; name the file.")
    return candidates[0] if candidates else path


def _looked_at(path: Path) -> Path:
    """The file whose content tells the format; of weights in several files the first."""
    try:
        return weight_files(path).files[0]
    except CompressionError as error:
        raise UnusableInputError(error.message, details={"path": str(path)}) from error


def stem_of(path: Path) -> str:
    """What files made of a model are called after: a file's name without its ending, or the folder's name."""
    return path.resolve().name if path.is_dir() else path.stem
