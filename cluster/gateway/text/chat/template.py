"""Chat templates: a model's Jinja template renders messages into one prompt, as in transformers.

The Jinja environment equals that of transformers: sandboxed and immutable, trim_blocks and lstrip_blocks, loop
controls, tojson without HTML escapes, raise_exception, strftime_now, and {% generation %} blocks. A generation block
only marks text for training, so it is rendered like its contents. A template gets messages in the form in which vLLM's
server passes them (conversation.py). Each render is limited in CPU time, in the characters of the output and of
intermediate texts (template_guard.py), and in the items of all `range` calls together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import safe_range

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.text.chat.content_format import takes_parts
from cluster.gateway.text.chat.control_tokens import ControlTokens
from cluster.gateway.text.chat.conversation import conversation, merged_system
from cluster.gateway.text.chat.template_guard import (
    MAX_RENDER_S,
    MAX_RENDERED_CHARS,
    Environment,
    RenderLimitExceeded,
    bounded,
)

MAX_RANGE_ITEMS: Final = 1_000_000
MAX_SOURCE_CHARS: Final = 1 << 20
MAX_MESSAGE_CHARS: Final = 500
RESERVED_KWARGS: Final = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
)
CONTINUE_MARK: Final = "\ue000HEADRACE-CONTINUES-HERE "
"""Mark that is appended to the final message, to find the end of that message in the prompt. The space at the end of
the mark shows whether the template trims messages."""


_LATE_SYSTEM: Final = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
"""Messages that are rendered to test whether a template allows a later system message."""


class _Raised(TemplateError):
    """Raised when a template calls raise_exception. The text of the exception is meant for the caller."""


class _GenerationBlock(jinja2.ext.Extension):
    """The block {% generation %}...{% endgeneration %}. Renders the body of the block in a separate scope, as Jinja's
    call block does."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: object) -> None:
    raise _Raised(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(now: Callable[[], datetime]) -> Environment:
    environment = Environment([_GenerationBlock, jinja2.ext.loopcontrols], {"tojson": _tojson})
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form[:MAX_MESSAGE_CHARS])
    return environment


def _allows_late_system(source: str) -> bool:
    """Return whether a template renders a system message that is not at the beginning.

    The test is the same as in vLLM, so that the prompts are the same. It renders the template without the Jinja
    extensions and functions that transformers adds. If a template needs one of these to render a late system message,
    the result is False.
    """
    try:
        template = Environment([jinja2.ext.loopcontrols], {}).guarded(source)
        _run(
            template,
            {"messages": _LATE_SYSTEM, "add_generation_prompt": False, "range": _bounded_range()},
            MAX_RENDER_S,
        )
    except (CallError, TemplateSyntaxError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A compiled template, and the form in which it takes the messages of a chat."""

    template: jinja2.Template
    takes_parts: bool
    knows_developer: bool


def _compiled(environment: Environment, source: str) -> _Compiled:
    """Compile a template. Raises TemplateSyntaxError, or another error for a template that is nested too deeply."""
    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateSyntaxError(f"it has {len(source)} characters, at most {MAX_SOURCE_CHARS} are allowed", 1)
    knows_developer = '"developer"' in source or "'developer'" in source  # as vLLM decides
    return _Compiled(environment.guarded(source), takes_parts(environment.parse(source)), knows_developer)


class ChatTemplate:
    """The chat templates of a model, compiled once. Rendering is thread-safe, and pure except for `now`."""

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
        control_tokens: ControlTokens | None = None,
        now: Callable[[], datetime] = datetime.now,
        render_s: float = MAX_RENDER_S,
    ) -> None:
        """`sources`: the Jinja text of each template by name; a single template has the name `default`. `render_s`: CPU
        limit of one render, in seconds. `special_tokens`: the text of each special token by name, such as bos_token.
        `control_tokens`: tokens that are escaped in texts of users, tools and documents; None to escape nothing.

        A template that does not compile raises its error in `render`, so that the model can still serve completions.
        """
        environment = _environment(now)
        self._render_s = render_s
        self._special_tokens = dict(special_tokens or {})
        self._control_tokens = control_tokens
        self._sources = dict(sources)
        self._compiled: dict[str, _Compiled | str] = {}
        for name, source in sources.items():
            try:
                self._compiled[name] = _compiled(environment, source)
            except TemplateSyntaxError as e:
                self._compiled[name] = f"line {e.lineno}: {e.message}"
            except Exception as e:  # nested too deeply for Jinja or for Python's compiler
                self._compiled[name] = _short(f"{type(e).__name__}: {e}")

    def __bool__(self) -> bool:
        return bool(self._sources)

    def __repr__(self) -> str:
        return f"ChatTemplate({', '.join(sorted(self._sources)) or 'none'})"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        merges_system: bool = False,
    ) -> str:
        """Return the text of the prompt, special tokens included.

        `tools`: None and an empty list are equivalent. `template_kwargs`: further template arguments, such as
        `documents`. `continue_final_message`: leave the last message open; no generation prompt is added then.
        `merges_system`: if one of the model's templates allows a system message only at the beginning, merge all system
        messages into one at the beginning. Raises CallError: INVALID_FIELD on `messages` with the error text of the
        template, or UNSUPPORTED_FEATURE if the model has no usable template.
        """
        if not messages:
            raise invalid("messages", "at least one message is needed")
        tools = list(tools) if tools else None
        compiled = self._template(self._name_for(tools))
        if merges_system and _has_late_system(messages) and not self._allows_late_system:
            messages = merged_system(messages)
        messages = conversation(messages, in_parts=compiled.takes_parts, knows_developer=compiled.knows_developer)
        arguments = dict(_checked(template_kwargs or {}))
        if self._control_tokens is not None:
            messages = self._control_tokens.in_messages(messages)
            arguments |= {"documents": self._control_tokens.in_documents(arguments.get("documents"))}
        if continue_final_message:
            messages = _marked(messages)
        variables = {
            "range": _bounded_range(),
            **self._special_tokens,
            **arguments,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        variables.setdefault("documents", None)
        text = _run(compiled.template, variables, self._render_s)
        return _cut_at_mark(text, messages[-1]["content"]) if continue_final_message else text

    @cached_property
    def _allows_late_system(self) -> bool:
        """Whether all templates that render chats allow a system message that is not at the beginning."""
        return all(
            _allows_late_system(self._sources[name]) for name in ("default", "tool_use") if name in self._sources
        )

    def _name_for(self, tools: object) -> str:
        if tools is not None and "tool_use" in self._compiled:
            return "tool_use"
        if "default" in self._compiled:
            return "default"
        existing = f"only the templates {', '.join(sorted(self._compiled))}" if self._compiled else "no chat template"
        raise CallError(
            Outcome.UNSUPPORTED_FEATURE, f"the model has {existing}: use Complete with a plain prompt instead of Chat"
        )

    def _template(self, name: str) -> _Compiled:
        compiled = self._compiled[name]
        if isinstance(compiled, str):
            raise CallError(
                Outcome.UNSUPPORTED_FEATURE,
                f"the model's chat template does not compile ({compiled}): use Complete with a plain prompt",
            )
        return compiled


def _has_late_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(message["role"] == "system" for message in messages[1:])


def _checked(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    if wrong := sorted(RESERVED_KWARGS & kwargs.keys()):
        raise invalid("chat_template_kwargs_json", f"{', '.join(wrong)} is set by the request itself: leave it out")
    return kwargs


def _bounded_range() -> Callable[..., range]:
    """Return Jinja's sandboxed `range` for one render, with a limit on the items of all its calls together."""
    left = MAX_RANGE_ITEMS

    def bounded(*args: int) -> range:
        nonlocal left
        wanted = safe_range(*args)
        left -= len(wanted)
        if left < 0:
            raise RenderLimitExceeded(f"ranges of more than {MAX_RANGE_ITEMS} items")
        return wanted

    return bounded


def _run(template: jinja2.Template, variables: dict[str, Any], render_s: float) -> str:
    """Render a template in at most `render_s` seconds of CPU time. Every failure is raised as a CallError on the field
    `messages`."""
    try:
        with bounded(render_s):
            return "".join(_pieces(template.root_render_func(template.new_context(variables))))
    except _Raised as e:
        raise invalid("messages", _short(str(e))) from e
    except (RenderLimitExceeded, SecurityError, OverflowError, MemoryError, RecursionError) as e:
        raise invalid(
            "messages",
            f"the chat template was stopped on these messages ({_short(str(e))}): send fewer or shorter ones",
        ) from e
    except (UndefinedError, TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
        raise invalid(
            "messages", f"the model's chat template cannot render these messages ({_short(str(e))}): check their fields"
        ) from e


def _pieces(pieces: Iterator[str]) -> Iterator[str]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_RENDERED_CHARS:
            raise RenderLimitExceeded(f"a prompt of more than {MAX_RENDERED_CHARS} characters")
        yield piece


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages, with CONTINUE_MARK appended to the last text of the last message."""
    last = dict(messages[-1])
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + CONTINUE_MARK
    elif isinstance(content, Sequence) and any("text" in part for part in content):
        parts = [dict(part) for part in content]
        at = max(index for index, part in enumerate(parts) if "text" in part)
        parts[at]["text"] += CONTINUE_MARK
        last["content"] = parts
    else:
        raise invalid("continue_final_message", "the last message has no text to continue: give it content")
    return [*messages[:-1], last]


def _cut_at_mark(text: str, content: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the prompt up to CONTINUE_MARK, which stands at the end of the last message. If the template has trimmed
    the last message, white space before the mark is removed too. `content`: the content of the last message, with the
    mark. Raises CallError if the template changes the last message otherwise."""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
    final = parts[-1].removesuffix(CONTINUE_MARK)
    at = text.rfind(CONTINUE_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise invalid(
            "continue_final_message", "the model's chat template changes the last message, so it cannot be continued"
        )
    return text[:at] if text.startswith(CONTINUE_MARK, at) else text[:at].rstrip()


def _short(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "..."
