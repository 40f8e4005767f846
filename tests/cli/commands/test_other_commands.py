"""The commands config, doctor, version, prepare and down work, and `up` refuses invalid input before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from typer.testing import Result

from cluster import __version__
from cluster.cli.commands import doctor
from cluster.cli.local.run_folder import RunFolder
from cluster.cli.local.step_lines import duration
from cluster.config.document import load

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., Result]


@pytest.mark.parametrize("file", sorted((ROOT / "deploy").glob("*.yaml")), ids=lambda file: file.name)
def test_the_shipped_configurations_are_right(run: Run, file: Path) -> None:
    """Every configuration in deploy/ passes `config check`."""
    done = run("config", "check", str(file))
    assert done.exit_code == 0, done.stderr
    assert load(file).name in done.stdout


def test_a_wrong_configuration_names_each_key(run: Run, tmp_path: Path) -> None:
    """`config check` and `up` exit with code 2 for an invalid configuration, with one error line per invalid key."""
    file = tmp_path / "cluster.yaml"
    file.write_text("api_version: headrace/v1\nname: x\nmodels: [{name: a, sorce: b}]\n")
    for command in (("config", "check", str(file)), ("up", "-f", str(file)), ("up", "-f", str(file), "--detach")):
        done = run(*command)
        assert done.exit_code == 2
        assert f"{file}: models[0].source: Field required" in done.stderr
        assert f"{file}: models[0].sorce: unknown key" in done.stderr
    assert run("up", "-f", str(tmp_path / "none.yaml")).exit_code == 2


def test_the_schema_explains_every_key(run: Run) -> None:
    """`config schema` prints a valid JSON schema that names its draft and describes every key."""
    schema = json.loads(run("config", "schema").stdout)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    sections = [("", schema), *schema["$defs"].items()]
    keys = [(f"{name}.{key}", value) for name, part in sections for key, value in part.get("properties", {}).items()]
    assert ".models" in dict(keys)
    assert [key for key, value in keys if not value.get("description")] == []


def test_version_names_headrace(run: Run) -> None:
    """`version` prints the version of the installed package."""
    assert f"headrace {__version__}" in run("version").stdout


def test_up_refuses_a_name_that_is_up(run: Run, tmp_path: Path) -> None:
    """`up` refuses a cluster's name while another process holds the lock of that name."""
    file = tmp_path / "cluster.yaml"
    file.write_text("api_version: headrace/v1\nname: twice\nmodels: []\n")
    with RunFolder("twice").lock():
        done = run("up", "-f", str(file))
    assert done.exit_code == 1
    assert "'twice' is already up" in done.stderr


def test_down_without_a_cluster_says_so(run: Run) -> None:
    """`down` reports that no cluster is up, or that no cluster has the given name."""
    assert "no local cluster is up" in run("down").stderr
    done = run("down", "nope")
    assert done.exit_code == 1
    assert "no local cluster is named 'nope'" in done.stderr


def test_prepare_refuses_a_source_that_is_not_there(run: Run, tmp_path: Path) -> None:
    """If the folder in a model's `source` is missing, `prepare` fails before Ray is started. The error names the
    configuration key."""
    file = tmp_path / "cluster.yaml"
    file.write_text("api_version: headrace/v1\nname: x\nmodels: [{name: a, source: /no/such/folder}]\n")
    done = run("prepare", "-f", str(file))
    assert done.exit_code == 1
    assert "models[a].source: there is no folder /no/such/folder" in done.stderr


def test_the_report_ends_with_the_line_that_installs() -> None:
    """The report of `headrace doctor` ends with one command line that installs the missing Debian packages, each named
    once."""
    lack = doctor.DoctorFinding("ip", "not found", "apt-get install -y iproute2", "two nodes", "iproute2")
    text = doctor.report([lack, doctor.DoctorFinding("git", found="/usr/bin/git"), lack])
    assert text.splitlines()[-1] == "install with: apt-get install -y iproute2"
    assert "lacks ip" in text
    assert doctor.report([doctor.DoctorFinding("git", found="x")]).endswith("nothing is missing")


def test_doctor_runs_without_the_environment() -> None:
    """`make doctor` needs only the standard library, because it runs before any package is installed."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "from cluster.cli.commands import doctor; doctor.main(['--apt'])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("seconds", "text"), [(0.64, "0.6 s"), (21.2, "21 s"), (82, "1m22s"), (59.7, "60 s")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    """A duration is printed with a precision that is easy to read."""
    assert duration(seconds) == text
