"""What a job will take, and what is refused before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from modelpress_compression import InputData, Model, Recipe, compress, mapped, runtime
from modelpress_compression.errors import DiskSpaceError, MemoryLimitError
from modelpress_compression.graph.watch.portions import WATCHED_BYTES, activations_bytes
from modelpress_compression.pipeline import preflight
from modelpress_compression.pipeline.preflight import Cost, Needs, check_room, held_activations, needs
from modelpress_compression.search.grounds import MIN_SAMPLES

GB = 10**9


@pytest.fixture
def path(digits: Model, tmp_path: Path) -> Path:
    """The classifier's file."""
    digits.save(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def steps(*entries: dict[str, object]) -> Recipe:
    return Recipe.from_dict({"version": 1, "steps": list(entries)})


def test_more_work_takes_more(digits: Model, path: Path, samples: InputData) -> None:
    """A goal over one light step, training over both; disk by the copies that each makes."""
    light = needs(steps({"fuse": {}}), digits, path, samples)
    goal = needs(Recipe.preset("default"), digits, path, samples)
    trained = needs(steps({"fuse": {}}, {"distill": {"epochs": 1000}}), digits, path, samples)
    assert light.time_s < goal.time_s < trained.time_s
    assert path.stat().st_size < light.disk_bytes < goal.disk_bytes
    assert light.memory_bytes > path.stat().st_size


def test_learned_rounding_takes_more(
    digits: Model, path: Path, samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time by its steps, and memory for activations: all of them, up to what it may keep; nothing without data."""
    monkeypatch.setattr(preflight, "held_bytes", lambda: 0)
    monkeypatch.setattr(preflight, "_one_run", lambda *_: (0.001, 0))
    found = {
        (rounding, count): needs(
            steps({"quantize": {"scheme": "weight_only", "rounding": rounding, "rounding_steps": count}}),
            digits, path, samples,
        )
        for rounding, count in (("gptq", 500), ("brecq", 500), ("brecq", 1000))
    }  # fmt: skip
    plain, learned, longer = found.values()
    assert longer.time_s - learned.time_s == pytest.approx(learned.time_s - plain.time_s)
    assert longer.time_s - learned.time_s == pytest.approx(500 * 64 * 0.00125)
    kept = 5 * len(samples) * activations_bytes(digits, samples)
    assert learned.memory_bytes - plain.memory_bytes == pytest.approx(kept, abs=2)


def test_large_models_are_not_held_in_copies(
    digits: Model, path: Path, samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two sessions do not fit, one of the model's size does; static quantization still holds copies, fewer than
    of a small one, and writes the weights that it makes to the disk."""
    size = path.stat().st_size
    monkeypatch.setattr(preflight, "held_bytes", lambda: 0)
    usual = {
        name: needs(steps({"quantize": {"scheme": name}}), digits, path, samples) for name in ("dynamic", "static")
    }
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    monkeypatch.setattr(runtime, "SPARE_BYTES", 0)
    large = {
        name: needs(steps({"quantize": {"scheme": name}}), digits, path, samples) for name in ("dynamic", "static")
    }
    assert usual["dynamic"].memory_bytes - large["dynamic"].memory_bytes == pytest.approx(2.7 * size, abs=2)
    assert usual["static"].memory_bytes - large["static"].memory_bytes == pytest.approx(6 * size, abs=2)
    assert large["static"].disk_bytes - large["dynamic"].disk_bytes == pytest.approx((1 + 2) * size, abs=2)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "about 1 s, "), (42.4, "about 42 s, "), (130, "about 2 min, "), (9000, "about 2.5 h, ")]
)
def test_needs_read_well(seconds: float, said: str) -> None:
    """In units of people, with spaces that no log writes out."""
    assert str(Needs(seconds, 1_234_000_000, 400_000_000)) == f"{said}1.23 GB of memory, 400 MB of disk"


def test_what_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error of its own, which says how much there is."""
    with pytest.raises(MemoryLimitError, match="memory") as memory:
        check_room(Needs(1.0, 5 * GB, 1), tmp_path, 2 * GB)
    assert memory.value.reason == "WORKER_OUT_OF_MEMORY"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * GB))
    with pytest.raises(DiskSpaceError, match="disk space") as disk:
        check_room(Needs(1.0, 1, 5 * GB), tmp_path, 2 * GB)
    assert disk.value.reason == "STORAGE_FULL"


def test_what_may_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimates may err by a factor of two; without doubt there is nothing to say."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * GB))
    memory, disk = check_room(Needs(1.0, 3 * GB, 3 * GB), tmp_path, 2 * GB)
    assert "of memory" in memory
    assert "of disk space" in disk
    assert check_room(Needs(1.0, 1 * GB, 1 * GB), tmp_path, 2 * GB) == []


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    """A petabyte fits nowhere."""
    with pytest.raises(MemoryLimitError):
        check_room(Needs(1.0, 10**15, 1), tmp_path, None)


def test_a_job_is_refused_before_the_work(digits: Model, samples: InputData) -> None:
    """The estimate is told, then the refusal comes; no step has begun."""
    stages: list[str] = []
    logged: list[str] = []
    with pytest.raises(MemoryLimitError):
        compress(
            digits,
            steps({"quantize": {"scheme": "dynamic"}}),
            data=samples,
            memory_limit_bytes=1000,
            on_progress=lambda stage, index, count, fraction, message: stages.append(stage),
            on_log=lambda severity, text: logged.append(text),
        )
    assert set(stages) == {"load"}
    assert any(text.startswith("expected: about ") for text in logged)


def test_gradients_hold_the_values_of_whole_samples(
    digits: Model, path: Path, samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they need comes from the shapes: the larger the samples, the more; what needs none is not charged."""
    monkeypatch.setattr(preflight, "held_bytes", lambda: 0)  # of this process, which falls and rises meanwhile
    assert activations_bytes(digits, samples) > 28 * 28 * 4
    few = InputData(samples.specs, {name: array[:4] for name, array in samples.arrays.items()})
    assert activations_bytes(digits, few) == activations_bytes(digits, samples)
    light = needs(steps({"quantize": {"scheme": "dynamic"}}), digits, path, samples)
    static = needs(steps({"quantize": {"scheme": "static"}}), digits, path, samples)
    assert static.memory_bytes > light.memory_bytes + activations_bytes(digits, samples)


def test_a_search_that_goes_far_is_counted(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """Levers and their trainings, where labels judge, or samples that can be held out; a search time bounds it."""
    path, few = tmp_path / "digits.onnx", samples.head(MIN_SAMPLES - 1)
    digits.save(path)

    def time_s(judged: bool, data: InputData = few, **goal: object) -> float:
        recipe = Recipe.from_dict({"version": 1, "goal": goal})
        return needs(recipe, digits, path, data, judged=judged).time_s

    assert time_s(True, objective="smallest") > 2 * time_s(False, objective="smallest")
    assert time_s(False, samples, objective="smallest") > 2 * time_s(False, samples, objective="balanced")
    assert time_s(True, objective="balanced") < 1.5 * time_s(False, objective="balanced")
    assert time_s(True, objective="smallest", search_time_s=1.0) < 5.0


def test_activations_are_counted_as_far_as_they_are_held() -> None:
    """What is looked at, of samples of any size: the activations of a small sample, a portion of a large one's, or the
    largest by itself; gradients where they fit, by as many samples as fit."""
    watching, learning = Cost(1, 1, 1.0, 1.0, watches=True), Cost(1, 1, 1.0, 1.0, watches=True, gradients=True)
    mib = 1024**2
    assert held_activations(Cost(1, 1, 1.0, 1.0), [100 * mib] * 9, 8) == 0
    assert held_activations(watching, [mib] * 9, 8) == 2 * 9 * mib
    assert held_activations(watching, [100 * mib] * 90, 8) == 2 * WATCHED_BYTES
    assert held_activations(watching, [2000 * mib] * 9, 8) == 2 * 2000 * mib
    assert held_activations(learning, [100 * mib] * 9, 8) == 2.5 * 900 * mib
    assert held_activations(learning, [100 * mib] * 900, 8) == 2 * WATCHED_BYTES
    keeping = Cost(1, 1, 1.0, 1.0, watches=True, keeps=(100, 50 * mib))
    assert held_activations(keeping, [mib] * 9, 100) == (2 * 9 + 50) * mib
    assert held_activations(keeping, [mib] * 9, 10) == (2 * 9 + 2 * 10) * mib


NORMALIZED = """
<ir_version: 8, opset_import: ["": 17]>
normalized (float[n, 8] x) => (float[n, 8] y) {
  h = MatMul(x, w1)
  r = LayerNormalization(h, gain, shift)
  y = MatMul(r, w2)
}
"""


def test_a_stream_that_may_be_rotated_is_prepared_twice(
    model_from_text: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static quantization under `rotate: auto` of a model with a residual stream: about twice the time, and more
    memory; the same as without rotations where there is no stream to rotate, or no data to tell by."""
    monkeypatch.setattr(preflight, "held_bytes", lambda: 0)
    monkeypatch.setattr(preflight, "_one_run", lambda *_: (0.001, 0))
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("w1", "w2")}
    gains = {"gain": np.ones(8, np.float32), "shift": np.zeros(8, np.float32)}
    model = model_from_text(NORMALIZED, {**weights, **gains})
    model.save(tmp_path / "model.onnx")
    real = InputData.from_arrays({"x": rng.standard_normal((16, 8)).astype(np.float32)}, model.inputs)

    def found(rotate: str, data: InputData = real) -> Needs:
        return needs(steps({"quantize": {"scheme": "static", "rotate": rotate}}), model, tmp_path / "model.onnx", data)

    assert found("auto").time_s > 1.5 * found("none").time_s
    assert found("auto").memory_bytes > found("none").memory_bytes
    unsure = replace(real, provided=False)
    assert found("auto", unsure) == found("none", unsure)


CHAIN = """
<ir_version: 8, opset_import: ["": 17]>
chain (float[n, 256] x) => (float[n, 256] y) {
  h = MatMul(x, w1)
  a = Tanh(h)
  b = Sigmoid(a)
  c = Sqrt(b)
  y = MatMul(c, w2)
}
"""


def test_rounding_by_products_holds_the_inputs_of_weights(
    model_from_text: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sums, of what is fitted to and what is held out, and what a factorization copies; not all activations. What
    is rounded to the nearest level holds nothing, nor does anything without data."""
    monkeypatch.setattr(preflight, "held_bytes", lambda: 0)
    monkeypatch.setattr(preflight, "_one_run", lambda *_: (0.001, 0))
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((256, 256)).astype(np.float32) for name in ("w1", "w2")}
    model = model_from_text(CHAIN, weights)
    model.save(tmp_path / "model.onnx")
    real = InputData.from_arrays({"x": rng.standard_normal((64, 256)).astype(np.float32)}, model.inputs)

    def memory(weights: str, data: InputData = real, rounding: str = "auto") -> int:
        step: dict[str, object] = {"scheme": "weight_only", "weights": weights, "rounding": rounding, "rotate": "none"}
        return needs(steps({"quantize": step}), model, tmp_path / "model.onnx", data).memory_bytes

    plain, one = memory("int8"), 8 * 256 * 256
    assert memory("int8", replace(real, provided=False)) == memory("int4", replace(real, provided=False)) == plain
    assert memory("int4") - plain == memory("int8", rounding="gptq") - plain == (2 * 2 + 4) * one
