"""The serving sides: what a scenario starts, and the programs it starts them with."""
