"""A zip archive, read in the one way that leaves no room for a second one.

Readers of zip files forgive different things: Python's takes the ZIP64 record before its locator, torch's the one that
the locator points at; torch's counts members, Python's goes by the directory's size; torch's tells folders by a bit of
their attributes. So one file can be two archives, of which one is checked and the other is loaded. This reader forgives
nothing: the file is members, one after the other from the first byte on, then their directory, then its end, and
whatever is said twice must be said alike. `checked_copy` writes what it reads into an archive of our own.

Layout and names of the fields: APPNOTE.TXT of PKWARE, sections 4.3 and 4.5.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError

MAX_MEMBERS = 100_000
CHUNK_BYTES = 1024 * 1024  # 1 MiB
TORCH_WRITERS = "torch.save, torch.jit.save or torch.export.save"

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_MAX_COMMENT_BYTES = 65_535

_STORED, _DEFLATED = 0, 8
# Data descriptor, UTF-8 names, and how hard the compressor tried; encryption and patches are none of these.
_FLAGS = 0x8 | 0x800 | 0x6
_DESCRIPTOR, _UTF8 = 0x8, 0x800
_DESCRIPTOR_BYTES = (0, 12, 16, 20, 24)  # with or without a signature, in 32 or 64 bits; some tools forget it
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075
_FOLDER_ATTRIBUTE = 0x10
_MAX_VERSION = 45  # of the format: 4.5 brought ZIP64, and everything later another method or encryption


@dataclass(frozen=True)
class Member:
    """A file in an archive. `size_bytes`: unpacked. `data_at`: where its packed bytes begin in the archive."""

    name: str
    size_bytes: int
    packed_bytes: int
    deflated: bool
    crc32: int
    data_at: int

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder's own entry, which holds nothing."""
        return self.name.endswith("/")


@dataclass(frozen=True)
class _Entry:
    """A member as the directory has it; `header_at`: of its local header."""

    raw_name: bytes
    name: str
    flags: int
    method: int
    crc32: int
    packed_bytes: int
    size_bytes: int
    header_at: int


class Archive:
    """The members of an archive that every reader sees alike.

    `what`: what errors call it. `writers`: functions that write such archives well. `start`, `size_bytes`: where in the
    file it lies, for an archive within another.

    Raises UnsupportedFormatError where it is damaged, RejectedModelError (finding=ARCHIVE) where it may deceive.
    """

    def __init__(
        self,
        file: BinaryIO,
        what: str = "The archive",
        *,
        writers: str = TORCH_WRITERS,
        start: int = 0,
        size_bytes: int | None = None,
    ) -> None:
        self.what = what
        self._file, self._writers, self._start = file, writers, start
        self._size_bytes = file.seek(0, 2) - start if size_bytes is None else size_bytes
        directory_at, directory_bytes, count = self._find_directory()
        entries = self._read_directory(directory_at, directory_bytes, count)
        self.members = tuple(self._check_local(entries, directory_at))
        names = {member.name for member in self.members}
        if len(names) < len(self.members):
            self.refuse("has two members of one name.")

    @classmethod
    @contextmanager
    def open(cls, path: Path, what: str = "The archive", *, writers: str = TORCH_WRITERS) -> Iterator[Archive]:
        """The archive in a file, which stays open meanwhile. Raises as the class, and OSError."""
        with path.open("rb") as file:
            yield cls(file, what, writers=writers)

    def nested(self, member: Member, what: str) -> Archive:
        """The archive that a stored member is. Raises as the class."""
        if member.deflated:
            self.refuse(f"has {member.name[:80]!r} deflated, which is an archive itself.")
        start = self._start + member.data_at
        return Archive(self._file, what, writers=self._writers, start=start, size_bytes=member.size_bytes)

    def pieces(self, member: Member) -> Iterator[bytes]:
        """A member's bytes, a piece at a time; the end is only reached where size and checksum are right.

        Raises UnsupportedFormatError.
        """
        crc32, size_bytes = 0, 0
        for piece in self._inflated(member) if member.deflated else self._stored(member):
            crc32, size_bytes = zlib.crc32(piece, crc32), size_bytes + len(piece)
            if size_bytes > member.size_bytes:
                break
            yield piece
        if size_bytes != member.size_bytes or crc32 != member.crc32:
            self._damaged(f"{member.name[:80]!r} is not what its checksum says")

    def read(self, member: Member, limit_bytes: int) -> bytes:
        """All bytes of a member of at most `limit_bytes`. Raises RejectedModelError, UnsupportedFormatError."""
        if member.size_bytes > limit_bytes:
            self.refuse(f"has {member.size_bytes} bytes in {member.name[:80]!r}; at most {limit_bytes} are read.")
        return b"".join(self.pieces(member))

    def refuse(self, message: str) -> NoReturn:
        """Raises RejectedModelError; `message` goes on from the archive's name."""
        raise RejectedModelError(f"{self.what} {message} Write the file with {self._writers}.", finding="ARCHIVE")

    def _damaged(self, how: str) -> NoReturn:
        raise UnsupportedFormatError(f"{self.what} is damaged or cut short ({how}); write or upload the file again.")

    def _at(self, position: int, length: int) -> bytes:
        """Exactly `length` bytes of the archive."""
        if position < 0 or length < 0 or position + length > self._size_bytes:
            self._damaged("it ends too early")
        self._file.seek(self._start + position)
        data = self._file.read(length)
        if len(data) != length:
            self._damaged("it ends too early")
        return data

    def _find_directory(self) -> tuple[int, int, int]:
        """Where the directory begins, its length in bytes, and its number of members."""
        end_at = self._size_bytes - _END.size
        if end_at < 0:
            self._damaged("it is too short")
        signature, *disks, on_disk, count, size, start, comment_bytes = _END.unpack(self._at(end_at, _END.size))
        if signature != b"PK\x05\x06" or comment_bytes:
            tail = self._at(max(0, end_at - _MAX_COMMENT_BYTES), min(end_at, _MAX_COMMENT_BYTES) + _END.size)
            if b"PK\x05\x06" in tail:
                self.refuse("has something before its first or after its last part.")
            self._damaged("its directory is missing")
        directory_end = end_at
        locator_at = end_at - _LOCATOR64.size
        if locator_at >= 0 and self._at(locator_at, 4) == b"PK\x06\x07":
            directory_end, wide = self._wide_end(locator_at)
            narrow, full = (on_disk, count, size, start), (_FULL16, _FULL16, _FULL32, _FULL32)
            if any(said not in (most, true) for said, most, true in zip(narrow, full, wide, strict=True)):
                self.refuse("says two things of where its directory is.")
            on_disk, count, size, start = wide
        if any(disks) or on_disk != count:
            self.refuse("is one part of several.")
        if start + size != directory_end:
            self.refuse("has something before its first or after its last part.")
        if count > MAX_MEMBERS:
            self.refuse(f"has {count} members; at most {MAX_MEMBERS} are read.")
        return start, size, count

    def _wide_end(self, locator_at: int) -> tuple[int, tuple[int, int, int, int]]:
        """The ZIP64 record: where it begins; members on this disk, members, the directory's size and start."""
        _, disk, record_at, disks = _LOCATOR64.unpack(self._at(locator_at, _LOCATOR64.size))
        expected_at = locator_at - _END64.size
        if record_at != expected_at or expected_at < 0 or disk or disks != 1:
            self.refuse("has something before its first or after its last part.")
        signature, record_bytes, _, _, *parts, on_disk, count, size, start = _END64.unpack(
            self._at(record_at, _END64.size)
        )
        if signature != b"PK\x06\x06" or record_bytes != _END64.size - 12 or any(parts):
            self.refuse("says two things of where its directory is.")
        return record_at, (on_disk, count, size, start)

    def _read_directory(self, start: int, size_bytes: int, count: int) -> list[_Entry]:
        data, position = self._at(start, size_bytes), 0
        entries = []
        for _ in range(count):
            if position + _ENTRY.size > size_bytes:
                self.refuse("counts more members than its directory has.")
            entry, length = self._read_entry(data, position)
            entries.append(entry)
            position += length
        if position != size_bytes:
            self.refuse("counts fewer members than its directory has.")
        return entries

    def _read_entry(self, data: bytes, position: int) -> tuple[_Entry, int]:
        fields = _ENTRY.unpack_from(data, position)
        signature, _, version, flags, method, _, _, crc32, packed, size = fields[:10]
        name_bytes, extra_bytes, comment_bytes, disk, _, attributes, header_at = fields[10:]
        length = _ENTRY.size + name_bytes + extra_bytes + comment_bytes
        if signature != b"PK\x01\x02" or position + length > len(data):
            self._damaged("its directory cannot be read")
        at = position + _ENTRY.size
        raw_name, extra = data[at : at + name_bytes], data[at + name_bytes : at + name_bytes + extra_bytes]
        name = self._name(raw_name, flags)
        if disk or version > _MAX_VERSION or flags & ~_FLAGS:
            self.refuse(f"has {name[:80]!r} encrypted, or packed for other tools.")
        size, packed, header_at = self._wide_sizes(name, self._extra(name, extra), [size, packed, header_at])
        self._check_sizes(name, method, packed, size)
        if (name.endswith("/") or attributes & _FOLDER_ATTRIBUTE) and (size or not name.endswith("/")):
            self.refuse(f"has {name[:80]!r} both as a file and as a folder.")
        return _Entry(raw_name, name, flags, method, crc32, packed, size, header_at), length

    def _name(self, raw: bytes, flags: int) -> str:
        try:
            name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
        except UnicodeDecodeError:
            self.refuse(f"has a member with the name {raw[:80]!r}, which is not UTF-8.")
        if not name or not name.isprintable():
            self.refuse(f"has a member with the name {name[:80]!r}.")
        return name

    def _extra(self, name: str, extra: bytes) -> bytes | None:
        """The ZIP64 field of a directory entry, where it has one."""
        wide, position = None, 0
        while position < len(extra):
            if position + 4 > len(extra):
                self.refuse(f"has extra fields of {name[:80]!r} that cannot be read.")
            kind, length = struct.unpack_from("<2H", extra, position)
            value = extra[position + 4 : position + 4 + length]
            position += 4 + length
            if position > len(extra) or kind == _UNICODE_PATH or (kind == _ZIP64 and wide is not None):
                self.refuse(f"has extra fields of {name[:80]!r} that readers take for different things.")
            wide = value if kind == _ZIP64 else wide
        return wide

    def _wide_sizes(self, name: str, wide: bytes | None, narrow: list[int]) -> list[int]:
        """Size, packed size and place of a member, those that are full taken from its ZIP64 field."""
        full = [value == _FULL32 for value in narrow]
        if wide is None and any(full):
            self.refuse(f"has no size of {name[:80]!r}.")
        if wide is None:
            return narrow
        if len(wide) < 8 * sum(full):
            self.refuse(f"has a size of {name[:80]!r} that cannot be read.")
        values = iter(struct.unpack_from(f"<{sum(full)}Q", wide))
        return [next(values) if is_full else value for is_full, value in zip(full, narrow, strict=True)]

    def _check_sizes(self, name: str, method: int, packed: int, size: int) -> None:
        if method not in (_STORED, _DEFLATED):
            self.refuse(f"has {name[:80]!r} packed in a way that is not used for models.")
        if (method == _STORED and packed != size) or (size and not packed):
            self.refuse(f"has two sizes of {name[:80]!r}.")

    def _check_local(self, entries: list[_Entry], directory_at: int) -> list[Member]:
        """Members lie one after the other from the first byte on, each with a header that says what the directory says.

        In the order of the directory.
        """
        members: dict[int, Member] = {}
        end, slack = 0, False
        for entry in sorted(entries, key=lambda item: item.header_at):
            self._check_gap(entry.header_at - end, slack, entry.name)
            data_at = self._check_header(entry)
            end, slack = data_at + entry.packed_bytes, bool(entry.flags & _DESCRIPTOR)
            members[entry.header_at] = Member(
                entry.name, entry.size_bytes, entry.packed_bytes, entry.method == _DEFLATED, entry.crc32, data_at
            )
        self._check_gap(directory_at - end, slack, "the directory")
        return [members[entry.header_at] for entry in entries]

    def _check_gap(self, gap: int, slack: bool, name: str) -> None:
        if gap < 0:
            self.refuse(f"has {name[:80]!r} where it lies over another part.")
        if gap and not (slack and gap in _DESCRIPTOR_BYTES):
            self.refuse(f"has something before its first or after its last part, before {name[:80]!r}.")

    def _check_header(self, entry: _Entry) -> int:
        """Where the member's bytes begin."""
        header = _LOCAL.unpack(self._at(entry.header_at, _LOCAL.size))
        signature, _, flags, method, _, _, crc32, packed, size, name_bytes, extra_bytes = header
        if signature != b"PK\x03\x04":
            self._damaged(f"there is no {entry.name[:80]!r} where the directory says")
        name_at = entry.header_at + _LOCAL.size
        if name_bytes != len(entry.raw_name) or self._at(name_at, name_bytes) != entry.raw_name:
            self.refuse(f"has another name of {entry.name[:80]!r} in the member's own header.")
        said = ((crc32, entry.crc32), (packed, entry.packed_bytes), (size, entry.size_bytes))
        # What follows the data in a descriptor, or stands in a ZIP64 field, is zero or full here.
        unsaid = (0, _FULL32) if flags & _DESCRIPTOR else (_FULL32,)
        if flags & ~_FLAGS or method != entry.method or any(own != one and own not in unsaid for own, one in said):
            self.refuse(f"has {entry.name[:80]!r} with another size, checksum or method in the member's own header.")
        data_at: int = name_at + name_bytes + extra_bytes
        return data_at

    def _stored(self, member: Member) -> Iterator[bytes]:
        for done in range(0, member.packed_bytes, CHUNK_BYTES):
            yield self._at(member.data_at + done, min(CHUNK_BYTES, member.packed_bytes - done))

    def _inflated(self, member: Member) -> Iterator[bytes]:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            for packed in self._stored(member):
                # Never more than a piece at once, however little it was packed into.
                yield inflate.decompress(packed, CHUNK_BYTES)
                while inflate.unconsumed_tail:
                    yield inflate.decompress(inflate.unconsumed_tail, CHUNK_BYTES)
            yield inflate.flush()
        except zlib.error:
            self._damaged(f"{member.name[:80]!r} cannot be unpacked")
        if not inflate.eof or inflate.unused_data:
            self._damaged(f"{member.name[:80]!r} has another length than it says")
