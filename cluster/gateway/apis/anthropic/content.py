"""Translation of the messages and content blocks of Anthropic's API into messages of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from cluster.api.outcomes import invalid, quoted
from cluster.gateway.apis.openai.fields import Fields, unsupported
from cluster.gateway.calls.request import MAX_MESSAGES

TOOL_ID_PREFIX: Final = "toolu_"
"""Prefix of tool call ids in this API. Chat templates and OpenAI's API use the ids without this prefix."""
ROLES: Final = ("user", "assistant", "system")
BILLING_HEADER: Final = "x-anthropic-billing-header"
"""Beginning of a line that Claude Code puts before its system prompt. The line is left out, because it changes with
every request and would keep the system prompt out of the prefix cache."""


def chat_messages(body: Fields) -> list[dict[str, Any]]:
    """Return the messages of a body in OpenAI's form. Raises CallError."""
    conversation = _Conversation()
    for i, value in enumerate(body.array("messages")):
        if _is_plain(value):
            conversation.messages.append({"role": value["role"], "content": value["content"]})
        else:
            conversation.add(body.member("messages", i))
    return conversation.messages


def text_of(fields: Fields, name: str) -> str:
    """Return the joined text blocks of a system prompt. Raises CallError."""
    return "".join([without_header(_text(block)) for block in _blocks(fields, name, ("text",))])


def without_header(text: str) -> str:
    """Return the text of a system prompt without the billing header, a line that Claude Code puts before the text."""
    return text.partition("\n")[2] if text.startswith(BILLING_HEADER) else text


def _is_plain(value: Any) -> bool:
    """Return whether a message has the role user or assistant, one text as its content, and no other fields."""
    if type(value) is not dict or len(value) != 2:
        return False
    return type(value.get("content")) is str and value.get("role") in ("user", "assistant")


def _blocks(fields: Fields, name: str, kinds: tuple[str, ...]) -> Iterator[Fields]:
    """Yield the content blocks in a field. Raises CallError for a block whose kind is not in `kinds`."""
    fields.at_most(MAX_MESSAGES, "blocks", name)
    for block in fields.objects(name):
        kind = block.text("type")
        if kind is None:
            raise invalid(block.path("type"), "is missing: give a block of type text")
        if kind not in kinds:
            raise unsupported(block.path("type"), f"{quoted(kind)} blocks are refused here; send {' or '.join(kinds)}")
        yield block


def _required(block: Fields, name: str) -> str:
    text = block.text(name)
    if text is None:
        raise invalid(block.path(name), "is missing")
    return text


def _text(block: Fields) -> str:
    return _required(block, "text")


def _tool_id(block: Fields, name: str) -> str:
    """Return the id of a tool call without TOOL_ID_PREFIX, as OpenAI's API and chat templates use it."""
    tool_id = _required(block, name)
    if not tool_id:
        raise invalid(block.path(name), "must not be empty")
    return tool_id.removeprefix(TOOL_ID_PREFIX)


def _content(texts: list[str]) -> str | list[dict[str, str]] | None:
    """Return the content of a message with these text blocks: a text, a list of text parts, or None. Empty blocks are
    left out, as vLLM does."""
    kept = [text for text in texts if text]
    if len(kept) > 1:
        return [{"type": "text", "text": text} for text in kept]
    return kept[0] if kept else None


class _Conversation:
    """The OpenAI messages into which messages of Anthropic's API have been translated so far."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._called: set[str] = set()
        """Ids of the tool calls so far."""

    def add(self, message: Fields) -> None:
        """Translate a message. Raises CallError."""
        role = message.text("role")
        if role not in ROLES:
            raise invalid(message.path("role"), f"must be one of {', '.join(ROLES)}; got {quoted(role)}")
        content = message.values.get("content")
        if content is None:
            raise invalid(message.path("content"), "is missing: give a string or an array of blocks")
        if not isinstance(content, str | list):
            raise message.wrong("content", "a string or an array of blocks")
        if role == "system":
            self._add_system(message, content)
        elif isinstance(content, str):
            self.messages.append({"role": role, "content": content})
        elif role == "user":
            self._add_user(message)
        else:
            self._add_assistant(message)

    def _add_system(self, message: Fields, content: str | list[Any]) -> None:
        text = without_header(content) if isinstance(content, str) else text_of(message, "content")
        if text:
            self.messages.append({"role": "system", "content": text})

    def _add_user(self, message: Fields) -> None:
        """Translate a message of the user: add a message for each tool result, then one message with all texts."""
        texts = []
        for block in _blocks(message, "content", ("text", "tool_result")):
            if block.values["type"] == "text":
                texts.append(_text(block))
            else:
                self._add_tool_result(block)
        if any(texts):
            self.messages.append({"role": "user", "content": _content(texts)})

    def _add_tool_result(self, block: Fields) -> None:
        tool_id = _tool_id(block, "tool_use_id")
        if tool_id not in self._called:
            shown = quoted(block.values["tool_use_id"])
            raise invalid(block.path("tool_use_id"), f"{shown} is not the id of an earlier tool_use block")
        content = block.values.get("content")
        block.flag("is_error")
        if content is None or isinstance(content, str):
            text = content or ""
        elif isinstance(content, list):
            text = "\n".join([_text(part) for part in _blocks(block, "content", ("text",))])
        else:
            raise block.wrong("content", "a string or an array of blocks")
        self.messages.append({"role": "tool", "content": text, "tool_call_id": tool_id})

    def _add_assistant(self, message: Fields) -> None:
        texts, thinking, calls = [], [], []
        for block in _blocks(message, "content", ("text", "thinking", "redacted_thinking", "tool_use")):
            match block.values["type"]:
                case "text":
                    texts.append(_text(block))
                case "thinking":
                    thinking.append(_required(block, "thinking"))
                case "tool_use":
                    calls.append(self._tool_call(block))
        out: dict[str, Any] = {"role": "assistant", "content": _content(texts)}
        if calls:
            out["tool_calls"] = calls
        if reasoning := "".join(thinking):
            out["reasoning"] = out["reasoning_content"] = reasoning
        self.messages.append(out)

    def _tool_call(self, block: Fields) -> dict[str, Any]:
        tool_id, name = _tool_id(block, "id"), _required(block, "name")
        arguments = block.object("input")
        if arguments is None:
            raise invalid(block.path("input"), "is missing: give an object")
        self._called.add(tool_id)
        # Some templates show a tool call as JSON: the fields have the order in which vLLM passes them.
        function = {"arguments": dict(arguments.values), "name": name}
        return {"id": tool_id, "function": function, "type": "function"}
