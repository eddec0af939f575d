"""Landlock: which files a process may read and write, and no TCP, no signals to processes outside.

The rules stack: each call of `restrict_files` can only take away. They hold for the calling thread and for threads and
processes that it starts later. Reference: the kernel's Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from modelpress_server.sandbox.linux import syscall

# The same numbers on every machine.
_SYS_CREATE_RULESET = 444
_SYS_ADD_RULE = 445
_SYS_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_REMOVE_DIR = 1 << 4
_REMOVE_FILE = 1 << 5
_MAKE_DIR = 1 << 7
_MAKE_REGULAR = 1 << 8
_REFER = 1 << 13
_TRUNCATE = 1 << 14

READ = _READ_FILE | _READ_DIR
READ_AND_EXECUTE = READ | _EXECUTE
# No symbolic links, sockets, pipes or devices: nothing that could trick whoever reads the folder afterwards.
WRITE = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REGULAR | _REFER | _TRUNCATE
_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE

# How many file rights each version of the interface knows; later ones add what is not about files.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_FILE_RIGHTS_SINCE_5 = 16
_NETWORK = 0b11  # bind and connect of TCP; since version 4
_SCOPES = 0b11  # abstract unix sockets and signals; since version 6


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def landlock_version() -> int:
    """Version of the kernel's interface; 0: there is none, or it is not permitted here."""
    try:
        return syscall(_SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict_files(rules: Iterable[tuple[Path, int]]) -> None:
    """From now on this thread opens nothing but what `rules` allow: (path, rights below it).

    Paths that do not exist are left out. Needs `forbid_new_privileges` before. Raises OSError.
    """
    version = landlock_version()
    handled = (1 << _FILE_RIGHTS.get(version, _FILE_RIGHTS_SINCE_5)) - 1
    attributes = _RulesetAttributes(handled, _NETWORK, _SCOPES)
    size_bytes = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = syscall(_SYS_CREATE_RULESET, ctypes.byref(attributes), size_bytes, 0)
    try:
        for path, rights in rules:
            _add_rule(ruleset, path, rights & handled)
        syscall(_SYS_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _add_rule(ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FOR_FILES
        rule = _PathBeneath(rights, descriptor)
        syscall(_SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(descriptor)
