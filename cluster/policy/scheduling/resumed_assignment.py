"""Assignment of resumed sequences to workers. A sequence is sent to a compatible worker, or it keeps
waiting, or its call is ended.

A sequence first waits for the worker that holds its KV blocks. The resume queue limits this wait. Then
the sequence may be sent to any compatible worker. A suspect sequence, which may have caused the loss of
its workers, is resumed only as worker_losses.py allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cluster.policy.routing.router import Candidate, RouteCall, may_take_resumed, pick, uncached_tokens_at
from cluster.policy.scheduling.instructions import Acquit, End, Ending, Fail, Instruction, Move, ResumingSequence, Send
from cluster.policy.scheduling.resume_queue import ResumeQueue
from cluster.policy.scheduling.resume_route import resumed_request, tokens_to_recompute
from cluster.policy.scheduling.worker_losses import LossVerdict, WorkerLosses
from cluster.policy.scheduling.workers import Workers
from cluster.policy.scheduling.workers_view import WorkersView

FEW = 32
"""If a model has at most this many workers, all of them are tried for a sequence at once. If it has more, a sample is
tried first."""


class ResumedAssignment:
    """Assigns the resumed sequences of one gateway to workers, for all models. `now` is monotonic, in seconds."""

    def __init__(self, queue: ResumeQueue, losses: WorkerLosses, workers: Workers) -> None:
        self._queue = queue
        self._losses = losses
        self._workers = workers

    def assign(self, model: str, sequences: Iterable[ResumingSequence], now: float) -> Iterator[Instruction]:
        """Yield the instructions that send resumed sequences to workers or end their calls. A sequence that must wait
        gets no instruction. `sequences`: sequences of `model` in the resume queue."""
        view = WorkersView(self._workers, model, now)
        for sequence in sequences:
            if sequence.key not in self._queue:  # an earlier instruction has ended its call
                continue
            try:
                yield from self._resume(sequence, view, now)
            except Exception as error:
                self._queue.remove(sequence.key)
                yield Fail(sequence.key, error)

    def _resume(self, sequence: ResumingSequence, view: WorkersView, now: float) -> Iterator[Instruction]:
        """Yield the instructions for one sequence; none if the sequence must wait."""
        is_suspect = sequence.suspect
        for candidates in self._offered(sequence, view, now):
            if not any(map(may_take_resumed, candidates)):
                continue
            if is_suspect:
                verdict = self._losses.verdict(sequence.lost_links, sequence.lost_at, now)
                if verdict is LossVerdict.WAIT:
                    return
                if verdict is LossVerdict.END:
                    self._queue.remove(sequence.key)
                    yield End(sequence.key, Ending.BLAMED)
                    return
                if verdict is LossVerdict.ALONE:
                    candidates = [one for one in candidates if not view.runs_suspect(one)]
                else:
                    self._queue.acquit(sequence.key)
                    yield Acquit(sequence.key)
                    is_suspect = False
            request = resumed_request(sequence, candidates, now)
            decision = pick(request, candidates)
            if decision.worker_id is not None:
                self._queue.remove(sequence.key)
                worker = next(one for one in candidates if one.worker_id == decision.worker_id)
                uncached = uncached_tokens_at(request, worker)
                yield Send(sequence.entry, worker.worker_id, decision.reason, uncached, decision=decision)
                view.refresh(worker, is_suspect)
                return
        if self._workers.is_replaced(sequence.model, sequence.compatibility):
            self._queue.remove(sequence.key)
            yield End(sequence.key, Ending.REPLACED)

    def _offered(self, sequence: ResumingSequence, view: WorkersView, now: float) -> Iterator[Sequence[Candidate]]:
        """Yield groups of workers, in the order in which to try them.

        While the sequence must wait for the worker that holds its KV blocks, this worker is the only group.
        Otherwise the last group is all workers of the model. If there are many workers, a smaller group is tried
        first: a sample of the workers, together with the worker that holds the KV blocks.
        """
        holder = view.one(sequence.cached_on) if sequence.cached_on else None
        cached_on = self._queue.waits_for(sequence.key, now)
        waits = cached_on and cached_on not in sequence.excluded
        if waits and holder is not None and holder.healthy and not holder.draining:
            yield (holder,)
            return
        if len(view) > FEW and (sample := view.sample(sequence, now)):
            others = [worker for worker in sample if worker.incarnation != sequence.cached_on]
            yield others if holder is None else [holder, *others]
        yield view.all()

    def movable(self, sequences: Iterable[ResumingSequence], worker_id: str, now: float) -> Iterator[Move]:
        """Yield the sequences for which another worker has capacity. `sequences`: sequences on the draining worker
        `worker_id`. The caller must send each sequence to its new worker before it takes the next one.

        A look at all workers takes milliseconds. Where a sequence has found no room, those with the same needs and at
        least as many tokens find none either, and are passed over.
        """
        view: WorkersView | None = None
        least: dict[object, int] = {}
        """Tokens of the shortest sequence that has found no room, by what it needs."""
        for sequence in sequences:
            needs = (sequence.compatibility, sequence.entry.needs_tools, sequence.entry.adapter)
            if sequence.tokens >= least.get(needs, sequence.tokens + 1):
                continue
            view = view or WorkersView(self._workers, sequence.model, now)
            holder = view.one(sequence.cached_on) if sequence.cached_on else None
            request = RouteCall(
                sequence.model,
                sequence.tokens,
                compatibility_key=sequence.compatibility,
                cached_on=sequence.cached_on,
                uncached_there=0 if holder is None else tokens_to_recompute(sequence.tokens, holder.block_size),
                needs_tools=sequence.entry.needs_tools,
                adapter=sequence.entry.adapter,
            )
            worker = self._first_with_room(request, sequence, view, holder, worker_id, now)
            if worker is None:
                least[needs] = sequence.tokens
                continue
            yield Move(sequence.key, worker.worker_id)
            view.refresh(worker, False)

    def _first_with_room(
        self,
        request: RouteCall,
        sequence: ResumingSequence,
        view: WorkersView,
        holder: Candidate | None,
        without: str,
        now: float,
    ) -> Candidate | None:
        """Return a worker with room for a sequence; None if no worker but `without` has room. `holder`: the worker that
        holds the sequence's KV blocks, which is preferred."""
        sample = view.sample(sequence, now) if len(view) > FEW else ()
        for candidates in (() if holder is None else (holder,), sample, view.all()):
            others = [one for one in candidates if one.worker_id != without]
            if (worker_id := pick(request, others).worker_id) is not None:
                return next(one for one in others if one.worker_id == worker_id)
        return None
