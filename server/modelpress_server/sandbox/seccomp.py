"""A seccomp filter for a worker: no sockets, programs or processes, no other processes, no owners or modes of files.

It is a list of what is denied, not of what is allowed: torch and onnxruntime use a wide and changing set of harmless
calls. What is denied fails with EPERM, so that a library sees an error that it can handle; a foreign calling convention
(32-bit calls on a 64-bit kernel), which would evade the numbers here, kills the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from modelpress_server.sandbox.linux import syscall

# Denied whatever the arguments: name -> number on x86_64, on aarch64 (None: it does not have this call).
_DENIED: dict[str, tuple[int, int | None]] = {
    # network
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # new programs, new processes, leaving the process group
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "setsid": (112, 157),
    "setpgid": (109, 154),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    # owners, modes, times and attributes of files: Landlock knows nothing of these, and a path is not seen from here
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "getxattr": (191, 8), "lgetxattr": (192, 9), "fgetxattr": (193, 10), "listxattr": (194, 11),
    "llistxattr": (195, 12), "flistxattr": (196, 13), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "getxattrat": (464, 464), "listxattrat": (465, 465),
    "removexattrat": (466, 466), "file_getattr": (468, 468), "file_setattr": (469, 469),
    # watching folders; memory and queues that two tenants' workers could share
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # the kernel's wider surface
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "fsopen": (430, 430), "open_tree": (428, 428), "move_mount": (429, 429),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "mknod": (133, None), "mknodat": (259, 33),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "acct": (163, 89), "swapon": (167, 224), "swapoff": (168, 225), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "sethostname": (170, 161), "setdomainname": (171, 162), "quotactl": (179, 60),
    "syslog": (103, 116), "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip
# Allowed for this process only: the first argument must be its id (or 0, "this one", for prlimit64).
_OWN_PROCESS_ONLY = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_SYS_SECCOMP = (317, 277)
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_MACHINES = ("x86_64", "aarch64")

_CLONE_THREAD = 0x00010000
_X32_CALL = 0x40000000
_SET_MODE_FILTER = 1
_ALL_THREADS = 1  # SECCOMP_FILTER_FLAG_TSYNC
_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_FAIL = 0x00050000  # with the errno in the low 16 bits

# Classic BPF: load a word of seccomp_data, jump, return.
_LOAD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_AT_LEAST = 0x35
_JUMP_ANY_BIT = 0x45
_RETURN = 0x06
_AT_NUMBER = 0
_AT_ARCH = 4
_AT_ARGUMENT_0 = 16  # low half: both machines are little-endian

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def seccomp_supported() -> bool:
    """Whether the system call numbers of this machine are known here."""
    return os.uname().machine in _MACHINES


def restrict_calls() -> None:
    """Puts the filter on every thread of this process; it cannot be taken off.

    Needs `forbid_new_privileges` before. Raises OSError.
    """
    machine = _MACHINES.index(os.uname().machine)
    instructions = filter_program(machine, os.getpid())
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    program = _Program(len(instructions), code)
    thread = syscall(_SYS_SECCOMP[machine], _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(program))
    if thread:
        raise OSError(errno.ESRCH, f"thread {thread} could not be put under the filter")


def filter_program(machine: int, pid: int) -> list[Instruction]:
    """The filter for one of _MACHINES and the process `pid`."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _AT_ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    if _MACHINES[machine] == "x86_64":
        program += [(_JUMP_AT_LEAST, 0, 1, _X32_CALL), (_RETURN, 0, 0, _KILL_PROCESS)]
    for numbers in _DENIED.values():
        if (number := numbers[machine]) is not None:
            program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL | errno.EPERM)]
    # glibc falls back to clone, whose flags a filter can see.
    program += [(_JUMP_EQUAL, 0, 1, _CLONE3[machine]), (_RETURN, 0, 0, _FAIL | errno.ENOSYS)]
    program += [
        (_JUMP_EQUAL, 0, 4, _CLONE[machine]),
        (_LOAD, 0, 0, _AT_ARGUMENT_0),
        (_JUMP_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _FAIL | errno.EPERM),
    ]
    for name, numbers in _OWN_PROCESS_ONLY.items():
        program += _own_process_only(numbers[machine], pid, zero_is_own=name == "prlimit64")
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _own_process_only(number: int, pid: int, *, zero_is_own: bool) -> list[Instruction]:
    return [
        (_JUMP_EQUAL, 0, 5, number),
        (_LOAD, 0, 0, _AT_ARGUMENT_0),
        (_JUMP_EQUAL, 1, 0, pid),
        (_JUMP_EQUAL, 0, 1, 0 if zero_is_own else pid),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _FAIL | errno.EPERM),
    ]
