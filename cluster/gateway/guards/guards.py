"""Application of a tenant's guards to a call: to the prompt before tokenization, and to the outputs while they stream.

Each guard has a time limit (`timeout_s`) and a failure mode (`fail`). If a guard with the mode `closed` fails, the call
is refused or the output ends. If a guard with the mode `open` fails, the text passes without this guard. At the end of
a call the decisions of the guards are counted and audited, with one event for each guard and outcome. Matched texts are
kept only if the tenant's policy sets `log_prompts`.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.gateway.calls.pooling.pooling_request import IdsInputs, PoolingInputs
from cluster.gateway.calls.request import ChatPrompt, IdsPrompt, PackedPrompt, Prompt
from cluster.gateway.guards.decisions import MAX_AUDIT_TEXTS, GuardDecision, GuardDecisions, guard_name
from cluster.gateway.guards.files import PatternFiles
from cluster.gateway.guards.parts import GuardedParts
from cluster.gateway.guards.prompts import messages_of, texts_of, with_texts
from cluster.gateway.guards.remote import GuardServers
from cluster.gateway.guards.stream import GuardChain, GuardStage, PatternStage, SizeStage, filtered
from cluster.gateway.guards.text import GuardedLogprobs, GuardedText
from cluster.gateway.text.detokenizer import Detokenizer
from cluster.gateway.text.logprobs import LogprobSource, LogprobTexts
from cluster.gateway.text.tokenizer import TextModel
from cluster.observe.metrics import Metrics
from cluster.policy.tenants.patterns import PatternError, Patterns, patterns_of
from cluster.policy.tenants.policy import GuardRule, TenantPolicy

T = TypeVar("T")

THREAD_CHARS = 4096
"""Length in characters above which a prompt is filtered in a thread. The search releases the interpreter lock."""

Audit = Callable[[GuardDecision], None]


class Guards:
    """The state that the guards of all calls share: pattern files, connections to guard servers, counters."""

    def __init__(
        self,
        metrics: Metrics,
        audit: Audit = lambda decision: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = PatternFiles()
        self.servers = GuardServers()
        self._metrics = metrics
        self._audit = audit
        self.clock = clock

    def check(self, policies: Sequence[TenantPolicy]) -> None:
        """Read the pattern files of the configured tenants. Raises ValueError, which names the setting."""
        for policy in policies:
            for number, rule in enumerate(policy.guards):
                if rule.patterns_file:
                    try:
                        self._files.get(rule.patterns_file)
                    except PatternError as error:
                        where = f"tenants[{policy.name}].guards[{number}].patterns_file"
                        raise ValueError(f"{where}: {error.remedy}") from None

    def for_call(
        self, policy: TenantPolicy, model: str, request_id: str, actor: str, log_fields: Mapping[str, str]
    ) -> CallGuards:
        """Return the guards of one call. `actor`: the caller's name in audit events. `log_fields`: fields of log lines
        about the call."""
        decisions = GuardDecisions(policy, model, request_id, actor, log_fields)
        return CallGuards(self, policy, model, request_id, decisions)

    def patterns(self, rule: GuardRule) -> Patterns:
        """Return the current patterns of a rule. Raises PatternError."""
        return self._files.get(rule.patterns_file) if rule.patterns_file else patterns_of(tuple(rule.patterns.items()))

    def record_decision(self, decision: GuardDecision) -> None:
        """Count a decision and write it to the audit log."""
        by = sum(decision.matches.values())
        self._metrics.count("guard_actions_total", decision.tenant, decision.guard, decision.outcome, by=by)
        self._audit(decision)

    async def close(self) -> None:
        """Close the connections to guard servers."""
        await self.servers.close()


class CallGuards:
    """The guards of one call."""

    def __init__(
        self, shared: Guards, policy: TenantPolicy, model: str, request_id: str, decisions: GuardDecisions
    ) -> None:
        """`decisions`: the record to which the guards add their decisions."""
        self._shared = shared
        self._policy = policy
        self._model = model
        self._request_id = request_id
        self._decisions = decisions
        self._inputs = [rule for rule in policy.guards if rule.on == "input"]
        self._outputs = [rule for rule in policy.guards if rule.on == "output"]

    def close(self) -> None:
        """Count and audit the decisions about the call, at the end of the call."""
        for decision in self._decisions.pop_all():
            self._shared.record_decision(decision)

    # ---- input

    async def prompt(self, prompt: Prompt, text: TextModel) -> Prompt:
        """Apply the input guards to a prompt. Returns the filtered prompt, or the same object if nothing changes. If a
        guard refuses the prompt, raises CallError with the outcome GUARD_REFUSED."""
        if not self._inputs:
            return prompt
        if not isinstance(prompt, IdsPrompt):
            plain = await asyncio.to_thread(prompt.unpacked) if isinstance(prompt, PackedPrompt) else prompt
            texts = texts_of(plain)
            kept = await self._check_texts(texts, plain)
            return prompt if kept == texts else with_texts(plain, kept)
        decoded = await _run_by_size(
            len(prompt.token_ids), lambda: text.decode(prompt.token_ids, skip_special_tokens=False)
        )
        (filtered_text,) = await self._check_texts([decoded], prompt)
        if filtered_text == decoded:
            return prompt
        ids: array[int] = await _run_by_size(len(filtered_text), lambda: text.codec.encode_raw(filtered_text))
        return replace(prompt, token_ids=tuple(ids))

    async def inputs(self, inputs: PoolingInputs, text: TextModel) -> PoolingInputs:
        """Apply the input guards to the inputs of a pooling request. Returns the filtered inputs, or the same object if
        nothing changes. Inputs of token ids whose text does not change keep their ids. If a guard refuses an input,
        raises CallError with the outcome GUARD_REFUSED."""
        if not self._inputs:
            return inputs
        texts = await _texts_of_inputs(inputs, text)
        kept = await self._check_texts(texts, None, inputs.fields)
        if kept == texts:
            return inputs
        if not isinstance(inputs, IdsInputs):
            return inputs.with_texts(kept)
        ids = list(inputs.token_ids)
        changed = [i for i, (before, after) in enumerate(zip(texts, kept, strict=True)) if before != after]
        size = sum(len(kept[i]) for i in changed)
        encoded = await _run_by_size(size, lambda: [text.codec.encode_raw(kept[i]) for i in changed])
        for i, new in zip(changed, encoded, strict=True):
            ids[i] = new
        return IdsInputs(ids, inputs.field)

    async def _check_texts(self, texts: Sequence[str], prompt: Prompt | None, field: str = "") -> Sequence[str]:
        """Apply all input guards to texts and return the filtered texts. `prompt`: the prompt that holds the texts;
        None for the inputs of a pooling request. `field`: the request field that errors name; by default the field of
        the prompt."""
        field = field or ("messages" if isinstance(prompt, ChatPrompt) else "prompt")
        for rule in self._inputs:
            try:
                async with asyncio.timeout(rule.timeout_s):
                    texts = await self._apply(rule, texts, prompt, field)
            except CallError:
                raise
            except UnicodeEncodeError:
                raise invalid(
                    field, "the text is not valid Unicode (a lone surrogate): send well-formed text"
                ) from None
            except Exception as error:
                if not self._decisions.add_failure(rule, error):
                    raise _refusal(field, f"the guard {guard_name(rule)} could not decide; try again later") from None
        return texts

    async def _apply(self, rule: GuardRule, texts: Sequence[str], prompt: Prompt | None, field: str) -> Sequence[str]:
        """Apply one guard to the texts of a prompt. Returns the filtered texts. Raises CallError if the guard refuses
        the prompt."""
        if rule.address:
            answer = await self._shared.servers.check(rule, self._policy.name, self._model, self._request_id, texts)
            if answer.outcome:
                self._decisions.add_outcome(rule, answer.outcome, answer.finding)
            if answer.outcome == "refused":
                raise _refusal(field, f"the guard server found {answer.finding}; remove it from the prompt")
            return answer.texts
        if rule.builtin == "sizes":
            self._sizes(rule, sum(map(len, texts)), messages_of(prompt), field)
            return texts
        patterns = self._shared.patterns(rule)
        findings = _Findings()

        def search() -> tuple[list[str], str]:
            out = []
            for text in texts:
                stage = PatternStage(patterns, rule.action, findings.add)
                out.append(filtered(stage, text))
                if stage.refused:
                    return out, stage.refused
            return out, ""

        try:
            kept, refused = await _run_by_size(sum(map(len, texts)), search)
        finally:
            findings.cancelled = True
        self._decisions.add_matches(rule, findings.counts, findings.texts)
        if refused:
            raise _refusal(field, f"the guard patterns found {refused}; remove it from the prompt")
        return kept

    def _sizes(self, rule: GuardRule, characters: int, messages: int, field: str) -> None:
        for name, bound, size in (
            ("max_characters", rule.max_characters, characters),
            ("max_messages", rule.max_messages, messages),
        ):
            if bound is None or size <= bound:
                continue
            self._decisions.add_matches(rule, {name: 1})
            if rule.action == "refuse":
                unit = name.removeprefix("max_")
                raise _refusal(field, f"the guard sizes allows {bound} {unit}, the prompt has {size}; shorten it")

    # ---- output

    def output(
        self, detokenizer: Detokenizer, logprobs: LogprobTexts | None
    ) -> tuple[Detokenizer | GuardedText, LogprobSource | None]:
        """Wrap the detokenizer and the log probabilities of a sequence in the output guards. Raises CallError if a
        guard cannot work and its failure mode is `closed`."""
        stages = self._stages()
        if not stages:
            return detokenizer, logprobs
        text = GuardedText(detokenizer, self._chain(stages))
        return text, None if logprobs is None else GuardedLogprobs(logprobs, text)

    def parts(self) -> GuardedParts | None:
        """Return the output guards for a sequence whose output the worker parses into parts; None if the call has no
        output guards. Raises CallError if a guard cannot work and its failure mode is `closed`."""
        first = self._stages()
        if not first:
            return None

        def new_chain() -> GuardChain:
            """Return the guards of a new channel (content, reasoning or the arguments of a tool call). A size limit
            counts the characters of all channels together. The search for patterns begins anew with each channel."""
            return self._chain(
                [(rule, stage if isinstance(stage, SizeStage) else self._stage(rule)) for rule, stage in first]
            )

        return GuardedParts(new_chain)

    def _stages(self) -> list[tuple[GuardRule, GuardStage]]:
        """Return the output guards, each with a new filter. A guard that cannot work is left out if it fails open;
        otherwise CallError is raised."""
        stages: list[tuple[GuardRule, GuardStage]] = []
        for rule in self._outputs:
            try:
                stages.append((rule, self._stage(rule)))
            except PatternError as error:
                if not self._decisions.add_failure(rule, error):
                    raise _refusal("", f"the guard {guard_name(rule)} cannot work; tell the operator") from None
        return stages

    def _chain(self, stages: Sequence[tuple[GuardRule, GuardStage]]) -> GuardChain:
        return GuardChain(
            [stage for _, stage in stages],
            [rule.timeout_s for rule, _ in stages],
            lambda number, error: self._decisions.add_failure(stages[number][0], error),
            self._shared.clock,
        )

    def _stage(self, rule: GuardRule) -> GuardStage:
        def on_decision(name: str, match: str) -> None:
            self._decisions.add_matches(rule, {name: 1}, [match] if match else ())

        if rule.max_characters is not None:
            return SizeStage(rule.max_characters, rule.action, on_decision)
        return PatternStage(self._shared.patterns(rule), rule.action, on_decision)


class _Findings:
    """The matches of a search that runs in a thread: the number of matches, keyed by the name of the pattern, and the
    first matched texts."""

    def __init__(self) -> None:
        self.cancelled = False
        """Whether the caller has stopped waiting. If so, the search ends at the next match."""
        self.counts: Counter[str] = Counter()
        self.texts: list[str] = []

    def add(self, name: str, text: str) -> None:
        """Add a match. Called in the thread of the search. Raises TimeoutError once the search is cancelled."""
        if self.cancelled:
            raise TimeoutError
        self.counts[name] += 1
        if text and len(self.texts) < MAX_AUDIT_TEXTS:
            self.texts.append(text)


async def _texts_of_inputs(inputs: PoolingInputs, text: TextModel) -> list[str]:
    """Return the texts of the inputs of a pooling request; token ids are decoded."""
    if not isinstance(inputs, IdsInputs):
        return await _run_by_size(inputs.chars, lambda: list(inputs.all_texts))
    size = sum(map(len, inputs.token_ids))
    return await _run_by_size(size, lambda: [text.decode(ids, skip_special_tokens=False) for ids in inputs.token_ids])


def _refusal(field: str, message: str) -> CallError:
    violations = [Violation(field, message)] if field else []
    return CallError(Outcome.GUARD_REFUSED, message, violations=violations)


async def _run_by_size(size: int, work: Callable[[], T]) -> T:
    """Run `work` on the event loop if `size` is small, else in a thread. `size`: the number of characters or tokens
    that `work` processes."""
    return work() if size <= THREAD_CHARS else await asyncio.to_thread(work)
