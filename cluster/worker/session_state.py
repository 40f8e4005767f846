"""What a worker's end keeps of its links and of what runs for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.api.types import TokenOutput
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.bulk import Prompts
from cluster.wire.credit import Capacity
from cluster.wire.outbox import Outbox
from cluster.worker.gpu_meter import GpuShare


@dataclass(eq=False, slots=True)
class LinkState:
    """One session with one gateway."""

    number: int
    turn: int
    """Its number among those that share room: whoever comes first gets what does not divide."""
    gateway: str
    incarnation: str
    outbox: Outbox
    requests: dict[int, str] = field(default_factory=dict)
    submitting: set[int] = field(default_factory=set)
    aborted: set[int] = field(default_factory=set)
    prompts: Prompts = field(default_factory=Prompts)
    blobs: asyncio.Queue[pb.Blob] = field(default_factory=lambda: asyncio.Queue(maxsize=64))
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    grant_id: int = 0
    unacked_since: float | None = None
    silent_s: Callable[[], float] = lambda: 0.0
    """Since the gateway's last beat."""
    """Since when the gateway owes the acknowledgement of a grant; room it was promised is held until then."""


@dataclass(slots=True)
class RunningRequest:
    """A request that the engine runs for a link."""

    link: LinkState
    slot: int
    tokens: int
    prompt_tokens: int
    emitted_tokens: int
    """By other workers, before it came here."""
    fresh_tokens: int
    """Of those with which it comes, the ones that are likely to be computed."""
    sealed: bytes
    earlier_tokens: int
    """Of the emitted ones, those under the same record."""
    share: GpuShare
    began: float
    came_home: bool = False
    """Its gateway expects its KV blocks here, those of its prompt at least."""
    cached_tokens: int = 0
    accepted: bool = False
    stream: str = ""
    asked: object = None
    generation: int = 0
    """How often its call had been resumed, and `begun_at`, the gateway that it was resumed from."""
    begun_at: str = ""
    name: str = ""
    """Its call's stream, whether it may come back under it or not."""
    token_ids: list[int] | None = None
    """All after the prompt, of one that may come back under `stream` when its gateway is gone; `asked` is what else
    they depend on."""

    @property
    def generated(self) -> int:
        """Tokens that this engine has made."""
        return self.tokens - self.prompt_tokens - self.emitted_tokens

    @property
    def output_tokens(self) -> int:
        """Of the sequence in all, wherever they were generated."""
        return self.tokens - self.prompt_tokens


@dataclass(slots=True)
class StepState:
    """What was given to calls, by a step or between two."""

    touched: dict[int, LinkState] = field(default_factory=dict)
    firsts: list[tuple[GpuShare, int, int]] = field(default_factory=list)
    """Of each request that has got its first tokens: its share, the tokens computed for it, and how many it got."""
    finished: list[tuple[RunningRequest, TokenOutput]] = field(default_factory=list)
    tokens: int = 0
    of_orphans: int = 0
    """Tokens that nobody has got."""


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """What a worker's end holds: all zero but links and steps once its calls have ended."""

    links: int
    running: int
    tokens: int
    steps: int
    promised: Capacity
    unacked_usage: int = 0
    dropped_usage: int = 0
    orphans: int = 0
