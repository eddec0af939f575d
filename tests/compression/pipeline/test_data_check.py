"""What is said of data before the long work begins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import EvaluationData, InputData, Model
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.measure.task import Labelled
from modelpress_compression.pipeline.data_check import data_warnings


@pytest.fixture
def path(digits: Model, tmp_path: Path) -> Path:
    """The classifier's file."""
    digits.save(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def scaled(data: InputData, factor: float) -> InputData:
    return InputData.from_arrays({name: array * np.float32(factor) for name, array in data.arrays.items()}, data.specs)


def test_good_data_raises_no_alarm(digits: Model, path: Path, samples: InputData, labelled: EvaluationData) -> None:
    """Real samples with class indices: nothing to say."""
    assert data_warnings(digits, path, samples, Labelled(labelled)) == []


@pytest.mark.parametrize(("factor", "says"), [(1000.0, "far too large"), (1e-4, "nearly the same answers")])
def test_a_wrong_scale_is_seen(digits: Model, path: Path, samples: InputData, factor: float, says: str) -> None:
    """By the first layer, or by answers that no longer depend on the sample."""
    (text,) = data_warnings(digits, path, scaled(samples, factor), None)
    assert text.startswith("The data: ")
    assert says in text


def test_evaluation_data_is_looked_at_too(
    digits: Model, path: Path, samples: InputData, labelled: EvaluationData
) -> None:
    """Its scale, and one-hot labels, which are read as classes."""
    data = EvaluationData(scaled(labelled.inputs, 1000.0), np.eye(10)[labelled.labels])
    scale, labels = data_warnings(digits, path, samples, Labelled(data))
    assert scale.startswith("The evaluation data: ")
    assert "one-hot" in labels


def test_labels_that_fit_nothing_are_refused_at_once(
    digits: Model, path: Path, samples: InputData, labelled: EvaluationData
) -> None:
    """Before any candidate is built."""
    data = EvaluationData(labelled.inputs, np.zeros((len(labelled.labels), 3)))
    with pytest.raises(InvalidDataError, match="fit no output"):
        data_warnings(digits, path, samples, Labelled(data))
