"""Classes of `frozen_dataclass` behave like frozen dataclasses, except that only the type checker refuses
assignments.
"""

from __future__ import annotations

from dataclasses import field, replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.api.frozen import frozen_dataclass


@frozen_dataclass
class Pair:
    """A value with a default."""

    number: int
    words: tuple[str, ...] = field(default_factory=tuple)


pairs = st.builds(Pair, st.integers(0, 3), st.lists(st.sampled_from("ab"), max_size=2).map(tuple))


@given(pairs, pairs)
def test_equal_values_are_one_key(one: Pair, other: Pair) -> None:
    """Two instances are equal, and count as one dictionary key, if and only if their fields are equal."""
    equal = (one.number, one.words) == (other.number, other.words)
    assert (one == other) is equal
    assert len({one: 1, other: 2}) == (1 if equal else 2)


@given(pairs, st.integers())
def test_a_replaced_field_leaves_the_original(pair: Pair, number: int) -> None:
    """`replace` returns a new instance and does not change the original. Instances have no attributes except their
    fields."""
    changed = replace(pair, number=number)
    assert (changed.number, changed.words) == (number, pair.words)
    assert pair is not changed
    assert not hasattr(pair, "__dict__")
