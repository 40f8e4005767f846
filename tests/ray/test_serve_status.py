"""From Serve's own words to what the controller decides on."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.policy.catalog.reconcile import Observed
from cluster.ray.serve_status import application_name, observed
from cluster.worker.settings import ModelRefused

APP = "m@v2+d1"


def application(**worker: Any) -> dict[str, Any]:
    """One application as Serve tells it."""
    plain: dict[str, Any] = {
        "status": "UPDATING",
        "message": "",
        "deployment_config": {"user_config": {"digest": "d1", "gpu": "H100"}},
        "target_num_replicas": 2,
        "replicas": [],
    }
    return {
        "status": "DEPLOYING",
        "message": "",
        "last_deployed_time_s": 5.0,
        "deployments": {"worker": plain | worker},
    }


def one(app: dict[str, Any]) -> Observed:
    """What is made of an application of ours."""
    return observed({"applications": {application_name("test", APP): app}}, "test")[APP]


def test_foreign_applications_are_left_out() -> None:
    """Only a whole prefix makes an application ours; another cluster's may begin alike."""
    names = ["test:a", "test:b", "test2:c", "tes:d", "theirs", "test"]
    assert set(observed({"applications": {name: application() for name in names}}, "test")) == {"a", "b"}
    assert observed({}, "test") == {}


def test_replicas_are_counted_by_state() -> None:
    """A starting replica counts as placed once it has a process."""
    replicas = [
        {"state": "RUNNING", "pid": 1},
        {"state": "STARTING", "pid": 2},
        {"state": "STARTING", "pid": None},
        {"state": "STOPPING", "pid": 3},
    ]
    seen = one(application(replicas=replicas))
    assert seen == Observed(
        "m", "d1", target=2, running=1, placed=1, leaving=1, deployed_at_s=5.0, version="v2", named=APP, gpu="H100"
    )


def test_refusal_and_bad_luck() -> None:
    """A refusal's reason is told whole; of any other trace its last line."""
    refused = one(application(message=f"failed to start. Retrying\nTraceback\n{ModelRefused('no such folder')}"))
    assert (refused.refused, refused.gave_up, refused.trouble) == (True, False, "no such folder")
    broken = one(application(status="DEPLOY_FAILED", message="The deployment failed to start 2 times\nOSError: disk\n"))
    assert (broken.refused, broken.gave_up, broken.trouble) == (False, True, "OSError: disk")
    died = "models[m]: the engine did not come up: rank 1 (process 7) was killed by SIGSEGV; log: /a.b: c"
    trace = f"The deployment failed to start 2 times\ncluster.api.ports.EngineDead: {died}\n"
    assert one(application(status="DEPLOY_FAILED", message=trace)).trouble == f"EngineDead: {died}"
    assert one(application(message="2 replicas have taken more than 30s to be scheduled")).trouble == ""


@pytest.mark.parametrize("deployments", [{}, {"worker": {"replicas": None, "deployment_config": None}}])
def test_what_has_just_been_taken_shows_nothing(deployments: dict[str, Any]) -> None:
    """Before Serve has made the deployment there is neither digest nor target."""
    app = {**application(), "deployments": deployments}
    assert one(app) == Observed("m", "", 0, deployed_at_s=5.0, version="v2", named=APP)


def test_deleting() -> None:
    """An application on its way out is told as such."""
    assert one({**application(), "status": "DELETING"}).deleting
