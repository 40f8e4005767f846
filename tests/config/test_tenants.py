"""Tests of the sections about tenants: errors name the field and the remedy, and valid sections give complete
policies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cluster.config.tenants import (
    CLASSES,
    Auth,
    BudgetWebhook,
    Cost,
    PriorityClass,
    Store,
    Tenant,
    TenantDefaults,
    check_together,
)
from cluster.policy.tenants.patterns import Patterns
from cluster.policy.tenants.policy import MAX_LIMIT, PolicyError, TenantLimits

AUTH = Auth.model_validate({"cluster_secret_file": "/s", "api_keys": {"pepper_file": "/p"}})


def parse(section: type[Any], text: str) -> Any:
    """Parse a section of type `section` from YAML."""
    return section.model_validate(yaml.safe_load(text))


def test_the_vocabularys_own_example() -> None:
    """A configuration with every documented key about authentication, the database and tenants is read. Each value is
    in the resulting policies."""
    auth = parse(
        Auth,
        """
        cluster_secret_file: /secrets/cluster
        api_keys: {pepper_file: /secrets/key-pepper}
        oidc: [{issuer: "https://sso.example.com/", audience: headrace, tenant_claim: org, role_claim: headrace_role}]
        client_certificates: [{san: "spiffe://example.com/ns/billing", tenant: billing}]
        """,
    )
    store = parse(
        Store,
        """
        database_url: postgresql+psycopg://headrace@pg.example.com/headrace
        limits_url: rediss://valkey.example.com:6379/0
        stale_after_s: 86400
        retention_days: {usage: 400, audit: 400}
        """,
    )
    assert (store.stale_after_s, store.retention_days.usage) == (86400, 400)
    assert parse(Cost, "{currency: EUR, gpu_hour: {H100: 2.40}}").gpu_hour == {"H100": 2.4}
    defaults = parse(
        TenantDefaults,
        """
        {class: standard, weight: 1, models: [default], limits: {requests_per_minute: 600, tokens_per_minute: 500000,
         concurrent_requests: 64}, max_output_tokens: 32768, on_budget: finish}
        """,
    )
    tenants = [
        parse(
            Tenant,
            """
            {name: acme, class: interactive, weight: 4, models: ["*"], limits: {tokens_per_minute: 4000000,
             monthly_tokens: 20000000000}, cache_group: acme, guards: [{builtin: patterns, on: output, action: redact,
             patterns_file: /guards/pii.yaml, fail: closed}]}
            """,
        ),
        parse(Tenant, "{name: research, class: batch, weight: 1, log_prompts: true, labels: {cost_center: '4711'}}"),
    ]
    check_together(auth, CLASSES, defaults, tenants)
    acme, research = (one.policy(defaults) for one in tenants)
    assert acme.limits == TenantLimits(600, 4_000_000, 64, None, 20_000_000_000)
    assert (acme.priority_class, acme.weight, acme.models, acme.max_output_tokens) == (
        "interactive",
        4.0,
        ("*",),
        32768,
    )
    assert (acme.guards[0].patterns_file, acme.cache_group) == ("/guards/pii.yaml", "acme")
    assert (research.models, research.log_prompts, research.labels) == (("default",), True, {"cost_center": "4711"})
    assert research.limits.requests_per_minute == 600


def test_guards_of_the_defaults_and_of_a_tenant() -> None:
    """A tenant's own list of guards replaces the list in `tenant_defaults`. A configuration that has guards but no
    `auth` is refused."""
    defaults = parse(TenantDefaults, "{guards: [{builtin: sizes, on: output, max_characters: 9}]}")
    assert parse(Tenant, "{name: a}").policy(defaults).guards[0].on == "output"
    own = parse(Tenant, "{name: a, guards: [{builtin: patterns, patterns: {m: 'x{1,3}'}}]}").policy(defaults)
    assert [one.builtin for one in own.guards] == ["patterns"]
    assert parse(Tenant, "{name: a, guards: []}").policy(defaults).guards == ()
    with pytest.raises(ValueError, match=r"tenant_defaults\.guards: .*auth"):
        check_together(None, CLASSES, defaults, [])


def test_the_documents_example() -> None:
    """The examples in docs/guards.md are valid."""
    text = (Path(__file__).parents[2] / "docs" / "guards.md").read_text()
    tenants, patterns = (part.split("```")[0] for part in text.split("```yaml\n")[1:])
    (acme,) = yaml.safe_load(tenants)["tenants"]
    assert len(Tenant.model_validate(acme).policy(TenantDefaults()).guards) == 4
    assert Patterns(yaml.safe_load(patterns)).longest == 140


def test_null_takes_a_default_away() -> None:
    """A limit of null means unlimited, even if the defaults have a limit."""
    defaults = parse(TenantDefaults, "{limits: {requests_per_minute: 5}, max_output_tokens: 7}")
    policy = parse(Tenant, "{name: a, limits: {requests_per_minute: null}, max_output_tokens: null}").policy(defaults)
    assert (policy.limits, policy.max_output_tokens) == (TenantLimits(), None)


@pytest.mark.parametrize(
    ("section", "text", "field", "words"),
    [
        (Tenant, "{name: a, limits: {tokens_per_minute: 0}}", "limits.tokens_per_minute", "suspend a tenant"),
        (Tenant, "{name: a, limits: {requests_per_minute: -1}}", "limits.requests_per_minute", "1 or more"),
        (Tenant, f"{{name: a, limits: {{daily_tokens: {MAX_LIMIT + 1}}}}}", "limits.daily_tokens", "must not exceed"),
        (Tenant, "{name: a, limits: {concurrent_requests: 1.5}}", "limits.concurrent_requests", "integer"),
        (Tenant, "{name: a, limits: {tokens: 5}}", "limits.tokens", "Extra inputs"),
        (Tenant, "{name: a, weight: 0}", "weight", "between"),
        (Tenant, "{name: a, weight: -2}", "weight", "between"),
        (Tenant, "{name: a, weight: .inf}", "weight", "between"),
        (Tenant, "{name: a, weight: .nan}", "weight", "between"),
        (Tenant, "{name: a, models: []}", "models", "at least one"),
        (Tenant, "{name: a, max_output_tokens: 0}", "max_output_tokens", "1 or more"),
        (Tenant, "{name: a, max_context_tokens: -5}", "max_context_tokens", "1 or more"),
        (Tenant, "{name: a, on_budget: explode}", "on_budget", "finish"),
        (Tenant, "{name: Acme}", "name", "a-z"),
        (Tenant, "{name: ''}", "name", "1 to 63"),
        (Tenant, "{name: _idle}", "name", "choose another"),
        (Tenant, "{name: a, retention: {usage_days: -1}}", "retention.usage_days", "greater than or equal to 0"),
        (Tenant, "{name: a, guards: [{builtin: magic}]}", "guards.0", "patterns or sizes"),
        (Tenant, "{name: a, guards: [{builtin: sizes}]}", "guards.0", "max_characters"),
        (Tenant, "{name: a, guards: [{builtin: sizes, max_characters: 5, timeout_s: 0}]}", "guards.0", "timeout_s"),
        (TenantDefaults, "{guards: [{builtin: patterns, patterns: {mail: '.+@x'}}]}", "guards.0", "patterns.mail"),
        (Tenant, "{name: a, guards: [{builtin: patterns, patterns: {m: '(?=a)b'}}]}", "guards.0", "RE2"),
        (Tenant, "{name: a, guards: [{address: 'g:1', on: output}]}", "guards.0", "input only"),
        (Tenant, "{name: a, guards: [{address: nowhere}]}", "guards.0", "host:port"),
        (Tenant, "{name: a, guards: [{builtin: sizes, max_messages: 0}]}", "guards.0", "max_messages"),
        (Tenant, "{name: a, guards: [{builtin: sizes, on: output, max_messages: 1}]}", "guards.0", "max_messages"),
        (Tenant, "{name: a, guards: [{builtin: sizes, max_characters: 1, patterns: {m: a}}]}", "guards.0", "patterns"),
        (Tenant, "{name: a, guards: [{builtin: patterns, patterns: {m: a}, patterns_file: x}]}", "guards.0", "either"),
        (Store, "{stale_after_s: 0}", "stale_after_s", "greater than 0"),
        (Store, "{stale_after_s: 1.0e+12}", "stale_after_s", "less than"),
        (Store, "{retention_days: {usage: 0}}", "retention_days.usage", "greater than or equal to 1"),
        (Store, "{database_url: 'mysql://h/d'}", "database_url", "postgresql+psycopg"),
        (Store, "{database_url: 'postgresql://u:secret@h/d'}", "database_url", "HEADRACE_DATABASE_PASSWORD"),
        (Store, "{database_url: 'postgresql://h'}", "database_url", "no database"),
        (Store, "{database_url: 'sqlite://'}", "database_url", "loses everything"),
        (Store, "{database_url: 'sqlite:///:memory:'}", "database_url", "loses everything"),
        (Store, "{limits_url: 'memcached://h'}", "limits_url", "rediss://"),
        (Cost, "{currency: euro, gpu_hour: {}}", "currency", "ISO 4217"),
        (Cost, "{currency: EUR, gpu_hour: {H100: -1}}", "gpu_hour", "between 0"),
        (Cost, "{currency: EUR, gpu_hour: {H100: .inf}}", "gpu_hour", "between 0"),
        (BudgetWebhook, "{url: 'http://example.com/', secret_file: /s}", "url", "https"),
        (BudgetWebhook, "{url: 'https://me:pass@example.com/', secret_file: /s}", "url", "take it out"),
        (BudgetWebhook, "{url: nowhere, secret_file: /s}", "url", "https://"),
        (BudgetWebhook, "{url: 'https://example.com/'}", "secret_file", "required"),
        (BudgetWebhook, "{url: 'https://example.com/', secret_file: /s, thresholds: []}", "thresholds", "one to ten"),
        (BudgetWebhook, "{url: 'https://example.com/', secret_file: /s, thresholds: [0]}", "thresholds.0", "than 0"),
        (PriorityClass, "{name: A, rank: 0}", "name", "lower-case"),
        (PriorityClass, "{name: a, rank: -1}", "rank", "greater than or equal to 0"),
        (Auth, "{cluster_secret_file: /s}", "", "no caller could be authenticated"),
    ],
)
def test_bad_input_names_its_field(section: type[Any], text: str, field: str, words: str) -> None:
    """Zero, negative and absurd values, wrong words and unknown keys are refused with the key's path and the remedy."""
    with pytest.raises(ValidationError) as caught:
        parse(section, text)
    problems = {".".join(map(str, error["loc"])): error["msg"] for error in caught.value.errors()}
    assert field in problems
    assert words in problems[field]
    assert "secret" not in problems[field] or field == ""


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"issuer": "http://sso.example.com/"}, "https"),
        ({"issuer": "sso.example.com"}, "no URL"),
        ({"audience": ""}, "at least 1"),
        ({"tenant_claim": ""}, "at least 1"),
        ({"algorithms": ["HS256"]}, "HS256: allowed are"),
        ({"algorithms": ["none"]}, "none: allowed are"),
        ({"algorithms": []}, "none given"),
    ],
)
def test_issuers(entry: dict[str, Any], words: str) -> None:
    """An issuer is refused if the URL does not use https, if an algorithm is not asymmetric, or if the issuer is listed
    twice."""
    good = {"issuer": "https://sso.example.com/", "audience": "headrace", "tenant_claim": "org"}
    assert Auth.model_validate({"cluster_secret_file": "/s", "oidc": [good]}).oidc[0].issuer
    with pytest.raises(ValidationError, match=words):
        Auth.model_validate({"cluster_secret_file": "/s", "oidc": [{**good, **entry}]})
    with pytest.raises(ValidationError, match="twice"):
        Auth.model_validate({"cluster_secret_file": "/s", "oidc": [good, good]})


@pytest.mark.parametrize("san", ["*.example.com", "", "not a name", "a..b"])
def test_certificates_are_named_one_by_one(san: str) -> None:
    """Client certificates with wildcards, invalid names or duplicate names are refused."""
    entry = {"san": san, "tenant": "a"}
    with pytest.raises(ValidationError, match="san"):
        Auth.model_validate({"cluster_secret_file": "/s", "client_certificates": [entry]})
    twice = [{"san": "a.example.com", "tenant": "a"}, {"san": "A.example.com.", "tenant": "b"}]
    with pytest.raises(ValidationError, match="twice"):
        Auth.model_validate({"cluster_secret_file": "/s", "client_certificates": twice})


@pytest.mark.parametrize(
    ("classes", "defaults", "tenants", "words"),
    [
        ((*CLASSES, PriorityClass(name="batch", rank=9)), "{}", [], r"classes\[3\]: 'batch' is listed twice"),
        ((*CLASSES, PriorityClass(name="x", rank=0)), "{}", [], r"classes\[3\]: 'rank 0' is listed twice"),
        (CLASSES, "{class: gold}", [], "tenant_defaults.class: 'gold'"),
        (CLASSES, "{}", ["{name: a}", "{name: a}"], r"tenants\[1\]: 'a' is listed twice"),
        (CLASSES, "{}", ["{name: b}", "{name: a, class: gold}"], r"tenants\[1\].class: 'gold'"),
    ],
)
def test_sections_hold_to_each_other(classes: Any, defaults: str, tenants: list[str], words: str) -> None:
    """A configuration is refused if two priority classes or two tenants have the same name, or if a tenant or the
    tenant defaults name an unknown class."""
    with pytest.raises(ValueError, match=words):
        check_together(AUTH, classes, parse(TenantDefaults, defaults), [parse(Tenant, tenant) for tenant in tenants])


def test_tenants_need_auth() -> None:
    """A `tenants` section without auth is refused, since no caller could belong to a tenant."""
    with pytest.raises(ValueError, match="set auth"):
        check_together(None, CLASSES, TenantDefaults(), [Tenant(name="a")])
    check_together(None, CLASSES, TenantDefaults(), [])


def test_defaults_make_policies_for_the_api_too() -> None:
    """A tenant that is created over the API gets the defaults, overridden by its own fields. An error names the invalid
    field."""
    defaults = parse(TenantDefaults, "{class: batch, limits: {tokens_per_minute: 9}}")
    policy = defaults.policy("a", {"weight": 2.0, "limits": {"daily_tokens": 5}})
    assert (policy.priority_class, policy.weight) == ("batch", 2.0)
    assert policy.limits == TenantLimits(tokens_per_minute=9, daily_tokens=5)
    with pytest.raises(PolicyError, match=r"limits\.tokens"):
        defaults.policy("a", {"limits": {"tokens": 5}})
