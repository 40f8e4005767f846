"""The simulated engine. Tokens, KV cache and scheduler are pure; `engine` adds time and the Engine interface."""
