"""The sandbox, tried from within: a worker attempts what it must not be able to do."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modelpress_server.executors import sandbox_seccomp
from modelpress_server.executors.sandbox_landlock import landlock_version

needs_level_2 = pytest.mark.skipif(
    landlock_version() == 0 or not sandbox_seccomp.seccomp_supported(),
    reason="this kernel has no Landlock, or this machine no seccomp table here",
)


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@needs_level_2
class TestLevel2:
    async def test_what_it_forbids_and_what_it_leaves(self, start_bench: Any, listener: int) -> None:
        """No network, programs, processes, foreign files or signals; its own files and threads work as ever."""
        bench = await start_bench(sandbox="auto")
        assert bench.executor.sandbox_level == 2
        other = bench.root / "other-task"
        other.mkdir()
        (other / "secret").write_bytes(b"of another project")
        found = await bench.answer(f"break-out:{listener}")
        allowed = {name for name, outcome in found.items() if outcome == "done"}
        assert allowed == {
            "thread", "signal self", "read model", "write output", "rename output", "write private",
        }, found  # fmt: skip

    async def test_spares_are_confined_as_well(self, start_bench: Any, listener: int) -> None:
        """A warm worker is confined no less than a fresh one."""
        bench = await start_bench(sandbox="require", spares=1)
        found = await bench.answer(f"break-out:{listener}")
        assert found["connect"] == found["read system"] == "PermissionError"


class TestLevel1:
    async def test_off_leaves_the_network(self, start_bench: Any, listener: int) -> None:
        """Without the sandbox everything works but what level 1 always forbids: raising limits."""
        bench = await start_bench(sandbox="off")
        assert bench.executor.sandbox_level == 1
        found = await bench.answer(f"break-out:{listener}")
        assert found["connect"] == found["program"] == "done"
        assert found["raise limit"] == "ValueError"

    def test_a_worker_dies_with_its_server(self, tmp_path: Path) -> None:
        """When the starting process is killed, the kernel kills the worker: nothing is left to disturb a restart."""
        script = (
            "import os, sys, time\n"
            "from pathlib import Path\n"
            "from modelpress_server.executors.sandbox import Sandbox\n"
            "Sandbox('off').enter(int(sys.argv[1]), [])\n"
            "print(os.getpid(), flush=True)\n"
            "time.sleep(600)\n"
        )
        starter = (
            "import os, subprocess, sys, time\n"
            "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])\n"
            "time.sleep(600)\n"
        )
        with subprocess.Popen([sys.executable, "-c", starter, script], stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            worker = int(server.stdout.readline())
            descriptor = os.pidfd_open(worker)
            server.kill()
            # The pipe ends when its last writer, the worker, has ended.
            assert server.stdout.read() == b""
            os.close(descriptor)


class TestTheFilter:
    @pytest.mark.parametrize("machine", [0, 1])
    def test_every_jump_stays_inside(self, machine: int) -> None:
        """On both machines the program is well-formed: jumps land inside, the last instruction returns."""
        program = sandbox_seccomp.filter_program(machine, pid=4711)
        assert len(program) < 4096
        for index, (code, if_true, if_false, constant) in enumerate(program):
            struct.pack("=HBBI", code, if_true, if_false, constant)
            if code & 0x07 == 0x05:
                assert index + 1 + max(if_true, if_false) < len(program)
        assert program[-1][0] == 0x06
