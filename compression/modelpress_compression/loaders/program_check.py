"""What a torch.export archive (.pt2) may contain, checked before torch reads it.

torch.export.load was not made for strangers' files. It executes
- pickles: sample inputs, some weights and constants are read with `weights_only=False` when `True` fails;
- native code: libraries in `data/aotinductor`;
- Python: symbolic sizes are `sympify`ed (which is `eval`), guards are `exec`uted, names of inputs and nodes become the
  source of a generated function, and pytree contexts import modules;
- any function of `torch` that a node names as its target.

So everything that is executed is held against a list of what exporters write, and what is not needed (sample inputs,
guards, pytrees) is not given to torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modelpress_compression.archive import Archive, Member
from modelpress_compression.errors import UnsupportedFormatError
from modelpress_compression.loaders.formats.pickle_scan import (
    MAX_PICKLE_BYTES,
    TENSOR_GLOBALS,
    foreign_global,
    scan_pickle,
)
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.formats.torch_archive import inner_members
from modelpress_compression.loaders.program_graph import check_program
from modelpress_compression.loaders.program_trees import output_labels, plain_program

MAX_PROGRAM_BYTES = 512 * 1024 * 1024  # 512 MiB of JSON

_WEIGHTS, _CONSTANTS, _SAMPLES = "data/weights/", "data/constants/", "data/sample_inputs/"
_CONFIGS = ("_weights_config.json", "_constants_config.json")
# Before torch 2.8 the members lay at the archive's root.
_OLD_PICKLES = ("serialized_state_dict.pt", "serialized_constants.pt")
_OLD_SAMPLES = "serialized_example_inputs.pt"
# Of the standard library, what pickles of plain objects name.
_PLAIN_OBJECTS = frozenset(
    {"copyreg _reconstructor", "builtins object", "collections defaultdict", "collections deque"}
    | {f"builtins {name}" for name in ("set", "frozenset", "slice", "complex", "bytearray", "list", "dict", "tuple")}
)


@dataclass(frozen=True)
class CheckedProgram:
    """What torch may be given of an archive.

    `pickled`: names of members that torch will unpickle, each an archive itself and checked like the outer one.
    `replaced`: by their names, members that torch gets in our words: the program, and no sample inputs.
    `outputs`: what the program calls its outputs; None for one without a name.
    """

    pickled: tuple[str, ...]
    replaced: Mapping[str, bytes]
    outputs: tuple[str | None, ...] = ()


def check_archive(archive: Archive) -> CheckedProgram:
    """Raises RejectedModelError for whatever would execute more than the model, UnsupportedFormatError for damage."""
    inner = inner_members(archive)
    pickled: set[str] = set()
    replaced: dict[str, bytes] = {}
    outputs: tuple[str | None, ...] = ()
    for name, member in inner.items():
        if name.startswith("data/aotinductor/"):
            raise refused("NATIVE_CODE")
        if name.startswith("models/") or name == "serialized_exported_program.json":
            program = _json(archive, member)
            check_program(program)
            replaced[member.name] = json.dumps(plain_program(program)).encode()
            outputs = output_labels(program)
        elif name.startswith((_WEIGHTS, _CONSTANTS)) and name.endswith(_CONFIGS):
            pickled |= _pickled(_json(archive, member), name.rsplit("/", 1)[0])
        elif name.startswith(_SAMPLES) or name == _OLD_SAMPLES:
            check_samples(archive, member)
            replaced[member.name] = b""
        elif name in _OLD_PICKLES or _is_legacy(name):
            pickled.add(name)
    found = [inner[name] for name in sorted(pickled & inner.keys()) if inner[name].size_bytes]
    for member in found:
        check_torch_save(archive, member)
    return CheckedProgram(tuple(member.name for member in found), replaced, outputs)


def _is_legacy(name: str) -> bool:
    """All weights or constants in one pickle, as earlier versions wrote them."""
    return name.startswith((_WEIGHTS, _CONSTANTS)) and name.endswith(".pt")


def _json(archive: Archive, member: Member) -> Any:
    try:
        return json.loads(archive.read(member, MAX_PROGRAM_BYTES))
    except (ValueError, RecursionError) as error:
        raise UnsupportedFormatError(f"The archive's {member.name[:80]} is no readable JSON; save it again.") from error


def _pickled(config: Any, folder: str) -> set[str]:
    """Members that torch will unpickle, from the table that says how each tensor is stored."""
    entries = config.get("config") if isinstance(config, dict) else None
    found: set[str] = set()
    for entry in (entries or {}).values():
        path = str(entry.get("path_name", "")).lower() if isinstance(entry, dict) else ""
        if not path.startswith(("weight_", "tensor_")) or "/" in path or ".." in path:
            raise refused("CUSTOM_OBJECT", path=path[:80])
        if entry.get("use_pickle", True):
            found.add(f"{folder}/{path}")
    return found


def check_samples(archive: Archive, member: Member) -> None:
    """Refuses sample inputs that would call Python's standard library.

    torch never gets them, so that a library's classes do no harm, and needs none: it knows the inputs from the graph.
    Raises RejectedModelError.
    """
    if member.size_bytes:
        for data, what in _pickles(archive, member):
            allowed = TENSOR_GLOBALS | _PLAIN_OBJECTS
            outside = scan_pickle(data, what).outside(allowed)
            if calls := [name for name in outside if name.split(".")[0].split(" ")[0] in sys.stdlib_module_names]:
                raise foreign_global(what, calls)


def check_torch_save(archive: Archive, member: Member) -> None:
    """Refuses what torch.save wrote into a member, unless it holds tensors alone. Raises RejectedModelError."""
    for data, what in _pickles(archive, member):
        check_tensors_only(data, what)


def _pickles(archive: Archive, member: Member) -> Iterator[tuple[bytes, str]]:
    """The pickles within a member that torch.save wrote, and what to call them. Raises RejectedModelError."""
    what = f"The archive's {member.name[:80]}"
    if not next(archive.pieces(member)).startswith(b"PK\x03\x04"):
        raise refused("OLD_PICKLE", subject=what)
    saved = archive.nested(member, what)
    inner = inner_members(saved)
    names = {name.rsplit("/", 1)[-1] for name in inner}
    if "constants.pkl" in names or "data.pkl" not in names:
        raise refused("CUSTOM_OBJECT", path=what)
    for name, pickled in inner.items():
        if name.endswith(".pkl"):
            yield saved.read(pickled, MAX_PICKLE_BYTES), what


def check_tensors_only(data: bytes, what: str) -> None:
    """Refuses a pickle that needs anything but tensors. Raises RejectedModelError with finding=PICKLE_GLOBAL."""
    if outside := scan_pickle(data, what).outside(TENSOR_GLOBALS):
        raise foreign_global(what, outside)
