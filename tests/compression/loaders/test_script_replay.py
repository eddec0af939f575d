"""TorchScript that exporters stop at (objects, dicts, lists that grow, copies into parts) run in Python, and traced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from modelpress_compression import load
from modelpress_compression.loaders.script_replay import Replay
from modelpress_compression.runtime import run, session_of
from modelpress_compression.specs import TensorSpec


class Coder:
    """No module: exporters do not know what it holds."""

    def __init__(self, scale: float, shifts: list[float]) -> None:
        self.scale = scale
        self.shifts = shifts

    def decode(self, x: torch.Tensor, level: int) -> torch.Tensor:
        return x * self.scale + self.shifts[level]


class Levels(torch.nn.Module):
    """In the manner of detectors: rows are copied into a batch, levels are gathered in lists and given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.coder = Coder(0.5, [1.0, 2.0])
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        batch = torch.zeros([x.size(0), 6])
        batch[:, 1:5].copy_(x)
        found: dict[str, torch.Tensor] = {}
        sizes: list[int] = []
        for index, layer in enumerate(self.layers):
            batch = torch.relu(layer(batch))
            found[f"level{index}"] = self.coder.decode(batch, index)
            sizes.append(batch.size(1))
        total = 0
        for size in sizes:
            total += size
        if total != 12:
            raise ValueError("two levels of six")
        return [found["level0"], found["level1"][:, ::2] * total]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a scripted module."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("scripted") / "levels.pt"
    with pytest.warns(DeprecationWarning, match="deprecated"):
        torch.jit.save(torch.jit.script(Levels().eval()), str(path))
    return path


@pytest.mark.parametrize("rows", [1, 4])
def test_python_gives_what_the_interpreter_gives(scripted: Path, rows: int) -> None:
    """Bit for bit: it calls the same operators."""
    x = torch.randn(rows, 4)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        module = torch.jit.load(str(scripted))
    with torch.no_grad():
        for expected, given in zip(module(x), Replay(module)(x), strict=True):
            assert torch.equal(expected, given)


def test_it_becomes_onnx_of_any_batch(scripted: Path) -> None:
    """As the module at sizes that it was not exported with, to 1e-5; that other branches are lost is said."""
    model = load(scripted, inputs=[TensorSpec("x", "float32", ("batch", 4))])
    assert any("branches" in warning for warning in model.warnings)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        module = torch.jit.load(str(scripted))
    with session_of(model) as session:
        for rows in (1, 5, 9):
            x = torch.randn(rows, 4)
            given = list(run(session, {"x": x.numpy()}).values())
            for expected, one in zip(module(x), given, strict=True):
                np.testing.assert_allclose(one, expected.detach().numpy(), atol=1e-5)
