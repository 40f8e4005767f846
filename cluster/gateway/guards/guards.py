"""A tenant's guards at work: on a call's prompt before it is tokenized, on its outputs as they come, and in the books.

Each guard has its time (`timeout_s`) and says what its failure means (`fail`): closed, the call is refused or the
output ends; open, everything passes that guard. Decisions are counted as they are made and audited at the call's end,
one event for each guard and outcome, without the text unless the tenant's policy says `log_prompts`.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.gateway.calls.request import ChatPrompt, IdsPrompt, PackedPrompt, Prompt
from cluster.gateway.guards.files import PatternFiles
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

log = structlog.get_logger("guards")

T = TypeVar("T")

ELSEWHERE_CHARS = 4096
"""Longer prompts are filtered in a thread; the search works outside the interpreter's lock."""
MAX_SHOWN = 10
"""Texts of one audit event, where a policy lets them be kept."""
_DONE = {"redact": "redacted", "refuse": "refused", "flag": "flagged"}

Audit = Callable[["GuardDecision"], None]


@dataclass(frozen=True, slots=True)
class GuardDecision:
    """What one guard has done to one call. `found`: how often by name; `texts` only where the policy keeps them."""

    tenant: str
    model: str
    request_id: str
    actor: str
    guard: str
    outcome: str
    found: dict[str, int]
    texts: tuple[str, ...]


class Guards:
    """What the guards of all calls share: files of patterns, connections to guard servers, counters."""

    def __init__(
        self,
        metrics: Metrics,
        audit: Audit = lambda decided: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = PatternFiles()
        self.servers = GuardServers()
        self._metrics = metrics
        self._audit = audit
        self.clock = clock

    def check(self, policies: Sequence[TenantPolicy]) -> None:
        """Read the pattern files of declared tenants. Raises ValueError that names the setting."""
        for policy in policies:
            for number, rule in enumerate(policy.guards):
                if rule.patterns_file:
                    try:
                        self._files.get(rule.patterns_file)
                    except PatternError as error:
                        where = f"tenants[{policy.name}].guards[{number}].patterns_file"
                        raise ValueError(f"{where}: {error.remedy}") from None

    def of(self, policy: TenantPolicy, model: str, request_id: str, actor: str) -> CallGuards:
        """Those of one call."""
        return CallGuards(self, policy, model, request_id, actor)

    def patterns(self, rule: GuardRule) -> Patterns:
        """A rule's patterns, as they are now. Raises PatternError."""
        return self._files.get(rule.patterns_file) if rule.patterns_file else patterns_of(tuple(rule.patterns.items()))

    def decided(self, decided: GuardDecision) -> None:
        """Count and audit."""
        by = sum(decided.found.values())
        self._metrics.count("guard_actions_total", decided.tenant, decided.guard, decided.outcome, by=by)
        self._audit(decided)

    async def close(self) -> None:
        """End the connections."""
        await self.servers.close()


class CallGuards:
    """One call's guards."""

    def __init__(self, shared: Guards, policy: TenantPolicy, model: str, request_id: str, actor: str) -> None:
        self._shared = shared
        self._policy = policy
        self._model = model
        self._request_id = request_id
        self._actor = actor
        self._inputs = [rule for rule in policy.guards if rule.on == "input"]
        self._outputs = [rule for rule in policy.guards if rule.on == "output"]
        self._found: dict[tuple[str, str], Counter[str]] = {}
        self._texts: dict[tuple[str, str], list[str]] = {}

    def close(self) -> None:
        """The call is over: its decisions are told."""
        for (guard, outcome), found in self._found.items():
            texts = tuple(self._texts.get((guard, outcome), ()))
            self._shared.decided(
                GuardDecision(
                    self._policy.name, self._model, self._request_id, self._actor, guard, outcome, dict(found), texts
                )
            )
        self._found.clear()

    # ---- input

    async def prompt(self, prompt: Prompt, text: TextModel) -> Prompt:
        """The prompt as the model may see it; itself where nothing is to be changed. Raises CallError, GUARD_REFUSED
        where it may not be seen at all."""
        if not self._inputs:
            return prompt
        if not isinstance(prompt, IdsPrompt):
            plain = await asyncio.to_thread(prompt.unpacked) if isinstance(prompt, PackedPrompt) else prompt
            texts = texts_of(plain)
            kept = await self._input(texts, plain)
            return prompt if kept == texts else with_texts(plain, kept)
        shown = await _elsewhere(
            len(prompt.token_ids), lambda: text.decode(prompt.token_ids, skip_special_tokens=False)
        )
        (only,) = await self._input([shown], prompt)
        if only == shown:
            return prompt
        ids: array[int] = await _elsewhere(len(only), lambda: text.plain_ids(only))
        return replace(prompt, token_ids=tuple(ids))

    async def _input(self, texts: Sequence[str], prompt: Prompt) -> Sequence[str]:
        field = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
        for rule in self._inputs:
            try:
                async with asyncio.timeout(rule.timeout_s):
                    texts = await self._through(rule, texts, prompt, field)
            except CallError:
                raise
            except UnicodeEncodeError:
                raise invalid(
                    field, "the text is not valid Unicode (a lone surrogate): send well-formed text"
                ) from None
            except Exception as error:
                if not self._failed(rule, error):
                    raise _refusal(field, f"the guard {_name(rule)} could not decide; try again later") from None
        return texts

    async def _through(self, rule: GuardRule, texts: Sequence[str], prompt: Prompt, field: str) -> Sequence[str]:
        """The texts behind one guard."""
        if rule.address:
            answer = await self._shared.servers.check(rule, self._policy.name, self._model, self._request_id, texts)
            if answer.outcome:
                self._note(rule, answer.outcome, answer.finding)
            if answer.outcome == "refused":
                raise _refusal(field, f"the guard server has found {answer.finding}; take it out of the prompt")
            return answer.texts
        if rule.builtin == "sizes":
            self._sizes(rule, sum(map(len, texts)), messages_of(prompt), field)
            return texts
        patterns = self._shared.patterns(rule)
        found = _Findings()

        def search() -> tuple[list[str], str]:
            out = []
            for text in texts:
                stage = PatternStage(patterns, rule.action, found.add)
                out.append(filtered(stage, text))
                if stage.refused:
                    return out, stage.refused
            return out, ""

        try:
            kept, refused = await _elsewhere(sum(map(len, texts)), search)
        finally:
            found.over = True
        for name, count in found.counts.items():
            self._note(rule, _DONE[rule.action], name, count=count)
        self._show(rule, _DONE[rule.action], found.shown)
        if refused:
            raise _refusal(field, f"the guard patterns has found {refused}; take it out of the prompt")
        return kept

    def _sizes(self, rule: GuardRule, characters: int, messages: int, field: str) -> None:
        for name, bound, has in (
            ("max_characters", rule.max_characters, characters),
            ("max_messages", rule.max_messages, messages),
        ):
            if bound is None or has <= bound:
                continue
            self._note(rule, _DONE[rule.action], name)
            if rule.action == "refuse":
                unit = name.removeprefix("max_")
                raise _refusal(field, f"the guard sizes allows {bound} {unit}, the prompt has {has}; shorten it")

    # ---- output

    def output(
        self, detokenizer: Detokenizer, logprobs: LogprobTexts | None
    ) -> tuple[Detokenizer | GuardedText, LogprobSource | None]:
        """What stands in the place of an output's detokenizer and log probabilities. Raises CallError."""
        stages: list[GuardStage] = []
        rules: list[GuardRule] = []
        for rule in self._outputs:
            try:
                stages.append(self._stage(rule))
                rules.append(rule)
            except PatternError as error:
                if not self._failed(rule, error):
                    raise _refusal("", f"the guard {_name(rule)} cannot work; tell the operator") from None
        if not stages:
            return detokenizer, logprobs
        chain = GuardChain(
            stages,
            [rule.timeout_s for rule in rules],
            lambda number, error: self._failed(rules[number], error),
            self._shared.clock,
        )
        text = GuardedText(detokenizer, chain)
        return text, None if logprobs is None else GuardedLogprobs(logprobs, text)

    def _stage(self, rule: GuardRule) -> GuardStage:
        def told(name: str, match: str) -> None:
            self._note(rule, _DONE[rule.action], name, match)

        if rule.max_characters is not None:
            return SizeStage(rule.max_characters, rule.action, told)
        return PatternStage(self._shared.patterns(rule), rule.action, told)

    # ---- both

    def _failed(self, rule: GuardRule, error: Exception) -> bool:
        """Note a failure. Whether everything passes this guard now."""
        fails_open = rule.fail == "open"
        why = str(error) if isinstance(error, ValueError | OSError) else type(error).__name__
        log.warning("guard_failed", tenant=self._policy.name, guard=_name(rule), request_id=self._request_id, error=why)
        self._note(rule, "failed_open" if fails_open else "failed_closed", "failure")
        return fails_open

    def _note(self, rule: GuardRule, outcome: str, name: str, text: str = "", count: int = 1) -> None:
        self._found.setdefault((_name(rule), outcome), Counter())[name] += count
        if text:
            self._show(rule, outcome, [text])

    def _show(self, rule: GuardRule, outcome: str, texts: Sequence[str]) -> None:
        """Keep the first texts that were found, where the policy allows it."""
        if texts and self._policy.log_prompts:
            shown = self._texts.setdefault((_name(rule), outcome), [])
            shown += texts[: max(MAX_SHOWN - len(shown), 0)]


class _Findings:
    """What a search in a thread has found: how often by name, and the first texts."""

    def __init__(self) -> None:
        self.over = False
        """Nobody waits for the search any longer: it is to end."""
        self.counts: Counter[str] = Counter()
        self.shown: list[str] = []

    def add(self, name: str, text: str) -> None:
        """Called in the thread. Raises TimeoutError once the search is over."""
        if self.over:
            raise TimeoutError
        self.counts[name] += 1
        if text and len(self.shown) < MAX_SHOWN:
            self.shown.append(text)


def _name(rule: GuardRule) -> str:
    """As metrics and audit name a guard; where a guard server is nobody is told."""
    return f"{rule.on}_{rule.builtin or 'server'}"


def _refusal(field: str, message: str) -> CallError:
    violations = [Violation(field, message)] if field else []
    return CallError(Outcome.GUARD_REFUSED, message, violations=violations)


async def _elsewhere(size: int, work: Callable[[], T]) -> T:
    """Do it here when it is little, else in a thread."""
    return work() if size <= ELSEWHERE_CHARS else await asyncio.to_thread(work)
