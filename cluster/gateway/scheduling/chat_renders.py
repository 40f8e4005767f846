"""The chats that workers render for this gateway. Each chat waits for a worker, which returns the token ids of the
prompt.

Some models have no chat template; their prompts are made by vLLM's own code, which only workers have. A call for such a
model waits here before its admission, because its limits and its place in the queue depend on its number of tokens.
Chats wait in a waiting room, in the order of a fair queue, each with an estimated number of tokens. A chat whose model
has no worker counts as demand for the controller, as other waiting calls do.
"""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.gateway.demand import DemandTally
from cluster.gateway.links.link_renders import RenderedPrompt, RendererLost
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling import queue_errors
from cluster.policy.fairness.fair_queue import FairOrder, FairOrders
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.waiting_room import Order, WaitingRoom
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.rendering import MAX_CHAT_BYTES

BYTES_A_TOKEN = 4
"""Bytes of JSON that are counted as one token of a chat that is not rendered yet."""
RENDER_S = 60.0
"""Time limit in seconds for a worker to render a chat. The limit includes the time for the chats that the worker
renders earlier."""
GRACE_S = 5.0
"""Seconds that the gateway waits for a worker's answer beyond the worker's time limit."""
MAX_ATTEMPTS = 3
"""A call fails when this number of workers were lost, one after another, while they rendered its chat."""
ANY_TOKENS = 1 << 24
"""Bound on a prompt's tokens while the model's context is not known."""


def small_room(order_of: Callable[[str], Order]) -> WaitingRoom:
    """Return a waiting room with default limits, for a gateway without settings."""
    return WaitingRoom(max_requests=1000, max_tokens=4_000_000, max_wait_s=120.0, order_of=order_of)


@dataclass(frozen=True, slots=True)
class ChatToRender:
    """A chat that must be rendered by a worker of `model` that has the tokenizer bundle `bundle_digest`. `chat`: a JSON
    object, see text/chat/chat_json.py."""

    model: KnownModel
    bundle_digest: str
    policy: TenantPolicy
    rank: int
    chat: bytes
    max_tokens: int = 0
    """Maximum length of the prompt in tokens; 0 for the length of the model's context. The worker sends no ids of a
    longer prompt, only its length."""
    deadline: float | None = None


@dataclass(slots=True, eq=False)
class _Wait:
    """A chat that waits until it is rendered. `entry`: its entry in the waiting room."""

    ask: ChatToRender
    entry: WaitingSequence
    done: asyncio.Future[RenderedPrompt]
    attempts: int = 0
    timer: asyncio.TimerHandle | None = None

    def fail(self, error: CallError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class ChatRenders:
    """The chats of one gateway that wait to be rendered, for all models."""

    def __init__(
        self,
        room_of: Callable[[Callable[[str], Order]], WaitingRoom],
        weight_of: Callable[[str], float],
        tally: DemandTally,
        find: Callable[[str], KnownModel | None],
        clock: Callable[[], float],
        note_unserved: Callable[[KnownModel], None] = lambda model: None,
    ) -> None:
        """Create the queue of chats that wait to be rendered.

        `room_of(order_of)`: returns the waiting room of this queue; `order_of(model)` returns the fair order of a
        model's chats. `weight_of`: returns a tenant's weight. `tally`: counts the waiting chats as demand. `find`:
        returns a model by name. `note_unserved`: reports the demand for a model that has no worker.
        """
        self._orders = FairOrders(lambda: FairOrder(weight_of=weight_of))
        self._room = room_of(self._orders.order)
        self._tally = tally
        self._find = find
        self._clock = clock
        self._note_unserved = note_unserved
        self._waits: dict[str, _Wait] = {}
        self._numbers = itertools.count(1)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's chats that were not sent to a worker yet, and an estimate of their tokens."""
        return self._room.waiting(model)

    async def render(self, ask: ChatToRender) -> RenderedPrompt:
        """Wait until a worker has rendered a chat, and return the prompt. Raises CallError if no worker can render the
        chat, if the waiting room refuses the chat, or if the time runs out."""
        model, policy = ask.model, ask.policy
        if len(ask.chat) > MAX_CHAT_BYTES:
            raise invalid("messages", f"at most {MAX_CHAT_BYTES} bytes of JSON, got {len(ask.chat)}: send less")
        if (not_servable := queue_errors.not_servable(model)) is not None:
            raise not_servable
        if (no_renderer := _no_renderer(model, ask.bundle_digest)) is not None:
            raise no_renderer
        now = self._clock()
        entry = WaitingSequence(
            call_id=f"render-{next(self._numbers)}",
            model=model.name,
            tenant=policy.flow,
            tokens=len(ask.chat) // BYTES_A_TOKEN + 1,
            deadline=ask.deadline,
            priority_class=policy.priority_class,
            arrived=now,
            rank=ask.rank,
        )
        admitted = self._room.admit(entry, now)
        for shed in admitted.shed:
            self._waits[shed.call_id].fail(queue_errors.shed())
        if admitted.outcome is not None:
            raise queue_errors.refused(admitted.outcome)
        wait = _Wait(ask, entry, asyncio.get_running_loop().create_future())
        self._waits[entry.call_id] = wait
        self._tally.enqueue(entry)
        try:
            self.pump(model.name)
            self._note_unserved(model)
            async with asyncio.timeout(None if ask.deadline is None else max(ask.deadline - self._clock(), 0.0)):
                return await wait.done
        except TimeoutError:
            raise queue_errors.too_late(model.name, model, True) from None
        finally:
            self._forget(wait)

    def _forget(self, wait: _Wait) -> None:
        name, key = wait.entry.model, wait.entry.call_id
        wait.stop_timer()
        self._tally.dequeue(key)
        self._room.cancel(key)
        self._orders.order(name).ended(key)
        del self._waits[key]

    # ---- sending

    def pump(self, name: str) -> None:
        """Send waiting chats of a model while a worker can take another chat."""
        model = self._find(name)
        while model is not None and (head := self._room.head(name)) is not None:
            wait = self._waits[head.call_id]
            if model.links and (error := _no_renderer(model, wait.ask.bundle_digest)) is not None:
                self._room.cancel(head.call_id)
                wait.fail(error)
                continue
            link = _free_link(model, wait.ask.bundle_digest)
            if link is None:
                return
            self._room.pop_next(name, lambda _: True, self._clock())
            self._send(wait, link, model)

    def _send(self, wait: _Wait, link: WorkerLink, model: KnownModel) -> None:
        ask, timeout_s = wait.ask, RENDER_S
        if ask.deadline is not None:
            timeout_s = min(timeout_s, max(ask.deadline - self._clock(), 0.0))
        most = ask.max_tokens or model.capabilities.max_model_len or ANY_TOKENS
        answer = link.renders.start(ask.chat, most, timeout_s)
        no_answer = CallError(Outcome.SHED, "the worker did not render the chat in time; retry after the given delay")
        wait.timer = asyncio.get_running_loop().call_later(timeout_s + GRACE_S, wait.fail, no_answer)
        answer.add_done_callback(lambda answered: self._answered(wait, answered))

    def _answered(self, wait: _Wait, answer: asyncio.Future[RenderedPrompt]) -> None:
        wait.stop_timer()
        error = answer.exception()
        if wait.done.done():  # the call no longer waits for the prompt
            return
        if error is None:
            wait.done.set_result(answer.result())
        elif not isinstance(error, RendererLost):
            wait.done.set_exception(error)
        else:
            self._retry(wait)

    def _retry(self, wait: _Wait) -> None:
        """Requeue a chat whose worker was lost, ahead of all chats that were never sent. After MAX_ATTEMPTS lost
        workers, fail the chat."""
        wait.attempts += 1
        if wait.attempts >= MAX_ATTEMPTS:
            wait.fail(CallError(Outcome.WORKER_LOST, f"{wait.attempts} workers were lost with this chat; retry later"))
            return
        self._room.put_back(wait.entry, self._clock())
        self.pump(wait.entry.model)

    # ---- ends

    def expire(self) -> None:
        """End chats that have waited too long. Called a few times a second."""
        now = self._clock()
        for entry in self._room.pop_expired(now):
            late = entry.deadline is not None and now >= entry.deadline
            self._waits[entry.call_id].fail(queue_errors.too_late(entry.model, self._find(entry.model), late))

    def sweep(self, models: Iterable[str], now: float) -> None:
        """Forget the fairness accounts of idle tenants and of models that no longer exist. Called once a second."""
        self._orders.sweep(now)
        self._orders.retain_models(models)

    def end_unservable(self) -> None:
        """End the chats for models that will not be served."""
        for wait in list(self._waits.values()):
            model = self._find(wait.entry.model)
            if model is not None and (error := queue_errors.not_servable(model)) is not None:
                wait.fail(error)

    def end_suspended(self, tenant_error: Callable[[str], CallError | None]) -> None:
        """End the chats of tenants that may no longer make calls. `tenant_error(tenant)`: returns the error for such a
        tenant, else None."""
        for wait in list(self._waits.values()):
            if (error := tenant_error(wait.ask.policy.name)) is not None:
                wait.fail(error)

    def close(self) -> None:
        """End the chats that were not sent to a worker yet, because this gateway is stopping."""
        for wait in list(self._waits.values()):
            if wait.timer is None:
                wait.fail(CallError(Outcome.NO_WORKER, "this gateway is stopping; call another", retry_after_s=0.1))


def needs_worker(model: KnownModel, bundle_digest: str, renderer: str, *, has_template: bool) -> bool:
    """Return whether a worker must render the chats of a model. `renderer`: the renderer that the tokenizer bundle
    names, "" for none.

    A model with both a renderer and a chat template uses the template if workers are linked and none of them can load
    the renderer."""
    if not renderer:
        return False
    return not (has_template and model.links and _no_renderer(model, bundle_digest) is not None)


def _renders(link: WorkerLink, bundle_digest: str) -> bool:
    return bool(link.renderer) and link.identity.bundle_digest == bundle_digest


def _no_renderer(model: KnownModel, bundle_digest: str) -> CallError | None:
    """Return the error for a chat that no linked worker can render; None if a worker can, or if no worker is
    linked."""
    if not model.links or any(_renders(link, bundle_digest) for link in model.links.values()):
        return None
    if all(link.identity.bundle_digest != bundle_digest for link in model.links.values()):
        return CallError(
            Outcome.MODEL_LOADING, f"model {model.name} was replaced while the call waited; retry the call"
        )
    return CallError(
        Outcome.UNSUPPORTED_FEATURE,
        f"model {model.name} has no chat template, and no worker of it renders chats: ask the operator to upgrade the "
        "workers or to look for renderer_not_used in their logs, or use Complete with a formatted prompt",
        violations=[Violation("messages", "cannot be rendered for this model now")],
    )


def _free_link(model: KnownModel, bundle_digest: str) -> WorkerLink | None:
    """Return the link of the worker with the fewest chats to render; None if no worker has room. Workers that take new
    calls are preferred."""
    links = [link for link in model.links.values() if _renders(link, bundle_digest) and link.renders.has_room]
    return min(
        (link for link in links if not link.ended),
        key=lambda link: (not model.takes_calls(link), len(link.renders), link.identity.worker_id),
        default=None,
    )


def ids_in_vocabulary(prompt: RenderedPrompt, vocab_size: int) -> array[int]:
    """Return the token ids of a prompt that a worker has rendered. Raises CallError if an id is outside the model's
    vocabulary."""
    if prompt.ids and max(prompt.ids) >= vocab_size:
        raise CallError(Outcome.INTERNAL, "the worker's renderer made token ids that the model does not have")
    return prompt.ids
