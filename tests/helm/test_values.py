"""Wrong values are refused with a helpful message, and values that the schema allows render to valid objects."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cluster.config.document import parse
from tests.support import helm
from tests.support import kubernetes_schemas as schemas

pytestmark = pytest.mark.slow

SCHEMA = json.loads((helm.CHART / "values.schema.json").read_text())
GROUP = {"name": "gpu", "gpusPerNode": 1, "minReplicas": 0, "maxReplicas": 1}


def cluster(**changed: Any) -> dict[str, Any]:
    """Return values with one Ray cluster. `changed`: changes of its only worker group."""
    return {"ray": {"clusters": [{"name": "blue", "workerGroups": [{**GROUP, **changed}]}]}}


def models(*entries: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """Return values with these models and one worker group of two nodes with four H100 GPUs each.

    `changed`: changes of the worker group.
    """
    group = {"gpuType": "H100", "gpusPerNode": 4, "maxReplicas": 2, **changed}
    named = [{"name": f"m{at}", "source": "hf://o/m", **entry} for at, entry in enumerate(entries)]
    return {**cluster(**group), "config": {"models": named}}


ABOVE = {"requests": {"cpu": "1500m", "memory": "3Gi"}, "limits": {"cpu": 2, "memory": "3000M"}}
"""Resources of which the request of memory is above its limit."""
SPREAD = {"pipeline_parallel_size": 2, "tensor_parallel_size": 4}
WRONG_TOGETHER = [
    (models({"name": "a"}, {"name": "a"}), 'config.models: the name "a" is used by "a" and "a"'),
    (models({"aliases": ["d"]}, {"aliases": ["d"]}), 'the name "d" is used by "m0" and "m1"'),
    (models({"fallback": ["x"]}), 'config.models[m0].fallback: there is no model "x"; there are m0'),
    (models({"fallback": ["m0"]}), '"m0" is the model itself'),
    (models({"replicas": {"min": 4, "max": 2}}), "config.models[m0].replicas: max (2) is below min (4)"),
    (
        models({"tensor_parallel_size": 8}),
        "needs 8 GPUs (tensor_parallel_size 8, pipeline_parallel_size 1) on one node",
    ),
    (
        models({**SPREAD, "pipeline_parallel_size": 4}),
        "and the worker groups of ray.clusters[blue] have 4 a node, 8 in all",
    ),
    (
        models({"gpu": "H200"}),
        "gpu is H200, and no worker group of ray.clusters[blue] has this gpuType; there are H100",
    ),
    (models({"gpu": [{"type": "L4"}, {"type": "T4"}]}), "gpu is L4, and no worker group"),
    (models({"replicas": {"min": 9}}), "replicas.min is 9, and the worker groups of ray.clusters[blue] hold 8 at most"),
    (
        models({"gpu": "H100", "replicas": {"min": 5}}, {"gpu": "H100", "tensor_parallel_size": 4}),
        "at replicas.min they need 9 GPUs of type H100 together, and the worker groups of ray.clusters[blue] have 8 at "
        "most, 1 too few",
    ),
    (
        models({"replicas": {"min": 8}}, {"gpu": [{"type": "L4"}, {"type": "H100", "tensor_parallel_size": 2}]}),
        "at replicas.min they need 9 GPUs together, and the worker groups of ray.clusters[blue] have 8 at most",
    ),
    (
        models({}, resources=ABOVE),
        "ray.clusters[blue].workerGroups[gpu].resources.requests.memory is 3Gi, above the limit",
    ),
    (
        {"gateway": {"resources": ABOVE}},
        "gateway.resources.requests.memory is 3Gi, above the limit of 3000M: raise limits",
    ),
    ({"backup": {"resources": ABOVE}}, "backup.resources.requests.memory is 3Gi"),
    ({"valkey": {"embedded": {"resources": ABOVE}}}, "valkey.embedded.resources.requests.memory is 3Gi"),
    (
        {"fullnameOverride": "team-a", "ray": {"clusters": []}},
        "names srv://_link._tcp.headrace-links, and the Service of this release is team-a-links",
    ),
    (
        {
            "postgresql": {"embedded": {"enabled": True}},
            "config": {"store": {"database_url": "postgresql+psycopg://u@pg.example.com/h"}},
        },
        "postgresql.embedded.enabled is true, and config.store.database_url names pg.example.com",
    ),
    (
        {"valkey": {"embedded": {"enabled": True}}, "config": {"store": {"limits_url": "redis://valkey.example.com"}}},
        "valkey.embedded.enabled is true, and config.store.limits_url names valkey.example.com",
    ),
    (
        {"config": {"gateway": {"listen": {"http": "0.0.0.0:50051"}}}},
        "config.gateway.listen.grpc and config.gateway.listen.http both have port 50051",
    ),
    ({"config": {"gateway": {"listen": {"http": "0.0.0.0:99999"}}}}, "a port is 1 to 65535"),
    (
        {"config": {"weights": {"hugging_face": {"token_file": "/secrets/hf_token"}}}},
        "config.weights.hugging_face.token_file is /secrets/hf_token, which no volume of the pods that read it holds",
    ),
    (
        {"config": {"auth": {"api_keys": {"pepper_file": "/vault/pepper"}}}},
        "config.auth.api_keys.pepper_file is /vault/pepper",
    ),
    ({"config": {"link": {"tls": {"ca_file": "/tls/ca.crt"}}}}, "config.link.tls.ca_file is /tls/ca.crt"),
]
"""Values that are valid in each half of the configuration alone, but not together."""


@pytest.mark.parametrize(("values", "words"), WRONG_TOGETHER)
def test_halves_that_do_not_fit_are_refused(values: Mapping[str, Any], words: str) -> None:
    """The chart refuses values that contradict each other.

    Without this check the release could be installed, but it would fail at the first restart or never place a
    replica.
    """
    with pytest.raises(helm.HelmFailed) as caught:
        helm.template(values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        models({"gpu": [{"type": "L4"}, {"type": "H100", "tensor_parallel_size": 4}], "replicas": {"min": 2}}),
        models(SPREAD, gpuType=""),
        models({"gpu": "H100", "replicas": {"min": 4}}, {"gpu": "H100", "tensor_parallel_size": 4}),
        {"gateway": {"resources": {"requests": {"cpu": "1500m", "memory": "2Gi"}, "limits": {"cpu": 2}}}},
        models({"gpu": ""}, {"source": "sim://?vocab=9", "tensor_parallel_size": 64}),
        models({"fallback": ["d"]}, {"aliases": ["d"], "replicas": {"min": 0}}, maxReplicas=1),
        {"fullnameOverride": "team-a", "config": {"link": {"gateways": ["srv://_link._tcp.team-a-links.ns.svc"]}}}
        | {"ray": {"clusters": []}},
        {
            "config": {"auth": {"api_keys": {"pepper_file": "/vault/pepper"}}},
            "gateway": {
                "extraVolumes": [{"name": "v", "emptyDir": {}}],
                "extraVolumeMounts": [{"name": "v", "mountPath": "/vault"}],
            },
        },
    ],
)
def test_halves_that_fit_render(values: Mapping[str, Any]) -> None:
    """Values that agree with each other are rendered."""
    assert helm.template(values).cluster_yaml


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"networkPolicy": {"database": {"cidrs": ["10.0.0.0/99"]}}}, "/networkPolicy/database/cidrs/0"),
        ({"networkPolicy": {"database": {"cidrs": ["1.2.3/8"]}}}, "/networkPolicy/database/cidrs/0"),
        ({"config": {"gateway": {"drain_timeout_s": 1e300}}}, "/config/gateway/drain_timeout_s"),
        ({"gatway": {}}, "additional properties 'gatway' not allowed"),
        ({"gateway": {"replicas": 0}}, "at '/gateway/replicas': minimum: got 0, want 1"),
        ({"gateway": {"replicas": "two"}}, "at '/gateway/replicas': got string, want integer"),
        ({"gateway": {"kind": "DaemonSet"}}, "at '/gateway/kind': value must be one of 'StatefulSet', 'Deployment'"),
        ({"config": {"gatway": {}}}, "at '/config': additional properties 'gatway' not allowed"),
        ({"config": {"gateway": {"queue": {"max_requests": 0}}}}, "at '/config/gateway/queue/max_requests'"),
        ({"config": {"models": [{"source": "x"}]}}, "at '/config/models/0': missing property 'name'"),
        (cluster(gpus=8), "additional properties 'gpus' not allowed"),
        (cluster(modelCache={"kind": "hostPath", "path": "/x"}), "at '/ray/clusters/0/workerGroups/0/modelCache'"),
        (cluster(minReplicas=3), "worker group gpu: maxReplicas (1) is below minReplicas (3)"),
        (cluster(logicalGpus=1), "logicalGpus are for nodes without GPUs"),
        (
            {"config": {"gateway": {"listen": {"grpc": "127.0.0.1:50051"}}}},
            "config.gateway.listen.grpc is 127.0.0.1:50051, which nobody outside the pod reaches",
        ),
        ({"config": {"gateway": {"listen": {"link": "0.0.0.0:0"}}}}, "config.gateway.listen.link is 0.0.0.0:0"),
        ({"config": {"gateway": {"listen": {"metrics": "0.0.0.0:50054"}}}}, "port 50054 is the probes'"),
        ({"config": {"gateway": {"processes": 4}}}, "raise gateway.replicas"),
        ({"config": {"gateway": {"link_tls": None}}}, "config.gateway.link_tls is not set"),
        ({"config": {"store": {"database_url": ""}}}, "config.store.database_url is not set"),
        ({"config": {"link": {"gateways": []}}}, 'set ["srv://_link._tcp.headrace-links"]'),
        ({"config": {"ray": []}}, "blue is not in config.ray: add {name: blue, dashboard_url:"),
        (
            {"config": {"ray": [{"name": "blue", "dashboard_url": "http://elsewhere:8265"}]}},
            "the head's Service is headrace-blue-head-svc",
        ),
        (
            {"ray": {"clusters": [{"name": "blue", "head": {"gcsFaultTolerance": True}, "workerGroups": [GROUP]}]}},
            "needs a Valkey",
        ),
        ({"gateway": {"gatewayApi": {"enabled": True}}}, "name the Gateway that the routes belong to"),
        ({"gateway": {"ingress": {"enabled": True}}}, "gateway.ingress.host is empty"),
        ({"revoked": {"links": ["stolen"]}}, "at '/revoked/links/0': 'stolen' does not match pattern"),
        (
            {"revoked": {"links": ["0A"]}, "config": {"gateway": {"link_tls": {"revoked_serials_file": None}}}},
            "config.gateway.link_tls.revoked_serials_file is not /revoked/links",
        ),
        ({"secrets": {"create": True}}, "each rendering would make a new key pepper, and every API key would be lost"),
        ({"gateway": {"autoscaling": {"kind": "hpa", "minReplicas": 9}}}, "maxReplicas (8) is below minReplicas (9)"),
    ],
)
def test_wrong_values_are_refused_in_words(values: Mapping[str, Any], words: str) -> None:
    """The error message for a wrong value names the value and the remedy."""
    with pytest.raises(helm.HelmFailed) as caught:
        helm.template(values)
    assert words in str(caught.value)


# ---- all values that the schema allows


def from_schema(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for values of one of our schemas. Only the JSON schema keywords that helm/values.schema.json
    uses are supported.
    """
    if "$ref" in schema:
        return from_schema(SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "oneOf" in schema:
        return st.one_of(*map(from_schema, schema["oneOf"]))
    kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
    if kind == "boolean":
        return st.booleans()
    if kind == "null":
        return st.none()
    if kind == "integer":
        low = schema.get("minimum", 0)
        return st.integers(low, min(schema.get("maximum", low + 50), low + 50))
    if kind == "number":
        low, high = schema.get("exclusiveMinimum", schema.get("minimum", 0)), schema.get("exclusiveMaximum")
        return st.floats(low, high if high is not None else low + 50, exclude_min=True, exclude_max=high is not None)
    if kind == "string":
        longest = schema.get("maxLength", 30)
        if "pattern" in schema:
            return st.from_regex(schema["pattern"].replace("$", r"\Z"), alphabet=PRINTED).filter(
                lambda s: len(s) <= longest
            )
        return st.text(st.sampled_from("abcxyz019-"), min_size=schema.get("minLength", 0), max_size=12)
    if kind == "array":
        return st.lists(from_schema(schema["items"]), min_size=schema.get("minItems", 0), max_size=2)
    assert kind == "object", schema
    known = {key: from_schema(item) for key, item in schema.get("properties", {}).items()}
    required = {key: known.get(key, st.just("1")) for key in schema.get("required", ())}
    drawn = st.fixed_dictionaries(required, optional={k: v for k, v in known.items() if k not in required})
    return drawn.filter(lambda item: len(item) <= schema.get("maxProperties", len(item)))


PRINTED = st.characters(min_codepoint=33, max_codepoint=126)
NOT_DRAWN = {"config", "extraObjects", "fullnameOverride"}
"""Keys for which no random values are drawn. The program checks config; the other keys repeat names from config."""
TOP = {key: item for key, item in SCHEMA["properties"].items() if key not in NOT_DRAWN}


def draws(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the random chart values, changed so that values which depend on each other agree.

    Pod templates are removed, since they have tests of their own.
    """
    made: dict[str, Any] = json.loads(json.dumps(values))
    clusters = made.get("ray", {}).get("clusters")
    if clusters is not None:
        unique = {item["name"]: item for item in clusters}
        made["ray"]["clusters"] = list(unique.values())
        made["config"] = {
            "ray": [{"name": item, "dashboard_url": f"http://headrace-{item}-head-svc:8265"} for item in unique]
        }
        for item in unique.values():
            item["workerGroups"] = list({group["name"]: group for group in item["workerGroups"]}.values())
            item.get("head", {}).pop("gcsFaultTolerance", None)
            item.get("head", {}).pop("podTemplate", None)
            for group in item["workerGroups"]:
                group["maxReplicas"] = max(group["maxReplicas"], group["minReplicas"])
                group.pop("podTemplate", None)
                if group.get("gpusPerNode"):
                    group.pop("logicalGpus", None)
    gateway = made.get("gateway", {})
    scaling = gateway.get("autoscaling", {})
    if {"minReplicas", "maxReplicas"} & scaling.keys():
        scaling["maxReplicas"] = scaling["minReplicas"] = scaling.get("maxReplicas", scaling.get("minReplicas"))
    if gateway.get("gatewayApi", {}).get("enabled"):
        gateway["gatewayApi"]["parentRefs"] = [{"name": "public"}]
    if gateway.get("gatewayApi", {}).get("backendTLS", {}).get("enabled"):
        backend = gateway["gatewayApi"]["backendTLS"]
        backend["enabled"] = gateway["gatewayApi"].get("enabled", False)
        if backend.get("caConfigMap"):
            backend.pop("caCertificate", None)
        else:
            backend["caCertificate"] = "PEM"
    if scaling.get("authenticationRef"):
        scaling["authenticationRef"].setdefault("name", "prometheus")
    if gateway.get("ingress", {}).get("enabled"):
        gateway["ingress"]["host"] = "llm.example.com"
    if not made.get("existingSecret"):
        made.pop("secrets", None)  # the chart makes a Secret only when Helm can see the cluster
    for name in ("tolerations", "extraVolumes", "extraVolumeMounts", "podTemplate"):
        gateway.pop(name, None)
    made.get("controller", {}).pop("podTemplate", None)
    return made


EXAMPLES = int(os.environ.get("CHART_EXAMPLES", "8"))
"""Number of random examples. An example takes about a second; `make chart-test EXAMPLES=200` tries more examples."""


@settings(
    max_examples=EXAMPLES, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)  # shrinking would take minutes and show little more
@given(values=st.fixed_dictionaries({}, optional={key: from_schema(item) for key, item in TOP.items()}))
def test_whatever_the_schema_allows_renders_and_is_valid(values: Mapping[str, Any]) -> None:
    """From random values that the schema allows, the chart renders valid objects and a valid configuration.

    A built-in object is checked with the schema of the newest Kubernetes release, a custom object with its definition.
    """
    rendered = helm.template(draws(values))
    parse(rendered.cluster_yaml)
    names = [(item["kind"], item["metadata"]["name"]) for item in rendered.objects]
    assert len(names) == len(set(names))
    for item in rendered.objects:
        if schemas.is_built_in(item):
            schemas.check_built_in(item, schemas.RELEASES[-1])
        elif not schemas.without_definition([item]):
            schemas.check_custom(item)
