"""Property tests of DesiredSet: several gateways send a worker the set of adapters that it should load, each time with
a revision."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.adapters.desired import DesiredSet

SENT = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.booleans()), max_size=20)


@given(SENT)
def test_the_highest_revision_of_connected_gateways_counts(sent: list[tuple[int, int, bool]]) -> None:
    """When a gateway sends a set of adapters, the DesiredSet compares the last set of each connected gateway and takes
    the set with the highest revision. The end of a gateway's connection does not change the DesiredSet."""
    desired: DesiredSet[str] = DesiredSet("")
    last: dict[int, int] = {}
    for sender, revision, ends in sent:
        if ends:
            last.pop(sender, None)
            before = (desired.revision, desired.value)
            desired.forget(sender)
            assert (desired.revision, desired.value) == before
            continue
        before = (desired.revision, desired.value)
        last[sender] = revision
        changed = desired.receive(sender, revision, f"set {revision}")
        assert desired.revision == max(last.values())
        assert desired.value == f"set {desired.revision}"
        assert changed == ((desired.revision, desired.value) != before)


def test_a_controller_that_counts_anew_is_followed_by_the_last_gateway() -> None:
    desired: DesiredSet[str] = DesiredSet("")
    desired.receive("g1", 9, "old")
    desired.receive("g2", 9, "old")
    assert not desired.receive("g1", 1, "new")
    assert desired.receive("g2", 1, "new")
    assert (desired.revision, desired.value) == (1, "new")
