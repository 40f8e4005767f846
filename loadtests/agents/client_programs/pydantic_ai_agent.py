"""Program that runs an agent of Pydantic AI on a task."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic_ai import Agent, Tool
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

from loadtests.agents.client_programs.task import Task, read


def _tool(task: Task, tool: dict[str, Any]) -> Any:
    async def call(**arguments: Any) -> str:
        return task.call(tool["name"], arguments)

    return Tool.from_schema(call, tool["name"], tool["description"], tool["parameters"])


async def main(task: Task) -> None:
    """Run the agent to its end."""
    model = OpenAIChatModel(task.model, provider=OpenAIProvider(base_url=task.base_url, api_key=task.key))
    agent: Any = Agent(model, tools=[_tool(task, tool) for tool in task.tools])
    limits = UsageLimits(request_limit=100)
    if task.stream:
        final = ""
        async with agent.run_stream_events(task.prompt, usage_limits=limits) as events:
            async for event in events:
                if event.event_kind == "agent_run_result":
                    final = event.result.output
    else:
        final = (await agent.run(task.prompt, usage_limits=limits)).output
    task.end(final)


if __name__ == "__main__":
    asyncio.run(main(read()))
