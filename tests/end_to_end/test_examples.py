"""The examples, run as they stand there against a server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "mnist" / "model.onnx"
INSTALL_S = 120
# Where Debian's packages of Go libraries are (golang-google-grpc-dev and what it needs).
GO_LIBRARIES = Path("/usr/share/gocode")
GO_PROGRAMS = ("go", "protoc-gen-go", "protoc-gen-go-grpc")


@pytest.fixture(scope="module")
def address(cli: object) -> str:
    """The server of the command line's tests."""
    return str(cli.address)  # type: ignore[attr-defined]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def runs(path: Path) -> bool:
    """Whether it is a model that runs, smaller than the one that was sent."""
    ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return path.stat().st_size < MODEL.stat().st_size


@pytest.mark.parametrize("name", ["quickstart.py", "quickstart_async.py"])
def test_python(address: str, tmp_path: Path, name: str) -> None:
    """The blocking client and the one for asyncio."""
    output = tmp_path / "small.onnx" if name == "quickstart.py" else tmp_path
    said = run(sys.executable, EXAMPLES / name, "--server", address, "--output", output, cwd=tmp_path)
    assert "times smaller" in said
    assert all(runs(path) for path in tmp_path.glob("*.onnx"))
    assert len(list(tmp_path.glob("*.onnx"))) == (1 if name == "quickstart.py" else 2)


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with what it needs. Skipped where there is no Node, or nothing can be installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("neither node nor npm is on the PATH")
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(EXAMPLES / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    try:
        done = subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not answer within {INSTALL_S} s")
    if done.returncode != 0:
        pytest.skip(f"npm cannot install here: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def test_node(address: str, node_folder: Path, tmp_path: Path) -> None:
    """Upload, watch, download, from another language: with the .proto files of this repository."""
    output = tmp_path / "small.onnx"
    protos = str(EXAMPLES.parent / "protos")
    said = run("node", "compress.js", MODEL, output, address, cwd=node_folder, MODELPRESS_PROTOS=protos)
    assert "times smaller" in said
    assert runs(output)


@pytest.fixture(scope="module")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built from the .proto files. Skipped where there is no Go, or not what the example imports."""
    if not all(shutil.which(name) for name in GO_PROGRAMS):
        pytest.skip(f"one of {', '.join(GO_PROGRAMS)} is not on the PATH")
    if not (GO_LIBRARIES / "src" / "google.golang.org" / "grpc").is_dir():
        pytest.skip("apt-get install golang-google-grpc-dev golang-github-golang-protobuf-1-5-dev")
    pytest.importorskip("grpc_tools")
    workspace = tmp_path_factory.mktemp("go")
    folder = workspace / "src" / "modelpress"
    shutil.copytree(EXAMPLES / "go", folder)
    protos = str(EXAMPLES.parent / "protos")
    compiler = f"{sys.executable} -m grpc_tools.protoc"
    run("sh", folder / "generate.sh", cwd=folder, MODELPRESS_PROTOS=protos, PROTOC=compiler)
    # Without modules: these would be fetched.
    places = {"GO111MODULE": "off", "GOPATH": f"{workspace}:{GO_LIBRARIES}", "GOCACHE": str(workspace / "cache")}
    run("go", "build", "-o", workspace / "compress", ".", cwd=folder, **places)
    return workspace / "compress"


@pytest.mark.timeout(900)
def test_go(address: str, go_program: Path, tmp_path: Path) -> None:
    """Upload, watch, download with code that protoc wrote."""
    output = tmp_path / "small.onnx"
    said = run(go_program, MODEL, output, address, cwd=tmp_path)
    assert "times smaller" in said
    assert runs(output)
