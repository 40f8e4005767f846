"""Parsing of outputs at the worker: tokens become reasoning, content and tool calls, by vLLM's own parsers.

The parsers run in one process of their own (parser_process.py), so that no parse delays the links or the engine.
"""
