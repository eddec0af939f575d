"""Embedding tables as a narrower table and a shared projection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip
from modelpress_compression.passes.factorize.config import FactorizeConfig
from modelpress_compression.passes.factorize.factorize import Factorize
from modelpress_compression.passes.factorize.tables import reads

RNG = np.random.default_rng(7)
LOW = RNG.standard_normal((200, 8)) @ RNG.standard_normal((8, 32))
HIGH = RNG.standard_normal((200, 32))
TEXT = """<ir_version: 8, opset_import: ["" : 17]> g (int64[n, t] input_ids, int64[n, t] attention_mask) => ({of} y) {{
    rows = Gather(table, input_ids)
    {rest}
}}"""


@pytest.fixture
def reader(model_from_text: Callable[..., Model]) -> Callable[..., Model]:
    """A model that looks up rows; `rest`: what comes after."""

    def build(
        table: Any, rest: str = "y = Identity(rows)", of: str = "float[n, t, 32]", dtype: Any = np.float32, **more: Any
    ) -> Model:
        weights = {"table": table.astype(dtype), **{name: array.astype(dtype) for name, array in more.items()}}
        return model_from_text(TEXT.format(rest=rest, of=of), weights)

    return build


def apply(model: Model, ids: Any, folder: Path, mask: Any = None, **options: Any) -> PassResult:
    return Factorize(FactorizeConfig(**options))(model, context_of(model, ids, folder, mask))


def context_of(model: Model, ids: Any, folder: Path, mask: Any = None) -> Context:
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
    return Context(InputData.from_arrays(arrays, model.inputs), folder)


def rows_of(model: Model) -> Any:
    """All rows of the table of a model whose output they are."""
    from modelpress_compression.runtime import run, session_of

    ids = np.arange(200)[None]
    with session_of(model) as session:
        return run(session, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["y"][0]


def ids_of(high: int, seed: int = 1, count: int = 40) -> Any:
    return np.random.default_rng(seed).integers(0, high, (count, 6))


@pytest.mark.parametrize(("dtype", "close"), [(np.float32, 1e-5), (np.float16, 1e-2), (np.float64, 1e-10)])
def test_a_table_of_low_rank_is_exact(dtype: Any, close: float, reader: Any, tmp_path: Path) -> None:
    """A narrower table of the rank and one product, in the table's own type; rows are the same but for rounding."""
    of = {np.float32: "float", np.float16: "float16", np.float64: "double"}[dtype] + "[n, t, 32]"
    model = reader(LOW, of=of, dtype=dtype)
    result = apply(model, ids_of(200), tmp_path, rank_ratio=0.3)
    assert [node.op_type for node in result.model.graph] == ["Gather", "MatMul", "Identity"]
    assert {tuple(value.shape) for value in result.model.graph.initializers.values()} == {(200, 8), (8, 32)}
    expected = rows_of(model)
    np.testing.assert_allclose(rows_of(result.model), expected, rtol=0, atol=close * np.abs(expected).max())
    (row,) = result.details
    assert (row["method"], row["rank"], row["parameters_after"], row["macs_before"]) == ("svd", "8", 8 * 232, 0)
    assert row["macs_after"] == 8 * 32 * 6
    assert result.changes["parameters_removed_share"] == pytest.approx(1 - 8 * 232 / (200 * 32))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 60), columns=st.integers(2, 40), seed=st.integers(0, 100), weighted=st.booleans())
def test_full_rank_is_the_table(rows: int, columns: int, seed: int, weighted: bool) -> None:
    """Of any shape, with reads counted or not: factors of full rank give every row back (1e-8), and lose nothing."""
    from modelpress_compression.passes.factorize.methods.problem import Decomposition

    rng = np.random.default_rng(seed)
    table = rng.standard_normal((rows, columns))
    part = Decomposition(table, 1 + rng.integers(0, 9, rows).astype(float) if weighted else None)
    rank = min(rows, columns)
    np.testing.assert_allclose(part.features(rank) @ part.mixing(rank), table, rtol=0, atol=1e-8)
    assert part.kept(rank) == pytest.approx(part.energy)


def test_rows_that_are_read_come_first(reader: Any, tmp_path: Path) -> None:
    """Reads make the rows that are read err less, on other samples too; of all rows alike little more is lost."""
    model = reader(HIGH * np.linspace(2, 0.5, 32))
    options = {"rank_ratio": 0.5, "embeddings": "always"}
    own, alike = (
        apply(model, ids_of(20, count=400), tmp_path, **options),
        apply(model, ids_of(200), tmp_path, **options),
    )

    def lost(result: PassResult, some: slice) -> float:
        wanted = rows_of(model)[some]
        return float(np.square(rows_of(result.model)[some] - wanted).sum() / np.square(wanted).sum())

    read, every = slice(20), slice(None)
    assert lost(own, read) < 0.8 * lost(alike, read)
    assert lost(own, every) < 1.2 * lost(alike, every)


def test_every_row_counts_and_padding_does_not(reader: Any, tmp_path: Path) -> None:
    """Rows that nobody reads weigh one; what an attention mask leaves out is no read, negative indices count."""
    model = reader(HIGH)
    ids = np.array([[3, 3, -1, 0], [5, 3, 0, 0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = reads(model, [model.graph[0]], 200, context_of(model, ids, tmp_path, mask))
    assert found is not None
    wanted = np.ones(200)
    wanted[[3, 5, 199]] += (3, 1, 1)
    np.testing.assert_array_equal(found, wanted)
    many = reads(model, [model.graph[0]], 200, context_of(model, np.full((100, 10), 7), tmp_path))
    assert many is not None
    assert (many.max(), many.sum()) == (201, 400)


def test_a_table_of_full_rank_stays(reader: Any, tmp_path: Path) -> None:
    """Where more than 2 % would be lost, with the share; `always` takes it nevertheless, and `max_error` says other."""
    model = reader(HIGH)
    result = apply(model, ids_of(200), tmp_path)
    (skip,) = result.skipped
    assert not result.changed
    assert skip.reason.startswith("Its factors would lose 0.")
    assert apply(model, ids_of(200), tmp_path, embeddings="always").changed
    assert apply(model, ids_of(200), tmp_path, max_error=0.6).changed
    assert not apply(model, ids_of(200), tmp_path, embeddings="always", max_error=0.05).changed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"embeddings": "none"}, "Embeddings are left alone by the recipe."),
        ({"budget": 0.5}, "Looking up rows multiplies nothing: a budget of multiply-accumulates leaves it."),
        ({"budget_of": "latency"}, "Looking up rows multiplies nothing, and its factors do: they are not faster."),
        ({"method": "tucker"}, "It has no tucker factors: it has no kernel."),
        ({"exclude": ("table",)}, "Excluded by the recipe."),
        ({"rank_ratio": 0.01}, "No factors cost so little: it is too small, or its rank too low."),
    ],
    ids=str,
)
def test_what_leaves_a_table(options: Any, reason: str, reader: Any, tmp_path: Path) -> None:
    """Each with its reason."""
    model = reader(LOW)
    result = apply(model, ids_of(200), tmp_path, **options)
    assert (result.changed, [skip.reason for skip in result.skipped]) == (False, [reason])


@pytest.mark.parametrize("option", [{"energy": 0.99}, {"budget": 0.4, "budget_of": "parameters"}], ids=str)
def test_other_rules_of_ranks(option: Any, reader: Any, tmp_path: Path) -> None:
    """Energy and a budget of parameters rule tables as they do layers."""
    result = apply(reader(LOW), ids_of(200), tmp_path, **option)
    assert result.details[0]["relative_error"] <= 0.01
    assert result.changes["parameters_removed_share"] > 0.6


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (np.where(LOW[5, 5] == LOW, np.nan, LOW), "Its weight holds NaN or infinity."),
        (np.zeros((200, 32)), "Its weight is zero throughout."),
        (LOW[:, :1], "It has one input or one answer in each group: its rank is 1."),
        (LOW[:1], "It has one input or one answer in each group: its rank is 1."),
        (LOW[:2], "Its 64 numbers are too few to pay for a product."),
    ],
    ids=["nan", "zero", "one column", "one row", "two rows"],
)
def test_bad_tables_are_left_unharmed(table: Any, reason: str, reader: Any, tmp_path: Path) -> None:
    """The table stays, with its reason."""
    model = reader(table, of=f"float[n, t, {table.shape[1]}]")
    result = apply(model, ids_of(len(table)), tmp_path)
    assert (result.changed, [skip.reason for skip in result.skipped]) == (False, [reason])
    np.testing.assert_array_equal(model.graph.initializers["table"].const_value.numpy(), table.astype(np.float32))


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("turned = Transpose <perm = [1, 0]> (table) y = MatMul(rows, turned)", "Others read its weight as well."),
        ("some = Relu(rows) y = MatMul(some, table)", "Its weight is shared by nodes that read it in different ways."),
    ],
    ids=["transposed", "as it is"],
)
def test_a_tied_table_stays(rest: str, reason: str, reader: Any, tmp_path: Path) -> None:
    """A table that multiplies as well would cost its size a second time: it is left, with the reason."""
    table = LOW if "Transpose" in rest else LOW[:32]
    result = apply(reader(table, rest, of=f"float[n, t, {200 if 'Transpose' in rest else 32}]"), ids_of(32), tmp_path)
    assert not result.changed
    assert reason in [skip.reason for skip in result.skipped]


def test_a_table_of_two_readers(reader: Any, tmp_path: Path) -> None:
    """Two lookups of one table read one pair of factors; a table nobody reads is no layer."""
    rest = "mask = Gather(table, attention_mask) y = Add(rows, mask)"
    model = reader(LOW, rest, unread=LOW)
    result = apply(model, ids_of(200), tmp_path)
    assert [node.op_type for node in result.model.graph].count("Gather") == 2
    assert {tuple(value.shape) for value in result.model.graph.initializers.values()} == {(200, 8), (8, 32)}
    assert result.changes["layers_factorized"] == 1
    expected = rows_of(model)
    np.testing.assert_allclose(rows_of(result.model), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_layers_behind_a_table_are_repaired(reader: Any, tmp_path: Path) -> None:
    """The table's own factors are not fitted; the layer that follows is factorized and fitted as ever."""
    head = RNG.standard_normal((32, 48)) / 6
    model = reader(LOW, "y = MatMul(rows, head)", of="float[n, t, 48]", head=head)
    result = apply(model, ids_of(200), tmp_path)
    assert {row["layer"] for row in result.details} >= {"rows"}
    assert all("fitted" not in skip.reason for skip in result.skipped)


def test_indices_that_are_constant(reader: Any, tmp_path: Path, model_from_text: Any) -> None:
    """Such a lookup is folded by `fuse`, and told of here."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[3, 32] x) => (float[3, 32] y) {
        rows = Gather(table, index) y = Add(x, rows) }"""
    model = model_from_text(text, {"table": LOW.astype(np.float32), "index": np.arange(3)})
    data = InputData.from_arrays({"x": np.ones((3, 32), np.float32)}, model.inputs)
    result = Factorize(FactorizeConfig())(model, Context(data, tmp_path))
    assert result.skipped == (Skip("rows", "It cannot be factorized: its indices are constant, and fuse folds it."),)
