"""The running requests of a worker and their outputs, tested without an engine and without a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from cluster.api.outcomes import Outcome
from cluster.api.types import EngineInfo, EngineRequest, FinishReason, Sampling, TokenOutput
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.ended_requests import UsageKeeper
from cluster.wire.outbox import Outbox
from cluster.worker.accounts.gpu_meter import GpuMeter, GpuShare
from cluster.worker.accounts.served_reports import ServedReports
from cluster.worker.accounts.usage import WorkerUsage
from cluster.worker.link import Link
from cluster.worker.request_outputs import RunningRequest
from cluster.worker.running_requests import RunningRequests
from tests.worker.test_link import make_link

INFO = EngineInfo("sim", "sim", "1", 16, 64, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=512, vocab_size=9)


class Subject:
    """The running requests of a worker, with records of ended parser sessions and released adapters."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.ended_sessions: list[str] = []
        self.released: list[str] = []
        meter = GpuMeter(0.0, INFO.max_num_batched_tokens, 0.0)
        self.usage = UsageKeeper()
        self.requests = RunningRequests(
            INFO,
            meter,
            ServedReports(),
            WorkerUsage("w", self.usage, meter, "", 60.0, self._shares),
            self.lost.__contains__,
            self.ended_sessions.append,
            self.released.append,
        )
        self.link = make_link()

    def _shares(self) -> Iterator[tuple[GpuShare, int]]:
        return self.requests.shares()

    def new(self, slot: int, prompt: int = 8, emitted: int = 0, adapter: str = "", **submit: object) -> RunningRequest:
        """Return a new request in this slot, as after its Submit. Its engine request id is `r` followed by the slot."""
        message = pb.Submit(slot=slot, **submit)  # type: ignore[arg-type]
        request = EngineRequest(
            f"r{slot}",
            range(1, prompt + 1),
            Sampling(max_tokens=9),
            emitted_token_ids=range(1, emitted + 1),
            adapter=adapter,
        )
        running = self.requests.new_request(self.link, message, request, 0.0)
        reattached, to_abort = self.requests.reattach(running, message)
        assert not to_abort
        if not reattached:
            self.link.requests[slot] = request.request_id
            assert self.requests.start(running, request.request_id, message) == []
            running.accept()
        return running

    def step(self, *outputs: TokenOutput) -> list[str]:
        """Apply the outputs of a step; return the ids of requests to abort."""
        return self.requests.outputs.apply_step(outputs)[1]


def slots_sent(outbox: Outbox) -> list[tuple[int, list[int]]]:
    """Return the slots in the outbox's next message, each with its tokens."""
    outbox.flush()
    step = asyncio.run(outbox.next_message()).step
    ids = iter(step.token_ids)
    return [(slot, [next(ids) for _ in range(count)]) for slot, count in zip(step.slots, step.counts, strict=True)]


def test_tokens_count_from_start_to_end() -> None:
    """The prompt and output tokens of a running request use capacity until the request ends."""
    subject = Subject()
    requests = subject.requests
    free = requests.capacity()[0].tokens
    assert free == INFO.kv_tokens
    subject.new(1, prompt=8)
    subject.new(2, prompt=5, emitted=2)
    assert (requests.running, requests.tokens, requests.capacity()[0].tokens) == (2, 15, free - 15)
    subject.step(TokenOutput("r1", [1, 2], prompt_tokens=8, cached_tokens=3), TokenOutput("gone", [1]))
    assert requests.tokens == 17
    assert dict(requests.output_tokens()) == {"r1": 2, "r2": 2}
    assert (requests.outputs.prefilled_tokens, requests.outputs.decoded_tokens) == (5, 2)
    subject.step(TokenOutput("r1", [3], FinishReason.STOP), TokenOutput("r2", [4], prompt_tokens=5))
    assert (requests.running, requests.tokens) == (1, 8)
    requests.forget("r2", Outcome.CANCELLED)
    requests.forget("r2", Outcome.CANCELLED)
    assert (requests.running, requests.tokens, requests.capacity()[0].tokens) == (0, 0, free)
    assert requests.idle.is_set()


def test_expected_requests_take_capacity() -> None:
    """A request that waits for its adapter uses a slot and the capacity for its tokens, until the wait ends."""
    requests = Subject().requests
    capacity, slots = requests.capacity()
    with requests.expect(100):
        less, fewer_slots = requests.capacity()
    assert (less.tokens, less.sequences, fewer_slots) == (capacity.tokens - 100, capacity.sequences - 1, slots - 1)
    assert requests.capacity() == (capacity, slots)


def test_an_ended_request_gives_back_what_it_holds() -> None:
    """When a request ends, its adapter is released and its slot is free. The usage of a request that the engine has
    accepted is kept."""
    subject = Subject()
    subject.new(1, adapter="digest", sealed_record=b"sealed")
    subject.step(TokenOutput("r1", [1], FinishReason.LENGTH, prompt_tokens=8))
    assert subject.released == ["digest"]
    assert subject.link.requests == {}
    assert subject.usage.statistics().kept == 1
    assert subject.ended_sessions == []


def test_a_stream_goes_on_at_another_link() -> None:
    """The requests of a lost link run on. A Submit of the same stream on another link gets the tokens that were
    generated meanwhile, and nothing is computed again."""
    subject = Subject()
    requests, lost = subject.requests, subject.link
    subject.new(1, stream="call/0")
    subject.step(TokenOutput("r1", [1, 2], prompt_tokens=8))
    assert requests.detach_link(lost, stays=True) == []
    assert (requests.running, requests.tokens, len(requests.detached)) == (0, 0, 1)
    subject.step(TokenOutput("r1", [3]))
    subject.link = Link(2, 2, "other", "other", True, Outbox(), make_link().heartbeats)
    prefilled = requests.outputs.prefilled_tokens
    subject.new(5, emitted=1, stream="call/0", begun_at="lost")
    assert subject.link.requests == {5: "r1"}
    assert (requests.running, requests.tokens, len(requests.detached)) == (1, 11, 0)
    assert slots_sent(subject.link.outbox) == [(5, [2, 3])]
    subject.step(TokenOutput("r1", [4], FinishReason.STOP))
    assert requests.outputs.prefilled_tokens == prefilled
    assert (requests.running, requests.tokens) == (0, 0)


def test_parsed_outputs_are_counted_once() -> None:
    """The tokens of an output that is parsed are counted once, in the step that generated them. The output is sent
    after it was parsed, with only those tokens that the parser has kept."""
    subject = Subject()
    outputs = subject.requests.outputs
    subject.new(1)
    touched, to_abort = outputs.apply_step((), [TokenOutput("r1", [1, 2, 3], prompt_tokens=8)])
    assert (list(touched), to_abort) == ([], [])
    assert (outputs.prefilled_tokens, outputs.decoded_tokens) == (8, 3)
    assert subject.requests.tokens == 8
    touched, to_abort = outputs.apply_parsed([TokenOutput("r1", [1, 2], FinishReason.STOP, prompt_tokens=8)])
    assert (list(touched), to_abort) == ([subject.link], ["r1"])
    assert (outputs.prefilled_tokens, outputs.decoded_tokens) == (8, 3)
    assert (subject.requests.running, subject.requests.tokens) == (0, 0)
    assert slots_sent(subject.link.outbox) == [(1, [1, 2])]


def test_a_link_that_ends_with_the_worker_aborts_its_requests() -> None:
    """When a link to a gateway ends, the link's requests are aborted in two cases: the worker ends too, or the request
    has no stream name, so that no gateway could claim it."""
    for stays, stream in ((False, "call/0"), (True, "")):
        subject = Subject()
        subject.new(1, stream=stream)
        subject.step(TokenOutput("r1", [1], prompt_tokens=8))
        assert subject.requests.detach_link(subject.link, stays=stays) == ["r1"]
        assert (subject.requests.running, len(subject.requests.detached)) == (0, 0)
