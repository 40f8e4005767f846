"""Access to an existing Ray cluster: state is read over the dashboard's REST API, each change is a short Ray job.

The job runs driver.py on the Ray cluster, so `headrace` must be installed there. Replicas need `headrace` there anyway.
The dashboard's port is the only port of the Ray cluster that the controller uses.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.ray.backend import RayAway, RaySnapshot
from cluster.ray.driver import ANSWER
from cluster.ray.serve_status import observed
from cluster.worker.settings import ReplicaSettings

JOB_S = 180.0
_HTTP_S = 10.0
_POLL_S = 0.5
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobBackend:
    """A Backend for an external Ray cluster with a dashboard at `dashboard_url`.

    `token_file`: file with Ray's token, None if Ray needs no token.
    """

    def __init__(self, cluster: str, dashboard_url: str, token_file: Path | None = None) -> None:
        self._cluster = cluster
        self._url = dashboard_url.rstrip("/")
        self._token_file = token_file

    def __repr__(self) -> str:
        return f"JobBackend({self._url})"

    async def observe(self) -> RaySnapshot:
        """Return Ray's current state."""
        details = await asyncio.to_thread(self._get, "/api/serve/applications/")
        nodes = await asyncio.to_thread(self._get, "/api/v0/nodes?limit=10000&detail=true")
        rows = nodes.get("data", {}).get("result", {}).get("result", [])
        totals = tuple(row.get("resources_total") or {} for row in rows if row.get("state") == "ALIVE")
        return RaySnapshot(observed(details, self._cluster), totals)

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Deploy an application. If the application exists already, the replicas of the application are replaced."""
        await self._run({"do": "deploy", "settings": settings.to_json()})

    async def scale(self, app: str, replicas: int) -> None:
        """Set the number of replicas of an application."""
        await self._run({"do": "scale", "app": app, "replicas": replicas})

    async def delete(self, app: str) -> None:
        """Drain and remove an application."""
        await self._run({"do": "delete", "app": app})

    async def shutdown(self) -> None:
        """Shut down Serve on the Ray cluster."""
        await self._run({"do": "shutdown"})

    async def close(self) -> None:
        """Do nothing, since no connection is kept open."""

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token_file.read_text().strip()}"} if self._token_file else {}

    def _get(self, path: str) -> Mapping[str, Any]:
        request = urllib.request.Request(self._url + path, headers=self._headers())  # noqa: S310 - http(s) by config
        try:
            with urllib.request.urlopen(request, timeout=_HTTP_S) as answer:  # noqa: S310
                data = json.load(answer)
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise RayAway(f"{self._url}{path}: {error}") from error
        return data if isinstance(data, dict) else {}

    async def _run(self, request: Mapping[str, object]) -> None:
        try:
            async with asyncio.timeout(JOB_S + _HTTP_S):
                log = await asyncio.to_thread(self._job, request)
        except (RuntimeError, ConnectionError, OSError, TimeoutError) as error:
            raise RayAway(f"the job to {request['do']} on {self._url} failed: {error}") from error
        answers = [json.loads(line.split(ANSWER, 1)[1]) for line in log.splitlines() if ANSWER in line]
        if not answers or "error" in answers[-1]:
            raise RayAway(f"the job to {request['do']} failed: {answers[-1]['error'] if answers else log[-2000:]}")

    def _job(self, request: Mapping[str, object]) -> str:
        """Submit a driver job, wait until the job has ended, and return the job's log. Blocks."""
        import time

        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(self._url, headers=self._headers())
        requests = shlex.quote(json.dumps([request]))
        job = client.submit_job(
            entrypoint=f"python -m cluster.ray.driver {shlex.quote(self._cluster)} auto {requests}",
            metadata={"headrace": self._cluster},
        )
        deadline = time.monotonic() + JOB_S
        while str(client.get_job_status(job)) not in _ENDED:
            if time.monotonic() > deadline:
                client.stop_job(job)
                raise TimeoutError(f"the job did not end within {JOB_S:g} s")
            time.sleep(_POLL_S)
        return str(client.get_job_logs(job))
