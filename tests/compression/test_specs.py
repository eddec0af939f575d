"""Tensor specs as a person writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.specs import DTYPES, TensorSpec, parse_specs

names = st.from_regex(r"[A-Za-z_][\w./]{0,20}", fullmatch=True)
dims = st.one_of(st.integers(0, 10**9), st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,10}", fullmatch=True), st.none())


@given(names, st.sampled_from(DTYPES), st.lists(dims, max_size=5))
def test_text_round_trip(name: str, dtype: str, shape: list[int | str | None]) -> None:
    """A spec printed and parsed again is the same spec."""
    spec = TensorSpec(name, dtype, tuple(shape))
    assert TensorSpec.parse(str(spec)) == spec


def test_scalar_and_spaces() -> None:
    """Brackets with nothing in them are a scalar; spaces around dimensions do not matter."""
    assert TensorSpec.parse("sr:int64[]") == TensorSpec("sr", "int64", ())
    assert TensorSpec.parse(" x:float32[batch, 1, 28] ") == TensorSpec("x", "float32", ("batch", 1, 28))


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "x:float32",
        "x:float32[1",
        "x:float33[1]",
        "x:float32[-1]",
        "x:float32[1.5]",
        ":float32[1]",
        "x:float32[a b]",
    ],
)
def test_bad_texts_name_themselves(text: str) -> None:
    """What cannot be read is refused with the text itself in the message."""
    with pytest.raises(InvalidInputsError) as error:
        TensorSpec.parse(text)
    assert text.strip() in str(error.value)


def test_equal_names_are_refused() -> None:
    """Two inputs of one name cannot be told apart."""
    with pytest.raises(InvalidInputsError, match="same name"):
        parse_specs(["x:float32[1]", "x:float32[2]"])


def test_concrete_shape() -> None:
    """Dynamic and unknown dimensions take the given extent."""
    assert TensorSpec("x", "float32", ("batch", 3, None)).concrete_shape(7) == (7, 3, 7)
