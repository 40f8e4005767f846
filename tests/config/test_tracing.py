"""The configuration section observe.tracing."""

from __future__ import annotations

import pytest

from cluster.config.document import ConfigError, parse

HEAD = "api_version: headrace/v1\nname: test\nmodels: []\nobserve: {tracing: {"


def test_tracing_is_off_and_its_defaults_are_modest() -> None:
    """Without the section `observe.tracing`, tracing is off. With only an endpoint in this section, one call in a
    hundred is traced."""
    assert parse("api_version: headrace/v1\nname: test\nmodels: []\n").observe.tracing is None
    tracing = parse(HEAD + "endpoint: 'http://otel:4317'}}").observe.tracing
    assert tracing is not None
    assert (tracing.sample_ratio, tracing.follow_caller, tracing.is_secure) == (0.01, True, False)


@pytest.mark.parametrize("endpoint", ["http://otel:4317", "https://otel.example.com", "http://[::1]:4317"])
def test_usual_endpoints_pass(endpoint: str) -> None:
    """URLs of a collector's gRPC port are accepted, with and without a port number."""
    parse(f"{HEAD}endpoint: '{endpoint}'}}}}")


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("sample_ratio: 0.5", "endpoint"),
        ("endpoint: otel:4317", "is no URL of a collector's gRPC port"),
        ("endpoint: 'http://otel:4318/v1/traces'", "is no URL of a collector's gRPC port"),
        ("endpoint: 'http://user:secret@otel:4317'", "put them into headers_file"),
        ("endpoint: 'http://otel:0'", "a port is 1 to 65535"),
        ("endpoint: 'http://otel:4317', sample_ratio: 1.5", "sample_ratio"),
        ("endpoint: 'http://otel:4317', ca_file: /ca", "ca_file: is for TLS"),
        ("endpoint: 'http://otel:4317', headers_file: /h", "headers_file: would be sent without TLS"),
        ("endpoint: 'http://otel:4317', max_queued_spans: 10", "max_queued_spans"),
    ],
)
def test_what_cannot_work_is_refused(section: str, problem: str) -> None:
    """A configuration section that cannot work is refused. The error names the key and the remedy, and shows no
    secret."""
    with pytest.raises(ConfigError, match=problem) as refused:
        parse(HEAD + section.replace("{", "{{") + "}}")
    assert "observe.tracing" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_headers_may_go_to_this_host_without_tls() -> None:
    """Headers may be sent without TLS to a collector on loopback."""
    parse(HEAD + "endpoint: 'http://127.0.0.1:4317', headers_file: /h}}")
