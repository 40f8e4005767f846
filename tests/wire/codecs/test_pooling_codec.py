"""Pooling requests, vectors and the properties of pooling models are the same after encoding and decoding. Malformed
messages are refused.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.pooling import MAX_DIMENSIONS, PoolingInfo, PoolingOptions, PoolingTask, pooling_capabilities
from cluster.api.types import KV_EVENTS, EngineInfo, EngineRequest, FinishReason, Sampling, TokenOutput, WorkerIdentity
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs import codec
from cluster.wire.codecs.pooling_codec import MAX_SHORTER_DIMENSIONS

params = st.builds(
    PoolingOptions, st.sampled_from(PoolingTask), st.none() | st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1)
)
infos = st.integers(1, MAX_DIMENSIONS).flatmap(
    lambda dimensions: st.builds(
        PoolingInfo,
        st.lists(st.sampled_from(PoolingTask), unique=True).map(tuple),
        st.just(dimensions),
        st.lists(st.integers(1, dimensions), max_size=5).map(tuple),
        st.booleans(),
    )
)


@given(params)
def test_request_round_trip(pooling: PoolingOptions) -> None:
    """The parameters of a pooling request are the same after encoding and decoding."""
    request = EngineRequest("r", [1], Sampling(max_tokens=1), pooling=pooling)
    message = pb.Submit.FromString(codec.submit_to_pb(1, 1, request).SerializeToString())
    assert codec.submit_from_pb(message, "r", message.prompt_ids).pooling == pooling


def test_a_request_for_tokens_has_no_pooling() -> None:
    """A request without pooling parameters is decoded without them. A request with an unknown pooling task raises
    ValueError."""
    message = codec.submit_to_pb(1, 1, EngineRequest("r", [1], Sampling(max_tokens=1)))
    assert codec.submit_from_pb(message, "r", b"").pooling is None
    message.pooling.task = "plan"
    with pytest.raises(ValueError, match="plan"):
        codec.submit_from_pb(message, "r", b"")


def hello(info: PoolingInfo | None, slots: int = 0, capacity: int = 0) -> pb.Hello:
    """Return a worker's Hello after it was encoded and decoded."""
    capabilities = ("resume:exact", *(pooling_capabilities(info.tasks) if info is not None else ()))
    engine = EngineInfo(
        "sim",
        "sim",
        "1",
        16,
        10,
        4,
        64,
        64,
        100,
        capabilities=capabilities,
        pooling=info,
        adapter_slots=slots,
        adapter_capacity=capacity,
    )
    message = codec.hello_to_pb(WorkerIdentity("w", "i", "m"), engine, 1)
    return pb.Hello.FromString(message.SerializeToString())


@given(st.none() | infos, st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_hello_round_trip(info: PoolingInfo | None, slots: int, capacity: int) -> None:
    """The properties of a pooling model and the numbers of adapters are the same after encoding and decoding."""
    got = codec.hello_from_pb(hello(info, slots, capacity))[1]
    assert (got.pooling, got.adapter_slots, got.adapter_capacity) == (info, slots, capacity)


def test_a_task_of_a_later_release_is_left_out() -> None:
    """A worker that reports a pooling task of a later release still counts as a pooling model. The unknown task is left
    out."""
    message = hello(PoolingInfo((PoolingTask.EMBED,), 8))
    message.capabilities[:] = ["pools:rerank_v9"]
    assert codec.hello_from_pb(message)[1].pooling == PoolingInfo((), 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dimensions", 0),
        ("dimensions", -1),
        ("dimensions", MAX_DIMENSIONS + 1),
        ("shorter_dimensions", [0]),
        ("shorter_dimensions", [9]),
        ("shorter_dimensions", [1] * (MAX_SHORTER_DIMENSIONS + 1)),
    ],
)
def test_a_hello_with_impossible_lengths_is_refused(field: str, value: object) -> None:
    """A Hello raises ValueError if a length of vectors in it is out of range."""
    message = hello(PoolingInfo((PoolingTask.EMBED,), 8))
    if isinstance(value, list):
        getattr(message.pooler, field).extend(value)
    else:
        setattr(message.pooler, field, value)
    with pytest.raises(ValueError, match=f"pooler.{field}"):
        codec.hello_from_pb(message)


def test_a_hello_with_kv_blocks_of_no_size_is_refused() -> None:
    """A Hello raises ValueError if the worker reports KV blocks, but their size is not at least 1."""
    message = hello(None)
    message.capabilities[:] = [KV_EVENTS]
    codec.hello_from_pb(message)
    message.block_size = 0
    with pytest.raises(ValueError, match="block_size is 0"):
        codec.hello_from_pb(message)


@pytest.mark.parametrize("field", ["adapter_slots", "adapter_capacity"])
def test_a_hello_with_less_than_no_adapters_is_refused(field: str) -> None:
    """A Hello with a negative number of adapters raises ValueError."""
    message = hello(None)
    setattr(message, field, -1)
    with pytest.raises(ValueError, match=field):
        codec.hello_from_pb(message)


vectors = st.binary(min_size=1, max_size=8).map(lambda data: data * 4)


@given(st.dictionaries(st.integers(1, 9), st.none() | vectors, max_size=6))
def test_vectors_arrive_at_their_slots(of_slots: dict[int, bytes | None]) -> None:
    """A message of step outputs carries a vector for each pooling request that ends in the step. A slot whose output is
    tokens gets no vector."""
    columns = codec.StepColumns()
    for slot, vector in of_slots.items():
        columns.add(
            slot,
            TokenOutput("x", [5])
            if vector is None
            else TokenOutput("x", (), finish=FinishReason.STOP, prompt_tokens=3, cached_tokens=0, vector=vector),
        )
    message = pb.StepOutputs.FromString(columns.to_pb().SerializeToString())
    outputs = dict(codec.outputs_from_pb(message))
    assert {slot: output.vector for slot, output in outputs.items()} == of_slots
    assert all(
        (output.finish, output.prompt_tokens) == (FinishReason.STOP, 3)
        for output in outputs.values()
        if output.vector is not None
    )
    assert columns.vector_bytes == sum(map(len, filter(None, of_slots.values())))


def test_a_vector_is_a_detail_of_its_slot() -> None:
    """`slots_with_details` returns a slot whose output has a vector, even if the output also has one token."""
    message = pb.StepOutputs(slots=[1, 2], token_ids=[5, 6], vectors=[pb.SlotVector(slot=2, values=bytes(4))])
    assert codec.slots_with_details(message) == {2}


@pytest.mark.parametrize("size", [0, 3, 5, 4 * MAX_DIMENSIONS + 4])
def test_a_malformed_vector_is_refused(size: int) -> None:
    """A vector raises ValueError before any output is decoded if its bytes are empty, too many or not a multiple of
    four."""
    step = pb.StepOutputs(
        slots=[1, 2], counts=[1, 0], token_ids=[5], vectors=[pb.SlotVector(slot=2, values=bytes(size))]
    )
    with pytest.raises(ValueError, match="slot 2 has"):
        next(codec.outputs_from_pb(step))


def test_the_longest_vector_is_accepted() -> None:
    """A vector of MAX_DIMENSIONS values is decoded."""
    values = bytes(4 * MAX_DIMENSIONS)
    step = pb.StepOutputs(slots=[2], counts=[0], vectors=[pb.SlotVector(slot=2, values=values)])
    assert [output.vector for _, output in codec.outputs_from_pb(step)] == [values]
