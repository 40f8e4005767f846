"""Why an engine ended: which of its processes failed first, how, and where its log is.

Problem: vLLM reports to an engine's owner only that some process has ended. So each of vLLM's processes
(watchdog.watch) registers in the folder of the engine's sockets, and writes the errors that it logs into a file there.
The engine core watches the ranks on this host (exit_status.py) and adds how they end. The owner reads the file.

The first entry counts: where a rank fails, its core fails after it and says less. A rank that was killed counts before
errors of the same second, since the other ranks fail as soon as one is missing. A rank on another host has no such
folder; its error is part of the core's.
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
"""Environment: which of its owner's engines a process belongs to."""
NOTES = "notes"
MEMBER = "member"
LONGEST = 500
"""Characters of an error that are kept."""
MOST_BYTES = 1 << 18
"""Of notes; an engine that logs more than that without ending is not read to its end."""
RECENT_S = 30.0
"""Notes older than this say nothing of an engine that ends now: errors that one request made, for example."""
TOGETHER_S = 1.0
"""How long after an error a rank that was killed before it may be noticed."""
ENDING_S, LOOK_S = 5.0, 0.05
"""How long a core waits for the note of a process that is seen to end: a busy machine takes its time with that."""
TRACEBACK = "Traceback (most recent call last):"
LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor")
"""Loggers that tell that a core or a rank has failed."""
DIED = "died unexpectedly"
"""In the executors' own words for a rank that has ended."""
FATAL = "fatal error"
"""In the core's own words for an error that ends it."""
CORE = "the engine core"
_CRASH = re.compile(r"\*\*\* (SIG[A-Z]+) received|Fatal Python error: ([^\n]+)")
_RAY_ACTOR = re.compile(r"The actor died unexpectedly.*?\bpid: (\d+)", re.DOTALL)
_SEEN_BEFORE = "Some common causes include"


@dataclass(frozen=True, slots=True)
class Note:
    """One entry of the file. `kind`: an `error` that a process logged, that it was `killed`, or that it `ended`."""

    at: float
    kind: str
    text: str
    log: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """One process of an engine: its name, and the files of its output and its errors."""

    name: str
    log: str = ""
    error_log: str = ""


@contextlib.contextmanager
def named() -> Iterator[str]:
    """In the owner, around the start of an engine: the name by which its processes' notes are found.

    The name is in the environment no longer than that: ranks keep a name that they find in their node's environment,
    so a Ray that this process starts later must not inherit one.
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
    """Where an engine's notes are, or what its members are called by; that of this process, unless another is named."""
    folder = sockets.folder()
    return None if folder is None else folder / f"{kind}-{engine or os.environ.get(ENGINE, '')}"


def note(kind: str, text: str, log: str = "") -> None:
    """Add to the notes of the engine that this process belongs to; nothing where it has no folder here."""
    notes = _file(NOTES)
    if notes is None:
        return
    line = json.dumps(dataclasses.asdict(Note(time.time(), kind, " ".join(text.split())[:LONGEST], log)))
    with contextlib.suppress(OSError), notes.open("ab", buffering=0) as file:
        if file.tell() < MOST_BYTES:
            file.write(f"{line}\n".encode())


class _Keeper(logging.Handler):
    """A log handler that notes errors with exceptions, and ranks that an executor reports as ended."""

    def __init__(self, name: str, members: Members | None = None) -> None:
        super().__init__(logging.ERROR)
        self._whose = name
        self._members = members

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if self._members is not None and (DIED in str(record.msg) or FATAL in str(record.msg)):
            self._members.settle(TOGETHER_S)
        if error is not None:
            prefix = f"{self._whose}: " if self._whose not in ("", CORE) else ""
            note("error", prefix + text(error), log_of("stdout"))
        elif DIED in str(record.msg):
            _note_death(record.args if isinstance(record.args, tuple) else ())


def _note_death(arguments: tuple[object, ...]) -> None:
    """Note a rank by the executors' message: of processes its name and exit code, of Ray's actors their ranks."""
    if len(arguments) == 2 and isinstance(arguments[1], int):
        kind = "killed" if arguments[1] < 0 else "ended"
        note(kind, f"{_rank(str(arguments[0]))} {exit_status.said(arguments[1])}", log_of("stdout"))
    elif arguments:
        told = str(arguments[0]).strip("[]")
        note("ended", f"rank {told} ended without a word")


def text(error: BaseException) -> str:
    """The error on one line; of an error that another process has sent with its traceback, that process's."""
    told = f"{type(error).__name__}: {error}"  # without notes: vLLM's ranks add their traceback as one
    if found := _RAY_ACTOR.search(told):
        return f"a rank (process {found[1]}) died while it started"
    if TRACEBACK in told:
        sent = told.rpartition(TRACEBACK)[2].splitlines()[1:]
        begin = next((at for at, line in enumerate(sent) if line.strip() and not line.startswith(" ")), 0)
        told = "\n".join(sent[begin:]) or told
    return " ".join(told.partition(_SEEN_BEFORE)[0].split())[:LONGEST]


def keep(members: Members | None = None) -> None:
    """Register this process of vLLM's, and note from now on why it fails. Idempotent; not for the owner.

    `members`: in a core, the other processes of its engine, whose ends are noted before its own.
    """
    name = own_name()
    for logger in map(logging.getLogger, LOGGERS):
        if not any(isinstance(one, _Keeper) for one in logger.handlers):
            logger.addHandler(_Keeper(name, members))
    registered = _file(MEMBER)
    if registered is not None and name:
        member = Member(name, log_of("stdout"), log_of("stderr"))
        with contextlib.suppress(OSError):
            Path(f"{registered}-{os.getpid()}").write_text(json.dumps(dataclasses.asdict(member)))


def own_name() -> str:
    """What this process is in its engine; empty where it is none of vLLM's."""
    process = current_process().name
    if process.startswith("EngineCore"):
        return CORE
    if process.startswith("VllmWorker-"):
        return _rank(process)
    if "ray" in sys.modules:
        with contextlib.suppress(Exception):
            return _rank(str(sys.modules["ray"].get_runtime_context().get_actor_name() or ""))
    return ""


def _rank(name: str) -> str:
    """A rank by the name of its process (`VllmWorker-1`) or of its actor (`vllm_Worker_abc_TP1_PP0`)."""
    if found := re.fullmatch(r"VllmWorker-(\d+)", name):
        return f"rank {found[1]}"
    parts = re.findall(r"_((?:PCP|TP|PP)\d+)", name)
    if len(parts) == 1:
        return f"rank {parts[0].lstrip('TPC')}"
    return f"rank {' '.join(parts)}" if parts else name and f"rank {name}"


def log_of(stream: str) -> str:
    """The file that a stream of this process goes to; empty where it is none."""
    try:
        target = os.readlink(f"/proc/self/fd/{1 if stream == 'stdout' else 2}")
    except OSError:
        return ""
    return target if target.startswith("/") and not target.startswith("/dev/") and os.path.isfile(target) else ""


class Members:
    """The other processes of an engine core's engine on this host; notes their ends.

    Problem: a core learns of a rank's death by its connections too, which close before the process has ended, and once
    its own error is sent the owner reads the notes. So the core waits with it (`settle`) until the rank's end is noted.
    """

    def __init__(self) -> None:
        self._watched = exit_status.Watched()
        self._members: dict[int, Member] = {}
        self._noted = threading.Event()

    def settle(self, timeout_s: float) -> None:
        """Wait until the end of a member is noted: at most `timeout_s`, and up to ENDING_S more while one is ending.
        Without members it returns at once."""
        if not self._members or self._noted.wait(timeout_s):
            return
        deadline = time.monotonic() + ENDING_S
        while time.monotonic() < deadline and any(map(exit_status.is_ending, list(self._members))):
            if self._noted.wait(LOOK_S):
                return

    def wait(self, timeout_s: float) -> None:
        """Find new ones, then wait for the end of one, at most `timeout_s`."""
        self._members |= _members(self._members)
        gone = [(pid, exit_status.UNKNOWN) for pid in self._watched.add(self._members)]
        for pid, how in gone or self._watched.wait(timeout_s):
            member = self._members[pid]
            code = re.search(r"exit code \d+|SIGTERM", how)
            if exit_status.UNKNOWN in how:
                how = _last_words(member) or how
            note("ended" if code else "killed", f"{member.name} (process {pid}) {how}", member.log)
            self._noted.set()


def note_early_ends() -> None:
    """Note, in an engine core, the exit codes of ranks that end before they are ready; vLLM ignores them."""
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
                process.join(exit_status.STATUS_WITHIN_S)  # its files are closed before it has ended
                if code := process.exitcode:
                    who = f"{_rank(process.name)} (process {process.pid})"
                    note("killed" if code < 0 else "ended", f"{who} {exit_status.said(code)}", log_of("stdout"))
            raise

    WorkerProc.wait_for_ready = staticmethod(wait_for_ready)


def _members(known: Mapping[int, Member]) -> dict[int, Member]:
    members, found = _file(MEMBER), {}
    for file in members.parent.glob(f"{members.name}-*") if members is not None else ():
        with contextlib.suppress(OSError, ValueError, TypeError):  # it is being written
            pid = int(file.name.rpartition("-")[2])
            if pid != os.getpid() and pid not in known:
                found[pid] = Member(**json.loads(file.read_text()))
    return found


def _last_words(member: Member) -> str:
    """How a process ended by what a crash handler wrote at the end of its log."""
    for log in filter(None, (member.error_log, member.log)):
        with contextlib.suppress(OSError), open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - (64 << 10)))
            if found := _CRASH.findall(file.read().decode(errors="replace")):
                signal, python = found[-1]
                return f"was killed by {signal}" if signal else f"crashed: {python}"
    return ""


def found(engine: str, *, recent: bool = False) -> str:
    """Why an engine of this process has ended, with the log of the process that ended it; empty where nothing was
    noted. `engine`: what `named` gave. `recent`: it was up, so that older errors are not the reason."""
    notes = [one for one in _notes(engine) if not recent or time.time() - one.at < RECENT_S]
    errors = [one for one in notes if one.kind == "error"]
    killed = [one for one in notes if one.kind == "killed"]
    if killed and (not errors or killed[0].at <= errors[0].at + TOGETHER_S):
        return with_log(killed[0].text, killed[0].log)
    first = next(iter(errors or notes), None)
    return with_log(first.text, first.log) if first is not None else ""


def with_log(reason: str, log: str) -> str:
    """A reason with the file in which to read more."""
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
