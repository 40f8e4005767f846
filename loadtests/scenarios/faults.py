"""Faults: how callers are affected when workers are killed, stopped or cut off, or when the gateway is overloaded.

The scenario has parts, each with rows of its own. In the order of the table the parts are:

- `mass`: faults during calls of every kind
- `engines`: the same faults on real vLLM
- `peers`: streams that finish although a worker is killed, compared with other projects' gateways
- `recovery`: silent gaps, detection, streams that were not hit
- `alarms`, `overload`, `soak`

The ledger is checked after each part. `--only PART` runs some of the parts; `--points`, `--soak-s` and `--rounds` set
their size, and `--runner` selects the model runner of the part `engines`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loadtests import interpreted
from loadtests.children import DidNotStart
from loadtests.faults import alarms, engines, mass, overload, soak
from loadtests.faults import peers as beside
from loadtests.faults import recovery as recovering
from loadtests.faults.ledger import LedgerAudit, audit
from loadtests.faults.mass import KILL, LINK, STOP
from loadtests.figures import Bound, Figure, Interval, missing
from loadtests.peers import NoPeers
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import NOT_ASKED
from loadtests.serving import fleet
from loadtests.serving import ours as serving

POINTS, ENGINE_POINTS = 1000, 40
EXACT = "calls under random faults that end with exactly the undisturbed answer"
DUPLICATES, GAPS = "such calls that told something twice", "such calls with something missing"
ENGINES = "calls on two real vLLM workers (float32, greedy) that go on token-exact"
ENGINES_MIXED = "the same, seeded, penalized, n = 3, with stop strings or under a JSON schema"
FINISH = "begun streams that finish whole when one of two backends is killed, {}"
SILENCE = "silent gap, p99, against TTFT of a fresh call of that length + detection"
CROWD = "the same, against a crowd of fresh calls that come at once to the same survivors"
AFTER = "the same as the first, each gap counted from the fault on"
KILLED = "detection of a kill, at worst"
HUNG = "detection of a stopped process, at worst, against max(5 x p99 step, 500 ms)"
STUCK = "detection of an engine that stands still, at worst, against the same"
ALARMS = "false alarms in long prefills, and in all that was not struck"
SURVIVORS = "survivors' p99 ITL during recovery, against before"
GOODPUT = "goodput at {:g}x capacity, against capacity"
REFUSALS = "refusals at the door, p99"
TOP_LOST = "calls of the top class that were lost at 2x"
SLOPE = "slope of the gateway's memory, MB/h for 1,000 requests/s"
GROWN = "sockets, files, threads and tasks of the gateway that are more after the soak"
BOOKS = "calls missing or doubled in the ledger, over all parts"
_GOODPUT, _REFUSALS, _SLOPE = Bound(">=", 0.9), Bound("<=", 50.0), Bound("<=", 1.0)
HANG_BOUND_S = 0.5
_SILENCE, _KILLED, _HUNG, _SURVIVORS = Bound("<=", 1.25), Bound("<=", 50.0), Bound("<=", 1.0), Bound("<=", 1.5)
_ALL, _NONE = Bound(">=", 1.0), Bound("<=", 0.0)


@dataclass(slots=True)
class TestBed:
    """The objects that all parts of the scenario `faults` share: the stage, the model and its tokenizer bundle.
    `books`: the sum of the results of all audits of the ledger."""

    stage: Stage
    model: Path
    bundle: Path
    books: LedgerAudit = field(default_factory=lambda: LedgerAudit(0, 0, 0, 0))


def exact(name: str, value: float, bound: Bound, unit: str, note: str = "") -> Figure:
    """Return a row whose value was counted over all cases, not estimated."""
    met = value >= bound.limit if bound.sense == ">=" else value <= bound.limit
    return Figure(name, value=value, bound=str(bound), met=met, unit=unit, note=note)


async def play(stage: Stage) -> None:
    """Run the selected parts, and add the rows of the parts in the table's order."""
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    bed = TestBed(stage, model, bundle)
    for name, (part, rows) in PARTS.items():
        if stage.options.selects(name):
            stage.screen.say(f"part {name}")
            try:
                stage.report.figures += await part(bed)
            except (RuntimeError, DidNotStart, TimeoutError) as error:
                stage.report.problems.append(f"{name}: {error!r}")
                stage.report.figures += [missing(row, bound, f"part {name} failed") for row, bound in rows.items()]
        else:
            stage.report.figures += [missing(row, bound, NOT_ASKED) for row, bound in rows.items()]
    books = bed.books
    note = f"{books.sequences} answered sequences; {books.miscounted} calls with wrong token counts"
    stage.report.settings["ledger"] = note
    if books.sequences:
        stage.report.figures.append(exact(BOOKS, books.wrong, _NONE, "calls", note))
    else:
        stage.report.figures.append(missing(BOOKS, _NONE, NOT_ASKED))


async def _mass(bed: TestBed) -> list[Figure]:
    stage, options = bed.stage, bed.stage.options
    source = mass.source(bed.model, options.seed)
    async with fleet.running(
        stage.children, stage.folder, bundle=bed.bundle, sources=[source] * mass.WORKERS, name="mass",
        gateway={"resume": {"max_attempts": mass.MAX_ATTEMPTS, "max_silent_losses": mass.MAX_ATTEMPTS}},
    ) as running:  # fmt: skip
        calls = mass.Mass(running, options.seed, mass.requests_of(running.model, options.seed))
        outcome = await calls.play(options.points or POINTS, options.concurrency or mass.STREAMS)
        bed.books += await audit(running.ledger, outcome.calls)
    out = outcome.settings()
    stage.report.settings["mass"] = out
    for request_id, mismatch in list(outcome.differences.items())[:10]:
        stage.report.problems.append(f"mass: call {request_id} differs: {mismatch}")
    kinds = list(outcome.differences.values())
    note = f"{out['points']} faults in {out['seconds']:.0f} s, {len(outcome.calls)} calls, {out['resumes']} resumes"
    return [
        exact(EXACT, (len(outcome.calls) - len(kinds)) / (len(outcome.calls) + outcome.stuck), _ALL, "share", note),
        exact(DUPLICATES, kinds.count("duplicate"), _NONE, "calls"),
        exact(GAPS, kinds.count("gap"), _NONE, "calls"),
    ]


async def _engines(bed: TestBed) -> list[Figure]:
    stage, options = bed.stage, bed.stage.options
    if options.runner == "v2" and not interpreted.TRITON.is_dir():
        raise DidNotStart("--runner v2 needs Triton beside the environment: make triton")
    model, bundle = await serving.prepare(stage.children, "llama", stage.folder)
    runner = engines.RUNNERS[options.runner]
    async with engines.running(stage.children, stage.folder, model, bundle, runner) as running:
        proof = await engines.prove(running, min(options.points or ENGINE_POINTS, ENGINE_POINTS), options.seed)
        bed.books += await audit(running.fleet.ledger, proof.calls)
    stage.report.settings["engines"] = settings = {"runner": options.runner, **proof.settings()}
    for request_id, mismatch in list(proof.differences.items())[:10]:
        stage.report.problems.append(f"engines: call {request_id} differs: {mismatch}")
    mixture = ", ".join(f"{count} x {kind}" for kind, count in settings["points"].items())
    least = settings["sequences hit a point"]["least"]
    out = []
    for name, kinds in ((ENGINES, engines.GREEDY), (ENGINES_MIXED, engines.OTHERS)):
        good, hit = proof.exact(*kinds)
        note = f"{good} of {hit} calls that lost a worker; {mixture}, each of which hit {least} or more"
        out.append(exact(name, good / hit, _ALL, "share", note) if hit else missing(name, _ALL, "no call was hit"))
    return out


async def _peers(bed: TestBed) -> list[Figure]:
    stage, seed = bed.stage, bed.stage.options.seed
    rounds = min(stage.options.rounds or beside.ROUNDS, beside.ROUNDS)
    engine = beside.source(bed.model, serving.plain_tokens(bed.model), seed)
    children, folder, bundle = stage.children, stage.folder, bed.bundle
    arms: Mapping[str, Callable[[], Awaitable[beside.Finished]]] = {
        beside.OURS: lambda: beside.ours(children, folder, bundle, engine, seed, rounds),
        beside.ROUTER: lambda: beside.vllm_router(children, stage.options.peers, bundle, engine, seed, rounds),
        beside.RAY: lambda: beside.ray_proxy(children, bed.model, bundle, engine, seed, rounds),
    }
    out, settings = [], {}
    for arm, play_arm in arms.items():
        name, bound = FINISH.format(arm), _ALL if arm == beside.OURS else None
        stage.screen.say(f"beside peers: {arm}")
        try:
            finished = await play_arm()
        except (DidNotStart, NoPeers, RuntimeError, TimeoutError) as error:
            stage.report.problems.append(f"peers, {arm}: {error!r}")
            out.append(
                missing(name, bound, f"{arm} did not run: {str(error).splitlines()[0] if str(error) else error!r}")
            )
            continue
        settings[arm] = finished.settings()
        share = finished.whole / finished.begun
        note = f"{finished}, {rounds} kills"
        out.append(exact(name, share, bound, "share", note) if bound else at_worst(name, share, None, "share", note))
    stage.report.settings["beside peers"] = settings
    return out


async def _recovery(bed: TestBed) -> list[Figure]:
    stage, options = bed.stage, bed.stage.options
    plain = serving.plain_tokens(bed.model)
    source = recovering.source(bed.model, plain, options.seed)
    async with fleet.running(
        stage.children, stage.folder, bundle=bed.bundle, sources=[source] * recovering.WORKERS, name="recovery"
    ) as running:
        kinds = recovering.EPISODES[: options.rounds]
        findings = await recovering.Recovery(running, options.seed).play(kinds)
        bed.books += await audit(running.ledger, findings.calls)
    sources = alarms.hanging_sources(bed.model, plain, options.seed)
    async with fleet.running(stage.children, stage.folder, bundle=bed.bundle, sources=sources, name="hangs") as running:
        stuck = await alarms.measure_hangs(running, min(options.rounds or alarms.HANGS, alarms.HANGS))
        bed.books += await audit(running.ledger, stuck.calls)
    stage.report.settings["recovery"] = findings.settings()
    stage.report.settings["hangs"] = {
        "noticed ms": recovering.quantiles(stuck.noticed_s),
        "reasons": sorted(stuck.reasons),
    }
    failed = [call.error for call in (*findings.calls, *stuck.calls) if call.error]
    if failed:
        stage.report.problems.append(f"recovery: {len(failed)} calls failed: {failed[0]}")
    return _recovery_rows(findings, stuck)


def _recovery_rows(findings: recovering.Findings, stuck: alarms.Hangs) -> list[Figure]:
    out = []
    rows = (SILENCE, False, True, _SILENCE), (CROWD, True, True, _SILENCE), (AFTER, False, False, None)
    for name, crowd, whole, bound in rows:
        ratios = findings.silence(crowd, whole=whole)
        row = missing(name, bound, "no stream was hit")
        if ratios:
            row = at_worst(name, recovering.percentile(ratios, 99), bound, "ratio", f"{len(ratios)} gaps")
        out.append(row)
    killed, stopped = findings.noticed_s(KILL, LINK), findings.noticed_s(STOP)
    out += [
        at_worst(KILLED, max(killed, default=None), _KILLED, "ms", f"{len(killed)} kills and cuts", 1000),
        at_worst(HUNG, max(stopped, default=None), _HUNG, "ratio", f"{len(stopped)} stops", 1 / HANG_BOUND_S),
        at_worst(
            STUCK, max(stuck.noticed_s, default=None), _HUNG, "ratio", f"{len(stuck.noticed_s)} hangs", 1 / HANG_BOUND_S
        ),
    ]
    before = [gap for episode in findings.of(KILL, STOP, LINK) for gap in episode.before_s]
    during = [gap for episode in findings.of(KILL, STOP, LINK) for gap in episode.during_s]
    ratio = recovering.percentile(during, 99) / recovering.percentile(before, 99) if before and during else None
    note = f"{len(before)} gaps before, {len(during)} during; {findings.alarms} links of others ended"
    return [*out, at_worst(SURVIVORS, ratio, _SURVIVORS, "ratio", note)]


def at_worst(name: str, value: float | None, bound: Bound | None, unit: str, note: str, scale: float = 1.0) -> Figure:
    """Return a row with one number: the worst value, or a quantile near the worst."""
    if value is None:
        return missing(name, bound, "no value was measured")
    value *= scale
    met = None if bound is None else value <= bound.limit
    return Figure(name, value=value, bound=str(bound) if bound else None, met=met, unit=unit, note=note)


async def _alarms(bed: TestBed) -> list[Figure]:
    stage, options = bed.stage, bed.stage.options
    source = alarms.prefilling_source(bed.model, serving.plain_tokens(bed.model), options.seed)
    count = min(alarms.PREFILL_WORKERS, 4 * (options.rounds or alarms.PREFILL_WORKERS))
    async with fleet.running(
        stage.children, stage.folder, bundle=bed.bundle, sources=[source] * count, name="prefills"
    ) as running:
        results = await alarms.prefills(running, alarms.PREFILL_RUN_S * count / alarms.PREFILL_WORKERS, options.seed)
    note = f"{results.prefills} prefills of 1 to 4 s in {results.worker_s / 3600:.2f} h of {count} workers' time"
    if results.failed:
        stage.report.problems.append(f"alarms: {results.failed} calls failed")
    stage.report.settings["alarms"] = {"note": note, "links that ended": list(results.downs)}
    return [exact(ALARMS, len(results.downs), _NONE, "alarms", note)]


async def _overload(bed: TestBed) -> list[Figure]:
    stage, options = bed.stage, bed.stage.options
    source = overload.source(bed.model, serving.plain_tokens(bed.model), options.seed)
    async with fleet.running(
        stage.children, stage.folder, bundle=bed.bundle, sources=[source] * overload.WORKERS, name="overload",
        gateway={"queue": overload.QUEUE}, classes=tuple(overload.SHARES),
    ) as running:  # fmt: skip
        results = await overload.Overload(running, options.seed).play(min((options.rounds or 10) / 10, 1.0))
        bed.books += await audit(running.ledger, results.calls)
    stage.report.settings["overload"] = {
        "slo": {"ttft_s": overload.SLO.ttft_s, "tpot_s": overload.SLO.tpot_s},
        "sweep": [load.settings() for load in results.sweep],
        **{f"{times:g}x": load.settings() for times, load in results.overs.items()},
    }
    capacity = results.capacity_per_s
    out = [
        exact(
            GOODPUT.format(times), load.goodput_per_s / capacity, _GOODPUT, "ratio",
            f"{load.goodput_per_s:.1f} of {capacity:.1f} calls/s, {load.rate_per_s:.0f} came",
        )
        for times, load in results.overs.items()
    ]  # fmt: skip
    refused, shed = results.refused_s(False), results.refused_s(True)
    shed_ms = f"{results.refusals_p99_ms(True):.0f} ms (p99)"
    note = f"{len(refused)} refused; {len(shed)} shed for a higher class, after {shed_ms}"
    out.append(at_worst(REFUSALS, results.refusals_p99_ms(False) if refused else None, _REFUSALS, "ms", note))
    top = results.overs[2.0]
    came = sum(cls == overload.TOP for cls, _ in top.calls)
    return [*out, exact(TOP_LOST, top.lost(overload.TOP), _NONE, "calls", f"of {came}")]


async def _soak(bed: TestBed) -> list[Figure]:
    stage, options = bed.stage, bed.stage.options
    source = soak.source(bed.model, serving.plain_tokens(bed.model), options.seed)
    told_file = stage.folder / "witness.json"
    async with fleet.running(
        stage.children, stage.folder, bundle=bed.bundle, sources=[source] * soak.WORKERS, name="soak",
        witness=("--stalls", str(told_file)),
    ) as running:  # fmt: skip
        results, calls = await soak.soak(running, told_file, options.soak_s or soak.SOAK_S, options.seed)
        bed.books += await audit(running.ledger, calls)
    stage.report.settings["soak"] = {
        "seconds": round(results.seconds), "requests_per_s": round(results.rate_per_s, 1), "calls": results.calls,
        "before": asdict(results.before), "after": asdict(results.after),
        "rss_bytes": [(round(at - results.rss_bytes[0][0], 1), rss) for at, rss in results.rss_bytes],
        "links that ended": list(results.downs),
    }  # fmt: skip
    if results.downs:
        stage.report.problems.append(f"soak: {len(results.downs)} links ended: {results.downs[0]}")
    if results.failed:
        errors = Counter(call.error for call in calls if call.error)
        stage.report.problems.append(f"soak: {results.failed} calls failed: {dict(errors)}")
    value, low, high = results.slope
    note = f"{results.seconds:.0f} s at {results.rate_per_s:.0f} requests/s; {results.before} -> {results.after}"
    return [
        Figure(SLOPE, value, low, high, str(_SLOPE), _SLOPE.met(Interval(value, low, high)), unit="MB/h"),
        exact(GROWN, sum(results.growth().values()), _NONE, "count", note),
    ]


Part = Callable[[TestBed], Awaitable[list[Figure]]]
PARTS: Mapping[str, tuple[Part, Mapping[str, Bound | None]]] = {
    "mass": (_mass, {EXACT: _ALL, DUPLICATES: _NONE, GAPS: _NONE}),
    "engines": (_engines, {ENGINES: _ALL, ENGINES_MIXED: _ALL}),
    "peers": (
        _peers,
        {FINISH.format(beside.OURS): _ALL, FINISH.format(beside.ROUTER): None, FINISH.format(beside.RAY): None},
    ),
    "recovery": (
        _recovery,
        {
            SILENCE: _SILENCE,
            CROWD: _SILENCE,
            AFTER: None,
            KILLED: _KILLED,
            HUNG: _HUNG,
            STUCK: _HUNG,
            SURVIVORS: _SURVIVORS,
        },
    ),
    "alarms": (_alarms, {ALARMS: _NONE}),
    "overload": (
        _overload,
        {**{GOODPUT.format(x): _GOODPUT for x in overload.OVERS}, REFUSALS: _REFUSALS, TOP_LOST: _NONE},
    ),
    "soak": (_soak, {SLOPE: _SLOPE, GROWN: _NONE}),
}
