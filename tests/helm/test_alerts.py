"""Tests of the alerts with promtool: each alert fires for its cause only, and has a runbook."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.all_commands import app
from cluster.observe.events import EVENTS
from scripts.chart_schema import PLAIN_RULES
from tests.helm.test_monitoring import program
from tests.support import helm
from tests.support.helm import ROOT, HelmFailed

RUNBOOKS = ROOT / "docs" / "runbooks"
CASES: dict[str, Any] = yaml.load((Path(__file__).parent / "alerts.yaml").read_text(), yaml.BaseLoader)  # noqa: S506
"""The cases by alert. Every value is text: YAML would read 0x40 as a number."""
ORDER = [f"headrace.{name}" for name in ("objectives", "recorded", "budgets", "pages", "tickets")]
"""Order of the groups within one evaluation. Series of some cases are too far apart to be found in the next one."""
TARGETS = {"m": 0.99, "lax": 0.9}
MODELS = [{"name": name, "source": "sim:///models/x", "slo": {"target": target}} for name, target in TARGETS.items()]
RELEASE = {
    "config": {"name": "c", "models": MODELS},
    "monitoring": {"rules": {"enabled": True}},
}


@functools.cache
def rendered() -> dict[str, Any]:
    """Return the rendered Prometheus rules of the release under test."""
    return dict(helm.template(RELEASE).only("PrometheusRule")["spec"])


def alerts() -> dict[str, dict[str, Any]]:
    """Return the rendered alerts by name."""
    found = [rule for group in rendered()["groups"] for rule in group["rules"] if "alert" in rule]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


def series_of(case: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the input series of a case in promtool's form."""
    made = []
    for name, values in case["series"].items():
        metric, _, labels = name.removesuffix("}").partition("{")
        if metric.startswith("headrace_") and "headrace_cluster=" not in labels:
            labels = ",".join(filter(None, ('headrace_cluster="c"', labels)))
        made.append({"series": f"{metric}{{{labels}}}", "values": values})
    return made


def rules_of(alert: str) -> dict[str, Any]:
    """Return the rules of one alert: the alert and the recording rules that it uses.

    With all rules of the chart, the tests would take a minute.
    """
    rules = [rule for group in rendered()["groups"] for rule in group["rules"]]
    recorded = {rule["record"]: rule["expr"] for rule in rules if "record" in rule}
    needed, text = {alert}, alerts()[alert]["expr"]
    while more := {name for name in recorded if f"{name}{{" in text} - needed:
        needed |= more
        text += "".join(recorded[name] for name in more)
    groups = [
        {**group, "rules": [rule for rule in group["rules"] if (rule.get("alert") or rule["record"]) in needed]}
        for group in rendered()["groups"]
    ]
    return {"groups": [group for group in groups if group["rules"]]}


def expected(alert: str, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the samples of ALERTS that a case expects."""
    severity = alerts()[alert]["labels"]["severity"]
    samples = []
    for labels in case.get("labels", [{}]):
        own = {} if "namespace" in labels else {"headrace_cluster": "c"}
        whole = {"alertname": alert, "alertstate": "firing", "severity": severity, **own, **labels}
        pairs = ",".join(f"{key}={json.dumps(value)}" for key, value in whole.items())
        samples.append({"labels": f"ALERTS{{{pairs}}}", "value": 1})
    return samples


def test_promtool_checks_the_rules(tmp_path: Path) -> None:
    """`promtool check rules` accepts the rules of a release, and the rules for a Prometheus without Helm."""
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rendered()))
    for path in (file, PLAIN_RULES):
        done = subprocess.run(
            [program("promtool"), "check", "rules", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "${" not in path.read_text()


@pytest.mark.slow
def test_each_alert_fires_for_its_cause_and_not_otherwise(tmp_path: Path) -> None:
    """In promtool, each alert fires in the cases of alerts.yaml that expect it, and is silent in the others.

    Each alert has cases of both kinds.
    """
    assert CASES.keys() == alerts().keys()
    files = []
    for alert, kinds in CASES.items():
        by_interval: dict[str, list[dict[str, Any]]] = {}
        for kind in ("fires", "silent"):
            assert kinds[kind], f"{alert} has no case of the kind {kind}"
            for case in kinds[kind]:
                check = {
                    "expr": f'ALERTS{{alertname="{alert}",alertstate="firing"}}',
                    "eval_time": case["at"],
                    "exp_samples": expected(alert, case) if kind == "fires" else [],
                }
                interval = case.get("interval", "30s")
                test = {"name": f"{alert}: {case['when']}", "interval": interval, "input_series": series_of(case)}
                by_interval.setdefault(interval, []).append({**test, "promql_expr_test": [check]})
        (tmp_path / f"{alert}.rules").write_text(yaml.safe_dump(rules_of(alert)))
        for interval, tests in by_interval.items():
            files.append(tmp_path / f"{alert}-{interval}.yaml")
            whole = {
                "rule_files": [f"{alert}.rules"],
                "evaluation_interval": interval,
                "tests": tests,
                "group_eval_order": ORDER,
            }
            files[-1].write_text(yaml.safe_dump(whole))
    done = subprocess.run(
        [program("promtool"), "test", "rules", *map(str, files)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_texts_name_labels_that_the_alert_has() -> None:
    """The texts of an alert use only labels that the alert has."""
    for name, rule in alerts().items():
        texts = "".join(rule["annotations"].values())
        for case in CASES[name]["fires"]:
            for labels in case.get("labels", []):
                has = {*labels, *([] if "namespace" in labels else ["headrace_cluster"])}
                assert set(re.findall(r"\$labels\.(\w+)", texts)) <= has, name


def test_limits_come_from_values() -> None:
    """Every setting of monitoring.alerts is used in the rules, and the rules contain each model's SLO target."""
    defaults = yaml.safe_load((helm.CHART / "values.yaml").read_text())["monitoring"]["alerts"]
    text = (helm.CHART / "files" / "alerts" / "headrace.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)\}", text.split("groups:", 1)[1])) == {*defaults, "cluster", "namespace", "name"}
    changed = {"runbookUrl": "https://runbooks.example.com", "startTime": "45m", "lostWorkers": 7}
    release = {**RELEASE, "monitoring": {"rules": {"enabled": True}, "alerts": changed}}
    spec = helm.template(release).only("PrometheusRule")["spec"]
    rules = {rule["alert"]: rule for group in spec["groups"] for rule in group["rules"] if "alert" in rule}
    assert rules["HeadraceModelStartSlow"]["for"] == "45m"
    assert rules["HeadraceWorkersLost"]["expr"].endswith("> 7")
    for name, rule in rules.items():
        assert rule["annotations"]["runbook_url"] == f"https://runbooks.example.com/{name}.md"
    own = next(group for group in spec["groups"] if group["name"] == "headrace.objectives")["rules"]
    assert [(rule["labels"]["model"], rule["expr"]) for rule in own] == [("m", "vector(0.99)"), ("lax", "vector(0.9)")]


@pytest.mark.parametrize(
    "wrong",
    [{"startTime": "half an hour"}, {"latencyTarget": 1}, {"lostworkers": 3}, {"minimumCalls": 0}, {"restarts": None}],
)
def test_a_wrong_limit_is_refused(wrong: Mapping[str, Any]) -> None:
    """A setting with a wrong name, a wrong unit or an invalid value is refused, and the error has its path."""
    with pytest.raises(HelmFailed, match=r"monitoring[./]alerts"):
        helm.template({"monitoring": {"rules": {"enabled": True}, "alerts": wrong}})


def test_rules_look_at_their_own_cluster_only() -> None:
    """The rules select only Headrace series of the release's own cluster, so that other releases do not affect them."""
    for group in rendered()["groups"]:
        for rule in group["rules"]:
            for name, rest in re.findall(r"\b(headrace[_:][a-z0-9_:]+)(\{headrace_cluster=\"c\")?", rule["expr"]):
                if name != "headrace_cluster":
                    assert rest, f"{rule.get('alert') or rule['record']}: {name}"


HEADINGS = ("## What it means", "## Why it happens", "## How to see it", "## What to do")


def command_lines(text: str) -> list[list[str]]:
    """Return the words of every `headrace ...` command in a page."""
    return [shlex.split(line) for line in re.findall(r"(?:`|^    )(headrace [^`\n]+)", text, re.MULTILINE)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_each_alert_has_its_runbook(name: str) -> None:
    """Each alert has a runbook, which begins with the alert's name and has the four headings in order. The commands in
    the runbook exist."""
    text = (RUNBOOKS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    assert tuple(re.findall(r"^## .*$", text, re.MULTILINE)) == HEADINGS
    parts = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
    assert all(part.strip() for part in parts)
    assert command_lines(text) or "kubectl" in text, "a page names a command"
    for words in command_lines(text):
        check_command(words[1:])
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (RUNBOOKS / target).exists(), target


@functools.cache
def help_of(*path: str) -> str | None:
    """Return the help of a command; None if there is no such command."""
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    return shown.output if shown.exit_code == 0 else None


def check_command(words: list[str]) -> None:
    """Assert that a command and its options exist."""
    groups = {group.name for group in app.registered_groups}
    path = words[:1]
    if words[0] in groups and len(words) > 1 and re.fullmatch("[a-z-]+", words[1]) and help_of(*words[:2]):
        path = words[:2]
    shown = help_of(*path)
    assert shown is not None, f"there is no command headrace {' '.join(words)}"
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert option in shown, f"headrace {' '.join(path)} has no option {option}"


def test_an_unknown_command_is_found() -> None:
    """`check_command` fails for an unknown command and for an unknown option."""
    with pytest.raises(AssertionError, match="no command"):
        check_command(["models-weight", "m"])
    with pytest.raises(AssertionError, match="no option"):
        check_command(["status", "--everything"])


AREAS = {name.partition(".")[0] for name in EVENTS}
ENGINE_ARGUMENTS = {"max_num_seqs", "gpu_memory_utilization"}
"""Arguments of vLLM's engine in the runbooks. No page of docs/reference lists them."""


@functools.cache
def reference_names() -> frozenset[str]:
    """Return all names in docs/reference and in the chart's README: paths of keys, single keys, metrics and options."""
    pages = [*(ROOT / "docs" / "reference").glob("*.md"), helm.CHART / "README.md"]
    text = "".join(page.read_text() for page in pages)
    paths = re.findall(r"^\| `([\w.\[\]]+)`", text, re.MULTILINE)
    words = (word for word in re.findall(r"\w+", text) if "_" in word)
    return frozenset([*paths, *(f"config.{path}" for path in paths), *words])


def unknown_names(text: str) -> list[str]:
    """Return the names in a page that look like log events but are not known.

    A name looks like a log event if it begins with the area of an event, or if it is a single word with underscores. A
    name is known if it is a log event, an engine argument or a name in the reference pages.
    """
    names = re.findall(r"`([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)?)`", text)
    like = [name for name in names if (name.split(".")[0] in AREAS if "." in name else "_" in name)]
    return [name for name in like if name not in {*EVENTS, *ENGINE_ARGUMENTS} | reference_names()]


@pytest.mark.parametrize("page", sorted(RUNBOOKS.glob("*.md")), ids=lambda page: page.stem)
def test_log_events_in_runbooks_exist(page: Path) -> None:
    """A runbook names no unknown log event: each name that looks like a log event is a log event, or is another name
    that docs/reference lists."""
    assert unknown_names(page.read_text()) == []


def test_an_unknown_log_event_is_found() -> None:
    """`unknown_names` returns the words in a text that look like log events but are no current events. It does not
    return names of events, configuration keys or metrics that exist."""
    text = "`link_down`, `link.lost`, `link.connected`, `scaling.gpu_budget`, `headrace_worker_info`, `max_num_seqs`"
    assert unknown_names(text) == ["link_down", "link.lost"]


def test_no_runbook_without_an_alert() -> None:
    """Every page of docs/runbooks belongs to an alert, and the list of pages names each alert once."""
    pages = {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == CASES.keys()
    index = (RUNBOOKS / "README.md").read_text()
    assert sorted(re.findall(r"\]\((\w+)\.md\)", index)) == sorted(CASES)
