"""Changes of the KV blocks that one worker holds, as a worker reports them to its gateways."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cluster.policy.kv_cache.prefix_hashes import Hashes


@dataclass(frozen=True, slots=True)
class KvChange:
    """Blocks that a worker has removed, and blocks that it has stored after that. `is_reset`: the worker now holds only
    the stored blocks."""

    is_reset: bool = False
    stored: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    removed: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))

    def __bool__(self) -> bool:
        return self.is_reset or bool(len(self.stored) or len(self.removed))
