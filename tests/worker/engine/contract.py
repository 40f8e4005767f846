"""The contract of cluster.api.ports.Engine, as tests for any engine.

A test class inherits EngineContract and has a fixture `engine` that returns a `Subject`: a started engine with few
slots (so that tests can fill the engine) and a range of ordinary token ids. The tests share the engine and leave it
empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from cluster.api.demand import EngineCounts
from cluster.api.outcomes import Outcome
from cluster.api.ports import Engine, EngineDead, EngineRefused, KvEventSource
from cluster.api.types import (
    KV_EVENTS,
    PREFIX_EXACT,
    RESUME_PLAIN,
    EngineInfo,
    EngineRequest,
    FinishReason,
    Grammar,
    PositionLogprobs,
    Sampling,
    TokenOutput,
)
from cluster.policy.kv_cache.prefix_hashes import prefix_hashes, seed_of
from cluster.worker.kv_events.mirror import KvMirror

MAX_PLACES = 16
CUTS = 28
_serial = itertools.count()
_drivers: list[Driver] = []

_SCHEMA = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 12}},
    "required": ["numbers"],
    "additionalProperties": False,
}
_SAMPLED: dict[str, object] = {"temperature": 1.0, "seed": 7}
RESUMED: dict[str, dict[str, object]] = {
    "greedy": {},
    "seed": _SAMPLED,
    "another seed and top_p, top_k, min_p": {"temperature": 0.7, "seed": -3, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "frequency penalty": {"frequency_penalty": 1.2},
    "presence penalty": {"presence_penalty": 1.5},
    "repetition penalty": {"repetition_penalty": 1.3},
    "all penalties and a seed": {
        **_SAMPLED,
        "frequency_penalty": 0.6,
        "presence_penalty": -0.4,
        "repetition_penalty": 1.1,
    },
    "logprobs": {"logprobs": 3},
    "logprobs of a seeded call": {**_SAMPLED, "logprobs": 2},
    "logit bias": {"logit_bias": {310: 4.0, 311: -50.0, 412: 4.0}},
    "eos heeded": {**_SAMPLED, "ignore_eos": False},
    "json grammar": {"grammar": Grammar("json_schema", json.dumps(_SCHEMA)), "ignore_eos": False},
    "json grammar, seed": {**_SAMPLED, "grammar": Grammar("json_schema", json.dumps(_SCHEMA)), "ignore_eos": False},
    "any json, seed, penalty": {
        **_SAMPLED,
        "grammar": Grammar("json_object", ""),
        "frequency_penalty": 0.8,
        "ignore_eos": False,
    },
    "regex": {**_SAMPLED, "grammar": Grammar("regex", "([a-f]{3}-){9,}[x-z]"), "ignore_eos": False},
    "choice": {
        **_SAMPLED,
        "grammar": Grammar("choice", ("abcdefghijklmnopqrstuvwxyz" * 3, "aabbccddeeffgghhii" * 3)),
        "ignore_eos": False,
    },
    "grammar": {
        **_SAMPLED,
        "grammar": Grammar("grammar", 'root ::= "(" root ")" root | "a" root | "b"'),
        "ignore_eos": False,
        "logprobs": 1,
    },
    "everything": {
        "temperature": 0.9,
        "seed": 12,
        "top_p": 0.95,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.05,
        "logit_bias": {320: 2.0},
        "logprobs": 2,
        "min_tokens": 10,
        "grammar": Grammar("regex", "[a-z ]+"),
        "ignore_eos": False,
    },
}
"""Sampling parameters of the requests that are cut and resumed, by name."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine to test. Prompts consist of ids in [token_lo, token_hi)."""

    engine: Engine
    info: EngineInfo
    token_lo: int
    token_hi: int
    deadline_s: float = 60.0
    kv_events: KvEventSource | None = None
    """The source of the engine's KV events, if it is not the engine."""

    @property
    def resumes_seeds(self) -> bool:
        """Whether the engine can resume seeded requests. The V1 runner of vLLM 0.31 cannot (docs/support.md)."""
        return not self.info.engine_class.endswith("-cpu31")

    def prompt(self, seed: int, tokens: int = 5) -> tuple[int, ...]:
        """Return the token ids of a prompt. Each seed gives different ids."""
        span = self.token_hi - self.token_lo
        return tuple(self.token_lo + (seed * 7919 + i * (31 + seed % 7)) % span for i in range(tokens))


@dataclass(slots=True)
class Answer:
    """The outputs of one request."""

    outputs: list[TokenOutput] = field(default_factory=list)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the answer, in order."""
        return tuple(token for output in self.outputs for token in output.token_ids)

    @property
    def logprobs(self) -> list[PositionLogprobs]:
        """The log probabilities of all positions."""
        return [position for output in self.outputs for position in output.logprobs or ()]

    @property
    def end(self) -> tuple[FinishReason | None, int | None]:
        """The finish reason and the stop token of the answer."""
        return self.finish, self.outputs[-1].stop_token_id if self.outputs else None

    @property
    def finish(self) -> FinishReason | None:
        """The finish reason of the answer, once the request has ended."""
        return self.outputs[-1].finish if self.outputs else None


class Driver:
    """The only caller of an engine's `step`. It runs steps until a condition holds, and collects the outputs."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.engine = subject.engine
        self.answers: dict[str, Answer] = {}
        _drivers.append(self)

    async def submit(self, request: EngineRequest) -> str:
        """Submit a request; return the id of the request."""
        self.answers[request.request_id] = Answer()  # before submit: outputs may arrive before submit returns
        try:
            await self.engine.submit(request)
        except EngineRefused:
            del self.answers[request.request_id]
            raise
        return request.request_id

    async def step(self) -> Sequence[TokenOutput]:
        """Run one step and return its outputs. Check that each output is of a known request that has not finished."""
        # Not wait_for: its task would leave a gap after the step's return in which an abort could run.
        async with asyncio.timeout(self.subject.deadline_s):
            outputs = await self.engine.step()
        for output in outputs:
            answer = self.answers.get(output.request_id)
            assert answer is not None, f"output for {output.request_id}, which was refused, aborted or never submitted"
            assert answer.finish is None, f"{output.request_id}: an output after its finish"
            answer.outputs.append(output)
        return outputs

    async def until(self, holds: Callable[[], bool]) -> None:
        """Run steps until the condition `holds` is true."""
        deadline = time.monotonic() + self.subject.deadline_s
        while not holds():
            assert time.monotonic() < deadline, "the engine did not get there in time"
            await self.step()

    async def abort(self, request_ids: Iterable[str]) -> None:
        """Abort requests. Any further output of these requests is an error."""
        ids = list(request_ids)
        await self.engine.abort(ids)
        for request_id in ids:
            self.answers.pop(request_id, None)

    async def run(self, *requests: EngineRequest) -> list[Answer]:
        """Run requests to their end; return the answers in the order of the requests."""
        ids = [await self.submit(request) for request in requests]
        await self.until(lambda: all(self.answers[i].finish is not None for i in ids))
        return [self.answers[i] for i in ids]

    async def empty(self) -> None:
        """Check that no request runs or waits. Up to two short requests are run first, so that an engine can report the
        end of earlier ones."""
        for _ in range(2):
            load = self.engine.load()
            if load.running == load.waiting == 0:
                return
            await self.run(request(self.subject.prompt(1), max_tokens=1))
        load = self.engine.load()
        assert (load.running, load.waiting) == (0, 0)


async def abort_unfinished() -> None:
    """Abort the requests that the drivers of a test have not finished. Otherwise a failed test would disturb later
    tests on the shared engine."""
    drivers, _drivers[:] = list(_drivers), []
    for driver in drivers:
        unfinished = [key for key, answer in driver.answers.items() if answer.finish is None]
        if unfinished:
            with contextlib.suppress(EngineDead):
                await driver.engine.abort(unfinished)


def request(prompt: Sequence[int], max_tokens: int = 6, **changes: object) -> EngineRequest:
    """Return a greedy request that runs to max_tokens. `changes` are fields of Sampling or EngineRequest."""
    names = {f.name for f in dataclasses.fields(Sampling)}
    sampling: dict[str, object] = {"temperature": 0.0, "ignore_eos": True}
    sampling |= {k: v for k, v in changes.items() if k in names}
    outer = {k: v for k, v in changes.items() if k not in names}
    return EngineRequest(
        request_id=f"contract-{next(_serial)}",
        prompt_token_ids=prompt,
        sampling=Sampling(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
        **outer,  # type: ignore[arg-type]
    )


def prefixes(subject: Subject, token_ids: Sequence[int], salt: str) -> list[int]:
    """Return the prefix hashes of the whole KV blocks of `token_ids`."""
    return list(map(int, prefix_hashes(token_ids, subject.info.block_size, seed_of(salt))))


class EngineContract:
    """The rules that every engine must keep. Each test checks one rule."""

    async def test_kv_events_predict_the_cached_tokens(self, engine: Subject) -> None:
        """A KV mirror that reads the engine's KV events predicts how many tokens of each prompt are cached under its
        salt."""
        assert {KV_EVENTS, PREFIX_EXACT} <= set(engine.info.capabilities)
        size, source = engine.info.block_size, engine.kv_events or cast(KvEventSource, engine.engine)
        mirror, driver = KvMirror(size), Driver(engine)

        async def follow() -> None:
            while True:
                mirror.apply(await source.kv_events())

        def held() -> set[int]:
            return set(map(int, mirror.snapshot().stored))

        following = asyncio.create_task(follow())
        await asyncio.sleep(0)  # the task subscribes before the first request
        try:
            one, two = engine.prompt(71, 3 * size + 5), engine.prompt(72, 2 * size)
            prompts = [one, two, one, (*one[: 2 * size], *two), one[: 2 * size], (*one[: 2 * size], *two, *one), two]
            for number, prompt in enumerate([*prompts, *prompts]):
                salt = f"kv-{number // len(prompts)}"
                hashes = prefixes(engine, prompt[:-1], salt)
                predicted = next((at for at, value in enumerate(hashes) if value not in held()), len(hashes)) * size
                (answer,) = await driver.run(request(prompt, max_tokens=size, cache_salt=salt))
                assert (number, answer.outputs[0].cached_tokens) == (number, predicted)
                computed = prefixes(engine, (*prompt, *answer.token_ids[:-1]), salt)
                async with asyncio.timeout(engine.deadline_s):
                    while not held().issuperset(computed):  # noqa: ASYNC110 - the events come by themselves
                        await asyncio.sleep(0.01)
            assert mirror.ignored == 0
        finally:
            following.cancel()

    async def test_one_finish_after_max_tokens(self, engine: Subject) -> None:
        """A request without EOS or stop ids gets exactly max_tokens tokens and one finish, LENGTH."""
        (answer,) = await Driver(engine).run(request(engine.prompt(2), max_tokens=7))
        assert len(answer.token_ids) == 7
        assert [o.finish for o in answer.outputs if o.finish is not None] == [FinishReason.LENGTH]
        assert all(0 <= token < engine.info.vocab_size for token in answer.token_ids)

    async def test_first_output_alone_carries_prompt_counts(self, engine: Subject) -> None:
        """Only the first output of a request has prompt_tokens and cached_tokens."""
        (answer,) = await Driver(engine).run(request(engine.prompt(3, tokens=9), cache_salt="counts"))
        assert (answer.outputs[0].prompt_tokens, answer.outputs[0].cached_tokens) == (9, 0)
        assert all(o.prompt_tokens is None and o.cached_tokens is None for o in answer.outputs[1:])

    async def test_first_output_of_a_sampled_call_has_its_times(self, engine: Subject) -> None:
        """If a request's traceparent is sampled, its first output has the times that the engine has measured. Other
        outputs have no times."""
        driver, context = Driver(engine), f"00-{'a' * 32}-{'b' * 16}"
        (sampled,) = await driver.run(request(engine.prompt(13), traceparent=f"{context}-01"))
        (other,) = await driver.run(request(engine.prompt(13), traceparent=f"{context}-00"))
        times = sampled.outputs[0].times
        assert times is not None
        assert times.queue_s >= 0
        assert 0 < times.prefill_s <= times.first_output_s < engine.deadline_s
        assert not [o.times for o in (*sampled.outputs[1:], *other.outputs) if o.times is not None]

    async def test_greedy_alone_equals_greedy_in_a_batch(self, engine: Subject) -> None:
        """A greedy request gives the same tokens alone and in a batch with requests of other lengths."""
        driver = Driver(engine)
        mine = engine.prompt(4, tokens=12)
        (alone,) = await driver.run(request(mine, max_tokens=8))
        batch = await driver.run(
            request(engine.prompt(5, tokens=3), max_tokens=5),
            request(mine, max_tokens=8),
            request(engine.prompt(6, tokens=20), max_tokens=8),
        )
        assert batch[1].token_ids == alone.token_ids

    async def test_stop_token_ends_and_is_named(self, engine: Subject) -> None:
        """A stop token is the last token of its answer, and the last output names the stop token."""
        driver = Driver(engine)
        (free,) = await driver.run(request(engine.prompt(7), max_tokens=6))
        stop = free.token_ids[-1]
        first = free.token_ids.index(stop)
        (answer,) = await driver.run(request(engine.prompt(7), max_tokens=6, stop_token_ids=(stop,)))
        assert answer.token_ids == free.token_ids[: first + 1]
        assert (answer.finish, answer.outputs[-1].stop_token_id) == (FinishReason.STOP, stop)

    async def test_min_tokens_holds_stop_tokens_back(self, engine: Subject) -> None:
        """An answer has no stop token within its first min_tokens tokens."""
        driver = Driver(engine)
        (free,) = await driver.run(request(engine.prompt(8), max_tokens=2))
        stops = tuple(set(free.token_ids))
        (answer,) = await driver.run(request(engine.prompt(8), max_tokens=9, min_tokens=5, stop_token_ids=stops))
        assert len(answer.token_ids) >= 5
        assert not set(answer.token_ids[:5]) & set(stops)

    async def test_salts_isolate_the_prefix_cache(self, engine: Subject) -> None:
        """The whole blocks of a prompt are found in the cache with the prompt's salt, and not with another salt. The
        engine counts the tokens that it looked up and found."""
        driver = Driver(engine)
        size = engine.info.block_size
        prompt = engine.prompt(9, tokens=2 * size + 1)
        counted: Any = getattr(engine.engine, "_engine", engine.engine)
        before: EngineCounts = counted.counts()
        cached = [
            (await driver.run(request(prompt, max_tokens=1, cache_salt=salt)))[0].outputs[0].cached_tokens
            for salt in ("cache-a", "cache-a", "cache-b", "")
        ]
        assert cached == [0, 2 * size, 0, 0]
        after: EngineCounts = counted.counts()
        assert after.prefix_query_tokens - before.prefix_query_tokens == 4 * len(prompt)
        assert after.prefix_hit_tokens - before.prefix_hit_tokens == 2 * size
        assert after.preemptions == before.preemptions

    @pytest.mark.parametrize("k", [0, 3])
    async def test_logprobs_have_the_sampled_token_first(self, engine: Subject, k: int) -> None:
        """Each position has the sampled token first, then at most `k` other tokens in order. No log probability is
        above zero."""
        (answer,) = await Driver(engine).run(request(engine.prompt(10), max_tokens=3, logprobs=k))
        positions = [p for output in answer.outputs for p in output.logprobs or ()]
        assert [p.token_ids[0] for p in positions] == list(answer.token_ids)
        for position in positions:
            top = list(position.logprobs[1:])
            assert len(position.token_ids) == len(position.logprobs) <= k + 1
            assert all(value <= 0 for value in position.logprobs)
            assert top == sorted(top, reverse=True)
            assert len(set(position.token_ids[1:])) == len(top)

    async def test_no_logprobs_unless_asked(self, engine: Subject) -> None:
        """Without the parameter `logprobs`, outputs have no log probabilities."""
        (answer,) = await Driver(engine).run(request(engine.prompt(10), max_tokens=2))
        assert all(output.logprobs is None for output in answer.outputs)

    async def test_an_abort_frees_the_slot(self, engine: Subject) -> None:
        """An aborted request has no further output and has left the engine before a later request gets its first token.
        Other requests are unchanged."""
        driver = Driver(engine)
        prompts = [engine.prompt(11), engine.prompt(12)]
        (undisturbed,) = await driver.run(request(prompts[0], max_tokens=12))
        stays = await driver.submit(request(prompts[0], max_tokens=12))
        goes = await driver.submit(request(prompts[1], max_tokens=64))
        await driver.until(lambda: len(driver.answers[goes].outputs) >= 2)
        await driver.abort([goes, "never-submitted"])
        # An engine in another process may be many steps ahead of what was read here, so steps cannot be counted here.
        await driver.run(request(engine.prompt(18), max_tokens=1))
        assert driver.engine.load().running <= 1
        await driver.until(lambda: driver.answers[stays].finish is not None)
        assert driver.answers[stays].token_ids == undisturbed.token_ids
        await driver.empty()

    async def test_abort_of_unknown_ids_is_ignored(self, engine: Subject) -> None:
        """An abort of unknown or finished ids changes nothing."""
        driver = Driver(engine)
        (done,) = await driver.run(request(engine.prompt(13), max_tokens=1))
        await engine.engine.abort(["nobody", done.outputs[0].request_id])
        (answer,) = await driver.run(request(engine.prompt(13), max_tokens=2))
        assert answer.finish is FinishReason.LENGTH

    async def test_duplicate_id_is_refused_and_harmless(self, engine: Subject) -> None:
        """A request with the id of a running request is refused, and the tokens of the running request do not
        change."""
        driver = Driver(engine)
        (alone,) = await driver.run(request(engine.prompt(14), max_tokens=5))
        first = request(engine.prompt(14), max_tokens=5)
        await driver.submit(first)
        with pytest.raises(EngineRefused) as refusal:
            await engine.engine.submit(dataclasses.replace(first, prompt_token_ids=engine.prompt(15)))
        assert refusal.value.reason in Outcome.__members__
        await driver.until(lambda: driver.answers[first.request_id].finish is not None)
        assert driver.answers[first.request_id].token_ids == alone.token_ids

    async def test_too_long_prompt_is_refused(self, engine: Subject) -> None:
        """A prompt that leaves no space for output is refused with the reason, and the engine keeps serving."""
        driver = Driver(engine)
        with pytest.raises(EngineRefused) as refusal:
            await engine.engine.submit(request(engine.prompt(16, tokens=engine.info.max_model_len + 1)))
        assert refusal.value.reason == Outcome.CONTEXT_LENGTH_EXCEEDED.name
        await driver.run(request(engine.prompt(16), max_tokens=1))
        await driver.empty()

    async def test_bad_token_ids_are_refused(self, engine: Subject) -> None:
        """An empty prompt and ids outside the vocabulary are refused, and the engine keeps serving."""
        driver = Driver(engine)
        for prompt in ((), (engine.token_lo, engine.info.vocab_size)):
            with pytest.raises(EngineRefused) as refusal:
                await engine.engine.submit(request(prompt))
            assert refusal.value.reason == Outcome.INVALID_FIELD.name
        await driver.run(request(engine.prompt(17), max_tokens=1))
        await driver.empty()

    async def test_priority_decides_who_is_next_when_full(self, engine: Subject) -> None:
        """When a slot of a full engine becomes free, the waiting request with the lowest priority number gets the
        slot."""
        places = engine.info.max_num_seqs
        assert places <= MAX_PLACES, f"give the contract an engine with max_num_seqs <= {MAX_PLACES}"
        driver = Driver(engine)
        fillers = [await driver.submit(request(engine.prompt(20 + i), max_tokens=200)) for i in range(places)]
        await driver.until(lambda: all(driver.answers[i].outputs for i in fillers))
        later = await driver.submit(request(engine.prompt(18), max_tokens=2, priority=5))
        # The request is long enough to run still when its output is read late.
        sooner = await driver.submit(request(engine.prompt(19), max_tokens=100, priority=1))
        try:
            await driver.abort(fillers[:1])
            await driver.until(lambda: bool(driver.answers[sooner].outputs))
            assert not driver.answers[later].outputs
            await driver.until(lambda: driver.answers[later].finish is not None)
        finally:
            await driver.abort([*fillers[1:], sooner])
        await driver.empty()

    @pytest.mark.parametrize("name", RESUMED)
    async def test_cut_anywhere_equals_uncut(self, engine: Subject, name: str) -> None:
        """A request may be interrupted after any token and resumed in a batch. Its tokens, end and logprobs are the
        same as without the interruption."""
        await cut_everywhere(engine, engine.prompt(40, tokens=40), CUTS + 1, RESUMED[name])

    async def test_a_continued_call_keeps_min_tokens_and_stop_tokens(self, engine: Subject) -> None:
        """In a resumed request, emitted tokens count towards min_tokens, and stop tokens work as in the uncut
        request."""
        driver = Driver(engine)
        (free,) = await driver.run(request(engine.prompt(43), max_tokens=30))
        for least in (0, 20):
            stops = {"min_tokens": least, "stop_token_ids": (free.token_ids[-1],)}
            uncut = await cut_everywhere(engine, engine.prompt(43), 40, stops)
            assert len(uncut.token_ids) >= max(1, least)

    async def test_a_continued_call_tells_its_true_prompt(self, engine: Subject) -> None:
        """In a resumed request, prompt_tokens does not count emitted tokens, and cached_tokens never exceeds
        prompt_tokens."""
        if RESUME_PLAIN in engine.info.capabilities:
            pytest.skip("this engine continues a call as a new prompt")
        size = engine.info.block_size
        prompt, emitted = engine.prompt(44, tokens=2 * size), engine.prompt(45, tokens=2 * size)
        driver, seen = Driver(engine), []
        for _ in range(2):
            (answer,) = await driver.run(
                request(prompt, max_tokens=2 * size + 3, emitted_token_ids=emitted, cache_salt="true-prompt")
            )
            seen.append((answer.outputs[0].prompt_tokens, answer.outputs[0].cached_tokens, len(answer.token_ids)))
        assert seen == [(2 * size, 0, 3), (2 * size, 2 * size, 3)]

    async def test_a_sequence_goes_on_where_another_request_has_computed_it(self, engine: Subject) -> None:
        """A greedy request for one token computes a resumed sequence into the prefix cache: the sequence itself, whose
        sampling and number of tokens differ, then finds its prompt and its emitted tokens there. Its tokens are those
        that it gets without the cache."""
        size, driver = engine.info.block_size, Driver(engine)
        counted: Any = getattr(engine.engine, "_engine", engine.engine)
        prompt, emitted = engine.prompt(46, tokens=2 * size), engine.prompt(47, tokens=2 * size + 1)
        sampled = {"max_tokens": 3 * size, "temperature": 1.0, "seed": 7}
        (alone,) = await driver.run(
            request(prompt, emitted_token_ids=emitted, cache_salt="cold", **sampled)  # type: ignore[arg-type]
        )
        await driver.run(request(prompt, emitted_token_ids=emitted, max_tokens=len(emitted) + 1, cache_salt="prepared"))
        before: EngineCounts = counted.counts()
        (moved,) = await driver.run(
            request(prompt, emitted_token_ids=emitted, cache_salt="prepared", **sampled)  # type: ignore[arg-type]
        )
        found = counted.counts().prefix_hit_tokens - before.prefix_hit_tokens
        if engine.info.engine_class == "sim":  # counts prompts only, and its tokens depend on the salt
            assert found == 2 * size
        else:
            assert found == 4 * size
            assert moved.token_ids == alone.token_ids

    async def test_a_call_at_its_end_is_not_continued(self, engine: Subject) -> None:
        """A resumed request whose emitted tokens reach max_tokens or include a stop token is refused."""
        stop = engine.token_lo + 5
        for emitted, changes in (
            (engine.prompt(46, tokens=6), {}),
            ((engine.token_lo, stop, engine.token_lo), {"stop_token_ids": (stop,)}),
        ):
            with pytest.raises(EngineRefused) as refusal:
                await engine.engine.submit(
                    request(engine.prompt(46), max_tokens=6, emitted_token_ids=emitted, **changes)
                )
            assert (refusal.value.reason, refusal.value.field) == (Outcome.INVALID_FIELD.name, "emitted_token_ids")
        await Driver(engine).empty()

    async def test_storm_of_submits_and_aborts_leaves_nothing(self, engine: Subject) -> None:
        """After submits and aborts at random times, every request has ended or was aborted."""
        driver = Driver(engine)

        async def caller(number: int) -> str:
            requested = request(engine.prompt(50 + number, tokens=1 + number % 9), max_tokens=1 + number % 4)
            await driver.submit(requested)
            for _ in range(number % 5):
                await asyncio.sleep(0)
            if number % 3 == 0:
                await driver.abort([requested.request_id])
            return requested.request_id

        callers = [asyncio.ensure_future(caller(number)) for number in range(30)]
        await driver.until(lambda: any(a.finish is not None for a in driver.answers.values()))
        await asyncio.gather(*callers)
        await driver.until(lambda: all(a.finish is not None for a in driver.answers.values()))
        assert len(driver.answers) >= 20
        await driver.empty()

    async def test_a_step_ages_only_while_there_is_work(self, engine: Subject) -> None:
        """While requests run, load() reports the step's age and the remaining prompt tokens.

        When the engine is idle, load() reports zero for both.
        """
        driver = Driver(engine)
        running = [await driver.submit(request(engine.prompt(47 + i, tokens=30), max_tokens=8)) for i in range(2)]
        assert engine.engine.load().prefill_tokens == 60
        await driver.until(lambda: all(driver.answers[i].outputs for i in running))
        load = engine.engine.load()
        assert (load.prefill_tokens, load.busy) == (0, "")
        assert load.step_p99_s > 0
        await driver.abort(running[:1])
        await driver.until(lambda: driver.answers[running[1]].finish is not None)
        load = engine.engine.load()
        assert (load.prefill_tokens, load.busy, load.step_age_s) == (0, "", 0.0)
        await driver.empty()

    async def test_steps_only_grow(self, engine: Subject) -> None:
        """load().steps grows with every step that emits tokens, and load().kv_usage stays within [0, 1]."""
        driver = Driver(engine)
        before = engine.engine.load().steps
        await driver.run(request(engine.prompt(41), max_tokens=4))
        after = engine.engine.load()
        assert after.steps >= before + 4
        assert 0.0 <= after.kv_usage <= 1.0
        await engine.engine.check()


CONTROLS = ("frequency penalty", "presence penalty", "json grammar, seed", "regex")
"""Keys of RESUMED whose requests continue differently when they are resumed as a new prompt."""


async def plain_rests(subject: Subject, prompt: Sequence[int], name: str) -> tuple[int, int]:
    """Split the output of a request at every position, and submit the prompt plus the tokens before the split as a new
    request.

    Return the number of splits, and the number of splits after which the new request gives the remaining tokens.
    """
    driver, changes = Driver(subject), RESUMED[name]
    (uncut,) = await driver.run(request(prompt, max_tokens=CUTS + 1, **changes))
    cuts = range(1, len(uncut.token_ids))
    rests = [
        request((*prompt, *uncut.token_ids[:cut]), max_tokens=len(uncut.token_ids) - cut, **changes) for cut in cuts
    ]
    answers = await driver.run(*rests)
    return len(cuts), sum(answer.token_ids == uncut.token_ids[cut:] for cut, answer in zip(cuts, answers, strict=True))


async def cut_everywhere(subject: Subject, prompt: Sequence[int], tokens: int, changes: Mapping[str, object]) -> Answer:
    """Resume a request after every prefix of its answer, all at the same time, and check that each resumed answer
    equals the uninterrupted answer. Return the uninterrupted answer."""
    driver = Driver(subject)
    (uncut,) = await driver.run(request(prompt, max_tokens=tokens, **changes))
    cuts = range(1, len(uncut.token_ids))
    assert uncut.finish is FinishReason.STOP or len(cuts) == tokens - 1
    rests = [request(prompt, max_tokens=tokens, emitted_token_ids=uncut.token_ids[:cut], **changes) for cut in cuts]
    try:
        answers = await driver.run(*rests)
    except EngineRefused as refusal:
        assert RESUME_PLAIN in subject.info.capabilities or (  # noqa: PT017
            refusal.field == "seed" and not subject.resumes_seeds
        )
        assert refusal.reason == Outcome.RESUME_UNSUPPORTED.name  # noqa: PT017
        return uncut
    for cut, answer in zip(cuts, answers, strict=True):
        assert answer.token_ids == uncut.token_ids[cut:], f"cut after {cut}"
        assert answer.end == uncut.end
        for mine, theirs in zip(answer.logprobs, uncut.logprobs[cut:], strict=True):
            assert mine.token_ids[0] == theirs.token_ids[0]
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    return uncut
