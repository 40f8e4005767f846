"""Pattern searches change only the inputs with matches, take almost no time on the event loop, and end in time."""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster.api.outcomes import CallError
from cluster.gateway.calls.pooling.pooling_request import IdsInputs, InputField
from cluster.gateway.calls.request import Prompt, TextPrompt
from cluster.gateway.guards.decisions import GuardDecision
from cluster.gateway.guards.guards import CallGuards, Guards
from cluster.gateway.text.tokenizer import TextModel
from cluster.observe.metrics import Metrics
from cluster.policy.tenants.policy import GuardRule, TenantPolicy
from cluster.wire.bundle import Bundle
from tests.support.cpu import Steps, slowness

MATCHES = 200_000


def _guards(timeout_s: float, decided: list[GuardDecision]) -> CallGuards:
    rule = GuardRule(builtin="patterns", action="redact", patterns={"mail": "a@b"}, timeout_s=timeout_s)
    policy = TenantPolicy(name="t", guards=(rule,), log_prompts=True)
    return Guards(Metrics("test"), decided.append).for_call(policy, "m", "r", "a", {})


async def test_only_changed_inputs_are_encoded_again(bundle: Bundle) -> None:
    """If a guard changes one input of a pooling request, the other inputs keep their token ids, even ids that the
    tokenizer would not choose for their text."""
    model = TextModel.from_bundle(bundle)
    unusual = [number for letter in "hello there" for number in model.codec.encode_raw(letter)]
    assert unusual != list(model.codec.encode_raw(model.decode(unusual, skip_special_tokens=False)))
    inputs = IdsInputs([unusual, model.codec.encode_raw("mail a@b now"), unusual], InputField("input"))
    guarded = await _guards(60.0, []).inputs(inputs, model)
    assert isinstance(guarded, IdsInputs)
    first, redacted, last = map(list, guarded.token_ids)
    assert first == last == unusual
    assert "a@b" not in model.decode(redacted, skip_special_tokens=False)


@pytest.mark.slow
async def test_matches_are_counted_in_the_search(bundle: Bundle) -> None:
    """The matches in a long prompt are counted in the thread that searches the prompt. The event loop spends almost no
    time on them."""
    model, prompt = TextModel.from_bundle(bundle), TextPrompt("a@b " * MATCHES)
    decided: list[GuardDecision] = []
    guarded: list[Prompt] = []

    async def search() -> None:
        guards = _guards(60.0, decided)
        guarded.append(await guards.prompt(prompt, model))
        guards.close()

    searches = [Steps(search()) for _ in range(3)]  # not the loop's whole time, which other tests' gateways use too
    for steps in searches:
        await steps
    assert min(steps.sum_s for steps in searches) < 0.05 * slowness()
    for kept, decision in zip(guarded, decided, strict=True):
        assert isinstance(kept, TextPrompt)
        assert "a@b" not in kept.text
        assert decision.matches == {"mail": MATCHES}
        assert set(decision.texts) == {"a@b"}


def test_a_search_that_took_too_long_ends(bundle: Bundle) -> None:
    """A search ends at the guard's time limit, and its thread is free again."""

    async def search() -> float:
        guards = _guards(0.05, [])
        with pytest.raises(CallError, match="could not decide"):
            await guards.prompt(TextPrompt("a@b " * (20 * MATCHES)), TextModel.from_bundle(bundle))
        began = time.process_time()
        await asyncio.get_running_loop().shutdown_default_executor()
        return time.process_time() - began

    assert asyncio.run(search()) < 0.5 * slowness()  # a separate event loop, whose threads no other test uses
