"""The workers of one model, kept between decisions, and the choice of one of them for a new call.

Problem: a gateway decides for each call, and a model may have a thousand workers. Reading them all for each decision
takes milliseconds. Between two decisions few workers change.

Method: a row for each worker holds what a decision needs: the part of the worker's cost that is equal for all calls,
its cost of a prompt token, and the largest prompt that fits on the worker. A row is computed when its worker has
changed. A decision adds the part that depends on the call. From VECTOR_FROM workers on, the rows are also kept as
numpy columns, see columns.py.

Invariants: the chosen worker passes all FILTERS, and no worker that passes has a lower cost. If none passes, a worker
that is being replaced may be chosen, for a call that has begun on its version or that no other worker can serve. With
the setting power_of_two, only two workers are compared, which are drawn at random. Of workers with equal costs, the one
that can take more sequences is chosen; of these, the one that got nothing from this gateway for the longest time, so
that idle workers fill their caches evenly; of these, the first by worker id. Equal inputs give equal decisions,
whatever the order of the changes, with and without numpy.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from cluster.policy.routing.cost import (
    MIN_SLOTS,
    RoutingSettings,
    own_wait,
    sequence_cost,
    settings_for,
    standing_parts,
)
from cluster.policy.routing.rendezvous import preference
from cluster.policy.routing.router import Candidate, FullHolder, RouteCall, RoutingDecision, Score, dropped_by
from cluster.policy.routing.rows import Row, cost_of, row_of, switch_of, two_of
from cluster.policy.routing.version_split import Build

if TYPE_CHECKING:
    from cluster.policy.routing.columns import Columns

VECTOR_FROM: Final = 16
"""Number of workers from which numpy is faster than a loop."""
MAX_HOLDERS: Final = 8
"""Largest number of workers that are compared with the chosen worker because they hold at least as much of a prompt.
They are those that hold the most."""

_BY_ID = attrgetter("worker_id")
_counted = attrgetter("slots", "parses_tools", "build", "retired")
"""Function that returns the fields of a worker that the fleet counts and that seldom change."""


class Fleet:
    """The workers of one model. `pick` chooses one of them for a new call."""

    def __init__(self, settings: RoutingSettings | None = None, vector_from: int = VECTOR_FROM) -> None:
        """`vector_from`: smallest number of workers for which decisions use numpy. Without numpy imported, decisions
        never use it."""
        self._model_settings = settings or RoutingSettings()
        self.settings = self._model_settings
        """`_model_settings`, changed for the size of the largest worker by `settings_for`."""
        self._vector_from = vector_from
        self._sizes: Counter[int] = Counter()
        """Number of workers by their slots. Workers of older releases do not report their slots and count as
        MIN_SLOTS."""
        self._largest = MIN_SLOTS
        self._rows: list[Row] = []
        self._is_shared = False
        """Whether a decision has a reference to the list of rows, so that a change needs a new list."""
        self._columns: Columns | None = None
        self._changed: set[str] = set()
        """Workers whose rows have changed since the columns were written."""
        self._shared_slots = 0
        self._parsers = 0
        self._retired = 0
        self._builds: Counter[Build] = Counter()
        """Number of workers by their build."""
        self._needs: tuple[frozenset[str], str, str] | None = None
        """Versions and digests of the last call; None after a change of the builds."""
        self._others: Collection[Build] = ()
        """Builds on which the last call may not run."""
        self.busy: set[str] = set()
        """Workers with resumed prompts that wait for a step. Their pacing changes with each step."""

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Fleet({len(self)} workers, {self.settings.policy})"

    @property
    def candidates(self) -> Sequence[Candidate]:
        """The workers, ordered by worker id."""
        return [row.candidate for row in self._rows]

    def find(self, worker_id: str) -> Candidate | None:
        """Return a worker; None if the worker is unknown."""
        at = self._position(worker_id)
        return None if at is None else self._rows[at].candidate

    def put(self, candidate: Candidate) -> None:
        """Add a worker, or replace its state."""
        at = self._position(candidate.worker_id)
        old = None if at is None else self._rows[at]
        row = row_of(candidate, self.settings, None if old is None else old.hashed)
        self._own_rows()
        if at is None or old is None:
            insort(self._rows, row, key=_BY_ID)
            self._columns = None
            self._count(row, 1)
            self._fit_settings()
        else:
            self._rows[at] = row
            if self._columns is not None:
                self._changed.add(row.worker_id)
            if _counted(candidate) != _counted(old.candidate):
                self._count(old, -1)
                self._count(row, 1)
                self._fit_settings()
            else:
                self._shared_slots += row.shared_slots - old.shared_slots
        if candidate.resumed_prefill:
            self.busy.add(row.worker_id)
        else:
            self.busy.discard(row.worker_id)

    def remove(self, worker_id: str) -> None:
        """Remove a worker. Unknown workers are ignored."""
        at = self._position(worker_id)
        if at is None:
            return
        self._own_rows()
        self._count(self._rows.pop(at), -1)
        self._fit_settings()
        self._columns = None
        self.busy.discard(worker_id)

    def _fit_settings(self) -> None:
        """If the largest worker now has another number of slots, adapt the routing settings to this number, and compute
        the precomputed costs of all workers again."""
        largest = max(self._sizes, default=MIN_SLOTS)
        if largest == self._largest:
            return
        self._largest, self.settings = largest, settings_for(self._model_settings, largest)
        self._rows = [row_of(row.candidate, self.settings, row.hashed) for row in self._rows]
        self._is_shared, self._columns = False, None

    def _own_rows(self) -> None:
        if self._is_shared:
            self._rows, self._is_shared = self._rows.copy(), False

    def _count(self, row: Row, sign: int) -> None:
        self._shared_slots += sign * row.shared_slots
        self._parsers += sign * row.candidate.parses_tools
        self._retired += sign * row.candidate.retired
        self._builds[row.candidate.build] += sign
        if not self._builds[row.candidate.build]:
            del self._builds[row.candidate.build]
        self._needs = None
        slots = row.candidate.slots or MIN_SLOTS
        self._sizes[slots] += sign
        if not self._sizes[slots]:
            del self._sizes[slots]

    def _position(self, worker_id: str) -> int | None:
        at = bisect_left(self._rows, worker_id, key=_BY_ID)
        return at if at < len(self._rows) and self._rows[at].worker_id == worker_id else None

    def pick(self, call: RouteCall, rejecting: Collection[str] = ()) -> RoutingDecision:
        """Pick a worker for a new call. `rejecting`: incarnations whose circuit breakers let no call through.

        If no worker has a parser for tool calls, a call that needs a parser goes to any worker, which refuses the call
        with an error that says why. If the call waited instead, it would hold back all calls behind it.
        """
        if call.needs_tools and not self._parsers:
            call = replace(call, needs_tools=False)
        if call.reserved_slots and self._shared_slots <= call.reserved_slots:
            return RoutingDecision(None, "kept_free", ())
        needs = call.versions, call.bundle_digest, call.weight_digest
        if needs != self._needs:
            self._needs = needs
            self._others = [build for build in self._builds if not build.is_one_of(*needs)]
        others = self._others
        columns = self._written_columns()
        at, passed = self._scan(call, rejecting, others) if columns is None else columns.pick(call, rejecting, others)
        rows, settings, self._is_shared = self._rows, self.settings, True
        scores = partial(_scores, call, rows, settings, rejecting)
        if at < 0:
            may_begin = call.has_begun or self._only_replaced_serve(call, others)
            replaced = self._pick_replaced(call, rejecting, others) if may_begin else None
            return replaced or RoutingDecision(None, None, scores, is_restricted=bool(others))
        worker = rows[at].worker_id
        full = (
            self._full_holders(call, rows[at], rejecting, others) if call.cached and settings.weights.patience else ()
        )
        return RoutingDecision(worker, self._reason(call, at, passed), scores, call.cached.get(worker, 0), full)

    def _only_replaced_serve(self, call: RouteCall, others: Collection[Build]) -> bool:
        """Return whether workers of the call's versions take calls, but only workers that are being replaced may have
        the call's tokenizer or its adapter. `others`: builds on which the call may not run."""
        found = False
        for row in self._rows if self._retired else ():
            c = row.candidate
            if row.is_serving and (not call.versions or c.build.version in call.versions):
                if c.build not in others and (not call.adapter or call.adapter in c.adapters):
                    return False
                found = True
        return found

    def _pick_replaced(
        self, call: RouteCall, rejecting: Collection[str], others: Collection[Build]
    ) -> RoutingDecision | None:
        """Pick one of the workers that are being replaced. Returns None if none of them can serve the call and has
        room. Workers of a quarantined version are left out. `others`: builds on which the call may not run."""
        workers = [
            row.candidate
            for row in self._rows
            if row.candidate.retired
            and not row.candidate.quarantined
            and row.candidate.free_sequences > 0
            and row.max_tokens >= call.tokens
            and _fits(call, row, rejecting, others)
        ]
        if not workers:
            return None
        fleet = Fleet(self._model_settings)
        for worker in workers:
            fleet.put(replace(worker, retired=False))
        decision = fleet.pick(replace(call, has_begun=False), rejecting)
        return decision if decision.worker_id is not None else None

    def _full_holders(
        self, call: RouteCall, chosen: Row, rejecting: Collection[str], others: Collection[Build]
    ) -> Sequence[FullHolder]:
        """Return workers at which the call would cost less than at the chosen worker, but which have no free capacity.
        Only workers that hold at least as much of the prompt as the chosen worker are considered, and at most
        MAX_HOLDERS of them."""
        if self.settings.policy != "cost":
            return ()
        here = call.cached.get(chosen.worker_id, 0)
        fullest_first = takewhile(lambda each: call.cached[each] >= here, reversed(list(call.cached)))
        holders = (each for each in fullest_first if each != chosen.worker_id)
        settings, cost_here = self.settings, cost_of(call, chosen, self.settings)
        if call.affinity:  # the chosen worker may be the preferred one, whose cost is lower by this
            cost_here -= settings.weights.affinity
        limit, out = -1.0, list[FullHolder]()
        for worker_id in islice(holders, MAX_HOLDERS):
            at = self._position(worker_id)
            if at is None:
                continue
            row, there = self._rows[at], self._rows[at].candidate
            has_room = row.is_open and row.max_tokens >= call.tokens
            gain = cost_here - cost_of(call, row, settings)
            if row.is_serving and not has_room and gain > 0 and _fits(call, row, rejecting, others):
                if limit < 0:
                    wait_here = own_wait(settings, chosen.candidate, call.tokens - min(here, call.tokens))
                    limit = max(wait_here, settings.weights.patience)
                uncached = call.tokens - min(call.cached[worker_id], call.tokens)
                wait, per_sequence = own_wait(settings, there, uncached), sequence_cost(settings, there)
                out.append(FullHolder(worker_id, gain, per_sequence, wait, limit, uncached, there.slowdown))
        return out

    def _written_columns(self) -> Columns | None:
        """Return the rows as columns. None if a loop over the rows is faster, or if numpy is not imported yet."""
        if len(self._rows) < self._vector_from or "numpy" not in sys.modules:
            return None
        if self._columns is None:
            from cluster.policy.routing.columns import Columns  # numpy is not imported at a gateway's start

            self._columns = Columns(self._rows, self.settings)
        else:
            for worker_id in self._changed:
                at = self._position(worker_id)
                if at is not None:
                    self._columns.write(at, self._rows[at])
        self._changed.clear()
        return self._columns

    def _scan(self, call: RouteCall, rejecting: Collection[str], others: Collection[Build]) -> tuple[int, int]:
        """Return two numbers: the index in `_rows` of the best worker (-1 if no worker passes the filters), and how
        many workers pass. `rejecting`: incarnations of the workers whose circuit breakers let no call through.
        `others`: builds on which the call may not run."""
        entries = [
            (at, cost_of(call, row, self.settings))
            for at, row in enumerate(self._rows)
            if row.is_open and row.max_tokens >= call.tokens and _fits(call, row, rejecting, others)
        ]
        passed = len(entries)
        if call.affinity and self.settings.policy == "cost" and entries:
            best, bonus = self._preferred(call, [at for at, _ in entries]), self.settings.weights.affinity
            entries = [(at, cost - bonus if at == best else cost) for at, cost in entries]
        if self.settings.policy == "power_of_two" and passed > 2:
            entries = [entries[i] for i in two_of(call.call_id, passed)]
        rows = self._rows

        def order(entry: tuple[int, float]) -> tuple[float, int, float, int]:
            candidate = rows[entry[0]].candidate
            return entry[1], -candidate.free_sequences, candidate.last_sent, entry[0]

        return (min(entries, key=order)[0] if entries else -1), passed

    def _preferred(self, call: RouteCall, places: Iterable[int]) -> int:
        """Return the index in `_rows` of the worker that the call's affinity key prefers. `places`: indexes of the
        workers to compare."""
        return max(places, key=lambda at: (preference(call.affinity, self._rows[at].hashed), -at))

    def _reason(self, call: RouteCall, at: int, passed: int) -> str:
        if passed == 1:
            return "only_choice"
        if self.settings.policy not in ("cost", "least_load"):
            return self.settings.policy
        if self.settings.policy == "cost" and call.cached.get(self._rows[at].worker_id):
            return "cached_prefix"
        return "least_loaded"


def _fits(call: RouteCall, row: Row, rejecting: Collection[str], others: Collection[Build]) -> bool:
    """Return whether a worker passes the filters that depend on the call. The size of the prompt is not checked.
    `rejecting`: incarnations whose circuit breakers let no call through. `others`: builds on which the call may not
    run."""
    c = row.candidate
    return (
        c.build not in others
        and (not call.needs_tools or c.parses_tools)
        and (not call.adapter or call.adapter in c.adapters)
        and (not call.excluded or c.incarnation not in call.excluded)
        and c.incarnation not in rejecting
    )


def _scores(
    call: RouteCall, rows: Sequence[Row], settings: RoutingSettings, rejecting: Collection[str]
) -> tuple[Score, ...]:
    """Return the scores of all workers: first the workers that pass the filters, ordered by cost, then the dropped
    workers, ordered by worker id. `rejecting`: incarnations of workers whose circuit breakers let no call through."""
    passed: list[tuple[float, int, float, str, Score]] = []
    dropped: list[Score] = []
    for row in rows:
        c = replace(row.candidate, healthy=False) if row.candidate.incarnation in rejecting else row.candidate
        if reason := dropped_by(call, c):
            dropped.append(Score(c.worker_id, dropped=reason))
            continue
        cost = cost_of(call, row, settings)
        parts = (*standing_parts(settings, c), *_call_parts(call, row, settings, cost))
        passed.append((cost, -c.free_sequences, c.last_sent, c.worker_id, Score(c.worker_id, cost, parts)))
    if call.affinity and settings.policy == "cost" and passed:
        hashes = {row.worker_id: row.hashed for row in rows}
        best = min(passed, key=lambda entry: (-preference(call.affinity, hashes[entry[3]]), entry[3]))
        bonus, score = settings.weights.affinity, best[4]
        liked = Score(score.worker_id, best[0] - bonus, (*score.parts, ("affinity", -bonus)))
        passed[passed.index(best)] = (best[0] - bonus, *best[1:4], liked)
    passed.sort(key=lambda entry: entry[:4])
    return (*(entry[4] for entry in passed), *dropped)


def _call_parts(call: RouteCall, row: Row, settings: RoutingSettings, cost: float) -> tuple[tuple[str, float], ...]:
    match settings.policy:
        case "cost":
            switch = switch_of(call, row, settings)
            uncached = ("uncached_tokens", cost - row.standing - switch)
            return (uncached, ("adapter_switch", switch)) if call.adapter else (uncached,)
        case "consistent_hash":
            return (("hash", cost),)
        case _:
            return ()


def choose(
    call: RouteCall, candidates: Iterable[Candidate], settings: RoutingSettings | None = None
) -> RoutingDecision:
    """Pick one of the candidates for a new call, in the same way as Fleet.pick. Candidates of other models are
    ignored."""
    fleet = Fleet(settings)
    for candidate in candidates:
        if candidate.model == call.model:
            fleet.put(candidate)
    return fleet.pick(call)
