"""A support bundle contains no secret of the configuration, even if logs or metrics repeat it.

Harmless settings stay readable.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import string
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.cli.support import sources
from cluster.cli.support.archive import redacted_files, write_archive
from cluster.cli.support.parts import LeftOut, Parts, cut, event_lines
from cluster.cli.support.redaction import (
    ADDRESSES,
    REDACTED,
    SHOWN,
    Redactor,
    Rules,
    hashed,
    tenant_labels,
    tenant_names,
    without_credentials,
)

SECRETS = st.text(string.ascii_letters + string.digits + "!%&/+=_-.~ äß漢", min_size=8, max_size=40).filter(
    lambda text: text.strip() == text and not text.isdecimal() and text not in REDACTED
)
KEYS = ("apiKey", "X-Api-Key", "clientSecret", "token_value", "DB_PASSWORD", "access_key", "dsn")
PLACES = (
    "secret file", "header file", "database password", "limits password", "source user", "source query", "engine token",
    *(f"key {name}" for name in KEYS),
    "unknown key", "nested below a secret", "environment", "webhook query",
)  # fmt: skip
ROUNDS = iter(range(1_000_000))


def configured(folder: Path, place: str, secret: str) -> dict[str, Any]:
    """Return a configuration with `secret` at `place`, one of PLACES. Files with secrets are written to `folder`."""
    config: dict[str, Any] = {"api_version": "headrace/v1", "name": "demo", "models": [{"name": "m", "source": "/m"}]}
    quoted = quote(secret, safe="")
    if place.endswith("file"):
        file = folder / "held"
        file.write_text(f"authorization: {secret}\n" if place == "header file" else f"{secret}\n")
        if place == "header file":
            config["observe"] = {"tracing": {"endpoint": "https://c:4317", "headers_file": str(file)}}
        else:
            config["auth"] = {"cluster_secret_file": str(file)}
    elif place == "database password":
        config["store"] = {"database_url": f"postgresql+psycopg://headrace:{quoted}@db/headrace"}
    elif place == "limits password":
        config["store"] = {"limits_url": f"redis://:{quoted}@valkey:6379/0"}
    elif place == "source user":
        config["models"][0]["source"] = f"https://{quoted}@host/weights"
    elif place == "source query":
        config["models"][0]["source"] = f"https://host/weights?sig={quoted}"
    elif place == "webhook query":
        config["observe"] = {"budget_webhook": {"url": f"https://host/hook?key={quoted}", "secret_file": "/none"}}
    elif place == "engine token":
        config["models"][0]["engine"] = {"hf_token": secret}
    elif place == "unknown key":
        config["database_password"] = secret
    elif place == "nested below a secret":
        config["credentials"] = {"aws": [{"id": secret}]}
    elif place.startswith("key "):
        config["models"][0]["engine"] = {"inner": [{place.removeprefix("key "): secret}]}
    else:
        config["gateway"] = {"extraEnv": [{"name": "A_PASSWORD", "value": "x"}], "password": secret}
    return config


def bundle_of(folder: Path, config: dict[str, Any], echo: str) -> bytes:
    """Return the decompressed archive of a support bundle. One file of the bundle is the configuration `config`; the
    other files contain the text `echo`."""
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config, allow_unicode=True))
    log = folder / "gateway.log"
    lines = [json.dumps({"event": "call.ended", "tenant": "acme", "error": f"<{echo}>"}), f"Traceback {echo}"]
    log.write_text("\n".join(lines))
    rules, parts = Rules(sources.known_keys()), Parts(1.0, clock=lambda: 0.0)
    parts.document("configuration.json", lambda: sources.configuration(file, rules))
    parts.document("check.json", lambda: sources.problems(file))
    parts.document("events.json", lambda: sources.events(log, lambda reason: None))
    parts.documents["state.json"] = {"reason": f"said {echo}", echo: 1, "list": [echo, quote(echo, safe="")]}
    parts.texts["metrics.prom"] = "\n".join(
        [f'x{{tenant="acme",a={json.dumps(echo)}}} 1', base64.b64encode(echo.encode()).decode(), echo]
    )
    parts.left_out["other"] = f"because of {echo}"
    target = folder / "bundle.tar.gz"
    write_archive(target, redacted_files(parts, Redactor(rules.secrets), {"note": echo}), "folder", 0.0)
    assert target.stat().st_mode & 0o777 == 0o600
    return gzip.decompress(target.read_bytes())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), secret=SECRETS)
@example(place="database password", secret='p%"w&ord=+ / x')
@example(place="engine token", secret="\\back\\slash\\")
def test_no_secret_of_the_configuration_is_in_the_bundle(tmp_path: Path, place: str, secret: str) -> None:
    """The archive contains no secret of the configuration: neither as it is, nor quoted, nor in base64.

    The logs, metrics, states and errors from which the test makes the archive contain the secret in these forms.
    """
    folder = tmp_path / str(next(ROUNDS))
    folder.mkdir()
    data = bundle_of(folder, configured(folder, place, secret), secret)
    encoded = [secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode(), json.dumps(secret)[1:-1]]
    for form in encoded:
        assert form.encode() not in data, place
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == {"manifest.json", "configuration.json", "check.json", "events.json", "state.json", "metrics.prom"}


UNKNOWN = SECRETS.filter(
    lambda key: key not in SHOWN and key not in ADDRESSES and not key.endswith(("file", "dir", "folder"))
)
"""Keys that are not those of known settings; Hypothesis also tries texts of the code that it tests."""


@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | SECRETS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(UNKNOWN, inner, max_size=3),
    )
)
def test_unknown_texts_are_left_out(document: Any) -> None:
    """Every text below an unknown key is redacted, at any depth."""
    kept = json.dumps(Rules().apply({"something": document}), ensure_ascii=False)

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        return [value] if isinstance(value, str) else []

    found = json.loads(kept)
    assert set(texts(found)) <= {REDACTED}


def test_harmless_settings_stay() -> None:
    """Numbers, switches, names, addresses and file paths of known settings stay as they are.

    They stay even if the key contains a word such as `token`.
    """
    config = {
        "gateway": {"resume": {"token_expires_s": 900}, "queue": {"max_tokens": 7}, "tls": {"key_file": "/tls/key"}},
        "models": [{"name": "m", "source": "hf://org/name", "control_tokens_in_content": "keep"}],
        "tenants": [{"name": "acme", "limits": {"tokens_per_minute": 9}, "labels": {"cost": "4711"}}],
        "store": {"database_url": "postgresql+psycopg://headrace@db/headrace"},
        "secrets": {"create": True}, "tlsSecret": "none", "password": 12345678,
    }  # fmt: skip
    rules = Rules(sources.known_keys())
    kept = rules.apply(config)
    expected = json.loads(json.dumps(config))
    expected["tenants"][0]["labels"]["cost"] = REDACTED
    expected["password"] = REDACTED
    expected["tlsSecret"] = REDACTED  # unknown here, but no secret that is searched for
    assert kept == expected
    assert rules.secrets == {"12345678"}
    assert rules.left_out == {"tenants.labels.cost", "password", "tlsSecret"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key hr_a1_0123456789abcdef here", f"key hr_a1_{REDACTED} here"),
        ("Authorization: Bearer abcdefghijkl", f"Authorization: Bearer {REDACTED}"),
        ("eyJhbGciOiJI.eyJzdWIi.c2ln", REDACTED),
        ("at redis://user:pass@host/0", f"at redis://user:{REDACTED}@host/0"),
        ("token hf_abcdefghijklmnopqrst", f"token {REDACTED}"),
        (
            "-----BEGIN EC PRIVATE KEY-----\nMHcCAQ\n-----END EC PRIVATE KEY-----",
            f"-----BEGIN EC PRIVATE KEY-----{REDACTED}-----END EC PRIVATE KEY-----",
        ),
        ("-----BEGIN PRIVATE KEY-----\nMHc", f"-----BEGIN PRIVATE KEY-----{REDACTED}"),
        ("a usual line with key k1 of tenants/acme", "a usual line with key k1 of tenants/acme"),
    ],
)
def test_texts_of_the_form_of_a_secret(text: str, shown: str) -> None:
    """API keys, tokens and private keys are recognized by their form and redacted. Passwords in URLs are redacted too.
    Other texts are unchanged."""
    assert Redactor(()).text(text) == shown


@pytest.mark.parametrize(
    ("address", "shown", "secrets"),
    [
        ("https://host/a", "https://host/a", set()),
        ("https://token@host/a", f"https://{REDACTED}@host/a", {"token"}),
        ("postgresql://u:p%40w@h/d?x=y", f"postgresql://u:{REDACTED}@h/d?{REDACTED}", {"p%40w", "p@w", "y", "x=y"}),
        ("http://[::1", REDACTED, {"http://[::1"}),
    ],
)
def test_addresses_without_credentials(address: str, shown: str, secrets: set[str]) -> None:
    """`without_credentials` keeps the host and path of an address, redacts password and query, and returns what it
    redacted. A user name is kept only beside a password; alone it may be a token and is redacted."""
    assert without_credentials(address) == (shown, secrets)


def test_names_of_tenants_can_be_hashed() -> None:
    """A tenant's name is replaced everywhere by the same hash, which depends on the salt.

    Longer names that contain the tenant's name are not changed.
    """
    names = {"acme", "acme-eu"}
    redactor = Redactor((), b"salt", names)
    text = redactor.text('tenants/acme x{tenant="acme-eu"} acme-us pacme acme.')
    a, b = hashed("acme", b"salt"), hashed("acme-eu", b"salt")
    assert text == f'tenants/{a} x{{tenant="{b}"}} acme-us pacme {a}.'
    assert hashed("acme", b"other") != a
    document = {"tenants": [{"id": "acme"}, {"name": "zoo"}], "calls": [{"tenant": "tenants/x"}], "tenant": ""}
    assert tenant_names(document) == {"acme", "zoo", "x"}
    assert tenant_labels('a{model="m",tenant="t1"} 1\nb{tenant="t2"} 2') == {"t1", "t2"}


def test_a_part_that_still_has_a_secret_is_left_out() -> None:
    """A part whose finished JSON still contains a secret is left out of the bundle."""
    parts = Parts(1.0, clock=lambda: 0.0)
    parts.documents["a.json"] = {"one": "two"}
    files = redacted_files(parts, Redactor(['one": "two']), {})
    assert list(files) == ["manifest.json"]
    assert json.loads(files["manifest.json"])["left_out"][0]["name"] == "a.json"


@pytest.mark.slow
def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is too long keeps its last whole lines, and the manifest records that it was cut."""
    assert cut("one\ntwo\nthree\n", 10) == (b"three\n", True)
    assert cut("one\n", 10) == (b"one\n", False)
    parts = Parts(1.0, clock=lambda: 0.0)
    parts.texts["long"] = "0123456789abcde\n" * (1 << 20)
    files = redacted_files(parts, Redactor(()), {})
    assert len(files["long"]) <= 8 << 20
    assert json.loads(files["manifest.json"])["files"][0]["is_cut"]


def test_time_is_bounded(tmp_path: Path) -> None:
    """After the deadline, no further part of the support bundle is collected, and the manifest says so. A device file
    such as /dev/zero, which has no end, is not read."""
    now = [0.0]
    parts = Parts(1.0, clock=lambda: now[0])
    assert parts.document("first", lambda: 1) == 1
    now[0] = 2.0
    assert parts.document("second", lambda: 1 / 0) is None
    assert parts.left_out == {"second": "no time was left"}
    with pytest.raises(LeftOut, match="no regular file"):
        sources.read_file(Path("/dev/zero"), 10)
    with pytest.raises(LeftOut, match="cannot be read"):
        sources.read_file(tmp_path / "none", 10)


def test_only_events_of_headrace_are_taken_from_a_log() -> None:
    """Only Headrace's own events are taken from a log, without their tracebacks. All other lines are left out."""
    lines = ['{"event": "call.ended", "exception": "Traceback: secret"}', '{"event": "x"}', "[1]", "text", ""]
    assert event_lines(lines, {"call.ended": ""}, 10) == ([{"event": "call.ended"}], 3)
