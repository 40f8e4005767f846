"""Tests of chats whose prompts a worker renders, and of the queue of these chats. The gateway and its links are
real."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import CatalogEntry, EngineInfo, ModelState, WorkerIdentity
from cluster.gateway.demand import DemandTally
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling.chat_renders import MAX_ATTEMPTS, ChatRenders, ChatToRender, small_room
from cluster.gateway.text.chat.chat_json import chat_json
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.tenants.policy import TenantPolicy
from cluster.v1 import inference_pb2 as inference
from cluster.wire.bundle import RENDERER, Bundle
from cluster.wire.rendering import MAX_OUTSTANDING
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support.calls import chat, complete, refused
from tests.support.cluster import LOOPBACK, TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.http import chat_body, client
from tests.support.links import NoListener
from tests.support.rendering import ByteKit, byte_renderer


@pytest.fixture(scope="session")
def rendered(checkpoint: Path) -> Bundle:
    """Provide the bundle of a model that has no chat template but names a renderer."""
    files = dict(build_bundle(checkpoint, tokenizer_mode="deepseek_v32").files)
    assert f'"{RENDERER}": "deepseek_v32"' in files["tokenizer_config.json"].decode()
    del files["chat_template.jinja"]
    return Bundle(files)


async def add(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, *, is_open: bool = True, renders: bool = True
) -> tuple[ByteKit, Worker]:
    """Add a worker whose renderer returns the bytes of a chat as its prompt."""
    kit, renderer = byte_renderer(is_open=is_open)
    engine = sim_engine(checkpoint, decode_ms=1)
    return kit, await cluster.add_worker(engine, bundle, renderer=renderer if renders else None)


def expected(text: str = "Hello, who are you?") -> bytes:
    """Return the JSON of a chat of one message."""
    return chat_json([{"role": "user", "content": text}])


# ---- through a gateway


async def test_every_api_gets_the_workers_prompt(cluster: TestCluster, checkpoint: Path, rendered: Bundle) -> None:
    """The prompt of a chat is the token ids that a worker renders. The usage in answers over gRPC and over OpenAI's API
    counts these ids, and Tokenize returns them."""
    await add(cluster, checkpoint, rendered)
    answer = await cluster.stub.Chat(chat(max_tokens=4))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(expected()), 4)
    message = inference.Message(role="user", content="Hello, who are you?")
    ids = await cluster.stub.Tokenize(inference.TokenizeRequest(model="sim", messages=[message]))
    assert bytes(ids.token_ids) == expected()
    async with client(cluster) as ai:
        body: dict[str, Any] = chat_body("Hello, who are you?", max_tokens=4)
        assert (await ai.chat.completions.create(**body)).usage.prompt_tokens == len(expected())
    await cluster.until_idle()


@pytest.mark.slow
async def test_errors_of_renderers_reach_the_caller(cluster: TestCluster, checkpoint: Path, rendered: Bundle) -> None:
    """If a renderer refuses a chat, the error names the field. If a prompt is longer than the context, the error has
    the token count from the worker, also for a chat that was sent over Bulk."""
    await add(cluster, checkpoint, rendered)
    error = await refused(cluster.stub.Chat(chat("refuse this")))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["messages"])
    assert "is refused" in error.message
    for size in (5_000, 40_000):
        error = await refused(cluster.stub.Chat(chat("x" * size)))
        assert error.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert f"has {len(expected('x' * size))} tokens" in error.message
    await cluster.until_idle()


async def test_chats_wait_for_the_first_worker(cluster: TestCluster, checkpoint: Path, rendered: Bundle) -> None:
    """Without a worker, a chat waits and its bytes count as demand. It is answered once there is a worker."""
    _, worker = await add(cluster, checkpoint, rendered)
    await cluster.stub.Complete(complete(max_tokens=1))  # so that the gateway has the tokenizer
    await worker.stop()
    gateway = cluster.gateway
    await until(lambda: not gateway.hub.links, "the worker is gone")
    call = asyncio.ensure_future(cluster.stub.Chat(chat(max_tokens=2)))
    await until(lambda: gateway.scheduler.renders.waiting("sim")[0] == 1, "the chat waits")
    guess = len(expected()) // 4 + 1
    assert gateway.scheduler.renders.waiting("sim") == (1, guess)
    (demand,) = gateway.dispatch.demand.current()
    assert (demand.classes[0].held_requests, demand.classes[0].queued_tokens) == (1, guess)
    await add(cluster, checkpoint, rendered)
    assert (await call).usage.prompt_tokens == len(expected())
    (demand,) = gateway.dispatch.demand.current()
    assert demand.classes[0].queued_requests == 0
    await cluster.until_idle()


async def test_a_wait_ends_at_its_deadline(cluster: TestCluster, checkpoint: Path, rendered: Bundle) -> None:
    """A chat that no worker renders in time ends at its deadline, and a cancelled chat ends at once. The gateway keeps
    no state of either chat."""
    kit, worker = await add(cluster, checkpoint, rendered, is_open=False)
    error = await refused(cluster.stub.Chat(chat(), timeout=0.3))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    kit.open.set()
    await worker.stop()
    await until(lambda: not cluster.gateway.hub.links, "the worker is gone")
    call = asyncio.ensure_future(cluster.stub.Chat(chat()))
    await until(lambda: cluster.gateway.scheduler.renders.waiting("sim")[0] == 1, "the chat waits")
    call.cancel()
    await cluster.until_idle()


async def test_workers_without_a_renderer_are_named(cluster: TestCluster, checkpoint: Path, rendered: Bundle) -> None:
    """If no worker announces a renderer, chats are refused with the remedy. Completions are answered."""
    await add(cluster, checkpoint, rendered, renders=False)
    error = await refused(cluster.stub.Chat(chat()))
    assert (error.code, error.fields) == (grpc.StatusCode.UNIMPLEMENTED, ["messages"])
    assert "upgrade the workers" in error.message
    assert (await cluster.stub.Complete(complete(max_tokens=2))).usage.completion_tokens == 2


async def test_a_template_serves_while_no_worker_renders(
    cluster: TestCluster, checkpoint: Path, rendered: Bundle, bundle: Bundle
) -> None:
    """If a model has a template and a renderer, and its workers could not load the renderer, the template is used."""
    both = Bundle({**rendered.files, "chat_template.jinja": bundle.files["chat_template.jinja"]})
    await add(cluster, checkpoint, both, renders=False)
    by_template = (await cluster.stub.Chat(chat(max_tokens=2))).usage.prompt_tokens
    assert by_template != len(expected())
    await add(cluster, checkpoint, both)
    assert (await cluster.stub.Chat(chat(max_tokens=2))).usage.prompt_tokens == len(expected())


async def test_a_lost_worker_changes_nothing(cluster: TestCluster, checkpoint: Path, rendered: Bundle) -> None:
    """If a worker is lost before it has rendered a chat, another worker renders it."""
    kit, worker = await add(cluster, checkpoint, rendered, is_open=False)
    call = asyncio.ensure_future(cluster.stub.Chat(chat(max_tokens=2)))
    await until(lambda: any(len(link.renders) for link in cluster.gateway.hub.links), "the chat is sent")
    stopped = asyncio.ensure_future(worker.stop())
    await until(lambda: cluster.gateway.scheduler.renders.waiting("sim")[0] == 1, "the chat waits again")
    await add(cluster, checkpoint, rendered)
    assert (await call).usage.prompt_tokens == len(expected())
    kit.open.set()
    await stopped


async def test_the_queues_bounds_hold(tmp_path: Path, checkpoint: Path, rendered: Bundle) -> None:
    """Chats beyond the bounds of the queue are refused. There is a bound on their number and one on their bytes."""
    bounds = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  queue: {max_requests: 2, max_tokens: 100}")
    async with running_cluster(tmp_path, bounds) as cluster:
        kit, _ = await add(cluster, checkpoint, rendered, is_open=False)
        calls = [
            asyncio.ensure_future(cluster.stub.Chat(chat(f"{i}", max_tokens=2))) for i in range(MAX_OUTSTANDING + 2)
        ]
        await until(lambda: cluster.gateway.scheduler.renders.waiting("sim")[0] == 2, "two wait behind those sent")
        assert (await refused(cluster.stub.Chat(chat("full")))).reason == "QUEUE_FULL"
        kit.open.set()
        await asyncio.gather(*calls)
        assert (await refused(cluster.stub.Chat(chat("x" * 1000)))).reason == "QUEUE_FULL"


# ---- the queue alone

INFO = EngineInfo("sim", "sim", "1", 16, 100, 8, 64, 4096, 768, capabilities=("renders:deepseek_v32",))


class Queue:
    """The queue of one model's chats, with links whose messages the test answers."""

    def __init__(self) -> None:
        self.model = KnownModel(CatalogEntry(name="m", state=ModelState.LOADING), True)
        self.now = 0.0
        self.renders = ChatRenders(
            small_room, lambda tenant: 1.0, DemandTally(), lambda name: self.model, lambda: self.now
        )
        self.links = 0

    def link(self) -> WorkerLink:
        """Add a worker's link."""
        self.links += 1
        identity = WorkerIdentity(f"w{self.links}", "i", "m", bundle_digest="sha256:b")
        link = WorkerLink(identity, INFO, 1, NoListener(), LinkLiveness(time.monotonic(), 1.0, 1.0))
        self.model.add_link(link)
        self.renders.pump("m")
        return link

    def lose(self, link: WorkerLink) -> None:
        """End a link."""
        self.model.remove_link(link, gone=ModelState.LOADING)
        link.end("cut")

    def ask(self, tenant: str, text: str, **fields: Any) -> asyncio.Task[Any]:
        """Put a chat of a tenant into the queue."""
        request = ChatToRender(self.model, "sha256:b", TenantPolicy(name=tenant), 0, text.encode(), **fields)
        return asyncio.ensure_future(self.renders.render(request))


@asynccontextmanager
async def settled() -> AsyncIterator[None]:
    """Let all tasks run before and after the body of the context."""
    for _ in range(20):
        await asyncio.sleep(0)
    yield
    for _ in range(20):
        await asyncio.sleep(0)


async def sent(link: WorkerLink) -> list[pb.Render]:
    """Return the chats that a link has to send now."""
    return list((await link.box.next_message()).renders)


def answer(link: WorkerLink, render: pb.Render, size: int = 3) -> bool:
    """Send a worker's answer to `render`: `size` token ids, or only their number if it exceeds the limit in `render`.
    Returns the result of `WorkerLink.apply`."""
    ids = array("I", range(size)).tobytes() if size <= render.max_tokens else b""
    return link.apply(pb.WorkerTurn(rendered=[pb.Rendered(number=render.number, token_ids=ids, tokens=size)]))


async def test_tenants_take_turns() -> None:
    """A tenant's only chat waits for at most two other chats, however many chats another tenant sent before."""
    queue = Queue()
    link = queue.link()
    flood = [queue.ask("flood", f"{i} " + "x" * 400) for i in range(30)]
    order: list[str] = []
    async with settled():
        small = queue.ask("small", "s")
    outstanding = await sent(link)
    assert len(outstanding) == MAX_OUTSTANDING
    while outstanding:
        render = outstanding.pop(0)
        order.append(render.chat.decode())
        async with settled():
            assert answer(link, render)
            queue.renders.pump("m")
        if queue.renders.waiting("m")[0] or not len(order) > 30:
            outstanding += await sent(link) if len(link.renders) > len(outstanding) else []
    assert order.index("s") <= MAX_OUTSTANDING + 1
    assert len(order) == 31
    assert (await small).tokens == 3
    assert all(prompt.tokens == 3 for prompt in await asyncio.gather(*flood))


async def test_a_chat_that_loses_workers_fails_in_the_end() -> None:
    """A chat is sent again after the loss of its worker. After several losses it fails."""
    queue = Queue()
    call = queue.ask("a", "chat")
    for _ in range(MAX_ATTEMPTS):
        async with settled():
            pass
        link = queue.link()
        assert [render.chat for render in await sent(link)] == [b"chat"]
        async with settled():
            queue.lose(link)
    with pytest.raises(CallError) as error:
        await asyncio.wait_for(call, 60)
    assert error.value.outcome is Outcome.WORKER_LOST


async def test_answers_that_do_not_fit_end_the_link() -> None:
    """A worker loses its link if its rendered prompt has more token ids than allowed, or not as many as the worker
    announced. The chat then waits for another worker."""
    for wrong in (
        pb.Rendered(number=1, token_ids=bytes(8), tokens=3),
        pb.Rendered(number=1, token_ids=bytes(400), tokens=100),
        pb.Rendered(number=1, token_ids=b"", tokens=0),
    ):
        queue = Queue()
        link = queue.link()
        call = queue.ask("a", "chat", max_tokens=10)
        async with settled():
            pass
        assert len(await sent(link)) == 1
        with pytest.raises(ValueError, match=r"ids|tokens"):
            link.apply(pb.WorkerTurn(rendered=[wrong]))
        async with settled():
            queue.lose(link)
        assert queue.renders.waiting("m")[0] == 1
        call.cancel()


async def test_ends_of_waiting_chats() -> None:
    """A waiting chat ends if it is too old, if its tenant is suspended, if its model fails, or if the gateway stops."""
    queue = Queue()
    outcomes = []
    for end in ("age", "tenant", "model", "stop"):
        call = queue.ask("a", "chat")
        async with settled():
            pass
        queue.now += 1000.0 if end == "age" else 0.0
        if end == "age":
            queue.renders.expire()
        elif end == "tenant":
            queue.renders.end_suspended(lambda tenant: CallError(Outcome.TENANT_SUSPENDED, tenant))
        elif end == "model":
            queue.model.update(CatalogEntry(name="m", state=ModelState.FAILED))
            queue.renders.end_unservable()
            queue.model.update(CatalogEntry(name="m", state=ModelState.LOADING))
        else:
            queue.renders.close()
        with pytest.raises(CallError) as error:
            await call
        outcomes.append(error.value.outcome)
    expected_outcomes = [Outcome.MODEL_LOADING, Outcome.TENANT_SUSPENDED, Outcome.NO_WORKER, Outcome.NO_WORKER]
    assert outcomes == expected_outcomes
    assert queue.renders.waiting("m") == (0, 0)


async def test_a_replaced_tokenizer_ends_the_wait() -> None:
    """A chat waits until the model has a worker that can render it. If the worker that comes has another tokenizer than
    the model had before, the call fails with an error that asks for a retry."""
    queue = Queue()
    call = queue.ask("a", "chat")
    async with settled():
        pass
    queue.model.links.clear()
    link = queue.link()
    async with settled():
        queue.lose(link)
    other = WorkerIdentity("o", "i", "m", bundle_digest="sha256:other")
    queue.model.add_link(WorkerLink(other, INFO, 1, NoListener(), LinkLiveness(time.monotonic(), 1.0, 1.0)))
    queue.renders.pump("m")
    with pytest.raises(CallError, match="was replaced"):
        await call
