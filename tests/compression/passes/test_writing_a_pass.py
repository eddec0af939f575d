"""The example in docs/writing_a_pass.md, which people copy from, works as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from modelpress_compression import passes
from modelpress_compression.model import Model
from modelpress_compression.schema import read
from modelpress_compression.techniques import TECHNIQUES, Technique, step_schema
from onnx import helper

PAGE = Path(__file__).resolve().parents[3] / "docs" / "writing_a_pass.md"
PACKAGE = "modelpress_compression.passes.clip_weights"


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """The page's row and its module of tests, with its package in place among the passes."""
    config, code, row, tests = map(
        dedent, re.findall(r"^ +```python\n(.*?)^ +```", PAGE.read_text("utf-8"), re.S | re.M)
    )
    folder = tmp_path / "clip_weights"
    folder.mkdir()
    for name, text in (("__init__", ""), ("config", config), ("clip_weights", code), ("test_it", tests)):
        (folder / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.setattr(passes, "__path__", [str(tmp_path), *passes.__path__])
    for name in _imported():
        monkeypatch.delitem(sys.modules, name)
    yield row, import_module(f"{PACKAGE}.test_it")
    for name in _imported():
        del sys.modules[name]


def _imported() -> list[str]:
    return [name for name in sys.modules if name.startswith(PACKAGE)]


def test_the_example(blocks: tuple[str, Any], channel_model: Callable[..., Model]) -> None:
    """Its row takes a recipe to its pass, and its tests hold."""
    row, tests = blocks
    technique: Technique = eval(row, {"Technique": Technique, "ClipWeightsConfig": tests.ClipWeightsConfig})
    values, violations = read({"clip_weights": {"quantile": "6e-1"}}, step_schema([*TECHNIQUES.values(), technique]))
    assert not violations
    config = technique.config_class(**values["clip_weights"])
    product = channel_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "head")], {"w": tests.WEIGHT}, ["n", 2], ["n", 2]
    )
    assert technique.make_pass(config)(product, tests.CONTEXT).changes == {"clipped_weights": 1}
    tests.test_cuts_what_is_above_the_quantile(product)
    for name in ("w", "head"):
        tests.test_exclude(product, name)
    np.testing.assert_array_equal(product.graph.initializers["w"].const_value.numpy(), tests.WEIGHT)
