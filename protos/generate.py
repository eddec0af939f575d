"""Generates the Python stubs from the .proto files, or checks them.

    python protos/generate.py           write the stubs
    python protos/generate.py --check   exit 1 where a committed stub differs from what would be written
    python protos/generate.py --lint    run `buf lint`

The generator is an older grpcio-tools on purpose: stubs refuse runtimes older than their generator, so the generator's
version is the floor of `grpcio` and `protobuf` in pyproject.toml.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "modelpress_protos"
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def common_protos() -> Path:
    """Folder that holds google/rpc/status.proto (package googleapis-common-protos)."""
    from google.rpc import status_pb2

    return Path(status_pb2.__file__).parent.parent.parent


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.proto"))


def generate(out: Path) -> None:
    """Writes all stubs below `out`."""
    from grpc_tools import protoc

    well_known = str(files("grpc_tools") / "_proto")
    include = [f"-I{ROOT}", f"-I{well_known}", f"-I{common_protos()}"]
    services = [name for name in sources() if name.endswith("_service.proto")]
    runs = [
        [f"--python_out={out}", f"--mypy_out={out}", *sources()],
        [f"--grpc_python_out={out}", f"--mypy_grpc_out={out}", *services],
    ]
    for run in runs:
        if protoc.main(["protoc", *include, *run]) != 0:
            raise SystemExit("protoc failed")


def stubs(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for pattern in STUB_PATTERNS for path in root.rglob(pattern)}


def check() -> int:
    """0 when the committed stubs are what the generator writes."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = stubs(Path(folder))
    committed = stubs(ROOT)
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    for name in stale:
        print(f"{name} is not what protos/generate.py writes; run it and commit the result", file=sys.stderr)
    return 1 if stale else 0


def lint() -> int:
    """Runs `buf lint` in a copy that has google/rpc/status.proto beside our files, so that no registry is needed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "protos"
        for name in sources():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
        status = Path(folder) / "third_party/google/rpc/status.proto"
        status.parent.mkdir(parents=True)
        shutil.copyfile(common_protos() / "google/rpc/status.proto", status)
        config = (
            (ROOT / "buf.yaml")
            .read_text()
            .replace(
                "modules:\n  - path: .",
                "modules:\n  - path: protos\n  - path: third_party\n    lint: {ignore: [third_party]}",
            )
        )
        (Path(folder) / "buf.yaml").write_text(config)
        return subprocess.run(["buf", "lint"], cwd=folder, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Generates the gRPC stubs.")
    parser.add_argument("--check", action="store_true", help="compare with the committed stubs instead of writing")
    parser.add_argument("--lint", action="store_true", help="run buf lint")
    arguments = parser.parse_args()
    # protoc's plug-ins and buf lie beside the interpreter, whose folder need not be on PATH (.venv/bin/pytest).
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if arguments.lint:
        return lint()
    if arguments.check:
        return check()
    generate(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
