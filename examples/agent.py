"""An agent: a model that calls Python functions until it has the answer. Run against `headrace up` with a model that
can call tools: python examples/agent.py <model> "What is the weather in Paris?"
"""

import sys

from cluster.client import Client, Tool, run_calls


def weather(city: str, days: int = 1) -> str:
    """Return the weather forecast of a city."""
    return f"sunny in {city} for {days} day(s)"


if len(sys.argv) != 3:
    sys.exit(f"usage: {sys.argv[0]} MODEL QUESTION")
tools = [Tool(weather)]
messages = [{"role": "user", "content": sys.argv[2]}]
with Client() as client:
    while True:
        answer = client.chat(sys.argv[1], messages, tools=tools)
        messages.append(answer.message)
        if not answer.tool_calls:
            break
        messages += run_calls(tools, answer.tool_calls)
print(answer.text)
