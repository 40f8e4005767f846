"""The routes (decisions to send a sequence to a worker) of one gateway's calls: a history of the newest routes, and the
metrics of predicted cached tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.api.outcomes import Outcome
from cluster.api.types import KV_EVENTS, PREFIX_EXACT
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.observe.metrics import Metrics
from cluster.policy.routing.route_history import Route, RoutedCall, RouteHistory
from cluster.policy.routing.router import RoutingDecision
from cluster.policy.scheduling.instructions import Send

EXACT, APPROXIMATE = "exact", "approximate"
"""Kinds of predictions of cached tokens, as in the metrics and explanations."""


class Routes:
    """The creation, the history and the metrics of the routes of one gateway process. A route is a decision to send a
    sequence to a worker. The methods `sent` and `began` run for each sequence and take a few microseconds."""

    def __init__(self, metrics: Metrics, workers: Callable[[str], int], clock: Callable[[], float]) -> None:
        """`workers` returns the number of a model's linked workers."""
        self.history = RouteHistory()
        self.on_resent: Callable[[str], None] = _ignore
        """Function that is called with the name of a lost link when a sequence that ran on it was sent to another
        worker."""
        self._metrics = metrics
        self._workers = workers
        self._clock = clock

    @staticmethod
    def create(instruction: Send, sequence: CallSequence, link: WorkerLink, now: float) -> Route:
        """Return the route of a sequence that is sent by this instruction."""
        life = sequence.life
        again = life.reason or ("lost" if life.loss.links else "error" if life.failures else "")
        route = _route(sequence, link, instruction.reason, instruction.decision, instruction.cached, again, now)
        if (wait := instruction.holder_wait) is not None:
            route.awaited, route.wait_s = wait.worker_id, wait.wait_s
        return route

    @staticmethod
    def create_hedge(
        decision: RoutingDecision,
        cached: Mapping[str, int] | None,
        sequence: CallSequence,
        link: WorkerLink,
        now: float,
    ) -> Route:
        """Return the route by which a sequence whose first token is late is also sent to a second worker. `cached`:
        number of leading tokens of the prompt that each worker holds in its KV cache, by worker id; None if it was not
        looked up."""
        return _route(sequence, link, decision.reason, decision, cached, "late", now)

    def sent(self, call: Call, route: Route) -> None:
        """Add a route to the history after its sequence was sent."""
        known = self.history.call(call.id)
        if known is None:
            known = RoutedCall(call.id, call.shown_id, call.request_id, call.tenant, call.shown_model, call.arrived)
        elif not route.again and any(earlier.sequence == route.sequence for earlier in known.routes):
            route.again = "retry"
        self.history.add(known, route, self._workers(call.model))
        if route.again == "lost" and (links := call.sequences[route.sequence].life.loss.links):
            self.on_resent(links[-1])

    def began(self, sequence: CallSequence, cached_tokens: int) -> None:
        """Add to the metrics, at the first output of a sequence, how many cached tokens were predicted and how wrong
        the prediction was. `cached_tokens`: number of tokens that the engine found in its KV cache."""
        route = sequence.route
        predicted = None if route is None else route.predicted_cached_tokens
        if route is None or predicted is None:
            return
        model, state = sequence.call.model, EXACT if route.is_exact else APPROXIMATE
        self._metrics.count("prefix_predicted_tokens_total", model, state, by=predicted)
        self._metrics.count("prefix_mispredicted_tokens_total", model, state, by=abs(predicted - cached_tokens))

    def ended(self, call: Call, outcome: Outcome) -> None:
        """Add a call's outcome to the history."""
        self.history.end(call.id, outcome.value, self._clock())


def _ignore(link: str) -> None:
    """Do nothing."""


def _route(
    sequence: CallSequence,
    link: WorkerLink,
    reason: str,
    decision: RoutingDecision | None,
    cached: Mapping[str, int] | None,
    again: str,
    now: float,
) -> Route:
    """Return a route to a worker. Cached tokens are predicted only for a worker that reports its KV blocks. `again`:
    why the sequence is sent to another worker; "" for the first worker of the sequence."""
    capabilities = link.info.capabilities
    return Route(
        sequence.index,
        now,
        link.identity.worker_id,
        reason,
        sequence.tokens,
        decision,
        cached if KV_EVENTS in capabilities else None,
        PREFIX_EXACT in capabilities,
        again,
        link.identity.pod,
        link.identity.host or link.identity.node,
    )
