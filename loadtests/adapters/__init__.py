"""Parts of the scenario adapters: pooling models and adapters, beside vLLM's own server."""
