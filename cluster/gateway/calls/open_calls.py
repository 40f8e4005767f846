"""The open calls of one gateway. An operator can abort calls here. The calls of suspended tenants are ended here, and
all calls are ended here when the gateway stops.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.calls.call import Call


class OpenCalls:
    """The open calls of one gateway, keyed by call id."""

    def __init__(self, tenant_error: Callable[[str], CallError | None], clock: Callable[[], float]) -> None:
        """`tenant_error(tenant)` returns the error with which all calls of the tenant must end; None if the calls may
        continue."""
        self._tenant_error = tenant_error
        self._clock = clock
        self._calls: dict[str, Call] = {}
        self._closing = ""
        self.on_close: set[Callable[[], None]] = set()
        """Functions that are called when the gateway begins to refuse new calls."""

    def __iter__(self) -> Iterator[Call]:
        return iter(list(self._calls.values()))  # a copy: calls end during the iteration

    @property
    def busy(self) -> bool:
        """Whether at least one call is open."""
        return bool(self._calls)

    def add(self, call: Call) -> None:
        """Add a call that begins."""
        self._calls[call.id] = call

    def remove(self, call: Call) -> None:
        """Remove a call that has ended, and drop its sequences' references to the call. Idempotent."""
        self._calls.pop(call.id, None)
        for sequence in call.sequences:
            sequence.unlink_call()

    def statistics(self) -> dict[str, int]:
        """Return the number of open calls of each model. The mapping is empty when the gateway is idle."""
        return dict(Counter(call.model for call in self))

    def abort(self, request_id: str, tenant: str = "") -> list[str]:
        """End the calls with this request id or call id. If `tenant` is not empty, only calls of that tenant are ended.
        Returns the tenant of each ended call."""
        calls = [call for call in self if request_id in (call.request_id, call.id) and tenant in ("", call.tenant)]
        for call in calls:
            call.fail(CallError(Outcome.CANCELLED, "cancelled by the cluster's operators"))
        return [call.tenant for call in calls]

    def end_suspended(self) -> None:
        """End all calls of tenants that may no longer make calls."""
        errors = {tenant: self._tenant_error(tenant) for tenant in {call.tenant for call in self}}
        for call in self:
            if (error := errors[call.tenant]) is not None:
                call.fail(error)

    # ---- the end of the gateway

    @property
    def closing(self) -> bool:
        """Whether new calls are refused."""
        return bool(self._closing)

    def close(self, why: str) -> None:
        """Refuse new calls from now on, and call the functions in `on_close`. `why`: what the gateway is doing, such as
        "stopping"."""
        self._closing = why
        for notify in list(self.on_close):
            notify()

    def check_not_closing(self) -> None:
        """Raise CallError if new calls are refused."""
        if self._closing:
            raise CallError(Outcome.NO_WORKER, f"this gateway is {self._closing}; call another", retry_after_s=0.1)

    async def hand_over(self, by: float) -> None:
        """End the resumable streams one after the other until the time `by`, so that the clients resume them at other
        gateways. The streams with the most tokens left end first. The ends are spread evenly over time, so that each
        stream finds capacity and a short prefill queue."""
        streams = [call for call in self if call.resume_tokens is not None and call.first_token_at is not None]
        streams.sort(key=_tokens_left)
        while streams and (left_s := by - self._clock()) > 0:
            call = streams.pop()
            if call.id in self._calls:
                self._end_for_resume(call, retry_after_s=0.0)
                await asyncio.sleep(left_s / (len(streams) + 1))

    def end_all(self) -> None:
        """End all calls. Clients can continue resumable calls at another gateway."""
        for call in self:
            self._end_for_resume(call, retry_after_s=0.1)

    def _end_for_resume(self, call: Call, retry_after_s: float) -> None:
        message = f"this gateway is {self._closing}; resume or repeat the call at another"
        call.fail(CallError(Outcome.NO_WORKER, message, retry_after_s=retry_after_s))


def _tokens_left(call: Call) -> int:
    return max(sequence.request.sampling.max_tokens - len(sequence.emitted) for sequence in call.sequences)
