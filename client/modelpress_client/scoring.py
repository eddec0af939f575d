"""Runs a metric of the user's own on one model, in a process of its own: `python -m modelpress_client.scoring`.

The process takes the metric's name, the model's path, the evaluation's path or nothing, and the path of the file for
the answer: JSON with `score` and `lower_is_better`, or `error`. What the metric prints goes to stderr.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(arguments: list[str]) -> None:
    """Writes the answer; whatever the metric does, there is one unless the process is killed."""
    spec, model, evaluation, answer = arguments
    said = sys.stdout
    sys.stdout = sys.stderr
    try:
        found = _score(spec, model, evaluation)
    except BaseException as error:  # noqa: BLE001  # sys.exit in a metric as well
        found = {"error": _described(error)}
    finally:
        sys.stdout = said
    Path(answer).write_text(json.dumps(found), "utf-8")


def _score(spec: str, model: str, evaluation: str) -> dict[str, Any]:
    function = _function(spec)
    value = function(model, _arrays(evaluation))
    try:
        score = None if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        score = None
    if score is None:
        return {"error": f"it returned {value!r:.80}, a {type(value).__name__}; it must return a number"}
    if not math.isfinite(score):
        return {"error": f"it returned {score}; it must return a finite number"}
    return {"score": score, "lower_is_better": bool(getattr(function, "lower_is_better", False))}


def _function(spec: str) -> Callable[..., Any]:
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).resolve()
        sys.path.insert(0, str(path.parent))  # what stands beside it may be imported, as when it is run
        made = importlib.util.spec_from_file_location(path.stem, path)
        if made is None or made.loader is None:
            raise ImportError(f"{place} cannot be imported")
        module = importlib.util.module_from_spec(made)
        sys.modules[path.stem] = module
        made.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(place)
    function: Callable[..., Any] = getattr(module, name)
    return function


def _arrays(evaluation: str) -> dict[str, Any] | None:
    if not evaluation:
        return None
    import numpy as np

    with np.load(evaluation, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _described(error: BaseException) -> str:
    """What was raised, and the last line of the user's own code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"it raised {type(error).__name__}: {error}{where}"


if __name__ == "__main__":
    main(sys.argv[1:])
