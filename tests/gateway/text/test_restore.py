"""If a text is interrupted at any point and another detokenizer continues it, the whole text equals the uninterrupted
one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.gateway.text.detokenizer import Detokenizer
from tests.gateway.text.kinds import Kind, token_ids

pytestmark = pytest.mark.slow

LAW = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def run(ours: Detokenizer, ids: Sequence[int], takes: Sequence[bool]) -> tuple[str, str | None]:
    """Push ids one by one, and pop the text after some of them. Returns the popped text and the stop string that ended
    it, if any."""
    text = ""
    for number, token_id in enumerate(ids):
        stop = ours.push([token_id])
        if stop is not None:
            return text + ours.pop_text(True), stop
        if takes[number % len(takes)]:
            text += ours.pop_text(False)
    return text, None


@LAW
@given(data=st.data())
def test_a_cut_changes_nothing(kind: Kind, data: st.DataObject) -> None:
    """The texts before and after an interruption add up to the uninterrupted text, with the same stop string and
    tokens. The interruption may be in a character, in a stop string, after a special token or after a run of bytes."""
    prompt = data.draw(token_ids(kind), label="prompt")
    ids = data.draw(token_ids(kind), label="ids")
    takes = data.draw(st.lists(st.booleans(), min_size=1, max_size=4), label="takes")
    text = kind.theirs.decode(ids, skip_special_tokens=True)
    some = st.integers(0, max(len(text) - 1, 0)).flatmap(lambda i: st.integers(1, 8).map(lambda n: text[i : i + n]))
    stop = data.draw(st.lists((some | st.text(max_size=3)).filter(bool), max_size=3), label="stop")
    at = data.draw(st.integers(0, len(ids)), label="cut")

    whole = kind.ours.detokenizer(prompt, stop=stop)
    undisturbed, ended = run(whole, ids, [False])
    undisturbed += whole.pop_text(True)

    first = kind.ours.detokenizer(prompt, stop=stop)
    before, early = run(first, ids[:at], takes)
    if early is not None:
        assert (before, early) == (undisturbed, ended)
        return
    shown = len(first.token_ids) - first.pending_tokens() if stop or not first.pending_chars else len(first.token_ids)
    second = kind.ours.detokenizer(prompt, stop=stop)
    second.restore(first.token_ids[:shown], len(before))
    after, late = run(second, ids[shown:], takes)
    assert (before + after + second.pop_text(True), late) == (undisturbed, ended)
    assert second.token_ids == whole.token_ids


def test_tokens_without_their_text_are_refused(kind: Kind) -> None:
    """A restore is refused if the text of the tokens is shorter than the text that was already returned."""
    with pytest.raises(ValueError, match="characters"):
        kind.ours.detokenizer([]).restore([], 1)
