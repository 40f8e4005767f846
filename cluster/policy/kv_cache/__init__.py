"""Which worker holds which KV blocks: prefix hashes of token ids, and an index from hashes to workers."""
