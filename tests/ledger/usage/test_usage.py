"""The usage table has one row per call, and supports sums by group, costs, retention, and CSV and JSON export."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.database.retention import Expired, expire
from cluster.ledger.errors import LedgerError
from cluster.ledger.rows import Prices, UsageQuery
from cluster.ledger.store import Ledger
from cluster.ledger.usage import export
from cluster.ledger.usage.records import SEGMENTS_PER_RESUME, OpenRecord, RecordError, UsageRecord
from cluster.ledger.usage.usage import IDLE_TENANT
from cluster.policy.tenants.policy import Retention, TenantPolicy
from tests.ledger.samples import DAY_S, record


def total(ledger: Ledger) -> dict[str, Any]:
    """Return the sums over all usage records."""
    (row,) = ledger.usage.query(UsageQuery(group_by=()))
    return row


@pytest.mark.slow
def test_a_record_rests_whole(ledger: Ledger) -> None:
    """Usage records are read without changes, including extreme values and unusual labels."""
    records = [
        record(),
        record("r2", ttft_s=None, labels={}, opened_at_s=0.0, predicted_cached_tokens=0, completion_tokens=2**53 - 1),
        record("r3", labels={"a b": "'\"%\\", "ü": "漢字🎈"}, delivered_unknown=True, opened_at_s=1.0),
    ]
    ledger.usage.insert(records)
    assert ledger.usage.records(UsageQuery()) == [records[1], records[2], records[0]]
    assert ledger.usage.records(UsageQuery(), after=(0.0, "r2"), limit=1) == [records[2]]


def test_a_call_counts_once(ledger: Ledger) -> None:
    """A repeated report of a call changes nothing, in the same batch or in a later batch."""
    ledger.usage.insert([record(), record()])
    before = total(ledger)
    ledger.usage.insert([record(), record("r2")])
    assert before["requests"] == 1
    assert total(ledger) == {name: 2 * value for name, value in before.items()}
    ledger.usage.insert([])


def test_another_tenants_id_is_a_conflict(ledger: Ledger) -> None:
    """A record whose id belongs to another tenant's row changes nothing, and is counted and logged. A repeated record
    is no conflict."""
    assert ledger.usage.insert([record(tenant="a"), record("r2", tenant="b")]) == 0
    before = ledger.usage.records(UsageQuery())
    with structlog.testing.capture_logs() as logs:
        assert ledger.usage.insert([record(tenant="b"), record("r2", tenant="b"), record("r3", tenant="b")]) == 1
        assert ledger.usage.insert([record("r4", tenant="a"), record("r4", tenant="b")]) == 1
    assert [row for row in ledger.usage.records(UsageQuery()) if row in before] == before
    assert [(log["record"], log["tenant"], log["row_tenant"]) for log in logs] == [("r1", "b", "a"), ("r4", "b", "a")]


def test_requests_are_counted_and_not_their_parts(ledger: Ledger) -> None:
    """Further outputs of a request, its resumed parts, and records of idle GPUs do not count as requests.

    An earlier version counted such records, and reported 504 calls as 679 requests.
    """
    outputs_and_resumptions = [(1, 0), (4, 0), (1, 3), (3, 2)]
    parts = [
        record(f"{call}.{resumed}.{output}", segment=resumed * SEGMENTS_PER_RESUME + output)
        for call, (outputs, resumptions) in enumerate(outputs_and_resumptions)
        for resumed in range(resumptions + 1)
        for output in range(outputs)
    ]
    idle = [record(f"idle{at}", tenant=IDLE_TENANT) for at in range(5)]
    ledger.usage.insert([*parts, *idle])
    assert total(ledger)["requests"] == 4
    assert total(ledger)["generated_tokens"] == sum(part.generated_tokens for part in (*parts, *idle))


REPORTS = [(i, generated) for i in range(4) for generated in (None, 2, 5)]


EXAMPLES = itertools.count()


@pytest.fixture(scope="module")
def shared_ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """Provide an empty SQLite ledger for all examples of a property test. Each example uses a tenant of its own."""
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('law') / 'l.db'}")
    ledger.upgrade()
    yield ledger
    ledger.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(REPORTS), max_size=14), st.data())
def test_order_and_repetition_do_not_matter(
    shared_ledger: Ledger, reports: list[tuple[int, int | None]], data: st.DataObject
) -> None:
    """Reports in any order and in any batches leave one row per call.

    The row has the exact report if there is one, otherwise the largest estimate.
    """
    ledger, tenant = shared_ledger, f"t{next(EXAMPLES)}"
    records = [
        record(f"{tenant}-r{i}", tenant=tenant, generated_tokens=4) if estimate is None else
        record(f"{tenant}-r{i}", tenant=tenant, generated_tokens=estimate, delivered_unknown=True)
        for i, estimate in reports
    ]  # fmt: skip
    at = 0
    while at < len(records):
        size = data.draw(st.integers(1, 5))
        ledger.usage.insert(records[at : at + size])
        at += size
    stored = {row.record_id: row.generated_tokens for row in ledger.usage.records(UsageQuery(tenant=tenant))}
    by_call = {i: [estimate for j, estimate in reports if j == i] for i, _ in reports}
    expected = {i: 4 if None in all_ else max(filter(None, all_)) for i, all_ in by_call.items()}
    assert stored == {f"{tenant}-r{i}": tokens for i, tokens in expected.items()}


def test_gateways_that_report_the_same_calls_at_once(ledger: Ledger) -> None:
    """Four threads that insert the same records in different orders all succeed, and each record is stored once."""
    records = [record(f"r{at}") for at in range(200)]
    failures: list[Exception] = []

    def report(seed: int) -> None:
        shuffled = records[:]
        random.Random(seed).shuffle(shuffled)
        try:
            for at in range(0, len(shuffled), 50):
                ledger.usage.insert(shuffled[at : at + 50])
        except Exception as error:  # passed to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=report, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert total(ledger)["requests"] == 200


def test_sums_by_group(ledger: Ledger) -> None:
    """Usage can be summed by tenant, model, day, month and label, and can be limited to days, a tenant or a model.

    A missing label has the value "".
    """
    ledger.usage.insert(
        [
            record("a", model="m1"),
            record("b", model="m2", opened_at_s=2 * DAY_S, labels={"team": "b"}),
            record("c", tenant="other", opened_at_s=40 * DAY_S, labels={}),
            record("d", model="m1", opened_at_s=2 * DAY_S - 0.001),
        ]
    )

    def sums(*group_by: str, **where: str) -> dict[tuple[str, ...], int]:
        rows = ledger.usage.query(UsageQuery(group_by, **where))
        return {tuple(row[name] for name in group_by): row["completion_tokens"] for row in rows}

    assert sums("tenant", "model") == {("acme", "m1"): 10, ("acme", "m2"): 5, ("other", "tiny"): 5}
    assert sums("day") == {("1970-01-02",): 10, ("1970-01-03",): 5, ("1970-02-10",): 5}
    assert sums("month") == {("1970-01",): 15, ("1970-02",): 5}
    assert sums("label:team") == {("",): 5, ("a",): 10, ("b",): 5}
    assert sums("tenant", "label:team", tenant="acme") == {("acme", "a"): 10, ("acme", "b"): 5}
    assert sums(since_day="1970-01-03", until_day="1970-01-03") == {(): 5}
    assert sums("outcome", "version", "key_id", "adapter", "gpu", model="m2") == {("ok", "v1", "k1", "", "H100"): 5}
    assert sums("tenant", model="nothing") == {}
    assert ledger.usage.tokens_since("1970-01-03") == {"acme": 15, "other": 15}
    assert ledger.usage.tokens_since("1970-01-01", ["other"]) == {"other": 15}


reasoned = st.builds(
    lambda completion, reasoning, model: {
        "completion_tokens": completion,
        "reasoning_tokens": min(reasoning, completion),
        "model": model,
    },
    st.integers(0, 100),
    st.integers(0, 100),
    st.sampled_from(["m1", "m2", "m3"]),
)


numbers = itertools.count()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(reasoned, min_size=1, max_size=12))
def test_reasoning_is_a_part_of_the_completion(ledger: Ledger, rows: list[dict[str, Any]]) -> None:
    """The reasoning tokens of a group are the sum over its records. They never exceed the group's completion tokens."""
    tenant = f"t{next(numbers)}"
    ledger.usage.insert([record(f"{tenant}.{at}", tenant=tenant, **values) for at, values in enumerate(rows)])
    sums = {row["model"]: row for row in ledger.usage.query(UsageQuery(("model",), tenant=tenant))}
    assert sums.keys() == {values["model"] for values in rows}
    for model, row in sums.items():
        assert row["reasoning_tokens"] == sum(v["reasoning_tokens"] for v in rows if v["model"] == model)
        assert row["reasoning_tokens"] <= row["completion_tokens"]


def test_money_is_gpu_seconds_times_their_rate(ledger: Ledger) -> None:
    """The cost of a group is the sum, over its accelerator types, of GPU seconds times the rate of the type.

    The cost is None if an accelerator type of the group has no rate.
    """
    ledger.usage.insert(
        [
            record("a", gpu="H100", gpu_seconds=3600.0),
            record("b", gpu="A10", gpu_seconds=1800.0),
            record("c", tenant="other", gpu="TPU", gpu_seconds=10.0),
            record("d", tenant="third", gpu="", gpu_seconds=0.0),
        ]
    )
    rates = Prices("EUR", {"H100": 2.4, "A10": 1.0})
    rows = {row["tenant"]: row for row in ledger.usage.query(UsageQuery(("tenant",)), rates)}
    assert rows["acme"]["cost"] == pytest.approx(2.9)
    assert (rows["acme"]["requests"], rows["acme"]["currency"]) == (2, "EUR")
    assert rows["other"]["cost"] is None
    assert rows["third"]["cost"] == 0.0


@pytest.mark.parametrize(
    "bad",
    [
        {"group_by": ("tenant; DROP TABLE usage",)},
        {"group_by": ("label:",)},
        {"group_by": ("label:a'b",)},
        {"group_by": ("tenant", "tenant")},
        {"since_day": "yesterday"},
        {"until_day": "2026-1-1"},
    ],
)
def test_bad_queries_are_refused(bad: dict[str, Any]) -> None:
    """The error for a query with an invalid dimension or day names the field."""
    with pytest.raises(LedgerError, match=next(iter(bad))):
        UsageQuery(**bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_tokens", -1),
        ("prompt_tokens", 2**53),
        ("prompt_tokens", True),
        ("completion_tokens", 1.5),
        ("reasoning_tokens", -1),
        ("reasoning_tokens", 6),
        ("cached_tokens", None),
        ("predicted_cached_tokens", -1),
        ("predicted_cached_tokens", 1.5),
        ("gpu_seconds", float("nan")),
        ("duration_s", float("inf")),
        ("queue_s", -0.1),
        ("ttft_s", "1"),
        ("model", "a\0b"),
        ("model", "\ud800"),
        ("model", "x" * 256),
        ("request_id", "x" * 129),
        ("record_id", ""),
        ("tenant", ""),
        ("opened_at_s", 1e13),
        ("labels", {"a": 1}),
        ("labels", {"a": "x" * 9000}),
        ("labels", {f"k{i}": "x" * 1000 for i in range(9)}),
    ],
)
def test_a_record_that_no_database_would_take_is_never_made(field: str, value: Any) -> None:
    """The constructor of a usage record checks counts, times and texts, and the error names the invalid field."""
    with pytest.raises(RecordError, match=field):
        record(**{field: value})


def test_an_open_record_becomes_a_usage_record() -> None:
    """A usage record has the fields of the call's open record (the part that is known when the call is sent). Unknown
    fields of a later release are dropped."""
    opened = OpenRecord("r1", "acme", "k1", "tiny", "v1", "q1", 5.0, queue_s=0.5, labels={"a": "b"}, segment=2)
    assert OpenRecord.from_json({**opened.as_json(), "later": 1}) == opened
    ended = opened.to_usage_record(outcome="cancelled", prompt_tokens=3, completion_tokens=2)
    assert (ended.record_id, ended.queue_s, ended.segment, ended.labels) == ("r1", 0.5, 2, {"a": "b"})
    assert UsageRecord.from_json(json.loads(json.dumps(ended.as_json()))) == ended
    with pytest.raises(RecordError, match="record_id"):
        UsageRecord.from_json({"tenant": "x"})


def test_what_is_old_goes(ledger: Ledger) -> None:
    """Rows are kept for the cluster's number of days, or for the number of days in the tenant's policy."""
    for name, days in (("acme", None), ("short", 1), ("long", 1000)):
        ledger.tenants.create(TenantPolicy(name, retention=Retention(usage_days=days, audit_days=days)))
        for age in (0.5, 5, 50):
            ledger.usage.insert([record(f"{name}{age}", tenant=name, opened_at_s=100 * DAY_S - age * DAY_S)])
            ledger.audit.insert([AuditEvent((100 - age) * DAY_S, "admin", "x", tenant=name)])
    assert expire(ledger, 100 * DAY_S, usage_days=10, audit_days=60) == Expired(usage=3, audit=2)
    kept = {row.record_id for row in ledger.usage.records(UsageQuery())}
    assert kept == {"acme0.5", "acme5", "short0.5", "long0.5", "long5", "long50"}


def test_csv(ledger: Ledger) -> None:
    """The CSV export contains every row, and no text from a caller becomes a spreadsheet formula."""
    ledger.usage.insert([record("a", labels={"team": '=HYPERLINK("x")'}), record("b", labels={"team": 'x,"y"\n'})])
    rows = ledger.usage.query(UsageQuery(("label:team",)))
    parsed = list(csv.DictReader(io.StringIO(export.as_csv(rows), newline="")))
    assert [row["label:team"] for row in parsed] == ['\'=HYPERLINK("x")', 'x,"y"\n']
    assert [int(row["prompt_tokens"]) for row in parsed] == [10, 10]
    assert [int(row["reasoning_tokens"]) for row in parsed] == [2, 2]
    assert export.as_csv([]) == ""
    rows = [row.as_json() for row in ledger.usage.records(UsageQuery())]
    assert '""team"": ""x,' in export.as_csv(rows)


def test_audit_pages(ledger: Ledger) -> None:
    """Pages of audit events are newest first, contain each event once, and can be filtered by tenant and kind."""
    events = [AuditEvent(float(at // 2), "admin" if at % 3 else "policy", f"a{at}", tenant="t") for at in range(10)]
    ledger.audit.insert(events)
    ledger.audit.insert(events[:3])
    seen: list[str] = []
    before = None
    while page := ledger.audit.list(tenant="t", before=before, limit=3):
        seen += [event["action"] for event in page]
        before = (page[-1]["at_s"], page[-1]["event_id"])
    assert sorted(seen) == sorted(event.action for event in events)
    assert [event["at_s"] for event in ledger.audit.list(kind="policy")] == [4.0, 3.0, 1.0, 0.0]
    assert ledger.audit.list(tenant="other") == []
    assert len(ledger.audit.list(since_s=4.0)) == 2


def test_a_missing_table_is_a_store_that_is_unavailable(tmp_path: Path) -> None:
    """The error for a database without tables names the command `headrace db check`."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'x.db'}")
    with pytest.raises(Exception, match="headrace db check"):
        ledger.usage.query(UsageQuery())
    ledger.close()
