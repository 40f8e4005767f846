"""Knowledge of the KV blocks that each worker holds: prefix hashes of token ids, an index from hashes to workers."""
