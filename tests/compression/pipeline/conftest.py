"""A small trained classifier with its data: the example that ships with the project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression import EvaluationData, InputData, Model, load
from modelpress_compression.measure import latency
from modelpress_compression.measure.latency import Timings
from modelpress_compression.pipeline.auto import judge
from modelpress_compression.pipeline.steps import file_size_bytes

EXAMPLE = Path(__file__).parents[3] / "examples" / "mnist"


@pytest.fixture(scope="session")
def digits() -> Model:
    """The digit classifier, x:float32[batch,1,28,28] -> ten log-probabilities."""
    return load(EXAMPLE / "model.onnx")


@pytest.fixture(scope="session")
def samples(digits: Model) -> InputData:
    """Real digits without labels."""
    with np.load(EXAMPLE / "samples.npz") as arrays:
        return InputData.from_arrays(dict(arrays), digits.inputs)


@pytest.fixture(scope="session")
def labelled(digits: Model) -> EvaluationData:
    """500 real digits with labels."""
    with np.load(EXAMPLE / "eval.npz") as arrays:
        return EvaluationData.from_arrays({name: array[:500] for name, array in arrays.items()}, digits.inputs)


@pytest.fixture
def timed_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take as long as their files are large, so that what is chosen depends on no machine."""

    def timed(models: Sequence[Path], data: InputData, *, batch_size: int, rounds: int, **_: Any) -> Timings:
        times_s = [[file_size_bytes(path) * 1e-9] * rounds for path in models]
        return Timings(batch_size, (1,) * len(models), np.array(times_s))

    for module in (latency, judge):
        monkeypatch.setattr(module, "time_interleaved", timed)
