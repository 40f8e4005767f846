"""An engine's load is the same after encoding and decoding."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import EngineLoad
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs.codec import load_from_pb, load_to_pb

seconds = st.floats(0, 1e6)


@given(
    st.builds(
        EngineLoad,
        running=st.integers(0, 1 << 20),
        waiting=st.integers(0, 1 << 20),
        kv_usage=st.floats(0, 1),
        steps=st.integers(0, 1 << 60),
        step_s=seconds,
        busy=st.sampled_from(["", "start", "prefill", "grammar", "adapter"]),
        step_age_s=seconds,
        step_p99_s=seconds,
        prefill_tokens=st.integers(0, 1 << 40),
    )
)
def test_every_field_travels(load: EngineLoad) -> None:
    """Every field of a load is the same after encoding and decoding, within a float's precision, and an empty message
    gives an empty load."""
    back = load_from_pb(pb.Load.FromString(load_to_pb(load).SerializeToString()))
    for field in dataclasses.fields(EngineLoad):
        mine = getattr(load, field.name)
        assert getattr(back, field.name) == (
            pytest.approx(mine, rel=1e-6, abs=1e-30) if isinstance(mine, float) else mine
        )
    assert load_from_pb(pb.Load()) == EngineLoad()


@given(st.floats(), st.floats(), st.floats(), st.floats())
def test_impossible_values_become_possible_ones(kv_usage: float, step: float, age: float, p99: float) -> None:
    """Whatever a worker reports, the decoded load has a share of the KV memory in [0, 1], and times that are at least 0
    and finite. A share that is no number counts as full."""
    load = load_from_pb(pb.Load(kv_usage=kv_usage, step_ms=step, step_age_ms=age, step_p99_ms=p99))
    assert 0.0 <= load.kv_usage <= 1.0
    for value in (load.step_s, load.step_age_s, load.step_p99_s):
        assert 0.0 <= value < math.inf
    assert load_from_pb(pb.Load(kv_usage=math.nan)).kv_usage == 1.0
