"""Runs `sandbox.probe` in a process of its own and reads what it found."""

from __future__ import annotations

import asyncio
import json
import os
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from modelpress_server.executors.process import child_environment, python_command
from modelpress_server.sandbox.confinement import LEVEL_ALWAYS
from modelpress_server.sandbox.worker_user import WorkerUser

PROBE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Probe:
    """The level that holds, why it is not higher, and why the user that was asked for cannot be a worker."""

    level: int
    fault: str = ""
    user_fault: str = ""


async def run_probe(mode: str, directory: Path, private: Iterable[Path], user: WorkerUser | None) -> Probe:
    """Has the sandbox tried in `directory`, an empty folder of `user`."""
    arguments = [mode, str(user or ""), str(os.getpid()), str(directory), *map(str, private)]
    command = [*python_command("modelpress_server.sandbox.probe"), *arguments]
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            env=child_environment(directory),
            cwd=directory,
        )
    except OSError as error:
        return _failed(f"{command[0]} cannot be started ({error.strerror})")
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        return _failed(f"it could not be tried within {PROBE_TIMEOUT_S:g} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        found = json.loads(output)
    except ValueError:
        return _failed(f"the try ended with status {process.returncode}: {errors.decode(errors='replace')[-500:]}")
    unreadable = ", ".join(found["unreadable"])
    return Probe(found["level"], found["fault"], f"it cannot read {unreadable}" if unreadable else "")


def _failed(why: str) -> Probe:
    return Probe(LEVEL_ALWAYS, why, why)
