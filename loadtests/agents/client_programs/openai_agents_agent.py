"""Program that runs an agent of OpenAI's Agents SDK on a task, over the chat completions API."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from agents import Agent, FunctionTool, OpenAIChatCompletionsModel, RunConfig, Runner
from openai import AsyncOpenAI

from loadtests.agents.client_programs.task import Task, read

MAX_TURNS = 100


def _tool(task: Task, tool: dict[str, Any]) -> Any:
    async def call(_: Any, arguments: str) -> str:
        return task.call(tool["name"], json.loads(arguments))

    return FunctionTool(
        name=tool["name"],
        description=tool["description"],
        params_json_schema=tool["parameters"],
        on_invoke_tool=call,
        strict_json_schema=False,
    )


async def main(task: Task) -> None:
    """Run the agent to its end."""
    client = AsyncOpenAI(base_url=task.base_url, api_key=task.key)
    agent = Agent(
        name="agent",
        model=OpenAIChatCompletionsModel(task.model, openai_client=client),
        tools=[_tool(task, tool) for tool in task.tools],
    )
    config = RunConfig(tracing_disabled=True)
    if task.stream:
        streamed = Runner.run_streamed(agent, task.prompt, max_turns=MAX_TURNS, run_config=config)
        async for _ in streamed.stream_events():
            pass
        final = streamed.final_output
    else:
        final = (await Runner.run(agent, task.prompt, max_turns=MAX_TURNS, run_config=config)).final_output
    task.end(final)


if __name__ == "__main__":
    asyncio.run(main(read()))
