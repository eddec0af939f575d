"""What torch is given: an archive of our own, written from the members that were checked.

torch brings a reader of its own. It must not be asked what it makes of a stranger's archive; of an archive that holds
nothing but stored members, each once, every reader makes the same.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO

from modelpress_compression.archive import Archive
from modelpress_compression.loaders.formats.torch_archive import inner_members

_ALIGNMENT = 64  # as torch writes: what is mapped into memory begins there
_PADDING = 0x4246  # "FB", the extra field that torch pads with
_LOCAL_BYTES, _EXTRA_BYTES, _ZIP64_BYTES = 30, 4, 20
_ZIP64_FROM_BYTES = 1 << 30  # beyond 2 GiB sizes need it


@contextmanager
def checked_copy(
    archive: Archive, nested: Collection[str] = (), replaced: Mapping[str, bytes] = MappingProxyType({})
) -> Iterator[Path]:
    """A file with the members of `archive`, until the block ends; those named in `nested` are archives themselves.

    Members named in `replaced` have that content instead of their own. The copy is written in one pass, a piece at a
    time. Raises RejectedModelError, UnsupportedFormatError, OSError.
    """
    # torch warns of other names than .pt2 for programs, and takes any for the other formats.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive.pt2"
        with path.open("xb") as file:
            write_copy(archive, file, nested, replaced)
        yield path


@contextmanager
def checked_file(path: Path, what: str) -> Iterator[Path]:
    """A copy of the archive that a file is, as `checked_copy`; the file itself where it is no archive."""
    with path.open("rb") as file:
        if not file.read(4).startswith(b"PK"):
            yield path
            return
        archive = Archive(file, what)
        inner_members(archive)
        with checked_copy(archive) as copy:
            yield copy


def write_copy(
    archive: Archive,
    target: IO[bytes],
    nested: Collection[str] = (),
    replaced: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes the members, stored and aligned, in their order; folders' own entries are left out."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
        for member in archive.members:
            if member.is_folder:
                continue
            position = copy.fp.tell() if copy.fp else 0
            ours = replaced.get(member.name)
            size_bytes = member.size_bytes if ours is None else len(ours)
            info = _header(member.name, size_bytes, position)
            with copy.open(info, "w", force_zip64=_is_wide(size_bytes)) as sink:
                if ours is not None:
                    sink.write(ours)
                    continue
                if member.name in nested and member.size_bytes:
                    write_copy(archive.nested(member, f"{archive.what}'s {member.name[:80]}"), sink)
                    continue
                for piece in archive.pieces(member):
                    sink.write(piece)


def _is_wide(size_bytes: int) -> bool:
    return size_bytes >= _ZIP64_FROM_BYTES


def _header(name: str, size_bytes: int, position: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.file_size = size_bytes
    name_bytes = len(name.encode())
    data_at = position + _LOCAL_BYTES + name_bytes + _EXTRA_BYTES + (_ZIP64_BYTES if _is_wide(size_bytes) else 0)
    padding = -data_at % _ALIGNMENT
    info.extra = _PADDING.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
    return info
