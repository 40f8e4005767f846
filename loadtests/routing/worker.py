"""Simulated worker with a prefix cache, in virtual time without steps.

Prompts are computed one after the other, in chunks, in the same steps as the running sequences. A step takes

    step_s + per_sequence_s * running + chunk / prefill_tokens_per_s

and gives one token to each running sequence (loadtests/sim/plant.py). Between two events the state does not change, so
progress is linear in time and a call costs a few events however long it is. Admission window and credit are the
production code. `slowness` multiplies the duration of each step.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.policy.kv_cache.changes import KvChange
from cluster.wire.credit import Capacity, CreditGranter, Grant
from cluster.worker.admission_window import AdmissionWindow
from loadtests.routing.block_cache import BlockCache
from loadtests.routing.calls import BLOCK_TOKENS, Prompt
from loadtests.sim.adapters import AdapterMix, AdapterSlots
from loadtests.sim.events import EventQueue
from loadtests.sim.plant import ReplicaModel

MODEL = ReplicaModel(
    prefill_tokens_per_s=12_000.0, step_s=0.012, per_sequence_s=0.0005, chunk_tokens=2048, max_running=64
)
"""An engine of 12,000 prompt tokens a second and 64 slots."""
_LINKS = 1000
_LATE_STEPS = 48
"""Maximum number of steps between two events that are reported to the admission window."""


@dataclass(frozen=True, slots=True)
class WorkerOutputs:
    """Callbacks of a worker. `link` is the number of the gateway at the other end of the link.

    `first(link, call id, cached tokens, pooled tokens)`: first token of a call. Pooled tokens are the tokens that
    would be cached if all workers shared one cache. `ended(link, call id)`: last token of a call. `granted(grant)`: a
    credit grant for the link that it names. `changed()`: the blocks have changed for the first time since the last
    report. `adapters(names)`: the adapters in the engine's slots have changed.
    """

    first: Callable[[int, str, int, int], None]
    ended: Callable[[int, str], None]
    granted: Callable[[Grant], None]
    changed: Callable[[], None]
    adapters: Callable[[frozenset[str]], None]


@dataclass(eq=False, slots=True)
class _Job:
    call_id: str
    link: int
    prompt: Prompt
    matched: int = 0
    in_pool: int = 0
    left: float = 0.0
    chunk: float = 1.0
    copy_s: float = 0.0
    """Time of the adapter's copy into a slot, divided equally among the steps that compute the prompt."""
    is_cancelled: bool = False


class PrefixWorker:
    """A simulated worker. `busy_s`: seconds during which it computed something. `computed`: prompt tokens that it
    computed."""

    def __init__(
        self,
        number: int,
        blocks: int,
        events: EventQueue,
        outputs: WorkerOutputs,
        model: ReplicaModel = MODEL,
        slowness: float = 1.0,
        pool: BlockCache | None = None,
        adapters: AdapterMix | None = None,
    ) -> None:
        """Create the worker. `adapters`: None if no call names an adapter. `pool`: one cache as large as all workers'
        caches together. Each worker repeats its cache operations on this cache, to compute RoutedCall.in_pool."""
        self.number = number
        self._slots = None if adapters is None else AdapterSlots(adapters)
        self.cache = BlockCache(blocks)
        self.computed = 0
        self.submitted = 0
        self.busy_s = 0.0
        self.most_tokens = 0
        self.slowness = slowness
        self._model = model
        self._events = events
        self._outputs = outputs
        self._pool = pool
        self._granter = CreditGranter()
        self._window = AdmissionWindow(model.max_running, model.chunk_tokens)
        self._queue: deque[_Job] = deque()
        self._prefilling: _Job | None = None
        self._running: list[tuple[float, int, _Job]] = []
        self._live: dict[str, _Job] = {}
        self._tokens = 0
        self._steps = 0.0
        self._reported_steps = 0
        self._at = 0.0
        self._serial = 0
        self._plan = 0
        self._has_changed = False

    # ---- links

    def attach(self, link: int) -> KvChange:
        """Add a link to a gateway; return the snapshot of the blocks for this gateway."""
        self._granter.attach(self._rank(link))
        self.regrant()
        return self.cache.snapshot()

    def detach(self, link: int) -> None:
        """Remove a link that has ended. Its calls run on."""
        self._granter.detach(self._rank(link))
        self.regrant()

    def set_claim(self, link: int, claim: int) -> None:
        """Set the claim of a gateway: the number of calls that wait at this gateway."""
        self._granter.set_backlog(self._rank(link), claim)
        self.regrant()

    def acknowledge(self, link: int, grant_id: int) -> None:
        """Record that a gateway has applied a grant."""
        self._granter.acknowledge(self._rank(link), grant_id)

    def regrant(self) -> None:
        """Distribute the free capacity to the gateways as credit."""
        room = Capacity(self._window.admissible_sequences, self.cache.capacity * BLOCK_TOKENS - self._tokens)
        for grant in self._granter.new_grants(room):
            self._outputs.granted(replace(grant, link=grant.link % _LINKS))

    def _rank(self, link: int) -> int:
        """Return the link's rank among this worker's links. Among gateways with equal claims, the lowest rank gets the
        part of the capacity that cannot be divided equally.

        Each worker ranks its links differently. Otherwise the same gateway would get this part at every worker, and
        another gateway might get no credit anywhere.
        """
        return (link * 40_503 + self.number * 30_011) % 97 * _LINKS + link

    def pop_change(self) -> KvChange:
        """Return how the blocks have changed since the last call."""
        self._has_changed = False
        return self.cache.pop_change()

    @property
    def copies(self) -> int:
        """Number of adapters that were copied into a slot."""
        return 0 if self._slots is None else self._slots.copies

    @property
    def waiting(self) -> int:
        """Number of calls that wait in the engine."""
        return len(self._queue)

    @property
    def live(self) -> int:
        """Number of calls that the worker has."""
        return len(self._live)

    # ---- calls

    def submit(self, link: int, call_id: str, prompt: Prompt) -> None:
        """Accept a call."""
        self._advance()
        self.submitted += 1
        self._granter.record_submit(self._rank(link), prompt.prompt_tokens)
        self._window.record_submit(call_id, prompt.prompt_tokens)
        self._tokens += prompt.prompt_tokens
        self.most_tokens = max(self.most_tokens, self._tokens)
        job = self._live[call_id] = _Job(call_id, link, prompt)
        self._queue.append(job)
        self._go_on()

    def set_slowness(self, slowness: float) -> None:
        """Change the speed of the engine from now on."""
        self._advance()
        self.slowness = slowness
        self._go_on()

    def cancel(self, call_id: str) -> None:
        """Abort a call; nothing more is sent for it. Unknown calls are ignored. A prompt that is being computed ends
        with its current chunk."""
        job = self._live.get(call_id)
        if job is None:
            return
        self._advance()
        job.is_cancelled = True
        if job in self._queue:
            self._queue.remove(job)
            self._forget(job)
        elif job is self._prefilling:
            self.computed -= round(job.left)
            for cache, matched in self._caches(job):
                cache.release(job.prompt.names[:matched], job.prompt.total - matched)
            self._prefilling = None
            self._forget(job)
        else:
            self._running = [entry for entry in self._running if entry[2] is not job]
            heapq.heapify(self._running)
            self._finish(job)
        self._go_on()

    def _step_s(self) -> float:
        job, model = self._prefilling, self._model
        prefill_s = 0.0 if job is None else job.chunk / model.prefill_tokens_per_s + job.copy_s
        return (model.step_s + model.per_sequence_s * len(self._running) + prefill_s) * self.slowness

    def _advance(self) -> None:
        """Apply the progress since the last event."""
        now = self._events.now
        elapsed, self._at = now - self._at, now
        if self._prefilling is None and not self._running:
            return
        steps = elapsed / self._step_s()
        self.busy_s += elapsed
        self._steps += steps
        if self._prefilling is not None:
            self._prefilling.left -= steps * self._prefilling.chunk
        whole = int(self._steps)
        for _ in range(min(whole - self._reported_steps, _LATE_STEPS)):
            self._window.record_step()
        self._reported_steps = whole

    def _go_on(self) -> None:
        """Begin the next prompt if its blocks fit, plan the next event, and grant the free capacity."""
        if self._prefilling is None and self._queue and len(self._running) < self._model.max_running:
            job = self._queue[0]
            prompt = job.prompt
            matched = self.cache.acquire(prompt.names, prompt.reusable, prompt.total)
            if matched is not None:
                self._queue.popleft()
                tokens = prompt.prompt_tokens - matched * BLOCK_TOKENS
                job.matched, job.left = matched, float(tokens)
                if self._pool is not None:  # never full, since the shares of all workers are not
                    job.in_pool = self._pool.acquire(prompt.names, prompt.reusable, prompt.total) or 0
                job.chunk = float(min(tokens, self._model.chunk_tokens))
                if self._slots is not None and (copy_s := self._slots.use(prompt.adapter)):
                    job.copy_s = copy_s * job.chunk / job.left
                    self._outputs.adapters(self._slots.resident)
                self.computed += tokens
                self._prefilling = job
        if self.cache.has_changed and not self._has_changed:
            self._has_changed = True
            self._outputs.changed()
        self._plan += 1
        left = float("inf")
        if self._prefilling is not None:
            left = self._prefilling.left / self._prefilling.chunk
        if self._running:
            left = min(left, self._running[0][0] - self._steps)
        if left < float("inf"):
            plan = self._plan
            self._events.after(max(left, 0.0) * self._step_s(), lambda: self._reach(plan))
        self.regrant()

    def _reach(self, plan: int) -> None:
        """Handle the event that this worker has planned: the end of a prefill or of a call. `plan`: serial number of
        the plan. Does nothing if the worker has made a newer plan."""
        if plan != self._plan:
            return
        self._advance()
        job = self._prefilling
        if job is not None and job.left <= 1e-6 * job.chunk:
            self._prefilling = None
            self._prefilled(job)
        while self._running and self._running[0][0] - self._steps <= 1e-6:
            job = heapq.heappop(self._running)[2]
            self._finish(job)
            self._outputs.ended(job.link, job.call_id)
        self._go_on()

    def _prefilled(self, job: _Job) -> None:
        prompt = job.prompt
        for cache, matched in self._caches(job):
            cache.commit(prompt.names[matched : prompt.whole])
        self._window.record_first_output(job.call_id)
        self._serial += 1
        heapq.heappush(self._running, (self._steps + prompt.output_tokens - 1, self._serial, job))
        self._tokens += prompt.output_tokens
        self.most_tokens = max(self.most_tokens, self._tokens)
        self._outputs.first(job.link, job.call_id, job.matched * BLOCK_TOKENS, job.in_pool * BLOCK_TOKENS)

    def _caches(self, job: _Job) -> list[tuple[BlockCache, int]]:
        """Return (cache, blocks) for each cache that a call uses. `blocks`: the number of the call's blocks that this
        cache already held."""
        own = [(self.cache, job.matched)]
        return own if self._pool is None else [*own, (self._pool, job.in_pool)]

    def _finish(self, job: _Job) -> None:
        """Release the blocks of a call that ends.

        If the call was not cancelled, the whole blocks of its output stay cached under their names (prefix
        hashes). Only blocks with a name in `prompt.names` can stay.
        """
        prompt = job.prompt
        named = prompt.whole if job.is_cancelled else len(prompt.names)
        for cache, _ in self._caches(job):
            cache.commit(prompt.names[prompt.whole : named])
            cache.release(prompt.names[:named], prompt.total - named)
        self._tokens -= prompt.output_tokens
        self._forget(job)

    def _forget(self, job: _Job) -> None:
        self._tokens -= job.prompt.prompt_tokens
        self._window.record_end(job.call_id)
        del self._live[job.call_id]

    def __repr__(self) -> str:
        return f"PrefixWorker({self.number}: {len(self._live)} live, {self.cache})"
