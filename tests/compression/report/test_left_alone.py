"""Reasons, folded."""

from modelpress_compression.report.left_alone import folded_reasons


def test_equal_reasons_are_one_row() -> None:
    """The most frequent first, with all names; candidates are told from nodes."""
    rows = folded_reasons([("a", "rare"), ("b", "often"), ("static", "often"), ("c", "often")], {"static"})
    assert [(row["count"], row["what"], row["reason"], row["names"]) for row in rows] == [
        (2, "node", "often", ["b", "c"]),
        (1, "node", "rare", ["a"]),
        (1, "candidate", "often", ["static"]),
    ]


def test_reasons_that_differ_in_numbers_are_one() -> None:
    """With the span of each number; numbers within names are left alone."""
    skipped = [("a", "its 64 weights of int8 cost 0.5 dB"), ("b", "its 9 weights of int8 cost 0.5 dB")]
    (row,) = folded_reasons(skipped, ())
    assert row["reason"] == "its 9 to 64 weights of int8 cost 0.5 dB"
