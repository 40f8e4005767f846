"""Simulated cluster of gateways and workers with prefix caches, in virtual time.

Invariants: equal settings and seeds give equal runs. Late and lost KV events change where a call goes and what it
costs, never its output: each call ends once, with all of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from cluster.policy.fairness.order import Order
from cluster.policy.scheduling.hedging import HedgingPolicy
from cluster.wire.credit import Grant
from loadtests.routing.block_cache import BlockCache, PooledLru
from loadtests.routing.calls import BLOCK_TOKENS, Prompt, RoutedCall
from loadtests.routing.gateway import RoutingGateway
from loadtests.routing.kv_feed import KvFeed, Lateness
from loadtests.routing.policies import BLIND, POLICIES, Picker, Prefix
from loadtests.routing.worker import MODEL as ENGINE
from loadtests.routing.worker import PrefixWorker, WorkerOutputs
from loadtests.sim.adapters import AdapterMix
from loadtests.sim.events import EventQueue
from loadtests.sim.fifo import FifoOrder
from loadtests.sim.plant import ReplicaModel

REPORT_S = 0.1
"""Interval of claims and KV reports, as in gateway.scheduling.peer_backlog and worker.kv_events."""
LOAD_S = 0.5
"""Interval of the workers' load reports."""
SWEEP_S = 0.25


def no_hedging() -> HedgingPolicy:
    """Return a policy that sends no call to a second worker."""
    return HedgingPolicy(0.0)


def fifo(_: str) -> Order:
    """Return an order of first come, first served."""
    return FifoOrder()


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Settings of a simulation.

    `blocks`: KV blocks of a worker, of BLOCK_TOKENS tokens. `policy`: name in POLICIES. `picker_of`: builds the
    routing policy in place of `policy`, if set. `order_of`: returns the order of the waiting calls.
    `hedger_of`: creates a gateway's hedging policy. `link_s`: delay of messages in seconds. `slow`: pairs of a
    worker's number and the factor by which it is slower.
    """

    policy: str = "cost"
    workers: int = 8
    blocks: int = 3000
    gateways: int = 1
    seed: int = 1
    engine: ReplicaModel = ENGINE
    link_s: float = 0.001
    adapters: AdapterMix | None = None
    """The adapters that calls name; None if no call names one."""
    lateness: Lateness = field(default_factory=Lateness)
    slow: tuple[tuple[int, float], ...] = ()
    picker_of: Callable[[Prefix, Random], Picker] | None = None
    order_of: Callable[[str], Order] = fifo
    hedger_of: Callable[[], HedgingPolicy] = no_hedging


class Cluster:
    """A simulated cluster of gateways and workers, to compare routing. `calls` lists all calls in order of arrival."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.events = EventQueue()
        self.calls: list[RoutedCall] = []
        self.on_event: Callable[[str, RoutedCall], None] = lambda what, call: None
        """Callback for an observer: a call has `arrived`, is `bound`, has its `first` token or has `ended`."""
        self._rng = Random(config.seed)
        self._pooled = PooledLru(config.blocks * config.workers)
        self._pool = BlockCache(config.blocks * config.workers)
        slow = dict(config.slow)
        self.workers = [
            PrefixWorker(
                at,
                config.blocks,
                self.events,
                self._outputs_of(at),
                config.engine,
                slow.get(at, 1.0),
                self._pool,
                config.adapters,
            )
            for at in range(config.workers)
        ]
        self.gateways: dict[int, RoutingGateway] = {}
        self._started = 0
        self._feeds: dict[tuple[int, int], KvFeed] = {}
        for _ in range(config.gateways):
            self.add_gateway()
        for worker in self.workers:
            self.events.every(LOAD_S, lambda w=worker: self._report_load(w))  # type: ignore[misc]
        self.events.every(REPORT_S, self._report_claims)
        self.events.every(SWEEP_S, self._sweep)

    # ---- processes

    def add_gateway(self) -> int:
        """Start a gateway, to which all workers link; return its number."""
        number, config = self._started, self.config
        self._started += 1
        build = config.picker_of or POLICIES[config.policy]
        rng = Random(f"{config.seed} {number}")
        gateway = self.gateways[number] = RoutingGateway(
            number,
            config.workers,
            lambda view: build(view, rng),
            config.order_of,
            lambda call, worker: self._submit(number, call, worker),
            lambda waiting: self._claim(number, waiting),
            config.engine.max_running,
            config.picker_of is not None or config.policy not in BLIND,
            config.hedger_of(),
            lambda call, worker: self._abort(call, worker),
            frozenset() if config.adapters is None else frozenset(config.adapters.names),
        )
        for worker in self.workers:
            at = worker.number
            gateway.join(at)
            feed = KvFeed(
                self.events,
                Random(f"{config.seed} {number} {at}"),
                config.lateness,
                lambda change, at=at: gateway.apply(at, change),  # type: ignore[misc]
            )
            self.report_blocks(worker)  # the snapshot has these changes; later ones follow it
            self._feeds[number, at] = feed
            feed.send(worker.attach(number))
        return number

    def kill_gateway(self, number: int) -> list[RoutedCall]:
        """Kill a gateway. Its running calls continue without a gateway. Returns the calls that waited; they must be
        sent again."""
        gateway = self.gateways.pop(number)
        for worker in self.workers:
            worker.detach(number)
            self._feeds.pop((number, worker.number)).is_open = False
        return [call for call in gateway.calls.values() if call.bound < 0]

    # ---- calls

    def send(
        self, prompt: Prompt, gateway: int | None = None, on_end: Callable[[RoutedCall], None] | None = None
    ) -> None:
        """Make a call now, at `gateway`, or at a random gateway if it is None."""
        if gateway is None:
            gateway = self._rng.choice(list(self.gateways))
        call = RoutedCall(str(len(self.calls)), prompt, gateway, self.events.now, on_end)
        call.pooled = self._pooled.use(prompt.names[: prompt.whole], prompt.reusable) * BLOCK_TOKENS
        self.calls.append(call)
        self.enter(call)

    def enter(self, call: RoutedCall) -> None:
        """Queue a call at its gateway."""
        self.on_event("arrived", call)
        self.gateways[call.gateway].enter(call, self.events.now)

    def run(self, until_s: float) -> Cluster:
        """Run until a virtual time in seconds."""
        self.events.run_until(until_s)
        return self

    def finish(self, most_s: float = 600.0) -> Cluster:
        """Run until no call waits or runs, but at most `most_s` seconds longer."""
        last = self.events.now + most_s
        while self.events.now < last and any(g.calls for g in self.gateways.values()):
            self.events.run_until(self.events.now + 1.0)
        return self

    # ---- messages

    def _submit(self, number: int, call: RoutedCall, worker: int) -> None:
        self.on_event("bound", call)

        def arrive() -> None:
            if number in self.gateways:  # else the link has ended, and its messages are lost
                self.workers[worker].submit(number, call.call_id, call.prompt)

        self.events.after(self.config.link_s, arrive)
        gateway = self.gateways[number]
        if gateway.next_due < float("inf"):
            self._plan_hedging(gateway)

    def _plan_hedging(self, gateway: RoutingGateway) -> None:
        """Call the gateway's hedging policy when it is due."""

        def act() -> None:
            if self.gateways.get(gateway.number) is gateway:
                gateway.hedge(self.events.now)

        self.events.at(gateway.next_due, act)

    def _abort(self, call: RoutedCall, worker: int) -> None:
        self.events.after(self.config.link_s, lambda: self.workers[worker].cancel(call.call_id))

    def _claim(self, number: int, waiting: int) -> None:
        def arrive() -> None:
            if number in self.gateways:
                for worker in self.workers:
                    worker.set_claim(number, waiting)

        self.events.after(self.config.link_s, arrive)

    def _outputs_of(self, worker: int) -> WorkerOutputs:
        link_s = self.config.link_s

        def first(link: int, call_id: str, cached: int, in_pool: int) -> None:
            self.calls[int(call_id)].in_pool = in_pool
            self.events.after(link_s, lambda: self._first(worker, link, call_id, cached))

        def ended(link: int, call_id: str) -> None:
            self.events.after(link_s, lambda: self._ended(worker, link, call_id))

        def granted(grant: Grant) -> None:
            self.events.after(link_s, lambda: self._granted(worker, grant))

        def changed() -> None:
            self.events.after(REPORT_S, lambda: self.report_blocks(self.workers[worker]))

        def adapters(names: frozenset[str]) -> None:
            for gateway in self.gateways.values():
                self.events.after(link_s, lambda gateway=gateway: gateway.set_resident(worker, names))  # type: ignore[misc]

        return WorkerOutputs(first, ended, granted, changed, adapters)

    def _granted(self, worker: int, grant: Grant) -> None:
        gateway = self.gateways.get(grant.link)
        if gateway is not None:
            gateway.granted(worker, grant, self.events.now)
            self.events.after(self.config.link_s, lambda: self._acknowledge(worker, grant))

    def _acknowledge(self, worker: int, grant: Grant) -> None:
        if grant.link in self.gateways:
            self.workers[worker].acknowledge(grant.link, grant.grant_id)
            if len(self.gateways) > 1:  # only another link can use what an acknowledgement frees
                self.workers[worker].regrant()

    def _first(self, worker: int, link: int, call_id: str, cached: int) -> None:
        gateway = self.gateways.get(link)
        if gateway is not None and gateway.owns(worker, call_id):
            gateway.first_output(worker, call_id, cached, self.events.now)
            self.on_event("first", gateway.calls[call_id])

    def _ended(self, worker: int, link: int, call_id: str) -> None:
        gateway = self.gateways.get(link)
        if gateway is None or not gateway.owns(worker, call_id):
            return
        call = gateway.ended(call_id, self.events.now)
        if len(call.prompt.blocks) > call.prompt.whole:
            self._pooled.use(call.prompt.names)
        self.on_event("ended", call)
        if call.on_end is not None:
            call.on_end(call)

    # ---- reports

    def report_blocks(self, worker: PrefixWorker) -> None:
        """Send the changes of a worker's blocks to all gateways."""
        change = worker.pop_change()
        if change:
            for (_, at), feed in self._feeds.items():
                if at == worker.number:
                    feed.send(change)

    def _report_load(self, worker: PrefixWorker) -> None:
        waiting, usage = worker.waiting, worker.cache.usage
        for gateway in self.gateways.values():
            gateway.reported(worker.number, waiting, usage)

    def _report_claims(self) -> None:
        for gateway in self.gateways.values():
            gateway.claim_now()

    def _sweep(self) -> None:
        for gateway in self.gateways.values():
            gateway.index.maintain(self.events.now, 1)
            if gateway.policy.aside.models:
                gateway.pump(self.events.now)

    def __repr__(self) -> str:
        return f"Cluster({self.events.now:g} s, {len(self.calls)} calls, {len(self.workers)} workers)"


def replay(cluster: Cluster, prompts: Sequence[tuple[float, Prompt]]) -> Cluster:
    """Make calls at their times, and run until all have ended."""
    for at_s, prompt in prompts:
        cluster.events.at(at_s, lambda prompt=prompt: cluster.send(prompt))  # type: ignore[misc]
    cluster.run(prompts[-1][0] if prompts else 0.0)
    return cluster.finish()
