"""Simulated cluster in virtual time: gateways, workers, the delays between these processes, and the tenants that send
calls.

Problem: fairness between tenants over many workers and gateways cannot be tested in real time. A test of one hour would
take an hour, and no two runs would be equal.

Invariants: equal settings and seeds give equal runs. The waiting room, the fair order, the credits, the accounts and
the routing are the production code. Every message and report between processes arrives after its delay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from cluster.api.types import EngineRequest, Sampling, TokenOutput
from cluster.policy.fairness.fair_queue import FairOrder, FairOrders
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.token_cost import ServiceWeights
from cluster.wire.credit import Grant
from cluster.worker.engine.simulated.config import SimConfig
from loadtests.sim.adapters import AdapterMix
from loadtests.sim.events import EventQueue
from loadtests.sim.gateway import MODEL, GatewayCallbacks, SimCall, SimGateway
from loadtests.sim.observer import Observer
from loadtests.sim.traffic import PromptMaker, SimTenant
from loadtests.sim.worker import SimSubmit, SimWorker, WorkerCallbacks

VOCAB = 32_000


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Configuration of a simulation; times in seconds. `link_s`: delay of messages. `report_late_s`: delay of reports.
    `engine` must use VOCAB and set `max_model_len`. `adapters`: the adapters that calls name, and the share of the
    calls that name one; None if no call names an adapter."""

    tenants: Sequence[SimTenant]
    workers: int = 8
    gateways: int = 2
    fair: bool = True
    seed: int = 1
    report_every_s: float = 0.05
    report_late_s: float = 0.1
    link_s: float = 0.001
    service: ServiceWeights = field(default_factory=ServiceWeights)
    adapters: AdapterMix | None = None
    engine: SimConfig = field(
        default_factory=lambda: SimConfig(
            vocab=VOCAB, token_hi=VOCAB, max_model_len=8192, max_num_seqs=32, kv_blocks=6144, decode_ms=20.0
        )
    )


class World:
    """A simulation of callers, gateways and workers in virtual time. After `run`, the results are in `observer`,
    `workers` and `gateways`."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.event_queue = EventQueue()
        self._rng = Random(config.seed)
        self._prompts = PromptMaker(self._rng, VOCAB)
        self._tenants = {tenant.name: tenant for tenant in config.tenants}
        self._serial = 0
        self._open = True
        self.workers = [
            SimWorker(
                str(at), config.engine, config.gateways, self.event_queue, self._callbacks_of(at), config.adapters
            )
            for at in range(config.workers)
        ]
        self.gateways = [self._gateway(at) for at in range(config.gateways)]
        self.observer = Observer(self.workers, self.gateways, config.service, self.event_queue)
        for at in range(config.gateways):
            self.event_queue.every(config.report_every_s, lambda at=at: self._report(at))  # type: ignore[misc]
            self.event_queue.every(1.0, lambda at=at: self._sweep(at))  # type: ignore[misc]
        for gateway in self.gateways:  # links are up; the first report of a worker is the starting point
            if gateway.fair is not None:
                for worker in self.workers:
                    gateway.fair.order(MODEL).worker_totals.apply(worker.name, "1", worker.served(gateway.number), 0.0)
        for tenant in config.tenants:
            self._begin(tenant)

    def run(self, seconds: float) -> World:
        """Run until the virtual time `seconds`."""
        self.event_queue.run_until(seconds)
        return self

    def stop_arrivals(self) -> None:
        """Stop the arrival of new calls. Waiting and running calls continue."""
        self._open = False

    # ---- the cluster

    def _gateway(self, number: int) -> SimGateway:
        fair = FairOrders(self._order) if self.config.fair else None
        callbacks = GatewayCallbacks(self._bound, self._served, self._submit, self._ack)
        return SimGateway(number, self.workers, fair, self.config.service, callbacks)

    def _order(self) -> FairOrder:
        return FairOrder(weight_of=lambda tenant: self._tenants[tenant].weight, service=self.config.service)

    def _callbacks_of(self, worker: int) -> WorkerCallbacks:
        def outputs(link: int, step_outputs: list[TokenOutput]) -> None:
            self._later(lambda: self.gateways[link].outputs(worker, step_outputs, self.event_queue.now))
            for output in step_outputs:
                self._served(self.gateways[link].calls[output.request_id], output)

        def granted(link: int, grant: Grant) -> None:
            self._later(lambda: self.gateways[link].granted(worker, grant, self.event_queue.now))

        return WorkerCallbacks(outputs, granted)

    def _submit(self, gateway: int, worker: int, submit: SimSubmit) -> None:
        self._later(lambda: self.workers[worker].submit(gateway, submit))

    def _ack(self, gateway: int, worker: int, grant_id: int) -> None:
        self._later(lambda: self.workers[worker].acked(gateway, grant_id))

    def _later(self, action: object) -> None:
        assert callable(action)
        self.event_queue.after(self.config.link_s, action)

    # ---- reports

    def _report(self, number: int) -> None:
        late, gateway = self.config.report_late_s, self.gateways[number]
        claim = gateway.claim()
        waiting = None if gateway.fair is None else gateway.fair.order(MODEL).backlogs.own()

        def arrive() -> None:
            for worker in self.workers:
                worker.backlog(number, claim)
            for other in self.gateways:
                if waiting is not None and other is not gateway and other.fair is not None:
                    other.fair.order(MODEL).backlogs.replace_peer(str(number), waiting, self.event_queue.now)

        self.event_queue.after(late, arrive)
        if gateway.fair is not None:
            order = gateway.fair.order(MODEL)
            reports = [(worker.name, worker.served(number)) for worker in self.workers]

            def apply() -> None:
                for name, totals in reports:
                    order.worker_totals.apply(name, "1", totals, self.event_queue.now)

            self.event_queue.after(late, apply)

    def _sweep(self, number: int) -> None:
        fair = self.gateways[number].fair
        if fair is not None:
            fair.sweep(self.event_queue.now)

    # ---- calls

    def _begin(self, tenant: SimTenant) -> None:
        for gateway in tenant.at(self.config.gateways):
            for _ in range(tenant.backlog):
                self.event_queue.after(0.0, lambda g=gateway: self._arrive(tenant, g))  # type: ignore[misc]
        if tenant.rate_s:
            self._next_arrival(tenant)

    def _next_arrival(self, tenant: SimTenant) -> None:
        def arrive() -> None:
            self._arrive(tenant, self._rng.choice(tenant.at(self.config.gateways)))
            self._next_arrival(tenant)

        self.event_queue.after(self._rng.expovariate(tenant.rate_s), arrive)

    def _arrive(self, tenant: SimTenant, number: int) -> None:
        if not self._open:
            return
        self._serial += 1
        gateway, now, call_id = self.gateways[number], self.event_queue.now, str(self._serial)
        lengths = self._rng.choice(tenant.lengths)
        prompt = self._prompts.make(tenant, lengths.prompt)
        mix = self.config.adapters
        adapter = "" if mix is None else mix.adapter_of((self.config.seed, call_id))
        sampling = Sampling(max_tokens=lengths.output, temperature=0.0, ignore_eos=True)
        request = EngineRequest(call_id, prompt, sampling, (), tenant.name, adapter=adapter)
        waiting = WaitingSequence(
            call_id=call_id,
            model=MODEL,
            tenant=tenant.name,
            tokens=len(prompt),
            deadline=None,
            priority_class="standard",
            arrived=now,
            rank=tenant.rank,
            cached_tokens=gateway.likely_cached(tenant.name, len(prompt)),
            output_tokens=gateway.learnt.expected(tenant.name, MODEL, 1 << 20),
            adapter=adapter,
        )
        self.observer.arrived(tenant.name)
        gateway.enter(SimCall(waiting, request, tenant.name, now), now)
        self.observer.check_capacity()

    def _bound(self, number: int, call: SimCall) -> None:
        self.observer.bound(call)
        tenant = self._tenants[call.tenant]
        if tenant.backlog:
            self.event_queue.after(0.0, lambda: self._arrive(tenant, number))

    def _served(self, call: SimCall, output: TokenOutput) -> None:
        self.observer.served(call, output)

    def __repr__(self) -> str:
        return f"World({self.event_queue.now:g} s, {len(self.workers)} workers, {len(self.gateways)} gateways)"
