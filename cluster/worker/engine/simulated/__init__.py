"""The simulated engine.

Tokens, KV cache and scheduler use neither a clock nor I/O; `engine` adds time and the Engine interface.
"""
