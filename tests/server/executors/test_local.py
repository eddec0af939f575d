"""The embedded executor with real worker processes: how tasks end, and what is left of them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2
from manual_clock import ManualClock
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_server.errors import StorageFullError
from modelpress_server.executors import local
from modelpress_server.executors.base import Figures, Limits, WorkerLostError, WorkerUnavailableError
from modelpress_server.executors.output import MAX_LINE_CHARS, MAX_LINES
from server_harness import until

MIB = 1024 * 1024
FAKE_TASKS = Path(__file__).with_name("fake_tasks.py").read_text("utf-8")
# Goes behind what fake_tasks.py holds.
THREADED = "\n\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
# What the zygote imports between requests.
THREADED_LATER = """

def preload():
    yield
    threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
LACKING_LATER = """

def preload():
    yield
    import no_such_module
"""
BOTH_WAYS = pytest.mark.parametrize("fork", [True, False], ids=["fork", "exec"])


def runs(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def reason_of(event: worker_pb2.WorkerEvent) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of a failure, which must be its only detail."""
    (detail,) = event.failed.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    return info


class TestATaskThatEndsWell:
    async def test_its_worker_is_counted(self, start_bench: Any) -> None:
        """Started once, busy while the task runs, and gone afterwards."""
        bench = await start_bench()
        assert bench.executor.figures() == Figures()
        busy: list[int] = []
        run = asyncio.create_task(bench.answer("describe"))
        while not run.done():
            busy.append(len(bench.executor.figures().pids))
            await asyncio.sleep(0.005)
        await run
        assert max(busy) == 1
        assert bench.executor.figures() == Figures(starts=1)

    @BOTH_WAYS
    async def test_its_events_come_in_order_without_paths(self, start_bench: Any, fork: bool) -> None:
        """Progress, log lines and printed lines arrive; folders of this machine are taken out of every text."""
        bench = await start_bench(fork=fork)
        await bench.answer("describe")
        progress = [event.progress for event in bench.events if event.WhichOneof("event") == "progress"]
        assert [item.stage for item in progress] == ["start_worker", "stage 0.0", "stage 0.5", "stage 1.0"]
        assert [item.fraction for item in progress] == [0.0, 0.0, 0.5, 1.0]
        assert progress[1].message == "reading model.onnx"
        assert {"first", "second x", "printed in lib.py", "to stderr"} <= set(bench.lines)
        assert "printed before the task" not in bench.lines

    @BOTH_WAYS
    async def test_the_environment_is_empty(
        self, start_bench: Any, monkeypatch: pytest.MonkeyPatch, fork: bool
    ) -> None:
        """A worker sees neither the server's settings nor its tokens."""
        monkeypatch.setenv("COMPRESS_SERVER_TOKEN", "secret")
        answer = await (await start_bench(fork=fork)).answer("describe")
        assert set(answer["environment"]) == {
            "PATH", "LANG", "HOME", "TMPDIR", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "OPENBLAS_NUM_THREADS",
            "ORT_DISABLE_TELEMETRY",
        }  # fmt: skip
        assert answer["environment"]["TMPDIR"] == answer["environment"]["HOME"] == answer["directory"]

    @BOTH_WAYS
    async def test_it_has_no_powers(self, start_bench: Any, fork: bool) -> None:
        """No capabilities, no way to new ones; no descriptors but its own: 0, 1, 2, two pipes, and the listing's."""
        answer = await (await start_bench(fork=fork)).answer("describe")
        status = dict(line.split(":\t", 1) for line in answer["status"].splitlines())
        assert status["NoNewPrivs"].strip() == "1"
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert answer["descriptors"] == 6

    @BOTH_WAYS
    async def test_its_private_folder_is_removed(self, start_bench: Any, fork: bool) -> None:
        """What it wrote beside its artifacts is gone when `run` returns, and so is the process."""
        bench = await start_bench(fork=fork)
        answer = await bench.answer("describe")
        assert answer["directory"].startswith(str(bench.root))
        assert list(bench.root.glob("worker-*")) == []
        assert not runs(answer["pid"])

    @BOTH_WAYS
    async def test_a_process_that_it_started_does_not_outlive_it(self, start_bench: Any, fork: bool) -> None:
        """A task that ends well cannot leave anything running."""
        bench = await start_bench(fork=fork)
        await bench.run("grandchildren:end")
        pids = json.loads((bench.output / "pids").read_text("ascii"))
        assert pids
        for pid in pids:
            await until(lambda pid=pid: not runs(pid))

    async def test_task_files_outside_the_root_are_refused(self, start_bench: Any) -> None:
        """A worker could not read them; the mistake shows at once."""
        bench = await start_bench()
        request = worker_pb2.WorkerRequest(inspect=worker_pb2.InspectTask())
        request.inspect.model.directory = "/etc"
        with pytest.raises(ValueError, match="not below"):
            await bench.executor.run(request, limits=Limits(1.0, 0), on_event=bench.events.append)


class TestATaskThatFails:
    async def test_an_unexpected_error_gives_an_incident(
        self, start_bench: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The user gets an id; the traceback stands under it in the server's log and nowhere else."""
        bench = await start_bench()
        with caplog.at_level(logging.ERROR):
            event = await bench.run("bug")
        info = reason_of(event)
        assert info.reason == "INTERNAL"
        assert info.metadata["incident"] in event.failed.message
        assert "secret" not in str(event) + "".join(bench.lines)
        assert info.metadata["incident"] in caplog.text
        assert "KeyError" in caplog.text

    async def test_a_message_over_the_limit_fails_the_task(self, start_bench: Any) -> None:
        """A worker does not send what the server would refuse; the task fails as a bug of ours."""
        bench = await start_bench()
        assert reason_of(await bench.run("large-event")).reason == "INTERNAL"

    async def test_a_too_large_allocation_fails_inside_the_worker(self, start_bench: Any) -> None:
        """A claim of 200 GiB is refused by the kernel's cap, and reported as lack of memory."""
        bench = await start_bench()
        event = await bench.run(f"ask-memory:{200 * 1024**3}", Limits(600.0, 1024 * MIB))
        assert reason_of(event).reason == "WORKER_OUT_OF_MEMORY"

    async def test_the_mapped_weights_of_a_large_model_are_no_memory(self, start_bench: Any) -> None:
        """The kernel counts files that are mapped for writing, as onnxruntime maps them; the cap leaves room for it."""
        bench = await start_bench()
        event = await bench.run("map-model:4", Limits(600.0, 64 * MIB), bytes(256 * MIB))
        assert event.WhichOneof("event") == "compressed", event


class TestAWorkerThatIsLost:
    @pytest.mark.parametrize(
        ("job", "said"),
        [
            ("crash:SIGSEGV", "SIGSEGV"),
            ("crash:SIGKILL", "SIGKILL"),
            ("exit:0", "status 0"),
            ("exit:7", "status 7"),
            ("garbage:ffffffff", "protocol"),  # a frame of 4 GiB
            ("garbage:00000004ffffffff", "protocol"),  # no message
            ("garbage:00000000", "protocol"),  # an empty event
            ("garbage:000000020a00", "protocol"),  # Ready in the middle of a task
            ("close-pipe", "protocol"),
        ],
    )
    async def test_a_crash_says_how(self, start_bench: Any, job: str, said: str) -> None:
        """Death by signal, early exit and a broken protocol are crashes; the message says which."""
        bench = await start_bench()
        with pytest.raises(WorkerLostError, match=said) as caught:
            await bench.run(job)
        assert caught.value.reason == "WORKER_CRASHED"

    async def test_a_crash_takes_everything_below_it_along(self, start_bench: Any) -> None:
        """What the worker's group holds is killed after a crash too."""
        bench = await start_bench()
        with pytest.raises(WorkerLostError, match="SIGSEGV"):
            await bench.run("grandchildren:crash")
        _, same_group, *_ = json.loads((bench.output / "pids").read_text("ascii"))
        await until(lambda: not runs(same_group))

    async def test_memory_in_use_over_the_limit_kills(self, start_bench: Any) -> None:
        """A worker that takes more and more is stopped by the watchdog."""
        bench = await start_bench()
        with pytest.raises(WorkerLostError, match=r"0\.2 GiB") as caught:
            await bench.run("touch-memory", Limits(600.0, 200 * MIB))
        assert caught.value.reason == "WORKER_OUT_OF_MEMORY"

    async def test_a_library_that_aborts_for_lack_of_memory(self, start_bench: Any) -> None:
        """An abort after std::bad_alloc is no crash of unknown cause."""
        bench = await start_bench()
        with pytest.raises(WorkerLostError) as caught:
            await bench.run("bad-alloc", Limits(600.0, 1024 * MIB))
        assert caught.value.reason == "WORKER_OUT_OF_MEMORY"

    async def test_time_over_the_limit_kills(self, start_bench: Any, clock: ManualClock) -> None:
        """A task that does not end is stopped, and its process with it."""
        bench = await start_bench(clock=clock)
        task = asyncio.create_task(bench.run("sleep", Limits(50.0, 0)))
        (pid,) = await until(bench.sleepers)
        clock.advance(49.0)
        assert runs(pid)
        clock.advance(1.0)
        with pytest.raises(WorkerLostError, match="50 s") as caught:
            await task
        assert caught.value.reason == "WORKER_TIMEOUT"
        assert not runs(pid)

    async def test_a_worker_that_does_not_start(self, start_bench: Any, caplog: pytest.LogCaptureFixture) -> None:
        """The scheduler hears that none could be started; the server's log has the worker's own words."""
        bench = await start_bench(tasks="no_such_module_of_tasks")
        with pytest.raises(WorkerUnavailableError, match="could not be started"):
            await bench.run("describe")
        with pytest.raises(WorkerUnavailableError):
            await bench.executor.try_start()
        assert "no_such_module_of_tasks" in caplog.text


class TestCancelling:
    @BOTH_WAYS
    async def test_it_kills_the_whole_tree_at_once(self, start_bench: Any, fork: bool) -> None:
        """Cancelling the awaiting task ends the worker, its children, and those that left its group."""
        bench = await start_bench(fork=fork)
        task = asyncio.create_task(bench.run("grandchildren"))
        await until((bench.output / "pids").exists)
        pids = json.loads((bench.output / "pids").read_text("ascii"))
        assert all(runs(pid) for pid in pids)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not runs(pids[0])
        for pid in pids[1:]:
            await until(lambda pid=pid: not runs(pid))

    async def test_before_the_worker_is_ready(self, start_bench: Any) -> None:
        """A task that is cancelled while its worker starts leaves no process and no folder."""
        bench = await start_bench()
        task = asyncio.create_task(bench.run("sleep"))
        await until(lambda: list(bench.root.glob("worker-*")))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not list(bench.root.glob("worker-*")))

    @BOTH_WAYS
    async def test_closing_ends_what_runs(self, start_bench: Any, fork: bool) -> None:
        """After `close` the task has ended as a crash and its process is gone."""
        bench = await start_bench(fork=fork)
        task = asyncio.create_task(bench.run("sleep"))
        (pid,) = await until(bench.sleepers)
        await bench.executor.close()
        with pytest.raises(WorkerLostError):
            await task
        assert not runs(pid)


class TestAWorkerThatTalksTooMuch:
    async def test_printed_output_is_cut(self, start_bench: Any) -> None:
        """A flood of output neither blocks the worker nor fills the log, and the log says that it was cut."""
        bench = await start_bench()
        event = await bench.run("flood-output")
        assert event.WhichOneof("event") == "compressed"
        assert len(bench.lines) <= MAX_LINES
        assert max(map(len, bench.lines)) <= MAX_LINE_CHARS
        assert "wrote too much" in bench.lines[-1]

    async def test_events_are_rationed(self, start_bench: Any) -> None:
        """Log lines and progress by the ten thousand are left out; a share that is no number becomes zero."""
        bench = await start_bench()
        await bench.run("flood-events")
        progress = [event for event in bench.events[1:] if event.WhichOneof("event") == "progress"]
        assert len(bench.lines) <= MAX_LINES
        assert len(progress) <= MAX_LINES
        assert {event.progress.fraction for event in progress} == {0.0}


class TestForking:
    async def test_workers_come_from_one_process(self, start_bench: Any) -> None:
        """Each task has a process, a session and a folder of its own; they have one parent, which is not the server."""
        bench = await start_bench(fork=True)
        found = [await bench.answer("describe") for _ in range(2)]
        assert found[0]["pid"] != found[1]["pid"]
        assert found[0]["directory"] != found[1]["directory"]
        assert found[0]["parent"] == found[1]["parent"] != os.getpid()
        assert all(answer["session"] == answer["group"] == answer["pid"] for answer in found)
        assert [answer["cwd"] for answer in found] == [answer["directory"] for answer in found]

    async def test_tasks_side_by_side(self, start_bench: Any) -> None:
        """None waits for another to end, and the end of one harms no other."""
        bench = await start_bench(fork=True)
        tasks = [asyncio.create_task(bench.run("sleep")) for _ in range(3)]
        pids = await until(lambda: len(bench.sleepers()) == 3 and bench.sleepers())
        os.kill(pids[0], signal.SIGSEGV)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert sorted(runs(pid) for pid in pids) == [False, True, True]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not any(runs(pid) for pid in pids)

    async def test_a_zygote_that_dies(self, start_bench: Any) -> None:
        """Its workers end with it, which is not their tasks' fault; the next task has another one."""
        bench = await start_bench(fork=True)
        before = await bench.answer("describe")
        task = asyncio.create_task(bench.run("sleep"))
        (pid,) = await until(bench.sleepers)
        os.kill(before["parent"], signal.SIGKILL)
        with pytest.raises(WorkerLostError) as caught:
            await task
        assert not caught.value.own
        await until(lambda: not runs(pid))
        assert (await bench.answer("describe"))["parent"] not in (before["parent"], os.getpid())

    async def test_a_second_thread_forbids_it(
        self, start_bench: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where an import starts one, workers do their own imports, and the log says so once."""
        threaded = tmp_path / "threaded_tasks.py"
        threaded.write_text(FAKE_TASKS + THREADED, "utf-8")
        bench = await start_bench(fork=True, tasks=str(threaded))
        assert [(await bench.answer("describe"))["parent"] for _ in range(2)] == [os.getpid()] * 2
        assert caplog.text.count("workers cannot be forked here") == 1
        assert "there are 2 threads" in caplog.text

    @pytest.mark.parametrize(
        ("later", "why"), [(THREADED_LATER, "there are 2 threads"), (LACKING_LATER, "no_such_module")]
    )
    async def test_imports_between_requests(
        self, start_bench: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, later: str, why: str
    ) -> None:
        """They begin with the second one; where they forbid forking, what runs goes on, and the log says so once."""
        tasks = tmp_path / "later_tasks.py"
        tasks.write_text(FAKE_TASKS + later, "utf-8")
        bench = await start_bench(fork=True, tasks=str(tasks))
        running = [asyncio.create_task(bench.run("sleep")) for _ in range(2)]
        pids = await until(lambda: len(bench.sleepers()) == 2 and bench.sleepers())
        await asyncio.sleep(0.2)  # between two requests
        if later == THREADED_LATER:  # the other kind of worker fails with such imports as well
            assert (await bench.answer("describe"))["parent"] == os.getpid()
        else:
            with pytest.raises(WorkerUnavailableError):
                await bench.run("describe")
        assert not bench.executor._starter.ready
        assert all(runs(pid) for pid in pids)
        assert caplog.text.count("workers cannot be forked here") == 1
        assert why in caplog.text
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def test_imports_that_fail(self, start_bench: Any, caplog: pytest.LogCaptureFixture) -> None:
        """No worker can be started, and the log says why; each try is a new one."""
        bench = await start_bench(fork=True, tasks="no_such_module_of_tasks")
        for _ in range(2):
            with pytest.raises(WorkerUnavailableError, match="could not be started"):
                await bench.run("describe")
        assert "no_such_module_of_tasks" in caplog.text
        assert bench.executor.figures().failed_starts == 2

    async def test_no_process_for_another_worker(self, start_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the kernel says to the zygote is what the scheduler hears; the next one may go well."""
        bench = await start_bench(fork=True, first_uid=0)
        await bench.answer("describe")
        zygote = bench.executor._starter._zygote
        resource.prlimit(zygote._process.pid, resource.RLIMIT_NOFILE, (3, 4096))
        with pytest.raises(WorkerUnavailableError):
            await bench.run("describe")
        resource.prlimit(zygote._process.pid, resource.RLIMIT_NOFILE, (4096, 4096))
        await bench.answer("describe")
        assert bench.executor._starter._zygote is zygote


class TestStarting:
    async def test_folders_of_an_earlier_server_are_removed(self, start_bench: Any, tmp_path: Path) -> None:
        """What a killed server left is cleaned up; other folders stay."""
        (tmp_path / "work-0" / "worker-old" / "deep").mkdir(parents=True)
        (tmp_path / "work-0" / "task-of-someone").mkdir()
        bench = await start_bench()
        assert [path.name for path in bench.root.iterdir()] == ["task-of-someone"]


class TestAFullDisk:
    @pytest.mark.parametrize("job", ["crash:SIGBUS", "bug"])
    async def test_it_is_blamed_for_what_fails_on_it(
        self, start_bench: Any, monkeypatch: pytest.MonkeyPatch, job: str
    ) -> None:
        """Whatever the task says: a file that was cut short looks like a bad one. With room, it is the task's fault."""
        bench = await start_bench()
        monkeypatch.setattr(local, "disk_is_full", lambda folder: folder == bench.root)
        with pytest.raises(StorageFullError):
            await bench.run(job)


class TestWhatItTook:
    async def test_processor_time_is_told(self, start_bench: Any) -> None:
        """Once for each task, whatever its end; what it used before the task does not count."""
        bench = await start_bench()
        await bench.run("burn:0.3")
        (used,) = [event.used for event in bench.events if event.HasField("used")]
        assert used.cpu_seconds >= 0.25
        bench.events.clear()
        with pytest.raises(WorkerLostError):
            await bench.run("crash:SIGSEGV")
        assert [event.HasField("used") for event in bench.events].count(True) == 1
