"""A simulated worker: the engine's model, its credits and its account of whom it served, in virtual time."""

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
from loadtests.sim.events import Agenda


@dataclass(frozen=True, slots=True)
class SimSubmit:
    """A call on its way to a worker. `again`: it was charged before."""

    request: EngineRequest
    flow: FlowKey
    charge: Charge
    again: bool = False


@dataclass(frozen=True, slots=True)
class Heard:
    """What a gateway (by number) hears from a worker."""

    outputs: Callable[[int, list[TokenOutput]], None]
    granted: Callable[[int, Grant], None]


@dataclass(slots=True)
class _Live:
    link: int
    tokens: int
    generated: int = 0


class SimWorker:
    """Links are the gateways' numbers."""

    def __init__(self, name: str, config: SimConfig, gateways: int, agenda: Agenda, heard: Heard) -> None:
        self.name = name
        self.config = config
        self.meter = ServedMeter()
        self.most_running_tokens = 0
        self.last_submit = 0.0
        self.tokens = 0
        """Held by calls: prompts and outputs so far."""
        self._model = SimModel(config)
        self._granter = CreditGranter()
        self._agenda = agenda
        self._heard = heard
        self._live: dict[str, _Live] = {}
        self._stepping = False
        self._lookahead = AdmissionWindow(config.max_num_seqs, config.max_num_batched_tokens)
        # Of equal claims the lower link gets what does not divide; were it the same gateway at every worker, the last
        # would have no credit at all while nobody waits.
        self._turned = {link: (link + int(name)) % gateways for link in range(gateways)}
        self._gateway_of = {turned: link for link, turned in self._turned.items()}
        for link in range(gateways):
            self._granter.attach(self._turned[link])
            self.meter.attach(link)
        agenda.after(0.0, self.regrant)

    @property
    def live(self) -> int:
        """Calls it has accepted and not ended."""
        return len(self._live)

    @property
    def places(self) -> int:
        """Calls that it could still hold, those who wait in the engine among them."""
        return self._lookahead.places

    @property
    def room(self) -> Capacity:
        """What it can take now."""
        return Capacity(self._lookahead.sequences, self.kv_tokens - self.tokens)

    @property
    def kv_tokens(self) -> int:
        """Tokens that it can hold."""
        return self.config.kv_blocks * self.config.block_size

    @property
    def kv_usage(self) -> float:
        """In [0, 1]."""
        return self._model.kv.used / self._model.kv.blocks

    @property
    def most_waiting(self) -> int:
        """The longest queue inside the engine so far, right after a step was scheduled."""
        return self._model.statistics().most_waiting

    @property
    def cached_and_prompt_tokens(self) -> tuple[int, int]:
        """Prompt tokens found in the cache, and all prompt tokens, since the start."""
        s = self._model.statistics()
        return s.cached_tokens, s.cached_tokens + s.prefill_tokens

    def submit(self, link: int, submit: SimSubmit) -> None:
        """A call arrives."""
        self.last_submit = self._agenda.now
        tokens = len(submit.request.prompt_token_ids)
        self._granter.spent(self._turned[link], tokens)
        self._live[submit.request.request_id] = _Live(link, tokens)
        self.tokens += tokens
        self._lookahead.submitted(submit.request.request_id, tokens)
        self._model.submit(submit.request)
        self.meter.accepted(submit.request.request_id, link, submit.flow, submit.charge, again=submit.again)
        self.regrant()
        self._start_step()

    def backlog(self, link: int, claim: int) -> None:
        """A gateway says what part it claims."""
        self._granter.backlog(self._turned[link], claim)
        self.regrant()

    def acked(self, link: int, grant_id: int) -> None:
        """A gateway has applied a grant."""
        self._granter.acked(self._turned[link], grant_id)
        self.regrant()

    def served(self, link: int) -> list[ServedTotal]:
        """What to tell that gateway."""
        return list(self.meter.report(link))

    def regrant(self) -> None:
        """Share out its room."""
        for grant in self._granter.grants(self.room):
            self._heard.granted(self._gateway_of[grant.link], grant)

    def promised(self) -> Capacity:
        """What gateways may still send."""
        return self._granter.promised()

    def _start_step(self) -> None:
        if self._stepping or not self._model.has_work():
            return
        self._stepping = True
        plan = self._model.schedule()
        self.most_running_tokens = max(self.most_running_tokens, self.tokens)
        self._agenda.after(plan.step_s, lambda: self._end_step(self._model.complete(plan)))

    def _end_step(self, outputs: list[TokenOutput]) -> None:
        self._stepping = False
        by_link: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            live = self._live[output.request_id]
            by_link.setdefault(live.link, []).append(output)
            live.generated += len(output.token_ids)
            live.tokens += len(output.token_ids)
            self.tokens += len(output.token_ids)
            if output.cached_tokens is not None:
                self._lookahead.began(output.request_id)
                self.meter.cached(output.request_id, output.cached_tokens)
            self.meter.generated(output.request_id, live.generated)
            if output.finish is not None:
                self.meter.ended(output.request_id)
                self._lookahead.ended(output.request_id)
                self.tokens -= self._live.pop(output.request_id).tokens
        if outputs:  # as the engine's port tells: of a step without any nobody hears
            self._lookahead.stepped()
        for link, some in by_link.items():
            self._heard.outputs(link, some)
        self.regrant()
        self._start_step()

    def __repr__(self) -> str:
        return f"SimWorker({self.name}: {self.live} live, {self.tokens} tokens)"
