"""The admin API as JSON: messages in both directions, errors that name the field, and bodies of any form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.admin.v1 import catalog_pb2, scaling_pb2, tenants_pb2, usage_pb2
from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.admin.methods import ADMIN_FILES
from cluster.gateway.console.bridge import encode, parse
from tests.ledger.samples import record
from tests.support.admin import role_key
from tests.support.console import Browser
from tests.support.keyed import Keyed, keyed_cluster

KINDS = [
    GetMessageClass(method.input_type)
    for file in ADMIN_FILES
    for service in file.services_by_name.values()
    for method in service.methods
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Keyed]:
    """Provide a gateway with keys."""
    async with keyed_cluster(tmp_path_factory.mktemp("bridge")) as keyed:
        yield keyed


@pytest.fixture(scope="module")
async def operator(keyed: Keyed) -> Browser:
    """Provide the browser of an operator."""
    key = await role_key(keyed.ledger, "ops", "operator")
    await keyed.until_known("ops", key)
    browser = Browser(keyed.cluster)
    assert (await browser.sign_in(key)).status == 204
    return browser


# ---- messages


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (scaling_pb2.ScaleRequest, b'{"replicas": "many"}', "replicas"),
        (scaling_pb2.ScaleRequest, b'{"replicas": 1e99}', "replicas"),
        (scaling_pb2.ScaleRequest, b'{"replicas": -99999999999}', "replicas"),
        (scaling_pb2.ScaleRequest, b'{"copies": 1}', "copies"),
        (scaling_pb2.ScaleRequest, b'{"name": "\\u0000"}', "name"),
        (scaling_pb2.ScaleRequest, b'{"name": "' + b"x" * 9000 + b'"}', "name"),
        (tenants_pb2.CreateTenantRequest, b'{"tenant": {"limits": {"tokens_per_minute": []}}}', "tenant"),
        (tenants_pb2.CreateTenantRequest, b'{"tenant": 1}', "tenant"),
        (scaling_pb2.ScaleRequest, b"[]", ""),
        (scaling_pb2.ScaleRequest, b"null", ""),
        (scaling_pb2.ScaleRequest, b"", ""),
        (scaling_pb2.ScaleRequest, b"{", ""),
        (scaling_pb2.ScaleRequest, b"\xff", ""),
        (scaling_pb2.ScaleRequest, b'{"name": "\\ud800"}', ""),
        (scaling_pb2.ScaleRequest, b'{"name": "a", "name": "b"}', ""),
        (scaling_pb2.ScaleRequest, b"[" * 100_000, ""),
        (tenants_pb2.CreateTenantRequest, b'{"tenant":' * 500 + b"1" + b"}" * 500, "tenant"),
    ],
)
def test_wrong_bodies_name_the_field(kind: Any, body: bytes, field: str) -> None:
    """An invalid body is refused. The error names the invalid field; if the field is nested, the error may name only an
    outer field."""
    with pytest.raises(CallError) as caught:
        parse(kind, body)
    assert caught.value.outcome is Outcome.INVALID_FIELD
    assert caught.value.violations[0].field.startswith(field)
    assert len(caught.value.message) < 600


@given(st.sampled_from(KINDS), JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=100))
def test_any_body_is_a_message_or_refused(kind: Any, body: bytes) -> None:
    """A body of any form is either parsed as a message of the method or refused as an invalid field."""
    assert outcome_of(kind, body) in (Outcome.OK, Outcome.INVALID_FIELD)


def outcome_of(kind: Any, body: bytes) -> Outcome:
    """Return the outcome of parsing a body."""
    try:
        parse(kind, body)
    except CallError as error:
        return error.outcome
    return Outcome.OK


@given(st.data())
def test_fields_of_any_value(data: st.DataObject) -> None:
    """A JSON object with known field names and values of any type is converted to a message or refused with an
    error."""
    kind = data.draw(st.sampled_from(KINDS))
    names = [field.name for field in kind.DESCRIPTOR.fields]
    if names:
        body = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=4))
        assert outcome_of(kind, json.dumps(body).encode()) in (Outcome.OK, Outcome.INVALID_FIELD)


def test_answers_have_all_fields_by_their_names() -> None:
    """An answer uses the field names of the proto files and includes fields that are unset."""
    key = json.loads(encode(tenants_pb2.Key(display_name="x")))
    assert key["display_name"] == "x"
    assert key["rotated_from"] == ""
    record = json.loads(encode(usage_pb2.UsageRecord(prompt_tokens=2**60)))
    assert record["prompt_tokens"] == str(2**60)


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_can_be_written(kind: Any) -> None:
    """`parse` reads back any request that `encode` has written."""
    assert parse(kind, encode(kind())) == kind()


# ---- over HTTP


async def test_a_tenants_life(operator: Browser) -> None:
    """A tenant and its keys are created, changed, revoked and deleted with JSON."""
    body = {"tenant": {"name": "tenants/new", "weight": 2, "labels": {"team": "é"}}, "reason": "test"}
    reply = await operator.admin("Tenants.Create", **body)
    assert (reply.status, reply.json["weight"], reply.json["labels"]) == (200, 2, {"team": "é"})
    assert reply.headers["cache-control"] == "no-store"
    assert (await operator.admin("Tenants.Create", **body)).json["error"]["code"] == "ALREADY_EXISTS"
    reply = await operator.admin("Keys.Create", parent="tenants/new", key={"display_name": "laptop"})
    assert reply.json["secret"].startswith("hr_")
    name = reply.json["key"]["name"]
    assert (await operator.admin("Keys.Revoke", name=name, reason="lost")).status == 200
    listed = (await operator.admin("Keys.List", parent="tenants/new")).json["keys"]
    assert [(key["name"], key["state"]) for key in listed] == [(name, "revoked")]
    assert (await operator.admin("Tenants.Delete", name="tenants/new", reason="done")).status == 200


async def test_errors(operator: Browser) -> None:
    """An error has the matching HTTP status, and holds the code, the message and the field."""
    for verb, request, status, code, field in (
        ("Tenants.Get", {"name": "tenants/nothing"}, 404, "NOT_FOUND", ""),
        ("Tenants.Get", {"name": "nothing"}, 400, "INVALID_ARGUMENT", "name"),
        ("Catalog.Scale", {"name": "x"}, 503, "UNAVAILABLE", ""),
        ("Fleet.Drain", {"target": "x", "timeout_s": -1}, 400, "INVALID_ARGUMENT", "timeout_s"),
    ):
        reply = await operator.admin(verb, **request)
        error = reply.json["error"]
        assert (reply.status, error["code"], error["field"]) == (status, code, field)
        assert error["message"]


async def test_a_stream_is_lines(keyed: Keyed, operator: Browser) -> None:
    """A stream of messages is written as one JSON object a line."""
    keyed.ledger.usage.insert([record(f"r{number}", tenant="ops") for number in range(1200)])
    reply = await operator.admin("Usage.Export", parent="tenants/ops")
    assert reply.headers["content-type"] == "application/x-ndjson"
    pages = [json.loads(line) for line in reply.body.splitlines()]
    assert len(pages) > 1
    assert sum(len(page["records"]) for page in pages) == 1200


@pytest.mark.parametrize("path", ["/console/api/", "/console/api/Fleet", "/console/api/Fleet.None", "/console/api/x.y"])
async def test_unknown_methods(operator: Browser, path: str) -> None:
    """A method that does not exist gets 404."""
    assert (await operator.fetch(path, {})).status == 404


async def test_only_post(operator: Browser) -> None:
    """A method accepts only POST and only JSON."""
    assert (await operator.fetch("/console/api/Fleet.ListWorkers")).status == 405
    reply = await operator.fetch("/console/api/Fleet.ListWorkers", {}, content_type="text/plain")
    assert reply.status == 415


async def test_large_bodies(operator: Browser) -> None:
    """A body of more than 1 MiB is refused. A smaller large body is parsed off the event loop."""
    assert (await operator.fetch("/console/api/Catalog.Diff", b" " * ((1 << 20) + 1))).status == 413
    document = json_format.MessageToDict(catalog_pb2.DiffRequest(document=b"x" * 500_000))
    reply = await operator.admin("Catalog.Diff", **document)
    assert reply.json["error"]["code"] == "UNAVAILABLE"  # there is no controller


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.sampled_from(["Tenants.Create", "Keys.Create", "Usage.Query", "Catalog.Apply"]), st.binary(max_size=60))
async def test_any_bytes(operator: Browser, verb: str, body: bytes) -> None:
    """A body of any bytes is answered with an error that names no internals, and never with status 500."""
    reply = await operator.fetch(f"/console/api/{verb}", body)
    assert reply.status in (200, 400, 404, 503)
    assert b"Traceback" not in reply.body
