"""Tests of the chart: Helm's lint and package, upgrades without restarts, and the schema of every object."""

from __future__ import annotations

import copy
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.policy.tenants.revocation_list import RevocationList
from tests.support import helm
from tests.support import kubernetes_schemas as schemas
from tests.support.helm import Rendered

pytestmark = pytest.mark.slow

needs_definitions = pytest.mark.skipif(
    not schemas.CRDS.is_dir(), reason=f"optional data: no definitions of custom resources in {schemas.CRDS}"
)

MAYBE_UNDEFINED = {"BackendTLSPolicy", "Route"}
"""Kinds whose definitions the folder may lack."""


@pytest.mark.parametrize("values", [None, *helm.PRESETS], ids=lambda file: file.stem if file else "defaults")
def test_helm_finds_no_fault(values: Path | None) -> None:
    """`helm lint --strict` passes with the defaults and with each preset."""
    helm.run("lint", "--strict", helm.CHART, *(["-f", str(values)] if values else []))


def test_the_package_holds_what_is_rendered(tmp_path: Path) -> None:
    """The chart's package contains the alert rules and the values schema.

    It renders the same objects as the chart's folder.
    """
    helm.run("package", helm.CHART, "-d", tmp_path)
    (package,) = tmp_path.glob("headrace-*.tgz")
    with tarfile.open(package) as whole:
        names = whole.getnames()
    assert "headrace/values.schema.json" in names
    assert "headrace/files/alerts/headrace.yaml" in names
    preset = helm.PRESETS[0]
    by_package = helm.run("template", "headrace", package, "-n", helm.NAMESPACE, "-f", preset)
    assert by_package == helm.run("template", "headrace", helm.CHART, "-n", helm.NAMESPACE, "-f", preset)


@pytest.mark.parametrize("release", schemas.RELEASES)
def test_the_api_takes_every_object(preset: Rendered, release: str) -> None:
    """The Kubernetes API's strict schemas accept every built-in object. Custom resources are not checked here."""
    for item in preset.objects:
        if schemas.is_built_in(item):
            schemas.check_built_in(item, release)
        else:
            assert "." in item["apiVersion"].split("/")[0], item["kind"]


@needs_definitions
def test_operators_take_every_object(preset: Rendered) -> None:
    """Each custom resource satisfies its definition, and no field of it would be pruned.

    If a definition is missing, the test is skipped with the name of the kind.
    """
    unknown = schemas.without_definition(preset.objects)
    assert set(unknown) <= MAYBE_UNDEFINED
    kinds = set()
    for item in preset.objects:
        if not schemas.is_built_in(item) and item["kind"] not in unknown:
            schemas.check_custom(item)
            kinds.add(item["kind"])
    assert "RayCluster" in kinds
    if unknown:
        pytest.skip(
            f"optional data: no definition of {', '.join(unknown)} in {schemas.CRDS}; {len(kinds)} kinds passed"
        )


@needs_definitions
def test_the_schemas_see_what_is_wrong() -> None:
    """The schemas refuse misspelt and missing fields in built-in objects and in custom resources, and wrong types."""
    rendered = helm.template(next(path for path in helm.PRESETS if path.stem == "multi-tenant"))

    def without(item: dict[str, Any], *path: str) -> dict[str, Any]:
        changed = copy.deepcopy(item)
        at = changed
        for key in path[:-1]:
            at = at[key]
        at[path[-1] + "s"] = at.pop(path[-1])
        return changed

    service = rendered.only("Service", "headrace-links")
    for release in schemas.RELEASES:
        with pytest.raises(schemas.Invalid, match="publishNotReadyAddressess"):
            schemas.check_built_in(without(service, "spec", "publishNotReadyAddresses"), release)
    cluster = rendered.only("RayCluster")
    with pytest.raises(schemas.Invalid, match="rayStartParamss"):
        schemas.check_custom(without(cluster, "spec", "headGroupSpec", "rayStartParams"))
    misspelt, mistyped = copy.deepcopy(cluster), copy.deepcopy(cluster)
    spec = misspelt["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    spec["serviceAccountNames"] = spec.pop("serviceAccountName")
    mistyped["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "eight"
    with pytest.raises(schemas.Invalid, match="serviceAccountNames"):
        schemas.check_custom(misspelt)
    with pytest.raises(schemas.Invalid, match="maxReplicas"):
        schemas.check_custom(mistyped)


def template_of(rendered: Rendered, name: str) -> Any:
    """Return the pod template of a workload."""
    (manifest,) = (
        item for item in rendered.objects if item["metadata"]["name"] == name and "template" in item.get("spec", ())
    )
    return manifest["spec"]["template"]


def test_a_new_model_restarts_no_gateway() -> None:
    """A new model restarts no gateway, since the controller announces the model. A change to a
    setting that a gateway reads at its start does restart the gateways.
    """
    preset = next(path for path in helm.PRESETS if path.stem == "local-cpu")
    before = helm.template(preset)
    models = [{"name": "other", "source": "demo://smollm2"}]
    new_model = helm.template(preset, {"config": {"models": models}})
    new_queue = helm.template(preset, {"config": {"gateway": {"queue": {"max_requests": 7}}}})
    assert template_of(new_model, "headrace-gateway") == template_of(before, "headrace-gateway")
    assert template_of(new_model, "headrace-controller") != template_of(before, "headrace-controller")
    assert template_of(new_queue, "headrace-gateway") != template_of(before, "headrace-gateway")
    assert new_model.only("RayCluster") == before.only("RayCluster"), "workers stay too"


def test_images_come_from_the_site() -> None:
    """If the values name an image registry, every image is pulled from it, the images of PostgreSQL and Valkey
    included."""
    name = "registry.inside:5000/team"
    airgapped = next(path for path in helm.PRESETS if path.stem == "local-cpu")
    rendered = helm.template(airgapped, {"global": {"imageRegistry": name}, "imagePullSecrets": [{"name": "pull"}]})
    images: list[str] = []
    unsigned: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "containers" in value and value.get("imagePullSecrets") != [{"name": "pull"}]:
                unsigned.append(str(value["containers"][0]["name"]))
            images.extend(item for key, item in value.items() if key == "image" and isinstance(item, str))
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(list(rendered.objects))
    assert len(images) >= 7
    assert [item for item in images if not item.startswith(f"{name}/")] == []
    assert unsigned == []


def test_a_digest_pins_an_image() -> None:
    """An image with a digest is pinned to the digest, which overrides the tag."""
    digest = "sha256:" + "0" * 64
    rendered = helm.template({"image": {"tag": "9", "gateway": {"repository": "x/y", "digest": digest}}})
    spec = template_of(rendered, "headrace-gateway")["spec"]
    assert spec["containers"][0]["image"] == f"x/y@{digest}"
    assert template_of(rendered, "headrace-controller")["spec"]["containers"][0]["image"] == "headrace/controller:9"


def test_extra_objects_are_templates() -> None:
    """Extra objects are rendered as templates, which can use the release's name and namespace."""
    extra = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": '{{ include "headrace.name" . }}-more'},
        "data": {"in": "{{ .Release.Namespace }}"},
    }
    manifest = helm.template({"extraObjects": [extra]}).only("ConfigMap", "headrace-more")
    assert manifest["data"] == {"in": helm.NAMESPACE}


def test_revoked_certificates_reach_the_gateways() -> None:
    """The gateway's configuration names the mounted file of revoked certificates, so that the gateway refuses them."""
    lines = ["0A:1B", "0C\tCN=headrace link authority\tstolen"]
    rendered = helm.template({"revoked": {"links": lines}})
    held = rendered.only("ConfigMap", "headrace-revoked")["data"]
    assert [item.line() for item in RevocationList.parse(held["links"]).entries] == [
        "A1B",
        "C\tCN=headrace link authority\tstolen",
    ]
    assert not RevocationList.parse(held["clients"])
    spec = template_of(rendered, "headrace-gateway")["spec"]
    (volume,) = (item for item in spec["volumes"] if item.get("configMap", {}).get("name") == "headrace-revoked")
    mounts = {item["name"]: item["mountPath"] for item in spec["containers"][0]["volumeMounts"]}
    gateway = yaml.safe_load(rendered.cluster_yaml)["gateway"]
    for section, name in (("link_tls", "links"), ("tls", "clients")):
        assert gateway[section]["revoked_serials_file"] == f"{mounts[volume['name']]}/{name}"


def test_two_clusters_side_by_side() -> None:
    """A Helm release can have two Ray clusters. Each has its own image, Ray version, network policy and storage
    namespace.

    The section `ray` of the configuration may name only one of the two clusters.
    """
    url = "http://headrace-green-head-svc:8265"
    used = [{"name": "green", "dashboard_url": url, "token_file": "/secrets/ray-token"}]
    group = {"name": "gpu", "gpusPerNode": 1, "minReplicas": 0, "maxReplicas": 1}
    clusters = [
        {"name": "blue", "workerGroups": [group]},
        {"name": "green", "image": "headrace/worker-cuda:next", "version": "2.99.0", "workerGroups": [group]},
    ]
    values = {"config": {"ray": used}, "ray": {"clusters": clusters}, "valkey": {"address": "valkey:6379"}}
    rendered = helm.template(values)
    blue, green = (rendered.only("RayCluster", f"headrace-{name}") for name in ("blue", "green"))
    assert green["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] == "headrace/worker-cuda:next"
    assert (blue["spec"]["rayVersion"], green["spec"]["rayVersion"]) == ("2.60.0", "2.99.0")
    spaces = [item["spec"]["gcsFaultToleranceOptions"]["externalStorageNamespace"] for item in (blue, green)]
    assert len(set(spaces)) == 2
    assert {item["metadata"]["name"] for item in rendered.all("NetworkPolicy")} >= {"headrace-blue", "headrace-green"}


def test_notes_tell_the_next_step() -> None:
    """`helm install` ends with notes on how to create the secrets and a key, and how to make the first call."""
    text = helm.run(
        "install", "headrace", helm.CHART, "-n", "ns", "--dry-run=client", "-f", helm.PRESETS[0], "--hide-secret"
    )
    notes = text.split("NOTES:")[1]
    assert "headrace pod secrets -n ns --name headrace --authority authority | kubectl create -f -" in notes
    assert "headrace keys create trial" in notes
    assert "headrace chat default" in notes


def test_every_value_has_a_description() -> None:
    """Each key of the schema has a description, which values.yaml and the chart's README repeat."""
    schema = yaml.safe_load((helm.CHART / "values.schema.json").read_text())
    readme = (helm.CHART / "README.md").read_text()
    definitions = {name: node for name, node in schema["$defs"].items() if not name.startswith("Config.")}
    bare: list[str] = []

    def walk(node: Any, where: str) -> None:
        if isinstance(node, list):
            for at, item in enumerate(node):
                walk(item, f"{where}[{at}]")
        if not isinstance(node, dict):
            return
        bare.extend(f"{where}.{key}" for key, item in node.get("properties", {}).items() if not item.get("description"))
        for key, item in node.items():
            if key != "config":  # docs/reference/configuration.md describes the program's own keys
                walk(item, f"{where}.{key}")

    walk({"values": {**schema, "$defs": {}}, "definitions": definitions}, "")
    assert not bare
    for key in (*schema["properties"], "ray.clusters[].workerGroups[].podTemplate", "networkPolicy.dns.ports"):
        assert f"| `{key}` |" in readme


def test_values_documented_are_the_schemas() -> None:
    """values.yaml and the schema name the same top-level keys, and the defaults satisfy the schema."""
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())
    schema = yaml.safe_load((helm.CHART / "values.schema.json").read_text())
    assert values.keys() == schema["properties"].keys()
