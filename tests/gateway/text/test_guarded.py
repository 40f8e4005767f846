"""Guards around a real detokenizer: the text equals the filtered whole text, and the log probabilities reveal no more
than the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cluster.api.types import PositionLogprobs
from cluster.gateway.guards.stream import Action, GuardChain, PatternStage
from cluster.gateway.guards.text import GuardedLogprobs, GuardedText
from cluster.gateway.text.logprobs import LogprobTexts, TokenLogprob
from cluster.policy.tenants.patterns import Patterns
from tests.gateway.guards.test_stream import ignore
from tests.gateway.text.kinds import Kind, token_ids

LAW = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


class Run:
    """The result of a call: the text, the tokens that are counted as usage, and the log probabilities that were
    sent."""

    def __init__(self, text: Any, logprobs: Any, steps: Sequence[list[int]], takes: Sequence[bool]) -> None:
        self.text = ""
        self.told: list[TokenLogprob] = []
        self.billed_early = 0
        stopped = False
        for number, step in enumerate(steps):
            before = len(text.token_ids)
            stopped = text.push(step) is not None
            came = max(len(text.token_ids) - before, 0)
            self.told += logprobs.push([PositionLogprobs([one], [-1.0]) for one in step[:came]])
            if stopped:
                break
            if takes[number % len(takes)]:
                self.text += text.pop_text(False)
                self.billed_early = len(text.token_ids) - text.pending_tokens()
        self.text += text.pop_text(True)
        self.told += logprobs.push(())
        self.tokens = list(text.token_ids)
        self.refused = text.refused
        assert text.pending_chars == 0


def guarded(kind: Kind, patterns: Patterns, action: Action, steps: Any, takes: Any, stop: Sequence[str]) -> Run:
    """Return the result of a call with one guard."""
    chain = GuardChain([PatternStage(patterns, action, ignore)], [1e9], lambda number, error: False, lambda: 0.0)
    text = GuardedText(kind.ours.detokenizer([], stop=stop), chain)
    return Run(text, GuardedLogprobs(LogprobTexts(kind.ours, 1), text), steps, takes)


def plain(kind: Kind, steps: Any, stop: Sequence[str]) -> Run:
    """Return the result of a call with these steps and stop strings, without guards."""
    return Run(kind.ours.detokenizer([], stop=stop), LogprobTexts(kind.ours, 1), steps, [False])


@LAW
@given(data=st.data())
@pytest.mark.slow
def test_what_is_delivered_and_what_is_told(kind: Kind, data: st.DataObject) -> None:
    """A secret that spans several tokens does not reach the caller: neither in the text, nor as the text or id of a
    token in the log probabilities. No other text is lost, and the caller is not billed for tokens that a guard
    withheld."""
    steps = data.draw(st.lists(token_ids(kind), min_size=1, max_size=6))
    takes = data.draw(st.lists(st.booleans(), min_size=1, max_size=3))
    bare = plain(kind, steps, ())
    assume(bare.text)

    def part(most: int) -> str:
        start = data.draw(st.integers(0, len(bare.text) - 1))
        return bare.text[start : start + data.draw(st.integers(1, most))]

    secret = part(12)
    stop = (part(4),) if data.draw(st.booleans()) else ()
    action: Action = data.draw(st.sampled_from(["redact", "refuse"]))
    source = "".join(f"\\x{{{ord(one):x}}}" for one in secret)
    alone = plain(kind, steps, stop)
    run = guarded(kind, Patterns({"secret": source}), action, steps, takes, stop)

    spans = [found.span() for found in re.finditer(re.escape(secret), alone.text)]
    if action == "redact":
        assert run.text == alone.text.replace(secret, "[redacted: secret]")
        assert run.tokens == alone.tokens
    else:
        assert run.text == alone.text[: spans[0][0] if spans else None]
        assert run.tokens == alone.tokens[: len(run.tokens)]
    assert run.refused == (action == "refuse" and bool(spans))
    assert run.billed_early <= len(run.tokens)
    # Log probabilities are sent in order, and no text can be reconstructed across missing tokens.
    rest = iter(run.told)
    one = next(rest, None)
    told = ""
    for was in alone.told:
        kept = one is not None and one == was
        told += was.token if kept and was.token_id not in kind.special_ids else "\ue000"
        one = next(rest, None) if kept else one
    assert one is None
    # Texts with outer spaces or broken bytes are left out: the space before the first word is only in the token, and
    # broken bytes are decoded differently when they are decoded together.
    whole = kind.ours.decode(alone.tokens)
    if not stop and secret == secret.strip() and "\ufffd" not in whole:
        assert secret not in told
    if not spans and not stop and "\ufffd" not in whole:
        assert kind.ours.decode([one.token_id for one in run.told]) == whole


def test_no_part_of_a_redacted_character_is_told(kind: Kind) -> None:
    """If a redacted character consists of several tokens, no id of these tokens is sent."""
    ids = kind.theirs.encode("so 🦄 it", add_special_tokens=False)
    parts = [one for one in ids if "\ufffd" in kind.theirs.decode([one]) or one in kind.byte_ids]
    assert len(parts) > 1
    run = guarded(kind, Patterns({"beast": "🦄"}), "redact", [[one] for one in ids], [True], ())
    assert "[redacted: beast]" in run.text
    assert not {one.token_id for one in run.told} & set(parts)
    assert len(run.told) == len(ids) - len(parts)
