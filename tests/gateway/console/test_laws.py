"""Properties of the console's overview, a document about the cluster.

The changes that are sent after a document turn this document into the next one. Merging the parts of the
gateways does not depend on the order of the parts. A viewer who may see only one tenant sees nothing of other
tenants.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.console.overview import deltas, overview
from cluster.gateway.console.overview.parts import FORMAT, Part
from cluster.gateway.console.overview.rows import LOST, SHAPES
from cluster.gateway.console.peers.peers import PeerParts, part_for_peers

TENANTS = ("tenant-own", "tenant-hidden-1", "tenant-hidden-2")
WORKERS = ("worker-hidden-1", "worker-hidden-2")
GATEWAYS = ("gateway-hidden-1", "gateway-hidden-2", "gateway-hidden-3")
MODELS = ("model-open", "model-hidden")
HIDDEN = "hidden"
PLACE = "place-hidden"

small = st.integers(0, 5)
rates = st.integers(0, 50).map(lambda number: number / 2)
seconds = st.integers(1000, 1010).map(float)


@st.composite
def workers(draw: st.DrawFn, gateway: str) -> list[dict[str, Any]]:
    """Draw rows of some workers, each in one of two incarnations."""
    rows = []
    for name in draw(st.lists(st.sampled_from(WORKERS), unique=True)):
        is_lost = draw(st.booleans())
        rows.append(
            {
                "id": name,
                "incarnation": draw(st.sampled_from(("hidden-i1", "hidden-i2"))),
                "model": draw(st.sampled_from(MODELS)),
                "state": LOST if is_lost else "READY",
                "running": draw(small),
                **dict.fromkeys(("node", "host", "pod"), PLACE),
                "links": [] if is_lost else [gateway],
                "lost_reason": f"{name} fell" if is_lost else "",
                "resumed": draw(small) if is_lost else 0,
            }
        )
    return rows


@st.composite
def calls(draw: st.DrawFn, gateway: str) -> list[dict[str, Any]]:
    """Draw rows of some calls. Calls of other gateways may have the same ids."""
    rows = []
    for number in draw(st.lists(st.integers(0, 6), unique=True)):
        is_ended = draw(st.booleans())
        tenant = TENANTS[number % len(TENANTS)]
        rows.append(
            {
                "id": f"call-{number}" + (f"-{HIDDEN}" if HIDDEN in tenant else ""),
                "request_id": f"request-of-{tenant}",
                "tenant": tenant,
                "model": MODELS[0] if tenant == TENANTS[0] else MODELS[1],
                "state": "ended" if is_ended else draw(st.sampled_from(("queued", "running", "resuming"))),
                "outcome": "ok" if is_ended else "",
                "arrived_s": draw(seconds),
                "duration_s": 1.0 if is_ended else None,
                "worker": draw(st.sampled_from((None, *WORKERS))),
                "gateway": gateway,
                "tokens": draw(small),
                "some_new_field": f"{HIDDEN} until it is listed",
            }
        )
    return rows


@st.composite
def part(draw: st.DrawFn) -> Part:
    """Draw the part of a gateway: its share of the overview."""
    gateway = draw(st.sampled_from(GATEWAYS))
    return {
        "format": FORMAT,
        "at": draw(seconds),
        "controller_age_s": draw(st.none() | rates),
        "controller_gateways": draw(st.none() | st.just(3)),
        "gateway": {"id": gateway, "age_s": 0.0, "streams": draw(small), "process": 0},
        "workers": draw(workers(gateway)),
        "models": [
            {
                "id": name,
                "state": "READY",
                "reason": f"{WORKERS[0]} is ready",
                "aliases": ["alias-hidden"],
                "versions": [{"version": "v-hidden"}],
                "progress": None,
                "running": draw(small),
                "waiting": draw(small),
                "tokens_per_s": draw(rates),
                "ttft_counts": draw(st.lists(small, min_size=23, max_size=23)),
                "prompt_tokens": draw(small),
                "cached_tokens": 0,
                "gap": draw(rates),
            }
            for name in draw(st.lists(st.sampled_from(MODELS), unique=True))
        ],
        "tenants": [
            {
                "id": name,
                "weight": 1.0 + draw(small),
                "running": draw(small),
                "waiting": draw(small),
                "tokens_per_s": draw(rates),
                "requests": draw(small),
                "cost_per_h": draw(rates),
                "ttft_s": draw(st.lists(rates, max_size=3)),
                "limits": {"daily_tokens": {"used": draw(st.none() | small), "limit": 10}},
                "budget": None,
            }
            for name in draw(st.lists(st.sampled_from(TENANTS), unique=True))
        ],
        "calls": draw(calls(gateway)),
    }


parts_of_cluster = st.lists(part(), max_size=5, unique_by=lambda each: (each["gateway"]["id"], each["at"]))


async def document(parts: list[Part], at: float = 1010.0) -> dict[str, Any]:
    """Return the document that merges these parts."""
    merged = await overview.merge(parts, at)
    return merged | {"cluster": "demo", "version": "1", "scaling": [{"id": "model-hidden", "reason": "hidden"}]}


def run(work: Any) -> Any:
    """Run a coroutine to its end, outside the event loop of the tests."""
    return asyncio.new_event_loop().run_until_complete(work)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(parts_of_cluster, parts_of_cluster)
def test_changes_lead_to_the_next_document(before: list[Part], after: list[Part]) -> None:
    """The changes between two documents, encoded and decoded again, turn the first document into the second."""

    async def check() -> None:
        old, new = await document(before), await document(after, 1011.0)
        changes = await deltas.difference(old, deltas.index_of(old), new, deltas.index_of(new))
        seen = deltas.apply(json.loads(await deltas.encode(old)), json.loads(await deltas.encode(changes)))
        wanted = json.loads(await deltas.encode(new))
        for name in overview.LISTS:
            key = lambda row: row["id"]  # noqa: E731
            assert sorted(seen.pop(name), key=key) == sorted(wanted.pop(name), key=key), name
        assert seen == wanted
        same = await deltas.difference(new, deltas.index_of(new), new, deltas.index_of(new))
        assert same == {"at": new["at"]}

    run(check())


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(parts_of_cluster, st.randoms(use_true_random=False), st.data())
def test_merging_does_not_depend_on_order_or_repetition(parts: list[Part], random: Any, data: st.DataObject) -> None:
    """Parts in another order, and parts that arrive twice, give the same document."""

    async def check() -> None:
        wanted = _unordered(await document(parts))
        shuffled = list(parts)
        random.shuffle(shuffled)
        again = [*shuffled, *data.draw(st.lists(st.sampled_from(parts), max_size=3))] if parts else shuffled
        assert _unordered(await document(again)) == wanted

    run(check())


def _unordered(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"calls": sorted(document["calls"], key=lambda row: row["id"])}


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(parts_of_cluster)
def test_a_viewer_of_one_tenant_sees_nothing_of_others(parts: list[Part]) -> None:
    """The bytes for a viewer of one tenant contain no name of another tenant, a worker, a gateway or a node, and no
    name of a model that the tenant may not use. No number in the bytes depends on the calls of other tenants."""

    async def check() -> None:
        whole = await document(parts)
        view = await overview.view_of(whole, TENANTS[0], lambda: {"model-open": ["own-alias"]})
        data = await deltas.encode(view)
        assert HIDDEN.encode() not in data
        assert {row["tenant"] for row in view["calls"]} <= {TENANTS[0]}
        own = [_without_others(each) for each in parts]
        alone = await overview.view_of(await document(own), TENANTS[0], lambda: {"model-open": ["own-alias"]})
        assert await deltas.encode(_unordered(alone)) == await deltas.encode(_unordered(view))

    run(check())


def _without_others(part: Part) -> Part:
    """Return the part as it would be if only the first tenant had made calls."""
    quiet = [row | {"ttft_counts": [0] * 23, "tokens_per_s": 0.0, "waiting": 0} for row in part["models"]]
    return part | {
        "calls": [row for row in part["calls"] if row["tenant"] == TENANTS[0]],
        "tenants": [row for row in part["tenants"] if row["id"] == TENANTS[0]],
        "workers": [],
        "models": quiet,
    }


def _part_of(gateway: str, at: float, ended: dict[str, float]) -> Part:
    """Return one gateway's part of the console's overview, with calls that ended at the times in `ended`. It also has
    one running call."""
    rows = [_row("calls", id=name, state="ended", arrived_s=when - 1.0, duration_s=1.0) for name, when in ended.items()]
    calls = [*rows, _row("calls", id="open", state="running")]
    return _row("part", format=FORMAT, at=at, gateway=_row("gateway", id=gateway), calls=calls)


def _row(kind: str, **values: Any) -> dict[str, Any]:
    """Return a row of a kind with all its fields, of which only `values` matter."""
    return {name: types[0]() for name, types in SHAPES[kind].items()} | values


def test_parts_of_others_arrive_whole_in_pieces() -> None:
    """Gateway processes send each other only the calls that ended in the last seconds. A process keeps the ended calls
    that it received earlier. At first, and after a long gap, a process asks another process for all ended calls."""
    store, ended = PeerParts(), {"old": 10.0, "older": 5.0}
    assert store.needs_all(100.0)
    store.put(part_for_peers(_part_of("other", 100.0, ended), has_all=False), 100.0)
    assert store.needs_all(100.0)
    store.put(part_for_peers(_part_of("other", 100.0, ended), has_all=True), 100.0)
    assert not store.needs_all(100.0)
    sent = part_for_peers(_part_of("other", 101.0, {**ended, "new": 101.0}), has_all=False)
    assert [row["id"] for row in sent["calls"]] == ["new", "open"]
    store.put(sent, 101.0)
    (current,) = store.current(101.0)
    assert {row["id"] for row in current["calls"]} == {"old", "older", "new", "open"}
    assert store.current(111.0) == []
    assert store.needs_all(111.0)


def test_a_worker_that_one_gateway_has_lost_is_shown_by_those_that_have_it() -> None:
    """A worker counts as LOST only if no gateway is linked to it. Each gateway reports how many sequences of the worker
    it has resumed; these numbers are added up."""
    lost = {"id": "w", "incarnation": "i", "state": LOST, "links": [], "resumed": 2}
    linked = {"id": "w", "incarnation": "i", "state": "READY", "links": ["g2"], "resumed": 0}

    def of(gateway: str, at: float, row: dict[str, Any]) -> Part:
        return _part_of(gateway, at, {}) | {"workers": [row], "calls": []}

    (row,) = run(document([of("g1", 2.0, lost), of("g2", 1.0, linked)]))["workers"]
    assert (row["state"], row["links"], row["resumed"]) == ("READY", ["g2"], 2)
    (row,) = run(document([of("g1", 2.0, lost), of("g2", 1.0, lost)]))["workers"]
    assert (row["state"], row["links"], row["resumed"]) == (LOST, [], 4)


def test_quantiles_lie_in_the_bucket_of_the_value() -> None:
    """A quantile is interpolated within its bucket. Above the last bound it equals that bound; without values it is
    None."""
    bounds = (1.0, 2.0, 4.0)
    assert overview.quantile([0, 10, 0, 0], 0.5, bounds) == 1.5
    assert overview.quantile([5, 5, 0, 0], 0.99, bounds) == 1.98
    assert overview.quantile([0, 0, 0, 3], 0.5, bounds) == 4.0
    assert overview.quantile([0, 0, 0, 0], 0.5, bounds) is None
    assert not math.isnan(overview.quantile([1], 0.0, bounds) or 0.0)
