"""Explanations of routing decisions: to which workers the sequences of a call were sent, why, and with what result.

A caller that may access only one tenant sees the calls of that tenant. The answers to such a caller contain neither the
gateway nor the names and scores of workers. The sentences that explain a decision are made from the remaining fields
only, so they cannot name a worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from cluster.admin.v1 import routing_pb2 as pb
from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.admin.authorization import AdminCaller
from cluster.gateway.scheduling.routes import APPROXIMATE, EXACT
from cluster.policy.routing.route_history import MAX_BYTES, Route, RoutedCall, RouteHistory

if TYPE_CHECKING:
    from cluster.gateway.apis.admin.siblings import Siblings

_AGAIN = {
    "lost": "The worker before was lost.",
    "error": "The engine before could not continue.",
    "moved": "The worker before was draining.",
    "gateway": "Another gateway had begun the call.",
    "retry": "The worker before had sent no output.",
    "late": "The first output was late, so the call was sent to a second worker; the first to answer kept it.",
}


class RememberedRoutes:
    """Source of the routes that this gateway process remembers, as messages of the admin API."""

    def __init__(
        self,
        history: RouteHistory,
        gateway: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`gateway`: name of this gateway. `clock`: the clock that `history` uses for its times. `wall`: returns
        seconds since the epoch."""
        self._history = history
        self._gateway = gateway
        self._clock = clock
        self._wall = wall

    def find(self, request: pb.ExplainRequestRequest) -> pb.ExplainRequestResponse:
        """Return the calls with the requested request id that this process remembers. `request.parent`: the tenant of
        the calls, "" for the calls of all tenants."""
        found = self._history.find(request.request_id, request.parent)
        return pb.ExplainRequestResponse(calls=map(self._call, found))

    def span_s(self) -> float:
        """Return the seconds since the arrival of the oldest remembered call; 0 if there is none."""
        return self._history.span_s(self._clock())

    def _call(self, call: RoutedCall) -> pb.ExplainedCall:
        now = self._clock()
        ended_at = now if call.ended_at is None else call.ended_at
        return pb.ExplainedCall(
            id=call.shown_id,
            request_id=call.request_id,
            tenant=call.tenant,
            model=call.model,
            gateway=self._gateway,
            arrived_at_s=self._wall() - (now - call.arrived_at),
            outcome=call.outcome,
            duration_s=ended_at - call.arrived_at,
            routes=[_route(route, call.arrived_at) for route in call.routes],
            omitted_routes=call.omitted_routes,
        )


class RouteExplainer:
    """Answers ExplainRequest calls of the admin API: where the calls of one request were sent, and why. The data comes
    from this gateway process and from its sibling processes."""

    def __init__(self, remembered: RememberedRoutes, siblings: Siblings | None = None) -> None:
        """`siblings`: the other processes of this gateway, if any."""
        self._remembered = remembered
        self._siblings = siblings

    async def explain(self, request: pb.ExplainRequestRequest, caller: AdminCaller) -> pb.ExplainRequestResponse:
        """Explain the calls with the requested request id, as far as the caller may see them. Raises CallError
        NOT_FOUND if there is no such call."""
        if not request.request_id:
            raise invalid("request_id", "must name a call by its x-request-id or by the id of its answer")
        tenant = caller.scope
        if request.parent:
            from cluster.gateway.apis.admin.codec import tenant_name

            tenant = tenant_name(request.parent, "parent")
        wanted = pb.ExplainRequestRequest(request_id=request.request_id, parent=tenant)
        calls, unanswered = list(self._remembered.find(wanted).calls), 0
        if self._siblings is not None:
            answers, unanswered = await self._siblings.ask("ExplainRequest", wanted)
            calls += [call for answer in answers for call in answer.calls]
        if not calls:
            raise self._unknown(request.request_id, unanswered, caller)
        calls.sort(key=lambda call: call.arrived_at_s)
        for call in calls:
            if caller.scope:
                _hide_places(call)
            for route in call.routes:
                route.why = why(route)
        return pb.ExplainRequestResponse(calls=calls)

    def _unknown(self, request_id: str, unanswered: int, caller: AdminCaller) -> CallError:
        silent = f" ({unanswered} of its processes did not answer)" if unanswered else ""
        # The span of the memory would show the other tenants' traffic.
        span = "" if caller.scope else f", now those of the last {self._remembered.span_s():.0f} s"
        return CallError(
            Outcome.NOT_FOUND,
            f"this gateway remembers no call with request id {request_id[:128]!r}{silent}; it keeps the newest calls "
            f"that were sent to a worker, up to {MAX_BYTES >> 20} MiB a process{span}; try the other gateways, if any: "
            "the call's usage record names its gateway and worker",
        )


def _route(route: Route, arrived_at: float) -> pb.ExplainedRoute:
    predicted, candidates, cached = route.predicted_cached_tokens, route.candidates, route.cached
    message = pb.ExplainedRoute(
        sequence=route.sequence,
        after_s=route.sent_at - arrived_at,
        worker=route.worker_id,
        pod=route.pod,
        node=route.node,
        reason=route.reason,
        again=route.again,
        tokens=route.tokens,
        prediction="" if predicted is None else EXACT if route.is_exact else APPROXIMATE,
        predicted_cached_tokens=predicted,
        cached_tokens=route.cached_tokens,
        first_output_s=None if route.first_output_at is None else route.first_output_at - route.sent_at,
        compared=candidates.total,
        dropped=candidates.dropped,
        awaited=route.awaited,
        wait_s=route.wait_s if route.awaited else None,
    )
    for score in candidates.best:
        message.candidates.add(
            worker=score.worker_id,
            total=score.total,
            parts=[pb.RouteScore(name=name, value=value) for name, value in score.parts],
            dropped=score.dropped,
            cached_tokens=None if cached is None else cached.get(score.worker_id, 0),
        )
    return message


def _hide_places(call: pb.ExplainedCall) -> None:
    """Remove what a caller of one tenant may not see: the gateway, the workers and their load."""
    call.gateway = ""
    for route in call.routes:
        route.worker = route.pod = route.node = route.awaited = ""
        del route.candidates[:]


def why(route: pb.ExplainedRoute) -> str:
    """Return the explanation of a routing decision in sentences, made from the fields that the caller may see."""
    worker = route.worker or "The worker"
    among = f"of the workers that could take the call ({route.compared} compared)"
    others = [each for each in route.candidates if each.worker != route.worker]
    match route.reason:
        case "only_choice":
            reason = f"{worker} was the only worker that could take the call."
        case "cached_prefix":
            reason = f"{worker} {_holds(route)}, and was the best {among}."
        case "least_loaded":
            reason = f"{worker} had the least load {among}."
        case _:
            reason = f"{worker} was chosen by the rule {route.reason.replace('_', ' ')}."
    sentences = [_AGAIN.get(route.again, ""), _waited(route), reason, *_more_cached(route, others), _dropped(route)]
    return " ".join(sentence for sentence in sentences if sentence)


def _waited(route: pb.ExplainedRoute) -> str:
    """Return a sentence on the wait for the worker that held the prompt; "" if the call did not wait. The worker is
    named only to callers that may see all tenants."""
    if not route.HasField("wait_s"):
        return ""
    where = f"{route.awaited}, which held its prompt but had no room" if route.awaited else "a worker with its prompt"
    in_vain = ", in vain" if route.awaited != route.worker else ""
    return f"The call waited {route.wait_s:.2f} s for {where}{in_vain}."


def _holds(route: pb.ExplainedRoute) -> str:
    about = "about " if route.prediction == APPROXIMATE else ""
    return f"held {about}{route.predicted_cached_tokens} of the {route.tokens} prompt tokens in its KV cache"


def _more_cached(route: pb.ExplainedRoute, others: Iterable[pb.RouteCandidate]) -> Sequence[str]:
    """Return a sentence about the worker among `others` that held the largest part of the prompt. Returns no sentence
    if that worker held no more of the prompt than the chosen worker."""
    most = max(others, key=lambda each: each.cached_tokens, default=None)
    if most is None or most.cached_tokens <= route.predicted_cached_tokens:
        return ()
    cause = f"was dropped ({most.dropped})" if most.dropped else "was busier"
    return (f"{most.worker} held {most.cached_tokens}, but {cause}.",)


def _dropped(route: pb.ExplainedRoute) -> str:
    counts = ", ".join(f"{count} {filter_}" for filter_, count in sorted(route.dropped.items()))
    return f"Dropped: {counts}." if counts else ""
