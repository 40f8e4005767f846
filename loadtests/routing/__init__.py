"""Routing by cached prefix in virtual time: traces and sessions over simulated workers with KV caches."""
