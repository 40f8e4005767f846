"""The section gateway.console: defaults, allowed values, and errors that name the key and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config.console import Console, ConsoleOidc
from cluster.config.document import ConfigError, parse

TEXT = """
api_version: headrace/v1
name: test
gateway: {console: CONSOLE}
models: [{name: sim, source: "sim:///nowhere"}]
"""
AUTH = "auth: {oidc: [{issuer: 'https://sso.example.com/', audience: headrace, tenant_claim: org}]}\n"
OIDC = "{issuer: 'https://sso.example.com/', client_id: console}"


def console(text: str, more: str = "") -> Console:
    """Return the section gateway.console that is read from a text. Raises ConfigError."""
    return parse(TEXT.replace("CONSOLE", text) + more).gateway.console


def test_defaults() -> None:
    """Without the section `gateway.console`, the console is on for operators and viewers but not for tenants, and a
    session lasts eight hours."""
    section = console("{}")
    assert (section.enabled, section.tenants, section.history, section.oidc) == (True, False, True, None)
    assert section.session_s == 8 * 3600
    assert (section.public_url, section.traces_url, section.prometheus_url) == ("", "", "")


def test_all_keys() -> None:
    """Every key is read, and a slash at the end of a URL is removed."""
    section = console(
        "{enabled: false, tenants: true, session_s: 600, history: false, public_url: 'https://llm.example.com/', "
        "traces_url: 'https://t.example.com/trace/{trace_id}', prometheus_url: 'http://prometheus:9090/', "
        f"oidc: {OIDC}}}",
        AUTH,
    )
    assert section.public_url == "https://llm.example.com"
    assert section.prometheus_url == "http://prometheus:9090"
    assert section.oidc == ConsoleOidc(issuer="https://sso.example.com/", client_id="console")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{session_s: 59}", "session_s"),
        ("{session_s: .inf}", "session_s"),
        ("{colour: blue}", "colour"),
        ("{public_url: 'llm.example.com'}", "no URL of a web server"),
        ("{public_url: 'http://llm.example.com'}", "https"),
        ("{public_url: 'https://llm.example.com/console'}", "without a path"),
        ("{public_url: 'https://user:word@llm.example.com'}", "user name or password"),
        ("{public_url: 'https://llm.example.com:0'}", "port"),
        ("{traces_url: 'https://t.example.com/'}", "{trace_id}"),
        ("{traces_url: 'javascript:{trace_id}'}", "no URL of a web server"),
        ("{prometheus_url: 'prometheus:9090'}", "no URL of a web server"),
        (f"{{oidc: {OIDC}}}", "public_url"),
    ],
)
def test_wrong_values(text: str, message: str) -> None:
    """The error for a wrong value names the key and says what is allowed."""
    with pytest.raises(ConfigError) as caught:
        console(text, AUTH)
    assert "gateway.console" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"scopes": ()}, {"scopes": ("profile",)}, {"scopes": ("openid", "a b")}, {"client_id": ""}, {"secret": "x"}],
)
def test_wrong_clients(changes: dict[str, Any]) -> None:
    """A client without an id, or whose scopes are not a list with openid, is refused."""
    with pytest.raises(ValueError, match=next(iter(changes))):
        ConsoleOidc(**{"issuer": "https://sso.example.com/", "client_id": "console", **changes})


@pytest.mark.parametrize("more", ["", AUTH.replace("sso", "other")])
def test_the_issuer_is_known(more: str) -> None:
    """The issuer that the console uses for sign-ins must be listed in auth.oidc. The entry there says which claim of a
    token names the tenant."""
    with pytest.raises(ConfigError, match=r"gateway\.console\.oidc\.issuer.*auth\.oidc"):
        console(f"{{public_url: 'https://llm.example.com', oidc: {OIDC}}}", more)
