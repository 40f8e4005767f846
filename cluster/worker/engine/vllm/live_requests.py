"""The live requests of a vLLM engine, and the ids of ended requests.

A new request is refused as a duplicate if it has the id of a live request or one of the ids of ended requests.
"""

from __future__ import annotations

import time

from cluster.worker.engine.vllm.paths import LiveRequest, StepStats

REMEMBERED_IDS = 65_536
"""Number of ended request ids that are still refused as duplicates. The ids of live requests are always refused."""


class LiveRequests(dict[str, LiveRequest]):
    """The live requests of one engine, by request id. Only `add` and `remove` change the requests; both update `stats`.

    The class is a dict because the engine path looks up the request of every output in it.
    """

    def __init__(self, stats: StepStats) -> None:
        super().__init__()
        self.awaiting_grammar = 0
        """Number of requests with a grammar and without an output: their grammar may still be compiled."""
        self._stats = stats
        self._prefilling: set[str] = set()
        """Ids of the requests without an output."""
        self._ended: dict[str, None] = {}

    def was_used(self, request_id: str) -> bool:
        """Return whether a live or an ended request has this id."""
        return request_id in self or request_id in self._ended

    def add(self, request_id: str, request: LiveRequest) -> None:
        """Add a new request."""
        self._stats.record_submit(request.prompt_tokens + request.emitted_tokens, time.monotonic())
        self[request_id] = request
        self._prefilling.add(request_id)
        self.awaiting_grammar += request.grammar

    def finish_prefill(self, request_id: str) -> int:
        """Record a live request's first output; return the sum of its prompt tokens and its emitted tokens."""
        request = self[request_id]
        tokens = request.prompt_tokens + request.emitted_tokens
        if request_id in self._prefilling:
            self._prefilling.remove(request_id)
            self.awaiting_grammar -= request.grammar
            self._stats.record_first_output(tokens)
        return tokens

    def remove(self, request_id: str, *, remember: bool = True) -> LiveRequest | None:
        """Remove and return a request that has ended; None if the request is not live.

        `remember`: whether to refuse a new request with this id from now on.
        """
        if request_id not in self:
            return None
        self.finish_prefill(request_id)
        request = self.pop(request_id)
        self._stats.record_end()
        if remember:
            self._ended[request_id] = None
            if len(self._ended) > REMEMBERED_IDS:
                del self._ended[next(iter(self._ended))]
        return request
