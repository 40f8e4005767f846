"""Values that the scheduling policy takes and returns: sequences that resume, and instructions for the gateway."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.api.frozen import frozen_dataclass
from cluster.api.types import CompatibilityKey
from cluster.policy.fairness.order import HolderWait, WaitingSequence
from cluster.policy.routing.router import RoutingDecision


@dataclass(frozen=True, slots=True)
class ResumingSequence:
    """A sequence that has lost its worker and is to be resumed after its emitted tokens. Times are monotonic seconds.

    `entry`: the sequence as it was in the waiting room, when its tenant was charged. `tokens`: number of prompt tokens
    and emitted tokens together. `compatibility`: key of the worker that computed the first token. `excluded`:
    incarnations of workers to which the sequence must not be sent. `cached_on`: incarnation of the worker that holds
    the sequence's KV blocks; "" if there is none. `silent_since`: time of the first loss of a worker since the
    sequence's last token; None if no worker was lost since that token.

    `suspect`: whether the sequence has lost so many workers in a row that it may be the cause. `lost_links`: names of
    the links to these workers. `lost_at` and `lost_node`: time of the last loss, and node of the lost worker.
    """

    entry: WaitingSequence
    tokens: int
    compatibility: CompatibilityKey | None = None
    excluded: frozenset[str] = frozenset()
    cached_on: str = ""
    silent_since: float | None = None
    suspect: bool = False
    lost_links: tuple[str, ...] = ()
    lost_at: float = float("-inf")
    lost_node: str = ""

    @property
    def key(self) -> str:
        """Name of the sequence in the queues."""
        return self.entry.call_id

    @property
    def model(self) -> str:
        """Model of the sequence."""
        return self.entry.model


class Ending(enum.Enum):
    """Reason for which the call of a waiting sequence is ended."""

    TOO_LATE = "too_late"
    """A new sequence waited too long."""
    NO_ADAPTER = "no_adapter"
    """Too many new sequences wait for adapters that no worker with room has loaded."""
    NO_VERSION = "no_version"
    """Too many new sequences wait for versions that no worker with room serves."""
    NOT_RESUMED = "not_resumed"
    """A sequence that resumes waited too long."""
    REPLACED = "replaced"
    """The workers that could resume the sequence have been replaced by incompatible workers."""
    BLAMED = "blamed"
    """The sequence lost several workers in a row and may be the cause."""


class Move(NamedTuple):
    """A sequence that may leave its draining worker. `worker_id`: a worker that has room for the sequence."""

    key: str
    worker_id: str


@frozen_dataclass
class Send:
    """Instruction to send a sequence to a worker. The sequence has left its queue.

    `decision`: the routing decision, for explanations. `reason`: why this worker was chosen, as a metric label.
    `holder_wait`: how long a new sequence has waited for the worker that holds its prompt, even if it is now sent to
    another worker; None if it has not waited.

    Field of a resumed sequence: `uncached_tokens` is the number of tokens that the worker is likely to compute; 0 means
    all tokens. Fields of a new sequence: `cached_tokens` is the number of its leading tokens that this worker holds in
    its KV cache. `cached` has this number for each worker, by worker id; None if the caches were not looked up.
    """

    entry: WaitingSequence
    worker_id: str
    reason: str
    uncached_tokens: int = 0
    cached_tokens: int = 0
    decision: RoutingDecision | None = field(default=None, compare=False)
    cached: Mapping[str, int] | None = field(default=None, compare=False)
    holder_wait: HolderWait | None = None


@dataclass(frozen=True, slots=True)
class End:
    """End the call of a sequence. The sequence has left its queue."""

    key: str
    ending: Ending


@dataclass(frozen=True, slots=True)
class Fail:
    """End the call of a sequence, because the routing of the sequence raised `error`. The sequence has left its
    queue."""

    key: str
    error: Exception


@dataclass(frozen=True, slots=True)
class Acquit:
    """Instruction: stop suspecting that a waiting sequence made its workers fail. Workers that did not run the sequence
    were lost too, so the sequence is not the cause."""

    key: str


Instruction = Send | End | Fail | Acquit
