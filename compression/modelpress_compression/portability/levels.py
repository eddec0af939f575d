"""CPUs by what onnxruntime chooses its kernels for, and how one stands in for them.

A CPU stands in for another of its own kind that has fewer instructions: what is masked, `cpuid` does not report (see
`trapping`). Masks follow the "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2A, CPUID, leaf 7.
QEMU translates the instructions of any CPU, but it knows no AVX-512: its Skylake-Server and Icelake-Server have AVX2
alone.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

_ALL = 0xFFFFFFFF
# Leaf 7: features of AVX-512 beyond those of Skylake-X, in each register.
_AVX512_SKYLAKE = (16, 17, 28, 30, 31)  # EBX: F, DQ, CD, BW, VL
_EBX_LATER = (21, 26, 27)  # IFMA, PF, ER
_ECX_LATER = (1, 6, 8, 9, 10, 11, 12, 14)  # VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ
_EDX_LATER = (2, 3, 8, 22, 23, 24, 25)  # 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, FP16, AMX-TILE, AMX-INT8

Masks = tuple[tuple[int, int, int, int, int, int], ...]


def _without(*bits: int) -> int:
    return _ALL & ~sum(1 << bit for bit in bits)


def _leaf_7(ebx: Iterable[int] = (), ecx: Iterable[int] = (), edx: Iterable[int] = _EDX_LATER) -> Masks:
    """What stays without these; of the second part of the leaf (AVX-VNNI, AVX512-BF16 and later) nothing does."""
    return ((7, 0, _ALL, _without(*ebx), _without(*ecx), _without(*edx)), (7, 1, 0, 0, 0, 0))


@dataclass(frozen=True)
class Level:
    """`needs`: what /proc/cpuinfo must name for this CPU to stand in, with `masks`. `qemu_cpu`: QEMU's model of it;
    empty: QEMU has none with these instructions. `machine`: of its programs."""

    name: str
    title: str
    needs: frozenset[str] = frozenset()
    masks: Masks = ()
    qemu_cpu: str = ""
    machine: str = "x86_64"


_ROWS = (
    Level(
        "haswell",
        "Haswell: AVX2, products of 8 bits saturate",
        frozenset({"avx2", "fma"}),
        _leaf_7((*_AVX512_SKYLAKE, *_EBX_LATER), _ECX_LATER),
        "Haswell",
    ),
    Level(
        "skylake-x",
        "Skylake-X: AVX-512 without VNNI, products of 8 bits saturate",
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        _leaf_7(_EBX_LATER, _ECX_LATER),
    ),
    Level("ice-lake", "Ice Lake: AVX-512 with VNNI", frozenset({"avx512f", "avx512_vnni"}), _leaf_7()),
    Level("aarch64", "AArch64: Neoverse N1", qemu_cpu="neoverse-n1", machine="aarch64"),
)
LEVELS: Mapping[str, Level] = MappingProxyType({row.name: row for row in _ROWS})
# What Linux says of the CPU that QEMU stands in for: onnxruntime reads it and crashes on the host's.
AARCH64_CPUINFO = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""


def can_stand_in(level: Level, flags: Iterable[str]) -> bool:
    """Whether this machine's CPU, which has these `flags`, runs what the level does."""
    return platform.machine() == level.machine and bool(level.masks) and level.needs <= set(flags)
