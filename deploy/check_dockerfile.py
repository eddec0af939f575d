"""Carries out the Dockerfile without a Docker engine: every RUN line in order, then the server as the image starts it.

    sudo python3 deploy/check_dockerfile.py [--python /usr/bin/python3] [--build-arg TORCH_SPEC=...]

Each stage is an overlay over this machine's own files, in a mount namespace of its own: nothing is left behind. This
machine's Python stands in for the base image's. Needs Linux, root, unshare and setpriv.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
INSIDE = "MODELPRESS_CHECK_FOLDER"  # set where the script runs in its own namespace
HEALTHY_WITHIN_S = 60
STOPPED_WITHIN_S = 30


@dataclass
class Stage:
    """One stage: its folder (the merged root), and what ENV, WORKDIR and so on have set."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": BASE_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    last: dict[str, str] = field(default_factory=dict)

    def expand(self, text: str) -> str:
        """Fills in $NAME and ${NAME}."""
        known = {**self.arguments, **self.environment}
        return re.sub(r"\$\{?(\w+)\}?", lambda match: known.get(match[1], ""), text)

    def command(self, arguments: list[str]) -> list[str]:
        """A command line that runs in the stage as its user."""
        uid, gid = self.user.split(":")
        confined = ["--no-new-privs", "--bounding-set=-all"] if uid != "0" else []
        inside = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *confined]
        return [
            "chroot",
            str(self.folder),
            "sh",
            "-c",
            f'cd {shlex.quote(self.workdir)} && exec "$@"',
            "sh",
            *inside,
            *arguments,
        ]

    def variables(self) -> dict[str, str]:
        """The environment of a command; PIP_* of this machine comes along, so that its mirrors are used."""
        pip = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        return {"HOME": "/root", **pip, **self.arguments, **self.environment}


def instructions(text: str) -> list[tuple[str, str]]:
    """`(INSTRUCTION, rest)` of each line, continuations joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(match[1].upper(), match[2].strip()) for match in re.finditer(r"^(\w+)\s+(.+)$", joined, re.MULTILINE)]


def mount_stage(folder: Path, python: str) -> Stage:
    """A fresh overlay over /, with the devices and /proc of this machine and an empty /tmp."""
    for name in ("upper", "work", "merged"):
        (folder / name).mkdir(parents=True)
    merged = folder / "merged"
    layers = f"lowerdir=/,upperdir={folder / 'upper'},workdir={folder / 'work'}"
    run(["mount", "-t", "overlay", "overlay", "-o", layers, str(merged)])
    run(["mount", "-t", "proc", "proc", str(merged / "proc")])
    for name in ("dev", "sys"):
        run(["mount", "--rbind", f"/{name}", str(merged / name)])
    run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(merged / "tmp")])
    link = merged / "usr/local/bin/python"
    link.unlink(missing_ok=True)
    link.symlink_to(python)
    return Stage(merged)


def run(arguments: list[str], **options: object) -> None:
    """Runs a command; raises SystemExit when it fails."""
    code = subprocess.run(arguments, check=False, **options).returncode  # type: ignore[call-overload]
    if code != 0:
        raise SystemExit(f"failed with {code}: {shlex.join(arguments)}")


def copy(stage: Stage, stages: dict[str, Stage], rest: str) -> None:
    """COPY, from the repository or from another stage; the contents of a folder go into the target folder."""
    words = shlex.split(rest)
    source_root = ROOT
    if words[0].startswith("--from="):
        source_root = stages[words.pop(0).removeprefix("--from=")].folder
    *sources, target = words
    destination = (
        stage.folder / target.lstrip("/") if target.startswith("/") else stage.folder / stage.workdir[1:] / target
    )
    for name in sources:
        source = source_root / name.lstrip("/")
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__") if source_root == ROOT else None
            shutil.copytree(source, destination, symlinks=True, dirs_exist_ok=True, ignore=ignored)
        else:
            shutil.copy2(source, destination)


def build(text: str, overrides: dict[str, str], folder: Path, python: str) -> Stage:
    """Carries out all stages and returns the last."""
    stages: dict[str, Stage] = {}
    stage = Stage(Path("/"))
    for name, rest in instructions(text):
        if name == "FROM":
            stage = mount_stage(folder / f"stage-{len(stages)}", python)
            stages[rest.split(" AS ")[-1] if " AS " in rest else "last"] = stage
        elif name == "ARG":
            key, _, value = rest.partition("=")
            stage.arguments[key] = overrides.get(key, "".join(shlex.split(value)))
        elif name == "ENV":
            for pair in shlex.split(rest):
                key, _, value = pair.partition("=")
                stage.environment[key] = stage.expand(value)
        elif name == "WORKDIR":
            stage.workdir = rest
            (stage.folder / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = rest
        elif name == "COPY":
            copy(stage, stages, rest)
        elif name == "RUN":
            print(f"RUN {rest}", flush=True)
            run(stage.command(["sh", "-c", rest]), env=stage.variables())
        else:
            stage.last[name] = rest
    return stage


def serve(stage: Stage) -> None:
    """Starts the entry point with a read-only root, waits until the health check passes, and stops it."""
    data, inside = stage.folder / "data", stage.folder
    run(["mount", "--bind", str(data), str(data)])
    run(["mount", "-o", "remount,bind,ro", str(inside)])  # the mount, not the file system: /data is on it as well
    environment = {**stage.variables(), "COMPRESS_SERVER_INSECURE": "true"}
    entry_point = json.loads(stage.last["ENTRYPOINT"])
    check = json.loads(stage.last["HEALTHCHECK"].partition("CMD ")[2])
    print(f"ENTRYPOINT {shlex.join(entry_point)}", flush=True)
    server = subprocess.Popen(stage.command(entry_point), env=environment)
    try:
        wait_until_healthy(stage, check, environment, server)
        run(stage.command(["compress-client", "info"]), env=environment)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(STOPPED_WITHIN_S)
    if code != 0:
        raise SystemExit(f"the server ended with {code} after SIGTERM")


def wait_until_healthy(
    stage: Stage, check: list[str], environment: dict[str, str], server: subprocess.Popen[bytes]
) -> None:
    """Runs the health check until it passes. Raises SystemExit when the server ends or the time is up."""
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while subprocess.run(stage.command(check), env=environment, capture_output=True, check=False).returncode != 0:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"the health check did not pass within {HEALTHY_WITHIN_S} s")
        time.sleep(0.5)
    print(f"HEALTHCHECK {shlex.join(check)}: passed", flush=True)


def in_own_namespace(parent: Path | None) -> int:
    """Starts this script again where its mounts are its own, and removes the layers when they are no longer mounted."""
    folder = Path(tempfile.mkdtemp(prefix="dockerfile-", dir=parent))
    try:
        again = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, *sys.argv]
        return subprocess.run(again, env={**os.environ, INSIDE: str(folder)}, check=False).returncode
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Carries out the Dockerfile without a Docker engine.")
    parser.add_argument("--python", default="/usr/bin/python3", help="stands in for the base image's Python")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--work-dir", type=Path, help="where the layers go for the time (default: the temporary folder)"
    )
    arguments = parser.parse_args()
    if INSIDE not in os.environ:
        return in_own_namespace(arguments.work_dir)
    overrides = dict(pair.split("=", 1) for pair in arguments.build_arg)
    text = (ROOT / "Dockerfile").read_text("utf-8")
    serve(build(text, overrides, Path(os.environ[INSIDE]), arguments.python))
    print("The Dockerfile's steps, its entry point and its health check work.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
