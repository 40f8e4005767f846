"""Failover demo: kill the worker that is generating an answer. Another worker resumes the answer.

`make demo-failover` runs the demo. The demo starts a local cluster with two workers, sends the same question twice, and
stops the cluster. The worker is killed during the second answer. The exit code is 0 if both answers are equal and the
second answer was resumed.
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
WORKERS, BOTH_UP_S, POLL_S, CPU_S = 2, 240.0, 0.5, 0.15
ENGINE, REPLICA = "VLLM::EngineCore", "ServeReplica"


class CannotShow(Exception):
    """Error: the demo cannot be shown. The message gives the reason."""


def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a `headrace` command and capture its output."""
    command = [sys.executable, "-m", "cluster.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def wait_for_both(run: RunFolder) -> None:
    """Wait until both workers are linked. Raises CannotShow after BOTH_UP_S seconds."""
    deadline = time.monotonic() + BOTH_UP_S
    endpoints = run.endpoints()
    while time.monotonic() < deadline:
        status = headrace("status", "--json", "--endpoint", endpoints["grpc"], "--admin", endpoints["admin"])
        if status.returncode == 0 and len(json.loads(status.stdout)["workers"]) >= WORKERS:
            return
        time.sleep(POLL_S)
    raise CannotShow(f"the {WORKERS} workers were not up within {BOTH_UP_S:g} s; logs: {run.path}")


def busy_worker(run: RunFolder) -> psutil.Process:
    """Return the replica process whose engine uses the most CPU time now.

    Raises CannotShow if there is no engine process, or if that engine belongs to no replica.
    """
    processes = [psutil.Process(pid) for pid in reaper.find(run.instance()) if psutil.pid_exists(pid)]
    engines = [process for process in processes if ENGINE in " ".join(process.cmdline())]
    before = {engine.pid: sum(engine.cpu_times()[:2]) for engine in engines}
    time.sleep(CPU_S)
    if not engines:
        raise CannotShow("no engine process was found")
    busiest = max(engines, key=lambda engine: sum(engine.cpu_times()[:2]) - before[engine.pid])
    replica = next((parent for parent in busiest.parents() if REPLICA in " ".join(parent.cmdline())), None)
    if replica is None:
        raise CannotShow(f"the engine {busiest.pid} belongs to no replica")
    return replica


def show(run: RunFolder) -> bool:
    """Send the question twice, and kill the busy worker during the second answer.

    Returns whether the answers are equal and the second call was resumed.
    """
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
    comparison = "identical to" if same else "DIFFERENT from"
    print(
        f"\n\nworker process {killed} was killed with SIGKILL; the longest pause after that was {pause_s * 1000:.0f} ms"
    )
    print(f"the call was resumed on another worker {resumed} time(s); its text is {comparison} the undisturbed answer")
    return same and resumed > 0


def main() -> int:
    """Start the cluster, run the demo and stop the cluster. Returns the exit code."""
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
        print(headrace("down", NAME, "--yes").stdout.rstrip())


if __name__ == "__main__":
    sys.exit(main())
