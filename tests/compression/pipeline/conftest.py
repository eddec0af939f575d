"""A small trained classifier with its data: the example that ships with the project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import EvaluationData, InputData, Model, load

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
