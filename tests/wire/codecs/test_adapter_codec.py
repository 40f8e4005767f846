"""Tests of the messages that describe adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.adapters import AdapterSpec, AdapterState, AdapterStatus
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs.adapter_codec import (
    MAX_ADAPTERS,
    MAX_NAME,
    MAX_REASON,
    MAX_SOURCE,
    MAX_TENANTS,
    AdapterSet,
    adapter_report_from_pb,
    adapter_report_to_pb,
    adapter_set_from_pb,
    adapter_set_to_pb,
    adapter_to_pb,
    adapters_from_pb,
)

DIGEST = "ab" * 32
DIGESTS = st.sampled_from(("", DIGEST, "0" * 64))
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
NUMBERS = st.integers(0, 2**64 - 1)
SPECS = st.builds(
    AdapterSpec, NAMES, TEXT, DIGESTS, st.lists(TEXT, max_size=3).map(tuple), st.booleans(), TEXT, TEXT, NUMBERS
)
STATUSES = st.builds(AdapterStatus, NAMES, st.just(DIGEST), st.sampled_from(AdapterState), TEXT, st.booleans(), NUMBERS)


@given(st.lists(SPECS, max_size=5, unique_by=lambda spec: spec.name), st.integers(0, 2**64 - 1))
def test_a_set_comes_back_without_tenants_and_a_catalog_with_them(specs: list[AdapterSpec], revision: int) -> None:
    message = adapter_set_to_pb(AdapterSet(revision, tuple(specs)))
    known = adapter_set_from_pb(pb.AdapterSet.FromString(message.SerializeToString()))
    assert known == AdapterSet(revision, tuple(replace(spec, tenants=()) for spec in specs))
    assert adapters_from_pb([pb.Adapter.FromString(adapter_to_pb(s).SerializeToString()) for s in specs]) == tuple(
        specs
    )


@given(st.lists(STATUSES, max_size=5, unique_by=lambda status: status.name))
def test_a_report_comes_back(statuses: list[AdapterStatus]) -> None:
    message = adapter_report_to_pb(statuses)
    assert adapter_report_from_pb(pb.AdapterReport.FromString(message.SerializeToString())) == tuple(statuses)


def test_every_reason_can_be_reported() -> None:
    """A reason that is too long is cut, and a lone surrogate in it is replaced."""
    status = AdapterStatus("a", "", AdapterState.FAILED, "\udc80" + "x" * 10_000)
    (known,) = adapter_report_from_pb(adapter_report_to_pb([status]))
    assert known.reason == "?" + "x" * (MAX_REASON - 1)


def test_an_unknown_state_takes_no_requests() -> None:
    message = pb.AdapterReport(adapters=[pb.AdapterStatus(name="a", digest=DIGEST, state=77)])  # type: ignore[arg-type]
    assert adapter_report_from_pb(message)[0].state is AdapterState.LOADING


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ([pb.Adapter(name=str(number)) for number in range(MAX_ADAPTERS + 1)], "adapters"),
        ([pb.Adapter(name="a"), pb.Adapter(name="a")], "name"),
        ([pb.Adapter(name="")], "name"),
        ([pb.Adapter(name="n" * (MAX_NAME + 1))], "name"),
        ([pb.Adapter(name="a", source="s" * (MAX_SOURCE + 1))], "source"),
        ([pb.Adapter(name="a", license="s" * (MAX_NAME + 1))], "license"),
        ([pb.Adapter(name="a", version="s" * (MAX_NAME + 1))], "version"),
        ([pb.Adapter(name="a", digest="AB" * 32)], "digest"),
        ([pb.Adapter(name="a", digest="../" * 21 + "a")], "digest"),
        ([pb.Adapter(name="a", tenants=["t" * (MAX_NAME + 1)])], "tenants"),
        ([pb.Adapter(name="a", tenants=["t"] * (MAX_TENANTS + 1))], "tenants"),
    ],
)
def test_adapters_outside_the_bounds_are_refused(message: list[pb.Adapter], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        adapter_set_from_pb(pb.AdapterSet(adapters=message))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ([pb.AdapterStatus(name=str(number)) for number in range(MAX_ADAPTERS + 1)], "adapters"),
        ([pb.AdapterStatus(name="a"), pb.AdapterStatus(name="a")], "name"),
        ([pb.AdapterStatus(name="a", reason="r" * (MAX_REASON + 1))], "reason"),
        ([pb.AdapterStatus(name="a", digest="x")], "digest"),
        ([pb.AdapterStatus(name="a", state=pb.AdapterStatus.STATE_READY)], "digest"),
    ],
)
def test_reports_outside_the_bounds_are_refused(message: list[pb.AdapterStatus], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        adapter_report_from_pb(pb.AdapterReport(adapters=message))
