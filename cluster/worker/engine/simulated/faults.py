"""Faults that are injected at named points of the simulated engine.

A fault is written `ACTION@POINT[:AT[:SECONDS]]`, e.g. `die@step:5` or `slow@step:0:0.5`. After a fault is armed, the
visits to its point are counted, and it fires at visit number AT. 1 is the next visit; 0 means every visit.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.api.ports import EngineDead, EngineRefused

_IN_A_STEP = ("die", "kill", "hang", "slow", "block", "nan", "wrong")

POINTS: dict[str, tuple[str, ...]] = {
    "submit": ("die", "kill", "refuse"),
    "adapter": ("die", "kill", "refuse", "slow"),
    "prefill": _IN_A_STEP,
    "step": _IN_A_STEP,
    "last_token": _IN_A_STEP,
}
"""Actions that are possible at each point.

The points are: `submit`, when a request is accepted; `adapter`, when an adapter is loaded; `prefill`, at the start of a
step with prompt tokens; `step`, at the start of any step; `last_token`, at the start of a step in which a request
reaches max_tokens. The actions are: die: EngineDead. kill: SIGKILL to the own process. hang: steps stop while
everything else continues. slow: the step, or the load of the adapter, takes SECONDS longer; at `prefill` the engine
reports this time as work. block: the event loop is blocked for SECONDS. nan: one request of the step ends with finish
ERROR. wrong: all tokens from then on are wrong. refuse: EngineRefused.
"""

_TIMED = ("slow", "block")


@dataclass(frozen=True, slots=True)
class SimFault:
    """A fault to inject into the simulated engine: `action` happens at `point`. The constructor raises ValueError if
    this action is not possible at this point."""

    action: str
    point: str
    at: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ValueError(f"fault {self}: point {self.point!r} is not one of {', '.join(POINTS)}")
        if self.action not in POINTS[self.point]:
            raise ValueError(f"fault {self}: at {self.point} only {', '.join(POINTS[self.point])} can be injected")
        if self.at < 0:
            raise ValueError(f"fault {self}: AT must be 0 (every time) or more")
        if (self.action in _TIMED) != (self.seconds > 0):
            raise ValueError(f"fault {self}: SECONDS above 0 are required for slow and block, and for these only")

    def __str__(self) -> str:
        tail = f":{self.seconds:g}" if self.seconds else ""
        return f"{self.action}@{self.point}:{self.at}{tail}"

    @classmethod
    def parse(cls, text: str) -> SimFault:
        """Parse a fault from a text such as `die@step:5`. Raises ValueError, which shows the expected form."""
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


class EngineFaults:
    """The armed faults of one engine, and the effects of the faults that have fired (dead, hung, corrupt, nan)."""

    def __init__(self, initial: Iterable[SimFault], wake: asyncio.Event) -> None:
        """Arm the initial faults. `wake` is set when the engine dies or recovers."""
        self._armed = [(fault, 0) for fault in initial]  # each with the number of visits to its point
        self._wake = wake
        self.dead = ""
        self.hung = False
        self.corrupt = False
        self.nan = False  # in the current step

    def __bool__(self) -> bool:
        """Whether any fault is armed."""
        return bool(self._armed)

    def arm(self, point: str, action: str, at: int = 1, seconds: float = 0.0) -> None:
        """Arm a fault at a point of the code. `at`: which visit to the point, counted from now on, triggers the fault;
        0 for every visit.

        Raises ValueError for a fault that SimFault does not allow.
        """
        self._armed.append((SimFault(action, point, at, seconds), 0))

    def heal(self) -> None:
        """Disarm all faults. End a hang, and make later tokens correct again. A dead engine stays dead."""
        self._armed.clear()
        self.hung = self.corrupt = False
        self._wake.set()

    def kill(self, reason: str = "killed") -> None:
        """End the engine at once, even within a step or a hang."""
        self.dead = self.dead or reason
        self._wake.set()

    def raise_if_dead(self) -> None:
        """Raise EngineDead if the engine is dead."""
        if self.dead:
            raise EngineDead(self.dead)

    async def wait_while_hung(self) -> None:
        """Wait until a hang ends. Raises EngineDead if the engine dies meanwhile."""
        while self.hung:
            self._wake.clear()
            await self._wake.wait()
            self.raise_if_dead()

    def begin_step(self, points: Iterable[str]) -> list[SimFault]:
        """Apply the faults that fire at the `points` of a new step; return those with the action `slow`.

        Raises EngineDead.
        """
        self.nan = False
        firing = [fault for point in points for fault in self.visit(point)]
        self.raise_if_dead()
        return [fault for fault in firing if fault.action == "slow"]

    def visit(self, point: str) -> list[SimFault]:
        """Record that the engine has reached a point of its code, such as `step`. Apply the faults that are due at
        this visit to the point, and return them. A fault that is due at only one visit is then disarmed.

        Raises EngineRefused for the action `refuse`.
        """
        firing: list[SimFault] = []
        remaining: list[tuple[SimFault, int]] = []
        for fault, visits in self._armed:
            if fault.point != point:
                remaining.append((fault, visits))
            elif fault.at == 0:
                firing.append(fault)
                remaining.append((fault, 0))
            elif visits + 1 == fault.at:
                firing.append(fault)
            else:
                remaining.append((fault, visits + 1))
        self._armed = remaining
        for fault in firing:
            self._apply(fault)
        return firing

    def _apply(self, fault: SimFault) -> None:
        match fault.action:
            case "refuse":
                at_adapter = fault.point == "adapter"
                reason, field = ("ADAPTER_INVALID", "adapter") if at_adapter else ("INVALID_FIELD", "prompt_token_ids")
                raise EngineRefused(reason, f"injected fault {fault}", field)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die":
                self.kill(f"injected fault {fault}")
            case "hang":
                self.hung = True
            case "nan":
                self.nan = True
            case "wrong":
                self.corrupt = True
            case "block":
                time.sleep(fault.seconds)
