"""The KV blocks that a worker's engine holds.

The engine's events are converted to prefix hashes, by which gateways route.
"""
