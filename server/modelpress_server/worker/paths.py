"""Paths of this machine: those that a task touches, and how they are taken out of texts that a user will see."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from modelpress_protos.internal.v1 import worker_pb2


def task_paths(request: worker_pb2.WorkerRequest) -> tuple[list[Path], list[Path]]:
    """What a task reads, and what it writes: files or folders."""
    if request.WhichOneof("task") == "compress":
        task = request.compress
        readable = [task.model.directory, task.data_path, task.eval_path, task.known_directory]
        writable = [task.output_directory, task.found_directory]
    else:
        readable, writable = [request.inspect.model.directory], []
    return [Path(path) for path in readable if path], [Path(path) for path in writable if path]


def model_directory(request: worker_pb2.WorkerRequest) -> Path:
    """The folder of the model's files."""
    task = request.compress if request.WhichOneof("task") == "compress" else request.inspect
    return Path(task.model.directory)


class Redactor:
    """Removes folders from texts: `/srv/data/work/model.onnx` becomes `model.onnx`.

    Exceptions and libraries like to name files. Only known folders are taken out: a pattern for "any path" would eat
    the names of ONNX nodes, which look the same (`/layer1/conv1/Conv`).
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]]) -> None:
        python = {sys.prefix, sys.base_prefix, *(entry for entry in sys.path if Path(entry).is_absolute())}
        found = {os.path.normpath(folder) for folder in (*(os.fspath(folder) for folder in folders), *python)}
        resolved = {os.path.realpath(folder) for folder in found}
        # "/usr" as prefix of a Python installation is no secret, but taking it out would maim harmless texts less than
        # it would help; "/" must never be taken out.
        longest_first = sorted((found | resolved) - {"/", "."}, key=len, reverse=True)
        self._pattern = re.compile("|".join(f"{re.escape(folder)}(?:/|(?![\\w.-]))" for folder in longest_first))

    def __call__(self, text: str) -> str:
        return self._pattern.sub("", text)
