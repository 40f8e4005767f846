"""Tests of the commands `apply`, `diff` and `models` with a scripted admin API over gRPC."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from cluster.admin.v1 import admin_pb2
from cluster.admin.v1 import catalog_pb2 as pb
from cluster.config.document import load
from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]

CHANGES = [
    pb.Change(
        model="m",
        kind="change",
        restarts="replaced one after another",
        differences=[
            pb.Difference(path="revision", before_json='"a"', after_json='"b"'),
            pb.Difference(path="gpu", after_json='"L4"'),
        ],
    ),
    pb.Change(model="n", kind="add"),
]


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """A folder with two files of models. The second file overrides the first file."""
    (tmp_path / "10-base.yaml").write_text(
        "api_version: headrace/v1\nname: prod\nobserve: {}\nmodels: [{name: m, source: /m, replicas: {max: 2}}]\n"
    )
    (tmp_path / "20-more.yml").write_text(
        "models: [{name: m, replicas: {min: 2}}]\n---\nmodels: [{name: n, source: /n}]\n"
    )
    (tmp_path / "notes.txt").write_text("{")
    return tmp_path


def test_apply_lays_files_over_each_other(run: Run, gateway: ScriptedGateway, layers: Path) -> None:
    """`apply` merges the files of a folder in order of name, sends only the key `models`, and shows the changes.

    A note names the keys that are not sent.
    """
    gateway.script.changes = CHANGES
    over = layers / "over.yaml.last"
    over.write_text("models: [{name: m, revision: b}]")
    done = run("apply", "-f", str(layers), "-f", str(over), "--prune", "--reason", "why", "--admin", gateway.endpoint)
    assert done.exit_code == 0
    (request,) = gateway.script.requests
    assert json.loads(request.document) == {
        "models": [
            {"name": "m", "source": "/m", "replicas": {"max": 2, "min": 2}, "revision": "b"},
            {"name": "n", "source": "/n"},
        ]
    }
    assert (request.prune, request.validate_only, request.reason) == (True, False, "why")
    assert "observe" in done.stderr
    for part in ("~ m", 'revision: "a" -> "b"', "gpu: unset", "replaced one after another", "+ n", "applied: 2 models"):
        assert part in done.stdout


def test_diff_says_by_its_exit_code(run: Run, gateway: ScriptedGateway, layers: Path) -> None:
    """`diff` exits with 0 if nothing differs and with 4 if something differs, and --json prints the changes."""
    at = ("-f", str(layers), "--admin", gateway.endpoint)
    same = run("diff", *at)
    assert (same.exit_code, same.stdout.strip()) == (0, "nothing differs")
    gateway.script.changes = CHANGES
    differs = run("diff", *at, "--json")
    assert differs.exit_code == 4
    assert [change["model"] for change in json.loads(differs.stdout)] == ["m", "n"]


def test_values_of_the_chart_are_read(run: Run, gateway: ScriptedGateway, tmp_path: Path) -> None:
    """`diff` also accepts a values file of the Helm chart. The models are then read from the section `config` of the
    file."""
    file = tmp_path / "values.yaml"
    file.write_text("gateway: {replicas: 2}\nconfig: {name: prod, models: [{name: m, source: /m}]}\n")
    assert run("diff", "-f", str(file), "--admin", gateway.endpoint).exit_code == 0
    (request,) = gateway.script.requests
    assert json.loads(request.document) == {"models": [{"name": "m", "source": "/m"}]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {", "cannot be read"),
        ("gateway: {replicas: 2}", "no file has the key `models`"),
        ("[]", "expected a mapping"),
        ("models: [{source: /m}]", "models[0]: has no name"),
    ],
)
def test_files_that_are_none_are_not_sent(
    run: Run, gateway: ScriptedGateway, tmp_path: Path, text: str, words: str
) -> None:
    """An invalid file is bad usage: the error names the file or the entry, and no request is sent."""
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    done = run("apply", "-f", str(file), "--admin", gateway.endpoint)
    assert (done.exit_code, words in done.stderr) == (2, True)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("diff", "-f", str(empty), "--admin", gateway.endpoint).exit_code == 2
    assert gateway.script.requests == []


def test_versions(run: Run, gateway: ScriptedGateway) -> None:
    """The commands weigh, promote, rollback and quarantine send their arguments and show the resulting versions."""
    at = ("--admin", gateway.endpoint)
    assert "25%" in run("models", "weigh", "m", "v2", "0.25", *at).stdout
    assert run("models", "promote", "m", *at).exit_code == 0
    assert run("models", "rollback", "m", "--reason", "slow", *at).exit_code == 0
    answer = json.loads(run("models", "quarantine", "m", "v2", "--lift", "--json", *at).stdout)
    assert [version["version"] for version in answer["versions"]] == ["v1", "v2"]
    assert run("models", "weigh", "m", "v2", "1.5", *at).exit_code == 2
    weighed, promoted, back, lifted = gateway.script.requests
    assert (weighed.version, weighed.weight, promoted.name, back.reason, lifted.lift) == ("v2", 0.25, "m", "slow", True)


def test_one_model(run: Run, gateway: ScriptedGateway) -> None:
    """`models get` shows a model's versions and the fields of its model card."""
    versions = [pb.VersionStatus(version="v1", weight=1.0, state="READY", replicas=1, replicas_desired=2)]
    gateway.script.entries = [
        admin_pb2.CatalogEntry(name="m", license="apache-2.0", card={"language": "en"}, versions=versions)
    ]
    text = run("models", "get", "m", "--admin", gateway.endpoint).stdout
    for part in ("apache-2.0", "language", "1 of 2", "READY"):
        assert part in text
    assert json.loads(run("models", "get", "m", "--json", "--admin", gateway.endpoint).stdout)["card"] == {
        "language": "en"
    }


def test_pin_writes_what_the_weights_are(run: Run, tmp_path: Path) -> None:
    """`models pin` adds the digest of the weights to the file and changes nothing else.

    `models pin --check` exits with 4 if a digest is missing or the weights have changed.
    """
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"weights")
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"api_version: headrace/v1\nname: prod # ours\nweights: {{cache_dir: {tmp_path / 'cache'}}}\n"
        f"models:\n  - {{name: m, source: {weights}}}  # the one\n  - {{name: s, source: 'sim://'}}\n"
    )
    assert run("models", "pin", "-f", str(file), "--check").exit_code == 4
    done = run("models", "pin", "-f", str(file))
    assert (done.exit_code, "m: digest sha256:" in done.stdout) == (0, True)
    text = file.read_text()
    assert f'source: {weights}, digest: "sha256:' in text
    assert "name: prod # ours" in text
    assert "}  # the one" in text
    assert load(file).models[0].digest.startswith("sha256:")
    assert run("models", "pin", "-f", str(file), "--check", "m").exit_code == 0
    (weights / "model.safetensors").write_bytes(b"other weights")
    assert run("models", "pin", "-f", str(file), "--check").exit_code == 4
    assert run("models", "pin", "-f", str(file), "nobody").exit_code == 2
    assert file.read_text() == text
