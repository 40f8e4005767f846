"""Read the input of `headrace config check`: a cluster.yaml, values of the Helm chart, or a ConfigMap with a
cluster.yaml.

The chart's values are merged over the chart's default values in the same way as in Helm: mappings are merged,
everything else is replaced, and null removes a key. chart_values.json is a copy of a part of the chart's values.yaml.
scripts/chart_schema.py keeps the copy up to date.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.api.types import ModelSpec
from cluster.config.problems import Path as KeyPath
from cluster.config.problems import Problem
from cluster.config.schema import API_VERSION, Config
from cluster.config.yaml_reader import Document, Duplicate, NotYaml, read_documents

CHART_VALUES = Path(__file__).parent / "chart_values.json"
_CLUSTER_KEYS = frozenset({"api_version", "name", "models"})
"""Top-level keys of a cluster.yaml that never are top-level keys of the chart's values."""
_HELM_HEADINGS = ("USER-SUPPLIED VALUES", "COMPUTED VALUES")
"""Headings that `helm get values` prints as its first line. A YAML parser reads such a heading as a key."""
_QUANTITY = re.compile(r"(\d+(?:\.\d*)?(?:[eE]\d+)?)([a-zA-Z]*)")
_UNITS = {"": 1.0, "m": 0.001} | {
    f"{letter}{two}": (1024.0 if two else 1000.0) ** power
    for two in ("", "i")
    for power, letter in enumerate("KMGTPE" if two else "kMGTPE", 1)
}
"""Factors of Kubernetes' units."""


class NoConfiguration(Exception):
    """Error: the text contains no configuration. `reasons` has the reasons."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class Input:
    """A configuration, and where in the input it was found.

    `prefix` is put before each path in messages. `values`: the chart's values, merged over the chart's defaults, if the
    input is values of the chart.
    """

    document: Document
    prefix: str = ""
    values: Mapping[str, Any] | None = None
    for_pods: bool = False
    problems: tuple[Problem, ...] = ()
    lines: Document | None = None
    """The document from which line numbers are taken. If it is None, line numbers are taken from `document`."""

    def line_of(self, path: KeyPath) -> int:
        """Return the line of a configuration path, or 0 if the path is not in the text."""
        if self.lines is None:
            return self.document.line_of(path)
        return self.lines.line_of(("config", *path)) if path else 0


def read_input(text: str) -> Input:
    """Detect the kind of an input and read the configuration in the input. Raises NoConfiguration."""
    try:
        documents = [document for document in read_documents(text) if document.data is not None]
        for document in documents:
            if (inner := _cluster_yaml_in(document.data)) is not None:
                (inner_document,) = read_documents(inner)
                return Input(_require_mapping(inner_document), for_pods=True)
    except (NotYaml, ValueError) as error:
        raise NoConfiguration(str(error)) from None
    if len(documents) > 1:
        raise NoConfiguration(
            f"has {len(documents)} documents separated by ---, and none is a ConfigMap with a cluster.yaml: expected "
            "a single document"
        )
    document = _require_mapping(documents[0] if documents else Document(None))
    if not _CLUSTER_KEYS & document.data.keys() and document.data:
        return _read_values(document)
    return Input(document)


def cluster_yaml_data(data: Any) -> Any:
    """Return the part of a YAML document that is the cluster.yaml: `config` of the chart's values, else the document.

    The chart's defaults are not merged in.
    """
    if isinstance(data, dict) and isinstance(data.get("config"), dict) and not _CLUSTER_KEYS & data.keys():
        return data["config"]
    return data


def _require_mapping(document: Document) -> Document:
    if not isinstance(document.data, dict):
        raise NoConfiguration(f"expected a mapping that begins with `api_version: {API_VERSION}`")
    return document


def _cluster_yaml_in(data: Any) -> str | None:
    """Return the text of the cluster.yaml in a ConfigMap or Secret. Returns None for any other data."""
    if not isinstance(data, dict) or data.get("kind") not in ("ConfigMap", "Secret"):
        return None
    for holder in ("data", "stringData"):
        held = data.get(holder)
        if isinstance(held, dict) and isinstance(held.get("cluster.yaml"), str):
            return str(held["cluster.yaml"])
    return None


def _read_values(document: Document) -> Input:
    given = {key: value for key, value in document.data.items() if key not in _HELM_HEADINGS}
    if not isinstance(given.get("config", {}), dict):
        raise NoConfiguration("config: must be a mapping: the contents of the release's cluster.yaml")
    values = merge_values(json.loads(CHART_VALUES.read_text()), given)
    inside = tuple(
        Duplicate(duplicate.path[1:], duplicate.line, duplicate.first_line)
        for duplicate in document.duplicates
        if duplicate.path[0] == "config"
    )
    outside = tuple(
        Problem(duplicate.path, str(duplicate)) for duplicate in document.duplicates if duplicate.path[0] != "config"
    )
    if outside:
        raise NoConfiguration(*(f"{problem.where}: {problem.text}" for problem in outside))
    return Input(Document(values["config"], inside), "config.", values, True, (), document)


def merge_values(under: Any, over: Any) -> Any:
    """Return the values `over` merged over `under` as Helm does: mappings are merged, and null removes a key."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    merged = {key: merge_values(under[key], over[key]) if key in over else value for key, value in under.items()}
    merged |= {key: value for key, value in over.items() if key not in under}
    return {key: value for key, value in merged.items() if value is not None or key not in over}


# ---- the worker groups of a release


def worker_group_problems(config: Config, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each model whose `replicas.min` replicas do not fit into its worker groups.

    A model's worker groups are the worker groups of its Ray cluster in the chart's `values`.
    """
    clusters = {cluster.get("name"): cluster for cluster in _list(values, "ray", "clusters")}
    for at, model in enumerate(config.models):
        choices = []
        for spec in model.model_copy(update={"canary": None}).specs():
            cluster = clusters.get(spec.ray or (config.ray[0].name if config.ray else ""))
            if cluster is None or spec.source.startswith("sim://"):
                break  # nothing is known about a Ray cluster outside this release
            choices.append((spec, [group for group in _list(cluster, "workerGroups") if isinstance(group, dict)]))
        else:
            reasons = [worker_group_shortage(spec, groups) for spec, groups in choices]
            if reasons and all(reasons):
                yield Problem(("models", at), reasons[0])
                return  # the sum would be too large as well
    for name, cluster in clusters.items():
        yield from _sum_problems(config, str(name), cluster)


def _sum_problems(config: Config, name: str, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each GPU type of which a cluster's models need more at `replicas.min` than there are.

    A model that may run on several types, or on any, counts only in the sum of all types, whose name is empty."""
    from cluster.policy.catalog.placement import world_size

    have, need = Counter[str](), Counter[str]()
    for group in filter(lambda group: isinstance(group, Mapping), _list(cluster, "workerGroups")):
        gpus = _gpus(group) * int(group.get("maxReplicas") or 0) * int(group.get("numOfHosts") or 1)
        have.update({"": gpus, str(group.get("gpuType") or "any"): gpus})
    for model in config.models:
        specs = model.model_copy(update={"canary": None}).specs()
        if model.source.startswith("sim://") or (model.ray or (config.ray[0].name if config.ray else "")) != name:
            continue
        gpus = min(map(world_size, specs)) * model.replicas.min
        need.update(dict.fromkeys({"", specs[0].gpu if len(specs) == 1 else ""}, gpus))
    for kind in sorted(need, reverse=True):
        if need[kind] > have[kind]:
            of_type = f" of type {kind}" if kind else ""
            yield Problem(
                ("models",),
                f"at replicas.min they need {need[kind]} GPUs{of_type} together, and the worker groups of "
                f"ray.clusters[{name}] have {have[kind]} at most, {need[kind] - have[kind]} too few: raise "
                "maxReplicas, or lower replicas.min",
            )
            return


def resource_problems(values: Any, path: KeyPath = ()) -> Iterator[Problem]:
    """Yield a problem for each request of a pod's resources that is above its limit. `values`: the chart's values."""
    if isinstance(values, list):
        for at, value in enumerate(values):
            yield from resource_problems(value, (*path, at))
    if not isinstance(values, Mapping):
        return
    requests, limits = values.get("requests"), values.get("limits")
    if path[-1:] == ("resources",) and isinstance(requests, Mapping) and isinstance(limits, Mapping):
        for name, request in requests.items():
            asked, most = _quantity(request), _quantity(limits.get(name))
            if asked is not None and most is not None and asked > most:
                text = f"is {request}, above the limit of {limits[name]}: raise limits.{name}, or lower the request"
                yield Problem((*path, "requests", str(name)), text)
    for key, value in values.items():
        yield from resource_problems(value, (*path, str(key)))


def _quantity(text: Any) -> float | None:
    """Return a quantity of Kubernetes, such as 500m or 16Gi, as a number; None for what is no quantity."""
    found = _QUANTITY.fullmatch(str(text))
    return float(found[1]) * _UNITS[found[2]] if found is not None and found[2] in _UNITS else None


def worker_group_shortage(spec: ModelSpec, groups: Sequence[Mapping[str, Any]]) -> str:
    """Return a message if the worker groups cannot hold a model's minimum number of replicas, else ""."""
    from cluster.policy.catalog.placement import may_spread, world_size

    matching = [group for group in groups if not spec.gpu or group.get("gpuType") == spec.gpu]
    if not matching:
        types = ", ".join(sorted({str(group.get("gpuType") or "any") for group in groups})) or "none"
        return f"gpu is {spec.gpu}, and no worker group has this type; there are {types}"
    need = world_size(spec)
    sizes = [
        (_gpus(group), int(group.get("maxReplicas") or 0) * int(group.get("numOfHosts") or 1)) for group in matching
    ]
    if may_spread(spec):
        fits = sum(gpus * nodes for gpus, nodes in sizes) // need
    else:
        fits = sum(gpus // need * nodes for gpus, nodes in sizes)
    if not fits:
        most = max((gpus for gpus, _ in sizes), default=0)
        return (
            f"one replica needs {need} GPUs{'' if may_spread(spec) else ' on one node'}, and the largest worker group "
            f"has {most} a node: lower tensor_parallel_size ({spec.tensor_parallel_size}), or raise gpusPerNode or "
            "maxReplicas"
        )
    if spec.min_replicas > fits:
        return (
            f"replicas.min is {spec.min_replicas}, and the worker groups hold {fits} at most: raise their maxReplicas"
        )
    return ""


def _gpus(group: Mapping[str, Any]) -> int:
    return int(group.get("gpusPerNode") or 0) + int(group.get("logicalGpus") or 0)


def _list(values: Any, *keys: str) -> list[Any]:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, list) else []
