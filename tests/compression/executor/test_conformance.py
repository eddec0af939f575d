"""ONNX's own backend node tests."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pytest
from modelpress_compression.executor.registry import supported_operators
from oracles import conformance

# Whole opsets that onnxruntime does not load, operators of files, strings and trees, and forms before opset 7.
_UNSUPPORTED = frozenset(
    (
        "Adagrad", "Adam", "ArrayFeatureExtractor", "Binarizer", "CausalConvWithState", "FlexAttention", "ImageDecoder",
        "LabelEncoder", "LinearAttention", "Momentum", "RegexFullMatch", "StringConcat", "StringNormalizer",
        "StringSplit", "SwiGLU", "TfIdfVectorizer", "TreeEnsemble",
    )
)  # fmt: skip
_GROUPS = 16


@cache
def _by_operator() -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for case in conformance.cases():
        groups[conformance.operator_of(case)[1]].append(case)
    return dict(groups)


@pytest.mark.parametrize("group", range(_GROUPS))
def test_every_case_of_every_implemented_operator_passes(group: int) -> None:
    """A sixteenth of the operators a test: each case passes, unless its operator is known to be missing."""
    groups = _by_operator()
    wrong = []
    for name in sorted(groups)[group::_GROUPS]:
        for case in groups[name]:
            outcome = conformance.check(case)
            missing = outcome.status == "unsupported" and (
                name in _UNSUPPORTED
                or any(f".{op}," in outcome.detail for op in _UNSUPPORTED)
                or case.name == "test_scan_sum"
            )
            if outcome.status != "passed" and not missing:
                wrong.append(f"{outcome.name}: {outcome.status}: {outcome.detail}")
    assert not wrong, "\n".join(wrong)


def test_at_least_150_operators_of_the_standard_are_implemented() -> None:
    """Operators of ai.onnx alone, those of com.microsoft not counted."""
    assert sum(domain == "" for domain, _ in supported_operators()) >= 150
