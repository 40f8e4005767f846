"""Simulation of a cluster in virtual time. The production policies run without processes and networks."""
