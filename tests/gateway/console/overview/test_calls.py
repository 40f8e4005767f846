"""Calls to models from the console's pages. They are handled like calls with an API key: with the tenant's limits,
allowed models and ledger."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cluster.ledger.rows import UsageQuery
from cluster.observe.exposition import samples
from cluster.wire.bundle import Bundle
from tests.support.admin import role_key
from tests.support.cluster import running_cluster, sim_engine, until
from tests.support.console import Browser
from tests.support.http import chat_body
from tests.support.keyed import Keyed, eventually, keyed_cluster

CHAT = "/console/v1/chat/completions"


@pytest.fixture
async def keyed(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Keyed]:
    """Provide a gateway with keys and one worker, at which tenants may sign in."""
    async with keyed_cluster(tmp_path, gateway="  console: {tenants: true}\n") as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint), bundle)
        yield keyed


async def signed_in(keyed: Keyed, tenant: str, **policy: object) -> Browser:
    """Return the browser of a signed-in caller of a new tenant."""
    browser = Browser(keyed.cluster)
    assert (await browser.sign_in(await keyed.key(tenant, **policy))).status == 204
    return browser


@pytest.mark.slow
async def test_a_streamed_chat(keyed: Keyed) -> None:
    """A chat from the console is streamed in the events of the OpenAI API. The access log and the metrics name the
    console as its API, and the ledger has a record with the key of the sign-in."""
    browser = await signed_in(keyed, "acme", models=["*"])
    with capture_logs() as logs:
        reply = await browser.fetch(CHAT, chat_body(stream=True))
        await keyed.cluster.until_idle()
        await until(lambda: any(line["event"] == "call.ended" for line in logs), "the access line is written")
    assert reply.status == 200
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in reply.events)
    (line,) = (line for line in logs if line["event"] == "call.ended")
    assert (line["api"], line["tenant"], line["outcome"]) == ("console", "acme", "ok")
    labels = {"headrace_cluster": "test", "model": "sim", "tenant": "acme", "api": "console", "outcome": "ok"}
    page = keyed.gateway.metrics.render("")[1].decode()
    assert ("headrace_requests_total", labels, 1.0) in samples(page)
    key_id = (await browser.session())["actor"].removeprefix("key:")

    async def is_recorded() -> bool:
        found = list(keyed.ledger.usage.records(UsageQuery(tenant="acme"), limit=10))
        return [record.key_id for record in found] == [key_id]

    await eventually(is_recorded, "the call is in the ledger")


@pytest.mark.slow
async def test_the_tenants_models_and_limits_hold(keyed: Keyed) -> None:
    """Only the models that the tenant may use are listed and found. The tenant's limit on requests applies."""
    browser = await signed_in(keyed, "small", models=["sim"], limits={"requests_per_minute": 2})
    listed = await browser.fetch("/console/v1/models")
    assert [model["id"] for model in listed.json["data"]] == ["sim"]
    assert (await browser.fetch(CHAT, chat_body())).status == 200
    other = await signed_in(keyed, "none", models=["other"])
    assert (await other.fetch("/console/v1/models")).json["data"] == []
    assert (await other.fetch(CHAT, chat_body())).status == 404
    statuses = [(await browser.fetch(CHAT, chat_body())).status for _ in range(3)]
    assert statuses[-1] == 429


async def test_guards_hold(keyed: Keyed) -> None:
    """A call from the console's pages is refused if a guard of the tenant refuses the prompt."""
    guards = [{"builtin": "patterns", "patterns": {"word": "forbidden"}, "action": "refuse"}]
    browser = await signed_in(keyed, "guarded", models=["*"], guards=guards)
    assert (await browser.fetch(CHAT, chat_body("forbidden"))).status == 403
    assert (await browser.fetch(CHAT, chat_body("allowed"))).status == 200


async def test_only_the_playgrounds_paths(keyed: Keyed) -> None:
    """A console session gives no access to the paths of the OpenAI API. Under /console, only the two paths that the
    playground needs exist."""
    browser = await signed_in(keyed, "acme", models=["*"])
    assert (await browser.fetch("/v1/models")).status == 401
    assert (await browser.fetch("/v1/chat/completions", chat_body())).status == 401
    for path in ("/console/v1/completions", "/console/v1/embeddings", "/console/v1/models/sim"):
        assert (await browser.fetch(path)).status == 404
    key = await keyed.another_key("acme")
    await keyed.until_known("acme", key)
    stranger = Browser(keyed.cluster)
    assert (await stranger.fetch("/console/v1/models", authorization=f"Bearer {key}")).status == 401


@pytest.mark.slow
async def test_another_tenants_call_is_unknown(keyed: Keyed) -> None:
    """If a tenant administrator asks for another tenant's call by its id, the answer reveals nothing. A viewer of the
    cluster gets the call."""
    rival = await signed_in(keyed, "rival", models=["*"])
    call_id = (await rival.fetch(CHAT, chat_body(), x_request_id="theirs")).json["id"]
    browsers = {}
    for role, tenant in (("tenant_admin", "acme"), ("viewer", "ops")):
        key = await role_key(keyed.ledger, tenant, role)
        await keyed.until_known(tenant, key)
        browsers[role] = Browser(keyed.cluster)
        assert (await browsers[role].sign_in(key)).status == 204
    for name in ("theirs", call_id):
        assert (await browsers["viewer"].admin("Fleet.ExplainRequest", request_id=name)).status == 200
        for parent in ({}, {"parent": "tenants/acme"}, {"parent": "tenants/rival"}):
            reply = await browsers["tenant_admin"].admin("Fleet.ExplainRequest", request_id=name, **parent)
            absent = await browsers["tenant_admin"].admin("Fleet.ExplainRequest", request_id="x" * len(name), **parent)
            assert reply.status == absent.status == 404
            assert json.loads(reply.body.replace(name.encode(), b"")) == json.loads(
                absent.body.replace(b"x" * len(name), b"")
            )


async def test_without_auth(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Without `auth` the playground makes calls as the only tenant."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(sim_engine(checkpoint), bundle)
        browser = Browser(cluster)
        await browser.session()
        assert (await browser.fetch(CHAT, chat_body())).json["choices"][0]["message"]["content"]
