"""TorchScript that exporters stop at (objects, dicts, lists that grow, copies into parts) run in Python, and traced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from modelpress_compression import load
from modelpress_compression.loaders.quiet import quiet
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


class Found(torch.nn.Module):
    """In the manner of detectors with masks: each of what is found becomes a picture of its own size, in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.coder = Coder(1.0, [0.5])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        decoded = self.coder.decode(x, 0)
        kept = decoded[decoded[:, 0] > 0.5]
        pictures: list[torch.Tensor] = []
        corners = torch.zeros([len(kept), 2])
        total = torch.zeros([4])
        for index in range(len(kept)):
            row = kept[index]
            width = max(int(row[1].item()), 1)
            high = row.reshape(1, 1, 1, 4).expand(1, 1, 2, 4)
            wide = torch.nn.functional.interpolate(high, size=(width, 3), mode="nearest")[0, 0]
            picture = torch.zeros([4, 4])
            last = min(width, 4)
            picture[:last, 1:] = wide[:last]
            pictures.append(picture)
            corners[index, 0] = row[2] * width
            total = torch.maximum(total * 0.5, row)
        stacked = torch.stack(pictures, dim=0) if len(pictures) > 0 else torch.zeros([0, 4, 4])
        return [stacked[:, None], corners, total]


class Summed(torch.nn.Module):
    """What a round writes into a tensor, another one reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros([4])
        for index in range(x.size(0)):
            total.mul_(0.5).add_(x[index])
        return total


@pytest.fixture(scope="module")
def finding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finding") / "found.pt"
    with pytest.warns(DeprecationWarning, match="deprecated"):
        torch.jit.save(torch.jit.script(Found().eval()), str(path))
    return path


def _rows(found: int) -> torch.Tensor:
    """Eight rows, of which that many are found, at any places and of any width."""
    rows = torch.rand(8, 4) * 6 - 0.5
    rows[:, 0] = -1.0
    rows[torch.randperm(8)[:found], 0] = 1.0
    return rows


def test_a_loop_over_what_is_found_stays_a_loop(finding: Path) -> None:
    """As the module, to 1e-6, whatever is found: nothing, one, or more than in the run that was traced."""
    torch.manual_seed(5)
    model = load(finding, inputs=[TensorSpec("x", "float32", (8, 4))])
    assert "Loop" in {node.op_type for node in model.graph}
    with pytest.warns(DeprecationWarning, match="deprecated"):
        module = torch.jit.load(str(finding))
    with session_of(model) as session:
        for found in (0, 1, 3, 8):
            x = _rows(found)
            given = list(run(session, {"x": x.numpy()}).values())
            for expected, one in zip(module(x), given, strict=True):
                np.testing.assert_allclose(one, expected.numpy(), atol=1e-6)


def test_a_round_that_cannot_be_recorded_is_run_as_often_as_in_the_trace() -> None:
    x = torch.randn(3, 4)
    with quiet():
        module = torch.jit.script(Summed())
        replay = Replay(module)
        traced = torch.jit.trace(replay, (x,), check_trace=False)
    assert torch.equal(traced(x + 1.0)[0], module(x + 1.0))
