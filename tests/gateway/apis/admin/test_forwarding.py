"""Admin methods that are forwarded from an operator's client to the controller, over real ports and a real link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import admin_pb2, scaling_pb2
from cluster.admin.v1.scaling_pb2 import ScaleRequest as Scale
from cluster.admin.v1.scaling_pb2 import ScaleResponse as Scaled
from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.controller.links import ControllerLinks
from cluster.gateway.apis.admin.forwarding import MAX_DETAIL, details
from cluster.wire.admin_forwarding import verb
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.cluster import until
from tests.support.keyed import Keyed, keyed_cluster

pytestmark = pytest.mark.slow


class Controlled:
    """A gateway, an operator's client, and a controller that records the requests that reach it."""

    def __init__(self, keyed: Keyed, operator: AdminClient) -> None:
        self.keyed = keyed
        self.operator = operator
        self.requests: list[tuple[Any, str]] = []
        self.held = asyncio.Event()
        gateways, verbs = [keyed.gateway.endpoints["link"]], {"Catalog.Scale": verb(Scale, self._scale)}
        self.end = ControllerLinks(controller_id="c", gateways=gateways, tls=None, bundles=lambda _: None, verbs=verbs)

    async def _scale(self, request: Scale, actor: str) -> Scaled:
        self.requests.append((request, actor))
        if request.name == "hold":
            await self.held.wait()
        if request.replicas > 5:
            raise invalid("replicas", "is above the model's max, 5")
        if request.name == "gone":
            raise CallError(Outcome.MODEL_NOT_FOUND, "model 'gone' does not exist")
        return Scaled(model=scaling_pb2.ModelScaling(name=request.name, desired=request.replicas))

    async def events(self, count: int) -> list[dict[str, Any]]:
        """Wait until the audit log has at least `count` events of the action `catalog.scale`, and return the events."""
        events_now: list[dict[str, Any]] = []

        def there() -> bool:
            events_now[:] = self.keyed.ledger.audit.list(equal={"action": "catalog.scale"}, limit=100)
            return len(events_now) >= count

        await until(there, "the audit has it")
        return events_now


@pytest.fixture
async def controlled(tmp_path: Path) -> AsyncIterator[Controlled]:
    """Start a gateway, an operator's client and a controller."""
    async with keyed_cluster(tmp_path, "") as keyed:
        key = await role_key(keyed.ledger, "ops", "operator")
        async with AdminClient(keyed.gateway.endpoints["admin"], key) as operator:
            await until_known(operator, "Catalog.List", admin_pb2.ListRequest())
            made = Controlled(keyed, operator)
            assert (await operator.refused("Catalog.Scale", Scale(name="m"))).reason == "NO_WORKER"
            running = asyncio.create_task(made.end.run())
            await until(lambda: made.end.linked == 1, "the controller is linked")
            yield made
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_a_verb_goes_there_and_back(controlled: Controlled) -> None:
    """The controller gets the caller's name, and the operator gets the controller's answers and errors. The audit holds
    the name, the answers and the errors."""
    ask = controlled.operator.ask
    answer = await ask("Catalog.Scale", Scale(name="m", replicas=3, reason="a fair"))
    assert (answer.model.name, answer.model.desired) == ("m", 3)
    refused = await controlled.operator.refused("Catalog.Scale", Scale(name="m", replicas=9))
    assert (refused.code.name, refused.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert "above the model's max" in refused.message
    missing = await controlled.operator.refused("Catalog.Scale", Scale(name="gone"))
    assert missing.reason == "MODEL_NOT_FOUND"
    unknown = await controlled.operator.refused("Catalog.Freeze", scaling_pb2.FreezeRequest())
    assert unknown.reason == "UNSUPPORTED_FEATURE"
    assert [(r.name, actor.split(":")[0]) for r, actor in controlled.requests] == [
        ("m", "key"),
        ("m", "key"),
        ("gone", "key"),
    ]
    events = await controlled.events(4)
    audited = [(e["object"], e["outcome"], e["details"].get("replicas")) for e in reversed(events)]
    assert audited == [
        ("m", "no_worker", None),
        ("m", "ok", 3),
        ("m", "invalid_field", 9),
        ("gone", "model_not_found", None),
    ]
    assert events[2]["reason"] == "a fair"


async def test_a_slow_verb_holds_no_other_up(controlled: Controlled) -> None:
    """A slow forwarded method does not delay another method."""
    slow = asyncio.create_task(controlled.operator.ask("Catalog.Scale", Scale(name="hold", replicas=1)))
    await until(lambda: len(controlled.requests) == 1, "the controller has the request")
    assert (await controlled.operator.ask("Catalog.Scale", Scale(name="m", replicas=2))).model.desired == 2
    assert not slow.done()
    controlled.held.set()
    assert (await slow).model.name == "hold"


def test_the_audit_keeps_plain_fields() -> None:
    """`details` returns the scalar fields of a request. The field `reason` and the excluded field are left out, and
    long texts are cut."""
    request = Scale(name="m", reason="r" * 9999, replicas=2)
    assert details(request, "name") == {"replicas": 2}
    assert details(scaling_pb2.FreezeRequest(name="x" * 999)) == {"name": "x" * MAX_DETAIL}
