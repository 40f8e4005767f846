"""Sessions of agents: each turn extends the turn before, after a pause for tools; some turns start sub-agents.

A sub-agent begins with the tokens that all agents of its tenant share, and has a few turns of its own. A session
continues when all of its sub-agents have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

from loadtests.routing.calls import BLOCK_TOKENS, Prompt, RoutedCall
from loadtests.routing.cluster import Cluster
from loadtests.sim.adapters import AdapterMix


@dataclass(frozen=True, slots=True)
class AgentTenant:
    """A tenant with `sessions` agents. `pause_s`: median of the pause before a turn, in seconds."""

    name: str
    weight: float
    sessions: int
    pause_s: float


@dataclass(frozen=True, slots=True)
class SessionsConfig:
    """Configuration of the simulated agent sessions. Lengths are in tokens, times in seconds.

    `new_tokens`: median of the tokens that a turn adds to its prompt. `output_tokens`: median length of an
    output. `start_s`: time within which the sessions begin. `spawns`: share of the turns after which
    `sub_agents` sub-agents start, each with `sub_turns` turns.
    """

    tenants: Sequence[AgentTenant]
    turns: int = 43
    shared_tokens: int = 10_000
    first_tokens: int = 1_000
    new_tokens: int = 700
    output_tokens: int = 220
    start_s: float = 300.0
    spawns: float = 0.03
    sub_agents: int = 3
    sub_turns: int = 3
    adapters: AdapterMix | None = None
    """The sessions whose calls name an adapter; None if no call names one."""


class Sessions:
    """All sessions of a cluster. `open`: number of sessions that have not ended."""

    def __init__(self, config: SessionsConfig, cluster: Cluster, seed: int) -> None:
        self.config = config
        self.open = 0
        self._cluster = cluster
        self._rng = Random(f"sessions {seed}")
        self._block = count(1)
        for tenant in config.tenants:
            shared = [next(self._block) for _ in range(config.shared_tokens // BLOCK_TOKENS)]
            for number in range(tenant.sessions):
                self.open += 1
                mix = config.adapters
                adapter = "" if mix is None else mix.adapter_of((tenant.name, number))
                agent = _Agent(self, tenant, shared, config.turns, self._ended, adapter)
                cluster.events.at(self._rng.uniform(0, config.start_s), agent.turn)

    def run(self, most_s: float = 50_000.0) -> None:
        """Run until all sessions have ended. Raises RuntimeError if a session still runs after `most_s` seconds."""
        while self.open:
            if self._cluster.events.now > most_s:
                raise RuntimeError(f"{self.open} sessions have not ended after {most_s:g} s")
            self._cluster.run(self._cluster.events.now + 10.0)

    def _ended(self) -> None:
        self.open -= 1

    def send(
        self,
        tenant: AgentTenant,
        blocks: list[int],
        tokens: int,
        on_end: Callable[[RoutedCall], None],
        adapter: str = "",
    ) -> None:
        """Make a call with a prompt of `tokens` tokens. `blocks`: the KV blocks of the conversation so far. Blocks are
        appended to this list until it covers the prompt and the output."""
        output = self._length(self.config.output_tokens)
        while len(blocks) < (tokens + output) // BLOCK_TOKENS:
            blocks.append(next(self._block))
        whole = tuple(blocks[: (tokens + output) // BLOCK_TOKENS])
        self._cluster.send(Prompt(tenant.name, tokens, output, whole, adapter), on_end=on_end)

    def begin(
        self, tenant: AgentTenant, blocks: Sequence[int], turns: int, on_end: Callable[[], None], adapter: str = ""
    ) -> None:
        """Start a sub-agent, which makes its first call at once."""
        _Agent(self, tenant, blocks, turns, on_end, adapter).turn()

    def new_tokens(self) -> int:
        """Draw how many tokens a turn adds to its prompt."""
        return self._length(self.config.new_tokens)

    def pause(self, tenant: AgentTenant, action: Callable[[], None]) -> None:
        """Run `action` after a random time, in which an agent of the tenant runs its tools."""
        self._cluster.events.after(tenant.pause_s * self._rng.lognormvariate(0, 1.0), action)

    def spawns(self) -> bool:
        """Draw whether sub-agents start after a turn."""
        return self._rng.random() < self.config.spawns

    def _length(self, median: int) -> int:
        return max(round(median * self._rng.lognormvariate(0, 0.6)), 2)


class _Agent:
    """A session or a sub-agent."""

    def __init__(
        self,
        sessions: Sessions,
        tenant: AgentTenant,
        shared: Sequence[int],
        turns: int,
        on_end: Callable[[], None],
        adapter: str,
    ) -> None:
        self._adapter = adapter
        self._sessions = sessions
        self._tenant = tenant
        self._shared = shared
        self._blocks = list(shared)
        self._tokens = sessions.config.shared_tokens + sessions.config.first_tokens
        self._left = turns
        self._is_main = turns == sessions.config.turns
        self._on_end = on_end
        self._sub_agents = 0

    def turn(self) -> None:
        """Make the next call."""
        self._left -= 1
        self._sessions.send(self._tenant, self._blocks, self._tokens, self._answered, self._adapter)

    def _answered(self, call: RoutedCall) -> None:
        sessions, config = self._sessions, self._sessions.config
        self._tokens += call.prompt.output_tokens + sessions.new_tokens()
        if not self._left:
            self._on_end()
        elif self._is_main and sessions.spawns():
            self._sub_agents = config.sub_agents
            for _ in range(config.sub_agents):
                sessions.begin(self._tenant, self._shared, config.sub_turns, self._joined, self._adapter)
        else:
            sessions.pause(self._tenant, self.turn)

    def _joined(self) -> None:
        self._sub_agents -= 1
        if not self._sub_agents:
            self.turn()
