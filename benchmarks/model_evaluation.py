"""The evaluation scripts that lie beside the real trained models: `eval_NAME.py` judges NAME in any ONNX form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from modelpress_compression import InputData, Model


def evaluate(name: str, models: Path, *arguments: str) -> str:
    """What `eval_NAME.py` in the folder `models` prints. Raises SystemExit with its errors where it fails."""
    command = [sys.executable, f"eval_{name}.py", *arguments]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return done.stdout.strip()


def representative(name: str, models: Path, model: Model, folder: Path) -> InputData:
    """The inputs that `eval_NAME.py --make-calib` writes, by way of `data.npz` in the folder, for `model`."""
    evaluate(name, models, "--make-calib", str(folder / "data.npz"))
    with np.load(folder / "data.npz") as arrays:
        names = {spec.name for spec in model.inputs}
        single = len(names) == 1
        given = {name: arrays[name] for name in arrays.files if single or name in names}
    return InputData.from_arrays(given, model.inputs)
