"""Mutates archives and reads each with three readers: ours, Python's zipfile and torch's.

    python tests/hostile/readers_agree.py --archives 10000

What ours admits, the other two must read alike: the same names, the same bytes. Exit code 1 where they do not.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import torch
from modelpress_compression.archive import Archive
from modelpress_compression.errors import CompressionError
from modelpress_compression.loaders.checked_copy import write_copy
from modelpress_compression.loaders.formats.torch_archive import inner_members

sys.path.insert(0, str(Path(__file__).parent))
from zip_writer import mutated

Seen = dict[str, bytes] | None
_MAX_MEMBER_BYTES = 1 << 20


def ours(data: bytes) -> Seen:
    """What the strict reader makes of it; None: refused."""
    try:
        archive = Archive(io.BytesIO(data))
        return {member.name: archive.read(member, _MAX_MEMBER_BYTES) for member in inner_members(archive).values()}
    except CompressionError:
        return None


def pythons(data: bytes) -> Seen:
    """What zipfile makes of it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = [info for info in archive.infolist() if not info.is_dir()]
            if any(info.file_size > _MAX_MEMBER_BYTES for info in files):
                return None
            return {info.filename: archive.read(info) for info in files}
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OSError,
        EOFError,
        IndexError,
        zlib.error,
    ):
        return None


def torchs(data: bytes) -> Seen:
    """What torch makes of it."""
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        folder = next(iter(ours(data) or pythons(data) or {"": b""})).split("/")[0]
        names = [name for name in reader.get_all_records() if name and not name.endswith("/")]
        return {f"{folder}/{name}": reader.get_record(name) for name in names}
    except (RuntimeError, UnicodeDecodeError):
        return None


def copied(data: bytes) -> bytes:
    """The archive of our own that torch would be given."""
    target = io.BytesIO()
    write_copy(Archive(io.BytesIO(data)), target)
    return target.getvalue()


def disagreement(data: bytes) -> str:
    """Empty where all is well: refused, or read alike by all three, as it is and as copied."""
    seen = ours(data)
    if seen is None:
        return ""
    for what, archive in (("as it is", data), ("as copied", copied(data))):
        for reader in (ours, pythons, torchs):
            if reader(archive) != seen:
                return f"{reader.__name__} reads another archive than ours, {what}"
    return ""


def run(count: int, seed: int) -> Counter[str]:
    """How many were admitted, refused, and read in different ways by zipfile and torch. Raises AssertionError."""
    counts: Counter[str] = Counter()
    for number in range(count):
        data = mutated(random.Random(f"{seed}-{number}"))
        found = disagreement(data)
        assert not found, f"archive {number} of seed {seed}: {found}"
        admitted = ours(data) is not None
        counts["admitted" if admitted else "refused"] += 1
        if not admitted:
            python, other = pythons(data), torchs(data)
            counts["of the refused, read by zipfile"] += python is not None
            counts["of the refused, read by torch"] += other is not None
            counts["of the refused, read by both and differently"] += None not in (python, other) and python != other
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description="Reads mutated archives with three readers.")
    parser.add_argument("--archives", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        counts = run(options.archives, options.seed)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    for what, number in sorted(counts.items()):
        print(f"{what}: {number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
