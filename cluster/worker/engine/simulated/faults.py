"""Failures at named points.

A fault is `ACTION@POINT[:AT[:SECONDS]]`, e.g. `die@step:5`, `slow@step:0:0.5`: it fires at the AT-th visit of its
point after it was armed (1 the next; 0 every one).
"""

from __future__ import annotations

from dataclasses import dataclass

_IN_A_STEP = ("die", "kill", "hang", "slow", "block", "nan", "wrong")

POINTS: dict[str, tuple[str, ...]] = {
    "submit": ("die", "kill", "refuse"),
    "prefill": _IN_A_STEP,
    "step": _IN_A_STEP,
    "last_token": _IN_A_STEP,
}
"""What can go wrong where: a request is taken; a step with prompt tokens, any step, or a step in which a request
reaches its max_tokens begins. die: EngineDead; kill: SIGKILL to the own process; hang: steps stop coming while all
else goes on; slow: the step takes SECONDS longer (at prefill as stated work); block: the event loop stands still for
SECONDS; nan: one request of the step ends with finish ERROR; wrong: from then on all tokens are others than they
should be; refuse: EngineRefused."""

_TIMED = ("slow", "block")


@dataclass(frozen=True, slots=True)
class SimFault:
    """One failure to come. Raises ValueError for a pair that cannot be."""

    action: str
    point: str
    at: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"fault {self}: point {self.point!r} is none of {', '.join(POINTS)}")
        if self.action not in POINTS[self.point]:
            raise ValueError(f"fault {self}: at {self.point} only {', '.join(POINTS[self.point])} can be injected")
        if self.at < 0:
            raise ValueError(f"fault {self}: AT must be 0 (every time) or more")
        if (self.action in _TIMED) != (self.seconds > 0):
            raise ValueError(f"fault {self}: SECONDS above 0 go with slow and block, and with these only")

    def __str__(self) -> str:
        tail = f":{self.seconds:g}" if self.seconds else ""
        return f"{self.action}@{self.point}:{self.at}{tail}"

    @classmethod
    def parse(cls, text: str) -> SimFault:
        """The inverse of str. Raises ValueError with the form that is meant."""
        action, _, rest = text.partition("@")
        point, *numbers = rest.split(":")
        if not point or len(numbers) > 2:
            raise ValueError(f"fault {text!r}: expected ACTION@POINT[:AT[:SECONDS]], e.g. die@step:5")
        try:
            at = int(numbers[0]) if numbers else 1
            seconds = float(numbers[1]) if len(numbers) > 1 else 0.0
        except ValueError:
            raise ValueError(f"fault {text!r}: AT must be an integer and SECONDS a number") from None
        return cls(action, point, at, seconds)


@dataclass(frozen=True, slots=True)
class SimFaults:
    """The faults armed from the start."""

    faults: tuple[SimFault, ...] = ()


class Armed:
    """The faults to come, and how often their points were visited."""

    def __init__(self, initial: SimFaults) -> None:
        self._visits: list[tuple[SimFault, int]] = [(fault, 0) for fault in initial.faults]

    def __bool__(self) -> bool:
        return bool(self._visits)

    def arm(self, fault: SimFault) -> None:
        """Add one; its count starts now."""
        self._visits.append((fault, 0))

    def clear(self) -> None:
        """Disarm all."""
        self._visits.clear()

    def visit(self, point: str) -> list[SimFault]:
        """Those that fire at this visit; one that fires once is spent by it."""
        firing: list[SimFault] = []
        left: list[tuple[SimFault, int]] = []
        for fault, visits in self._visits:
            if fault.point != point:
                left.append((fault, visits))
            elif fault.at == 0:
                firing.append(fault)
                left.append((fault, 0))
            elif visits + 1 == fault.at:
                firing.append(fault)
            else:
                left.append((fault, visits + 1))
        self._visits = left
        return firing
