"""Rendering of chats at the worker: messages become prompt ids, by vLLM's own renderers.

A gateway renders a model's Jinja template itself. Some families have none: their prompts are made by Python code that
only vLLM has (families.py). A process of its own runs that code, so that no render delays tokens (prompt_renderer.py).
"""
