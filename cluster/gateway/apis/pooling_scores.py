"""Scores of pairs and rankings from the vectors of a pooling call, for all APIs.

A cross-encoder gives a score for each pair. A model that only embeds gives a vector for each text; the score of a pair
is then the cosine of the angle between the vectors of its texts, as in vLLM's server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.api.pooling import PoolingTask
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_request import PairInputs, ParsedPooling

ROWS_BYTES: Final = 1 << 20
"""Bytes of vectors that are multiplied before other tasks of the event loop run."""
_EPSILON: Final = 1e-8
"""Lower bound on the product of the lengths of two vectors, as in torch's cosine_similarity."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document in an answer that ranks documents. `index`: the document's index in the request. `score`: the
    document's score for the query. `text`: the text of the document; None if the answer holds no texts."""

    index: int
    score: float
    text: str | None


async def scores_of(call: PoolingCall, vectors: Sequence[bytes]) -> list[float]:
    """Return the score of each pair of a call, in the order of the pairs. The JSON text of a score is the shortest text
    of its float32 value (float_json.py)."""
    import numpy as np  # not at the start: deferred_imports.py

    from cluster.gateway.apis.float_json import short_floats

    if call.task is PoolingTask.SCORE:
        return short_floats(b"".join(vectors))
    inputs = call.inputs
    assert isinstance(inputs, PairInputs)
    count = len(inputs.first)
    queries, documents = vectors[:count], vectors[count:]
    rows = max(ROWS_BYTES // len(vectors[0]), 1)
    scores: list[float] = []
    for at in range(0, len(documents), rows):
        if at:
            await asyncio.sleep(0)
        second = np.frombuffer(b"".join(documents[at : at + rows]), "<f4").reshape(-1, len(vectors[0]) // 4)
        whole = queries if count == 1 else queries[at : at + rows]
        first = np.frombuffer(b"".join(whole), "<f4").reshape(-1, second.shape[1])
        products = np.einsum("ij,ij->i", np.broadcast_to(first, second.shape), second, dtype=np.float64)
        lengths = np.linalg.norm(first.astype(np.float64), axis=1) * np.linalg.norm(second.astype(np.float64), axis=1)
        scores += short_floats((products / np.maximum(lengths, _EPSILON)).astype("<f4"))
    return scores


def ranked(parsed: ParsedPooling, scores: Sequence[float]) -> list[Ranked]:
    """Return the documents for the answer, the highest score first. Documents with equal scores keep their order in the
    request."""
    inputs = parsed.request.inputs
    assert isinstance(inputs, PairInputs)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: parsed.top_n or None]
    texts = inputs.second if parsed.returns_documents else None
    return [Ranked(i, scores[i], None if texts is None else texts[i]) for i in order]
