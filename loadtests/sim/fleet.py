"""Simulated replicas of one model, in ticks of virtual time.

Calls wait in one queue and are served first come, first served. A call enters a replica when the
replica's KV cache has space for the call's tokens. All replicas are alike, compute prompts before
decoding, and share prefill and running sequences evenly. A single replica computes the whole prompt of
a call. When a replica leaves, its streams move to the other replicas. These replicas compute the
streams' tokens again, before the prompts in the queue. A call that waits longer than MAX_WAIT_S is
refused and counts as late.

Invariants: every call is waiting, running or ended. A fleet without ready replicas serves nothing.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loadtests.sim.plant import ReplicaModel

MAX_WAIT_S = 120.0
"""Maximum wait of a call in seconds; the default of `gateway.queue.max_wait_s`."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Group of `count` equal calls that arrive at one time.

    `expected` is the number of output tokens that a gateway would predict for each call.
    """

    count: int
    prompt_tokens: float
    output_tokens: float
    expected: float


class _Waiting:
    __slots__ = ("at_s", "count", "expected", "left", "output", "prompt")

    def __init__(self, at_s: float, call: Arrival) -> None:
        self.at_s, self.prompt, self.output, self.expected = at_s, call.prompt_tokens, call.output_tokens, call.expected
        self.count: float = call.count
        self.left: float = self.count


class Fleet:
    """Replicas of one model. `tick` advances time.

    An arrival with a `count` above 1 stands for several equal calls. The replicas may begin any fraction of these
    calls, such as 1.5 of 3.
    """

    def __init__(self, model: ReplicaModel, ttft_s: float, itl_s: float) -> None:
        self.model, self.ttft_s, self.itl_s = model, ttft_s, itl_s
        self.arrived = self.good = self.late = self.slow = 0.0
        self.running = 0.0
        self.kv = 0.0
        self.waiting_tokens = self.waiting_calls = 0.0
        self.prefilled_tokens = self.decoded_tokens = 0.0
        self.moved_tokens = 0.0
        self.expected_tokens = 0.0
        """Output tokens of all arrivals so far: predicted for running and waiting calls, real for ended calls. A stream
        beyond its prediction counts with its tokens so far."""
        self.on_end: Callable[[float, float], None] = lambda count, tokens: None
        """Callback for calls that end together. Arguments: number of calls, and output tokens of each of these
        calls."""
        self._queue: deque[_Waiting] = deque()
        self._streams: list[tuple[float, int, float, float, float, float, float]] = []
        self._growing: list[tuple[float, float]] = []
        self._beyond = 0.0
        self._steps = 0.0
        self._serial = 0

    def arrive(self, now_s: float, call: Arrival) -> None:
        """Append an arrival to the queue."""
        self._queue.append(_Waiting(now_s, call))
        self.arrived += call.count
        self.expected_tokens += call.count * call.expected
        self.waiting_calls += call.count
        self.waiting_tokens += call.count * call.prompt_tokens

    def leave(self, share: float) -> None:
        """Remove a share (above 0, at most 1) of the ready replicas. Their streams move to the other replicas."""
        self.moved_tokens += share * self.kv

    @property
    def oldest_at_s(self) -> float | None:
        """Arrival time of the head of the queue, or None if the queue is empty."""
        return self._queue[0].at_s if self._queue else None

    def _refuse(self, now_s: float) -> None:
        """Refuse calls that have waited too long.

        A call whose prompt is being computed no longer counts as waiting.
        """
        queue = self._queue
        while queue and now_s - queue[0].at_s > MAX_WAIT_S and (queue[0].count > 1 or queue[0].left == 1):
            call = queue.popleft()
            self.late += call.left
            self.waiting_calls -= call.left
            self.waiting_tokens -= call.left * call.prompt
            self.expected_tokens -= call.left * call.expected

    def tick(self, now_s: float, dt: float, ready: int) -> None:
        """Advance from `now_s` by `dt` seconds. `ready`: number of ready replicas."""
        self._refuse(now_s)
        if ready <= 0:
            return
        model = self.model
        rate = model.most_prefill(self.running / ready)
        room = ready * rate * dt
        total = room
        if self.moved_tokens > 0:
            redone = min(self.moved_tokens, room)
            self.moved_tokens -= redone
            room -= redone
        queue, most_kv, most_running = self._queue, ready * model.kv_tokens, ready * model.max_running
        while queue and room > 0:
            head = queue[0]
            tokens = head.prompt + head.output
            part = min(head.left, (most_kv - self.kv) / tokens, most_running - self.running)
            if head.count == 1 and part < head.left and head.left == 1:
                if self.running > 0:
                    break
                part = 1.0  # a call always fits on idle replicas
            if part <= 0:
                break
            part = min(part, room / head.prompt if head.prompt else part)
            room -= part * head.prompt
            self.prefilled_tokens += part * head.prompt
            head.left -= part
            self.waiting_tokens -= part * head.prompt
            if head.count == 1:
                if head.left > 1e-9:
                    break
                queue.popleft()
                self._first_token(now_s + dt * (1 - room / total), head, 1.0, ready, rate)
            else:
                self._first_token(now_s + dt * (1 - room / total), head, part, ready, rate)
                if head.left <= 1e-6:
                    queue.popleft()
                else:
                    break
        used = (total - room) / ready / dt
        self._decode(now_s, dt, ready, used)

    def _first_token(self, at_s: float, call: _Waiting, count: float, ready: int, rate: float) -> None:
        self.waiting_calls -= count
        # All replicas compute the queue together, but one replica computes a call, after the calls ahead.
        own = call.prompt / rate
        begun = max(at_s - own / ready, call.at_s)
        first_s = begun + own
        late = first_s - call.at_s > self.ttft_s
        if late:
            self.late += count
        if call.output <= 1:
            self.good += 0.0 if late else count
            self._ended(count, call.output, call.expected)
            return
        self.running += count
        self.kv += count * (call.prompt + call.output)
        self._serial += 1
        end = self._steps + call.output - 1
        signed, gaps = count if not late else -count, call.output - 1
        heapq.heappush(self._streams, (end, self._serial, signed, call.prompt + call.output, at_s, gaps, call.expected))
        if call.expected < call.output:
            heapq.heappush(self._growing, (self._steps + max(call.expected - 1, 0.0), count))

    def _ended(self, count: float, output: float, expected: float) -> None:
        self.expected_tokens -= count * max(expected - output, 0.0)
        self.on_end(count, output)

    def _decode(self, now_s: float, dt: float, ready: int, prefill: float) -> None:
        if self.running <= 0:
            return
        steps = self.model.steps_per_s(self.running / ready, prefill) * dt
        before = self._steps
        self._steps += steps
        streams = self._streams
        self.expected_tokens += self._beyond * steps
        while self._growing and self._growing[0][0] <= self._steps:
            outgrown, count = heapq.heappop(self._growing)
            self._beyond += count
            self.expected_tokens += count * (self._steps - outgrown)
        while streams and streams[0][0] <= self._steps:
            end, _, signed, tokens, begun, gaps, expected = heapq.heappop(streams)
            count = abs(signed)
            if expected < gaps + 1:
                self._beyond = max(self._beyond - count, 0.0)
                self.expected_tokens -= count * (self._steps - end)
            self._ended(count, gaps + 1, expected)
            at_s = now_s + dt * ((end - before) / steps if steps > 0 else 1.0)
            self.running = max(self.running - count, 0.0)
            self.kv = max(self.kv - count * tokens, 0.0)
            self.decoded_tokens += count * gaps
            if signed > 0:
                if (at_s - begun) / gaps <= self.itl_s:
                    self.good += count
                else:
                    self.slow += count
        if not streams:
            self.running = self.kv = self._beyond = 0.0

    def __repr__(self) -> str:
        return f"Fleet({self.arrived:.0f} came, {self.waiting_calls:.0f} wait, {self.running:.0f} run)"
