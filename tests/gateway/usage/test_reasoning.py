"""Reasoning tokens in usage records. They are a part of the completion tokens, and each token is counted once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import Outcome
from cluster.api.output_parts import ParsedOutput
from cluster.api.types import EngineRequest, FinishReason, Sampling, TokenOutput, WorkerIdentity
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.opening import Opening
from cluster.gateway.calls.reasoning import new_reasoning_tokens, reasoning_in_part
from cluster.gateway.calls.records.end_metrics import EndMetrics
from cluster.gateway.calls.records.token_times import new_tokens
from cluster.gateway.calls.request import GenerationRequest
from cluster.gateway.calls.sequences.owner import CallEvents
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.demand import DemandTally
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.resume_tokens.token_chain import ChoiceState
from cluster.gateway.text.parsed_text import ParsedText
from cluster.gateway.usage.accounting import Accounting
from cluster.gateway.usage.call_account import CallAccount
from cluster.ledger.usage.records import OpenRecord, UsageRecord
from cluster.ledger.usage.sealed_records import Sealer
from cluster.observe.metrics import Metrics
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.ended_requests import EndedUsage
from tests.gateway.text.test_parsed_text import PlainText


class Events:
    """Receiver that ignores the events of calls."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Link:
    """Stub of a link, without a connection."""

    def __init__(self) -> None:
        self.identity = WorkerIdentity("w", "incarnation", "sim", version="v1")
        self.box = self

    def usage_acks(self, keys: Sequence[int]) -> None:
        """See Outbox."""


def parsed_call(call_id: str, restored: Sequence[int]) -> Call:
    """Return a running call with parsed outputs. `restored`: for each output, the number of tokens that another gateway
    has delivered."""
    call = Call(call_id, "sim", TenantPolicy("acme"), 0, 1.0, None, lambda: 2.0, cast("CallEvents[Any]", Events()))
    for index, tokens in enumerate(restored):
        text = ParsedText(PlainText())
        request = EngineRequest("", [1, 2, 3], Sampling(max_tokens=1000))
        sequence = OutputSequence(call, index, request, text, parsed_text=text)
        if tokens:
            sequence.restore(ChoiceState(list(range(tokens))))
        sequence.life.submitted("incarnation", None)
        sequence.accepted()
        call.sequences.append(sequence)
    return call


def send(sequence: CallSequence, tokens: int, reasoning: int | None) -> None:
    """Deliver one output of `tokens` tokens to a sequence. `reasoning`: None if more outputs may follow; otherwise the
    output is the sequence's last one and reports this number of reasoning tokens."""
    finish = None if reasoning is None else FinishReason.STOP
    parsed = ParsedOutput(reasoning_tokens=reasoning or 0)
    sequence.output(TokenOutput("", tuple(range(tokens)), finish, prompt_tokens=3, parsed=parsed))
    sequence.pieces.pop()


def usage_records(call: Call) -> list[UsageRecord]:
    """Return the records of a call that ends now."""
    out = []
    for sequence in call.sequences:
        account = CallAccount(OpenRecord(f"r{sequence.index}", "acme", "", "sim", "v1", "q", 1.0), b"")
        account.end(sequence, Outcome.OK, 9.0)
        record = account.close()
        assert record is not None
        out.append(record)
    return out


@given(st.integers(0, 50), st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_parts_of_an_output_count_each_token_once(reasoning: int, parts: list[int]) -> None:
    """If an output was resumed, it has several parts, and its reasoning tokens are divided over the parts. The sum over
    the parts equals the number of the whole output, and no part has more reasoning tokens than tokens."""
    bounds = list(itertools.accumulate(parts, initial=0))
    counted = [reasoning_in_part(reasoning, first, end) for first, end in itertools.pairwise(bounds)]
    assert sum(counted) == min(reasoning, sum(parts))
    assert all(0 <= count <= tokens for count, tokens in zip(counted, parts, strict=True))


outputs = st.tuples(st.integers(0, 20), st.integers(1, 20), st.none() | st.integers(0, 45))
"""Tokens that another gateway has delivered, new tokens, and reasoning tokens in the whole output if it ends."""


@given(st.lists(outputs, min_size=1, max_size=4))
def test_reasoning_is_a_part_of_each_record(call_outputs: list[tuple[int, int, int | None]]) -> None:
    """Whatever number of reasoning tokens workers report, a usage record has at most as many reasoning tokens as
    completion tokens. The records of a call together have at most as many as were reported. The metrics count as many
    as the records."""
    call = parsed_call("c", [restored for restored, _, _ in call_outputs])
    for sequence, (_, tokens, reasoning) in zip(call.sequences, call_outputs, strict=True):
        send(sequence, tokens, reasoning)
    written = usage_records(call)
    counted = sum(record.reasoning_tokens for record in written)
    for record, (_, tokens, reasoning) in zip(written, call_outputs, strict=True):
        assert 0 <= record.reasoning_tokens <= record.completion_tokens == tokens
        assert record.reasoning_tokens == 0 or reasoning is not None, "of a part of an output nothing is known"
    reported = [reasoning or 0 for _, _, reasoning in call_outputs]
    assert counted == new_reasoning_tokens(call) <= min(new_tokens(call), sum(reported))
    if all(not restored and (reasoning or 0) <= tokens for restored, tokens, reasoning in call_outputs):
        assert counted == sum(reported)


@pytest.mark.parametrize(("reasoning", "first", "second"), [(5, 5, 0), (12, 12, 0), (15, 12, 3), (20, 12, 8)])
def test_a_resumed_output_is_counted_by_two_gateways(reasoning: int, first: int, second: int) -> None:
    """Two gateways deliver one output of 20 tokens: the first gateway 12, the second the last 8. Each counts the
    reasoning tokens in its own part."""
    before, after = parsed_call("a", [0]), parsed_call("b", [12])
    send(before.sequences[0], 12, reasoning)
    send(after.sequences[0], 8, reasoning)
    assert [usage_records(call)[0].reasoning_tokens for call in (before, after)] == [first, second]


async def test_records_of_a_gateway(tmp_path: Path) -> None:
    """The record of an ended output has its reasoning tokens. The records of a cancelled output, and of a call whose
    gateway was lost, have 0."""
    written: list[UsageRecord] = []
    sealer, link = Sealer([b"s" * 32]), cast(WorkerLink, Link())
    accounting = Accounting(incarnation="g", sealer=sealer, folder=tmp_path, insert=written.extend)
    accounting.start()
    ended, cut = parsed_call("ended", [0]), parsed_call("cut", [0])
    reports = []
    for key, (call, reasoning) in enumerate(((ended, 4), (cut, None)), start=1):
        sealed = accounting.accounts.open(call.sequences[0], link)
        send(call.sequences[0], 9, reasoning)
        accounting.ended(call, Outcome.OK if reasoning else Outcome.CANCELLED)
        reports.append(EndedUsage(sealed, generated_tokens=9, written_tokens=9, outcome="ok", key=key))
    lost = sealer.seal(OpenRecord("lost", "acme", "", "sim", "v1", "q", 1.0))
    reports.append(EndedUsage(lost, generated_tokens=9, written_tokens=9, outcome="ok", key=3))
    accounting.usage(link, reports)
    await accounting.stop()
    assert [(one.outcome, one.completion_tokens, one.reasoning_tokens, one.delivered_unknown) for one in written] == [
        ("ok", 9, 4, False),
        ("cancelled", 9, 0, False),
        ("ok", 9, 0, True),
    ]


def test_reasoning_tokens_are_counted_in_metrics(tmp_path: Path) -> None:
    """Each call increases the counter of reasoning tokens by the number that this gateway delivered."""

    async def fetch(digest: str) -> Any:
        raise LookupError(digest)

    metrics = Metrics("test")
    end = EndMetrics(metrics, ModelDirectory(tmp_path, fetch), DemandTally(), lambda: 9.0)
    for restored, reasoning in ((0, 4), (3, 5), (0, None)):
        call = parsed_call("c", [restored])
        send(call.sequences[0], 9, reasoning)
        opening = Opening(CallMeta("r", "grpc"), 1.0, cast(GenerationRequest, None))
        opening.model_name, opening.call = "sim", call
        end.count(opening, Outcome.OK)
    labels = {"headrace_cluster": "test", "model": "sim", "tenant": "default"}
    assert metrics.registry.get_sample_value("headrace_reasoning_tokens_total", labels) == 4 + 2
    assert metrics.registry.get_sample_value("headrace_generation_tokens_total", labels) == 27
