"""Causes of an engine's end: the process that failed first, how the process failed, and where its log is.

Problem: vLLM reports to an engine's owner (the replica's process) only that some process has ended. So each vLLM
process registers (watchdog.watch calls `register`) in the folder of the engine's sockets. Each error that the process
logs is also written to a notes file in this folder. The engine core watches the ranks on this host (exit_status.py) and
notes how they end. The owner reads the notes file.

The first note counts, because a failed rank makes its core fail later with a less useful error. There is one exception.
When a rank is killed, other processes may note the resulting errors first. So the note of a killed rank takes
precedence over errors noted less than a second earlier. A rank on another host does not have the folder; its error is
part of the core's error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import current_process
from pathlib import Path
from typing import Any

from cluster.worker.engine.processes import exit_status, sockets

ENGINE = "HEADRACE_ENGINE"
"""Environment variable: name of the engine to which a process belongs, unique among its owner's engines."""
NOTES = "notes"
MEMBER = "member"
LONGEST = 500
"""Greatest number of characters kept of an error."""
MOST_BYTES = 1 << 18
"""Size of the notes file in bytes above which no more notes are added."""
RECENT_S = 30.0
"""Greatest age, in seconds, of a note that explains the end of a running engine. An older note may be one request's
error."""
TOGETHER_S = 1.0
"""Seconds by which the note of a rank's death may come later than errors that the death causes."""
ENDING_S, LOOK_S = 5.0, 0.05
"""Longest time in seconds that a core waits for an ending process to end, and seconds between two checks."""
TRACEBACK = "Traceback (most recent call last):"
LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor")
"""Loggers that report the failure of a core or a rank."""
DIED = "died unexpectedly"
"""Part of the executors' message for a rank that has ended."""
FATAL = "fatal error"
"""Part of the core's message for an error that ends it."""
CORE = "the engine core"
_CRASH = re.compile(r"\*\*\* (SIG[A-Z]+) received|Fatal Python error: ([^\n]+)")
_RAY_ACTOR = re.compile(r"The actor died unexpectedly.*?\bpid: (\d+)", re.DOTALL)
_SEEN_BEFORE = "Some common causes include"


@dataclass(frozen=True, slots=True)
class Note:
    """An entry of the notes file. `kind` is `error` (an error that a process logged), `killed` or `ended`."""

    at: float
    kind: str
    text: str
    log: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A process of an engine: the name of the process, and the files of its stdout and stderr."""

    name: str
    log: str = ""
    error_log: str = ""


@contextlib.contextmanager
def name_engine() -> Iterator[str]:
    """Set a new engine's name in the environment while the owner starts the engine; yield the name for `find_cause`.

    The environment is restored afterwards. Otherwise a Ray node that this process starts later would inherit the name,
    and all ranks on that node would use it.
    """
    name, before = uuid.uuid4().hex[:8], os.environ.get(ENGINE)
    os.environ[ENGINE] = name
    try:
        yield name
    finally:
        os.environ.pop(ENGINE)
        if before is not None:
            os.environ[ENGINE] = before


def _file(kind: str, engine: str = "") -> Path | None:
    """Return the path of an engine's notes file (`kind` NOTES), which records errors and ends of processes, or the
    path prefix of its member files (`kind` MEMBER), one for each process of the engine.

    Returns None if this host has no folder for the engine. `engine`: the engine's name; "" for the engine to which
    this process belongs.
    """
    folder = sockets.folder()
    return None if folder is None else folder / f"{kind}-{engine or os.environ.get(ENGINE, '')}"


def note(kind: str, text: str, log: str = "") -> None:
    """Append a note to the notes file of this process's engine.

    Does nothing if this host has no folder for the engine.
    """
    notes = _file(NOTES)
    if notes is None:
        return
    line = json.dumps(dataclasses.asdict(Note(time.time(), kind, " ".join(text.split())[:LONGEST], log)))
    with contextlib.suppress(OSError), notes.open("ab", buffering=0) as file:
        if file.tell() < MOST_BYTES:
            file.write(f"{line}\n".encode())


class _NotesHandler(logging.Handler):
    """A log handler that writes to the notes file of the engine: a note for each logged exception, and for each rank
    that an executor reports as ended."""

    def __init__(self, name: str, members: Members | None = None) -> None:
        super().__init__(logging.ERROR)
        self._process_name = name
        self._members = members

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if self._members is not None and (DIED in str(record.msg) or FATAL in str(record.msg)):
            self._members.settle(TOGETHER_S)
        if error is not None:
            prefix = f"{self._process_name}: " if self._process_name not in ("", CORE) else ""
            note("error", prefix + one_line(error), log_of("stdout"))
        elif DIED in str(record.msg):
            _note_death(record.args if isinstance(record.args, tuple) else ())


def _note_death(arguments: tuple[object, ...]) -> None:
    """Record that ranks have ended, as a cause of the engine's end.

    `arguments`: the arguments of the executor's log message. They are a process name and an exit code, or the
    numbers of Ray's ranks.
    """
    if len(arguments) == 2 and isinstance(arguments[1], int):
        kind = "killed" if arguments[1] < 0 else "ended"
        note(kind, f"{_rank(str(arguments[0]))} {exit_status.describe(arguments[1])}", log_of("stdout"))
    elif arguments:
        ranks = str(arguments[0]).strip("[]")
        note("ended", f"rank {ranks} ended without a word")


def one_line(error: BaseException) -> str:
    """Return an error as one line of text.

    If it contains another process's traceback, return the error of that process.
    """
    message = f"{type(error).__name__}: {error}"  # without notes: vLLM's ranks add their traceback as a note
    if match := _RAY_ACTOR.search(message):
        return f"a rank (process {match[1]}) died while it started"
    if TRACEBACK in message:
        sent = message.rpartition(TRACEBACK)[2].splitlines()[1:]
        begin = next((at for at, line in enumerate(sent) if line.strip() and not line.startswith(" ")), 0)
        message = "\n".join(sent[begin:]) or message
    return " ".join(message.partition(_SEEN_BEFORE)[0].split())[:LONGEST]


def register(members: Members | None = None) -> None:
    """Register this vLLM process, and note its errors from now on. Idempotent. The replica's process, which owns
    the engine, must not call this function.

    `members`: the engine's other processes; passed only by an engine core. If one of them has ended, its end is
    noted before an error of this process.
    """
    name = process_name()
    for logger in map(logging.getLogger, LOGGERS):
        if not any(isinstance(handler, _NotesHandler) for handler in logger.handlers):
            logger.addHandler(_NotesHandler(name, members))
    registered = _file(MEMBER)
    if registered is not None and name:
        member = Member(name, log_of("stdout"), log_of("stderr"))
        with contextlib.suppress(OSError):
            Path(f"{registered}-{os.getpid()}").write_text(json.dumps(dataclasses.asdict(member)))


def process_name() -> str:
    """Return this process's name in its engine (the core or a rank); empty if this process is not a vLLM process."""
    process = current_process().name
    if process.startswith("EngineCore"):
        return CORE
    if process.startswith("VllmWorker-"):
        return _rank(process)
    if (ray := sys.modules.get("ray")) is not None:
        with contextlib.suppress(Exception):
            if ray.is_initialized():  # else asking for the actor would start a Ray of its own
                return _rank(str(ray.get_runtime_context().get_actor_name() or ""))
    return ""


def _rank(name: str) -> str:
    """Return a rank's short name, given the name of its process (`VllmWorker-1`) or actor
    (`vllm_Worker_abc_TP1_PP0`)."""
    if match := re.fullmatch(r"VllmWorker-(\d+)", name):
        return f"rank {match[1]}"
    parts = re.findall(r"_((?:PCP|TP|PP)\d+)", name)
    if len(parts) == 1:
        return f"rank {parts[0].lstrip('TPC')}"
    return f"rank {' '.join(parts)}" if parts else name and f"rank {name}"


def log_of(stream: str) -> str:
    """Return the file to which this process's `stream` (stdout or stderr) is written; empty if the stream is not a
    file."""
    return file_of(1 if stream == "stdout" else 2)


def file_of(descriptor: int) -> str:
    """Return the file to which a descriptor of this process writes; empty if the descriptor is not a file."""
    try:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
    return target if target.startswith("/") and not target.startswith("/dev/") and os.path.isfile(target) else ""


class Members:
    """The processes of an engine on this host, except the engine core. The core watches them and notes how they end.

    Problem: a dying rank closes its connections before its process has ended. The core then fails at once, and the
    owner reads the notes as soon as it gets the core's error. So the core calls `settle`, which delays the error until
    the rank's end is noted.
    """

    def __init__(self) -> None:
        self._watched = exit_status.Watched()
        self._members: dict[int, Member] = {}
        self._noted = threading.Event()

    def settle(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` seconds until a member has ended and its end is noted.

        If a member is still ending after that time, wait up to ENDING_S seconds more. Return at once if there are no
        members.
        """
        if not self._members or self._noted.wait(timeout_s):
            return
        deadline = time.monotonic() + ENDING_S
        while time.monotonic() < deadline and any(map(exit_status.is_ending, list(self._members))):
            if self._noted.wait(LOOK_S):
                return

    def wait(self, timeout_s: float) -> None:
        """Find new members (processes of the engine). Then wait at most `timeout_s` seconds for a member to end, and
        note how members ended."""
        self._members |= _members(self._members)
        gone = [(pid, exit_status.UNKNOWN) for pid in self._watched.add(self._members)]
        for pid, how in gone or self._watched.wait(timeout_s):
            member = self._members[pid]
            code = re.search(r"exit code \d+|SIGTERM", how)
            if exit_status.UNKNOWN in how:
                how = _crash_cause(member) or how
            note("ended" if code else "killed", f"{member.name} (process {pid}) {how}", member.log)
            self._noted.set()


def note_early_ends() -> None:
    """Make an engine core note the exit codes of ranks that end during their start. vLLM itself ignores these codes."""
    from multiprocessing.connection import wait

    from vllm.v1.executor.multiproc_executor import WorkerProc

    ready = WorkerProc.wait_for_ready

    @functools.wraps(ready)
    def wait_for_ready(handles: Any) -> Any:
        try:
            return ready(handles)
        except Exception:
            processes = {handle.proc.sentinel: handle.proc for handle in handles}
            for sentinel in wait(list(processes), exit_status.STATUS_WITHIN_S):
                process = processes[sentinel]
                process.join(exit_status.STATUS_WITHIN_S)  # a process closes its files before it has ended
                if code := process.exitcode:
                    who = f"{_rank(process.name)} (process {process.pid})"
                    note("killed" if code < 0 else "ended", f"{who} {exit_status.describe(code)}", log_of("stdout"))
            raise

    WorkerProc.wait_for_ready = staticmethod(wait_for_ready)


def _members(known: Mapping[int, Member]) -> dict[int, Member]:
    members, new = _file(MEMBER), {}
    for file in members.parent.glob(f"{members.name}-*") if members is not None else ():
        with contextlib.suppress(OSError, ValueError, TypeError):  # the file is being written
            pid = int(file.name.rpartition("-")[2])
            if pid != os.getpid() and pid not in known:
                new[pid] = Member(**json.loads(file.read_text()))
    return new


def _crash_cause(member: Member) -> str:
    """Return how a process ended, from a crash handler's message at the end of its log; empty if the log has no such
    message."""
    for log in filter(None, (member.error_log, member.log)):
        with contextlib.suppress(OSError), open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - (64 << 10)))
            if crashes := _CRASH.findall(file.read().decode(errors="replace")):
                signal, python = crashes[-1]
                return f"was killed by {signal}" if signal else f"crashed: {python}"
    return ""


def find_cause(engine: str, *, recent: bool = False) -> str:
    """Return a text that says why one of this process's engines has ended and names the log file of the engine process
    that failed. The text is empty if the engine's processes have left no notes.

    `engine`: the name from `name_engine`. `recent`: ignore notes older than RECENT_S seconds. Callers set it for an
    engine that was running, and not for one whose start failed.
    """
    notes = [entry for entry in _notes(engine) if not recent or time.time() - entry.at < RECENT_S]
    errors = [entry for entry in notes if entry.kind == "error"]
    killed = [entry for entry in notes if entry.kind == "killed"]
    if killed and (not errors or killed[0].at <= errors[0].at + TOGETHER_S):
        return with_log(killed[0].text, killed[0].log)
    first = next(iter(errors or notes), None)
    return with_log(first.text, first.log) if first is not None else ""


def with_log(reason: str, log: str) -> str:
    """Return `reason`, followed by the path `log` unless the path is empty."""
    return f"{reason}; log: {log}" if log else reason


def _notes(engine: str) -> Iterator[Note]:
    notes = _file(NOTES, engine)
    try:
        lines = notes.read_text(encoding="utf-8").splitlines() if notes is not None else []
    except OSError:
        lines = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            yield Note(**json.loads(line))
