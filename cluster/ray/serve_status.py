"""Converts the application status of Ray Serve to the controller's `Observed`. Pure; reads plain dictionaries.

The dictionaries have the form of Serve's REST answer (`GET /api/serve/applications/`). Serve's client returns the same
form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.policy.catalog.reconcile import Observed, app_parts
from cluster.worker.settings import find_refusal

_MODULE_PATH = re.compile(r"^(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_]\w*: )")
SEPARATOR = ":"
"""Separator between the cluster's name and the rest of an application's name. Neither part may contain the
separator."""


def application_name(cluster: str, app: str) -> str:
    """Return the name of an application on Ray: the cluster's name, SEPARATOR and `app`.

    `app`: the name that reconcile.app_name returns.
    """
    return f"{cluster}{SEPARATOR}{app}"


def observed(details: Mapping[str, Any], cluster: str) -> dict[str, Observed]:
    """Return the applications of `cluster`, keyed by `Observed.app`. Applications of other clusters are left out."""
    prefix = cluster + SEPARATOR
    return {
        name.removeprefix(prefix): _observe(name.removeprefix(prefix), app)
        for name, app in details.get("applications", {}).items()
        if name.startswith(prefix)
    }


def _observe(name: str, app: Mapping[str, Any]) -> Observed:
    model, version, _ = app_parts(name)
    deployments: Sequence[Mapping[str, Any]] = list(app.get("deployments", {}).values())
    worker: Mapping[str, Any] = deployments[0] if deployments else {}
    replicas: Sequence[Mapping[str, Any]] = worker.get("replicas") or ()
    states = [str(r.get("state")) for r in replicas]
    user_config = (worker.get("deployment_config") or {}).get("user_config") or {}
    message = "\n".join(text for text in (worker.get("message"), app.get("message")) if text)
    failing = str(worker.get("status")) == "DEPLOY_FAILED" or str(app.get("status")) == "DEPLOY_FAILED"
    refusal = find_refusal(message)
    trouble = refusal or (_last_line(message) if failing or "failed to start" in message else "")
    return Observed(
        model=model,
        digest=str(user_config.get("digest", "")),
        target=int(worker.get("target_num_replicas") or 0),
        running=states.count("RUNNING"),
        placed=sum(
            r.get("pid") is not None and s in ("STARTING", "UPDATING", "RECOVERING")
            for r, s in zip(replicas, states, strict=True)
        ),
        leaving=states.count("STOPPING") + states.count("PENDING_MIGRATION"),
        gave_up=failing,
        refused=bool(refusal),
        trouble=trouble,
        deleting=str(app.get("status")) == "DELETING",
        deployed_at_s=float(app.get("last_deployed_time_s") or 0.0),
        version=version,
        named=name,
        gpu=str(user_config.get("gpu", "")),
    )


def _last_line(message: str) -> str:
    """Return the last non-empty line of a traceback, without the module path of the exception."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return _MODULE_PATH.sub("", lines[-1]) if lines else ""
