"""Runs a model on samples wherever there is an onnxruntime, and writes its outputs: `python runner.py TASK.json`.

The task: `model`, a path; `feeds`, paths of .npz files; `outputs`, the .npz to write; `masks`, see `feign`. It is run
as a file, in environments that have numpy and onnxruntime alone, so that it imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

CPUID_BYTES = 2
# void cpuid(uint32 leaf, uint32 subleaf, uint32 registers[4])
_CPUID = bytes.fromhex(
    "53"  # push rbx
    "89f8"  # mov eax, edi
    "89f1"  # mov ecx, esi
    "4989d0"  # mov r8, rdx
    "0fa2"  # cpuid
    "418900"  # mov [r8], eax
    "41895804"  # mov [r8 + 4], ebx
    "41894808"  # mov [r8 + 8], ecx
    "4189500c"  # mov [r8 + 12], edx
    "5b"  # pop rbx
    "c3"  # ret
)
# Where Linux keeps the registers of an interrupted thread: ucontext_t.uc_mcontext.gregs, on x86-64.
_GREGS_OFFSET = 40
_RBX, _RDX, _RAX, _RCX, _RIP = 11, 12, 13, 14, 16
_SA_SIGINFO, _SA_NODEFER = 4, 0x40000000
_kept: list[object] = []  # what native code points to


class _SigAction(ctypes.Structure):
    """glibc's struct sigaction."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def cpuid_function() -> Callable[..., None]:
    """`cpuid(leaf, subleaf, registers)` of the CPU itself."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_CPUID)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    registers = ctypes.POINTER(ctypes.c_uint32)
    function = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, registers)(address)
    _kept.append((page, function))
    return function


def feign(masks: Sequence[Sequence[int]]) -> None:
    """Answers every trapped `cpuid` (see `trapping`) with what the CPU says, but for the features that are masked.

    `masks`: [leaf, subleaf, eax, ebx, ecx, edx], each register's bits that stay.
    """
    cpuid = cpuid_function()
    kept = {(leaf, subleaf): bits for leaf, subleaf, *bits in masks}

    def answer(_number: int, _info: int, context: int) -> None:
        registers = ctypes.cast(context + _GREGS_OFFSET, ctypes.POINTER(ctypes.c_uint64))
        leaf, subleaf = registers[_RAX] & 0xFFFFFFFF, registers[_RCX] & 0xFFFFFFFF
        found = (ctypes.c_uint32 * 4)()
        cpuid(leaf, subleaf, found)
        bits = kept.get((leaf, subleaf), (0xFFFFFFFF,) * 4)
        for place, value, bit in zip((_RAX, _RBX, _RCX, _RDX), found, bits, strict=True):
            registers[place] = value & bit
        registers[_RIP] += CPUID_BYTES

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(answer)
    action = _SigAction(ctypes.cast(handler, ctypes.c_void_p).value, flags=_SA_SIGINFO | _SA_NODEFER)
    _kept.append((handler, action))
    library = ctypes.CDLL(None, use_errno=True)
    if library.sigaction(int(signal.SIGILL), ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "cannot catch SIGILL")


def outputs_of(task: Mapping[str, Any]) -> dict[str, Any]:
    """{"FEED:OUTPUT": array}; raises whatever onnxruntime raises."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(task["model"], options, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    found = {}
    for number, path in enumerate(task["feeds"]):
        with np.load(path) as arrays:
            feeds = {name: arrays[name] for name in arrays.files if name in taken}
        for name, value in zip(names, session.run(None, feeds), strict=True):
            array = np.asarray(value)
            if array.dtype.hasobject:
                array = array.astype("U")
            found[f"{number}:{name}"] = array
    return found


def main(path: str) -> None:
    """Writes the outputs and prints {"onnxruntime": VERSION}, or {"error": TEXT}."""
    task = json.loads(Path(path).read_text("utf-8"))
    if task["masks"]:
        feign(task["masks"])
    try:
        import numpy as np
        import onnxruntime
    except Exception as error:  # noqa: BLE001  # a library of another age or machine
        print(json.dumps({"missing": f"onnxruntime cannot be imported there: {error}"}))
        return
    try:
        found = outputs_of(task)
    except Exception as error:  # noqa: BLE001  # of a dozen classes, which say why the model does not run here
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return
    np.savez(task["outputs"], **found)
    print(json.dumps({"onnxruntime": onnxruntime.__version__}))


if __name__ == "__main__":
    main(sys.argv[1])
