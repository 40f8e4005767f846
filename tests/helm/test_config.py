"""The pods' configuration, command lines and Ray settings, checked by the programs that read them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.all_commands import app
from cluster.cli.commands.run.pod_secrets import manifests
from cluster.config.document import parse
from cluster.config.schema import Config
from cluster.policy.catalog.placement import is_simulated, why_unplaceable, world_size
from tests.support import helm
from tests.support.helm import NAMESPACE, ROOT, Rendered

pytestmark = pytest.mark.slow

MODELS = "{api_version: headrace/v1, name: x, models: []}"


def merged(under: Any, over: Any) -> Any:
    """Return `over` merged over `under`, as Helm merges given values over a chart's own values."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {key: merged(under.get(key), over.get(key, under.get(key))) for key in {**under, **over}}
    return over


@pytest.mark.parametrize("file", helm.PRESETS, ids=lambda file: file.stem)
def test_the_configuration_is_the_values_verbatim(file: Path) -> None:
    """The values below `config` reach cluster.yaml unchanged, and the program's parser accepts the file."""
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())["config"]
    wanted = merged(values, yaml.safe_load(file.read_text()).get("config", {}))
    text = helm.template(file).cluster_yaml
    assert yaml.safe_load(text) == wanted
    assert parse(text) == Config.model_validate(wanted)


def test_large_numbers_and_words_of_yaml_survive() -> None:
    """Large numbers and the word `on` reach the configuration unchanged. Helm reads numbers as floats, and YAML 1.1
    reads `on` as a boolean.
    """
    config = {
        "gateway": {"max_message_bytes": 1 << 30, "queue": {"max_tokens": 123456789012}},
        "tenant_defaults": {"guards": [{"builtin": "sizes", "on": "output", "max_characters": 12345678}]},
        "models": [{"name": "m", "source": "sim://", "revision": "1605565", "version": "1.0", "engine": {"x": 0.1}}],
    }
    parsed = parse(helm.template({"config": config}).cluster_yaml)
    assert parsed.gateway.max_message_bytes == 1 << 30
    assert parsed.gateway.queue.max_tokens == 123456789012
    assert parsed.tenant_defaults.guards[0].on == "output"
    assert (parsed.models[0].revision, parsed.models[0].version) == ("1605565", "1.0")
    assert parsed.models[0].engine == {"x": 0.1}


def test_a_password_of_the_limits_store_makes_the_file_a_secret() -> None:
    """The configuration file is in a Secret if the URL of the limits store has a password, otherwise in a ConfigMap."""
    url = "rediss://:hidden@valkey:6379/0"
    assert helm.template({"config": {"store": {"limits_url": url}}}).only("Secret", "headrace-config")
    assert helm.template({"config": {"store": {"limits_url": "redis://valkey:6379"}}}).only(
        "ConfigMap", "headrace-config"
    )


# ---- the command lines


def secrets_by_name() -> dict[str, Any]:
    """Return the Secrets that `headrace pod secrets` makes, as name -> key -> value."""
    made: Any = manifests(NAMESPACE, "headrace", (), None, 30).objects
    return {item["metadata"]["name"]: item["stringData"] for item in made}


@pytest.mark.parametrize("part", ["gateway", "controller"])
def test_the_command_lines_serve(preset: Rendered, part: str, tmp_path: Path) -> None:
    """The command line in each pod of the chart is valid: with `--check` it accepts the files that are mounted into the
    pod. The mounted Secrets are those that `headrace pod secrets` prints."""
    name = f"headrace-{part}"
    (workload,) = (
        o for o in preset.objects if o["kind"] in ("StatefulSet", "Deployment") and o["metadata"]["name"] == name
    )
    spec = workload["spec"]["template"]["spec"]
    places = preset.lay_pod(spec, secrets_by_name(), tmp_path)
    file = Path(places["/etc/headrace"]) / "cluster.yaml"
    inside = re.compile("|".join(f"(?<= ){path}(?=/)" for path in places))
    file.write_text(inside.sub(lambda match: places[match[0]], file.read_text()))
    (container,) = spec["containers"]
    assert container["command"] == ["headrace"]
    arguments = [str(file) if argument == "/etc/headrace/cluster.yaml" else argument for argument in container["args"]]
    done = CliRunner().invoke(app, [*arguments, "--check"])
    assert done.exit_code == 0, done.stderr
    Path(places["/link"], "tls.key").unlink()
    done = CliRunner().invoke(app, [*arguments, "--check"])
    assert done.exit_code == 2
    assert "tls.key_file" in done.stderr


def test_the_jobs_command_line_is_known(preset: Rendered) -> None:
    """`db upgrade` accepts the options that the database Job passes."""
    (container,) = preset.only("Job", "headrace-database")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["headrace"]
    done = CliRunner().invoke(app, [*container["args"], "--help"])
    assert done.exit_code == 0, done.stderr


def test_the_notes_command_lines_are_known() -> None:
    """Each option on the command lines in the chart's notes exists."""
    text = (helm.CHART / "templates" / "NOTES.txt").read_text()
    commands = [
        line.split("headrace ", 1)[1] for line in text.replace("-- env HEADRACE_API_KEY=$KEY ", "-- ").split("-- ")
    ]
    for words in (
        command.splitlines()[0].split("|")[0].split("{{")[0]
        for command in commands
        if command.startswith(("keys", "tenants", "chat"))
    ):
        known = [word.rstrip(")") for word in shlex.split(words.replace("localhost:", "")) if word.startswith("--")]
        sub = [word for word in shlex.split(words) if not word.startswith("-")][:2]
        shown = CliRunner().invoke(app, [*(sub[:1] if sub[0] == "chat" else sub), "--help"]).output
        assert shown, words
        for option in known:
            assert option in shown, words


def test_the_schema_of_config_is_the_programs() -> None:
    """The chart's schema of `config` equals the schema that scripts/chart_schema.py makes from the program."""
    command = [sys.executable, "scripts/chart_schema.py", "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr


# ---- Ray's own parsers


RAY = """
import json, sys
from click.exceptions import ClickException
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import start
out = []
for cluster in json.load(sys.stdin):
    node_types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    spec, parsed = cluster["spec"], {}
    groups = [("headgroup", spec["headGroupSpec"], ["--head"])]
    groups += [(one["groupName"], one, ["--address=head:6379"]) for one in spec["workerGroupSpecs"]]
    for name, group, first in groups:
        given = {key: value.strip(chr(34)).replace(chr(92), "") for key, value in group["rayStartParams"].items()}
        words = [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in given.items()]
        found = start.make_context("start", [*first, "--block", *words]).params
        resources = json.loads(found["resources"])
        parsed[name] = {"cpus": found["num_cpus"], "gpus": found["num_gpus"], "resources": resources}
    out.append({"node_types": node_types, "parsed": parsed})
print("ANSWER " + json.dumps(out))
"""


@pytest.mark.slow
def test_ray_reads_every_cluster_and_places_every_model() -> None:
    """Ray's autoscaler and `ray start` read the same resources from each RayCluster.

    At their maximum size, the cluster's worker groups have room for all models.
    """
    rendered = {file.stem: helm.template(file) for file in helm.PRESETS}
    clusters = [release.only("RayCluster") for release in rendered.values()]
    done = subprocess.run(
        [sys.executable, "-c", RAY], input=json.dumps(clusters), capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.split("ANSWER ")[1])
    for (name, release), cluster, answer in zip(rendered.items(), clusters, answers, strict=True):
        groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
        nodes: list[dict[str, float]] = []
        for group, known in answer["node_types"].items():
            started, resources = answer["parsed"][group], known["resources"]
            assert resources["CPU"] == started["cpus"], (name, group)
            assert resources.get("GPU", 0) == (started["gpus"] or 0), (name, group)
            assert {key: resources[key] for key in started["resources"]} == started["resources"], (name, group)
            if group == "headgroup":
                assert resources["CPU"] == 0, "no replica on the head"
                continue
            assert known["min_workers"] == groups[group]["minReplicas"]
            nodes += [resources] * known["max_workers"]
        config = parse(release.cluster_yaml)
        for model in config.models:
            spec = model.spec()
            assert not is_simulated(spec)
            assert why_unplaceable(spec, nodes) == "", (name, model.name)
        gpus = sum(node.get("GPU", 0) for node in nodes)
        most = sum(world_size(model.spec()) * model.spec().max_replicas for model in config.models)
        assert most <= gpus, f"{name}: all models at their most need {most} GPUs, and there are {gpus}"
