"""The text of the detokenizer equals the text of vLLM exactly, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway.text.kinds import Kind, token_ids
from tests.support.cpu import cpu_within

LAW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def vllm_detokenizer(kind: Kind, prompt: Sequence[int], **params: Any) -> Any:
    """Return vLLM's own detokenizer for a request with this prompt. `params`: sampling parameters of the request."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=list(prompt),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=4096, **params),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return FastIncrementalDetokenizer(kind.theirs, request)


def run_both(
    kind: Kind, prompt: list[int], steps: list[list[int]], takes: list[bool], stop_terminated: bool, **params: Any
) -> None:
    """Push the same steps into Headrace's detokenizer and vLLM's. Compare their texts, stop strings and token counts
    after each step."""
    theirs = vllm_detokenizer(kind, prompt, **params)
    ours = kind.ours.detokenizer(prompt, **params)
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        ended = last and stop_terminated and bool(step)
        stopped = theirs.update(list(step), ended)
        assert ours.push(step, ended) == stopped
        assert ours.token_ids == theirs.output_token_ids
        finished = last or stopped is not None
        if finished or takes[number % len(takes)]:
            assert ours.pop_text(finished) == theirs.get_next_output_text(finished, delta=True)
        if finished:
            break


@LAW
@given(data=st.data())
@pytest.mark.slow
def test_equals_vllm(kind: Kind, data: st.DataObject) -> None:
    """For any prompt and any token ids in steps of any size, the text, the stop string and the token count after every
    step equal those of vLLM."""
    prompt = data.draw(token_ids(kind), label="prompt")
    if data.draw(st.booleans(), label="long prompt"):
        prompt = [*kind.sample_ids[:150], *prompt]
    ids = data.draw(token_ids(kind, beyond_vocabulary=True), label="ids")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)), label="cuts"))
    steps = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    text = kind.theirs.decode(ids, skip_special_tokens=True)
    stops = st.text(max_size=3)
    if text:
        stops |= st.integers(0, len(text) - 1).flatmap(lambda i: st.integers(1, 8).map(lambda n: text[i : i + n]))
    run_both(
        kind,
        prompt,
        steps,
        data.draw(st.lists(st.booleans(), min_size=1, max_size=4), label="takes"),
        data.draw(st.booleans(), label="stop terminated"),
        stop=data.draw(st.lists(stops.filter(bool), max_size=3), label="stop"),
        min_tokens=data.draw(st.integers(0, 6), label="min tokens"),
        skip_special_tokens=data.draw(st.booleans(), label="skip special tokens"),
    )


@settings(LAW, max_examples=100)
@given(data=st.data())
@pytest.mark.slow
def test_long_prompts_prime_by_their_tail(kind: Kind, data: st.DataObject) -> None:
    """For a long prompt, only the tail is decoded before the output. The output's text is the same as with the whole
    prompt, whatever tokens the tail contains."""
    tail = [t for part in data.draw(st.lists(token_ids(kind), min_size=3, max_size=8), label="tail") for t in part]
    prompt = [*kind.sample_ids[:200], *tail]
    steps = [[token_id] for token_id in data.draw(token_ids(kind), label="ids")]
    skip = data.draw(st.booleans(), label="skip special tokens")
    run_both(kind, prompt, steps, [True], False, skip_special_tokens=skip)


@pytest.mark.parametrize("family", ["mistral", "llama2"])
def test_tails_that_do_not_prime(kinds: dict[str, Kind], family: str) -> None:
    """Normally only the last tokens of a prompt, its tail, are decoded. The whole prompt is decoded if the tail has no
    text, or if an earlier invalid byte makes the bytes of the tail invalid too."""
    kind = kinds[family]
    byte = kind.theirs.convert_tokens_to_ids
    emoji = [byte(f"<0x{b:02X}>") for b in "🎉".encode()]
    space = byte("\u2581")
    spoilt = [*kind.sample_ids[:20], byte("<0xFF>"), *emoji * 40]
    silent = [*kind.sample_ids[:20], space, *[kind.theirs.eos_token_id] * 95]
    hello = kind.theirs.encode("Hello 🎉 there", add_special_tokens=False)
    for prompt in (spoilt, silent):
        for ids in (hello, [*emoji[:2], *hello], [space, *hello]):
            run_both(kind, prompt, [[token_id] for token_id in ids], [True], False)


def test_text_is_whole_again(kind: Kind) -> None:
    """Every sample text is restored token by token, with all characters and the first space."""
    from tests.support.corpus import SAMPLES

    prompt = kind.ours.codec.encode_prompt("Once upon a time")
    for text in SAMPLES:
        ids = kind.theirs.encode("Once upon a time " + text, add_special_tokens=True)[len(prompt) :]
        detokenizer = kind.ours.detokenizer(prompt)
        pieces = []
        for token_id in ids:
            detokenizer.push([token_id])
            pieces.append(detokenizer.pop_text(False))
        pieces.append(detokenizer.pop_text(True))
        assert "".join(pieces).strip() == text.strip()
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", [[], ["river"]])
def test_tokens_without_text_cost_no_more_the_more_there_are(kind: Kind, stop: list[str]) -> None:
    """A call that ends in thousands of special tokens or broken characters takes little CPU time."""
    for token_id in (kind.special_ids[0], kind.byte_ids[0], len(kind.theirs) + 1):
        detokenizer = kind.ours.detokenizer(list(kind.sample_ids[:20]), stop=stop)
        with cpu_within(1.5):
            for _ in range(12_000):
                detokenizer.push([token_id])


def test_a_character_that_never_ends_comes_out_with_the_others(kind: Kind) -> None:
    """For bytes that never complete a character, the pieces of the detokenizer add up to the text that the tokenizer's
    own decoder returns. No piece is long."""
    first = kind.theirs.encode("Once", add_special_tokens=False)
    for broken, special in [(10, 3), (70, 0), (500, 7)]:
        ids = [*[kind.byte_ids[0]] * broken, *[kind.special_ids[0]] * special, *kind.sample_ids[:30]]
        detokenizer = kind.ours.detokenizer(first)
        pieces = []
        for token_id in ids:
            detokenizer.push([token_id])
            pieces.append(detokenizer.pop_text(False))
        pieces.append(detokenizer.pop_text(True))
        whole = kind.theirs.decode([*first, *ids], skip_special_tokens=True)
        assert kind.theirs.decode(first) + "".join(pieces) == whole
        assert max(map(len, pieces)) < 300


def test_holds_back_what_may_begin_a_stop_string(kinds: dict[str, Kind]) -> None:
    """The detokenizer holds back up to len(stop) - 1 characters. It returns them at the end if the stop string never
    comes."""
    kind = kinds["llama"]
    detokenizer = kind.ours.detokenizer([0], stop=["river bank"])
    assert detokenizer.push(kind.theirs.encode("the river", add_special_tokens=False)) is None
    assert detokenizer.pop_text(False) == ""
    assert detokenizer.push(kind.theirs.encode(" turns", add_special_tokens=False)) is None
    assert detokenizer.pop_text(False) == "the ri"
    assert detokenizer.pop_text(True) == "ver turns"


def test_tokens_after_a_stop_string_do_not_count(kinds: dict[str, Kind]) -> None:
    """If a token in a step completes a stop string, the later tokens of the step are dropped from the text and from the
    count."""
    kind = kinds["falcon"]
    ids = kind.theirs.encode("a b c d", add_special_tokens=False)
    detokenizer = kind.ours.detokenizer([], stop=[" b"])
    assert detokenizer.push(ids) == " b"
    assert detokenizer.token_ids == ids[:2]
    assert detokenizer.pop_text(True) == "a"


def test_an_empty_stop_string_is_refused(kinds: dict[str, Kind]) -> None:
    """An empty stop string is refused, since it would end every call at once."""
    with pytest.raises(ValueError, match="stop"):
        kinds["llama"].ours.detokenizer([], stop=["x", ""])
