"""Implementations of the interface `Engine`: vLLM and a simulation."""
