"""A copy of onnxruntime that asks us, and not the CPU, which instructions there are.

onnxruntime chooses its kernels by the instruction `cpuid`. In the copy each `cpuid` is replaced by `ud2`, which is as
long; the kernel reports it as SIGILL, and `runner.feign` answers. Kernels then run at the CPU's own speed, as they
would on one that has fewer instructions: no emulator has AVX-512.

The two bytes may also stand inside another instruction, an address say. Code is read from many places before them;
only what nearly all of those readings take for the instruction is replaced.
"""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
_STARTS = range(33, 65)  # bytes before the place, from which code is read
_BEHIND = 16  # bytes: no instruction is longer
_EXECUTABLE, _PROGBITS = 4, 1


def trapped(package: Path, folder: Path) -> int:
    """Copies the package onnxruntime into the `folder` and replaces each `cpuid` there; how many there were.

    Raises ImportError without capstone, OSError, and ValueError where there is none.
    """
    copy = folder / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    count = 0
    for library in sorted(copy.rglob("*.so*")):
        code = bytearray(library.read_bytes())
        places = list(cpuid_places(bytes(code)))
        for place in places:
            code[place : place + len(UD2)] = UD2
        if places:
            library.chmod(0o600)
            library.write_bytes(code)
        count += len(places)
    if not count:
        raise ValueError(f"{package} holds no instruction cpuid")
    return count


def cpuid_places(code: bytes) -> Iterator[int]:
    """Offsets of the instruction in an ELF file of 64 bits. Raises ImportError without capstone."""
    import capstone

    reader = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    reader.skipdata = True
    for begin, end in _executable(code):
        for match in re.finditer(re.escape(CPUID), code[begin:end]):
            place = begin + match.start()
            readings = [
                any(
                    (at, name) == (place, "cpuid")
                    for at, _, name, _ in reader.disasm_lite(code[place - back : place + _BEHIND], place - back)
                )
                for back in _STARTS
                if place - back >= begin
            ]
            if 2 * sum(readings) > len(readings):
                yield place


def _executable(code: bytes) -> Iterator[tuple[int, int]]:
    """Where the file's instructions lie."""
    if code[:5] != b"\x7fELF\x02":
        return
    table, size, count = *struct.unpack_from("<Q", code, 40), *struct.unpack_from("<HH", code, 58)
    for index in range(count):
        _, kind, flags, _, offset, length = struct.unpack_from("<IIQQQQ", code, table + size * index)
        if kind == _PROGBITS and flags & _EXECUTABLE:
            yield offset, offset + length
