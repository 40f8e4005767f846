"""Engines behind the port `Engine`: vLLM and a simulation."""
