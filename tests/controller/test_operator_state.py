"""Operators' changes survive the loss of the controller's folder if one gateway is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.admin.v1.catalog_pb2 import QuarantineRequest
from cluster.admin.v1.scaling_pb2 import FreezeRequest
from cluster.api.adapters import AdapterSpec
from cluster.api.types import CatalogEntry
from cluster.config.document import parse
from cluster.config.lenient import PartialConfig
from cluster.controller.catalog_overlay import CatalogOverlay, CatalogOverlayFile
from cluster.controller.links import ControllerLinks
from cluster.controller.operator_state import CATALOG_FILE, FILES, SCALING_FILE, OperatorState, recover
from cluster.controller.process import _parts
from cluster.controller.scaling import OperatorRequestFile
from cluster.gateway.links.hub import Hub, hub_server
from cluster.gateway.links.kept_state import KeptOperatorState
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.operator_state import MAX_BYTES
from tests.support.cluster import until
from tests.support.fake_ray import FakeRay
from tests.support.serving import Door


@given(states=st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=3)), max_size=8))
def test_the_newest_state_is_kept(states: list[tuple[int, bytes]]) -> None:
    """A gateway keeps the state with the highest revision that any controller has sent. Of equal revisions it keeps the
    first."""
    kept = KeptOperatorState()
    for revision, document in states:
        kept.keep(pb.OperatorState(revision=revision, document=document))
    highest = max((revision for revision, _ in states), default=0)
    assert kept.newest.revision == highest
    if highest:
        assert kept.newest.document == next(document for revision, document in states if revision == highest)


def test_a_gateway_keeps_the_state_over_a_restart(tmp_path: Path) -> None:
    """A restarted gateway still has the operators' state. A state that is too large is not stored. A damaged file is
    read as an empty state."""
    KeptOperatorState(tmp_path).keep(pb.OperatorState(revision=5, document=b"x"))
    assert KeptOperatorState(tmp_path).newest.revision == 5
    KeptOperatorState(tmp_path).keep(pb.OperatorState(revision=6, document=b"x" * (MAX_BYTES + 1)))
    assert KeptOperatorState(tmp_path).newest.revision == 5
    next(tmp_path.iterdir()).write_bytes(b"\xff")
    assert KeptOperatorState(tmp_path).newest.revision == 0


def test_a_state_is_sent_only_if_operators_have_changed_something(tmp_path: Path) -> None:
    """If no operator has changed anything, there is no message with the operators' state. Each recorded change gets a
    higher revision, even if the clock goes back."""
    assert OperatorState(tmp_path).message is None
    (tmp_path / SCALING_FILE).write_text("{}")
    times = iter([100.0, 50.0])
    state = OperatorState(tmp_path, lambda: next(times))
    assert state.message is None or state.message.revision == 1
    first = state.record_change()
    second = state.record_change()
    assert first is not None
    assert second is not None
    assert (first.revision, second.revision) == (100_000, 100_001)
    again = OperatorState(tmp_path).message
    assert again is not None
    assert again == second


CONFIG = """
api_version: headrace/v1
name: test
weights: {allow: {formats: [safetensors]}}
ray: [{name: r, dashboard_url: "http://127.0.0.1:1"}]
models:
  - {name: m, source: /m, version: v1, canary: {version: v2, weight: 0.25}}
"""


def gateway(folder: Path) -> AbstractAsyncContextManager[str]:
    """Serve a gateway's link port with an empty catalog; yield its address."""
    return serving(Hub("g", Door(), tuple, tuple, folder=folder))


@asynccontextmanager
async def serving(hub: Hub) -> AsyncIterator[str]:
    """Serve a hub; yield its address."""
    server = hub_server(hub)
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def controller(address: str, state: pb.OperatorState | None) -> AsyncIterator[ControllerLinks]:
    """Run a controller that publishes a catalog. It also sends `state` to the gateway, which keeps the state for the
    next controller."""
    links = ControllerLinks(controller_id="c", gateways=[address], tls=None, bundles=lambda _: None)
    links.set_operator_state(state)
    links.publish([CatalogEntry("m")])
    running = asyncio.create_task(links.run())
    try:
        yield links
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def kept_by(folder: Path) -> int:
    """Return the revision that a gateway has stored."""
    return KeptOperatorState(folder).newest.revision


@pytest.mark.slow
async def test_the_next_controller_goes_on_without_the_folder(tmp_path: Path) -> None:
    """A new controller with an empty folder gets the operators' changes from a gateway, even if the gateway was
    restarted. If the changes in the folder are at least as new as the gateway's, they are kept."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / SCALING_FILE).write_text('{"frozen": {"m": "x"}}')
    (first / CATALOG_FILE).write_text('{"life": ""}')
    state = OperatorState(first)
    async with gateway(tmp_path / "g") as address, controller(address, state.record_change()) as links:
        before = kept_by(tmp_path / "g")
        (first / SCALING_FILE).write_text('{"frozen": {}}')
        links.set_operator_state(state.record_change())
        await until(lambda: kept_by(tmp_path / "g") > before, "the gateway has the second change")
    async with gateway(tmp_path / "g") as address, controller(address, None):
        assert await recover([address], None, second)
        assert {name: (second / name).read_text() for name in FILES} == {
            name: (first / name).read_text() for name in FILES
        }
        assert OperatorState(second).message == OperatorState(first).message
        assert not await recover([address], None, second), "it is as new as the gateway's"
        (second / SCALING_FILE).write_text("{}")
        OperatorState(second).record_change()
        assert not await recover([address], None, second), "it is newer"


@pytest.mark.slow
async def test_a_state_without_a_file_removes_the_older_file(tmp_path: Path) -> None:
    """Recovery replaces all files with operators' changes. A file that the recovered state does not contain is deleted
    from the folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CATALOG_FILE).write_text("old")
    document = json.dumps({SCALING_FILE: "{}"}).encode()
    KeptOperatorState(tmp_path / "g").keep(pb.OperatorState(revision=2_000, document=document))
    async with gateway(tmp_path / "g") as address:
        assert await recover([address], None, tmp_path / "mine")
    assert not (tmp_path / "mine" / CATALOG_FILE).exists()
    assert (tmp_path / "mine" / SCALING_FILE).read_text() == "{}"


@pytest.mark.slow
@pytest.mark.parametrize("document", [b"", b"[]", b"\xff", b'{"catalog.json": 1}'])
async def test_an_unreadable_state_changes_nothing(tmp_path: Path, document: bytes) -> None:
    """A controller starts from its own folder if a gateway's state cannot be read."""
    KeptOperatorState(tmp_path / "g").keep(pb.OperatorState(revision=2_000, document=document))
    async with gateway(tmp_path / "g") as address:
        assert not await recover([address], None, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


async def test_no_gateway_delays_a_start_only_for_a_while(tmp_path: Path, unused_tcp_port: int) -> None:
    """A controller that reaches no gateway starts from its own folder after a while."""
    assert not await recover([f"127.0.0.1:{unused_tcp_port}", "srv://_link._tcp.gone"], None, tmp_path, 0.0, _nobody)


@pytest.mark.slow
async def test_a_request_of_an_operator_reaches_the_gateways(tmp_path: Path) -> None:
    """A model that an operator froze, and a version that an operator quarantined, remain so under the next controller,
    even if that controller's folder is empty. The controller reads the operator state from the gateway."""
    hub, (first, second) = (
        Hub("g", Door(), tuple, tuple, folder=tmp_path / "g"),
        (tmp_path / "first", tmp_path / "second"),
    )
    first.mkdir()
    async with serving(hub) as address:
        parts = partial(_parts, PartialConfig(parse(CONFIG)), FakeRay(), "i", [address], metrics=None, local=False)
        links, stepping, _ = parts(run_folder=first)
        await stepping.step()
        running = asyncio.create_task(links.run())
        await until(lambda: links.linked == 1, "the gateway is linked")
        links.publish([CatalogEntry("m")])
        await until(lambda: hub.controller.heard_at is not None, "the gateway has the catalog")
        await hub.controller.ask("Catalog.Freeze", FreezeRequest(name="m").SerializeToString(), "key:k1")
        await hub.controller.ask(
            "Catalog.Quarantine", QuarantineRequest(name="m", version="v2").SerializeToString(), "key:k1"
        )
        newest = OperatorState(first).message
        assert newest is not None
        await until(lambda: kept_by(tmp_path / "g") == newest.revision, "the gateway has both changes")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert await recover([address], None, second)
        assert OperatorRequestFile(second / SCALING_FILE).read().frozen == {"m"}
        stored = CatalogOverlayFile(second / CATALOG_FILE, "").read()
        assert stored is not None
        assert stored.overrides["m"]["v2"].quarantined


def test_gateways_get_the_state_without_adapters_of_a_removed_model(tmp_path: Path) -> None:
    """A controller that starts without a model drops the adapters that were loaded for the model, and sends the changed
    state to the gateways. If a part of its file is invalid, it drops nothing."""
    overlay = CatalogOverlay(adapters={"gone": (AdapterSpec("a", "/a"),)})
    CatalogOverlayFile(tmp_path / CATALOG_FILE, "").keep(overlay)
    before = OperatorState(tmp_path).record_change()
    assert before is not None

    def start(*problems: str) -> pb.OperatorState | None:
        found = PartialConfig(parse(CONFIG), problems)
        return _parts(found, FakeRay(), "i", ["g:1"], tmp_path, None, local=False)[0]._operator_state

    assert start("models[1].source: required") == before
    after = start()
    assert after is not None
    assert after.revision > before.revision
    stored = CatalogOverlayFile(tmp_path / CATALOG_FILE, "").read()
    assert stored is not None
    assert stored.adapters == {}


async def _nobody(name: str) -> tuple[str, ...]:
    assert name == "_link._tcp.gone"
    return ()
