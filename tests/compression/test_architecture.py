"""The map of the engine in docs/architecture.md tells the truth."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_diagram_shows_the_layers_that_import_linter_holds() -> None:
    """Layers stand in the diagram by their names, in the order of the contract."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = [item["layers"] for item in contracts if item.get("containers") == ["modelpress_compression"]]
    section = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("## Inside the engine")[1]
    diagram = section.split("```")[1].strip().splitlines()
    assert [re.split(r" {2,}", line)[0] for line in diagram] == layers
