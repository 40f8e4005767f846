"""With `secrets.create`, the chart makes its Secret at the first installation and keeps the Secret at later
upgrades.

Helm must be able to read from the cluster, to find the existing Secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import helm, kubernetes_reads
from tests.support.kubernetes_reads import ACCOUNT

pytestmark = pytest.mark.slow

KEYS = ("cluster", "key-pepper", "database-password", "auth_token")
OWNED = {
    "name": "headrace-secrets",
    "labels": {"app.kubernetes.io/managed-by": "Helm"},
    "annotations": {"meta.helm.sh/release-name": "headrace", "meta.helm.sh/release-namespace": "headrace"},
}


def secret(*keys: str) -> dict[str, Any]:
    """Return the Secret of an earlier install of the release. `keys`: the keys of the Secret's data."""
    data = dict.fromkeys(keys, "b2xk")
    return {"secrets/headrace-secrets": {"apiVersion": "v1", "kind": "Secret", "metadata": OWNED, "data": data}}


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a copy of the chart that renders only the Secret."""
    return kubernetes_reads.chart_of(tmp_path_factory.mktemp("charts"), "secrets.yaml")


def rendered(chart: Path, objects: Mapping[str, Any], *arguments: str) -> dict[str, Any]:
    """Return the Secret that the chart renders for a cluster with these objects. Raises HelmFailed."""
    text = kubernetes_reads.rendered(chart, objects, "--set", "secrets.create=true", *arguments)
    (manifest,) = yaml.safe_load_all(text)
    assert manifest["metadata"]["name"] == "headrace-secrets"
    return dict(manifest)


def test_the_first_install_makes_the_secret(chart: Path) -> None:
    """The first install makes the Secret that all pods need. The Secret is immutable and outlives the release."""
    made = rendered(chart, ACCOUNT)
    assert made["immutable"] is True
    assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert set(made["data"]) == set(KEYS)
    assert len(set(made["data"].values())) == len(KEYS)


@pytest.mark.parametrize("arguments", [(), ("--is-upgrade",)])
def test_what_is_there_is_kept(chart: Path, arguments: tuple[str, ...]) -> None:
    """An existing Secret is kept, since a new Secret would invalidate every API key."""
    made = rendered(chart, {**ACCOUNT, **secret(*KEYS)}, *arguments)
    assert made["data"] == dict.fromkeys(KEYS, "b2xk")


@pytest.mark.parametrize(
    ("objects", "arguments", "words"),
    [
        ({}, (), "the namespace headrace cannot be seen from here"),
        (ACCOUNT, ("--is-upgrade",), "the Secret headrace-secrets is gone"),
        ({**ACCOUNT, **secret("cluster")}, ("--is-upgrade",), "the Secret headrace-secrets has no key key-pepper"),
    ],
)
def test_no_second_pepper_is_made(
    chart: Path, objects: Mapping[str, Any], arguments: tuple[str, ...], words: str
) -> None:
    """The chart refuses to make a second key pepper, which would silently invalidate every API key."""
    with pytest.raises(helm.HelmFailed, match=words):
        rendered(chart, objects, *arguments)
