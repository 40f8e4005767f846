"""Reads what `headrace config check` may be given: a cluster.yaml, the chart's values, or a ConfigMap with either.

Values are laid over the chart's own as Helm does it: mappings are merged, everything else is replaced, and null takes a
key away. chart_values.json is a part of the chart's values.yaml, kept equal by scripts/chart_schema.py.
"""

from __future__ import annotations

import json
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
_OF_CLUSTER = frozenset({"api_version", "name", "models"})
"""Keys that every cluster.yaml has, of which the chart's values have none."""
_HEADINGS = ("USER-SUPPLIED VALUES", "COMPUTED VALUES")
"""First lines of `helm get values`."""


class NoConfiguration(Exception):
    """The text holds no configuration; `reasons` say why."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class Input:
    """A configuration and where it stood: `prefix` comes before each path, `values` are the whole values where it came
    with them."""

    document: Document
    prefix: str = ""
    values: Mapping[str, Any] | None = None
    for_pods: bool = False
    problems: tuple[Problem, ...] = ()
    lines: Document | None = None
    """Where paths have their lines, if that is another document."""

    def line_of(self, path: KeyPath) -> int:
        """The line of a path of the configuration; 0 when it is not in the text."""
        if self.lines is None:
            return self.document.line_of(path)
        return self.lines.line_of(("config", *path)) if path else 0


def read_input(text: str) -> Input:
    """Tell the kinds of input apart. Raises NoConfiguration."""
    try:
        documents = [one for one in read_documents(text) if one.data is not None]
        for document in documents:
            if (inner := _of_manifest(document.data)) is not None:
                (found,) = read_documents(inner)
                return Input(_checked(found), for_pods=True)
    except (NotYaml, ValueError) as error:
        raise NoConfiguration(str(error)) from None
    if len(documents) > 1:
        raise NoConfiguration(
            f"holds {len(documents)} documents, separated by ---, and none is a ConfigMap with a cluster.yaml: "
            "expected one"
        )
    document = _checked(documents[0] if documents else Document(None))
    if not _OF_CLUSTER & document.data.keys() and document.data:
        return _of_values(document)
    return Input(document)


def _checked(document: Document) -> Document:
    if not isinstance(document.data, dict):
        raise NoConfiguration(f"expected a mapping that begins with `api_version: {API_VERSION}`")
    return document


def _of_manifest(data: Any) -> str | None:
    """The cluster.yaml of a ConfigMap or Secret of the chart's."""
    if not isinstance(data, dict) or data.get("kind") not in ("ConfigMap", "Secret"):
        return None
    for holder in ("data", "stringData"):
        held = data.get(holder)
        if isinstance(held, dict) and isinstance(held.get("cluster.yaml"), str):
            return str(held["cluster.yaml"])
    return None


def _of_values(document: Document) -> Input:
    given = {key: value for key, value in document.data.items() if key not in _HEADINGS}
    if not isinstance(given.get("config", {}), dict):
        raise NoConfiguration("config: must be a mapping, the cluster.yaml of the release")
    values = laid_over(json.loads(CHART_VALUES.read_text()), given)
    inside = tuple(
        Duplicate(one.path[1:], one.line, one.first_line) for one in document.duplicates if one.path[0] == "config"
    )
    outside = tuple(Problem(one.path, str(one)) for one in document.duplicates if one.path[0] != "config")
    if outside:
        raise NoConfiguration(*(f"{one.where}: {one.text}" for one in outside))
    return Input(Document(values["config"], inside), "config.", values, True, (), document)


def laid_over(under: Any, over: Any) -> Any:
    """`over` laid over `under`, as Helm merges values."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    merged = {key: laid_over(under[key], over[key]) if key in over else value for key, value in under.items()}
    merged |= {key: value for key, value in over.items() if key not in under}
    return {key: value for key, value in merged.items() if value is not None or key not in over}


# ---- the groups of GPUs that a release makes


def groups_of(config: Config, values: Mapping[str, Any]) -> Iterator[Problem]:
    """Models that no worker group of their Ray cluster can hold, or not as many times as `replicas.min` says."""
    clusters = {one.get("name"): one for one in _list(values, "ray", "clusters")}
    for at, model in enumerate(config.models):
        choices = []
        for spec in model.model_copy(update={"canary": None}).specs():
            cluster = clusters.get(spec.ray or (config.ray[0].name if config.ray else ""))
            if cluster is None or spec.source.startswith("sim://"):
                break  # of a cluster that this release does not make, nothing is known
            choices.append((spec, [one for one in _list(cluster, "workerGroups") if isinstance(one, dict)]))
        else:
            reasons = [why_no_group(spec, groups) for spec, groups in choices]
            if reasons and all(reasons):
                yield Problem(("models", at), reasons[0])


def why_no_group(spec: ModelSpec, groups: Sequence[Mapping[str, Any]]) -> str:
    """Why these worker groups cannot hold an entry's least replicas; "" when they can."""
    from cluster.policy.catalog.placement import may_spread, world_size

    mine = [one for one in groups if not spec.gpu or one.get("gpuType") == spec.gpu]
    if not mine:
        types = ", ".join(sorted({str(one.get("gpuType") or "any") for one in groups})) or "none"
        return f"gpu is {spec.gpu}, and no worker group has this type; there are {types}"
    need = world_size(spec)
    rooms = [(_gpus(one), int(one.get("maxReplicas") or 0)) for one in mine]
    if may_spread(spec):
        fits = sum(gpus * nodes for gpus, nodes in rooms) // need
    else:
        fits = sum(gpus // need * nodes for gpus, nodes in rooms)
    if not fits:
        most = max((gpus for gpus, _ in rooms), default=0)
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
