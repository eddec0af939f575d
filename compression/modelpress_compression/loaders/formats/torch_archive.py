"""What archives of torch are like: one folder, weights stored as they are, names that torch tells apart."""

from __future__ import annotations

from modelpress_compression.archive import Archive, Member

# TorchScript deflates its code and debug information, and nothing else.
MAX_DEFLATED_BYTES = 256 * 1024 * 1024  # 256 MiB, all deflated members together, unpacked
MAX_RATIO = 200  # unpacked over packed, of one deflated member
_RATIO_FLOOR_BYTES = 1024 * 1024  # small members may be as repetitive as they like
_CODE_SUFFIXES = (".py", ".debug_pkl", ".pkl", ".json")
# Before torch 2.8 an exported program had its members at the archive's root.
_OLD_PROGRAM, _OLD_EXTRAS = "serialized_exported_program.json", "extra_files"


def inner_members(archive: Archive) -> dict[str, Member]:
    """Members by their names within the archive's folder, in lower case, for torch does not tell the cases apart.

    Raises RejectedModelError for names or members that torch would not write.
    """
    _check_names(archive)
    members = [member for member in archive.members if not member.is_folder]
    _check_deflated(archive, members)
    found: dict[str, Member] = {}
    for member in members:
        name = inner_name(member.name).lower()
        if name in found:
            archive.refuse(f"has two members named {name[:80]!r}.")
        found[name] = member
    return found


def inner_name(name: str) -> str:
    """A member's name without the folder that every torch archive keeps its members in."""
    return name.split("/", 1)[-1]


def _check_names(archive: Archive) -> None:
    for member in archive.members:
        parts = member.name.removesuffix("/").split("/")
        if "\\" in member.name or ":" in parts[0] or {"", ".", ".."} & set(parts):
            archive.refuse(f"has a member with the name {member.name[:80]!r}, which points outside of it.")
    folders = {member.name.rpartition("/")[0].split("/")[0] for member in archive.members}
    if any(member.name == _OLD_PROGRAM for member in archive.members):
        folders.discard(_OLD_EXTRAS)
    if len(folders) > 1:
        # torch reads the folder of the first member, whatever it is called, a folder's own entry included.
        archive.refuse("has members in different folders.")


def _check_deflated(archive: Archive, members: list[Member]) -> None:
    deflated = [member for member in members if member.deflated]
    for member in deflated:
        name, large = member.name[:80], member.size_bytes > _RATIO_FLOOR_BYTES
        if large and not member.name.endswith(_CODE_SUFFIXES):
            archive.refuse(f"has the weights in {name!r} deflated; torch stores them as they are.")
        if large and member.size_bytes > MAX_RATIO * member.packed_bytes:
            archive.refuse(f"has {name!r}, which unpacks to {member.size_bytes} bytes from {member.packed_bytes}.")
    total = sum(member.size_bytes for member in deflated)
    if total > MAX_DEFLATED_BYTES:
        archive.refuse(f"has deflated members that unpack to {total} bytes; at most {MAX_DEFLATED_BYTES} are read.")
