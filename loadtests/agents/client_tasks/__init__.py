"""Scripted tasks for real clients: their turns, the engine that answers them, and the programs around it."""
