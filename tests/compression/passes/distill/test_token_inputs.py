"""Token sequences made from the model alone: what is exchanged or drawn, and what stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import runtime
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill import made_inputs as making
from modelpress_compression.passes.distill.made_inputs import made_inputs
from modelpress_compression.passes.distill.token_inputs import LEAST_LENGTH, find_token_input, with_lengths

VOCABULARY, WIDTH = 60, 12
ModelFromText = Callable[..., Model]


def table(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)


@pytest.fixture
def encoder(model_from_text: ModelFromText) -> Model:
    """Hidden states that all lie near one direction."""
    text = """<ir_version: 9, opset_import: ["": 18]>
    net (int64[n, seq] input_ids, int64[n, seq] attention_mask, int64[n, seq] token_type_ids)
        => (float[n, seq, 12] last_hidden_state) {
        e = Gather (words, input_ids)
        s = Gather (segments, token_type_ids)
        a = Add (e, s)
        m = Cast <to = 1> (attention_mask)
        u = Unsqueeze (m, last)
        k = Mul (a, u)
        last_hidden_state = Add (k, common)
    }"""
    weights = {
        "words": table(),
        "segments": table(1)[:2],
        "last": np.int64([-1]),
        "common": np.full(WIDTH, 0.5, np.float32),
    }
    return model_from_text(text, weights)


@pytest.fixture
def classifier(model_from_text: ModelFromText) -> Model:
    """Scores of four classes from the mean of the embeddings; random tokens show nearly always the first."""
    text = """<ir_version: 9, opset_import: ["": 18]>
    net (int64[n, seq] input_ids) => (float[n, 4] scores) {
        e = Gather (words, input_ids)
        p = ReduceMean <keepdims = 0> (e, axis)
        scores = Gemm (p, w, b)
    }"""
    weights = {
        "words": table(),
        "axis": np.int64([1]),
        "w": np.random.default_rng(2).standard_normal((WIDTH, 4)).astype(np.float32),
        "b": np.float32([2, 0, 0, 0]),
    }
    return model_from_text(text, weights)


@pytest.fixture
def language_model(model_from_text: ModelFromText) -> Model:
    """Each token is followed by the next one of the vocabulary, almost surely."""
    text = """<ir_version: 9, opset_import: ["": 18]>
    net (int64[n, seq] input_ids) => (float[n, seq, 60] logits) {
        e = Gather (words, input_ids)
        logits = MatMul (e, w)
    }"""
    follows = 20 * np.roll(np.eye(VOCABULARY, dtype=np.float32), 1, axis=1)
    return model_from_text(text, {"words": np.eye(VOCABULARY, dtype=np.float32), "w": follows})


def made(model: Model, folder: Path) -> tuple[InputData, str]:
    return made_inputs(model, Context(synthetic_inputs(model, samples=4), folder, original=model), 0, math.inf)


def nearness(model: Model, arrays: dict[str, Array]) -> float:
    """Mean cosine of different sequences' mean outputs."""
    with runtime.session_of(model) as session:
        hidden = runtime.run(session, arrays)["last_hidden_state"]
    weight = arrays["attention_mask"][..., None]
    points = (hidden * weight).sum(1) / weight.sum(1)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    cosines = points @ points.T
    return float(cosines[~np.eye(len(points), dtype=bool)].mean())


def test_hidden_states_of_different_sequences_point_apart(encoder: Model, tmp_path: Path) -> None:
    """Exchanged tokens bring the mean cosine of outputs down by half; lengths differ, and there is one segment."""
    data, how = made(encoder, tmp_path)
    plausible = with_lengths(synthetic_inputs(encoder, samples=making.TOKEN_SAMPLES), 0)
    before, after = (nearness(encoder, dict(one.arrays)) for one in (plausible, data))
    assert after < before / 2
    np.testing.assert_array_equal(data.arrays["attention_mask"], plausible.arrays["attention_mask"])
    lengths = data.arrays["attention_mask"].sum(1)
    assert lengths.min() >= LEAST_LENGTH
    assert len(np.unique(lengths)) > 10
    assert not data.arrays["token_type_ids"].any()
    assert "point apart" in how


def test_sequences_show_each_class(classifier: Model, tmp_path: Path) -> None:
    """Random tokens show one class, exchanged ones all four."""

    def rarest(ids: Array) -> float:
        with runtime.session_of(classifier) as session:
            scores = runtime.run(session, {"input_ids": ids})["scores"]
        return float(np.bincount(scores.argmax(1), minlength=4).min() / len(ids))

    data, how = made(classifier, tmp_path)
    assert rarest(synthetic_inputs(classifier, samples=making.TOKEN_SAMPLES).arrays["input_ids"]) < 0.05
    assert rarest(data.arrays["input_ids"]) > 0.15
    assert "show each class" in how


def test_a_language_model_writes_its_own_text(language_model: Model, tmp_path: Path) -> None:
    """Each token follows from the one before it, as the model has it."""
    data, how = made(language_model, tmp_path)
    ids = data.arrays["input_ids"]
    assert float(((ids[:, :-1] + 1) % VOCABULARY == ids[:, 1:]).mean()) > 0.99
    assert len(np.unique(ids[:, 0])) > 10
    assert "scores of the next token" in how


def test_without_time_tokens_stay_as_they_began(
    encoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, since random tokens are inputs that the model can get."""
    monkeypatch.setattr(making, "MAX_SECONDS", -1.0)
    data, _ = made(encoder, tmp_path)
    ids = data.arrays["input_ids"]
    plausible = synthetic_inputs(encoder, samples=making.SAMPLES).arrays["input_ids"]
    np.testing.assert_array_equal(ids, plausible[: making.TOKEN_SAMPLES])


def test_tables_that_cannot_be_read_are_left(encoder: Model, model_from_text: ModelFromText) -> None:
    """Tokens that two tables are read for, or a table in integers, are no input that tokens are exchanged in."""
    found = find_token_input(encoder, synthetic_inputs(encoder, samples=2))
    assert found is not None
    assert (found.ids, found.embedded, tuple(found.table.shape)) == ("input_ids", "e", (VOCABULARY, WIDTH))
    text = """<ir_version: 9, opset_import: ["": 18]>
    net (int64[n, seq] input_ids) => (float[n, seq, 12] y) {
        e = Gather (words, input_ids)
        s = Gather (more, input_ids)
        y = Add (e, s)
    }"""
    twice = model_from_text(text, {"words": table(), "more": table(1)})
    assert find_token_input(twice, synthetic_inputs(twice, samples=2)) is None
