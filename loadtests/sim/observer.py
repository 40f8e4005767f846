"""What really happened in the world, seen from outside and at once: service by tenant, waits, room left empty."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.types import TokenOutput
from cluster.policy.fairness.token_cost import ServiceWeights
from loadtests.sim.events import Agenda
from loadtests.sim.gateway import MODEL, SimCall, SimGateway
from loadtests.sim.worker import SimWorker

SAMPLE_S = 0.1


@dataclass(slots=True)
class Observed:
    """One tenant: what it had, sampled every SAMPLE_S; and its calls' times to the first token."""

    service: float = 0.0
    samples: list[float] = field(default_factory=list)
    backlogged: list[bool] = field(default_factory=list)
    ttft_s: list[tuple[float, float]] = field(default_factory=list)
    """(arrival, seconds)."""
    output_tokens: int = 0
    ended: int = 0
    waiting: int = 0


class Observer:
    """Service is weighted: a prompt's when its first token comes, an output's token by token."""

    def __init__(
        self,
        workers: Sequence[SimWorker],
        gateways: Sequence[SimGateway],
        service: ServiceWeights,
        agenda: Agenda,
    ) -> None:
        self._workers = workers
        self._gateways = gateways
        self._service = service
        self._agenda = agenda
        self._tenants: dict[str, Observed] = defaultdict(Observed)
        self._empty_since: dict[str, float] = {}
        self.longest_beside_room_s = 0.0
        """Longest time in which a worker's room stood and nobody came, while a call that fits waited somewhere."""
        self.most_promised_over_room = 0
        """By how many sequences credits ever exceeded what a worker had free and ahead; must stay 0."""
        self.longest_prompt = 0
        agenda.every(SAMPLE_S, self._sample)
        agenda.every(SAMPLE_S / 10, self.look)

    @property
    def tenants(self) -> Mapping[str, Observed]:
        """By name."""
        return self._tenants

    def arrived(self, tenant: str) -> None:
        """A call begins to wait."""
        self._tenants[tenant].waiting += 1

    def bound(self, call: SimCall) -> None:
        """A call has its turn."""
        self._tenants[call.tenant].waiting -= 1
        self.longest_prompt = max(self.longest_prompt, call.waiting.tokens)

    def served(self, call: SimCall, output: TokenOutput) -> None:
        """A worker has computed something."""
        one = self._tenants[call.tenant]
        if output.cached_tokens is not None:
            one.service += self._service.prompt(call.waiting.tokens, output.cached_tokens)
            one.ttft_s.append((call.arrived, self._agenda.now - call.arrived))
        one.service += self._service.output * len(output.token_ids)
        one.output_tokens += len(output.token_ids)
        one.ended += output.finish is not None

    def look(self) -> None:
        """Is there room that nobody takes though somebody waits?"""
        heads = [head.tokens for gateway in self._gateways if (head := gateway.head()) is not None]
        now = self._agenda.now
        for worker in self._workers:
            room, promised = worker.room, worker.promised()
            self.most_promised_over_room = max(self.most_promised_over_room, promised.sequences - worker.places)
            if room.sequences > 0 and heads and room.tokens >= min(heads):
                since = max(self._empty_since.setdefault(worker.name, now), worker.last_submit)
                self.longest_beside_room_s = max(self.longest_beside_room_s, now - since)
            else:
                self._empty_since.pop(worker.name, None)

    def _sample(self) -> None:
        for one in self._tenants.values():
            one.samples.append(one.service)
            one.backlogged.append(one.waiting > 0)

    # ---- figures

    def unit(self) -> float:
        """U: the larger of the longest prompt's service and that of the most running tokens of one worker."""
        running = max(worker.most_running_tokens for worker in self._workers)
        return max(self._service.input * self.longest_prompt, self._service.output * running)

    def gap(self, one: str, other: str, weights: Mapping[str, float], from_s: float) -> float:
        """The most by which one had more than the other by weight in any interval since `from_s` (both backlogged)."""
        start = round(from_s / SAMPLE_S)
        a, b = self._tenants[one].samples[start:], self._tenants[other].samples[start:]
        lead = [x / weights[one] - y / weights[other] for x, y in zip(a, b, strict=True)]
        return max(lead) - min(lead)

    def largest_gap(self, tenants: Sequence[str], weights: Mapping[str, float], from_s: float) -> float:
        """Over all pairs, in weighted tokens by weight."""
        return max(self.gap(a, b, weights, from_s) for i, a in enumerate(tenants) for b in tenants[i + 1 :])

    def smallest_share(
        self, tenants: Sequence[str], weights: Mapping[str, float], from_s: float, window_s: float = 30.0
    ) -> float:
        """Over all windows and tenants: its part of what these tenants had, by its part of their weights."""
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
        """Weighted tokens a second of all, since then."""
        start = round(from_s / SAMPLE_S)
        had = sum(one.samples[-1] - one.samples[start] for one in self._tenants.values() if len(one.samples) > start)
        return had / (self._agenda.now - from_s)

    def hit_rate(self) -> float:
        """Prompt tokens found in a cache, of all."""
        pairs = [worker.cached_and_prompt_tokens for worker in self._workers]
        return sum(cached for cached, _ in pairs) / max(sum(whole for _, whole in pairs), 1)

    def ttft(self, tenant: str, quantile: float, from_s: float) -> float:
        """Of the calls that arrived since."""
        times = sorted(seconds for at, seconds in self._tenants[tenant].ttft_s if at >= from_s)
        return times[min(int(quantile * len(times)), len(times) - 1)] if times else float("nan")

    def waiting(self) -> int:
        """Calls that wait in all gateways."""
        return sum(gateway.room.waiting(MODEL)[0] for gateway in self._gateways)

    def __repr__(self) -> str:
        return f"Observer({len(self._tenants)} tenants, {self.waiting()} waiting)"
