"""Checks of zip archives, before torch sees them.

torch's own reader trusts the central directory; what it would do with two members of one name, with members that lie
over each other, or with 66 KB that unpack to 64 MiB, must not be found out on a stranger's file.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError

MAX_MEMBERS = 100_000
# TorchScript deflates its code and debug information, and nothing else.
MAX_DEFLATED_BYTES = 256 * 1024 * 1024  # 256 MiB, all deflated members together, unpacked
MAX_RATIO = 200  # unpacked over packed, of one deflated member
_RATIO_FLOOR_BYTES = 1024 * 1024  # small members may be as repetitive as they like
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CODE_SUFFIXES = (".py", ".debug_pkl", ".pkl", ".json")


def check_zip(source: Path | IO[bytes], what: str = "The archive") -> list[zipfile.ZipInfo]:
    """Members of a sound archive.

    Raises UnsupportedFormatError where it is damaged, RejectedModelError where it is built to deceive.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            _check_end(archive, what)
            _check_names(members, what)
            _check_deflated(members, what)
            _check_extents(archive, members, what)
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, ValueError) as error:
        raise UnsupportedFormatError(
            f"{what} is damaged or cut short ({error}); write or upload the file again."
        ) from error
    return members


def _reject(message: str) -> RejectedModelError:
    return RejectedModelError(
        f"{message} Write the file with torch.save, torch.jit.save or torch.export.save.", finding="ARCHIVE"
    )


def _check_names(members: list[zipfile.ZipInfo], what: str) -> None:
    if len(members) > MAX_MEMBERS:
        raise _reject(f"{what} has {len(members)} members; at most {MAX_MEMBERS} are read.")
    seen: set[str] = set()
    for info in members:
        name = info.filename
        # orig_filename: what stands in the file; ZipInfo cuts names at a NUL, other readers do not.
        if name.lower() in seen:  # torch's reader does not tell upper from lower case
            raise _reject(f"{what} has two members named {name[:80]!r}.")
        if info.orig_filename != name or name.startswith("/") or "\\" in name or ":" in name.split("/")[0]:
            raise _reject(f"{what} has a member with the name {info.orig_filename[:80]!r}.")
        if ".." in name.split("/"):
            raise _reject(f"{what} has a member that points outside of it: {name[:80]!r}.")
        if info.flag_bits & 0x1:
            raise _reject(f"{what} is encrypted.")
        seen.add(name.lower())


def _check_deflated(members: list[zipfile.ZipInfo], what: str) -> None:
    total = 0
    for info in members:
        if info.compress_type == zipfile.ZIP_STORED:
            if info.compress_size != info.file_size:
                raise _reject(f"{what}: the sizes of {info.filename[:80]!r} do not agree.")
            continue
        if info.compress_type != zipfile.ZIP_DEFLATED:
            raise _reject(f"{what}: {info.filename[:80]!r} is packed in a way that torch does not use.")
        if not info.filename.endswith(_CODE_SUFFIXES) and info.file_size > _RATIO_FLOOR_BYTES:
            raise _reject(f"{what}: the weights in {info.filename[:80]!r} are deflated; torch stores them as they are.")
        total += info.file_size
        if info.file_size > _RATIO_FLOOR_BYTES and info.file_size > MAX_RATIO * max(1, info.compress_size):
            raise _reject(
                f"{what}: {info.filename[:80]!r} unpacks to {info.file_size} bytes from {info.compress_size}."
            )
    if total > MAX_DEFLATED_BYTES:
        raise _reject(f"{what}: its deflated members unpack to {total} bytes; at most {MAX_DEFLATED_BYTES} are read.")


def _check_end(archive: zipfile.ZipFile, what: str) -> None:
    """The directory's end must be the file's end, and lie where it says: readers differ in where they look for it."""
    file = archive.fp
    if file is None:
        raise ValueError("closed")
    end = file.seek(-_END.size, 2)
    record = _END.unpack(file.read(_END.size))
    directory = record[6]
    file.seek(max(0, end - _LOCATOR64.size))
    locator = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
    if locator[0] == b"PK\x06\x07":
        # zipfile takes the record right before the locator, torch the one that the locator points at.
        record64_at = end - _LOCATOR64.size - _END64.size
        file.seek(max(0, record64_at))
        record64 = _END64.unpack(file.read(_END64.size))
        directory = record64[9] if locator[2] == record64_at and record64[0] == b"PK\x06\x06" else -1
    if record[0] != b"PK\x05\x06" or record[7] != 0 or directory != archive.start_dir:
        raise _reject(f"{what} has something before its first or after its last part.")


def _check_extents(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], what: str) -> None:
    """Members must lie one after the other, each with a header that says what the directory says."""
    file = archive.fp
    if file is None:
        raise ValueError("closed")
    end = 0
    for info in sorted(members, key=lambda item: item.header_offset):
        if info.header_offset < end:
            raise _reject(f"{what}: the member {info.filename[:80]!r} lies over another one.")
        file.seek(info.header_offset)
        header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        name = file.read(header[9])
        if header[0] != b"PK\x03\x04" or name.decode("utf-8", "replace") != info.orig_filename:
            raise _reject(f"{what}: the member {info.filename[:80]!r} has another name in its own header.")
        end = info.header_offset + _LOCAL_HEADER.size + header[9] + header[10] + info.compress_size
    if end > archive.start_dir:
        raise _reject(f"{what}: its members run into its directory.")


def inner_name(name: str) -> str:
    """A member's name without the folder that every torch archive keeps its members in."""
    return name.split("/", 1)[-1]


def inner_members(members: Iterable[zipfile.ZipInfo], what: str) -> dict[str, zipfile.ZipInfo]:
    """Members by their inner names in lower case, for torch does not tell the cases apart.

    Raises RejectedModelError where two folders hold one name: torch reads the first folder, whatever it is called.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for info in members:
        name = inner_name(info.filename).lower()
        if name in found:
            raise _reject(f"{what} has two members named {name[:80]!r}, in different folders.")
        found[name] = info
    return found


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit_bytes: int) -> bytes:
    """A member's bytes, at most `limit_bytes`. Raises RejectedModelError, UnsupportedFormatError."""
    if info.file_size > limit_bytes:
        raise _reject(f"The member {info.filename[:80]!r} has {info.file_size} bytes; at most {limit_bytes} are read.")
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UnsupportedFormatError(f"The member {info.filename[:80]!r} is damaged; upload the file again.") from error
