"""Load of agents: conversations that call tools, and grow by a few messages a turn."""
