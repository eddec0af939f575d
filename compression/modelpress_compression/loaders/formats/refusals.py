"""Why an upload is refused: what it is, what is lacking here, and what works. The one place where this is worded.

A refusal is named by its code, which is also what machines read (`metadata["finding"]`): the loaders say which one and
fill in the braces, docs/formats.md prints the table. What is *damaged* is worded where the bytes are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from modelpress_compression.errors import (
    CompressionError,
    RejectedModelError,
    UnsupportedFormatError,
    UnsupportedOperatorError,
)

EXPORT_ONNX = 'Export it where its source is: torch.onnx.export(model, inputs, "model.onnx", dynamo=True).'


@dataclass(frozen=True)
class Refusal:
    """Three sentences for people, about one kind of file. `lacks` may be empty where the first sentence says it all."""

    code: str
    what: str
    lacks: str
    works: str
    error: type[CompressionError] = field(default=RejectedModelError, kw_only=True)


@dataclass(frozen=True)
class Stranger(Refusal):
    """A file that is no model of ours, told by `magic` at an offset."""

    offset: int = 0
    magic: bytes = b""
    error: type[CompressionError] = field(default=UnsupportedFormatError, kw_only=True)


_NO_READER = "There is no reader for it here."
_PACKED = "Models are read from the file itself, not from an archive."
_UNPACK = "Unpack it, and give the file in it."
_FETCH = "Download the file itself, and look at its size before you upload it."

STRANGERS = (
    Stranger(
        "HDF5", "The file is HDF5, which Keras wrote its models in.", _NO_READER,
        'Export it with Keras 3, model.export("model.onnx", format="onnx"), or with '
        "python -m tf2onnx.convert --keras model.h5 --output model.onnx.", 0, b"\x89HDF\r\n\x1a\n",
    ),
    Stranger(
        "TENSORFLOW_LITE", "The file is a TensorFlow Lite model.", _NO_READER,
        "Convert it with python -m tf2onnx.convert --tflite model.tflite --output model.onnx.", 4, b"TFL3",
    ),
    Stranger(
        "ONNXRUNTIME_FORMAT", "The file is in onnxruntime's own format (.ort), which is made for one runtime.",
        "It is not read here.", "Give the ONNX model that it was made of.", 4, b"ORTM",
    ),
    Stranger(
        "EXECUTORCH", "The file is an ExecuTorch program (.pte), lowered for a device.", _NO_READER,
        "Give the exported program that it was made of, saved with torch.export.save.", 4, b"ET12",
    ),
    Stranger(
        "TENSORRT", "The file is a TensorRT engine, compiled for one kind of GPU.", "It cannot be taken apart.",
        "Give the ONNX model that it was built from.", 0, b"ftrt",
    ),
    Stranger(
        "GGUF", "The file is GGUF, weights of llama.cpp that are mostly quantized already.",
        "There is no reader for it here.", "Give the folder of the original model with --architecture "
        "transformers:auto.", 0, b"GGUF",
    ),
    Stranger(
        "CATBOOST", "The file is a CatBoost model.", _NO_READER,
        'Save it with model.save_model("model.onnx", format="onnx").', 0, b"CBM1",
    ),
    Stranger(
        "LIGHTGBM", "The file is a LightGBM model.", _NO_READER,
        "Convert it with onnxmltools.convert_lightgbm, and save what that returns.", 0, b"tree\nversion=",
    ),
    Stranger(
        "XGBOOST", "The file is an XGBoost model.", _NO_READER,
        "Convert it with onnxmltools.convert_xgboost, and save what that returns.", 0, b'{"learner"',
    ),
    Stranger(
        "NUMPY", "The file is a NumPy array, not a model.", "", "Give data as --data or --eval, in an .npz.", 0,
        b"\x93NUMPY",
    ),
    Stranger("GZIP", "The file is gzip-compressed.", _PACKED, _UNPACK, 0, b"\x1f\x8b"),
    Stranger("SEVEN_ZIP", "The file is a 7-Zip archive.", _PACKED, _UNPACK, 0, b"7z\xbc\xaf\x27\x1c"),
    Stranger("BZIP2", "The file is bzip2-compressed.", _PACKED, _UNPACK, 0, b"BZh"),
    Stranger("XZ", "The file is xz-compressed.", _PACKED, _UNPACK, 0, b"\xfd7zXZ\x00"),
    Stranger("ZSTD", "The file is zstd-compressed.", _PACKED, _UNPACK, 0, b"\x28\xb5\x2f\xfd"),
    Stranger("TAR", "The file is a tar archive.", _PACKED, _UNPACK, 257, b"ustar"),
    Stranger("WEB_PAGE", "The file is a web page: the download went wrong.", "", _FETCH, 0, b"<!DOCTYPE"),
    Stranger("WEB_PAGE", "The file is a web page: the download went wrong.", "", _FETCH, 0, b"<html"),
    Stranger(
        "XML", "The file is XML; OpenVINO keeps its graphs so.", _NO_READER,
        "Give the ONNX model that it was converted from.", 0, b"<?xml",
    ),
    Stranger(
        "GIT_LFS", "The file is a Git LFS pointer, a line of text in the place of the model.", "",
        "Fetch the model with git lfs pull.", 0, b"version https://git-lfs",
    ),
)  # fmt: skip

_REFUSALS = (
    Refusal("EMPTY", "The file is empty.", "", "Write or upload it again.", error=UnsupportedFormatError),
    Refusal(
        "UNKNOWN", "The file is in no known format.", "It may be damaged, or of a program that is not known here.",
        "Give {read}; or, to be converted on your own machine, {converted}.", error=UnsupportedFormatError,
    ),
    Refusal(
        "OTHER_ZIP", "The file is a zip archive, but not one of torch's.", _PACKED,
        "Give {read}; or, to be converted on your own machine, {converted}.", error=UnsupportedFormatError,
    ),
    Refusal(
        "KERAS", "The file is a Keras archive.", _NO_READER,
        'Export it where it was made: model.export("model.onnx", format="onnx").', error=UnsupportedFormatError,
    ),
    Refusal(
        "CUT_PROGRAM", "The file is a torch.export archive with weights, but no program.",
        "torch.export.save leaves such a file where it fails.",
        "Save it again; what torch then raises says what it could not save.", error=UnsupportedFormatError,
    ),
    Refusal(
        "SAVED_MODEL", "The file is the graph of a TensorFlow SavedModel.", _NO_READER,
        "Convert its folder with python -m tf2onnx.convert --saved-model FOLDER --output model.onnx.",
        error=UnsupportedFormatError,
    ),
    Refusal(
        "ARRAYS", "The file is an .npz of NumPy arrays, not a model.", "", "Give it as --data or --eval.",
        error=UnsupportedFormatError,
    ),
    Refusal(
        "OTHER_PICKLE", "The file is a pickle that torch.save did not write (it names {listed}).",
        "Nothing is unpickled here, for that runs the code in the file.",
        'Convert a model of scikit-learn with skl2onnx.to_onnx(model, X[:1]); save weights of torch with '
        "torch.save(model.state_dict(), PATH).",
    ),
    Refusal(
        "PICKLE_SIZE", "{subject} has more than {most} opcodes.", "That is more than is looked through.",
        "Save tensors as tensors (torch.save, safetensors), not as lists of numbers.",
    ),
    Refusal(
        "PICKLE_EXTENSION", "{subject} uses pickle extension codes, which stand for names that are not in the file.",
        "What they would import cannot be told.", "Save the model again, without copyreg.add_extension.",
    ),
    Refusal(
        "PICKLE_NAMES", "{subject} builds the names of what it imports as it runs.",
        "What they would be cannot be told without running it.", EXPORT_ONNX,
    ),
    Refusal(
        "PICKLE_GLOBAL", "{subject} would import {globals}.", "Only tensors are read from a file; nothing is executed.",
        EXPORT_ONNX,
    ),
    Refusal(
        "CODE_SIZE", "The archive has {bytes} bytes of code.", "At most {most} are read.",
        "Script the model without the parts that are not needed to run it.",
    ),
    Refusal(
        "SCRIPT_OPERATOR", "The model's code calls {operator!r} ({where}), which reaches outside of the model.",
        "Such code is not run here: a model may only compute.", "Take the call out of forward, and save it again.",
    ),
    Refusal(
        "NATIVE_CODE", "The archive holds native code (AOTInductor).", "Native code is not executed here.",
        "Save the program itself with torch.export.save.",
    ),
    Refusal(
        "CUSTOM_OBJECT", "The archive stores something other than tensors ({path!r}).", "Only tensors are read.",
        EXPORT_ONNX,
    ),
    Refusal(
        "OLD_PICKLE", "{subject} is in torch's old format.", "Within an archive, that of torch before 1.6 is not read.",
        "Save it again with this version of torch.",
    ),
    Refusal(
        "PROGRAM", "The torch.export program contains {found}, of which torch might make code.",
        "Such a program is not read here.", EXPORT_ONNX,
    ),
    Refusal(
        "SCRIPT_VERSION", "torch {version} cannot read the TorchScript archive ({reason}).", "",
        "Save it again with torch.jit.save.", error=UnsupportedFormatError,
    ),
    Refusal(
        "SCRIPT_INFERENCE", "The TorchScript module went through torch.jit.optimize_for_inference, whose constants "
        "torch.jit.save does not save.", "torch itself cannot read the file.",
        "Save the module as it was before; what is here optimizes it for onnxruntime.", error=UnsupportedFormatError,
    ),
    Refusal(
        "PROGRAM_VERSION", "torch {version} cannot read the torch.export archive ({reason}).", "",
        "Save it again with this version of torch, or as ONNX.", error=UnsupportedFormatError,
    ),
    Refusal(
        "NO_WEIGHTS", "The file holds no weights of a network, only {listed}.", "",
        "Save them with torch.save(model.state_dict(), PATH).", error=UnsupportedFormatError,
    ),
    Refusal(
        "SEVERAL_WEIGHTS", "{folder!r} is a folder with {count} files of weights ({listed}).", "",
        "Name the one to read.", error=UnsupportedFormatError,
    ),
    Refusal(
        "ADAPTER", "{folder!r} is a folder with an adapter (PEFT, LoRA).", "It is no model without its base.",
        "Merge it with merge_and_unload() and save_pretrained(), and give the folder that this writes.",
        error=UnsupportedFormatError,
    ),
    Refusal(
        "DISTRIBUTED", "{folder!r} is a distributed checkpoint of torch.", _NO_READER,
        "Turn it into one file with 'python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER "
        "weights.pt', and give that.", error=UnsupportedFormatError,
    ),
    Refusal(
        "NO_MODEL_IN_FOLDER", "{folder!r} is a folder without a model or weights in it.", "", "Name the file.",
        error=UnsupportedFormatError,
    ),
    Refusal(
        "SHARD_ALONE", "{shard!r} is one shard of several, and {index!r}, which lists them, is not beside it.", "",
        "Put all files of the model into one folder, and name the folder.", error=UnsupportedFormatError,
    ),
    Refusal(
        "SHARDS_ELSEWHERE", "{index!r} names files outside of its folder.", "Shards are read from beside their index.",
        "Put all files of the model into one folder, and name the folder.", error=UnsupportedFormatError,
    ),
    Refusal(
        "SHARDS_MISSING", "{index!r} lists {count} shards, of which {missing} are missing: {listed}.", "",
        "Fetch them into the same folder.", error=UnsupportedFormatError,
    ),
    Refusal(
        "UNKNOWN_CLASS", "config.json names the class {name!r}.",
        "{custom}transformers {version} does not have it.",
        "Name the code that builds the network with --architecture package.module:factory, or install the release of "
        "transformers that has it.", error=UnsupportedFormatError,
    ),
    Refusal(
        "OTHER_LIBRARY", "config.json describes a network of {library}, {name!r}.",
        "transformers:auto builds those of transformers alone.",
        "Name the code that builds it: --architecture {factory}.", error=UnsupportedFormatError,
    ),
    Refusal(
        "PROTOBUF_SIZE", "The ONNX file has more than 2 GiB.", "protobuf cannot read it.",
        'Save it with external data: onnx.save(model, "model.onnx", save_as_external_data=True).',
        error=UnsupportedFormatError,
    ),
    Refusal(
        "FOREIGN_OPERATOR", "The program uses the operator {op_type!r} of a library that is not part of torch.",
        "That library is not here, and what its operator computes is not known.",
        "Export the model with torch's own operators, or to ONNX where the library is.", error=UnsupportedOperatorError,
    ),
)  # fmt: skip

REFUSALS = {row.code: row for row in (*_REFUSALS, *STRANGERS)}


def refused(code: str, **details: object) -> CompressionError:
    """The error of a kind of refusal; `details` fill in its braces, and are for machines, too.

    The code is its `metadata["finding"]`, the details lie beside it.
    """
    row = REFUSALS[code]
    message = " ".join(part.format(**details) for part in (row.what, row.lacks, row.works) if part)
    return row.error(message, finding=code, **{name: str(value) for name, value in details.items()})
