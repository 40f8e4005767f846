"""Recipes of docs/kubernetes-recipes.md: the values render, the objects are valid, and their names match the chart."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from cryptography import x509

from cluster.cli.commands.run.pod_secrets import MADE_ONCE, manifests
from cluster.gateway.links.peer_identity import ANY_MODEL, CONTROLLER
from tests.support import helm
from tests.support import kubernetes_schemas as schemas
from tests.support.helm import NAMESPACE, ROOT

pytestmark = pytest.mark.slow

TEXT = (ROOT / "docs" / "kubernetes-recipes.md").read_text()
BLOCKS = [list(yaml.safe_load_all(text)) for text in re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)]
VALUES = [block[0] for block in BLOCKS if "kind" not in block[0]]
OBJECTS = [item for block in BLOCKS if "kind" in block[0] for item in block]


def test_the_recipes_are_read() -> None:
    """The tests of this file find the code blocks in docs/kubernetes-recipes.md: at least eight blocks with Helm
    values, one with a Certificate and one with an ExternalSecret. If no blocks were found, the other tests would check
    nothing."""
    assert len(VALUES) >= 8
    assert {item["kind"] for item in OBJECTS} == {"Certificate", "ExternalSecret"}


@pytest.mark.parametrize("values", VALUES, ids=lambda values: "+".join(values))
def test_values_render(values: dict[str, Any]) -> None:
    """The chart renders valid objects from the values of each recipe."""
    for item in helm.template(values).objects:
        if schemas.is_built_in(item):
            schemas.check_built_in(item, schemas.RELEASES[-1])
        elif not schemas.without_definition([item]):
            schemas.check_custom(item)


def test_objects_are_valid() -> None:
    """Each custom object in the recipes is valid under its operator's CRD. Objects whose CRD is not on this machine are
    not checked."""
    unknown = schemas.without_definition(OBJECTS)
    for item in OBJECTS:
        if item["kind"] not in unknown:
            schemas.check_custom(item)
    if unknown:
        pytest.skip(f"optional data: no definition of {', '.join(unknown)} in {schemas.CRDS}")


def secrets() -> dict[str, Any]:
    """Return the Secrets that `headrace pod secrets` makes, by name."""
    made: Any = manifests(NAMESPACE, "headrace", (), None, 30).objects
    return {item["metadata"]["name"]: item["stringData"] for item in made}


def test_certificates_have_the_names_of_pod_secrets() -> None:
    """The recipe for cert-manager requests the same certificates as `pod secrets` issues: in Secrets of the same names,
    and with the same DNS names, URIs and IP addresses."""
    asked = {item["spec"]["secretName"]: item["spec"] for item in OBJECTS if item["kind"] == "Certificate"}
    issued = {name: held["tls.crt"] for name, held in secrets().items() if "tls.crt" in held}
    assert asked.keys() == issued.keys()
    for name, pem in issued.items():
        extension = x509.load_pem_x509_certificate(pem.encode()).extensions
        names = extension.get_extension_for_class(x509.SubjectAlternativeName).value
        assert set(asked[name].get("dnsNames", ())) == set(names.get_values_for_type(x509.DNSName)), name
        assert set(asked[name].get("uris", ())) == set(names.get_values_for_type(x509.UniformResourceIdentifier)), name
        addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
        assert set(asked[name].get("ipAddresses", ())) == addresses, name
    assert asked["headrace-link-worker"]["uris"] == [ANY_MODEL]
    assert asked["headrace-link-controller"]["uris"] == [CONTROLLER]


def test_external_secrets_have_the_charts_keys() -> None:
    """The ExternalSecrets make the Secrets with the keys that pods mount.

    The Secret `headrace-secrets` is created once and never changes. It holds the pepper with which API keys are
    hashed.
    """
    asked = {item["spec"]["target"]["name"]: item["spec"] for item in OBJECTS if item["kind"] == "ExternalSecret"}
    kept = asked["headrace-secrets"]
    assert {item["secretKey"] for item in kept["data"]} == set(MADE_ONCE)
    assert (kept["refreshPolicy"], kept["target"]["immutable"]) == ("CreatedOnce", True)
    assert {item["secretKey"] for item in asked["headrace-tokens"]["data"]} == {"hf-token"}
