"""Properties of the pure parts of the simulated engine: KV blocks, tokens and scheduler."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.types import EngineRequest, Sampling, TokenOutput
from cluster.wire.codecs.codec import load_to_pb
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.kv import KvCache, chain
from cluster.worker.engine.simulated.model import SimModel
from cluster.worker.engine.simulated.tokens import content_key, extend, fold
from tests.support.cpu import cpu_within

ROOMY = SimConfig(vocab=500, token_lo=100, token_hi=400, eos=2, max_model_len=128, kv_blocks=4096, block_size=4)
TIGHT = dataclasses.replace(ROOMY, kv_blocks=32, max_num_seqs=5, max_num_batched_tokens=13)


def ask(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 10,
    *,
    salt: str = "",
    priority: int = 0,
    emitted: Sequence[int] = (),
    sampling: Sampling | None = None,
) -> EngineRequest:
    """Return a request with these sampling parameters. By default the request is greedy."""
    sampling = sampling or Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id, prompt, sampling, emitted, salt, priority)


def step(model: SimModel) -> list[TokenOutput]:
    """Run one step and return its outputs."""
    return model.complete(model.schedule())


def run(model: SimModel, *requests: EngineRequest) -> dict[str, list[int]]:
    """Submit requests and step until all have ended; return the tokens of each request by its id."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for r in requests:
        model.submit(r)
    while model.has_work():
        for output in step(model):
            tokens[output.request_id].extend(output.token_ids)
    return tokens


prompts = st.lists(st.integers(100, 103), min_size=1, max_size=40)


@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.integers(0, 2**32 - 1)), st.integers(0, 2**64 - 60))
def test_fold_goes_on_where_it_stopped(a: list[int], b: list[int], state: int) -> None:
    """The hash state is the same if tokens are hashed all at once, in two parts, or one by one."""
    whole = fold(state, [*a, *b])
    assert fold(fold(state, a), b) == whole
    for token in (*a, *b):
        state = extend(state, token)
    assert state == fold(whole, ())


@given(st.lists(st.integers(0, 499), min_size=1, max_size=100), st.data())
def test_any_other_token_gives_another_state(tokens: list[int], data: st.DataObject) -> None:
    """The hash state changes if any token is changed or dropped, or if two tokens are swapped."""
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens]
    changed[at] = (changed[at] + data.draw(st.integers(1, 498))) % 499
    dropped = tokens[:at] + tokens[at + 1 :]
    swapped = dropped[:at] + dropped[at : at + 1] + [tokens[at]] + dropped[at + 1 :]
    for other in (changed, dropped, swapped):
        if other != tokens:
            assert fold(12345, other) != fold(12345, tokens)


@given(prompts, st.integers(1, 12), st.data())
def test_cut_and_continued_equals_uncut_at_every_cut(prompt: list[int], max_tokens: int, data: st.DataObject) -> None:
    """A request that is cut after any token gets exactly its remaining tokens on another engine, with any sampling
    parameters."""
    sampling = Sampling(
        max_tokens=max_tokens,
        min_tokens=data.draw(st.integers(0, max_tokens)),
        temperature=data.draw(st.sampled_from([0.0, 0.7])),
        seed=data.draw(st.sampled_from([None, 1])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 0.5])),
    )
    config = dataclasses.replace(ROOMY, eos_ratio=0.1)
    uncut = run(SimModel(config), ask("a", prompt, salt="s", sampling=sampling))["a"]
    for cut in range(1, len(uncut)):
        elsewhere = SimModel(dataclasses.replace(TIGHT, eos_ratio=0.1))
        rest = run(elsewhere, ask("b", prompt, salt="s", emitted=uncut[:cut], sampling=sampling))["b"]
        assert rest == uncut[cut:]


@given(prompts, st.sampled_from([None, 3]))
def test_folding_emitted_into_the_prompt_is_exact_only_for_greedy(prompt: list[int], seed: int | None) -> None:
    """If emitted tokens are passed as part of the prompt, the continuation is exact without a seed, but not with a
    seed.

    A real engine has the same property.
    """
    sampling = Sampling(max_tokens=8, temperature=0.0, seed=seed, ignore_eos=True)
    model = SimModel(ROOMY)
    uncut = run(model, ask("a", prompt, sampling=sampling))["a"]
    folded = run(model, ask("b", [*prompt, *uncut[:3]], sampling=sampling))["b"][:5]
    assert (folded == uncut[3:]) == (seed is None)


@dataclass(frozen=True)
class Move:
    """One move of a random history: a submit, an optional abort, and some engine steps."""

    prompt: list[int]
    max_tokens: int
    salt: str
    priority: int
    aborts: int | None
    steps: int


moves = st.lists(
    st.builds(
        Move,
        prompt=prompts,
        max_tokens=st.integers(1, 40),
        salt=st.sampled_from(["", "a", "b"]),
        priority=st.integers(0, 2),
        aborts=st.none() | st.integers(0, 20),
        steps=st.integers(0, 6),
    ),
    min_size=1,
    max_size=20,
)


def check_blocks(model: SimModel, config: SimConfig) -> None:
    """Check the bounds of the KV cache that hold between any two steps."""
    s = model.statistics()
    assert 0 <= s.kv_used_blocks <= config.kv_blocks
    assert s.kv_used_blocks + s.kv_idle_blocks <= config.kv_blocks
    assert 0 <= s.running <= config.max_num_seqs
    assert s.running + s.waiting == s.submitted - s.finished - s.aborted
    if not s.running:
        assert s.kv_used_blocks == 0


@settings(max_examples=150, deadline=None)
@given(moves)
@pytest.mark.slow
def test_a_crowded_engine_keeps_its_bounds_and_its_tokens(history: list[Move]) -> None:
    """With chunked prefills, preemptions and aborts, the bounds of the KV cache hold and no block leaks.

    Each request has the same tokens as when it runs alone.
    """
    model = SimModel(TIGHT)
    got: dict[str, list[int]] = {}
    aborted: set[str] = set()

    def step() -> None:
        before = model.statistics()
        plan = model.schedule()
        if model.statistics().preemptions > before.preemptions:
            assert model.statistics().running < before.running, "a preempted request must not be admitted again at once"
        assert len(plan.work) <= TIGHT.max_num_seqs
        assert plan.prefill_tokens + plan.decode_tokens <= TIGHT.max_num_batched_tokens
        assert plan.work, "an engine with work must go on"
        for output in model.complete(plan):
            got[output.request_id].extend(output.token_ids)
        check_blocks(model, TIGHT)

    for number, move in enumerate(history):
        model.submit(ask(str(number), move.prompt, move.max_tokens, salt=move.salt, priority=move.priority))
        got[str(number)] = []
        if move.aborts is not None and model.abort(str(move.aborts)):
            aborted.add(str(move.aborts))
            check_blocks(model, TIGHT)
        for _ in range(move.steps):
            if model.has_work():
                step()
    while model.has_work():
        step()
    assert model.statistics().kv_used_blocks == 0
    for number, move in enumerate(history):
        alone = run(SimModel(ROOMY), ask("x", move.prompt, move.max_tokens, salt=move.salt))["x"]
        tokens = got[str(number)]
        assert tokens == (alone[: len(tokens)] if str(number) in aborted else alone)


def test_preemption_happens_and_changes_no_token() -> None:
    """Requests that together exceed the KV cache are preempted, and still get the tokens that they get alone."""
    requests = [ask(str(i), [100 + i] * 20, 40) for i in range(5)]
    crowded = SimModel(TIGHT)
    tokens = run(crowded, *requests)
    assert crowded.statistics().preemptions > 0
    assert tokens == {r.request_id: run(SimModel(ROOMY), r)[r.request_id] for r in requests}


def test_the_least_urgent_is_preempted() -> None:
    """In a full cache, the request with the lowest priority number finishes first, even if it was submitted last."""
    model = SimModel(TIGHT)
    for i in range(4):
        model.submit(ask(str(i), [100 + i] * 20, 40, priority=9 - i))
    first: list[str] = []
    while model.has_work():
        first += [o.request_id for o in step(model) if o.finish is not None]
    assert first[0] == "3"
    assert model.statistics().preemptions > 0


@given(prompts, st.sampled_from(["", "a", "b"]), st.sampled_from(["", "a", "b"]))
def test_prefix_hits_never_cross_salts(prompt: list[int], mine: str, other: str) -> None:
    """A second request with the same prompt and salt gets all full blocks from the cache, except a block that has the
    prompt's last token.

    A request with another salt gets no blocks from the cache.
    """
    model = SimModel(ROOMY)
    run(model, ask("a", prompt, 1, salt=mine))
    model.submit(ask("b", prompt, 1, salt=other))
    (output,) = step(model)
    whole = (len(prompt) - 1) // ROOMY.block_size * ROOMY.block_size
    assert output.cached_tokens == (whole if mine == other else 0)


def test_cached_tokens_count_the_prompt_alone() -> None:
    """If the prompt and the emitted tokens of a resumed request are cached, its cached tokens count the prompt only."""
    model = SimModel(ROOMY)
    uncut = run(model, ask("a", [100] * 10, 30))["a"]
    model.submit(ask("b", [100] * 10, 30, emitted=uncut[:20]))
    (output,) = step(model)
    assert (output.prompt_tokens, output.cached_tokens) == (10, 10)


@given(prompts)
def test_salt_is_part_of_the_content(prompt: list[int]) -> None:
    """The same request with another salt gives different tokens."""
    model = SimModel(ROOMY)
    tokens = run(model, ask("a", prompt, 8, salt="a"), ask("b", prompt, 8, salt="b"))
    assert tokens["a"] != tokens["b"]


@given(prompts, st.integers(0, 3), st.integers(0, 3))
def test_same_seed_same_tokens(prompt: list[int], seed: int, other: int) -> None:
    """Two engines give the same tokens if and only if their seeds are equal."""
    mine = run(SimModel(dataclasses.replace(ROOMY, seed=seed)), ask("a", prompt, 12))
    theirs = run(SimModel(dataclasses.replace(TIGHT, seed=other)), ask("a", prompt, 12))
    assert (mine == theirs) == (seed == other)


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.booleans()), max_size=40))
def test_kv_blocks_equal_a_recount(blocks: int, history: list[tuple[int, int, bool]]) -> None:
    """After any allocations, commits and releases of blocks, `used` and `free` equal a recount and are never
    negative."""
    kv = KvCache(blocks)
    holders: list[tuple[list[int], int]] = []
    for family, length, give_back in history:
        hashes: list[int] = []
        for i in range(length):
            hashes.append(chain(hashes[-1] if hashes else family, [i]))
        cached = max(0, kv.match(hashes) - 1)  # as in the scheduler, since the end of the last block must be computed
        kv.acquire(hashes[:cached])
        if kv.allocate(length - cached + 1):
            for block in hashes[cached:]:
                kv.commit(block)
            holders.append((hashes, 1))
        else:
            kv.release(hashes[:cached], 0)
        if give_back and holders:
            kv.release(*holders.pop(0))
        shared = Counter(block for held, _ in holders for block in held)
        assert kv.used == len(shared) + len(holders)
        assert 0 <= kv.free == blocks - kv.used
        assert kv.idle <= kv.free
        assert all(kv.match([block]) == 1 for block in shared)


def test_oldest_idle_block_is_evicted_first_and_tails_before_heads() -> None:
    """Of the idle blocks, the one that was freed first is evicted first. Within one request, later blocks are evicted
    first."""
    kv = KvCache(4)
    for hashes in ([1, 2], [3, 4]):
        assert kv.allocate(2)
        for block in hashes:
            kv.commit(block)
        kv.release(hashes, 0)
    assert kv.allocate(1)
    assert [kv.match([block]) for block in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert kv.allocate(2)
    assert [kv.match([block]) for block in (1, 3, 4)] == [0, 1, 0]


def test_a_block_filled_again_is_not_idle_beside() -> None:
    """If a call computes a block whose content an idle block already has, the content is not held twice: the idle copy
    is dropped."""
    kv = KvCache(4)
    assert kv.allocate(2)
    for block in (1, 2):
        kv.commit(block)
    kv.release([1, 2], 0)
    assert kv.allocate(1)
    kv.commit(2)
    assert (kv.used, kv.idle) == (1, 1)


def test_chunked_prefill_takes_its_steps() -> None:
    """A prompt of 100 tokens at 13 tokens per step has its first output in the eighth step.

    The duration of the steps follows from their tokens.
    """
    model = SimModel(TIGHT)
    model.submit(ask("a", [100] * 100, 1))
    plans = []
    for number in range(8):
        plans.append(model.schedule())
        assert len(model.complete(plans[-1])) == (number == 7)
    assert sum(plan.step_s for plan in plans) == 8 * 0.02 + 100 / 20_000


def test_256_streams_cost_little_of_a_core() -> None:
    """For 256 streams the scheduler takes less than 5 ms of CPU time per step. This bound is loose: usually it takes
    less than 2 ms, a tenth of a step of 20 ms."""
    model = SimModel(dataclasses.replace(ROOMY, max_model_len=1024, block_size=16))
    for i in range(256):
        model.submit(ask(str(i), [100 + i % 200] * 100, 900))
    while model.load().waiting:
        step(model)
    with cpu_within(50 * 0.005):
        for _ in range(50):
            step(model)


@given(st.text(max_size=8), st.text(max_size=8))
def test_a_salt_shapes_content_only_where_it_is_wanted(one: str, other: str) -> None:
    """The salt changes the tokens only if `salted` is set. Tests use `salted` to detect a lost salt."""
    requests = [EngineRequest("r", [1, 2, 3], Sampling(max_tokens=4), cache_salt=salt) for salt in (one, other)]
    plain = {content_key(7, request, salted=False) for request in requests}
    salted = {content_key(7, request) for request in requests}
    assert len(plain) == 1
    assert len(salted) == len({one, other})


def test_the_load_is_valid_between_any_two_lines() -> None:
    """Another thread may read the load at any moment, even while a sequence ends or is aborted: the load can be encoded
    before each line of the model."""
    model, looks = SimModel(dataclasses.replace(TIGHT, max_num_seqs=2)), 0

    def look(frame: FrameType, event: str, _: object) -> Any:
        nonlocal looks
        if frame.f_globals["__name__"] != SimModel.__module__:
            return None
        if event == "line":
            sys.settrace(None)
            load_to_pb(model.load())
            looks += 1
            sys.settrace(look)
        return look

    for number in range(4):
        model.submit(ask(f"r{number}", [100 + number] * 6, max_tokens=2 + number))
    sys.settrace(look)
    try:
        step(model)
        model.abort("r1")
        while model.has_work():
            step(model)
    finally:
        sys.settrace(None)
    assert looks > 100
