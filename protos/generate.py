"""Generates what the protos take from the engine, and the Python stubs of all .proto files; or checks them.

    python protos/generate.py           write them
    python protos/generate.py --check   exit 1 where a committed file differs from what would be written
    python protos/generate.py --lint    run `buf lint`

Of the engine are the enum of formats and the modules that tell a file's format: so the client tells it as the engine
does, without the engine.

The generator of the stubs is an older grpcio-tools on purpose: stubs refuse runtimes older than their generator, so the
generator's version is the floor of `grpcio` and `protobuf` in pyproject.toml.
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

from format_messages import COMMON, write_formats

ROOT = Path(__file__).resolve().parent
GENERATED = (
    *(COMMON, "modelpress_protos/errors.py", "modelpress_protos/formats/*.py"),
    *("**/*_pb2.py", "**/*_pb2.pyi", "**/*_pb2_grpc.py", "**/*_pb2_grpc.pyi"),
)


def common_protos() -> Path:
    """Folder that holds google/rpc/status.proto (package googleapis-common-protos)."""
    from google.rpc import status_pb2

    return Path(status_pb2.__file__).parent.parent.parent


def sources(root: Path = ROOT) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))


def copy_sources(root: Path) -> None:
    """Copies all .proto files below `root`."""
    for name in sources():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)


def generate(root: Path) -> None:
    """Writes all generated files below `root`, where the .proto files are."""
    from grpc_tools import protoc

    write_formats(root)
    include = [f"-I{root}", f"-I{files('grpc_tools') / '_proto'}", f"-I{common_protos()}"]
    services = [name for name in sources(root) if name.endswith("_service.proto")]
    runs = [
        [f"--python_out={root}", f"--mypy_out={root}", *sources(root)],
        [f"--grpc_python_out={root}", f"--mypy_grpc_out={root}", *services],
    ]
    for run in runs:
        if protoc.main(["protoc", *include, *run]) != 0:
            raise SystemExit("protoc failed")


def generated(root: Path) -> dict[str, bytes]:
    """The content of every generated file below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for pattern in GENERATED for path in root.glob(pattern)}


def check() -> int:
    """0 when the committed files are what the generator writes."""
    with tempfile.TemporaryDirectory() as folder:
        copy_sources(Path(folder))
        generate(Path(folder))
        fresh = generated(Path(folder))
    committed = generated(ROOT)
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    for name in stale:
        print(f"{name} is not what protos/generate.py writes; run it and commit the result", file=sys.stderr)
    return 1 if stale else 0


def lint() -> int:
    """Runs `buf lint` in a copy that has google/rpc/status.proto beside our files, so that no registry is needed."""
    with tempfile.TemporaryDirectory() as folder:
        copy_sources(Path(folder) / "protos")
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
    parser = argparse.ArgumentParser(description="Generates what the protos take from the engine, and the stubs.")
    parser.add_argument("--check", action="store_true", help="compare with the committed files instead of writing")
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
