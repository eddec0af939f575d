"""The sandbox, tried from within: a worker attempts what it must not be able to do."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modelpress_server.config import SettingsError
from modelpress_server.executors.base import WorkerUnavailableError
from modelpress_server.executors.process import ExecStarter, WorkerCommand
from modelpress_server.executors.zygote import ForkStarter
from modelpress_server.sandbox import seccomp
from modelpress_server.sandbox.landlock import landlock_version
from modelpress_server.sandbox.worker_user import WorkerUser, barrier, may_change_user

FAKE_TASKS = str(Path(__file__).with_name("fake_tasks.py"))
needs_level_2 = pytest.mark.skipif(
    landlock_version() == 0 or not seccomp.seccomp_supported(),
    reason="this kernel has no Landlock, or this machine no seccomp table here",
)


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


@needs_level_2
class TestLevel2:
    @pytest.mark.parametrize("fork", [True, False], ids=["fork", "exec"])
    async def test_what_it_forbids_and_what_it_leaves(self, start_bench: Any, listener: int, fork: bool) -> None:
        """No network, programs, processes, foreign files or signals; its own files and threads work as ever."""
        bench = await start_bench(sandbox="auto", fork=fork)
        assert bench.executor.sandbox_level == 2
        other = bench.root / "other-task"
        other.mkdir()
        (other / "secret").write_bytes(b"of another project")
        found = await bench.answer(f"break-out:{listener}")
        allowed = {name for name, outcome in found.items() if outcome == "done"}
        assert allowed == {
            "thread", "signal self", "read model", "write output", "rename output", "write private",
        }, found  # fmt: skip


@needs_level_2
class TestWhatAWorkerReports:
    """The level that a worker has tried itself decides, not what the kernel offers."""

    @pytest.fixture
    def below_import_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A data folder below an entry of the import path, which workers must be able to read."""
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path / "data"

    async def test_require_does_not_start(self, start_bench: Any, below_import_path: Path) -> None:
        """The error names the folder, and what it lies below."""
        with pytest.raises(SettingsError, match=f"{below_import_path} lies below {below_import_path.parent}"):
            await start_bench(sandbox="require", private=[below_import_path])

    async def test_auto_warns(
        self, start_bench: Any, below_import_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The server says level 1 and why, and the worker knows it too."""
        bench = await start_bench(sandbox="auto", private=[below_import_path])
        assert bench.executor.sandbox_level == 1
        assert f"level 1 only: {below_import_path} lies below" in caplog.text
        assert (await bench.answer("describe"))["level"] == 1

    @pytest.mark.parametrize("starter", [ForkStarter, ExecStarter])
    async def test_a_worker_that_falls_short_later(self, start_bench: Any, starter: Any) -> None:
        """With "require" it is not used, also where the try at the start went well."""
        bench = await start_bench(sandbox="require")
        bench.executor._starter = starter(WorkerCommand(bench.root, "require", FAKE_TASKS, (Path("/usr/lib"),)))
        with pytest.raises(WorkerUnavailableError, match="could not be started"):
            await bench.run("describe")

    async def test_a_file_that_can_be_read_by_other_ways(self, start_bench: Any) -> None:
        """What lies below no rule but can be opened is found by trying."""
        bench = await start_bench(sandbox="auto", private=[Path("/dev/null")])
        assert bench.executor.sandbox_level == 1


@pytest.mark.skipif(not may_change_user(), reason="only root may run workers as other users")
class TestUsers:
    async def test_a_python_that_only_root_can_run(
        self, start_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Workers stay with the server's user, and the log says why; tasks run."""
        private = tmp_path / "private" / "site"
        private.mkdir(parents=True)
        private.parent.chmod(0o700)
        monkeypatch.syspath_prepend(str(private))
        bench = await start_bench(sandbox="auto", first_uid=60_600)
        assert not bench.executor.separate_users
        assert "workers run as the server's own user" in caplog.text
        assert "others may not pass through " in caplog.text
        assert (await bench.answer(f"stat:{bench.root}"))["uid"] == os.getuid()

    @needs_level_2
    async def test_files_of_the_server_do_not_exist_for_a_worker(self, start_bench: Any) -> None:
        """It cannot ask for the size of a blob, nor of another task's file; its own task works as ever."""
        with tempfile.TemporaryDirectory() as name:
            data = Path(name)
            blob = data / "blobs" / "ab" / "abcd"
            blob.parent.mkdir(parents=True)
            (data / "blobs").chmod(0o700)
            blob.write_bytes(b"of another project")
            options = {"first_uid": 60_600, "root": data / "work", "private": [data / "blobs"]}
            bench = await start_bench(sandbox="auto", fork=True, **options)
            if not bench.executor.separate_users:
                pytest.skip("other users cannot run this Python installation")
            found = await bench.answer(f"stat:{blob}")
            assert found["found"] == "PermissionError"
            assert 60_600 < found["uid"] < 61_100
            shutil.rmtree(bench.root / "task")  # each task has a folder of its own, and its worker a user of its own
            other = bench.root / "other-task"
            other.mkdir(mode=0o700)
            (other / "secret").write_bytes(b"of another project")
            assert (await bench.answer(f"stat:{other / 'secret'}"))["found"] == "PermissionError"
            shutil.rmtree(bench.root / "task")
            found = await bench.answer("break-out:1")
            assert {name for name, outcome in found.items() if outcome == "done"} == {
                "thread", "signal self", "read model", "write output", "rename output", "write private",
            }, found  # fmt: skip
            await bench.executor.close()

    def test_what_a_task_needs_is_handed_over(self, tmp_path: Path) -> None:
        """Folders of the task become the user's, files stay the server's and readable, folders above let it through."""
        model = tmp_path / "task" / "model" / "weights"
        model.mkdir(parents=True)
        (model / "a.bin").touch(0o600)
        WorkerUser(60_601, 60_600).hand_over(tmp_path, [tmp_path / "task" / "model"])
        assert (model.stat().st_uid, model.parent.stat().st_uid) == (60_601, 60_601)
        assert ((model / "a.bin").stat().st_uid, stat.S_IMODE((model / "a.bin").stat().st_mode)) == (0, 0o444)
        above = (tmp_path / "task").stat()
        assert (above.st_uid, above.st_gid, stat.S_IMODE(above.st_mode)) == (0, 60_600, 0o710)


class TestWhatStandsInAUsersWay:
    def test_a_folder_on_the_way_to_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The folder and its mode are named, and what lies below it; its owner may pass."""
        for folder in tmp_path.parents:
            if not folder.stat().st_mode & 0o1:
                pytest.skip(f"others may not pass through {folder}")
        tmp_path.chmod(0o755)
        closed = tmp_path / "closed"
        site = closed / "site"
        site.mkdir(parents=True)
        closed.chmod(0o700)
        monkeypatch.setattr(sys, "path", [str(site)])
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
        monkeypatch.setattr(os, "__file__", str(tmp_path / "os.py"))
        found = barrier(WorkerUser(60_601, 60_600), tmp_path)
        assert found.startswith(f"others may not pass through {closed} (mode 0700), and Python needs {site}")
        assert barrier(WorkerUser(os.getuid(), 60_600), tmp_path) == ""
        monkeypatch.setattr(sys, "path", [])
        assert "the data folder lies below it" in barrier(WorkerUser(60_601, 60_600), site)


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
            "from modelpress_server.sandbox.confinement import Sandbox\n"
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
        program = seccomp.filter_program(machine, pid=4711)
        assert len(program) < 4096
        for index, (code, if_true, if_false, constant) in enumerate(program):
            struct.pack("=HBBI", code, if_true, if_false, constant)
            if code & 0x07 == 0x05:
                assert index + 1 + max(if_true, if_false) < len(program)
        assert program[-1][0] == 0x06
