"""Helm hooks of the chart: the configuration is checked before any object of the release changes.

The check uses only objects that exist before the release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.all_commands import app
from tests.support import helm
from tests.support.helm import Rendered

pytestmark = pytest.mark.slow

HELM = "helm.sh/hook"
ARGO = "argocd.argoproj.io/hook"
BEFORE = {"pre-install", "pre-upgrade"}


def hooks(item: dict[str, Any]) -> set[str]:
    """Return the Helm hook phases of an object; empty for an ordinary object of the release."""
    named = item["metadata"].get("annotations", {}).get(HELM, "")
    return set(filter(None, named.split(",")))


def weight(item: dict[str, Any]) -> int:
    """Return an object's order among the hooks of its phase."""
    return int(item["metadata"]["annotations"].get("helm.sh/hook-weight", "0"))


def needs(job: dict[str, Any]) -> set[tuple[str, str]]:
    """Return (kind, name) of the objects that the pod of a Job needs to start."""
    spec = job["spec"]["template"]["spec"]
    needed = {("ServiceAccount", spec["serviceAccountName"])}
    for volume in spec["volumes"]:
        if "configMap" in volume:
            needed.add(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            needed.add(("Secret", volume["secret"]["secretName"]))
    if "priorityClassName" in spec:
        needed.add(("PriorityClass", spec["priorityClassName"]))
    return needed


@pytest.mark.parametrize("url", ["", "redis://:password@valkey:6379/0"])
def test_the_check_needs_nothing_that_comes_later(url: str) -> None:
    """The configuration check needs no object of the release.

    At the first install such objects do not exist, and the check would wait for them forever.
    """
    rendered = helm.template({"config": {"store": {"limits_url": url}}, "priorityClasses": {"create": True}})
    job = rendered.only("Job", "headrace-check")
    assert hooks(job) == BEFORE
    for kind, name in needs(job):
        item = rendered.only(kind, name)
        assert hooks(item) == BEFORE, (kind, name)
        assert weight(item) < weight(job)
    policy = rendered.only("NetworkPolicy", "headrace-check")
    assert (hooks(policy), policy["spec"]["policyTypes"]) == (BEFORE, ["Ingress", "Egress"])
    assert "egress" not in policy["spec"]


def test_the_check_reads_what_gateways_will_read(preset: Rendered) -> None:
    """The configuration check reads the same text as the gateways, with the same image."""
    job = preset.only("Job", "headrace-check")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (gateway,) = (
        item["spec"]["template"]["spec"]["containers"][0]
        for item in preset.objects
        if item["metadata"]["name"] == "headrace-gateway" and "template" in item.get("spec", ())
    )
    assert container["image"] == gateway["image"]
    held = {
        name: item
        for kind in ("ConfigMap", "Secret")
        for item in preset.all(kind)
        for name in [item["metadata"]["name"]]
    }
    checked, used = held["headrace-check"], held["headrace-config"]
    assert {**checked.get("data", {}), **checked.get("stringData", {})}["cluster.yaml"] == preset.cluster_yaml
    assert checked["kind"] == used["kind"]


def test_the_check_passes_presets_and_fails_a_wrong_model(preset: Rendered, tmp_path: Path) -> None:
    """The configuration check exits with 0 for each preset, and with 2 for a wrong model.

    Exit code 2 fails the check's Job at once.
    """
    job = preset.only("Job", "headrace-check")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (mount,) = (item["mountPath"] for item in container["volumeMounts"] if item["name"] == "config")
    file = tmp_path / "cluster.yaml"
    arguments = [str(item).replace(f"{mount}/cluster.yaml", str(file)) for item in container["args"]]
    assert container["command"] == ["headrace"]
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    for text, code in ((preset.cluster_yaml, 0), (preset.cluster_yaml.replace("source: ", "source: x-"), 2)):
        file.write_text(text)
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code, done.stderr
    assert rule["onExitCodes"]["values"] == [2]
    assert "models[0].source" in done.stderr


def test_the_tables_are_made_beside_the_release_under_argo_cd(preset: Rendered) -> None:
    """Under Argo CD, the Job that creates the database tables runs in the phase Sync, together with the release.

    An annotation of the Job sets this phase. Without it, Argo CD would derive phases from the Job's Helm hooks,
    among them PreSync. In PreSync of the first sync, neither the Job's service account nor a database exists.
    """
    job = preset.only("Job", "headrace-database")
    assert job["metadata"]["annotations"][ARGO] == "Sync"
    assert "BeforeHookCreation" in job["metadata"]["annotations"][f"{ARGO}-delete-policy"]
    for kind, name in needs(job):
        if kind == "ServiceAccount":
            assert hooks(preset.only(kind, name)) == set()
