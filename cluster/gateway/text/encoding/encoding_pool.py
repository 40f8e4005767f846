"""The pool of helper processes that tokenize the long prompts of one model (helpers/pool.py)."""

from __future__ import annotations

from cluster.gateway.helpers.pool import PATIENCE_S, HelperPool
from cluster.wire.bundle import Bundle


class EncodingPool(HelperPool):
    """Pool of helper processes, each of which holds the tokenizer and the chat template of one model."""

    def __init__(self, bundle: Bundle, size: int | None = None, patience_s: float = PATIENCE_S) -> None:
        """`size`: maximum number of helper processes. `patience_s`: seconds after which a helper that has not answered
        a small job is late."""
        super().__init__(lambda: ("text", bundle.pack()), size, patience_s)
