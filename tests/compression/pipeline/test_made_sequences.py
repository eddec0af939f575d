"""Static quantization without data of models that read tokens: fitted to sequences made from the model, or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import InputData, Model
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.pipeline import made_sequences
from modelpress_compression.pipeline.made_sequences import apply_to_made_sequences, is_open
from modelpress_compression.recipe import Step
from modelpress_compression.search.steps import StepRecord, save

ModelFromText = Callable[..., Model]
STATIC = Step("quantize", QuantizeConfig(scheme="static"))


@pytest.fixture
def encoder(model_from_text: ModelFromText) -> Model:
    """Two layers over embeddings, some channels of which are far larger than the others."""
    text = """<ir_version: 9, opset_import: ["": 18]>
    net (int64[n, seq] input_ids, int64[n, seq] attention_mask) => (float[n, seq, 32] hidden) {
        e = Gather (words, input_ids)
        a = MatMul (e, w1)
        r = Tanh (a)
        b = MatMul (r, w2)
        m = Cast <to = 1> (attention_mask)
        u = Unsqueeze (m, last)
        hidden = Mul (b, u)
    }"""
    random = np.random.default_rng(0)
    words = random.standard_normal((200, 32)).astype(np.float32)
    words[:, :2] *= 20
    weights = {
        "words": words,
        "w1": (random.standard_normal((32, 64)) / 8).astype(np.float32),
        "w2": (random.standard_normal((64, 32)) / 8).astype(np.float32),
        "last": np.int64([-1]),
    }
    return model_from_text(text, weights)


def context_of(model: Model, folder: Path) -> Context:
    return Context(synthetic_inputs(model), folder, original=model)


def applied(model: Model, folder: Path) -> StepRecord:
    path = folder / "given" / "model.onnx"
    model = save(model, path)
    return apply_to_made_sequences(STATIC, model, path, context_of(model, folder), folder / "step" / "model.onnx")


def test_what_is_fitted_is_taken_where_it_is_better(encoder: Model, tmp_path: Path) -> None:
    """On tokens that neither step has seen it keeps more than what nothing is fitted to; the report says what it
    stands on."""
    record = applied(encoder, tmp_path)
    assert record.path == tmp_path / "step" / "fitted" / "model.onnx"
    unseen = synthetic_inputs(encoder, samples=32, seed=5)
    plain, fitted = (
        compare_outputs(tmp_path / "given" / "model.onnx", tmp_path / "step" / name, unseen).sqnr_db
        for name in ("model.onnx", "fitted/model.onnx")
    )
    assert fitted > plain
    (text,) = [warning for warning in record.warnings if "token sequences" in warning]
    assert "fitted to 64" in text
    assert "point apart" in text
    assert "Confidence is low" in text
    assert not any("synthetic inputs" in warning for warning in record.warnings)


def test_what_is_fitted_is_left_where_it_is_worse(
    encoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of one token alone are no good to fit to: the step is as it is without them, and a note has figures."""
    made = made_sequences._made

    def poor(context: Context) -> InputData | None:
        found = made(context)
        assert found is not None
        ids = np.zeros_like(found.arrays["input_ids"])
        ids[-made_sequences.JUDGING_SAMPLES :] = found.arrays["input_ids"][-made_sequences.JUDGING_SAMPLES :]
        return replace(found, arrays={**found.arrays, "input_ids": ids})

    monkeypatch.setattr(made_sequences, "_made", poor)
    record = applied(encoder, tmp_path)
    assert record.path == tmp_path / "step" / "model.onnx"
    assert any("was tried and left" in note for note in record.notes)
    assert any("synthetic inputs" in warning for warning in record.warnings)


def test_other_models_are_done_once(digits: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images no sequences are made."""
    runs = []
    once = made_sequences.apply_step
    monkeypatch.setattr(made_sequences, "apply_step", lambda *given: runs.append(1) or once(*given))
    record = applied(digits, tmp_path)
    assert record.changes["Conv"]
    assert len(runs) == 1


def test_only_static_steps_without_data_ask_for_sequences(encoder: Model, tmp_path: Path) -> None:
    """Neither what finds its ranges in each run, nor what has real inputs."""
    context = context_of(encoder, tmp_path)
    assert is_open(STATIC, encoder, context)
    assert not is_open(Step("quantize", QuantizeConfig(scheme="dynamic")), encoder, context)
    assert not is_open(STATIC, encoder, replace(context, data=replace(context.data, provided=True)))
