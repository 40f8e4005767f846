"""The process that talks to Ray: `python -m cluster.ray.driver`, with JSON in and JSON out.

The controller itself never joins Ray: a process that has joined ends when its Ray ends, waits without limit on a Ray
that hangs, and keeps one Ray's token for life. So for a local Ray this runs as the controller's child and takes one
request a line on standard input until that closes; on a cluster it runs as a Ray job with its requests as the argument.
A request is `{"do": observe | deploy | scale | delete | shutdown, ...}`, an answer `{"ok": ...}` or `{"error": text}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from cluster.worker import settings as replica_settings

if TYPE_CHECKING:
    from cluster.ray.applications import ServeApps

ANSWER = "HEADRACE-ANSWER "
"""What marks an answer's line in a job's log."""


def carry_out(apps: ServeApps, request: Mapping[str, Any]) -> object:
    """Do one request. Raises whatever Ray raises, ValueError for a request that it does not know."""
    todo: dict[str, Callable[[], object]] = {
        "observe": apps.observe,
        "deploy": lambda: apps.deploy(replica_settings.from_json(request["settings"])),
        "scale": lambda: apps.scale(request["app"], request["replicas"]),
        "delete": lambda: apps.delete(request["app"]),
        "shutdown": apps.shutdown,
    }
    if request.get("do") not in todo:
        raise ValueError(f"request: do must be one of {', '.join(todo)}, not {request.get('do')!r}")
    return todo[request["do"]]()


def answer_all(apps: ServeApps, requests: Iterable[str], out: TextIO, mark: str = "") -> int:
    """Answer each line; returns how many failed."""
    failed = 0
    for line in requests:
        try:
            answer: dict[str, object] = {"ok": carry_out(apps, json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
            failed += 1
        print(mark + json.dumps(answer), file=out, flush=True)
    return failed


def main(arguments: list[str]) -> int:
    """`driver CLUSTER ADDRESS [REQUESTS]`: REQUESTS a JSON list; without it, a line each on standard input."""
    from cluster.ray.applications import ServeApps

    cluster, address, *rest = arguments
    apps = ServeApps(cluster)
    if rest:
        apps.connect(address)
        return 1 if answer_all(apps, [json.dumps(r) for r in json.loads(rest[0])], sys.stdout, ANSWER) else 0
    # Ray and its children print on descriptor 1: keep the answers' pipe apart, and give them standard error.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    apps.connect(address)
    print(json.dumps({"ok": "connected"}), file=out, flush=True)
    answer_all(apps, sys.stdin, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
