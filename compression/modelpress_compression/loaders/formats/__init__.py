"""The table of formats: what each is called, how its content is told, what loads it, and what people do with it.

A format that is added is one row here, a sniffer above it, and a loader; `protos/generate.py` writes the rest.

This package imports the standard library and `errors` alone. The client and the server's own process use the copy of it
in `modelpress_protos.formats`: they import neither the engine nor numpy.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from modelpress_compression.errors import UnsupportedFormatError
from modelpress_compression.loaders.formats.content import Content
from modelpress_compression.loaders.formats.pickle_scan import TENSOR_GLOBALS
from modelpress_compression.loaders.formats.refusals import STRANGERS, refused

_MAX_SAFETENSORS_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the format's own reader
# (field number, wire type) of onnx.ModelProto: 0 is a varint, 2 a field with a length.
_MODEL_PROTO_FIELDS = frozenset([(1, 0), (5, 0), *((field, 2) for field in (2, 3, 4, 6, 7, 8, 14, 20, 25, 26))])
# A SavedModel begins like an ONNX model: a version, then field 2, which is the whole graph there and a short name here.
_META_GRAPHS, _HEAD_WITHOUT_GRAPH_BYTES = (2, 2), 1024


@dataclass(frozen=True)
class WayOut:
    """What makes a model of a file that is none by itself, where the user's code lives.

    `option`: of `compress-client`. `hint`: for people, the rest of a sentence that says what the file is.
    """

    option: str
    hint: str


_OR_EXPORT = "Or export the model with torch.onnx.export, torch.export.save or torch.jit.save."
_CODE = "--architecture package.module:factory --input NAME:DTYPE[DIM,...] (in Python: architecture=, inputs=)"
ARCHITECTURE = WayOut(
    "--architecture",
    f"weights without the network they belong to. Name the code that builds it with {_CODE}, or, for a folder that "
    "save_pretrained of transformers wrote, --architecture transformers:auto; the weights are then converted on your "
    f"own machine, which needs torch and that code. {_OR_EXPORT}",
)
TRUST_PICKLE = WayOut(
    "--trust-pickle",
    "reading all of it runs the code in it, so no server does. A checkpoint's weights are read, without running any of "
    f"its code, with {_CODE}. A whole module is read with --trust-pickle --input NAME:DTYPE[DIM,...] (in Python: "
    "trust_pickle=True), if you trust the file. Either is done on your own machine, which needs torch and the "
    f"network's code. {_OR_EXPORT}",
)


@dataclass(frozen=True)
class Format:
    """One serialized form of a model.

    `number`: of MODEL_FORMAT_<NAME> in the API; never changed, never given to another format.
    `name`: in reports. `noun`: what messages call such a file. `summary`: one sentence for people.
    `sniff`: whether a file's content is of this format, given that it is of none above it in the table.
    `loader`: `module:function` within `loaders`, called with the model's files and the user's inputs.
    `carries_code`: loading it evaluates what the file says, so a server does it in a confined worker only.
    `way_out`: instead of a loader, where the file alone is no model: every server refuses it, and the client converts.
    """

    number: int
    name: str
    noun: str
    summary: str
    sniff: Callable[[Content], bool]
    loader: str | None = None
    carries_code: bool = False
    way_out: WayOut | None = None

    @property
    def proto_name(self) -> str:
        """Its name in the API."""
        return f"MODEL_FORMAT_{self.name.upper()}"

    def refusal(self, subject: str) -> str:
        """What `subject` ("The file", a path) is, why it is refused, and the way out."""
        return f"{subject} is {self.noun}: {self.way_out.hint if self.way_out else self.summary}"


def _is_torch_export(content: Content) -> bool:
    names = content.names  # before torch 2.8 the program lay at the archive's root, by the long name
    return "serialized_exported_program.json" in names or any(
        name.startswith(("models/", "data/aotinductor/")) for name in names
    )


def _is_torchscript(content: Content) -> bool:
    return {"constants.pkl", "data.pkl"} <= content.names


def _is_state_dict(content: Content) -> bool:
    return content.of_torch and content.imports is not None and content.imports <= TENSOR_GLOBALS


def _is_pickled_module(content: Content) -> bool:
    return content.of_torch and content.imports is not None


def _is_safetensors(content: Content) -> bool:
    head, size_bytes = content.head, content.size_bytes
    if len(head) < 10 or head[8:9] != b"{":
        return False
    header_bytes = int.from_bytes(head[:8], "little")
    if header_bytes > min(size_bytes - 8, _MAX_SAFETENSORS_HEADER_BYTES):
        raise UnsupportedFormatError(
            f"The file looks like safetensors, but its header claims {header_bytes} bytes "
            f"of {size_bytes}; it is damaged."
        )
    with content.path.open("rb") as file:
        file.seek(8)
        try:
            header = json.load(io.BytesIO(file.read(header_bytes)))
        except (ValueError, RecursionError) as error:
            raise UnsupportedFormatError("The file looks like safetensors, but its header is not JSON.") from error
    return isinstance(header, dict)


def _is_onnx(content: Content) -> bool:
    """Whether the first fields could be a ModelProto's: all its fields are varints (1, 5) or have a length (2-26)."""
    head, position = content.head, 0
    for _ in range(3):
        if position >= len(head):
            break
        key, position = _varint(head, position)
        field, wire = key >> 3, key & 7
        if (field, wire) not in _MODEL_PROTO_FIELDS:
            return False
        value, position = _varint(head, position)
        if position < 0:
            return False
        if (field, wire) == _META_GRAPHS and value > _HEAD_WITHOUT_GRAPH_BYTES and head[:1] == b"\x08":
            raise refused("SAVED_MODEL")
        position += value if wire == 2 else 0
    return True


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number and the position after it; position -1 where it is cut off or too long."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            return 0, -1
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return 0, -1


# The first row whose sniffer says yes decides: what is told most surely stands first.
FORMATS = (
    Format(
        number=2,
        name="torch_export",
        noun="an exported program (torch.export.save)",
        summary="An exported program (`torch.export.save`, `.pt2`).",
        sniff=_is_torch_export,
        loader="torch_export:load_torch_export",
        carries_code=True,  # torch evaluates its symbolic expressions
    ),
    Format(
        number=3,
        name="torchscript",
        noun="a TorchScript archive (torch.jit.save)",
        summary="TorchScript (`torch.jit.save`), traced or scripted; it records no inputs: name them with `--input`.",
        sniff=_is_torchscript,
        loader="torchscript:load_torchscript",
        carries_code=True,  # it is a program
    ),
    Format(
        number=5,
        name="safetensors",
        noun="a safetensors file",
        summary="safetensors: weights alone.",
        sniff=_is_safetensors,
        way_out=ARCHITECTURE,
    ),
    Format(
        number=4,
        name="state_dict",
        noun="a PyTorch state dict",
        summary="A PyTorch state dict or checkpoint (`torch.save`): weights alone.",
        sniff=_is_state_dict,
        way_out=ARCHITECTURE,
    ),
    Format(
        number=6,
        name="pickled_module",
        noun="a PyTorch file with more than tensors in it",
        summary="A whole pickled module, or a checkpoint with other objects beside its tensors (`torch.save`).",
        sniff=_is_pickled_module,
        carries_code=True,
        way_out=TRUST_PICKLE,
    ),
    Format(
        number=1,
        name="onnx",
        noun="an ONNX model",
        summary="ONNX, with or without external data.",
        sniff=_is_onnx,
        loader="onnx_file:load_onnx",
    ),
)


def detect(path: str | os.PathLike[str]) -> Format:
    """The row of a file's format, by its content alone: names lie, `.pt` is four different formats.

    Raises UnsupportedFormatError, RejectedModelError for a deceitful archive, and OSError.
    """
    content = Content(Path(path))
    if not content.head:
        raise refused("EMPTY")
    for stranger in STRANGERS:
        if content.head[stranger.offset :].startswith(stranger.magic) and not content.is_zip:
            raise refused(stranger.code)
    for row in FORMATS:
        if row.sniff(content):
            return row
    if content.imports is not None:
        raise refused("OTHER_PICKLE", listed=_listed(content.imports))
    if any(name.startswith(("data/weights/", "data/constants/")) for name in content.names):
        raise refused("CUT_PROGRAM")
    if any(name.rsplit("/", 1)[-1] in ("config.json", "model.weights.h5") for name in content.names):
        raise refused("KERAS")
    rows = sorted(FORMATS, key=lambda row: row.number)
    read = _either(row.noun for row in rows if row.loader)
    converted = _either(row.noun for row in rows if row.way_out)
    raise refused("OTHER_ZIP" if content.is_zip else "UNKNOWN", read=read, converted=converted)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name.replace(" ", ".")[:80] for name in sorted(names)[:3]) or "nothing but plain values"


def _either(nouns: Iterable[str]) -> str:
    *others, last = nouns
    return f"{', '.join(others)} or {last}" if others else last
