"""A simulated worker in virtual time. It runs the engine model, grants credit to gateways, and counts the service
(weighted tokens) that each tenant gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.api.types import EngineRequest, TokenOutput
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.served_tokens import ServedMeter
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.fairness.token_cost import Charge
from cluster.wire.credit import Capacity, CreditGranter, Grant
from cluster.worker.admission_window import AdmissionWindow
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.model import SimModel
from loadtests.sim.adapters import AdapterMix, AdapterSlots
from loadtests.sim.events import EventQueue


@dataclass(frozen=True, slots=True)
class SimSubmit:
    """A call on its way to a worker. `again`: whether the call is resumed; the charge of a resumed call has already
    been counted."""

    request: EngineRequest
    flow: FlowKey
    charge: Charge
    again: bool = False


@dataclass(frozen=True, slots=True)
class WorkerCallbacks:
    """Callbacks of a worker. The first argument of each callback is the number of a gateway."""

    outputs: Callable[[int, list[TokenOutput]], None]
    granted: Callable[[int, Grant], None]


@dataclass(slots=True)
class _RunningCall:
    link: int
    tokens: int
    generated: int = 0


class SimWorker:
    """A simulated worker. The number of a link is the number of its gateway."""

    def __init__(
        self,
        name: str,
        config: SimConfig,
        gateways: int,
        event_queue: EventQueue,
        callbacks: WorkerCallbacks,
        adapters: AdapterMix | None = None,
    ) -> None:
        """Create the worker. `adapters`: None if no call names an adapter."""
        self.name = name
        self.adapters = frozenset() if adapters is None else frozenset(adapters.names)
        self.slots = None if adapters is None else AdapterSlots(adapters)
        self._copies_s = 0.0
        """Time for which the engine stands still before its next step, in seconds."""
        self.config = config
        self.meter = ServedMeter()
        self.most_running_tokens = 0
        self.last_submit = 0.0
        self.tokens = 0
        """Number of tokens held by calls: prompts, and outputs so far."""
        self._model = SimModel(config)
        self._granter = CreditGranter()
        self._event_queue = event_queue
        self._callbacks = callbacks
        self._running: dict[str, _RunningCall] = {}
        self._stepping = False
        self._window = AdmissionWindow(config.max_num_seqs, config.max_num_batched_tokens)
        # With equal claims, the lowest link gets the remainder. If the lowest link were of the same gateway at every
        # worker, the last gateway would have no credit at all while nothing waits.
        self._rotated = {link: (link + int(name)) % gateways for link in range(gateways)}
        self._gateway_of = {rotated: link for link, rotated in self._rotated.items()}
        for link in range(gateways):
            self._granter.attach(self._rotated[link])
            self.meter.attach(link)
        event_queue.after(0.0, self.regrant)

    @property
    def live(self) -> int:
        """Number of accepted calls that have not ended."""
        return len(self._running)

    @property
    def places(self) -> int:
        """Number of calls that the worker can still hold, including calls that would wait in the engine."""
        return self._window.free_slots

    @property
    def room(self) -> Capacity:
        """Capacity of the worker for new calls."""
        return Capacity(self._window.admissible_sequences, self.kv_tokens - self.tokens)

    @property
    def kv_tokens(self) -> int:
        """Capacity of the KV cache in tokens."""
        return self.config.kv_blocks * self.config.block_size

    @property
    def kv_usage(self) -> float:
        """Used share of the KV cache, in [0, 1]."""
        return self._model.kv.used / self._model.kv.blocks

    @property
    def most_waiting(self) -> int:
        """Length of the longest queue inside the engine so far, measured right after a step was scheduled."""
        return self._model.statistics().most_waiting

    @property
    def cached_and_prompt_tokens(self) -> tuple[int, int]:
        """Numbers of prompt tokens since the start: tokens found in the cache, and all tokens."""
        s = self._model.statistics()
        return s.cached_tokens, s.cached_tokens + s.prefill_tokens

    def submit(self, link: int, submit: SimSubmit) -> None:
        """Accept a call from a gateway."""
        self.last_submit = self._event_queue.now
        tokens = len(submit.request.prompt_token_ids)
        self._granter.record_submit(self._rotated[link], tokens)
        self._running[submit.request.request_id] = _RunningCall(link, tokens)
        self.tokens += tokens
        self._window.record_submit(submit.request.request_id, tokens)
        self._model.submit(submit.request)
        if self.slots is not None:
            self._copies_s += self.slots.use(submit.request.adapter)
        self.meter.accepted(submit.request.request_id, link, submit.flow, submit.charge, again=submit.again)
        self.regrant()
        self._start_step()

    def backlog(self, link: int, claim: int) -> None:
        """Record the number of sequences that wait at a gateway. `link`: the gateway's link. `claim`: the number that
        the gateway has reported."""
        self._granter.set_backlog(self._rotated[link], claim)
        self.regrant()

    def acked(self, link: int, grant_id: int) -> None:
        """Record that a gateway has applied a grant."""
        self._granter.acknowledge(self._rotated[link], grant_id)
        self.regrant()

    def served(self, link: int) -> list[ServedTotal]:
        """Return the service report for one gateway."""
        return list(self.meter.report(link))

    def regrant(self) -> None:
        """Distribute the capacity of the worker to the gateways."""
        for grant in self._granter.new_grants(self.room):
            self._callbacks.granted(self._gateway_of[grant.link], grant)

    def promised(self) -> Capacity:
        """Capacity that is granted to gateways and that they have not used."""
        return self._granter.promised()

    def _start_step(self) -> None:
        if self._stepping or not self._model.has_work():
            return
        self._stepping = True
        plan = self._model.schedule()
        self.most_running_tokens = max(self.most_running_tokens, self.tokens)
        copies_s, self._copies_s = self._copies_s, 0.0
        self._event_queue.after(copies_s + plan.step_s, lambda: self._end_step(self._model.complete(plan)))

    def _end_step(self, outputs: list[TokenOutput]) -> None:
        self._stepping = False
        by_link: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            call = self._running[output.request_id]
            by_link.setdefault(call.link, []).append(output)
            call.generated += len(output.token_ids)
            call.tokens += len(output.token_ids)
            self.tokens += len(output.token_ids)
            if output.cached_tokens is not None:
                self._window.record_first_output(output.request_id)
                self.meter.cached(output.request_id, output.cached_tokens)
            self.meter.generated(output.request_id, call.generated)
            if output.finish is not None:
                self.meter.ended(output.request_id)
                self._window.record_end(output.request_id)
                self.tokens -= self._running.pop(output.request_id).tokens
        if outputs:  # as in the engine's port, steps without outputs are not reported
            self._window.record_step()
        for link, link_outputs in by_link.items():
            self._callbacks.outputs(link, link_outputs)
        self.regrant()
        self._start_step()

    def __repr__(self) -> str:
        return f"SimWorker({self.name}: {self.live} live, {self.tokens} tokens)"
