"""`make demo-failover`: two workers, one long sentence, and the worker that writes it is killed in mid-sentence.

Starts a local cluster of its own, asks once undisturbed and once with the kill, and stops everything again. Exit code 0
when both answers are the same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from cluster.cli.local.run_folder import RunFolder
from cluster.client import Client
from cluster.ray import reaper

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "deploy" / "failover.yaml"
NAME = "failover"
QUESTION = "Write a long story about a river that finds its way from the mountains to the sea."
TOKENS, KILL_AT_PIECE = 120, 40
WORKERS, BOTH_UP_S, LOOK_S, CPU_S = 2, 240.0, 0.5, 0.15
ENGINE, REPLICA = "VLLM::EngineCore", "ServeReplica"


class CannotShow(Exception):
    """Something is missing; the message says what."""


def headrace(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of the shell, its output kept."""
    command = [sys.executable, "-m", "cluster.cli.main", *words]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def wait_for_both(run: RunFolder) -> None:
    """Until both workers are linked."""
    deadline = time.monotonic() + BOTH_UP_S
    ends = run.endpoints()
    while time.monotonic() < deadline:
        told = headrace("status", "--json", "--endpoint", ends["grpc"], "--admin", ends["admin"])
        if told.returncode == 0 and len(json.loads(told.stdout)["workers"]) >= WORKERS:
            return
        time.sleep(LOOK_S)
    raise CannotShow(f"only one worker came up within {BOTH_UP_S:g} s; logs: {run.path}")


def busy_worker(run: RunFolder) -> psutil.Process:
    """The replica's process whose engine computes now."""
    found = [psutil.Process(pid) for pid in reaper.find(run.instance()) if psutil.pid_exists(pid)]
    engines = [one for one in found if ENGINE in " ".join(one.cmdline())]
    before = {one.pid: sum(one.cpu_times()[:2]) for one in engines}
    time.sleep(CPU_S)
    if not engines:
        raise CannotShow("no engine process was found")
    busiest = max(engines, key=lambda one: sum(one.cpu_times()[:2]) - before[one.pid])
    replica = next((one for one in busiest.parents() if REPLICA in " ".join(one.cmdline())), None)
    if replica is None:
        raise CannotShow(f"the engine {busiest.pid} belongs to no replica")
    return replica


def show(run: RunFolder) -> bool:
    """Ask twice; whether the answers are the same."""
    with Client(run.endpoints()["grpc"], timeout_s=120) as client:
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS}
        undisturbed = client.chat("default", QUESTION, **options).text
        print(f"\n> {QUESTION}\n")
        stream = client.stream_chat("default", QUESTION, **options)
        last, pause_s, killed = 0.0, 0.0, 0
        for number, piece in enumerate(stream):
            now = time.monotonic()
            if killed:
                pause_s = max(pause_s, now - last)
            last = now
            print(piece, end="", flush=True)
            if number == KILL_AT_PIECE:
                killed = busy_worker(run).pid
                last = time.monotonic()
                os.kill(killed, signal.SIGKILL)
                print(f" [killed worker process {killed}] ", end="", flush=True)
        same = stream.text == undisturbed
        resumed = stream.usage.resumed if stream.usage else 0
    words = "the very words" if same else "NOT the words"
    print(
        f"\n\nworker process {killed} was killed with SIGKILL; the longest pause after it was {pause_s * 1000:.0f} ms"
    )
    print(f"the call went on at another worker {resumed} time(s); its text is {words} of an undisturbed answer")
    return same and resumed > 0


def main() -> int:
    """The exit code."""
    run = RunFolder(NAME)
    up = subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", "up", "-f", str(CONFIG), "--detach"], cwd=ROOT, check=False
    )
    if up.returncode:
        return up.returncode
    try:
        wait_for_both(run)
        return 0 if show(run) else 1
    except CannotShow as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        print(headrace("down", NAME).stdout.rstrip())


if __name__ == "__main__":
    sys.exit(main())
