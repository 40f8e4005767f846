"""The key `adapters` of a model: its forms, its checks, and its effect on the engine."""

from __future__ import annotations

import pytest

from cluster.api.adapters import AdapterSpec
from cluster.config.adapters import ENGINE_DEFAULTS
from cluster.config.document import ConfigError, entry_of, parse
from cluster.config.model import Model

DIGEST = "a" * 64
HEAD = "api_version: headrace/v1\nname: test\n"


def models(text: str, more: str = "") -> tuple[Model, ...]:
    """Return the models of a configuration."""
    return parse(f"{HEAD}{more}models:\n{text}").models


@pytest.mark.parametrize(
    "adapters",
    [
        f"[{{name: a, source: /a, digest: 'sha256:{DIGEST}', tenants: [t]}}, "
        "{name: b, source: hf://o/n, pinned: true}]",
        f"{{a: {{source: /a, digest: '{DIGEST}', tenants: [t]}}, b: {{source: hf://o/n, pinned: true}}}}",
    ],
)
def test_a_list_and_a_mapping_say_the_same(adapters: str) -> None:
    """A model's adapters can be written as a list, or as a mapping from adapter names. Both forms give the same
    adapters, also after the entry was stored and read again."""
    (model,) = models(f"  - {{name: m, source: /m, adapters: {adapters}}}\n")
    assert model.adapter_specs() == (
        AdapterSpec("a", "/a", DIGEST, ("t",)),
        AdapterSpec("b", "hf://o/n", pinned=True),
    )
    assert Model.model_validate(entry_of(model)).adapter_specs() == model.adapter_specs()


def test_a_mapping_to_sources_is_enough() -> None:
    """A mapping from adapter names to sources is valid. Further keys are optional."""
    (model,) = models("  - {name: m, source: /m, adapters: {a: /a}}\n")
    assert model.adapter_specs() == (AdapterSpec("a", "/a"),)


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        ("", None),
        ("adapters: []", ENGINE_DEFAULTS),
        ("adapters: {a: /a}, engine: {max_loras: 2}", {**ENGINE_DEFAULTS, "max_loras": 2}),
        ("engine: {enable_lora: true}", ENGINE_DEFAULTS),
        (
            "adapters: {a: 'hf://o/n@main'}, engine: {max_loras: 100}",
            {"max_lora_rank": 64, "max_loras": 100, "max_cpu_loras": 100},
        ),
    ],
)
def test_the_presence_of_adapters_switches_lora_on(keys: str, engine: dict[str, int] | None) -> None:
    """The key `adapters`, even if empty, enables LoRA in the engine of every version. LoRA arguments that are set are
    kept. The engine's arguments do not depend on the adapters in the list."""
    (model,) = models(f"  - {{name: m, source: /m, canary: {{version: v2, source: /n}}{', ' if keys else ''}{keys}}}\n")
    for spec in model.specs():
        assert spec.engine == ({} if engine is None else {"enable_lora": True, **engine})


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ("adapters: {'a:b': /a}", "adapters[0].name: 'a:b' must be letters"),
        ("adapters: {-a: /a}", "adapters[0].name: '-a' must be letters"),
        ("adapters: [{name: a, source: /a}, {name: a, source: /b}]", "adapters[1].name: two adapters are called 'a'"),
        ("adapters: [{name: a}]", "adapters[0].source: Field required"),
        ("adapters: {a: 'ftp://x'}", "adapters[0].source: 'ftp://x' is unknown"),
        ("adapters: {a: {source: /a, digest: abc}}", "adapters[0].digest: must be"),
        ("adapters: {a: {source: /a, version: v9}}", "adapters[0].version: 'v9' is no version here; there is v1"),
        ("adapters: {a: {source: /a, rank: 8}}", "adapters[0].rank: unknown key"),
        ("adapters: {a: /a}, aliases: ['m:a']", "adapters[0].name: 'm:a' is also a name of a model"),
        ("adapters: {a: /a}, engine: {enable_lora: false}", "engine.enable_lora: is false"),
        ("adapters: {a: s3://other/a}", "adapters[0].source: 's3://other/a' is not among weights.allow.sources"),
    ],
)
def test_a_wrong_adapter_is_refused_by_its_path(keys: str, error: str) -> None:
    """Each wrong key of an adapter is refused with its path and the remedy."""
    with pytest.raises(ConfigError) as caught:
        models(f"  - {{name: m, source: /m, {keys}}}\n", "weights: {allow: {sources: ['/*', 's3://mine/*', 'ftp*']}}\n")
    assert f"models[0].{error}" in str(caught.value)
