"""Rules, dashboards and queries, checked by Prometheus' own tools and against the names in
cluster/observe/definitions.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from cluster.api.outcomes import Outcome
from cluster.api.types import ModelState
from cluster.cli.commands import doctor
from cluster.observe.definitions import DEFINITIONS, ENGINE_DEFINITIONS
from cluster.policy.problems import ANY_ALERT, KINDS
from cluster.process.ports import free_port
from scripts.chart_schema import MUTED_BY, PLAIN_RULES
from tests.support import helm
from tests.support.helm import ROOT

DASHBOARDS = sorted((helm.CHART / "files" / "dashboards").glob("*.json"))
MONITORED = next(path for path in helm.PRESETS if path.stem == "multi-tenant")
SCRAPED = {"headrace_cluster", "instance", "job", "pod", "namespace", "le", "ray_cluster"}
"""Labels that every series may carry: our labels, and the labels that scraping adds."""
FOREIGN = {
    "ALERTS": {"alertname", "alertstate", "severity", "headrace_cluster", "model"},
    "up": {"instance", "job"},
    "kube_pod_container_status_restarts_total": {"namespace", "pod", "container"},
    "kube_cronjob_status_last_successful_time": {"namespace", "cronjob"},
    "kube_cronjob_created": {"namespace", "cronjob"},
    "kubelet_volume_stats_available_bytes": {"namespace", "persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"namespace", "persistentvolumeclaim"},
    "process_resident_memory_bytes": set(),
    "process_cpu_seconds_total": set(),
    "process_open_fds": set(),
    "process_max_fds": set(),
}
"""Labels of other programs' metrics: Prometheus, kube-state-metrics, the kubelet, and Prometheus' client library."""


def program(name: str) -> str:
    """Return the path of a program. Skips the test if the program is missing."""
    if lack := doctor.missing_reason(name):
        pytest.skip(lack)
    path = doctor.find_tool(name)
    assert path is not None
    return path


def rules() -> list[dict[str, Any]]:
    """Return every rule of the rules file, with the chart's default values."""
    return [rule for group in yaml.safe_load(PLAIN_RULES.read_text())["groups"] for rule in group["rules"]]


RECORDED = {rule["record"] for rule in rules() if "record" in rule} | {"headrace:slo_target:ratio"}
"""Names of recorded series. helm/templates/rules.yaml adds the last one."""


VARIABLES = {
    "$__rate_interval": "5m",
    "$__range": "1h",
    "$cluster": "c",
    "$model": ".*",
    "$tenant": ".*",
    "$price": "2",
}


def panels() -> Iterator[tuple[str, str]]:
    """Yield (dashboard and panel, query) of each panel, with values in place of Grafana's variables."""
    for file in DASHBOARDS:
        dashboard = json.loads(file.read_text())
        found = [
            (panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])
        ]
        for title, query in (*found, *((item["name"], item["expr"]) for item in dashboard["annotations"]["list"])):
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield f"{file.stem}: {title}", query


def scaling() -> Iterator[tuple[str, str]]:
    """Yield (source, query) of each KEDA trigger."""
    for trigger in helm.template(MONITORED).only("ScaledObject")["spec"]["triggers"]:
        yield "keda", trigger["metadata"]["query"]


def selectors(expression: Any) -> Iterator[Any]:
    """Yield every series selector in a parsed query."""
    if isinstance(expression, promql.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
        inner = getattr(expression, name, None)
        if inner is not None and not isinstance(inner, str):
            yield from selectors(inner)
    for inner in getattr(expression, "args", None) or ():
        yield from selectors(inner)


def labels_of(metric: str) -> set[str]:
    """Return the labels of a metric, given its name in Prometheus. Raises KeyError for an unknown metric."""
    if metric in FOREIGN:
        return FOREIGN[metric] | SCRAPED
    if metric in ENGINE_DEFINITIONS:
        return set(ENGINE_DEFINITIONS[metric].labels) | SCRAPED
    short = metric.removeprefix("headrace_")
    for suffix in ("", "_bucket", "_count", "_sum"):
        definition = DEFINITIONS.get(short.removesuffix(suffix)) if short.endswith(suffix) else None
        if definition is not None and (definition.kind == "histogram") == bool(suffix):
            return set(definition.labels) | SCRAPED
    raise KeyError(metric)


VALUES = {
    "outcome": {member.value for member in Outcome}
    | {"delivered", "failed", "failed_open", "failed_closed"}  # notices, guards
    | {"met", "late_first_token", "slow_tokens"}  # SLO
    | {"won", "lost", "slower", "as_fast"}  # second workers, canaries
    | {"exported", "dropped"},  # spans
    "state": {member.value.lower() for member in ModelState} | {"quarantined"},
    "api": {"worker", "controller", "grpc", "http"},
}


def queries() -> list[tuple[str, str]]:
    """Return (source, query) of each rule, dashboard panel and autoscaler trigger."""
    return [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()] + [*panels(), *scaling()]


def test_every_query_is_promql_over_metrics_that_exist() -> None:
    """Each query is valid PromQL over metrics, labels and label values that exist.

    Every metric of the gateway is queried.
    """
    names = set()
    asked = queries()
    assert len(asked) > 60
    for where, query in asked:
        for selector in selectors(promql.parse(query)):
            name = selector.name
            if name in RECORDED:
                continue
            labels = labels_of(name)
            names.add(name)
            for matcher in selector.matchers.matchers:
                assert matcher.name in labels, f"{where}: {name} has no label {matcher.name}"
                if name.startswith("headrace_") and matcher.name in VALUES and matcher.value != ".*":
                    assert set(matcher.value.split("|")) <= VALUES[matcher.name], f"{where}: {matcher.value}"
    shown = {name.removeprefix("headrace_").removesuffix("_bucket") for name in names}
    assert DEFINITIONS.keys() - shown == set(), "a metric that no panel and no alert looks at"


def test_the_rule_itself_sees_what_it_should() -> None:
    """`labels_of` raises KeyError for an unknown metric, and for the name of a histogram without a suffix such as
    `_bucket`. `selectors` also finds the selectors inside nested PromQL expressions."""
    with pytest.raises(KeyError):
        labels_of("headrace_request_total")
    with pytest.raises(KeyError):
        labels_of("headrace_time_to_first_token_seconds")
    nested = promql.parse('1 - sum by (a) (rate(x{b="c"}[5m])) / (y or histogram_quantile(0.9, z))')
    assert {selector.name for selector in selectors(nested)} == {"x", "y", "z"}


@pytest.mark.slow
def test_prometheus_itself_evaluates_every_query(tmp_path: Path) -> None:
    """Prometheus evaluates each query without a type error. Without any series, the result is empty."""
    asked = [query for where, query in queries() if "absent(" not in query and "vector(" not in query]
    expressions = [{"expr": query, "eval_time": "5m", "exp_samples": []} for query in asked]
    tests = tmp_path / "tests.yaml"
    whole = {"rule_files": [], "evaluation_interval": "1m", "tests": [{"promql_expr_test": expressions}]}
    command = [program("promtool"), "test", "rules", str(tests)]
    tests.write_text(yaml.safe_dump(whole))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    expressions[0]["expr"] = "sum(headrace_requests_total) > bool 'x'"
    tests.write_text(yaml.safe_dump(whole))
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode != 0


def test_alerts_reach_somebody() -> None:
    """With the example configuration, Alertmanager's own tool routes each severity to the expected receiver."""
    amtool, config = program("amtool"), ROOT / "deploy" / "monitoring" / "alertmanager.yaml"
    done = subprocess.run([amtool, "check-config", str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    severities = {rule["labels"]["severity"] for rule in rules() if "alert" in rule}
    receivers = {"page": "pager", "ticket": "tickets", "info": "nobody"}
    assert severities == receivers.keys()
    for severity, receiver in receivers.items():
        command = [amtool, "config", "routes", "test", f"--config.file={config}", f"severity={severity}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == receiver, done.stdout + done.stderr


@pytest.mark.needs("amtool")
@pytest.mark.slow
def test_no_alert_mutes_another_cluster(tmp_path: Path) -> None:
    """With the alerts of two clusters at once, a real Alertmanager suppresses none of a cluster whose gateways and
    models serve. Of the other cluster it suppresses all but the alert about its gateways."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = ROOT / "deploy" / "monitoring" / "alertmanager.yaml"
    server = doctor.find_tool("prometheus-alertmanager") or doctor.find_tool("alertmanager")
    assert server is not None, "it comes with amtool"
    command = [server, f"--config.file={config}", f"--storage.path={tmp_path}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            amtool = [program("amtool"), f"--alertmanager.url={url}"]
            wait_for(lambda: subprocess.run([*amtool, "alert"], capture_output=True, check=False).returncode == 0)
            names = [rule["alert"] for rule in rules() if "alert" in rule]
            sources = set(MUTED_BY)
            for cluster, sent in (("broken", names), ("sound", [name for name in names if name not in sources])):
                for name in sent:
                    labels = [name, f"headrace_cluster={cluster}", "model=m", "severity=page"]
                    subprocess.run([*amtool, "alert", "add", *labels], check=True, capture_output=True)

            def listed(*flags: str) -> list[dict[str, Any]]:
                query = [*amtool, "alert", "query", "-o", "json", *flags]
                return list(json.loads(subprocess.run(query, check=True, capture_output=True).stdout))

            wait_for(lambda: len(listed("--inhibited")) == len(names) - 1)
            muted = listed("--inhibited")
            assert {alert["labels"]["headrace_cluster"] for alert in muted} == {"broken"}
            assert "HeadraceGatewaysGone" not in {alert["labels"]["alertname"] for alert in muted}
        finally:
            process.kill()


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until `holds` returns true, at most a minute."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_problem_raises_an_alert() -> None:
    """Each kind of problem names an alert of the rules, and those without an alert of their own are in the expression
    of the common one."""
    by_name = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert {kind.alert or ANY_ALERT for kind in KINDS.values()} <= by_name.keys()
    common = re.search(r'kind=~"([^"]*)"', by_name[ANY_ALERT]["expr"])
    assert common is not None
    assert set(common[1].split("|")) == {name for name, kind in KINDS.items() if not kind.alert}


def test_dashboards_travel_whole() -> None:
    """Each dashboard becomes a ConfigMap that Grafana's sidecar finds. Only the address of the runbooks is replaced.

    The panels of a dashboard do not overlap.
    """
    address = "https://runbooks.example.com"
    rendered = helm.template(MONITORED, {"monitoring": {"alerts": {"runbookUrl": address}}})
    for file in DASHBOARDS:
        manifest = rendered.only("ConfigMap", f"headrace-dashboard-{file.stem}")
        assert manifest["metadata"]["labels"]["grafana_dashboard"] == "1"
        dashboard = json.loads(manifest["data"][file.name])
        assert dashboard == json.loads(file.read_text().replace("docs/runbooks", address))
        places = [panel["gridPos"] for panel in dashboard["panels"]]
        for at, one in enumerate(places):
            assert one["x"] + one["w"] <= 24
            for other in places[:at]:
                beside = one["x"] >= other["x"] + other["w"] or other["x"] >= one["x"] + one["w"]
                assert beside or one["y"] >= other["y"] + other["h"], f"{file.stem}: {other} and {one} overlap"
        assert (ROOT / "deploy" / "dashboards" / file.name).read_text() == file.read_text()
