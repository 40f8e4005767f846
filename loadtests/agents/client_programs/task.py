"""The task that a client program gets, and the record that it writes: a file with one JSON object per line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Task:
    """A task from a JSON file.

    `base_url`, `key`, `model`: the server. `prompt`: the first message. `tools`: name, description and JSON schema of
    each tool. `stream`: whether to stream. `results`: name, arguments and result of each expected call.
    """

    def __init__(self, path: Path) -> None:
        """Read the task from the JSON file `path`. Its key `record` is the path of the file to which `call` writes the
        tool calls."""
        given: dict[str, Any] = json.loads(path.read_text())
        self.base_url: str = given["base_url"]
        self.key: str = given["key"]
        self.model: str = given["model"]
        self.prompt: str = given["prompt"]
        self.stream: bool = given["stream"]
        self.tools: list[dict[str, Any]] = given["tools"]
        self._results: list[dict[str, Any]] = given["results"]
        self._record = Path(given["record"])

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Record a tool call and return its result. For a call that is not expected, the result is an error."""
        self._write({"name": name, "arguments": arguments})
        for expected in self._results:
            if (expected["name"], expected["arguments"]) == (name, arguments):
                return str(expected["result"])
        return "error: no such call in the script"

    def end(self, final: str) -> None:
        """Record the text of the last answer."""
        self._write({"final": final})

    def _write(self, value: dict[str, Any]) -> None:
        with self._record.open("a") as file:
            file.write(json.dumps(value) + "\n")


def read() -> Task:
    """Return the task whose file is the program's argument."""
    return Task(Path(sys.argv[1]))
