"""The scenario `faults`: the comparison of answers, and a small run of one part."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.v1 import inference_pb2 as pb
from loadtests.children import ROOT
from loadtests.faults.calls import CallResult, difference, make_request
from loadtests.faults.soak import slope

WORDS = st.lists(st.text("abcdefghij ", min_size=1, max_size=4), min_size=8, max_size=30)


def call_with(pieces: list[str], *, first: int = 0, usage: int | None = None) -> CallResult:
    """Return a call that received these pieces, each in a chunk of its own."""
    out = CallResult(make_request("k", "greedy", "m", 8, 1, 0.0), "r", 0.0)
    for offset, piece in enumerate(pieces):
        delta = pb.ChoiceDelta(index=0, delta=pb.Message(content=piece))
        out.record(pb.ChatChunk(choices=[delta], offset=first + offset), float(offset))
    last = pb.ChoiceDelta(index=0, finish_reason="length")
    tokens = len(pieces) if usage is None else usage
    out.record(pb.ChatChunk(choices=[last], offset=len(pieces), usage=pb.Usage(completion_tokens=tokens)), 99.0)
    return out


@settings(deadline=None)
@given(WORDS, st.data())
def test_no_loss_or_repetition_passes_for_the_undisturbed_answer(pieces: list[str], data: st.DataObject) -> None:
    """A lost, doubled or miscounted token is always reported as a difference. A comparison that missed such a
    difference would let any gateway pass."""
    at = data.draw(st.integers(0, len(pieces) - 1))
    whole = call_with(pieces)
    assert difference(call_with(pieces), whole) == ""
    assert difference(call_with(pieces[:at] + pieces[at + 1 :]), whole) != ""
    assert difference(call_with(pieces[: at + 1] + pieces[at:]), whole) != ""
    assert difference(call_with(pieces, usage=len(pieces) + 1), whole) == "other"
    failed = call_with(pieces)
    failed.error = "UNAVAILABLE"
    assert difference(failed, whole).startswith("failed")


def test_what_is_missing_and_what_is_doubled_are_told_apart() -> None:
    """Missing text is reported as a gap, doubled text as a duplicate. The report has a row for each."""
    pieces = [f"word{i} " for i in range(20)]
    assert difference(call_with(pieces[:5] + pieces[8:]), call_with(pieces)) == "gap"
    assert difference(call_with(pieces[:-2]), call_with(pieces)) == "gap"
    assert difference(call_with(pieces[:8] + pieces[5:]), call_with(pieces)) == "duplicate"


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(st.floats(0.5, 50.0), st.integers(0, 2**16))
def test_a_leak_is_seen_in_the_slope(mb_per_h: float, seed: int) -> None:
    """A gateway whose memory grows steadily gets a positive slope."""
    samples = [(float(second), int(1e8 + mb_per_h * 1e6 * second / 3600)) for second in range(240)]
    value, low, high = slope(samples, 1000.0, seed)
    assert low <= value <= high
    assert value == pytest.approx(mb_per_h, rel=0.05)


@pytest.mark.slow
@pytest.mark.long
async def test_kill_points_leave_every_answer_as_it_was(tmp_path: Path) -> None:
    """After a dozen faults during calls of all kinds, answers and ledger are exact, and the report has every row."""
    file = tmp_path / "out.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests", "faults", "--only", "mass", "--points", "12", "--concurrency", "24",
        "--json", str(file), cwd=ROOT, env={**os.environ, "COLUMNS": "160"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 540)
    assert process.returncode == 0, out.decode()
    report = json.loads(file.read_text())
    mass = report["settings"]["mass"]
    assert mass["points"] == 12
    assert (mass["stuck"], mass["different"]) == (0, {})
    assert mass["resumes"] > 0, "faults that hit nobody prove nothing"
    rows = {figure["name"]: figure for figure in report["figures"]}
    assert rows["calls under random faults that end with exactly the undisturbed answer"]["met"]
    assert rows["calls missing or doubled in the ledger, over all parts"]["value"] == 0
    assert all(figure["reason"] for figure in report["figures"] if figure["value"] is None)
