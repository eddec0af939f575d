"""The few system calls that confining a process needs and Python does not offer, called through ctypes."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
CAP_DAC_READ_SEARCH = 2
CAP_SETGID = 6
CAP_SETUID = 7
_CAPABILITY_VERSION_3 = 0x20080522
# capget(2) and capset(2), by machine.
_SYS_CAPGET = {"x86_64": 125, "aarch64": 90}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}

_libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: object) -> int:
    """Calls the kernel; integers are passed as longs. Raises OSError."""
    converted = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument; the others are zero. Raises OSError."""
    zero = ctypes.c_ulong(0)
    if _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def become(uid: int, gid: int) -> None:
    """Gives up root for another user, for good. Raises OSError."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # A process that changed its user may not look at itself in /proc, which libraries do.
    prctl(PR_SET_DUMPABLE, 1)


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent ends. Ends it at once where the parent has ended already."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Grandchildren whose parent ends become children of this process, so that they stay findable below it."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """setuid programs and file capabilities give nothing any more, to this process and all its children."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def drop_capabilities(*, keep: tuple[int, ...] = ()) -> None:
    """Gives up the calling thread's capabilities (root's powers) but for `keep`; threads started later have no more.

    Does nothing on machines whose system call numbers are not known here. Raises OSError.
    """
    machine = os.uname().machine
    if machine not in _SYS_CAPSET:
        return
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapabilityData * 2)()
    syscall(_SYS_CAPGET[machine], ctypes.byref(header), data)
    kept = sum(1 << capability for capability in keep)
    for index in range(2):
        mask = (kept >> (32 * index)) & 0xFFFFFFFF
        data[index] = _CapabilityData(data[index].effective & mask, data[index].permitted & mask, 0)
    syscall(_SYS_CAPSET[machine], ctypes.byref(header), data)
