"""Implementations of the port `Engine`: vLLM and a simulation."""
