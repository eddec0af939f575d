"""Tasks for the executor's tests: the job's name says how the worker behaves, data_path carries an argument."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_server.worker.context import TaskContext


def preload() -> Iterator[None]:
    """Nothing to import: these workers start fast."""
    yield from ()


print("printed before the task")


def run(request: worker_pb2.WorkerRequest, context: TaskContext) -> worker_pb2.WorkerEvent:
    """Looks up the behaviour."""
    task = request.compress
    behaviour, _, argument = task.job.partition(":")
    answer = _BEHAVIOURS[behaviour](context, Path(task.output_directory), argument)
    event = worker_pb2.WorkerEvent(compressed=worker_pb2.CompressResult())
    if answer is not None:
        (Path(task.output_directory) / "answer.json").write_text(json.dumps(answer), "utf-8")
        event.compressed.artifacts.add(paths=["answer.json"])
    return event


def _describe(context: TaskContext, output: Path, argument: str) -> Any:
    Path("left-behind").write_text("in the private folder", "ascii")
    for fraction in (0.0, 0.5, 1.0):
        context.events.progress(f"stage {fraction}", int(fraction * 2), 3, fraction, f"reading {output}/model.onnx")
    context.events.log("WARNING", f"first\nsecond {output}/x")
    print(f"printed in {context.directory}/lib.py")
    print("to stderr", file=sys.stderr)
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "group": os.getpgid(0),
        "cwd": str(Path.cwd()),
        "directory": str(context.directory),
        "environment": dict(os.environ),
        "level": context.sandbox.level,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "status": Path("/proc/self/status").read_text("utf-8"),
    }


def _crash(context: TaskContext, output: Path, argument: str) -> Any:
    os.kill(os.getpid(), getattr(signal, argument))
    time.sleep(60)


def _exit(context: TaskContext, output: Path, argument: str) -> Any:
    os._exit(int(argument))


def _touch_memory(context: TaskContext, output: Path, argument: str) -> Any:
    held = []
    while True:
        held.append(bytearray(os.urandom(1024) * (16 * 1024)))
        time.sleep(0.02)


def _ask_memory(context: TaskContext, output: Path, argument: str) -> Any:
    return len(bytearray(int(argument)))


def _map_model(context: TaskContext, output: Path, argument: str) -> Any:
    with (output.parent / "model" / "model.onnx").open("rb") as file:
        maps = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) for _ in range(int(argument))]
    return sum(map(len, maps))


def _bad_alloc(context: TaskContext, output: Path, argument: str) -> Any:
    print("terminate called after throwing an instance of 'std::bad_alloc'", flush=True)
    os.abort()


def _sleep(context: TaskContext, output: Path, argument: str) -> Any:
    (output / f"sleeps-{os.getpid()}").touch()
    time.sleep(600)


def _grandchildren(context: TaskContext, output: Path, argument: str) -> Any:
    """One in the worker's group, one in a session of its own, one whose parent has ended."""
    same = subprocess.Popen(["/bin/sleep", "600"])
    other = subprocess.Popen(["/bin/sleep", "600"], start_new_session=True)
    shell = "/bin/sleep 600 >/dev/null 2>&1 & echo $!"
    orphan = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, check=True, start_new_session=True)
    (output / "pids.tmp").write_text(json.dumps([os.getpid(), same.pid, other.pid, int(orphan.stdout)]), "ascii")
    (output / "pids.tmp").rename(output / "pids")
    if argument == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if argument != "end":
        time.sleep(600)


def _garbage(context: TaskContext, output: Path, argument: str) -> Any:
    _write_raw(context, bytes.fromhex(argument))
    time.sleep(600)


def _write_raw(context: TaskContext, data: bytes) -> None:
    context.events._pipe.write(data)
    context.events._pipe.flush()


def _close_pipe(context: TaskContext, output: Path, argument: str) -> Any:
    os.close(context.events._pipe.fileno())
    time.sleep(600)


def _flood_output(context: TaskContext, output: Path, argument: str) -> Any:
    line = "x" * 200 + "\n"
    for _ in range(50_000):
        sys.stdout.write(line)
    sys.stdout.write("y" * 5_000_000)


def _flood_events(context: TaskContext, output: Path, argument: str) -> Any:
    for index in range(20_000):
        context.events.log("INFO", f"line {index}")
        progress = worker_pb2.WorkerEvent()
        progress.progress.stage = f"stage {index}"
        progress.progress.fraction = float("nan")
        context.events.send(progress)


def _large_event(context: TaskContext, output: Path, argument: str) -> Any:
    context.events.send(worker_pb2.WorkerEvent(log=worker_pb2.LogLine(text="z" * 5_000_000)))


def _bug(context: TaskContext, output: Path, argument: str) -> Any:
    raise KeyError(f"secret detail of {output}")


def _break_out(context: TaskContext, output: Path, argument: str) -> Any:
    """Tries what a sandboxed worker must not be able to do; each answer is "done" or the error."""
    task_folder = output.parent
    attempts = {
        "connect": lambda: socket.create_connection(("127.0.0.1", int(argument)), timeout=5).close(),
        "udp": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close(),
        "unix": lambda: socket.socket(socket.AF_UNIX).close(),
        "program": lambda: subprocess.run(["/bin/true"], check=True),
        "process": lambda: os._exit(0) if os.fork() == 0 else None,
        "thread": _run_thread,
        "signal parent": lambda: os.kill(os.getppid(), 0),
        "signal self": lambda: os.kill(os.getpid(), 0),
        "parent's environment": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
        "read system": lambda: Path("/etc/passwd").read_bytes(),
        "read other task": (task_folder.parent / "other-task" / "secret").read_bytes,
        "write other task": lambda: (task_folder.parent / "other-task" / "new").write_bytes(b"x"),
        "read model": (task_folder / "model" / "model.onnx").read_bytes,
        "write model": lambda: (task_folder / "model" / "model.onnx").write_bytes(b"x"),
        "write output": lambda: (output / "ok").write_bytes(b"x"),
        "rename output": lambda: (output / "ok").rename(output / "renamed"),
        "write private": lambda: (context.directory / "ok").write_bytes(b"x"),
        "link": lambda: (output / "link").symlink_to("/etc/passwd"),
        "mode of own file": lambda: (output / "renamed").chmod(0o777),
        "mode of foreign folder": lambda: (task_folder.parent / "other-task").chmod(0o700),
        "owner of foreign file": lambda: os.chown(task_folder.parent / "other-task" / "secret", os.getuid(), -1),
        "time of foreign file": lambda: os.utime(task_folder.parent / "other-task" / "secret"),
        "attribute of foreign file": lambda: os.setxattr(task_folder.parent / "other-task" / "secret", "user.x", b"x"),
        "attributes of foreign file": lambda: os.listxattr(task_folder.parent / "other-task" / "secret"),
        "watch foreign folder": _watch,
        "shared memory": _shared_memory,
        "raise limit": _raise_limit,
        "lower the parent's limit": _limit_parent,
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = type(error).__name__
        except ValueError as error:
            found[name] = type(error).__name__
    return found


def _run_thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def _watch() -> None:
    _call(ctypes.CDLL(None, use_errno=True).inotify_init1(0))


def _shared_memory() -> None:
    _call(ctypes.CDLL(None, use_errno=True).shmget(4711, 4096, 0o1666))


def _call(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")


def _stat(context: TaskContext, output: Path, argument: str) -> Any:
    """What asking for the status of a file tells."""
    try:
        return {"uid": os.getuid(), "found": Path(argument).stat().st_size}
    except OSError as error:
        return {"uid": os.getuid(), "found": type(error).__name__}


def _burn(context: TaskContext, output: Path, argument: str) -> Any:
    """Uses so many seconds of a processor."""
    until_s = time.process_time() + float(argument)
    while time.process_time() < until_s:
        pass


def _raise_limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def _limit_parent() -> None:
    import resource

    limits = resource.prlimit(os.getppid(), resource.RLIMIT_CORE)
    resource.prlimit(os.getppid(), resource.RLIMIT_CORE, limits)


def _measure(context: TaskContext, output: Path, argument: str) -> Any:
    """Measures until the file `argument` is there; tells that it has begun by a log line."""
    with context.alone():
        context.events.log("INFO", "measuring")
        while not (context.directory.parent / argument).exists():
            time.sleep(0.01)
    return {"clock": context.clock()}


def _affinity(context: TaskContext, output: Path, argument: str) -> Any:
    """The processors that it may run on before, within and after a turn, and a thread that began within."""
    found = {"before": sorted(os.sched_getaffinity(0))}
    with context.alone():
        found["within"] = sorted(os.sched_getaffinity(0))
        thread = threading.Thread(target=lambda: found.update(thread=sorted(os.sched_getaffinity(0))))
        thread.start()
        thread.join()
    return {**found, "after": sorted(os.sched_getaffinity(0))}


def _count(context: TaskContext, output: Path, argument: str) -> Any:
    """Counts in the file `argument` until it is told to stop; how much time passed on its own clock and on the wall."""
    own, wall, number = context.clock(), time.monotonic(), 0
    while not (context.directory.parent / f"{argument}.stop").exists():
        number += 1
        (context.directory.parent / argument).write_text(str(number), "ascii")
        time.sleep(0.005)
    with context.clock.held():
        pass  # what the clock has read is read again
    return {"own_s": context.clock() - own, "wall_s": time.monotonic() - wall}


_BEHAVIOURS = {
    "measure": _measure,
    "affinity": _affinity,
    "count": _count,
    "describe": _describe,
    "crash": _crash,
    "exit": _exit,
    "touch-memory": _touch_memory,
    "ask-memory": _ask_memory,
    "map-model": _map_model,
    "bad-alloc": _bad_alloc,
    "sleep": _sleep,
    "grandchildren": _grandchildren,
    "garbage": _garbage,
    "close-pipe": _close_pipe,
    "flood-output": _flood_output,
    "flood-events": _flood_events,
    "large-event": _large_event,
    "bug": _bug,
    "burn": _burn,
    "break-out": _break_out,
    "stat": _stat,
}
