"""How a worker confines itself, in three moments: at its start, after its imports, and when its task is known.

Level 1, always: no new privileges, no capabilities, resource limits, dies with the server, first to go when memory runs
out. Level 2, where the kernel allows it: Landlock (files) and seccomp (network, programs, other processes, owners and
modes of files). A worker tries what it must not be able to do before it says that it has reached level 2. Mode "off"
stays at level 1; with "require" neither the server nor a worker goes on below level 2.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from modelpress_server.sandbox import linux
from modelpress_server.sandbox.landlock import READ, READ_AND_EXECUTE, WRITE, landlock_version, restrict_files
from modelpress_server.sandbox.seccomp import restrict_calls, seccomp_supported
from modelpress_server.sandbox.worker_user import WorkerUser

LEVEL_ALWAYS = 1
LEVEL_FILES_AND_NETWORK = 2
MAX_FILE_BYTES = 64 * 1024**3  # 64 GiB, as much as a data file may unpack to
MAX_OPEN_FILES = 4096

_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/lib32", "/opt", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/localtime")
# What C libraries and torch ask of the machine; no other process's folder, and not the list of them.
_MACHINE = (
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/loadavg", "/proc/zoneinfo",
    "/proc/filesystems", "/proc/version", "/proc/sys/vm", "/proc/sys/kernel", "/sys/bus/pci", "/sys/devices",
    "/sys/fs/cgroup", "/sys/kernel/mm", "/dev/urandom", "/dev/random", "/dev/zero",
)  # fmt: skip
_WRITABLE_DEVICES = ("/dev/null",)


@dataclass
class Sandbox:
    """The confinement of this process. `user`: whom it becomes; None: it stays the server's.

    `level` is what was reached, `fault` why it is not a higher one.
    """

    mode: str
    user: WorkerUser | None = None
    level: int = LEVEL_ALWAYS
    fault: str = ""

    def enter(self, parent_pid: int, writable: Iterable[Path]) -> None:
        """At the start, while there is one thread: what every later thread inherits. Raises OSError.

        `writable`: the folder that holds this worker's private folder and those of its tasks.
        """
        if self.user is not None:
            linux.become(self.user.uid, self.user.gid)
        linux.forbid_new_privileges()
        # Root's right to read what others own: the Python installation may not be root's. Given up in `close_calls`.
        linux.drop_capabilities(keep=(linux.CAP_DAC_READ_SEARCH,))
        linux.die_with_parent(parent_pid)
        linux.adopt_orphans()
        _limit_resources()
        self.fault = "the sandbox is turned off" if self.mode == "off" else _restrict_files(writable)
        self._files_restricted = not self.fault

    def close_calls(self, private: Iterable[Path]) -> None:
        """After the imports, which may start programs: no network, no programs, on all threads.

        `private`: files and folders that no worker may read, for a try.
        """
        linux.drop_capabilities()
        if self.mode != "off":
            self.fault = _restrict_calls() or self.fault or find_breach(private)
        self.level = LEVEL_ALWAYS if self.fault else LEVEL_FILES_AND_NETWORK

    def limit_file_size(self, limit_bytes: int) -> None:
        """Caps every file that it writes: a write beyond it fails at once (EFBIG)."""
        lowest = min(limit_bytes, MAX_FILE_BYTES)
        resource.setrlimit(resource.RLIMIT_FSIZE, (lowest, lowest))

    def limit_memory(self, limit_bytes: int) -> None:
        """Caps what is asked for in private memory, with files that are mapped for writing: more fails at once."""
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    def narrow(self, readable: Iterable[Path], writable: Iterable[Path]) -> None:
        """When the task is known: its own files, and no other task's. Raises OSError."""
        if self._files_restricted:
            restrict_files(_rules([(path, READ) for path in readable] + [(path, WRITE) for path in writable]))

    _files_restricted: bool = False


def _limit_resources() -> None:
    """Memory and time are the server's to limit, per task. No limit on processes: it counts all of a user's."""
    for name, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    ):
        hard = resource.getrlimit(name)[1]
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(name, (lowest, lowest))
    os.umask(0o077)
    # When the machine runs out of memory the kernel shall take a worker, not the server. Some containers lack the file.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")


def _restrict_files(writable: Iterable[Path]) -> str:
    """Empty, or why it cannot be done."""
    if landlock_version() == 0:
        return "the kernel offers no Landlock (Linux 5.13 or newer has it, where it is enabled and not filtered)"
    try:
        restrict_files(_rules([(path, WRITE) for path in writable]))
    except OSError as error:
        return f"the kernel refuses the Landlock rules ({error.strerror})"
    return ""


def _restrict_calls() -> str:
    """Empty, or why it cannot be done."""
    if not seccomp_supported():
        return f"there is no seccomp filter for this kind of processor ({os.uname().machine})"
    try:
        restrict_calls()
    except OSError as error:
        return f"the kernel refuses the seccomp filter ({error.strerror})"
    return ""


def find_breach(private: Iterable[Path]) -> str:
    """Empty, or what this process can do although it must not. By trying, and by the rules: a file may come later."""
    for path in private:
        below = next((rule for rule, _ in _rules([]) if path.resolve().is_relative_to(rule.resolve())), None)
        if below is not None:
            return f"{path} lies below {below}, which workers must be able to read; move it out of there"
        if can_read(path):
            return f"a worker can read {path}"
    return "a worker can open a socket" if _can_open_socket() else ""


def can_read(path: Path) -> bool:
    """Whether this process can open a file or folder."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _can_open_socket() -> bool:
    try:
        socket.socket(socket.AF_INET).close()
    except OSError:
        return False
    return True


def _rules(own: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """`own`, and what every Python process needs: the system, the Python installation, facts about the machine."""
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, *(entry for entry in sys.path if Path(entry).is_absolute())}
    rules = [(Path(path), READ_AND_EXECUTE) for path in (*_SYSTEM, *sorted(python)) if Path(path) != Path("/")]
    rules += [(Path(path), READ) for path in _MACHINE]
    rules += [(Path(path), READ | WRITE) for path in _WRITABLE_DEVICES]
    return rules + own
