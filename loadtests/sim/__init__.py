"""Simulation of a cluster in virtual time: the production policies without processes and networks."""
