"""Load tests with agents: conversations that contain tool calls and grow by a few messages a turn."""
