"""Output guards as stream filters: text is fed in chunks, and text whose treatment is certain is returned. No I/O, no
clock.

Text is called decided once no later text can change what the guard does with it. Only decided text is returned.
Invariants: however a text is cut into chunks, the joined outputs equal the output for the whole text. No character of
a redacted or refused match is ever returned. A stage (the filter of one guard) holds back only text that may still
become part of a match: at most as many characters as the longest possible match of any pattern.

Marks travel with the text. A mark belongs to one token and holds the positions [start, end) of the characters that the
token added. A mark is returned when the last of these characters is decided, and is hidden if a redaction touched any
of these characters. Log probabilities and token counts thus follow the text through any number of guards, each of which
may shorten or lengthen the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from cluster.policy.tenants.patterns import Patterns

Action = Literal["refuse", "redact", "flag"]
OnDecision = Callable[[str, str], None]
"""Function that is called for each decision, with the name of the pattern or limit and with the text that matched."""


class GuardMark(NamedTuple):
    """The positions of the characters that a token added to the text. `token`: the index of the token. `hidden`:
    whether a redaction touched the characters."""

    start: int
    end: int
    token: int
    hidden: bool = False


class GuardStage(Protocol):
    """The filter of one guard. `refused`: the name of the pattern or limit that ended the text, "" if none did."""

    refused: str

    @property
    def held(self) -> int:
        """Number of characters that are held back."""

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool) -> tuple[str, Sequence[GuardMark]]:
        """Add text, with marks that name the token of each stretch of the text. Returns the text and the marks
        that may be passed on now. The stage holds back the rest.

        `last`: whether the text ends here. At the end, nothing is held back. A refusal ends the text too.
        """

    def give_up(self) -> tuple[str, Sequence[GuardMark]]:
        """Return the text that is held back, unfiltered, and its marks. Called when the guard has failed and the policy
        lets text pass in this case."""


class PatternStage:
    """Redacts, refuses or flags the matches of patterns. The leftmost match is handled first, as in a search of the
    whole text."""

    __slots__ = (
        "_action",
        "_at",
        "_base",
        "_edits",
        "_marks",
        "_on_decision",
        "_patterns",
        "_shift",
        "_text",
        "refused",
    )

    def __init__(self, patterns: Patterns, action: Action, on_decision: OnDecision) -> None:
        self.refused = ""
        self._patterns = patterns
        self._action = action
        self._on_decision = on_decision
        self._text = ""  # one decided character, for \b and ^ to look back at, then the text that is held back
        self._at = 0  # index in `_text` at which the text that is held back begins
        self._base = 0  # position of `_text` in all text that was fed
        self._marks: deque[GuardMark] = deque()
        self._edits: deque[tuple[int, int, int]] = deque()  # redactions: (start, end, change in length)
        self._shift = 0

    @property
    def held(self) -> int:
        """Implements `GuardStage.held`."""
        return len(self._text) - self._at

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool) -> tuple[str, Sequence[GuardMark]]:
        """Implements `GuardStage.feed`."""
        self._text += text
        self._marks += marks
        # A position is decided once the text extends one character beyond the longest match that could begin there.
        limit = len(self._text) - (0 if last else self._patterns.longest)
        out = self._filtered(limit) if limit > self._at else ""
        return out, self._decided_marks(last and not self.refused)

    def _filtered(self, limit: int) -> str:
        """Decide for each character before `limit` whether it passes. Returns the filtered text that is final now."""
        text, at, out = self._text, self._at, []
        for start, end in self._patterns.find(text, at):
            if start >= limit:
                break
            if end - start > self._patterns.longest:
                raise RuntimeError("a match is longer than its pattern allows")
            name = self._patterns.name_at(text, start)
            self._on_decision(name, text[start:end])
            if self._action == "refuse":
                self.refused, limit = name, start
                break
            if self._action == "redact":
                marker = replacement(name)
                self._edits.append((self._base + start, self._base + end, len(marker) - (end - start)))
                out += [text[at:start], marker]
                at = end
        done = max(at, limit)
        out.append(text[at:done])
        kept = max(done - 1, 0)
        self._text, self._base, self._at = text[kept:], self._base + kept, done - kept
        return "".join(out)

    def _decided_marks(self, all_marks: bool) -> Sequence[GuardMark]:
        """Remove the marks of the text that is no longer held back, and return them. A mark gives the start and end of
        one token's text; the returned marks give positions in the output. If `all_marks` is set, the marks of text that
        is still held back are removed and returned, too."""
        marks, edits, out = self._marks, self._edits, []
        decided = self._base + self._at
        while marks and (all_marks or marks[0].end <= decided):
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
        """Implements `GuardStage.give_up`."""
        text, self._text = self._text[self._at :], ""
        self._base, self._at = self._base + self._at + len(text), 0
        return text, self._decided_marks(True)


class SizeStage:
    """Guard stage that ends or flags a text of more than `max_characters`."""

    __slots__ = ("_action", "_flagged", "_marks", "_max", "_on_decision", "_seen", "refused")

    def __init__(self, max_characters: int, action: Action, on_decision: OnDecision) -> None:
        self.refused = ""
        self._max = max_characters
        self._action = action
        self._on_decision = on_decision
        self._seen = 0
        self._flagged = False
        self._marks: deque[GuardMark] = deque()

    @property
    def held(self) -> int:
        """Implements `GuardStage.held`."""
        return 0

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool) -> tuple[str, Sequence[GuardMark]]:
        """Implements `GuardStage.feed`."""
        over = self._seen + len(text) > self._max
        if over and not self._flagged:
            self._flagged = True
            self._on_decision("max_characters", "")
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
        """Implements `GuardStage.give_up`."""
        marks, self._marks = list(self._marks), deque()
        return "", marks


class GuardChain:
    """A sequence of guard stages. A stage fails if one call of its `feed` raises an error or exceeds the stage's time
    limit. After a failure, `on_failure` decides whether the text ends or the stage is skipped from then on."""

    __slots__ = ("_clock", "_on_failure", "_stages", "_timeouts", "done", "refused")

    def __init__(
        self,
        stages: Sequence[GuardStage],
        timeouts_s: Sequence[float],
        on_failure: Callable[[int, Exception], bool],
        clock: Callable[[], float],
    ) -> None:
        """`timeouts_s`: the time limit of each stage. `on_failure`: called with the index of a failed stage; returns
        whether the stage is skipped from then on."""
        self._stages = list(enumerate(stages))
        self._timeouts = timeouts_s
        self._on_failure = on_failure
        self._clock = clock
        self.refused = False
        self.done = False
        """Whether the text has ended. After the end no text is returned."""

    @property
    def held(self) -> int:
        """Number of characters that all stages together hold back."""
        return sum(stage.held for _, stage in self._stages)

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool = False) -> tuple[str, Sequence[GuardMark]]:
        """Feed text through all stages. `marks`: the positions of the text's tokens. Returns the text that no later
        text can change, and the marks of that text. The rest is held back."""
        if self.done:
            return "", ()
        for number, stage in list(self._stages):
            text, marks = self._step(number, stage, text, marks, last)
            last |= self.refused  # the text ends here: later stages decide all of it
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
        except Exception as error:  # a guard's error must not break the link, which all calls share
            failure = error
        took_s = self._clock() - began
        if failure is None and took_s > self._timeouts[number]:
            failure = TimeoutError(f"took {took_s:.3f} s, more than its {self._timeouts[number]:g} s")
        if stage.refused or failure is None:
            self.refused |= bool(stage.refused)
            return out
        if not self._on_failure(number, failure):
            self.refused = True
            return "", ()
        self._stages = [numbered for numbered in self._stages if numbered[1] is not stage]
        rest, rest_marks = stage.give_up()
        return out[0] + rest, [*out[1], *rest_marks]


def replacement(name: str) -> str:
    """Return the text that replaces a match of the pattern `name`."""
    return f"[redacted: {name}]"


def filtered(stage: GuardStage, text: str) -> str:
    """Return a whole text, filtered by one stage."""
    return stage.feed(text, (), True)[0]
