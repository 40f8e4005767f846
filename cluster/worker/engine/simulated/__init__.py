"""The simulated engine's parts: tokens, KV cache and scheduler are pure; `cluster.worker.engine.simulated.engine` is
their shell."""
