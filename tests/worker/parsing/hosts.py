"""Parsers for tests: parsers that run in a thread or in a fork of the test's process, and parsers that fail."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.api.output_parts import OutputParsing
from cluster.api.types import EngineRequest, FinishReason, Sampling, TokenOutput
from cluster.worker.parsing import wire
from cluster.worker.parsing.kit import ParserKit
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.parser_process import Kit, ParserHost, serve
from cluster.worker.parsing.port import ParserNames
from cluster.worker.parsing.progress import ParserProgress, new_memory
from cluster.worker.parsing.session import ParserSession
from tests.worker.parsing.formats import Format, kit_for, opening_for

HANG, DIE, RAISE = "please hang", "please die", "please raise"
"""Words in `reasoning_effort`'s place, after which FaultyKit's parses hang, end the process or raise."""


@dataclass(frozen=True)
class FaultyKit(ParserKit):
    """A parser kit whose sessions fail if the request contains one of the words HANG, DIE and RAISE."""

    def open(
        self, opening: wire.Open, working: Callable[[], None] = lambda: None
    ) -> tuple[ParserSession | None, wire.Opened]:
        """Open a session. If the request contains HANG, DIE or RAISE, the session hangs, ends the process or raises an
        error when it parses."""
        session, opened = super().open(opening, working)
        for word, fail in ((HANG, _hang), (DIE, _die), (RAISE, _raise)):
            if word in opening.request and session is not None:
                session.feed = fail  # type: ignore[method-assign, assignment]
        return session, opened


def _hang(*_: Any) -> wire.Parsed:
    while True:
        time.sleep(0.001)


def _die(*_: Any) -> wire.Parsed:
    os._exit(9)


def _raise(*_: Any) -> wire.Parsed:
    raise IndexError("no such thing")


def faulty(kit: ParserKit) -> FaultyKit:
    """Return a kit like `kit` that fails on request."""
    return FaultyKit(kit.tokenizer, kit.parser_class, kit.long_call, kit.replays_together, kit.streams)


def thread_host(kit: Kit | Callable[[], Kit]) -> ParserHost:
    """Start a parser in a thread. `kit`: the tokenizer and the parser class that the parser uses, or a function that
    loads both."""
    ours, theirs = socket.socketpair()
    memory = new_memory()
    progress = ParserProgress(os.dup(memory))
    child = ParserProgress(memory)

    def run() -> None:
        try:
            serve(theirs, kit if callable(kit) else lambda: kit, child)
        except OSError:
            return

    threading.Thread(target=run, daemon=True).start()
    return ParserHost(ours, progress, lambda: theirs.shutdown(socket.SHUT_RDWR))


def fork_host(kit: Kit | Callable[[], Kit]) -> ParserHost:
    """Start a parser process in a fork of this process. `kit`: the parsers of a model, or a function that loads them in
    the fork."""
    ours, theirs = socket.socketpair()
    memory = new_memory()

    def run() -> None:
        ours.close()
        serve(theirs, kit if callable(kit) else lambda: kit, ParserProgress(memory))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    theirs.close()

    def kill() -> None:
        process.kill()
        process.join()

    host = ParserHost(ours, ParserProgress(os.dup(memory)), kill, process.pid)
    os.close(memory)
    return host


@dataclass
class Hosts:
    """A callable that starts a parser at each call. `started` lists the parsers."""

    start: Callable[[ParserKit], ParserHost]
    kit: ParserKit
    started: list[ParserHost] = field(default_factory=list)

    def __call__(self) -> ParserHost:
        """Start a parser and record it."""
        self.started.append(self.start(self.kit))
        return self.started[-1]


def parser_of(
    folder: Path, form: Format, start: Callable[[ParserKit], ParserHost] = thread_host, **options: Any
) -> tuple[OutputParser, Hosts]:
    """Return an output parser for a format, and the `Hosts` object that starts the parser's processes."""
    hosts = Hosts(start, faulty(kit_for(folder, form)))
    return OutputParser(ParserNames(form.tools, form.reasoning), hosts, **options), hosts


def request_of(
    form: Format, request_id: str, prompt: Sequence[int], emitted: Sequence[int] = (), **changes: Any
) -> EngineRequest:
    """Return a request whose output is parsed. `changes`: other values for `sampling` and `needs_tools` of the request,
    and keyword arguments of `opening_for`."""
    sampling = changes.pop("sampling", Sampling(max_tokens=1000))
    needs_tools = changes.pop("needs_tools", changes.get("tool_choice") != "none")
    message = opening_for(form, prompt, **changes)
    parsing = OutputParsing(message.request, tuple(message.stop), message.is_whole, needs_tools)
    return EngineRequest(request_id, list(prompt), sampling, emitted_token_ids=list(emitted), parsing=parsing)


def outputs_of(
    request_id: str, ids: Sequence[int], size: int, finish: FinishReason = FinishReason.LENGTH
) -> list[TokenOutput]:
    """Return the outputs of steps of `size` tokens each. The last output ends the request."""
    outputs = [TokenOutput(request_id, list(ids[at : at + size])) for at in range(0, len(ids), size)]
    outputs[-1].finish = finish
    return outputs
