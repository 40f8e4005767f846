"""Output formats of many model families, with examples, and one tokenizer that has the special tokens of all of
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from cluster.api.output_parts import OutputPart, PartKind, merge_parts
from cluster.worker.parsing import wire
from cluster.worker.parsing.kit import KitSettings, ParserKit, kit_of
from cluster.worker.parsing.port import ParserNames
from tests.support.checkpoints import build_tokenizer

Arguments = Mapping[str, Any]
Calls = Sequence[tuple[str, Arguments]]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Look something up.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
    for name in ("get_weather", "find_hotel")
]
CALLS: Calls = (("get_weather", {"city": "Zürich", "days": 3}), ("find_hotel", {"city": 'the "Old" town'}))


def as_json(arguments: Arguments) -> str:
    """Return a tool call's arguments as JSON, in the form that models write."""
    return json.dumps(arguments, ensure_ascii=False)


def _objects(calls: Calls, key: str = "arguments") -> list[str]:
    return [f'{{"name": "{name}", "{key}": {as_json(arguments)}}}' for name, arguments in calls]


def _hermes(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in _objects(calls))


def _qwen3_coder(calls: Calls, begin: str = "<tool_call>", end: str = "</tool_call>") -> str:
    def parameters(arguments: Arguments) -> str:
        return "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())

    return "\n".join(
        f"{begin}\n<function={name}>\n{parameters(arguments)}</function>\n{end}" for name, arguments in calls
    )


def _pythonic(calls: Calls) -> str:
    def call(name: str, arguments: Arguments) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    return ", ".join(call(*one) for one in calls)


def _olmo(calls: Calls) -> str:
    lines = "\n".join(_pythonic([call]) for call in calls)
    return f"<function_calls>{lines}</function_calls>"


def _deepseek(calls: Calls, form: str) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>{form.format(name=name, arguments=as_json(arguments))}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def _kimi(calls: Calls) -> str:
    inner = "".join(
        f"<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>{as_json(arguments)}<|tool_call_end|>"
        for at, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def _glm(calls: Calls) -> str:
    def pairs(arguments: Arguments) -> str:
        return "\n".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>" for key, value in arguments.items()
        )

    return "\n".join(f"<tool_call>{name}\n{pairs(arguments)}\n</tool_call>" for name, arguments in calls)


def _invokes(calls: Calls, mark: str, outer: str, kind: str = "") -> str:
    def parameters(arguments: Arguments) -> str:
        return "".join(
            f'<{mark}parameter name="{key}"{kind}>{value}</{mark}parameter>\n' for key, value in arguments.items()
        )

    inner = "".join(
        f'<{mark}invoke name="{name}">\n{parameters(arguments)}</{mark}invoke>\n' for name, arguments in calls
    )
    return f"<{outer}>\n{inner}</{outer}>"


@dataclass(frozen=True)
class Format:
    """The output format of a model family: its parsers, and an example with content, reasoning and tool calls."""

    tools: str
    reasoning: str
    output: str
    long: str
    """An output with one call, whose arguments have some hundred tokens."""
    short: str
    """An output with one call."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    streams: bool = True
    """Whether vLLM streams the format. If it does not, a streamed answer is parsed as a whole."""
    is_right: bool = True
    """Whether vLLM's streamed arguments are valid JSON."""

    @property
    def name(self) -> str:
        """The names of the parsers, such as `hermes+qwen3`."""
        return f"{self.tools}+{self.reasoning}" if self.reasoning else self.tools


LONG: Calls = (("get_weather", {"city": "A long way to Tipperary, ünd “back”. " * 12, "days": 12}),)
THOUGHT = "First I think.\nIt is < 3.</think>\n\n"


def _formats() -> Iterator[Format]:
    def both(tools: str, reasoning: str, written: Any, before: str = "Let me look. ", calls: Calls = CALLS) -> Format:
        thought = THOUGHT if reasoning else ""
        outputs = (thought + before + written(one) for one in (calls, LONG, (("find_hotel", {"city": "Zürich"}),)))
        return Format(tools, reasoning, *outputs)

    yield both("hermes", "", _hermes)
    yield both("hermes", "qwen3", _hermes)
    yield both("qwen3_coder", "", _qwen3_coder)
    yield both("qwen3_xml", "qwen3", _qwen3_coder)
    yield both("llama3_json", "", lambda calls: "; ".join(_objects(calls, "parameters")), before="<|python_tag|>")
    yield both("llama4_pythonic", "", lambda calls: f"[{_pythonic(calls)}]", before="")
    yield both("pythonic", "", lambda calls: f"[{_pythonic(calls)}]", before="")
    yield both("mistral", "", lambda calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{as_json(a)}" for n, a in calls))
    json_form = "function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
    yield both("deepseek_v3", "", lambda calls: _deepseek(calls, json_form))
    yield both("deepseek_v3", "deepseek_r1", lambda calls: _deepseek(calls, json_form))
    v31 = both("deepseek_v31", "deepseek_v3", lambda calls: _deepseek(calls, "{name}<｜tool▁sep｜>{arguments}"))
    yield replace(v31, template_kwargs={"thinking": True})
    yield both(
        "deepseek_v32", "", lambda calls: _invokes(calls, "｜DSML｜", "｜DSML｜function_calls", ' string="true"')
    )
    yield both("kimi_k2", "", _kimi)
    yield both("kimi_k2", "kimi_k2", _kimi)
    yield both("glm45", "", _glm)
    yield both("glm45", "glm45", _glm)
    yield both("granite", "", lambda calls: f"<|tool_call|>[{', '.join(_objects(calls))}]", before="")
    yield both("granite4", "", lambda calls: "\n".join(f"<tool_call>{text}</tool_call>" for text in _objects(calls)))
    yield both(
        "internlm",
        "",
        lambda calls: f"<|action_start|><|plugin|>{_objects(calls[:1], 'parameters')[0]}<|action_end|>",
        calls=CALLS[:1],
    )
    jamba = both("jamba", "", lambda calls: f"<tool_calls>[{', '.join(_objects(calls))}]</tool_calls>")
    yield replace(jamba, is_right=False)
    yield both("hunyuan_a13b", "", lambda calls: f"<tool_calls>[{', '.join(_objects(calls))}]</tool_calls>", before="")
    phi4 = both("phi4_mini_json", "", lambda calls: f"functools[{', '.join(_objects(calls))}]", before="")
    yield replace(phi4, streams=False)
    yield both("minimax_m2", "", lambda calls: _invokes(calls, "", "minimax:tool_call"))
    yield both("minimax_m2", "minimax_m2", lambda calls: _invokes(calls, "", "minimax:tool_call"))
    yield both("ernie45", "ernie45", _hermes)
    yield both("olmo3", "", _olmo, before="")
    yield both("seed_oss", "", lambda calls: _qwen3_coder(calls, "<seed:tool_call>", "</seed:tool_call>"))
    yield both("step3p5", "step3p5", _qwen3_coder)
    yield both("lfm2", "", lambda calls: f"<|tool_call_start|>[{_pythonic(calls)}]<|tool_call_end|>", before="")


FORMATS = tuple(_formats())
MARKS = (
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "<|python_start|>", "<|python_end|>",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>",
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<arg_key>", "</arg_key>",
    "<arg_value>", "</arg_value>", "<|tool_call|>", "<tool_response>", "<|action_start|>", "<|action_end|>",
    "<|plugin|>", "<tool_calls>", "</tool_calls>", "<minimax:tool_call>", "</minimax:tool_call>", "<seed:tool_call>",
    "</seed:tool_call>", "<seed:think>", "</seed:think>", "<|tool_call_start|>", "<response>", "</response>",
    "<|im_start|>", "<|im_end|>", "｜DSML｜",
)  # fmt: skip


def build_folder(folder: Path) -> Path:
    """Write a tokenizer that has the special tokens of all formats into `folder`, and return the folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(build_tokenizer("llama", folder)))
    tokenizer.add_tokens(list(MARKS))
    tokenizer.save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokenizer)}))
    return folder


@cache
def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer in `folder`, loaded as the parser process does."""
    from vllm.tokenizers.hf import get_cached_tokenizer

    from cluster.worker.weights.vocabulary import load_tokenizer

    return get_cached_tokenizer(load_tokenizer(folder))


def kit_for(folder: Path, form: Format, long_call: int = 256) -> ParserKit:
    """Return a ParserKit with the parsers of a format."""
    names = ParserNames(form.tools, form.reasoning)
    return kit_of(tokenizer_of(folder), KitSettings(str(folder), names, long_call=long_call))


def encode(folder: Path, text: str) -> list[int]:
    """Return the token ids of an output's text."""
    ids: list[int] = tokenizer_of(folder).encode(text, add_special_tokens=False)
    return ids


def opening_for(form: Format, prompt: Sequence[int], *rest: Any, **changes: Any) -> wire.Open:
    """Return the message that opens a parser session for a request in the format `form`. It is the message that the
    function `opening` returns for `prompt`, `rest` and `changes`, with the chat template arguments of `form`."""
    return opening(prompt, *rest, **({"chat_template_kwargs": dict(form.template_kwargs)} | changes))


def opening(prompt: Sequence[int], emitted: Sequence[int] = (), **changes: Any) -> wire.Open:
    """Return the message that opens a parser session for a request with TOOLS. `changes`: fields of
    OutputParsing.request, or of Open."""
    own = {key: changes.pop(key) for key in ("stop", "is_whole", "min_tokens") if key in changes}
    request = json.dumps({"tools": TOOLS, "tool_choice": "auto"} | changes)
    fields: dict[str, Any] = {"stop": (), "is_whole": False, "min_tokens": 0} | own
    return wire.Open(
        number=1,
        request=request,
        prompt=wire.pack_ids(prompt),
        emitted=wire.pack_ids(emitted),
        grammar=None,
        **fields,
    )


def joined(steps: Sequence[wire.Parsed]) -> list[OutputPart]:
    """Return the parts of all steps, with adjacent parts joined."""
    return merge_parts([part for step in steps for part in step.parts])


def called(parts: Sequence[wire.Part]) -> list[tuple[str, Any]]:
    """Return the name and the arguments of each tool call in the parts."""
    calls: dict[int, list[str]] = {}
    for kind, text, call in parts:
        if kind == PartKind.TOOL_NAME:
            calls[call] = [text, ""]
        elif kind == PartKind.TOOL_ARGUMENTS:
            calls[call][1] += text
    return [(name, json.loads(arguments)) for name, arguments in calls.values()]


def as_parts(parts: Sequence[OutputPart]) -> list[OutputPart]:
    """Return the parts of a worker's output, with adjacent parts joined."""
    return merge_parts(parts)
