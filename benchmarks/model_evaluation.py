"""The evaluation scripts that lie beside the real trained models: `eval_NAME.py` judges NAME in any ONNX form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def evaluate(name: str, models: Path, *arguments: str) -> str:
    """What `eval_NAME.py` in the folder `models` prints. Raises SystemExit with its errors where it fails."""
    command = [sys.executable, f"eval_{name}.py", *arguments]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return done.stdout.strip()
