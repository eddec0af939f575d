"""Writes into parts of tensors become a few nodes each, and compute what the module does at every size."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from modelpress_compression import load
from modelpress_compression.loaders.script_parts import write_anew
from modelpress_compression.runtime import run, session_of

Save = Callable[[torch.nn.Module, Path], Path]


class Fills(torch.nn.Module):
    """Every way to write: values, numbers, sums, functions; from the start, from the end, at one place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, 1:3] = torch.relu(y[:, 1:3]) * 2
        y[:, 0] = 0
        y[:, 1:-1, 0] += 1
        y[..., -1] *= 2
        y[1:] -= y[:1]
        y[:, :2, -3:-1].fill_(3)
        y[:, :2].relu_()
        y[:, :, 1:-1] = x[:, :, 1:-1]
        y[-1, 2:].zero_()
        return y


class Views(torch.nn.Module):
    """Reads the tensor through views that were taken before the write, within a branch as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        part = y[:, :3]
        part.add_(1)
        part[:, 1].mul_(2)
        turned = y.transpose(0, 1)
        y[:, 1, 0] = x[:, 2, 0]
        if x.size(0) > 1:
            y = y + turned.transpose(0, 1)
        return y + part.sum()


class Integers(torch.nn.Module):
    """What is written takes the type of the tensor that it goes into."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * 4).to(torch.int64)
        y[:, 1:3] = x[:, :2] * 4
        return y


@pytest.mark.parametrize("way", ["scripted", "traced"])
@pytest.mark.parametrize("kind", [Fills, Views, Integers])
def test_as_the_module_at_every_size(kind: type[torch.nn.Module], way: str, save_script: Save, tmp_path: Path) -> None:
    """Where a part reaches further than the tensor too. No scatters: they take more room than a small network."""
    path = tmp_path / "module.pt"
    if way == "scripted":
        save_script(kind().eval(), path)
    else:
        _save_traced(kind().eval(), path)
    model = load(path, ["x:float32[batch,4,width]"])
    counts = Counter(node.op_type for node in model.nodes())
    assert counts["ScatterND"] == 0
    assert counts["Concat"] > 0
    original = _read(path)
    with session_of(model) as session:
        for shape in ((2, 4, 6), (3, 4, 1), (3, 4, 2), (2, 4, 3), (5, 4, 9)):
            x = torch.randn(shape)
            (given,) = run(session, {"x": x.numpy()}).values()
            np.testing.assert_allclose(given, original(x).numpy(), rtol=1e-5, atol=1e-5)


class Steps(torch.nn.Module):
    """Writes at places that the graph does not say, with gaps, and in a loop."""

    def forward(self, x: torch.Tensor, rounds: int) -> torch.Tensor:
        y = x.clone()
        y[:, ::2] = 0
        y[:, rounds:] += 1
        for index in range(rounds):
            y[:, index] = 2
        return y


def test_what_is_not_known_beforehand_stays(save_script: Save, tmp_path: Path) -> None:
    """The graph is the same text as before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")
        frozen = torch.jit.freeze(_read(save_script(Steps().eval(), tmp_path / "module.pt")))
    before = str(frozen.graph)
    write_anew(frozen.graph)
    assert str(frozen.graph) == before


def _save_traced(module: torch.nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, torch.randn(2, 4, 6)).save(str(path))


def _read(path: Path) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit")
        return torch.jit.load(str(path)).eval()
