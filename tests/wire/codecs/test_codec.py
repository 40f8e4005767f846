"""Values are the same after encoding and decoding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.output_parts import OutputParsing, OutputPart, ParsedOutput, PartKind
from cluster.api.types import (
    EngineInfo,
    EngineRequest,
    FinishReason,
    Grammar,
    PositionLogprobs,
    Sampling,
    TokenOutput,
    WorkerIdentity,
)
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs import codec
from cluster.wire.ended_requests import EndedUsage

ids = st.integers(0, 2**32 - 1)
numbers = st.floats(0, 2, allow_nan=False)
grammars = st.one_of(
    st.none(),
    st.builds(Grammar, st.sampled_from(["json_schema", "regex", "grammar"]), st.text(min_size=1)),
    st.builds(Grammar, st.just("choice"), st.lists(st.text(min_size=1), min_size=1).map(tuple)),
    st.just(Grammar("json_object", "")),
)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(1, 2**31),
    min_tokens=st.integers(0, 2**31),
    temperature=numbers,
    top_p=numbers,
    top_k=st.integers(0, 2**31),
    min_p=numbers,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.lists(ids, max_size=4).map(tuple),
    frequency_penalty=numbers,
    presence_penalty=numbers,
    repetition_penalty=numbers,
    logit_bias=st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=4),
    logprobs=st.none() | st.integers(0, 20),
    ignore_eos=st.booleans(),
    grammar=grammars,
    max_reasoning_tokens=st.none() | st.integers(0, 2**31),
)
requests = st.builds(
    EngineRequest,
    request_id=st.just("r"),
    prompt_token_ids=st.lists(ids, max_size=20),
    sampling=samplings,
    emitted_token_ids=st.lists(ids, max_size=5),
    cache_salt=st.text(max_size=5),
    priority=st.integers(0, 2**31 - 1),
    adapter=st.text(max_size=5),
    traceparent=st.text(max_size=5),
    parsing=st.none()
    | st.builds(
        OutputParsing,
        st.text(max_size=5),
        st.lists(st.text(max_size=3), max_size=2).map(tuple),
        st.booleans(),
        st.booleans(),
    ),
)


names = st.text(max_size=20)
identities = st.builds(
    WorkerIdentity, names, names, names, names, names, names, names, names, names, names, names, names
)


@given(identities)
def test_an_introduction_round_trip(identity: WorkerIdentity) -> None:
    """A worker's Hello is the same after encoding and decoding. A Hello of an older release is decoded without pod,
    host and GPU."""
    hello = codec.hello_to_pb(identity, EngineInfo("sim", "sim", "1", 16, 10, 4, 64, 64, 100), 1)
    assert codec.hello_from_pb(pb.Hello.FromString(hello.SerializeToString()))[0] == identity
    for field in ("pod", "host", "gpu"):
        hello.ClearField(field)
    assert codec.hello_from_pb(hello)[0] == replace(identity, pod="", host="", gpu="")


@pytest.mark.parametrize("field", ["max_model_len", "max_num_seqs", "kv_blocks", "vocab_size", "adapter_slots"])
def test_an_introduction_with_a_negative_size_is_refused(field: str) -> None:
    """A Hello with a negative size is refused: one such worker would make every prompt of its model too long."""
    hello = codec.hello_to_pb(WorkerIdentity("w", "i", "m"), EngineInfo("sim", "sim", "1", 16, 10, 4, 64, 64, 100), 1)
    setattr(hello, field, -1)
    with pytest.raises(ValueError, match=field):
        codec.hello_from_pb(hello)


@given(requests)
def test_request_round_trip(request: EngineRequest) -> None:
    """Every field of a request is the same after encoding and decoding."""
    message = pb.Submit.FromString(codec.submit_to_pb(7, 2, request).SerializeToString())
    assert (message.slot, message.attempt) == (7, 2)
    back = codec.submit_from_pb(message, "r", message.prompt_ids)
    assert replace(back, prompt_token_ids=list(back.prompt_token_ids)) == request


positions = st.integers(1, 4).flatmap(
    lambda width: st.builds(
        PositionLogprobs,
        st.lists(ids, min_size=width, max_size=width),
        st.lists(st.floats(-100, 0, width=32), min_size=width, max_size=width),
    )
)
steps = st.lists(st.tuples(st.integers(1, 5), st.lists(ids, max_size=3), st.lists(positions, max_size=2)), max_size=12)


@given(steps, st.dictionaries(st.integers(1, 5), st.sampled_from(list(FinishReason))), st.sets(st.integers(1, 5)))
def test_steps_keep_each_slots_order(
    entries: list[tuple[int, list[int], list[PositionLogprobs]]], finishes: dict[int, FinishReason], firsts: set[int]
) -> None:
    """However outputs are merged into messages, each slot's tokens and log probabilities arrive in order, with its
    prompt counts and its finish."""
    columns = codec.StepColumns()
    last = {slot: i for i, (slot, _, _) in enumerate(entries)}
    seen: set[int] = set()
    for i, (slot, token_ids, logprobs) in enumerate(entries):
        output = TokenOutput("x", token_ids, logprobs=logprobs or None)
        if slot in firsts and slot not in seen:
            output.prompt_tokens, output.cached_tokens = slot * 10, slot
        if last[slot] == i and slot in finishes:
            output.finish = finishes[slot]
            output.stop_token_id = 3 if finishes[slot] is FinishReason.STOP else None
        seen.add(slot)
        columns.add(slot, output)
    message = pb.StepOutputs.FromString(columns.to_pb().SerializeToString())
    got = list(codec.outputs_from_pb(message))
    for slot in last:
        tokens = [t for s, o in got if s == slot for t in o.token_ids]
        assert tokens == [t for s, ids_, _ in entries if s == slot for t in ids_]
        logprobs_got = [p for s, o in got if s == slot for p in o.logprobs or ()]
        assert [(list(p.token_ids), list(p.logprobs)) for p in logprobs_got] == [
            (list(p.token_ids), list(p.logprobs)) for s, _, ps in entries if s == slot for p in ps
        ]
        assert [o.finish for s, o in got if s == slot and o.finish] == ([finishes[slot]] if slot in finishes else [])
        firsts_got = [o.prompt_tokens for s, o in got if s == slot and o.prompt_tokens is not None]
        assert firsts_got == ([slot * 10] if slot in firsts else [])


@pytest.mark.slow
@given(
    st.one_of(
        steps, st.lists(st.tuples(st.integers(1, 5), ids.map(lambda i: [i]), st.just([])), unique_by=lambda e: e[0])
    ),
    st.sets(st.integers(0, 6)),
)
def test_chosen_slots_have_the_outputs_of_the_whole_step(
    entries: list[tuple[int, list[int], list[PositionLogprobs]]], chosen: set[int]
) -> None:
    """Decoding only chosen slots gives the same outputs, in the same order, as decoding the whole message."""
    columns = codec.StepColumns()
    for slot, token_ids, logprobs in entries:
        columns.add(slot, TokenOutput("x", token_ids, logprobs=logprobs or None))
    message = pb.StepOutputs.FromString(columns.to_pb().SerializeToString())
    whole = list(codec.outputs_from_pb(message))
    assert list(codec.outputs_from_pb(message, chosen)) == [(slot, output) for slot, output in whole if slot in chosen]


parts = st.builds(OutputPart, st.sampled_from(PartKind), st.text(max_size=3), st.integers(0, 3))


@given(
    st.lists(st.tuples(st.integers(1, 3), st.lists(ids, max_size=2), st.lists(parts, max_size=3)), max_size=8),
    st.booleans(),
)
def test_parts_arrive_with_their_tokens(
    entries: list[tuple[int, list[int], list[OutputPart]]], part_columns: bool
) -> None:
    """The parts of every slot arrive in order and with the slot's tokens. An output without parts is decoded without
    parts. A gateway that cannot read parts as columns gets them as SlotParts messages."""
    columns = codec.StepColumns(part_columns)
    for slot, token_ids, of_step in entries:
        columns.add(slot, TokenOutput("x", token_ids, parsed=ParsedOutput(of_step, "end", 3) if of_step else None))
    message = pb.StepOutputs.FromString(columns.to_pb().SerializeToString())
    assert part_columns or not message.part_slots
    more = codec.slots_with_details(message)
    parsed_slots = {slot for slot, _, of_step in entries if of_step}
    assert more is None or parsed_slots <= more
    for slot, output in codec.outputs_from_pb(message):
        expected = [part for s, _, of_step in entries if s == slot for part in of_step]
        if slot in parsed_slots:
            assert output.parsed == ParsedOutput(tuple(expected), "end", 3)
        else:
            assert output.parsed is None


def test_parts_of_an_unknown_kind_are_skipped() -> None:
    """A part whose kind only a later release knows is left out and raises no error."""
    message = pb.StepOutputs(slots=[1], token_ids=[5])
    message.parts.add(slot=1).parts.add(kind=9, text="x")
    assert [output.parsed for _, output in codec.outputs_from_pb(message)] == [ParsedOutput(())]


@given(st.lists(ids))
def test_ids_pack(values: list[int]) -> None:
    """Token ids are the same after packing and unpacking."""
    assert codec.unpack_ids(codec.pack_ids(values)).tolist() == values


def test_numbers_keep_their_precision() -> None:
    """Sampling parameters are sent as doubles, without rounding."""
    sampling = Sampling(max_tokens=1, temperature=math.pi / 2, top_p=1 / 3)
    assert codec.sampling_from_pb(codec.sampling_to_pb(sampling)) == sampling


def test_ended_counts_round_trip() -> None:
    """An ended request's usage is the same after encoding and decoding."""
    usage = EndedUsage(
        b"\0sealed\xff",
        prompt_tokens=7,
        cached_tokens=3,
        generated_tokens=5,
        written_tokens=4,
        earlier_tokens=2,
        gpu_seconds=0.123456789,
        gpu="H100",
        outcome="ok",
        duration_s=1.25,
        idle_id="idle-1",
        idle_since_s=1_795_554_958.9606254,
        key=2**40,
    )
    assert codec.usage_from_pb(pb.Usage.FromString(codec.usage_to_pb(usage).SerializeToString())) == usage


@given(st.lists(st.tuples(st.integers(1, 5), parts), min_size=1, max_size=8), st.integers(0, 255))
def test_single_tokens_with_parts_need_no_further_messages(entries: list[tuple[int, OutputPart]], unknown: int) -> None:
    """If each slot has one token, `slots_with_details` returns no slot, even though the tokens have parts. If one slot
    has several tokens, it returns every slot that has parts. Decoding leaves out parts of an unknown kind."""
    columns = codec.StepColumns()
    for slot, part in entries:
        columns.add(slot, TokenOutput("x", [7], parsed=ParsedOutput((part,))))
    message = columns.to_pb()
    message.part_slots.append(9)
    message.part_tags.append(unknown << 3)
    message.part_texts.append("of a later version")
    slots = [slot for slot, _ in entries]
    assert codec.slots_with_details(message) == (set() if len(set(slots)) == len(slots) else {9, *slots})
    expected: dict[int, list[OutputPart]] = {}
    for slot, part in entries:
        expected.setdefault(slot, []).append(part)
    assert codec.parts_by_slot(message) == expected


def test_parts_of_unequal_columns_are_refused() -> None:
    """A message whose columns of parts differ in length raises ValueError."""
    with pytest.raises(ValueError, match="shorter"):
        codec.parts_by_slot(pb.StepOutputs(part_slots=[1, 2], part_tags=[1], part_texts=["a"]))
