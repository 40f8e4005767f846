"""Part `agents` of the load test: 200 sessions of 43 turns with tool pauses and sub-agents. They belong to three
tenants with unequal weights.

The fairness gap is defined as in the scenario fairness. A tenant's service is its weighted tokens divided by
its weight. The gap is the most service that one tenant gained over another while both had calls waiting. It
is given in units of U, the larger of two numbers of weighted tokens: the longest prompt, and the most tokens
that a worker held at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.policy.fairness.fair_queue import FairOrder
from cluster.policy.fairness.token_cost import ServiceWeights
from loadtests.figures import Bound, Figure
from loadtests.routing.calls import RoutedCall
from loadtests.routing.cluster import SWEEP_S, Cluster, ClusterConfig
from loadtests.routing.outcome import Outcome, curves, measured, run_all
from loadtests.routing.policies import OURS
from loadtests.routing.sessions import AgentTenant, Sessions, SessionsConfig
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

TENANTS = (
    AgentTenant("small", 1.0, 50, 4.0),
    AgentTenant("middle", 2.0, 60, 4.0),
    AgentTenant("large", 3.0, 90, 4.0),
)
WORKERS, BLOCKS = 8, 2400
PRECISE = ("longest prefix", "prefix or load")
SERVICE = ServiceWeights()
SAMPLE_S = 0.1
HITS = "agents: hit tokens against one pooled LRU"
TTFT = "agents: p90 TTFT against the best plain precise policy without warm-session order"
GAP = "agents: largest gap in weighted service between two tenants with waiting calls, in U"
ROWS: Mapping[str, Bound] = {HITS: Bound(">=", 0.98), TTFT: Bound("<=", 0.9), GAP: Bound("<=", 0.5)}


@dataclass(eq=False)
class ServiceObserver:
    """Measures the service (weighted tokens) of each tenant, and the largest gap between two tenants.

    A prompt counts at the first token of its call, an output at the end of its call. The gap is updated every
    SAMPLE_S.
    """

    cluster: Cluster
    tenants: Mapping[str, float]
    """Weights by tenant."""
    order: FairOrder
    service: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    longest_prompt: int = 0
    largest_gap: float = 0.0
    _lead: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """For each pair of tenants, the smallest and the largest lead of the first tenant over the second, in the current
    interval in which both have calls waiting. A lead is a difference in service divided by weight."""

    def __post_init__(self) -> None:
        self.service = dict.fromkeys(self.tenants, 0.0)
        self.waiting = dict.fromkeys(self.tenants, 0)
        self.cluster.on_event = self.observe
        self.cluster.events.every(SAMPLE_S, self.sample)

    def observe(self, what: str, call: RoutedCall) -> None:
        """Record an event of a call, and pass it on to the fair order."""
        tenant, prompt = call.prompt.tenant, call.prompt
        if what == "arrived":
            self.waiting[tenant] += 1
            self.longest_prompt = max(self.longest_prompt, prompt.prompt_tokens)
        elif what == "bound":
            self.waiting[tenant] -= 1
        elif what == "first":
            self.service[tenant] += SERVICE.prompt(prompt.prompt_tokens, call.cached)
            self.order.cached(call.call_id, call.cached)
        else:
            self.service[tenant] += SERVICE.output * prompt.output_tokens
            self.order.generated(call.call_id, prompt.output_tokens)
            self.order.ended(call.call_id)

    def sample(self) -> None:
        """For each pair of tenants with waiting calls, compute the difference of their services and update the largest
        gap."""
        names = sorted(self.tenants)
        for at, one in enumerate(names):
            for other in names[at + 1 :]:
                if not (self.waiting[one] and self.waiting[other]):
                    self._lead.pop((one, other), None)
                    continue
                lead = self.service[one] / self.tenants[one] - self.service[other] / self.tenants[other]
                least, greatest = self._lead.get((one, other), (lead, lead))
                self._lead[one, other] = min(least, lead), max(greatest, lead)
                self.largest_gap = max(self.largest_gap, max(greatest, lead) - min(least, lead))

    @property
    def unit(self) -> float:
        """The unit U of the fairness gap, in weighted tokens."""
        most = max(worker.most_tokens for worker in self.cluster.workers)
        return max(SERVICE.input * self.longest_prompt, SERVICE.output * most)


def run(policy: str, seed: int, config: SessionsConfig | None = None, blocks: int = BLOCKS) -> tuple[Outcome, float]:
    """Run all sessions. Returns the measurements and the fairness gap.

    The gap is the most service (weighted tokens, divided by the tenant's weight) that one tenant gained over another,
    in units of U. U is the larger of two numbers of weighted tokens: the longest prompt, and the most tokens that a
    worker held at once.
    """
    config = config or SessionsConfig(TENANTS)
    weights = {tenant.name: tenant.weight for tenant in config.tenants}
    order = FairOrder(weight_of=weights.__getitem__, service=SERVICE)
    cluster = Cluster(
        ClusterConfig(
            policy, workers=WORKERS, blocks=blocks, seed=seed, adapters=config.adapters, order_of=lambda model: order
        )
    )
    observer = ServiceObserver(cluster, weights, order)
    cluster.events.every(SWEEP_S, lambda: order.sweep(cluster.events.now))
    Sessions(config, cluster, seed).run()
    return measured(policy, cluster), observer.largest_gap / observer.unit


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    config = SessionsConfig(TENANTS, adapters=stage.options.adapter_mix)
    results = await run_all([(run, (policy, stage.options.seed, config)) for policy in (OURS, *PRECISE)])
    outcomes = [outcome for outcome, _ in results]
    (ours, gap), plain = results[0], min(outcomes[1:], key=lambda o: o.p90_s)
    stage.report.settings.setdefault("routing", {})["agents"] = [o.as_json() for o in outcomes]
    stage.report.settings.setdefault("ttft_ms", {})["agents"] = curves(outcomes)
    times = f"{ours.p90_s:.3f} s; {plain.label} {plain.p90_s:.3f} s"
    alike = f"hit rate {ours.hit_rate:.3f}; {ours.hits_alike:.3f} of a pooled cache at the same times"
    return [
        exact(HITS, ours.hits, ROWS[HITS], "ratio", alike),
        exact(TTFT, ours.p90_s / plain.p90_s, ROWS[TTFT], "ratio", times),
        exact(GAP, gap, ROWS[GAP], "U", "intervals in which both tenants have calls waiting"),
    ]
