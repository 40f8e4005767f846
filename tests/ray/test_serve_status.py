"""Tests of the conversion of Serve's status to the controller's `Observed`."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.policy.catalog.reconcile import Observed
from cluster.ray.serve_status import application_name, observed
from cluster.worker.settings import ModelRefused

APP = "m@v2+d1"


def application(**worker: Any) -> dict[str, Any]:
    """Return an application in the form that Serve reports."""
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


def converted(app: dict[str, Any]) -> Observed:
    """Return the `Observed` of one of this cluster's applications."""
    return observed({"applications": {application_name("test", APP): app}}, "test")[APP]


def test_foreign_applications_are_left_out() -> None:
    """An application belongs to the cluster only if the part of its name before the colon equals the cluster's name."""
    names = ["test:a", "test:b", "test2:c", "tes:d", "theirs", "test"]
    assert set(observed({"applications": {name: application() for name in names}}, "test")) == {"a", "b"}
    assert observed({}, "test") == {}


def test_replicas_are_counted_by_state() -> None:
    """Replicas are counted by state, and a starting replica counts as placed once the replica has a process."""
    replicas = [
        {"state": "RUNNING", "pid": 1},
        {"state": "STARTING", "pid": 2},
        {"state": "STARTING", "pid": None},
        {"state": "STOPPING", "pid": 3},
    ]
    seen = converted(application(replicas=replicas))
    assert seen == Observed(
        "m", "d1", target=2, running=1, placed=1, leaving=1, deployed_at_s=5.0, version="v2", named=APP, gpu="H100"
    )


def test_refusal_and_bad_luck() -> None:
    """If a model is refused, the reported reason is the whole error of its application. For any other failure, it is
    only the last line of the traceback."""
    refused = converted(application(message=f"failed to start. Retrying\nTraceback\n{ModelRefused('no such folder')}"))
    assert (refused.refused, refused.gave_up, refused.trouble) == (True, False, "no such folder")
    broken = converted(
        application(status="DEPLOY_FAILED", message="The deployment failed to start 2 times\nOSError: disk\n")
    )
    assert (broken.refused, broken.gave_up, broken.trouble) == (False, True, "OSError: disk")
    died = "models[m]: the engine did not come up: rank 1 (process 7) was killed by SIGSEGV; log: /a.b: c"
    trace = f"The deployment failed to start 2 times\ncluster.api.ports.EngineDead: {died}\n"
    assert converted(application(status="DEPLOY_FAILED", message=trace)).trouble == f"EngineDead: {died}"
    assert converted(application(message="2 replicas have taken more than 30s to be scheduled")).trouble == ""


@pytest.mark.parametrize("deployments", [{}, {"worker": {"replicas": None, "deployment_config": None}}])
def test_what_has_just_been_taken_shows_nothing(deployments: dict[str, Any]) -> None:
    """After Serve has accepted an application, it creates the application's deployment. Until then, the observed
    application has no digest, and its target number of replicas is 0."""
    app = {**application(), "deployments": deployments}
    assert converted(app) == Observed("m", "", 0, deployed_at_s=5.0, version="v2", named=APP)


def test_deleting() -> None:
    """An application that is being deleted is marked as deleting."""
    assert converted({**application(), "status": "DELETING"}).deleting
