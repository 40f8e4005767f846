"""The true state of a simulation, observed without delay: service by tenant, waiting times and idle capacity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.types import TokenOutput
from cluster.policy.fairness.token_cost import ServiceWeights
from loadtests.sim.events import EventQueue
from loadtests.sim.gateway import SimCall, SimGateway
from loadtests.sim.worker import SimWorker

SAMPLE_S = 0.1


@dataclass(slots=True)
class ObservedTenant:
    """Observations of one tenant: the service, sampled every SAMPLE_S, and the time to first token of each call."""

    service: float = 0.0
    samples: list[float] = field(default_factory=list)
    backlogged: list[bool] = field(default_factory=list)
    ttft_s: list[tuple[float, float]] = field(default_factory=list)
    """Pairs of (arrival time, time to first token) in seconds, one for each call."""
    output_tokens: int = 0
    ended: int = 0
    waiting: int = 0


class Observer:
    """Measures what each tenant gets, and whether workers have unused capacity while calls wait.

    Service is in weighted tokens: the prompt counts at the first token, the output counts token by token.
    """

    def __init__(
        self,
        workers: Sequence[SimWorker],
        gateways: Sequence[SimGateway],
        service: ServiceWeights,
        event_queue: EventQueue,
    ) -> None:
        self._workers = workers
        self._gateways = gateways
        self._service = service
        self._event_queue = event_queue
        self._tenants: dict[str, ObservedTenant] = defaultdict(ObservedTenant)
        self._empty_since: dict[str, float] = {}
        self.longest_beside_room_s = 0.0
        """Longest time in seconds for which a worker had unused capacity while a call that fits waited at any
        gateway."""
        self.most_promised_over_room = 0
        """Largest number of sequences by which a worker's granted credits exceeded the worker's free slots. Must stay
        0."""
        self.longest_prompt = 0
        event_queue.every(SAMPLE_S, self._sample)
        event_queue.every(SAMPLE_S / 10, self.check_capacity)

    @property
    def tenants(self) -> Mapping[str, ObservedTenant]:
        """Observations by tenant name."""
        return self._tenants

    def arrived(self, tenant: str) -> None:
        """Record a call that starts to wait."""
        self._tenants[tenant].waiting += 1

    def bound(self, call: SimCall) -> None:
        """Record a call that was sent to a worker."""
        self._tenants[call.tenant].waiting -= 1
        self.longest_prompt = max(self.longest_prompt, call.waiting.tokens)

    def served(self, call: SimCall, output: TokenOutput) -> None:
        """Record an output of a worker."""
        tenant = self._tenants[call.tenant]
        if output.cached_tokens is not None:
            tenant.service += self._service.prompt(call.waiting.tokens, output.cached_tokens)
            tenant.ttft_s.append((call.arrived, self._event_queue.now - call.arrived))
        tenant.service += self._service.output * len(output.token_ids)
        tenant.output_tokens += len(output.token_ids)
        tenant.ended += output.finish is not None

    def check_capacity(self) -> None:
        """Check for unused capacity while calls wait, and for credits above the capacity."""
        heads = [head.tokens for gateway in self._gateways if (head := gateway.head()) is not None]
        now = self._event_queue.now
        for worker in self._workers:
            room, promised = worker.room, worker.promised()
            self.most_promised_over_room = max(self.most_promised_over_room, promised.sequences - worker.places)
            if room.sequences > 0 and heads and room.tokens >= min(heads):
                since = max(self._empty_since.setdefault(worker.name, now), worker.last_submit)
                self.longest_beside_room_s = max(self.longest_beside_room_s, now - since)
            else:
                self._empty_since.pop(worker.name, None)

    def _sample(self) -> None:
        for tenant in self._tenants.values():
            tenant.samples.append(tenant.service)
            tenant.backlogged.append(tenant.waiting > 0)

    # ---- figures

    def unit(self) -> float:
        """The unit U of fairness gaps, in weighted tokens.

        U is the larger of two costs: the longest prompt, weighted as input, and the largest number of tokens that
        one worker held at once, weighted as output.
        """
        running = max(worker.most_running_tokens for worker in self._workers)
        return max(self._service.input * self.longest_prompt, self._service.output * running)

    def gap(self, one: str, other: str, weights: Mapping[str, float], from_s: float) -> float:
        """Return the most that either of two tenants gained on the other in any interval since `from_s`. The gain is in
        received service: weighted tokens divided by the tenant's weight."""
        start = round(from_s / SAMPLE_S)
        a, b = self._tenants[one].samples[start:], self._tenants[other].samples[start:]
        lead = [x / weights[one] - y / weights[other] for x, y in zip(a, b, strict=True)]
        return max(lead) - min(lead)

    def largest_gap(self, tenants: Sequence[str], weights: Mapping[str, float], from_s: float) -> float:
        """Return the largest difference in received service between any two tenants, from the time `from_s` on. The
        service is in weighted tokens divided by the tenant's weight."""
        return max(self.gap(a, b, weights, from_s) for i, a in enumerate(tenants) for b in tenants[i + 1 :])

    def smallest_share(
        self, tenants: Sequence[str], weights: Mapping[str, float], from_s: float, window_s: float = 30.0
    ) -> float:
        """Return the smallest ratio of a tenant's share of service to its share of weight; 1 is perfectly fair.

        Shares are fractions of the sum over `tenants`. The minimum is over all `tenants` and windows of `window_s`.
        """
        width, start = round(window_s / SAMPLE_S), round(from_s / SAMPLE_S)
        series = {t: self._tenants[t].samples[start:] for t in tenants}
        whole = sum(weights[t] for t in tenants)
        least = float("inf")
        for at in range(width, len(next(iter(series.values()))), 5):
            had = {t: s[at] - s[at - width] for t, s in series.items()}
            total = sum(had.values())
            least = min(least, min(had[t] / total / (weights[t] / whole) for t in tenants))
        return least

    def throughput(self, from_s: float) -> float:
        """Throughput of all tenants since `from_s`, in weighted tokens per second."""
        start = round(from_s / SAMPLE_S)
        had = sum(t.samples[-1] - t.samples[start] for t in self._tenants.values() if len(t.samples) > start)
        return had / (self._event_queue.now - from_s)

    def hit_rate(self) -> float:
        """Share of the prompt tokens that was found in a cache."""
        pairs = [worker.cached_and_prompt_tokens for worker in self._workers]
        return sum(cached for cached, _ in pairs) / max(sum(whole for _, whole in pairs), 1)

    def ttft(self, tenant: str, quantile: float, from_s: float) -> float:
        """Return a quantile of the time to first token in seconds, over the calls that arrived since `from_s`; NaN if
        there are no such calls."""
        times = sorted(seconds for at, seconds in self._tenants[tenant].ttft_s if at >= from_s)
        return times[min(int(quantile * len(times)), len(times) - 1)] if times else float("nan")

    def waiting(self) -> int:
        """Number of waiting calls in all gateways."""
        return sum(gateway.waiting() for gateway in self._gateways)

    def __repr__(self) -> str:
        return f"Observer({len(self._tenants)} tenants, {self.waiting()} waiting)"
