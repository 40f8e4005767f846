"""Parsing of outputs at the worker: vLLM's parsers divide the tokens into reasoning, content and tool calls.

The parsers run in a separate process (parser_process.py), so that parsing delays neither the links nor the engine.
"""
