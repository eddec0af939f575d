"""A confinement that silently is none: what the operator asks for and does not get."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from modelpress_server.sandbox.landlock import landlock_version
from modelpress_server.sandbox.seccomp import seccomp_supported
from modelpress_server.sandbox.worker_user import WorkerUser, barrier, may_change_user

pytestmark = pytest.mark.skipif(landlock_version() == 0, reason="this kernel has no Landlock")


def serve(data: Path, import_path: Path, *options: str) -> subprocess.Popen[str]:
    """`compress-server` with one more entry of the import path, which workers must be able to read."""
    return subprocess.Popen(
        [sys.executable, "-m", "modelpress_server", "--listen", "127.0.0.1:0", "--worker-start", "exec",
         "--data-dir", str(data), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(import_path)},
    )  # fmt: skip


@pytest.mark.parametrize("what", ["data folder", "token file"])
def test_what_workers_could_read_is_not_served_with_require(tmp_path: Path, what: str) -> None:
    """The server does not start, and says what lies where, instead of running strangers' code beside its secrets."""
    readable, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    readable.mkdir()
    tokens = (readable if what == "token file" else tmp_path) / "tokens"
    tokens.write_text("secret\n")
    data = readable / "data" if what == "data folder" else elsewhere
    process = serve(data, readable, "--sandbox", "require", "--token-file", str(tokens))
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    said = " ".join(errors.split())
    exposed = data if what == "data folder" else tokens
    assert f"{exposed} lies below {readable}, which workers must be able to read" in said.replace("│ ", "")


def test_with_auto_the_log_says_so(tmp_path: Path) -> None:
    """It serves, at level 1, and says why."""
    readable = tmp_path / "site"
    readable.mkdir()
    process = serve(readable / "data", readable)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("listening on")
    process.terminate()
    _, errors = process.communicate()
    assert "workers are confined to level 1 only" in errors
    assert f"lies below {readable}" in errors


# A worker as it is confined, and what it then can do to a file that is not its own.
TRIES = """
import errno, json, os, sys
from pathlib import Path
from modelpress_server.sandbox.confinement import Sandbox
from modelpress_server.sandbox.worker_user import WorkerUser
own, foreign, user = sys.argv[1:]
sandbox = Sandbox("require", WorkerUser.parse(user))
sandbox.enter(os.getppid(), [Path(own)])
sandbox.close_calls([Path(foreign)])
sandbox.narrow([], [Path(own)])
tries = {
    "read": lambda: open(foreign).close(), "list": lambda: os.listdir(Path(foreign).parent),
    "chmod": lambda: os.chmod(foreign, 0), "chown": lambda: os.chown(foreign, os.getuid(), -1),
    "utime": lambda: os.utime(foreign), "set attribute": lambda: os.setxattr(foreign, "user.x", b"x"),
    "get attribute": lambda: os.getxattr(foreign, "user.x"), "list attributes": lambda: os.listxattr(foreign),
    "truncate": lambda: os.truncate(foreign, 0), "remove": lambda: os.unlink(foreign),
    "move": lambda: os.rename(foreign, own + "/taken"), "hard link": lambda: os.link(foreign, own + "/linked"),
    "mode of its folder": lambda: os.chmod(Path(foreign).parent, 0), "ask for its size": lambda: os.stat(foreign),
    "ask for one that is not there": lambda: os.stat(foreign + "x"),
}
found = {}
for name, attempt in tries.items():
    try:
        attempt()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
print(json.dumps(found))
"""


@pytest.mark.skipif(not seccomp_supported(), reason="there is no seccomp table for this machine")
def test_what_a_confined_worker_can_do_to_other_tenants_files() -> None:
    """Nothing. Whether one is there it can ask only where workers have no users of their own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # not below a closed folder, as pytest's may be
        data, user = Path(name), WorkerUser(60_601, 60_600)
        own, foreign = data / "own", data / "blobs" / "foreign"
        own.mkdir()
        foreign.parent.mkdir(mode=0o700)
        foreign.write_bytes(b"of another tenant")
        separate = may_change_user() and not barrier(user, data / "own")
        if separate:
            data.chmod(0o710)
            os.chown(data, -1, user.gid)
            user.own(own)
        run = subprocess.run(
            [sys.executable, "-c", TRIES, str(own), str(foreign), str(user) if separate else ""],
            capture_output=True, text=True, check=False,
            env={"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "HOME": str(own)},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout)
        asked = {found.pop("ask for its size"), found.pop("ask for one that is not there")}
        assert set(found.values()) <= {"EPERM", "EACCES", "EXDEV"}, (
            found
        )  # the last: Landlock lets nothing change folders
        assert asked == ({"EACCES"} if separate else {"done", "ENOENT"})
        assert foreign.read_bytes() == b"of another tenant"
        assert stat.S_IMODE(foreign.parent.stat().st_mode) == 0o700
