"""The other tools, each in an environment of its own, and the points that they give.

An environment is made by `python -m venv` and pip in FOLDER/NAME; a tool that cannot be installed has FOLDER/NAME.log
with pip's last words. `frontier_adapters/` has the scripts that run in them; a point is made in a process of its own,
bounded in time and memory, and kept until the tool's requirements, its adapter or the model change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from quantization_cases import Prepared, file_digest
from quantization_contenders import clean
from quantization_process import Limits

ADAPTERS = Path(__file__).with_name("frontier_adapters")
INSTALL_S, LIST_S = 1800, 300
# Raise it when frontier_adapters/points.py changes what adapters make.
VERSION = 1
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """`requirements` are those that it was seen to work with; `note`: what somebody who installs it should know."""

    name: str
    label: str
    adapter: str
    requirements: tuple[str, ...]
    note: str = ""

    @property
    def script(self) -> Path:
        return ADAPTERS / self.adapter

    def key(self, digest: str) -> str:
        """Of all that its points depend on, but for the label; `digest` is that of the prepared case."""
        parts = [self.requirements, file_digest(self.script), VERSION, digest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


TOOLS = (
    Tool(
        "onnxruntime",
        "onnxruntime",
        "onnxruntime_tools.py",
        ("torch==2.13.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0", "sympy==1.14.0"),
    ),
    Tool("onnxsim", "onnxsim", "onnxsim_tool.py", ("onnxsim==0.8.1", "onnxruntime==1.31.1")),
    Tool("nncf", "NNCF", "nncf_tool.py", ("nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.31.1")),
    Tool(
        "neural_compressor",
        "neural-compressor",
        "neural_compressor_tool.py",
        ("onnx-neural-compressor==1.0", "onnx==1.16.2", "onnxruntime==1.18.1", "prettytable", "scipy", "psutil"),
        "prettytable, scipy and psutil are imported and not declared; with onnx 1.23 it does not import",
    ),
    Tool(
        "olive",
        "Olive",
        "olive_tool.py",
        ("torch==2.13.0", "olive-ai==0.13.0", "onnxruntime==1.31.1", "requests"),
        "requests is imported and not declared",
    ),
    Tool("quark", "Quark", "quark_tool.py", ("torch==2.13.0", "amd-quark==0.13", "onnxruntime==1.31.1")),
)


class NotInstalledError(Exception):
    """A tool whose environment cannot be made, or does not import it."""


@dataclass(frozen=True)
class Installed:
    """A tool with the Python of its environment and the labels of its points."""

    tool: Tool
    python: Path
    labels: tuple[str, ...]


def installed(tool: Tool, folder: Path) -> Installed:
    """Makes the environment where it is not there. Raises NotInstalledError."""
    home, log = folder / tool.name, folder / f"{tool.name}.log"
    python, done = home / "bin" / "python", home / "requirements.json"
    wanted = json.dumps(tool.requirements)
    if not (done.exists() and done.read_text("utf-8") == wanted):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        _called([str(python), "-m", "pip", "install", "--quiet", *tool.requirements], log, INSTALL_S)
        done.write_text(wanted, "utf-8")
    labels = _called([str(python), str(tool.script), "list"], log, LIST_S)
    return Installed(tool, python, tuple(json.loads(labels.splitlines()[-1])))


def _called(command: list[str], log: Path, timeout_s: float) -> str:
    """What the command prints. Raises NotInstalledError with its last words."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s, env=_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise NotInstalledError(f"still at it after {timeout_s} s") from error
    log.write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode:
        raise NotInstalledError(_last_words(done.stderr))
    return done.stdout


def _environment() -> dict[str, str]:
    """One thread, and nothing of ours on the path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}


def _last_words(text: str) -> str:
    """The line that says what was wrong, of a traceback or of pip."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line.split(":")[0] or line.startswith("ERROR")]
    words = (told or lines or ["it said nothing"])[-1]
    return words.replace(str(Path.home()), "~")[:300]


def inputs_of(prepared: Prepared) -> tuple[Path, Path]:
    """The model and the calibration inputs as adapters take them: see frontier_adapters/points.py."""
    model, calibration = prepared.folder / "clean.onnx", prepared.folder / "feeds.npz"
    if not calibration.exists():
        clean(prepared.model, model)
        feeds = list(prepared.calibration().feeds(1))
        np.savez(calibration, **{name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]})
    return model, calibration


def made_by(one: Installed, prepared: Prepared, limits: Limits, without: Sequence[str] = ()) -> list[Outcome]:
    """All points of a tool; those that the cache does not have are made, but for those `without`, as TOOL:POINT. See
    frontier_adapters/points.py."""
    folder, key = _folder(prepared, one.tool), one.tool.key(prepared.digest)
    made = folder / "made.json"
    if not (made.exists() and made.read_text("utf-8") == key):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made.write_text(key, "utf-8")
    (folder / "points.json").write_text(json.dumps(one.labels), "utf-8")
    done = {outcome["name"] for outcome in _kept(prepared, one.tool)}
    missing = [label for label in one.labels if label not in done and f"{one.tool.name}:{label}" not in without]
    if missing:
        make(one, *inputs_of(prepared), folder, limits, missing)
    return _kept(prepared, one.tool)


def make(
    one: Installed, model: Path, calibration: Path, folder: Path, limits: Limits, labels: Sequence[str]
) -> list[Outcome]:
    """These points of a tool, in a folder that is there: see frontier_adapters/points.py. All outcomes of the folder,
    each with its `file`."""
    bounds = [str(limits.timeout_s), str(limits.memory_bytes)]
    command = [str(one.python), str(one.tool.script), str(model), str(calibration), str(folder), *bounds, *labels]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, env=_environment(), check=False)
    return _outcomes(folder)


def _folder(prepared: Prepared, tool: Tool) -> Path:
    return prepared.folder / "front" / tool.name


def _kept(prepared: Prepared, tool: Tool) -> list[Outcome]:
    return [outcome | {"tool": tool.name} for outcome in _outcomes(_folder(prepared, tool))]


def _outcomes(folder: Path) -> list[Outcome]:
    found: list[Outcome] = []
    for path in sorted(folder.glob("*/outcome.json")):
        found.append(json.loads(path.read_text("utf-8")) | {"file": str(path.parent / "model.onnx")})
    return found


def not_made(prepared: Prepared) -> dict[str, list[str]]:
    """Points that a tool has and the cache does not, by tool: those that were left out."""
    found = {}
    for tool in TOOLS:
        listed = _folder(prepared, tool) / "points.json"
        if listed.exists():
            done = {outcome["name"] for outcome in _kept(prepared, tool)}
            found[tool.name] = [label for label in json.loads(listed.read_text("utf-8")) if label not in done]
    return {name: labels for name, labels in found.items() if labels}


def kept_outcomes(prepared: Prepared) -> list[Outcome]:
    """All points of the tools that the cache has."""
    return [outcome for tool in TOOLS for outcome in _kept(prepared, tool)]
