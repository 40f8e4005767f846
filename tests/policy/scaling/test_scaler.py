"""Tests of the scaler: the observations that it gives to the policy, its memory, requests of operators, restarts, and
missing gateways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest

from cluster.api.demand import ClassCounts, ComputedWork, ModelDemand
from cluster.api.outcomes import CallError, Outcome
from cluster.api.scaling import ScalingDecision
from cluster.api.types import CatalogEntry, ModelSpec
from cluster.policy.scaling.decision_log import KEPT
from cluster.policy.scaling.inputs import Kind, OperatorRequest, RayReplicas, ScalingSettings, WorkerSeen
from cluster.policy.scaling.operator_requests import ScalingRequests, requests_from_json, requests_to_json
from cluster.policy.scaling.replica_rates import ReplicaLimits
from cluster.policy.scaling.scaler import Scaler

LIMITS = ReplicaLimits(8, 512, 10_000)


def spec(name: str = "m", **fields: object) -> ModelSpec:
    """Return the spec of a model with zero to four replicas, which scales to zero after a minute."""
    given: dict[str, object] = {"min_replicas": 0, "max_replicas": 4, "idle_s": 60.0, **fields}
    return ModelSpec(name, f"/{name}", **given)  # type: ignore[arg-type]


class World:
    """A scaler with a simulated Ray. A replica is ready `cold_s` seconds after the decision to start it."""

    def __init__(
        self, *specs: ModelSpec, asked: OperatorRequest | None = None, cold_s: float = 20.0, now: float = 1000.0
    ) -> None:
        self.now, self.cold_s, self.specs = now, cold_s, specs
        self.scaler = Scaler(ScalingSettings(), now, asked)
        self.ray: dict[Kind, RayReplicas] = {}
        self.workers: dict[str, WorkerSeen] = {}
        self.coming: list[tuple[float, str]] = []
        self.counts = ClassCounts("standard", 1)
        self.blind = False
        self.started = now

    def call(self, requests: int = 1, *, waits: bool = True) -> None:
        """Add calls to the first model. The calls wait while no replica serves."""
        c = self.counts
        self.counts = dataclasses.replace(
            c,
            arrived_requests=c.arrived_requests + requests,
            queued_requests=requests if waits and not self.workers else 0,
            held_requests=requests if waits and not self.workers else 0,
        )

    def tell(self) -> bool:
        """Report the gateway's demand. Return whether scaling should be decided at once."""
        demand = ModelDemand(self.specs[0].name, 0, 0, 0, 0, 0, (self.counts,))
        held = self.scaler.demands.record_report("g", [demand], self.now - self.started, self.now)
        if held:
            self.scaler.decide_next_pass()
        return held

    def step(self, seconds: float = 1.0) -> Sequence[tuple[str, ScalingDecision]]:
        """Run one pass of the controller, `seconds` after the previous pass. Return the new decisions."""
        self.now += seconds
        for due, name in [one for one in self.coming if one[0] <= self.now]:
            self.coming.remove((due, name))
            worker = f"{name}-{due}-{len(self.workers)}"
            self.workers[worker] = WorkerSeen(worker, worker, name, limits=LIMITS)
            self.counts = dataclasses.replace(self.counts, queued_requests=0, held_requests=0)
        if not self.blind:
            self.tell()
        made = self.scaler.run_pass(
            self.specs, self.ray, list(self.workers.values()), self.now, self.now + 1e9, blind=self.blind
        )
        for model in self.specs:
            self._apply(model)
        return made

    def _apply(self, model: ModelSpec) -> None:
        wanted = self.scaler.replicas(model)
        there = [w for w in self.workers.values() if w.model == model.name]
        due = [c for c in self.coming if c[1] == model.name]
        for _ in range(wanted - len(there) - len(due)):
            self.coming.append((self.now + self.cold_s, model.name))
        for worker in there[wanted:]:
            del self.workers[worker.worker_id]
        self.ray[model.name, model.gpu] = RayReplicas(wanted, len(there), len(due))

    def until(self, replicas: int, limit_s: float = 200.0) -> float:
        """Run passes until this number of replicas serves. Return the seconds until then."""
        began = self.now
        while len(self.workers) != replicas:
            assert self.now - began < limit_s, f"still {len(self.workers)} of {replicas}"
            self.step()
        return self.now - began


def entry(world: World) -> CatalogEntry:
    """Return the catalog entry of the first model, with the fields that the scaler adds for gateways."""
    return world.scaler.with_scaling_fields(CatalogEntry(world.specs[0].name))


def test_to_zero_and_back() -> None:
    """A new model starts, scales to zero when it is idle, and scales up again for a waiting call. Its cold-start time
    is then learnt."""
    world = World(spec())
    world.until(1)
    assert world.until(0, 70.0) > 30.0
    for _ in range(100):
        world.step()
    assert (world.scaler.replicas(world.specs[0]), entry(world).starting_since_s) == (0, 0.0)
    world.call()
    assert world.tell(), "somebody should look now"
    (made,) = world.step(0.0)
    assert (made[0], made[1].action, made[1].replicas) == ("m", "from_zero", 1)
    world.step()
    assert entry(world).starting_since_s == pytest.approx(world.now - 1 + 1e9)
    assert world.until(1) <= 20.0
    world.step()
    shown = entry(world)
    assert shown.cold_start_s == pytest.approx(20.0, abs=1.5)
    assert (shown.starting_since_s, shown.replicas_desired) == (0.0, 1)


def test_a_new_controller_keeps_what_it_finds() -> None:
    """A restarted controller changes nothing at first: the number of replicas set in Ray counts as the last
    decision."""
    old = World(spec(idle_s=0.0, min_replicas=3))
    old.until(3)
    new = World(*old.specs, now=old.now)
    new.ray, new.workers = dict(old.ray), dict(old.workers)
    for _ in range(5):
        assert not new.step()
    assert len(new.workers) == 3
    rested = World(spec())
    rested.ray = {("m", ""): RayReplicas(0)}
    rested.step()
    assert rested.scaler.replicas(rested.specs[0]) == 0, "it was at zero, and stays there"


def test_while_no_gateway_tells_nothing_changes() -> None:
    """While no gateway reports, nothing is scaled, except at the request of an operator."""
    world = World(spec())
    world.until(1)
    world.blind = True
    for _ in range(200):
        assert not world.step()
    requests = ScalingRequests(world.scaler, lambda: None)
    requests.scale("m", 2)
    (made,) = world.step()
    assert (made[1].why, made[1].replicas, world.scaler.scaling_of("m").why) == ("manual", 2, "no gateway is linked")


def test_bounds_hold_while_no_gateway_tells() -> None:
    """A changed maximum of replicas is applied even while no gateway reports."""
    world = World(spec(min_replicas=3, idle_s=0.0))
    world.until(3)
    world.blind, world.specs = True, (spec(min_replicas=1, max_replicas=2, idle_s=0.0),)
    (made,) = world.step()
    assert (made[1].action, made[1].replicas, made[1].why) == ("down", 2, "bounds")


def test_by_hand_and_frozen() -> None:
    """A number of replicas that an operator sets stays until it is withdrawn, even if the model is idle. A frozen model
    is never changed."""
    kept: list[OperatorRequest] = []
    world = World(spec(aliases=("default",)))
    world.until(1)
    requests = ScalingRequests(world.scaler, lambda: kept.append(world.scaler.operator_requests))
    assert requests.scale("default", 3).by == "manual"
    world.until(3)
    for _ in range(100):
        world.step()
    assert len(world.workers) == 3
    assert [one.by for one in requests.freeze("m", True)] == ["frozen"], "the answer shows the state after it"
    assert requests.scale("m", 1).by in ("manual", "frozen")
    for _ in range(3):
        assert not world.step()
    assert (len(world.workers), world.scaler.scaling_of("m").by) == (3, "frozen")
    requests.freeze("", True)
    requests.freeze("m", False)
    world.step()
    assert len(world.workers) == 3, "all are frozen"
    requests.freeze("", False)
    world.until(1)
    requests.scale("m", None)
    world.until(0)
    assert requests_from_json(requests_to_json(kept[2])) == kept[2]
    assert len(kept) == 7
    again = World(*world.specs, asked=kept[0])
    again.step()
    assert again.scaler.replicas(again.specs[0]) == 3, "what was asked outlives the controller"


def test_what_cannot_be_asked() -> None:
    """An operator's request is refused if its number of replicas exceeds the entry's maximum, or if the model is
    unknown."""
    world = World(spec())
    world.step()
    requests = ScalingRequests(world.scaler, lambda: pytest.fail("nothing was asked"))
    for replicas in (-1, 5):
        with pytest.raises(CallError, match="0 to 4"):
            requests.scale("m", replicas)
    for ask in (lambda: requests.scale("n", 1), lambda: requests.freeze("n", True), lambda: requests.explain("n", 0)):
        with pytest.raises(CallError) as caught:
            ask()
        assert caught.value.outcome is Outcome.MODEL_NOT_FOUND
    wrong: Mapping[str, object]
    for wrong in ({}, {"manual": {"m": "x"}, "frozen": [], "all_frozen": False}, {"manual": {}, "frozen": 1}):
        with pytest.raises(ValueError, match="must be"):
            requests_from_json(wrong)


def test_the_story_is_bounded_and_says_how_often() -> None:
    """The decision log keeps successive decisions not to scale as one entry, if they have the same reason, and counts
    them. It drops the oldest entries and lists the newest entries last."""
    world = World(spec())
    world.until(1)
    world.step()
    story = world.scaler.explain("m")
    assert sum(one.passes for one in story.decisions) > len(story.decisions)
    requests = ScalingRequests(world.scaler, lambda: None)
    for number in range(2 * KEPT):
        requests.scale("m", number % 4)
        world.step()
    story = requests.explain("m", 0)
    assert len(story.decisions) == KEPT
    assert requests.explain("m", 2).decisions == story.decisions[-2:]
    assert story.decisions[-1].replicas == (2 * KEPT - 1) % 4
    actions, gpu_seconds = world.scaler.counters()["m"]
    assert actions["to_zero"] >= KEPT / 4 - 1
    assert gpu_seconds > 0


def test_gpu_seconds_are_those_of_what_is_there() -> None:
    """GPU-seconds are counted for all replicas, including starting and leaving ones; here each replica has two GPUs."""
    world = World(spec(min_replicas=2, tensor_parallel_size=2, idle_s=0.0))
    world.step()
    world.ray["m", ""] = RayReplicas(2, 1, 1, leaving=1)
    before = world.scaler.counters()["m"][1]
    world.scaler.run_pass(world.specs, world.ray, [], world.now + 10.0, 1e9)
    assert world.scaler.counters()["m"][1] - before == pytest.approx(10.0 * 3 * 2)


def test_rates_come_from_the_workers_words() -> None:
    """An explanation contains the costs that were learnt from the engines' reports."""
    world = World(spec(min_replicas=1, idle_s=0.0))
    world.until(1)
    (name,) = world.workers
    for number in range(1, 60):
        batch = 1 + number % 8
        work = world.workers[name].work
        work = ComputedWork(
            work.steps + 50, work.busy_s + 50 * (0.01 + 0.001 * batch), 0, work.decode_tokens + 50 * batch
        )
        world.workers[name] = dataclasses.replace(world.workers[name], work=work)
        world.step()
    now = world.scaler.explain("m").now
    assert now["learnt_step_s"] == pytest.approx(0.01, rel=0.01)
    assert now["learnt_decode_s_a_token"] == pytest.approx(0.001, rel=0.01)


# ---- several types of GPU

TYPES: dict[str, object] = {"min_replicas": 3, "max_replicas": 6, "idle_s": 0.0}
FAST, SLOW = spec("m", gpu="H100", **TYPES), spec("m", gpu="L4", tensor_parallel_size=2, **TYPES)


def typed_worker(number: int, gpu: str, work: ComputedWork | None = None) -> WorkerSeen:
    """Return a serving worker on this type of GPU."""
    return WorkerSeen(f"w{number}", f"i{number}", "m", work=work or ComputedWork(), limits=LIMITS, gpu=gpu)


def test_what_the_first_type_does_not_hold_goes_on_the_next() -> None:
    """Replicas that do not fit on the first GPU type go to the next type and stay there.

    If an entry loses a GPU type, the model keeps its number of replicas.
    """
    scaler, room = Scaler(ScalingSettings(), 0.0), {("m", "H100"): 2, ("m", "L4"): 5}
    scaler.run_pass([FAST, SLOW], {}, [], 1.0, 1e9, room=room)
    assert (scaler.replicas(FAST), scaler.replicas(SLOW)) == (2, 1)
    ray = {("m", "H100"): RayReplicas(2, 2), ("m", "L4"): RayReplicas(1, 1)}
    workers = [typed_worker(0, "H100"), typed_worker(1, "H100"), typed_worker(2, "L4")]
    room["m", "H100"] = 6
    for now in range(2, 40):
        assert not scaler.run_pass([FAST, SLOW], ray, workers, float(now), 1e9 + now, room=room)
    assert (scaler.replicas(FAST), scaler.replicas(SLOW)) == (2, 1)
    standing = scaler.scaling_of("m")
    assert (standing.target, standing.running, standing.desired) == (3, 3, 3)
    assert scaler.with_scaling_fields(CatalogEntry("m")).replicas_desired == 3
    back = Scaler(ScalingSettings(), 0.0)
    back.run_pass([FAST, SLOW], ray, workers, 1.0, 1e9, room=room)
    assert (back.replicas(FAST), back.replicas(SLOW)) == (2, 1), "a controller that comes back leaves them there"
    scaler.run_pass([FAST], ray, workers, 50.0, 1e9)
    assert scaler.replicas(FAST) == 3
    other = dataclasses.replace(FAST, gpu="")
    scaler.run_pass([other], {("m", "H100"): RayReplicas(3, 3)}, [], 51.0, 1e9)
    assert (scaler.replicas(other), scaler.scaling_of("m").target) == (3, 3)


def test_a_type_that_finds_no_place_any_more_is_left_for_another() -> None:
    """If replicas wait for a GPU type whose capacity another model has taken, they move to another type. The move is
    reported."""
    scaler, room = Scaler(ScalingSettings(), 0.0), {("m", "H100"): 3, ("m", "L4"): 5}
    scaler.run_pass([FAST, SLOW], {}, [], 1.0, 1e9, room=room)
    assert scaler.replicas(FAST) == 3
    room["m", "H100"] = 2
    workers = [typed_worker(0, "H100"), typed_worker(1, "H100")]
    made = list(scaler.run_pass([FAST, SLOW], {("m", "H100"): RayReplicas(3, 2)}, workers, 10.0, 1e9, room=room))
    assert (scaler.replicas(FAST), scaler.replicas(SLOW)) == (2, 1)
    assert [(name, one.action, one.replicas) for name, one in made] == [("m", "move", 3)]
    for now, place in ((11.0, 1), (30.0, 2)):
        workers.append(typed_worker(place + 1, "L4"))
        scaler.run_pass(
            [FAST, SLOW],
            {("m", "H100"): RayReplicas(2, 2), ("m", "L4"): RayReplicas(1, 1)},
            workers[:3],
            now,
            1e9,
            room=room,
        )
    assert scaler.scaling_of("m").cold_start_s == pytest.approx(1.0, abs=0.5)


def test_by_hand_over_types_while_no_gateway_tells() -> None:
    """The replicas that an operator has requested are placed on the first GPU type until it is full, then on the next
    type. Scaling down removes replicas of the last type first."""
    room = {("m", "H100"): 2, ("m", "L4"): 5}
    scaler = Scaler(ScalingSettings(), 0.0, OperatorRequest(manual={"m": 5}))
    scaler.run_pass([FAST, SLOW], {}, [], 1.0, 1e9, blind=True, room=room)
    assert (scaler.replicas(FAST), scaler.replicas(SLOW)) == (2, 3)
    scaler.set_operator_requests(OperatorRequest(manual={"m": 1}))
    scaler.run_pass([FAST, SLOW], {}, [], 2.0, 1e9, blind=True, room=room)
    assert (scaler.replicas(FAST), scaler.replicas(SLOW)) == (1, 0)


def test_rates_are_learnt_and_gpus_counted_by_type() -> None:
    """The rates of each GPU type are learnt from the workers of this type. A worker of an unknown type counts for the
    first type."""
    scaler = Scaler(ScalingSettings(), 0.0)
    ray = {("m", "H100"): RayReplicas(1, 1), ("m", "L4"): RayReplicas(2, 1, 1)}
    for number in range(60):
        steps = 50 * number
        costs = {"H100": (0.01, 0.001), "L4": (0.02, 0.004)}
        tokens = 50 * sum(1 + n % 8 for n in range(number))
        workers = [
            typed_worker(n, gpu, ComputedWork(steps, steps * fixed + each * tokens, 0, tokens))
            for n, (gpu, (fixed, each)) in enumerate(costs.items())
        ]
        scaler.run_pass([FAST, SLOW], ray, workers, 1.0 + number, 1e9)
    now = scaler.explain("m").now
    for gpu, (fixed, each) in costs.items():
        assert now[f"learnt_step_s[{gpu}]"] == pytest.approx(fixed, rel=0.01)
        assert now[f"learnt_decode_s_a_token[{gpu}]"] == pytest.approx(each, rel=0.01)
    assert scaler.counters()["m"][1] == pytest.approx(59.0 * (1 * 1 + 2 * 2))
    stranger = [dataclasses.replace(one, gpu="A100") for one in workers[:1]]
    scaler.run_pass([FAST, SLOW], ray, stranger, 100.0, 1e9)
    assert scaler.scaling_of("m").running == 1
