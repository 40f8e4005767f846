"""Guards of a parsed output. Content, reasoning and each other channel are filtered separately, however the text is
split into parts."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from cluster.api.output_parts import OutputPart, PartKind, merge_parts
from cluster.gateway.guards.parts import GuardedParts
from cluster.gateway.guards.stream import Action, GuardChain, PatternStage, SizeStage
from cluster.policy.tenants.patterns import Patterns
from tests.gateway.guards.test_stream import chain, ignore, whole

SECRET = {"p": "ab{1,3}"}
channels = st.lists(
    st.builds(OutputPart, st.sampled_from(PartKind), st.text("abc", min_size=1, max_size=8), st.integers(0, 1)),
    max_size=6,
)


def guarded(action: Action) -> GuardedParts:
    """Return a filter of parsed outputs with one guard, which searches for SECRET. `action`: what the guard does with a
    match."""
    return GuardedParts(lambda: chain([PatternStage(Patterns(SECRET), action, ignore)]))


def cut(data: st.DataObject, parts: list[OutputPart]) -> list[list[OutputPart]]:
    """Split the parts into smaller parts at random places. Return each of them as a list of one part. The name of a
    tool call is not split."""
    out = []
    for part in parts:
        at = 0 if part.kind is PartKind.TOOL_NAME else data.draw(st.integers(0, len(part.text)))
        pieces = [text for text in (part.text[:at], part.text[at:]) if text]
        out += [[OutputPart(part.kind, text, part.call)] for text in pieces]
    return out


def texts(parts: list[OutputPart]) -> list[OutputPart]:
    """Join consecutive parts of the same kind and tool call into one part, and return these parts in order. The names
    of tools are not joined."""
    out = []
    for (kind, call), group in groupby(parts, lambda part: (part.kind, part.call)):
        members = list(group)
        if kind is PartKind.TOOL_NAME:
            out += members
        else:
            out.append(OutputPart(kind, "".join(part.text for part in members), call))
    return out


@given(st.data(), channels, st.sampled_from(["redact", "refuse"]))
def test_each_channel_is_filtered(data: st.DataObject, parts: list[OutputPart], action: Action) -> None:
    """Parts are filtered as if each channel (content, reasoning or one tool call) were filtered as a whole.

    After a refusal nothing more is returned, and no piece of the refused match is returned.
    """
    guards = guarded(action)
    out: list[OutputPart] = []
    for feed in cut(data, parts):
        out += guards.feed(feed, False)
    out += guards.feed([], True)
    expected = []
    refused = False
    for channel in texts(parts):
        kept = whole(SECRET, action, channel.text)
        if kept:
            expected.append(OutputPart(channel.kind, kept, channel.call))
        if action == "refuse" and kept != channel.text:
            refused = True
            break
    assert guards.refused == refused
    assert merge_parts(out) == merge_parts(expected)


@given(st.data(), channels, st.integers(1, 20))
def test_a_size_counts_over_all_channels(data: st.DataObject, parts: list[OutputPart], most: int) -> None:
    """An output over the size limit ends at the limit, however its characters are divided between reasoning, content
    and tool calls."""
    size = SizeStage(most, "refuse", ignore)
    guards = GuardedParts(lambda: GuardChain([size], [1.0], lambda number, error: False, lambda: 0.0))
    out: list[OutputPart] = []
    for feed in cut(data, parts):
        out += guards.feed(feed, False)
    out += guards.feed([], True)
    total = sum(len(part.text) for part in parts)
    assert sum(len(part.text) for part in out) == min(total, most)
    assert guards.refused == (total > most)
