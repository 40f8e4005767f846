"""The serving sides: processes that a scenario starts, and their programs."""
