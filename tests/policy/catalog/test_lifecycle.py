"""Tests of the state machine of a model, and of the catalog entries for the gateways."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from cluster.api.pooling import PoolingTask
from cluster.api.types import ModelSpec, ModelState
from cluster.policy.catalog.lifecycle import (
    MOVES,
    IllegalMove,
    ModelObservation,
    SourceFacts,
    WorkerReport,
    entry,
    fill_from_earlier,
    next_state,
    observe,
)
from cluster.policy.catalog.reconcile import Observed

SPEC = ModelSpec(name="m", source="/m", aliases=("a",), version="v3")
SERVING = Observed("m", "d", target=2, running=1)

AFTER = {
    ModelObservation.ABSENT: ModelState.DECLARED,
    ModelObservation.RESTING: ModelState.IDLE,
    ModelObservation.UNPLACED: ModelState.PLACING,
    ModelObservation.STARTING: ModelState.LOADING,
    ModelObservation.SERVING: ModelState.READY,
    ModelObservation.BROKEN: ModelState.FAILED,
    ModelObservation.WITHDRAWN: ModelState.DRAINING,
    ModelObservation.ENDED: ModelState.GONE,
}


@pytest.mark.parametrize(("state", "seen"), list(itertools.product(ModelState, ModelObservation)))
def test_every_pair(state: ModelState, seen: ModelObservation) -> None:
    """The state after an observation depends only on the observation, not on the state before it. The exception is the
    state GONE, in which every observation other than ABSENT and ENDED is an error."""
    if state is ModelState.GONE and seen not in (ModelObservation.ABSENT, ModelObservation.ENDED):
        assert (state, seen) not in MOVES
        with pytest.raises(IllegalMove, match=f"GONE: {seen.name}"):
            next_state(state, seen)
    else:
        assert next_state(state, seen) is AFTER[seen]


@pytest.mark.parametrize(
    ("wanted", "seen", "unplaceable", "expected"),
    [
        (True, None, "", ModelObservation.ABSENT),
        (True, Observed("m", "", 0, deleting=True), "", ModelObservation.ABSENT),
        (True, Observed("m", "", 0), "", ModelObservation.UNPLACED),
        (True, Observed("m", "d", 0), "", ModelObservation.RESTING),
        (True, Observed("m", "d", 1), "", ModelObservation.UNPLACED),
        (True, Observed("m", "d", 1), "no node", ModelObservation.BROKEN),
        (True, Observed("m", "d", 1, placed=1), "", ModelObservation.STARTING),
        (True, Observed("m", "d", 1, placed=1, trouble="died before"), "", ModelObservation.STARTING),
        (True, Observed("m", "d", 1, trouble="died"), "", ModelObservation.BROKEN),
        (True, Observed("m", "d", 1, placed=1, refused=True, trouble="no"), "", ModelObservation.BROKEN),
        (True, Observed("m", "d", 1, gave_up=True), "", ModelObservation.BROKEN),
        (True, Observed("m", "d", 2, running=1, placed=1), "no node", ModelObservation.SERVING),
        (False, SERVING, "", ModelObservation.WITHDRAWN),
        (False, None, "", ModelObservation.ENDED),
    ],
)
def test_what_is_seen(wanted: bool, seen: Observed | None, unplaceable: str, expected: ModelObservation) -> None:
    """The observation of a model says that the model serves, if a replica serves. Otherwise it reports a present
    failure, if there is one. Otherwise it reports the progress of the starting replicas."""
    assert observe(wanted, seen, unplaceable) is expected


def test_workers_words_win_over_the_source() -> None:
    """The limits and digests that a running worker reports override those in the model files."""
    known = SourceFacts(bundle_digest="sha256:k", max_model_len=4096, family="llama")
    workers = [WorkerReport("sha256:b", "sha256:t", 512, "float32-tp1-pp1", {"top_k": 3}), WorkerReport("sha256:a")]
    result = entry(SPEC, ModelState.READY, SERVING, reported=workers, known=known)
    assert (result.bundle_digest, result.max_model_len, result.engine_class) == ("sha256:t", 512, "float32-tp1-pp1")
    assert result.weight_digests == ("sha256:a", "sha256:b")
    assert not result.weights_pinned
    assert (result.replicas, result.replicas_desired, result.family, result.aliases) == (1, 1, "llama", ("a",))
    assert result.state_reason == "1 of 2 replicas serve"
    resting = entry(SPEC, ModelState.DECLARED, None, known=known)
    assert (resting.bundle_digest, resting.max_model_len) == ("sha256:k", 4096)


def test_pinned_weights_are_the_entrys_own() -> None:
    """If the entry pins a digest of the weights, the digest that a worker reports does not replace it."""
    pinned = dataclasses.replace(SPEC, digest="sha256:right")
    result = entry(pinned, ModelState.READY, SERVING, reported=[WorkerReport("sha256:wrong")])
    assert (result.weight_digests, result.weights_pinned) == (("sha256:right",), True)


@pytest.mark.parametrize(
    ("state", "seen", "unplaceable", "reason"),
    [
        (ModelState.FAILED, Observed("m", "d", 1, trouble="no folder"), "", "no folder"),
        (ModelState.FAILED, Observed("m", "d", 1), "needs 2 GPUs", "needs 2 GPUs"),
        (ModelState.PLACING, Observed("m", "d", 1), "", "waiting for Ray to place it"),
        (ModelState.DECLARED, None, "", "no tokenizer"),
        (ModelState.READY, Observed("m", "d", 1, running=1, trouble="old"), "", ""),
    ],
)
def test_reasons(state: ModelState, seen: Observed | None, unplaceable: str, reason: str) -> None:
    """An entry in a state other than READY has a reason. An entry in the state READY has a reason only if replicas are
    missing."""
    result = entry(SPEC, state, seen, unplaceable=unplaceable, known=SourceFacts(trouble="no tokenizer"))
    assert result.state_reason == reason


def test_model_at_rest_stays_tokenizable() -> None:
    """When a model has no worker any more, its entry keeps the values that its workers reported."""
    report = WorkerReport("sha256:w", "sha256:t", 512, "c", {"top_p": 0.9}, (PoolingTask.EMBED,))
    up = entry(SPEC, ModelState.READY, SERVING, reported=[report])
    down = fill_from_earlier(up, entry(SPEC, ModelState.LOADING, Observed("m", "d", 1, placed=1)))
    assert dataclasses.replace(down, state=up.state, replicas=1, state_reason=up.state_reason) == up
    assert fill_from_earlier(None, up) is up
    assert down.tasks == (PoolingTask.EMBED,)
    generates = entry(SPEC, ModelState.READY, SERVING, reported=[dataclasses.replace(report, tasks=())])
    assert fill_from_earlier(up, generates).tasks == (), "what a worker reports now counts"
