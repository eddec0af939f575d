"""Synthetic inputs make models run, with values that the graph can take."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.graph import synthetic
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.graph.values import index_bound
from modelpress_compression.model import Model
from modelpress_compression.runtime import run_all, session_of

HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'


def runs(model: Model, batch_size: int = 1) -> int:
    """How many feeds the model answered."""
    data = synthetic_inputs(model, samples=4)
    with session_of(model) as session:
        return len(list(run_all(session, data.feeds(batch_size))))


def test_image_extents_are_found_by_trying(model_from_text: Callable[..., Model]) -> None:
    """Channels follow the first Conv; height and width are tried until the head fits: 7 * 7 * 2 inputs need 32."""
    text = (
        f"{HEAD} g (float[batch,chan,height,width] x) => (float[batch,3] y) "
        "{ a = Conv <strides = [4, 4]> (x, w)  f = Flatten(a)  y = MatMul(f, v) }"
    )
    weights = {"w": np.ones((2, 5, 8, 8), np.float32), "v": np.ones((98, 3), np.float32)}
    model = model_from_text(text, weights)
    data = synthetic_inputs(model, samples=4)
    assert data.arrays["x"].shape == (4, 5, 32, 32)
    assert not data.provided
    assert runs(model, batch_size=4) == 1


def test_a_first_shape_is_tried_however_late_it_is(
    model_from_text: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session of a large model may have taken all the time that there was."""
    monkeypatch.setattr(synthetic, "TIME_LIMIT_S", -1.0)
    model = model_from_text(f"{HEAD} g (float[batch,n] x) => (float[batch,n] y) {{ y = Relu(x) }}", {})
    assert synthetic_inputs(model, samples=4).arrays["x"].shape[0] == 4


def test_token_indices_stay_within_the_embedding(model_from_text: Callable[..., Model]) -> None:
    """Indices are below the table's rows, also behind a Cast; a mask is ones; equal names have equal extents."""
    text = (
        f"{HEAD} g (int64[batch,seq] ids, int64[batch,seq] attention_mask) => (float[batch,seq,4] y) "
        "{ i = Cast <to = 6> (ids)  e = Gather(table, i)  m = Cast <to = 1> (attention_mask)  "
        "u = Unsqueeze(m, axis)  y = Mul(e, u) }"
    )
    model = model_from_text(text, {"table": np.ones((7, 4), np.float32), "axis": np.int64([2])})
    data = synthetic_inputs(model, samples=4)
    assert data.arrays["ids"].shape == data.arrays["attention_mask"].shape == (4, 32)
    assert data.arrays["ids"].min() >= 0
    assert data.arrays["ids"].max() == 6
    assert (data.arrays["attention_mask"] == 1).all()


def test_rows_of_tables_in_few_bits_are_counted(model_from_text: Callable[..., Model]) -> None:
    """Indices go up to the axis that they are taken from, whatever else lies in the bytes."""
    for axis, shape, indices in ((0, (7, 16), 7), (1, (32, 5), 5)):
        attributes = f"<bits = 8, block_size = 16, gather_axis = {axis}, quantize_axis = {1 - axis}>"
        text = (
            f"{HEAD} g (int64[batch] ids) => (float[a,b] y) "
            f"{{ y = com.microsoft.GatherBlockQuantized {attributes} (table, ids, scales) }}"
        )
        scales = (7, 1) if axis == 0 else (2, 5)
        model = model_from_text(text, {"table": np.ones(shape, np.int8), "scales": np.ones(scales, np.float32)})
        assert index_bound(model.graph.inputs[0]) == indices


def test_tables_and_weights_that_are_inputs_bind_all_the_same(model_from_text: Callable[..., Model]) -> None:
    """A caller may give other numbers for a default, but not another shape: indices and channels follow it."""
    text = (
        f"{HEAD} g (int64[batch,seq] ids, float[7,4] table, float[batch,k] x, float[5,4] w) => "
        "(float[batch,seq,4] y, float[batch,4] z) { y = Gather(table, ids)  z = MatMul(x, w) }"
    )
    model = model_from_text(text, {"table": np.ones((7, 4), np.float32), "w": np.ones((5, 4), np.float32)})
    data = synthetic_inputs(model, samples=4)
    assert data.arrays["ids"].max() == 6
    assert data.arrays["x"].shape == (4, 5)


def test_a_mask_is_known_by_its_use(model_from_text: Callable[..., Model]) -> None:
    """Integers that are only compared are ones, whatever their name."""
    text = f"{HEAD} g (int64[batch,seq] k) => (bool[batch,seq] y) {{ y = Equal(k, one) }}"
    data = synthetic_inputs(model_from_text(text, {"one": np.int64(1).reshape(())}), samples=2)
    assert (data.arrays["k"] == 1).all()


def test_floats_match_the_normalization_of_the_graph(model_from_text: Callable[..., Model]) -> None:
    """A graph that begins with (x - mean) / std is fed N(mean, std): 50,000 numbers, means within 0.05 std."""
    text = f"{HEAD} g (float[batch,2,50,50] x) => (float[batch,2,50,50] y) {{ a = Sub(x, m)  y = Div(a, s) }}"
    weights = {"m": np.float32([100, 3]).reshape(1, 2, 1, 1), "s": np.float32([50, 0.5]).reshape(1, 2, 1, 1)}
    values = synthetic_inputs(model_from_text(text, weights), samples=10).arrays["x"]
    np.testing.assert_allclose(values.mean(axis=(0, 2, 3)), [100, 3], atol=2.5)
    np.testing.assert_allclose(values.std(axis=(0, 2, 3)), [50, 0.5], rtol=0.05)


def test_state_beside_the_batch_makes_whole_feeds(model_from_text: Callable[..., Model]) -> None:
    """Inputs without a common batch axis have one feed a sample; a sample rate is a plausible one."""
    text = (
        f"{HEAD} g (float[batch,sequence] input, float[2,batch,8] state, int64 sr) => (float[2,batch,8] y, bool k) "
        "{ y = Identity(state)  k = Equal(sr, rate) }"
    )
    model = model_from_text(text, {"rate": np.int64(16000).reshape(())})
    data = synthetic_inputs(model, samples=3)
    assert data.whole_feeds
    assert data.arrays["state"].shape == (3, 2, 1, 8)
    assert set(data.arrays["sr"].tolist()) == {16000}
    assert runs(model) == 4


def test_a_fixed_batch_gets_whole_batches(model_from_text: Callable[..., Model]) -> None:
    """Samples are a multiple of the batch that the model insists on."""
    text = f"{HEAD} g (float[3,4] x) => (float[3,4] y) {{ y = Relu(x) }}"
    model = model_from_text(text)
    assert len(synthetic_inputs(model, samples=4)) == 6


def test_sums_of_dimensions_follow_their_terms(model_from_text: Callable[..., Model]) -> None:
    """A dimension named 'past + seq' has the sum of both extents."""
    text = (
        f"{HEAD} g (float[batch,past,4] cache, float[batch,seq,4] x, float[batch,total,4] z) => (float[batch,t,4] y) "
        "{ c = Concat <axis = 1> (cache, x)  y = Add(c, z) }"
    )
    model = model_from_text(text)
    model.graph.inputs[2].shape = type(model.graph.inputs[2].shape)(["batch", "past + seq", 4])
    data = synthetic_inputs(model, samples=2)
    past, seq, total = (data.arrays[name].shape[1] for name in ("cache", "x", "z"))
    assert total == past + seq


def test_a_size_baked_into_the_graph_is_read_from_the_failure(model_from_text: Callable[..., Model]) -> None:
    """A dimension that is dynamic in name only: the Reshape wants 7 rows, and its failure says so."""
    text = f"{HEAD} g (float[batch,seq,4] x) => (float[batch,7,2,2] y) {{ y = Reshape(x, s) }}"
    data = synthetic_inputs(model_from_text(text, {"s": np.int64([-1, 7, 2, 2])}), samples=2)
    assert data.arrays["x"].shape[1] % 7 == 0
    added = f"{HEAD} g (float[batch,seq,4] x) => (float[batch,seq,4] y) {{ y = Add(x, positions) }}"
    data = synthetic_inputs(model_from_text(added, {"positions": np.ones((1, 11, 4), np.float32)}), samples=2)
    assert data.arrays["x"].shape[1] in (1, 11)


def test_the_same_seed_gives_the_same_inputs(model_from_text: Callable[..., Model]) -> None:
    """Reports can be repeated: inputs depend on model and seed alone."""
    text = f"{HEAD} g (float[batch,4] x) => (float[batch,4] y) {{ y = Relu(x) }}"
    model = model_from_text(text)
    first, second, other = (synthetic_inputs(model, samples=2, seed=seed).arrays["x"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_what_cannot_run_says_what_was_tried(model_from_text: Callable[..., Model]) -> None:
    """A model that fails on every input is refused with the shapes tried and the first failure."""
    text = f"{HEAD} g (float[batch,width] x) => (float[1] y) {{ y = Reshape(k, s) }}"
    model = model_from_text(text, {"k": np.ones(3, np.float32), "s": np.int64([2, 2])})
    with pytest.raises(ModelNotRunnableError, match=r"shapes tried.*--data") as raised:
        synthetic_inputs(model)
    assert "/tmp" not in raised.value.message
