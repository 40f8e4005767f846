"""The driver process, which joins Ray in place of the controller: `python -m cluster.ray.driver`.

The controller itself never joins Ray. A process that has joined a Ray cluster exits when that cluster ends, and waits
without limit when that cluster hangs. Also, such a process can never change the token with which it joined.

For a local Ray, the driver is a child process of the controller and reads one request per line from standard input
until standard input closes. On an external cluster, the driver is a Ray job that gets the requests as an argument. A
request is JSON, `{"do": observe | deploy | scale | delete | shutdown, ...}`. The answer is `{"ok": ...}` or `{"error":
text}`.
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
"""Prefix of the answer lines in a job's log."""


def carry_out(apps: ServeApps, request: Mapping[str, Any]) -> object:
    """Carry out one request. Raises Ray's errors, and ValueError for an unknown request."""
    actions: dict[str, Callable[[], object]] = {
        "observe": apps.observe,
        "deploy": lambda: apps.deploy(replica_settings.from_json(request["settings"])),
        "scale": lambda: apps.scale(request["app"], request["replicas"]),
        "delete": lambda: apps.delete(request["app"]),
        "shutdown": apps.shutdown,
    }
    if request.get("do") not in actions:
        raise ValueError(f"request: do must be one of {', '.join(actions)}, not {request.get('do')!r}")
    return actions[request["do"]]()


def answer_all(apps: ServeApps, requests: Iterable[str], out: TextIO, mark: str = "") -> int:
    """Carry out the request in each line of `requests`. Write each answer to `out` as one line that begins with `mark`.
    Returns the number of failed requests."""
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
    """Run the driver process, which carries out requests on Ray: `driver CLUSTER ADDRESS [REQUESTS]`. Returns the
    exit status.

    REQUESTS is a JSON list. Without REQUESTS, requests are read from standard input, one per line.
    """
    from cluster.ray.applications import ServeApps

    cluster, address, *rest = arguments
    apps = ServeApps(cluster)
    if rest:
        apps.connect(address)
        return 1 if answer_all(apps, [json.dumps(r) for r in json.loads(rest[0])], sys.stdout, ANSWER) else 0
    # Ray and Ray's child processes print to descriptor 1. Answers are therefore written to a copy of descriptor 1, and
    # descriptor 1 itself becomes standard error.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    apps.connect(address)
    print(json.dumps({"ok": "connected"}), file=out, flush=True)
    answer_all(apps, sys.stdin, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
