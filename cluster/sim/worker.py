"""A simulated worker: the engine's model, its credits and its account of whom it served, in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.api.types import EngineRequest, TokenOutput
from cluster.engine.simulated.config import SimConfig
from cluster.engine.simulated.model import SimModel
from cluster.link.credit import Grant, Granter, Room
from cluster.sim.events import Agenda
from cluster.tenancy.charge import Charge
from cluster.tenancy.elsewhere import ServedTotal
from cluster.tenancy.flows import FlowKey
from cluster.tenancy.served import ServedMeter

LOOKAHEAD_SEQUENCES = 2
RECENT_PROMPTS = 64
SHORT_PROMPTS = 8
"""Where at least so many of the longest recent prompts begin in one step, that many are let in at once."""


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
        self.most_waiting = 0
        """The longest queue inside the engine so far, right after a step was scheduled."""
        self.most_running_tokens = 0
        self.last_submit = 0.0
        self.tokens = 0
        """Held by calls: prompts and outputs so far."""
        self._model = SimModel(config)
        self._granter = Granter()
        self._agenda = agenda
        self._heard = heard
        self._live: dict[str, _Live] = {}
        self._stepping = False
        self._ends_a_step = 0.0  # of late
        self._recent: deque[int] = deque([config.max_num_batched_tokens], RECENT_PROMPTS)
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
    def lookahead(self) -> int:
        """Calls that may wait in the engine: as many as are likely to end in a step, so that no place stays empty."""
        return min(round(self._ends_a_step), LOOKAHEAD_SEQUENCES)

    @property
    def places(self) -> int:
        """Calls that it could still hold, those who wait in the engine among them."""
        return self.config.max_num_seqs + self.lookahead - self.live

    @property
    def room(self) -> Room:
        """What it can take now: places, but no more calls at once than the next step can begin."""
        in_one_step = self.config.max_num_batched_tokens // max(self._recent)
        ahead = in_one_step if in_one_step >= SHORT_PROMPTS else LOOKAHEAD_SEQUENCES
        return Room(min(self.places, ahead - self.engine_waiting), self.kv_tokens - self.tokens)

    @property
    def kv_tokens(self) -> int:
        """Tokens that it can hold."""
        return self.config.kv_blocks * self.config.block_size

    @property
    def kv_usage(self) -> float:
        """In [0, 1]."""
        return self._model.kv.used / self._model.kv.blocks

    @property
    def engine_waiting(self) -> int:
        """Calls in the engine's own queue."""
        return self._model.load().waiting

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
        self._recent.append(tokens)
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

    def promised(self) -> Room:
        """What gateways may still send."""
        return self._granter.promised()

    def _start_step(self) -> None:
        if self._stepping or not self._model.has_work():
            return
        self._stepping = True
        plan = self._model.schedule()
        self.regrant()
        self.most_waiting = max(self.most_waiting, self.engine_waiting)
        self.most_running_tokens = max(self.most_running_tokens, self.tokens)
        self._agenda.after(plan.step_s, lambda: self._end_step(self._model.complete(plan)))

    def _end_step(self, outputs: list[TokenOutput]) -> None:
        self._stepping = False
        by_link: dict[int, list[TokenOutput]] = {}
        ends = sum(output.finish is not None for output in outputs)
        self._ends_a_step += (ends - self._ends_a_step) / 64
        for output in outputs:
            live = self._live[output.request_id]
            by_link.setdefault(live.link, []).append(output)
            live.generated += len(output.token_ids)
            live.tokens += len(output.token_ids)
            self.tokens += len(output.token_ids)
            if output.cached_tokens is not None:
                self.meter.cached(output.request_id, output.cached_tokens)
            self.meter.generated(output.request_id, live.generated)
            if output.finish is not None:
                self.meter.ended(output.request_id)
                self.tokens -= self._live.pop(output.request_id).tokens
        for link, some in by_link.items():
            self._heard.outputs(link, some)
        self.regrant()
        self._start_step()

    def __repr__(self) -> str:
        return f"SimWorker({self.name}: {self.live} live, {self.tokens} tokens)"
