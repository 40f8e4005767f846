"""The task of coding agents: write, read and edit files in an empty folder, and run commands. The task is written once
for the tools of each agent.

Every command appends a line to TRACE, so the files at the end show which calls were made and how often.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.agents.cases import Call
from loadtests.agents.client_tasks.tasks import TURNS, Step, Task
from loadtests.children import ROOT

ENVIRONMENT = ROOT / ".venv-clients"
NODE_MODULES = ENVIRONMENT / "node_modules"
TRACE = "trace.txt"
_OLD_TITLE, _NEW_TITLE = '"""Ein Modul 🙂."""', '"""A module 🙂."""'
_PYTHON = (
    _OLD_TITLE + '\n\nGREETING = "it\'s \\"quoted\\" \\\\ 数据"\n\n\ndef greet() -> str:\n\treturn f"{GREETING}\\n"\n'
)
_NOTES = "# Notes\n\n- one <tag> & {braces}\n- two: Köln 🙂\n\n```sh\necho \"$HOME\" '\\n'\n```\n"
_VALUES = json.dumps({"text": 'a "quoted" \\ text', "numbers": [1, -0.5, 1e-7], "null": None}, indent=2) + "\n"
_OLD, _NEW = "- two: Köln 🙂\n", '- two: "Köln" 🙂\n- three: 数据\n'


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of an agent: for each action, a function that returns the tool call. The arguments of `edit` are path,
    old text and new text."""

    run: Callable[[str], Call]
    write: Callable[[str, str], Call]
    read: Callable[[str], Call]
    edit: Callable[[str, str, str], Call]


PI = Tools(
    run=lambda command: Call("bash", {"command": command}),
    write=lambda path, text: Call("write", {"path": path, "content": text}),
    read=lambda path: Call("read", {"path": path}),
    edit=lambda path, old, new: Call("edit", {"path": path, "edits": [{"oldText": old, "newText": new}]}),
)
QWEN_CODE = Tools(
    run=lambda command: Call(
        "run_shell_command", {"command": command, "description": "run it", "is_background": False}
    ),
    write=lambda path, text: Call("write_file", {"file_path": path, "content": text}),
    read=lambda path: Call("read_file", {"file_path": path}),
    edit=lambda path, old, new: Call("edit", {"file_path": path, "old_string": old, "new_string": new}),
)
OPENCODE = Tools(
    run=lambda command: Call("bash", {"command": command, "description": "run it"}),
    write=lambda path, text: Call("write", {"filePath": path, "content": text}),
    read=lambda path: Call("read", {"filePath": path}),
    edit=lambda path, old, new: Call("edit", {"filePath": path, "oldString": old, "newString": new}),
)
CLAUDE_CODE = Tools(
    run=lambda command: Call("Bash", {"command": command, "description": "run it"}),
    write=lambda path, text: Call("Write", {"file_path": path, "content": text}),
    read=lambda path: Call("Read", {"file_path": path}),
    edit=lambda path, old, new: Call("Edit", {"file_path": path, "old_string": old, "new_string": new}),
)


def coding_task(name: str, tools: Tools, folder: Path) -> Task:
    """Return the task for an agent whose working folder is `folder`, an absolute path."""
    python, notes, values = (str(folder / file) for file in ("greet.py", "notes.md", "values.json"))

    def trace(turn: int, more: str = "") -> Call:
        return tools.run(f"echo 'turn {turn}{more} \"🙂\"' >> {TRACE} && wc -l < {TRACE}")

    actions: list[Sequence[Call]] = [
        [trace(1)],
        [tools.write(python, _PYTHON)],
        [tools.read(python)],
        [tools.write(notes, _NOTES)],
        [trace(5), trace(5, " again")],
        [tools.read(notes)],
        [tools.edit(notes, _OLD, _NEW)],
        [trace(8)],
        [tools.read(python), trace(9)],
        [tools.write(values, _VALUES)],
        [trace(11)],
        [tools.edit(python, _OLD_TITLE, _NEW_TITLE)],
    ]
    said = "Ich gehe zu Schritt {} 🙂: 数据, `code`, a <tag> and then I go on with the next step.\n\n"
    thought = 'Turn {}: I look at the files. JSON such as {{"x": [1]}} is fine.\n1. I write\n2. I check.'
    steps = [
        Step(calls, said.format(turn) if turn % 2 == 0 else "", thought.format(turn) if turn % 4 else "")
        for turn, calls in enumerate(actions, 1)
    ]
    return Task(name, steps, Step((), f"All {TURNS} turns of {name} are done 🙂."))


def expected_files() -> dict[str, list[str]]:
    """Return the expected files at the end of the task, each as a list of lines. Calls of one turn may add their lines
    to TRACE in any order."""
    lines = [f'turn {turn} "🙂"\n' for turn in ("1", "5", "5 again", "8", "9", "11")]
    texts = {
        "greet.py": _PYTHON.replace(_OLD_TITLE, _NEW_TITLE),
        "notes.md": _NOTES.replace(_OLD, _NEW),
        "values.json": _VALUES,
    }
    return {TRACE: lines} | {name: text.splitlines(keepends=True) for name, text in texts.items()}


def judge_files(folder: Path) -> list[str]:
    """Return a message for each fault in the working folder after the task."""
    wrong = []
    for name, lines in expected_files().items():
        try:
            found = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, ValueError) as error:
            wrong.append(f"{name}: {error}")
            continue
        if (sorted(found) if name == TRACE else found) != (sorted(lines) if name == TRACE else lines):
            wrong.append(f"{name} is {found}, not {lines}")
    return wrong


# -- the agents


@dataclass(frozen=True, slots=True)
class Server:
    """Server that an agent calls. `root`: URL without a path."""

    root: str
    key: str
    model: str
    context_tokens: int


@dataclass(frozen=True, slots=True)
class CodingAgent:
    """A coding agent. `settings` returns the files of its home folder, by path. `command` returns the command line for
    a server and a prompt."""

    name: str
    package: str
    api: str
    tools: Tools
    command: Callable[[Server, str], Sequence[str]]
    settings: Callable[[Server], Mapping[str, object]]
    environment: Callable[[Server], Mapping[str, str]] = lambda _: {}


def _pi_models(api: str, path: str) -> Callable[[Server], Mapping[str, object]]:
    def settings(server: Server) -> Mapping[str, object]:
        model = {
            "id": server.model, "contextWindow": server.context_tokens, "maxTokens": 8192, "reasoning": True,
        }  # fmt: skip
        provider = {"baseUrl": server.root + path, "api": api, "apiKey": server.key, "models": [model]}
        return {".pi/agent/models.json": {"providers": {"headrace": provider}}}

    return settings


def _pi_command(server: Server, prompt: str) -> Sequence[str]:
    return ["pi", "--offline", "--no-session", "--provider", "headrace", "--model", server.model, "-p", prompt]


_PI, _CLAUDE = "@earendil-works/pi-coding-agent", "@anthropic-ai/claude-code"
CODING_AGENTS = (
    CodingAgent("pi", _PI, "chat", PI, _pi_command, _pi_models("openai-completions", "/v1")),
    CodingAgent("pi-messages", _PI, "messages", PI, _pi_command, _pi_models("anthropic-messages", "")),
    CodingAgent(
        "qwen-code", "@qwen-code/qwen-code", "chat", QWEN_CODE,
        lambda server, prompt: ["qwen", "--yolo", "--auth-type", "openai", "--model", server.model, "-p", prompt],
        lambda server: {
            ".qwen/settings.json": {
                "general": {"disableAutoUpdate": True, "enableAutoUpdate": False},
                "privacy": {"usageStatisticsEnabled": False},
                "telemetry": {"enabled": False},
            }
        },
        lambda server: {"OPENAI_API_KEY": server.key, "OPENAI_BASE_URL": server.root + "/v1"},
    ),
    CodingAgent(
        "opencode", "opencode-ai", "chat", OPENCODE,
        lambda server, prompt: ["opencode", "run", "--auto", "--model", f"headrace/{server.model}", prompt],
        lambda server: {
            ".config/opencode/opencode.json": {
                "autoupdate": False,
                "share": "disabled",
                "provider": {
                    "headrace": {
                        "npm": "@ai-sdk/openai-compatible",
                        "options": {"baseURL": server.root + "/v1", "apiKey": server.key},
                        "models": {
                            server.model: {
                                "tool_call": True, "limit": {"context": server.context_tokens, "output": 8192},
                            }
                        },
                    }
                },
            }
        },
        lambda _: {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_LSP_DOWNLOAD": "1"},
    ),
    CodingAgent(
        "claude-code", _CLAUDE, "messages", CLAUDE_CODE,
        lambda server, prompt: [
            "node", str(NODE_MODULES / _CLAUDE / "cli-wrapper.cjs"), "--model", server.model,
            "--allowedTools", "Bash,Read,Write,Edit", "-p", prompt,
        ],
        lambda _: {},
        lambda server: {
            "ANTHROPIC_BASE_URL": server.root, "ANTHROPIC_API_KEY": server.key,
            "ANTHROPIC_SMALL_FAST_MODEL": server.model, "ANTHROPIC_DEFAULT_HAIKU_MODEL": server.model,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
        },
    ),
)  # fmt: skip
