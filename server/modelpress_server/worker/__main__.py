"""A worker that does its own imports: `python -m modelpress_server.worker`, started by `executors`, never by hand."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelpress_server.sandbox.worker_user import WorkerUser
from modelpress_server.worker import DEFAULT_TASKS
from modelpress_server.worker.life import Confinement, Place, imported, live


def main() -> None:
    """Runs one task."""
    parser = argument_parser("modelpress_server.worker")
    parser.add_argument("--requests-fd", type=int, required=True)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True, help="this worker's private folder")
    parser.add_argument("--user", type=WorkerUser.parse, default=None, help="UID:GID to become; empty: stay")
    arguments = parser.parse_args()
    place = Place(arguments.directory, arguments.user, arguments.requests_fd, arguments.events_fd)
    live(confinement(arguments, arguments.parent_pid), place, lambda: imported(arguments.tasks))


def argument_parser(program: str) -> argparse.ArgumentParser:
    """What all workers of a server have in common."""
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder of all private and task folders")
    parser.add_argument("--sandbox", choices=("auto", "require", "off"), required=True)
    parser.add_argument("--private", type=Path, action="append", default=[], help="what no worker may read")
    parser.add_argument("--tasks", default=DEFAULT_TASKS)
    return parser


def confinement(arguments: argparse.Namespace, parent_pid: int) -> Confinement:
    """Of a worker that `parent_pid` starts."""
    return Confinement(parent_pid, arguments.root, arguments.sandbox, tuple(arguments.private))


if __name__ == "__main__":
    main()
