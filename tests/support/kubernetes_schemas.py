"""Strict schemas of Kubernetes resources: of the built-in resources of four Kubernetes releases, and of custom
resources. The schemas of custom resources are read from a folder."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import referencing
import yaml
from referencing.jsonschema import DRAFT202012

from tests.support.helm import ROOT, Loader

RELEASES = ("1.34", "1.35", "1.36", "1.37")
CRDS = Path(os.environ.get("HEADRACE_CRDS", ROOT.parent / "shared" / "crds"))
"""Folder of CustomResourceDefinitions: <group>_<plural>.yaml each."""


_taken: set[tuple[str, str]] = set()
"""Objects that were already found valid. Most objects are the same in all presets."""


class Invalid(AssertionError):
    """Raised for an object that the API would refuse."""


@functools.cache
def _folder(release: str) -> Any:
    return resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{release}.0-local-strict"


@functools.cache
def _registry(release: str) -> Any:
    contents = json.loads((_folder(release) / "_definitions.json").read_text())
    resource: Any = DRAFT202012.create_resource(contents)
    registry: Any = referencing.Registry()
    return registry.with_resource("_definitions.json", resource)


@functools.cache
def _validator(release: str, api_version: str, kind: str) -> Any:
    short = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    file = _folder(release) / f"{kind.lower()}-{short}.json"
    if not file.is_file():
        return None
    schema = json.loads(file.read_text())
    return jsonschema.Draft202012Validator(schema, registry=_registry(release))


def is_built_in(manifest: Mapping[str, Any]) -> bool:
    """Return whether the kind of an object belongs to the Kubernetes API itself."""
    return _validator(RELEASES[-1], manifest["apiVersion"], manifest["kind"]) is not None


def check_built_in(manifest: Mapping[str, Any], release: str) -> None:
    """Check an object. Raises Invalid if `release` of the Kubernetes API would refuse it, also for an unknown field."""
    validator = _validator(release, manifest["apiVersion"], manifest["kind"])
    if validator is None:
        raise Invalid(f"{release} has no {manifest['apiVersion']} {manifest['kind']}")
    written = (release, json.dumps(manifest, sort_keys=True))
    if written not in _taken:
        _raise(validator, manifest, release)
        _taken.add(written)


@functools.cache
def _custom(group: str, version: str, kind: str) -> Any:
    for file in sorted(CRDS.glob(f"{group}_*.yaml")):
        definition = yaml.load(file.read_text(), Loader)  # noqa: S506 - a safe loader, in C
        if definition["spec"]["names"]["kind"] == kind:
            for entry in definition["spec"]["versions"]:
                if entry["name"] == version and entry["served"]:
                    return jsonschema.Draft202012Validator(_strict(entry["schema"]["openAPIV3Schema"], root=True))
    raise Invalid(f"{CRDS} has no {group}/{version} {kind}")


def without_definition(objects: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the sorted kinds of custom resources that have no definition in the folder CRDS.

    These kinds cannot be checked.
    """
    return sorted({item["kind"] for item in objects if not is_built_in(item) and not _is_defined(item)})


def _is_defined(manifest: Mapping[str, Any]) -> bool:
    try:
        _custom(*manifest["apiVersion"].split("/"), manifest["kind"])
    except Invalid:
        return False
    return True


def check_custom(manifest: Mapping[str, Any]) -> None:
    """Check a custom resource. Raises Invalid if the resource's definition would refuse or prune it."""
    group, version = manifest["apiVersion"].split("/")
    # File names are <operator's domain>_<plural>: keda.sh, ray.io, monitoring.coreos.com, gateway.networking.k8s.io.
    _raise(_custom(group, version, manifest["kind"]), manifest, "its definition")


def _strict(schema: Any, *, root: bool = False) -> Any:
    """Return a structural schema as a JSON schema that refuses the fields which the API would silently prune."""
    if not isinstance(schema, dict):
        return schema
    strict = {key: value for key, value in schema.items() if key not in ("default", "example", "externalDocs")}
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = strict.get("anyOf") or [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        strict["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            strict["additionalProperties"] = False
    if root:
        strict["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {}}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    if strict.pop("nullable", False) and isinstance(strict.get("type"), str):
        strict["type"] = [strict["type"], "null"]
    return strict


def _raise(validator: Any, manifest: Mapping[str, Any], by: str) -> None:
    problem = jsonschema.exceptions.best_match(validator.iter_errors(manifest))
    if problem is not None:
        where = ".".join(map(str, problem.absolute_path))
        raise Invalid(f"{manifest['kind']} {manifest['metadata']['name']}: {where}: {problem.message[:300]} (by {by})")
