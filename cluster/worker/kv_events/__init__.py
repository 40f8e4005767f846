"""KV blocks that a worker's engine holds: the engine's events become prefix hashes, which gateways route by."""
