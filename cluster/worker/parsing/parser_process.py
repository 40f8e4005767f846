"""The parser process: one process of a worker that parses the outputs of all its requests. If the worker also renders
chats, a second process of the same kind renders them, so that rendering does not delay tokens.

Each process is a fork of the fork server, which has already imported vLLM. Without a fork server, it is a new
interpreter. The process answers the worker's messages in order, and ends when the worker closes the connection. If a
parse hangs at that time, a thread ends the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable

import structlog

from cluster.observe.log import configure_as_parent, flush
from cluster.worker.engine.processes import fork_server
from cluster.worker.parsing import wire
from cluster.worker.parsing.kit import KitSettings, ParserKit, load_kit
from cluster.worker.parsing.port import ParserNames
from cluster.worker.parsing.progress import NONE, ParserProgress, new_memory
from cluster.worker.parsing.session import ParserSession
from cluster.worker.rendering.kit import RendererKit, load_renderer

log = structlog.get_logger("parser")

PROCESS_NAME = "OutputParser"
_CLOSED = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


Kit = ParserKit | RendererKit


class ParserSessions:
    """The sessions of the parser process. Each message of the worker gets at most one reply."""

    def __init__(self, kit: Kit, progress: ParserProgress) -> None:
        self._kit = kit
        self._progress = progress
        self._sessions: dict[int, ParserSession] = {}

    def answer(self, request: wire.Request) -> wire.Reply | None:
        """Carry out a message of the worker; return the reply, or None for a message without a reply."""
        match request:
            case wire.Open():
                return self._open(request)
            case wire.Feed():
                parsed = [self._feed(*item) for item in request.items if item[0] in self._sessions]
                self._progress.record(NONE)
                return wire.ParsedStep(parsed)
            case wire.Render():
                return self._render(request)
            case wire.Close():
                self._sessions.pop(request.number, None)
        return None

    def _render(self, request: wire.Render) -> wire.Rendered:
        assert isinstance(self._kit, RendererKit), "the parser process renders no chats"
        self._progress.record(request.number)
        try:
            return self._kit.render(request)
        except Exception as error:  # a renderer's fault must end only its own request
            log.error("parser.render_failed", error=_place(error))
            why = f"the model's renderer failed on this chat: {type(error).__name__}"
            return wire.Rendered(request.number, error=why, field="messages")
        finally:
            self._progress.record(NONE)

    def _open(self, opening: wire.Open) -> wire.Opened:
        assert isinstance(self._kit, ParserKit), "the renderer's process parses no outputs"
        self._progress.record(opening.number)
        try:
            session, opened = self._kit.open(opening, lambda: self._progress.record(opening.number))
        except Exception as error:  # a parser's fault must end only its own request
            log.error("parser.open_failed", error=_place(error))
            return wire.Opened(
                opening.number, error=f"the parser failed on them: {type(error).__name__}", field="tools"
            )
        finally:
            self._progress.record(NONE)
        if session is not None:
            self._sessions[opening.number] = session
        return opened

    def _feed(self, number: int, packed: bytes, state: int) -> wire.Parsed:
        self._progress.record(number)
        try:
            return self._sessions[number].feed(number, wire.unpack_ids(packed), state)
        except Exception as error:  # a parser's fault must end only its own request
            log.error("parser.parse_failed", error=_place(error))
            del self._sessions[number]
            return wire.Parsed(number, [], 0, error=f"{type(error).__name__}")


def _place(error: Exception) -> str:
    """Return an error's type and the line that raised it.

    The error's message is left out, since it may contain a caller's text.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else type(error).__name__


def serve(connection: socket.socket, load: Callable[[], Kit], progress: ParserProgress) -> None:
    """Load the parsers or the renderer, and answer messages until the connection is closed."""
    try:
        kit = load()
    except Exception as error:  # the worker must learn why no parser runs
        connection.sendall(wire.encode(wire.Ready(f"{type(error).__name__}: {error}"[:2000])))
        return
    sessions = ParserSessions(kit, progress)
    connection.sendall(wire.encode(wire.Ready()))
    while (request := wire.receive_request(connection)) is not None:
        reply = sessions.answer(request)
        if reply is not None:
            connection.sendall(wire.encode(reply))


class ParserHost:
    """The worker's view of a started parser: the worker's end of the connection, and the parser's progress.

    `kill`: ends the process and waits until it is gone. `pid`: None if the parser has no process of its own.
    """

    def __init__(
        self, connection: socket.socket, progress: ParserProgress, kill: Callable[[], None], pid: int | None = None
    ) -> None:
        self.connection = connection
        self.progress = progress
        self.kill = kill
        self.pid = pid


def start_process(settings: KitSettings) -> ParserHost:
    """Start a parser process. Blocks until the process exists. The process itself then loads its parsers."""
    ours, theirs = socket.socketpair()
    memory = new_memory()
    try:
        kill, pid = (_fork if fork_server.is_running() else _spawn)(theirs, settings)
        socket.send_fds(ours, [b"m"], [memory])
        return ParserHost(ours, ParserProgress(os.dup(memory)), kill, pid)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(memory)


def _fork(theirs: socket.socket, settings: KitSettings) -> tuple[Callable[[], None], int | None]:
    process = fork_server.new_process(PROCESS_NAME, _main, (theirs, settings))
    process.start()

    def kill() -> None:
        process.kill()
        process.join()

    return kill, process.pid


def _spawn(theirs: socket.socket, settings: KitSettings) -> tuple[Callable[[], None], int | None]:
    descriptor = theirs.fileno()
    command = [sys.executable, "-m", __name__, str(descriptor), _to_json(settings)]
    process = subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL)

    def kill() -> None:
        process.kill()
        process.wait()

    return kill, process.pid


def _to_json(settings: KitSettings) -> str:
    return json.dumps(dataclasses.asdict(settings))


def _from_json(text: str) -> KitSettings:
    values = json.loads(text)
    return KitSettings(**values | {"names": ParserNames(**values["names"])})


def _main(connection: socket.socket, settings: KitSettings) -> None:
    """Run the parser process.

    The first message on the connection passes the descriptor of the shared memory for progress.
    """
    # Some parsers log an error with a traceback for every token of a malformed call, with the output in it.
    logging.getLogger("vllm").setLevel(logging.CRITICAL)
    configure_as_parent()
    threading.Thread(target=_end_with_worker, args=(connection,), daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        if descriptors:
            serve(connection, lambda: _load(settings), ParserProgress(descriptors[0]))
    flush(1.0)
    os._exit(0)  # there is nothing to clean up, and exit handlers of vLLM could block


def _load(settings: KitSettings) -> Kit:
    if settings.names:
        return load_kit(settings)
    return load_renderer(settings.renderer, settings.folder, trust_remote_code=settings.trust_remote_code)


def _end_with_worker(connection: socket.socket) -> None:
    """Wait until the worker has closed the connection, then end this process, even if a parse hangs."""
    poll = select.poll()
    poll.register(connection, _CLOSED)
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])), _from_json(sys.argv[2]))
