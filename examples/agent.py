"""An agent: a model that calls Python functions until it has the answer. Run against `make demo`, or against `headrace
up` with another model that can call tools: python examples/agent.py default "What is the weather in Paris?"
"""

import sys

from cluster.client import Client, Tool, run_calls


def weather(city: str) -> str:
    """Return the weather forecast of a city."""
    return f"sunny in {city}, 21 °C"


if len(sys.argv) != 3:
    sys.exit(f"usage: {sys.argv[0]} MODEL QUESTION")
tools = [Tool(weather, strict=True)]
messages = [{"role": "user", "content": sys.argv[2]}]
choice = "required"  # the first answer is a call, even of a small model; then the model decides
with Client() as client:
    for _ in range(8):
        answer = client.chat(sys.argv[1], messages, tools=tools, tool_choice=choice, max_tokens=200)
        messages.append(answer.message)
        if not answer.tool_calls:
            break
        for call in answer.tool_calls:
            print(f"calls {call.name}({call.arguments})")
        messages += run_calls(tools, answer.tool_calls)
        choice = "auto"
print(answer.text)
