"""Vectors and scores of the simulated engine, computed from the tokens, and the check of its pooling requests.

Invariant: if the engine seed, adapter, task and tokens are equal, the vectors are equal on any engine. A score also
depends on the position at which the second text begins, so that a test detects a lost position. A shorter vector is the
beginning of the longer vector, normalized to norm 1.
"""

from __future__ import annotations

import math
import random
import sys
from array import array

from cluster.api.pooling import PoolingInfo, PoolingTask
from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.tokens import MASK, digest64, fold, mix


def pooling_info(config: SimConfig) -> PoolingInfo | None:
    """Return the tasks and the vector length of an engine that is a pooling model; None for an engine that generates
    tokens."""
    tasks = (
        *((PoolingTask.EMBED,) if config.embed_dimensions else ()),
        *((PoolingTask.SCORE,) if config.scores else ()),
    )
    if not tasks:
        return None
    return PoolingInfo(tasks, config.embed_dimensions or 1, any_shorter=bool(config.any_dimensions))


def check_pooling(request: EngineRequest, config: SimConfig) -> None:
    """Raise EngineRefused if a pooling request has wrong parameters, or if the engine does not serve this kind of
    request."""
    info, pooling = pooling_info(config), request.pooling
    if pooling is None or info is None:
        if pooling is not None:
            raise _refused("model", "this model generates text and does not pool; name a pooling model")
        if info is not None:
            raise _refused("model", "this model computes vectors; name a model that generates")
        return
    if pooling.task not in info.tasks:
        raise _refused("model", f"this model does not compute {pooling.task.value}; name another pooling model")
    most = info.dimensions if pooling.task is PoolingTask.EMBED else 1
    least = 1 if info.any_shorter else most
    if pooling.dimensions is not None and not least <= pooling.dimensions <= most:
        raise _refused("dimensions", f"must be {least} to {most}", "INVALID_FIELD")
    if not 0 <= pooling.second_text_at < max(len(request.prompt_token_ids), 1):
        raise _refused("second_text_at", "must be an index of the prompt", "INVALID_FIELD")
    if request.emitted_token_ids:
        raise _refused("emitted_token_ids", "a pooling request has no output tokens", "INVALID_FIELD")


def _refused(field: str, what: str, reason: str = "UNSUPPORTED_FEATURE") -> EngineRefused:
    return EngineRefused(reason, f"{field}: {what}", field)


def pooled(request: EngineRequest, config: SimConfig, corrupt: bool = False) -> bytes:
    """Return the vector of a pooling request as little-endian float32. `corrupt`: whether to return a wrong vector."""
    pooling = request.pooling
    assert pooling is not None
    key = digest64(config.seed, request.adapter, pooling.task.value)
    state = fold(key, request.prompt_token_ids)
    if corrupt:
        state ^= MASK
    if pooling.task is PoolingTask.SCORE:
        return _packed([mix(state ^ pooling.second_text_at) / 2**64])
    numbers = random.Random(state)  # noqa: S311
    values = [numbers.random() - 0.5 for _ in range(pooling.dimensions or config.embed_dimensions)]
    length = math.hypot(*values) or 1.0
    return _packed([value / length for value in values])


def _packed(values: list[float]) -> bytes:
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
