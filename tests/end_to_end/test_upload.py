"""The main job in one command, on a real model with real data, and what happens to input that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

Cli = Callable[..., Any]
SHAPE = "x:float32[batch,1,28,28]"
# What `auto` takes, it takes by time, and a busy machine may show no gain on a network of 30 microseconds.
UNTIMED = ("--recipe", "static-int8")
QUICK = "version: 1\nsteps: [{fuse: {}}]\nbenchmark: {rounds: 5}\n"


def predict(path: Path, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0].argmax(1)


def test_one_command_gives_model_and_reports(cli: Cli, example: Path, tmp_path: Path) -> None:
    """A smaller model that still reads digits, report.json and report.html beside it, one JSON document on stdout."""
    data = ["--data", example / "samples.npz", "--eval", example / "eval.npz"]
    done = cli("upload", example / "model.onnx", *UNTIMED, *data, "--json", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert (done.document["state"], done.document["output"]) == ("SUCCEEDED", "model.optimized.onnx")
    report = done.document["report"]
    assert report == json.loads((tmp_path / "model.report.json").read_text())
    assert "<html" in (tmp_path / "model.report.html").read_text()
    optimized = tmp_path / "model.optimized.onnx"
    assert optimized.stat().st_size == report["optimized"]["size_bytes"] < (example / "model.onnx").stat().st_size / 2
    with np.load(example / "eval.npz") as arrays:
        accuracy = float((predict(optimized, arrays["x"].astype(np.float32)) == arrays["labels"]).mean())
    assert accuracy == pytest.approx(report["accuracy"]["optimized"], abs=1e-9)
    assert accuracy >= 0.97
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.optimized.onnx",
        "model.report.html",
        "model.report.json",
    ]


@pytest.mark.slow
def test_every_kind_of_file_gives_the_same_accuracy(cli: Cli, example: Path, tmp_path: Path) -> None:
    """Traced and scripted TorchScript, torch.export, state dict, safetensors and ONNX of one network end alike."""
    architecture = ["--architecture", "convnet:ConvNet", "--input", SHAPE]
    files: dict[str, list[str]] = {
        "model_traced.pt": ["--input", SHAPE],
        "model_scripted.pt": ["--input", SHAPE],
        "model.pt2": [],
        "state_dict.pt": architecture,
        "state_dict.safetensors": architecture,
        "model.onnx": [],
    }
    accuracies = {}
    for name, options in files.items():
        data = ["--data", "samples.npz", "--eval", "eval.npz", "-o", tmp_path / f"{name}.onnx", "--skip-cache"]
        done = cli("upload", name, *options, *UNTIMED, *data, "--json", cwd=example)
        assert done.exit_code == 0, done.stderr
        accuracies[name] = done.document["report"]["accuracy"]["optimized"]
    assert len(set(accuracies.values())) == 1, accuracies


def test_external_data_goes_along(cli: Cli, example: Path, tmp_path: Path) -> None:
    """An ONNX model of two files is uploaded whole, and optimized like the same model in one."""
    (tmp_path / "quick.yaml").write_text(QUICK)
    onnx.save(
        onnx.load(example / "model.onnx"),
        tmp_path / "two.onnx",
        save_as_external_data=True,
        location="two.weights",
        size_threshold=0,
    )
    done = cli("upload", "two.onnx", "--recipe", "quick.yaml", "--json", cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    images = np.random.default_rng(0).normal(size=(4, 1, 28, 28)).astype(np.float32)
    expected = predict(example / "model.onnx", images)
    np.testing.assert_array_equal(predict(tmp_path / "two.optimized.onnx", images), expected)


def test_a_constraint_that_is_not_met(cli: Cli, example: Path, tmp_path: Path) -> None:
    """Exit code 6: the result is there, and the report names the constraint."""
    (tmp_path / "harsh.yaml").write_text("version: 1\nsteps: [{prune: {sparsity: 0.98}}]\nbenchmark: {rounds: 5}\n")
    done = cli(
        "upload",
        example / "model.onnx",
        *("--recipe", "harsh.yaml", "--max-drop", "0.01", "--eval", example / "eval.npz"),
        cwd=tmp_path,
    )
    assert done.exit_code == 6
    assert "max_drop" in done.stderr + done.stdout
    assert (tmp_path / "model.optimized.onnx").exists()


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory: pytest.TempPathFactory, example: Path) -> Path:
    """Files that cannot be used, each in its own way."""
    folder = tmp_path_factory.mktemp("odd")
    whole, script = (example / "model.onnx").read_bytes(), (example / "model_traced.pt").read_bytes()
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.pt").write_bytes(script[: len(script) // 2])
    (folder / "text.pt").write_text("a text, not a model")
    np.savez(folder / "shape.npz", x=np.zeros((5, 3, 3), np.float32))
    np.savez(folder / "nan.npz", x=np.full((5, 1, 28, 28), np.nan, np.float32))
    np.savez(folder / "nothing.npz")
    (folder / "bad.yaml").write_text("version: 1\nsteps: [{prune: {sparsity: 1.4}}, {paint: {}}]\n")
    proto = onnx.load(example / "model.onnx")
    proto.graph.node[0].op_type = "Frobnicate"
    onnx.save(proto, folder / "unknown.onnx")
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["upload", "nowhere.onnx"], ["nowhere.onnx"]),
        (["upload", "{odd}/empty.onnx"], ["empty"]),
        (["upload", "{odd}/cut.onnx"], ["cut"]),
        (["upload", "{odd}/cut.pt"], ["cut short"]),
        (["upload", "{odd}/text.pt"], ["ONNX model", "TorchScript archive", "state dict"]),
        (["upload", "{odd}/unknown.onnx"], ["Frobnicate"]),
        (["upload", "{example}/state_dict.pt"], ["--architecture"]),
        (["upload", "{example}/model_traced.pt"], ["first layer", "conv2d", "1 input channel", "--input"]),
        (["upload", "{example}/model_traced.pt", "--input", "x:float32[batch,3,28,28]"], ["1 channels"]),
        (["upload", "{example}/model_traced.pt", "--input", "x:float[1]"], ["float"]),
        (["upload", "{example}/model.onnx", "--data", "{odd}/shape.npz"], ["(5, 3, 3)", "x:float32"]),
        (["upload", "{example}/model.onnx", "--data", "{odd}/nan.npz"], ["NaN"]),
        (["upload", "{example}/model.onnx", "--data", "{odd}/nothing.npz"], ["numpy.savez"]),
        (["upload", "{example}/model.onnx", "--data", "{odd}/bad.yaml"], ["not an .npz"]),
        (["upload", "{example}/model.onnx", "--eval", "{example}/samples.npz"], ["labels"]),
        (["upload", "{example}/model.onnx", "--recipe", "{odd}/bad.yaml"], ["steps[0].prune.sparsity: 1.4", "paint"]),
        (["upload", "{example}/model.onnx", "--recipe", "defalt"], ["default"]),
        (
            ["upload", "{example}/model.onnx", "--recipe", "auto", "--set", "quantize.scheme=int3"],
            ["steps[1].quantize.scheme"],
        ),
    ],
)
def test_unusable_input(cli: Cli, example: Path, odd_files: Path, tmp_path: Path, arguments: Any, said: Any) -> None:
    """One paragraph that says what is wrong and what to do, exit code 2, nothing left behind."""
    done = cli(*(text.format(odd=odd_files, example=example) for text in arguments), cwd=tmp_path)
    assert done.exit_code == 2, done.stderr
    message = done.stderr[done.stderr.index("Error") :]
    for text in said:
        assert text.lower() in message.lower()
    assert "\n\n" not in message.strip()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there(cli: Cli) -> None:
    """Exit code 4 and how to get one; with --json the reason is a document too."""
    done = cli("--server", "127.0.0.1:1", "info", "--json")
    assert done.exit_code == 4
    assert "compress-server" in done.stderr
    assert done.document["error"]["reason"]


def test_listing_and_reading_again(cli: Cli, example: Path, tmp_path: Path) -> None:
    """Models and jobs are there afterwards, and a second identical job takes the first one's result."""
    (tmp_path / "quick.yaml").write_text(QUICK)
    arguments = ["upload", example / "model.onnx", "--recipe", "quick.yaml", "--label", "case=again", "--json"]
    first, second = (cli(*arguments, cwd=tmp_path).document for _ in range(2))
    jobs = cli("jobs", "--label", "case=again", "--json").document
    assert [job["name"] for job in jobs["jobs"]] == [second["job"], first["job"]]
    assert cli("job", second["job"], "--json").document["from_cache"]
    assert first["report"]["optimized"] == second["report"]["optimized"]
    text = cli("report", first["job"].rsplit("/")[-1], "--format", "markdown")
    assert text.exit_code == 0
    assert "|" in text.stdout


METRIC = """
import numpy as np
import onnxruntime as ort
from pathlib import Path

def right(path, evaluation):
    with open(Path(__file__).with_name("calls"), "a") as calls:
        calls.write("x")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"x": evaluation["x"].astype("float32")})
    return float((np.argmax(scores, axis=-1) == evaluation["labels"]).mean())
"""


@pytest.mark.slow
def test_a_metric_of_ones_own_decides(cli: Cli, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs here, on candidates of the server's; asked again, it scores nothing twice, and the answer is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "quality.py").write_text(METRIC)
    asked = ["upload", example / "model.onnx", "--data", example / "samples.npz", "--eval", example / "eval.npz"]
    asked += ["--metric", "quality.py:right", "--max-drop", "1%", "--set", "benchmark.rounds=5", "--json"]
    done = cli(*asked, cwd=tmp_path)
    assert done.exit_code == 0, done.stderr
    report = done.document["report"]
    accuracy = report["accuracy"]
    assert accuracy["metric"] == "quality.py:right"
    assert accuracy["drop"] <= 0.01
    assert report["size_ratio"] > 3
    with np.load(example / "eval.npz") as arrays:
        right = (predict(tmp_path / "model.optimized.onnx", arrays["x"].astype(np.float32)) == arrays["labels"]).mean()
    assert accuracy["optimized"] == pytest.approx(float(right), abs=1e-9)
    calls = (tmp_path / "calls").stat().st_size
    assert calls >= 2
    again = cli(*asked, cwd=tmp_path)
    assert again.document["report"]["optimized"]["sha256"] == report["optimized"]["sha256"]
    assert (tmp_path / "calls").stat().st_size == calls


@pytest.mark.slow
def test_another_question_on_the_same_file_is_answered_from_what_is_known(
    cli: Cli, example: Path, tmp_path: Path
) -> None:
    """The second job builds nothing that the first has built; its result is measured and sound all the same."""
    # A project of its own: nothing is known there of what other tests have asked.
    data = ["--data", example / "samples.npz", "-o", tmp_path / "small.onnx", "--json", "--project", "asked-twice"]

    def asked(objective: str) -> list[object]:
        # What levers cut depends on what the goal asks for.
        recipe = tmp_path / f"{objective}.yaml"
        recipe.write_text(f"version: 1\ngoal: {{objective: {objective}, techniques: [fuse, quantize]}}\n", "utf-8")
        return ["--recipe", recipe]

    first = cli("upload", example / "model.onnx", *asked("smallest"), *data).document["report"]
    assert first["reused"] == {}
    second = cli("upload", example / "model.onnx", *asked("fastest"), *data).document["report"]
    assert second["reused"]["candidates"] >= len(second["candidates"])
    assert first["size_ratio"] >= second["size_ratio"] > 1
    assert second["fidelity"]["top1_agreement"] > 0.95
    alone = cli("upload", example / "model.onnx", *asked("fastest"), "--skip-cache", *data).document["report"]
    assert alone["reused"] == {}
