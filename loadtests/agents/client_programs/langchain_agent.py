"""Program that runs an agent of LangChain on a task."""

from __future__ import annotations

import asyncio
from typing import Any

from langchain.agents import create_agent
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from loadtests.agents.client_programs.task import Task, read

RECURSION_LIMIT = 200


def _tool(task: Task, tool: dict[str, Any]) -> Any:
    async def call(**arguments: Any) -> str:
        return task.call(tool["name"], arguments)

    return StructuredTool(
        name=tool["name"], description=tool["description"], args_schema=tool["parameters"], coroutine=call
    )


async def main(task: Task) -> None:
    """Run the agent to its end."""
    model = ChatOpenAI(model=task.model, base_url=task.base_url, api_key=SecretStr(task.key), streaming=task.stream)
    agent: Any = create_agent(model, tools=[_tool(task, tool) for tool in task.tools])
    given = {"messages": [{"role": "user", "content": task.prompt}]}
    limits = {"recursion_limit": RECURSION_LIMIT}
    state: Any = None
    if task.stream:
        async for mode, value in agent.astream(given, limits, stream_mode=["messages", "values"]):
            state = value if mode == "values" else state
    else:
        state = await agent.ainvoke(given, limits)
    task.end(state["messages"][-1].text)


if __name__ == "__main__":
    asyncio.run(main(read()))
