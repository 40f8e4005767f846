"""Engines: one contract, held by the simulated and the real one."""
