"""Tools of an agent: Python functions that a model may call, and the calls that a model has made."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model's call of a tool. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """Return the arguments. Raises ValueError if they are not a JSON object."""
        value = json.loads(self.arguments or "{}")
        if not isinstance(value, dict):
            raise ValueError(f"the arguments of {self.name} are not a JSON object")
        return value

    def as_dict(self) -> dict[str, Any]:
        """Return the call in OpenAI's format, for the history of a chat."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class Tool(Mapping[str, Any]):
    """A Python function that a model may call. The object is also a mapping with the keys of a tool definition in
    OpenAI's format.

    The schema of the arguments comes from the annotations of the function's parameters, and the description from the
    docstring. Arguments are validated before the function is called.
    """

    def __init__(self, function: Callable[..., object], *, strict: bool = False) -> None:
        """`strict`: let the engine enforce the schema of the tool's arguments. Raises TypeError if a parameter of the
        function has no type, or a type that no schema can describe."""
        from pydantic import Field, create_model
        from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

        self.function = function
        self.name = function.__name__
        fields: dict[str, Any] = {}
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise TypeError(f"{self.name}: parameter {parameter.name} must be a plain parameter with a name")
            if parameter.annotation is parameter.empty:
                raise TypeError(f"{self.name}: parameter {parameter.name} needs a type annotation")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (parameter.annotation, Field(default))
        try:
            self._arguments = create_model(self.name, __config__={"extra": "forbid"}, **fields)
            schema = self._arguments.model_json_schema()
        except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation) as error:
            raise TypeError(f"{self.name}: {error}") from None
        schema.pop("title", None)
        definition = {
            "name": self.name,
            "description": inspect.getdoc(function) or "",
            "parameters": schema,
        }
        if strict:
            definition["strict"] = True
        self._definition = {"type": "function", "function": definition}

    def __getitem__(self, key: str) -> Any:
        return self._definition[key]

    def __iter__(self) -> Any:
        return iter(self._definition)

    def __len__(self) -> int:
        return len(self._definition)

    def run(self, call: ToolCall) -> str:
        """Call the function with the arguments of `call`. Returns the result: a string unchanged, other values as JSON.

        Wrong arguments raise no exception: the returned text describes the error for the model.
        """
        from pydantic import ValidationError

        try:
            arguments = self._arguments.model_validate(call.parsed())
        except (ValidationError, ValueError) as error:
            return f"error: wrong arguments: {error}"
        result = self.function(**{name: getattr(arguments, name) for name in type(arguments).model_fields})
        return result if isinstance(result, str) else json.dumps(result)


def run_calls(tools: Iterable[Tool], calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    """Run the calls of one answer. Returns one message with the result of each call, for the history of the chat."""
    known = {tool.name: tool for tool in tools}
    messages = []
    for call in calls:
        tool = known.get(call.name)
        content = f"error: there is no tool {call.name}" if tool is None else tool.run(call)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return messages


def tool_calls_of(message: pb.Message) -> tuple[ToolCall, ...]:
    """Return the tool calls in a message of the API."""
    return tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls)


class ToolCallDeltas:
    """The tool calls of a streamed answer, built from the parts (deltas) that were received so far."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[str, str, list[str]]] = {}

    def add(self, deltas: Iterable[pb.ToolCall]) -> None:
        """Add the deltas of a chunk. A delta with an id begins the call at its index; a delta without an id continues
        the arguments of the call at its index."""
        for delta in deltas:
            if delta.id or delta.index not in self._calls:
                self._calls[delta.index] = (delta.id, delta.name, [])
            self._calls[delta.index][2].append(delta.arguments)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls, in the order of their indices."""
        return tuple(ToolCall(id_, name, "".join(parts)) for _, (id_, name, parts) in sorted(self._calls.items()))
