"""Types of pooling requests: embeddings, and scores of pairs of texts. A pooling model computes one vector for a prompt
and generates no tokens."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.api.frozen import frozen_dataclass

POOLS = "pools:"
"""Prefix of the capability that names a pooling task of a worker, e.g. `pools:embed`. A worker with such a capability
serves no generation."""
MAX_DIMENSIONS = 65_536
"""Maximum number of values of a vector."""


class PoolingTask(enum.StrEnum):
    """Result that a pooling model computes for a request."""

    EMBED = "embed"
    """The vector of a text."""
    SCORE = "score"
    """The relevance of a pair of texts, from a cross-encoder: a vector of one number."""


@frozen_dataclass
class PoolingOptions:
    """Parameters of a pooling request, in place of sampling parameters.

    `dimensions`: length of the vector that the caller asks for; None for the model's default length.
    """

    task: PoolingTask
    dimensions: int | None = None
    second_text_at: int = 0
    """Index of the first token of the second text, for models with token types; 0 without a second text."""


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """Tasks and vector lengths of a pooling model. `dimensions`: length of its vectors; 1 for a cross-encoder's scores.

    `shorter_dimensions`: the lengths that callers may ask for; empty if the model declares none. `any_shorter`: callers
    may ask for every length from 1 to `dimensions`.
    """

    tasks: tuple[PoolingTask, ...]
    dimensions: int
    shorter_dimensions: tuple[int, ...] = ()
    any_shorter: bool = False


def pooling_capabilities(tasks: Iterable[PoolingTask]) -> tuple[str, ...]:
    """Return the capabilities of a worker that serves `tasks`: one capability for each task, such as `pools:embed`."""
    return tuple(f"{POOLS}{task.value}" for task in tasks)


def pooling_tasks(capabilities: Iterable[str]) -> tuple[PoolingTask, ...]:
    """Return the pooling tasks that a worker's capabilities name. Other capabilities and unknown tasks are ignored."""
    return known_tasks(word.removeprefix(POOLS) for word in capabilities if word.startswith(POOLS))


def known_tasks(words: Iterable[str]) -> tuple[PoolingTask, ...]:
    """Return the pooling tasks of these names; unknown names are ignored."""
    known = {task.value for task in PoolingTask}
    return tuple(PoolingTask(word) for word in words if word in known)
