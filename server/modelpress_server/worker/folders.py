"""Which files a task touches: what the sandbox opens to it, and what is taken out of texts that a user sees."""

from __future__ import annotations

from pathlib import Path

from modelpress_protos.internal.v1 import worker_pb2


def task_folders(request: worker_pb2.WorkerRequest) -> tuple[list[Path], list[Path]]:
    """What a task reads, and what it writes: files or folders."""
    if request.WhichOneof("task") == "compress":
        task = request.compress
        readable = [task.model.directory, task.data_path, task.eval_path]
        writable = [task.output_directory]
    else:
        readable, writable = [request.inspect.model.directory], []
    return [Path(path) for path in readable if path], [Path(path) for path in writable if path]
