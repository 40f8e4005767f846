"""The worker's side of its parser process: sessions, and the replacement of a process that has ended or hangs.

A session is the parsing of one request's output. A new process begins all sessions anew and replays their tokens. Parts
that were already returned are not returned again, so callers do not notice the replacement. A request fails if its
parse hangs, or if a process has ended twice while it worked on the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.api.outcomes import Outcome
from cluster.api.output_parts import OutputParsing
from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, TokenOutput
from cluster.worker.parsing import wire
from cluster.worker.parsing.connection import ParserConnection
from cluster.worker.parsing.hangs import HangWatch
from cluster.worker.parsing.opened_request import constrained_from_start, refused, with_grammar
from cluster.worker.parsing.parser_process import ParserHost
from cluster.worker.parsing.port import ParserNames, refuse_tools
from cluster.worker.parsing.replaced_process import ReplacedProcess
from cluster.worker.parsing.sessions import SessionRecord, failed

MAX_REQUEST_BYTES = 2 << 20
"""Greatest size of OutputParsing.request, which has the tools."""
MAX_DEATHS = 2
"""A session fails when this many processes have ended while they worked on it."""
OPEN_S = 60.0
"""Greatest number of seconds that a request waits for its session, which includes the start of the process."""


class OutputParser(ReplacedProcess):
    """Parses the outputs of a worker's requests in a separate process. Implements the port OutputParsers."""

    def __init__(
        self,
        names: ParserNames,
        start: Callable[[], ParserHost],
        watch: Callable[[ParserHost], HangWatch] = HangWatch.of,
    ) -> None:
        """Create the parser; `run` starts its process.

        `names`: the parsers. `start`: starts a parser process and blocks until the process exists. `watch`: returns the
        HangWatch of a process.
        """
        super().__init__(start, watch)
        self.names = names
        self._numbers: dict[str, int] = {}
        self._sessions: dict[int, SessionRecord] = {}
        self._last = 0
        self._done: list[TokenOutput] = []
        self._has_done = asyncio.Event()

    @property
    def open_sessions(self) -> int:
        """Number of sessions that are not closed."""
        return len(self._sessions)

    # ---- requests

    async def open(self, request: EngineRequest) -> EngineRequest:
        """Open a parsing session for the request if `request.parsing` is set. Returns the request to pass to the
        engine. If the request's tools require a grammar, the returned request has this grammar. Raises an error if the
        parser refuses the request."""
        parsing = request.parsing
        if parsing is None:
            return constrained_from_start(request)
        if not self.names.tools:
            refuse_tools(request)
        if not parsing.needs_tools and self.names.leave_text_unchanged:
            return replace(request, parsing=None)
        if len(parsing.request.encode(errors="replace")) > MAX_REQUEST_BYTES:
            raise refused("tools", f"at most {MAX_REQUEST_BYTES} bytes with the other fields for the parser")
        record = self._new_record(request, parsing)
        try:
            async with asyncio.timeout(OPEN_S):
                opened = await record.opened
            if opened.error:
                raise refused(opened.field, opened.error)
            return with_grammar(request, opened)
        except TimeoutError:
            self.close(request.request_id)
            reason = "the worker's output parser does not answer; try again"
            raise EngineRefused(Outcome.INTERNAL.name, reason) from None
        except BaseException:  # also when cancelled: a failed request must not keep its session
            self.close(request.request_id)
            raise

    def _new_record(self, request: EngineRequest, parsing: OutputParsing) -> SessionRecord:
        self._last += 1
        record = SessionRecord.of(self._last, request, parsing)
        self._sessions[record.number] = record
        self._numbers[request.request_id] = record.number
        self._send(record.opening())
        return record

    def divert(self, outputs: Sequence[TokenOutput]) -> tuple[Sequence[TokenOutput], Sequence[TokenOutput]]:
        """Divide the outputs of an engine step. Returns two lists: the outputs that need no parsing, and the outputs of
        requests with a parser session. The latter are sent to the parser process. Implements OutputParsers."""
        if not self._numbers:
            return outputs, ()
        passed, taken, items = [], [], []
        for output in outputs:
            number = self._numbers.get(output.request_id)
            record = None if number is None else self._sessions[number]
            if record is not None and record.has_ended:  # the engine has not yet aborted the request
                taken.append(output)
            elif record is None or (item := record.take(output)) is None:
                passed.append(output)
            else:
                taken.append(output)
                items.append(item)
        if items:
            self._send(wire.Feed(items))
        return passed, taken

    async def parsed(self) -> Sequence[TokenOutput]:
        """Wait for parsed outputs and return them. Implements `OutputParsers.parsed`."""
        await self._has_done.wait()
        self._has_done.clear()
        done, self._done = self._done, []
        return done

    def close(self, request_id: str) -> None:
        """End the session of a request. Outputs that are not parsed yet are dropped. An unknown id is ignored."""
        number = self._numbers.pop(request_id, None)
        if number is None:
            return
        record = self._sessions.pop(number)
        if not record.opened.done():
            record.opened.set_result(wire.Opened(number, error="the request was withdrawn"))
        self._send(wire.Close(number))

    # ---- the process

    def _apply(self, connection: ParserConnection, reply: wire.Reply) -> None:
        match reply:
            case wire.ParsedStep():
                self._apply_parsed(reply.items)
            case wire.Opened():
                record = self._sessions.get(reply.number)
                if record is not None and not record.opened.done():
                    record.opened.set_result(reply)
                elif record is not None and reply.error:
                    self._fail(record, reply.error)
            case wire.Ready():
                if reply.error:
                    self._refuse_all(f"the worker's output parser does not start: {reply.error}")
                    raise EOFError(reply.error)
                self._begin_sessions(connection)

    def _refuse_all(self, reason: str) -> None:
        """Refuse all requests whose sessions are not open yet."""
        for record in self._sessions.values():
            if not record.opened.done():
                record.opened.set_result(wire.Opened(record.number, error=reason))

    def _begin_sessions(self, connection: ParserConnection) -> None:
        """Begin the sessions of all running requests in a new parser process. Also send this process the outputs that
        the last process did not answer."""
        connection.is_ready = True
        for record in self._sessions.values():
            if record.has_ended:
                continue
            connection.send(record.opening())
            if items := record.again():
                connection.send(wire.Feed(items))

    def _apply_parsed(self, items: Sequence[wire.Parsed]) -> None:
        for parsed in items:
            record = self._sessions.get(parsed.number)
            if record is not None and not record.has_ended:
                self._return(record, record.answer(parsed))

    def _return(self, record: SessionRecord, output: TokenOutput) -> None:
        record.has_ended = output.finish is not None
        self._done.append(output)
        self._has_done.set()

    def _fail(self, record: SessionRecord, reason: str) -> None:
        """Fail one request.

        If its session is not open yet, refuse the request; otherwise end its output with an error.
        """
        if not record.opened.done():
            record.opened.set_result(wire.Opened(record.number, error=reason, field="tools"))
        elif not record.has_ended:
            self._return(record, failed(record.request.request_id, f"the output could not be parsed: {reason}"))

    def _record_death(self, number: int) -> None:
        """Record that the parser process has ended while it worked on session `number`. After MAX_DEATHS such ends, the
        session's request fails."""
        record = self._sessions.get(number)
        if record is None:
            return
        record.deaths += 1
        if record.deaths >= MAX_DEATHS:
            self._fail(record, "the parser failed on it twice")

    def _fail_hung(self, number: int) -> None:
        record = self._sessions.get(number)
        if record is not None:
            self._fail(record, "the parse takes too long")
