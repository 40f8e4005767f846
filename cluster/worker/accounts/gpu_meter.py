"""Attribution of GPU time to requests: the GPU time of each step is divided among the tokens of the step.

The GPU time of a step is its duration times the replica's number of GPUs. A step's price is its GPU time per token.
Problem: a step has hundreds of requests. Charging each of them in every step would cost as much as the rest of the
step's bookkeeping. So only C, the sum of the prices of all steps, is kept. A request that gets one token per step owes
the growth of C since its first token. A request that gets k tokens per step on average owes k times that growth. The
bookkeeping takes O(1) time per step, and O(1) time at the first token and at the end of a request.

A prompt is charged when the request's first token arrives, because only then does the engine report how many prompt
tokens were cached. If a prompt needed several steps, its tokens are divided evenly over the last ceil(tokens /
max_num_batched_tokens) steps. The price of these earlier steps becomes lower, and C is lowered by the difference.

Idle GPU time is the replica's lifetime times its number of GPUs, minus all charges. So the sum of all charges and the
idle time is exact, although a single charge is approximate. A request aborted before its first token owes nothing.

Pure: no clock; `now` is monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

REMEMBERED_STEPS = 256


@dataclass(slots=True)
class GpuShare:
    """The data from which one request's GPU time is computed.

    `first_step`: number of the step with the request's first token; -1 before that step.
    """

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
    """The GPU time of one replica. The measurement begins at `now`.

    `max_step_tokens`: the most tokens that the replica's engine computes in a step.
    """

    def __init__(self, gpus: float, max_step_tokens: int, now: float) -> None:
        self.gpus = gpus
        self._max_step_tokens = max(max_step_tokens, 1)
        self._started = now
        self._busy_since: float | None = None
        self._price = 0.0
        self._steps = 0
        self._last: deque[_MeteredStep] = deque(maxlen=REMEMBERED_STEPS)
        self._charged = 0.0
        self._idle_reported = 0.0

    def open_share(self, now: float) -> GpuShare:
        """Return a new share for a request that enters the engine."""
        if self._busy_since is None:
            self._busy_since = now
        return GpuShare(self._steps)

    def mark_idle(self) -> None:
        """Count the time from now on as idle, until the next request enters."""
        self._busy_since = None

    def step(self, now: float, emitted: int, firsts: Sequence[tuple[GpuShare, int, int]] = ()) -> None:
        """Divide the GPU time of a step that ends at `now` among the tokens of the step.

        `emitted`: number of output tokens in the step. `firsts`: the requests that got their first output in this step,
        each with its share, computed prompt tokens and output tokens.
        """
        since = now if self._busy_since is None else self._busy_since
        self._busy_since = now
        self._steps += 1
        gpu_s = (now - since) * self.gpus
        if firsts:
            self._charge_firsts(gpu_s, emitted, firsts)
            return
        tokens = emitted or 1
        self._last.append(_MeteredStep(gpu_s, tokens))
        self._price += gpu_s / tokens

    def _charge_firsts(self, gpu_s: float, emitted: int, firsts: Sequence[tuple[GpuShare, int, int]]) -> None:
        spread = [(share, max(prompt, 1), self._spread(share, prompt)) for share, prompt, _ in firsts]
        tokens = emitted + sum(prompt / steps for _, prompt, steps in spread) - sum(got for _, _, got in firsts)
        this = _MeteredStep(gpu_s, max(tokens, 1.0))
        price = this.gpu_s / this.tokens
        for share, prompt, steps in spread:
            share.prefill_s += price * prompt / steps
            for earlier in range(1, steps):
                share.prefill_s += self._add_tokens(self._last[-earlier], prompt / steps)
        self._last.append(this)
        self._price += price
        for share, _, got in firsts:
            share.first_step, share.first_price, share.first_tokens = self._steps, self._price, got

    def _spread(self, share: GpuShare, prompt: int) -> int:
        chunks = -(-prompt // self._max_step_tokens)
        return max(1, min(chunks, self._steps - share.from_step, len(self._last) + 1))

    def _add_tokens(self, step: _MeteredStep, tokens: float) -> float:
        """Add `tokens` of a prompt to an earlier step. The step's GPU time is now shared by more tokens, so its price
        per token falls. Returns the GPU-seconds of the added tokens."""
        before = step.gpu_s / step.tokens
        step.tokens += tokens
        after = step.gpu_s / step.tokens
        self._price -= before - after
        return after * tokens

    def owed(self, share: GpuShare, generated: int) -> float:
        """Return the GPU-seconds that a request owes after `generated` tokens were generated for it."""
        steps = self._steps - share.first_step
        if share.first_step < 0 or not steps:
            return share.prefill_s
        each = (generated - share.first_tokens) / steps
        return share.prefill_s + max((self._price - share.first_price) * each, 0.0)

    def charge(self, share: GpuShare, generated: int) -> float:
        """Record the GPU-seconds of a request that has ended, and return them. Call once for each request. `share`: the
        request's share of the GPU time. `generated`: number of its output tokens."""
        owed = self.owed(share, generated)
        self._charged += owed
        return owed

    def idle(self, now: float, running: Iterable[tuple[GpuShare, int]] = ()) -> float:
        """Return the GPU-seconds since the previous call of this method that are charged to no request.

        `running`: the requests that have not ended yet, each with its share and its number of generated tokens. GPU
        time for which these requests will be charged later does not count as idle.
        """
        outstanding = sum(self.owed(share, generated) for share, generated in running)
        whole = (now - self._started) * self.gpus - self._charged - outstanding
        idle = max(whole - self._idle_reported, 0.0)
        self._idle_reported += idle
        return idle
