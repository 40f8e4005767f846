"""Parts of parsed outputs arrive with their tokens, however the worker merges engine steps into messages. The vector of
a pooling request arrives with the end of the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cluster.api.output_parts import OutputPart, ParsedOutput, PartKind
from cluster.api.types import FinishReason, TokenOutput
from cluster.gateway.links.prefill_pacing import PrefillPacing
from cluster.gateway.links.slots import SlotTable
from cluster.wire.codecs import codec

SLOTS = (1, 2, 3)


@dataclass
class Received:
    """Sink that collects tokens and parts, and checks that the parts of a token arrive with the token."""

    texts: Sequence[str]
    """The text of each token's part; "" for none."""
    last_token_at: float = 0.0
    tokens: list[int] = field(default_factory=list)
    vector: bytes | None = None
    text: str = ""

    def accepted(self) -> None: ...

    def refused(self, reason: str, message: str, field: str) -> None: ...

    def lost(self, why: str) -> None: ...

    def failed(self, error: BaseException) -> None:
        """Fail the test."""
        raise error

    def token(self, token_id: int, now: float) -> None:
        """Handle a token without parts."""
        self._get((token_id,), ())

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Handle a token with its parts."""
        self._get((token_id,), parts)

    def output(self, output: TokenOutput) -> None:
        """Handle an output: several tokens with their parts, or a vector."""
        self.vector = output.vector
        self._get(output.token_ids, () if output.parsed is None else output.parsed.parts)

    def _get(self, token_ids: Sequence[int], parts: Sequence[OutputPart]) -> None:
        self.tokens += token_ids
        self.text += "".join(part.text for part in parts)
        assert self.text == "".join(self.texts[: len(self.tokens)])


@given(
    st.lists(st.lists(st.tuples(st.sampled_from(SLOTS), st.sampled_from(("", "a", "bc"))), max_size=5), max_size=6),
    st.booleans(),
)
def test_parts_come_with_their_tokens(messages: list[list[tuple[int, str]]], merge_all: bool) -> None:
    """Whenever a sink (a request's receiver) gets tokens, it also gets the parsed parts of exactly these tokens. At the
    end it has all tokens and all parts."""
    if merge_all:
        messages = [[entry for message in messages for entry in message]]
    texts = {slot: [t for message in messages for s, t in message if s == slot] for slot in SLOTS}
    table = SlotTable("w", PrefillPacing(1000), lambda slots: None, lambda gap_s, count: None)
    sinks = {slot: Received(texts[slot]) for slot in SLOTS}
    for slot, sink in sinks.items():
        table.add(slot, sink, 1, 1, False)
    for now, message in enumerate(messages, 1):
        columns = codec.StepColumns()
        for slot, text in message:
            parts = (OutputPart(PartKind.CONTENT, text),) if text else ()
            columns.add(slot, TokenOutput("", [7], parsed=ParsedOutput(parts)))
        table.apply_step(columns.to_pb(), float(now))
    for slot, sink in sinks.items():
        assert (len(sink.tokens), sink.text) == (len(texts[slot]), "".join(texts[slot]))


def test_a_vector_comes_with_the_end_of_its_request() -> None:
    """Each vector of a step is delivered to the sink of its request, and the slot of this request becomes free. The
    requests that generate tokens are unaffected."""
    table = SlotTable("w", PrefillPacing(1000), lambda slots: None, lambda gap_s, count: None)
    sinks = {slot: Received([""] * 9) for slot in SLOTS}
    columns = codec.StepColumns()
    for slot, sink in sinks.items():
        table.add(slot, sink, 1, 1, False)
        vector = bytes(4 * slot) if slot != 1 else None
        output = TokenOutput("", (), finish=FinishReason.STOP, prompt_tokens=1, cached_tokens=0, vector=vector)
        columns.add(slot, output if vector else TokenOutput("", [7]))
    table.apply_step(columns.to_pb(), 1.0)
    assert {slot: sink.vector for slot, sink in sinks.items()} == {1: None, 2: bytes(8), 3: bytes(12)}
    assert (sinks[1].tokens, len(table)) == ([7], 1)


def test_cached_output_does_not_count_as_computed() -> None:
    """An engine's count of cached tokens leaves out emitted tokens. If the engine is expected to hold them, they do not
    count as computed, so that the worker does not look fast."""
    for holds_output, computed in ((True, 20), (False, 400)):
        table = SlotTable("w", PrefillPacing(1000), lambda slots: None, lambda gap_s, count: None)
        table.add(1, Received([""] * 9), 500, 20, True, 20, 0.5, holds_output=holds_output)
        columns = codec.StepColumns()
        columns.add(1, TokenOutput("", [7], prompt_tokens=100, cached_tokens=100))
        table.apply_step(columns.to_pb(), 1.0)
        assert [sample.tokens for sample in table.pop_prefill_samples()] == [computed]
