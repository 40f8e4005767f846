"""Tests of the configuration that a restarted gateway or controller uses if the file is partly invalid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.document import ConfigError
from cluster.config.lenient import HeldModel, for_controller, for_gateway

HEAD = "api_version: headrace/v1\nname: c\n"
GOOD = "{name: good, source: hf://o/m, aliases: [default], fallback: [bad]}"
WRONG_ENTRIES = [
    "{name: bad, source: hf://o/m, aliases: [b], replicas: {min: 4, max: 2}}",
    "{name: bad, source: hf://o/m, aliases: [b], engine: {sed: 1}}",
    "{name: bad, source: nope://o/m, aliases: [b]}",
    "{name: bad, aliases: [b]}",
    "{name: bad, source: hf://o/m, aliases: [b], fallback: [nobody]}",
    "{name: bad, source: hf://o/m, aliases: [b], dtype: auto, dtype: float16}",
    "{name: bad, source: hf://o/m, aliases: [b], load_format: pt}",
]
WRONG_SECTIONS = ["models: 3", "models: {a: b}", "{}", f"models: [{GOOD}]\nmodels: []"]


@pytest.mark.parametrize("wrong", WRONG_ENTRIES)
def test_a_wrong_entry_takes_no_other_along(wrong: str) -> None:
    """The controller starts despite an invalid entry. Neither the entry's model nor any other model is removed."""
    found = for_controller(f"{HEAD}models: [{GOOD}, {wrong}]")
    assert [model.name for model in found.config.models] == ["good"]
    assert (found.held[0].name, found.held[0].aliases, found.all_held) == ("bad", ("b",), False)
    assert any("models[1]" in problem for problem in found.problems)


def test_of_two_with_one_name_neither_is_taken() -> None:
    """If two entries have the same name, neither is used, since the wrong one could replace the running model."""
    entries = [f"{{name: {name}, source: hf://o/{at}}}" for at, name in enumerate("xxy")]
    found = for_controller(f"{HEAD}models: [{', '.join(entries)}]")
    assert [model.name for model in found.config.models] == ["y"]
    assert found.held == (HeldModel("x"),)


def test_an_alias_of_two_models_stays_with_one() -> None:
    """If two models with invalid entries have the same alias, the alias belongs to the first model only, so that
    gateways can resolve it."""
    found = for_controller(HEAD + "models: [{name: x, source: s, aliases: [d]}, {name: y, source: s, aliases: [d, e]}]")
    assert found.config.models == ()
    assert found.held == (HeldModel("x", ("d",)), HeldModel("y", ("e",)))


@pytest.mark.parametrize("section", WRONG_SECTIONS)
def test_a_section_that_is_none_holds_everything(section: str) -> None:
    """If the section `models` is not a list, all running models stay unchanged. They would be deleted if the section
    were read as an empty list."""
    found = for_controller(f"{HEAD}{'' if section == '{}' else section}\n")
    assert (found.config.models, found.all_held) == ((), True)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "gateway: {listen: {http: nowhere}}\nmodels: 3\n",
        HEAD + "gateway: {drain_timeout_s: 5m}\nmodels: []\n",
        HEAD + "observe: {log_level: info}\nobserve: {log_level: info}\nmodels: []\n",
        HEAD + "models: [",
        "name: c\nmodels: []\n",
    ],
)
def test_what_is_wrong_elsewhere_still_ends_a_start(text: str) -> None:
    """A problem outside the section `models` prevents the start of gateway and controller."""
    for lenient in (for_gateway, for_controller):
        with pytest.raises(ConfigError):
            lenient(text)


@pytest.mark.parametrize(
    "sections",
    [
        *(f"models: [{GOOD}, {wrong}]" for wrong in WRONG_ENTRIES),
        *WRONG_SECTIONS,
        "models: []\nweights: {allow: {sorces: []}}",
        "models: []\nray: [{name: B}]",
        "models: 3\nray: 3\nweights: 3",
    ],
)
def test_a_gateway_starts_without_what_it_does_not_read(sections: str) -> None:
    """A gateway starts even if the sections `models`, `weights` and `ray` are invalid, since it does not use them."""
    found = for_gateway(f"{HEAD}{'' if sections == '{}' else sections}\n")
    assert found.problems
    assert found.config.gateway.listen.grpc == "127.0.0.1:50051"


def test_a_gateway_with_a_ray_of_its_own_still_needs_the_shared_secret() -> None:
    """A configuration with the sections `auth` and `ray` must name a secret file that all gateways share. A gateway
    checks this even if it ignores the section `ray` as invalid."""
    with pytest.raises(ConfigError, match="cluster_secret_file"):
        for_gateway(HEAD + "auth: {api_keys: {}}\nray: [{name: B, dashboard_url: 'http://x'}]\nmodels: []\n")


@given(wrong=st.lists(st.sampled_from(WRONG_ENTRIES), min_size=1, max_size=3), at=st.integers(0, 3))
def test_the_right_entries_are_always_all_taken(wrong: list[str], at: int) -> None:
    """All valid entries are used, whatever the number and the positions of the invalid ones."""
    named = [entry.replace("name: bad", f"name: bad{i}").replace("[b]", f"[b{i}]") for i, entry in enumerate(wrong)]
    valid = [f"{{name: m{i}, source: hf://o/m}}" for i in range(3)]
    entries = [*valid[:at], *named, *valid[at:]]
    found = for_controller(f"{HEAD}models: [{', '.join(entries)}]")
    assert {model.name for model in found.config.models} == {"m0", "m1", "m2"}
    assert {model.name for model in found.held} == {f"bad{i}" for i in range(len(wrong))}
