"""Ten families of tool formats: the tokens, the chat template and the text of a model's answer with tool calls.

Each family names the parsers of vLLM that read its format. `write` makes the text that a model of this family would
generate for given calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.agents.cases import Call

Write = Callable[[Sequence[Call]], str]
REQUIRED, NAMED = "required", "named"
FORCED = (REQUIRED, NAMED)
"""Kinds of tool choice that force a call."""


@dataclass(frozen=True, slots=True)
class Family:
    """A format in which models write tool calls. `tokens`: added tokens of the tokenizer, which vLLM's parsers
    need or which make the text realistic.

    `reasoning`: vLLM's parser of reasoning, or "". `opens_reasoning`: whether the model itself writes <think>;
    if not, the output begins within the reasoning. `half_open`: texts that begin like a call, but are not
    calls. `text_before_calls`: whether the format allows text before the calls.
    """

    name: str
    tools: str
    reasoning: str
    tokens: tuple[str, ...]
    write: Write
    half_open: tuple[str, ...]
    opens_reasoning: bool = True
    text_before_calls: bool = True
    indent: int | None = None
    """Indentation with which the template writes the tools."""
    forced_as_json: bool = False
    """Whether vLLM expects forced calls as plain JSON and not in the family's format."""

    def answer(self, calls: Sequence[Call], text: str = "", reasoning: str | None = "", choice: str = "auto") -> str:
        """Return the text of a model's answer with these calls, text and reasoning, in the format of this family.

        `reasoning`: None if the answer has neither reasoning nor the tags around it. `choice`: the request's tool
        choice.
        """
        thought = ""
        if self.reasoning and reasoning is not None:
            thought = f"{'<think>' if self.opens_reasoning else ''}{reasoning}</think>" + ("\n\n" if reasoning else "")
        if choice in FORCED and self.forced_as_json:
            return thought + _forced_json(calls, choice)
        said = text if not calls or (self.text_before_calls and choice not in FORCED) else ""
        return thought + said + (self.write(calls) if calls else "")

    @property
    def template(self) -> str:
        """The chat template: ChatML with the tools in the system message."""
        arguments = f"(indent={self.indent})" if self.indent else ""
        tool = "{{ tool | tojson" + arguments + " }}"
        return (
            "{%- if tools %}<|im_start|>system\nTools of " + self.name + ":\n"
            "{%- for tool in tools %}\n" + tool + "{%- endfor %}<|im_end|>\n{%- endif %}"
            "{%- for message in messages %}{{ '\n<|im_start|>' + message.role + '\n' }}"
            "{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>\n{% endif %}"
            "{{ message.content or '' }}"
            "{%- for call in message.tool_calls or [] %}\n{{ call.id }} {{ call.function.name }}: "
            "{{ call.function.arguments | tojson }}{%- endfor %}"
            "{%- if message.tool_call_id %} (of {{ message.tool_call_id }}){%- endif %}<|im_end|>{%- endfor %}"
            "{%- if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{%- endif %}"
        )


def _forced_json(calls: Sequence[Call], choice: str) -> str:
    if choice == NAMED:
        return _json(calls[0].arguments)
    return _json([{"name": call.name, "parameters": call.arguments} for call in calls])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> str:
    """Return a value as the XML-like formats write it: text unchanged, everything else as JSON."""
    return value if isinstance(value, str) else _json(value)


def _hermes(calls: Sequence[Call]) -> str:
    objects = ({"name": call.name, "arguments": call.arguments} for call in calls)
    return "\n".join(f"<tool_call>\n{_json(value)}\n</tool_call>" for value in objects)


def _llama3_json(calls: Sequence[Call]) -> str:
    return "; ".join(_json({"name": call.name, "parameters": call.arguments}) for call in calls)


def _mistral(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS] " + _json([{"name": call.name, "arguments": call.arguments} for call in calls])


def _pythonic(calls: Sequence[Call]) -> str:
    written = (f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})" for call in calls)
    return f"[{', '.join(written)}]"


def _deepseek_v3(calls: Sequence[Call]) -> str:
    one = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
    written = "\n".join(one.format(call.name, _json(call.arguments)) for call in calls)
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def _kimi_k2(calls: Sequence[Call]) -> str:
    one = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
    written = "".join(one.format(call.name, number, _json(call.arguments)) for number, call in enumerate(calls))
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def _glm45(calls: Sequence[Call]) -> str:
    def one(call: Call) -> str:
        pairs = (
            f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n"
            for key, value in call.arguments.items()
        )
        return f"<tool_call>{call.name}\n{''.join(pairs)}</tool_call>"

    return "\n".join(one(call) for call in calls)


def _qwen3_coder(calls: Sequence[Call]) -> str:
    def one(call: Call) -> str:
        pairs = (f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in call.arguments.items())
        return f"<tool_call>\n<function={call.name}>\n{''.join(pairs)}</function>\n</tool_call>"

    return "\n".join(one(call) for call in calls)


def _minimax_m2(calls: Sequence[Call]) -> str:
    def one(call: Call) -> str:
        pairs = (f'<parameter name="{key}">{_plain(value)}</parameter>\n' for key, value in call.arguments.items())
        return f'<invoke name="{call.name}">\n{"".join(pairs)}</invoke>\n'

    return f"<minimax:tool_call>\n{''.join(one(call) for call in calls)}</minimax:tool_call>"


def _granite(calls: Sequence[Call]) -> str:
    return "<|tool_call|>" + _json([{"name": call.name, "arguments": call.arguments} for call in calls])


_THINK = ("<think>", "</think>")
_CALL = ("<tool_call>", "</tool_call>")
FAMILIES = (
    Family("hermes", "hermes", "qwen3", _THINK + _CALL, _hermes, ("<tool_", "<tool_call is what I would write")),
    Family(
        "llama3_json", "llama3_json", "", ("<|python_tag|>",), _llama3_json, ("{", '{"name'),
        text_before_calls=False, indent=4,
    ),
    Family("mistral", "mistral", "", ("[TOOL_CALLS]",), _mistral, ("[TOOL", "[TOOL_CALLS is a token")),
    Family(
        "pythonic", "pythonic", "", (), _pythonic, ("[", "[see below"), text_before_calls=False, forced_as_json=True,
    ),
    Family(
        "deepseek_v3", "deepseek_v3", "deepseek_r1",
        (*_THINK, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
         "<｜tool▁sep｜>"),
        _deepseek_v3, ("<｜tool", "```json\n{"), opens_reasoning=False, indent=2,
    ),
    Family(
        "kimi_k2", "kimi_k2", "kimi_k2",
        (*_THINK, "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
         "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        _kimi_k2, ("<|tool_calls", "functions.none:0"),
    ),
    Family(
        "glm45", "glm45", "glm45",
        (*_THINK, *_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        _glm45, ("<tool_", "<arg_key"),
    ),
    Family("qwen3_coder", "qwen3_coder", "", _CALL, _qwen3_coder, ("<function", "<tool_call")),
    Family(
        "minimax_m2", "minimax_m2", "minimax_m2",
        (*_THINK, "<minimax:tool_call>", "</minimax:tool_call>"), _minimax_m2, ("<invoke", "<minimax:"),
        opens_reasoning=False,
    ),
    Family("granite", "granite", "", ("<|tool_call|>",), _granite, ("<|tool", "<|tool_cal l"), forced_as_json=True),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
