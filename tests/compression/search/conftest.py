"""What tests of searches begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelpress_compression import InputData, Model, Recipe
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.recipe import Step
from modelpress_compression.search.judge import Judge
from modelpress_compression.search.quantization import SchemeSearch


@pytest.fixture
def search(digits: Model, samples: InputData, tmp_path: Path) -> SchemeSearch:
    """Of schemes on the network of digits, as `fastest` begins it."""
    path = tmp_path / "digits.onnx"
    digits.save(path)
    context, recipe = Context(samples, tmp_path), Recipe.from_dict({"version": 1, "goal": {"objective": "fastest"}})
    judge = Judge(path, path, context, recipe, None)
    return SchemeSearch(Step("quantize", QuantizeConfig()), digits, path, context, tmp_path / "q" / "m.onnx", judge)
