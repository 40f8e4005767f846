"""Grammars that constrain the output: checks, repairs, and conversion to vLLM's form."""
