"""State dicts and pickled modules are converted where their code lives, by a command with JSON on stdout."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from modelpress_compression.convert import main
from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.loaders import load
from modelpress_compression.loaders.architecture import Architecture
from modelpress_compression.loaders.weight_loading import pickled_module
from oracles.plain_run import run_onnx
from safetensors.torch import save_file

CODE = """
import torch

print("noise on stdout")

class Net(torch.nn.Module):
    def __init__(self, hidden=6):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.ReLU(), torch.nn.Dropout(0.5))
        self.head = torch.nn.Linear(hidden, 3)

    def forward(self, x):
        return self.head(self.body(x))

    @classmethod
    def named(cls, name, hidden=6):
        return cls({"small": 6, "large": 9}[name])

def broken():
    raise RuntimeError("no weights today")

not_a_module = dict

def __getattr__(name):
    if name == "late":
        raise RuntimeError("a part is missing")
    raise AttributeError(name)
"""
SPEC = "x:float32[batch,4]"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A folder with the user's code, in which the command runs; the module's name is new for every test."""
    name = f"user_code_{abs(hash(request.node.nodeid)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path, name


def net(hidden: int = 6) -> torch.nn.Module:
    torch.manual_seed(0)
    namespace: dict[str, type[torch.nn.Module]] = {"__name__": "elsewhere"}
    exec(CODE.replace('print("noise on stdout")', ""), namespace)
    return namespace["Net"](hidden).eval()


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    """Exit code and the one JSON document on stdout."""
    code = main(arguments)
    return code, json.loads(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    code, document = outcome(capsys, *arguments)
    assert code == 2
    error = document["error"]
    assert isinstance(error, dict)
    return error["reason"], error["message"]


@pytest.mark.parametrize("kind", ["state_dict", "nested", "wrapped", "safetensors"])
def test_weights_with_their_architecture(
    project: tuple[Path, str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain, nested in a checkpoint, with a wrapper's prefix, and as safetensors; rtol 1e-5 against torch."""
    folder, code = project
    module = net()
    weights = module.state_dict()
    path = folder / "weights"
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "nested":
        torch.save({"epoch": 3, "state_dict": weights}, path)
    elif kind == "wrapped":
        torch.save({"model": {f"module._orig_mod.{name}": value for name, value in weights.items()}}, path)
    else:
        torch.save(weights, path)
    result, document = outcome(
        capsys, str(path), "--output", "out.onnx", "--architecture", f"{code}:Net", "--input", SPEC, "--json"
    )
    assert result == 0
    wanted_format = "safetensors" if kind == "safetensors" else "state_dict"
    raw = path.read_bytes()
    assert document == {
        "format": wanted_format,
        "sha256": hashlib.sha256(raw).hexdigest(),
        "size_bytes": len(raw),
        "warnings": [],
    }
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    model = load("out.onnx")
    assert [str(spec) for spec in (*model.inputs, *model.outputs)] == [SPEC, "output:float32[batch,3]"]
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(model, [{"x": x}])[0]["output"], wanted, rtol=1e-5, atol=1e-6)


def test_pickled_modules_need_trust(project: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without --trust-pickle nothing is executed; with it the module is converted. The command runs as a process."""
    folder, code = project
    torch.save(importlib.import_module(code).Net().eval(), "m.pt")
    capsys.readouterr()  # the import's own noise
    reason, message = error_of(capsys, "m.pt", "--output", "out.onnx", "--input", SPEC)
    assert reason == "MODEL_REJECTED"
    assert "--trust-pickle" in message
    command = [sys.executable, "-m", "modelpress_compression.convert", "m.pt", "--output", "out.onnx", "--input", SPEC]
    done = subprocess.run([*command, "--trust-pickle"], cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["format"] == "pickled_module"
    assert "noise on stdout" in done.stderr
    assert load(folder / "out.onnx").inputs[0].shape == ("batch", 4)


def test_modules_in_a_trusted_file(tmp_path: Path) -> None:
    """A module alone, averaged or under `model` is taken; of others none without a word."""
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    path = tmp_path / "m.pt"
    for content in (one, {"net": one, "epoch": 3}, {"model": other, "ema": one}, {"model": one, "critic": other}):
        torch.save(content, path)
        assert pickled_module(path).state_dict().keys() == one.state_dict().keys()
        assert torch.equal(pickled_module(path).weight, one.weight)
    for content in ({"actor": one, "critic": other}, {"epoch": 3}):
        torch.save(content, path)
        with pytest.raises(InvalidInputsError, match=r"actor, critic; give --arch|a dict, not a module"):
            pickled_module(path)


def test_weights_that_do_not_fit(project: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, unexpected and misshapen weights are listed."""
    _, code = project
    weights = net(hidden=9).state_dict()
    weights["extra.weight"] = weights.pop("head.bias")
    torch.save(weights, "w.pt")
    reason, message = error_of(capsys, "w.pt", "--output", "o.onnx", "--architecture", f"{code}:Net", "--input", SPEC)
    assert reason == "INVALID_INPUTS"
    assert "1 missing in the file: head.bias" in message
    assert "1 not in the module: extra.weight" in message
    assert "body.0.weight is [9, 4] in the file and [6, 4] in the module" in message


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("no_such_module:Net", "importing 'no_such_module' failed"),
        ("{code}:Missing", "has no 'Missing'"),
        ("{code}:late.Net", "failed (RuntimeError: a part is missing)"),
        ("{code}:broken", "raised RuntimeError: no weights today"),
        ("{code}:not_a_module", "gave a dict, not a torch.nn.Module"),
        ("{code}", "is not of the form"),
        ("{code}:Net(hidden=open('x'))", "is not of the form"),
    ],
)
def test_architectures_that_do_not_work(
    project: tuple[Path, str], architecture: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says what the user's code said."""
    torch.save(net().state_dict(), "w.pt")
    text = architecture.format(code=project[1])
    _, message = error_of(capsys, "w.pt", "--output", "o.onnx", "--architecture", text, "--input", SPEC)
    assert said in message


def test_architectures_with_arguments(project: tuple[Path, str]) -> None:
    """Literals, by position and by name, also to class methods."""
    built = Architecture.parse(f'{project[1]}:Net.named("large")').build()
    assert built.state_dict()["head.weight"].shape == (3, 9)
    built = Architecture.parse(f"{project[1]}:Net(hidden=7)").build()
    assert built.state_dict()["head.weight"].shape == (3, 7)


def test_what_is_missing_is_said(project: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """No architecture, no inputs, no output, a file that needs no conversion."""
    _, code = project
    torch.save(net().state_dict(), "w.pt")
    assert "--architecture" in error_of(capsys, "w.pt", "--output", "o.onnx", "--input", SPEC)[1]
    _, message = error_of(capsys, "w.pt", "--output", "o.onnx", "--architecture", f"{code}:Net")
    assert "linear, 4 input features. Try --input 'x:float32[batch,4]'" in message
    assert "--output" in error_of(capsys, "w.pt")[1]
    assert error_of(capsys, "nothing.pt", "--output", "o.onnx")[0] == "UNSUPPORTED_FORMAT"


def test_formats_that_need_no_conversion(exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """They are uploaded as they are."""
    assert "needs no conversion" in error_of(capsys, str(exported), "--output", str(tmp_path / "o.onnx"))[1]


def test_what_was_chosen_is_in_the_document(project: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Averaged weights go first and that is said; --state-dict-key and --ignore-weights are obeyed."""
    _, code = project
    weights = net().state_dict()
    torch.save({"params": weights, "params_ema": {name: value * 0.5 for name, value in weights.items()}}, "w.pth")
    options = ["--output", "o.onnx", "--architecture", f"{code}:Net", "--input", SPEC]
    _, document = outcome(capsys, "w.pth", *options)
    assert "Took the averaged weights (EMA) in 'params_ema'" in str(document["warnings"])
    _, document = outcome(capsys, "w.pth", *options, "--state-dict-key", "params")
    assert document["warnings"] == []
    torch.save({**weights, "norm.weight": torch.ones(3)}, "w.pth")
    assert "--ignore-weights 'norm.*'" in error_of(capsys, "w.pth", *options)[1]
    assert outcome(capsys, "w.pth", *options, "--ignore-weights", "norm.*")[0] == 0


def test_no_code_of_a_checkpoint_runs(project: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """With --architecture the weights of a whole module, and of one inside a checkpoint, are read without its code."""
    folder, code = project
    user_code = importlib.import_module(code)
    torch.save({"model": user_code.Net().eval(), "settings": Settings()}, "m.pt")
    (folder / "other_code.py").write_text(CODE)  # the code of the module in the file is another, and must not be asked
    sys.modules.pop(code)
    (folder / f"{code}.py").write_text("raise AssertionError('the code of the file ran')")
    capsys.readouterr()
    result, document = outcome(
        capsys, "m.pt", "--output", "out.onnx", "--architecture", "other_code:Net", "--input", SPEC
    )
    assert (result, document["format"]) == (0, "state_dict")


class Settings:
    """What checkpoints carry beside their weights."""

    def __init__(self) -> None:
        self.learning_rate = 0.1


def test_folders_and_indexes(project: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Shards are put together, whichever of folder, index and shard is named; the digest is of all files."""
    folder, code = project
    weights = net().state_dict()
    names = list(weights)
    shards = {f"model-0000{index}-of-00002.safetensors": names[index - 1 :: 2] for index in (1, 2)}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    documents = [
        outcome(capsys, named, "--output", "o.onnx", "--architecture", f"{code}:Net", "--input", SPEC)[1]
        for named in (".", index, next(iter(shards)))
    ]
    assert [document["format"] for document in documents] == ["safetensors"] * 3
    assert len({document["sha256"] for document in documents}) == 1
    assert documents[0]["size_bytes"] == sum((folder / name).stat().st_size for name in (index, *shards))
