"""Test of the configuration checks: they must refuse every file that a restarted process would refuse.

A valid file (deploy/*.yaml, deploy/presets/*.yaml) gets one random mistake. This is repeated until MUTANTS
invalid files were made. A cluster.yaml is checked by `headrace config check --files`. Chart values are rendered
by `helm template`, and then the merged file is checked by the command of the chart's hook. A file that passes the
checks is given to the constructors of the processes (config_oracle): they show whether a restart would fail.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.cli.config_check import check
from cluster.cli.config_inputs import CHART_VALUES, merge_values
from cluster.config.yaml_reader import load
from loadtests.children import ROOT
from loadtests.figures import Bound, Figure
from loadtests.hostile.config_mutations import Mutant, mutant
from loadtests.hostile.config_oracle import Oracle
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

MUTANTS = 100
LET_THROUGH = "wrong value files and cluster.yaml files of 100 that a restart refuses and the checks let through"
GOOD_REFUSED = "shipped files that the checks refuse"
ROWS: Mapping[str, Bound] = {LET_THROUGH: Bound("<=", 0), GOOD_REFUSED: Bound("<=", 0)}
CLUSTER_FILES = sorted((ROOT / "deploy").glob("*.yaml"))
VALUE_FILES = sorted((ROOT / "deploy" / "presets").glob("*.yaml"))


@dataclass(slots=True)
class Count:
    """Numbers of mutated configurations, by result."""

    refused: int = 0
    harmless: int = 0
    through: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """Number of mutants that a check or a process refuses."""
        return self.refused + len(self.through)


async def measure(stage: Stage) -> list[Figure]:
    """Make wrong variants ("mutants") of valid configuration files, and check whether they are refused.

    Returns two rows: the number of wrong files that no check refused, and the number of valid files that were refused.
    """
    return await asyncio.to_thread(_measure, stage)


def _measure(stage: Stage) -> list[Figure]:
    oracle = Oracle()
    try:
        good = [file for file in (*CLUSTER_FILES, *VALUE_FILES) if refused(file.read_text(), file)]
        count = check_mutants(oracle, random.Random(stage.options.seed), stage.screen.say)
    finally:
        oracle.close()
    note = f"{count.wrong} wrong files of which {count.refused} refused, {count.harmless} more that change nothing"
    if not oracle.has_engine:
        note += "; engine arguments not compared: vLLM is not installed"
    for passed in count.through[:5]:
        note += f"; passed: {passed}"
    return [
        exact(LET_THROUGH, len(count.through) + max(MUTANTS - count.wrong, 0), ROWS[LET_THROUGH], "files", note),
        exact(GOOD_REFUSED, len(good), ROWS[GOOD_REFUSED], "files", ", ".join(file.name for file in good)),
    ]


def check_mutants(oracle: Oracle, rng: random.Random, say: Any, mutants: int = MUTANTS) -> Count:
    """Make copies of good configuration files, each with one mistake, until `mutants` copies are refused by a check or
    by a process. Return the numbers of copies by result. The engine's checks of all copies run in one process, because
    it takes seconds to start."""
    count = Count()
    asked: list[tuple[Mutant, list[dict[str, Any]]]] = []
    for _ in range(4 * mutants):
        if count.wrong >= mutants:
            break
        file = rng.choice((*CLUSTER_FILES, *VALUE_FILES))
        made = mutant(file.read_text(), rng)
        if refused(made.text, file):
            count.refused += 1
            continue
        text, nodes = as_processes_see_it(made.text, file)
        reasons = oracle.refusals(text, nodes, pod=nodes is not None)
        if reasons:
            count.through.append(f"{file.name}, {made.mistake}: {reasons[0]}")
        else:
            asked.append((made, oracle.engine_cases(text)))
    say(f"configs: {count.refused} refused, {len(count.through)} let through, {len(asked)} for the engine to check")
    answers = iter(oracle.engine_refusals([case for _, cases in asked for case in cases]))
    for made, cases in asked:
        reasons = [reason for reason in [next(answers) for _ in cases] if reason]
        if reasons:
            count.through.append(f"{made.mistake}: {reasons[0]}")
        else:
            count.harmless += 1
    return count


def refused(text: str, file: Path) -> bool:
    """Return whether the checks before a restart refuse the text."""
    if file not in VALUE_FILES:
        return bool(check(text, file.name, files=True).errors)
    from tests.support import helm

    try:
        rendered = helm.template(yaml.safe_load(text))
    except helm.HelmFailed:
        return True
    return bool(check(rendered.cluster_yaml, file.name, pod=True).errors)


def as_processes_see_it(text: str, file: Path) -> tuple[str, list[dict[str, float]] | None]:
    """Return the cluster.yaml that the processes would read, and the nodes that Ray would have.

    `file`: the original file. `text`: its changed content. If `file` holds values of the chart, the
    cluster.yaml and the nodes are derived from them. Else `text` is the cluster.yaml itself, and the nodes are
    None (unknown).
    """
    if file not in VALUE_FILES:
        return text, None
    values = merge_values(load(CHART_VALUES.read_text()), yaml.safe_load(text))
    nodes: list[dict[str, float]] = []
    for group in (group for cluster in values["ray"]["clusters"] for group in cluster["workerGroups"]):
        gpus = float((group.get("gpusPerNode") or 0) + (group.get("logicalGpus") or 0))
        node = {"CPU": 1000.0, "GPU": gpus}
        if group.get("gpuType"):
            node[f"accelerator_type:{group['gpuType']}"] = 1.0
        nodes += [node] * int(group["maxReplicas"])
    return yaml.safe_dump(values["config"], sort_keys=False), nodes
