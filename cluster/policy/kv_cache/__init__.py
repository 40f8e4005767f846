"""The cache index, which knows the KV blocks that each worker holds, and the prefix hashes of token ids that identify
the blocks."""
