"""Adapters as models of their own: which tenants may use them, their names and their states."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.adapters import ADAPTERS, AdapterSpec, AdapterState, AdapterStatus
from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import CatalogEntry, EngineInfo, ModelState, VersionShare, WorkerIdentity
from cluster.gateway.apis.grpc.inference import _model_pb
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.slots import Sink
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.scheduling import queue_errors
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.codecs.adapter_codec import adapter_report_to_pb
from tests.gateway.models.test_lookup import no_bundle, work_of
from tests.support.cpu import cpu_within
from tests.support.links import NoListener

A, B = "a" * 64, "b" * 64


def caller(tenant: str, *models: str, aliases: dict[str, str] | None = None) -> Principal:
    """Return a principal whose tenant may use these models."""
    return Principal(TenantPolicy(tenant, models=models), by="key", subject="k", model_aliases=aliases or {})


def directory_with(folder: Path, *adapters: AdapterSpec) -> ModelDirectory:
    """Return a directory with the model `m`, the alias `x`, and these adapters."""
    directory = ModelDirectory(folder, no_bundle)
    directory.apply_catalog([CatalogEntry("m", ("x",), state=ModelState.READY, adapters=adapters)], 7)
    return directory


SHARED, PRIVATE = AdapterSpec("shared", "/s"), AdapterSpec("private", "/p", tenants=("acme",))


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        (caller("acme", "m"), {"m:shared", "x:shared", "m:private", "x:private"}),
        (caller("rival", "*"), {"m:shared", "x:shared"}),
        (caller("rival", "m:shared"), {"m:shared", "x:shared"}),
        (caller("rival", "m:private"), set()),
        (caller("acme", "m:p*"), {"m:private", "x:private"}),
        (caller("acme", "n"), set()),
    ],
)
def test_who_may_use_an_adapter(tmp_path: Path, who: Principal, allowed: set[str]) -> None:
    """A tenant may use an adapter if it may use the adapter's model, or if its policy names the adapter. It may not use
    an adapter that is private to other tenants. The list of models shows a tenant exactly the adapters that it may
    use."""
    directory = directory_with(tmp_path, SHARED, PRIVATE)
    for name in ("m:shared", "x:shared", "m:private", "x:private"):
        if name in allowed:
            target = directory.lookup.target(name, who)
            assert (target.model.name, f"m:{target.adapter}") == ("m", name.replace("x:", "m:"))
        else:
            with pytest.raises(CallError, match="does not exist") as refused:
                directory.lookup.target(name, who)
            assert refused.value.outcome is Outcome.MODEL_NOT_FOUND
    listed = {target.name for target in directory.lookup.targets_of(who)}
    assert {name for name in allowed if name.startswith("m:")} == listed - {"m"}


def test_anothers_adapter_is_refused_like_none(tmp_path: Path) -> None:
    """Refusing another tenant's adapter takes the same work as refusing an adapter that does not exist."""
    directory = directory_with(tmp_path, SHARED, PRIVATE)
    who = caller("rival", "m")
    work_of(directory, "m:absent", who)
    assert work_of(directory, "m:private", who) == work_of(directory, "m:absent", who)


def test_adapters_of_anothers_model_are_refused_like_none(tmp_path: Path) -> None:
    """Refusing a name `model:adapter` takes the same work, whether the caller may not use the model or the model does
    not exist."""
    directory = directory_with(tmp_path, SHARED, PRIVATE)
    who = caller("rival", "other", "mine:*")
    work_of(directory, "absent:shared", who)
    for name in ("m:shared", "x:private", "m:absent"):
        assert work_of(directory, name, who) == work_of(directory, "absent:shared", who)


@given(
    st.lists(st.tuples(st.sampled_from(["", "acme", "rival"]), st.text("ab", min_size=1, max_size=3)), max_size=8),
    st.lists(st.text("mxab:*?[]", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_lists_have_what_can_be_called(
    tmp_path_factory: pytest.TempPathFactory, adapters: list[tuple[str, str]], patterns: list[str]
) -> None:
    """The gateway's list of adapters for a caller has exactly the adapters that the model patterns in the caller's
    policy allow, also after the catalog has changed."""
    names = {name: AdapterSpec(name, "/s", tenants=(tenant,) if tenant else ()) for tenant, name in adapters}
    directory, who = directory_with(tmp_path_factory.mktemp("law"), SHARED), caller("acme", *patterns)
    directory.lookup.adapters_of(who)
    directory.apply_catalog([CatalogEntry("m", ("x",), state=ModelState.READY, adapters=tuple(names.values()))], 8)
    (model,) = directory.models
    expected = [f"m:{name}" for name in sorted(names) if model.access.allows_adapter(name, who)]
    assert [target.name for target in directory.lookup.adapters_of(who)] == expected
    for name in expected:
        assert directory.lookup.target(name, who).name == name


def test_a_list_costs_the_adapters_once(tmp_path: Path) -> None:
    """Listing 1,000 adapters takes at most 20 ms, even for a tenant whose policy has 65 patterns of model names.
    Building the listed entries also takes at most 20 ms."""
    directory = directory_with(tmp_path, *(AdapterSpec(f"a{i}", "/s") for i in range(1000)))
    who = caller("rival", "m:*", *(f"other-{i}-*" for i in range(64)))
    with cpu_within(0.02):
        assert len(directory.lookup.targets_of(who)) == 1000
    with cpu_within(0.02):
        assert all(_model_pb(directory, target, who).name for target in directory.lookup.targets_of(who))


@pytest.mark.parametrize("is_reported_first", [True, False])
async def test_a_worker_that_follows_a_lost_gateway_is_told(tmp_path: Path, is_reported_first: bool) -> None:
    """A worker has loaded an additional adapter for another gateway, which is then lost. When the catalog has a new
    revision, this gateway sends its own set of adapters to the worker again, although the set is unchanged, so that the
    worker drops the additional adapter. `is_reported_first`: whether the worker reports that adapter before the new
    revision."""
    directory = directory_with(tmp_path, SHARED)
    (link,) = linked(directory, "one")
    mine = AdapterStatus("shared", A, AdapterState.READY)
    others = (mine, AdapterStatus("loaded", B, AdapterState.READY))
    sent: list[int] = []
    link.adapters._send = lambda message: sent.append(message.revision)
    report(link, mine)
    if is_reported_first:
        report(link, *others)
    assert sent == []
    for revision in (9, 10):
        entry = CatalogEntry("m", ("x",), state=ModelState.READY, adapters=(SHARED,))
        directory.apply_catalog([entry], revision)
        if not is_reported_first:
            assert sent == ([] if revision == 9 else [9])
            report(link, *others)
        if revision == 9:
            assert sent == [9]
            report(link, mine)
    assert sent == ([9] if is_reported_first else [9, 10])


async def test_routing_reads_a_report_once(tmp_path: Path) -> None:
    """Routing reads the keys of a worker's adapters after each message. The keys are computed again only when the
    worker reports, or when the valid digest of an adapter changes."""
    directory = directory_with(tmp_path, SHARED)
    one, two = linked(directory, "one", "two")
    adapters = directory.models[0].adapters
    report(one, AdapterStatus("shared", A, AdapterState.READY))
    first = adapters.keys_on(one)
    assert adapters.keys_on(one) is first
    assert first[0] == {A, ":shared"}
    report(two, AdapterStatus("shared", B, AdapterState.READY))
    report(one, AdapterStatus("shared", A, AdapterState.LOADING))
    assert (adapters.keys_on(one), adapters.digest("shared")) == ((frozenset(), frozenset()), B)
    assert adapters.keys_on(two)[0] == {B, ":shared"}, "the digest that counts has changed"
    directory.remove_link(one)
    assert list(adapters._keys) == ["two"]


def test_aliases_of_a_tenant_name_adapters_too(tmp_path: Path) -> None:
    """A tenant's alias may stand for an adapter, or for the model in a name `model:adapter`."""
    directory = directory_with(tmp_path, SHARED)
    who = caller("t", "m", aliases={"support": "m:shared", "mine": "x"})
    assert {directory.lookup.target(name, who).name for name in ("support", "mine:shared")} == {"m:shared"}


async def test_a_fallback_needs_the_adapter_too(tmp_path: Path) -> None:
    """A call for an adapter falls back to another model only if that model has an adapter of the same name. The adapter
    must be ready, and the caller must be allowed to use it."""
    directory = directory_with(tmp_path, SHARED, PRIVATE)
    entries = [CatalogEntry("n", fallback=("m",)), CatalogEntry("m", adapters=(SHARED, PRIVATE))]
    directory.apply_catalog(entries, 8)
    (link,) = linked(directory, "one")
    model, who = directory.lookup.resolve("n"), caller("rival", "*")
    report(link, AdapterStatus("private", A, AdapterState.READY))
    assert directory.lookup.fallback_of(model, who) is not None
    assert directory.lookup.fallback_of(model, who, "shared") is None, "it is not ready"
    assert directory.lookup.fallback_of(model, who, "private") is None, "it is another tenant's"
    assert directory.lookup.fallback_of(model, caller("acme", "*"), "private") is not None
    report(link, AdapterStatus("shared", A, AdapterState.READY))
    assert directory.lookup.fallback_of(model, who, "shared") is not None


def report(link: WorkerLink, *statuses: AdapterStatus) -> None:
    """Report these adapters from a worker."""
    link.apply(pb.WorkerTurn(adapters=adapter_report_to_pb(statuses)))


class Listener(NoListener):
    """A listener that passes the reports of adapters to a directory, as in a gateway."""

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    def adapters_changed(self, link: WorkerLink) -> None:
        """Implements `LinkListener.adapters_changed`."""
        self._directory.adapters_changed(link)


def linked(
    directory: ModelDirectory, *names: str, capabilities: tuple[str, ...] = (ADAPTERS,), **fields: str
) -> list[WorkerLink]:
    """Link workers of the model `m` to the directory, and return the links. `fields`: fields of their identities."""
    info = EngineInfo("class", "sim", "0", 16, 100, 4, 2048, 2048, 100, capabilities=capabilities)
    links = []
    for name in names:
        identity = WorkerIdentity(name, f"{name}-1", "m", **fields)
        links.append(WorkerLink(identity, info, 1, Listener(directory), LinkLiveness(0.0, 1.0, 1.0)))
        directory.add_link(links[-1])
    return links


async def sent(link: WorkerLink) -> tuple[int, list[str]]:
    """Return the revision and the adapters that the gateway last sent to a worker."""
    link.box.grant_ack(1)
    message = await link.box.next_message()
    return message.adapters.revision, [adapter.name for adapter in message.adapters.adapters]


async def test_workers_get_the_adapters_of_their_version(tmp_path: Path) -> None:
    """A worker gets the adapters of its version, with the catalog's revision, when its link is established and when the
    adapters change. A worker that cannot load adapters gets none."""
    directory = directory_with(tmp_path, SHARED, AdapterSpec("two", "/t", version="v2"))
    (one,), (two,) = linked(directory, "one", version="v1"), linked(directory, "two", version="v2")
    (old,) = linked(directory, "old", capabilities=())
    assert await sent(one) == (7, ["shared"])
    assert await sent(two) == (7, ["shared", "two"])
    assert await sent(old) == (0, [])
    directory.apply_catalog([CatalogEntry("m", replicas=9, adapters=(SHARED,))], 8)
    assert await sent(one) == (0, []), "nothing has changed for it"
    assert await sent(two) == (8, ["shared"])
    directory.apply_catalog([CatalogEntry("m")], 9)
    assert await sent(one) == (9, [])
    assert await sent(old) == (0, [])


async def test_a_gateway_that_restarts_without_a_controller_knows_the_adapters(tmp_path: Path) -> None:
    """If a gateway starts while the controller is down, it sends workers the adapters of its stored catalog, with the
    revision of this catalog."""
    directory_with(tmp_path, SHARED)
    (link,) = linked(ModelDirectory(tmp_path, no_bundle), "one")
    assert await sent(link) == (7, ["shared"])


async def test_the_state_of_an_adapter(tmp_path: Path) -> None:
    """An adapter is ready once one worker has loaded it, failed if no worker could load it, and loading in all other
    cases. The reasons of failures are shown. Workers that cannot load adapters do not count."""
    directory = directory_with(tmp_path, AdapterSpec("a", "/a", A))
    adapters = directory.models[0].adapters
    assert (adapters.view("a").state, adapters.view("a").workers) == (AdapterState.LOADING, 0)
    one, two = linked(directory, "one", "two")
    linked(directory, "old", capabilities=())
    assert (adapters.view("a").state, adapters.view("a").workers) == (AdapterState.LOADING, 2)
    report(one, AdapterStatus("a", "", AdapterState.FAILED, "no space left"))
    assert (adapters.view("a").state, adapters.view("a").reason) == (AdapterState.LOADING, "no space left")
    report(two, AdapterStatus("a", A, AdapterState.FAILED, "rank 128 is above 64"))
    view = adapters.view("a")
    assert (view.state, view.failures) == (
        AdapterState.FAILED,
        (("one", "no space left"), ("two", "rank 128 is above 64")),
    )
    refused = adapters.refusal_of("m", "a")
    assert refused is not None
    assert refused.outcome is Outcome.ADAPTER_INVALID
    assert "no space left; rank 128" in refused.message
    report(two, AdapterStatus("a", A, AdapterState.READY))
    assert (adapters.view("a").state, adapters.view("a").ready) == (AdapterState.READY, 1)
    assert directory.lookup.target("m:a").state is ModelState.READY
    report(two, AdapterStatus("a", B, AdapterState.READY))
    assert adapters.view("a").ready == 0, "other files than the pinned ones do not count"
    directory.remove_link(two)
    assert adapters.view("a").state is AdapterState.FAILED


async def test_replaced_workers_serve_an_adapter_until_others_have_it(tmp_path: Path) -> None:
    """While the workers that replace others have not loaded an adapter, or cannot, the adapter is ready on the replaced
    workers that have it."""
    directory = directory_with(tmp_path, AdapterSpec("a", "/a", A))
    adapters = directory.models[0].adapters
    (old,), (new,) = linked(directory, "old", generation="g1"), linked(directory, "new", generation="g2")
    report(old, AdapterStatus("a", A, AdapterState.READY))
    entry = CatalogEntry("m", state=ModelState.READY, adapters=(AdapterSpec("a", "/a", A),), retired=("g1",))
    directory.apply_catalog([entry], 8)
    assert (adapters.view("a").state, adapters.view("a").ready) == (AdapterState.READY, 1)
    report(new, AdapterStatus("a", "", AdapterState.FAILED, "no space left"))
    assert (adapters.view("a").state, adapters.view("a").reason) == (AdapterState.READY, "no space left")
    assert adapters.refusal_of("m", "a") is None
    directory.remove_link(old)
    assert adapters.view("a").state is AdapterState.FAILED


def publish(directory: ModelDirectory, spec: AdapterSpec, *versions: str, **fields: Any) -> None:
    """Apply a catalog in which the model `m` has one adapter and these versions."""
    entry = CatalogEntry("m", adapters=(spec,), versions=tuple(map(VersionShare, versions)))
    directory.apply_catalog([dataclasses.replace(entry, **{"state": ModelState.READY, **fields})], 8)


async def test_an_adapter_of_a_removed_version_is_refused(tmp_path: Path) -> None:
    """An adapter of a version that the model no longer has is FAILED, and its calls are refused with the reason, once
    no worker of this version may serve them. When the version returns, calls wait for the adapter again."""
    spec = AdapterSpec("a", "/a", A, version="v1")
    directory = directory_with(tmp_path, spec)
    adapters = directory.models[0].adapters
    (old,), _ = linked(directory, "old", version="v1", generation="g1"), linked(directory, "new", version="v2")
    report(old, AdapterStatus("a", A, AdapterState.READY))
    publish(directory, spec, "v2", "v3")
    assert (adapters.view("a").state, adapters.refusal_of("m", "a")) == (AdapterState.READY, None), "v1 still serves"
    publish(directory, spec, "v2", "v3", retired=("g1",))
    assert adapters.refusal_of("m", "a") is None, "the replaced worker has it"
    directory.remove_link(old)
    refused = adapters.refusal_of("m", "a")
    assert refused is not None
    assert refused.outcome is Outcome.ADAPTER_INVALID
    reason = "it belongs to version v1, which the model no longer has: load it for one of v2, v3"
    assert refused.message.endswith(f": {reason}")
    target = directory.lookup.target("m:a")
    assert (target.state, target.state_reason) == (ModelState.FAILED, reason)
    publish(directory, spec, "v2", "v1")
    assert (adapters.view("a").state, adapters.refusal_of("m", "a")) == (AdapterState.LOADING, None)


@pytest.mark.parametrize(
    ("versions", "state"),
    [((), ModelState.READY), (("v2",), ModelState.DRAINING), (("v2", ""), ModelState.READY)],
)
async def test_an_entry_that_may_lack_versions_refuses_no_adapter(
    tmp_path: Path, versions: tuple[str, ...], state: ModelState
) -> None:
    """An adapter is not refused because of its version if the catalog may not have all versions of the model: before
    the controller has read the state of Ray, while the model is removed, and for replicas of an unknown version."""
    spec = AdapterSpec("a", "/a", version="v1")
    directory = directory_with(tmp_path, spec)
    linked(directory, "new", version="v2")
    publish(directory, spec, *versions, state=state)
    assert directory.models[0].adapters.refusal_of("m", "a") is None


async def test_the_digest_is_learned_from_ready_workers(tmp_path: Path) -> None:
    """If the catalog has no digest, the smallest of the digests that most ready workers have is valid. A worker with
    another digest is logged and gets no calls."""
    directory = directory_with(tmp_path, AdapterSpec("a", "/a"))
    adapters = directory.models[0].adapters
    one, two = linked(directory, "one", "two")
    assert adapters.key("a") == ":a"
    report(one, AdapterStatus("a", B, AdapterState.LOADING))
    assert adapters.key("a") == ":a", "it may yet fail"
    report(two, AdapterStatus("a", A, AdapterState.READY, resident=True))
    with structlog.testing.capture_logs() as logs:
        report(one, AdapterStatus("a", B, AdapterState.READY))
        report(one, AdapterStatus("a", B, AdapterState.READY, resident=True))
    assert [(log["event"], log["used"], log["other"]) for log in logs] == [("adapter.digests_differ", A, B)]
    assert (adapters.key("a"), adapters.view("a").ready) == (A, 1)
    assert adapters.keys_on(two) == (frozenset({A, ":a"}), frozenset({A, ":a"}))
    assert adapters.keys_on(one) == (frozenset({B}), frozenset({B})), (
        "calls that began with these files may resume there"
    )
    directory.remove_link(two)
    assert (adapters.key("a"), adapters.view("a").ready) == (B, 1)


async def test_gateways_choose_the_same_digest(tmp_path: Path) -> None:
    """Gateways that see the same workers choose the same digest, in whatever order the workers have reported."""
    chosen = []
    for names in (("one", "two", "three"), ("three", "two", "one")):
        directory = directory_with(tmp_path, AdapterSpec("a", "/a"))
        for link in linked(directory, *names):
            digest = A if link.identity.worker_id == "one" else B
            report(link, AdapterStatus("a", digest, AdapterState.READY))
        chosen.append(directory.models[0].adapters.digest("a"))
    assert chosen == [B, B]


async def test_states_of_an_earlier_load_do_not_count(tmp_path: Path) -> None:
    """After an adapter is loaded again, a worker's last state does not count until the worker has received the new
    load: neither the digest of the earlier files nor the reason why they failed."""
    directory = directory_with(tmp_path, AdapterSpec("a", "/a", load_number=1))
    adapters = directory.models[0].adapters
    one, two = linked(directory, "one", "two")
    report(one, AdapterStatus("a", A, AdapterState.READY, load_number=1))
    report(two, AdapterStatus("a", "", AdapterState.FAILED, "no space left", load_number=1))
    assert (adapters.view("a").ready, len(adapters.view("a").failures)) == (1, 1)
    entry = CatalogEntry("m", ("x",), state=ModelState.READY, adapters=(AdapterSpec("a", "/b", load_number=2),))
    directory.apply_catalog([entry], 8)
    assert (adapters.digest("a"), adapters.view("a").ready, adapters.view("a").failures) == ("", 0, ())
    report(one, AdapterStatus("a", B, AdapterState.READY, load_number=2))
    report(two, AdapterStatus("a", B, AdapterState.READY))
    assert (adapters.digest("a"), adapters.view("a").ready) == (B, 2), "older workers report no number"
    entry = dataclasses.replace(entry, adapters=(AdapterSpec("a", "/b", load_number=3),))
    directory.apply_catalog([entry], 9)
    report(one, AdapterStatus("a", B, AdapterState.READY, load_number=3))
    assert (adapters.digest("a"), adapters.view("a").ready) == (B, 2), "loaded again, with the same files"


async def test_tenants_see_no_source(tmp_path: Path) -> None:
    """The reason of a failed adapter has the source for operators, and not for tenants."""
    directory = directory_with(tmp_path, AdapterSpec("a", "s3://bucket/secret"), AdapterSpec("b", "/node/secret"))
    adapters = directory.models[0].adapters
    (link,) = linked(directory, "one")
    reasons = {
        "a": "cannot read s3://bucket/secret/adapter_config.json",
        "b": "there is no folder /node/secret; mend it",
    }
    report(link, *(AdapterStatus(name, "", AdapterState.FAILED, reason) for name, reason in reasons.items()))
    for name, reason in reasons.items():
        refused = adapters.refusal_of("m", name)
        assert refused is not None
        shown = [refused.message, directory.lookup.target(f"m:{name}").state_reason, too_late_message(directory, name)]
        assert not any("secret" in text for text in shown), shown
        assert adapters.view(name).reason == reason


def too_late_message(directory: ModelDirectory, adapter: str) -> str:
    """Return the error of a call that has waited too long for an adapter."""
    return queue_errors.too_late("m", directory.models[0], False, adapter).message


class Refusing:
    """A sink whose refusal loses the adapter A, as that of a sequence does."""

    last_token_at = 0.0

    def __init__(self, link: WorkerLink) -> None:
        self._link = link

    def refused(self, reason: str, message: str, field: str) -> None:
        self._link.adapters.lose(A)


async def test_a_report_with_a_refusal_is_newer(tmp_path: Path) -> None:
    """A refused call marks the adapter as LOADING on the worker. A report in the same message as the refusal takes
    precedence, since no other report may follow. A failed adapter stays failed."""
    directory = directory_with(tmp_path, AdapterSpec("a", "/a", A))
    (link,) = linked(directory, "one")
    for state, with_report, expected in (
        (AdapterState.READY, False, AdapterState.LOADING),
        (AdapterState.READY, True, AdapterState.READY),
        (AdapterState.FAILED, False, AdapterState.FAILED),
    ):
        status = AdapterStatus("a", A, state)
        report(link, status)
        link.slots.add(1, cast(Sink, Refusing(link)), 1, 1, False)
        turn = pb.WorkerTurn(refused=[pb.Refused(slot=1, reason="ADAPTER_INVALID")])
        if with_report:
            turn.adapters.CopyFrom(adapter_report_to_pb([status]))
        link.apply(turn)
        assert link.adapters.statuses["a"].state is expected


reports = st.dictionaries(st.sampled_from("ab"), st.tuples(st.sampled_from([A, B]), st.sampled_from(AdapterState)))


@given(st.lists(st.tuples(st.sampled_from(["one", "two", "three"]), st.none() | reports), max_size=20))
def test_counts_are_those_of_the_reports(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, dict[str, tuple[str, AdapterState]] | None]]
) -> None:
    """After any reports and losses of workers, an adapter is ready on exactly the workers whose newest reports say so.
    If the catalog gives no digest of an adapter, the digest in use is one that a ready worker has."""
    directory = directory_with(tmp_path_factory.mktemp("law"), AdapterSpec("a", "/a"), AdapterSpec("b", "/b", B))
    links: dict[str, WorkerLink] = {}
    adapters = directory.models[0].adapters
    for name, reported in changes:
        if reported is None:
            if (gone := links.pop(name, None)) is not None:
                directory.remove_link(gone)
            continue
        if name not in links:
            (links[name],) = linked(directory, name)
        report(links[name], *(AdapterStatus(one, *status) for one, status in reported.items()))
        ready = [
            (status.name, status.digest)
            for link in links.values()
            for status in link.adapters.statuses.values()
            if status.state is AdapterState.READY
        ]
        for digest in (A, B):
            assert adapters.is_ready(digest) == any(other == digest for _, other in ready)
        for each in "ab":
            of_name = [digest for named, digest in ready if named == each]
            digest = adapters.digest(each)
            assert adapters.view(each).ready == of_name.count(digest)
            assert adapters.is_ready(f":{each}") == (digest in of_name)
            assert each == "b" or not of_name or digest in of_name
