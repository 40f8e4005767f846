"""Whose GPU time it was: each step's time times the replica's GPUs, shared by the tokens that were computed in it.

Problem: the tokens of a step are charged at time x GPUs / tokens of that step, for hundreds of requests a step, and
walking over them all again would cost as much as the step's own bookkeeping. So only the sum of all steps' prices is
kept (C). A request that got one token in each step between two moments owes the difference of C between them; one that
got more or fewer owes that times its tokens a step. A step costs O(1), a request O(1) at its first token and its end.

A prompt counts when its first token comes, for only then does the engine tell what of it was cached. One that needed
several steps is shared evenly over the last ceil(tokens / max_num_batched_tokens) of them; what the requests beside it
have then paid too much is taken off C.

What nobody owes is idle: lifetime x GPUs less all that was charged. So the sum over requests and idle is exact
whatever was approximated. A request dropped before its first token owes nothing.

Pure: no clock; `now` is monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

REMEMBERED_STEPS = 256


@dataclass(slots=True)
class GpuShare:
    """What one request owes so far."""

    from_step: int
    prefill_s: float = 0.0
    first_step: int = -1
    first_price: float = 0.0
    first_tokens: int = 0


@dataclass(slots=True)
class _MeteredStep:
    gpu_s: float
    tokens: float


class GpuMeter:
    """The GPU time of one replica since `now`. `max_step_tokens`: most tokens that the engine computes in a step."""

    def __init__(self, gpus: float, max_step_tokens: int, now: float) -> None:
        self.gpus = gpus
        self._max_step_tokens = max(max_step_tokens, 1)
        self._started = now
        self._busy_since: float | None = None
        self._price = 0.0
        self._steps = 0
        self._last: deque[_MeteredStep] = deque(maxlen=REMEMBERED_STEPS)
        self._charged = 0.0
        self._idle_told = 0.0

    def entered(self, now: float) -> GpuShare:
        """A request has entered the engine."""
        if self._busy_since is None:
            self._busy_since = now
        return GpuShare(self._steps)

    def rested(self) -> None:
        """The engine has nothing left to do; time is idle until something enters."""
        self._busy_since = None

    def step(self, now: float, emitted: int, firsts: Sequence[tuple[GpuShare, int, int]] = ()) -> None:
        """Outputs have come: `emitted` tokens in all. `firsts`: each request that got its first ones, the prompt
        tokens that were computed for it, and how many it got."""
        since = now if self._busy_since is None else self._busy_since
        self._busy_since = now
        self._steps += 1
        gpu_s = (now - since) * self.gpus
        if firsts:
            self._step_with(gpu_s, emitted, firsts)
            return
        tokens = emitted or 1
        self._last.append(_MeteredStep(gpu_s, tokens))
        self._price += gpu_s / tokens

    def _step_with(self, gpu_s: float, emitted: int, firsts: Sequence[tuple[GpuShare, int, int]]) -> None:
        spread = [(share, max(prompt, 1), self._spread(share, prompt)) for share, prompt, _ in firsts]
        tokens = emitted + sum(prompt / steps for _, prompt, steps in spread) - sum(got for _, _, got in firsts)
        this = _MeteredStep(gpu_s, max(tokens, 1.0))
        price = this.gpu_s / this.tokens
        for share, prompt, steps in spread:
            share.prefill_s += price * prompt / steps
            for earlier in range(1, steps):
                share.prefill_s += self._join(self._last[-earlier], prompt / steps)
        self._last.append(this)
        self._price += price
        for share, _, got in firsts:
            share.first_step, share.first_price, share.first_tokens = self._steps, self._price, got

    def _spread(self, share: GpuShare, prompt: int) -> int:
        chunks = -(-prompt // self._max_step_tokens)
        return max(1, min(chunks, self._steps - share.from_step, len(self._last) + 1))

    def _join(self, step: _MeteredStep, tokens: float) -> float:
        """More tokens were computed in an earlier step than was known: what they owe."""
        before = step.gpu_s / step.tokens
        step.tokens += tokens
        after = step.gpu_s / step.tokens
        self._price -= before - after
        return after * tokens

    def owed(self, share: GpuShare, generated: int) -> float:
        """GPU-seconds of a request that has got `generated` tokens."""
        steps = self._steps - share.first_step
        if share.first_step < 0 or not steps:
            return share.prefill_s
        each = (generated - share.first_tokens) / steps
        return share.prefill_s + max((self._price - share.first_price) * each, 0.0)

    def charge(self, share: GpuShare, generated: int) -> float:
        """A request has ended: what it owes, once."""
        owed = self.owed(share, generated)
        self._charged += owed
        return owed

    def idle(self, now: float, running: Iterable[tuple[GpuShare, int]] = ()) -> float:
        """GPU-seconds that nobody owes since the last call; `running` requests and their tokens owe theirs later."""
        outstanding = sum(self.owed(share, generated) for share, generated in running)
        whole = (now - self._started) * self.gpus - self._charged - outstanding
        idle = max(whole - self._idle_told, 0.0)
        self._idle_told += idle
        return idle
