"""The other gateway processes of a cluster, reached through publish/subscribe of Valkey or Redis.

All processes listen for questions on one channel, which costs nothing while no process asks. A process asks for the
others' parts of the cluster's overview, or for their columns of the history. The parts are sent on another channel, and
the history on a channel of the process that asks. Nothing is stored. If several processes ask for parts within a
second, each part is sent once. While the store is unreachable, no other process is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cluster.gateway.console.overview.parts import Part
from cluster.gateway.console.peers.peers import (
    FIRST_ANSWER_S,
    MAX_PEERS,
    MAX_PIECE_BYTES,
    Answer,
    Columns,
    PartAssembler,
    PeerParts,
    Question,
    check_columns,
    pieces_of,
)

log = structlog.get_logger("console")

PREFIX: Final = "headrace:console:"
QUESTIONS: Final = PREFIX + "questions"
PARTS: Final = PREFIX + "parts"
ASK_S: Final = 0.8
"""Minimum seconds between two questions for parts, by any process, and between two parts that this process sends."""
ASK_ALL_S: Final = 0.1
"""Minimum seconds between two parts with all calls that this process sends. All processes that ask get the same."""
MAX_ANSWERS: Final = 16
"""Maximum number of questions that are answered at once; further ones are dropped."""
LOG_S: Final = 10.0
IDLE_S: Final = 3.0
"""Seconds after the last call of `parts` until this process stops receiving the parts of others."""
HISTORY_S: Final = 0.5
"""Maximum seconds to wait for the history of the other processes."""
TIMEOUT_S: Final = 1.0
RETRY_S: Final = 2.0
HEALTH_S: Final = 30
"""Seconds without a message after which the connection is checked."""
UNREACHABLE: Final = (RedisError, OSError, TimeoutError)


class ValkeyPeers:
    """Access to the other gateway processes on all hosts, through Valkey. Implements Peers."""

    def __init__(self, url: str, gateway: str, answer: Answer, clock: Callable[[], float] = time.monotonic) -> None:
        """`gateway`: id of this process. `answer`: returns the answer to a question of another process."""
        self._url = url
        self._gateway = gateway
        self._answer = answer
        self._clock = clock
        self._redis: Redis = Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        self._listening: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Future[None]] = set()
        self._pubsub: Any = None
        self._parts = PeerParts()
        self._assembler = PartAssembler()
        self._arrived = asyncio.Event()
        self._numbers = itertools.count(1)
        self._histories: dict[int, asyncio.Queue[Columns]] = {}
        self._asked_at = self._looked_at = self._sent_at = float("-inf")
        self._others = 0
        """Number of other processes that got the last question."""
        self._is_lost = self._is_closing = False
        self.refused = 0
        """Number of malformed messages of other processes."""
        self._logged_at = self._sent_all_at = float("-inf")
        self.connected = asyncio.Event()
        """Set while this process receives the questions of others."""

    def start(self) -> None:
        """Begin to answer the requests of other processes. Implements Peers."""
        self._listening = asyncio.create_task(self._listen_always())

    async def close(self) -> None:
        """Stop asking and answering. Implements Peers."""
        self._is_closing = True
        tasks = {*self._answering, *({self._listening} if self._listening is not None else ())}
        while tasks:  # more than once: the client may swallow a cancellation that coincides with its timeout
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=TIMEOUT_S)
        await self._redis.aclose()

    # ---- questions

    async def parts(self, now: float) -> Sequence[Part]:
        """Ask the other processes for their parts of the console's overview. Returns the newest part of each process
        that has arrived. Implements Peers."""
        is_first = now - self._looked_at > IDLE_S
        self._looked_at = now
        if self._pubsub is None:
            return ()
        needs_all = is_first or self._parts.needs_all(now)
        if is_first:
            with contextlib.suppress(*UNREACHABLE):
                await self._pubsub.subscribe(PARTS)
        if needs_all or now - self._asked_at >= ASK_S:
            self._asked_at = now
            self._others = await self._publish(QUESTIONS, {"kind": "part", "has_all": needs_all})
        if is_first and self._others:
            await self._wait_for_first(now)
        return self._parts.current(self._clock())

    async def _wait_for_first(self, now: float) -> None:
        """Wait until all other processes have sent a part, but at most FIRST_ANSWER_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_ANSWER_S):
                while len(self._parts) < self._others:
                    self._arrived.clear()
                    await self._arrived.wait()

    async def history(self, query: Question) -> Sequence[Columns]:
        """Return the other processes' columns for a query of the history. Implements Peers."""
        number = next(self._numbers)
        answers = self._histories[number] = asyncio.Queue()
        found: list[Columns] = []
        try:
            question = {"kind": "history", "number": number, "query": query}
            others = await self._publish(QUESTIONS, question)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HISTORY_S):
                    while len(found) < others:
                        columns = await answers.get()
                        found.append({name: columns[name] for name in query["columns"] if name in columns})
        finally:
            del self._histories[number]
        return found

    async def _publish(self, channel: str, message: Mapping[str, Any]) -> int:
        """Send a message. Returns the number of other processes that receive it; 0 while the store is unreachable."""
        import orjson

        data = orjson.dumps({"from": self._gateway, **message})
        try:
            return max(int(await self._redis.publish(channel, data)) - 1, 0)
        except UNREACHABLE as error:
            self._lost(error)
            return 0

    def _lost(self, error: Exception) -> None:
        """Log that the store has become unreachable. Further errors are not logged until the store is reachable
        again."""
        if not self._is_lost:
            self._is_lost = True
            log.warning("console.store_lost", error=str(error))

    # ---- messages of others

    async def _listen_always(self) -> None:
        """Listen for questions and answers, and connect again when the connection is lost."""
        while not self._is_closing:
            client: Redis = Redis.from_url(self._url, socket_connect_timeout=TIMEOUT_S, health_check_interval=HEALTH_S)
            pubsub: Any = client.pubsub(ignore_subscribe_messages=True)
            try:
                await self._listen(pubsub)
            except Exception as error:
                self._lost(error)
            finally:
                self._pubsub = None
                self.connected.clear()
                with contextlib.suppress(*UNREACHABLE):
                    await client.aclose()
            await asyncio.sleep(RETRY_S)

    async def _listen(self, pubsub: Any) -> None:
        await pubsub.subscribe(QUESTIONS, PREFIX + self._gateway)
        self._pubsub, self._looked_at = pubsub, float("-inf")
        self._is_lost = False
        self.connected.set()
        while not self._is_closing:
            message = await pubsub.get_message(timeout=HEALTH_S)  # also checks the connection
            if message is not None:
                self._handle(message["channel"].decode(), message["data"])
            if PARTS.encode() in pubsub.channels and self._clock() - self._looked_at > IDLE_S:
                await pubsub.unsubscribe(PARTS)  # this process shows no parts of others any more

    def _handle(self, channel: str, data: bytes) -> None:
        """Handle a message. A malformed message, such as one of another release, is logged and ignored."""
        import orjson

        if len(data) > MAX_PIECE_BYTES:
            return
        try:
            message = orjson.loads(data)
            if message["from"] == self._gateway:
                return
            if channel == PARTS:
                part = self._assembler.add(message["from"], message["number"], message["piece"])
                if part is not None:
                    self._parts.put(part, self._clock())
                    self._arrived.set()
            elif channel == QUESTIONS:
                self._asked(message)
            elif (answers := self._histories.get(message["number"])) is not None and answers.qsize() < MAX_PEERS:
                answers.put_nowait(check_columns(message["columns"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._refused(channel, error)

    def _refused(self, channel: str, error: BaseException) -> None:
        """Count a malformed message, and log the first of each LOG_S."""
        self.refused += 1
        if self._clock() - self._logged_at >= LOG_S:
            self._logged_at = self._clock()
            log.warning("console.message_refused", channel=channel, error=repr(error)[:200], count=self.refused)

    def _asked(self, question: Question) -> None:
        if len(self._answering) >= MAX_ANSWERS:
            return  # whoever asks shows the others meanwhile, and asks again
        if question["kind"] == "history":
            self._spawn(self._send_history(question))
            return
        now, has_all = self._clock(), bool(question["has_all"])
        self._asked_at = max(self._asked_at, now)
        if now - (self._sent_all_at if has_all else self._sent_at) >= (ASK_ALL_S if has_all else ASK_S):
            self._sent_at, self._sent_all_at = now, now if has_all else self._sent_all_at
            self._spawn(self._send_part(question))

    async def _send_part(self, question: Question) -> None:
        part, number = await self._answer(question), next(self._numbers)
        for piece in () if part is None else pieces_of(dict(part)):
            await self._publish(PARTS, {"number": number, "piece": piece})

    async def _send_history(self, question: Question) -> None:
        if (columns := await self._answer(question)) is not None:
            message = {"number": question["number"], "columns": columns}
            await self._publish(PREFIX + str(question["from"]), message)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._answering.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Future[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._refused(QUESTIONS, error)
