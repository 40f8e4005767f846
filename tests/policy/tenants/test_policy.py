"""Tests of tenant policies: an invalid field is refused with its path, and a JSON round trip is exact."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.tenants.policy import MAX_LIMIT, GuardRule, PolicyError, Retention, TenantLimits, TenantPolicy

FULL = TenantPolicy(
    name="acme",
    handle="h1",
    priority_class="interactive",
    weight=4.0,
    models=("llama-*", "support-de"),
    limits=TenantLimits(tokens_per_minute=4_000_000, monthly_tokens=20_000_000_000),
    max_context_tokens=8192,
    max_output_tokens=1024,
    on_budget="stop",
    cache_group="acme",
    guards=(
        GuardRule(builtin="patterns", on="output", action="redact", patterns={"as": "a{1,9}"}),
        GuardRule(address="g:1"),
    ),
    log_prompts=True,
    labels={"cost_center": "4711"},
    retention=Retention(usage_days=30),
    suspended=True,
)


def test_json_and_back() -> None:
    """All fields of a policy are unchanged after a round trip through JSON, under the names of the configuration."""
    text = json.dumps(FULL.as_json())
    assert TenantPolicy.from_json(json.loads(text)) == FULL
    assert '"class": "interactive"' in text


@given(
    st.builds(
        TenantLimits,
        *[st.none() | st.integers(1, MAX_LIMIT)] * 5,
    ),
    st.floats(0.001, 1e6),
)
def test_any_limits_survive(limits: TenantLimits, weight: float) -> None:
    """Any valid limits are unchanged after a round trip through JSON."""
    policy = TenantPolicy("a", limits=limits, weight=weight)
    assert TenantPolicy.from_json(json.loads(json.dumps(policy.as_json()))) == policy


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({}, "name"),
        ({"name": "Acme"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a", "limits": {"daily_tokens": 0}}, "limits.daily_tokens"),
        ({"name": "a", "limits": {"daily_tokens": -1}}, "limits.daily_tokens"),
        ({"name": "a", "limits": {"daily_tokens": 10**30}}, "limits.daily_tokens"),
        ({"name": "a", "limits": {"daily_tokens": True}}, "limits.daily_tokens"),
        ({"name": "a", "limits": {"daily_tokens": 1.5}}, "limits.daily_tokens"),
        ({"name": "a", "limits": {"tokens_per_day": 1}}, "limits.tokens_per_day"),
        ({"name": "a", "limits": 3}, "limits"),
        ({"name": "a", "weight": 0}, "weight"),
        ({"name": "a", "weight": float("nan")}, "weight"),
        ({"name": "a", "weight": float("inf")}, "weight"),
        ({"name": "a", "models": "x"}, "models"),
        ({"name": "a", "models": []}, "models"),
        ({"name": "a", "models": [1]}, "models[0]"),
        ({"name": "a", "on_budget": "explode"}, "on_budget"),
        ({"name": "a", "class": ""}, "class"),
        ({"name": "a", "priority_class": "x"}, "priority_class"),
        ({"name": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"name": "a", "labels": {"x": 1}}, "labels"),
        ({"name": "a", "labels": {str(i): "" for i in range(33)}}, "labels"),
        ({"name": "a", "retention": {"usage_days": -1}}, "retention.usage_days"),
        ({"name": "a", "guards": [{"builtin": "x"}]}, "guards[0].builtin"),
        ({"name": "a", "guards": [{}]}, "guards[0].builtin"),
        ({"name": "a", "guards": [{"builtin": "patterns"}]}, "guards[0].patterns"),
        ({"name": "a", "guards": [{"builtin": "sizes"}]}, "guards[0].max_characters"),
        ({"name": "a", "guards": [{"address": "g:1", "timeout_s": 0}]}, "guards[0].timeout_s"),
        ({"name": "a", "guards": [{"address": "g:1", "on": "both"}]}, "guards[0].on"),
        ({"name": "a", "wieght": 1}, "wieght"),
    ],
)
def test_what_cannot_be_is_named(value: dict[str, Any], path: str) -> None:
    """The `field` of the error is the path of the invalid value, and the text of the error begins with this path."""
    with pytest.raises(PolicyError) as caught:
        TenantPolicy.from_json(value)
    assert caught.value.field == path
    assert str(caught.value).startswith(f"{path}: ")


def test_models_by_glob() -> None:
    """A tenant may use only the models that match one of its names or globs. Matching is case-sensitive. A tenant
    without names and globs may use every model."""
    assert FULL.allows("llama-3.1-70b")
    assert FULL.allows("support-de")
    assert not FULL.allows("Llama-3.1-70b")
    assert not FULL.allows("support-de-2")
    assert TenantPolicy("a").allows("anything")


def with_later_fields(value: Any, later: str) -> Any:
    """Return plain values of a policy with a further field in each object that has fixed fields."""
    fields = {key: with_later_fields(item, later) for key, item in value.items() if key in ("limits", "retention")}
    guards = {"guards": [{**guard, later: 1} for guard in value["guards"]]} if "guards" in value else {}
    return {**value, **fields, **guards, later: {"a": 1}}


@given(st.text().filter(lambda name: name not in json.dumps(FULL.as_json())))
def test_stored_fields_of_a_later_release_are_ignored(later: str) -> None:
    """A stored policy with unknown fields is read without them. From a configuration, the same values are refused."""
    value = json.loads(json.dumps(with_later_fields(FULL.as_json(), later)))
    assert TenantPolicy.from_stored(value) == FULL
    with pytest.raises(PolicyError, match="unknown"):
        TenantPolicy.from_json(value)


@pytest.mark.parametrize(
    ("value", "usage_days"),
    [
        ({"name": "a", "on_budget": "explode", "retention": {"usage_days": 7, "later": 1}}, 7),
        ({"name": "a", "on_budget": "explode"}, None),
        ({"name": "a", "retention": {"usage_days": "a week"}}, 36_500),
        ("no object", 36_500),
    ],
)
def test_in_place_of_an_unusable_policy(value: Any, usage_days: int | None) -> None:
    """A tenant with an unusable policy is suspended and keeps its retention. With an unusable retention, its records
    are kept as long as possible."""
    policy = TenantPolicy.suspended_in_place_of("a", value)
    assert (policy.name, policy.suspended, policy.retention.usage_days) == ("a", True, usage_days)
