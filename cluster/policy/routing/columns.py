"""The rows of a fleet as columns in numpy arrays, so that a decision over a thousand workers takes a few vector
operations. A row has the values of one worker (rows.py).

The decisions are the same as those of Fleet.pick without numpy, since each cost is computed by the same operations in
the same order. Rows are ordered by worker id. So of several equal workers, the first one by id is chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.policy.routing.cost import RoutingSettings
from cluster.policy.routing.rendezvous import FRACTION_BITS, MULTIPLIERS, SHIFTS
from cluster.policy.routing.router import RouteCall
from cluster.policy.routing.rows import Row, two_of
from cluster.policy.routing.version_split import Build

Floats = npt.NDArray[np.float64]
_STANDING, _PER_TOKEN, _MAX_TOKENS, _FREE, _LAST_SENT, _BUILD, _PARSES, _FIELDS = range(8)
MAX_ADAPTERS: Final = 256
"""Largest number of adapters for which `Columns` remembers which workers have the adapter."""
_SHIFTS: Final = [np.uint64(shift) for shift in SHIFTS]
_MULTIPLIERS: Final = [np.uint64(multiplier) for multiplier in MULTIPLIERS]
_TO_FRACTION: Final = np.uint64(64 - FRACTION_BITS)
_UNIT: Final = float(1 << FRACTION_BITS)


class Columns:
    """The routing values of a fleet's workers, with one array for each value. The arrays are made from `rows`, one row
    for each worker. A row index is an index into `rows`."""

    def __init__(self, rows: Sequence[Row], settings: RoutingSettings) -> None:
        self._settings = settings
        self._positions = {row.worker_id: at for at, row in enumerate(rows)}
        self._incarnations = [row.candidate.incarnation for row in rows]
        self._by_incarnation = {incarnation: at for at, incarnation in enumerate(self._incarnations)}
        self._builds: dict[Build, int] = {}
        self._adapters = [row.candidate.adapters for row in rows]
        self._resident = [row.candidate.resident for row in rows]
        self._slowdowns = [row.candidate.slowdown for row in rows]
        self._with_adapter: dict[str, tuple[npt.NDArray[np.bool_], Floats]] = {}
        """For each adapter: which workers have it, and how much it adds to the cost of each worker. Cleared when the
        adapters or the slowdown of any worker change."""
        self._hashes = np.array([row.hashed for row in rows], np.uint64)
        self._fields = np.array([self._values(row) for row in rows], np.float64).reshape(-1, _FIELDS).T.copy()

    def write(self, at: int, row: Row) -> None:
        """Replace the row at the row index `at` with a changed row of the same worker."""
        self._fields[:, at] = self._values(row)
        c = row.candidate
        adapters = (c.adapters, c.resident, c.slowdown)
        if adapters != (self._adapters[at], self._resident[at], self._slowdowns[at]):
            self._adapters[at], self._resident[at], self._slowdowns[at] = adapters
            self._with_adapter.clear()
        if (incarnation := row.candidate.incarnation) != self._incarnations[at]:
            self._by_incarnation.pop(self._incarnations[at], None)
            self._incarnations[at], self._by_incarnation[incarnation] = incarnation, at

    def _values(self, row: Row) -> tuple[float, ...]:
        c = row.candidate
        build = self._builds.setdefault(c.build, len(self._builds))
        max_tokens = row.max_tokens if row.is_open else -1
        return row.standing, row.per_token, max_tokens, c.free_sequences, c.last_sent, build, c.parses_tools

    def pick(self, call: RouteCall, rejecting: Collection[str], other_builds: Collection[Build]) -> tuple[int, int]:
        """Return the row index of the best worker (-1 if no worker passes the filters), and the number of workers that
        pass. `rejecting`: incarnations of the workers whose circuit breakers allow no call now. `other_builds`: builds
        on which the call may not run."""
        passes = self._passing(call, rejecting, other_builds)
        places = passes.nonzero()[0]
        passed = len(places)
        if not passed:
            return -1, 0
        settings = self._settings
        costs = self._costs(call)
        if call.affinity and settings.policy == "cost":
            costs[places[self._preferences(call.affinity)[places].argmax()]] -= settings.weights.affinity
        if settings.policy == "power_of_two" and passed > 2:
            places = places[sorted(two_of(call.call_id, passed))]
        if passed < len(costs):
            costs = costs[places]
            best = places[costs == costs.min()]
        else:
            best = (costs == costs.min()).nonzero()[0]
        return self._first(best), passed

    def _passing(
        self, call: RouteCall, rejecting: Collection[str], other_builds: Collection[Build]
    ) -> npt.NDArray[np.bool_]:
        fields = self._fields
        passes: npt.NDArray[np.bool_] = fields[_MAX_TOKENS] >= call.tokens
        if other_builds:
            allowed = np.array([build not in other_builds for build in self._builds])
            passes &= allowed[fields[_BUILD].astype(np.intp)]
        if call.needs_tools:
            passes &= fields[_PARSES] > 0
        if call.adapter:
            passes &= self._of_adapter(call.adapter)[0]
        for incarnation in (*call.excluded, *rejecting):
            if (at := self._by_incarnation.get(incarnation)) is not None:
                passes[at] = False
        return passes

    def _costs(self, call: RouteCall) -> Floats:
        """Return the cost of each worker for a call. A worker that the call's affinity key prefers gets no discount
        here."""
        costs: Floats
        if self._settings.policy == "consistent_hash":
            costs = -self._preferences(call.affinity or call.prefix)
            return costs
        if not call.cached or self._settings.policy != "cost":
            costs = self._fields[_PER_TOKEN] * float(call.tokens)
        else:
            uncached = np.full(len(self._positions), float(call.tokens))
            places, cached = self._cached(call.cached)
            uncached[places] -= np.minimum(cached, call.tokens)
            if call.sharing:
                own = call.tokens - min(max(call.cached.values()), call.tokens)
                uncached = own + (uncached - own) / (1.0 + call.sharing)
            costs = self._fields[_PER_TOKEN] * uncached
        costs += self._fields[_STANDING]
        if call.adapter and self._settings.policy == "cost":
            costs += self._of_adapter(call.adapter)[1]
        return costs

    def _of_adapter(self, adapter: str) -> tuple[npt.NDArray[np.bool_], Floats]:
        """Return two columns for an adapter: whether each worker has it, and the cost of copying it into a slot of the
        worker's engine."""
        known = self._with_adapter.get(adapter)
        if known is None:
            if len(self._with_adapter) >= MAX_ADAPTERS:
                self._with_adapter.clear()
            weight = self._settings.weights.adapter
            known = self._with_adapter[adapter] = (
                np.array([adapter in adapters for adapters in self._adapters], np.bool_),
                np.array(
                    [
                        0.0 if adapter in resident else weight * slowdown
                        for resident, slowdown in zip(self._resident, self._slowdowns, strict=True)
                    ],
                    np.float64,
                ),
            )
        return known

    def _cached(self, cached: Mapping[str, int]) -> tuple[npt.NDArray[np.intp], Floats]:
        """Return the row indexes of the workers that hold a part of a prompt, and how many tokens each of them
        holds."""
        try:
            places = np.fromiter(map(self._positions.__getitem__, cached), np.intp, len(cached))
        except KeyError:  # a worker that has just left
            return self._cached({worker: tokens for worker, tokens in cached.items() if worker in self._positions})
        return places, np.fromiter(cached.values(), np.float64, len(cached))

    def _preferences(self, key: int) -> Floats:
        """Return a number in [0, 1) for each worker. Rendezvous hashing (rendezvous.py) prefers the worker with the
        highest number. `key`: hash of an affinity key."""
        mixed = self._hashes ^ np.uint64(key)
        mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _MULTIPLIERS[0]
        mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _MULTIPLIERS[1]
        mixed = mixed ^ (mixed >> _SHIFTS[2])
        preferences: Floats = (mixed >> _TO_FRACTION).astype(np.float64) / _UNIT
        return preferences

    def _first(self, best: npt.NDArray[np.intp]) -> int:
        """Return the row index of the worker to choose among workers with equal costs. `best`: row indexes of these
        workers."""
        if len(best) > 1:
            free = self._fields[_FREE][best]
            best = best[free == free.max()]
        if len(best) > 1:
            return int(best[self._fields[_LAST_SENT][best].argmin()])
        return int(best[0])
