"""Scripted tasks for real client programs: what the model says in each turn, the engine that emits these turns, and the
programs that prepare and serve them."""
