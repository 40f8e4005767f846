"""The caller gets the same parsed output, however the output is split into steps, and whichever workers and gateways
the sequence moves between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from cluster.api.output_parts import OutputPart, ParsedOutput, PartKind, merge_parts
from cluster.gateway.text.parsed_text import ParsedText


class PlainText:
    """A text source in which every token is one letter."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._text = ""
        self.searches_text = self.refused = False

    @property
    def pending_chars(self) -> int:
        """Implements `TextSource.pending_chars`."""
        return len(self._text)

    def pending_tokens(self) -> int:
        """Implements `TextSource.pending_tokens`."""
        return len(self._text)

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Implements `TextSource.push`."""
        self.token_ids += token_ids
        self._text += "x" * (len(token_ids) - stop_terminated)
        return None

    def text_of(self, token_id: int) -> str:
        """Implements `TextSource.text_of`."""
        self.token_ids.append(token_id)
        return "x"

    def push_back(self, text: str) -> None:
        """Implements `TextSource.push_back`."""
        self._text += text

    def pop_text(self, finished: bool) -> str:
        """Implements `TextSource.pop_text`."""
        text, self._text = self._text, ""
        return text

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Implements `TextSource.restore`."""
        if chars > len(token_ids):
            raise ValueError("too many characters")
        self.token_ids += token_ids
        self._text = "x" * (len(token_ids) - chars)


parts = st.builds(OutputPart, st.sampled_from(PartKind), st.text("ab", min_size=1, max_size=4), st.integers(0, 2))
of_tokens = st.lists(st.lists(parts, max_size=3), min_size=1, max_size=12)
"""The parts that each token of an output adds."""


def flat(tokens: Sequence[Sequence[OutputPart]]) -> list[OutputPart]:
    """Return the merged parts of several tokens."""
    return merge_parts([part for of_token in tokens for part in of_token])


def steps(data: st.DataObject, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut the tokens from `first` to `end` into random steps, and yield (start, stop) of each step."""
    while first < end:
        stop = data.draw(st.integers(first + 1, end))
        yield first, stop
        first = stop


def run_worker(
    text: ParsedText, tokens: Sequence[Sequence[OutputPart]], emitted: int, end: int, data: st.DataObject
) -> list[OutputPart]:
    """Feed `text` the parsed tokens from position `emitted` to position `end`, as one worker sends them: in steps of
    random size. Returns the parts that are popped from `text` between the steps. The last parts may still be in `text`
    at the end."""
    out: list[OutputPart] = []
    for start, stop in steps(data, emitted, end):
        begins = start == emitted
        parsed = ParsedOutput(flat(tokens[0 if begins else start : stop]))
        assert text.push_parsed(list(range(start, stop)), parsed, False, begins) is None
        if data.draw(st.booleans()):
            content = text.pop_text(False)
            popped = text.pop_parts()
            assert content == "".join(part.text for part in popped if part.kind is PartKind.CONTENT)
            out += popped
            assert text.pending_tokens() == 0
        else:
            assert text.pending_tokens() >= stop - start
    return out


@given(st.data(), of_tokens)
def test_workers_may_change(data: st.DataObject, tokens: list[list[OutputPart]]) -> None:
    """The popped parts add up to the parts of the tokens, however many workers computed the tokens and whenever the
    parts were popped."""
    text = ParsedText(PlainText())
    ends = sorted([*data.draw(st.lists(st.integers(1, len(tokens)), max_size=3)), len(tokens)])
    emitted, out = 0, []
    for end in ends:
        out += run_worker(text, tokens, emitted, end, data)
        emitted = end
    text.pop_text(True)
    out += text.pop_parts()
    assert merge_parts(out) == flat(tokens)
    assert text.token_ids == list(range(len(tokens)))
    assert text.pending_chars == 0


@given(st.data(), of_tokens)
def test_gateways_may_change(data: st.DataObject, tokens: list[list[OutputPart]]) -> None:
    """A sequence may move to another gateway. The new gateway gets the delivered tokens and the number of delivered
    characters. From these it finds the parts that were not delivered, and delivers exactly these parts."""
    first = ParsedText(PlainText())
    at = data.draw(st.integers(1, len(tokens)))
    run_worker(first, tokens, 0, at, data)
    delivered = flat(tokens[:at])  # a chunk always delivers all parts of its tokens
    second = ParsedText(PlainText())
    second.restore(first.token_ids, sum(len(part.text) for part in delivered))
    out = run_worker(second, tokens, at, len(tokens), data)
    second.pop_text(True)
    assert merge_parts([*delivered, *out, *second.pop_parts()]) == flat(tokens)
    assert second.token_ids == list(range(len(tokens)))


@given(st.integers(1, 5), st.integers(0, 5), st.booleans())
def test_a_worker_without_a_parser_sends_plain_text(count: int, restored: int, late_parts: bool) -> None:
    """If the first output of a worker has no parts, the whole output is the plain text of its tokens, also after a
    change of gateway. Later parts are ignored."""
    text = ParsedText(PlainText())
    if restored:
        text.restore(list(range(restored)), restored)
    assert text.push_parsed(list(range(count)), None, False, True) is None
    late = ParsedOutput([OutputPart(PartKind.REASONING, "r")]) if late_parts else None
    assert text.push_parsed([9], late, True, False) is None
    assert text.pop_text(True) == "x" * count
    assert not text.pop_parts()
    assert len(text.token_ids) == restored + count + 1


def test_reasoning_may_be_left_out() -> None:
    """If the caller wants no reasoning, only content and tool calls are delivered."""
    text = ParsedText(PlainText(), include_reasoning=False)
    shown = [OutputPart(PartKind.CONTENT, "c"), OutputPart(PartKind.TOOL_NAME, "f")]
    text.push_parsed([1], ParsedOutput([OutputPart(PartKind.REASONING, "r"), *shown]), False, True)
    assert text.has_parts
    assert text.has_tool_call
    assert text.pop_text(False) == "c"
    assert text.pop_parts() == shown


def test_a_stop_string_ends_the_output() -> None:
    """The stop string that the worker has found is returned. All parts before it are delivered."""
    text = ParsedText(PlainText())
    parsed = ParsedOutput([OutputPart(PartKind.CONTENT, "c")], stop_string="END")
    assert text.push_parsed([1], parsed, False, True) == "END"
    assert text.pop_text(True) == "c"


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1), st.booleans())
def test_content_may_pass_beside_the_text(texts: list[str], is_returned: bool) -> None:
    """Content that the API sends directly counts as delivered. If the API could not send the last content, the API
    returns this content with `push_back`. The next `pop_text` then returns it."""
    text = ParsedText(PlainText())
    text.push_parsed((0,), ParsedOutput(), False, True)
    before = text.passes_content
    for number, content in enumerate(texts, 1):
        text.pass_content(number, content)
    assert (text.pending_tokens(), text.pending_chars) == (0, 0)
    if is_returned:
        text.push_back(texts[-1])
        assert (before, text.passes_content) == (True, False)
        assert text.pending_tokens() == 1
    assert text.pop_text(False) == (texts[-1] if is_returned else "")
    assert list(text.token_ids) == list(range(len(texts) + 1))
    assert text.pending_tokens() == 0
