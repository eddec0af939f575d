"""The table of techniques."""

import re
from dataclasses import dataclass

import pytest
from modelpress_compression.options import Config, option, schema_of
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.schema import read
from modelpress_compression.search.quantization import choose_quantization
from modelpress_compression.techniques import TECHNIQUES, Technique, step_schema


@dataclass(frozen=True)
class LowRankConfig(Config):
    """Options of a technique that is not in the table."""

    rank_ratio: float = option(0.5, 1, "Share of the rank that stays.", gt=0, lte=1)


LOW_RANK = Technique("low_rank", 99, "Replaces a product by two of lower rank.", LowRankConfig, "nowhere:LowRank")


def test_every_row_is_sound() -> None:
    """Names in snake case, numbers that are used once, a sentence for each technique and each option."""
    rows = TECHNIQUES.values()
    assert all(re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", row.name) and row.summary.endswith(".") for row in rows)
    assert len({row.number for row in rows}) == len(rows)
    for row in rows:
        options = schema_of(row.config_class).options
        assert len({item.number for item in options}) == len(options)
        assert all(item.help.endswith((".", ".)")) for item in options), row.name


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_every_technique_has_its_pass(name: str) -> None:
    """Each row leads to a class that takes its config, or to what decides where the config leaves a choice open."""
    technique = TECHNIQUES[name]
    config = technique.config_class()
    assert callable(technique.chooser_for(config) or technique.make_pass(config))


def test_a_chooser_runs_where_a_choice_is_open() -> None:
    """`scheme: auto` is decided by the pipeline, a scheme by name is not."""
    assert TECHNIQUES["quantize"].chooser_for(QuantizeConfig()) is choose_quantization
    assert TECHNIQUES["quantize"].chooser_for(QuantizeConfig(scheme="static")) is None
    assert LOW_RANK.chooser_for(LowRankConfig()) is None


def test_a_technique_of_several_words() -> None:
    """`low_rank` is a step like any other; its message in the API is LowRankStep."""
    schema = step_schema([*TECHNIQUES.values(), LOW_RANK])
    assert read({"low_rank": {"rank_ratio": "5e-1"}}, schema) == ({"low_rank": {"rank_ratio": 0.5}}, ())
    (violation,) = read({"low_rnk": {}}, schema).violations
    assert "(did you mean 'low_rank'?)" in violation.description
    assert schema.by_name["low_rank"].kind == schema_of(LowRankConfig, "LowRankStep")
