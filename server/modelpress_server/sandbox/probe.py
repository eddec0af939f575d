"""What confinement this machine gives a worker: confines itself as a worker would, and tries to break out.

    python -m modelpress_server.sandbox.probe MODE USER PARENT_PID DIRECTORY [PRIVATE ...]

USER is UID:GID, or empty for the server's own. DIRECTORY is an empty folder of the user; the caller removes it.
PRIVATE: what no worker may read. Prints {"level": ..., "fault": why it is not higher, "unreadable": parts of the Python
installation that the user cannot read}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from modelpress_server.sandbox.confinement import LEVEL_ALWAYS, LEVEL_FILES_AND_NETWORK, Sandbox, can_read
from modelpress_server.sandbox.worker_user import WorkerUser


def probe(sandbox: Sandbox, parent_pid: int, directory: Path, private: list[Path]) -> tuple[int, str]:
    """The level that was reached and holds, and why it is not higher; this process stays confined."""
    secret, own = directory / "secret", directory / "own"
    sandbox.enter(parent_pid, [directory])
    secret.write_text("readable", "ascii")
    own.mkdir()
    sandbox.close_calls(private)
    sandbox.narrow([], [own])
    if sandbox.level >= LEVEL_FILES_AND_NETWORK and can_read(secret):
        return LEVEL_ALWAYS, "a worker can read another task's files"
    return sandbox.level, sandbox.fault


def main() -> None:
    """Prints what was found."""
    mode, user, parent_pid, directory, *private = sys.argv[1:]
    installation = [sys.executable, *(entry for entry in sys.path if Path(entry).exists())]
    sandbox = Sandbox(mode, WorkerUser.parse(user))
    level, fault = probe(sandbox, int(parent_pid), Path(directory), [Path(path) for path in private])
    unreadable = [entry for entry in installation if not os.access(entry, os.R_OK)]
    print(json.dumps({"level": level, "fault": fault, "unreadable": unreadable}), flush=True)  # the answer


if __name__ == "__main__":
    main()
