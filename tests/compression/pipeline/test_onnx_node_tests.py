"""ONNX's own test models through the engine: what comes back is the same model, and nothing fails within."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
from oracles.conformance import Key
from oracles.node_tests import CUT, TREATMENTS, WRONG, Outcome, Subject, cases, journey, subjects, subjects_of

_GROUPS = 32
_SAMPLED = 150
_TREATMENTS = (*TREATMENTS, CUT)


@cache
def _subjects() -> tuple[Subject, ...]:
    return tuple(subjects())


def _number(text: str) -> int:
    """The same in every run, and without meaning."""
    return zlib.crc32(text.encode())


@cache
def _sample() -> tuple[Subject, ...]:
    """One test of each of 150 operators, in one of its forms."""
    by_operator: dict[Key, list[Any]] = {}
    for case, operator in cases():
        by_operator.setdefault(operator, []).append(case)
    operators = sorted(by_operator, key=lambda operator: _number("::".join(operator)))[:_SAMPLED]
    tests = [(min(by_operator[operator], key=lambda case: _number(case.name)), operator) for operator in operators]
    # Forms are made for these alone: those of all tests would take longer than the test itself.
    return tuple(forms[_number(forms[0].name) % len(forms)] for forms in (list(subjects_of(*test)) for test in tests))


def _wrong(outcomes: Iterable[Outcome]) -> list[str]:
    return [
        f"{outcome.subject}, {outcome.treatment}: {outcome.status}: {outcome.detail}"
        for outcome in outcomes
        if outcome.status in WRONG
    ]


def test_one_model_of_150_operators_by_one_treatment_comes_back_the_same() -> None:
    """Each model is loaded and goes through one treatment, another one for each; most load."""
    outcomes = [
        outcome
        for number, subject in enumerate(_sample())
        for outcome in journey(subject, [_TREATMENTS[number % len(_TREATMENTS)]])
    ]
    assert not (wrong := _wrong(outcomes)), "\n".join(wrong)
    loaded = sum((outcome.treatment, outcome.status) == ("load", "equal") for outcome in outcomes)
    assert loaded >= 0.7 * _SAMPLED


@pytest.mark.parametrize(
    ("name", "treatment", "status"),
    [
        # Its sizes count channels that are cut.
        ("test_center_crop_pad_crop (between products)", CUT, "equal"),
        # The target names the last axes alone.
        ("test_expand_shape_model2 (between convolutions)", CUT, "equal"),
        # onnxruntime infers a false shape for what it gives, which an If with it inside runs into.
        ("test_stft_with_window (between products)", "static", "close"),
        # The masked model makes NaN of the infinities that the model gives.
        ("test_pow (between convolutions)", CUT, "equal"),
        # The masked model counts the elements of the batch too.
        ("test_rms_normalization_4d_axis_negative_4 (between convolutions)", CUT, "equal"),
    ],
)
def test_what_was_wrong_once(name: str, treatment: str, status: str) -> None:
    """Found by this net."""
    tests = (test for test in cases() if test[0].name == name.partition(" (")[0])
    (subject,) = (subject for test in tests for subject in subjects_of(*test) if subject.name == name)
    assert [outcome.status for outcome in journey(subject, [treatment])] == ["equal", status]


@pytest.mark.slow
@pytest.mark.parametrize("group", range(_GROUPS))
def test_every_model_by_one_treatment_comes_back_the_same(group: int) -> None:
    """One in 32 of all models a test; docs/generate_onnx_node_tests.py takes each through all treatments."""
    outcomes = [
        outcome
        for subject in _subjects()[group::_GROUPS]
        for outcome in journey(subject, [_TREATMENTS[_number(subject.name) % len(_TREATMENTS)]])
    ]
    assert not (wrong := _wrong(outcomes)), "\n".join(wrong)
