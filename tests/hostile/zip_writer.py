"""Zip archives in which every field can be made to lie."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF
STORED, DEFLATED = 0, 8


@dataclass
class Member:
    """A member; `local` and `central` override fields of its two headers."""

    name: bytes
    data: bytes
    method: int = STORED
    flags: int = 0x800
    local: dict[str, int | bytes] = field(default_factory=dict)
    central: dict[str, int | bytes] = field(default_factory=dict)
    descriptor: bytes = b""
    gap: bytes = b""

    def packed(self) -> bytes:
        if self.method != DEFLATED:
            return self.data
        compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        return compressor.compress(self.data) + compressor.flush()


@dataclass
class Zip:
    """An archive; `end`, `end64` and `locator` override fields, the last two are there when `wide`."""

    members: list[Member]
    prefix: bytes = b""
    before_directory: bytes = b""
    after_directory: bytes = b""
    comment: bytes = b""
    wide: bool = False
    end: dict[str, int] = field(default_factory=dict)
    end64: dict[str, int] = field(default_factory=dict)
    locator: dict[str, int] = field(default_factory=dict)

    def build(self) -> bytes:
        out = bytearray(self.prefix)
        directory = bytearray()
        for member in self.members:
            out += member.gap
            directory += _central(member, len(out))
            out += _local(member) + member.packed() + member.descriptor
        out += self.before_directory
        start = len(out)
        out += directory + self.after_directory
        record_at = len(out)
        count, size = len(self.members), len(directory)
        if self.wide:
            values = {"size": 44, "disk": 0, "on_disk": count, "count": count, "bytes": size, "start": start}
            values |= self.end64
            out += struct.pack(
                "<4sQ2H2L4Q", b"PK\x06\x06", values["size"], 45, 45, values["disk"], 0,
                values["on_disk"], values["count"], values["bytes"], values["start"],
            )  # fmt: skip
            at = {"disk": 0, "at": record_at, "disks": 1} | self.locator
            out += struct.pack("<4sLQL", b"PK\x06\x07", at["disk"], at["at"], at["disks"])
            narrow = {"on_disk": FULL16, "count": FULL16, "bytes": FULL32, "start": FULL32}
        else:
            narrow = {"on_disk": count, "count": count, "bytes": size, "start": start}
        last = {"disk": 0, "directory_disk": 0, **narrow, "comment": len(self.comment)} | self.end
        out += struct.pack("<4s4H2LH", b"PK\x05\x06", *last.values()) + self.comment
        return bytes(out)


def _local(member: Member) -> bytes:
    packed = member.packed()
    values: dict[str, int | bytes] = {
        "flags": member.flags, "method": member.method, "crc": zlib.crc32(member.data),
        "packed": len(packed), "size": len(member.data), "name": member.name, "extra": b"",
    } | member.local  # fmt: skip
    name, extra = bytes(values["name"]), bytes(values["extra"])  # type: ignore[arg-type]
    return (
        struct.pack(
            "<4s5H3L2H",
            b"PK\x03\x04",
            20,
            values["flags"],
            values["method"],
            0,
            33,
            values["crc"],
            values["packed"],
            values["size"],
            len(name),
            len(extra),
        )
        + name
        + extra
    )


def _central(member: Member, header_at: int) -> bytes:
    packed = member.packed()
    values: dict[str, int | bytes] = {
        "version": 20, "flags": member.flags, "method": member.method, "crc": zlib.crc32(member.data),
        "packed": len(packed), "size": len(member.data), "name": member.name, "extra": b"", "comment": b"",
        "disk": 0, "attributes": 0, "at": header_at,
    } | member.central  # fmt: skip
    name, extra, comment = bytes(values["name"]), bytes(values["extra"]), bytes(values["comment"])  # type: ignore[arg-type]
    return (
        struct.pack(
            "<4s6H3L5H2L",
            b"PK\x01\x02",
            20,
            values["version"],
            values["flags"],
            values["method"],
            0,
            33,
            values["crc"],
            values["packed"],
            values["size"],
            len(name),
            len(extra),
            len(comment),
            values["disk"],
            0,
            values["attributes"],
            values["at"],
        )
        + name
        + extra
        + comment
    )


def torch_like(rng: random.Random) -> Zip:
    """An archive as torch writes them, small: pickle, code, weights."""
    members = [
        Member(b"archive/data.pkl", b"\x80\x02}q\x00."),
        Member(b"archive/byteorder", b"little"),
        Member(b"archive/code/model.py", b"def forward(self, x):\n    return x\n" * rng.randint(1, 9), DEFLATED),
        Member(b"archive/data/0", rng.randbytes(rng.choice((0, 1, 16, 64)))),
        Member(b"archive/data/1", rng.randbytes(16)),
        Member(b"archive/version", b"3\n"),
        Member(b"archive/.data/serialization_id", b"1234"),
    ]
    if rng.random() < 0.5:
        for member in members:
            _pad(rng, member)
    if rng.random() < 0.3:
        for member in members:
            _describe(rng, member)
    return Zip(members, wide=rng.random() < 0.3)


def _pad(rng: random.Random, member: Member) -> None:
    padding = rng.randrange(64)
    member.local["extra"] = b"FB" + struct.pack("<H", padding) + b"Z" * padding


def _describe(rng: random.Random, member: Member) -> None:
    member.flags |= 0x8
    if rng.random() < 0.7:
        member.local |= {"crc": 0, "packed": 0, "size": 0}
    packed, crc = member.packed(), zlib.crc32(member.data)
    form = rng.choice(("<3L", "<L2Q"))
    member.descriptor = rng.choice((b"PK\x07\x08", b"")) + struct.pack(form, crc, len(packed), len(member.data))


_NAMES = (
    b"archive/DATA.PKL", b"archive/data.pkl", b"ARCHIVE/data.pkl", b"archive/Code/model.py", b"other/data.pkl",
    b"data.pkl", b"/archive/data.pkl", b"archive//data.pkl", b"archive/../archive/data.pkl", b"archive/./data.pkl",
    b"archive\\data.pkl", b"C:/data.pkl", b"archive/data.pkl\0.txt", b"archive/\x1b[31m", b"archive/\xff\xfe",
    "archive/\u202edata".encode(), "archive/d\u00e4ta".encode(), "archive/da\u0308ta".encode(), b"archive/data/",
    b"archive/", b"", b"archive", b"archive/\xe4".decode("latin-1").encode("cp437"), b"archive/data.pkl ", b"a" * 300,
    "archive/\u212aelvin".encode(), "archive/\u0130".encode(), b"archive/data/0/x",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 15, 16, 17, 63, 64, 255, 4096, 0x7FFF, 0xFFFE, FULL16, 0x7FFFFFFF, FULL32 - 1, FULL32)


def _number(rng: random.Random, near: int, full: int = FULL32) -> int:
    if rng.random() < 0.5:
        return max(0, min(full, near + rng.choice((-64, -22, -16, -8, -2, -1, 1, 2, 8, 16, 22, 64))))
    return rng.choice(_NUMBERS) & full


def _name(rng: random.Random, archive: Zip) -> None:
    # Without this one torch refuses the archive before it looks any further.
    member = rng.choice([item for item in archive.members if item.name != b"archive/version"])
    name = rng.choice((*_NAMES, rng.choice(archive.members).name, member.name.upper(), member.name.title()))
    if rng.random() < 0.6:
        member.name = name
    else:
        rng.choice((member.local, member.central))["name"] = name
    if rng.random() < 0.4:
        member.flags &= ~0x800


def _duplicate(rng: random.Random, archive: Zip) -> None:
    other = rng.choice(archive.members)
    name = rng.choice((other.name, other.name.upper(), other.name.replace(b"archive", b"other"), other.name + b"\0"))
    archive.members.insert(rng.randrange(len(archive.members) + 1), Member(name, rng.randbytes(16)))


def _field(rng: random.Random, archive: Zip) -> None:
    member = rng.choice(archive.members)
    header = rng.choice((member.local, member.central))
    name = rng.choice(("crc", "packed", "size", "flags", "method"))
    if name == "method":
        header[name] = rng.choice((0, 1, 6, 8, 9, 12, 14, 93, 95, 99))
    elif name == "flags":
        header[name] = member.flags ^ (1 << rng.randrange(16))
    else:
        near = {"crc": zlib.crc32(member.data), "packed": len(member.packed()), "size": len(member.data)}[name]
        header[name] = _number(rng, near)


def _both(rng: random.Random, archive: Zip) -> None:
    """The same lie in both headers."""
    member = rng.choice(archive.members)
    name = rng.choice(("crc", "packed", "size"))
    near = {"crc": zlib.crc32(member.data), "packed": len(member.packed()), "size": len(member.data)}[name]
    member.local[name] = member.central[name] = _number(rng, near)


def _flags(rng: random.Random, archive: Zip) -> None:
    rng.choice(archive.members).flags ^= 1 << rng.randrange(16)


def _central_only(rng: random.Random, archive: Zip) -> None:
    member = rng.choice(archive.members)
    name = rng.choice(("version", "disk", "attributes", "comment", "at"))
    values = {
        "version": rng.choice((0, 10, 20, 45, 46, 50, 51, 63, 64, 100)),
        "disk": rng.choice((1, FULL16)),
        "attributes": rng.choice((0x10, 0x20, 0xA1FF0000, 0x10 | 0x41ED0000)),
        "comment": rng.choice((b"x" * 9, b"PK\x05\x06" + bytes(18), b"PK\x06\x07" + bytes(16), b"PK\x01\x02")),
        "at": _number(rng, 100 * archive.members.index(member)),
    }
    member.central[name] = values[name]


def _overlap(rng: random.Random, archive: Zip) -> None:
    """Two entries of the directory for one place, or for places within one another."""
    first, second = rng.sample(archive.members, 2)
    at = len(archive.prefix)
    for member in archive.members:
        at += len(member.gap)
        if member is first:
            break
        at += len(_local(member)) + len(member.packed()) + len(member.descriptor)
    second.central["at"] = at + rng.choice((0, 0, 30, 46))


def _extra(rng: random.Random, archive: Zip) -> None:
    member = rng.choice(archive.members)
    size, packed = len(member.data), len(member.packed())
    name = member.name.replace(b"data", b"evil")
    fields = (
        struct.pack("<2H2Q", 1, 16, size, packed),
        struct.pack("<2HQ", 1, 8, _number(rng, size)),
        struct.pack("<2H2Q", 1, 16, 1, 1) + struct.pack("<2H2Q", 1, 16, size, packed),
        struct.pack("<2H", 0x7075, 5 + len(name)) + b"\x01" + struct.pack("<L", zlib.crc32(member.name)) + name,
        struct.pack("<2H", 0x5455, 5) + bytes(5),
        struct.pack("<2H", 0x5455, 50) + bytes(5),
        struct.pack("<2H", 0x9901, 7) + bytes(7),
        b"\x01",
        b"FB" + struct.pack("<H", 8) + bytes(8),
    )
    header = rng.choice((member.local, member.central))
    header["extra"] = rng.choice(fields)
    if rng.random() < 0.5:
        header[rng.choice(("size", "packed"))] = FULL32


def _end(rng: random.Random, archive: Zip) -> None:
    count = len(archive.members)
    name = rng.choice(("disk", "directory_disk", "on_disk", "count", "bytes", "start"))
    near = {"on_disk": count, "count": count, "bytes": 60 * count, "start": 400}.get(name, 0)
    archive.end[name] = _number(rng, near, FULL32 if name in ("bytes", "start") else FULL16)
    if rng.random() < 0.3:
        archive.end["count"] = archive.end["on_disk"] = max(0, count + rng.choice((-2, -1, 1)))


def _end_wide(rng: random.Random, archive: Zip) -> None:
    archive.wide = True
    count = len(archive.members)
    name = rng.choice(("size", "disk", "on_disk", "count", "bytes", "start"))
    near = {"size": 44, "on_disk": count, "count": count, "bytes": 60 * count, "start": 400}.get(name, 0)
    archive.end64[name] = _number(rng, near)
    if rng.random() < 0.5:
        archive.end64 = {}
        archive.end |= rng.choice(({"count": count}, {"bytes": 0}, {"start": 0}, {"on_disk": 0, "count": 0}))


def _locator(rng: random.Random, archive: Zip) -> None:
    archive.wide = True
    archive.locator[rng.choice(("disk", "at", "disks"))] = _number(rng, 400)


def _surround(rng: random.Random, archive: Zip) -> None:
    junk = rng.choice((b"x", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), bytes(64), torch_like(rng).build()))
    where = rng.choice(("prefix", "before_directory", "after_directory", "comment", "gap", "descriptor"))
    if where in ("gap", "descriptor"):
        setattr(rng.choice(archive.members), where, junk[:4096])
    else:
        setattr(archive, where, junk[: 4096 if where == "comment" else None])


def _deflate(rng: random.Random, archive: Zip) -> None:
    member = rng.choice(archive.members)
    member.method = DEFLATED if member.method == STORED else STORED


def _order(rng: random.Random, archive: Zip) -> None:
    rng.shuffle(archive.members)


def _folder(rng: random.Random, archive: Zip) -> None:
    data = rng.choice((b"", b"hidden"))
    archive.members.insert(0, Member(rng.choice((b"archive/", b"evil/", b"archive/data/")), data))


MUTATIONS: tuple[Callable[[random.Random, Zip], None], ...] = (
    _name, _duplicate, _field, _both, _flags, _central_only, _overlap, _extra, _end, _end_wide, _locator, _surround,
    _deflate, _order, _folder,
)  # fmt: skip


def swapped(evil: Zip, good: Zip) -> bytes:
    """One file that is two archives: the ZIP64 locator points at `evil`, the record before it is that of `good`."""
    first = Zip(evil.members, wide=True).build()[: -22 - 20]
    second = Zip(good.members, wide=True)
    second.prefix = first
    second.locator = {"at": len(first) - 56}
    return second.build()


def mutated(rng: random.Random) -> bytes:
    """An archive with a few lies in it, and sometimes a few flipped or cut bytes besides."""
    archive = torch_like(rng)
    if rng.random() < 0.05:
        return swapped(torch_like(rng), archive)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(MUTATIONS)(rng, archive)
    data = bytearray(archive.build())
    while rng.random() < 0.15:
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
    if rng.random() < 0.03:
        del data[rng.randrange(len(data)) :]
    return bytes(data)
