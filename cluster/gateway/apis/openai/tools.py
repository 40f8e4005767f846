"""Parsing of the tools, the tool choice and the documents of a chat."""

from __future__ import annotations

from typing import Any

from cluster.api.outcomes import invalid
from cluster.gateway.apis.json_values import kind
from cluster.gateway.apis.openai.fields import Fields, unsupported
from cluster.gateway.calls.request import MAX_MESSAGES
from cluster.gateway.calls.tools import MAX_TOOLS, ToolChoice, check_choice, check_tools, function_tool, named_choice


def tools_of(body: Fields) -> list[dict[str, Any]]:
    """Return the tools of a chat in the form of ChatPrompt.tools; empty for an absent field. Raises CallError."""
    if body.values.get("tools") is None:
        return []
    body.at_most(MAX_TOOLS, "tools", "tools")
    tools = [_tool(tool) for tool in body.objects("tools")]
    if not tools:
        raise invalid("tools", "must not be empty: give at least one tool, or leave it out")
    check_tools("tools", tools)
    return tools


def _tool(tool: Fields) -> dict[str, Any]:
    if tool.text("type") not in (None, "function"):
        raise unsupported(tool.path("type"), "send tools of type function")
    function = tool.object("function")
    if function is None:
        raise invalid(tool.path("function"), "is missing")
    values, deferred = function.values, tool.values.get("defer_loading")
    if deferred is not None and not isinstance(deferred, bool):
        raise tool.wrong("defer_loading", "true or false")
    inner = deferred if values.get("defer_loading") is None else values["defer_loading"]
    out = function_tool(
        values.get("name"), values.get("description"), values.get("parameters"), values.get("strict"), inner
    )
    return out if deferred is None else out | {"defer_loading": deferred}


def choice_of(body: Fields, tools: list[dict[str, Any]]) -> ToolChoice:
    """Return the tool choice. The default is `auto` with tools and `none` without. Raises CallError."""
    value = body.values.get("tool_choice")
    choice: ToolChoice
    if value is None:
        choice = "auto" if tools else "none"
    elif isinstance(value, str):
        choice = value
    elif isinstance(value, dict):
        choice = named_choice(_function_name(Fields(value, "tool_choice")))
    else:
        raise body.wrong("tool_choice", "a string or an object")
    check_choice(tools, choice)
    return choice


def _function_name(choice: Fields) -> str:
    if choice.text("type") not in (None, "function"):
        raise unsupported(choice.path("type"), "give auto, none, required or a function, and only the allowed tools")
    function = choice.object("function")
    if function is None:
        raise invalid(choice.path("function"), "is missing")
    name = function.text("name")
    if not name:
        raise invalid(function.path("name"), "is missing")
    return name


def documents_of(body: Fields) -> tuple[dict[str, str], ...]:
    """Return the documents for the chat template. Each document is an object whose values are strings. Raises
    CallError."""
    if body.values.get("documents") is None:
        return ()
    body.at_most(MAX_MESSAGES, "documents", "documents")
    for document in body.objects("documents"):
        for name, value in document.values.items():
            if not isinstance(value, str):
                raise invalid(document.path(name), f"must be a string, got {kind(value)}")
    return tuple(body.array("documents"))
