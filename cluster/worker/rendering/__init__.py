"""Rendering of chats at the worker: vLLM's own renderers turn messages into prompt ids.

A gateway renders a model's Jinja template itself. Some model families have no template: only Python code in vLLM makes
their prompts (families.py). A separate process runs this code, so that rendering does not delay tokens
(prompt_renderer.py).
"""
