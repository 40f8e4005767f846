"""Load tests of agent work: tool calls, reasoning and long conversations, beside vLLM's own server."""
