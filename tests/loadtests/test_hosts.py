"""Tests of the scenario `hosts`: its comparison of texts, its simulated network and DNS, and a small run of it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.children import ROOT
from loadtests.hosts.cgroup import cgroup
from loadtests.hosts.events import Episode, EpisodeResults, evaluate, worker_starts
from loadtests.hosts.fabric import PREFIX, Place, fabric
from loadtests.hosts.inside.callers import Callers, Plan
from loadtests.hosts.load import Call, Load
from loadtests.hosts.pods import LAST, in_cgroup
from loadtests.hosts.rendered import DOMAIN, Names, Spec
from loadtests.scenarios.hosts import lost_in_move

PLAN = Plan("", "e:1", "", "", "m", streams=1, clients=1, tokens=(1, 2))


@given(st.lists(st.text("abcdefg ", min_size=1, max_size=4), min_size=6, max_size=30), st.data())
def test_a_text_that_lost_or_doubled_a_piece_is_told(pieces: list[str], data: st.DataObject) -> None:
    """Answers to the same prompt are compared: the shorter answer must be the beginning of the longer one. So an answer
    with a lost or doubled piece is reported."""
    pieces = [f"{number}{piece}" for number, piece in enumerate(pieces)]
    at = data.draw(st.integers(1, len(pieces) - 2))
    judge = Callers(PLAN, io.StringIO())
    assert judge.compare(0, "".join(pieces)) == ""
    assert judge.compare(0, "".join(pieces[:at])) == ""
    assert judge.compare(0, "".join(pieces[:at] + pieces[at + 1 :])) != ""
    assert judge.compare(0, "".join(pieces[: at + 1] + pieces[at:])) != ""
    assert judge.compare(1, "another prompt's answer") == ""


def call(
    number: int, sent: float, first: float, ended: float, gaps: list[tuple[float, float]], error: str = ""
) -> Call:
    """Return a call as the callers record it."""
    return Call(f"c{number}", 10, sent, first, ended, gaps, error, "", 10)


def test_only_silences_of_the_event_count_and_failures_within_it() -> None:
    """The evaluation of an event, such as the loss of a gateway, counts failed calls and silent gaps of streams only if
    they lie between the beginning and the end of the event."""
    load = Load.__new__(Load)
    load.calls = [
        call(0, 90.0, 90.2, 104.0, [(95.0, 3.0), (101.0, 0.9)]),
        call(1, 91.0, 91.1, 112.0, [(111.0, 7.0)]),
        call(2, 85.0, 85.1, 97.0, [], "INTERNAL"),
        call(3, 92.0, 92.1, 103.0, [], "UNAVAILABLE"),
        call(4, 60.0, 78.0, 99.0, []),
    ]
    episode = Episode("gateway", 100.0, over=103.5, detected_s=0.25)
    seen = evaluate(load, episode)
    assert [call.id for call in seen.failed] == ["c3"]
    assert seen.longest_gap_s == 0.9
    assert seen.prefill_s == pytest.approx(0.2, abs=0.01)
    assert seen.ratio == pytest.approx(0.9 / 0.45, rel=0.05)


def moving(calls: list[Call], moved: float | None = 120.0) -> EpisodeResults:
    """Return the results of the event `move` with these calls. The event begins at second 100. `moved`: the second at
    which no worker is left on the first Ray cluster; None if that never happens."""
    load = Load.__new__(Load)
    load.calls = [call(0, 85.0, 85.1, 90.0, []), *calls]
    return evaluate(load, Episode("move", 100.0, over=150.0, moved=moved))


def test_workers_are_found_in_what_replicas_print() -> None:
    """The starts of workers are found among the other lines that replicas print."""

    def line(event: str, worker: str, second: int) -> bytes:
        stamp = f"2026-11-25T22:48:{second:02}.5Z"
        return json.dumps({"event": event, "worker": worker, "timestamp": stamp}).encode() + b"\n"

    output = b":job_id:03\n" + line("worker.ready", "mass-a54", 4) + line("worker.engine_started", "m-1", 4)
    (first, at), (second, later) = worker_starts(output + b"INFO worker.ready\n" + line("worker.ready", "m-1", 5))
    assert (first, second, later - at) == ("mass-a54", "m-1", 1.0)


def test_a_stream_that_is_lost_while_its_model_moves_is_told() -> None:
    """The report's row for the event `move` fails if a call that was in progress during the event fails, even after the
    event is over. It also fails if the text of a call differs from the text of another call with the same prompt."""
    goes_on = replace(call(1, 95.0, 95.1, 130.0, []), resumed=1)
    assert lost_in_move(moving([goes_on])).value == 0.0
    late = call(2, 140.0, 140.1, 170.0, [], "UNAVAILABLE")
    assert (row := lost_in_move(moving([goes_on, late]))).value == 1.0
    assert row.met is False
    assert lost_in_move(moving([goes_on, replace(late, error="", text="differs at 1")])).value == 1.0


def test_a_move_that_moved_nothing_is_not_measured() -> None:
    """The row of the event `move` has no value if no stream changed workers, or if the model did not move."""
    goes_on = replace(call(1, 95.0, 95.1, 130.0, []), resumed=1)
    assert lost_in_move(None).value is None
    assert lost_in_move(moving([goes_on], moved=None)).value is None
    assert lost_in_move(moving([replace(goes_on, resumed=0)])).value is None
    another_events = replace(call(1, 60.0, 60.1, 119.0, []), resumed=1)
    assert lost_in_move(moving([another_events])).value is None


def test_names_follow_readiness_but_for_the_links() -> None:
    """The DNS name for callers resolves only to ready gateways. The DNS name for workers resolves also to gateways that
    are starting, and lists each gateway's own name."""
    link = {
        "metadata": {"name": "headrace-links"},
        "spec": {
            "clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"part": "gateway"},
            "ports": [{"name": "link", "port": 50052, "protocol": "TCP"}],
        },
    }  # fmt: skip
    front = {"metadata": {"name": "headrace"}, "spec": {"selector": {"part": "gateway"}, "ports": []}}
    pods = [
        (Spec(name, part, (), {}, (), 0, 0, labels={"part": part}), Place(name, "a", address), ready)
        for name, part, address, ready in (
            ("g-0", "gateway", "10.0.0.1", True), ("g-1", "gateway", "10.0.0.2", False), ("r", "ray", "10.0.0.3", True)
        )
    ]  # fmt: skip
    zone = Names([link, front]).zone(pods)
    assert zone["hosts"][f"headrace.{DOMAIN}"] == ["10.0.0.1"]
    assert zone["hosts"][f"headrace-links.{DOMAIN}"] == ["10.0.0.1", "10.0.0.2"]
    assert zone["srv"] == {
        f"_link._tcp.headrace-links.{DOMAIN}": [
            (f"g-0.headrace-links.{DOMAIN}", 50052),
            (f"g-1.headrace-links.{DOMAIN}", 50052),
        ]
    }
    assert zone["hosts"][f"g-1.headrace-links.{DOMAIN}"] == ["10.0.0.2"]


def reaches(place: Place, other: Place) -> bool:
    """Return whether a packet from `place` reaches `other` and is answered."""
    command = ["ping", "-c", "1", "-W", "1", other.address]
    return subprocess.run(place.command(*command), capture_output=True, check=False).returncode == 0


def left_of(pid: int) -> list[str]:
    """Return the namespaces that a run has left behind. `pid`: the process of the run."""
    return [path.name for path in Path("/run/netns").glob(f"{PREFIX}{pid}-*")]


@pytest.mark.root
@pytest.mark.needs("ping")
@pytest.mark.slow
def test_a_host_is_cut_off_and_healed_and_nothing_leads_out_or_stays() -> None:
    """While a host is cut off, its pods reach one another. No pod reaches this machine's network, and at the end the
    network is removed."""

    def break_off() -> None:
        with fabric(("a", "b")) as net:
            place, beside, other = net.place("one", "a"), net.place("beside", "a"), net.place("other", "b")
            assert reaches(place, other)
            net.cut("a")
            assert not reaches(place, other)
            assert reaches(place, beside)
            net.heal("a")
            assert reaches(other, place)
            assert net.reachable_outside() == {}
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        break_off()
    assert left_of(os.getpid()) == []
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert f"{PREFIX}{os.getpid()}" not in links


@pytest.mark.root
@pytest.mark.needs("valkey-server", "postgresql")
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_gateway_of_the_rendered_cluster_dies(tmp_path: Path) -> None:
    """The load test `hosts` starts the cluster of the Helm chart and kills a gateway. No call fails, and the texts and
    the ledger are exact. The cluster's network has no route to the outside. At the end everything is removed."""
    file = tmp_path / "out.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests", "hosts", "--only", "gateway", "--speed", "20", "--concurrency", "16",
        "--json", str(file), cwd=ROOT, env={**os.environ, "COLUMNS": "160"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 840)
    assert file.exists(), out.decode()
    report = json.loads(file.read_text())
    assert report["problems"] == [], out.decode()
    rows = {figure["name"]: figure for figure in report["figures"]}
    for name in (
        "calls failed beyond what docs/failures.md allows, over all faults and rolls",
        "calls missing in the ledger, or with tokens doubled",
        "streams whose text is not what others were told for the same prompt",
        "namespaces that reached an address outside",
    ):
        assert rows[name]["value"] == 0, rows[name]
    assert report["settings"]["events"]["gateway"]["resumed"] > 0, "a gateway whose end moved no stream proves nothing"
    assert left_of(process.pid) == []


@pytest.mark.parametrize("last", [False, True])
def test_pods_share_processors_by_process(last: bool) -> None:
    """A new cgroup has the usual CPU weight. A process that is started in the cgroup belongs to it. If `last` is set,
    the process has a niceness of LAST more than this process. The cgroup is removed afterwards."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with cgroup() as path:
        if path is None:
            pytest.skip("no groups of the cpu controller; run the tests as root, with a writable /sys/fs/cgroup")
        weights = [int(file.read_text()) for name in ("cpu.shares", "cpu.weight") if (file := path / name).exists()]
        assert weights in ([1024], [100])
        process = subprocess.Popen(in_cgroup(["sleep", "60"], path, last=last))
        try:
            deadline = time.monotonic() + 60
            while f"/{path.name}\n" not in Path(f"/proc/{process.pid}/cgroup").read_text():
                assert time.monotonic() < deadline, "the process has not joined the group"
            while psutil.Process(process.pid).name() != "sleep":
                assert time.monotonic() < deadline, "the command has not begun"
            assert psutil.Process(process.pid).nice() == min(19, own + (LAST if last else 0))
        finally:
            process.kill()
            process.wait()
    assert not path.exists()
