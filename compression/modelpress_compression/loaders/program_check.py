"""What a torch.export archive (.pt2) may contain, checked before torch reads it.

torch.export.load was not made for strangers' files. It executes
- pickles: sample inputs, some weights and constants are read with `weights_only=False` when `True` fails;
- native code: libraries in `data/aotinductor`;
- Python: symbolic sizes are `sympify`ed (which is `eval`), guards are `exec`uted, names of inputs and nodes become the
  source of a generated function, and pytree contexts import modules;
- any function of `torch` that a node names as its target.

So everything that is executed is held against a list of what exporters write.
"""

from __future__ import annotations

import json
from typing import Any

from modelpress_compression.archive import Archive, Member
from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders.formats.pickle_scan import (
    MAX_PICKLE_BYTES,
    TENSOR_GLOBALS,
    foreign_global,
    scan_pickle,
)
from modelpress_compression.loaders.formats.torch_archive import inner_members
from modelpress_compression.loaders.program_graph import check_program

MAX_PROGRAM_BYTES = 512 * 1024 * 1024  # 512 MiB of JSON

_WEIGHTS, _CONSTANTS, _SAMPLES = "data/weights/", "data/constants/", "data/sample_inputs/"
_CONFIGS = ("_weights_config.json", "_constants_config.json")
# Before torch 2.8 the members lay at the archive's root.
_OLD_PICKLES = ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt")


def check_archive(archive: Archive) -> list[str]:
    """Members that torch will unpickle, each an archive itself and checked like the outer one.

    Raises RejectedModelError for whatever would execute more than the model, UnsupportedFormatError for damage.
    """
    inner = inner_members(archive)
    pickled: set[str] = set()
    for name, member in inner.items():
        if name.startswith("data/aotinductor/"):
            raise RejectedModelError(
                "The archive holds native code (AOTInductor), which is not executed here; save the program with "
                "torch.export.save.",
                finding="NATIVE_CODE",
            )
        if name.startswith("models/") or name == "serialized_exported_program.json":
            check_program(_json(archive, member))
        elif name.startswith((_WEIGHTS, _CONSTANTS)) and name.endswith(_CONFIGS):
            pickled |= _pickled(_json(archive, member), name.rsplit("/", 1)[0])
        elif name.startswith(_SAMPLES) or name in _OLD_PICKLES or _is_legacy(name):
            pickled.add(name)
    found = [inner[name] for name in sorted(pickled & inner.keys()) if inner[name].size_bytes]
    for member in found:
        check_torch_save(archive, member)
    return [member.name for member in found]


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
            raise RejectedModelError(
                f"The archive stores something other than tensors ({path[:80]!r}); only tensors are read.",
                finding="CUSTOM_OBJECT",
            )
        if entry.get("use_pickle", True):
            found.add(f"{folder}/{path}")
    return found


def check_torch_save(archive: Archive, member: Member) -> None:
    """Refuses what torch.save wrote into a member, unless it holds tensors alone. Raises RejectedModelError."""
    what = f"The archive's {member.name[:80]}"
    if not next(archive.pieces(member)).startswith(b"PK\x03\x04"):
        raise RejectedModelError(f"{what} is in torch's old format; save it again.", finding="OLD_PICKLE")
    saved = archive.nested(member, what)
    inner = inner_members(saved)
    names = {name.rsplit("/", 1)[-1] for name in inner}
    if "constants.pkl" in names or "data.pkl" not in names:
        raise RejectedModelError(f"{what} is not what torch.export writes.", finding="PICKLE_GLOBAL")
    for name, pickled in inner.items():
        if name.endswith(".pkl"):
            check_tensors_only(saved.read(pickled, MAX_PICKLE_BYTES), what)


def check_tensors_only(data: bytes, what: str) -> None:
    """Refuses a pickle that needs anything but tensors. Raises RejectedModelError with finding=PICKLE_GLOBAL."""
    if outside := scan_pickle(data, what).outside(TENSOR_GLOBALS):
        raise foreign_global(what, outside)
