"""Layers that are faster in float32 stay there; which ones, their prices say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from modelpress_compression import Model
from modelpress_compression.measure.layer_times import LayerTime
from modelpress_compression.search import mixed_schemes
from modelpress_compression.search.mixed_schemes import MixedSchemeSearch
from modelpress_compression.search.quantization import SchemeSearch


def timed(monkeypatch: pytest.MonkeyPatch, slower: Sequence[str]) -> list[str]:
    """Layers in 8 bits take half the time, those in `slower` twice as long; returns the names that were asked for."""
    asked: list[str] = []

    def times(models: Sequence[Model], *_: Any) -> list[Mapping[str, LayerTime]]:
        names = [node.name or "" for node in models[0].nodes()]
        asked.extend(names)
        whole = {name: LayerTime(1.0, "Conv", "float") for name in names}
        return [whole, {name: LayerTime(2.0 if name in slower else 0.5, "QLinearConv", "uint8") for name in names}]

    monkeypatch.setattr(mixed_schemes, "layer_times", times)
    return asked


def layers_of(search: SchemeSearch) -> list[str]:
    assert search.quantizer is not None
    return [node.name or "" for node in search.quantizer.plan.layers]


def test_a_layer_that_is_slower_in_8_bits_stays_in_float32(
    search: SchemeSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one alone; the answers of digits permit the rest."""
    layers = layers_of(search)
    assert len(layers) >= 2
    timed(monkeypatch, layers[:1])
    (candidate,) = MixedSchemeSearch(search).candidates()
    assert not candidate.reason
    assert candidate.variant.startswith(f"1 of {len(layers)} layers in float32")
    kinds = {node.name: node for node in candidate.record.model.nodes()}
    first = kinds[layers[0]].inputs[0]
    assert first is not None
    producer = first.producer()
    assert producer is None or producer.op_type != "DequantizeLinear"


def test_where_all_are_faster_nothing_new_is_built(search: SchemeSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain static quantization is that candidate already."""
    timed(monkeypatch, [])
    assert list(MixedSchemeSearch(search).candidates()) == []


def test_where_all_are_slower_nothing_is_built(search: SchemeSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float model is that candidate already."""
    timed(monkeypatch, layers_of(search))
    assert list(MixedSchemeSearch(search).candidates()) == []
