"""The simulated engine's parts: tokens, KV cache and scheduler are pure; `cluster.engine.sim` is their shell."""
