"""No request may kill the engine: after odd, extreme and random requests, a plain request gets the same tokens as
before.

Each odd request is refused with EngineRefused or runs to a finish. Its output is not checked here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, Grammar, Sampling
from cluster.worker.engine.vllm.requests import MAX_STOP_TOKEN_IDS, MAX_STOP_TOKEN_IDS_AFTER_MIN
from tests.worker.engine.contract import Driver, Subject, request

pytestmark = pytest.mark.engine

EVERY_TOKEN = tuple(range(768))
MOST_STOPS = (*EVERY_TOKEN, *EVERY_TOKEN)[:MAX_STOP_TOKEN_IDS]

EXTREMES: dict[str, dict[str, object]] = {
    "tiny repetition penalty": {"repetition_penalty": 0.01},
    "huge repetition penalty": {"repetition_penalty": 100.0},
    "all tokens forbidden": {"logit_bias": dict.fromkeys(EVERY_TOKEN, -100.0)},
    "huge biases": {"logit_bias": {300: 1e38, 301: -1e38}},
    "smallest top_p": {"top_p": 1e-6, "temperature": 2.0},
    "min_p of one": {"min_p": 1.0},
    "top_k above the vocabulary": {"top_k": 1 << 62},
    "most logprobs": {"logprobs": 20},
    "every token stops": {"stop_token_ids": EVERY_TOKEN, "max_tokens": 5},
    "most stop ids": {"stop_token_ids": MOST_STOPS, "max_tokens": 5},
    "smallest seed": {"seed": -(1 << 63)},
    "largest seed": {"seed": (1 << 63) - 1},
    "seed minus one": {"seed": -1},
    "smallest temperature": {"temperature": 5e-324},
    "endless max_tokens": {"max_tokens": 1 << 62, "min_tokens": 1 << 61, "stop_token_ids": (300,)},
    "grammar at its end, EOS ignored": {"grammar": Grammar("choice", ("a", "b")), "max_tokens": 20},
    "grammar against min_tokens": {"grammar": Grammar("choice", ("a", "b")), "min_tokens": 8, "max_tokens": 8},
    "grammar against bias": {
        "grammar": Grammar("choice", ("a", "b")),
        "logit_bias": dict.fromkeys(EVERY_TOKEN, -100.0),
    },
    "grammar, penalties, seed and logprobs": {
        "grammar": Grammar("regex", "[a-z]+"),
        "frequency_penalty": 2.0,
        "presence_penalty": -2.0,
        "seed": 3,
        "logprobs": 7,
    },
}

REGEXES = (
    *("(((", "", "(a+)+$", "[^\\s\\S]", "a\x00b", "(?=a)b", r"(a)\1", "[\U00010000-\U0010ffff]{5}", "\ud800"),
    *("(a{1,1000}){1,1000}", ".{0,9000}", "(" * 1500 + "a" + ")" * 1500, "|".join(f"a{i}" for i in range(600))),
)
SCHEMAS: tuple[object, ...] = (
    *({}, {"not": {}}, {"type": "nope"}, {"type": 5, "properties": []}, {"properties": {"a": 5}}, {"const": None}),
    *({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"$ref": "#/nope"}, {"$ref": "http://x/y"}),
    *({"type": "string", "maxLength": 10**9}, {"type": "string", "minLength": "x"}, {"type": "string", "pattern": "("}),
    *({"type": "array", "minItems": -5}, {"type": "array", "items": {"type": "array", "minItems": 10**5}}),
    *({"type": "integer", "minimum": -1e300}, {"type": "integer", "minimum": 5, "maximum": 1}, {"enum": []}),
    *({"enum": list(range(4000))}, {"allOf": [{"type": "integer"}, {"type": "string"}]}, {"oneOf": [{}, {}]}),
    *({"patternProperties": {"^(": {}}, "propertyNames": {"pattern": "("}}, {"type": "integer", "multipleOf": 0}),
    *({"properties": {f"p{i}": {"type": "integer"} for i in range(1500)}}, {"format": "date-time", "type": "string"}),
)
GRAMMARS = (
    *("not a grammar", 'root ::= "a" root | "b"', 'root ::= root "a" | "b"', 'root ::= root root | "a" | ""'),
    *("root ::= root", 'x ::= "a"', "root ::= y", 'root ::= ""', 'start: "a" | "b"', "start: x\nx: /(((/"),
    *('root ::= a{1000}\na ::= b{1000}\nb ::= "x"{1000}', "start: @x", "start: x{1,9999}\nx: /[a-z]{1,9999}/"),
)
CHOICES: tuple[tuple[str, ...], ...] = (
    (),
    ("",),
    ("a",) * 2000,
    ('"', "\\", "\n", "\x00"),
    ("x" * 60_000,),
    ("\ud800",),
)


def odd_grammars() -> list[Grammar]:
    """Return odd grammars of every kind: invalid, endless, empty, huge and contradictory."""
    return [
        *(Grammar("regex", value) for value in REGEXES),
        *(Grammar("json_schema", json.dumps(value)) for value in SCHEMAS),
        *(Grammar("json_schema", value) for value in ("", "{", "[]", '{"items":' * 5000 + "{}" + "}" * 5000)),
        *(Grammar("grammar", value) for value in GRAMMARS),
        *(Grammar("choice", value) for value in CHOICES),
        Grammar("choice", "a text"),
        Grammar("json_object", "{}"),
        Grammar("json_object", ""),
        Grammar("xml", "<a/>"),
    ]


def _well_refused(refusal: EngineRefused) -> str:
    assert refusal.reason in Outcome.__members__
    assert refusal.message
    return refusal.field


async def _survives(driver: Driver, odd: EngineRequest) -> str:
    """Run a request until it finishes or is refused. Returns the name of the finish reason, or of the refused field."""
    try:
        (answer,) = await driver.run(odd)
    except EngineRefused as refusal:
        return _well_refused(refusal)
    assert answer.finish is not None
    return answer.finish.name


async def test_extreme_values_run(fast_subject: Subject) -> None:
    """Requests with the most extreme allowed values run to a finish, and the engine works as before."""
    driver, plain = Driver(fast_subject), fast_subject.prompt(90)
    (reference,) = await driver.run(request(plain, max_tokens=8))
    for name, changes in EXTREMES.items():
        chosen: dict[str, object] = {"temperature": 1.0, "max_tokens": 12, **changes}
        ended = await _survives(driver, request(fast_subject.prompt(91), **chosen))  # type: ignore[arg-type]
        assert ended in ("STOP", "LENGTH"), name
    (after,) = await driver.run(request(plain, max_tokens=8))
    assert after.token_ids == reference.token_ids


async def _same_after(driver: Driver, *odd: EngineRequest) -> list[str]:
    """Run requests and return how each request ended.

    Checks that a plain request has the same tokens before and after these requests.
    """
    plain = driver.subject.prompt(90)
    (before,) = await driver.run(request(plain, max_tokens=8))
    ended = [await _survives(driver, odd_request) for odd_request in odd]
    (after,) = await driver.run(request(plain, max_tokens=8))
    assert after.token_ids == before.token_ids
    return ended


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_stop_ids_at_their_bound(fast_subject: Subject, llama_folder: Path, temperature: float) -> None:
    """A request with the allowed number of stop ids runs, and a request with one more is refused.

    With `min_tokens`, fewer stop ids are allowed.
    """
    eos = set(json.loads((llama_folder / "generation_config.json").read_text())["eos_token_id"])
    others = [token for token in EVERY_TOKEN if token not in eos]
    most = MAX_STOP_TOKEN_IDS_AFTER_MIN - len(eos)

    def stopping(ids: Sequence[int], **changes: int) -> EngineRequest:
        odd: dict[str, object] = {"temperature": temperature, "max_tokens": 5, "stop_token_ids": tuple(ids), **changes}
        return request(fast_subject.prompt(91), **odd)  # type: ignore[arg-type]

    ended = await _same_after(
        Driver(fast_subject),
        stopping(others[:most], min_tokens=5),
        stopping([*eos, *others[:most]], min_tokens=5),
        stopping(others[: most + 1], min_tokens=5),
        stopping(MOST_STOPS),
        stopping((*MOST_STOPS, 300)),
    )
    assert set(ended[:2]) <= {"STOP", "LENGTH"}
    assert ended[2:] == ["stop_token_ids", "STOP", "stop_token_ids"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_no_token_is_left(fast_subject: Subject, llama_folder: Path, temperature: float) -> None:
    """A request ends in an error if its grammar allows only stop tokens while `min_tokens` still forbids them.

    The engine keeps running.
    """
    tokenizer = Tokenizer.from_file(str(llama_folder / "tokenizer.json"))
    allowed = tuple(tokenizer.token_to_id(letter) for letter in "ab")
    assert None not in allowed
    odd = request(
        fast_subject.prompt(91),
        max_tokens=5,
        temperature=temperature,
        stop_token_ids=allowed,
        min_tokens=5,
        grammar=Grammar("choice", ("a", "b")),
    )
    assert await _same_after(Driver(fast_subject), odd) == ["ERROR"]


@pytest.mark.thorough
async def test_odd_grammars_do_no_harm(fast_subject: Subject) -> None:
    """A plain request gets the same tokens beside a request with an odd grammar as alone."""
    driver, plain = Driver(fast_subject), fast_subject.prompt(92)
    (reference,) = await driver.run(request(plain, max_tokens=16))
    for grammar in odd_grammars():
        beside = await driver.submit(request(plain, max_tokens=16))
        await _survives(driver, request(fast_subject.prompt(93), max_tokens=8, grammar=grammar, ignore_eos=False))
        await driver.until(lambda beside=beside: driver.answers[beside].finish is not None)  # type: ignore[misc]
        assert driver.answers[beside].token_ids == reference.token_ids, grammar
    await driver.empty()


FORGED: dict[str, tuple[int, ...]] = {
    "one": (300,),
    "special tokens": (0, 1, 2, 255, 256),
    "the whole vocabulary": EVERY_TOKEN,
    "the same for long": (301,) * 700,
}


@pytest.mark.parametrize("name", FORGED)
async def test_emitted_tokens_that_nobody_emitted(fast_subject: Subject, name: str) -> None:
    """A resumed request with forged emitted token ids does not harm the engine, with or without a grammar. It is
    refused, or it runs to its end.

    A request that runs at the same time keeps its own tokens.
    """
    driver, plain, emitted = Driver(fast_subject), fast_subject.prompt(96), FORGED[name]
    (reference,) = await driver.run(request(plain, max_tokens=16))
    for number, grammar in enumerate((*odd_grammars()[:3], Grammar("json_object", ""), Grammar("regex", "[a-z]+"))):
        shaping = EXTREMES["grammar, penalties, seed and logprobs"] | {"grammar": grammar}
        for changes in (shaping, shaping | {"grammar": None}, {"grammar": grammar}):
            beside = await driver.submit(request(plain, max_tokens=16))
            forged = request(
                fast_subject.prompt(97),
                max_tokens=len(emitted) + 4,
                emitted_token_ids=emitted,
                ignore_eos=bool(number % 2),
                **changes,
            )
            await _survives(driver, forged)
            await driver.until(lambda beside=beside: driver.answers[beside].finish is not None)  # type: ignore[misc]
            assert driver.answers[beside].token_ids == reference.token_ids
    await driver.empty()


@pytest.mark.parametrize("emitted", [(300, -1), (300, 768), (1 << 70,)])
async def test_emitted_tokens_outside_the_vocabulary(fast_subject: Subject, emitted: tuple[int, ...]) -> None:
    """A request with emitted token ids outside the vocabulary is refused before vLLM gets it. The error names the field
    `emitted_token_ids`."""
    with pytest.raises(EngineRefused) as refusal:
        await fast_subject.engine.submit(request(fast_subject.prompt(97), emitted_token_ids=emitted))
    assert _well_refused(refusal.value) == "emitted_token_ids"


async def test_prompts_at_the_edge_of_the_context(fast_subject: Subject) -> None:
    """For the longest allowed prompt, one token is generated. A prompt with one more token is refused, and the error
    has the length of the prompt and the context length."""
    driver, context = Driver(fast_subject), fast_subject.info.max_model_len
    (answer,) = await driver.run(request(fast_subject.prompt(94, tokens=context - 1), max_tokens=50))
    assert len(answer.token_ids) == 1
    with pytest.raises(EngineRefused, match=rf"{context} tokens .* {context}") as refusal:
        await driver.submit(request(fast_subject.prompt(94, tokens=context), max_tokens=1))
    assert refusal.value.reason == "CONTEXT_LENGTH_EXCEEDED"


class Chance:
    """A source of random requests from a seed. A third of the values are out of bounds."""

    def __init__(self, seed: int, subject: Subject) -> None:
        self.random = random.Random(seed)
        self.subject = subject

    def sampling(self) -> Sampling:
        """Return sampling parameters, some with random values."""
        pick = self.random.choice
        odd = (float("nan"), float("inf"), -float("inf"), -1.0, 1e300, -1e300)
        token = (0, 1, 300, 767, 768, -1, 1 << 31, -(1 << 63), 1 << 70)
        values: dict[str, list[object]] = {
            "temperature": [0.0, 0.3, 1.0, 2.0, *odd],
            "top_p": [0.1, 0.9, 1.0, 0.0, 1.1, *odd],
            "min_p": [0.0, 0.2, 1.0, *odd],
            "top_k": [0, 1, 5, 768, 1 << 40, -1, -2, 1 << 70],
            "frequency_penalty": [0.0, 2.0, -2.0, *odd],
            "presence_penalty": [0.0, 2.0, -2.0, *odd],
            "repetition_penalty": [1.0, 0.5, 2.0, 0.0, 1e-46, *odd],
            "seed": [None, 0, 7, -5, (1 << 63) - 1, 1 << 63, 1 << 70],
            "min_tokens": [0, 1, 4, 13, -1, 1 << 70],
            "max_tokens": [1, 4, 12, 0, -1, 1 << 70],
            "logprobs": [None, 0, 1, 20, 21, -1, 768, 1 << 40],
            "stop_token_ids": [(), (pick(token),), (300, pick(token)), EVERY_TOKEN, EVERY_TOKEN * 2],
            "logit_bias": [{}, {pick(token): 5.0}, {300: pick((*odd, 100.0))}, dict.fromkeys(EVERY_TOKEN, 1.0)],
            "ignore_eos": [True, False],
            "grammar": [None, None, pick(odd_grammars())],
        }
        chosen = self.random.sample(sorted(values), self.random.randint(0, 3))
        sampling: dict[str, object] = {"max_tokens": 6} | {name: pick(values[name]) for name in chosen}
        return Sampling(**sampling)  # type: ignore[arg-type]

    def request(self) -> EngineRequest:
        """Return a request with random sampling parameters. Sometimes the prompt and other fields have unusual or
        invalid values."""
        pick = self.random.choice
        prompt = self.subject.prompt(self.random.randrange(10**6), tokens=pick([1, 2, 31, 32, 33, 127, 129, 300]))
        if self.random.random() < 0.1:
            prompt = (*prompt, pick([-1, 768, 1 << 40, 0, 767]))
        base = request(prompt)
        salt, priority, adapter = (
            pick(["", "a", "\x00", "é" * 300]),
            pick([0, 1, -5, 1 << 62, 1 << 70]),
            pick(["", "", "x"]),
        )
        return dataclasses.replace(
            base,
            sampling=self.sampling(),
            emitted_token_ids=self.emitted(),
            cache_salt=salt,
            priority=priority,
            adapter=adapter if priority else "",
        )

    def emitted(self) -> tuple[int, ...]:
        """Return emitted ids: mostly none, otherwise forged ones, some of them outside the vocabulary."""
        if self.random.random() < 0.6:
            return ()
        odd = self.random.choice([(), (), (), (-1,), (768,), (1 << 40,), (0, 767)])
        return (*self.subject.prompt(self.random.randrange(10**6), tokens=self.random.choice([1, 2, 5, 11])), *odd)


FIRST, SEEDS = int(os.environ.get("KILLERS_FIRST", "0")), int(os.environ.get("KILLERS_SEEDS", "4"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
async def test_random_requests_in_crowds(fast_subject: Subject, seed: int) -> None:
    """Many random requests run at once, and some are aborted. Each of the others is refused or runs to its end. A
    reference request among them gets the same tokens as when it runs alone."""
    driver, plain, chance = Driver(fast_subject), fast_subject.prompt(95), Chance(seed, fast_subject)
    (reference,) = await driver.run(request(plain, max_tokens=8))
    taken = refusals = 0
    rounds = 0
    while rounds < 16 or min(taken, refusals) < 20:
        rounds += 1
        assert rounds <= 64, "too few requests are taken, or refused, to show anything"
        ids = [await driver.submit(request(plain, max_tokens=8))]
        crowd = await asyncio.gather(*(driver.submit(chance.request()) for _ in range(12)), return_exceptions=True)
        for result in crowd:
            if isinstance(result, str):
                ids.append(result)
            else:
                assert isinstance(result, EngineRefused), repr(result)
                refusals += 1
        await driver.abort(dropped := set(ids[1::4]))
        rest = [request_id for request_id in ids if request_id not in dropped]
        await driver.until(lambda rest=rest: all(driver.answers[i].finish is not None for i in rest))  # type: ignore[misc]
        assert driver.answers[ids[0]].token_ids == reference.token_ids
        taken += len(ids) - 1
    await driver.empty()
