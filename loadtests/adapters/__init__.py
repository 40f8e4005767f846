"""Parts of the scenario `adapters`: pooling models and adapters, compared with vLLM's own server."""
