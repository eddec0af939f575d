"""Classes of labels."""

from __future__ import annotations

import numpy as np
import pytest
from modelpress_compression.channels.labels import Labels


def test_ties_make_classes_whatever_their_order() -> None:
    """A chain of a thousand ties, shuffled, is one class with the smallest label as its root."""
    labels = Labels()
    chain = labels.fresh(1000)
    order = np.random.default_rng(0).permutation(999)
    labels.unify(chain[order], chain[order + 1])
    assert set(labels.solve().root.tolist()) == {0}


def test_ties_may_come_after_a_solution() -> None:
    """Solving between ties does not change the classes."""
    labels = Labels()
    one, other = labels.fresh(3), labels.fresh(3)
    assert np.unique(labels.solve().root).size == 6
    labels.unify(one, other)
    third = labels.fresh(3)
    labels.unify(other, third[::-1].copy())
    assert labels.solve().root.tolist() == [0, 1, 2, 0, 1, 2, 2, 1, 0]


def test_freezing_one_label_freezes_its_class_for_the_first_reason() -> None:
    """The reason that was given first stands."""
    labels = Labels()
    one, other = labels.fresh(2), labels.fresh(2)
    labels.unify(one, other)
    labels.freeze(other[:1], "a", "first")
    labels.freeze(one[:1], "b", "second")
    classes = labels.solve()
    assert classes.free(one).tolist() == [False, True]
    assert labels.reasons[int(classes.reason[one[0]])].text == "first"


def test_axes_of_different_extents_are_not_tied() -> None:
    """The caller is told."""
    labels = Labels()
    with pytest.raises(ValueError, match="cannot be tied"):
        labels.unify(labels.fresh(2), labels.fresh(3))
