"""The commands `context add`, `use`, `list`, `show` and `remove`, and the option --context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]


@pytest.mark.slow
def test_the_life_of_a_context(run: Run, tmp_path: Path) -> None:
    """A context can be added, used, listed, shown and removed.

    The file of contexts has the absolute path of a key file, never the key itself.
    """
    key = tmp_path / "key"
    key.write_text("hr_secret")
    assert run("context", "add", "a", "--endpoint", "a.example:1", "--api-key-file", str(key)).exit_code == 0
    assert run("context", "add", "b", "--endpoint", "b.example:1", "--api-key-env", "B_KEY", "--use").exit_code == 0
    listed = json.loads(run("context", "list", "--json").stdout)
    assert (listed["current"], [one["name"] for one in listed["contexts"]]) == ("b", ["a", "b"])
    assert "b *" in run("context", "list").stdout
    assert run("context", "use", "a").exit_code == 0
    assert json.loads(run("context", "show", "--json").stdout)["api_key_file"] == str(key)
    assert "hr_secret" not in (tmp_path / "config/headrace/contexts.yaml").read_text()
    assert run("context", "remove", "a").exit_code == 0
    assert json.loads(run("context", "list", "--json").stdout)["current"] == "local"
    for wrong in (("use", "a"), ("remove", "a"), ("show", "a"), ("add", "local", "--endpoint", "a:1")):
        assert run("context", *wrong).exit_code == 2, wrong
    assert run("context", "show").exit_code == 1


def test_show_names_what_commands_use(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name, `context show` shows the cluster that other commands would use.

    --context, HEADRACE_CONTEXT or HEADRACE_ENDPOINT selects the cluster, else the current context. If HEADRACE_CONFIG
    is set, a warning says that commands about tenants use its file first.
    """
    for name in ("a", "b"):
        run("context", "add", name, "--endpoint", f"{name}.example:1", "--use")

    def endpoint(*before: str) -> str:
        shown = run(*before, "context", "show", "--json")
        assert shown.exit_code == 0, shown.stderr
        return str(json.loads(shown.stdout)["endpoint"])

    assert endpoint() == "b.example:1"
    monkeypatch.setenv("HEADRACE_CONTEXT", "a")
    assert endpoint() == "a.example:1"
    assert endpoint("--context", "b") == "b.example:1"
    monkeypatch.setenv("HEADRACE_ENDPOINT", "c.example:1")
    assert run("context", "show").exit_code == 2
    monkeypatch.delenv("HEADRACE_CONTEXT")
    assert endpoint() == "c.example:1"
    assert endpoint("--context", "b") == "b.example:1"
    assert "HEADRACE_CONFIG" not in run("context", "show").stderr
    monkeypatch.setenv("HEADRACE_CONFIG", "/etc/headrace/cluster.yaml")
    assert "/etc/headrace/cluster.yaml" in run("context", "show").stderr
    assert "HEADRACE_CONFIG" not in run("context", "show", "a").stderr


@pytest.mark.slow
def test_commands_use_the_context(
    run: Run, gateway: ScriptedGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands of callers and of operators use the address and the key of a context.

    The context is selected with the option --context (before or after the command's name) or with
    HEADRACE_CONTEXT. Otherwise the current context is used. If the command line gives an address, the
    context's key is not sent.
    """
    key = tmp_path / "key"
    key.write_text("hr_of_the_context\n")
    at = ("--endpoint", gateway.endpoint, "--admin", gateway.endpoint, "--api-key-file", str(key))
    run("context", "add", "here", *at)
    run("context", "add", "nowhere", "--endpoint", "127.0.0.1:1", "--use")
    assert run("models").exit_code == 3
    assert "nowhere" in run("status").stderr

    def keys_sent(*arguments: str) -> set[str]:
        gateway.script.credentials.clear()
        done = run(*arguments)
        assert done.exit_code == 0, done.stderr
        return set(gateway.script.credentials)

    mine = {"Bearer hr_of_the_context"}
    assert keys_sent("--context", "here", "models") == mine
    assert keys_sent("scale", "m", "2", "--context", "here") == mine
    assert keys_sent("abort", "x", "--reason", "y", "--context", "here") == mine
    monkeypatch.setenv("HEADRACE_CONTEXT", "here")
    assert keys_sent("chat", "m", "hi") == mine
    monkeypatch.setenv("HEADRACE_CONTEXT", "nowhere")
    assert keys_sent("--context", "here", "models") == mine
    assert keys_sent("models", "--context", "here") == mine
    monkeypatch.setenv("HEADRACE_CONTEXT", "here")
    assert keys_sent("chat", "m", "hi", "--endpoint", gateway.endpoint) == set()
    assert keys_sent("scale", "m", "2", "--admin", gateway.endpoint) == set()
    assert keys_sent("abort", "x", "--reason", "y", "--admin", gateway.endpoint) == set()
    monkeypatch.setenv("HEADRACE_CONTEXT", "local")
    assert keys_sent("models", "--endpoint", gateway.endpoint) == set()
    assert run("models", "--context", "here", "--endpoint", gateway.endpoint).exit_code == 2
    monkeypatch.setenv("HEADRACE_ENDPOINT", gateway.endpoint)
    both = run("models")
    assert both.exit_code == 2
    assert "HEADRACE_CONTEXT and HEADRACE_ENDPOINT" in both.stderr


def test_a_context_needs_its_variable(run: Run, gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the environment variable for a context's key is not set, a command is refused before anything is sent."""
    run("context", "add", "here", "--endpoint", gateway.endpoint, "--api-key-env", "HERE_KEY", "--use")
    refused = run("chat", "m", "hi")
    assert refused.exit_code == 2
    assert "HERE_KEY" in refused.stderr
    monkeypatch.setenv("HERE_KEY", "hr_here")
    assert run("chat", "m", "hi").exit_code == 0
    assert gateway.script.credentials == {"Bearer hr_here"}
