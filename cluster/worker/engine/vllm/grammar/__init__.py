"""Grammars that constrain outputs: checks, repairs of xgrammar, and conversion to vLLM's form."""
