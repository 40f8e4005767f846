"""Output guards as filters of a stream: text goes in as it comes, what is decided comes out. No I/O, no clock.

Invariant: for any cut of a text into chunks the outputs together are what the whole text gives, and no character of
a match that is redacted or refused ever comes out. What is held back is what may yet become part of a match: at most
as many characters as the longest pattern has.

Marks travel with the text. A mark is one token and the characters [start, end) that it has brought; it comes out
when its last character is decided, hidden where a redaction has touched one. So log probabilities and counts follow
the text through any number of guards, each of which may make it shorter or longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from cluster.policy.tenants.patterns import Patterns

Action = Literal["refuse", "redact", "flag"]
Told = Callable[[str, str], None]
"""Told of each decision: the pattern's or limit's name, and the text that it is about."""


class GuardMark(NamedTuple):
    """A token, by its number, and the characters that it has brought."""

    start: int
    end: int
    token: int
    hidden: bool = False


class GuardStage(Protocol):
    """One guard's filter. `refused` names what has ended the text."""

    refused: str

    @property
    def held(self) -> int:
        """Characters held back."""

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool) -> tuple[str, Sequence[GuardMark]]:
        """Add text; what is decided comes out. After `last`, or once refused, all is decided."""

    def give_up(self) -> tuple[str, Sequence[GuardMark]]:
        """What is held back, unfiltered: the guard has failed and lets everything pass."""


class PatternStage:
    """Redacts, refuses or flags what patterns match: leftmost first, as over the whole text."""

    __slots__ = ("_action", "_at", "_base", "_edits", "_marks", "_patterns", "_shift", "_text", "_told", "refused")

    def __init__(self, patterns: Patterns, action: Action, told: Told) -> None:
        self.refused = ""
        self._patterns = patterns
        self._action = action
        self._told = told
        self._text = ""  # one decided character, which \b and ^ look back at, then what is held back
        self._at = 0  # where in it that begins
        self._base = 0  # where the text begins in all that was fed
        self._marks: deque[GuardMark] = deque()
        self._edits: deque[tuple[int, int, int]] = deque()  # (start, end, characters more) of redactions
        self._shift = 0

    @property
    def held(self) -> int:
        """See Stage."""
        return len(self._text) - self._at

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool) -> tuple[str, Sequence[GuardMark]]:
        """See Stage."""
        self._text += text
        self._marks += marks
        # One character behind the longest match decides whether there is one at a place.
        limit = len(self._text) - (0 if last else self._patterns.longest)
        out = self._filtered(limit) if limit > self._at else ""
        return out, self._passed(last and not self.refused)

    def _filtered(self, limit: int) -> str:
        """Decide all places before `limit`."""
        text, at, out = self._text, self._at, []
        for start, end in self._patterns.find(text, at):
            if start >= limit:
                break
            if end - start > self._patterns.longest:
                raise RuntimeError("a match is longer than its pattern allows")
            name = self._patterns.name_at(text, start)
            self._told(name, text[start:end])
            if self._action == "refuse":
                self.refused, limit = name, start
                break
            if self._action == "redact":
                instead = replacement(name)
                self._edits.append((self._base + start, self._base + end, len(instead) - (end - start)))
                out += [text[at:start], instead]
                at = end
        done = max(at, limit)
        out.append(text[at:done])
        kept = max(done - 1, 0)
        self._text, self._base, self._at = text[kept:], self._base + kept, done - kept
        return "".join(out)

    def _passed(self, all_of_them: bool) -> Sequence[GuardMark]:
        """The marks whose last character is decided, as they stand in what came out."""
        marks, edits, out = self._marks, self._edits, []
        decided = self._base + self._at
        while marks and (all_of_them or marks[0].end <= decided):
            start, end, token, hidden = marks.popleft()
            while edits and edits[0][1] <= start:
                self._shift += edits.popleft()[2]
            if hidden or (edits and edits[0][0] < end):
                first = min(start, edits[0][0]) if edits else start
                out.append(GuardMark(first + self._shift, first + self._shift, token, True))
            else:
                out.append(GuardMark(start + self._shift, end + self._shift, token))
        return out

    def give_up(self) -> tuple[str, Sequence[GuardMark]]:
        """See Stage."""
        text, self._text = self._text[self._at :], ""
        self._base, self._at = self._base + self._at + len(text), 0
        return text, self._passed(True)


class SizeStage:
    """Ends or flags a text that grows beyond so many characters."""

    __slots__ = ("_action", "_flagged", "_marks", "_max", "_seen", "_told", "refused")

    def __init__(self, max_characters: int, action: Action, told: Told) -> None:
        self.refused = ""
        self._max = max_characters
        self._action = action
        self._told = told
        self._seen = 0
        self._flagged = False
        self._marks: deque[GuardMark] = deque()

    @property
    def held(self) -> int:
        """See Stage."""
        return 0

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool) -> tuple[str, Sequence[GuardMark]]:
        """See Stage."""
        over = self._seen + len(text) > self._max
        if over and not self._flagged:
            self._flagged = True
            self._told("max_characters", "")
        if over and self._action == "refuse":
            self.refused = "max_characters"
            text = text[: self._max - self._seen]
        self._seen += len(text)
        self._marks += marks
        out = []
        while self._marks and (self._marks[0].end <= self._seen or (last and not self.refused)):
            out.append(self._marks.popleft())
        return text, out

    def give_up(self) -> tuple[str, Sequence[GuardMark]]:
        """See Stage."""
        marks, self._marks = list(self._marks), deque()
        return "", marks


class GuardChain:
    """Stages in order, each step of each within its time. A failure is a stage's exception, or a step that took
    longer; then the text ends, or that stage is left out from then on."""

    __slots__ = ("_clock", "_on_failure", "_stages", "_timeouts", "done", "refused")

    def __init__(
        self,
        stages: Sequence[GuardStage],
        timeouts_s: Sequence[float],
        on_failure: Callable[[int, Exception], bool],
        clock: Callable[[], float],
    ) -> None:
        """`on_failure` is told which stage has failed, and says whether everything passes it from now on."""
        self._stages = list(enumerate(stages))
        self._timeouts = timeouts_s
        self._on_failure = on_failure
        self._clock = clock
        self.refused = False
        self.done = False
        """Nothing comes out any more."""

    @property
    def held(self) -> int:
        """Characters held back."""
        return sum(stage.held for _, stage in self._stages)

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool = False) -> tuple[str, Sequence[GuardMark]]:
        """As a stage's."""
        if self.done:
            return "", ()
        for number, stage in list(self._stages):
            text, marks = self._step(number, stage, text, marks, last)
            last |= self.refused  # what comes before it is whole now: the stages behind it decide all of it
        self.done = last
        return text, marks

    def _step(
        self, number: int, stage: GuardStage, text: str, marks: Sequence[GuardMark], last: bool
    ) -> tuple[str, Sequence[GuardMark]]:
        began = self._clock()
        failure: Exception | None = None
        out: tuple[str, Sequence[GuardMark]] = ("", ())
        try:
            out = stage.feed(text, marks, last)
        except Exception as error:  # whatever a guard comes to must not reach the link, which is everybody's
            failure = error
        took_s = self._clock() - began
        if failure is None and took_s > self._timeouts[number]:
            failure = TimeoutError(f"took {took_s:.3f} s of {self._timeouts[number]:g} s")
        if stage.refused or failure is None:
            self.refused |= bool(stage.refused)
            return out
        if not self._on_failure(number, failure):
            self.refused = True
            return "", ()
        self._stages = [one for one in self._stages if one[1] is not stage]
        rest, rest_marks = stage.give_up()
        return out[0] + rest, [*out[1], *rest_marks]


def replacement(name: str) -> str:
    """What stands where a pattern of this name has matched."""
    return f"[redacted: {name}]"


def filtered(stage: GuardStage, text: str) -> str:
    """A whole text through one stage."""
    return stage.feed(text, (), True)[0]
