"""Targets: a table of devices, a backend for each, and what a new one must touch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import modelpress_compression
import numpy as np
import pytest
from modelpress_compression import Model, Recipe, compress, target
from modelpress_compression.backends import backend_of, backends_of
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.errors import InvalidRecipeError
from modelpress_compression.executor.module import device_warning
from modelpress_compression.target import DEVICES, Device, Target, measured_devices

# An imaginary runtime, which answers as onnxruntime does and counts what it was asked.
IMAGINARY = """
from dataclasses import dataclass
from modelpress_compression.backends.cpu import CPU

OPENED = []

@dataclass(frozen=True)
class Imaginary:
    label: str = "Imaginary"
    remark: str = "Imaginary computes as it likes"
    elsewhere: bool = False

    @classmethod
    def of(cls, target):
        return cls()

    def open(self, path, *, threads=1, comparable=False):
        OPENED.append(threads)
        return CPU.open(path, threads=threads, comparable=comparable)
"""
ROW = 'Device("imaginary", "Imaginary", "modelpress_compression.backends.imaginary:Imaginary", "a test."),'
JOB = """
import json, sys
from pathlib import Path
import numpy as np
from modelpress_compression import Recipe, compress, load
from modelpress_compression.backends.imaginary import OPENED
from modelpress_compression.target import measured_devices

said = []
recipe = Recipe.from_dict({"version": 1, "steps": [{"fuse": {}}], "target": {"device": "imaginary"},
                           "benchmark": {"rounds": 5, "threads": [1, 2]}})
result = compress(load(Path(sys.argv[1])), recipe, on_log=lambda severity, text: said.append(text))
rows = [[row["execution_provider"], row["threads"]] for row in result.report["latency"]]
print(json.dumps({"rows": rows, "opened": sorted(set(OPENED)), "said": said, "devices": measured_devices()}))
"""


def test_a_new_target_is_one_folder_and_one_row(tmp_path: Path, digits: Model) -> None:
    """A fifth runtime, put into a copy of the engine: recipes know it, jobs measure in it, and nothing else changed."""
    engine = tmp_path / "modelpress_compression"
    shutil.copytree(Path(modelpress_compression.__file__).parent, engine, ignore=shutil.ignore_patterns("__pycache__"))
    (engine / "backends" / "imaginary").mkdir()
    (engine / "backends" / "imaginary" / "__init__.py").write_text(IMAGINARY)
    table = engine / "target.py"
    table.write_text(table.read_text("utf-8").replace("_ROWS = (", f"_ROWS = (\n    {ROW}", 1), "utf-8")
    digits.save(tmp_path / "digits.onnx")
    ran = subprocess.run(
        [sys.executable, "-c", JOB, tmp_path / "digits.onnx"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    # Its rows stand first, since they decide; onnxruntime's stand beside them.
    both = ("Imaginary", "CPUExecutionProvider")
    assert found["rows"] == [[runtime, threads] for runtime in both for threads in (1, 2)]
    assert found["opened"] == [1, 2]
    assert "Imaginary computes as it likes" in found["said"]
    assert "imaginary" in found["devices"]


def test_devices() -> None:
    """The CPU is always there; without a GPU its target is measured on the CPU."""
    assert measured_devices()[0] == "cpu"
    assert "cuda" not in measured_devices()
    assert backends_of(Target()) == (CPU,)
    assert [backend.label for backend in backends_of(Target(device="cuda"))] == [CPU.label]
    assert device_warning("openvino") == ""


def test_a_missing_package_is_named(digits: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what installs it, before anything is done."""
    row = Device("openvino", "OpenVINO", "nowhere:Nothing", package="no_such_package", extra="openvino")
    monkeypatch.setattr(target, "DEVICES", {**DEVICES, "openvino": row})
    monkeypatch.setattr("modelpress_compression.backends.DEVICES", target.DEVICES)
    assert "openvino" not in measured_devices()
    recipe = Recipe.from_dict({"version": 1, "steps": [{"fuse": {}}], "target": {"device": "openvino"}})
    with pytest.raises(InvalidRecipeError, match=r"OpenVINO is not installed.*pip install 'modelpress\[openvino\]'"):
        compress(digits, recipe)


def test_a_package_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie there and lack a library of the system's."""
    row = Device("openvino", "OpenVINO", "no_such_module:Nothing")
    monkeypatch.setattr("modelpress_compression.backends.DEVICES", {**DEVICES, "openvino": row})
    with pytest.raises(InvalidRecipeError, match="OpenVINO cannot be loaded here: No module named 'no_such_module'"):
        backend_of(Target(device="openvino"))


def test_a_prepared_call_runs_the_model(digits: Model, tmp_path: Path) -> None:
    """On its feeds, without those that the model does not take."""
    digits.save(tmp_path / "digits.onnx")
    x = np.zeros((1, 1, 28, 28), np.float32)
    runner = CPU.open(tmp_path / "digits.onnx")
    (timed,) = runner.prepared({"x": x, "other": x})()
    (answered,) = runner.run({"x": x, "other": x}).values()
    np.testing.assert_array_equal(timed, answered)
