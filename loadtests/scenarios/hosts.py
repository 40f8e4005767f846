"""The scenario `hosts`: a cluster from the rendered Helm chart, with network namespaces as hosts, under load. Meanwhile
parts of the cluster die, are cut off and are replaced.

The cluster is started once. All events of hosts/events.py happen one after another while streams run. Then the event
`engine` adds a real engine that spans two hosts. `--only EVENT` selects some of the events. `--speed` shortens the
streams and so the run. `--concurrency` is the number of sequences that each simulated worker takes.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from loadtests.children import DidNotStart
from loadtests.figures import Bound, Figure, missing
from loadtests.hosts import cluster as clusters
from loadtests.hosts import engine as engines
from loadtests.hosts import load as loads
from loadtests.hosts.cluster import TENANT, Cluster, Size
from loadtests.hosts.events import EVENTS, EpisodeResults, NotWhole, Play, evaluate
from loadtests.hosts.load import Call, Load
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

SHARE = 0.7
BOOKS_S = 60.0
"""Time in seconds in which all records must arrive. A record waits ten seconds for the counts of a lost worker."""
NOTHING_CAME_S = 1.0
"""Bound on the wait for the first piece, in seconds. Only a call that was lost together with its
gateway waits longer.
"""
FAILED = "calls failed beyond what docs/failures.md allows, over all faults and rolls"
SILENCE = "longest silent gap of any stream, against detection + one prefill"
OF_EVENT = "the same at `{}`"
CAPACITY = "time from node loss to full capacity again, beyond Ray's own restart and engine start"
BOOKS = "calls missing in the ledger, or with tokens doubled"
TEXTS = "streams whose text is not what others were told for the same prompt"
RANKS = "ranks of a real engine at TP 2 on the host that has fewer"
RANKS_FAILED = "calls to it that failed, or got another text than others, before and after its hosts were cut apart"
MOVE = "streams lost while a model moves from one Ray cluster to another"
MOVING = "move"
ENGINE = "engine"
WAYS_OUT = "namespaces that reached an address outside"
_NONE, _SILENCE, _CAPACITY, _ONE = Bound("<=", 0.0), Bound("<=", 2.0), Bound("<=", 5.0), Bound(">=", 1.0)
NODE_LOSSES = ("node",)
ALLOWED = "STORE_UNAVAILABLE"
"""Error that is allowed while the database is away for longer than store.stale_after_s. That setting is a day, so no
such error is expected here.
"""


async def play(stage: Stage) -> None:
    """Start the cluster, play the selected events, and report the results of each event."""
    if os.geteuid():
        raise RuntimeError("network namespaces need root")
    options = stage.options
    size = Size(max_num_seqs=options.concurrency) if options.concurrency else Size()
    speed = options.speed or 1.0
    wanted = [name for name in EVENTS if options.selects(name)]
    stage.report.settings["hosts"] = {
        "workers": size.workers, "seats of each": size.max_num_seqs, "capacity of each": size.capacity // size.workers,
        "share": SHARE, "speed": speed, "streams s": [loads.SHORTEST_S / speed, loads.LONGEST_S / speed],
        "stand-ins": "KubeRay's command lines, the kubelet's restarts and probes, the DNS, the API's Leases",
    }  # fmt: skip
    began = time.monotonic()
    ways_out: dict[str, str] | None = None
    try:
        async with clusters.running(stage.children, stage.folder, size=size, seed=options.seed) as cluster:
            stage.screen.say(f"the cluster is up after {time.monotonic() - began:.0f} s")
            stage.report.settings["hosts"]["processors"] = cluster.processors
            stage.report.settings["hosts"]["up after s"] = round(time.monotonic() - began, 1)
            ways_out = dict(await asyncio.to_thread(cluster.fabric.reachable_outside))
            if wanted:
                await _events(stage, cluster, wanted, speed)
            if options.selects(ENGINE):
                stage.screen.say("part engine")
                stage.report.figures += await _engine(stage, cluster)
    except (RuntimeError, DidNotStart) as error:
        stage.report.problems.append(str(error))
        if not stage.report.figures:
            rows = {FAILED: _NONE, SILENCE: _SILENCE, CAPACITY: _CAPACITY, BOOKS: _NONE, TEXTS: _NONE, MOVE: _NONE}
            stage.report.figures += [missing(row, bound, "the run failed") for row, bound in rows.items()]
    if ways_out is None:
        stage.report.figures.append(missing(WAYS_OUT, _NONE, "the cluster did not start"))
    else:
        stage.report.figures.append(exact(WAYS_OUT, len(ways_out), _NONE, "namespaces", ", ".join(ways_out)))


async def _events(stage: Stage, cluster: Cluster, wanted: Sequence[str], speed: float) -> None:
    made = await cluster.exec(cluster.gateways[0], "headrace", "keys", "create", TENANT, "--role", "operator", "--json")
    load = await loads.begin(
        cluster,
        streams=round(SHARE * cluster.size.capacity),
        tokens=loads.tokens_of(speed),
        seed=stage.options.seed,
        ramp_s=min(loads.LONGEST_S / speed / 2, 20.0),
    )
    player = Play(cluster, load, json.loads(made)["key"])
    interrupted: asyncio.CancelledError | None = None
    try:
        for name in wanted:
            stage.screen.say(f"event {name}")
            try:
                episode = await player.play(name)
                stage.screen.say(f"event {name}: {episode.notes}")
            except NotWhole as error:
                stage.report.problems.append(f"{name}: {error}")
                break
            except RuntimeError as error:
                stage.report.problems.append(f"{name}: {error}")
        stage.screen.say("waiting for the streams' ends")
        await load.end()
    except asyncio.CancelledError as error:
        interrupted = error
        await cluster.kubelet.kill_for_good(load.pod)
        load.read()
    results = {episode.name: evaluate(load, episode) for episode in player.episodes}
    stage.report.settings["events"] = {name: result.settings() for name, result in results.items()}
    stage.report.settings["calls"] = len(load.calls)
    stage.report.figures += _rows(load, results)
    if interrupted is None:
        stage.report.figures.append(await _ledger_figure(cluster, load.calls, stage.report.settings))
    for call in [call for call in load.calls if call.error][:10]:
        stage.report.problems.append(f"call {call.id} failed after {call.ended - call.sent:.1f} s: {call.error[:300]}")
    for result in results.values():
        if not result.episode.whole:
            stage.report.problems.append(f"{result.episode.name}: the cluster was not whole again in time")
    if interrupted is not None:
        raise interrupted


def _rows(load: Load, results: dict[str, EpisodeResults]) -> list[Figure]:
    failed = [call for call in load.calls if call.error]
    note = f"of {len(load.calls)} streams; {dict(Counter(call.error.split(':')[0] for call in failed))}"
    out = [exact(FAILED, len(failed), _NONE, "calls", note)]
    struck = {name: result for name, result in results.items() if name != "calm" and result.calls}
    worst = max(struck.values(), key=lambda result: result.ratio, default=None)
    out.append(_worst(SILENCE, worst, _SILENCE) if worst else missing(SILENCE, _SILENCE, "no event was played"))
    out += [_worst(OF_EVENT.format(name), result, None) for name, result in results.items()]
    beyond = [
        (s, name) for name, result in results.items() if name in NODE_LOSSES and (s := result.beyond_s) is not None
    ]
    if beyond:
        per_event = "; ".join(
            f"{name}: {result.episode.capacity_s:.1f} s in all, engines started after {result.episode.engines_s:.1f} s"
            for name, result in results.items()
            if name in NODE_LOSSES and result.episode.capacity_s and result.episode.engines_s
        )
        out.append(exact(CAPACITY, max(beyond)[0], _CAPACITY, "s", per_event))
    else:
        out.append(missing(CAPACITY, _CAPACITY, "no node was lost, or its engines' start was not found"))
    differing = [call for call in load.calls if call.text]
    out.append(exact(TEXTS, len(differing), _NONE, "streams", differing[0].text[:120] if differing else ""))
    out.append(lost_in_move(results.get(MOVING)))
    return out


def lost_in_move(result: EpisodeResults | None) -> Figure:
    """Return the report's row for the event `move`: how many of the streams in progress during the move were lost. A
    stream is lost if its call failed, or if its text differs from the text of another call with the same prompt."""
    if result is None:
        return missing(MOVE, _NONE, "the event was not played")
    if result.episode.moved is None:
        return missing(MOVE, _NONE, "the model did not move")
    if not result.moved:
        return missing(MOVE, _NONE, "no stream had to be resumed, so nothing was measured")
    lost = [call for call in result.calls if call.error or call.text]
    note = f"of {len(result.calls)} streams, {result.moved} of which went on at the other one's workers"
    return exact(MOVE, len(lost), _NONE, "streams", note)


def _worst(name: str, result: EpisodeResults, bound: Bound | None) -> Figure:
    note = (
        f"{result.episode.name}: {result.longest_gap_s * 1000:.0f} ms, "
        f"detected in {result.episode.detected_s * 1000:.0f} ms, "
        f"a prefill takes {result.prefill_s * 1000:.0f} ms (p99 of {result.prefills}); {len(result.failed)} failed, "
        f"{result.resumed} of {len(result.calls)} resumed on another worker"
    )
    met = None if bound is None else result.ratio <= bound.limit
    return Figure(name, value=result.ratio, bound=str(bound) if bound else None, met=met, note=note)


async def _engine(stage: Stage, cluster: Cluster) -> list[Figure]:
    results = await engines.play(cluster, stage.children, stage.folder, stage.options.seed)
    calls = [*results.calls, *results.after]
    bad = [call for call in calls if call.error or call.text]
    again_s, noticed_s = results.again_s, results.noticed_s
    stage.report.settings["engine"] = {
        "up after s": round(results.up_s, 1), "ranks": list(results.ranks),
        "calls": [len(results.calls), len(results.after)], "errors": sorted({call.error[:200] for call in bad}),
        "noticed s": noticed_s and round(noticed_s, 2), "again after heal s": again_s and round(again_s, 1),
    }  # fmt: skip
    note = f"up {results.up_s:.0f} s after the upgrade; the cut was noticed after {noticed_s or float('nan'):.1f} s"
    fewest = float(min(results.ranks))
    return [
        Figure(RANKS, value=fewest, bound=str(_ONE), met=fewest >= 1.0, unit="ranks", note=note),
        exact(RANKS_FAILED, len(bad), _NONE, "calls", f"of {len(calls)}"),
    ]


async def _ledger_figure(cluster: Cluster, calls: Sequence[Call], settings: dict[str, Any]) -> Figure:
    """Compare the ledger with the counts that callers received, once all records have had time to arrive."""
    reported = {call.id: call.completion for call in calls if not call.error}
    deadline = time.monotonic() + BOOKS_S
    while True:
        try:
            rows = await cluster.usage()
        except RuntimeError as error:
            return missing(BOOKS, _NONE, str(error)[-300:])
        tokens: dict[str, int] = defaultdict(int)
        for request_id, _, _, completion, _ in rows:
            tokens[request_id] += completion
        lacking = [call_id for call_id in reported if tokens[call_id] < reported[call_id]]
        if not lacking or time.monotonic() > deadline:
            break
        await asyncio.sleep(1.0)
    fewer = {call_id: [reported[call_id], *(row[1:] for row in rows if row[0] == call_id)] for call_id in lacking}
    more = {call_id: tokens[call_id] - reported[call_id] for call_id in reported if tokens[call_id] > reported[call_id]}
    settings["ledger"] = {"rows": len(rows), "calls": len(reported), "too few": fewer, "too many": more}
    # Text that was written to a gateway which is then killed or cut off may never reach the client. Such text is
    # computed and counted again (resume.md). A lost gateway is the only reason why a call that was just sent waits this
    # long; with a living gateway no call does.
    whole = [call for call in calls if call.id in more and more[call.id] >= reported[call.id]]
    gateways = {call.id: {row[2].partition(".")[0] for row in rows if row[0] == call.id} for call in whole}
    anew = [call.id for call in whole if call.first - call.sent > NOTHING_CAME_S and len(gateways[call.id]) > 1]
    doubled = [call.id for call in whole if call.id not in anew]
    settings["ledger"]["whole"] = {
        call.id: {
            "told": call.completion,
            "first after s": round(call.first - call.sent, 3),
            "records": [row[1:] for row in rows if row[0] == call.id],
        }
        for call in whole
    }
    twice = f"{sum(more.values())} tokens of {len(more)} calls were made twice"
    if anew:
        twice += f", {len(anew)} of which were begun again, since none of their text had arrived"
    note = f"{len(reported)} answered calls, {len(rows)} records; {twice}"
    return exact(BOOKS, len(lacking) + len(doubled), _NONE, "calls", note)
