"""The simulated engine: SimModel's steps in real or virtual time, with the same Engine interface as the vLLM engine.

The engine is not for production. Tests and a laptop can run any number of workers with it, and make them fail on
command (`faults`, or `fault=` in the source).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from cluster.api.adapters import ADAPTERS
from cluster.api.demand import EngineCounts
from cluster.api.kv_events import KvEvent
from cluster.api.pooling import pooling_capabilities
from cluster.api.ports import EngineRefused
from cluster.api.types import (
    KV_EVENTS,
    PREFIX_EXACT,
    RESUME_EXACT,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    TokenOutput,
)
from cluster.worker.engine.simulated.clock import Clock, VirtualClock, WallClock
from cluster.worker.engine.simulated.config import SCHEME, SimConfig
from cluster.worker.engine.simulated.faults import EngineFaults, SimFault
from cluster.worker.engine.simulated.model import SimModel, SimStatistics, StepPlan
from cluster.worker.engine.simulated.timing import SimTiming
from cluster.worker.engine.simulated.vectors import pooling_info
from cluster.worker.engine.step_times import LEAST_S, PATIENCE, StepTimes

__all__ = ["SCHEME", "SimConfig", "SimEngine", "SimFault", "SimStatistics", "VirtualClock"]

ENGINE_VERSION = "sim-1"


class SimEngine:
    """An Engine (cluster.api.ports) that simulates the steps of an engine and runs no model. Call `start` before other
    methods."""

    def __init__(self, config: SimConfig, clock: Clock | None = None) -> None:
        self._config = config
        self._clock: Clock = clock or WallClock()
        self._timing = SimTiming()
        self._wake = asyncio.Event()
        self._has_kv_events = asyncio.Event()
        self.faults = EngineFaults(config.faults, self._wake)
        """The faults with which a test makes the engine fail."""
        self._model: SimModel | None = None
        self._plan: StepPlan | None = None
        self._idle = True  # whether the engine has been without work since the last step
        self._ends_at = 0.0
        self._stated_until = 0.0
        self._pace = StepTimes()
        self._frozen = EngineLoad()  # load at the beginning of the last hang
        self._adapters: set[str] = set()

    # -- Engine interface -----------------------------------------------------------------------------------------

    async def start(self) -> EngineInfo:
        """Read the model folder, then wait `load_s` seconds. Raises ValueError for an invalid source."""
        config = await asyncio.to_thread(self._config.resolved)
        if config.load_s:
            await self._clock.sleep_until(self._clock.now() + config.load_s)
        self._config = config
        self._model = SimModel(config)
        pooling = pooling_info(config)
        kind = (RESUME_EXACT,) if pooling is None else pooling_capabilities(pooling.tasks)
        return EngineInfo(
            engine_class="sim",
            engine_path="sim",
            engine_version=ENGINE_VERSION,
            block_size=config.block_size,
            kv_blocks=config.kv_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            vocab_size=config.vocab,
            default_sampling=config.default_sampling,
            capabilities=(*kind, KV_EVENTS, PREFIX_EXACT, *((ADAPTERS,) if config.max_loras else ())),
            pooling=pooling,
            adapter_slots=config.max_loras,
            adapter_capacity=config.max_cpu_loras,
        )

    async def submit(self, request: EngineRequest) -> None:
        """Queue a request for the next step."""
        model = self._require_model()
        self.faults.visit("submit")
        self.faults.raise_if_dead()
        if self._config.max_loras and request.adapter and request.adapter not in self._adapters:
            raise EngineRefused("ADAPTER_INVALID", f"adapter: {request.adapter!r} is not loaded", "adapter")
        idle = not model.has_work()
        model.submit(request)
        self._timing.submitted(request, self._clock.now())
        if idle:
            self._pace.began(self._clock.now())
        self._wake.set()

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests and free their slots at once."""
        model = self._require_model()
        for request_id in request_ids:
            model.abort(request_id)
            self._timing.forget(request_id)
        if not model.has_work():
            self._pace.mark_idle()

    async def step(self) -> Sequence[TokenOutput]:
        """Wait until a step has outputs; return them.

        If the wait is cancelled, no output is lost: the next call continues the same step.
        """
        model = self._require_model()
        while True:
            self.faults.raise_if_dead()
            plan = self._plan or await self._begin_step(model)
            await self.faults.wait_while_hung()
            await self._clock.sleep_until(self._ends_at)
            self.faults.raise_if_dead()
            self._plan = None
            outputs = model.complete(plan, self.faults.nan, self.faults.corrupt)
            self._timing.add_times(outputs, self._clock.now())
            self._idle = not model.has_work()
            self._pace.step(self._clock.now(), goes_on=not self._idle)
            if model.kv.events:
                self._has_kv_events.set()
            if outputs:
                return outputs

    async def load_adapter(self, digest: str, folder: str, *, pinned: bool) -> None:
        """Wait `adapter_load_ms` milliseconds, then accept requests for the adapter.

        The adapter's files are not read.
        """
        slowed = self.faults.visit("adapter")
        self.faults.raise_if_dead()
        if len(self._adapters) >= self._config.max_cpu_loras and digest not in self._adapters:
            raise EngineRefused("ADAPTER_INVALID", f"the memory holds {len(self._adapters)} adapters", "adapter")
        load_s = self._config.adapter_load_ms / 1000 + sum(fault.seconds for fault in slowed)
        if load_s:
            await self._clock.sleep_until(self._clock.now() + load_s)
        self._adapters.add(digest)

    async def unload_adapter(self, digest: str) -> None:
        """Refuse further requests for the adapter."""
        self.faults.raise_if_dead()
        self._adapters.discard(digest)

    async def kv_events(self) -> Sequence[KvEvent]:
        """Wait for events of the KV cache and return them. Events are recorded from the first call on."""
        kv = self._require_model().kv
        if kv.events is None:
            kv.events = []
        while not kv.events:
            self._has_kv_events.clear()
            await self._has_kv_events.wait()
        events, kv.events = kv.events, []
        return events

    def load(self) -> EngineLoad:
        """Return the engine's load. Any thread may call this.

        During a hang, the load is the load at the beginning of the hang, except that the age of the step is current.
        """
        if self._model is None:
            return EngineLoad(busy="start")
        now, plan = self._clock.now(), self._plan
        busy = "prefill" if plan is not None and plan.prefill_tokens and now <= self._stated_until else ""
        age_s, p99_s = self._pace.age_s(now), self._pace.times.value_s
        if self.faults.hung:
            return dataclasses.replace(self._frozen, busy=busy, step_age_s=age_s)
        return self._model.load(busy, age_s, p99_s)

    def counts(self) -> EngineCounts:
        """Return the counts of preemptions and of the prefix cache; any thread may call this."""
        if self._model is None:
            return EngineCounts()
        counts = self._model.statistics()
        return EngineCounts(counts.preemptions, counts.looked_up_tokens, counts.cached_tokens)

    async def check(self) -> None:
        """Raise EngineDead if the engine is dead. As in a real engine, this check does not detect a hang."""
        self.faults.raise_if_dead()

    async def close(self) -> None:
        """End the engine. A caller that waits in `step` gets EngineDead."""
        self.faults.kill("closed")

    def statistics(self) -> SimStatistics:
        """Return counts since the start, and the current numbers of requests and blocks."""
        return self._require_model().statistics()

    def __repr__(self) -> str:
        return f"SimEngine({self._model}{', dead: ' + self.faults.dead if self.faults.dead else ''})"

    # -- internals ------------------------------------------------------------------------------------------------

    def _require_model(self) -> SimModel:
        if self._model is None:
            raise RuntimeError("start() must come first")
        return self._model

    async def _begin_step(self, model: SimModel) -> StepPlan:
        """Wait for work, schedule the next step, apply the faults that fire in the step, and set the time at which the
        step ends."""
        while not model.has_work():
            self._idle = True
            self._wake.clear()
            await self._wake.wait()
            self.faults.raise_if_dead()
        self._plan = plan = model.schedule()
        points = ["step"]
        if plan.prefill_tokens:
            points.append("prefill")
        if self.faults and model.reaches_max_tokens(plan):
            points.append("last_token")
        slowed = self.faults.begin_step(points)
        if self.faults.hung:
            self._frozen = model.load(p99_s=self._pace.times.value_s)
        now = self._clock.now()
        # A step begins where the last step ended. If the caller was more than a step late, the step begins now.
        late = self._idle or now - self._ends_at > plan.step_s
        begins_at = now if late else self._ends_at
        self._timing.scheduled((sequence.request.request_id for sequence, _ in plan.work), begins_at)
        self._ends_at = begins_at + plan.step_s + sum(fault.seconds for fault in slowed)
        stated_s = plan.step_s + sum(fault.seconds for fault in slowed if fault.point == "prefill")
        self._stated_until = begins_at + max(LEAST_S, PATIENCE * stated_s)
        self._pace.began(begins_at)
        return plan
